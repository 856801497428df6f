"""The Llama-style Transformer: the baseline every other architecture is compared with.

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, F feed-forward size, L layers, S cache slots,
V vocabulary, R rotated pairs.

Llama, Mistral, Qwen2, Qwen3 and Phi-3 differ from one another only in fields of the config. A window (sliding or block-sliding) turns the
same weights into a model that reads without an end from a state of constant size.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args, get_type_hints

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.streaming import require_room
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, use
from infinicontext.nn.rope import RopeConfig, Stretch, apply_rope, rope_table, rotation
from infinicontext.sharding import constrain


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and options of a Transformer."""

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim // heads
    feed_forward: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    attention: Literal["full", "window", "block_window"] = "full"
    window: int = 256  # attention = window: keys each token sees, itself included
    block: int = 64  # attention = block_window: tokens per block
    memory_blocks: int = 3  # attention = block_window: earlier blocks each token sees
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    attention_bias: bool = False  # biases of the q, k and v projections (Qwen2)
    output_bias: bool = False  # bias of the attention's output projection
    feed_forward_bias: bool = False  # biases of the three feed-forward projections
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation (Qwen3)
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of activations and caches; parameters are float32
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations

    def __post_init__(self):
        for name in ("attention", "dtype"):
            allowed = get_args(get_type_hints(TransformerConfig)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        for name in ("vocab_size", "dim", "layers", "heads", "window", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("kv_heads", "head_dim", "feed_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.memory_blocks < 0:
            raise UserError(f"model.memory_blocks is {self.memory_blocks}; it must be 0 or more")
        if self.head_dim is None and self.dim % self.heads:
            raise UserError(
                f"model.dim is {self.dim}, which is not a multiple of model.heads, {self.heads}; set model.head_dim or change one of them"
            )
        if self.heads % self.kv_head_count:
            raise UserError(f"model.heads is {self.heads}, which is not a multiple of model.kv_heads, {self.kv_heads}")
        rope_table(self.rope, self.head_size)

    @property
    def head_size(self) -> int:
        """K."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def kv_head_count(self) -> int:
        """G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def feed_forward_size(self) -> int:
        """F."""
        return -(-8 * self.dim // 96) * 32 if self.feed_forward is None else self.feed_forward

    @property
    def span(self) -> int | None:
        """Slots of the ring a windowed model keeps; None for full attention, whose state grows with what it reads."""
        return {"full": None, "window": self.window, "block_window": (self.memory_blocks + 1) * self.block}[self.attention]

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, averaged over a sequence of `length`; multiply and add count as two."""
        seen = (length + 1) / 2
        if self.attention == "window":
            seen = min(seen, self.window)
        elif self.attention == "block_window":
            seen = min(seen, self.memory_blocks * self.block + (self.block + 1) / 2)
        projections = self.dim * self.head_size * 2 * (self.heads + self.kv_head_count)
        per_layer = projections + 3 * self.dim * self.feed_forward_size + 2 * self.heads * self.head_size * seen
        return 2 * (self.layers * per_layer + self.dim * self.vocab_size)

    @staticmethod
    def examples() -> dict[str, "TransformerConfig"]:
        """Tiny models that together use every option: what the tests run."""
        tiny = TransformerConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24)
        return {
            "full": tiny,
            "full_qwen": dataclasses.replace(
                tiny,
                attention_bias=True,
                output_bias=True,
                feed_forward_bias=True,
                qk_norm=True,
                tied_embeddings=True,
                head_dim=6,
                rope=RopeConfig("longrope", original_length=16, length=64, long_factors=(1.0, 2.0, 5.0)),
            ),
            "window": dataclasses.replace(
                tiny, attention="window", window=5, kv_heads=1, rope=RopeConfig("dynamic", factor=2.0, original_length=16)
            ),
            "window_yarn": dataclasses.replace(
                tiny, attention="window", window=8, kv_heads=4, rope=RopeConfig("yarn", factor=4.0, original_length=16), remat=False
            ),
            "block_window": dataclasses.replace(tiny, attention="block_window", block=4, memory_blocks=1),
        }


class TransformerState(NamedTuple):
    """Everything the model remembers.

    Full attention: 2 L G K values and 8 bytes per token of the capacity. Windows: the same per slot of a ring of constant size.
    """

    cursor: Cursor
    slots: Slots
    cache: Cache  # k and v [L, B, S, G, K]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, H, G, K = config.dim, config.heads, config.kv_head_count, config.head_size
        self.config = config
        self.q = normal(rngs(), (D, H, K), ("embed", "heads", None), D**-0.5)
        self.k = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5)
        self.v = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5)
        self.o = normal(rngs(), (H, K, D), ("heads", None, "embed"), (2 * config.layers * H * K) ** -0.5)
        if config.attention_bias:
            self.q_bias = constant(0, (H, K), ("heads", None))
            self.k_bias = constant(0, (G, K), ("kv_heads", None))
            self.v_bias = constant(0, (G, K), ("kv_heads", None))
        if config.output_bias:
            self.o_bias = constant(0, (D,), ("embed",))
        if config.qk_norm:
            self.q_norm = RMSNorm(K, epsilon=config.norm_epsilon, axis=None)
            self.k_norm = RMSNorm(K, epsilon=config.norm_epsilon, axis=None)

    def __call__(
        self, x_BTD: jax.Array, cache: Cache, old: Slots, now: Slots, slot_BT: jax.Array, place: Place, rotation
    ) -> tuple[jax.Array, Cache]:
        """Reads T tokens -> what they add to x, their keys and values.

        `old` and `now` say what the cache's slots hold before and after the call, slot_BT where its tokens go.
        """
        config, dtype = self.config, x_BTD.dtype
        q_BTHK, k_BTGK, v_BTGK = (jnp.einsum("btd,dhk->bthk", x_BTD, use(w, dtype)) for w in (self.q, self.k, self.v))
        if config.attention_bias:
            q_BTHK += use(self.q_bias, dtype)[None, None]
            k_BTGK += use(self.k_bias, dtype)[None, None]
            v_BTGK += use(self.v_bias, dtype)[None, None]
        if config.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK, k_BTGK = apply_rope(q_BTHK, *rotation), apply_rope(k_BTGK, *rotation)

        reach = _reach(config)
        if x_BTD.shape[1] == 1:
            # In a ring its token overwrites a key that has just left the window.
            seen_B1S = attention.visible(place.position_BT, place.document_BT, old, reach)
            o_BTHK = attention.attend_one(q_BTHK, k_BTGK, v_BTGK, cache, seen_B1S)
        elif config.attention == "full":
            after = Cache(*(attention.write(held, new, slot_BT) for held, new in zip(cache, (k_BTGK, v_BTGK))))
            o_BTHK = attention.full_attention(q_BTHK, after, place, now)
        else:
            o_BTHK = attention.window_attention(q_BTHK, k_BTGK, v_BTGK, place, cache, old, reach)

        o_BTD = jnp.einsum("bthk,hkd->btd", o_BTHK, use(self.o, dtype))
        o_BTD = o_BTD + use(self.o_bias, dtype)[None, None] if config.output_bias else o_BTD
        return o_BTD, Cache(k_BTGK, v_BTGK)


def _reach(config: TransformerConfig) -> attention.Reach:
    if config.attention == "full":
        return attention.everything()
    if config.attention == "window":
        return attention.sliding(config.window)
    return attention.block_sliding(config.block, config.memory_blocks)


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.feed_forward = SwiGLU(
            config.dim, config.feed_forward_size, config.dtype, (2 * config.layers) ** -0.5, rngs, bias=config.feed_forward_bias
        )

    def __call__(self, x_BTD: jax.Array, cache: Cache, *where) -> tuple[jax.Array, Cache]:
        """x_BTD, the layer's cache before the call -> x_BTD, the call's keys and values."""
        y_BTD, new = self.attention(self.attention_norm(x_BTD), cache, *where)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return constrain(x_BTD, ("batch", "context", None)), new


class Transformer(nnx.Module):
    """A decoder-only Transformer that reads a stream (models/streaming.py has the protocol)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, tied=config.tied_embeddings, dtype=config.dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> TransformerState:
        """The state before the first token.

        Args:
          batch_size: rows, B.
          capacity: tokens that will be read in all; needed by full attention only, whose cache is allocated here once.
          planned: tokens that each row will have read in the end, a number or int32 [B], which decides the table of `dynamic` and
            `longrope` (nn/rope.py). None: the capacity or, without that, what the config plans for.

        Raises:
          UserError: full attention without a capacity.
        """
        config = self.config
        if config.span is None and (capacity is None or capacity < 1):
            raise UserError(f"init_state: capacity is {capacity}; full attention needs the number of tokens it is to read, 1 or more")
        count = config.span or capacity
        shape = (config.layers, batch_size, count, config.kv_head_count, config.head_size)
        return TransformerState(
            cursor.start(batch_size, (capacity or config.rope.planned) if planned is None else planned),
            attention.empty_slots(batch_size, count),
            Cache(*(constrain(jnp.zeros(shape, config.dtype), (None, "batch", None, "kv_heads", None)) for _ in range(2))),
        )

    def room(self, state: TransformerState) -> jax.Array | None:
        """How many more tokens fit in each row, int32 [B]; None for windows."""
        return None if self.config.span else state.slots.position_BS.shape[1] - state.cursor.count_B

    def hidden(
        self, tokens_BT: jax.Array, state: TransformerState, segment_ids_BT: jax.Array | None = None, *, stretch: Stretch | None = None
    ) -> tuple[jax.Array, TransformerState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document.
          stretch: a rotary table in place of the config's, which may be traced.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token. Where full attention runs out of
          capacity inside compiled code, which cannot raise, hidden_BTD is NaN from the first token that does not fit.

        Raises:
          UserError: the tokens do not fit (outside jit).
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, T = self.config, tokens_BT.shape[1]
        if T == 0:
            return jnp.zeros((*tokens_BT.shape, config.dim), config.dtype), state
        require_room(self.room(state), T if segment_ids_BT is None else jnp.sum(segment_ids_BT > 0, axis=1))
        place, next_cursor = cursor.advance(state.cursor, T, segment_ids_BT)
        count = state.slots.position_BS.shape[1]
        slot_BT = attention.slot_index(place, count, ring=config.span is not None)
        now = Slots(
            attention.write(state.slots.position_BS, place.position_BT, slot_BT),
            attention.write(state.slots.document_BS, place.document_BT, slot_BT),
        )
        wide = at_least_float32(config.dtype)
        rotation_BTR = rotation(config.rope, config.head_size, place.position_BT, next_cursor.planned_B, wide, stretch)

        def layer(x_BTD, block_and_cache):
            block, cache = block_and_cache
            return block(x_BTD, cache, state.slots, now, slot_BT, place, rotation_BTR)

        layer = jax.checkpoint(layer) if config.remat else layer
        x_BTD, new = jax.lax.scan(layer, self.embedding(tokens_BT), (self.blocks, state.cache))
        cache = attention.write_layers(state.cache, new, slot_BT)
        hidden_BTD = self.norm(x_BTD)
        if config.span is None:
            hidden_BTD = jnp.where((place.index_BT < count)[..., None], hidden_BTD, jnp.nan)
        return hidden_BTD, TransformerState(next_cursor, now, cache)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(
        self, tokens_BT: jax.Array, state: TransformerState, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, TransformerState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state
