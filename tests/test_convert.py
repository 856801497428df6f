"""From a Hugging Face folder to a run folder and back, by the commands a user types; generating and training with pretrained weights."""

import dataclasses
import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

from infinicontext import models, pretrained
from infinicontext.cli import main
from infinicontext.commands import all_on_tensor
from infinicontext.data.tokenizers import word_tokenizer
from infinicontext.models import BeaconConfig, FamConfig, MegalodonConfig, TransformerConfig
from infinicontext.nn.rope import RopeConfig
from infinicontext.training.run_folder import load_config
from infinicontext.training.weights import load_model, restore, speaker, starting_model, stop_ids

WORDS = "the key is one two three four five six seven eight nine ten , ."
EXPERIMENT = """
from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext import pretrained

def tune():
    return Experiment("tune", pretrained.read_config({folder!r}), CorpusData({text!r}, {folder!r}, length=16, validation_fraction=0.5),
                      start_from={folder!r}, steps=2, batch_size=8, validation_batches=1, evaluation=Evaluation(lengths=(8,)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pretrained model with a tokenizer, as transformers would have written it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tokenizer = word_tokenizer([WORDS])
    rope = RopeConfig("longrope", original_length=16, length=64, long_factors=(2.0, 3.0))
    config = TransformerConfig(tokenizer.vocab_size, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, rope=rope)
    # Larger weights: decided opinions, so that greedy text is no single repeated word.
    model = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, models.build(config, nnx.Rngs(0)))
    pretrained.save(model, folder, family="llama")
    tokenizer.library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "nested" / "tiny"
    main(["convert", str(folder), str(target)])
    return target


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax relies on the promotion that the other tests forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_there_and_back(folder, run, tmp_path):
    main(["convert", str(run), str(tmp_path / "back")])
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert pretrained.read_config(tmp_path / "back") == pretrained.read_config(folder)
    main(["convert", str(run), str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size


def test_both_kinds_of_folder_generate_the_same(folder, run, capsys, tmp_path):
    def generated(model, *options):
        main(["generate", "the key is", "--model", str(model), "--max-new-tokens", "20", *options])
        return capsys.readouterr().out

    assert generated(folder) == generated(run) != generated(run, "--rope-policy", "short")
    text = generated(folder)
    assert text.endswith("\n")
    assert len(text.split()) > 3
    word = text.split()[2]
    assert generated(folder, "--stop", word).strip() == text[: text.index(word)].strip()
    drawn = [generated(folder, "--temperature", "2", "--top-k", "12", "--top-p", "0.95", "--seed", seed) for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(generated(folder, "--dtype", "bfloat16").split()) > 3

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one two"}\n\n{"prompt": "the key is"}\n{"prompt": "six"}\n')
    output = tmp_path / "out.jsonl"
    arguments = ["--prompts-file", str(tmp_path / "prompts.jsonl"), "--batch-size", "2", "--output", str(output), "--max-new-tokens", "20"]
    main(["generate", "--model", str(run), *arguments])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["one two", "the key is", "six"]
    assert records[1]["completion"] == text[:-1]
    assert {record["finish"] for record in records} <= {"stop", "length"}
    main(["generate", "one two", "six", "--model", str(run), "--max-new-tokens", "20"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["completion"] for line in lines] == [records[0]["completion"], records[2]["completion"]]


def test_prompt_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the key is"))
    main(["generate", "--model", str(folder), "--max-new-tokens", "3"])
    piped = capsys.readouterr().out
    main(["generate", "the key is", "--model", str(folder), "--max-new-tokens", "3"])
    assert piped == capsys.readouterr().out != "\n"


def test_training_starts_from_pretrained_weights(folder, run, tmp_path, capsys):
    lines = [json.dumps({"text": f"{WORDS} " * number}) for number in range(1, 20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "experiments.py").write_text(EXPERIMENT.format(folder=str(folder), text=str(tmp_path / "text.jsonl")))
    reference = f"{tmp_path}/experiments.py:tune"
    main(["train", reference, "--workdir", str(tmp_path / "tuned"), "--optimizer.learning-rate", "0"])
    assert stop_ids(tmp_path / "tuned" / "huggingface") == (1, 0)
    main(["convert", str(tmp_path / "tuned"), str(tmp_path / "out")])
    for name, value in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)
    assert (tmp_path / "out" / "tokenizer.json").exists()

    # From a run folder too, and with another window, which changes no parameter.
    window = ("--model.attention", "window", "--model.window", "8", "--start-from", str(run))
    main(["train", reference, "--workdir", str(tmp_path / "window"), "--optimizer.learning-rate", "1e-3", *window])
    capsys.readouterr()
    main(["generate", "the key is", "--model", str(tmp_path / "window"), "--max-new-tokens", "5"])
    main(["eval", str(tmp_path / "window")])
    assert json.loads((tmp_path / "window" / "eval.json").read_text())["tasks"]["perplexity"]
    capsys.readouterr()

    other = ("--model.feed-forward", "32", "--workdir", str(tmp_path / "other"))
    assert "model.feed_forward_size 32, it has 24" in fails(capsys, "train", reference, *other)
    assert not (tmp_path / "other").exists()
    missing = ("--start-from", str(tmp_path / "nowhere"), "--workdir", str(tmp_path / "other"))
    assert "config.json does not exist" in fails(capsys, "train", reference, *missing)
    assert not (tmp_path / "other").exists()


def test_wrong_input_is_one_sentence(folder, run, tmp_path, capsys):
    assert "there is no prompt" in fails(capsys, "generate", "--model", folder, "--prompts-file", _written(tmp_path / "empty.txt", ""))
    assert "cannot be read" in fails(capsys, "generate", "--model", folder, "--prompts-file", tmp_path / "nowhere.txt")
    wrong = _written(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"text": 1}')
    assert "prompt 2 is not a JSON object with a field prompt" in fails(capsys, "generate", "--model", folder, "--prompts-file", wrong)
    assert "is not a folder" in fails(capsys, "generate", "a", "--model", tmp_path / "nowhere")
    assert "config.json does not exist" in fails(capsys, "generate", "a", "--model", tmp_path)
    assert "temperature is -1" in fails(capsys, "generate", "a", "--model", folder, "--temperature", "-1")
    assert "--stop has an empty text" in fails(capsys, "generate", "a", "--model", folder, "--stop", "")
    assert "--batch-size is 0" in fails(capsys, "generate", "a", "--model", folder, "--batch-size", "0")
    assert "no checkpoint of step 7" in fails(capsys, "generate", "a", "--model", run, "--step", "7")
    assert "cannot be written" in fails(capsys, "generate", "a", "--model", run, "--output", tmp_path)
    assert "--model" in fails(capsys, "generate", "a")
    old = _written(tmp_path / "old.jsonl", "old results")
    assert "a prompt is empty" in fails(capsys, "generate", "", "--model", folder, "--output", old)
    assert old.read_text() == "old results"
    assert "max_new_tokens is 99999999999" in fails(capsys, "generate", "a", "--model", folder, "--max-new-tokens", "99999999999")

    before = sorted(path.name for path in run.iterdir())
    assert "exists already" in fails(capsys, "convert", folder, run)
    assert "exists already" in fails(capsys, "convert", run, folder)
    assert "is no run folder; convert it to one first" in fails(capsys, "convert", folder, tmp_path / "new", "--to", "huggingface")
    assert "--dtype goes with" in fails(capsys, "convert", folder, tmp_path / "new", "--dtype", "bfloat16")
    assert "--step is 3" in fails(capsys, "convert", folder, tmp_path / "new", "--step", "3")
    assert "--step is 3" in fails(capsys, "generate", "a", "--model", folder, "--step", "3")
    assert "config.json does not exist" in fails(capsys, "convert", tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_can_be_moved_and_thinned(run, tmp_path, capsys, monkeypatch):
    """A converted run folder knows its tokenizer wherever it lies; convert --to run keeps the parameters alone."""
    shutil.copytree(run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    main(["convert", "moved", "thin", "--to", "run"])
    shutil.rmtree(tmp_path / "moved")
    capsys.readouterr()
    texts = []
    for model in (run, "thin"):
        main(["generate", "the key is", "--model", str(model), "--max-new-tokens", "9"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_evaluations_speak_as_the_model_was_trained_to(tmp_path):
    """A tokenizer that adds no start token gets none before questions, and every end that its folder names ends an answer."""
    folder = tmp_path / "folder"
    pretrained.save(models.build(TransformerConfig(vocab_size=60, dim=16, layers=1, heads=2, feed_forward=24), nnx.Rngs(0)), folder)
    for start in (None, 1):
        kept = word_tokenizer([WORDS]).library
        if start is not None:
            kept.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        kept.save(str(folder / "tokenizer.json"))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
        main(["convert", str(folder), str(tmp_path / "run")])
        found = speaker(tmp_path / "run", load_config(tmp_path / "run"))
        assert found.start_id == start
        assert found.stop_ids == {1, 5, 7}
        assert found.fingerprint() == load_model(tmp_path / "run", all_on_tensor()).tokenizer.fingerprint()


def test_a_run_trained_with_another_tokenizer_forgets_the_old_one(tmp_path, capsys):
    """Its end-of-text ids, its special tokens and its tokenizer.json belong to another vocabulary."""
    config = TransformerConfig(vocab_size=300, dim=16, layers=1, heads=2, feed_forward=24)
    folder = tmp_path / "folder"
    pretrained.save(models.build(config, nnx.Rngs(0)), folder)
    word_tokenizer([WORDS]).library.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    lines = [json.dumps({"text": f"{WORDS} " * number}) for number in range(1, 20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "experiments.py").write_text(EXPERIMENT.format(folder=str(folder), text=str(tmp_path / "text.jsonl")))
    arguments = ["--workdir", str(tmp_path / "bytes"), "--data.tokenizer", "bytes"]
    main(["train", f"{tmp_path}/experiments.py:tune", *arguments])
    loaded = load_model(tmp_path / "bytes", all_on_tensor())
    assert (loaded.start, loaded.stop) == ((256,), (256,))
    main(["generate", "the", "--model", str(tmp_path / "bytes"), "--max-new-tokens", "3"])
    main(["convert", str(tmp_path / "bytes"), str(tmp_path / "out")])
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert stop_ids(tmp_path / "out") == ()
    other = ("--start-from", tmp_path / "bytes", "--model.tied-embeddings", "True", "--workdir", tmp_path / "other")
    capsys.readouterr()
    assert "with other parameters, in 1 places" in fails(capsys, "train", f"{tmp_path}/experiments.py:tune", *other)


def test_official_megalodon_there_and_back(tmp_path, capsys):
    config = MegalodonConfig(vocab_size=17, dim=12, layers=2, heads=2, z_dim=8, value_dim=12, feed_forward=16, cema_order=2, norm_groups=4)
    model = models.build(config, nnx.Rngs(0))
    pretrained.megalodon.save(model, tmp_path / "official", shards=2)
    main(["convert", str(tmp_path / "official"), str(tmp_path / "run")])
    main(["convert", str(tmp_path / "run"), str(tmp_path / "back"), "--to", "megalodon"])
    for one, other in zip(jax.tree.leaves(pretrained.megalodon.load(tmp_path / "back")), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)
    main(["convert", str(tmp_path / "run"), str(tmp_path / "two"), "--to", "megalodon", "--shards", "2"])
    assert (tmp_path / "two" / "consolidated.01.pth").exists()
    assert "shards is 3; " in fails(capsys, "convert", tmp_path / "run", tmp_path / "hf", "--to", "megalodon", "--shards", "3")
    assert "--shards is 2; it goes with" in fails(capsys, "convert", tmp_path / "run", tmp_path / "hf", "--shards", "2")
    assert "transformers has no Megalodon" in fails(capsys, "convert", tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_rotary_frequencies_and_norm_refresh_on_the_command_line(run, tmp_path, capsys):
    tokenizer = word_tokenizer([WORDS])
    config = MegalodonConfig(
        vocab_size=tokenizer.vocab_size,
        dim=12,
        layers=1,
        z_dim=4,
        feed_forward=16,
        cema_order=2,
        chunk=3,
        norm_groups=4,
        rope_frequencies=(1.0, 0.5),
    )
    pretrained.megalodon.save(models.build(config, nnx.Rngs(0)), tmp_path / "official")
    tokenizer.library.save(str(tmp_path / "official" / "tokenizer.json"))
    with pytest.warns(UserWarning, match="--rope formula"):
        main(["convert", str(tmp_path / "official"), str(tmp_path / "stored")])
    main(["convert", str(tmp_path / "official"), str(tmp_path / "formula"), "--rope", "formula"])
    frequencies = [load_config(tmp_path / name).model.rope_frequencies for name in ("stored", "formula")]
    assert frequencies == [(1.0, 0.5), None]
    assert "is no checkpoint of the official" in fails(capsys, "convert", run, tmp_path / "new", "--to", "run", "--rope", "formula")
    assert "is no checkpoint of the official" in fails(capsys, "generate", "the", "--model", run, "--rope", "formula")

    generate = ("generate", WORDS + WORDS, "--model", tmp_path / "official", "--rope", "formula", "--max-new-tokens", "3")
    main([*map(str, generate), "--norm-refresh", "2", "1", "1"])
    assert capsys.readouterr().out.strip()
    assert "--norm-refresh is (2, 6, 2); the first number must be" in fails(capsys, *generate, "--norm-refresh", "2", "6", "2")
    refused = fails(capsys, "generate", "the key is", "--model", run, "--norm-refresh", "8", "6", "2")
    assert "goes with a Megalodon, not with a Transformer" in refused


def test_a_tokenizer_with_more_tokens_than_the_model(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    word_tokenizer([WORDS + " and more words than before"]).library.save(str(copy / "tokenizer.json"))
    assert "tokens, its model" in fails(capsys, "generate", "a", "--model", copy)
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer.json, so it cannot read text" in fails(capsys, "generate", "a", "--model", copy)
    main(["convert", str(copy), str(tmp_path / "silent")])
    assert "has no tokenizer.json, so it cannot read text" in fails(capsys, "generate", "a", "--model", tmp_path / "silent")


def _written(path, text):
    path.write_text(text)
    return path


def test_a_transformer_gets_a_memory(run, tmp_path, capsys):
    """Within a segment it reads as before; beyond, without the memory, as a Transformer that sees each segment alone."""
    target = tmp_path / "infini"
    main(["convert", str(run), str(target), "--to", "infini", "--segment", "8"])
    mesh = all_on_tensor()
    with jax.set_mesh(mesh):
        base, infini = load_model(run, mesh).model, load_model(target, mesh).model
        tokens_BT = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 20), np.int32)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def logits(model, config, capacity=20):
            model = jax.tree.unflatten(jax.tree.structure(models.abstract(config)), jax.tree.leaves(model))
            return model(tokens_BT[:, :capacity], model.init_state(2, capacity=8))[0]

        # Rotary factors are those of a segment's length, not those of the 20 tokens.
        whole_BTV, found_BTV = logits(base, base.config, 8), logits(infini, infini.config)
        np.testing.assert_allclose(found_BTV[:, :8], whole_BTV, atol=1e-5)
        np.testing.assert_allclose(logits(infini, dataclasses.replace(infini.config, gate="closed"))[:, :8], whole_BTV, atol=1e-5)
        whole_BTV = logits(base, dataclasses.replace(base.config, attention="window", window=20))
        assert np.abs(found_BTV[:, 8:] - whole_BTV[:, 8:]).max() > 1e-3
        alone = dataclasses.replace(base.config, attention="block_window", block=8, memory_blocks=0)
        closed = dataclasses.replace(infini.config, gate="closed")
        np.testing.assert_allclose(logits(infini, closed), logits(base, alone), atol=1e-5)
    assert set(np.asarray(infini.blocks.attention.gate[...]).ravel()) == {-3.0}
    assert "its model is of kind Infini" in fails(capsys, "convert", target, tmp_path / "twice", "--to", "infini")
    assert "--segment is 8" in fails(capsys, "convert", run, tmp_path / "other", "--to", "run", "--segment", "8")
    assert "model.segment is 0" in fails(capsys, "convert", run, tmp_path / "other", "--to", "infini", "--segment", "0")
    assert not (tmp_path / "other").exists()


def test_a_transformer_gets_beacons(run, tmp_path, capsys):
    """They begin as copies; before the first of them it reads as before. They alone are trained; the official format keeps them."""
    convert = lambda *options: main(["convert", *map(str, options)])
    convert(run, tmp_path / "beacons", "--to", "beacon", "--chunk", "8", "--ratios", "4")
    assert load_config(tmp_path / "beacons").optimizer.train == ("beacon",)
    convert(tmp_path / "beacons", tmp_path / "official")
    convert(run, tmp_path / "other", "--to", "beacon", "--beacon-token", "2", "--sinks", "1")
    mesh = all_on_tensor()
    with jax.set_mesh(mesh):
        base, model, again, other = (
            load_model(folder, mesh).model for folder in (run, *(tmp_path / name for name in ("beacons", "official", "other")))
        )
        tokens_BT = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 20), np.int32)
        # So many tokens come to 15 positions, which are within the Transformer's own; its table is that of short texts, too.
        logits = lambda model: model(tokens_BT, model.init_state(2, capacity=20, planned=15 if model is base else 20))[0]
        np.testing.assert_allclose(logits(model)[:, :4], logits(base)[:, :4], atol=1e-4)
        assert np.abs(logits(model) - logits(base))[:, 4:].max() > 1e-3
        np.testing.assert_array_equal(logits(again), logits(model))
        table_VD, attention = base.embedding.table[...], model.blocks.attention
        np.testing.assert_array_equal(model.beacon[...], table_VD[1:2])
        np.testing.assert_array_equal(other.beacon[...], table_VD[2:3])
        np.testing.assert_array_equal(attention.beacons.k[...], attention.k[...])
        assert (other.config.chunk, other.config.ratios, other.config.sinks) == (1024, (8,), 1)
        assert (again.config.chunk, again.config.ratios) == (8, (4,))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(np.roll(WORDS.split(), i))}) for i in range(16)))
    (tmp_path / "tune.py").write_text(
        EXPERIMENT.format(folder=str(tmp_path / "official"), text=str(tmp_path / "text.jsonl")).replace(
            "steps=2", 'steps=2, optimizer=OptimizerConfig(train=("beacon",), learning_rate=1e-2, warmup_steps=1)'
        )
        + "from infinicontext.training.optimizer import OptimizerConfig\n"
    )
    main(["train", f"{tmp_path / 'tune.py'}:tune", "--workdir", str(tmp_path / "tuned")])
    with jax.set_mesh(mesh):
        tuned = load_model(tmp_path / "tuned", mesh).model
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(tuned)):
        if "beacon" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(before, after)
    assert np.any(np.asarray(tuned.blocks.attention.beacons.v[...]) != np.asarray(again.blocks.attention.beacons.v[...]))
    capsys.readouterr()
    refused = lambda *options: fails(capsys, "convert", *options)
    assert "--ratios is [4]; it goes with --to beacon" in refused(run, tmp_path / "no", "--to", "infini", "--ratios", "4")
    assert "--beacon-token is 99" in refused(run, tmp_path / "no", "--to", "beacon", "--beacon-token", "99")
    assert "model.ratios is (3,)" in refused(run, tmp_path / "no", "--to", "beacon", "--ratios", "3")
    assert not (tmp_path / "no").exists()


def test_beacons_begin_as_copies(tmp_path):
    """Of biases and the output projection, too; training that starts from a folder, as from a run, makes them."""
    config = TransformerConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, attention_bias=True)
    model = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape), models.build(config, nnx.Rngs(0)))
    pretrained.save(model, tmp_path / "qwen", family="qwen2")
    (tmp_path / "qwen" / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    beacons = BeaconConfig.of(config, chunk=8, ratios=(4,), beacon_output=True)
    with jax.set_mesh(all_on_tensor()):
        grown = starting_model(tmp_path / "qwen", beacons, all_on_tensor())
    attention = grown.blocks.attention
    for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
        np.testing.assert_array_equal(getattr(attention.beacons, name)[...], getattr(model.blocks.attention, name)[...])
    np.testing.assert_array_equal(attention.beacon_o[...], model.blocks.attention.o[...])
    np.testing.assert_array_equal(grown.beacon[0], model.embedding.table[3])


def test_a_transformer_gets_feedback_memory(run, tmp_path, capsys):
    """Without FAM it reads as before, or as with a window of blocks; FAM begins as embeddings of tokens and changes what is read."""
    convert = lambda name, *options: main(["convert", str(run), str(tmp_path / name), "--to", "fam", "--block", "8", *options])
    convert("bswa", "--fam-length", "0", "--memory-blocks", "2")
    convert("fam", "--fam-length", "4")
    convert("random", "--fam-length", "4", "--prompt", "random")
    mesh = all_on_tensor()
    with jax.set_mesh(mesh):
        base, bswa, fam, drawn = (
            load_model(folder, mesh).model for folder in (run, *(tmp_path / name for name in ("bswa", "fam", "random")))
        )
        tokens_BT = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 40), np.int32)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def logits(model, config, length):
            model = jax.tree.unflatten(jax.tree.structure(models.abstract(config)), jax.tree.leaves(model))
            return model(tokens_BT[:, :length], model.init_state(2, capacity=length))[0]

        np.testing.assert_allclose(logits(bswa, bswa.config, 24), logits(base, base.config, 24), atol=1e-5)
        banded = dataclasses.replace(base.config, attention="block_window", block=8, memory_blocks=2)
        np.testing.assert_allclose(logits(bswa, bswa.config, 40), logits(base, banded, 40), atol=1e-5)
        assert np.abs(logits(bswa, bswa.config, 40) - logits(base, base.config, 40)).max() > 1e-3
        for model in (fam, drawn):
            assert np.abs(logits(model, model.config, 8) - logits(base, base.config, 8)).max() > 1e-3
        table_VD, prompt_FD = np.asarray(base.embedding.table[...]), np.asarray(fam.prompt[...])
        assert (fam.config.block, fam.config.memory_blocks) == (8, 1)
        assert all((row == table_VD).all(axis=1).any() for row in prompt_FD)
        assert not any((row == table_VD).all(axis=1).any() for row in np.asarray(drawn.prompt[...]))
    refused = lambda *options: fails(capsys, "convert", *options)
    assert "its model is of kind Fam" in refused(tmp_path / "fam", tmp_path / "twice", "--to", "fam")
    assert "--fam-length is 4; it goes with --to fam" in refused(run, tmp_path / "other", "--to", "infini", "--fam-length", "4")
    assert "model.block is 0" in refused(run, tmp_path / "other", "--to", "fam", "--block", "0")
    assert not (tmp_path / "other").exists()


GROWING = """
import dataclasses
import pathlib

