"""MEGALODON against the original implementation's outputs, gradients and carried state, and the properties that the stream law leaves out.

Shape letters as in infinicontext/models/megalodon.py.
"""

import dataclasses
import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.inference.norm_refresh import read_with_norm_refresh
from infinicontext.models.megalodon import PRESETS, Megalodon, MegalodonConfig
from infinicontext.models.streaming import read
from infinicontext.nn import cursor
from infinicontext.nn.cema import cema_tables, inference_tables
from infinicontext.nn.norms import rms_normalised
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import token_losses
from infinicontext.pretrained import megalodon as official
from infinicontext.pretrained.placement import parameter_paths
from infinicontext.training.optimizer import is_matrix

BOTH = pytest.mark.parametrize("name", ["model_a", "model_b"])
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
# float32: what the original loses in float32, rounded up.
LOGITS, OTHERS = {"float64": 1e-10, "float32": 2e-5}, {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture
def load(golden, tmp_path):
    """Loads one of the golden models; to be called with double precision enabled where the dtype needs it."""

    def load(name: str, dtype: str) -> Megalodon:
        file = golden / "megalodon" / f"{name}_weights.safetensors"
        with safetensors.safe_open(file, "numpy") as opened:
            config = json.loads(opened.metadata()["config"])
        (tmp_path / "config.json").write_text(json.dumps({"model": config}))
        (tmp_path / "consolidate_config.json").write_text('{"model_parallel_size": 1}')
        shutil.copy(file, tmp_path / "consolidated.safetensors")
        return official.load(tmp_path, dtype=dtype)

    return load


@pytest.fixture
def tensors(golden):
    """Arrays of a golden file, token ids as int32."""

    def tensors(name: str):
        arrays = load_file(golden / "megalodon" / f"{name}.safetensors")
        return {key: x.astype(np.int32) if x.dtype == np.int64 else x for key, x in arrays.items()}

    return tensors


def assert_close(a, b, tolerance):
    chex.assert_trees_all_close(jax.tree.map(lambda x: np.asarray(x, np.float64), a), b, atol=tolerance, rtol=tolerance)


def decode(model, tokens_BT, state):
    """One token per call."""
    state, logits_TBV = jax.lax.scan(lambda state, token_B: model(token_B[:, None], state)[::-1], state, tokens_BT.T)
    return logits_TBV[:, :, 0].swapaxes(0, 1), state


@pytest.mark.golden
@BOTH
@DTYPES
def test_logits_and_carried_state(name, dtype, load, tensors):
    """One chunk, several, packed, a length that is no multiple of a chunk, token by token; and the state after these two."""
    with jax.enable_x64(dtype == "float64"):
        model, expected = load(name, dtype), tensors(f"{name}_io")
        long_BT, short_BT, odd = expected["long.ids"], expected["short.ids"], expected["odd.logits"].shape[1]
        B = len(long_BT)
        run = jax.jit(lambda model, tokens_BT, segments_BT=None: model(tokens_BT, model.init_state(B), segments_BT))
        tolerance = LOGITS[dtype]
        long_BTV, _ = run(model, long_BT)
        assert_close(long_BTV, expected["long.logits"], tolerance)
        assert_close(long_BTV, expected["long.logits_f32"].astype(np.float64), LOGITS["float32"])
        assert_close(run(model, long_BT, np.ones_like(long_BT))[0], expected["long.logits"], tolerance)
        assert_close(run(model, short_BT)[0], expected["short.logits"], tolerance)
        odd_BTV, whole = run(model, long_BT[:, :odd])
        assert_close(odd_BTV, expected["odd.logits"], tolerance)
        one_by_one_BTV, decoded = jax.jit(decode)(model, long_BT[:, :odd], model.init_state(B))
        assert_close(one_by_one_BTV, expected["decode.logits"], tolerance)

        for state in (whole, decoded):
            for i in range(model.config.layers):
                layer = jax.tree.map(lambda x: x[i], state.layers)
                held, norm, of = int(expected[f"cache.{i}.chunk_pos"]), layer.norm, f"cache.{i}."
                found = (layer.cache.k_BSGK[:, :held], layer.cache.v_BSGK[:, :held], norm.count_B, norm.mean_BG, norm.variance_BG)
                keys = ("k", "v", "norm_count", "norm_mean", "norm_var")
                assert_close(found, tuple(expected[of + key].astype(np.float64) for key in keys), OTHERS[dtype])
                # A sum over many tokens, each of which is off by a few 1e-6 in float32.
                assert_close(np.stack(layer.cema, axis=-1), expected[of + "cema_h"], 5 * OTHERS[dtype])
            keys = ("count", "mean", "var")
            assert_close(state.final_norm[:3], tuple(expected[f"cache.final_norm_{key}"].astype(np.float64) for key in keys), OTHERS[dtype])


def layer_by_layer(model, tokens_BT):
    """What `hidden` computes, without scan: the embedding, each block's output, the final norm's."""
    state = model.init_state(len(tokens_BT))
    place, _ = cursor.advance(state.cursor, tokens_BT.shape[1])
    call, _ = model._call(state.cursor, place, packed=False)
    outputs = [model.embedding(tokens_BT)]
    x_BTD = outputs[0] * (model.config.dim**0.5 if model.config.scale_embeddings else 1)
    for i in range(model.config.layers):
        block, layer = jax.tree.map(lambda x: x[i], (model.blocks, state.layers))
        x_BTD, _ = block(x_BTD, layer, cema_tables(block.cema, model.config.dtype), call, None)
        outputs.append(x_BTD)
    return [*outputs, model.final_norm(x_BTD, state.final_norm)[0]]


@pytest.mark.golden
@BOTH
@DTYPES
def test_layer_outputs(name, dtype, load, tensors):
    with jax.enable_x64(dtype == "float64"):
        model, expected = load(name, dtype), tensors(f"{name}_io")
        found = jax.jit(layer_by_layer)(model, expected["long.ids"])
        names = ["embed", *(f"block{i}" for i in range(model.config.layers)), "final_norm"]
        assert_close(found, [expected[f"long.act.{name}"] for name in names], LOGITS[dtype])


@pytest.mark.golden
@BOTH
def test_inside_the_first_block(name, load, tensors, float64):
    """Each intermediate of the block, made of its own parts from the original's input to that part."""
    model, expected = load(name, "float64"), tensors(f"{name}_block0")
    found = jax.jit(intermediates)(model, expected)
    assert_close(found, {key: x.astype(np.float64) for key, x in expected.items()}, 1e-10)


def intermediates(model, given):
    """The intermediates of the first block by the original's names, each from those that the original has before it."""
    block, config = jax.tree.map(lambda x: x[0], model.blocks), model.config
    H, state, (_, T) = config.heads, model.init_state(1), given["ids"].shape
    layer = jax.tree.map(lambda x: x[0], state.layers)
    call, _ = model._call(state.cursor, cursor.advance(state.cursor, T)[0], packed=False)
    heads, flat = lambda x_BTZ: x_BTZ.reshape(1, T, H, -1), lambda x_BTHK: x_BTHK.reshape(1, T, -1)
    chunks = lambda x_BTHK: x_BTHK.reshape(-1, config.chunk, *x_BTHK.shape[2:])
    row = lambda parameter: parameter[...][None, None]
    project = lambda x_BTD, weight, bias: flat(jnp.einsum("btd,dhk->bthk", x_BTD, weight[...]) + row(bias))
    scale_2HK = (block.gamma[...] + 1) * (config.z_size // H) ** -0.5
    image = lambda i: flat(given["znorm"] * scale_2HK[i][None, None] + block.beta[...][i][None, None])
    q_BTHK, k_BTHK = block._queries_and_keys(heads(given["wz"]), call.rotation)
    gated_BTHU = heads(given["attn"] * jax.nn.silu(given["wr_presilu"]))
    feed_forward_BTD = block._feed_forward(given["ffn_norm"], None)
    attend = functools.partial(block._attend, packed=False, fresh=False)
    found = {
        "ids": given["ids"],
        "block_in": model.embedding(given["ids"]) * (config.dim**0.5 if config.scale_embeddings else 1),
        "timenorm": block.norm(given["block_in"], layer.norm)[0],
        "cema": block.cema(given["timenorm"], layer.cema)[0],
        "mx": block.cema_norm(given["cema"]),
        "wz": project(given["mx"], block.z, block.z_bias),
        "znorm": rms_normalised(heads(given["wz"]), config.norm_epsilon),
        "q": image(0),
        "k": image(1),
        "q_rot": chunks(q_BTHK),
        "k_rot": chunks(k_BTHK),
        "wv_presilu": project(given["timenorm"], block.value, block.value_bias),
        "v": jax.nn.silu(given["wv_presilu"]),
        "wr_presilu": project(given["mx"], block.gate, block.gate_bias),
        "attn": flat(attend(q_BTHK, k_BTHK, heads(given["v"]), call.place, layer.cache, call.slots, None)),
        "wh1": given["mx"] @ block.direct[...] + row(block.direct_bias),
        "wh2": jnp.einsum("bthk,hkd->btd", gated_BTHU, block.output[...]),
        "mega_out": given["block_in"] + given["wh1"] + given["wh2"],
        "ffn_norm": block.feed_forward_norm(given["mega_out"]),
        "fc1": given["ffn_norm"] @ block.feed_forward_in[...],
        "fc2": feed_forward_BTD if block.rescale is None else feed_forward_BTD / row(block.rescale),
        "block_out": given["block_in"] + feed_forward_BTD,
    }
    return found | ({"fc3": given["ffn_norm"] @ block.feed_forward_gated[...]} if config.swiglu else {})


@pytest.mark.golden
@BOTH
@DTYPES
def test_loss_and_gradients(name, dtype, load, tensors):
    with jax.enable_x64(dtype == "float64"):
        model, expected, io = load(name, dtype), tensors(f"{name}_grads"), tensors(f"{name}_io")

        def loss(model):
            hidden_BTD, _ = model.hidden(expected["ids"], model.init_state(len(expected["ids"])), np.ones_like(expected["ids"]))
            losses_BT = token_losses(model, hidden_BTD, expected["targets"])
            return jnp.mean(losses_BT), losses_BT

        (value, losses_BT), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
        assert_close((value, losses_BT), (expected["loss"], io["long.nll"]), OTHERS[dtype])
        found = dict(official._tensors(model.config, parameter_paths(gradient), np.dtype(np.float64)))
        wanted = {key.removeprefix("grad."): x for key, x in expected.items() if key.startswith("grad.")}
        assert_close({key: found[key] for key in wanted}, wanted, OTHERS[dtype])
        # Nothing else has a gradient.
        assert sum(x.size for x in wanted.values()) == parameter_count(model)


@pytest.mark.golden
@DTYPES
def test_long_scoring(dtype, load, tensors):
    """Plain streaming, and the original's scoring with refreshed norm statistics, which differ."""
    with jax.enable_x64(dtype == "float64"):
        model, expected = load("model_b", dtype), tensors("model_b_longeval")
        ids_BL, targets_BL = expected["ids"], expected["targets"]
        run = jax.jit(functools.partial(read_with_norm_refresh, visit=token_losses))
        assert_close(run(model, ids_BL, extra=targets_BL)[0], expected["nll_official"], LOGITS[dtype])
        stream = jax.jit(functools.partial(read, segment=model.config.chunk + 3, visit=token_losses))
        losses_BL, _ = stream(model, ids_BL, model.init_state(len(ids_BL)), extra=targets_BL)
        assert_close(losses_BL, expected["nll_streaming"], LOGITS[dtype])


@pytest.mark.golden
@BOTH
def test_bfloat16(name, load, tensors):
    """In bfloat16 the original's logits are off by up to 0.09; norms, CEMA and softmax are float32 here."""
    model, expected = load(name, "bfloat16"), tensors(f"{name}_io")
    logits_BTV, state = jax.jit(lambda model, ids_BT: model(ids_BT, model.init_state(len(ids_BT))))(model, expected["long.ids"])
    assert logits_BTV.dtype == jnp.float32
    assert_close(logits_BTV, expected["long.logits"], 0.1)
    assert {x.dtype for x in jax.tree.leaves((state.layers.norm, state.layers.cema))} == {jnp.dtype("float32"), jnp.dtype("int32")}


# --- Properties ---

TINY = MegalodonConfig.examples()["swiglu"]


def random_model(config=TINY, dtype="float32", seed=0):
    """Every parameter random, so that no term is invisible."""
    model = models.build(dataclasses.replace(config, dtype=dtype), nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model)


def random_tokens(*shape, config=TINY):
    return np.random.default_rng(1).integers(0, config.vocab_size, shape, dtype=np.int32)


def test_attention_ends_with_the_chunk(float64):
    """Without CEMA's output and with statistics that nothing moves, a chunk knows nothing of the one before."""
    C, model = TINY.chunk, random_model(dtype="float64")
    for part in (model.blocks.cema.gamma, model.blocks.cema.omega):
        part[...] = jnp.zeros_like(part[...])
    state = model.init_state(1)
    still = lambda norm: norm._replace(count_B=jnp.full_like(norm.count_B, 2**30))
    # At the start of a chunk, but not of a document, which would start with statistics of its own.
    one_B = jnp.ones(1, jnp.int32)
    start = state.cursor._replace(position_B=C * one_B, document_B=one_B, segment_B=one_B)
    state = model.init_state(1)._replace(
        cursor=start, layers=state.layers._replace(norm=still(state.layers.norm)), final_norm=still(state.final_norm)
    )
    tokens_1T = random_tokens(1, 3 * C)
    changed_1T = tokens_1T.copy()
    changed_1T[0, C - 1] += 1
    run = jax.jit(lambda tokens_BT, segments_BT: model(tokens_BT, state, segments_BT)[0])
    for segments_BT in (None, np.ones_like(tokens_1T)):
        apart_T = np.abs(run(tokens_1T, segments_BT) - run(changed_1T, segments_BT)).max(axis=(0, 2))
        assert np.all(apart_T[: C - 1] == 0)
        assert apart_T[C - 1] > 1e-3
        assert np.all(apart_T[C:] < 1e-7)


def test_rows_continue_from_their_own_places(float64):
    """Whole chunks read at once by rows that stand at different positions of a chunk equal the same tokens one by one."""
    C, model = TINY.chunk, random_model(dtype="float64")
    lengths = np.arange(2 * C)
    tokens_BT = random_tokens(len(lengths), 2 * C)
    state = jax.jit(model.hidden)(tokens_BT, model.init_state(len(lengths)), (np.arange(2 * C) < lengths[:, None]).astype(np.int32))[1]
    more_BT = random_tokens(len(lengths), 2 * C + 1)
    assert_close(jax.jit(model)(more_BT, state), jax.device_get(jax.jit(decode)(model, more_BT, state)), 1e-10)


@pytest.mark.parametrize("logit", [30.0, -30.0])
def test_saturated_averages_stay_finite(logit):
    model = random_model()
    for part in (model.blocks.cema.alpha, model.blocks.cema.delta):
        part[...] = jnp.full_like(part[...], logit)
    tokens_BT = random_tokens(2, 12)
    loss = lambda model: jnp.sum(model(tokens_BT, model.init_state(2))[0] ** 2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    chex.assert_tree_all_finite((value, gradient))


def test_dropout():
    """No key, no dropout; a key drops, reproducibly; also for a single token."""
    model, tokens_BT = random_model(), random_tokens(2, 12)
    run = jax.jit(lambda model, tokens_BT, key: model.hidden(tokens_BT, model.init_state(2), dropout_key=key)[0])
    plain_BTD = run(model, tokens_BT, None)
    for length in (12, 1):
        first, second, again = (run(model, tokens_BT[:, :length], jax.random.key(seed)) for seed in (0, 1, 0))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - second).max() > 1e-2
        assert np.abs(first - plain_BTD[:, :length]).max() > 1e-2


def test_each_kind_of_dropout():
    """Each rate alone matters, DropKey is not what post_softmax is, and without a key no rate does anything."""
    tokens_BT, none = random_tokens(2, 12), {"dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    kinds = [{name: 0.4} for name in none] + [{"attention_dropout": 0.4, "attention_dropout_mode": "dropkey"}]
    built = [random_model(dataclasses.replace(TINY, layers=1, **none | rates)) for rates in ({}, *kinds)]
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda model, key: model.hidden(tokens_BT, model.init_state(2), dropout_key=key)[0], compiler_options=quick)
    plain_BTD, *dropped = (run(model, jax.random.key(0)) for model in built)
    for i, one_BTD in enumerate(dropped):
        for other_BTD in (plain_BTD, *dropped[:i]):
            assert np.abs(one_BTD - other_BTD).max() > 1e-2
    for model in built[:2]:
        np.testing.assert_array_equal(run(model, None), plain_BTD)


# --- Configuration ---


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mega200M", 220_627_968),
        ("mega1.3B", 1_342_832_640),
        ("mega1.3B_pg19", 1_327_628_288),
        ("mega7.1B", 7_117_381_632),
        ("mega7.3B", 7_385_817_088),
        ("megalodon_7b_paper", 7_385_817_088),
    ],
)
def test_presets(name, count):
    assert parameter_count(models.abstract(PRESETS[name])) == count


