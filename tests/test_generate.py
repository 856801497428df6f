"""Generation: the same as reading everything anew, rows alone, bursts and batches of any cut; sampling, stopping, text."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models, sharding
from infinicontext.data.tokenizers import ByteTokenizer, word_tokenizer
from infinicontext.errors import UserError
from infinicontext.inference import generate as module
from infinicontext.inference.generate import Generation, generate, sample, stream
from infinicontext.inference.text import TextStream, follow
from infinicontext.models import TransformerConfig
from infinicontext.nn.rope import RopeConfig

EXAMPLES = {f"{kind.__name__}-{name}": config for kind in models.MODELS for name, config in kind.examples().items()}
# One of each kind, and all of them with the slow tests.
FIRST = {f"{kind.__name__}-{next(iter(kind.examples()))}" for kind in models.MODELS}
SOME = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in EXAMPLES]
TINY = TransformerConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24)


def build(config=TINY, scale=3.0):
    """A random model with decided opinions: its greedy text is no single repeated token."""
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, models.build(config, nnx.Rngs(1)))


def prompts_of(*lengths, vocab=17):
    return [np.random.default_rng(length).integers(0, vocab, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_hundred_tokens_equal_full_recomputation(name, float64):
    """Every registered model: each of 200 greedy tokens is what one pass over all that precedes it says.

    In float64: a recurrence with weights as wild as `build`'s makes another text of a difference of rounding.
    """
    model = build(dataclasses.replace(EXAMPLES[name], dtype="float64"))
    (prompt,) = prompts_of(9, vocab=model.config.vocab_size)
    options = Generation(max_new_tokens=200, segment=4)
    new = generate(model, [prompt], options)[0].tokens
    assert len(new) == 200
    assert len(set(new.tolist())) > 1, "one repeated token would show little"
    whole_1T = np.concatenate([prompt, new])[None]
    logits_TV = jax.jit(lambda tokens_1T: model(tokens_1T, model.init_state(1, capacity=209, planned=209))[0][0])(whole_1T)
    np.testing.assert_array_equal(np.argmax(logits_TV[8:-1], axis=-1), new)


@pytest.mark.parametrize("name", SOME)
def test_unequal_prompts_equal_one_by_one(name):
    """Right-padded in one batch, read in chunks that end before, inside and after each prompt, one of them a single token."""
    model = build(EXAMPLES[name])
    prompts = prompts_of(1, 13, 4, 5, vocab=model.config.vocab_size)
    options = Generation(max_new_tokens=20, segment=4)
    alone = [generate(model, [prompt], options)[0].tokens for prompt in prompts]
    for one, together in zip(alone, generate(model, prompts, options), strict=True):
        np.testing.assert_array_equal(together.tokens, one)


def test_bursts_and_batches_change_nothing_of_what_is_drawn():
    model, prompts = build(), prompts_of(3, 8, 5, 6)
    options = Generation(max_new_tokens=21, temperature=1.5, top_k=9, top_p=0.95, seed=5)
    whole = [row.tokens for row in generate(model, prompts, options)]
    bursts = list(stream(model, prompts, options, burst=4))
    assert [len(burst[0].tokens) for burst in bursts] == [4, 4, 4, 4, 4, 1]
    halves = [
        np.concatenate([part[row].tokens for part in parts])
        for first in (0, 2)
        for parts in [list(stream(model, prompts[first : first + 2], options, first_row=first))]
        for row in range(2)
    ]
    for row, tokens in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([burst[row].tokens for burst in bursts]), tokens)
        np.testing.assert_array_equal(halves[row], tokens)
    again = [row.tokens for row in generate(model, prompts, options)]
    other = [row.tokens for row in generate(model, prompts, dataclasses.replace(options, seed=6))]
    assert all((a == b).all() for a, b in zip(whole, again))
    assert all((a != b).any() for a, b in zip(whole, other))
    same_prompt = [row.tokens for row in generate(model, [prompts[0]] * 2, options)]
    assert (same_prompt[0] != same_prompt[1]).any(), "rows should draw for themselves"


def test_stop_sequences():
    model, prompts = build(), prompts_of(3, 8)
    free = [row.tokens.tolist() for row in generate(model, prompts, Generation(max_new_tokens=30))]
    pairs = [list(itertools.pairwise(tokens)) for tokens in free]
    # The first two tokens in a row, from the seventh on, that row 0 did not have before.
    at = next(i for i in range(6, 29) if pairs[0].index(pairs[0][i]) == i)
    pair = pairs[0][at]
    options = Generation(max_new_tokens=30, stop=(pair, (99,)))
    stopped = generate(model, prompts, options)
    for row, tokens, own in zip(stopped, free, pairs):
        end = own.index(pair) if pair in own else 30
        np.testing.assert_array_equal(row.tokens, tokens[:end])
        assert row.finish == ("stop" if end < 30 else "length")
    assert stopped[0].finish == "stop"
    for burst in (1, 2, 3):  # what may become a stop sequence is held back
        parts = [burst_rows[0].tokens for burst_rows in stream(model, prompts[:1], options, burst=burst)]
        np.testing.assert_array_equal(np.concatenate(parts), stopped[0].tokens)
        assert len(parts) == -(-(at + 2) // burst)
    # The longest of the sequences that end together is cut off.
    both = Generation(max_new_tokens=30, stop=(pair[1:], pair))
    assert len(generate(model, prompts[:1], both)[0].tokens) <= at


def test_a_row_that_has_stopped_leaves_the_others_alone():
    model, prompts = build(), prompts_of(3, 8)
    free = generate(model, prompts, Generation(max_new_tokens=12))
    only_row_0 = next((token,) for token in free[0].tokens[:6].tolist() if token not in free[1].tokens)
    first, second = generate(model, prompts, Generation(max_new_tokens=12, stop=(only_row_0,)))
    assert first.finish == "stop"
    np.testing.assert_array_equal(second.tokens, free[1].tokens)


def test_few_compilations():
    """Prompts of other lengths, up to the next multiple of 64, and other temperatures and seeds run the same programs."""
    model = build(dataclasses.replace(TINY, dim=8, heads=2))
    generate(model, prompts_of(5, 9), Generation(max_new_tokens=10, temperature=1.0))
    before = (module._decode._cache_size(), module._read_chunk._cache_size(), module._empty._cache_size())
    generate(model, prompts_of(40, 2), Generation(max_new_tokens=20, temperature=0.5, seed=3))
    assert before == (module._decode._cache_size(), module._read_chunk._cache_size(), module._empty._cache_size())


def test_a_mesh_gives_the_same():
    model = build(dataclasses.replace(TINY, kv_heads=4))
    prompts, options = prompts_of(3, 8), Generation(max_new_tokens=20)
    expected = generate(model, prompts, options)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))
    with jax.set_mesh(mesh):
        split = jax.device_put(model, sharding.shardings(model, mesh))
        for row, one in zip(generate(split, prompts, options), expected):
            np.testing.assert_array_equal(row.tokens, one.tokens)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0.2, 3.0),
    top_k=st.one_of(st.none(), st.sampled_from([1, 3, 50])),
    top_p=st.sampled_from([None, 1e-6, 0.4, 0.9]),
)
def test_draws_come_from_what_is_allowed(seed, temperature, top_k, top_p):
    logits_V = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    probability_V = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    order = np.argsort(-probability_V)[:top_k]
    if top_p is not None:
        share = probability_V[order] / probability_V[order].sum()
        order = order[np.cumsum(share) - share < top_p]
    keys = jax.random.split(jax.random.key(seed), 400)
    draw = jax.vmap(
        lambda key: sample(key, jnp.asarray(logits_V), jnp.float32(temperature), top_k, None if top_p is None else jnp.float32(top_p))
    )
    drawn = np.asarray(jax.jit(draw)(keys))
    assert set(drawn) <= set(order.tolist())
    expected = probability_V[order] / probability_V[order].sum()
    observed = np.array([(drawn == token).mean() for token in order])
    # 5 standard deviations of a share of 400 draws.
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / 400) + 1e-9).all()


def test_policies_that_mean_nothing_here():
    dynamic = build(dataclasses.replace(TINY, rope=RopeConfig("dynamic", factor=2.0, original_length=16)))
    with pytest.raises(UserError, match="rope_policy is hf, which chooses between the factors of longrope; with dynamic use planned"):
        generate(dynamic, prompts_of(3), Generation(rope_policy="hf"))
    default, options = build(), Generation(max_new_tokens=5)
    for policy in ("hf", "short", "long"):  # nothing to choose
        chosen = generate(default, prompts_of(3), dataclasses.replace(options, rope_policy=policy))[0].tokens
        np.testing.assert_array_equal(chosen, generate(default, prompts_of(3), options)[0].tokens)


def test_hf_switches_the_whole_batch_at_its_longest_row():
    rope = RopeConfig("longrope", original_length=16, length=64, long_factors=(2.0, 4.0))
    model = build(dataclasses.replace(TINY, rope=rope))
    long, short = prompts_of(13, 6)
    options = Generation(max_new_tokens=12, rope_policy="hf", stop=((3,),))
    rows = generate(model, [long, short], options)
    one_later = dataclasses.replace(rope, original_length=17)
    moved = generate(build(dataclasses.replace(TINY, rope=one_later)), [long, short], options)
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(rows, moved)), "the step should show"
    prompt, tokens = [long, short], [[], []]
    run = jax.jit(lambda tokens_1T, planned: model(tokens_1T, model.init_state(1, capacity=64, planned=planned))[0][0])
    for step in range(12):
        for row in range(2):
            if 3 in tokens[row]:
                continue
            so_far = np.concatenate([prompt[row], tokens[row]]).astype(np.int32)
            logits_TV = run(np.pad(so_far, (0, 64 - len(so_far)))[None], np.int32(len(long) + step))
            tokens[row].append(int(np.argmax(logits_TV[len(so_far) - 1])))
    for row in range(2):
        expected = tokens[row][: tokens[row].index(3)] if 3 in tokens[row] else tokens[row]
        np.testing.assert_array_equal(rows[row].tokens, expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "an empty one"),
        ([[1, 17]], "token id 17; this model's ids are from 0 to 16"),
        ([[-1]], "token id -1"),
    ],
)
def test_wrong_prompts(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(build(), prompts)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"segment": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-42},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"stop": ((1,), ())},
        {"stop": ((-1, 5),)},
    ],
    ids=str,
)
def test_wrong_options(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Generation(**fields)


def test_damaged_weights_are_reported():
    model = build()
    model.norm.scale[...] = model.norm.scale[...].at[0].set(jnp.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, prompts_of(3), Generation(max_new_tokens=3))


# --- Text ---

TEXT = "naïve 数 🙂 END of it"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 40), max_size=8), stop=st.sampled_from([(), ("END",), ("of", "🙂 E"), ("zzz",), ("t",)]))
def test_text_does_not_depend_on_how_tokens_come(cuts, stop):
    """Characters are never shown in halves, nor any of a stop text; what is shown is never taken back."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    row = TextStream(tokenizer, tokenizer.encode("before: "), stop)
    pieces = [row.add(part) for part in np.split(ids, sorted(cuts))] + [row.add([], last=True)]
    ends = [TEXT.index(text) for text in stop if text in TEXT]
    assert "".join(pieces) == row.text == TEXT[: min(ends, default=len(TEXT))]
    assert row.finish == ("stop" if ends else "length")


