"""The pictures of RULER: scores by task, by length, and of needles by where they stand."""

import math

import numpy as np

from infinicontext.evaluation.drawing import ACCURACY, GRAY, Plot, heat_maps, lines_over_lengths, with_points
from infinicontext.evaluation.labels import length_label
from infinicontext.evaluation.ruler.tasks import TASKS
from infinicontext.evaluation.runs import Run, by_group


def draw_ruler(runs: list[Run]) -> list[Plot]:
    """Pictures of the runs that have scores; ways of asking are never together."""
    asked = [run for run in runs if any(entry["tasks"] for entry in run.task("ruler").get("by_length", []))]
    found = []
    for group in by_group(asked, lambda run: run.task("ruler").get("mode", "generate")).values():
        found += [_by_task(group[start : start + 6]) for start in range(0, len(group), 6)]
        found.append(_by_length(group))
        deep = [run for run in group if run.task("ruler").get("by_depth")]
        found += [_by_depth(deep[start : start + 6]) for start in range(0, len(deep), 6)]
    return [plot for plot in found if plot]


def _by_task(runs: list[Run]) -> Plot:
    entries = {run.name: {entry["length"]: entry["tasks"] for entry in run.task("ruler")["by_length"]} for run in runs}
    lengths = sorted({length for by_length in entries.values() for length in by_length})
    measured = {task for by_length in entries.values() for tasks in by_length.values() for task in tasks}
    names = [task for task in TASKS if task in measured]
    grids = []
    for run in runs:
        grids.append(np.full((len(names), len(lengths)), np.nan))
        for length, tasks in entries[run.name].items():
            for task, result in tasks.items():
                grids[-1][names.index(task), lengths.index(length)] = result["score"] / 100
    title = "RULER by task and length"
    figure, panels = heat_maps(runs, grids, ACCURACY, "recall of the references (%)", title)
    for axes in panels:
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths] if axes is panels[-1] else [""] * len(lengths))
    panels[-1].set_xlabel("length (tokens, those to be generated included)")
    return Plot("ruler-map", title, "Gray: not measured.", "ruler", runs, figure)


def _by_length(runs: list[Run]) -> Plot | None:
    measured = {run.name: [entry for entry in run.task("ruler").get("by_length", []) if entry["tasks"]] for run in runs}
    # The same tasks at all lengths and of all runs: some fit a length and others do not, and are harder or easier than those.
    common = set.intersection(*(set(entry["tasks"]) for entries in measured.values() for entry in entries), set(TASKS))

    def point(entry: dict) -> tuple:
        """The mean, and its interval as of independent tasks with errors of their own."""
        found = [entry["tasks"][task] for task in common]
        mean = sum(result["score"] for result in found) / len(found)
        half = math.sqrt(sum(((high - low) / 2) ** 2 for low, high in (result["interval"] for result in found))) / len(found)
        return entry["length"], mean, max(mean - half, 0), min(mean + half, 100)

    lines = with_points((run, list(map(point, measured[run.name])) if common else []) for run in runs)
    if not lines:
        return None
    title = "RULER by length"
    figure, axes = lines_over_lengths(lines, title, "length (tokens)", "mean over tasks (%)")
    axes.set_ylim(-4, 104)
    note = f"Mean over the {len(common)} of {len(TASKS)} tasks that were asked at every length. Bars: 95% interval."
    thresholds = sorted({run.task("ruler")["summary"]["threshold"] for run, _ in lines if "summary" in run.task("ruler")})
    # It is one of all tasks' mean.
    if thresholds and len(common) == len(TASKS):
        for threshold in thresholds:
            axes.axhline(threshold, color=GRAY, linewidth=1, zorder=1)
        said = " and ".join(f"{threshold}%" for threshold in thresholds)
        note += f" Gray: {said}, Llama-2-7B's at 4K, above which a length counts as read."
    return Plot("ruler-by-length", title, note, "ruler", [run for run, _ in lines], figure)


def _by_depth(runs: list[Run]) -> Plot:
    cells = [cell for run in runs for cell in run.task("ruler")["by_depth"]]
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    grids = []
    for run in runs:
        grids.append(np.full((len(depths), len(lengths)), np.nan))
        for cell in run.task("ruler")["by_depth"]:
            grids[-1][depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["score"] / 100
    title = "RULER's needles by length and depth"
    figure, panels = heat_maps(runs, grids, ACCURACY, "needles named (%)", title)
    for axes in panels:
        axes.set_yticks(range(len(depths)), [f"{100 * depth - 5:.0f} to {100 * depth + 5:.0f}" for depth in depths], fontsize=9)
        axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths] if axes is panels[-1] else [""] * len(lengths))
    panels[-1].set_xlabel("length (tokens, those to be generated included)")
    figure.supylabel("depth in the prompt (%)", fontsize=11)
    return Plot("ruler-depths", title, "All needles that are asked for, of all niah tasks. Gray: none stood there.", "ruler", runs, figure)
