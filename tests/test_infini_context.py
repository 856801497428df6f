"""An Infini-attention model whose tokens are split over devices is the one on a single device, and moves little between them.

Documents of 40 tokens over four shards of 10 with segments of 4: borders of shards lie inside segments and documents.
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import models, sharding
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.sharding import MeshConfig, make_mesh

B, T, K = 2, 40, 4
DELTA = InfiniConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=20, segment=4, dtype="float64", remat=False)
CONFIGS = {
    "delta": InfiniConfig(**(vars(DELTA) | {"detach_every": 3})),
    "linear": InfiniConfig(
        **(vars(DELTA) | {"update": "linear", "previous_segment": True, "empty_memory": "bypass", "normalizer_horizon": 2})
    ),
}
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (B, T), np.int32)
SEGMENTS_BT = np.stack([np.repeat([1, 2, 3, 0], [17, 3, 13, 7]), np.repeat([1, 5], [20, 20])]).astype(np.int32)
# Most of the time is compilation, half of that for speed that tiny sizes do not need.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def model_and_state(name):
    """A model and its state after 7 tokens, in the middle of a segment."""
    model = models.build(CONFIGS[name], nnx.Rngs(0))
    _, state = jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT[:, 11:18], model.init_state(B), np.ones((B, 7), np.int32))
    return model, state


@functools.partial(jax.jit, compiler_options=QUICK)
def read(model, state, segments_BT):
    """What is read, the state after it, and gradients of the parameters and of what was read before."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(model, before):
        hidden_BTD, after = model.hidden(TOKENS_BT, state._replace(cache=before[0], memory=before[1]), segments_BT)
        after_memory = sum(jnp.sum(jnp.cos(x)) for x in after.memory)
        valid_BTD = jnp.where(segments_BT[..., None] > 0, hidden_BTD, 0)
        return jnp.sum(jnp.sin(valid_BTD)) + after_memory, (valid_BTD, after)

    (_, seen), gradients = loss(model, (state.cache, state.memory))
    return seen, gradients


def whole(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_split_equals_one_device(name, float64):
    """Outputs, final state and gradients: packed documents and padding, going on from a state in the middle of a segment."""
    expected, mesh = whole(read(*model_and_state(name), SEGMENTS_BT)), make_mesh(MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        model, state = whole(model_and_state(name))
        model = jax.device_put(model, sharding.shardings(model, mesh))
        found = read(model, state, SEGMENTS_BT)
    chex.assert_trees_all_close(whole(found), expected, atol=1e-10, rtol=1e-10)


def test_dilution_is_that_of_one_device(float64):
    """And horizons, as training draws them."""
    config = dataclasses.replace(CONFIGS["delta"], training_horizons=(1, 4), training_dilution=(3, 20))
    model = models.build(config, nnx.Rngs(0))
    read = jax.jit(lambda model: model.hidden(TOKENS_BT, model.init_state(B), SEGMENTS_BT, dropout_key=jax.random.key(1)))
    expected, mesh = whole(read(model)), make_mesh(MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        found = whole(read(jax.device_put(whole(model), sharding.shardings(model, mesh))))
    chex.assert_trees_all_close(found, expected, atol=1e-10, rtol=1e-10)


def test_no_sequence_is_gathered(float64):
    """Only what shards do to the memory; what does not fit the devices is read by the plain call."""
    model, state = whole(model_and_state("delta"))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        compiled = jax.jit(model.hidden).lower(TOKENS_BT, state).compile(compiler_options=QUICK)
        found = compiled(TOKENS_BT, state)
        odd_BTD, _ = jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT[:, :18], state)
    model, state = model_and_state("delta")
    expected = jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT, state)
    chex.assert_trees_all_close(whole(found), whole(expected), atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(odd_BTD, expected[0][:, :18], atol=1e-10)
    kinds = r"all-gather|all-reduce|collective-permute|all-to-all"
    results = " ".join(re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled.as_text()))
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\bf64\[([\d,]*)\]", results)]
    # For the delta rule, of all shards: what a held and an open part of [K, K] become, and how that depends on both before.
    assert max(sizes) == 4 * B * 2 * K * 3 * K < B * T * 16
