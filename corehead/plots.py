"""All figures, in one style: a colour means one thing in all of them, and what a bar or a point is stands below."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from .families import Medium
from .ranking import HeadSet
from .results import output
from .samples import read_messages
from .tagging import TaggedSample, to_image, to_video

PALETTE = sns.color_palette("colorblind").as_hex()
EVIDENCE = PALETTE[3]  # vermilion: V*, and the heads that look at it
NUMBERS = "Blues"  # the colour map of everything that is a number
TOKENS = {  # kinds of tokens; of a token of several kinds the last one shows
    "other text": "#d9d9d9",
    "question": PALETTE[8],
    "answer": PALETTE[6],
    "other visual": "#a6cee3",
    "V*": EVIDENCE,
    "sink": "#7f7f7f",
}
COLOURS = to_rgba_array(list(TOKENS.values()))
LINES = {  # colour, marker and line style of names; a benchmark looks like the domain that it belongs to
    ("black", "P", "-"): "intact",
    ("#555555", "P", "-"): "whole; dense",
    # heads that look at V*, and in its shades other ways to take them out
    (EVIDENCE, "o", "-"): "top; RAM; hybrid; zero; looks, used",
    (EVIDENCE, "x", "-"): "looks, not used",
    ("#7f2704", "X", "--"): "knockout",
    ("#f5a475", "s", ":"): "zeroed edges",
    # the others: of the ranking's bottom, or all of them
    (PALETTE[5], "v", "-"): "bottom; rest; neither; all",
    (PALETTE[7], "s", "--"): "random",
    (PALETTE[9], "D", ":"): "layer",
    ("#7a4ea8", "X", "-."): "text entropy",
    ("#1f2d6e", "*", ":"): "visual mass",
    ("#808000", "^", "--"): "streaming",
    ("gray", "", ":"): "uniform; |V*| / |V|",
    # tasks are told apart by marks alone
    ("black", "o", "-"): "retrieval",
    ("black", "x", "-"): "others",
    ("black", "^", "-"): "used, does not look",
    ("black", "D", "-"): "difference",
    (PALETTE[0], "o", "-"): "image; copy_image; refcocog",
    (PALETTE[1], "s", "-"): "document; mmdocir; mmlongbench; mmlongbench-doc",
    (PALETTE[2], "^", "-"): "video; vidstg; mlvu",
    (PALETTE[4], "D", "-"): "text; copy_text",
}
LINES = {name: line for line, names in LINES.items() for name in names.split("; ")}
LEVELS = {
    "intact": dict(color="black", ls="--"),
    "chance level": dict(color="gray", ls=":"),
}
ALL = (-0.03, 1.03)  # from 0 to 1, with room for marks at both

# at import, so that no notebook sets a style of its own
sns.set_theme(
    context="paper",
    style="ticks",
    palette="colorblind",
    rc={
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.handlelength": 2.5,
        "lines.markersize": 4.5,
        "pdf.fonttype": 42,  # TrueType: text stays text in the pdf
        "savefig.dpi": 150,
    },
)


def save(figure: plt.Figure, name: str, profile: str = "testbed") -> None:
    """Write a figure to figures/ (the default profile) or figures/<profile>/.

    It becomes a png of 256 colours, or a pdf where the environment variable COREHEAD_FIGURES says "pdf"; the same
    figure gives the same bytes.
    """
    folder = output("figures", *([] if profile == "testbed" else [profile]))
    if os.environ.get("COREHEAD_FIGURES") == "pdf":
        # a date would make every run another file
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        return
    full = BytesIO()
    figure.savefig(full, format="png")
    # dithering would make areas of one colour large files, and show as noise
    small = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(folder / f"{name}.png", optimize=True)


def _styles(names: list) -> dict:
    """A style for each line: by its name or its first word, hollow if that is taken, or else by its place."""
    # names without a style of their own get their places on one scale of colours
    places = sns.color_palette("viridis", len(names))
    styles = {}
    known = []
    for i, name in enumerate(names):
        look = LINES.get(name) or LINES.get(str(name).split(" ")[0])
        color, marker, line = look or (places[i], "osv^DPX*<>hdp8"[i % 14], "-")
        style = dict(color=color, marker=marker, ls=line, mfc=color)
        if look in known:  # names with one first word are kinds of one thing
            style |= dict(ls=(0, (1, 1.5)), mfc="white")
        known += [look] if look else []
        # lines with a name of their own in front
        styles[name] = style | {"zorder": 3 if look else 2}
    return styles


def _panels(table: pd.DataFrame, by: str, most: int, height: float, **shared):
    """A figure with a panel for each value of a column, `most` in a row, and (panel, value, rows) of each."""
    groups = list(table.groupby(by, sort=False))
    rows = -(-len(groups) // most)  # rounded up
    columns = -(-len(groups) // rows)  # as many in every row, if that can be
    # no wider than a page, so that nobody has to shrink it
    size = (min(3.2, 8.4 / columns) * columns + 0.8, height * rows + 1.0)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)
    for ax in axes.flat[len(groups) :]:
        ax.axis("off")  # the legend has room here
    for ax, (name, _) in zip(axes.flat, groups):
        ax.set_title(str(name).replace("_", " "))
    return figure, [(ax, *group) for ax, group in zip(axes.flat, groups)]


def _note(table: pd.DataFrame, value: str, x: str = "") -> str:
    """What bars and points stand for: a line below the name of the x axis."""
    parts = ["bars: 95 %"] if f"{value}_low" in table else []
    if "n" in table and x != "n":
        counts = dict.fromkeys(f"{n:g}" for n in (table.n.min(), table.n.max()))
        parts.append(f"n = {' to '.join(counts)} a point")
    return f"\n({'; '.join(parts)})" if parts else ""


def _finish(figure: plt.Figure, xlabel: str, ylabel: str = "") -> plt.Figure:
    """Names of the axes and one legend, for all panels together: in an empty panel, or above them."""
    figure.supxlabel(xlabel.strip(), fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    found = {}  # by label: the panels draw the same lines
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    empty = [ax for ax in figure.axes if not ax.axison]
    if len(found) > 1 and empty:
        empty[0].legend(found.values(), found, loc="center")
    elif len(found) > 1:
        # as many in a row as fit: a mark and about 0.07 inches a letter
        fitting = int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, found))))
        rows = -(-len(found) // max(1, fitting))
        columns = -(-len(found) // rows)
        figure.legend(found.values(), found, loc="outside upper center", ncols=columns)
    return figure


# --- samples and their tokens


def _token_kinds(tagged: TaggedSample) -> np.ndarray:
    """(L,) index into TOKENS of every token."""
    kinds = np.zeros(len(tagged.ids), int)
    # in the order of TOKENS; V* comes last, as it is also visual, or text
    for i, tokens in enumerate(
        (tagged.question, tagged.answer, tagged.visual, tagged.evidence), 1
    ):
        kinds[tokens] = i
    return kinds


def _views(tagged: TaggedSample) -> list[tuple[Medium, np.ndarray]]:
    """Every picture that the model sees: its medium, and which of the medium's tokens look at it, (n,) bool."""
    views = []
    for medium in tagged.media:
        placed = ~np.isnan(medium.boxes[:, 0])  # newline slots look at nothing
        views += [
            (medium, placed & (medium.view == view))
            for view in np.unique(medium.view[placed])
        ]
    return views


