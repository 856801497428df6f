"""Checkpoints: written in the background, never half, and read back to the last bit.

A checkpoint holds the parameters by name, so that it can be read without the optimizer, and the rest of the training state. The position in
the data and the random numbers are functions of the step. Checksums tell a damaged file from a whole one: the storage itself finds missing
and cut files, but reads a flipped bit without a word.
"""

import logging
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from infinicontext.errors import UserError


def _named(tree) -> dict[str, jax.Array]:
    """Leaves by their path; flat, so that a change of a library's container types does not make old checkpoints unreadable."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(named: dict[str, jax.Array], like):
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [named[jax.tree_util.keystr(path, simple=True, separator="/")] for path, _ in paths])


@jax.jit
def _checksums(tree) -> jax.Array:
    """For each leaf the sum of its bits read as unsigned integers, uint32 [leaves]; computed where the leaf lies."""

    def one(leaf):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool else leaf
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, workdir: pathlib.Path, *, keep: int | None = None):
        """Opens a run's checkpoints: `keep` of them for the one process that trains, None to read only."""
        # The storage logs errors that are handled and reported here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = workdir.absolute() / "checkpoints"
        self._aside = workdir.absolute() / "unreadable_checkpoints"
        if keep is None and not self.folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoint yet")
        # What a killed process left half written goes away, but only when no one else can be writing.
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=None if keep is None else ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, step: int, model: nnx.Module, rest: Any = None) -> None:
        """Starts writing and returns; at most one checkpoint is being written at a time. Without `rest` it cannot be resumed, only used."""
        items = {"parameters": nnx.to_pure_dict(nnx.state(model))} | ({} if rest is None else {"rest": _named(rest)})
        checksums = {f"{name}_checksums": {"sums": _checksums(tree)} for name, tree in items.items()}
        if jax.default_backend() == "cpu":
            # The writer reads CPU buffers in place, and the next step will overwrite what is donated to it.
            items = jax.tree.map(jnp.copy, items)
        self._orbax.save_checkpointables_async(step, items | checksums, force=True)

    def restore(self, like_model: nnx.Module, like_rest: Any) -> tuple[int, nnx.Module, Any] | None:
        """The newest checkpoint that can be read, with a warning on stderr for each newer one that cannot.

        Args:
          like_model: the model's abstract arrays with their shardings.
          like_rest: the same for the rest of the training state.

        Returns:
          (step, model, rest), or None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none fits or can be read. Nothing is changed on disk.
        """
        graph, state = nnx.split(like_model)
        failures: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                found = self._load(step, {"parameters": nnx.to_pure_dict(state), "rest": _named(like_rest)})
            except Exception as error:  # damaged files surface as many exception types
                failures[step] = error
                continue
            for damaged, error in failures.items():
                self._put_aside(damaged, error)
            return step, nnx.merge(graph, found["parameters"]), _unnamed(found["rest"], like_rest)
        if failures:
            step, error = next(iter(failures.items()))
            raise UserError(f"{self.folder}: no checkpoint can be read with this config; checkpoint {step}: {_short(error)}")
        return None

    def restore_model(self, like_model: nnx.Module, step: int | None = None) -> tuple[int, nnx.Module]:
        """The parameters alone, of `step` or of the newest checkpoint.

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}; it has {steps or 'none'}")
        step = steps[-1] if step is None else step
        graph, state = nnx.split(like_model)
        try:
            found = self._load(step, {"parameters": nnx.to_pure_dict(state)})
        except Exception as error:
            raise UserError(f"{self.folder / str(step)} cannot be read: {_short(error)}") from error
        return step, nnx.merge(graph, found["parameters"])

    def close(self) -> None:
        """Waits until what is being written is complete."""
        self._orbax.close()

    def _load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        wanted = dict(like)
        for name, tree in like.items():
            leaves = jax.tree.leaves(tree)
            replicated = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
            wanted[f"{name}_checksums"] = {"sums": jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=replicated)}
        found = self._orbax.load_checkpointables(step, wanted)
        for name in like:
            if not jnp.array_equal(_checksums(found[name]), found[f"{name}_checksums"]["sums"]):
                raise ValueError(f"the checksums of its {name} do not match")
        return found

    def _put_aside(self, step: int, error: Exception) -> None:
        """Out of the way of a new checkpoint of the same step, but not lost."""
        if jax.process_index() == 0:
            print(f"warning: checkpoint {step} cannot be read and was moved to {self._aside}: {_short(error)}", file=sys.stderr)
            self._aside.mkdir(exist_ok=True)
            shutil.rmtree(self._aside / str(step), ignore_errors=True)
            shutil.move(self.folder / str(step), self._aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint put aside")
        self._orbax.reload()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
