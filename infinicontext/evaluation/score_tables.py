"""Scores by length as numbers: a table for each task and way of asking, with what one who knows nothing would score."""

from html import escape
from typing import NamedTuple

from infinicontext.evaluation.labels import QUESTION_TITLES, length_label
from infinicontext.evaluation.ruler.tasks import TASKS as RULER_TASKS
from infinicontext.evaluation.runs import Run, by_group


class Score(NamedTuple):
    """At one length; shares from 0 to 1."""

    size: int
    mean: float
    interval: list[float] | None
    chance: float | None  # of one who guesses
    majority: float | None = None  # of one who gives the commonest answer


def html_tables(runs: list[Run]) -> list[str]:
    """Those there are scores for; a length beyond a run's training is marked."""
    kinds = {"passkey": ("Passkey", _of_passkey)}
    kinds |= {
        f"ruler {task}": (f"RULER, {task}", lambda run, task=task: _of_ruler(run, task))
        for task in RULER_TASKS
        if any(_of_ruler(run, task) for run in runs)
    }
    kinds |= {task: (title, lambda run, task=task: _of_questions(run, task)) for task, title in QUESTION_TITLES.items()}
    parts = []
    for task, (title, scores_of) in kinds.items():
        result = task.split()[0]
        groups = by_group([run for run in runs if scores_of(run)], lambda run, result=result: run.task(result).get("mode", "generate"))
        for mode, group in groups.items():
            how = {"generate": "", "teacher_forced": ", teacher-forced"}[mode]
            parts.append(f"<h3>{escape(title)}{how}</h3>")
            parts.append(_table([(run, scores_of(run)) for run in group], group[0].task(result).get("size", "tokens")))
    return parts


def _of_passkey(run: Run) -> list[Score]:
    return [Score(e["length"], e["exact"], e["interval"], e.get("chance")) for e in run.task("passkey").get("by_length", [])]


def _of_ruler(run: Run, task: str) -> list[Score]:
    found = [(entry["length"], entry["tasks"][task]) for entry in run.task("ruler").get("by_length", []) if task in entry["tasks"]]
    percent = lambda value: value if value is None else value / 100
    interval = lambda result: result.get("interval") and [end / 100 for end in result["interval"]]
    return [Score(length, result["score"] / 100, interval(result), percent(result.get("chance"))) for length, result in found]


def _of_questions(run: Run, task: str) -> list[Score]:
    entries = run.task(task).get("by_size", [])
    return [Score(e["size"], e["score"], e["interval"], e.get("chance"), e.get("majority")) for e in entries]


def _table(of_runs: list[tuple[Run, list[Score]]], unit: str) -> str:
    everything = [score for _, scores in of_runs for score in scores]
    sizes = sorted({score.size for score in everything})
    label = length_label if unit == "tokens" else str
    head = "".join(f'<th scope="col">{label(size)}</th>' for size in sizes)
    body = ""
    for run, scores in of_runs:
        by_size = {score.size: score for score in scores}
        beyond = lambda size, run=run: unit == "tokens" and run.train_length and size > run.train_length
        cells = "".join(f"<td>{_cell(by_size.get(size))}{' *' if beyond(size) else ''}</td>" for size in sizes)
        body += f'<tr class="run"><th scope="row">{escape(run.name)}</th>{cells}</tr>'
    for name in ("chance", "majority"):
        found = {score.size: getattr(score, name) for score in everything if getattr(score, name) is not None}
        if found:
            cells = "".join(f"<td>{100 * found[size]:.3g}</td>" if size in found else "<td>-</td>" for size in sizes)
            said = {"chance": "who guesses", "majority": "the commonest answer"}[name]
            body += f'<tr class="baseline"><th scope="row">{said}</th>{cells}</tr>'
    head = f'<tr><th scope="col">%, by {escape(unit)}</th>{head}</tr>'
    note = "<p>* longer than the run's training</p>" if " *</td>" in body else ""
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    interval = f" <small>{100 * score.interval[0]:.0f} to {100 * score.interval[1]:.0f}</small>" if score.interval else ""
    return f"{100 * score.mean:.1f}{interval}"
