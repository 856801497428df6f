"""config.json of Hugging Face transformers <-> TransformerConfig.

Five families are read and written: Llama, Mistral, Qwen2, Qwen3 and Phi-3. To a TransformerConfig they are sets of options. What is written
is the older spelling (`rope_theta`, `rope_scaling`), which transformers 4 and 5 and the tools around them all read.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from infinicontext.errors import UserError
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.rope import ROPE_FIELDS, RopeConfig

Family = Literal["llama", "mistral", "qwen2", "qwen3", "phi3"]
FAMILIES: tuple[Family, ...] = get_args(Family)
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# What transformers takes where a config.json does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
}


def config_from_huggingface(config: Mapping[str, Any]) -> TransformerConfig:
    """The TransformerConfig of a config.json, in float32.

    A window that is no shorter than `max_position_embeddings` is full attention, which is the same as far as the model may read.

    Raises:
      UserError: an architecture, an option or a value that is not supported, or fields that are missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json has model_type {family}; it must be one of {', '.join(FAMILIES)}")
    try:
        return _config({**_DEFAULTS[family], **config}, family)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"config.json holds a value of a wrong kind: {error}") from error


def _config(config: Mapping[str, Any], family: Family) -> TransformerConfig:
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json has hidden_act {config['hidden_act']}; it must be silu")
    if config.get("quantization_config"):
        raise UserError("config.json has a quantization_config; weights must be stored as floating point numbers")
    bias, window = bool(config.get("attention_bias")), _window(config)
    dim, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        dim=dim,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads"),
        head_dim=None if head_dim and head_dim * heads == dim else head_dim,
        feed_forward=config["intermediate_size"],
        attention="full" if window is None else "window",
        window=window or TransformerConfig.window,
        rope=rope_from_huggingface(config),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        attention_bias=family == "qwen2" or bias,
        output_bias=family in ("llama", "qwen3") and bias,
        feed_forward_bias=bool(config.get("mlp_bias")),
        qk_norm=family == "qwen3",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
    )


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens of a sliding window that all layers share, None for full attention."""
    window, family, layers = config.get("sliding_window"), config["model_type"], config["num_hidden_layers"]
    if family == "llama" or window is None or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return None
    if family in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        kinds = config.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        if len(set(kinds)) > 1:
            raise UserError("config.json gives layers different kinds of attention (layer_types); it must be one for all")
        if kinds[0] != "sliding_attention":
            return None
    longest = config.get("max_position_embeddings")
    return None if longest and window >= longest else window


def rope_from_huggingface(config: Mapping[str, Any]) -> RopeConfig:
    """The RopeConfig of a Hugging Face model configuration (the contents of config.json).

    Reads `rope_parameters` or its older name `rope_scaling`, and from the top level `max_position_embeddings`,
    `original_max_position_embeddings` (which overrides the inner one) and, in older files, `rope_theta` and `partial_rotary_factor`.

    Raises:
      UserError: the type is unknown, layers differ in their parameters, or a value is missing or out of range.
    """
    inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := [name for name, value in inner.items() if isinstance(value, Mapping)]:
        raise UserError(f"rope_parameters has an entry for {nested[0]}; it must be one set of parameters for all layers")
    scheme = inner.get("rope_type", inner.get("type", "default"))
    # Early Phi-3 files call LongRoPE "su" or "yarn".
    if scheme == "su" or "long_factor" in inner:
        scheme = "longrope"
    if scheme not in ROPE_FIELDS or scheme == "ntk":
        raise UserError(f"rope_type is {scheme}; it must be one of default, linear, dynamic, yarn, llama3, longrope")

    length = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or inner.get("original_max_position_embeddings") or length
    values = {
        "factor": inner.get("factor"),
        "original_length": length if scheme == "dynamic" else original,
        # Only these two read a factor off the lengths; `dynamic` calls its original length the maximum.
        "length": length if scheme in ("yarn", "longrope") else None,
        "beta_fast": inner.get("beta_fast"),
        "beta_slow": inner.get("beta_slow"),
        "truncate": inner.get("truncate"),
        "mscale": inner.get("mscale"),
        "mscale_all_dim": inner.get("mscale_all_dim"),
        "attention_factor": inner.get("attention_factor"),
        "low_frequency_factor": inner.get("low_freq_factor"),
        "high_frequency_factor": inner.get("high_freq_factor"),
        "short_factors": tuple(inner.get("short_factor") or ()) or None,
        "long_factors": tuple(inner.get("long_factor") or ()) or None,
        "short_attention_factor": inner.get("short_mscale"),
        "long_attention_factor": inner.get("long_mscale"),
        "base": inner.get("rope_theta", config.get("rope_theta")),
        "partial": inner.get("partial_rotary_factor", config.get("partial_rotary_factor")),
    }
    reads = ("base", "partial", *ROPE_FIELDS[scheme])
    return RopeConfig(scheme, **{name: value for name, value in values.items() if name in reads and value is not None})


def obstacles(config: TransformerConfig, family: Family) -> list[str]:
    """Options of a config that a family does not have; empty if it can be written as that family."""
    rope, windowed = config.rope, config.attention == "window"
    biases = (config.attention_bias, config.output_bias, config.feed_forward_bias)
    allowed_biases = {
        "llama": ((False, False), (True, True)),
        "mistral": ((False, False),),
        "qwen2": ((True, False),),
        "qwen3": ((False, False), (True, True)),
        "phi3": ((False, False),),
    }
    checks = {
        f"model.attention {config.attention}": config.attention == "block_window" or (windowed and family == "llama"),
        f"model.attention_bias {biases[0]} with model.output_bias {biases[1]}": biases[:2] not in allowed_biases[family],
        "model.feed_forward_bias": config.feed_forward_bias and family != "llama",
        f"model.qk_norm {config.qk_norm}": config.qk_norm != (family == "qwen3"),
        f"rope.partial {rope.partial}": rope.partial != 1 and family != "phi3",
        f"rope.scheme {rope.scheme}": rope.scheme not in ("default", "ntk", "longrope") and family == "phi3",
        f"model.head_dim {config.head_dim}": config.head_size * config.heads != config.dim and family == "phi3",
        # transformers has one factor for both sets.
        "rope.short_attention_factor": rope.short_attention_factor not in (None, rope.attention_factor),
        "rope.long_attention_factor": rope.long_attention_factor not in (None, rope.attention_factor),
        f"rope.start_tokens {rope.start_tokens}": rope.start_tokens > 0,
    }
    return [name for name, found in checks.items() if found]


def config_to_huggingface(config: TransformerConfig, family: Family, length: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model that `obstacles` lets through.

    Args:
      config: of our model.
      family: what it is written as.
      length: max_position_embeddings, where neither the rotary scheme nor `like` says.
      like: a config.json whose other fields (token ids, names, dropout) are kept; may be empty.
    """
    scheme, original = config.rope.scheme, config.rope.original_length
    longest = original if scheme == "dynamic" else config.rope.length or like.get("max_position_embeddings") or length
    windowed = config.attention == "window"
    fields: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | dict(like)
    fields |= {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_head_count,
        "intermediate_size": config.feed_forward_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": longest,
    }
    if family != "phi3":
        fields["head_dim"] = config.head_size
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = config.attention_bias
    if family == "llama":
        fields["mlp_bias"] = config.feed_forward_bias
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = windowed
        fields["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.layers
        if windowed:
            fields["max_window_layers"] = 0
    if family != "llama":
        fields["sliding_window"] = config.window if windowed else None
    if not like or rope_from_huggingface(fields) != config.rope:
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            fields.pop(name, None)
        fields |= _rope_to_huggingface(config, family)
    return fields


def _rope_to_huggingface(config: TransformerConfig, family: Family) -> dict[str, Any]:
    rope, pairs = config.rope, int(config.head_size * config.rope.partial) // 2
    factor = rope.factor or (rope.length / rope.original_length if rope.length and rope.original_length else None)
    fields: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": None}
    if rope.partial != 1:
        fields["partial_rotary_factor"] = rope.partial
    scaling: dict[str, Any] = {}
    match rope.scheme:
        case "ntk":
            # A larger base is the same thing (nn/rope.py).
            fields["rope_theta"] = rope.base * factor ** (pairs / max(pairs - 1, 1))
        case "linear" | "dynamic":
            scaling = {"factor": factor}
        case "llama3":
            scaling = {
                "factor": factor,
                "low_freq_factor": rope.low_frequency_factor,
                "high_freq_factor": rope.high_frequency_factor,
                "original_max_position_embeddings": rope.original_length,
            }
        case "yarn":
            scaling = {
                "factor": factor,
                "original_max_position_embeddings": rope.original_length,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
                "mscale": rope.mscale,
                "mscale_all_dim": rope.mscale_all_dim,
                "attention_factor": rope.attention_factor,
            }
        case "longrope":
            fields["original_max_position_embeddings"] = rope.original_length
            scaling = {
                "short_factor": list(rope.short_factors or (1.0,) * pairs),
                "long_factor": list(rope.long_factors),
                "factor": rope.factor,
                "attention_factor": rope.attention_factor,
            }
    if scaling:
        # transformers 4 wants the older key for Phi-3, and no other fields than it knows.
        kind = {"type" if family == "phi3" else "rope_type": rope.scheme}
        fields["rope_scaling"] = kind | {name: value for name, value in scaling.items() if value is not None}
    return fields
