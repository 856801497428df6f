"""The next-token objective: cross-entropy in chunks, on all tokens or on marked ones.

Shape letters: B batch rows, T tokens read, D channels, V vocabulary, C tokens per chunk, N chunks.
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from infinicontext.errors import UserError
from infinicontext.models.streaming import Model, State
from infinicontext.nn import cursor


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Which tokens count in the loss, and how it is computed."""

    loss: Literal["all", "answers"] = "all"  # answers: only the tokens that the data mark as answers
    context_weight: float = 0.0  # with answers: weight of the mean loss over all tokens, added to the answers' mean
    skip: int = 0  # first tokens of a document, or of its part in a row, whose predictions do not count (Activation Beacon v1: a chunk)
    chunk: int = 512  # tokens per row whose logits exist at one time

    def __post_init__(self):
        if self.skip < 0:
            raise UserError(f"objective.skip is {self.skip}; it must be 0 or more")
        if self.chunk < 1:
            raise UserError(f"objective.chunk is {self.chunk}; it must be 1 or more")
        if self.context_weight < 0:
            raise UserError(f"objective.context_weight is {self.context_weight}; it must be 0 or more")


def token_losses(model: Model, hidden_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int = 512) -> jax.Array:
    """The cross-entropy of each target, in nats, without ever holding the logits of more than `chunk` tokens per row.

    Args:
      model: gives the head.
      hidden_BTD: any float dtype.
      targets_BT: int32.
      chunk: tokens per row and chunk; the backward pass recomputes a chunk's logits.

    Returns:
      losses_BT in float32 or wider.
    """
    chex.assert_equal_shape_prefix([hidden_BTD, targets_BT], 2)
    chex.assert_type(targets_BT, int)

    def one_chunk(hidden_BCD, targets_BC):
        logits_BCV = model.logits(hidden_BCD)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC

    return _in_chunks(one_chunk, chunk, hidden_BTD, targets_BT)


def token_entropies(model: Model, hidden_BTD: jax.Array, *, chunk: int = 512) -> jax.Array:
    """The entropy of the prediction at each token, in nats, as `token_losses` computes losses: [B, T]."""

    def one_chunk(hidden_BCD):
        logits_BCV = jax.nn.log_softmax(model.logits(hidden_BCD), axis=-1)
        return -jnp.sum(jnp.exp(logits_BCV) * logits_BCV, axis=-1)

    return _in_chunks(one_chunk, chunk, hidden_BTD)


def _in_chunks(function, chunk: int, *arrays_BT) -> jax.Array:
    """A function of tokens, of so many per row at a time."""
    B, T = arrays_BT[0].shape[:2]
    if chunk >= T:
        return function(*arrays_BT)
    whole = T - T % chunk
    cut = lambda x: jnp.moveaxis(x[:, :whole].reshape(B, whole // chunk, chunk, *x.shape[2:]), 1, 0)
    found_NBC = jax.lax.map(jax.checkpoint(lambda arrays_BC: function(*arrays_BC)), jax.tree.map(cut, arrays_BT))
    found_BT = jnp.moveaxis(found_NBC, 0, 1).reshape(B, whole)
    rest_BC = function(*(x[:, whole:] for x in arrays_BT))
    return jnp.concatenate([found_BT, rest_BC], axis=1)


def _mask(objective: NextToken, batch: dict[str, jax.Array], name: str) -> jax.Array:
    """Targets that count, float32 [B, T]."""
    if not objective.skip:
        return batch[name]
    B, T = batch[name].shape
    place, _ = cursor.advance(cursor.start(B), T, jnp.asarray(batch["segment_ids"][:, :-1]))
    return jnp.where(place.position_BT >= objective.skip, batch[name], 0)


def token_weights(objective: NextToken, batch: dict[str, jax.Array]) -> jax.Array:
    """Weights of each target such that the loss of the whole batch is their sum with the token losses.

    They are normalised over the global batch before it is cut into microbatches or over devices, so neither changes the loss.

    Args:
      objective: which tokens count.
      batch: loss_mask [B, T] and answer_mask [B, T], float32; with `skip` also segment_ids, int32 [B, T + 1].

    Returns:
      weights_BT, float32.
    """
    mean = lambda mask: mask / jnp.maximum(jnp.sum(mask), 1)
    if objective.loss == "all":
        return mean(_mask(objective, batch, "loss_mask"))
    weights_BT = mean(_mask(objective, batch, "answer_mask"))
    if objective.context_weight:
        weights_BT += objective.context_weight * mean(_mask(objective, batch, "loss_mask"))
    return weights_BT


def counted(objective: NextToken, batch: dict) -> float:
    """How many targets a batch's loss is the mean of: what it weighs in a mean over batches."""
    return float(_mask(objective, batch, "loss_mask" if objective.loss == "all" else "answer_mask").sum())


def fresh_state(model: Model, segments_BT: jax.Array) -> State:
    """A state that has read nothing and is planned for the longest document of each row.

    So with LongRoPE rows of short documents turn by short factors, as such texts will (mixed windows, LongRoPE2, section 3.4).
    """
    B, T = segments_BT.shape
    place, _ = cursor.advance(cursor.start(B), T, segments_BT)
    return model.init_state(B, T, jnp.max(jnp.where(place.document_BT > 0, place.position_BT + 1, 0), axis=1))


def row_losses(
    model: Model, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None, state: State | None = None, *, chunk: int
) -> tuple[jax.Array, State]:
    """Reads rows.

    Args:
      model: any model.
      batch: tokens int32 [B, T + 1], segment_ids int32 [B, T + 1]; targets int32 [B, T], where they are not the tokens that follow.
      dropout_key: for models with dropout, in training; None: no dropout.
      state: what the model has read before; None: `fresh_state`.
      chunk: tokens per row whose logits exist at one time.

    Returns:
      losses_BT, float32, and the state after the rows.
    """
    tokens_BT, targets_BT = batch["tokens"][:, :-1], batch.get("targets", batch["tokens"][:, 1:])
    dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
    state = fresh_state(model, batch["segment_ids"][:, :-1]) if state is None else state
    hidden_BTD, state = model.hidden(tokens_BT, state, batch["segment_ids"][:, :-1], **dropout)
    return token_losses(model, hidden_BTD, targets_BT, chunk=chunk), state


def weighted_sum(losses_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """A token of weight 0 (padding, a document's last token) may have a loss of no meaning."""
    return jnp.sum(jnp.where(weights_BT > 0, losses_BT, 0) * weights_BT)


def weighted_loss(
    objective: NextToken, model: Model, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None, state: State | None = None
) -> tuple[jax.Array, State]:
    """The sum of the weighted losses of rows, a float32 scalar, and the state after them.

    Args:
      objective: chunk size.
      model: any model.
      batch: as in `row_losses`, and weights float32 [B, T].
      dropout_key: as there.
      state: as there.
    """
    losses_BT, state = row_losses(model, batch, dropout_key, state, chunk=objective.chunk)
    return weighted_sum(losses_BT, batch["weights"]), state
