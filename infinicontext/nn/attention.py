"""Softmax attention with a cache: over everything read, or over a window.

Shape letters: B batch, T time (queries of this call), S cache slots or keys, H query heads, G key/value heads, R = H / G query heads per
key/value head, K head size (values may have another), C queries per block or tokens per chunk, N blocks.

Which keys a token sees is decided by what the slots hold, never by where they are: a slot knows the document and the position of its key,
so that rings, packed documents and rows of unequal length need no masks of their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from infinicontext.nn.cursor import Place
from infinicontext.nn.parameters import at_least_float32

# (query position, key position) -> may be seen, for a key of the same document that is not in the query's future.
Reach = Callable[[jax.Array, jax.Array], jax.Array]


class Slots(NamedTuple):
    """What each slot of a cache holds, the same for all layers: 8 bytes per slot and row."""

    position_BS: jax.Array  # int32, position of the key within its document
    document_BS: jax.Array  # int32, the document; 0 for an empty slot


class Cache(NamedTuple):
    """Rotated keys and values of one layer, or of all with a leading layer axis."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array


class Dropout(NamedTuple):
    """Of attention weights: `dropkey` hides keys before the softmax (Li et al. 2023), `post_softmax` zeroes and rescales weights."""

    key: jax.Array
    rate: float
    mode: Literal["post_softmax", "dropkey"]


def everything() -> Reach:
    """Full causal attention."""
    return lambda q, k: jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)


def sliding(window: int) -> Reach:
    """The last `window` tokens, the token itself included (Beltagy et al. 2020; Mistral)."""
    return lambda q, k: q - k < window


def block_sliding(block: int, memory_blocks: int) -> Reach:
    """The token's own block and the m = `memory_blocks` before it: m * block + 1 to (m + 1) * block keys (TransformerFAM, section 2.1)."""
    return lambda q, k: q // block - k // block <= memory_blocks


def empty_slots(batch_size: int, count: int) -> Slots:
    """Slots that hold nothing."""
    zeros_BS = jnp.zeros((batch_size, count), jnp.int32)
    return Slots(zeros_BS, zeros_BS)


def slot_index(place: Place, count: int, *, ring: bool) -> jax.Array:
    """The slot each token is written to, int32 [B, T].

    It is `count`, which is no slot, for padding, for what does not fit, and for what a later token of the call would overwrite in the ring.
    """
    index_BT, valid_BT = place.index_BT, place.document_BT > 0
    if not ring:
        return jnp.where(valid_BT, jnp.minimum(index_BT, count), count)
    later_BT = jnp.sum(valid_BT, axis=1, keepdims=True, dtype=jnp.int32) - jnp.arange(index_BT.shape[1], dtype=jnp.int32)[None]
    return jnp.where(valid_BT & (later_BT <= count), index_BT % count, count)


