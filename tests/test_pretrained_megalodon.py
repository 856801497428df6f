"""Checkpoints of the official MEGALODON code in and out, and the reader of torch files that runs no code in them."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import tracemalloc
import warnings
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from infinicontext import models, sharding
from infinicontext.errors import UserError
from infinicontext.models.megalodon import MegalodonConfig
from infinicontext.models.transformer import TransformerConfig
from infinicontext.pretrained import megalodon as official
from infinicontext.pretrained.megalodon import load, save
from infinicontext.pretrained.placement import parameter_paths
from infinicontext.pretrained.tensor_files import open_tensors, save_pth

EXAMPLES = MegalodonConfig.examples()
FORMATS = pytest.mark.parametrize("suffix", [".pth", ".safetensors"])


def random_model(name: str, dtype="float32", **changes):
    model = models.build(dataclasses.replace(EXAMPLES[name], **changes), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), model)


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint, to be damaged: its folder, and a function that changes its tensors."""
    path = tmp_path / "saved"
    save(random_model("swiglu"), path, shards=1, suffix=".safetensors")

    def change(**changes):
        file = path / "consolidated.safetensors"
        tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)

    return path, change


# --- The original's ---


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_model_parallel_checkpoint(golden, dtype):
    """Its shards give the model of the whole, and so the original's logits."""
    with jax.enable_x64(dtype == "float64"):
        model, expected = (
            load(golden / "megalodon" / "model_a_mp2", dtype=dtype),
            load_file(golden / "megalodon" / "model_a_io.safetensors"),
        )
        logits_BTV, _ = jax.jit(model)(expected["short.ids"].astype(np.int32), model.init_state(len(expected["short.ids"])))
        np.testing.assert_allclose(logits_BTV, expected["short.logits"], atol={"float64": 1e-10, "float32": 2e-5}[dtype])


@pytest.mark.golden
@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_writes_the_original_tensors(golden, tmp_path, name):
    """In and out again: every tensor of the original, those that are no parameters included, in float32."""
    source, read, written = golden / "megalodon" / f"{name}_weights.safetensors", tmp_path / "read", tmp_path / "written"
    read.mkdir()
    shutil.copy(source, read / "consolidated.safetensors")
    (read / "consolidate_config.json").write_text('{"model_parallel_size": 1}')
    original = json.loads(_metadata(source)["config"])
    (read / "config.json").write_text(json.dumps({"model": original}))
    save(load(read), written)
    tensors, expected = open_tensors(written / "consolidated.pth"), load_file(source)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[key].astype(tensor.dtype))
    assert json.loads((written / "config.json").read_text())["model"] == original | {"rope_base": original["rope_base"] or 10000.0}


def _metadata(file: pathlib.Path) -> dict[str, str]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


# --- Out and in ---


@FORMATS
@pytest.mark.parametrize(("name", "shards"), [("swiglu", 1), ("swiglu", 2), ("silu", 1)])
def test_round_trip(tmp_path, name, shards, suffix):
    """Every option, whole or cut; also rotary frequencies that are none of the formula's."""
    changes = {"heads": 4, "z_dim": 16, "norm_groups": 6} if shards == 2 else {}
    model = random_model(name, **changes)
    save(model, tmp_path / "out", shards=shards, suffix=suffix)
    assert len(list((tmp_path / "out").glob(f"*{suffix}"))) == shards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frequencies
        again = load(tmp_path / "out")
    assert again.config.z_size == model.config.z_size
    same = {"rope_frequencies": None, "cema_block": None, "z_dim": model.config.z_size}
    config = dataclasses.replace(model.config, **same)
    assert dataclasses.replace(again.config, **same) == config
    if model.config.rope_frequencies:
        np.testing.assert_allclose(again.config.rope_frequencies, model.config.rope_frequencies, rtol=1e-6)
    for (path, ours), theirs in zip(parameter_paths(model).items(), parameter_paths(again).values()):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_bfloat16(tmp_path):
    """Written and read without a detour; the rotary frequencies keep float32."""
    model = random_model("swiglu", "bfloat16")
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "consolidate_config.json").read_text())["dtype"] == "bf16"
    again = load(tmp_path / "out", dtype="bfloat16")
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(again)):
        np.testing.assert_array_equal(ours, theirs)
    assert open_tensors(tmp_path / "out" / "consolidated.pth")["rope.freqs"].dtype == np.float32


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"fsdp": 4}])
def test_shards_onto_a_mesh(tmp_path, mesh):
    """Slices that lie in one shard, in several, and that shards and mesh cut on different axes."""
    model = random_model("swiglu", heads=4, dim=24, z_dim=16, norm_groups=6)
    save(model, tmp_path / "two", shards=2)
    placed = load(tmp_path / "two", sharding.make_mesh(sharding.MeshConfig(**mesh)))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(placed)):
        np.testing.assert_array_equal(ours, theirs)


