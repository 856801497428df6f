"""What a model remembers of a text, made once, kept in a file, and asked about as often as one likes.

Shape letters: B rows.

    state = remember(model, book, room=4096)
    save(path, state, parameters_fingerprint(model))
    generate(model, [question, other], options, read=after(state))

Of a model whose state is of constant size the file is as large after a million tokens as after a thousand; of one whose state grows, `room`
says how many tokens of questions and answers will fit behind the text.
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from infinicontext.errors import UserError
from infinicontext.inference.generate import read_on, read_prompts
from infinicontext.models.streaming import Model, State

FORMAT = "infinicontext memory 1"


def remember(model: Model, tokens: np.ndarray, *, room: int = 4096, segment: int = 512) -> State:
    """The state of one row after a text.

    Args:
      model: any model.
      tokens: int32 ids, one or more.
      room: tokens to be read or generated behind it; a state that grows has room for them, and rotary tables that depend on the length
        are those of a text that much longer.
      segment: tokens per call.

    Raises:
      UserError: there is nothing to read, or `room` is less than 1.
    """
    if room < 1 or segment < 1:
        raise UserError(f"room is {room} and segment {segment}; both must be 1 or more")
    if not len(tokens):
        raise UserError("there is nothing to read: the text has no tokens")
    planned = len(tokens) + room
    return read_prompts(model, [np.asarray(tokens, np.int32)], planned, np.array([planned], np.int32), segment)


def goes_on(model: Model, state: State, tokens: np.ndarray, *, segment: int = 512) -> State:
    """The state after more of a text; `state` stays as it is.

    Raises:
      UserError: it has no room for so many tokens.
    """
    _require_room(model, state, len(tokens))
    return read_on(model, [np.asarray(tokens, np.int32)], jax.tree.map(jnp.copy, state), segment)


def after(state: State) -> Callable[..., State]:
    """What `generate` and `stream` take as `read`: each prompt goes on from a state of one row, as if it alone did.

    Raises (when called):
      UserError: prompt and new tokens do not fit.
    """

    def read(model: Model, rows: list[np.ndarray], length: int, planned_B: np.ndarray, segment: int) -> State:
        _require_room(model, state, length)
        return read_on(model, rows, branched(model, state, len(rows)), segment)

    return read


def branched(model: Model, state: State, rows: int) -> State:
    """A state of one row as one of B rows that begin alike; a copy."""
    one, two = (jax.eval_shape(lambda rows=rows: model.init_state(rows, capacity=1)) for rows in (1, 2))
    # The axis that grows with the number of rows.
    axes = jax.tree.map(lambda x, y: next(axis for axis, (a, b) in enumerate(zip(x.shape, y.shape)) if a != b), one, two)
    return jax.tree.map(lambda x, axis: jnp.repeat(x, rows, axis=axis), state, axes)


def _require_room(model: Model, state: State, tokens: int) -> None:
    room_B = model.room(state)
    if room_B is not None and int(room_B[0]) < tokens:
        raise UserError(f"the memory has room for {int(room_B[0])} more tokens, not for {tokens}; read the text with more room")


def save(path: pathlib.Path, state: State, parameters: str) -> None:
    """Writes a state to a file, which appears when it is complete.

    Args:
      path: of the file; one that is there is replaced.
      state: of one row.
      parameters: fingerprint of the model's parameters (training/weights.py).

    Raises:
      UserError: the file cannot be written.
    """
    named = {jax.tree_util.keystr(where, simple=True, separator="/"): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(state)}
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(named, temporary, {"format": FORMAT, "parameters": parameters})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from error


def load(path: pathlib.Path, model: Model, parameters: str) -> State:
    """The state in a file.

    Args:
      path: a file that `save` has written.
      model: the model that has read the text.
      parameters: fingerprint of its parameters.

    Raises:
      UserError: the file cannot be read, is none of these, or is another model's.
    """
    try:
        with safe_open(path, "flax") as file:
            found, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{path} is no memory that infinicontext read has written")
    paths, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: model.init_state(1, capacity=1)))
    like = {jax.tree_util.keystr(where, simple=True, separator="/"): leaf.dtype for where, leaf in paths}
    if about.get("parameters") != parameters or {name: leaf.dtype for name, leaf in found.items()} != like:
        raise UserError(f"{path} was read by another model: its parameters or its dtype are not this one's")
    return jax.tree.unflatten(structure, [found[name] for name in like])
