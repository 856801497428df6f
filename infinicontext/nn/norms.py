"""Normalisation layers. Shape letters: D channels; any leading axes."""

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.nn.parameters import at_least_float32, constant, use


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, the statistics in float32 or wider (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, size: int, *, epsilon: float = 1e-6, axis: str | None = "embed"):
        self.scale = constant(1, (size,), (axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return jnp.einsum("...d,d->...d", wide, use(self.scale, wide.dtype)).astype(x.dtype)
