"""Summaries of books by input length, scored by ROUGE, as in figure 4 of Infini-attention (arXiv 2404.07143)."""

import dataclasses
import itertools
import time
import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from infinicontext.data.books import BookData, encoded_books
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Answer, Answers, Question
from infinicontext.inference.generate import Generation, generate
from infinicontext.models.streaming import Model

SCORES = ("rouge1", "rouge2", "rougeL")
HOW = {"official": "runs of a-z and 0-9", "unicode": "letters, marks and numbers of Unicode"}
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class SummarisationEvaluation:
    """Which books are summarised, and how; the paper drew 1,024 tokens at temperature 0.5 with top_p 0.95."""

    books: int = 16  # at most, the first of the validation split
    batch_size: int = 4
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    words: Literal["official", "unicode"] = "official"  # what ROUGE compares: runs of a-z and 0-9, or of any script's letters and numbers
    predictions: bool = False  # whether the result holds the summaries and not only their scores

    def __post_init__(self):
        for name in ("books", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.summarisation.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.words not in HOW:
            raise UserError(f"evaluation.summarisation.words is {self.words}; it must be one of {', '.join(HOW)}")
        try:
            Generation(self.max_new_tokens, self.temperature, top_p=self.top_p)
        except UserError as error:
            raise UserError(f"evaluation.summarisation.{error}") from None


def evaluate_summaries(
    model: Model,
    tokenizer: Tokenizer,
    data: BookData,
    config: SummarisationEvaluation,
    lengths: list[int],
    *,
    segment: int,
    seed: int,
    say=lambda line: None,
    file: Path | None = None,
    about: dict | None = None,
) -> dict:
    """ROUGE at each input length.

    Args:
      model: any model with the tokenizer's vocabulary.
      tokenizer: of `data`.
      data: the books, and how a prompt is made of one.
      config: which books and how they are summarised.
      lengths: tokens read, the question included; of a longer book a part is read, a shorter one as a whole.
      segment: tokens per call while a book is read.
      seed: decides what is drawn.
      say: told of progress, a line per length.
      file: keeps summaries, so that no batch of them is written twice after an interruption.
      about: what is evaluated; summaries by something else are not used.

    Returns:
      protocol, source, tokenizer; by_length: the mean share of the books that was read, mean F1 of rouge1, rouge2 and rougeL, overall (the
      cube root of their product) with a 95% bootstrap interval over books (None for a single book), seconds with compilation; predictions:
      on request, each summary with its scores; skipped: lengths with the reason.

    Raises:
      UserError: the books cannot be read, or none is in the validation split.
    """
    chosen = list(itertools.islice(encoded_books(data, tokenizer, "validation"), config.books))
    if not chosen:
        raise UserError(
            f'data.source "{data.source}" has no book in its validation split with data.validation_fraction {data.validation_fraction}'
        )
    options = Generation(
        config.max_new_tokens, config.temperature, top_p=config.top_p, seed=seed, stop=((int(chosen[0][1].answer[-1]),),), segment=segment
    )
    decode = "greedily" if config.temperature == 0 else f"at temperature {config.temperature:g} with top_p {config.top_p:g}"
    protocol = (
        f"{len(chosen)} validation book(s); L tokens, the {data.part} of a book and the question, are read in one stream from an empty "
        f"state and up to {config.max_new_tokens} new tokens decoded {decode}. F1 by rouge-score {version('rouge-score')} without "
        f"stemming, words being {HOW[config.words]}; overall = cube root of ROUGE-1 x ROUGE-2 x ROUGE-L; 95% bootstrap intervals over "
        "books."
    )
    names = {"protocol": protocol, "source": data.source, "tokenizer": data.tokenizer}
    scorer = rouge_scorer(config)
    asked = {"seed": seed, "tokenizer": tokenizer.fingerprint(), "new_tokens": config.max_new_tokens}
    kept = Answers(file, (about or {}) | asked | {"temperature": config.temperature, "top_p": config.top_p})
    by_length, predictions, skipped = [], [], []
    for length in lengths:
        clock = time.perf_counter()
        try:
            prompts, shares = zip(*(parts.prompt(length, data.part) for _, parts in chosen))
        except UserError as error:
            skipped.append({"length": length, "reason": str(error)})
            continue
        questions = [
            Question(length, book.name, number, prompt_P, (book.summary,), book.summary, config.max_new_tokens)
            for number, ((book, _), prompt_P) in enumerate(zip(chosen, prompts))
        ]
        summaries = _summaries(model, tokenizer, questions, kept, options, config.batch_size)
        scores_NS = np.array(
            [[score.fmeasure for score in scorer.score(book.summary, summary).values()] for (book, _), summary in zip(chosen, summaries)]
        )
        entry = {"length": length, "books": len(chosen), "share_read": float(np.mean(shares))} | mean_scores(scores_NS, seed)
        by_length.append(entry | {"seconds": time.perf_counter() - clock})
        predictions += [
            {"length": length, "book": book.name, "share_read": share, "prediction": summary, "summary": book.summary}
            | dict(zip(SCORES, scores))
            for (book, _), share, summary, scores in zip(chosen, shares, summaries, scores_NS.tolist())
        ]
        rouge = ", ".join(f"{name} {entry[name]:.3f}" for name in (*SCORES, "overall"))
        say(f"summarisation length {length}: {rouge}; {entry['share_read']:.0%} of the books read")
    found = names | {"by_length": by_length, "skipped": skipped}
    return found | ({"predictions": predictions} if config.predictions else {})


def rouge_scorer(config: SummarisationEvaluation):
    """rouge-score's, by the words that the config names."""
    # Here, because it takes a second to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(SCORES, tokenizer=Words() if config.words == "unicode" else None)


class Words:
    """What rouge-score takes for a tokenizer; its own keeps the letters a to z alone, so that most languages score 0."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text in lower case: what letters, marks and numbers stand together."""
        text = unicodedata.normalize("NFC", text.lower())
        return "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text).split()


def _summaries(
    model: Model, tokenizer: Tokenizer, questions: list[Question], kept: Answers, options: Generation, batch_size: int
) -> list[str]:
    """A text for each prompt."""
    for at in range(0, len(questions), batch_size):
        batch = questions[at : at + batch_size]
        if all(kept.of(question) for question in batch):
            continue
        # A batch that is not full is filled up, so that a length is compiled once.
        prompts = [question.prompt_P for question in batch + batch[:1] * (batch_size - len(batch))]
        for question, row in zip(batch, generate(model, prompts, options, first_row=at)):
            kept.keep(question, Answer(tokenizer.decode(row.tokens).strip()))
    return [kept.of(question).text for question in questions]


def mean_scores(scores_NS: np.ndarray, seed: int) -> dict:
    """Means over books, their overall score, and its 95% bootstrap interval; the columns are those of SCORES."""
    overall = lambda means: np.cbrt(np.prod(means, axis=-1))
    means_S, N = scores_NS.mean(axis=0), len(scores_NS)
    interval = None
    if N > 1:
        drawn_RN = np.random.default_rng(seed).integers(0, N, (RESAMPLES, N))
        interval = np.quantile(overall(scores_NS[drawn_RN].mean(axis=1)), [0.025, 0.975]).tolist()
    return dict(zip(SCORES, means_S.tolist())) | {"overall": float(overall(means_S)), "interval": interval}
