"""Topics of a long conversation, as LongEval asks for them (of LongChat; Activation Beacon's evaluation, too), on local files.

A folder holds LongEval's testcases N_topics.jsonl (prompt, topics): one record of N chats about a topic each, which ends with the question
for the first of them. No generator of such records is published; its retrieval of lines is RULER's niah_multikey_2.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar

from infinicontext.data.corpora import json_lines
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.longbench import token_f1
from infinicontext.evaluation.questions import with_start

NEW_TOKENS = 50


@dataclasses.dataclass(frozen=True)
class Topics:
    """The records of a folder."""

    folder: str = ""
    counts: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70)  # of topics
    lead: str = "\n ASSISTANT: The first topic is"  # what the answer continues; LongEval's for models that continue a text

    size: ClassVar[str] = "topics"
    place: ClassVar[str] = "topic"

    def __post_init__(self):
        if not self.counts or min(self.counts) < 1:
            raise UserError(f"evaluation.topics.counts is {self.counts}; it must be one or more numbers of topics, each 1 or more")

    def protocol(self) -> str:
        """See `Kind`."""
        return "LongEval's topics: the first one's name must stand in the answer, in any case; f1 is that of words. No chat template."

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the records."""
        return sorted(set(self.counts))

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The first records of so many topics."""
        path, found = Path(self.folder, f"{size}_topics.jsonl"), []
        if not self.folder or not path.is_file():
            where = self.folder or "evaluation.topics.folder, which is empty"
            raise UserError(f"there is no {path.name} in {where}; LongEval's are in longeval/ of github.com/DachengLi1/LongChat")
        for index, (number, row) in enumerate(itertools.islice(json_lines(path), samples)):
            try:
                text, topic = row["prompt"] + self.lead, row["topics"][0].strip()
                if not topic:
                    raise ValueError("its first topic is empty")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}, is no record of LongEval: {error!r}") from error
            found.append(Question(size, "first", index, with_start(tokenizer, tokenizer.encode(text)), (topic,), f" {topic}", NEW_TOKENS))
        if not found:
            raise UserError(f"{path} is empty")
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """accuracy: whether the topic is part of the answer; f1: of normalised words."""
        (topic,) = question.answers
        return {"accuracy": float(topic.lower() in answer.lower()), "f1": token_f1(answer, topic)}

    def chance(self, size: int) -> float | None:
        """Not known: who guesses does not know the topics."""
        return None
