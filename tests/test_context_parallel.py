"""A MEGALODON whose tokens, channels or heads are split over devices is the one on a single device, and moves little between them.

Documents of 40 tokens over four shards of 10 with chunks of 5: some begin inside a shard, some at its border, one chunk crosses a border.
"""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from infinicontext import models, sharding
from infinicontext.data.pipeline import PasskeyData
from infinicontext.experiment import Experiment
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.nn import attention, context, cursor
from infinicontext.nn.cema import cema_tables
from infinicontext.objectives.next_token import NextToken, token_losses, token_weights
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.step import make_steps

B, T, D, N, G, C = 2, 40, 16, 3, 4, 5
CONFIG = MegalodonConfig(
    vocab_size=17,
    dim=D,
    layers=2,
    heads=4,
    z_dim=16,
    value_dim=24,
    feed_forward=20,
    cema_order=N,
    chunk=C,
    norm_groups=G,
    cema_block=4,
    dtype="float64",
    remat=False,
)
CONTEXT_4 = MeshConfig(data=2, context=4)
OBJECTIVE = NextToken(chunk=16)
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (B, T), np.int32)
SEGMENTS_BT = np.stack([np.repeat([1, 2, 3, 4, 0], [7, 3, 13, 10, 7]), np.repeat([1, 5, 6], [20, 11, 9])]).astype(np.int32)
BATCH = {
    "tokens": np.pad(TOKENS_BT, ((0, 0), (0, 1))),
    "segment_ids": np.pad(SEGMENTS_BT, ((0, 0), (0, 1))),
    "loss_mask": np.pad((SEGMENTS_BT[:, 1:] == SEGMENTS_BT[:, :-1]) & (SEGMENTS_BT[:, 1:] > 0), ((0, 0), (0, 1))).astype(np.float32),
    "answer_mask": np.zeros((B, T), np.float32),
}
# Most of the time is compilation, half of that for speed that tiny sizes do not need.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def model_and_state():
    """A model and its state after 7 tokens, in the middle of a chunk."""
    model = models.build(CONFIG, nnx.Rngs(0))
    _, state = jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT[:, 11:18], model.init_state(B), np.ones((B, 7), np.int32))
    return model, state


def read(model, state, batch):
    """Training loss, what is read, the state after it, and gradients of the parameters and of what was read before."""
    tokens_BT, segments_BT = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(model, memories):
        hidden_BTD, after = model.hidden(tokens_BT, state._replace(layers=state.layers._replace(**memories)), segments_BT)
        losses_BT = token_losses(model, hidden_BTD, batch["tokens"][:, 1:], chunk=OBJECTIVE.chunk)
        weights_BT = token_weights(OBJECTIVE, batch).astype(losses_BT.dtype)
        return jnp.sum(weights_BT * losses_BT), (jnp.where(segments_BT[..., None] > 0, hidden_BTD, 0), after)

    (value, seen), gradients = loss(model, {"cema": state.layers.cema, "cache": state.layers.cache})
    return value, seen, gradients


read = jax.jit(read, compiler_options=QUICK)


@functools.cache
def unpacked_on_one_device():
    model, state = model_and_state()
    return jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT, state)


