"""TransformerFAM against the reference data, against its definition block by block, and its properties (test_stream_law.py has more)."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import models, sharding
from infinicontext.errors import UserError
from infinicontext.models.fam import shifted
from infinicontext.models.fam_attention import FamConfig, draw_rereads
from infinicontext.models.streaming import abstract_state_bytes
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.attention import Slots
from infinicontext.nn.rope import RopeConfig
from infinicontext.sharding import MeshConfig, make_mesh

STACKS = (
    "stack_m1",
    "stack_m0",
    "stack_m3_ragged",
    "bswa_only",
    "stack_mha_long",
    "stack_rsp",
    "stack_keep_residual",
    "pos_float",
    "pos_zero_offset",
    "pos_last_offset",
)
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}
# Most of the time is compilation, half of that for speed that tiny sizes do not need.
QUICK = {"xla_backend_optimization_level": 0}
read = jax.jit(lambda model, tokens_BT, state: model.hidden(tokens_BT, state), compiler_options=QUICK)


class Bare(nnx.Module):
    """In place of the last norm, which the reference data is without."""

    def __call__(self, x):
        return x


class Golden:
    """One file, a sequence of embeddings as a model whose vocabulary they are."""

    def __init__(self, folder, case, dtype="float64", **options):
        with np.load(folder / "fam" / f"{case}.npz") as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {name: file[name] for name in file.files if name != "meta"}
        self.dtype, meta = dtype, self.meta
        self.prompt = self.get("E", self.get("F"))
        self.config = FamConfig(
            vocab_size=len(self["X"]),
            dim=self["X"].shape[1],
            layers=meta.get("n_layers", 1),
            heads=meta["H"],
            kv_heads=meta["Hk"],
            head_dim=meta["dh"],
            feed_forward=self["layers.0.wg"].shape[1],
            block=meta["B"],
            memory_blocks=meta["m"],
            fam_length=0 if self.prompt is None else len(self.prompt),
            fam_positions={"float": "fractional"}.get(meta.get("fam_pos", "last"), meta.get("fam_pos", "last")),
            rope=RopeConfig(base=meta["base"]),
            dtype=dtype,
            **options,
        )
        self.tokens_1T = np.arange(len(self["X"]), dtype=np.int32)[None]
        model = models.build(self.config, nnx.Rngs(0))
        model.norm = Bare()
        model.embedding.table = model.embedding.table.replace(jnp.asarray(self["X"]))
        model.prompt = None if self.prompt is None else model.prompt.replace(jnp.asarray(self.prompt))
        for (part, name), array in self.weights("layers").items():
            owner = getattr(model.blocks, part)
            setattr(owner, name, getattr(owner, name).replace(array))
        self.model = model

    def __getitem__(self, name):
        return np.asarray(self.arrays[name], self.dtype)

    def get(self, name, otherwise=None):
        return self[name] if name in self.arrays else otherwise

    def of_layers(self, name):
        return jnp.stack([self[name.format(i)] for i in range(self.config.layers)])

    def weights(self, kind):
        """Arrays by module of a block and name."""
        config, (L, D) = self.config, (self.config.layers, self.config.dim)
        get = lambda name: self.of_layers(kind + ".{}." + name)
        heads = lambda name, count: get(name).reshape(L, D, count, config.head_size)
        return {
            ("attention_norm", "scale"): get("ln1"),
            ("attention", "q"): heads("wq", config.heads),
            ("attention", "k"): heads("wk", config.kv_head_count),
            ("attention", "v"): heads("wv", config.kv_head_count),
            ("attention", "o"): get("wo").reshape(L, config.heads, config.head_size, D),
            ("feed_forward_norm", "scale"): get("ln2"),
            ("feed_forward", "gate"): get("wg"),
            ("feed_forward", "up"): get("wu"),
            ("feed_forward", "down"): get("wd"),
        }

    def start(self, model):
        """The state before the first token."""
        state = model.init_state(1)
        if "offset" in self.meta:
            state = shifted(state, jnp.full(1, int(self.meta["offset"]), jnp.int32))
        if self.meta.get("rsp"):
            state = model.passed(state, self.of_layers("F_saved.{}"))
        elif self.meta.get("first_residual") == "keep":
            state = model.passed(state, model.prompt_stream())
        return state

    def read(self, sizes):
        """All tokens in calls of these sizes."""
        state, parts = self.start(self.model), []
        for part_1T in np.split(self.tokens_1T, np.cumsum(sizes)[:-1], axis=1):
            hidden_1TD, state = read(self.model, part_1T, state)
            parts.append(hidden_1TD[0])
        return jnp.concatenate(parts), state


def assert_state(data, state, tolerance):
    """FAM and cache after the last complete block."""
    config, close = data.config, lambda found, name: np.testing.assert_allclose(found, data.of_layers(name), rtol=0, atol=tolerance)
    if config.fam_length:
        close(state.feedback.fam_LBFD[:, 0], "F_final.{}")
    complete = data.tokens_1T.shape[1] // config.block
    held = np.arange(max(complete - config.memory_blocks, 0) * config.block, complete * config.block) % config.span
    if len(held):
        close(state.cache.k_BSGK[:, 0, held], "mem_k.{}")
        close(state.cache.v_BSGK[:, 0, held], "mem_v.{}")


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", STACKS)
def test_reference_outputs_and_states(golden, case, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden, case, dtype)
        found_TD, state = data.read([data.tokens_1T.shape[1]])
        np.testing.assert_allclose(found_TD, data["Y"], rtol=0, atol=TOLERANCE[dtype])
        assert_state(data, state, TOLERANCE[dtype])
        if data.config.fam_length:
            np.testing.assert_allclose(data.model.prompt_stream(), data.of_layers("F0.{}"), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.golden
@pytest.mark.parametrize("way", ["blocks", "pieces", "tokens"])
@pytest.mark.parametrize("case", ["stack_m3_ragged", "stack_rsp", "pos_zero_offset", "bswa_only"])
def test_reference_by_other_ways(golden, case, way, float64):
    data = Golden(golden, case, schedule="blocks" if way == "blocks" else "layers")
    length = data.tokens_1T.shape[1]
    piece = {"blocks": length, "pieces": 2 * data.config.block - 1, "tokens": 1}[way]
    sizes = [piece] * (length // piece) + [1] * (length % piece)
    found_TD, state = data.read(sizes)
    np.testing.assert_allclose(found_TD, data["Y"], rtol=0, atol=1e-10)
    assert_state(data, state, 1e-10)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", ["layer_block", "layer_block_fresh_nomem"])
def test_reference_of_one_block(golden, case, dtype):
    """From keys and values in the ring and a FAM, in the middle of a stream."""
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden, case, dtype)
        meta, config = data.meta, data.config
        state, start_1 = data.model.init_state(1), jnp.full(1, meta["start"], jnp.int32)
        state = data.model.passed(shifted(state, start_1), data.prompt[None])
        keys, values = data.get("mem_k", np.zeros((0,))), data.get("mem_v", np.zeros((0,)))
        number_S = np.arange(meta["start"] - len(keys), meta["start"], dtype=np.int32)
        slot_S = number_S % config.span
        cache = type(state.cache)(*(x.at[0, 0, slot_S].set(new) if len(new) else x for x, new in zip(state.cache, (keys, values))))
        slots = Slots(*(x.at[0, slot_S].set(new) for x, new in zip(state.slots, (number_S, 1))))
        feedback = state.feedback._replace(fresh_B=jnp.full(1, meta["fresh"]))
        state = state._replace(cursor=state.cursor._replace(count_B=start_1), cache=cache, slots=slots, feedback=feedback)
        found_1TD, state = read(data.model, data.tokens_1T, state)
        new_S = np.arange(meta["start"], meta["start"] + config.block) % config.span
        found = (found_1TD[0], state.feedback.fam_LBFD[0, 0], state.cache.k_BSGK[0, 0, new_S], state.cache.v_BSGK[0, 0, new_S])
        expected = tuple(data[name] for name in ("Y", "F_new", "k_new", "v_new"))
        chex.assert_trees_all_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["layers", "blocks"])
@pytest.mark.parametrize("name", ["full", "stopmem"])
def test_reference_gradients(golden, name, schedule, dtype):
    """Through FAM and through the keys and values of earlier blocks, or without the latter. Gradients are larger than 1, so the tolerance
    is relative, too."""
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden, "grad", dtype, schedule=schedule, stop_memory_gradient=name == "stopmem")

        def loss(model):
            return jnp.sum(model.hidden(data.tokens_1T, data.start(model))[0] * data["w"][None])

        gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(data.model)
        close = lambda found, name: np.testing.assert_allclose(found, data[name], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        close(gradient.embedding.table[...], f"g_X_{name}")
        close(gradient.prompt[...], f"g_E_{name}")
        of_layers = {key: getattr(getattr(gradient.blocks, key[0]), key[1])[...] for key in data.weights("layers")}
        close(sum(jnp.sum(of_layers[key] * direction) for key, direction in data.weights("dir.layers").items()), f"dd_params_{name}")


# ---------------------------------------------------------------- the definition, block by block

TINY = FamConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=20, block=4, fam_length=3, dtype="float64", remat=False)


def changed(config, **options):
    return dataclasses.replace(config, **options)


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 17, shape, dtype=np.int32)


def built(config, seed=0):
    return models.build(config, nnx.Rngs(seed))


def definition(model, tokens_T):
    """Outputs of one document and its last FAM: each layer and block one masked softmax for FAM and tokens together (algorithm 2)."""
    config, C, F, m = model.config, model.config.block, model.config.fam_length, model.config.memory_blocks
    array = lambda parameter: np.asarray(parameter[...], np.float64)
    norm = lambda x, scale: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_epsilon) * scale
    turn_R = config.rope.base ** (-np.arange(config.head_size // 2) / (config.head_size // 2))

    def rotated(x_XHK, position_X):
        z_XHR = x_XHK[..., : len(turn_R)] + 1j * x_XHK[..., len(turn_R) :]
        z_XHR = z_XHR * np.exp(1j * np.asarray(position_X, float)[:, None] * turn_R)[:, None]
        return np.concatenate([z_XHR.real, z_XHR.imag], axis=-1)

    def projected(block, x_XD, position_X):
        part, x_XD = block.attention, norm(x_XD, array(block.attention_norm.scale))
        q, k, v = (np.einsum("xd,dhk->xhk", x_XD, array(w)) for w in (part.q, part.k, part.v))
        return rotated(q, position_X), rotated(k, position_X), v

    def attended(block, q_XHK, k_YGK, v_YGK, seen_XY):
        k_YHK, v_YHK = (np.repeat(x, config.heads // config.kv_head_count, axis=1) for x in (k_YGK, v_YGK))
        weight_HXY = np.where(seen_XY, np.exp(np.einsum("xhk,yhk->hxy", q_XHK, k_YHK) / np.sqrt(config.head_size)), 0)
        o_XHK = np.einsum("hxy,yhk->xhk", weight_HXY / weight_HXY.sum(axis=-1, keepdims=True), v_YHK)
        return np.einsum("xhk,hkd->xd", o_XHK, array(block.attention.o))

    def fed_forward(block, x_XD):
        part, h_XD = block.feed_forward, norm(x_XD, array(block.feed_forward_norm.scale))
        gate = h_XD @ array(part.gate)
        return x_XD + (gate / (1 + np.exp(-gate)) * (h_XD @ array(part.up))) @ array(part.down)

    def fam_position(start):
        return {
            "last": start - F + np.arange(F),
            "fractional": start - 1 + (np.arange(F) + 1) / (F + 1),
            "zero": np.zeros(F),
        }[config.fam_positions]

    blocks = [jax.tree.map(lambda x, layer=layer: x[layer], model.blocks) for layer in range(config.layers)]
    first = [array(model.prompt)]
    for block in blocks:
        attention_FD = attended(block, *projected(block, first[-1], fam_position(0)), np.ones((F, F), bool))
        first.append(fed_forward(block, first[-1] + attention_FD))
    fam, memory, outputs = first[:-1], [[] for _ in blocks], []
    for start in range(0, len(tokens_T), C):
        x_CD = array(model.embedding.table)[tokens_T[start : start + C]]
        for layer, block in enumerate(blocks):
            q_C, k_C, v_C = projected(block, x_CD, start + np.arange(C))
            q_F, k_F, v_F = projected(block, fam[layer], fam_position(start))
            source_FD = fam[layer]
            if config.fam_query == "static":
                source_FD = first[layer]
                q_F, _, _ = projected(block, source_FD, fam_position(start))
            before = memory[layer][len(memory[layer]) - m :] if m else []
            past = len(before) * C
            keys, values = (np.concatenate([*(pair[i] for pair in before), *own]) for i, own in enumerate(((k_F, k_C), (v_F, v_C))))
            fam_sees = np.arange(past + F + C)[None] >= past
            token_sees = np.arange(past + F + C)[None] <= past + F + np.arange(C)[:, None]
            seen_XY = np.concatenate([np.broadcast_to(fam_sees, (F, past + F + C)), token_sees])
            attention_XD = attended(block, np.concatenate([q_F, q_C]), keys, values, seen_XY)
            fam_FD = attention_XD[:F] + (0 if start == 0 else source_FD)
            fam_FD = fed_forward(block, fam_FD) if config.fam_feed_forward else fam_FD
            size_F1 = np.sqrt(np.mean(fam_FD**2, axis=-1, keepdims=True))
            fam[layer] = fam_FD * np.minimum(config.fam_limit / size_F1, 1) if config.fam_limit else fam_FD
            x_CD = fed_forward(block, x_CD + attention_XD[F:])
            memory[layer].append((k_C, v_C))
        outputs.append(norm(x_CD, array(model.norm.scale)))
    return np.concatenate(outputs), np.stack(fam)


@pytest.mark.parametrize(
    "options",
    [
        {"fam_length": 4, "kv_heads": 1, "memory_blocks": 2},
        {"fam_length": 1, "memory_blocks": 0, "fam_positions": "fractional", "heads": 2},
        {"fam_length": 6, "fam_feed_forward": False, "fam_positions": "zero"},
        {"fam_query": "static"},
        {"fam_limit": 0.4},
    ],
    ids=["F=C, MQA", "F=1, m=0", "F>C", "static", "limited"],
)
def test_equals_the_definition(options, float64):
    model, tokens_T = built(changed(TINY, **options)), tokens_of(0, 20)
    expected = definition(model, tokens_T)
    found_1TD, state = read(model, tokens_T[None], model.init_state(1))
    chex.assert_trees_all_close((found_1TD[0], state.feedback.fam_LBFD[:, 0]), expected, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("base", ["full", "block_window"])
def test_without_fam_it_is_a_transformer(base, float64):
    """The same weights with block-sliding windows and, on a text that fits into the window, with full attention; all biases."""
    shape = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "feed_forward": 24, "vocab_size": 17}
    biases = dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias", "qk_norm", "tied_embeddings"), True)
    config = TransformerConfig(**shape, **biases, attention=base, block=4, memory_blocks=2, dtype="float64")
    fam_config = FamConfig.of(config, fam_length=0, **({"block": 8, "memory_blocks": 2} if base == "full" else {}))
    assert dataclasses.replace(fam_config.transformer, attention=base, block=4, memory_blocks=2) == config
    plain, model = built(config), built(fam_config, 1)
    weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}
    # Away from 0 and 1, so that none of them could be left out unnoticed.
    weights = {
        path: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, (path, leaf) in enumerate(weights.items())
    }
    plain, model = (jax.tree_util.tree_map_with_path(lambda path, _: weights[jax.tree_util.keystr(path)], tree) for tree in (plain, model))
    tokens_BT = tokens_of(1, 2, 23)
    expected, _ = read(plain, tokens_BT, plain.init_state(2, capacity=23))
    chex.assert_trees_all_close(read(model, tokens_BT, model.init_state(2))[0], expected, atol=1e-10, rtol=1e-10)
    assert model.init_state(2).feedback is None


def test_only_fam_reaches_beyond_the_window(float64):
    """With m = 0: row t has token t changed. Nothing before t differs; blocks behind t's own do if there is a FAM."""
    original_TT = np.repeat(tokens_of(2, 1, 16), 16, axis=0)
    changed_TT = (original_TT + np.eye(16, dtype=np.int32)) % 17
    for fam_length in (0, 3):
        model = built(changed(TINY, memory_blocks=0, fam_length=fam_length))
        difference_TTD = read(model, original_TT, model.init_state(16))[0] - read(model, changed_TT, model.init_state(16))[0]
        differs_TT = np.abs(np.asarray(difference_TTD)).max(axis=-1) > 1e-9
        block_T = np.arange(16) // 4
        reached_TT = np.tril(np.ones((16, 16), bool)).T
        np.testing.assert_array_equal(differs_TT, reached_TT if fam_length else reached_TT & (block_T[:, None] == block_T))


