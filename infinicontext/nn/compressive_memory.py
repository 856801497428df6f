"""A memory of constant size that linear attention writes and reads segment by segment: Infini-attention (Munkhdalai et al. 2024,
arXiv 2404.07143 v2, section 3.1).

Shape letters: B batch, T time (tokens in this call), N segments that a call touches, C columns of a segment, H query heads, G key/value
heads, R = H / G query heads per key/value head, K key size, U value size.

The memory is a matrix and a normalizer per key/value head. All tokens of a segment read what the segments before it wrote:
sigma(q) matrix / max(sigma(q) . normalizer, epsilon), with sigma = ELU + 1 (equation 7). What they write themselves, sigma(k) v^T
(equation 8) or, by the delta rule, sigma(k) (v - what k reads)^T (equation 9), is kept apart until their segment is complete. So any split
of a stream is exact, and no keys of the open segment are needed: both rules read nothing but the memory, which stands still until then.

A row's segments are a grid over all its tokens, whatever documents they belong to. The memory is that of one document, its owner: tokens of
another read nothing, and a segment leaves behind only what the document of its last token wrote. So packed documents read as they would
alone, on the same grid.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from infinicontext.nn.attention import lay
from infinicontext.nn.cursor import Place
from infinicontext.nn.parameters import at_least_float32

Update = Literal["linear", "delta"]

# Sums over thousands of tokens: in bfloat16 products a normalizer stops growing after some hundred segments.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Memory(NamedTuple):
    """What one layer remembers, or all with a leading layer axis; float32 or wider: 8 G K (U + 1) bytes per row and layer."""

    matrix_BGKU: jax.Array  # of complete segments
    normalizer_BGK: jax.Array
    open_matrix_BGKU: jax.Array  # what the open segment has written so far
    open_normalizer_BGK: jax.Array


class Owner(NamedTuple):
    """Whose the memory is, the same for all layers: 8 bytes per row."""

    document_B: jax.Array  # int32, the document; 0: of none, the memory is empty
    segments_B: jax.Array  # int32, segments of it that the memory holds; one that it begins inside does not count


class Segments(NamedTuple):
    """What the tokens of a call are to the memory, the same for all layers: [N, B, C], and [N, B] for the segments they lie in."""

    reads_NBC: jax.Array  # bool, the memory is of the token's document
    writes_NBC: jax.Array  # bool, the token is of the document that the segment ends with
    continues_NB: jax.Array  # bool, so is what the segment has written before the call
    keeps_NB: jax.Array  # bool, so is the memory
    counts_NB: jax.Array  # bool, the segment's keys count in the normalizer
    completes_NB: jax.Array  # bool, the segment is complete after the call
    detaches_NB: jax.Array  # bool, no gradient flows back from what comes after the segment
    growth_NB: jax.Array | None  # float32, what the memory is multiplied by after the segment; None: by 1


def empty_memory(batch_size: int, heads: int, key_size: int, value_size: int, dtype: jnp.dtype) -> Memory:
    """The memory before the first token."""
    matrix_BGKU = jnp.zeros((batch_size, heads, key_size, value_size), at_least_float32(dtype))
    return Memory(matrix_BGKU, matrix_BGKU[..., 0], matrix_BGKU, matrix_BGKU[..., 0])


def no_owner(batch_size: int) -> Owner:
    """The owner before the first token."""
    return Owner(*(jnp.zeros(batch_size, jnp.int32) for _ in range(2)))


def segments(
    place: Place,
    owner: Owner,
    document_B: jax.Array,
    segment: int,
    *,
    within: bool,
    fresh: bool = False,
    normalizer_horizon: jax.Array | int | None = None,
    dilution: tuple[jax.Array, jax.Array] | None = None,
    detach_every: int = 0,
) -> tuple[Segments, Owner]:
    """Where a call's tokens stand in the grid of segments.

    Args:
      place: of the tokens, T columns whose indices follow one another; what has document 0 is neither read for nor written.
      owner: of the memory before the call.
      document_B: int32, the document of the last token before the call; 0 before the first.
      segment: tokens per segment.
      within: whether no row's tokens go on beyond the segment they begin in; then N = 1 and C = T, otherwise C = segment.
      fresh: whether the tokens are known to be the first of their rows, which saves a segment.
      normalizer_horizon: after so many whole segments of a document the normalizer stands still, a number or int32 [B]; None: never.
      dilution: after how many whole segments of a document its memory is multiplied, int32 [B], and by what, float32 [B]; None: never.
      detach_every: gradients do not flow back through the memory beyond every so many segments of the grid; 0: they do.

    Returns:
      The segments, and the owner of the memory after the call.
    """
    T = place.index_BT.shape[1]
    number_B, held_B = place.index_BT[:, 0] // segment, place.index_BT[:, 0] % segment
    document_NBC = place.document_BT[None] if within else lay(place.document_BT, None if fresh else held_B, segment)
    N = document_NBC.shape[0]
    numbers_N1 = jnp.arange(N, dtype=jnp.int32)[:, None]

    # Documents are numbered in order.
    last_NB = jnp.maximum(jax.lax.cummax(jnp.max(document_NBC, axis=2), axis=0), document_B[None])
    owner_NB = jnp.concatenate([owner.document_B[None], last_NB[:-1]])
    keeps_NB = last_NB == owner_NB
    before_NB = jnp.concatenate([document_B[None], last_NB[:-1]])
    # A document begins at 0 segments, inside one at -1: a normalizer that stood still after few tokens would let the delta rule explode.
    column_1BC = jnp.arange(document_NBC.shape[2], dtype=jnp.int32)[None, None] + (held_B[None, :, None] if within else 0)
    position_NBC = place.position_BT[None] if within else lay(place.position_BT, None if fresh else held_B, segment)
    inside_NB = jnp.any((document_NBC == last_NB[..., None]) & (position_NBC < column_1BC), axis=2)
    changed_NB = jax.lax.cummax(jnp.where(keeps_NB, -owner.segments_B[None], numbers_N1 + inside_NB.astype(jnp.int32)), axis=0)
    held_NB = numbers_N1 - changed_NB
    counts_NB = jnp.ones_like(keeps_NB) if normalizer_horizon is None else held_NB < jnp.atleast_2d(normalizer_horizon)
    growth_NB = None if dilution is None else jnp.where(held_NB + 1 == dilution[0][None], dilution[1][None], 1)

    read_B = jnp.max(jnp.where(place.document_BT > 0, jnp.arange(1, T + 1, dtype=jnp.int32)[None], 0), axis=1)
    complete_1B = ((held_B + read_B) // segment)[None]
    completes_NB = numbers_N1 < complete_1B
    detaches_NB = jnp.zeros_like(keeps_NB)
    if detach_every:
        detaches_NB = completes_NB & ((number_B[None] + numbers_N1 + 1) % detach_every == 0)

    is_last_NB = numbers_N1 == complete_1B - 1
    at_last = lambda x_NB, before_B: jnp.where(complete_1B[0] > 0, jnp.max(jnp.where(is_last_NB, x_NB, 0), axis=0), before_B)
    after = Owner(at_last(last_NB, owner.document_B), at_last(held_NB + 1, owner.segments_B))
    valid_NBC = document_NBC > 0
    return Segments(
        valid_NBC & (document_NBC == owner_NB[..., None]),
        valid_NBC & (document_NBC == last_NB[..., None]),
        before_NB == last_NB,
        keeps_NB,
        counts_NB,
        completes_NB,
        detaches_NB,
        growth_NB,
    ), after


def recall(
    q_NBCHK: jax.Array,
    k_NBCGK: jax.Array,
    v_NBCGU: jax.Array,
    memory: Memory,
    segments: Segments,
    *,
    update: Update,
    epsilon: float,
    parallel: bool | None = None,
    arrive: Callable | None = None,
) -> tuple[jax.Array, Memory]:
    """Reads the memory for every query, and writes every key and value to it.

    Segments go one after the other, or all at once but for the sums and small products that carry the memory along. On 2 CPU cores a
    gradient step of 3 layers of 128 channels (16 rows of 1,024 tokens, segments of 64) took 1.38 s one after the other and 1.53 s at once,
    forward 0.31 s and 0.33 s.

    Args:
      q_NBCHK: queries without positions, in the segments they lie in (attention.lay).
      k_NBCGK: keys without positions.
      v_NBCGU: values.
      memory: before the call.
      segments: from `segments`.
      update: the rule of writing.
      epsilon: the least denominator.
      parallel: all segments at once; None: except on CPU.
      arrive: where other devices read the tokens before and behind these (nn/context_memory.py); then all segments go at once.

    Returns:
      recalled_NBCHU, float32 or wider, 0 where a token may not read, and the memory after the call.
    """
    N, B, C, H, _ = q_NBCHK.shape
    parallel = jax.default_backend() != "cpu" if parallel is None else parallel
    tokens = (q_NBCHK, k_NBCGK, v_NBCGU)
    flat = lambda recalled_NBGXU: jnp.moveaxis(recalled_NBGXU.reshape(N, B, H, C, -1), 2, 3)

    if arrive is not None or (N > 1 and parallel):
        tokens = jax.vmap(functools.partial(_features, wide=memory.matrix_BGKU.dtype))(*tokens)
        recalled_NBGXU, memory = _all_segments(*tokens, memory, segments, update, epsilon, arrive)
        return flat(recalled_NBGXU), memory

    def one_segment(memory: Memory, xs):
        tokens, segment = xs
        q_BGXK, k_BGCK, v_BGCU = _features(*tokens, wide=memory.matrix_BGKU.dtype)
        read = functools.partial(_read, matrix_BGKU=memory.matrix_BGKU, normalizer_BGK=memory.normalizer_BGK, epsilon=epsilon)
        recalled_BGXU = read(q_BGXK, segment.reads_NBC)
        if update == "delta":
            v_BGCU -= read(k_BGCK, segment.reads_NBC)
        k_BGCK = _of_tokens(segment.writes_NBC, k_BGCK)
        matrix_BGKU = _einsum("bgck,bgcu->bgku", k_BGCK, v_BGCU)
        normalizer_BGK = _where(segment.counts_NB, jnp.sum(k_BGCK, axis=2))
        return _written(memory, segment, matrix_BGKU, normalizer_BGK), recalled_BGXU

    xs = (tokens, segments)
    if N == 1:
        memory, recalled_BGXU = one_segment(memory, jax.tree.map(lambda x: x[0], xs))
        return flat(recalled_BGXU[None]), memory
    memory, recalled_NBGXU = jax.lax.scan(jax.checkpoint(one_segment), memory, xs)
    return flat(recalled_NBGXU), memory


def _all_segments(q_NBGXK, k_NBGCK, v_NBGCU, memory: Memory, segments: Segments, update: Update, epsilon: float, arrive: Callable | None):
    """`recall` with what does not depend on earlier segments computed for all of them at once.

    What a segment's keys read is linear in the matrix, so the delta rule comes to matrix + written - overlap matrix, with
    overlap = sum of sigma(k) sigma(k)^T / (sigma(k) . normalizer) over its tokens.
    """

    def step(carry, xs):
        segment, written_BGKU, overlap_BGKK = xs
        if overlap_BGKK is not None:
            written_BGKU -= _einsum("bgkl,bglu->bgku", overlap_BGKK, carry[0])
        return _next(*carry, segment, written_BGKU), carry[0]

    def carry_along(held_BGKU, open_BGKU, written_NBGKU, overlap_NBGKK=None):
        """The held and the open part after the call, and what is held before each segment."""
        before, xs = (held_BGKU, open_BGKU), (segments, written_NBGKU, overlap_NBGKK)
        if arrive is None:
            return jax.lax.scan(step, before, xs)
        before, after = arrive(step, before, xs)
        return after, jax.lax.scan(step, before, xs)[1]

    k_NBGCK = jax.vmap(_of_tokens)(segments.writes_NBC, k_NBGCK)
    written_NBGK = _where(segments.counts_NB, jnp.sum(k_NBGCK, axis=3))
    column = lambda x: x[..., None]
    normalizers, normalizer_NBGK1 = carry_along(column(memory.normalizer_BGK), column(memory.open_normalizer_BGK), column(written_NBGK))
    normalizer_NBGK = normalizer_NBGK1[..., 0]

    written_NBGKU = _einsum("nbgck,nbgcu->nbgku", k_NBGCK, v_NBGCU)
    overlap_NBGKK = None
    if update == "delta":
        total_NBGC = _einsum("nbgck,nbgk->nbgc", k_NBGCK, normalizer_NBGK)
        weighted_NBGCK = jax.vmap(_of_tokens)(segments.reads_NBC, k_NBGCK / jnp.maximum(total_NBGC, epsilon)[..., None])
        overlap_NBGKK = _einsum("nbgck,nbgcl->nbgkl", k_NBGCK, weighted_NBGCK)
    matrices, matrix_NBGKU = carry_along(memory.matrix_BGKU, memory.open_matrix_BGKU, written_NBGKU, overlap_NBGKK)

    read = jax.vmap(functools.partial(_read, epsilon=epsilon))
    recalled_NBGXU = read(q_NBGXK, segments.reads_NBC, matrix_NBGKU, normalizer_NBGK)
    normalizer_BGK, open_normalizer_BGK = (x[..., 0] for x in normalizers)
    return recalled_NBGXU, Memory(matrices[0], normalizer_BGK, matrices[1], open_normalizer_BGK)


def _features(q_BCHK, k_BCGK, v_BCGU, *, wide: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sigma(queries), sigma(keys) and values with heads first, as products need them: [B, G, X, K], [B, G, C, K] and [B, G, C, U]."""
    q_BHCK, k_BGCK, v_BGCU = (jnp.moveaxis(x.astype(wide), 2, 1) for x in (q_BCHK, k_BCGK, v_BCGU))
    B, G, _, K = k_BGCK.shape
    return sigma(q_BHCK).reshape(B, G, -1, K), sigma(k_BGCK), v_BGCU


