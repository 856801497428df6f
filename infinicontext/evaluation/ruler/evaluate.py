"""RULER for any model, through the stream: scores by task and length, and what they add up to."""

import dataclasses
import json
import time
from pathlib import Path
from typing import get_args

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.corpora import Splitter, load_corpora
from infinicontext.evaluation.ruler.generate import VERSION, Request, Sample, generate
from infinicontext.evaluation.ruler.score import THRESHOLDS, category_means, cleaned, length_score, sample_score, summary, task_score
from infinicontext.evaluation.ruler.tasks import TASKS, TEXTS
from infinicontext.inference.generate import Generation
from infinicontext.inference.generate import generate as decode
from infinicontext.models.streaming import Model


@dataclasses.dataclass(frozen=True)
class RulerEvaluation:
    """Which tasks, and how; the benchmark has 500 samples of each."""

    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 20
    batch_size: int = 4
    chat: str = "base"  # a name of RULER's chat templates, or a text with {task_template}
    folder: str = ""  # of essays, SQuAD and HotpotQA; empty: $INFINICONTEXT_DATA/ruler
    splitter: Splitter = "punkt"  # of essays into sentences
    example_budget: int = 500  # tokens of vt's example; tokenizers that are close to bytes need 2,000
    seed: int = 42
    predictions: bool = False  # whether the result holds every sample's answer

    def __post_init__(self):
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UserError(f"evaluation.ruler.tasks has {unknown[0]}; RULER's tasks are {', '.join(TASKS)}")
        if self.splitter not in get_args(Splitter):
            raise UserError(f"evaluation.ruler.splitter is {self.splitter}; it must be one of {', '.join(get_args(Splitter))}")
        for name in ("samples", "batch_size", "example_budget"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.ruler.{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.tasks:
            raise UserError("evaluation.ruler.tasks is empty; it must name one task or more")


class Answers:
    """Answers so far, in a file from which an evaluation that was killed goes on."""

    def __init__(self, path: Path | None, about: dict):
        self.path, self.found = path, {}
        if path is None:
            return
        about = json.loads(json.dumps(about))
        try:
            first, *lines = path.read_text("utf-8").splitlines()
            if json.loads(first) == about:
                for line in lines:
                    entry = json.loads(line)
                    self.found[entry["length"], entry["task"], entry["index"]] = entry["answer"]
        except (OSError, ValueError, LookupError):
            # Nothing there, of something else, or cut off in its last line.
            pass
        kept = [
            json.dumps({"length": length, "task": task, "index": index, "answer": answer})
            for (length, task, index), answer in self.found.items()
        ]
        path.write_text("".join(line + "\n" for line in [json.dumps(about), *kept]), "utf-8")

    def keep(self, length: int, task: str, index: int, answer: str) -> None:
        """Adds one."""
        self.found[length, task, index] = answer
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"length": length, "task": task, "index": index, "answer": answer}) + "\n")


def evaluate_ruler(
    model: Model,
    tokenizer: Tokenizer,
    config: RulerEvaluation,
    lengths: list[int],
    *,
    segment: int,
    say=lambda line: None,
    file: Path | None = None,
    about: dict | None = None,
) -> dict:
    """Scores at each length.

    Args:
      model: any model with the tokenizer's vocabulary.
      tokenizer: decides how much text a length holds.
      config: which tasks and samples.
      lengths: tokens, those to be generated included.
      segment: tokens per call while a prompt is read.
      say: told of progress, a line per task and length.
      file: keeps answers, so that nothing is done twice after an interruption.
      about: what is evaluated; answers of something else are not used.

    Returns:
      protocol, version; by_length: for each the tasks' scores in percent with their 95% intervals, empty answers and speed, means of
      categories, and the score of the length if all tasks were scored; summary over such lengths; predictions: on request; skipped: tasks
      and lengths with the reason.
    """
    loaded = load_corpora(config.folder, config.tasks, config.splitter)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    stop = () if tokenizer.start_id is None else ((tokenizer.start_id,),)
    count = lambda text: len(tokenizer.encode(text))
    kept = Answers(
        file, (about or {}) | {"config": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint(), "corpora": loaded.ids}
    )
    by_length, predictions = [], []
    skipped = [{"length": length, "task": task, "reason": reason} for length in lengths for task, reason in loaded.missing.items()]
    for length in lengths:
        scores = {}
        for task in config.tasks:
            if task in loaded.missing:
                continue
            request = Request(length, count, config.seed, config.chat, example_budget=config.example_budget)
            try:
                samples = generate(task, request, loaded.corpora, config.samples)
            except UserError as error:
                skipped.append({"length": length, "task": task, "reason": str(error)})
                continue
            clock, todo = time.perf_counter(), [sample for sample in samples if (length, task, sample.index) not in kept.found]
            options = Generation(TEXTS[type(TASKS[task])].tokens, segment=segment, stop=stop)
            for at in range(0, len(todo), config.batch_size):
                batch = todo[at : at + config.batch_size]
                prompts = [np.array([*start, *tokenizer.encode(sample.input + sample.answer_prefix)], np.int32) for sample in batch]
                # A batch that is not full is filled up, so that fewer programs are compiled.
                rows = decode(model, prompts + prompts[:1] * (config.batch_size - len(prompts)), options)
                for sample, row in zip(batch, rows):
                    kept.keep(length, task, sample.index, tokenizer.decode(row.tokens))
            seconds = time.perf_counter() - clock
            scores[task] = _scored(task, samples, [kept.found[length, task, sample.index] for sample in samples])
            if todo:
                scores[task]["samples_per_second"] = len(todo) / seconds
            predictions += [
                {
                    "length": length,
                    "task": task,
                    "index": sample.index,
                    "answer": kept.found[length, task, sample.index],
                    "outputs": sample.outputs,
                }
                for sample in samples
            ]
            say(f"ruler {task} length {length}: {scores[task]['score']:.2f}%, {len(samples)} samples")
        values = {task: entry["score"] for task, entry in scores.items()}
        entry = {"length": length, "tasks": scores, "categories": category_means(values)}
        by_length.append(entry | ({"score": length_score(values)} if len(values) == len(TASKS) else {}))
    whole = {entry["length"]: entry["score"] for entry in by_length if "score" in entry}
    official = config.splitter == "punkt" and config.example_budget == 500
    protocol = (
        f"RULER, samples as NVIDIA/RULER generates them (version {VERSION}), {config.samples} of each task, chat template {config.chat!r}, "
        "read in one stream from an empty state, decoded greedily; recall of the references in percent, 95% Wilson intervals."
        + ("" if official else " Not comparable with published numbers: another splitter of sentences or budget of the example.")
    )
    asked = {"predictions": predictions} if config.predictions else {}
    added = {"summary": summary(whole, THRESHOLDS["base" if config.chat == "base" else "chat"])} if whole else {}
    return {"protocol": protocol, "version": VERSION, "corpora": loaded.ids, "by_length": by_length, "skipped": skipped} | added | asked


def _scored(task: str, samples: list[Sample], answers: list[str]) -> dict:
    # Here, because scipy.stats takes half a second to import.
    from scipy.stats import binomtest

    shares = [sample_score(task, cleaned(answer), sample.outputs) for sample, answer in zip(samples, answers)]
    interval = binomtest(round(sum(shares)), len(shares)).proportion_ci(0.95, method="wilson")
    return {
        "score": task_score(task, answers, [sample.outputs for sample in samples]),
        "samples": len(samples),
        "interval": [100 * interval.low, 100 * interval.high],
        "nulls": sum(cleaned(answer) == "" for answer in answers),
    }
