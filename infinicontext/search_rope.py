"""infinicontext search-rope: factors for a model, searched on documents of the target length, written with their history and a picture."""

import dataclasses
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from infinicontext.data.corpora import Corpus, load_corpus
from infinicontext.data.pipeline import CorpusData
from infinicontext.errors import UserError
from infinicontext.evaluation.labels import perplexity
from infinicontext.experiment import to_plain
from infinicontext.longrope.factors import known_factors, magnitude, save_factors
from infinicontext.longrope.score import Documents, Scorer, first_tokens, needles
from infinicontext.longrope.search import CriticalSpace, Progress, SearchConfig, Space, evolve
from infinicontext.models.streaming import Model
from infinicontext.models.transformer import Transformer
from infinicontext.nn.rope import RopeConfig, rope_table
from infinicontext.training.run_folder import load_config
from infinicontext.training.weights import Loaded, is_run, load_model, parameters_fingerprint, trained_length

BASELINES = ("pi", "ntk", "yarn")


class Task(NamedTuple):
    """What is searched for which model, as the command line says."""

    model: pathlib.Path  # a run folder or a Hugging Face folder
    target_length: int
    output: pathlib.Path
    data: str | None  # None: what the run was trained on, its training documents, so that those held out are new to evaluations
    original_length: int | None  # None: what the folder says
    documents: int
    short: bool  # factors for texts up to the original length
    batch: int
    lanes: int
    together: int | None  # documents; None: all
    segment: int
    step: int | None
    dtype: str | None  # None: the model's


def search_rope(task: Task, config: SearchConfig, mesh: Mesh) -> RopeConfig:
    """Searches, or resumes the search of the same output, and writes OUTPUT (JSON), OUTPUT's .search.json and .png.

    Returns:
      The scheme with the best factors.

    Raises:
      UserError: the model has no rotary factors to search, a length or the data do not fit, or a file cannot be written.
    """
    _check_output(task.output)
    loaded = load_model(task.model, mesh, dtype=task.dtype, step=task.step)
    model = loaded.model
    original, rope = _original_length(task, model), model.config.rope
    scale, done = task.target_length / original, 1.0
    if task.short:
        # Phi-3's reach 3.05.
        config = dataclasses.replace(config, start_tokens=(0,), largest=config.largest or 4.0)
        found = dataclasses.replace(rope, long_factors=rope.short_factors or (1.0,) * len(rope.long_factors))
        factor = rope_table(rope, model.config.head_size, original).attention_factor
    else:
        found, factor = rope, magnitude(config.magnitude, scale, original)
        if rope.scheme == "longrope":
            # What the model was tuned with stays.
            factor = rope_table(rope, model.config.head_size, original + 1).attention_factor
        done = (rope.length or rope.factor * original) / original if rope.scheme == "longrope" else 1.0
        if task.target_length <= done * original and (scale == 1 or done > 1):
            raise UserError(f"--target-length is {task.target_length}; the model reads {int(done * original)} tokens already")
    kind = CriticalSpace if config.algorithm == "longrope2" else Space
    space = kind(config, found, model.config.head_size, scale, original, done)
    corpus = read_corpus(task, loaded)
    needle = config.algorithm == "longrope2" if config.fitness == "by_algorithm" else config.fitness == "needle"
    choose = needles if needle else first_tokens
    extra = (loaded.tokenizer,) if choose is needles else ()
    documents: Documents = choose(corpus, *extra, task.target_length, task.documents, config.seed)
    score = Scorer(
        model, documents, rope, factor, mesh=mesh, batch=task.batch, lanes=task.lanes, together=task.together, segment=task.segment
    )

    about = {
        "model": str(task.model),
        "parameters": parameters_fingerprint(model),
        "rope": to_plain(rope),
        "target_length": task.target_length,
        "original_length": original,
        "short": task.short,
        "documents": task.documents,
        "data": corpus.fingerprint(),
        "dtype": model.config.dtype,
        "search": to_plain(config),
    }
    with tqdm(total=config.iterations + 1, disable=not sys.stderr.isatty(), unit="iteration") as bar:

        def say(progress: Progress) -> None:
            bar.update(progress.iteration + 1 - bar.n)
            bar.set_postfix_str(f"best {perplexity(progress.ranked[0][0]):.4g}")
            if bar.disable:
                last = progress.history[-1]
                line = f"iteration {last['iteration']}/{config.iterations} best {last['loss']:.5f} nats, {last['scored']} scored"
                print(line, file=sys.stderr, flush=True)

        progress = evolve(space, score, file=task.output.with_suffix(".search.json"), about=about, say=say)

    loss, best = progress.ranked[0]
    if not np.isfinite(loss):
        raise UserError(f"{task.model}: no candidate gave a finite loss on texts of {task.target_length} tokens")
    factors = tuple(np.round(space.factors(best), 10).tolist())
    if task.short:
        result = dataclasses.replace(rope, short_factors=factors)
    else:
        result = RopeConfig(
            "longrope",
            base=rope.base,
            partial=rope.partial,
            factor=scale,
            original_length=original,
            length=task.target_length,
            short_factors=rope.short_factors,
            long_factors=factors,
            start_tokens=space.start_tokens(best),
            attention_factor=factor,
            # LongRoPE2 leaves short texts as they were.
            short_attention_factor=1.0 if config.algorithm == "longrope2" and factor != 1 else rope.short_attention_factor,
        )
    plain = RopeConfig(base=rope.base, partial=rope.partial)
    # In a second search those of what is still missing, on top of what the model has.
    has = np.array(found.long_factors or (1.0,))
    compared = {name: has * known_factors(name, plain, model.config.head_size, scale / done, original) for name in BASELINES}
    if task.short:
        # What the model would read short texts by if it had no factors of their own.
        compared["long"] = np.array(rope.long_factors)
    losses = dict(zip(compared, score(np.stack(list(compared.values())), np.zeros(len(compared), np.int32)).tolist()))
    save_factors(task.output, result, about | {"loss": loss, "losses_of_known_factors": losses, "scored": progress.history[-1]["scored"]})
    draw(task.output.with_suffix(".png"), progress, compared, losses, factors, scale)
    print(
        f"loss {loss:.4f} nats; " + ", ".join(f"{name} {losses[name]:.4f}" for name in losses) + f" (same attention factor, {factor:.4f})"
    )
    return result


