"""Batches for training and validation as pure functions of (data config, seed, step).

The position in the data is the step number and nothing else, so a run resumes by asking for the next step, with any number of
processes: at each step the processes' rows together are the same global batch.

Shape letters: B rows of a batch, T inputs of a row, S = T + 1 tokens of a row. Every batch is a dict of
  tokens int32 [B S], segment_ids int32 [B S] (a document each, 0 = padding),
  loss_mask float32 [B T] (1 where the target is of the same document), answer_mask float32 [B T] (1 where the target is an answer).
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import grain
import numpy as np

from infinicontext.data.books import BookData, books, load_books
from infinicontext.data.copying import PROMPT, as_one_document, check_copy, row_length, with_copy
from infinicontext.data.corpora import Split, documents, load_corpus
from infinicontext.data.images import ImageData, Images, class_names, load_images, stored_images
from infinicontext.data.instructions import InstructionData, as_text, conversations, load_conversations
from infinicontext.data.packing import PackedRows, WholeRows, sequential_index, with_short_documents
from infinicontext.data.passkey import passkey_sample
from infinicontext.data.recall import RecallData
from infinicontext.data.reference import load_scores
from infinicontext.data.tokenizers import Tokenizer, load_tokenizer
from infinicontext.errors import UserError

Batch = dict[str, np.ndarray]
Order = Literal["shuffled", "sequential"]
STEPS = 2**40  # more steps or rows than any run has
TRAINING, VALIDATION = 0, 1  # samples that are drawn come from disjoint random streams


@dataclasses.dataclass(frozen=True)
class CorpusData:
    """Next-token prediction on documents packed into rows.

    Attributes:
      source: see `corpora.documents`.
      tokenizer: see `tokenizers.load_tokenizer`.
      length: T.
      order: "shuffled" draws packed rows at random, each once per epoch; "sequential" reads documents in corpus order, row b of a
        batch continuing row b of the batch before (for models that carry their state from step to step).
      validation_fraction: share of documents kept for validation, decided by the hash of their text.
      one_document: the documents of a row see one another, as in TransformerFAM's training, and with order "sequential" those of all rows.
      copy_tokens: the copy task of TransformerFAM's training (data/copying.py): so many tokens of each row are asked for again at its end.
      reference: a folder of `infinicontext score-tokens`: what a reference model makes of each token, for a selective objective.
      short_rows: in this share of the rows, drawn at random, a document ends after every `short_length` tokens at the latest: LongRoPE2's
        mixed windows (arXiv 2502.20082, section 3.4), for which models with its factors turn by those of short texts.
      short_length: tokens.
    """

    source: str = "python"
    tokenizer: str = "bytes"
    length: int = 512
    order: Order = "shuffled"
    validation_fraction: float = 0.05
    one_document: bool = False
    copy_tokens: int = 0
    reference: str = ""
    short_rows: float = 0.0
    short_length: int = 256

    def __post_init__(self):
        if not 0 <= self.short_rows <= 1:
            raise UserError(f"data.short_rows is {self.short_rows}; it must be from 0 to 1")
        if self.short_length < 1:
            raise UserError(f"data.short_length is {self.short_length}; it must be 1 or more")
        if self.short_rows and (self.order == "sequential" or self.one_document):
            raise UserError(f'data.short_rows is {self.short_rows}; it goes with data.order "shuffled" and without data.one_document')
        if self.reference and self.copy_tokens:
            raise UserError(
                f"data.copy_tokens is {self.copy_tokens}; with data.reference, which knows no tokens but the corpus's, it must be 0"
            )
        if self.length < 1:
            raise UserError(f"data.length is {self.length}; it must be 1 or more")
        if self.order not in get_args(Order):
            raise UserError(f'data.order is "{self.order}"; it must be one of {", ".join(get_args(Order))}')
        check_copy(self)
        if self.copy_tokens and self.order == "sequential":
            raise UserError(f'data.copy_tokens is {self.copy_tokens}, for which data.order must be "shuffled": rows go on otherwise')
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; it must be above 0 and below 1")


@dataclasses.dataclass(frozen=True)
class PasskeyData:
    """The passkey task with keys at random depths, on a curriculum of lengths.

    Attributes:
      tokenizer: see `tokenizers.load_tokenizer`.
      lengths: T of each stage. A later stage has fewer rows per batch, so that tokens per batch stay about constant.
      stage_steps: steps spent at each length but the last, which has no end.
      digits: decimal digits of the key.
      shortest: (): one sample fills a row. A number of tokens for each stage: a row holds samples of random lengths, the first drawn
        uniformly from this to T + 1, the next from this to what is left, and so on, so that keys and questions stand anywhere, and near
        and far from each other.
      depths: of the keys, drawn uniformly between these two. What is drawn below 0 or above 1 becomes an end, where long samples seldom
        have their keys otherwise: (-0.1, 1.1) puts a sixth of the keys there, and (0, 0) all of them before any filler.
      one_document: in this share of a batch's rows, the first ones, samples see one another: a question is about the last of several keys,
        and a memory is worn by all that was read before, with Experiment.carry in the steps before, too.
    """

    tokenizer: str = "passkey"
    lengths: tuple[int, ...] = (256,)
    stage_steps: tuple[int, ...] = ()
    digits: int = 5
    shortest: tuple[int, ...] = ()
    depths: tuple[float, float] = (0.0, 1.0)
    one_document: float = 0.0

    def __post_init__(self):
        if not 0 <= self.one_document <= 1:
            raise UserError(f"data.one_document is {self.one_document}; it must be from 0 to 1")
        if not -1 <= self.depths[0] <= self.depths[1] <= 2:
            raise UserError(f"data.depths is {self.depths}; it must be two numbers from -1 to 2, the smaller first")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"data.lengths is {self.lengths}; it must be one or more lengths of at least 1")
        if len(self.stage_steps) != len(self.lengths) - 1 or min(self.stage_steps, default=1) < 1:
            raise UserError(
                f"data.stage_steps is {self.stage_steps}; for data.lengths {self.lengths} it must be "
                f"{len(self.lengths) - 1} numbers of steps, each 1 or more"
            )
        if self.shortest and len(self.shortest) != len(self.lengths):
            raise UserError(f"data.shortest is {self.shortest}; it must be empty or {len(self.lengths)} numbers, as many as data.lengths")
        if any(not 1 <= shortest <= length + 1 for shortest, length in zip(self.shortest, self.lengths)):
            raise UserError(
                f"data.shortest is {self.shortest}; each must be from 1 to what a row of data.lengths {self.lengths} holds, T + 1"
            )
        if not 1 <= self.digits <= 18:
            raise UserError(f"data.digits is {self.digits}; it must be from 1 to 18")

    def stage_at(self, step: int) -> int:
        """Which of `lengths` a step has."""
        return int(np.searchsorted(np.cumsum(self.stage_steps), step, side="right"))

    def length_at(self, step: int) -> int:
        """T at a step."""
        return self.lengths[self.stage_at(step)]

    def rows_at(self, step: int, batch_size: int, multiple: int) -> int:
        """B at a step: `batch_size` at the first length, then a multiple of `multiple` for about as many tokens."""
        rows = batch_size * self.lengths[0] // self.length_at(step)
        return max(multiple, rows // multiple * multiple)


Data = CorpusData | PasskeyData | InstructionData | BookData | ImageData | RecallData


def tokenizer_of(data: Data) -> Tokenizer | None:
    """The tokenizer; None for images, whose ids are gray levels and classes, and for recall, whose ids are no text."""
    return None if isinstance(data, ImageData | RecallData) else load_tokenizer(data.tokenizer)


def vocabulary_size(data: Data) -> int:
    """Every id is below it."""
    if isinstance(data, RecallData):
        return data.vocab_size
    return data.levels + len(class_names(data)) if isinstance(data, ImageData) else load_tokenizer(data.tokenizer).vocab_size


def fingerprint(data: Data) -> str:
    """SHA-256 (hex) of everything outside the config that batches depend on: names and contents of documents or images, and the tokenizer.

    Raises:
      UserError: the tokenizer or the source is not usable.
    """
    tokenizer = tokenizer_of(data)
    digest = hashlib.sha256(tokenizer.fingerprint().encode() if tokenizer else b"")
    contents: Iterable[tuple[str, bytes]] = ()
    if isinstance(data, CorpusData):
        contents = ((name, text.encode(errors="replace")) for name, text in documents(data.source))
    elif isinstance(data, InstructionData):
        contents = ((name, as_text(messages).encode(errors="replace")) for name, messages in conversations(data.source))
    elif isinstance(data, BookData):
        contents = ((book.name, as_text((("book", book.text), ("summary", book.summary))).encode()) for book in books(data.source))
    elif isinstance(data, ImageData):
        contents = stored_images(data)
    for name, content in contents:
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def tokens_read(data: Data, batch_size: int, steps: int, divisor: int = 1) -> int:
    """Tokens (inputs) of all global batches of the first `steps` steps."""
    if not isinstance(data, PasskeyData):
        return steps * batch_size * data.length
    starts = list(itertools.accumulate(data.stage_steps, initial=0))
    return sum(
        max(0, min(end, steps) - start) * length * data.rows_at(start, batch_size, divisor)
        for start, end, length in zip(starts, [*starts[1:], steps], data.lengths)
    )


def train_batches(
    data: Data,
    batch_size: int,
    *,
    seed: int,
    step: int,
    process_index: int = 0,
    process_count: int = 1,
    divisor: int = 1,
) -> Iterator[Batch]:
    """This process's part of the global batches `step`, `step + 1`, ... without end, read ahead by two threads.

    Args:
      data: what to read.
      batch_size: rows of the global batch (of the first stage of a curriculum).
      seed: 0 to 2^32 - 1, decides the order of documents and the keys and depths of the passkey task.
      step: where to begin; a run that starts anew begins at 0.
      process_index: this process among `process_count`; rows are dealt out in turn.
      process_count: how many processes read the same data.
      divisor: every global batch has a multiple of this many rows (`sharding.batch_divisor`).

    Raises:
      UserError: `batch_size` cannot be divided, `seed` is out of range, or the tokenizer or the source is not usable.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
    multiple = math.lcm(divisor, process_count)
    if batch_size < 1 or batch_size % multiple:
        raise UserError(
            f"batch_size is {batch_size}; it must be a multiple of {multiple} ({process_count} processes, {divisor} shards of the batch)"
        )
    tokenizer = tokenizer_of(data)
    if isinstance(data, PasskeyData):
        _check_lengths(data, tokenizer)

        def passkey_batch(step: int) -> Batch:
            count = data.rows_at(step, batch_size, multiple)
            rows = range(process_index, count, process_count)
            return _passkey_rows(data, tokenizer, data.stage_at(step), rows, count, (TRAINING, seed, step))

        batches = grain.MapDataset.range(STEPS).map(passkey_batch)
    elif isinstance(data, RecallData):
        rows = range(process_index, batch_size, process_count)
        batches = grain.MapDataset.range(STEPS).map(lambda step: data.batch(rows, (TRAINING, seed, step)))
    elif isinstance(data, CorpusData) and data.order == "sequential":
        packed = _packed(data, tokenizer, "train", None)

        def sequential_batch(step: int) -> Batch:
            rows = range(process_index, batch_size, process_count)
            found = (packed[sequential_index(step, row, batch_size, len(packed))] for row in rows)
            return _stack(map(as_one_document, found) if data.one_document else found)

        batches = grain.MapDataset.range(STEPS).map(sequential_batch)
    else:
        copies = getattr(data, "copy_tokens", 0)
        shorter = dataclasses.replace(data, length=row_length(data, tokenizer), copy_tokens=0) if copies else data
        packed = _packed(shorter, tokenizer, "train", seed)
        # Not repeat() without a number: the length it claims overflows in batches of one row.
        rows = grain.MapDataset.source(packed).seed(seed).shuffle().repeat(-(-STEPS // len(packed)))
        if getattr(data, "one_document", False):
            rows = rows.map(as_one_document)
        if getattr(data, "short_rows", 0):
            rows = rows.random_map(functools.partial(with_short_documents, share=data.short_rows, length=data.short_length))
        if copies:
            rows = rows.random_map(functools.partial(with_copy, copy_tokens=copies, prompt=tokenizer.encode(PROMPT)))
        batches = rows[process_index::process_count].batch(batch_size // process_count)
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
    grain.experimental.set_next_index(iterator, step)
    return iterator


def validation_batches(data: Data, batch_size: int, count: int, seed: int, divisor: int = 1) -> list[Batch]:
    """The same `count` global batches of `batch_size` rows whenever asked, from data that training never sees.

    A corpus, conversations, books and images give rows of their validation split, in an order drawn by `seed`; if there are too few, fewer
    batches, the last filled up with rows of padding, and without the copy task. The passkey task gives fresh samples of the last length, as
    many rows as training has there, and recall gives fresh examples.

    Raises:
      UserError: the tokenizer or the source is not usable, or the validation split is empty.
    """
    tokenizer = tokenizer_of(data)
    if isinstance(data, PasskeyData):
        _check_lengths(data, tokenizer)
        rows = range(data.rows_at(sum(data.stage_steps), batch_size, divisor))
        return [_passkey_rows(data, tokenizer, len(data.lengths) - 1, rows, len(rows), (VALIDATION, seed, i)) for i in range(count)]
    if isinstance(data, RecallData):
        return [data.batch(range(batch_size), (VALIDATION, seed, i)) for i in range(count)]
    packed = _packed(data, tokenizer, "validation", seed)
    padding = {name: np.zeros_like(value) for name, value in packed[0].items()}
    count = min(count, -(-len(packed) // batch_size))
    finish = as_one_document if getattr(data, "one_document", False) else lambda row: row
    return [
        _stack(finish(packed[row]) if row < len(packed) else padding for row in range(i * batch_size, (i + 1) * batch_size))
        for i in range(count)
    ]


def _packed(
    data: CorpusData | InstructionData | BookData | ImageData, tokenizer: Tokenizer | None, split: Split, seed: int | None
) -> PackedRows | WholeRows | Images:
    """The rows of one split, with its documents or images in the order of `seed`."""
    if isinstance(data, ImageData):
        images = load_images(data, split)
        order = np.random.default_rng(seed).permutation(len(images))
        return dataclasses.replace(images, pixels=images.pixels[order], labels=images.labels[order])
    if isinstance(data, InstructionData | BookData):
        load = load_books if isinstance(data, BookData) else load_conversations
        return WholeRows(load(data, tokenizer, split), data.length, seed)
    corpus = load_corpus(data.source, tokenizer, split, data.validation_fraction)
    if data.reference and split == "train":
        corpus = dataclasses.replace(corpus, scores=load_scores(Path(data.reference), corpus, tokenizer))
    return PackedRows(corpus, data.length, seed)


def _check_lengths(data: PasskeyData, tokenizer: Tokenizer) -> None:
    """Fails before the first step rather than at the stage whose length is too small."""
    name, length = ("shortest", min(data.shortest)) if data.shortest else ("lengths", min(data.lengths) + 1)
    try:
        passkey_sample(tokenizer, length, 0.5, np.random.default_rng(0), data.digits)
    except UserError as error:
        raise UserError(f"data.{name} is {getattr(data, name)}, for samples of {length} tokens: {error}") from error


def _passkey_rows(data: PasskeyData, tokenizer: Tokenizer, stage: int, rows: range, count: int, key: tuple[int, ...]) -> Batch:
    """Rows of passkey samples out of `count`, each a function of (stage, key, row) alone."""
    length = data.lengths[stage]
    shortest = data.shortest[stage] if data.shortest else length + 1

    def one(row: int) -> Batch:
        rng = np.random.default_rng((*key, row))
        tokens_S, segment_S = np.zeros((2, length + 1), np.int32)
        answers_S = np.zeros(length + 1, bool)
        end = 0
        for segment, size in enumerate(_sample_sizes(shortest, length + 1, rng), start=1):
            depth = float(np.clip(data.depths[0] + (data.depths[1] - data.depths[0]) * rng.random(), 0, 1))
            place = slice(end, end := end + size)
            tokens_S[place], answer_start = passkey_sample(tokenizer, size, depth, rng, data.digits)
            segment_S[place] = 1 if row < data.one_document * count else segment
            answers_S[place.start + answer_start : end] = True
        loss_mask_T = (segment_S[1:] == segment_S[:-1]) & (segment_S[1:] > 0)
        return {
            "tokens": tokens_S,
            "segment_ids": segment_S,
            "loss_mask": loss_mask_T.astype(np.float32),
            "answer_mask": answers_S[1:].astype(np.float32),
        }

    return _stack(one(row) for row in rows)


def _sample_sizes(shortest: int, room: int, rng: np.random.Generator) -> list[int]:
    """How many tokens each sample of a row takes, in an order without system."""
    if shortest == room:
        return [room]
    sizes = []
    while room >= shortest:
        sizes.append(int(rng.integers(shortest, room + 1)))
        room -= sizes[-1]
    return rng.permutation(sizes).tolist()


def _stack(rows: Iterable[Batch]) -> Batch:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
