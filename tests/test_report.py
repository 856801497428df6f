import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from infinicontext.errors import UserError
from infinicontext.evaluation import report
from infinicontext.evaluation.drawing import COLORS
from infinicontext.evaluation.labels import bytes_label, count_label, length_label, perplexity
from infinicontext.evaluation.plots import draw
from infinicontext.evaluation.report import compare
from infinicontext.evaluation.runs import read_runs

IMAGES = {"type": "ImageData", "source": "digits"}
CORPUS = {"type": "CorpusData", "source": "python", "tokenizer": "bytes"}
PASSKEY = {"type": "PasskeyData", "length": 256}
PERPLEXITY = {
    "corpus": "python",
    "tokenizer": "bytes",
    "protocol": "Each document is read from its start.",
    "by_length": [
        {"length": 1024, "nll": 1.2, "interval": [1.1, 1.3], "tokens_per_second": 900},
        {"length": 256, "nll": 1.5, "interval": [1.4, 1.6], "tokens_per_second": 1000},
    ],
    "by_position": [{"from": 0, "to": 64, "nll": 2.0}, {"from": 64, "to": 128, "nll": 1.5}],
    "baselines": {"unigram": 3.25, "bigram": 2.5},
    "skipped": [{"length": 1 << 20, "reason": "no document is so long"}],
}
TRAINING = [{"step": 10 * i, "loss": 5 / i, "tokens": 640 * i, "tokens_per_second": 100 + i} for i in range(1, 6)]


def passkey(exact: float) -> dict:
    return {
        "protocol": "Five digits, greedy.",
        "cells": [{"length": 256, "depth": 0.0, "exact": 1.0}, {"length": 1024, "depth": 0.5, "exact": exact}],
        "by_length": [{"length": 256, "exact": 1.0, "interval": [0.9, 1.0]}, {"length": 1024, "exact": exact, "interval": None}],
    }


