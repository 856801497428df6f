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
from infinicontext.training.metrics import peak_flops


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


LONGEST_SCAN = 8192  # tokens; gradients through longer scans over tokens are left out, because each round would take minutes
GROUPS = 32  # of the timestep norms


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


def copy_seconds(x: jax.Array, rounds: int) -> float:
    """Seconds to read an array and write one of its size."""
    candidate = Candidate(lambda x: x + 1, x)
    interleave({"": candidate}, rounds)
    return statistics.median(candidate.seconds)


def require_groups(size: Size) -> None:
    """Raises UserError where `GROUPS` groups do not have two channels or more each."""
    if size.dim % GROUPS or size.dim == GROUPS:
        raise UserError(f"--dim is {size.dim}; here it must be a multiple of {GROUPS}, {2 * GROUPS} or more")


def with_gradient(function: Callable) -> Callable:
    """The sum of squares of what a function returns, with gradients for all its arguments."""
    loss = lambda *arguments: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(function(*arguments)))
    return lambda *arguments: jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def bench_cema(size: Size, order: int = 16) -> None:
    """CEMA forward and with gradient: blocks, the scan over tokens, the FFT; blocks with documents; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    if D < 2:
        raise UserError(f"--dim is {D}; it must be 2 or more")
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
    gradient = {name: Candidate(with_gradient(form), layer, x_BTD) for name, form in forms.items() if _is_short(name, T)}
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
    per = _per_channel(B * T * D) | _temp(x_BTD.nbytes)
    # A gradient is two products for each one forward.
    in_blocks = [value for candidates in (forward, gradient) for name, value in candidates.items() if name.startswith("blocks")]
    share = lambda flops: {"matmul limit": lambda seconds, it: f"{flops / seconds / limit:.0%}" if it in in_blocks else ""}
    print(f"{machine()}\nB {B}, T {T}, D {D}, N {order}, blocks of {block}; batched matmul of 64: {limit / 1e9:.0f} GFLOP/s")
    interleave(forward, size.rounds)
    table("CEMA forward", forward, per | share(flops))
    interleave(gradient, size.rounds)
    table("CEMA forward and gradient", gradient, per | share(3 * flops))


def _is_short(name: str, length: int) -> bool:
    """Whether the gradient of a form is measured; says so where it is not."""
    if name != "scan over tokens" or length <= LONGEST_SCAN:
        return True
    print(f"the gradient of the scan over tokens is left out above {LONGEST_SCAN} tokens")
    return False


def normalise_by_scan(layer: TimestepNorm, x_BTD: jax.Array) -> jax.Array:
    """Timestep normalisation by its definition, token by token from an empty state, without the prior."""
    (B, T, D), G = x_BTD.shape, layer.groups

    def step(before, xs):
        (mean_BG, variance_BG), (count, x_BD) = before, xs
        x_BGF = x_BD.reshape(B, G, D // G)
        apart_BG = jnp.mean(x_BGF, axis=-1) - mean_BG
        mean_BG += apart_BG / count
        variance_BG += (jnp.var(x_BGF, axis=-1) - variance_BG + (1 - 1 / count) * jnp.square(apart_BG)) / count
        y_BGF = (x_BGF - mean_BG[..., None]) * jax.lax.rsqrt(variance_BG + layer.epsilon)[..., None]
        return (mean_BG, variance_BG), y_BGF.reshape(B, D) * (layer.weight[...] + 1)[None] + layer.bias[...][None]

    zeros_BG = jnp.zeros((B, G), x_BTD.dtype)
    _, y_TBD = jax.lax.scan(step, (zeros_BG, zeros_BG), (jnp.arange(1, T + 1, dtype=x_BTD.dtype), jnp.moveaxis(x_BTD, 1, 0)))
    return jnp.moveaxis(y_TBD, 0, 1)


def bench_timestep_norm(size: Size, groups: int = GROUPS) -> None:
    """Timestep normalisation forward and with gradient, with and without documents; the scan over tokens; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    require_groups(size)
    layer, x_BTD = TimestepNorm(D, groups), jax.random.normal(jax.random.key(0), (B, T, D))
    state, starts_BT = layer.init_state(B), (jnp.arange(T)[None] % 500 == 0).repeat(B, axis=0)
    run = lambda layer, x_BTD, **options: layer(x_BTD, state, **options)[0]
    forms = {"ours": run, "ours, documents of 500": functools.partial(run, starts_BT=starts_BT), "scan over tokens": normalise_by_scan}
    forward = {name: Candidate(form, layer, x_BTD) for name, form in forms.items()}
    gradient = {name: Candidate(with_gradient(form), layer, x_BTD) for name, form in forms.items() if _is_short(name, T)}
    if peer := _peer("megalodon_jax.layers.timestep_norm", "TimestepNorm"):
        theirs, segment_ids_BT = peer(D, groups), jnp.cumsum(starts_BT, axis=1)
        forward["megalodon-jax"] = Candidate(lambda x_BTD: theirs(x_BTD)[0], x_BTD)
        forward["megalodon-jax, documents"] = Candidate(lambda x_BTD: theirs(x_BTD, segment_ids=segment_ids_BT)[0], x_BTD)
        gradient["megalodon-jax"] = Candidate(with_gradient(lambda x_BTD: theirs(x_BTD)[0]), x_BTD)
    limit = copy_seconds(x_BTD, size.rounds)
    per = _per_channel(B * T * D) | _temp(x_BTD.nbytes)
    share = lambda copies: {"copy limit": lambda seconds, _: f"{copies * limit / seconds:.0%}"}
    print(f"{machine()}\nB {B}, T {T}, D {D}, {groups} groups; reading x and writing as much: {1e3 * limit:.2f} ms, with gradient twice")
    interleave(forward | {f"{name} gradient": value for name, value in gradient.items()}, size.rounds)
    table("Timestep normalisation forward", forward, per | share(1))
    table("Timestep normalisation forward and gradient", gradient, per | share(2))


