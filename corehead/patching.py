"""What heads do, not where they look: outputs of heads on one sample, put into another (interchange interventions).

Two samples differ in nothing but the evidence's content: the same question, another answer. Heads' outputs are recorded
on the second, the *donor*, and put into the first. A head through which the content travels takes the first sample's
answer to the donor's; one that merely looks at the evidence does not (activation patching, arXiv 2202.05262,
2309.16042).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from .ablation import Ablation, Reference
from .evaluation import evaluate
from .models import MLLM
from .ranking import HeadSet
from .samples import Sample

Pairs = Iterable[tuple[Sample, Sample]]


def answered(mllm: MLLM, pairs: Pairs, **options) -> list[tuple[Sample, Sample]]:
    """The pairs of which the model answers both samples right: others have no content to move.

    Parameters
    ----------
    mllm : MLLM
    pairs : iterable of (Sample, Sample)
    **options
        Of `evaluate`: batch_size, store, resume, progress.

    Returns
    -------
    list of (Sample, Sample)
        Empty where there are none, as in a model that is too weak for the task.
    """
    pairs = list(pairs)
    if not pairs:
        return []
    found = evaluate(mllm, [sample for pair in pairs for sample in pair], **options)
    return _both_right(pairs, found.set_index("sample"))


def _both_right(
    pairs: list[tuple[Sample, Sample]], intact: pd.DataFrame
) -> list[tuple[Sample, Sample]]:
    """The pairs of which both samples are right in a table of answers by sample."""
    right = set(intact.index[intact.correct])
    return [pair for pair in pairs if right.issuperset(sample.id for sample in pair)]


def patch(
    mllm: MLLM,
    pairs: Pairs,
    heads: Mapping[Any, HeadSet],
    *,
    phase: str = "last",
    only_right: bool = True,
    **options,
) -> pd.DataFrame:
    """Put sets of heads' outputs on donors into their counterfactuals, one set after the other.

    Inside `corehead.ablate` the donors' outputs are recorded on the ablated model as well, so that what is measured is
    what the heads do in a model without the others.

    Parameters
    ----------
    mllm : MLLM
    pairs : iterable of (Sample, Sample)
        Sample and donor, with the other's answer as foil.
    heads : mapping of name to HeadSet
        A named tuple as name gives one column a field, any other the column "condition".
    phase : str
        The rows that are patched, as in `Ablation`: "last" (the last token of the prompt), "question", "context" or
        "both" (all).
    only_right : bool
        Take no pairs but those that `answered` leaves. Off, all are taken, whatever is ablated.
    **options
        Of `evaluate`: batch_size, store, resume, progress.

    Returns
    -------
    DataFrame
        The rows of `evaluate` of the pairs' first samples, with:

        flipped
            The donor's answer has become the likeliest.
        moved
            How far the logit of the answer less that of the donor's answer moved towards what it is on the donor.
        recovered
            The same in units of the mean way between the two over all these pairs: 0 nothing, 1 all of it. Its mean
            over pairs is the share of the logit difference recovered.

    Raises
    ------
    ValueError
        There are no pairs, or none of which both are answered right; heads of another geometry.
    SampleError
        A sample cannot be tagged, lacks a foil, or its foil does not differ from its answer.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("no pairs: give samples and their counterfactuals")
    # once, for each of them runs twice
    tagged = {sample.id: mllm.tag(sample) for side in zip(*pairs) for sample in side}
    intact = evaluate(mllm, tagged.values(), **options).set_index("sample")
    if only_right:
        pairs = _both_right(pairs, intact)
    if not pairs:
        raise ValueError(
            "no pair of which both samples are answered right: patch a model that can do the task"
        )
    donor_of = {base.id: donor.id for base, donor in pairs}
    bases, donors = ([tagged[sample.id] for sample in side] for side in zip(*pairs))
    base = intact.loc[list(donor_of)]
    donor = intact.loc[list(donor_of.values())].set_axis(base.index)
    reference = Reference(mllm, donors, donor_of)
    conditions = {
        name: Ablation(set_, "patch", phase, reference) for name, set_ in heads.items()
    }
    if options.get("store") is not None:
        options |= {"resume": True}  # it holds the table above
    patched = evaluate(mllm, bases, conditions, **options)
    # the donor's answer is the foil's, so that its contrast counts the other way
    way = (base.contrast + donor.contrast).mean()
    moved = patched["sample"].map(base.contrast) - patched.contrast
    return patched.assign(moved=moved, recovered=moved / way)


def use(mllm: MLLM, pairs: Pairs, **options) -> xr.DataArray:
    """A score of use for every head: the share of the logit difference that it alone recovers.

    Parameters
    ----------
    mllm, pairs, **options
        As in `patch`: phase, only_right and those of `evaluate`.

    Returns
    -------
    DataArray (sample, layer, head)
        Its mean over samples ranks heads by what they do, as that of RAM does by where they look.
    """
    singles = {head: HeadSet.of([head], mllm.shape) for head in np.ndindex(mllm.shape)}
    table = patch(mllm, pairs, singles, **options)
    by_head = table.pivot(index="sample", columns="condition", values="recovered")
    values = by_head[list(singles)].to_numpy().reshape(-1, *mllm.shape)
    return xr.DataArray(
        values,
        dims=("sample", "layer", "head"),
        coords={"sample": by_head.index.to_numpy()},
    )
