"""One training step, compiled for a mesh. Shape letters: B rows, T tokens read per row, M microbatches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext import models, sharding
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.nn.parameters import at_least_float32, of_groups, parameter_groups, with_parameters
from infinicontext.objectives.next_token import row_losses, token_weights, weighted_loss
from infinicontext.objectives.selective import Selective, of_validation, prepare, selective_loss
from infinicontext.training.carry import carried_after, carried_shardings, nothing_yet, state_before
from infinicontext.training.optimizer import make_optimizer, schedule, updates_done


class TrainState(NamedTuple):
    """Everything that changes from step to step. Data and random numbers are functions of (seed, step)."""

    step: jax.Array  # int32, steps done
    model: nnx.Module
    optimizer: optax.OptState
    carried: Any  # what the next step's rows begin with; None: nothing

    @property
    def rest(self) -> dict[str, Any]:
        """Everything but the model, by name, as checkpoints keep it."""
        return {"step": self.step, "optimizer": self.optimizer} | ({} if self.carried is None else {"carried": self.carried})


class Steps(NamedTuple):
    """The compiled pieces of training on a mesh."""

    init: Callable  # key -> TrainState, born sharded
    begin: Callable  # model -> TrainState of pretrained parameters, which are donated
    train_step: Callable  # (TrainState, batch) -> (TrainState, metrics); the state is donated
    validation_loss: Callable  # (model, batch) -> loss, a scalar
    gates: Callable  # model -> each head's share of its memory [L, H], None for a model without gates
    like: TrainState  # abstract arrays with their shardings


def make_steps(experiment: Experiment, mesh: jax.sharding.Mesh) -> Steps:
    """The pieces of one experiment's training.

    Raises:
      UserError: optimizer.groups or optimizer.train names a group that no parameter is in.
    """
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    fraction = schedule(experiment.optimizer, experiment.steps)
    trained_part = lambda model: of_groups(model, experiment.optimizer.train)
    objective = experiment.objective
    if isinstance(objective, Selective) and objective.ratio == 1:
        # The same program, so the same numbers to the last bit, which no two programs promise.
        objective = of_validation(objective)
    selective = isinstance(objective, Selective)

    def begin(model):
        return TrainState(jnp.int32(0), model, optimizer.init(trained_part(model)), nothing_yet(experiment, model))

    def init(key):
        return begin(models.build(experiment.model, nnx.Rngs(key)))

    def train_step(state: TrainState, batch):
        trained = trained_part(state.model)
        # Microbatch m takes every M-th row, so that each device's rows are in every microbatch.
        cut = lambda x: jnp.moveaxis(x.reshape(-1, experiment.accumulation, *x.shape[1:]), 1, 0)
        keys_M = None
        if getattr(experiment.model, "has_dropout", False):
            keys_M = jax.random.split(jax.random.fold_in(jax.random.key(experiment.seed), state.step), experiment.accumulation)
        batch = weighted(state, batch, cut, keys_M)

        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss_and_gradient(trained, part, key, microbatch):
            model = with_parameters(state.model, trained)
            before = state_before(experiment, model, state.carried, state.step, part["segment_ids"][:, :-1], microbatch)
            if selective:
                loss, (after, sums) = selective_loss(objective, model, part, key, before)
            else:
                (loss, after), sums = weighted_loss(objective, model, part, key, before), {}
            return loss, (carried_after(experiment, after), sums)

        if experiment.accumulation == 1:
            (loss, (carried, sums)), gradient = loss_and_gradient(trained, batch, None if keys_M is None else keys_M[0], 0)
        else:
            microbatches = jax.tree.map(cut, batch)
            zero = (jnp.zeros((), at_least_float32(experiment.model.dtype)), jax.tree.map(jnp.zeros_like, trained))

            def add(total, part):
                (loss, kept), gradient = loss_and_gradient(trained, *part)
                return jax.tree.map(jnp.add, total, (loss, gradient)), kept

            (loss, gradient), (carried_M, sums_M) = jax.lax.scan(add, zero, (microbatches, keys_M, jnp.arange(experiment.accumulation)))
            # The first row of the batch is in the first microbatch.
            carried = jax.tree.map(lambda x: x[0], carried_M)
            sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums_M)
        norm = optax.tree.norm(gradient)
        # A loss or a norm that is not finite spoils the update even where the gradient itself is finite; the optimizer skips on NaN.
        usable = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(
            jax.tree.map(lambda g: jnp.where(usable, g, jnp.nan), gradient), state.optimizer, trained
        )
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": experiment.optimizer.learning_rate * fraction(updates_done(state.optimizer)),
            "skipped_in_a_row": optimizer_state.notfinite_count,
            "skipped_updates": optimizer_state.total_notfinite,
            "selection": sums,
        }
        model = with_parameters(state.model, optax.apply_updates(trained, updates))
        # A state that is not finite, like the update, is not gone on with.
        carried = jax.tree.map(lambda new, old: jnp.where(usable, new, old), carried, state.carried)
        return TrainState(state.step + 1, model, optimizer_state, carried), metrics

    def weighted(state: TrainState, batch, cut, keys_M):
        """The batch with each token's weight in the loss."""
        if not selective:
            return batch | {"weights": token_weights(objective, batch)}
        if objective.two_passes:

            def losses_of(xs):
                part, key, microbatch = xs
                before = state_before(experiment, state.model, state.carried, state.step, part["segment_ids"][:, :-1], microbatch)
                return row_losses(state.model, part, key, before, chunk=objective.chunk)[0]

            losses_MBT = jax.lax.map(losses_of, (jax.tree.map(cut, batch), keys_M, jnp.arange(experiment.accumulation)))
            batch = batch | {"losses": jax.lax.stop_gradient(jnp.moveaxis(losses_MBT, 0, 1).reshape(len(batch["tokens"]), -1))}
        return prepare(objective, batch, step=state.step, seed=experiment.seed, microbatches=experiment.accumulation)

    def validation_loss(model, batch):
        of_all = of_validation(objective)
        return weighted_loss(of_all, model, batch | {"weights": token_weights(of_all, batch)})[0]

    def gates(model):
        model = model.merged() if isinstance(model, models.Adapted) else model
        return model.gates() if hasattr(model, "gates") else None

    abstract = jax.eval_shape(init, jax.random.key(0))
    where = sharding.shardings(abstract, mesh)._replace(carried=carried_shardings(experiment, mesh))
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)
    for field, names in (("groups", [group.name for group in experiment.optimizer.groups]), ("train", experiment.optimizer.train)):
        if unknown := set(names) - parameter_groups(abstract.model):
            raise UserError(f"optimizer.{field} names {min(unknown)}, but no parameter of this model is in such a group")
    replicated = NamedSharding(mesh, P())
    return Steps(
        jax.jit(init, out_shardings=where),
        jax.jit(begin, out_shardings=where, donate_argnums=0),
        jax.jit(train_step, donate_argnums=0, out_shardings=(where, replicated)),
        jax.jit(validation_loss, out_shardings=replicated),
        jax.jit(gates, out_shardings=replicated),
        like,
    )
