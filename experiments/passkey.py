"""x"""

from infinicontext.data.pipeline import PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig


def full() -> Experiment:
    """Full attention."""
    return Experiment(
        name="passkey_full",
        model=TransformerConfig(vocab_size=64, dim=64, layers=2, heads=4),
        data=PasskeyData(lengths=(128,), stage_steps=()),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.01),
        evaluation=Evaluation(
            tasks=("passkey",),
            lengths=(128, 256, 512, 1024, 2048, 4096),
            passkey=PasskeyEvaluation(samples=20, depths=(0.0, 0.25, 0.5, 0.75, 1.0)),
        ),
        steps=1000,
        batch_size=32,
    )
