"""Figures show what they should, and rebuild to the same bytes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ask, film, image_part, picture, tiny, video_part
from matplotlib.collections import PatchCollection

import corehead as ch
from corehead import plots
from corehead.ranking import universal
from corehead.tagging import Prompt


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_show_tags_lights_the_target_cells(mllm):
    evidence = [ch.Region(0, (0, 0, 40, 40)), ch.Frames(0, [1])]
    tagged = mllm.tag(ask(image_part(picture(70, 130)), video_part(film(4, 60, 60)), evidence=evidence))
    figure = plots.show_tags(tagged)
    lit = sum(
        len(c.get_paths())
        for ax in figure.axes
        for c in ax.collections
        if isinstance(c, PatchCollection) and c.get_linewidth()[0] == 1.5
    )
    cells = np.concatenate([m.tokens[~np.isnan(m.boxes[:, 0])] for m in tagged.image_grid])
    assert lit == np.isin(tagged.target, cells).sum() > 0
    figure.savefig("/dev/null", format="png")


def test_token_kinds_cover_every_token():
    tagged = tiny("qwen3_vl").tag(ask(image_part(picture(64, 64)), "text", evidence=[ch.Region(0, (0, 0, 5, 5))]))
    kinds = np.array(list(plots.KINDS))[plots.token_kinds(tagged)]
    assert (kinds[tagged.target] == "target").all() and (kinds[tagged.question] == "question").all()
    assert (kinds == "visual").sum() == len(tagged.visual) - len(tagged.target)


def test_a_figure_is_rebuilt_to_the_same_bytes_in_the_folder_of_its_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    mllm = tiny("llama")
    prompt = Prompt(mllm, ask("alpha is 5. ", evidence=[ch.Span("alpha")]))
    seen = []
    for _ in range(2):
        plots.save(plots.show_text(prompt.tag(), prompt), "span", "other")
        seen.append([(tmp_path / f"figures/other/span.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert seen[0] == seen[1]
    plots.save(plt.figure(), "empty")
    assert (tmp_path / "figures/empty.pdf").exists()


def test_curves_and_maps_of_scores():
    mllm = tiny("qwen3_vl")
    image = picture(64, 96)
    samples = [
        ask(image_part(image), id=f"s{i}", question=f"{i}?", evidence=[ch.Region(0, (0, 0, 40, 20 + i))])
        for i in range(4)
    ]
    scores = {"image": ch.score(mllm, samples, progress=False)}
    cores = {name: s.core("ram") for name, s in scores.items()}
    core = scores["image"].rank("ram").top(0.2)
    figure = plots.head_maps(cores, core)
    assert len(figure.axes[0].patches) == len(core)
    per_sample = {name: s.per_sample("ram") for name, s in scores.items()}
    _, rho = plots.sorted_curves(per_sample)
    assert rho.rho["image"] == ch.heads_for_share(cores["image"].values)
    assert rho.low["image"] <= rho.rho["image"] <= rho.high["image"]
    plots.layer_profile(per_sample)


def points(**columns) -> pd.DataFrame:
    """A table with an interval around each metric."""
    table = pd.DataFrame(columns)
    for metric in ("correct", "logprob", "margin"):
        if metric in table:
            table[f"{metric}_low"], table[f"{metric}_high"] = table[metric] - 0.1, table[metric] + 0.1
    return table


def test_ablation_curves_begin_at_the_intact_model():
    table = points(
        heads=["top", "top", "bottom", "bottom"] * 2,
        share=[0.05, 0.1] * 4,
        task=["image"] * 4 + ["text_only"] * 4,
        correct=np.linspace(0.1, 0.8, 8),
    )
    whole = pd.Series({"image": 0.97, "text_only": 1.0})
    figure = plots.ablation_curves(table, intact=whole, chance={"image": 0.1}, mark=0.05, level=0.5)
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["image", "text only"]
    [top] = [line for line in left.lines if line.get_label() == "top"]
    np.testing.assert_allclose(top.get_xdata(), [0, 5, 10])
    np.testing.assert_allclose(top.get_ydata(), [0.97, 0.1, 0.2])
    assert len(left.lines) == 5 and len(right.lines) == 4  # chance is known for one of them
    assert len({line.get_marker() for line in left.lines[:2]}) == 2
    figure.savefig("/dev/null", format="png")


def test_dots_selectivity_and_tournament_show_every_row():
    rows = points(mode=["zero", "mean"] * 2, task=["a", "a", "b", "b"], correct=[0.1, 0.2, 0.3, 0.4])
    figure = plots.dots(rows, "correct", rows="mode", panels="task", xlabel="accuracy")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["zero", "mean"] and len(figure.axes) == 2
    columns = {n: [0.5, 0.1] for n in ("retrieval", "rest", "selectivity")}
    ends = {f"{n}_{end}": [0.4, 0.0] if end == "low" else [0.6, 0.2] for n in columns for end in ("low", "high")}
    figure = plots.selectivity(pd.DataFrame(columns | ends, index=["RAM", "random"]))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["RAM", "random"]
    cells = pd.DataFrame(
        [
            dict(variant=v, query=q, damage=0.5, damage_low=0.4, damage_high=0.6)
            for v in ("ram", "lift")
            for q in ("last", "answer")
        ]
    )
    figure = plots.tournament(cells, "damage", "lost")
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.50\n[0.40, 0.60]"] * 4


def test_stability_figures_show_what_they_are_given():
    rows = [
        dict(domain=d, n=n, spearman=0.5, spearman_low=0.4, spearman_high=0.6)
        for d in ("image", "text")
        for n in (5, 50)
    ]
    figure = plots.agreement_curves(pd.DataFrame(rows), {"spearman": 0.0})
    assert len(figure.axes[0].lines) == 3  # and chance
    square = pd.DataFrame(np.eye(3), list("abc"), list("abc"))
    figure = plots.matrices({"one": square, "two": square}, "overlap")
    assert [float(t.get_text()) for t in figure.axes[1].texts] == list(np.eye(3).ravel())
    table = universal({"image": np.eye(4), "text": np.eye(4)[::-1]}, 0.25)
    figure = plots.universal_map(table, (4, 4))
    assert len(figure.axes[0].texts) == len(table) == 8
    lengths = [
        dict(domain="image", what="cells", size=s, heads=h, score=v, low=v - 0.1, high=v + 0.1)
        for h, v in (("CoRe", 0.8), ("rest", 0.2))
        for s in (4, 9)
    ] + [dict(domain="text", what="cells", size=4, heads="CoRe", score=1.5, low=1.4, high=1.6)]
    figure = plots.length_curves(pd.DataFrame(lengths))
    assert figure.axes[0].get_ylim()[1] > 1.5  # one scale that fits all panels


def test_acceleration_figures_show_what_they_are_given():
    dense, stream = np.tril(np.ones((6, 6), int)), np.tril(np.ones((6, 6), int), 0) - np.tril(np.ones((6, 6), int), -3)
    stream[:, 0] = 2
    seen = {"dense": dense, "streaming": stream}
    figure = plots.hybrid_pattern(seen, {name: m[-1] > 0 for name, m in seen.items()})
    assert figure.axes[0].get_title() == "dense"
    below = figure.axes[3].images[0].get_array()
    np.testing.assert_array_equal(below, [[2, 0, 0, 1, 1, 1]])

    rows = dict(correct=[0.9, 0.5, 0.8, 0.7], way=["dense", *["hybrid"] * 3], share=[1, 0.1, 0.2, 0.1])
    table = points(**rows, window=[0, 64, 64, 16])
    figure = plots.dials(table, {"share": dict(window=64), "window": dict(share=0.1)})
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["10%", "20%"]
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["16", "64"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(orig=False), [0.5, 0.8])

    table = points(correct=[0.9, 0.5] * 2, heads=["RAM", "RAM", "random", "random"], share=[1.0, 0.1] * 2)
    table = table.assign(domain="video", speed=[1.0, 3.0] * 2)
    figure = plots.frontier(table, intact=pd.Series({"video": 0.95}))
    assert {t.get_text() for t in figure.axes[0].texts} == {"100%", "10%"}
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(orig=False), [1.0, 3.0])
    assert len({line.get_color() for line in figure.axes[0].lines[:-1]}) == 2

    ways = ["dense", "hybrid 10%", "dense", "hybrid 10%"]
    table = pd.DataFrame({"way": ways, "tokens": [1024, 1024, 4096, 4096], "speed-up": [1, 1.2, 1, 2.0]})
    table["bound"] = [2.0, 1.0, 8.0, 2.0]
    figure = plots.speed_curves({"prefill": table})
    measured, bound = figure.axes[0].lines[:2]
    np.testing.assert_allclose(measured.get_ydata(), [1.2, 2.0])
    np.testing.assert_allclose(bound.get_ydata(), [2.0, 4.0])
    figure = plots.memory_curves({"cache MiB": table.assign(**{"cache MiB": 1.0})})
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1k", "4k"]


def test_figures_of_several_models_show_what_they_are_given():
    rows = [
        {"model": m, "domain": d, "layer": i, "head": h, "ram last": (i + h) / 10}
        for m in ("a", "b")
        for d in ("image", "text")
        for i in range(3)
        for h in range(2)
    ]
    figure = plots.layer_profiles(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0, 0.5, 1])

    table = points(correct=[0.9, 0.1, 0.8], model=["a", "a", "b"], domain="image", heads=["intact", "top", "top"])
    figure = plots.model_dots(table)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]
    intact, top = (line.get_xdata(orig=False) for line in figure.axes[0].lines[:2])
    np.testing.assert_allclose(intact, [0.9, np.nan])
    np.testing.assert_allclose(top, [0.1, 0.8])

    log = pd.DataFrame({"step": [1, 2], "loss": [2.0, 0.1]})
    snapshots = pd.DataFrame({"step": [1, 2], "domain": "text", "correct": [0.1, 0.9], "score": [0.2, 0.8]})
    figure = plots.training_time(log, snapshots)
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), [0.2, 0.8])

    figure = plots.training_agreement(snapshots.rename(columns={"score": "overlap"}), {"overlap": 0.05})
    line, level = figure.axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.8])
    assert level.get_ydata()[0] == 0.05