def sigma(x: jax.Array) -> jax.Array:
    """ELU(x) + 1: positive, so that the weights of what is read are."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _read(q_BGXK, reads_BC, matrix_BGKU, normalizer_BGK, *, epsilon: float) -> jax.Array:
    """Equation 7 for sigma(queries) or sigma(keys); 0 for tokens that may not read."""
    total_BGX = _einsum("bgxk,bgk->bgx", q_BGXK, normalizer_BGK)
    read_BGXU = _einsum("bgxk,bgku->bgxu", q_BGXK, matrix_BGKU) / jnp.maximum(total_BGX, epsilon)[..., None]
    return _of_tokens(reads_BC, read_BGXU)


def _of_tokens(mask_BC: jax.Array, x_BGX: jax.Array) -> jax.Array:
    """What a mask of tokens leaves of [B, G, X, ...]; 0 elsewhere."""
    mask_BX = jnp.tile(mask_BC, (1, x_BGX.shape[2] // mask_BC.shape[1]))
    return jnp.where(mask_BX[:, None, :, None], x_BGX, 0)


def _written(memory: Memory, segment: Segments, matrix_BGKU: jax.Array, normalizer_BGK: jax.Array) -> Memory:
    """The memory after a segment, or a part of one, has written this."""
    matrix_BGKU, open_matrix_BGKU = _next(memory.matrix_BGKU, memory.open_matrix_BGKU, segment, matrix_BGKU)
    normalizer_BGK, open_normalizer_BGK = _next(memory.normalizer_BGK, memory.open_normalizer_BGK, segment, normalizer_BGK)
    return Memory(matrix_BGKU, normalizer_BGK, open_matrix_BGKU, open_normalizer_BGK)


def _next(held_BG: jax.Array, open_BG: jax.Array, segment: Segments, written_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrix or normalizer, and the open segment's part of it, after a segment or a part of one."""
    written_BG += _where(segment.continues_NB, open_BG)
    complete_BG = _where(segment.keeps_NB, held_BG) + written_BG
    if segment.growth_NB is not None:
        complete_BG *= segment.growth_NB.reshape(-1, *(1,) * (complete_BG.ndim - 1))
    complete_BG = _where(segment.detaches_NB, jax.lax.stop_gradient(complete_BG), complete_BG)
    return _where(segment.completes_NB, complete_BG, held_BG), _where(~segment.completes_NB, written_BG)


def _where(mask, x: jax.Array, otherwise: jax.Array | int = 0) -> jax.Array:
    """jnp.where by a mask of the leading axes."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, otherwise)
