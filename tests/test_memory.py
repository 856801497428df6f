"""A model with a window reads a stream of any length in constant memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from infinicontext import models
from infinicontext.evaluation.passkey import answer_greedily
from infinicontext.evaluation.perplexity import stream_losses
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.streaming import abstract_state_bytes, read
from infinicontext.models.transformer import TransformerConfig

SHORT, LONG = 65_536, 1_048_576
TINY = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 2}
CONFIGS = {
    "window": TransformerConfig(**TINY, attention="window", window=128),
    "block_window": TransformerConfig(**TINY, attention="block_window", block=32, memory_blocks=3),
    "megalodon": MegalodonConfig(**TINY, z_dim=8, feed_forward=16, cema_order=2, chunk=32, norm_groups=4),
}
READERS = {
    "read": lambda model, tokens_BL: read(model, tokens_BL, model.init_state(1))[1],
    "losses": lambda model, tokens_BL: stream_losses(model, tokens_BL, segment=1024),
    "answer": lambda model, tokens_BL: answer_greedily(model, tokens_BL, 5, segment=1024),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_memory_does_not_grow_with_the_stream(kind, reader):
    """Apart from one number per token (the tokens, cut into segments; with losses also the targets and the losses) and, while a prompt is
    read, one hidden state per segment."""
    model = models.abstract(CONFIGS[kind])

    def temporary(length: int) -> int:
        tokens_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(READERS[reader]).lower(model, tokens_BL).compile().memory_analysis().temp_size_in_bytes

    numbers_per_segment = {"read": 1024, "losses": 3 * 1024, "answer": 1024 + TINY["dim"]}[reader]
    assert temporary(LONG) - temporary(SHORT) <= 4 * numbers_per_segment * (LONG - SHORT) // 1024


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_state_does_not_grow(kind):
    model = models.abstract(CONFIGS[kind])
    assert abstract_state_bytes(model, SHORT) == abstract_state_bytes(model, LONG) < 50_000


READ_AND_MEASURE = """
import resource, sys
import jax, numpy as np
from flax import nnx
from infinicontext import models
from infinicontext.models import MegalodonConfig, TransformerConfig
from infinicontext.models.streaming import read
from infinicontext.nn.rope import RopeConfig

model = models.build(eval(sys.argv[1]), nnx.Rngs(0))
tokens_BL = np.random.default_rng(0).integers(0, 257, (1, int(sys.argv[2])), dtype=np.int32)
state = jax.jit(lambda model, tokens_BL: read(model, tokens_BL, model.init_state(1))[1])(model, tokens_BL)
print(int(state.cursor.count_B[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "long"), [("window", LONG), ("megalodon", 4 * LONG)])
def test_millions_of_tokens_take_the_memory_of_sixty_thousand(kind, long):
    """Peak resident memory of whole processes that read so many tokens, apart from the tokens and their cut into segments."""
    peaks = []
    for length in (SHORT, long):
        command = [sys.executable, "-c", READ_AND_MEASURE, repr(CONFIGS[kind]), str(length)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
        count, peak = map(int, printed.split())
        assert count == length
        peaks.append(peak)
    # In KiB; the tokens on the host, on the device, and cut.
    assert peaks[1] < 1.05 * peaks[0] + 3 * 4 * (long - SHORT) / 1024
