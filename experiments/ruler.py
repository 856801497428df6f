r"""RULER for small models: each architecture learns the thirteen tasks at 2,048 bytes, and is asked at one to 64 times that.

    infinicontext download ruler
    infinicontext training-questions experiments/ruler.py:full runs/ruler/train.jsonl --lengths 1536 2k --samples 2000 \
        --tasks niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue \
        niah_multiquery vt cwe fwe qa_1 qa_2
    infinicontext sweep experiments/ruler.py:all --workdir runs/ruler
    infinicontext compare runs/ruler/* --output report/

What a length does not hold with bytes for tokens is left out of both (the questions take more than 2,048). Meant for an accelerator: on a
laptop's CPU, take fewer tasks.

Not run yet.
"""

from infinicontext.data.instructions import InstructionData
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

SIZE = {"vocab_size": 257, "dim": 256, "layers": 6, "heads": 8}
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


def full() -> Experiment:
    """Full attention."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 512."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=512))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 512."""
    sizes = SIZE | {"heads": 2, "z_dim": 128, "value_dim": 480, "feed_forward": 384, "norm_groups": 16}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=512))


def infini() -> Experiment:
    """Infini-attention in segments of 256, with memories as worn and as diluted as long texts leave them (experiments/passkey.py)."""
    return _experiment("infini", InfiniConfig(**SIZE, segment=256, training_horizons=(1, 16), training_dilution=(4, 256)))


def fam() -> Experiment:
    """TransformerFAM in blocks of 256 that see one block before them."""
    return _experiment("fam", FamConfig(**SIZE, block=256, memory_blocks=1, fam_length=64))


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
        data=InstructionData("runs/ruler/train.jsonl", tokenizer="bytes", template="raw", length=2304),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("ruler",), lengths=LENGTHS, capacity=max(LENGTHS) + 1024, ruler=RulerEvaluation(samples=20, example_budget=1000)
        ),
        steps=10000,
        batch_size=32,
        validation_every=500,
        checkpoint_every=500,
    )