@pytest.mark.parametrize(("positions", "invariant"), [("last", True), ("fractional", True), ("zero", False)])
def test_where_the_document_begins(positions, invariant):
    """A document at positions from a million on, in float32: attention sees differences alone, unless FAM stands still."""
    model, tokens_BT = built(changed(TINY, fam_positions=positions, dtype="float32")), tokens_of(3, 2, 22)
    state = model.init_state(2)
    expected = read(model, tokens_BT, shifted(state, jnp.zeros(2, jnp.int32)))[0]
    found = read(model, tokens_BT, shifted(state, jnp.array([1_000_000, 1 << 24], jnp.int32)))[0]
    chex.assert_trees_all_close(read(model, tokens_BT, state)[0], expected, atol=1e-6)
    difference = np.abs(np.asarray(found - expected)).max()
    assert difference < 2e-5 if invariant else difference > 1e-2


def test_gradients_stop_where_they_are_asked_to(float64):
    """Of the last of four blocks, by the block they come from; one layer, so that nothing else carries them further."""
    tokens_1T = np.arange(16, dtype=np.int32)[None]

    def reached(**options):
        model = built(changed(TINY, layers=1, **options))

        def loss(model):
            return jnp.sum(jnp.sin(model.hidden(tokens_1T, model.init_state(1))[0][:, 12:]))

        gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(model)
        return [bool(np.any(block)) for block in np.split(np.asarray(gradient.embedding.table[:16]), 4)]

    assert reached(fam_length=0) == [False, False, True, True]
    assert reached(fam_length=0, stop_memory_gradient=True) == [False, False, False, True]
    assert reached(memory_blocks=0) == [True, True, True, True]
    assert reached(memory_blocks=0, detach_every=2) == [False, False, True, True]


