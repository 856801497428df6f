"""TransformerFAM: a Llama-style Transformer with block-sliding windows whose layers each feed a few activations back to themselves, block
after block (Hwang et al. 2024, arXiv 2404.09173 v3).

Shape letters: B batch, T time, D channels, G key/value heads, K head size, L layers, N blocks that a call touches, C tokens per block,
S ring slots, W slots written by a call, F rows of the feedback memory (FAM), V vocabulary.

Nothing is added to the Transformer but the prompt [F, D] that FAM begins as (fam_layer.py says how it goes on). In a document's first
block each layer's FAM is what the layers below make of the prompt alone (`prompt_stream`). Were it the FAM that the layer below has updated
with that block, it would tell the block's tokens what follows them.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.fam_attention import FamConfig, Feedback, begin_call, enter, entering, fam_rotation
from infinicontext.models.fam_layer import Block, select_rows
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, normal, stack, use
from infinicontext.nn.rope import rotation
from infinicontext.sharding import constrain


class FamState(NamedTuple):
    """Everything the model remembers, of constant size.

    A row has, per layer, 2 (S + F) G K values, S = (memory_blocks + 1) block, and 4 F D bytes of FAM; and once 8 S + 29 bytes.
    """

    cursor: Cursor
    slots: Slots  # position: number of the token in its row, over all documents; token i lies in slot i % S
    cache: Cache  # k, rotated, and v [L, B, S + F, G, K]; those of FAM come last
    feedback: Feedback | None  # None without FAM


class Fam(nnx.Module):
    """A decoder-only Transformer with feedback memory that reads a stream (models/streaming.py has the protocol)."""

    def __init__(self, config: FamConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, tied=config.tied_embeddings, dtype=config.dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        # On the scale of embedded tokens, among which it stands.
        std = config.dim**-0.5 if config.tied_embeddings else 1.0
        rows = config.fam_length
        self.prompt = normal(rngs(), (rows, config.dim), (None, "embed"), std, group="prompt") if rows else None

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> FamState:
        """The state before the first token.

        Args:
          batch_size: rows, B.
          capacity: tokens that will be read in all, for `planned`; the state does not grow.
          planned: tokens that each row will have read in the end, a number or int32 [B], which decides the table of `dynamic` and
            `longrope` (nn/rope.py). None: the capacity or, without that, what the config plans for.
        """
        config = self.config
        L, F, G, K = config.layers, config.fam_length, config.kv_head_count, config.head_size
        zeros = lambda: constrain(jnp.zeros((L, batch_size, config.span + F, G, K), config.dtype), (None, "batch", None, "kv_heads", None))
        zeros_B, feedback = jnp.zeros(batch_size, jnp.int32), None
        if F:
            fam_LBFD = jnp.zeros((L, batch_size, F, config.dim), at_least_float32(config.dtype))
            feedback = Feedback(constrain(fam_LBFD, (None, "batch", None, None)), zeros_B, zeros_B > 0, zeros_B)
        return FamState(
            cursor.start(batch_size, (capacity or config.rope.planned) if planned is None else planned),
            attention.empty_slots(batch_size, config.span),
            Cache(zeros(), zeros()),
            feedback,
        )

    def passed(self, state: FamState, fam_LFD: jax.Array) -> FamState:
        """A state of no token yet that begins with a FAM from elsewhere instead of the prompt (random state passing, appendix B.2.3).

        Args:
          state: from `init_state` or `shifted`.
          fam_LFD: the FAM of one row of another state, state.feedback.fam_LBFD[:, b]; all rows begin with it. It is taken as it is:
            gradients flow to it unless they are stopped.

        Raises:
          UserError: the model has no FAM.
        """
        if state.feedback is None:
            raise UserError("model.fam_length is 0; a model without FAM has none to pass on")
        fam_LBFD = jnp.broadcast_to(fam_LFD[:, None], state.feedback.fam_LBFD.shape).astype(state.feedback.fam_LBFD.dtype)
        feedback = Feedback(
            fam_LBFD, jnp.maximum(state.cursor.document_B, 1), jnp.zeros_like(state.feedback.fresh_B), jnp.asarray(state.cursor.position_B)
        )
        keys = self._fam_keys(feedback, state.cursor.planned_B)
        return state._replace(cache=self._with_fam_keys(state.cache, keys), feedback=feedback)

    def room(self, state: FamState) -> None:
        """None: the state does not grow."""

    def prompt_stream(self) -> jax.Array:
        """The FAM that enters each layer at a document's first block, [L, F, D]: what the layers below make of the prompt alone."""
        config = self.config
        turns = fam_rotation(config, jnp.zeros(1, jnp.int32), jnp.full(1, config.rope.planned, jnp.int32))

        def layer(fam_1FD, block):
            o_1FHK = attention.attend(*block.project(fam_1FD, turns), jnp.ones((1, config.fam_length, config.fam_length), bool))
            return block.finish(fam_1FD, o_1FHK), fam_1FD[0]

        return jax.lax.scan(layer, use(self.prompt, at_least_float32(config.dtype))[None], self.blocks)[1]

    def hidden(
        self, tokens_BT: jax.Array, state: FamState, segment_ids_BT: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, FamState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document. Documents are separate, memory and FAM included;
            a model that is to learn to forget by itself is given one id for all.
          dropout_key: draws the blocks that FAM reads again, in training with `training_rereads`; None: none.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token.

        Raises:
          UserError: the mesh splits sequences.
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, (B, T), mesh = self.config, tokens_BT.shape, jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["context"] > 1:
            raise UserError(f"mesh.context is {mesh.shape['context']}; with TransformerFAM, which reads block after block, it must be 1")
        if T == 0:
            return jnp.zeros((B, T, config.dim), config.dtype), state
        place, next_cursor = cursor.advance(state.cursor, T, segment_ids_BT)
        if T == 1:
            hidden_BTD, state = self._read_one(tokens_BT, place, state)
            return hidden_BTD, state._replace(cursor=next_cursor)

        at_start, packed, first_LFD = cursor.at_start(state.cursor), segment_ids_BT is not None, None
        if config.fam_length:
            if at_start or config.fam_query == "static":
                first_LFD = self.prompt_stream()
            else:
                begins_B = jnp.any((place.document_BT > 0) & (place.document_BT != state.feedback.document_B[:, None]), axis=1)
                first_LFD = self._prompt_stream_if(jnp.any(begins_B))
            state = state._replace(feedback=enter(state.feedback, place, first_LFD))
        held_B = None if at_start else state.cursor.count_B % config.block
        if config.schedule == "layers":
            x_BTD, state = self._read(
                self.embedding(tokens_BT), place, state, first_LFD, held_B, within=False, packed=packed, reread_key=dropout_key
            )
        else:
            x_BTD, state = self._read_block_by_block(tokens_BT, place, state, first_LFD, held_B, packed=packed)
        return self.norm(x_BTD), state._replace(cursor=next_cursor)

    def _read(
        self, x_BTD, place: Place, state: FamState, first_LFD, held_B, *, within: bool, packed: bool, reread_key: jax.Array | None = None
    ) -> tuple[jax.Array, FamState]:
        """Embedded tokens through all layers, one after the other; the cursor stays."""
        call, slot_BW, slots, feedback = begin_call(
            self.config,
            place,
            state.slots,
            state.feedback,
            state.cursor.planned_B,
            held_B,
            within=within,
            packed=packed,
            reread_key=reread_key if self.config.training_rereads else None,
        )

        def layer(x_BTD, of_layer):
            block, cache, fam_BFD, first_FD = of_layer
            x_BTD, new, fam_BFD = block(x_BTD, cache, fam_BFD, first_FD, call, packed=packed)
            return x_BTD, (new, fam_BFD)

        layer = jax.checkpoint(layer) if self.config.remat else layer
        fam_LBFD = None if feedback is None else feedback.fam_LBFD
        x_BTD, (new, fam_LBFD) = jax.lax.scan(layer, x_BTD, (self.blocks, state.cache, fam_LBFD, first_LFD))
        cache = attention.write_layers(state.cache, new, slot_BW)
        feedback = None if feedback is None else feedback._replace(fam_LBFD=fam_LBFD)
        return x_BTD, state._replace(slots=slots, cache=cache, feedback=feedback)

    def _read_block_by_block(
        self, tokens_BT, place: Place, state: FamState, first_LFD, held_B, *, packed: bool
    ) -> tuple[jax.Array, FamState]:
        """Tokens through all layers of a block before the next; the cursor stays."""
        T, C = tokens_BT.shape[1], self.config.block
        held_B = jnp.zeros_like(place.index_BT[:, 0]) if held_B is None else held_B
        tokens_NBC, position_NBC, document_NBC = (attention.lay(x, held_B, C) for x in (tokens_BT, place.position_BT, place.document_BT))
        first_BC = (place.index_BT[:, 0] - held_B)[:, None] + jnp.arange(C, dtype=jnp.int32)[None]
        numbers_N = jnp.arange(len(tokens_NBC), dtype=jnp.int32)

        @jax.checkpoint
        def read(state, piece):
            tokens_BC, position_BC, document_BC, number = piece
            here = Place(first_BC + number * C, position_BC, document_BC)
            held_here_B = jnp.where(number == 0, held_B, 0)
            x_BCD, state = self._read(self.embedding(tokens_BC), here, state, first_LFD, held_here_B, within=True, packed=packed)
            return state, x_BCD

        state, x_NBCD = jax.lax.scan(read, state, (tokens_NBC, position_NBC, document_NBC, numbers_N))
        return attention.unlay(x_NBCD, held_B, T), state

    def _read_one(self, tokens_B1, place: Place, state: FamState) -> tuple[jax.Array, FamState]:
        """`hidden` of one token; the cursor stays. FAM's part is done for rows that begin a document or complete a block, else for none."""
        config, (cache, feedback) = self.config, state[2:]
        C, S, (B, _) = config.block, config.span, tokens_B1.shape
        index_B, document_B = place.index_BT[:, 0], place.document_BT[:, 0]
        seen_B1S = attention.visible(
            place.index_BT, place.document_BT, state.slots, attention.block_sliding(config.block, config.memory_blocks)
        )
        if feedback is not None:
            keys = Cache(*(x_LBS[:, :, S:] for x_LBS in cache))
            feedback, keys = jax.lax.cond(
                jnp.any(entering(feedback, place)), self._entered, lambda *now: now[:2], feedback, keys, place, state.cursor.planned_B
            )
            cache = self._with_fam_keys(cache, keys)
            seen_B1S = jnp.concatenate([seen_B1S, jnp.ones((B, 1, config.fam_length), bool)], axis=2)
        visible_cache = cache
        if config.stop_memory_gradient:
            own_BS = jnp.pad(state.slots.position_BS // C == index_B[:, None] // C, ((0, 0), (0, config.fam_length)), constant_values=True)
            visible_cache = Cache(*(jnp.where(own_BS[None, ..., None, None], x, jax.lax.stop_gradient(x)) for x in cache))
        turns = rotation(config.rope, config.head_size, place.position_BT, state.cursor.planned_B, at_least_float32(config.dtype))

        def layer(x_B1D, block_and_cache):
            block, cache = block_and_cache
            q_B1HK, k_B1GK, v_B1GK = block.project(x_B1D, turns)
            return block.finish(x_B1D, attention.attend_one(q_B1HK, k_B1GK, v_B1GK, cache, seen_B1S)), Cache(k_B1GK, v_B1GK)

        x_B1D, new = jax.lax.scan(layer, self.embedding(tokens_B1), (self.blocks, visible_cache))
        slot_B1 = jnp.where(place.document_BT > 0, place.index_BT % S, jnp.iinfo(jnp.int32).max)
        cache = attention.write_layers(cache, new, slot_B1)
        slots = Slots(*(attention.write(*pair, slot_B1) for pair in zip(state.slots, (place.index_BT, place.document_BT))))
        state = state._replace(slots=slots, cache=cache, feedback=feedback)
        if feedback is not None:
            completes_B = (document_B > 0) & (index_B % C == C - 1)
            feedback, keys = jax.lax.cond(
                jnp.any(completes_B), self._updated, lambda state, keys, *_: (state.feedback, keys), state, keys, place, completes_B
            )
            state = state._replace(cache=self._with_fam_keys(cache, keys), feedback=feedback)
        return self.norm(x_B1D), state

    def _entered(self, feedback: Feedback, keys: Cache, place: Place, planned_B) -> tuple[Feedback, Cache]:
        """`enter`, and the keys and values of FAM then."""
        enters_B = entering(feedback, place)
        feedback = enter(feedback, place, self.prompt_stream())
        return feedback, select_rows(enters_B, self._fam_keys(feedback, planned_B), keys, layers=True)

    def _updated(self, state: FamState, keys: Cache, place: Place, completes_B) -> tuple[Feedback, Cache]:
        """FAM, with its keys and values, after the tokens in `place`, whose keys the cache has, in rows of which they complete a block."""
        config, feedback, planned_B = self.config, state.feedback, state.cursor.planned_B
        number_B, behind_B = place.index_BT[:, 0] // config.block, place.position_BT[:, 0] + 1
        slot_BC = (number_B % (config.memory_blocks + 1) * config.block)[:, None] + jnp.arange(config.block, dtype=jnp.int32)[None]
        own_LBC = Cache(*(jnp.take_along_axis(x_LBS, slot_BC[None, ..., None, None], axis=2) for x_LBS in state.cache))
        seen_BC = jnp.take_along_axis(state.slots.document_BS, slot_BC, axis=1) == feedback.document_B[:, None]
        now, then = (fam_rotation(config, position_B, planned_B) for position_B in (feedback.position_B, behind_B))

        def layer(block, fam_BFD, keys, own, first_FD):
            q_BFHK, _, _ = block.fam_project(fam_BFD, now, first_FD)
            fam_BFD = block.update(fam_BFD, q_BFHK, *keys, own, seen_BC, feedback.fresh_B, first_FD)
            if config.detach_every:
                fam_BFD = select_rows((number_B + 1) % config.detach_every == 0, jax.lax.stop_gradient(fam_BFD), fam_BFD)
            return fam_BFD, Cache(*block.fam_project(fam_BFD, then, first_FD)[1:])

        first_LFD = self.prompt_stream() if config.fam_query == "static" else None
        after_LBFD, after_keys = jax.vmap(layer)(self.blocks, feedback.fam_LBFD, keys, own_LBC, first_LFD)
        feedback = Feedback(
            select_rows(completes_B, after_LBFD, feedback.fam_LBFD, layers=True),
            feedback.document_B,
            feedback.fresh_B & ~completes_B,
            jnp.where(completes_B, behind_B, feedback.position_B),
        )
        return feedback, select_rows(completes_B, after_keys, keys, layers=True)

    def _prompt_stream_if(self, needed: jax.Array) -> jax.Array:
        """`prompt_stream`, or zeros where no row needs it."""
        shape, dtype = (self.config.layers, self.config.fam_length, self.config.dim), at_least_float32(self.config.dtype)
        return jax.lax.cond(needed, self.prompt_stream, lambda: jnp.zeros(shape, dtype))

    def _fam_keys(self, feedback: Feedback, planned_B) -> Cache:
        """Keys and values of FAM, [L, B, F, G, K]."""
        turns = fam_rotation(self.config, feedback.position_B, planned_B)
        return Cache(*jax.vmap(lambda block, fam_BFD: block.project(fam_BFD, turns)[1:])(self.blocks, feedback.fam_LBFD))

    def _with_fam_keys(self, cache: Cache, keys: Cache) -> Cache:
        return Cache(*(held.at[:, :, self.config.span :].set(new) for held, new in zip(cache, keys)))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(self, tokens_BT: jax.Array, state: FamState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, FamState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state


def shifted(state: FamState, offset_B: jax.Array, segment_B: jax.Array | int = 1) -> FamState:
    """A state of no token yet, from `init_state`, whose first document, that with id `segment_B`, begins at these positions, int32,
    instead of 0 (appendix B.2.2)."""
    ones_B = jnp.ones_like(offset_B)
    return state._replace(cursor=state.cursor._replace(position_B=offset_B, document_B=ones_B, segment_B=ones_B * segment_B))
