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

EXAMPLES = {f"{config_type.__name__}-{name}": config for config_type in models.MODELS for name, config in config_type.examples().items()}
BATCH, LENGTH = 2, 29
# Few sizes of call, so that each is compiled once; together they make any split of interest.
PIECES = (0, 1, 2, 3, 7, 13, LENGTH)
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def with_dtype(config, dtype):
    return type(config)(**(vars(config) | {"dtype": dtype}))


@functools.cache
def model_and_step(name: str, dtype: str):
    model = models.build(with_dtype(EXAMPLES[name], dtype), nnx.Rngs(0))
    return model, jax.jit(lambda tokens, state, segments=None: model.hidden(tokens, state, segments))


def random_tokens(name: str, seed: int, shape=(BATCH, LENGTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, EXAMPLES[name].vocab_size, shape, dtype=np.int32)


def assert_close(a, b, dtype):
    chex.assert_trees_all_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_any_split_gives_the_same(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        model, step = model_and_step(name, dtype)

        @settings(max_examples=15, deadline=None, derandomize=True)
        @given(pieces=st.lists(st.sampled_from(PIECES[:-1]), min_size=1, max_size=20), seed=st.integers(0, 3))
        def check(pieces, seed):
            tokens_BT = random_tokens(name, seed)
            whole_BTD, whole_state = step(tokens_BT, model.init_state(BATCH, capacity=LENGTH))
            state, parts, at = model.init_state(BATCH, capacity=LENGTH), [], 0
            while at < LENGTH:
                size = pieces.pop(0) if pieces else 1
                size = size if at + size <= LENGTH else 1
                part_BTD, state = step(tokens_BT[:, at : at + size], state)
                parts.append(part_BTD)
                at += size
            assert_close(jnp.concatenate(parts, axis=1), whole_BTD, dtype)
            assert_close(state, whole_state, dtype)

        check()


@pytest.mark.parametrize("name", EXAMPLES)
def test_read_equals_one_call(name):
    """The driver, with and without a remainder, and on an empty stream."""
    model, step = model_and_step(name, "float32")
    tokens_BT = random_tokens(name, 0)
    whole_BTD, whole_state = step(tokens_BT, model.init_state(BATCH, capacity=LENGTH))
    keep = lambda model, hidden_BTD, extra: (hidden_BTD, extra)
    run = jax.jit(functools.partial(read, visit=keep), static_argnames="segment")
    for segment in (8, LENGTH):
        (hidden_BTD, echo_BT), state = run(model, tokens_BT, model.init_state(BATCH, capacity=LENGTH), segment=segment, extra=tokens_BT)
        assert_close((hidden_BTD, state), (whole_BTD, whole_state), "float32")
        np.testing.assert_array_equal(echo_BT, tokens_BT)
    _, state = run(model, tokens_BT[:, :0], model.init_state(BATCH, capacity=1), segment=8, extra=tokens_BT[:, :0])
    assert_close(state, model.init_state(BATCH, capacity=1), "float32")


@pytest.mark.parametrize("name", EXAMPLES)
def test_packed_equals_separate(name):
    """Documents in one row, also when the row is read in pieces that cut through them, equal the same documents read alone."""
    with jax.enable_x64(True):
        model, step = model_and_step(name, "float64")
        lengths = ((13, 1, 8, 3), (2, 20, 3, 0))
        tokens_BT = random_tokens(name, 1)
        segments_BT = np.zeros((BATCH, LENGTH), np.int32)
        for row, sizes in enumerate(lengths):
            segments_BT[row, : sum(sizes)] = np.repeat([1, 2, 3, 4], sizes)
        for cuts in ([], [7], [7, 14, 27]):
            state, parts = model.init_state(BATCH, capacity=LENGTH), []
            for piece in np.split(np.arange(LENGTH), cuts):
                part_BTD, state = step(tokens_BT[:, piece], state, segments_BT[:, piece])
                parts.append(part_BTD)
            packed_BTD = jnp.concatenate(parts, axis=1)
            for row, sizes in enumerate(lengths):
                ends = np.cumsum(sizes)
                for begin, end in zip(ends - sizes, ends):
                    alone_BTD, _ = model.hidden(tokens_BT[row : row + 1, begin:end], model.init_state(1, capacity=LENGTH))
                    assert_close(packed_BTD[row, begin:end], alone_BTD[0], "float64")


@pytest.mark.parametrize("name", EXAMPLES)
def test_padded_rows_equal_rows_alone(name):
    """Prompts of unequal length, right-padded, then continued: each row goes on from its own position."""
    with jax.enable_x64(True):
        model, step = model_and_step(name, "float64")
        tokens_BT = random_tokens(name, 2)
        lengths = (13, 7)
        segments_BT = (np.arange(13) < np.array(lengths)[:, None]).astype(np.int32)
        _, state = step(tokens_BT[:, :13], model.init_state(BATCH, capacity=LENGTH), segments_BT)
        _, state = step(tokens_BT[:, 13:15], state, np.array([[1, 0], [0, 0]], np.int32))
        after_BTD, state = step(tokens_BT[:, 15:18], state)
        for row, length in enumerate(lengths):
            seen = np.concatenate([tokens_BT[row, :length], tokens_BT[row, 13:14] if row == 0 else [], tokens_BT[row, 15:18]]).astype(
                np.int32
            )
            alone_BTD, alone = model.hidden(seen[None], model.init_state(1, capacity=LENGTH))
            assert_close(after_BTD[row], alone_BTD[0, -3:], "float64")
            assert_close(jax.tree.map(lambda x: x[row], state.cursor), jax.tree.map(lambda x: x[0], alone.cursor), "float64")


@pytest.mark.parametrize("name", EXAMPLES)
def test_causal_and_rows_independent(name):
    """A later token changes nothing before it, for every position; rows do not see one another."""
    with jax.enable_x64(True):
        model, _ = model_and_step(name, "float64")
        tokens_BT = random_tokens(name, 3, (1, LENGTH))
        # Row t has token t changed: the rows before t must agree with the original up to t - 1 and differ at t.
        changed_BT = np.repeat(tokens_BT, LENGTH, axis=0)
        changed_BT[np.arange(LENGTH), np.arange(LENGTH)] = (changed_BT[np.arange(LENGTH), np.arange(LENGTH)] + 1) % model.config.vocab_size
        run = jax.jit(lambda tokens_BT: model.hidden(tokens_BT, model.init_state(LENGTH, capacity=LENGTH))[0])
        original_BTD, changed_BTD = run(np.repeat(tokens_BT, LENGTH, axis=0)), run(changed_BT)
        difference_BT = np.abs(np.asarray(original_BTD - changed_BTD)).max(axis=-1)
        assert np.all(difference_BT[np.tril_indices(LENGTH, -1)] < 1e-12)
        assert np.all(np.diag(difference_BT) > 1e-6)
        order = np.random.default_rng(0).permutation(LENGTH)
        assert_close(run(changed_BT[order]), changed_BTD[order], "float64")


@pytest.mark.parametrize("name", EXAMPLES)
def test_state_is_fixed_in_shape_and_bytes(name):
    model, step = model_and_step(name, "float32")
    before = model.init_state(BATCH, capacity=LENGTH)
    _, after = step(random_tokens(name, 0), before)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert state_bytes(before) == state_bytes(after) > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_through_a_split_equals_one_call(name):
    """Training segment by segment, with the state as the carry, gives the gradient of one call."""
    with jax.enable_x64(True):
        model, _ = model_and_step(name, "float64")
        tokens_BT = random_tokens(name, 4)

        def loss(model, cuts):
            state, total = model.init_state(BATCH, capacity=LENGTH), 0.0
            for part_BT in np.split(tokens_BT, cuts, axis=1):
                hidden_BTD, state = model.hidden(part_BT, state)
                total += jnp.sum(jnp.sin(model.logits(hidden_BTD)))
            return total

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        assert_close(gradient(model, (13,)), gradient(model, ()), "float32")
