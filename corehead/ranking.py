"""Sets and rankings of attention heads, and how far two rankings agree."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import hypergeom, kendalltau, rankdata

from .models import MLLM
from .runs import check_model, named

# heads to draw from for each that a random one is to resemble: few enough to be like it, enough for draws to differ
NEAREST = 5


class HeadSet:
    """An immutable set of a model's query heads: a boolean mask over all of them.

    ``|``, ``&``, ``-`` and ``~`` (all other heads) give new sets; ``len``, ``in`` and iteration go over pairs
    (layer, head) of int, in that order.

    Parameters
    ----------
    mask : array of bool, shape (layers, heads)
        True for the heads in the set. `HeadSet.of` takes pairs instead.

    Attributes
    ----------
    mask : ndarray of bool, shape (layers, heads)
        Read-only.
    shape : tuple of int
        (layers, heads) of the model.

    Raises
    ------
    ValueError
        The mask is not boolean or not two-dimensional, or sets of two models are combined.
    """

    def __init__(self, mask: np.ndarray):
        mask = np.array(mask)  # a copy: the set must not change with its source
        if mask.dtype != bool or mask.ndim != 2:
            raise ValueError(
                "a set of heads is a boolean mask (layers, heads): for pairs use HeadSet.of(pairs, shape)"
            )
        mask.setflags(write=False)
        self.mask = mask
        self.shape = mask.shape

    @classmethod
    def of(cls, heads: Iterable[tuple[int, int]], shape: tuple[int, int]) -> HeadSet:
        """The set of these heads.

        Parameters
        ----------
        heads : iterable of (int, int)
            Pairs (layer, head), counted from 0.
        shape : tuple of int
            (layers, heads) of the model.

        Returns
        -------
        HeadSet

        Raises
        ------
        ValueError
            A head is outside `shape`.
        """
        mask = np.zeros(shape, bool)
        for layer, head in heads:
            # numpy would take a negative index, counted from the end
            if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
                raise ValueError(
                    f"head ({layer}, {head}) is outside a model with {_times(shape)} heads: rank its own"
                )
            mask[layer, head] = True
        return cls(mask)

    def __contains__(self, head: tuple[int, int]) -> bool:
        # among pairs: an index that is out of range is in no set, where the mask would raise or count from the end
        return tuple(head) in set(self)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, np.argwhere(self.mask).tolist())

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSet) and np.array_equal(self.mask, other.mask)

    def __hash__(self) -> int:
        # masks of two shapes may have the same bytes
        return hash((self.shape, self.mask.tobytes()))

    def __repr__(self) -> str:
        return f"HeadSet.of({list(self)}, {self.shape})"

    def __or__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.mask | self._mask_of(other))

    def __and__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.mask & self._mask_of(other))

    def __sub__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.mask & ~self._mask_of(other))

    def __invert__(self) -> HeadSet:
        return HeadSet(~self.mask)

    def _mask_of(self, other: HeadSet) -> np.ndarray:
        """The mask of a set to combine with this one."""
        _check_shape("heads to combine with a set", other.shape, self.shape)
        return other.mask

    def check(self, shape: tuple[int, int]) -> None:
        """Check that a model can use these heads.

        Parameters
        ----------
        shape : tuple of int
            (layers, heads) of the model.

        Raises
        ------
        ValueError
            The set is empty, or of a model of another shape.
        """
        if not self:
            raise ValueError(
                "no heads: take at least one, such as the top 5 % of a ranking"
            )
        _check_shape("heads", self.shape, shape)

    def to_duo_attention(
        self, path: str | Path, kv_heads: int, *, sinks: int, window: int
    ) -> None:
        """Write the heads as a pattern that DuoAttention (arXiv 2410.10819) and kvpress read.

        Parameters
        ----------
        path : str or Path
            Folder; gets full_attention_heads.tsv, (layers, KV heads) with 1 where any query head of the KV group is in
            the set, and config.json.
        kv_heads : int
            KV heads of each layer of the model.
        sinks, window : int
            Of the streaming heads, as `HybridAttention` takes them. DuoAttention's recent_size counts the position
            itself, and is one more than the window.

        Raises
        ------
        ValueError
            The query heads of a layer are not a multiple of `kv_heads`.
        """
        layers, heads = self.shape
        if heads % kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads}: the {heads} query heads of a layer are not a multiple of that"
            )
        # DuoAttention decides for KV heads: one full query head keeps the keys of its group
        groups = self.mask.reshape(layers, kv_heads, -1).any(2)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / "full_attention_heads.tsv", groups, fmt="%.1f", delimiter="\t")
        config = {"sink_size": sinks, "recent_size": window + 1}
        (folder / "config.json").write_text(json.dumps(config) + "\n")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_shape(what: str, shape: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raise ValueError where heads of one model meet another."""
    if tuple(shape) != tuple(wanted):
        raise ValueError(
            f"{what} of a model with {_times(shape)} heads, but this one has {_times(wanted)}: "
            "rank the heads of this model"
        )


