"""Experiments as JSON, and what tells two of them apart."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinicontext.data.instructions import TEMPLATES, InstructionData
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.errors import UserError
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment, differences, from_plain, to_plain
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.rope import RopeConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.sharding import MeshConfig
from infinicontext.training.optimizer import OptimizerConfig, ParameterGroup

BASE = Experiment("base", TransformerConfig(), CorpusData())


def shipped():
    """Each experiment that a function of experiments/*.py returns, by its name there."""
    found = []
    for path in sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in vars(module).items():
            if name[0] != "_" and getattr(function, "__module__", "") == module.__name__:
                returned = function()
                for experiment in returned if isinstance(returned, list) else [returned]:
                    found.append(pytest.param(experiment, id=f"{path.stem}:{name}:{experiment.name}"))
    assert found
    return found


@pytest.mark.parametrize("experiment", shipped())
def test_shipped_experiments_come_back(experiment):
    text = json.dumps(to_plain(experiment))
    again = from_plain(json.loads(text))
    assert again == experiment
    assert hash(again) == hash(experiment)
    assert json.dumps(to_plain(again)) == text


numbers = st.floats(0, 1e6, allow_nan=False)
optimizers = st.builds(
    OptimizerConfig,
    learning_rate=numbers,
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    beta1=st.floats(0, 1, exclude_max=True),
    groups=st.lists(st.builds(ParameterGroup, st.text(max_size=5), numbers, numbers), max_size=3).map(tuple),
)
corpora = st.builds(CorpusData, source=st.text(max_size=20), length=st.integers(1, 10**9))
instructions = st.builds(InstructionData, source=st.text(max_size=20), template=st.sampled_from(list(TEMPLATES)))
passkeys = st.lists(st.integers(1, 10**7), min_size=1, max_size=4).flatmap(
    lambda lengths: st.builds(
        PasskeyData,
        lengths=st.just(tuple(lengths)),
        stage_steps=st.lists(st.integers(1, 10**6), min_size=len(lengths) - 1, max_size=len(lengths) - 1).map(tuple),
    )
)
configs = st.builds(
    TransformerConfig,
    kv_heads=st.sampled_from([None, 1, 2, 4]),
    attention=st.sampled_from(["full", "window", "block_window"]),
    rope=st.sampled_from([RopeConfig(), RopeConfig("yarn", factor=4.0, original_length=16)]),
    remat=st.booleans(),
)
experiments = st.builds(
    Experiment,
    name=st.text(max_size=20),
    model=configs,
    data=st.one_of(corpora, passkeys, instructions),
    objective=st.builds(NextToken, chunk=st.integers(1, 10**6), context_weight=numbers),
    optimizer=optimizers,
    mesh=st.builds(MeshConfig, data=st.sampled_from([-1, 1, 8]), tensor=st.integers(1, 8)),
    evaluation=st.builds(Evaluation, lengths=st.lists(st.integers(1, 2**20), min_size=1, max_size=4).map(tuple)),
    steps=st.integers(1, 10**9),
    seed=st.integers(0, 2**32 - 1),
)


@given(experiments)
def test_any_experiment_comes_back(experiment):
    again = from_plain(json.loads(json.dumps(to_plain(experiment))))
    assert again == experiment
    assert differences(experiment, again) == []


@given(experiments, experiments)
def test_differences_are_empty_only_between_equals(one, other):
    assert (differences(one, other) == []) == (one == other)


def altered(change):
    """BASE as plain dicts and lists, with something changed."""
    record = to_plain(BASE)
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["model"].update(type="Perceptron"), r"experiment\.model has type Perceptron; this version knows TransformerConfig"),
        (lambda r: r["data"].update(type="Nothing"), r"experiment\.data has type Nothing; this version knows CorpusData, PasskeyData"),
        (lambda r: r.update(type="CorpusData"), "experiment has type CorpusData; this version knows Experiment"),
        (lambda r: r["model"].pop("type"), r"experiment\.model has type None"),
        (lambda r: r.update(stepps=3), "experiment has the unknown field stepps"),
        (lambda r: r["model"]["rope"].update(spin=1), r"experiment\.model\.rope has the unknown field spin"),
        (lambda r: r["optimizer"]["groups"].append({"type": "Club"}), r"experiment\.optimizer\.groups has type Club"),
        (lambda r: r.update(steps=0), "steps is 0; it must be 1 or more"),
    ],
)
def test_unknown_types_and_fields_are_named(change, message):
    with pytest.raises(UserError, match=message):
        from_plain(altered(change))


def test_differences_name_the_fields():
    new = dataclasses.replace(
        BASE,
        steps=5,
        model=dataclasses.replace(BASE.model, rope=RopeConfig("ntk", factor=2.0)),
        optimizer=dataclasses.replace(BASE.optimizer, learning_rate=0.002),
    )
    assert set(differences(BASE, new)) == {
        f"steps: {BASE.steps} -> 5",
        "model.rope.scheme: default -> ntk",
        "model.rope.factor: None -> 2.0",
        "optimizer.learning_rate: 0.001 -> 0.002",
    }


def test_differences_of_another_kind_of_data():
    (line,) = differences(BASE, dataclasses.replace(BASE, data=PasskeyData()))
    assert line.startswith("data: CorpusData(")
    assert " -> PasskeyData(" in line


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"])
def test_counts_are_at_least_one(name):
    with pytest.raises(UserError, match=f"{name} is 0; it must be 1 or more"):
        dataclasses.replace(BASE, **{name: 0})


def test_batch_size_is_a_multiple_of_accumulation():
    with pytest.raises(UserError, match="batch_size is 10, which is not a multiple of accumulation, 4"):
        dataclasses.replace(BASE, batch_size=10, accumulation=4)
