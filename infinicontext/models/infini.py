"""Infini-attention: a Llama-style Transformer that attends within segments and remembers all before them in a matrix per head (Munkhdalai,
Faruqui and Gopal 2024, arXiv 2404.07143 v2).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, F feed-forward size, L layers, N segments that a
call touches, C tokens per segment, S cache slots, M slots written by a call, V vocabulary.

Nothing is added to the Transformer but a memory and a gate for each head (models/infini_attention.py).
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.models.infini_attention import Call, InfiniConfig, begin_call, infini_attention
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.compressive_memory import Memory, Owner, empty_memory, no_owner
from infinicontext.nn.cursor import Cursor
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, use
from infinicontext.sharding import constrain


class InfiniState(NamedTuple):
    """Everything the model remembers, of constant size.

    A row has, per layer, 2 S G K values of the open segment (S = segment, or twice that with the previous one) and 8 G K (K + 1) bytes of
    memory, half of them for what the open segment will add; and once 8 S + 28 bytes.
    """

    cursor: Cursor
    slots: Slots  # position: number of the token in its row, over all documents; token i lies in slot i % S
    owner: Owner
    cache: Cache  # k, rotated, and v [L, B, S, G, K]
    memory: Memory  # with a leading layer axis


class Attention(nnx.Module):
    """Infini-attention with its projections."""

    def __init__(self, config: InfiniConfig, rngs: nnx.Rngs):
        D, H, G, K = config.dim, config.heads, config.kv_head_count, config.head_size
        self.config = config
        self.q = normal(rngs(), (D, H, K), ("embed", "heads", None), D**-0.5)
        self.k = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5)
        self.v = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5)
        self.o = normal(rngs(), (H, K, D), ("heads", None, "embed"), (2 * config.layers * H * K) ** -0.5)
        self.gate = constant(config.gate_init, (H,), ("heads",), group="gate")
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
        self, x_BTD: jax.Array, cache: Cache, memory: Memory, call: Call, *, within: bool, parallel: bool | None = None
    ) -> tuple[jax.Array, Cache, Memory]:
        """Reads T tokens -> what they add to x, what `infini_attention` returns besides."""
        config, dtype = self.config, x_BTD.dtype
        q_BTHK, k_BTGK, v_BTGK = (jnp.einsum("btd,dhk->bthk", x_BTD, use(w, dtype)) for w in (self.q, self.k, self.v))
        if config.attention_bias:
            q_BTHK += use(self.q_bias, dtype)[None, None]
            k_BTGK += use(self.k_bias, dtype)[None, None]
            v_BTGK += use(self.v_bias, dtype)[None, None]
        if config.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        gate_H = use(self.gate, at_least_float32(dtype))
        how = {"within": within, "parallel": parallel}
        o_BTHK, new, memory = infini_attention(config, q_BTHK, k_BTGK, v_BTGK, gate_H, cache, memory, call, **how)
        o_BTD = jnp.einsum("bthk,hkd->btd", o_BTHK, use(self.o, dtype))
        o_BTD = o_BTD + use(self.o_bias, dtype)[None, None] if config.output_bias else o_BTD
        return o_BTD, new, memory


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: InfiniConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.feed_forward = SwiGLU(
            config.dim, config.feed_forward_size, config.dtype, (2 * config.layers) ** -0.5, rngs, bias=config.feed_forward_bias
        )

    def __call__(self, x_BTD: jax.Array, cache: Cache, memory: Memory, call: Call, *, within: bool) -> tuple[jax.Array, Cache, Memory]:
        """x_BTD, the layer's cache and memory before the call -> x_BTD, the keys and values to be cached, the memory after it."""
        y_BTD, new, memory = self.attention(self.attention_norm(x_BTD), cache, memory, call, within=within)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return constrain(x_BTD, ("batch", "context", None)), new, memory


