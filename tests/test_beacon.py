"""Activation Beacon against the official code, its two ways of reading, and its properties (test_stream_law.py has more)."""

import dataclasses
import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from infinicontext import models, pretrained
from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import BeaconConfig, chunk_start, compacted_plan, ratio_by_length
from infinicontext.nn.rope import RopeConfig, apply_rope, rotation
from infinicontext.pretrained.beacon_config import beacon_from_huggingface

INTERLEAVED = (
    *("llama_il_basic", "llama_il_exact", "llama_il_batch2", "llama_il_stream", "llama_il_mixed", "llama_il_sink", "llama_il_raw_mix"),
    *("llama_il_parallel2", "qwen2_il_basic", "qwen2_il_mixed", "qwen2_il_sink", "qwen2_il_stream"),
)
APPENDED = (
    *("llama_ap_full", "llama_ap_step_prev", "llama_ap_step_noprev"),
    *(
        f"v1_llama_{scheme}{kind}"
        for scheme in ("step_expansion", "full_coverage", "segmentation")
        for kind in ("", "_noprev", "_halfstride")
    ),
)
TOLERANCE = 1e-4  # of the reference data's README: float32 on both sides
CONFIG = BeaconConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, chunk=8, ratios=(2,), remat=False)
QUICK = {"xla_backend_optimization_level": 0}


def tensors_of(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


class Golden:
    """One case, and a folder with its weights as the official code saves them."""

    def __init__(self, golden, tmp_path, case):
        self.tensors, meta = tensors_of(golden / "beacon" / f"{case}.safetensors")
        weights = golden / "beacon" / meta["weights"]
        record = json.loads(meta["config"] if "config" in meta else tensors_of(weights)[1]["config"])
        if case.startswith("v1"):
            record.setdefault("beacon_attend_previous", True)
        shutil.copy(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(record | {"beacon_ratio_mix": "sequence"}))
        self.folder, self.record, self.model = tmp_path, record, pretrained.load(tmp_path)
        self.tokens_BT = self["input_ids"]

    def __getitem__(self, name):
        return self.tensors[name]

    def start(self, model):
        return model.init_state(len(self.tokens_BT), capacity=self.tokens_BT.shape[1])


@functools.partial(jax.jit, compiler_options=QUICK)
def read(model, tokens_BT, state):
    logits_BTV, state = model(tokens_BT, state)
    return logits_BTV, state


@pytest.mark.golden
@pytest.mark.parametrize("case", INTERLEAVED + APPENDED)
def test_logits(golden, tmp_path, case):
    """All at once (appended beacons: chunk by chunk) and token by token."""
    data = Golden(golden, tmp_path, case)
    at_once = jax.jit(lambda model, tokens_BT: model(tokens_BT, data.start(model))[0], compiler_options=QUICK)
    np.testing.assert_allclose(at_once(data.model, data.tokens_BT), data["logits"], atol=TOLERANCE)
    parts, state = [], data.start(data.model)
    for t in range(data.tokens_BT.shape[1]):
        part_BTV, state = read(data.model, data.tokens_BT[:, t : t + 1], state)
        parts.append(part_BTV)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), data["logits"], atol=TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("case", INTERLEAVED + APPENDED)
