"""The copy task that TransformerFAM's training adds to its data (Hwang et al. 2024, arXiv 2404.09173 v3, section 3.1.1): at a row's end, a
stretch of the row is asked for again. Shape letters: S tokens of a row without the task, T + 1 with it.
"""

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError

PROMPT = "[repeat random segment]:"
WEIGHT = 0.1  # of a copied token in the loss


def check_copy(data) -> None:
    """Raises UserError if the fields `copy_tokens` and `one_document` of a data config do not go together."""
    if data.copy_tokens < 0:
        raise UserError(f"data.copy_tokens is {data.copy_tokens}; it must be 0 or more")
    if data.copy_tokens and not data.one_document:
        raise UserError(
            f"data.copy_tokens is {data.copy_tokens}, for which data.one_document must be true: what is copied may be of any document"
        )


def row_length(data, tokenizer: Tokenizer) -> int:
    """Inputs of a row before the task is added to it.

    Raises:
      UserError: no room is left.
    """
    extra = data.copy_tokens + len(tokenizer.encode(PROMPT)) if data.copy_tokens else 0
    if data.length - extra < max(data.copy_tokens, 1):
        raise UserError(f"data.copy_tokens is {data.copy_tokens}, which with data.length {data.length} leaves no room for what is copied")
    return data.length - extra


def with_copy(row: dict[str, np.ndarray], rng: np.random.Generator, *, copy_tokens: int, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """A row with the task behind its last token: the prompt, and consecutive tokens of the row from a random place on.

    Args:
      row: tokens and segment_ids int32 [S], loss_mask and answer_mask float32 [S - 1].
      rng: draws the place.
      copy_tokens: how many; as many as the row has, if it has fewer.
      prompt: int32, the tokens of PROMPT.

    Returns:
      The same of lengths T + 1 and T; both masks have WEIGHT where the target is copied, and 0 on the prompt.
    """
    read = int(np.count_nonzero(row["segment_ids"]))
    count = min(copy_tokens, read)
    begin = int(rng.integers(read - count + 1))
    room = copy_tokens + len(prompt)
    tokens_S = np.pad(row["tokens"], (0, room))
    end = read + len(prompt) + count
    tokens_S[read:end] = np.concatenate([prompt, row["tokens"][begin : begin + count]])
    segment_S = np.pad(row["segment_ids"], (0, room))
    segment_S[read:end] = segment_S[0]
    masks = {name: np.pad(row[name], (0, room)) for name in ("loss_mask", "answer_mask")}
    for mask_T in masks.values():
        mask_T[end - count - 1 : end - 1] = WEIGHT
    return {"tokens": tokens_S, "segment_ids": segment_S, **masks}


def as_one_document(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row whose tokens see all before them, whatever documents those are of, as the paper packs: what is of no use is to be forgotten."""
    return row | {"segment_ids": (row["segment_ids"] > 0).astype(np.int32)}
