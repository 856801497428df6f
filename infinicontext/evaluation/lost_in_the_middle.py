"""Lost in the middle (arXiv 2307.03172): does it matter where in the context an answer stands? Prompts as in nelson-liu/lost-in-the-middle.

`KeyValue` asks for a value in a JSON object, `Documents` a question that one of several documents answers.
"""

import dataclasses
import gzip
import json
import random
import re
import string
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.questions import with_start

KEY_VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
DOCUMENTS = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be irrelevant)."
    "{order}\n\n{before}{documents}\n\nQuestion: {question}\nAnswer:"
)
RANDOM_ORDER = " The search results are ordered randomly."
NEW_TOKENS = 100
POSITIONS = {75: (0, 24, 49, 74), 140: (0, 34, 69, 104, 139)}  # of the paper
GOLD = {10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29)}


def positions(count: int, known: dict[int, tuple[int, ...]], steps: int) -> tuple[int, ...]:
    """The paper's positions, or so many from first to last."""
    return known.get(count) or tuple(dict.fromkeys(round(i * (count - 1) / (steps - 1)) for i in range(steps)))


def key_value_prompt(records: Sequence[tuple[str, str]], key: str, query_aware: bool = False) -> str:
    """The object, and the key whose value is asked for; a query-aware prompt names it before the object, too."""
    lines = ",\n ".join(f'"{k}": "{v}"' for k, v in records)
    before = f'Key: "{key}"\n\n' if query_aware else ""
    return f'{KEY_VALUE}{before}JSON data:\n{{{lines}}}\n\nKey: "{key}"\nCorresponding value:'


def documents_prompt(question: str, documents: Sequence[tuple[str, str]], *, random_order: bool = False, query_aware: bool = False) -> str:
    """Documents (title, text), numbered from 1, and the question; a query-aware prompt asks it before them, too."""
    written = "\n".join(f"Document [{i}](Title: {title}) {text}" for i, (title, text) in enumerate(documents, start=1))
    before = f"Question: {question}\n\n" if query_aware else ""
    return DOCUMENTS.format(order=RANDOM_ORDER if random_order else "", before=before, documents=written, question=question)


def closed_book_prompt(question: str) -> str:
    """The question alone."""
    return f"Question: {question}\nAnswer:"