def _draw_view(
    ax: plt.Axes,
    tagged: TaggedSample,
    medium: Medium,
    view: np.ndarray,
    weight: np.ndarray | None,
) -> None:
    """One picture with the cells of its tokens, V* framed: V* lit, or all cells as blue as their weight is large."""
    sample = tagged.sample
    parts = [part for message in read_messages(sample) for part in message["content"]]
    part = [part for part in parts if part["type"] == medium.kind][medium.index]
    first, end = medium.frames[view][0]
    if medium.kind == "video":
        frames, _ = to_video(part, sample.id, "video")
        # of a pair of frames the mean, which is about what its tokens see
        part = {"image": frames[first:end].mean(0).astype(np.uint8)}
    _, height, width = medium.size
    shown = to_image(part["image"], sample.id, medium.kind)
    # in the pixels that boxes are in, y downwards; pale, so that cells stand out
    ax.imshow(shown, extent=(0, width, height, 0), alpha=0.55)
    tokens = medium.tokens[view]
    lit = np.isin(tokens, tagged.evidence)
    face = to_rgba_array(EVIDENCE, 0.45 * lit)
    if weight is not None:
        shades = plt.get_cmap(NUMBERS)(weight[tokens].clip(0, 1))
        face = to_rgba_array(shades, 0.8 * weight[tokens].clip(0, 1))
    boxes = medium.boxes[view]
    cells = np.array([Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes])
    ax.add_collection(
        PatchCollection(cells, facecolor=face, edgecolor="#777777", linewidth=0.35)
    )
    # frames of V* come on top, or the next cell's edge would cover them
    frames = PatchCollection(
        cells[lit], facecolor="none", edgecolor=EVIDENCE, linewidth=1.5
    )
    ax.add_collection(frames)
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.spines[:].set_visible(False)
    name = f"frame {first}-{end - 1}" if medium.kind == "video" else f"image {medium.index}"
    # tiles or crops, and the whole picture beside them
    if medium.kind == "image" and not view.all():
        name += f": {view.sum()} tokens"
    ax.set_title(name, fontsize="small")


