"""Passkey accuracy over length and depth, by greedy decoding through the stream.

Shape letters: B samples of a batch, P tokens of the prompt, A tokens of the answer, D channels.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest

from infinicontext.data.passkey import passkey_sample
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.models.streaming import Model, read

PROTOCOL = (
    "Passkey in the format of Infini-attention's appendix B; a sample of length L is L tokens read in one stream from an empty state, the "
    "key decoded greedily; exact = all of its tokens right, digits = share of its tokens that are right; 95% Wilson intervals."
)


@dataclasses.dataclass(frozen=True)
class PasskeyEvaluation:
    """How many samples are asked at each length and depth."""

    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: key at the start, 1: just before the question
    samples: int = 20  # per length and depth
    batch_size: int = 10
    digits: int = 5

    def __post_init__(self):
        for name in ("samples", "batch_size", "digits"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.passkey.{name} is {getattr(self, name)}; it must be 1 or more")
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
      answer_BA, int32.
    """
    B, P = prompt_BP.shape
    last_hidden = lambda model, hidden_BTD, _: hidden_BTD[:, -1:]
    hidden_BND, state = read(model, prompt_BP, model.init_state(B, capacity=P + answer_length - 1), segment=segment, visit=last_hidden)
    first_B = jnp.argmax(model.logits(hidden_BND[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def decode(carry, _):
        token_B, state = carry
        hidden_B1D, state = model.hidden(token_B[:, None], state)
        token_B = jnp.argmax(model.logits(hidden_B1D)[:, 0], axis=-1).astype(jnp.int32)
        return (token_B, state), token_B

    _, rest_AB = jax.lax.scan(decode, (first_B, state), length=answer_length - 1)
    return jnp.concatenate([first_B[:, None], rest_AB.T], axis=1)


def evaluate_passkey(
    model: Model, tokenizer: Tokenizer, config: PasskeyEvaluation, lengths: list[int], *, segment: int, seed: int, say=lambda line: None
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

    Returns:
      protocol, decode, digits; cells: exact, digits and a 95% interval for each length and depth; by_length: the same over all depths, with
      the reading speed; skipped: lengths with the reason.
    """
    cells, by_length, skipped = [], [], []
    run = jax.jit(answer_greedily, static_argnums=2, static_argnames="segment")
    for length in lengths:
        try:
            samples = [
                (depth, *passkey_sample(tokenizer, length + 1, depth, np.random.default_rng((seed, length, cell, i)), config.digits))
                for cell, depth in enumerate(config.depths)
                for i in range(config.samples)
            ]
        except UserError as error:
            skipped.append({"length": length, "reason": str(error)})
            continue
        # A tokenizer may give keys of one number of digits different numbers of tokens; a batch has one shape.
        samples.sort(key=lambda sample: sample[2])
        right: dict[float, list[float]] = {depth: [] for depth in config.depths}
        tokens, seconds, compiled = 0, 0.0, {}
        while samples:
            start = samples[0][2]
            batch = [sample for sample in samples[: config.batch_size] if sample[2] == start]
            samples = samples[len(batch) :]
            rows_BL = np.stack([row for _, row, _ in batch])
            # The last batch is filled up, so that each length is compiled once.
            prompt_BP = np.resize(rows_BL[:, :start], (config.batch_size, start))
            if start not in compiled:
                compiled[start] = run.lower(model, prompt_BP, length + 1 - start, segment=segment).compile()
            clock = time.perf_counter()
            answer_BA = np.asarray(compiled[start](model, prompt_BP))[: len(batch)]
            seconds += time.perf_counter() - clock
            tokens += prompt_BP.size
            for (depth, row, _), answer in zip(batch, answer_BA):
                right[depth].append(float(np.mean(answer == row[start:])))
        everything = [score for scores in right.values() for score in scores]
        cells += [{"length": length, "depth": depth, **_score(scores)} for depth, scores in right.items()]
        by_length.append({"length": length, **_score(everything), "seconds": seconds, "tokens_per_second": tokens / seconds})
        say(
            f"passkey length {length}: exact {by_length[-1]['exact']:.2f}, digits {by_length[-1]['digits']:.2f}, "
            f"{tokens / seconds:,.0f} tokens/s"
        )
    return {"protocol": PROTOCOL, "decode": "greedy", "digits": config.digits, "cells": cells, "by_length": by_length, "skipped": skipped}


def _score(shares: list[float]) -> dict:
    """Summary of samples, each given as the share of its key tokens that are right."""
    exact = sum(share == 1 for share in shares)
    interval = binomtest(exact, len(shares)).proportion_ci(0.95, method="wilson")
    return {
        "samples": len(shares),
        "exact": exact / len(shares),
        "interval": [interval.low, interval.high],
        "digits": float(np.mean(shares)),
    }
