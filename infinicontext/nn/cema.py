"""CEMA: MEGALODON's complex exponential moving average over time, per channel (Ma et al. 2024, arXiv 2404.08801, section 3.1).

Shape letters: B batch, T time (tokens in this call), D channels, N order (complex memories per channel), K = 2 N (real parts, then
imaginary parts), C block length, S blocks side by side, M = B S, R rounds (T <= R S C), W shards of a sequence split over devices.

Each channel keeps N damped oscillators h, which the coefficients q = |q| e^(i phi) shrink and turn and eta reads out:

    h_t[n] = q[n] h_(t-1)[n] + p[n] x_t          y_t = Re sum_n eta[n] h_t[n] + omega x_t

with p = sigmoid(alpha), |q| = 1 - p sigmoid(delta), phi[n] = 2 pi n sigmoid(theta) / N and eta = gamma / sqrt(N), as in the official
code. `_scan` is this definition. `_blocks` computes the same as matmuls: inside a block of C tokens y is a Toeplitz product with the
kernel k[j] = Re sum_n eta p q^j, and only h goes from block to block. `_fft` is the convolution with k over the whole call.

A new document begins with h = 0. All is computed in float32, or float64 where x is float64, and y cast once to x's dtype.
"""

import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.nn.parameters import at_least_float32, normal, use
from infinicontext.sharding import constrain

EXACT = jax.lax.Precision.HIGHEST


class CemaState(NamedTuple):
    """What a CEMA layer remembers of everything it has read: 8 D N bytes per row, however long the stream."""

    real_BDN: jax.Array  # float32 or wider, Re h after the last token
    imag_BDN: jax.Array  # Im h


class Tables(NamedTuple):
    """Everything that depends on the parameters only: worth computing once for many calls. About D K (C + 3) numbers."""

    gain_DN: jax.Array  # p
    log_decay_DN: jax.Array  # log |q|
    turn_DN: jax.Array  # phi / 2 pi, in (-1/2, 1/2]
    eta_DK: jax.Array
    omega_D: jax.Array
    kernel_DC: jax.Array  # k[j], with omega added to k[0]
    power_DKC: jax.Array  # q^j for j = 0 to C: C + 1 columns


class CEMA(nnx.Module):
    """The layer: official parameters and their initialisation (official code, complex_exponential_moving_average.py)."""

    def __init__(self, channels: int, order: int, rngs: nnx.Rngs):
        """channels: D, 2 or more (else UserError). order: N."""
        if channels < 2:
            raise UserError(f"cema: channels is {channels}; it must be 2 or more, because the initial angles are d^(-i/d)")
        self.alpha = normal(rngs(), (channels, order), ("channels", None), 0.2)
        self.delta = normal(rngs(), (channels, order), ("channels", None), 0.2)
        angles_D = scipy.special.logit(channels ** (-np.arange(1, channels + 1) / channels)).astype(np.float32)
        self.theta = nnx.Param(jax.random.permutation(rngs(), angles_D), axes=("channels",), group="default")
        gamma_DN = jax.random.normal(rngs(), (channels, order), jnp.float32)
        self.gamma = nnx.Param(jnp.stack([gamma_DN, jnp.zeros_like(gamma_DN)], axis=-1), axes=("channels", None, None), group="default")
        # Standard deviation 1/4, cut at +-1.
        omega_D = jax.random.truncated_normal(rngs(), -4, 4, (channels,), jnp.float32) / 4
        self.omega = nnx.Param(omega_D, axes=("channels",), group="default")

    def init_state(self, batch_size: int, dtype: jnp.dtype | str = "float32") -> CemaState:
        """The state before the first token, in float32 or float64."""
        zeros_BDN = constrain(jnp.zeros((batch_size, *self.alpha.shape), dtype), ("batch", "channels", None))
        return CemaState(zeros_BDN, zeros_BDN)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: CemaState,
        starts_BT: jax.Array | None = None,
        length_B: jax.Array | None = None,
        *,
        method: Literal["block", "scan", "fft"] = "block",
        block: int | None = None,
        tables: Tables | None = None,
    ) -> tuple[jax.Array, CemaState]:
        """Reads T tokens, 0 or more, from wherever the stream stands.

        Args:
          x_BTD: any float dtype.
          state: after the last token before x.
          starts_BT: bool, True where a token begins a new document, for which all before is forgotten; None: nowhere.
          length_B: int32, number of valid tokens of each row; the rest is padding, whose outputs are finite and mean nothing. None: T.
          method: "block" for speed, "scan" the definition token by token, "fft" for comparison only (neither documents nor padding).
          block: tokens per block of "block"; None: 32 on CPU, 64 on GPU, 128 on TPU.
          tables: from `cema_tables` or `inference_tables`, in place of the parameters and `block`.

        Returns:
          y_BTD in x's dtype and the state after each row's last valid token, in float32 or wider.

        Raises:
          UserError: "fft" with documents or padding.
        """
        dtype, T = at_least_float32(x_BTD.dtype), x_BTD.shape[1]
        chex.assert_shape(x_BTD, (None, None, self.alpha.shape[0]))
        chex.assert_shape(list(state), (x_BTD.shape[0], *self.alpha.shape))
        chex.assert_shape([] if starts_BT is None else [starts_BT], x_BTD.shape[:2])
        chex.assert_shape([] if length_B is None else [length_B], x_BTD.shape[:1])
        state = CemaState(*(h_BDN.astype(dtype) for h_BDN in state))
        if T == 0:
            return x_BTD, state
        method = "scan" if T == 1 else method
        tables = cema_tables(self, dtype, block if method == "block" else 1) if tables is None else tables
        chex.assert_type(tables.kernel_DC, dtype)
        return {"block": _blocks, "scan": _scan, "fft": _fft}[method](x_BTD, state, tables, starts_BT, length_B)


