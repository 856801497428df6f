r"""Longer texts by other rotary frequencies: PI, NTK, dynamic NTK, YaRN, Llama 3's, LongRoPE and LongRoPE2 on one small Transformer.

It is trained on 256 bytes at a time and read at 2, 4, 8 and 16 times that, as it is and after the same short tuning.

    F=runs/context
    infinicontext train experiments/context_extension.py:base --workdir $F/base
    for s in 512 1024 2048 4096; do
        infinicontext search-rope $F/base --target-length $s --output $F/longrope_$s.json
        infinicontext search-rope $F/base --target-length $s --output $F/longrope2_$s.json --algorithm longrope2
    done
    infinicontext sweep experiments/context_extension.py:untuned --workdir $F/untuned
    infinicontext sweep experiments/context_extension.py:tuned --workdir $F/tuned
    infinicontext compare $F/untuned/* $F/tuned/* --output report/

The progressive recipe: tuned at 8 times the length, searched again for 64 times without tuning, and once more for short texts.

    infinicontext sweep experiments/context_extension.py:progressive --workdir $F
    infinicontext search-rope $F/progressive --target-length 16k --documents 2 --output $F/far.json
    infinicontext convert $F/progressive $F/far --to run --factors $F/far.json
    infinicontext search-rope $F/far --target-length 256 --short --output $F/both.json
    infinicontext convert $F/far $F/both --to run --factors $F/both.json
    infinicontext eval $F/both --lengths 256 2k 16k

LongRoPE2's mixed windows need nothing but its factors (short_attention_factor 1, no short factors): rows of short documents turn as ever.

The same for passkeys of seven digits, which a word-level model learns at 256 words. LongRoPE's own search goes by the loss of all words,
of which a key's are few; LongRoPE2's goes by those of a key, so it is the one that is run, on filler that this file writes.

    python experiments/context_extension.py
    infinicontext train experiments/context_extension.py:keys --workdir $F/keys
    for s in 512 1024 2048 4096; do
        infinicontext search-rope $F/keys --data $F/filler.jsonl --target-length $s --output $F/keys_longrope2_$s.json --algorithm longrope2
    done
    infinicontext sweep experiments/context_extension.py:keys_untuned --workdir $F/keys_untuned
    infinicontext sweep experiments/context_extension.py:keys_tuned --workdir $F/keys_tuned

Not run yet.
"""

import dataclasses
import json
import pathlib

from infinicontext.data.passkey import FILLER
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.perplexity import PerplexityEvaluation
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.longrope.factors import load_factors
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.rope import RopeConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

FOLDER = pathlib.Path("runs/context")
ORIGINAL = 256
DIGITS = 7  # as many as the needles of LongRoPE2's search have
SCALES = (2, 4, 8, 16)
SCHEMES = ("none", "pi", "ntk", "dynamic", "yarn", "llama3", "longrope", "longrope2")


def base() -> Experiment:
    """Full attention on short texts."""
    return Experiment(
        name="base",
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, remat=False),
        data=CorpusData(source="python", tokenizer="bytes", length=ORIGINAL),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(
            tasks=("perplexity",), lengths=(256, 512, 1024, 2048, 4096), perplexity=PerplexityEvaluation(documents=16, scored=128)
        ),
        steps=1000,
        batch_size=16,
        validation_every=100,
        checkpoint_every=200,
    )


def keys() -> Experiment:
    """Full attention that finds a key in short texts."""
    experiment = base()
    return dataclasses.replace(
        experiment,
        name="keys",
        model=dataclasses.replace(experiment.model, vocab_size=64),
        data=PasskeyData(lengths=(128, ORIGINAL), stage_steps=(250,), digits=DIGITS),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.05),
        evaluation=dataclasses.replace(experiment.evaluation, tasks=("passkey",), passkey=PasskeyEvaluation(samples=20, digits=DIGITS)),
        steps=500,
        batch_size=32,
    )


def _rope(trained: Experiment, scheme: str, scale: int) -> RopeConfig:
    """The frequencies by which a scheme reads texts `scale` times as long; those of LongRoPE are read from the files of the searches."""
    if scheme == "none":
        return RopeConfig()
    if scheme.startswith("longrope"):
        return load_factors(_factors(trained, scheme, scale), trained.model.head_size)
    names = {"pi": "linear"}
    options = {} if scheme in ("pi", "ntk") else {"original_length": ORIGINAL}
    # Dynamic NTK stretches by the text's own length.
    return RopeConfig(names.get(scheme, scheme), factor=1.0 if scheme == "dynamic" else float(scale), **options)


def _factors(trained: Experiment, scheme: str, scale: int) -> pathlib.Path:
    return FOLDER / f"{'keys_' if trained.name == 'keys' else ''}{scheme}_{scale * ORIGINAL}.json"


def _schemes(trained: Experiment, scale: int) -> list[str]:
    """Those of LongRoPE only where their search has been done."""
    return [scheme for scheme in SCHEMES if not scheme.startswith("longrope") or _factors(trained, scheme, scale).exists()]


def _extended(trained: Experiment, scheme: str, scale: int, tuned: bool) -> Experiment:
    """The model of `trained` with a scheme, as it is or after 60 steps on texts of the target length."""
    length = scale * ORIGINAL
    long = {"lengths": (length,), "stage_steps": ()} if isinstance(trained.data, PasskeyData) else {"length": length}
    return dataclasses.replace(
        trained,
        name=f"{scheme}-{scale}x" + ("-tuned" if tuned else ""),
        model=dataclasses.replace(trained.model, rope=_rope(trained, scheme, scale)),
        data=dataclasses.replace(trained.data, **long),
        # A step at a rate of 0 makes a run of the model as it is.
        optimizer=OptimizerConfig(learning_rate=3e-4 if tuned else 0.0, warmup_steps=0),
        evaluation=dataclasses.replace(trained.evaluation, lengths=tuple(sorted({ORIGINAL, length}))),
        start_from=str(FOLDER / trained.name),
        steps=60 if tuned else 1,
        batch_size=max(4096 // length, 1),
        validation_every=60,
    )


def _each(trained: Experiment, *, tuned: bool) -> list[Experiment]:
    return [_extended(trained, scheme, scale, tuned) for scale in SCALES for scheme in _schemes(trained, scale)]


def progressive() -> list[Experiment]:
    """The first stage of LongRoPE's recipe: tuned with the factors for 8 times the length; nothing before their search has been done."""
    if not _factors(base(), "longrope", 8).exists():
        return []
    tuned = _extended(base(), "longrope", 8, tuned=True)
    return [dataclasses.replace(tuned, name="progressive", steps=200)]


def untuned() -> list[Experiment]:
    """Each scheme at each scale."""
    return _each(base(), tuned=False)


def tuned() -> list[Experiment]:
    """The same after the tuning."""
    return _each(base(), tuned=True)


def keys_untuned() -> list[Experiment]:
    """Each scheme at each scale, asked for keys."""
    return _each(keys(), tuned=False)


def keys_tuned() -> list[Experiment]:
    """The same after the tuning."""
    return _each(keys(), tuned=True)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Texts that begin at different sentences, of more words than any target.
    sentences = [f" {sentence.strip()}." for sentence in FILLER.split(".") if sentence]
    texts = ["".join((sentences[begin:] + sentences[:begin]) * 300) for begin in range(len(sentences))]
    (FOLDER / "filler.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
