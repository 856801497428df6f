"""Timestep normalisation: group normalisation over everything read so far (Ma et al. 2024, MEGALODON, section 3.2 and appendix B).

Shape letters: B batch, T time (tokens in this call), D channels, G groups of F features (D = G * F), N blocks of C tokens, S shards.

Each group of token t is normalised by mean and population variance of the t * F numbers that the group has had, those of t included:

    y_t = (x_t - mean_t) / sqrt(variance_t + epsilon) * (weight + 1) + bias

The statistics know a token by mean and variance of its own F numbers, and the moments of two stretches of tokens merge exactly (Chan et al.
1983). So the prefixes of a block of tokens are one triangular matmul, the totals of the blocks are again a sequence whose prefixes are
wanted, and what was read before the call is merged last. Float32 stays accurate over millions of tokens because means are relative to an
anchor near them, counts are integers, and the state keeps what rounding has lost (Kahan 1965); else one token more would change nothing.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.nn.parameters import at_least_float32, constant, use
from infinicontext.sharding import constrain


class TimestepNormState(NamedTuple):
    """Statistics of the current document, float32 or wider: 4 + 16 G bytes per row. Mean and variance are each a sum, value + residual."""

    count_B: jax.Array  # int32, tokens, those that the prior stands for included
    mean_BG: jax.Array
    variance_BG: jax.Array
    mean_residual_BG: jax.Array
    variance_residual_BG: jax.Array


class Moments(NamedTuple):
    """Statistics of each of T stretches of tokens; mean and variance are 0 where the count is."""

    count: jax.Array  # [B, T, 1], a float, exact to 2^24
    mean: jax.Array  # [B, T, G]
    variance: jax.Array  # [B, T, G]


class Shard(NamedTuple):
    """What later shards of a sequence need to know of this one: 5 + 8 G bytes per row."""

    moments: Moments  # of the shard's last document, T = 1
    restarted_BT: jax.Array  # bool, whether a document starts in the shard, T = 1


class TimestepNorm(nnx.Module):
    """The equation in the module's docstring; effective scale weight + 1, all parameters 0 at first."""

    def __init__(self, dim: int, groups: int, prior_count: int = 0, epsilon: float = 1e-5):
        """Groups are contiguous slices of the channels; documents start from a learned prior that counts as `prior_count` tokens.

        Raises:
          UserError: `groups` does not divide `dim`, or groups of one feature, whose first token has no variance, without a prior.
        """
        if groups < 1 or dim % groups:
            raise UserError(f"groups is {groups}; it must be 1 or more and divide dim, {dim}")
        least = 2 if groups == dim else 0
        if prior_count < least:
            raise UserError(f"prior_count is {prior_count}; it must be {least} or more for {groups} groups of {dim} channels")
        self.groups, self.prior_count, self.epsilon = groups, prior_count, epsilon
        self.weight = constant(0, (dim,), ("channels",))
        self.bias = constant(0, (dim,), ("channels",))
        if prior_count > 0:
            self.prior_mean = constant(0, (groups,), ("norm_groups",))
            self.prior_logv = constant(0, (groups,), ("norm_groups",))

    def init_state(self, batch_size: int, dtype: jnp.dtype | str = jnp.float32) -> TimestepNormState:
        """The state before a document's first token, for x of `dtype`: the prior, or else mean 0 and variance 1 that count as nothing."""
        zeros_BG = constrain(jnp.zeros((batch_size, self.groups), at_least_float32(dtype)), ("batch", "norm_groups"))
        mean_BG, variance_BG = zeros_BG, zeros_BG + 1
        if self.prior_count > 0:
            mean_BG = zeros_BG + use(self.prior_mean, zeros_BG.dtype)[None]
            variance_BG = zeros_BG + jnp.exp(use(self.prior_logv, zeros_BG.dtype))[None]
        return TimestepNormState(jnp.full(batch_size, self.prior_count, jnp.int32), mean_BG, variance_BG, zeros_BG, zeros_BG)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: TimestepNormState,
        starts_BT: jax.Array | None = None,
        valid_BT: jax.Array | None = None,
        *,
        block: int = 64,
    ) -> tuple[jax.Array, TimestepNormState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          x_BTD: input, any float dtype; T may be 0 and is at most 2^24.
          state: what was read before.
          starts_BT: bool, where a document begins: its statistics start from the prior. None for nowhere.
          valid_BT: bool, False for padding, which gives 0 and leaves the statistics as they are. None for no padding.
          block: tokens per matmul, C, which T need not be a multiple of. On 2 CPU cores 32, 64 and 128 were equally fast.

        Returns:
          y_BTD in x's dtype, and the state after the last token.
        """
        chex.assert_rank([x_BTD, state.mean_BG], [3, 2])
        chex.assert_type(list(state[1:]), at_least_float32(x_BTD.dtype))
        chex.assert_shape([marks_BT for marks_BT in (starts_BT, valid_BT) if marks_BT is not None], x_BTD.shape[:2])
        if x_BTD.shape[1] == 0:
            return x_BTD, state
        # Nothing but rounding depends on the anchor, so it needs no gradient.
        anchor_BG = jax.lax.stop_gradient(jnp.where(state.count_B[:, None] > 0, state.mean_BG, _first_mean(x_BTD, self.groups, valid_BT)))
        x_BTGF, tokens = _relative(x_BTD, anchor_BG, valid_BT)
        document_BT = None if starts_BT is None else jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)  # 0 is the state's
        seen = _prefixes(tokens, document_BT, block)

        before, current = _moments(state, anchor_BG), state
        if document_BT is not None:
            fresh = self.init_state(x_BTD.shape[0], x_BTD.dtype)
            before = _where(document_BT > 0, _moments(fresh, anchor_BG), before)
            current = _where(document_BT[:, -1] > 0, fresh, state)
        statistics = _merge(before, seen)
        # Multiplying before subtracting saves the backward pass an array of x's size; near the anchor it costs no digits.
        rate_BTG = jax.lax.rsqrt(statistics.variance + self.epsilon)
        y_BTD = (x_BTGF * rate_BTG[..., None] - (statistics.mean * rate_BTG)[..., None]).reshape(x_BTD.shape)
        y_BTD = y_BTD * (use(self.weight, y_BTD.dtype) + 1)[None, None] + use(self.bias, y_BTD.dtype)[None, None]
        if valid_BT is not None:
            y_BTD = jnp.where(valid_BT[..., None], y_BTD, 0)
        return y_BTD.astype(x_BTD.dtype), _advance(current, anchor_BG, jax.tree.map(lambda x: x[:, -1:], seen))

    def summarise(self, x_BTD: jax.Array, starts_BT: jax.Array, valid_BT: jax.Array | None = None) -> Shard:
        """What later shards need of this one, where a sequence is split over devices; T is 1 or more, arguments as in `__call__`."""
        document_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        anchor_BG = jax.lax.stop_gradient(_first_mean(x_BTD, self.groups, valid_BT))
        last = _total(_relative(x_BTD, anchor_BG, valid_BT)[1], document_BT == document_BT[:, -1:])
        return Shard(last._replace(mean=jnp.where(last.count > 0, last.mean + anchor_BG[:, None], 0)), document_BT[:, -1:] > 0)

    def state_before(self, index: jax.Array | int, state: TimestepNormState, shards: Shard) -> TimestepNormState:
        """The state that shard `index` starts from: what reading the earlier shards in order would give.

        Args:
          index: the shard's place, 0 to S; may be traced (`jax.lax.axis_index`). S gives the state after the sequence.
          state: what was read before the first shard.
          shards: all S, joined on axis 1 (`jax.lax.all_gather(..., axis=1, tiled=True)`).
        """
        B, S = shards.restarted_BT.shape
        earlier_1S = jnp.arange(S, dtype=jnp.int32)[None] < index
        document_BS = jnp.cumsum(shards.restarted_BT & earlier_1S, axis=1, dtype=jnp.int32)
        current = _where(document_BS[:, -1] > 0, self.init_state(B, state.mean_BG.dtype), state)
        seen = _total(shards.moments, earlier_1S & (document_BS == document_BS[:, -1:]))
        return _advance(current, current.mean_BG, seen._replace(mean=seen.mean - current.mean_BG[:, None]))


def _first_mean(x_BTD: jax.Array, groups: int, valid_BT: jax.Array | None) -> jax.Array:
    """Mean [B, G] of the first token that is not padding."""
    first_BD = x_BTD[:, 0] if valid_BT is None else jnp.take_along_axis(x_BTD, jnp.argmax(valid_BT, axis=1)[:, None, None], axis=1)[:, 0]
    return jnp.mean(first_BD.astype(at_least_float32(x_BTD.dtype)).reshape(x_BTD.shape[0], groups, -1), axis=-1)


def _relative(x_BTD: jax.Array, anchor_BG: jax.Array, valid_BT: jax.Array | None) -> tuple[jax.Array, Moments]:
    """x_BTGF relative to the anchor, 0 where it is padding, and each token's own moments."""
    x_BTGF = x_BTD.astype(anchor_BG.dtype).reshape(*x_BTD.shape[:2], anchor_BG.shape[1], -1) - anchor_BG[:, None, :, None]
    count_BT1 = jnp.ones((*x_BTD.shape[:2], 1), anchor_BG.dtype)
    if valid_BT is not None:
        x_BTGF = jnp.where(valid_BT[..., None, None], x_BTGF, 0)
        count_BT1 = valid_BT[..., None].astype(anchor_BG.dtype)
    mean_BTG = jnp.mean(x_BTGF, axis=-1)
    # The gradient through this mean is 0, because deviations sum to 0; saying so saves a pass.
    deviation_BTGF = x_BTGF - jax.lax.stop_gradient(mean_BTG)[..., None]
    return x_BTGF, Moments(count_BT1, mean_BTG, jnp.mean(jnp.square(deviation_BTGF), axis=-1))


def _moments(state: TimestepNormState, anchor_BG: jax.Array) -> Moments:
    """The state relative to the anchor, T = 1. The variance's residual is below the variance's last digit."""
    count_B11 = state.count_B.astype(anchor_BG.dtype)[:, None, None]
    mean_BG = state.mean_BG - anchor_BG + state.mean_residual_BG
    return Moments(count_B11, *(jnp.where(count_B11 > 0, x_BG[:, None], 0) for x_BG in (mean_BG, state.variance_BG)))


def _increments(a: Moments, b: Moments) -> tuple[jax.Array, jax.Array]:
    """What b adds to a's mean and variance. Unlike weighted averages this keeps the digits of small changes."""
    share = b.count / jnp.maximum(a.count + b.count, 1)
    apart = b.mean - a.mean
    return share * apart, share * (b.variance - a.variance + (1 - share) * apart * apart)


def _merge(a: Moments, b: Moments) -> Moments:
    mean, variance = _increments(a, b)
    return Moments(a.count + b.count, a.mean + mean, a.variance + variance)


def _total(elements: Moments, kept_BT: jax.Array) -> Moments:
    """The merger of those of T elements that are kept, T = 1."""
    weight_BT1 = jnp.where(kept_BT[..., None], elements.count, 0)
    count_B11 = jnp.sum(weight_BT1, axis=1, keepdims=True)
    average = lambda x_BTG: jnp.sum(weight_BT1 * x_BTG, axis=1, keepdims=True) / jnp.maximum(count_B11, 1)
    mean_B1G = average(elements.mean)
    return Moments(count_B11, mean_B1G, average(elements.variance + jnp.square(elements.mean - mean_B1G)))


def _prefixes(elements: Moments, document_BT: jax.Array | None, block: int) -> Moments:
    """For each element the merger of its document up to and including it; documents are numbered in order, None is a single one."""
    B, T, _ = elements.mean.shape
    C = min(block, T)
    N = -(-T // C)
    fill = N * C - T
    count, mean, variance = (jnp.pad(x, ((0, 0), (0, fill), (0, 0))).reshape(B, N, C, -1) for x in elements)
    mix, pairs = jnp.tril(jnp.ones((C, C), mean.dtype)), "ts,bnsg->bntg"
    # Sums are around the first mean of the document in the block: then rounding is small against the variance of even the shortest prefix.
    anchor = mean[:, :, :1]
    if document_BT is not None:
        document_BNC = jnp.pad(document_BT, ((0, 0), (0, fill)), mode="edge").reshape(B, N, C)
        to_BNC1, from_BN1C = document_BNC[..., None], document_BNC[:, :, None]
        mix, pairs = jnp.where(from_BN1C == to_BNC1, mix[None, None], 0), "bnts,bnsg->bntg"
        anchor = jnp.take_along_axis(mean, jnp.sum(from_BN1C < to_BNC1, axis=-1, keepdims=True), axis=2)
    sums = lambda x_BNCG: jnp.einsum(pairs, mix, x_BNCG, precision=jax.lax.Precision.HIGHEST)
    anchor = jax.lax.stop_gradient(anchor)
    seen = sums(count)
    offset = sums(count * (mean - anchor)) / jnp.maximum(seen, 1)
    square = sums(count * (variance + jnp.square(mean - anchor))) / jnp.maximum(seen, 1)
    inside = Moments(seen, anchor + offset, square - offset * offset)
    if N > 1:
        last_BN = None if document_BT is None else document_BNC[:, :, -1]
        through = _prefixes(jax.tree.map(lambda x: x[:, :, -1], inside), last_BN, block)
        before = jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))[:, :, None], through)
        if document_BT is not None:
            continues_BNC = document_BNC == jnp.pad(last_BN[:, :-1], ((0, 0), (1, 0)))[..., None]
            before = _where(continues_BNC, before, jax.tree.map(jnp.zeros_like, before))
        inside = _merge(before, inside)
    return jax.tree.map(lambda x: x.reshape(B, N * C, -1)[:, :T], inside)


def _advance(state: TimestepNormState, anchor_BG: jax.Array, seen: Moments) -> TimestepNormState:
    """The state after more of its document, T = 1, relative to the anchor."""
    before = _moments(state, anchor_BG)
    mean_B1G, variance_B1G = _increments(before, seen)
    count_B = state.count_B + seen.count[:, 0, 0].astype(jnp.int32)
    mean_BG, mean_residual_BG = _two_sum(anchor_BG, (before.mean + mean_B1G)[:, 0])
    variance_BG, variance_residual_BG = _two_sum(before.variance[:, 0], state.variance_residual_BG + variance_B1G[:, 0])
    return _where(count_B > 0, TimestepNormState(count_B, mean_BG, variance_BG, mean_residual_BG, variance_residual_BG), state)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b rounded, and what rounding lost, exactly (Knuth)."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


def _where(condition: jax.Array, a, b):
    """jnp.where for trees of arrays that begin with the condition's axes."""
    return jax.tree.map(lambda x, y: jnp.where(jnp.expand_dims(condition, range(condition.ndim, x.ndim)), x, y), a, b)