def cema_tables(layer: CEMA, dtype: jnp.dtype | str = "float32", block: int | None = None) -> Tables:
    """The tables of a layer. Compute them outside of loops over segments and of jax.checkpoint. dtype: float32 or float64."""
    return _tables([use(w, dtype) for w in (layer.alpha, layer.delta, layer.theta, layer.gamma, layer.omega)], block, jnp)


def inference_tables(layer: CEMA, block: int | None = None) -> Tables:
    """The tables of a layer that no longer changes, computed in float64 on the host and rounded to float32 once; not for use inside jit.

    For slow decays the rounding of q dominates every float32 algorithm; this avoids it. Stacked layers give stacked tables.
    """
    if layer.alpha.ndim > 2:
        layers = [inference_tables(jax.tree.map(lambda w, i=i: w[i], layer), block) for i in range(layer.alpha.shape[0])]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    weights = [np.asarray(w[...], np.float64) for w in (layer.alpha, layer.delta, layer.theta, layer.gamma, layer.omega)]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), _tables(weights, block, np))


def _tables(weights, block: int | None, xp) -> Tables:
    """With xp = numpy or jax.numpy."""
    sigmoid = scipy.special.expit if xp is np else jax.nn.sigmoid
    alpha_DN, delta_DN, theta_D, gamma_DN2, omega_D = weights
    N = alpha_DN.shape[1]
    if block is None:
        # On 2 CPU cores 32 was fastest; larger blocks fill the matrix units of accelerators.
        block = {"cpu": 32, "tpu": 128}.get(jax.default_backend(), 64)
    gain_DN = sigmoid(alpha_DN)
    # Where both saturate |q| would be 0 and its logarithm infinite.
    damping_DN = xp.minimum(gain_DN * sigmoid(delta_DN), 1 - float(xp.finfo(gain_DN.dtype).epsneg))
    n_1N = xp.arange(1, N + 1, dtype=theta_D.dtype)[None]
    # A turn and what it lacks to a whole one, each without cancellation; the smaller has the digits.
    turn_DN, rest_DN = n_1N * sigmoid(theta_D)[:, None] / N, (N - n_1N + n_1N * sigmoid(-theta_D)[:, None]) / N
    turn_DN, log_decay_DN = xp.where(turn_DN <= 0.5, turn_DN, -rest_DN), xp.log1p(-damping_DN)
    eta_DN2 = gamma_DN2 / math.sqrt(N)
    real_DNC, imag_DNC = _powers(log_decay_DN[..., None], turn_DN[..., None], xp.arange(block + 1)[None, None], xp)
    kernel_DNC = gain_DN[..., None] * (eta_DN2[..., :1] * real_DNC - eta_DN2[..., 1:] * imag_DNC)
    kernel_DC = xp.sum(kernel_DNC[..., :block], axis=1)
    kernel_DC = xp.concatenate([kernel_DC[:, :1] + omega_D[:, None], kernel_DC[:, 1:]], axis=1)
    eta_DK = xp.concatenate([eta_DN2[..., 0], eta_DN2[..., 1]], axis=1)
    return Tables(gain_DN, log_decay_DN, turn_DN, eta_DK, omega_D, kernel_DC, xp.concatenate([real_DNC, imag_DNC], axis=1))


