"""Training, one function read from top to bottom."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable

import grain
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext import sharding
from infinicontext.data import pipeline
from infinicontext.data.reference import HEADER
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.files import read_json
from infinicontext.models.streaming import Model
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import counted
from infinicontext.objectives.selective import Selective, of_validation, reference_scores, summary
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.checks import check
from infinicontext.training.metrics import MetricsWriter, Stopwatch, peak_flops
from infinicontext.training.run_folder import check_run_folder, lock, write_config
from infinicontext.training.step import TrainState, make_steps
from infinicontext.training.weights import keep_files, load_model, parameters_fingerprint, starting_model

# This many skipped updates in a row end a run: the parameters no longer move, so later batches will not help.
MAX_SKIPPED = 5


def train(
    experiment: Experiment, workdir: pathlib.Path, *, allow_config_change: bool = False, profile: bool = False, command: str = ""
) -> bool:
    """Trains, or goes on training, the run in a folder.

    Args:
      experiment: what to do.
      workdir: the run folder; an existing run is resumed exactly where its newest readable checkpoint stands.
      allow_config_change: resume although the experiment or its data differ from what the run was started with.
      profile: write a profile of steps 3 to 5 after the (re)start to workdir/profile.
      command: what the user typed, kept in config.json.

    Returns:
      True when the last step is done, False when a signal (SIGTERM, Ctrl-C) or a preemption notice came; what was done is saved.

    Raises:
      UserError: a wrong config, data that cannot be read, a run folder of another config, losses that are no longer finite. A folder that
        was no run before is left as it was.
    """
    # 1. Everything that can be wrong is found before anything is written.
    check(experiment)
    enable_compilation_cache(experiment.compilation_cache)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        reference = load_reference(experiment, mesh)
    fingerprint = pipeline.fingerprint(experiment.data) + reference_fingerprint(experiment, reference)
    check_run_folder(experiment, workdir, fingerprint, allow_config_change)
    divisor = sharding.batch_divisor(mesh) * experiment.accumulation
    steps = make_steps(experiment, mesh)

    with jax.set_mesh(mesh), lock(workdir), stop_signals() as stopped, contextlib.ExitStack() as closing:
        # 2. Data: batch s is a function of (seed, s), so the position is the step.
        on_devices = NamedSharding(mesh, P(sharding.RULES["batch"]))
        put = lambda batch: {name: jax.make_array_from_process_local_data(on_devices, x) for name, x in batch.items()}
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = pipeline.train_batches(experiment.data, experiment.batch_size, seed=experiment.seed, step=0, divisor=divisor, **processes)
        held_out = pipeline.validation_batches(experiment.data, experiment.batch_size, experiment.validation_batches, 0, divisor)
        weights = [counted(of_validation(experiment.objective), batch) for batch in held_out]
        own_rows = slice(jax.process_index(), None, jax.process_count())
        validation = [put({name: x[own_rows] for name, x in batch.items()}) for batch in held_out]

        with_reference = reference_reader(experiment, reference)

        # 3. State: from the newest checkpoint, else from the weights to start from, else from the seed.
        checkpoints = Checkpoints(workdir, keep=experiment.keep_checkpoints)
        closing.callback(checkpoints.close)
        restored = checkpoints.restore(steps.like.model, steps.like.rest)
        if restored is None and experiment.start_from:
            state = steps.begin(starting_model(pathlib.Path(experiment.start_from), experiment.model, mesh, experiment.seed))
        elif restored is None:
            state = steps.init(jax.random.key(experiment.seed))
        else:
            _, model, rest = restored
            state = TrainState(rest["step"], model, rest["optimizer"], rest.get("carried"))
        start = saved = int(state.step)
        write_config(experiment, workdir, fingerprint, command)
        if experiment.start_from and jax.process_index() == 0:
            keep_files(pathlib.Path(experiment.start_from), workdir)
        if start >= experiment.steps:
            return True
        grain.experimental.set_next_index(batches, start)

        # 4. The loop. A step's metrics are fetched after the next step has been sent off, so the device never waits for the host.
        metrics = MetricsWriter(workdir, experiment.steps, start, experiment.name)
        closing.callback(metrics.close)
        clock = Stopwatch(peak_flops())
        compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        pending: tuple[int, dict[str, jax.Array]] | None = None
        in_a_row = 0  # updates skipped up to the last step looked at

        def finish_pending():
            """Looks at the metrics of the last step that was sent off, once."""
            nonlocal pending, in_a_row
            if pending is None:
                return
            (step, values), pending = pending, None
            in_a_row, skipped = int(values["skipped_in_a_row"]), int(values["skipped_updates"])
            hopeless = in_a_row >= MAX_SKIPPED or (in_a_row and step == experiment.steps)
            if step % experiment.log_every == 0 or step == experiment.steps or hopeless:
                record = {"step": step} | {name: float(values[name]) for name in ("loss", "gradient_norm", "learning_rate")}
                record |= summary(values["selection"]) if values["selection"] else {}
                if tied := record.get("selected_tied"):
                    say(f"warning: step {step}: {tied:.0%} of tokens have the score at which selection ends; the first of them were taken")
                record["tokens"] = pipeline.tokens_read(experiment.data, experiment.batch_size, step, divisor)
                metrics.write(record | ({"skipped_updates": skipped} if skipped else {}) | clock.rates())
            if hopeless:
                raise UserError(
                    f"the loss or its gradient was not finite in the {in_a_row} steps up to step {step}, and their updates were skipped; "
                    f"lower optimizer.learning_rate, now {experiment.optimizer.learning_rate:g}, and resume with --allow-config-change"
                )

        for step in range(start + 1, experiment.steps + 1):
            batch = with_reference(put(next(batches)))
            rows, length = batch["tokens"].shape[0], batch["tokens"].shape[1] - 1
            if (rows, length) not in compiled:
                finish_pending()
                compiled[rows, length] = steps.train_step.lower(state, batch).compile()
                say(describe_step(compiled[rows, length], experiment, state.model, rows, length))
                clock.pause()
            if profile and step == start + 3:
                profiling = closing.enter_context(contextlib.ExitStack())
                profiling.enter_context(jax.profiler.trace(str(workdir / "profile")))
            clock.start()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = compiled[rows, length](state, batch)
            finish_pending()
            pending = (step, values)
            # Training costs three forward passes: one, and twice that for the gradient.
            clock.count(rows * length, 3 * rows * length * experiment.model.flops_per_token(length))
            if profile and step == start + 5:
                jax.block_until_ready(state)
                profiling.close()

            last = step == experiment.steps
            stop = stopped() or multihost_utils.reached_preemption_sync_point(step)
            validate = step % experiment.validation_every == 0 or last
            save = step % experiment.checkpoint_every == 0 or last or stop
            if validate or save:
                finish_pending()
            if validate:
                losses = [float(steps.validation_loss(state.model, part)) for part in validation]
                record = {"step": step, "validation_loss": float(np.average(losses, weights=weights))}
                if (gates_LH := steps.gates(state.model)) is not None:
                    record["gates"] = np.asarray(gates_LH, np.float64).round(6).tolist()
                metrics.write(record)
            # Parameters whose updates are being skipped may be ruined; saving them would push out the last good ones.
            if save and not in_a_row:
                # Records are on disk before the checkpoint that says they need not come again.
                metrics.sync()
                checkpoints.save(step, state.model, state.rest)
                saved = step
            if validate or save:
                clock.pause()
            if stop:
                say(f"stopped by a signal after step {step}; saved, and the same command resumes")
                return False
    return saved == experiment.steps


def load_reference(experiment: Experiment, mesh: jax.sharding.Mesh) -> Model | None:
    """The reference model of a selective objective, if it reads batches while another is trained; where all tokens are learnt from none.

    Raises:
      UserError: there is no such model, or its tokens are others.
    """
    objective = experiment.objective
    if not isinstance(objective, Selective) or not objective.reference or objective.ratio == 1:
        return None
    reference = load_model(pathlib.Path(objective.reference), mesh)
    tokenizer = pipeline.tokenizer_of(experiment.data)
    if tokenizer and (reference.tokenizer is None or reference.tokenizer.fingerprint() != tokenizer.fingerprint()):
        raise UserError(
            f"objective.reference {objective.reference} was trained with another tokenizer than data.tokenizer, {tokenizer.name}"
        )
    return reference.model


def reference_fingerprint(experiment: Experiment, reference: Model | None) -> str:
    """Of the reference's parameters, or of what is said of the scores it has left; empty where there is none."""
    if reference is not None:
        return "-" + parameters_fingerprint(reference)
    stored = getattr(experiment.data, "reference", "")
    return "-" + hashlib.sha256(json.dumps(read_json(pathlib.Path(stored) / HEADER)).encode()).hexdigest() if stored else ""


