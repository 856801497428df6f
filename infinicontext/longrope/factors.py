"""Factors that divide rotary frequencies: those of the known schemes, and files of found ones.

Shape letter: R rotated pairs.
"""

import math
import pathlib
from typing import Any, Literal, get_args

import numpy as np

from infinicontext.errors import UserError
from infinicontext.files import read_json, write_json
from infinicontext.nn.rope import RopeConfig, rope_table
from infinicontext.pretrained.huggingface_config import rope_from_huggingface

# yarn_linear: what the released search begins with, YaRN's ramp between 1 and s on the factor and not on the frequency.
Known = Literal["pi", "ntk", "yarn", "yarn_linear"]
# What cos and sin are multiplied by. su: sqrt(1 + ln s / ln original_length); yarn: 0.1 ln s + 1.
Magnitude = Literal["su", "yarn", "none"]


def known_factors(
    name: Known, rope: RopeConfig, head_dim: int, scale: float, original_length: int, *, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> np.ndarray:
    """The factors of a scheme that stretches a text `scale` times, float64 [R].

    Args:
      name: the scheme.
      rope: its base and the share that rotates.
      head_dim: size of a head.
      scale: s, length / original_length.
      original_length: tokens the model was trained on.
      beta_fast: YaRN's, see RopeConfig.
      beta_slow: the same.
    """
    shared = {"base": rope.base, "partial": rope.partial, "factor": scale}
    yarn = RopeConfig("yarn", original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow, **shared)
    config = {"pi": RopeConfig("linear", **shared), "ntk": RopeConfig("ntk", **shared)}.get(name, yarn)
    plain = rope_table(RopeConfig(base=rope.base, partial=rope.partial), head_dim).inverse_frequency
    factors_R = plain / rope_table(config, head_dim).inverse_frequency
    if name != "yarn_linear" or scale == 1:
        return factors_R
    kept_R = (1 / factors_R - 1 / scale) / (1 - 1 / scale)
    return kept_R + (1 - kept_R) * scale


def magnitude(kind: Magnitude, scale: float, original_length: int) -> float:
    """The attention factor that goes with a stretch."""
    if kind == "none" or scale <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(original_length)) if kind == "su" else 0.1 * math.log(scale) + 1


def critical_pair(pairs: int, base: float, original_length: int, periods: float = 1.0) -> int:
    """The first pair that makes fewer than `periods` turns in the text a model was trained on (LongRoPE2, section 3.2)."""
    return math.ceil(pairs * math.log(original_length / (2 * math.pi * periods)) / math.log(base))


def factors_below(critical: int, factor: float) -> np.ndarray:
    """Those of the pairs before the critical one, which has `factor`: NTK's, float64 [critical] (LongRoPE2, section 3.3)."""
    return factor ** (np.arange(critical) / max(critical, 1))


def save_factors(path: pathlib.Path, rope: RopeConfig, about: dict[str, Any]) -> None:
    """Writes a `longrope` scheme as JSON, with the fields of a Hugging Face config.json.

    Args:
      path: the file.
      rope: the scheme.
      about: how it was found.
    """
    scaling = {
        "rope_type": "longrope",
        "factor": rope.factor,
        "attention_factor": rope.attention_factor,
        "short_mscale": rope.short_attention_factor,
        "long_mscale": rope.long_attention_factor,
        "short_factor": None if rope.short_factors is None else list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
    record = {
        "max_position_embeddings": rope.length,
        "original_max_position_embeddings": rope.original_length,
        "rope_theta": rope.base,
        "partial_rotary_factor": rope.partial,
        "rope_scaling": {name: value for name, value in scaling.items() if value is not None},
        "start_tokens": rope.start_tokens,
        "found": about,
    }
    write_json(path, record)


def load_factors(path: pathlib.Path, head_dim: int, model: RopeConfig | None = None) -> RopeConfig:
    """The scheme in a file of `save_factors`, or in a Hugging Face config.json, for a model whose rotary base and share it must have.

    Raises:
      UserError: the file cannot be read, or its factors are not one for each pair of `head_dim`, 1 or more, none less than the one before.
    """
    record = read_json(path)
    if not isinstance(record.get("rope_scaling") or record.get("rope_parameters"), dict):
        raise UserError(f"{path}: it has no object rope_scaling or rope_parameters with the factors")
    start = record.get("start_tokens", 0)
    if model is not None:
        record = {"rope_theta": model.base, "partial_rotary_factor": model.partial} | record
    try:
        rope = rope_from_huggingface(record)
        if model is not None and (rope.base, rope.partial) != (model.base, model.partial):
            raise UserError(
                f"its factors are for rope_theta {rope.base:g} and partial_rotary_factor {rope.partial:g}, but the model has "
                f"{model.base:g} and {model.partial:g}"
            )
        if rope.scheme != "longrope":
            raise UserError(f"its rope_type is {rope.scheme}; it must be longrope")
        check_factors("long_factor", rope.long_factors)
        if rope.short_factors is not None:
            check_factors("short_factor", rope.short_factors)
        rope = RopeConfig(**(vars(rope) | {"start_tokens": start}))
        rope_table(rope, head_dim)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return rope


def check_factors(name: str, factors: tuple[float, ...]) -> None:
    """Raises UserError unless factors are 1 or more and do not fall."""
    before = 1.0
    for pair, factor in enumerate(factors):
        if not before - 1e-9 <= factor < math.inf:
            said = "1 or more" if before == 1 else f"at least {before}, that of the pair before"
            raise UserError(f"{name} {pair} is {factor}; it must be {said}")
        before = factor


def check_names(seeds: tuple[str, ...]) -> None:
    """Raises UserError if one is no known scheme."""
    if unknown := [name for name in seeds if name not in get_args(Known)]:
        raise UserError(f"search.seeds has {unknown[0]}; it must be of {', '.join(get_args(Known))}")
