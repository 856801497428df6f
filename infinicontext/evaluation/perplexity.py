"""Perplexity by context length and by position, beside n-gram baselines on the same tokens.

Shape letters: B documents, L tokens read, T tokens of one call.
"""

import dataclasses
import math
import time

import jax
import numpy as np

from infinicontext.data.corpora import Corpus
from infinicontext.errors import UserError
from infinicontext.evaluation.labels import perplexity as as_perplexity
from infinicontext.inference.norm_refresh import read_with_norm_refresh
from infinicontext.models.streaming import Model, read
from infinicontext.objectives.next_token import NextToken, counted, token_losses, token_weights, weighted_loss


@dataclasses.dataclass(frozen=True)
class PerplexityEvaluation:
    """Which tokens are scored."""

    documents: int = 8  # at most, the first long enough ones of the validation split
    scored: int = 256  # the last tokens of each document's prefix, the same at every context length

    def __post_init__(self):
        for name in ("documents", "scored"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.perplexity.{name} is {getattr(self, name)}; it must be 1 or more")


def stream_losses(model: Model, tokens_BS: jax.Array, *, segment: int, norm_refresh: tuple[int, int, int] | None = None) -> jax.Array:
    """The loss of each token after the first, read in one stream from an empty state: tokens_BS int32 -> losses_BL float32, L = S - 1.

    `segment` is the number of tokens per call; with `norm_refresh` (inference/norm_refresh.py) that says how a Megalodon reads instead.
    """
    inputs_BL, targets_BL = tokens_BS[:, :-1], tokens_BS[:, 1:]
    if norm_refresh:
        return read_with_norm_refresh(model, inputs_BL, refresh=norm_refresh, visit=token_losses, extra=targets_BL)[0]
    state = model.init_state(*inputs_BL.shape)
    return read(model, inputs_BL, state, segment=segment, visit=token_losses, extra=targets_BL)[0]


def evaluate_perplexity(
    model: Model,
    corpus: Corpus,
    config: PerplexityEvaluation,
    lengths: list[int],
    *,
    limit: int,
    segment: int,
    start_id: int | None = None,
    norm_refresh: tuple[int, int, int] | None = None,
    say=lambda line: None,
) -> dict:
    """The same tokens scored with more and more context, and all tokens by position.

    Args:
      model: any model with the corpus's vocabulary.
      corpus: documents the model was not trained on.
      config: how many documents and tokens.
      lengths: context lengths of the comparison; the longest that some document has decides the documents.
      limit: the longest that this model can read; longer ones are skipped, but still decide the documents.
      segment: tokens per call.
      start_id: the token that documents begin with, which every context begins with, too, as one of its L tokens; None: there is none.
      norm_refresh: as in `stream_losses`.
      say: told of progress, a line per length.

    Returns:
      protocol; by_length: nll (nats per token), perplexity, a 95% interval over documents, speed; by_position: nll in buckets
      [2^i, 2^(i+1)) of the documents' first tokens, as many as the longest length that was read; skipped: lengths with the reason.
    """
    sizes = np.diff(corpus.starts)
    reach = max((length for length in lengths if length < sizes.max()), default=int(sizes.max()) - 1)
    chosen = np.flatnonzero(sizes > reach)[: config.documents]
    tokens_BS = np.stack([corpus.document(i)[: reach + 1] for i in chosen])
    result = {
        "protocol": (
            f"The last {config.scored} of the first {reach + 1} tokens of {len(chosen)} validation document(s) are scored after reading "
            "L tokens that end with them, in one stream from an empty state: the same tokens at every L. By position: the documents' first "
            "tokens, as many as the longest L that was read."
            + (f" Norm statistics are refreshed as the official MEGALODON code does: {norm_refresh}, in chunks." if norm_refresh else "")
        ),
        "by_length": [],
        "by_position": [],
        "skipped": [],
    }
    run = jax.jit(stream_losses, static_argnames=("segment", "norm_refresh"))
    for length in sorted(lengths):
        if length > limit:
            result["skipped"].append({"length": length, "reason": f"the state grows with length and evaluation.capacity is {limit}"})
            continue
        if length > reach:
            result["skipped"].append({"length": length, "reason": f"the longest validation document has {sizes.max()} tokens"})
            continue
        if length < config.scored:
            result["skipped"].append({"length": length, "reason": f"shorter than the {config.scored} tokens that are scored"})
            continue
        part_BS = tokens_BS[:, reach - length :].copy()
        if start_id is not None:
            part_BS[:, 0] = start_id
        compiled = run.lower(model, part_BS, segment=segment, norm_refresh=norm_refresh).compile()
        clock = time.perf_counter()
        losses_BL = np.asarray(compiled(model, part_BS))
        seconds = time.perf_counter() - clock
        if not np.isfinite(losses_BL).all():
            at = np.argwhere(~np.isfinite(losses_BL))[0, 1] + 1
            result["skipped"].append({"length": length, "reason": f"the model's losses are not finite, first after {at} tokens"})
            continue
        read_BL = losses_BL
        nll_B = losses_BL[:, -config.scored :].mean(axis=1)
        nll, error = float(nll_B.mean()), float(nll_B.std(ddof=1) / math.sqrt(len(nll_B))) if len(nll_B) > 1 else math.nan
        result["by_length"].append(
            {
                "length": length,
                "nll": nll,
                "perplexity": as_perplexity(nll),
                "interval": [nll - 1.96 * error, nll + 1.96 * error] if len(nll_B) > 1 else None,
                "tokens": int(nll_B.size * config.scored),
                "documents": len(chosen),
                "seconds": seconds,
                "tokens_per_second": losses_BL.size / seconds,
            }
        )
        say(f"perplexity length {length}: {as_perplexity(nll):.3f} ({nll:.4f} nats), {losses_BL.size / seconds:,.0f} tokens/s")
    if result["by_length"]:
        longest = result["by_length"][-1]["length"]
        if longest < reach:
            # The pass above has read the ends of what is too long for the model.
            read_BL = np.asarray(run(model, tokens_BS[:, : longest + 1], segment=segment, norm_refresh=norm_refresh))
        result["by_position"] = [
            {"from": start, "to": min(2 * start, longest + 1), "nll": float(bucket.mean()), "tokens": int(bucket.size)}
            for start in (2**i for i in range(longest.bit_length()))
            if (bucket := read_BL[:, start - 1 : 2 * start - 1]).size and np.isfinite(bucket).all()
        ]
    return result


def answer_perplexity(model: Model, batches: list[dict[str, np.ndarray]]) -> dict:
    """How well the answers in validation batches are foretold, each from all that stands before it in its conversation.

    Returns:
      protocol; nll (nats per answer token), perplexity, tokens.
    """
    answers = NextToken("answers")
    loss = jax.jit(lambda model, batch: weighted_loss(answers, model, batch | {"weights": token_weights(answers, batch)})[0])
    weights = [counted(answers, batch) for batch in batches]
    nll = float(np.average([float(loss(model, batch)) for batch in batches], weights=weights))
    tokens = int(sum(weights))
    protocol = f"All {tokens} answer tokens of the validation rows are scored, each after reading its conversation up to there."
    return {"protocol": protocol, "nll": nll, "perplexity": as_perplexity(nll), "tokens": tokens}


def ngram_losses(corpus: Corpus, vocab_size: int, batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Unigram and bigram models of the training split, in nats per token on the same targets as the validation loss.

    The unigram has one count added to each token; the bigram is interpolated with it, p(b|a) = (count(a, b) + p(b)) / (count(a) + 1).

    Args:
      corpus: the training split.
      vocab_size: V.
      batches: validation batches (data/pipeline.py).
    """
    previous, target = [], []
    for batch in batches:
        counts = batch["loss_mask"] > 0
        previous.append(batch["tokens"][:, :-1][counts])
        target.append(batch["tokens"][:, 1:][counts])
    previous, target = np.concatenate(previous).astype(np.int64), np.concatenate(target).astype(np.int64)

    tokens = corpus.tokens.astype(np.int64)
    single = np.bincount(tokens, minlength=vocab_size)
    unigram = (single + 1) / (single.sum() + vocab_size)
    inside = np.ones(len(tokens), bool)
    inside[corpus.starts[:-1][np.diff(corpus.starts) > 0]] = False
    pairs, pair_counts = np.unique(tokens[:-1][inside[1:]] * vocab_size + tokens[1:][inside[1:]], return_counts=True)
    wanted = previous * vocab_size + target
    # A last entry that no pair equals makes every search end at an entry.
    pairs, pair_counts = np.append(pairs, vocab_size**2), np.append(pair_counts, 0)
    at = np.searchsorted(pairs, wanted)
    pair = np.where(pairs[at] == wanted, pair_counts[at], 0)
    context = np.zeros(vocab_size, np.int64)
    np.add.at(context, pairs[:-1] // vocab_size, pair_counts[:-1])
    bigram = (pair + unigram[target]) / (context[previous] + 1)
    return {"unigram": float(-np.log(unigram[target]).mean()), "bigram": float(-np.log(bigram).mean())}


def bits_per_byte(nll: float, corpus: Corpus, start_id: int | None) -> float:
    """A mean loss per token, in nats, as bits per byte of text, with as many tokens per byte as the corpus has on the whole.

    Args:
      nll: over tokens of the corpus.
      corpus: the split that was scored.
      start_id: the token before each document, which is no text and never a target.
    """
    targets = len(corpus.tokens) - (len(corpus) if start_id is not None else 0)
    return nll * targets / (math.log(2) * int(corpus.bytes_per_document.sum()))
