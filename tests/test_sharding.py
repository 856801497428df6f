"""Training on several meshes is training on one device. Batches are [8, 33]: rows x (inputs + 1)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from infinicontext import sharding
from infinicontext.data.pipeline import PasskeyData
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.sharding import MESH_AXES, MeshConfig, make_mesh
from infinicontext.training.loop import make_steps, train
from infinicontext.training.optimizer import OptimizerConfig

ROWS, LENGTH, STEPS = 8, 32, 3
EXPERIMENT = Experiment(
    "tiny",
    TransformerConfig(vocab_size=64, dim=16, layers=1, heads=4, kv_heads=2, feed_forward=32, remat=False),
    PasskeyData(lengths=(128,)),
    NextToken("answers", context_weight=0.3, chunk=16),
    OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    steps=10,
    batch_size=ROWS,
)
MESHES = ((8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (2, 1, 2, 2))


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself multiplies dtypes that strict promotion refuses to mix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch_of(step):
    """Rows of two documents whose answers are of different number, so that no part of the batch weighs what another does."""
    rng = np.random.default_rng(step)
    segments = np.sort(rng.integers(1, 3, (ROWS, LENGTH + 1)), axis=1).astype(np.int32)
    inside = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)
    return {
        "tokens": rng.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32),
        "segment_ids": segments,
        "loss_mask": inside,
        "answer_mask": inside * (np.arange(LENGTH) >= rng.integers(0, LENGTH, (ROWS, 1))),
    }


def run(mesh, **changes):
    """Losses and gradient norms of three steps, validation loss after them, and the state."""
    experiment = dataclasses.replace(EXPERIMENT, **changes)
    with jax.set_mesh(mesh):
        steps = make_steps(experiment, mesh)
        state = steps.init(jax.random.key(0))
        where = jax.sharding.NamedSharding(mesh, P(sharding.RULES["batch"]))
        measured = []
        for step in range(STEPS):
            state, metrics = steps.train_step(state, jax.device_put(batch_of(step), where))
            measured.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        held_out = float(steps.validation_loss(state.model, jax.device_put(batch_of(STEPS), where)))
    return np.array(measured), held_out, state


@functools.cache
def on_one_device():
    return run(make_mesh(MeshConfig(), jax.devices()[:1]))


def assert_same_training(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=2e-5)
    np.testing.assert_allclose(one[1], other[1], rtol=2e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_meshes_agree_with_one_device(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    result = run(mesh)
    assert_same_training(result, on_one_device())

    model, optimizer = result[2].model, result[2].optimizer
    _, fsdp, _, tensor = sizes
    query, head = model.blocks.attention.q, model.embedding.head
    assert query[...].sharding.spec == P(None, "fsdp", "tensor", None)
    for parameter in (query, head):
        (piece,) = {shard.data.size for shard in parameter[...].addressable_shards}
        assert piece == parameter[...].size // (fsdp * tensor)
    moments = [leaf for leaf in jax.tree.leaves(optimizer) if leaf.shape == query[...].shape]
    assert len(moments) == 2
    assert {leaf.sharding.spec for leaf in moments} == {query[...].sharding.spec}
    assert state_is_consistent(result[2])


def state_is_consistent(state):
    """Devices that hold the same piece of a parameter hold the same numbers."""
    for leaf in jax.tree.leaves(state):
        pieces = {}
        for shard in leaf.addressable_shards:
            pieces.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        if any(not np.array_equal(copies[0], copy) for copies in pieces.values() for copy in copies):
            return False
    return True


def test_accumulation_changes_nothing():
    one_device = make_mesh(MeshConfig(), jax.devices()[:1])
    accumulated = run(one_device, accumulation=4)
    assert_same_training(accumulated, on_one_device())
    for one, other in zip(jax.tree.leaves(accumulated[2].model), jax.tree.leaves(on_one_device()[2].model)):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_accumulation_on_a_mesh():
    assert_same_training(run(make_mesh(MeshConfig(2, 2, 1, 2)), accumulation=2), on_one_device())


def test_first_state_is_the_same_on_every_mesh():
    """The seed decides the parameters, not the number of devices."""

    def first(mesh):
        with jax.set_mesh(mesh):
            return make_steps(EXPERIMENT, mesh).init(jax.random.key(3)).model

    one, other = first(make_mesh(MeshConfig(1, 4, 1, 2))), first(make_mesh(MeshConfig(), jax.devices()[:1]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_mesh_axes_and_divisor():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert sharding.batch_divisor(mesh) == 4


def test_rules():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 1, 2))
    spec = lambda axes, shape: sharding.partition_spec(axes, shape, mesh)
    assert spec(("embed", "heads", None), (8, 4, 3)) == P("fsdp", "tensor", None)
    assert spec(("heads", "mlp"), (4, 8)) == P("tensor", None)
    assert spec(("batch", "embed"), (8, 8)) == P(("data", "fsdp"), None)
    # What the mesh does not divide is not split, and leaves the mesh axis to the next dimension.
    assert spec(("vocab", "embed"), (257, 8)) == P(None, "fsdp")
    assert spec(("kv_heads", "mlp"), (1, 8)) == P(None, "tensor")
    assert spec(("batch", None), (6, 3)) == P(None, None)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 2))
    assert sharding.constrain(x, ("batch", None)) is x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, r"batch_size is 12; on this mesh it must be a multiple of 8 .*data 8 x fsdp 1 x accumulation 1"),
        ({"batch_size": 8, "accumulation": 2, "mesh": MeshConfig(fsdp=4)}, "batch_size is 8; .* multiple of 16"),
        ({"mesh": MeshConfig(2, 2, 1, 1)}, "mesh is data 2 x fsdp 2 x context 1 x tensor 1, but .* number of devices, 8"),
        ({"mesh": MeshConfig(tensor=3)}, "mesh is .* tensor 3, but its sizes must multiply to the number of devices, 8"),
        ({"mesh": MeshConfig(fsdp=16)}, "mesh is .* fsdp 16"),
    ],
)
def test_wrong_sizes_are_refused_before_a_folder_is_made(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(EXPERIMENT, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("data", 0), ("data", -2), ("fsdp", 0), ("context", -1), ("tensor", 0)])
def test_config_errors(name, value):
    with pytest.raises(UserError, match=rf"mesh\.{name} is {value}; it must be 1 or more"):
        MeshConfig(**{name: value})
