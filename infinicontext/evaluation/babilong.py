"""BABILong (arXiv 2406.10149): facts of bAbI stories scattered among the sentences of a book, and a question that needs them.

Prompts and labels in babilong_prompts.json are those of booydar/babilong. Shape letters: P tokens of a text.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.needle import haystack_texts
from infinicontext.evaluation.questions import with_start
from infinicontext.evaluation.ruler.corpora import Splitter, sentence_splitter

PROMPT_ROOM = 300  # tokens of a size that are left to instruction, examples and question
SHORTEST_SENTENCE = 10  # tokens; shorter ones of the book are left out
# official: labels count wherever their letters stand, so that qa7's "none" is never right and "no" is found in "not". fixed: whole words.
Labels = Literal["official", "fixed"]


@functools.cache
def texts() -> dict:
    """template, prompts and labels by task."""
    return json.loads(resources.files("infinicontext.evaluation").joinpath("babilong_prompts.json").read_text("utf-8"))


def prompt(task: str, context: str, question: str) -> str:
    """Instruction, examples, context and question."""
    return texts()["template"].format(**texts()["prompts"][task], context=context.strip(), question=question).strip()


def correct(task: str, target: str, answer: str, question: str, how: Labels = "official") -> bool:
    """Whether the answer's first sentence names exactly the target's labels, those in the question aside."""
    sentence = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = lambda label, text: label in text if how == "official" else re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None
    found = {label for name in texts()["labels"][task] if named(label := name.lower(), sentence) and not named(label, question.lower())}
    target = target.lower()
    # qa19's targets are pairs of letters and one label each; longer lists, of qa8, are as many labels.
    return found == (set(target.split(",")) if "," in target and len(target) > 3 else {target})


class Story(NamedTuple):
    """Facts up to a question."""

    facts: tuple[str, ...]
    question: str
    answer: str


def stories(lines: Sequence[str]) -> list[Story]:
    """One for each question of bAbI's text format; earlier questions are left out."""
    found, facts = [], []
    for line in lines:
        number, _, text = line.strip().partition(" ")
        if not text:
            continue
        if number == "1":
            facts = []
        question, *rest = text.split("\t")
        if rest:
            found.append(Story(tuple(facts), question.strip(), rest[0].strip()))
        else:
            facts.append(text.strip())
    return found


PEOPLE, ITEMS = ("Daniel", "John", "Mary", "Sandra"), ("apple", "football", "milk")
MOVES, TAKES = ("moved to", "went to", "journeyed to", "travelled to"), ("took", "got", "picked up", "grabbed")


def own_story(task: str, rng: random.Random) -> Story:
    """A story as those of qa1 (where someone is), qa2 (where a thing is) and qa3 (where it was before), told anew."""
    rooms, length = texts()["labels"]["qa1"], rng.randint(2, 12)
    facts, where = [], {}  # where people are
    carried, lies, been = {}, {}, {item: [] for item in ITEMS}  # things: by whom, or where, and where they were so far
    while True:
        person = rng.choice(PEOPLE)
        mine = [item for item in ITEMS if carried.get(item) == person]
        here = [item for item in ITEMS if person in where and item not in carried and lies.get(item, where[person]) == where[person]]
        if task != "qa1" and mine and rng.random() < 0.2:
            item = rng.choice(mine)
            del carried[item]
            lies[item] = where[person]
            facts.append(f"{person} dropped the {item}.")
        elif task != "qa1" and here and rng.random() < 0.4:
            item = rng.choice(here)
            carried[item] = person
            been[item] = been[item] or [where[person]]
            facts.append(f"{person} {rng.choice(TAKES)} the {item}.")
        else:
            where[person] = rng.choice([room for room in rooms if room != where.get(person)])
            facts.append(f"{person} {rng.choice(MOVES)} the {where[person]}.")
            for item in mine:
                been[item].append(where[person])
        moved = [item for item in ITEMS if len(been[item]) >= (2 if task == "qa3" else 1)]
        if len(facts) < length or (task != "qa1" and not moved):
            continue
        if task == "qa1":
            person = rng.choice(list(where))
            return Story(tuple(facts), f"Where is {person}?", where[person])
        item = rng.choice(moved)
        if task == "qa2":
            return Story(tuple(facts), f"Where is the {item}?", been[item][-1])
        return Story(tuple(facts), f"Where was the {item} before the {been[item][-1]}?", been[item][-2])


