"""Checkpoints: written in the background, never half, and read back to the last bit.

A checkpoint holds the parameters by name, so that it can be read without the optimizer, and the rest of the training state. The position in
the data and the random numbers are functions of the step.
"""

import logging
import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from infinicontext.errors import UserError


def _named(tree) -> dict[str, jax.Array]:
    """Leaves by their path; flat, so that a change of a library's container types does not make old checkpoints unreadable."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(named: dict[str, jax.Array], like):
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [named[jax.tree_util.keystr(path, simple=True, separator="/")] for path, _ in paths])


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, workdir: pathlib.Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = workdir.absolute() / "checkpoints"
        self._aside = workdir.absolute() / "unreadable_checkpoints"
        self._orbax = ocp.training.Checkpointer(
            self.folder, preservation_policy=ocp.training.preservation_policies.LatestN(keep), cleanup_tmp_directories=True
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, step: int, model: nnx.Module, rest: Any) -> None:
        """Starts writing and returns; at most one checkpoint is being written at a time."""
        parameters = nnx.to_pure_dict(nnx.state(model))
        if jax.default_backend() == "cpu":
            # The writer reads CPU buffers in place, and the next step will overwrite what is donated to it.
            parameters, rest = jax.tree.map(jnp.copy, (parameters, rest))
        self._orbax.save_checkpointables_async(step, {"parameters": parameters, "rest": _named(rest)}, force=True)

    def restore(self, like_model: nnx.Module, like_rest: Any) -> tuple[int, nnx.Module, Any] | None:
        """The newest checkpoint that can be read, with a warning for each newer one that cannot.

        Args:
          like_model: the model's abstract arrays with their shardings.
          like_rest: the same for the rest of the training state.

        Returns:
          (step, model, rest), or None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none fits or can be read. Nothing is changed on disk.
        """
        graph, state = nnx.split(like_model)
        wanted = {"parameters": nnx.to_pure_dict(state), "rest": _named(like_rest)}
        failures: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                found = self._orbax.load_checkpointables(step, wanted)
            except Exception as error:  # damaged files surface as many exception types
                failures[step] = error
                continue
            for damaged, error in failures.items():
                warnings.warn(f"checkpoint {damaged} cannot be read and was moved to {self._aside}: {_first_line(error)}", stacklevel=2)
                self._aside.mkdir(exist_ok=True)
                shutil.rmtree(self._aside / str(damaged), ignore_errors=True)
                shutil.move(self.folder / str(damaged), self._aside / str(damaged))
            if failures:
                self._orbax.reload()
            return step, nnx.merge(graph, found["parameters"]), _unnamed(found["rest"], like_rest)
        if failures:
            step, error = next(iter(failures.items()))
            raise UserError(
                f"{self.folder}: none of the {len(failures)} checkpoints fits this config; checkpoint {step}: {_first_line(error)}"
            )
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
            found = self._orbax.load_checkpointables(step, {"parameters": nnx.to_pure_dict(state)})
        except Exception as error:
            raise UserError(f"{self.folder / str(step)} cannot be read: {_first_line(error)}") from error
        return step, nnx.merge(graph, found["parameters"])

    def close(self) -> None:
        """Waits until what is being written is complete."""
        self._orbax.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
