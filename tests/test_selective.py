"""Selective language modelling: losses and gradients against reference data, the laws of training with it, and its commands."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from infinicontext import cli, models
from infinicontext.data.corpora import Corpus, load_corpus
from infinicontext.data.pipeline import CorpusData, PasskeyData, train_batches
from infinicontext.data.reference import keep_row, pieces, row_batch, rows
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken, row_losses
from infinicontext.objectives.selective import Selective, prepare, reference_scores, select, selective_loss, summary
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.step import make_steps
from infinicontext.training.weights import load_model


def cases(golden, kind):
    """Settings and arrays of the reference cases of one kind."""
    for case in json.loads((golden / "slm" / "cases.json").read_text())["cases"]:
        if case["kind"] == kind:
            with np.load(golden / "slm" / case["file"]) as file:
                yield case, dict(file)


class Given(nnx.Module):
    """A model whose logits are given: the tokens it reads are numbers of places."""

    def __init__(self, logits_BTV):
        self.logits_BTV = nnx.Param(jnp.asarray(logits_BTV))

    def init_state(self, batch_size, capacity=None, planned=None):
        return ()

    def hidden(self, tokens_BT, state, segment_ids_BT=None):
        return self.logits_BTV[...], state

    def logits(self, hidden_BTD):
        return hidden_BTD


def as_batch(labels, reference=None):
    """Reference data as the pipeline would give it."""
    valid = labels >= 0
    tokens = np.pad(np.where(valid, labels, 0), ((0, 0), (1, 0))).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "loss_mask": np.float32(valid),
        "answer_mask": np.zeros_like(labels, np.float32),
    }
    return batch | ({} if reference is None else {"reference_loss": np.float32(reference)})


def run(objective, logits, batch, mesh=None, microbatches=1):
    """Loss, gradient of the logits, mask and sums."""

    @jax.jit
    def go(logits, batch):
        batch = prepare(objective, batch, step=jnp.int32(5), seed=0, microbatches=microbatches)

        def loss(model):
            value, (_, sums) = selective_loss(objective, model, batch)
            return value, sums

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(Given(logits))
        return value, gradient.logits_BTV[...], sums, batch

    return go(logits, batch)


@pytest.mark.golden
def test_reference_steps(golden):
    """Masks, losses and gradients; groups of rows are those of devices."""
    for case, arrays in cases(golden, "step"):
        scope = case["scope"]
        options = {"scope": {"global": "batch", "sequence": "row"}.get(scope, "shard")}
        options["normalise"] = {"selected": "selected", "valid": "candidates"}[case["normalise"]]
        objective, batch = Selective(ratio=case["ratio"], **options), as_batch(arrays["labels"], arrays["ref_loss"])
        shards = scope if isinstance(scope, int) else 1
        with jax.set_mesh(make_mesh(MeshConfig(data=shards), jax.devices()[:shards])):
            loss, gradient, sums, _ = run(objective, arrays["logits"], batch)
            score = np.float32(arrays["ce"] - arrays["ref_loss"])
            found = select(objective, jnp.asarray(score), arrays["candidates"], round(case["ratio"] * 10_000))
        np.testing.assert_array_equal(found.mask, arrays["mask"], err_msg=case["name"])
        np.testing.assert_allclose(loss, case["loss"], rtol=1e-5, err_msg=case["name"])
        np.testing.assert_allclose(gradient, arrays["grad_logits"], atol=1e-6, err_msg=case["name"])
        said = summary(sums)
        assert sums["chosen"] == case["k"]
        np.testing.assert_allclose(said["selected_loss"], case["selected_loss"], rtol=1e-5)
        if np.array_equal(arrays["candidates"], arrays["labels"] >= 0):
            np.testing.assert_allclose(said["unselected_loss"], case["unselected_loss"], rtol=1e-5)
        if case["k"]:
            np.testing.assert_allclose(np.nanmin(found.threshold), case["threshold"], rtol=1e-5)


@pytest.mark.golden
def test_stored_precision(golden):
    for case, arrays in cases(golden, "ref_precision"):
        for dtype in case["loss"]:
            reference = np.asarray(jnp.asarray(arrays["ref_loss"]).astype(dtype).astype(jnp.float32))
            loss, gradient, _, _ = run(Selective(ratio=case["ratio"]), arrays["logits"], as_batch(arrays["labels"], reference))
            np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=2), arrays[f"mask_{dtype}"])
            np.testing.assert_allclose(loss, case["loss"][dtype], rtol=1e-5)


@pytest.mark.golden
def test_microbatches(golden):
    """Each ranks its own tokens and counts as one of all that are selected; or, in two passes, the whole batch is ranked."""
    for case, arrays in cases(golden, "microbatches"):
        M = case["microbatches"]
        # Ours takes every M-th row, the reference consecutive ones.
        order = np.arange(len(arrays["labels"])).reshape(M, -1).T.ravel()
        arrays = {name: value[order] for name, value in arrays.items()}
        batch = as_batch(arrays["labels"], arrays["ref_loss"])
        objective, total, masks = Selective(ratio=case["ratio"]), 0.0, np.zeros(arrays["labels"].shape, bool)
        prepared = prepare(objective, batch, step=jnp.int32(0), seed=0, microbatches=M)
        for m in range(M):
            loss, (_, sums) = selective_loss(objective, Given(arrays["logits"][m::M]), {name: x[m::M] for name, x in prepared.items()})
            total += loss
            assert sums["chosen"] == case["k_per_micro"][m]
        np.testing.assert_allclose(total, case["loss_per_micro"], rtol=1e-5)
        losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(arrays["logits"])), np.maximum(arrays["labels"], 0)[..., None], 2)[
            ..., 0
        ]
        two = dataclasses.replace(objective, two_passes=True)
        prepared = prepare(two, batch | {"losses": jnp.asarray(losses)}, step=jnp.int32(0), seed=0, microbatches=M)
        masks[...] = np.asarray(prepared["decided"])
        np.testing.assert_array_equal(masks[np.argsort(order)], arrays["mask_union"][np.argsort(order)])
        loss, _ = selective_loss(two, Given(arrays["logits"]), prepared)
        np.testing.assert_allclose(loss, case["loss_union"], rtol=1e-5)


@pytest.mark.golden
def test_self_reference(golden):
    for case, arrays in cases(golden, "self_reference"):
        batch = as_batch(arrays["labels"])
        scores = reference_scores(Selective(score="low_reference_loss", also="low_reference_entropy"), Given(arrays["ref_logits"]), batch)
        valid = arrays["labels"] >= 0
        np.testing.assert_allclose(np.asarray(scores["reference_loss"])[valid], arrays["ref_ce"][valid], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(scores["reference_entropy"])[valid], arrays["ref_entropy"][valid], rtol=1e-5, atol=1e-6)
        kinds = {
            "loss": {"score": "low_reference_loss"},
            "entropy": {"score": "low_reference_entropy"},
            "intersection": {"score": "low_reference_loss", "also": "low_reference_entropy"},
            "union": {"score": "low_reference_loss", "also": "low_reference_entropy", "both": "union"},
        }
        for name, options in kinds.items():
            loss, _, sums, prepared = run(Selective(ratio=case["ratio"], **options), arrays["logits"], batch | scores)
            np.testing.assert_array_equal(prepared["decided"], arrays[f"mask_{name}"])
            np.testing.assert_allclose(loss, case["loss"][name], rtol=1e-5)
            assert sums["chosen"] == case["k"][name]


def random_case(seed=0, B=4, T=12, V=7):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((B, T)) < 0.9, rng.integers(0, V, (B, T)), -1)
    return rng.normal(size=(B, T, V)).astype(np.float32), as_batch(labels, rng.normal(1.5, 1, (B, T)))


def test_answers_and_missing_tokens_can_be_kept():
    logits, batch = random_case()
    batch["answer_mask"] = np.float32(np.arange(12) == 3) * batch["loss_mask"]
    batch["reference_loss"] = np.where(np.arange(12) == 7, np.nan, batch["reference_loss"]).astype(np.float32)
    said = {}

    def chosen(**options):
        _, gradient, sums, _ = run(Selective(ratio=0.2, **options), logits, batch)
        mask = np.any(np.asarray(gradient) != 0, axis=2)
        said[tuple(options)] = summary(sums)["selected_of_answers"]
        np.testing.assert_allclose(said[tuple(options)], mask[batch["answer_mask"] > 0].mean(), rtol=1e-6)
        return mask

    plain, answers, missing = chosen(), chosen(always_select_answers=True), chosen(missing="select")
    assert not plain[:, 7].any()
    np.testing.assert_array_equal(answers[:, 3], batch["answer_mask"][:, 3] > 0)
    np.testing.assert_array_equal(missing[:, 7], batch["loss_mask"][:, 7] > 0)
    assert (
        answers.sum() == int(0.2 * (batch["loss_mask"].sum() - batch["loss_mask"][:, 7].sum() - answers[:, 3].sum())) + answers[:, 3].sum()
    )
    assert not chosen(loss="answers")[:, np.arange(12) != 3].any()
    assert said["always_select_answers",] == 1 > said[()]


def test_each_position_bucket_has_its_share():
    """Where the reference is worse far in, as one with a short window is, plain selection drops what stands there."""
    logits, batch = random_case(B=8, T=30)
    batch["reference_loss"] += np.float32(10 * (np.arange(30) >= 10))
    share = lambda **options: np.any(np.asarray(run(Selective(ratio=0.3, **options), logits, batch)[1]) != 0, axis=2).sum(axis=0)
    plain, bucketed = share(), share(scope="position", bucket=10)
    assert plain[10:].sum() == 0
    for at in range(0, 30, 10):
        candidates = batch["loss_mask"][:, at : at + 10].sum()
        assert bucketed[at : at + 10].sum() == int(0.3 * candidates)


def test_a_model_against_itself_and_warm_up():
    """No token has an excess: the first ones are taken. In the warm-up all are."""
    logits, batch = random_case()
    batch |= reference_scores(Selective(), Given(logits), batch)
    for options, share in (({}, 0.6), ({"warmup_steps": 6}, 1.0)):
        _, gradient, sums, _ = run(Selective(**options), logits, batch)
        count = int(share * batch["loss_mask"].sum())
        assert sums["chosen"] == count
        chosen = np.any(np.asarray(gradient) != 0, axis=2)
        np.testing.assert_array_equal(np.flatnonzero(chosen.ravel()), np.flatnonzero(batch["loss_mask"].ravel())[:count])
        assert sums["below_reference"] == 0
        assert summary(sums).get("selected_tied") == (1 if share < 1 else None)


def test_random_numbers_are_of_the_step():
    _, batch = random_case()
    drawn = [np.asarray(prepare(Selective(score="random"), batch, step=jnp.int32(step), seed=1)["decided"]) for step in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])
    assert drawn[0].sum() == int(0.6 * batch["loss_mask"].sum())


MODEL = TransformerConfig(vocab_size=64, dim=16, layers=1, heads=2, feed_forward=24, remat=False)


def steps_of(objective, devices=1, **options):
    experiment = Experiment("tiny", MODEL, PasskeyData(lengths=(96,)), objective=objective, batch_size=8, **options)
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    return make_steps(experiment, mesh), mesh


def tiny_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 33)).astype(np.int32)
    ids = np.repeat(np.arange(1, 4), 11)[None].repeat(8, 0).astype(np.int32)
    mask = np.float32(ids[:, 1:] == ids[:, :-1])
    reference = rng.normal(4, 1, (8, 32)).astype(np.float32)
    return {"tokens": tokens, "segment_ids": ids, "loss_mask": mask, "answer_mask": np.zeros_like(mask), "reference_loss": reference}


def trained(objective, devices=1, steps=3, **options):
    """Parameters after some steps, and the last step's metrics."""
    with jax.numpy_dtype_promotion("standard"):
        made, mesh = steps_of(objective, devices, **options)
        with jax.set_mesh(mesh):
            state = made.init(jax.random.key(0))
            for _ in range(steps):
                state, metrics = made.train_step(state, tiny_batch())
    return jax.tree.map(np.asarray, state.model), jax.tree.map(np.asarray, metrics)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_ratio_of_one_is_ordinary_training(accumulation):
    """To the last bit."""
    plain, _ = trained(NextToken(), accumulation=accumulation)
    selective, metrics = trained(Selective(ratio=1.0), accumulation=accumulation)
    jax.tree.map(np.testing.assert_array_equal, plain, selective)
    assert metrics["selection"] == {}


