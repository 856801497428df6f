"""What a training step begins with of what the step before ended with. It is part of the training state, so that a run resumes exactly.

Shape letters: B rows, T tokens read per row, L layers, F rows of FAM, D channels.

`rows` is for streams of long documents: row b of a batch goes on where row b of the last one ended. `fam` is TransformerFAM's random state
passing (arXiv 2404.09173 v3, appendix B.2.3): with a probability, drawn once per step, all rows begin with the FAM that the first row ended
with and with nothing else; so a model meets more updates of FAM than a row has. Rows of a FAM model may also begin at random positions
(appendix B.2.2), which its rotary attention does not see but for rounding; in packed rows that is the first document.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext import models, sharding
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.models import ModelConfig
from infinicontext.models.fam import shifted
from infinicontext.models.streaming import Model, State
from infinicontext.nn.parameters import at_least_float32
from infinicontext.objectives.next_token import fresh_state

OFFSETS = 62_832  # random positions are below the paper's 2 pi x 10,000, whatever the rotary base


def _inner(config: ModelConfig) -> ModelConfig:
    """The model's own config, without adapters."""
    return config.model if isinstance(config, models.AdaptedConfig) else config


def nothing_yet(experiment: Experiment, model: Model) -> Any:
    """What the first step begins with; None where nothing is carried.

    Raises:
      UserError: the model's state grows, so that a row cannot go on for ever.
    """
    if experiment.carry == "nothing":
        return None
    if experiment.carry == "fam":
        config = _inner(experiment.model)
        return jnp.zeros((config.layers, config.fam_length, config.dim), at_least_float32(config.dtype))
    if isinstance(_inner(experiment.model), models.BeaconConfig):
        raise UserError("carry is rows, but in training a text's last chunk in a row has no beacons, so a memory of them cannot go on")
    state = jax.tree.map(jnp.asarray, model.init_state(experiment.batch_size, experiment.train_length))
    if model.room(state) is not None:
        raise UserError(f"carry is rows, but the state of {type(model).__name__} with these options grows with what it reads")
    return state


def state_before(
    experiment: Experiment, model: Model, carried: Any, step: jax.Array, segment_ids_BT: jax.Array, microbatch: jax.Array | int = 0
) -> State | None:
    """The state that a step's rows begin with; None: an empty one.

    Args:
      experiment: what is carried, the probability and the seed.
      model: with the parameters before the step.
      carried: from the step before.
      step: int32, steps done; decides what is drawn.
      segment_ids_BT: of the inputs, int32.
      microbatch: its number, so that rows of each draw positions of their own; the coin for FAM is one for the whole step.
    """
    if experiment.carry == "rows":
        return carried
    offsets = getattr(_inner(experiment.model), "random_offsets", False)
    if experiment.carry == "nothing" and not offsets:
        return None
    # FAM's rereads draw from the same key, but from keys that are split from it once more.
    coin, half, offset = jax.random.split(jax.random.fold_in(jax.random.key(experiment.seed), step), 3)
    empty = fresh_state(model, segment_ids_BT)
    if offsets:
        B = len(segment_ids_BT)
        half, offset = (jax.random.fold_in(key, microbatch) for key in (half, offset))
        offset_B = jnp.where(jax.random.bernoulli(half, 0.5, (B,)), jax.random.randint(offset, (B,), 0, OFFSETS), 0)
        empty = shifted(empty, offset_B, segment_ids_BT[:, 0])
    if experiment.carry == "nothing":
        return empty
    passes = jnp.any(carried != 0) & jax.random.bernoulli(coin, experiment.carry_probability)
    whole = model.merged() if isinstance(model, models.Adapted) else model
    passed = whole.passed(empty, carried)
    # What both have in common stays what is known at trace time.
    return jax.tree.map(lambda with_fam, without: without if with_fam is without else jnp.where(passes, with_fam, without), passed, empty)


def carried_after(experiment: Experiment, state: State) -> Any:
    """What is kept of the state after a step. A FAM that has read no block yet is kept as zeros, which are never passed on."""
    if experiment.carry == "nothing":
        return None
    if experiment.carry == "rows":
        return jax.lax.stop_gradient(state)
    return jax.lax.stop_gradient(jnp.where(state.feedback.fresh_B[0], 0, state.feedback.fam_LBFD[:, 0]))


def carried_shardings(experiment: Experiment, mesh: Mesh) -> Any:
    """Where what is carried lies: rows are split as batches are, the rest is on every device."""
    if experiment.carry != "rows":
        return None if experiment.carry == "nothing" else NamedSharding(mesh, P())
    model, B = models.abstract(experiment.model), experiment.batch_size
    one, other = (jax.eval_shape(lambda rows=rows: model.init_state(rows)) for rows in (B, B + 1))
    # The axis that grows with the number of rows.
    axes = lambda x, y: [sharding.RULES["batch"] if a != b else None for a, b in zip(x.shape, y.shape)]
    return jax.tree.map(lambda x, y: NamedSharding(mesh, P(*axes(x, y))), one, other)
