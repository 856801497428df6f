"""How tables and pictures write numbers."""

import math

QUESTION_TITLES = {
    "passkey_landmark": "Passkey as in LongRoPE",
    "passkey_beacon": "Passkey as in Activation Beacon",
    "needle": "Needle in a haystack",
    "magic_number": "Magic number in a book",
    "topics": "First topic of a conversation",
    "key_value": "Key-value retrieval",
    "documents": "Questions with documents",
    "babilong": "BABILong",
    "longbench": "LongBench",
    "infinitebench": "InfiniteBench",
    "recall": "Associative recall",
}


def length_label(tokens: int) -> str:
    """65536 -> "64k", 1048576 -> "1M" (powers of 1024); a length that is no whole multiple is written out."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def count_label(count: float) -> str:
    """1234567 -> "1.23M" (powers of 1000)."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T"))


def bytes_label(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while number >= base - 0.5 and power < len(units) - 1:
        number, power = number / base, power + 1
    return (f"{number:.3g}" if number < 999.5 else f"{number:.0f}") + units[power]


def perplexity(nll: float) -> float:
    """exp(nats per token), inf where that overflows: the nll of a run that diverged can be large."""
    return math.inf if nll > 700 else math.exp(nll)
