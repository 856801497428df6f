"""RULER's published scores, to be read beside one's own in a report."""

import functools
import json
from html import escape
from importlib import resources

from infinicontext.evaluation.labels import length_label
from infinicontext.evaluation.runs import Run

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@functools.cache
def published() -> dict:
    """source; models: model, claimed and effective length, scores by length in percent, avg, wavg_inc and wavg_dec."""
    return json.loads(resources.files("infinicontext.evaluation.ruler").joinpath("published.json").read_text("utf-8"))


def html_table(runs: list[Run]) -> str:
    """Runs that were scored on all thirteen tasks at some length, above what is published; "" if there is no such run."""
    rows = [_own(run) for run in runs if run.task("ruler").get("summary")]
    if not rows:
        return ""
    numbers = lambda model: (f"{model['scores'][key]:.1f}" if (key := str(length)) in model["scores"] else "-" for length in LENGTHS)
    theirs = [
        [m["model"], m["claimed"], m["effective"], *numbers(m), m["avg"], m["wavg_inc"], m["wavg_dec"]] for m in published()["models"]
    ]
    heads = ["model", "claimed", "effective", *map(length_label, LENGTHS), "avg", "wAvg (inc)", "wAvg (dec)"]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = ""
    for kind, lines in (("run", rows), ("baseline", theirs)):
        for name, *cells in lines:
            body += f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
    note = f"Below the runs: the {published()['source']}, mostly chat models, whose templates and thresholds differ from a base model's."
    return f'<p>{note}</p><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _own(run: Run) -> list[str]:
    found = run.task("ruler")
    scores = {entry["length"]: entry["score"] for entry in found["by_length"] if "score" in entry}
    scores |= dict.fromkeys(found["summary"].get("unread", ()), 0.0)
    of_length = (f"{scores[length]:.1f}" if length in scores else "-" for length in LENGTHS)
    # Means over other lengths are no numbers to stand beside these.
    whole = scores.keys() == set(LENGTHS)
    means = (f"{found['summary'][name]:.1f}" if whole else "-" for name in ("avg", "wavg_inc", "wavg_dec"))
    strange = "not comparable; " if "Not comparable" in found["protocol"] else ""
    threshold = found["summary"].get("threshold")
    effective = found["summary"]["effective_label"] + (f" ({strange}{threshold}%)" if threshold else "")
    return [run.name, "-", effective, *of_length, *means]
