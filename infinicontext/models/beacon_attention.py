"""Where the beacons of Activation Beacon stand, what they and tokens see, and what is kept of them (Zhang et al. 2024, arXiv 2401.03462 v1,
"Soaring from 4K to 400K", and v3, "Long Context Compression with Activation Beacon").

Shape letters: B batch (or any leading axes), C tokens of one chunk, N beacons among them, R = C + N rows, H query heads, G key/value heads,
K head size, S keys, M memory slots, W slots of the open chunk's tokens, P slots of its beacons, X rows that are kept.

A text is read in chunks. A beacon follows every so many tokens of a chunk (its ratio); when the chunk is complete, the keys and values of
its beacons are all that is kept of it. Positions are those of the compacted text: the slots of the memory, then the open chunk's rows.

A row's chunks are a grid over all its tokens, whatever documents they belong to; a document's first chunk may be shorter. Documents see and
keep nothing of one another. So packed documents read as they would alone, on the same grid.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp

from infinicontext.errors import UserError
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.cursor import Place
from infinicontext.nn.parameters import at_least_float32
from infinicontext.nn.rope import RopeConfig, apply_rope, rope_table, rotation


@dataclasses.dataclass(frozen=True)
class BeaconConfig:
    """Shape and options of a Transformer with beacons."""

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim // heads
    feed_forward: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    chunk: int = 256  # tokens; the papers' window
    ratios: tuple[int, ...] = (8,)  # tokens per beacon in a document's chunks, in turn; 0: the chunk's tokens are kept themselves
    choose: Literal["in_turn", "by_length", "by_room"] = "in_turn"  # by_length: the least whose text of the planned length fits `positions`
    positions: int | None = None  # choose = by_length: positions the Transformer was trained on
    memory: int | None = None  # slots, of which the oldest are dropped; None: as many as the tokens that init_state is told of need
    training_ratios: Literal["in_turn", "per_chunk", "per_row"] = "per_chunk"  # drawn from `ratios`, in training
    training_bare_end: bool = True  # in training a document's last chunk has no beacons, which nothing would read; False: as in reading
    sinks: int = 0  # first tokens of a document whose keys and values are kept, too (1 for Llama 3)
    placement: Literal["interleave", "append"] = "interleave"  # append: behind the chunk; no token of it sees them
    stride: int | None = None  # append: tokens that a chunk has that the one before had not; None: all
    append_sees: Literal["all", "stepwise", "segment"] = "all"  # append: tokens that beacon j sees: all, those up to its own part, its part
    append_sees_beacons: bool = True  # append: earlier ones of the chunk (newer code); else itself only (v1)
    append_sees_memory: bool = True
    beacon_output: bool = False  # beacons have an output projection of their own, too (v1)
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    attention_bias: bool = False  # biases of the q, k and v projections (Qwen2), of beacons too
    output_bias: bool = False  # bias of the attention's output projection
    feed_forward_bias: bool = False  # biases of the three feed-forward projections
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation (Qwen3)
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of activations and caches; parameters are float32
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations
    has_dropout = True  # training differs: ratios may be drawn, and a document's last chunk has no beacons

    def __post_init__(self):
        for name in ("choose", "training_ratios", "placement", "append_sees", "dtype"):
            allowed = get_args(get_type_hints(BeaconConfig)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        for name in ("vocab_size", "dim", "layers", "heads", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("kv_heads", "head_dim", "feed_forward", "stride", "positions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.sinks <= self.chunk:
            raise UserError(f"model.sinks is {self.sinks}; it must be from 0 to model.chunk, {self.chunk}")
        if self.stride is not None and (self.placement == "interleave" or self.stride > self.chunk):
            raise UserError(
                f'model.stride is {self.stride}; it must be at most model.chunk, {self.chunk}, with model.placement "append", else None'
            )
        if self.step < self.chunk and (self.sinks or 0 in self.ratios):
            raise UserError(f"model.stride is {self.stride}; less than model.chunk, {self.chunk}, it goes without sinks and ratios of 0")
        if not self.ratios or any(ratio < 0 or (ratio and self.step % ratio) for ratio in self.ratios):
            raise UserError(f"model.ratios is {self.ratios}; it must be numbers that divide the chunk's {self.step} tokens, or 0")
        if self.choose == "by_length" and (self.positions is None or self.positions <= self.chunk):
            raise UserError(f"model.positions is {self.positions}; to choose by length it must be more than model.chunk, {self.chunk}")
        if self.memory is not None and self.memory < self.kept:
            raise UserError(f"model.memory is {self.memory}; it must be None or {self.kept}, what is kept of a chunk, or more")
        if self.memory is not None and self.sinks:
            raise UserError(f"model.sinks is {self.sinks}; with a model.memory, {self.memory}, which drops what is oldest, it must be 0")
        if self.choose == "by_room" and self.memory is None:
            raise UserError("model.memory is None; to choose by room it must be a number of slots")
        if not 0 < self.norm_epsilon < math.inf:
            raise UserError(f"model.norm_epsilon is {self.norm_epsilon}; it must be a number greater than 0")
        if self.head_dim is None and self.dim % self.heads:
            raise UserError(
                f"model.dim is {self.dim}, which is not a multiple of model.heads, {self.heads}; set model.head_dim or change one of them"
            )
        if self.heads % self.kv_head_count:
            raise UserError(f"model.heads is {self.heads}, which is not a multiple of model.kv_heads, {self.kv_heads}")
        if self.rope.start_tokens:
            raise UserError(f"model.rope.start_tokens is {self.rope.start_tokens}; with beacons, whose positions move, it must be 0")
        rope_table(self.rope, self.head_size)

    @staticmethod
    def of(config: TransformerConfig, **options) -> "BeaconConfig":
        """With the weights of a Transformer, and options of its beacons."""
        shared = {field.name for field in dataclasses.fields(BeaconConfig)} & vars(config).keys()
        return BeaconConfig(**({name: getattr(config, name) for name in shared} | options))

    @property
    def transformer(self) -> TransformerConfig:
        """The Transformer with full attention that has the same weights but for those of beacons."""
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
    def step(self) -> int:
        """Tokens that a chunk has that the one before had not; the first has `chunk`."""
        return self.stride or self.chunk

    @property
    def least_ratio(self) -> int:
        """Of chunks that are compressed; 0: none is."""
        return min((ratio for ratio in self.ratios if ratio), default=0)

    @property
    def beacons(self) -> int:
        """P, the most beacons that a chunk has."""
        return self.step // self.least_ratio if self.least_ratio else 0

    @property
    def kept(self) -> int:
        """X, the most rows that are kept of a chunk."""
        return self.sinks + (self.chunk if 0 in self.ratios else self.beacons)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, averaged over a sequence of `length`; multiply and add count as two."""
        H, G, K = self.heads, self.kv_head_count, self.head_size
        # Beacons per token, and slots that a chunk leaves per token.
        beacons = sum(1 / ratio for ratio in self.ratios if ratio) / len(self.ratios)
        slots = sum(1 / (ratio or 1) for ratio in self.ratios) / len(self.ratios)
        memory = max(length - self.chunk, 0) / 2 * slots
        seen = min(length + 1, self.chunk + 1) / 2 * (1 + beacons) + min(memory, self.memory or memory)
        row = 2 * self.dim * K * (H + G) + 3 * self.dim * self.feed_forward_size + 2 * H * K * seen
        return 2 * (self.layers * row * (1 + beacons) + self.dim * self.vocab_size)

    @staticmethod
    def examples() -> dict[str, "BeaconConfig"]:
        """Tiny models that together use every option: what the tests run."""
        tiny = BeaconConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, chunk=8, ratios=(2,))
        return {
            "in_turn": dataclasses.replace(
                tiny,
                ratios=(4, 0, 2, 1),
                sinks=2,
                attention_bias=True,
                output_bias=True,
                feed_forward_bias=True,
                qk_norm=True,
                tied_embeddings=True,
                head_dim=6,
                rope=RopeConfig("yarn", factor=4.0, original_length=16),
                remat=False,
            ),
            "dropping": dataclasses.replace(
                tiny, ratios=(2, 4), choose="by_length", positions=16, kv_heads=1, beacon_output=True, memory=6
            ),
            "append_v1": dataclasses.replace(
                tiny,
                ratios=(2, 4),
                memory=9,
                choose="by_room",
                placement="append",
                stride=4,
                append_sees="stepwise",
                append_sees_beacons=False,
                append_sees_memory=False,
                beacon_output=True,
            ),
        }


