"""The next-token objective against its definition. Shape letters: B batch rows, T tokens read, D channels, V vocabulary."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from infinicontext import models
from infinicontext.data.pipeline import CorpusData, train_batches
from infinicontext.errors import UserError
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.embedding import Embedding
from infinicontext.nn.rope import RopeConfig
from infinicontext.objectives.next_token import NextToken, counted, token_losses, token_weights, weighted_loss

CONFIG = TransformerConfig(vocab_size=17, dim=16, layers=1, heads=2, feed_forward=24, remat=False)
B, T = 2, 13


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: models.build(CONFIG, nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def head():
    """A model with a head and nothing else."""
    return Embedding(CONFIG.vocab_size, CONFIG.dim, tied=False, dtype="float32", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def hidden_BTD():
    return jax.random.normal(jax.random.key(1), (B, T, CONFIG.dim))


@pytest.fixture(scope="module")
def targets_BT():
    return jax.random.randint(jax.random.key(2), (B, T), 0, CONFIG.vocab_size)


def dense_losses(model, hidden_BTD, targets_BT):
    """The definition."""
    one_hot_BTV = jax.nn.one_hot(targets_BT, CONFIG.vocab_size)
    return -jnp.sum(one_hot_BTV * jax.nn.log_softmax(model.logits(hidden_BTD)), axis=-1)


def random_batch(seed=0, answers=4):
    """A batch as the pipeline makes it: two documents and padding in the first row, one document in the second."""
    tokens = jax.random.randint(jax.random.key(seed), (B, T + 1), 0, CONFIG.vocab_size)
    segments = jnp.array([[1] * 5 + [2] * 6 + [0] * 3, [1] * (T + 1)])
    inside = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "loss_mask": inside,
        "answer_mask": jnp.where(jnp.arange(T) >= T - answers, inside, 0),
    }


def loss_of(objective, model, batch):
    return weighted_loss(objective, model, batch | {"weights": token_weights(objective, batch)})[0]


loss_and_gradient = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("chunk", [1, 4, T - 1, T, 100])
def test_chunks_equal_the_definition(chunk, head, hidden_BTD, targets_BT):
    weights_BT = jnp.cos(jnp.arange(B * T, dtype=jnp.float32)).reshape(B, T)

    def value_and_gradients(losses):
        def total(head, hidden_BTD):
            losses_BT = losses(head, hidden_BTD, targets_BT)
            return jnp.sum(weights_BT * losses_BT), losses_BT

        gradients, losses_BT = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(head, hidden_BTD)
        return losses_BT, gradients

    ours, ours_gradients = value_and_gradients(lambda *args: token_losses(*args, chunk=chunk))
    dense, dense_gradients = value_and_gradients(dense_losses)
    assert ours.shape == (B, T)
    np.testing.assert_allclose(ours, dense, atol=3e-6)
    for one, other in zip(leaves(ours_gradients), leaves(dense_gradients)):
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_losses_are_float32_under_bfloat16_compute(hidden_BTD, targets_BT):
    head = Embedding(CONFIG.vocab_size, CONFIG.dim, tied=False, dtype="bfloat16", rngs=nnx.Rngs(0))
    narrow_BTD = hidden_BTD.astype(jnp.bfloat16)
    losses = token_losses(head, narrow_BTD, targets_BT, chunk=4)
    assert losses.dtype == jnp.float32
    # From rounded inputs, but with nothing rounded after them.
    logits_BTV = narrow_BTD.astype(jnp.float32) @ head.head[...].astype(jnp.bfloat16).astype(jnp.float32)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


masks = st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=12).map(lambda values: np.float32(values).reshape(2, 6))


@settings(deadline=None, max_examples=30)
@given(loss_mask=masks, answer_mask=masks, context_weight=st.floats(0, 10, width=32))
def test_token_weights(loss_mask, answer_mask, context_weight):
    batch = {"loss_mask": loss_mask, "answer_mask": answer_mask}
    mean = lambda mask: mask / max(mask.sum(), 1)
    everything = np.asarray(token_weights(NextToken(), batch))
    np.testing.assert_allclose(everything, mean(loss_mask), rtol=1e-6)
    np.testing.assert_allclose(everything.sum(), loss_mask.any(), rtol=1e-6)
    answers = token_weights(NextToken("answers", context_weight=context_weight), batch)
    np.testing.assert_allclose(answers, mean(answer_mask) + context_weight * mean(loss_mask), rtol=1e-5, atol=1e-7)


def test_first_tokens_may_not_count():
    """Of each document; what they read is their own number in it, not the target's."""
    ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3, 3, 3]], np.int32)
    loss_mask = np.array([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], np.float32)
    batch = {"loss_mask": loss_mask, "answer_mask": np.float32(np.arange(7) > 0) * loss_mask, "segment_ids": ids}
    expected = np.array([[0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]], np.float32)
    for objective in (NextToken(skip=2), NextToken("answers", skip=2)):
        np.testing.assert_allclose(token_weights(objective, batch), expected / 6, rtol=1e-6)
        assert counted(objective, batch) == 6
    with pytest.raises(UserError, match=r"objective\.skip is -1"):
        NextToken(skip=-1)


