"""Packed rows against the plain concatenation of documents."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext.data.corpora import Corpus
from infinicontext.data.packing import PackedRows, sequential_index


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
