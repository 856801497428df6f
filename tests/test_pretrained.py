"""Weights of Hugging Face checkpoints in and out: the reference models, round trips, sharded reads, and everything that can be wrong."""

import contextlib
import dataclasses
import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from infinicontext import models, pretrained, sharding
from infinicontext.errors import UserError
from infinicontext.inference.generate import Generation, generate
from infinicontext.models import TransformerConfig
from infinicontext.nn.rope import RopeConfig
from infinicontext.pretrained import huggingface
from infinicontext.pretrained.huggingface import sources
from infinicontext.pretrained.huggingface_config import FAMILIES, config_from_huggingface, obstacles
from infinicontext.pretrained.placement import parameter_paths

TINY = TransformerConfig(vocab_size=17, dim=16, layers=3, heads=4, kv_heads=2, feed_forward=24)
CONFIGS = {
    "llama": dataclasses.replace(TINY, attention_bias=True, output_bias=True, feed_forward_bias=True, tied_embeddings=True),
    "mistral": dataclasses.replace(TINY, attention="window", window=5, head_dim=6),
    "qwen2": dataclasses.replace(
        TINY, attention_bias=True, rope=RopeConfig("yarn", factor=4.0, original_length=16, length=64, beta_fast=16.0)
    ),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, attention="window", window=5, kv_heads=1),
    "phi3": dataclasses.replace(
        TINY, rope=RopeConfig("longrope", partial=0.5, original_length=16, length=64, short_factors=(1.0,), long_factors=(2.0,))
    ),
}


@pytest.fixture(scope="module")
def reference(golden, tmp_path_factory):
    """Checkpoint folders of the reference models, by name."""
    folders = {}
    for cases in sorted((golden / "longrope").glob("*.cases.safetensors")):
        name = cases.name.removesuffix(".cases.safetensors")
        folders[name] = tmp_path_factory.mktemp("reference") / name
        folders[name].mkdir()
        shutil.copy(cases.with_name(f"{name}.config.json"), folders[name] / "config.json")
        shutil.copy(cases.with_name(f"{name}.weights.safetensors"), folders[name] / "model.safetensors")
    assert folders
    return folders


def cases_of(golden, name) -> dict[str, np.ndarray]:
    return load_file(golden / "longrope" / f"{name}.cases.safetensors")


