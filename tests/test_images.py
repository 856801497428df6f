"""Images as rows of pixels and classes; the MEGALODON classifier; accuracy; the whole way through the commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from infinicontext import models
from infinicontext.cli import main
from infinicontext.data.images import ImageData, load_images
from infinicontext.data.pipeline import fingerprint, train_batches, validation_batches, vocabulary_size
from infinicontext.errors import UserError
from infinicontext.evaluation.accuracy import evaluate_accuracy
from infinicontext.models import MegalodonClassifierConfig, MegalodonConfig, TransformerConfig
from infinicontext.models.megalodon_classifier import GroupNorm

BLOCKS = MegalodonConfig(
    vocab_size=27, dim=12, layers=2, heads=2, z_dim=8, value_dim=12, feed_forward=16, cema_order=3, chunk=4, norm_groups=3, remat=False
)
EXPERIMENT = """
from infinicontext.data.images import ImageData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models import MegalodonClassifierConfig, MegalodonConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

def shades():
    blocks = MegalodonConfig(vocab_size=10, dim=16, layers=1, heads=1, z_dim=8, value_dim=16, feed_forward=16, cema_order=2, norm_groups=2,
                             dropout=0.1)
    return Experiment("shades", MegalodonClassifierConfig(blocks, classes=2), ImageData({folder!r}, size=4, levels=8), NextToken("answers"),
                      OptimizerConfig(learning_rate=1e-2, warmup_steps=2), steps=30, batch_size=8, validation_batches=1,
                      evaluation=Evaluation(tasks=("accuracy",), lengths=(16,)))
"""


@pytest.fixture
def folder(tmp_path):
    """Two classes of small pictures: dark and light, with noise."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            pixels = np.clip(level + rng.normal(0, 30, (6, 5, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_digits():
    data = ImageData()
    train, held_out, whole = (load_images(data, split) for split in ("train", "validation", "all"))
    assert len(train) + len(held_out) == len(whole) == 1797
    assert 0.15 < len(held_out) / 1797 < 0.25
    assert vocabulary_size(data) == 27
    row = whole[0]
    assert row["tokens"].shape == (65,)
    assert row["tokens"][-1] == 17 + whole.labels[0]
    assert row["tokens"][:-1].min() == 0
    assert row["tokens"][:-1].max() <= 16
    np.testing.assert_array_equal(row["answer_mask"], np.eye(64)[63])
    from sklearn.datasets import load_digits

    # 17 levels are told apart, so the values of the source, 0 to 16, come through as they are.
    np.testing.assert_array_equal(whole.pixels.reshape(-1, 8, 8), load_digits().images)
    assert load_images(dataclasses.replace(data, size=5)).pixels.shape == (1797, 25)


def test_a_folder_of_pictures(folder):
    data = ImageData(str(folder), size=4, levels=8)
    images = load_images(data)
    assert images.classes == ("dark", "light")
    assert images.pixels.shape == (60, 16)
    assert images.pixels[images.labels == 0].mean() < 3 < 5 < images.pixels[images.labels == 1].mean()
    before = fingerprint(data)
    next(folder.glob("dark/*.png")).unlink()
    assert fingerprint(data) != before


def test_batches_are_functions_of_seed_and_step():
    data = ImageData(size=4)
    first = [next(batches)["tokens"] for batches in [train_batches(data, 8, seed=1, step=0)] for _ in range(3)]
    resumed = next(train_batches(data, 8, seed=1, step=2))["tokens"]
    np.testing.assert_array_equal(first[2], resumed)
    halves = [next(train_batches(data, 8, seed=1, step=2, process_index=i, process_count=2))["tokens"] for i in range(2)]
    np.testing.assert_array_equal(np.sort(np.concatenate(halves), axis=0), np.sort(resumed, axis=0))
    assert len(validation_batches(data, 8, 3, 0)) == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: [p.unlink() for p in (f / "dark").iterdir()], "has no image in its sub-folder dark"),
        (lambda f: (f / "dark" / "broken.png").write_bytes(b"no image"), "broken.png cannot be read as an image"),
        (lambda f: (f / "dark").rename(f.parent / "dark"), "has 1 sub-folders; it needs two or more"),
        (lambda f: f.rename(f.parent / "elsewhere"), 'it must be "digits" or a folder'),
    ],
)
def test_a_broken_folder_is_one_sentence(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message):
        load_images(ImageData(str(folder), size=4))


