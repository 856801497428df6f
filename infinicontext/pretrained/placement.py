"""What reading any checkpoint has in common: parameters by path, slices of them on their devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from infinicontext import sharding

# Reads the slice `index` of one parameter.
Read = Callable[[tuple[slice, ...]], np.ndarray]


def parameter_paths(module: nnx.Module) -> dict[str, Any]:
    """A module's leaves by path, as in "blocks/attention/q"."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fill(model: nnx.Module, mesh: Mesh | None, reader: Callable[[str, tuple[int, ...]], Read]) -> nnx.Module:
    """An abstract model with its parameters read, each device's slice by itself, one after another.

    Args:
      model: from `models.abstract`.
      mesh: where the parameters go; None: the first device.
      reader: path and shape of a parameter -> how to read it.
    """
    graph, state = nnx.split(model)
    placed = sharding.shardings(model, mesh) if mesh else jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model)
    places = parameter_paths(placed)
    arrays = {name: _place(leaf.shape, places[name], reader(name, leaf.shape)) for name, leaf in parameter_paths(model).items()}
    pure = nnx.to_pure_dict(state)
    filled = jax.tree_util.tree_map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path, simple=True, separator="/")], pure)
    return nnx.merge(graph, filled)


def _place(shape: tuple[int, ...], where: jax.sharding.Sharding, read: Read) -> jax.Array:
    """An array made of slices that are read one at a time, each once, however many devices of this host it goes to."""
    devices_of: dict[tuple, list[jax.Device]] = {}
    indices = where.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        devices_of.setdefault(tuple(cut.indices(size) for cut, size in zip(index, shape)), []).append(device)
    on_device = {}
    for devices in devices_of.values():
        part = read(indices[devices[0]])
        on_device |= {device: jax.device_put(part, device) for device in devices}
        jax.block_until_ready(list(on_device.values()))
    return jax.make_array_from_single_device_arrays(shape, where, [on_device[device] for device in indices])
