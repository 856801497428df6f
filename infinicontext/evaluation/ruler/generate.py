"""Samples of RULER's tasks: the same, to the character, as the official generators make for the same seed, length and tokenizer.

A sample draws from one stream of random numbers that the search for its size has drawn from before it, so samples of a task are made in
order and together. A size counts lines, words or documents; a text of it fits if its tokens and those to be generated do.
"""

import dataclasses
import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.tasks import (
    CHATS,
    NEEDLE,
    NOISE,
    TASKS,
    TEXTS,
    CommonWords,
    FrequentWords,
    Needles,
    Parameters,
    Questions,
    Variables,
)
from infinicontext.evaluation.ruler.words import pairs, shuffled, word_lists

VERSION = "2026-07"  # of the official generators whose samples these are
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, 40))]  # where needles may stand in an essay, percent of its sentences
RETRIES = 1000  # texts drawn for a sample before its length is given up

Count = Callable[[str], int]
# Where a needle task that asks for one value speaks of one: in all that is around the text, with what the chat template says ("polite
# answer", "You is"), as upstream; or in its own words alone.
Singular = Literal["official", "fixed"]


class RulerLengthError(UserError):
    """The shortest text of a task is too long."""


@dataclasses.dataclass(frozen=True)
class Corpora:
    """What tasks read from; those that a task does not need may be None."""

    essay: str | None = None
    sentences: Callable[[str], list[str]] | None = None  # splits an essay
    squad: Any = None  # the contents of SQuAD's dev-v2.0.json
    hotpotqa: Any = None  # the contents of hotpot_dev_distractor_v1.json
    english_words: Sequence[str] | None = None  # for cwe from about 96K tokens on


@dataclasses.dataclass(frozen=True)
class Request:
    """What samples are to be like."""

    length: int  # tokens, those to be generated included
    count: Count  # tokens of a text
    seed: int = 42
    chat: str = "base"  # a name of CHATS, or a text with {task_template}
    template_tokens: int = 0  # taken off the length for a chat template that the texts do not have
    example_budget: int = 500  # tokens of vt's example; tokenizers that are close to bytes need 2,000
    singular: Singular = "official"
    first: int = 0  # qa: which of the data set's questions is the first sample's


class Sample(NamedTuple):
    """One prompt, input + answer_prefix, and what must be found in the answer."""

    input: str
    answer_prefix: str
    outputs: list[str]
    length: int  # tokens, those to be generated included
    index: int
    offsets: list[int]  # characters of input before each value (needles) or assignment (vt) that is asked for


class Drawn(NamedTuple):
    """A text of some size."""

    text: str
    answers: list[str]
    marks: list[str]  # what stands at the places that are asked for


def generate(task: str, request: Request, corpora: Corpora, samples: int = 500) -> list[Sample]:
    """The first samples of a task.

    Args:
      task: a name of TASKS.
      request: length, tokenizer, seed and chat template.
      corpora: what the task reads from.
      samples: how many.

    Raises:
      RulerLengthError: not even the shortest text fits.
      UserError: there is no such task, or a corpus is missing.
    """
    if task not in TASKS:
        raise UserError(f"RULER has no task {task}; its tasks are {', '.join(TASKS)}")
    parameters = TASKS[task]
    family = _FAMILIES[type(parameters)](task, parameters, request, corpora)
    text = TEXTS[type(parameters)]
    found = []
    for index, drawn in enumerate(family.draw_all(samples)):
        # The last place: an example has the prefix, too.
        cut = drawn.text.rfind(text.prefix[:10])
        whole, prefix = drawn.text[:cut], drawn.text[cut:]
        offsets = [whole.rfind(mark) for mark in drawn.marks]
        found.append(Sample(whole, prefix, drawn.answers, request.count(drawn.text) + text.tokens, index, offsets))
    return found


