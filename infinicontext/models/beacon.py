"""Activation Beacon: a Llama-style Transformer that reads in chunks and keeps of each only the keys and values of its beacons (Zhang et al.
2024, arXiv 2401.03462 v1 and v3).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, L layers, N chunks, C tokens of a chunk in a
call, P beacons of a chunk, R rows (tokens, then beacons), S slots of the open chunk, M memory slots, X rows kept of a chunk, V vocabulary.

Beacons have an embedding and projections of their own and share the rest with tokens. Two ways to read are one function: chunk after chunk,
with the memory as the state; and, from an empty state, all chunks of a layer at once, where tokens see what earlier chunks keep.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import (
    BeaconConfig,
    End,
    Rows,
    beacon_rows,
    chunk_end,
    chunk_of,
    chunk_start,
    compacted_plan,
    kept_rows,
    moved,
    ratios_of,
    seen_in_chunk,
    token_rows,
)
from infinicontext.models.streaming import require_room
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, use
from infinicontext.nn.rope import apply_rope, rotation
from infinicontext.sharding import constrain


class BeaconState(NamedTuple):
    """Everything the model remembers.

    Per layer 2 G K values for each slot of the memory, one for `ratio` tokens, and for each row of the open chunk; once 4 bytes per memory
    slot and 12 per row of the open chunk.
    """

    cursor: Cursor
    document_BM: jax.Array  # int32, of each slot of the memory; 0: empty
    used_B: jax.Array  # int32, slots that have been written, of all documents
    owner_B: jax.Array  # int32, the document that `held_B` is of
    held_B: jax.Array  # int32, slots of that document
    rows: Rows  # [B, S], of the open chunk and stale ones: token i lies in slot i % chunk, beacons behind those
    memory: Cache  # [L, B, M, G, K], rotated at the slot's number in its document
    open: Cache  # [L, B, S, G, K], rotated


class Projections(nnx.Module):
    """Queries, keys and values, not rotated."""

    def __init__(self, config: BeaconConfig, rngs: nnx.Rngs, group: str):
        D, H, G, K = config.dim, config.heads, config.kv_head_count, config.head_size
        self.config = config
        self.q = normal(rngs(), (D, H, K), ("embed", "heads", None), D**-0.5, group)
        self.k = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5, group)
        self.v = normal(rngs(), (D, G, K), ("embed", "kv_heads", None), D**-0.5, group)
        if config.attention_bias:
            self.q_bias = constant(0, (H, K), ("heads", None), group)
            self.k_bias = constant(0, (G, K), ("kv_heads", None), group)
            self.v_bias = constant(0, (G, K), ("kv_heads", None), group)

    def project(self, x_BRD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x_BRD -> q_BRHK, k_BRGK and v_BRGK."""
        dtype = x_BRD.dtype
        q_BRHK, k_BRGK, v_BRGK = (jnp.einsum("brd,dhk->brhk", x_BRD, use(w, dtype)) for w in (self.q, self.k, self.v))
        if self.config.attention_bias:
            q_BRHK += use(self.q_bias, dtype)[None, None]
            k_BRGK += use(self.k_bias, dtype)[None, None]
            v_BRGK += use(self.v_bias, dtype)[None, None]
        return q_BRHK, k_BRGK, v_BRGK


