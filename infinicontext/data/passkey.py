"""The passkey task: find a number that was said once in a lot of irrelevant text.

Format of Mohtashami & Jaggi as in Infini-attention (arXiv 2404.07143, Appendix B, without its typo "ack"): instruction, filler,
the line with the key, filler, question, and the key as the answer. Each piece is encoded by itself and the ids are joined, so
length and depth are exact in tokens, whatever the tokenizer.

Shape letters: T tokens of a sample.
"""

import numpy as np

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "\nThe pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
TEXTS = (INSTRUCTION, FILLER, KEY_LINE.format(key=""), QUESTION)


def passkey_sample(tokenizer: Tokenizer, length: int, depth: float, rng: np.random.Generator, digits: int = 5) -> tuple[np.ndarray, int]:
    """One passkey sample of exactly `length` tokens, the answer included.

    As many whole filler sentence blocks as fit are split around the key line at `depth`; the tokens that then remain are filled
    by the end of one more block at the very start of the filler.

    Args:
      tokenizer: its start token, if it has one, comes first.
      length: T.
      depth: 0 puts the key line before all filler blocks, 1 after them.
      rng: draws the key, a number of `digits` decimal digits that does not begin with 0.
      digits: 1 to 18.

    Returns:
      tokens: int32 [T].
      answer_start: the key is tokens[answer_start:]; how many tokens that is depends on the tokenizer. A space token between
        question and key counts to the question, so that scores are about the key alone.

    Raises:
      UserError: `length` is too small for even one key line without filler.
    """
    key = str(rng.integers(10 ** (digits - 1), 10**digits))
    start = np.array([] if tokenizer.start_id is None else [tokenizer.start_id], np.int32)
    head = np.concatenate([start, tokenizer.encode(INSTRUCTION)])
    unit = tokenizer.encode(FILLER)
    key_line = tokenizer.encode(KEY_LINE.format(key=key))
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(f" {key}")

    space = tokenizer.encode(" ")
    space_tokens = len(space) if np.array_equal(answer[: len(space)], space) else 0

    fixed = len(head) + len(key_line) + len(question) + len(answer)
    if length < fixed:
        raise UserError(
            f'a passkey sample with {digits} digits and the tokenizer "{tokenizer.name}" takes at least {fixed} tokens, not {length}'
        )
    units, remainder = divmod(length - fixed, len(unit))
    before = round(depth * units)
    tokens_T = np.concatenate(
        [
            head,
            unit[len(unit) - remainder :],
            np.tile(unit, before),
            key_line,
            np.tile(unit, units - before),
            question,
            answer,
        ]
    )
    return tokens_T, length - len(answer) + space_tokens
