"""Passkey accuracy over length and depth, decoded or teacher-forced, through the stream.

Shape letters: B samples of a batch, L tokens of a prompt with its answer, P of the prompt, A of the answer, T of one call, D channels,
V vocabulary.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.data.passkey import passkey_sample
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Answer, Answers, Question
from infinicontext.evaluation.intervals import mean_with_interval
from infinicontext.evaluation.questions import Mode
from infinicontext.inference.generate import NOT_FINITE
from infinicontext.models.streaming import Model, read

PROTOCOL = (
    "Passkey in the format of Infini-attention's appendix B; a sample of length L is L tokens read in one stream from an empty state, the "
    "key {how}; exact = all of its tokens right, digits = share of its tokens that are right; 95% Wilson intervals."
)
HOW = {"generate": "decoded greedily", "teacher_forced": "read, and a token of it right where it is the likeliest"}


@dataclasses.dataclass(frozen=True)
class PasskeyEvaluation:
    """How many samples are asked at each length and depth."""

    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: key at the start, 1: just before the question
    samples: int = 20  # per length and depth
    batch_size: int = 10
    digits: int = 5
    mode: Mode = "generate"
    predictions: bool = False  # whether the result holds every answer

    def __post_init__(self):
        for name in ("samples", "batch_size", "digits"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.passkey.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.mode not in get_args(Mode):
            raise UserError(f"evaluation.passkey.mode is {self.mode}; it must be one of {', '.join(get_args(Mode))}")
        if self.digits > 18:
            raise UserError(f"evaluation.passkey.digits is {self.digits}; it must be from 1 to 18")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise UserError(f"evaluation.passkey.depths is {self.depths}; it must be one or more numbers from 0 to 1")


def answer_greedily(model: Model, prompt_BP: jax.Array, answer_length: int, *, segment: int) -> jax.Array:
    """Reads the prompt from an empty state and decodes.

    Args:
      model: any model.
      prompt_BP: int32, at least one token.
      answer_length: A.
      segment: tokens per call while the prompt is read.

    Returns:
      answer_BA, int32; -1 where logits are not finite.
    """
    B, P = prompt_BP.shape
    _, state = read(model, prompt_BP[:, :-1], model.init_state(B, capacity=P + answer_length - 1), segment=segment)

    def decode(carry, _):
        said_B1, state = _likeliest(model, *carry)
        return (said_B1, state), said_B1[:, 0]

    _, answer_AB = jax.lax.scan(decode, (prompt_BP[:, -1:], state), length=answer_length)
    return answer_AB.T


def answer_forced(model: Model, row_BL: jax.Array, answer_length: int, *, segment: int) -> jax.Array:
    """The same where the right answer ends the row and is read: what the model would have said in place of each of its tokens."""
    B, L = row_BL.shape
    before = L - answer_length - 1
    _, state = read(model, row_BL[:, :before], model.init_state(B, capacity=L - 1), segment=segment)
    return _likeliest(model, row_BL[:, before:-1], state)[0]


def _likeliest(model: Model, token_BT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    hidden_BTD, state = model.hidden(token_BT, state)
    logits_BTV = model.logits(hidden_BTD)
    said_BT = jnp.where(jnp.isfinite(logits_BTV).all(axis=-1), jnp.argmax(logits_BTV, axis=-1), -1)
    return said_BT.astype(jnp.int32), state


def evaluate_passkey(
    model: Model,
    tokenizer: Tokenizer,
    config: PasskeyEvaluation,
    lengths: list[int],
    *,
    segment: int,
    seed: int,
    say=lambda line: None,
    file: Path | None = None,
    about: dict | None = None,
) -> dict:
    """Accuracy at each length and depth.

    Args:
      model: any model with the tokenizer's vocabulary.
      tokenizer: of the data the model was trained on.
      config: depths and samples.
      lengths: tokens read, L.
      segment: tokens per call.
      seed: decides the keys; the same for every model.
      say: told of progress, a line per length.
      file: keeps answers, so that nothing is done twice after an interruption.
      about: what is evaluated; answers of something else are not used.

    Returns:
      protocol, mode, digits, seed; cells: exact, digits and a 95% interval for each length and depth; by_length: the same over all depths,
      with the reading speed where something was read; predictions: on request; skipped: lengths with the reason.
    """
    kept = Answers(file, (about or {}) | {"mode": config.mode, "seed": seed, "tokenizer": tokenizer.fingerprint()})
    cells, by_length, predictions, skipped = [], [], [], []
    decoded = config.mode == "generate"
    run = jax.jit(answer_greedily if decoded else answer_forced, static_argnums=2, static_argnames="segment")
    for length in lengths:
        right: dict[float, list[float]] = {depth: [] for depth in config.depths}
        tokens, seconds, compiled = 0, 0.0, {}
        try:
            for batch in _batches(tokenizer, config, length, seed):
                if todo := [sample for sample in batch if kept.of(sample.question) is None]:
                    start = len(todo[0].question.prompt_P)
                    # A batch that is not full is filled up with its first sample, so that a length is compiled once.
                    filled = todo + todo[:1] * (config.batch_size - len(todo))
                    whole = [np.concatenate([sample.question.prompt_P, sample.key_A]) for sample in filled]
                    row_BL = np.stack(whole)[:, : start if decoded else None]
                    if start not in compiled:
                        compiled[start] = run.lower(model, row_BL, length + 1 - start, segment=segment).compile()
                    clock = time.perf_counter()
                    answer_BA = np.asarray(compiled[start](model, row_BL))[: len(todo)]
                    seconds += time.perf_counter() - clock
                    if (answer_BA < 0).any():
                        raise UserError(NOT_FINITE)
                    tokens += start * len(row_BL)
                    for (question, key_A), answer_A in zip(todo, answer_BA):
                        kept.keep(question, Answer(tokenizer.decode(answer_A), float(np.mean(answer_A == key_A))))
                for question, _ in batch:
                    answer = kept.of(question)
                    right[question.place].append(answer.right)
                    predictions.append(
                        {"length": length, "depth": question.place, "index": question.index, "answer": answer.text}
                        | {"key": question.answers[0], "digits": answer.right}
                    )
        except UserError as error:
            skipped.append({"length": length, "reason": str(error)})
            continue
        everything = [score for scores in right.values() for score in scores]
        cells += [{"length": length, "depth": depth, **_score(scores)} for depth, scores in right.items()]
        by_length.append({"length": length, **_score(everything), "chance": 1 / (9 * 10 ** (config.digits - 1))})
        if seconds:
            by_length[-1] |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        say(
            f"passkey length {length}: exact {by_length[-1]['exact']:.2f}, digits {by_length[-1]['digits']:.2f}, "
            + (f"{tokens / seconds:,.0f} tokens/s" if seconds else "answered before")
        )
    how = {"protocol": PROTOCOL.format(how=HOW[config.mode]), "mode": config.mode, "digits": config.digits, "seed": seed}
    return how | {"cells": cells, "by_length": by_length, "skipped": skipped} | ({"predictions": predictions} if config.predictions else {})


class _Sample(NamedTuple):
    question: Question
    key_A: np.ndarray  # int32


def _batches(tokenizer: Tokenizer, config: PasskeyEvaluation, length: int, seed: int) -> Iterator[list[_Sample]]:
    """Samples in batches; made one batch at a time, for a million tokens each are many bytes."""
    places = [(cell, depth, i) for cell, depth in enumerate(config.depths) for i in range(config.samples)]
    for at in range(0, len(places), config.batch_size):
        # A tokenizer may give keys of one number of digits different numbers of tokens; a batch has one shape.
        by_start: dict[int, list[_Sample]] = {}
        for cell, depth, i in places[at : at + config.batch_size]:
            row, start = passkey_sample(tokenizer, length + 1, depth, np.random.default_rng((seed, length, cell, i)), config.digits)
            key = tokenizer.decode(row[start:])
            question = Question(length, depth, i, row[:start], (key,), key, len(row) - start)
            by_start.setdefault(start, []).append(_Sample(question, row[start:]))
        yield from by_start.values()


def _score(shares: list[float]) -> dict:
    """Summary of samples, each given as the share of its key tokens that are right."""
    exact, interval = mean_with_interval([float(share == 1) for share in shares])
    return {"samples": len(shares), "exact": exact, "interval": interval, "digits": float(np.mean(shares))}
