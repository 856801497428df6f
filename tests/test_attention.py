"""Blocked attention against the definition: every score of every pair, masked."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.models.streaming import read
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache

B, H, G, K = 2, 4, 2, 3


def definition(q_BTHK, k_BTGK, v_BTGK, place, reach):
    """Scores of all pairs of tokens, head by head."""
    same = (place.document_BT[:, :, None] == place.document_BT[:, None]) & (place.document_BT[:, :, None] > 0)
    q_position, k_position = place.position_BT[:, :, None], place.position_BT[:, None]
    seen_BTT = same & (k_position <= q_position) & reach(q_position, k_position)
    heads = []
    for head in range(H):
        k_BTK, v_BTK = k_BTGK[:, :, head * G // H], v_BTGK[:, :, head * G // H]
        scores_BTT = jnp.einsum("btk,bsk->bts", q_BTHK[:, :, head], k_BTK) / np.sqrt(K)
        weights_BTT = jax.nn.softmax(jnp.where(seen_BTT, scores_BTT, -1e30), axis=-1)
        heads.append(jnp.einsum("bts,bsk->btk", weights_BTT, v_BTK))
    return jnp.stack(heads, axis=2)


def example(length, seed=0, documents=True):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, length, heads, K))) for heads in (H, G, G))
    starts = np.cumsum(rng.random((B, length)) < 0.1, axis=1) if documents else np.zeros((B, length))
    place, _ = cursor.advance(cursor.start(B), length, jnp.asarray(starts + 1, jnp.int32))
    return q, k, v, place


REACHES = {
    "sliding": (attention.sliding(6), 6),
    "block": (attention.block_sliding(4, 2), 12),
    "own_block": (attention.block_sliding(4, 0), 4),
}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("reach", REACHES)
def test_window_equals_definition(reach, fold, float64):
    """Values and gradients, for lengths below, at and above the block, not multiples of it."""
    reach, span = REACHES[reach]
    ring = attention.Cache(*(jnp.zeros((B, span, G, K)),) * 2)
    for length, block in ((3, None), (23, 5), (24, None)):
        q, k, v, place = example(length)

        def windowed(q, k, v):
            return attention.window_attention(q, k, v, place, ring, attention.empty_slots(B, span), reach, block=block, fold=fold)

        def value_and_gradient(compute):
            return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(compute(*qkv))), (0, 1, 2)))(q, k, v)

        ours, theirs = value_and_gradient(windowed), value_and_gradient(lambda q, k, v: definition(q, k, v, place, reach))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)
        np.testing.assert_allclose(jax.jit(windowed)(q, k, v), definition(q, k, v, place, reach), atol=1e-12)


def test_full_equals_definition(float64):
    q, k, v, place = example(23)
    slots = attention.Slots(place.position_BT, place.document_BT)
    expected = definition(q, k, v, place, attention.everything())
    for block in (None, 5, 23):
        ours = attention.full_attention(q, attention.Cache(k, v), place, slots, block=block)
        np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_rows_equal_definition(float64):
    """Values and gradients, in blocks that do not divide the row and in one; memory does not hold the scores of all pairs."""
    q_BTHK, k_BTGK, v_BTGK, _ = example(11)
    valid_BT = jnp.arange(11)[None] < jnp.array([[11], [7]])

    def plain(q_BTHK, k_BTGK, v_BTGK):
        k_BTHK, v_BTHK = (jnp.repeat(x, H // G, axis=2) for x in (k_BTGK, v_BTGK))
        scores_BHTT = jnp.where(valid_BT[:, None, None], jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / np.sqrt(K), -jnp.inf)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores_BHTT, axis=-1), v_BTHK)

    def with_gradients(function):
        loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))
        return jax.jit(lambda *arrays: (function(*arrays), jax.grad(loss, argnums=(0, 1, 2))(*arrays)))(q_BTHK, k_BTGK, v_BTGK)

    for block in (4, 11):
        blocks = functools.partial(attention.row_attention, valid_BT=valid_BT, block=block)
        chex.assert_trees_all_close(with_gradients(blocks), with_gradients(plain), atol=1e-12)
    q_BTHK, k_BTGK, v_BTGK = (jax.ShapeDtypeStruct((1, 512, 1, 4), jnp.float32) for _ in range(3))
    blocks = functools.partial(attention.row_attention, valid_BT=jnp.ones((1, 512), bool), block=32)
    gradient = jax.jit(jax.grad(lambda *arrays: jnp.sum(blocks(*arrays)), argnums=(0, 1, 2)))
    assert gradient.lower(q_BTHK, k_BTGK, v_BTGK).compile().memory_analysis().temp_size_in_bytes < 4 * 512 * 512 / 2


def test_bfloat16_softmax_is_float32():
    """Only inputs, weights and output are rounded: the error stays at bfloat16's 2^-8 however many keys there are."""
    q, k, v, place = example(400, documents=False)
    slots = attention.Slots(place.position_BT, place.document_BT)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    ours = attention.full_attention(half[0], attention.Cache(*half[1:]), place, slots)
    expected = definition(*(x.astype(jnp.float32) for x in half), place, attention.everything())
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=2**-8, rtol=2**-8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 7))
def test_ring_holds_the_last_tokens(calls, span):
    """After any calls, each row's ring holds its last `span` tokens, whatever padding the calls had."""
    position, at, reads = cursor.start(1), attention.empty_slots(1, span), []
    held = jnp.full((1, span), -1)
    for number, valid in enumerate(calls):
        place, position = cursor.advance(position, 4, jnp.asarray([[1] * valid + [0] * (4 - valid)], jnp.int32))
        slot = attention.slot_index(place, span, ring=True)
        tokens = [10 * number + i for i in range(4)]
        held = attention.write(held, jnp.asarray([tokens]), slot)
        at = attention.Slots(*(attention.write(old, new, slot) for old, new in zip(at, place[1:])))
        reads += tokens[:valid]
    last = reads[-span:]
    assert sorted(held[0].tolist()) == sorted([-1] * (span - len(last)) + last)
    assert [held[0, i % span] for i in range(len(reads) - len(last), len(reads))] == last
    assert sorted(at.position_BS[0][at.document_BS[0] > 0].tolist()) == list(range(len(reads) - len(last), len(reads)))