def write(slots_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Puts new [B, T, ...] into slots [B, S, ...] at slot_BT; index S is dropped."""
    rows_B1 = jnp.arange(slots_BS.shape[0], dtype=jnp.int32)[:, None]
    return slots_BS.at[rows_B1, slot_BT].set(new_BT, mode="drop")


def write_layers(cache_LBS: Cache, new_LBT: Cache, slot_BT: jax.Array) -> Cache:
    """`write` for the caches of all layers at once: what a call adds is all that moves, where the old cache is not needed any more."""
    rows_B1 = jnp.arange(slot_BT.shape[0], dtype=jnp.int32)[:, None]
    return Cache(*(held.at[:, rows_B1, slot_BT].set(new, mode="drop") for held, new in zip(cache_LBS, new_LBT)))


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v over the keys that are seen; logits and softmax in float32 or wider.

    Query head h reads key/value head h // R. A query that sees nothing (padding) gives a finite value of no meaning.

    Args:
      q_BTHK: rotated queries.
      k_BSGK: rotated keys.
      v_BSGK: values.
      seen_BTS: bool, the keys each query sees.
      scale: of the logits; None: 1 / sqrt(K).
      dropout: None for evaluation. A query whose keys DropKey has all hidden gives 0.

    Returns:
      o_BTHK in q's dtype.
    """
    chex.assert_rank([q_BTHK, k_BSGK, v_BSGK, seen_BTS], [4, 4, 4, 3])
    heads_first = (jnp.moveaxis(x, 2, 1) for x in (q_BTHK, k_BSGK, v_BSGK))
    return jnp.moveaxis(_attend(*heads_first, seen_BTS, scale=scale, dropout=dropout), 1, 2)


def _attend(q_BHTK, k_BGSK, v_BGSK, seen_BTS, *, scale: float | None, dropout: Dropout | None) -> jax.Array:
    """`attend` with heads before tokens, as products need them: o_BHTK."""
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    wide = at_least_float32(q_BHTK.dtype)
    q_BGRTK = q_BHTK.reshape(B, G, H // G, T, K)
    logits_BGRTS = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=wide)
    logits_BGRTS = logits_BGRTS * jnp.asarray(K**-0.5 if scale is None else scale, wide)
    logits_BGRTS = jnp.where(seen_BTS[:, None, None], logits_BGRTS, jnp.finfo(wide).min)
    if dropout is not None:
        kept_BGRTS = jax.random.bernoulli(dropout.key, 1 - dropout.rate, logits_BGRTS.shape) & seen_BTS[:, None, None]
        if dropout.mode == "dropkey":
            logits_BGRTS = jnp.where(kept_BGRTS, logits_BGRTS, jnp.finfo(wide).min)
    # Dividing the K sums at the end instead of the S weights saves a pass over the largest array.
    weights_BGRTS = jnp.exp(logits_BGRTS - jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1, keepdims=True)))
    total_BGRT1 = jnp.sum(weights_BGRTS, axis=-1, keepdims=True)
    if dropout is not None:
        weights_BGRTS = jnp.where(kept_BGRTS, weights_BGRTS if dropout.mode == "dropkey" else weights_BGRTS / (1 - dropout.rate), 0)
    o_BGRTK = jnp.einsum("bgrts,bgsk->bgrtk", weights_BGRTS.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=wide)
    return (o_BGRTK / total_BGRT1).reshape(B, H, T, -1).astype(q_BHTK.dtype)


def attend_parts(
    q_BTHK: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]], *, scale: float | None = None, block: int | None = None
) -> jax.Array:
    """`attend` over keys that lie in several arrays, which are not copied into one.

    Args:
      q_BTHK: rotated queries.
      parts: k_BSGK, v_BSGK and seen_BTS of each array; S may be 0.
      scale: as in `attend`.
      block: queries at a time; None chooses.

    Returns:
      o_BTHK in q's dtype.
    """
    (B, T, H, K), wide = q_BTHK.shape, at_least_float32(q_BTHK.dtype)
    parts = [part for part in parts if part[0].shape[1]]
    block = _default_block() if block is None else block
    G = parts[0][0].shape[2]
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    keys = [(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)) for k, v, _ in parts]

    def one_block(q_BCHK, seen):
        q_BGRCK = jnp.moveaxis(q_BCHK, 2, 1).reshape(B, G, H // G, -1, K)
        logits = [product("bgrck,bgsk->bgrcs", q_BGRCK, k_BGSK) for k_BGSK, _ in keys]
        factor = jnp.asarray(K**-0.5 if scale is None else scale, wide)
        logits = [jnp.where(seen_BCS[:, None, None], x * factor, jnp.finfo(wide).min) for x, seen_BCS in zip(logits, seen)]
        highest_BGRC1 = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in logits))
        weights = [jnp.exp(x - jax.lax.stop_gradient(highest_BGRC1)) for x in logits]
        total_BGRC1 = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
        o_BGRCK = sum(product("bgrcs,bgsk->bgrck", x.astype(v.dtype), v) for x, (_, v) in zip(weights, keys))
        return jnp.moveaxis((o_BGRCK / total_BGRC1).reshape(B, H, -1, K), 1, 2).astype(q_BCHK.dtype)

    seen = tuple(part[2] for part in parts)
    if block >= T:
        return one_block(q_BTHK, seen)
    return _join(jax.lax.map(lambda xs: jax.checkpoint(one_block)(*xs), (_split(q_BTHK, block), _split(seen, block))), T)


