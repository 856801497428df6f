"""LoRA: a model begins as the one it adapts, adapters and named groups alone are trained, and merged weights are what is used after."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import cli, models
from infinicontext.data.pipeline import PasskeyData
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment, to_plain
from infinicontext.models.adapted import AdaptedConfig
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.lora import Lora
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.optimizer import OptimizerConfig, ParameterGroup
from infinicontext.training.step import make_steps
from infinicontext.training.weights import load_model

BASE = TransformerConfig(vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, attention="window", window=32, remat=False)
CONFIG = AdaptedConfig(BASE, Lora(rank=3, alpha=6.0, parameters=("q", "v", "o", "table")))
ONE = MeshConfig(data=1)


def random_adapters(model):
    """The model with adapters that change something."""
    some = lambda path, x: jnp.asarray(np.random.default_rng(len(str(path))).normal(size=x.shape), x.dtype)
    model.adapters = jax.tree_util.tree_map_with_path(some, model.adapters)
    return model


def test_merged_weights_by_hand():
    model = random_adapters(models.build(CONFIG, nnx.Rngs(0)))
    merged = model.merged()
    for name, inputs in (("q", 1), ("v", 1), ("o", 2)):
        adapter = model.adapters[f".blocks.attention.{name}"]
        weight, first, second = (np.asarray(p[...]) for p in (getattr(model.model.blocks.attention, name), adapter.first, adapter.second))
        for layer in range(BASE.layers):
            change = 2.0 * np.tensordot(first[layer], second[layer], axes=1)
            np.testing.assert_allclose(getattr(merged.blocks.attention, name)[layer], weight[layer] + change, rtol=1e-5, atol=1e-5)
            assert first[layer].shape[:-1] == weight[layer].shape[:inputs]
            assert np.linalg.matrix_rank(change.reshape(np.prod(weight[layer].shape[:inputs]), -1)) == 3
    np.testing.assert_array_equal(merged.blocks.attention.k[...], model.model.blocks.attention.k[...])


@pytest.mark.parametrize("base", [BASE, MegalodonConfig.examples()["swiglu"]], ids=["transformer", "megalodon"])
def test_begins_as_the_model_it_adapts(base):
    name = "o" if base is BASE else "output"
    model = models.build(AdaptedConfig(base, Lora(parameters=(name,))), nnx.Rngs(0))
    tokens_BT = np.arange(24, dtype=np.int32).reshape(2, 12) % 17
    both = jax.jit(lambda model: (model(tokens_BT, model.init_state(2)), model.model(tokens_BT, model.model.init_state(2))))
    (logits_BTV, _), (expected_BTV, _) = both(model)
    # Two compilations of one sum may round differently; the parameters are the same to the last bit.
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, model.merged(), model.model)
    (logits_BTV, _), _ = both(random_adapters(model))
    assert np.abs(logits_BTV - expected_BTV).max() > 1e-2


def test_beacons_alone():
    """Names may say more than their last part: tokens keep their projections."""
    base = BeaconConfig(vocab_size=64, dim=16, layers=2, heads=4, feed_forward=24, chunk=8, ratios=(2,), remat=False)
    model = random_adapters(models.build(AdaptedConfig(base, Lora(parameters=("beacons.q", "beacons.v"))), nnx.Rngs(0)))
    assert sorted(model.adapters) == [".blocks.attention.beacons.q", ".blocks.attention.beacons.v"]
    merged, own = model.merged().blocks.attention, model.model.blocks.attention
    np.testing.assert_array_equal(merged.q[...], own.q[...])
    assert np.abs(merged.beacons.q[...] - own.beacons.q[...]).max() > 1e-2
    tokens_BT = np.arange(40, dtype=np.int32).reshape(2, 20)
    logits_BTV, _ = model(tokens_BT, model.init_state(2, capacity=20))
    np.testing.assert_allclose(logits_BTV, model.merged()(tokens_BT, model.init_state(2, capacity=20))[0], atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "model.lora.rank is 0"),
        ({"parameters": ()}, "model.lora.parameters is empty"),
        ({"parameters": ("q", "none")}, "names none, which is no matrix"),
        ({"parameters": ("scale",)}, "names scale, which is no matrix"),
    ],
)
def test_errors(lora, message):
    with pytest.raises(UserError, match=message):
        models.build(AdaptedConfig(BASE, Lora(**lora)), nnx.Rngs(0))


def test_what_is_not_trained_stands_still():
    """Its bits do not change, and it has neither gradient nor optimizer state; what is trained moves."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, train=("lora",), groups=(ParameterGroup("lora", 1e-2),))
    experiment = Experiment("tiny", CONFIG, PasskeyData(lengths=(128,)), optimizer=optimizer, batch_size=2)
    ones = np.ones((2, 128), np.float32)
    batch = {"tokens": np.arange(258, dtype=np.int32).reshape(2, 129) % 64, "segment_ids": np.ones((2, 129), np.int32)}
    batch |= {"loss_mask": ones, "answer_mask": ones}
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        steps = make_steps(experiment, mesh)
        before = steps.init(jax.random.key(0))
        kept = jax.tree.map(np.asarray, before.model)
        after, _ = steps.train_step(before, batch)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept.model), jax.tree.leaves(after.model.model)))
        # B, which begins at 0, gets the first gradient; A's is 0 as long as B is.
        assert all(np.any(adapter.second[...] != 0) for adapter in after.model.adapters.values())
        moments = [leaf.size for leaf in jax.tree.leaves(after.optimizer) if leaf.size > 1]
        assert sum(moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(after.model.adapters))
        with pytest.raises(UserError, match=r"optimizer\.train names gate"):
            make_steps(dataclasses.replace(experiment, optimizer=OptimizerConfig(train=("gate",))), mesh)


EXPERIMENTS = """
import dataclasses
from infinicontext.data.pipeline import PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.adapted import AdaptedConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.lora import Lora
from infinicontext.training.optimizer import OptimizerConfig

BASE = TransformerConfig(vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, remat=False)

def base():
    evaluation = Evaluation(tasks=("passkey",), lengths=(128,), passkey=PasskeyEvaluation(samples=1, batch_size=5))
    return Experiment("base", BASE, PasskeyData(lengths=(128,)), steps=2, batch_size=8, evaluation=evaluation)

def adapted():
    model = AdaptedConfig(BASE, Lora(rank=2, parameters=("q", "v")))
    return dataclasses.replace(base(), name="adapted", model=model, start_from="base", optimizer=OptimizerConfig(train=("lora",)))
"""


def test_commands(tmp_path, monkeypatch):
    """Training starts from a run, resumes, is evaluated, and leaves as an ordinary checkpoint with merged weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)

    def run(*command):
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            cli.main(list(command))

    run("train", "experiments.py:base", "--workdir", "base")
    run("train", "experiments.py:adapted", "--workdir", "adapted")
    run("eval", "adapted")
    assert json.loads((tmp_path / "adapted" / "eval.json").read_text())["tasks"]["passkey"]["cells"]
    run("convert", "adapted", "exported", "--to", "huggingface")
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        base, adapted, exported = (load_model(tmp_path / name, mesh).model for name in ("base", "adapted", "exported"))
    q = lambda model: np.asarray(model.blocks.attention.q[...])
    assert type(adapted) is type(base)
    np.testing.assert_array_equal(q(adapted), q(exported))
    assert 0 < np.abs(q(adapted) - q(base)).max() < 0.1
    np.testing.assert_array_equal(adapted.blocks.attention.k[...], base.blocks.attention.k[...])
    assert to_plain(CONFIG)["lora"]["parameters"] == ["q", "v", "o", "table"]
