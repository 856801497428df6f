"""Needles in a haystack: a sentence in a long text, asked for at its end. Prompts are fixed benchmark texts, their errors included.

`Needle` is G. Kamradt's test with the settings of Activation Beacon's eval_needle.py, `MagicNumber` that of EasyContext (eval_needle.py).
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from infinicontext.data.corpora import documents
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.questions import repeated, with_start
from infinicontext.evaluation.ruler.corpora import FILES, data_folder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE = "\n\nThe best thing to do in San Francisco is sitting in Dolores Park and eating a hamburg on a sunny day.\n\n"
QUESTION = "\n\nWhat is the best thing to do in San Francisco?\nAnswer:"
STORY = "This is a very long story book: <book>"
NUMBER = "\nThe special magic {city} number is: {number}.\n"
CITIES = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
ASKED = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is:"
)


def check_depths(name: str, depths: tuple[float, ...]) -> None:
    """Raises UserError unless there are depths from 0 to 1."""
    if not depths or min(depths) < 0 or max(depths) > 1:
        raise UserError(f"evaluation.{name}.depths is {depths}; it must be one or more numbers from 0 to 1")


def first_number(answer: str, key: str, how: Literal["text", "number"] = "text") -> float:
    """1 if the first digits of an answer are the key: as a text, or as a number, for which 04800 is 4800."""
    digits = re.search(r"\d+", answer)
    if digits is None:
        return 0.0
    return float(digits.group() == key if how == "text" else int(digits.group()) == int(key))


def haystack_texts(source: str) -> list[str]:
    """The documents of a data.source; "": the essays that RULER reads, too.

    Raises:
      UserError: there is no such source.
    """
    if source:
        return [text for _, text in documents(source)]
    path = data_folder("") / FILES["essay"].name
    if not path.is_file():
        raise UserError(f"there is no {path}: {FILES['essay'].what}, from {FILES['essay'].source}; or name another text")
    try:
        text = json.loads(path.read_text("utf-8"))["text"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not {FILES['essay'].what}: {error!r}") from error
    if not isinstance(text, str) or not text:
        raise UserError(f"{path} is not {FILES['essay'].what}: its text is {str(text)[:20]!r}")
    return [text]


def named(source: str) -> str:
    """A haystack's name; what it holds is in the prompts' fingerprint."""
    if source:
        return f"{source}, which is not the original's"
    path = data_folder("") / FILES["essay"].name
    own = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != FILES["essay"].sha256
    return f"{path.name}, which is not the official file" if own else "Paul Graham's essays"


def haystack(source: str, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of the documents of a source, one after another."""
    return np.concatenate(tokenizer.encode_batch(haystack_texts(source)))


@dataclasses.dataclass(frozen=True)
class Needle:
    """What there is to do in San Francisco; scored by how much of the needle the first line of the answer holds (ROUGE-L recall)."""

    depths: tuple[float, ...] = DEPTHS  # 0: needle at the start, 1: just before the question
    haystack: str = ""  # a data.source; empty: Paul Graham's essays in $INFINICONTEXT_DATA/ruler
    needle: str = NEEDLE
    question: str = QUESTION
    phrases: tuple[str, ...] = ("Dolores Park", "hamburg")  # an answer that holds them all is right

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "depth"

    def __post_init__(self):
        check_depths("needle", self.depths)

    def protocol(self) -> str:
        """See `Kind`."""
        return (
            f"Needle in a haystack ({named(self.haystack)}) as in Activation Beacon's evaluation; ROUGE-L recall of the needle (package "
            f"rouge) in the answer's first line, and whether it holds {' and '.join(self.phrases)}."
        )

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """One for each depth: nothing is drawn."""
        rouge_l("a", "a")  # says at once if it is not installed
        needle, question = tokenizer.encode(self.needle), tokenizer.encode(self.question)
        room = size - len(with_start(tokenizer, [])) - len(needle) - len(question)
        if room < 1:
            raise UserError(f"{size} tokens do not hold needle and question, which have {size - room}")
        hay = repeated(haystack(self.haystack, tokenizer), room)
        found = []
        for depth in self.depths:
            at = round(room * depth)
            prompt = with_start(tokenizer, np.concatenate([hay[:at], needle, hay[at:], question]))
            found.append(Question(size, depth, 0, prompt, (self.needle.strip(),), " " + self.needle.strip(), 50))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """ROUGE-L recall, and whether all phrases are there."""
        line = answer.strip().split("\n")[0].strip()
        return {"rouge_l_recall": rouge_l(line, question.answers[0])["r"]} | {
            "phrases": float(all(phrase.lower() in line.lower() for phrase in self.phrases))
        }

    def chance(self, size: int) -> float:
        """Who guesses does not find it."""
        return 0.0