def _by_group(values: np.ndarray, group: int) -> np.ndarray:
    """Values (layers, heads) as (layers, KV heads, group)."""
    layers, heads = values.shape
    if heads % group:
        raise ValueError(
            f"group={group}: the {heads} query heads of a layer are not a multiple of that"
        )
    return values.reshape(layers, -1, group)  # query heads of one KV head are neighbours


class HeadRanking:
    """Heads from highest to lowest score.

    Parameters
    ----------
    values : array of float, shape (layers, heads)
        Finite scores. Heads with equal scores are in the order layer, head.
    name : str
        What the scores are, for legends and tables.
    provenance : dict, optional
        What made the scores (model, revision, digest of the weights, ...), as JSON can hold it.

    Attributes
    ----------
    values : ndarray of float64, shape (layers, heads)
    order : ndarray of int64, shape (layers * heads, 2)
        Pairs (layer, head), best first.
    shape : tuple of int
        (layers, heads) of the model.
    name : str
    provenance : dict

    Raises
    ------
    ValueError
        Scores are not finite, or not of two dimensions.
    """

    def __init__(self, values: np.ndarray, name: str = "", provenance: dict | None = None):
        self.values = np.array(values, float)
        if self.values.ndim != 2 or not np.isfinite(self.values).all():
            raise ValueError("a ranking needs finite scores of shape (layers, heads)")
        self.shape = self.values.shape
        # stable, so that ties have one order on every machine
        best_first = np.argsort(-self.values, axis=None, kind="stable")
        self.order = np.stack(np.unravel_index(best_first, self.shape), 1)
        self.name = name
        self.provenance = dict(provenance or {})

    def top(self, share: float, group: int = 1) -> HeadSet:
        """The best heads.

        Parameters
        ----------
        share : float
            Of all heads, in (0, 1]; see `count`.
        group : int
            Query heads of a KV head. Above 1, whole KV groups are taken, by their best head: what hybrid attention can
            keep full at no more than `share` of the KV cache.

        Returns
        -------
        HeadSet

        Raises
        ------
        ValueError
            The share is out of range, or the query heads of a layer are not a multiple of `group`.
        """
        if group == 1:
            return HeadSet.of(self.order[: self.count(share)], self.shape)
        # a mean would hide the one retrieval head of a group among its idle ones
        groups = HeadRanking(_by_group(self.values, group).max(2))
        return HeadSet(np.repeat(groups.top(share).mask, group, axis=1))

    def bottom(self, share: float) -> HeadSet:
        """The last heads, as many as `top` has."""
        return HeadSet.of(self.order[-self.count(share) :], self.shape)

    def count(self, share: float) -> int:
        """How many heads a share in (0, 1] is: rounded to the nearest number, and at least one."""
        return _count(share, len(self.order))

    def check(self, mllm: MLLM) -> None:
        """Check that this is a ranking of a model's heads.

        Parameters
        ----------
        mllm : MLLM

        Raises
        ------
        ValueError
            The ranking is of a model of another shape or, as far as `provenance` tells, of other weights.
        """
        _check_shape(repr(self), self.shape, mllm.shape)
        check_model(self.provenance, mllm)

    def save(self, path: str | Path) -> None:
        """Write name, shape, scores and provenance, with the model and its revision, to a JSON file."""
        content = {
            "name": self.name,
            "shape": self.shape,
            "provenance": self.provenance,
            "values": self.values.tolist(),
        }
        Path(path).write_text(json.dumps(content) + "\n")

    def to_retrieval_head(self, path: str | Path) -> None:
        """Write the scores as Retrieval_Head (arXiv 2404.15574), HeadKV (arXiv 2410.19258) and others read them.

        Parameters
        ----------
        path : str or Path
            A JSON file of one line, ``{"layer-head": [score], ...}``; it does not say which model it is for.
        """
        heads = np.ndenumerate(self.values)
        lists = {f"{layer}-{head}": [score] for (layer, head), score in heads}
        Path(path).write_text(json.dumps(lists) + "\n")

    @classmethod
    def load(cls, path: str | Path, mllm: MLLM | None = None) -> HeadRanking:
        """Read a ranking; its `provenance` and its repr say which model it is for.

        Parameters
        ----------
        path : str or Path
            A JSON file of `save`, or one of Retrieval_Head, whose scores for each head are averaged.
        mllm : MLLM, optional
            The model that is to use it: another's ranking is refused, see `check`.

        Returns
        -------
        HeadRanking

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file holds something else, scores that are not of the shape that it states, or no score for some head;
            the ranking is of another model.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text())
            if "values" in content:
                ranking = cls(content["values"], content["name"], content["provenance"])
                if list(ranking.shape) != content["shape"]:
                    raise ValueError(f"its scores are {_times(ranking.shape)}")
            else:
                ranking = cls(_mean_scores(content), path.stem)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a ranking of heads ({error}): write it with HeadRanking.save"
            ) from error
        if mllm is not None:
            ranking.check(mllm)
        return ranking

    def __repr__(self) -> str:
        return f"HeadRanking({self.name}: {_times(self.shape)} heads of {named(self.provenance)})"


def _mean_scores(lists: Mapping[str, list[float]]) -> np.ndarray:
    """The mean of the scores of each "layer-head", (layers, heads)."""
    means = {}
    for key, scores in dict(lists).items():
        if not re.fullmatch(r"\d+-\d+", key):
            raise ValueError(f"its key {key!r} is not layer-head")
        layer, head = key.split("-")
        means[int(layer), int(head)] = np.mean(scores)
    shape = np.max(list(means), axis=0) + 1
    for head in np.ndindex(*shape):
        if head not in means:
            raise ValueError(f"it has no score for head {head}")
    return np.reshape([means[head] for head in np.ndindex(*shape)], shape)


def _count(share: float, n: int) -> int:
    """How many of n heads a share is."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: take a number in (0, 1], such as 0.05 for 5 %")
    # halves go up: Python's round() would take them to the even number
    return max(1, math.floor(share * n + 0.5))


