"""Passkey retrieval as published evaluations write it; their scores are not interchangeable, nor with those of evaluation/passkey.py.

`LandmarkPasskey` is that of LongRoPE (evaluation/passkey.py of microsoft/LongRoPE, after Mohtashami & Jaggi), `BeaconPasskey` that of
Activation Beacon (eval_passkey.py). Prompts are fixed benchmark texts, their errors included.
"""

import dataclasses
import difflib
import random
import re
from typing import ClassVar

import numpy as np

from infinicontext.data.passkey import FILLER, INSTRUCTION
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.needle import check_depths, first_number
from infinicontext.evaluation.questions import with_start

UNIT = FILLER.strip()
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
CHARACTERS_PER_TOKEN = 3.65


def similarity(answer: str, key: str) -> float:
    """How alike two texts are, from 0 to 1: fuzz.ratio of fuzzywuzzy, as it is by difflib, in whole percent."""
    return round(100 * difflib.SequenceMatcher(None, answer, key).ratio()) / 100 if answer and key else 0.0


def landmark_prompt(rng: random.Random, characters: int) -> tuple[str, int]:
    """A prompt with so much filler, and its key."""
    before = rng.randint(0, characters)
    filler = UNIT
    while len(filler) < characters:
        filler = f"{filler} {filler}"
    key = rng.randint(1, 50000)
    lines = INSTRUCTION, filler[:before], KEY_LINE.format(key=key), filler[: characters - before]
    return "\n".join([*lines, "What is the pass key? The pass key is"]), key


@dataclasses.dataclass(frozen=True)
class LandmarkPasskey:
    """LongRoPE's: keys at random places, the length measured in characters, 3.65 to a token; places are rounded to tenths."""

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "depth"

    def protocol(self) -> str:
        """See `Kind`."""
        return "Passkey as in LongRoPE's evaluation, lengths being 3.65 characters of filler to a token; first number of the answer."

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the filler."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The random numbers begin anew at each length."""
        rng, found = random.Random(seed), []
        characters = int(size * CHARACTERS_PER_TOKEN)
        for index in range(samples):
            text, key = landmark_prompt(rng, characters)
            depth = (text.index("The pass key is") - len(INSTRUCTION) - 1) / max(characters, 1)
            prompt = with_start(tokenizer, tokenizer.encode(text))
            found.append(Question(size, round(min(depth, 1.0), 1), index, prompt, (str(key),), f" {key}", 10))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether the first number is the key."""
        return {"exact": first_number(answer, question.answers[0], "number")}

    def chance(self, size: int) -> float:
        """That of a number from 1 to 50,000."""
        return 1 / 50000


@dataclasses.dataclass(frozen=True)
class BeaconPasskey:
    """Activation Beacon's: keys at given depths, five digits."""

    depths: tuple[float, ...] = tuple(int(depth) / 100 for depth in np.linspace(0, 100, 10))

    description: ClassVar[str] = (
        "There is an important infomation hidden in the following context. Find the information and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    question: ClassVar[str] = "\n\nWhat is the pass key?"
    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "depth"

    def __post_init__(self):
        check_depths("passkey_beacon", self.depths)

    def protocol(self) -> str:
        """See `Kind`."""
        return (
            "Passkey as in Activation Beacon's evaluation, without a chat template and with keys of our own; first number of the answer as "
            "text."
        )

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts, before they are decoded and encoded again."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """Keys are drawn for each depth and sample by itself, so that more samples leave the first ones what they are."""
        description, question = tokenizer.encode(self.description), tokenizer.encode(self.question)
        budget, found = size - len(with_start(tokenizer, [])), []
        # Units that are not apart may take fewer tokens than one alone.
        filler = tokenizer.encode(UNIT * (2 * size // len(tokenizer.encode(UNIT)) + 2))
        for cell, depth in enumerate(self.depths):
            for index in range(samples):
                key = str(np.random.default_rng((seed, size, cell, index)).integers(10**4, 10**5))
                line = tokenizer.encode(f"\n\n{KEY_LINE.format(key=key)}\n\n")
                low, high = len(description), budget - len(question) - len(line) - 1
                if high < low:
                    raise UserError(f"{size} tokens do not hold description, key and question, which have {budget - high + low}")
                at = low + round((high - low) * depth)
                after = budget - at - len(line) - len(question)
                ids = np.concatenate([description, filler[: at - low], line, filler[:after], question])
                prompt = with_start(tokenizer, tokenizer.encode(tokenizer.decode(ids)))
                found.append(Question(size, depth, index, prompt, (key,), f" The pass key is {key}", 50))
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether the first digits are the key, and how alike they are."""
        digits = re.search(r"\d+", answer)
        return {"exact": first_number(answer, question.answers[0])} | {
            "similarity": similarity(digits.group(), question.answers[0]) if digits else 0.0
        }

    def chance(self, size: int) -> float:
        """That of a number of five digits."""
        return 1 / 90000
