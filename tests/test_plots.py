"""Figures show what they should, and rebuild to the same bytes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ask, film, image_part, picture, tiny, video_part
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_hex
from PIL import Image

import corehead as ch
from corehead import plots, results

DOMAINS = ("image", "document", "video", "text")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def lines_of(ax) -> dict:
    """The lines of a panel by name, those without one left out."""
    return {
        line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")
    }


def framed(figure) -> int:
    """Cells with the frame of V*."""
    patches = [
        c for ax in figure.axes for c in ax.collections if isinstance(c, PatchCollection)
    ]
    return sum(len(c.get_paths()) for c in patches if c.get_linewidth()[0] == 1.5)


def points(**columns) -> pd.DataFrame:
    """A table with an interval around each metric."""
    table = pd.DataFrame(columns)
    for metric in ("correct", "logprob", "score"):
        if metric in table:
            table[f"{metric}_low"], table[f"{metric}_high"] = (
                table[metric] - 0.1,
                table[metric] + 0.1,
            )
    return table


# --- samples and their tokens


def test_tags_light_the_cells_of_the_evidence(mllm):
    evidence = [ch.Region(0, (0, 0, 40, 40)), ch.Frames(0, [1])]
    tagged = mllm.tag(
        ask(image_part(picture(70, 130)), video_part(film(4, 60, 60)), evidence=evidence)
    )
    figure = plots.tags({"a picture and a film": tagged})
    cells = np.concatenate([m.tokens[~np.isnan(m.boxes[:, 0])] for m in tagged.media])
    assert framed(figure) == np.isin(tagged.evidence, cells).sum() > 0
    titles = [ax.get_title() for ax in figure.axes]
    # of a picture that is seen twice, as a whole and in pieces, each says how fine it is
    seen, n = np.unique(tagged.media[0].view, return_counts=True)
    assert titles[0] == "image 0" if len(seen) == 1 else titles[0].startswith("image 0: ")
    assert len(seen) == 1 or int(titles[0].split()[-2]) <= n[0]
    assert titles[-2].startswith("frame")
    figure.savefig("/dev/null", format="png")


def test_the_strip_counts_tokens_of_every_kind():
    sample = ask(image_part(picture(64, 64)), "text", evidence=[ch.Region(0, (0, 0, 5, 5))])
    sample.messages.insert(0, {"role": "system", "content": "Be brief."})
    tagged = tiny("qwen3_vl").tag(sample)
    figure = plots.tags({"one": tagged, "the same": tagged})
    labels = [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]
    others = len(tagged.visual) - len(tagged.evidence)
    assert f"V* ({len(tagged.evidence)})" in labels and f"other visual ({others})" in labels
    assert f"question ({len(tagged.question)})" in labels
    strip = figure.subfigs[3].axes[0].images[0].get_array()[0]
    assert {to_hex(rgba) for rgba in strip[tagged.evidence]} == {plots.EVIDENCE}
    assert {to_hex(rgba) for rgba in strip[tagged.answer]} == {plots.TOKENS["answer"]}


def test_attention_is_shown_where_most_of_it_is_on_one_scale():
    tagged = tiny("qwen3_vl").tag(
        ask(video_part(film(6, 60, 60)), evidence=[ch.Frames(0, [0, 1])])
    )
    medium = tagged.media[0]
    each = np.array([0.02, 0.01, 0.04])[medium.view]
    weights = np.zeros(len(tagged.ids))
    weights[medium.tokens] = each
    figure = plots.attention(tagged, weights, most=2)
    sums = [each[medium.view == view].sum() for view in (0, 2)]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [f"frame 0-1: {sums[0]:.2f}", f"frame 4-5: {sums[1]:.2f}"]
    opacity = [ax.collections[0].get_facecolor()[:, 3] for ax in figure.axes]
    np.testing.assert_allclose(opacity[0], 0.4)
    np.testing.assert_allclose(opacity[1], 0.8)
    assert framed(figure) == (medium.view == 0).sum()
    plots.attention(tagged, 0 * weights).savefig(
        "/dev/null", format="png"
    )  # nothing to divide by


def test_shaded_text_shades_words_and_sums_up_pictures():
    mllm = tiny("qwen3_vl")
    sample = ask(image_part(picture(64, 64)), evidence=[ch.Region(0, (0, 0, 5, 5))])
    sample.messages.insert(0, {"role": "system", "content": "Be brief."})
    tagged = mllm.tag(sample)
    weights = np.zeros(len(tagged.ids))
    weights[0] = 0.5  # the sink
    weights[tagged.visual] = 0.1
    weights[tagged.question[0]] = 0.02
    html = plots.shaded_text(tagged, mllm.tokenizer, weights)
    spans = html.split("<span ")[1:]
    assert len(spans) == len(tagged.ids) - len(tagged.visual) + 1
    n = len(tagged.visual)
    [run] = [span for span in spans if f"[{n} visual: {0.1 * n:.2f}]" in span]
    assert plots.EVIDENCE in run and html.count(plots.EVIDENCE) == 1
    darkest = to_hex(plt.get_cmap(plots.NUMBERS)(0.6))
    shaded = [i for i, span in enumerate(spans) if darkest in span]
    assert shaded == [0, tagged.question[0] - n + 1]
    assert "<|vision_start|>" not in html and "&lt;|vision_start|&gt;" in html


def test_overlays_show_the_view_that_is_looked_at_most():
    tagged = tiny("qwen3_vl").tag(
        ask(video_part(film(4, 60, 60)), evidence=[ch.Frames(0, [0, 1, 2, 3])])
    )
    medium = tagged.media[0]
    weight = np.zeros(len(tagged.ids))
    weight[medium.tokens[medium.view == 1]] = 0.1  # the second pair of frames
    figure = plots.overlays({"Where?": (tagged, {"top": weight, "rest": 1 - weight})})
    assert [ax.get_title() for ax in figure.axes] == ["top", "rest"]
    assert figure.axes[0].get_ylabel() == "Where?"
    on_evidence = weight[tagged.evidence].sum()
    assert figure.axes[0].get_xlabel() == f"{on_evidence:.2f} on V*"
    opacity = [ax.collections[0].get_facecolor()[:, 3] for ax in figure.axes]
    np.testing.assert_allclose(opacity[0], 0.08)
    np.testing.assert_allclose(opacity[1], 0.72)


# --- saving


def test_a_figure_is_saved_to_the_same_bytes_in_the_folder_of_its_profile(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    heads = pd.DataFrame({"look": [0.1, 0.5], "use": [0.0, 0.1], "kind": ["a", "b"]})
    for kind in ("png", "pdf"):
        monkeypatch.setenv("COREHEAD_FIGURES", kind)
        seen = []
        for _ in range(2):
            plots.save(plots.scatter(heads, "look", "use"), "heads", "other")
            seen.append((tmp_path / f"figures/other/heads.{kind}").read_bytes())
        assert seen[0] == seen[1]
    plots.save(plt.figure(), "empty")
    assert (tmp_path / "figures/empty.pdf").exists() and not (
        tmp_path / "figures/empty.png"
    ).exists()


def test_256_colours_cannot_be_told_from_all(tmp_path, monkeypatch):
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    y, x = np.mgrid[0:256, 0:320]
    scene = np.stack([y, x * 255 // 320, 255 - y], -1).astype(
        np.uint8
    )  # as many colours as pixels, nearly
    tagged = tiny("qwen3_vl").tag(
        ask(image_part(Image.fromarray(scene)), evidence=[ch.Region(0, (0, 0, 90, 90))])
    )
    figure = plots.tags({"": tagged})
    plots.save(figure, "scene")
    figure.savefig(tmp_path / "full.png")
    small = Image.open(tmp_path / "figures/scene.png")
    assert small.mode == "P"
    difference = np.asarray(small.convert("RGB"), float) - np.asarray(
        Image.open(tmp_path / "full.png").convert("RGB")
    )
    assert np.abs(difference).mean() < 2 and np.abs(difference).max() < 64


def test_tables_are_rounded_as_they_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    table = pd.DataFrame(
        {
            "domain": ["image"],
            "correct": [0.123456],
            "accuracy_p": [1.23456e-9],
            "depth": [0.98764],
        }
    )
    rounded = results.save(table.set_index("domain"), "test", "other")
    assert rounded.to_dict("list") == {
        "domain": ["image"],
        "correct": [0.1235],
        "accuracy_p": [1.23e-9],
        "depth": [0.9876],
    }
    pd.testing.assert_frame_equal(
        rounded, pd.read_csv(tmp_path / "data/results/other/test.csv")
    )
    twice = results.save(pd.concat([table, table]), "again")
    assert twice.index.tolist() == [0, 1] and "index" not in twice


# --- numbers


def test_maps_frame_heads_and_have_one_scale():
    low, high = (
        pd.DataFrame(np.full((3, 4), value)).rename_axis(index="layer")
        for value in (0.1, 0.5)
    )
    heads = ch.HeadSet(np.eye(3, 4, dtype=bool))
    figure = plots.maps({"low": low, "high": high}, heads)
    assert [ax.get_ylabel() for ax in figure.axes[:2]] == ["layer", ""]
    for ax, title in zip(figure.axes, ("low", "high")):
        assert len(ax.patches) == len(heads) and ax.get_title() == title
        assert ax.collections[0].get_clim() == (0, 0.5)
    assert [tuple(patch.get_xy()) for patch in figure.axes[0].patches] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


def test_curves_show_lines_intervals_and_levels():
    table = points(
        heads=["top", "top", "bottom", "bottom"] * 2,
        share=[0.05, 0.1] * 4,
        domain=["image"] * 4 + ["text_only"] * 4,
        correct=np.linspace(0.1, 0.8, 8),
    )
    intact = pd.Series({"image": 0.97, "text_only": 1.0})
    levels = {"intact": intact, "chance level": {"image": 0.1}}
    figure = plots.curves(table, "share", "correct", levels=levels, mark=0.05)
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["image", "text only"]
    lines = lines_of(left)
    np.testing.assert_allclose(lines["top"].get_xdata(), [0.05, 0.1])
    np.testing.assert_allclose(lines["top"].get_ydata(), [0.1, 0.2])
    assert (
        lines["top"].get_color() == plots.EVIDENCE
        and lines["top"].get_marker() != lines["bottom"].get_marker()
    )
    assert (
        lines["intact"].get_ydata()[0] == 0.97
        and lines["chance level"].get_ydata()[0] == 0.1
    )
    assert np.isnan(
        lines_of(right)["chance level"].get_ydata()
    ).all()  # known for one of them
    [collection] = [c for c in left.collections if isinstance(c, LineCollection)][:1]
    bars = collection.get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.0, 0.2], [0.1, 0.3]])
    assert left.lines[-1].get_xdata()[0] == 0.05 and left.get_ylim() == plots.ALL
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "top",
        "bottom",
        "intact",
        "chance level",
    ]
    figure.savefig("/dev/null", format="png")


def test_panels_have_one_scale_that_fits_the_highest_of_them():
    table = points(
        domain=["image", "image", "text"],
        size=[4, 9, 4],
        heads="top",
        score=[0.2, 0.3, 1.5],
    )
    figure = plots.curves(
        table, "size", "score", ylim=(0, None), ticks={4: "four", 9: "nine"}
    )
    assert [ax.get_ylim()[1] > 1.5 and ax.get_ylim()[0] == 0 for ax in figure.axes] == [
        True,
        True,
    ]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [
        "four",
        "nine",
    ]


def test_five_panels_take_two_even_rows_and_the_legend_the_empty_place():
    long = pd.DataFrame(
        {"x": range(60), "y": np.arange(60) / 60, "heads": "top", "domain": "a"}
    )
    short = long[:2].assign(heads="random")
    table = pd.concat([long, *(short.assign(domain=name) for name in "bcde")])
    figure = plots.curves(table, "x", "y")
    *panels, empty = figure.axes
    assert [ax.get_subplotspec().rowspan.start for ax in panels] == [0, 0, 0, 1, 1]
    assert not figure.legends and not empty.axison
    assert [text.get_text() for text in empty.get_legend().get_texts()] == ["top", "random"]
    # many points have no markers
    assert lines_of(panels[0])["top"].get_marker() == ""
    assert lines_of(panels[1])["random"].get_marker() == "s"


def test_marks_of_several_lines_at_one_place_stand_side_by_side():
    table = points(heads=["top", "random"], domain="a", k=3, correct=0.5)
    figure = plots.curves(table, "k", "correct")
    ax = figure.axes[0]
    figure.canvas.draw()
    places = [line.get_transform().transform((3, 0.5)) for line in lines_of(ax).values()]
    left, right = (place - ax.transData.transform((3, 0.5)) for place in places)
    # 1.5 / 72 inches apart, around the place, and at one height
    np.testing.assert_allclose(right - left, [1.5 * figure.dpi / 72, 0], atol=1e-6)
    np.testing.assert_allclose(left + right, 0, atol=1e-6)


def test_axes_show_all_points_whole_numbers_and_what_a_point_stands_for():
    table = points(
        heads=["top"] * 9, domain="a", k=range(2, 11), n=[64] * 8 + [128], correct=0.5
    )
    figure = plots.curves(table, "k", "correct", xlabel="heads")
    [ax] = figure.axes
    figure.canvas.draw()
    low, high = ax.get_xlim()
    assert 1 < low < 2 and 10 < high < 11
    assert all(tick == int(tick) for tick in ax.get_xticks())
    assert figure.get_supxlabel() == "heads\n(bars: 95 %; n = 64 to 128 a point)"
    without = table.drop(columns=["n", "correct_low", "correct_high"])
    assert plots.curves(without, "k", "correct", xlabel="heads").get_supxlabel() == "heads"
    few = plots.curves(table[:3], "k", "correct").axes[0]
    assert few.get_xticks().tolist() == [2, 3, 4]


def test_dots_show_every_row_and_leave_gaps():
    table = points(
        correct=[0.9, 0.1, 0.8],
        model=["a", "a", "b"],
        domain="image",
        heads=["intact", "top 5%", "top 5%"],
    )
    [ax] = plots.dots(table, "correct", rows="model").axes
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "a",
        "b",
    ] and ax.yaxis_inverted()
    lines = lines_of(ax)
    np.testing.assert_allclose(lines["intact"].get_xdata(), [0.9, np.nan])
    np.testing.assert_allclose(lines["top 5%"].get_xdata(), [0.1, 0.8])
    assert (lines["intact"].get_ydata() < lines["top 5%"].get_ydata()).all()
    assert ax.lines[-1].get_xdata()[0] == 0  # no difference
    levels = {"chance level": {"image": 0.1}}
    [ax] = plots.dots(table, "correct", rows="model", levels=levels).axes
    assert lines_of(ax)["chance level"].get_xdata()[0] == 0.1


def test_scatter_colours_kinds_and_marks_where_quadrants_meet():
    table = pd.DataFrame(
        {
            "look": [0.1, 0.5, 0.6],
            "use": [0.0, 0.0, 0.1],
            "kind": ["neither", "looks", "both"],
        }
    )
    [ax] = plots.scatter(table, "look", "use", lines={"x": 0.4, "y": 0.05}).axes
    assert sorted(tuple(dots.get_offsets()[0]) for dots in ax.collections) == [
        (0.1, 0.0),
        (0.5, 0.0),
        (0.6, 0.1),
    ]
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections}) == 3
    assert ax.collections[0].get_label() == "neither (1)"
    across, up = (np.ravel(line.get_xydata()) for line in ax.lines)
    assert across[0] == across[2] == 0.4 and up[1] == up[3] == 0.05


def test_a_name_has_one_look_and_what_it_begins_with_is_hollow():
    styles = plots._styles(
        ["top 5%", "random", "top 10%", "unheard of", "refcocog", "image"]
    )
    assert styles["top 5%"]["color"] == styles["top 10%"]["color"] == plots.EVIDENCE
    assert styles["top 5%"]["mfc"] == plots.EVIDENCE and styles["top 10%"]["mfc"] == "white"
    assert styles["refcocog"]["color"] == styles["image"]["color"]


def test_a_colour_means_one_thing():
    """What has one colour is of one kind, and told apart by its mark."""
    kinds = [
        {"intact", "retrieval", "others", "difference", "used, does not look"},
        {"whole", "dense"},
        {"top", "RAM", "hybrid", "zero", "looks, used", "looks, not used"},
        {"bottom", "rest", "neither", "all"},
        {"uniform", "|V*| / |V|"},
        {"image", "copy_image", "refcocog"},
        {"document", "mmdocir", "mmlongbench", "mmlongbench-doc"},
        {"video", "vidstg", "mlvu"},
        {"text", "copy_text"},
    ]
    of_colour = pd.Series({name: look[0] for name, look in plots.LINES.items()})
    shared = [set(names) for names in of_colour.groupby(of_colour).groups.values()]
    assert all(names in kinds for names in shared if len(names) > 1)


def test_bars_stack_to_the_whole():
    parts = ["V*", "other visual", "other text", "sink"]
    table = pd.DataFrame(
        [[0.7, 0.1, 0.1, 0.1, 1.0, 0.9, 1.2], [0.1, 0.5, 0.3, 0.1, 3.0, 2.9, 3.1]],
        ["top", "rest"],
        [*parts, "entropy", "entropy_low", "entropy_high"],
    )
    figure = plots.bars(table, parts, "entropy")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["top", "rest"]
    assert len(left.patches) == 8 and left.get_xlim() == (0, 1)
    for row in (left.patches[::2], left.patches[1::2]):
        assert sum(bar.get_width() for bar in row) == pytest.approx(1)
    assert to_hex(left.patches[0].get_facecolor()) == plots.EVIDENCE
    np.testing.assert_allclose(right.lines[0].get_xdata(), [1.0, 3.0])
    segments = right.collections[0].get_segments()
    np.testing.assert_allclose(
        [segment[:, 0] for segment in segments], [[0.9, 1.2], [2.9, 3.1]]
    )


def test_a_logarithmic_axis_is_numbered():
    table = points(heads=["RAM"] * 3, domain="x", tokens=[1, 2, 3], correct=[1.0, 3.0, 7.0])
    figure = plots.curves(table, "tokens", "correct", yscale="log", ylim=(1, 8))
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"1", "2", "4", "8"} <= set(labels)
