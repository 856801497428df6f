"""The search for factors: an evolution whose individuals are lists of factors and whose fitness is a loss at the target length (LongRoPE,
section 3.2; LongRoPE2, section 3.3).

Shape letters: N candidates, R rotated pairs.

The operators run on the host and count a factor in grid steps above 1, so that it is exact whether a candidate was seen before. What costs
time, scoring, is one call for all candidates of an iteration (longrope/score.py).
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np

from infinicontext.errors import UserError
from infinicontext.files import write_json
from infinicontext.longrope.factors import Known, Magnitude, check_names, critical_pair, factors_below, known_factors
from infinicontext.nn.rope import RopeConfig, rope_table

DRAWS = 200  # of a new candidate, before its place stays empty

# factors_NR float64, start_tokens_N int32 -> a loss for each
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The space, and how it is searched: as in the papers, for targets up to 512K tokens.

    LongRoPE's released code: seeds ("yarn_linear",), start_tokens (0,), largest 1 + s, crossover one_gene.
    """

    algorithm: Literal["longrope", "longrope2"] = "longrope"  # longrope2: pairs from a critical one on, NTK before it, no start tokens
    # Loss of all tokens, or of a number that is asked for; by_algorithm: longrope's is text, longrope2's needle.
    fitness: Literal["by_algorithm", "text", "needle"] = "by_algorithm"
    population: int = 64  # at the beginning
    mutations: int = 16  # per iteration
    crossovers: int = 16
    parents: int = 32  # the best that are kept
    iterations: int = 40
    probability: float = 0.3  # with which a factor changes in a mutation
    tries: int = 20  # of a crossover; then the better parent is mutated
    grid: float = 0.01  # between factors
    largest: float | None = None  # factor; None: 1.25 times the stretch, for longrope2 twice
    start_tokens: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)  # longrope
    seeds: tuple[Known, ...] = ("pi", "ntk", "yarn")  # longrope: what the population grows from
    beta_fast: float = 32.0  # YaRN's as a seed
    beta_slow: float = 1.0
    crossover: Literal["uniform", "one_gene"] = "uniform"  # one_gene: the first of the other parent's factors that gives a new candidate
    magnitude: Magnitude = "su"
    seed: int = 0

    def __post_init__(self):
        for name in ("algorithm", "fitness", "crossover", "magnitude"):
            allowed = get_args(get_type_hints(SearchConfig)[name])
            if getattr(self, name) not in allowed:
                raise UserError(f"search.{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        for name in ("population", "parents", "tries"):
            if getattr(self, name) < 1:
                raise UserError(f"search.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("mutations", "crossovers", "iterations"):
            if getattr(self, name) < 0:
                raise UserError(f"search.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.probability <= 1:
            raise UserError(f"search.probability is {self.probability}; it must be above 0 and at most 1")
        if not 0 < self.grid < math.inf:
            raise UserError(f"search.grid is {self.grid}; it must be a number greater than 0")
        if self.largest is not None and not 1 <= self.largest < math.inf:
            raise UserError(f"search.largest is {self.largest}; it must be a number of 1 or more")
        if self.seed < 0:
            raise UserError(f"search.seed is {self.seed}; it must be 0 or more")
        if not self.start_tokens or min(self.start_tokens) < 0:
            raise UserError(f"search.start_tokens is {self.start_tokens}; it must be one number or more, none below 0")
        if not self.seeds:
            raise UserError("search.seeds is empty; it must name one scheme or more")
        check_names(self.seeds)


class Candidate(NamedTuple):
    """One list of factors."""

    genes: tuple[int, ...]  # for each pair: grid steps above 1
    choice: int  # which of the space's start tokens, or of its critical pairs


class Space:
    """Factors from 1 to `largest` that do not fall from pair to pair, and how many tokens at the start they leave alone."""

    def __init__(self, config: SearchConfig, rope: RopeConfig, head_dim: int, scale: float, original_length: int, done: float = 1.0):
        """
        Args:
          config: the space and its operators.
          rope: base and share of the frequencies; with factors (`longrope`) those that a stretch of `done` times has found already.
          head_dim: size of a head.
          scale: s, length / original_length.
          original_length: tokens the model was trained on at first.
          done: of `scale`, what the model is used to.
        """
        self.config, self.scale = config, scale
        plain = RopeConfig(base=rope.base, partial=rope.partial)
        self.pairs = len(rope_table(plain, head_dim).inverse_frequency)
        self.largest = config.largest or (1.25 if config.algorithm == "longrope" else 2) * scale
        # A hair, for 1.25 * 8 may come out below 10.
        self.top = int((self.largest - 1) / config.grid + 1e-9)
        self.choices: tuple[int, ...] = config.start_tokens
        found = np.array(rope.long_factors or (1.0,) * self.pairs)
        known = {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow}
        self._seeds = [found * known_factors(name, plain, head_dim, scale / done, original_length, **known) for name in config.seeds]

    def seeds(self, rng: np.random.Generator) -> list[Candidate]:
        """What the population grows from."""
        return [Candidate(self.nearest(factors_R), 0) for factors_R in self._seeds]

    def nearest(self, factors_R: np.ndarray) -> tuple[int, ...]:
        """The genes nearest to factors, in the space."""
        genes_R = np.clip(np.rint((factors_R - 1) / self.config.grid), 0, self.top).astype(int)
        return tuple(np.maximum.accumulate(genes_R).tolist())

    def factors(self, candidate: Candidate) -> np.ndarray:
        """float64 [R]."""
        return 1 + self.config.grid * np.array(candidate.genes, np.float64)

    def start_tokens(self, candidate: Candidate) -> int:
        """First positions that the factors leave alone."""
        return self.choices[candidate.choice]

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate is in the space."""
        genes = candidate.genes
        return genes[0] >= 0 and genes[-1] <= self.top and all(a <= b for a, b in itertools.pairwise(genes))

    def mutated(self, candidate: Candidate, rng: np.random.Generator, first: int = 0, lowest: int = 0) -> Candidate:
        """Genes from pair `first` on are drawn anew with a probability, each between its neighbours and not below `lowest`."""
        genes, choice = list(candidate.genes), candidate.choice
        for pair in range(first, self.pairs):
            if rng.random() < self.config.probability:
                low = genes[pair - 1] if pair > first else lowest
                high = genes[pair + 1] if pair + 1 < self.pairs else self.top
                genes[pair] = int(rng.integers(low, high + 1))
        if len(self.choices) > 1 and rng.random() < self.config.probability:
            choice = int(rng.integers(len(self.choices)))
        return Candidate(tuple(genes), choice)

    def crossed(self, one: Candidate, other: Candidate, rng: np.random.Generator) -> Candidate:
        """A child that has each factor of either parent, or one of the other's; it may be out of the space."""
        if self.config.crossover == "one_gene":
            take = np.arange(self.pairs) == rng.integers(self.pairs)
            return Candidate(tuple(np.where(take, other.genes, one.genes).tolist()), one.choice)
        take = rng.random(self.pairs) < 0.5
        return Candidate(tuple(np.where(take, other.genes, one.genes).tolist()), other.choice if rng.random() < 0.5 else one.choice)


class CriticalSpace(Space):
    """LongRoPE2's: from a critical pair on factors from s to `largest` that do not fall, and NTK's before it; no start tokens."""

    def __init__(self, config: SearchConfig, rope: RopeConfig, head_dim: int, scale: float, original_length: int, done: float = 1.0):
        super().__init__(config, rope, head_dim, scale, original_length, done)
        first, last = (critical_pair(self.pairs, rope.base, original_length, periods) for periods in (10, 1))
        first, last = (min(max(pair, 0), self.pairs - 1) for pair in (first, last))
        self.choices = tuple(range(first, last + 1))
        self.floor = int(np.ceil((scale - 1) / config.grid - 1e-9))
        if self.floor > self.top:
            raise UserError(f"search.largest is {config.largest}; for longrope2 it must be the stretch, {scale:g}, or more")

    def seeds(self, rng: np.random.Generator) -> list[Candidate]:
        """For each critical pair one factor, drawn anew, for all pairs from it on."""
        drawn = [rng.integers(self.floor, self.top + 1) for _ in self.choices]
        return [self._completed([int(gene)] * self.pairs, choice) for choice, gene in enumerate(drawn)]

    def start_tokens(self, candidate: Candidate) -> int:
        """None."""
        return 0

    def mutated(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Factors from the critical pair on, and which pair that is."""
        mutant = super().mutated(candidate, rng, self.choices[candidate.choice], self.floor)
        return self._completed(list(mutant.genes), mutant.choice)

    def crossed(self, one: Candidate, other: Candidate, rng: np.random.Generator) -> Candidate:
        """A child with the critical pair of either parent."""
        child = super().crossed(one, other, rng)
        return self._completed(list(child.genes), child.choice)

    def _completed(self, genes: list[int], choice: int) -> Candidate:
        """With what stands before the critical pair, and nothing behind it below s or the one before."""
        critical = self.choices[choice]
        above = np.maximum.accumulate(np.clip(genes[critical:], self.floor, self.top)).tolist()
        below = np.rint((factors_below(critical, 1 + self.config.grid * above[0]) - 1) / self.config.grid).astype(int)
        return Candidate((*below.tolist(), *above), choice)


@dataclasses.dataclass
class Progress:
    """Where a search stands, between two iterations."""

    iteration: int
    ranked: list[tuple[float, Candidate]]  # the best so far, the best first
    seen: set[Candidate]
    rng: np.random.Generator
    history: list[dict]  # for each iteration: best loss, candidates scored so far

    def save(self, path: pathlib.Path, about: dict) -> None:
        """Writes all of it, with what it is a search of."""
        record = {
            "about": about,
            "iteration": self.iteration,
            "ranked": self.ranked,
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
            "history": self.history,
        }
        write_json(path, record)

    @staticmethod
    def load(path: pathlib.Path, about: dict) -> "Progress":
        """What `save` has written.

        Raises:
          UserError: the file cannot be read, or is of another search.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            candidate = lambda item: Candidate(tuple(item[0]), item[1])
            rng = np.random.default_rng()
            rng.bit_generator.state = record["rng"]
            ranked = [(loss, candidate(item)) for loss, item in record["ranked"]]
            progress = Progress(record["iteration"], ranked, {candidate(item) for item in record["seen"]}, rng, record["history"])
            before = record["about"]
            if not ranked or not isinstance(before, dict):
                raise ValueError("no candidates, or no search")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: the search it holds cannot be read; remove it to begin anew") from error
        about = json.loads(json.dumps(about))
        if changed := [name for name in about | before if about.get(name) != before.get(name)]:
            name = changed[0]
            raise UserError(f"{path} holds another search, with {name} {before.get(name)}, not {about.get(name)}; remove it to begin anew")
        return progress


def evolve(
    space: Space,
    score: Score,
    *,
    file: pathlib.Path | None = None,
    about: dict | None = None,
    say: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Searches, or goes on where the file says that a search was interrupted: the result is that of an unbroken one.

    Args:
      space: of candidates; its config has the sizes.
      score: losses of candidates, the smaller the better; what is not finite never wins.
      file: keeps the progress after each iteration; None: nothing.
      about: what the search is of, kept in the file; a file with another is refused.
      say: told after each iteration.
    """
    if file is not None and file.exists():
        progress = Progress.load(file, about or {})
    else:
        progress = Progress(-1, [], set(), np.random.default_rng(space.config.seed), [])
    while progress.iteration < space.config.iterations:
        candidates = _first(space, progress) if progress.iteration < 0 else _next(space, progress)
        scored = []
        if candidates:
            factors_NR = np.stack([space.factors(candidate) for candidate in candidates])
            start_tokens_N = np.array([space.start_tokens(candidate) for candidate in candidates], np.int32)
            losses_N = np.asarray(score(factors_NR, start_tokens_N), float)
            scored = [(float(loss) if np.isfinite(loss) else np.inf, candidate) for loss, candidate in zip(losses_N, candidates)]
        # Of equal losses the smaller factors win.
        progress.ranked = sorted(progress.ranked + scored, key=lambda item: (item[0], sum(item[1].genes)))[: space.config.parents]
        before = progress.history[-1]["scored"] if progress.history else 0
        progress.iteration += 1
        progress.history.append({"iteration": progress.iteration, "loss": progress.ranked[0][0], "scored": before + len(candidates)})
        if file is not None:
            progress.save(file, about or {})
        say(progress)
    return progress


def _first(space: Space, progress: Progress) -> list[Candidate]:
    """The population that a search begins with: seeds and mutants of them."""
    rng = progress.rng
    seeds = list(dict.fromkeys(space.seeds(rng)))
    progress.seen.update(seeds)
    mutants = [_new(space, progress, lambda: space.mutated(_one_of(seeds, rng), rng)) for _ in range(space.config.population - len(seeds))]
    return seeds + [mutant for mutant in mutants if mutant]


def _next(space: Space, progress: Progress) -> list[Candidate]:
    """Mutants of parents, and children of pairs of them."""
    config, rng, parents = space.config, progress.rng, [candidate for _, candidate in progress.ranked]
    candidates = [_new(space, progress, lambda: space.mutated(_one_of(parents, rng), rng)) for _ in range(config.mutations)]
    for _ in range(config.crossovers if len(parents) > 1 else 0):
        pair = rng.choice(len(parents), 2, replace=False).tolist()
        one, other = (parents[i] for i in pair)
        child = _new(space, progress, functools.partial(space.crossed, one, other, rng), config.tries)
        candidates.append(child or _new(space, progress, functools.partial(space.mutated, parents[min(pair)], rng)))
    return [candidate for candidate in candidates if candidate]


def _new(space: Space, progress: Progress, make: Callable[[], Candidate], draws: int = DRAWS) -> Candidate | None:
    """The first of some candidates that is in the space and was never seen."""
    for _ in range(draws):
        candidate = make()
        if candidate not in progress.seen and space.holds(candidate):
            progress.seen.add(candidate)
            return candidate
    return None


def _one_of(candidates: list[Candidate], rng: np.random.Generator) -> Candidate:
    return candidates[int(rng.integers(len(candidates)))]
