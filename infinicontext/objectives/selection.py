"""Which tokens are learnt from: the top share by a score, exactly and on any number of devices (RHO-1, Lin et al. 2024, arXiv 2404.07965).

Shape letters: B rows, T targets of a row, N checkpoints, K tokens.

The share is found by its threshold, bit by bit: each round counts what lies above a candidate, a sum over the whole batch, which devices
add up as scalars. So no device sees the scores of another, and the mask does not depend on how many there are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Selection(NamedTuple):
    """Which tokens are learnt from."""

    mask: jax.Array  # bool, in the shape of the scores
    candidates: jax.Array  # bool, what could be selected: valid tokens with a finite score
    threshold: jax.Array  # float32, for each group the least score that is selected; NaN where nothing is
    tied: jax.Array  # int32, for each group the candidates with that score, if only some of them are selected; else 0


def count_of(candidates: jax.Array, basis_points: jax.Array | int) -> jax.Array:
    """floor(share of so many candidates), at least 1 if there are any, exactly; int32.

    Args:
      candidates: int32.
      basis_points: the share in 1/10,000, 0 to 10,000.
    """
    whole, rest = candidates // 10_000, candidates % 10_000
    return jnp.minimum(candidates, jnp.maximum(1, whole * basis_points + rest * basis_points // 10_000))


def in_basis_points(ratio: float) -> int:
    """A share in 1/10,000."""
    return round(10_000 * ratio)


def top_share(score: jax.Array, valid: jax.Array, basis_points: jax.Array | int, axes: tuple[int, ...] | None = None) -> Selection:
    """The top share by score of each group; of equal scores the first in row-major order.

    Args:
      score: float32 of any shape.
      valid: bool, which tokens there are.
      basis_points: the share of a group's candidates in 1/10,000; may be traced.
      axes: over which a group extends; None: all.
    """
    axes = tuple(range(score.ndim)) if axes is None else axes
    candidates = valid & jnp.isfinite(score)
    count = lambda condition: jnp.sum(candidates & condition, axes, jnp.int32, keepdims=True)
    wanted = count_of(count(True), basis_points)
    key = _sortable(jnp.where(candidates, score, 0))

    # The greatest key that as many candidates reach as are wanted.
    def set_bit(i, threshold):
        trial = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(count(key >= trial) >= wanted, trial, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(wanted.shape, jnp.uint32))
    # Of those with that key the first ones: up to the greatest index before which there are fewer than are needed.
    needed, equal = wanted - count(key > threshold), count(key == threshold)
    index = jnp.arange(score.size, dtype=jnp.int32).reshape(score.shape)
    bits = max(score.size - 1, 1).bit_length()

    def set_index_bit(i, last):
        trial = last | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(count((key == threshold) & (index < trial)) < needed, trial, last)

    last = jax.lax.fori_loop(0, bits, set_index_bit, jnp.zeros(wanted.shape, jnp.int32))
    mask = candidates & (wanted > 0) & ((key > threshold) | ((key == threshold) & (index <= last)))
    tied = jnp.where((wanted > 0) & (needed < equal), equal, 0)
    return Selection(mask, candidates, jnp.where(wanted > 0, _score(threshold), jnp.nan), tied)


def _sortable(score: jax.Array) -> jax.Array:
    """float32 without NaN -> uint32 in the same order; the two zeros are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, jnp.float32(0), score.astype(jnp.float32)), jnp.uint32)
    top = jnp.uint32(1 << 31)
    return jnp.where(bits >= top, ~bits, bits | top)


def _score(key: jax.Array) -> jax.Array:
    """The score that `_sortable` has made a key of."""
    top = jnp.uint32(1 << 31)
    return jax.lax.bitcast_convert_type(jnp.where(key >= top, key ^ top, ~key), jnp.float32)


def categories(losses_NK: np.ndarray, change: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """What became of tokens in ordinary training (section 2.1, appendix D.1).

    Args:
      losses_NK: of each token at checkpoints that are evenly apart.
      change: of a line through a token's losses, from the first checkpoint to the last, that counts.

    Returns:
      codes_K, int8: 0 stays hard (H->H), 1 gets worse (L->H), 2 learnt (H->L), 3 known already (L->L); and that change, float64 [K].
    """
    losses_NK = np.asarray(losses_NK, np.float64)
    x_N1 = (np.arange(len(losses_NK)) - (len(losses_NK) - 1) / 2)[:, None]
    change_K = np.sum(x_N1 * losses_NK, axis=0) / np.sum(x_N1**2) * (len(losses_NK) - 1)
    stays_K = np.where(losses_NK[-1] <= losses_NK[-1].mean(), 3, 0)
    return np.select([change_K < -change, change_K > change], [2, 1], stays_K).astype(np.int8), change_K