@pytest.mark.parametrize("kind", models.MODELS, ids=lambda kind: kind.__name__)
def test_any_architecture(kind):
    """The loss is the mean of those losses that exceed the reference's the most, and its gradient theirs."""
    config = dataclasses.replace(next(iter(kind.examples().values())), vocab_size=64)
    model, batch = models.build(config, nnx.Rngs(0)), tiny_batch()
    losses_BT, _ = jax.jit(functools.partial(row_losses, chunk=32))(model, batch)
    there = np.flatnonzero(batch["loss_mask"])
    excess = (np.asarray(losses_BT) - batch["reference_loss"]).ravel()[there]
    top = there[np.argsort(-excess)[: round(0.5 * len(there))]]
    mean_of_top = lambda model: jnp.mean(row_losses(model, batch, chunk=32)[0].ravel()[top])
    objective = Selective(ratio=0.5)
    prepared = prepare(objective, batch, step=jnp.int32(0), seed=0)
    found = jax.jit(jax.value_and_grad(lambda model: selective_loss(objective, model, prepared)[0]))(model)
    expected = jax.jit(jax.value_and_grad(mean_of_top))(model)
    # float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_devices_select_the_same():
    one, eight = (trained(Selective(ratio=0.5), devices, steps=1) for devices in (1, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[0], eight[0])
    for name in ("chosen", "chosen_by_position"):
        np.testing.assert_array_equal(one[1]["selection"][name], eight[1]["selection"][name])
    np.testing.assert_allclose(one[1]["gradient_norm"], eight[1]["gradient_norm"], rtol=1e-5)


def test_two_passes_rank_the_whole_batch():
    whole, expected = trained(Selective(ratio=0.4), steps=1)
    two, found = trained(Selective(ratio=0.4, two_passes=True), steps=1, accumulation=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, two)
    places = lambda metrics: metrics["selection"]["chosen_by_position"].tolist()
    assert places(found) == places(expected)
    _, other = trained(Selective(ratio=0.4), steps=1, accumulation=4)
    assert places(other) != places(expected), "each microbatch by itself selects others"


def test_pieces_of_documents():
    """Each target once, with half a window before it at least, but at a document's beginning."""
    sizes = [1, 2, 9, 30, 8, 0, 5]
    corpus = Corpus(np.arange(sum(sizes), dtype=np.uint8), np.cumsum([0, *sizes]), tuple("abcdefg"), np.array(sizes))
    found = pieces(corpus, 8, 4)
    assert max(piece.size for piece in found) == 9
    kept = np.full(sum(sizes), np.nan)
    for row in rows(found, 8):
        batch = row_batch(corpus, row, 8)
        assert batch["tokens"].shape == (9,)
        keep_row(kept, row, batch["tokens"][1:].astype(float))
    expected = np.arange(sum(sizes), dtype=float)
    expected[corpus.starts[:-1][np.array(sizes) > 0]] = np.nan
    np.testing.assert_array_equal(kept, expected)
    for piece in found:
        at_start = piece.begin in corpus.starts
        assert piece.first == 1 if at_start else piece.first > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, r"objective\.ratio is 0.0; it must be from 0.0001 to 1"),
        ({"ratio": float("nan")}, r"objective\.ratio is nan"),
        ({"score": "best"}, r"objective\.score is best; it must be one of excess"),
        ({"also": "random"}, r"objective\.also is random with objective\.score excess; both must be of"),
        ({"scope": "word"}, r"objective\.scope is word"),
        ({"warmup_steps": -1}, r"objective\.warmup_steps is -1"),
        ({"bucket": 0}, r"objective\.bucket is 0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Selective(**changes)


EXPERIMENTS = """
import dataclasses
import functools
from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.selective import Selective

def reference():
    model = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, remat=False)
    evaluation = Evaluation(lengths=(16,), perplexity=PerplexityEvaluation(documents=2, scored=8))
    data = CorpusData("texts.jsonl", length=16, validation_fraction=0.5)
    return Experiment("reference", model, data, steps=2, batch_size=8, log_every=1, evaluation=evaluation)

def online():
    return dataclasses.replace(reference(), name="online", objective=Selective(reference="reference"))

def stored():
    data = dataclasses.replace(reference().data, reference="scores")
    return dataclasses.replace(reference(), name="stored", objective=Selective(), data=data)
"""


def test_commands(tmp_path, monkeypatch, command_line):
    """A reference is trained and scores a corpus; both ways of asking it train, evaluate and are refused what does not fit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    write = lambda count: (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} times {n} is {n**2}. " * 3}) + "\n" for n in range(count))
    )
    write(30)

    run, fails = command_line
    run("train experiments.py:reference --workdir reference")
    score = "score-tokens reference texts.jsonl scores --validation-fraction 0.5"
    fails("train experiments.py:stored --workdir stored", "scores", "header.json")
    run(f"{score} --entropy --batch 8")
    kept = {name: np.load(tmp_path / "scores" / f"reference_{name}.npy") for name in ("loss", "entropy")}
    corpus = load_corpus("texts.jsonl", load_tokenizer("bytes"), "train", 0.5)
    for values in kept.values():
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(values)), corpus.starts[:-1])
    # What was killed after its first rows goes on and comes to the same.
    header = json.loads((tmp_path / "scores" / "header.json").read_text())
    (tmp_path / "scores" / "header.json").write_text(json.dumps(header | {"rows": 8, "complete": False}))
    fails("train experiments.py:stored --workdir stored", "scores is not complete")
    begun = np.full(len(corpus.tokens), np.nan)
    for row in rows(pieces(corpus, header["window"], header["stride"]), header["window"])[:8]:
        keep_row(begun, row, np.full(header["window"], 7.0))
    assert 0 < np.sum(begun == 7) < np.sum(np.isfinite(kept["loss"]))
    np.save(tmp_path / "scores" / "reference_loss.npy", begun.astype(np.float16))
    run(f"{score} --entropy --batch 8")
    again = np.load(tmp_path / "scores" / "reference_loss.npy")
    np.testing.assert_array_equal(again, np.where(begun == 7, np.float16(7), kept["loss"]))
    np.save(tmp_path / "scores" / "reference_loss.npy", kept["loss"])
    fails(f"{score} --batch 8", "other scores", "scores was")
    (tmp_path / "a_file").write_text("")
    fails("score-tokens reference texts.jsonl a_file", "a_file cannot be made")

    run("train experiments.py:online --workdir online")
    run("train experiments.py:stored --workdir stored")
    for name in ("online", "stored"):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        first = next(record for record in records if "selected" in record)
        assert 0.55 < first["selected"] <= 0.6
        assert len(first["selected_by_position"]) == 16
        assert first["selected_loss"] - first["selected_reference_loss"] > 0
    run("eval stored --tasks perplexity selection")
    run("eval online --tasks selection --output online.json")
    found, again = (json.loads((tmp_path / name).read_text())["tasks"]["selection"] for name in ("stored/eval.json", "online.json"))
    assert "ratio 0.6" in found["protocol"]
    assert "".join(token[0] for token in found["rows"][0]).count("times")
    numbers = [token[1:] for row in found["rows"] for token in row if token[1] is not None]
    assert {selected for *_, selected in numbers} == {True, False}
    assert np.mean([loss - known for loss, known, selected in numbers if selected]) > np.mean([loss - known for loss, known, _ in numbers])
    assert len(again["rows"]) == 2
    fails("eval reference --tasks selection", "an objective of kind Selective with a reference")
    fails("eval stored --tasks categories", "needs 3 checkpoints or more, 200 steps apart; stored has 0")
    run("train experiments.py:reference --workdir long --steps 4 --checkpoint-every 1 --keep-checkpoints 4")
    run("eval long --tasks categories")
    found = json.loads((tmp_path / "long" / "eval.json").read_text())["tasks"]["categories"]
    assert found["steps"] == [1, 2, 3, 4]
    np.testing.assert_allclose(sum(found["shares"].values()), 1)
    run("compare stored long --output report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "class=chosen" in page
    assert "excess +" in page
    assert (tmp_path / "report" / "categories.png").exists()
    run("info experiments.py:online")

    fails("train experiments.py:stored --workdir a --data.reference ''", "objective.score excess needs a reference")
    fails("train experiments.py:online --workdir a --data.reference scores", "leave one out")
    fails("train experiments.py:online --workdir a --objective.reference missing", "missing is not a folder")
    fails("train experiments.py:online --workdir a --objective.score loss", "objective.score is loss, which needs none")
    fails("train experiments.py:stored --workdir a --data.copy-tokens 4", "data.copy_tokens is 4")
    header = json.loads((tmp_path / "scores" / "header.json").read_text())
    (tmp_path / "scores" / "header.json").write_text(json.dumps(header | {"scores": ["reference_loss"]}))
    fails("train experiments.py:stored --workdir a --objective.score low_reference_entropy", "scores has no reference_entropy")
    # A reference that has learnt on is another one.
    run("train experiments.py:reference --workdir reference --steps 3 --allow-config-change")
    fails("train experiments.py:online --workdir online --steps 2", "another config")
    write(31)
    fails("train experiments.py:stored --workdir a", "data.reference scores was made for another number of tokens than data has")
    # Where the scores are gone, what was trained with them is evaluated all the same.
    write(30)
    (tmp_path / "scores").rename(tmp_path / "elsewhere")
    run("eval stored --tasks perplexity")
    fails("eval stored --tasks selection", "header.json")
    fails("score-tokens reference texts.jsonl scores --batch 0", "--batch is 0")


def test_stored_scores_are_those_of_the_moment(tmp_path, monkeypatch):
    """In float32, of documents that are whole in their rows: then they select the same tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    # With its start token a document has as many tokens as a row.
    texts = [f"{n:05d} is a number"[:15] for n in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with jax.numpy_dtype_promotion("standard"):
        cli.main(["train", "experiments.py:reference", "--workdir", "reference"])
        cli.main(["score-tokens", "reference", "texts.jsonl", "scores", "--validation-fraction", "0.5", "--dtype", "float32"])
    data = CorpusData("texts.jsonl", length=16, validation_fraction=0.5, reference="scores")
    batch = next(train_batches(data, 8, seed=0, step=0))
    model = load_model(tmp_path / "reference", make_mesh(MeshConfig(data=1), jax.devices()[:1])).model
    online = reference_scores(Selective(), model, batch)["reference_loss"]
    counts = batch["loss_mask"] > 0
    np.testing.assert_allclose(batch["reference_loss"][counts], online[counts], atol=1e-5)
    losses_BT, _ = row_losses(models.build(model.config, nnx.Rngs(5)), batch, chunk=16)
    masks = [select(Selective(), losses_BT - known, jnp.asarray(counts), 6000).mask for known in (batch["reference_loss"], online)]
    np.testing.assert_array_equal(*masks)


class Table(nnx.Module):
    """A model that knows nothing but the last token."""

    def __init__(self, size):
        self.logits_VV = nnx.Param(jnp.zeros((size, size)))

    def init_state(self, batch_size, capacity=None, planned=None):
        return ()

    def hidden(self, tokens_BT, state, segment_ids_BT=None):
        return self.logits_VV[...][tokens_BT], state

    def logits(self, hidden_BTD):
        return hidden_BTD


def test_noise_is_not_learnt():
    """Text of a Markov chain, 30% of whose tokens are noise: a reference that knows the clean text keeps the noise out."""
    rng, V, B, T = np.random.default_rng(0), 64, 64, 32
    chain_VV = rng.dirichlet(np.full(V, 0.05), V)
    cumulative_VV = np.cumsum(chain_VV, axis=1)

    def text(rows):
        tokens = np.empty((rows, T + 1), np.int32)
        tokens[:, 0] = rng.integers(0, V, rows)
        for t in range(T):
            drawn = rng.random(rows)[:, None] > cumulative_VV[tokens[:, t]]
            tokens[:, t + 1] = np.minimum(drawn.sum(axis=1), V - 1)
        return tokens

    def batch_of(tokens, noise):
        ones = np.ones((len(tokens), T), np.float32)
        noisy = rng.random(tokens.shape) < noise
        tokens = np.where(noisy, rng.integers(0, V, tokens.shape), tokens).astype(np.int32)
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "loss_mask": ones, "answer_mask": 0 * ones}, noisy

    optimizer, held_out = optax.adam(0.1), batch_of(text(256), 0.0)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def update(objective, model, state, batch, step):
        batch = prepare(objective, batch, step=step, seed=0)
        gradient, (_, sums) = jax.grad(lambda model: selective_loss(objective, model, batch), has_aux=True)(model)
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, sums

    @jax.jit
    def chosen(model, batch):
        losses_BT, _ = row_losses(model, batch, chunk=T)
        return select(Selective(), losses_BT - batch["reference_loss"], batch["loss_mask"] > 0, 6000).mask

    scored = jax.jit(functools.partial(reference_scores, Selective()))

    def train(objective, noise, reference=None):
        model = Table(V)
        state, chosen_noise = optimizer.init(model), []
        for step in range(400):
            batch, noisy = batch_of(text(B), noise)
            if reference is not None:
                batch |= scored(reference, batch)
            model, state, _ = update(objective, model, state, batch, jnp.int32(step))
            if reference is not None and step >= 300:
                chosen_noise.append(noisy[:, 1:][np.asarray(chosen(model, batch))].mean())
        losses_BT, _ = row_losses(model, held_out, chunk=T)
        return model, float(losses_BT.mean()), np.mean(chosen_noise) if chosen_noise else None

    everything = Selective(ratio=1.0, score="random")
    reference, clean, _ = train(everything, 0.0)
    _, plain, _ = train(everything, 0.3)
    _, selective, share = train(Selective(), 0.3, reference)
    assert clean < selective < plain - 0.3
    assert share < 0.15
