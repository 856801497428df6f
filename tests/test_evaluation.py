"""Perplexity and passkey evaluation: streams against single calls, counts against brute force, and models whose score is known."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models
from infinicontext.data.corpora import Corpus, load_corpus
from infinicontext.data.passkey import FILLER, INSTRUCTION, KEY_LINE, QUESTION, passkey_sample
from infinicontext.data.tokenizers import ByteTokenizer, load_tokenizer
from infinicontext.evaluation import passkey as passkey_module
from infinicontext.evaluation.passkey import PasskeyEvaluation, answer_greedily, evaluate_passkey
from infinicontext.evaluation.perplexity import PerplexityEvaluation, bits_per_byte, evaluate_perplexity, ngram_losses, stream_losses
from infinicontext.models import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig

VOCAB = 17


@functools.cache
def tiny(kind: str, vocab_size: int = VOCAB):
    options = {"full": {}, "window": {"attention": "window", "window": 5}, "last_token": {"attention": "window", "window": 1}}
    config = TransformerConfig(vocab_size=vocab_size, dim=16, layers=1, heads=2, feed_forward=16, remat=False, **options[kind])
    return models.build(config, nnx.Rngs(0))


def corpus_of(documents: list[list[int]]) -> Corpus:
    starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.array([token for document in documents for token in document], np.uint16)
    return Corpus(tokens, starts, tuple(f"{i}" for i in range(len(documents))), np.diff(starts))


def random_corpus(sizes: tuple[int, ...]) -> Corpus:
    rng = np.random.default_rng(1)
    return corpus_of([rng.integers(0, VOCAB, size).tolist() for size in sizes])


CORPUS = random_corpus((20, 41, 8, 41, 60))


def direct_losses(model, tokens_BS: np.ndarray) -> np.ndarray:
    """Losses from one call and the definition of the loss."""
    logits_BLV = jax.jit(lambda tokens_BL: model(tokens_BL, model.init_state(*tokens_BL.shape))[0])(tokens_BS[:, :-1])
    chances_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
    return -np.take_along_axis(chances_BLV, tokens_BS[:, 1:, None].astype(np.int64), axis=-1)[..., 0]


# Perplexity.


@pytest.mark.parametrize(("kind", "segment"), [("full", 1), ("full", 7), ("full", 64), ("window", 1), ("window", 7), ("window", 40)])
def test_stream_losses_equal_one_call(kind, segment):
    tokens_BS = np.stack([CORPUS.document(1), CORPUS.document(3)])
    losses_BL = jax.jit(stream_losses, static_argnames="segment")(tiny(kind), tokens_BS, segment=segment)
    np.testing.assert_allclose(losses_BL, direct_losses(tiny(kind), tokens_BS), atol=1e-5)


@functools.cache
def evaluated(kind: str, lengths=(10, 25, 40), limit=1000, documents=8) -> dict:
    config = PerplexityEvaluation(documents=documents, scored=10)
    return evaluate_perplexity(tiny(kind), CORPUS, config, list(lengths), limit=limit, segment=8)


def test_every_length_scores_the_same_tokens():
    """The last `scored` tokens of the first 41 of documents 1, 3 and 4, whatever stands before them."""
    tokens_BS = np.stack([CORPUS.document(i)[:41] for i in (1, 3, 4)])
    for row in evaluated("full")["by_length"]:
        nll_B = direct_losses(tiny("full"), tokens_BS[:, 40 - row["length"] :])[:, -10:].mean(axis=1)
        assert row["nll"] == pytest.approx(nll_B.mean(), abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert (row["tokens"], row["documents"]) == (30, 3)
        spread = 1.96 * nll_B.std(ddof=1) / math.sqrt(3)
        assert row["interval"] == pytest.approx([nll_B.mean() - spread, nll_B.mean() + spread], abs=1e-5)


def test_every_context_begins_as_documents_do():
    """With the start token, which is one of the L tokens."""
    config = PerplexityEvaluation(scored=10)
    found = evaluate_perplexity(tiny("full"), CORPUS, config, [10, 25, 40], limit=40, segment=8, start_id=VOCAB - 1)
    tokens_BS = np.stack([CORPUS.document(i)[:41] for i in (1, 3, 4)])
    for row in found["by_length"]:
        part_BS = tokens_BS[:, 40 - row["length"] :].copy()
        part_BS[:, 0] = VOCAB - 1
        assert row["nll"] == pytest.approx(direct_losses(tiny("full"), part_BS)[:, -10:].mean(), abs=1e-5)


def test_positions_are_those_of_the_document_for_a_model_that_reads_less():
    losses_BL = direct_losses(tiny("full"), np.stack([CORPUS.document(i)[:11] for i in (1, 3, 4)]))
    buckets = evaluated("full", limit=10)["by_position"]
    assert buckets[-1]["to"] == 11
    assert buckets[2]["nll"] == pytest.approx(losses_BL[:, 3:7].mean(), abs=1e-5)


def test_context_changes_nothing_for_a_model_that_sees_one_token():
    short, long = evaluated("last_token", lengths=(10, 40))["by_length"]
    assert short["nll"] == pytest.approx(long["nll"], abs=1e-5)


def test_positions_add_up_to_the_mean():
    buckets = evaluated("full")["by_position"]
    assert [(bucket["from"], bucket["to"]) for bucket in buckets] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 41)]
    assert [bucket["tokens"] for bucket in buckets] == [3 * (bucket["to"] - bucket["from"]) for bucket in buckets]
    losses_BL = direct_losses(tiny("full"), np.stack([CORPUS.document(i)[:41] for i in (1, 3, 4)]))
    assert sum(bucket["nll"] * bucket["tokens"] for bucket in buckets) / losses_BL.size == pytest.approx(losses_BL.mean(), abs=1e-5)
    assert buckets[2]["nll"] == pytest.approx(losses_BL[:, 3:7].mean(), abs=1e-5)


def test_documents_do_not_depend_on_what_the_model_can_read():
    short, long = evaluated("full", limit=10), evaluated("full")
    assert [row["length"] for row in short["by_length"]] == [10]
    assert [row["length"] for row in short["skipped"]] == [25, 40]
    assert "evaluation.capacity is 10" in short["skipped"][0]["reason"]
    assert short["by_length"][0]["nll"] == long["by_length"][0]["nll"]
    assert evaluated("full", lengths=(10,))["by_length"][0]["documents"] == 4


def test_a_length_that_no_document_has_changes_nothing_for_the_others():
    assert evaluated("full", lengths=(10, 25, 40, 10**6))["by_length"][0]["nll"] == evaluated("full")["by_length"][0]["nll"]


def test_no_more_documents_than_asked_for():
    (row,) = evaluated("full", lengths=(10,), documents=1)["by_length"]
    assert (row["documents"], row["interval"]) == (1, None)


def test_lengths_that_cannot_be_scored_are_skipped_with_the_reason():
    result = evaluated("full", lengths=(9, 10, 60, 1000))
    assert [row["length"] for row in result["by_length"]] == [10]
    assert {row["length"]: row["reason"] for row in result["skipped"]} == {
        9: "shorter than the 10 tokens that are scored",
        60: "the longest validation document has 60 tokens",
        1000: "the longest validation document has 60 tokens",
    }


def test_norm_refresh_is_scored_and_said():
    config = MegalodonConfig(dim=8, layers=1, z_dim=4, feed_forward=8, cema_order=2, chunk=4, norm_groups=2)
    model = models.build(config, nnx.Rngs(0))
    evaluated = lambda **how: evaluate_perplexity(
        model, CORPUS, PerplexityEvaluation(documents=2, scored=10), [40], limit=40, segment=8, **how
    )
    plain, refreshed = evaluated(), evaluated(norm_refresh=(2, 1, 1))
    assert abs(plain["by_length"][0]["nll"] - refreshed["by_length"][0]["nll"]) > 1e-6
    assert "(2, 1, 1)" in refreshed["protocol"]
    assert "refreshed" not in plain["protocol"]


# Baselines.


token_lists = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6)


@given(documents=token_lists.filter(any), row=st.lists(st.integers(0, 3), min_size=2, max_size=12))
@settings(deadline=None, max_examples=100)
def test_ngram_losses_are_those_of_counting(documents, row):
    """Also with empty documents, with one document, and with documents of one token, which hold no pair."""
    batch = {"tokens": np.array([row]), "loss_mask": np.array([[1.0] * (len(row) - 1)])}
    batch["loss_mask"][0, 1:2] = 0
    single = Counter(token for document in documents for token in document)
    pairs = Counter(pair for document in documents for pair in itertools.pairwise(document))
    context = Counter(a for document in documents for a in document[:-1])
    unigram = lambda b: (single[b] + 1) / (single.total() + 4)
    bigram = lambda a, b: (pairs[a, b] + unigram(b)) / (context[a] + 1)
    targets = [pair for i, pair in enumerate(itertools.pairwise(row)) if i != 1]
    assert ngram_losses(corpus_of(documents), 4, [batch]) == {
        "unigram": pytest.approx(-np.mean([math.log(unigram(b)) for _, b in targets])),
        "bigram": pytest.approx(-np.mean([math.log(bigram(a, b)) for a, b in targets])),
    }


@pytest.mark.parametrize("text", ["plain text, longer than a row", "Grüße, 世界! Each sign of several bytes may lie across two rows."])
def test_bits_per_byte_of_a_byte_model(text, tmp_path):
    """Every target is one byte (a start token is no target), so a loss of ln 2 per token is one bit per byte."""
    assert bits_per_byte(3 * math.log(2), *corpus_with(text, ByteTokenizer(), tmp_path)) == pytest.approx(3)


def test_bits_per_byte_of_a_word_model(tmp_path):
    """Two words of 3 and 6 bytes with a space between: 2 tokens in 10 bytes."""
    assert bits_per_byte(math.log(2), *corpus_with("the hidden", load_tokenizer("passkey"), tmp_path)) == pytest.approx(2 / 10)


def corpus_with(text: str, tokenizer, folder) -> tuple[Corpus, int]:
    (folder / "text.txt").write_text(text)
    return load_corpus(str(folder / "text.txt"), tokenizer, "train", 1e-9), tokenizer.start_id


# Passkey. B rows, T tokens of a call, W tokens the oracle sees.


class Ring(NamedTuple):
    """The last W tokens."""

    tokens_BW: jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Oracle:
    """A model without parameters that looks the key up in the last W tokens and gives token 0 where it does not see it whole."""

    tokenizer_name: str
    window: int
    digits: int

    def init_state(self, batch_size: int, capacity: int | None = None) -> Ring:
        return Ring(jnp.zeros((batch_size, self.window), jnp.int32))

    def room(self, state: Ring) -> None:
        return None

    def hidden(self, tokens_BT, state, segment_ids_BT=None):
        """The next token as the one channel."""
        tokenizer = load_tokenizer(self.tokenizer_name)
        W, D, T = self.window, self.digits, tokens_BT.shape[1]
        marker = tokenizer.encode(KEY_LINE.partition("{key}")[0])
        zero = int(tokenizer.encode("0")[0])
        seen_BS = jnp.concatenate([state.tokens_BW, tokens_BT], axis=1)
        digit_BS = (seen_BS >= zero) & (seen_BS < zero + 10)

        size = len(marker) + D  # the marker and the whole key
        starts = W + T - size + 1
        found_BS = jnp.ones((seen_BS.shape[0], starts), bool)
        for i in range(size):
            here_BS = seen_BS[:, i : i + starts]
            found_BS &= here_BS == int(marker[i]) if i < len(marker) else digit_BS[:, i : i + starts]
        # After token t of the call, tokens t + 1 to t + W of seen_BS are visible.
        time_T, start_S = jnp.arange(T), jnp.arange(starts)
        visible_TS = (start_S[None] > time_T[:, None]) & (start_S[None] + size <= time_T[:, None] + W + 1)
        found_BTS = found_BS[:, None] & visible_TS[None]
        start_BT = jnp.argmax(found_BTS, axis=-1)

        said_BT, running_BT = jnp.zeros_like(tokens_BT), jnp.ones(tokens_BT.shape, bool)
        for i in range(D - 1):
            running_BT &= digit_BS[:, W - i : W - i + T]
            said_BT += running_BT.astype(jnp.int32)
        next_BT = jnp.take_along_axis(seen_BS, start_BT + len(marker) + said_BT, axis=1)
        return jnp.where(found_BTS.any(axis=-1), next_BT, 0)[..., None], Ring(seen_BS[:, T:])

    def logits(self, hidden_BTD):
        return jax.nn.one_hot(hidden_BTD[..., 0], load_tokenizer(self.tokenizer_name).vocab_size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant(Oracle):
    """Always says the digit 7."""

    def hidden(self, tokens_BT, state, segment_ids_BT=None):
        seven = int(load_tokenizer(self.tokenizer_name).encode("7")[0])
        return jnp.full((*tokens_BT.shape, 1), seven, jnp.int32), state


DEPTHS = (0.0, 0.3, 0.5, 1.0)
LENGTHS = {"passkey": (130, 270), "bytes": (600, 1000)}
DIGITS = 5


def passkey(model, name: str, lengths=None, *, samples=3, batch_size=6, segment=64) -> dict:
    config = PasskeyEvaluation(depths=DEPTHS, samples=samples, batch_size=batch_size, digits=DIGITS)
    return evaluate_passkey(model, load_tokenizer(name), config, list(lengths or LENGTHS[name]), segment=segment, seed=3)


def reach(name: str, length: int, depth: float) -> int:
    """How many tokens back the key line begins when the key's last token is decoded, after `length` tokens were read."""
    count = lambda text: len(load_tokenizer(name).encode(text))
    after_key = count(QUESTION) + count(f" {'8' * DIGITS}")
    fixed = 1 + count(INSTRUCTION) + count(KEY_LINE.format(key="8" * DIGITS)) + after_key
    units = (length + 1 - fixed) // count(FILLER)
    return count(KEY_LINE.format(key="8" * DIGITS)) + (units - round(depth * units)) * count(FILLER) + after_key - 1


