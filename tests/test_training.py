"""Runs that are stopped, killed, damaged or misused: what was saved stays, and a resumed run is the unbroken one to the last bit."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinicontext import cli, models
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment, to_plain
from infinicontext.models.adapted import AdaptedConfig
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.lora import Lora
from infinicontext.objectives.next_token import NextToken
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.loop import train
from infinicontext.training.metrics import MetricsWriter, read_metrics
from infinicontext.training.optimizer import OptimizerConfig, ParameterGroup
from infinicontext.training.run_folder import load_config

# What the storage leaves behind when it fails to read a damaged checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]

TINY = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, feed_forward=32, remat=False)
WORDS = ("stream", "memory", "reads", "without", "end", "a", "the", "window")


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself multiplies dtypes that strict promotion refuses to mix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """An experiment on 60 small documents."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=30))}) + "\n" for _ in range(60)))
    return Experiment(
        "corpus",
        TINY,
        CorpusData(str(path), length=32, validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2),
        steps=10,
        batch_size=8,
        log_every=1,
        validation_every=4,
        validation_batches=2,
        checkpoint_every=2,
        keep_checkpoints=3,
    )


@pytest.fixture(scope="module")
def passkey():
    """An experiment on two lengths with log lines and checkpoints that do not fall together."""
    return Experiment(
        "passkey",
        dataclasses.replace(TINY, vocab_size=64, attention="window", window=16),
        PasskeyData(lengths=(128, 160), stage_steps=(5,)),
        NextToken("answers", context_weight=0.3),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=9,
        batch_size=16,
        log_every=2,
        validation_every=5,
        validation_batches=1,
        checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def unbroken(corpus, passkey, tmp_path_factory):
    """The folders of the two runs, never interrupted."""
    folders = {experiment.name: tmp_path_factory.mktemp("unbroken") / experiment.name for experiment in (corpus, passkey)}
    with jax.numpy_dtype_promotion("standard"):
        for experiment in (corpus, passkey):
            assert train(experiment, folders[experiment.name])
    return folders


@pytest.fixture
def run(unbroken, tmp_path):
    """A copy of the finished corpus run."""
    return shutil.copytree(unbroken["corpus"], tmp_path / "run")


def metrics(folder):
    """What must be equal in two runs: all but what the clock decides."""
    return [
        {key: value for key, value in record.items() if key not in ("tokens_per_second", "mfu")}
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


def final_parameters(experiment, folder):
    where = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), models.abstract(experiment.model))
    checkpoints = Checkpoints(folder)
    try:
        step, model = checkpoints.restore_model(like)
    finally:
        checkpoints.close()
    assert step == experiment.steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def assert_same_run(experiment, folder, unbroken):
    assert metrics(folder) == metrics(unbroken[experiment.name])
    for one, other in zip(final_parameters(experiment, folder), final_parameters(experiment, unbroken[experiment.name])):
        np.testing.assert_array_equal(one, other)


def checkpoint_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def contents(folder):
    """Each file's digest, without what is written anew at each start."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def stop_when(monkeypatch, step):
    """Sends SIGTERM to this process when the metrics of a step have been written."""
    write = MetricsWriter.write

    def write_and_stop(self, record):
        write(self, record)
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", write_and_stop)


def test_records_of_a_run(corpus, passkey, unbroken):
    """Training records every `log_every` steps and at the end; validation every `validation_every` and at the end, after the step's own."""
    records = metrics(unbroken["corpus"])
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 11))
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8, 10]
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert records[0]["tokens"] == 8 * 32
    assert records[-2]["tokens"] == 10 * 8 * 32
    np.testing.assert_allclose([record["learning_rate"] for record in records[:3]], [1.5e-2, 3e-2, 3e-2])
    assert not any("skipped_updates" in record or "gates" in record for record in records)

    records = metrics(unbroken["passkey"])
    assert [(record["step"], "validation_loss" in record) for record in records] == [
        (2, False), (4, False), (5, True), (6, False), (8, False), (9, False), (9, True)
    ]  # fmt: skip
    # 16 rows of 128 for five steps, then 8 rows of 160: the multiple of eight devices next to as many tokens.
    assert records[-2]["tokens"] == 5 * 16 * 128 + 4 * 8 * 160
    assert checkpoint_steps(unbroken["passkey"]) == [8, 9]
    assert checkpoint_steps(unbroken["corpus"]) == [6, 8, 10]
    assert load_config(unbroken["passkey"]) == passkey


