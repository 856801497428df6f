"""Checkpoints of the official MEGALODON code (XuezheMax/megalodon, consolidated) in and out.

A checkpoint is a folder with config.json, consolidate_config.json and consolidated.pth or, cut for model parallelism, consolidated.00.pth,
.01.pth and so on; .safetensors with the same names are read, too. Every official tensor is one of ours with axes in another order.

Shape letters: D channels, N order of the moving average, G norm groups, H heads, K query and key size, U value size, F feed-forward size,
V vocabulary.
"""

import dataclasses
import json
import math
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors.numpy import save_file

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.files import new_folder, read_json
from infinicontext.models.megalodon import Megalodon, MegalodonConfig
from infinicontext.nn.rope import RopeConfig, rope_table
from infinicontext.pretrained.placement import Read, fill, parameter_paths
from infinicontext.pretrained.tensor_files import open_tensors, save_pth

# The official names of those of our fields that mean the same.
_FIELDS = {
    "num_layers": "layers",
    "model_dim": "dim",
    "z_dim": "z_dim",
    "value_dim": "value_dim",
    "num_heads": "heads",
    "ffn_hidden_dim": "feed_forward",
    "cema_ndim": "cema_order",
    "chunk_size": "chunk",
    "init_mode": "init_mode",
    "norm_num_groups": "norm_groups",
    "norm_affine": "norm_affine",
    "norm_eps": "norm_epsilon",
    "dropout": "dropout",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "swiglu": "swiglu",
    "rescale_nffn": "rescale_feed_forward",
    "scale_emb": "scale_embeddings",
    "share_emb": "tied_embeddings",
    "layerwise_ckpt": "remat",
}
# Defaults of the official fields that a config.json may lack.
_DEFAULTS = {
    "init_mode": "he",
    "norm_affine": True,
    "norm_eps": 1e-5,
    **dict.fromkeys(("dropout", "hidden_dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("swiglu", "rescale_nffn", "scale_emb", "share_emb", "layerwise_ckpt"), False),
}
_OTHER_FIELDS = ("vocab_size", "output_size", "rope_base", "efficient_attn", "custom_bwd", "loss_parallel")
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_DTYPES = {"bf16": ml_dtypes.bfloat16, "fp32": np.float32}
Rope = Literal["checkpoint", "formula"]


class Source(NamedTuple):
    """Where one of our parameters lies in a checkpoint."""

    name: str  # of the tensor; {} stands for the layer
    axes: tuple[tuple[int, ...], ...]  # for each axis of the tensor, our axes (without the layer's) that make it
    shard_axis: int | None  # of the tensor, cut over model-parallel shards; None: each shard has all of it


def sources(config: MegalodonConfig) -> dict[str, Source]:
    """The source of every parameter, by its path in our model."""
    vector, matrix, column = ((0,),), ((1,), (0,)), ((0,), ())
    into_heads, pair = ((1, 2), (0,)), ((0,), (1, 2))
    mega, nffn = "layers.{}.mega.", "layers.{}.nffn."
    found = {
        "embedding/table": Source("embed.weight", ((0,), (1,)), 1),
        "blocks/cema/alpha": Source(mega + "cema.alpha", ((0,), (1,), ()), 0),
        "blocks/cema/delta": Source(mega + "cema.delta", ((0,), (1,), ()), 0),
        "blocks/cema/theta": Source(mega + "cema.theta", ((0,), (), ()), 0),
        "blocks/cema/gamma": Source(mega + "cema.gamma", ((0,), (1,), (2,)), 0),
        "blocks/cema/omega": Source(mega + "cema.omega", column, 0),
        "blocks/direct": Source(mega + "wh1.weight", matrix, 0),
        "blocks/direct_bias": Source(mega + "wh1.bias", vector, 0),
        "blocks/output": Source(mega + "wh2.weight", ((2,), (0, 1)), 1),  # ours [H, U, D]
        "blocks/gamma": Source(mega + "gamma", pair, 1),
        "blocks/beta": Source(mega + "beta", pair, 1),
        "blocks/feed_forward_in": Source(nffn + "fc1.weight", matrix, 0),
        "blocks/feed_forward_out": Source(nffn + "fc2.weight", matrix, 1),
    }
    for ours, theirs in (("z", "wz"), ("value", "wv"), ("gate", "wr")):  # ours [D, H, K or U]
        found[f"blocks/{ours}"] = Source(f"{mega}{theirs}.weight", into_heads, 0)
        found[f"blocks/{ours}_bias"] = Source(f"{mega}{theirs}.bias", ((0, 1),), 0)
    for ours, theirs in (("blocks/norm", mega + "timenorm"), ("final_norm", "output.final_norm")):
        for part in ("weight", "bias", *(("prior_mean", "prior_logv") if config.prior_count else ())):
            found[f"{ours}/{part}"] = Source(f"{theirs}.{part}", vector, 0)
    if not config.tied_embeddings:
        found["embedding/head"] = Source("output.output.weight", matrix, 1)
    if config.norm_affine:
        found["blocks/cema_norm/weight"] = Source(mega + "rmsnorm.weight", vector, None)
        found |= {f"blocks/feed_forward_norm/{part}": Source(f"{nffn}norm.{part}", vector, None) for part in ("weight", "bias")}
    if config.swiglu:
        found["blocks/feed_forward_gated"] = Source(nffn + "fc3.weight", matrix, 0)
    if config.rescale_feed_forward:
        found["blocks/rescale"] = Source(nffn + "alpha", vector, None)
    return found


class _Expected(NamedTuple):
    shape: tuple[int, ...]  # of the whole tensor
    shard_axis: int | None


def _layout(config: MegalodonConfig) -> dict[str, _Expected]:
    """Every tensor of a checkpoint: those of our parameters, and those that are none of ours."""
    parameters = parameter_paths(models.abstract(config))
    expected = {}
    for path, source in sources(config).items():
        shape = parameters[path].shape
        layers = range(config.layers) if "{}" in source.name else (0,)
        shape = shape[1:] if "{}" in source.name else shape
        whole = tuple(math.prod(shape[axis] for axis in axes) for axes in source.axes)
        expected |= {source.name.format(i): _Expected(whole, source.shard_axis) for i in layers}
    for norm in _norms(config):
        expected[f"{norm}.prior_count"] = _Expected((), None)
        expected |= {f"{norm}.{part}": _Expected((config.norm_groups,), 0) for part in ("prior_mean", "prior_logv")}
    expected["output.output.weight"] = _Expected((config.vocab_size, config.dim), 1)
    expected["rope.freqs"] = _Expected((config.z_size // config.heads // 2,), None)
    return expected


def _norms(config: MegalodonConfig) -> list[str]:
    return [f"layers.{i}.mega.timenorm" for i in range(config.layers)] + ["output.final_norm"]


# --- In ---


def load(path: str | pathlib.Path, mesh: Mesh | None = None, dtype: str | None = None, *, rope: Rope = "checkpoint") -> Megalodon:
    """Reads a consolidated checkpoint. No code in it is run.

    Each device's slice is read by itself, one after another, so that beside the arrays a host holds the slice being read.

    Args:
      path: the folder.
      mesh: where the parameters go; None: the first device.
      dtype: of parameters and computation; None: float32. bfloat16 halves the memory; to train, start from float32.
      rope: where the checkpoint's rotary frequencies differ from the formula by more than float32 rounding, because it was cast to
        bfloat16, keep them (with a warning), or take the formula's.

    Raises:
      UserError: something cannot be read or is not supported. Tensors that are missing, unexpected or of another shape are all listed.
    """
    path = pathlib.Path(path)
    shards = [open_tensors(file) for file in _files(path)]
    config = _config(path, shards[0], dtype or "float32")
    _check(path, shards, _layout(config), config)
    where = sources(config)
    config = dataclasses.replace(config, rope_frequencies=_frequencies(config, shards[0]["rope.freqs"], rope))

    def reader(name: str, shape: tuple[int, ...]) -> Read:
        source = where[name]
        stacked = "{}" in source.name
        sizes, order = shape[1:] if stacked else shape, [axis for axes in source.axes for axis in axes]
        # The shards' cuts are cuts of one of our axes.
        cut_axis = 0 if source.shard_axis is None else source.axes[source.shard_axis][0]
        parts = shards[:1] if source.shard_axis is None else shards
        part_sizes = [size // len(parts) if axis == cut_axis else size for axis, size in enumerate(sizes)]

        def copy(out: np.ndarray, tensor: str, bounds: list[range]) -> None:
            part_size, wanted = part_sizes[cut_axis], bounds[cut_axis]
            for number, part in enumerate(parts):
                held = range(max(wanted.start, number * part_size), min(wanted.stop, (number + 1) * part_size))
                if held:
                    into, of = [slice(None)] * len(bounds), [slice(bound.start, bound.stop) for bound in bounds]
                    into[cut_axis] = slice(held.start - wanted.start, held.stop - wanted.start)
                    of[cut_axis] = slice(held.start - number * part_size, held.stop - number * part_size)
                    ours = part[tensor].reshape([part_sizes[axis] for axis in order]).transpose(np.argsort(order))
                    out[tuple(into)] = ours[tuple(of)]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            bounds = [range(*cut.indices(size)) for cut, size in zip(index, shape)]
            layers, bounds = (bounds[0], bounds[1:]) if stacked else (range(1), bounds)
            out = np.empty([len(layers), *map(len, bounds)], np.dtype(config.dtype))
            for place, layer in enumerate(layers):
                copy(out[place], source.name.format(layer), bounds)
            return out if stacked else out[0]

        return read

    return fill(models.abstract(config), mesh, reader)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint, one per shard."""
    for suffix in (".safetensors", ".pth"):
        numbered = sorted(path.glob(f"consolidated.[0-9][0-9]{suffix}"))
        found = numbered or [file for file in [path / f"consolidated{suffix}"] if file.exists()]
        if found:
            shards = read_json(path / "consolidate_config.json").get("model_parallel_size")
            names = [f"consolidated.{i:02}{suffix}" for i in range(len(found))] if numbered else [found[0].name]
            if len(found) != shards or [file.name for file in found] != names:
                raise UserError(f"{path} has {', '.join(file.name for file in found)}, but its model_parallel_size is {shards}")
            return found
    if list(path.glob("model.ckpt.*.pth")):
        raise UserError(f"{path} holds raw FSDP shards of a training run; consolidate them with the official code first")
    raise UserError(f"{path} has neither consolidated.pth nor consolidated.safetensors, nor numbered ones")


def _config(path: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str) -> MegalodonConfig:
    """The config of a checkpoint. What config.json cannot say is in the tensors: the prior, and the vocabulary of old ones."""
    official = read_json(path / "config.json").get("model")
    if not isinstance(official, dict):
        raise UserError(f"{path / 'config.json'} has no object named model")
    official = _DEFAULTS | official
    problems = [f"{name} is missing" for name in _FIELDS if name not in official]
    problems += [f"{name} is unknown" for name in official if name not in _FIELDS and name not in _OTHER_FIELDS]
    optional = {"rope_base": float, "efficient_attn": str}
    kinds = {theirs: _kind(ours) for theirs, ours in _FIELDS.items()} | {"vocab_size": int, "output_size": int} | optional
    problems += [
        f"{name} is {json.dumps(official[name])}, not {_KINDS[kind]}"
        for name, kind in kinds.items()
        if name in official and not (_is(official[name], kind) or (name in optional and official[name] is None))
    ]
    if problems:
        raise UserError(f"{path / 'config.json'}: in model, {'; '.join(problems)}")
    vocab_size = official.get("vocab_size", -1)
    if vocab_size == -1 and "embed.weight" in tensors and tensors["embed.weight"].ndim:
        vocab_size = tensors["embed.weight"].shape[0]
    output_size = official.get("output_size", -1)
    if output_size not in (-1, vocab_size):
        raise UserError(f"{path / 'config.json'}: model.output_size is {output_size}; it must be -1 or the size of the vocabulary")
    count = tensors.get("output.final_norm.prior_count", np.zeros((), np.int64))
    return MegalodonConfig(
        vocab_size=vocab_size,
        rope_base=float(official.get("rope_base") or 10000.0),
        attention_dropout_mode="post_softmax" if official.get("efficient_attn") is None else "dropkey",
        prior_count=int(count) if count.shape == () else 0,
        dtype=dtype,
        **{ours: official[theirs] for theirs, ours in _FIELDS.items()},
    )


def _kind(field: str) -> type:
    """What a field of ours holds; those that may be None are integers."""
    default = getattr(MegalodonConfig, field)
    return int if default is None else type(default)


def _is(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind; a bool is no number, an integer is one."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def _check(path: pathlib.Path, shards: list[dict[str, np.ndarray]], layout: dict[str, _Expected], config: MegalodonConfig) -> None:
    """Compares all tensors of all shards with those that the model is made of."""
    problems = [f"it has {len(shards)} shards, which do not divide {config.heads} heads"] if config.heads % len(shards) else []
    for number, shard in enumerate(shards):
        of = f" of shard {number}" if len(shards) > 1 else ""
        problems += [f"{name}{of} is missing" for name in layout if name not in shard]
        problems += [f"{name}{of} is unexpected" for name in sorted(shard) if name not in layout]
        for name, (shape, axis) in layout.items():
            part = tuple(size // len(shards) if i == axis else size for i, size in enumerate(shape))
            if name not in shard:
                continue
            if shard[name].shape != part or (axis is not None and shape[axis] % len(shards)):
                problems.append(f"{name}{of} is {list(shard[name].shape)}, not {list(part)}")
            elif (shard[name].dtype.kind == "i") != name.endswith("prior_count"):
                problems.append(f"{name}{of} holds {shard[name].dtype}")
            elif axis is None and name in shards[0] and not np.array_equal(shard[name], shards[0][name]):
                problems.append(f"{name}{of} differs from that of shard 0")
    if not problems:
        counts = {name: int(shards[0][name]) for name in layout if name.endswith("prior_count")}
        if len(set(counts.values())) > 1:
            problems.append(f"prior_count is not the same in all norms: {counts}")
        if config.tied_embeddings and not all(np.array_equal(shard["output.output.weight"], shard["embed.weight"]) for shard in shards):
            problems.append("output.output.weight differs from embed.weight, although share_emb is true")
    if problems:
        raise UserError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def _frequencies(config: MegalodonConfig, stored_R: np.ndarray, rope: str) -> tuple[float, ...] | None:
    """The checkpoint's rotary frequencies, or None where the formula's are meant."""
    stored_R, formula_R = stored_R.astype(np.float64), _formula(config)
    if rope == "formula" or np.allclose(stored_R, formula_R, rtol=1e-6, atol=0):
        return None
    apart = float(np.max(np.abs(stored_R - formula_R)) * (config.chunk - 1))
    warnings.warn(
        f"rope.freqs differs from base {config.rope_base:g} by up to {apart:.2g} radians at the end of a chunk; the checkpoint's values "
        'are kept (rope="formula", on the command line --rope formula, takes the others)',
        stacklevel=3,
    )
    return tuple(stored_R.tolist())


def _formula(config: MegalodonConfig) -> np.ndarray:
    return rope_table(RopeConfig(base=config.rope_base), config.z_size // config.heads).inverse_frequency


# --- Out ---


def save(model: Megalodon, path: str | pathlib.Path, shards: int = 1, *, suffix: Literal[".pth", ".safetensors"] = ".pth") -> None:
    """Writes a consolidated checkpoint, in bfloat16 if the model's parameters are, else in float32.

    The folder appears when it is complete. Beside the model one tensor is held in memory at a time; of .safetensors, one shard. Of the
    tokenizer, which the official code also needs, config.json has only a name: tokenizer.model in the working directory.

    Args:
      model: a Megalodon.
      path: a new or empty folder.
      shards: model-parallel size.
      suffix: the official code reads .pth only.

    Raises:
      UserError: the model cannot be cut so, or the folder cannot be written.
    """
    path, config = pathlib.Path(path), getattr(model, "config", None)
    if not isinstance(config, MegalodonConfig):
        raise UserError(f"a {type(model).__name__} cannot be written as a checkpoint of the official MEGALODON code")
    for name in ("heads", "norm_groups", "feed_forward_size"):
        if shards < 1 or getattr(config, name) % shards:
            raise UserError(f"shards is {shards}; it must be 1 or more and divide model.{name}, {getattr(config, name)}")
    parameters = parameter_paths(model)
    label = "bf16" if parameters["embedding/table"].dtype == ml_dtypes.bfloat16 else "fp32"

    official = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    official |= {"z_dim": config.z_size, "value_dim": config.value_size, "ffn_hidden_dim": config.feed_forward_size}
    official |= {"vocab_size": config.vocab_size, "output_size": -1, "rope_base": config.rope_base}
    official["efficient_attn"] = "fused" if config.attention_dropout_mode == "dropkey" else None
    record = {"model": official, "tokenizer": {"path": "tokenizer.model"}, "model_parallel_size": shards, "chunk_parallel_size": 1}
    with new_folder(path) as folder:
        for number in range(shards):
            tensors = _tensors(config, parameters, np.dtype(_DTYPES[label]), number, shards)
            file = folder / f"consolidated{'' if shards == 1 else f'.{number:02}'}{suffix}"
            save_pth(tensors, file) if suffix == ".pth" else save_file(dict(tensors), file)
        _write_json(folder / "config.json", record)
        _write_json(folder / "consolidate_config.json", {"model_parallel_size": shards, "dtype": label})


def _write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _tensors(
    config: MegalodonConfig, parameters: dict[str, Any], dtype: np.dtype, shard: int = 0, shards: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of one shard, one after another."""

    def cut(tensor: np.ndarray, axis: int | None) -> np.ndarray:
        return np.asarray(tensor if axis is None else np.split(tensor, shards, axis)[shard], dtype, order="C")

    where = list(sources(config).items())
    if config.tied_embeddings:
        where.append(("embedding/table", sources(config)["embedding/table"]._replace(name="output.output.weight")))
    for path, source in where:
        for i in range(config.layers) if "{}" in source.name else (None,):
            value = parameters[path] if i is None else parameters[path][i]
            value = np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))
            moved = value.transpose([axis for axes in source.axes for axis in axes])
            shape = [math.prod(value.shape[axis] for axis in axes) for axes in source.axes]
            yield source.name.format(i), cut(moved.reshape(shape), source.shard_axis)
    for norm in _norms(config):
        yield f"{norm}.prior_count", np.array(config.prior_count, np.int64)
        if not config.prior_count:
            yield from ((f"{norm}.{part}", cut(np.zeros(config.norm_groups, dtype), 0)) for part in ("prior_mean", "prior_logv"))
    frequencies_R = _formula(config) if config.rope_frequencies is None else np.array(config.rope_frequencies)
    # Never in bfloat16, which would turn late positions by whole radians.
    yield "rope.freqs", frequencies_R.astype(np.float32)
