"""What a training step begins with: rows that go on from step to step, random state passing, random positions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_training import final_parameters, metrics, stop_when

from infinicontext import models, sharding
from infinicontext.data.pipeline import CorpusData, PasskeyData, train_batches
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models import AdaptedConfig, FamConfig, InfiniConfig, TransformerConfig
from infinicontext.nn.lora import Lora
from infinicontext.objectives.next_token import token_weights, weighted_loss
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.carry import state_before
from infinicontext.training.checks import check_devices
from infinicontext.training.loop import train
from infinicontext.training.optimizer import OptimizerConfig
from infinicontext.training.step import make_steps

TINY = {"vocab_size": 257, "dim": 16, "layers": 2, "heads": 2, "feed_forward": 24, "remat": False}
FAM = FamConfig(**TINY, block=8, memory_blocks=1, fam_length=3)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself multiplies dtypes that strict promotion refuses to mix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of many lengths, longer and shorter than rows, read on from step to step."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(map(str, rng.integers(0, 999, rng.integers(1, 60)))))
    return CorpusData(str(folder), length=20, order="sequential", validation_fraction=0.1)


@pytest.fixture(scope="module")
def passing(corpus):
    return Experiment(
        "passing", FAM, corpus, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1), steps=4, batch_size=4, carry="fam"
    )


@pytest.fixture(scope="module")
def going_on(passing):
    return dataclasses.replace(passing, carry="rows", model=InfiniConfig(**TINY, segment=8))


@pytest.fixture(scope="module")
def fam_going_on(passing):
    return dataclasses.replace(passing, carry="rows")


def run(experiment, mesh=None, count=3):
    """The states before and after each of the first steps, their batches and losses."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        steps = make_steps(experiment, mesh)
        states, losses = [steps.init(jax.random.key(0))], []
        where = jax.sharding.NamedSharding(mesh, P(sharding.RULES["batch"]))
        batches = list(itertools.islice(train_batches(experiment.data, experiment.batch_size, seed=0, step=0), count))
        for batch in batches:
            # A step takes its state's memory.
            state, measured = steps.train_step(jax.tree.map(jnp.copy, states[-1]), jax.device_put(batch, where))
            states.append(state)
            losses.append(float(measured["loss"]))
    return states, batches, losses


def loss_from(experiment, model, state, batch):
    """The loss of a batch read from a state, and the state after it."""
    batch = batch | {"weights": token_weights(experiment.objective, batch)}
    loss, after = jax.jit(lambda model, state: weighted_loss(experiment.objective, model, batch, None, state))(model, state)
    return float(loss), after


@pytest.mark.parametrize("name", ["going_on", "fam_going_on"])
def test_rows_go_on(name, request):
    """Each step's loss is that of one stream per row, whose earlier part was read with the parameters of then."""
    going_on = request.getfixturevalue(name)
    states, batches, losses = run(going_on)
    state = states[0].model.init_state(4, 20)
    for before, after, batch, loss in zip(states, states[1:], batches, losses):
        expected, state = loss_from(going_on, before.model, state, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after.carried, state)
    assert np.asarray(state.cursor.count_B).tolist() == [60] * 4
    alone, _ = loss_from(going_on, states[2].model, None, batches[2])
    assert abs(alone - losses[2]) > 1e-4, "what was read before should matter"


def test_rows_that_end_begin_anew(going_on):
    """After the corpus' last row comes its first: another document, though its id is smaller."""
    states, batches, _ = run(going_on, count=1)
    model, batch = states[1].model, batches[0]
    last = states[1].carried._replace(cursor=states[1].carried.cursor._replace(segment_B=jnp.full(4, 9999, jnp.int32)))
    # Segments are a grid over all that a row has read.
    empty = model.init_state(4, 20)
    empty = empty._replace(cursor=empty.cursor._replace(count_B=last.cursor.count_B))
    read = jax.jit(lambda state: model.hidden(batch["tokens"][:, :8], state, batch["segment_ids"][:, :8])[0])
    np.testing.assert_allclose(read(last), read(empty), atol=1e-5)


