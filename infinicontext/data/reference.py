"""What a reference model makes of the tokens of a corpus, kept beside them: a float16 (or float32) per token, NaN where none is foretold.

A folder has header.json and a .npy for each score, as long as the corpus: entry j is of token j as a target.

Shape letters: K tokens of the corpus, R rows, W inputs of a row.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infinicontext.data.corpora import Corpus
from infinicontext.data.packing import best_fit
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.files import read_json

HEADER = "header.json"
NAMES = ("reference_loss", "reference_entropy")


class Piece(NamedTuple):
    """Tokens of one document that are read together."""

    begin: int  # of the corpus
    size: int  # tokens, W + 1 at most
    first: int  # of its targets, the first whose score is kept: those before have a longer context in the piece before


def header(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """What scores are of."""
    return {"tokenizer": tokenizer.fingerprint(), "tokens": len(corpus.tokens), "corpus": corpus.fingerprint()}


def load_scores(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The scores in a folder by name, [K], read as they are asked for.

    Raises:
      UserError: there are none, they are not complete, or of another corpus or tokenizer.
    """
    found = read_json(folder / HEADER)
    if not found.get("complete"):
        raise UserError(f"data.reference {folder} is not complete; the same infinicontext score-tokens goes on with it")
    for name, value in header(corpus, tokenizer).items():
        if found.get(name) != value:
            made = f"{found.get('source')} with validation_fraction {found.get('validation_fraction')}"
            what = {"tokenizer": "tokenizer", "tokens": "number of tokens", "corpus": "text"}[name]
            raise UserError(f"data.reference {folder} was made for another {what} than data has; it was made of {made}")
    try:
        scores = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES if (folder / f"{name}.npy").exists()}
    except (OSError, ValueError) as error:
        raise UserError(f"data.reference {folder} cannot be read: {error}") from error
    if not scores or any(values.shape != (len(corpus.tokens),) for values in scores.values()):
        raise UserError(f"data.reference {folder} is damaged: it has no scores, or not one for each of {len(corpus.tokens)} tokens")
    return scores


def pieces(corpus: Corpus, window: int, stride: int) -> list[Piece]:
    """Documents in pieces of `window` inputs that begin every `stride` tokens, the last as soon as it reaches the end."""
    found = []
    for begin, end in zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist()):
        at, kept = begin, begin + 1
        while kept < end:
            stop = min(at + window + 1, end)
            found.append(Piece(at, stop - at, kept - at))
            at, kept = at + stride, stop
    return found


def rows(found: list[Piece], window: int) -> list[list[Piece]]:
    """Pieces in rows of `window` + 1 tokens."""
    return [[found[i] for i in row] for row in best_fit([piece.size for piece in found], window + 1)]


def row_batch(corpus: Corpus, row: list[Piece], window: int) -> dict[str, np.ndarray]:
    """A row as a model reads it: tokens and segment_ids, int32 [W + 1]."""
    tokens_S, segments_S = np.zeros((2, window + 1), np.int32)
    end = 0
    for number, piece in enumerate(row, 1):
        tokens_S[end : end + piece.size] = corpus.tokens[piece.begin : piece.begin + piece.size]
        segments_S[end : end + piece.size] = number
        end += piece.size
    return {"tokens": tokens_S, "segment_ids": segments_S}


def keep_row(kept_K: np.ndarray, row: list[Piece], values_W: np.ndarray) -> None:
    """Puts the scores of a row's targets where they belong."""
    end = 0
    for piece in row:
        kept_K[piece.begin + piece.first : piece.begin + piece.size] = values_W[end + piece.first - 1 : end + piece.size - 1]
        end += piece.size
