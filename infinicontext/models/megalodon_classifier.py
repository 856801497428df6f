"""MEGALODON as a classifier of whole sequences (Ma et al. 2024, section 4.4: Long Range Arena, images, speech; no code was released).

Shape letters: B batch, T time, D channels, G norm groups, H heads, K query and key size, U value size, C tokens per chunk, V vocabulary,
L layers.

The paper says that group normalisation takes the place of the timestep norm, and no more. Our reading of the rest: the moving average runs
in both directions, with parameters of their own, and the two are added; a token attends to its whole chunk, or to everything; the class is
read off the mean over time. The blocks are otherwise those of `megalodon.py`.

A classifier reads a row as a whole and carries no state. `hidden` gives the pooled row at every position and `logits` allows classes alone,
the last ids of the vocabulary, so that it is trained and evaluated like every other model, by the token that follows the row
(data/images.py).
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.megalodon import Block, MegalodonConfig, dropped
from infinicontext.nn import attention
from infinicontext.nn.cema import CEMA
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.parameters import at_least_float32, constant, normal, stack, truncated_normal, use
from infinicontext.nn.rope import RopeConfig, RopeTable, fixed_point, rope_cos_sin, rope_table
from infinicontext.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MegalodonClassifierConfig:
    """Shape and options of a classifier."""

    blocks: MegalodonConfig  # its vocabulary holds the input tokens, then the classes
    classes: int = 10
    attention: str = "full"  # or chunk: within blocks.chunk tokens
    bidirectional: bool = True  # otherwise the moving average runs forward only

    def __post_init__(self):
        if not 2 <= self.classes < self.blocks.vocab_size:
            raise UserError(
                f"model.classes is {self.classes}; it must be from 2 to below model.blocks.vocab_size, {self.blocks.vocab_size}"
            )
        if self.attention not in ("full", "chunk"):
            raise UserError(f"model.attention is {self.attention}; it must be full or chunk")
        if self.blocks.tied_embeddings:
            raise UserError("model.blocks.tied_embeddings is True; it must be False, because a classifier's head is for classes alone")
        if self.blocks.prior_count:
            raise UserError(
                f"model.blocks.prior_count is {self.blocks.prior_count}; a classifier's norms have no prior, so it must be 0, and "
                "model.blocks.norm_groups less than model.blocks.dim"
            )

    @property
    def vocab_size(self) -> int:
        """V: input tokens and classes."""
        return self.blocks.vocab_size

    @property
    def dtype(self) -> str:
        """Of activations."""
        return self.blocks.dtype

    @property
    def has_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return self.blocks.has_dropout

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass; multiply and add count as two."""
        config, seen = self.blocks, length if self.attention == "full" else min(length, self.blocks.chunk)
        more = (config.z_size + config.value_size) * seen + 6 * config.dim * config.cema_order * self.bidirectional
        return config.flops_per_token(1) + 2 * config.layers * more


