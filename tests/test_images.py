"""Images as rows of pixels and classes; the MEGALODON classifier; accuracy; the whole way through the commands."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from infinicontext import models
from infinicontext.cli import main
from infinicontext.data.images import ImageData, load_images
from infinicontext.data.pipeline import PasskeyData, fingerprint, train_batches, validation_batches, vocabulary_size
from infinicontext.errors import UserError
from infinicontext.evaluation.accuracy import evaluate_accuracy
from infinicontext.experiment import Experiment
from infinicontext.experiment_file import one_experiment
from infinicontext.models import MegalodonClassifierConfig, MegalodonConfig, TransformerConfig
from infinicontext.models.megalodon_classifier import GroupNorm
from infinicontext.nn.parameters import parameter_count
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.checks import check

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
    assert vocabulary_size(data) == 10
    assert images.classes == ("dark", "light")
    assert images.pixels.shape == (60, 16)
    assert images.pixels[images.labels == 0].mean() < 3 < 5 < images.pixels[images.labels == 1].mean()
    before = fingerprint(data)
    next(folder.glob("dark/*.png")).unlink()
    assert fingerprint(data) != before


def test_wide_gray_pixels_keep_their_levels(tmp_path):
    """A ramp of 8 bits a pixel, and the same with 16 and 32, which are cut off at white if they are taken for 8."""
    ramp = np.linspace(0, 255, 16, dtype=np.uint8).reshape(4, 4)
    for name, pixels in (("a", ramp), ("b", ramp.astype(np.uint16) * 257), ("c", ramp.astype(np.int32) * 257)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "ramp.png").open("wb") as file:  # the decoder goes by the content
            Image.fromarray(pixels).save(file, format="TIFF" if name == "c" else "PNG")
    images = load_images(ImageData(str(tmp_path), size=4, levels=16))
    np.testing.assert_array_equal(images.pixels, np.arange(16)[None].repeat(3, axis=0))
    with (tmp_path / "c" / "ramp.png").open("wb") as file:
        Image.fromarray(ramp.astype(np.float32)).save(file, format="TIFF")
    with pytest.raises(UserError, match=r"ramp.png cannot be read as an image: its pixels have neither 8 nor 16 bits"):
        load_images(ImageData(str(tmp_path)))


def test_a_picture_too_large_to_be_true(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"0.png cannot be read as an image: .*exceeds limit"):
        load_images(ImageData(str(folder), size=4))


def test_validation_mixes_the_classes(folder):
    """The files come class by class; a few batches of them must not be of the first class alone."""
    data = ImageData(str(folder), size=4, levels=8, validation_fraction=0.5)
    first, again, other = (validation_batches(data, 8, 1, seed)[0]["tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first[:, -1]) == {8, 9}
    assert (first != other).any()


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


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"hidden_dropout": 0.5}, {"attention_dropout": 0.5}], ids=str)
def test_each_dropout_changes_training_alone(rates):
    plain = models.build(MegalodonClassifierConfig(BLOCKS), nnx.Rngs(0))
    model = models.build(MegalodonClassifierConfig(dataclasses.replace(BLOCKS, **rates)), nnx.Rngs(0))
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 10), dtype=np.int32)
    run = jax.jit(lambda model, key: model.hidden(tokens_BT, (), dropout_key=key)[0])
    np.testing.assert_array_equal(run(model, None), run(plain, None))
    dropped = [run(model, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    for one, other in ((dropped[0], run(model, None)), (dropped[0], dropped[2])):
        assert (np.abs(one - other).max(axis=(1, 2)) > 1e-3).all()


def test_embeddings_are_dropped():
    """With nothing added by the blocks, nothing but the embeddings can be."""
    model = models.build(MegalodonClassifierConfig(dataclasses.replace(BLOCKS, dropout=0.5, init_mode="none")), nnx.Rngs(0))
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 10), dtype=np.int32)
    run = jax.jit(lambda key: model.hidden(tokens_BT, (), dropout_key=key)[0])
    assert np.abs(run(jax.random.key(0)) - run(None)).max() > 1e-3


def test_options_of_the_blocks(float64):
    """Scaled embeddings are a table sqrt(D) as large, frequencies replace those of the base, the feed-forward's scale halves by layer."""
    blocks = dataclasses.replace(BLOCKS, dtype="float64")
    tokens_BT = np.random.default_rng(0).integers(0, 17, (2, 10), dtype=np.int32)

    def run(factor=1.0, **options):
        model = models.build(MegalodonClassifierConfig(dataclasses.replace(blocks, **options)), nnx.Rngs(0))
        model.embedding.table[...] *= factor
        return jax.jit(lambda model: model.hidden(tokens_BT, ())[0])(model)

    plain, scaled = run(), run(scale_embeddings=True)
    np.testing.assert_allclose(scaled, run(factor=12**0.5), atol=1e-6)
    assert np.abs(scaled - plain).max() > 1e-3
    np.testing.assert_allclose(run(rope_frequencies=(1.0, 0.01)), plain, atol=1e-12)
    assert np.abs(run(rope_frequencies=(0.5, 0.3)) - plain).max() > 1e-6
    model = models.build(MegalodonClassifierConfig(dataclasses.replace(BLOCKS, rescale_feed_forward=True)), nnx.Rngs(0))
    np.testing.assert_allclose(model.blocks.rescale[...], np.array([[0.1], [0.05]]).repeat(12, axis=1), rtol=1e-6)


