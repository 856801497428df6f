"""What one layer of Infini-attention costs, beside full attention and beside two PyTorch packages where those are installed.

Shape letters: B batch, T time, D channels.

The packages are `infini_transformer` (github.com/dingo-actual/infini-transformer), whose layer is measured as it comes, without positions,
and `infini_transformer_pytorch` (github.com/lucidrains/infini-transformer-pytorch), which has its user call the layer for each segment.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from infinicontext import models
from infinicontext.bench import Candidate, Size, interleave, machine, table, with_gradient
from infinicontext.errors import UserError
from infinicontext.models import infini, transformer
from infinicontext.models.infini_attention import InfiniConfig, begin_call
from infinicontext.models.streaming import abstract_state_bytes
from infinicontext.nn import attention, cursor
from infinicontext.nn.rope import rotation

HEADS = 4


def bench_infini(size: Size, segment: int = 512) -> None:
    """Infini-attention with its projections, forward and with gradient: one segment after the other and all at once, linear and delta."""
    B, D = size.batch, size.dim
    if D % (2 * HEADS):
        raise UserError(f"--dim is {D}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    linear = InfiniConfig(vocab_size=1, dim=D, layers=1, heads=HEADS, segment=segment, update="linear")
    delta, closed = dataclasses.replace(linear, update="delta"), dataclasses.replace(linear, gate="closed")
    sequential, parallel = (functools.partial(infini_layer, parallel=parallel) for parallel in (False, True))
    rngs = nnx.Rngs(0)
    ours = {
        "linear": (sequential, infini.Attention(linear, rngs)),
        "linear, all at once": (parallel, infini.Attention(linear, rngs)),
        "delta": (sequential, infini.Attention(delta, rngs)),
        "delta, all at once": (parallel, infini.Attention(delta, rngs)),
        "gate closed": (sequential, infini.Attention(closed, rngs)),
        "full attention": (full_layer, transformer.Attention(linear.transformer, rngs)),
    }
    print(f"{machine()}\nB {B}, D {D}, {HEADS} heads, segments of {segment}")
    for name, config in (("Infini-attention", linear), ("full attention", linear.transformer)):
        sizes = (f"{abstract_state_bytes(models.abstract(config), length):,} at {length:,} tokens" for length in (4096, 1 << 20))
        print(f"state of one layer, bytes: {name} {', '.join(sizes)}")
    installed = peers(size, segment)
    for T in sorted({max(size.length // 4, 1), size.length, 2 * size.length}):
        x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
        forward = {name: Candidate(run, layer, x_BTD) for name, (run, layer) in ours.items()}
        gradient = {name: Candidate(with_gradient(run), layer, x_BTD) for name, (run, layer) in ours.items()}
        for name, make in installed.items():
            calls = make(np.array(x_BTD))
            forward[name], gradient[name] = (Candidate(call, compiled=False) for call in calls)
        columns = {
            "tokens/s": lambda seconds, _, tokens=B * T: f"{tokens / seconds:,.0f}",
            "temp MiB": lambda _, candidate: f"{candidate.temp_bytes / 2**20:.0f}" if candidate.temp_bytes else "",
        }
        for title, candidates in (("forward", forward), ("forward and gradient", gradient)):
            interleave(candidates, size.rounds)
            table(f"Infini-attention {title}, {T:,} tokens", candidates, columns)


def infini_layer(layer: infini.Attention, x_BTD: jax.Array, *, parallel: bool) -> jax.Array:
    """o_BTD of a row read from its start."""
    B, T, _ = x_BTD.shape
    state = models.abstract(layer.config).init_state(B)
    place, _ = cursor.advance(state.cursor, T)
    call, *_ = begin_call(layer.config, state.cursor, place, state.slots, state.owner, within=False)
    cache, memory = jax.tree.map(lambda x: x[0], (state.cache, state.memory))
    return layer(x_BTD, cache, memory, call, within=False, parallel=parallel)[0]


def full_layer(layer: transformer.Attention, x_BTD: jax.Array) -> jax.Array:
    """o_BTD of a row read from its start."""
    B, T, _ = x_BTD.shape
    state = models.abstract(layer.config).init_state(B, capacity=T)
    place, after = cursor.advance(state.cursor, T)
    slot_BT = attention.slot_index(place, T, ring=False)
    now = (attention.write(old, new, slot_BT) for old, new in zip(state.slots, (place.position_BT, place.document_BT)))
    turns = rotation(layer.config.rope, layer.config.head_size, place.position_BT, after.planned_B, x_BTD.dtype)
    cache = jax.tree.map(lambda x: x[0], state.cache)
    return layer(x_BTD, cache, state.slots, attention.Slots(*now), slot_BT, place, turns)[0]


def peers(size: Size, segment: int) -> dict[str, Callable]:
    """By name, what makes of x_BTD two functions without arguments: forward, and forward with gradient."""
    names = ("infini_transformer", "infini_transformer_pytorch")
    found = [name for name in names if importlib.util.find_spec(name) and importlib.util.find_spec("torch")]
    for name in names:
        if name not in found:
            print(f"{name} or torch is not installed: its lines are left out")
    if not found:
        return {}
    if jax.default_backend() != "cpu":
        print(f"{', '.join(found)}: measured on a CPU only, where JAX is on one too; their lines are left out")
        return {}
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    layers: dict[str, tuple] = {}
    for rule in ("linear", "delta"):
        if names[0] in found:
            from infini_transformer import CompressiveMemory

            K = size.dim // HEADS
            layer = CompressiveMemory(size.dim, K, K, HEADS, segment, update=rule, causal=True)
            layers[f"{names[0]}, {rule}"] = layer, layer
        if names[1] in found:
            from infini_transformer_pytorch.infini_transformer import CausalAttention

            layer = CausalAttention(size.dim, dim_head=size.dim // HEADS, heads=HEADS, use_mem_delta_rule=rule == "delta")
            layers[f"{names[1]}, {rule}"] = layer, functools.partial(_by_segment, layer, segment)
    return {name: functools.partial(_calls, *layer) for name, layer in layers.items()}


def _by_segment(layer, segment: int, x_BTD):
    """What the layer gives for each segment, with the memory handed on."""
    import torch

    outputs, memories = [], None
    for part in x_BTD.split(segment, dim=1):
        output, _, memories = layer(part, past_memories=memories, return_new_memories=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _calls(layer, run: Callable, x_BTD: np.ndarray) -> tuple[Callable, Callable]:
    import torch

    x_BTD = torch.from_numpy(x_BTD).requires_grad_()

    def gradient() -> None:
        layer.zero_grad()
        x_BTD.grad = None
        run(x_BTD).square().sum().backward()

    return torch.no_grad()(lambda: run(x_BTD)), gradient
