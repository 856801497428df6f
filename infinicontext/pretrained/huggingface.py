"""Weights of Hugging Face checkpoints (config.json and safetensors) in and out, without torch or transformers; also of the official code
of Activation Beacon, whose checkpoints are those of Hugging Face with tensors for beacons.

Shape letters: D channels, H query heads, G key/value heads, K head size, F feed-forward size, L layers, V vocabulary.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors.numpy import save_file

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.files import new_folder, read_json
from infinicontext.models.beacon import Beacon
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.transformer import Transformer, TransformerConfig
from infinicontext.pretrained.beacon_config import beacon_from_huggingface, beacon_to_huggingface, is_beacon
from infinicontext.pretrained.huggingface_config import FAMILIES, Family, config_from_huggingface, config_to_huggingface, obstacles
from infinicontext.pretrained.placement import Read, fill, parameter_paths

_DTYPES = ("F64", "F32", "F16", "BF16")
_COMPUTE_DTYPES, _STORED_DTYPES = ("float32", "bfloat16", "float64"), ("float32", "bfloat16", "float16")
# What weights cannot be read without; window, rotary scheme, dtype and remat may change.
_OF_WEIGHTS = (
    *("vocab_size", "dim", "layers", "heads", "kv_head_count", "head_size", "feed_forward_size", "tied_embeddings"),
    *("attention_bias", "output_bias", "feed_forward_bias", "qk_norm", "norm_epsilon", "beacon_output"),
)
_SLAB = 2**24  # bytes read at a time
# Beside the weights: what a tokenizer, a chat template or a generation default needs.
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class Source(NamedTuple):
    """Where one of our parameters lies in a checkpoint: as a matrix [rows, columns], which may be part of a fused one."""

    name: str  # of the tensor; {} stands for the layer
    rows: tuple[int, ...]  # our axes (without the layer's) that make its rows
    columns: tuple[int, ...] = ()  # and its columns; none for vectors
    first_row: int = 0


def sources(config: TransformerConfig | BeaconConfig, family: Family) -> dict[str, Source]:
    """The source of every parameter, by its path in our model."""
    layer = "model.layers.{}."
    found = {
        "embedding/table": Source("model.embed_tokens.weight", (0,), (1,)),
        "norm/scale": Source("model.norm.weight", (0,)),
        "blocks/attention_norm/scale": Source(layer + "input_layernorm.weight", (0,)),
        "blocks/feed_forward_norm/scale": Source(layer + "post_attention_layernorm.weight", (0,)),
        "blocks/attention/o": Source(layer + "self_attn.o_proj.weight", (2,), (0, 1)),  # ours [H, K, D]
        "blocks/feed_forward/down": Source(layer + "mlp.down_proj.weight", (1,), (0,)),
    }
    if not config.tied_embeddings:
        found["embedding/head"] = Source("lm_head.weight", (1,), (0,))
    query_rows, key_rows = config.heads * config.head_size, config.kv_head_count * config.head_size
    for part, fused_row in (("q", 0), ("k", query_rows), ("v", query_rows + key_rows)):  # ours [D, H, K] and [D, G, K]
        name, first = ("qkv_proj", fused_row) if family == "phi3" else (f"{part}_proj", 0)
        found[f"blocks/attention/{part}"] = Source(f"{layer}self_attn.{name}.weight", (1, 2), (0,), first)
        if config.attention_bias:
            found[f"blocks/attention/{part}_bias"] = Source(f"{layer}self_attn.{part}_proj.bias", (0, 1))
    for part, fused_row in (("gate", 0), ("up", config.feed_forward_size)):
        name, first = ("gate_up_proj", fused_row) if family == "phi3" else (f"{part}_proj", 0)
        found[f"blocks/feed_forward/{part}"] = Source(f"{layer}mlp.{name}.weight", (1,), (0,), first)
    if config.feed_forward_bias:
        found |= {f"blocks/feed_forward/{part}_bias": Source(f"{layer}mlp.{part}_proj.bias", (0,)) for part in ("gate", "up", "down")}
    if config.output_bias:
        found["blocks/attention/o_bias"] = Source(layer + "self_attn.o_proj.bias", (0,))
    if config.qk_norm:
        found |= {f"blocks/attention/{part}_norm/scale": Source(f"{layer}self_attn.{part}_norm.weight", (0,)) for part in ("q", "k")}
    if isinstance(config, BeaconConfig):
        found["beacon"] = Source("model.beacon_embed_tokens.weight", (0,), (1,))
        for part in ("q", "k", "v"):
            found[f"blocks/attention/beacons/{part}"] = Source(f"{layer}self_attn.beacon_{part}_proj.weight", (1, 2), (0,))
            if config.attention_bias:
                found[f"blocks/attention/beacons/{part}_bias"] = Source(f"{layer}self_attn.beacon_{part}_proj.bias", (0, 1))
        if config.beacon_output:
            found["blocks/attention/beacon_o"] = Source(layer + "self_attn.beacon_o_proj.weight", (2,), (0, 1))
    return found


def _tensor_shapes(parameters: dict[str, Any], where: dict[str, Source]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint that these parameters make."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, source in where.items():
        shape = parameters[path].shape
        layers = range(shape[0]) if "{}" in source.name else (0,)
        shape = shape[1:] if "{}" in source.name else shape
        columns = (math.prod(shape[axis] for axis in source.columns),) if source.columns else ()
        rows = source.first_row + math.prod(shape[axis] for axis in source.rows)
        for i in layers:
            name = source.name.format(i)
            shapes[name] = (max(rows, shapes.get(name, (0,))[0]), *columns)
    return shapes


# --- In ---


def read_config(path: str | pathlib.Path) -> TransformerConfig | BeaconConfig:
    """The config of a checkpoint folder's model.

    Raises:
      UserError: no config.json there, or one that is not supported.
    """
    record = read_json(pathlib.Path(path) / "config.json")
    backbone = config_from_huggingface(record)
    return beacon_from_huggingface(record, backbone) if is_beacon(record) else backbone


def load(
    path: str | pathlib.Path, mesh: Mesh | None = None, dtype: str | None = None, config: TransformerConfig | BeaconConfig | None = None
) -> Transformer | Beacon:
    """Reads a checkpoint folder: Llama 1 to 3, Mistral, Qwen2, Qwen3, Phi-3, or one of these with beacons.

    Each device's slice is read by itself, one after another, so that with a mesh no host holds more than the slice being read.

    Args:
      path: a folder with config.json and model.safetensors, or its shards and their index.
      mesh: where the parameters go; None: the first device.
      dtype: of parameters and computation; None: float32 parameters. bfloat16 halves the memory; to train, start from float32.
      config: replaces the folder's, to read the same weights with another window, rotary scheme, compute dtype or remat.

    Raises:
      UserError: something cannot be read or is not supported. Tensors that are missing, unexpected or of another shape are all listed.
    """
    path, stored = pathlib.Path(path), read_config(path)
    if dtype not in (None, *_COMPUTE_DTYPES):
        raise UserError(f"dtype is {dtype}; it must be one of {', '.join(_COMPUTE_DTYPES)}")
    family, config = read_json(path / "config.json")["model_type"], config or stored
    of = lambda config, name: getattr(config, name, "no beacons")
    differing = [name for name in _OF_WEIGHTS if of(config, name) != of(stored, name)]
    if differing:
        found = (f"model.{name} {of(config, name)}, it has {of(stored, name)}" for name in differing)
        raise UserError(f"{path} cannot be read with {'; '.join(found)}")
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    model = models.abstract(config)
    parameters, where = parameter_paths(model), sources(config, family)
    with contextlib.ExitStack() as closing:
        tensors = _open(path, closing)
        _check(path, tensors, _tensor_shapes(parameters, where), config.tied_embeddings)
        stored = np.dtype(dtype or "float32")
        return fill(model, mesh, lambda name, shape: _reader(tensors, where[name], shape, stored))


def _open(path: pathlib.Path, closing: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor's name and the open (mapped, not read) file that holds it."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of tensors to files")
        files = sorted(set(names.values()))
    elif pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)):
        raise UserError(f"{path} has {pickles[0]}, a torch pickle, which can run code when read; convert it to safetensors first")
    else:
        raise UserError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    if missing := [name for name in files if not (path / name).exists()]:
        raise UserError(f"{path} lacks {', '.join(missing)}, which {index.name} names")
    tensors = {}
    for name in files:
        try:
            file = closing.enter_context(safetensors.safe_open(path / name, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path / name} cannot be read, it may be cut off: {error}") from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _check(path: pathlib.Path, tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Compares all tensors of a checkpoint with those that the model is made of."""
    # Old Llama files hold rotary tables; a tied head may be stored although nothing reads it.
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unexpected" for name in sorted(tensors) if name not in shapes and name not in ignored]
    for name in filter(tensors.__contains__, shapes):
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != shapes[name]:
            problems.append(f"{name} is {found.get_shape()}, not {list(shapes[name])}")
        elif found.get_dtype() not in _DTYPES:
            problems.append(f"{name} holds {found.get_dtype()}, not one of {', '.join(_DTYPES)}")
    if problems:
        raise UserError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def _reader(tensors: dict[str, Any], source: Source, shape: tuple[int, ...], dtype: np.dtype) -> Read:
    """A function that reads the slice `index` of a parameter of this shape, a few rows of the file at a time."""
    stacked = "{}" in source.name
    sizes, axes, row_axis = shape[1:] if stacked else shape, source.rows + source.columns, source.rows[0]

    def rows(name: str, bounds: list[range]) -> np.ndarray:
        # Of axes that make rows or columns together, the first is cut in the file and the others, which are small, afterwards.
        def span(axes: tuple[int, ...], first: int) -> slice:
            inner = math.prod(sizes[axis] for axis in axes[1:])
            return slice(first + bounds[axes[0]].start * inner, first + bounds[axes[0]].stop * inner)

        groups = [(source.rows, source.first_row)] + ([(source.columns, 0)] if source.columns else [])
        part = tensors[name].get_slice(name)[tuple(span(*group) for group in groups)]
        part = part.reshape([len(bounds[axis]) if axis in (row_axis, *source.columns[:1]) else sizes[axis] for axis in axes])
        part = part.transpose(np.argsort(axes))
        return part[tuple(slice(None) if len(bound) == size else slice(bound.start, bound.stop) for bound, size in zip(bounds, part.shape))]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [range(*cut.indices(size)) for cut, size in zip(index, shape)]
        layers, bounds = (bounds[0], bounds[1:]) if stacked else (range(1), bounds)
        out = np.empty([len(layers), *map(len, bounds)], dtype)
        whole = bounds[row_axis]
        step = max(1, _SLAB * len(layers) * len(whole) // max(out.nbytes, 1))
        for place, layer in enumerate(layers):
            for start in range(whole.start, whole.stop, step):
                slab = range(start, min(start + step, whole.stop))
                into = [slice(None)] * len(bounds)
                into[row_axis] = slice(slab.start - whole.start, slab.stop - whole.start)
                out[(place, *into)] = rows(source.name.format(layer), [slab if axis == row_axis else b for axis, b in enumerate(bounds)])
        return out if stacked else out[0]

    return read


# --- Out ---


def save(
    model: Transformer | Beacon,
    path: str | pathlib.Path,
    *,
    like: str | pathlib.Path | None = None,
    family: Family | None = None,
    length: int = 2048,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers loads, and that gives the same logits there.

    The folder appears when it is complete; one file of weights is held in memory at a time. What cannot be written so, a run folder keeps
    (training/weights.py).

    Args:
      model: a Transformer, or one with beacons, which the official code of Activation Beacon loads.
      path: a new or empty folder.
      like: a folder of transformers that the model came from: its family, token ids, tokenizer and chat template are kept.
      family: what the model is written as; None: that of `like` if it can express the model, otherwise the first that can.
      length: the config's max_position_embeddings, where neither the rotary scheme nor `like` says.
      dtype: of the numbers written: float32, bfloat16 or float16; None: as they are.
      shard_bytes: weights go into files of about this size.

    Raises:
      UserError: transformers, or the official code, has no such model, or the folder cannot be written.
    """
    config, like = getattr(model, "config", None), like and pathlib.Path(like)
    if not isinstance(config, TransformerConfig | BeaconConfig):
        raise UserError(f"transformers has no {type(model).__name__}; a run folder (convert --to run) keeps it in our own format")
    if dtype not in (None, *_STORED_DTYPES):
        raise UserError(f"dtype is {dtype}; it must be one of {', '.join(_STORED_DTYPES)}")
    if family not in (None, *FAMILIES):
        raise UserError(f"family is {family}; it must be one of {', '.join(FAMILIES)}")
    kept = read_json(like / "config.json") if like else {}
    backbone = config.transformer if isinstance(config, BeaconConfig) else config
    if family is None:
        candidates = [kept["model_type"], *FAMILIES] if kept.get("model_type") in FAMILIES else FAMILIES
        family = min(candidates, key=lambda family: len(obstacles(backbone, family)))
    if found := obstacles(backbone, family):
        reasons = f"{' and '.join(found)} cannot be written for transformers (as {family})"
        raise UserError(f"{reasons}; a run folder (convert --to run) keeps it in our own format")

    parameters, where = parameter_paths(model), sources(config, family)
    stored = np.dtype(dtype or next(iter(parameters.values())).dtype)
    record = config_to_huggingface(backbone, family, length, kept)
    if isinstance(config, BeaconConfig):
        record |= beacon_to_huggingface(config, record["max_position_embeddings"])
    record["dtype" if "dtype" in record else "torch_dtype"] = stored.name
    shapes = _tensor_shapes(parameters, where)
    shards = _shards({name: math.prod(shape) * stored.itemsize for name, shape in shapes.items()}, shard_bytes)
    parts: dict[str, list[tuple[Source, str, int]]] = {}
    for name, source in where.items():
        for i in range(config.layers) if "{}" in source.name else (0,):
            parts.setdefault(source.name.format(i), []).append((source, name, i))
    writes = jax.process_index() == 0
    with new_folder(pathlib.Path(path)) if writes else contextlib.nullcontext() as folder:
        file_of = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: _gather(parameters, parts[name], stored) for name in names}
            file_of |= dict.fromkeys(names, file)
            if writes:
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if writes:
            if len(shards) > 1:
                total = sum(math.prod(shape) for shape in shapes.values()) * stored.itemsize
                index = {"metadata": {"total_size": total}, "weight_map": file_of}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
            if like:
                copy_side_files(like, folder)


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what goes with a model's weights: tokenizer, chat template, defaults for generation."""
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copy(file, target / file.name)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in files of at most `limit` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _gather(parameters: dict[str, jax.Array], parts: list[tuple[Source, str, int]], dtype: np.dtype) -> np.ndarray:
    """One tensor of the checkpoint, on the host."""
    rows = []
    for source, name, layer in sorted(parts, key=lambda part: part[0].first_row):
        value = parameters[name][layer] if "{}" in source.name else parameters[name]
        if not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        value = np.asarray(value, dtype).transpose(source.rows + source.columns)
        columns = math.prod(value.shape[len(source.rows) :])
        rows.append(value.reshape(-1, columns) if source.columns else value.reshape(-1))
    return np.ascontiguousarray(np.concatenate(rows))
