"""What an official checkpoint of Activation Beacon has beside its backbone: fields of config.json, and tensors."""

from collections.abc import Mapping
from typing import Any

from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.transformer import TransformerConfig

_SEES = {"full-coverage": "all", "step-expansion": "stepwise", "segmentation": "segment"}
_MIXES = {"step-random": "per_chunk", "instance-random": "per_row", "sequence": "in_turn"}


def is_beacon(record: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of a model with beacons."""
    return "beacon_window" in record


def beacon_from_huggingface(record: Mapping[str, Any], backbone: TransformerConfig) -> BeaconConfig:
    """The BeaconConfig of a config.json, of either version of the official code; the first calls one field beacon_attend_previous.

    A mix that the code draws from in training, too, is read in turn here, unless it is "adapt", which goes by the length. As there, of
    several ratios those that do not divide the stride are left out.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    first = "beacon_attend_previous" in record
    trained = set(record.get("beacon_param", ("q", "k", "v")))
    if not {"q", "k", "v"} <= trained <= {"q", "k", "v", "o"}:
        raise UserError(f"config.json has beacon_param {sorted(trained)}; it must be q, k, v and perhaps o")
    sees = record.get("beacon_attn", "full-coverage")
    if sees not in _SEES:
        raise UserError(f"config.json has beacon_attn {sees}; it must be one of {', '.join(_SEES)}")
    placement = "append" if first else record.get("beacon_pos", "interleave")
    mix = record.get("beacon_ratio_mix", "step-random")
    stride = record.get("beacon_stride", record["beacon_window"])
    stride = stride[0] if isinstance(stride, list) else stride
    by_length = mix.startswith("adapt-")
    if not by_length and mix not in _MIXES:
        raise UserError(f"config.json has beacon_ratio_mix {mix}; it must be one of {', '.join(_MIXES)}, or adapt- and a number")
    if placement == "interleave":
        for name, value, only in (("beacon_attn", sees, "full-coverage"), ("beacon_stride", stride, record["beacon_window"])):
            if value != only:
                raise UserError(f"config.json has {name} {value}; with beacon_pos interleave it must be {only}")
    ratios = tuple(record.get("beacon_ratio", (8,)))
    options = {
        "chunk": record["beacon_window"],
        "ratios": ratios if len(ratios) == 1 else tuple(ratio for ratio in ratios if not ratio or stride % ratio == 0),
        "choose": "by_length" if by_length else "in_turn",
        "positions": int(record["max_position_embeddings"] * (backbone.rope.factor or 1)) if by_length else None,
        "training_ratios": _MIXES.get(mix, "per_chunk"),
        "sinks": record.get("beacon_sink_size", 0),
        "placement": placement,
        "beacon_output": "o" in trained,
    }
    if placement == "append":
        options |= {
            "stride": None if stride == record["beacon_window"] else stride,
            "append_sees": _SEES[sees],
            # The newer code masks nothing with full coverage, whatever beacon_attend_prev is.
            "append_sees_beacons": not first and (sees == "full-coverage" or bool(record.get("beacon_attend_prev", True))),
            "append_sees_memory": not first or bool(record["beacon_attend_previous"]),
        }
    return BeaconConfig.of(backbone, **options)


def beacon_to_huggingface(config: BeaconConfig, longest: int) -> dict[str, Any]:
    """The fields of config.json that say what `beacon_from_huggingface` reads, in the newer code's words where it has them.

    Args:
      config: to be written. From what ratios are drawn in training is left out where they are chosen by length.
      longest: max_position_embeddings as the rotary scheme has it.

    Raises:
      UserError: neither version of the official code has such a model.
    """
    if config.memory is not None:
        raise UserError(f"model.memory is {config.memory}; the official code of Activation Beacon has no memory that is bounded")
    interleaved, mixes = config.placement == "interleave", {value: name for name, value in _MIXES.items()}
    fields = {
        "beacon_window": config.chunk,
        "beacon_stride": config.step,
        "beacon_ratio": list(config.ratios),
        "beacon_ratio_mix": "adapt-1024" if config.choose == "by_length" else mixes[config.training_ratios],
        "beacon_attn": "full-coverage" if interleaved else next(name for name, sees in _SEES.items() if sees == config.append_sees),
        "beacon_sink_size": config.sinks,
        "beacon_pos": config.placement,
        "beacon_param": ["q", "k", "v", *(["o"] if config.beacon_output else [])],
    }
    if config.choose == "by_length":
        positions = int(config.positions / (config.rope.factor or 1))
        if positions * (config.rope.factor or 1) != config.positions:
            raise UserError(f"model.positions is {config.positions}; to be written it must be a multiple of {config.rope.factor:g}")
        if config.rope.scheme in ("dynamic", "yarn", "longrope") and positions != longest:
            raise UserError(
                f"model.positions is {config.positions}; with model.rope.scheme {config.rope.scheme}, which is written with the same "
                f"field, it must be {longest * (config.rope.factor or 1):g}"
            )
        fields["max_position_embeddings"] = positions
    whole = config.step == config.chunk and config.append_sees != "segment"
    sees_beacons = config.append_sees_beacons or config.append_sees == "stepwise"
    if interleaved or (whole and sees_beacons and config.append_sees_memory):
        return fields | {"beacon_attend_prev": interleaved or config.append_sees_beacons}
    if config.append_sees_beacons or config.sinks:
        raise UserError(
            f"model.append_sees is {config.append_sees}, append_sees_beacons {config.append_sees_beacons}, append_sees_memory "
            f"{config.append_sees_memory}, stride {config.stride} and sinks {config.sinks}; neither version of the official code of "
            "Activation Beacon has them together"
        )
    return fields | {"beacon_stride": [config.step], "beacon_attend_previous": config.append_sees_memory}
