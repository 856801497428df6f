"""LoRA: matrices adapted by a product of two thin ones (Hu et al. 2021, arXiv 2106.09685, section 4.1).

Shape letters: L layers (absent where parameters are not stacked), I inputs and O outputs of a matrix, each perhaps of several axes, X the
same flattened, Y rank.

    W + (alpha / rank) A B,   A ~ N(0, 1 / I), B = 0

A matrix is any parameter whose first or last axis is the residual stream's ("embed"); the rank is taken between that axis and the others.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.nn.parameters import constant, is_parameter, normal


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how."""

    rank: int = 8
    alpha: float = 16.0
    parameters: tuple[str, ...] = ("q", "k", "v", "o")  # ends of names of matrices, the same in all layers

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"model.lora.rank is {self.rank}; it must be 1 or more")
        if not self.parameters:
            raise UserError("model.lora.parameters is empty; it must name one matrix or more, as q and v")


class Adapter(nnx.Module):
    """A and B of one parameter, in the group "lora"."""

    def __init__(self, parameter: nnx.Param, lora: Lora, rngs: nnx.Rngs):
        axes, shape = parameter.get_metadata()["axes"], parameter.shape
        layers, shape = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        split = 1 if axes[0] == "embed" else len(axes) - 1
        # Stacked parameters carry the axes of one layer.
        first = normal(rngs(), (*layers, *shape[:split], lora.rank), (*axes[:split], None), math.prod(shape[:split]) ** -0.5, group="lora")
        self.first, self.second = first, constant(0, (*layers, lora.rank, *shape[split:]), (None, *axes[split:]), group="lora")

    def product(self, shape: tuple[int, ...]) -> jax.Array:
        """A B in the parameter's shape, float32."""
        stacked = len(self.first.get_metadata()["axes"]) < self.first.ndim
        layers, rank_axis = (shape[0] if stacked else 1), len(self.second.get_metadata()["axes"])
        rank = self.second.shape[-rank_axis]
        return jnp.einsum("lxy,lyz->lxz", self.first[...].reshape(layers, -1, rank), self.second[...].reshape(layers, rank, -1)).reshape(
            shape
        )


def adapters(model: nnx.Module, lora: Lora, rngs: nnx.Rngs) -> nnx.Dict:
    """An adapter for each named parameter of a model, by its path.

    Raises:
      UserError: a name is no matrix of the model.
    """
    found, missing = {}, set(lora.parameters)
    for path, parameter in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_parameter):
        axes = parameter.get_metadata()["axes"]
        named = {end for end in lora.parameters if jax.tree_util.keystr(path).endswith(f".{end}")}
        if named and len(axes) > 1 and "embed" in (axes[0], axes[-1]):
            found[jax.tree_util.keystr(path)] = Adapter(parameter, lora, rngs)
            missing -= named
    if missing:
        raise UserError(f"model.lora.parameters names {min(missing)}, which is no matrix of this model")
    return nnx.Dict(found)


def merged(model: nnx.Module, adapters: nnx.Dict, lora: Lora) -> nnx.Module:
    """The model with the adapted matrices in place of its own."""

    def one(path, parameter):
        adapter = adapters.get(jax.tree_util.keystr(path))
        if adapter is None:
            return parameter
        return parameter.replace(parameter[...] + lora.alpha / lora.rank * adapter.product(parameter.shape))

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_parameter)