class Counts(NamedTuple):
    """How far each row's memory is filled, int32 [B]."""

    used_B: jax.Array  # slots that have been written, of all documents
    owner_B: jax.Array  # the document that `held_B` is of
    held_B: jax.Array  # slots of that document

    def of(self, document_BC: jax.Array) -> jax.Array:
        """Slots that each token's document has."""
        return jnp.where(document_BC == self.owner_B[:, None], self.held_B[:, None], 0)

    def entered(self, end: "End") -> "Counts":
        """After tokens of a chunk, the last of which may be of another document."""
        enters_B = (end.document > 0) & (end.document != self.owner_B)
        return self._replace(owner_B=jnp.where(enters_B, end.document, self.owner_B), held_B=jnp.where(enters_B, 0, self.held_B))


class Rows(NamedTuple):
    """What tokens and beacons are to attention, int32 [B, R]."""

    order: jax.Array  # 2 i for the token with number i in its row, over all documents; 2 i + 1 for a beacon behind it
    position: jax.Array  # rotary
    document: jax.Array  # 0: none


def chunk_of(config: BeaconConfig, index: jax.Array) -> jax.Array:
    """The chunk that a token is read in, by its number in the row."""
    return jnp.maximum((index - config.chunk) // config.step + 1, 0)


def chunk_start(config: BeaconConfig, index: jax.Array) -> jax.Array:
    """Number of the first token that stands in a token's chunk."""
    return chunk_of(config, index) * config.step


def ratio_by_length(config: BeaconConfig, planned_B: jax.Array) -> jax.Array:
    """The least ratio with which a text of so many tokens stays within `positions`, else the greatest (the official "adapt" rule).

    A text that is read at ratio r stays within P positions up to r (P - chunk) + chunk tokens; uncompressed (0) up to P.
    """
    ratio_B = jnp.full_like(planned_B, max(config.ratios))
    for ratio in sorted(set(config.ratios), reverse=True):
        reach = ratio * (config.positions - config.chunk) + config.chunk if ratio else config.positions
        ratio_B = jnp.where(planned_B <= reach, ratio, ratio_B)
    return ratio_B


def ratios_of(config: BeaconConfig, place: Place, planned_B: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The ratio of each token's chunk, int32 [B, T].

    Args:
      config: options.
      place: of the tokens.
      planned_B: int32, of the cursor.
      key: in training, draws ratios; with `training_bare_end` a document must be in one call, whose last chunk has none (-1).
    """
    chunk_BT = chunk_of(config, place.index_BT)
    number_BT = chunk_BT - chunk_of(config, place.index_BT - place.position_BT)
    ratios_J = jnp.asarray(config.ratios, jnp.int32)
    if key is not None and config.training_ratios != "in_turn":
        # One for each chunk that a row may have.
        B, T = place.index_BT.shape
        count = 1 if config.training_ratios == "per_row" else T // config.step + 2
        drawn_BJ = jax.random.choice(key, ratios_J, (B, count))
        ratio_BT = jnp.take_along_axis(drawn_BJ, jnp.minimum(chunk_BT - chunk_BT[:, :1], count - 1), axis=1)
    elif config.choose == "by_length":
        ratio_BT = jnp.broadcast_to(ratio_by_length(config, planned_B)[:, None], number_BT.shape)
    else:
        ratio_BT = ratios_J[number_BT % len(config.ratios)]
    if key is None or not config.training_bare_end:
        return ratio_BT
    # A document's last token in the call, seen from each of its tokens: the next border of documents is right behind it.
    T = place.index_BT.shape[1]
    following_BT = jnp.pad(place.document_BT[:, 1:], ((0, 0), (0, 1)))
    last_BT = jnp.where(following_BT != place.document_BT, jnp.arange(T, dtype=jnp.int32)[None], T)
    last_BT = jax.lax.cummin(last_BT, axis=1, reverse=True)
    last_chunk_BT = jnp.take_along_axis(chunk_BT, jnp.minimum(last_BT, T - 1), axis=1)
    return jnp.where(chunk_BT == last_chunk_BT, -1, ratio_BT)


def by_room(config: BeaconConfig, ratio_BC: jax.Array, held_BC: jax.Array) -> jax.Array:
    """The ratios of a chunk, of whose documents the memory has `held_BC` slots: each, from the least, fills an equal part of it."""
    ratios = sorted(set(config.ratios))
    part_BC = jnp.minimum(held_BC * len(ratios) // config.memory, len(ratios) - 1)
    # A chunk without beacons stays so.
    return jnp.where(ratio_BC < 0, ratio_BC, jnp.asarray(ratios, jnp.int32)[part_BC])


def rows_of(config: BeaconConfig, place: Place, ratio_BC: jax.Array, counts: Counts, beacons: int) -> Rows:
    """Tokens of a chunk and, behind them, its beacons."""
    tokens = token_rows(config, place, ratio_BC, counts.of(place.document_BT))
    return joined(tokens, beacon_rows(config, tokens, ratio_BC, beacons))


def joined(one: Rows, other: Rows) -> Rows:
    """Behind one another."""
    return Rows(*(jnp.concatenate(pair, axis=1) for pair in zip(one, other)))


def token_rows(config: BeaconConfig, place: Place, ratio_BC: jax.Array, held_BC: jax.Array) -> Rows:
    """Tokens of a chunk, of whose documents the memory has `held_BC` slots."""
    start_BC = chunk_start(config, place.index_BT)
    column_BC = place.index_BT - start_BC
    first_BC = jnp.maximum(column_BC - place.position_BT, 0)
    before_BC = jnp.zeros_like(column_BC)
    if config.placement == "interleave":
        some_BC = jnp.maximum(ratio_BC, 1)
        before_BC = jnp.where(ratio_BC > 0, column_BC // some_BC - first_BC // some_BC, 0)
    return Rows(2 * place.index_BT, held_BC + column_BC - first_BC + before_BC, place.document_BT)


def beacon_rows(config: BeaconConfig, tokens: Rows, ratio_BC: jax.Array, count: int) -> Rows:
    """The beacons that follow tokens of a chunk: N = `count` rows, of which those that are too many have document 0."""
    index_BC = tokens.order // 2
    column_BC = index_BC - chunk_start(config, index_BC)
    ends_BC = (tokens.document > 0) & (ratio_BC > 0) & ((column_BC + 1) % jnp.maximum(ratio_BC, 1) == 0)
    source_BN, valid_BN = compact(ends_BC, count)
    order_BN, position_BN, document_BN = (jnp.take_along_axis(x_BC, source_BN, axis=1) for x_BC in tokens)
    return Rows(order_BN + 1, position_BN + 1, jnp.where(valid_BN, document_BN, 0))


def compact(keep_BY: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Which of Y rows are kept -> the first X = `count` of these, int32 [B, X], and which of the X there are, bool."""
    B, Y = keep_BY.shape
    number_BY = jnp.where(keep_BY, jnp.cumsum(keep_BY, axis=1, dtype=jnp.int32) - 1, count)
    columns_BY = jnp.broadcast_to(jnp.arange(Y, dtype=jnp.int32)[None], (B, Y))
    source_BX = jnp.zeros((B, count), jnp.int32).at[jnp.arange(B, dtype=jnp.int32)[:, None], number_BY].set(columns_BY, mode="drop")
    return source_BX, jnp.arange(count, dtype=jnp.int32)[None] < jnp.sum(keep_BY, axis=1, keepdims=True, dtype=jnp.int32)


def seen_in_chunk(config: BeaconConfig, queries: Rows, keys: Rows) -> jax.Array:
    """Which rows of its own chunk each row sees: those of its document that are not behind it, bool [B, R, S]."""
    start_BR = 2 * chunk_start(config, queries.order // 2)
    k_B1S, q_BR1 = (jax.tree.map(lambda x: x[:, None], keys), jax.tree.map(lambda x: x[..., None], queries))
    same_BRS = (q_BR1.document == k_B1S.document) & (k_B1S.document > 0)
    return same_BRS & (k_B1S.order <= q_BR1.order) & (k_B1S.order >= start_BR[..., None])


class End(NamedTuple):
    """Of a chunk, [B]."""

    complete: jax.Array  # bool
    document: jax.Array  # int32, of its last token
    first: jax.Array  # bool, it is that document's first
    start: jax.Array  # int32, number of that document's first token in it
    ratio: jax.Array  # int32


def chunk_end(config: BeaconConfig, place: Place, ratio_BC: jax.Array) -> End:
    """Of the chunk that the last of some tokens is in; those that are padding stand behind the others."""
    count_B = jnp.sum(place.document_BT > 0, axis=1, dtype=jnp.int32)
    last = lambda x_BC: jnp.take_along_axis(x_BC, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    index_B, start_B, document_B = last(place.index_BT), last(chunk_start(config, place.index_BT)), last(place.document_BT)
    begins_B = index_B - last(place.position_BT)
    complete_B = (count_B > 0) & (index_B == start_B + config.chunk - 1)
    return End(complete_B, document_B, begins_B >= start_B, jnp.maximum(begins_B, start_B), last(ratio_BC))


class Kept(NamedTuple):
    """What the memory keeps of complete chunks, [B, X]."""

    source_BX: jax.Array  # int32, its row
    number_BX: jax.Array  # int32, of the slot among all that were ever written; -1: there is no such row
    position_BX: jax.Array  # int32
    document_BX: jax.Array  # int32; 0: there is no such row


def keep(config: BeaconConfig, rows: Rows, tokens: int, end: End, counts: Counts) -> tuple[Kept, Counts]:
    """What the memory keeps, in the order of its slots, and how far it is filled then.

    Args:
      config: options.
      rows: Y, the first `tokens` of which are tokens and the others beacons, each in order; those of other chunks or documents go.
      tokens: as said.
      end: of the rows' chunks.
      counts: before.
    """
    counts = counts.entered(end)
    own_BY = (rows.document == end.document[:, None]) & (rows.order >= 2 * end.start[:, None]) & end.complete[:, None]
    columns_Y = jnp.arange(own_BY.shape[1], dtype=jnp.int32)
    keeps, columns = [], []
    if config.sinks:
        sinks_BC = end.first[:, None] & (rows.order < 2 * (end.start + config.sinks)[:, None])
        keeps, columns = [(own_BY & sinks_BC)[:, :tokens]], [columns_Y[:tokens]]
    if 0 in config.ratios:
        keeps, columns = [*keeps, (own_BY & (end.ratio == 0)[:, None])[:, :tokens]], [*columns, columns_Y[:tokens]]
    keeps, columns = [*keeps, own_BY[:, tokens:]], [*columns, columns_Y[tokens:]]
    source_BX, valid_BX = compact(jnp.concatenate(keeps, axis=1), config.kept)
    number_1X, count_B = jnp.arange(config.kept, dtype=jnp.int32)[None], jnp.sum(valid_BX, axis=1, dtype=jnp.int32)
    kept = Kept(
        jnp.concatenate(columns)[source_BX],
        jnp.where(valid_BX, counts.used_B[:, None] + number_1X, -1),
        counts.held_B[:, None] + number_1X,
        jnp.where(valid_BX, end.document[:, None], 0),
    )
    return kept, counts._replace(used_B=counts.used_B + count_B, held_B=counts.held_B + count_B)


def slots_of(config: BeaconConfig, kept: Kept, counts: Counts, slots: int) -> jax.Array:
    """Where what is kept lies after the call, of which `counts` are, int32 [B, X]; `slots`, which is no slot: nowhere."""
    there_BX = kept.number_BX >= 0
    if config.memory is None:
        return jnp.where(there_BX, kept.number_BX, slots)
    there_BX &= kept.number_BX >= counts.used_B[:, None] - slots
    return jnp.where(there_BX, kept.number_BX % slots, slots)


def plan_chunks(
    config: BeaconConfig, place_NBC: Place, ratio_NBC: jax.Array, counts: Counts, beacons: int
) -> tuple[Rows, Kept, jax.Array, Counts]:
    """`rows_of` and `keep` for chunk after chunk, with a leading axis N, and how far the memory was filled before each and is after all.

    No row depends on what a layer makes of another: so the chunks of a layer can be read at once.
    """

    def one(counts, xs):
        place, ratio_BC = xs
        if config.choose == "by_room":
            ratio_BC = by_room(config, ratio_BC, counts.of(place.document_BT))
        rows = rows_of(config, place, ratio_BC, counts, beacons)
        kept, after = keep(config, rows, ratio_BC.shape[1], chunk_end(config, place, ratio_BC), counts)
        return after, (rows, kept, counts.used_B)

    after, (rows, kept, used_NB) = jax.lax.scan(one, counts, (place_NBC, ratio_NBC))
    return rows, kept, used_NB, after


def compacted_plan(config: BeaconConfig, planned_B: jax.Array) -> jax.Array:
    """Positions that a text of so many tokens needs at most, for rotary tables that depend on the length.

    With `memory` as many: positions go on growing where slots are dropped.
    """
    ratio_B = jnp.full_like(planned_B, 1 if 0 in config.ratios else config.least_ratio)
    if config.choose == "by_length":
        ratio_B = jnp.maximum(ratio_by_length(config, planned_B), 1)
    return planned_B // ratio_B + config.sinks + config.chunk + config.beacons


def moved(config: BeaconConfig, k_BXGK: jax.Array, distance_BX: jax.Array, plan_B: jax.Array) -> jax.Array:
    """Rotated keys as they would be so many positions later."""
    turn = lambda position_BX: rotation(config.rope, config.head_size, position_BX, plan_B, at_least_float32(k_BXGK.dtype))
    cos_BXR, sin_BXR = turn(distance_BX)
    # The attention factor is in the keys already; at position 0 it is the cosine.
    factor_B1R, _ = turn(jnp.zeros_like(distance_BX[:, :1]))
    return apply_rope(k_BXGK, cos_BXR / factor_B1R, sin_BXR / factor_B1R)
