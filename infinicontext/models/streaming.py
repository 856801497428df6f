"""What a model is, and the drivers that feed a stream of any length through one.

Shape letters: B batch, T time (tokens in one call), L length of the whole stream, D channels, V vocabulary, N segments.

**The stream law.** However a sequence is split into calls, the hidden states and the final state are the same.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.errors import UserError

State = Any  # a NamedTuple of arrays; each model has its own


class Model(Protocol):
    """A model reads a stream and carries a state. The module holds parameters and its config, nothing else; nothing mutates in a call."""

    config: Any

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> State:
        """The state before the first token; `capacity` tokens will fit if the state is one that grows.

        Rotary tables that depend on the length of a text go by `planned`: tokens each row will have read in the end, int32 [B] or one
        number for all; None: capacity.
        """

    def room(self, state: State) -> jax.Array | None:
        """How many more tokens fit in each row, int32 [B]; None for a state that does not grow."""

    def hidden(self, tokens_BT: jax.Array, state: State, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, State]:
        """Reads T tokens (0 is allowed) from wherever the stream stands -> hidden_BTD, the state after them."""

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """The head: hidden_BTD -> logits_BTV."""

    def __call__(self, tokens_BT: jax.Array, state: State, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, State]:
        """`hidden` and the head: logits_BTV and the state."""


def state_bytes(state: State) -> int:
    """Bytes of everything a model remembers (arrays or their abstract shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def require_room(room_B: jax.Array | None, length_B: jax.Array | int) -> None:
    """Raises UserError if `length_B` more tokens do not fit. Traced values are let through: compiled code marks overflow with NaN."""
    if room_B is None or isinstance(room_B, jax.core.Tracer) or isinstance(length_B, jax.core.Tracer):
        return
    lacking_B = np.asarray(length_B) - np.asarray(room_B)
    if lacking_B.max(initial=0) > 0:
        room, length = int(np.asarray(room_B)[lacking_B.argmax()]), int(np.broadcast_to(length_B, lacking_B.shape)[lacking_B.argmax()])
        raise UserError(f"the state has room for {room} more tokens, not for {length}; its size is set by init_state(capacity=...)")


def abstract_state_bytes(model: Model, length: int) -> int:
    """Bytes per sequence of the state of a model that has read `length` tokens; nothing is allocated."""
    return state_bytes(jax.eval_shape(lambda: model.init_state(1, capacity=length)))


def read(
    model: Model,
    tokens_BL: jax.Array,
    state: State,
    *,
    segment: int = 1024,
    visit: Callable[[Model, jax.Array, Any], Any] = lambda model, hidden_BTD, extra: (),
    extra: Any = (),
) -> tuple[Any, State]:
    """Feeds a whole stream through a model: a scan over segments with the state as the carry, then the remainder.

    Memory does not grow with L, except for the tokens themselves and for what `visit` returns. Jit it, or call it inside a jitted function.

    Args:
      model: any model.
      tokens_BL: int32, any length.
      state: where the stream stands.
      segment: tokens per call, T.
      visit: (model, hidden_BTD, extra of these T tokens) -> a tree of arrays [B, n, ...] that is kept, for example a loss per token.
      extra: a tree of arrays [B, L, ...] that is cut like the tokens and passed to `visit`.

    Returns:
      What `visit` returned, joined on axis 1 in order, and the state after the last token.

    Raises:
      UserError: the stream does not fit into a state that grows (outside jit only; compiled code gives NaN from there on).
    """
    require_room(model.room(state), tokens_BL.shape[1])

    def call(state, xs):
        tokens_BT, extra = xs
        hidden_BTD, state = model.hidden(tokens_BT, state)
        return state, visit(model, hidden_BTD, extra)

    B, L = tokens_BL.shape
    whole = L - L % segment

    def numbered_segment(state, number):
        # Cutting inside the loop keeps the stream from being copied as a whole.
        return call(state, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * segment, segment, axis=1), (tokens_BL, extra)))

    if segment > L:
        state, kept = call(state, (tokens_BL, extra))
        return kept, state
    tokens_BL, extra = jax.tree.map(jnp.asarray, (tokens_BL, extra))
    state, kept = jax.lax.scan(numbered_segment, state, jnp.arange(whole // segment))
    kept = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:]), kept)
    if whole < L:
        state, last = call(state, jax.tree.map(lambda x: x[:, whole:], (tokens_BL, extra)))
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), kept, last)
    return kept, state
