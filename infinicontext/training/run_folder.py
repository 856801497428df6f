"""The run folder: what a run was, so that it can be resumed, evaluated and compared.

config.json (experiment, versions, commit, command), metrics.jsonl, tensorboard/, checkpoints/, eval.json.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys

import jax

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment, differences, from_plain, to_plain
from infinicontext.files import locked, write_json
from infinicontext.nn.parameters import parameter_count

KEPT = "huggingface"  # in a run folder: the small files of the Hugging Face folder it came from


def check_run_folder(experiment: Experiment, workdir: pathlib.Path, data_fingerprint: str, allow_config_change: bool) -> None:
    """Compares an experiment and its data with the run in a folder, if there is one; changes nothing.

    Raises:
      UserError: the folder cannot be used, or belongs to another experiment.
    """
    if (workdir / "config.json").exists():
        changes = differences(load_config(workdir), experiment)
        if not changes and json.loads((workdir / "config.json").read_text()).get("data_fingerprint") != data_fingerprint:
            changes = ["the documents, the tokenizer or the reference that it names are no longer the same"]
        if changes and not allow_config_change:
            raise UserError(
                f"{workdir} was started with another config ({'; '.join(changes[:5])}); pass --allow-config-change to go on, or use a "
                "new --workdir"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; it must be a folder")
    elif workdir.exists() and any(not _is_leftover(path) for path in workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty and holds no run (no config.json); use a new folder")


def _is_leftover(path: pathlib.Path) -> bool:
    """What a process that was killed before its first step can leave behind."""
    return path.name in (".lock", "config.json.tmp") or (path.is_dir() and not any(path.iterdir()))


def write_config(experiment: Experiment, workdir: pathlib.Path, data_fingerprint: str, command: str) -> None:
    """Writes config.json, unless it already says the same."""
    record = {
        "experiment": to_plain(experiment),
        "parameters": parameter_count(models.abstract(experiment.model)),
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "commit": commit(),
        "command": command,
    }
    path = workdir / "config.json"
    same = ("experiment", "data_fingerprint")
    if path.exists() and all(json.loads(path.read_text()).get(key) == record[key] for key in same):
        return
    if jax.process_index() == 0:
        write_json(path, record)


@contextlib.contextmanager
def lock(workdir: pathlib.Path):
    """Makes the folder and keeps other training processes out of it; a folder that stays empty is removed again.

    Raises:
      UserError: the folder cannot be made, or another process trains in it.
    """
    if jax.process_index() != 0:
        yield
        return
    with locked(workdir, "training", f"--workdir {workdir}"):
        try:
            yield
        finally:
            if not (workdir / "config.json").exists() and all(_is_leftover(path) for path in workdir.iterdir()):
                shutil.rmtree(workdir)


def load_config(workdir: pathlib.Path, *, whole_paths: bool = True) -> Experiment:
    """The experiment of a run folder; `whole_paths`: a tokenizer kept within the folder is named by its whole path.

    Raises:
      UserError: no run there, or a config that this version cannot read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a run folder: it has no config.json")
    try:
        experiment = from_plain(json.loads(path.read_text())["experiment"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if whole_paths and getattr(experiment.data, "tokenizer", None) == KEPT:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, tokenizer=str(workdir / KEPT)))
    return experiment


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide numbers."""
    names = ("infinicontext", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


def commit() -> str:
    """The git commit of this code, or an empty string outside a checkout."""
    here = pathlib.Path(__file__).parent
    result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""
