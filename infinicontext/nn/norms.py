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


class ZeroCentredRMSNorm(nnx.Module):
    """x / rms(x) * (weight + 1) over the last axis: weight decay pulls the scale to 1. Without `affine` there is no weight."""

    def __init__(self, size: int, *, epsilon: float, affine: bool):
        self.weight = constant(0, (size,), ("embed",)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        wide = rms_normalised(x.astype(at_least_float32(x.dtype)), self.epsilon)
        return _scaled(wide, self.weight).astype(x.dtype)


class ZeroCentredLayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * (weight + 1) + bias over the last axis. Without `affine` there are no parameters."""

    def __init__(self, size: int, *, epsilon: float, affine: bool):
        self.weight = constant(0, (size,), ("embed",)) if affine else None
        self.bias = constant(0, (size,), ("embed",)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        wide = x.astype(at_least_float32(x.dtype))
        wide = _scaled(rms_normalised(wide - jnp.mean(wide, axis=-1, keepdims=True), self.epsilon), self.weight)
        if self.bias is not None:
            wide += jnp.broadcast_to(use(self.bias, wide.dtype), wide.shape)
        return wide.astype(x.dtype)


def rms_normalised(x: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in x's dtype."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def _scaled(x: jax.Array, weight: nnx.Param | None) -> jax.Array:
    return x if weight is None else jnp.einsum("...d,d->...d", x, use(weight, x.dtype) + 1)
