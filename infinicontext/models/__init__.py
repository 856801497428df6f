"""The architectures.

To add one, write its file, then add its config and its class to the table below: tests/test_stream_law.py finds it there, and so do
training, evaluation and the command line.
"""

import jax
from flax import nnx

from infinicontext.errors import UserError
from infinicontext.models.adapted import Adapted, AdaptedConfig
from infinicontext.models.beacon import Beacon
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.fam import Fam
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini import Infini
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import Megalodon, MegalodonConfig
from infinicontext.models.megalodon_classifier import MegalodonClassifier, MegalodonClassifierConfig
from infinicontext.models.streaming import Model
from infinicontext.models.transformer import Transformer, TransformerConfig

MODELS: dict[type, type] = {
    TransformerConfig: Transformer,
    MegalodonConfig: Megalodon,
    InfiniConfig: Infini,
    FamConfig: Fam,
    BeaconConfig: Beacon,
}
# These read a row as a whole: the laws of streams are not for them.
CLASSIFIERS: dict[type, type] = {MegalodonClassifierConfig: MegalodonClassifier}
# These are one of the models with more parameters, and read as it does.
ADAPTED: dict[type, type] = {AdaptedConfig: Adapted}

ModelConfig = TransformerConfig | MegalodonConfig | InfiniConfig | FamConfig | BeaconConfig | MegalodonClassifierConfig | AdaptedConfig


def build(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    """The model a config describes, with freshly drawn float32 parameters.

    Raises:
      UserError: float64 without JAX's double precision, which would silently be float32.
    """
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("model.dtype is float64, which needs the environment variable JAX_ENABLE_X64=1")
    return (MODELS | CLASSIFIERS | ADAPTED)[type(config)](config, rngs)


def abstract(config: ModelConfig) -> Model:
    """The model's shapes without its numbers."""
    return jax.eval_shape(lambda key: build(config, nnx.Rngs(key)), jax.random.key(0))
