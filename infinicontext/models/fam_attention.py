"""What the layers of a TransformerFAM share: options, and where a call's tokens and memories stand in the grid of blocks (Hwang et al.
2024, arXiv 2404.09173 v3).

Shape letters: B batch, T time, N blocks that a call touches, C tokens per block, M = m + 1 blocks in the ring, S = M C ring slots, W slots
written by a call, G key/value heads, K head size, L layers, D channels, F rows of the feedback memory (FAM), P keys of FAM that tokens may
see, R rotated pairs, J readings of blocks.

Blocks are a grid over all tokens of a row, whatever documents they belong to. A token sees its own block up to itself, the m blocks before
it, and the FAM that the blocks before its own have left behind, all of them of its own document only. FAM is that of one document; for
another it is the prompt's, which stands right before the document's first token.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp

from infinicontext.errors import UserError
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn import attention
from infinicontext.nn.attention import Slots
from infinicontext.nn.cursor import Place
from infinicontext.nn.parameters import at_least_float32
from infinicontext.nn.rope import RopeConfig, rope_table, rotation

FEW_BLOCKS = 0.1  # of the Dirichlet distribution of what is read again; 1: any shares, towards 0: a single block
# Fields of a Transformer that say which keys its tokens see; FAM's config decides that anew.
_REACH = {"attention", "window", "block", "memory_blocks"}


@dataclasses.dataclass(frozen=True)
class FamConfig:
    """Shape and options of a TransformerFAM; with fam_length 0 of a TransformerBSWA, its control, which has block-sliding windows alone."""

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim // heads
    feed_forward: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    block: int = 256  # tokens
    memory_blocks: int = 1  # earlier blocks each token sees
    fam_length: int = 16  # rows of FAM in each layer; 0: none
    fam_positions: Literal["last", "fractional", "zero"] = "last"  # those of the last tokens before the block, between it and them, or 0
    fam_query: Literal["copy", "static"] = "copy"  # static: query and residual of an update are the prompt's, not those of the FAM before
    fam_feed_forward: bool = True  # an update ends with the layer's feed-forward
    fam_limit: float = 0.0  # root mean square that a larger row of FAM is scaled down to after an update; 0: it grows, as in the paper
    random_offsets: bool = False  # in training half of the rows begin at a random position instead of 0
    stop_memory_gradient: bool = False  # no gradient flows to keys and values of earlier blocks
    detach_every: int = 0  # gradients do not flow back through FAM beyond every so many blocks; 0: they do
    training_rereads: int = 0  # times more, on average, that FAM reads a block in training; tokens are read once
    schedule: Literal["layers", "blocks"] = "layers"  # blocks: all layers of a block before the next, in constant memory
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    attention_bias: bool = False  # biases of the q, k and v projections (Qwen2)
    output_bias: bool = False  # bias of the attention's output projection
    feed_forward_bias: bool = False  # biases of the three feed-forward projections
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation (Qwen3)
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of activations and caches; parameters and FAM are float32
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations

    def __post_init__(self):
        for name in ("fam_positions", "fam_query", "schedule", "dtype"):
            allowed = get_args(get_type_hints(FamConfig)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        for name in ("vocab_size", "dim", "layers", "heads", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("kv_heads", "head_dim", "feed_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("memory_blocks", "fam_length", "detach_every", "training_rereads"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.training_rereads and (self.schedule == "blocks" or not self.fam_length):
            raise UserError(
                f'model.training_rereads is {self.training_rereads}; it needs model.schedule "layers" and a model.fam_length of 1 or more'
            )
        if not 0 <= self.fam_limit < math.inf or (self.fam_limit and not self.fam_length):
            raise UserError(
                f"model.fam_limit is {self.fam_limit:g}, with a model.fam_length of {self.fam_length}; it must be a number "
                "from 0 on, and 0 without FAM"
            )
        if self.head_dim is None and self.dim % self.heads:
            raise UserError(
                f"model.dim is {self.dim}, which is not a multiple of model.heads, {self.heads}; set model.head_dim or change one of them"
            )
        if self.heads % self.kv_head_count:
            raise UserError(f"model.heads is {self.heads}, which is not a multiple of model.kv_heads, {self.kv_heads}")
        rope_table(self.rope, self.head_size)

    @staticmethod
    def of(config: TransformerConfig, **options) -> "FamConfig":
        """With the weights of a Transformer, its blocks if it has such, and options of FAM."""
        shared = {field.name for field in dataclasses.fields(FamConfig)} & vars(config).keys()
        shared -= set() if config.attention == "block_window" else _REACH
        return FamConfig(**({name: getattr(config, name) for name in shared} | options))

    @property
    def transformer(self) -> TransformerConfig:
        """The Transformer with full attention that has the same weights but for the prompt."""
        shared = {field.name for field in dataclasses.fields(TransformerConfig)} & vars(self).keys() - _REACH
        return TransformerConfig(**{name: getattr(self, name) for name in shared})

    @property
    def bswa(self) -> "FamConfig":
        """TransformerBSWA, the control: the same blocks without FAM."""
        return dataclasses.replace(self, fam_length=0, fam_limit=0.0, training_rereads=0)

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
        """Hidden size of the feed-forward."""
        return -(-8 * self.dim // 96) * 32 if self.feed_forward is None else self.feed_forward

    @property
    def span(self) -> int:
        """S."""
        return (self.memory_blocks + 1) * self.block

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return self.training_rereads > 0

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, averaged over a sequence of `length`; multiply and add count as two."""
        seen = min((length + 1) / 2, self.memory_blocks * self.block + (self.block + 1) / 2)
        attend = lambda keys: 2 * self.heads * self.head_size * keys
        projections = 2 * self.dim * self.head_size * (self.heads + self.kv_head_count)
        row = projections + 3 * self.dim * self.feed_forward_size
        rows_per_token = self.fam_length / self.block
        per_layer = row + attend(seen + self.fam_length) + rows_per_token * (row + attend(self.fam_length + self.block))
        return 2 * (self.layers * per_layer + self.dim * self.vocab_size)

    @staticmethod
    def examples() -> dict[str, "FamConfig"]:
        """Tiny models that together use every option: what the tests run."""
        tiny = FamConfig(vocab_size=17, dim=16, layers=2, heads=4, kv_heads=2, feed_forward=24, block=4, fam_length=3)
        return {
            "fam": tiny,
            "fractional": dataclasses.replace(
                tiny,
                kv_heads=None,
                block=5,
                memory_blocks=2,
                fam_length=1,
                fam_positions="fractional",
                fam_limit=0.4,
                detach_every=2,
                rope=RopeConfig("dynamic", factor=2.0, original_length=16),
                remat=False,
            ),
            "blocks": dataclasses.replace(
                tiny,
                kv_heads=1,
                memory_blocks=0,
                fam_length=4,
                fam_positions="zero",
                schedule="blocks",
                attention_bias=True,
                output_bias=True,
                feed_forward_bias=True,
                qk_norm=True,
                tied_embeddings=True,
                head_dim=6,
            ),
            "static": dataclasses.replace(
                tiny, block=3, fam_length=5, fam_query="static", fam_feed_forward=False, stop_memory_gradient=True, schedule="blocks"
            ),
            "bswa": dataclasses.replace(tiny, fam_length=0),
        }


