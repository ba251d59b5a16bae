"""Means with intervals, paired comparisons, effect sizes and corrections, thin over scipy.

Samples are not independent. They share contexts (questions on one picture), items (one handwritten digit is the answer
in many pictures) and random draws (one set of heads for all samples), and these are *crossed*: samples of different
contexts share an item. What takes `groups` takes the labels of one such factor, or a list of arrays, the labels of
several crossed ones. All intervals are of 95 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, t

METRICS = ("correct", "logprob", "margin")  # of an answer, in the tables of `evaluate`


def _checked_values(values, name: str = "values") -> np.ndarray:
    """Values (n, ...) as float64; errors call them `name`."""
    values = np.atleast_1d(np.asarray(values, float))
    n = len(values)
    if n < 2:
        raise ValueError(f"{name}: too few samples ({n}), take at least 2")
    bad = (~np.isfinite(values)).reshape(n, -1).any(1).sum()
    if bad:
        raise ValueError(
            f"{name}: {bad} of {n} samples have NaN or Inf, drop these samples first"
        )
    return values


def _codes(labels, n: int, name: str = "values") -> np.ndarray:
    """Number of each sample's group, from 0."""
    labels = np.asarray(labels)
    if labels.shape != (n,) or pd.isna(labels).any():
        raise ValueError(
            f"groups of {name}: give one label a sample ({n} of them, none missing)"
        )
    codes, found = pd.factorize(labels)
    if len(found) < 2:
        raise ValueError(
            f"groups of {name}: all {n} samples are in one group, take at least 2 groups"
        )
    return codes


def _factors(groups, n: int, name: str) -> list[np.ndarray]:
    """Codes of every crossed factor."""
    if groups is None:
        return [np.arange(n)]
    # a list of labels is one factor, a list of arrays is several
    several = (
        isinstance(groups, (list, tuple)) and len(groups) > 0 and np.ndim(groups[0]) > 0
    )
    return [_codes(labels, n, name) for labels in (groups if several else [groups])]


