"""How likely a model finds given continuations of given prompts, through the stream.

Shape letters: B rows, P tokens of a prompt, A of a continuation, C per call, D channels, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.errors import UserError
from infinicontext.inference.generate import NOT_FINITE, read_prompts
from infinicontext.models.streaming import Model

_CHUNK = 64  # tokens of continuations per call: bounds the logits


class Scored(NamedTuple):
    """A continuation."""

    log_probability_A: np.ndarray  # float32, of each token after all before it
    likeliest_A: np.ndarray  # int32, what the model would have said in its place


def score(model: Model, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, segment: int = 512) -> list[Scored]:
    """Reads each prompt and then its continuation, from an empty state; rows do not depend on one another.

    Args:
      model: any model.
      prompts: ids, one or more each.
      continuations: ids, one or more each.
      segment: tokens per call while prompts are read.

    Raises:
      UserError: a log probability is no finite number.
    """
    prompts = [np.asarray(prompt_P, np.int32) for prompt_P in prompts]
    rows = [np.asarray(row_A, np.int32) for row_A in continuations]
    planned_B = np.array([len(prompt_P) + len(row_A) for prompt_P, row_A in zip(prompts, rows)], np.int32)
    longest = max(map(len, rows))
    # What is read beyond a row's end is padding, but takes room.
    capacity = max(map(len, prompts)) + longest + _CHUNK
    state = read_prompts(model, [prompt_P[:-1] for prompt_P in prompts], capacity, planned_B, segment)
    found = []
    for start in range(0, longest, _CHUNK):
        tokens_BC, targets_BC, present_BC = np.zeros((3, len(rows), _CHUNK), np.int32)
        for b, (prompt_P, row_A) in enumerate(zip(prompts, rows)):
            part = row_A[start : start + _CHUNK]
            inputs = np.concatenate([prompt_P[-1:], row_A[:-1]])[start : start + _CHUNK]
            tokens_BC[b, : len(part)], targets_BC[b, : len(part)], present_BC[b, : len(part)] = inputs, part, 1
        *scores, state = _score_chunk(model, tokens_BC, targets_BC, present_BC, state)
        found.append([np.asarray(array) for array in scores])
    log_probability_BA, likeliest_BA = (np.concatenate(arrays, axis=1) for arrays in zip(*found))
    scored = [Scored(log_probability_BA[b, : len(row_A)], likeliest_BA[b, : len(row_A)]) for b, row_A in enumerate(rows)]
    if not all(np.isfinite(row.log_probability_A).all() for row in scored):
        raise UserError(NOT_FINITE)
    return scored


@jax.jit
def _score_chunk(
    model: Model, tokens_BC: jax.Array, targets_BC: jax.Array, present_BC: jax.Array, state: Any
) -> tuple[jax.Array, jax.Array, Any]:
    hidden_BCD, state = model.hidden(tokens_BC, state, present_BC)
    logits_BCV = model.logits(hidden_BCD)
    of_target_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=2)[:, :, 0]
    log_probability_BC = of_target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
    return log_probability_BC, jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32), state
