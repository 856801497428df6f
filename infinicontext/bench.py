"""What our building blocks and models cost, beside their other forms and beside peers where those are installed.

All candidates of a table run in one process, one after the other in every round, so that a busy machine slows them alike; medians are
compared. Shape letters: B batch, T time, D channels, V vocabulary.
"""

import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.inference.generate import Generation, generate
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.nn.cema import CEMA, cema_tables
from infinicontext.nn.parameters import parameter_count
from infinicontext.nn.timestep_norm import TimestepNorm
from infinicontext.objectives.next_token import token_losses


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured."""

    batch: int = 1
    length: int = 4096
    dim: int = 256
    rounds: int = 9

    def __post_init__(self):
        for name in ("batch", "length", "dim", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 1 or more")


class Candidate:
    """A function and its arguments, compiled once; `compiled` False for one that compiles its parts itself."""

    def __init__(self, function: Callable, *arguments: Any, compiled: bool = True):
        self.function, self.arguments, self.temp_bytes = function, arguments, 0
        if compiled:
            self.function = jax.jit(function).lower(*arguments).compile()
            self.temp_bytes = self.function.memory_analysis().temp_size_in_bytes
        self.seconds: list[float] = []
        self.run()

    def run(self) -> float:
        """Seconds of one call."""
        clock = time.perf_counter()
        jax.block_until_ready(self.function(*self.arguments))
        return time.perf_counter() - clock


def interleave(candidates: dict[str, Candidate], rounds: int) -> None:
    """Runs every candidate once per round."""
    for _ in range(rounds):
        for candidate in candidates.values():
            candidate.seconds.append(candidate.run())


def table(title: str, candidates: dict[str, Candidate], columns: dict[str, Callable[[float, Candidate], str]]) -> None:
    """Prints medians and best times, what `columns` make of the median, and each median as a multiple of the first line's."""
    first = statistics.median(next(iter(candidates.values())).seconds)
    width = max(map(len, candidates)) + 2
    print(f"\n{title}\n{'':{width}}{'median ms':>11}{'best ms':>10}" + "".join(f"{name:>16}" for name in columns) + f"{'x first':>10}")
    for name, candidate in candidates.items():
        median = statistics.median(candidate.seconds)
        cells = "".join(f"{column(median, candidate):>16}" for column in columns.values())
        print(f"{name:{width}}{1e3 * median:11.2f}{1e3 * min(candidate.seconds):10.2f}{cells}{median / first:10.2f}")