class GroupNorm(nnx.Module):
    """Each group of channels, over all valid tokens of a row, to mean 0 and variance 1 (Wu & He 2018); weight + 1 and bias."""

    def __init__(self, dim: int, groups: int, epsilon: float):
        self.weight, self.bias = constant(0, (dim,), ("channels",)), constant(0, (dim,), ("channels",))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """x_BTD -> the same shape and dtype, 0 where not valid; statistics in float32 or wider."""
        wide, (B, T, D) = at_least_float32(x_BTD.dtype), x_BTD.shape
        x_BTGD = x_BTD.astype(wide).reshape(B, T, self.groups, -1)
        valid_BT11 = valid_BT[..., None, None]
        count_B111 = jnp.maximum(jnp.sum(valid_BT11, axis=1, keepdims=True), 1).astype(wide) * (D // self.groups)
        mean = lambda y_BTGD: jnp.sum(jnp.where(valid_BT11, y_BTGD, 0), axis=(1, 3), keepdims=True) / count_B111
        centred_BTGD = x_BTGD - mean(x_BTGD)
        y_BTD = (centred_BTGD * jax.lax.rsqrt(mean(centred_BTGD**2) + self.epsilon)).reshape(B, T, D)
        y_BTD = y_BTD * (use(self.weight, wide) + 1)[None, None] + use(self.bias, wide)[None, None]
        return jnp.where(valid_BT[..., None], y_BTD, 0).astype(x_BTD.dtype)


class ClassifierBlock(Block):
    """A MEGALODON block that sees the whole row."""

    def __init__(self, config: MegalodonClassifierConfig, rngs: nnx.Rngs):
        super().__init__(config.blocks, rngs)
        self.norm = GroupNorm(config.blocks.dim, config.blocks.norm_groups, config.blocks.norm_epsilon)
        self.backward_cema = CEMA(config.blocks.dim, config.blocks.cema_order, rngs) if config.bidirectional else None

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, chunk: int, rotation, key: jax.Array | None) -> jax.Array:
        """x_BTD -> x_BTD. T is a multiple of `chunk`, and padding stands at the end of a row."""
        config, dtype, B = self.config, x_BTD.dtype, x_BTD.shape[0]
        project = lambda x, weight, equation="btd,dhk->bthk": jnp.einsum(equation, x, use(weight, dtype))
        biased = lambda x, bias: x + use(bias, dtype)[None, None]

        normed_BTD = self.norm(x_BTD, valid_BT)
        wide = at_least_float32(dtype)
        average_BTD, _ = self.cema(normed_BTD, self.cema.init_state(B, wide), block=config.cema_block)
        if self.backward_cema is not None:
            # Backwards the padding, which is 0, comes first and leaves the state empty.
            reverse_BTD, _ = self.backward_cema(normed_BTD[:, ::-1], self.backward_cema.init_state(B, wide), block=config.cema_block)
            average_BTD += reverse_BTD[:, ::-1]
        m_BTD = dropped(self.cema_norm(average_BTD), config.hidden_dropout, key, 0)

        q_BTHK, k_BTHK = self._queries_and_keys(biased(project(m_BTD, self.z), self.z_bias), rotation)
        v_BTHU = jax.nn.silu(biased(project(normed_BTD, self.value), self.value_bias))
        r_BTHU = jax.nn.silu(biased(project(m_BTD, self.gate), self.gate_bias))
        dropout = None
        if key is not None and config.attention_dropout > 0:
            dropout = attention.Dropout(jax.random.fold_in(key, 1), config.attention_dropout, config.attention_dropout_mode)
        fold = lambda x_BT: x_BT.reshape(-1, chunk, *x_BT.shape[2:])
        o_BTHU = attention.row_attention(*map(fold, (q_BTHK, k_BTHK, v_BTHU, valid_BT)), scale=1.0, dropout=dropout).reshape(v_BTHU.shape)
        o_BTHU = dropped(o_BTHU * r_BTHU, config.hidden_dropout, key, 2)
        h_BTD = biased(m_BTD @ use(self.direct, dtype), self.direct_bias) + project(o_BTHU, self.output, "bthk,hkd->btd")
        y_BTD = x_BTD + dropped(h_BTD, config.dropout, key, 3)
        return constrain(x_BTD + self._feed_forward(self.feed_forward_norm(y_BTD), key), ("batch", None, None))