from infinicontext.data.pipeline import CorpusData
from infinicontext.experiment import Experiment
from infinicontext.models import AdaptedConfig, FamConfig, InfiniConfig
from infinicontext.nn.lora import Lora
from infinicontext.training.optimizer import OptimizerConfig
from infinicontext.training.run_folder import load_config

MODEL = load_config(pathlib.Path({run!r})).model
INFINI = InfiniConfig.of(MODEL, segment=8, update="linear", empty_memory="bypass")

def experiment(model, start_from, **options):
    data = CorpusData({folder!r}, {run!r} + "/huggingface", length=16, validation_fraction=0.5)
    return Experiment("t", model, data, start_from=start_from, steps=1, batch_size=8, validation_batches=1, **options)

def window():
    return experiment(dataclasses.replace(MODEL, attention="window", window=4), {run!r})

def adapted():
    return experiment(AdaptedConfig(MODEL, Lora(rank=2, parameters=("q",))), {run!r}, optimizer=OptimizerConfig(train=("lora",)))

def refused():
    return experiment(INFINI, {here!r} + "/window")

def blocks():
    return experiment(dataclasses.replace(MODEL, attention="block_window", block=4, memory_blocks=1), {run!r})

def feedback():
    fam = FamConfig.of(load_config(pathlib.Path({here!r}) / "blocks").model, fam_length=3)
    model = AdaptedConfig(fam, Lora(rank=2, parameters=("q", "up")))
    return experiment(model, {here!r} + "/blocks", optimizer=OptimizerConfig(train=("lora", "prompt"), warmup_steps=1), carry="fam")