def attend_one(
    q_B1HK: jax.Array, k_B1GK: jax.Array, v_B1GK: jax.Array, cache: Cache, seen_B1S: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """One token's attention over a cache that does not hold its own key yet, and over itself: decoding.

    All heads are one product with the cache as it lies: a block-diagonal matrix holds the queries, and of the values only those of the same
    head are taken. That multiplies G times as much as needed and still saves time, because a product per head would lay the cache out anew
    (4,096 slots of 4 heads of 64 on 2 loaded CPU cores: 0.45 ms instead of 1.1; as a multiplication and a sum 13.6).

    Args:
      q_B1HK: rotated query.
      k_B1GK: its own rotated key.
      v_B1GK: its own value.
      cache: the keys and values before it.
      seen_B1S: bool, the slots it sees.
      scale: as in `attend`.

    Returns:
      o_B1HK in q's dtype.
    """
    (B, _, H, K), (G, U) = q_B1HK.shape, v_B1GK.shape[2:]
    wide = at_least_float32(q_B1HK.dtype)
    same_GG = jnp.eye(G, dtype=q_B1HK.dtype)
    q_BXH = jnp.einsum("bgrk,gh->bhkgr", q_B1HK.reshape(B, G, H // G, K), same_GG).reshape(B, G * K, H)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    flat = lambda x_BSGK: x_BSGK.reshape(B, x_BSGK.shape[1], -1)
    score = lambda k_BSGK: product("bsx,bxh->bsh", flat(k_BSGK), q_BXH) * jnp.asarray(K**-0.5 if scale is None else scale, wide)
    old_BSH = jnp.where(seen_B1S[:, 0, :, None], score(cache.k_BSGK), jnp.finfo(wide).min)
    weight_BSH = jax.nn.softmax(jnp.concatenate([old_BSH, score(k_B1GK)], axis=1), axis=1).astype(v_B1GK.dtype)
    o_BHX = product("bsh,bsx->bhx", weight_BSH[:, :-1], flat(cache.v_BSGK)) + product("bsh,bsx->bhx", weight_BSH[:, -1:], flat(v_B1GK))
    o_BGRU = product("bgrhu,gh->bgru", o_BHX.reshape(B, G, H // G, G, U), same_GG.astype(wide))
    return o_BGRU.reshape(B, 1, H, U).astype(q_B1HK.dtype)


def visible(position_BT: jax.Array, document_BT: jax.Array, slots: Slots, reach: Reach) -> jax.Array:
    """Which slots each token sees, bool [B, T, S]: same document, not in the future, within reach."""
    q_BT1, k_B1S = position_BT[:, :, None], slots.position_BS[:, None]
    same_BTS = (document_BT[:, :, None] == slots.document_BS[:, None]) & (slots.document_BS[:, None] > 0)
    return same_BTS & (k_B1S <= q_BT1) & reach(q_BT1, k_B1S)


def full_attention(q_BTHK: jax.Array, cache: Cache, place: Place, slots: Slots, *, block: int | None = None) -> jax.Array:
    """Attention over a cache that already holds the call's own keys.

    Queries go in blocks whose scores are recomputed in the backward pass, so that memory grows with block * S instead of T * S.

    Returns:
      o_BTHK in q's dtype.
    """

    def one_block(xs):
        q_BCHK, position_BC, document_BC = xs
        return attend(q_BCHK, cache.k_BSGK, cache.v_BSGK, visible(position_BC, document_BC, slots, everything()))

    queries = (q_BTHK, place.position_BT, place.document_BT)
    block = _default_block() if block is None else block
    if q_BTHK.shape[1] <= block:
        return one_block(queries)
    return _join(jax.lax.map(jax.checkpoint(one_block), _split(queries, block)), q_BTHK.shape[1])


def row_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    valid_BT: jax.Array,
    *,
    block: int | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention of every token to all valid tokens of its row, before and after it; blocks of queries as in `full_attention`.

    Args:
      q_BTHK: rotated queries.
      k_BTGK: rotated keys of the same tokens.
      v_BTGK: their values.
      valid_BT: bool, False for padding.
      block: queries per block; None chooses.
      scale: as in `attend`.
      dropout: as in `attend`.

    Returns:
      o_BTHK in q's dtype.
    """
    (B, T), block = valid_BT.shape, _default_block() if block is None else block

    def one_block(q_BCHK, number=0):
        seen_BCT = jnp.broadcast_to(valid_BT[:, None], (B, q_BCHK.shape[1], T))
        return attend(q_BCHK, k_BTGK, v_BTGK, seen_BCT, scale=scale, dropout=_numbered(dropout, number))

    if block >= T:
        return one_block(q_BTHK)
    numbers_N = jnp.arange(-(-T // block), dtype=jnp.int32)
    return _join(jax.lax.map(jax.checkpoint(lambda xs: one_block(*xs)), (_split(q_BTHK, block), numbers_N)), T)


def window_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    place: Place,
    ring: Cache,
    slots: Slots,
    reach: Reach,
    *,
    block: int | None = None,
    fold: bool | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention over a window: T tokens see one another and the ring of the S tokens before them, each as far as `reach` allows.

    Work is T * (S + block), never T * T. Blocks of queries are either scanned, carrying the S keys before them, or folded into the batch.
    On 2 CPU cores, at T = 4096 and S = 512, the scan was 2.5 times as fast forward and twice as fast with gradients; folding fills an
    accelerator.

    Args:
      q_BTHK: rotated queries.
      k_BTGK: rotated keys of the same tokens.
      v_BTGK: their values.
      place: where the tokens stand.
      ring: the cache before this call; token number i of a row lies in slot i % S.
      slots: what the ring holds before this call.
      reach: `sliding` or `block_sliding`; must not reach more than S tokens back, the token itself included.
      block: queries per block; None chooses at most S.
      fold: fold blocks into the batch instead of scanning them; None folds except on CPU.
      scale: as in `attend`.
      dropout: as in `attend`.

    Returns:
      o_BTHK in q's dtype.
    """
    T, S = q_BTHK.shape[1], slots.position_BS.shape[1]
    block = min(T, S, _default_block()) if block is None else min(T, block)
    fold = jax.default_backend() != "cpu" if fold is None else fold

    # Oldest first, so that keys leave the window from the left: column j holds token number index_B0 - S + j.
    order_BS = (place.index_BT[:, :1] + jnp.arange(S, dtype=jnp.int32)[None]) % S
    before = jax.tree.map(lambda x: jnp.take_along_axis(x, order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2)), axis=1), (ring, slots))
    new = (Cache(k_BTGK, v_BTGK), Slots(place.position_BT, place.document_BT))
    queries = (q_BTHK, place.position_BT, place.document_BT)

    def one_block(queries, keys, number=0):
        (q_BCHK, position_BC, document_BC), (cache, slots) = queries, keys
        seen_BCS = visible(position_BC, document_BC, slots, reach)
        return attend(q_BCHK, cache.k_BSGK, cache.v_BSGK, seen_BCS, scale=scale, dropout=_numbered(dropout, number))

    if block >= T:
        return one_block(queries, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, new))

    numbers_N = jnp.arange(-(-T // block), dtype=jnp.int32)

    if fold:
        # Block n sees columns n * C to n * C + S + C of all keys in order.
        columns_NW = jnp.arange(0, T, block)[:, None] + jnp.arange(S + block)[None]
        windows = jax.tree.map(lambda a, b: _windows(jnp.concatenate([a, b], axis=1), columns_NW), before, new)
        return _join(jax.vmap(one_block)(_split(queries, block), windows, numbers_N), T)

    @jax.checkpoint
    def step(before, xs):
        queries, new, number = xs
        keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, new)
        return jax.tree.map(lambda x: x[:, block:], keys), one_block(queries, keys, number)

    return _join(jax.lax.scan(step, before, (_split(queries, block), _split(new, block), numbers_N))[1], T)


def chunk_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    cache: Cache,
    held_B: jax.Array | None,
    *,
    fold: bool | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention within chunks of C tokens that go on where each row stands, all chunks at once: work is (T + C) * C.

    The new tokens are laid behind the cached ones of the unfinished chunk. What follows a row's last token is filling that none sees.

    Args:
      q_BTHK: rotated queries.
      k_BTGK: rotated keys of the same tokens.
      v_BTGK: their values.
      cache: C slots, of which row b's first held_B[b] have the keys and values of its unfinished chunk.
      held_B: int32, fewer than C; None: 0 in all rows, which saves the laying out.
      fold: all chunks at once instead of one after the other; None: except on CPU where the scores of all chunks are large.
      scale: as in `attend`.
      dropout: as in `attend`.

    Returns:
      o_BTHK in q's dtype.
    """
    T, C = q_BTHK.shape[1], cache.k_BSGK.shape[1]
    chunks = (lay(q_BTHK, held_B, C), lay(k_BTGK, held_B, C, cache.k_BSGK), lay(v_BTGK, held_B, C, cache.v_BSGK))
    return unlay(attend_chunks(*chunks, fold=fold, scale=scale, dropout=dropout), held_B, T)


def attend_chunks(
    q_NBCHK: jax.Array,
    k_NBSGK: jax.Array,
    v_NBSGK: jax.Array,
    documents: tuple[jax.Array, jax.Array] | None = None,
    *,
    first_seen_NBCP: jax.Array | None = None,
    block: int | None = None,
    fold: bool | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Causal attention within chunks that have been laid out, in blocks of queries that leave out the keys behind them.

    On 2 CPU cores 4,096 tokens in chunks of 512 (4 heads of 64) took 14 ms in blocks of 128 and 17 ms in whole chunks.

    Args:
      q_NBCHK: rotated queries.
      k_NBSGK: rotated keys; the last C of S are the chunk's own, those before them all the queries of the chunk may see.
      v_NBSGK: values.
      documents: int32 [N, B, C] of queries and [N, B, S] of keys, which are seen by queries of the same only; None: by all.
      first_seen_NBCP: bool, whether each query sees each of the first P keys, which then have no documents: those are [N, B, S - P].
      block: queries per block; None chooses.
      fold: as in `chunk_attention`.
      scale: as in `attend`.
      dropout: as in `attend`.

    Returns:
      o_NBCHK in q's dtype.
    """
    (N, B, C, H, _), S = q_NBCHK.shape, k_NBSGK.shape[2]
    # Large scores are computed again in the backward pass, and on CPU they stay near the caches if there is one chunk of them at a time.
    large = 4 * N * B * C * S * H > 2**24
    fold = jax.default_backend() != "cpu" or not large if fold is None else fold
    block = _default_block() if block is None else block
    causal_1CS = jnp.tril(jnp.ones((C, S), bool), S - C)[None]
    starts = range(0, C, block)

    def one_chunk(xs):
        q_BCHK, k_BSGK, v_BSGK, documents, first_BCP, number = xs
        q_BHCK, k_BGSK, v_BGSK = (jnp.moveaxis(x, 2, 1) for x in (q_BCHK, k_BSGK, v_BSGK))
        seen_BCS = jnp.broadcast_to(causal_1CS, (B, C, S))
        if documents is not None:
            same_BCS = documents[0][:, :, None] == documents[1][:, None]
            seen_BCS &= same_BCS if first_BCP is None else jnp.concatenate([first_BCP, same_BCS], axis=2)

        def one_block(i, start):
            rows, keys = slice(start, start + block), slice(min(start + block, C) + S - C)
            numbered = _numbered(dropout, number * len(starts) + i)
            seen_BQS = seen_BCS[:, rows, keys]
            return _attend(q_BHCK[:, :, rows], k_BGSK[:, :, keys], v_BGSK[:, :, keys], seen_BQS, scale=scale, dropout=numbered)

        return jnp.moveaxis(jnp.concatenate([one_block(i, start) for i, start in enumerate(starts)], axis=2), 1, 2)

    xs = (q_NBCHK, k_NBSGK, v_NBSGK, documents, first_seen_NBCP, jnp.arange(N, dtype=jnp.int32))
    if fold:
        return jax.vmap(jax.checkpoint(one_chunk) if large else one_chunk)(xs)
    return jax.lax.map(jax.checkpoint(one_chunk), xs)


def lay(x_BT: jax.Array, held_B: jax.Array | None, chunk: int, before_BC: jax.Array | None = None) -> jax.Array:
    """Tokens in chunks of C columns, row b's behind held_B[b] < C earlier ones, or None anywhere: [B, T, ...] -> [N, B, C, ...].

    So chunks are the same columns in all rows, wherever the rows stand. Before and behind the tokens are zeros or, in the first chunk, what
    `before_BC` holds.
    """
    if held_B is None:
        return _split(x_BT, chunk)
    T = x_BT.shape[1]
    fill = -(-(chunk - 1 + T) // chunk) * chunk - chunk
    if before_BC is None:
        before_BC = jnp.zeros((x_BT.shape[0], chunk, *x_BT.shape[2:]), x_BT.dtype)
    columns_BS = jnp.pad(before_BC, [(0, 0), (0, fill)] + [(0, 0)] * (x_BT.ndim - 2))
    put = lambda columns_S, x_T, start: jax.lax.dynamic_update_slice_in_dim(columns_S, x_T, start, axis=0)
    return _split(jax.vmap(put)(columns_BS, x_BT, held_B), chunk)


def unlay(x_NBC: jax.Array, held_B: jax.Array | None, length: int) -> jax.Array:
    """The T tokens that `lay` has laid: [N, B, C, ...] -> [B, T, ...]."""
    if held_B is None:
        return _join(x_NBC, length)
    columns_BS = _join(x_NBC, x_NBC.shape[0] * x_NBC.shape[2])
    return jax.vmap(lambda x_S, start: jax.lax.dynamic_slice_in_dim(x_S, start, length, axis=0))(columns_BS, held_B)


def _numbered(dropout: Dropout | None, number: jax.Array | int) -> Dropout | None:
    """With a key of its own for each block."""
    return None if dropout is None else dropout._replace(key=jax.random.fold_in(dropout.key, number))


def _default_block() -> int:
    """On 2 CPU cores blocks of 128 were up to 1.3 times as fast as 32 and 2.5 times as fast as 512: their scores stay near the caches."""
    return 128 if jax.default_backend() == "cpu" else 512


def _split(tree, block: int):
    """[B, T, ...] -> [N, B, C, ...]; the last block is filled with zeros, which are padding by their segment id."""

    def one(x):
        B, T = x.shape[:2]
        blocks = -(-T // block)
        x = jnp.pad(x, [(0, 0), (0, blocks * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, blocks, block, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def _join(x_NBC: jax.Array, length: int) -> jax.Array:
    """[N, B, C, ...] -> [B, T, ...], the filling cut off."""
    N, B, C = x_NBC.shape[:3]
    return jnp.moveaxis(x_NBC, 0, 1).reshape(B, N * C, *x_NBC.shape[3:])[:, :length]


def _windows(x_BS: jax.Array, columns_NW: jax.Array) -> jax.Array:
    """[B, S + T, ...] -> [N, B, W, ...]: the columns of each window, zeros beyond the end."""
    return jnp.moveaxis(jnp.take(x_BS, columns_NW, axis=1, mode="fill", fill_value=0), 1, 0)