def background(
    rng: random.Random, books: Sequence[str], budget: int, encode: Callable[[str], np.ndarray], split: Callable[[str], list[str]]
) -> list[np.ndarray]:
    """Sentences of a book from a drawn character on, each with a space before it, the last one cut to make `budget` tokens in all.

    Raises:
      UserError: the books have no sentences that are long enough.
    """
    sentences, room, in_vain = [], budget, 0
    while room:
        if in_vain == 1000:
            raise UserError(f"evaluation.babilong.books has too few sentences of {SHORTEST_SENTENCE} tokens or more")
        in_vain += 1
        book = rng.choice(books)
        start = rng.randrange(len(book))
        for sentence in split(book[start : start + 20 * room + 1000]):
            ids_P = encode(f" {sentence}")
            if len(ids_P) >= SHORTEST_SENTENCE:
                sentences.append(ids_P[:room])
                room, in_vain = room - len(sentences[-1]), 0
            if not room:
                break
    return sentences


def scattered(rng: random.Random, facts: Sequence[np.ndarray], sentences: Sequence[np.ndarray]) -> np.ndarray:
    """Facts in their order, in gaps between sentences drawn with replacement."""
    gaps = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    parts, at = [], 0
    for gap, fact in zip(gaps, facts):
        parts += [*sentences[at:gap], fact]
        at = gap
    return np.concatenate([*parts, *sentences[at:]])


@dataclasses.dataclass(frozen=True)
class BabiLong:
    """Sizes are tokens of the whole prompt, about, 300 of which are not the context's; BABILong's own 4k is 4,000.

    `facts` is a folder of bAbI's text files (en-10k, qa1_*_test.txt to qa20); empty: stories of our own, for qa1 to qa3.
    """

    tasks: tuple[str, ...] = ("qa1", "qa2", "qa3")
    facts: str = ""
    books: str = ""  # a data.source; empty: Paul Graham's essays in $INFINICONTEXT_DATA/ruler; BABILong takes PG19
    splitter: Splitter = "punkt"  # of books into sentences
    labels: Labels = "official"
    alone: bool = False  # first, as size 0, the stories without a book: BABILong's 0k, what the answers at other sizes fall from

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "task"

    def __post_init__(self):
        known = list(texts()["prompts"]) if self.facts else ["qa1", "qa2", "qa3"]
        if not self.tasks or (unknown := [task for task in self.tasks if task not in known]):
            missing = unknown[0] if self.tasks else "none"
            raise UserError(f"evaluation.babilong.tasks has {missing}; with these facts it must be of {', '.join(known)}")

    def protocol(self) -> str:
        """See `Kind`."""
        facts = f"bAbI's facts in {Path(self.facts).name}" if self.facts else "facts of our own (synthetic-babi), not comparable"
        return (
            f"BABILong, {facts}, among sentences of {self.books or 'essays'} ({self.splitter}); an answer is right if its first sentence "
            f"names exactly the right labels ({self.labels})."
        )

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts, about."""
        return [0, *lengths] if self.alone else lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """Stories with more facts than an eighth of the size are left out; of size 0 none is, and nothing is put between facts."""
        if 0 < size <= PROMPT_ROOM:
            raise UserError(f"{size} tokens do not hold a prompt; BABILong leaves {PROMPT_ROOM} to instruction and question")
        found = []
        split, books = (sentence_splitter(self.splitter, trained=False), haystack_texts(self.books)) if size else (None, [])
        for task in self.tasks:
            told = self._told(task)
            index, place = 0, 0
            # Where the size holds none of the first thousand stories, it holds none.
            while index < samples and place < (1000 + 100 * samples if told is None else len(told)):
                rng = random.Random(f"{seed} {size} {task} {place}")
                story = own_story(task, rng) if told is None else told[place]
                place += 1
                facts = [tokenizer.encode(f" {fact}") for fact in story.facts]
                budget = size - PROMPT_ROOM - sum(map(len, facts))
                if size and (len(facts) > size / 8 or budget < 0):
                    continue
                sentences = background(rng, books, budget, tokenizer.encode, split) if size else []
                context = tokenizer.decode(scattered(rng, facts, sentences))
                ids_P = tokenizer.encode(prompt(task, context, story.question))
                ids_P = with_start(tokenizer, ids_P)
                found.append(Question(size, task, index, ids_P, (story.answer,), f" {story.answer}", 20, asked=story.question))
                index += 1
        if not found:
            raise UserError(f"{size} tokens hold no story of {', '.join(self.tasks)}")
        return found

    def _told(self, task: str) -> list[Story] | None:
        if not self.facts:
            return None
        paths = sorted(Path(self.facts).glob(f"{task}_*_test.txt"))
        if not paths:
            raise UserError(
                f"there is no {task}_*_test.txt in evaluation.babilong.facts {self.facts}; bAbI's files (en-10k) have such names"
            )
        return stories(paths[0].read_text("utf-8").splitlines())

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Whether exactly the right labels are named."""
        return {"accuracy": float(correct(str(question.place), question.answers[0], answer, question.asked, self.labels))}

    def chance(self, size: int) -> float:
        """That of any of the labels."""
        return float(np.mean([1 / len(texts()["labels"][task]) for task in self.tasks]))
