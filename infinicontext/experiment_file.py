"""An experiment as the command line names it: FILE.py:FUNCTION, with fields changed by flags."""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import io
import pathlib
import re
from typing import TypeVar

import tyro

from infinicontext.errors import UserError
from infinicontext.experiment import Experiment

T = TypeVar("T")


def load(reference: str):
    """What FILE.py:FUNCTION returns.

    Raises:
      UserError: no such file or function.
    """
    file, separator, name = reference.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise UserError(f"experiment {reference} is not of the form FILE.py:FUNCTION")
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f"experiment {reference}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and key[0] != "_"
    ]
    if name not in functions:
        close = difflib.get_close_matches(name, functions, n=1)
        raise UserError(f"{file} has no experiment {name}{f'; did you mean {close[0]}?' if close else ''} It has: {', '.join(functions)}")
    function = getattr(module, name)
    required = [] if inspect.isclass(function) else [x for x in inspect.signature(function).parameters.values() if x.default is x.empty]
    if inspect.isclass(function) or required:
        raise UserError(f"{reference} needs arguments; an experiment is a function that needs none")
    return function()


def one_experiment(reference: str) -> Experiment:
    """The experiment that FILE.py:FUNCTION returns."""
    experiment = load(reference)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{reference} does not return one experiment; use infinicontext sweep for a list")
    return experiment


def override(config: T, arguments: list[str], parser: argparse.ArgumentParser) -> T:
    """The dataclass with fields changed by `arguments`, as an experiment's in ["--optimizer.learning-rate", "1e-3"].

    With --help among them, prints the help of `parser` (the command's own) and of all fields, and exits.

    Raises:
      UserError: an unknown field (with the nearest name) or a value of the wrong type.
    """
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[type(config)],
                prog=parser.prog,
                default=config,
                args=arguments,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(one_sentence(message.getvalue())) from None


def one_sentence(box: str) -> str:
    """What tyro says in a box of several paragraphs: the first, and of "Perhaps you meant" the first flag."""
    frame = "│|╭╮╰╯─-+ "
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if text.strip(frame):
            paragraphs[-1].append(text)
        elif paragraphs[-1]:
            paragraphs.append([])
    said = re.sub(r"^Error parsing \w+: ", "", " ".join(paragraphs[0])).rstrip(".")
    near = next((re.search(r"--\S+", " ".join(lines[1:])) for lines in paragraphs if lines and "you meant" in lines[0]), None)
    return f"{said}; did you mean {near[0]}?" if near else said
