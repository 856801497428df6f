"""Models in folders: a run folder holds ours, a Hugging Face folder a pretrained Transformer. Both are read wherever a model is asked for.

A run folder that came from Hugging Face keeps the small files of that folder (config.json, tokenizer, chat template) in huggingface/.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from infinicontext import models, pretrained, sharding
from infinicontext.data.pipeline import CorpusData
from infinicontext.data.tokenizers import Tokenizer, load_tokenizer
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.streaming import Model
from infinicontext.pretrained.huggingface import copy_side_files
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.run_folder import load_config, write_config

KEPT = "huggingface"


class Loaded(NamedTuple):
    """A model to be used, and what belongs to it."""

    model: Model
    tokenizer: Tokenizer | None  # None: the folder has none
    start: tuple[int, ...] | None  # ids written before a text; None: what the tokenizer itself adds
    stop: tuple[int, ...]  # ids that end a text


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run, rather than one of Hugging Face."""
    try:
        return "experiment" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def load_model(folder: pathlib.Path, mesh: Mesh, *, dtype: str | None = None, step: int | None = None) -> Loaded:
    """A model for use, with its tokenizer.

    Args:
      folder: a run folder or a Hugging Face folder.
      mesh: where the parameters go.
      dtype: of parameters and computation; None: as in training, or float32.
      step: of a run folder's checkpoint; None: the newest.

    Raises:
      UserError: no model there, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a model is a run folder or a Hugging Face folder")
    if is_run(folder):
        experiment = load_config(folder)
        config = experiment.model if dtype is None else dataclasses.replace(experiment.model, dtype=dtype)
        model = restore(folder, config, mesh, step)
        model = model if dtype is None else jax.tree.map(lambda x: x.astype(dtype), model)
        tokenizer, files = load_tokenizer(experiment.data.tokenizer), folder / KEPT
    else:
        model = pretrained.load(folder, mesh, dtype)
        tokenizer, files = load_tokenizer(str(folder)) if (folder / "tokenizer.json").exists() else None, folder
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}")
    if (files / "tokenizer.json").exists():
        return Loaded(model, tokenizer, None, stop_ids(files))
    start = () if tokenizer is None or tokenizer.start_id is None else (tokenizer.start_id,)
    # Documents follow one another in training, so the start of the next is the end of this one.
    return Loaded(model, tokenizer, start, stop_ids(files) or start)


def restore(folder: pathlib.Path, config: ModelConfig, mesh: Mesh, step: int | None = None) -> Model:
    """The parameters of a run's checkpoint, in a model with this config."""
    abstract = models.abstract(config)
    where = sharding.shardings(abstract, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore_model(like, step)[1]
    finally:
        checkpoints.close()


def starting_model(folder: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Model:
    """float32 parameters to begin training with, in a model with this config, which need not be the folder's: window, rotary scheme, dtype
    and remat change no parameter.

    Raises:
      UserError: the parameters are not those of such a model.
    """
    if is_run(folder):
        return restore(folder, config, mesh)
    if not isinstance(config, models.TransformerConfig):
        raise UserError(f"start_from {folder} holds a Transformer, not a {type(config).__name__}; infinicontext convert makes one of it")
    return pretrained.load(folder, mesh, config=config)


def stop_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """The end-of-text ids of a Hugging Face folder: generation_config.json's or, without those, config.json's."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def to_run(source: pathlib.Path, target: pathlib.Path, mesh: Mesh, command: str = "") -> None:
    """Makes a run folder, at step 0, of a Hugging Face folder.

    Raises:
      UserError: the source cannot be read, or the target is not new.
    """
    require_new(target)
    model = pretrained.load(source, mesh)
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    keep_files(source, temporary)
    tokenizer = str(target / KEPT) if (source / "tokenizer.json").exists() else "bytes"
    experiment = Experiment(target.name, model.config, CorpusData(tokenizer=tokenizer))
    checkpoints = Checkpoints(temporary, keep=1)
    checkpoints.save(0, model)
    checkpoints.close()
    write_config(experiment, temporary, "", command)
    temporary.replace(target)


def keep_files(source: pathlib.Path, run: pathlib.Path) -> None:
    """Keeps in a run folder what its model's Hugging Face folder, or the run it starts from, has beside weights."""
    source = source / KEPT if is_run(source) else source
    if (source / "config.json").is_file() and not (run / KEPT).exists():
        temporary = run / (KEPT + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        shutil.copy(source / "config.json", temporary)
        copy_side_files(source, temporary)
        temporary.replace(run / KEPT)


def to_huggingface(source: pathlib.Path, target: pathlib.Path, mesh: Mesh, *, dtype: str | None = None, step: int | None = None) -> None:
    """Writes a run's model for transformers, with its tokenizer where that is a tokenizer.json.

    Raises:
      UserError: transformers has no such model, the source cannot be read, or the target is not new.
    """
    require_new(target)
    experiment = load_config(source)
    model = restore(source, experiment.model, mesh, step)
    like = source / KEPT if (source / KEPT).is_dir() else None
    pretrained.save(model, target, like=like, length=experiment.train_length, dtype=dtype)
    file = pathlib.Path(experiment.data.tokenizer)
    if like is None and file.is_file():
        shutil.copy(file, target / "tokenizer.json")


def require_new(target: pathlib.Path) -> None:
    """Raises UserError unless the path is free, or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose a new folder")


def prompt_ids(loaded: Loaded, text: str) -> np.ndarray:
    """A prompt as the model expects it: int32 ids with what stands before a text."""
    if loaded.tokenizer is None:
        raise UserError("this model's folder has no tokenizer.json, so it cannot read text")
    if loaded.start is None:
        return np.array(loaded.tokenizer.library.encode(text).ids, np.int32)
    return np.concatenate([np.array(loaded.start, np.int32), loaded.tokenizer.encode(text)])
