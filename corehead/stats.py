"""Means with intervals, paired comparisons, effect sizes and corrections, thin over scipy.

Samples on one context are not independent: what takes `groups` treats a group as the unit. All intervals are of 95 %.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ttest_ind

METRICS = ("correct", "logprob", "margin")  # of an answer, in the tables of `evaluate`


def checked_samples(values, groups=None, name: str = "values") -> tuple[np.ndarray, np.ndarray]:
    """Values to resample, and which group each sample is in.

    Parameters
    ----------
    values : array of float, shape (n, ...)
        A row a sample.
    groups : array, shape (n,), optional
        Labels; without them each sample is a group of its own.
    name : str
        What errors call the values.

    Returns
    -------
    values : ndarray of float64, shape (n, ...)
    codes : ndarray of int64, shape (n,)
        Number of each sample's group, from 0.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    values = np.atleast_1d(np.asarray(values, float))
    n = len(values)
    if n < 2:
        raise ValueError(f"{name}: too few samples ({n}), take at least 2")
    bad = (~np.isfinite(values)).reshape(n, -1).any(1).sum()
    if bad:
        raise ValueError(f"{name}: {bad} of {n} samples have NaN or Inf, drop these samples first")
    if groups is None:
        return values, np.arange(n)
    labels = np.asarray(groups)
    if labels.shape != (n,) or pd.isna(labels).any():
        raise ValueError(f"groups of {name}: give one label a sample ({n} of them, none missing)")
    codes, found = pd.factorize(labels)
    if len(found) < 2:
        raise ValueError(
            f"groups of {name}: all {n} samples are in one group, take at least 2 groups"
        )
    return values, codes


# --- resampling


def resample_means(
    values, resamples: int = 1000, seed: int = 0, size: int | None = None, groups=None
) -> np.ndarray:
    """Bootstrap means: what the mean might have been with other samples.

    Groups are drawn with replacement, and a mean is the sum over the number of samples in the groups drawn.

    Parameters
    ----------
    values : array of float, shape (n, ...)
        Finite, a row a sample, such as scores (n, layers, heads).
    resamples, seed : int
        Of the bootstrap.
    size : int, optional
        Groups a resample, from 1 to their number; None takes as many as there are.
    groups : array, shape (n,), optional
        Labels, such as contexts; without them each sample is a group of its own.

    Returns
    -------
    ndarray, shape (resamples, ...)

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or the size is out of range.
    """
    values, codes = checked_samples(values, groups)
    sizes = np.bincount(codes)
    n = len(sizes)
    size = n if size is None else size
    if not 1 <= size <= n:
        raise ValueError(f"size={size}: draw 1 to {n} {'samples' if groups is None else 'groups'}")
    # whole groups: samples on one context tend to be right or wrong together, and drawing them one by one, as if they
    # were independent, would make the interval too narrow
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, size))
    # by counting how often each group was drawn, all resamples of all heads are one matrix product
    drawn += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    sums = np.zeros((n, *values.shape[1:]))
    np.add.at(sums, codes, values)
    # (resamples, n) @ (n, ...): groups differ in size, so that the number of samples depends on the draw too
    means = counts @ sums.reshape(n, -1) / (counts @ sizes)[:, None]
    return means.reshape(resamples, *values.shape[1:])


