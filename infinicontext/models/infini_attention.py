"""One layer's Infini-attention between its projections, and its options (Munkhdalai, Faruqui and Gopal 2024, arXiv 2404.07143 v2).

Shape letters: B batch, T time, H query heads, G key/value heads, K key size, U value size (= K in the model), N segments that a call
touches, C columns of a segment, S cache slots, M slots written by a call, R rotated pairs.

Each head mixes two readings by a learned gate: softmax attention over the open segment, whose queries and keys are rotated, and what the
memory (nn/compressive_memory.py) recalls for the query without its position.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp

from infinicontext.errors import UserError
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn import attention, context, context_memory, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.compressive_memory import Memory, Owner, Segments, recall, segments
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.parameters import at_least_float32
from infinicontext.nn.rope import RopeConfig, apply_rope, rope_table, rotation


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
    normalizer_horizon: int | None = None  # whole segments of a document after which its normalizer stands still (delta rule); None: never
    training_horizons: tuple[int, int] | None = None  # in training each row has a horizon of its own, drawn from the first to the second
    training_dilution: tuple[int, int] | None = None  # in training a document's first segments, up to so many, count up to so often
    gate: Literal["learned", "closed"] = "learned"  # closed: 0 for all heads, the control without memory
    gate_init: float = 0.0  # logit
    detach_every: int = 0  # gradients do not flow back through the memory beyond every so many segments; 0: they do
    schedule: Literal["layers", "segments"] = "layers"  # segments: all layers of a segment before the next; reads in constant memory
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
        for name in ("update", "empty_memory", "gate", "schedule", "dtype"):
            allowed = get_args(get_type_hints(InfiniConfig)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        for name in ("vocab_size", "dim", "layers", "heads", "segment"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("kv_heads", "head_dim", "feed_forward", "normalizer_horizon"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        # The gradient of a quotient has the square of what it is divided by, which must not be 0 in float32.
        if not 1e-12 <= self.memory_epsilon < math.inf:
            raise UserError(f"model.memory_epsilon is {self.memory_epsilon}; it must be a number of 1e-12 or more")
        if not 0 < self.norm_epsilon < math.inf:
            raise UserError(f"model.norm_epsilon is {self.norm_epsilon}; it must be a number greater than 0")
        if not abs(self.gate_init) <= 10:
            raise UserError(f"model.gate_init is {self.gate_init}; it must be from -10 to 10, because beyond a gate hardly moves")
        if self.training_horizons is not None and not 1 <= self.training_horizons[0] <= self.training_horizons[1]:
            raise UserError(f"model.training_horizons is {self.training_horizons}; it must be two numbers, 1 or more, the smaller first")
        if self.training_dilution is not None and min(self.training_dilution) < 1:
            raise UserError(f"model.training_dilution is {self.training_dilution}; it must be two numbers, 1 or more: segments, factor")
        if self.detach_every < 0:
            raise UserError(f"model.detach_every is {self.detach_every}; it must be 0 or more")
        if self.head_dim is None and self.dim % self.heads:
            raise UserError(
                f"model.dim is {self.dim}, which is not a multiple of model.heads, {self.heads}; set model.head_dim or change one of them"
            )
        if self.heads % self.kv_head_count:
            raise UserError(f"model.heads is {self.heads}, which is not a multiple of model.kv_heads, {self.kv_heads}")
        rope_table(self.rope, self.head_size)

    @staticmethod
    def of(config: TransformerConfig, **options) -> "InfiniConfig":
        """With the weights of a Transformer, and options of Infini-attention."""
        shared = {field.name for field in dataclasses.fields(InfiniConfig)} & vars(config).keys()
        return InfiniConfig(**({name: getattr(config, name) for name in shared} | options))

    @property
    def transformer(self) -> TransformerConfig:
        """The Transformer with full attention that has the same weights but for the gates."""
        shared = {field.name for field in dataclasses.fields(TransformerConfig)} & vars(self).keys()
        return TransformerConfig(**{name: getattr(self, name) for name in shared})

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

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return self.training_horizons is not None or self.training_dilution is not None

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


class Call(NamedTuple):
    """What all layers of a call share.

    Arrays stay [B, T] `within` one segment, and where tokens are split over devices; otherwise they are laid out, [N, B, C].
    """

    place: Place  # positions are numbers in the row
    held_B: jax.Array | None  # int32, tokens of the open segment before the call; None: known to be 0
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
    drawn: dict[str, Any] | None = None,
) -> tuple[Call, jax.Array, Slots, Owner]:
    """What the layers need to know -> that, the slots that the M tokens are written to [B, M], what slots hold then, and the owner then.

    What is `drawn` in training are options of compressive_memory.segments.
    """
    (B, T), S = place.index_BT.shape, config.span
    shards = 1 if within else context.shard_count(T)
    held_B = None if cursor.at_start(before) else before.count_B % config.segment
    where = (place, owner, before.document_B, config.segment)
    options = {"normalizer_horizon": config.normalizer_horizon, "detach_every": config.detach_every} | (drawn or {})
    if shards == 1:
        memory_segments, owner = segments(*where, within=within, fresh=held_B is None, **options)
    else:
        memory_segments, owner = context_memory.segments(*where, shards, **options)
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
    # Attention reaches no further than the span, however long the stream will be, so its table is the one for that.
    planned_B = jnp.minimum(before.planned_B, S)
    turn = lambda position_BT, planned_B: rotation(config.rope, config.head_size, position_BT, planned_B, at_least_float32(config.dtype))
    if within or shards > 1:
        turns = turn(place.position_BT, planned_B)
    else:
        position_NBC = attention.lay(place.position_BT, held_B, config.segment)
        turns = turn(position_NBC.reshape(-1, config.segment), jnp.tile(planned_B, len(position_NBC)))
    stays_turns = turn(stays(place.position_BT), planned_B)
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

    def half(x_BS, segments_back):
        first_BC, second_BC = x_BS[:, :C], x_BS[:, -C:]
        return _select((number_B - segments_back) % 2 == 0, first_BC, second_BC) if config.previous_segment else first_BC

    if call.held_B is not None:
        earlier_BC = jnp.arange(C, dtype=jnp.int32)[None] < call.held_B[:, None]
        keys = tuple(x.at[0].set(_select(earlier_BC, half(old, 0), x[0])) for x, old in zip(keys, held))
    queries_documents = keys[2]
    if config.previous_segment:
        keys = tuple(jnp.concatenate([jnp.concatenate([half(old, 1)[None], x[: N - 1]]), x], axis=2) for x, old in zip(keys, held))
    return attention.attend_chunks(turn(q_NBCHK), keys[0], keys[1], (queries_documents, keys[2]))


def _select(mask, x, otherwise):
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, otherwise)
