"""The search for rotary factors: the space and its operators against reference data, the evolution, the scores, and the command."""

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from infinicontext import models
from infinicontext.data.corpora import Corpus
from infinicontext.data.passkey import FILLER
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.longrope.factors import critical_pair, factors_below, known_factors, load_factors, magnitude, save_factors
from infinicontext.longrope.score import Documents, Scorer, needles, stretches
from infinicontext.longrope.search import Candidate, CriticalSpace, SearchConfig, Space, evolve
from infinicontext.models.transformer import TransformerConfig
from infinicontext.nn.rope import RopeConfig, rope_table, rotation
from infinicontext.sharding import MeshConfig, make_mesh
from infinicontext.training.run_folder import load_config

PLAIN = RopeConfig()
SMALL = SearchConfig(population=10, mutations=4, crossovers=4, parents=6, iterations=5)


class Golden:
    """The files of the reference search."""

    def __init__(self, folder):
        self.cases = json.loads((folder / "longrope" / "search.json").read_text())
        self.tensors = load_file(folder / "longrope" / "search.safetensors")


@pytest.mark.golden
def test_seeds(golden):
    data = Golden(golden)
    for case in data.cases["seeds"]:
        rope, head_dim = RopeConfig(base=case["base"]), 2 * case["d2"]
        space = Space(SearchConfig(grid=case["step"], largest=case["lambda_max"]), rope, head_dim, case["scale"], case["L0"])
        assert space.top == case["grid_top"]
        for name in ("pi", "ntk", "yarn", "yarn_linear"):
            yarn = {"beta_fast": case["beta_fast"], "beta_slow": case["beta_slow"]}
            factors_R = known_factors(name, rope, head_dim, case["scale"], case["L0"], **yarn)
            np.testing.assert_allclose(factors_R, data.tensors[f"{case['prefix']}.{name}"], rtol=1e-9)


@pytest.mark.golden
def test_which_candidates_are_in_the_space(golden):
    found = set()
    for case in Golden(golden).cases["validity"]:
        space = Space(SearchConfig(), PLAIN, 2 * len(case["lam"]), case["scale"], 4096)
        genes = tuple(round((factor - 1) / 0.01) for factor in case["lam"])
        assert space.holds(Candidate(genes, 0)) == case["valid"], case
        found.add(case["valid"])
    assert found == {True, False}


@pytest.mark.golden
def test_critical_pairs(golden):
    data = Golden(golden)
    for case in data.cases["critical_dim"]:
        assert critical_pair(case["d2"], case["base"], case["L_train"]) == case["tcd"]
        assert critical_pair(case["d2"], case["base"], case["L_train"], 10) == case["tcd_10_periods"]
    for case in data.cases["ntk_left"]:
        np.testing.assert_allclose(factors_below(case["rcd"], case["lambda_at_rcd"]), case["lam"], rtol=1e-12)


@pytest.mark.golden
def test_tables_with_start_tokens(golden, float64):
    """As a searched table and as a config's."""
    data = Golden(golden)
    for case in data.cases["rope_table"]:
        tensors = {name: data.tensors[f"{case['prefix']}.{name}"] for name in ("lam", "positions", "cos", "sin")}
        head_dim, positions_1P = 2 * case["d2"], jnp.asarray(tensors["positions"], jnp.int32)[None]
        plain = RopeConfig(base=case["base"])
        base_R, m, start = rope_table(plain, head_dim).inverse_frequency, case["attention_factor"], case["n_hat"]
        tried = stretches(base_R, tensors["lam"][None], np.array([start]), m)
        tried = jax.tree.map(lambda x: x[0], tried)
        config = RopeConfig(
            "longrope",
            base=case["base"],
            factor=2.0,
            original_length=2,
            long_factors=tuple(tensors["lam"].tolist()),
            attention_factor=m,
            start_tokens=start,
        )
        planned_1 = jnp.array([100], jnp.int32)
        for turned in (
            rotation(plain, head_dim, positions_1P, planned_1, jnp.float64, tried),
            rotation(config, head_dim, positions_1P, planned_1, jnp.float64),
        ):
            for half_1PR, name in zip(turned, ("cos", "sin")):
                # A searched table has the fractions of ticks in float32.
                np.testing.assert_allclose(half_1PR[0], tensors[name], atol=1e-9 if half_1PR is not turned[0] else 1e-8)
        short = rotation(config, head_dim, positions_1P, jnp.array([2], jnp.int32), jnp.float64)
        plainly = rotation(plain, head_dim, positions_1P, planned_1, jnp.float64)
        np.testing.assert_allclose(short[0], m * plainly[0], atol=1e-12)


