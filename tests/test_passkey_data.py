"""Passkey samples: exact lengths, exact depths and answers, for byte, word and subword tokenizers."""

import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext.data.passkey import FILLER, INSTRUCTION, QUESTION, TEXTS, passkey_sample
from infinicontext.data.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer
from infinicontext.errors import UserError


def subword_tokenizer() -> JsonTokenizer:
    """A small byte-level BPE without a start token, in which keys take a varying number of tokens."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([*TEXTS, *(f" {number}" for number in range(10_000, 99_999, 977))], trainer)
    return JsonTokenizer(library, "subwords")


TOKENIZERS = {"bytes": ByteTokenizer(), "passkey": load_tokenizer("passkey"), "subwords": subword_tokenizer()}


def places(tokens: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Where `pattern` begins in `tokens`."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == pattern).all(axis=1))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(extra=st.integers(0, 2000), depth=st.floats(0, 1), digits=st.integers(1, 18), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_length_depth_and_answer(name, extra, depth, digits, seed):
    tokenizer = TOKENIZERS[name]
    length = 450 + extra
    tokens, answer_start = passkey_sample(tokenizer, length, depth, np.random.default_rng(seed), digits)
    assert tokens.shape == (length,)
    assert tokens.dtype == np.int32

    key = str(np.random.default_rng(seed).integers(10 ** (digits - 1), 10**digits))
    assert len(key) == digits
    assert tokenizer.decode(tokens[answer_start:]).strip() == key

    unit = tokenizer.encode(FILLER)
    key_place = places(tokens, tokenizer.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key."))
    assert len(key_place) == 1
    unit_places = places(tokens, unit)
    units = len(unit_places)
    assert (unit_places < key_place[0]).sum() == round(depth * units)
    rest = length - units * len(unit)
    assert passkey_sample(tokenizer, rest, depth, np.random.default_rng(seed), digits)[0].shape == (rest,)
    assert (places(passkey_sample(tokenizer, rest, 0, np.random.default_rng(seed), digits)[0], unit)).size == 0


@pytest.mark.parametrize("name", ["bytes", "subwords"])
def test_text_reads_naturally(name):
    tokenizer = TOKENIZERS[name]
    tokens, answer_start = passkey_sample(tokenizer, 700, 0.5, np.random.default_rng(0))
    text = tokenizer.decode(tokens)
    shape = re.escape(INSTRUCTION) + rf"(?P<tail>.*?)({re.escape(FILLER)})+\nThe pass key is (\d{{5}})\. Remember it\. \3 is the pass key\."
    shape += rf"({re.escape(FILLER)})+{re.escape(QUESTION)} \3"
    found = re.fullmatch(shape, text)
    assert found
    assert FILLER.endswith(found["tail"])
    assert tokenizer.decode(tokens[:answer_start]).rstrip().endswith("The pass key is")


def test_the_space_before_a_key_is_not_part_of_the_answer():
    """Else a byte model would earn a sixth of its score with it."""
    tokens, answer_start = passkey_sample(ByteTokenizer(), 700, 0.5, np.random.default_rng(0))
    assert len(tokens) - answer_start == 5
    assert bytes(tokens[answer_start:].tolist()).isdigit()


def test_subword_keys_have_varying_numbers_of_tokens():
    """The premise of the tests above."""
    sizes = set()
    for seed in range(30):
        tokens, answer_start = passkey_sample(TOKENIZERS["subwords"], 500, 0, np.random.default_rng(seed))
        sizes.add(len(tokens) - answer_start)
    assert len(sizes) > 1


@pytest.mark.parametrize("name", ["bytes", "passkey"])
def test_too_short_says_the_least_length(name):
    with pytest.raises(UserError) as caught:
        passkey_sample(TOKENIZERS[name], 10, 0.5, np.random.default_rng(0))
    least = int(re.search(r"at least (\d+) tokens, not 10", str(caught.value))[1])
    tokens, _ = passkey_sample(TOKENIZERS[name], least, 0.5, np.random.default_rng(1))
    assert len(tokens) == least
    with pytest.raises(UserError, match=f"at least {least} tokens, not {least - 1}"):
        passkey_sample(TOKENIZERS[name], least - 1, 0.5, np.random.default_rng(1))
