"""Compares runs: a table on the terminal, results.json, PNG pictures and one report.html that needs nothing else.

`compare` reads run folders (`runs.py`), works out the numbers of the table, writes it as text and as HTML and adds the
pictures of `plots.py`. Equal run folders give equal files: nothing in them depends on the day or the machine.
"""

import base64
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

from infinicontext.errors import UserError
from infinicontext.evaluation.labels import QUESTION_TITLES, bytes_label, count_label, length_label, perplexity
from infinicontext.evaluation.plots import Plot, baselines, draw, write_png
from infinicontext.evaluation.ruler import published
from infinicontext.evaluation.runs import Run, by_group, read_runs
from infinicontext.evaluation.score_tables import html_tables


class Number(NamedTuple):
    """One number of the table, or the mean over seeds with its spread."""

    value: float
    length: int | None = None  # context length in tokens where it was measured
    deviation: float | None = None  # sample standard deviation over seeds


class Column(NamedTuple):
    """A column of the table: its heading in two lines and how it writes a number."""

    heading: tuple[str, str]
    write: Callable[[float], str]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _four_digits(number: float) -> str:
    return f"{number:#.4g}".rstrip(".")


COLUMNS = {
    "parameters": Column(("", "parameters"), count_label),
    "steps": Column(("", "steps"), lambda steps: f"{steps:,.0f}"),
    "tokens": Column(("", "tokens"), count_label),
    "train_tokens_per_second": Column(("train", "tok/s"), count_label),
    "validation_loss": Column(("validation", "loss (nats)"), lambda nll: f"{nll:.3f}"),
    "perplexity_shortest": Column(("ppl, shortest", "context"), _four_digits),
    "perplexity_longest": Column(("ppl, longest", "context"), _four_digits),
    "passkey_train_length": Column(("passkey exact,", "train length"), _percent),
    "passkey_longest": Column(("passkey exact,", "longest"), _percent),
    "rouge_longest": Column(("ROUGE overall,", "longest"), _percent),
    "accuracy": Column(("", "accuracy"), _percent),
    "state_bytes": Column(("state,", "longest"), bytes_label),
}


class Row(NamedTuple):
    """A row of the table. `kind` is run, seeds or baseline."""

    kind: str
    label: str
    numbers: dict[str, Number]  # by the keys of COLUMNS; those without a value are absent


