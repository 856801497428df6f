"""Infini-attention's model: options do what they say, wrong ones are refused, both schedules are one function.

Shape letters as in infinicontext/models/infini.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.models import InfiniConfig, TransformerConfig
from infinicontext.nn.rope import RopeConfig

CONFIG = InfiniConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, segment=4, remat=False)
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (2, 23), np.int32)


@functools.cache
def parameters():
    return jax.tree.leaves(models.build(CONFIG, nnx.Rngs(0)))


def logits(config, *, key=None, leaves=None):
    """What a model with these options and the parameters of CONFIG says."""
    model = jax.tree.unflatten(jax.tree.structure(models.abstract(config)), parameters() if leaves is None else leaves)
    options = {} if key is None else {"dropout_key": key}
    return model.logits(model.hidden(TOKENS_BT, model.init_state(2), **options)[0])


def differs(one_BTV, other_BTV, start=0, end=None) -> bool:
    """Whether the logits of tokens `start` to `end` do."""
    return bool(np.any(np.abs(one_BTV - other_BTV)[:, start:end] > 1e-5))


@pytest.mark.parametrize(
    ("field", "value", "first"),
    [
        ("update", "linear", 8),  # the first token that is not as before: the second segment is the first to subtract
        ("empty_memory", "bypass", 0),
        ("normalizer_horizon", 1, 8),
        ("memory_epsilon", 100.0, 4),
        ("gate", "closed", 0),
        ("previous_segment", True, 4),
        ("segment", 5, 4),
    ],
)
def test_options_change_what_they_are_about(field, value, first):
    plain_BTV, other_BTV = logits(CONFIG), logits(dataclasses.replace(CONFIG, **{field: value}))
    assert not differs(plain_BTV, other_BTV, 0, first)
    assert differs(plain_BTV, other_BTV, first)


@pytest.mark.parametrize("memory_blocks", [0, 1])
def test_without_memory_it_is_a_block_window(memory_blocks):
    closed = dataclasses.replace(CONFIG, gate="closed", previous_segment=bool(memory_blocks))
    window = dataclasses.replace(CONFIG.transformer, attention="block_window", block=4, memory_blocks=memory_blocks)
    own = jax.tree_util.tree_leaves_with_path(models.build(CONFIG, nnx.Rngs(0)))
    shared = [leaf for path, leaf in own if "gate" not in jax.tree_util.keystr(path).split(".feed_forward")[0]]
    np.testing.assert_allclose(logits(closed), logits(window, leaves=shared), atol=1e-5)


def test_both_schedules_are_one_function(float64):
    def loss(leaves, schedule):
        config = dataclasses.replace(CONFIG, schedule=schedule, dtype="float64", detach_every=3)
        return jnp.sum(jnp.sin(logits(config, leaves=leaves)))

    wide = [leaf.astype(jnp.float64) for leaf in parameters()]
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for one, other in zip(*(jax.tree.leaves(gradient(wide, schedule)) for schedule in ("layers", "segments"))):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def test_training_draws_horizons():
    """Each row its own, the same for the same key; none without a key."""
    config = dataclasses.replace(CONFIG, training_horizons=(1, 5))
    assert config.has_dropout
    assert not CONFIG.has_dropout
    np.testing.assert_array_equal(logits(config), logits(CONFIG))
    of_horizon = [logits(dataclasses.replace(CONFIG, normalizer_horizon=horizon)) for horizon in range(1, 6)]
    drawn = set()
    for seed in range(5):
        drawn_BTV = logits(config, key=jax.random.key(seed))
        for row in range(2):
            drawn |= {h for h, as_if_BTV in enumerate(of_horizon, 1) if not differs(drawn_BTV[row : row + 1], as_if_BTV[row : row + 1])}
        segments_BTV = logits(dataclasses.replace(config, schedule="segments"), key=jax.random.key(seed))
        np.testing.assert_allclose(segments_BTV, drawn_BTV, atol=1e-5)
    assert len(drawn) > 2


def test_training_draws_dilutions():
    """Alike in both schedules; none in the first segment, none without a key, and another for another key."""
    config = dataclasses.replace(CONFIG, training_dilution=(2, 50))
    assert config.has_dropout
    np.testing.assert_array_equal(logits(config), logits(CONFIG))
    drawn_BTV, other_BTV = (logits(config, key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_allclose(drawn_BTV[:, : CONFIG.segment], logits(CONFIG)[:, : CONFIG.segment], atol=1e-5)
    assert all(differs(drawn_BTV, x_BTV) for x_BTV in (other_BTV, logits(CONFIG)))
    np.testing.assert_allclose(logits(dataclasses.replace(config, schedule="segments"), key=jax.random.key(0)), drawn_BTV, atol=1e-5)
    nothing = dataclasses.replace(config, training_dilution=(2, 1))
    np.testing.assert_allclose(logits(nothing, key=jax.random.key(0)), logits(CONFIG), atol=1e-5)


def test_rotary_tables_are_planned_for_what_attention_spans():
    """The same segment reads alike, however long the stream will be."""
    rope = RopeConfig("longrope", original_length=16, length=64, long_factors=(2.0, 3.0))
    model = models.build(dataclasses.replace(CONFIG, rope=rope), nnx.Rngs(0))
    short, long = (model(TOKENS_BT, model.init_state(2, capacity=capacity))[0] for capacity in (4, 64))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("update", "Delta", "linear, delta"),
        ("gate", "open", "learned, closed"),
        ("empty_memory", "bypas", "literal, bypass"),
        ("schedule", "parallel", "layers, segments"),
        ("dtype", "float16", "float32, bfloat16, float64"),
        ("memory_epsilon", float("nan"), "1e-12 or more"),
        ("memory_epsilon", 1e-20, "1e-12 or more"),
        ("norm_epsilon", 0.0, "greater than 0"),
        ("gate_init", float("nan"), "from -10 to 10"),
        ("gate_init", -100.0, "from -10 to 10"),
        ("training_horizons", (4, 2), "the smaller first"),
        ("training_horizons", (0, 2), "1 or more"),
        ("training_dilution", (0, 2), "1 or more"),
    ],
)
def test_refused(field, value, allowed):
    with pytest.raises(UserError, match=rf"model\.{field} is .*{allowed}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_transformer_with_the_same_weights():
    assert InfiniConfig.of(CONFIG.transformer, segment=4, remat=False) == CONFIG
    assert isinstance(CONFIG.transformer, TransformerConfig)
