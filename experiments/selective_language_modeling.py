r"""Selective language modelling (RHO-1): does it pay to learn from those tokens alone that a reference model finds easier?

The corpus is the Python installation's source code, spoilt: of its files three quarters are training text, in which a third of all lines
have their letters in random order, and to which the installation's other texts (.rst, .txt) are added. The last quarter is clean: the
reference model learns from it. Held out are clean files that neither has seen.

    python experiments/selective_language_modeling.py runs/selective
    infinicontext train experiments/selective_language_modeling.py:reference --workdir runs/selective/reference
    infinicontext score-tokens runs/selective/reference runs/selective/noisy.jsonl runs/selective/scores
    infinicontext sweep experiments/selective_language_modeling.py:all --workdir runs/selective/sweep
    infinicontext compare runs/selective/sweep/* --output report/

What it costs where texts are long: a reference that sees the last 32 words cannot know a passkey that was said before, so that words
that are learned from there fall out of the selection; and what helps.

    infinicontext train experiments/selective_language_modeling.py:near_reference --workdir runs/selective/near_reference
    infinicontext sweep experiments/selective_language_modeling.py:keys --workdir runs/selective/keys

Not run yet.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np

from infinicontext.data.corpora import documents, split_of
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.objectives.selective import Selective
from infinicontext.training.optimizer import OptimizerConfig

FOLDER = "runs/selective"
NOISE = 1 / 3  # of lines
LONGEST = 20_000  # characters of a document: a long one must not decide a corpus alone


def _spoilt(text: str, rng: np.random.Generator) -> str:
    """The text with the letters of some lines in random order."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if rng.random() < NOISE:
            lines[number] = "".join(rng.permutation(list(line)))
    return "\n".join(lines)


def _write_corpora(folder: pathlib.Path) -> None:
    """Writes clean.jsonl and noisy.jsonl. A text's hash says whether it is held out, so those that fall on the wrong side are left out."""
    rng, fraction = np.random.default_rng(0), CorpusData.validation_fraction
    clean, noisy = [], []
    for number, (name, text) in enumerate(documents("python")):
        text = text[:LONGEST]
        code = name.endswith(".py")
        if code and split_of(text, fraction) == "validation":
            clean.append(text)
            noisy.append(text)
        elif code and number % 4 == 0:
            clean.append(text)
        else:
            text = _spoilt(text, rng) if code else text
            noisy += [text] if split_of(text, fraction) == "train" else []
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("clean", clean), ("noisy", noisy)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def reference() -> Experiment:
    """Learns from the clean quarter."""
    return Experiment(
        name="reference",
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, attention="window", window=128, remat=False),
        data=CorpusData(source=f"{FOLDER}/clean.jsonl", tokenizer="bytes", length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(tasks=("perplexity",), lengths=(512,), perplexity=PerplexityEvaluation(documents=8)),
        steps=400,
        batch_size=8,
        validation_every=20,
        validation_batches=16,
        checkpoint_every=100,
    )


def selective(ratio: float = 0.6) -> Experiment:
    """Learns from the share of the spoilt corpus whose loss exceeds the reference's the most; 1: from all of it."""
    experiment = reference()
    data = dataclasses.replace(experiment.data, source=f"{FOLDER}/noisy.jsonl", reference=f"{FOLDER}/scores")
    return dataclasses.replace(experiment, name=f"ratio{ratio:g}", data=data, objective=Selective(ratio=ratio))


def all() -> list[Experiment]:
    """Ratios from 0.4 to 1 with three seeds each."""
    return [
        dataclasses.replace(selective(ratio), name=f"ratio{ratio:g}-seed{seed}", seed=seed)
        for ratio in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
        for seed in range(3)
    ]


def near_reference() -> Experiment:
    """Reads passkey texts by a window of 32 words in one layer: all of their sentences, but no key from before."""
    return Experiment(
        name="near_reference",
        model=TransformerConfig(vocab_size=64, dim=64, layers=1, heads=4, attention="window", window=32),
        data=PasskeyData(lengths=(256,), shortest=(128,)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(tasks=("passkey",), lengths=(256,), passkey=PasskeyEvaluation(samples=20)),
        steps=300,
        batch_size=16,
        validation_every=100,
        checkpoint_every=100,
    )


def keys() -> list[Experiment]:
    """Full attention that learns from all words, from 60% of them, from those and all answers, and from 60% at each place; three seeds."""
    reference = near_reference()
    slm = Selective(ratio=0.6, reference=f"{FOLDER}/near_reference")
    objectives = {"all": NextToken(), "selected": slm}
    objectives |= {"answers": dataclasses.replace(slm, always_select_answers=True)}
    objectives |= {"places": dataclasses.replace(slm, scope="position", bucket=4)}
    experiment = dataclasses.replace(
        reference,
        model=TransformerConfig(vocab_size=64, dim=64, layers=2, heads=4),
        data=dataclasses.replace(reference.data, lengths=(128, 256), stage_steps=(250,), shortest=()),
        steps=600,
        batch_size=32,
    )
    return [
        dataclasses.replace(experiment, name=f"{name}-seed{seed}", objective=objective, seed=seed)
        for name, objective in objectives.items()
        for seed in range(3)
    ]


if __name__ == "__main__":
    _write_corpora(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER))