def compare(run_folders: list[Path], output: Path) -> dict:
    """Prints the table of the runs and writes results.json, the pictures and report.html into the folder `output`.

    Each file is replaced whole, so an interrupted call leaves no half file.

    Returns:
      What results.json holds: "runs" (name, folder, the table's numbers, experiment and raw eval of each), "seeds" (means and
      standard deviations over runs that differ in nothing but name and seed), "baselines" and "plots" (file names).

    Raises:
      UserError: no folder holds a run, a config.json or eval.json is broken, or `output` cannot be a folder.
    """
    runs = read_runs(run_folders)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}") from error
    rows = table_rows(runs)
    plots = draw(runs)
    pictures = {plot.file: _png(plot) for plot in plots}
    results = _plain(
        {
            "runs": [
                {
                    "name": run.name,
                    "folder": str(run.folder),
                    "table": _by_name(numbers(run)),
                    "experiment": run.experiment,
                    "eval": run.eval,
                }
                for run in runs
            ],
            "seeds": [{"name": row.label, "table": _by_name(row.numbers)} for row in rows if row.kind == "seeds"],
            "baselines": [{"name": row.label, "table": _by_name(row.numbers)} for row in rows if row.kind == "baseline"],
            "plots": [f"{plot.file}.png" for plot in plots],
        }
    )
    for name, picture in pictures.items():
        _write(output / f"{name}.png", picture)
    _write(output / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    _write(output / "report.html", html_page(runs, rows, plots, pictures).encode())
    print(text_table(rows))
    print(f"\nThe report is in {output / 'report.html'}")
    return results


def numbers(run: Run) -> dict[str, Number]:
    """The numbers of one run that the table shows, by the keys of COLUMNS."""
    last = run.training[-1] if run.training else {}
    steps = [line["step"] for line in (*run.training[-1:], *run.validation[-1:], run.eval) if line.get("step") is not None]
    losses = [line["validation_loss"] for line in run.validation[-1:]] or [run.task("perplexity").get("validation_nll")]
    found = {
        "parameters": Number(run.config.get("parameters", run.eval.get("parameters"))),
        "steps": Number(max(steps, default=None)),
        "tokens": Number(last.get("tokens")),
        "train_tokens_per_second": Number(run.train_speed),
        "validation_loss": Number(losses[0]),
    }
    if read := sorted((entry["length"], perplexity(entry["nll"])) for entry in _measured(run, "perplexity", "nll")):
        found["perplexity_shortest"] = Number(read[0][1], read[0][0])
        found["perplexity_longest"] = Number(read[-1][1], read[-1][0])
    # Teacher-forced ones have a table of their own.
    decoded = run.task("passkey").get("mode", "generate") == "generate"
    answered = sorted((entry["length"], entry["exact"]) for entry in _measured(run, "passkey", "exact") if decoded)
    if answered:
        found["passkey_longest"] = Number(answered[-1][1], answered[-1][0])
        if trained := [pair for pair in answered if pair[0] <= (run.train_length or 0)]:
            found["passkey_train_length"] = Number(trained[-1][1], trained[-1][0])
    if summarised := sorted((entry["length"], entry["overall"]) for entry in _measured(run, "summarisation", "overall")):
        found["rouge_longest"] = Number(summarised[-1][1], summarised[-1][0])
    found["accuracy"] = Number(run.task("accuracy").get("accuracy"))
    if sizes := sorted((int(length), size) for length, size in run.eval.get("state_bytes", {}).items()):
        found["state_bytes"] = Number(sizes[-1][1], sizes[-1][0])
    return {key: found[key] for key in COLUMNS if key in found and found[key].value is not None}


def _measured(run: Run, task: str, value: str) -> list[dict]:
    return [entry for entry in run.task(task).get("by_length", []) if entry.get(value) is not None]


def table_rows(runs: list[Run]) -> list[Row]:
    """Runs on the same data one after another, below them their means over seeds and the baselines of that data."""
    rows = []
    for group in by_group(runs, lambda run: run.data).values():
        rows += [Row("run", run.name, numbers(run)) for run in group]
        for same in by_group(group, _config_without_seed).values():
            seeds = list({run.experiment.get("seed"): run for run in same}.values())
            if len(seeds) > 1:
                rows.append(Row("seeds", f"{_common_name(seeds)}, {len(seeds)} seeds", _mean(seeds)))
        rows += [Row("baseline", f"{name} baseline", {"validation_loss": Number(nll)}) for name, nll in baselines(group)]
    return rows


def _config_without_seed(run: Run) -> str:
    return json.dumps({key: value for key, value in run.experiment.items() if key not in ("name", "seed")}, sort_keys=True)


def _common_name(runs: list[Run]) -> str:
    """The experiments' name without the seed at its end: "fam" for fam-seed0 and fam-seed1."""
    names = [str(run.experiment.get("name") or run.name) for run in runs]
    without = {re.sub(rf"[-_. ]+(seed|s)?[-_. =]*{run.experiment.get('seed')}$", "", name) for run, name in zip(runs, names)}
    return without.pop() if len(without) == 1 else names[0]


def _mean(runs: list[Run]) -> dict[str, Number]:
    """Mean and standard deviation of what all the runs have, measured at the same length."""
    each, means = [numbers(run) for run in runs], {}
    for key in COLUMNS:
        same = [found[key] for found in each if key in found]
        if len(same) == len(runs) and len({number.length for number in same}) == 1:
            values = [float(number.value) for number in same]
            deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
            means[key] = Number(statistics.fmean(values), same[0].length, deviation)
    return means


def _cell(column: Column, number: Number | None) -> str:
    if number is None:
        return "-"
    spread = f" ± {column.write(number.deviation)}" if number.deviation else ""
    return column.write(number.value) + spread + (f" @{length_label(number.length)}" if number.length else "")


def text_table(rows: list[Row]) -> str:
    """The table in plain text: names to the left, numbers to the right, "-" for what is missing."""
    lines = [("", *(column.heading[0] for column in COLUMNS.values())), ("run", *(column.heading[1] for column in COLUMNS.values()))]
    lines += [(row.label, *(_cell(column, row.numbers.get(key)) for key, column in COLUMNS.items())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [f"{name:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])) for name, *cells in lines]
    return "\n".join([*text[:2], "-" * len(text[0]), *text[2:]])


CSS = """
:root { color-scheme: light dark; --ink: #16202c; --soft: #566373; --paper: #fbfbfa; --card: #ffffff; --line: #dde2e8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6eaef; --soft: #a3adba; --paper: #14181d; --card: #1c2229; --line: #333c46; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.4rem 0 1.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.7rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.45rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; overflow-wrap: anywhere; white-space: normal; min-width: 11rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr.seeds > * { font-style: italic; }
tr.baseline > * { color: var(--soft); font-weight: 400; }
td small { color: var(--soft); }
.hint { display: none; margin: 0.3rem 0 0; color: var(--soft); font-size: 0.86rem; }
.plots { columns: 2 34rem; column-gap: 1.2rem; }
figure { margin: 0 0 1.2rem; padding: 0.7rem; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--card);
  break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 42rem; height: auto; margin: 0 auto; border-radius: 0.3rem; background: #ffffff; }
figcaption { margin-top: 0.6rem; color: var(--soft); font-size: 0.86rem; overflow-wrap: anywhere; }
figcaption p { margin: 0.3rem 0; }
details { border-top: 1px solid var(--line); padding: 0.5rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0.6rem 0; font-size: 0.86rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0.6rem 0; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; background: var(--card); border: 1px solid var(--line); }
.tokens { padding: 0.7rem; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--card); font: 0.9rem/1.9 monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.chosen { border-bottom: 2px solid var(--ink); }
@media (max-width: 40rem) {
  body { padding: 0.8rem; }
  figure { padding: 0.3rem; }
  tbody th { min-width: 8rem; }
  .hint { display: block; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; }
  h2 { break-after: avoid; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; border: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: 2pt 4pt; }
  tbody th { min-width: 0; }
  th:first-child { position: static; }
  .plots { columns: 3; column-gap: 4mm; }
  .hint { display: none; }
  figure { margin-bottom: 4mm; padding: 1mm; }
  figure img { max-height: 150mm; width: auto; max-width: 100%; }
  figcaption, dl { font-size: 7.5pt; }
}
"""


def html_page(runs: list[Run], rows: list[Row], plots: list[Plot], pictures: dict[str, bytes]) -> str:
    """The whole report in one file: table, pictures, what was not measured, and how each run was made."""
    title = f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Report on {runs[0].name}"
    skipped = [f"<li>{escape(line)}</li>" for line in _skipped(runs)]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<div class="wide">{_html_table(rows)}</div>',
        '<p class="hint">Swipe the table sideways for more columns.</p>',
        '<h2>Pictures</h2><div class="plots">' if plots else "",
        *(_html_figure(plot, pictures[plot.file]) for plot in plots),
        "</div>" if plots else "",
        *(["<h2>Scores</h2>", *scores] if (scores := html_tables(runs)) else []),
        f"<h2>RULER beside published scores</h2>{ruler}" if (ruler := published.html_table(runs)) else "",
        *_html_tokens(runs),
        f"<h2>Not measured</h2><ul>{''.join(skipped)}</ul>" if skipped else "",
        "<h2>How each run was made</h2>",
        *map(_html_details, runs),
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _html_table(rows: list[Row]) -> str:
    head = "".join(f'<th scope="col">{"<br>".join(filter(None, column.heading))}</th>' for column in COLUMNS.values())
    body = []
    for row in rows:
        cells = (escape(_cell(column, row.numbers.get(key))) for key, column in COLUMNS.items())
        written = "".join("<td>" + re.sub("(@.*)", r"<small>\1</small>", cell) + "</td>" for cell in cells)
        body.append(f'<tr class="{row.kind}"><th scope="row">{escape(row.label)}</th>{written}</tr>')
    return f'<table><thead><tr><th scope="col">run</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _html_figure(plot: Plot, picture: bytes) -> str:
    notes = [plot.note, *_protocols(plot)]
    caption = "".join(f"<p>{escape(note)}</p>" for note in notes)
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return f'<figure><img alt="{escape(plot.title)}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _html_tokens(runs: list[Run]) -> list[str]:
    """Texts whose tokens show their excess loss by colour, and by a line below them that they would be learnt from."""
    parts = []
    for run in runs:
        found = run.task("selection")
        if not found:
            continue
        parts.append(f"<h2>What {escape(run.name)} would learn from</h2><p>{escape(found['protocol'])} Orange: the loss exceeds the ")
        parts[-1] += "reference's; blue: it is below; underlined: selected. A token shows its numbers where a pointer rests on it.</p>"
        parts += [f'<p class="tokens">{"".join(map(_html_token, row))}</p>' for row in found["rows"]]
    return parts


def _html_token(token: list) -> str:
    text, loss, reference, selected = token
    written = escape(text).replace("\n", "↵<br>")
    if loss is None or reference is None:
        return f"<span>{written}</span>"
    excess = loss - reference
    color = f"rgb({'230 159 0' if excess > 0 else '86 180 233'} / {min(abs(excess) / 3, 1):.2f})"
    about = f"loss {loss:.2f}, reference {reference:.2f}, excess {excess:+.2f}"
    return f'<span{" class=chosen" if selected else ""} style="background:{color}" title="{about}">{written}</span>'


def _protocols(plot: Plot) -> list[str]:
    """How the evaluation in the picture was done; with the runs' names if not all were evaluated in the same way."""
    groups = by_group(plot.runs, lambda run: run.task(plot.task).get("protocol", "")) if plot.task else {}
    named = len(groups) > 1
    return [(f"{', '.join(run.name for run in group)}: " if named else "") + text for text, group in groups.items() if text]


def _skipped(runs: list[Run]) -> list[str]:
    """One line for each run, task and reason, with the lengths to which it applies."""
    lengths: dict[tuple[str, str, str], dict[str, None]] = {}
    for run in runs:
        for task in ("perplexity", "passkey", "document_perplexity", "summarisation", "ruler", *QUESTION_TITLES):
            found = run.task(task)
            for entry in found.get("skipped", []):
                key = run.name, f"{task} {entry['task']}" if "task" in entry else task, entry.get("reason", "no reason given")
                size = length_label(entry["length"]) if "length" in entry else str(entry["size"])
                lengths.setdefault((*key, found.get("size", "tokens")), {})[size] = None
    return [f"{name}: {task} at {', '.join(skipped)} {unit}: {reason}" for (name, task, reason, unit), skipped in lengths.items()]


def _html_details(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (run.config.get("versions") or {}).items())
    facts = {"folder": run.folder, "command": run.config.get("command"), "commit": run.config.get("commit"), "versions": versions}
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items() if fact)
    config = escape(json.dumps(run.experiment, indent=2, ensure_ascii=False))
    return f"<details><summary>{escape(run.name)}</summary><dl>{listed}</dl><pre>{config}</pre></details>"


def _by_name(found: dict[str, Number]) -> dict[str, dict]:
    return {key: {name: value for name, value in number._asdict().items() if value is not None} for key, number in found.items()}


def _plain(value):
    """The same without infinities and nan, which are no JSON: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _png(plot: Plot) -> bytes:
    target = io.BytesIO()
    write_png(plot.figure, target)
    return target.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
