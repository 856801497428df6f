"""The pictures of a comparison: loss, gates, perplexity, passkey, summaries, state size and speed of several runs side by side.

`draw` makes every picture that there is data for. Losses and perplexities are drawn together only for runs that read the same
data in the same tokens.
"""

import itertools
import textwrap
from collections.abc import Iterable
from typing import BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from infinicontext.evaluation.drawing import (
    ACCURACY,
    COLORS,
    GATES,
    GRAY,
    MARKERS,
    STYLE,
    Plot,
    finite,
    heat_maps,
    legend_below,
    lines_over_lengths,
    log_axis,
    run_style,
    stacked_axes,
    with_interval,
    with_points,
)
from infinicontext.evaluation.labels import QUESTION_TITLES, bytes_label, count_label, length_label, perplexity
from infinicontext.evaluation.ruler.plots import draw_ruler
from infinicontext.evaluation.runs import Run, by_group

PERPLEXITIES = {"perplexity": ("Perplexity", "context length"), "document_perplexity": ("Perplexity of documents", "length read")}


def baselines(runs: Iterable[Run]) -> dict[tuple[str, float], None]:
    """(name, nats per token) of the n-gram models that the runs were measured against, each once and in order."""
    return dict.fromkeys(pair for run in runs for pair in run.task("perplexity").get("baselines", {}).items() if pair[1] is not None)


def draw(runs: list[Run]) -> list[Plot]:
    """Every picture for which at least one run has data, in the order of the report."""
    with matplotlib.rc_context(STYLE):
        found = [_loss(group, data) for data, group in by_group(runs, lambda run: run.data).items()]
        gated = [run for run in runs if run.gates]
        found += [_gates(gated[start : start + 6]) for start in range(0, len(gated), 6)]
        for task in PERPLEXITIES:
            corpora = by_group([run for run in runs if run.task(task)], lambda run, task=task: _corpus(run, task)).items()
            found += [_perplexity_by_length(group, corpus, task) for corpus, group in corpora]
            found += [_perplexity_by_position(group, corpus, task) for corpus, group in corpora]
        by_mode = by_group(
            [run for run in runs if run.task("passkey").get("cells")], lambda run: run.task("passkey").get("mode", "generate")
        )
        summarised = [run for run in runs if run.task("summarisation").get("by_length")]
        for mapped in by_mode.values():
            found += [_passkey_map(mapped[start : start + 6]) for start in range(0, len(mapped), 6)]  # more would make an endless picture
        found += [
            *draw_ruler(runs),
            *map(_passkey_by_length, by_mode.values()),
            *(_summaries(group, source) for source, group in by_group(summarised, _books).items()),
        ]
        for task in QUESTION_TITLES:
            asked = [run for run in runs if run.task(task).get("cells")]
            for group in by_group(asked, lambda run, task=task: run.task(task)["mode"]).values():
                found += [_question_map(group[start : start + 6], task) for start in range(0, len(group), 6)]
                found += [_questions_by_size(group, task), *_questions_by_position(group, task)]
        found.append(_recall_by_state([run for run in runs if run.task("recall").get("cells")]))
        found += [_categories(run) for run in runs if run.task("categories")]
        found += [_state_bytes(runs), _train_speed(runs)]
        found += [_evaluation_speed(runs, task) for task in ("perplexity", "passkey")]
    plots: list[Plot] = []
    for plot in filter(None, found):
        same = sum(other.file.startswith(plot.file) for other in plots)
        plots.append(plot._replace(file=f"{plot.file}-{same + 1}") if same else plot)
    return plots


