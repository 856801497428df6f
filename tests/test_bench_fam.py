"""The tables of `infinicontext bench fam`: every line; not the numbers."""

import re

import pytest
from test_bench_infini import Traced

from infinicontext import bench_fam, cli
from infinicontext.bench import Size


def test_tables(monkeypatch, capsys):
    """By batch and length, reading and training; and what a row remembers, as much after a million tokens."""
    monkeypatch.setattr(bench_fam, "Candidate", Traced)
    bench_fam.bench_fam(Size(1, 12, 16, 1), block=4, fam_length=2)
    head, *tables = capsys.readouterr().out.split("\n\n")
    titles = [f"{kind}, {B} x {T} tokens" for B in (1, 4) for T in (3, 12, 24) for kind in ("reading", "training")]
    assert [table.splitlines()[0] for table in tables] == titles
    for table in tables:
        _, columns, *lines = table.strip().splitlines()
        assert all(name in columns for name in ("median ms", "tokens/s", "temp MiB", "x first"))
        assert [re.split(r" {2,}", line)[0] for line in lines] == ["BSWA", "FAM", "BSWA, block by block", "FAM, block by block"]
    without, with_fam = ([int(size.replace(",", "")) for size in re.findall(r"([\d,]+) at", line)] for line in head.splitlines()[-2:])
    assert without[0] == without[1] < with_fam[0] == with_fam[1]


def test_a_width_that_heads_do_not_divide(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "fam", "--dim", "12"])
    assert "--dim is 12; it must be a multiple of 8, for 4 heads" in capsys.readouterr().err
