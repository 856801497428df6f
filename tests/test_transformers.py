"""Against transformers itself, where it is installed (extra `hf`, with torch for CPU): the same logits in both directions."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from test_pretrained import CONFIGS

from infinicontext import models, pretrained
from infinicontext.inference.generate import Generation, generate
from infinicontext.training.weights import stop_ids

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 16}
THEIRS = {
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3": (
        "Llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral_window": ("Mistral", {"sliding_window": 6, "head_dim": 12}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen3_biases": ("Qwen3", {"attention_bias": True, "head_dim": 12}),
    "phi3_long": (
        "Phi3",
        {
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
        },
    ),
}


def their_logits(model, tokens_BT):
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def our_logits(model, tokens_BT):
    return jax.jit(lambda model, tokens_BT: model(tokens_BT, model.init_state(*tokens_BT.shape))[0])(model, tokens_BT)


@pytest.mark.parametrize("name", THEIRS)
def test_their_model_here(name, tmp_path):
    family, fields = THEIRS[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, **fields)).eval()
    with torch.no_grad():  # biases and scales begin as constants
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = pretrained.load(tmp_path / "theirs")
    # From 1: where a prompt holds their pad token, 0, their generate() hides it from attention.
    tokens_BT = np.random.default_rng(0).integers(1, 40, (2, 30), dtype=np.int32)
    np.testing.assert_allclose(our_logits(ours, tokens_BT), their_logits(theirs, tokens_BT), atol=1e-4, rtol=1e-5)

    new = generate(ours, tokens_BT[:1], Generation(max_new_tokens=12, rope_policy="hf"))[0].tokens
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(tokens_BT[:1], dtype=torch.long), max_new_tokens=12, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(new, expected[0, 30:])


@pytest.mark.parametrize("family", CONFIGS)
def test_our_model_there(family, tmp_path):
    ours = models.build(CONFIGS[family], nnx.Rngs(0))
    ours = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, ours)
    pretrained.save(ours, tmp_path / "ours", length=64, shard_bytes=4000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens_BT = np.random.default_rng(1).integers(0, 17, (2, 30), dtype=np.int32)
    np.testing.assert_allclose(their_logits(theirs, tokens_BT), our_logits(ours, tokens_BT), atol=1e-4, rtol=1e-5)


def test_what_is_kept_beside_the_weights(tmp_path):
    config = transformers.LlamaConfig(**SIZES, bos_token_id=3, eos_token_id=[4, 5])
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    pretrained.save(pretrained.load(tmp_path / "theirs"), tmp_path / "ours", like=tmp_path / "theirs")
    assert stop_ids(tmp_path / "ours") == (4, 5)
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    assert (kept.bos_token_id, kept.eos_token_id) == (3, [4, 5])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["bos_token_id"] == 3
