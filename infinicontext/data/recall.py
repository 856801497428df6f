"""Multi-query associative recall, MQAR (arXiv 2312.04927): keys with their values, then the keys again, whose values are asked for.

Shape letters: N examples, L tokens of one, P pairs, S slots for queries.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from infinicontext.errors import UserError

# What stands between the queries. zeros: the token 0, which is nothing else. random: any tokens but the example's keys. official: any
# tokens, as in the original, but seeded; of a small vocabulary they are often keys, which leaves questions with two answers.
Filler = Literal["zeros", "random", "official"]
NO_LABEL = -100


def mqar(
    vocab_size: int,
    num_examples: int,
    input_seq_len: int,
    seed: int | tuple[int, ...],
    *,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    gap: int = 0,
    filler: Filler = "zeros",
) -> tuple[np.ndarray, np.ndarray]:
    """Examples as HazyResearch/zoology makes them (multiquery_ar.py), to the token where `filler` is zeros, `gap` 0 and `seed` a number.

    Args:
      vocab_size: keys are below its half, values from there on; the original wants more than L.
      num_examples: N.
      input_seq_len: L.
      seed: of NumPy's legacy generator.
      num_kv_pairs: P, in the first 2 P tokens.
      power_a: queries come s slots later with probability proportional to (s + 1)^(power_a - 1); 1 is uniform, 0.01 mostly soon.
      gap: tokens of filler between the pairs and where queries may begin, an even number: recall from segments before.
      filler: what stands between.

    Returns:
      inputs_NL and labels_NL, int32; a label is what follows its token, NO_LABEL where nothing is asked.

    Raises:
      UserError: sizes that do not fit.
    """
    L, P = input_seq_len, num_kv_pairs
    S = (L - gap - 2 * P) // 2
    if L % 2 or gap % 2 or gap < 0:
        raise UserError(f"recall takes an even length and gap, not {L} and {gap}")
    if P < 1 or S < P or vocab_size // 2 - 1 < P:
        raise UserError(
            f"{P} pairs and a gap of {gap} need a length of 4 x pairs + gap and a vocabulary of 2 x pairs + 2 at least, not {L} and "
            f"{vocab_size}"
        )
    rng, half = np.random.RandomState(seed), vocab_size // 2
    keys_NP = np.stack([rng.choice(np.arange(1, half), P, replace=False) for _ in range(num_examples)])
    values_NP = np.stack([rng.choice(np.arange(half, vocab_size), P, replace=False) for _ in range(num_examples)])
    weights_S = power_a * np.arange(1, S + 1) ** (power_a - 1)
    slots_NP = np.stack([rng.choice(np.arange(S), P, replace=False, p=weights_S / weights_S.sum()) for _ in range(num_examples)])
    inputs_NL, labels_NL = np.zeros((num_examples, L), np.int32), np.full((num_examples, L), NO_LABEL, np.int32)
    inputs_NL[:, : 2 * P : 2], inputs_NL[:, 1 : 2 * P : 2] = keys_NP, values_NP
    asked_NP = 2 * P + gap + 2 * slots_NP
    np.put_along_axis(inputs_NL, asked_NP, keys_NP, axis=1)
    np.put_along_axis(labels_NL, asked_NP, values_NP, axis=1)
    if filler == "official":
        empty_NL = inputs_NL == 0
        inputs_NL[empty_NL] = rng.randint(vocab_size, size=empty_NL.sum())
    if filler == "random":
        for inputs_L, keys_P in zip(inputs_NL, keys_NP):
            empty = inputs_L == 0
            inputs_L[empty] = rng.choice(np.setdiff1d(np.arange(1, vocab_size), keys_P), empty.sum())
    return inputs_NL, labels_NL


@dataclasses.dataclass(frozen=True)
class RecallData:
    """Associative recall for training; goes with objective.loss "answers", and is evaluated by the task "recall".

    Attributes:
      vocab_size: half of it keys, half values.
      length: T.
      pairs: how many an example has; several numbers take turns from batch to batch.
      power: see `mqar`.
      gap: see `mqar`.
      filler: see `mqar`.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: tuple[int, ...] = (8,)
    power: float = 0.01
    gap: int = 0
    filler: Filler = "zeros"

    def __post_init__(self):
        if self.filler not in get_args(Filler):
            raise UserError(f"data.filler is {self.filler}; it must be one of {', '.join(get_args(Filler))}")
        if not self.pairs:
            raise UserError("data.pairs is empty; it must be one or more numbers of pairs")
        if self.power <= 0:
            raise UserError(f"data.power is {self.power}; it must be more than 0")
        for pairs in self.pairs:
            try:
                self.examples(1, pairs, 0)
            except UserError as error:
                raise UserError(f"data.pairs is {self.pairs}: {error}") from error

    def examples(self, count: int, pairs: int, seed: int | tuple[int, ...], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """inputs and labels of `mqar`."""
        options = {"num_kv_pairs": pairs, "power_a": self.power, "gap": self.gap, "filler": self.filler}
        return mqar(self.vocab_size, count, length or self.length, seed, **options)

    def batch(self, rows: range, key: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Rows of the batch of a key (split, seed, step), each a function of key and row alone; data/pipeline.py says what a batch holds.

        Beside it targets, int32 [B, T]: what follows a key is not in the row itself.
        """
        pairs = self.pairs[key[-1] % len(self.pairs)]
        made = [self.examples(1, pairs, (*key, row)) for row in rows]
        inputs_BT, labels_BT = (np.concatenate(arrays) for arrays in zip(*made))
        tokens_BS = np.pad(inputs_BT, ((0, 0), (0, 1)))
        asked_BT = (labels_BT != NO_LABEL).astype(np.float32)
        return {
            "tokens": tokens_BS,
            "segment_ids": np.ones_like(tokens_BS),
            "targets": np.where(labels_BT == NO_LABEL, 0, labels_BT),
            "loss_mask": asked_BT,
            "answer_mask": asked_BT,
        }