def cells(result: dict, key: str = "exact") -> dict[tuple[int, float], float]:
    return {(cell["length"], cell["depth"]): cell[key] for cell in result["cells"]}


@pytest.mark.parametrize("name", LENGTHS)
def test_an_oracle_that_sees_everything_scores_1(name):
    result = passkey(Oracle(name, max(LENGTHS[name]), DIGITS), name)
    assert cells(result) == {(length, depth): 1.0 for length in LENGTHS[name] for depth in DEPTHS}
    assert [(row["length"], row["exact"], row["digits"], row["samples"]) for row in result["by_length"]] == [
        (length, 1.0, 1.0, 3 * len(DEPTHS)) for length in LENGTHS[name]
    ]
    assert result["skipped"] == []


@pytest.mark.parametrize("name", LENGTHS)
def test_an_oracle_of_w_tokens_scores_1_exactly_where_the_key_lies_inside_w(name):
    """At the very token: with the reach of the middle depth as W it is found there, with one token less it is not."""
    length = LENGTHS[name][1]
    window = reach(name, length, 0.5)
    assert reach(name, length, 0.3) > window > reach(name, length, 1.0), "else this would test nothing"
    for size, found in ((window, {0.5, 1.0}), (window - 1, {1.0})):
        result = passkey(Oracle(name, size, DIGITS), name, [length])
        assert {depth for (_, depth), exact in cells(result).items() if exact == 1} == found
        assert {depth for (_, depth), exact in cells(result).items() if exact == 0} == set(DEPTHS) - found
    assert cells(result, "digits")[length, 0.5] == pytest.approx((DIGITS - 1) / DIGITS), "only the last digit is out of reach"


