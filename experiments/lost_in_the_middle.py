r"""Lost in the middle: values asked of a JSON object, by where their key stands; every architecture learns the task on few pairs.

Byte-level models of about 0.2 million parameters, trained on objects of two to four pairs and asked of up to 32.

    infinicontext training-questions experiments/lost_in_the_middle.py:full runs/lost/train.jsonl --tasks key_value \
        --evaluation.key-value.pairs 2 3 4 --samples 2000
    infinicontext sweep experiments/lost_in_the_middle.py:all --workdir runs/lost
    infinicontext compare runs/lost/* --output report/

A pair takes 81 bytes, so four pairs are 519 tokens with the question and the answer. Answers are teacher-forced.

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

SIZE = {"vocab_size": 257, "dim": 64, "layers": 3, "heads": 2, "remat": False}


def full() -> Experiment:
    """Full attention."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 128."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=128))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 128."""
    sizes = SIZE | {"heads": 1, "z_dim": 32, "value_dim": 112, "feed_forward": 112, "norm_groups": 4}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=128))


def infini() -> Experiment:
    """Infini-attention in segments of 64."""
    return _experiment("infini", InfiniConfig(**SIZE, segment=64))


def fam() -> Experiment:
    """TransformerFAM in blocks of 64 that see one block before them."""
    return _experiment("fam", FamConfig(**SIZE, block=64, memory_blocks=1, fam_length=16))


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
        data=InstructionData("runs/lost/train.jsonl", tokenizer="bytes", template="raw", length=1056),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("key_value",),
            lengths=(1024,),
            key_value=KeyValue((4, 8, 16, 32)),
            asking=Asking(samples=10, mode="teacher_forced"),
        ),
        steps=600,
        batch_size=8,
        validation_every=100,
        checkpoint_every=100,
    )
