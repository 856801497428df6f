r"""Multi-query associative recall (MQAR): keys with values, then the keys again; and the same where the keys come segments later.

Two layers of width 64, a vocabulary of 128, sequences of 32 tokens that begin with 1, 2 or 4 pairs, and queries anywhere after them, or
(`far`) after a gap of 16 tokens, which is two segments. Few pairs are what more are learnt by: full attention learns four within 500 steps
beside one and two, and eight alone, of 64 tokens, not in 1,500.

    infinicontext sweep experiments/associative_recall.py:near --workdir runs/recall/near
    infinicontext sweep experiments/associative_recall.py:far --workdir runs/recall/far
    infinicontext compare runs/recall/far/* --output report/

Measured on 2 CPU cores (jax 0.10.2, float32), models of 0.1 million parameters, 600 steps, one seed; the share of queries answered in %,
with 1/2/4 pairs, 100 examples each. Who knows which values there are, and no more, has 100/50/25:

                  near, 32      64            256          1,024        far, 32      1,024
    full          100/99/84     100/100/86    99/89/73     73/63/40     100/50/26    90/48/23
    window        44/27/14      20/10/7       7/4/2        7/2/3        1/2/1        4/2/3
    megalodon     100/48/22     98/47/24      41/24/12     17/10/8      100/42/18    15/4/4
    infini        100/44/24     100/50/26     100/48/25    100/50/25    100/53/26    100/50/27
    fam           100/48/22     100/48/24     76/37/18     29/10/6      100/49/23    18/10/5
    bswa          23/8/1        10/2/2        4/2/2        4/1/2        1/2/1        3/2/3

- In these steps full attention alone learns whose value is whose, and where all queries are far it does not, either: what it learns first
  is which values there are, and gaps that are short help it on.
- Every memory holds the values across segments, which window and blocks without feedback cannot; which key each belongs to, none has learnt
  yet. Infini-attention's loses nothing in 127 segments; FAM's and MEGALODON's fade within 32.
- Longer training was not tried. A memory that finds a key among others: experiments/passkey.py.
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
