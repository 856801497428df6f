"""The table of `infinicontext bench longrope`: every line; not the numbers."""

import re

from infinicontext.bench import Size
from infinicontext.bench_longrope import bench_longrope


def test_table(capsys):
    bench_longrope(Size(1, 16, 8, 1))
    head, table = capsys.readouterr().out.split("\n\n")
    assert "1 documents" in head
    title, columns, *lines = table.strip().splitlines()
    assert title == "16 tokens, 8 candidates (2 in the last line)"
    assert "candidates/s" in columns
    names = [re.split(r" {2,}", line)[0] for line in lines]
    assert names == ["one call", "one call, four side by side", "a call each", "compiled anew for each"]