def _sums(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums (groups, ...) of values (n, ...) over the samples of each group."""
    sums = np.zeros((codes.max() + 1, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums


# --- means of clustered samples


class Clustered(NamedTuple):
    """A mean (or an array of them), its variance, degrees of freedom, and the fewest groups that a factor has."""

    mean: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    fewest: int

    @property
    def half(self) -> np.ndarray:
        """Half of the interval by Student's t."""
        return t.ppf(0.975, self.df) * np.sqrt(self.variance)


def clustered_mean(values, groups=None, name: str = "values") -> Clustered:
    """Mean over samples that share groups of one or several crossed factors, and its variance.

    Parameters
    ----------
    values : array, shape (n, ...)
        Finite, a row a sample.
    groups : array, shape (n,), or list of such arrays, optional
        Labels of one factor, or of several crossed ones; without them each sample is a group.
    name : str
        What errors call the values.

    Returns
    -------
    Clustered
        `variance` (...) is by linearization and multi-way clustering (Cameron, Gelbach & Miller 2011,
        doi:10.1198/jbes.2010.07136): of contexts and items, V_context + V_item - V_(context and item), a V being the
        sum over groups of (sum of x - mean)^2 / n^2; of more factors, by inclusion and exclusion over all subsets. With
        one factor it is Kish's (1965), and without groups s^2 / n. All V get the factor G / (G - 1) of the factor with
        the fewest groups G (Cameron & Miller 2015, doi:10.3368/jhr.50.2.317). Each with its own, the variance would be
        too small by a G-th where the groups of one factor agree, such as five draws of heads that all do no harm.
        Where the sum is below the variance of a factor alone, the largest of these is taken, which is conservative.

        `df` (...) is by Satterthwaite (1946, doi:10.2307/3002019) from the variances of the factors alone, and at
        least G - 1: few draws cost precision as far as draws differ. They should be five at least: with three that
        differ much, 95 % intervals hold the truth 92 % of the time.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    values = _checked_values(values, name)
    factors = _factors(groups, len(values), name)
    counts = [codes.max() + 1 for codes in factors]
    fewest = min(counts)
    # seen from the first sample: equal values then have no variance at all, whatever the rounding of their mean
    deviations = values - values[0]
    mean = values[0] + deviations.mean(0)
    deviations -= deviations.mean(0)
    # what two samples share is counted once for every factor that they share: taken off again, as often as too much
    crossed = sum(
        (-1) ** (size + 1) * _between(deviations, chosen)
        for size in range(1, len(factors) + 1)
        for chosen in combinations(factors, size)
    )
    alone = np.array(
        [_between(deviations, [c]) * n / (n - 1) for c, n in zip(factors, counts)]
    )
    variance = np.maximum(crossed * fewest / (fewest - 1), alone.max(0))
    uncertainty = sum(v**2 / (n - 1) for v, n in zip(alone, counts))
    df = np.full_like(variance, fewest - 1)
    np.divide(variance**2, uncertainty, out=df, where=uncertainty > 0)
    return Clustered(mean, variance, np.maximum(df, fewest - 1), fewest)


def _between(deviations: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """Variance (...) of the mean between the groups of samples that share a group in each of the factors."""
    joint = np.ravel_multi_index(factors, [codes.max() + 1 for codes in factors])
    sums = _sums(deviations, pd.factorize(joint)[0])
    return (sums**2).sum(0) / len(deviations) ** 2


def design_effect(values, groups) -> np.ndarray:
    """How many times the variance of the mean is what it would be were the samples independent (Kish 1965).

    Parameters
    ----------
    values : array, shape (n, ...)
        Finite.
    groups : array, shape (n,), or list of such arrays
        Labels of one factor, or of several crossed ones.

    Returns
    -------
    float or ndarray, shape (...)
        The variance of `clustered_mean` over s^2 / n. About 1 without correlation inside groups, exactly 1 for groups
        of one, about the size of groups whose samples are all equal; NaN where all values are equal.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    variance = clustered_mean(values, groups).variance
    values = np.asarray(values, float)
    # seen from the first sample: equal values then have exactly no variance
    independent = (values - values[0]).var(0, ddof=1) / len(values)
    with np.errstate(invalid="ignore"):
        return variance / independent


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
        Labels, such as contexts; without them each sample is a group of its own. One kind of group only: the bootstrap
        is for what is no mean, such as rankings; means of crossed groups have `mean_interval`.

    Returns
    -------
    ndarray, shape (resamples, ...)

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or the size is out of range.
    """
    values = _checked_values(values)
    codes = np.arange(len(values)) if groups is None else _codes(groups, len(values))
    sizes = np.bincount(codes)
    n = len(sizes)
    size = n if size is None else size
    if not 1 <= size <= n:
        raise ValueError(
            f"size={size}: draw 1 to {n} {'samples' if groups is None else 'groups'}"
        )
    # whole groups: samples on one context tend to be right or wrong together, and drawing them one by one, as if they
    # were independent, would make the interval too narrow
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, size))
    # by counting how often each group was drawn, all resamples of all heads are one matrix product
    drawn += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    sums = _sums(values, codes).reshape(n, -1)
    # (resamples, n) @ (n, ...): groups differ in size, so that the number of samples depends on the draw too
    means = counts @ sums / (counts @ sizes)[:, None]
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
    values = _checked_values(values)
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
    a, b = (
        (half @ flat / size).reshape(splits, *values.shape[1:]) for half in (first, second)
    )
    return a, b


# --- intervals


def proportion_interval(share, n) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a proportion (doi:10.1080/01621459.1927.10502953).

    Parameters
    ----------
    share : float or array
        Hits over samples, in [0, 1].
    n : float or array
        Samples; effective ones need not be whole.

    Returns
    -------
    low, high : float or ndarray
    """
    # has a width even where all are right, or none, as testbeds often have it; mean +- 1.96 se has none there
    z = norm.ppf(0.975)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = share * (1 - share) / n + z**2 / (4 * n**2)
    half = z / (1 + z**2 / n) * np.sqrt(spread)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def mean_interval(values, groups=None) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over the first axis (samples).

    Parameters
    ----------
    values : array, shape (n, ...)
        Finite, n at least 2. Bool, or nothing but 0 and 1, they are proportions.
    groups : array, shape (n,), or list of such arrays, optional
        Labels of one factor, or of several crossed ones; without them each sample is a group.

    Returns
    -------
    low, high : ndarray, shape (...)
        Of a mean, mean +- quantile of t times the standard error, from `clustered_mean`.
        Of a proportion, Wilson's at the effective sample size of Korn & Graubard (1998, Survey Methodology 24): n over
        the design effect, times (quantile of t with n - 1 degrees of freedom / with those of the mean)^2, and at most
        n. Where all answers are equal, they do not show how alike a group's answers are, and the fewest groups of a
        factor count as the sample size.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups, values are not finite, or there is not one label a sample.
    """
    values = np.asarray(values)
    found = clustered_mean(values, groups)
    if not np.isin(values, (0, 1)).all():
        return found.mean - found.half, found.mean + found.half
    n = len(values)
    # 0 / 0 where all answers are equal; groups that balance out exactly have no variance between them
    with np.errstate(invalid="ignore", divide="ignore"):
        effective = values.var(0, ddof=1) / found.variance
    effective *= (t.ppf(0.975, n - 1) / t.ppf(0.975, found.df)) ** 2
    effective = np.where(np.isnan(effective), found.fewest, np.minimum(effective, n))
    return proportion_interval(found.mean, effective)


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

    Raises
    ------
    ValueError
        The share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: take a part of the mass, above 0 and at most 1")
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
        As in `resample_means`.

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


def paired(a, b, groups=None) -> Paired:
    """Compare a and b on the same samples.

    Parameters
    ----------
    a, b : array, shape (n,)
        Finite, in the same order of samples; two arrays of bool (right or wrong) are compared as proportions.
    groups : array, shape (n,), or list of such arrays, optional
        Labels of one factor, or of several crossed ones; without them each sample is a group.

    Returns
    -------
    Paired
        `difference`, `low`, `high` and `p` are those of the mean of a - b by a t-test, its variance and degrees of
        freedom from `clustered_mean`. McNemar's test has no place here, for bool either: it counts every sample where a
        and b differ as independent evidence, and samples that share a digit or a picture are not. `effect` is Cohen's
        d_z, the mean of a - b over its standard deviation; NaN where all differences are equal.

        Where all differences are equal, p is 1 if they are zero, and else 2^(1 - G), the sign test's of the fewest
        groups G of a factor. The interval has no width then, but for bool: its half is how often, at most, as many
        groups may differ of which none did (Wilson's upper limit).

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
    values = a.astype(float) - b.astype(float)
    found = clustered_mean(values, groups, "a - b")
    low, high, p = _t_test(found)
    if a.dtype == b.dtype == bool:
        unseen = _unseen(values, found.fewest)
        low = max(low - unseen, -1)
        high = min(high + unseen, 1)
    effect = found.mean / values.std(ddof=1) if np.ptp(values) else np.nan
    return Paired(*map(float, (found.mean, low, high, p, effect)))


def _t_test(found: Clustered) -> tuple[float, float, float]:
    """Interval, and p of no difference."""
    difference, variance, df, fewest = found
    if variance == 0:
        return difference, difference, 2.0 ** (1 - fewest) if difference else 1.0
    p = 2 * t.sf(np.abs(difference) / np.sqrt(variance), df)
    return difference - found.half, difference + found.half, p


def _unseen(differences: np.ndarray, fewest: int) -> float:
    """How often, at most, answers may differ otherwise than all of them did; 0 where they vary, as variance tells."""
    return 0.0 if np.ptp(differences) else proportion_interval(0.0, fewest)[1]


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

    Welch's t-test (doi:10.1093/biomet/34.1-2.28) with the variances and degrees of freedom of `clustered_mean`. The two
    sides are taken as independent: they share no context, item or draw.

    Parameters
    ----------
    first, second : array of float, shapes (n,) and (m,)
        Finite.
    first_groups, second_groups : array, shapes (n,) and (m,), or lists of such arrays, optional
        Labels of one factor, or of several crossed ones; without them each sample is a group.

    Returns
    -------
    Contrast
        Of first - second. Where neither side varies the interval is the difference itself, and p is 1 where that is
        zero and else 2^(1 - G), with G the fewest groups of a factor: no less than a permutation test's.

    Raises
    ------
    ValueError
        There are fewer than 2 samples or groups on a side, values are not finite, or there is not one label a sample.
    """
    sides = []
    for name, values, groups in (
        ("first", first, first_groups),
        ("second", second, second_groups),
    ):
        if np.ndim(values) != 1:
            raise ValueError(
                f"{name} has shape {np.shape(values)}: give one number a sample, (n,)"
            )
        sides.append(clustered_mean(values, groups, name))
    x, y = sides
    difference = x.mean - y.mean
    variance = x.variance + y.variance
    # Welch's: nothing says that two tasks vary alike
    uncertainty = x.variance**2 / x.df + y.variance**2 / y.df
    df = variance**2 / uncertainty if uncertainty else np.nan
    test = _t_test(Clustered(difference, variance, df, min(x.fewest, y.fewest)))
    return Contrast(*map(float, (difference, *test)))


# --- tables of answers


def groups_of(answers: pd.DataFrame, draws: Iterable[str] = ("draw",)) -> list[pd.Series]:
    """What the rows of a table share: the crossed factors, for `groups`.

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`, or a part of one.
    draws : iterable of str
        Columns of random draws.

    Returns
    -------
    list of Series
        Contexts; items, where the table has a column ``item`` (a sample that has none is its own); and random draws of
        heads, where there are several.
    """
    found = [answers["context"]]
    if "item" in answers:
        found.append(answers["item"].where(answers["item"].notna(), answers["sample"]))
    return found + [answers[d] for d in draws if d in answers and answers[d].nunique() > 1]


def summary(
    answers: pd.DataFrame, by: str | list[str], metrics: Iterable[str] = METRICS
) -> pd.DataFrame:
    """Means with intervals for each group of rows.

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`; of its columns ``context``, ``item`` and ``draw`` (see `groups_of`) and the metrics count.
    by : str or list of str
        Columns that tell the groups apart.
    metrics : iterable of str
        Columns to average.

    Returns
    -------
    DataFrame
        Indexed by `by`, in the order of the answers: n (rows) and, for each metric, its mean, ``metric_low`` and
        ``metric_high`` by `mean_interval`; where all answers are equal, random draws are not counted among the groups.

    Raises
    ------
    ValueError
        A group has fewer than 2 contexts or items, or values that are not finite.
    """
    metrics = list(metrics)

    def summarize(group: pd.DataFrame) -> pd.Series:
        row = {"n": len(group)}
        for metric in metrics:
            values = group[metric].to_numpy()
            # draws that all agree say nothing of others; the few of them are no sample size
            agree = (values == values[0]).all()
            low, high = mean_interval(values, groups_of(group, () if agree else ("draw",)))
            row |= {metric: values.mean(), f"{metric}_low": low, f"{metric}_high": high}
        return pd.Series(row)

    return _by_group(answers, by, summarize)


def _by_group(answers: pd.DataFrame, by: str | list[str], row) -> pd.DataFrame:
    """A row, as `row` makes it of a part of the answers, for each of the groups."""
    # columns by name: versions of pandas differ in whether those of `by` are among a group's
    groups = answers.groupby(by, sort=False, dropna=False)[list(answers.columns)]
    return groups.apply(row).astype({"n": np.int64})


def normalised_damage(
    answers: pd.DataFrame,
    by: str | list[str],
    chance: float | Mapping[str, float] | None = None,
    intact: str = "intact",
) -> pd.DataFrame:
    """Accuracy lost, as a part of what there is to lose: (intact - accuracy) / (intact - chance level).

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`. Conditions are told apart by the column ``condition``, or where there is none by ``heads``;
        one of them is the intact model, on the same samples.
    by : str or list of str
        Columns that tell groups of rows apart.
    chance : float or mapping of str to float, optional
        Chance level of all, or of each ``domain``. None takes, of each domain, how often its commonest answer is right.
    intact : str
        The condition that the others are compared with.

    Returns
    -------
    DataFrame
        Indexed by `by`, in the order of the answers, without the intact condition: n (rows), damage, damage_low and
        damage_high. 0 is no damage and 1 chance level; NaN where the intact model is not above it. Over several domains
        it is the mean loss over the mean of what there is to lose.

        The interval is that of a ratio of means by linearization (Woodruff 1971): with R the ratio, that of the mean
        of (lost - R * what there is to lose) over what there is to lose, the chance level taken as given. Where all
        answers changed alike it is as wide as in `paired`.

    Raises
    ------
    ValueError
        A sample lacks an answer of the intact model, or has several; a domain has no chance level; a group has fewer
        than 2 contexts or items.
    """
    label = _label(answers)
    before = answers[answers[label] == intact]
    again = before["sample"][before["sample"].duplicated()]
    if len(again):
        raise ValueError(
            f"sample {again.iloc[0]!r} has several answers under {intact!r}: keep one"
        )
    if chance is None:
        shares = before.groupby("domain")["answer"].value_counts(normalize=True)
        chance = shares.groupby("domain").max()
    table = answers[answers[label] != intact]
    _check_answered(table["sample"], before["sample"], intact)
    right = table["sample"].map(before.set_index("sample")["correct"]).astype(float)
    level = chance if np.isscalar(chance) else table["domain"].map(chance)
    table = table.assign(lost=right - table["correct"], to_lose=right - level)
    unknown = table[table["to_lose"].isna()]
    if len(unknown):
        raise ValueError(
            f"no chance level for domain {unknown['domain'].iloc[0]!r}: add it to chance="
        )
    return _by_group(table, by, _damage)


def _damage(group: pd.DataFrame) -> pd.Series:
    """A row of `normalised_damage`."""
    lost = group["lost"].to_numpy()
    to_lose = group["to_lose"].to_numpy()
    scale = to_lose.mean()
    if scale <= 0:
        scale = np.nan
    damage = lost.mean() / scale
    # a ratio of means varies, to first order, as the mean of these
    found = clustered_mean(lost - np.nan_to_num(damage) * to_lose, groups_of(group))
    half = (found.half + _unseen(lost, found.fewest)) / scale
    bounds = {"damage_low": damage - half, "damage_high": damage + half}
    return pd.Series({"n": len(group), "damage": damage} | bounds)


def compare(
    answers: pd.DataFrame,
    condition: str,
    against: Iterable[str],
    by: str | list[str] = "domain",
) -> pd.DataFrame:
    """Is a condition different from its controls, on the same samples?

    Parameters
    ----------
    answers : DataFrame
        From `evaluate`. Conditions are told apart by the column ``condition``, or where there is none by ``heads``.
        Rows that differ in ``draw`` are draws of one condition: each is compared with each of the other side, and draws
        are a factor of their own, crossed with contexts and items (see `groups_of`).
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
            Of condition - control, negative where the condition is worse, from `paired`: t-test and Cohen's d_z.
        logprob_difference, logprob_low, logprob_high, logprob_p, logprob_effect
            Likewise in nats.
        design_effect
            Of the difference in accuracy.
        accuracy_holm, accuracy_bonferroni, logprob_holm, logprob_bonferroni
            p corrected over the family of all tests in the table.

    Raises
    ------
    ValueError
        A sample lacks an answer under one of the conditions, or has more than one that no column tells apart; a
        condition or column is not in the table.
    """
    by = [by] if isinstance(by, str) else list(by)
    against = _known_conditions(answers, condition, against)
    if unknown := set(by) - set(answers):
        raise ValueError(
            f"no column {min(unknown)!r} to compare by: take another, or by=[]"
        )
    groups = answers.groupby(by, sort=False, dropna=False) if by else [((), answers)]
    rows = []
    for group, part in groups:
        for control in against:
            row = dict(zip(by, group)) | {"control": control}
            rows.append(row | _compare_pair(part, condition, control))
    table = pd.DataFrame(rows).set_index([*by, "control"])
    # both measures are one family: whoever reads the table looks for the smallest p in it
    holm, bonferroni = correct(table[["accuracy_p", "logprob_p"]])
    table[["accuracy_holm", "logprob_holm"]] = holm
    table[["accuracy_bonferroni", "logprob_bonferroni"]] = bonferroni
    return table


def _known_conditions(
    answers: pd.DataFrame, condition: str, against: Iterable[str]
) -> list[str]:
    """The controls as a list, all of them in the table."""
    if isinstance(against, str) or not (against := list(against)):
        raise ValueError(f"against={against!r}: give a list of one control or more")
    label = _label(answers)
    there = list(answers[label].unique())
    for name in (condition, *against):
        if name not in there:
            raise ValueError(
                f"no {label} {name!r}: there are {', '.join(map(repr, there))}"
            )
    return against


def _compare_pair(answers: pd.DataFrame, condition: str, control: str) -> dict[str, float]:
    """A row of `compare`, but for what is corrected."""
    label = _label(answers)
    sides = [answers[answers[label] == name] for name in (condition, control)]
    for side in sides:
        _check_draws(side, label)
    first, second = sides
    _check_answered(second["sample"], first["sample"], condition)
    _check_answered(first["sample"], second["sample"], control)
    # every draw of the one with every draw of the other; a single answer each is one pair
    pairs = first.merge(second, on="sample", suffixes=("", "_control"))
    groups = groups_of(pairs, draws=("draw", "draw_control"))
    row = {"n": pairs["sample"].nunique()}
    for measure, column in (("accuracy", "correct"), ("logprob", "logprob")):
        test = paired(pairs[column], pairs[f"{column}_control"], groups)
        row |= {f"{measure}_{field}": value for field, value in test._asdict().items()}
    lost = pairs["correct"].astype(float) - pairs["correct_control"]
    return row | {"design_effect": design_effect(lost, groups)}


def _label(answers: pd.DataFrame) -> str:
    """The column that tells conditions apart."""
    return "condition" if "condition" in answers else "heads"


def _check_answered(samples: pd.Series, answered: pd.Series, name: str) -> None:
    """Raise ValueError where one of the samples is not among those that were answered under a condition."""
    lacking = samples[~samples.isin(answered)]
    if len(lacking):
        raise ValueError(
            f"sample {lacking.iloc[0]!r} has no answer under {name!r}: evaluate both on the same samples"
        )


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
