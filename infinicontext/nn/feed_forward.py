"""The feed-forward half of a Transformer block. Shape letters: B batch, T time, D channels, F hidden size."""

import jax
from flax import nnx

from infinicontext.nn.parameters import constant, normal, use


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, section 2); biases are an option that few models take."""

    def __init__(self, dim: int, hidden: int, dtype: str, output_std: float, rngs: nnx.Rngs, *, bias: bool = False):
        self.dtype = dtype
        self.gate = normal(rngs(), (dim, hidden), ("embed", "mlp"), dim**-0.5)
        self.up = normal(rngs(), (dim, hidden), ("embed", "mlp"), dim**-0.5)
        self.down = normal(rngs(), (hidden, dim), ("mlp", "embed"), output_std * hidden**-0.5)
        self.gate_bias = constant(0, (hidden,), ("mlp",)) if bias else None
        self.up_bias = constant(0, (hidden,), ("mlp",)) if bias else None
        self.down_bias = constant(0, (dim,), ("embed",)) if bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD in the compute dtype -> the same shape and dtype."""
        gate_BTF = self._linear(x_BTD, self.gate, self.gate_bias)
        up_BTF = self._linear(x_BTD, self.up, self.up_bias)
        return self._linear(jax.nn.silu(gate_BTF) * up_BTF, self.down, self.down_bias)

    def _linear(self, x_BT: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        y_BT = x_BT @ use(weight, self.dtype)
        return y_BT if bias is None else y_BT + use(bias, self.dtype)[None, None]
