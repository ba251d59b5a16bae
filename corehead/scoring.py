"""Retrieval Attention Mass (RAM) and its variants, from one pass over each context.

For head h of layer l on sample x, with post-softmax attention A,

    RAM(x; l, h) = 1/|Q| * sum over q in Q, v in V* of A_{l,h}(q, v)

and the CoRe score of a head is its mean over samples (arXiv 2606.05843). The context in front of the question is
computed once; each question on it, and the same context with the question "N/A", is a short chunk behind the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from .attention import Call, Measure, Reader, edited, hooks
from .batching import Block, Context, Feed, Packed, batches, pack, run_unpadded
from .models import MLLM
from .ranking import HeadRanking
from .runs import check_model, check_new, digest, named, provenance, run
from .samples import Sample, SampleError
from .stats import groups_of, mean_interval
from .tagging import TaggedSample

QUERIES = ("question", "last", "answer")  # the sets Q whose rows are read
# the first four are mass on sets of keys: visual, text and sink make up a row, evidence is part of visual or text
ARRAYS = ("evidence", "visual", "text", "sink", "entropy", "null_evidence", "null_context")
VARIANTS = ("ram", "share", "lift", "calibrated")


@dataclass
class HeadScores:
    """What every head's chosen rows attended to, a row a sample.

    Attributes
    ----------
    data : xarray.Dataset, dimensions (sample, query, layer, head)
        ``evidence, visual, text, sink``: attention mass, mean over the query rows, in [0, 1] (visual + text + sink = 1;
        sink is the first token of the prompt, and evidence is part of visual or text); ``entropy``: mean over the rows,
        in nats; ``null_evidence``, ``null_context``: the mass that the same context gets when the question is "N/A".
        Coordinates on sample: ``context`` (the first sample on the same context), ``n_evidence``, ``n_context`` (tokens
        of the evidence's modality), ``on_text`` (the evidence is text), ``depth`` (where V* stands on average, from 0,
        the start of the prompt, to 1, its end), and the samples' ``meta``, such as ``domain``.
        The attribute ``provenance`` is JSON: model, revision, a digest of weights and configuration, versions,
        processor settings, options, and a digest of the samples.
    failures : DataFrame (sample, reason)
        What was skipped.
    """

    data: xr.Dataset
    failures: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["sample", "reason"])
    )

    @property
    def provenance(self) -> dict:
        return json.loads(self.data.attrs["provenance"])

    @property
    def samples(self) -> pd.DataFrame:
        """A row a sample: its name and all coordinates, of which `stats.groups_of` makes the groups of an interval."""
        coords = self.data.coords.items()
        return pd.DataFrame({name: c.values for name, c in coords if c.dims == ("sample",)})

    def per_sample(self, variant: str = "ram", query: str = "question") -> xr.DataArray:
        """Scores of every head on every sample.

        Parameters
        ----------
        variant : {"ram", "share", "lift", "calibrated"}
            "ram" is the mass on V* (arXiv 2606.05843); "share", that mass over the mass on all tokens of the evidence's
            modality (VERA, arXiv 2602.10146); "lift", the share over the share of tokens |V*| / |V|; "calibrated", RAM
            less the RAM of the question "N/A" on the same context (arXiv 2605.27243).
        query : {"question", "last", "answer"}
            The rows Q: the question's tokens, the prompt's last token, or the answer's tokens.

        Returns
        -------
        DataArray (sample, layer, head)
            NaN where a sample has no evidence or no such rows.

        Raises
        ------
        ValueError
            No such variant or query.
        """
        if variant not in VARIANTS:
            raise ValueError(
                f"variant={variant!r}: take one of {', '.join(map(repr, VARIANTS))}"
            )
        if query not in QUERIES:
            raise ValueError(
                f"query={query!r}: take one of {', '.join(map(repr, QUERIES))}"
            )
        data = self.data.sel(query=query, drop=True)
        # without V* there is nothing to retrieve: NaN, which means leave out, and not a 0 that would pull them down
        out = data.evidence.where(data.n_evidence > 0)
        if variant == "calibrated":
            out = out - data.null_evidence
        # how much a head looks at the evidence's modality at all cancels out
        if variant in ("share", "lift"):
            out = out / xr.where(data.on_text, data.text, data.visual)
        # about 1 for a head that spreads its mass evenly over the modality, however long the context is
        if variant == "lift":
            out = out / (data.n_evidence / data.n_context)
        return out.transpose("sample", "layer", "head").rename(variant)

    def mean(
        self, variant: str = "ram", query: str = "question", by: str | None = None
    ) -> xr.DataArray:
        """The CoRe score, (layer, head): mean over the samples that have one.

        Parameters
        ----------
        variant, query : str
            See `per_sample`.
        by : str, optional
            A coordinate on samples, such as "domain": the mean of its groups' means, so that each group counts once.
        """
        scores = self.per_sample(variant, query)
        if by is None:
            return scores.mean("sample")
        # first inside each group: a domain with more samples would otherwise have more of a say
        return scores.groupby(by).mean("sample").mean(by)

    def summary(
        self, *variants: str, query: str = "question", by: str = "domain"
    ) -> pd.DataFrame:
        """CoRe scores of every head with 95 % intervals.

        Parameters
        ----------
        *variants, query : str
            See `per_sample`.
        by : str
            A coordinate on samples.

        Returns
        -------
        DataFrame
            A row a group of samples and head: `by`, layer, head, and for each variant its mean, ``variant_low`` and
            ``variant_high``, over contexts and items (`stats.groups_of`).
        """
        tables = []
        for group, part in self.by(by).items():
            factors = groups_of(part.samples)
            grids = {}
            for variant in variants:
                scores = part.per_sample(variant, query)
                low, high = mean_interval(scores, factors)
                grids |= {
                    variant: scores.mean("sample").values.ravel(),
                    f"{variant}_low": low.ravel(),
                    f"{variant}_high": high.ravel(),
                }
            layer, head = np.indices(scores.shape[1:]).reshape(2, -1)
            tables.append(pd.DataFrame({by: group, "layer": layer, "head": head} | grids))
        return pd.concat(tables, ignore_index=True)

    def by(self, coordinate: str) -> dict[str, HeadScores]:
        """Scores of each group of samples, in the order in which the groups come."""
        labels = self.data[coordinate].values
        return {
            label: HeadScores(self.data.isel(sample=np.flatnonzero(labels == label)))
            for label in dict.fromkeys(labels.tolist())
        }

    def rank(
        self, variant: str = "ram", query: str = "question", by: str | None = None
    ) -> HeadRanking:
        """Heads from highest to lowest CoRe score.

        Raises
        ------
        ValueError
            No sample has such a score.
        """
        scores = self.mean(variant, query, by)
        # HeadRanking would refuse NaN as well, but could not say what is missing
        if not np.isfinite(scores).all():
            raise ValueError(
                f"no sample has a {variant!r} score for query={query!r}: give evidence (and answers)"
            )
        return HeadRanking(
            scores.values, name=f"{variant}/{query}", provenance=self.provenance
        )

    def save(self, path: str | Path) -> None:
        """Write all scores, coordinates, failures and the provenance to a NetCDF file, which xarray opens as well."""
        failures = json.dumps(self.failures.values.tolist())
        data = self.data.assign_attrs(failures=failures)
        for name, coordinate in self.data.coords.items():
            labels = coordinate.values
            long = labels.dtype == int and abs(labels).max() >= 2**31
            # NetCDF 3 has neither None, of which xarray may have made NaN, nor long integers: they become JSON
            if long or labels.dtype == object:
                texts = [json.dumps(None if x != x else x) for x in labels.tolist()]
                data[name] = coordinate.dims, texts, {"format": "json"}
        data.to_netcdf(path, engine="scipy")

    @classmethod
    def load(cls, path: str | Path, mllm: MLLM | None = None) -> HeadScores:
        """Read scores; their `provenance` and their repr say which model they are of.

        Parameters
        ----------
        path : str or Path
            A file of `save`.
        mllm : MLLM, optional
            The model that is to use them: another's are refused.

        Returns
        -------
        HeadScores

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file holds something else, or the scores are another model's (`runs.check_model`).
        """
        try:
            data = xr.load_dataset(path, engine="scipy")
            failures = json.loads(data.attrs.pop("failures"))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{path} is not a file of scores: write it with HeadScores.save"
            raise ValueError(problem) from error
        for name, coordinate in data.coords.items():
            labels = coordinate.values.tolist()
            if "format" in coordinate.attrs:
                labels = [json.loads(label) for label in labels]
            # as `_dataset` makes them: NetCDF 3 has changed some types
            data[name] = coordinate.dims, labels
        scores = cls(data, pd.DataFrame(failures, columns=["sample", "reason"]))
        if mllm is not None:
            check_model(scores.provenance, mllm)
        return scores

    def __repr__(self) -> str:
        n, layers, heads = (self.data.sizes[name] for name in ("sample", "layer", "head"))
        return (
            f"HeadScores({n} samples, {layers} x {heads} heads of {named(self.provenance)})"
        )


def score(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample],
    *,
    batch_size: int = 16,
    null: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    on_error: str = "record",
    engine: str = "local",
    workers: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every head on samples.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample or TaggedSample
        Samples that follow each other with the same media (or the same text) in front of the question share one
        prefill.
    batch_size : int
        Contexts that run at once, padded on the left.
    null : bool
        Also run the question "N/A", which the "calibrated" variant needs. Not for `TaggedSample` input.
    store : str or Path, optional
        A folder that keeps every finished batch.
    resume : bool
        Go on with what the store has. Without it a store that is not empty is an error.
    on_error : {"record", "raise"}
        "record" notes a sample that fails in `HeadScores.failures` and goes on; "raise" stops.
    engine : {"local", "ray"}
        "ray": over many GPUs or machines. A worker takes `batch_size` contexts at a time, so that the batches are not
        those of "local", and the scores equal to rounding (1e-6); with batch_size=1, to the bit on one kind of device
        with as many threads (on a CPU, Ray gives a worker one).
    workers : int, optional
        For "ray"; None takes one a GPU, or one a CPU where there is no GPU.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    HeadScores
        Samples in the order given.

    Raises
    ------
    ValueError
        Two samples have one id; no sample could be scored; the store belongs to another configuration.
    ImportError
        engine="ray", and Ray is not installed.
    SampleError
        With on_error="raise", what is wrong with a sample, or the layer whose attention is not finite.
    """
    made_by = provenance(mllm, null=null)
    finished = run(
        mllm,
        samples,
        partial(_work, batch_size=batch_size, null=null),
        store=store,
        resume=resume,
        provenance=made_by,
        edited=edited(mllm),
        on_error=on_error,
        engine=engine,
        workers=workers,
        batch_size=batch_size,
        progress=progress,
        description="scoring",
    )
    rows = [
        finished.rows[name, ""] for name in finished.samples if (name, "") in finished.rows
    ]
    if not rows:
        reason = next(iter(finished.failures.values()), "there are no samples")
        raise ValueError(f"no sample could be scored; the first: {reason}")
    failures = pd.DataFrame(finished.failures.items(), columns=["sample", "reason"])
    data = digest([[row["sample"], row["digest"]] for row in rows])
    # of the samples as they are given now: a store keeps what the model saw
    metas = [finished.samples[row["sample"]].meta for row in rows]
    return HeadScores(_dataset(rows, metas, made_by | {"data": data}), failures)