def bench_megalodon(size: Size, new_tokens: int = 200) -> None:
    """A 4-layer model (chunk 256) forward, in training, in training with packed documents, and decoding; megalodon-jax."""
    B, T, D = size.batch, size.length, size.dim
    require_groups(size)
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
    limit = peak_flops()
    matmul = f"large matmul: {limit / 1e9:,.0f} GFLOP/s"
    print(f"{machine()}\nB {B}, T {T}, D {D}, {config.layers} layers, {parameter_count(model):,} parameters; {matmul}")
    for title, candidates in tables.items():
        interleave(candidates, size.rounds)
        decoding = "decoding" in title
        tokens, length = B * (new_tokens if decoding else T), prompt_BT.shape[1] + new_tokens if decoding else T
        # A gradient is two products for each one forward.
        flops = config.flops_per_token(length) * tokens * (3 if "training" in title else 1)
        speed = {"tokens/s": lambda seconds, _, tokens=tokens: f"{tokens / seconds:,.0f}"} | _per_channel(tokens * D)
        share = {"matmul limit": lambda seconds, _, flops=flops: f"{flops / seconds / limit:.0%}"}
        temp = {} if decoding else {"temp MiB": lambda _, candidate: f"{candidate.temp_bytes / 2**20:.0f}"}
        table(title, candidates, speed | share | temp)


BENCHMARKS = {"cema": bench_cema, "timestep_norm": bench_timestep_norm, "megalodon": bench_megalodon}


def _per_channel(count: int) -> dict[str, Callable]:
    return {"ns/token/chan.": lambda seconds, _: f"{1e9 * seconds / count:.1f}"}


def _temp(input_bytes: int) -> dict[str, Callable]:
    return {"temp / input": lambda _, candidate: f"{candidate.temp_bytes / input_bytes:.1f}"}


def _peer(module: str, name: str) -> Any:
    """A class of an optional package, or None where it is not installed."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        print(f"{module.split('.')[0]} is not installed: its lines are left out")
        return None
    return getattr(importlib.import_module(module), name)