def tags(samples: Mapping[str, TaggedSample], height: float = 2.0) -> plt.Figure:
    """Every picture, page or frame of samples with the cells of V* lit, and all their tokens as strips below.

    Parameters
    ----------
    samples : mapping of str to TaggedSample
        Samples with media, by what to call them; one below the other.
    height : float
        Of the pictures, in inches.

    Returns
    -------
    Figure
    """
    figure = plt.figure(figsize=(9, (height + 1.2) * len(samples)))
    halves = figure.subfigures(
        2 * len(samples), 1, height_ratios=[height, 1.2] * len(samples)
    )
    for above, below, (name, tagged) in zip(halves[::2], halves[1::2], samples.items()):
        views = _views(tagged)
        for ax, view in zip(above.subplots(1, len(views), squeeze=False).flat, views):
            _draw_view(ax, tagged, *view, weight=None)
        above.suptitle(name, fontsize="medium")
        kinds = _token_kinds(tagged)
        strip = below.subplots()
        strip.imshow(COLOURS[kinds][None], aspect="auto")
        strip.set(yticks=[], xlabel="token")
        strip.locator_params(axis="x", integer=True)
        counts = zip(TOKENS.items(), np.bincount(kinds))
        handles = [
            Patch(color=colour, label=f"{kind} ({n})") for (kind, colour), n in counts if n
        ]
        below.legend(handles=handles, ncols=len(handles), loc="outside upper center")
    return figure


def overlays(rows: Mapping) -> plt.Figure:
    """Attention on pictures: a row a sample, a column a set of heads; V* is framed.

    Parameters
    ----------
    rows : mapping of str to (TaggedSample, mapping of str to (L,) array)
        By title: a sample, and the weights of all its tokens in [0, 1] by set of heads. Of several pages or frames, the
        one is shown where the first set looks most at V*.

    Returns
    -------
    Figure
    """
    sets = list(next(iter(rows.values()))[1])
    size = (2.3 * len(sets) + 0.4, 2.3 * len(rows))
    figure, axes = plt.subplots(len(rows), len(sets), figsize=size, squeeze=False)
    for line, (title, (tagged, weights)) in zip(axes, rows.items()):
        mass = np.zeros(len(tagged.ids))  # on V* alone
        mass[tagged.evidence] = weights[sets[0]][tagged.evidence]
        view = max(_views(tagged), key=lambda view: mass[view[0].tokens[view[1]]].sum())
        for ax, name in zip(line, sets):
            _draw_view(ax, tagged, *view, weight=weights[name])
            ax.set_title("" if line[0] in axes[1:, 0] else name, fontsize="small")
            on_evidence = weights[name][tagged.evidence].sum()
            ax.set_xlabel(f"{on_evidence:.2f} on V*", fontsize="small")
        # a long question goes on in the next line, and is not cut
        line[0].set_ylabel(textwrap.fill(title, 26), fontsize="small")
    return figure