def test_a_constant_model_scores_0():
    result = passkey(Constant("passkey", 1, DIGITS), "passkey", samples=10)
    assert set(cells(result).values()) == {0.0}
    # A tenth of the digits are sevens, and no key begins with another.
    assert 0.05 < result["by_length"][0]["digits"] < 0.2


def test_logits_that_are_no_numbers_are_no_score():
    @jax.tree_util.register_static
    class Broken(Constant):
        def logits(self, hidden_BTD):
            return super().logits(hidden_BTD) * jnp.nan

    result = passkey(Broken("passkey", 1, DIGITS), "passkey", [130])
    assert (result["cells"], result["by_length"]) == ([], [])
    assert "not finite" in result["skipped"][0]["reason"]


def test_the_batch_size_changes_nothing():
    """Twelve samples one by one, in batches of 7 of which the last is filled up, and in one batch; by a model that is right by chance."""
    model = Constant("passkey", 1, DIGITS)
    results = [passkey(model, "passkey", [130], batch_size=size) for size in (1, 7, 12)]
    assert len(set(cells(results[0], "digits").values())) > 1, "else this would test nothing"
    for result in results:
        assert result["cells"] == results[0]["cells"]


def test_an_evaluation_that_was_killed_asks_for_what_is_missing(tmp_path, monkeypatch):
    """And of another model for everything."""
    config = PasskeyEvaluation(depths=DEPTHS, samples=3, batch_size=4, digits=DIGITS, predictions=True)
    tokenizer, model, file = load_tokenizer("passkey"), Constant("passkey", 1, DIGITS), tmp_path / "answers.jsonl"
    evaluated = lambda **how: evaluate_passkey(model, tokenizer, config, [130], segment=64, seed=3, file=file, **how)
    whole = evaluated(about={"parameters": "a"})
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 12 == 1 + len(whole["predictions"])
    assert whole["by_length"][0]["chance"] == 1 / 90_000
    assert whole["predictions"][0] | {"answer": "77777"} == whole["predictions"][0]
    file.write_text("\n".join([*lines[:9], lines[9][:30]]))
    asked = []
    monkeypatch.setattr(passkey_module, "answer_greedily", lambda *given, **how: asked.append(1) or answer_greedily(*given, **how))
    again = evaluated(about={"parameters": "a"})
    assert (again["cells"], again["predictions"]) == (whole["cells"], whole["predictions"])
    assert len(file.read_text().splitlines()) == 1 + 12 + 1
    assert len(asked) == 1
    assert "seconds" not in evaluated(about={"parameters": "a"})["by_length"][0]
    evaluated(about={"parameters": "b"})
    assert len(file.read_text().splitlines()) == 2 * (1 + 12) + 1


