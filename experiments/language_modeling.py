"""Language modelling on real text: what a window costs against full attention, and how each reads beyond its training length.

Byte-level models of about 0.7 million parameters on the source code of the Python installation, 0.8 million tokens each.

    infinicontext train experiments/language_modeling.py:window --workdir runs/window
    infinicontext sweep experiments/language_modeling.py:all --workdir runs/language_modeling
    infinicontext compare runs/language_modeling/* --output report/

Cost: full, window and block_window, six runs, took 11 minutes on 2 CPU cores (7,100 tokens/s in training with full attention, 10,400 with a
window, 6,400 with MEGALODON, whose two runs took 5 minutes each beside other work).

Result, mean and standard deviation of two seeds on Python 3.11.7: validation loss in nats per byte (on the same bytes a unigram model has
3.208 and a bigram model 2.630), and perplexity of the same 4 x 256 bytes after reading so many:

                   loss             512            1024           2048            4096            8192           16384
    full           2.229 +- 0.004   7.28 +- 0.06   8.42 +- 0.13   10.45 +- 0.45   12.25 +- 0.12   not read (its cache was bounded at 4096)
    window         2.167 +- 0.014   6.67 +- 0.08   6.67 +- 0.08    6.67 +- 0.08    6.67 +- 0.08   6.67 +- 0.08   6.67 +- 0.08
    block_window   2.154 +- 0.020   6.71 +- 0.06   6.71 +- 0.06    6.71 +- 0.06    6.71 +- 0.06   6.71 +- 0.06   6.71 +- 0.06
    megalodon      1.958 +- 0.004   5.82 +- 0.07   5.82 +- 0.07    5.81 +- 0.07    5.80 +- 0.07   5.81 +- 0.06   5.81 +- 0.06
    fam            2.184 +- 0.009   6.98 +- 0.05   6.98 +- 0.05    6.98 +- 0.05    6.98 +- 0.05   6.98 +- 0.05   6.97 +- 0.05
    bswa           2.156 +- 0.017   6.71 +- 0.04   6.71 +- 0.04    6.71 +- 0.04    6.71 +- 0.04   6.71 +- 0.04   6.71 +- 0.04

At this budget the windows learn faster than full attention, and they read on at the same quality where full attention meets positions it
has never seen. They do not use what lies beyond their reach of 3 x 128 bytes: more context changes nothing. MEGALODON learns fastest by far
with as many parameters, tokens and the same learning rate (none of them was tuned), a little slower; beyond a thousand bytes more context
does not help it either: after 0.8 million bytes of training its averages and statistics carry nothing from far away. TransformerFAM
(fam, 5,700 bytes/s in training) reads on as level as the windows do, but after so little training its feedback memory is of no use yet: it
is a little behind bswa, which is the same without it. (block_window differs from bswa in that its blocks begin anew with each document.)
"""

import dataclasses

from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.training.optimizer import OptimizerConfig


def full() -> Experiment:
    """Full attention: the best there is within the training length, with a state that grows and positions it has never seen beyond."""
    return Experiment(
        name="full",
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, remat=False),
        data=CorpusData(source="python", tokenizer="bytes", length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(
            tasks=("perplexity",), lengths=(512, 1024, 2048, 4096, 8192, 16384), capacity=4096, perplexity=PerplexityEvaluation(documents=4)
        ),
        steps=200,
        batch_size=8,
        validation_every=40,
        validation_batches=16,
        checkpoint_every=100,
    )


def window() -> Experiment:
    """Each token sees the last 128: a state of constant size."""
    return _with_attention("window", attention="window", window=128)


def block_window() -> Experiment:
    """Each token sees its own block of 32 and the 3 before it, 97 to 128 tokens: TransformerFAM's baseline."""
    return _with_attention("block_window", attention="block_window", block=32, memory_blocks=3)


def megalodon() -> Experiment:
    """MEGALODON with as many parameters, in chunks of 128: what lies before reaches a token through its moving average and statistics."""
    experiment = full()
    model = MegalodonConfig(vocab_size=257, dim=128, layers=3, heads=2, z_dim=64, value_dim=240, feed_forward=192, chunk=128, norm_groups=8)
    return dataclasses.replace(experiment, name="megalodon", model=dataclasses.replace(model, remat=False))


def fam() -> Experiment:
    """TransformerFAM: the blocks of `block_window`, and 16 rows of feedback memory."""
    experiment = full()
    model = FamConfig(vocab_size=257, dim=128, layers=3, heads=4, block=32, memory_blocks=3, fam_length=16, remat=False)
    return dataclasses.replace(experiment, name="fam", model=model)


def bswa() -> Experiment:
    """TransformerBSWA, the same without the memory: unlike those of `block_window`, its blocks do not begin anew with each document."""
    experiment = fam()
    return dataclasses.replace(experiment, name="bswa", model=experiment.model.bswa)


def all() -> list[Experiment]:
    """All of them with two seeds each."""
    return [
        dataclasses.replace(experiment, name=f"{experiment.name}-seed{seed}", seed=seed)
        for experiment in (full(), window(), block_window(), megalodon(), fam(), bswa())
        for seed in range(2)
    ]


def demo() -> list[Experiment]:
    """The three of them at half the width and length: under a minute each."""
    return [
        dataclasses.replace(
            experiment,
            name=f"text_{experiment.name}",
            model=dataclasses.replace(experiment.model, dim=64, layers=3),
            data=dataclasses.replace(experiment.data, length=256),
            evaluation=dataclasses.replace(experiment.evaluation, lengths=(256, 512, 1024, 2048, 4096)),
            steps=160,
            batch_size=16,
        )
        for experiment in (full(), window(), block_window())
    ]


def _with_attention(name: str, **changes) -> Experiment:
    experiment = full()
    return dataclasses.replace(experiment, name=name, model=dataclasses.replace(experiment.model, **changes))
