"""Rotary position embedding: every scheme against reference tables, and the laws of rotation far out."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infinicontext.errors import UserError
from infinicontext.nn.rope import RopeConfig, apply_rope, fixed_point, rope_cos_sin, rope_table, rotation
from infinicontext.pretrained.huggingface_config import rope_from_huggingface

LONGROPE = RopeConfig(
    "longrope",
    factor=4.0,
    original_length=16,
    short_factors=(1.0, 1.1, 1.2),
    long_factors=(1.0, 2.0, 5.0),
    attention_factor=1.25,
    long_attention_factor=1.5,
)


@pytest.mark.golden
@pytest.mark.parametrize("file", ["rope_basic", "rope_yarn", "rope_longrope"])
def test_schemes_agree_with_the_reference(golden, file):
    with safe_open(golden / "longrope" / f"{file}.safetensors", "numpy") as tensors:
        cases = json.loads(tensors.metadata()["settings"])
        assert cases
        for name, case in cases.items():
            reference = {key: tensors.get_tensor(f"{name}.{key}") for key in ("inv_freq", "attention_factor", "positions", "cos", "sin")}
            table = rope_table(rope_from_huggingface(case), case["head_dim"], planned_length=case["seq_len_seen"])
            assert 2 * len(table.inverse_frequency) == case["rotary_dim"]
            np.testing.assert_allclose(table.inverse_frequency, reference["inv_freq"], rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(table.attention_factor, reference["attention_factor"].item(), rtol=1e-6, err_msg=name)
            tolerance_P1 = 1e-6 + 2.4e-7 * reference["positions"][:, None]  # the reference multiplies in float32
            for half_PR, key in zip(rope_cos_sin(fixed_point(table), jnp.asarray(reference["positions"])), ("cos", "sin")):
                assert (np.abs(np.tile(half_PR, 2) - reference[key]) <= tolerance_P1).all(), (name, key)


@pytest.mark.parametrize("last", [2000, 131071, 2097151, 2**31 - 1])
def test_float32_is_accurate_at_every_position(last):
    table = rope_table(RopeConfig(base=5e5), 64)
    positions_T = np.arange(last - 999, last + 1, dtype=np.int64).astype(np.int32)
    cos_TR, sin_TR = jax.jit(lambda positions_T: rope_cos_sin(fixed_point(table), positions_T))(positions_T)
    angle_TR = positions_T[:, None] * table.inverse_frequency
    assert cos_TR.dtype == sin_TR.dtype == jnp.float32
    np.testing.assert_allclose(cos_TR, np.cos(angle_TR), atol=1e-6, rtol=0)
    np.testing.assert_allclose(sin_TR, np.sin(angle_TR), atol=1e-6, rtol=0)


def test_float64_is_the_formula(float64):
    # 1e-11: the product itself is rounded so at 1e5 radians.
    table = rope_table(LONGROPE, 6, planned_length=17)
    positions_BT = np.array([[0, 1, 999], [4096, 65537, 100_000]], np.int32)
    cos_BTR, sin_BTR = jax.jit(lambda positions_BT: rope_cos_sin(fixed_point(table), positions_BT, jnp.float64))(positions_BT)
    angle_BTR = positions_BT[..., None] * table.inverse_frequency
    assert cos_BTR.dtype == jnp.float64
    np.testing.assert_allclose(cos_BTR, 1.5 * np.cos(angle_BTR), atol=1e-11, rtol=0)
    np.testing.assert_allclose(sin_BTR, 1.5 * np.sin(angle_BTR), atol=1e-11, rtol=0)


@jax.jit
def scores(q_BTHK, k_BTHK, position_q_BT, position_k_BT):
    """q . k after the rotation of 6 of the 8 dims, [B, T, H]."""
    table = rope_table(RopeConfig("ntk", factor=3.0, partial=0.75), 8)
    q_BTHK = apply_rope(q_BTHK, *rope_cos_sin(fixed_point(table), position_q_BT))
    k_BTHK = apply_rope(k_BTHK, *rope_cos_sin(fixed_point(table), position_k_BT))
    return jnp.sum(q_BTHK * k_BTHK, axis=-1)


@given(
    positions=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=4, max_size=4),
    shift=st.integers(0, 2**20),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=50)
def test_scores_depend_on_distance_only(positions, shift, seed):
    q_BTHK, k_BTHK = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 1, 4, 2, 8)), jnp.float32)
    position_q_BT, position_k_BT = jnp.asarray(np.array(positions, np.int32).T[:, None])
    near_BTH = scores(q_BTHK, k_BTHK, position_q_BT, position_k_BT)
    far_BTH = scores(q_BTHK, k_BTHK, position_q_BT + shift, position_k_BT + shift)
    chex.assert_trees_all_close(near_BTH, far_BTH, atol=2e-5)


def test_rotation_by_hand():
    """Pair i is dims i and i + R; the other dims pass through; one table may serve all rows."""
    x_BTHK = np.random.default_rng(0).standard_normal((2, 3, 2, 7)).astype(np.float32)
    angle_BTR = np.random.default_rng(1).standard_normal((2, 3, 2)).astype(np.float32)
    expected_BTHK = x_BTHK.copy()
    for b, t, h, i in np.ndindex(2, 3, 2, 2):
        turned = (x_BTHK[b, t, h, i] + 1j * x_BTHK[b, t, h, i + 2]) * np.exp(1j * angle_BTR[b, t, i])
        expected_BTHK[b, t, h, [i, i + 2]] = turned.real, turned.imag
    cos_BTR, sin_BTR = jnp.cos(angle_BTR), jnp.sin(angle_BTR)
    turned_BTHK = apply_rope(jnp.asarray(x_BTHK), cos_BTR, sin_BTR)
    np.testing.assert_allclose(turned_BTHK, expected_BTHK, atol=1e-6)
    np.testing.assert_array_equal(turned_BTHK[..., 4:], x_BTHK[..., 4:])
    chex.assert_trees_all_close(apply_rope(x_BTHK[:1], cos_BTR[0], sin_BTR[0]), turned_BTHK[:1], atol=1e-7)


def test_bfloat16_turns_in_float32_and_gradients_turn_back():
    cos_sin = rope_cos_sin(fixed_point(rope_table(RopeConfig(partial=0.5), 8)), jnp.arange(5, dtype=jnp.int32))
    x_BTHK, w_BTHK = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 8), jnp.bfloat16)
    turned_BTHK = apply_rope(x_BTHK, *cos_sin)
    assert turned_BTHK.dtype == jnp.bfloat16
    wide_BTHK = apply_rope(x_BTHK.astype(jnp.float32), *cos_sin)
    np.testing.assert_array_equal(turned_BTHK, wide_BTHK.astype(jnp.bfloat16))
    gradient_BTHK = jax.grad(lambda x_BTHK: jnp.sum(w_BTHK.astype(jnp.float32) * apply_rope(x_BTHK, *cos_sin)))(wide_BTHK)
    chex.assert_trees_all_close(gradient_BTHK, apply_rope(w_BTHK.astype(jnp.float32), cos_sin[0], -cos_sin[1]), atol=1e-6)


def test_longrope_takes_the_long_factors_above_the_original_length():
    default_R = rope_table(RopeConfig(), 6).inverse_frequency
    short, long = (rope_table(LONGROPE, 6, planned_length) for planned_length in (16, 17))
    np.testing.assert_allclose(default_R / short.inverse_frequency, LONGROPE.short_factors)
    np.testing.assert_allclose(default_R / long.inverse_frequency, LONGROPE.long_factors)
    assert (short.attention_factor, long.attention_factor) == (1.25, 1.5)


@pytest.mark.parametrize(("length", "plan"), [(None, 16), (16, 16), (64, 17)])
def test_longrope_plans_for_the_configured_length(length, plan):
    config = RopeConfig("longrope", original_length=16, length=length, factor=4.0, long_factors=(1.0, 2.0, 5.0))
    chex.assert_trees_all_equal(rope_table(config, 6), rope_table(config, 6, planned_length=plan))


def test_dynamic_is_default_up_to_the_original_length_and_ntk_beyond():
    dynamic = RopeConfig("dynamic", factor=2.0, original_length=16)
    for planned_length in (None, 5, 16):
        chex.assert_trees_all_equal(rope_table(dynamic, 8, planned_length), rope_table(RopeConfig(), 8))
    assert (rope_table(dynamic, 8, 17).inverse_frequency[1:] < rope_table(RopeConfig(), 8).inverse_frequency[1:]).all()
    chex.assert_trees_all_close(rope_table(dynamic, 8, 40), rope_table(RopeConfig("ntk", factor=2 * 40 / 16 - 1), 8), rtol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        LONGROPE,
        RopeConfig("longrope", original_length=16, length=64, long_factors=(1.0, 2.0, 5.0)),
        RopeConfig("dynamic", factor=2.0, original_length=16),
        RopeConfig("linear", factor=2.0),
    ],
    ids=lambda config: config.scheme,
)
def test_each_row_turns_by_the_table_of_its_plan(config):
    """Rows planned for different lengths, in one batch and one compiled function, equal rows with a table of their own."""
    chex.clear_trace_counter()
    positions_BT = np.array([[0, 3, 15], [15, 16, 70], [0, 999, 70], [1, 2, 3]], np.int32)
    run = jax.jit(chex.assert_max_traces(lambda positions_BT, planned_B: rotation(config, 6, positions_BT, planned_B), n=1))
    # `dynamic` rounds its frequencies to float32, 1e-7 of at most 1,000 radians.
    tolerance = 2e-4 if config.scheme == "dynamic" else 1e-6
    for planned_B in ([16, 17, 1000, 0], [1, 2**31 - 1, 71, 16]):
        cos_BTR, sin_BTR = run(positions_BT, np.array(planned_B, np.int32))
        for row, planned in enumerate(planned_B):
            table = rope_table(config, 6, planned)
            angle_TR = positions_BT[row][:, None] * table.inverse_frequency
            chex.assert_trees_all_close(cos_BTR[row], table.attention_factor * np.cos(angle_TR), atol=tolerance)
            chex.assert_trees_all_close(sin_BTR[row], table.attention_factor * np.sin(angle_TR), atol=tolerance)


def test_ntk_raises_the_base_in_rotary_dims():
    rotary, s = 6, 8.0
    table = rope_table(RopeConfig("ntk", original_length=16, length=128, partial=0.75), 8)
    raised = rope_table(RopeConfig(base=10000.0 * s ** (rotary / (rotary - 2))), rotary)
    chex.assert_trees_all_close(table, raised, rtol=1e-12)


def test_yarn_clamps_its_ramp_to_the_dims():
    """Unclamped, the ramp would run from pair -1 to pair 8; clamped it runs from 0 to 7, the last of the 8 dims."""
    config = RopeConfig("yarn", base=50.0, factor=4.0, original_length=10000, beta_fast=4000.0)
    slow_R = np.arange(4) / 7
    expected_R = rope_table(RopeConfig(base=50.0), 8).inverse_frequency * (1 - slow_R + slow_R / 4)
    np.testing.assert_allclose(rope_table(config, 8).inverse_frequency, expected_R, rtol=1e-12)


def test_yarn_with_equal_bounds_is_a_step():
    """Ten turns in the original length fall between pairs 1 (25 turns) and 2 (8 turns)."""
    config = RopeConfig("yarn", base=100.0, factor=4.0, original_length=500, beta_fast=10.0, beta_slow=10.0, truncate=False)
    ratio_R = rope_table(config, 8).inverse_frequency / rope_table(RopeConfig(base=100.0), 8).inverse_frequency
    np.testing.assert_allclose(ratio_R, [1, 1, 0.25, 0.25])


@pytest.mark.parametrize("scheme", ["linear", "ntk", "yarn", "llama3", "longrope"])
def test_factor_defaults_to_the_ratio_of_lengths(scheme):
    factors = {"long_factors": (1.0, 2.0, 3.0)} if scheme == "longrope" else {}
    by_lengths, by_factor = (RopeConfig(scheme, original_length=4096, **factors, **given) for given in ({"length": 16384}, {"factor": 4.0}))
    chex.assert_trees_all_close(rope_table(by_lengths, 6, 5000), rope_table(by_factor, 6, 5000), rtol=1e-12)


def test_old_huggingface_names():
    factors = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    new = {
        "max_position_embeddings": 64,
        "rope_parameters": {
            **factors, "rope_type": "longrope", "rope_theta": 5e5, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16
        },
    }  # fmt: skip
    config = rope_from_huggingface(new)
    assert config == RopeConfig(
        "longrope", base=5e5, partial=0.5, original_length=16, length=64, short_factors=(1.0, 1.1), long_factors=(2.0, 3.0)
    )
    old = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    for scheme in ("su", "yarn", "longrope"):
        inner = {**factors, "type": scheme, "original_max_position_embeddings": 32}
        assert rope_from_huggingface({**old, "rope_scaling": inner}) == config
    scaled = rope_from_huggingface({**old, "rope_scaling": {**factors, "type": "su", "short_mscale": 1.2, "long_mscale": 1.3}})
    assert (scaled.short_attention_factor, scaled.long_attention_factor) == (1.2, 1.3)
    assert rope_from_huggingface({"rope_theta": 5e5, "rope_scaling": None, "max_position_embeddings": 64}) == RopeConfig(base=5e5)


LENGTHS = {"factor": 4.0, "original_length": 16}
LISTS = {**LENGTHS, "long_factors": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("scheme", {"scheme": "rotary"}),
        ("base", {"base": 1.0}),
        ("partial", {"partial": 0.0}),
        ("partial", {"partial": 1.5}),
        ("factor", {"factor": 2.0}),
        ("beta_fast", {"scheme": "llama3", **LENGTHS, "beta_fast": 8.0}),
        ("factor", {"scheme": "linear"}),
        ("factor", {"scheme": "ntk", "length": 16}),
        ("factor", {"scheme": "linear", "factor": 0.5}),
        ("factor", {"scheme": "yarn", "factor": float("nan"), "original_length": 16}),
        ("factor", {"scheme": "dynamic", "original_length": 16, "length": 64}),
        *(("original_length", {"scheme": scheme, "factor": 2.0}) for scheme in ("dynamic", "yarn", "llama3", "longrope")),
        ("original_length", {"scheme": "yarn", "factor": 2.0, "original_length": 1}),
        ("length", {"scheme": "linear", "original_length": 16, "length": 8}),
        ("length", {"scheme": "linear", "factor": 2.0, "length": 0}),
        ("beta_slow", {"scheme": "yarn", **LENGTHS, "beta_slow": 0.0}),
        ("beta_fast", {"scheme": "yarn", **LENGTHS, "beta_fast": 0.5}),
        ("low_frequency_factor", {"scheme": "llama3", **LENGTHS, "low_frequency_factor": 0.0}),
        ("high_frequency_factor", {"scheme": "llama3", **LENGTHS, "high_frequency_factor": 1.0}),
        ("attention_factor", {"scheme": "yarn", **LENGTHS, "attention_factor": 0.0}),
        ("long_factors", {"scheme": "longrope", **LENGTHS}),
        ("long_factors", {"scheme": "longrope", **LENGTHS, "long_factors": (1.0, 0.0)}),
        ("short_factors", {"scheme": "longrope", **LISTS, "short_factors": (-1.0, 1.0)}),
        ("short_attention_factor", {"scheme": "longrope", **LISTS, "short_attention_factor": -1.0}),
        ("long_attention_factor", {"scheme": "longrope", **LISTS, "long_attention_factor": 0.0}),
    ],
)
def test_wrong_fields_are_named(field, fields):
    with pytest.raises(UserError, match=rf"^rope\.{field} is "):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    ("field", "config", "head_dim"),
    [
        ("partial", RopeConfig(), 7),
        ("partial", RopeConfig(partial=0.75), 4),
        ("partial", RopeConfig(partial=0.1), 8),
        ("long_factors", RopeConfig("longrope", **LISTS), 6),
        ("long_factors", RopeConfig("longrope", **LISTS, partial=0.5), 4),
        ("short_factors", RopeConfig("longrope", **LISTS, short_factors=(1.0,)), 4),
    ],
)
def test_what_does_not_fit_the_head_is_named(field, config, head_dim):
    with pytest.raises(UserError, match=rf"^rope\.{field} "):
        rope_table(config, head_dim)


@pytest.mark.parametrize(
    ("message", "config"),
    [
        ("^rope_type is mrope;", {"rope_parameters": {"rope_type": "mrope"}}),
        ("^rope_parameters has an entry for sliding_attention;", {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}),
        (r"^rope\.factor is None;", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear"}}),
    ],
)
def test_what_huggingface_may_ask_for_in_vain(message, config):
    with pytest.raises(UserError, match=message):
        rope_from_huggingface(config)


def test_rope_of_neighbours():
    """Dims 2i and 2i + 1 turn as one complex number."""
    x_BTHK = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 6)), jnp.float32)
    angle_TR = np.arange(5)[:, None] * np.array([1.0, 0.3, 0.1])
    turned = apply_rope(x_BTHK, jnp.asarray(np.cos(angle_TR), jnp.float32), jnp.asarray(np.sin(angle_TR), jnp.float32), neighbours=True)
    expected = (np.asarray(x_BTHK[..., ::2]) + 1j * np.asarray(x_BTHK[..., 1::2])) * np.exp(1j * angle_TR)[None, :, None]
    np.testing.assert_allclose(turned, np.stack([expected.real, expected.imag], axis=-1).reshape(x_BTHK.shape), atol=1e-6)