def reference_reader(experiment: Experiment, reference: Model | None) -> Callable[[dict], dict]:
    """Adds to a batch what the reference makes of it."""
    if reference is None:
        return lambda batch: batch
    scores = jax.jit(functools.partial(reference_scores, experiment.objective))
    return lambda batch: batch | scores(reference, batch)


def enable_compilation_cache(folder: str = Experiment.compilation_cache) -> None:
    """Keeps compiled programs on disk, unless the name is empty or JAX was already told where."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


def describe_step(compiled: jax.stages.Compiled, experiment: Experiment, model: nnx.Module, rows: int, length: int) -> str:
    """One line: parameters, tokens and memory of a step."""
    memory = compiled.memory_analysis()
    total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20
    return (
        f"{experiment.name}: {parameter_count(model):,} parameters; a step reads {rows} x {length} tokens and needs "
        f"{total:,.0f} MiB per device ({memory.temp_size_in_bytes / 2**20:,.0f} MiB of it for activations)"
    )


def say(line: str) -> None:
    """A line on the terminal of process 0."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_signals():
    """Yields a function that tells whether SIGTERM or Ctrl-C has come; a second Ctrl-C interrupts at once.

    With several processes, JAX's own preemption service decides for all of them at which step to stop.
    """
    if jax.process_count() > 1:
        yield lambda: False
        return
    received = []

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread (a notebook's worker): the default handlers stay
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