def assert_same_parameters(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@jax.jit
def last_logits(model, tokens_BT, length_B):
    """Logits of each row's last token, each row planned for its own length and read in one pass: nothing is cached, nothing stale."""
    B, T = tokens_BT.shape
    present_BT = (np.arange(T, dtype=np.int32)[None] < length_B[:, None]).astype(np.int32)
    logits_BTV, _ = model(tokens_BT, model.init_state(B, capacity=T, planned=length_B), present_BT)
    return jax.numpy.take_along_axis(logits_BTV, length_B[:, None, None] - 1, axis=1)[:, 0]


def recomputed_greedily(model, prompt, steps, plan):
    """`steps` greedy tokens, all read again for each; plan(tokens so far, the new one included) -> the planned length."""
    tokens = list(prompt)
    run = jax.jit(
        lambda tokens_1T, planned_B: model(tokens_1T, model.init_state(1, capacity=tokens_1T.shape[1], planned=planned_B))[0][0],
    )
    for _ in range(steps):
        padded_1T = np.array([tokens + [0] * (len(prompt) + steps - len(tokens))], np.int32)
        logits_TV = run(padded_1T, np.array([plan(len(tokens))], np.int32))
        tokens.append(int(np.argmax(logits_TV[len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.golden
def test_logits_of_the_reference_models(golden, reference):
    for name, folder in reference.items():
        model, cases = pretrained.load(folder), cases_of(golden, name)
        lengths = [int(key.removeprefix("logits_len")) for key in cases if key.startswith("logits_len")]
        assert lengths, name
        run = jax.jit(lambda tokens_BT: model(tokens_BT, model.init_state(len(tokens_BT), capacity=tokens_BT.shape[1]))[0])
        for length in lengths:
            logits_BTV = run(cases["input_ids"][:, :length])
            np.testing.assert_allclose(logits_BTV, cases[f"logits_len{length}"], atol=1e-4, rtol=0, err_msg=f"{name} {length}")


@pytest.mark.golden
def test_generation_across_the_boundary(golden, reference):
    """Both policies against a model that reads the whole prefix anew for every token, and that one against the reference."""
    found = 0
    for name, folder in reference.items():
        cases = cases_of(golden, name)
        if "prefix_recompute_logits" not in cases:
            continue
        found += 1
        model = pretrained.load(folder)
        original, (sequence_T,), (expected_NV,) = model.config.rope.original_length, cases["gen_sequence"], cases["prefix_recompute_logits"]
        steps = len(expected_NV)
        length_N = np.arange(len(sequence_T) - steps, len(sequence_T), dtype=np.int32)
        assert length_N[0] <= original < length_N[-1]

        # Rows of all lengths in one batch, each with the factors its own length asks for.
        recomputed_NV = last_logits(model, np.tile(sequence_T, (steps, 1)), length_N)
        np.testing.assert_allclose(recomputed_NV, expected_NV, atol=1e-4, rtol=0, err_msg=name)

        # planned: one set of factors for the whole request; cached, cut anywhere, it is the reference wherever that uses the same set.
        for planned, same in ((len(sequence_T), length_N > original), (original, length_N <= original)):
            state, parts = model.init_state(1, capacity=len(sequence_T), planned=planned), []
            for part_T in np.split(sequence_T, (3, original, original + 1)):
                logits_1TV, state = model(part_T[None], state)
                parts.append(logits_1TV[0])
            logits_NV = np.concatenate(parts)[length_N - 1]
            np.testing.assert_allclose(logits_NV[same], expected_NV[same], atol=1e-4, rtol=0, err_msg=name)

        prompt = sequence_T[: length_N[0]]
        run = lambda policy: generate(model, [prompt], Generation(max_new_tokens=steps, rope_policy=policy))[0].tokens.tolist()
        assert run("hf") == recomputed_greedily(model, prompt, steps, lambda length: length)
        assert run("planned") == recomputed_greedily(model, prompt, steps, lambda length: len(prompt) + steps) == run("long")
        assert run("short") == recomputed_greedily(model, prompt, steps, lambda length: original)
        assert len({tuple(run(policy)) for policy in ("hf", "long", "short")}) == 3, "the policies should differ on random weights"
    assert found


@pytest.mark.golden
def test_round_trip_of_the_reference_models(reference, tmp_path):
    """Identical tensors under identical names, and a config that reads the same."""
    for name, folder in reference.items():
        model = pretrained.load(folder)
        pretrained.save(model, tmp_path / name, like=folder)
        before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value, err_msg=f"{name} {key}")
        assert pretrained.read_config(tmp_path / name) == model.config
        old, new = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / name))
        assert old.items() <= (new | {"architectures": old.get("architectures")}).items()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_our_side(family, tmp_path):
    """A model of ours is written as the family that has its options, in several files, and comes back the same."""
    model = models.build(CONFIGS[family], nnx.Rngs(0))
    # Biases and scales begin as constants, among which a wrong order would not show.
    model = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, model)
    pretrained.save(model, tmp_path / "out", length=64, shard_bytes=4000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model))
    back = pretrained.load(tmp_path / "out")
    assert back.config == model.config
    assert_same_parameters(back, model)