def test_caches(golden, tmp_path, case):
    """What the memory and the open chunk hold, and where it stands: the official caches are not rotated, and number their rows from 0."""
    data = Golden(golden, tmp_path, case)
    _, state = read(data.model, data.tokens_BT, data.start(data.model))
    config, B = data.model.config, len(data.tokens_BT)
    start_B1 = chunk_start(config, state.cursor.count_B)[:, None]
    order_BS = np.where((state.rows.document > 0) & (state.rows.order >= 2 * start_B1), state.rows.order, np.iinfo(np.int32).max)
    from_BS = np.argsort(order_BS, axis=1)
    for layer in range(config.layers):
        parts = {}
        for kind in ("sink", "beacon", "raw"):
            for name in "kv":
                stored = data.tensors.get(f"final.{kind}_{name}.{layer}")
                empty = np.zeros((B, 0, config.kv_head_count, config.head_size), np.float32)
                parts[kind, name] = (
                    empty if stored is None else np.moveaxis(stored.reshape(B, config.kv_head_count, -1, config.head_size), 1, 2)
                )
        k_BYGK, v_BYGK = (np.concatenate([parts[kind, name] for kind in ("sink", "beacon", "raw")], axis=1) for name in "kv")
        Y, rows = k_BYGK.shape[1], parts["raw", "k"].shape[1]
        M = Y - rows
        np.testing.assert_array_equal(state.counts.used_B, M)
        np.testing.assert_array_equal((order_BS < np.iinfo(np.int32).max).sum(axis=1), rows)
        turns = rotation(config.rope, config.head_size, np.arange(Y, dtype=np.int32)[None], np.zeros(1, np.int32))
        expected = (apply_rope(jnp.asarray(k_BYGK), *turns), v_BYGK)
        for memory_LBM, open_LBS, wanted_BY in zip(state.memory, state.open, expected):
            opened_BS = np.take_along_axis(np.asarray(open_LBS[layer]), from_BS[:, :rows, None, None], axis=1)
            found_BY = np.concatenate([memory_LBM[layer, :, :M], opened_BS], axis=1)
            np.testing.assert_allclose(found_BY, wanted_BY, atol=TOLERANCE)


@pytest.mark.golden
def test_training(golden, tmp_path):
    """Loss and gradients of all that beacons have; a document's last chunk has none."""
    data = Golden(golden, tmp_path, "llama_train")
    tokens_BT = data.tokens_BT

    def loss(model):
        hidden_BTD, _ = model.hidden(tokens_BT, data.start(model), dropout_key=jax.random.key(0))
        logits_BTV = model.logits(hidden_BTD)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), tokens_BT[:, 1:, None], axis=2)), logits_BTV

    (found, logits_BTV), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(data.model)
    np.testing.assert_allclose(found, data["loss"][0], atol=TOLERANCE)
    np.testing.assert_allclose(logits_BTV, data["logits"], atol=TOLERANCE)
    pretrained.save(gradient, tmp_path / "gradient", family="llama")
    gradients, _ = tensors_of(tmp_path / "gradient" / "model.safetensors")
    names = [name for name in data.tensors if name.startswith("grad.")]
    assert len(names) == 1 + 3 * data.model.config.layers
    for name in names:
        np.testing.assert_allclose(gradients[name.removeprefix("grad.")], data[name], atol=TOLERANCE, err_msg=name)
    last = data.model.config.layers - 1
    assert not np.any(gradients[f"model.layers.{last}.self_attn.beacon_q_proj.weight"])


@pytest.mark.golden
def test_ratio_by_length(golden):
    for row in json.loads((golden / "beacon" / "adapt_ratio.json").read_text()):
        ratios = tuple(row["ratios"])
        positions = int(row["max_position_embeddings"] * row.get("rope_factor", 1))
        config = BeaconConfig(chunk=row["window"], ratios=ratios, choose="by_length", positions=positions)
        assert ratio_by_length(config, jnp.array([row["seq_len"] + row["future"]]))[0] == row["ratio"], row


