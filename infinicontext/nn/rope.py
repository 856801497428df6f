"""Rotary position embedding (Su et al. 2021) and the ways of stretching it over longer texts.

Shape letters: B batch, T time, H heads, K head size, R pairs (half of the dims that rotate; pair i is dims i and i + R).

A scheme turns the frequencies base^(-i / R) into others and may give an attention factor, which multiplies cos and sin and so enters the
attention logits squared. `rope_table` computes both on the host in float64; `rotation` runs once per call of a model; `apply_rope` in every
layer.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.errors import UserError

_LENGTHS = ("factor", "original_length", "length")
# The fields each scheme reads, beside `base` and `partial`.
ROPE_FIELDS = {
    "default": (),
    "linear": _LENGTHS,
    "ntk": _LENGTHS,
    "dynamic": _LENGTHS,
    "yarn": (*_LENGTHS, "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "llama3": (*_LENGTHS, "low_frequency_factor", "high_frequency_factor"),
    "longrope": (
        *(*_LENGTHS, "short_factors", "long_factors", "start_tokens"),
        *("attention_factor", "short_attention_factor", "long_attention_factor"),
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn queries and keys. A field that the scheme does not read must keep its default.

    Schemes: `linear` position interpolation (Chen et al. 2023), `ntk` with a fixed and `dynamic` with a length-dependent base (bloc97 and
    emozilla 2023), `yarn` (Peng et al. 2023), `llama3` (Llama 3.1), `longrope` with one factor per pair (Ding et al. 2024).

    Raises:
      UserError: a field is missing, superfluous or out of range.
    """

    scheme: Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"] = "default"
    base: float = 10000.0  # the slowest pair turns about 1 / base radians per token
    partial: float = 1.0  # share of the head dimension that rotates, rounded down to whole dims; the rest passes through
    factor: float | None = None  # how many times longer the text gets; None: length / original_length (`dynamic` needs it)
    original_length: int | None = None  # tokens the model was first trained on
    length: int | None = None  # longest text the model is meant for; `dynamic` and `longrope` plan for it where no length is planned
    beta_fast: float = 32.0  # yarn: pairs with more turns than this in original_length keep their frequency
    beta_slow: float = 1.0  # yarn: pairs with fewer turns than this are slowed down by the whole factor
    truncate: bool = True  # yarn: the two bounds fall on whole pairs
    mscale: float | None = None  # yarn: with mscale_all_dim, the attention factor is a quotient; read only if both are set and not 0
    mscale_all_dim: float | None = None  # yarn: the quotient's lower part
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; None: the scheme's formula
    low_frequency_factor: float = 1.0  # llama3: as beta_slow
    high_frequency_factor: float = 4.0  # llama3: as beta_fast
    short_factors: tuple[float, ...] | None = None  # longrope: divisors of the R frequencies for texts up to original_length; None: all 1
    long_factors: tuple[float, ...] | None = None  # longrope: divisors for longer texts
    start_tokens: int = 0  # longrope: first positions of longer texts, which turn as without factors and without an attention factor
    short_attention_factor: float | None = None  # longrope: the attention factor that goes with short_factors, if it has its own
    long_attention_factor: float | None = None  # longrope: the same for long_factors

    def __post_init__(self):
        if self.scheme not in ROPE_FIELDS:
            raise UserError(f"rope.scheme is {self.scheme}; it must be one of {', '.join(ROPE_FIELDS)}")

        def require(name: str, valid: bool, allowed: str):
            if not valid:
                raise UserError(f"rope.{name} is {getattr(self, name)}; with rope.scheme {self.scheme} it must be {allowed}")

        for field in dataclasses.fields(self):
            if field.name not in ("scheme", "base", "partial", *ROPE_FIELDS[self.scheme]):
                require(field.name, getattr(self, field.name) == field.default, f"{field.default}, since nothing reads it")
        require("base", self.base > 1, "greater than 1")
        require("partial", 0 < self.partial <= 1, "greater than 0 and at most 1")
        if self.scheme in ("dynamic", "yarn", "llama3", "longrope"):
            require("original_length", self.original_length is not None, "given")
        if self.original_length is not None:
            require("original_length", self.original_length >= 2, "2 or more")
        if self.length is not None:
            require("length", self.length >= (self.original_length or 1), f"{self.original_length or 1} or more")
        if self.scheme == "dynamic":
            require("factor", self.factor is not None, "given")
        elif self.scheme != "default":
            lengths = None not in (self.length, self.original_length)
            require("factor", self.factor is not None or lengths, "given unless rope.length and rope.original_length are")
        require("factor", self.factor is None or self.factor >= 1, "1 or more")
        require("beta_slow", self.beta_slow > 0, "greater than 0")
        require("beta_fast", self.beta_fast >= self.beta_slow, f"at least rope.beta_slow, {self.beta_slow}")
        low = self.low_frequency_factor
        require("low_frequency_factor", low > 0, "greater than 0")
        require("high_frequency_factor", self.high_frequency_factor > low, f"greater than rope.low_frequency_factor, {low}")
        require("start_tokens", self.start_tokens >= 0, "0 or more")
        require("long_factors", self.long_factors is not None or self.scheme != "longrope", "given")
        for name in ("short_factors", "long_factors"):
            require(name, all(factor > 0 for factor in getattr(self, name) or ()), "numbers greater than 0")
        for name in ("attention_factor", "short_attention_factor", "long_attention_factor"):
            value = getattr(self, name)
            require(name, value is None or value > 0, "greater than 0")

    @property
    def planned(self) -> int:
        """Tokens a stream is planned for where nothing is said: the longest it is meant for, or those it was trained on; 0: unknown."""
        return self.length or self.original_length or 0


