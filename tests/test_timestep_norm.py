"""Timestep normalisation: the original's outputs, the definition, the stream law, and accuracy over a million tokens.

Shape letters as in infinicontext/nn/timestep_norm.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from infinicontext.errors import UserError
from infinicontext.nn.timestep_norm import TimestepNorm, TimestepNormState

B, T, D, G = 2, 29, 6, 3
# Few sizes of call, because each is compiled; together they make splits inside, at and across blocks of 4.
PIECES = (0, 1, 3, 9)

read = jax.jit(lambda norm, x, state, starts=None, valid=None, block=4: norm(x, state, starts, valid, block=block), static_argnames="block")


def example(seed=0, *, prior_count=2, starts=0.1, padding=0.2):
    """Random parameters, and float64 inputs far from 0 with random starts of documents and random padding."""
    rng = np.random.default_rng(seed)
    norm = jax.tree.map(lambda parameter: jnp.asarray(0.5 * rng.normal(size=parameter.shape)), TimestepNorm(D, G, prior_count))
    return norm, 5 + rng.normal(size=(B, T, D)), rng.random((B, T)) < starts, rng.random((B, T)) >= padding


def statistics(state: TimestepNormState):
    """Count, mean and variance."""
    return state.count_B, state.mean_BG + state.mean_residual_BG, state.variance_BG + state.variance_residual_BG


def assert_close(a, b, tolerance=1e-10):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


def definition(norm, x_BTD, starts_BT, valid_BT):
    """Each token's mean and variance in two passes over all numbers that its group has had in its document, and the prior's."""
    prior, n = norm.init_state(B, x_BTD.dtype), norm.prior_count
    document_BT = jnp.cumsum(starts_BT, axis=1)
    x_BTGF = x_BTD.reshape(B, T, G, D // G)

    def one_token(t):
        seen_BT = valid_BT & (document_BT == document_BT[:, t][:, None]) & (jnp.arange(T) <= t)[None]
        count_B = n + jnp.sum(seen_BT, axis=1, dtype=jnp.int32)
        total = lambda values_BTGF: jnp.sum(jnp.where(seen_BT[..., None, None], values_BTGF, 0), axis=1).mean(axis=-1)
        average = lambda of_prior_BG, values_BTGF: (n * of_prior_BG + total(values_BTGF)) / jnp.maximum(count_B, 1).astype(float)[:, None]
        mean_BG = average(prior.mean_BG, x_BTGF)
        squares_BTGF = jnp.square(x_BTGF - mean_BG[:, None, :, None])
        variance_BG = average(prior.variance_BG + jnp.square(prior.mean_BG - mean_BG), squares_BTGF)
        y_BGF = (x_BTGF[:, t] - mean_BG[..., None]) / jnp.sqrt(variance_BG + norm.epsilon)[..., None]
        y_BD = y_BGF.reshape(B, D) * (norm.weight[...] + 1)[None] + norm.bias[...][None]
        return jnp.where(valid_BT[:, t][:, None], y_BD, 0), (count_B, mean_BG, variance_BG)

    y_TBD, statistics_TB = jax.vmap(one_token)(jnp.arange(T))
    return jnp.moveaxis(y_TBD, 0, 1), jax.tree.map(lambda a: a[-1], statistics_TB)


def with_gradient(compute, norm, x_BTD):
    """Outputs and statistics, and the gradient of a random function of them for x and all parameters."""

    def loss(norm, x_BTD):
        y_BTD, (count_B, *rest) = compute(norm, x_BTD)
        rng = np.random.default_rng(9)
        return sum(jnp.sum(rng.normal(size=a.shape) * a) for a in (y_BTD, *rest)), (y_BTD, count_B, *rest)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(norm, x_BTD)


@pytest.mark.parametrize(("starts", "padding", "prior_count"), [(0, 0, 2), (0.1, 0, 0), (0, 0.2, 0), (0.2, 0.1, 2)])
def test_equals_definition(starts, padding, prior_count, float64):
    """Values and gradients: in one call in blocks of blocks, and in two calls."""
    norm, x_BTD, *marks = example(starts=starts, padding=padding, prior_count=prior_count)
    expected = with_gradient(lambda norm, x_BTD: definition(norm, x_BTD, *map(jnp.asarray, marks)), norm, x_BTD)
    for block, cut in ((3, T), (64, 11)):

        def blocked(norm, x_BTD):
            state, parts = norm.init_state(B, x_BTD.dtype), []
            for part in (slice(cut), slice(cut, T)):
                given_marks = [marks_BT[:, part] if given else None for marks_BT, given in zip(marks, (starts, padding))]
                part_BTD, state = norm(x_BTD[:, part], state, *given_marks, block=block)
                parts.append(part_BTD)
            return jnp.concatenate(parts, axis=1), statistics(state)

        assert_close(with_gradient(blocked, norm, x_BTD), expected)


def load(golden, case, dtype):
    """The norm, x and the tensors of one case of the reference data."""
    tensors = load_file(golden / "megalodon" / "timestep_norm.safetensors")
    tensors = {name.removeprefix(f"{case}."): tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}
    norm = TimestepNorm(tensors["x"].shape[-1], tensors["mean"].shape[-1], int(tensors["w.prior_count"]))
    for name in ("weight", "bias", *(("prior_mean", "prior_logv") if norm.prior_count else ())):
        getattr(norm, name).set_value(jnp.asarray(tensors[f"w.{name}"], dtype))
    return norm, tensors["x"].astype(dtype), tensors


def assert_golden(y_BTD, state, tensors, tolerance, prefix=""):
    for ours, name in zip((y_BTD, *statistics(state)), ("y", "count", "mean", "var")):
        np.testing.assert_allclose(ours, tensors[prefix + name], rtol=tolerance, atol=tolerance, err_msg=prefix + name)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", ["basic", "offset", "prior", "featurewise", "padded", "padded_prior"])
def test_agrees_with_the_original(golden, case, dtype):
    tolerance = 1e-10 if dtype == "float64" else 5e-4 if case == "offset" else 1e-5
    with jax.enable_x64(dtype == "float64"):
        norm, x_BTD, tensors = load(golden, case, dtype)
        valid_BT = ~tensors["padding_mask"] if "padding_mask" in tensors else None
        empty = norm.init_state(len(x_BTD), dtype)
        y_BTD, state = read(norm, x_BTD, empty, valid=valid_BT)
        assert y_BTD.dtype == state.mean_BG.dtype == dtype
        assert_golden(y_BTD, state, tensors, tolerance)
        if valid_BT is not None:
            assert np.all(np.asarray(y_BTD)[~valid_BT] == 0)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_split_and_gradients_agree_with_the_original(golden, dtype):
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    with jax.enable_x64(dtype == "float64"):
        norm, x_BTD, tensors = load(golden, "basic", dtype)
        empty = norm.init_state(len(x_BTD), dtype)
        y_BTD, state = read(norm, x_BTD[:, : tensors["split1.y"].shape[1]], empty)
        assert_golden(y_BTD, state, tensors, tolerance, "split1.")
        y_BTD, state = read(norm, x_BTD[:, y_BTD.shape[1] :], state)
        assert_golden(y_BTD, state, tensors, tolerance, "split2.")

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1))
        def loss(norm, x_BTD):
            y_BTD, state = norm(x_BTD, empty)
            outputs = (y_BTD, *statistics(state)[1:])
            return sum(jnp.sum(tensors[f"grad.{name}"].astype(dtype) * a) for name, a in zip(("cy", "cm", "cv"), outputs))

        value, (norm_gradient, x_gradient_BTD) = loss(norm, x_BTD)
        # Sums over all tokens: the tolerance is relative to the largest term.
        scale = max(np.abs(tensors[f"grad.{name}"]).max() for name in ("x", "weight", "bias"))
        for name, ours in (("loss", value), ("x", x_gradient_BTD), ("weight", norm_gradient.weight), ("bias", norm_gradient.bias)):
            np.testing.assert_allclose(ours, tensors[f"grad.{name}"], rtol=tolerance, atol=tolerance * scale, err_msg=name)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.sampled_from(PIECES), max_size=12), seed=st.integers(0, 9), documents=st.booleans())
def test_any_split_gives_the_same(sizes, seed, documents):
    with jax.enable_x64(True):
        norm, x_BTD, starts_BT, valid_BT = example(seed)
        marks = (starts_BT, valid_BT) if documents else (None, None)
        expected = read(norm, x_BTD, norm.init_state(B, "float64"), *marks)
        state, parts, at = norm.init_state(B, "float64"), [], 0
        for size in [*sizes, *[1] * T]:
            if at + size <= T:
                part_BTD, state = read(norm, x_BTD[:, at : at + size], state, *(m if m is None else m[:, at : at + size] for m in marks))
                parts.append(part_BTD)
                at += size
        assert_close((jnp.concatenate(parts, axis=1), statistics(state)), (expected[0], statistics(expected[1])))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-3)])
def test_packed_equals_separate(dtype, tolerance):
    """Documents in one row, the first of which continues an earlier call, equal the same documents read alone.

    Every second one has a mean of 1000: with statistics around another document's mean, float32 would be wrong by 0.1 and more.
    """
    with jax.enable_x64(dtype == "float64"):
        norm, x_BTD, _, _ = example(prior_count=0)
        cuts = [0, 3, 7, 8, 20, T - 1, T]
        starts_BT = np.tile(np.isin(np.arange(T), cuts[2:]), (B, 1))
        x_BTD = (x_BTD + 1000 * (np.cumsum(starts_BT, axis=1) % 2)[..., None]).astype(dtype)
        empty = norm.init_state(B, dtype)
        _, state = read(norm, x_BTD[:, : cuts[1]], empty)
        packed_BTD, end = read(norm, x_BTD[:, cuts[1] :], state, starts_BT[:, cuts[1] :])
        for start, stop in zip([0, *cuts[2:-1]], cuts[2:]):
            alone_BTD, state = read(norm, x_BTD[:, start:stop], empty)
            start = max(start, cuts[1])
            assert_close(packed_BTD[:, start - cuts[1] : stop - cuts[1]], alone_BTD[:, start - stop :], tolerance)
        assert_close(statistics(end), statistics(state), tolerance)


def test_padding_is_not_seen(float64):
    """A padded row equals the shorter row, NaN in its padding included, and gradients stay finite; a row of padding keeps its state."""
    norm, x_BTD, _, _ = example(prior_count=0)
    valid_BT = np.arange(T) < np.array([[11], [0]])
    empty = norm.init_state(B, "float64")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(x_BTD):
        y_BTD, state = norm(x_BTD, empty, valid_BT=valid_BT)
        return jnp.sum(y_BTD**2), (y_BTD, state)

    dx_BTD, (y_BTD, state) = gradient(np.where(valid_BT[..., None], x_BTD, np.nan))
    short_BTD, short = read(norm, x_BTD[:, :11], empty)
    assert_close(y_BTD[0, :11], short_BTD[0])
    np.testing.assert_array_equal(np.asarray(y_BTD)[~valid_BT], 0)
    assert np.all(np.isfinite(dx_BTD))
    np.testing.assert_array_equal(np.asarray(dx_BTD)[~valid_BT], 0)
    row = lambda state, index: jax.tree.map(lambda a: a[index], state)
    assert_close(row(state, 0), row(short, 0))
    chex.assert_trees_all_equal(row(state, 1), row(empty, 1))


@pytest.mark.parametrize("starts", [0, 0.1, 0.5])
def test_shards_join_to_the_sequential_state(starts, float64):
    """The state before every shard, and after the last, from what the shards summarise of themselves."""
    norm, x_BTD, starts_BT, valid_BT = example(3, starts=starts, padding=0.3)
    _, state = read(norm, x_BTD[:, :5], norm.init_state(B, "float64"))
    valid_BT[0, 13:17] = False
    x_BTD[~valid_BT] = np.nan
    summarise = jax.jit(norm.summarise)
    pieces = [slice(at, at + 4) for at in range(5, T, 4)]
    shards = [summarise(x_BTD[:, piece], starts_BT[:, piece], valid_BT[:, piece]) for piece in pieces]
    state_before = jax.jit(
        functools.partial(norm.state_before, state=state, shards=jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *shards))
    )
    for index, piece in enumerate(pieces):
        assert_close(statistics(state_before(index)), statistics(state))
        _, state = read(norm, x_BTD[:, piece], state, starts_BT[:, piece], valid_BT[:, piece])
    assert_close(statistics(state_before(len(pieces))), statistics(state))


def test_counts_beyond_2_to_the_24():
    """Tokens are counted, and change the statistics, where a float32 count would have stopped."""
    norm, x_BTD, _, _ = example(prior_count=0)
    norm, x_BTD = jax.tree.map(lambda a: a.astype(jnp.float32), (norm, x_BTD))
    count = 2**24 + 1
    full = lambda value: jnp.full((B, G), value, jnp.float32)
    start = TimestepNormState(jnp.full(B, count, jnp.int32), full(2), full(3), full(0), full(0))
    x_BTGF = np.asarray(x_BTD, np.float64).reshape(B, T, G, -1)
    mean_BG = (count * 2 + x_BTGF.mean(axis=-1).sum(axis=1)) / (count + T)
    squares_BG = np.square(x_BTGF - mean_BG[:, None, :, None]).mean(axis=-1).sum(axis=1)
    variance_BG = (count * (3 + np.square(2 - mean_BG)) + squares_BG) / (count + T)
    _, one_call = read(norm, x_BTD, start)
    state = start
    for t in range(T):
        _, state = read(norm, x_BTD[:, t : t + 1], state)
    for end in (state, one_call):
        assert end.count_B.dtype == jnp.int32
        np.testing.assert_array_equal(end.count_B, count + T)
        _, *ours = statistics(jax.tree.map(lambda a: np.asarray(a, np.float64), end))
        # The tokens move mean and variance by about 1e-5.
        np.testing.assert_allclose(ours, (mean_BG, variance_BG), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("mean", "tolerance"), [(10, 5e-6), (100, 1e-5)])
def test_accurate_for_a_million_tokens(mean, tolerance):
    """Against float64, for every token: in one call, in calls of 4096, and at the end token by token."""
    length, single, features = 2**20, 2**14, 8
    x_TD = np.random.default_rng(0).normal(mean, 1, (length, features)).astype(np.float32)
    wide_TD = x_TD.astype(np.float64) - mean
    count_T = np.arange(1, length + 1)
    mean_T = np.cumsum(wide_TD.mean(axis=1)) / count_T
    variance_T = np.cumsum(np.square(wide_TD).mean(axis=1)) / count_T - mean_T**2
    expected_TD = (wide_TD - mean_T[:, None]) / np.sqrt(variance_T + 1e-5)[:, None]

    norm = TimestepNorm(features, 1)
    empty = norm.init_state(1)

    @functools.partial(jax.jit, static_argnames="size")
    def read_pieces(x_TD, state, size):
        def step(state, x_CD):
            y_BCD, state = norm(x_CD[None], state)
            return state, y_BCD[0]

        state, y_NCD = jax.lax.scan(step, state, x_TD.reshape(-1, size, features))
        return y_NCD.reshape(x_TD.shape), state

    whole_TD, _ = read_pieces(x_TD, empty, length)
    first_TD, state = read_pieces(x_TD[:-single], empty, 4096)
    last_TD, _ = read_pieces(x_TD[-single:], state, 1)
    for y_TD in (whole_TD, np.concatenate([first_TD, last_TD])):
        assert np.abs(y_TD - expected_TD).max() <= tolerance


def test_bfloat16_keeps_float32_statistics():
    norm, x_BTD, starts_BT, valid_BT = example()
    narrow_BTD = x_BTD.astype(jnp.bfloat16)
    y_BTD, state = read(norm, narrow_BTD, norm.init_state(B, "bfloat16"), starts_BT, valid_BT)
    wide_BTD, wide = read(norm, narrow_BTD.astype(jnp.float32), norm.init_state(B), starts_BT, valid_BT)
    chex.assert_type([y_BTD, *state[1:]], [jnp.bfloat16, *[jnp.float32] * 4])
    assert_close(state, wide, 1e-6)
    assert_close(y_BTD.astype(jnp.float32), wide_BTD, 2**-7)


@pytest.mark.parametrize(
    ("dim", "groups", "prior_count", "message"),
    [
        (6, 4, 0, "groups is 4; it must be 1 or more and divide dim, 6"),
        (6, 0, 0, "groups is 0; it must be 1 or more and divide dim, 6"),
        (6, 6, 1, "prior_count is 1; it must be 2 or more for 6 groups of 6 channels"),
        (6, 3, -1, "prior_count is -1; it must be 0 or more for 3 groups of 6 channels"),
    ],
)
def test_refused(dim, groups, prior_count, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        TimestepNorm(dim, groups, prior_count)
