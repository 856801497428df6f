"""Selective language modelling: the loss of those tokens alone whose loss exceeds a reference model's the most (RHO-1, Lin et al. 2024,
arXiv 2404.07965).

Shape letters: B rows, T targets of a row, M microbatches, G groups, N position buckets, C tokens of a bucket, V vocabulary.

Which tokens are learnt from depends on the losses of the pass that they are learnt from; how many does not. So weights can be normalised
before that pass, over all microbatches and devices.
"""

import dataclasses
import functools
import math
from typing import Literal, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext import sharding
from infinicontext.errors import UserError
from infinicontext.models.streaming import Model, State
from infinicontext.objectives.next_token import NextToken, fresh_state, row_losses, token_entropies, token_losses, weighted_sum
from infinicontext.objectives.selection import Selection, count_of, in_basis_points, top_share

# excess: loss - reference loss (equation 3). Those of section 3.4 and random do not depend on the model that learns.
Score = Literal["excess", "low_reference_loss", "low_reference_entropy", "loss", "random"]
FIXED = ("low_reference_loss", "low_reference_entropy", "random")
BINS = 16  # of positions, in metrics
MANY_TIED = 0.01  # of the tokens that may be selected


@dataclasses.dataclass(frozen=True)
class Selective:
    """Which tokens count in the loss, and how it is computed."""

    # Of the tokens that may be selected; the paper's are 0.6 for 1B and 0.7 for 7B parameters. 1 is ordinary training: nothing is ranked,
    # and no reference model is run.
    ratio: float = 0.6
    score: Score = "excess"
    also: Score | None = None  # a second score, which like the first must not depend on the model, for the same ratio
    both: Literal["intersection", "union"] = "intersection"  # what is selected by two scores
    scope: Literal["batch", "row", "shard", "position"] = "batch"  # whose top share; shard: rows of a device; position: `bucket` columns
    bucket: int = 256  # tokens
    normalise: Literal["selected", "candidates"] = "selected"  # what the loss is the mean over; candidates: for ablation
    missing: Literal["drop", "select"] = "drop"  # tokens without a reference loss: no candidates, or always selected
    always_select_answers: bool = False  # beside the top share of the others
    two_passes: bool = False  # with accumulation: ranks the whole batch and not each microbatch, for one more forward pass
    warmup_steps: int = 0  # steps that learn from all candidates
    reference: str = (
        ""  # the run folder of the reference model, which scores each batch; empty: losses come with the data, or none are needed
    )
    loss: Literal["all", "answers"] = "all"  # answers: candidates are only the tokens that the data mark as answers
    chunk: int = 512  # tokens per row whose logits exist at one time

    def __post_init__(self):
        for name in ("score", "both", "scope", "normalise", "missing", "loss"):
            allowed = get_args(get_type_hints(Selective)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        if not (math.isfinite(self.ratio) and 1e-4 <= self.ratio <= 1):
            raise UserError(f"objective.ratio is {self.ratio}; it must be from 0.0001 to 1")
        if self.also is not None and not {self.score, self.also} <= set(FIXED):
            raise UserError(f"objective.also is {self.also} with objective.score {self.score}; both must be of {', '.join(FIXED)}")
        for name in ("chunk", "bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.warmup_steps < 0:
            raise UserError(f"objective.warmup_steps is {self.warmup_steps}; it must be 0 or more")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a batch must have of the reference: reference_loss, reference_entropy, both or nothing."""
        named = {"excess": "reference_loss", "low_reference_loss": "reference_loss", "low_reference_entropy": "reference_entropy"}
        return tuple(dict.fromkeys(named[score] for score in (self.score, self.also) if score in named))


def of_validation(objective: NextToken | Selective) -> NextToken:
    """The loss of all tokens, also where only some are learnt from."""
    return NextToken(objective.loss, chunk=objective.chunk) if isinstance(objective, Selective) else objective


def prepare(
    objective: Selective, batch: dict[str, jax.Array], *, step: jax.Array, seed: int, microbatches: int = 1
) -> dict[str, jax.Array]:
    """Adds to a batch what selecting needs.

    Args:
      objective: what is selected.
      batch: loss_mask and answer_mask, float32 [B, T]; reference_loss or reference_entropy, float32 [B, T], NaN where there is none; with
        `two_passes` also losses, the model's own.
      step: steps done before, for the warm-up and random numbers.
      seed: for random numbers.
      microbatches: M, each of which has every M-th row and selects by itself.

    Returns:
      The batch with weights [B, T] (of a token, if it is learnt from), possible [B, T] (bool, it may be), decided [B, T] (bool, it is) and
      basis_points [B, 1].
    """
    valid_BT = batch["answer_mask" if objective.loss == "answers" else "loss_mask"] > 0
    points = jnp.where(step < objective.warmup_steps, 10_000, in_basis_points(objective.ratio)).astype(jnp.int32)
    known_BT = jnp.ones_like(valid_BT)
    for name in objective.needs:
        known_BT &= jnp.isfinite(batch[name])
    decided_BT = jnp.zeros_like(valid_BT)
    if objective.missing == "select":
        decided_BT |= valid_BT & ~known_BT
    if objective.always_select_answers:
        decided_BT |= valid_BT & (batch["answer_mask"] > 0)
    candidates_BT = valid_BT & known_BT & ~decided_BT
    possible_BT = candidates_BT | decided_BT

    if objective.score in FIXED or "losses" in batch:
        draw = jax.random.fold_in(jax.random.key(seed), step)
        scores = [_score(score, batch, batch.get("losses"), draw) for score in (objective.score, objective.also) if score]
        masks = [select(objective, score_BT, candidates_BT, points).mask for score_BT in scores]
        combine = jnp.logical_and if objective.both == "intersection" else jnp.logical_or
        learnt_BT = decided_BT = decided_BT | functools.reduce(combine, masks)
        total = jnp.sum(decided_BT)
    else:
        learnt_BT = possible_BT
        rows_MBT = jnp.moveaxis(candidates_BT.reshape(-1, microbatches, candidates_BT.shape[1]), 1, 0)
        total = jnp.sum(decided_BT) + sum(_how_many(objective, rows_BT, points) for rows_BT in rows_MBT)
    if objective.normalise == "candidates":
        total = jnp.sum(possible_BT)
    weights_BT = learnt_BT.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    points_B1 = jnp.full((len(valid_BT), 1), points)
    return batch | {"weights": weights_BT, "possible": possible_BT, "decided": decided_BT, "basis_points": points_B1}


def reference_scores(objective: Selective, reference: Model, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a reference model makes of a batch: what the objective needs, float32 [B, T], NaN where no token is foretold.

    Args:
      objective: says what.
      reference: any model with the same vocabulary.
      batch: tokens and segment_ids, int32 [B, T + 1].
    """
    tokens_BT, targets_BT, segments_BS = batch["tokens"][:, :-1], batch.get("targets", batch["tokens"][:, 1:]), batch["segment_ids"]
    hidden_BTD, _ = reference.hidden(tokens_BT, fresh_state(reference, segments_BS[:, :-1]), segments_BS[:, :-1])
    of = {
        "reference_loss": lambda: token_losses(reference, hidden_BTD, targets_BT, chunk=objective.chunk),
        "reference_entropy": lambda: token_entropies(reference, hidden_BTD, chunk=objective.chunk),
    }
    foretold_BT = (segments_BS[:, 1:] == segments_BS[:, :-1]) & (segments_BS[:, 1:] > 0)
    return {name: jnp.where(foretold_BT, of[name]().astype(jnp.float32), jnp.nan) for name in objective.needs}


def selective_loss(
    objective: Selective, model: Model, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None, state: State | None = None
) -> tuple[jax.Array, tuple[State, dict[str, jax.Array]]]:
    """Reads rows, decides which of their tokens are learnt from, and sums their weighted losses.

    Args:
      objective: what is selected.
      model: any model.
      batch: from `prepare`, with tokens and segment_ids, int32 [B, T + 1].
      dropout_key: as in `row_losses`.
      state: as there.

    Returns:
      The loss, a float32 scalar; the state after the rows and sums over their tokens, from which `summary` makes what is recorded.
    """
    losses_BT, state = row_losses(model, batch, dropout_key, state, chunk=objective.chunk)
    still_BT, known_BT = jax.lax.stop_gradient(losses_BT), batch["weights"] > 0
    chosen_BT, threshold, tied = batch["decided"], jnp.float32(jnp.nan), jnp.int32(0)
    if objective.score not in FIXED and not objective.two_passes:
        score_BT = _score(objective.score, batch, still_BT, None)
        found = select(objective, score_BT, known_BT & ~batch["decided"], batch["basis_points"][0, 0])
        chosen_BT, threshold, tied = chosen_BT | found.mask, jnp.nanmean(found.threshold), jnp.sum(found.tied)
    loss = weighted_sum(losses_BT, jnp.where(chosen_BT, batch["weights"], 0))
    sums = _sums(batch, still_BT, chosen_BT) | {"threshold": threshold, "tied": tied.astype(jnp.float32), "passes": jnp.float32(1)}
    return loss, (state, sums)


def select(objective: Selective, score_BT: jax.Array, candidates_BT: jax.Array, basis_points: jax.Array | int) -> Selection:
    """The top share of each group that the objective's scope makes."""
    groups, axes = _groups(objective, score_BT), _AXES[objective.scope]
    found = top_share(groups(score_BT), groups(candidates_BT), basis_points, axes)
    B, T = score_BT.shape
    whole = lambda x: x.reshape(B, -1)[:, :T]
    return found._replace(mask=whole(found.mask), candidates=whole(found.candidates))


_AXES = {"batch": None, "row": (1,), "shard": (1, 2), "position": (0, 2)}


def _groups(objective: Selective, like_BT: jax.Array):
    """[B, T] -> an array that groups extend over some axes of."""
    B, T = like_BT.shape
    if objective.scope == "shard":
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else sharding.batch_divisor(mesh)
        return lambda x_BT: x_BT.reshape(shards, B // shards, T)
    if objective.scope == "position":
        C = min(objective.bucket, T)
        return lambda x_BT: jnp.pad(x_BT, ((0, 0), (0, -T % C))).reshape(B, -1, C)
    return lambda x_BT: x_BT


def _how_many(objective: Selective, candidates_BT: jax.Array, basis_points: jax.Array) -> jax.Array:
    """How many tokens `select` will select."""
    groups = _groups(objective, candidates_BT)(candidates_BT)
    return jnp.sum(count_of(jnp.sum(groups, _AXES[objective.scope], jnp.int32), basis_points))


def _score(score: Score, batch: dict[str, jax.Array], losses_BT: jax.Array | None, draw: jax.Array | None) -> jax.Array:
    """What tokens are ranked by, [B, T]: the higher, the sooner."""
    match score:
        case "excess":
            return losses_BT - batch["reference_loss"]
        case "low_reference_loss":
            return -batch["reference_loss"]
        case "low_reference_entropy":
            return -batch["reference_entropy"]
        case "loss":
            return losses_BT
        case "random":
            return jax.random.uniform(draw, batch["loss_mask"].shape)


def _sums(batch: dict[str, jax.Array], losses_BT: jax.Array, chosen_BT: jax.Array) -> dict[str, jax.Array]:
    """Of chosen tokens and of the others that could be."""
    all_BT = batch["possible"]
    others_BT = all_BT & ~chosen_BT
    total = lambda where_BT, x_BT=1.0: jnp.sum(jnp.where(where_BT, x_BT, 0.0))
    sums = {
        "chosen": total(chosen_BT),
        "others": total(others_BT),
        "chosen_loss": total(chosen_BT, losses_BT),
        "others_loss": total(others_BT, losses_BT),
    }
    if "reference_loss" in batch:
        reference_BT = batch["reference_loss"]
        sums["below_reference"] = total(chosen_BT & (losses_BT < reference_BT))
        sums["chosen_reference"] = total(chosen_BT & jnp.isfinite(reference_BT), reference_BT)
        sums["chosen_known"] = total(chosen_BT & jnp.isfinite(reference_BT))
    answers_BT = all_BT & (batch["answer_mask"] > 0)
    sums |= {"chosen_answers": total(chosen_BT & answers_BT), "answers": total(answers_BT)}
    T = all_BT.shape[1]
    bin_T = jnp.arange(T, dtype=jnp.int32) * BINS // T
    by_bin = lambda where_BT: jnp.zeros(BINS).at[bin_T].add(jnp.sum(where_BT, axis=0, dtype=jnp.float32))
    return sums | {"chosen_by_position": by_bin(chosen_BT), "all_by_position": by_bin(all_BT)}


def summary(sums: dict[str, jax.Array]) -> dict[str, float | list[float]]:
    """What is recorded of a step: share and mean losses of the selected tokens, and their share of answers, where the data mark any, and by
    position in the row, in 16 parts."""
    mean = lambda a, b: float(a) / max(float(b), 1.0)
    found = {
        "candidates_loss": mean(sums["chosen_loss"] + sums["others_loss"], sums["chosen"] + sums["others"]),
        "selected": mean(sums["chosen"], sums["chosen"] + sums["others"]),
        "selected_loss": mean(sums["chosen_loss"], sums["chosen"]),
        "unselected_loss": mean(sums["others_loss"], sums["others"]),
    }
    if np.isfinite(sums["threshold"]):
        # The least score that was selected, of microbatches and groups their mean.
        found["selected_from"] = mean(sums["threshold"], sums["passes"])
    if (tied := mean(sums["tied"], sums["chosen"] + sums["others"])) > MANY_TIED:
        # Of so large a share, all with one score, the first ones were taken.
        found["selected_tied"] = tied
    if "below_reference" in sums:
        found["selected_below_reference"] = mean(sums["below_reference"], sums["chosen"])
        found["selected_reference_loss"] = mean(sums["chosen_reference"], sums["chosen_known"])
    if sums["answers"]:
        found["selected_of_answers"] = mean(sums["chosen_answers"], sums["answers"])
    pairs = zip(sums["chosen_by_position"].tolist(), sums["all_by_position"].tolist())
    return found | {"selected_by_position": [round(mean(*pair), 4) for pair in pairs]}