def peak_bytes(run) -> int:
    """The most memory that Python and NumPy held meanwhile; arrays of JAX are not counted."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_of_reading_and_writing(tmp_path, monkeypatch):
    """Writing holds a tensor and its copy on the way, reading the slice that is read, whatever the number of layers and shards."""
    model = random_model("swiglu", dim=96, z_dim=48, layers=6, feed_forward=4000, norm_groups=6, vocab_size=50)
    tensor = model.blocks.feed_forward_in[...].nbytes // 6
    save(model, tmp_path / "once")  # what is compiled for it is not measured
    assert peak_bytes(lambda: save(model, tmp_path / "two", shards=2)) < 2.5 * tensor

    readers = []
    monkeypatch.setattr(official, "fill", lambda model, mesh, reader: readers.append(reader))
    load(tmp_path / "two")
    shape = (6, 96, 4000)
    read = readers[0]("blocks/feed_forward_in", shape)
    for columns in (slice(0, 1000), slice(1000, 3000)):  # in one shard, in both
        index = (slice(None), slice(None), columns)
        size = read(index).nbytes
        assert size <= peak_bytes(lambda: read(index)) < 1.1 * size


def test_onto_a_mesh(tmp_path):
    """Shards read onto eight devices, and written from there."""
    model, mesh = random_model("swiglu"), sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    save(model, tmp_path / "one")
    placed = load(tmp_path / "one", mesh)
    assert not placed.blocks.z[...].sharding.is_fully_replicated
    save(placed, tmp_path / "two", shards=1)
    assert (tmp_path / "one" / "consolidated.pth").read_bytes() == (tmp_path / "two" / "consolidated.pth").read_bytes()


# --- Rotary frequencies ---


def test_frequencies_of_a_checkpoint_in_bfloat16(saved):
    path, change = saved
    rounded_R = np.array([1.0, 0.0101], np.float32).astype(ml_dtypes.bfloat16)
    change(rope__freqs=rounded_R)
    with pytest.warns(UserWarning, match="rope.freqs differs from base 10000"):
        assert load(path).config.rope_frequencies == tuple(rounded_R.astype(float))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path, rope="formula").config.rope_frequencies is None
        change(rope__freqs=np.array([1.0, 0.01], np.float32))
        assert load(path).config.rope_frequencies is None


# --- What can be wrong ---


def test_lists_all_that_does_not_fit(saved):
    path, change = saved
    one = np.ones(1, np.float32)
    change(embed__weight=None, module__extra=one, layers__0__mega__wz__bias=one, output__final_norm__weight=np.ones(12, np.int64))
    problems = "embed.weight is missing; module.extra is unexpected; layers.0.mega.wz.bias is [1], not [8]; output.final_norm.weight holds"
    with pytest.raises(UserError) as error:
        load(path)
    for problem in problems.split("; "):
        assert problem in str(error.value)


def test_shards_that_do_not_agree(tmp_path):
    save(random_model("swiglu", norm_groups=6), tmp_path / "out", shards=2, suffix=".safetensors")
    file = tmp_path / "out" / "consolidated.01.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layers.1.mega.rmsnorm.weight": np.ones(12, np.float32)}, file)
    with pytest.raises(UserError, match=r"layers\.1\.mega\.rmsnorm\.weight of shard 1 differs"):
        load(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="its model_parallel_size is 2"):
        load(tmp_path / "out")


def test_other_mistakes(saved, tmp_path):
    path, change = saved
    record = json.loads((path / "config.json").read_text())

    def refused(match, **fields):
        (path / "config.json").write_text(json.dumps(record | {"model": record["model"] | fields}))
        with pytest.raises(UserError, match=match):
            load(path)

    refused("model.output_size is 5", output_size=5)
    refused("in model, moving_window is unknown", moving_window=1)
    refused("model.norm_groups is 5", norm_num_groups=5)
    refused("output.output.weight differs from embed.weight", share_emb=True)
    refused("model.init_mode is foo; it must be one of he,", init_mode="foo")
    refused("model.norm_epsilon is -1", norm_eps=-1)
    refused("model.rope_base is nan", rope_base=float("nan"))
    wrong = {"num_layers": "2", "model_dim": None, "dropout": None, "chunk_size": 16.0, "num_heads": True, "swiglu": 1, "init_mode": 3}
    wrong |= {"rope_base": "big", "norm_eps": "1e-5", "vocab_size": [17], "efficient_attn": 1}
    for name, value in wrong.items():
        kinds = "an integer|a number|true or false|a string"
        refused(rf"config.json: in model, {name} is {re.escape(json.dumps(value))}, not ({kinds})$", **{name: value})
    (path / "config.json").write_text(json.dumps(record | {"model": record["model"] | {"vocab_size": -1}}))
    assert load(path).config.vocab_size == EXAMPLES["swiglu"].vocab_size
    change(output__final_norm__prior_count=np.array(3))
    with pytest.raises(UserError, match="prior_count is not the same in all norms"):
        load(path)

    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(UserError, match=r"neither consolidated\.pth nor"):
        load(raw)
    (raw / "model.ckpt.00000.pth").touch()
    with pytest.raises(UserError, match="raw FSDP shards"):
        load(raw)

    with pytest.raises(UserError, match="exists already"):
        save(random_model("swiglu"), path)
    with pytest.raises(UserError, match=r"shards is 5; .* model\.heads, 2"):
        save(random_model("swiglu"), tmp_path / "five", shards=5)
    with pytest.raises(UserError, match="a Transformer cannot be written"):
        save(models.build(TransformerConfig(dim=16, layers=1), nnx.Rngs(0)), tmp_path / "other")


# --- Torch files ---


def test_reads_what_torch_writes():
    """A state dict that torch 2.13 saved: versions of modules, views of one storage, a parameter, several dtypes, no elements."""
    tensors = open_tensors(pathlib.Path(__file__).parent / "data" / "torch_saved.pth")
    turned = np.arange(12.0).reshape(3, 4).T
    expected = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.zeros(2, np.float32),
        "count": np.array(3),
        "turned": turned,
        "part": np.array([5, 6], ml_dtypes.bfloat16),
        "shared": turned[1:],
        "parameter": np.ones(2, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        np.testing.assert_array_equal(tensor, expected[name])
    with pytest.raises(ValueError, match="read-only"):
        tensors["weight"][0] = 0


def pth_with(path: pathlib.Path, pickled: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(16))
    return path


class Evil:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def test_runs_no_code(tmp_path):
    """Functions by name, at any depth and by any protocol, are refused before they are called."""
    mark = tmp_path / "ran"
    calls = [(os.system, f"touch {mark}"), (eval, f"open({str(mark)!r}, 'w')"), (subprocess.call, ["touch", str(mark)])]
    for number, call in enumerate(calls):
        for protocol in (0, 2, 4):
            file = pth_with(tmp_path / f"{number}{protocol}.pth", pickle.dumps({"w": [Evil(*call)]}, protocol))
            with pytest.raises(UserError, match=r"is refused: its pickle names \w+\.\w+, which is no part of a tensor"):
                open_tensors(file)
    assert not mark.exists()


def instructions(storage=b"ctorch\nFloatStorage\n", before=b"", offset=0, shape=(4,), strides=(1,), after=b"") -> bytes:
    """A pickle of one tensor, with some of its instructions replaced."""
    value = lambda value: pickle.dumps(value, 2)[2:-1]
    where = b"(" + value("storage") + storage + value("0") + value("cpu") + value(4) + b"tQ"
    tensor = b"(" + where + value(offset) + value(shape) + value(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}(" + value("w") + before + b"ctorch._utils\n_rebuild_tensor_v2\n" + tensor + after + b"u."


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (5,)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-1,)},
        {"strides": (2,)},
        {"shape": (4, 1)},
        {"storage": b"X\x03\x00\x00\x00abc"},
        # BUILD, which sets attributes of what was read: of the tensor, and of the function that notes it.
        {"after": pickle.dumps({"storage": 1}, 2)[2:-1] + b"b"},
        {"before": b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.dumps((None, {"__call__": 1}), 2)[2:-1] + b"b0"},
    ],
)
def test_refuses_tensors_that_lie(tmp_path, changes):
    assert open_tensors(pth_with(tmp_path / "good.pth", instructions()))["w"].tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError):
        open_tensors(pth_with(tmp_path / "bad.pth", instructions(**changes)))


@FORMATS
def test_damaged_files(tmp_path, suffix):
    tensors = {"w": np.ones((4, 8), np.float32), "b": np.ones(3, np.float32)}
    file = tmp_path / f"x{suffix}"
    save_pth(tensors.items(), file) if suffix == ".pth" else save_file(tensors, file)
    data = file.read_bytes()
    for damaged in (b"", b"nothing of the kind", data[: len(data) // 2], data[:40]):
        file.write_bytes(damaged)
        with pytest.raises(UserError):
            open_tensors(file)


def test_refuses_what_is_no_flat_dict(tmp_path):
    for held in ([1], {"a": {"b": 1}}, {1: 2}, 3):
        stream = io.BytesIO()
        pickle.dump(held, stream)
        with pytest.raises(UserError, match="no flat dict of tensors"):
            open_tensors(pth_with(tmp_path / "x.pth", stream.getvalue()))
