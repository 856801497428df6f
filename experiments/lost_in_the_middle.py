r"""Lost in the middle: who has which trade in which town, asked of many documents, by where the one stands that says it.

Small models (0.2 million parameters, whole words as tokens) are trained on questions with up to ten documents and asked with up to 40.

    E=experiments/lost_in_the_middle.py
    infinicontext training-questions $E:full runs/lost/texts.jsonl --tasks documents --data.tokenizer bytes \
        --evaluation.documents.counts 10 20 --samples 60
    python $E tokenizer
    infinicontext training-questions $E:full runs/lost/train.jsonl --tasks documents --evaluation.documents.counts 2 3 4 6 8 10 \
        --samples 1200
    infinicontext sweep $E:all --workdir runs/lost/runs
    infinicontext compare runs/lost/runs/* --output report/

A document takes about 34 tokens. Answers are decoded and scored as in the paper.

Measured on 2 CPU cores (jax 0.10.2, float32), full attention alone, one seed, 20 questions for each position; a run of 400 steps takes
about 5 minutes. Right answers in % by position (0 is the first document), with the gold document alone and with none:

    documents    by position                        alone    none
    5            0: 0   1: 5   2: 0   3: 0   4: 25     100      0
    10           0: 5   4: 0   9: 10                    95      0
    20           0: 0   4: 0   9: 0   14: 0   19: 20   100      0
    40           0: 0   10: 0  20: 0  29: 0   39: 10   100      0

- It has learnt to give the name that stands last, and not yet whose it is: who guesses one of the documents has 20, 10, 5 and 2.5%.
- 900 more steps, 13 minutes beside other work (train $E:full --start-from runs/lost/runs/full --steps 900 --workdir runs/lost/longer),
  bring the validation loss from 1.17 to 0.97 and little else: 5 documents 0, 0, 0, 0, 20; 10, the most in training, 20, 5, 35; 20 0, 0, 0,
  5, 20; 40 0, 0, 0, 0, 20. With ten the middle is lost, but by twenty questions each; elsewhere the last document alone is known.
- The other architectures were not run.
"""

import json
import pathlib
import sys

from infinicontext.data.instructions import InstructionData
from infinicontext.data.tokenizers import word_tokenizer
from infinicontext.evaluation.lost_in_the_middle import Documents
from infinicontext.evaluation.questions import Asking
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

FOLDER = pathlib.Path("runs/lost")
SIZE = {"vocab_size": 178, "dim": 64, "layers": 3, "heads": 4, "remat": False}


def full() -> Experiment:
    """Full attention."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 128."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=128))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 128."""
    sizes = SIZE | {"heads": 1, "z_dim": 32, "value_dim": 112, "feed_forward": 112, "norm_groups": 4}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=128))


def infini() -> Experiment:
    """Infini-attention in segments of 64."""
    return _experiment("infini", InfiniConfig(**(SIZE | {"heads": 2}), segment=64))


def fam() -> Experiment:
    """TransformerFAM in blocks of 64 that see one block before them."""
    return _experiment("fam", FamConfig(**SIZE, block=64, memory_blocks=1, fam_length=16))


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
        data=InstructionData(f"{FOLDER}/train.jsonl", tokenizer=f"{FOLDER}/tokenizer.json", template="raw", length=400),
        objective=NextToken(loss="answers", context_weight=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("documents",), lengths=(512,), capacity=4096, documents=Documents((5, 10, 20, 40)), asking=Asking(samples=20)
        ),
        steps=400,
        batch_size=24,
        validation_every=100,
        checkpoint_every=100,
    )


def _write_tokenizer() -> None:
    """The words of the questions."""
    rows = map(json.loads, (FOLDER / "texts.jsonl").read_text("utf-8").splitlines())
    word_tokenizer(row["prompt"] + row["response"] for row in rows).library.save(str(FOLDER / "tokenizer.json"))


if __name__ == "__main__":
    {"tokenizer": _write_tokenizer}[sys.argv[1]]()
