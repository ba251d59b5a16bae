"""Intervals, thin over statsmodels and scipy."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint


def proportion_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    return proportion_confint(hits, n, alpha=1 - confidence, method="wilson")


def mean_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over the first axis (samples).

    Parameters
    ----------
    values : (n, ...) finite, n at least 2.
    confidence, resamples, seed : of the bootstrap.

    Returns
    -------
    low, high : arrays (...)
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"{len(values)} samples: an interval needs at least 2")
    result = bootstrap(
        (values,),
        np.mean,
        axis=0,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=50,
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high