@pytest.mark.golden
@pytest.mark.parametrize("case", ["llama_il_mixed", "qwen2_il_sink", "llama_ap_step_noprev", "v1_llama_segmentation_halfstride"])
def test_checkpoints_come_back(golden, tmp_path, case):
    """Written for the official code and read again: the same tensors, the same config."""
    data = Golden(golden, tmp_path, case)
    pretrained.save(data.model, tmp_path / "again", like=data.folder)
    tensors, _ = tensors_of(tmp_path / "again" / "model.safetensors")
    chex.assert_trees_all_equal(tensors, tensors_of(data.folder / "model.safetensors")[0])
    assert pretrained.load(tmp_path / "again").config == data.model.config
    missing = {name: value for name, value in tensors.items() if "beacon_k" not in name}
    save_file(missing, tmp_path / "again" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.beacon_k_proj\.weight is missing"):
        pretrained.load(tmp_path / "again")


APPEND = {"beacon_pos": "append"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"beacon_ratio_mix": "nonsense"}, r"beacon_ratio_mix nonsense; it must be one of step-random, .*, or adapt- and a number"),
        ({"beacon_attn": "segmentation"}, "beacon_attn segmentation; with beacon_pos interleave it must be full-coverage"),
        ({"beacon_stride": 4}, "beacon_stride 4; with beacon_pos interleave it must be 8"),
        ({"beacon_ratio": [2, 3, 4, 16]}, {"ratios": (2, 4)}),
        ({"beacon_ratio": [3]}, "model.ratios is"),
        (APPEND | {"beacon_attend_prev": False}, {"append_sees_beacons": True}),
        (APPEND | {"beacon_attend_prev": False, "beacon_attn": "step-expansion"}, {"append_sees_beacons": False}),
        ({"beacon_ratio_mix": "adapt-1024"}, {"choose": "by_length", "positions": 32}),
    ],
)
def test_official_configs(changes, expected):
    """As the official code reads them, or refused."""
    record = {"beacon_window": 8, "beacon_stride": 8, "beacon_ratio": [2], "max_position_embeddings": 32} | changes
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            beacon_from_huggingface(record, CONFIG.transformer)
        return
    config = beacon_from_huggingface(record, CONFIG.transformer)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"ratios": (2, 4), "choose": "by_length", "positions": 32}, None),
        ({"placement": "append"}, None),
        ({"placement": "append", "append_sees": "stepwise", "append_sees_beacons": False, "sinks": 1}, None),
        ({"placement": "append", "append_sees_beacons": False, "append_sees_memory": False, "stride": 4}, None),
        ({"placement": "append", "append_sees_memory": False}, "append_sees_memory False, .* neither version"),
        ({"placement": "append", "append_sees": "segment"}, "append_sees is segment, .* neither version"),
        ({"memory": 8}, r"model\.memory is 8; the official code"),
        (
            {"choose": "by_length", "positions": 32, "rope": RopeConfig("dynamic", factor=2.0, original_length=20)},
            r"model\.positions is 32; with model\.rope\.scheme dynamic, .*, it must be 40",
        ),
    ],
)
def test_written_for_the_official_code(tmp_path, options, refused):
    """What comes back is the same model, or nothing is written."""
    model = models.build(dataclasses.replace(CONFIG, **options, remat=True), nnx.Rngs(0))
    if refused:
        with pytest.raises(UserError, match=refused):
            pretrained.save(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return
    pretrained.save(model, tmp_path / "new")
    assert pretrained.load(tmp_path / "new").config == model.config


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": 1},
        {"sinks": 1, "ratios": (4, 0, 2, 1)},
        {"memory": 7, "ratios": (2, 4)},
        {"memory": 12, "ratios": (1, 2, 4), "choose": "by_room"},
    ],
)
def test_at_once_equals_chunk_by_chunk(options, float64):
    """Hidden states, state and gradients, with documents and padding."""
    config = dataclasses.replace(CONFIG, **options, dtype="float64")
    model, T = models.build(config, nnx.Rngs(0)), 45
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, T), np.int32)
    segments_BT = np.stack([np.repeat([1, 2, 3], [21, 4, 20]), np.repeat([1, 2, 0], [3, 33, 9])]).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, state=None):
        def loss(model):
            before = model.init_state(2, capacity=T) if state is None else state
            hidden_BTD, after = model.hidden(tokens_BT, before, segments_BT)
            hidden_BTD = jnp.where(segments_BT[..., None] > 0, hidden_BTD, 0)
            return jnp.sum(jnp.sin(hidden_BTD)) + jnp.sum(jnp.cos(after.memory.k_BSGK)), (hidden_BTD, after)

        return jax.value_and_grad(loss, has_aux=True)(model)

    one, other = run(model), run(model, model.init_state(2, capacity=T))
    chex.assert_trees_all_close(one[0], other[0], atol=1e-10, rtol=1e-10)
    # Parameters are float32.
    chex.assert_trees_all_close(one[1], other[1], atol=1e-5, rtol=1e-5)


