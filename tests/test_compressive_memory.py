"""Infini-attention's core against the reference data, against its definition token by token, and its properties."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext.models.infini_attention import InfiniConfig, begin_call, infini_attention
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache
from infinicontext.nn.compressive_memory import Owner, empty_memory, no_owner, recall, segments, sigma
from infinicontext.nn.cursor import Place
from infinicontext.nn.rope import RopeConfig

CASES = (
    "linear_basic",
    "delta_basic",
    "gqa_rope_delta_ragged",
    "gqa_rope_linear_init",
    "mqa_delta_init",
    "single_short_segment",
    "linear_many_segments",
    "delta_many_segments",
    "bypass_empty",
    "leftpad_delta",
    "packed_docs_linear",
    "packed_docs_delta",
    "guard_extreme",
)
# layers: all segments in one call, one after the other or in parallel; segments: a call for each; tokens: a call for each token.
WAYS = ("layers", "parallel", "segments", "tokens")


# Most of the time is compilation, half of that for speed that tiny sizes do not need.
QUICK = {"xla_backend_optimization_level": 0}


def read(config, q_BTHK, k_BTGK, v_BTGU, document_BT, gate_H, state, *, within, parallel, turned=True):
    """Tokens of these documents -> o_BTHU and the state."""
    before, slots, owner, cache, memory = state
    T = document_BT.shape[1]
    index_BT = before.count_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    call, slot_BM, slots, owner = begin_call(config, before, Place(index_BT, index_BT, document_BT), slots, owner, within=within)
    if not turned:
        still = lambda turns: tuple(jnp.full_like(x, value) for x, value in zip(turns, (1, 0)))
        call = call._replace(rotation=still(call.rotation), stays_rotation=still(call.stays_rotation))
    o_BTHU, new, memory = infini_attention(config, q_BTHK, k_BTGK, v_BTGU, gate_H, cache, memory, call, within=within, parallel=parallel)
    cache = Cache(*(attention.write(held, x, slot_BM) for held, x in zip(cache, new)))
    # Here padding may stand anywhere, and counts.
    after = before._replace(count_B=before.count_B + T, document_B=jnp.maximum(jnp.max(document_BT, axis=1), before.document_B))
    return o_BTHU, (after, slots, owner, cache, memory)


quick_read = jax.jit(read, static_argnums=0, static_argnames=("within", "parallel", "turned"), compiler_options=QUICK)


class Golden:
    """One file in our layout."""

    def __init__(self, folder, case, dtype="float64"):
        self.dtype = dtype
        with np.load(folder / "infini" / f"{case}.npz") as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {name: file[name] for name in file.files if name != "meta"}
        (self.B, H, self.T, K), G = self["q"].shape, self["k"].shape[1]
        self.config = InfiniConfig(
            dim=H * K,
            heads=H,
            kv_heads=G,
            head_dim=K,
            segment=self.meta["segment_len"],
            update=self.meta["update"],
            empty_memory=self.meta.get("empty_memory", "literal"),
            memory_epsilon=self.meta.get("eps", 1e-6),
            # Without rotation a head may have any size, so the rule that it be even is kept by rotating none of it but a pair.
            rope=RopeConfig(base=self.meta["rope_base"] or 1e4, partial=1.0 if self.meta["rope_base"] else min(1.0, 2.5 / K)),
            dtype=dtype,
        )
        documents_BT = np.ones((self.B, self.T), np.int32)
        if "doc" in self.arrays:
            documents_BT[:, 1:] += np.cumsum(self.arrays["doc"][:, 1:] != self.arrays["doc"][:, :-1], axis=1)
        if "valid" in self.arrays:
            documents_BT = np.where(self.arrays["valid"], documents_BT, 0)
        self.documents_BT = documents_BT.astype(np.int32)

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        return np.asarray(self.arrays[name], self.dtype)

    def tokens(self, name):
        return np.swapaxes(self[name], 1, 2)

    def start(self):
        """Cursor, slots, owner, cache and memory before the first token."""
        config, K, U = self.config, self["k"].shape[-1], self["v"].shape[-1]
        cache = Cache(*(jnp.zeros((self.B, config.span, config.kv_heads, size), self.dtype) for size in (K, U)))
        memory, owner = empty_memory(self.B, config.kv_heads, K, U, self.dtype), no_owner(self.B)
        if "M0" in self:
            memory = memory._replace(matrix_BGKU=self["M0"], normalizer_BGK=self["z0"])
            owner = Owner(jnp.ones(self.B, jnp.int32), jnp.ones(self.B, jnp.int32))
        return cursor.start(self.B), attention.empty_slots(self.B, config.span), owner, cache, memory

    def run(self, q_BTHK, k_BTGK, v_BTGU, gate_H, way="layers", read=None, **options):
        """All tokens -> o_BTHU and the states after each call."""
        config = InfiniConfig(**(vars(self.config) | options))
        read = quick_read if read is None else read
        size = {"segments": config.segment, "tokens": 1}.get(way, self.T)
        state, parts, states = self.start(), [], []
        for at in range(0, self.T, size):
            tokens = (x[:, at : at + size] for x in (q_BTHK, k_BTGK, v_BTGU, self.documents_BT))
            o_BTHU, state = read(
                config, *tokens, gate_H, state, within=size < self.T, parallel=way == "parallel", turned=self.meta["rope_base"] is not None
            )
            parts.append(o_BTHU)
            states.append(state)
        return jnp.concatenate(parts, axis=1), states

    def inputs(self):
        return self.tokens("q"), self.tokens("k"), self.tokens("v"), self["beta"]


def whole(state) -> tuple[jax.Array, jax.Array]:
    """Matrix and normalizer with what the open segment has written."""
    before, _, owner, _, memory = state
    mine = jnp.asarray(before.document_B == owner.document_B, memory.matrix_BGKU.dtype)
    return (
        memory.matrix_BGKU * mine[:, None, None, None] + memory.open_matrix_BGKU,
        memory.normalizer_BGK * mine[:, None, None] + memory.open_normalizer_BGK,
    )


def assert_close(a, b, tolerance=1e-10):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("way", "dtype"), [*((way, "float64") for way in WAYS), ("layers", "float32"), ("parallel", "float32")])
def test_reference_outputs_and_memories(golden, case, way, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden, case, dtype)
        out_BTHU, states = data.run(*data.inputs(), way)
        tolerance = 1e-10 if dtype == "float64" else 5e-5 if case.startswith("guard") else 2e-6
        np.testing.assert_allclose(out_BTHU, data.tokens("out"), rtol=0, atol=tolerance)
        relative = {"float64": 1e-10, "float32": 2e-6}[dtype]
        close = lambda found, name: np.testing.assert_allclose(found, data[name], rtol=relative, atol=relative * np.abs(data[name]).max())
        close(whole(states[-1])[0], "M")
        close(whole(states[-1])[1], "z")
        if way == "segments" and "M_trace" in data:
            close(np.stack([whole(state)[0] for state in states]), "M_trace")
            close(np.stack([whole(state)[1] for state in states]), "z_trace")


@pytest.mark.golden
@pytest.mark.parametrize("case", ["grad_linear", "grad_delta"])
@pytest.mark.parametrize("way", ["layers", "parallel", "segments"])
def test_reference_gradients(golden, case, way, float64):
    """Through all segments, and cut after every one or two."""
    data = Golden(golden, case)

    def loss(detach, *inputs):
        return jnp.sum(data.run(*inputs, way, read, detach_every=detach)[0] * data.tokens("w"))

    gradients = lambda detach, *inputs: jax.grad(loss, (1, 2, 3, 4))(detach, *inputs)
    for detach, name in ((0, "full"), (1, "detach1"), (2, "detach2")):
        found = jax.jit(gradients, static_argnums=0, compiler_options=QUICK)(detach, *data.inputs())
        assert_close(found[:3], tuple(data.tokens(f"g_{x}_{name}") for x in "qkv"))
        assert_close(found[3], data[f"g_beta_{name}"])
        directions = (*(data.tokens(f"dir_{x}") for x in "qkv"), data["dir_beta"])
        assert_close(sum(jnp.sum(g * d) for g, d in zip(found, directions)), data[f"dd_{name}"])


# ---------------------------------------------------------------- the definition, token by token

SHAPE = {"B": 2, "T": 27, "H": 4, "G": 2, "K": 3, "U": 5}
SEGMENT = 4
DOCUMENTS_BT = np.array([[1] * 10 + [2] * 1 + [3] * 16, [1] * 6 + [2] * 15 + [0] * 6], np.int32)
POSITIONS_BT = np.array([[*range(10), 0, *range(16)], [*range(6), *range(15), *[0] * 6]], np.int32)


def example(seed=0, shape=SHAPE):
    rng, B, T, K = np.random.default_rng(seed), shape["B"], shape["T"], shape["K"]
    return rng.normal(size=(B, T, shape["H"], K)), rng.normal(size=(B, T, shape["G"], K)), rng.normal(size=(B, T, shape["G"], shape["U"]))


def definition(q_BTHK, k_BTGK, v_BTGU, update="delta", horizon=None, dilution=None, epsilon=1e-6):
    """What each token recalls, and the memory of each row's last document, by the equations."""
    after_B, factor_B = ([0, 0], [1, 1]) if dilution is None else dilution
    positive = lambda x: x + 1 if x > 0 else np.exp(x)
    positive = np.vectorize(positive)
    (B, T, H, K), (G, U) = q_BTHK.shape, v_BTGU.shape[2:]
    recalled, matrices, normalizers = np.zeros((B, T, H, U)), np.zeros((B, G, K, U)), np.zeros((B, G, K))
    for row in range(B):
        for g in range(G):
            document, held = 0, 0
            for t in range(int((DOCUMENTS_BT[row] > 0).sum())):
                if DOCUMENTS_BT[row, t] != document:
                    # The segment that a document begins inside does not count.
                    document, held = DOCUMENTS_BT[row, t], -1 if t % SEGMENT else 0
                    matrix, normalizer, written, counted = np.zeros((K, U)), np.zeros(K), np.zeros((K, U)), np.zeros(K)
                elif t % SEGMENT == 0:
                    held += 1
                    growth = factor_B[row] if held == after_B[row] > 0 else 1
                    matrix, normalizer = growth * (matrix + written), growth * (normalizer + counted)
                    written, counted = written * 0, counted * 0
                read = lambda x: x @ matrix / max(x @ normalizer, epsilon)
                for h in range(g * H // G, (g + 1) * H // G):
                    recalled[row, t, h] = read(positive(q_BTHK[row, t, h]))
                key = positive(k_BTGK[row, t, g])
                written = written + np.outer(key, v_BTGU[row, t, g] - (read(key) if update == "delta" else 0))
                counted = counted + (key if horizon is None or held < horizon else 0)
            matrices[row, g], normalizers[row, g] = matrix + written, normalizer + counted
    return recalled, matrices, normalizers


def plainly_remember(
    tokens,
    document_BT,
    before,
    position_BT=None,
    *,
    update="delta",
    horizon=None,
    dilution=None,
    parallel=False,
    within=False,
    segment=SEGMENT,
):
    """Tokens of these documents -> what they recall, and what comes before the next."""
    memory, owner, count_B, document_B = before
    T = document_BT.shape[1]
    index_BT = count_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    place = Place(index_BT, index_BT if position_BT is None else position_BT, document_BT)
    own, owner = segments(place, owner, document_B, segment, within=within, normalizer_horizon=horizon, dilution=dilution)
    laid = (x[None] if within else attention.lay(jnp.asarray(x), count_B % segment, segment) for x in tokens)
    recalled, memory = recall(*laid, memory, own, update=update, epsilon=1e-6, parallel=parallel)
    recalled = recalled[0] if within else attention.unlay(recalled, count_B % segment, T)
    count_B += jnp.sum(document_BT > 0, axis=1, dtype=jnp.int32)
    return recalled, (memory, owner, count_B, jnp.maximum(document_B, jnp.max(document_BT, axis=1)))


remember = jax.jit(plainly_remember, static_argnames=("update", "horizon", "parallel", "within", "segment"), compiler_options=QUICK)


def nothing(dtype="float64", shape=SHAPE):
    zeros_B = jnp.zeros(shape["B"], jnp.int32)
    return empty_memory(shape["B"], shape["G"], shape["K"], shape["U"], dtype), no_owner(shape["B"]), zeros_B, zeros_B


def total(before) -> tuple[jax.Array, jax.Array]:
    memory, owner, _, document_B = before
    mine_B = jnp.asarray(owner.document_B == document_B, memory.matrix_BGKU.dtype)
    return (
        memory.matrix_BGKU * mine_B[:, None, None, None] + memory.open_matrix_BGKU,
        memory.normalizer_BGK * mine_B[:, None, None] + memory.open_normalizer_BGK,
    )


@pytest.mark.parametrize(
    ("horizon", "dilution"), [(None, None), (1, None), (2, None), (2, (np.array([1, 2], np.int32), np.array([30.0, 7.0])))]
)
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_equals_the_definition(update, horizon, dilution, float64):
    """Documents, padding, a normalizer that stands still, a memory that is multiplied; in one call, and token by token."""
    tokens, options = example(), {"update": update, "horizon": horizon, "dilution": dilution}
    expected = definition(*tokens, update, horizon, dilution)
    for parallel in (False, True):
        recalled, after = remember(tokens, DOCUMENTS_BT, nothing(), POSITIONS_BT, parallel=parallel, **options)
        assert_close((recalled, *total(after)), expected)
    parts, before = [], nothing()
    for t in range(SHAPE["T"]):
        one = slice(t, t + 1)
        part, before = remember([x[:, one] for x in tokens], DOCUMENTS_BT[:, one], before, POSITIONS_BT[:, one], within=True, **options)
        parts.append(part)
    assert_close((jnp.concatenate(parts, axis=1), before), (recalled, after))


def test_gradients_of_both_orders_agree(float64):
    """With documents, which the reference data has no gradients of."""

    def loss(tokens, memory, parallel):
        recalled, after = plainly_remember(tokens, DOCUMENTS_BT, (memory, *nothing()[1:]), POSITIONS_BT, horizon=2, parallel=parallel)
        return jnp.sum(jnp.sin(recalled)) + sum(jnp.sum(jnp.cos(x)) for x in after[0])

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2, compiler_options=QUICK)
    assert_close(*(gradient(example(), nothing()[0], parallel) for parallel in (False, True)))


