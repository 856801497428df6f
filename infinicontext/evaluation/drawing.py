"""What the pictures of a comparison are drawn with: colours, axes one above the other, legends, lines over lengths and maps of shares.

A run has one colour and one marker in all pictures. Figures are six inches wide, so that their letters can still be read on a telephone;
what has several panels stacks them.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from infinicontext.evaluation.labels import length_label
from infinicontext.evaluation.runs import Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C3E")  # Okabe and Ito's, and a brown
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # nine beside eight colours: a pair comes again after 72 runs
LINES = ("-", "--", "-.")
GRAY = "#6b7280"
ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#F0496E", "#EBB839", "#0CD79F"]).with_extremes(bad="#d1d5db")
GATES = LinearSegmentedColormap.from_list("gates", ["#56B4E9", "#f3f4f6", "#E69F00"])
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.07,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.dpi": 160,
    "text.parse_math": False,  # a run may have dollar signs in its name
}


class Plot(NamedTuple):
    """One picture. `file` is its name without ".png"; `task` is the evaluation that it shows, None if it shows none."""

    file: str
    title: str
    note: str
    task: str | None
    runs: list[Run]
    figure: Figure


def finite(points: Iterable[tuple]) -> list[tuple]:
    """Points without infinities, nan and missing values."""
    return [point for point in points if all(x is not None and math.isfinite(x) for x in point)]


def run_style(run: Run) -> dict:
    """The colour, marker and line of a run."""
    line = LINES[run.number // len(COLORS) % len(LINES)]
    return {"color": COLORS[run.number % len(COLORS)], "marker": MARKERS[run.number % len(MARKERS)], "linestyle": line}


def stacked_axes(heights: list[float]) -> tuple[Figure, list[Axes]]:
    """Axes one above the other, with heights in inches that include titles and labels."""
    figure = Figure(figsize=(6, sum(heights)), layout="constrained")
    return figure, list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def legend_below(figure: Figure, runs: list[Run], others: list[Line2D]) -> None:
    """Below the axes. The figure grows by the height of the legend, so the axes keep theirs."""
    handles = [Line2D([], [], label=run.name, **run_style(run)) for run in runs] + others
    labels = [textwrap.fill(str(handle.get_label()), 60) for handle in handles]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    columns = min(3 if widest <= 16 else 2 if widest <= 28 else 1, len(handles))
    lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
    figure.set_size_inches(6, figure.get_figheight() + 0.2 + 0.21 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def lines_over_lengths(lines: list[tuple[Run, list[tuple]]], title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Lines over a log2 axis of lengths, a dotted line at each training length.

    Each run comes with points (length, value) or, with error bars, (length, value, low, high). The runs stand a little apart, so
    that equal values do not hide each other.
    """
    figure, (axes,) = stacked_axes([3.6])
    for place, (run, points) in enumerate(lines):
        x, y, *interval = np.array(points).T
        aside = 2 ** (min(0.07, 0.24 / len(lines)) * (place - (len(lines) - 1) / 2))
        error = np.maximum([y - interval[0], interval[1] - y], 0) if interval else None
        axes.errorbar(x * aside, y, error, capsize=3, elinewidth=1.2, **run_style(run))
    runs = [run for run, _ in lines]
    trained = sorted({run.train_length for run in runs if run.train_length})
    lengths = trained + [length for _, points in lines for length, *_ in points]
    powers = range(math.floor(math.log2(min(lengths))), math.ceil(math.log2(max(lengths))) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.4, max(lengths) * 1.4)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in powers[:: math.ceil(len(powers) / 9)]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_label(round(x))))
    axes.set(title=textwrap.fill(title, 60), xlabel=x_label, ylabel=y_label)
    for length in trained:
        axes.axvline(length, color=GRAY, linestyle=":", linewidth=1.5, zorder=1)
    label = f"trained on {', '.join(map(length_label, trained))} tokens"
    legend_below(figure, runs, [Line2D([], [], color=GRAY, linestyle=":", linewidth=1.5, label=label)] if trained else [])
    return figure, axes


def log_axis(axes: Axes, low: float, high: float, base: int, label: Callable[[float], str]) -> None:
    """A log y axis with readable numbers, also where it spans less than a decade."""
    decades = math.log10(high / low)
    steps = (1,) if base == 2 or decades > 2.5 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 4, 5, 7)
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_locator(LogLocator(base, steps, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: label(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def with_interval(entry: dict, key: str) -> tuple:
    """(length, value, low, high); without an interval the bar has no height."""
    return entry["length"], entry[key], *(entry.get("interval") or (entry[key],) * 2)


def with_points(pairs: Iterable[tuple[Run, list[tuple]]]) -> list[tuple[Run, list[tuple]]]:
    """Runs that have any."""
    return [(run, points) for run, points in pairs if points]


def heat_maps(runs: list[Run], grids: list[np.ndarray], colors: Colormap, meaning: str, title: str) -> tuple[Figure, list[Axes]]:
    """A map of shares for each run, one above the other, with numbers in % where there is room, and a bar that explains the colors."""
    names = [textwrap.fill(run.name, 60) for run in runs]
    heights = [0.6 + 0.2 * name.count("\n") + min(0.27 * max(len(grid), 2), 6) for name, grid in zip(names, grids)]
    figure, (*panels, below) = stacked_axes([*heights, 0.2])
    figure.set_size_inches(6, sum(heights) + 1.6)
    for name, grid, axes in zip(names, grids, panels):
        picture = axes.imshow(grid, cmap=colors, vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(grid):
            if np.isfinite(share) and max(grid.shape) <= 16:
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=10)
        axes.grid(False)
        axes.set_title(name, fontsize=11)
    bar = figure.colorbar(picture, cax=below, orientation="horizontal", label=meaning)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    return figure, panels
