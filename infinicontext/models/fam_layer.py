"""One layer of a TransformerFAM (Hwang et al. 2024, arXiv 2404.09173 v3, section 2.2 and algorithm 2).

Shape letters: B batch, T time, D channels, H query heads, G key/value heads, K head size, N blocks that a call touches, C tokens per block,
S cache slots, W slots written by a call, F rows of the feedback memory (FAM), P keys of FAM that tokens may see, X keys that FAM sees.

FAM asks the tokens of a block and itself through the layer's own projections, passes its feed-forward, and is what the tokens of the next
block see. It depends on keys and values of tokens, never on what the layer makes of them. So a layer reads all its blocks in three steps:
keys and values of all tokens at once; a scan over blocks on the rows of FAM alone; attention of all tokens at once.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.models.fam_attention import Call, FamConfig, lay_blocks
from infinicontext.nn import attention
from infinicontext.nn.attention import Cache
from infinicontext.nn.feed_forward import SwiGLU
from infinicontext.nn.norms import RMSNorm
from infinicontext.nn.parameters import constant, normal, use
from infinicontext.nn.rope import apply_rope
from infinicontext.sharding import constrain


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
        fam_BFD = self.finish(residual_BFD, o_BFHK, feed_forward=config.fam_feed_forward)
        if config.fam_limit:
            square_BF1 = jnp.mean(jnp.square(fam_BFD / config.fam_limit), axis=-1, keepdims=True)
            fam_BFD = fam_BFD * jax.lax.rsqrt(jnp.maximum(square_BF1, 1))
        return fam_BFD

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
        updates, rereads, N = call.updates, call.rereads, own.k_BSGK.shape[0]
        select = lambda x_NB, at_JB: jnp.take_along_axis(x_NB, at_JB.reshape(*at_JB.shape, *(1,) * (x_NB.ndim - 2)), axis=0)
        before = (fam_BFD, *self.fam_project(fam_BFD, call.entering_rotation, first_FD))
        if packed:
            prompt_BFD = jnp.broadcast_to(first_FD[None], fam_BFD.shape)
            prompt = (prompt_BFD, *self.fam_project(prompt_BFD, call.prompt_rotation, first_FD))

        def step(entering, xs):
            own, update = xs
            current = select_rows(update.replaced_NB, prompt, entering) if packed else entering
            after_BFD = self.update(*current, own, update.seen_NBC, update.fresh_NB, first_FD)
            if self.config.detach_every:
                after_BFD = select_rows(update.detaches_NB, jax.lax.stop_gradient(after_BFD), after_BFD)
            after = (after_BFD, *self.fam_project(after_BFD, update.rotation, first_FD))
            return select_rows(update.completes_NB, after, current), Cache(*entering[2:])

        if rereads is None:
            own = jax.tree.map(lambda x_NBC: x_NBC[: len(updates.fresh_NB)], own)
        else:
            own = jax.tree.map(lambda x_NBC: select(x_NBC, rereads.block_JB), own)
        (fam_BFD, _, *last), keys = jax.lax.scan(step, before, (own, updates))
        last = Cache(*last)
        if rereads is not None:
            keys = jax.tree.map(lambda x_JBF: select(x_JBF, rereads.first_NB), keys)
        if keys.k_BSGK.shape[0] < N:
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


def select_rows(mask_B: jax.Array, new, old, *, layers: bool = False):
    """Rows of one tree of arrays or of the other; with `layers` rows are their second axis."""
    expand = lambda x: mask_B.reshape((1,) * layers + (-1,) + (1,) * (x.ndim - 1 - layers))
    return jax.tree.map(lambda a, b: jnp.where(expand(a), a, b), new, old)