class Feedback(NamedTuple):
    """The FAM that the tokens of the open block see."""

    fam_LBFD: jax.Array  # float32 or wider, activations that enter each layer
    document_B: jax.Array  # int32, the document it is of; 0: of none
    fresh_B: jax.Array  # bool, it is the prompt's and has read nothing yet
    position_B: jax.Array  # int32, the position in the document that it stands before: the block's first, or the document's where fresh


class Updates(NamedTuple):
    """What the blocks of a call do to FAM, [N, B, ...]."""

    replaced_NB: jax.Array  # bool, the block ends with another document than the one before, so that FAM begins anew
    fresh_NB: jax.Array  # bool, the FAM that the block updates has read nothing
    seen_NBC: jax.Array  # bool, tokens of the document that the block ends with
    completes_NB: jax.Array  # bool, the block is complete after the call, and FAM updated
    detaches_NB: jax.Array  # bool, no gradient flows back from what comes after the block
    rotation: tuple[jax.Array, jax.Array]  # cos and sin [N, B, F, R] of the FAM after the block


class Rereads(NamedTuple):
    """The blocks that FAM reads, one after another, some of them more than once: J readings of N blocks."""

    block_JB: jax.Array  # int32
    first_NB: jax.Array  # int32, the first reading of each block


class Call(NamedTuple):
    """What all layers of a call share."""

    held_B: jax.Array | None  # int32, columns of the first block before the call's tokens; None: none, or the tokens stand in their columns
    earlier_BC: jax.Array | None  # bool, columns of the first block whose tokens were read before the call; None: known to be none
    order_BM: jax.Array  # int32, the ring's blocks, the oldest first and the open one last
    rotation: tuple[jax.Array, jax.Array]  # cos and sin [B, T, R] of the tokens
    documents: tuple[jax.Array, jax.Array]  # int32 [N, B, C] of the call's tokens and [N, B, S] of keys
    stays_BW: jax.Array | None  # int32, the tokens of the call that the cache holds after it; None: all
    fam_seen_NBCP: jax.Array | None  # bool; this and what follows are None without FAM
    entering_rotation: tuple[jax.Array, jax.Array] | None  # [B, F, R] of the FAM before the call
    prompt_rotation: tuple[jax.Array, jax.Array] | None  # [B, F, R] of the FAM that documents of the call begin with
    updates: Updates | None
    rereads: Rereads | None  # None: FAM reads each block once