def test_flops():
    """Twice the parameters that multiply, plus attention and CEMA, to within 2 percent."""
    config = PRESETS["megalodon_7b_paper"]
    dense = parameter_count(models.abstract(config)) - config.vocab_size * config.dim
    seen, width = (config.chunk + 1) / 2, config.z_size + config.value_size
    expected = 2 * (dense + config.layers * width * seen)
    assert config.flops_per_token(8 * config.chunk) == pytest.approx(expected, rel=0.02)
    assert config.flops_per_token(8 * config.chunk) == config.flops_per_token(config.chunk) > config.flops_per_token(1)


@pytest.mark.parametrize(
    ("mode", "std"), [("he", (3 * 512) ** -0.5), ("bert", 0.02), ("xavier", (2 / (512 + 768)) ** 0.5), ("gaussian", 0.987), ("none", 0)]
)
def test_initialisation(mode, std):
    config = MegalodonConfig(vocab_size=300, dim=512, layers=2, feed_forward=768, init_mode=mode, rescale_feed_forward=True)
    model = models.build(config, nnx.Rngs(0))
    weight = np.asarray(model.blocks.feed_forward_in[...])
    assert weight.std() == pytest.approx(std, rel=0.01, abs=1e-9)
    if mode == "xavier":
        assert np.abs(weight).max() <= std * 3**0.5
    assert not np.array_equal(weight[0], weight[1]) or mode == "none"
    table = np.asarray(model.embedding.table[...])
    assert table.std() == pytest.approx(0.987 * 512**-0.5, rel=0.02)
    assert np.abs(table).max() <= 3 * 512**-0.5 * 1.0001
    np.testing.assert_allclose(model.blocks.rescale[...][:, 0], [0.1, 0.05], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": 0}, "layers"),
        ({"z_dim": 6, "heads": 2}, "z_dim"),
        ({"value_dim": 5, "heads": 2}, "value_dim"),
        ({"norm_groups": 7}, "norm_groups"),
        ({"norm_groups": 128, "prior_count": 1}, "prior_count"),
        ({"rope_frequencies": (1.0,)}, "rope_frequencies"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"cema_block": 0}, "cema_block"),
        ({"init_mode": "foo"}, "init_mode"),
        ({"attention_dropout_mode": "foo"}, "attention_dropout_mode"),
        ({"dtype": "float16"}, "dtype"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
    ],
)
def test_config_errors(change, field):
    with pytest.raises(UserError, match=f"model.{field} is "):
        MegalodonConfig(**change)


