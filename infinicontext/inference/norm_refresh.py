"""How the official MEGALODON code reads long texts: with norm statistics that forget.

Shape letters: B batch, L length, T tokens in one call, D channels.

The timestep norm weighs every token alike, so that after a long text a new token hardly moves its statistics. The official scoring and
generation therefore read in calls of two chunks and, from the eighth chunk on, take the statistics over after each call from a fresh run
over the last six chunks; CEMA and attention go on as before. Plain streaming (models/streaming.py: `read`) gives other numbers there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.errors import UserError
from infinicontext.models.megalodon import Megalodon, MegalodonState


def check_refresh(name: str, refresh: tuple[int, int, int]) -> None:
    """Raises UserError where the counts, called `name`, do not fit one another."""
    first, again, step = refresh
    if not (first >= again >= 1 and step >= 1):
        raise UserError(f"{name} is {refresh}; the first number must be at least the second, and the second and third 1 or more")


def read_with_norm_refresh(
    model: Megalodon,
    tokens_BL: jax.Array,
    *,
    refresh: tuple[int, int, int] = (8, 6, 2),
    visit: Callable[[Megalodon, jax.Array, Any], Any] = lambda model, hidden_BTD, extra: (),
    extra: Any = (),
) -> tuple[Any, MegalodonState]:
    """Reads whole texts from the beginning. Jit it, or call it inside a jitted function.

    Args:
      model: a Megalodon.
      tokens_BL: int32, rows of the same length.
      refresh: chunks read when the statistics are first replaced; last chunks that they are then taken from, at most as many; chunks per
        call.
      visit: as in `streaming.read`: `token_losses` scores the text.
      extra: as in `streaming.read`: targets.

    Returns:
      What `visit` returned, joined on axis 1, and the state after the last token, from which generation goes on.

    Raises:
      UserError: another model, or counts that do not fit one another.
    """
    if not isinstance(model, Megalodon):
        raise UserError(f"norm_refresh is {refresh}; it goes with a Megalodon, not with a {type(model).__name__}")
    check_refresh("norm_refresh", refresh)
    (B, L), chunk = tokens_BL.shape, model.config.chunk
    first, again, step = (count * chunk for count in refresh)
    tokens_BL, extra = jax.tree.map(jnp.asarray, (tokens_BL, extra))

    def call(state, begin, length: int):
        """The next `length` tokens, which are whole chunks."""
        tokens_BT, extra_BT = _cut((tokens_BL, extra), begin, length)
        hidden_BTD, state = model.hidden(tokens_BT, state)
        end = begin + length

        def refreshed(state: MegalodonState) -> MegalodonState:
            fresh = model.hidden(_cut(tokens_BL, end - again, again), model.init_state(B))[1]
            return state._replace(layers=state.layers._replace(norm=fresh.layers.norm), final_norm=fresh.final_norm)

        kept = visit(model, hidden_BTD, extra_BT)
        return (state if first > L else jax.lax.cond(end >= first, refreshed, lambda state: state, state)), kept

    whole, chunks = L - L % step, L - L % chunk
    state, parts = model.init_state(B), []
    if whole:
        state, kept = jax.lax.scan(lambda state, begin: call(state, begin, step), state, jnp.arange(0, whole, step))
        parts.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, whole, *x.shape[3:]), kept))
    if whole < chunks:
        state, kept = call(state, jnp.asarray(whole), chunks - whole)
        parts.append(kept)
    tokens_BT, extra_BT = _cut((tokens_BL, extra), chunks, L - chunks)
    hidden_BTD, state = model.hidden(tokens_BT, state)
    parts.append(visit(model, hidden_BTD, extra_BT))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts), state


def _cut(tree, begin, length: int):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, length, axis=1), tree)


def reader(refresh: tuple[int, int, int] = (8, 6, 2)) -> Callable[..., MegalodonState]:
    """How `generate.stream` reads prompts as the official generation does: `generate(model, prompts, options, read=reader())`.

    The function raises UserError where prompts differ in length.
    """

    def read(model: Megalodon, rows: list[np.ndarray], *_) -> MegalodonState:
        if len({len(row) for row in rows}) > 1:
            raise UserError("prompts that are read with refreshed norm statistics must be of one length, or come one at a time")
        return _read(model, np.stack(rows), refresh)

    return read


@functools.partial(jax.jit, static_argnames="refresh")
def _read(model: Megalodon, tokens_BL: jax.Array, refresh: tuple[int, int, int]) -> MegalodonState:
    return read_with_norm_refresh(model, tokens_BL, refresh=refresh)[1]
