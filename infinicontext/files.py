"""Files and folders that appear only when they are complete."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from infinicontext.errors import UserError


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to be filled, which takes the name `target` at the end of the block and is removed if that fails.

    Raises:
      UserError: `target` exists and is not an empty folder, or it cannot be made or filled.
    """
    target = pathlib.Path(os.path.realpath(target))
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists already; choose a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path, work: str, name: str) -> Iterator[None]:
    """Makes a folder, which errors call `name`, and keeps other processes of the same work out of it; one that is killed lets go of it.

    Raises:
      UserError: it cannot be made, or another process works in it.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{name} cannot be made: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{name} is in use by another {work} process") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: there is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes a JSON file that is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    temporary.replace(path)