def _original_length(task: Task, model: Model) -> int:
    """Tokens that the model was trained on. Raises UserError if there is nothing to search for it, or not for this target."""
    if not isinstance(model, Transformer) or model.config.rope.scheme not in ("default", "longrope"):
        said = f"a {type(model).__name__} with rope.scheme {getattr(getattr(model.config, 'rope', None), 'scheme', 'none')}"
        raise UserError(f"{task.model} holds {said}; factors are searched for a Transformer with the scheme default or longrope")
    rope = model.config.rope
    if rope.scheme == "longrope" and task.original_length not in (None, rope.original_length):
        raise UserError(f"--original-length is {task.original_length}; the model's factors say {rope.original_length}")
    original = task.original_length or rope.original_length or trained_length(task.model)
    if original < 2:
        raise UserError(f"--original-length is {original}; it must be 2 or more")
    if model.config.span is not None and model.config.span <= original:
        raise UserError(f"{task.model} sees {model.config.span} tokens back at any length, no more than the original length, {original}")
    if task.target_length < original:
        raise UserError(f"--target-length is {task.target_length}; it must be the original length, {original}, or more")
    if task.short and (rope.scheme != "longrope" or task.target_length != original):
        raise UserError(f"--short is for a model with longrope, at --target-length {original}, its original length")
    return original


def _check_output(output: pathlib.Path) -> None:
    """Raises UserError if what a search finds could not be written."""
    if output.suffix != ".json":
        raise UserError(f"--output is {output}; it must be a .json file")
    if output.is_dir() or not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: {'it is a folder' if output.is_dir() else f'there is no folder {output.parent}'}")
    if not os.access(output.resolve().parent, os.W_OK):
        raise UserError(f"--output {output}: nothing can be written into {output.parent}")


def read_corpus(task: Task, loaded: Loaded) -> Corpus:
    """Documents to search on."""
    if loaded.tokenizer is None:
        raise UserError(f"{task.model} has no tokenizer, which documents need")
    if task.data is not None:
        return load_corpus(task.data, loaded.tokenizer, "train", 0.0)
    data = load_config(task.model).data if is_run(task.model) else None
    if not isinstance(data, CorpusData):
        raise UserError("--data is missing; it names the documents to search on, for the model was not trained on a corpus here")
    return load_corpus(data.source, loaded.tokenizer, "train", data.validation_fraction)


def draw(path: pathlib.Path, progress: Progress, compared: dict, losses: dict, factors: tuple[float, ...], scale: float) -> None:
    """The best loss by iteration, beside known factors; and the factors themselves."""
    # Here, because matplotlib takes a second to import.
    import matplotlib
    from matplotlib.figure import Figure

    from infinicontext.evaluation.drawing import COLORS, LINES, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 7), layout="constrained")
        above, below = figure.subplots(2)
        above.plot([entry["scored"] for entry in progress.history], [entry["loss"] for entry in progress.history], color=COLORS[0])
        for number, name in enumerate(compared, 1):
            style = {"color": COLORS[number], "linestyle": LINES[number % len(LINES)]}
            if np.isfinite(losses[name]):
                above.axhline(losses[name], label=name, **style)
            below.plot(compared[name], label=name, **style)
        below.plot(factors, color=COLORS[0], label="found")
        above.set(title="Best loss", xlabel="candidates scored", ylabel="nats per token")
        below.set(title=f"Factors for {scale:g} times the original length", xlabel="rotary pair, the fastest first", yscale="log")
        above.legend()
        below.legend()
        figure.savefig(path)
