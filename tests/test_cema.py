"""CEMA against the official implementation, against its definition, and against itself however a sequence is cut."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infinicontext.errors import UserError
from infinicontext.nn import cema
from infinicontext.nn.cema import CEMA, CemaState

METHODS = ("block", "scan", "fft")
WEIGHTS = ("alpha", "delta", "theta", "gamma", "omega")
LENGTH, BATCH, CHANNELS, ORDER = 29, 2, 3, 2
law = functools.partial(settings, deadline=None, derandomize=True, database=None)


@functools.partial(jax.jit, static_argnames=("method", "block"))
def run(layer, x_BTD, state, starts_BT=None, length_B=None, tables=None, *, method="block", block=None):
    return layer(x_BTD, state, starts_BT, length_B, method=method, block=block, tables=tables)


cema_tables = jax.jit(cema.cema_tables, static_argnums=(1, 2))


def assert_close(a, b, tolerance=1e-10):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- the official implementation


class Golden:
    """One file: tensors in our layout, and the layer with the file's weights."""

    def __init__(self, path, dtype):
        self.dtype = dtype
        with safe_open(path, "numpy") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.layer = CEMA(*self["w.alpha"].shape[:2], nnx.Rngs(0))
        for name in WEIGHTS:
            parameter = getattr(self.layer, name)
            parameter.set_value(self["w." + name].reshape(parameter.shape))

    def __getitem__(self, name):
        return jnp.asarray(self.tensors[name], self.dtype)

    def tokens(self, name):
        return jnp.swapaxes(self[name], 1, 2)

    def state(self, name):
        return CemaState(self[name][..., 0], self[name][..., 1])

    def zeros(self):
        return self.layer.init_state(self["x"].shape[0], self.dtype)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_states_of_the_official_code(golden, method, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden / "megalodon" / "cema.safetensors", dtype)
        close = functools.partial(assert_close, tolerance={"float64": 1e-10, "float32": 1e-5}[dtype])
        read = functools.partial(run, data.layer, method=method, block=8)
        x_BTD = data.tokens("x")
        close(read(x_BTD, data.zeros()), (data.tokens("y"), data.state("h")))
        close(read(x_BTD, data.state("carry.h0")), (data.tokens("carry.y"), data.state("carry.h")))

        cut = data["split.y1"].shape[2]
        first_BTD, state = read(x_BTD[:, :cut], data.zeros())
        close((first_BTD, state), (data.tokens("split.y1"), data.state("split.h1")))
        close(read(x_BTD[:, cut:], state), (data.tokens("split.y2"), data.state("split.h2")))

        state, outputs = data.zeros(), []
        for t in range(x_BTD.shape[1]):
            y_BTD, state = read(x_BTD[:, t : t + 1], state)
            outputs.append(y_BTD)
        close((jnp.concatenate(outputs, axis=1), state), (data.tokens("stepwise.y"), data.state("stepwise.h")))


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_official_code(golden, method, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden / "megalodon" / "cema.safetensors", dtype)

        def loss(layer, x_BTD, state):
            y_BTD, end = layer(x_BTD, state, method=method, block=8)
            return jnp.sum(data.tokens("grad.cy") * y_BTD) + sum(jnp.sum(c * h) for c, h in zip(data.state("grad.ch"), end))

        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(data.layer, data.tokens("x"), data.state("carry.h0"))
        weights = {name: getattr(gradients[0], name)[...] for name in WEIGHTS}
        expected = {name: data["grad.w." + name].reshape(weights[name].shape) for name in WEIGHTS}
        largest = max(jnp.max(jnp.abs(g)).item() for g in (*expected.values(), data["grad.x"], data["grad.h0"]))
        tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype] * max(1, largest)
        assert_close(
            (value, weights, *gradients[1:]), (data["grad.loss"], expected, data.tokens("grad.x"), data.state("grad.h0")), tolerance
        )