def attention(tagged: TaggedSample, weights: np.ndarray, most: int = 8) -> plt.Figure:
    """Attention on every picture, page or frame, all on one scale; V* is framed.

    Parameters
    ----------
    tagged : TaggedSample
        A sample with media.
    weights : (L,) float array
        Of all its tokens, such as one head's.
    most : int
        Pictures: of more, those with the most attention are shown.

    Returns
    -------
    Figure
    """
    views = _views(tagged)
    mass = [weights[medium.tokens[view]].sum() for medium, view in views]
    shown = np.sort(np.argsort(mass)[::-1][:most])
    darkest = weights[tagged.visual].max() or 1
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5, 5 * rows / columns + 0.2), squeeze=False
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, i in zip(axes.flat, shown):
        _draw_view(ax, tagged, *views[i], weight=weights / darkest)
        ax.set_title(f"{ax.get_title()}: {mass[i]:.2f}", fontsize="small")
    return figure


def shaded_text(tagged: TaggedSample, tokenizer, weights: np.ndarray) -> str:
    """All tokens as HTML, as blue as their weight is large, a run of visual ones as its sum; V* is underlined.

    Parameters
    ----------
    tagged : TaggedSample
    tokenizer : PreTrainedTokenizerBase
    weights : (L,) float array
        Of all its tokens.

    Returns
    -------
    str
    """
    visual = np.isin(np.arange(len(weights)), tagged.visual)
    # the sink apart, beside which all other text would be pale; no darker than black can be read on
    shades = 0.6 * (weights / weights[1:][~visual[1:]].max(initial=1e-6)).clip(0, 1)
    colours = plt.get_cmap(NUMBERS)(shades)
    starts = np.flatnonzero(~(visual[1:] & visual[:-1])) + 1
    spans = []
    for run in np.split(np.arange(len(weights)), starts):
        mass = weights[run].sum()
        look = f"background:{to_hex(colours[run[0]])}"
        text = tokenizer.decode(tagged.ids[run])
        if visual[run[0]]:
            look = "color:#555555"
            text = f"[{len(run)} visual: {mass:.2f}]"
        if np.isin(run, tagged.evidence).any():
            look += f";border-bottom:3px solid {EVIDENCE}"
        spans.append(f"<span title='{mass:.3f}' style='{look}'>{escape(text)}</span>")
    return " ".join(spans)


# --- numbers


