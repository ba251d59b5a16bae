"""One set of questions for every testbed: ``python -m corehead.testbed.survey`` writes data/results/survey/.

For each trained model and each snapshot of a training run: how right it is, where its attention on the evidence stands
(validation digits), and what is lost on test digits without its top heads, beside controls of the same size. For each
trained model also what its heads do: how far each alone, and its top together, take an answer to that of a
counterfactual. Rows of a model that is not there (snapshots and the larger scales do not ship) are kept as they were.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import xarray as xr

from ..ablation import Point, curve
from ..controls import text_entropy
from ..evaluation import evaluate
from ..models import MLLM, load
from ..patching import patch, use
from ..ranking import HeadRanking, HeadSet
from ..samples import Sample
from ..scoring import score
from ..stats import summary
from .scenes import counterfactuals, samples

RETRIEVAL = ("image", "document", "video", "text")
QUESTIONS = 6  # on one context
SHARES = (0.05, 0.1, 0.2)
DRAWS = range(20)  # of random heads, at the first of the shares
FEWER = range(5)  # at the others
USED = 0.02  # of the logit difference, recovered by a head alone
# curricula whose models know other tasks or words, which notebooks 3 and 5 ask about
OTHER = ("memory", "apart")


def survey(
    mllm: MLLM, layouts: dict[str, dict[str, int]], n: int = 192
) -> dict[str, pd.DataFrame]:
    """Scores, accuracy and ablations of one model.

    Parameters
    ----------
    mllm : MLLM
        A testbed.
    layouts : dict
        Domain -> layout of its samples, as in `samples`.
    n : int
        Questions a domain, a multiple of 6; as many validation digits for the scores as test digits for the answers.

    Returns
    -------
    dict of pd.DataFrame
        models : family, parameters, layers, heads.
        heads : domain, layer, head, and the mean of RAM (question and last token) and of calibrated RAM.
        answers : heads ("intact", "top", "random"; at 5 % also "bottom", "text entropy", "layer"), share, domain, n,
        correct and its 95 % interval. Random heads are never from the top.
    """

    def ask(split: str) -> list[Sample]:
        return [
            s
            for d in RETRIEVAL
            for s in samples(d, split, n, questions=QUESTIONS, **layouts[d])
        ]

    # heads are chosen on digits that no answer below is about
    scores = score(mllm, ask("validation"), progress=False)
    heads = []
    for domain, part in scores.by("domain").items():
        columns = {
            "ram": part.mean("ram"),
            "ram last": part.mean("ram", "last"),
            "calibrated": part.mean("calibrated"),
        }
        heads.append(xr.Dataset(columns).to_dataframe().reset_index().assign(domain=domain))
    ranking = scores.rank("ram", by="domain")
    # for entropy alone, which needs no evidence and no null question
    plain = score(mllm, samples("text_only", "validation", n), null=False, progress=False)
    sharp = HeadRanking(text_entropy(plain).mean("sample"))
    conditions = (
        {Point("intact", 0.0): None}
        | curve(ranking, SHARES, "top")
        | curve(ranking, SHARES[:1], "random", draws=DRAWS)
        | curve(ranking, SHARES[1:], "random", draws=FEWER)
        | curve(ranking, SHARES[:1], "layer", draws=DRAWS)
        | curve(ranking, SHARES[:1], "bottom")
        | curve(sharp, SHARES[:1], name="text entropy")
    )
    # in one call: media are read once for all conditions
    table = evaluate(mllm, ask("test"), conditions, progress=False)
    size = {"family": mllm.family.name, "parameters": mllm.model.num_parameters()}
    return {
        "models": pd.DataFrame([size | {"layers": mllm.n_layers, "heads": mllm.n_heads}]),
        "heads": pd.concat(heads)[
            ["domain", "layer", "head", "ram", "ram last", "calibrated"]
        ],
        "answers": summary(
            table, ["heads", "share", "domain"], ["correct", "logprob"]
        ).reset_index(),
    }


class Patched(NamedTuple):
    """A set of patched heads and its size."""

    heads: str
    k: int


def patching(
    mllm: MLLM, layouts: dict[str, dict[str, int]], ram: pd.DataFrame, n: int = 24
) -> dict[str, pd.DataFrame]:
    """What heads do: answers that change to a counterfactual's when heads' outputs do.

    Parameters
    ----------
    mllm : MLLM
        A testbed.
    layouts : dict
        As in `survey`.
    ram : DataFrame
        The table "heads" of `survey`: which heads look.
    n : int
        Pairs a domain: validation digits for single heads, test digits for sets.

    Returns
    -------
    dict of pd.DataFrame
        use : layer, head, use (share of the logit difference that the head alone recovers, at the last prompt token,
        validation digits, mean over the pairs of all domains).
        patched : heads ("top", of which "used" and "only looking", and "all others"), k, domain, n, flipped, recovered
        and their 95 % intervals, test digits.
    """

    def pairs(split: str) -> list[tuple[Sample, Sample]]:
        return [p for d in RETRIEVAL for p in counterfactuals(d, split, n, **layouts[d])]

    by_head = use(mllm, pairs("validation"), progress=False).mean("sample")
    mean = ram.pivot_table(index="layer", columns="head", values="ram").to_numpy()
    top = HeadRanking(mean).top(SHARES[0])
    used = HeadSet(by_head.values >= USED)
    sets = {"top": top, "used": top & used, "only looking": top - used, "all others": ~top}
    named = {Patched(name, len(heads)): heads for name, heads in sets.items() if len(heads)}
    table = patch(mllm, pairs("test"), named, progress=False)
    patched = summary(table, ["heads", "k", "domain"], ["flipped", "recovered"])
    return {
        "use": by_head.to_dataframe("use").reset_index(),
        "patched": patched.reset_index(),
    }


def runs(root: Path) -> Iterator[tuple[str, int, Path, dict]]:
    """(model, step, folder, card) of every trained model that is there, step 0 for its end, and of its snapshots."""
    for path in sorted(root.glob("*/training.json")):
        card, folder = json.loads(path.read_text()), path.parent
        # the grafted model, which has no layouts, knows other tasks as well
        if "layouts" not in card or card["recipe"]["curriculum"] in OTHER:
            continue
        if list(
            folder.glob("*.safetensors")
        ):  # recipe and results ship without weights too
            yield folder.name, 0, folder, card
        for snapshot in sorted(folder.glob("snapshots/*")):
            yield folder.name, int(snapshot.name), snapshot, card


def update(path: Path, table: pd.DataFrame, model: str, step: int) -> None:
    """Replace the rows of a model at a step; CSV for people, parquet for the long table."""
    table.insert(0, "model", model)
    table.insert(1, "step", step)
    read, write = pd.read_csv, pd.DataFrame.to_csv
    if path.suffix == ".parquet":
        read, write = pd.read_parquet, pd.DataFrame.to_parquet
    # rows of other models, and of steps whose weights are gone, are the only record of them
    if path.exists():
        old = read(path)
        table = pd.concat([old[(old.model != model) | (old.step != step)], table])
    write(table.sort_values(["model", "step"], kind="stable").round(4), path, index=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbeds", type=Path, default=Path("data/testbed"))
    parser.add_argument("--out", type=Path, default=Path("data/results/survey"))
    parser.add_argument("--models", nargs="+", help="these alone")
    parser.add_argument(
        "--n", type=int, default=192, help="questions a domain, a multiple of 24"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, step, folder, card in runs(options.testbeds):
        if options.models and name not in options.models:
            continue
        # contexts of the long curriculum take twenty times the time, and snapshots are many
        fewer = step or card["recipe"]["curriculum"] == "long"
        mllm = load(folder)
        n = options.n // 4 if fewer else options.n
        tables = survey(mllm, card["layouts"], n)
        if not step:
            tables |= patching(mllm, card["layouts"], tables["heads"], max(4, n // 8))
        print(
            name,
            step,
            tables["answers"]
            .pivot(index=["heads", "share"], columns="domain", values="correct")
            .round(2),
        )
        for kind, table in tables.items():
            suffix = "parquet" if kind in ("heads", "use") else "csv"
            update(options.out / f"{kind}.{suffix}", table, name, step)


if __name__ == "__main__":
    main()
