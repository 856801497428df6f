"""Batches as pure functions of (data, seed, step), for any number of processes."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from infinicontext.data.instructions import InstructionData
from infinicontext.data.pipeline import CorpusData, PasskeyData, train_batches, validation_batches
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError

KINDS = ("shuffled", "sequential", "passkey", "instructions")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty documents of random letters, 20 to 400 bytes long, and as many conversations."""
    rng = np.random.default_rng(0)
    texts = ["".join(chr(letter) for letter in rng.integers(97, 123, rng.integers(20, 400))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "letters.jsonl"
    lines = ({"text": text, "prompt": text[:5], "response": text[5:30]} for text in texts)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def make(kind, source):
    if kind == "passkey":
        return PasskeyData(lengths=(150, 300), stage_steps=(3,))
    if kind == "instructions":
        return InstructionData(source, length=64, validation_fraction=0.2)
    return CorpusData(source, length=64, order=kind, validation_fraction=0.2)


def take(count, data, batch_size=8, *, seed=0, step=0, **processes):
    return list(itertools.islice(train_batches(data, batch_size, seed=seed, step=step, **processes), count))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes(kind, source):
    data = make(kind, source)
    length = 150 if kind == "passkey" else 64
    for batch in (take(1, data)[0], validation_batches(make(kind, source), 8, 1, 0)[0]):
        rows, S = batch["tokens"].shape
        assert (rows, S) in {(8, length + 1), (4, 301)}
        assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        assert batch["segment_ids"].shape == (rows, S)
        assert batch["loss_mask"].shape == batch["answer_mask"].shape == (rows, S - 1)
        assert batch["loss_mask"].dtype == batch["answer_mask"].dtype == np.float32
        inside = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
        np.testing.assert_array_equal(batch["loss_mask"], inside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 5, 40])
def test_resumed_run_sees_the_same_batches(kind, step, source):
    data = make(kind, source)
    unbroken = take(step + 3, data)[step:]
    for one, other in zip(unbroken, take(3, data, step=step)):
        assert_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_changes_the_data(kind, source):
    one, other = (take(4, make(kind, source), seed=seed) for seed in (0, 1))
    same = all((a["tokens"] == b["tokens"]).all() for a, b in zip(one, other))
    assert same == (kind == "sequential")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(kind, processes, source):
    """Whoever resumes, at every step the rows of all processes are the rows of one."""
    data = make(kind, source)
    whole = take(4, data, step=1, divisor=4)
    parts = [take(4, data, step=1, divisor=4, process_index=i, process_count=processes) for i in range(processes)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            dealt = np.stack([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(dealt.reshape(value.shape), value)


def test_shuffled_epoch_has_each_target_once(source):
    """Each byte of the source is a target once, in training or in validation; the second epoch has the same rows in another order."""
    data = make("shuffled", source)
    validation = validation_batches(data, 1, 10**6, 0)
    epoch, seen = [], set()
    for batch in train_batches(data, 1, seed=3, step=0):
        row = batch["tokens"].tobytes()
        if row in seen:
            break
        seen.add(row)
        epoch.append(batch)
    texts = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]
    assert sum(batch["loss_mask"].sum() for batch in [*epoch, *validation]) == sum(map(len, texts))
    second = [batch["tokens"].tobytes() for batch in take(len(epoch), data, 1, seed=3, step=len(epoch))]
    assert set(second) == seen
    assert second != [batch["tokens"].tobytes() for batch in epoch]


def test_sequential_rows_continue_from_batch_to_batch(source):
    batches = take(12, make("sequential", source), 2)
    for one, following in itertools.pairwise(batches):
        np.testing.assert_array_equal(one["tokens"][:, -1], following["tokens"][:, 0])


def test_passkey_answers_and_depths():
    data = PasskeyData(lengths=(400,))
    tokenizer = load_tokenizer("passkey")
    depths = []
    for batch in take(4, data):
        assert batch["tokens"].shape == (8, 401)
        for tokens, mask in zip(batch["tokens"], batch["answer_mask"]):
            text = tokenizer.decode(tokens)
            key = re.search(r"the pass key is (\d+)\. remember", text)
            assert tokenizer.decode(tokens[1:][mask == 1]) == key[1]
            assert mask.sum() == 5
            depths.append(key.start() / len(text))
    assert min(depths) < 0.3
    assert max(depths) > 0.7


def test_passkey_samples_of_random_lengths_share_rows():
    data = PasskeyData(lengths=(400,), shortest=(70,), depths=(-0.5, 1.5))
    tokenizer, sizes, ends = load_tokenizer("passkey"), [], 0
    filler = "the grass is green"
    for batch in take(8, data):
        for row in range(8):
            tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
            samples = [segments == segment for segment in range(1, segments.max() + 1)]
            sizes.append([int(sample.sum()) for sample in samples])
            assert 401 - sum(sizes[-1]) < 70, "room for one more"
            np.testing.assert_array_equal(segments, np.repeat([*range(1, len(samples) + 1), 0], [*sizes[-1], 401 - sum(sizes[-1])]))
            np.testing.assert_array_equal(batch["loss_mask"][row], (segments[1:] == segments[:-1]) & (segments[1:] > 0))
            for sample in samples:
                text = tokenizer.decode(tokens[sample])
                key = re.search(r"the pass key is (\d+)\. remember", text)
                assert tokenizer.decode(tokens[1:][sample[1:] & (batch["answer_mask"][row] == 1)]) == key[1]
                ends += filler not in text[: key.start()] or filler not in text[key.end() :]
    flat = [size for row in sizes for size in row]
    assert min(flat) in range(70, 80)
    assert max(flat) in range(390, 402)
    assert any(row != sorted(row, reverse=True) for row in sizes)
    assert 0.5 < ends / len(flat) < 0.9


def test_passkey_before_all_filler():
    tokenizer = load_tokenizer("passkey")
    for batch in take(2, PasskeyData(lengths=(400,), depths=(0, 0))):
        for tokens in batch["tokens"]:
            before, after = tokenizer.decode(tokens).split("the pass key is", 1)
            assert before.count("here we go") <= 1, "the end of one block may stand there, to make up the length"
            assert after.count("here we go") > 5


def test_passkey_rows_that_are_one_document():
    """The first half of them, with the tokens that they have otherwise."""
    apart = PasskeyData(lengths=(300,), shortest=(70,))
    joined = dataclasses.replace(apart, one_document=0.5)
    (a,), (b,) = (validation_batches(data, 5, 1, seed=0) for data in (apart, joined))
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
    np.testing.assert_array_equal(a["answer_mask"], b["answer_mask"])
    np.testing.assert_array_equal(b["segment_ids"][:3], a["segment_ids"][:3] > 0)
    np.testing.assert_array_equal(b["segment_ids"][3:], a["segment_ids"][3:])
    assert a["segment_ids"][:3].max() > 1
    np.testing.assert_array_equal(b["loss_mask"][:3], a["segment_ids"][:3, 1:] > 0)


def test_passkey_stages_have_their_own_shortest_samples():
    data = PasskeyData(lengths=(300, 400), stage_steps=(2,), shortest=(70, 390))
    samples = [int(batch["segment_ids"].max()) for batch in take(4, data)]
    assert min(samples[:2]) > 1
    assert max(samples[2:]) == 1


def test_passkey_curriculum_keeps_tokens_per_batch():
    data = PasskeyData(lengths=(150, 300, 1200), stage_steps=(2, 3))
    shapes = [batch["tokens"].shape for batch in take(7, data, 12, divisor=2)]
    assert shapes == [(12, 151)] * 2 + [(6, 301)] * 3 + [(2, 1201)] * 2
    assert data.rows_at(2, 12, 4) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_fixed_and_unseen(kind, source):
    data = make(kind, source)
    one, again = (validation_batches(data, 4, 3, 7) for _ in range(2))
    assert len(one) == 3
    for batch, same in zip(one, again):
        assert_equal(batch, same)
    seen = {row[:40].tobytes() for batch in take(50, data, seed=7) for row in batch["tokens"]}
    unseen = [row for batch in one for row in batch["tokens"]]
    if kind == "passkey":
        # The instruction is the same everywhere, so compare keys: five random digits rarely meet.
        keys = {row[-5:].tobytes() for batch in take(20, data, seed=7) for row in batch["tokens"]}
        assert sum(row[-5:].tobytes() in keys for row in unseen) < 4
        assert unseen[0].shape == (301,)
    else:
        assert not [row for row in unseen if row[:40].tobytes() in seen]


def test_short_validation_split_ends_in_padding_rows(source):
    data = make("shuffled", source)
    single = validation_batches(data, 1, 10**6, 0)
    (batch,) = validation_batches(data, len(single) + 3, 5, 0)
    assert (batch["segment_ids"][-3:] == 0).all()
    assert (batch["loss_mask"][-3:] == 0).all()
    np.testing.assert_array_equal(batch["tokens"][:-3], np.concatenate([one["tokens"] for one in single]))


@pytest.mark.parametrize(
    ("config", "values", "field"),
    [
        (CorpusData, {"length": 0}, r"data\.length is 0"),
        (CorpusData, {"order": "random"}, r'data\.order is "random"; it must be one of shuffled, sequential'),
        (CorpusData, {"validation_fraction": 1.0}, r"data\.validation_fraction is 1\.0"),
        (CorpusData, {"validation_fraction": -0.1}, r"data\.validation_fraction is -0\.1"),
        (PasskeyData, {"lengths": ()}, r"data\.lengths is \(\)"),
        (PasskeyData, {"lengths": (0,)}, r"data\.lengths is \(0,\)"),
        (PasskeyData, {"lengths": (200, 300)}, r"data\.stage_steps is \(\).*1 numbers of steps"),
        (PasskeyData, {"lengths": (200, 300), "stage_steps": (0,)}, r"data\.stage_steps is \(0,\)"),
        (PasskeyData, {"digits": 0}, r"data\.digits is 0"),
        (PasskeyData, {"digits": 19}, r"data\.digits is 19"),
        (PasskeyData, {"one_document": 2.0}, r"data\.one_document is 2\.0; it must be from 0 to 1"),
        (PasskeyData, {"shortest": (0,)}, r"data\.shortest is \(0,\); each must be from 1"),
        (PasskeyData, {"shortest": (300,)}, r"data\.shortest is \(300,\)"),
        (PasskeyData, {"shortest": (80, 90)}, r"data\.shortest is \(80, 90\); it must be empty or 1 numbers"),
        (PasskeyData, {"depths": (0.5, 0.0)}, r"data\.depths is \(0\.5, 0\.0\)"),
    ],
)
def test_config_errors(config, values, field):
    with pytest.raises(UserError, match=field):
        config(**values)


def test_errors_before_the_first_batch(source, tmp_path):
    corpus, passkey = make("shuffled", source), PasskeyData()
    with pytest.raises(UserError, match="batch_size is 6; it must be a multiple of 4"):
        train_batches(corpus, 6, seed=0, step=0, process_count=4)
    with pytest.raises(UserError, match="batch_size is 6; it must be a multiple of 4"):
        train_batches(passkey, 6, seed=0, step=0, process_count=2, divisor=4)
    with pytest.raises(UserError, match="batch_size is 0"):
        train_batches(passkey, 0, seed=0, step=0)
    with pytest.raises(UserError, match="seed is -1; it must be from 0"):
        train_batches(corpus, 8, seed=-1, step=0)
    for batches in (lambda data: train_batches(data, 8, seed=0, step=0), lambda data: validation_batches(data, 8, 1, 0)):
        with pytest.raises(UserError, match=r"data\.tokenizer"):
            batches(CorpusData(source, tokenizer="none"))
        with pytest.raises(UserError, match=r"data\.source"):
            batches(CorpusData(str(tmp_path / "none")))
        with pytest.raises(UserError, match=r"data\.lengths is \(256, 60\), for samples of 61 tokens: .* at least"):
            batches(PasskeyData(lengths=(256, 60), stage_steps=(2,)))
        with pytest.raises(UserError, match=r"data\.shortest is \(50,\), for samples of 50 tokens: .* at least"):
            batches(PasskeyData(shortest=(50,)))
    with pytest.raises(UserError, match="no document in its validation split"):
        validation_batches(CorpusData(source, validation_fraction=1e-9), 8, 1, 0)
    with pytest.raises(UserError, match="validation_fraction is 0"):
        CorpusData(source, validation_fraction=0)
