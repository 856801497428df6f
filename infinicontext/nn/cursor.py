"""Where each row of a batch stands in its stream. Shape letters: B batch, T time (tokens in this call).

One convention serves packed documents and prompts of unequal length: `segment_ids`. Wherever the id changes, within a call or from one call
to the next, a new document starts, for which positions and everything remembered begin anew; 0 marks padding, which stands only at the end
of a row of a call and is neither counted nor remembered.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Cursor(NamedTuple):
    """How far each row has read, and will: 20 bytes per row."""

    count_B: jax.Array  # int32, tokens read in all documents
    position_B: jax.Array  # int32, the position the next token has if it continues the current document
    document_B: jax.Array  # int32, documents started so far; counted, because ids may come again
    segment_B: jax.Array  # int32, id of the current document; 0 before the first token
    planned_B: jax.Array  # int32, tokens the row will have read in the end; rotary tables that depend on the length go by this


class Place(NamedTuple):
    """Where the tokens of one call stand."""

    index_BT: jax.Array  # int32, number of tokens the row read before this one, over all documents
    position_BT: jax.Array  # int32, position within the document
    document_BT: jax.Array  # int32, number of the document in its row, from 1; 0 for padding


def start(batch_size: int, planned: jax.Array | int = 0) -> Cursor:
    """Before the first token; `planned` is a number for all rows or int32 [B]."""
    # NumPy's zeros are known while JAX traces (`at_start`).
    zeros_B = np.zeros(batch_size, np.int32)
    return Cursor(zeros_B, zeros_B, zeros_B, zeros_B, jnp.broadcast_to(jnp.asarray(planned, jnp.int32), (batch_size,)))


def at_start(cursor: Cursor) -> bool:
    """Whether it is known while tracing that no row has read a token, as in a training step, which begins with an empty state."""
    return isinstance(cursor.count_B, np.ndarray) and not cursor.count_B.any()


def advance(cursor: Cursor, length: int, segment_ids_BT: jax.Array | None = None) -> tuple[Place, Cursor]:
    """Places `length` (1 or more) tokens and moves the cursor behind them.

    Args:
      cursor: where the rows stand.
      length: tokens in this call, T.
      segment_ids_BT: int32 as in the module's docstring; None continues the current document (or starts one with id 1) with all T tokens.

    Returns:
      The tokens' places and the cursor after the last token that is not padding.
    """
    if segment_ids_BT is not None:
        chex.assert_shape(segment_ids_BT, (*cursor.count_B.shape, length))
    step_1T = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids_BT is None:
        segment_BT = jnp.broadcast_to(jnp.maximum(cursor.segment_B, 1)[:, None], (cursor.segment_B.shape[0], length))
    else:
        segment_BT = segment_ids_BT.astype(jnp.int32)
    before_BT = jnp.concatenate([cursor.segment_B[:, None], segment_BT[:, :-1]], axis=1)
    starts_BT = (segment_BT > 0) & (segment_BT != before_BT)
    last_start_BT = jax.lax.cummax(jnp.where(starts_BT, step_1T, -1), axis=1)
    position_BT = jnp.where(last_start_BT >= 0, step_1T - last_start_BT, cursor.position_B[:, None] + step_1T)
    document_BT = jnp.where(segment_BT > 0, cursor.document_B[:, None] + jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), 0)
    place = Place(cursor.count_B[:, None] + step_1T, position_BT, document_BT)

    valid_B = jnp.sum(segment_BT > 0, axis=1, dtype=jnp.int32)
    last_B1 = jnp.maximum(valid_B - 1, 0)[:, None]
    any_B = valid_B > 0
    after = lambda values_BT, before_B: jnp.where(any_B, jnp.take_along_axis(values_BT, last_B1, axis=1)[:, 0], before_B)
    return place, Cursor(
        cursor.count_B + valid_B,
        after(position_BT + 1, cursor.position_B),
        after(document_BT, cursor.document_B),
        after(segment_BT, cursor.segment_B),
        cursor.planned_B,
    )