@pytest.mark.parametrize("options", [{}, {"fam_query": "static", "fam_positions": "fractional"}])
def test_blocks_read_again(options, float64):
    """FAM is as after a text that has the blocks so many times, tokens as at the first of them: exact with one layer, whose keys stay."""
    config = FamConfig(
        vocab_size=17, dim=16, layers=1, heads=4, block=4, memory_blocks=0, fam_length=3, dtype="float64", training_rereads=2, **options
    )
    model, key, (B, N, C) = models.build(config, nnx.Rngs(0)), jax.random.key(3), (2, 5, config.block)
    tokens_BNC = np.random.default_rng(5).integers(0, 17, (B, N, C), np.int32)
    documents_BN = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 3]], np.int32)
    rereads = draw_rereads(key, N, B, config.training_rereads)
    order_BJ = np.asarray(rereads.block_JB.T)
    assert order_BJ.shape == (B, 3 * N)
    assert all(set(row) == set(range(N)) for row in order_BJ)
    segments = lambda documents: np.repeat(documents, C, axis=1)
    for documents in (None, documents_BN):
        found_BTD, state = model.hidden(
            tokens_BNC.reshape(B, -1), model.init_state(B), None if documents is None else segments(documents), dropout_key=key
        )
        long_BJC = np.take_along_axis(tokens_BNC, order_BJ[..., None], axis=1)
        ids = None if documents is None else segments(np.take_along_axis(documents, order_BJ, axis=1))
        expected_BSD, expected = model.hidden(long_BJC.reshape(B, -1), model.init_state(B), ids)
        first_BN1 = np.asarray(rereads.first_NB.T)[..., None]
        expected_BND = np.take_along_axis(expected_BSD.reshape(B, 3 * N, -1), first_BN1, axis=1)
        np.testing.assert_allclose(found_BTD.reshape(B, N, -1), expected_BND, atol=1e-10)
        np.testing.assert_allclose(state.feedback.fam_LBFD, expected.feedback.fam_LBFD, atol=1e-10)
    # Without a key, as in evaluation, each block is read once.
    plain_BTD, _ = model.hidden(tokens_BNC.reshape(B, -1), model.init_state(B))
    assert np.abs(plain_BTD - model.hidden(tokens_BNC.reshape(B, -1), model.init_state(B), dropout_key=key)[0]).max() > 1e-3


