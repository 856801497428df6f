"""What is measured of a trained model: the tasks by name, at lengths from within to far beyond what it was trained on."""

import dataclasses
import glob
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np

from infinicontext.data.books import BookData
from infinicontext.data.corpora import load_corpus
from infinicontext.data.images import ImageData, load_images
from infinicontext.data.instructions import InstructionData
from infinicontext.data.pipeline import CorpusData, Data, PasskeyData, tokenizer_of
from infinicontext.data.recall import RecallData
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.accuracy import evaluate_accuracy
from infinicontext.evaluation.babilong import BabiLong
from infinicontext.evaluation.document_perplexity import DocumentPerplexityEvaluation, evaluate_document_perplexity
from infinicontext.evaluation.infinitebench import InfiniteBench
from infinicontext.evaluation.longbench import LongBench
from infinicontext.evaluation.lost_in_the_middle import Documents, KeyValue
from infinicontext.evaluation.needle import MagicNumber, Needle
from infinicontext.evaluation.passkey import PasskeyEvaluation, evaluate_passkey
from infinicontext.evaluation.passkey_texts import BeaconPasskey, LandmarkPasskey
from infinicontext.evaluation.perplexity import PerplexityEvaluation, answer_perplexity, bits_per_byte, evaluate_perplexity, ngram_losses
from infinicontext.evaluation.questions import Asking, evaluate_questions
from infinicontext.evaluation.recall import RecallEvaluation, evaluate_recall
from infinicontext.evaluation.ruler.corpora import present
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation, evaluate_ruler
from infinicontext.evaluation.summarisation import SummarisationEvaluation, evaluate_summaries
from infinicontext.evaluation.topics import Topics
from infinicontext.inference.norm_refresh import check_refresh
from infinicontext.models.streaming import Model

# Questions with prompts of their own (evaluation/questions.py); the field of the same name holds a kind's options.
Questions = Literal[
    "passkey_landmark",
    "passkey_beacon",
    "needle",
    "magic_number",
    "topics",
    "key_value",
    "documents",
    "babilong",
    "longbench",
    "infinitebench",
]
# selection and categories are of selective language modelling (evaluation/selection.py).
Task = Literal[
    "perplexity", "document_perplexity", "passkey", "accuracy", "summarisation", "ruler", "recall", Questions, "selection", "categories"
]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured after training, and at which lengths."""

    tasks: tuple[Task, ...] = ("perplexity",)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)  # tokens read
    segment: int = 1024  # tokens per call while a long input is read
    capacity: int = 65536  # the largest cache that is allocated for a model whose state grows
    norm_refresh: tuple[int, int, int] | None = None  # perplexity as official MEGALODON scores, 8 6 2 (inference/norm_refresh.py)
    seed: int = 0
    perplexity: PerplexityEvaluation = PerplexityEvaluation()
    document_perplexity: DocumentPerplexityEvaluation = DocumentPerplexityEvaluation()
    passkey: PasskeyEvaluation = PasskeyEvaluation()
    summarisation: SummarisationEvaluation = SummarisationEvaluation()
    ruler: RulerEvaluation = RulerEvaluation()
    asking: Asking = Asking()  # how the questions below are asked
    passkey_landmark: LandmarkPasskey = LandmarkPasskey()
    passkey_beacon: BeaconPasskey = BeaconPasskey()
    needle: Needle = Needle()
    magic_number: MagicNumber = MagicNumber()
    topics: Topics = Topics()
    key_value: KeyValue = KeyValue()
    documents: Documents = Documents()
    babilong: BabiLong = BabiLong()
    longbench: LongBench = LongBench()
    infinitebench: InfiniteBench = InfiniteBench()
    recall: RecallEvaluation = RecallEvaluation()

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"evaluation.lengths is {self.lengths}; it must be one or more lengths of at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"evaluation.seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        for name in ("segment", "capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.norm_refresh:
            check_refresh("evaluation.norm_refresh", self.norm_refresh)


def corpora_of(evaluation: Evaluation, task: str) -> dict[str, str]:
    """SHA-256 (hex) of the local texts that a task's questions are made from, by the name of the corpus or of the field."""
    if task == "ruler":
        found = {name: [path] for name, path in present(evaluation.ruler.folder, evaluation.ruler.tasks).items()}
    elif task in get_args(Questions):
        kind, found = getattr(evaluation, task), {}
        for name in ("haystack", "books", "facts", "folder", "file"):
            source = getattr(kind, name, None)
            if source == "" and name in ("haystack", "books"):
                found |= {essay: [path] for essay, path in present("", ("niah_single_2",)).items()}
            elif source:
                paths = sorted(Path(source).rglob("*")) if Path(source).is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
                found[name] = [path for path in paths if path.is_file()]
    else:
        return {}
    return {name: _sha256(paths) for name, paths in found.items() if paths}


def _sha256(paths: list[Path]) -> str:
    """Of files one after another, which may be more than memory holds."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def state_grows(model: Model) -> bool:
    """Whether the model's state must be allocated for the length it is to read."""
    return jax.eval_shape(lambda: model.room(model.init_state(1, capacity=1))) is not None


