"""Documents packed into rows of one length, end to end or each whole in one row, with segment ids that keep them apart.

Shape letters: S = T + 1 tokens of a row, whose first T are the inputs and last T the targets; N documents.
"""

import bisect
from collections.abc import Iterable

import numpy as np

from infinicontext.data.corpora import Corpus
from infinicontext.data.instructions import Conversations


class PackedRows:
    """Random access to the rows of a corpus; nothing is copied but the row asked for.

    The documents, in a shuffled or in their own order, make one stream of tokens. Row i is stream[i T : i T + T + 1]: the last
    token of a row is the first of the next, so each token of the stream but the first is a target once.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int | None = None):
        """Packs `corpus` into rows of `length` inputs; documents are shuffled by `seed`, or keep their order if it is None."""
        self.corpus = corpus
        self.length = length
        self.order_N = np.arange(len(corpus)) if seed is None else np.random.default_rng(seed).permutation(len(corpus))
        lengths_N = np.diff(corpus.starts)[self.order_N]
        self.ends_N = np.cumsum(lengths_N)
        # In the stream, document n of the order is shifted by this from where it stands in the corpus.
        self.shift_N = corpus.starts[:-1][self.order_N] - (self.ends_N - lengths_N)
        self.total = len(corpus.tokens)

    def __len__(self) -> int:
        """Rows that hold all tokens; only the last may be part padding."""
        return max(1, -(-(self.total - 1) // self.length))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row i.

        Returns:
          tokens: int32 [S]; 0 where padding, which only ends the last row.
          segment_ids: int32 [S], the documents of the stream numbered from 1; 0 means padding.
          loss_mask: float32 [T], 1 where the target (token t + 1) continues the document of token t.
          answer_mask: float32 [T], zeros: a corpus asks no questions.
          each of the corpus's scores: float32 [T], of the targets, NaN where there is none.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        begin = i * self.length
        place_S = np.arange(begin, min(begin + self.length + 1, self.total))
        # Empty documents end where they begin, so no place falls in one.
        document_S = np.searchsorted(self.ends_N, place_S, side="right")
        stands_S = place_S + self.shift_N[document_S]
        tokens_S = self.corpus.tokens[stands_S]
        # One numbering for the whole stream, so that a document that goes on in the next row keeps its id there.
        segment_S = document_S + 1
        padding = (0, self.length + 1 - len(place_S))
        segment_S = np.pad(segment_S, padding).astype(np.int32)
        scores = {name: np.pad(np.float32(x[stands_S]), padding, constant_values=np.nan)[1:] for name, x in self.corpus.scores.items()}
        return scores | {
            "tokens": np.pad(tokens_S.astype(np.int32), padding),
            "segment_ids": segment_S,
            "loss_mask": ((segment_S[1:] == segment_S[:-1]) & (segment_S[1:] > 0)).astype(np.float32),
            "answer_mask": np.zeros(self.length, np.float32),
        }


class WholeRows:
    """Random access to rows of conversations, none of which is split: an answer is always learnt from its whole prompt."""

    def __init__(self, conversations: Conversations, length: int, seed: int):
        """Packs conversations of at most length + 1 tokens, taken in an order shuffled by `seed`, into rows of `length` inputs."""
        self.conversations = conversations
        self.length = length
        lengths_N = np.diff(conversations.starts)
        order_N = np.random.default_rng(seed).permutation(len(lengths_N))
        self.rows = [order_N[row] for row in best_fit(lengths_N[order_N].tolist(), length + 1)]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row i.

        Returns:
          tokens: int32 [S]; 0 where padding, which ends a row.
          segment_ids: int32 [S], the conversations of the row numbered from 1; 0 means padding.
          loss_mask: float32 [T], 1 where the target (token t + 1) continues the conversation of token t.
          answer_mask: float32 [T], 1 where it is also a token that the assistant says.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        tokens_S, segment_S = np.zeros((2, self.length + 1), np.int32)
        answers_S = np.zeros(self.length + 1, bool)
        end = 0
        for segment, conversation in enumerate(self.rows[i], start=1):
            begin, stop = self.conversations.starts[conversation : conversation + 2]
            place = slice(end, end := end + stop - begin)
            tokens_S[place] = self.conversations.tokens[begin:stop]
            answers_S[place] = self.conversations.answers[begin:stop]
            segment_S[place] = segment
        loss_mask_T = (segment_S[1:] == segment_S[:-1]) & (segment_S[1:] > 0)
        return {
            "tokens": tokens_S,
            "segment_ids": segment_S,
            "loss_mask": loss_mask_T.astype(np.float32),
            "answer_mask": (loss_mask_T & answers_S[1:]).astype(np.float32),
        }


def best_fit(lengths: Iterable[int], room: int) -> list[list[int]]:
    """Which items stand in which row: each in its turn in the row with the least room that holds it, or in a new one.

    Args:
      lengths: 1 to `room` each.
      room: of a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows that are not full
    rooms: list[int] = []  # the keys, sorted
    for item, length in enumerate(lengths):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, left = len(rows), room - length
            rows.append([])
        else:
            row, left = by_room[rooms[at]].pop(), rooms[at] - length
            if not by_room[rooms[at]]:
                del by_room[rooms.pop(at)]
        rows[row].append(item)
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


def with_short_documents(row: dict[str, np.ndarray], rng: np.random.Generator, *, share: float, length: int) -> dict[str, np.ndarray]:
    """With the probability `share` a row whose documents end wherever `length` tokens of it are full, too; else the row as it is."""
    if rng.random() >= share:
        return row
    segment_S = row["segment_ids"]
    border_T = (segment_S[1:] != segment_S[:-1]) | (np.arange(1, len(segment_S)) % length == 0)
    ids_S = np.concatenate([[1], 1 + np.cumsum(border_T)])
    masks = {name: np.where(border_T, np.float32(0), row[name]) for name in ("loss_mask", "answer_mask")}
    return row | masks | {"segment_ids": np.where(segment_S > 0, ids_S, 0).astype(np.int32)}


def sequential_index(step: int, row: int, batch_size: int, rows: int) -> int:
    """Which packed row stands in row `row` of batch `step` when documents are read on from batch to batch.

    Each row of the batch walks the whole stream from its own starting point, evenly spaced, so row b at step s + 1 continues row b
    at step s (except from the last row of the stream to the first), and rows / batch_size steps see everything once.
    """
    return (row * rows // batch_size + step) % rows
