"""Associative recall: the original's examples, what fills them, who remembers all, and the commands."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinicontext import cli
from infinicontext.data.pipeline import train_batches, validation_batches
from infinicontext.data.recall import NO_LABEL, RecallData, mqar
from infinicontext.errors import UserError
from infinicontext.evaluation.plots import draw
from infinicontext.evaluation.recall import RecallEvaluation, evaluate_recall
from infinicontext.evaluation.runs import Run


@pytest.mark.golden
def test_golden_examples(golden):
    for case in json.loads((golden / "ruler" / "mqar.json").read_text()):
        config = dict(case["config"])
        assert not config.pop("random_non_queries")
        inputs_NL, labels_NL = mqar(**config)
        np.testing.assert_array_equal(inputs_NL, case["inputs"])
        np.testing.assert_array_equal(labels_NL, case["labels"])


@pytest.mark.parametrize("gap", [0, 40])
def test_every_question_has_one_answer(gap):
    inputs_NL, labels_NL = mqar(200, 50, 128, 3, num_kv_pairs=8, power_a=0.1, gap=gap, filler="random")
    assert inputs_NL.min() > 0
    for inputs_L, labels_L in zip(inputs_NL, labels_NL):
        pairs = dict(zip(inputs_L[:16:2], inputs_L[1:16:2]))
        assert len(pairs) == 8
        asked = np.flatnonzero(labels_L != NO_LABEL)
        assert asked.min() >= 16 + gap
        assert {int(inputs_L[place]): int(labels_L[place]) for place in asked} == pairs
        # A key stands where it is given and where it is asked for, and nowhere else.
        assert np.isin(inputs_L, list(pairs)).sum() == 16


def test_official_filler():
    """Only what would be zeros differs, and keys are among it."""
    (plain_NL, labels_NL), (inputs_NL, same_NL) = (mqar(32, 20, 128, 3, num_kv_pairs=8, filler=filler) for filler in ("zeros", "official"))
    np.testing.assert_array_equal(labels_NL, same_NL)
    np.testing.assert_array_equal(np.where(plain_NL, inputs_NL, 0), plain_NL)
    assert set(inputs_NL[plain_NL == 0]) == set(range(32))


def test_batches():
    data = RecallData(vocab_size=64, length=32, pairs=(2, 4))
    batches = train_batches(data, 6, seed=1, step=0)
    first, second = next(batches), next(batches)
    assert [batch["answer_mask"].sum() for batch in (first, second)] == [12, 24]
    np.testing.assert_array_equal(next(train_batches(data, 6, seed=1, step=1))["tokens"], second["tokens"])
    half = [next(train_batches(data, 6, seed=1, step=1, process_index=i, process_count=2))["targets"] for i in range(2)]
    np.testing.assert_array_equal(np.stack(half, axis=1).reshape(6, -1), second["targets"])
    (validation,) = validation_batches(data, 6, 1, 1)
    assert not np.array_equal(validation["tokens"], first["tokens"])


class Lookup(NamedTuple):
    """Remembers what followed each token within a call."""

    def init_state(self, batch_size, capacity=None):
        return ()

    def room(self, state):
        return None

    def hidden(self, tokens_BT, state):
        def one(tokens_T):
            same_TT = jnp.tril(tokens_T[:, None] == tokens_T[None, :], -1)
            return jnp.where(same_TT.any(axis=1), tokens_T[jnp.argmax(same_TT, axis=1) + 1], 0)

        return jax.vmap(one)(tokens_BT), state

    def logits(self, hidden_BT):
        return jax.nn.one_hot(hidden_BT, 64)


def test_who_remembers_has_all_points():
    data = RecallData(vocab_size=64, length=32, pairs=(2, 4))
    found = evaluate_recall(Lookup(), data, RecallEvaluation(samples=7, batch_size=3), [16, 32, 63], segment=64, seed=0)
    assert [(cell["size"], cell["place"], cell["score"]) for cell in found["cells"]] == [(16, 2, 1), (16, 4, 1), (32, 2, 1), (32, 4, 1)]
    assert found["by_size"][1]["chance"] == pytest.approx(3 / 8)
    assert [skip["size"] for skip in found["skipped"]] == [63, 63]
    # One that sees the last four tokens alone knows nothing.
    found = evaluate_recall(Lookup(), data, RecallEvaluation(samples=7, batch_size=3), [32], segment=4, seed=0)
    assert found["by_size"][0]["score"] < 0.3


class Broken(Lookup):
    def logits(self, hidden_BT):
        return super().logits(hidden_BT).at[..., 3].set(jnp.nan)


def test_logits_that_are_no_numbers_are_no_score():
    data = RecallData(vocab_size=64, length=32, pairs=(2,))
    found = evaluate_recall(Broken(), data, RecallEvaluation(samples=3), [32], segment=64, seed=0)
    assert (found["cells"], found["by_size"]) == ([], [])
    assert "not finite" in found["skipped"][0]["reason"]


def test_pictures_by_state_show_what_all_runs_were_asked(tmp_path):
    """At the longest common length, each run by its own size of state."""

    def run(number, lengths, sizes):
        cells = [
            {"size": length, "place": pairs, "score": 0.5, "interval": [0.4, 0.7], "samples": 9, "whole": 0.1}
            for length in lengths
            for pairs in (1, 4)
        ]
        by_size = [{"size": length, "prompt_tokens": length, "score": 0.5, "interval": None, "chance": 0.25} for length in lengths]
        recall = {"mode": "teacher_forced", "size": "tokens", "place": "pairs", "cells": cells, "by_size": by_size}
        return Run(f"run {number}", number, tmp_path, {"experiment": {}}, [], [], [], {"tasks": {"recall": recall}, "state_bytes": sizes})

    runs = [run(0, (32, 64, 128), {"32": 2048, "64": 4096, "128": 8192}), run(1, (32, 64, 256), {"32": 1000, "64": 1000, "256": 1000})]
    (plot,) = [plot for plot in draw(runs) if plot.file == "recall-by-state"]
    assert "64 tokens" in plot.title
    panels = plot.figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["1 pair", "4 pairs"]
    assert [[float(bar.lines[0].get_xdata()[0]) for bar in axes.containers] for axes in panels] == [[4096, 1000]] * 2
    assert not [plot for plot in draw([runs[0], run(1, (256,), {"256": 1000})]) if plot.file == "recall-by-state"]


EXPERIMENTS = """
from infinicontext.data.recall import RecallData
from infinicontext.evaluation.recall import RecallEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

