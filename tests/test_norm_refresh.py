"""Generation after prompts that were read with refreshed norm statistics (golden scoring is in tests/test_megalodon.py)."""

import jax
import numpy as np
import pytest
from flax import nnx

from infinicontext import models
from infinicontext.errors import UserError
from infinicontext.inference.generate import Generation, generate
from infinicontext.inference.norm_refresh import read_with_norm_refresh, reader
from infinicontext.models import MegalodonConfig


def test_generation_goes_on_from_the_refreshed_state():
    config = MegalodonConfig(
        vocab_size=17, dim=12, layers=2, heads=2, z_dim=8, value_dim=20, feed_forward=14, cema_order=3, chunk=5, norm_groups=3
    )
    model = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, models.build(config, nnx.Rngs(0)))
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
