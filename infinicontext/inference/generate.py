"""Generation with any model, through the stream protocol alone: read the prompts in chunks, then decode in one compiled loop.

Shape letters: B rows, T time, C prompt tokens per call, N new tokens at most, D channels, V vocabulary, J stop sequences, S tokens of the
longest of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.errors import UserError
from infinicontext.models.streaming import Model

NOT_FINITE = "the model's logits are not finite; its weights are damaged, or were not trained at this dtype"
RopePolicy = Literal["planned", "hf", "short", "long"]
_ANY = -2  # in a stop sequence: matches every token
_NOTHING = -1  # in the output: no token


@dataclasses.dataclass(frozen=True)
class Generation:
    """How tokens are chosen and when to stop."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float = 1.0  # of these, only the likeliest that together reach probability p
    seed: int = 0  # row r at step t draws from (seed, r, t), however the work is cut into bursts
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end a row
    # Which factors of LongRoPE a row turns by. planned: long if prompt and new tokens exceed the original length, for the whole row; hf: as
    # transformers does, short for the batch until its longest row passes the original length, then everything is read again with the long
    # ones; short, long: always these.
    rope_policy: RopePolicy = "planned"
    segment: int = 512  # prompt tokens per call

    def __post_init__(self):
        for name in ("max_new_tokens", "segment"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 1 to 1,000,000,000")
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number from 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be more than 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not all(ids and min(ids) >= 0 for ids in self.stop):
            raise UserError(f"stop is {self.stop}; each sequence must hold one token id or more, all 0 or more")


class Completion(NamedTuple):
    """What a row was given."""

    tokens: np.ndarray  # int32, without the stop sequence
    finish: Literal["stop", "length"]


def generate(model: Model, prompts: Sequence[Sequence[int]], options: Generation = Generation(), **how) -> list[Completion]:
    """Continues each prompt; rows do not depend on one another, except under rope_policy hf.

    Args:
      model: any model.
      prompts: token ids of each row.
      options: how tokens are chosen.
      how: `first_row` and `read` of `stream`.

    Raises:
      UserError: as `stream`.
    """
    bursts = zip(*stream(model, prompts, options, burst=options.max_new_tokens, **how))
    return [Completion(np.concatenate([part.tokens for part in parts]), parts[-1].finish) for parts in bursts]


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: Generation = Generation(),
    *,
    burst: int = 16,
    first_row: int = 0,
    read: Callable[..., Any] | None = None,
) -> Iterator[list[Completion]]:
    """Yields what each row gained, `burst` steps at a time, until all rows have stopped.

    The whole of a burst is one compiled loop. Programs are compiled for the number of rows and for lengths rounded up. What may become a
    stop sequence is held back. `first_row` is the number of the first prompt, where a long list is worked off in batches: random numbers
    go by it. `read` replaces `read_prompts`, for prompts that are to be read in another way (inference/norm_refresh.py) or behind
    something else (inference/memory.py).

    Raises:
      UserError: no prompts, an empty one, ids outside the vocabulary, a rope_policy that means nothing for this model, or logits that are
        not finite.
    """
    prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    vocab = model.config.vocab_size
    if not prompts or min(map(len, prompts)) == 0:
        raise UserError("there is no prompt, or an empty one; each must have one token or more")
    outside = [int(i) for prompt in prompts for i in (prompt.min(), prompt.max()) if not 0 <= i < vocab]
    if outside:
        raise UserError(f"a prompt holds the token id {outside[0]}; this model's ids are from 0 to {vocab - 1}")
    S, B, total = max(map(len, options.stop), default=1), len(prompts), options.max_new_tokens
    stop_JS = np.array([[_ANY] * (S - len(ids)) + list(ids) for ids in options.stop], np.int32).reshape(-1, S)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    key = jax.random.key(options.seed)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(B, dtype=jnp.int32))
    sampling = _Sampling(keys_B, jnp.float32(options.temperature), jnp.float32(options.top_p))
    how = {"greedy": options.temperature == 0, "top_k": options.top_k, "nucleus": options.top_p < 1}
    carry = _Decoding(
        step=jnp.int32(0),
        token_B=jnp.asarray([prompt[-1] for prompt in prompts]),
        state=None,
        done_B=jnp.zeros(B, bool),
        out_BN=jnp.full((B, S + _rounded(total)), _NOTHING, jnp.int32),
        finite=jnp.bool(True),
    )
    step, rows, sent_B = 0, [np.zeros(0, np.int32)] * B, np.zeros(B, np.int32)
    for until, planned_B in _phases(model, lengths_B, options):
        if carry.state is not None and np.asarray(carry.done_B).all():
            return
        texts = [np.concatenate([prompt, row])[:-1] for prompt, row in zip(prompts, rows)]
        carry = carry._replace(state=(read or read_prompts)(model, texts, int(lengths_B.max()) + total, planned_B, options.segment))
        while step < until and not np.asarray(carry.done_B).all():
            carry = _decode(model, carry, jnp.int32(min(step + burst, until)), sampling, stop_JS, **how)
            if not carry.finite:
                raise UserError(NOT_FINITE)
            step, done_B, out_BN = int(carry.step), np.asarray(carry.done_B), np.asarray(carry.out_BN)
            rows = [row[S : S + step][row[S : S + step] != _NOTHING] for row in out_BN]
            last = step == total or done_B.all()
            ends = [len(row) - (_stop_length(row, options.stop) if done else 0 if last else S - 1) for row, done in zip(rows, done_B)]
            yield [
                Completion(row[sent:end], "stop" if done else "length") for row, sent, end, done in zip(rows, sent_B, ends, done_B.tolist())
            ]
            sent_B = np.maximum(sent_B, ends)


