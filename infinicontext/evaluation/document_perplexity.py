"""Perplexity of documents from their first token on, under its four names and by both protocols.

`evaluate_perplexity` (evaluation/perplexity.py) compares lengths of context on the same tokens; this is what papers report of a corpus.

Shape letters: N texts, n tokens of one, W windows, S tokens of one with its start, L = S - 1.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import numpy as np

from infinicontext.data.corpora import Corpus
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.perplexity import stream_losses
from infinicontext.models.streaming import Model

# stream: a document is read once, the state carried along. sliding: in windows that begin with an empty state, so that a memory is of no
# use beyond a window.
Protocol = Literal["stream", "sliding"]
BUCKET = 2048  # tokens of a range of positions
ROWS = 16  # read together, at most


@dataclasses.dataclass(frozen=True)
class DocumentPerplexityEvaluation:
    """Which documents are read, and how. LongRoPE: sliding, stride 256, 10 windows; Activation Beacon: sliding, stride 2048."""

    documents: int = 16  # at most, the first of the validation split that are long enough
    protocol: Protocol = "stream"
    window: int = 0  # tokens of a sliding window; 0: the length
    stride: int = 256  # from window to window; 0: the first window alone
    windows: int = 0  # of a document, at most; 0: all

    def __post_init__(self):
        if self.protocol not in get_args(Protocol):
            allowed = ", ".join(get_args(Protocol))
            raise UserError(f"evaluation.document_perplexity.protocol is {self.protocol}; it must be one of {allowed}")
        if self.documents < 1:
            raise UserError(f"evaluation.document_perplexity.documents is {self.documents}; it must be 1 or more")
        for name in ("window", "stride", "windows"):
            if getattr(self, name) < 0:
                raise UserError(f"evaluation.document_perplexity.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.window and self.stride > self.window:
            raise UserError(
                f"evaluation.document_perplexity.stride is {self.stride}; with windows of {self.window} tokens it must be at most as many"
            )


def sliding_windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, scored): windows in which every token is scored once, the last `scored` of each; stride 0: the first window alone.

    Raises:
      UserError: the stride is longer than the window.
    """
    if stride > window < tokens:
        raise UserError(f"sliding windows of {window} tokens with a stride of {stride} would leave tokens out")
    found, before = [], 0
    for start in range(0, tokens, stride or tokens):
        end = min(start + window, tokens)
        found.append((start, end, end - before))
        before = end
        if end == tokens:
            break
    return found