@pytest.mark.golden
def test_backbone(golden, tmp_path):
    """The same weights without beacons."""
    tensors, meta = tensors_of(golden / "beacon" / "llama_backbone.safetensors")
    weights, sizes = tensors_of(golden / "beacon" / meta["weights"])
    save_file({name: value for name, value in weights.items() if "beacon" not in name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | json.loads(sizes["config"])))
    model, tokens_BT = pretrained.load(tmp_path), tensors["input_ids"]
    logits_BTV, _ = model(tokens_BT, model.init_state(len(tokens_BT), capacity=tokens_BT.shape[1]))
    np.testing.assert_allclose(logits_BTV, tensors["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_one_layer_and_short_texts(length):
    """At once, where there may be no beacon at all, and token by token."""
    model = models.build(dataclasses.replace(CONFIG, layers=1, ratios=(4,)), nnx.Rngs(0))
    tokens_BT = np.random.default_rng(3).integers(0, 17, (2, length), np.int32)
    whole_BTD, _ = model.hidden(tokens_BT, model.init_state(2, capacity=length))
    parts, state = [], model.init_state(2, capacity=length)
    for t in range(length):
        part_BTD, state = model.hidden(tokens_BT[:, t : t + 1], state)
        parts.append(part_BTD)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BTD, atol=2e-5)


def with_and_without_beacons(config):
    """Logits of 12 tokens, and those of the Transformer with the same weights."""
    model = models.build(config, nnx.Rngs(0))
    own = dict(jax.tree_util.tree_leaves_with_path(model))
    transformer = jax.tree_util.tree_map_with_path(lambda path, _: own[path], models.abstract(config.transformer))
    tokens_BT = np.random.default_rng(1).integers(0, 17, (2, 12), np.int32)
    return [x(tokens_BT, x.init_state(2, capacity=12))[0] for x in (model, transformer)]


def test_before_the_first_beacon_it_is_the_transformer():
    found, expected = with_and_without_beacons(dataclasses.replace(CONFIG, ratios=(4,)))
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=1e-5)
    assert np.all(np.abs(found - expected)[:, 4:].max(axis=2) > 1e-4)


def test_the_first_chunk_of_appended_beacons_is_the_transformer():
    found, expected = with_and_without_beacons(dataclasses.replace(CONFIG, placement="append"))
    np.testing.assert_allclose(found[:, :8], expected[:, :8], atol=1e-5)


@pytest.mark.parametrize("each", ["per_chunk", "per_row"])
def test_training_draws_ratios(each):
    """For each chunk or each row; none in the last chunk, and nothing without a key."""
    config = dataclasses.replace(CONFIG, ratios=(2, 4, 8), training_ratios=each)
    tokens_BT = np.random.default_rng(2).integers(0, 17, (2, 32), np.int32)
    model = models.build(config, nnx.Rngs(0))
    run = lambda model, key=None: model.hidden(tokens_BT, model.init_state(2, capacity=32), dropout_key=key)[0]
    plain, one, other = run(model), run(model, jax.random.key(0)), run(model, jax.random.key(1))
    np.testing.assert_array_equal(one, run(model, jax.random.key(0)))
    assert np.any(one[:, :24] != other[:, :24])
    assert np.any(one != plain)
    # Short texts have no beacons in training.
    short = lambda key: model.hidden(tokens_BT[:, :8], model.init_state(2, capacity=8), dropout_key=key)[0]
    np.testing.assert_array_equal(short(jax.random.key(0)), short(jax.random.key(1)))
    whole = models.build(dataclasses.replace(config, training_bare_end=False, training_ratios="in_turn"), nnx.Rngs(0))
    np.testing.assert_array_equal(run(whole, jax.random.key(0)), run(whole))
    # Slots that a row of four chunks fills, the last of which has no beacons.
    fill = jax.jit(lambda key: model.hidden(tokens_BT, model.init_state(2, capacity=32), dropout_key=key)[1].counts.used_B)
    used = {int(slots) for key in range(20) for slots in fill(jax.random.key(key))}
    assert used == {3, 6, 12} if each == "per_row" else len(used) > 3


