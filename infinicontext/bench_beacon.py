"""What beacons save: reading a prompt and going on token by token, beside full attention.

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
TOKENS = 16  # read one by one


def bench_beacon(size: Size, chunk: int = 128, ratios: tuple[int, ...] = (2, 8, 32)) -> None:
    """Models of 2 layers and 512 tokens, by length: a prompt in calls of one chunk; then tokens one by one, from a state with room for the
    prompt, whose shapes and not its contents decide how long they take."""
    if size.dim % (2 * HEADS):
        raise UserError(f"--dim is {size.dim}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    full = TransformerConfig(vocab_size=512, dim=size.dim, layers=2, heads=HEADS)
    forms = {"full attention": full} | {f"beacons, ratio {ratio}": BeaconConfig.of(full, chunk=chunk, ratios=(ratio,)) for ratio in ratios}
    built = {name: models.build(config, nnx.Rngs(0)) for name, config in forms.items()}
    print(f"{machine()}\nD {size.dim}, {full.layers} layers, {HEADS} heads, chunks of {chunk}")
    for T in sorted({max(size.length // 4, 1), size.length, 4 * size.length}):
        tokens_BT = jax.random.randint(jax.random.key(0), (size.batch, T + TOKENS), 0, full.vocab_size)
        prompt_BT, rest_BT = tokens_BT[:, :T], tokens_BT[:, T:]
        prompts = {name: Candidate(functools.partial(prefill, chunk=chunk), model, prompt_BT) for name, model in built.items()}
        interleave(prompts, size.rounds)
        kept = {id(prompts[name]): abstract_state_bytes(models.abstract(config), T + TOKENS) for name, config in forms.items()}
        columns = {
            "tokens/s": lambda seconds, _, tokens=size.batch * T: f"{tokens / seconds:,.0f}",
            "state MiB": lambda _, candidate, kept=kept: f"{kept[id(candidate)] / 2**20:.2f}",
        }
        table(f"prompt, {size.batch} x {T:,} tokens", prompts, columns)
        states = {name: model.init_state(size.batch, capacity=T + TOKENS) for name, model in built.items()}
        steps = {name: Candidate(go_on, model, states[name], rest_BT) for name, model in built.items()}
        interleave(steps, size.rounds)
        columns = {"ms per token": lambda seconds, _: f"{1e3 * seconds / TOKENS:.2f}"}
        table(f"{TOKENS} tokens behind it", steps, columns)


def prefill(model: Model, prompt_BT: jax.Array, *, chunk: int) -> State:
    """The state after a prompt."""
    return read(model, prompt_BT, model.init_state(len(prompt_BT), capacity=prompt_BT.shape[1] + TOKENS), segment=chunk)[1]


def go_on(model: Model, state: State, rest_BT: jax.Array) -> tuple[State, jax.Array]:
    """Reads the rest token by token, with the logits that sampling would need."""

    def step(state, token_B):
        logits_B1V, state = model(token_B[:, None], state)
        return state, jnp.argmax(logits_B1V, axis=-1)

    return jax.lax.scan(step, state, rest_BT.T)
