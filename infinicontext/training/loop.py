"""Training, one function read from top to bottom. Shape letters: B rows, T tokens read per row, M microbatches."""

import contextlib
import os
import pathlib
import signal
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext import models, sharding
from infinicontext.data import pipeline
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import token_weights, weighted_loss
from infinicontext.training.checkpoint import Checkpoints
from infinicontext.training.metrics import MetricsWriter, Stopwatch, peak_flops
from infinicontext.training.optimizer import make_optimizer, schedule
from infinicontext.training.run_folder import open_run_folder

# This many skipped updates in a row end a run: the parameters no longer move, so later batches will not help.
MAX_NON_FINITE = 5


class TrainState(NamedTuple):
    """Everything that changes from step to step. Data and random numbers are functions of (seed, step)."""

    step: jax.Array  # int32, steps done
    model: nnx.Module
    optimizer: optax.OptState


def make_steps(experiment: Experiment, mesh: jax.sharding.Mesh):
    """The compiled pieces of training on a mesh.

    Returns:
      init: key -> TrainState, born sharded.
      train_step: (TrainState, batch) -> (TrainState, metrics); the state is donated.
      validation_loss: (model, batch) -> loss, a scalar.
      where: the TrainState's shardings.
    """
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    fraction = schedule(experiment.optimizer, experiment.steps)

    def init(key):
        model = models.build(experiment.model, nnx.Rngs(key))
        return TrainState(jnp.int32(0), model, optimizer.init(model))

    def train_step(state: TrainState, batch):
        batch = batch | {"weights": token_weights(experiment.objective, batch)}
        loss_and_gradient = jax.value_and_grad(lambda model, part: weighted_loss(experiment.objective, model, part))
        if experiment.accumulation == 1:
            loss, gradient = loss_and_gradient(state.model, batch)
        else:
            # Microbatch m takes every M-th row, so that each device's rows are in every microbatch.
            microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, experiment.accumulation, *x.shape[1:]), 1, 0), batch)
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.model))
            add = lambda total, part: (jax.tree.map(jnp.add, total, loss_and_gradient(state.model, part)), None)
            (loss, gradient), _ = jax.lax.scan(add, zero, microbatches)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.model)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": experiment.optimizer.learning_rate * fraction(state.step),
            "non_finite": optimizer_state.notfinite_count,
        }
        return TrainState(state.step + 1, optax.apply_updates(state.model, updates), optimizer_state), metrics

    def validation_loss(model, batch):
        return weighted_loss(experiment.objective, model, batch | {"weights": token_weights(experiment.objective, batch)})

    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    replicated = NamedSharding(mesh, P())
    return (
        jax.jit(init, out_shardings=where),
        jax.jit(train_step, donate_argnums=0, out_shardings=(where, replicated)),
        jax.jit(validation_loss, out_shardings=replicated),
        where,
    )