@pytest.mark.parametrize("kind", [FAM, AdaptedConfig(FAM, Lora(rank=2))], ids=["fam", "adapted"])
def test_fam_is_passed(passing, kind):
    """With probability 1 each step but the first begins with the FAM that the first row of the step before ended with, and nothing else."""
    experiment = dataclasses.replace(passing, model=kind, carry_probability=1.0)
    states, batches, losses = run(experiment)
    model = lambda state: state.model.merged() if isinstance(kind, AdaptedConfig) else state.model
    expected, after = loss_from(experiment, model(states[0]), None, batches[0])
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    for before, batch, loss in list(zip(states, batches, losses))[1:]:
        np.testing.assert_allclose(before.carried, after.feedback.fam_LBFD[:, 0], atol=1e-5)
        start = model(before).passed(model(before).init_state(4, 20), before.carried)
        expected, after = loss_from(experiment, model(before), start, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_first_row_is_passed_whatever_the_accumulation(passing):
    experiment = dataclasses.replace(passing, carry_probability=1.0)
    one, other = run(experiment), run(dataclasses.replace(experiment, accumulation=2))
    np.testing.assert_allclose(one[2], other[2], rtol=2e-5)
    np.testing.assert_allclose(one[0][-1].carried, other[0][-1].carried, atol=1e-4)


def test_no_fam_is_passed_with_probability_0(passing):
    never = run(dataclasses.replace(passing, carry_probability=0.0))[2]
    assert never == pytest.approx(run(dataclasses.replace(passing, carry="nothing"))[2], rel=1e-6)
    assert never[1:] != pytest.approx(run(dataclasses.replace(passing, carry_probability=1.0))[2][1:], rel=1e-6)


def test_one_coin_per_step(passing):
    """About eight of ten steps, the same ones for the same seed, and all rows of a step alike."""
    states, _, _ = run(passing, count=1)
    ids = np.ones((4, 20), np.int32)
    assert not np.any(states[0].carried)
    begun = state_before(passing, states[0].model, states[0].carried, jnp.int32(1), ids)
    assert not np.any(begun.feedback.document_B), "there is nothing yet to pass on"
    begins = jax.jit(lambda model, step: state_before(passing, model, states[1].carried, step, ids).feedback.document_B)
    coins = np.array([begins(states[1].model, step) for step in range(200)])
    assert (coins == coins[:, :1]).all()
    assert 140 < coins[:, 0].sum() < 180


def test_rotary_tables_are_planned_for_the_longest_document(passing):
    """As where nothing is passed on."""
    model, ids_BT = models.build(FAM, nnx.Rngs(0)), np.repeat([[1] * 5 + [2] * 15], 4, axis=0).astype(np.int32)
    begun = state_before(passing, model, jnp.ones((2, 3, 16)), jnp.int32(1), ids_BT)
    assert begun.cursor.planned_B.tolist() == [15] * 4


def test_a_fam_that_has_read_nothing_is_not_passed(passing):
    """Rows shorter than a block leave FAM the prompt's, which the next step has anyway, and with another first update."""
    model = dataclasses.replace(FAM, block=32)
    found, expected = (run(dataclasses.replace(passing, model=model, carry=carry, carry_probability=1.0)) for carry in ("fam", "nothing"))
    assert found[2] == pytest.approx(expected[2], rel=1e-6)
    assert not np.any(found[0][-1].carried)


@pytest.mark.parametrize("positions", ["last", "zero"])
def test_random_offsets(passing, positions):
    """Rotary attention sees no offset, except where FAM has no positions of its own."""
    model = dataclasses.replace(FAM, fam_positions=positions)
    plain = dataclasses.replace(passing, model=model, carry_probability=1.0)
    offset = dataclasses.replace(plain, model=dataclasses.replace(model, random_offsets=True))
    states, batches, losses = run(offset)
    begun = state_before(offset, states[1].model, states[1].carried, jnp.int32(1), batches[1]["segment_ids"][:, :-1])
    offsets = np.asarray(begun.cursor.position_B)
    assert 0 < (offsets == 0).sum() < 4
    assert offsets.max() > 1000
    other = state_before(offset, states[1].model, states[1].carried, jnp.int32(1), batches[1]["segment_ids"][:, :-1], microbatch=1)
    assert offsets.tolist() != other.cursor.position_B.tolist()
    assert (other.feedback.document_B == begun.feedback.document_B).all()
    same = np.allclose(losses, run(plain)[2], rtol=1e-4)
    assert same == (positions == "last")


@pytest.mark.parametrize("name", ["passing", "going_on"])
def test_devices_change_nothing(name, request):
    experiment = request.getfixturevalue(name)
    one, other = run(experiment), run(experiment, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(one[2], other[2], rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), one[0][-1].carried, other[0][-1].carried)


@pytest.mark.parametrize("name", ["passing", "going_on", "fam_going_on"])
def test_a_resumed_run_is_the_unbroken_one(name, request, tmp_path, monkeypatch):
    experiment = dataclasses.replace(request.getfixturevalue(name), batch_size=8, log_every=1)
    assert train(experiment, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        stop_when(patch, 2)
        assert not train(experiment, tmp_path / "broken")
    assert train(experiment, tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")
    for one, other in zip(*(final_parameters(experiment, tmp_path / folder) for folder in ("broken", "unbroken"))):
        np.testing.assert_array_equal(one, other)


def test_config_errors(passing, corpus):
    full = TransformerConfig(**TINY)
    for changes, sentence in (
        ({"carry": "all"}, "carry is all; it must be one of nothing, rows, fam"),
        ({"carry_probability": 1.5}, r"carry_probability is 1\.5"),
        ({"model": full}, "carry is fam, but the model, of kind TransformerConfig, has no FAM"),
        ({"model": dataclasses.replace(FAM, fam_length=0)}, "has no FAM"),
        ({"carry": "rows", "data": PasskeyData()}, "carry is rows, for which data must be CorpusData"),
        ({"carry": "rows", "data": dataclasses.replace(corpus, order="shuffled")}, "sequential"),
        ({"carry": "rows", "accumulation": 2}, "carry is rows, for which accumulation must be 1, not 2"),
        ({"carry": "rows", "model": dataclasses.replace(FAM, random_offsets=True)}, r"carry is rows, for which model\.random_offsets"),
    ):
        with pytest.raises(UserError, match=sentence):
            dataclasses.replace(passing, **changes)
    with pytest.raises(UserError, match=r"mesh\.context is 2; with a FamConfig, .* it must be 1"):
        check_devices(dataclasses.replace(passing, mesh=MeshConfig(data=4, context=2)))
    with pytest.raises(UserError, match="the state of Transformer with these options grows"):
        run(dataclasses.replace(passing, carry="rows", model=full))
