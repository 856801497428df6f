"""Questions to a model and its answers: asked in batches through the stream, scored by kind, and never asked twice.

Shape letters: P tokens of a prompt, A of an answer.
"""

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Answer, Answers, Question
from infinicontext.evaluation.intervals import mean_with_interval
from infinicontext.inference.generate import Generation, generate
from infinicontext.inference.score import score
from infinicontext.models.streaming import Model

# generate: greedy decoding, scored as text. teacher_forced: the right answer is read, and each of its tokens must be the likeliest.
Mode = Literal["generate", "teacher_forced"]


class Kind(Protocol):
    """A kind of question: a frozen dataclass of options with these."""

    size: str  # what sizes count
    place: str  # what places are

    def protocol(self) -> str:
        """How prompts are made and answers scored, in a sentence or two."""
        ...

    def sizes(self, lengths: list[int]) -> list[int]:
        """The sizes to be asked, where lengths in tokens are wanted."""
        ...

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """Questions of a size, so many for each place: a pure function of these arguments and the files that are named.

        Raises:
          UserError: the size holds no such question, or a file is missing.
        """
        ...

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Numbers from 0 to 1, the first of them being the score."""
        ...

    def chance(self, size: int) -> float | None:
        """The score of one who guesses; None: not known."""
        ...

    def averages(self, scores: dict[str, float]) -> dict:
        """Of kinds whose places are data sets: what their scores come to, in place of the mean over questions."""
        ...


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked, whatever their kind."""

    samples: int = 10  # for each size and place
    batch_size: int = 4
    mode: Mode = "generate"
    predictions: bool = False  # whether the result holds every answer

    def __post_init__(self):
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.asking.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.mode not in get_args(Mode):
            raise UserError(f"evaluation.asking.mode is {self.mode}; it must be one of {', '.join(get_args(Mode))}")


def ask(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    kept: Answers,
    *,
    mode: Mode,
    batch_size: int,
    segment: int,
) -> float | None:
    """Asks what was not answered yet, and keeps the answers.

    Every question is read from an empty state. Prompts of about the same length are read together; a row's padding changes nothing.

    Args:
      model: any model with the tokenizer's vocabulary.
      tokenizer: its `stop_ids` end an answer.
      questions: in any order.
      kept: answers so far.
      mode: see `Mode`.
      batch_size: questions read together.
      segment: tokens per call while prompts are read.

    Returns:
      Questions answered per second; None if there was nothing to ask.
    """
    todo = [question for question in questions if kept.of(question) is None]
    clock = time.perf_counter()
    for batch in _batches(todo, batch_size):
        # A batch that is not full is filled up, so that fewer programs are compiled.
        filled = batch + batch[:1] * (batch_size - len(batch))
        if mode == "generate":
            stop = tuple((token,) for token in sorted(tokenizer.stop_ids))
            options = Generation(batch[0].new_tokens, segment=segment, stop=stop)
            rows = generate(model, [question.prompt_P for question in filled], options)
            found = [Answer(tokenizer.decode(row.tokens)) for row in rows]
        else:
            found = _forced(model, tokenizer, filled, segment)
        for question, answer in zip(batch, found):
            kept.keep(question, answer)
    return len(todo) / (time.perf_counter() - clock) if todo else None


def _batches(questions: list[Question], batch_size: int) -> Iterator[list[Question]]:
    """Questions with answers of the same length and prompts of about the same."""
    key = lambda question: question.new_tokens
    for _, same in itertools.groupby(sorted(questions, key=lambda question: (key(question), len(question.prompt_P))), key):
        row = list(same)
        yield from (row[at : at + batch_size] for at in range(0, len(row), batch_size))


def _forced(model: Model, tokenizer: Tokenizer, questions: list[Question], segment: int) -> list[Answer]:
    """The likeliest tokens where the right ones are read."""
    # As tokens after some text: at the beginning of one, tokenizers may write a space of their own. No word begins with the line's end.
    before = len(tokenizer.encode("\n"))
    right = [tokenizer.encode(f"\n{question.continuation}")[before:] for question in questions]
    found = score(model, [question.prompt_P for question in questions], right, segment=segment)
    said = [scored.likeliest_A for scored in found]
    return [Answer(tokenizer.decode(said_A), float(np.mean(said_A == right_A))) for said_A, right_A in zip(said, right)]