@pytest.mark.golden
def test_coefficients_of_the_official_code(golden, float64):
    data = Golden(golden / "megalodon" / "cema.safetensors", "float64")
    kernel_DC = data["kernel"]
    tables = cema_tables(data.layer, "float64", kernel_DC.shape[1])
    real_imag = lambda name: jnp.concatenate([data[name][..., 0], data[name][..., 1]], axis=1)
    assert_close((tables.gain_DN, tables.power_DKC[..., 1]), (data["coef.p"], real_imag("coef.q")))
    assert_close((tables.eta_DK, tables.kernel_DC), (real_imag("coef.gamma_scaled"), kernel_DC.at[:, 0].add(data["w.omega"][:, 0])))


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_slow_decay_of_the_official_code(golden, method, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden / "megalodon" / "cema_long.safetensors", dtype)
        result, expected = run(data.layer, data.tokens("x"), data.zeros(), method=method), (data.tokens("y"), data.state("h"))
        assert_close(result, expected, {"float64": 1e-10, "float32": 5e-4}[dtype])
        # Only the channel of very slow decay feels the rounding of the coefficients.
        assert_close(result[0][..., 1:], expected[0][..., 1:], {"float64": 1e-10, "float32": 1e-5}[dtype])


@pytest.mark.golden
def test_tables_in_float64_keep_slow_decays(golden):
    data = Golden(golden / "megalodon" / "cema_long.safetensors", "float32")
    tables = cema.inference_tables(data.layer)
    assert_close(run(data.layer, data.tokens("x"), data.zeros(), tables=tables), (data.tokens("y"), data.state("h")), 1e-5)


# ---------------------------------------------------------------- laws, in float64


def example(seed: int = 0, length: int = LENGTH, dtype="float64"):
    """A layer with decays from fast to slow, tokens and a state."""
    rng = np.random.default_rng(seed)
    layer = CEMA(CHANNELS, ORDER, nnx.Rngs(seed))
    for parameter, scale in zip((layer.alpha, layer.delta, layer.theta, layer.gamma, layer.omega), (2, 3, 1, 1, 1)):
        parameter.set_value((scale * rng.normal(size=parameter.shape)).astype(dtype))
    x_BTD = jnp.asarray(rng.normal(size=(BATCH, length, CHANNELS)), dtype)
    return layer, x_BTD, CemaState(*jnp.asarray(rng.normal(size=(2, BATCH, CHANNELS, ORDER)), dtype))


def random_starts(seed: int, length: int = LENGTH, density: float = 0.15):
    return jnp.asarray(np.random.default_rng(seed).random((BATCH, length)) < density)


def valid(y_BTD, length_B):
    """Outputs with those of padding set to zero, which have no meaning but must be finite."""
    assert jnp.isfinite(y_BTD).all()
    return jnp.where((jnp.arange(y_BTD.shape[1], dtype=jnp.int32)[None] < jnp.asarray(length_B, jnp.int32)[:, None])[..., None], y_BTD, 0)


@pytest.mark.parametrize("block", [1, 16, 20])
def test_blocks_of_any_size_equal_the_definition(float64, block):
    layer, x_BTD, state = example()

    @law(max_examples=15)
    @given(density=st.sampled_from([0, 0.05, 0.3, 1]), seed=st.integers(0, 99), lengths=st.tuples(*[st.integers(0, LENGTH)] * BATCH))
    def check(density, seed, lengths):
        documents = (random_starts(seed, density=density), jnp.asarray(lengths, jnp.int32))
        y_BTD, end = run(layer, x_BTD, state, *documents, block=block)
        expected_BTD, expected_end = run(layer, x_BTD, state, *documents, method="scan")
        assert_close((valid(y_BTD, lengths), end), (valid(expected_BTD, lengths), expected_end))

    check()
    assert_close(run(layer, x_BTD, state, block=block), run(layer, x_BTD, state, method="scan"))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_several_rounds_equal_the_definition(float64, monkeypatch, backend):
    """More tokens than one round of the CPU has; and the form of a GPU, in which blocks are joined in parallel."""
    layer, x_BTD, state = example(length=780)
    documents = (random_starts(5, 780, 0.01), jnp.asarray([780, 700], jnp.int32))
    expected = [run(layer, x_BTD, state, *arguments, method="scan") for arguments in ((), documents)]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert_close(jax.jit(lambda: layer(x_BTD, state, block=32))(), expected[0])
    y_BTD, end = jax.jit(lambda: layer(x_BTD, state, *documents, block=32))()
    assert_close((valid(y_BTD, documents[1]), end), (valid(expected[1][0], documents[1]), expected[1][1]))


