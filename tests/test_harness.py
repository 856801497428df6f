"""lm-evaluation-harness: our adapter beside its own on the same tiny Llama, and RULER's samples as its tasks."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from infinicontext import cli
from infinicontext.data.tokenizers import ByteTokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation
from infinicontext.evaluation.ruler.harness_tasks import score, write_tasks


def test_ruler_tasks(tmp_path, capsys):
    names = write_tasks(tmp_path / "tasks", ByteTokenizer(), RulerEvaluation(("niah_single_1", "vt"), 2), [2048], print)
    assert names == ["infinicontext_niah_single_1_2048"]
    assert "vt length 2048 left out" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{names[0]}.jsonl").read_text().splitlines()]
    assert [score(row, [f" {row['outputs'][0]}."])["recall"] for row in rows] == [100, 100]
    assert score(rows[0], [""])["recall"] == 0
    assert "max_gen_toks: 128" in (tmp_path / "tasks" / f"{names[0]}.yaml").read_text()
    assert all(0 <= row["depths"][0] <= 1 and row["version"] for row in rows)
    made = lambda folder, name: json.loads(re.search(r"^metadata: (.*)$", (folder / f"{name}.yaml").read_text(), re.MULTILINE)[1])
    assert made(tmp_path / "tasks", names[0]) | {"length": 2048, "seed": 42, "not_comparable": []} == made(tmp_path / "tasks", names[0])
    with pytest.raises(UserError, match=r"none of RULER's vt could be made"):
        write_tasks(tmp_path / "tasks", ByteTokenizer(), RulerEvaluation(("vt",), 2), [2048])
    capsys.readouterr()
    budget = "--samples 1 --lengths 4k --example-budget 2000 --chat meta-chat"
    cli.main(["ruler-tasks", str(tmp_path / "more"), "--tokenizer", "bytes", "--tasks", "vt", *budget.split()])
    assert capsys.readouterr().out.split() == ["infinicontext_vt_4096"]
    assert json.loads((tmp_path / "more" / "infinicontext_vt_4096.jsonl").read_text())["input"].startswith("[INST] ")
    told = made(tmp_path / "more", "infinicontext_vt_4096")
    assert (told["chat"], told["not_comparable"]) == ("meta-chat", ["another budget of the example"])


def test_missing_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        cli.main(["lm-eval", "run", "--tasks", "arc_easy"])
    assert 'pip install "infinicontext[harness]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of random weights as transformers saves it, with a tokenizer of its own and a chat template."""
    for name in ("lm_eval", "torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


TEXT = "The ferry left at noon with nine people on board. It was raining, and nobody spoke. One of them had a key. "
REQUESTS = [
    ("The ferry left", " at noon"),
    ("The ferry left", " at night, late"),
    ("", "It was raining"),
    (TEXT * 3, "The end"),
    ("One ", "key"),
]


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=request, idx=i) for i, request in enumerate(arguments)]


@pytest.fixture(scope="module")
def adapters(folder):
    from lm_eval.models.huggingface import HFLM

    from infinicontext.evaluation.harness import HarnessModel

    with jax.numpy_dtype_promotion("standard"):
        ours = HarnessModel(str(folder), batch_size=2, max_length=512, add_bos_token=True)
    return ours, HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype="float32", add_bos_token=True, max_length=512)


def test_loglikelihood_beside_transformers(adapters):
    ours, theirs = (model.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True) for model in adapters)
    for (a, greedy_a), (b, greedy_b) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy_a == greedy_b


def test_rolling_beside_transformers(adapters, monkeypatch):
    """By windows as transformers' adapter has it; in one stream, the sum of pieces."""
    ours, theirs = adapters
    texts = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 20,)])
    ours.rolling = "windows"
    windows = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    # Theirs would write the start token twice, as prefix and as the first token to be scored.
    monkeypatch.setattr(theirs, "add_bos_token", False)
    assert windows == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6)
    ours.rolling = "stream"
    stream = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert stream[0] == pytest.approx(windows[0], abs=1e-4)
    assert stream[1] != pytest.approx(windows[1], abs=1e-1)
    ids = ours.tok_encode(TEXT, add_special_tokens=False)
    pieces = [(("", ""), [ours.prefix_token_id, *ids[:at]], ids[at : at + 7]) for at in range(0, len(ids), 7)]
    assert sum(part for part, _ in ours._loglikelihood_tokens(pieces, disable_tqdm=True)) == pytest.approx(stream[0], abs=1e-4)


