"""Conversations: what is text, what is an answer, how they share rows, and what a user sees from training to generation."""

import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models, pretrained
from infinicontext.cli import main
from infinicontext.commands import all_on_tensor
from infinicontext.data.instructions import TEMPLATES, Conversations, InstructionData, conversations, load_conversations, pieces
from infinicontext.data.packing import WholeRows, best_fit
from infinicontext.data.pipeline import fingerprint, train_batches, validation_batches
from infinicontext.data.tokenizers import ByteTokenizer, JsonTokenizer
from infinicontext.errors import UserError
from infinicontext.models import TransformerConfig
from infinicontext.objectives.next_token import NextToken, weighted_loss
from infinicontext.training.weights import load_model, prompt_ids

MESSAGES = (("system", "Be brief."), ("user", "Hi {x}\n"), ("assistant", "Hello\n\n there"), ("user", "Bye"), ("assistant", " No."))
# What stands between brackets are answers.
BY_HAND = {
    "plain": "<|begin_of_text|>System: Be brief.\nUser: Hi {x}\n\nAssistant:[ Hello\n\n there<|endoftext|>]\n"
    "User: Bye\nAssistant:[  No.<|endoftext|>]",
    "raw": "<|begin_of_text|>Be brief.Hi {x}\n[Hello\n\n there<|endoftext|>]Bye[ No.<|endoftext|>]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {x}\n<|im_end|>\n<|im_start|>assistant\n"
    "[Hello\n\n there<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[ No.<|im_end|>]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi {x}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[Hello\n\n there<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[No.<|eot_id|>]",
    "phi3": "<|system|>Be brief.<|end|><|user|>Hi {x}\n<|end|><|assistant|>[Hello\n\n there<|end|>]"
    "<|user|>Bye<|end|><|assistant|>[ No.<|end|>]",
}
SPECIAL = sorted({token for text in BY_HAND.values() for token in re.findall(r"<\|\w+\|>", text)})


def make_tokenizer(split_words: bool) -> JsonTokenizer:
    """Byte-level BPE with every template's tokens; without splitting words it merges across anything, "\\nHello" and ": Hi" too."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    library.decoder = tokenizers.decoders.ByteLevel()
    texts = ["assistant\nHello there", "Assistant: Hello there", "user\nHi", "User: Hi", "No.\nUser: Bye", "\n\nHello"] * 5
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return JsonTokenizer(library)


WORDS, MERGING = make_tokenizer(True), make_tokenizer(False)


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def as_record(messages) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def encode(folder, tokenizer, messages, template="plain", length=10**4) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one conversation and which are answers."""
    # Nearly everything is in the validation split.
    data = InstructionData(write(folder / "one.jsonl", as_record(messages)), "-", template, length, 1 - 1e-9)
    found = load_conversations(data, tokenizer, "validation")
    assert found.starts.tolist() == [0, len(found.tokens)]
    return found.tokens.astype(np.int32), found.answers


def decode(tokenizer, ids) -> str:
    return tokenizer.library.decode([int(i) for i in ids], skip_special_tokens=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [WORDS, MERGING])
def test_templates_as_written_by_hand(template, tokenizer, tmp_path):
    tokens, answers = encode(tmp_path, tokenizer, MESSAGES, template)
    edges = np.flatnonzero(np.diff(answers, prepend=False, append=False))
    runs = [decode(tokenizer, run) for run in np.split(tokens, edges)]
    text = "".join(f"[{run}]" if i % 2 else run for i, run in enumerate(runs))
    assert text == BY_HAND[template]


def test_bytes_by_hand(tmp_path):
    tokens, answers = encode(tmp_path, ByteTokenizer(), (("user", "é"), ("assistant", "ok")))
    assert tokens.tolist() == [256, *"User: é\nAssistant: ok".encode(), 256]
    assert answers.tolist() == [False] * (1 + len("User: é\nAssistant:".encode())) + [True] * len(" ok.")


contents = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("HNo.\n :"), min_size=1, max_size=12).filter(str.strip)


@st.composite
def chats(draw):
    roles = ["user", "assistant"] * draw(st.integers(1, 3))
    roles = roles[draw(st.integers(0, 1)) :] + ["user"] * draw(st.integers(0, 1))
    return tuple((role, draw(contents)) for role in ["system"] * draw(st.integers(0, 1)) + roles)


