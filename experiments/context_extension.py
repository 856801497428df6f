r"""Longer texts by other rotary frequencies: PI, NTK, dynamic NTK, YaRN, Llama 3's, LongRoPE and LongRoPE2 on one small Transformer.

It is trained on 128 bytes at a time and read at 2, 4, 8 and 16 times that, as it is and after the same short tuning; the first of five such
models at every length, the others at 8 times, as they are and with four of the schemes. Searches read documents that the model was trained
on, evaluations others.

    F=runs/context
    E=experiments/context_extension.py
    infinicontext sweep $E:bases --workdir $F
    search() { infinicontext search-rope $F/$1 --target-length $2 --algorithm $3 --output $F/$1_$3_$2.json --documents 5 ${@:4}; }
    for n in 0 1 2 3 4; do search base$n 1024 longrope; done
    for s in 256 512; do search base0 $s longrope; done
    for s in 256 512 1024; do search base0 $s longrope2 --fitness text; done
    for a in longrope "longrope2 --fitness text"; do search base0 2048 $a --iterations 20; done
    infinicontext sweep $E:untuned --workdir $F/untuned
    for n in 0 1 2 3 4; do for a in pi ntk yarn longrope; do
        infinicontext eval $F/untuned/base$n-$a-8x --tasks document_perplexity --lengths 1024 \
            --evaluation.document-perplexity.documents 64 --output $F/held_out/base$n-$a.json
    done; done
    infinicontext sweep $E:tuned --workdir $F/tuned
    infinicontext sweep $E:mixed --workdir $F/tuned
    python $E table
    infinicontext compare $F/untuned/* $F/tuned/* --output report/

LongRoPE2 goes by the loss of text here, since these models have not learnt to give back what a needle says. `mixed` is its training: three
of ten rows are cut into documents of 128 bytes, which turn by the original frequencies.

The progressive recipe: tuned at 8 times the length, searched again for 64 times without tuning, and once more for short texts.

    infinicontext sweep $E:progressive --workdir $F
    infinicontext search-rope $F/progressive --target-length 8k --documents 2 --output $F/far.json \
        --population 32 --mutations 8 --crossovers 8 --parents 16 --iterations 12
    infinicontext convert $F/progressive $F/far --to run --factors $F/far.json
    infinicontext search-rope $F/far --target-length 128 --short --output $F/both.json
    infinicontext convert $F/far $F/both --to run --factors $F/both.json
    infinicontext eval $F/both --lengths 128 1k 8k
    for n in base0 progressive far; do infinicontext eval $F/$n --lengths 128 1k 8k --output $F/$n.eval.json; done

The same for passkeys of seven digits, which another model learns at 256 words, searched on filler that this file writes. The loss of all
words, of which a key's are few, says little of keys, so both searches go by the loss of a key.

    python $E filler
    infinicontext train $E:keys --workdir $F/keys
    for a in longrope longrope2; do search keys 2048 $a --fitness needle --data $F/filler.jsonl --iterations 20; done
    infinicontext sweep $E:keys_untuned --workdir $F/keys_untuned
    infinicontext sweep $E:keys_tuned --workdir $F/keys_tuned

Measured on 2 CPU cores (jax 0.10.2, float32), models of 0.67 million parameters, as they are, at 8 times the length, searches of 1,344
candidates. Perplexity of the first 1,024 bytes of 64 held-out documents, five seeds; LongRoPE has the lowest with each of them:

    pi 29.3 +- 3.1    ntk 12.2 +- 1.3    yarn 6.70 +- 0.24    longrope 6.28 +- 0.16

    yarn        6.987 6.542 6.927 6.465 6.558
    longrope    6.506 6.147 6.377 6.216 6.150

Perplexity of the last 64 of 2, 4, 8 and 16 times 128 bytes of 32 held-out documents, and of the last 64 of 128 bytes after stretching by 8;
at 8 times pi, ntk, yarn and longrope of five seeds, the others of the first; a stretch has documents of its own, the long enough ones:

                  2x        4x        8x              16x       128 bytes
    none          18.6      22.5      34.1            39.5      4.42
    pi            12.8      20.2      24.2 +- 3.4     30.9      23.0 +- 3.2
    ntk           7.65      16.5      28.8 +- 4.4     31.2      4.68 +- 0.13
    dynamic       7.65      16.5      28.7            31.2      4.42
    yarn          5.62      6.03      5.95 +- 0.26    8.16      5.43 +- 0.24
    llama3        5.46      5.83      6.79            11.7      5.52
    longrope      5.47      6.05      6.01 +- 0.36    8.66      4.33 +- 0.10
    longrope2     5.71      6.16      6.43            8.07      4.42

- A search finds what it is scored by: all bytes of a document, of which most have less than the whole length before them. At a document's
  very end YaRN is as good, and Llama 3's rule is best at 2 and 4 times.
- Both LongRoPEs read texts of up to 128 bytes by the original factors; the other schemes pay there, pi with everything. The first one's
  attention factor stays on short texts, which costs 1.5% at 16 times and nothing below.
- Both read with an attention factor of 1.20 as YaRN does (1.21), pi, ntk and dynamic with none.
- At 16 times searches had 20 iterations (704 candidates), elsewhere 40.
- Each search's loss on the five documents that it reads (nats): 1.88, 1.86, 1.87, 1.84, 1.83 against YaRN's 1.98, 1.93, 1.97, 1.89, 1.91
  with the same attention factor.

The same after 40 steps of 4,096 bytes at the length that it was stretched to, one seed; beside it the last 64 of 128 bytes:

                  2x      4x      8x      16x     128 bytes, stretched by 8, by 16
    none          6.50    8.13    9.14    11.9    4.79    4.30
    pi            6.56    8.90    9.76    10.6    9.57    10.2
    ntk           5.50    6.77    8.73    8.45    4.68    4.31
    dynamic       5.50    6.76    8.69    8.44    4.72    4.24
    yarn          5.35    5.04    4.71    4.48    4.64    4.33
    llama3        5.31    5.00    4.78    4.83    4.64    4.32
    longrope      5.32    5.06    4.80    4.75    4.73    4.33
    longrope2     5.37    5.13    4.85    4.70    4.81    4.31
    mixed                         4.90            4.64

- After so little tuning the four that leave fast pairs alone are within 3% of one another at up to 8 times, and YaRN is ahead at 8 and 16
  times, there by 5%: the search's gain is one of models as they are.
- Tuning on long texts alone costs both LongRoPEs 7 to 9% at 128 bytes (4.42 as it was); with short documents among them (`mixed`) 5%, for
  1% at 1,024.

Progressive, last 64 of 128, 1,024 and 8,192 bytes of the 32 documents that are long enough for the last:

    the model as it was                             4.36            35.4
    tuned at 8 times, 200 steps                     4.75    4.52    37.0
    with the second search's factors for 64 times   4.75    5.92    7.64
    and with those for short texts                  4.74            7.64

- The second search (224 candidates on two documents, not tuned) takes 64 times from 37.0 to 7.64; on what it reads it ends at 1.635 nats,
  YaRN's factors on top of the first search's at 1.638, PI's at 3.08, NTK's at 2.46. A text of 1,024 bytes pays for the longer ones: that is
  why the paper keeps sets by length.
- Short texts turn by the original factors all the time; what they lose, 9%, is lost by tuning on long ones alone. The last search wins back
  0.3% of it (on the documents that it reads 1.359 nats, 1.361 by the original factors, 1.411 by the long ones).

Keys, exact (digits) in %, 10 samples x 5 depths, at 256 tokens, which it was trained on, and 8 times that; one seed:

                  as the model is                                after 40 steps at 2,048 tokens
                  256       512      1,024    2,048              256       512      1,024    2,048
    none          100 (100) 40 (52)  20 (36)  16 (36)            100 (100) 38 (52)  10 (34)  8 (41)
    pi            0 (14)    0 (21)   0 (17)   0 (22)             0 (16)    0 (21)   0 (17)   0 (19)
    ntk           0 (13)    12 (28)  0 (20)   0 (17)             0 (12)    0 (11)   4 (34)   20 (28)
    dynamic       100 (100) 0 (15)   16 (29)  0 (17)             80 (85)   0 (12)   14 (30)  20 (28)
    yarn          0 (16)    0 (11)   0 (18)   0 (18)             0 (15)    0 (9)    0 (16)   0 (16)
    llama3        6 (46)    0 (22)   10 (30)  4 (27)             8 (47)    0 (25)   2 (28)   2 (34)
    longrope      100 (100) 0 (23)   0 (19)   0 (29)             80 (84)   0 (31)   2 (28)   2 (27)
    longrope2     100 (100) 0 (10)   0 (25)   0 (17)             88 (95)   0 (13)   0 (21)   0 (14)

- No scheme finds keys beyond what the model was trained on, and no change at all is the best there is. What this model has learnt from two
  million tokens of one filler seems to bear no other frequencies: Llama 3's rule, which changes slow pairs alone, leaves 6% at 256 tokens.
- The searches do find what there is to be found: the loss of a key's digits at 2,048 tokens is 1.67 nats by LongRoPE's and 1.73 by
  LongRoPE2's factors, 2.42 by PI's, 3.91 by YaRN's, 4.43 by NTK's (who guesses digits has 2.30); that is not yet a key.
- 40 steps of two such texts, 80 keys, mend nothing with any of them. Longer tuning, and keys at 2, 4 and 16 times, were not run.
"""