def test_rows_of_nothing():
    model = models.build(MegalodonClassifierConfig(BLOCKS), nnx.Rngs(0))
    logits_BTV, state = model(jnp.zeros((2, 0), jnp.int32), model.init_state(2))
    assert (logits_BTV.shape, state) == ((2, 0, 27), ())


def test_compared_models_are_of_one_size():
    file = Path(__file__).parent.parent / "experiments" / "image_classification.py"
    sizes = [parameter_count(models.abstract(one_experiment(f"{file}:{name}").model)) for name in ("digits", "digits_transformer")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


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
        ({"blocks": dataclasses.replace(BLOCKS, tied_embeddings=True)}, "model.blocks.tied_embeddings is True"),
        ({"blocks": dataclasses.replace(BLOCKS, prior_count=2)}, "model.blocks.prior_count is 2"),
        ({"blocks": dataclasses.replace(BLOCKS, prior_count=2, norm_groups=12)}, "prior_count is 2; .*norm_groups less than"),
    ],
)
def test_wrong_classifiers(fields, message):
    with pytest.raises(UserError, match=message):
        MegalodonClassifierConfig(**{"blocks": BLOCKS} | fields)


def test_a_classifier_needs_images():
    with pytest.raises(UserError, match="data is PasskeyData, but model is MegalodonClassifierConfig"):
        check(Experiment("keys", MegalodonClassifierConfig(BLOCKS), PasskeyData(), NextToken("answers")))


def test_train_and_evaluate(folder, tmp_path, capsys):
    (tmp_path / "experiments.py").write_text(EXPERIMENT.format(folder=str(folder)))
    train = ["train", f"{tmp_path}/experiments.py:shades", "--workdir"]
    new, three = [*train, str(tmp_path / "new")], tmp_path / "three"
    for name in "abc":
        (three / name).mkdir(parents=True)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        main([*train, str(tmp_path / "run")])
        main(["eval", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["tasks"]["accuracy"]["accuracy"] == 1.0
    assert result["state_bytes"] == {"16": 0}
    capsys.readouterr()
    for arguments, message in (
        (["eval", str(tmp_path / "run"), "--tasks", "passkey"], "images are evaluated by accuracy"),
        (["generate", "a", "--model", str(tmp_path / "run")], "run holds a classifier, which reads no text"),
        (["generate", "a", "--model", str(tmp_path / "run"), "--dtype", "bfloat16"], "run holds a classifier, which reads no text"),
        ([*new, "--data.levels", "9"], "model.vocab_size is 10; it must be data.levels + model.classes, 9 + 2"),
        ([*new, "--data.levels", "7"], "model.vocab_size is 10; it must be data.levels + model.classes, 7 + 2"),
        ([*new, "--model.classes", "2", "--data.source", str(three)], "model.classes is 2, but data has 3"),
        ([*new, "--objective.loss", "all"], 'objective.loss is "all"'),
        ([*new, "--objective.context-weight", "0.1"], "objective.context_weight 0.1"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert message in sentence
        assert not (tmp_path / "new").exists()
