"""From text to token ids and back: bytes, any tokenizer.json, and word-level vocabularies for synthetic tasks.

Shape letters: N tokens of one text.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from infinicontext.errors import UserError

START_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
      name: as given by the user, for messages and reports.
      vocab_size: every id is below it.
      start_id: id written before each document; None where the vocabulary has no such token.
      end_id: id that ends a text; where the vocabulary has none, the start of the next text ends this one.
      stop_ids: ids any of which ends an answer.
    """

    name: str
    vocab_size: int
    start_id: int | None
    end_id: int | None
    stop_ids: frozenset[int]

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids [N]; nothing is added before or after."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, faster where the tokenizer can work in parallel."""
        ...

    def decode(self, ids_N: Sequence[int] | np.ndarray) -> str:
        """Ids -> text without special tokens."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that defines the tokenizer: equal fingerprints encode alike."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 starts a document."""

    name = "bytes"
    vocab_size = 257
    start_id = end_id = 256
    stop_ids = frozenset({256})

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids [N], one per byte. Lone surrogates, which UTF-8 cannot hold, become "?"."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids_N: Sequence[int] | np.ndarray) -> str:
        """Ids -> text; ids above 255 are left out and bytes that are not UTF-8 become U+FFFD."""
        ids_N = np.asarray(ids_N, np.int64)
        return ids_N[ids_N < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """SHA-256 of the definition above."""
        return hashlib.sha256(b"UTF-8 bytes, 256 starts a document").hexdigest()


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library.

    Encoding adds no special tokens, never truncates and never pads, whatever the file asks for. As in that library, a special
    token spelled out in a text becomes that token, so that chat templates can be written as text.
    """

    def __init__(self, source: str | Path | LibraryTokenizer, name: str | None = None):
        """Reads a tokenizer.json, or copies a tokenizer of the library.

        Raises:
          UserError: the file cannot be read or is not a tokenizer.
        """
        self.name = name or ("tokenizer" if isinstance(source, LibraryTokenizer) else str(source))
        try:
            definition = source.to_str() if isinstance(source, LibraryTokenizer) else Path(source).read_text("utf-8")
            self.library = LibraryTokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f'data.tokenizer is "{self.name}", which cannot be read as a tokenizer.json: {error}') from error
        self.library.no_truncation()
        self.library.no_padding()
        self.vocab_size = max(self.library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        first = lambda tokens: next((token_id for token in tokens if (token_id := self.library.token_to_id(token)) is not None), None)
        self.start_id: int | None = first(START_TOKENS)
        self.end_id: int | None = first(END_TOKENS + START_TOKENS)
        self.stop_ids = frozenset({self.start_id, self.end_id} - {None})

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids [N]."""
        return np.array(self.library.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids_N: Sequence[int] | np.ndarray) -> str:
        """Ids -> text, special tokens left out."""
        return self.library.decode([int(token_id) for token_id in ids_N], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON form."""
        return hashlib.sha256(json.dumps(json.loads(self.library.to_str()), sort_keys=True).encode()).hexdigest()


def speaking(tokenizer: Tokenizer, start_id: int | None, stop_ids: Iterable[int]) -> Tokenizer:
    """The same tokenizer with another start, and with more ids that end an answer."""
    found = copy.copy(tokenizer)
    found.start_id, found.stop_ids = start_id, tokenizer.stop_ids | set(stop_ids)
    return found


def word_tokenizer(texts: Iterable[str], name: str = "words") -> JsonTokenizer:
    """A word-level tokenizer over the words of `texts`, for synthetic tasks: a small vocabulary makes small models learn fast.

    Text is lower-cased; words, punctuation marks and single digits are tokens. Ids: 0 unknown, 1 start of document, 2 to 11 the
    digits, then the words in sorted order. Decoding gives single spaces and joins neighbouring digits to one number.
    """
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    first = ["<unk>", "<s>", *"0123456789"]
    vocabulary = [*first, *sorted(words - set(first))]
    library = LibraryTokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    library.normalizer = normalizer
    library.pre_tokenizer = splitter
    # The WordPiece decoder writes spaces between words but not before punctuation.
    library.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")]
    )
    library.add_special_tokens(["<s>"])
    return JsonTokenizer(library, name)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer a config names: "bytes", "passkey", or the path of a tokenizer.json or of a folder that holds one.

    Raises:
      UserError: nothing of that name, or the file is not a tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "passkey":
        from infinicontext.data.passkey import TEXTS  # here, because that file imports this one

        return word_tokenizer(TEXTS, name)
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        allowed = '"bytes", "passkey", or the path of a tokenizer.json or of a folder that holds one'
        raise UserError(f'data.tokenizer is "{name}"; it must be {allowed}')
    return JsonTokenizer(path, name)