def test_generation_beside_transformers(adapters):
    # No letters of special tokens, which transformers' adapter looks for stop texts in, too.
    kwargs = [{"until": ["l"], "max_gen_toks": 24}, {"until": [], "max_gen_toks": 9, "do_sample": False}, {"until": ["k", "\n"]}]
    requests = instances("generate_until", [(context or "x", dict(kwargs[i % 3])) for i, (context, _) in enumerate(REQUESTS)])
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in adapters)
    assert ours == theirs
    assert any(ours)


def test_chat_beside_transformers(adapters):
    ours, theirs = adapters
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who had the key?"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    opened = [*history, {"role": "assistant", "content": "The key was with"}]
    open_text = ours.apply_chat_template(opened, add_generation_prompt=False)
    assert open_text == theirs.apply_chat_template(opened, add_generation_prompt=False)
    assert open_text.endswith("The key was with")
    ours.chat = "chatml"
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.apply_chat_template(opened, add_generation_prompt=False) == open_text
    ours.chat = None
    assert ours.tok_encode("<s>The ferry") == ours.tok_encode("The ferry")


def test_simple_evaluate(adapters, tmp_path, monkeypatch):
    """The Python path on a task of a local file: choices and a short answer, the same figures from both adapters."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = [{"text": text, "choices": ["noon", "night", " rain"], "gold": i % 3} for i, (text, _) in enumerate(REQUESTS) if text]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choices.yaml").write_text(
        "task: own_choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f'    test: "{tmp_path}/choices.jsonl"\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{{{text}}}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    tasks = TaskManager(include_path=str(tmp_path))
    options = {"tasks": ["own_choices"], "task_manager": tasks, "log_samples": True, "bootstrap_iters": 0}
    ours, theirs = (simple_evaluate(model=model, **options) for model in adapters)
    assert ours["results"]["own_choices"]["acc,none"] == theirs["results"]["own_choices"]["acc,none"]
    assert ours["results"]["own_choices"]["acc_norm,none"] == theirs["results"]["own_choices"]["acc_norm,none"]
    for a, b in zip(ours["samples"]["own_choices"], theirs["samples"]["own_choices"], strict=True):
        assert [choice[0][0] for choice in a["resps"]] == pytest.approx([choice[0][0] for choice in b["resps"]], abs=1e-4)


def test_command(folder, tmp_path):
    """lm_eval's own command line with our model, without a network; it asks RULER's prompts to the character."""
    with_example = RulerEvaluation(("niah_single_1", "niah_multikey_3", "vt", "fwe"), 2, example_budget=2000)
    names = write_tasks(tmp_path / "tasks", ByteTokenizer(), with_example, [4096])
    assert len(names) == 4
    (tmp_path / "rolling.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "tasks" / "rolling.yaml").write_text(
        "task: own_rolling\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f'    test: "{tmp_path}/rolling.jsonl"\ntest_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n'
    )
    command = [sys.executable, "-m", "infinicontext.cli", "lm-eval", "run", "--model", "infinicontext"]
    command += ["--model_args", f"model={folder},max_length=8192", "--tasks", ",".join([*names, "own_rolling"]), "--log_samples"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    # Whoever reaches for the network fails.
    refuse = (
        "import socket\ndef refuse(*given): raise OSError('there is no network')\nsocket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    (tmp_path / "sitecustomize.py").write_text(refuse)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["infinicontext_niah_single_1_4096"]["recall,none"] == 0
    for name in names:
        rows = map(json.loads, (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines())
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        asked = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in map(json.loads, path.read_text().splitlines())]
        assert asked == [row["input"] + row["answer_prefix"] for row in rows]
    assert np.isfinite(results["own_rolling"]["bits_per_byte,none"])
