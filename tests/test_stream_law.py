"""The stream law, for every registered model: however a sequence is split into calls, hidden states and final state are the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models
from infinicontext.models.streaming import read, state_bytes

EXAMPLES = {f"{kind.__name__}-{name}": config for kind in models.MODELS for name, config in kind.examples().items()}
# For what costs most: one of each kind, and all of them with the slow tests.
FIRST = {f"{kind.__name__}-{next(iter(kind.examples()))}" for kind in models.MODELS}
SOME = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in EXAMPLES]
BATCH, LENGTH = 2, 29
# Few sizes of call, because each is compiled; together they make splits inside, at and across windows and blocks.
PIECES = (0, 1, 3, 13)
# float32: rounding of sums in another order, a few units in the last place of values near 1 after two layers.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


@functools.cache
def model_and_step(name: str, dtype: str = "float64"):
    config = EXAMPLES[name]
    model = models.build(type(config)(**(vars(config) | {"dtype": dtype})), nnx.Rngs(0))
    return model, jax.jit(model.hidden)


def empty(model, rows=BATCH):
    return model.init_state(rows, capacity=LENGTH)


def random_tokens(name: str, seed: int, shape=(BATCH, LENGTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, EXAMPLES[name].vocab_size, shape, dtype=np.int32)


def read_in_pieces(step, state, tokens_BT, segments_BT, sizes):
    """Hidden states and final state after calls of these sizes; the rest goes token by token."""
    parts, at = [], 0
    for size in [*sizes, *[1] * LENGTH]:
        if at + size <= tokens_BT.shape[1]:
            part_BTD, state = step(tokens_BT[:, at : at + size], state, segments_BT[:, at : at + size])
            parts.append(part_BTD)
            at += size
    return jnp.concatenate(parts, axis=1), state


def assert_close(a, b, dtype="float64"):
    chex.assert_trees_all_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_split_gives_the_same(name):
    any_split_gives_the_same(name, "float64")


@pytest.mark.parametrize("name", SOME)
def test_any_split_gives_the_same_in_float32(name):
    any_split_gives_the_same(name, "float32")


def any_split_gives_the_same(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        model, step = model_and_step(name, dtype)
        ones_BT = np.ones((BATCH, LENGTH), np.int32)

        @settings(max_examples=12, deadline=None, derandomize=True, database=None)
        @given(sizes=st.lists(st.sampled_from(PIECES), max_size=12), seed=st.integers(0, 3))
        def check(sizes, seed):
            tokens_BT = random_tokens(name, seed)
            whole = step(tokens_BT, empty(model), ones_BT)
            assert_close(read_in_pieces(step, empty(model), tokens_BT, ones_BT, sizes), whole, dtype)

        check()


@pytest.mark.parametrize("name", EXAMPLES)
def test_packed_equals_separate(name):
    """Documents in one row, also when the row is read in pieces that cut through them, equal the same documents read alone."""
    with jax.enable_x64(True):
        model, step = model_and_step(name)
        documents = ((13, 1, 8, 3), (2, 20, 3))
        tokens_BT, segments_BT = random_tokens(name, 1), np.zeros((BATCH, LENGTH), np.int32)
        for row, sizes in enumerate(documents):
            segments_BT[row, : sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
        whole = step(tokens_BT, empty(model), segments_BT)
        pieces = read_in_pieces(step, empty(model), tokens_BT, segments_BT, [3, 3, 13])
        # What padding gives has no meaning.
        assert_close((pieces[0][segments_BT > 0], pieces[1]), (whole[0][segments_BT > 0], whole[1]))
        for row, sizes in enumerate(documents):
            for end, size in zip(np.cumsum(sizes), sizes):
                # The document alone in the first row, at the start; what stands in the second does not matter.
                alone_BT = np.roll(tokens_BT[[row, row]], size - end, axis=1)
                alone_ids_BT = np.tile((np.arange(LENGTH) < size).astype(np.int32), (BATCH, 1))
                # Where the row stands matters to those whose grid counts all its tokens; to the others it must not.
                for count in {end - size} if name.startswith(("Infini", "Fam", "Beacon")) else {0, end - size}:
                    state = empty(model)
                    state = state._replace(cursor=state.cursor._replace(count_B=jnp.full(BATCH, count, jnp.int32)))
                    alone_BTD, _ = step(alone_BT, state, alone_ids_BT)
                    assert_close(whole[0][row, end - size : end], alone_BTD[0, :size])


@pytest.mark.parametrize("name", EXAMPLES)
def test_padded_rows_equal_rows_alone(name):
    """Prompts of unequal length, right-padded, then continued: each row goes on from its own position."""
    with jax.enable_x64(True):
        model, step = model_and_step(name)
        tokens_BT, lengths = random_tokens(name, 2), (13, 7)
        _, state = step(tokens_BT[:, :13], empty(model), (np.arange(13) < np.array(lengths)[:, None]).astype(np.int32))
        _, state = step(tokens_BT[:, 13:16], state, np.array([[1, 0, 0], [0, 0, 0]], np.int32))
        after_BTD, state = step(tokens_BT[:, 16:19], state, np.ones((BATCH, 3), np.int32))
        seen = [tokens_BT[0, [*range(14), 16, 17, 18]], tokens_BT[1, [*range(7), 16, 17, 18]]]
        alone_BT, segments_BT = np.zeros((BATCH, LENGTH), np.int32), np.zeros((BATCH, LENGTH), np.int32)
        for row, tokens in enumerate(seen):
            alone_BT[row, : len(tokens)], segments_BT[row, : len(tokens)] = tokens, 1
        alone_BTD, alone = step(alone_BT, empty(model), segments_BT)
        for row, tokens in enumerate(seen):
            assert_close(after_BTD[row], alone_BTD[row, len(tokens) - 3 : len(tokens)])
        assert_close(state, alone)


@pytest.mark.parametrize("name", EXAMPLES)
def test_causal_and_rows_independent(name):
    """A later token changes nothing before it, for every position; rows do not see one another."""
    with jax.enable_x64(True):
        model, _ = model_and_step(name)
        # Row t has token t changed: it must agree with the original up to t - 1 and differ at t.
        original_TT = np.repeat(random_tokens(name, 3, (1, LENGTH)), LENGTH, axis=0)
        changed_TT = (original_TT + np.eye(LENGTH, dtype=np.int32)) % model.config.vocab_size
        run = jax.jit(lambda tokens_TT: model.hidden(tokens_TT, empty(model, LENGTH))[0])
        changed_TTD = run(changed_TT)
        difference_TT = np.abs(np.asarray(run(original_TT) - changed_TTD)).max(axis=-1)
        assert np.all(difference_TT[np.tril_indices(LENGTH, -1)] < 1e-12)
        assert np.all(np.diag(difference_TT) > 1e-6)
        order = np.random.default_rng(0).permutation(LENGTH)
        assert_close(run(changed_TT[order]), changed_TTD[order])


@pytest.mark.parametrize("name", EXAMPLES)
def test_read_equals_one_call(name):
    """The driver, with a remainder and without, and on an empty stream; state of fixed shape and bytes."""
    with jax.enable_x64(True):
        model, step = model_and_step(name)
        tokens_BT = random_tokens(name, 0)
        whole_BTD, whole_state = step(tokens_BT, empty(model), np.ones((BATCH, LENGTH), np.int32))
        keep = lambda model, hidden_BTD, extra: (hidden_BTD, extra)
        run = jax.jit(functools.partial(read, visit=keep), static_argnames="segment")
        for segment in (13, LENGTH):
            (hidden_BTD, echo_BT), state = run(model, tokens_BT, empty(model), segment=segment, extra=tokens_BT)
            assert_close((hidden_BTD, state), (whole_BTD, whole_state))
            np.testing.assert_array_equal(echo_BT, tokens_BT)
        (nothing_BTD, _), state = run(model, tokens_BT[:, :0], empty(model), segment=13, extra=tokens_BT[:, :0])
        assert nothing_BTD.shape == (BATCH, 0, whole_BTD.shape[2])
        assert_close(state, empty(model))
        chex.assert_trees_all_equal_shapes_and_dtypes(whole_state, empty(model))
        assert state_bytes(whole_state) == state_bytes(empty(model)) > 0


@pytest.mark.parametrize("name", SOME)
def test_gradient_through_a_split_equals_one_call(name):
    """Training segment by segment, with the state as the carry, gives the gradient of one call."""
    with jax.enable_x64(True):
        model, _ = model_and_step(name)
        tokens_BT = random_tokens(name, 4)

        def loss(model, cuts):
            state, total = empty(model), 0.0
            for part_BT in np.split(tokens_BT, cuts, axis=1):
                hidden_BTD, state = model.hidden(part_BT, state)
                total += jnp.sum(jnp.sin(model.logits(hidden_BTD)))
            return total

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        # Parameters, and so their gradients, are float32.
        assert_close(gradient(model, (13,)), gradient(model, ()), "float32")
