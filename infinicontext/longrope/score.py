"""What candidates of a search are worth: the loss of a model that reads long texts by them.

Shape letters: N candidates, M candidates of one device, B documents, S tokens of a document, L = S - 1 inputs, A scored tokens, R pairs.

One compiled program scores any candidates, because factors are its arguments; embeddings and what else does not depend on them is computed
once for those that are read side by side.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext.data.corpora import Corpus
from infinicontext.data.passkey import KEY_LINE, QUESTION
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.models.streaming import Model, read
from infinicontext.models.transformer import Transformer
from infinicontext.nn.rope import RopeConfig, RopeTable, Stretch, Turns, fixed_point, rope_table
from infinicontext.objectives.next_token import token_losses

DRAWS = 1000  # of a number that has as many tokens as the others


@dataclasses.dataclass(frozen=True)
class Stretched:
    """A Transformer that reads by another rotary table, as models/streaming.py wants it."""

    model: Transformer
    stretch: Stretch

    def hidden(self, tokens_BT: jax.Array, state):
        """See the Transformer."""
        return self.model.hidden(tokens_BT, state, stretch=self.stretch)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """See the Transformer."""
        return self.model.logits(hidden_BTD)

    def room(self, state) -> jax.Array | None:
        """See the Transformer."""
        return self.model.room(state)


@dataclasses.dataclass(frozen=True)
class Documents:
    """What candidates are scored on."""

    tokens_BS: np.ndarray  # int32
    scored: int  # A, the last tokens of each


def first_tokens(corpus: Corpus, length: int, count: int, seed: int) -> Documents:
    """The first `length` + 1 tokens of some documents that are long enough, all of which are scored.

    Raises:
      UserError: there are not so many.
    """
    return Documents(_long_documents(corpus, length + 1, count, seed), length)


def needles(corpus: Corpus, tokenizer: Tokenizer, length: int, count: int, seed: int, digits: int = 7) -> Documents:
    """Documents with a number said near their beginning and asked for at the end, where it alone is scored (LongRoPE2, section 3.3).

    The sentences are those of the passkey task. Where they stand is drawn from the first tenth of the text. A space token before the number
    counts to the question.

    Raises:
      UserError: there are not so many long documents, or the tokenizer needs different numbers of tokens for numbers of one length.
    """
    rng, rows, scored, space = np.random.default_rng((seed, 1)), [], set(), tokenizer.encode(" ")
    for tokens_S in _long_documents(corpus, length + 1, count, seed):
        for _ in range(DRAWS):
            key = str(rng.integers(10 ** (digits - 1), 10**digits))
            answer = tokenizer.encode(f" {key}")
            size = len(answer) - (len(space) if np.array_equal(answer[: len(space)], space) else 0)
            if not scored or size in scored:
                break
        line, question = tokenizer.encode(KEY_LINE.format(key=key)), tokenizer.encode(QUESTION)
        around = len(tokens_S) - len(line) - len(question) - len(answer)
        if around < 1:
            raise UserError(f"--target-length is {length}; a text with a needle must have {length + 1 - around} tokens or more")
        at = int(rng.integers(1, max(around // 10, 2)))
        rows.append(np.concatenate([tokens_S[:at], line, tokens_S[at:around], question, answer]).astype(np.int32))
        scored.add(size)
    if len(scored) > 1:
        raise UserError(
            f'the tokenizer "{tokenizer.name}" needs {sorted(scored)} tokens for numbers of {digits} digits; one number is needed'
        )
    return Documents(np.stack(rows), scored.pop())


def _long_documents(corpus: Corpus, size: int, count: int, seed: int) -> np.ndarray:
    long = np.flatnonzero(np.diff(corpus.starts) >= size)
    if len(long) < count:
        raise UserError(
            f"--data has {len(long)} documents of {size} tokens or more, the longest {int(np.diff(corpus.starts).max())}; "
            f"the search needs {count} (--documents)"
        )
    chosen = np.sort(np.random.default_rng((seed, 0)).choice(long, count, replace=False))
    return np.stack([corpus.document(i)[:size] for i in chosen])


def document_loss(model: Model, state, tokens_BS: jax.Array, scored: int, *, segment: int) -> jax.Array:
    """Mean loss of the last `scored` tokens of each document, then over documents, in nats."""
    inputs_BL, targets_BA = tokens_BS[:, :-1], tokens_BS[:, -scored:]
    before = inputs_BL.shape[1] - scored
    if before:
        _, state = read(model, inputs_BL[:, :before], state, segment=segment)
    losses_BA, _ = read(model, inputs_BL[:, before:], state, segment=segment, visit=token_losses, extra=targets_BA)
    return jnp.mean(losses_BA)


class Scorer:
    """Scores any number of candidates by one program, a batch after another; the batch is split over the devices of a mesh."""

    def __init__(
        self,
        model: Transformer,
        documents: Documents,
        rope: RopeConfig,
        attention_factor: float,
        *,
        mesh: Mesh,
        batch: int = 32,
        lanes: int = 1,
        together: int | None = None,
        segment: int = 4096,
    ):
        """
        Args:
          model: its parameters are whole on each device.
          documents: read by all candidates.
          rope: base and share of the frequencies that factors divide.
          attention_factor: what cos and sin are multiplied by.
          mesh: of the devices, which share a batch along `data`.
          batch: candidates of a call at least; what is missing is filled up.
          lanes: candidates that a device reads side by side.
          together: documents that a candidate reads side by side, each with a cache of its own; it divides their number. None: all.
          segment: tokens per call of the model.
        """
        config, devices = model.config, mesh.shape["data"]
        self.base_R = rope_table(RopeConfig(base=rope.base, partial=rope.partial), config.head_size).inverse_frequency
        self.model, self.documents, self.attention_factor = model, documents, attention_factor
        self.batch, self.sharding = -(-batch // devices) * devices, NamedSharding(mesh, P("data"))
        length = documents.tokens_BS.shape[1] - 1

        def losses(model, tokens_BS, stretch_NR):
            def one(stretch):
                def of_documents(tokens_BS):
                    state = model.init_state(len(tokens_BS), capacity=length)
                    return document_loss(Stretched(model, stretch), state, tokens_BS, documents.scored, segment=min(segment, length))

                return jnp.mean(jax.lax.map(of_documents, tokens_BS.reshape(-1, together or len(tokens_BS), length + 1)))

            def of_device(stretch_MR):
                return jax.lax.map(one, stretch_MR, batch_size=lanes)

            by_device = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), stretch_NR)
            return jax.vmap(of_device)(by_device).reshape(-1)

        self.losses: Callable = jax.jit(losses)

    def __call__(self, factors_NR: np.ndarray, start_tokens_N: np.ndarray) -> np.ndarray:
        """Losses [N] of candidates."""
        found = []
        for at in range(0, len(factors_NR), self.batch):
            factors, start = factors_NR[at : at + self.batch], start_tokens_N[at : at + self.batch]
            missing = self.batch - len(factors)
            factors, start = np.pad(factors, ((0, missing), (0, 0)), mode="edge"), np.pad(start, (0, missing), mode="edge")
            stretch = jax.device_put(stretches(self.base_R, factors, start, self.attention_factor), self.sharding)
            found.append(np.asarray(self.losses(self.model, self.documents.tokens_BS, stretch))[: self.batch - missing])
        return np.concatenate(found)


def stretches(base_R: np.ndarray, factors_NR: np.ndarray, start_tokens_N: np.ndarray, attention_factor: float) -> Stretch:
    """The tables of candidates, computed in float64: arrays with a leading axis N."""
    turns = fixed_point(RopeTable(base_R[None] / factors_NR, attention_factor))
    ones_N = np.ones(len(factors_NR), np.float32)
    turns = Turns(turns.whole_R, turns.rest_R.astype(np.float32), np.float32(attention_factor) * ones_N)
    return Stretch(turns, np.asarray(start_tokens_N, np.int32))