def evaluate(
    model: Model,
    evaluation: Evaluation,
    data: Data,
    *,
    validation: list[dict[str, np.ndarray]],
    validation_nll: float,
    say: Callable[[str], None],
    output: Path | None = None,
    about: dict | None = None,
    speaker: Tokenizer | None = None,
) -> Iterator[tuple[str, dict]]:
    """Runs the tasks, one after another.

    Args:
      model: a trained model.
      evaluation: tasks and lengths.
      data: what it was trained on: decides the tokenizer, and the documents of the perplexity task (of conversations and books, the answers
        in `validation`, whatever the lengths).
      validation: the validation batches of training, which the n-gram baselines are scored on too.
      validation_nll: the model's mean loss per token on them, in nats.
      say: told of progress.
      output: the result's file; answers to questions are kept beside it as they come, so that an evaluation that is killed goes on.
      about: what is evaluated; answers of something else are not used.
      speaker: the tokenizer with what the model begins texts with and ends answers with; None: that of the data.

    Yields:
      A task's name and its result (see its own file), as soon as it is there. Lengths beyond `evaluation.capacity` are listed as skipped
      where the state grows.

    Raises:
      UserError: a task that does not fit the data.
    """
    _check_tasks(evaluation, data)
    tokenizer = tokenizer_of(data)
    speaker = speaker or tokenizer
    lengths = sorted(set(evaluation.lengths))
    grows = state_grows(model)
    limit = evaluation.capacity if grows else max(lengths)
    readable = [length for length in lengths if length <= limit]
    too_long = [
        {"length": length, "reason": f"the state grows with length and evaluation.capacity is {limit}"}
        for length in lengths
        if length > limit
    ]
    of_all = lambda result: result | {"skipped": result["skipped"] + too_long}
    files = lambda task: {"file": output and output.with_suffix(f".{task}.jsonl"), "about": about}
    how = {"segment": evaluation.segment, "say": say}
    seeded = how | {"seed": evaluation.seed}
    room = {"limit": limit if grows else None}
    asked = get_args(Questions)
    for task in evaluation.tasks:
        match task:
            case "perplexity" if isinstance(data, InstructionData | BookData):
                names = {"corpus": data.source, "tokenizer": data.tokenizer, "validation_nll": validation_nll}
                result = names | answer_perplexity(model, validation)
                say(f"perplexity of answers: {result['perplexity']:.3f} ({result['nll']:.4f} nats)")
                yield task, result
            case "perplexity":
                held_out, train = (
                    load_corpus(data.source, tokenizer, split, data.validation_fraction) for split in ("validation", "train")
                )
                names = {
                    "corpus": data.source,
                    "corpus_sha256": hashlib.sha256(held_out.tokens).hexdigest(),
                    "tokenizer": data.tokenizer,
                    "validation_nll": validation_nll,
                    "bits_per_byte": bits_per_byte(validation_nll, held_out, tokenizer.start_id),
                    "baselines": ngram_losses(train, tokenizer.vocab_size, validation),
                }
                more = {"norm_refresh": evaluation.norm_refresh, "start_id": tokenizer.start_id}
                yield task, names | evaluate_perplexity(model, held_out, evaluation.perplexity, lengths, limit=limit, **more, **how)
            case "document_perplexity":
                held_out = load_corpus(data.source, tokenizer, "validation", data.validation_fraction)
                config = evaluation.document_perplexity
                names = {"corpus": data.source, "corpus_sha256": hashlib.sha256(held_out.tokens).hexdigest(), "tokenizer": data.tokenizer}
                yield task, names | evaluate_document_perplexity(model, held_out, tokenizer, config, lengths, limit=limit, **how)
            case "accuracy":
                result = evaluate_accuracy(model, load_images(data, "validation"))
                say(f"accuracy {result['accuracy']:.4f} of {result['images']} images")
                yield task, result
            case "passkey":
                yield task, of_all(evaluate_passkey(model, speaker, evaluation.passkey, readable, **seeded, **files(task)))
            case "recall":
                yield task, of_all(evaluate_recall(model, data, evaluation.recall, readable, **seeded))
            case "summarisation":
                config, more = evaluation.summarisation, seeded | files(task)
                yield task, of_all(evaluate_summaries(model, tokenizer, data, config, readable, **more))
            case "ruler":
                yield task, evaluate_ruler(model, speaker, evaluation.ruler, lengths, **room, **how, **files(task))
            case _ if task in asked:
                kind = getattr(evaluation, task)
                yield task, evaluate_questions(model, speaker, task, kind, evaluation.asking, lengths, **room, **seeded, **files(task))


def _check_tasks(evaluation: Evaluation, data: Data) -> None:
    """Raises UserError if a task does not fit the data."""
    tasks, kind = evaluation.tasks, type(data).__name__
    if "perplexity" in tasks and isinstance(data, PasskeyData):
        raise UserError("evaluation.tasks has perplexity, which needs documents, but data is PasskeyData; use passkey")
    if isinstance(data, ImageData) != (tasks == ("accuracy",)):
        raise UserError(f"evaluation.tasks is {tasks}; images are evaluated by accuracy, and nothing else is")
    if isinstance(data, RecallData) != (tasks == ("recall",)):
        raise UserError(f"evaluation.tasks is {tasks}; RecallData is evaluated by recall, and nothing else is")
    if "summarisation" in tasks and not isinstance(data, BookData):
        raise UserError(f"evaluation.tasks has summarisation, which needs BookData, but data is {kind}")
    if "document_perplexity" in tasks and not isinstance(data, CorpusData):
        raise UserError(f"evaluation.tasks has document_perplexity, which needs CorpusData, but data is {kind}")
