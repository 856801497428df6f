"""MEGALODON: chunked attention whose memory is a moving average and running statistics (Ma et al. 2024, arXiv 2404.08801).

Shape letters: B batch, T time, D channels, N order of the moving average, G norm groups, H heads, K query and key size, U value size,
F feed-forward size, C tokens per chunk and slots of the cache, M slots written by a call, L layers, V vocabulary, R rotated pairs.

A token attends within its chunk alone. What came before reaches it through two recurrences of constant size: CEMA (nn/cema.py), which mixes
the tokens of each channel, and the timestep norm (nn/timestep_norm.py), whose statistics are those of everything read so far. Chunks and
rotary positions count from the start of a document. The equations are those of the official code, which the paper's leave open in places.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args, get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.nn import attention, context, cursor
from infinicontext.nn.attention import Cache, Slots
from infinicontext.nn.cema import CEMA, CemaState, Tables, cema_tables
from infinicontext.nn.cursor import Cursor, Place
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.norms import ZeroCentredLayerNorm, ZeroCentredRMSNorm, rms_normalised
from infinicontext.nn.parameters import InitMode, at_least_float32, constant, projection, stack, truncated_normal, use
from infinicontext.nn.rope import RopeConfig, RopeTable, apply_rope, fixed_point, rope_cos_sin, rope_table
from infinicontext.nn.timestep_norm import TimestepNorm, TimestepNormState
from infinicontext.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MegalodonConfig:
    """Shape and options of a MEGALODON; presets of the official code and the paper are in `PRESETS`."""

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 1
    z_dim: int | None = None  # queries and keys of all heads together; None: dim // 4
    value_dim: int | None = None  # values of all heads together; None: 2 dim
    feed_forward: int | None = None  # None: 2 dim
    cema_order: int = 16
    chunk: int = 256  # tokens
    norm_groups: int = 32  # of the timestep norms
    norm_affine: bool = True  # whether the other two norms of a layer have weights
    norm_epsilon: float = 1e-5
    prior_count: int = 0  # tokens that the timestep norms' learned prior counts as; 0: no prior
    rope_base: float = 10000.0
    rope_frequencies: tuple[float, ...] | None = None  # radians per token of each pair, in place of the base: those of a checkpoint
    swiglu: bool = True  # feed-forward with a gate; otherwise SiLU
    rescale_feed_forward: bool = False  # a learned scale of the feed-forward output, 0.1 / 2^layer at first
    scale_embeddings: bool = False  # by sqrt(dim)
    tied_embeddings: bool = False
    init_mode: InitMode = "he"  # none: zeros, for weights that will be loaded
    dropout: float = 0.0  # of embeddings and of both sub-layers' outputs
    hidden_dropout: float = 0.0  # of the averaged input, the gated attention output and the feed-forward's hidden layer
    attention_dropout: float = 0.0
    attention_dropout_mode: Literal["post_softmax", "dropkey"] = "post_softmax"
    cema_block: int | None = None  # tokens per block of CEMA; None: what suits the platform
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of activations and caches; parameters are float32
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations

    def __post_init__(self):
        def require(name: str, valid: bool, allowed: str):
            if not valid:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be {allowed}")

        for name in ("init_mode", "attention_dropout_mode", "dtype"):
            allowed = get_args(get_type_hints(MegalodonConfig)[name])
            require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("vocab_size", "layers", "heads", "cema_order", "chunk", "norm_groups"):
            require(name, getattr(self, name) >= 1, "1 or more")
        require("dim", self.dim >= 2, "2 or more")
        for name in ("z_dim", "value_dim", "feed_forward", "cema_block"):
            require(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        heads = self.heads
        require("z_dim", self.z_size % (2 * heads) == 0 < self.z_size, f"a multiple of 2 * heads, {2 * heads} (default: dim // 4)")
        require("value_dim", self.value_size % heads == 0, f"a multiple of heads, {heads} (default: 2 dim)")
        require("norm_groups", self.dim % self.norm_groups == 0, f"a divisor of dim, {self.dim}")
        least = 2 if self.norm_groups == self.dim else 0
        require("prior_count", self.prior_count >= least, f"{least} or more with {self.norm_groups} groups of {self.dim} channels")
        require("norm_epsilon", self.norm_epsilon > 0, "greater than 0")
        require("rope_base", self.rope_base > 1, "greater than 1")
        pairs = self.z_size // heads // 2
        require("rope_frequencies", self.rope_frequencies is None or len(self.rope_frequencies) == pairs, f"one number per pair, {pairs}")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            require(name, 0 <= getattr(self, name) < 1, "0 or more and less than 1")

    @property
    def z_size(self) -> int:
        """H K."""
        return self.dim // 4 if self.z_dim is None else self.z_dim

    @property
    def value_size(self) -> int:
        """H U."""
        return 2 * self.dim if self.value_dim is None else self.value_dim

    @property
    def feed_forward_size(self) -> int:
        """F."""
        return 2 * self.dim if self.feed_forward is None else self.feed_forward

    @property
    def has_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return max(self.dropout, self.hidden_dropout, self.attention_dropout) > 0

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, averaged over a sequence of `length`; multiply and add count as two."""
        chunks, rest = divmod(length, self.chunk)
        seen = (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2 / max(length, 1)
        projections = self.dim * (self.z_size + 3 * self.value_size + self.dim + (2 + self.swiglu) * self.feed_forward_size)
        average = 6 * self.dim * self.cema_order
        return 2 * (self.layers * (projections + average + (self.z_size + self.value_size) * seen) + self.dim * self.vocab_size)

    @staticmethod
    def examples() -> dict[str, "MegalodonConfig"]:
        """Tiny models that together use every option: what the tests run."""
        tiny = MegalodonConfig(
            vocab_size=17, dim=12, layers=2, heads=2, z_dim=8, value_dim=20, feed_forward=14, cema_order=3, chunk=5, norm_groups=3
        )
        return {
            "swiglu": dataclasses.replace(tiny, dropout=0.1, hidden_dropout=0.2, attention_dropout=0.3),
            "silu": dataclasses.replace(
                tiny,
                heads=1,
                z_dim=6,
                chunk=8,
                norm_groups=12,
                norm_affine=False,
                prior_count=2,
                rope_frequencies=(1.0, 0.1, 0.02),
                swiglu=False,
                rescale_feed_forward=True,
                scale_embeddings=True,
                tied_embeddings=True,
                init_mode="xavier",
                attention_dropout=0.3,
                attention_dropout_mode="dropkey",
                cema_block=4,
                remat=False,
            ),
        }


_1_3B = MegalodonConfig(
    vocab_size=32000, dim=2048, layers=24, heads=2, feed_forward=4864, z_dim=512, chunk=2048, norm_groups=64, swiglu=False
)
_7B = dataclasses.replace(_1_3B, dim=4096, layers=32, heads=4, feed_forward=8192, z_dim=1024, swiglu=True)
# The official code's model store, and the paper's 7B (its z_dim, value_dim and feed_forward are taken to be mega7.3B's).
PRESETS: dict[str, MegalodonConfig] = {
    "mega200M": dataclasses.replace(_1_3B, dim=1024, layers=12, heads=1, feed_forward=2560, z_dim=256, norm_groups=32),
    "mega1.3B": _1_3B,
    "mega1.3B_pg19": dataclasses.replace(_1_3B, feed_forward=3584, swiglu=True, scale_embeddings=True, tied_embeddings=True),
    "mega7.1B": dataclasses.replace(_7B, feed_forward=11264, swiglu=False),
    "mega7.3B": _7B,
    "megalodon_7b_paper": dataclasses.replace(_7B, chunk=4096, rope_base=1e5),
}


class LayerState(NamedTuple):
    """What the layers remember, with a leading layer axis."""

    norm: TimestepNormState
    cema: CemaState
    cache: Cache  # k [B, C, H, K], rotated, and v [B, C, H, U]; slot j is for position j of a chunk


class MegalodonState(NamedTuple):
    """Everything the model remembers, of constant size: C (K + U) H numbers, and 8 D N and 4 + 16 G bytes, per row and layer."""

    cursor: Cursor
    layers: LayerState
    final_norm: TimestepNormState


class _Call(NamedTuple):
    """What all layers of a call share."""

    place: Place
    fresh: bool  # known to begin an empty state
    starts_BT: jax.Array | None  # bool, where a document starts; None: nowhere but before the first token
    length_B: jax.Array | None  # int32, tokens that are not padding; None: T
    valid_BT: jax.Array | None
    slots: Slots  # what the cache holds before the call
    stays_BM: jax.Array  # int32, the tokens of the call that the cache holds after it
    rotation: tuple[jax.Array, jax.Array]


def dropped(x: jax.Array, rate: float, key: jax.Array | None, number: int) -> jax.Array:
    """Dropout number `number` of those that share a key; none without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def _keeping_products(function: Callable) -> Callable:
    """The function, of which the backward pass keeps inputs and matrix products; the rest is cheaper to compute again than to store."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)


class Block(nnx.Module):
    """Moving average, gated attention and feed-forward. Attention enters the residual stream only through the feed-forward."""

    def __init__(self, config: MegalodonConfig, rngs: nnx.Rngs):
        D, H, F = config.dim, config.heads, config.feed_forward_size
        K, U = config.z_size // H, config.value_size // H
        self.config = config
        dense = lambda shape, axes, inputs=1: projection(config.init_mode, rngs(), shape, axes, inputs)
        self.norm = TimestepNorm(D, config.norm_groups, config.prior_count, config.norm_epsilon)
        self.cema = CEMA(D, config.cema_order, rngs)
        self.cema_norm = ZeroCentredRMSNorm(D, epsilon=config.norm_epsilon, affine=config.norm_affine)
        self.z = dense((D, H, K), ("embed", "heads", None))
        self.z_bias = constant(0, (H, K), ("heads", None))
        self.value = dense((D, H, U), ("embed", "heads", None))
        self.value_bias = constant(0, (H, U), ("heads", None))
        self.gate = dense((D, H, U), ("embed", "heads", None))
        self.gate_bias = constant(0, (H, U), ("heads", None))
        self.direct = dense((D, D), ("embed", "channels"))
        self.direct_bias = constant(0, (D,), ("channels",))
        self.output = dense((H, U, D), ("heads", None, "embed"), inputs=2)
        self.gamma = constant(0, (2, H, K), (None, "heads", None))
        self.beta = constant(0, (2, H, K), (None, "heads", None))
        self.feed_forward_norm = ZeroCentredLayerNorm(D, epsilon=config.norm_epsilon, affine=config.norm_affine)
        self.feed_forward_in = dense((D, F), ("embed", "mlp"))
        self.feed_forward_gated = dense((D, F), ("embed", "mlp")) if config.swiglu else None
        self.feed_forward_out = dense((F, D), ("mlp", "embed"))
        self.rescale = constant(0.1, (D,), ("embed",)) if config.rescale_feed_forward else None

    def __call__(self, x_BTD: jax.Array, state: LayerState, tables, call: _Call, key: jax.Array | None) -> tuple[jax.Array, LayerState]:
        """x_BTD, the layer's state before the call, its CEMA tables -> x_BTD, its state; the cache is the M slots that change."""
        config = self.config
        normed_BTD, norm = context.timestep_norm(self.norm, x_BTD, state.norm, call.starts_BT, call.valid_BT)
        average_BTD, cema = context.cema(self.cema, normed_BTD, state.cema, call.starts_BT, call.length_B, tables)
        m_BTD, q_BTHK, k_BTHK, v_BTHU, gate_BTHU = _keeping_products(self._projections)(normed_BTD, average_BTD, call.rotation, key)
        dropout = None
        if key is not None and config.attention_dropout > 0:
            dropout = attention.Dropout(jax.random.fold_in(key, 1), config.attention_dropout, config.attention_dropout_mode)
        attend = functools.partial(self._attend, packed=call.starts_BT is not None, fresh=call.fresh)
        o_BTHU = context.attention(attend, q_BTHK, k_BTHK, v_BTHU, call.place, state.cache, call.slots, dropout)
        out_BTD = constrain(_keeping_products(self._residual)(x_BTD, m_BTD, o_BTHU, gate_BTHU, key), ("batch", "context", None))
        stays = lambda new_BT: jnp.take_along_axis(new_BT, call.stays_BM[..., None, None], axis=1)
        return out_BTD, LayerState(norm, cema, Cache(stays(k_BTHK), stays(v_BTHU)))

    def _projections(self, normed_BTD: jax.Array, average_BTD: jax.Array, rotation, key: jax.Array | None) -> tuple[jax.Array, ...]:
        """The averaged input normalised, rotated queries and keys, values, and the gate before its SiLU."""
        dtype = normed_BTD.dtype
        project = lambda x_BTD, weight, bias: jnp.einsum("btd,dhk->bthk", x_BTD, use(weight, dtype)) + use(bias, dtype)[None, None]
        m_BTD = dropped(self.cema_norm(average_BTD), self.config.hidden_dropout, key, 0)
        q_BTHK, k_BTHK = self._queries_and_keys(project(m_BTD, self.z, self.z_bias), rotation)
        v_BTHU = jax.nn.silu(project(normed_BTD, self.value, self.value_bias))
        return m_BTD, q_BTHK, k_BTHK, v_BTHU, project(m_BTD, self.gate, self.gate_bias)

    def _residual(self, x_BTD: jax.Array, m_BTD: jax.Array, o_BTHU: jax.Array, gate_BTHU: jax.Array, key: jax.Array | None) -> jax.Array:
        """The block's output. The residual of its second half is the block's input, not y."""
        config, dtype = self.config, x_BTD.dtype
        gated_BTHU = dropped(o_BTHU * jax.nn.silu(gate_BTHU), config.hidden_dropout, key, 2)
        h_BTD = m_BTD @ use(self.direct, dtype) + use(self.direct_bias, dtype)[None, None]
        h_BTD += jnp.einsum("bthk,hkd->btd", gated_BTHU, use(self.output, dtype))
        y_BTD = x_BTD + dropped(h_BTD, config.dropout, key, 3)
        return x_BTD + self._feed_forward(self.feed_forward_norm(y_BTD), key)

    def _queries_and_keys(self, z_BTHK: jax.Array, rotation) -> tuple[jax.Array, jax.Array]:
        """Two affine images of the normalised z, rotated. Both are divided by sqrt(K), so that they start as unit vectors."""
        wide_BTHK = rms_normalised(z_BTHK.astype(at_least_float32(z_BTHK.dtype)), self.config.norm_epsilon)
        gamma_2HK, beta_2HK = use(self.gamma, wide_BTHK.dtype), use(self.beta, wide_BTHK.dtype)
        scale_2HK = (gamma_2HK + 1) * z_BTHK.shape[-1] ** -0.5
        images = (wide_BTHK * scale_2HK[i][None, None] + beta_2HK[i][None, None] for i in range(2))
        q_BTHK, k_BTHK = (apply_rope(image_BTHK, *rotation, neighbours=True).astype(z_BTHK.dtype) for image_BTHK in images)
        return q_BTHK, k_BTHK

    def _attend(self, q_BTHK, k_BTHK, v_BTHU, place: Place, cache: Cache, slots: Slots, dropout, *, packed: bool, fresh: bool) -> jax.Array:
        """o_BTHU: each token's attention over its chunk, up to and including itself."""
        C = self.config.chunk
        held_B = place.position_BT[:, 0] % C  # slots that belong to the chunk of the row's first token
        if q_BTHK.shape[1] == 1 and dropout is None:
            seen_B1C = (jnp.arange(C, dtype=jnp.int32)[None] < held_B[:, None])[:, None]
            return attention.attend_one(q_BTHK, k_BTHK, v_BTHU, cache, seen_B1C, scale=1.0)
        if not packed and q_BTHK.shape[1] >= C:
            # A shard, which this may be, begins with a chunk if it holds whole ones.
            held_B = None if fresh and q_BTHK.shape[1] % C == 0 else held_B
            return attention.chunk_attention(q_BTHK, k_BTHK, v_BTHU, cache, held_B, scale=1.0, dropout=dropout)
        # In the ring token number i is in slot i mod C; here i counts from the start of the document.
        place, reach = place._replace(index_BT=place.position_BT), attention.block_sliding(C, 0)
        return attention.window_attention(q_BTHK, k_BTHK, v_BTHU, place, cache, slots, reach, scale=1.0, dropout=dropout)

    def _feed_forward(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        config, dtype = self.config, x_BTD.dtype
        hidden_BTF = jax.nn.silu(x_BTD @ use(self.feed_forward_in, dtype))
        if self.feed_forward_gated is not None:
            hidden_BTF *= x_BTD @ use(self.feed_forward_gated, dtype)
        y_BTD = dropped(hidden_BTF, config.hidden_dropout, key, 4) @ use(self.feed_forward_out, dtype)
        y_BTD = dropped(y_BTD, config.dropout, key, 5)
        if self.rescale is not None:
            wide = at_least_float32(dtype)
            y_BTD = (y_BTD.astype(wide) * use(self.rescale, wide)[None, None]).astype(dtype)
        return y_BTD


class Megalodon(nnx.Module):
    """A MEGALODON language model that reads a stream (models/streaming.py has the protocol)."""

    def __init__(self, config: MegalodonConfig, rngs: nnx.Rngs):
        self.config = config
        D, L = config.dim, config.layers
        self.embedding = Embedding(
            config.vocab_size, D, tied=config.tied_embeddings, dtype=config.dtype, rngs=rngs, draw=truncated_normal, std=D**-0.5
        )
        self.blocks = stack(lambda rngs: Block(config, rngs), L, rngs)
        if config.rescale_feed_forward:
            halves_L = 0.5 ** jnp.arange(L, dtype=jnp.float32)
            self.blocks.rescale = self.blocks.rescale.replace(self.blocks.rescale[...] * halves_L[:, None])
        self.final_norm = TimestepNorm(D, config.norm_groups, config.prior_count, config.norm_epsilon)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> MegalodonState:
        """The state before the first token; neither capacity nor plan changes it."""
        config, wide = self.config, at_least_float32(self.config.dtype)

        def of_layer(block: Block) -> LayerState:
            slots = (batch_size, config.chunk, config.heads)
            cache = Cache(*(jnp.zeros((*slots, size // config.heads), config.dtype) for size in (config.z_size, config.value_size)))
            cache = jax.tree.map(lambda x: constrain(x, ("batch", None, "heads", None)), cache)
            return LayerState(block.norm.init_state(batch_size, config.dtype), block.cema.init_state(batch_size, wide), cache)

        start = cursor.start(batch_size, (capacity or 0) if planned is None else planned)
        return MegalodonState(start, jax.vmap(of_layer)(self.blocks), self.final_norm.init_state(batch_size, config.dtype))

    def room(self, state: MegalodonState) -> None:
        """None: the state does not grow."""

    def hidden(
        self,
        tokens_BT: jax.Array,
        state: MegalodonState,
        segment_ids_BT: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tables: Tables | None = None,
    ) -> tuple[jax.Array, MegalodonState]:
        """Reads T tokens from wherever the stream stands.

        Args:
          tokens_BT: int32.
          state: what was read before.
          segment_ids_BT: int32, see nn/cursor.py; None continues the current document.
          dropout_key: for training with the config's dropout rates; None: no dropout.
          tables: `inference_tables(model.blocks.cema)`, for averages over very many tokens; None: computed here, in float32 or wider.

        Returns:
          hidden_BTD in the compute dtype, normalised for the head, and the state after the last token.
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, dtype, (B, T) = self.config, jnp.dtype(self.config.dtype), tokens_BT.shape
        if T == 0:
            return jnp.zeros((B, T, config.dim), dtype), state
        place, next_cursor = cursor.advance(state.cursor, T, segment_ids_BT)
        call, slot_BM = self._call(state.cursor, place, packed=segment_ids_BT is not None)
        # Once for the call: they would be computed twice within a layer that is recomputed.
        if tables is None:
            block = config.cema_block if T > 1 else 1
            tables = jax.vmap(lambda cema: cema_tables(cema, at_least_float32(dtype), block))(self.blocks.cema)
        embedding_key, keys_L = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        if keys_L is not None:
            keys_L = jax.random.split(keys_L, config.layers)

        def layer(x_BTD, xs):
            block, state, tables, key = xs
            return block(x_BTD, state, tables, call, key)

        x_BTD = self.embedding(tokens_BT)
        if config.scale_embeddings:
            x_BTD *= jnp.asarray(math.sqrt(config.dim), dtype)
        x_BTD = dropped(x_BTD, config.dropout, embedding_key, 0)
        layer = jax.checkpoint(layer) if config.remat else layer
        x_BTD, layers = jax.lax.scan(layer, x_BTD, (self.blocks, state.layers, tables, keys_L))
        layers = layers._replace(cache=attention.write_layers(state.layers.cache, layers.cache, slot_BM))
        hidden_BTD, final_norm = context.timestep_norm(self.final_norm, x_BTD, state.final_norm, call.starts_BT, call.valid_BT)
        return hidden_BTD, MegalodonState(next_cursor, layers, final_norm)

    def _call(self, before: Cursor, place: Place, packed: bool) -> tuple[_Call, jax.Array]:
        """What the layers need to know of a call, and the slots that its tokens are written to, slot_BM; slot C is none."""
        config, (B, T), C = self.config, place.position_BT.shape, self.config.chunk
        starts_BT = length_B = valid_BT = None
        if packed:
            valid_BT = place.document_BT > 0
            starts_BT, length_B = valid_BT & (place.position_BT == 0), jnp.sum(valid_BT, axis=1, dtype=jnp.int32)

        slot_1C = jnp.arange(C, dtype=jnp.int32)[None]
        held_B1 = before.position_B[:, None] % C
        slots = Slots(before.position_B[:, None] - held_B1 + slot_1C, jnp.where(slot_1C < held_B1, before.document_B[:, None], 0))

        slot_BM = jnp.where(place.document_BT > 0, place.position_BT % C, C)
        stays_BM = jnp.zeros_like(slot_BM)
        if T > 1:
            # The last token of each slot stays; earlier ones belong to chunks that are complete.
            rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
            last_BC = jnp.full((B, C), -1, jnp.int32).at[rows_B1, slot_BM].max(jnp.arange(T, dtype=jnp.int32)[None], mode="drop")
            stays_BM, slot_BM = jnp.maximum(last_BC, 0), jnp.where(last_BC >= 0, slot_1C, C)

        table = rope_table(RopeConfig(base=config.rope_base), config.z_size // config.heads)
        if config.rope_frequencies is not None:
            table = RopeTable(np.array(config.rope_frequencies, np.float64), 1.0)
        rotation = rope_cos_sin(fixed_point(table), place.position_BT % C, at_least_float32(config.dtype))
        return _Call(place, cursor.at_start(before), starts_BT, length_B, valid_BT, slots, stays_BM, rotation), slot_BM

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider."""
        return self.embedding.logits(hidden_BTD)

    def __call__(
        self, tokens_BT: jax.Array, state: MegalodonState, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, MegalodonState]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and the state."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state
