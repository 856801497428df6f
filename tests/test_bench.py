"""The tables of `infinicontext bench`: every line and column, with a stand-in for the peer; not the numbers."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinicontext import bench
from infinicontext.bench import Size
from infinicontext.nn.timestep_norm import TimestepNorm


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench, "matmul_limit", lambda rounds: 1e9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Peer:
    """A layer or model with the peer's methods, which scales what it is given."""

    scale: jax.Array

    def __call__(self, x, **_):
        return (self.scale * x.astype(jnp.float32), None)

    def compute_loss(self, tokens_BT, labels_BT, segment_ids=None):
        return self.scale * jnp.mean(labels_BT.astype(jnp.float32))


def make_peer(*_, **__) -> Peer:
    return Peer(jnp.float32(2))


def tables(printed: str) -> dict[str, dict[str, str]]:
    """Lines by name, by the title of their table; under "" the names of the columns."""
    found = {}
    for block in printed.split("\n\n")[1:]:
        title, *lines = block.strip("\n").splitlines()
        found[title] = {re.split(r" {2,}", line)[0]: line for line in lines}
    return found


CEMA = {"blocks", "blocks, documents of 500", "scan over tokens", "FFT", "megalodon-jax"}


def test_cema(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_peer", lambda *_: make_peer)
    bench.bench_cema(Size(1, 40, 8, 1), order=2)
    forward, gradient = tables(capsys.readouterr().out).values()
    assert forward.keys() - {""} == CEMA | {"blocks, tables given", "megalodon-jax, documents"}
    assert gradient.keys() - {""} == CEMA
    for lines in (forward, gradient):
        assert all(name in lines[""] for name in ("median ms", "ns/token/chan.", "temp / input", "matmul limit"))
        assert {name for name, line in lines.items() if "%" in line} == {name for name in lines if name.startswith("blocks")}


def test_long_scans_have_no_gradient(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_peer", lambda *_: None)
    monkeypatch.setattr(bench, "LONGEST_SCAN", 4)
    bench.bench_timestep_norm(Size(1, 5, 64, 1))
    printed = capsys.readouterr().out
    assert "the gradient of the scan over tokens is left out above 4 tokens" in printed
    forward, gradient = tables(printed).values()
    assert forward.keys() - gradient.keys() == {"scan over tokens"}


def test_timestep_norm(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_peer", lambda *_: make_peer)
    bench.bench_timestep_norm(Size(1, 12, 64, 1))
    forward, gradient = tables(capsys.readouterr().out).values()
    names = {"ours", "ours, documents of 500", "scan over tokens", "megalodon-jax"}
    assert forward.keys() - {""} == names | {"megalodon-jax, documents"}
    assert gradient.keys() - {""} == names
    for lines in (forward, gradient):
        assert all(name in lines[""] for name in ("ns/token/chan.", "temp / input", "copy limit"))
        assert {name for name, line in lines.items() if "%" in line} == lines.keys() - {""}


def test_the_scan_over_tokens_is_the_norm():
    layer = TimestepNorm(12, 3)
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), layer)
    x_BTD = jnp.asarray(rng.normal(5, 1, (2, 9, 12)), jnp.float32)
    np.testing.assert_allclose(bench.normalise_by_scan(layer, x_BTD), layer(x_BTD, layer.init_state(2))[0], atol=1e-4)


def test_megalodon(monkeypatch, capsys):
    identity = SimpleNamespace(partition=lambda model, _: (model, None), combine=lambda model, _: model, is_inexact_array=None)
    theirs = SimpleNamespace(MegalodonConfig=lambda **sizes: sizes, generate=lambda model, prompt_BT, *_, **__: (model.scale, None))
    monkeypatch.setitem(sys.modules, "equinox", identity)
    monkeypatch.setitem(sys.modules, "megalodon_jax", theirs)
    monkeypatch.setattr(bench, "_peer", lambda *_: make_peer)
    bench.bench_megalodon(Size(1, 8, 64, 1), new_tokens=2)
    found = tables(capsys.readouterr().out)
    assert [title.split()[0].strip(":,") for title in found] == ["forward", "training", "training", "decoding"]
    for title, lines in found.items():
        assert lines.keys() == {"", "ours", "megalodon-jax"}
        columns = ["tokens/s", "ns/token/chan.", "matmul limit"] + ["temp MiB"] * ("decoding" not in title)
        assert all(name in lines[""] for name in columns)
        assert all("%" in lines[name] for name in lines if name)