def maps(
    tables: Mapping[str, pd.DataFrame], heads: HeadSet | None = None, *, label: str = "RAM"
) -> plt.Figure:
    """Scores (layers, heads) as maps side by side, on one scale with 0.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        By title; the names of index and columns are those of the axes.
    heads : HeadSet
        These are framed.
    label : str
        What the numbers are.

    Returns
    -------
    Figure
    """
    width = min(2.6, 8.4 / len(tables))
    figure, axes = plt.subplots(
        1, len(tables), figsize=(width * len(tables) + 0.8, 2.5), squeeze=False
    )
    # one scale for all maps, from 0 (or below it): only then can colours be compared
    numbers = np.concatenate([table.to_numpy().ravel() for table in tables.values()])
    for ax, (title, table) in zip(axes[0], tables.items()):
        sns.heatmap(
            table,
            vmin=min(0, numbers.min()),
            vmax=numbers.max(),
            cmap=NUMBERS,
            cbar=False,
            # about six labels, however many heads there are
            xticklabels=max(1, table.shape[1] // 6),
            yticklabels=max(1, table.shape[0] // 6),
            ax=ax,
        )
        for layer, head in heads or ():
            ax.add_patch(
                Rectangle((head, layer), 1, 1, fill=False, edgecolor=EVIDENCE, lw=1.6)
            )
        ax.set_title(title)
        ax.tick_params(rotation=0)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")  # that of the first
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label=label, shrink=0.8)
    return figure


def curves(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    lines: str = "heads",
    panels: str = "domain",
    levels: Mapping | None = None,
    mark: float | None = None,
    ticks: Mapping[float, str] | None = None,
    **axes,
) -> plt.Figure:
    """A measure against something, one line a name, one panel a task.

    Parameters
    ----------
    table : DataFrame
        Columns `x`, `y`, `lines` and `panels`; where it has ``y_low`` and ``y_high``, the interval is drawn.
    x, y : str
        The columns against each other.
    lines, panels : str
        The columns that tell lines and panels apart.
    levels : mapping of str to mapping of panel to float
        Horizontal lines, such as "intact" and "chance level".
    mark : float
        A value of `x`, drawn as a vertical line.
    ticks : mapping of float to str
        Ticks of the x axis and their labels.
    **axes
        What ``Axes.set`` takes, such as ``xlabel``, ``xscale`` and ``ylim``.

    Returns
    -------
    Figure
    """
    figure, found = _panels(table, panels, 4, 2.1, sharey=True)
    styles = _styles(table[lines].unique().tolist())
    whole = (table[x] % 1 == 0).all()
    xlabel = axes.pop("xlabel", x) + _note(table, y, x)
    ylabel = axes.pop("ylabel", "accuracy" if y == "correct" else y)
    if y == "correct":
        axes = {"ylim": ALL} | axes
    for ax, panel, rows in found:
        for line, points in rows.groupby(lines, sort=False):
            place = list(styles).index(line) - (len(styles) - 1) / 2
            _draw_line(ax, points, x, y, 1.5 * place, label=line, **styles[line])
        for label, level in (levels or {}).items():
            look = LEVELS.get(label, dict(color="black", ls="-."))
            # NaN, which draws nothing, where a panel has no such level
            ax.axhline(level.get(panel, np.nan), label=label, lw=1, **look)
        if mark is not None:
            ax.axvline(mark, color="black", lw=0.8, alpha=0.5)
    for ax, _, rows in found:  # when all is drawn: panels have one scale
        ax.set(**axes)
        if ax.get_yscale() == "log":
            # powers of two are close enough to be read, and written as numbers
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:g}")
        if ticks is not None:
            ax.set_xticks(list(ticks), ticks.values())
            # a logarithmic axis would have its own among them
            ax.minorticks_off()
        elif whole and rows[x].nunique() <= 5:
            ax.set_xticks(rows[x].unique())
        elif whole:
            ax.locator_params(axis="x", integer=True, nbins=6)
    return _finish(figure, xlabel, ylabel)


def _draw_line(
    ax: plt.Axes, points: pd.DataFrame, x: str, y: str, aside: float, **style
) -> None:
    """One line, with its interval as bars; if its points are many, without markers."""
    if len(points) >= 50:
        style["marker"] = ""
    [drawn] = ax.plot(points[x], points[y], **style)
    if f"{y}_low" not in points:
        return
    ends = points[x], points[f"{y}_low"], points[f"{y}_high"]
    bars = ax.vlines(*ends, color=style["color"], lw=1, alpha=0.6)
    # bars of several lines at one place stand side by side, so many 1/72 inches from it
    shift = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
    for artist in (drawn, bars):
        artist.set_transform(ax.transData + shift)