def train(
    experiment: Experiment, workdir: pathlib.Path, *, allow_config_change: bool = False, profile: bool = False, command: str = ""
) -> bool:
    """Trains, or goes on training, the run in a folder.

    Args:
      experiment: what to do.
      workdir: the run folder; an existing run is resumed exactly where its newest readable checkpoint stands.
      allow_config_change: resume although the experiment differs from the one that the run was started with.
      profile: write a profile of steps 3 to 5 after the (re)start to workdir/profile.
      command: what the user typed, kept in config.json.

    Returns:
      True when the last step is done, False when a signal (SIGTERM, Ctrl-C) or a preemption notice ended the run early; it can be resumed.

    Raises:
      UserError: a wrong config, data that cannot be read, a run folder of another config, losses that are no longer finite.
    """
    # 1. The run folder: new, resumed, or refused.
    check_vocabulary(experiment)
    mesh = sharding.make_mesh(experiment.mesh)
    divisor = sharding.batch_divisor(mesh) * experiment.accumulation
    if experiment.batch_size % divisor:
        raise UserError(
            f"batch_size is {experiment.batch_size}; on this mesh it must be a multiple of {divisor} "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x accumulation {experiment.accumulation})"
        )
    open_run_folder(experiment, workdir, allow_config_change, command)
    enable_compilation_cache(experiment)

    with jax.set_mesh(mesh), stop_signals() as stopped, contextlib.ExitStack() as closing:
        # 2. State: from the newest checkpoint, or from the seed.
        init, train_step, validation_loss, where = make_steps(experiment, mesh)
        abstract = jax.eval_shape(init, jax.random.key(0))
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where)
        checkpoints = Checkpoints(workdir, experiment.keep_checkpoints)
        closing.callback(checkpoints.close)
        restored = checkpoints.restore(like.model, {"step": like.step, "optimizer": like.optimizer})
        if restored is None:
            state = init(jax.random.key(experiment.seed))
        else:
            _, model, rest = restored
            state = TrainState(rest["step"], model, rest["optimizer"])
        start = int(state.step)
        if start >= experiment.steps:
            return True

        # 3. Data: batch s is a function of (seed, s), so the position is the step.
        on_devices = NamedSharding(mesh, P(sharding.RULES["batch"]))
        put = lambda batch: {name: jax.make_array_from_process_local_data(on_devices, x) for name, x in batch.items()}
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = pipeline.train_batches(
            experiment.data, experiment.batch_size, seed=experiment.seed, step=start, divisor=divisor, **processes
        )
        held_out = pipeline.validation_batches(
            experiment.data, experiment.batch_size, experiment.validation_batches, experiment.seed, divisor
        )
        own_rows = slice(jax.process_index(), None, jax.process_count())
        validation = [put({name: x[own_rows] for name, x in batch.items()}) for batch in held_out]

        # 4. Compile before the first step, once for each shape of batch, and say what a step needs.
        compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}

        def step_for(batch):
            shape = batch["tokens"].shape
            if shape not in compiled:
                compiled[shape] = train_step.lower(state, batch).compile()
                say(describe_step(compiled[shape], experiment, state.model, shape))
            return compiled[shape]

        # 5. The loop. A step's metrics are fetched after the next step has been sent off, so the device never waits for the host.
        metrics = MetricsWriter(workdir, experiment.steps, start, experiment.name)
        closing.callback(metrics.close)
        clock = Stopwatch(peak_flops())
        pending: tuple[int, dict[str, jax.Array]] | None = None

        def log_pending():
            nonlocal pending
            if pending is None:
                return
            step, values = pending
            pending = None
            record = {"step": step} | {name: float(values[name]) for name in ("loss", "gradient_norm", "learning_rate")}
            record["tokens"] = pipeline.tokens_read(experiment.data, experiment.batch_size, step, divisor)
            skipped = int(values["non_finite"])
            if skipped:
                record["skipped_updates"] = skipped
            metrics.write(record | clock.rates())
            if skipped >= MAX_NON_FINITE:
                raise UserError(
                    f"the gradient was not finite in the {skipped} steps up to step {step}, and their updates were skipped; lower "
                    f"optimizer.learning_rate, now {experiment.optimizer.learning_rate:g}, and resume with --allow-config-change"
                )

        saved = start
        for step in range(start + 1, experiment.steps + 1):
            batch = put(next(batches))
            run_step = step_for(batch)
            if profile and step == start + 3:
                jax.profiler.start_trace(str(workdir / "profile"))
            clock.start()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = run_step(state, batch)
            if profile and step == min(start + 5, experiment.steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            log_pending()
            rows, length = batch["tokens"].shape[0], batch["tokens"].shape[1] - 1
            # Training costs three forward passes: one, and twice that for the gradient.
            clock.count(rows * length, 3 * rows * length * experiment.model.flops_per_token(length))
            last = step == experiment.steps
            if step % experiment.log_every == 0 or last:
                pending = (step, values)
            stop = stopped() or multihost_utils.reached_preemption_sync_point(step)
            validate = step % experiment.validation_every == 0 or last
            save = step % experiment.checkpoint_every == 0 or last or stop
            if validate or save:
                log_pending()
            if validate:
                losses = [validation_loss(state.model, part) for part in validation]
                metrics.write({"step": step, "validation_loss": float(np.mean([float(loss) for loss in losses]))})
            if save:
                checkpoints.save(step, state.model, {"step": state.step, "optimizer": state.optimizer})
                saved = step
            if validate or save:
                clock.pause()
            if stop and not last:
                say(f"stopped by a signal after step {step}; saved, and the same command resumes")
                break
    return saved == experiment.steps


def check_vocabulary(experiment: Experiment) -> None:
    """Raises UserError if the model has no embedding for some token."""
    size = load_tokenizer(experiment.data.tokenizer).vocab_size
    if experiment.model.vocab_size < size:
        raise UserError(
            f"model.vocab_size is {experiment.model.vocab_size}, but data.tokenizer {experiment.data.tokenizer} has {size} tokens"
        )


def enable_compilation_cache(experiment: Experiment) -> None:
    """Keeps compiled programs on disk, unless JAX was already told where."""
    if experiment.compilation_cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(experiment.compilation_cache))


def describe_step(compiled: jax.stages.Compiled, experiment: Experiment, model: nnx.Module, shape: tuple[int, ...]) -> str:
    """One line: parameters, tokens and memory of a step."""
    memory = compiled.memory_analysis()
    total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20
    return (
        f"{experiment.name}: {parameter_count(model):,} parameters; a step reads {shape[0]} x {shape[1] - 1} tokens and needs "
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
