r"""Multi-query associative recall (MQAR): keys with values, then the keys again; and the same where the keys come segments later.

Two layers of width 64, a vocabulary of 128, sequences of 32 tokens that begin with 1, 2 or 4 pairs, and queries anywhere after them, or
(`far`) after a gap of 16 tokens, which is two segments. Few pairs are what more are learnt by: full attention learns four within 500 steps
beside one and two, and eight alone, of 64 tokens, not in 1,500.

    infinicontext sweep experiments/associative_recall.py:near --workdir runs/recall/near
    infinicontext sweep experiments/associative_recall.py:far --workdir runs/recall/far
    infinicontext compare runs/recall/far/* --output report/

Not run yet.
"""

import dataclasses

from infinicontext.data.recall import RecallData
from infinicontext.evaluation.recall import RecallEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

SIZE = {"vocab_size": 128, "dim": 64, "layers": 2, "heads": 2, "remat": False}


def full() -> Experiment:
    """Full attention, which has an exact solution in two layers."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 8: with two layers no query of `far` can see a pair."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=8))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 8."""
    sizes = SIZE | {"heads": 1, "z_dim": 32, "value_dim": 112, "feed_forward": 112, "norm_groups": 4}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=8))


def infini() -> Experiment:
    """Infini-attention in segments of 8."""
    return _experiment("infini", InfiniConfig(**SIZE, segment=8))


def fam() -> Experiment:
    """TransformerFAM in blocks of 8 that see no block before them."""
    return _experiment("fam", FamConfig(**SIZE, block=8, memory_blocks=0, fam_length=8))


def bswa() -> Experiment:
    """TransformerBSWA: the same blocks without feedback memory."""
    return _experiment("bswa", fam().model.bswa)


def near() -> list[Experiment]:
    """All of them where queries may come at once."""
    return [full(), window(), megalodon(), infini(), fam(), bswa()]


def far() -> list[Experiment]:
    """All of them where pairs lie segments before."""
    return [
        dataclasses.replace(experiment, name=f"{experiment.name}_far", data=dataclasses.replace(experiment.data, gap=16))
        for experiment in near()
    ]


def _experiment(name: str, model: ModelConfig) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        data=RecallData(vocab_size=128, length=32, pairs=(1, 2, 4), power=1.0),
        objective=NextToken(loss="answers"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.05),
        evaluation=Evaluation(tasks=("recall",), lengths=(32, 64, 256, 1024), capacity=4096, recall=RecallEvaluation(samples=100)),
        steps=600,
        batch_size=128,
        log_every=50,
        validation_every=100,
        checkpoint_every=500,
    )
