"""Models in folders: a run folder holds ours, a Hugging Face folder a pretrained Transformer, one with consolidate_config.json an official
MEGALODON. All are read wherever a model is asked for.

A run folder that came from Hugging Face keeps the small files of that folder (config.json, tokenizer, chat template) in huggingface/.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from infinicontext import models, pretrained, sharding
from infinicontext.data.books import BookData
from infinicontext.data.images import ImageData
from infinicontext.data.instructions import InstructionData, start_and_end
from infinicontext.data.pipeline import CorpusData
from infinicontext.data.recall import RecallData
from infinicontext.data.tokenizers import Tokenizer, load_tokenizer, speaking
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.files import new_folder
from infinicontext.longrope.factors import load_factors
from infinicontext.models import ModelConfig
from infinicontext.models.streaming import Model
from infinicontext.nn.parameters import is_parameter
from infinicontext.pretrained.huggingface import copy_side_files
from infinicontext.pretrained.megalodon import Rope
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.run_folder import KEPT, load_config, write_config

Prompt = Literal["tokens", "random"]


class Loaded(NamedTuple):
    """A model to be used, and what belongs to it."""

    model: Model
    tokenizer: Tokenizer | None  # None: the folder has none
    start: tuple[int, ...] | None  # ids written before a text; None: what the tokenizer itself adds
    stop: tuple[int, ...]  # ids that end a text


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run, rather than one of Hugging Face."""
    return "experiment" in _read_or_nothing(folder / "config.json")


def is_official(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint of the official MEGALODON code."""
    return (folder / "consolidate_config.json").exists()


def load_model(folder: pathlib.Path, mesh: Mesh, *, dtype: str | None = None, step: int | None = None, rope: Rope | None = None) -> Loaded:
    """A model for use, with its tokenizer.

    Args:
      folder: a run folder or a Hugging Face folder.
      mesh: where the parameters go.
      dtype: of parameters and computation; None: as in training, or float32.
      step: of a run folder's checkpoint; None: the newest.
      rope: which rotary frequencies an official MEGALODON gets (pretrained/megalodon.py: `load`); None: the checkpoint's.

    Raises:
      UserError: no model there, it cannot be read, or it is a classifier.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a model is a run folder or a Hugging Face folder")
    if rope is not None and not is_official(folder):
        raise UserError(f"--rope is {rope}, but {folder} is no checkpoint of the official MEGALODON code")
    if is_run(folder):
        experiment = load_config(folder)
        if type(experiment.model) in models.CLASSIFIERS:
            raise UserError(f"{folder} holds a classifier, which reads no text; infinicontext eval says how often it is right")
        config = experiment.model if dtype is None else _with_dtype(experiment.model, dtype)
        model = merged(restore(folder, config, mesh, step)[1])
        model = model if dtype is None else jax.tree.map(lambda x: x.astype(dtype), model)
        tokenizer = _own_tokenizer(experiment)
        start, stop = _start_and_stop(folder, experiment, tokenizer)
    elif step is not None:
        raise UserError(f"--step is {step}, but {folder} is no run folder and has no checkpoints")
    else:
        model = _load_pretrained(folder, mesh, dtype, rope)
        tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer.json").exists() else None
        start, stop = (None, stop_ids(folder)) if tokenizer else ((), ())
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}")
    return Loaded(model, tokenizer, start, stop)


def speaker(run: pathlib.Path, experiment: Experiment) -> Tokenizer | None:
    """The tokenizer of a run as its model reads and answers: with what begins a text in use, and with all that ends an answer."""
    tokenizer = _own_tokenizer(experiment)
    if tokenizer is None:
        return None
    start, stop = _start_and_stop(run, experiment, tokenizer)
    if start is None:
        whole = tokenizer.library.encode("a").ids
        start = whole[: len(whole) - len(tokenizer.encode("a"))]
    return speaking(tokenizer, start[0] if start else None, stop)


