"""AdamW with schedules and parameter groups."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from infinicontext.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Its own peak learning rate and decay for the parameters whose metadata say group=name."""

    name: str
    learning_rate: float
    weight_decay: float = 0.0


# At a usual rate gates of Infini-attention stay where they began, and decay pulls them to one half: so found those who reproduced it.
DEFAULT_GROUPS = (ParameterGroup("gate", learning_rate=1e-2),)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019): Adam's step plus decay, both scaled by the learning rate."""

    learning_rate: float = 1e-3  # the peak
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the peak, at the last step
    weight_decay: float = 0.1  # of parameters with two named axes or more: not of norms and biases
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # of the global gradient; 0 switches clipping off
    groups: tuple[ParameterGroup, ...] = ()  # before those of DEFAULT_GROUPS
    train: tuple[str, ...] = ()  # groups whose parameters are trained, the others standing still; empty: all
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "final_fraction"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a fraction of the peak, by step: linear warm-up, then the chosen form down to `final_fraction` at `steps`."""
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(1.0, config.final_fraction, rest),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    # The first step already moves: a rate of exactly 0 would waste it.
    warmup = lambda step: (step + 1) / config.warmup_steps
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether a parameter with these axes maps vectors to vectors; biases of several heads have one named axis only."""
    return sum(axis is not None for axis in axes) > 1


def updates_done(state: optax.OptState) -> jax.Array:
    """How many updates `make_optimizer`'s transformation has applied: steps without those that were skipped."""
    return state.inner_state[-1].count


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, Adam, decay, schedule; updates of a non-finite gradient are skipped and counted (optax.apply_if_finite)."""
    groups = {group.name: group for group in (*DEFAULT_GROUPS, *config.groups)}
    fraction = schedule(config, steps)

    def scale(updates, state, params):
        def one(update, param):
            metadata = param.get_metadata()
            group = groups.get(metadata["group"])
            if group is None:
                rate, decay = config.learning_rate, config.weight_decay if is_matrix(metadata["axes"]) else 0.0
            else:
                rate, decay = group.learning_rate, group.weight_decay
            step = update[...] + decay * param[...] if decay else update[...]
            return update.replace(-rate * jnp.asarray(fraction(state.count), jnp.float32) * step)

        is_parameter = lambda leaf: isinstance(leaf, nnx.Variable)
        return jax.tree.map(one, updates, params, is_leaf=is_parameter), optax.ScaleByScheduleState(state.count + 1)

    return optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
            optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype),
            optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), scale),
        ),
        # Never apply a non-finite update; the loop stops the run after some in a row (training/loop.py).
        max_consecutive_errors=2**31 - 1,
    )
