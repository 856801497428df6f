"""The tables of `infinicontext bench infini`: every line, and layers that compute what they are named for; not the numbers."""

import dataclasses
import re
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinicontext import bench_infini, cli
from infinicontext.bench import Size
from infinicontext.models.infini import Attention
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.transformer import Attention as FullAttention

CONFIG = InfiniConfig(vocab_size=1, dim=16, layers=1, heads=4, segment=8)
OURS = {"linear", "linear, all at once", "delta", "delta, all at once", "gate closed", "full attention"}


class Traced:
    """A candidate that is traced rather than compiled and run."""

    def __init__(self, function, *arguments, compiled=True):
        self.seconds, self.temp_bytes = [], 2**20
        jax.eval_shape(function, *arguments)

    def run(self) -> float:
        return 1.0


def test_tables(monkeypatch, capsys):
    """By length, forward and with gradient, with a stand-in for the peers; and what a layer remembers."""
    monkeypatch.setattr(bench_infini, "Candidate", Traced)
    read = []
    monkeypatch.setattr(bench_infini, "peers", lambda *_: {"peer": lambda x_BTD: (lambda: read.append(x_BTD.shape), lambda: None)})
    bench_infini.bench_infini(Size(1, 12, 16, 1), segment=8)
    head, *tables = capsys.readouterr().out.split("\n\n")
    assert set(read) == {(1, 3, 16), (1, 12, 16), (1, 24, 16)}
    assert len(tables) == 6
    for table, (length, title) in zip(tables, [(T, title) for T in (3, 12, 24) for title in ("forward", "forward and gradient")]):
        first, columns, *lines = table.strip().splitlines()
        assert first == f"Infini-attention {title}, {length} tokens"
        assert all(name in columns for name in ("median ms", "tokens/s", "temp MiB", "x first"))
        assert {re.split(r" {2,}", line)[0] for line in lines} == OURS | {"peer"}
    (short, long), (full_short, full_long) = (
        [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) at", line)] for line in head.splitlines()[-2:]
    )
    assert short == long
    assert full_long > 200 * full_short


def test_layers_are_what_they_are_named():
    """The two schedules give the same; a closed gate attends within the segment alone, which in one segment is full attention."""
    layer, x_BTD = Attention(CONFIG, nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 20, 16))
    run = jax.jit(bench_infini.infini_layer, static_argnames="parallel")
    one, other = (run(layer, x_BTD, parallel=parallel) for parallel in (False, True))
    np.testing.assert_allclose(one, other, atol=2e-6)
    full_BTD = jax.jit(bench_infini.full_layer)(FullAttention(CONFIG.transformer, nnx.Rngs(0)), x_BTD)
    closed_BTD = run(Attention(dataclasses.replace(CONFIG, gate="closed"), nnx.Rngs(0)), x_BTD, parallel=False)
    np.testing.assert_allclose(closed_BTD[:, :8], full_BTD[:, :8], atol=2e-6)
    assert np.abs(closed_BTD - full_BTD)[:, 8:].max() > 1e-2
    assert np.abs(one - closed_BTD)[:, 8:].max() > 1e-2


def test_lines_of_peers_that_are_missing_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(bench_infini.importlib.util, "find_spec", lambda name: None if name == "torch" else ModuleType(name))
    assert bench_infini.peers(Size(), 8) == {}
    assert capsys.readouterr().out.count("is not installed: its lines are left out") == 2


def test_peers():
    """Where they are installed: outputs of the input's shape, and gradients that reach it."""
    pytest.importorskip("torch")
    pytest.importorskip("infini_transformer_pytorch")
    made = bench_infini.peers(Size(dim=16), 8)
    assert {f"infini_transformer_pytorch, {rule}" for rule in ("linear", "delta")} <= made.keys()
    for make in made.values():
        forward, gradient = make(np.array(jnp.ones((1, 20, 16))))
        assert forward().shape == (1, 20, 16)
        gradient()


def test_dimensions_that_do_not_fit(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "infini", "--dim", "20"])
    assert capsys.readouterr().err == "infinicontext: --dim is 20; it must be a multiple of 8, for 4 heads\n"
