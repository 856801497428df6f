"""The compressive memory on a sequence whose tokens are split over the mesh's `context` axis, the same function as on one device.

Shape letters: B batch, T time (tokens in this call, or of one shard), N segments that a shard touches, C columns of a segment, H query
heads, G key/value heads, K key size, U value size, W shards, X columns of a unit.

What is held after a shard, and the part of it that its open segment has written, are linear in the two before it. Each device works out
how, they exchange that, and each then knows what its tokens find. It is done twice per layer: for the normalizer, then for the matrix,
whose delta rule needs the normalizer. Per row, layer and shard that is 8 G K (U + 3 + 2 X) bytes, X = 1 by the linear rule and K by the
delta rule. Borders of shards may lie within segments and documents.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from infinicontext.nn import compressive_memory
from infinicontext.nn.attention import lay, unlay
from infinicontext.nn.compressive_memory import Memory, Owner, Segments, Update
from infinicontext.nn.context import AXIS
from infinicontext.nn.cursor import Place


def segments(place: Place, owner: Owner, document_B: jax.Array, segment: int, shards: int, **options) -> tuple[Segments, Owner]:
    """`compressive_memory.segments` for each of W shards, on a leading axis, and the owner after all tokens."""

    def one_shard(carry, place):
        owner, document_B = carry
        of_shard, owner = compressive_memory.segments(place, owner, document_B, segment, within=False, **options)
        return (owner, jnp.maximum(document_B, jnp.max(place.document_BT, axis=1))), of_shard

    by_shard = jax.tree.map(lambda x_BT: jnp.moveaxis(x_BT.reshape(x_BT.shape[0], shards, -1), 1, 0), place)
    (owner, _), segments_W = jax.lax.scan(one_shard, (owner, document_B), by_shard)
    return segments_W, owner


def recall(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGU: jax.Array,
    place: Place,
    memory: Memory,
    segments_W: Segments,
    segment: int,
    *,
    update: Update,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, Memory]:
    """`compressive_memory.recall` of tokens that are not laid out.

    Args:
      q_BTHK: queries without positions.
      k_BTGK: keys without positions.
      v_BTGU: values.
      place: where the tokens stand in their rows.
      memory: before the call.
      segments_W: from `segments`.
      segment: tokens per segment.
      update: as in `compressive_memory.recall`.
      epsilon: likewise.

    Returns:
      recalled_BTHU, which tokens may read as bool [B, T], and the memory after the call.
    """

    def one_shard(tokens, segments_1, memory):
        (q_BTHK, k_BTGK, v_BTGU, place), T = tokens, tokens[0].shape[1]
        held_B = place.index_BT[:, 0] % segment
        laid = (lay(x_BT, held_B, segment) for x_BT in (q_BTHK, k_BTGK, v_BTGU))
        own = jax.tree.map(lambda x: x[0], segments_1)
        recalled, memory = compressive_memory.recall(*laid, memory, own, update=update, epsilon=epsilon, arrive=_arrive)
        return unlay(recalled, held_B, T), unlay(own.reads_NBC, held_B, T), memory

    in_specs, out_specs = (P(None, AXIS), P(AXIS), P()), (P(None, AXIS), P(None, AXIS), P())
    in_shards = jax.shard_map(one_shard, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS})
    return in_shards((q_BTHK, k_BTGK, v_BTGU, place), segments_W, memory)


def _arrive(step, before, xs):
    """What is held, and open, before the call -> before this shard, and after all."""
    (held_BGKU, _), (own, written_NBGKU, overlap_NBGKK) = before, xs
    (B, G, K, U), dtype = held_BGKU.shape, held_BGKU.dtype
    unit_KX = jnp.ones((K, 1), dtype) if overlap_NBGKK is None else jnp.eye(K, dtype=dtype)
    zero_KX = jnp.zeros_like(unit_KX)

    # Read from nothing, and beside that from a unit held and from a unit open.
    X = unit_KX.shape[1]

    def from_nothing(*units):
        return jnp.broadcast_to(jnp.concatenate([jnp.zeros((K, U), dtype), *units], axis=1), (B, G, K, U + 2 * X))

    start = jax.lax.pcast((from_nothing(unit_KX, zero_KX), from_nothing(zero_KX, unit_KX)), AXIS, to="varying")
    padded = jnp.pad(written_NBGKU, [(0, 0)] * 4 + [(0, 2 * X)])
    end, _ = jax.lax.scan(step, start, (own, padded, overlap_NBGKK))
    ends = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, to="invarying"), (end, jnp.any(own.detaches_NB, axis=0)))

    def through(part_BGKX, held_BGKU, open_BGKU):
        new_BGKU, of_held, of_open = jnp.split(part_BGKX, [U, U + X], axis=-1)
        if overlap_NBGKK is None:
            return new_BGKU + of_held * held_BGKU + of_open * open_BGKU
        product = functools.partial(jnp.einsum, "bgkl,bglu->bgku", precision=jax.lax.Precision.HIGHEST)
        return new_BGKU + product(of_held, held_BGKU) + product(of_open, open_BGKU)

    def next_shard(before, shard):
        parts, detached_B = shard
        stopped = jax.tree.map(lambda x: jnp.where(detached_B[:, None, None, None], jax.lax.stop_gradient(x), x), before)
        return tuple(through(part, *stopped) for part in parts), before

    after, before_W = jax.lax.scan(next_shard, before, ends)
    return jax.tree.map(lambda x: x[jax.lax.axis_index(AXIS)], before_W), after
