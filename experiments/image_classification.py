"""Image classification from rows of pixels: MEGALODON as a classifier that sees the whole row, and as the causal model it is otherwise.

Handwritten digits of 8 x 8 pixels that come with scikit-learn, read as 64 gray levels, line by line; a fifth is held out.

    infinicontext train experiments/image_classification.py:digits --workdir runs/digits
    infinicontext sweep experiments/image_classification.py:all --workdir runs/images
    infinicontext eval runs/digits

Cost: the sweep, ten runs, took 20 minutes on 2 CPU cores beside other work (7,000 to 10,000 pixels/s in training).

Result, accuracy in % on the 334 held-out images (mean and standard deviation of two seeds):

    digits              92.4 +- 0.2    both directions, attention over all 64 pixels
    digits_chunk        90.4 +- 1.7    both directions, attention over 16
    digits_forward      85.8 +- 1.1    one direction, attention over all
    digits_transformer  85.5 +- 0.6    the causal Transformer
    digits_causal       83.1 +- 1.9    the causal MEGALODON

All have 0.18 to 0.20 million parameters and saw each image 7 times; none is at its end. The second direction of the average is worth most,
as far as two seeds can tell; the paper's chunks cost little. The two causal models differ by less than their spread.

Your own images, a folder with a sub-folder for each class: --data.source FOLDER --data.size 32 --data.levels 64, with --model.classes and
--model.blocks.vocab-size (levels + classes) to fit.
"""

import dataclasses

from infinicontext.data.images import ImageData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.megalodon_classifier import MegalodonClassifierConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

# 17 gray levels and 10 classes.
BLOCKS = MegalodonConfig(
    vocab_size=27, dim=64, layers=3, heads=1, z_dim=32, value_dim=128, feed_forward=128, chunk=16, norm_groups=8, dropout=0.1, remat=False
)


def digits() -> Experiment:
    """The classifier: both directions of the moving average, group normalisation, attention over all pixels."""
    return Experiment(
        name="digits",
        model=MegalodonClassifierConfig(BLOCKS, classes=10),
        data=ImageData("digits"),
        objective=NextToken(loss="answers"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.05),
        evaluation=Evaluation(tasks=("accuracy",), lengths=(64,)),
        steps=300,
        batch_size=32,
        validation_every=50,
        validation_batches=5,
        checkpoint_every=100,
    )


def digits_chunk() -> Experiment:
    """The same with attention in chunks of two lines."""
    return dataclasses.replace(digits(), name="digits_chunk", model=MegalodonClassifierConfig(BLOCKS, classes=10, attention="chunk"))


def digits_forward() -> Experiment:
    """The same with the moving average in one direction."""
    return dataclasses.replace(digits(), name="digits_forward", model=MegalodonClassifierConfig(BLOCKS, classes=10, bidirectional=False))


def digits_causal() -> Experiment:
    """The language model, which predicts the class as the token after the last pixel."""
    return dataclasses.replace(digits(), name="digits_causal", model=BLOCKS)


def digits_transformer() -> Experiment:
    """The Transformer of about the same size, which predicts the class as the token after the last pixel."""
    model = TransformerConfig(vocab_size=27, dim=72, layers=3, heads=4, remat=False)
    return dataclasses.replace(digits(), name="digits_transformer", model=model)


def all() -> list[Experiment]:
    """The five of them with two seeds each."""
    return [
        dataclasses.replace(experiment, name=f"{experiment.name}-seed{seed}", seed=seed)
        for experiment in (digits(), digits_chunk(), digits_forward(), digits_causal(), digits_transformer())
        for seed in range(2)
    ]
