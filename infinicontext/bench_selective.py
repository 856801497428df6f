"""What selecting tokens costs: a training step that learns from all of them, from those chosen by stored reference losses, and from those
chosen by a reference model that reads each batch.

Measured on 2 CPU cores (jax 0.10.2, float32), --length 2048 --rounds 15, D 256, 4 layers, medians (in brackets the best) of interleaved
steps of 512 and of 2,048 tokens, in ms; steps of one form spread by a tenth:

    all tokens                            132 (115)           883 (811)
    stored losses                         132 (115)  1.01     901 (808)  1.02
    by row, stored losses                 134 (120)  1.02     954 (834)  1.08
    a reference as large as the model     156 (139)  1.19   1,020 (974)  1.16

Shape letters: B batch, T time.
"""

import dataclasses

import jax
import numpy as np

from infinicontext.bench import Candidate, Size, interleave, machine, table
from infinicontext.data.pipeline import CorpusData
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.selective import Selective
from infinicontext.sharding import make_mesh
from infinicontext.training.loop import reference_reader
from infinicontext.training.step import make_steps

HEADS, LAYERS, VOCABULARY = 4, 4, 512


def bench_selective(size: Size) -> None:
    """Steps with their optimizer, by length, of a Transformer of 4 layers and 512 tokens; the reference is as large as it."""
    if size.dim % (2 * HEADS):
        raise UserError(f"--dim is {size.dim}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    config = TransformerConfig(vocab_size=VOCABULARY, dim=size.dim, layers=LAYERS, heads=HEADS, remat=False)
    all_tokens = Experiment("bench", config, CorpusData("python"), objective=Selective(ratio=1.0), batch_size=size.batch)
    mesh = make_mesh(all_tokens.mesh, jax.devices()[:1])
    print(f"{machine()}\nD {size.dim}, {LAYERS} layers, {HEADS} heads, {VOCABULARY} tokens")
    for T in sorted({max(size.length // 4, 1), size.length}):
        batch = _batch(size.batch, T)
        stored = batch | {"reference_loss": np.random.default_rng(1).gamma(2, 1, (size.batch, T)).astype(np.float32)}
        experiments = {"all tokens": all_tokens}
        experiments |= {
            f"{scope}, stored losses": dataclasses.replace(all_tokens, objective=Selective(scope=scope)) for scope in ("batch", "row")
        }
        experiments["batch, reference read"] = experiments["batch, stored losses"]
        with jax.set_mesh(mesh):
            candidates = {
                name: Candidate(_stepping(experiment, mesh, stored if "stored" in name else batch, reads="read" in name), compiled=False)
                for name, experiment in experiments.items()
            }
            interleave(candidates, size.rounds)
        columns = {"tokens/s": lambda seconds, _, tokens=size.batch * T: f"{tokens / seconds:,.0f}"}
        table(f"training step, {size.batch} x {T:,} tokens", candidates, columns)


def _stepping(experiment: Experiment, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], *, reads: bool):
    """A function that trains one step further at each call."""
    steps = make_steps(experiment, mesh)
    state = steps.init(jax.random.key(0))
    with_losses = reference_reader(experiment, steps.init(jax.random.key(1)).model if reads else None)

    def step():
        nonlocal state
        state, metrics = steps.train_step(state, with_losses(batch))
        return metrics["loss"]

    return step


def _batch(B: int, T: int) -> dict[str, np.ndarray]:
    """Random tokens, each row one document."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (B, T + 1)).astype(np.int32)
    ones = np.ones((B, T), np.float32)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "loss_mask": ones, "answer_mask": 0 * ones}
