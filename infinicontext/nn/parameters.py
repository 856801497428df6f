"""How parameters are made, used and stacked.

A parameter carries the names of its axes as metadata (`axes`, read by sharding.py) and the name of its group (`group`, read by
training/optimizer.py for learning rate and weight decay).
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.sharding import RULES, constrain


def normal(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, group: str = "default") -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes, group=group)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, group: str = "default") -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2) cut at three standard deviations."""
    return nnx.Param(std * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32), axes=axes, group=group)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], group: str = "default") -> nnx.Param:
    """A float32 parameter that starts at one value: scales at 1, biases at 0."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, group=group)


InitMode = Literal["he", "bert", "xavier", "gaussian", "none"]


def projection(mode: InitMode, key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int = 1) -> nnx.Param:
    """A float32 matrix drawn as MEGALODON's official code does; the first `inputs` axes are those summed over.

    he: N(0, 1 / (3 fan-in)). bert: N(0, 0.02^2). xavier: uniform, variance 2 / (fan-in + fan-out). gaussian: N(0, 1) cut at three standard
    deviations. none: 0, for weights that will be loaded.

    Raises:
      UserError: another mode.
    """
    fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    match mode:
        case "he":
            return normal(key, shape, axes, (3 * fan_in) ** -0.5)
        case "bert":
            return normal(key, shape, axes, 0.02)
        case "xavier":
            bound = math.sqrt(6 / (fan_in + fan_out))
            return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound), axes=axes, group="default")
        case "gaussian":
            return truncated_normal(key, shape, axes, 1)
        case "none":
            return constant(0, shape, axes)
        case _:
            raise UserError(f"init_mode is {mode}; it must be one of {', '.join(get_args(InitMode))}")


def use(parameter: nnx.Param, dtype: jnp.dtype | str) -> jax.Array:
    """A parameter as computed with: cast, and gathered over fsdp while tensor axes stay split.

    Gathering weights here instead of leaving it to the compiler moves fewer bytes: it would otherwise gather activations.
    """
    axes = parameter.get_metadata()["axes"]
    return constrain(parameter[...].astype(dtype), tuple(None if RULES.get(axis) == "fsdp" else axis for axis in axes))


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype of statistics, softmax, rotations and losses: float32, or float64 where the compute dtype is float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one, with each parameter stacked on a leading axis: the form that lax.scan runs over."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs(), count))


def is_parameter(leaf) -> bool:
    """Where jax.tree functions are to stop."""
    return isinstance(leaf, nnx.Variable)


def parameter_groups(module: nnx.Module) -> set[str]:
    """Names of the groups that a module's parameters are in."""
    return {parameter.get_metadata()["group"] for parameter in jax.tree.leaves(module, is_leaf=is_parameter)}


def of_groups(module: nnx.Module, groups: tuple[str, ...]) -> nnx.Module:
    """The module with None for parameters of other groups; no groups: all of it."""
    return jax.tree.map(lambda p: p if not groups or p.get_metadata()["group"] in groups else None, module, is_leaf=is_parameter)


def with_parameters(module: nnx.Module, some: nnx.Module) -> nnx.Module:
    """The module with the parameters that `some`, made by `of_groups`, has."""
    return jax.tree.map(lambda own, other: own if other is None else other, module, some, is_leaf=is_parameter)


def parameter_count(tree) -> int:
    """Number of scalars in a module (or in its abstract shape)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
