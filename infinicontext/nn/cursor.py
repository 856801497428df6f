"""Where each row of a batch stands in its stream. Shape letters: B batch, T time (tokens in this call).

One convention serves packed documents and prompts of unequal length: `segment_ids`. Ids within a row never decrease; a larger id starts a
new document, for which positions and everything remembered begin anew; 0 marks padding, which stands only at the end of a row of a call
and is neither counted nor remembered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cursor(NamedTuple):
    """How far each row has read: 12 bytes per row."""

    count_B: jax.Array  # int32, tokens read in all documents
    position_B: jax.Array  # int32, the position the next token has if it continues the current document
    segment_B: jax.Array  # int32, id of the current document, 1 or more


class Place(NamedTuple):
    """Where the tokens of one call stand."""

    index_BT: jax.Array  # int32, number of tokens the row read before this one, over all documents
    position_BT: jax.Array  # int32, position within the document
    segment_BT: jax.Array  # int32, id of the document, 0 for padding


def start(batch_size: int) -> Cursor:
    """Before the first token of document 1."""
    zeros_B = jnp.zeros(batch_size, jnp.int32)
    return Cursor(zeros_B, zeros_B, zeros_B + 1)


def advance(cursor: Cursor, length: int, segment_ids_BT: jax.Array | None = None) -> tuple[Place, Cursor]:
    """Places `length` (1 or more) tokens and moves the cursor behind them.

    Args:
      cursor: where the rows stand.
      length: tokens in this call, T.
      segment_ids_BT: int32 as in the module's docstring; None continues the current document with all T tokens.

    Returns:
      The tokens' places and the cursor after the last token that is not padding.
    """
    step_1T = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids_BT is None:
        segment_BT = jnp.broadcast_to(cursor.segment_B[:, None], (cursor.segment_B.shape[0], length))
    else:
        segment_BT = segment_ids_BT.astype(jnp.int32)
    before_BT = jnp.concatenate([cursor.segment_B[:, None], segment_BT[:, :-1]], axis=1)
    starts_BT = (segment_BT > 0) & (segment_BT != before_BT)
    last_start_BT = jax.lax.cummax(jnp.where(starts_BT, step_1T, -1), axis=1)
    position_BT = jnp.where(last_start_BT >= 0, step_1T - last_start_BT, cursor.position_B[:, None] + step_1T)
    place = Place(cursor.count_B[:, None] + step_1T, position_BT, segment_BT)

    valid_B = jnp.sum(segment_BT > 0, axis=1, dtype=jnp.int32)
    last_B1 = jnp.maximum(valid_B - 1, 0)[:, None]
    any_B = valid_B > 0
    position_B = jnp.where(any_B, jnp.take_along_axis(position_BT, last_B1, axis=1)[:, 0] + 1, cursor.position_B)
    segment_B = jnp.where(any_B, jnp.take_along_axis(segment_BT, last_B1, axis=1)[:, 0], cursor.segment_B)
    return place, Cursor(cursor.count_B + valid_B, position_B, segment_B)
