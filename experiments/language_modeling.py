"""x"""

import dataclasses

from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.training.optimizer import OptimizerConfig


def full() -> Experiment:
    """Full attention."""
    return Experiment(
        name="lm_full",
        model=TransformerConfig(vocab_size=257, dim=128, layers=4, heads=4),
        data=CorpusData(length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=Evaluation(tasks=("perplexity",), lengths=(512, 1024, 2048, 4096, 8192, 16384)),
        steps=500,
        batch_size=8,
    )


def window() -> Experiment:
    e = full()
    return dataclasses.replace(e, name="lm_window", model=dataclasses.replace(e.model, attention="window", window=128))


def block_window() -> Experiment:
    e = full()
    return dataclasses.replace(
        e, name="lm_block_window", model=dataclasses.replace(e.model, attention="block_window", block=32, memory_blocks=3)
    )