def spaces(config=SMALL, scale=8.0):
    return [
        Space(config, PLAIN, 32, scale, 512),
        Space(dataclasses.replace(config, crossover="one_gene", seeds=("yarn_linear",)), PLAIN, 32, scale, 512),
        CriticalSpace(dataclasses.replace(config, algorithm="longrope2"), PLAIN, 32, scale, 512),
    ]


@pytest.mark.parametrize("space", spaces(), ids=["longrope", "released", "longrope2"])
def test_operators_stay_in_the_space(space):
    rng = np.random.default_rng(0)
    candidates = space.seeds(rng)
    mutants = [space.mutated(candidates[i % len(candidates)], rng) for i in range(200)]
    assert all(space.holds(candidate) for candidate in candidates + mutants)
    assert len(set(mutants)) > 100
    children = [space.crossed(*(mutants[i] for i in rng.choice(200, 2)), rng) for _ in range(200)]
    assert any(map(space.holds, children))
    for candidate in filter(space.holds, candidates + mutants + children):
        factors_R = space.factors(candidate)
        assert factors_R[0] >= 1
        assert factors_R[-1] <= space.largest + 1e-9
        if isinstance(space, CriticalSpace):
            critical = space.choices[candidate.choice]
            assert np.all(factors_R[critical:] >= 8 - 1e-9)
            np.testing.assert_allclose(factors_R[:critical], factors_below(critical, factors_R[critical]), atol=0.0051)
            assert space.start_tokens(candidate) == 0
    assert len({candidate.choice for candidate in mutants}) > 3


def distance(target_R):
    """A fitness with a known best, and how often it was asked."""
    calls = []

    def score(factors_NR, start_tokens_N):
        calls.append(len(factors_NR))
        return np.mean((np.log(factors_NR) - np.log(target_R)) ** 2, axis=1) + 0.01 * (start_tokens_N != 4)

    return score, calls


def test_evolution_finds_what_it_is_to_find():
    target_R = 1 + 7.5 / (1 + np.exp(-(np.arange(16) - 8) / 2.0))
    space = Space(SearchConfig(), PLAIN, 32, 8.0, 512)
    score, calls = distance(target_R)
    progress = evolve(space, score)
    losses = [entry["loss"] for entry in progress.history]
    seeds = [known_factors(name, PLAIN, 32, 8.0, 512) for name in ("pi", "ntk", "yarn")]
    assert losses[-1] < 0.2 * score(np.stack(seeds), np.zeros(3)).min()
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert calls[0] == 64
    assert max(calls[1:-1]) <= 32
    assert len(calls) == 42
    assert space.start_tokens(progress.ranked[0][1]) == 4
    assert len(progress.seen) == sum(calls[:-1]) == progress.history[-1]["scored"]


def test_losses_that_are_no_numbers_never_win():
    space = Space(SMALL, PLAIN, 8, 4.0, 512)
    score = lambda factors_NR, start_tokens_N: np.where(factors_NR[:, 0] > 1.2, np.nan, factors_NR.sum(axis=1))
    best = evolve(space, score).ranked[0]
    assert np.isfinite(best[0])
    assert np.isinf(evolve(space, lambda factors_NR, _: np.full(len(factors_NR), np.nan)).ranked[0][0])


@pytest.mark.parametrize("space", spaces(), ids=["longrope", "released", "longrope2"])
def test_an_interrupted_search_goes_on_exactly(space, tmp_path):
    score, _ = distance(np.linspace(1, 9, 16))
    whole = evolve(space, score)

    class Killed(Exception):
        pass

    def dies(progress):
        if progress.iteration == 2:
            raise Killed

    def dies_while_scoring(factors_NR, start_tokens_N):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return score(factors_NR, start_tokens_N)

    file, about, calls = tmp_path / "search.json", {"model": "a", "length": 8}, []
    with pytest.raises(Killed):
        evolve(space, score, file=file, about=about, say=dies)
    with pytest.raises(Killed):
        evolve(space, dies_while_scoring, file=file, about=about)
    again = evolve(space, score, file=file, about=about)
    assert (again.ranked, again.history, again.seen) == (whole.ranked, whole.history, whole.seen)
    # A finished one is read, not done again.
    assert evolve(space, None, file=file, about=about).ranked == whole.ranked
    with pytest.raises(UserError, match="another search, with length 8, not 16"):
        evolve(space, score, file=file, about=about | {"length": 16})
    record = json.loads(file.read_text())
    for broken in ("{", json.dumps(record | {"ranked": []}), json.dumps(record | {"about": []})):
        file.write_text(broken)
        with pytest.raises(UserError, match="cannot be read; remove it"):
            evolve(space, score, file=file, about=about)