import dataclasses
import json
import pathlib
import statistics
import sys

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from infinicontext.data.passkey import FILLER
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.evaluation.drawing import COLORS, MARKERS, STYLE
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
DIGITS = 7  # as many as the needles of LongRoPE2's search have
SCALES = (2, 4, 8, 16)
SEEDS = 5
SCHEMES = ("none", "pi", "ntk", "dynamic", "yarn", "llama3", "longrope", "longrope2")


RECIPE = {"base0": "as it was", "progressive": "tuned at 8x", "far": "searched for 64x", "both": "and for short texts"}


def base(seed: int = 0) -> Experiment:
    """Full attention on short texts."""
    return Experiment(
        name=f"base{seed}",
        seed=seed,
        model=TransformerConfig(vocab_size=257, dim=128, layers=3, heads=4, remat=False),
        data=CorpusData(source="python", tokenizer="bytes", length=128),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluation=Evaluation(
            tasks=("perplexity",), lengths=(128, 256, 512, 1024, 2048), perplexity=PerplexityEvaluation(documents=32, scored=64)
        ),
        steps=800,
        batch_size=16,
        validation_every=200,
        checkpoint_every=200,
    )


def bases() -> list[Experiment]:
    """Five of them."""
    return [*map(base, range(SEEDS))]


