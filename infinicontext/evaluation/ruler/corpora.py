"""Texts that RULER's tasks read from and that are not ours to pass on: where they are looked for, and what to do where they are missing."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.generate import Corpora
from infinicontext.evaluation.ruler.tasks import TASKS, Needles, Questions

# punkt: NLTK's, as the official code. regex: after . ! or ?; its samples are not the official ones.
Splitter = Literal["punkt", "regex"]


class File(NamedTuple):
    """One of them."""

    name: str
    what: str
    source: str


FILES = {
    "essay": File(
        "PaulGrahamEssays.json",
        'Paul Graham\'s essays, {"text": ...}',
        "scripts/data/synthetic/json/download_paulgraham_essay.py of github.com/NVIDIA/RULER",
    ),
    "squad": File("squad.json", "SQuAD 2.0, dev-v2.0.json", "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"),
    "hotpotqa": File("hotpotqa.json", "HotpotQA, hotpot_dev_distractor_v1.json", "https://huggingface.co/datasets/namlh2004/hotpotqa"),
    "english_words": File("english_words.json", "RULER's list of English words", "scripts/data/synthetic/json of github.com/NVIDIA/RULER"),
}


class Loaded(NamedTuple):
    """What was found."""

    corpora: Corpora
    missing: dict[str, str]  # task: what it lacks
    ids: dict[str, str]  # corpus: SHA-256 (hex) of its file


def data_folder(folder: str) -> Path:
    """Where files are: in the folder that is named, else in ruler/ of the environment's INFINICONTEXT_DATA, else of the cache."""
    if folder:
        return Path(folder)
    return Path(os.environ.get("INFINICONTEXT_DATA", "~/.cache/infinicontext/data")).expanduser() / "ruler"


def needed(task: str) -> str | None:
    """The corpus that a task reads from."""
    parameters = TASKS[task]
    if isinstance(parameters, Needles):
        return "essay" if parameters.haystack == "essay" else None
    return parameters.dataset if isinstance(parameters, Questions) else None


def load_corpora(folder: str, tasks: tuple[str, ...], splitter: Splitter = "punkt") -> Loaded:
    """The corpora that tasks need.

    Args:
      folder: see `data_folder`.
      tasks: names of TASKS.
      splitter: of essays into sentences.

    Raises:
      UserError: a file that is there cannot be read.
    """
    where, contents, ids, missing = data_folder(folder), {}, {}, {}
    # Long lists of words are read from english_words, if it is there.
    for name in dict.fromkeys([*(name for name in map(needed, tasks) if name), *(["english_words"] if "cwe" in tasks else [])]):
        path = where / FILES[name].name
        if not path.exists():
            continue
        data = path.read_bytes()
        try:
            contents[name] = json.loads(data)
            contents[name] = contents[name]["text"] if name == "essay" else contents[name]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is not {FILES[name].what}: {error}") from error
        ids[name] = hashlib.sha256(data).hexdigest()
    sentences, lacks = None, None
    if "essay" in contents:
        try:
            sentences = sentence_splitter(splitter, where)
        except UserError as error:
            lacks = str(error)
    for task in tasks:
        name = needed(task)
        if name and name not in contents:
            file = FILES[name]
            missing[task] = f"there is no {where / file.name}: {file.what}, from {file.source}"
        elif name == "essay" and sentences is None:
            missing[task] = lacks
    words = contents.get("english_words")
    corpora = Corpora(
        essay=contents.get("essay"),
        sentences=sentences,
        squad=contents.get("squad"),
        hotpotqa=contents.get("hotpotqa"),
        english_words=list(words.values() if isinstance(words, dict) else words) if words else None,
    )
    return Loaded(corpora, missing, ids)


def sentence_splitter(splitter: Splitter, where: Path | None = None, *, trained: bool = True) -> Callable[[str], list[str]]:
    """Splits texts into sentences.

    Args:
      splitter: which.
      where: a folder that may hold NLTK's data.
      trained: on English (NLTK's punkt_tab), as RULER's; without it there are no files, as in BABILong.

    Raises:
      UserError: NLTK or its data are missing.
    """
    if splitter == "regex":
        return lambda text: re.split(r"(?<=[.!?])\s+", text)
    try:
        import nltk
        from nltk.tokenize import PunktSentenceTokenizer, PunktTokenizer

        if not trained:
            return PunktSentenceTokenizer().tokenize
        nltk.data.path.append(str(where))
        return PunktTokenizer("english").tokenize
    except ImportError as error:
        raise UserError('sentences are split by nltk: pip install "infinicontext[evaluation]", or set the splitter to regex') from error
    except LookupError as error:
        raise UserError(
            f"NLTK's punkt_tab is missing: infinicontext download ruler, or python -m nltk.downloader -d {where} punkt_tab, or set the "
            "splitter to regex"
        ) from error