MODEL = TransformerConfig(vocab_size=17, dim=16, layers=2, heads=2, kv_heads=1, feed_forward=24, remat=False)


def scorer(mesh, **options):
    model = models.build(MODEL, nnx.Rngs(0))
    tokens_BS = np.random.default_rng(0).integers(0, 17, (2, 25), np.int32)
    return Scorer(model, Documents(tokens_BS, options.pop("scored", 24)), PLAIN, 1.1, mesh=mesh, **options)


@pytest.mark.parametrize("scored", [24, 5])
def test_scores_equal_those_of_models_with_these_factors(scored):
    """All in one call, on eight devices and on one, as one by one by models whose configs have the factors; compiled once."""
    rng = np.random.default_rng(1)
    factors_NR = np.sort(1 + 7 * rng.random((11, 4)), axis=1)
    start_tokens_N = rng.choice([0, 3], 11).astype(np.int32)
    one = scorer(make_mesh(MeshConfig(data=1), jax.devices()[:1]), batch=4, lanes=2, together=1, segment=7, scored=scored)
    many = scorer(make_mesh(MeshConfig(data=8)), batch=4, scored=scored)
    assert many.batch == 8
    found = [each(factors_NR, start_tokens_N) for each in (one, many)]
    assert one.losses._cache_size() == many.losses._cache_size() == 1
    expected = []
    for factors_R, start in zip(factors_NR, start_tokens_N):
        rope = RopeConfig(
            "longrope",
            factor=2.0,
            original_length=12,
            long_factors=tuple(factors_R.tolist()),
            attention_factor=1.1,
            start_tokens=int(start),
        )
        model = models.build(dataclasses.replace(MODEL, rope=rope), nnx.Rngs(0))
        tokens_BS = one.documents.tokens_BS
        logits_BLV, _ = model(tokens_BS[:, :-1], model.init_state(2, capacity=24))
        losses_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), tokens_BS[:, 1:, None], axis=2)[..., 0]
        expected.append(float(jnp.mean(losses_BL[:, -scored:])))
    assert np.ptp(expected) > 1e-3
    for losses_N in found:
        np.testing.assert_allclose(losses_N, expected, rtol=1e-6, atol=1e-6)


def test_a_search_compiles_once():
    """The population, mutants and crosses of all iterations, whole calls and the rest of one."""
    score = scorer(make_mesh(MeshConfig(data=1), jax.devices()[:1]), batch=4)
    progress = evolve(Space(SMALL, PLAIN, MODEL.head_size, 8.0, 512), score)
    assert progress.history[-1]["scored"] > 4 * SMALL.iterations
    assert score.losses._cache_size() == 1


@pytest.mark.parametrize("name", ["bytes", "passkey"])
def test_needles(name):
    """A number in the first tenth of each document, which is asked for at the end; its digits alone are scored."""
    tokenizer, size = load_tokenizer(name), 400
    documents = [tokenizer.encode(FILLER * 40)[: size + 10] for _ in range(6)]
    starts = np.cumsum([0, *map(len, documents)])
    corpus = Corpus(np.concatenate(documents), starts, tuple("abcdef"), np.diff(starts))
    found = needles(corpus, tokenizer, size, 4, seed=1)
    assert found.tokens_BS.shape == (4, size + 1)
    keys = set()
    for tokens_S in found.tokens_BS:
        # The tokenizer of words knows no capitals.
        text, answer = (tokenizer.decode(part).replace(" ", "").lower() for part in (tokens_S, tokens_S[-found.scored :]))
        key = re.search(r"passkeyis(\d+)\.remember", text)
        assert key.start() < 0.15 * len(text)
        assert answer == key[1] == text[-7:]
        keys.add(key[1])
    assert len(keys) == 4
    with pytest.raises(UserError, match="--target-length is 20; a text with a needle must have"):
        needles(corpus, tokenizer, 20, 4, seed=1)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_official_configs_are_files_of_factors(golden, case):
    """In any of transformers' spellings."""
    (path,) = (golden / "longrope").glob(f"{case}_longrope.config.json")
    record = json.loads(path.read_text())
    head_dim = record.get("head_dim") or record["hidden_size"] // record["num_attention_heads"]
    assert load_factors(path, head_dim).scheme == "longrope"