def test_fam_is_passed_to_all_rows(float64):
    """An empty cache, positions from 0, and the first row's FAM; token by token as at once, and gradients flow to what is passed."""
    model, tokens_BT = built(TINY), tokens_of(4, 2, 9)
    _, before = read(model, tokens_BT, model.init_state(2))
    fam_LFD = before.feedback.fam_LBFD[:, 0]
    whole = read(model, tokens_BT, model.passed(model.init_state(2), fam_LFD))
    assert not np.any(whole[1].feedback.fresh_B)
    state, parts = model.passed(model.init_state(2), fam_LFD), []
    for t in range(9):
        hidden_B1D, state = read(model, tokens_BT[:, t : t + 1], state)
        parts.append(hidden_B1D)
    chex.assert_trees_all_close((jnp.concatenate(parts, axis=1), state), whole, atol=1e-10, rtol=1e-10)
    assert np.abs(np.asarray(whole[0] - read(model, tokens_BT, model.init_state(2))[0])).max() > 1e-3
    bswa = built(changed(TINY, fam_length=0))
    with pytest.raises(UserError, match=r"model\.fam_length is 0; a model without FAM has none to pass on"):
        bswa.passed(bswa.init_state(1), fam_LFD)


def test_bfloat16_keeps_fam_in_float32():
    model, plain, tokens_BT = built(changed(TINY, dtype="bfloat16")), built(changed(TINY, dtype="float32")), tokens_of(5, 2, 13)
    hidden_BTD, state = read(model, tokens_BT, model.init_state(2))
    expected_BTD, wide = read(plain, tokens_BT, plain.init_state(2))
    assert (hidden_BTD.dtype, state.feedback.fam_LBFD.dtype, state.cache.k_BSGK.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(hidden_BTD.astype(jnp.float32), expected_BTD, atol=0.2)
    np.testing.assert_allclose(state.feedback.fam_LBFD, wide.feedback.fam_LBFD, atol=0.2)


def test_on_a_mesh(float64):
    """Rows over data, heads over tensor: the same numbers. Sequences are not split."""
    model, tokens_BT = built(TINY), tokens_of(6, 4, 10)
    segments_BT = np.repeat([[1] * 6 + [2] * 4], 4, axis=0).astype(np.int32)
    run = lambda: jax.jit(lambda model: model.hidden(tokens_BT, model.init_state(4), segments_BT), compiler_options=QUICK)
    expected = jax.tree.map(np.asarray, run()(model))
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        found = run()(jax.device_put(model, sharding.shardings(model, mesh)))
        chex.assert_trees_all_close(jax.tree.map(np.asarray, found), expected, atol=1e-10, rtol=1e-10)
    assert found[1].cache.k_BSGK.sharding.spec[3] == "tensor"
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))),
        pytest.raises(UserError, match=r"mesh\.context is 2; with TransformerFAM, .* it must be 1"),
    ):
        model.hidden(tokens_BT, model.init_state(4))