def keys() -> Experiment:
    """Full attention that finds a key in short texts."""
    experiment = base()
    return dataclasses.replace(
        experiment,
        name="keys",
        model=dataclasses.replace(experiment.model, vocab_size=64),
        data=PasskeyData(lengths=(128, 256), stage_steps=(250,), digits=DIGITS),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("passkey",), lengths=(256, 512, 1024, 2048, 4096), passkey=PasskeyEvaluation(samples=10, digits=DIGITS)
        ),
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
    options = {} if scheme in ("pi", "ntk") else {"original_length": trained.train_length}
    # Dynamic NTK stretches by the text's own length.
    return RopeConfig(names.get(scheme, scheme), factor=1.0 if scheme == "dynamic" else float(scale), **options)


def _factors(trained: Experiment, scheme: str, scale: int) -> pathlib.Path:
    return FOLDER / f"{trained.name}_{scheme}_{scale * trained.train_length}.json"


def _schemes(trained: Experiment, scale: int) -> list[str]:
    """Those of LongRoPE only where their search has been done."""
    files = {scheme: _factors(trained, scheme, scale) for scheme in SCHEMES if scheme.startswith("longrope")}
    for file in files.values():
        if not file.exists():
            print(f"left out: there is no {file}", file=sys.stderr)
    return [scheme for scheme in SCHEMES if scheme not in files or files[scheme].exists()]