def enter(feedback: Feedback, place: Place, first_LFD: jax.Array) -> Feedback:
    """With the prompt's FAM, first_LFD, in rows whose first token is of another document than the FAM."""
    enters_B = entering(feedback, place)
    select = lambda new_B, old_B: jnp.where(enters_B, new_B, old_B)
    return Feedback(
        jnp.where(enters_B[None, :, None, None], first_LFD[:, None], feedback.fam_LBFD),
        select(place.document_BT[:, 0], feedback.document_B),
        select(True, feedback.fresh_B),
        select(place.position_BT[:, 0], feedback.position_B),
    )


def entering(feedback: Feedback, place: Place) -> jax.Array:
    """Rows whose first token is of another document than the FAM, bool [B]. Padding stands only behind tokens."""
    first_B = place.document_BT[:, 0]
    return (first_B > 0) & (first_B != feedback.document_B)


def begin_call(
    config: FamConfig,
    place: Place,
    slots: Slots,
    feedback: Feedback | None,
    planned_B: jax.Array,
    held_B: jax.Array | None,
    *,
    within: bool,
    packed: bool,
    reread_key: jax.Array | None = None,
) -> tuple[Call, jax.Array, Slots, Feedback | None]:
    """What the layers need to know.

    Args:
      config: options.
      place: of the tokens, T columns whose indices follow one another.
      slots: what the ring holds before the call; position: number of the token in its row, over all documents.
      feedback: as `enter` gives it; None without FAM.
      planned_B: int32, of the cursor.
      held_B: int32, tokens of the open block that were read before the call; None: 0.
      within: the T = C columns are those of one block, in which the tokens already stand.
      packed: whether the tokens of a row may belong to several documents.
      reread_key: draws the blocks that FAM reads more than once; None: it reads each once.

    Returns:
      That, the W slots that keys and values are written to, what the ring holds after the call, and the feedback after it but for fam_LBFD.
    """
    (B, T), C, S = place.index_BT.shape, config.block, config.span
    number_B = place.index_BT[:, 0] // C
    stays_BW, slot_BW, after = _kept(place, slots, S)
    call = Call(
        held_B=None if within else held_B,
        earlier_BC=None if held_B is None else jnp.arange(C, dtype=jnp.int32)[None] < held_B[:, None],
        order_BM=(number_B[:, None] + 1 + jnp.arange(config.memory_blocks + 1, dtype=jnp.int32)[None]) % (config.memory_blocks + 1),
        rotation=rotation(config.rope, config.head_size, place.position_BT, planned_B, at_least_float32(config.dtype)),
        documents=(),
        stays_BW=stays_BW,
        fam_seen_NBCP=None,
        entering_rotation=None,
        prompt_rotation=None,
        updates=None,
        rereads=None,
    )
    document_NBC = attention.lay(place.document_BT, call.held_B, C)
    own_NBC, window_NBS = lay_blocks(place.document_BT, slots.document_BS, call)
    call = call._replace(documents=(document_NBC, window_NBS))
    if feedback is None:
        return call, slot_BW, after, None

    # Documents are numbered in order. A row's last block that has tokens is the only one that may stay open.
    N = document_NBC.shape[0]
    numbers_N1 = jnp.arange(N, dtype=jnp.int32)[:, None]
    position_NBC = attention.lay(place.position_BT, call.held_B, C)
    last_NB = jnp.maximum(jax.lax.cummax(jnp.max(document_NBC, axis=2), axis=0), feedback.document_B[None])
    owner_NB = jnp.concatenate([feedback.document_B[None], last_NB[:-1]])
    replaced_NB, completes_NB = last_NB != owner_NB, document_NBC[:, :, -1] > 0
    behind_NB = position_NBC[:, :, -1] + 1
    detaches_NB = jnp.zeros_like(completes_NB)
    if config.detach_every:
        detaches_NB = completes_NB & ((number_B[None] + numbers_N1 + 1) % config.detach_every == 0)
    rotation_NB = fam_rotation(config, behind_NB.reshape(-1), jnp.tile(planned_B, N))
    updates = Updates(
        replaced_NB,
        replaced_NB | ((numbers_N1 == 0) & feedback.fresh_B[None]),
        own_NBC == last_NB[..., None],
        completes_NB,
        detaches_NB,
        jax.tree.map(lambda x: x.reshape(N, B, *x.shape[1:]), rotation_NB),
    )
    if not (packed or within) and held_B is None:
        # The last block is known to stay open and, since no document begins in it, to leave FAM alone.
        updates = jax.tree.map(lambda x: x[: T // C], updates)

    fam_seen_NBCP = jnp.broadcast_to((document_NBC == owner_NB[..., None])[..., None], (*document_NBC.shape, config.fam_length))
    call = call._replace(
        fam_seen_NBCP=jnp.concatenate([fam_seen_NBCP, ~fam_seen_NBCP], axis=3) if packed else fam_seen_NBCP,
        entering_rotation=fam_rotation(config, feedback.position_B, planned_B),
        prompt_rotation=fam_rotation(config, jnp.zeros_like(feedback.position_B), planned_B),
        updates=updates,
    )
    if reread_key is not None and len(updates.fresh_NB):
        call = _reread(call, draw_rereads(reread_key, *updates.fresh_NB.shape, config.training_rereads))

    changed_1B = jnp.max(jnp.where(completes_NB | replaced_NB, numbers_N1, -1), axis=0, keepdims=True)
    at_change = lambda x_NB: jnp.take_along_axis(x_NB, jnp.maximum(changed_1B, 0), axis=0)[0]
    feedback = feedback._replace(
        document_B=last_NB[-1],
        fresh_B=jnp.where(changed_1B[0] >= 0, at_change(~completes_NB), feedback.fresh_B),
        position_B=jnp.where(changed_1B[0] >= 0, at_change(jnp.where(completes_NB, behind_NB, 0)), feedback.position_B),
    )
    fam_slot_BF = jnp.broadcast_to(S + jnp.arange(config.fam_length, dtype=jnp.int32)[None], (B, config.fam_length))
    return call, jnp.concatenate([slot_BW, fam_slot_BF], axis=1), after, feedback


def draw_rereads(key: jax.Array, blocks: int, batch_size: int, rereads: int) -> Rereads:
    """Each of N blocks once and, in each row, `rereads` N again, most of them a few blocks that are drawn for the row.

    Were all read again as often, what is to be kept would be, too, and its share of FAM would stay as it is.
    """
    share_key, block_key = jax.random.split(key)
    each_NB = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32)[:, None], (blocks, batch_size))
    log_share_BN = jax.random.loggamma(share_key, FEW_BLOCKS, (batch_size, blocks))
    again = jax.random.categorical(block_key, log_share_BN, shape=(blocks * rereads, batch_size)).astype(jnp.int32)
    block_JB = jnp.sort(jnp.concatenate([each_NB, again]), axis=0)
    return Rereads(block_JB, jax.vmap(jnp.searchsorted, 1, 1)(block_JB, each_NB).astype(jnp.int32))