def evaluate_questions(
    model: Model,
    tokenizer: Tokenizer,
    task: str,
    kind: Kind,
    asking: Asking,
    lengths: list[int],
    *,
    limit: int | None,
    segment: int,
    seed: int,
    say=lambda line: None,
    file: Path | None = None,
    about: dict | None = None,
) -> dict:
    """Asks questions of one kind and adds up their scores.

    Args:
      model: any model with the tokenizer's vocabulary.
      tokenizer: decides how much text a length holds.
      task: its name, for messages.
      kind: what is asked.
      asking: how.
      lengths: tokens; a kind whose sizes count something else has its own.
      limit: the longest prompt, with the answer, that the model has room for; None: any.
      segment: tokens per call while prompts are read.
      seed: decides the questions; the same for every model.
      say: told of progress, a line per size.
      file: keeps answers, so that nothing is done twice after an interruption.
      about: what is evaluated; answers of something else are not used.

    Returns:
      protocol, mode, seed, prompts (SHA-256 of all of them), size, place; cells: the mean scores with a 95% interval by size and place;
      by_size: the same over all places, the scores of one who guesses and of the `majority`, the prompts' mean length and the speed;
      skipped: sizes with the reason; predictions: on request.
    """
    kept = Answers(
        file, (about or {}) | {"kind": dataclasses.asdict(kind), "mode": asking.mode, "seed": seed, "tokenizer": tokenizer.fingerprint()}
    )
    cells, by_size, skipped, predictions, digest = [], [], [], [], hashlib.sha256()
    for size in kind.sizes(lengths):
        try:
            questions = kind.questions(tokenizer, size, asking.samples, seed)
        except UserError as error:
            skipped.append({"size": size, "reason": str(error)})
            say(f"{task} {kind.size} {size}: left out, {error}")
            continue
        longest = max(len(question.prompt_P) + question.new_tokens for question in questions)
        if limit is not None and longest > limit:
            reason = f"{longest} tokens, but the state grows with length and evaluation.capacity is {limit}"
            skipped.append({"size": size, "reason": reason})
            say(f"{task} {kind.size} {size}: left out, {reason}")
            continue
        for question in questions:
            digest.update(question.prompt_P.tobytes())
        try:
            speed = ask(model, tokenizer, questions, kept, mode=asking.mode, batch_size=asking.batch_size, segment=segment)
        except UserError as error:
            # Logits that are not finite: a model may break at one length and not at another.
            skipped.append({"size": size, "reason": str(error)})
            say(f"{task} {kind.size} {size}: left out, {error}")
            continue
        scored = [(question, _scores(kind, question, kept.of(question))) for question in questions]
        places = dict.fromkeys(question.place for question in questions)
        names = {"task": "tasks", "data set": "data_sets"}.get(kind.place)
        if missing := [name for name in getattr(kind, names) if name not in places] if names else []:
            skipped.append({"size": size, "task": ", ".join(missing), "reason": "not there, or the size holds none of its questions"})
        cells += [{"size": size, "place": place} | _summary([s for q, s in scored if q.place == place]) for place in places]
        # What is known without documents, and with nothing but the right one, is there to compare with and no position.
        counts = [(q, scores) for q, scores in scored if kind.place != "position" or not isinstance(q.place, str)]
        whole = _summary([scores for _, scores in counts])
        length = float(np.mean([len(question.prompt_P) for question in questions]))
        numbers = {"prompt_tokens": length, "chance": kind.chance(size), "majority": majority(kind, [q for q, _ in counts])}
        numbers |= {"samples_per_second": speed} if speed else {}
        by_size.append({"size": size} | whole | numbers)
        if kind.place == "data set":
            by_size[-1] |= kind.averages({cell["place"]: cell["score"] for cell in cells if cell["size"] == size})
        predictions += [
            {"size": size, "place": q.place, "index": q.index, "answer": kept.of(q).text, "answers": list(q.answers)} | s for q, s in scored
        ]
        guessed = "not known" if kind.chance(size) is None else f"{100 * kind.chance(size):.1f}%"
        score, usual = (f"{100 * by_size[-1][name]:.1f}%" for name in ("score", "majority"))
        say(f"{task} {kind.size} {size}: {score} of {whole['samples']}, chance {guessed}, the usual answer {usual}")
    how = {
        "generate": "decoded greedily",
        "teacher_forced": "teacher-forced: the right answer is read, and the score is 1 where each of its tokens is the likeliest",
    }
    return {
        "protocol": f"{kind.protocol()} Read in one stream from an empty state, {how[asking.mode]}; 95% intervals.",
        "mode": asking.mode,
        "seed": seed,
        "prompts": digest.hexdigest(),
        "size": kind.size,
        "place": kind.place,
        "cells": cells,
        "by_size": by_size,
        "skipped": skipped,
    } | ({"predictions": predictions} if asking.predictions else {})


def majority(kind: Kind, questions: Sequence[Question]) -> float:
    """The score of one who reads nothing, but gives the commonest answer to the other questions (of the same data set or task)."""
    group = lambda question: question.place if isinstance(question.place, str) else ""
    answers = {name: Counter(q.answers[0] for q in questions if group(q) == name) for name in {group(q) for q in questions}}
    scores = []
    for question in questions:
        others = answers[group(question)] - Counter(question.answers[:1])
        usual = max(sorted(others), key=others.__getitem__, default="")
        scores.append(next(iter(kind.score(question, usual).values())))
    return float(np.mean(scores))


def _scores(kind: Kind, question: Question, answer: Answer) -> dict[str, float]:
    """By name; the first is the score."""
    if answer.right is None:
        return kind.score(question, answer.text)
    return {"exact": float(answer.right == 1), "tokens": answer.right}


def _summary(scores: list[dict[str, float]]) -> dict:
    first, *others = scores[0]
    mean, interval = mean_with_interval([entry[first] for entry in scores])
    means = {name: float(np.mean([entry[name] for entry in scores])) for name in others}
    return {"samples": len(scores), "score": mean, "interval": interval} | means


def with_start(tokenizer: Tokenizer, ids_P: Sequence[int] | np.ndarray) -> np.ndarray:
    """Ids after the tokenizer's start token, if it has one and they do not begin with it."""
    begun = tokenizer.start_id is None or (len(ids_P) and ids_P[0] == tokenizer.start_id)
    return np.array([*([] if begun else [tokenizer.start_id]), *ids_P], np.int32)


def repeated(ids: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of ids that begin anew where they end."""
    return np.resize(ids, count)