def normalised(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles, with single spaces."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def best_subspan(answer: str, references: Sequence[str]) -> float:
    """1 if any of the references stands in the first line of the answer, both normalised."""
    line = normalised(answer.split("\n")[0].strip())
    return float(any(normalised(reference) in line for reference in references))


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Random keys and values of 128 bits; sizes are numbers of pairs, whatever the lengths."""

    pairs: tuple[int, ...] = (75, 140, 300)
    query_aware: bool = False

    size: ClassVar[str] = "pairs"
    place: ClassVar[str] = "position"

    def __post_init__(self):
        if not self.pairs or min(self.pairs) < 2:
            raise UserError(f"evaluation.key_value.pairs is {self.pairs}; it must be one or more numbers of at least 2")

    def protocol(self) -> str:
        """See `Kind`."""
        aware = ", the key also before the object" if self.query_aware else ""
        return f"Key-value retrieval as in Lost in the middle{aware}; the value must stand in the answer."

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the object."""
        return sorted(set(self.pairs))

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The same objects with what is asked for at each position."""
        found = []
        for index in range(samples):
            rng = random.Random(f"{seed} {size} {index}")
            drawn = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * size)]
            (key, value), *others = zip(drawn[::2], drawn[1::2])
            for position in positions(size, POSITIONS, 6):
                records = [*others[:position], (key, value), *others[position:]]
                prompt = with_start(tokenizer, tokenizer.encode(key_value_prompt(records, key, self.query_aware)))
                found.append(Question(size, position, index, prompt, (value,), f' "{value}"', NEW_TOKENS))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether the value stands in the answer."""
        return {"accuracy": float(question.answers[0].lower() in answer.lower())}

    def chance(self, size: int) -> float:
        """That of any of the values."""
        return 1 / size


@dataclasses.dataclass(frozen=True)
class Documents:
    """Questions with so many documents, one of which holds the answer.

    `file` is the benchmark's JSON lines, plain or .gz, with question, answers and ctxs (title, text, isgold or hasanswer), the gold
    document anywhere; empty: facts of our own, which are not comparable with published scores.
    """

    counts: tuple[int, ...] = (10, 20, 30)
    file: str = ""
    query_aware: bool = False
    random_order: bool = False  # says in the prompt that documents are in random order

    size: ClassVar[str] = "documents"
    place: ClassVar[str] = "position"

    def __post_init__(self):
        if not self.counts or min(self.counts) < 2:
            raise UserError(f"evaluation.documents.counts is {self.counts}; it must be one or more numbers of at least 2")

    def protocol(self) -> str:
        """See `Kind`."""
        source = f"questions of {Path(self.file).name}" if self.file else "facts of our own, not comparable with published scores"
        return (
            f"Several documents as in Lost in the middle, {source}; a reference must stand in the first line of the answer. Oracle: the "
            "gold document alone; closed book: none."
        )

    def sizes(self, lengths: list[int]) -> list[int]:
        """How many documents there are."""
        return sorted(set(self.counts))

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The same questions with the gold document at each position, with it alone, and without any."""
        rows, found = _from_file(Path(self.file), size, samples) if self.file else _own_facts(size, samples, seed), []
        for index, (question, answers, gold, others) in enumerate(rows):
            how = {"random_order": self.random_order, "query_aware": self.query_aware}
            prompts = {
                position: documents_prompt(question, [*others[:position], gold, *others[position:]], **how)
                for position in positions(size, GOLD, 5)
            }
            prompts |= {"oracle": documents_prompt(question, [gold], **how), "closed book": closed_book_prompt(question)}
            for place, text in prompts.items():
                prompt = with_start(tokenizer, tokenizer.encode(text))
                found.append(Question(size, place, index, prompt, tuple(answers), f" {answers[0]}", NEW_TOKENS))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether a reference stands in the first line."""
        return {"best_subspan_em": best_subspan(answer, question.answers)}

    def chance(self, size: int) -> float | None:
        """That of any of the people; not known of questions from a file."""
        return None if self.file else 1 / size


Row = tuple[str, list[str], tuple[str, str], list[tuple[str, str]]]  # question, answers, gold document, the others


def _from_file(path: Path, size: int, samples: int) -> list[Row]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = []
        for line in [line for line in data.decode("utf-8").split("\n") if line.strip()][:samples]:
            record = json.loads(line)
            marks = [bool(found.get("isgold", found.get("hasanswer"))) for found in record["ctxs"]]
            texts = [(found["title"], found["text"]) for found in record["ctxs"]]
            gold, others = texts[marks.index(True)], [text for text, mark in zip(texts, marks) if not mark]
            if len(others) < size - 1:
                raise UserError(f"evaluation.documents.file {path} has questions with {len(others) + 1} documents, not {size}")
            answers = [str(answer) for answer in record["answers"]]
            rows.append((record["question"], [answers[0], *answers[1:]], gold, others[: size - 1]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"evaluation.documents.file {path} cannot be read as questions with answers and ctxs: {error}") from error
    if not rows:
        raise UserError(f"evaluation.documents.file {path} is empty")
    return rows


TOWNS = tuple(
    f"{start}{end}"
    for start in ("Alder", "Bram", "Clay", "Dun", "Elm", "Fen", "Glen", "Hazel", "Kirk", "Lang", "Marsh", "North")
    for end in ("bury", "dale", "ford", "ham", "mouth", "ton", "wick")
)
TRADES = ("baker", "clockmaker", "ferryman", "gardener", "glazier", "librarian", "mayor", "miller", "potter", "tailor")
NAMES = ("Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leon", "Mina", "Noor", "Otto")
SURNAMES = ("Abbot", "Becker", "Castro", "Dahl", "Engel", "Falk", "Grant", "Holm", "Ivers", "Jansen", "Keller", "Lund", "Moreau", "Novak")


def _own_facts(size: int, samples: int, seed: int) -> list[Row]:
    """Who has which trade in which town."""
    rows = []
    if size > len(TOWNS):
        raise UserError(f"evaluation.documents.counts has {size}; without a file it must be at most {len(TOWNS)}")
    for index in range(samples):
        rng = random.Random(f"{seed} {size} {index}")
        towns, trade = rng.sample(TOWNS, size), rng.choice(TRADES)
        people = rng.sample([f"{name} {surname}" for name in NAMES for surname in SURNAMES], size)
        texts = [
            (town, f"{town} lies by a river and has a market on Saturdays. The {trade} of {town} is {person}. Travellers come in spring.")
            for town, person in zip(towns, people)
        ]
        rows.append((f"who is the {trade} of {towns[0]}", [people[0]], texts[0], texts[1:]))
    return rows