def test_long_text_takes_time_in_proportion():
    """However long the text, no call decodes more than the last tokens."""
    longest, tokenizer = 0, ByteTokenizer()

    class Watched(ByteTokenizer):
        def decode(self, ids_N):
            nonlocal longest
            longest = max(longest, len(ids_N))
            return tokenizer.decode(ids_N)

    ids = tokenizer.encode(TEXT * 200)
    row = TextStream(Watched(), [1, 2, 3], ["never there"])
    pieces = [row.add(ids[at : at + 7]) for at in range(0, len(ids), 7)] + [row.add([], last=True)]
    assert "".join(pieces) == row.text == TEXT * 200
    assert longest < 100


def test_text_keeps_the_space_before_a_first_word():
    tokenizer = word_tokenizer(["the key is 1 2 3"])
    row = TextStream(tokenizer, tokenizer.encode("the key"))
    assert row.add(tokenizer.encode("is the")) == " is the"


def test_following_a_stream_ends_when_all_rows_have_stopped():
    model, tokenizer = build(dataclasses.replace(TINY, vocab_size=257)), ByteTokenizer()
    prompts = [tokenizer.encode("ab"), tokenizer.encode("xyz")]
    options = Generation(max_new_tokens=40, temperature=1.0)
    free = [bytes(int(i) for i in row.tokens if i < 256) for row in generate(model, prompts, options)]
    rows = [TextStream(tokenizer, prompt, ["\x00no"]) for prompt in prompts]
    shown = ["".join(parts) for parts in zip(*follow(rows, stream(model, prompts, options, burst=7)))]
    assert shown == [row.text for row in rows] == [text.decode("utf-8", errors="replace") for text in free]
