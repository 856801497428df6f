"""One training step, compiled for a mesh. Shape letters: B rows, T tokens read per row, M microbatches."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext import models, sharding
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.nn.parameters import at_least_float32, parameter_groups
from infinicontext.objectives.next_token import token_weights, weighted_loss
from infinicontext.training.optimizer import make_optimizer, schedule, updates_done


class TrainState(NamedTuple):
    """Everything that changes from step to step. Data and random numbers are functions of (seed, step)."""

    step: jax.Array  # int32, steps done
    model: nnx.Module
    optimizer: optax.OptState


class Steps(NamedTuple):
    """The compiled pieces of training on a mesh."""

    init: Callable  # key -> TrainState, born sharded
    begin: Callable  # model -> TrainState of pretrained parameters, which are donated
    train_step: Callable  # (TrainState, batch) -> (TrainState, metrics); the state is donated
    validation_loss: Callable  # (model, batch) -> loss, a scalar
    like: TrainState  # abstract arrays with their shardings


def make_steps(experiment: Experiment, mesh: jax.sharding.Mesh) -> Steps:
    """The pieces of one experiment's training.

    Raises:
      UserError: optimizer.groups names a group that no parameter is in.
    """
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    fraction = schedule(experiment.optimizer, experiment.steps)

    def begin(model):
        return TrainState(jnp.int32(0), model, optimizer.init(model))

    def init(key):
        return begin(models.build(experiment.model, nnx.Rngs(key)))

    def train_step(state: TrainState, batch):
        batch = batch | {"weights": token_weights(experiment.objective, batch)}
        loss_and_gradient = jax.value_and_grad(lambda model, part: weighted_loss(experiment.objective, model, part))
        if experiment.accumulation == 1:
            loss, gradient = loss_and_gradient(state.model, batch)
        else:
            # Microbatch m takes every M-th row, so that each device's rows are in every microbatch.
            microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, experiment.accumulation, *x.shape[1:]), 1, 0), batch)
            zero = (jnp.zeros((), at_least_float32(experiment.model.dtype)), jax.tree.map(jnp.zeros_like, state.model))
            add = lambda total, part: (jax.tree.map(jnp.add, total, loss_and_gradient(state.model, part)), None)
            (loss, gradient), _ = jax.lax.scan(add, zero, microbatches)
        norm = optax.tree.norm(gradient)
        # A loss or a norm that is not finite spoils the update even where the gradient itself is finite; the optimizer skips on NaN.
        usable = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(
            jax.tree.map(lambda g: jnp.where(usable, g, jnp.nan), gradient), state.optimizer, state.model
        )
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": experiment.optimizer.learning_rate * fraction(updates_done(state.optimizer)),
            "skipped_in_a_row": optimizer_state.notfinite_count,
            "skipped_updates": optimizer_state.total_notfinite,
        }
        return TrainState(state.step + 1, optax.apply_updates(state.model, updates), optimizer_state), metrics

    def validation_loss(model, batch):
        return weighted_loss(experiment.objective, model, batch | {"weights": token_weights(experiment.objective, batch)})

    abstract = jax.eval_shape(init, jax.random.key(0))
    where = sharding.shardings(abstract, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)
    unknown = {group.name for group in experiment.optimizer.groups} - parameter_groups(abstract.model)
    if unknown:
        raise UserError(f"optimizer.groups names {min(unknown)}, but no parameter of this model is in such a group")
    replicated = NamedSharding(mesh, P())
    return Steps(
        jax.jit(init, out_shardings=where),
        jax.jit(begin, out_shardings=where, donate_argnums=0),
        jax.jit(train_step, donate_argnums=0, out_shardings=(where, replicated)),
        jax.jit(validation_loss, out_shardings=replicated),
        like,
    )