def attention_map(mllm: MLLM, tagged: TaggedSample, query: str = "last") -> np.ndarray:
    """Where every head's rows look, for pictures of a few heads on one sample.

    Parameters
    ----------
    mllm : MLLM
    tagged : TaggedSample
    query : {"question", "last", "answer"}
        The mean over these rows.

    Returns
    -------
    (L, H, N) float32 array
        Attention weights over all tokens.
    """
    # every key is a group of its own, so that the sums are the weights themselves
    weights = mass_on(torch.eye(len(tagged.ids))[None])
    return read_rows(mllm, tagged, query_rows(tagged)[query], weights)[..., :-1].mean(1)


@torch.inference_mode()
def group_mass(
    mllm: MLLM,
    samples: Iterable[Sample],
    groups_of: Callable[[TaggedSample], np.ndarray],
    query: str = "question",
    batch_size: int = 16,
) -> Iterator[tuple[TaggedSample, str, np.ndarray]]:
    """Attention of every head on any groups of tokens, such as pages; the mean over the query rows.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        Those that follow each other on one context share its prefill.
    groups_of : callable
        ``TaggedSample -> (L,)`` int array, the group of each of its tokens from 0, and -1 for none.
    query : {"question", "last", "answer"}
        The rows Q.
    batch_size : int
        Contexts at once.

    Yields
    ------
    tagged : TaggedSample
        Batch by batch, not in the order of the samples.
    context : str
        Name of its context.
    mass : (L, H, G) float32 array
        In [0, 1]; G is at least the number of the sample's groups, and groups that it lacks have no mass.

    Raises
    ------
    ValueError
        Two samples have one id.
    """
    seen: set[str] = set()
    for batch in batches(mllm, samples, batch_size, need_answer=query == "answer"):
        # a batch row for each question: groups may differ between questions on one context
        packed = pack(mllm, batch, apart=True)
        labels = {(c, k): groups_of(block.tagged) for c, k, block in packed.blocks()}
        n_groups = max(label.max() for label in labels.values()) + 1
        groups = torch.zeros(*packed.roles.roles.shape, n_groups)  # (B, N, G)
        for (c, k), label in labels.items():
            tokens = np.flatnonzero(label >= 0)
            groups[packed.slots[c, k].row, packed.keys(c, k, tokens), label[tokens]] = 1
        wanted = {(c, k): query_rows(b.tagged)[query] for c, k, b in packed.blocks()}
        found = row_means(mllm, packed, wanted, mass_on(groups))
        for c, k, block in packed.blocks():
            check_new(block.tagged.sample.id, seen)
            seen.add(block.tagged.sample.id)
            context = packed.contexts[c].name_of(block.tagged.sample)
            yield block.tagged, context, found[c, k][..., :-1]


