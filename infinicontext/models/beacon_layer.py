"""One layer of a Transformer with beacons, but for what its rows see (Zhang et al. 2024, arXiv 2401.03462 v1 and v3).

Shape letters: B batch (or any leading axes), R rows (tokens, then beacons), D channels, H query heads, G key/value heads, K head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import constant, normal, use
from infinicontext.nn.rope import apply_rope
from infinicontext.sharding import constrain


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
