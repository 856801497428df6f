"""infinicontext score-tokens: what a reference model makes of each token of a corpus, computed once and kept for selective training."""

import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from infinicontext import sharding
from infinicontext.data.corpora import Corpus, load_corpus
from infinicontext.data.reference import HEADER, header, keep_row, pieces, row_batch, rows
from infinicontext.errors import UserError
from infinicontext.files import locked, read_json, write_json
from infinicontext.models.streaming import Model
from infinicontext.objectives.selective import Selective, reference_scores
from infinicontext.training.weights import load_model, parameters_fingerprint, trained_length

SAVE_EVERY = 50  # batches


class Task(NamedTuple):
    """What is scored by which model, as the command line says."""

    reference: pathlib.Path  # a run folder or a Hugging Face folder
    source: str  # as CorpusData.source
    output: pathlib.Path
    validation_fraction: float  # of the training that the scores are for, whose training documents alone are scored
    window: int | None  # tokens the model reads at a time; None: as in its training
    batch: int
    entropy: bool  # the entropies of its predictions, too
    step: int | None
    dtype: str = "float16"  # of the scores; float32 takes twice the room


def score_tokens(task: Task, mesh: Mesh) -> None:
    """Scores, or goes on with, the training documents of a corpus, split over the devices of a mesh.

    Raises:
      UserError: the model has no tokenizer, the corpus cannot be read, or the folder holds scores of something else.
    """
    loaded = load_model(task.reference, mesh, step=task.step)
    if loaded.tokenizer is None:
        raise UserError(f"{task.reference} has no tokenizer")
    window = task.window or trained_length(task.reference)
    corpus = load_corpus(task.source, loaded.tokenizer, "train", task.validation_fraction)
    names = ("reference_loss", *(["reference_entropy"] if task.entropy else []))
    # Half a window of context at least, but for a document's beginning.
    stride = max(window // 2, 1)
    about = header(corpus, loaded.tokenizer) | {
        "reference": str(task.reference.resolve()),
        "step": task.step,
        "parameters": parameters_fingerprint(loaded.model),
        "source": task.source,
        "validation_fraction": task.validation_fraction,
        "window": window,
        "stride": stride,
        "scores": list(names),
        "dtype": task.dtype,
    }
    others = [path for path in task.output.iterdir() if path.name != ".lock"] if task.output.is_dir() else []
    if others and not (task.output / HEADER).exists():
        raise UserError(f"{task.output} exists and holds no scores; choose a new folder")
    with locked(task.output, "scoring", str(task.output)):
        _score(task, loaded.model, corpus, about, names, mesh)


def _score(task: Task, model: Model, corpus: Corpus, about: dict, names: tuple[str, ...], mesh: Mesh) -> None:
    """Scores what is not scored yet."""
    output, window, done = task.output, about["window"], 0
    if (output / HEADER).exists():
        found = read_json(output / HEADER)
        if changed := [name for name in about if found.get(name) != about[name]]:
            raise UserError(f"{output} holds other scores: {changed[0]} was {found.get(changed[0])}, not {about[changed[0]]}")
        done = found.get("rows", 0)
    else:
        write_json(output / HEADER, about | {"rows": 0, "complete": False})
    kept = {}
    for name in names:
        try:
            if done:
                kept[name] = np.lib.format.open_memmap(output / f"{name}.npy", mode="r+")
                if kept[name].shape != (len(corpus.tokens),):
                    raise ValueError("it has another length than the corpus")
            else:
                kept[name] = np.lib.format.open_memmap(output / f"{name}.npy", mode="w+", dtype=task.dtype, shape=(len(corpus.tokens),))
                kept[name][:] = np.nan
        except (OSError, ValueError) as error:
            raise UserError(f"{output / name}.npy is damaged ({error}); remove {output} to begin anew") from error
    objective = Selective(score="low_reference_loss", also="low_reference_entropy" if task.entropy else None)
    score = jax.jit(functools.partial(reference_scores, objective))
    on_devices = NamedSharding(mesh, P(sharding.RULES["batch"]))
    batch_size = -(-task.batch // sharding.batch_divisor(mesh)) * sharding.batch_divisor(mesh)
    all_rows = rows(pieces(corpus, window, about["stride"]), window)

    def save(count: int) -> None:
        for values in kept.values():
            values.flush()
        write_json(output / HEADER, about | {"rows": count, "complete": count == len(all_rows)})

    with tqdm(total=len(all_rows), initial=done, disable=not sys.stderr.isatty(), unit="row") as bar:
        for number, at in enumerate(range(done, len(all_rows), batch_size), 1):
            part = all_rows[at : at + batch_size]
            read = [row_batch(corpus, row, window) for row in part + part[:1] * (batch_size - len(part))]
            batch = {name: jax.device_put(np.stack([row[name] for row in read]), on_devices) for name in read[0]}
            for name, values_BW in score(model, batch).items():
                for row, values_W in zip(part, np.asarray(values_BW)):
                    keep_row(kept[name], row, values_W)
            bar.update(len(part))
            if number % SAVE_EVERY == 0:
                save(at + len(part))
    save(len(all_rows))
    print(f"{output}: {len(corpus.tokens):,} tokens, mean reference loss {np.nanmean(np.float32(kept['reference_loss'])):.4f} nats")
