"""RULER for any model, through the stream: scores by task and length, and what they add up to."""

import dataclasses
from pathlib import Path
from typing import get_args

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Answers, Question
from infinicontext.evaluation.intervals import mean_with_interval
from infinicontext.evaluation.questions import ask, with_start
from infinicontext.evaluation.ruler.corpora import Splitter, load_corpora, unofficial
from infinicontext.evaluation.ruler.generate import VERSION, Request, Sample, generate
from infinicontext.evaluation.ruler.score import THRESHOLDS, category_means, cleaned, length_score, sample_score, summary, task_score
from infinicontext.evaluation.ruler.tasks import TASKS, TEXTS
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
      protocol, mode, version; by_length: for each the tasks' scores in percent with their 95% intervals, empty answers, speed, the score of
      the answers to other samples and, where it is not 100, the ceiling that the cut of answers leaves; means of categories, and the score
      of the length if all tasks were scored; summary over such lengths; predictions: on request; skipped: tasks and lengths with reasons.
    """
    loaded = load_corpora(config.folder, config.tasks, config.splitter)
    count = lambda text: len(tokenizer.encode(text))
    kept = Answers(file, (about or {}) | {"tokenizer": tokenizer.fingerprint()})
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
            questions = [
                Question(
                    length,
                    task,
                    sample.index,
                    with_start(tokenizer, tokenizer.encode(sample.input + sample.answer_prefix)),
                    tuple(sample.outputs),
                    " " + ", ".join(sample.outputs),
                    TEXTS[type(TASKS[task])].tokens,
                )
                for sample in samples
            ]
            try:
                speed = ask(model, tokenizer, questions, kept, mode="generate", batch_size=config.batch_size, segment=segment)
            except UserError as error:
                # Logits that are not finite: a model may break at one length and not at another.
                skipped.append({"length": length, "task": task, "reason": str(error)})
                continue
            answers = [kept.of(question).text for question in questions]
            scores[task] = _scored(task, samples, answers)
            # Who guesses has seen answers of the same kind: those to the next sample.
            shifted = [", ".join(sample.outputs) for sample in samples[1:] + samples[:1]]
            if len(samples) > 1:
                scores[task]["chance"] = task_score(task, shifted, [sample.outputs for sample in samples])
            # Answers are cut off at RULER's numbers of tokens, which may be few for a tokenizer that is close to bytes.
            longest = [tokenizer.decode(tokenizer.encode(question.continuation)[: question.new_tokens]) for question in questions]
            if (ceiling := task_score(task, longest, [sample.outputs for sample in samples])) < 100:
                scores[task]["ceiling"] = ceiling
            if speed:
                scores[task]["samples_per_second"] = speed
            predictions += [
                {"length": length, "task": task, "index": sample.index, "answer": answer, "outputs": sample.outputs}
                for sample, answer in zip(samples, answers)
            ]
            most = f", of {ceiling:.2f}% that fit the answer's tokens" if ceiling < 100 else ""
            guessed = f", another sample's answers {scores[task]['chance']:.2f}%" if "chance" in scores[task] else ""
            say(f"ruler {task} length {length}: {scores[task]['score']:.2f}%{most}{guessed}, {len(samples)} samples")
        values = {task: entry["score"] for task, entry in scores.items()}
        entry = {"length": length, "tasks": scores, "categories": category_means(values)}
        by_length.append(entry | ({"score": length_score(values)} if len(values) == len(TASKS) else {}))
    whole = {entry["length"]: entry["score"] for entry in by_length if "score" in entry}
    strange = [f"another {name}" for name in unofficial(loaded.ids)]
    strange += ["another splitter of sentences"] if config.splitter != "punkt" else []
    strange += ["another budget of the example"] if config.example_budget != 500 else []
    protocol = (
        f"RULER, samples as NVIDIA/RULER generates them (version {VERSION}), {config.samples} of each task, chat template {config.chat!r}, "
        "read in one stream from an empty state, decoded greedily; recall of the references in percent, 95% intervals."
        + (f" Not comparable with published numbers: {', '.join(strange)}." if strange else "")
    )
    asked = {"predictions": predictions} if config.predictions else {}
    threshold = THRESHOLDS["base" if config.chat == "base" else "chat"]
    added = {"summary": summary(whole, threshold) | {"threshold": threshold}} if whole else {}
    return (
        {"protocol": protocol, "mode": "generate", "version": VERSION, "corpora": loaded.ids, "by_length": by_length, "skipped": skipped}
        | added
        | asked
    )


def _scored(task: str, samples: list[Sample], answers: list[str]) -> dict:
    _, interval = mean_with_interval([sample_score(task, cleaned(answer), sample.outputs) for sample, answer in zip(samples, answers)])
    return {
        "score": task_score(task, answers, [sample.outputs for sample in samples]),
        "samples": len(samples),
        "interval": [100 * end for end in interval],
        "nulls": sum(cleaned(answer) == "" for answer in answers),
    }