def test_files_of_factors(tmp_path):
    rope = RopeConfig(
        "longrope",
        factor=4.0,
        original_length=512,
        length=2048,
        long_factors=(1.0, 1.5, 4.2),
        attention_factor=magnitude("su", 4, 512),
        start_tokens=16,
    )
    path = tmp_path / "factors.json"
    save_factors(path, rope, {"loss": 1.5})
    assert load_factors(path, 6) == rope
    assert json.loads(path.read_text())["found"] == {"loss": 1.5}
    with pytest.raises(UserError, match=r"factors\.json: rope\.long_factors has 3 entries; 8 of 8 head dims rotate, so it must have 4"):
        load_factors(path, 8)
    for factors, message in (
        ((1.0, 0.9, 2.0), "long_factor 1 is 0.9; it must be 1 or more"),
        ((1.0, 3.0, 2.0), "long_factor 2 is 2.0; it must be at least 3.0"),
    ):
        save_factors(path, dataclasses.replace(rope, long_factors=factors), {})
        with pytest.raises(UserError, match=message):
            load_factors(path, 6)
    for text in ("", "[1, 2]", '{"rope_scaling": {"rope_type": "linear", "factor": 2}}', '{"rope_scaling": {"rope_type": "longrope"}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"factors\.json"):
            load_factors(path, 6)
    with pytest.raises(UserError, match="does not exist"):
        load_factors(tmp_path / "none.json", 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "best"}, "search.algorithm is best; it must be one of longrope, longrope2"),
        ({"fitness": "key"}, "search.fitness is key; it must be one of by_algorithm, text, needle"),
        ({"population": 0}, "search.population is 0; it must be 1 or more"),
        ({"iterations": -1}, "search.iterations is -1"),
        ({"probability": 0.0}, "search.probability is 0.0"),
        ({"grid": 0.0}, "search.grid is 0.0"),
        ({"largest": 0.5}, "search.largest is 0.5"),
        ({"seed": -1}, "search.seed is -1"),
        ({"start_tokens": ()}, "search.start_tokens is"),
        ({"seeds": ()}, "search.seeds is empty"),
        ({"seeds": ("pi", "alibi")}, "search.seeds has alibi; it must be of pi, ntk, yarn, yarn_linear"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SearchConfig(**changes)


def test_a_search_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"search\.largest is 4; for longrope2 it must be the stretch, 8, or more"):
        CriticalSpace(SearchConfig(algorithm="longrope2", largest=4), PLAIN, 32, 8.0, 512)
    chex.assert_trees_all_equal(magnitude("none", 8, 512), 1.0)


EXPERIMENTS = """
from infinicontext.data.pipeline import CorpusData
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig

def tiny():
    model = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, remat=False)
    return Experiment("tiny", model, CorpusData("texts.jsonl", length=16, validation_fraction=0.5), steps=2, batch_size=8)
"""