def query_rows(tagged: TaggedSample) -> dict[str, np.ndarray]:
    """Tokens of every query set Q, in the order of QUERIES."""
    return {
        "question": tagged.question,
        "last": np.array([tagged.last]),
        "answer": tagged.answer,
    }


def mass_on(groups: torch.Tensor) -> Measure:
    """Measures sums of attention over groups of keys and, behind them, the row's entropy in nats: (B, r, H, G + 1).

    Parameters
    ----------
    groups : (B, N, G) float32 tensor
        Membership of each key in each of G groups.
    """

    def measure(call: Call, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        members = groups[:, : call.n].to(call.device)
        mass = (weights.flatten(1, 2) @ members).unflatten(1, weights.shape[1:3])
        entropy = torch.special.entr(weights).sum(-1, keepdim=True)
        return torch.cat([mass, entropy], -1).transpose(1, 2)

    return measure


def read_rows(
    mllm: MLLM, tagged: TaggedSample, rows: np.ndarray, measure: Measure
) -> np.ndarray:
    """What is measured at rows of one sample that runs alone, (L, R, ...); see `Reader`."""
    reader = Reader(rows, measure)
    run_unpadded(mllm, [tagged], reader.everywhere(mllm))
    return reader.result()[:, 0]


def row_means(
    mllm: MLLM, packed: Packed, tokens: Mapping[tuple, np.ndarray], measure: Measure
) -> dict[tuple, np.ndarray]:
    """Run a batch; of what is measured at some tokens of its blocks the means, (L, ...).

    Parameters
    ----------
    mllm : MLLM
    packed : Packed
    tokens : mapping of (context, block, ...) to (n,) int64 array
        Of the block's full sequence; without tokens there is no mean.
    measure : callable
        See `Reader`.
    """
    keys = {job: packed.keys(*job[:2], of) for job, of in tokens.items() if len(of)}
    # one union of rows for the whole batch, read in one pass; each takes its own from it below
    reader = Reader(np.unique(np.concatenate(list(keys.values()))), measure)
    with hooks(mllm, reader.everywhere(mllm)):
        Feed(mllm, packed).run()
    measured = reader.result()
    means = {}
    for job, at in keys.items():
        rows = np.searchsorted(reader.rows, at)
        means[job] = measured[:, packed.slots[job[:2]].row, rows].mean(1)
    return means


def _work(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample | None],
    lacking: Callable,
    fail: Callable[[SampleError], None],
    *,
    batch_size: int,
    null: bool,
) -> Iterator[list[dict]]:
    """A table row for each sample, a list a batch."""
    for batch in batches(mllm, samples, batch_size, null=null, fail=fail):
        yield _scored(mllm, batch, fail)


