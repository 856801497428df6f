"""The command line, in this process: what a user sees end to end, and one clear sentence for every mistake."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import jax
import pytest

from infinicontext.cli import main
from infinicontext.commands import parse_length

EXPERIMENTS = '''
import dataclasses

from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig


def full():
    """Full attention on a corpus."""
    return Experiment(
        name="full",
        model=TransformerConfig(dim=16, layers=1, heads=2),
        data=CorpusData("corpus.jsonl", length=32, validation_fraction=0.3),
        evaluation=Evaluation(lengths=(16, 64), segment=16, capacity=64, perplexity=PerplexityEvaluation(documents=2, scored=8)),
        steps=3,
        batch_size=8,
        log_every=1,
        validation_batches=1,
    )


def keys(window=8):
    """A window on passkeys."""
    return dataclasses.replace(
        full(),
        name="keys",
        model=TransformerConfig(vocab_size=64, dim=16, layers=1, heads=2, attention="window", window=window),
        data=PasskeyData(lengths=(96,), digits=2),
        evaluation=Evaluation(
            tasks=("passkey",),
            lengths=(96, 128),
            segment=32,
            passkey=PasskeyEvaluation(depths=(0.0, 1.0), samples=2, batch_size=4, digits=2),
        ),
    )


def sized(dim):
    return full()


def everything():
    return [full(), keys()]
'''


def tree(folder):
    """Everything below a folder: bytes of files, None for folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def restore(folder, before) -> list[str]:
    """Makes everything below the folder what it was, so that one failure is not the next one's; returns what had changed."""
    now = tree(folder)
    changed = sorted(path for path in now.keys() | before.keys() if path not in now or path not in before or now[path] != before[path])
    for path in map(Path, reversed(changed)):
        if str(path) not in before:
            path.rmdir() if path.is_dir() else path.unlink()
    for path in map(Path, changed):
        if str(path) in before:
            path.mkdir(exist_ok=True) if before[str(path)] is None else path.write_bytes(before[str(path)])
    return changed


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_it():
    """optax relies on the promotion that the other tests forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with experiments, corpora and the runs of a sweep: full and keys, evaluated; and folders that are no whole run."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "experiments.py").write_text(EXPERIMENTS)
    documents = [f"document {i}: " + " ".join(f"word{i * j % 7}" for j in range(30)) for i in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_text("a single document")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": ')
    (folder / "nothing_inside").mkdir()
    (folder / "other_things").mkdir()
    (folder / "other_things" / "photo.png").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["sweep", "experiments.py:everything", "--workdir", "runs"])
    (folder / "untrained").mkdir()
    shutil.copy(folder / "runs" / "full" / "config.json", folder / "untrained")
    for name, content in {"cut": b"{", "list": b"[]", "binary": b"\xff\xfe", "null": b'{"experiment": null}'}.items():
        (folder / f"config_{name}").mkdir()
        (folder / f"config_{name}" / "config.json").write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def _inside(world, monkeypatch):
    monkeypatch.chdir(world)


def mistake(line: str, world, capsys) -> str:
    """The sentence that a wrong command ends with; checks that it is one, that the status is 2 and that nothing changed on disk."""
    before = tree(world)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(line))
    finally:
        changed = restore(world, before)
    assert end.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("infinicontext: ")
    assert changed == []
    return sentence


TRAIN = "train experiments.py:full --workdir new"
MISTAKES = {
    # command: what the sentence must say
    "": ["COMMAND"],
    "trian experiments.py:full": ["trian", "train"],
    "train": ["experiment"],
    "eval": ["folder"],
    "compare --foo runs/full": ["--foo"],
    "eval runs/full --step x": ["--step", "x"],
    "train missing.py:full --workdir new": ["missing.py"],
    "train experiments.py:fulll --workdir new": ["experiments.py", "fulll", "did you mean full?"],
    "train experiments.py:dataclasses --workdir new": ["dataclasses", "full", "everything"],
    "train experiments.py --workdir new": ["experiments.py", "FILE.py:FUNCTION"],
    "train full --workdir new": ["full", "FILE.py:FUNCTION"],
    "train experiments.py:everything --workdir new": ["experiments.py:everything", "infinicontext sweep"],
    "sweep experiments.py:full --workdir new": ["experiments.py:full", "infinicontext train"],
    "train experiments.py:full": ["--workdir"],
    "sweep experiments.py:everything": ["--workdir"],
    "train experiments.py:full --workdir corpus.jsonl": ["--workdir", "corpus.jsonl"],
    "train experiments.py:full --workdir corpus.jsonl/new": ["--workdir", "corpus.jsonl"],
    "train experiments.py:full --workdir other_things": ["--workdir", "other_things", "config.json"],
    f"{TRAIN} --optimizer.learning-rat 1": ["--optimizer.learning-rat", "--optimizer.learning-rate"],
    f"{TRAIN} surplus": ["surplus"],
    f"{TRAIN} --steps": ["--steps"],
    f"{TRAIN} --steps many": ["--steps", "many", "int"],
    f"{TRAIN} --steps 1.5": ["--steps", "1.5", "int"],
    f"{TRAIN} --optimizer.learning-rate fast": ["--optimizer.learning-rate", "fast", "float"],
    f"{TRAIN} --model.tied-embeddings maybe": ["--model.tied-embeddings", "maybe", "True", "False"],
    f"{TRAIN} --model.attention windw": ["--model.attention", "windw", "full", "block_window"],
    f"{TRAIN} --steps 0": ["steps is 0", "1 or more"],
    f"{TRAIN} --model.heads 3": ["model.dim is 16", "model.heads, 3"],
    f"{TRAIN} --data.validation-fraction 1": ["data.validation_fraction is 1", "below 1"],
    f"{TRAIN} --optimizer.learning-rate -1": ["optimizer.learning_rate is -1"],
    f"{TRAIN} --accumulation 3": ["batch_size is 8", "accumulation, 3"],
    f"{TRAIN} --seed -1": ["seed is -1"],
    f"{TRAIN} --model.vocab-size 100": ["model.vocab_size is 100", "bytes", "257"],
    f"{TRAIN} --batch-size 12": ["batch_size is 12", "multiple of 8"],
    f"{TRAIN} --mesh.data 3": ["mesh is data 3", "devices, 8"],
    f"{TRAIN} --mesh.tensor 3": ["mesh is", "tensor 3", "devices, 8"],
    f"{TRAIN} --mesh.fsdp 0": ["mesh.fsdp is 0", "1 or more"],
    f"{TRAIN} --data.source missing.txt": ["data.source", "missing.txt"],
    f"{TRAIN} --data.source empty.txt": ["data.source", "empty.txt", "no text"],
    f"{TRAIN} --data.source nothing_inside": ["data.source", "nothing_inside", "no text"],
    f"{TRAIN} --data.source latin.txt": ["data.source", "latin.txt", "UTF-8"],
    f"{TRAIN} --data.source broken.jsonl": ["data.source", "broken.jsonl", "line 1", "JSON"],
    f"{TRAIN} --data.source one.txt": ["data.source", "one.txt", "split"],
    f"{TRAIN} --data.source other_things/photo.png": ["data.source", "photo.png", ".jsonl"],
    f"{TRAIN} --data.tokenizer missing.json": ["data.tokenizer", "missing.json", "bytes"],
    "train experiments.py:keys --workdir new --data.lengths 20": ["data.lengths", "20", "at least"],
    "train experiments.py:full --workdir runs/full --optimizer.learning-rate 0.5": ["learning_rate: 0.001 -> 0.5", "--allow-config-change"],
    "train experiments.py:full --workdir runs/full --model.dim 32 --allow-config-change": ["checkpoint 3", "config"],
    "train experiments.py:keys --workdir runs/full --allow-config-change": ["checkpoint 3", "config"],
    "eval missing": ["missing", "config.json"],
    "eval other_things": ["other_things", "config.json"],
    "eval config_cut": ["config.json"],
    "eval config_list": ["config.json"],
    "eval config_binary": ["config.json"],
    "eval config_null": ["config.json"],
    "eval untrained": ["untrained", "no checkpoint"],
    "eval runs/full --step 2": ["step 2", "3"],
    "eval runs/full --tasks perplexit": ["perplexit", "perplexity", "passkey"],
    "eval runs/keys --tasks perplexity": ["evaluation.tasks", "perplexity", "PasskeyData"],
    "eval runs/full --lengths 0": ["length 0", "64k"],
    "eval runs/full --lengths 32 1k": ["--lengths has 1024", "evaluation.capacity is 64"],
    "eval runs/full --lengths 16 4q": ["length 4q", "64k"],
    "eval runs/full --lengths -1": ["length -1", "64k"],
    "eval runs/full --lengths ''": ["length", "64k"],
    "eval runs/full --lengths 1.5k": ["length 1.5k", "64k"],
    "eval runs/full --model.norm-epsilon 1": ["--output", "model.norm_epsilon"],
    "eval runs/full --batch-size 24": ["evaluation", "batch_size:"],
    "eval runs/full --model.dim 32 --output other.json": ["other parameters"],
    "eval runs/full --steps 4": ["evaluation", "steps: 3 -> 4"],
    "eval runs/full --evaluation.capacity 0": ["evaluation.capacity is 0", "1 or more"],
    "eval runs/full --evaluation.perplexity.scored 0": ["evaluation.perplexity.scored is 0", "1 or more"],
    "eval runs/full --evaluation.norm-refresh 2 6 2": ["evaluation.norm_refresh is (2, 6, 2)", "at least the second"],
    "eval runs/full --evaluation.norm-refresh 8 6 2": ["evaluation.norm_refresh is (8, 6, 2)", "MegalodonConfig", "not of a Transformer"],
    "eval runs/keys --evaluation.seed -1": ["evaluation.seed is -1"],
    "eval runs/keys --evaluation.passkey.digits 30": ["evaluation.passkey.digits is 30", "18"],
    "eval runs/keys --evaluation.passkey.depths 2": ["evaluation.passkey.depths is (2.0,)", "from 0 to 1"],
    "bench megalodon --dim 100": ["--dim is 100", "multiple of 32, 64 or more"],
    "bench megalodon --dim 32": ["--dim is 32", "multiple of 32, 64 or more"],
    "bench timestep_norm --dim 32": ["--dim is 32", "multiple of 32, 64 or more"],
    "bench cema --dim 1": ["--dim is 1", "2 or more"],
    "bench cema --rounds 0": ["--rounds is 0", "1 or more"],
    "compare": ["folders"],
    "compare missing other_things": ["missing", "other_things", "config.json"],
    "compare config_cut": ["config.json", "JSON"],
    "info missing.py:full": ["missing.py"],
    "info experiments.py:full --steps 0": ["steps is 0"],
    "info experiments.py:sized": ["experiments.py:sized", "needs arguments"],
    "info other_things": ["other_things", "config.json"],
    "info experiments.py:full --model.vocab-size 100": ["model.vocab_size is 100", "257"],
}


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line.replace(TRAIN, "train") or "nothing")
def test_a_mistake_is_one_sentence(line, world, capsys):
    sentence = mistake(line, world, capsys)
    for words in MISTAKES[line]:
        assert words in sentence


WRONG_OVERRIDES = [line for line in MISTAKES if re.search(r"--(steps( many|$)|optimizer.learning-rat 1|model.attention|mesh.fsdp)", line)]


@pytest.mark.parametrize("line", WRONG_OVERRIDES, ids=lambda line: line.replace(TRAIN, "train"))
def test_sentences_about_overrides_read_well(line, world, capsys):
    """What the parser drew for a wide terminal is no sentence: frames, pairs of which one half is lost, hints at other commands."""
    sentence = mistake(line, world, capsys)
    assert sentence.count("(") == sentence.count(")")
    assert sentence.count("'") % 2 == 0
    assert not re.search("[│╭╮╰╯─]|---|helptext|cli.py", sentence)
    assert not re.search(r"\b(\w+ \w+):? \1\b", sentence), "words are said twice"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may read every file")
def test_unreadable_corpus(world, capsys):
    path = world / "locked.txt"
    path.write_text("text")
    path.chmod(0)
    try:
        with pytest.raises(SystemExit) as end:
            main([*TRAIN.split(), "--data.source", "locked.txt"])
    finally:
        path.chmod(0o600)
        path.unlink()
    assert end.value.code == 2
    assert re.fullmatch(r'infinicontext: .*data\.source.*"locked\.txt".*\n', capsys.readouterr().err)
    assert not (world / "new").exists()


def test_eval_leaves_an_unfinished_checkpoint_alone(world, capsys):
    """It may be one that a training run is writing at this moment."""
    unfinished = world / "runs" / "full" / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    try:
        assert "it has [3]" in mistake("eval runs/full --step 9", world, capsys)
    finally:
        unfinished.rmdir()


def test_output_that_cannot_be_written(world, capsys):
    before = tree(world)
    with pytest.raises(SystemExit) as end:
        main(["eval", "runs/full", "--lengths", "16", "--output", "corpus.jsonl/eval.json"])
    assert end.value.code == 2
    assert re.match(r"infinicontext: --output corpus\.jsonl/eval\.json ", capsys.readouterr().err.splitlines()[-1])
    assert tree(world) == before


def test_sweep_trains_and_evaluates(world):
    for name, task in (("full", "perplexity"), ("keys", "passkey")):
        folder = world / "runs" / name
        config = json.loads((folder / "config.json").read_text())
        assert config["experiment"]["name"] == name
        assert config["command"] == "infinicontext sweep experiments.py:everything --workdir runs"
        assert {"jax", "flax"} <= set(config["versions"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert [line["step"] for line in lines if "validation_loss" in line] == [3]
        results = json.loads((folder / "eval.json").read_text())
        assert (results["run"], results["step"], results["parameters"]) == (name, 3, config["parameters"])
        assert list(results["tasks"]) == [task]
        lengths = [row["length"] for row in results["tasks"][task]["by_length"]]
        assert list(results["state_bytes"]) == [*map(str, lengths)]
    assert results["train_length"] == 96
    assert results["state_bytes"]["96"] == results["state_bytes"]["128"]


def test_a_finished_sweep_does_nothing_new(world):
    before = tree(world)
    main(["sweep", "experiments.py:everything", "--workdir", "runs"])
    assert tree(world) == before


def test_eval_with_another_model(world, tmp_path):
    """What changes no parameter may be changed, for results of their own."""
    losses = []
    for number, change in enumerate([[], ["--model.attention", "window", "--model.window", "2"]]):
        output = tmp_path / f"{number}.json"
        main(["eval", "runs/full", "--tasks", "perplexity", "--lengths", "32", *change, "--output", str(output)])
        record = json.loads(output.read_text())
        assert record["model"]["attention"] == ("window" if change else "full")
        losses.append(record["tasks"]["perplexity"]["by_length"][0]["nll"])
    assert losses[0] != losses[1]


def test_eval_at_other_lengths(world, tmp_path):
    """Lengths of the experiment that do not fit are skipped; those asked for on the command line are refused (see MISTAKES)."""
    before = tree(world)
    output = tmp_path / "deep" / "eval.json"
    main(["eval", "runs/full", "--tasks", "perplexity", "--evaluation.lengths", "32", "1024", "--output", str(output)])
    task = json.loads(output.read_text())["tasks"]["perplexity"]
    assert [row["length"] for row in task["by_length"]] == [32]
    assert [row["length"] for row in task["skipped"]] == [1024]
    assert "evaluation.capacity is 64" in task["skipped"][0]["reason"]
    assert tree(world) == before


def test_eval_repeats_what_sweep_wrote(world, tmp_path, capsys):
    """And does not repeat itself."""
    main(["eval", "runs/keys", "--step", "3", "--output", str(tmp_path / "eval.json")])
    assert "measured before" not in capsys.readouterr().err
    before = (tmp_path / "eval.json").read_text()
    main(["eval", "runs/keys", "--step", "3", "--output", str(tmp_path / "eval.json")])
    assert f"passkey: measured before, in {tmp_path / 'eval.json'}" in capsys.readouterr().err
    assert (tmp_path / "eval.json").read_text() == before
    written = [json.loads(path.read_text()) for path in (world / "runs" / "keys" / "eval.json", tmp_path / "eval.json")]
    for results in written:
        del results["tasks"]["passkey"]["cost"]
        for row in results["tasks"]["passkey"]["by_length"]:
            del row["seconds"], row["tokens_per_second"]
    assert written[0] == written[1]


def test_info_of_a_run_needs_no_tokenizer(world, tmp_path, capsys):
    """As of one that was converted from a folder without."""
    config = json.loads((world / "runs" / "full" / "config.json").read_text())
    config["experiment"]["data"]["tokenizer"] = "huggingface"
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["info", str(tmp_path)])
    assert f"parameters        {config['parameters']:,}" in capsys.readouterr().out


def test_compare_writes_a_report(world, tmp_path, capsys):
    main(["compare", "runs/full", "runs/keys", "--output", str(tmp_path / "report")])
    table = capsys.readouterr().out
    assert "full" in table
    assert "keys" in table
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["full", "keys"]
    assert "keys" in (tmp_path / "report" / "report.html").read_text()
    pictures = list((tmp_path / "report").glob("*.png"))
    assert {"loss.png", "perplexity-by-length.png", "passkey-map.png", "state-bytes.png"} <= {path.name for path in pictures}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_info_says_what_a_config_needs(world, capsys):
    main(["info"])
    alone = capsys.readouterr().out
    assert re.search(r"^devices +8 x cpu", alone, re.MULTILINE)
    assert re.search(r"^jax +\d", alone, re.MULTILINE)
    results = json.loads((world / "runs" / "full" / "eval.json").read_text())
    for reference in ("experiments.py:full", "runs/full"):
        main(["info", reference])
        printed = capsys.readouterr().out
        assert printed.startswith(alone)
        assert re.search(rf"^parameters +{results['parameters']:,}$", printed, re.MULTILINE)
        for length, size in results["state_bytes"].items():
            assert re.search(rf"^state, +{length} +{size:,} bytes", printed, re.MULTILINE)
        assert re.search(r"a step reads 8 x 32 tokens and needs [\d,]+ MiB", printed)


@pytest.mark.parametrize(
    ("line", "listed"),
    [
        ("--help", ["train", "eval", "sweep", "compare", "info"]),
        ("train --help", ["FILE.py:FUNCTION", "--workdir", "--allow-config-change"]),
        ("train experiments.py:full --help", ["--workdir", "--optimizer.learning-rate", "--model.window", "--data.source"]),
        ("train experiments.py:keys --help", ["--data.stage-steps"]),
        ("sweep experiments.py:everything --help", ["--workdir", "--optimizer.learning-rate"]),
        ("eval --help", ["--tasks", "perplexity, passkey, accuracy", "--lengths", "--step"]),
        ("eval runs/full --help", ["--lengths", "--evaluation.capacity"]),
        ("info experiments.py:full --help", ["FILE.py:FUNCTION", "--model.dim"]),
        ("compare --help", ["--output"]),
    ],
)
def test_help(line, listed, world, capsys):
    before = tree(world)
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for words in listed:
        assert words in printed
    assert tree(world) == before


@pytest.mark.parametrize(("text", "tokens"), [("512", 512), ("4k", 4096), ("64K", 65536), ("1m", 1 << 20), ("2M", 1 << 21)])
def test_lengths_in_words(text, tokens):
    assert parse_length(text) == tokens