def test_projections_and_embeddings_alone_decay():
    """Not CEMA, norms, biases, gamma and beta."""
    model = models.abstract(MegalodonConfig.examples()["swiglu"])
    parameters = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    decayed = {path[-1].name for path, parameter in parameters if is_matrix(parameter.get_metadata()["axes"])}
    blocks = {"z", "value", "gate", "direct", "output", "feed_forward_in", "feed_forward_gated", "feed_forward_out"}
    assert decayed == blocks | {"table", "head"}


def test_reading_with_tables_made_on_the_host():
    """As without them, in one call and token by token."""
    model = models.build(dataclasses.replace(MegalodonConfig.examples()["swiglu"], layers=2), nnx.Rngs(0))
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 12), np.int32)
    tables = inference_tables(model.blocks.cema, 4)
    hidden = jax.jit(model.hidden)
    expected_BTD, expected = hidden(tokens_BT, model.init_state(2))
    for size in (12, 1):
        state, parts = model.init_state(2), []
        for t in range(0, 12, size):
            part_BTD, state = hidden(tokens_BT[:, t : t + size], state, tables=tables)
            parts.append(part_BTD)
        chex.assert_trees_all_close((jnp.concatenate(parts, axis=1), state), (expected_BTD, expected), atol=2e-5)
    # They are what is read with.
    other_BTD, _ = hidden(tokens_BT, model.init_state(2), tables=tables._replace(kernel_DC=2 * tables.kernel_DC))
    assert np.abs(other_BTD - expected_BTD).max() > 1e-2