@torch.inference_mode()
def _scored(
    mllm: MLLM, batch: list[Context], fail: Callable[[SampleError], None]
) -> list[dict]:
    """Run a batch of contexts: a table row a sample."""
    packed = pack(mllm, batch)
    found = _read(mllm, packed)
    rows = []
    for c, k, block in packed.blocks():
        if not block.null:
            context = packed.contexts[c]
            # samples with one answer share a null block: its sums are over all sets of evidence
            null = found.get((c, context.null_of(block)), {})
            try:
                row = _table_row(block, found[c, k], null)
                rows.append(row | {"context": context.name_of(block.tagged.sample)})
            except SampleError as error:
                fail(error)
    return rows


# query set -> (L, H, groups + 1): what `mass_on` measures, the mean over its rows
Reading = dict[str, np.ndarray]


def _read(mllm: MLLM, packed: Packed) -> dict[tuple[int, int], Reading]:
    """Run a batch, reading the rows of every query set of each (context, block).

    Groups of keys: visual, text, sink (the first token, which is neither), then the sets of evidence.
    """
    evidence = packed.roles.evidence.transpose(1, 2).float()  # (B, N, sets)
    kinds = torch.zeros(*evidence.shape[:2], 3)  # (B, N, visual / text / sink)
    wanted = {}
    for c, k, block in packed.blocks():
        row = packed.slots[c, k].row
        first = packed.keys(c, k, np.arange(1))[0]
        kinds[row, packed.keys(c, k, block.tagged.visual), 0] = 1
        # the row's other questions count as text, but have no weight: blocks do not see each other
        kinds[row, first:, 1] = 1 - kinds[row, first:, 0]
        kinds[row, first] = torch.tensor([0.0, 0.0, 1.0])
        for query, tokens in query_rows(block.tagged).items():
            wanted[c, k, query] = tokens
    means = row_means(mllm, packed, wanted, mass_on(torch.cat([kinds, evidence], 2)))
    found: dict[tuple[int, int], Reading] = {}
    for (c, k, query), mean in means.items():
        found.setdefault((c, k), {})[query] = mean
    return found


