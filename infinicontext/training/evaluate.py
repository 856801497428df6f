"""Evaluates a checkpoint of a run folder and writes eval.json."""

import json
import pathlib
import sys

import jax
import numpy as np

from infinicontext import sharding
from infinicontext.data.pipeline import tokenizer_of, validation_batches
from infinicontext.data.reference import HEADER
from infinicontext.errors import UserError
from infinicontext.evaluation.selection import evaluate_categories, evaluate_selection
from infinicontext.evaluation.suite import evaluate
from infinicontext.experiment import Experiment, to_plain
from infinicontext.files import read_json, write_json
from infinicontext.models.streaming import Model
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import counted, row_losses
from infinicontext.objectives.selective import Selective, of_validation
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.checks import check_devices, check_ids, check_reference
from infinicontext.training.loop import enable_compilation_cache
from infinicontext.training.step import make_steps
from infinicontext.training.weights import load_model, merged, parameters_fingerprint, restore


def evaluate_run(experiment: Experiment, folder: pathlib.Path, output: pathlib.Path, step: int | None = None) -> None:
    """Evaluates a checkpoint of a run and writes the result, beside results of other tasks on the same checkpoint and model."""
    check_ids(experiment)
    check_devices(experiment)
    if "selection" in experiment.evaluation.tasks:
        check_reference(experiment)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(output.name + ".tmp").touch()
        output.with_name(output.name + ".tmp").unlink()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    enable_compilation_cache(experiment.compilation_cache)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        steps = make_steps(experiment, mesh)
        step, model = restore(folder, experiment.model, mesh, step)
        divisor = sharding.batch_divisor(mesh)
        batches = validation_batches(experiment.data, experiment.batch_size, experiment.validation_batches, 0, divisor)
        losses = [float(steps.validation_loss(model, batch)) for batch in batches]
        result = evaluate(
            merged(model),
            experiment.evaluation,
            experiment.data,
            validation=batches,
            validation_nll=float(np.average(losses, weights=[counted(of_validation(experiment.objective), batch) for batch in batches])),
            say=lambda line: print(f"{experiment.name} {line}", file=sys.stderr, flush=True),
            output=output,
            about={"step": step, "model": to_plain(experiment.model), "parameters": parameters_fingerprint(model)},
        )
        if "selection" in experiment.evaluation.tasks:
            tokenizer = tokenizer_of(experiment.data)
            found = evaluate_selection(merged(model), reference_of(experiment, mesh), experiment.objective, batches[0], tokenizer)
            result["tasks"]["selection"] = found
        if "categories" in experiment.evaluation.tasks:
            result["tasks"]["categories"] = categories_of(experiment, folder, mesh, batches)
    record = {
        "run": experiment.name,
        "step": step,
        "parameters": parameter_count(model),
        "train_length": experiment.train_length,
        "model": to_plain(experiment.model),
        "tokenizer_fingerprint": tokenizer.fingerprint() if (tokenizer := tokenizer_of(experiment.data)) else "",
    } | result
    for task in record["tasks"].values():
        task["evaluation"] = to_plain(experiment.evaluation)
    before = _read(output)
    if all(before.get(key) == record[key] for key in ("run", "step", "parameters", "model", "tokenizer_fingerprint")):
        record["state_bytes"] = before["state_bytes"] | record["state_bytes"]
        record["tasks"] = before["tasks"] | record["tasks"]
    write_json(output, record)
    print(output)


def reference_of(experiment: Experiment, mesh: jax.sharding.Mesh) -> Model:
    """The reference model of a selective objective.

    Raises:
      UserError: there is none.
    """
    objective, stored = experiment.objective, getattr(experiment.data, "reference", "")
    if not isinstance(objective, Selective) or not (objective.reference or stored):
        raise UserError("evaluation.tasks has selection, which needs an objective of kind Selective with a reference")
    if objective.reference:
        return load_model(pathlib.Path(objective.reference), mesh).model
    made = read_json(pathlib.Path(stored) / HEADER)
    model = load_model(pathlib.Path(made["reference"]), mesh, step=made["step"]).model
    if parameters_fingerprint(model) != made["parameters"]:
        raise UserError(f"data.reference {stored} was made by other parameters than those in {made['reference']}")
    return model


def categories_of(experiment: Experiment, folder: pathlib.Path, mesh: jax.sharding.Mesh, batches: list[dict]) -> dict:
    """What became of validation tokens at the checkpoints that a run has kept.

    Raises:
      UserError: there are fewer than three.
    """
    # The line through a token's losses wants checkpoints that are evenly apart.
    steps = [step for step in Checkpoints(folder).steps() if step % experiment.checkpoint_every == 0]
    if len(steps) < 3:
        raise UserError(
            f"evaluation.tasks has categories, which needs 3 checkpoints or more, {experiment.checkpoint_every} steps apart; {folder} has "
            f"{len(steps)} (keep_checkpoints)"
        )
    read = jax.jit(lambda model, batch: row_losses(model, batch, chunk=experiment.objective.chunk)[0])
    losses = []
    for step in steps:
        model = merged(restore(folder, experiment.model, mesh, step)[1])
        losses.append(np.concatenate([np.asarray(read(model, batch))[batch["loss_mask"] > 0] for batch in batches]))
    return evaluate_categories(steps, np.stack(losses))


def _read(output: pathlib.Path) -> dict:
    """An eval.json, or nothing where there is none that can be read."""
    try:
        return json.loads(output.read_text())
    except (OSError, ValueError):
        return {}


def is_evaluated(experiment: Experiment, output: pathlib.Path) -> bool:
    """Whether all tasks were run on the last step with the same settings."""
    record = _read(output)
    settings = to_plain(experiment.evaluation)
    done = [name for name, task in record.get("tasks", {}).items() if task.get("evaluation") == settings]
    return record.get("step") == experiment.steps and set(experiment.evaluation.tasks) <= set(done)
