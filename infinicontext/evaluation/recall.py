"""Associative recall by length and number of pairs: which values are the likeliest where keys come again.

Shape letters: N examples, L tokens, T tokens of one call, D channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.data.recall import NO_LABEL, RecallData
from infinicontext.errors import UserError
from infinicontext.evaluation.intervals import mean_with_interval
from infinicontext.inference.generate import NOT_FINITE
from infinicontext.models.streaming import Model, read


@dataclasses.dataclass(frozen=True)
class RecallEvaluation:
    """What is asked beside lengths; the paper's test sets have 3,000 examples."""

    pairs: tuple[int, ...] = ()  # empty: those of training
    samples: int = 200  # examples of each length and number of pairs
    batch_size: int = 50

    def __post_init__(self):
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.recall.{name} is {getattr(self, name)}; it must be 1 or more")


def evaluate_recall(
    model: Model, data: RecallData, config: RecallEvaluation, lengths: list[int], *, segment: int, seed: int, say=lambda line: None
) -> dict:
    """Accuracy by length and number of pairs.

    Args:
      model: any model with the data's vocabulary.
      data: decides vocabulary, gap and filler.
      config: which numbers of pairs, and how many examples.
      lengths: L.
      segment: tokens per call.
      seed: decides the examples, none of which training has.
      say: told of progress, a line per length.

    Returns:
      A result of the form of evaluation/questions.py: size is the length, place the number of pairs, score the share of queries whose
      value is the likeliest token, whole the share of examples without an error; intervals are over examples.
    """
    run = jax.jit(lambda model, inputs_NL: _likeliest(model, inputs_NL, segment))
    cells, by_size, skipped = [], [], []
    for length in lengths:
        found = []
        for pairs in config.pairs or data.pairs:
            try:
                inputs_NL, labels_NL = data.examples(config.samples, pairs, (2, seed, length, pairs), length)
            except UserError as error:
                skipped.append({"size": length, "reason": str(error)})
                continue
            said = []
            for at in range(0, config.samples, config.batch_size):
                # A batch that is not full is filled up, so that a length is compiled once.
                rows = np.arange(at, at + config.batch_size) % config.samples
                said.append(np.asarray(run(model, inputs_NL[rows])))
            asked_NL = labels_NL != NO_LABEL
            said_NL = np.concatenate(said)[: config.samples]
            if (said_NL < 0).any():
                skipped.append({"size": length, "reason": NOT_FINITE})
                say(f"recall length {length}: left out, {NOT_FINITE}")
                continue
            shares_N = ((said_NL == labels_NL) & asked_NL).sum(axis=1) / asked_NL.sum(axis=1)
            found.append((pairs, shares_N))
            cells.append({"size": length, "place": pairs} | _summary(shares_N))
        if found:
            by_size.append({"size": length} | _summary(np.concatenate([shares_N for _, shares_N in found])))
            by_size[-1] |= {"prompt_tokens": length, "chance": float(np.mean([1 / pairs for pairs, _ in found]))}
            say(f"recall length {length}: {100 * by_size[-1]['score']:.1f}%, chance {100 * by_size[-1]['chance']:.1f}%")
    protocol = (
        f"Multi-query associative recall (MQAR), {config.samples} examples of each length and number of pairs, filler {data.filler}"
        + (f", {data.gap} tokens between pairs and queries" if data.gap else "")
        + "; a query is right if its value is the likeliest token; who knows which values there are guesses one in the number of pairs."
    )
    about = {"mode": "teacher_forced", "seed": seed, "size": "tokens", "place": "pairs"}
    return {"protocol": protocol, **about, "cells": cells, "by_size": by_size, "skipped": skipped}


def _likeliest(model: Model, inputs_NL: jax.Array, segment: int) -> jax.Array:
    """What the model says after each token, int32_NL; -1 where logits are not finite."""

    def visit(model, hidden_NTD, _):
        logits_NTV = model.logits(hidden_NTD)
        return jnp.where(jnp.isfinite(logits_NTV).all(axis=-1), jnp.argmax(logits_NTV, axis=-1), -1).astype(jnp.int32)

    return read(model, inputs_NL, model.init_state(*inputs_NL.shape), segment=segment, visit=visit)[0]


def _summary(shares_N: np.ndarray) -> dict:
    mean, interval = mean_with_interval(shares_N)
    return {"samples": len(shares_N), "score": mean, "interval": interval, "whole": float(np.mean(shares_N == 1))}
