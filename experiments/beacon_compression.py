r"""Activation Beacon: a frozen Transformer learns to put a text's chunks into a few keys and values, and is asked far beyond its training.

    infinicontext train experiments/beacon_compression.py:keys --workdir runs/beacon/keys
    infinicontext train experiments/beacon_compression.py:keys_beacon --workdir runs/beacon/keys_beacon
    infinicontext eval runs/beacon/keys_beacon --tasks passkey --lengths 512 4k --model.ratios 8 --output runs/beacon/keys8.json

Not finished. In a first run (600 steps of 8,192 tokens, keys in the first 60% of rows; a backbone of 400 steps, which itself finds 89% of
such keys in 512 tokens) the digits of a key were right in 99, 62, 53, 39 and 39% at ratio 8, and in 86, 52, 52, 45 and 55% at ratio 2 (160
samples of 512 tokens). Where the key is, beacons tell; the order of its digits is not learnt yet. Validation losses were 1.37, 1.05, 0.63
after 200, 300, 600 steps. The text models were not run.
"""

import dataclasses

from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig


def keys() -> Experiment:
    """The backbone for passkey retrieval: full attention, which has seen positions up to 704."""
    return Experiment(
        name="keys",
        model=TransformerConfig(vocab_size=64, dim=128, layers=4, heads=8, remat=False),
        data=PasskeyData(lengths=(128, 704), stage_steps=(120,), shortest=(80, 80), depths=(-0.1, 1.1)),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.05),
        evaluation=Evaluation(tasks=("passkey",), lengths=(512, 1024, 2048, 4096), passkey=PasskeyEvaluation(samples=20)),
        steps=450,
        batch_size=64,
        log_every=20,
        validation_every=100,
        checkpoint_every=100,
    )


def keys_beacon() -> Experiment:
    """Beacons for it, which alone are trained: on rows of two and then four chunks of 128 tokens, at ratios 2, 4 and 8 drawn for each
    chunk, which are in the last chunk of a sample, too: there the answer stands."""
    experiment = keys()
    return dataclasses.replace(
        experiment,
        name="keys_beacon",
        model=BeaconConfig.of(experiment.model, chunk=128, ratios=(2, 4, 8), training_bare_end=False, beacon_output=True),
        data=dataclasses.replace(experiment.data, lengths=(256, 512), stage_steps=(500,), shortest=(200, 300), depths=(-0.1, 0.8)),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=3e-3, train=("beacon",)),
        evaluation=dataclasses.replace(experiment.evaluation, lengths=(512, 1024, 2048, 4096, 8192)),
        start_from="runs/beacon/keys",
        steps=1500,
        batch_size=32,
    )


def keys_beacon_on() -> Experiment:
    """On from there with keys up to the very end, too, where a chunk's own tokens still show them."""
    experiment = keys_beacon()
    return dataclasses.replace(
        experiment,
        name="keys_beacon_on",
        data=dataclasses.replace(experiment.data, lengths=(512,), stage_steps=(), shortest=(200,), depths=(-0.1, 1.1)),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=1e-3, warmup_steps=20),
        start_from="runs/beacon/keys_beacon",
        steps=300,
    )


def text() -> Experiment:
    """The backbone for language modelling: bytes of Python's source code, rows of 1,024."""
    return Experiment(
        name="text",
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, remat=False),
        data=CorpusData(source="python", tokenizer="bytes", length=1024),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(
            tasks=("perplexity",),
            lengths=(128, 256, 512, 1024, 2048, 4096, 8192),
            perplexity=PerplexityEvaluation(documents=32, scored=128),
        ),
        steps=400,
        batch_size=8,
        validation_every=100,
        checkpoint_every=100,
    )


def text_beacon() -> Experiment:
    """Beacons for it: rows of four chunks of 128 bytes."""
    experiment = text()
    return dataclasses.replace(
        experiment,
        name="text_beacon",
        model=BeaconConfig.of(experiment.model, chunk=128, ratios=(2, 4, 8)),
        data=dataclasses.replace(experiment.data, length=512),
        optimizer=dataclasses.replace(experiment.optimizer, train=("beacon",)),
        start_from="runs/beacon/text",
        steps=300,
        batch_size=16,
    )


def text_full() -> Experiment:
    """Full attention tuned on as many bytes in rows of 4,096, the length that beacons are asked at: what they are to come near."""
    experiment = text()
    return dataclasses.replace(
        experiment,
        name="text_full",
        data=dataclasses.replace(experiment.data, length=4096),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=1e-3),
        start_from="runs/beacon/text",
        steps=300,
        batch_size=2,
    )
