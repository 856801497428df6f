"""What selective language modelling would learn from, token by token; and what became of tokens in training.

Shape letters: B rows, T targets of a row, N checkpoints, K targets.
"""

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.models.streaming import Model
from infinicontext.objectives.next_token import row_losses
from infinicontext.objectives.selection import categories
from infinicontext.objectives.selective import Selective, prepare, reference_scores

CATEGORIES = ("H->H, stays hard", "L->H, gets worse", "H->L, learnt", "L->L, known already")  # by code


def evaluate_selection(model: Model, reference: Model, objective: Selective, batch: dict, tokenizer: Tokenizer, rows: int = 2) -> dict:
    """The tokens of some rows with their losses, those of the reference, and which of the batch would be selected.

    Args:
      model: the one that learns.
      reference: the one it is compared with.
      objective: how tokens are ranked; the whole batch is.
      batch: as the pipeline gives it.
      tokenizer: of both models.
      rows: how many are shown.

    Returns:
      protocol; rows: lists of [text, loss, reference loss, selected], numbers in nats, None where a token begins a document.
    """

    @jax.jit
    def losses_and_choice(model, reference, batch):
        losses_BT, _ = row_losses(model, batch, chunk=objective.chunk)
        loss = Selective(score="excess", loss=objective.loss)
        batch = batch | reference_scores(loss, reference, batch) | reference_scores(objective, reference, batch)
        prepared = prepare(objective, batch | {"losses": losses_BT}, step=jnp.int32(2**30), seed=0)
        return losses_BT, batch["reference_loss"], prepared["decided"]

    losses_BT, reference_BT, chosen_BT = map(np.asarray, losses_and_choice(model, reference, batch))
    shown = []
    for b, tokens_S in enumerate(batch["tokens"][:rows]):
        real = int(np.sum(batch["segment_ids"][b] > 0))
        texts = [tokenizer.decode([int(token)]) for token in tokens_S[:real]]
        row = [[texts[0], None, None, False]] if texts else []
        for t, text in enumerate(texts[1:]):
            known = float(reference_BT[b, t])
            numbers = [round(float(losses_BT[b, t]), 3), round(known, 3)] if np.isfinite(known) else [None, None]
            row.append([text, *numbers, bool(chosen_BT[b, t])])
        shown.append(row)
    protocol = (
        f"Validation tokens with the loss of the model, that of the reference, and whether they are among those that the objective "
        f"({objective.score}, ratio {objective.ratio:g}) would learn from, in a batch of {len(losses_BT)} rows."
    )
    return {"protocol": protocol, "rows": shown}


def evaluate_categories(steps: list[int], losses_NK: np.ndarray) -> dict:
    """What became of validation tokens from checkpoint to checkpoint (section 2.1).

    Args:
      steps: of the checkpoints, N of them.
      losses_NK: of the same targets at each.

    Returns:
      protocol; steps; shares and mean losses [N] of the four kinds.
    """
    codes_K, _ = categories(losses_NK)
    kinds = {name: codes_K == code for code, name in enumerate(CATEGORIES)}
    return {
        "protocol": (
            f"{losses_NK.shape[1]} validation tokens at {len(steps)} checkpoints. What a token is, is decided by a line through its losses "
            "if that changes by more than 0.2 nats, else by its last loss against the mean."
        ),
        "steps": steps,
        "shares": {name: float(is_K.mean()) for name, is_K in kinds.items()},
        "losses": {name: losses_NK[:, is_K].mean(axis=1).tolist() if is_K.any() else [] for name, is_K in kinds.items()},
    }
