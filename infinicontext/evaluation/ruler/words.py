"""Words to draw from: those of wonderwords 3.0.1, whose later and earlier lists differ, and keys made of two of them."""

import bisect
import functools
import itertools
import random
from collections.abc import Sequence
from importlib import metadata, resources

from infinicontext.errors import UserError

VERSION = "3.0.1"


@functools.cache
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Nouns, adjectives and verbs.

    Raises:
      UserError: the package is missing, or of another version, which would give other samples.
    """
    try:
        found = metadata.version("wonderwords")
    except metadata.PackageNotFoundError:
        raise UserError(f"RULER's words are in the package wonderwords {VERSION}; pip install wonderwords=={VERSION}") from None
    if found != VERSION:
        raise UserError(f"RULER's words are those of wonderwords {VERSION}, not {found}; pip install wonderwords=={VERSION}")
    read = lambda name: tuple(word.rstrip() for word in resources.files("wonderwords.assets").joinpath(name).read_text().splitlines())
    return read("nounlist.txt"), read("adjectivelist.txt"), read("verblist.txt")


class Pairs(Sequence):
    """All "adjective-noun" in sorted order, six million of them, none of which is made before it is asked for."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]):
        self.nouns = sorted(set(nouns))
        # Adjectives whose pairs mix with those of another: "blue-" begins "blue-eyed-".
        groups: list[list[str]] = []
        for adjective in sorted({f"{word}-" for word in adjectives}):
            if groups and adjective.startswith(groups[-1][0]):
                groups[-1].append(adjective)
            else:
                groups.append([adjective])
        self.groups = [sorted({a + n for a in group for n in self.nouns}) if len(group) > 1 else group[0] for group in groups]
        sizes = (len(self.nouns) if isinstance(group, str) else len(group) for group in self.groups)
        self.starts = list(itertools.accumulate(sizes, initial=0))

    def __len__(self) -> int:
        """How many there are."""
        return self.starts[-1]

    def __getitem__(self, i: int) -> str:
        """The pair with this number."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = bisect.bisect_right(self.starts, i) - 1
        group, i = self.groups[at], i - self.starts[at]
        return group + self.nouns[i] if isinstance(group, str) else group[i]


@functools.cache
def pairs() -> Pairs:
    """Those of the word lists."""
    nouns, adjectives, _ = word_lists()
    return Pairs(adjectives, nouns)


def shuffled(items: Sequence, seed: int) -> list:
    """In an order that depends on their number and the seed alone."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items
