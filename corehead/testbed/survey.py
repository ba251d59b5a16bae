"""One set of questions for every testbed: ``python -m corehead.testbed.survey`` writes data/results/survey/.

For each trained model and each snapshot of a training run: how right it is, where its attention on the evidence stands
(validation digits), and what is lost on test digits without its top heads, beside controls of the same size. A row of a
model that is not there (snapshots and the largest scales do not ship) is kept as it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from ..ablation import Ablation, Condition
from ..controls import text_entropy
from ..evaluation import evaluate, summary
from ..models import MLLM, load
from ..ranking import HeadRanking, random_heads
from ..scoring import score
from .generator import samples

RETRIEVAL = ("image", "document", "video", "text")
QUESTIONS = 6  # on one context
SHARES = (0.05, 0.1, 0.2)


def survey(
    mllm: MLLM, layouts: dict[str, dict], n: int = 192, draws: int = 5, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Scores, accuracy and ablations of one model.

    Parameters
    ----------
    mllm : a testbed.
    layouts : domain -> layout of its samples, as in `samples`.
    n : questions a domain, a multiple of 6; as many validation digits for the scores as test digits for the answers.
    draws : of random heads.
    seed : of samples and draws.

    Returns
    -------
    dict of DataFrames
        heads : domain, layer, head, and the mean of RAM (question and last token) and of calibrated RAM.
        answers : heads ("intact", "top", "random"; at 5 % also "bottom", "text entropy", "layer"), share, domain, n,
            correct and its 95 % interval over contexts. Random heads are drawn `draws` times, never from the top.
    """
    found, cores = [], {}
    for domain in RETRIEVAL:
        asked = samples(domain, "validation", n, seed, questions=QUESTIONS, **layouts[domain])
        scores = score(mllm, asked, progress=False)
        cores[domain] = scores.core("ram").values
        columns = {
            "ram": cores[domain],
            "ram last": scores.core("ram", "last").values,
            "calibrated": scores.core("calibrated").values,
        }
        layer, head = (x.ravel() for x in np.indices(cores[domain].shape))
        table = {"domain": domain, "layer": layer, "head": head} | {k: v.ravel() for k, v in columns.items()}
        found.append(pd.DataFrame(table))
    ranking = HeadRanking(np.mean(list(cores.values()), 0), "RAM")
    plain = score(mllm, samples("text_only", "validation", n, seed), null=False, progress=False)
    least = SHARES[0]
    conditions = {
        Condition("intact", 0.0): None,
        Condition("bottom", least): Ablation(ranking.bottom(least)),
        Condition("text entropy", least): Ablation(HeadRanking(text_entropy(plain).mean("sample")).top(least)),
    }
    for share in SHARES:
        top = ranking.top(share)
        conditions[Condition("top", share)] = Ablation(top)
        for draw in range(draws):
            conditions[Condition("random", share, draw)] = Ablation(random_heads(ranking, top, seed + draw))
            if share == least:
                conditions[Condition("layer", share, draw)] = Ablation(random_heads(ranking, top, seed + draw, "layer"))
    asked = [s for d in RETRIEVAL for s in samples(d, "test", n, seed, questions=QUESTIONS, **layouts[d])]
    table = evaluate(mllm, asked, conditions, progress=False)
    answers = summary(table, ["heads", "share", "domain"], ["correct", "logprob"]).reset_index()
    return {"heads": pd.concat(found, ignore_index=True), "answers": answers}


def folders(root: Path) -> list[tuple[str, int, Path]]:
    """(model, step, folder) of every trained model, step 0 for its end, and of its snapshots."""
    found = []
    for card in sorted(root.glob("*/training.json")):
        if "layouts" not in json.loads(card.read_text()):  # the pretrained row knows other tasks
            continue
        name = card.parent.name
        found.append((name, 0, card.parent))
        found += [(name, int(p.name), p) for p in sorted(card.parent.glob("snapshots/*"))]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbeds", type=Path, default=Path("data/testbed"))
    parser.add_argument("--out", type=Path, default=Path("data/results/survey"))
    parser.add_argument("--models", nargs="+", help="these alone")
    parser.add_argument("--n", type=int, default=192, help="questions a domain, a multiple of 24")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, step, folder in folders(options.testbeds):
        if options.models and name not in options.models:
            continue
        mllm = load(folder)
        run = folder.parent.parent if step else folder  # a snapshot is asked what the finished model is asked
        card = json.loads((run / "training.json").read_text())
        # contexts of the long curriculum take twenty times the time, and snapshots are many
        fewer = step or card["recipe"]["curriculum"] == "long"
        tables = survey(mllm, card["layouts"], options.n // 4 if fewer else options.n)
        parameters = sum(p.numel() for p in mllm.model.parameters())
        tables["models"] = pd.DataFrame(
            [dict(family=mllm.family.name, parameters=parameters, layers=mllm.n_layers, heads=mllm.n_heads)]
        )
        for kind, table in tables.items():
            table.insert(0, "step", step)
            table.insert(0, "model", name)
            path = options.out / f"{kind}.csv"
            if path.exists():
                old = pd.read_csv(path)
                table = pd.concat([old[(old.model != name) | (old.step != step)], table])
            table.sort_values(["model", "step"], kind="stable").round(4).to_csv(path, index=False)
        print(
            name,
            step or "",
            tables["answers"].pivot(index=["heads", "share"], columns="domain", values="correct").round(2),
        )


if __name__ == "__main__":
    main()
