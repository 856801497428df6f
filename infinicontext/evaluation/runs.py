"""Reads what training and evaluation left in run folders: config.json, metrics.jsonl and eval.json.

Only config.json must be there. metrics.jsonl holds one object per line, with a loss or a validation_loss in nats per token; lines
that are no whole object, as a killed run leaves them, are passed over. eval.json holds results by task; tasks that nobody asks
for are no error. Files that are there but broken are a UserError.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from infinicontext.errors import UserError

DATA_IDENTITY = ("type", "source", "corpus", "tokenizer", "template")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of one run. Names are unique in a comparison; `number` counts its runs and fixes colour and marker."""

    name: str
    number: int
    folder: Path
    config: dict
    training: list[dict]  # lines of metrics.jsonl with a loss, by step
    validation: list[dict]  # lines with a validation_loss, by step
    gates: list[dict]  # lines with the gates of a memory, a list of heads for each layer, by step
    eval: dict  # {} before an evaluation

    @property
    def experiment(self) -> dict:
        """The config that the run was started with."""
        return self.config["experiment"]

    @property
    def train_length(self) -> int | None:
        """Tokens per training sequence, None before an evaluation."""
        return self.eval.get("train_length")

    @property
    def data(self) -> str:
        """Names what the run learnt from; losses may be compared between runs where this is equal."""
        data = self.experiment.get("data") or {}
        return " ".join(value if isinstance(value, str) else json.dumps(value) for key in DATA_IDENTITY if (value := data.get(key)))

    @property
    def train_speed(self) -> float | None:
        """Median tokens per second over the training lines, so that the first steps, which compile, do not count."""
        speeds = [line["tokens_per_second"] for line in self.training if line.get("tokens_per_second") is not None]
        return float(np.median(speeds)) if speeds else None

    def task(self, name: str) -> dict:
        """The results of one evaluation without the missing ones (null), {} if it was not done."""
        results = self.eval.get("tasks", {}).get(name) or {}
        return {key: value for key, value in results.items() if value is not None}


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in the order given. A folder without config.json is left out with a line on stderr.

    Raises:
      UserError: no folder holds a run, or a config.json or eval.json is broken.
    """
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    folders = list(once.values())
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise UserError(f"compare: no run folder among {', '.join(map(str, folders)) or 'none given'}; a run folder holds a config.json")
    for folder in folders:
        if folder not in found:
            print(f"compare: skipped {folder}, it holds no config.json", file=sys.stderr)
    configs = [_read_object(folder / "config.json") for folder in found]
    for folder, config in zip(found, configs):
        if not isinstance(config.get("experiment"), dict):
            raise UserError(f"{folder / 'config.json'} has no object named experiment, so it is not the config of a run")
    runs = []
    for number, (name, folder, config) in enumerate(zip(_unique_names(found, configs), found, configs)):
        lines = _read_lines(folder / "metrics.jsonl")
        results = _read_object(folder / "eval.json") if (folder / "eval.json").is_file() else {}
        by_key = (_with(lines, key) for key in ("loss", "validation_loss", "gates"))
        runs.append(Run(name, number, folder, config, *by_key, results))
    return runs


def _unique_names(folders: list[Path], configs: list[dict]) -> list[str]:
    """The experiments' names; where two are equal with the folder's name, and where that does not help with the path."""
    short = [str(config["experiment"].get("name") or folder.name) for folder, config in zip(folders, configs)]
    longer = [f"{name} ({folder.resolve().name})" for name, folder in zip(short, folders)]
    longest = [f"{name} ({folder})" for name, folder in zip(short, folders)]
    counts = Counter(short), Counter(longer)
    return [a if counts[0][a] == 1 else b if counts[1][b] == 1 else c for a, b, c in zip(short, longer, longest)]


def _read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


def _read_lines(path: Path) -> list[dict]:
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # half a line, where a run was killed
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _with(lines: list[dict], key: str) -> list[dict]:
    """Lines that have the key. Of a step that was done again after a restart, the last."""
    by_step = {line["step"]: line for line in lines if line.get(key) is not None}
    return [by_step[step] for step in sorted(by_step)]


def by_group(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Runs with equal keys together, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