@law(max_examples=25)
@given(sizes=st.lists(st.sampled_from((0, 1, 3, 13)), max_size=8), seed=st.integers(0, 9))
def test_any_split_gives_the_same(sizes, seed):
    with jax.enable_x64(True):
        layer, x_BTD, state = example(seed)
        starts_BT = random_starts(seed)
        whole, parts, at = run(layer, x_BTD, state, starts_BT, block=4), [], 0
        for size in [*sizes, *[1] * LENGTH]:
            if at + size <= LENGTH:
                y_BTD, state = run(layer, x_BTD[:, at : at + size], state, starts_BT[:, at : at + size], block=4)
                parts.append(y_BTD)
                at += size
        assert_close((jnp.concatenate(parts, axis=1), state), whole)


@law(max_examples=10)
@given(cut=st.integers(1, LENGTH - 1), seed=st.integers(0, 9))
def test_packed_documents_equal_separate_ones(cut, seed):
    with jax.enable_x64(True):
        layer, x_BTD, state = example(seed)
        starts_BT = jnp.zeros((BATCH, LENGTH), bool).at[:, cut].set(True)
        whole_BTD, end = run(layer, x_BTD, state, starts_BT, block=8)
        # Both documents at the start of rows of the same length, so that nothing is compiled anew.
        length_B = jnp.full(BATCH, cut, jnp.int32)
        first_BTD, _ = run(layer, x_BTD, state, None, length_B, block=8)
        second_BTD, second_end = run(
            layer, jnp.roll(x_BTD, -cut, axis=1), layer.init_state(BATCH, "float64"), None, LENGTH - length_B, block=8
        )
        assert_close((whole_BTD[:, :cut], whole_BTD[:, cut:], end), (first_BTD[:, :cut], second_BTD[:, : LENGTH - cut], second_end))


@pytest.mark.parametrize("method", ["block", "scan"])
def test_right_padding_changes_nothing(float64, method):
    layer, x_BTD, state = example()
    read = functools.partial(run, layer, method=method, block=8)
    y_BTD, end = read(x_BTD, state, None, jnp.asarray([13, 13], jnp.int32))
    assert_close((y_BTD[:, :13], end), read(x_BTD[:, :13], state))
    y_BTD, end = read(x_BTD, state, None, jnp.asarray([0, LENGTH], jnp.int32))
    whole_BTD, whole = read(x_BTD, state)
    chex.assert_trees_all_equal(jax.tree.map(lambda h: h[0], end), jax.tree.map(lambda h: h[0], state))
    assert_close((y_BTD[1], jax.tree.map(lambda h: h[1], end)), (whole_BTD[1], jax.tree.map(lambda h: h[1], whole)))


@pytest.mark.parametrize("documents", [False, True])
def test_gradients_equal_those_of_the_definition(float64, documents):
    layer, x_BTD, state = example()
    arguments = (random_starts(3, density=0.2), jnp.asarray([LENGTH, 13], jnp.int32)) if documents else (None, None)
    weight_BTD = valid(jnp.cos(x_BTD), arguments[1]) if documents else jnp.cos(x_BTD)

    def loss(layer, x_BTD, state, method):
        y_BTD, end = layer(x_BTD, state, *arguments, method=method, block=16)
        return jnp.sum(weight_BTD * y_BTD) + sum(jnp.sum(jnp.sin(h_BDN)) for h_BDN in end)

    gradients = [jax.jit(jax.grad(functools.partial(loss, method=m), argnums=(0, 1, 2)))(layer, x_BTD, state) for m in ("block", "scan")]
    assert_close(*gradients)


def test_nothing_leaks_between_documents():
    """Not even in the last bit: a huge first document leaves the second as it is."""
    layer, x_BTD, state = example(dtype="float32")
    starts_BT = jnp.zeros((BATCH, LENGTH), bool).at[:, 9].set(True)
    quiet, loud = (run(layer, x_BTD.at[:, :9].multiply(scale), state, starts_BT, block=16) for scale in (1, 1e20))
    chex.assert_trees_all_equal((loud[0][:, 9:], loud[1]), (quiet[0][:, 9:], quiet[1]))