def _extended(trained: Experiment, scheme: str, scale: int, tuned: bool) -> Experiment:
    """The model of `trained` with a scheme, as it is or after 40 steps on texts of the target length."""
    length = scale * trained.train_length
    long = {"lengths": (length,), "stage_steps": ()} if isinstance(trained.data, PasskeyData) else {"length": length}
    return dataclasses.replace(
        trained,
        name=f"{trained.name}-{scheme}-{scale}x" + ("-tuned" if tuned else ""),
        model=dataclasses.replace(trained.model, rope=_rope(trained, scheme, scale)),
        data=dataclasses.replace(trained.data, **long),
        # A step at a rate of 0 makes a run of the model as it is.
        optimizer=OptimizerConfig(learning_rate=3e-4 if tuned else 0.0, warmup_steps=0),
        evaluation=dataclasses.replace(trained.evaluation, lengths=tuple(n for n in trained.evaluation.lengths if n <= length)),
        start_from=str(FOLDER / trained.name),
        steps=40 if tuned else 1,
        batch_size=max(4096 // length, 1),
        validation_every=40,
    )


def _each(trained: Experiment, scales: tuple[int, ...], *, tuned: bool) -> list[Experiment]:
    return [_extended(trained, scheme, scale, tuned) for scale in scales for scheme in _schemes(trained, scale)]


def progressive() -> list[Experiment]:
    """The first stage of LongRoPE's recipe: tuned with the factors for 8 times the length; nothing before their search has been done."""
    if not _factors(base(), "longrope", 8).exists():
        return []
    tuned = _extended(base(), "longrope", 8, tuned=True)
    return [dataclasses.replace(tuned, name="progressive", steps=200)]


def untuned() -> list[Experiment]:
    """Each scheme at each scale; those that the search is to beat at 8 times with five seeds."""
    compared = ("pi", "ntk", "yarn", "longrope")
    seeds = [base(seed) for seed in range(1, SEEDS)]
    others = [_extended(trained, scheme, 8, False) for trained in seeds for scheme in _schemes(trained, 8) if scheme in compared]
    return _each(base(), SCALES, tuned=False) + others


def tuned() -> list[Experiment]:
    """The same after the tuning."""
    return _each(base(), SCALES, tuned=True)


def mixed() -> list[Experiment]:
    """LongRoPE2's factors for 8 times the length, tuned with short documents among the long ones."""
    if not _factors(base(), "longrope2", 8).exists():
        return []
    tuned = _extended(base(), "longrope2", 8, tuned=True)
    data = dataclasses.replace(tuned.data, short_rows=0.3, short_length=tuned.model.rope.original_length)
    return [dataclasses.replace(tuned, name=f"{tuned.name}-mixed", data=data)]


def keys_untuned() -> list[Experiment]:
    """Each scheme at 8 times the length, asked for keys."""
    return _each(keys(), (8,), tuned=False)


def keys_tuned() -> list[Experiment]:
    """The same after the tuning."""
    return _each(keys(), (8,), tuned=True)


def _write_filler() -> None:
    """Texts that begin at different sentences, of more words than any target."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sentences = [f" {sentence.strip()}." for sentence in FILLER.split(".") if sentence]
    texts = ["".join((sentences[begin:] + sentences[:begin]) * 300) for begin in range(len(sentences))]
    (FOLDER / "filler.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def _found() -> dict[tuple[int, str], list[dict[int, float]]]:
    """By stretch and scheme: of each seed the perplexity at each length."""
    found: dict[tuple[int, str], list[dict[int, float]]] = {}
    for path in sorted(FOLDER.glob("*tuned/base*/eval.json")):
        _, scheme, stretch, *rest = path.parent.name.split("-")
        rows = json.loads(path.read_text())["tasks"]["perplexity"]["by_length"]
        key = int(stretch.removesuffix("x")), " ".join([scheme, *rest])
        found.setdefault(key, []).append({row["length"]: row["perplexity"] for row in rows})
    return found


def _recipe() -> dict[str, dict[int, float]]:
    """Of the progressive recipe's models, what is there: perplexity by length."""
    files = {name: FOLDER / f"{name}.eval.json" for name in RECIPE} | {"both": FOLDER / "both" / "eval.json"}
    rows = {name: json.loads(file.read_text())["tasks"]["perplexity"]["by_length"] for name, file in files.items() if file.exists()}
    return {name: {row["length"]: row["perplexity"] for row in of_name} for name, of_name in rows.items()}


def _print_table() -> None:
    """Perplexity at the length that a run was stretched to and at the original one, mean and standard deviation over seeds; exact keys; and
    a picture."""
    spread = lambda values: f"{statistics.mean(values):8.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    if not (found := _found()):
        sys.exit(f"{FOLDER} has no evaluated runs; the sweeps above write them")
    for (stretch, scheme), seeds in sorted(found.items()):
        short = min(seeds[0])
        far, near = ([perplexity[length] for perplexity in seeds] for length in (stretch * short, short))
        print(f"{stretch:3}x {scheme:24} {spread(far):22} at {short}: {spread(near):22} ({len(seeds)})")
    for scheme in SCHEMES:
        files = [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"held_out/base?-{scheme}.json"))]
        if whole := [file["tasks"]["document_perplexity"]["by_length"][0]["document_perplexity"] for file in files]:
            print(f"whole documents, 8x {scheme:9} {spread(whole)}", *(f"{value:.3f}" for value in whole))
    for name, rows in _recipe().items():
        print(f"{name:28}", *(f"{length}: {perplexity:.3f}" for length, perplexity in rows.items()))
    for path in sorted(FOLDER.glob("keys_*tuned/*/eval.json")):
        rows = json.loads(path.read_text())["tasks"]["passkey"]["by_length"]
        print(f"{path.parent.name:28}", *(f"{row['length']}: {100 * row['exact']:3.0f} ({100 * row['digits']:3.0f})" for row in rows))
    with matplotlib.rc_context(STYLE):
        _draw().savefig(FOLDER / "context_extension.png")


