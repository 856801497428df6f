"""What beacons save: reading a prompt and going on token by token, beside full attention.

Measured on 2 CPU cores (jax 0.10.2, float32), --length 2048 --rounds 5, D 256, 2 layers, chunks of 128, medians. A prompt of 8,192
tokens: full attention 1,070 ms and 32.56 MiB of state, ratio 2 1,710 ms and 17.02, ratio 8 394 ms (0.37) and 4.63 (1/7.0), ratio 32 264
ms and 1.53; a token behind it 3.52, 5.54, 1.04 and 0.54 ms. At 2,048 tokens ratio 8 takes as long for the prompt as full attention does,
at 512 longer. With chunks of 256 the open chunk weighs more, and the state at ratio 8 is counted to 1/6.2.

Shape letters: B batch, T time.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext import models
from infinicontext.bench import Candidate, Size, interleave, machine, table
from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.streaming import Model, State, abstract_state_bytes, read
from infinicontext.models.transformer import TransformerConfig

HEADS = 4


def bench_beacon(size: Size, chunk: int = 128, ratios: tuple[int, ...] = (2, 8, 32)) -> None:
    """Models of 2 layers and 512 tokens, by length: a prompt, which beacons read in calls of one chunk and full attention in calls of four
    and in one; then the tokens of one chunk, of which the last completes it, one by one from a state with room for the prompt, whose shapes
    and not its contents decide how long they take."""
    if size.dim % (2 * HEADS):
        raise UserError(f"--dim is {size.dim}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    full = TransformerConfig(vocab_size=512, dim=size.dim, layers=2, heads=HEADS)
    forms = {"full attention": full} | {f"beacons, ratio {ratio}": BeaconConfig.of(full, chunk=chunk, ratios=(ratio,)) for ratio in ratios}
    built = {name: models.build(config, nnx.Rngs(0)) for name, config in forms.items()}
    print(f"{machine()}\nD {size.dim}, {full.layers} layers, {HEADS} heads, chunks of {chunk}")
    for T in sorted({max(size.length // 4, 1), size.length, 4 * size.length}):
        tokens_BT = jax.random.randint(jax.random.key(0), (size.batch, T + chunk), 0, full.vocab_size)
        prompt_BT, rest_BT = tokens_BT[:, :T], tokens_BT[:, T:]
        ways = {"full attention": ("full attention", 4 * chunk), "full attention, one call": ("full attention", T)}
        ways |= {name: (name, chunk) for name in forms if name not in ways}
        reading = lambda segment, T=T: functools.partial(prefill, segment=segment, capacity=T + chunk)
        prompts = {way: Candidate(reading(segment), built[name], prompt_BT) for way, (name, segment) in ways.items()}
        interleave(prompts, size.rounds)
        kept = {id(prompts[way]): abstract_state_bytes(models.abstract(forms[name]), T + chunk) for way, (name, _) in ways.items()}
        columns = {
            "tokens/s": lambda seconds, _, tokens=size.batch * T: f"{tokens / seconds:,.0f}",
            "state MiB": lambda _, candidate, kept=kept: f"{kept[id(candidate)] / 2**20:.2f}",
        }
        table(f"prompt, {size.batch} x {T:,} tokens", prompts, columns)
        states = {name: model.init_state(size.batch, capacity=T + chunk) for name, model in built.items()}
        steps = {name: Candidate(go_on, model, states[name], rest_BT) for name, model in built.items()}
        interleave(steps, size.rounds)
        columns = {"ms per token": lambda seconds, _: f"{1e3 * seconds / chunk:.2f}"}
        table(f"{chunk} tokens behind it, one by one", steps, columns)


def prefill(model: Model, prompt_BT: jax.Array, *, segment: int, capacity: int) -> State:
    """The state after a prompt, read in calls of so many tokens."""
    return read(model, prompt_BT, model.init_state(len(prompt_BT), capacity=capacity), segment=segment)[1]


def go_on(model: Model, state: State, rest_BT: jax.Array) -> tuple[State, jax.Array]:
    """Reads the rest token by token, with the logits that sampling would need."""

    def step(state, token_B):
        logits_B1V, state = model(token_B[:, None], state)
        return state, jnp.argmax(logits_B1V, axis=-1)

    return jax.lax.scan(step, state, rest_BT.T)