def _powers(log_decay, turn, j, xp=jnp):
    """Re and Im of q^j for integers 0 <= j < 2^21; all arguments broadcast.

    A float32 j * turn would lose digits of the angle as j grows. The large part of `turn` has so few digits that its product is exact and
    whole turns can be taken off without loss.
    """
    coarse = xp.round(turn * 2**13) / 2**13
    low, high, j = (part.astype(turn.dtype) for part in (j % 2**10, j // 2**10 * 2**10, j))
    fraction = low * coarse - xp.round(low * coarse) + (high * coarse - xp.round(high * coarse))
    angle, size = 2 * math.pi * (fraction + j * (turn - coarse)), xp.exp(j * log_decay)
    return size * xp.cos(angle), size * xp.sin(angle)


def _times(a, b, axis: int = -1):
    """Complex product of arrays whose `axis` holds real parts, then imaginary parts."""
    (a_real, a_imag), (b_real, b_imag) = jnp.split(a, 2, axis), jnp.split(b, 2, axis)
    return jnp.concatenate([a_real * b_real - a_imag * b_imag, a_real * b_imag + a_imag * b_real], axis)


def _join(state: CemaState):
    """Two arrays [..., B, D, N] -> one [..., D, B, K], the layout of the matmuls."""
    return jnp.swapaxes(jnp.concatenate(state, axis=-1), -2, -3)


def _split(h_DBK) -> CemaState:
    return CemaState(*jnp.split(jnp.swapaxes(h_DBK, -2, -3), 2, axis=-1))


def _scan(x_BTD, state, tables, starts_BT, length_B):
    """One token at a time: for decoding, and what the other forms are compared with."""
    gain_ND, log_decay_ND, turn_ND, omega_D = tables.gain_DN.T, tables.log_decay_DN.T, tables.turn_DN.T, tables.omega_D
    eta_real_ND, eta_imag_ND = jnp.split(tables.eta_DK.T, 2)
    # q - 1 without cancellation, for h + (q - 1) h: a float32 q close to 1 has lost 1 - q.
    angle_ND = 2 * math.pi * turn_ND
    change_real_ND = jnp.expm1(log_decay_ND) * jnp.cos(angle_ND) - 2 * jnp.sin(angle_ND / 2) ** 2
    change_imag_ND = jnp.exp(log_decay_ND) * jnp.sin(angle_ND)

    def step(h, xs):
        t, x_BD, starts_B = xs
        x_BD = x_BD.astype(omega_D.dtype)
        real_BND, imag_BND = h if starts_B is None else (jnp.where(starts_B[:, None, None], 0, h_BND) for h_BND in h)
        new_real_BND = real_BND + (change_real_ND[None] * real_BND - change_imag_ND[None] * imag_BND + gain_ND[None] * x_BD[:, None])
        new_imag_BND = imag_BND + (change_real_ND[None] * imag_BND + change_imag_ND[None] * real_BND)
        y_BD = jnp.sum(eta_real_ND[None] * new_real_BND - eta_imag_ND[None] * new_imag_BND, axis=1) + omega_D[None] * x_BD
        new = (new_real_BND, new_imag_BND)
        if length_B is not None:
            new = tuple(jnp.where((t < length_B)[:, None, None], new_BND, h_BND) for new_BND, h_BND in zip(new, h))
        return new, y_BD.astype(x_BTD.dtype)

    xs = (jnp.arange(x_BTD.shape[1], dtype=jnp.int32), jnp.moveaxis(x_BTD, 1, 0), None if starts_BT is None else starts_BT.T)
    h, y_TBD = jax.lax.scan(step, tuple(jnp.swapaxes(h_BDN, 1, 2) for h_BDN in state), xs)
    return jnp.moveaxis(y_TBD, 0, 1), CemaState(*(jnp.swapaxes(h_BND, 1, 2) for h_BND in h))


def _blocks(x_BTD, state, tables, starts_BT, length_B):
    """Blocks of C tokens, side by side within a round; rounds one after the other.

    On CPU a round has about 512 tokens, so that its temporaries stay near the caches; elsewhere one round has all.
    """
    (B, T, D), C, dtype = x_BTD.shape, tables.kernel_DC.shape[1], tables.kernel_DC.dtype
    rounds = max(1, round(T / 512)) if jax.default_backend() == "cpu" else 1
    S = -(-T // (rounds * C))
    ragged = length_B is not None or rounds * S * C > T
    into_DKC, out_DKC, toeplitz_DCC = _operators(tables)
    # bfloat16 tokens need fewer passes of a bfloat16 matrix unit, and the kernel still keeps more digits than the output.
    precision = jax.lax.Precision.HIGH if x_BTD.dtype == jnp.bfloat16 else EXACT

    @jax.checkpoint
    def one_round(h_DBK, xs):
        x_BSCD, starts_BSC, full_BS = xs
        x_DMC = jnp.moveaxis(x_BSCD, 3, 0).reshape(D, B * S, C).astype(dtype)
        kept_DMC, factor_DBSK = x_DMC, tables.power_DKC[:, None, None, :, C]
        if starts_BSC is not None:
            # Only what follows a block's last start enters the state; only what precedes its first start reads the state.
            document_MC = jnp.cumsum(starts_BSC.reshape(B * S, C), axis=1, dtype=jnp.int32)
            kept_DMC = jnp.where(document_MC == document_MC[:, -1:], x_DMC, 0)
            factor_DBSK = jnp.where(document_MC[:, -1].reshape(1, B, S, 1) == 0, factor_DBSK, 0)
        added_DBSK = jnp.einsum("dmc,dkc->dmk", kept_DMC, into_DKC, precision=EXACT).reshape(D, B, S, -1)
        if full_BS is not None:
            # A block with padding leaves h as it is, for `_finish`.
            factor_DBSK = jnp.where(full_BS[None, ..., None], factor_DBSK, tables.power_DKC[:, None, None, :, 0])
            added_DBSK = jnp.where(full_BS[None, ..., None], added_DBSK, 0)
        before_DBSK, h_DBK = _carry(h_DBK, factor_DBSK, added_DBSK)
        y_DMC = jnp.einsum("dmk,dkc->dmc", before_DBSK.reshape(D, B * S, -1), out_DKC, precision=EXACT)
        if starts_BSC is None:
            y_DMC += jnp.einsum("dms,dst->dmt", x_DMC, toeplitz_DCC, precision=precision)
        else:
            y_DMC = jnp.where(document_MC == 0, y_DMC, 0) + _within_documents(x_DMC, toeplitz_DCC, document_MC, precision)
        return h_DBK, jnp.moveaxis(y_DMC.reshape(D, B, S, C), 0, 3).astype(x_BTD.dtype)

    def rounds_of(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, rounds * S * C - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, rounds, S, C, *x_BT.shape[2:]), 1, 0)

    length_B = jnp.full(B, T, jnp.int32) if length_B is None else length_B.astype(jnp.int32)
    end_R1S = C * jnp.arange(1, rounds * S + 1, dtype=jnp.int32).reshape(rounds, 1, S)
    full_RBS = end_R1S <= length_B[None, :, None] if ragged else None
    xs = (rounds_of(x_BTD), None if starts_BT is None else rounds_of(starts_BT), full_RBS)
    h_DBK, y_RBSCD = jax.lax.scan(one_round, _join(state), xs)
    if ragged:
        h_DBK = _finish(x_BTD, h_DBK, tables.power_DKC, into_DKC, starts_BT, length_B)
    return jnp.moveaxis(y_RBSCD, 0, 1).reshape(B, -1, D)[:, :T], _split(h_DBK)


def _operators(tables):
    """The matrices of one block: tokens into state, state into outputs, tokens into outputs."""
    D, C = tables.kernel_DC.shape
    into_DKC = jnp.tile(tables.gain_DN, (1, 2))[..., None] * jnp.flip(tables.power_DKC[..., :C], axis=2)
    # Re(a h) = Re a Re h - Im a Im h.
    out_real_DNC, out_imag_DNC = jnp.split(_times(tables.eta_DK[..., None], tables.power_DKC[..., 1:], axis=1), 2, axis=1)
    out_DKC = jnp.concatenate([out_real_DNC, -out_imag_DNC], axis=1)
    # [s, t] = k[t - s] for t >= s, by reading rows of k and C zeros with a shift of one; indexing would make its gradient a scatter.
    rows_DCC = jnp.broadcast_to(jnp.pad(tables.kernel_DC, ((0, 0), (0, C)))[:, None], (D, C, 2 * C))
    toeplitz_DCC = rows_DCC.reshape(D, 2 * C * C)[:, : C * (2 * C - 1)].reshape(D, C, 2 * C - 1)[..., :C]
    return into_DKC, out_DKC, toeplitz_DCC


def _carry(h_DBK, factor_DBSK, added_DBSK):
    """The state before each of S pieces and after the last, from h_next = factor h + added. factor: [D, B, S, K] or [D, 1, 1, K]."""
    if jax.default_backend() == "gpu":
        # Hundreds of small steps would each wait for a launch.
        join = lambda first, then: (_times(then[0], first[0]), _times(then[0], first[1]) + then[1])
        factor_DBSK = jnp.broadcast_to(factor_DBSK, added_DBSK.shape)
        factor_DBSK, added_DBSK = jax.lax.associative_scan(join, (factor_DBSK, added_DBSK), axis=2)
        after_DBSK = _times(factor_DBSK, h_DBK[:, :, None]) + added_DBSK
        return jnp.concatenate([h_DBK[:, :, None], after_DBSK[:, :, :-1]], axis=2), after_DBSK[:, :, -1]

    def step(h_DBK, xs):
        added_DBK, factor_DBK = xs
        return _times(factor_DBSK[:, :, 0] if factor_DBK is None else factor_DBK, h_DBK) + added_DBK, h_DBK

    xs = (added_DBSK, factor_DBSK if factor_DBSK.shape == added_DBSK.shape else None)
    h_DBK, before_SDBK = jax.lax.scan(step, h_DBK, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), xs))
    return jnp.moveaxis(before_SDBK, 0, 2), h_DBK


