"""RULER for any model, through the stream: scores by task and length, and what they add up to."""

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Answer, Answers, Question
from infinicontext.evaluation.intervals import mean_with_interval
from infinicontext.evaluation.questions import Mode, ask, with_start
from infinicontext.evaluation.ruler.corpora import Splitter, load_corpora, unofficial
from infinicontext.evaluation.ruler.generate import VERSION, Request, Sample, Singular, generate
from infinicontext.evaluation.ruler.score import (
    CATEGORY_THRESHOLDS,
    THRESHOLDS,
    category_means,
    cleaned,
    length_score,
    sample_score,
    summary,
    task_score,
)
from infinicontext.evaluation.ruler.tasks import TASKS, TEXTS, Needles, continuation
from infinicontext.models.streaming import Model


@dataclasses.dataclass(frozen=True)
class RulerEvaluation:
    """Which tasks, and how; the benchmark has 500 samples of each."""

    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 20
    batch_size: int = 4
    mode: Mode = "generate"  # as the benchmark; teacher_forced: an answer counts if each token of the right one is the likeliest
    chat: str = "base"  # a name of RULER's chat templates, or a text with {task_template}
    folder: str = ""  # of essays, SQuAD and HotpotQA; empty: $INFINICONTEXT_DATA/ruler
    splitter: Splitter = "punkt"  # of essays into sentences
    example_budget: int = 500  # tokens of vt's example; tokenizers that are close to bytes need 2,000
    singular: Singular = "official"  # see generate.Singular
    seed: int = 42
    predictions: bool = False  # whether the result holds every sample's answer

    def __post_init__(self):
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UserError(f"evaluation.ruler.tasks has {unknown[0]}; RULER's tasks are {', '.join(TASKS)}")
        if self.mode not in get_args(Mode):
            raise UserError(f"evaluation.ruler.mode is {self.mode}; it must be one of {', '.join(get_args(Mode))}")
        if self.singular not in get_args(Singular):
            raise UserError(f"evaluation.ruler.singular is {self.singular}; it must be one of {', '.join(get_args(Singular))}")
        if self.splitter not in get_args(Splitter):
            raise UserError(f"evaluation.ruler.splitter is {self.splitter}; it must be one of {', '.join(get_args(Splitter))}")
        for name in ("samples", "batch_size", "example_budget"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.ruler.{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"evaluation.ruler.seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not self.tasks:
            raise UserError("evaluation.ruler.tasks is empty; it must name one task or more")

    def request(self, length: int, tokenizer: Tokenizer, **changes) -> Request:
        """What samples of a length are to be like."""
        names = ("seed", "chat", "example_budget", "singular")
        return Request(length, lambda text: len(tokenizer.encode(text)), **{name: getattr(self, name) for name in names} | changes)

    def deviations(self, ids: dict[str, str]) -> list[str]:
        """What is not as in the official samples, given the SHA-256 of the corpora."""
        found = [f"another {name}" for name in unofficial(ids)]
        found += ["another splitter of sentences"] if self.splitter != "punkt" else []
        found += ["another budget of the example"] if self.example_budget != 500 else []
        return found + (["another rule of the singular"] if self.singular != "official" else [])


def evaluate_ruler(
    model: Model,
    tokenizer: Tokenizer,
    config: RulerEvaluation,
    lengths: list[int],
    *,
    limit: int | None = None,
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
      limit: the longest that the model has room for; None: any. Longer ones are not asked, and count as 0 in the summary.
      segment: tokens per call while a prompt is read.
      say: told of progress, a line per task and length.
      file: keeps answers, so that nothing is done twice after an interruption.
      about: what is evaluated; answers of something else are not used.

    Returns:
      protocol, mode, version; by_length: for each the tasks' scores in percent with their 95% intervals, the samples' mean length, speed;
      decoded, also empty answers, the score of the answers to other samples and, where it is not 100, the ceiling that the cut of answers
      leaves; teacher-forced, the share of tokens; means of categories, decoded also which of them pass Llama-2-7B's at 4K, and the score
      of the length if all tasks were scored; by_depth: of all needles that were asked for, the share that answers name, by tenth of the
      prompt that they stand in; summary over lengths with a score, if decoded; predictions: on request; skipped: tasks and lengths with
      reasons.
    """
    loaded = load_corpora(config.folder, config.tasks, config.splitter)
    kept = Answers(file, (about or {}) | {"mode": config.mode, "tokenizer": tokenizer.fingerprint()})
    decoded, kind = config.mode == "generate", "base" if config.chat == "base" else "chat"
    by_length, by_depth, predictions = [], [], []
    asked = [length for length in lengths if limit is None or length <= limit]
    too_long = f"the state grows with length and evaluation.capacity is {limit}"
    skipped = [{"length": length, "reason": too_long} for length in lengths if length not in asked]
    skipped += [{"length": length, "task": task, "reason": reason} for length in asked for task, reason in loaded.missing.items()]
    for task, reason in loaded.missing.items():
        say(f"ruler {task}: left out, {reason}")
    for length in asked:
        scores, needles = {}, []
        for task in config.tasks:
            if task in loaded.missing:
                continue
            try:
                samples = generate(task, config.request(length, tokenizer), loaded.corpora, config.samples)
            except UserError as error:
                skipped.append({"length": length, "task": task, "reason": str(error)})
                say(f"ruler {task} length {length}: left out, {error}")
                continue
            questions = [_question(task, sample, length, tokenizer) for sample in samples]
            try:
                speed = ask(model, tokenizer, questions, kept, mode=config.mode, batch_size=config.batch_size, segment=segment)
            except UserError as error:
                # Logits that are not finite: a model may break at one length and not at another.
                skipped.append({"length": length, "task": task, "reason": str(error)})
                say(f"ruler {task} length {length}: left out, {error}")
                continue
            answers = [kept.of(question) for question in questions]
            scores[task] = _scored(task, samples, answers) if decoded else _forced(answers)
            scores[task] |= {"samples": len(samples), "mean_length": float(np.mean([sample.length for sample in samples]))}
            if decoded:
                scores[task] |= _limits(task, samples, questions, tokenizer)
            if isinstance(TASKS[task], Needles):
                needles += [needle for sample, answer in zip(samples, answers) for needle in _needles(sample, answer.text)]
            if speed:
                scores[task]["samples_per_second"] = speed
            predictions += [
                {"length": length, "task": task, "index": sample.index, "answer": answer.text, "outputs": sample.outputs}
                | {"length_actual": sample.length, "depths": depths(sample)}
                for sample, answer in zip(samples, answers)
            ]
            ceiling, chance = scores[task].get("ceiling"), scores[task].get("chance")
            most = "" if ceiling is None else f", of {ceiling:.2f}% that fit the answer's tokens"
            guessed = "" if chance is None else f", another sample's answers {chance:.2f}%"
            say(f"ruler {task} length {length}: {scores[task]['score']:.2f}%{most}{guessed}, {len(samples)} samples")
        by_depth += [{"length": length} | entry for entry in _by_tenth(needles)]
        values = {task: entry["score"] for task, entry in scores.items()}
        means = category_means(values)
        entry = {"length": length, "tasks": scores, "categories": means}
        if decoded:
            entry["categories_passed"] = [name for name, mean in means.items() if mean > CATEGORY_THRESHOLDS[kind][name]]
        by_length.append(entry | ({"score": length_score(values)} if len(values) == len(TASKS) else {}))
    whole = {entry["length"]: entry["score"] for entry in by_length if "score" in entry}
    strange = config.deviations(loaded.ids)
    strange += [] if decoded else ["another way of scoring"]
    how = {
        "generate": "decoded greedily; recall of the references",
        "teacher_forced": "teacher-forced; right answers, of which each token is the likeliest,",
    }
    protocol = (
        f"RULER, samples as NVIDIA/RULER generates them (version {VERSION}), {config.samples} of each task, chat template {config.chat!r}, "
        f"read in one stream from an empty state, {how[config.mode]} in percent, 95% intervals."
        + (f" Not comparable with published numbers: {', '.join(strange)}." if strange else "")
    )
    more = {"predictions": predictions} if config.predictions else {}
    if whole and decoded:
        threshold = THRESHOLDS[kind]
        unread = dict.fromkeys(sorted(set(lengths) - set(asked)), 0.0)
        unknown = [length for length in asked if length not in whole]
        more["summary"] = summary(whole | unread, threshold, unknown) | {"threshold": threshold, "unread": list(unread)}
    about = {"protocol": protocol, "mode": config.mode, "version": VERSION, "corpora": loaded.ids}
    return about | {"by_length": by_length, "by_depth": by_depth, "skipped": skipped} | more


def _question(task: str, sample: Sample, length: int, tokenizer: Tokenizer) -> Question:
    text, new_tokens = sample.input + sample.answer_prefix, TEXTS[type(TASKS[task])].tokens
    prompt, right = with_start(tokenizer, tokenizer.encode(text)), continuation(task, text, sample.outputs)
    return Question(length, task, sample.index, prompt, tuple(sample.outputs), right, new_tokens)


def _scored(task: str, samples: list[Sample], answers: list[Answer]) -> dict:
    texts = [answer.text for answer in answers]
    _, interval = mean_with_interval([sample_score(task, cleaned(text), sample.outputs) for sample, text in zip(samples, texts)])
    return {
        "score": task_score(task, texts, [sample.outputs for sample in samples]),
        "interval": [100 * end for end in interval],
        "nulls": sum(cleaned(text) == "" for text in texts),
    }


def _forced(answers: list[Answer]) -> dict:
    mean, interval = mean_with_interval([float(answer.right == 1) for answer in answers])
    return {"score": 100 * mean, "interval": [100 * end for end in interval], "tokens": 100 * float(np.mean([a.right for a in answers]))}


def _limits(task: str, samples: list[Sample], questions: list[Question], tokenizer: Tokenizer) -> dict[str, float]:
    """What one who guesses scores and, if it is not everything, one who knows the answers."""
    references, found = [sample.outputs for sample in samples], {}
    if len(samples) > 1:
        # Who guesses has seen answers of the same kind: those to the next sample.
        found["chance"] = task_score(task, [", ".join(outputs) for outputs in references[1:] + references[:1]], references)
    # Answers are cut off at RULER's numbers of tokens, which may be few for a tokenizer that is close to bytes.
    longest = [tokenizer.decode(tokenizer.encode(question.continuation)[: question.new_tokens]) for question in questions]
    ceiling = task_score(task, longest, references)
    return found | ({"ceiling": ceiling} if ceiling < 100 else {})


def depths(sample: Sample) -> list[float]:
    """Where in the prompt the values or assignments that are asked for stand: shares of its characters."""
    return [offset / len(sample.input) for offset in sample.offsets]


def _needles(sample: Sample, answer: str) -> list[tuple[float, bool]]:
    """For each needle that is asked for, its depth and whether the answer names it."""
    return [(depth, value.lower() in cleaned(answer).lower()) for depth, value in zip(depths(sample), sample.outputs)]


def _by_tenth(needles: list[tuple[float, bool]]) -> list[dict]:
    """The share of needles that were named, in percent, by tenth of the prompt."""
    tenths = [[named for depth, named in needles if min(int(10 * depth), 9) == tenth] for tenth in range(10)]
    return [
        {"depth": (tenth + 0.5) / 10, "score": 100 * float(np.mean(found)), "needles": len(found)}
        for tenth, found in enumerate(tenths)
        if found
    ]
