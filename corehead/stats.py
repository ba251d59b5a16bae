"""Intervals, tests and effect sizes, thin over scipy and statsmodels.

Samples on one context are not independent, so that what takes `groups` treats a group as the unit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW


def proportion_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    return proportion_confint(hits, n, alpha=1 - confidence, method="wilson")


def checked_samples(values, groups=None, name: str = "values") -> tuple[np.ndarray, np.ndarray]:
    """Values (n, ...) as float, and the number of each sample's group, (n,) int; without groups each is its own.

    Raises
    ------
    ValueError : fewer than 2 samples or groups, values that are not finite, not one label a sample.
    """
    values = np.atleast_1d(np.asarray(values, float))
    n = len(values)
    if n < 2:
        raise ValueError(f"{name}: too few samples ({n}), take at least 2")
    bad = int((~np.isfinite(values)).reshape(n, -1).any(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {n} samples have NaN or Inf, drop these samples first")
    if groups is None:
        return values, np.arange(n)
    labels = np.asarray(groups)
    if labels.shape != (n,) or pd.isna(labels).any():
        raise ValueError(f"groups of {name}: give one label a sample ({n} of them, none missing)")
    codes, found = pd.factorize(labels)
    if len(found) < 2:
        raise ValueError(f"groups of {name}: all {n} samples are in one group, take at least 2 groups")
    return values, codes


def bootstrap_means(
    values: np.ndarray, codes: np.ndarray, resamples: int, seed: int, size: int | None = None
) -> np.ndarray:
    """Means of resamples: groups are drawn with replacement, and a mean is the sum over the number of their samples.

    Parameters
    ----------
    values, codes : (n, ...) and (n,), from `checked_samples`.
    resamples, seed : of the bootstrap.
    size : groups a resample; None takes as many as there are.

    Returns
    -------
    (resamples, ...), one matrix product of how often each group was drawn
    """
    sizes = np.bincount(codes)
    n = len(sizes)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n if size is None else size))
    drawn += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    sums = np.zeros((n, *values.shape[1:]))
    np.add.at(sums, codes, values)
    means = counts @ sums.reshape(n, -1) / (counts @ sizes)[:, None]
    return means.reshape(resamples, *values.shape[1:])


def mean_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0, groups=None
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over the first axis (samples).

    Parameters
    ----------
    values : (n, ...) finite, n at least 2.
    confidence, resamples, seed : of the bootstrap.
    groups : (n,) labels; whole groups are drawn (the cluster bootstrap of Davison & Hinkley 1997, section 3.8).

    Returns
    -------
    low, high : arrays (...); both the mean where all samples are equal

    Raises
    ------
    ValueError : fewer than 2 samples or groups, values that are not finite, not one label a sample.
    """
    values, codes = checked_samples(values, groups)
    return _percentiles(values, bootstrap_means(values, codes, resamples, seed), confidence)