def test_gates_of_a_memory_are_recorded(passkey, tmp_path, capsys):
    """By layer and head, wherever they lie, also inside an adapted model; on the terminal they would drown the rest."""
    memory = InfiniConfig(vocab_size=64, dim=16, layers=2, heads=4, feed_forward=24, segment=64)
    experiment = dataclasses.replace(
        passkey,
        model=AdaptedConfig(memory, Lora(rank=1)),
        data=PasskeyData(lengths=(128,)),
        optimizer=OptimizerConfig(warmup_steps=0, train=("lora", "gate"), groups=(ParameterGroup("gate", 0.1),)),
        mesh=MeshConfig(data=2, tensor=4),
        steps=2,
        batch_size=2,
        validation_every=1,
    )
    assert train(experiment, tmp_path / "run")
    records = [record for record in metrics(tmp_path / "run") if "validation_loss" in record]
    gates = np.array([record["gates"] for record in records])
    assert gates.shape == (2, 2, 4)
    assert np.all(np.abs(gates[0] - 0.5) > 0.01), "a step of about 0.1 from a logit of 0"
    parameters = dict(jax.tree_util.tree_leaves_with_path(models.abstract(experiment.model)))
    (place,) = (i for i, path in enumerate(parameters) if "gate" in jax.tree_util.keystr(path) and "feed" not in jax.tree_util.keystr(path))
    logits_LH = final_parameters(experiment, tmp_path / "run")[place]
    np.testing.assert_allclose(gates[1], 1 / (1 + np.exp(-logits_LH)), atol=2e-6)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert all(f"gate/{layer}/{head}".encode() in events.read_bytes() for layer in range(2) for head in range(4))
    assert "gate" not in capsys.readouterr().err


def test_loss_decreases(unbroken):
    for key in ("loss", "validation_loss"):
        losses = [record[key] for record in metrics(unbroken["corpus"]) if key in record]
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("name", "stop", "saved"), [("corpus", 6, 7), ("passkey", 2, 3)])
def test_stopped_and_resumed(name, stop, saved, unbroken, tmp_path, monkeypatch, capsys):
    """SIGTERM: the step under way is finished and saved; then the same call goes on."""
    experiment, folder = load_config(unbroken[name]), tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_when(patch, stop)
        assert not train(experiment, folder)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoint_steps(folder)[-1] == saved
    assert f"stopped by a signal after step {saved}; saved" in capsys.readouterr().err
    assert train(experiment, folder)
    assert_same_run(experiment, folder, unbroken)


def test_stopped_at_the_last_step_is_finished(corpus, unbroken, tmp_path, monkeypatch):
    stop_when(monkeypatch, corpus.steps)
    assert train(corpus, tmp_path / "run")
    assert_same_run(corpus, tmp_path / "run", unbroken)


def truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def delete_a_folder(checkpoint):
    shutil.rmtree(next(path for path in sorted(checkpoint.iterdir()) if path.is_dir() and any(path.rglob("*"))))


def flip_a_bit(checkpoint):
    path = largest_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = (truncate, delete_a_folder, flip_a_bit)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_checkpoint(damage, corpus, run, unbroken, capsys):
    damage(run / "checkpoints" / "10")
    assert train(corpus, run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "checkpoint 10 cannot be read" in warnings[0]
    assert_same_run(corpus, run, unbroken)
    assert checkpoint_steps(run) == [6, 8, 10]
    assert (run / "unreadable_checkpoints" / "10").is_dir()


def test_two_damaged_checkpoints(corpus, run, unbroken, capsys):
    truncate(run / "checkpoints" / "8")
    flip_a_bit(run / "checkpoints" / "10")
    assert train(corpus, run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert sorted(line.split()[2] for line in warnings) == ["10", "8"]
    assert_same_run(corpus, run, unbroken)


def test_all_checkpoints_damaged(corpus, run):
    for step, damage in zip((6, 8, 10), DAMAGE):
        damage(run / "checkpoints" / str(step))
    before = contents(run)
    with pytest.raises(UserError, match="no checkpoint can be read"):
        train(corpus, run)
    assert contents(run) == before


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_half_written_metrics_are_repaired(part, corpus, run, unbroken):
    """Killed while it wrote a line: the checkpoint is older, and the line comes again, once and whole."""
    shutil.rmtree(run / "checkpoints" / "10")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][: int(part * len(lines[-2]))])
    assert train(corpus, run)
    assert_same_run(corpus, run, unbroken)


def test_metrics_after_the_checkpoint_are_taken_back(corpus, run, unbroken):
    shutil.rmtree(run / "checkpoints" / "10")
    shutil.rmtree(run / "checkpoints" / "8")
    assert train(corpus, run)
    assert_same_run(corpus, run, unbroken)