def test_state_bytes_and_flops():
    """As the docstring of the state says, at any length; FAM's rows cost what they are."""
    sizes = {abstract_state_bytes(models.abstract(changed(TINY, dtype="float32")), length) for length in (1, 1 << 20)}
    L, S, F, G, K, D = 2, 8, 3, 2, 4, 16
    assert sizes == {L * (2 * (S + F) * G * K + F * D) * 4 + 8 * S + 29}
    rows = lambda config: config.flops_per_token(1 << 20) - changed(config, fam_length=0).flops_per_token(1 << 20)
    big = FamConfig(dim=256, block=256, fam_length=16)
    layer = changed(big, layers=1, fam_length=0).flops_per_token(1 << 20) - 2 * 256 * 257
    assert 1 / 16 < rows(big) / (4 * layer) < 1.5 / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, r"model\.block is 0; it must be 1 or more"),
        ({"memory_blocks": -1}, r"model\.memory_blocks is -1; it must be 0 or more"),
        ({"fam_length": -1}, r"model\.fam_length is -1; it must be 0 or more"),
        ({"fam_positions": "first"}, r"model\.fam_positions is first; it must be one of last, fractional, zero"),
        ({"fam_query": "none"}, r"model\.fam_query is none; it must be one of copy, static"),
        ({"schedule": "segments"}, r"model\.schedule is segments; it must be one of layers, blocks"),
        ({"training_rereads": 1, "schedule": "blocks"}, r"model\.training_rereads is 1; it needs model\.schedule"),
        ({"fam_limit": -1.0}, r"model\.fam_limit is -1, .*; it must be a number from 0 on, and 0 without FAM"),
        ({"fam_limit": float("nan")}, r"model\.fam_limit is nan, .*; it must be a number from 0 on"),
        ({"fam_limit": 4.0, "fam_length": 0}, r"model\.fam_limit is 4, with a model\.fam_length of 0; .* 0 without FAM"),
        ({"kv_heads": 3}, r"model\.heads is 4, which is not a multiple of model\.kv_heads, 3"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(UserError, match=message):
        changed(TINY, **options)