def _table_row(block: Block, own: Reading, null: Reading) -> dict:
    """One sample's row of the table: arrays (query, layer, head) by name."""
    tagged = block.tagged
    n_evidence = len(tagged.evidence)
    n_visual = len(tagged.visual)
    on_text = n_evidence > 0 and not np.isin(tagged.evidence, tagged.visual).any()
    # every prompt has a last token
    shape = len(QUERIES), *own["last"].shape[:2]
    out = {name: np.full(shape, np.nan, np.float32) for name in ARRAYS}
    groups = dict(visual=0, text=1, sink=2, evidence=3 + block.owner, entropy=-1)
    for q, query in enumerate(QUERIES):
        if query in own:
            # a weight that is NaN reaches its row's sums: the weights need no pass of their own
            finite = np.isfinite(own[query]).all((1, 2))
            if not finite.all():
                problem = (
                    f"the attention of layer {finite.argmin()} is not finite (NaN or Inf)"
                )
                fix = "Load the model in float32 or bfloat16, or look at its weights"
                tagged.sample.fail("attention", problem, fix)
            for name, group in groups.items():
                out[name][q] = own[query][..., group]
        if query in null:
            # the rows of "N/A" on the V* of the sample's own question: what V* attracts whatever is asked
            out["null_evidence"][q] = null[query][..., groups["evidence"]]
            out["null_context"][q] = null[query][
                ..., groups["text" if on_text else "visual"]
            ]
    return {
        "sample": tagged.sample.id,
        "key": "",
        "n_evidence": n_evidence,
        "n_context": tagged.last + 1 - n_visual if on_text else n_visual,
        "on_text": bool(on_text),
        "depth": float(tagged.evidence.mean() / tagged.last) if n_evidence else np.nan,
        **out,
    }


def _dataset(rows: list[dict], metas: list[dict], attributes: dict) -> xr.Dataset:
    """The table of all rows, with its coordinates."""
    data = {
        name: (("sample", "query", "layer", "head"), np.stack([row[name] for row in rows]))
        for name in ARRAYS
    }
    # as coordinates, so that per_sample() and by() carry them along
    coords: dict = {"query": list(QUERIES), "sample": [row["sample"] for row in rows]}
    for name in ("context", "n_evidence", "n_context", "on_text", "depth"):
        coords[name] = "sample", [row[name] for row in rows]
    # samples of several tasks have different meta: all names, None where a sample lacks one
    for name in dict.fromkeys(name for meta in metas for name in meta):
        coords[name] = "sample", [meta.get(name) for meta in metas]
    return xr.Dataset(data, coords, {"provenance": json.dumps(attributes)})