def whole(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(a, b, tolerance=1e-10):
    chex.assert_trees_all_close(whole(a), whole(b), atol=tolerance, rtol=tolerance)


def collectives(compiled, kinds="all-gather|all-reduce|collective-permute|all-to-all", dtypes="f32|f64"):
    """Number of elements of each array of these dtypes that devices exchange."""
    results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled.as_text())
    shapes = re.findall(rf"\b(?:{dtypes})\[([\d,]*)\]", " ".join(results))
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (2, 1, 2, 2), (1, 2, 1, 4)], ids=lambda sizes: "x".join(map(str, sizes)))
def test_meshes_equal_one_device(sizes, float64):
    """Outputs, final state and gradients: packed documents and padding, going on from a state in the middle of a chunk."""
    expected, mesh = read(*model_and_state(), BATCH), make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        model, state = whole(model_and_state())
        model = jax.device_put(model, sharding.shardings(model, mesh))
        assert_close(read(model, state, BATCH), expected)
        empty = jax.jit(model.init_state, static_argnums=0)(B)
    # Memories are split by rows and by channels, groups and heads.
    rows, tensor = sizes[0] * sizes[1], sizes[3]
    piece = lambda x: x.sharding.shard_shape(x.shape)
    assert piece(empty.layers.cema.real_BDN) == (2, B // rows, D // tensor, N)
    assert piece(empty.layers.norm.mean_BG) == (2, B // rows, G // tensor)
    assert piece(empty.layers.cache.k_BSGK) == (2, B // rows, C, 4 // tensor, 4)


def test_one_long_document(float64):
    """Without segment ids, chunks that cross the borders of shards; and no device sees the whole sequence of even one row."""
    (model, state), expected = whole(model_and_state()), unpacked_on_one_device()
    with jax.set_mesh(make_mesh(CONTEXT_4)):
        compiled = jax.jit(model.hidden).lower(TOKENS_BT, state).compile(compiler_options=QUICK)
        assert_close(compiled(TOKENS_BT, state), expected)
    assert 0 < max(collectives(compiled)) < T * D


@pytest.mark.parametrize("length", [16, 18])
def test_any_length(length, float64):
    """Shards shorter than a chunk, and a length that four devices cannot share."""
    model, state = whole(model_and_state())
    with jax.set_mesh(make_mesh(CONTEXT_4)):
        hidden_BTD, _ = jax.jit(model.hidden, compiler_options=QUICK)(TOKENS_BT[:, :length], state)
    assert_close(hidden_BTD, unpacked_on_one_device()[0][:, :length])


def test_only_states_are_gathered(float64):
    """Of the moving average and of the norm. Rows are whole here, so that all gathering is over the context axis."""
    model, _ = model_and_state()
    block = jax.tree.map(lambda x: x[0], model.blocks)
    x_BTD, starts_BT = np.ones((B, T, D)), np.zeros((B, T), bool)
    mesh = make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))

    def gathered(function):
        with jax.set_mesh(mesh):
            compiled = jax.jit(function, in_shardings=place, out_shardings=(place, None)).lower(x_BTD, starts_BT).compile()
        assert collectives(compiled, "all-reduce|collective-permute|all-to-all") == []
        return max(collectives(compiled, "all-gather"))

    def cema(x_BTD, starts_BT):
        state = block.cema.init_state(B, "float64")
        return context.cema(block.cema, x_BTD, state, starts_BT, None, cema_tables(block.cema, "float64", 4))

    assert gathered(cema) == 4 * B * D * N < B * T * D
    assert (
        gathered(lambda x_BTD, starts_BT: context.timestep_norm(block.norm, x_BTD, block.norm.init_state(B, "float64"), starts_BT))
        == 4 * B * G
    )


def test_gradient_of_a_bfloat16_cache():
    key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, 1, 4), jnp.bfloat16) for key in (key_q, key_k, key_v))
    cache = attention.Cache(k[:, :C], v[:, :C])
    start = cursor.start(B)._replace(position_B=jnp.full(B, 3, jnp.int32), segment_B=jnp.ones(B, jnp.int32))
    slots = attention.empty_slots(B, C)

    def attend(q, k, v, place, cache, slots, dropout):
        return attention.chunk_attention(q, k, v, cache, place.position_BT[:, 0] % C)

    def loss(cache):
        place, _ = cursor.advance(start, T)
        o = context.attention(attend, q, k, v, place, cache, slots, None)
        return jnp.sum(jnp.square(o.astype(jnp.float32)))

    expected = jax.jit(jax.grad(loss))(cache)
    with jax.set_mesh(make_mesh(CONTEXT_4)):
        q, k, v, cache, start, slots = whole((q, k, v, cache, start, slots))
        found = jax.jit(jax.grad(loss))(cache)
    as_float = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    assert_close(as_float(found), as_float(expected), 1e-2)
    assert np.abs(as_float(found)[1]).max() > 0.1


def test_dropout_over_shards():
    """Every rate at once: loss and gradients are finite, and repeat with the key."""
    config = dataclasses.replace(CONFIG, dtype="float32", layers=1, dropout=0.2, hidden_dropout=0.2, attention_dropout=0.2)
    model, mesh = models.build(config, nnx.Rngs(0)), make_mesh(CONTEXT_4)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.value_and_grad
    def loss(model, key):
        hidden_BTD, _ = model.hidden(TOKENS_BT, model.init_state(B), SEGMENTS_BT, dropout_key=key)
        return jnp.sum(jnp.square(jnp.where(SEGMENTS_BT[..., None] > 0, hidden_BTD, 0)))

    with jax.set_mesh(mesh):
        placed = jax.device_put(model, sharding.shardings(model, mesh))
        first, again, other = (loss(placed, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_tree_all_finite(whole(first))
    assert first[0] == again[0] != other[0]


def test_a_training_step(float64):
    """Loss and gradient norm; here layers are computed again in the backward pass."""
    experiment = Experiment("tiny", dataclasses.replace(CONFIG, remat=True), PasskeyData(lengths=(128,)), OBJECTIVE, batch_size=B)
    model, _ = model_and_state()
    loss, _, (gradient, _) = read(model, model.init_state(B), BATCH)
    mesh, model = make_mesh(CONTEXT_4), whole(models.build(experiment.model, nnx.Rngs(0)))
    # optax itself multiplies dtypes that strict promotion refuses to mix.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        steps = make_steps(experiment, mesh)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.RULES["batch"]))
        state, batch = steps.begin(jax.device_put(model, sharding.shardings(model, mesh))), jax.device_put(BATCH, rows)
        _, metrics = steps.train_step.lower(state, batch).compile(compiler_options=QUICK)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-10)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-6)
