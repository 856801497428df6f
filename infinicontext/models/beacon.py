"""Activation Beacon: a Llama-style Transformer that reads in chunks and keeps of each only the keys and values of its beacons (Zhang et al.
2024, arXiv 2401.03462 v1 and v3).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, L layers, N chunks, C tokens of a chunk in a
call, P beacons of a chunk, R rows (tokens, then beacons), S slots of the open chunk, X rows kept of a chunk, M memory slots (at once: all
rows that are kept), U = N B chunks of all rows, V vocabulary.

Beacons have an embedding and projections of their own and share the rest with tokens. Two ways to read are one function: chunk after chunk,
with the memory as the state; and, from an empty state, all chunks of a layer at once, where tokens see what earlier chunks keep.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.beacon_attention import (
    BeaconConfig,
    Counts,
    End,
    Rows,
    by_room,
    chunk_end,
    chunk_start,
    compacted_plan,
    joined,
    keep,
    moved,
    plan_chunks,
    ratios_of,
    rows_of,
    seen_in_chunk,
    slots_of,
)
from infinicontext.models.beacon_layer import Block
from infinicontext.models.streaming import require_room
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, normal, stack, use
from infinicontext.nn.rope import rotation
from infinicontext.sharding import constrain


class BeaconState(NamedTuple):
    """Everything the model remembers.

    Per layer 2 G K values for each slot of the memory, one for `ratio` tokens, and for each row of the open chunk; once 4 bytes per memory
    slot and 12 per row of the open chunk. With `config.memory` it is constant.
    """

    cursor: Cursor
    document_BM: jax.Array  # int32, of each slot of the memory; 0: empty
    counts: Counts
    rows: Rows  # [B, S], of the open chunk and stale ones: token i lies in slot i % chunk, beacons behind those
    memory: Cache  # [L, B, M, G, K], rotated at the slot's number in its document
    open: Cache  # [L, B, S, G, K], rotated


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
          capacity: tokens that will be read in all; the memory is allocated here once. With `config.memory` it need not be known.
          planned: tokens that each row will have read in the end, a number or int32 [B], which `choose="by_length"` and rotary tables that
            depend on the length go by. None: the capacity.

        Raises:
          UserError: no capacity.
        """
        config = self.config
        if config.memory is not None:
            slots = config.memory
        elif capacity is None or capacity < 1:
            raise UserError(f"init_state: capacity is {capacity}; a memory of beacons needs the number of tokens it is to read, 1 or more")
        else:
            slots = max((capacity - config.chunk) // config.step + 1, 0) * config.kept
        rows = config.chunk + (config.beacons if config.placement == "interleave" else 0)
        shape = lambda count: (config.layers, batch_size, count, config.kv_head_count, config.head_size)
        empty = lambda count: Cache(
            *(constrain(jnp.zeros(shape(count), config.dtype), (None, "batch", None, "kv_heads", None)) for _ in range(2))
        )
        zeros_B = jnp.zeros(batch_size, jnp.int32)
        return BeaconState(
            cursor.start(batch_size, (capacity or 0) if planned is None else planned),
            jnp.zeros((batch_size, slots), jnp.int32),
            Counts(zeros_B, zeros_B, zeros_B),
            Rows(*(jnp.zeros((batch_size, rows), jnp.int32) for _ in range(3))),
            empty(slots),
            empty(rows),
        )

    def room(self, state: BeaconState) -> jax.Array | None:
        """How many more tokens fit in each row, int32 [B]; None for a memory that drops what is oldest."""
        config = self.config
        if config.memory is not None:
            return None
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
        if room_B is None:
            return hidden_BTD, after
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
        if config.choose == "by_room":
            ratio_BC = by_room(config, ratio_BC, state.counts.of(place.document_BT))
        beacons = min(config.beacons, C // config.least_ratio + 1) if config.placement == "interleave" and config.beacons else 0
        rows = rows_of(config, place, ratio_BC, state.counts, beacons)
        x_BRD = jnp.concatenate([self.embedding(tokens_BC), self._beacons(B, beacons)], axis=1)
        x_BRD, new_LBR = self._layers(x_BRD, rows, C, state)
        slot_BR, end = self._open_slots(rows, C), chunk_end(config, place, ratio_BC)
        state = state._replace(
            cursor=next_cursor,
            counts=state.counts.entered(end),
            rows=Rows(*(attention.write(old_BS, new_BR, slot_BR) for old_BS, new_BR in zip(state.rows, rows))),
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

    def _open_slots(self, rows: Rows, tokens: int) -> jax.Array:
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
        config, (B, P) = self.config, (len(end.ratio), self.config.beacons)
        number_1P = jnp.arange(P, dtype=jnp.int32)[None]
        last_B1 = state.cursor.count_B[:, None] - 1
        start_B1, ratio_B1 = chunk_start(config, last_B1), jnp.maximum(end.ratio, 1)[:, None]
        first_B1 = end.start[:, None] - start_B1
        stop_BP = (number_1P + 1) * ratio_B1
        there_BP = end.complete[:, None] & (end.ratio > 0)[:, None] & (stop_BP <= config.step) & (stop_BP > first_B1)
        reach_BP = {"all": jnp.full_like(stop_BP, config.chunk), "stepwise": stop_BP, "segment": stop_BP}[config.append_sees]
        behind_BP = jnp.broadcast_to(ratio_B1, (B, P)) if config.append_sees == "segment" else reach_BP - first_B1
        position_BP = state.counts.held_B[:, None] + behind_BP
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
        after = self._commit(state, end, joined(state.rows, beacons), candidates)
        if config.step == config.chunk:
            return after
        # The tokens that stay move with the memory's end.
        grown_B = after.counts.held_B - state.counts.held_B
        distance_B = jnp.where(end.complete, grown_B - config.step + jnp.minimum(first_B1[:, 0], config.step), 0)
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
        kept, counts = keep(self.config, rows, self.config.chunk, end, state.counts)
        distance_BX = kept.position_BX - jnp.take_along_axis(rows.position, kept.source_BX, axis=1)
        taken_LBX = jax.tree.map(lambda x: jnp.take_along_axis(x, kept.source_BX[None, :, :, None, None], axis=2), cache)
        taken_LBX = taken_LBX._replace(k_BSGK=self._moved(taken_LBX.k_BSGK, distance_BX, state))
        slot_BX = slots_of(self.config, kept, counts, state.document_BM.shape[1])
        return state._replace(
            document_BM=attention.write(state.document_BM, kept.document_BX, slot_BX),
            counts=counts,
            memory=attention.write_layers(state.memory, taken_LBX, slot_BX),
        )

    def _read_at_once(self, tokens_BT, state: BeaconState, segment_ids_BT, ratio_BT) -> tuple[jax.Array, BeaconState]:
        """`hidden` from an empty state, layer by layer, all chunks at once (interleaved beacons)."""
        config, (B, T) = self.config, tokens_BT.shape
        C = min(config.chunk, T)
        # A text that is too short for a beacon has a row for one, which stays empty.
        P = min(config.beacons, max(C // config.least_ratio, 1)) if config.beacons else 0
        lay = lambda x_BT: attention.lay(x_BT, None, C)
        place, next_cursor = cursor.advance(state.cursor, T, segment_ids_BT)
        rows_NBR, kept_NBX, used_NB, counts = plan_chunks(config, Place(*map(lay, place)), lay(ratio_BT), state.counts, P)
        (N, _, R), X = rows_NBR.order.shape, config.kept
        flat = lambda x_NB: x_NB.reshape(N * B, *x_NB.shape[2:])
        unflat = lambda x_U: x_U.reshape(N, B, *x_U.shape[1:])
        by_row = lambda x_NBR: jnp.moveaxis(x_NBR, 0, 1).reshape(B, -1, *x_NBR.shape[3:])

        rows_UR, kept_UX, kept_BM = jax.tree.map(flat, rows_NBR), jax.tree.map(flat, kept_NBX), jax.tree.map(by_row, kept_NBX)
        plan_U = jnp.tile(compacted_plan(config, state.cursor.planned_B), N)
        turns = rotation(config.rope, config.head_size, rows_UR.position, plan_U, at_least_float32(config.dtype))
        distance_UX = kept_UX.position_BX - jnp.take_along_axis(rows_UR.position, kept_UX.source_BX, axis=1)
        chunk_M = jnp.repeat(jnp.arange(N, dtype=jnp.int32), X)

        def memory_of(cache_UR: Cache) -> Cache:
            k_UXGK, v_UXGK = (jnp.take_along_axis(x_UR, kept_UX.source_BX[..., None, None], axis=1) for x_UR in cache_UR)
            return jax.tree.map(lambda x_UX: by_row(unflat(x_UX)), Cache(moved(config, k_UXGK, distance_UX, plan_U), v_UXGK))

        def layer(x_URD, block, queries: int):
            q_URHK, k_URGK, v_URGK = block.rotated(x_URD, C, turns)
            memory = memory_of(Cache(k_URGK, v_URGK))

            def one_chunk(xs):
                q_BRHK, own, rows_BR, number, used_B = xs
                asking = jax.tree.map(lambda x_BR: x_BR[:, :queries], rows_BR)
                seen_BRM = _same(asking.document, kept_BM.document_BX) & (chunk_M < number)[None, None]
                if config.memory is not None:
                    seen_BRM &= (kept_BM.number_BX >= used_B[:, None] - config.memory)[:, None]
                return attention.attend_parts(q_BRHK, [(*memory, seen_BRM), (*own, seen_in_chunk(config, asking, rows_BR))])

            own = Cache(unflat(k_URGK), unflat(v_URGK))
            xs = (unflat(q_URHK[:, :queries]), own, rows_NBR, jnp.arange(N, dtype=jnp.int32), used_NB)
            o_URHK = flat(jax.lax.map(jax.checkpoint(one_chunk), xs))
            return block.finish(x_URD[:, :queries], o_URHK, C), Cache(k_URGK, v_URGK)

        layer = jax.checkpoint(layer, static_argnums=2) if config.remat else layer
        x_URD = jnp.concatenate([self.embedding(flat(lay(tokens_BT))), self._beacons(N * B, P)], axis=1)
        first, last = jax.tree.map(lambda w: w[:-1], self.blocks), jax.tree.map(lambda w: w[-1], self.blocks)
        x_URD, new_LUR = jax.lax.scan(lambda x_URD, block: layer(x_URD, block, R), x_URD, first)
        # Of the last layer's beacons nothing but keys and values is read.
        x_UCD, new_UR = layer(x_URD, last, C)
        new_LUR = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), new_LUR, new_UR)

        M, slot_UR = state.document_BM.shape[1], self._open_slots(rows_UR, C)
        slot_BM = slots_of(config, kept_BM, counts, M)
        latest = _latest(by_row(unflat(slot_UR)), state.rows.order.shape[1])
        return by_row(unflat(self.norm(x_UCD)))[:, :T], BeaconState(
            next_cursor,
            attention.write(state.document_BM, kept_BM.document_BX, slot_BM),
            counts,
            Rows(*(latest(by_row(x_NBR)) for x_NBR in rows_NBR)),
            attention.write_layers(state.memory, jax.vmap(memory_of)(new_LUR), slot_BM),
            jax.tree.map(lambda x_LUR: jax.vmap(lambda x_UR: latest(by_row(unflat(x_UR))))(x_LUR), new_LUR),
        )

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(self, tokens_BT: jax.Array, state: BeaconState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, BeaconState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state


def _latest(slot_BY: jax.Array, count: int) -> Callable[[jax.Array], jax.Array]:
    """What each of S = `count` slots holds after Y rows have been written to theirs, one after another: [B, Y, ...] -> [B, S, ...]."""
    B, Y = slot_BY.shape
    number_1Y = jnp.arange(Y, dtype=jnp.int32)[None]
    last_BS = jnp.full((B, count), -1, jnp.int32).at[jnp.arange(B, dtype=jnp.int32)[:, None], slot_BY].max(number_1Y, mode="drop")

    def latest(x_BY: jax.Array) -> jax.Array:
        at_BS = last_BS.reshape(B, count, *(1,) * (x_BY.ndim - 2))
        return jnp.where(at_BS >= 0, jnp.take_along_axis(x_BY, jnp.maximum(at_BS, 0), axis=1), 0)

    return latest


def _same(document_BR: jax.Array, document_BS: jax.Array) -> jax.Array:
    """Which keys are of a query's document, bool [B, R, S]."""
    return (document_BR[..., None] == document_BS[:, None]) & (document_BS > 0)[:, None]