def text_losses(
    losses_of: Callable[[np.ndarray], jax.Array], texts_Nn: np.ndarray, windows: Sequence[tuple[int, int, int]], start_id: int | None
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Losses of texts that are read in windows.

    Args:
      losses_of: (tokens_WS) -> the loss of each token after the first.
      texts_Nn: tokens of texts of the same length.
      windows: as `sliding_windows` has them.
      start_id: of the token before each window; None: there is none, and a window's first token is not scored.

    Returns:
      losses_Nn; scored_Nn, bool, which of them there are; and the mean loss of each window that scores a token.
    """
    head = [] if start_id is None else [start_id]
    longest = max(end - begin for begin, end, _ in windows)
    cut = [(text, *window) for text in range(len(texts_Nn)) for window in windows]
    rows_WS = [np.array([*head, *texts_Nn[text, begin:end], *[0] * (longest - end + begin)], np.int32) for text, begin, end, _ in cut]
    losses_Nn, scored_Nn, means, batch = np.zeros(texts_Nn.shape), np.zeros(texts_Nn.shape, bool), [], min(len(rows_WS), ROWS)
    for at in range(0, len(rows_WS), batch):
        # A batch that is not full is filled up, so that a length is compiled once.
        losses_WL = np.asarray(losses_of(np.stack((rows_WS[at : at + batch] + rows_WS)[:batch])))
        for losses_L, (text, begin, end, scored) in zip(losses_WL, cut[at : at + batch]):
            first = max(end - scored, begin + 1 - len(head))
            if first >= end:
                continue
            # Row r of the losses is of the token after the r-th that was read.
            losses_Nn[text, first:end] = losses_L[first - begin - 1 + len(head) : end - begin - 1 + len(head)]
            scored_Nn[text, first:end] = True
            means.append(float(np.mean(losses_Nn[text, first:end])))
    return losses_Nn, scored_Nn, means


def perplexities(nll_N: np.ndarray, tokens_N: np.ndarray, words_N: np.ndarray, bytes_N: np.ndarray) -> dict[str, float]:
    """The four numbers that are called perplexity, from sums of losses (nats), tokens, words and bytes by document.

    token: over all tokens; document: exp of the mean over documents of their mean losses (Activation Beacon); word: the same losses over
    the words of the text (PG19); bits_per_byte.
    """
    total = nll_N.sum()
    bounded = lambda nll: math.exp(min(nll, 700.0))
    return {
        "token_perplexity": bounded(total / tokens_N.sum()),
        "document_perplexity": bounded(float(np.mean(nll_N / tokens_N))),
        "word_perplexity": bounded(total / max(words_N.sum(), 1)),
        "bits_per_byte": float(total / (math.log(2) * bytes_N.sum())),
    }


def evaluate_document_perplexity(
    model: Model,
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DocumentPerplexityEvaluation,
    lengths: list[int],
    *,
    limit: int,
    segment: int,
    say=lambda line: None,
) -> dict:
    """Reads documents up to each length.

    Args:
      model: any model with the corpus's vocabulary.
      corpus: documents the model was not trained on.
      tokenizer: of the corpus, to count words and bytes.
      config: which documents, and the protocol.
      lengths: tokens of a text that are read, the start token beside them; only documents that have so many count.
      limit: the most that this model can read; longer streams are skipped.
      segment: tokens per call of a stream.
      say: told of progress, a line per length.

    Returns:
      protocol; by_length: how many documents and tokens were scored, how many documents are long enough, nll (nats per token), with a 95%
      interval over documents, the four numbers of `perplexities`, of sliding windows also exp of the mean of their means (LongRoPE and
      EasyContext report that), speed;
      by_position: nll in ranges of 2,048 positions of the longest length; skipped: lengths with the reason.
    """
    start = 0 if tokenizer.start_id is None else 1
    sizes = np.diff(corpus.starts) - start
    run = jax.jit(stream_losses, static_argnames="segment")
    by_length, by_position, skipped, sliding = [], [], [], config.protocol == "sliding"
    for length in sorted(lengths):
        qualifying = np.flatnonzero(sizes >= length)
        chosen = qualifying[: config.documents]
        window = min(config.window or length, length) if sliding else length
        if reason := _reason(length, window, limit, start, int(sizes.max(initial=0)), chosen):
            skipped.append({"length": length, "reason": reason})
            continue
        texts_Nn = np.stack([corpus.document(i)[start : start + length] for i in chosen])
        # A window of a given size holds the start token, too, and then one token of text less; so does its stride, if it is as long.
        reach = min(config.window - start if config.window else length, length)
        stride = min(config.stride, reach)
        windows = sliding_windows(length, reach, stride) if sliding else [(0, length, length)]
        clock = time.perf_counter()
        losses_Nn, scored_Nn, means = text_losses(
            lambda rows_WS: run(model, rows_WS, segment=segment), texts_Nn, windows[: config.windows or None], tokenizer.start_id
        )
        seconds = time.perf_counter() - clock
        if not np.isfinite(losses_Nn).all():
            _, at = np.argwhere(~np.isfinite(losses_Nn))[0]
            skipped.append({"length": length, "reason": f"the model's losses are not finite, first at token {at}"})
            say(f"document perplexity length {length}: left out, {skipped[-1]['reason']}")
            continue
        scored = [tokenizer.decode(text_n[scored_n]) for text_n, scored_n in zip(texts_Nn, scored_Nn)]
        words_N, bytes_N = np.array([len(text.split()) for text in scored]), np.array([len(text.encode()) for text in scored])
        tokens_N, nll_N = scored_Nn.sum(axis=1), losses_Nn.sum(axis=1)
        mean = float(nll_N.sum() / tokens_N.sum())
        entry = {
            "length": length,
            "documents": len(chosen),
            "qualifying": len(qualifying),
            "tokens": int(tokens_N.sum()),
            "nll": mean,
            "interval": None,
        }
        if len(chosen) > 1:
            error = float((nll_N / tokens_N).std(ddof=1) / math.sqrt(len(chosen)))
            entry["interval"] = [mean - 1.96 * error, mean + 1.96 * error]
        entry |= perplexities(nll_N, tokens_N, words_N, bytes_N)
        if sliding:
            entry["window_mean_perplexity"] = math.exp(min(float(np.mean(means)), 700.0))
        by_length.append(entry | {"tokens_per_second": int(tokens_N.sum()) / seconds})
        by_position = [
            {"from": at, "to": min(at + BUCKET, length), "nll": float(losses_Nn[:, part][scored_Nn[:, part]].mean())}
            for at in range(0, length, BUCKET)
            if scored_Nn[:, (part := slice(at, at + BUCKET))].any()
        ]
        say(f"document perplexity length {length}: {entry['token_perplexity']:.3f}, {entry['bits_per_byte']:.3f} bits per byte")
    window = f"windows of {config.window or 'the length'}, stride {config.stride}" + (
        f", {config.windows} at most" if config.windows else ""
    )
    how = {
        "stream": "each is read once in one stream from an empty state, every token scored once",
        "sliding": f"in sliding {window}; each begins with an empty state, what was scored is not scored again",
    }
    protocol = (
        f"The first L tokens of up to {config.documents} validation documents that have as many; {how[config.protocol]}. Each L has "
        "documents and tokens of its own."
    )
    return {"protocol": protocol, "by_length": by_length, "by_position": by_position, "skipped": skipped}


def _reason(length: int, window: int, limit: int, start: int, longest: int, chosen: np.ndarray) -> str:
    """Why a length is not read; "" where it is."""
    if window > limit:
        return f"the state grows with length and evaluation.capacity is {limit}"
    if not len(chosen):
        return f"the longest validation document has {longest} tokens"
    return "" if length > 1 - start and window > 1 else "there is nothing to score"