class RopeTable(NamedTuple):
    """What a scheme comes to for one head size, on the host."""

    inverse_frequency: np.ndarray  # float64 [R], radians per token
    attention_factor: float  # multiplies cos and sin


class Turns(NamedTuple):
    """A table in fixed point, 2^32 ticks to a turn: arrays of the host or traced, for all rows, or with axes [B, 1, ...] for each."""

    whole_R: jax.Array | np.ndarray  # int32, ticks per token, modulo 2^32
    rest_R: jax.Array | np.ndarray  # float, the fraction of a tick left over
    attention_factor: jax.Array | np.ndarray | float


class Stretch(NamedTuple):
    """A table in place of a config's whose numbers may be traced: what a search for factors tries (longrope/search.py)."""

    turns: Turns  # arrays [R]
    start_tokens: jax.Array | np.ndarray  # int32, first positions, which turn by the config's frequencies without any scheme


def rope_table(config: RopeConfig, head_dim: int, planned_length: int | None = None) -> RopeTable:
    """The frequencies and the attention factor of a scheme, in float64.

    `dynamic` and `longrope` depend on how long the text will get. Here that is a plan, made once for a stream, so that all its tokens turn
    by one table and the outputs do not depend on how the stream is split into calls. Hugging Face transformers goes by the length reached
    so far instead, and so may keep cached keys that were turned by another table.

    Args:
      config: the scheme.
      head_dim: size of a head, of which a share `config.partial` rotates.
      planned_length: tokens the stream will have in the end. `dynamic` plans for original_length at least; `longrope` takes the long
        factors if this is greater than original_length. None: config.planned. Other schemes do not read it.

    Raises:
      UserError: an odd number of dims would rotate, or a list of factors does not have one for each pair.
    """
    rotary = int(head_dim * config.partial)
    if rotary < 2 or rotary % 2:
        raise UserError(f"rope.partial is {config.partial}, so {rotary} of {head_dim} head dims would rotate; that must be even and not 0")
    pairs = rotary // 2
    for name in ("short_factors", "long_factors"):
        factors = getattr(config, name)
        if factors is not None and len(factors) != pairs:
            raise UserError(f"rope.{name} has {len(factors)} entries; {rotary} of {head_dim} head dims rotate, so it must have {pairs}")

    i_R = np.arange(pairs)
    theta_R = config.base ** (-i_R / pairs)
    original = config.original_length
    planned = config.planned if planned_length is None else planned_length
    s = config.factor or (config.length / original if config.length and original else 1.0)

    match config.scheme:
        case "default":
            return RopeTable(theta_R, 1.0)
        case "linear":
            return RopeTable(theta_R / s, 1.0)
        case "ntk":
            return RopeTable(theta_R / _ntk_factors(s, pairs), 1.0)
        case "dynamic":
            return RopeTable(theta_R / _ntk_factors(s * max(planned / original, 1) - (s - 1), pairs), 1.0)
        case "yarn":
            return _yarn_table(config, theta_R, s)
        case "llama3":
            low, high = config.low_frequency_factor, config.high_frequency_factor
            turns_R = original * theta_R / (2 * np.pi)
            keep_R = np.clip((turns_R - low) / (high - low), 0, 1)
            return RopeTable(theta_R * (keep_R + (1 - keep_R) / s), 1.0)
        case "longrope":
            if planned > original:
                factors, own = config.long_factors, config.long_attention_factor
            else:
                factors, own = config.short_factors or (1.0,) * pairs, config.short_attention_factor
            attention_factor = own or config.attention_factor or math.sqrt(1 + math.log(s) / math.log(original))
            return RopeTable(theta_R / np.array(factors, np.float64), attention_factor)


