"""What scoring candidates of a search for rotary factors costs: all in one call, one call each, and compiled anew for each.

Measured on 2 CPU cores (jax 0.10.2) by --batch 5 --length 1024 --rounds 3 and --batch 1 --length 256 --dim 128 --rounds 5, medians of
interleaved rounds (of compilation a single one), candidates per second (a candidate's time beside one call's):

                                    D 256, 5 x 1,024 tokens   D 128, 1 x 256 tokens
    one call                        4.92 (1)                  324 (1)
    one call, four side by side     3.30 (1.49)               401 (0.81)
    a call each                     4.13 (1.19)               241 (1.35)
    compiled anew for each          0.87 (5.7)                1.74 (186)

So on a CPU side by side (--lanes) pays for short texts alone. What one call saves is the compilation.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from infinicontext import models
from infinicontext.bench import Candidate, Size, interleave, machine, table
from infinicontext.errors import UserError
from infinicontext.longrope.score import Documents, Scorer, document_loss
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.rope import RopeConfig
from infinicontext.sharding import MeshConfig, make_mesh

HEADS = 4
CANDIDATES = 8
ANEW = 2  # are compiled anew: each would take as long


def bench_longrope(size: Size) -> None:
    """A byte-level model of 3 layers that reads `--batch` documents of `--length` tokens by 8 lists of factors."""
    if size.dim % (2 * HEADS):
        raise UserError(f"--dim is {size.dim}; it must be a multiple of {2 * HEADS}, for {HEADS} heads")
    config = TransformerConfig(vocab_size=257, dim=size.dim, layers=3, heads=HEADS, remat=False)
    model = models.build(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    documents = Documents(rng.integers(0, 257, (size.batch, size.length + 1)).astype(np.int32), size.length)
    factors_NR = np.sort(1 + 7 * rng.random((CANDIDATES, config.head_size // 2)), axis=1)
    start_N = np.zeros(CANDIDATES, np.int32)
    scorer = functools.partial(Scorer, model, documents, RopeConfig(), 1.0, mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]))

    def one_by_one(score):
        return [score(factors_NR[i : i + 1], start_N[i : i + 1]) for i in range(CANDIDATES)]

    def whole(model, tokens_BS):
        state = model.init_state(len(tokens_BS), capacity=size.length)
        return document_loss(model, state, tokens_BS, size.length, segment=size.length)

    ropes = (
        RopeConfig("longrope", factor=2.0, original_length=2, long_factors=tuple(factors_R.tolist())) for factors_R in factors_NR[:ANEW]
    )
    fixed = [models.build(dataclasses.replace(config, rope=rope), nnx.Rngs(0)) for rope in ropes]

    def anew():
        for model in fixed:
            # A function that was never seen is compiled whatever it does.
            jax.jit(functools.partial(whole))(model, documents.tokens_BS).block_until_ready()

    forms = {
        "one call": Candidate(scorer(batch=CANDIDATES), factors_NR, start_N, compiled=False),
        "one call, four side by side": Candidate(scorer(batch=CANDIDATES, lanes=4), factors_NR, start_N, compiled=False),
        "a call each": Candidate(functools.partial(one_by_one, scorer(batch=1)), compiled=False),
    }
    interleave(forms, size.rounds)
    compiled = {"compiled anew for each": Candidate(anew, compiled=False)}
    interleave(compiled, 1)
    print(f"{machine()}\nD {size.dim}, {config.layers} layers, {HEADS} heads, {size.batch} documents")
    columns = {"candidates/s": lambda seconds, candidate: f"{(ANEW if candidate in compiled.values() else CANDIDATES) / seconds:.2f}"}
    table(f"{size.length:,} tokens, {CANDIDATES} candidates ({ANEW} in the last line)", forms | compiled, columns)