def test_finished_run_is_left_alone(corpus, run):
    before = contents(run)
    assert train(corpus, run)
    assert contents(run) == before


def test_changed_config(corpus, run):
    changed = dataclasses.replace(corpus, steps=12, optimizer=dataclasses.replace(corpus.optimizer, learning_rate=0.02))
    before = contents(run)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.03 -> 0\.02.*steps: 10 -> 12.*--allow-config-change"):
        train(changed, run)
    assert contents(run) == before

    records = metrics(run)
    assert train(changed, run, allow_config_change=True)
    assert metrics(run)[: len(records)] == records
    assert [record["step"] for record in metrics(run)[len(records) :]] == [11, 12, 12]
    assert checkpoint_steps(run)[-1] == 12
    assert load_config(run) == changed


def test_checkpoint_of_another_model_is_refused(corpus, run):
    before = contents(run)
    wider = dataclasses.replace(corpus, steps=12, model=dataclasses.replace(corpus.model, dim=32))
    with pytest.raises(UserError, match="no checkpoint can be read with this config"):
        train(wider, run, allow_config_change=True)
    assert contents(run) == before


def test_folder_that_is_no_run(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train(corpus, tmp_path / "thesis.txt" / "run")


def test_vocabulary_too_small(corpus, tmp_path):
    small = dataclasses.replace(corpus, model=dataclasses.replace(corpus.model, vocab_size=100))
    with pytest.raises(UserError, match=r"model\.vocab_size is 100, but data\.tokenizer bytes has 257 tokens"):
        train(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint_every", [20, 2])
def test_non_finite_loss_ends_the_run(checkpoint_every, corpus, run):
    """The checkpoint from before the loss was lost is still there and whole, however often the run saves."""
    before = {name: digest for name, digest in contents(run).items() if name.startswith("checkpoints/10/")}
    wild = dataclasses.replace(
        corpus,
        steps=40,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=2,
        optimizer=dataclasses.replace(corpus.optimizer, learning_rate=1e37, schedule="constant"),
    )
    with pytest.raises(UserError, match=r"not finite in the \d steps up to step \d+.*optimizer\.learning_rate, now 1e\+37"):
        train(wild, run, allow_config_change=True)
    after = contents(run)
    assert before
    assert {name: after.get(name) for name in before} == before


def test_bfloat16_and_accumulation(corpus, tmp_path, unbroken):
    experiment = dataclasses.replace(
        corpus, model=dataclasses.replace(corpus.model, dtype="bfloat16"), batch_size=16, accumulation=2, steps=3
    )
    assert train(experiment, tmp_path / "run")
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    expected = [record["loss"] for record in metrics(unbroken["corpus"]) if "loss" in record][:3]
    # Other rows are in a larger batch, so the losses are near, not equal.
    np.testing.assert_allclose(losses, expected, rtol=0.1)
    assert {leaf.dtype for leaf in final_parameters(experiment, tmp_path / "run")} == {np.dtype("float32")}


def test_read_metrics_of_nothing(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def killable(experiment, folder):
    """experiments file and command line of a real process that trains `experiment` in folder/run."""
    (folder / "killable.json").write_text(json.dumps(to_plain(experiment)))
    (folder / "killable.py").write_text(
        "import json\nimport pathlib\n\nfrom infinicontext.experiment import from_plain\n\n\n"
        "def tiny():\n    return from_plain(json.loads(pathlib.Path(__file__).with_suffix('.json').read_text()))\n"
    )
    return ["train", f"{folder / 'killable.py'}:tiny", "--workdir", str(folder / "run")]


def kill_at(arguments, step, folder, delay=0.0):
    """Starts the command and kills it, without warning, `delay` seconds after the metrics of a step are there."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "-m", "infinicontext.cli", *arguments]
    with open(folder / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        deadline = time.monotonic() + 90
        while not any(record["step"] >= step for record in read_metrics(folder / "run" / "metrics.jsonl")):
            assert process.poll() is None, (folder / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_and_resumed(kills, corpus, tmp_path):
    """kill -9 of a real process: metrics and parameters end up as those of an unbroken run."""
    rng = random.Random(kills)
    experiment = dataclasses.replace(corpus, steps=60 * kills, validation_every=20, checkpoint_every=5)
    assert train(experiment, tmp_path / "whole")
    arguments = killable(experiment, tmp_path)
    for kill in range(kills):
        # Well before the end, so that the process is still at work when the signal comes.
        kill_at(arguments, 60 * kill + rng.randint(8, 20), tmp_path, delay=0.03 * rng.random())
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < experiment.steps
    cli.main(arguments)
    assert_same_run(experiment, tmp_path / "run", {experiment.name: tmp_path / "whole"})