class _Family:
    """What the kinds of tasks share: random numbers, the template and the search for a size."""

    step: int  # between sizes
    probe: int  # the size whose tokens are counted first
    least = 1  # the smallest size that can be drawn
    draw: Callable[..., Drawn]  # (size, index of the sample) -> a text of this size, drawn anew each time

    def __init__(self, task: str, parameters: Parameters, request: Request, corpora: Corpora):
        self.task, self.parameters, self.request, self.corpora = task, parameters, request, corpora
        self.text = TEXTS[type(parameters)]
        self.random, self.numpy_random = random.Random(request.seed), np.random.RandomState(request.seed)
        chat = CHATS.get(request.chat, request.chat)
        if "{task_template}" not in chat:
            raise UserError(f"chat is {request.chat}; it must be one of {', '.join(CHATS)}, or a text with {{task_template}}")
        # The template is filled by its fields; what else of the chat's stands in braces is text.
        self.chat = chat.replace("{", "{{").replace("}", "}}")
        self.template = self.in_chat(self.text.body) + self.text.prefix
        self.budget = request.length - request.template_tokens
        self.prepare()

    def in_chat(self, body: str) -> str:
        """What a user says, in the chat template."""
        return self.chat.replace("{{task_template}}", body)

    def prepare(self) -> None:
        """What a kind needs before it draws."""

    def largest(self, per_unit: float) -> int:
        """The upper end of the search, from the tokens that one unit of the probe has."""
        return int(self.budget / per_unit * 3)

    def draw_all(self, samples: int) -> list[Drawn]:
        """The samples."""
        size = self.fitting(self.draw, self.step, self.probe, self.budget, self.text.tokens, self.largest)
        return [self.fitted(lambda n, i=i: self.draw(n, i), size, self.step, self.budget, self.text.tokens) for i in range(samples)]

    def fitting(self, draw, step: int, probe: int, budget: int, reserved: int, largest: Callable[[float], int]) -> int:
        """The greatest size found whose text fits; `step`, if none does."""
        per_unit = self.request.count(draw(probe).text) / probe
        low, high, best = step, max(largest(per_unit), 2 * step), step
        while low <= high:
            middle = (low + high) // 2
            if self.request.count(draw(middle).text) + reserved <= budget:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def fitted(self, draw, size: int, step: int, budget: int, reserved: int) -> Drawn:
        """A text that fits: of this size, else of smaller ones."""
        for _ in range(RETRIES):
            drawn = draw(size)
            length = self.request.count(drawn.text) + reserved
            if length <= budget:
                return drawn
            size = size - step if size > step else size
            if size < self.least:
                break
        raise RulerLengthError(f"RULER's {self.task} does not fit {budget} tokens with this tokenizer: its shortest text needs {length}")

    def weave(self, sentences: list[str], inserts: list[str]) -> str:
        """Sentences with others among them at drawn depths."""
        cuts = sorted(int(len(sentences) * (depth / 100)) for depth in self.random.sample(DEPTHS, len(inserts)))
        pieces = []
        for start, end, insert in zip([0, *cuts], cuts, inserts):
            pieces += [" ".join(sentences[start:end]), insert]
        return " ".join([*pieces, " ".join(sentences[cuts[-1] :])])


class _Needles(_Family):
    def prepare(self) -> None:
        essay = self.parameters.haystack == "essay"
        if essay and (self.corpora.essay is None or self.corpora.sentences is None):
            raise UserError(f"RULER's {self.task} needs essays and a splitter of sentences")
        self.step = self.probe = 500 if essay else 5 if self.request.length < 4096 else 25
        self.words = re.sub(r"\s+", " ", self.corpora.essay).split(" ") if essay else []
        # Needles stand in lines of their own, each in another place.
        self.least = 1 if essay else max(self.parameters.key_count, self.parameters.query_count) * self.parameters.value_count

    def value(self, kind: str) -> str:
        """A key or a value."""
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.random.choice(pairs())
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def draw(self, size: int, index: int = 0) -> Drawn:
        """A haystack of so many lines or words, with the needles in it."""
        task = self.parameters
        keys, values, needles = [], [], []
        for _ in range(max(task.key_count, task.query_count)):
            keys.append(self.value(task.keys))
            values.append([self.value(task.values) for _ in range(task.value_count)])
            needles += [NEEDLE.format(type_needle_v=task.values, key=keys[-1], value=value) for value in values[-1]]
        needles = shuffled(needles, self.request.seed)
        if task.haystack == "essay":
            repeated = self.words * (1 if size <= len(self.words) else math.ceil(size / len(self.words)))
            context = self.weave(self.corpora.sentences(" ".join(repeated[:size]).strip()), needles)
        else:
            lines = [NOISE] * size if task.haystack == "noise" else [self.stray() for _ in range(size)]
            for place, needle in zip(sorted(self.random.sample(range(size), len(needles)), reverse=True), needles):
                lines.insert(place, needle)
            context = "\n".join(lines)
        asked = self.random.sample(range(len(keys)), task.query_count)
        names = [keys[i] for i in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
        template, kind = self.template, task.values
        if task.query_count * task.value_count == 1:
            kind = kind[:-1]
            if self.request.singular == "official":
                template = _singular(template)
            else:
                template = self.in_chat(_singular(self.text.body)) + _singular(self.text.prefix)
        answers = [value for i in asked for value in values[i]]
        return Drawn(template.format(type_needle_v=kind, context=context, query=query), answers, [f" is: {value}." for value in answers])

    def stray(self) -> str:
        """A needle that nobody asks for."""
        key = self.value(self.parameters.keys)
        return NEEDLE.format(type_needle_v=self.parameters.values, key=key, value=self.value(self.parameters.values))


def _singular(template: str) -> str:
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, singular)
    return template