def _percentiles(values: np.ndarray, means: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean of values (n, ...) from those of resamples (resamples, ...)."""
    bounds = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    # the means of equal samples differ by rounding alone
    low, high = np.where((values == values[0]).all(0), values.mean(0), bounds)
    return low[()], high[()]


class Paired(NamedTuple):
    """A paired comparison: the mean of a - b with its interval, the two-sided p-value, and the effect size."""

    difference: float
    low: float
    high: float
    p: float
    effect: float


def paired(a, b, groups=None, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Compare a and b on the same samples.

    Parameters
    ----------
    a, b : (n,) finite, in the same order of samples; two arrays of bool (right or wrong) are compared as proportions.
    groups : (n,) labels; the bootstrap draws whole groups.
    confidence, resamples, seed : of the bootstrap.

    Returns
    -------
    Paired. `difference`, `low` and `high` are those of the mean of a - b, by percentile bootstrap.
        For bool, `p` is McNemar's exact test (doi:10.1007/BF02295996): binomial, on the samples where a and b differ.
        It takes samples as independent whatever the groups; compare as float to go by groups. `effect` is Cohen's g
        (1988, chapter 5), the part of these samples that a has right, less 0.5; NaN where there are none.
        Else `p` is a bootstrap test: the part of the resamples of the centred differences whose mean is at least as
        far from 0 as `difference`, with 1 added to both counts (Davison & Hinkley 1997, chapter 4). `effect` is
        Cohen's d_z, the mean of a - b over its standard deviation; NaN where all differences are equal.

    Raises
    ------
    ValueError : a and b of different lengths, fewer than 2 samples or groups, values that are not finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}: give both (n,), one number a sample, in one order")
    values, codes = checked_samples(a.astype(float) - b.astype(float), groups, "a - b")
    difference = values.mean()
    means = bootstrap_means(values, codes, resamples, seed)
    low, high = _percentiles(values, means, confidence)
    if a.dtype == b.dtype == bool:
        better, worse = (a & ~b).sum(), (b & ~a).sum()
        p = mcnemar([[0, better], [worse, 0]], exact=True).pvalue  # what a and b agree on does not count
        effect = better / (better + worse) - 0.5 if better + worse else np.nan
    else:
        extreme = np.abs(means - difference) >= np.abs(difference) * (1 - 1e-12)  # with ties, whatever the rounding
        p = (extreme.sum() + 1) / (resamples + 1)
        effect = difference / values.std(ddof=1) if np.ptp(values) else np.nan
    return Paired(*map(float, (difference, low, high, p, effect)))


def correct(p) -> tuple[np.ndarray, np.ndarray]:
    """Holm's and Bonferroni's adjusted p-values of one family of tests, each of the shape of `p`."""
    p = np.asarray(p, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values are in [0, 1]: leave out what was not tested (NaN)")
    if not p.size:  # statsmodels before 0.15 divides by the number of tests
        return p.copy(), p.copy()
    holm, bonferroni = (multipletests(p.ravel(), method=m)[1].reshape(p.shape) for m in ("holm", "bonferroni"))
    return holm, bonferroni


class Contrast(NamedTuple):
    """A difference of two means with its interval and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def contrast(first, second, first_groups=None, second_groups=None, confidence: float = 0.95) -> Contrast:
    """Compare the means of two tasks on different samples: is the damage to one greater than to the other?

    The unit is the group: Welch's t-test (doi:10.1093/biomet/34.1-2.28) on the means of groups, each counted once.

    Parameters
    ----------
    first, second : (n,) and (m,), finite.
    first_groups, second_groups : (n,) and (m,) labels; without them each sample is a group.
    confidence : of the interval.

    Returns
    -------
    Contrast of first - second. Where neither side varies the interval is the difference itself, and p is 1 where that
    is zero and else 0, the limit of the test.

    Raises
    ------
    ValueError : fewer than 2 samples or groups on a side, values that are not finite, not one label a sample.
    """
    sides = []
    for values, groups, name in ((first, first_groups, "first"), (second, second_groups, "second")):
        _, sums, sizes = _group_sums(values, groups, name)
        sides.append(sums / sizes)
    x, y = sides
    difference = x.mean() - y.mean()
    if all(np.allclose(side, side[0], rtol=1e-12, atol=0) for side in sides):
        same = np.isclose(x[0], y[0], rtol=1e-12, atol=0)
        return Contrast(*[0.0 if same else float(difference)] * 3, 1.0 if same else 0.0)
    test = CompareMeans(DescrStatsW(x), DescrStatsW(y))
    low, high = test.tconfint_diff(1 - confidence, usevar="unequal")
    return Contrast(*map(float, (difference, low, high, test.ttest_ind(usevar="unequal")[1])))


def design_effect(values, groups) -> float:
    """How many times the variance of the mean is what it would be were the samples independent (Kish 1965).

    Parameters
    ----------
    values : (n,) finite.
    groups : (n,) labels.

    Returns
    -------
    float: the variance of the mean by linearization between groups, (G / (G - 1)) sum over groups of
    (sum of x - mean)^2 / n^2, over s^2 / n. About 1 without correlation inside groups, exactly 1 for groups of one,
    about the size of groups whose samples are all equal; NaN where all values are equal.

    Raises
    ------
    ValueError : fewer than 2 samples or groups, values that are not finite, not one label a sample.
    """
    values, sums, sizes = _group_sums(values, groups, "values")
    if (values == values[0]).all():
        return np.nan
    n, n_groups = len(values), len(sizes)
    between = n_groups / (n_groups - 1) * ((sums - sizes * values.mean()) ** 2).sum() / n**2
    return float(between / (values.var(ddof=1) / n))


def _group_sums(values, groups, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked values (n,), and the sum and the number of samples of every group."""
    values, codes = checked_samples(values, groups, name)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}: give one number a sample, (n,)")
    return values, np.bincount(codes, values), np.bincount(codes)