def random_heads(
    ranking: HeadRanking,
    like: HeadSet,
    seed: int = 0,
    match: str | np.ndarray | None = None,
    group: int = 1,
) -> HeadSet:
    """As many heads as `like` has, drawn at random from the other heads of the model: a control for `like`.

    Parameters
    ----------
    ranking : HeadRanking
        Of the model's heads; only its shape counts.
    like : HeadSet
        The heads to stand in for. None of them is drawn.
    seed : int
        Of the draw.
    match : {None, "layer"} or (layers, heads) array
        "layer" draws as many heads in each layer as `like` has there, which keeps the depth. What a layer cannot give,
        because `like` has more than half of it, comes from the nearest layers with heads left, ties at random. Scores,
        such as the norm of what heads write, draw for each head of `like` one of the NEAREST left with a score like it.
    group : int
        Query heads of a KV head. Above 1, whole KV groups are drawn, outside the groups that `like` has heads in.

    Returns
    -------
    HeadSet

    Raises
    ------
    ValueError
        `like` is empty, of another model, or more than half of all heads; `match` is unknown, of another model, or
        scores for groups; the query heads of a layer are not a multiple of `group`.
    """
    by_score = not (match is None or isinstance(match, str))
    if not by_score and match not in (None, "layer"):
        raise ValueError(f"match={match!r}: take None or 'layer', or an array of scores")
    if by_score and group > 1:
        raise ValueError(f"group={group}: scores match heads, not groups")
    like.check(ranking.shape)
    inside = _by_group(like.mask, group).any(2)  # (layers, KV heads)
    wanted = inside.sum(1)  # (layers,)
    n = wanted.sum()
    rng = np.random.default_rng(seed)
    # (others, 2): only heads outside `like`, for a draw with some of its heads would show some of its effect;
    # shuffled, so that the first that fits is a random one
    free = rng.permutation(np.argwhere(~inside))
    if len(free) < n:
        raise ValueError(
            f"{n} of {inside.size} heads leave {len(free)} to draw from: take at most half of all"
        )
    taken = np.arange(len(free)) < n
    if by_score:
        match = np.asarray(match, float)
        _check_shape("the scores to match", match.shape, ranking.shape)
        if not np.isfinite(match).all():
            raise ValueError(
                "the scores to match are not all finite: leave such heads out of both"
            )
        taken = _nearest(match[tuple(free.T)], match[like.mask], rng)
    elif match == "layer":
        taken = _matched(free[:, 0], wanted, rng)
    drawn = HeadSet.of(free[taken], inside.shape)
    return HeadSet(np.repeat(drawn.mask, group, axis=1))