@pytest.mark.parametrize("case", ["one document", "documents", "padding"])
def test_shards_read_apart_equal_one_device(float64, case):
    layer, x_BTD, state = example(length=36)
    starts_BT = random_starts(1, 36, 0.05) if case == "documents" else None
    length_WB = jnp.asarray([[12, 12], [12, 7], [5, 0]] if case == "padding" else [[12, 12]] * 3, jnp.int32)
    whole = run(layer, x_BTD, state, starts_BT, length_WB.sum(axis=0), block=8)

    @jax.jit
    def in_shards(layer, x_BTD, state, starts_BT):
        tables, zeros = cema.cema_tables(layer, "float64", 8), layer.init_state(BATCH, "float64")
        x_WBTD = jnp.stack(jnp.split(x_BTD, 3, axis=1))
        starts_WBT = None if starts_BT is None else jnp.stack(jnp.split(starts_BT, 3, axis=1))
        y_WBTD, ends = jax.vmap(lambda x, starts, length: layer(x, zeros, starts, length, tables=tables))(x_WBTD, starts_WBT, length_WB)
        cut_WB = None if starts_BT is None else starts_WBT.any(axis=2)
        states = cema.context_states(tables, state, ends, length_WB, cut_WB)
        before, last = jax.tree.map(lambda h: h[:-1], states), jax.tree.map(lambda h: h[-1], states)
        y_WBTD = jax.vmap(lambda y, h, starts: cema.add_incoming(tables, y, h, starts))(y_WBTD, before, starts_WBT)
        return jnp.concatenate(y_WBTD, axis=1), last

    y_BTD, last = in_shards(layer, x_BTD, state, starts_BT)
    lengths = length_WB.sum(axis=0)
    assert_close((valid(y_BTD, lengths), last), (valid(whole[0], lengths), whole[1]))


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("method", METHODS)
def test_no_token_and_one_token(method):
    layer, x_BTD, state = example(dtype="float32")
    y_BTD, same = run(layer, x_BTD[:, :0], state, method=method)
    assert y_BTD.shape == (BATCH, 0, CHANNELS)
    chex.assert_trees_all_equal(same, state)
    assert_close(run(layer, x_BTD[:, :1], state, method=method), run(layer, x_BTD[:, :1], state, method="scan"), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_saturated_weights_stay_finite(method):
    layer, x_BTD, state = example(dtype="float32")

    @jax.jit
    def gradients(layer, x_BTD, state):
        def loss(layer, x_BTD, state):
            y_BTD, end = layer(x_BTD, state, method=method, block=8)
            return jnp.sum(y_BTD**2) + sum(jnp.sum(h_BDN**2) for h_BDN in end)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(layer, x_BTD, state)

    for logits in ((50, 50, 50), (-50, 50, -50), (50, -50, 50), (-50, -50, -50), (1e4, 1e4, -1e4), (-1e4, -1e4, 1e4)):
        for parameter, logit in zip((layer.alpha, layer.delta, layer.theta), logits):
            parameter.set_value(np.full(parameter.shape, logit, np.float32))
        chex.assert_tree_all_finite(gradients(layer, x_BTD, state))
        chex.assert_tree_all_finite(cema.inference_tables(layer, 8))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_rounded_once(method):
    layer, x_BTD, state = example(dtype="float32")
    x_BTD = x_BTD.astype(jnp.bfloat16)
    y_BTD, end = run(layer, x_BTD, state, method=method)
    wide_BTD, wide_end = run(layer, x_BTD.astype(jnp.float32), state, method=method)
    assert y_BTD.dtype == jnp.bfloat16
    assert end.real_BDN.dtype == jnp.float32
    chex.assert_trees_all_close(y_BTD.astype(jnp.float32), wide_BTD, rtol=1.001 * 2**-8)
    assert_close(end, wide_end, 1e-5)


def test_inference_tables_round_once():
    """The nearest float32 to the values in float64, for weights whose angle at j = 32 is many turns."""
    layer, _, _ = example(dtype="float32")
    tables = cema.inference_tables(layer, 32)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float32), cema_tables(layer, "float64", 32))
    chex.assert_trees_all_close(tables, exact, rtol=1e-6, atol=1e-12)
    chex.assert_trees_all_close(tables, cema_tables(layer, "float32", 32), rtol=2e-6, atol=2e-6)


