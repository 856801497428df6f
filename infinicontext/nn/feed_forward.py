"""The feed-forward half of a Transformer block. Shape letters: B batch, T time, D channels, F hidden size."""

import jax
from flax import nnx

from infinicontext.nn.parameters import normal, use


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x) without biases (Shazeer 2020, section 2)."""

    def __init__(self, dim: int, hidden: int, dtype: str, output_std: float, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gate = normal(rngs(), (dim, hidden), ("embed", "mlp"), dim**-0.5)
        self.up = normal(rngs(), (dim, hidden), ("embed", "mlp"), dim**-0.5)
        self.down = normal(rngs(), (hidden, dim), ("mlp", "embed"), output_std * hidden**-0.5)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD in the compute dtype -> the same shape and dtype."""
        gate_BTF = x_BTD @ use(self.gate, self.dtype)
        up_BTF = x_BTD @ use(self.up, self.dtype)
        return (jax.nn.silu(gate_BTF) * up_BTF) @ use(self.down, self.dtype)
