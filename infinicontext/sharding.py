"""Where arrays live: the mesh, the one table of rules, and the two functions that apply it.

Model code names the axes of its arrays ("embed", "heads", ...) and knows no mesh; this file maps those names to mesh axes. The
mesh always has all four axes, of size 1 where unused, because a rule that named a missing axis would raise.
"""

import dataclasses
import math

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "context": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "channels": "tensor",
    "norm_groups": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for `data` means all that remain."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in MESH_AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise UserError(
                    f"mesh.{name} is {size}; it must be 1 or more" + (" or -1 for all remaining devices" if name == "data" else "")
                )


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The four-axis mesh over `devices` (default: all of them).

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.context * config.tensor
    data = len(devices) // others if config.data == -1 else config.data
    if data * others != len(devices):
        shape = " x ".join(f"{name} {getattr(config, name)}" for name in MESH_AXES)
        raise UserError(f"mesh is {shape}, but its sizes must multiply to the number of devices, {len(devices)}")
    return jax.make_mesh((data, config.fsdp, config.context, config.tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def batch_divisor(mesh: Mesh) -> int:
    """A global batch must be a multiple of this many rows."""
    return math.prod(mesh.shape[name] for name in RULES["batch"])


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | jax.sharding.AbstractMesh) -> P:
    """Logical axis names of an array -> its PartitionSpec.

    A mesh axis already taken by an earlier dimension is not used again, and a dimension that the mesh does not divide (257 bytes over 2
    devices, one key/value head over 8) is not split.
    """
    taken: set[str] = set()
    out = []
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES.get(axis, ())
        names = (rule,) if isinstance(rule, str) else rule
        usable = names and not taken & set(names) and size % math.prod(mesh.shape[name] for name in names) == 0
        out.append(rule if usable else None)
        taken |= set(names) if usable else set()
    return P(*out)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks for x to be laid out by its logical axes; does nothing where no mesh is set (tests, notebooks)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def shardings(tree, mesh: Mesh):
    """A NamedSharding for each leaf of a tree that may hold modules.

    Parameters are placed by the names in their `axes` metadata; leading axes without a name (stacked layers) and leaves that are
    not parameters are replicated.
    """

    def place(leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        axes, shape = leaf.get_metadata().get("axes", ()), leaf.get_value().shape
        stacked = (None,) * (len(shape) - len(axes))
        return leaf.replace(NamedSharding(mesh, partition_spec(stacked + tuple(axes), shape, mesh)))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
