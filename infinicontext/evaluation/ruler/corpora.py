"""Texts that RULER's tasks read from and that are not ours to pass on: where they are looked for, and what to do where they are missing."""

import hashlib
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from infinicontext.errors import UserError
from infinicontext.evaluation.ruler import essays
from infinicontext.evaluation.ruler.generate import Corpora
from infinicontext.evaluation.ruler.tasks import TASKS, Needles, Questions

# punkt: NLTK's, as the official code. regex: after . ! or ?; its samples are not the official ones.
Splitter = Literal["punkt", "regex"]


class File(NamedTuple):
    """One of them."""

    name: str
    what: str
    size: str
    source: str  # where it is from; of the essays, the list of their addresses
    sha256: str  # of what the official samples are made from (hex)


REVISION = "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a"  # of NVIDIA/RULER
FILES = {  # in the order in which they are fetched
    "squad": File(
        "squad.json",
        "SQuAD 2.0, dev-v2.0.json",
        "4.4 MB",
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
        "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    ),
    "hotpotqa": File(
        "hotpotqa.json",
        "HotpotQA, hotpot_dev_distractor_v1.json",
        "61 MB",
        "https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/7e54db4656209750ff487f6fdf8e39a66dba136b/hotpot_dev_distractor_v1.json",
        "e3da074df24e8369009918aa5cdbdd254dadcde4c63f7569d36afd6f2268caa8",
    ),
    "english_words": File(
        "english_words.json",
        "RULER's list of English words",
        "8.6 MB",
        f"https://media.githubusercontent.com/media/NVIDIA/RULER/{REVISION}/scripts/data/synthetic/json/english_words.json",
        "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca",
    ),
    "essay": File(
        "PaulGrahamEssays.json",
        'Paul Graham\'s essays, {"text": ...}',
        "3.1 MB",
        f"https://raw.githubusercontent.com/NVIDIA/RULER/{REVISION}/scripts/data/synthetic/json/PaulGrahamEssays_URLs.txt",
        "8d31e1b660e0f2180bcca6d238e18f77921df9d158611582b860da1762b6d3dd",
    ),
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


def present(folder: str, tasks: tuple[str, ...]) -> dict[str, Path]:
    """The files that tasks read and that are there."""
    where = data_folder(folder)
    # Long lists of words are read from english_words, if it is there.
    names = dict.fromkeys([*(name for name in map(needed, tasks) if name), *(["english_words"] if "cwe" in tasks else [])])
    return {name: path for name in names if (path := where / FILES[name].name).exists()}


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
    for name, path in present(folder, tasks).items():
        data = path.read_bytes()
        try:
            contents[name] = json.loads(data)
            if name == "essay":
                contents[name] = contents[name]["text"]
                if not isinstance(contents[name], str) or not contents[name].strip():
                    raise ValueError("its text is empty, or no text")
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
            into = f" --folder {folder}" if folder else ""
            missing[task] = (
                f"there is no {where / file.name}: {file.what}, {file.size}, which infinicontext download ruler{into} fetches from "
                f"{file.source} (without it: {', '.join(other for other in TASKS if needed(other) != name)})"
            )
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


def download(folder: str, say: Callable[[str], None]) -> None:
    """Fetches what is missing, and checks what is there.

    A file appears under its name when it is whole and its checksum is right. The essays are made of hundreds of pages, which may change
    and are nowhere else: a text of others is kept, and said to be another. NLTK's punkt_tab is fetched by NLTK.

    Args:
      folder: see `data_folder`.
      say: told of each file.

    Raises:
      UserError: the folder cannot be written, a download fails, or its checksum is wrong.
    """
    where = data_folder(folder)
    for name, file in FILES.items():
        path = where / file.name
        other = f", but not the official one (SHA-256 {file.sha256}); results will say so"
        if path.is_file():
            same = hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
            say(f"{path}: there already" + ("" if same else other))
            continue
        try:
            where.mkdir(parents=True, exist_ok=True)
            data = _fetch(file.source)
            if name == "essay":
                addresses = data.decode("utf-8").split()
                say(f"{path}: made of {len(addresses)} essays, which takes minutes")
                data = essays.joined(addresses, _fetch)
            found = hashlib.sha256(data).hexdigest()
            if found != file.sha256 and name != "essay":
                raise UserError(f"{file.source} has the SHA-256 {found}, not {file.sha256}; nothing was written")
            temporary = path.with_name(path.name + ".partial")
            temporary.write_bytes(data)
            temporary.replace(path)
        except (OSError, UnicodeError) as error:  # URLError is an OSError
            raise UserError(f"{file.what} could not be fetched into {where}: {error}") from error
        say(f"{path}: fetched, {len(data):,} bytes" + ("" if found == file.sha256 else other))
    try:
        sentence_splitter("punkt", where)
        say("NLTK's punkt_tab: there already")
    except UserError as error:
        try:
            import nltk
        except ImportError:
            raise error from None
        done = nltk.download("punkt_tab", download_dir=str(where), quiet=True)
        say(f"NLTK's punkt_tab: {'fetched' if done else 'could not be fetched'}")


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{address}: {error}") from error


def unofficial(ids: dict[str, str]) -> list[str]:
    """The names of corpora, by their SHA-256, that are not those of the official samples."""
    return [name for name, digest in ids.items() if digest != FILES[name].sha256]