def _within_documents(x_DMC, toeplitz_DCC, document_MC, precision):
    """The Toeplitz product over pairs of tokens of the same document.

    By halves: a pair with one token in each half belongs to the one document that crosses the middle, so there the mask is a product of a
    mask of inputs and one of outputs, and a plain matmul remains. The pairs within a half are the same problem in half the size.
    """
    D, M, C = x_DMC.shape
    if C % 2 or C <= 8:
        # Few enough to go lag by lag.
        y_DMC = toeplitz_DCC[:, :1, :1] * x_DMC
        for lag in range(1, C):
            same_MC = document_MC[:, lag:] == document_MC[:, :-lag]
            later_DMC = jnp.where(same_MC, toeplitz_DCC[:, :1, lag : lag + 1] * x_DMC[..., :-lag], 0)
            y_DMC += jnp.pad(later_DMC, ((0, 0), (0, 0), (lag, 0)))
        return y_DMC
    half = C // 2
    crossing_M1 = document_MC[:, half - 1 : half]
    left_DMC = jnp.where(document_MC[:, :half] == crossing_M1, x_DMC[..., :half], 0)
    right_DMC = jnp.einsum("dms,dst->dmt", left_DMC, toeplitz_DCC[:, :half, half:], precision=precision)
    right_DMC = jnp.where(document_MC[:, half:] == crossing_M1, right_DMC, 0)
    halves = (x_DMC.reshape(D, 2 * M, half), toeplitz_DCC[:, :half, :half], document_MC.reshape(2 * M, half))
    return _within_documents(*halves, precision).reshape(D, M, C) + jnp.pad(right_DMC, ((0, 0), (0, 0), (half, 0)))