@pytest.fixture
def trained(tmp_path, monkeypatch, command_line):
    """A folder, the current one, with a trained model in run/ and what it was made of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    texts = [f"{number} times {number} is {number**2}. " * 16 for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command_line[0]("train experiments.py:tiny --workdir run")


@pytest.mark.usefixtures("trained")
def test_commands(tmp_path, command_line):
    """A trained model's factors are searched, the search goes on, the model gets them, learns on, is read for short texts, and mistakes."""
    run, fails = command_line
    search = "search-rope run --target-length 64 --documents 2 --population 6 --mutations 2 --crossovers 2 --parents 4"
    run(f"{search} --iterations 1 --output factors.json --batch 8")
    rope = load_factors(tmp_path / "factors.json", 8)
    assert (rope.original_length, rope.length, rope.factor) == (16, 64, 4)
    found = json.loads((tmp_path / "factors.json").read_text())["found"]
    assert found["loss"] <= min(found["losses_of_known_factors"].values()) + 1e-6
    assert (tmp_path / "factors.png").stat().st_size > 10_000
    fails(f"{search} --iterations 2 --output factors.json --batch 8", "another search", "search")
    run(f"{search} --iterations 0 --output half.json --batch 8 --dtype bfloat16")
    half = json.loads((tmp_path / "half.json").read_text())["found"]["losses_of_known_factors"]["pi"]
    assert half != found["losses_of_known_factors"]["pi"] == pytest.approx(half, rel=0.02)
    run(f"{search} --iterations 0 --target-length 160 --output two.json --algorithm longrope2 --data texts.jsonl --batch 8")
    assert load_factors(tmp_path / "two.json", 8).start_tokens == 0

    run("convert run longer --to run --factors factors.json")
    assert load_config(tmp_path / "longer").model.rope == rope
    run(f"{search} --iterations 0 --target-length 128 --output far.json --batch 8".replace("rope run", "rope longer"))
    assert load_factors(tmp_path / "far.json", 8).factor == 8
    run("search-rope longer --target-length 16 --short --documents 2 --population 4 --iterations 0 --output short.json --batch 8")
    short = load_factors(tmp_path / "short.json", 8)
    assert short.long_factors == rope.long_factors
    assert max(short.short_factors) <= 4
    assert "long" in json.loads((tmp_path / "short.json").read_text())["found"]["losses_of_known_factors"]
    fails("search-rope longer --target-length 64 --original-length 8 --output a.json", "--original-length is 8", "factors say 16")
    fails(f"{search} --together 3 --output a.json", "--together is 3; it must divide --documents, 2")
    if rope.start_tokens:
        fails("convert longer out --to huggingface", "start_tokens")
    for name, options in (("plain", "--start-tokens 0"), ("second", "--algorithm longrope2 --magnitude none --data texts.jsonl")):
        run(f"{search} --iterations 0 --target-length 160 --output {name}.json --batch 8 {options}")
        run(f"convert run {name} --to run --factors {name}.json")
        run(f"convert {name} {name}_there --to huggingface")
        assert (
            load_factors(tmp_path / f"{name}_there" / "config.json", 8).long_factors
            == load_factors(tmp_path / f"{name}.json", 8).long_factors
        )

    run("train experiments.py:tiny --workdir window --model.attention window --model.window 16")
    fails("search-rope window --target-length 64 --output a.json", "window sees 16 tokens back", "the original length, 16")
    fails("search-rope", "the model is missing")
    fails("search-rope run --output a.json", "--target-length is missing")
    fails("search-rope run --target-length 64", "--output is missing")
    fails("search-rope run --target-length 8 --output a.json", "--target-length is 8", "the original length, 16")
    fails("search-rope run --target-length 64 --output none/a.json", "--output none/a.json", "no folder")
    fails("search-rope run --target-length 64 --output a.png", "--output is a.png", ".json")
    fails("search-rope run --target-length 64 --output a.json --original-length 1", "--original-length is 1")
    record = json.loads((tmp_path / "factors.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(record | {"rope_theta": 5e5}))
    fails("convert run other --to run --factors other.json", "other.json", "rope_theta 500000", "the model has 10000")
    fails("search-rope run --target-length 4k --output a.json", "--data has 0 documents of 4097 tokens or more", "5 (--documents)")
    fails("search-rope run --target-length 4k --output a.json --algorithm longrope2", "10 (--documents)")
    fails("search-rope run --target-length 16 --short --output a.json", "--short is for a model with longrope")
    fails("search-rope longer --target-length 64 --output a.json", "reads 64 tokens already")
    fails("search-rope run --target-length 64 --output a.json --iteration 2", "--iteration")
    fails("search-rope run --target-length 64 --output a.json --lanes 0", "--lanes is 0")
    fails("convert run far --to huggingface --factors factors.json", "--factors")


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_killed_and_resumed(tmp_path, command_line):
    """kill -9 of a real process: the search goes on and ends as an unbroken one."""
    run, _ = command_line
    search = "search-rope run --target-length 64 --documents 2 --population 6 --parents 4 --iterations 60 --batch 8 --output"
    run(f"{search} whole.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "infinicontext.cli", *f"{search} killed.json".split()], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("iteration 5/"):
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 5 <= json.loads((tmp_path / "killed.search.json").read_text())["iteration"] < 60
    run(f"{search} killed.json")
    for kind in (".json", ".search.json"):
        assert (tmp_path / f"killed{kind}").read_text() == (tmp_path / f"whole{kind}").read_text()
