"""The architectures.

To add one, write its file, then add its config and its class to the table below: tests/test_stream_law.py finds it there, and so do
training, evaluation and the command line.
"""

import jax
from flax import nnx

from infinicontext.models.streaming import Model
from infinicontext.models.transformer import Transformer, TransformerConfig

MODELS: dict[type, type] = {TransformerConfig: Transformer}

ModelConfig = TransformerConfig


def build(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    """The model a config describes, with freshly drawn float32 parameters."""
    return MODELS[type(config)](config, rngs)


def abstract(config: ModelConfig) -> Model:
    """The model's shapes without its numbers."""
    return jax.eval_shape(lambda key: build(config, nnx.Rngs(key)), jax.random.key(0))
