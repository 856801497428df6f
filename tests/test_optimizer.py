"""AdamW: schedule, decay, groups, clipping, and gradients that are not finite. Shape letters: D channels, L layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from infinicontext.errors import UserError
from infinicontext.training.optimizer import OptimizerConfig, ParameterGroup, make_optimizer, schedule

STEPS = 20


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself multiplies dtypes that strict promotion refuses to mix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def parameters():
    """One parameter of each kind: a matrix, a vector, stacked vectors (their metadata name one axis), a vector of a group."""
    values = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
    return {
        "matrix": nnx.Param(values(4, 3), axes=("embed", "mlp"), group="default"),
        "vector": nnx.Param(values(4), axes=("embed",), group="default"),
        "stacked": nnx.Param(values(2, 4), axes=("embed",), group="default"),
        "memory": nnx.Param(values(3), axes=("embed",), group="memory"),
    }


def gradients(step, like):
    """Something that differs from step to step and from parameter to parameter."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step) + 0.1 * x, like)


def run(optimizer, params, grads):
    """The parameters after each gradient, as plain arrays, and the last state."""
    state, history = optimizer.init(params), []
    for gradient in grads:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(plain(params))
    return history, state


def plain(params):
    return {name: np.asarray(param[...] if isinstance(param, nnx.Variable) else param) for name, param in params.items()}


def assert_close(one, other, tolerance=1e-7):
    for name in other:
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("form", ["cosine", "linear", "constant"])
def test_schedule(form):
    fraction = schedule(OptimizerConfig(schedule=form, warmup_steps=4, final_fraction=0.2), STEPS)
    values = [float(fraction(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1, 1])
    middle, end = {"cosine": (0.6, 0.2), "linear": (0.6, 0.2), "constant": (1, 1)}[form]
    np.testing.assert_allclose([values[12], values[STEPS]], [middle, end], rtol=1e-6)
    assert all(one >= following for one, following in itertools.pairwise(values[4:]))


@given(warmup=st.integers(0, 30), steps=st.integers(1, 30), form=st.sampled_from(["cosine", "linear", "constant"]))
def test_schedule_is_a_fraction_and_never_zero(warmup, steps, form):
    fraction = schedule(OptimizerConfig(schedule=form, warmup_steps=warmup, final_fraction=0.1), steps)
    for step in {0, steps // 2, steps - 1}:
        assert min(0.099, 1 / max(warmup, 1)) < float(fraction(step)) + 1e-6 <= 1 + 2e-6


def test_equals_optax_adamw_where_nothing_is_special():
    config = OptimizerConfig(learning_rate=3e-2, warmup_steps=2, weight_decay=0.3, clip_norm=0)
    params = parameters()
    del params["memory"]
    fraction = schedule(config, STEPS)
    reference = optax.adamw(
        lambda step: 3e-2 * fraction(step),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=0.3,
        mask={"matrix": True, "vector": False, "stacked": False},
    )
    ours, _ = run(make_optimizer(config, STEPS), params, [gradients(step, params) for step in range(6)])
    plain_params = jax.tree.map(jnp.asarray, plain(params))
    theirs, _ = run(reference, plain_params, [gradients(step, plain_params) for step in range(6)])
    for one, other in zip(ours, theirs):
        assert_close(one, other)


@pytest.mark.parametrize("form", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_step_has_the_full_rate(form):
    config = OptimizerConfig(learning_rate=0.1, schedule=form, warmup_steps=0, weight_decay=0)
    params = parameters()
    (after,), _ = run(make_optimizer(config, STEPS), params, [jax.tree.map(jnp.ones_like, params)])
    assert_close(after, {name: value - 0.1 for name, value in plain(params).items()}, 1e-6)


def test_decay_is_of_parameters_with_two_axes_and_scales_with_the_rate():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=1, weight_decay=0.5)
    params = parameters()
    (after,), _ = run(make_optimizer(config, STEPS), params, [jax.tree.map(jnp.zeros_like, params)])
    before = plain(params)
    assert_close(after, before | {"matrix": before["matrix"] * (1 - 0.1 * 0.5)})


def test_group_has_its_own_rate_and_decay():
    common = {"schedule": "constant", "warmup_steps": 1, "clip_norm": 0}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, groups=(ParameterGroup("memory", 0.02, 0.7),), **common)
    alone = OptimizerConfig(learning_rate=0.02, weight_decay=0.7, **common)
    params = parameters()
    grads = [gradients(step, params) for step in range(3)]
    with_group, _ = run(make_optimizer(config, STEPS), params, grads)
    without, _ = run(make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **common), STEPS), params, grads)
    # The same vector as a matrix of one row decays by default, so it shows what the group should do.
    row = {"memory": nnx.Param(params["memory"][...][None], axes=("embed", "mlp"), group="default")}
    expected, _ = run(make_optimizer(alone, STEPS), row, [{"memory": row["memory"].replace(g["memory"][...][None])} for g in grads])
    for one, other, memory in zip(with_group, without, expected):
        assert_close(one, other | {"memory": memory["memory"][0]})
        assert np.abs(one["memory"] - other["memory"]).max() > 1e-2


def test_clipping_is_of_the_global_norm():
    # With a large epsilon Adam's step is proportional to its gradient, so that the norm of the gradient is seen in the update.
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=1, weight_decay=0, epsilon=1e4, clip_norm=0.5)
    params = parameters()
    gradient = gradients(0, params)
    norm = float(optax.tree.norm(gradient))
    assert norm > 1
    (clipped,), _ = run(make_optimizer(config, STEPS), params, [gradient])
    (by_hand,), _ = run(make_optimizer(config, STEPS), params, [jax.tree.map(lambda x: x * (0.5 / norm), gradient)])
    move = lambda after: {name: (value - plain(params)[name]) * 1e4 for name, value in after.items()}
    assert_close(move(clipped), move(by_hand), 2e-2)
    np.testing.assert_allclose(float(optax.tree.norm(move(clipped))), 0.5, rtol=2e-2)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradient_is_skipped_and_counted(bad):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=3), STEPS)
    params = parameters()
    good = [gradients(step, params) for step in range(2)]
    poisoned = dict(good[0], vector=good[0]["vector"].replace(good[0]["vector"][...].at[1].set(bad)))
    history, state = run(optimizer, params, [good[0], poisoned, poisoned])
    assert_close(history[1], history[0], 0)
    assert_close(history[2], history[0], 0)
    assert int(state.notfinite_count) == 2

    recovered, state = run(optimizer, params, [good[0], poisoned, good[1]])
    assert int(state.notfinite_count) == 0
    assert int(state.total_notfinite) == 1
    never_poisoned, _ = run(optimizer, params, good)
    assert_close(recovered[-1], never_poisoned[-1], 0)


def test_first_moment_dtype():
    params = parameters()
    optimizer = make_optimizer(OptimizerConfig(first_moment_dtype="bfloat16"), STEPS)
    _, state = run(optimizer, params, [gradients(0, params)])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", -1e-3), ("warmup_steps", -1), ("clip_norm", -1.0), ("beta1", 1.0), ("beta2", -0.1)]
)
def test_config_errors(name, value):
    with pytest.raises(UserError, match=rf"optimizer\.{name} is {value}; it must be"):
        OptimizerConfig(**{name: value})
