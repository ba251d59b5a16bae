"""Figures show what they should, and rebuild to the same bytes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ask, film, image_part, picture, tiny, video_part
from matplotlib.collections import PatchCollection

import corehead as ch
from corehead import plots
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