def _reread(call: Call, rereads: Rereads) -> Call:
    """With the updates of J readings. At each FAM stands before the block, as at the first."""
    updates, block_JB = call.updates, rereads.block_JB
    J = len(block_JB)
    at = lambda x_NB: jnp.take_along_axis(x_NB, block_JB.reshape(J, -1, *(1,) * (x_NB.ndim - 2)), axis=0)
    same_B = jnp.zeros_like(block_JB[:1], bool)
    follows_JB = jnp.concatenate([same_B, block_JB[1:] == block_JB[:-1]])
    followed_JB = jnp.concatenate([follows_JB[1:], same_B])
    expand = lambda x_JB: x_JB[..., None, None]
    turns = []
    for behind_NBFR, entering_BFR, prompt_BFR in zip(updates.rotation, call.entering_rotation, call.prompt_rotation):
        before_NBFR = jnp.concatenate([entering_BFR[None], behind_NBFR[:-1]])
        before_NBFR = jnp.where(expand(updates.replaced_NB), prompt_BFR[None], before_NBFR)
        turns.append(jnp.where(expand(followed_JB), at(before_NBFR), at(behind_NBFR)))
    updates = Updates(
        at(updates.replaced_NB) & ~follows_JB,
        at(updates.fresh_NB) & ~follows_JB,
        at(updates.seen_NBC),
        at(updates.completes_NB),
        at(updates.detaches_NB) & ~followed_JB,
        tuple(turns),
    )
    return call._replace(updates=updates, rereads=rereads)


