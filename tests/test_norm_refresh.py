"""Generation after prompts that were read with refreshed norm statistics (golden scoring is in tests/test_megalodon.py)."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.inference.generate import Generation, generate
from infinicontext.inference.norm_refresh import read_with_norm_refresh, reader
from infinicontext.models import MegalodonConfig, TransformerConfig
from infinicontext.objectives.next_token import token_losses

CONFIG = MegalodonConfig(
    vocab_size=17, dim=12, layers=2, heads=2, z_dim=8, value_dim=20, feed_forward=14, cema_order=3, chunk=5, norm_groups=3
)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6])
def test_short_texts(length):
    """Chunks of 3, of which nothing is refreshed: the text is read as by one call."""
    model = models.build(dataclasses.replace(CONFIG, layers=1, chunk=3), nnx.Rngs(0))
    tokens_BS = np.random.default_rng(0).integers(0, 17, (1, length + 1)).astype(np.int32)

    @jax.jit
    def both(tokens_BL, targets_BL):
        hidden_BTD, state = model.hidden(tokens_BL, model.init_state(1))
        refreshed = read_with_norm_refresh(model, tokens_BL, visit=token_losses, extra=targets_BL)
        return refreshed, (token_losses(model, hidden_BTD, targets_BL), state)

    chex.assert_trees_all_close(*both(tokens_BS[:, :-1], tokens_BS[:, 1:]), atol=1e-5)


def test_a_prompt_of_one_token():
    """Nothing of it is read before decoding begins."""
    model, options = models.build(CONFIG, nnx.Rngs(0)), Generation(max_new_tokens=2)
    (refreshed,), (plain,) = (generate(model, [[3]], options, **how) for how in ({"read": reader()}, {}))
    assert refreshed.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("refresh", [(2, 6, 2), (8, 0, 2), (8, 6, 0), (0, 0, 1)])
def test_counts_that_do_not_fit(refresh):
    with pytest.raises(UserError, match=rf"norm_refresh is \({refresh[0]}, .* the first number must be at least the second"):
        read_with_norm_refresh(models.build(CONFIG, nnx.Rngs(0)), np.zeros((1, 50), np.int32), refresh=refresh)


def test_another_model():
    with pytest.raises(UserError, match="goes with a Megalodon, not with a Transformer"):
        read_with_norm_refresh(models.build(TransformerConfig(dim=8, layers=1, heads=1), nnx.Rngs(0)), np.zeros((1, 5), np.int32))


def test_generation_goes_on_from_the_refreshed_state():
    model = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, models.build(CONFIG, nnx.Rngs(0)))
    # Another kind of text after the first half, which statistics over everything are slow to notice.
    rng = np.random.default_rng(0)
    prompts = np.concatenate([rng.integers(0, 3, (2, 200)), rng.integers(9, 17, (2, 63))], axis=1).astype(np.int32)
    options = Generation(max_new_tokens=12)
    refreshed = generate(model, list(prompts), options, read=reader())

    state = jax.jit(lambda tokens_BL: read_with_norm_refresh(model, tokens_BL)[1])(prompts[:, :-1])
    step = jax.jit(model.__call__)
    token_B = prompts[:, -1]
    for i in range(12):
        logits_BTV, state = step(token_B[:, None], state)
        token_B = np.argmax(logits_BTV[:, 0], axis=-1).astype(np.int32)
        assert token_B.tolist() == [row.tokens[i] for row in refreshed]
    plain = generate(model, list(prompts), options)
    assert any((a.tokens != b.tokens).any() for a, b in zip(plain, refreshed)), "refreshing should show"
    with pytest.raises(UserError, match="must be of one length"):
        generate(model, [prompts[0], prompts[1, 1:]], options, read=reader())
