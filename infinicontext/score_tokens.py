"""infinicontext score-tokens: what a reference model makes of each token of a corpus, computed once and kept for selective training."""

import functools
import hashlib
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from infinicontext import sharding
from infinicontext.data.corpora import load_corpus
from infinicontext.data.reference import HEADER, header, keep_row, pieces, row_batch, rows
from infinicontext.errors import UserError
from infinicontext.files import read_json, write_json
from infinicontext.objectives.selective import Selective, reference_scores
from infinicontext.training.run_folder import load_config
from infinicontext.training.weights import is_run, load_model

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


def score_tokens(task: Task, mesh: Mesh) -> None:
    """Scores, or goes on with, the training documents of a corpus, split over the devices of a mesh.

    Raises:
      UserError: the model has no tokenizer, the corpus cannot be read, or the folder holds scores of something else.
    """
    loaded = load_model(task.reference, mesh, step=task.step)
    if loaded.tokenizer is None:
        raise UserError(f"{task.reference} has no tokenizer")
    window = task.window or (load_config(task.reference).train_length if is_run(task.reference) else 2048)
    corpus = load_corpus(task.source, loaded.tokenizer, "train", task.validation_fraction)
    names = ("reference_loss", *(["reference_entropy"] if task.entropy else []))
    # Half a window of context at least, but for a document's beginning.
    stride = max(window // 2, 1)
    about = header(corpus, loaded.tokenizer) | {
        "reference": str(task.reference),
        "parameters": fingerprint(loaded.model),
        "source": task.source,
        "validation_fraction": task.validation_fraction,
        "window": window,
        "stride": stride,
        "batch": task.batch,
        "scores": list(names),
        "dtype": "float16",
    }
    done = 0
    if (task.output / HEADER).exists():
        found = read_json(task.output / HEADER)
        if changed := [name for name in about if found.get(name) != about[name]]:
            raise UserError(f"{task.output} holds other scores: {changed[0]} was {found.get(changed[0])}, not {about[changed[0]]}")
        done = found["rows"]
    elif task.output.exists() and any(task.output.iterdir()):
        raise UserError(f"{task.output} exists and holds no scores; choose a new folder")
    task.output.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name in names:
        path = task.output / f"{name}.npy"
        if done:
            kept[name] = np.lib.format.open_memmap(path, mode="r+")
        else:
            kept[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(corpus.tokens),))
            kept[name][:] = np.nan
    objective = Selective(score="low_reference_loss", also="low_reference_entropy" if task.entropy else None)
    score = jax.jit(functools.partial(reference_scores, objective))
    on_devices = NamedSharding(mesh, P(sharding.RULES["batch"]))
    batch_size = -(-task.batch // sharding.batch_divisor(mesh)) * sharding.batch_divisor(mesh)
    all_rows = rows(pieces(corpus, window, stride), window)

    def save(count: int) -> None:
        for values in kept.values():
            values.flush()
        write_json(task.output / HEADER, about | {"rows": count, "complete": count == len(all_rows)})

    save(done)
    with tqdm(total=len(all_rows), initial=done, disable=not sys.stderr.isatty(), unit="row") as bar:
        for number, at in enumerate(range(done, len(all_rows), batch_size), 1):
            part = all_rows[at : at + batch_size]
            read = [row_batch(corpus, row, window) for row in part + part[:1] * (batch_size - len(part))]
            batch = {name: jax.device_put(np.stack([row[name] for row in read]), on_devices) for name in read[0]}
            for name, values_BW in score(loaded.model, batch).items():
                for row, values_W in zip(part, np.asarray(values_BW)):
                    keep_row(kept[name], row, values_W)
            bar.update(len(part))
            if number % SAVE_EVERY == 0:
                save(at + len(part))
    save(len(all_rows))
    print(f"{task.output}: {len(corpus.tokens):,} tokens, mean reference loss {np.nanmean(np.float32(kept['reference_loss'])):.4f} nats")


def fingerprint(model) -> str:
    """SHA-256 (hex) of a model's parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
