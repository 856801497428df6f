r"""Selective language modelling (RHO-1): does it pay to learn from those tokens alone that a reference model finds easier?

The corpus is the Python installation's source code. Of every four files one is clean, and the reference model learns from it; another is
training text, in which a third of all lines have their letters in random order, and beside which stand tables of random numbers, a tenth
of all its characters. (The others are left out, so that scoring costs no more than training does.) Held out are clean files that neither
has seen.

    python experiments/selective_language_modeling.py corpora
    infinicontext train experiments/selective_language_modeling.py:reference --workdir runs/selective/reference
    for c in noisy noisier; do
        infinicontext score-tokens runs/selective/reference runs/selective/$c.jsonl runs/selective/${c}_scores
    done
    for s in all budgets noisier; do
        infinicontext sweep experiments/selective_language_modeling.py:$s --workdir runs/selective/sweep
    done
    python experiments/selective_language_modeling.py table
    infinicontext compare runs/selective/sweep/* --output report/

`all` gives each share as many tokens. `budgets` has two shorter runs of ratio 0.6, each with a whole schedule of its own, to say of how
many tokens it needs for what ratio 1 learns from all; and longer ones of ratio 1, which have the compute that an online reference would
take beside it (a forward pass for each step's three: 4/3), and that the reference's training (1) and scoring 5 million tokens (4/3) have
taken.

Measured on 2 CPU cores (jax 0.10.2, float32), models of 0.67 million parameters, 300 steps of 4,096 bytes, 33% of lines spoilt and 10% off
domain, so that 60% of the training text's bytes are clean; loss in nats per byte of clean held-out text, mean and standard deviation over
three seeds, and the steps after which ratio 1's final loss is reached (asked every 25):

    ratio 0.4                  1.7045 +- 0.0044    200, 225, 200
    ratio 0.6                  1.7063 +- 0.0203    200, 225, 225
    ratio 0.8                  1.7341 +- 0.0173    225, 250, 250
    ratio 1                    1.8154 +- 0.0086    300, 300, 300
    ratio 0.6, 150 steps       2.0263 +- 0.0414    never
    ratio 0.6, 188 steps       1.9054 +- 0.0365    never
    ratio 1, 400 steps         1.6974 (one seed)   275
    ratio 1, 1,000 steps       1.4216 (one seed)   300
    the reference              1.667

With two thirds of the lines spoilt, 30% of the bytes clean (`noisier`):

    ratio 0.4                  1.7997 +- 0.0067    150, 150, 150
    ratio 1                    2.1178 +- 0.0267    300, 300, 275

- **The goal, ratio 1's final loss after half of its tokens, is met where 70% are noise, and missed where 40% are**: there ratios 0.4 and
  0.6 need 67 to 75%. To learn from clean text alone is the most that selecting can be worth, so 60% are the least to be hoped for.
- At equal compute there is nothing to be had from it at this size: 4/3 of the steps, what an online reference costs, make ratio 1 as good
  as ratio 0.6, and with what the reference and the scoring have cost it is far better. That is another matter where a reference is there
  already, or is small beside the model.
- Shorter runs are no test of tokens here: all of these models are still learning fast, and a schedule of 150 steps ends above what the long
  one has after as many (0.6: 1.92 to 2.0).

What became of tokens of clean text at ratio 1 (checkpoints after 100, 200, 300 steps; one seed): 8% stay hard, 15% get worse (3.0 to 3.8
nats), 60% are learnt (2.6 to 1.6), 18% were known already.

What it costs where texts are long: a reference that sees the last 32 words cannot know a passkey that was said before, so that words
that are learned from there fall out of the selection; and what helps.

    infinicontext train experiments/selective_language_modeling.py:near_reference --workdir runs/selective/near_reference
    infinicontext sweep experiments/selective_language_modeling.py:keys --workdir runs/selective/keys

Two seeds; keys of 256 words given back exactly (digits), in %, 20 samples x 5 depths, and the share of the keys' digits that were learnt
from in the last 30 steps:

    all words                       65 (87)   57 (71)
    60%                              0 (30)    0 (18)    15 to 26%
    60% and all answers             96 (99)   61 (80)    100%
    60% at each four places         65 (93)    1 (42)    48 to 55%

Plain selection drops them. Answers that are always selected keep what ordinary training finds, or more; places help, but with one of two
seeds far from enough in 600 steps.
"""

import dataclasses
import json
import pathlib
import statistics
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
NOISE = {"noisy": 1 / 3, "noisier": 2 / 3}  # of lines
OFF_DOMAIN = 0.1  # of the training text's characters
LONGEST = 20_000  # characters of a document: a long one must not decide a corpus alone


def _spoilt(text: str, noise: float, rng: np.random.Generator) -> str:
    """The text with the letters of some lines in random order."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if rng.random() < noise:
            lines[number] = "".join(rng.permutation(list(line)))
    return "\n".join(lines)


def _numbers(rng: np.random.Generator) -> str:
    """A table of random numbers."""
    return "\n".join(",".join(map(str, row)) for row in rng.integers(0, 10**6, (400, 6)))


def _learnt(text: str) -> bool:
    """A text's hash says whether it is held out; what falls on the wrong side is left out."""
    return split_of(text, CorpusData.validation_fraction) == "train"