def write_png(figure: Figure, target: BinaryIO) -> None:
    """Renders a figure that `draw` made. Equal figures give equal bytes."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format="png")


def _corpus(run: Run, task: str) -> str:
    results = run.task(task)
    tokenizer = results.get("tokenizer")
    return results.get("corpus", "unnamed corpus") + (f" ({tokenizer})" if tokenizer else "")


def _perplexity_axis(axes: Axes, lines: list[tuple[Run, list[tuple]]]) -> None:
    values = [value for _, points in lines for _, *values in points for value in values]
    if max(values) > 4 * min(values):
        log_axis(axes, min(values), max(values), 10, lambda y: f"{y:.3g}")


def _loss(runs: list[Run], data: str) -> Plot | None:
    runs = [run for run in runs if run.training or run.validation]
    if not runs:
        return None
    title = f"Loss: {data.partition(' ')[2] or data}"
    figure, (axes,) = stacked_axes([3.7])
    shown: list[float] = []
    for run in runs:
        look = run_style(run)
        if points := finite((line["step"], line["loss"]) for line in run.training):
            step, loss = np.array(points).T
            window = np.ones(1 + len(loss) // 30)
            smooth = np.convolve(loss, window, "same") / np.convolve(np.ones_like(loss), window, "same")
            axes.plot(step, loss, color=look["color"], linewidth=0.7, alpha=0.3)
            axes.plot(step, smooth, color=look["color"], linestyle=look["linestyle"])
            shown.extend(smooth)
        if points := finite((line["step"], line["validation_loss"]) for line in run.validation):
            axes.plot(*np.array(points).T, **look | {"linestyle": ""}, markeredgecolor="white", markersize=8)
            shown.extend(loss for _, loss in points)
    others = []
    for (name, nll), dashes in zip(baselines(runs), itertools.cycle([(0, (6, 3)), (0, (2, 2))])):
        axes.axhline(nll, color=GRAY, linestyle=dashes, linewidth=1.3)
        others.append(Line2D([], [], color=GRAY, linestyle=dashes, linewidth=1.3, label=f"{name} baseline"))
        shown.append(nll)
    if shown:  # single batches may stick out: showing them whole would flatten the rest
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set(title=textwrap.fill(title, 60), xlabel="training step", ylabel="loss (nats per token)")
    legend_below(figure, runs, others)
    note = "Lines: training loss, a moving average over the single batches (thin). Markers: validation loss."
    return Plot("loss", title, note, None, runs, figure)


def _perplexity_by_length(runs: list[Run], corpus: str, task: str) -> Plot | None:
    entries = {run.name: run.task(task).get("by_length", []) for run in runs}
    nlls = ((run, finite(with_interval(entry, "nll") for entry in entries[run.name])) for run in runs)
    lines = with_points((run, finite((length, *map(perplexity, nll)) for length, *nll in points)) for run, points in nlls)
    if not lines:
        return None
    name, what = PERPLEXITIES[task]
    title = f"{name} by {what}: {corpus}"
    figure, axes = lines_over_lengths(lines, title, f"{what} (tokens)", "perplexity per token")
    _perplexity_axis(axes, lines)
    note = "Lower is better. Bars: 95% interval over documents."
    return Plot(f"{task.replace('_', '-')}-by-length", title, note, task, runs, figure)


def _perplexity_by_position(runs: list[Run], corpus: str, task: str) -> Plot | None:
    def points(run: Run) -> list[tuple]:
        bins = finite((entry["from"], entry["to"], entry["nll"]) for entry in run.task(task).get("by_position", []))
        # What remains of the last range may be a single position: too few tokens to draw as a mean.
        if len(bins) > 1 and 2 * (bins[-1][1] - bins[-1][0]) < bins[-2][1] - bins[-2][0]:
            bins.pop()
        return finite(((start + end) / 2, perplexity(nll)) for start, end, nll in bins)

    lines = with_points((run, points(run)) for run in runs)
    if not lines:
        return None
    title = f"{PERPLEXITIES[task][0]} by position: {corpus}"
    figure, axes = lines_over_lengths(lines, title, "position in the document (tokens)", "perplexity per token")
    _perplexity_axis(axes, lines)
    note = "Lower is better. Each point is the mean over a range of positions; a model that uses its context falls from left to right."
    return Plot(f"{task.replace('_', '-')}-by-position", title, note, task, runs, figure)


def _gates(runs: list[Run]) -> Plot:
    title = "Share of the memory in each head"
    grids = [np.array(run.gates[-1]["gates"]) for run in runs]
    figure, panels = heat_maps(runs, grids, GATES, "share of the memory, the rest is local attention (%)", title)
    for run, axes in zip(runs, panels):
        axes.set_title(axes.get_title(loc="left") + f", step {run.gates[-1]['step']:,}", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(16, integer=True))
    panels[-1].set_xlabel("head")
    figure.supylabel("layer", fontsize=11)
    note = "The gates at the last validation. Orange heads read the memory, blue ones their own segment."
    return Plot("gates", title, note, None, runs, figure)


def _passkey_map(runs: list[Run]) -> Plot:
    cells = [cell for run in runs for cell in run.task("passkey")["cells"]]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grids = []
    for run in runs:
        grids.append(np.full((len(depths), len(lengths)), np.nan))
        for cell in run.task("passkey")["cells"]:
            grids[-1][depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact"]  # None becomes nan
    title = "Passkey retrieval by length and depth"
    figure, panels = heat_maps(runs, grids, ACCURACY, "exact answers (%)", title)
    for run, axes in zip(runs, panels):
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths] if axes is panels[-1] else [""] * len(lengths))
        inside = sum(length <= (run.train_length or 0) for length in lengths)
        if 0 < inside < len(lengths):
            axes.axvline(inside - 0.5, color="black", linestyle=":", linewidth=1.8)
    panels[-1].set_xlabel("context length (tokens)")
    figure.supylabel("depth of the passkey (%)", fontsize=11)
    note = (
        "Documents whose passkey is given back in full. To the right of a dotted line they are longer than in training. Gray: not measured."
    )
    return Plot("passkey-map", title, note, "passkey", runs, figure)


def _passkey_by_length(runs: list[Run]) -> Plot | None:
    lines = with_points((run, finite(with_interval(e, "exact") for e in run.task("passkey").get("by_length", []))) for run in runs)
    if not lines:
        return None
    title = "Passkey retrieval by context length"
    figure, axes = lines_over_lengths(lines, title, "context length (tokens)", "exact answers (%)")
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}"))
    note = "Mean over all depths. Bars: 95% interval."
    return Plot("passkey-by-length", title, note, "passkey", [run for run, _ in lines], figure)


def _question_map(runs: list[Run], task: str) -> Plot | None:
    """Scores by size, and by depth, position or data set; of one place alone, the lines by length say all."""
    cells = [cell for run in runs for cell in run.task(task)["cells"]]
    sizes = sorted({cell["size"] for cell in cells})
    names = list(dict.fromkeys(cell["place"] for cell in cells))
    if len(names) == 1:
        return None
    numbers = [name for name in names if not isinstance(name, str)]
    rows = [*sorted(numbers), *(name for name in names if isinstance(name, str))]
    grids = []
    for run in runs:
        grids.append(np.full((len(rows), len(sizes)), np.nan))
        for cell in run.task(task)["cells"]:
            grids[-1][rows.index(cell["place"]), sizes.index(cell["size"])] = cell["score"]
    about = runs[0].task(task)
    title = f"{QUESTION_TITLES[task]} by {about['size']} and {about['place']}"
    figure, panels = heat_maps(runs, grids, ACCURACY, "score (%)", title)
    label = length_label if about["size"] == "tokens" else str
    percent = about["place"] == "depth"
    for axes in panels:
        axes.set_yticks(range(len(rows)), [f"{100 * row:.0f}%" if percent else str(row) for row in rows], fontsize=9)
        axes.set_xticks(range(len(sizes)), [label(size) for size in sizes] if axes is panels[-1] else [""] * len(sizes))
    panels[-1].set_xlabel(about["size"])
    figure.supylabel(about["place"], fontsize=11)
    return Plot(f"{task}-map", title, "Gray: not measured.", task, runs, figure)


def _questions_by_size(runs: list[Run], task: str) -> Plot | None:
    def point(entry: dict) -> tuple:
        low, high = entry["interval"] or (entry["score"], entry["score"])
        return entry["prompt_tokens"], 100 * entry["score"], 100 * low, 100 * high

    lines = with_points((run, list(map(point, run.task(task)["by_size"]))) for run in runs)
    if not lines:
        return None
    title = f"{QUESTION_TITLES[task]} by length"
    figure, axes = lines_over_lengths(lines, title, "length of the prompts (tokens)", "score (%)")
    axes.set_ylim(-4, 104)
    chances = {entry["chance"] for run, _ in lines for entry in run.task(task)["by_size"]} - {None}
    guessed = sorted({f"{100 * chance:.2g}" for chance in (min(chances), max(chances))}, key=float) if chances else []
    note = "Mean over all places. Bars: 95% interval." + (f" Who guesses has {' to '.join(guessed)}%." if guessed else "")
    return Plot(f"{task}-by-length", title, note, task, [run for run, _ in lines], figure)


def _questions_by_position(runs: list[Run], task: str) -> list[Plot]:
    """Lost in the middle: a picture for each number of pairs or documents."""
    if runs[0].task(task)["place"] != "position":
        return []
    plots = []
    for size in sorted({cell["size"] for run in runs for cell in run.task(task)["cells"]}):
        figure, (axes,) = stacked_axes([3.7])
        others = []
        for run in runs:
            cells = [cell for cell in run.task(task)["cells"] if cell["size"] == size]
            points = sorted((c["place"], c["score"], *c["interval"]) for c in cells if not isinstance(c["place"], str))
            if points:
                x, y, low, high = np.array(points).T
                axes.errorbar(x, 100 * y, 100 * np.maximum([y - low, high - y], 0), capsize=3, elinewidth=1.2, **run_style(run))
            for cell in cells:
                if isinstance(cell["place"], str):
                    dashes = (0, (6, 3)) if cell["place"] == "oracle" else (0, (2, 2))
                    axes.axhline(100 * cell["score"], color=run_style(run)["color"], linestyle=dashes, linewidth=1.2)
                    label = f"{run.name}, {cell['place']}"
                    others.append(Line2D([], [], color=run_style(run)["color"], linestyle=dashes, linewidth=1.2, label=label))
        about = runs[0].task(task)
        title = f"{QUESTION_TITLES[task]}: {size} {about['size']}"
        axes.set(title=textwrap.fill(title, 60), xlabel="position of what is asked for", ylabel="score (%)", ylim=(-4, 104))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        legend_below(figure, runs, others)
        plots.append(Plot(f"{task}-by-position-{size}", title, "Bars: 95% interval.", task, runs, figure))
    return plots


def _recall_by_state(runs: list[Run]) -> Plot | None:
    """What a memory is worth for its size, at the longest of the lengths that all runs were asked at; a panel for each number of pairs."""

    states = [{int(n): size for n, size in run.eval.get("state_bytes", {}).items() if size} for run in runs]
    asked = [{cell["size"] for cell in run.task("recall")["cells"]} & set(state) for run, state in zip(runs, states)]
    common = set.intersection(*asked) if asked else set()
    if not common:
        return None
    length = max(common)
    cells = [
        (run, state[length], cell) for run, state in zip(runs, states) for cell in run.task("recall")["cells"] if cell["size"] == length
    ]
    places = sorted({cell["place"] for _, _, cell in cells})
    figure, panels = stacked_axes([2.4] * len(places))
    for place, axes in zip(places, panels):
        for run, state, cell in cells:
            if cell["place"] == place:
                low, high = cell["interval"] or (cell["score"],) * 2
                error = np.maximum([[cell["score"] - low], [high - cell["score"]]], 0)
                axes.errorbar(state, 100 * cell["score"], 100 * error, capsize=3, elinewidth=1.2, **run_style(run))
        axes.axhline(100 / place, color=GRAY, linewidth=1, zorder=1)
        axes.set(title=f"{place} pair{'s' * (place > 1)}", ylabel="queries (%)", ylim=(-4, 104))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2, numticks=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_label(x)))
        axes.set_xlim(min(state for _, state, _ in cells) / 2, 2 * max(state for _, state, _ in cells))
    panels[-1].set_xlabel(f"state after {length:,} tokens (bytes)")
    legend_below(figure, runs, [])
    title = f"Associative recall by state, {length_label(length)} tokens"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    note = "Higher and further left is better. Bars: 95% interval. Gray: who knows which values there are, and no more."
    return Plot("recall-by-state", title, note, "recall", runs, figure)


def _books(run: Run) -> str:
    return run.task("summarisation").get("source", "unnamed books")


def _summaries(runs: list[Run], source: str) -> Plot | None:
    entries = ((run, finite(with_interval(entry, "overall") for entry in run.task("summarisation")["by_length"])) for run in runs)
    lines = with_points((run, [(length, *(100 * score for score in scores)) for length, *scores in points]) for run, points in entries)
    if not lines:
        return None
    title = f"Summaries by input length: {source}"
    figure, axes = lines_over_lengths(lines, title, "input length (tokens)", "overall ROUGE")
    axes.set_ylim(bottom=0)
    note = "Higher is better: more of the book was read. Overall: the cube root of ROUGE-1 x ROUGE-2 x ROUGE-L, in %. Bars: 95% interval."
    return Plot("summaries-by-length", title, note, "summarisation", [run for run, _ in lines], figure)


def _categories(run: Run) -> Plot:
    """The mean losses of the four kinds of tokens, from checkpoint to checkpoint."""
    found = run.task("categories")
    title = f"What became of tokens: {run.name}"
    figure, (axes,) = stacked_axes([3.7])
    for number, (kind, losses) in enumerate(found["losses"].items()):
        if losses:
            label = f"{kind}, {100 * found['shares'][kind]:.0f}% of tokens"
            axes.plot(found["steps"], losses, color=COLORS[number], marker=MARKERS[number], label=label)
    axes.set(title=textwrap.fill(title, 60), xlabel="training step", ylabel="loss (nats per token)")
    legend_below(figure, [], list(axes.lines))
    return Plot("categories", title, "Kinds as in RHO-1, section 2.1.", "categories", [run], figure)


def _state_bytes(runs: list[Run]) -> Plot | None:
    lines = with_points((run, sorted((int(n), size) for n, size in run.eval.get("state_bytes", {}).items() if size)) for run in runs)
    if not lines:
        return None
    title = "State by length"
    figure, axes = lines_over_lengths(lines, title, "tokens read", "state of one sequence (bytes)")
    sizes = [size for _, points in lines for _, size in points]
    log_axis(axes, min(sizes), max(sizes), 2, bytes_label)
    axes.set_ylim(min(sizes) / 2, max(sizes) * 2)
    note = "What a model keeps of all it has read: level for a memory of constant size, rising with the length for full attention."
    return Plot("state-bytes", title, note, None, runs, figure)


def _train_speed(runs: list[Run]) -> Plot | None:
    speeds = [(run, run.train_speed) for run in runs if run.train_speed is not None]
    if not speeds:
        return None
    title = "Speed in training"
    names = [textwrap.fill(run.name, 24) for run, _ in speeds]
    figure, (axes,) = stacked_axes([1.1 + sum(0.16 + 0.18 * (name.count("\n") + 1) for name in names)])
    bars = axes.barh(range(len(names)), [speed for _, speed in speeds], color=[run_style(run)["color"] for run, _ in speeds], height=0.65)
    axes.bar_label(bars, [count_label(speed) for _, speed in speeds], padding=4)
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count_label(x)))
    axes.set(title=title, xlabel="tokens per second")
    return Plot("train-speed", title, "Median over the steps.", None, runs, figure)


def _evaluation_speed(runs: list[Run], task: str) -> Plot | None:
    entries = {run.name: run.task(task).get("by_length", []) for run in runs}
    lines = with_points((run, finite((e["length"], e.get("tokens_per_second")) for e in entries[run.name])) for run in runs)
    if not lines:
        return None
    title = f"Speed in evaluation: {task}"
    figure, axes = lines_over_lengths(lines, title, "context length (tokens)", "tokens per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count_label(y)))
    return Plot(f"evaluation-speed-{task}", title, "Tokens per second of the whole evaluation.", None, runs, figure)
