"""TransformerFAM: a Llama-style Transformer with block-sliding windows whose layers each feed a few activations back to themselves, block
after block (Hwang et al. 2024, arXiv 2404.09173 v3).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, L layers, N blocks that a call touches, C tokens
per block, S ring slots, W slots written by a call, F rows of the feedback memory (FAM), P keys of FAM that tokens may see, V vocabulary.

Nothing is added to the Transformer but the prompt [F, D] that FAM begins as. FAM asks the tokens of a block and itself through the layer's
own projections, passes its feed-forward, and is what the tokens of the next block see. It depends on keys and values of tokens, never on
what the layer makes of them. So a layer reads all its blocks in three steps: keys and values of all tokens at once; a scan over blocks on
the rows of FAM alone; attention of all tokens at once.

In a document's first block FAM is the prompt as it passes up the layers by itself (`prompt_stream`). An update by that block of what the
layer below saw of it would tell tokens what follows them.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.fam_attention import Call, FamConfig, Feedback, begin_call, enter, entering, fam_rotation, lay_blocks
from infinicontext.nn import attention, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, use
from infinicontext.nn.rope import apply_rope, rotation
from infinicontext.sharding import constrain


class FamState(NamedTuple):
    """Everything the model remembers, of constant size.

    A row has, per layer, 2 (S + F) G K values, S = (memory_blocks + 1) block, and 4 F D bytes of FAM; and once 8 S + 29 bytes.
    """

    cursor: Cursor
    slots: Slots  # position: number of the token in its row, over all documents; token i lies in slot i % S
    cache: Cache  # k, rotated, and v [L, B, S + F, G, K]; those of FAM come last
    feedback: Feedback | None  # None without FAM


class Attention(nnx.Module):
    """The projections of grouped-query attention, which serve tokens and FAM alike."""

    def __init__(self, config: FamConfig, rngs: nnx.Rngs):
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

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, not rotated."""
        config, dtype = self.config, x_BTD.dtype
        q_BTHK, k_BTGK, v_BTGK = (jnp.einsum("btd,dhk->bthk", x_BTD, use(w, dtype)) for w in (self.q, self.k, self.v))
        if config.attention_bias:
            q_BTHK += use(self.q_bias, dtype)[None, None]
            k_BTGK += use(self.k_bias, dtype)[None, None]
            v_BTGK += use(self.v_bias, dtype)[None, None]
        if config.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        return q_BTHK, k_BTGK, v_BTGK

    def output(self, o_BTHK: jax.Array) -> jax.Array:
        """What the heads read -> what is added to x."""
        dtype = o_BTHK.dtype
        o_BTD = jnp.einsum("bthk,hkd->btd", o_BTHK, use(self.o, dtype))
        return o_BTD + use(self.o_bias, dtype)[None, None] if self.config.output_bias else o_BTD


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x), for tokens in the compute dtype and for FAM in float32 or wider."""

    def __init__(self, config: FamConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.dim, epsilon=config.norm_epsilon)
        self.feed_forward = SwiGLU(
            config.dim, config.feed_forward_size, config.dtype, (2 * config.layers) ** -0.5, rngs, bias=config.feed_forward_bias
        )

    def project(self, x_BTD: jax.Array, turns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, rotated, and values, in the compute dtype."""
        q_BTHK, k_BTGK, v_BTGK = self.attention.project(self.attention_norm(x_BTD).astype(self.config.dtype))
        return apply_rope(q_BTHK, *turns), apply_rope(k_BTGK, *turns), v_BTGK

    def finish(self, x_BTD: jax.Array, o_BTHK: jax.Array, *, feed_forward: bool = True) -> jax.Array:
        """What the heads have read, added to x, and the feed-forward."""
        x_BTD = x_BTD + self.attention.output(o_BTHK).astype(x_BTD.dtype)
        if feed_forward:
            x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD).astype(self.config.dtype)).astype(x_BTD.dtype)
        return constrain(x_BTD, ("batch", "context", None))

    def fam_project(self, fam_BFD: jax.Array, turns, first_FD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`project` for FAM; a static query is that of the prompt's stream."""
        q_BFHK, k_BFGK, v_BFGK = self.project(fam_BFD, turns)
        if self.config.fam_query == "static":
            q_BFHK, _, _ = self.project(jnp.broadcast_to(first_FD[None], fam_BFD.shape), turns)
        return q_BFHK, k_BFGK, v_BFGK

    def update(self, fam_BFD, q_BFHK, k_BFGK, v_BFGK, own: Cache, seen_BC, fresh_B, first_FD) -> jax.Array:
        """The FAM after a block of C tokens, of which it sees some and no other block's (section 2.2, algorithm 2)."""
        config = self.config
        keys, values = (jnp.concatenate(pair, axis=1) for pair in ((k_BFGK, own.k_BSGK), (v_BFGK, own.v_BSGK)))
        seen_B1X = jnp.concatenate([jnp.ones((seen_BC.shape[0], config.fam_length), bool), seen_BC], axis=1)[:, None]
        seen_BFX = jnp.broadcast_to(seen_B1X, (seen_BC.shape[0], config.fam_length, seen_B1X.shape[2]))
        o_BFHK = attention.attend(q_BFHK, keys, values, seen_BFX)
        residual_BFD = fam_BFD if config.fam_query == "copy" else jnp.broadcast_to(first_FD[None], fam_BFD.shape)
        residual_BFD = jnp.where(fresh_B[:, None, None], 0, residual_BFD)
        return self.finish(residual_BFD, o_BFHK, feed_forward=config.fam_feed_forward)

    def feed_back(self, own: Cache, fam_BFD: jax.Array, first_FD: jax.Array, call: Call, *, packed: bool) -> tuple[Cache, jax.Array, Cache]:
        """Block after block, on the rows of FAM alone.

        Args:
          own: rotated keys and values of each block's tokens [N, B, C].
          fam_BFD: before the call.
          first_FD: the prompt's in this layer.
          call: from `begin_call`.
          packed: as there.

        Returns:
          The keys and values of FAM that tokens of each block may see [N, B, P], the FAM after the call, and its keys and values [B, F].
        """
        updates, N = call.updates, own.k_BSGK.shape[0]
        before = (fam_BFD, *self.fam_project(fam_BFD, call.entering_rotation, first_FD))
        if packed:
            prompt_BFD = jnp.broadcast_to(first_FD[None], fam_BFD.shape)
            prompt = (prompt_BFD, *self.fam_project(prompt_BFD, call.prompt_rotation, first_FD))

        def step(entering, xs):
            own, update = xs
            current = _select(update.replaced_NB, prompt, entering) if packed else entering
            after_BFD = self.update(*current, own, update.seen_NBC, update.fresh_NB, first_FD)
            if self.config.detach_every:
                after_BFD = _select(update.detaches_NB, jax.lax.stop_gradient(after_BFD), after_BFD)
            after = (after_BFD, *self.fam_project(after_BFD, update.rotation, first_FD))
            return _select(update.completes_NB, after, current), Cache(*entering[2:])

        (fam_BFD, _, *last), keys = jax.lax.scan(step, before, (jax.tree.map(lambda x: x[: len(updates.fresh_NB)], own), updates))
        last = Cache(*last)
        if len(updates.fresh_NB) < N:
            keys = jax.tree.map(lambda x_NBF, last_BF: jnp.concatenate([x_NBF, last_BF[None]]), keys, last)
        if packed:
            also = lambda x_NBF, x_BF: jnp.concatenate([x_NBF, jnp.broadcast_to(x_BF[None], x_NBF.shape)], axis=2)
            keys = jax.tree.map(also, keys, Cache(*prompt[2:]))
        return keys, fam_BFD, last

    def __call__(
        self, x_BTD: jax.Array, cache: Cache, fam_BFD: jax.Array | None, first_FD: jax.Array | None, call: Call, *, packed: bool
    ) -> tuple[jax.Array, Cache, jax.Array | None]:
        """x_BTD, the layer's cache and FAM before the call -> x_BTD, the keys and values to be cached [B, W], the FAM after it."""
        config = self.config
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, call.rotation)
        stays = lambda x_BT: x_BT if call.stays_BW is None else jnp.take_along_axis(x_BT, call.stays_BW[..., None, None], axis=1)
        new, keys = Cache(stays(k_BTGK), stays(v_BTGK)), []
        for x_BTGK, held_BSGK in zip((k_BTGK, v_BTGK), cache):
            keys.append(lay_blocks(x_BTGK, held_BSGK[:, : config.span], call, stop_gradient=config.stop_memory_gradient))
        own, window = (Cache(*pair) for pair in zip(*keys))
        if fam_BFD is not None:
            seen, fam_BFD, last = self.feed_back(own, fam_BFD, first_FD, call, packed=packed)
            window = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), seen, window)
            new = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), new, last)
        q_NBCHK = attention.lay(q_BTHK, call.held_B, config.block)
        o_NBCHK = attention.attend_chunks(q_NBCHK, *window, call.documents, first_seen_NBCP=call.fam_seen_NBCP)
        return self.finish(x_BTD, attention.unlay(o_NBCHK, call.held_B, x_BTD.shape[1])), new, fam_BFD


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

    def hidden(self, tokens_BT: jax.Array, state: FamState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, FamState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document. Documents are separate, memory and FAM included;
            a model that is to learn to forget by itself is given one id for all.

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
            x_BTD, state = self._read(self.embedding(tokens_BT), place, state, first_LFD, held_B, within=False, packed=packed)
        else:
            x_BTD, state = self._read_block_by_block(tokens_BT, place, state, first_LFD, held_B, packed=packed)
        return self.norm(x_BTD), state._replace(cursor=next_cursor)

    def _read(self, x_BTD, place: Place, state: FamState, first_LFD, held_B, *, within: bool, packed: bool) -> tuple[jax.Array, FamState]:
        """Embedded tokens through all layers, one after the other; the cursor stays."""
        call, slot_BW, slots, feedback = begin_call(
            self.config, place, state.slots, state.feedback, state.cursor.planned_B, held_B, within=within, packed=packed
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
        return feedback, _select(enters_B, self._fam_keys(feedback, planned_B), keys, layers=True)

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
            return fam_BFD, Cache(*block.fam_project(fam_BFD, then, first_FD)[1:])

        first_LFD = self.prompt_stream() if config.fam_query == "static" else None
        after_LBFD, after_keys = jax.vmap(layer)(self.blocks, feedback.fam_LBFD, keys, own_LBC, first_LFD)
        if config.detach_every:
            detaches_B = (number_B + 1) % config.detach_every == 0
            after_LBFD, after_keys = _select(
                detaches_B, jax.lax.stop_gradient((after_LBFD, after_keys)), (after_LBFD, after_keys), layers=True
            )
        feedback = Feedback(
            _select(completes_B, after_LBFD, feedback.fam_LBFD, layers=True),
            feedback.document_B,
            feedback.fresh_B & ~completes_B,
            jnp.where(completes_B, behind_B, feedback.position_B),
        )
        return feedback, _select(completes_B, after_keys, keys, layers=True)

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


def shifted(state: FamState, offset_B: jax.Array) -> FamState:
    """A state of no token yet, from `init_state`, whose first document begins at these positions, int32, instead of 0 (appendix B.2.2).

    With segment ids, the first document's must be 1.
    """
    ones_B = jnp.ones_like(offset_B)
    return state._replace(cursor=state.cursor._replace(position_B=offset_B, document_B=ones_B, segment_B=ones_B))


def _select(mask_B: jax.Array, new, old, *, layers: bool = False):
    """Rows of one tree of arrays or of the other; with `layers` rows are their second axis."""
    expand = lambda x: mask_B.reshape((1,) * layers + (-1,) + (1,) * (x.ndim - 1 - layers))
    return jax.tree.map(lambda a, b: jnp.where(expand(a), a, b), new, old)
