"""What feedback memory costs: TransformerFAM by both schedules beside TransformerBSWA, which is the same without it.

Measured on 2 CPU cores (jax 0.10.2, float32), D 256, 2 layers, blocks of 256 and one before, FAM of 16, `loss` with its gradient, medians
of 7 interleaved rounds: 4 x 2,048 tokens BSWA 902 ms, FAM 959 (1.06), with a limit 960; 4 x 4,096 tokens 2,019, 2,053 (1.02) and 2,140
(1.06). In training, `training_rereads` comes on top.

Shape letters: B batch, T time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from infinicontext import models
from infinicontext.bench import Candidate, Size, interleave, machine, table
from infinicontext.errors import UserError
from infinicontext.models.fam import Fam
from infinicontext.models.fam_attention import FamConfig
from infinicontext.models.streaming import abstract_state_bytes
from infinicontext.objectives.next_token import token_losses

HEADS = 4


def bench_fam(size: Size, block: int = 256, fam_length: int = 16) -> None:
    """Models of 2 layers and 512 tokens, reading and in a training step without its optimizer, by length and batch.

    Training has documents, as it does on packed rows: one in each row here.
    """
    if size.dim % (2 * HEADS):
        raise UserError(f"--dim is {size.dim}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    fam = FamConfig(vocab_size=512, dim=size.dim, layers=2, heads=HEADS, block=block, memory_blocks=1, fam_length=fam_length)
    forms = {"BSWA": fam.bswa, "FAM": fam}
    forms |= {f"{name}, block by block": dataclasses.replace(config, schedule="blocks") for name, config in forms.items()}
    built = {name: models.build(config, nnx.Rngs(0)) for name, config in forms.items()}
    print(f"{machine()}\nD {size.dim}, {fam.layers} layers, {HEADS} heads, blocks of {block} and one before, FAM of {fam_length}")
    for name in ("BSWA", "FAM"):
        sizes = (f"{abstract_state_bytes(models.abstract(forms[name]), length):,} at {length:,} tokens" for length in (4096, 1 << 20))
        print(f"state of a row, bytes: {name} {', '.join(sizes)}")
    for B in (size.batch, 4 * size.batch):
        for T in sorted({max(size.length // 4, 1), size.length, 2 * size.length}):
            tokens_BT = jax.random.randint(jax.random.key(0), (B, T + 1), 0, fam.vocab_size)
            columns = {
                "tokens/s": lambda seconds, _, tokens=B * T: f"{tokens / seconds:,.0f}",
                "temp MiB": lambda _, candidate: f"{candidate.temp_bytes / 2**20:.0f}",
            }
            for title, function in (("reading", read), ("training", jax.value_and_grad(loss))):
                candidates = {name: Candidate(function, model, tokens_BT) for name, model in built.items()}
                interleave(candidates, size.rounds)
                table(f"{title}, {B} x {T:,} tokens", candidates, columns)


def read(model: Fam, tokens_BT: jax.Array) -> tuple[jax.Array, tuple]:
    """Hidden states of all tokens but the last, and the state after them."""
    return model.hidden(tokens_BT[:, :-1], model.init_state(*tokens_BT.shape))


def loss(model: Fam, tokens_BT: jax.Array) -> jax.Array:
    """The mean loss of the tokens, as training takes it."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    hidden_BTD, _ = model.hidden(inputs_BT, model.init_state(*tokens_BT.shape), jnp.ones_like(inputs_BT))
    return jnp.mean(token_losses(model, hidden_BTD, targets_BT))
