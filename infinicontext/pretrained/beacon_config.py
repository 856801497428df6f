"""What an official checkpoint of Activation Beacon has beside its backbone: fields of config.json, and tensors."""

from collections.abc import Mapping
from typing import Any

from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.transformer import TransformerConfig

_SEES = {"full-coverage": "all", "step-expansion": "stepwise", "segmentation": "segment"}


def is_beacon(record: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of a model with beacons."""
    return "beacon_window" in record


def beacon_from_huggingface(record: Mapping[str, Any], backbone: TransformerConfig) -> BeaconConfig:
    """The BeaconConfig of a config.json, of either version of the official code; the first calls one field beacon_attend_previous.

    A mix that the code draws from in training, too, is read in turn here, unless it is "adapt", which goes by the length.

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
    by_length = mix.startswith("adapt")
    options = {
        "chunk": record["beacon_window"],
        "ratios": tuple(record.get("beacon_ratio", (8,))),
        "choose": "by_length" if by_length else "in_turn",
        "positions": int(record["max_position_embeddings"] * (backbone.rope.factor or 1)) if by_length else None,
        "training_ratios": {"instance-random": "per_row", "sequence": "in_turn"}.get(mix, "per_chunk"),
        "sinks": record.get("beacon_sink_size", 0),
        "placement": placement,
        "beacon_output": "o" in trained,
    }
    if placement == "append":
        options |= {
            "stride": None if stride == record["beacon_window"] else stride,
            "append_sees": _SEES[sees],
            "append_sees_beacons": not first and bool(record.get("beacon_attend_prev", True)),
            "append_sees_memory": not first or bool(record["beacon_attend_previous"]),
        }
    return BeaconConfig.of(backbone, **options)


def beacon_to_huggingface(config: BeaconConfig) -> dict[str, Any]:
    """The fields of config.json that say what `beacon_from_huggingface` reads."""
    mixes = {"per_chunk": "step-random", "per_row": "instance-random", "in_turn": "sequence"}
    fields = {
        "beacon_window": config.chunk,
        "beacon_stride": config.step,
        "beacon_ratio": list(config.ratios),
        "beacon_ratio_mix": "adapt-1024" if config.choose == "by_length" else mixes[config.training_ratios],
        "beacon_attn": next(name for name, sees in _SEES.items() if sees == config.append_sees),
        "beacon_sink_size": config.sinks,
        "beacon_pos": config.placement,
        "beacon_param": ["q", "k", "v", *(["o"] if config.beacon_output else [])],
    }
    if config.choose == "by_length":
        fields["max_position_embeddings"] = int(config.positions / (config.rope.factor or 1))
    if config.placement == "append" and not config.append_sees_beacons:
        return fields | {"beacon_stride": [config.step], "beacon_attend_previous": config.append_sees_memory}
    return fields | {"beacon_attend_prev": True}