def tiny():
    model = TransformerConfig(vocab_size=32, dim=32, layers=2, heads=2, remat=False)
    evaluation = Evaluation(tasks=("recall",), lengths=(16, 64), capacity=32, recall=RecallEvaluation(samples=50))
    return Experiment("tiny", model, RecallData(vocab_size=32, length=16, pairs=(2,)), NextToken("answers"), steps=30, batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10), evaluation=evaluation, log_every=10, validation_every=30,
        checkpoint_every=10)
"""


def test_command(tmp_path, monkeypatch, capsys):
    """The values of the example are told from the others at least."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)

    def run(*command):
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            cli.main(list(command))

    run("train", "experiments.py:tiny", "--workdir", "run")
    run("eval", "run")
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["recall"]
    (entry,) = found["by_size"]
    assert entry["score"] > 0.2  # of 16 values any would be right in one of 16
    assert found["skipped"] == [{"length": 64, "reason": "the state grows with length and evaluation.capacity is 32"}]
    run("compare", "run", "--output", "report")
    assert (tmp_path / "report" / "recall-by-length.png").is_file()
    assert (tmp_path / "report" / "recall-by-state.png").is_file()
    with pytest.raises(SystemExit):
        run("eval", "run", "--tasks", "passkey")
    before = (tmp_path / "run" / "eval.json").read_bytes()
    with pytest.raises(SystemExit):
        run("eval", "run", "--step", "20")
    assert "--step is 20, but run/eval.json holds the results of step 30; give --output FILE" in capsys.readouterr().err
    assert (tmp_path / "run" / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ()}, r"data\.pairs is empty"),
        ({"pairs": (8, 17)}, r"data\.pairs is \(8, 17\): 17 pairs and a gap of 0 need a length of 4 x pairs"),
        ({"length": 63}, "recall takes an even length and gap, not 63 and 0"),
        ({"gap": 50}, "8 pairs and a gap of 50"),
        ({"vocab_size": 17}, "not 64 and 17"),
        ({"filler": "keys"}, r"data\.filler is keys; it must be one of zeros, random, official"),
        ({"power": 0.0}, r"data\.power is 0\.0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RecallData(**changes)
