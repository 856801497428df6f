r"""Lost in the middle: values asked of a JSON object, by where their key stands; every architecture learns the task on few pairs.

Models of about 0.4 million parameters, trained on objects of two to six pairs and asked of up to 64. Their tokenizer has 2,048 pieces, by
which an identifier of 36 characters is about 14 tokens. (With bytes, full attention has learnt little after 500 steps of 16 rows.)

    E=experiments/lost_in_the_middle.py
    infinicontext training-questions $E:full runs/lost/texts.jsonl --tasks key_value --evaluation.key-value.pairs 64 --samples 100 \
        --data.tokenizer bytes
    python $E tokenizer
    infinicontext training-questions $E:full runs/lost/train.jsonl --tasks key_value --evaluation.key-value.pairs 2 3 4 6 --samples 1500
    infinicontext sweep $E:all --workdir runs/lost
    infinicontext compare runs/lost/* --output report/

Answers are teacher-forced.
"""

import json
import pathlib
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from infinicontext.data.instructions import InstructionData
from infinicontext.evaluation.lost_in_the_middle import KeyValue
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
SIZE = {"vocab_size": 2048, "dim": 64, "layers": 3, "heads": 2, "remat": False}


def full() -> Experiment:
    """Full attention."""
    return _experiment("full", TransformerConfig(**SIZE))


def window() -> Experiment:
    """Each token sees the last 64, two pairs."""
    return _experiment("window", TransformerConfig(**SIZE, attention="window", window=64))


def megalodon() -> Experiment:
    """MEGALODON in chunks of 64."""
    sizes = SIZE | {"heads": 1, "z_dim": 32, "value_dim": 112, "feed_forward": 112, "norm_groups": 4}
    return _experiment("megalodon", MegalodonConfig(**sizes, chunk=64))


def infini() -> Experiment:
    """Infini-attention in segments of 64."""
    return _experiment("infini", InfiniConfig(**SIZE, segment=64))


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
        data=InstructionData(f"{FOLDER}/train.jsonl", tokenizer=f"{FOLDER}/tokenizer.json", template="raw", length=336),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.05),
        evaluation=Evaluation(
            tasks=("key_value",),
            lengths=(256,),
            key_value=KeyValue((4, 8, 16, 64)),
            asking=Asking(samples=20, mode="teacher_forced"),
        ),
        steps=600,
        batch_size=24,
        validation_every=100,
        checkpoint_every=100,
    )


def _write_tokenizer() -> None:
    """Pieces of bytes that are frequent in such objects; an identifier is cut into the same ones wherever it stands."""
    rows = map(json.loads, (FOLDER / "texts.jsonl").read_text("utf-8").splitlines())
    library = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(r"[0-9a-f-]{36}| ?[A-Za-z]+|\s|."), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SIZE["vocab_size"], special_tokens=["<s>"], initial_alphabet=pieces.alphabet())
    library.train_from_iterator((row["prompt"] + row["response"] for row in rows), trainer)
    library.save(str(FOLDER / "tokenizer.json"))


if __name__ == "__main__":
    {"tokenizer": _write_tokenizer}[sys.argv[1]]()