def _start_and_stop(
    run: pathlib.Path, experiment: Experiment, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """`start` and `stop` of Loaded."""
    kept = _kept(run, experiment)
    if isinstance(experiment.data, InstructionData | BookData):
        # What the model was tuned to read and to end with, whatever its tokenizer adds and the model before it did.
        start, end = start_and_end(experiment.data, tokenizer)
        return start, (end, *(stop_ids(kept) if kept else ()))
    if kept:
        return None, stop_ids(kept)
    start = () if tokenizer is None or tokenizer.start_id is None else (tokenizer.start_id,)
    # Documents follow one another in training, so the start of the next is the end of this one.
    return start, start


def _with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    if isinstance(config, models.AdaptedConfig):
        return dataclasses.replace(config, model=_with_dtype(config.model, dtype))
    return dataclasses.replace(config, dtype=dtype)


def merged(model: Model) -> Model:
    """With LoRA's adapters in the weights, where there are any."""
    return jax.jit(lambda model: model.merged())(model) if isinstance(model, models.Adapted) else model


def _own_tokenizer(experiment: Experiment) -> Tokenizer | None:
    """A run's tokenizer; None for images, for recall, and for a converted run that came without one."""
    if isinstance(experiment.data, ImageData | RecallData):
        return None
    path = pathlib.Path(experiment.data.tokenizer)
    return None if path.name == KEPT and path.is_dir() and not (path / "tokenizer.json").exists() else load_tokenizer(str(path))


def _kept(run: pathlib.Path, experiment: Experiment) -> pathlib.Path | None:
    """The kept Hugging Face files of a run, if the run still speaks with that tokenizer."""
    if not (run / KEPT / "tokenizer.json").exists():
        return None
    tokenizer = _own_tokenizer(experiment)
    same = tokenizer is not None and tokenizer.fingerprint() == load_tokenizer(str(run / KEPT)).fingerprint()
    return run / KEPT if same else None


def _load_pretrained(folder: pathlib.Path, mesh: Mesh, dtype: str | None = None, rope: Rope | None = None) -> Model:
    """What a folder that is no run holds."""
    if is_official(folder):
        return pretrained.megalodon.load(folder, mesh, dtype, rope=rope or "checkpoint")
    return pretrained.load(folder, mesh, dtype)


def restore(folder: pathlib.Path, config: ModelConfig, mesh: Mesh, step: int | None = None) -> tuple[int, Model]:
    """The step and the parameters of a run's checkpoint, in a model with this config.

    Raises:
      UserError: there is no such checkpoint, or its parameters are not those of such a model.
    """
    abstract, stored = models.abstract(config), models.abstract(load_config(folder).model)
    names = lambda model: {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    wanted, found = names(abstract), names(stored)
    if differing := [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]:
        name = min(differing)
        raise UserError(
            f"{folder} holds a {type(stored).__name__} with other parameters, in {len(differing)} places; "
            f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'missing')}"
        )
    where = sharding.shardings(abstract, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore_model(like, step)
    finally:
        checkpoints.close()


def starting_model(folder: pathlib.Path, config: ModelConfig, mesh: Mesh, seed: int = 0) -> Model:
    """float32 parameters to begin training with, in a model with this config, which need not be the folder's: window, rotary scheme, dtype
    and remat change no parameter. LoRA's adapters, the gates of Infini-attention, the prompt of FAM and what beacons have of their own are
    made where the folder has none.

    Raises:
      UserError: the parameters are not those of such a model.
    """
    stored = load_config(folder).model if is_run(folder) else None
    if type(stored) is not type(config):
        if isinstance(config, models.AdaptedConfig):
            return _grown(config, starting_model(folder, config.model, mesh), mesh, seed)
        if isinstance(config, models.InfiniConfig | models.FamConfig | models.BeaconConfig):
            before = stored if stored or is_official(folder) else pretrained.read_config(folder)
            if type(before) is not type(config):
                if not is_official(folder):
                    _check_window(folder, before, config)
                token = end_of_text(folder) if isinstance(config, models.BeaconConfig) else None
                return _grown(config, starting_model(folder, config.transformer, mesh), mesh, seed, beacon_token=token)
        if isinstance(stored, models.AdaptedConfig):
            return merged(restore(folder, dataclasses.replace(stored, model=config), mesh)[1])
    if is_run(folder):
        return restore(folder, config, mesh)[1]
    if not isinstance(config, models.TransformerConfig | models.BeaconConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise UserError(f"start_from {folder} is no run folder of a {kind}; infinicontext convert makes one of an official checkpoint")
    return pretrained.load(folder, mesh, config=config)


def _grown(config: ModelConfig, model: Model, mesh: Mesh, seed: int, prompt: Prompt = "tokens", beacon_token: int | None = None) -> Model:
    """A model with this config and another's parameters, by name; those that the other lacks are drawn. The other's are donated.

    What beacons have of their own begins as a copy of what tokens have, and their embedding as that of a token.
    """

    def grow(model: Model) -> Model:
        whole = models.build(config, nnx.Rngs(seed))
        if isinstance(whole, models.Adapted):
            whole.model = model
            return whole
        own = dict(jax.tree_util.tree_leaves_with_path(model, is_leaf=is_parameter))
        whole = jax.tree_util.tree_map_with_path(lambda path, drawn: own.get(path, drawn), whole, is_leaf=is_parameter)
        if isinstance(config, models.FamConfig) and config.fam_length and prompt == "tokens":
            tokens_F = jax.random.randint(jax.random.key(seed), (config.fam_length,), 0, config.vocab_size)
            whole.prompt[...] = whole.embedding(tokens_F[None])[0].astype(whole.prompt[...].dtype)
        if isinstance(config, models.BeaconConfig):
            attention = whole.blocks.attention
            for name in ("q", "k", "v", *(("q_bias", "k_bias", "v_bias") if config.attention_bias else ())):
                getattr(attention.beacons, name)[...] = getattr(attention, name)[...]
            if config.beacon_output:
                attention.beacon_o[...] = attention.o[...]
            whole.beacon[...] = whole.embedding.table[...][beacon_token][None]
        return whole

    return jax.jit(grow, out_shardings=sharding.shardings(models.abstract(config), mesh), donate_argnums=0)(model)


def _check_window(source: pathlib.Path, before: ModelConfig, config: ModelConfig) -> None:
    """Raises UserError if a Transformer's tokens do not see what they will see with this config's softmax attention, and may so far."""
    before = before.model if isinstance(before, models.AdaptedConfig) else before
    if getattr(before, "attention", "full") == "full":
        return
    if isinstance(config, models.BeaconConfig):
        raise UserError(f"{source}: its tokens see a window only; beacons are for a Transformer with full attention")
    blocks = lambda config: (config.block, config.memory_blocks)
    if before.attention == "block_window" and isinstance(config, models.FamConfig):
        if blocks(before) != blocks(config):
            raise UserError(
                f"{source}: its tokens see blocks of {before.block} and {before.memory_blocks} before their own; "
                f"so must they with FAM, not {config.block} and {config.memory_blocks}"
            )
        return
    sees = before.window if before.attention == "window" else before.block
    if config.span > sees:
        name = "segments must be" if isinstance(config, models.InfiniConfig) else "a block and those seen before it must be"
        raise UserError(f"{source}: its tokens see the last {sees}; with a memory, {name} no longer, not {config.span}")


def parameters_fingerprint(model: Model) -> str:
    """SHA-256 (hex) of a model's parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def trained_length(folder: pathlib.Path) -> int:
    """Tokens that a model was first trained on at a time: what its config.json says where it came from Hugging Face, else a run's rows.

    Of Mistral's, which have seen no distance beyond their window, that is the window.
    """
    source = folder / KEPT if is_run(folder) else folder
    found = _read_or_nothing(source / "config.json")
    if longest := found.get("original_max_position_embeddings") or found.get("max_position_embeddings"):
        window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
        return min(longest, window or longest)
    return load_config(folder).train_length


def stop_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """The end-of-text ids of a Hugging Face folder: generation_config.json's or, without those, config.json's."""
    for name in ("generation_config.json", "config.json"):
        found = _read_or_nothing(folder / name).get("eos_token_id")
        if found is not None:
            return tuple(i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int) and i >= 0)
    return ()


def end_of_text(folder: pathlib.Path) -> int:
    """The id of a token that beacons may begin as: of a folder's end of text or, without one, 0."""
    kept = folder / KEPT if is_run(folder) else folder
    return next(iter(stop_ids(kept)), 0)


def _read_or_nothing(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def to_run(
    source: pathlib.Path,
    target: pathlib.Path,
    mesh: Mesh,
    *,
    step: int | None = None,
    rope: Rope | None = None,
    factors: pathlib.Path | None = None,
    grow: Callable[[models.TransformerConfig], models.InfiniConfig | models.FamConfig | models.BeaconConfig] | None = None,
    prompt: Prompt = "tokens",
    beacon_token: int | None = None,
    command: str = "",
) -> None:
    """Makes a run folder with nothing but parameters: of a pretrained folder (`rope` as in `load_model`), at step 0, or of a run.

    `factors` is a file of longrope/factors.py, by which a Transformer is to turn.

    With `grow` the model, which must be a Transformer, gets the memory of the config which `grow` makes of its own. `prompt` is what FAM
    begins as: embeddings of tokens, which attention is used to, or random numbers of their size. `beacon_token` is the token whose
    embedding beacons begin with; None: the end of a text.

    Raises:
      UserError: the source cannot be read, is no Transformer or one with another window, or the target is not new.
    """
    with new_folder(target) as folder:
        if is_run(source):
            experiment = load_config(source, whole_paths=False)
            step, model = restore(source, experiment.model, mesh, step)
        else:
            step, model = 0, _load_pretrained(source, mesh, rope=rope)
            experiment = Experiment(target.name, model.config, CorpusData(tokenizer=KEPT))
        if factors is not None:
            if not isinstance(model.config, models.TransformerConfig):
                raise UserError(f"--factors is {factors}; the model in {source}, a {type(model).__name__}, takes none")
            config = dataclasses.replace(model.config, rope=load_factors(factors, model.config.head_size, model.config.rope))
            model, experiment = _grown(config, model, mesh, 0), dataclasses.replace(experiment, model=config)
        if grow is not None:
            model, step = merged(model), 0
            if not isinstance(model.config, models.TransformerConfig):
                raise UserError(f"{source}: its model is of kind {type(model).__name__}; a memory can be given to a Transformer")
            config = grow(model.config)
            _check_window(source, model.config, config)
            # What was trained before need not be a part of this model; beacons are for a Transformer that stands still.
            train = ("beacon",) if isinstance(config, models.BeaconConfig) else ()
            optimizer = dataclasses.replace(experiment.optimizer, train=train, groups=())
            token = end_of_text(source) if beacon_token is None else beacon_token
            if isinstance(config, models.BeaconConfig) and not 0 <= token < config.vocab_size:
                raise UserError(f"--beacon-token is {token}; it must be from 0 to {config.vocab_size - 1}, the model's last token")
            model = _grown(config, model, mesh, 0, prompt, token)
            experiment = dataclasses.replace(experiment, model=config, optimizer=optimizer)
        keep_files(source, folder)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(step, model)
        checkpoints.close()
        write_config(experiment, folder, "", command)


def keep_files(source: pathlib.Path, run: pathlib.Path) -> None:
    """Keeps in a run folder what its model's Hugging Face folder, or the run it starts from, has beside weights."""
    source = source / KEPT if is_run(source) else source
    if (source / "config.json").is_file() and not (run / KEPT).exists():
        with new_folder(run / KEPT) as folder:
            shutil.copy(source / "config.json", folder)
            copy_side_files(source, folder)


def to_huggingface(source: pathlib.Path, target: pathlib.Path, mesh: Mesh, *, dtype: str | None = None, step: int | None = None) -> None:
    """Writes a run's model for transformers, with its tokenizer where that is a tokenizer.json.

    Raises:
      UserError: transformers has no such model, the source cannot be read, or the target is not new.
    """
    experiment = load_config(source)
    # The files it came with, unless it was trained with another tokenizer since.
    like = _kept(source, experiment) or (source / KEPT if _own_tokenizer(experiment) is None else None)
    with new_folder(target) as folder:
        model = merged(restore(source, experiment.model, mesh, step)[1])
        pretrained.save(model, folder, like=like, length=experiment.train_length, dtype=dtype)
        named = pathlib.Path(getattr(experiment.data, "tokenizer", ""))
        if like is None and named.is_dir():
            copy_side_files(named, folder)
        elif like is None and named.is_file():
            shutil.copy(named, folder / "tokenizer.json")


def to_megalodon(source: pathlib.Path, target: pathlib.Path, mesh: Mesh, *, step: int | None = None, shards: int = 1) -> None:
    """Writes a run's MEGALODON as a checkpoint of the official code, cut for a model-parallel size of `shards`.

    Raises:
      UserError: the run has another architecture, cannot be read, or the target is not new.
    """
    pretrained.megalodon.save(merged(restore(source, load_config(source).model, mesh, step)[1]), target, shards)


def prompt_ids(loaded: Loaded, text: str, *, begins: bool = True) -> np.ndarray:
    """A prompt as the model expects it: int32 ids with what stands before a text that begins there.

    Raises:
      UserError: there is no tokenizer, or nothing to read.
    """
    if loaded.tokenizer is None:
        raise UserError("this model's folder has no tokenizer.json, so it cannot read text")
    if not begins:
        ids = np.asarray(loaded.tokenizer.encode(text), np.int32)
    elif loaded.start is None:
        ids = np.array(loaded.tokenizer.library.encode(text).ids, np.int32)
    else:
        ids = np.concatenate([np.array(loaded.start, np.int32), loaded.tokenizer.encode(text)])
    if not len(ids):
        raise UserError("a prompt is empty, and this model's tokenizer writes nothing before it")
    return ids
