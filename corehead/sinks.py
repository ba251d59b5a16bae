"""Attention sinks: the few tokens, also visual ones (arXiv 2503.03321), that every row looks at, whatever is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
import xarray as xr

from .attention import Call, Hook
from .batching import run_unpadded
from .models import MLLM
from .samples import Sample
from .scoring import group_mass
from .tagging import TaggedSample

THRESHOLD = (
    5.0  # times as much attention as a prompt's tokens of the same kind draw on average
)
KINDS = ("evidence", "other", "sinks in evidence", "other sinks")


class DrawnReader(Hook):
    """Sums what every key of one sequence draws from the rows behind it, over all layers and heads.

    Parameters
    ----------
    rows : int
        So many first rows are read.
    tokens : int
        Of the sequence.
    """

    def __init__(self, rows: int, tokens: int):
        self.rows = np.arange(rows)
        self.drawn = torch.zeros(tokens, dtype=torch.float64)

    def read(self, call: Call, rows: torch.Tensor, weights: torch.Tensor) -> None:
        # what a token draws from itself says nothing of what others see in it
        behind = torch.arange(call.n, device=call.device) < (call.first + rows)[:, None]
        self.drawn[: call.n] += (weights[0] * behind).sum((0, 1)).cpu()


def drawn_attention(mllm: MLLM, tagged: TaggedSample) -> np.ndarray:
    r"""How much attention each token of a prompt draws, (N,), over what it would draw were all rows even.

    .. math:: \frac{\sum_{i > j} \bar A_{ij}}{\sum_{i > j} 1 / (i + 1)}

    over the rows i of the prompt behind token j, the mean over all heads in place of A. A row has the more keys the
    later it stands, so that without the denominator early tokens would seem to draw more. NaN for the last token.
    """
    length = tagged.last + 1
    # the answer's rows are left out, as nobody knows them when the question is asked
    reader = DrawnReader(length, len(tagged.ids))
    run_unpadded(mllm, [tagged], reader.everywhere(mllm))
    drawn = reader.drawn[:length].numpy() / math.prod(mllm.shape)
    even = 1 / np.arange(1, length + 1)
    # of the rows strictly behind each token
    even = even[::-1].cumsum()[::-1] - even
    even[-1] = np.nan
    return drawn / even


def find_sinks(
    mllm: MLLM,
    samples: Iterable[Sample],
    among: str = "visual",
    threshold: float = THRESHOLD,
) -> pd.DataFrame:
    """Which tokens are sinks.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        One forward pass each, all of whose rows are read.
    among : {"visual", "text"}
        "text": the other tokens in front of the question, but for the first, a sink that has a group of its own in
        `score`.
    threshold : float
        A token is a sink where it draws more than so many times the mean of the prompt's tokens of its kind, by
        `drawn_attention`. The mean is over all heads, which keeps evidence out: a few heads look at it, from a few
        rows. (The paper finds sinks by single dimensions of the hidden states, which differ from model to model.)

    Returns
    -------
    DataFrame
        A row a token: sample, context (the sample), the sample's meta, token (its index), edge (it looks at the border
        of its picture), evidence (it is in V*), drawn (over the mean), sink. Samples without such tokens have none.

    Raises
    ------
    ValueError
        No sample has such tokens; `among` misspelt.
    """
    if among not in ("visual", "text"):
        raise ValueError(f"among={among!r}: take 'visual' or 'text'")
    tables = []
    for sample in samples:
        tagged = mllm.tag(sample)
        # too few rows follow the question's own tokens to tell
        end = tagged.question[0] if len(tagged.question) else tagged.last
        of_text = np.setdiff1d(np.arange(1, end), tagged.visual)
        tokens = tagged.visual if among == "visual" else of_text
        if not len(tokens):
            continue
        drawn = drawn_attention(mllm, tagged)[tokens]
        drawn /= drawn.mean()
        columns = {"sample": sample.id, "context": sample.id, **sample.meta}
        columns |= {
            "token": tokens,
            "edge": _at_edge(tagged)[tokens],
            "evidence": np.isin(tokens, tagged.evidence),
            "drawn": drawn,
            "sink": drawn > threshold,
        }
        tables.append(pd.DataFrame(columns))
    if not tables:
        fix = "give samples with media, or text in front of the question"
        raise ValueError(f"no sample has {among} tokens: {fix}")
    return pd.concat(tables, ignore_index=True)


def _at_edge(tagged: TaggedSample) -> np.ndarray:
    """(L,) bool, tokens that look at the border of their image or frame."""
    edge = np.zeros(len(tagged.ids), bool)
    for medium in tagged.media:
        _, height, width = medium.size
        left, top, right, bottom = medium.boxes.T
        # NaN, of tokens that look at nothing, compares as false
        at = (left <= 0) | (top <= 0) | (right >= width) | (bottom >= height)
        edge[medium.tokens[at]] = True
    return edge


def mass_beside_sinks(
    mllm: MLLM, samples: Iterable[Sample], tokens: pd.DataFrame, query: str = "question"
) -> xr.DataArray:
    """Attention on visual tokens, or on text, with a group of their own for sinks.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        Samples of which no token is in the table are left out.
    tokens : DataFrame
        From `find_sinks`, of the same samples.
    query : {"question", "last", "answer"}
        The mean over these rows.

    Returns
    -------
    DataArray (sample, kind, layer, head)
        Of kind "evidence" and "other", sinks left out, and "sinks in evidence" and "other sinks": of samples whose
        evidence is among these tokens RAM is the first and the third, RAM without sinks the first alone; the mass of
        these tokens is all four, and without sinks the first two.
    """
    tables = dict(tuple(tokens.groupby("sample")))

    def kinds(tagged: TaggedSample) -> np.ndarray:
        table = tables[tagged.sample.id]
        labels = np.full(len(tagged.ids), -1)
        labels[table.token] = 1 - table.evidence + 2 * table.sink
        return labels

    masses = {}
    for tagged, _, mass in group_mass(
        mllm, [sample for sample in samples if sample.id in tables], kinds, query
    ):
        # a batch without a sink has fewer groups
        missing = len(KINDS) - mass.shape[2]
        full = np.pad(mass, ((0, 0), (0, 0), (0, missing)))
        masses[tagged.sample.id] = full.transpose(2, 0, 1)
    names = [name for name in tables if name in masses]
    return xr.DataArray(
        np.stack([masses[name] for name in names]),
        dims=("sample", "kind", "layer", "head"),
        coords={"sample": names, "kind": list(KINDS)},
    )