class MegalodonClassifier(nnx.Module):
    """A classifier of rows of tokens; its protocol is that of the models that read a stream, with a state of nothing."""

    def __init__(self, config: MegalodonClassifierConfig, rngs: nnx.Rngs):
        self.config, sequence = config, config.blocks
        D = sequence.dim
        self.embedding = Embedding(sequence.vocab_size, D, tied=True, dtype=sequence.dtype, rngs=rngs, draw=truncated_normal, std=D**-0.5)
        self.blocks = stack(lambda rngs: ClassifierBlock(config, rngs), sequence.layers, rngs)
        if sequence.rescale_feed_forward:
            halves_L = 0.5 ** jnp.arange(sequence.layers, dtype=jnp.float32)
            self.blocks.rescale = self.blocks.rescale.replace(self.blocks.rescale[...] * halves_L[:, None])
        self.final_norm = GroupNorm(D, sequence.norm_groups, sequence.norm_epsilon)
        self.head = normal(rngs(), (D, config.classes), ("embed", "vocab"), D**-0.5)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def room(self, state: tuple[()]) -> None:
        """None: there is no state that could be full."""

    def hidden(
        self,
        tokens_BT: jax.Array,
        state: tuple[()],
        segment_ids_BT: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Reads whole rows.

        Args:
          tokens_BT: int32.
          state: ().
          segment_ids_BT: int32, 0 for padding at the end of a row; a row is one document.
          dropout_key: for training with the config's dropout rates; None: no dropout.

        Returns:
          hidden_BTD in the compute dtype, the mean of the row's normalised tokens at every position, and ().
        """
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        config, (B, T) = self.config.blocks, tokens_BT.shape
        if T == 0:
            return jnp.zeros((B, T, config.dim), config.dtype), state
        chunk = T if self.config.attention == "full" else min(T, config.chunk)
        padding = -T % chunk
        valid_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT > 0
        valid_BT = jnp.pad(valid_BT, ((0, 0), (0, padding)))
        position_1T = jnp.arange(T + padding, dtype=jnp.int32)[None] % chunk
        table = rope_table(RopeConfig(base=config.rope_base), config.z_size // config.heads)
        if config.rope_frequencies is not None:
            table = RopeTable(np.array(config.rope_frequencies, np.float64), 1.0)
        rotation = rope_cos_sin(fixed_point(table), position_1T, at_least_float32(config.dtype))
        embedding_key, keys_L = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        if keys_L is not None:
            keys_L = jax.random.split(keys_L, config.layers)

        def layer(x_BTD, block_and_key):
            block, key = block_and_key
            return block(x_BTD, valid_BT, chunk, rotation, key), None

        x_BTD = self.embedding(tokens_BT)
        if config.scale_embeddings:
            x_BTD *= jnp.asarray(math.sqrt(config.dim), x_BTD.dtype)
        x_BTD = jnp.pad(dropped(x_BTD, config.dropout, embedding_key, 0), ((0, 0), (0, padding), (0, 0)))
        x_BTD, _ = jax.lax.scan(jax.checkpoint(layer) if config.remat else layer, x_BTD, (self.blocks, keys_L))
        normed_BTD = self.final_norm(x_BTD, valid_BT).astype(at_least_float32(config.dtype))
        pooled_BD = jnp.sum(normed_BTD, axis=1) / jnp.maximum(jnp.sum(valid_BT, axis=1, keepdims=True), 1).astype(normed_BTD.dtype)
        return jnp.broadcast_to(pooled_BD[:, None].astype(config.dtype), (B, T, config.dim)), state

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV in float32 or wider; what is no class cannot be chosen."""
        wide = at_least_float32(hidden_BTD.dtype)
        logits_BTC = jnp.einsum("btd,dc->btc", hidden_BTD, use(self.head, hidden_BTD.dtype), preferred_element_type=wide)
        inputs = self.config.vocab_size - self.config.classes
        return jnp.pad(logits_BTC, ((0, 0), (0, 0), (inputs, 0)), constant_values=float(jnp.finfo(wide).min))

    def __call__(self, tokens_BT: jax.Array, state: tuple[()], segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, tuple[()]]:
        """The same as `hidden`, with the head: logits_BTV in float32 or wider, and ()."""
        hidden_BTD, state = self.hidden(tokens_BT, state, segment_ids_BT)
        return self.logits(hidden_BTD), state
