"""How RULER's answers are scored, and what scores by length add up to."""

from collections.abc import Collection, Mapping, Sequence

from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.tasks import CATEGORIES, TASKS, Questions

# A length counts as read where the score is above Llama-2-7B's at 4K, the chat model's or the base model's (appendix F).
THRESHOLDS = {"chat": 85.6, "base": 79.4}
CATEGORY_THRESHOLDS = {
    "chat": {"retrieval": 96.9, "multi-hop": 89.7, "aggregation": 84.8, "questions": 49.7},
    "base": {"retrieval": 90.9, "multi-hop": 58.8, "aggregation": 73.1, "questions": 48.6},
}


def cleaned(answer: str) -> str:
    """Without spaces around it, and with every control character as a new line."""
    return "".join("\n" if ord(character) < 32 else character for character in answer.strip()).strip()


def sample_score(task: str, answer: str, references: Sequence[str]) -> float:
    """The share of references that an answer has in it, whatever the case; for questions, 1 if it has any. `answer` is not cleaned here."""
    found = [reference.lower() in answer.lower() for reference in references]
    return float(any(found)) if isinstance(TASKS[task], Questions) else sum(found) / len(found)


def task_score(task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """In percent, to two decimals, as the official results are.

    Raises:
      UserError: there are no answers, or not one for each sample.
    """
    if not answers or len(answers) != len(references):
        raise UserError(f"RULER's {task} has {len(answers)} answers to {len(references)} samples; it must have one for each, and some")
    scores = [sample_score(task, cleaned(answer), reference) for answer, reference in zip(answers, references)]
    return round(100 * (sum(scores) / len(scores)), 2)


def category_means(by_task: Mapping[str, float]) -> dict[str, float]:
    """Of the categories whose tasks were all scored."""
    whole = {name: tasks for name, tasks in CATEGORIES.items() if all(task in by_task for task in tasks)}
    return {name: sum(by_task[task] for task in tasks) / len(tasks) for name, tasks in whole.items()}


def length_score(by_task: Mapping[str, float]) -> float:
    """The mean of all thirteen tasks.

    Raises:
      UserError: some are missing.
    """
    if missing := [task for task in TASKS if task not in by_task]:
        raise UserError(f"RULER's score of a length needs all tasks; missing: {', '.join(missing)}")
    return sum(by_task[task] for task in TASKS) / len(TASKS)


def summary(by_length: Mapping[int, float], threshold: float = THRESHOLDS["chat"], unknown: Collection[int] = ()) -> dict:
    """What a model's scores by length come to.

    Args:
      by_length: scores in percent by tokens; 0 for a length that the model cannot read, as in the published table.
      threshold: what a score must exceed.
      unknown: lengths without a score, beyond which nothing is called effective.

    Returns:
      avg; wavg_inc and wavg_dec, with weights that rise or fall by rank of the length; effective, the longest length up to which all exceed
      the threshold (None: not even the first), and how it is written.
    """
    lengths = sorted(by_length)
    scores, count = [by_length[length] for length in lengths], len(lengths)
    weighted = lambda ranks: sum(rank * score for rank, score in zip(ranks, scores)) / (count * (count + 1) / 2)
    passed = [length for length in lengths if by_length[length] > threshold]
    asked, effective = sorted({*lengths, *unknown}), None
    for length in asked:
        if length not in passed:
            break
        effective = length
    label = "unknown" if asked[0] in unknown else f"<{asked[0]}" if effective is None else f">{effective}"
    return {
        "avg": sum(scores) / count,
        "wavg_inc": weighted(range(1, count + 1)),
        "wavg_dec": weighted(range(count, 0, -1)),
        "effective": effective,
        "effective_label": label if effective in (None, asked[-1]) else str(effective),
        "passes": passed,
    }