def remembering():
    return experiment(INFINI, {here!r} + "/memory")
"""


def test_a_memory_for_windows_and_adapters(run, tmp_path, capsys):
    """A window shorter than a segment is refused; LoRA's adapters are merged, and what was to be trained is forgotten; training starts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"{WORDS} {i} {WORDS}")
    (tmp_path / "many.py").write_text(GROWING.format(run=str(run), folder=str(folder), here=str(tmp_path)))
    many = str(tmp_path / "many.py")
    for name in ("window", "adapted"):
        main(["train", f"{many}:{name}", "--workdir", str(tmp_path / name)])
    capsys.readouterr()
    refused = fails(capsys, "convert", tmp_path / "window", tmp_path / "other", "--to", "infini", "--segment", "8")
    assert "its tokens see the last 4; with a memory, segments must be no longer, not 8" in refused
    assert "its tokens see the last 4" in fails(capsys, "train", f"{many}:refused", "--workdir", tmp_path / "other")
    main(["convert", str(tmp_path / "adapted"), str(tmp_path / "memory"), "--to", "infini", "--segment", "8"])
    assert load_config(tmp_path / "memory").model.update == "linear"
    main(["info", str(tmp_path / "memory")])
    main(["train", f"{many}:remembering", "--workdir", str(tmp_path / "remembering")])