@given(messages=chats(), template=st.sampled_from(list(TEMPLATES)))
@settings(deadline=None, max_examples=60)
def test_tokens_are_the_text_and_the_mask_is_the_answers(tmp_path_factory, messages, template):
    tokens, answers = encode(tmp_path_factory.getbasetemp(), MERGING, messages, template)
    text = lambda ids: re.sub(r"<\|(begin_of|end)_?(of)?text\|>", "", decode(MERGING, ids))
    assert text(tokens) == "".join(pieces(messages, TEMPLATES[template]))
    chosen = TEMPLATES[template]
    said = [content.strip() if chosen.strip else content for role, content in messages if role == "assistant"]
    assert text(tokens[answers]) == "".join(chosen.content.format(content=content) + chosen.end for content in said)
    assert not answers[0]


@given(messages=chats(), template=st.sampled_from(["chatml", "llama3", "phi3"]))
@settings(deadline=None, max_examples=60)
def test_special_tokens_make_it_the_encoding_of_the_whole_text(tmp_path_factory, messages, template):
    """What a pretrained model has read in its own tuning, where a template's text was encoded at once."""
    messages = tuple((role, content.strip()) for role, content in messages)
    tokens, _ = encode(tmp_path_factory.getbasetemp(), WORDS, messages, template)
    start = "<|begin_of_text|>" if template == "llama3" else ""
    np.testing.assert_array_equal(tokens, WORDS.encode(start + "".join(pieces(messages, TEMPLATES[template]))))


def test_a_token_that_swallows_white_space_after_it(tmp_path):
    """As those of Phi-3: what stands after an answer is encoded together with the answer's end."""
    library = tokenizers.Tokenizer.from_str(WORDS.library.to_str())
    library.add_special_tokens([tokenizers.AddedToken("<|im_end|>", rstrip=True, special=True)])
    tokenizer = JsonTokenizer(library)
    tokens, _ = encode(tmp_path, tokenizer, MESSAGES, "chatml")
    np.testing.assert_array_equal(tokens, tokenizer.encode("".join(pieces(MESSAGES, TEMPLATES["chatml"]))))


def test_prompt_and_response_are_two_messages(tmp_path):
    one = {"prompt": "Hi", "response": "Hello", "messages_of": 3}
    other = as_record((("user", "Hi"), ("assistant", "Hello")))
    (_, first), (_, second) = conversations(write(tmp_path / "both.jsonl", one, other))
    assert first == second == (("user", "Hi"), ("assistant", "Hello"))


def test_sources(tmp_path):
    (tmp_path / "below").mkdir()
    records = [{"prompt": f"{i}", "response": "yes"} for i in range(3)]
    write(tmp_path / "below" / "b.jsonl", records[0])
    write(tmp_path / "a.jsonl", *records[1:])
    (tmp_path / "notes.txt").write_text("no conversation")
    assert [name for name, _ in conversations(str(tmp_path))] == ["a.jsonl:1", "a.jsonl:2", "below/b.jsonl:1"]
    assert len(list(conversations(str(tmp_path / "*" / "*.jsonl")))) == 1
    examples = dict(conversations("examples"))
    assert len(examples) == len(set(examples.values())) == 60


def test_splits_share_nothing_and_lose_nothing():
    data = InstructionData(validation_fraction=0.3)
    train, validation = (load_conversations(data, ByteTokenizer(), split) for split in ("train", "validation"))
    cut = lambda found: [found.tokens[a:b].tobytes() for a, b in zip(found.starts, found.starts[1:])]
    assert len(set(cut(train))) + len(set(cut(validation))) == len(set(cut(train) + cut(validation))) == 60
    assert len(cut(validation)) > 5


@given(lengths=st.lists(st.integers(1, 20), max_size=40), room=st.integers(20, 40))
def test_best_fit(lengths, room):
    rows = best_fit(lengths, room)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[item] for item in row) for row in rows)
    assert not filled or filled[-1] <= room
    # A row is only opened for what fits in no other.
    assert len(filled) < 2 or filled[0] + filled[1] > room


def flat(lengths, seed=0) -> Conversations:
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    answers = rng.random(starts[-1]) < 0.5
    answers[starts[:-1]] = False
    return Conversations(rng.integers(1, 50, starts[-1]).astype(np.uint8), answers, starts)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), length=st.integers(8, 20), seed=st.integers(0, 3))
@settings(deadline=None)
def test_every_conversation_is_whole_in_one_row(lengths, length, seed):
    all_of_them = flat(lengths)
    alone = lambda i: slice(all_of_them.starts[i], all_of_them.starts[i + 1])
    wanted = sorted((all_of_them.tokens[alone(i)].tolist(), all_of_them.answers[alone(i)].tolist()) for i in range(len(lengths)))
    found = []
    for row in WholeRows(all_of_them, length, seed):
        assert row["tokens"].shape == row["segment_ids"].shape == (length + 1,)
        assert row["loss_mask"].shape == row["answer_mask"].shape == (length,)
        assert not row["tokens"][row["segment_ids"] == 0].any()
        answers = np.concatenate([[0], row["answer_mask"]]).astype(bool)
        counted = np.concatenate([[0], row["loss_mask"]]).astype(bool)
        for segment in range(1, row["segment_ids"].max() + 1):
            place = np.flatnonzero(row["segment_ids"] == segment)
            assert place[-1] - place[0] + 1 == len(place)
            assert counted[place].tolist() == [False] + [True] * (len(place) - 1)
            found.append((row["tokens"][place].tolist(), answers[place].tolist()))
        assert counted.sum() == (row["segment_ids"] > 0).sum() - row["segment_ids"].max()
    assert sorted(found) == wanted