def write_run(folder: Path, name: str, data: dict, *, seed: int = 0, metrics: list[dict] = TRAINING, tasks: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    experiment = {"name": name, "data": data, "seed": seed}
    config = {"experiment": experiment, "parameters": 1_234_567, "commit": "abc", "command": "train <x>"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if tasks is not None:
        results = {"step": 50, "train_length": 256, "state_bytes": {"256": 1024, "1024": 4096}, "tasks": tasks}
        (folder / "eval.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs on a corpus, one of them without an evaluation, and two seeds on passkeys: (folders, output, results)."""
    at = tmp_path_factory.mktemp("runs")
    validated = [*TRAINING, {"step": 50, "validation_loss": 1.25}]
    folders = [
        write_run(at / "lm", "<b>full & $x$", CORPUS, metrics=validated, tasks={"perplexity": PERPLEXITY, "unknown": {"by_length": 1}}),
        write_run(at / "p0", "fam-seed0", PASSKEY, tasks={"passkey": passkey(0.25)}),
        write_run(at / "new", "_new", CORPUS),
        write_run(at / "p1", "fam-seed1", PASSKEY, seed=1, tasks={"passkey": passkey(0.75)}),
    ]
    output = at / "report"
    return folders, output, compare(folders, output)


def test_results_hold_the_numbers_of_the_table(compared):
    _, output, results = compared
    assert results == json.loads((output / "results.json").read_text())
    full, seed, new, _ = results["runs"]
    assert full["eval"]["tasks"]["perplexity"] == PERPLEXITY
    assert full["table"] == {
        "parameters": {"value": 1_234_567},
        "steps": {"value": 50},
        "tokens": {"value": 3200},
        "train_tokens_per_second": {"value": 103},
        "validation_loss": {"value": 1.25},
        "perplexity_shortest": {"value": pytest.approx(math.exp(1.5)), "length": 256},
        "perplexity_longest": {"value": pytest.approx(math.exp(1.2)), "length": 1024},
        "state_bytes": {"value": 4096, "length": 1024},
    }
    assert seed["table"]["passkey_train_length"] == {"value": 1.0, "length": 256}
    assert seed["table"]["passkey_longest"] == {"value": 0.25, "length": 1024}
    assert set(new["table"]) == {"parameters", "steps", "tokens", "train_tokens_per_second"}


def test_runs_that_differ_only_in_seed_are_summarised(compared):
    (seeds,) = compared[2]["seeds"]
    assert seeds["name"] == "fam, 2 seeds"
    assert seeds["table"]["passkey_longest"] == {"value": 0.5, "length": 1024, "deviation": pytest.approx(math.sqrt(0.125))}


def test_printed_table(compared, tmp_path, capsys):
    folders, _, _ = compared
    compare([folders[0], *folders[2:]], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    cells = {re.split("  +", line)[0]: re.split("  +", line)[1:] for line in lines}
    assert cells["<b>full & $x$"] == ["1.23M", "50", "3.2k", "103", "1.250", "4.482 @256", "3.320 @1k", "-", "-", "-", "-", "4 KiB @1k"]
    assert cells["fam-seed1"][-5:] == ["100% @256", "75% @1k", "-", "-", "4 KiB @1k"]
    assert [*cells].index("_new") < [*cells].index("unigram baseline") < [*cells].index("fam-seed1"), "baselines stand under their corpus"
    assert cells["bigram baseline"] == ["-", "-", "-", "-", "2.500", "-", "-", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in lines[:8]}) == 1, "columns are aligned"
    assert lines[-1] == f"The report is in {tmp_path / 'report.html'}"


def test_accuracy_is_a_column(tmp_path, capsys):
    tasks = {"accuracy": {"images": 347, "accuracy": 0.9625, "interval": [0.93, 0.98]}}
    results = compare([write_run(tmp_path / "run", "run", IMAGES, tasks=tasks)], tmp_path / "report")
    assert results["runs"][0]["table"]["accuracy"] == {"value": 0.9625}
    assert re.search(r"96\.2% +4 KiB @1k", capsys.readouterr().out)
    assert "<td>96.2%</td>" in (tmp_path / "report" / "report.html").read_text()


class Page(HTMLParser):
    """Checks that elements are closed in order and collects what the tests look at."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.words = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == self.open.pop()

    def handle_data(self, data):
        self.words += data


def test_page_is_whole_escaped_and_needs_no_network(compared):
    _, output, results = compared
    text = (output / "report.html").read_text()
    page = Page(text)
    assert "<b>" not in text
    assert not re.search(r"https?:|url\(|<script|<link|@import", text)
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert pictures == [(output / name).read_bytes() for name in results["plots"]]
    for words in ("<b>full & $x$", "Five digits, greedy.", "perplexity at 1M tokens: no document is so long", "train <x>", "fam, 2 seeds"):
        assert words in page.words


def test_every_picture_that_has_data_is_drawn_and_no_other(compared):
    folders, _, results = compared
    speed = ["train-speed.png", "evaluation-speed-perplexity.png"]
    lm, keys = ["perplexity-by-length.png", "perplexity-by-position.png"], ["passkey-map.png", "passkey-by-length.png"]
    assert results["plots"] == ["loss.png", "loss-2.png", *lm, *keys, "state-bytes.png", *speed]
    assert [plot.file for plot in draw(read_runs([folders[2]]))] == ["loss", "train-speed"]


def test_runs_on_other_data_get_another_loss_plot_but_keep_their_colour(compared):
    plots = {plot.file: plot for plot in draw(read_runs(compared[0]))}
    assert [run.name for run in plots["loss"].runs] == ["<b>full & $x$", "_new"]
    assert [run.name for run in plots["loss-2"].runs] == ["fam-seed0", "fam-seed1"]
    shown = {}
    for plot in plots.values():
        for legend in plot.figure.legends:
            for text, line in zip(legend.get_texts(), legend.get_lines()):
                shown.setdefault(text.get_text(), set()).add((to_hex(line.get_color()).upper(), line.get_marker()))
    assert {name: {color for color, _ in looks} for name, looks in shown.items() if "-seed" in name or name == "_new"} == {
        "fam-seed0": {COLORS[1]},
        "_new": {COLORS[2]},
        "fam-seed1": {COLORS[3]},
    }
    assert all(len(looks) == 1 for name, looks in shown.items() if "-seed" in name)
    assert {"unigram baseline", "bigram baseline", "trained on 256 tokens"} <= set(shown)


def test_gates_are_a_map_of_the_last_ones(tmp_path):
    """Of each run with a memory; models of many heads have no numbers written into their small cells."""
    lines = [{"step": step, "validation_loss": 1.0, "gates": [[0.5, 0.5, 0.5], [step / 10, 0.25, 1.0]]} for step in (4, 9)]
    large = [{"step": 1, "validation_loss": 1.0, "gates": [[0.5] * 32] * 24}]
    folders = [write_run(tmp_path / name, name, PASSKEY, metrics=each) for name, each in (("a", lines), ("b", []), ("c", large))]
    (plot,) = (plot for plot in draw(read_runs(folders)) if plot.file == "gates")
    assert [run.name for run in plot.runs] == ["a", "c"]
    small, wide, _ = plot.figure.axes
    assert small.get_title(loc="left") == "a, step 9"
    assert small.images[0].get_array().tolist() == lines[-1]["gates"]
    assert [text.get_text() for text in small.texts] == ["50", "50", "50", "90", "25", "100"]
    assert (wide.images[0].get_array().shape, len(wide.texts)) == ((24, 32), 0)


def test_a_last_range_of_few_positions_is_not_drawn(tmp_path):
    ranges = [{"from": a, "to": b, "nll": 1.0} for a, b in ((64, 128), (128, 256), (256, 257))]
    folder = write_run(tmp_path / "run", "run", CORPUS, metrics=[], tasks={"perplexity": {"by_position": ranges}})
    plot = next(plot for plot in draw(read_runs([folder])) if plot.file == "perplexity-by-position")
    assert plot.figure.axes[0].get_lines()[0].get_xdata().tolist() == [96, 192]


def test_drawing_leaves_no_global_setting(compared):
    before = dict(matplotlib.rcParams)
    draw(read_runs(compared[0][:1]))
    assert dict(matplotlib.rcParams) == before


def test_the_same_runs_give_the_same_files(compared, tmp_path):
    folders, output, _ = compared
    compare(folders, tmp_path)
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((output / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_an_interrupted_call_keeps_the_old_report(tmp_path, monkeypatch):
    run, output = write_run(tmp_path / "run", "run", CORPUS, metrics=[]), tmp_path / "report"
    compare([run], output)
    before = (output / "report.html").read_bytes()
    write_run(tmp_path / "other", "other", CORPUS, metrics=[])

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare([run, tmp_path / "other"], output)
    assert (output / "report.html").read_bytes() == before


def test_killed_and_resumed_metrics(tmp_path):
    """Half a line, at the end or where a resumed run wrote on, is passed over; of a repeated step the last counts."""
    folder = write_run(tmp_path / "run", "run", CORPUS, metrics=[])
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 3, "lo{"step": 2, "loss": 3}\n{"step": 2, "loss": 2}\n{"ste'
    )
    (run,) = read_runs([folder])
    assert run.training == [{"step": 1, "loss": 5}, {"step": 2, "loss": 2}]


def test_a_diverged_run_is_reported(tmp_path, capsys):
    metrics = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": math.nan}, {"step": 2, "validation_loss": math.nan}]
    lengths = [{"length": 256, "nll": 900.0, "interval": [800.0, math.inf]}, {"length": 1024, "nll": math.nan, "interval": None}]
    folder = write_run(tmp_path / "run", "run", CORPUS, metrics=metrics, tasks={"perplexity": {"by_length": lengths, "baselines": None}})
    results = compare([folder], tmp_path / "report")
    assert results["runs"][0]["table"]["validation_loss"] == {"value": None}, "nan is no JSON"
    assert re.search(r"nan +inf @256 +nan @1k", capsys.readouterr().out)
    assert "perplexity-by-length.png" not in results["plots"]


def test_a_folder_that_is_no_run_is_skipped_with_a_warning(tmp_path, capsys):
    run = write_run(tmp_path / "run", "run", CORPUS, metrics=[])
    (tmp_path / "logs").mkdir()
    assert [found.folder for found in read_runs([tmp_path / "logs", run, tmp_path / "logs" / ".." / "run"])] == [run]
    assert capsys.readouterr().err == f"compare: skipped {tmp_path / 'logs'}, it holds no config.json\n"


@pytest.mark.parametrize("folders", [["logs", "missing"], []])
def test_no_run_at_all(tmp_path, folders):
    (tmp_path / "logs").mkdir()
    with pytest.raises(UserError, match="compare: no run folder among " + (".*logs.*missing" if folders else "none given")):
        compare([tmp_path / name for name in folders], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("eval.json", '{"tasks": {', "not valid JSON"),
        ("eval.json", "[1]", "must be an object"),
        ("config.json", "", "not valid JSON"),
        ("config.json", b"\xff\xfe\x00", "not valid JSON"),
        ("config.json", "{}", "no object named experiment"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content, complaint):
    folder = write_run(tmp_path / "run", "run", CORPUS, metrics=[], tasks={})
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"{re.escape(str(folder / file))} .*{complaint}"):
        compare([folder], tmp_path / "report")


def test_output_that_cannot_be_a_folder(tmp_path):
    folder = write_run(tmp_path / "run", "run", CORPUS, metrics=[])
    with pytest.raises(UserError, match=r"--output .*config\.json cannot be made"):
        compare([folder], folder / "config.json")


def test_equal_names_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / path, "run", CORPUS, metrics=[]) for path in ("a/x", "b/x", "c/y")]
    other = write_run(tmp_path / "d", "other", CORPUS, metrics=[])
    names = [run.name for run in read_runs([*folders, other])]
    assert names == [f"run ({folders[0]})", f"run ({folders[1]})", "run (y)", "other"]


@given(st.integers(1, 1 << 42))
def test_length_labels_lose_nothing(tokens):
    label = length_label(tokens)
    size = {"k": 1 << 10, "M": 1 << 20}.get(label[-1], 1)
    assert int(label.rstrip("kM").replace(",", "")) * size == tokens


@given(st.floats(1, 1e14))
def test_scaled_labels_keep_three_digits(number):
    for label, base, units in ((count_label(number), 1000, "kMGT"), (bytes_label(number), 1024, "KMGT")):
        digits, unit = re.fullmatch(r"([\d.]+) ?([kKMGT]?)i?B?", label).groups()
        assert float(digits) * base ** (units.index(unit) + 1 if unit else 0) == pytest.approx(number, rel=0.00501)
        assert len(digits) <= 4


@pytest.mark.parametrize(("tokens", "label"), [(256, "256"), (1024, "1k"), (65536, "64k"), (1 << 20, "1M"), (1000, "1,000")])
def test_length_labels(tokens, label):
    assert length_label(tokens) == label


def test_perplexity_of_a_diverged_run_is_infinite():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_scores_in_numbers(tmp_path):
    """By task and way of asking, beside what one has who knows nothing; lengths beyond a run's training are marked."""
    entry = {"size": 512, "score": 0.5, "interval": [0.4, 0.6], "prompt_tokens": 500, "chance": 1 / 6, "majority": 0.25}
    questions = {"protocol": "", "mode": "teacher_forced", "size": "tokens", "place": "task", "cells": [], "by_size": [entry]}
    of_task = {"score": 40.0, "interval": [30.0, 50.0], "samples": 5, "nulls": 0, "chance": 12.5}
    ruler = {"protocol": "", "by_length": [{"length": 256, "tasks": {"vt": of_task}, "categories": {}}], "skipped": []}
    ruler["by_depth"] = [{"length": 256, "depth": depth, "score": 50.0, "needles": 2} for depth in (0.05, 0.55)]
    tasks = {"passkey": passkey(0.5), "babilong": questions, "ruler": ruler}
    write_run(tmp_path / "a", "a", PASSKEY, tasks=tasks)
    write_run(tmp_path / "b", "b", PASSKEY, tasks={"passkey": passkey(0.25)})
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h3>BABILong, teacher-forced</h3>" in page
    assert "<td>50.0 <small>40 to 60</small> *</td>" in page
    assert '<th scope="row">who guesses</th><td>16.7</td>' in page
    assert '<th scope="row">the commonest answer</th><td>25</td>' in page
    assert "<h3>Passkey</h3>" in page
    assert "<td>25.0 *</td>" in page
    assert "<h3>RULER, vt</h3>" in page
    assert "RULER&#x27;s needles by length and depth" in page
    assert "<td>40.0 <small>30 to 50</small></td>" in page