class _Variables(_Family):
    def prepare(self) -> None:
        # Each assignment of a chain stands in another place.
        self.least = self.parameters.hops + 1

    def draw_all(self, samples: int) -> list[Drawn]:
        """The samples, each with an example whose names are drawn anew."""
        budget = self.request.example_budget - self.request.template_tokens
        step = 5 if self.request.length < 4096 else 10
        thrice = lambda budget: lambda per_unit: int(budget / per_unit * 3)
        example_of = lambda size: self.chain(size, example=True)
        drawn = self.fitted(example_of, self.fitting(example_of, 5, 5, budget, 0, thrice(budget)), 5, budget, 0)
        example = f"{drawn.text} {' '.join(drawn.answers)}\n"
        reserved = self.text.tokens + self.request.count(example)
        size = self.fitting(self.chain, step, step, self.budget, reserved, thrice(self.budget))

        def with_example(size: int) -> Drawn:
            drawn = self.chain(size)
            at = drawn.text.index(self.text.body[:20])
            return drawn._replace(text=f"{drawn.text[:at]}{self.renamed(example)}\n{drawn.text[at:]}")

        return [self.fitted(with_example, size, step, self.budget, self.text.tokens) for _ in range(samples)]

    def chain(self, size: int, example: bool = False) -> Drawn:
        """Lines of noise with chains of assignments among them, the first of which is asked for."""
        hops, chains = self.parameters
        name = lambda: "".join(self.random.choices(string.ascii_uppercase, k=3 if example else 5))
        names = [name() for _ in range((hops + 1) * chains)]
        while len(set(names)) < (hops + 1) * chains:
            names.append(name())
        groups = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
        statements = []
        for group in groups:
            first = "12345" if example else str(self.numpy_random.randint(10000, 99999))
            later = [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(group)]
            statements.append([f"VAR {group[0]} = {first}", *later])
        lines = [NOISE] * size
        for chain in statements:
            places = sorted(self.random.sample(range(len(lines)), len(chain)))
            for number, (place, statement) in enumerate(zip(places, chain)):
                lines.insert(place + number, statement)
        context = "\n".join(lines).replace(". \n", ".\n")
        # An example stands inside the user's turn, without one of its own.
        template = self.text.body + self.text.prefix if example else self.template
        value = statements[0][0].split("=")[-1].strip()
        marks = [statement.rstrip() if number == 0 else statement for number, statement in enumerate(statements[0])]
        return Drawn(template.format(context=context, query=value, num_v=hops + 1), groups[0], marks)

    def renamed(self, example: str) -> str:
        """The example with other names and another value."""
        for name in example.strip().split()[-(self.parameters.hops + 1) :]:
            example = example.replace(name, "".join(self.random.choices(string.ascii_uppercase, k=len(name))))
        return example.replace("12345", str(self.numpy_random.randint(10000, 99999)))


class _CommonWords(_Family):
    step, probe = 10, 4096

    def prepare(self) -> None:
        nouns, adjectives, verbs = word_lists()
        self.pool = shuffled(sorted(set(nouns + adjectives + verbs)), self.request.seed)

    def largest(self, per_unit: float) -> int:
        return int(self.budget // per_unit) * 2

    def draw(self, size: int, index: int = 0) -> Drawn:
        """An example with its answer, and a list of so many words."""
        short = self.request.length < 4096
        example, answers = self.numbered(*((20, 3, 1) if short else (40, 10, 3)))
        context, asked = self.numbered(size, *((6, 1) if short else (30, 3)))
        said = " ".join(f"{number}. {word}" for number, word in enumerate(answers, 1))
        texts = [self.template.format(context=part, query="") for part in (example, context)]
        return Drawn(f"{texts[0]} {said}\n{texts[1]}", asked, [])

    def numbered(self, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        """A list of so many words, ten of which come often; and those."""
        pool, common = self.pool, self.parameters.asked
        if words > len(pool):
            pool = self.corpora.english_words
            if pool is None:
                raise UserError(f"RULER's cwe of {self.request.length} tokens needs the list english_words.json")
        chosen = self.random.sample(pool, words)
        listed = shuffled(chosen[:common] * often + chosen[common:] * seldom, self.request.seed)
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)), chosen[:common]