def _matched(
    layers: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Which heads to take, (n,) bool, from shuffled ones of these layers, so that each layer gives what is wanted."""
    taken = np.zeros(len(layers), bool)
    missing = []  # a layer for each head that it could not give
    for layer, count in enumerate(wanted):
        here = np.flatnonzero(layers == layer)[:count]
        taken[here] = True
        missing += [layer] * (count - len(here))
    # layers run short in random order, so that none is always the first to borrow from its neighbours
    for layer in rng.permutation(missing):
        # a taken head is infinitely far; of two layers at one distance, the shuffle says which gives
        distance = np.where(taken, np.inf, np.abs(layers - layer))
        taken[distance.argmin()] = True
    return taken


def _nearest(
    scores: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Which heads to take, (n,) bool, of these scores (n,): for each that is wanted one of those nearest to it."""
    taken = np.zeros(len(scores), bool)
    for score in rng.permutation(wanted):
        left = np.flatnonzero(~taken)
        distance = np.abs(scores[left] - score)
        taken[left[rng.choice(distance.argsort()[:NEAREST])]] = True
    return taken


def agreement(a, b, share: float = 0.05) -> dict[str, np.ndarray]:
    """How far rankings agree, pair by pair.

    Parameters
    ----------
    a, b : array of float, shape (..., layers, heads), or HeadRanking
        Finite scores; leading axes broadcast. Heads with equal scores are ranked in the order layer, head, as
        `HeadRanking` does, except in the first two measures, which know ties.
    share : float
        Of the heads, in (0, 1]; k heads as in `HeadRanking.count`, n is the number of all.

    Returns
    -------
    dict of str to ndarray, shape (...), or to float where a and b are single rankings
        spearman
            Rank correlation over all heads, in [-1, 1]; NaN where the scores of one side are all equal.
        kendall
            tau-b over all heads, in [-1, 1]; NaN likewise.
        overlap
            |A & B| / k of the two sets of k best heads, in [0, 1].
        jaccard
            |A & B| / |A | B|, in [0, 1].
        corrected
            (overlap - k/n) / (1 - k/n), 0 by chance and 1 for the same sets, which is Cohen's kappa
            (doi:10.1177/001316446002000104) of the two; NaN where k = n.
        rbo
            Rank-biased overlap (Webber, Moffat & Zobel 2010, doi:10.1145/1852102.1852106) of the whole rankings,
            (1 - p) * sum over depths d of p^(d-1) |A_d & B_d| / d, in (0, 1]. Beyond depth n both hold all heads and
            agree, which adds p^n. p is 1 - 1/k, but at least 0.5: the first k ranks then have 85 to 89 % of the weight
            (69 % where k = 1), so that it looks about as deep as the top-k measures.

    Raises
    ------
    ValueError
        Scores are not finite or have fewer than two axes; the models have different shapes; the share is out of range.
    """
    a, b = (np.asarray(getattr(x, "values", x), float) for x in (a, b))
    for values in (a, b):
        if values.ndim < 2 or not np.isfinite(values).all():
            raise ValueError("agreement needs finite scores of shape (..., layers, heads)")
    _check_shape("a ranking", b.shape[-2:], a.shape[-2:])
    a, b = (x.reshape(*x.shape[:-2], -1) for x in (a, b))  # (..., n)
    n = a.shape[-1]
    k = _count(share, n)
    # ranks from 1; ordinal ones keep the order of ties
    places = [rankdata(-x, "ordinal", axis=-1) for x in (a, b)]
    depth = np.maximum(*places)  # (..., n), from which on a head is in both sets
    overlap = (depth <= k).sum(-1) / k
    weights, rest = _rbo_weights(k, n)
    # a head counts from that depth on: the sum of the weights of all greater depths, each over its depth
    gain = (weights / np.arange(1, n + 1))[::-1].cumsum()[::-1]
    # kendalltau's own axis argument is younger than the oldest scipy supported, and loops as well
    kendall = np.vectorize(_kendall, otypes=[float], signature="(n),(n)->()")
    with np.errstate(invalid="ignore"):  # 0 / 0 where all scores are equal, or k = n
        return {
            "spearman": (_standard_ranks(a) * _standard_ranks(b)).sum(-1),
            "kendall": kendall(a, b)[()],
            "overlap": overlap,
            # |A | B| = 2 k - |A & B|, both over k
            "jaccard": overlap / (2 - overlap),
            "corrected": (overlap - k / n) / (1 - k / n),
            "rbo": gain[depth - 1].sum(-1) + rest,
        }


def _standard_ranks(flat: np.ndarray) -> np.ndarray:
    """Ranks (..., n) of mean 0 and norm 1: their product is Spearman's correlation."""
    ranks = rankdata(flat, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    return ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    # the method is that of the p-value, which nobody reads: this one is cheap
    return kendalltau(a, b, method="asymptotic").statistic


def _rbo_weights(k: int, n: int) -> tuple[np.ndarray, float]:
    """Weights of the agreement at depths 1 to n, (n,), and at all greater ones together."""
    p = max(0.5, 1 - 1 / k)
    return (1 - p) * p ** np.arange(n), p**n


def chance(n_heads: int, share: float) -> dict[str, float]:
    """Expected values of `agreement` for two independent random rankings without ties, all exact.

    The number of heads that two sets of k share is hypergeometric, which gives the Jaccard index; at depth d the
    expected overlap is d / n, which gives rbo.

    Parameters
    ----------
    n_heads : int
        Number of all heads, at least 2.
    share : float
        As in `agreement`.

    Returns
    -------
    dict of str to float
        With the keys of `agreement`.

    Raises
    ------
    ValueError
        There are fewer than 2 heads, or the share is out of range.
    """
    if n_heads < 2:
        raise ValueError(f"n_heads={n_heads}: a ranking needs at least 2 heads")
    k = _count(share, n_heads)
    common = np.arange(k + 1)
    # not linear in `common`, so that the expectation needs its whole distribution
    jaccard = common / (2 * k - common)
    depth = np.arange(1, n_heads + 1)
    weights, rest = _rbo_weights(k, n_heads)
    return {
        "spearman": 0.0,
        "kendall": 0.0,
        "overlap": k / n_heads,
        "jaccard": float(hypergeom.pmf(common, n_heads, k, k) @ jaccard),
        "corrected": 0.0 if k < n_heads else math.nan,
        # two sets of d heads share d * d / n of them, the part d / n
        "rbo": float(weights @ depth / n_heads + rest),
    }


def universal(scores: Mapping[str, np.ndarray], share: float = 0.05) -> pd.DataFrame:
    """In how many domains each head is among the best.

    Parameters
    ----------
    scores : mapping of str to array of float, shape (layers, heads)
        Scores of one model's heads by domain.
    share : float
        Of the heads, in (0, 1].

    Returns
    -------
    DataFrame
        A row for each head that is among the best in at least one domain, those of most domains first and then in the
        order layer, head: ``layer``, ``head``, a column of bool a domain, and ``domains``, their number.

    Raises
    ------
    ValueError
        There is no domain, or the scores are of two models.
    """
    if not scores:
        raise ValueError("no scores: give those of one domain at least")
    tops = {domain: HeadRanking(values).top(share) for domain, values in scores.items()}
    best = reduce(or_, tops.values())
    table = pd.DataFrame(list(best), columns=["layer", "head"])
    for domain, top in tops.items():
        # a boolean index goes through heads in the order of the rows: layer, head
        table[domain] = top.mask[best.mask]
    table["domains"] = table[list(tops)].sum(axis=1)
    return table.sort_values(
        ["domains", "layer", "head"], ascending=[False, True, True], ignore_index=True
    )
