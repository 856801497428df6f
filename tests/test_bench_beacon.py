"""The tables of `infinicontext bench beacon`: every line; not the numbers."""

import re

import pytest
from test_bench_infini import Traced

from infinicontext import bench_beacon, cli
from infinicontext.bench import Size


def test_tables(monkeypatch, capsys):
    """By length, reading a prompt and going on; what is kept shrinks with the ratio."""
    monkeypatch.setattr(bench_beacon, "Candidate", Traced)
    bench_beacon.bench_beacon(Size(1, 64, 16, 1), chunk=8, ratios=(2, 8))
    _, *tables = capsys.readouterr().out.split("\n\n")
    beacons = ["beacons, ratio 2", "beacons, ratio 8"]
    names = {"prompt": ["full attention", "full attention, one call", *beacons], "8 toke": ["full attention", *beacons]}
    titles = [title for T in (16, 64, 256) for title in (f"prompt, 1 x {T} tokens", "8 tokens behind it, one by one")]
    assert [table.splitlines()[0] for table in tables] == titles
    for table in tables:
        title, columns, *lines = table.strip().splitlines()
        assert "median ms" in columns
        assert [re.split(r" {2,}", line)[0] for line in lines] == names[title[:6]]
    sizes = [float(re.split(r" {2,}", line)[-2]) for line in tables[-2].strip().splitlines()[2:]]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


def test_a_width_that_heads_do_not_divide(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "beacon", "--dim", "12"])
    assert "--dim is 12; it must be a multiple of 8, for 4 heads" in capsys.readouterr().err
