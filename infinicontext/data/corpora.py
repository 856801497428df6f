"""Text collections: where documents come from, how they are split, and the flat array of tokens they become.

Shape letters: N documents, K tokens of the whole corpus, T tokens of one document.
"""

import dataclasses
import glob
import hashlib
import importlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError

TEXT_KINDS = (".txt", ".md", ".rst", ".py")
KINDS = (*TEXT_KINDS, ".jsonl", ".parquet")
SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages")
Split = Literal["train", "validation"]
TEXTS_PER_CALL = 256  # bounds the memory of the tokenizer's own results


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as tokens in one flat array.

    Attributes:
      tokens: [K], the smallest unsigned integer dtype that holds the vocabulary.
      starts: int64 [N + 1]; document i is tokens[starts[i] : starts[i + 1]].
      names: where each document came from.
      bytes_per_document: int64 [N], bytes of UTF-8 in the text (without the start token), for bits per byte.
      scores: what a reference model makes of each token, by name, [K] (data/reference.py).
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]
    bytes_per_document: np.ndarray
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.names)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, int32 [T]."""
        return self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.int32)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all tokens and document boundaries."""
        digest = hashlib.sha256(self.tokens.astype("<u4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()


def split_of(text: str, validation_fraction: float) -> Split:
    """The split that a text belongs to, by its hash."""
    return "validation" if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < validation_fraction else "train"


def load_corpus(source: str, tokenizer: Tokenizer, split: Split, validation_fraction: float = 0.05) -> Corpus:
    """Reads one split of a source and encodes it; each document begins with the tokenizer's start token if it has one.

    A document's side is decided by the hash of its text alone, so it depends neither on order nor on file names, identical texts
    are never on both sides, and a larger fraction only moves documents from training to validation.

    Raises:
      UserError: the source cannot be read, or the split is empty.
    """
    names, texts, sizes = [], [], []
    for name, text in documents(source):
        if split_of(text, validation_fraction) == split:
            names.append(name)
            texts.append(text)
            sizes.append(len(text.encode()))
    if not texts:
        raise UserError(
            f'data.source "{source}" has no document in its {split} split with data.validation_fraction {validation_fraction}; '
            "whole documents are split, so give more of them (files, or lines of a .jsonl) or another fraction"
        )
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    start = np.array([] if tokenizer.start_id is None else [tokenizer.start_id], dtype)
    documents_N = []
    for i in range(0, len(texts), TEXTS_PER_CALL):
        for ids_T in tokenizer.encode_batch(texts[i : i + TEXTS_PER_CALL]):
            documents_N.append(np.concatenate([start, ids_T.astype(dtype)]))
    starts = np.cumsum([0, *(len(ids_T) for ids_T in documents_N)], dtype=np.int64)
    return Corpus(np.concatenate(documents_N), starts, tuple(names), np.array(sizes, np.int64))


def documents(source: str) -> Iterator[tuple[str, str]]:
    """The non-empty documents of a source as (name, text), in an order that is always the same.

    Args:
      source: one of
        "python": the .py, .txt and .rst files of the running Python's standard library, without installed packages and the files
          that describe this one build; files that are not UTF-8 (tests of codecs) are left out. Names and order do not depend on
          where Python lies.
        a file: .txt, .md, .rst or .py is one document, each line of a .jsonl one (field "text"), each row of a .parquet one
          (column "text").
        a folder: all files of these kinds in it and below, except in hidden folders and folders of installed packages.
        a glob such as "books/**/*.txt": the matching files of these kinds.
        "hf:NAME" or "hf:NAME:SPLIT": the field "text" of a data set that the `datasets` library loads; SPLIT is "train" if absent.

    Raises:
      UserError: while iterating, if the source is missing, unreadable, malformed or without text.
    """
    if source == "python":
        found = _python_library()
    elif source.startswith("hf:"):
        found = _huggingface(source)
    else:
        files = local_files(source, KINDS, '"python", a file, a folder, a glob or "hf:NAME"')
        found = (document for path, name in files for document in _read(path, name))
    empty = True
    for name, text in found:
        if text:
            empty = False
            yield name, text
    if empty:
        raise UserError(f'data.source is "{source}", which holds no text; documents are read from {", ".join(KINDS)} files')


def _python_library() -> Iterator[tuple[str, str]]:
    library = sysconfig.get_path("stdlib")
    for name in _files_below(library):
        if name.endswith((".py", ".txt", ".rst")) and not name.startswith(("config-", "_sysconfigdata")):
            try:
                text = Path(library, name).read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError):
                continue
            yield name, text


def _huggingface(source: str) -> Iterator[tuple[str, str]]:
    name, _, split = source.removeprefix("hf:").partition(":")
    datasets = _optional("datasets", "hf", source)
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds: not found, offline, no such split, several configurations
        raise UserError(f'data.source is "{source}", which the datasets library cannot load: {error}') from error
    if "text" not in rows.column_names:
        raise UserError(f'data.source is "{source}", which has the columns {", ".join(rows.column_names)} but no column "text"')
    for number, text in enumerate(rows["text"]):
        yield f"{name}:{number}", _checked(text, f"{source}, row {number}")


def local_files(source: str, kinds: tuple[str, ...], allowed: str) -> Iterator[tuple[Path, str]]:
    """The files of these kinds that a path, a folder or a glob names, with the name of each, in an order that is always the same.

    Raises:
      UserError: nothing there, or a single file of another kind. The message ends with what is `allowed`.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        if Path(path).suffix.lower() not in kinds:
            raise UserError(f'data.source is "{source}"; a file must be one of {", ".join(kinds)}')
        found = [(Path(path), Path(path).name)]
    elif os.path.isdir(path):
        found = [(Path(path, name), name) for name in _files_below(path)]
    elif glob.has_magic(path):
        found = [(Path(match), Path(match).as_posix()) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
    else:
        raise UserError(f'data.source is "{source}", where there is no file or folder; it must be {allowed}')
    yield from ((path, name) for path, name in found if path.suffix.lower() in kinds)


def _files_below(folder: str) -> list[str]:
    """Paths of all files in and below a folder, relative to it, sorted."""

    def refuse(error: OSError):
        raise UserError(f'data.source: cannot read the folder "{error.filename}": {error.strerror}') from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in files]
    return sorted(found)


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The documents of one file."""
    kind = path.suffix.lower()
    if kind in TEXT_KINDS:
        yield name, _read_text(path)
    elif kind == ".jsonl":
        for number, record in json_lines(path):
            text = record.get("text") if isinstance(record, dict) else None
            yield f"{name}:{number}", _checked(text, f'"{path}", line {number}')
    else:
        yield from _read_parquet(path, name)


def _read_text(path: Path) -> str:
    # Bytes, because text mode would change line ends, and bits per byte are about the file as it is.
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f'data.source: cannot read "{path}": {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'data.source: "{path}" is not UTF-8 text (at byte {error.start})') from error


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The values in a .jsonl file with their line numbers, from 1; empty lines are passed over.

    Raises:
      UserError: the file cannot be read, or a line is not JSON.
    """
    # Not splitlines(), which would also split at line separators inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'data.source: "{path}", line {number} is not valid JSON: {error}') from error


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, str]]:
    parquet = _optional("pyarrow.parquet", "parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'data.source: "{path}" has the columns {", ".join(file.schema_arrow.names)} but no column "text"')
            column = file.read(columns=["text"]).column("text")
        for number, text in enumerate(column):
            yield f"{name}:{number}", _checked(text.as_py(), f'"{path}", row {number}')
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these two
        raise UserError(f'data.source: cannot read "{path}" as parquet: {error}') from error


def _checked(text: object, where: str) -> str:
    """The field "text" of one record, if it is one."""
    if not isinstance(text, str):
        raise UserError(f'data.source: {where} has no field "text" that is a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data.source: {where} has a lone surrogate in its text, which is not Unicode") from error
    return text


def _optional(module: str, extra: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f'data.source is "{source}", which needs the package {package}: pip install "infinicontext[{extra}]"') from error