def _finish(x_BTD, h_DBK, power_DKC, into_DKC, starts_BT, length_B):
    """From h after each row's last full block to h after its last valid token: the rest is read as a block that ends with that token."""
    C = into_DKC.shape[2]
    rest_B = length_B % C
    first_B = length_B - rest_B
    power_DBK = jnp.moveaxis(jnp.take(power_DKC, rest_B, axis=2), 2, 1)
    h_DBK = _times(power_DBK, h_DBK)
    if starts_BT is not None:
        t_1T = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        start_B = jnp.max(jnp.where(starts_BT & (t_1T < length_B[:, None]), t_1T, -1), axis=1)
        h_DBK = jnp.where((start_B < first_B)[:, None], h_DBK, 0)
        first_B = jnp.maximum(first_B, start_B)
    t_BC = length_B[:, None] + jnp.arange(-C, 0, dtype=jnp.int32)[None]
    last_BCD = jnp.take_along_axis(x_BTD, jnp.maximum(t_BC, 0)[..., None], axis=1).astype(h_DBK.dtype)
    last_BCD = jnp.where((t_BC >= first_B[:, None])[..., None], last_BCD, 0)
    return h_DBK + jnp.einsum("bcd,dkc->dbk", last_BCD, into_DKC, precision=EXACT)


