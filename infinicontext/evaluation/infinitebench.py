"""Retrieval of InfiniteBench (arXiv 2402.13718) on local files: passkeys, strings of digits and values in a JSON object, in 100,000 tokens.

A folder holds a data set as JSON lines NAME.jsonl (context, input, answer). Prompts are its own for models that continue a text.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import ClassVar, NamedTuple

from infinicontext.data.corpora import json_lines
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.longbench import check_data_sets, middle_cut
from infinicontext.evaluation.needle import first_number
from infinicontext.evaluation.questions import with_start

HIDDEN = "There is an important info hidden inside a lot of irrelevant text. {task}. I will quiz you about the important information there."


class DataSet(NamedTuple):
    """How a data set asks."""

    instruction: str
    lead: str  # what the answer continues
    new_tokens: int


DATA_SETS = {
    "passkey": DataSet(HIDDEN.format(task="Find it and memorize them"), "\n\nThe pass key is", 6),
    "number_string": DataSet(HIDDEN.format(task="Find it"), "\n\nThe sequence of digits is", 12),
    "kv_retrieval": DataSet("Extract the value corresponding to the specified key in the JSON object below.", "", 50),
}


def among_words(answer: str, reference: str) -> float:
    """Whether the reference is one of the answer's words."""
    return float(reference in re.sub(r"[\n:\"'.,?!{}]", " ", answer).split())


@dataclasses.dataclass(frozen=True)
class InfiniteBench:
    """The data sets of a folder; of longer prompts the middle is left out, so that their tokens and those of an answer are the length."""

    folder: str = ""
    data_sets: tuple[str, ...] = tuple(DATA_SETS)

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "data set"

    def __post_init__(self):
        check_data_sets("infinitebench", self.data_sets, DATA_SETS)

    def protocol(self) -> str:
        """See `Kind`."""
        return f"InfiniteBench, those of {', '.join(self.data_sets)} that are there; its own scores, prompts without a chat template."

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts with their answers."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The first rows of each data set that is there and whose answers the size holds."""
        found = []
        for name in self.data_sets:
            path, data = Path(self.folder, f"{name}.jsonl"), DATA_SETS[name]
            room = size - data.new_tokens - len(with_start(tokenizer, []))
            if not self.folder or not path.is_file() or room < 2:
                continue
            for index, (number, row) in enumerate(itertools.islice(json_lines(path), samples)):
                try:
                    text = f"{data.instruction}\n\n{row['context']}\n\n{row['input']}{data.lead}"
                    answers = tuple(map(str, row["answer"])) if isinstance(row["answer"], list) else (str(row["answer"]),)
                    continuation = f" {answers[0]}"
                except (LookupError, TypeError) as error:
                    raise UserError(f"{path}, line {number}, is no row of InfiniteBench: {error!r}") from error
                prompt = with_start(tokenizer, middle_cut(tokenizer.encode(text), room))
                found.append(Question(size, name, index, prompt, answers, continuation, data.new_tokens))
        if not found:
            where = self.folder or "evaluation.infinitebench.folder, which is empty"
            raise UserError(
                f"there are no {', '.join(f'{name}.jsonl' for name in self.data_sets)} in {where}, or none that {size} tokens hold; "
                "InfiniteBench's data sets are at github.com/OpenBMB/InfiniteBench"
            )
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether the first number, or one of the words, is the answer."""
        if question.place == "kv_retrieval":
            return {"exact": max(among_words(answer, reference) for reference in question.answers)}
        return {"exact": max(first_number(answer, reference) for reference in question.answers)}

    def averages(self, scores: dict[str, float]) -> dict:
        """score: the mean of data sets."""
        return {"score": sum(scores.values()) / len(scores), "interval": None}

    def chance(self, size: int) -> float:
        """0: nobody guesses five digits."""
        return 0.0