# ---------------------------------------------------------------- properties

ONE_DOCUMENT = {"B": 1, "T": 20, "H": 2, "G": 1, "K": 4, "U": 2}


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**16))
def test_linear_reads_a_mean_of_past_values(seed):
    """Its weights are positive and sum to 1, so of equal values nothing but that value is read."""
    with jax.enable_x64(True):
        q, k, v = example(seed, ONE_DOCUMENT)
        ones_BT = np.ones((1, 20), np.int32)
        recalled, _ = remember((q, k, np.ones_like(v)), ones_BT, nothing(shape=ONE_DOCUMENT), update="linear")
        assert_close(recalled[:, SEGMENT:], np.ones((1, 16, 2, 2)))
        assert not np.any(recalled[:, :SEGMENT])
        recalled, _ = remember((q, k, v), ones_BT, nothing(shape=ONE_DOCUMENT), update="linear")
        for t in range(SEGMENT, 20):
            past_U = v[0, : t // SEGMENT * SEGMENT, 0]
            found_HU = np.asarray(recalled[0, t])
            assert np.all(found_HU > past_U.min(axis=0) - 1e-12)
            assert np.all(found_HU < past_U.max(axis=0) + 1e-12)


def test_delta_writes_nothing_that_is_there(float64):
    """Of equal values the second segment writes none; but it counts, so what equal keys read is halved, unless the horizon is 1."""
    q, k, v = example(0, ONE_DOCUMENT)
    same_k, ones_BT = np.broadcast_to(k[:, :1], k.shape), np.ones((1, 20), np.int32)
    read = lambda k, length, **options: remember(
        (q[:, :length], k[:, :length], np.ones_like(v)[:, :length]), ones_BT[:, :length], nothing(shape=ONE_DOCUMENT), **options
    )
    (_, first), (_, second) = (read(k, length) for length in (SEGMENT, 2 * SEGMENT))
    assert_close(second[0].matrix_BGKU, first[0].matrix_BGKU)
    share_N = lambda **options: read(same_k, 20, **options)[0][0, ::SEGMENT, 0, 0]
    assert_close(share_N(), np.array([0, 1, 0.5, 0.5, 0.5]))
    assert_close(share_N(horizon=1), np.array([0, 1, 1, 1, 1.0]))


def test_a_horizon_counts_whole_segments(float64):
    """A document of one token in its first segment: were that the horizon, the delta rule would explode."""
    shape = {"B": 1, "T": 400, "H": 1, "G": 1, "K": 4, "U": 2}
    documents_BT, segment = np.array([[1] * 15 + [2] * 385], np.int32), 16
    positions_BT = np.array([[*range(15), *range(385)]], np.int32)
    recalled, _ = remember(example(0, shape), documents_BT, nothing(shape=shape), positions_BT, horizon=1, segment=segment)
    assert np.abs(recalled).max() < 10


def test_a_horizon_for_each_row(float64):
    """int32 [B], as training draws them."""
    both = remember(example(), DOCUMENTS_BT, nothing(), POSITIONS_BT, horizon=None)[0]
    horizon_B = jnp.array([1, 100], jnp.int32)
    mixed, _ = plainly_remember(example(), DOCUMENTS_BT, nothing(), POSITIONS_BT, horizon=horizon_B)
    short = remember(example(), DOCUMENTS_BT, nothing(), POSITIONS_BT, horizon=1)[0]
    assert_close(mixed, jnp.stack([short[0], both[1]]))
    assert jnp.max(jnp.abs(short[0] - both[0])) > 1e-3


def test_dilution_is_reading_the_same_again(float64):
    """By the linear rule exactly: two segments five times over, then others."""
    q, k, v = example(0, ONE_DOCUMENT)
    again = lambda x: np.concatenate([*[x[:, : 2 * SEGMENT]] * 5, x[:, 2 * SEGMENT :]], axis=1)
    long, after_long = remember([again(x) for x in (q, k, v)], np.ones((1, 52), np.int32), nothing(shape=ONE_DOCUMENT), update="linear")
    dilution = np.array([2], np.int32), np.array([5.0])
    short, after = remember((q, k, v), np.ones((1, 20), np.int32), nothing(shape=ONE_DOCUMENT), update="linear", dilution=dilution)
    assert_close((short[:, 2 * SEGMENT :], after[0]), (long[:, 10 * SEGMENT :], after_long[0]))


def test_bfloat16_tokens_are_summed_in_float32():
    """A bfloat16 sum of so many equal parts would stop growing at 256."""
    shape = {"B": 1, "T": 600, "H": 1, "G": 1, "K": 2, "U": 2}
    ones = jnp.zeros((1, 600, 1, 2), jnp.bfloat16)  # sigma(0) = 1
    for parallel in (False, True):
        before = nothing("bfloat16", shape)
        recalled, (memory, *_) = remember((ones, ones, ones + 1), np.ones((1, 600), np.int32), before, update="linear", parallel=parallel)
        assert {x.dtype for x in (recalled, *memory)} == {jnp.dtype("float32")}
        np.testing.assert_array_equal(memory.normalizer_BGK, np.full((1, 1, 2), 600))
        np.testing.assert_allclose(recalled[0, SEGMENT:], np.ones((600 - SEGMENT, 1, 2)), rtol=1e-6)


def test_tiny_denominators_are_guarded():
    """Keys and queries so negative that their images vanish: nothing to read, finite values and gradients."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in example(0, ONE_DOCUMENT))

    def loss(q, k, v, parallel):
        recalled, after = plainly_remember((q, k, v), np.ones((1, 20), np.int32), nothing("float32", ONE_DOCUMENT), parallel=parallel)
        return jnp.sum(recalled**2) + jnp.sum(after[0].matrix_BGKU ** 2)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3, compiler_options=QUICK)
    for parallel in (False, True):
        chex.assert_tree_all_finite(gradient(q - 200, k - 200, v, parallel))
    assert sigma(jnp.float32(-200)) == 0