def split_halves(
    values, splits: int = 200, seed: int = 0, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Means over two disjoint random subsets of the samples, many times: the agreement of the two is reliability.

    Parameters
    ----------
    values : array of float, shape (n, layers, heads)
        Finite scores, a row a sample.
    splits, seed : int
        Number of random splits, and their seed.
    size : int, optional
        Samples in each subset, 1 to n // 2; None takes n // 2.

    Returns
    -------
    a, b : ndarray, shape (splits, layers, heads)

    Raises
    ------
    ValueError
        There are fewer than 2 samples, scores are not finite, or the size is out of range.
    """
    values, _ = checked_samples(values)
    n = len(values)
    size = n // 2 if size is None else size
    if not 1 <= size <= n // 2:
        raise ValueError(
            f"size={size}: two disjoint subsets would take {2 * size} of {n} samples, take 1 to {n // 2}"
        )
    # every row is a permutation; the first `size` places are one subset, the next `size` the other
    place = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (splits, 1)), axis=1)
    first = place < size  # (splits, n)
    second = (place >= size) & (place < 2 * size)
    flat = values.reshape(n, -1)
    a, b = ((half @ flat / size).reshape(splits, *values.shape[1:]) for half in (first, second))
    return a, b


# --- intervals


def proportion_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a proportion (doi:10.1080/01621459.1927.10502953), `hits` of `n`."""
    # has a width even where all are right, or none, as testbeds often have it; mean +- 1.96 se has none there
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


def mean_interval(
    values, resamples: int = 1000, seed: int = 0, groups=None
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over the first axis (samples).

    Parameters
    ----------
    values : array of float, shape (n, ...)
        Finite, n at least 2.
    resamples, seed : int
        Of the bootstrap.
    groups : array, shape (n,), optional
        Labels; whole groups are drawn (the cluster bootstrap of Davison & Hinkley 1997, section 3.8).

    Returns
    -------
    low, high : ndarray, shape (...)
        Both the mean where all samples are equal.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    means = resample_means(values, resamples, seed, groups=groups)
    return _percentiles(np.asarray(values, float), means)


def _percentiles(values: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean of values (n, ...) from those of resamples (resamples, ...)."""
    bounds = np.quantile(means, [0.025, 0.975], axis=0)
    # the means of equal samples differ by rounding alone
    low, high = np.where((values == values[0]).all(0), values.mean(0), bounds)
    return low[()], high[()]


def heads_for_share(values, share: float = 0.5) -> float | np.ndarray:
    """rho: the smallest share of heads that holds `share` of the positive score mass (arXiv 2605.27243's rho_0.5).

    Parameters
    ----------
    values : array of float, shape (..., layers, heads)
        Scores; negative ones count as zero.
    share : float
        Part of the mass, in (0, 1].

    Returns
    -------
    float or ndarray, shape (...)
        In (0, 1]; NaN where no score is positive.
    """
    positive = np.clip(np.asarray(values, float), 0, None)
    flat = positive.reshape(*positive.shape[:-2], -1)
    mass = np.sort(flat, axis=-1)[..., ::-1].cumsum(-1)
    total = mass[..., -1]
    # a hair less than the share, for sums that round
    too_few = (mass < (share - 1e-12) * total[..., None]).sum(-1)
    # the head that reaches the share is one more
    return np.where(total > 0, (too_few + 1) / flat.shape[-1], np.nan)[()]


def rho_interval(
    values, share: float = 0.5, resamples: int = 500, seed: int = 0, groups=None
) -> tuple[float, float]:
    """Percentile bootstrap interval of rho, `heads_for_share` of the mean scores.

    Parameters
    ----------
    values : array of float, shape (n, layers, heads)
        Finite scores, a row a sample.
    share : float
        Part of the mass, in (0, 1].
    resamples, seed, groups
        As in `mean_interval`.

    Returns
    -------
    low, high : float
    """
    # rho is no mean over samples, so that it is computed anew for the mean scores of every resample
    rho = heads_for_share(resample_means(values, resamples, seed, groups=groups), share)
    low, high = np.quantile(rho, [0.025, 0.975])
    return float(low), float(high)


# --- tests


class Paired(NamedTuple):
    """A paired comparison: the mean of a - b with its interval, the two-sided p-value, and the effect size."""

    difference: float
    low: float
    high: float
    p: float
    effect: float


def paired(a, b, groups=None, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Compare a and b on the same samples.

    Parameters
    ----------
    a, b : array, shape (n,)
        Finite, in the same order of samples; two arrays of bool (right or wrong) are compared as proportions.
    groups : array, shape (n,), optional
        Labels; the bootstrap draws whole groups.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    Paired
        `difference`, `low` and `high` are those of the mean of a - b, by percentile bootstrap.
        For bool, `p` is McNemar's exact test (doi:10.1007/BF02295996): binomial, on the samples where a and b differ.
        It takes samples as independent whatever the groups; compare as float to go by groups. `effect` is Cohen's g
        (1988, chapter 5), the part of these samples that a has right, less 0.5; NaN where there are none.
        Else `p` is a bootstrap test: the part of the resamples of the centred differences whose mean is at least as
        far from 0 as `difference`, with 1 added to both counts (Davison & Hinkley 1997, chapter 4). `effect` is
        Cohen's d_z, the mean of a - b over its standard deviation; NaN where all differences are equal.

    Raises
    ------
    ValueError
        a and b have different lengths, there are fewer than 2 samples or groups, or values are not finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}: give both (n,), one number a sample, in one order"
        )
    values, codes = checked_samples(a.astype(float) - b.astype(float), groups, "a - b")
    difference = values.mean()
    means = resample_means(values, resamples, seed, groups=codes)
    low, high = _percentiles(values, means)
    if a.dtype == b.dtype == bool:
        p, effect = _mcnemar(better=(a & ~b).sum(), worse=(b & ~a).sum())
    else:
        # centred, the resamples are what chance gives where there is no difference; ties count, whatever the rounding
        extreme = np.abs(means - difference) >= np.abs(difference) * (1 - 1e-12)
        # with the observed one among them, p is never 0
        p = (extreme.sum() + 1) / (resamples + 1)
        effect = difference / values.std(ddof=1) if np.ptp(values) else np.nan
    return Paired(*map(float, (difference, low, high, p, effect)))


def _mcnemar(better: int, worse: int) -> tuple[float, float]:
    """McNemar's exact p and Cohen's g: what both have right, or both wrong, does not count."""
    differ = better + worse
    if differ == 0:
        return 1.0, np.nan
    return binomtest(better, differ).pvalue, better / differ - 0.5


def correct(p) -> tuple[np.ndarray, np.ndarray]:
    """Adjust the p-values of one family of tests.

    Parameters
    ----------
    p : array of float, any shape
        In [0, 1].

    Returns
    -------
    holm, bonferroni : ndarray, of the shape of `p`
        Holm (1979): the i-th smallest of m p-values times m - i + 1, at least the one before it. Bonferroni: times m.
        Both at most 1.

    Raises
    ------
    ValueError
        A p-value is outside [0, 1], or NaN.
    """
    p = np.asarray(p, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values are in [0, 1]: leave out what was not tested (NaN)")
    order = p.argsort(axis=None)
    stepped = p.ravel()[order] * np.arange(p.size, 0, -1)
    holm = np.empty(p.size)
    holm[order] = np.maximum.accumulate(stepped)  # never below that of a smaller p
    return np.minimum(holm, 1).reshape(p.shape), np.minimum(p * p.size, 1)


class Contrast(NamedTuple):
    """A difference of two means with its interval and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def contrast(first, second, first_groups=None, second_groups=None) -> Contrast:
    """Compare the means of two tasks on different samples: is the damage to one greater than to the other?

    The unit is the group: Welch's t-test (doi:10.1093/biomet/34.1-2.28) on the means of groups, each counted once.

    Parameters
    ----------
    first, second : array of float, shapes (n,) and (m,)
        Finite.
    first_groups, second_groups : array, shapes (n,) and (m,), optional
        Labels; without them each sample is a group.

    Returns
    -------
    Contrast
        Of first - second. Where neither side varies the interval is the difference itself, and p is 1 where that is
        zero and else 0, the limit of the test.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups on a side, values are not finite, or there is not one label a sample.
    """
    x = _group_means(first, first_groups, "first")
    y = _group_means(second, second_groups, "second")
    difference = x.mean() - y.mean()
    # means over groups of different sizes differ by rounding
    if np.allclose(x, x[0], rtol=1e-12, atol=0) and np.allclose(y, y[0], rtol=1e-12, atol=0):
        if np.isclose(x[0], y[0], rtol=1e-12, atol=0):
            return Contrast(0.0, 0.0, 0.0, 1.0)
        return Contrast(float(difference), float(difference), float(difference), 0.0)
    # Welch's: nothing says that two tasks vary alike
    test = ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval()
    return Contrast(*map(float, (difference, low, high, test.pvalue)))


def design_effect(values, groups) -> float:
    """How many times the variance of the mean is what it would be were the samples independent (Kish 1965).

    Parameters
    ----------
    values : array of float, shape (n,)
        Finite.
    groups : array, shape (n,)
        Labels.

    Returns
    -------
    float
        The variance of the mean by linearization between groups, (G / (G - 1)) sum over groups of
        (sum of x - mean)^2 / n^2, over s^2 / n. About 1 without correlation inside groups, exactly 1 for groups of one,
        about the size of groups whose samples are all equal; NaN where all values are equal.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    values, sums, sizes = _group_sums(values, groups, "values")
    if (values == values[0]).all():
        return np.nan
    n = len(values)
    n_groups = len(sizes)
    between = n_groups / (n_groups - 1) * ((sums - sizes * values.mean()) ** 2).sum() / n**2
    return float(between / (values.var(ddof=1) / n))


def _group_sums(values, groups, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked values (n,), and the sum and the number of samples of every group."""
    values, codes = checked_samples(values, groups, name)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}: give one number a sample, (n,)")
    return values, np.bincount(codes, values), np.bincount(codes)


def _group_means(values, groups, name: str) -> np.ndarray:
    _, sums, sizes = _group_sums(values, groups, name)
    return sums / sizes


# --- tables of answers


def accuracy(answers: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Accuracy with Wilson's interval for each group of rows.

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`; of its columns ``correct`` counts.
    by : str or list of str
        Columns that tell the groups apart.

    Returns
    -------
    DataFrame
        Indexed by `by`, in the order of the answers: n, accuracy, low, high.
    """
    table = answers.groupby(by, sort=False)["correct"].agg(n="size", accuracy="mean", hits="sum")
    hits = table.pop("hits").astype(int)
    table[["low", "high"]] = [proportion_interval(*row) for row in zip(hits, table.n)]
    return table


def summary(
    answers: pd.DataFrame, by: str | list[str], metrics: Iterable[str] = METRICS
) -> pd.DataFrame:
    """Means with bootstrap intervals, resampling contexts, for each group of rows.

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`; of its columns ``context`` and the metrics count.
    by : str or list of str
        Columns that tell the groups apart.
    metrics : iterable of str
        Columns to average.

    Returns
    -------
    DataFrame
        Indexed by `by`, in the order of the answers: n and, for each metric, its mean, ``metric_low`` and
        ``metric_high``.

    Raises
    ------
    ValueError
        A group has fewer than 2 contexts, or values that are not finite.
    """
    metrics = list(metrics)

    def summarize(group: pd.DataFrame) -> pd.Series:
        values = group[metrics].to_numpy(float)
        low, high = mean_interval(values, groups=group["context"])
        row = {"n": len(group)}
        for i, metric in enumerate(metrics):
            row |= {metric: values[:, i].mean(), f"{metric}_low": low[i], f"{metric}_high": high[i]}
        return pd.Series(row)

    table = answers.groupby(by, sort=False)[[*metrics, "context"]].apply(summarize)
    return table.astype({"n": np.int64})


def compare(
    answers: pd.DataFrame, condition: str, against: Iterable[str], by: str | list[str] = "domain"
) -> pd.DataFrame:
    """Is a condition different from its controls, on the same samples?

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`. Conditions are told apart by the column ``condition``, or where there is none by ``heads``.
        Rows that differ in ``draw`` are draws of one control, and are averaged for each sample before it is paired.
    condition : str
        The condition of interest.
    against : iterable of str
        The controls.
    by : str or list of str
        Columns that tell groups of samples apart, each compared for itself; an empty list compares all together.

    Returns
    -------
    DataFrame
        A row for each group and control, indexed by `by` and ``control``:

        n
            Number of samples.
        accuracy_difference, accuracy_low, accuracy_high, accuracy_p, accuracy_effect
            Of condition - control, negative where the condition is worse, from `paired` with contexts as groups:
            McNemar's exact p and Cohen's g; where a sample has several draws, the bootstrap's p and d_z.
        logprob_difference, logprob_low, logprob_high, logprob_p, logprob_effect
            Likewise in nats, with the bootstrap's p and d_z.
        design_effect
            Of the difference in accuracy; McNemar's test knows nothing of contexts, and this says how far off that is.
        accuracy_holm, accuracy_bonferroni, logprob_holm, logprob_bonferroni
            p corrected over the family of all tests in the table.

    Raises
    ------
    ValueError
        A sample lacks an answer under one of the conditions, or has more than one that no column tells apart.
    """
    label = "condition" if "condition" in answers else "heads"
    by = [by] if isinstance(by, str) else list(by)
    groups = answers.groupby(by, sort=False) if by else [((), answers)]
    rows = []
    for group, part in groups:
        for control in against:
            row = dict(zip(by, group)) | {"control": control}
            rows.append(row | _compare_pair(part, label, condition, control))
    table = pd.DataFrame(rows).set_index([*by, "control"])
    # both measures are one family: whoever reads the table looks for the smallest p in it
    holm, bonferroni = correct(table[["accuracy_p", "logprob_p"]])
    table[["accuracy_holm", "logprob_holm"]] = holm
    table[["accuracy_bonferroni", "logprob_bonferroni"]] = bonferroni
    return table


def _compare_pair(
    answers: pd.DataFrame, label: str, condition: str, control: str
) -> dict[str, float]:
    """A row of `compare`, but for what is corrected."""
    names = [condition, control]
    answers = answers[answers[label].isin(names)]
    _check_draws(answers, label)
    # several draws are one control: averaged first, or they would count as samples of their own
    means = answers.groupby(["context", "sample", label])[["correct", "logprob"]].mean().unstack()
    # a condition without a single row becomes a column of NaN, and is named below
    right = means["correct"].reindex(columns=names)
    logprob = means["logprob"].reindex(columns=names)
    for name in names:
        lacking = right.index[right[name].isna()]
        if len(lacking):
            raise ValueError(
                f"sample {lacking[0][1]!r} has no answer under {name!r}: evaluate both on the same samples"
            )
    contexts = right.index.get_level_values("context")
    design = design_effect(right[condition] - right[control], contexts)
    # one answer each is right or wrong, for McNemar's test; a mean over draws is neither
    if len(answers) == right.size:
        right = right.astype(bool)
    row = {"n": len(right)}
    for measure, sides in (("accuracy", right), ("logprob", logprob)):
        test = paired(sides[condition], sides[control], contexts)
        row |= {f"{measure}_{field}": value for field, value in test._asdict().items()}
    return row | {"design_effect": design}


def _check_draws(answers: pd.DataFrame, label: str) -> None:
    """Raise ValueError where several answers to a sample are not draws of one control."""
    draw = ["draw"] if "draw" in answers else []
    again = answers[answers.duplicated([label, "sample", *draw])]
    if len(again):
        name = again[label].iloc[0]
        sample = again["sample"].iloc[0]
        raise ValueError(
            f"sample {sample!r} has several answers under {name!r}: keep one share, or tell them apart in by="
        )
