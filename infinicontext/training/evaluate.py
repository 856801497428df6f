"""Evaluates a checkpoint of a run folder and writes eval.json."""

import dataclasses
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from infinicontext import sharding
from infinicontext.data.pipeline import tokenizer_of, validation_batches
from infinicontext.data.reference import HEADER
from infinicontext.errors import UserError
from infinicontext.evaluation.labels import bytes_label
from infinicontext.evaluation.selection import evaluate_categories, evaluate_selection
from infinicontext.evaluation.suite import Evaluation, corpora_of, evaluate
from infinicontext.experiment import Experiment, to_plain
from infinicontext.files import read_json, write_json
from infinicontext.models.streaming import Model, abstract_state_bytes
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import counted, row_losses
from infinicontext.objectives.selective import Selective, of_validation
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.checks import check_devices, check_ids, check_reference
from infinicontext.training.loop import enable_compilation_cache
from infinicontext.training.run_folder import commit, versions
from infinicontext.training.step import make_steps
from infinicontext.training.weights import load_model, merged, parameters_fingerprint, restore, speaker


def evaluate_run(experiment: Experiment, folder: pathlib.Path, output: pathlib.Path, step: int | None = None) -> None:
    """Evaluates a checkpoint of a run and writes each task's result as it comes, beside those of other tasks on the same checkpoint and
    model. What is there already, with the same settings and nothing left out, is not measured again. The cost of a task is this process's:
    its seconds, and the most memory from its start on."""
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
    say = lambda line: print(f"{experiment.name} {line}", file=sys.stderr, flush=True)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        asked, (step, model) = step, restore(folder, experiment.model, mesh, step)
        before = _read(output)
        if asked is not None and output == folder / "eval.json" and before.get("step", step) != step:
            raise UserError(f"--step is {step}, but {output} holds the results of step {before['step']}; give --output FILE to keep both")
        whole, lengths = merged(model), experiment.evaluation.lengths
        record = {
            "run": experiment.name,
            "step": step,
            "parameters": parameter_count(model),
            "train_length": experiment.train_length,
            "model": to_plain(experiment.model),
            "tokenizer_fingerprint": tokenizer.fingerprint() if (tokenizer := tokenizer_of(experiment.data)) else "",
            "parameters_fingerprint": parameters_fingerprint(model),
        }
        if any(before.get(key, value) != value for key, value in record.items()):
            before = {}
        record["state_bytes"] = before.get("state_bytes", {}) | {str(length): abstract_state_bytes(whole, length) for length in lengths}
        # Of the code that evaluates; what is there already may be of another.
        record |= {
            "versions": versions(),
            "commit": commit(),
            "tokenizer": getattr(tokenizer, "name", ""),
            "tasks": before.get("tasks", {}),
        }
        todo = []
        for task in experiment.evaluation.tasks:
            # What was left out for want of a file may be there now.
            if _is_done(record, task, experiment.evaluation) and not record["tasks"][task].get("skipped"):
                say(f"{task}: measured before, in {output}")
            else:
                todo.append(task)
        begin = time.perf_counter()
        for task, result in _results(experiment, tuple(todo), folder, mesh, model, say, output):
            cost = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
            sources = {"evaluation": to_plain(experiment.evaluation), "corpora": corpora_of(experiment.evaluation, task)}
            record["tasks"][task] = result | sources | {"cost": cost}
            write_json(output, record)
            peaks = ", ".join(f"{where} {bytes_label(size)}" for where, size in cost["peak_bytes"].items())
            say(f"{task}: {cost['seconds']:.1f} s, most memory: {peaks}")
            begin = time.perf_counter()
    write_json(output, record)
    print(output)


def _results(
    experiment: Experiment,
    tasks: tuple[str, ...],
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    model: Model,
    say: Callable[[str], None],
    output: pathlib.Path,
) -> Iterator[tuple[str, dict]]:
    """Of tasks, each as soon as it is there."""
    if not tasks:
        return
    objective, divisor = experiment.objective, sharding.batch_divisor(mesh)
    batches = validation_batches(experiment.data, experiment.batch_size, experiment.validation_batches, 0, divisor)
    loss = make_steps(experiment, mesh).validation_loss
    yield from evaluate(
        merged(model),
        dataclasses.replace(experiment.evaluation, tasks=tasks),
        experiment.data,
        validation=batches,
        validation_nll=float(
            np.average([float(loss(model, batch)) for batch in batches], weights=[counted(of_validation(objective), b) for b in batches])
        ),
        say=say,
        output=output,
        about={"model": to_plain(experiment.model), "parameters": parameters_fingerprint(model)},
        speaker=speaker(folder, experiment),
    )
    if "selection" in tasks:
        reference, tokenizer = reference_of(experiment, mesh), tokenizer_of(experiment.data)
        yield "selection", evaluate_selection(merged(model), reference, objective, batches[0], tokenizer)
    if "categories" in tasks:
        yield "categories", categories_of(experiment, folder, mesh, batches)


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


def peak_bytes() -> dict[str, int]:
    """The most memory that this process has had so far: of the host, and of the fullest of its devices where they count theirs."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = {"host": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    devices = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return host | ({"device": max(devices)} if devices else {})


def _read(output: pathlib.Path) -> dict:
    """An eval.json, or nothing where there is none that can be read."""
    try:
        return json.loads(output.read_text())
    except (OSError, ValueError):
        return {}


def is_evaluated(experiment: Experiment, output: pathlib.Path) -> bool:
    """Whether all tasks were run on the last step with the same settings."""
    record = _read(output)
    done = all(_is_done(record, task, experiment.evaluation) for task in experiment.evaluation.tasks)
    return record.get("step") == experiment.steps and done


def _is_done(record: dict, task: str, evaluation: Evaluation) -> bool:
    """Whether a result has a task with the same settings and texts, whatever other tasks there are."""
    result = record.get("tasks", {}).get(task, {})
    if "evaluation" not in result or result.get("corpora", {}) != corpora_of(evaluation, task):
        return False
    return {**result["evaluation"], "tasks": None} == {**to_plain(evaluation), "tasks": None}