def test_ratio_0_is_the_transformer():
    """Beacons can be switched off: every chunk is kept as it is."""
    found, expected = with_and_without_beacons(dataclasses.replace(CONFIG, ratios=(0,)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_positions_that_tables_are_planned_for():
    """They go on growing where the oldest slots are dropped."""
    config = dataclasses.replace(CONFIG, memory=8)
    model = models.build(config, nnx.Rngs(0))
    _, state = jax.jit(model.hidden, compiler_options=QUICK)(np.zeros((1, 120), np.int32), model.init_state(1))
    assert 60 <= state.rows.position.max() <= compacted_plan(config, jnp.array([120]))[0]


def test_a_memory_that_drops_what_is_oldest():
    """It is as large as ever after any text, and then what it dropped changes nothing."""
    model = models.build(dataclasses.replace(CONFIG, memory=8), nnx.Rngs(0))
    empty = model.init_state(1)
    assert model.room(empty) is None
    tokens_1T = np.random.default_rng(4).integers(0, 17, (1, 75), np.int32)
    read = jax.jit(model.hidden, compiler_options=QUICK)
    hidden_1TD, state = read(tokens_1T, empty)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, empty)
    # Of two layers the second reaches the beacons of two chunks back; those of the first layer know nothing but that they are beacons.
    changed = lambda end: read(np.where(np.arange(75) < end, 0, tokens_1T), empty)[0]
    np.testing.assert_allclose(changed(48)[:, 64:], hidden_1TD[:, 64:], atol=2e-5)
    assert np.abs(changed(56) - hidden_1TD)[:, 64:].max() > 1e-3


def test_ratios_by_room():
    """Each of three ratios fills a third of the memory, and the greatest goes on."""
    model = models.build(dataclasses.replace(CONFIG, ratios=(8, 1, 2), memory=30, choose="by_room"), nnx.Rngs(0))
    state, used, read = model.init_state(1), [], jax.jit(model.hidden, compiler_options=QUICK)
    for _ in range(16):
        _, state = read(np.zeros((1, 8), np.int32), state)
        used.append(int(state.counts.used_B[0]))
    assert used == [8, 16, 20, *range(21, 34)]


def test_capacity():
    model = models.build(CONFIG, nnx.Rngs(0))
    with pytest.raises(UserError, match="capacity is None"):
        model.init_state(1)
    tokens_BT = np.zeros((1, 30), np.int32)
    state = model.init_state(1, capacity=20)
    with pytest.raises(UserError, match="room for 23 more tokens, not for 30"):
        model.hidden(tokens_BT, state)
    hidden_BTD, _ = jax.jit(model.hidden)(tokens_BT, state)
    np.testing.assert_array_equal(np.isnan(hidden_BTD).any(axis=2)[0], np.arange(30) >= 23)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("ratios", (), "numbers that divide"),
        ("ratios", (3,), "numbers that divide the chunk's 8 tokens, or 0"),
        ("ratios", (-2,), "numbers that divide"),
        ("sinks", 9, "from 0 to model.chunk, 8"),
        ("stride", 4, "model.placement"),
        ("choose", "best", "in_turn, by_length, by_room"),
        ("placement", "inside", "interleave, append"),
        ("chunk", 0, "1 or more"),
    ],
)
def test_refused(field, value, allowed):
    with pytest.raises(UserError, match=rf"model\.{field} is .*{allowed}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_refused_together():
    with pytest.raises(UserError, match=r"model\.memory is 3; it must be None or 4"):
        dataclasses.replace(CONFIG, memory=3)
    with pytest.raises(UserError, match=r"model\.sinks is 1; with a model\.memory, 8, which drops"):
        dataclasses.replace(CONFIG, memory=8, sinks=1)
    with pytest.raises(UserError, match=r"model\.memory is None; to choose by room"):
        dataclasses.replace(CONFIG, choose="by_room")
    with pytest.raises(UserError, match=r"model\.positions is None"):
        dataclasses.replace(CONFIG, choose="by_length")
    with pytest.raises(UserError, match=r"model\.stride is 4; .*without sinks"):
        dataclasses.replace(CONFIG, placement="append", stride=4, sinks=1)