def test_a_packed_row_is_learnt_like_its_conversations_alone():
    model = models.build(TransformerConfig(vocab_size=64, dim=16, layers=2, heads=2), nnx.Rngs(0))
    together = flat([7, 12, 5, 9, 3])
    (row,) = WholeRows(together, 35, seed=1)
    answers = NextToken("answers")

    @jax.jit
    def total(row):
        batch = {name: value[None] for name, value in row.items()}
        return weighted_loss(answers, model, batch | {"weights": batch["answer_mask"]})[0]

    alone = 0.0
    for begin, end in zip(together.starts, together.starts[1:]):
        one = Conversations(together.tokens[begin:end], together.answers[begin:end], np.array([0, end - begin]))
        alone += float(total(WholeRows(one, 35, seed=0)[0]))
    np.testing.assert_allclose(float(total(row)), alone, rtol=1e-5)


def test_long_conversations_are_cut_and_counted(tmp_path, capsys):
    texts = [("a" * 10, "b" * 10), ("a" * 10, "b" * 30), ("a" * 40, "b")]
    source = write(tmp_path / "long.jsonl", *({"prompt": prompt, "response": response} for prompt, response in texts))
    data = InstructionData(source, length=44, validation_fraction=1 - 1e-9)
    found = load_conversations(data, ByteTokenizer(), "validation")
    assert np.diff(found.starts).tolist() == [len("sUser: \nAssistant: e") + 20, 45]
    warning = capsys.readouterr().err
    assert "of the 3 conversations of its validation split, 2 are longer than data.length 44 and were cut at their end" in warning
    assert "1 of those are left out" in warning
    with pytest.raises(UserError, match=r"of the 3 conversations of its validation split, none has an answer within data\.length 15"):
        load_conversations(InstructionData(source, length=15, validation_fraction=1 - 1e-9), ByteTokenizer(), "validation")
    load_conversations(InstructionData(), ByteTokenizer(), "train")
    assert capsys.readouterr().err == ""


def test_the_fingerprint_is_of_the_messages(tmp_path):
    found = set()
    for record in ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"}, as_record((("user", "a"), ("assistant", "b")))):
        found.add(fingerprint(InstructionData(write(tmp_path / "a.jsonl", record))))
    assert len(found) == 2


def chat(*messages) -> str:
    return json.dumps(as_record(messages))