def machine() -> str:
    """One line: where this ran."""
    allocator = {name: os.environ[name] for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES") if name in os.environ}
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    kind = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, {kind}, {os.cpu_count()} cores{load}, allocator settings {allocator or 'default'}"


def matmul_limit(rounds: int) -> float:
    """FLOP/s of a batched product of 64-wide matrices, the shape that CEMA's blocks make."""
    left, right = jnp.ones((512, 256, 64)), jnp.ones((512, 64, 64))
    candidate = Candidate(lambda a, b: jnp.einsum("dks,dst->dkt", a, b, precision="highest"), left, right)
    interleave({"": candidate}, rounds)
    return 2 * 512 * 256 * 64 * 64 / statistics.median(candidate.seconds)


def with_gradient(function: Callable) -> Callable:
    """The sum of squares of what a function returns, with gradients for all its arguments."""
    loss = lambda *arguments: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(function(*arguments)))
    return lambda *arguments: jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def bench_cema(size: Size, order: int = 16) -> None:
    """CEMA forward and with gradient: blocks, the scan over tokens, the FFT; blocks with documents; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    layer, x_BTD = CEMA(D, order, nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, T, D))
    state, starts_BT = layer.init_state(B), (jnp.arange(T)[None] % 500 == 0).repeat(B, axis=0)
    run = lambda layer, x_BTD, **options: layer(x_BTD, state, **options)
    forms = {
        "blocks": run,
        "blocks, documents of 500": functools.partial(run, starts_BT=starts_BT),
        "scan over tokens": functools.partial(run, method="scan"),
        "FFT": functools.partial(run, method="fft"),
    }
    forward = {name: Candidate(form, layer, x_BTD) for name, form in forms.items()}
    forward["blocks, tables given"] = Candidate(lambda tables, x_BTD: layer(x_BTD, state, tables=tables), cema_tables(layer), x_BTD)
    gradient = {name: Candidate(with_gradient(form), layer, x_BTD) for name, form in forms.items() if name != "scan over tokens"}
    if peer := _peer("megalodon_jax.layers.complex_ema", "ComplexEMA"):
        theirs, x_BDT = peer(D, order, key=jax.random.key(0)), jnp.swapaxes(x_BTD, 1, 2)
        segment_ids_BT = jnp.cumsum(starts_BT, axis=1)
        plain = lambda theirs, x_BDT: theirs(x_BDT, return_state=True)[0]
        packed = lambda theirs, x_BDT: theirs(x_BDT, segment_ids=segment_ids_BT)[0]
        forward |= {"megalodon-jax": Candidate(plain, theirs, x_BDT), "megalodon-jax, documents": Candidate(packed, theirs, x_BDT)}
        gradient["megalodon-jax"] = Candidate(with_gradient(plain), theirs, x_BDT)
    limit = matmul_limit(size.rounds)
    block = cema_tables(layer).kernel_DC.shape[1]
    flops = (2 * block + 8 * order) * B * T * D
    per = {"ns/token/chan.": lambda seconds, _: f"{1e9 * seconds / (B * T * D):.1f}", **_temp(x_BTD.nbytes)}
    share = {"matmul limit": lambda seconds, candidate: f"{flops / seconds / limit:.0%}" if _is_block(forward, candidate) else ""}
    print(f"{machine()}\nB {B}, T {T}, D {D}, N {order}, blocks of {block}; batched matmul of 64: {limit / 1e9:.0f} GFLOP/s")
    interleave(forward, size.rounds)
    table("CEMA forward", forward, per | share)
    interleave(gradient, size.rounds)
    table("CEMA forward and gradient", gradient, per)


def _is_block(forward: dict[str, Candidate], candidate: Candidate) -> bool:
    return any(value is candidate and name.startswith("blocks") for name, value in forward.items())


def bench_timestep_norm(size: Size, groups: int = 32) -> None:
    """Timestep normalisation forward and with gradient, with and without documents; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    layer, x_BTD = TimestepNorm(D, groups), jax.random.normal(jax.random.key(0), (B, T, D))
    state, starts_BT = layer.init_state(B), (jnp.arange(T)[None] % 500 == 0).repeat(B, axis=0)
    run = lambda layer, x_BTD, **options: layer(x_BTD, state, **options)[0]
    forms = {"ours": run, "ours, documents of 500": functools.partial(run, starts_BT=starts_BT)}
    forward = {name: Candidate(form, layer, x_BTD) for name, form in forms.items()}
    gradient = {name: Candidate(with_gradient(form), layer, x_BTD) for name, form in forms.items()}
    if peer := _peer("megalodon_jax.layers.timestep_norm", "TimestepNorm"):
        theirs, segment_ids_BT = peer(D, groups), jnp.cumsum(starts_BT, axis=1)
        forward["megalodon-jax"] = Candidate(lambda x_BTD: theirs(x_BTD)[0], x_BTD)
        forward["megalodon-jax, documents"] = Candidate(lambda x_BTD: theirs(x_BTD, segment_ids=segment_ids_BT)[0], x_BTD)
        gradient["megalodon-jax"] = Candidate(with_gradient(lambda x_BTD: theirs(x_BTD)[0]), x_BTD)
    per = {"ns/token/chan.": lambda seconds, _: f"{1e9 * seconds / (B * T * D):.1f}", **_temp(x_BTD.nbytes)}
    print(f"{machine()}\nB {B}, T {T}, D {D}, {groups} groups")
    interleave(forward | {f"{name} gradient": value for name, value in gradient.items()}, size.rounds)
    table("Timestep normalisation forward", forward, per)
    table("Timestep normalisation forward and gradient", gradient, per)


