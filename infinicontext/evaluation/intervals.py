"""How sure a mean over samples is."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def mean_with_interval(scores: Sequence[float], share: float = 0.95) -> tuple[float, list[float]]:
    """The mean of scores from 0 to 1, with an interval: Wilson's where all are 0 or 1, else by bootstrap over samples."""
    # Here, because scipy.stats takes half a second to import.
    from scipy.stats import binomtest

    values = np.asarray(scores, np.float64)
    mean = float(values.mean())
    if np.isin(values, (0, 1)).all():
        interval = binomtest(int(values.sum()), len(values)).proportion_ci(share, method="wilson")
        return mean, [float(interval.low), float(interval.high)]
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return mean, np.quantile(values[drawn].mean(axis=1), [(1 - share) / 2, (1 + share) / 2]).tolist()
