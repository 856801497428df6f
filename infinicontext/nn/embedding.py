"""Tokens in, logits out. Shape letters: B batch, T time, D channels, V vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.nn.parameters import at_least_float32, normal, use
from infinicontext.sharding import constrain


class Embedding(nnx.Module):
    """Token embedding and the head that turns hidden states into logits; one matrix for both when `tied`."""

    def __init__(
        self, vocab_size: int, dim: int, *, tied: bool, dtype: str, rngs: nnx.Rngs, draw: Callable = normal, std: float | None = None
    ):
        """draw: as `normal`. std: of the table; None: 1, or that of the head, 1 / sqrt(D), where it is the head too."""
        self.dtype = dtype
        if std is None:
            # A tied matrix is also the head, whose logits should start near unit variance; alone, unit variance suits the residual stream.
            std = dim**-0.5 if tied else 1.0
        self.table = draw(rngs(), (vocab_size, dim), ("vocab", "embed"), std)
        self.head = None if tied else draw(rngs(), (dim, vocab_size), ("embed", "vocab"), dim**-0.5)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """tokens_BT int32 -> x_BTD in the compute dtype."""
        return constrain(use(self.table, self.dtype)[tokens_BT], ("batch", "context", None))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """hidden_BTD -> logits_BTV, accumulated and returned in float32 or wider."""
        wide = at_least_float32(self.dtype)
        if self.head is None:
            return jnp.einsum("btd,vd->btv", hidden_BTD, use(self.table, self.dtype), preferred_element_type=wide)
        return jnp.einsum("btd,dv->btv", hidden_BTD, use(self.head, self.dtype), preferred_element_type=wide)