def _stop_length(row: np.ndarray, stop: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest stop sequence that ends a row."""
    return max(len(ids) for ids in stop if len(ids) <= len(row) and tuple(row[-len(ids) :]) == tuple(ids))


def _phases(model: Model, lengths_B: np.ndarray, options: Generation) -> list[tuple[int, np.ndarray]]:
    """Stretches of decoding, each from a state read anew: (the step it ends at, the length planned for each row)."""
    rope, total = getattr(model.config, "rope", None), options.max_new_tokens
    if options.rope_policy == "planned" or rope is None or rope.scheme not in ("longrope", "dynamic"):
        return [(total, lengths_B + total)]
    if rope.scheme == "dynamic":
        raise UserError(f"rope_policy is {options.rope_policy}, which chooses between the factors of longrope; with dynamic use planned")
    original, longest = rope.original_length, int(lengths_B.max())
    short_B, long_B = np.full_like(lengths_B, original), np.full_like(lengths_B, np.iinfo(np.int32).max)
    # The forward pass of step t reads the longest row's token at position longest - 1 + t.
    crossing = original - longest + 1
    if options.rope_policy == "long" or (options.rope_policy == "hf" and crossing <= 0):
        return [(total, long_B)]
    if options.rope_policy == "short" or crossing >= total:
        return [(total, short_B)]
    return [(crossing, short_B), (total, long_B)]


def _rounded(length: int) -> int:
    """Up to a multiple of 64: few different shapes, so few compilations."""
    return -(-length // 64) * 64


def read_prompts(model: Model, rows: list[np.ndarray], length: int, planned_B: np.ndarray, segment: int) -> Any:
    """The state after rows of unequal length, with room for `length` tokens each."""
    return read_on(model, rows, _empty(model, planned_B, _rounded(length)), segment)


def read_on(model: Model, rows: list[np.ndarray], state: Any, segment: int) -> Any:
    """The state after more tokens in each row, perhaps none; `state` is donated."""
    longest = max(map(len, rows))
    segment = min(segment, max(_rounded(longest), 1))
    for start in range(0, longest, segment):
        tokens_BC, present_BC = np.zeros((2, len(rows), segment), np.int32)
        for row, (tokens, present) in zip(rows, zip(tokens_BC, present_BC)):
            part = row[start : start + segment]
            tokens[: len(part)], present[: len(part)] = part, 1
        state = _read_chunk(model, tokens_BC, present_BC, state)
    return state


@functools.partial(jax.jit, static_argnames="capacity")
def _empty(model: Model, planned_B: jax.Array, capacity: int) -> Any:
    # Compiled, so that no two arrays of the state share a buffer, which could not be donated twice.
    return model.init_state(planned_B.shape[0], capacity=capacity, planned=planned_B)


@functools.partial(jax.jit, donate_argnames="state")
def _read_chunk(model: Model, tokens_BC: jax.Array, present_BC: jax.Array, state: Any) -> Any:
    return model.hidden(tokens_BC, state, present_BC)[1]


class _Decoding(NamedTuple):
    step: jax.Array  # int32, tokens decoded per row
    token_B: jax.Array  # int32, the last token, not read yet
    state: Any
    done_B: jax.Array  # bool
    out_BN: jax.Array  # int32, S columns of nothing, then what was decoded
    finite: jax.Array  # bool, whether all logits were


class _Sampling(NamedTuple):
    key_B: jax.Array
    temperature: jax.Array
    top_p: jax.Array


@functools.partial(jax.jit, static_argnames=("greedy", "top_k", "nucleus"), donate_argnames="carry")
def _decode(
    model: Model,
    carry: _Decoding,
    until: jax.Array,
    sampling: _Sampling,
    stop_JS: jax.Array,
    greedy: bool,
    top_k: int | None,
    nucleus: bool,
) -> _Decoding:
    """Decodes up to step `until`, or until every row has stopped."""
    S = stop_JS.shape[1]

    def one(carry: _Decoding) -> _Decoding:
        step, token_B, state, done_B, out_BN, finite = carry
        # A row that has stopped reads padding: its state stays as it is.
        hidden_B1D, state = model.hidden(token_B[:, None], state, (~done_B).astype(jnp.int32)[:, None])
        logits_BV = model.logits(hidden_B1D)[:, 0]
        if greedy:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        else:
            top_p = sampling.top_p if nucleus else None
            draw = lambda key, logits_V: sample(jax.random.fold_in(key, step), logits_V, sampling.temperature, top_k, top_p)
            token_B = jax.vmap(draw)(sampling.key_B, logits_BV)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, jnp.where(done_B, _NOTHING, token_B)[:, None], S + step, axis=1)
        recent_B1S = jax.lax.dynamic_slice_in_dim(out_BN, step + 1, S, axis=1)[:, None]
        stopped_B = jnp.any(jnp.all((recent_B1S == stop_JS[None]) | (stop_JS[None] == _ANY), axis=2), axis=1)
        finite &= jnp.all(jnp.isfinite(logits_BV) | done_B[:, None])
        return _Decoding(step + 1, token_B, state, done_B | stopped_B, out_BN, finite)

    return jax.lax.while_loop(lambda carry: (carry.step < until) & ~jnp.all(carry.done_B), one, carry)


def sample(key: jax.Array, logits_V: jax.Array, temperature: jax.Array, top_k: int | None, top_p: jax.Array | None) -> jax.Array:
    """Draws one token: temperature, then the top_k likeliest, then the fewest of these that reach top_p of their probability.

    Args:
      key: for this draw alone.
      logits_V: float32 or wider.
      temperature: a scalar greater than 0.
      top_k: static; None for all.
      top_p: a scalar; None for no limit, which saves a sort.

    Returns:
      int32 scalar.
    """
    logits_V = logits_V / temperature.astype(logits_V.dtype)
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits_V).astype(jnp.int32)
    logits_K, token_K = jax.lax.top_k(logits_V, min(top_k or logits_V.size, logits_V.size))
    if top_p is not None:
        probability_K = jax.nn.softmax(logits_K)
        before_K = jnp.cumsum(probability_K) - probability_K
        logits_K = jnp.where(before_K < top_p.astype(logits_K.dtype), logits_K, -jnp.inf)
    return token_K[jax.random.categorical(key, logits_K)].astype(jnp.int32)
