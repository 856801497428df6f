"""The table of `infinicontext bench selective`: every line; not the numbers."""

import re

import jax

from infinicontext.bench import Size
from infinicontext.bench_selective import bench_selective


def test_tables(capsys):
    # optax itself multiplies dtypes that strict promotion refuses to mix.
    with jax.numpy_dtype_promotion("standard"):
        bench_selective(Size(2, 16, 8, 1))
    _, *tables = capsys.readouterr().out.split("\n\n")
    assert [table.splitlines()[0] for table in tables] == [f"training step, 2 x {T} tokens" for T in (4, 16)]
    for table in tables:
        _, columns, *lines = table.strip().splitlines()
        assert "tokens/s" in columns
        names = ["all tokens", "batch, stored losses", "row, stored losses", "batch, reference read"]
        assert [re.split(r" {2,}", line)[0] for line in lines] == names