class Attention(Projections):
    """The projections of grouped-query attention, some of which beacons have of their own. Of the rows, beacons are the last."""

    def __init__(self, config: BeaconConfig, rngs: nnx.Rngs):
        D, H, K = config.dim, config.heads, config.head_size
        super().__init__(config, rngs, "default")
        self.beacons = Projections(config, rngs, "beacon")
        std = (2 * config.layers * H * K) ** -0.5
        self.o = normal(rngs(), (H, K, D), ("heads", None, "embed"), std)
        if config.beacon_output:
            self.beacon_o = normal(rngs(), (H, K, D), ("heads", None, "embed"), std, "beacon")
        if config.output_bias:
            self.o_bias = constant(0, (D,), ("embed",))
        if config.qk_norm:
            self.q_norm = RMSNorm(K, epsilon=config.norm_epsilon, axis=None)
            self.k_norm = RMSNorm(K, epsilon=config.norm_epsilon, axis=None)

    def rotated(self, x_BRD: jax.Array, tokens: int, turns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, rotated, and values; the first `tokens` rows are tokens."""
        of_both = zip(self.project(x_BRD[:, :tokens]), self.beacons.project(x_BRD[:, tokens:]))
        q_BRHK, k_BRGK, v_BRGK = (jnp.concatenate(pair, axis=1) for pair in of_both)
        if self.config.qk_norm:
            q_BRHK, k_BRGK = self.q_norm(q_BRHK), self.k_norm(k_BRGK)
        return apply_rope(q_BRHK, *turns), apply_rope(k_BRGK, *turns), v_BRGK

    def output(self, o_BRHK: jax.Array, tokens: int) -> jax.Array:
        """What the heads read -> what is added to x."""
        dtype = o_BRHK.dtype
        out = lambda o_BRHK, w: jnp.einsum("brhk,hkd->brd", o_BRHK, use(w, dtype))
        if self.config.beacon_output:
            o_BRD = jnp.concatenate([out(o_BRHK[:, :tokens], self.o), out(o_BRHK[:, tokens:], self.beacon_o)], axis=1)
        else:
            o_BRD = out(o_BRHK, self.o)
        return o_BRD + use(self.o_bias, dtype)[None, None] if self.config.output_bias else o_BRD


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: BeaconConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.feed_forward = SwiGLU(
            config.dim, config.feed_forward_size, config.dtype, (2 * config.layers) ** -0.5, rngs, bias=config.feed_forward_bias
        )

    def rotated(self, x_BRD: jax.Array, tokens: int, turns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the norm of x."""
        return self.attention.rotated(self.attention_norm(x_BRD), tokens, turns)

    def finish(self, x_BRD: jax.Array, o_BRHK: jax.Array, tokens: int) -> jax.Array:
        """What the heads have read, added to x, and the feed-forward."""
        x_BRD = x_BRD + self.attention.output(o_BRHK, tokens)
        x_BRD = x_BRD + self.feed_forward(self.feed_forward_norm(x_BRD))
        return constrain(x_BRD, ("batch", None, None))


class Beacon(nnx.Module):
    """A decoder-only Transformer with beacons that reads a stream (models/streaming.py has the protocol)."""

    def __init__(self, config: BeaconConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, tied=config.tied_embeddings, dtype=config.dtype, rngs=rngs)
        self.beacon = normal(rngs(), (1, config.dim), (None, "embed"), config.dim**-0.5 if config.tied_embeddings else 1.0, "beacon")
        self.blocks = stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> BeaconState:
        """The state before the first token.

        Args:
          batch_size: rows, B.
          capacity: tokens that will be read in all; the memory is allocated here once.
          planned: tokens that each row will have read in the end, a number or int32 [B], which `choose="by_length"` and rotary tables that
            depend on the length go by. None: the capacity.

        Raises:
          UserError: no capacity.
        """
        config = self.config
        if capacity is None or capacity < 1:
            raise UserError(f"init_state: capacity is {capacity}; a memory of beacons needs the number of tokens it is to read, 1 or more")
        chunks = max((capacity - config.chunk) // config.step + 1, 0)
        slots, rows = chunks * config.kept, config.chunk + (config.beacons if config.placement == "interleave" else 0)
        shape = lambda count: (config.layers, batch_size, count, config.kv_head_count, config.head_size)
        empty = lambda count: Cache(
            *(constrain(jnp.zeros(shape(count), config.dtype), (None, "batch", None, "kv_heads", None)) for _ in range(2))
        )
        zeros_B = jnp.zeros(batch_size, jnp.int32)
        return BeaconState(
            cursor.start(batch_size, capacity if planned is None else planned),
            jnp.zeros((batch_size, slots), jnp.int32),
            zeros_B,
            zeros_B,
            zeros_B,
            Rows(*(jnp.zeros((batch_size, rows), jnp.int32) for _ in range(3))),
            empty(slots),
            empty(rows),
        )

    def room(self, state: BeaconState) -> jax.Array:
        """How many more tokens fit in each row, int32 [B]."""
        config = self.config
        chunks = state.document_BM.shape[1] // config.kept
        return config.chunk + chunks * config.step - 1 - state.cursor.count_B

    def hidden(
        self, tokens_BT: jax.Array, state: BeaconState, segment_ids_BT: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, BeaconState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document.
          dropout_key: in training, draws ratios; a document's last chunk then has no beacons, and is to be in the call.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token. Where the memory runs out of
          capacity inside compiled code, which cannot raise, hidden_BTD is NaN from the first token that does not fit.

        Raises:
          UserError: the tokens do not fit (outside jit).
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, (B, T) = self.config, tokens_BT.shape
        if T == 0:
            return jnp.zeros((B, T, config.dim), config.dtype), state
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["context"] > 1:
            raise UserError(f"mesh.context is {mesh.shape['context']}; with beacons, which are read chunk after chunk, it must be 1")
        room_B = self.room(state)
        require_room(room_B, T if segment_ids_BT is None else jnp.sum(segment_ids_BT > 0, axis=1))
        place, _ = cursor.advance(state.cursor, T, segment_ids_BT)
        ratio_BT = ratios_of(config, place, state.cursor.planned_B, dropout_key)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.broadcast_to(jnp.maximum(state.cursor.segment_B, 1)[:, None], (B, T))
        if T == 1:
            hidden_BTD, after = self._read(tokens_BT, state, segment_ids_BT, ratio_BT)
        elif config.placement == "interleave" and cursor.at_start(state.cursor):
            hidden_BTD, after = self._read_at_once(tokens_BT, state, segment_ids_BT, ratio_BT)
        else:
            hidden_BTD, after = self._read_chunk_by_chunk(tokens_BT, state, segment_ids_BT, ratio_BT)
        fits_BT = place.index_BT - state.cursor.count_B[:, None] < room_B[:, None]
        return jnp.where(fits_BT[..., None], hidden_BTD, jnp.nan), after

    def _read_chunk_by_chunk(self, tokens_BT, state: BeaconState, segment_ids_BT, ratio_BT) -> tuple[jax.Array, BeaconState]:
        """`hidden` with all layers of a chunk before the next."""
        config, (B, T), step = self.config, tokens_BT.shape, self.config.step
        C = min(step, T)
        # Cells of `step` tokens, none of which has a border of chunks inside. Row b's first piece is what is left of its cell.
        held_B = (state.cursor.count_B - config.chunk) % step
        N = -(-T // step) if cursor.at_start(state.cursor) and config.chunk % step == 0 else (T + step - 2) // step + 1
        start_NB = jnp.maximum(jnp.arange(N, dtype=jnp.int32)[:, None] * step - held_B[None], 0)
        end_NB = jnp.concatenate([start_NB[1:], jnp.full((1, B), T, jnp.int32)])
        column_NBC = start_NB[..., None] + jnp.arange(C, dtype=jnp.int32)[None, None]
        inside_NBC = column_NBC < jnp.minimum(end_NB, T)[..., None]
        cut = lambda x_BT: jax.vmap(lambda column_BC: jnp.take_along_axis(x_BT, column_BC, axis=1))(jnp.minimum(column_NBC, T - 1))
        pieces = (cut(tokens_BT), jnp.where(inside_NBC, cut(segment_ids_BT), 0), cut(ratio_BT))

        def read(state, piece):
            hidden_BCD, state = jax.lax.cond(jnp.any(piece[1] > 0), self._read, self._skip, piece[0], state, piece[1], piece[2])
            return state, hidden_BCD

        state, hidden_NBCD = jax.lax.scan(jax.checkpoint(read), state, pieces)
        t_BT = held_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        from_BT = t_BT // step * C + jnp.where(t_BT < step, t_BT - held_B[:, None], t_BT % step)
        hidden_BSD = jnp.moveaxis(hidden_NBCD, 0, 1).reshape(B, N * C, -1)
        return jnp.take_along_axis(hidden_BSD, from_BT[..., None], axis=1), state

    def _skip(self, tokens_BC, state: BeaconState, segment_ids_BC, ratio_BC) -> tuple[jax.Array, BeaconState]:
        """`_read` of nothing but padding."""
        return jnp.zeros((*tokens_BC.shape, self.config.dim), self.config.dtype), state

    def _read(self, tokens_BC, state: BeaconState, segment_ids_BC, ratio_BC) -> tuple[jax.Array, BeaconState]:
        """`hidden`, where the tokens of a row are all of one chunk."""
        config, (B, C) = self.config, tokens_BC.shape
        place, next_cursor = cursor.advance(state.cursor, C, segment_ids_BC)
        held_BC = jnp.where(place.document_BT == state.owner_B[:, None], state.held_B[:, None], 0)
        tokens = token_rows(config, place, ratio_BC, held_BC)
        count = min(config.beacons, C // config.least_ratio + 1) if config.placement == "interleave" and config.beacons else 0
        rows = _joined(tokens, beacon_rows(config, tokens, ratio_BC, count))
        x_BRD = jnp.concatenate([self.embedding(tokens_BC), self._beacons(B, count)], axis=1)
        x_BRD, new_LBR = self._layers(x_BRD, rows, C, state)
        slot_BR = self._slots(rows, C)
        written = Rows(*(attention.write(old_BS, new_BR, slot_BR) for old_BS, new_BR in zip(state.rows, rows)))
        end = chunk_end(config, place, ratio_BC)
        enters_B = (end.document > 0) & (end.document != state.owner_B)
        state = state._replace(
            cursor=next_cursor,
            owner_B=jnp.where(enters_B, end.document, state.owner_B),
            held_B=jnp.where(enters_B, 0, state.held_B),
            rows=written,
            open=attention.write_layers(state.open, new_LBR, slot_BR),
        )
        complete = self._append if config.placement == "append" else lambda state, end: self._commit(state, end, state.rows, state.open)
        return self.norm(x_BRD[:, :C]), jax.lax.cond(jnp.any(end.complete), complete, lambda state, end: state, state, end)

    def _layers(self, x_BRD, rows: Rows, tokens: int, state: BeaconState, seen=None) -> tuple[jax.Array, Cache]:
        """All layers for rows of the open chunk, the first `tokens` of which are tokens -> x_BRD and the rows' keys and values [L, B, R].

        `seen`: of the memory, of the open chunk's slots and of the rows themselves; None: what the rows' order says.
        """
        config = self.config
        plan_B = compacted_plan(config, state.cursor.planned_B)
        turns = rotation(config.rope, config.head_size, rows.position, plan_B, at_least_float32(config.dtype))
        if seen is None:
            seen = (_same(rows.document, state.document_BM), *(seen_in_chunk(config, rows, keys) for keys in (state.rows, rows)))

        def layer(x_BRD, block_and_state):
            block, memory, open = block_and_state
            q_BRHK, k_BRGK, v_BRGK = block.rotated(x_BRD, tokens, turns)
            parts = [(*cache, seen_BRS) for cache, seen_BRS in zip((memory, open, Cache(k_BRGK, v_BRGK)), seen)]
            x_BRD = block.finish(x_BRD, attention.attend_parts(q_BRHK, parts), tokens)
            return x_BRD, Cache(k_BRGK, v_BRGK)

        layer = jax.checkpoint(layer) if config.remat else layer
        return jax.lax.scan(layer, x_BRD, (self.blocks, state.memory, state.open))

    def _slots(self, rows: Rows, tokens: int) -> jax.Array:
        """Of the open chunk, where rows of it are kept, int32 [B, R]; beyond the last: of none."""
        config, index_BR = self.config, rows.order // 2
        none = config.chunk + (config.beacons if config.placement == "interleave" else 0)
        slot_BR = index_BR % config.chunk
        if rows.order.shape[1] > tokens:
            beacon_BN = config.chunk + index_BR[:, tokens:] // config.least_ratio % config.beacons
            # Beacons of two documents may have one slot.
            behind_BN = jnp.where(rows.document[:, tokens + 1 :] > 0, beacon_BN[:, 1:], none)
            behind_BN = jnp.pad(behind_BN, ((0, 0), (0, 1)), constant_values=none)
            slot_BR = jnp.concatenate([slot_BR[:, :tokens], jnp.where(behind_BN == beacon_BN, none, beacon_BN)], axis=1)
        return jnp.where(rows.document > 0, slot_BR, none)

    def _beacons(self, batch_size: int, count: int) -> jax.Array:
        """What enters the first layer, [B, N, D]."""
        return jnp.broadcast_to(use(self.beacon, self.config.dtype)[None], (batch_size, count, self.config.dim))

    def _append(self, state: BeaconState, end: End) -> BeaconState:
        """Reads the beacons of rows whose chunk is complete."""
        config, (B, P) = self.config, (len(state.held_B), self.config.beacons)
        number_1P = jnp.arange(P, dtype=jnp.int32)[None]
        last_B1 = state.cursor.count_B[:, None] - 1
        start_B1, ratio_B1 = chunk_start(config, last_B1), jnp.maximum(end.ratio, 1)[:, None]
        first_B1 = end.start[:, None] - start_B1
        stop_BP = (number_1P + 1) * ratio_B1
        there_BP = end.complete[:, None] & (end.ratio > 0)[:, None] & (stop_BP <= config.step) & (stop_BP > first_B1)
        reach_BP = {"all": jnp.full_like(stop_BP, config.chunk), "stepwise": stop_BP, "segment": stop_BP}[config.append_sees]
        behind_BP = jnp.broadcast_to(ratio_B1, (B, P)) if config.append_sees == "segment" else reach_BP - first_B1
        position_BP = state.held_B[:, None] + behind_BP
        if config.append_sees_beacons:
            position_BP += number_1P - first_B1 // ratio_B1
        beacons = Rows(jnp.broadcast_to(2 * last_B1 + 1, (B, P)), position_BP, jnp.where(there_BP, end.document[:, None], 0))

        column_BS = state.rows.order // 2 - start_B1
        from_BP = stop_BP - ratio_B1 if config.append_sees == "segment" else jnp.zeros_like(stop_BP)
        inside_BPS = (column_BS[:, None] >= jnp.maximum(from_BP, first_B1)[..., None]) & (column_BS[:, None] < reach_BP[..., None])
        itself_PP = jnp.tril(jnp.ones((P, P), bool)) if config.append_sees_beacons else jnp.eye(P, dtype=bool)
        seen = (
            _same(beacons.document, state.document_BM) & config.append_sees_memory,
            _same(beacons.document, state.rows.document) & inside_BPS,
            jnp.broadcast_to(itself_PP[None], (B, P, P)),
        )
        _, new_LBP = self._layers(self._beacons(B, P), beacons, 0, state, seen)
        candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), state.open, new_LBP)
        after = self._commit(state, end, _joined(state.rows, beacons), candidates)
        if config.step == config.chunk:
            return after
        # The tokens that stay move with the memory's end.
        distance_B = jnp.where(end.complete, after.held_B - state.held_B - config.step + jnp.minimum(first_B1[:, 0], config.step), 0)
        distance_BS = jnp.broadcast_to(distance_B[:, None], state.rows.order.shape)
        k_LBSGK = self._moved(state.open.k_BSGK, distance_BS, state)
        rows = state.rows._replace(position=state.rows.position + distance_BS)
        return after._replace(rows=rows, open=state.open._replace(k_BSGK=k_LBSGK))

    def _moved(self, k_LBXGK, distance_BX, state: BeaconState) -> jax.Array:
        """Keys of all layers, so many positions later."""
        plan_B = compacted_plan(self.config, state.cursor.planned_B)
        return jax.vmap(lambda k_BXGK: moved(self.config, k_BXGK, distance_BX, plan_B))(k_LBXGK)

    def _commit(self, state: BeaconState, end: End, rows: Rows, cache: Cache) -> BeaconState:
        """Puts what complete chunks keep into the memory; `rows` are tokens and, behind `chunk` of them, beacons."""
        source_BX, valid_BX = kept_rows(self.config, rows, self.config.chunk, end)
        number_1X = jnp.arange(self.config.kept, dtype=jnp.int32)[None]
        distance_BX = state.held_B[:, None] + number_1X - jnp.take_along_axis(rows.position, source_BX, axis=1)
        taken_LBX = jax.tree.map(lambda x: jnp.take_along_axis(x, source_BX[None, :, :, None, None], axis=2), cache)
        taken_LBX = taken_LBX._replace(k_BSGK=self._moved(taken_LBX.k_BSGK, distance_BX, state))
        M = state.document_BM.shape[1]
        slot_BX = jnp.where(valid_BX, state.used_B[:, None] + number_1X, M)
        count_B = jnp.sum(valid_BX, axis=1, dtype=jnp.int32)
        return state._replace(
            document_BM=attention.write(state.document_BM, jnp.broadcast_to(end.document[:, None], slot_BX.shape), slot_BX),
            used_B=state.used_B + count_B,
            held_B=state.held_B + count_B,
            memory=attention.write_layers(state.memory, taken_LBX, slot_BX),
        )

    def _read_at_once(self, tokens_BT, state: BeaconState, segment_ids_BT, ratio_BT) -> tuple[jax.Array, BeaconState]:
        """`hidden` from an empty state, layer by layer, all chunks at once (interleaved beacons)."""
        config, (B, T) = self.config, tokens_BT.shape
        C, X, M = min(config.chunk, T), config.kept, state.document_BM.shape[1]
        # A text that is too short for a beacon has a row for one, which stays empty.
        P = min(config.beacons, max(C // config.least_ratio, 1)) if config.beacons else 0
        place, next_cursor = cursor.advance(state.cursor, T, segment_ids_BT)
        place_NBC = Place(*(attention.lay(x_BT, None, C) for x_BT in place))
        ratio_NBC = attention.lay(ratio_BT, None, C)
        N, R = len(ratio_NBC), C + P
        flat = lambda x: x.reshape(N * B, *x.shape[2:])
        unflat = lambda x: x.reshape(N, B, *x.shape[1:])

        # What chunks keep does not depend on how much the ones before have kept; where their rows stand does.
        places, ratio_XC = Place(*map(flat, place_NBC)), flat(ratio_NBC)
        end = chunk_end(config, places, ratio_XC)
        numbered = lambda held_XC: token_rows(config, places, ratio_XC, held_XC)
        rows_of = lambda tokens: _joined(tokens, beacon_rows(config, tokens, ratio_XC, P))
        source, valid = kept_rows(config, rows_of(numbered(jnp.zeros_like(ratio_XC))), C, end)
        count_NB = unflat(jnp.sum(valid, axis=1, dtype=jnp.int32))
        used_NB = jnp.cumsum(count_NB, axis=0, dtype=jnp.int32) - count_NB
        begin_NBC = chunk_of(config, place_NBC.index_BT - place_NBC.position_BT)
        begun_NBC = jax.vmap(jnp.take, (1, 1), 1)(used_NB, begin_NBC)
        held_NBC = jnp.where(place_NBC.document_BT > 0, used_NB[..., None] - begun_NBC, 0)
        rows = rows_of(numbered(flat(held_NBC)))
        held_NB = jnp.max(jnp.where(place_NBC.document_BT == unflat(end.document)[..., None], held_NBC, 0), axis=2)

        plan_X = jnp.tile(compacted_plan(config, state.cursor.planned_B), N)
        turns = rotation(config.rope, config.head_size, rows.position, plan_X, at_least_float32(config.dtype))
        slot_XX = flat(held_NB)[:, None] + jnp.arange(X, dtype=jnp.int32)[None]
        distance = slot_XX - jnp.take_along_axis(rows.position, source, axis=1)
        by_row = lambda x: jnp.moveaxis(unflat(x), 0, 1).reshape(B, -1, *x.shape[2:])
        memory_document_BM = by_row(jnp.where(valid, end.document[:, None], 0))
        memory_chunk_M = jnp.repeat(jnp.arange(N, dtype=jnp.int32), X)

        def keep(k, v):
            k, v = (jnp.take_along_axis(x, source[..., None, None], axis=1) for x in (k, v))
            return Cache(moved(config, k, distance, plan_X), v)

        def layer(x, block, queries=R):
            q, k, v = block.rotated(x, C, turns)
            memory = jax.tree.map(by_row, keep(k, v))

            def one_chunk(xs):
                q_BRHK, own, rows, number = xs
                asking = jax.tree.map(lambda x_BR: x_BR[:, :queries], rows)
                seen_BRM = _same(asking.document, memory_document_BM) & (memory_chunk_M < number)[None, None]
                return attention.attend_parts(q_BRHK, [(*memory, seen_BRM), (*own, seen_in_chunk(config, asking, rows))])

            xs = (unflat(q[:, :queries]), Cache(unflat(k), unflat(v)), jax.tree.map(unflat, rows), jnp.arange(N, dtype=jnp.int32))
            x = block.finish(x[:, :queries], flat(jax.lax.map(jax.checkpoint(one_chunk), xs)), C)
            return x, Cache(k, v)

        x = jnp.concatenate([self.embedding(flat(attention.lay(tokens_BT, None, C))), self._beacons(N * B, P)], axis=1)
        layer_at = jax.checkpoint(layer, static_argnums=2) if config.remat else layer
        first, last = jax.tree.map(lambda w: w[:-1], self.blocks), jax.tree.map(lambda w: w[-1], self.blocks)
        x, new_L = jax.lax.scan(lambda x, block: layer_at(x, block, R), x, first)
        # Of the last layer's beacons nothing but keys and values is read.
        x, new = layer_at(x, last, C)
        hidden_BTD = by_row(self.norm(x))[:, :T]

        # The state after the call: the memory, and the last row that each slot of the open chunk has seen.
        new_LXR = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), new_L, new)
        kept_LBM = jax.tree.map(lambda x: jax.vmap(by_row)(x), jax.vmap(keep)(*new_LXR))
        slot_BM = by_row(jnp.where(valid, flat(used_NB)[:, None] + jnp.arange(X, dtype=jnp.int32)[None], M))
        slot_NBR = unflat(self._slots(rows, C))
        S = state.rows.order.shape[1]
        latest_BS = (
            jnp.full((B, S), -1, jnp.int32)
            .at[jnp.arange(B, dtype=jnp.int32)[None, :, None], slot_NBR]
            .max(jnp.arange(N, dtype=jnp.int32)[:, None, None] * R + jnp.arange(R, dtype=jnp.int32)[None, None], mode="drop")
        )
        pick = lambda x_BY: jnp.take_along_axis(x_BY, jnp.maximum(latest_BS, 0).reshape(B, S, *(1,) * (x_BY.ndim - 2)), axis=1)
        latest = lambda x_BY: jnp.where((latest_BS >= 0).reshape(B, S, *(1,) * (x_BY.ndim - 2)), pick(x_BY), 0)
        last_B = jnp.maximum(next_cursor.count_B - 1, 0) // C
        at_last = lambda x_NB: jnp.take_along_axis(x_NB, last_B[None], axis=0)[0]
        return hidden_BTD, BeaconState(
            next_cursor,
            attention.write(state.document_BM, memory_document_BM, slot_BM),
            jnp.sum(count_NB, axis=0, dtype=jnp.int32),
            at_last(unflat(end.document)),
            at_last(held_NB + count_NB),
            Rows(*(latest(by_row(x)) for x in rows)),
            attention.write_layers(state.memory, kept_LBM, slot_BM),
            jax.tree.map(lambda x_LXR: jax.vmap(lambda x: latest(by_row(x)))(x_LXR), new_LXR),
        )

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(self, tokens_BT: jax.Array, state: BeaconState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, BeaconState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state


def _joined(one: Rows, other: Rows) -> Rows:
    return Rows(*(jnp.concatenate(pair, axis=1) for pair in zip(one, other)))


def _same(document_BR: jax.Array, document_BS: jax.Array) -> jax.Array:
    """Which keys are of a query's document, bool [B, R, S]."""
    return (document_BR[..., None] == document_BS[:, None]) & (document_BS > 0)[:, None]