def dots(
    table: pd.DataFrame,
    value: str,
    *,
    rows: str,
    panels: str = "domain",
    lines: str = "heads",
    levels: Mapping | None = None,
    **axes,
) -> plt.Figure:
    """A measure with its interval as dots: one panel a task, one row a name, one mark for each of `lines`.

    Parameters
    ----------
    table : DataFrame
        Columns `value`, ``value_low``, ``value_high``, `rows`, `panels` and `lines`.
    value : str
        The measure.
    rows, panels, lines : str
        The columns that tell rows, panels and marks apart.
    levels : mapping of str to mapping of panel to float
        Vertical lines, such as "chance level"; without any, one at 0, which is no difference.
    **axes
        What ``Axes.set`` takes.

    Returns
    -------
    Figure
    """
    xlabel = axes.pop("xlabel", "accuracy" if value == "correct" else value) + _note(
        table, value
    )
    if value == "correct":
        axes = {"xlim": ALL} | axes
    order = table[rows].unique().tolist()
    styles = _styles(table[lines].unique().tolist())
    height = max(0.22, 0.08 * len(styles)) * len(order) + 0.3
    figure, found = _panels(table, panels, 99, height, sharex=True, sharey=True)
    for ax, panel, part in found:
        for i, (line, style) in enumerate(styles.items()):
            # all rows in every panel, with a gap where a task lacks one
            points = part[part[lines] == line].set_index(rows).reindex(order)
            # marks of one row a little apart, around its middle
            y = np.arange(len(order)) + 0.11 * (i - (len(styles) - 1) / 2)
            color = style["color"]
            ax.hlines(y, points[f"{value}_low"], points[f"{value}_high"], color=color)
            ax.plot(points[value], y, label=line, **style | {"ls": ""})
        for label, level in (levels or {"": {panel: 0.0}}).items():
            look = LEVELS.get(label, dict(color="gray", ls="-"))
            ax.axvline(level.get(panel, np.nan), label=label, lw=0.8, **look)
        ax.set(yticks=range(len(order)), yticklabels=order, **axes)
    ax.invert_yaxis()  # shared by all panels: the first row on top
    return _finish(figure, xlabel)


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    kinds: str = "kind",
    lines: Mapping[str, float] | None = None,
    **axes,
) -> plt.Figure:
    """One measure of heads against another, a dot a head.

    Parameters
    ----------
    table : DataFrame
        Columns `x`, `y` and `kinds`.
    x, y : str
        The columns against each other.
    kinds : str
        The column that colours the dots; each kind is counted.
    lines : mapping of {"x", "y"} to float
        Where quadrants meet, drawn as dashed lines.
    **axes
        What ``Axes.set`` takes.

    Returns
    -------
    Figure
    """
    figure, ax = plt.subplots(figsize=(5.2, 3.6))
    for kind, style in _styles(table[kinds].unique().tolist()).items():
        points = table[table[kinds] == kind]
        look = dict(color=style["color"], marker=style["marker"], s=26)
        ax.scatter(points[x], points[y], label=f"{kind} ({len(points)})", **look)
    for axis, place in (lines or {}).items():
        draw = ax.axvline if axis == "x" else ax.axhline
        draw(place, color="gray", lw=0.8, ls="--")
    xlabel, ylabel = axes.pop("xlabel", x), axes.pop("ylabel", y)
    ax.set(**axes)
    return _finish(figure, xlabel, ylabel)


def bars(table: pd.DataFrame, parts: list[str], value: str) -> plt.Figure:
    """Parts of the attention as stacked bars, a bar a row of the table, and beside them a measure with its interval.

    Parameters
    ----------
    table : DataFrame
        Columns `parts` and `value`, ``value_low``, ``value_high``.
    parts : list of str
        Of TOKENS, from left to right.
    value : str
        The measure.

    Returns
    -------
    Figure
    """
    size = (8.4, 0.27 * len(table) + 1.1)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, sharey=True, width_ratios=[2, 1]
    )
    table[parts].plot.barh(stacked=True, color=TOKENS, ax=left, width=0.8, legend=False)
    left.set(xlabel="attention mass", ylabel="", xlim=(0, 1))
    left.invert_yaxis()  # shared with the other panel
    right.hlines(
        range(len(table)), table[f"{value}_low"], table[f"{value}_high"], color="black"
    )
    right.plot(table[value], range(len(table)), "o", color="black")
    right.set(xlabel=f"{value} (nats)", xlim=(0, None))
    return _finish(figure, _note(table, value))
