"""Rows in which documents see one another, and the copy task at their ends."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from infinicontext.data.copying import PROMPT, WEIGHT
from infinicontext.data.instructions import InstructionData
from infinicontext.data.pipeline import CorpusData, train_batches, validation_batches
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.objectives.next_token import NextToken, token_weights

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rng = np.random.default_rng(0)
    path.write_text("".join(json.dumps({"text": " ".join(map(str, rng.integers(0, 999, 12)))}) + "\n" for _ in range(80)))
    return CorpusData(str(path), length=120, validation_fraction=0.1, one_document=True, copy_tokens=16)


def batches(data, count=3, **options):
    return list(itertools.islice(train_batches(data, 4, seed=1, step=0, **options), count))


def rows(data, count=3):
    return [{name: value[row] for name, value in batch.items()} for batch in batches(data, count) for row in range(4)]


def copied(row):
    """The text before the task, and what is to be copied."""
    text = row["tokens"][row["segment_ids"] > 0].tolist()
    prompt = TOKENIZER.encode(PROMPT).tolist()
    (at,) = (i for i in range(len(text)) if text[i : i + len(prompt)] == prompt)
    return text[:at], text[at + len(prompt) :]


@pytest.mark.parametrize("kind", ["corpus", "instructions"])
def test_a_stretch_is_asked_for_again(kind, corpus):
    data = corpus if kind == "corpus" else InstructionData(length=400, one_document=True, copy_tokens=16)
    places, plain = set(), "loss_mask" if kind == "corpus" else "answer_mask"
    for row in rows(data):
        before, copy = copied(row)
        assert len(copy) == 16
        found = [i for i in range(len(before) - 15) if before[i : i + 16] == copy]
        assert found
        places.add(found[0])
        end = len(before) + len(PROMPT) + 16
        np.testing.assert_array_equal(row["segment_ids"], np.arange(data.length + 1) < end)
        for mask in ("loss_mask", "answer_mask"):
            weights = np.concatenate([[0], row[mask]])
            np.testing.assert_array_equal(weights[end - 16 : end], np.float32(WEIGHT))
            assert not weights[len(before) : end - 16].any()
            assert not weights[end:].any()
        assert set(row[plain].tolist()) == {0, np.float32(WEIGHT), 1}
    assert len(places) > 5


def test_a_copied_token_weighs_a_tenth_of_an_answer():
    (batch,) = batches(InstructionData(length=400, one_document=True, copy_tokens=16), 1)
    weights = np.asarray(token_weights(NextToken("answers"), batch))
    assert np.isclose(weights.sum(), 1)
    np.testing.assert_allclose(np.unique(weights)[1:], weights.max() * np.array([WEIGHT, 1]), rtol=1e-6)


def test_batches_are_a_function_of_the_step(corpus):
    whole = batches(corpus, 4)
    (late,) = itertools.islice(train_batches(corpus, 4, seed=1, step=3), 1)
    halves = [batches(corpus, 4, process_index=i, process_count=2) for i in range(2)]
    for name in late:
        np.testing.assert_array_equal(late[name], whole[3][name])
        for batch, *parts in zip(whole, *halves):
            for i in range(2):
                np.testing.assert_array_equal(parts[i][name], batch[name][i::2])


def test_documents_of_a_row_are_one(corpus):
    plain = dataclasses.replace(corpus, one_document=False, copy_tokens=0)
    joined = dataclasses.replace(plain, one_document=True)
    for order in ("shuffled", "sequential"):
        for one, other in zip(*(rows(dataclasses.replace(data, order=order)) for data in (plain, joined))):
            assert len(set(one["segment_ids"].tolist())) > 1
            np.testing.assert_array_equal(other["segment_ids"], one["segment_ids"] > 0)
            for name in ("tokens", "loss_mask"):
                np.testing.assert_array_equal(other[name], one[name])


def test_validation_copies_nothing(corpus):
    joined = dataclasses.replace(corpus, copy_tokens=0)
    for one, other in zip(*(validation_batches(data, 4, 2, 0) for data in (corpus, joined)), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert set(np.unique(one["segment_ids"])) <= {0, 1}


def test_errors(corpus):
    for data, sentence in (
        (lambda: dataclasses.replace(corpus, copy_tokens=-1), r"data\.copy_tokens is -1"),
        (lambda: dataclasses.replace(corpus, one_document=False), r"data\.copy_tokens is 16, for which data\.one_document must be true"),
        (lambda: InstructionData(copy_tokens=3), r"data\.copy_tokens is 3, for which"),
        (lambda: dataclasses.replace(corpus, order="sequential"), r"data\.copy_tokens is 16, for which data\.order must be"),
        (lambda: batches(dataclasses.replace(corpus, length=50)), r"data\.copy_tokens is 16, which with data\.length 50 leaves no room"),
    ):
        with pytest.raises(UserError, match=sentence):
            data()