def test_dtypes(tmp_path):
    model = models.build(TINY, nnx.Rngs(0))
    pretrained.save(model, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    single, half = pretrained.load(tmp_path / "half"), pretrained.load(tmp_path / "half", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(single)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}
    assert (single.config.dtype, half.config.dtype) == ("float32", "bfloat16")
    assert_same_parameters(single, jax.tree.map(lambda x: x.astype("float32"), half))
    pretrained.save(single, tmp_path / "again", dtype="bfloat16")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "half" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_each_device_reads_only_its_slice(family, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIGS[family], vocab_size=32)
    model = models.build(config, nnx.Rngs(0))
    pretrained.save(model, tmp_path / "out")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))

    read_bytes = []
    opened = huggingface._open

    class Counting:
        """An open file that notes how much is read from it."""

        def __init__(self, file):
            self.file = file

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index):
                    read_bytes.append(part[index].nbytes)
                    return part[index]

            return Slice()

    monkeypatch.setattr(huggingface, "_open", lambda *arguments: {name: Counting(file) for name, file in opened(*arguments).items()})
    loaded = pretrained.load(tmp_path / "out", mesh)
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    assert sum(read_bytes) == total, "every number should be read once, however many devices hold it"
    assert_same_parameters(loaded, model)
    places = jax.tree.leaves(sharding.shardings(models.abstract(config), mesh))
    split = 0
    for array, where in zip(jax.tree.leaves(loaded), places, strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
        assert {shard.data.shape for shard in array.addressable_shards} == {where.shard_shape(array.shape)}
        split += where.shard_shape(array.shape) != array.shape
    assert split >= 8
    largest = max(loaded.blocks.feed_forward.down[...].addressable_shards, key=lambda shard: shard.data.nbytes)
    assert largest.data.nbytes * 4 == model.blocks.feed_forward.down[...].nbytes


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_slice_is_read_in_little_more_than_its_own_memory(tmp_path, monkeypatch, stored, dtype):
    """Of the largest tensors, stacked and not, for a mesh: at most 1.3 times the slice, its copy on the way included."""
    monkeypatch.setattr(huggingface, "_SLAB", 2**16)  # as small beside these slices as the real one is beside real slices
    config = dataclasses.replace(TINY, vocab_size=20000, dim=512, layers=1, feed_forward=20000)
    pretrained.save(models.build(config, nnx.Rngs(0)), tmp_path / "out", dtype=stored)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4))
    where, abstract = sources(config, "llama"), models.abstract(config)
    places, shapes = parameter_paths(sharding.shardings(abstract, mesh)), parameter_paths(abstract)
    with contextlib.ExitStack() as closing:
        tensors = huggingface._open(tmp_path / "out", closing)
        for name in ("embedding/table", "embedding/head", "blocks/feed_forward/up", "blocks/feed_forward/down"):
            read = huggingface._reader(tensors, where[name], shapes[name].shape, np.dtype(dtype))
            index = next(iter(places[name].addressable_devices_indices_map(shapes[name].shape).values()))
            tracemalloc.start()
            size = read(index).nbytes
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert size <= peak < 1.3 * size, (name, peak / size)


def test_another_config_reads_the_same_weights(tmp_path):
    model = models.build(TINY, nnx.Rngs(0))
    pretrained.save(model, tmp_path / "out")
    config = dataclasses.replace(
        TINY, attention="block_window", block=4, memory_blocks=1, rope=RopeConfig("linear", factor=2.0), dtype="bfloat16"
    )
    loaded = pretrained.load(tmp_path / "out", config=config)
    assert loaded.config == config
    assert_same_parameters(loaded, model)
    with pytest.raises(
        UserError, match=r"cannot be read with model.feed_forward_size 32, it has 24; model.norm_epsilon 1e-05, it has 1e-06"
    ):
        pretrained.load(tmp_path / "out", config=dataclasses.replace(TINY, feed_forward=32, norm_epsilon=1e-5))
    edit_config(tmp_path / "out", model_type="gemma")
    with pytest.raises(UserError, match="model_type gemma"):
        pretrained.load(tmp_path / "out", config=TINY)


# --- What can be wrong ---


@pytest.fixture
def folder(tmp_path):
    pretrained.save(models.build(TINY, nnx.Rngs(0)), tmp_path / "model", shard_bytes=4000)
    return tmp_path / "model"


