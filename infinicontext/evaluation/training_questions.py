"""Questions with their answers as training data, so that small models can learn the tasks that they are evaluated on.

The prompts are those of the evaluation, from other seeds; as InstructionData with template "raw" a model reads them as it will be asked.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.corpora import load_corpora
from infinicontext.evaluation.ruler.generate import RulerLengthError, generate
from infinicontext.evaluation.ruler.tasks import TASKS, continuation
from infinicontext.evaluation.suite import Evaluation, Questions

ALLOWED = (*get_args(Questions), *TASKS)
OFFICIAL_SAMPLES = 500  # of each of RULER's tasks
OF_A_SEED = 20  # samples that one seed of RULER's generators makes
SEEDS = 10**6  # of RULER's generators to each seed of training questions
SUITE_SEEDS = (42, 123)  # of the papers' settings (evaluation/suites.py)


def write_questions(
    path: Path,
    tokenizer: Tokenizer,
    evaluation: Evaluation,
    tasks: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Writes JSON lines with prompt, response, task and length.

    Args:
      path: the file, which is replaced as a whole.
      tokenizer: that of the model; lengths are counted by it.
      evaluation: the options of each kind of question.
      tasks: of ALLOWED, RULER's by their own names.
      lengths: tokens of the prompts; kinds whose sizes count something else have their own.
      samples: of each task, length and place.
      seed: none that evaluates.
      say: told of what is left out.

    Returns:
      How many were written.

    Raises:
      UserError: an unknown task, one whose questions do not depend on a seed, a seed that evaluates, or nothing could be made.
    """
    if unknown := [task for task in tasks if task not in ALLOWED]:
        raise UserError(f"--tasks has {unknown[0]}; it must be of {', '.join(ALLOWED)}")
    for task in tasks:
        if (
            task in ("needle", "topics", "longbench", "infinitebench")
            or getattr(getattr(evaluation, task, None), "file", "")
            or _facts(evaluation, task)
        ):
            raise UserError(f"--tasks has {task}, whose questions are always the same; a model trained on them could not be asked any")
    if seed in (evaluation.seed, evaluation.ruler.seed, *SUITE_SEEDS):
        raise UserError(f"--seed is {seed}, which the evaluation asks by; training questions take another")
    if not 0 <= seed < 2**32 // SEEDS - 1:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**32 // SEEDS - 2}")
    lines = []

    def add(task: str, length: int, prompt: str, response: str) -> None:
        lines.append(json.dumps({"prompt": prompt, "response": response, "task": task, "length": length}, ensure_ascii=False) + "\n")

    for task in tasks:
        sizes = lengths if task in TASKS else getattr(evaluation, task).sizes(lengths)
        for size in sizes:
            try:
                if task in TASKS:
                    for prompt, outputs in _ruler(task, tokenizer, evaluation, size, samples, seed):
                        add(task, size, prompt, continuation(task, prompt, outputs))
                else:
                    for question in getattr(evaluation, task).questions(tokenizer, size, samples, seed):
                        if question.place == "closed book":
                            continue  # its prompt does not hold the answer
                        add(task, size, tokenizer.decode(question.prompt_P), question.continuation)
            except UserError as error:
                say(f"{task} {size} left out: {error}")
    if not lines:
        raise UserError(f"none of {', '.join(tasks)} could be made")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text("".join(lines), "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return len(lines)


def _facts(evaluation: Evaluation, task: str) -> str:
    """bAbI's files of a kind that reads them."""
    return evaluation.babilong.facts if task == "babilong" else ""


def _ruler(task: str, tokenizer: Tokenizer, evaluation: Evaluation, length: int, samples: int, seed: int) -> list[tuple[str, list[str]]]:
    """Samples of a task by many seeds: those of one have their answers at places that are drawn once, which could be learnt by heart."""
    config = evaluation.ruler
    loaded = load_corpora(config.folder, (task,), config.splitter)
    if task in loaded.missing:
        raise UserError(loaded.missing[task])
    # The questions of qa are those of a file, of which an evaluation asks the first.
    first, found, too_long = max(OFFICIAL_SAMPLES, config.samples), [], None
    # None of the seeds is one that evaluates, which are small.
    seeds = (number for number in itertools.count(SEEDS * (seed + 1)) if number != config.seed)
    for at, drawn in zip(range(0, samples, OF_A_SEED), seeds):
        request = config.request(length, tokenizer, seed=drawn, first=first + at)
        try:
            made = generate(task, request, loaded.corpora, min(OF_A_SEED, samples - at))
        except RulerLengthError as error:
            too_long = error
            continue
        found += [(sample.input + sample.answer_prefix, sample.outputs) for sample in made]
    if too_long and not found:
        raise too_long
    return found