def _noisy(code: list[str], noise: float) -> list[str]:
    """Held-out text as it is; of the rest another quarter than the clean one, spoilt, and tables of numbers."""
    rng = np.random.default_rng(0)
    spoilt = [_spoilt(text, noise, rng) for number, text in enumerate(code) if number % 4 == 1 and _learnt(text)]
    spoilt = [text for text in spoilt if _learnt(text)]
    wanted, tables = OFF_DOMAIN / (1 - OFF_DOMAIN) * sum(map(len, spoilt)), []
    while sum(map(len, tables)) < wanted:
        table = _numbers(rng)
        tables += [table] if _learnt(table) else []
    return [text for text in code if not _learnt(text)] + spoilt + tables


def _write_corpora(folder: pathlib.Path) -> None:
    """Writes clean.jsonl, noisy.jsonl and noisier.jsonl."""
    code = [text[:LONGEST] for name, text in documents("python") if name.endswith(".py")]
    clean = [text for number, text in enumerate(code) if number % 4 == 0 or not _learnt(text)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in {"clean": clean, **{name: _noisy(code, noise) for name, noise in NOISE.items()}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def reference() -> Experiment:
    """Learns from the clean quarter."""
    return Experiment(
        name="reference",
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, attention="window", window=128, remat=False),
        data=CorpusData(source=f"{FOLDER}/clean.jsonl", tokenizer="bytes", length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(tasks=("perplexity",), lengths=(512,), perplexity=PerplexityEvaluation(documents=8)),
        steps=300,
        batch_size=8,
        validation_every=25,
        validation_batches=8,
        checkpoint_every=100,
        keep_checkpoints=4,
    )


def selective(ratio: float = 0.6, corpus: str = "noisy") -> Experiment:
    """Learns from the share of a spoilt corpus whose loss exceeds the reference's the most; 1: from all of it."""
    experiment = reference()
    data = dataclasses.replace(experiment.data, source=f"{FOLDER}/{corpus}.jsonl", reference=f"{FOLDER}/{corpus}_scores")
    return dataclasses.replace(experiment, name=f"ratio{ratio:g}", data=data, objective=Selective(ratio=ratio))


def all() -> list[Experiment]:
    """Ratios from 0.4 to 1 with three seeds each; of the first seeds of two what was selected and what became of tokens."""
    experiments = [
        dataclasses.replace(selective(ratio), name=f"ratio{ratio:g}-seed{seed}", seed=seed)
        for ratio in (0.4, 0.6, 0.8, 1.0)
        for seed in range(3)
    ]
    also = {"ratio0.6-seed0": "selection", "ratio1-seed0": "categories"}
    with_tasks = lambda evaluation, name: dataclasses.replace(evaluation, tasks=("perplexity", also[name]))
    return [
        dataclasses.replace(experiment, evaluation=with_tasks(experiment.evaluation, experiment.name))
        if experiment.name in also
        else experiment
        for experiment in experiments
    ]


def budgets() -> list[Experiment]:
    """Ratio 0.6 for half and 5/8 of the steps, three seeds; ratio 1, once each, for 4/3 of them and for 10/3, a reference's cost."""
    steps = selective().steps
    return [
        dataclasses.replace(selective(ratio), name=f"ratio{ratio:g}-steps{count}-seed{seed}", seed=seed, steps=count)
        for ratio, parts in ((0.6, (1 / 2, 5 / 8)), (1.0, (4 / 3, 10 / 3)))
        for count in (round(part * steps) for part in parts)
        for seed in range(1 if count > steps else 3)
    ]


def noisier() -> list[Experiment]:
    """Ratios 0.4 and 1 where two thirds of the lines are spoilt; three seeds."""
    return [
        dataclasses.replace(selective(ratio, "noisier"), name=f"noisier-ratio{ratio:g}-seed{seed}", seed=seed)
        for ratio in (0.4, 1.0)
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
    """Full attention that learns from all words, from 60% of them, from those and all answers, and from 60% at each place; two seeds."""
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
        for seed in range(2)
    ]


def _validation(name: str) -> dict[int, float]:
    """Held-out losses by step of a run of the sweep."""
    lines = map(json.loads, (pathlib.Path(FOLDER) / "sweep" / name / "metrics.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def _print_table() -> None:
    """Final losses on clean text, mean and standard deviation over seeds; and when a run first falls to the final one of ratio 1."""
    names = [experiment.name for experiment in all() + budgets() + noisier()]
    found: dict[str, list[dict[int, float]]] = {}
    for name in names:
        if (pathlib.Path(FOLDER) / "sweep" / name / "metrics.jsonl").exists():
            found.setdefault(name.rpartition("-")[0], []).append(_validation(name))
    for name, runs in found.items():
        goals = [losses[max(losses)] for losses in found["noisier-ratio1" if "noisier" in name else "ratio1"]]
        final = [losses[max(losses)] for losses in runs]
        spread = f" +- {statistics.stdev(final):.4f}" if len(final) > 1 else ""
        reached = [min((step for step in losses if losses[step] <= goal), default=None) for losses, goal in zip(runs, goals)]
        print(f"{name:22} {statistics.mean(final):.4f}{spread} after {max(runs[0])} steps; at ratio 1's after {reached}")


if __name__ == "__main__":
    {"corpora": lambda: _write_corpora(pathlib.Path(FOLDER)), "table": _print_table}[sys.argv[1]]()
