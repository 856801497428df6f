"""Infini-attention: a Llama-style Transformer that attends within segments and remembers all before them in a matrix per head (Munkhdalai,
Faruqui and Gopal 2024, arXiv 2404.07143 v2).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K key size, U value size (= K in the model), F feed-forward
size, L layers, N segments that a call touches, C columns of a segment, S cache slots, M slots written by a call, V vocabulary, R rotated
pairs.

Each head mixes two readings by a learned gate: softmax attention over the open segment, whose queries and keys are rotated, and what the
memory (nn/compressive_memory.py) recalls for the query without its position. Nothing else is added to the Transformer.
"""

import dataclasses
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.nn import attention, context, context_memory, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.compressive_memory import Memory, Owner, Segments, empty_memory, no_owner, recall, segments
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, use
from infinicontext.nn.rope import RopeConfig, apply_rope, rope_table, rotation
from infinicontext.sharding import constrain


@dataclasses.dataclass(frozen=True)
class InfiniConfig:
    """Shape and options of a Transformer with Infini-attention."""

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads; there is a memory for each
    head_dim: int | None = None  # None: dim // heads
    feed_forward: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    segment: int = 256  # tokens
    previous_segment: bool = False  # local attention also sees the whole segment before the token's own
    update: Literal["linear", "delta"] = "delta"
    empty_memory: Literal["literal", "bypass"] = "literal"  # bypass: the gate is 0 for tokens with nothing to read
    memory_epsilon: float = 1e-6  # least denominator of what is read
    normalizer_horizon: int | None = None  # segments of a document after which the memory's normalizer stands still; None: never
    gate: Literal["learned", "closed"] = "learned"  # closed: 0 for all heads, the control without memory
    gate_init: float = 0.0  # logit
    detach_every: int = 0  # gradients do not flow back through the memory beyond every so many segments; 0: they do
    schedule: Literal["layers", "segments"] = "layers"  # segments: all layers of a segment before the next, in constant memory
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    attention_bias: bool = False  # biases of the q, k and v projections (Qwen2)
    output_bias: bool = False  # bias of the attention's output projection
    feed_forward_bias: bool = False  # biases of the three feed-forward projections
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation (Qwen3); the memory's are normalised too
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of activations and caches; parameters and memory are float32
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations

    def __post_init__(self):
        for name in ("vocab_size", "dim", "layers", "heads", "segment"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("kv_heads", "head_dim", "feed_forward", "normalizer_horizon"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.memory_epsilon <= 0:
            raise UserError(f"model.memory_epsilon is {self.memory_epsilon}; it must be greater than 0")
        if self.detach_every < 0:
            raise UserError(f"model.detach_every is {self.detach_every}; it must be 0 or more")
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
    def span(self) -> int:
        """S."""
        return self.segment * (1 + self.previous_segment)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, averaged over a sequence of `length`; multiply and add count as two."""
        H, G, K = self.heads, self.kv_head_count, self.head_size
        seen = min((length + 1) / 2, (self.segment + 1) / 2 + self.previous_segment * self.segment)
        attend = 2 * H * K * seen
        if self.gate == "learned":
            attend += (H + G) * K * (K + 1) + (self.update == "delta") * G * K * (K + 1)
        projections = 2 * self.dim * K * (H + G)
        return 2 * (self.layers * (projections + 3 * self.dim * self.feed_forward_size + attend) + self.dim * self.vocab_size)

    @staticmethod
    def examples() -> dict[str, "InfiniConfig"]:
        """Tiny models that together use every option: what the tests run."""
        tiny = InfiniConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, segment=4)
        return {
            "delta": tiny,
            "linear": dataclasses.replace(
                tiny,
                update="linear",
                kv_heads=None,
                segment=5,
                previous_segment=True,
                empty_memory="bypass",
                normalizer_horizon=2,
                gate_init=-1.0,
                rope=RopeConfig("dynamic", factor=2.0, original_length=16),
                remat=False,
            ),
            "segments": dataclasses.replace(
                tiny,
                kv_heads=1,
                memory_epsilon=1e-3,
                normalizer_horizon=1,
                detach_every=2,
                schedule="segments",
                attention_bias=True,
                output_bias=True,
                feed_forward_bias=True,
                qk_norm=True,
                tied_embeddings=True,
                head_dim=6,
            ),
            "closed": dataclasses.replace(tiny, segment=7, gate="closed"),
        }


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


class Call(NamedTuple):
    """What all layers of a call share.

    Arrays stay [B, T] `within` one segment, and where tokens are split over devices; otherwise they are laid out, [N, B, C].
    """

    place: Place  # positions are numbers in the row
    held_B: jax.Array  # int32, tokens of the open segment before the call
    slots: Slots  # what the cache holds before the call
    segments: Segments  # with a leading axis of shards where tokens are split over devices
    rotation: tuple[jax.Array, jax.Array]  # cos and sin [B, T, R] or [N B, C, R]
    stays_BM: jax.Array | None  # int32, the tokens of the call that the cache holds after it; None: all
    stays_rotation: tuple[jax.Array, jax.Array]  # [B, M, R]


def begin_call(
    config: InfiniConfig,
    before: Cursor,
    place: Place,
    slots: Slots,
    owner: Owner,
    *,
    within: bool,
) -> tuple[Call, jax.Array, Slots, Owner]:
    """What the layers need to know -> that, the slots that the M tokens are written to [B, M], what slots hold then, and the owner then."""
    (B, T), S = place.index_BT.shape, config.span
    shards = 1 if within else context.shard_count(T)
    where = (place, owner, before.document_B, config.segment)
    options = {"normalizer_horizon": config.normalizer_horizon, "detach_every": config.detach_every}
    if shards == 1:
        memory_segments, owner = segments(*where, within=within, **options)
    else:
        memory_segments, owner = context_memory.segments(*where, shards, **options)
    held_B = before.count_B % config.segment
    numbers = place._replace(position_BT=place.index_BT)
    slot_BM, stays_BM = attention.slot_index(place, S, ring=True), None
    if T > S:
        rows_B1, columns_1T = jnp.arange(B, dtype=jnp.int32)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
        last_BS = jnp.full((B, S), -1, jnp.int32).at[rows_B1, slot_BM].set(jnp.broadcast_to(columns_1T, (B, T)), mode="drop")
        stays_BM, slot_BM = jnp.maximum(last_BS, 0), jnp.where(last_BS >= 0, jnp.arange(S, dtype=jnp.int32)[None], S)
    stays = lambda x_BT: x_BT if stays_BM is None else jnp.take_along_axis(x_BT, stays_BM, axis=1)
    after = Slots(
        attention.write(slots.position_BS, stays(place.index_BT), slot_BM),
        attention.write(slots.document_BS, stays(place.document_BT), slot_BM),
    )
    turn = lambda position_BT, planned_B: rotation(config.rope, config.head_size, position_BT, planned_B, at_least_float32(config.dtype))
    if within or shards > 1:
        turns = turn(place.position_BT, before.planned_B)
    else:
        position_NBC = attention.lay(place.position_BT, held_B, config.segment)
        turns = turn(position_NBC.reshape(-1, config.segment), jnp.tile(before.planned_B, len(position_NBC)))
    stays_turns = turn(stays(place.position_BT), before.planned_B)
    return Call(numbers, held_B, slots, memory_segments, turns, stays_BM, stays_turns), slot_BM, after, owner


def infini_attention(
    config: InfiniConfig,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGU: jax.Array,
    gate_H: jax.Array,
    cache: Cache,
    memory: Memory,
    call: Call,
    *,
    within: bool,
    parallel: bool | None = None,
) -> tuple[jax.Array, Cache, Memory]:
    """Equations 6 to 10: what the open segment and the memory say, mixed by the gate.

    Args:
      config: options.
      q_BTHK: queries that are not rotated.
      k_BTGK: keys that are not rotated.
      v_BTGU: values.
      gate_H: logits, float32 or wider.
      cache: of this layer before the call.
      memory: of this layer before the call.
      call: from `begin_call`.
      within: as there.
      parallel: as in `recall`.

    Returns:
      o_BTHU in q's dtype, the rotated keys and the values that the cache is to hold, [B, M], and the memory after the call.
    """
    T, C = q_BTHK.shape[1], config.segment
    stays = lambda x_BT: x_BT if call.stays_BM is None else jnp.take_along_axis(x_BT, call.stays_BM[..., None, None], axis=1)
    new = Cache(apply_rope(stays(k_BTGK), *call.stays_rotation), stays(v_BTGU))
    reach = attention.block_sliding(C, int(config.previous_segment))
    attend = lambda q, k, v, place, cache, slots, dropout: attention.window_attention(q, k, v, place, cache, slots, reach)
    rule = {"update": config.update, "epsilon": config.memory_epsilon}

    # What the open segment says, what the memory says and who may read it: [B, T, ...], or laid out.
    recalled = reads = None
    if within:
        rotated_BTHK = apply_rope(q_BTHK, *call.rotation)
        if T == 1:
            seen_B1S = attention.visible(call.place.position_BT, call.place.document_BT, call.slots, reach)
            local = attention.attend_one(rotated_BTHK, *new, cache, seen_B1S)
        else:
            local = attend(rotated_BTHK, *new, call.place, cache, call.slots, None)
        if config.gate == "learned":
            recalled, memory = recall(q_BTHK[None], k_BTGK[None], v_BTGU[None], memory, call.segments, **rule)
            recalled, reads = recalled[0], call.segments.reads_NBC[0]
    elif context.shard_count(T) > 1:
        rotated = (apply_rope(x_BTHK, *call.rotation) for x_BTHK in (q_BTHK, k_BTGK))
        local = context.attention(attend, *rotated, v_BTGU, call.place, cache, call.slots, None)
        if config.gate == "learned":
            tokens = (q_BTHK, k_BTGK, v_BTGU, call.place)
            recalled, reads, memory = context_memory.recall(*tokens, memory, call.segments, C, **rule)
    else:
        laid = [attention.lay(x_BT, call.held_B, C) for x_BT in (q_BTHK, k_BTGK, v_BTGU)]
        local = _local_attention(config, *laid, cache, call)
        if config.gate == "learned":
            recalled, memory = recall(*laid, memory, call.segments, **rule, parallel=parallel)
            reads = call.segments.reads_NBC

    if recalled is not None:
        share = jax.nn.sigmoid(gate_H.astype(recalled.dtype)).reshape((1,) * (recalled.ndim - 2) + (-1, 1))
        if config.empty_memory == "bypass":
            share = jnp.where(reads[..., None, None], share, 0)
        local = (share * recalled + (1 - share) * local.astype(recalled.dtype)).astype(q_BTHK.dtype)
    o_BTHU = local if local.ndim == 4 else attention.unlay(local, call.held_B, T)
    return jnp.where(call.place.document_BT[..., None, None] > 0, o_BTHU, 0), new, memory


def _local_attention(config: InfiniConfig, q_NBCHK, k_NBCGK, v_NBCGU, cache: Cache, call: Call) -> jax.Array:
    """Softmax attention of tokens laid out in segments; the cache has those before them."""
    C, N = config.segment, len(q_NBCHK)
    turn = lambda x_NBC: apply_rope(x_NBC.reshape(-1, *x_NBC.shape[2:]), *call.rotation).reshape(x_NBC.shape)
    document_NBC = attention.lay(call.place.document_BT, call.held_B, C)
    keys = (turn(k_NBCGK), v_NBCGU, document_NBC)
    held = (*cache, call.slots.document_BS)

    # The ring's halves change places with every segment; without the previous segment it is one.
    number_B = call.place.index_BT[:, 0] // C
    earlier_BC = jnp.arange(C, dtype=jnp.int32)[None] < call.held_B[:, None]

    def half(x_BS, segments_back):
        first_BC, second_BC = x_BS[:, :C], x_BS[:, -C:]
        return _select((number_B - segments_back) % 2 == 0, first_BC, second_BC) if config.previous_segment else first_BC

    keys = tuple(x.at[0].set(_select(earlier_BC, half(old, 0), x[0])) for x, old in zip(keys, held))
    queries_documents = keys[2]
    if config.previous_segment:
        keys = tuple(jnp.concatenate([jnp.concatenate([half(old, 1)[None], x[: N - 1]]), x], axis=2) for x, old in zip(keys, held))
    return attention.attend_chunks(turn(q_NBCHK), keys[0], keys[1], (queries_documents, keys[2]))


def _select(mask, x, otherwise):
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, otherwise)


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

    def __call__(self, x_BTD: jax.Array, cache: Cache, memory: Memory, call: Call, *, within: bool) -> tuple[jax.Array, Cache, Memory]:
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
        o_BTHK, new, memory = infini_attention(config, q_BTHK, k_BTGK, v_BTGK, gate_H, cache, memory, call, within=within)
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
            `longrope` (nn/rope.py). None: the capacity or, without that, what the config plans for.
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
        return jax.nn.sigmoid(self.blocks.attention.gate[...])

    def hidden(self, tokens_BT: jax.Array, state: InfiniState, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, InfiniState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token.
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, (B, T) = self.config, tokens_BT.shape
        if T == 0:
            return jnp.zeros((B, T, config.dim), config.dtype), state
        if T == 1 or config.schedule == "layers":
            return self._read(tokens_BT, state, segment_ids_BT, within=T == 1)
        return self._read_segment_by_segment(tokens_BT, state, segment_ids_BT)

    def _read_segment_by_segment(self, tokens_BT, state: InfiniState, segment_ids_BT) -> tuple[jax.Array, InfiniState]:
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
            hidden_BCD, state = self._read(piece[0], state, piece[1], within=True)
            return state, hidden_BCD

        state, hidden_NBCD = jax.lax.scan(read, state, pieces)
        back_BC1 = jnp.maximum(2 * jnp.arange(C, dtype=jnp.int32)[None] - column_BC, 0)[..., None]
        hidden_NBCD = hidden_NBCD.at[0].set(jnp.take_along_axis(hidden_NBCD[0], back_BC1, axis=1))
        return attention.unlay(hidden_NBCD, held_B, T), state

    def _read(self, tokens_BT, state: InfiniState, segment_ids_BT, *, within: bool) -> tuple[jax.Array, InfiniState]:
        """`hidden`, layer by layer."""
        config = self.config
        place, next_cursor = cursor.advance(state.cursor, tokens_BT.shape[1], segment_ids_BT)
        call, slot_BM, slots, owner = begin_call(config, state.cursor, place, state.slots, state.owner, within=within)

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