def _kept(place: Place, slots: Slots, span: int) -> tuple[jax.Array | None, jax.Array, Slots]:
    """The tokens of a call that a ring of `span` slots holds after it (None: all), the slots they are written to, and what slots hold then.

    The slot of what is not written is beyond those of FAM.
    """
    B, T = place.index_BT.shape
    slot_BT, stays_BW = attention.slot_index(place, span, ring=True), None
    if span < T:
        rows_B1, columns_1T = jnp.arange(B, dtype=jnp.int32)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
        last_BS = jnp.full((B, span), -1, jnp.int32).at[rows_B1, slot_BT].set(jnp.broadcast_to(columns_1T, (B, T)), mode="drop")
        stays_BW, slot_BT = jnp.maximum(last_BS, 0), jnp.where(last_BS >= 0, jnp.arange(span, dtype=jnp.int32)[None], span)
    stays = lambda x_BT: x_BT if stays_BW is None else jnp.take_along_axis(x_BT, stays_BW, axis=1)
    after = Slots(
        attention.write(slots.position_BS, stays(place.index_BT), slot_BT),
        attention.write(slots.document_BS, stays(place.document_BT), slot_BT),
    )
    return stays_BW, jnp.where(slot_BT < span, slot_BT, jnp.iinfo(jnp.int32).max), after


def lay_blocks(x_BT: jax.Array, ring_BS: jax.Array, call: Call, *, stop_gradient: bool = False) -> tuple[jax.Array, jax.Array]:
    """What tokens have, in blocks: x_NBC with what the ring has of the open block, and x_NBS with the m blocks before each.

    `stop_gradient`: of the blocks before each.
    """
    B, M = call.order_BM.shape
    C = ring_BS.shape[1] // M
    ring_BMC = ring_BS.reshape(B, M, C, *ring_BS.shape[2:])
    ring_BMC = jnp.take_along_axis(ring_BMC, call.order_BM.reshape(B, M, *(1,) * (ring_BMC.ndim - 2)), axis=1)
    ring_MBC = jnp.moveaxis(ring_BMC, 1, 0)
    own_NBC = attention.lay(x_BT, call.held_B, C)
    if call.earlier_BC is not None:
        earlier_BC = call.earlier_BC.reshape(B, C, *(1,) * (x_BT.ndim - 2))
        own_NBC = jnp.concatenate([jnp.where(earlier_BC, ring_MBC[-1], own_NBC[0])[None], own_NBC[1:]])
    if M == 1:
        return own_NBC, own_NBC
    before_NBC = jnp.concatenate([ring_MBC[:-1], own_NBC[:-1]])
    before_NBC = jax.lax.stop_gradient(before_NBC) if stop_gradient else before_NBC
    N = own_NBC.shape[0]
    return own_NBC, jnp.concatenate([*(before_NBC[j : j + N] for j in range(M - 1)), own_NBC], axis=2)


def fam_rotation(config: FamConfig, position_B: jax.Array, planned_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, F, R] of the FAM that stands before these positions, int32."""
    F = config.fam_length
    turns = lambda position_BF: rotation(config.rope, config.head_size, position_BF, planned_B, at_least_float32(config.dtype))
    row_1F = jnp.arange(F, dtype=jnp.int32)[None]
    if config.fam_positions == "zero":
        return turns(jnp.zeros_like(position_B[:, None] + row_1F))
    if config.fam_positions == "last":
        return turns(position_B[:, None] - F + row_1F)
    # At (i + 1) / (F + 1) - 1 from the position: a turn by the whole position, which is exact, then one by a fraction of a token's angle.
    cos_B1R, sin_B1R = turns(position_B[:, None])
    token_cos_B1R, token_sin_B1R = turns(jnp.ones_like(position_B[:, None]))
    share_1F1 = ((row_1F - F).astype(cos_B1R.dtype) / (F + 1))[..., None]
    angle_BFR = jnp.arctan2(token_sin_B1R, token_cos_B1R) * share_1F1
    cos_BFR, sin_BFR = jnp.cos(angle_BFR), jnp.sin(angle_BFR)
    return cos_B1R * cos_BFR - sin_B1R * sin_BFR, sin_B1R * cos_BFR + cos_B1R * sin_BFR