def _fft(x_BTD, state, tables, starts_BT, length_B):
    """y = k * x + Re sum_n eta q^(t+1) h by FFT; D N T numbers of memory for the powers of q."""
    if starts_BT is not None or length_B is not None:
        raise UserError('cema: method is "fft", which knows neither documents nor padding; use "block" or "scan"')
    dtype, T = tables.omega_D.dtype, x_BTD.shape[1]
    j_11T = jnp.arange(T + 1, dtype=jnp.int32)[None, None]
    q_DNT = jax.lax.complex(*_powers(tables.log_decay_DN[..., None], tables.turn_DN[..., None], j_11T))
    h_BDN, eta_DN = jax.lax.complex(*state), jax.lax.complex(*jnp.split(tables.eta_DK, 2, axis=1))
    gain_DN, wide_BTD = tables.gain_DN.astype(q_DNT.dtype), x_BTD.astype(dtype)
    kernel_TD = jnp.einsum("dn,dnt->td", eta_DN * gain_DN, q_DNT[..., :T], precision=EXACT).real
    spectrum_BFD = jnp.fft.rfft(wide_BTD, 2 * T, axis=1) * jnp.fft.rfft(kernel_TD, 2 * T, axis=0)[None]
    y_BTD = jnp.fft.irfft(spectrum_BFD, 2 * T, axis=1)[:, :T] + tables.omega_D[None, None] * wide_BTD
    y_BTD += jnp.einsum("bdn,dnt->btd", eta_DN[None] * h_BDN, q_DNT[..., 1:], precision=EXACT).real
    added_BDN = jnp.einsum("dnt,btd->bdn", q_DNT[..., T - 1 :: -1], wide_BTD.astype(q_DNT.dtype), precision=EXACT)
    h_BDN = q_DNT[None, ..., T] * h_BDN + gain_DN[None] * added_BDN
    return y_BTD.astype(x_BTD.dtype), CemaState(h_BDN.real, h_BDN.imag)


def context_states(tables: Tables, first: CemaState, ends: CemaState, length_WB: jax.Array, cut_WB: jax.Array | None = None) -> CemaState:
    """The states before each shard of a sequence whose tokens are split over W devices, and after the last: [W + 1, B, D, N].

    Each device reads its shard from a zero state; the end states, which are small, are gathered and joined here by the recurrence with
    shards in the place of tokens; entry w is what `add_incoming` takes on device w.

    Args:
      tables: of the layer.
      first: state before the whole sequence.
      ends: [W, B, D, N], state after each shard when read from a zero state.
      length_WB: int32, valid tokens per shard and row, below 2^21; [1, 1] where all are the same.
      cut_WB: bool, whether a document starts within the shard; None: nowhere.
    """
    length_BW1 = length_WB.T[..., None]
    factor_DBWK = jnp.concatenate(_powers(tables.log_decay_DN[:, None, None], tables.turn_DN[:, None, None], length_BW1[None]), axis=-1)
    if cut_WB is not None:
        factor_DBWK = jnp.where(cut_WB.T[None, ..., None], 0, factor_DBWK)
    end_DBWK = jnp.moveaxis(_join(ends), 0, 2)
    before_DBWK, last_DBK = _carry(_join(first), jnp.broadcast_to(factor_DBWK, end_DBWK.shape), end_DBWK)
    return _split(jnp.moveaxis(jnp.concatenate([before_DBWK, last_DBK[:, :, None]], axis=2), 2, 0))


def add_incoming(tables: Tables, y_BTD: jax.Array, incoming: CemaState, starts_BT: jax.Array | None = None) -> jax.Array:
    """Outputs of a run from a zero state -> those of a run from `incoming`: y_t + Re sum_n eta q^(t+1) h, up to the first new document."""
    (B, T, D), C = y_BTD.shape, tables.kernel_DC.shape[1]
    begin_S1 = jnp.arange(0, T, C, dtype=jnp.int32)[:, None]
    power_DSK = jnp.concatenate(_powers(tables.log_decay_DN[:, None], tables.turn_DN[:, None], begin_S1[None]), axis=-1)
    before_DBSK = _times(power_DSK[:, None], _join(incoming)[:, :, None])
    added_BTD = jnp.einsum("dbsk,dkc->bscd", before_DBSK, _operators(tables)[1], precision=EXACT).reshape(B, -1, D)[:, :T]
    if starts_BT is not None:
        added_BTD = jnp.where(jnp.cumsum(starts_BT, axis=1)[..., None] == 0, added_BTD, 0)
    return (y_BTD.astype(added_BTD.dtype) + added_BTD).astype(y_BTD.dtype)