def test_loss_of_packed_documents_is_their_own(model):
    """A document's last token predicts nothing, and neither the other documents of the row nor padding count."""
    batch = random_batch()
    parts = [(row, start, end) for row, start, end in ((0, 0, 5), (0, 5, 11), (1, 0, T + 1))]

    @jax.jit
    def separately(model):
        losses = []
        for row, start, end in parts:
            tokens = batch["tokens"][row : row + 1, start:end]
            hidden_BTD, _ = model.hidden(tokens[:, :-1], model.init_state(1, end - start))
            losses.append(dense_losses(model, hidden_BTD, tokens[:, 1:]))
        return jnp.concatenate(losses, axis=1).mean()

    expected = separately(model)
    loss, _ = loss_and_gradient(NextToken(chunk=4), model, batch)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_rows_of_short_documents_turn_by_short_factors():
    """Mixed windows: the rotary table of a row is that of its longest document, here of 6 and 13 tokens."""
    rope = {"factor": 2.0, "original_length": 6, "attention_factor": 1.2, "short_attention_factor": 1.0}
    longrope = dataclasses.replace(CONFIG, rope=RopeConfig("longrope", long_factors=(1.0, 1.5, 3.0, 4.0), **rope))
    found = []
    for config in (CONFIG, longrope):
        model = models.build(config, nnx.Rngs(0))
        rows = [{name: value[row : row + 1] for name, value in random_batch().items()} for row in range(2)]
        found.append([loss_and_gradient(NextToken(), model, row)[0] for row in rows])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    assert abs(found[0][1] - found[1][1]) > 1e-4


def test_pipeline_marks_document_borders(tmp_path):
    """In a real batch the weight of the first token of each document as a target is 0, of all others the same."""
    texts = ["abc" * n for n in range(2, 12)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    batch = next(train_batches(CorpusData(str(path), length=24, validation_fraction=1e-9), 4, seed=0, step=0))
    weights = np.asarray(token_weights(NextToken(), batch))
    border = batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    padding = batch["segment_ids"][:, 1:] == 0
    assert border.any()
    assert (weights[border | padding] == 0).all()
    np.testing.assert_allclose(weights[~(border | padding)], 1 / np.sum(~(border | padding)), rtol=1e-6)


@pytest.mark.parametrize("objective", [NextToken(chunk=4), NextToken("answers", context_weight=0.3, chunk=4)])
def test_padding_counts_for_nothing(objective, model):
    batch = random_batch()
    loss, gradient = loss_and_gradient(objective, model, batch)
    other_padding = jnp.where(batch["segment_ids"] == 0, 16 - batch["tokens"], batch["tokens"])
    assert (other_padding != batch["tokens"]).any()
    same_loss, same_gradient = loss_and_gradient(objective, model, batch | {"tokens": other_padding})
    assert loss == same_loss
    for one, other in zip(leaves(gradient), leaves(same_gradient)):
        np.testing.assert_array_equal(one, other)


class Table(nnx.Module):
    """A model whose hidden state is an embedding, to place values where a Transformer would not have them."""

    def __init__(self, table_VD):
        self.table_VD = nnx.Param(table_VD)

    def init_state(self, batch_size, capacity=None, planned=None):
        return ()

    def hidden(self, tokens_BT, state, segment_ids_BT=None):
        return self.table_VD[...][tokens_BT], state

    def logits(self, hidden_BTD):
        return jnp.concatenate([hidden_BTD, -hidden_BTD], axis=-1)


def test_garbage_at_padding_does_not_leak():
    """Row 16 of the table is read by padding alone: nothing of it arrives in the loss, and nothing of it in the other rows' gradient."""
    batch = random_batch()
    tokens = jnp.where(batch["segment_ids"] == 0, 16, jnp.minimum(batch["tokens"], 15))
    table_VD = jax.random.normal(jax.random.key(4), (CONFIG.vocab_size, 10))
    results = []
    for garbage in (0.0, 1e30, jnp.inf, jnp.nan):
        loss, gradient = loss_and_gradient(NextToken(chunk=4), Table(table_VD.at[16].set(garbage)), batch | {"tokens": tokens})
        results.append((loss, gradient.table_VD[...][:16]))
    for loss, gradient in results[1:]:
        assert np.isfinite(loss)
        assert loss == results[0][0]
        np.testing.assert_array_equal(gradient, results[0][1])


def test_answers_alone_have_a_gradient(model):
    """Without context weight, a row whose answers do not count changes nothing."""
    batch = random_batch()
    batch["answer_mask"] = batch["answer_mask"].at[1].set(0)
    loss, gradient = loss_and_gradient(NextToken("answers"), model, batch)
    other_row = batch["tokens"].at[1].set(3)
    same_loss, same_gradient = loss_and_gradient(NextToken("answers"), model, batch | {"tokens": other_row})
    assert loss == same_loss
    for one, other in zip(leaves(gradient), leaves(same_gradient)):
        np.testing.assert_allclose(one, other, atol=1e-8)


@pytest.mark.parametrize(("name", "value"), [("chunk", 0), ("context_weight", -0.5)])
def test_config_errors(name, value):
    with pytest.raises(UserError, match=rf"objective\.{name} is {value}; it must be"):
        NextToken(**{name: value})