def test_keys_that_are_read():
    """Teacher-forced, each token counts by itself after the right ones; a row is asked as it stands alone."""
    tokenizer = load_tokenizer("passkey")
    model = tiny("full", tokenizer.vocab_size)
    config = PasskeyEvaluation(depths=(0.5,), samples=5, batch_size=4, digits=DIGITS, mode="teacher_forced", predictions=True)
    found = evaluate_passkey(model, tokenizer, config, [130], segment=64, seed=3)
    assert found["mode"] == "teacher_forced"
    for i, prediction in enumerate(found["predictions"]):
        row, start = passkey_sample(tokenizer, 131, 0.5, np.random.default_rng((3, 130, 0, i)), DIGITS)
        logits_1TV, _ = model(row[None, :-1], model.init_state(1, capacity=130))
        said_A = np.argmax(logits_1TV[0, start - 1 :], axis=-1)
        assert prediction["answer"] == tokenizer.decode(said_A)
        assert prediction["digits"] == np.mean(said_A == row[start:])
    oracle = Oracle("passkey", 500, DIGITS)
    assert evaluate_passkey(oracle, tokenizer, config, [130], segment=64, seed=3)["by_length"][0]["exact"] == 1


def test_the_segment_changes_nothing():
    length = LENGTHS["passkey"][1]
    model = Oracle("passkey", reach("passkey", length, 0.5), DIGITS)
    assert passkey(model, "passkey", [length], segment=1)["cells"] == passkey(model, "passkey", [length], segment=500)["cells"]


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_too_short_for_a_key_are_skipped(name):
    result = passkey(Constant(name, 1, DIGITS), name, (20, LENGTHS[name][0]))
    assert [row["length"] for row in result["by_length"]] == [LENGTHS[name][0]]
    (skipped,) = result["skipped"]
    assert skipped["length"] == 20
    assert "at least" in skipped["reason"]