def _ntk_factors(s: float, pairs: int) -> np.ndarray:
    """s^(i / (R - 1)), the same as a base of base * s^(R / (R - 1)): the fastest pair keeps its frequency, the slowest is divided by s."""
    return s ** (np.arange(pairs) / max(pairs - 1, 1))


def _yarn_table(config: RopeConfig, theta_R: np.ndarray, s: float) -> RopeTable:
    """YaRN, sections 3.2 to 3.4: fast pairs keep their frequency, slow ones are interpolated, a ramp over the pairs lies between."""
    pairs = len(theta_R)

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes so many turns in the original length."""
        return pairs * math.log(config.original_length / (2 * math.pi * turns)) / math.log(config.base)

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper clamp counts dims, not pairs: so do the published models.
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    slow_R = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(s) + 1

    if config.attention_factor is not None:
        attention_factor = config.attention_factor
    elif config.mscale and config.mscale_all_dim:
        attention_factor = magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    else:
        attention_factor = magnitude(1)
    return RopeTable(theta_R * (1 - slow_R + slow_R / s), attention_factor)


def rotation(
    config: RopeConfig,
    head_dim: int,
    positions_BT: jax.Array,
    planned_B: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    stretch: Stretch | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every pair's angle, by the table that each row's plan asks for.

    Args:
      config: the scheme.
      head_dim: size of a head.
      positions_BT: int32.
      planned_B: int32, tokens each row will have in the end, as `planned_length` of `rope_table`; may be traced, so that a change of plan
        compiles nothing anew. Beyond original_length `dynamic` computes its frequencies in `dtype`; in float32 its angles are off by
        2e-4 radians at position 4,000 and 4e-2 at a million, and its cos by 8e-3 at 131,071 and 0.11 at 2,097,151 (128 dims, base 1e4).
      dtype: float32 or float64.
      stretch: a table in place of the config's, for all rows.

    Returns:
      cos_BTR and sin_BTR, times the attention factor.
    """
    original, plan_B11 = config.original_length, planned_B[:, None, None]
    if stretch is not None:
        turned = rope_cos_sin(stretch.turns, positions_BT, dtype)
        return _with_start(config, head_dim, positions_BT, turned, positions_BT < stretch.start_tokens)
    if config.scheme == "longrope":
        short, long = (fixed_point(rope_table(config, head_dim, length)) for length in (original, original + 1))
        turns = jax.tree.map(lambda short, long: jnp.where(plan_B11 > original, long, short), short, long)
    elif config.scheme == "dynamic":
        exact = fixed_point(rope_table(config, head_dim, original))
        theta_R = rope_table(config, head_dim, original).inverse_frequency
        pairs, s = len(theta_R), config.factor
        stretch_B11 = s * jnp.maximum(plan_B11 / original, 1).astype(dtype) - (s - 1)
        exponent_R = jnp.arange(pairs, dtype=dtype) / max(pairs - 1, 1)
        ticks_B1R = jnp.asarray(theta_R * _TICKS, dtype)[None, None] / stretch_B11 ** exponent_R[None, None]
        whole_B1R, rest_B1R = jnp.round(ticks_B1R).astype(jnp.int32), ticks_B1R - jnp.round(ticks_B1R)
        beyond_B11 = plan_B11 > original
        turns = Turns(
            jnp.where(beyond_B11, whole_B1R, exact.whole_R),
            jnp.where(beyond_B11, rest_B1R, jnp.asarray(exact.rest_R, dtype)[None, None]),
            1.0,
        )
    else:
        turns = fixed_point(rope_table(config, head_dim))
    turned = rope_cos_sin(turns, positions_BT, dtype)
    if not config.start_tokens:
        return turned
    return _with_start(config, head_dim, positions_BT, turned, (positions_BT < config.start_tokens) & (planned_B[:, None] > original))