def rouge_l(answer: str, reference: str) -> dict[str, float]:
    """Recall r, precision p and f of ROUGE-L as the package `rouge` has them, 0 where it refuses empty texts.

    Raises:
      UserError: it is not installed.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise UserError('ROUGE-L of needles and LongBench is that of the package rouge: pip install "infinicontext[evaluation]"') from error
    nothing = {"r": 0.0, "p": 0.0, "f": 0.0}
    if not answer.strip(" .") or not reference.strip(" ."):
        return nothing
    try:
        return Rouge(["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]
    except RecursionError:  # of a sentence of a thousand words, to which LongBench gives 0, too
        return nothing


def next_sentence(ids: np.ndarray, at: int, stops: Sequence[int]) -> int:
    """The place after the first full stop from `at` on; the beginning, and a place after the last full stop, stay what they are."""
    ends = np.flatnonzero(np.isin(ids[at:], stops))
    return at + int(ends[0]) + 1 if at and ends.size else at


@dataclasses.dataclass(frozen=True)
class MagicNumber:
    """Singapore's magic number in a book; for models without instruction tuning, and best teacher-forced."""

    depths: tuple[float, ...] = DEPTHS
    haystack: str = ""
    distractors: int = 0  # other cities with numbers of their own, at drawn places
    digits: int = 7

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "depth"

    def __post_init__(self):
        check_depths("magic_number", self.depths)
        if not 0 <= self.distractors <= len(CITIES):
            raise UserError(f"evaluation.magic_number.distractors is {self.distractors}; it must be from 0 to {len(CITIES)}")
        if not 1 <= self.digits <= 18:
            raise UserError(f"evaluation.magic_number.digits is {self.digits}; it must be from 1 to 18")

    def protocol(self) -> str:
        """See `Kind`."""
        return (
            f"Magic number in a book ({named(self.haystack)}) as in EasyContext, {self.digits} digits, {self.distractors} other cities; "
            "the number must be right."
        )

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """Needles stand after the first full stop from their depth on."""
        head, tail = with_start(tokenizer, tokenizer.encode(STORY)), tokenizer.encode(ASKED)
        hay = haystack(self.haystack, tokenizer)
        # Alone it may be another token than after a word.
        stops = [tokenizer.encode(text)[-1] for text in (".", "a.")]
        found = []
        for cell, depth in enumerate(self.depths):
            for index in range(samples):
                rng = np.random.default_rng((seed, size, cell, index))
                number, *others = map(str, rng.integers(10 ** (self.digits - 1), 10**self.digits, 1 + self.distractors))
                inserts = [(depth, tokenizer.encode(NUMBER.format(city="Singapore", number=number)))]
                for city, other in zip(rng.permutation(CITIES), others):
                    inserts.append((float(rng.random()), tokenizer.encode(NUMBER.format(city=city, number=other))))
                room = size - len(head) - len(tail) - sum(len(insert) for _, insert in inserts)
                if room < 1:
                    raise UserError(f"{size} tokens do not hold numbers and question, which have {size - room}")
                text = repeated(hay, room)
                places = [(next_sentence(text, round(room * at), stops), insert) for at, insert in inserts]
                parts, before = [], 0
                for at, insert in sorted(places, key=lambda place: place[0]):
                    parts += [text[before:at], insert]
                    before = at
                prompt = np.concatenate([head, *parts, text[before:], tail])
                found.append(Question(size, depth, index, prompt, (number,), f" {number}", 16))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether the first digits are the number."""
        return {"exact": first_number(answer, question.answers[0])}

    def chance(self, size: int) -> float:
        """That of all its digits."""
        return 1 / (9 * 10 ** (self.digits - 1))
