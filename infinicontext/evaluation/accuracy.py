"""How many held-out images are given their class. Shape letters: B images, T pixels, V ids."""

import jax
import jax.numpy as jnp
import numpy as np

from infinicontext.data.images import Images
from infinicontext.models.streaming import Model

PROTOCOL = "Each held-out image is read once; the class is the likeliest of the classes as the token after its pixels."


@jax.jit
def _classify(model: Model, pixels_BT: jax.Array, first_class: jax.Array) -> jax.Array:
    hidden_BTD, _ = model.hidden(pixels_BT, model.init_state(*pixels_BT.shape))
    logits_BV = model.logits(hidden_BTD[:, -1:])[:, 0]
    return jnp.argmax(jnp.where(jnp.arange(logits_BV.shape[1])[None] >= first_class, logits_BV, -jnp.inf), axis=-1) - first_class


def evaluate_accuracy(model: Model, images: Images, batch_size: int = 64) -> dict:
    """The share of images whose class is right, of all and of each class.

    Args:
      model: any model whose vocabulary holds the gray levels, then the classes.
      images: what to classify.
      batch_size: B.

    Returns:
      protocol, images, accuracy, interval (95%, Wilson), by_class.
    """
    from scipy.stats import binomtest  # here, because it takes half a second to import

    right = []
    for at in range(0, len(images), batch_size):
        pixels_BT = images.pixels[at : at + batch_size].astype(np.int32)
        # The last batch is filled up, so that one shape is compiled.
        filled_BT = np.concatenate([pixels_BT, np.zeros((batch_size - len(pixels_BT), pixels_BT.shape[1]), np.int32)])
        found_B = np.asarray(_classify(model, filled_BT, jnp.int32(images.levels)))[: len(pixels_BT)]
        right.append(found_B == images.labels[at : at + batch_size])
    right = np.concatenate(right)
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    by_class = {name: float(right[images.labels == i].mean()) for i, name in enumerate(images.classes) if (images.labels == i).any()}
    return {
        "protocol": PROTOCOL,
        "images": len(right),
        "accuracy": float(right.mean()),
        "interval": [interval.low, interval.high],
        "by_class": by_class,
    }