class _FrequentWords(_Family):
    def draw_all(self, samples: int) -> list[Drawn]:
        """The samples, with a search of their own for the number of words."""
        room = self.budget - self.text.tokens
        vocabulary, step = room // 50, room // 32
        if vocabulary < 4 or step < 1:
            raise RulerLengthError(f"RULER's fwe does not fit {self.budget} tokens: its shortest text needs {200 + self.text.tokens}")
        words, render, _ = room // self.parameters.letters, *self.coded(vocabulary)
        while self.request.count(render(words)) < room:
            words += step
        words -= step
        found = []
        for _ in range(samples):
            render, asked = self.coded(vocabulary)
            size = words
            while self.request.count(render(size)) > room:
                size -= step
                if size < 1:
                    raise RulerLengthError(f"RULER's fwe does not fit {self.budget} tokens with this tokenizer")
            found.append(Drawn(render(size), asked, []))
        return found

    def coded(self, size: int) -> tuple[Callable[[int], str], list[str]]:
        """Words that mean nothing: a text of so many of them, and the three that come most often."""
        word = lambda: "".join(self.random.choices(string.ascii_lowercase, k=self.parameters.letters))
        words = [word() for _ in range(size)]
        while len(set(words)) < size:
            words.append(word())
        ranked = shuffled(sorted(set(words)), self.request.seed)
        ranked[0] = "..."
        # Zeta(2); the official code asks scipy for the same number.
        shares = np.arange(1, size + 1) ** -self.parameters.alpha / (math.pi**2 / 6)

        def render(count: int) -> str:
            copies = [word for word, times in zip(ranked, (count * shares).astype(int)) for _ in range(times)]
            return self.template.format(context=" ".join(shuffled(copies, self.request.seed)), query="")

        return render, ranked[1:4]


class Item(NamedTuple):
    """A question: documents are numbers."""

    question: str
    answers: list[str]
    gold: list[int]  # documents that answer it
    more: list[int]  # from the same article


class _Questions(_Family):
    step = probe = 10

    def prepare(self) -> None:
        data = getattr(self.corpora, self.parameters.dataset)
        if data is None:
            raise UserError(f"RULER's {self.task} needs the data set {self.parameters.dataset}")
        try:
            self.documents, self.items = _squad(data) if self.parameters.dataset == "squad" else _hotpotqa(data)
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"RULER's {self.task}: the file of {self.parameters.dataset} has another form: {error!r}") from error

    def draw_all(self, samples: int) -> list[Drawn]:
        if self.request.first + samples > len(self.items):
            after = f" after the first {self.request.first}" if self.request.first else ""
            raise UserError(f"RULER's {self.task} has {len(self.items)} questions, not {samples}{after}")
        return super().draw_all(samples)

    def draw(self, size: int, index: int = 0) -> Drawn:
        """So many documents, those that answer the question among them."""
        item = self.items[self.request.first + index]
        if size >= len(self.documents):
            chosen = (self.documents * math.ceil(size / len(self.documents)))[:size]
        else:
            if size - len(item.gold) > len(item.more):
                near = set(item.gold + item.more)
                others = [number for number in range(len(self.documents)) if number not in near]
                numbers = item.gold + item.more + self.random.sample(others, max(0, size - len(item.gold) - len(item.more)))
            else:
                numbers = item.gold + self.random.sample(item.more, max(0, size - len(item.gold)))
            chosen = [self.documents[number] for number in numbers]
        listed = (f"Document {number}:\n{text}" for number, text in enumerate(shuffled(chosen, self.request.seed), 1))
        return Drawn(self.template.format(context="\n\n".join(listed), query=item.question), item.answers, [])


def _squad(data: Any) -> tuple[list[str], list[Item]]:
    """Documents and questions of SQuAD 2.0 that have an answer."""
    documents = sorted({paragraph["context"] for article in data["data"] for paragraph in article["paragraphs"]})
    number, items = {text: i for i, text in enumerate(documents)}, []
    for article in data["data"]:
        near = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            others = [i for i in near if i != gold]
            answered = (question for question in paragraph["qas"] if not question["is_impossible"])
            items += [Item(q["question"], [answer["text"] for answer in q["answers"]], [gold], others) for q in answered]
    return documents, items


def _hotpotqa(data: Any) -> tuple[list[str], list[Item]]:
    """Documents and questions of HotpotQA's distractor setting."""
    text = lambda context: context[0] + "\n" + "".join(context[1])
    documents = sorted({text(context) for item in data for context in item["context"]})
    number = {document: i for i, document in enumerate(documents)}
    return documents, [Item(item["question"], [item["answer"]], [number[text(c)] for c in item["context"]], []) for item in data]


_FAMILIES: dict[type, type[_Family]] = {
    Needles: _Needles,
    Variables: _Variables,
    CommonWords: _CommonWords,
    FrequentWords: _FrequentWords,
    Questions: _Questions,
}