class Infini(nnx.Module):
    """A decoder-only Transformer with Infini-attention that reads a stream (models/streaming.py has the protocol)."""

    def __init__(self, config: InfiniConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, tied=config.tied_embeddings, dtype=config.dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> InfiniState:
        """The state before the first token.

        Args:
          batch_size: rows, B.
          capacity: tokens that will be read in all, for `planned`; the state does not grow.
          planned: tokens that each row will have read in the end, a number or int32 [B], which decides the table of `dynamic` and
            `longrope` (nn/rope.py), but no more than attention spans. None: the capacity or, without that, what the config plans for.
        """
        config = self.config
        L, G, K = config.layers, config.kv_head_count, config.head_size
        zeros = lambda: constrain(jnp.zeros((L, batch_size, config.span, G, K), config.dtype), (None, "batch", None, "kv_heads", None))
        memory = empty_memory(L * batch_size, G, K, K, config.dtype)
        by_layer = lambda x: constrain(x.reshape(L, batch_size, *x.shape[1:]), (None, "batch", "kv_heads", *(None,) * (x.ndim - 2)))
        return InfiniState(
            cursor.start(batch_size, (capacity or config.rope.planned) if planned is None else planned),
            attention.empty_slots(batch_size, config.span),
            no_owner(batch_size),
            Cache(zeros(), zeros()),
            jax.tree.map(by_layer, memory),
        )

    def room(self, state: InfiniState) -> None:
        """None: the state does not grow."""

    def gates(self) -> jax.Array:
        """The share of the memory in each head's output, [L, H]."""
        gate_LH = self.blocks.attention.gate[...]
        return jnp.zeros_like(gate_LH) if self.config.gate == "closed" else jax.nn.sigmoid(gate_LH)

    def hidden(
        self, tokens_BT: jax.Array, state: InfiniState, segment_ids_BT: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, InfiniState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document.
          dropout_key: draws the rows' horizons and dilutions where the config has ranges for training; None: normalizer_horizon holds.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token.
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, (B, T) = self.config, tokens_BT.shape
        if T == 0:
            return jnp.zeros((B, T, config.dim), config.dtype), state
        drawn = {} if dropout_key is None else self._drawn(dropout_key, B)
        if T == 1 or config.schedule == "layers":
            return self._read(tokens_BT, state, segment_ids_BT, drawn, within=T == 1)
        return self._read_segment_by_segment(tokens_BT, state, segment_ids_BT, drawn)

    def _drawn(self, key: jax.Array, batch_size: int) -> dict[str, Any]:
        """What training draws for each row."""
        config, drawn = self.config, {}
        horizon, after, factor = jax.random.split(key, 3)

        def uniform_in_log(key, low: int, high: int):
            return jnp.exp(jax.random.uniform(key, (batch_size,), minval=math.log(low), maxval=math.log(high)))

        if config.training_horizons is not None:
            low, high = config.training_horizons
            drawn["normalizer_horizon"] = uniform_in_log(horizon, low, high + 1).astype(jnp.int32)
        if config.training_dilution is not None:
            segments, most = config.training_dilution
            drawn["dilution"] = jax.random.randint(after, (batch_size,), 1, segments + 1, jnp.int32), uniform_in_log(factor, 1, most)
        return drawn

    def _read_segment_by_segment(self, tokens_BT, state: InfiniState, segment_ids_BT, drawn) -> tuple[jax.Array, InfiniState]:
        """`hidden` with all layers of a segment before the next."""
        (B, T), C = tokens_BT.shape, self.config.segment
        if segment_ids_BT is None:
            segment_ids_BT = jnp.broadcast_to(jnp.maximum(state.cursor.segment_B, 1)[:, None], (B, T))
        held_B = state.cursor.count_B % C
        column_BC = jnp.arange(C, dtype=jnp.int32)[None] + held_B[:, None]
        # Padding may stand only behind a call's tokens, so those of the first segment move to its front.
        to_front = lambda x_BC: jnp.take_along_axis(jnp.pad(x_BC, ((0, 0), (0, 1))), jnp.minimum(column_BC, C), axis=1)
        pieces = (attention.lay(x_BT, held_B, C) for x_BT in (tokens_BT, segment_ids_BT.astype(jnp.int32)))
        pieces = tuple(x_NBC.at[0].set(to_front(x_NBC[0])) for x_NBC in pieces)

        @jax.checkpoint
        def read(state, piece):
            hidden_BCD, state = self._read(piece[0], state, piece[1], drawn, within=True)
            return state, hidden_BCD

        state, hidden_NBCD = jax.lax.scan(read, state, pieces)
        back_BC1 = jnp.maximum(2 * jnp.arange(C, dtype=jnp.int32)[None] - column_BC, 0)[..., None]
        hidden_NBCD = hidden_NBCD.at[0].set(jnp.take_along_axis(hidden_NBCD[0], back_BC1, axis=1))
        return attention.unlay(hidden_NBCD, held_B, T), state

    def _read(self, tokens_BT, state: InfiniState, segment_ids_BT, drawn, *, within: bool) -> tuple[jax.Array, InfiniState]:
        """`hidden`, layer by layer."""
        config = self.config
        place, next_cursor = cursor.advance(state.cursor, tokens_BT.shape[1], segment_ids_BT)
        call, slot_BM, slots, owner = begin_call(config, state.cursor, place, state.slots, state.owner, within=within, drawn=drawn)

        def layer(x_BTD, block_and_state):
            block, cache, memory = block_and_state
            x_BTD, new, memory = block(x_BTD, cache, memory, call, within=within)
            return x_BTD, (new, memory)

        layer = jax.checkpoint(layer) if config.remat else layer
        x_BTD, (new, memory) = jax.lax.scan(layer, self.embedding(tokens_BT), (self.blocks, state.cache, state.memory))
        cache = attention.write_layers(state.cache, new, slot_BM)
        return self.norm(x_BTD), InfiniState(next_cursor, slots, owner, cache, memory)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(self, tokens_BT: jax.Array, state: InfiniState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, InfiniState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state