def bench_megalodon(size: Size, new_tokens: int = 200) -> None:
    """A 4-layer model (chunk 256) forward, in training, in training with packed documents, and decoding; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    sizes = {"z": D // 4, "value": 2 * D, "ffn": 5 * D // 2}
    config = MegalodonConfig(
        vocab_size=256, dim=D, layers=4, z_dim=sizes["z"], value_dim=sizes["value"], feed_forward=sizes["ffn"], swiglu=False, remat=False
    )
    model = models.build(config, nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(0), (B, T + 1), 0, 256, jnp.int32)
    documents_BT = (jnp.arange(T)[None] // 500 + 1).repeat(B, axis=0)

    def loss(model, tokens_BT, documents_BT=None):
        hidden_BTD, _ = model.hidden(tokens_BT[:, :-1], model.init_state(B), documents_BT)
        return jnp.mean(token_losses(model, hidden_BTD, tokens_BT[:, 1:]))

    prompt_BT = tokens_BT[:, :100]
    decode = lambda: [row.tokens for row in generate(model, list(np.asarray(prompt_BT)), Generation(max_new_tokens=new_tokens))]
    tables = {
        "forward": {"ours": Candidate(lambda model, tokens_BT: model(tokens_BT[:, :-1], model.init_state(B))[0], model, tokens_BT)},
        "training: loss and gradient": {"ours": Candidate(jax.value_and_grad(loss), model, tokens_BT)},
        "training, documents of 500": {"ours": Candidate(jax.value_and_grad(loss), model, tokens_BT, documents_BT)},
        f"decoding {new_tokens} tokens, prompt of 100 included": {"ours": Candidate(decode, compiled=False)},
    }
    if peer := _peer("megalodon_jax", "MegalodonForCausalLM"):
        import equinox
        import megalodon_jax

        theirs = peer(
            megalodon_jax.MegalodonConfig(
                vocab_size=256,
                model_dim=D,
                num_layers=4,
                z_dim=sizes["z"],
                value_dim=sizes["value"],
                ffn_hidden_dim=sizes["ffn"],
                chunk_size=config.chunk,
                norm_num_groups=config.norm_groups,
            ),
            key=jax.random.key(0),
        )
        weights, rest = equinox.partition(theirs, equinox.is_inexact_array)

        def their_loss(weights, tokens_BT, documents_BT=None):
            # Their labels are shifted inside.
            return equinox.combine(weights, rest).compute_loss(tokens_BT[:, :-1], tokens_BT[:, :-1], segment_ids=documents_BT)

        forward, training, packed, decoding = tables.values()
        forward["megalodon-jax"] = Candidate(
            lambda weights, tokens_BT: equinox.combine(weights, rest)(tokens_BT[:, :-1])[0], weights, tokens_BT
        )
        training["megalodon-jax"] = Candidate(jax.value_and_grad(their_loss), weights, tokens_BT)
        packed["megalodon-jax"] = Candidate(jax.value_and_grad(their_loss), weights, tokens_BT, documents_BT)
        decoding["megalodon-jax"] = Candidate(
            lambda: megalodon_jax.generate(theirs, prompt_BT, new_tokens, temperature=0.0)[0], compiled=False
        )
    print(f"{machine()}\nB {B}, T {T}, D {D}, {parameter_count(model):,} parameters")
    for title, candidates in tables.items():
        interleave(candidates, size.rounds)
        tokens = B * (new_tokens if "decoding" in title else T)
        temp = {} if "decoding" in title else {"temp MiB": lambda _, candidate: f"{candidate.temp_bytes / 2**20:.0f}"}
        table(title, candidates, {"tokens/s": lambda seconds, _, tokens=tokens: f"{tokens / seconds:,.0f}"} | temp)


BENCHMARKS = {"cema": bench_cema, "timestep_norm": bench_timestep_norm, "megalodon": bench_megalodon}


def _temp(input_bytes: int) -> dict[str, Callable]:
    return {"temp / input": lambda _, candidate: f"{candidate.temp_bytes / input_bytes:.1f}"}


def _peer(module: str, name: str) -> Any:
    """A class of an optional package, or None where it is not installed."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        print(f"{module.split('.')[0]} is not installed: its lines are left out")
        return None
    return getattr(importlib.import_module(module), name)
