r"""Lost in the middle: values asked of a JSON object, by where their key stands; every architecture learns the task on few pairs.

Byte-level models of about 0.8 million parameters, trained on objects of two to eight pairs and asked of up to 128.

    infinicontext training-questions experiments/lost_in_the_middle.py:full runs/lost/train.jsonl --tasks key_value \
        --evaluation.key-value.pairs 2 4 8 --samples 1000
    infinicontext sweep experiments/lost_in_the_middle.py:all --workdir runs/lost
    infinicontext compare runs/lost/* --output report/

A pair takes 80 bytes, so eight pairs are 805 tokens with the question and 128 are 10,400. Answers are teacher-forced.

Not run yet.
"""

from infinicontext.data.instructions import InstructionData
from infinicontext.evaluation.lost_in_the_middle import KeyValue
from infinicontext.evaluation.questions import Asking
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

SIZE = {"vocab_size": 257, "dim": 128, "layers": 4, "heads": 4, "remat": False}


def full() -> Experiment:
    """Full attention."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 256, three pairs."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=256))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 256."""
    sizes = SIZE | {"heads": 2, "z_dim": 64, "value_dim": 240, "feed_forward": 192, "norm_groups": 8}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=256))


def infini() -> Experiment:
    """Infini-attention in segments of 128."""
    return _experiment("infini", InfiniConfig(**SIZE, segment=128))


def fam() -> Experiment:
    """TransformerFAM in blocks of 128 that see one block before them."""
    return _experiment("fam", FamConfig(**SIZE, block=128, memory_blocks=1, fam_length=32))


def bswa() -> Experiment:
    """TransformerBSWA: the same blocks without feedback memory."""
    return _experiment("bswa", fam().model.bswa)


def all() -> list[Experiment]:
    """One of each."""
    return [full(), window(), megalodon(), infini(), fam(), bswa()]


def _experiment(name: str, model: ModelConfig) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        data=InstructionData("runs/lost/train.jsonl", tokenizer="bytes", template="raw", length=1024),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("key_value",),
            lengths=(1024,),
            key_value=KeyValue((8, 32, 128)),
            asking=Asking(samples=20, mode="teacher_forced"),
        ),
        steps=2000,
        batch_size=16,
        validation_every=200,
        checkpoint_every=200,
    )