def rewrite(folder, change):
    """Lets `change` edit a folder's tensors, in one file."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **fields):
    record = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))


def test_all_wrong_tensors_are_listed_at_once(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
        tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].astype(np.int8)

    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        pretrained.load(folder)
    for text in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight is missing",
        "model.layers.0.self_attn.q_proj.bias is unexpected",
        "lm_head.weight is [17, 15], not [17, 16]",
        "model.layers.2.self_attn.k_proj.weight holds I8",
    ):
        assert text in str(error.value)
    assert str(error.value).count(";") == 4


def test_tensors_that_nothing_reads_are_ignored(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
        edit_config(folder, tie_word_embeddings=True)

    rewrite(folder, change)
    assert pretrained.load(folder).config.tied_embeddings


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit_config(f, vocab_size=18), r"embed_tokens.weight is \[17, 16\], not \[18, 16\]"),
        (lambda f: edit_config(f, model_type="gpt2"), "model_type gpt2; it must be one of llama, mistral, qwen2, qwen3, phi3"),
        (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act gelu; it must be silu"),
        (lambda f: edit_config(f, hidden_size=..., vocab_size=None), "lacks vocab_size, hidden_size"),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
        (lambda f: edit_config(f, num_key_value_heads=3), "not a multiple of model.kv_heads"),
        (lambda f: edit_config(f, num_key_value_heads=0), "model.kv_heads is 0"),
        (lambda f: edit_config(f, rope_scaling={"rope_type": "cubic"}), "rope_type is cubic"),
        (lambda f: edit_config(f, rope_scaling="linear"), "a value of a wrong kind"),
        (lambda f: edit_config(f, rope_scaling={"rope_type": "linear", "factor": "2"}), "a value of a wrong kind"),
        (
            lambda f: edit_config(f, model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
            "different kinds of attention",
        ),
        (
            lambda f: next(f.glob("model-00002*")).unlink(),
            r"lacks model-00002-of-0000\d.safetensors, which model.safetensors.index.json names",
        ),
        (lambda f: next(f.glob("model-00002*")).write_bytes(next(f.glob("model-00002*")).read_bytes()[:-40]), "model-00002.*cut off"),
        (lambda f: next(f.glob("model-00001*")).write_bytes(b""), "model-00001.*cut off"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "has no weight_map"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    ],
)
def test_a_broken_folder_is_one_sentence(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message):
        pretrained.load(folder)


def test_torch_pickles_are_not_opened(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"has pytorch_model.bin, a torch pickle.*convert it to safetensors"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "block_window"}, "model.attention block_window cannot"),
        ({"attention_bias": True, "qk_norm": True}, "cannot be written for transformers"),
        ({"rope": RopeConfig(partial=0.5), "attention_bias": True}, "rope.partial 0.5"),
        (
            {"rope": RopeConfig("longrope", original_length=16, factor=4.0, long_factors=(1.0, 2.0), long_attention_factor=1.5)},
            "rope.long_attention_factor cannot",
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused(tmp_path, changes, message):
    model = models.build(dataclasses.replace(TINY, **changes), nnx.Rngs(0))
    with pytest.raises(UserError, match=message) as error:
        pretrained.save(model, tmp_path / "out")
    assert "--to run" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_dtypes_that_are_none(folder, tmp_path):
    with pytest.raises(UserError, match="dtype is int8; it must be one of float32, bfloat16, float64"):
        pretrained.load(folder, dtype="int8")
    with pytest.raises(UserError, match="dtype is int8; it must be one of float32, bfloat16, float16"):
        pretrained.save(pretrained.load(folder), tmp_path / "out", dtype="int8")


def test_targets(folder, tmp_path):
    """An empty folder or a link to one is filled; folders of others, and what could not be written, are left alone."""
    model = pretrained.load(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    pretrained.save(model, tmp_path / "link")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    (tmp_path / "file").touch()
    (tmp_path / "mine.partial").mkdir()
    with pytest.raises(UserError, match="cannot be made"):
        pretrained.save(model, tmp_path / "file" / "out")
    pretrained.save(model, tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "empty", "link", "file", "mine", "mine.partial"}


def test_save_does_not_overwrite(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        pretrained.save(models.build(TINY, nnx.Rngs(1)), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_fixed_larger_base_is_written_as_such(tmp_path):
    """NTK by a static factor has no name in transformers, but is a larger base."""
    config = dataclasses.replace(TINY, rope=RopeConfig("ntk", factor=8.0))
    pretrained.save(models.build(config, nnx.Rngs(0)), tmp_path / "out")
    written = pretrained.read_config(tmp_path / "out").rope
    assert written == RopeConfig(base=written.base)
    np.testing.assert_allclose(written.base, 10000 * 8 ** (4 / (4 - 2)))


def test_the_sources_name_every_parameter_once():
    for family in FAMILIES:
        config = CONFIGS[family]
        assert obstacles(config, family) == []
        paths = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(models.abstract(config))))
        }
        assert sources(config, family).keys() == paths


def test_windows_as_the_families_say_them():
    base = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base |= {"intermediate_size": 8}
    window = lambda **fields: config_from_huggingface(base | fields).span
    assert window(model_type="mistral") == 4096
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="mistral", sliding_window=7, max_position_embeddings=8) == 7
    assert window(model_type="phi3", sliding_window=8, max_position_embeddings=8) is None
    assert window(model_type="llama", sliding_window=7) is None
    assert window(model_type="qwen2", use_sliding_window=True, max_window_layers=0) == 4096
    assert window(model_type="qwen3", use_sliding_window=True, sliding_window=None, max_window_layers=1) is None
    assert window(model_type="qwen2", sliding_window=7) is None
    assert window(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=0) == 7
    assert window(model_type="qwen3", sliding_window=7, use_sliding_window=True, max_window_layers=2) is None


def test_files_are_ordinary_safetensors(folder):
    with safe_open(next(folder.glob("model-00001*")), "numpy") as file:
        assert file.metadata() == {"format": "pt"}
