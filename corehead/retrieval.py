"""Heads as retrievers: pages, frames or cells ranked by the attention that a set of heads pays to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from .evaluation import columns_of
from .models import MLLM
from .ranking import HeadSet
from .samples import Sample
from .scoring import group_mass
from .tagging import TaggedSample

UNITS = ("page", "token")


def units(tagged: TaggedSample, unit: str = "page") -> np.ndarray:
    """What there is to choose from: the number of each token's unit, (L,) int64, and -1 for text.

    Parameters
    ----------
    tagged : TaggedSample
    unit : {"page", "token"}
        "page": every image, with all its tiles or crops; of a video every frame, or group of frames that share tokens.
        "token": every visual token, which in the testbed is a cell of a picture; for `recall`, a matrix of tokens by
        tokens for each question, so not for long contexts.

    Raises
    ------
    ValueError
        No such unit.
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: take one of {', '.join(map(repr, UNITS))}")
    labels = np.full(len(tagged.ids), -1)
    if unit == "token":
        labels[tagged.visual] = np.arange(len(tagged.visual))
        return labels
    first = 0
    for medium in tagged.media:
        # views of an image are tiles of one page, views of a video are its frames
        within = medium.view * (medium.kind == "video")
        labels[medium.tokens] = first + within
        first += int(within.max()) + 1
    return labels


def recall(
    mllm: MLLM,
    samples: Iterable[Sample],
    heads: Mapping[Hashable, HeadSet],
    *,
    ks: Sequence[int] = (1, 3),
    query: str = "question",
    unit: str = "page",
    per_token: bool = False,
    batch_size: int = 16,
) -> pd.DataFrame:
    """How often the evidence is among the first k, for sets of heads that rank pages by their attention.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        A sample with fewer than two units, or without evidence in any, is left out; evidence in text does not count.
    heads : mapping of name to HeadSet
        A named tuple as name gives one column a field, any other the column "heads".
    ks : sequence of int
    query : {"question", "last", "answer"}
        The rows whose attention counts.
    unit : {"page", "token"}
        What is ranked: see `units`.
    per_token : bool
        Rank by the mean over a unit's tokens in place of their sum. The sum is RAM's, and the same where all pages are
        of one size; where they are not, a head that spreads its attention evenly ranks them by length.
    batch_size : int
        Contexts at once.

    Returns
    -------
    DataFrame
        A row a sample and set: the set's name, sample, context, the sample's meta, ``n`` (units), ``relevant`` (those
        with a token of V*), ``place`` (from 1, of the first relevant one; behind others of equal attention), and for
        each k ``recall@k``, relevant ones among the first k over the most that could be there, min(k, relevant), and
        ``chance@k``, what a random order has on average, max(k, relevant) / n.

    Raises
    ------
    ValueError
        No sample has evidence among two or more units; no such unit; heads of another model.
    """
    for chosen in heads.values():
        chosen.check(mllm.shape)
    samples = list(samples)
    masks = np.stack([chosen.mask for chosen in heads.values()]).astype(np.float32)
    found: dict[str, list[dict]] = {}
    for tagged, context, mass in group_mass(
        mllm, samples, lambda tagged: units(tagged, unit), query, batch_size
    ):
        labels = units(tagged, unit)
        relevant = np.unique(labels[tagged.evidence])
        sizes = np.bincount(labels[labels >= 0])  # tokens of each unit
        relevant = relevant[relevant >= 0]
        if len(sizes) < 2 or not len(relevant):
            continue
        scores = np.einsum("slh,lhu->su", masks, mass[..., : len(sizes)])
        if per_token:
            scores = scores / sizes
        shared = {"sample": tagged.sample.id, "context": context, **tagged.sample.meta}
        shared |= {"n": len(sizes), "relevant": len(relevant)}
        found[tagged.sample.id] = [
            columns_of(name, "heads") | shared | _places(row, relevant, ks)
            for name, row in zip(heads, scores)
        ]
    if not found:
        raise ValueError(
            "no sample has evidence among two or more pages or frames: give such samples, or unit='token'"
        )
    in_order = [found[sample.id] for sample in samples if sample.id in found]
    return pd.DataFrame([row for rows in zip(*in_order) for row in rows])


def _places(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> dict:
    """Where the relevant units stand in the order of the scores (units,)."""
    others = np.delete(scores, relevant)
    # the place of each relevant one, had it the irrelevant ones alone beside it; equal scores are no find
    ahead = np.sort((others >= scores[relevant, None]).sum(1))
    places = ahead + np.arange(1, len(relevant) + 1)
    row = {"place": int(places[0])}
    for k in ks:
        k_units = min(k, len(scores))
        most = min(k_units, len(relevant))
        row[f"recall@{k}"] = (places <= k_units).sum() / most
        row[f"chance@{k}"] = max(k_units, len(relevant)) / len(scores)
    return row