LINES = {
    '{"prompt": "a", ': "is not valid JSON",
    "[1]": "is not a JSON object",
    '{"text": "a"}': 'has no field prompt; it must have "prompt" and "response", or "messages"',
    '{"prompt": "a"}': "has no field response",
    '{"prompt": 3, "response": "b"}': "prompt is not a text",
    '{"prompt": "a", "response": " "}': "response is empty",
    '{"prompt": "a", "response": "\\ud800"}': "response has a lone surrogate",
    '{"messages": "a"}': "messages is not a list of objects",
    '{"messages": ["a"]}': "messages is not a list of objects",
    '{"messages": []}': "messages has no message with the role assistant",
    chat(("user", "a")): "messages has no message with the role assistant",
    chat(("human", "a")): r'messages\[0\].role is "human"; it must be one of system, user, assistant',
    '{"messages": [{"content": "a"}]}': r"messages\[0\].role is null",
    chat(("user", "a"), ("user", "b"), ("assistant", "c")): r"messages\[1\].role is user as in the message before",
    chat(("user", "a"), ("system", "b"), ("assistant", "c")): r"messages\[1\].role is system; only the first",
    chat(("user", "a"), ("assistant", "")): r"messages\[1\].content is empty",
    '{"messages": [{"role": "user"}]}': r"messages\[0\].content is missing",
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_named(line, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line)
    where = re.escape(f'data.source: "{path}", line 3')
    for read in (fingerprint, lambda data: train_batches(data, 8, seed=0, step=0), lambda data: validation_batches(data, 8, 1, 0)):
        with pytest.raises(UserError, match=f"{where}:? {LINES[line]}"):
            read(InstructionData(str(path)))


def test_wrong_sources_and_fields(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.txt").write_text("a")
    one = write(tmp_path / "one.jsonl", {"prompt": "a", "response": "b"})

    def fails(message, **fields):
        with pytest.raises(UserError, match=message):
            validation_batches(InstructionData(**fields), 8, 1, 0)

    fails("which holds no conversation", source=str(tmp_path / "empty.jsonl"))
    fails("a file must be one of .jsonl", source=str(tmp_path / "text.txt"))
    fails('no file or folder; it must be "examples", a .jsonl file', source="nowhere")
    fails(r"no conversation in its validation split with data\.validation_fraction 0\.05", source=one)
    fails('data.template is "vicuna"; it must be one of plain, raw, chatml, llama3, phi3', template="vicuna")
    fails('data.template is "chatml", but data.tokenizer "bytes" has no token <|im_end|>'.replace("|", r"\|"), template="chatml")
    fails("length is 0", length=0)
    fails(r"validation_fraction is 1\.0", validation_fraction=1.0)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    library.save(str(tmp_path / "tokenizer.json"))
    fails("has no token that ends a text", tokenizer=str(tmp_path))


EXPERIMENTS = """
from infinicontext import pretrained
from infinicontext.data.instructions import InstructionData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import TransformerConfig
from infinicontext.objectives.next_token import NextToken

OF_ALL = dict(objective=NextToken("answers"), steps=2, batch_size=8, evaluation=Evaluation(lengths=(16,)))

def scratch():
    model = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, attention="window", window=16)
    return Experiment("scratch", model, InstructionData(length=96, validation_fraction=0.2), **OF_ALL)

def tuned():
    data = InstructionData("chats.jsonl", "qwen", "chatml", length=96, validation_fraction=0.2)
    return Experiment("tuned", pretrained.read_config("qwen"), data, start_from="qwen", **OF_ALL)
"""


@pytest.fixture
def _inside(tmp_path, monkeypatch):
    """A folder with experiments; optax relies on the promotion that the other tests forbid."""
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("_inside")
def test_from_training_to_a_report(tmp_path, capsys):
    main(["train", "experiments.py:scratch", "--workdir", "run"])
    main(["eval", "run"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    task = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["perplexity"]
    data = InstructionData(length=96, validation_fraction=0.2)
    batches = validation_batches(data, 8, 8, 0)
    assert task["tokens"] == sum(batch["answer_mask"].sum() for batch in batches) > 100
    assert task["validation_nll"] == pytest.approx(task["nll"], rel=1e-5)
    assert task["nll"] == pytest.approx(next(line["validation_loss"] for line in lines if "validation_loss" in line), rel=1e-5)
    assert task["perplexity"] == pytest.approx(np.exp(task["nll"]))

    main(["train", "experiments.py:scratch", "--workdir", "other", "--objective.loss", "all"])
    main(["eval", "other", "--tasks", "perplexity"])
    other = json.loads((tmp_path / "other" / "eval.json").read_text())["tasks"]["perplexity"]
    assert other["tokens"] == task["tokens"]
    assert other["nll"] != pytest.approx(other["validation_nll"], rel=1e-4)
    capsys.readouterr()
    main(["compare", "run", "other", "--output", "report"])
    assert "scratch" in capsys.readouterr().out
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["runs"][0]["table"]["validation_loss"]["value"] == pytest.approx(task["nll"], rel=1e-5)
    main(["generate", "User: Hi\nAssistant:", "--model", "run", "--max-new-tokens", "3"])


@pytest.mark.usefixtures("_inside")
def test_tuning_a_pretrained_folder(tmp_path):
    """The tuned model reads a prompt as its conversations were written, and stops where answers end."""
    config = TransformerConfig(WORDS.vocab_size, dim=16, layers=1, heads=2, feed_forward=24)
    pretrained.save(models.build(config, nnx.Rngs(0)), tmp_path / "qwen", family="llama")
    WORDS.library.save(str(tmp_path / "qwen" / "tokenizer.json"))
    write(tmp_path / "chats.jsonl", *({"prompt": f"Count to {i}", "response": " ".join("x" * i)} for i in range(1, 30)))
    main(["train", "experiments.py:tuned", "--workdir", "run"])
    main(["eval", "run"])
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["perplexity"]["nll"] > 0
    mesh = all_on_tensor()
    with jax.set_mesh(mesh):
        loaded = load_model(tmp_path / "run", mesh)
    assert loaded.stop[0] == WORDS.library.token_to_id("<|im_end|>")
    prompt = "<|im_start|>user\nCount to 3<|im_end|>\n<|im_start|>assistant\n"
    tokens, answers = encode(tmp_path, WORDS, (("user", "Count to 3"), ("assistant", "x x x")), "chatml")
    np.testing.assert_array_equal(prompt_ids(loaded, prompt), tokens[~answers])