def _with_start(config: RopeConfig, head_dim: int, positions_BT, turned, start_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, at a text's start as they are without a scheme (LongRoPE, section 3.1)."""
    plain = rope_table(RopeConfig(base=config.base, partial=config.partial), head_dim)
    plain = rope_cos_sin(fixed_point(plain), positions_BT, turned[0].dtype)
    return tuple(jnp.where(start_BT[..., None], start, rest) for start, rest in zip(plain, turned))


_TICKS = 2**32 / (2 * np.pi)  # per radian


def fixed_point(table: RopeTable) -> Turns:
    """A table as `rope_cos_sin` takes it."""
    ticks_R = table.inverse_frequency * _TICKS
    whole_R = np.round(ticks_R)
    return Turns((whole_R % 2**32).astype(np.uint32).view(np.int32), ticks_R - whole_R, table.attention_factor)


def rope_cos_sin(turns: Turns, positions: jax.Array, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every pair's angle at every position, times the attention factor.

    With 2^32 ticks to a turn, int32 products overflow exactly as angles wrap around, so nothing large is ever rounded: in float32 the
    largest error against float64 was 4e-7 at positions near 131071 and near 2097151 alike (128 dims, bases 1e4 to 1e6); a float32 product
    of position and frequency is off by 8e-3 and 0.12 there.

    Args:
      turns: of all rows, or [B, 1, R] for positions [B, T].
      positions: int32 of any shape; may be traced.
      dtype: float32 or float64.

    Returns:
      cos and sin, each of shape positions.shape + (R,).
    """
    whole, rest = (part if part.ndim > 1 else part[(None,) * positions.ndim] for part in turns[:2])
    positions = jnp.asarray(positions, jnp.int32)[..., None]
    ticks = (positions * whole).astype(dtype) + positions.astype(dtype) * jnp.asarray(rest, dtype)
    angle = ticks * jnp.asarray(1 / _TICKS, dtype)
    factor = jnp.asarray(turns.attention_factor, dtype)
    factor = factor if factor.ndim else factor[(None,) * angle.ndim]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def apply_rope(x_BTHK: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array, *, neighbours: bool = False) -> jax.Array:
    """Turns pair i (dims i and i + R) of every head by its angle; dims from 2R on pass through.

    Args:
      x_BTHK: queries or keys, any float dtype.
      cos_BTR: from `rotation`, [B, T, R], or [T, R] for the same positions in all rows; the turn is computed in its dtype.
      sin_BTR: the same for sin.
      neighbours: pair i is dims 2i and 2i + 1 instead, as in the original paper; for models that were trained so.

    Returns:
      The turned x_BTHK in x's dtype.
    """
    chex.assert_rank([x_BTHK, cos_BTR, sin_BTR], [4, {2, 3}, {2, 3}])
    chex.assert_equal_shape([cos_BTR, sin_BTR])
    R = cos_BTR.shape[-1]
    chex.assert_axis_dimension_gteq(x_BTHK, 3, 2 * R)
    cos_BT1R, sin_BT1R = (part[..., None, :] if part.ndim == 3 else part[None, :, None] for part in (cos_BTR, sin_BTR))
    starts, step = ((0, 1), 2) if neighbours else ((0, R), 1)
    first_BTHR, second_BTHR = (x_BTHK[..., start : start + R * step : step].astype(cos_BTR.dtype) for start in starts)
    turned = (first_BTHR * cos_BT1R - second_BTHR * sin_BT1R, second_BTHR * cos_BT1R + first_BTHR * sin_BT1R)
    turned = [half_BTHR.astype(x_BTHK.dtype) for half_BTHR in turned]
    if neighbours:
        turned = [jnp.stack(turned, axis=-1).reshape(*x_BTHK.shape[:-1], 2 * R)]
    return jnp.concatenate([*turned, x_BTHK[..., 2 * R :]], axis=-1)
