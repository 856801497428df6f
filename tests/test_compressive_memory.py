"""Infini-attention's core against the reference data, against its definition token by token, and its properties."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinicontext.models.infini import InfiniConfig, begin_call, infini_attention
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache
from infinicontext.nn.compressive_memory import Owner, empty_memory, no_owner
from infinicontext.nn.cursor import Place
from infinicontext.nn.rope import RopeConfig

CASES = (
    "linear_basic",
    "delta_basic",
    "gqa_rope_delta_ragged",
    "gqa_rope_linear_init",
    "mqa_delta_init",
    "single_short_segment",
    "linear_many_segments",
    "delta_many_segments",
    "bypass_empty",
    "leftpad_delta",
    "packed_docs_linear",
    "packed_docs_delta",
    "guard_extreme",
)
# layers: all segments in one call, one after the other or in parallel; segments: a call for each; tokens: a call for each token.
WAYS = ("layers", "parallel", "segments", "tokens")


# Most of the time is compilation, half of that for speed that tiny sizes do not need.
QUICK = {"xla_backend_optimization_level": 0}


def read(config, q_BTHK, k_BTGK, v_BTGU, document_BT, gate_H, state, *, within, parallel, turned=True):
    """Tokens of these documents -> o_BTHU and the state."""
    before, slots, owner, cache, memory = state
    T = document_BT.shape[1]
    index_BT = before.count_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    call, slot_BM, slots, owner = begin_call(config, before, Place(index_BT, index_BT, document_BT), slots, owner, within=within)
    if not turned:
        still = lambda turns: tuple(jnp.full_like(x, value) for x, value in zip(turns, (1, 0)))
        call = call._replace(rotation=still(call.rotation), stays_rotation=still(call.stays_rotation))
    o_BTHU, new, memory = infini_attention(config, q_BTHK, k_BTGK, v_BTGU, gate_H, cache, memory, call, within=within, parallel=parallel)
    cache = Cache(*(attention.write(held, x, slot_BM) for held, x in zip(cache, new)))
    # Here padding may stand anywhere, and counts.
    after = before._replace(count_B=before.count_B + T, document_B=jnp.maximum(jnp.max(document_BT, axis=1), before.document_B))
    return o_BTHU, (after, slots, owner, cache, memory)


quick_read = jax.jit(read, static_argnums=0, static_argnames=("within", "parallel", "turned"), compiler_options=QUICK)


class Golden:
    """One file in our layout."""

    def __init__(self, folder, case, dtype="float64"):
        self.dtype = dtype
        with np.load(folder / "infini" / f"{case}.npz") as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {name: file[name] for name in file.files if name != "meta"}
        (self.B, H, self.T, K), G = self["q"].shape, self["k"].shape[1]
        self.config = InfiniConfig(
            dim=H * K,
            heads=H,
            kv_heads=G,
            head_dim=K,
            segment=self.meta["segment_len"],
            update=self.meta["update"],
            empty_memory=self.meta.get("empty_memory", "literal"),
            memory_epsilon=self.meta.get("eps", 1e-6),
            rope=RopeConfig(base=self.meta["rope_base"] or 1e4),
            dtype=dtype,
        )
        documents_BT = np.ones((self.B, self.T), np.int32)
        if "doc" in self.arrays:
            documents_BT[:, 1:] += np.cumsum(self.arrays["doc"][:, 1:] != self.arrays["doc"][:, :-1], axis=1)
        if "valid" in self.arrays:
            documents_BT = np.where(self.arrays["valid"], documents_BT, 0)
        self.documents_BT = documents_BT.astype(np.int32)

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        return np.asarray(self.arrays[name], self.dtype)

    def tokens(self, name):
        return np.swapaxes(self[name], 1, 2)

    def start(self):
        """Cursor, slots, owner, cache and memory before the first token."""
        config, K, U = self.config, self["k"].shape[-1], self["v"].shape[-1]
        cache = Cache(*(jnp.zeros((self.B, config.span, config.kv_heads, size), self.dtype) for size in (K, U)))
        memory, owner = empty_memory(self.B, config.kv_heads, K, U, self.dtype), no_owner(self.B)
        if "M0" in self:
            memory = memory._replace(matrix_BGKU=self["M0"], normalizer_BGK=self["z0"])
            owner = Owner(jnp.ones(self.B, jnp.int32), jnp.ones(self.B, jnp.int32))
        return cursor.start(self.B), attention.empty_slots(self.B, config.span), owner, cache, memory

    def run(self, q_BTHK, k_BTGK, v_BTGU, gate_H, way="layers", read=None, **options):
        """All tokens -> o_BTHU and the states after each call."""
        config = InfiniConfig(**(vars(self.config) | options))
        read = quick_read if read is None else read
        size = {"segments": config.segment, "tokens": 1}.get(way, self.T)
        state, parts, states = self.start(), [], []
        for at in range(0, self.T, size):
            tokens = (x[:, at : at + size] for x in (q_BTHK, k_BTGK, v_BTGU, self.documents_BT))
            o_BTHU, state = read(
                config, *tokens, gate_H, state, within=size < self.T, parallel=way == "parallel", turned=self.meta["rope_base"] is not None
            )
            parts.append(o_BTHU)
            states.append(state)
        return jnp.concatenate(parts, axis=1), states

    def inputs(self):
        return self.tokens("q"), self.tokens("k"), self.tokens("v"), self["beta"]


def whole(state) -> tuple[jax.Array, jax.Array]:
    """Matrix and normalizer with what the open segment has written."""
    before, _, owner, _, memory = state
    mine = jnp.asarray(before.document_B == owner.document_B, memory.matrix_BGKU.dtype)
    return (
        memory.matrix_BGKU * mine[:, None, None, None] + memory.open_matrix_BGKU,
        memory.normalizer_BGK * mine[:, None, None] + memory.open_normalizer_BGK,
    )


def assert_close(a, b, tolerance=1e-10):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("way", "dtype"), [*((way, "float64") for way in WAYS), ("layers", "float32"), ("parallel", "float32")], ids="-".join
)
def test_reference_outputs_and_memories(golden, case, way, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = Golden(golden, case, dtype)
        out_BTHU, states = data.run(*data.inputs(), way)
        tolerance = 1e-10 if dtype == "float64" else 5e-5 if case.startswith("guard") else 2e-6
        np.testing.assert_allclose(out_BTHU, data.tokens("out"), rtol=0, atol=tolerance)
        relative = {"float64": 1e-10, "float32": 2e-6}[dtype]
        close = lambda found, name: np.testing.assert_allclose(found, data[name], rtol=relative, atol=relative * np.abs(data[name]).max())
        close(whole(states[-1])[0], "M")
        close(whole(states[-1])[1], "z")
        if way == "segments" and "M_trace" in data:
            close(np.stack([whole(state)[0] for state in states]), "M_trace")
            close(np.stack([whole(state)[1] for state in states]), "z_trace")


@pytest.mark.golden
@pytest.mark.parametrize("case", ["grad_linear", "grad_delta"])
@pytest.mark.parametrize("way", ["layers", "parallel", "segments"])
def test_reference_gradients(golden, case, way, float64):
    """Through all segments, and cut after every one or two."""
    data = Golden(golden, case)

    def loss(detach, *inputs):
        return jnp.sum(data.run(*inputs, way, read, detach_every=detach)[0] * data.tokens("w"))

    gradients = lambda detach, *inputs: jax.grad(loss, (1, 2, 3, 4))(detach, *inputs)
    for detach, name in ((0, "full"), (1, "detach1"), (2, "detach2")):
        found = jax.jit(gradients, static_argnums=0, compiler_options=QUICK)(detach, *data.inputs())
        assert_close(found[:3], tuple(data.tokens(f"g_{x}_{name}") for x in "qkv"))
        assert_close(found[3], data[f"g_beta_{name}"])
        directions = (*(data.tokens(f"dir_{x}") for x in "qkv"), data["dir_beta"])
        assert_close(sum(jnp.sum(g * d) for g, d in zip(found, directions)), data[f"dd_{name}"])
