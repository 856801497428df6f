"""Passkey retrieval: a number said once in a lot of irrelevant text, asked for at the end.

Word-level models of 0.1 million parameters, trained on 128 and then 256 tokens, asked at up to 128 times that.

    infinicontext train experiments/passkey.py:window --workdir runs/window
    infinicontext sweep experiments/passkey.py:all --workdir runs/passkey
    infinicontext compare runs/passkey/* --output report/

Cost: the sweep without MEGALODON, nine runs, took 20 minutes on 2 CPU cores (25,000 tokens/s in training, 160,000 read in evaluation).

Result, exact keys in % by tokens read (100 samples each; mean and standard deviation of three seeds):

                   128          256          512          1024        4096        32768
    full           77 +- 14     99.7 +- 0.6  24 +- 20     7 +- 8      7 +- 12     not read (its cache was bounded at 4096)
    window         95 +- 4      59.7 +- 0.6  40 +- 0      20 +- 0     20 +- 0     20 +- 0
    block_window   98 +- 2      59.7 +- 0.6  40 +- 0      20 +- 0     20 +- 0     20 +- 0
    megalodon      59.5 +- 0.7  20.5 +- 0.7  20 +- 0      20 +- 0     19.5 +- 0.7 18 +- 1.4    (two seeds)

Full attention finds every key at the length it was trained on last and loses even nearby ones beyond, where positions are new to it. The
windows find a key at any length, but only where their reach of two layers x 128 tokens covers it: of five depths three at 256 tokens, the
last one beyond. That is what a memory has to beat. MEGALODON, at the same budget, finds it where it shares a chunk of 64 with the question:
nothing precise crosses a chunk's border through its averages and statistics yet.
"""

import dataclasses

from infinicontext.data.pipeline import PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig


def full() -> Experiment:
    """Full attention: finds the key anywhere within the training length."""
    return Experiment(
        name="full",
        model=TransformerConfig(vocab_size=64, dim=64, layers=2, heads=4),
        data=PasskeyData(tokenizer="passkey", lengths=(128, 256), stage_steps=(250,)),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.01),
        evaluation=Evaluation(
            tasks=("passkey",), lengths=(128, 256, 512, 1024, 4096, 32768), capacity=4096, passkey=PasskeyEvaluation(samples=20)
        ),
        steps=500,
        batch_size=32,
        log_every=20,
        validation_every=100,
        checkpoint_every=100,
    )


def window() -> Experiment:
    """Each token sees the last 128: the control that can find a key near the end only."""
    return _with_attention("window", attention="window", window=128)


def block_window() -> Experiment:
    """Each token sees its own block of 32 and the 3 before it: TransformerFAM's baseline."""
    return _with_attention("block_window", attention="block_window", block=32, memory_blocks=3)


def megalodon() -> Experiment:
    """MEGALODON with as many parameters, in chunks of 64: what lies before reaches a token through its moving average and statistics."""
    experiment = full()
    model = MegalodonConfig(vocab_size=64, dim=64, layers=2, heads=1, z_dim=32, value_dim=112, feed_forward=112, chunk=64, norm_groups=4)
    return dataclasses.replace(experiment, name="megalodon", model=model)


def infini() -> Experiment:
    """Infini-attention by the delta rule, trained on up to 4,096 tokens; each row's normalizer stands still after a random time."""
    return Experiment(
        name="infini",
        model=InfiniConfig(vocab_size=64, dim=128, layers=3, heads=4, segment=64, training_horizons=(4, 128), remat=False),
        data=PasskeyData(lengths=(192, 256, 512, 1024, 2048, 4096), stage_steps=(550, 50, 70, 80, 100), jitter=64),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.05),
        evaluation=Evaluation(tasks=("passkey",), lengths=(1024, 4096, 16384, 65536), passkey=PasskeyEvaluation(samples=20)),
        steps=1450,
        batch_size=43,
        log_every=20,
        validation_every=50,
        checkpoint_every=100,
    )


def infini_linear() -> Experiment:
    """The same by the linear rule, under which nothing is gained by a normalizer that stands still."""
    experiment = infini()
    model = dataclasses.replace(experiment.model, update="linear", training_horizons=None)
    return dataclasses.replace(experiment, name="infini_linear", model=model)


def all() -> list[Experiment]:
    """The first four with three seeds each."""
    return [
        dataclasses.replace(experiment, name=f"{experiment.name}-seed{seed}", seed=seed)
        for experiment in (full(), window(), block_window(), megalodon())
        for seed in range(3)
    ]


def demo() -> list[Experiment]:
    """The first three on a shorter curriculum, with fewer samples: under a minute each."""
    return [
        dataclasses.replace(
            experiment,
            name=f"passkey_{experiment.name}",
            data=dataclasses.replace(experiment.data, stage_steps=(200,)),
            evaluation=dataclasses.replace(
                experiment.evaluation, lengths=(128, 256, 512, 1024, 4096, 16384), capacity=1024, passkey=PasskeyEvaluation(samples=10)
            ),
            steps=300,
        )
        for experiment in (full(), window(), block_window())
    ]


def _with_attention(name: str, **changes) -> Experiment:
    experiment = full()
    return dataclasses.replace(experiment, name=name, model=dataclasses.replace(experiment.model, **changes))