def test_initial_weights_are_the_official_ones():
    layer = CEMA(64, 16, nnx.Rngs(0))
    angles_D = np.sort(scipy.special.expit(np.asarray(layer.theta[...], np.float64)))
    np.testing.assert_allclose(angles_D, np.sort(64.0 ** (-np.arange(1, 65) / 64)), rtol=1e-6)
    assert not np.all(np.diff(np.asarray(layer.theta[...])) < 0), "not permuted"
    for parameter, spread in ((layer.alpha, 0.2), (layer.delta, 0.2), (layer.gamma[..., 0], 1), (layer.omega, 0.25)):
        assert abs(np.std(parameter[...]) / spread - 1) < 0.25
    assert not layer.gamma[..., 1].any()
    assert np.abs(layer.omega[...]).max() <= 1
    assert layer.alpha.get_metadata()["axes"] == ("channels", None)


def test_errors_of_the_user():
    with pytest.raises(UserError, match="channels is 1"):
        CEMA(1, 4, nnx.Rngs(0))
    layer, x_BTD, state = example(dtype="float32")
    with pytest.raises(UserError, match="fft"):
        layer(x_BTD, state, random_starts(0), method="fft")


# ---------------------------------------------------------------- long sequences


def test_error_at_64k_tokens():
    """Decays up to |q| = 1 - 1.4e-6, against a recurrent filter in float64 with the same float32 coefficients."""
    channels, order, length, rng = 8, 8, 65536, np.random.default_rng(0)
    layer = CEMA(channels, order, nnx.Rngs(0))
    for parameter in (layer.alpha, layer.delta):
        parameter.set_value(jnp.asarray(np.log(np.geomspace(1.2e-3, 0.5, channels * order).reshape(channels, order)), jnp.float32))
    x_TD = rng.normal(size=(length, channels)).astype(np.float32)
    tables = jax.tree.map(lambda x: np.asarray(x, np.float64), cema_tables(layer, "float32", 1))
    q_DN = np.exp(tables.log_decay_DN + 2j * np.pi * tables.turn_DN)
    eta_DN = tables.eta_DK[:, :order] + 1j * tables.eta_DK[:, order:]
    expected_TD = tables.omega_D * x_TD
    for d, n in np.ndindex(channels, order):
        h_T = scipy.signal.lfilter([tables.gain_DN[d, n]], [1, -q_DN[d, n]], x_TD[:, d].astype(complex))
        expected_TD[:, d] += (eta_DN[d, n] * h_T).real
    y_BTD, _ = run(layer, jnp.asarray(x_TD)[None], layer.init_state(1), block=32)
    error = np.sqrt(np.mean((np.asarray(y_BTD[0], np.float64) - expected_TD) ** 2) / np.mean(expected_TD**2))
    assert error < 5e-5


@pytest.mark.slow
def test_temporaries_stay_small():
    """In multiples of the input on CPU: 2.6 forward, 8 with gradients (as many with documents), and near 1 at 64K tokens."""
    layer = CEMA(256, 16, nnx.Rngs(0))
    state = layer.init_state(1)

    def temporaries(function, length, documents=False):
        x_BTD = jax.ShapeDtypeStruct((1, length, 256), jnp.float32)
        starts_BT = jax.ShapeDtypeStruct((1, length), jnp.bool_) if documents else None
        memory = jax.jit(function).lower(layer, x_BTD, state, starts_BT).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * 256 * length)

    read = functools.partial(CEMA.__call__, block=32)
    gradient = jax.grad(lambda *arguments: jnp.sum(read(*arguments)[0] ** 2), argnums=(0, 1))
    assert temporaries(read, 4096) < 2.6
    assert temporaries(read, 65536) < 1.2
    assert temporaries(gradient, 4096) < 8
    assert temporaries(gradient, 4096, documents=True) < 8
