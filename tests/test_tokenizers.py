"""Tokenizers: round trips, start tokens, fingerprints and the errors of a wrong name."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from infinicontext.data.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer, word_tokenizer
from infinicontext.errors import UserError


def whitespace_tokenizer(*words: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return library


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.start_id, *ids]) == text


def test_bytes_are_total():
    """Neither cut characters nor lone surrogates raise."""
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(list("é!".encode()[1:])) == "\ufffd!"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_words_round_trip():
    text = "The key is 90412. Remember: the key!"
    tokenizer = word_tokenizer([text])
    assert tokenizer.decode(tokenizer.encode("the KEY is 271!\n")) == "the key is 271!"
    assert tokenizer.encode("271").tolist() == [2 + 2, 2 + 7, 2 + 1]
    assert tokenizer.encode("zebra").tolist() == [0]
    assert tokenizer.start_id == 1
    assert tokenizer.vocab_size == 2 + 10 + len({"the", "key", "is", ".", "remember", ":", "!"})


def test_words_do_not_depend_on_the_order_of_texts():
    one, other = word_tokenizer(["b a c", "d"]), word_tokenizer(["d c", "a b"])
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != word_tokenizer(["a b c"]).fingerprint()


def test_json_file_is_used_without_its_truncation_padding_and_special_tokens(tmp_path):
    library = whitespace_tokenizer("<unk>", "<bos>", "a", "b")
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.name == str(name)
        assert tokenizer.start_id == 1
        assert tokenizer.vocab_size == 4
        assert tokenizer.encode("a b a b").tolist() == [2, 3, 2, 3]
        assert [ids.tolist() for ids in tokenizer.encode_batch(["a b a", "b"])] == [[2, 3, 2], [3]]
    assert library.truncation["max_length"] == 2, "the caller's tokenizer is copied, not changed"


def test_vocabulary_with_gaps_holds_every_id():
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 7}, unk_token="<unk>"))
    tokenizer = JsonTokenizer(library)
    assert tokenizer.vocab_size == 8
    assert tokenizer.start_id is None


def test_the_token_that_ends_a_text():
    end = lambda *words: JsonTokenizer(whitespace_tokenizer("<unk>", *words)).end_id
    assert end("<s>", "</s>") == 2
    assert end("<|begin_of_text|>", "<|end_of_text|>") == 2
    assert end("<|endoftext|>") == 1
    assert end("<s>") == 1
    assert end("a") is None
    assert ByteTokenizer().end_id == 256


def test_passkey_tokenizer_knows_its_task():
    tokenizer = load_tokenizer("passkey")
    assert (
        tokenizer.decode(tokenizer.encode("What is the pass key? The pass key is 12345.")) == "what is the pass key? the pass key is 12345."
    )
    assert load_tokenizer("passkey").fingerprint() == tokenizer.fingerprint()
    assert tokenizer.vocab_size < 80


@pytest.mark.parametrize("content", ["not json", json.dumps({"model": 3}), "{}"])
def test_broken_file_is_a_user_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.tokenizer .*cannot be read as a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["byte", "", "missing/tokenizer.json"])
def test_unknown_name_says_what_is_allowed(name):
    with pytest.raises(UserError, match=f'data.tokenizer is "{name}"; it must be "bytes", "passkey", or the path'):
        load_tokenizer(name)
