"""Books and their summaries: a model reads as much of a book as fits and learns, with a loss on the summary alone, to summarise it.

A .jsonl file has a book per line: {"book": "Chapter one. ...", "summary": "..."}; other fields are ignored. The book and the question that
follows it are written as what a user says, the summary as the answer, in a template of data/instructions.py. The parts are encoded apart.

What is too long is taken from the book: a summary is never cut. Shape letters: K tokens of a book, N books.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np

from infinicontext.data.corpora import Split, json_lines, local_files, split_of
from infinicontext.data.instructions import TEMPLATES, Conversations, TemplateName, pieces, start_and_end, text_field
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError

Part = Literal["start", "spread"]
QUESTION = "What happens in this book?"
EXAMPLES = pathlib.Path(__file__).with_name("books_example.jsonl")
BOOK = "\ufffc"  # stands for the book while a template is filled in
PIECE = 256  # tokens of each piece of a book that is read in pieces


@dataclasses.dataclass(frozen=True)
class BookData:
    """Books with summaries; go with objective.loss "answers".

    Attributes:
      source: a .jsonl file, a folder (all .jsonl files in it and below), a glob, or "examples", ten very short books that need no file.
      tokenizer: see `tokenizers.load_tokenizer`.
      template: see `instructions.InstructionData`.
      length: T, inputs of a row, which holds the part of the book, the question and the summary. A book whose summary leaves no room is
        left out; a line on stderr counts these.
      part: what is read of a book that is too long: its "start", or pieces of 256 tokens "spread" evenly from its first to its last.
      question: asked after the book.
      validation_fraction: share of books kept for validation, decided by the hash of their texts.
    """

    source: str = "examples"
    tokenizer: str = "bytes"
    template: TemplateName = "plain"
    length: int = 4096
    part: Part = "start"
    question: str = QUESTION
    validation_fraction: float = 0.25

    def __post_init__(self):
        for name, allowed in (("template", get_args(TemplateName)), ("part", get_args(Part))):
            if getattr(self, name) not in allowed:
                raise UserError(f'data.{name} is "{getattr(self, name)}"; it must be one of {", ".join(allowed)}')
        if self.length < 1:
            raise UserError(f"data.length is {self.length}; it must be 1 or more")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; it must be above 0 and below 1")


class Book(NamedTuple):
    """A book and its summary."""

    name: str  # file and line
    text: str
    summary: str


class EncodedBook(NamedTuple):
    """The parts of a conversation about a book, int32 ids."""

    before: np.ndarray
    book_K: np.ndarray
    after: np.ndarray  # the question, and what stands before an answer
    answer: np.ndarray  # with the token that ends it

    def prompt(self, length: int, part: Part) -> tuple[np.ndarray, float]:
        """At most `length` tokens to be answered, and the share of the book that is in them.

        Raises:
          UserError: there is no room for one token of the book.
        """
        room = length - len(self.before) - len(self.after)
        if room < 1:
            raise UserError(f"the question alone takes {len(self.before) + len(self.after)} tokens, so no book fits in {length}")
        book = shortened(self.book_K, room, part)
        return np.concatenate([self.before, book, self.after]), len(book) / len(self.book_K)


def shortened(book_K: np.ndarray, room: int, part: Part) -> np.ndarray:
    """At most `room` tokens (1 or more) of a book, in their order."""
    surplus, pieces = len(book_K) - room, -(-room // PIECE)
    if surplus <= 0 or part == "start" or pieces == 1:
        return book_K[:room]
    index = np.arange(room)
    # What is left out is shared out evenly between the pieces.
    return book_K[index + index // PIECE * surplus // (pieces - 1)]


def books(source: str) -> Iterator[Book]:
    """The books of a source, in an order that is always the same.

    Raises:
      UserError: while iterating, if the source is missing, unreadable, malformed or empty.
    """
    path = str(EXAMPLES) if source == "examples" else source
    empty = True
    for file, name in local_files(path, (".jsonl",), '"examples", a .jsonl file, a folder or a glob'):
        for number, record in json_lines(file):
            empty, where = False, f'data.source: "{file}", line {number}'
            if not isinstance(record, dict):
                raise UserError(f"{where} is not a JSON object")
            yield Book(f"{name}:{number}", text_field(record, "book", where), text_field(record, "summary", where))
    if empty:
        raise UserError(f'data.source is "{source}", which holds no book; they are read from the lines of .jsonl files')


def encoded_books(data: BookData, tokenizer: Tokenizer, split: Split) -> Iterator[tuple[Book, EncodedBook]]:
    """The books of one split, one at a time, because a book can be large.

    Raises:
      UserError: the source cannot be read or is malformed, or the tokenizer lacks the template's tokens.
    """
    first, last = start_and_end(data, tokenizer)
    for book in books(data.source):
        if split_of(book.text, data.validation_fraction) == split:
            said = (("user", f"{BOOK}\n\n{data.question}"), ("assistant", book.summary))
            asked, answer, _ = pieces(said, TEMPLATES[data.template])
            before, _, after = asked.partition(BOOK)
            before, text, after, answer = tokenizer.encode_batch([before, book.text, after, answer])
            yield book, EncodedBook(np.concatenate([first, before]).astype(np.int32), text, after, np.append(answer, np.int32(last)))


def load_books(data: BookData, tokenizer: Tokenizer, split: Split) -> Conversations:
    """Reads one split for training, with a line on stderr if summaries are too long for a row.

    Raises:
      UserError: as `encoded_books`, or nothing is left for the split.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    tokens_N, answers_N, found = [], [], 0
    for _, parts in encoded_books(data, tokenizer, split):
        found += 1
        try:
            prompt, _ = parts.prompt(data.length + 1 - len(parts.answer), data.part)
        except UserError:
            continue
        tokens_N.append(np.concatenate([prompt, parts.answer]).astype(dtype))
        answers_N.append(np.arange(len(tokens_N[-1])) >= len(prompt))
    where = f'data.source "{data.source}"'
    if not found:
        raise UserError(
            f"{where} has no book in its {split} split with data.validation_fraction {data.validation_fraction}; give more books or "
            "another fraction"
        )
    if not tokens_N:
        raise UserError(f"{where}: in data.length {data.length} there is room for no summary of its {split} split with a part of its book")
    if found > len(tokens_N):
        print(
            f"warning: {where}: of the {found} books of its {split} split, {found - len(tokens_N)} are left out, because their summaries "
            f"leave no room for the book in data.length {data.length}",
            file=sys.stderr,
        )
    starts = np.cumsum([0, *map(len, tokens_N)], dtype=np.int64)
    return Conversations(np.concatenate(tokens_N), np.concatenate(answers_N), starts)
