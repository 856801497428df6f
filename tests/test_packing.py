"""Packed rows against the plain concatenation of documents."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext.data.corpora import Corpus
from infinicontext.data.packing import PackedRows, sequential_index, with_short_documents
from infinicontext.data.pipeline import CorpusData, train_batches
from infinicontext.errors import UserError


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different, so that a token tells where it came from."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    sizes = np.array(lengths, np.int64)
    return Corpus(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts, tuple(map(str, range(len(lengths)))), sizes)


cases = given(
    lengths=st.lists(st.integers(0, 12) | st.sampled_from([0, 1]), min_size=1, max_size=12),
    length=st.integers(1, 9),
    seed=st.none() | st.integers(0, 5),
)


@cases
@settings(deadline=None)
def test_rows_are_the_documents_end_to_end(lengths, length, seed):
    corpus = corpus_of(lengths)
    rows = list(PackedRows(corpus, length, seed))
    order = range(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    stream = np.concatenate([corpus.document(i) for i in order])
    assert len(rows) == max(1, int(np.ceil((len(stream) - 1) / length)))
    padded = np.zeros(len(rows) * length + 1, np.int32)
    padded[: len(stream)] = stream
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["tokens"], padded[i * length : i * length + length + 1])


@cases
@settings(deadline=None)
def test_segments_and_masks_follow_the_documents(lengths, length, seed):
    corpus, ids = corpus_of(lengths), {}
    for row in PackedRows(corpus, length, seed):
        tokens, segments = row["tokens"].tolist(), row["segment_ids"].tolist()
        owner = [None if token == 0 else int(np.searchsorted(corpus.starts, token - 1, side="right")) for token in tokens]
        # An id for each document: equal where the document is, the same in every row, 0 for padding only.
        assert [segment == 0 for segment in segments] == [document is None for document in owner]
        for document, segment in zip(owner, segments):
            assert ids.setdefault(document, segment) == segment
        same = [float(a == b and a is not None) for a, b in itertools.pairwise(owner)]
        assert row["loss_mask"].tolist() == same
        assert row["answer_mask"].tolist() == [0.0] * length
    assert len(set(ids.values())) == len(ids)


def test_dtypes_and_bounds():
    rows = PackedRows(corpus_of([5, 5]), 4, seed=0)
    dtypes = {name: value.dtype for name, value in rows[0].items()}
    assert dtypes == {"tokens": np.int32, "segment_ids": np.int32, "loss_mask": np.float32, "answer_mask": np.float32}
    for i in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[i]


def test_seed_decides_the_order_of_documents():
    corpus = corpus_of([3] * 20)
    one, same, other = (np.concatenate([row["tokens"] for row in PackedRows(corpus, 5, seed)]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 8), start=st.integers(0, 200))
def test_sequential_order_reads_on_and_covers_everything(rows, batch_size, start):
    steps = -(-rows // batch_size)
    table = np.array([[sequential_index(start + s, b, batch_size, rows) for b in range(batch_size)] for s in range(steps + 1)])
    assert ((table[1:] - table[:-1]) % rows == 1 % rows).all()
    assert set(table[:steps].ravel()) == set(range(rows))


@pytest.mark.parametrize("length", [1, 4, 7, 20])
def test_short_documents(length):
    """Borders stay, more come, nothing else changes; no target lies behind a border."""
    segment_S = np.array([3] * 6 + [4] * 9 + [0] * 2, np.int32)
    continues_T = ((segment_S[1:] == segment_S[:-1]) & (segment_S[1:] > 0)).astype(np.float32)
    row = {"tokens": np.arange(17), "segment_ids": segment_S, "loss_mask": continues_T, "answer_mask": continues_T * 0}
    found = with_short_documents(row, np.random.default_rng(0), share=1.0, length=length)
    ids_S = found["segment_ids"]
    np.testing.assert_array_equal(found["tokens"], row["tokens"])
    np.testing.assert_array_equal(ids_S > 0, segment_S > 0)
    assert max(np.bincount(ids_S[ids_S > 0])) == min(length, 9)
    assert all(len({(segment_S[i], i // length) for i in np.flatnonzero(ids_S == one)}) == 1 for one in set(ids_S[ids_S > 0]))
    np.testing.assert_array_equal(found["loss_mask"], (ids_S[1:] == ids_S[:-1]) & (ids_S[1:] > 0))
    assert with_short_documents(row, np.random.default_rng(0), share=0.0, length=length) is row


def test_a_share_of_rows_has_short_documents(tmp_path):
    """The same rows for the same seed, whatever step reading begins at."""
    (tmp_path / "a.txt").write_text("word " * 4000)
    (tmp_path / "b.txt").write_text("more " * 4000)
    data = CorpusData(str(tmp_path), length=64, validation_fraction=0.01, short_rows=0.4, short_length=16)
    batches = list(itertools.islice(train_batches(data, 50, seed=0, step=0), 4))
    longest = [max(np.bincount(ids[ids > 0])) for batch in batches for ids in batch["segment_ids"]]
    assert 0.25 < np.mean(np.array(longest) <= 16) < 0.6
    again = next(train_batches(data, 50, seed=0, step=3))
    np.testing.assert_array_equal(again["segment_ids"], batches[3]["segment_ids"])
    for changes, message in (
        ({"short_rows": 1.5}, "short_rows is 1.5"),
        ({"short_length": 0}, "short_length is 0"),
        ({"order": "sequential"}, "it goes with data.order"),
        ({"one_document": True}, "it goes with data.order"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(data, **changes)