def test_overflow_of_full_attention():
    """A clear error where counts are known, NaN from the first token that does not fit where they are not."""
    model = models.build(models.TransformerConfig.examples()["full"], nnx.Rngs(0))
    tokens_BT = np.zeros((B, 8), np.int32)
    _, state = model.hidden(tokens_BT, model.init_state(B, capacity=10))
    for attempt in (lambda: model.hidden(tokens_BT, state), lambda: read(model, tokens_BT, state, segment=4)):
        with pytest.raises(UserError, match="room for 2 more tokens, not for 8"):
            attempt()
    hidden_BTD, after = jax.jit(model.hidden)(tokens_BT, state)
    assert np.isfinite(hidden_BTD[:, :2]).all()
    assert np.isnan(hidden_BTD[:, 2:]).all()
    np.testing.assert_array_equal(after.cache.k_BSGK[:, :, :8], state.cache.k_BSGK[:, :, :8])
    with pytest.raises(UserError, match=r"init_state: capacity is None"):
        model.init_state(B)


@pytest.mark.parametrize("mode", ["post_softmax", "dropkey"])
def test_attention_dropout(mode):
    """After the softmax the mean stays; DropKey spreads the whole weight over the keys that are left, or gives 0."""
    B, T, rate = 64, 16, 0.4
    q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, 1, 4)), jnp.float32) for seed in range(2))
    cache, held_B = Cache(k[:, :8] * 0, k[:, :8] * 0), jnp.zeros(B, jnp.int32)
    dropout = attention.Dropout(jax.random.key(0), rate, mode)
    o_BT = np.asarray(attention.chunk_attention(q, k, jnp.ones_like(k), cache, held_B, dropout=dropout))[:, :, 0, 0]
    # The first token of each chunk has one key.
    first = o_BT[:, ::8]
    if mode == "dropkey":
        np.testing.assert_allclose(np.unique(np.round(o_BT, 5)), [0, 1])
        assert abs(np.mean(first) - (1 - rate)) < 0.15
    else:
        np.testing.assert_allclose(np.unique(np.round(first, 5)), [0, np.round(1 / (1 - rate), 5)], rtol=1e-5)
        assert abs(o_BT.mean() - 1) < 0.05
    # Chunks draw by themselves.
    assert np.any(o_BT[:, :8] != o_BT[:, 8:])


def test_forms_of_attention_agree():
    """Folded or one chunk after the other, and by the window, with values wider than keys."""
    B, T, C, H, K, U = 3, 21, 4, 2, 6, 10
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v, cache = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, U), Cache(draw(B, C, H, K), draw(B, C, H, U))
    held_B = jnp.arange(B, dtype=jnp.int32)
    position_BT = held_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    ones_BT = jnp.ones_like(position_BT)
    slot_BC = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32)[None], (B, C))
    slots = attention.Slots(slot_BC, (slot_BC < held_B[:, None]).astype(jnp.int32))
    place = cursor.Place(position_BT, position_BT, ones_BT)
    window = functools.partial(attention.window_attention, q, k, v, place, cache, slots, attention.block_sliding(C, 0), scale=0.7)
    chunks = functools.partial(attention.chunk_attention, q, k, v, cache, held_B, scale=0.7)
    for form in (functools.partial(window, fold=False), functools.partial(window, fold=True), functools.partial(chunks, fold=False)):
        chex.assert_trees_all_close(form(), chunks(fold=True), atol=1e-5)
    # In blocks of queries, the last one shorter, with a chunk of keys before the queries' own and three documents.
    laid, document_NBC = [attention.lay(x, None, 7) for x in (q, k, v)], attention.lay(position_BT // 9, None, 7)
    both = lambda x_NBC: jnp.concatenate([x_NBC[::-1], x_NBC], axis=2)
    blocks = functools.partial(attention.attend_chunks, laid[0], *map(both, laid[1:]), (document_NBC, both(document_NBC)))
    for fold in (False, True):
        chex.assert_trees_all_close(blocks(block=3, fold=fold), blocks(block=7, fold=True), atol=1e-5)
    # Rows that are known to begin a chunk need no laying out.
    begin = functools.partial(attention.chunk_attention, q, k, v, cache)
    for fold in (False, True):
        chex.assert_trees_all_close(begin(None, fold=fold), begin(held_B * 0, fold=True), atol=1e-5)


@pytest.mark.parametrize("block", [4, None])
def test_parts_are_one_array(block):
    """Keys in three arrays, one of them empty, as if they lay in one; queries in blocks or not."""
    rng = np.random.default_rng(5)
    q_BTHK, k_BSGK, v_BSGK = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 7, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6)))
    seen_BTS = jnp.asarray(rng.random((2, 7, 9)) < 0.6).at[:, :, 0].set(True)
    cuts = ((0, 3), (3, 3), (3, 9))
    parts = [(k_BSGK[:, a:b], v_BSGK[:, a:b], seen_BTS[:, :, a:b]) for a, b in cuts]
    expected = attention.attend(q_BTHK, k_BSGK, v_BSGK, seen_BTS)
    np.testing.assert_allclose(attention.attend_parts(q_BTHK, parts, block=block), expected, atol=1e-5)