def test_feedback_memory_for_blocks_and_adapters(run, tmp_path, capsys):
    """A Transformer with a window of blocks keeps them; LoRA's adapters and the prompt are trained, and nothing else."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"{WORDS} {i} {WORDS}")
    (tmp_path / "many.py").write_text(GROWING.format(run=str(run), folder=str(folder), here=str(tmp_path)))
    for name in ("blocks", "feedback"):
        main(["train", f"{tmp_path / 'many.py'}:{name}", "--workdir", str(tmp_path / name)])
    capsys.readouterr()
    main(["convert", str(tmp_path / "blocks"), str(tmp_path / "fam"), "--to", "fam"])
    assert load_config(tmp_path / "fam").model == FamConfig.of(load_config(tmp_path / "blocks").model, fam_length=64)
    refused = fails(capsys, "convert", tmp_path / "blocks", tmp_path / "other", "--to", "fam", "--block", "8")
    assert "its tokens see blocks of 4 and 1 before their own; so must they with FAM, not 8 and 1" in refused
    mesh = all_on_tensor()
    config = load_config(tmp_path / "feedback").model
    by_name = lambda model: {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(model)}
    with jax.set_mesh(mesh):
        before = by_name(load_model(tmp_path / "blocks", mesh).model)
        adapted = restore(tmp_path / "feedback", config, mesh)[1]
        after = by_name(adapted.model)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set()
    assert [np.any(adapter.second[...]) for adapter in adapted.adapters.values()] == [True, True]
    (prompt,) = after.keys() - before.keys()
    assert not any((row == before[".embedding.table.value"]).all(axis=1).any() for row in after[prompt])