def _draw() -> Figure:
    """Perplexity by stretch, as the models are and tuned; and by length, after each step of the progressive recipe."""
    found, recipe = _found(), _recipe()
    titles = {"": "As the model is", " tuned": "After 40 steps"}
    drawn = [ending for ending in titles if any(name == f"yarn{ending}" for _, name in found)]
    count = len(drawn) + bool(recipe)
    figure = Figure(figsize=(6, 4 * count), layout="constrained")
    panels = figure.subplots(count, squeeze=False)[:, 0]
    for axes, ending in zip(panels, drawn):
        for number, scheme in enumerate(SCHEMES):
            runs = {stretch: seeds for (stretch, name), seeds in sorted(found.items()) if name == scheme + ending}
            values = [statistics.mean(seed[stretch * min(seed)] for seed in seeds) for stretch, seeds in runs.items()]
            axes.plot(list(runs), values, label=scheme, color=COLORS[number], marker=MARKERS[number])
        axes.set(title=titles[ending], xlabel="times the original length", ylabel="perplexity there")
    for number, (name, rows) in enumerate(recipe.items()):
        short = base().train_length
        stretches = [length / short for length in rows]
        panels[-1].plot(stretches, list(rows.values()), label=RECIPE[name], color=COLORS[number], marker=MARKERS[number])
        panels[-1].set(title="Second search, for 64 times", xlabel="times the original length", ylabel="perplexity there")
        panels[-1].legend()
    if drawn:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        ticks = SCALES if axes is not panels[-1] or not recipe else (1, 8, 64)
        axes.set_xticks(ticks, [f"{stretch}x" for stretch in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    return figure


if __name__ == "__main__":
    {"filler": _write_filler, "table": _print_table}[sys.argv[1]]()