@pytest.mark.parametrize("changes", [{}, {"attention": "chunk"}, {"bidirectional": False, "attention": "chunk"}], ids=str)
def test_classifier(changes, float64):
    """Padding changes nothing; only classes can be chosen; a pixel reaches the class from both ends."""
    config = MegalodonClassifierConfig(dataclasses.replace(BLOCKS, dtype="float64"), **changes)
    model = models.build(config, nnx.Rngs(0))
    run = jax.jit(lambda tokens_BT, segments_BT: model(tokens_BT, model.init_state(2), segments_BT)[0])
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 10), dtype=np.int32)
    ones_BT = np.ones((2, 10), np.int32)
    logits_BTV = run(tokens_BT, ones_BT)
    assert logits_BTV.shape == (2, 10, 27)
    assert (np.argmax(logits_BTV, axis=-1) >= 17).all()
    np.testing.assert_array_equal(logits_BTV[:, :1].repeat(10, axis=1), logits_BTV)
    padded_BT, segments_BT = np.pad(tokens_BT, ((0, 0), (0, 3)), constant_values=5), np.pad(ones_BT, ((0, 0), (0, 3)))
    np.testing.assert_allclose(run(padded_BT, segments_BT)[:, 0], logits_BTV[:, 0], atol=1e-12)
    for t in (0, 9):
        changed_BT = tokens_BT.copy()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 17
        assert (np.abs(run(changed_BT, ones_BT)[:, 0, 17:] - logits_BTV[:, 0, 17:]).max(axis=1) > 1e-6).all()


def test_backward_average_is_the_forward_one_mirrored(float64):
    """With equal parameters for both directions, full attention and no rotation, a mirrored row has the same class scores."""
    config = MegalodonClassifierConfig(dataclasses.replace(BLOCKS, dtype="float64", rope_base=1e300))
    model = models.build(config, nnx.Rngs(0))
    model.blocks.backward_cema = model.blocks.cema
    # Only the fastest pair turns at so large a base: give it nothing to turn.
    model.blocks.gamma[...] = model.blocks.gamma[...].at[:, :, :, :2].set(-1.0)
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 10), dtype=np.int32)
    run = jax.jit(lambda tokens_BT: model(tokens_BT, model.init_state(2))[0][:, 0, 17:])
    np.testing.assert_allclose(run(tokens_BT), run(tokens_BT[:, ::-1].copy()), atol=1e-10)


def test_group_norm_by_hand():
    x_BTD = np.random.default_rng(0).normal(3, 2, (2, 5, 6)).astype(np.float32)
    valid_BT = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    y_BTD = GroupNorm(6, 2, 1e-5)(jnp.asarray(x_BTD), jnp.asarray(valid_BT))
    for row, length in enumerate((5, 3)):
        for group in (slice(0, 3), slice(3, 6)):
            part = x_BTD[row, :length, group]
            np.testing.assert_allclose(y_BTD[row, :length, group], (part - part.mean()) / np.sqrt(part.var() + 1e-5), atol=1e-5)
    assert not np.asarray(y_BTD[1, 3:]).any()


def test_accuracy_counts():
    """A model that sees one pixel can be right about exactly the images whose class that pixel names."""
    images = load_images(ImageData(size=4))
    model = models.build(TransformerConfig(vocab_size=27, dim=16, layers=1, heads=2), nnx.Rngs(0))
    result = evaluate_accuracy(model, images, batch_size=50)
    logits_BV = jax.jit(lambda pixels_BT: model(pixels_BT, model.init_state(*pixels_BT.shape))[0][:, -1])(images.pixels.astype(np.int32))
    right = np.argmax(logits_BV[:, 17:], axis=1) == images.labels
    assert result["images"] == 1797
    assert result["accuracy"] == right.mean()
    assert result["by_class"]["3"] == right[images.labels == 3].mean()
    assert result["interval"][0] < result["accuracy"] < result["interval"][1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 1}, "model.classes is 1"),
        ({"classes": 27}, "model.classes is 27"),
        ({"attention": "window"}, "model.attention is window"),
    ],
)
def test_wrong_classifiers(fields, message):
    with pytest.raises(UserError, match=message):
        MegalodonClassifierConfig(BLOCKS, **fields)


def test_train_and_evaluate(folder, tmp_path, capsys):
    (tmp_path / "experiments.py").write_text(EXPERIMENT.format(folder=str(folder)))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        main(["train", f"{tmp_path}/experiments.py:shades", "--workdir", str(tmp_path / "run")])
        main(["eval", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["tasks"]["accuracy"]["accuracy"] == 1.0
    assert result["state_bytes"] == {"16": 0}
    capsys.readouterr()
    for arguments, message in (
        (["eval", str(tmp_path / "run"), "--tasks", "passkey"], "images are evaluated by accuracy"),
        (
            ["train", f"{tmp_path}/experiments.py:shades", "--workdir", str(tmp_path / "new"), "--data.levels", "9"],
            "model.vocab_size is 10",
        ),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