def test_intervals_are_wilsons():
    """Of the share z-distant from the truth under the truth's own deviation: the two roots of a quadratic."""
    length = LENGTHS["passkey"][1]
    result = passkey(Oracle("passkey", reach("passkey", length, 0.5), DIGITS), "passkey", [length])
    z = 1.959964
    for row in [*result["cells"], *result["by_length"]]:
        p, n, (low, high) = row["exact"], row["samples"], row["interval"]
        assert 0 <= low <= p <= high <= 1
        assert low < high
        roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
        assert [low, high] == pytest.approx(sorted(roots), abs=1e-5)
    assert {row["exact"] for row in result["cells"]} | {result["by_length"][0]["exact"]} == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("kind", "prompt_length", "answer_length"), [("full", 11, 9), ("full", 8, 1), ("window", 11, 9), ("window", 1, 6)])
def test_greedy_answers_equal_reading_everything_again(kind, prompt_length, answer_length):
    model = tiny(kind)
    prompt_BP = np.random.default_rng(prompt_length).integers(0, VOCAB, (3, prompt_length), dtype=np.int32)
    answer_BA = jax.jit(answer_greedily, static_argnums=2, static_argnames="segment")(model, prompt_BP, answer_length, segment=4)

    logits = jax.jit(lambda tokens_BT: model(tokens_BT, model.init_state(*tokens_BT.shape))[0])
    tokens_BT = np.zeros((3, prompt_length + answer_length), np.int32)
    tokens_BT[:, :prompt_length] = prompt_BP
    for t in range(prompt_length, tokens_BT.shape[1]):
        # What stands after t - 1 is not seen, so that one shape serves all steps.
        tokens_BT[:, t] = np.argmax(logits(tokens_BT)[:, t - 1], axis=-1)
    np.testing.assert_array_equal(answer_BA, tokens_BT[:, prompt_length:])
    assert answer_BA.dtype == jnp.int32
