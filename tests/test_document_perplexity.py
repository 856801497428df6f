"""Perplexity of whole documents: windows, four names, and both protocols on a model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import cli, models
from infinicontext.data.corpora import load_corpus
from infinicontext.data.tokenizers import ByteTokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation import document_perplexity
from infinicontext.evaluation.document_perplexity import (
    DocumentPerplexityEvaluation,
    evaluate_document_perplexity,
    perplexities,
    sliding_windows,
    text_losses,
)
from infinicontext.models.infini_attention import InfiniConfig


@pytest.mark.golden
def test_golden_windows(golden):
    rows = [json.loads(line) for line in (golden / "ruler" / "other_metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["metric"] == "sliding_windows"]
    assert rows
    for row in rows:
        found = sliding_windows(row["n"], row["window"], row["stride"])
        assert len(found) == row["num"]
        assert [list(window) for window in found[: len(row["windows"])]] == row["windows"]


def test_windows():
    assert sliding_windows(10, 4, 0) == [(0, 4, 4)]
    assert sliding_windows(3, 4, 9) == [(0, 3, 3)]
    with pytest.raises(UserError, match="windows of 4 tokens with a stride of 5"):
        sliding_windows(10, 4, 5)


def test_four_names():
    found = perplexities(np.array([10.0, 60.0]), np.array([10, 20]), np.array([5, 9]), np.array([40, 60]))
    assert found["token_perplexity"] == pytest.approx(math.exp(70 / 30))
    assert found["document_perplexity"] == pytest.approx(math.exp((1 + 3) / 2))
    assert found["word_perplexity"] == pytest.approx(math.exp(70 / 14))
    assert found["bits_per_byte"] == pytest.approx(70 / math.log(2) / 100)


@pytest.mark.parametrize("start_id", [99, None])
@pytest.mark.parametrize(
    "windows",
    [[(0, 30, 30)], sliding_windows(30, 8, 3), sliding_windows(30, 8, 8), sliding_windows(30, 29, 1), sliding_windows(30, 29, 29)],
)
def test_every_token_once_and_with_its_window(start_id, windows):
    """Losses that name the token and the number of tokens read before it, the start token among them."""
    texts = np.arange(60).reshape(2, 30) + 100

    def losses_of(tokens_WS):
        read = np.cumsum(np.ones_like(tokens_WS), axis=1)
        return (1000 * tokens_WS + read - 1)[:, 1:].astype(float)

    losses, scored_there, means = text_losses(losses_of, texts, windows, start_id)
    start = start_id is not None
    assert len(means) == 2 * sum(end - begin + start > 1 for begin, end, _ in windows)
    assert np.isfinite(means).all()
    for text, losses_n, scored_n in zip(texts, losses, scored_there):
        for begin, end, scored in windows:
            for place in range(end - scored, end):
                read = place - begin + start
                assert scored_n[place] == (read > 0)
                assert losses_n[place] == (1000 * text[place] + read if read else 0)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc d"), 700)) for _ in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_corpus(str(tmp_path / "texts.jsonl"), ByteTokenizer(), "validation", 0.3)


def test_protocols_of_a_model(corpus):
    """A window as long as the text is the stream; shorter ones forget; documents that are too short are said to be."""
    model = models.build(InfiniConfig(vocab_size=257, dim=16, layers=2, heads=2, segment=16, remat=False), nnx.Rngs(0))

    def run(**options):
        config = DocumentPerplexityEvaluation(documents=3, **options)
        return evaluate_document_perplexity(model, corpus, ByteTokenizer(), config, [128, 600, 701], limit=10**6, segment=64)

    stream, whole, short = run(), run(protocol="sliding", stride=128), run(protocol="sliding", window=65, stride=32)
    for a, b, c in zip(stream["by_length"], whole["by_length"], short["by_length"]):
        assert a["tokens"] == b["tokens"] == c["tokens"] == 3 * a["length"]
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-5)
        assert a["nll"] != pytest.approx(c["nll"], abs=1e-5)
        assert a["bits_per_byte"] == pytest.approx(a["nll"] / math.log(2))
        assert math.log(a["word_perplexity"]) > 2 * a["nll"]
    assert stream["skipped"] == [{"length": 701, "reason": "the longest validation document has 700 tokens"}]
    assert "window_mean_perplexity" in short["by_length"][0]
    disjoint = run(protocol="sliding", window=65, stride=65)
    assert [entry["tokens"] for entry in disjoint["by_length"]] == [3 * 128, 3 * 600]
    assert disjoint["by_length"][0]["nll"] != pytest.approx(short["by_length"][0]["nll"], abs=1e-5)
    # A window longer than a text is the text.
    assert run(protocol="sliding", window=5000, stride=32)["by_length"][0]["nll"] == pytest.approx(stream["by_length"][0]["nll"], abs=1e-5)
    first = run(protocol="sliding", window=65, stride=32, windows=1)
    assert [entry["tokens"] for entry in first["by_length"]] == [3 * 64] * 2
    assert [(entry["from"], entry["to"]) for entry in stream["by_position"]] == [(0, 600)]


def test_a_model_that_breaks_at_length(corpus, monkeypatch):
    """Its losses are no numbers from token 300 on: that is said, and not averaged away."""

    def losses(model, tokens_BS, *, segment):
        read_BL = jnp.cumsum(jnp.ones_like(tokens_BS[:, 1:]), axis=1)
        return jnp.where(read_BL > 300, jnp.nan, 1.0)

    monkeypatch.setattr(document_perplexity, "stream_losses", losses)
    config = DocumentPerplexityEvaluation(documents=3)
    found = evaluate_document_perplexity(None, corpus, ByteTokenizer(), config, [128, 600], limit=10**6, segment=64)
    assert [entry["length"] for entry in found["by_length"]] == [128]
    assert found["skipped"] == [{"length": 600, "reason": "the model's losses are not finite, first at token 300"}]


def test_command(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(
        """
from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig

def tiny():
    model = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, remat=False)
    evaluation = Evaluation(tasks=("document_perplexity",), lengths=(64, 512), capacity=256, segment=64)
    data = CorpusData("texts.jsonl", length=16, validation_fraction=0.3)
    return Experiment("tiny", model, data, steps=1, batch_size=8, evaluation=evaluation)
"""
    )

    def run(*command):
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            cli.main(list(command))

    run("train", "experiments.py:tiny", "--workdir", "run")
    run("eval", "run")
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["document_perplexity"]
    assert [entry["length"] for entry in found["by_length"]] == [64]
    assert "evaluation.capacity is 256" in found["skipped"][0]["reason"]
    run("compare", "run", "--output", "report")
    assert (tmp_path / "report" / "document-perplexity-by-length.png").is_file()
    # With windows the length does not matter to a cache.
    options = {"protocol": "sliding", "window": "128", "stride": "64"}
    run("eval", "run", *(word for name, value in options.items() for word in (f"--evaluation.document-perplexity.{name}", value)))
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["document_perplexity"]
    assert [entry["length"] for entry in found["by_length"]] == [64, 512]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "whole"}, r"evaluation\.document_perplexity\.protocol is whole; it must be one of stream, sliding"),
        ({"documents": 0}, r"evaluation\.document_perplexity\.documents is 0"),
        ({"window": 128}, r"evaluation\.document_perplexity\.stride is 256; with windows of 128 tokens it must be at most as many"),
        ({"stride": -1}, r"evaluation\.document_perplexity\.stride is -1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DocumentPerplexityEvaluation(**changes)
