"""A model with LoRA adapters (nn/lora.py): any architecture, whose own parameters may stand still.

    model=AdaptedConfig(InfiniConfig(...), Lora(rank=8)), optimizer=OptimizerConfig(train=("lora", "gate"))

trains the adapters and the gates alone; the others have no gradient and no optimizer state.
"""

import dataclasses

import jax
from flax import nnx

from infinicontext.models.beacon import Beacon
from infinicontext.models.beacon_attention import BeaconConfig
from infinicontext.models.fam import Fam
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.infini import Infini
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.models.megalodon import Megalodon, MegalodonConfig
from infinicontext.models.streaming import Model
from infinicontext.models.transformer import Transformer, TransformerConfig
from infinicontext.nn.lora import Lora, adapters, merged


@dataclasses.dataclass(frozen=True)
class AdaptedConfig:
    """The adapted model's config and what is adapted."""

    model: TransformerConfig | MegalodonConfig | InfiniConfig | FamConfig | BeaconConfig
    lora: Lora = Lora()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.vocab_size

    @property
    def dtype(self) -> str:
        """Of activations."""
        return self.model.dtype

    @property
    def has_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return getattr(self.model, "has_dropout", False)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token's forward pass, those of merging left out."""
        return self.model.flops_per_token(length)


KINDS = {TransformerConfig: Transformer, MegalodonConfig: Megalodon, InfiniConfig: Infini, FamConfig: Fam, BeaconConfig: Beacon}


class Adapted(nnx.Module):
    """Reads a stream as the merged model does. Weights are merged in each call: use `merged` to read much with weights that stand still."""

    def __init__(self, config: AdaptedConfig, rngs: nnx.Rngs):
        self.config = config
        self.model: Model = KINDS[type(config.model)](config.model, rngs)
        self.adapters = adapters(self.model, config.lora, rngs)

    def merged(self) -> Model:
        """The model with adapted weights."""
        return merged(self.model, self.adapters, self.config.lora)

    def init_state(self, batch_size: int, capacity: int | None = None, planned: jax.Array | int | None = None):
        """See the adapted model."""
        return self.model.init_state(batch_size, capacity, planned)

    def room(self, state) -> jax.Array | None:
        """See the adapted model."""
        return self.model.room(state)

    def hidden(self, tokens_BT: jax.Array, state, segment_ids_BT: jax.Array | None = None, **options):
        """See the adapted model."""
        return self.merged().hidden(tokens_BT, state, segment_ids_BT, **options)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """See the adapted model."""
        return self.merged().logits(hidden_BTD)

    def __call__(self, tokens_BT: jax.Array, state, segment_ids_BT: jax.Array | None = None):
        """See the adapted model."""
        return self.merged()(tokens_BT, state, segment_ids_BT)
