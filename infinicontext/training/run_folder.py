"""The run folder: what a run was, so that it can be resumed, evaluated and compared.

config.json (experiment, versions, commit, command), metrics.jsonl, tensorboard/, checkpoints/, eval.json.
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment, differences, from_plain, to_plain
from infinicontext.nn.parameters import parameter_count


def open_run_folder(experiment: Experiment, workdir: pathlib.Path, allow_config_change: bool, command: str) -> None:
    """Writes config.json, or compares the experiment with the one that is there.

    Raises:
      UserError: the folder cannot be used, or belongs to another experiment.
    """
    path = workdir / "config.json"
    if path.exists():
        changes = differences(load_config(workdir), experiment)
        if changes and not allow_config_change:
            raise UserError(
                f"{workdir} was started with another config ({'; '.join(changes[:5])}); pass --allow-config-change to go on, or use a "
                "new --workdir"
            )
        if not changes:
            return
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty and holds no run (no config.json); use a new folder")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
        record = {
            "experiment": to_plain(experiment),
            "parameters": parameter_count(models.abstract(experiment.model)),
            "versions": versions(),
            "commit": commit(),
            "command": command,
        }
        write_json(path, record)


def load_config(workdir: pathlib.Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
      UserError: no run there, or a config that this version cannot read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a run folder: it has no config.json")
    try:
        return from_plain(json.loads(path.read_text())["experiment"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide numbers."""
    names = ("infinicontext", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


def commit() -> str:
    """The git commit of this code, or an empty string outside a checkout."""
    here = pathlib.Path(__file__).parent
    result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def write_json(path: pathlib.Path, record: dict) -> None:
    """Writes a JSON file that is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
