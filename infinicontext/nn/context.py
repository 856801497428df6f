"""MEGALODON's parts on a sequence whose tokens are split over the mesh's `context` axis, each the same function as on one device.

Shape letters: B batch, T time (tokens in this call, or of one shard), D channels, N order of the moving average, G norm groups, H heads,
K query and key size, U value size, C slots of the cache, W shards.

Left to itself the compiler gathers the whole sequence for anything that runs along it. Here each device reads its own tokens, and what it
lacks of those before is small: the end states of the other shards, W (8 D N + 5 + 8 G) bytes per row and layer, which are gathered, and the
keys and values of the C tokens before its first, which its neighbour sends. Only `context` is manual; how batch, channels and heads are
split is left to the compiler.

Where the mesh has no context axis of more than 1, or it does not divide T (decoding), these are the plain calls.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from infinicontext.nn.attention import Cache, Dropout, Slots
from infinicontext.nn.cema import CEMA, CemaState, Tables, add_incoming, context_states
from infinicontext.nn.cursor import Place
from infinicontext.nn.parameters import at_least_float32
from infinicontext.nn.timestep_norm import TimestepNorm, TimestepNormState

AXIS = "context"


def shard_count(length: int) -> int:
    """Into how many shards the mesh splits a sequence; 1: not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else mesh.shape[AXIS]
    return count if length % count == 0 else 1


def timestep_norm(
    norm: TimestepNorm,
    x_BTD: jax.Array,
    state: TimestepNormState,
    starts_BT: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
) -> tuple[jax.Array, TimestepNormState]:
    """`norm(x_BTD, state, starts_BT, valid_BT)`; gathered are the moments of each shard."""
    W = shard_count(x_BTD.shape[1])
    if W == 1:
        return norm(x_BTD, state, starts_BT, valid_BT)

    def one_shard(tokens, norm, state):
        x_BTD, starts_BT, valid_BT = tokens
        marks_BT = jnp.zeros(x_BTD.shape[:2], bool) if starts_BT is None else starts_BT
        shards = _gather(norm.summarise(x_BTD, marks_BT, valid_BT), axis=1, tiled=True)
        y_BTD, _ = norm(x_BTD, norm.state_before(jax.lax.axis_index(AXIS), state, shards), starts_BT, valid_BT)
        return y_BTD, norm.state_before(W, state, shards)

    return _in_shards(one_shard, (P(None, AXIS), P()))((x_BTD, starts_BT, valid_BT), norm, state)


def cema(
    layer: CEMA,
    x_BTD: jax.Array,
    state: CemaState,
    starts_BT: jax.Array | None,
    length_B: jax.Array | None,
    tables: Tables,
) -> tuple[jax.Array, CemaState]:
    """`layer(x_BTD, state, starts_BT, length_B, tables=tables)`; gathered are the end states of shards read from a zero state."""
    W = shard_count(x_BTD.shape[1])
    if W == 1:
        return layer(x_BTD, state, starts_BT, length_B, tables=tables)

    def one_shard(tokens, layer, tables, state, length_B):
        (x_BTD, starts_BT), index = tokens, jax.lax.axis_index(AXIS)
        (B, T, _), own_B, length_WB = x_BTD.shape, None, jnp.full((1, 1), x_BTD.shape[1], jnp.int32)
        if length_B is not None:
            length_WB = jnp.clip(length_B[None] - T * jnp.arange(W, dtype=jnp.int32)[:, None], 0, T)
            own_B = length_WB[index]
        empty = jax.lax.pcast(layer.init_state(B, tables.kernel_DC.dtype), AXIS, to="varying")
        y_BTD, end = layer(x_BTD, empty, starts_BT, own_B, tables=tables)
        ends, cut_WB = _gather((end, None if starts_BT is None else jnp.any(starts_BT, axis=1)))
        states = context_states(tables, state, ends, length_WB, cut_WB)
        before, after = jax.tree.map(lambda h: h[index], states), jax.tree.map(lambda h: h[W], states)
        return add_incoming(tables, y_BTD, before, starts_BT), after

    return _in_shards(one_shard, (P(None, AXIS), P()))((x_BTD, starts_BT), layer, tables, state, length_B)


def attention(
    attend: Callable[..., jax.Array],
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHU: jax.Array,
    place: Place,
    cache: Cache,
    slots: Slots,
    dropout: Dropout | None,
) -> jax.Array:
    """`attend` with the other arguments, for attention that reaches less than C tokens back, wherever chunks and documents begin.

    A shard of C tokens or more needs the last C of the one before and nothing else. With shorter shards the compiler gathers the sequence.
    Dropout of the weights is drawn per shard, so other weights are dropped than on one device.

    Args:
      attend: gives o_BTHU; its parameters are those of this function that follow.
      q_BTHK: rotated queries.
      k_BTHK: rotated keys.
      v_BTHU: values.
      place: where the tokens stand.
      cache: what was read before the call; the token at position p of its document lies in slot p % C.
      slots: what the cache holds.
      dropout: None for evaluation.
    """
    C, T = slots.position_BS.shape[1], q_BTHK.shape[1]
    W = shard_count(T)
    if W == 1 or T // W < C:
        return attend(q_BTHK, k_BTHK, v_BTHU, place, cache, slots, dropout)

    def one_shard(tokens, before, key):
        (q_BTHK, k_BTHK, v_BTHU, place), index = tokens, jax.lax.axis_index(AXIS)
        read = (Cache(k_BTHK, v_BTHU), Slots(place.position_BT, place.document_BT))
        slot_BC = (jnp.arange(C, dtype=jnp.int32)[None] - place.position_BT[:, :1]) % C

        def from_neighbour(x_BT, first_BC):
            last_BC = jax.lax.ppermute(x_BT[:, -C:], AXIS, [(w, w + 1) for w in range(W - 1)])
            last_BC = jnp.take_along_axis(last_BC, slot_BC.reshape(slot_BC.shape + (1,) * (x_BT.ndim - 2)), axis=1)
            return jnp.where(index == 0, first_BC, last_BC.astype(first_BC.dtype)).astype(x_BT.dtype)

        cache, slots = jax.tree.map(from_neighbour, read, before)
        own = None if key is None else dropout._replace(key=jax.random.fold_in(key, index))
        return attend(q_BTHK, k_BTHK, v_BTHU, place, cache, slots, own)

    key = None if dropout is None else dropout.key
    # The cache's gradient is a sum over shards, which XLA for CPU (jaxlib 0.10.2) cannot compile in bfloat16.
    cache = Cache(*(x_BC.astype(at_least_float32(x_BC.dtype)) for x_BC in cache))
    return _in_shards(one_shard, P(None, AXIS))((q_BTHK, k_BTHK, v_BTHU, place), (cache, slots), key)


def _gather(tree, **options):
    """Arrays of all shards; the same on all devices, and known to be, so that what is computed from them may leave the shards whole."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, to="invarying", **options), tree)


def _in_shards(function: Callable, out_specs) -> Callable:
    """The function on each shard of its first argument, whose arrays begin with [B, T]; the others are the same for all shards."""

    def call(tokens, *whole):
        in_specs = (P(None, AXIS), *(P() for _ in whole))
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS})(tokens, *whole)

    return call
