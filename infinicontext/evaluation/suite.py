"""What is measured of a trained model: the tasks by name, at lengths from within to far beyond what it was trained on."""

import dataclasses
from typing import Literal

import jax
import numpy as np

from infinicontext.data.corpora import load_corpus
from infinicontext.data.pipeline import CorpusData, PasskeyData, validation_batches
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.passkey import PasskeyEvaluation, evaluate_passkey
from infinicontext.evaluation.perplexity import PerplexityEvaluation, bits_per_byte, evaluate_perplexity, ngram_losses
from infinicontext.models.streaming import Model, abstract_state_bytes

Task = Literal["perplexity", "passkey"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured after training, and at which lengths."""

    tasks: tuple[Task, ...] = ("perplexity",)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)  # tokens read
    segment: int = 1024  # tokens per call while a long input is read
    capacity: int = 65536  # the largest cache that is allocated for a model whose state grows
    seed: int = 0
    perplexity: PerplexityEvaluation = PerplexityEvaluation()
    passkey: PasskeyEvaluation = PasskeyEvaluation()

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"evaluation.lengths is {self.lengths}; it must be one or more lengths of at least 1")
        for name in ("segment", "capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}; it must be 1 or more")


def state_grows(model: Model) -> bool:
    """Whether the model's state must be allocated for the length it is to read."""
    return jax.eval_shape(lambda: model.room(model.init_state(1, capacity=1))) is not None


def evaluate(
    model: Model, evaluation: Evaluation, data: CorpusData | PasskeyData, validation_loss, *, batch_size: int, batches: int, seed: int, say
) -> dict:
    """Runs the tasks.

    Args:
      model: a trained model.
      evaluation: tasks and lengths.
      data: what it was trained on: decides the tokenizer, and the documents of the perplexity task.
      validation_loss: (model, batch) -> mean loss of a validation batch.
      batch_size: rows of a validation batch.
      batches: number of validation batches.
      seed: of the validation batches.
      say: told of progress.

    Returns:
      state_bytes by length, and a result for each task (see its own file). Lengths beyond `evaluation.capacity` are listed as skipped where
      the state grows.

    Raises:
      UserError: a task that does not fit the data.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    lengths = sorted(set(evaluation.lengths))
    limit = evaluation.capacity if state_grows(model) else max(lengths)
    readable = [length for length in lengths if length <= limit]
    beyond = [
        {"length": length, "reason": f"the state grows with length and evaluation.capacity is {limit}"}
        for length in lengths
        if length > limit
    ]
    tasks = {}
    if "perplexity" in evaluation.tasks:
        if not isinstance(data, CorpusData):
            raise UserError("evaluation.tasks has perplexity, which needs documents, but data is PasskeyData; use passkey")
        held_out = load_corpus(data.source, tokenizer, "validation", data.validation_fraction)
        result = evaluate_perplexity(
            model, held_out, evaluation.perplexity, readable, longest=max(lengths), segment=evaluation.segment, say=say
        )
        parts = validation_batches(data, batch_size, batches, seed)
        loss = float(np.mean([float(validation_loss(model, part)) for part in parts]))
        train = load_corpus(data.source, tokenizer, "train", data.validation_fraction)
        tasks["perplexity"] = {
            "corpus": data.source,
            "tokenizer": data.tokenizer,
            "validation_nll": loss,
            "bits_per_byte": bits_per_byte(loss, tokenizer, parts),
            "baselines": ngram_losses(train, tokenizer.vocab_size, parts),
        } | result
    if "passkey" in evaluation.tasks:
        tasks["passkey"] = evaluate_passkey(
            model, tokenizer, evaluation.passkey, readable, segment=evaluation.segment, seed=evaluation.seed, say=say
        )
    for result in tasks.values():
        result["skipped"] += beyond
    return {"state_bytes": {str(length): abstract_state_bytes(model, length) for length in lengths}, "tasks": tasks}
