"""All figures: one style, one function a figure. Colour-blind palette; markers or line styles vary with colour."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .models import Medium
from .notebooks import output
from .ranking import HeadSet, heads_for_share, resample_means
from .stats import mean_interval
from .tagging import Prompt, Tagged, to_image

PALETTE = sns.color_palette("colorblind")
LOOKED_AT = {  # colour in the palette and marker of the tasks that look at pictures, documents, videos, text
    (0, "o"): ("image", "copy_image", "refcocog"),
    (1, "s"): ("document", "mmdocir", "mmlongbench", "mmlongbench-doc"),
    (2, "^"): ("video", "vidstg", "mlvu"),
    (4, "D"): ("text", "copy_text"),
}
DOMAIN = {task: colour for (colour, _), tasks in LOOKED_AT.items() for task in tasks}
MARKER = {task: marker for (_, marker), tasks in LOOKED_AT.items() for task in tasks}
KINDS = {  # of tokens, in the order of the strip's colour map
    "text": "#d9d9d9",
    "question": PALETTE[2],
    "answer": PALETTE[4],
    "visual": "#a6cee3",
    "target": PALETTE[3],
}

sns.set_theme(
    context="notebook",
    style="ticks",
    palette="colorblind",
    rc={
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "savefig.dpi": 150,
        "svg.hashsalt": "corehead",
    },
)


def save(figure: Figure, name: str, profile: str = "testbed") -> None:
    """Write a figure as png and pdf to figures/ (the default profile) or figures/<profile>/."""
    folder = output("figures", *([] if profile == "testbed" else [profile]))
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})


# --- tokens


def token_kinds(tagged: Tagged) -> np.ndarray:
    """(L,) index into KINDS of every token; what comes later in KINDS wins, and target wins over all."""
    kind = np.zeros(len(tagged.ids), int)
    for i, name in enumerate(KINDS):
        if name != "text":
            kind[getattr(tagged, name)] = i
    return kind


def token_strip(ax: Axes, tagged: Tagged) -> None:
    """All tokens of a sample as one strip, coloured by what they are."""
    kind = token_kinds(tagged)
    ax.imshow(kind[None], aspect="auto", cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=len(KINDS) - 1)
    ax.set(yticks=[], xlabel="token")
    sns.despine(ax=ax, left=True)
    counts = {name: int((kind == i).sum()) for i, name in enumerate(KINDS)}
    label = {"visual": "other visual", "target": "V*"}
    handles = [Patch(color=KINDS[name], label=f"{label.get(name, name)} ({n})") for name, n in counts.items() if n]
    ax.legend(handles=handles, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")


def _pixels(tagged: Tagged, medium: Medium, frames: tuple[int, int]) -> np.ndarray:
    """The picture behind a view; of a pair of frames their mean, which is about what a token of the pair sees."""
    parts = [p for m in tagged.sample.messages if isinstance(m["content"], list) for p in m["content"]]
    value = [p[medium.kind] for p in parts if p.get("type") == medium.kind][medium.index]
    if medium.kind == "video":
        return np.asarray(value)[slice(*frames)].mean(0).astype(np.uint8)
    return np.asarray(to_image(value, tagged.sample.id, "image"))


def _views(tagged: Tagged) -> list[tuple[Medium, int]]:
    return [(m, int(v)) for m in tagged.image_grid for v in np.unique(m.view[~np.isnan(m.boxes[:, 0])])]


def draw_view(ax: Axes, tagged: Tagged, medium: Medium, view: int, weight: np.ndarray | None = None) -> None:
    """One picture with its tokens' cells: target cells lit, or all cells as blue as their weight in [0, 1] is large.

    Parameters
    ----------
    ax, tagged : where and what.
    medium, view : which picture, and which view of it.
    weight : (L,) over all tokens; None lights V*.
    """
    mine = (medium.view == view) & ~np.isnan(medium.boxes[:, 0])
    tokens, boxes = medium.tokens[mine], medium.boxes[mine]
    ax.imshow(
        _pixels(tagged, medium, medium.frames[mine][0]), extent=(0, medium.size[2], medium.size[1], 0), alpha=0.55
    )
    cells = [Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]
    lit = np.isin(tokens, tagged.target)
    if weight is None:
        ax.add_collection(PatchCollection(cells, facecolor="none", edgecolor="#777777", linewidth=0.35))
    else:
        shade = [(*PALETTE[0], 0.8 * w) for w in np.clip(weight[tokens], 0, 1)]
        ax.add_collection(PatchCollection(cells, facecolor=shade, linewidth=0))
    face = (*KINDS["target"], 0.45) if weight is None else "none"
    hit = [c for c, on in zip(cells, lit) if on]
    ax.add_collection(PatchCollection(hit, facecolor=face, edgecolor=KINDS["target"], linewidth=1.5))
    ax.set(xticks=[], yticks=[], xlim=(0, medium.size[2]), ylim=(medium.size[1], 0))
    sns.despine(ax=ax, left=True, bottom=True)


def _view_name(medium: Medium, view: int) -> str:
    if medium.kind == "video":
        first, last = medium.frames[medium.view == view][0]
        return f"frame {first}" if last - first == 1 else f"frames {first}-{last - 1}"
    return f"image {medium.index}" + ("" if medium.view.max() == 0 else f", view {view}")


def show_tags(tagged: Tagged, width: float = 9.0, columns: int = 8) -> Figure:
    """Every picture, page or frame of a sample with the cells of V* lit, and all its tokens as a strip below.

    Parameters
    ----------
    tagged : a tagged sample with media.
    width : inches.
    columns : pictures in a row, at most.

    Returns
    -------
    Figure
    """
    views = _views(tagged)
    columns = max(1, min(columns, len(views)))
    rows = -(-len(views) // columns)
    ratio = max((m.size[1] / m.size[2] for m, _ in views), default=0)
    picture = min(width / columns * ratio, 3.0)
    figure = plt.figure(figsize=(width, rows * (picture + 0.5) + 1.1))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[picture + 0.5] * rows, 0.35])
    for i, (medium, view) in enumerate(views):
        ax = figure.add_subplot(grid[i // columns, i % columns])
        draw_view(ax, tagged, medium, view)
        ax.set_title(_view_name(medium, view), fontsize="small")
    token_strip(figure.add_subplot(grid[rows, :]), tagged)
    return figure


def show_families(tagged: dict[str, Tagged], width: float = 10.0) -> Figure:
    """The same picture and region in several families: a row a family, its views side by side, its strip below."""
    views = {name: _views(t) for name, t in tagged.items()}
    columns = max(map(len, views.values()))
    figure = plt.figure(figsize=(width, len(tagged) * 3.6))
    grid = figure.add_gridspec(2 * len(tagged), columns, height_ratios=[1, 0.1] * len(tagged))
    for row, (name, t) in enumerate(tagged.items()):
        for column, (medium, view) in enumerate(views[name]):
            span = slice(column, None) if column == len(views[name]) - 1 else column
            ax = figure.add_subplot(grid[2 * row, span])
            draw_view(ax, t, medium, view)
            n = int((medium.view == view).sum())
            ax.set_title(f"{name}: {_view_name(medium, view)}, {n} tokens")
        token_strip(figure.add_subplot(grid[2 * row + 1, :]), t)
    return figure


def show_text(tagged: Tagged, prompt: Prompt, width: float = 9.0, line: int = 96) -> Figure:
    """A text prompt with every token's box coloured by what it is."""
    figure, ax = plt.subplots(figsize=(width, 1.5))
    kind, x, y = token_kinds(tagged), 0, 0
    for place, (first, last) in zip(prompt.place, prompt.offsets):
        text = prompt.text[first:last].strip()
        if x + len(text) > line:
            x, y = 0, y + 1
        color = list(KINDS.values())[kind[place]]
        ax.text(x, -y, text, family="monospace", fontsize="small", bbox=dict(facecolor=color, lw=0, pad=1.5))
        x += len(text) + 1
    ax.set(xlim=(0, line), ylim=(-y - 0.6, 0.9), xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)
    return figure


# --- the testbed


def accuracies(tables: dict[str, pd.DataFrame], chance: dict[str, float] | None = None) -> Figure:
    """Accuracy with intervals against size, one panel a domain (tables of `corehead.evaluation.accuracy`)."""
    figure, axes = plt.subplots(1, len(tables), figsize=(2.3 * len(tables), 2.6), sharey=True)
    for ax, (domain, table) in zip(axes, tables.items()):
        error = np.clip([table.accuracy - table.low, table.high - table.accuracy], 0, None)
        style = dict(color=PALETTE[DOMAIN.get(domain, 7)], marker=MARKER.get(domain, "v"))
        ax.errorbar(range(len(table)), table.accuracy, error, capsize=3, **style)
        ax.set(title=domain.replace("_", " "), xlabel=table.index.name, ylim=(0, 1.03), xlim=(-0.5, len(table) - 0.5))
        ax.set_xticks(range(len(table)), table.index)
        if chance and domain in chance:
            ax.axhline(chance[domain], ls=":", color="gray")
    axes[0].set_ylabel("accuracy, test digits")
    return figure


# --- scores


def head_maps(cores: dict[str, xr.DataArray], core: HeadSet | None = None, label: str = "RAM") -> Figure:
    """Scores as maps layers x heads, one a domain; the heads of `core` are framed."""
    figure, axes = plt.subplots(1, len(cores), figsize=(2.6 * len(cores) + 0.6, 2.6), sharey=True)
    top = max(float(values.max()) for values in cores.values())
    for ax, (name, values) in zip(np.atleast_1d(axes), cores.items()):
        image = ax.imshow(values, cmap="rocket_r", vmin=0, vmax=top, aspect="auto")
        for layer, head in core or ():
            ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=PALETTE[0], lw=1.6))
        ax.set(title=name, xlabel="query head")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    np.atleast_1d(axes)[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=label)
    return figure


def sorted_curves(scores: dict[str, xr.DataArray], share: float = 0.5) -> tuple[Figure, pd.DataFrame]:
    """Heads from best to worst: their score, and the positive mass that they hold together, with rho.

    Parameters
    ----------
    scores : name -> (sample, layer, head).
    share : of the mass, for rho.

    Returns
    -------
    Figure, and a table: rho and its 95 % bootstrap interval over samples.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    rows = []
    for name, values in scores.items():
        values = values.dropna("sample").values
        mean = values.mean(0)
        low, high = mean_interval(values)
        order = np.argsort(-mean, axis=None, kind="stable")
        x = np.arange(1, len(order) + 1) / len(order)
        style = dict(color=PALETTE[DOMAIN.get(name, 7)], marker=MARKER.get(name, "v"), markevery=0.08)
        left.plot(x, mean.ravel()[order], label=name, **style)
        left.fill_between(x, low.ravel()[order], high.ravel()[order], color=style["color"], alpha=0.2, lw=0)
        mass = np.clip(mean.ravel()[order], 0, None).cumsum()
        right.plot(x, mass / mass[-1], label=name, **style)
        low, high = np.percentile(heads_for_share(resample_means(values, 500), share), [2.5, 97.5])
        rows.append({"domain": name, "rho": heads_for_share(mean, share), "low": low, "high": high})
    right.axhline(share, ls=":", color="gray")
    left.set(xlabel="share of heads, best first", ylabel="RAM", ylim=(0, None))
    right.set(xlabel="share of heads, best first", ylabel="share of positive mass", ylim=(0, 1))
    right.legend()
    return figure, pd.DataFrame(rows).set_index("domain")


def layer_profile(scores: dict[str, xr.DataArray]) -> Figure:
    """Mean and best head of every layer, with 95 % bootstrap intervals over samples."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
    for name, values in scores.items():
        values = values.dropna("sample").values
        best = values.mean(0).argmax(1)
        for ax, per_layer in zip(axes, (values.mean(2), values[:, np.arange(len(best)), best])):
            low, high = mean_interval(per_layer)
            style = dict(color=PALETTE[DOMAIN.get(name, 7)], marker=MARKER.get(name, "v"))
            ax.plot(per_layer.mean(0), label=name, **style)
            ax.fill_between(range(len(low)), low, high, color=style["color"], alpha=0.2, lw=0)
    axes[0].set(title="mean over heads", xlabel="layer", ylabel="RAM", ylim=(0, None))
    axes[1].set(title="best head", xlabel="layer", ylim=(0, None))
    axes[1].legend()
    return figure


def mass_split(table: pd.DataFrame) -> Figure:
    """Where heads look: mass on target, other visual, text and sink (columns), stacked, a bar a row; entropy beside."""
    parts = ["target", "other visual", "text", "sink"]
    colours = [KINDS["target"], KINDS["visual"], KINDS["text"], "#7f7f7f"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.42 * len(table) + 1.2), sharey=True, width_ratios=[2.2, 1])
    y, start = np.arange(len(table)), np.zeros(len(table))
    for part, colour, hatch in zip(parts, colours, ("", "//", "", "xx")):
        left.barh(y, table[part], left=start, color=colour, label=part, hatch=hatch, edgecolor="white")
        start += table[part].values
    left.set_yticks(y, [" ".join(map(str, np.atleast_1d(i))) for i in table.index])
    left.set(xlabel="attention mass", xlim=(0, 1))
    left.invert_yaxis()
    left.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    error = [table.entropy - table.entropy_low, table.entropy_high - table.entropy]
    right.errorbar(table.entropy, y, xerr=error, fmt="o", color="black", capsize=3)
    right.set(xlabel="entropy (nats)", xlim=(0, None))
    return figure


def overlays(rows: list[tuple[str, Tagged, dict[str, np.ndarray]]]) -> Figure:
    """Attention on the picture: a row a sample, a column a set of heads; weights (L,) over all tokens, V* framed.

    Of several pages or frames, the one where the first set of heads puts most weight on V*.
    """
    names = list(rows[0][2])
    figure, axes = plt.subplots(len(rows), len(names), figsize=(2.2 * len(names), 2.4 * len(rows)), squeeze=False)
    for line, (title, tagged, weights) in zip(axes, rows):
        first = np.zeros(len(tagged.ids))
        first[tagged.target] = weights[names[0]][tagged.target]
        medium, view = max(_views(tagged), key=lambda v: first[v[0].tokens[v[0].view == v[1]]].sum())
        for ax, name in zip(line, names):
            draw_view(ax, tagged, medium, view, weights[name])
            ax.set_title(name, fontsize="small")
        line[0].set_ylabel(title, fontsize="small")
    return figure


# --- stability


def agreement_curves(table: pd.DataFrame, chance: dict[str, float], lines: str = "domain") -> Figure:
    """How rankings agree against the number of samples, one panel a measure.

    Parameters
    ----------
    table : columns n, a column named by `lines`, and for each measure of `chance` its mean and measure_low, _high.
    chance : measure -> expected value, drawn dotted.
    lines : what tells lines apart.
    """
    figure, axes = plt.subplots(1, len(chance), figsize=(3.4 * len(chance), 3.1), sharex=True)
    for ax, (measure, level) in zip(np.atleast_1d(axes), chance.items()):
        for i, (name, part) in enumerate(table.groupby(lines, sort=False)):
            style = _style(name, i)
            ax.plot(part.n, part[measure], label=name, **style)
            ax.fill_between(part.n, part[f"{measure}_low"], part[f"{measure}_high"], color=style["color"], alpha=0.15)
        ax.axhline(level, ls=":", color="gray")
        ax.set(xscale="log", xlabel="samples", title=measure, ylim=(min(-0.05, level - 0.05), 1.02))
        ticks = sorted(table.n.unique())
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    np.atleast_1d(axes)[-1].legend(fontsize="small", loc="lower center")
    return figure


def matrices(tables: dict[str, pd.DataFrame], label: str, low: float = 0.0) -> Figure:
    """Square tables as annotated heat maps side by side, on one scale from `low` to 1."""
    sizes = [len(t) for t in tables.values()]
    widths = [0.55 * n + 1.2 for n in sizes]
    figure, axes = plt.subplots(
        1, len(tables), figsize=(sum(widths) + 0.8, 0.55 * max(sizes) + 1.6), width_ratios=widths, squeeze=False
    )
    for i, (ax, (name, table)) in enumerate(zip(axes[0], tables.items())):
        sns.heatmap(
            table.astype(float),
            ax=ax,
            vmin=low,
            vmax=1,
            cmap="crest",
            annot=True,
            fmt=".2f",
            annot_kws={"size": 8},
            square=True,
            cbar=i == len(tables) - 1,
            cbar_kws={"label": label, "shrink": 0.8},
        )
        ax.set(title=name, xlabel="", ylabel="")
        ax.tick_params(length=0)
        ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
        if any(isinstance(label, str) for label in table.columns):
            ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    return figure


def length_curves(table: pd.DataFrame) -> Figure:
    """Scores against context length, one panel a domain: columns domain, size, heads, score, low, high."""
    domains = list(dict.fromkeys(table.domain))
    figure, axes = plt.subplots(1, len(domains), figsize=(2.5 * len(domains) + 0.6, 2.9), sharey=True)
    for ax, domain in zip(axes, domains):
        for i, (name, part) in enumerate(table[table.domain == domain].groupby("heads", sort=False)):
            error = np.clip([part.score - part.low, part.high - part.score], 0, None)
            ax.errorbar(range(len(part)), part.score, error, label=name, capsize=3, **_style(name, i))
            ax.set_xticks(range(len(part)), part["size"])
        ax.set(title=domain, xlabel=table[table.domain == domain].what.iloc[0])
    axes[0].set(ylabel="score", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize="small")
    return figure


def universal_map(table: pd.DataFrame, shape: tuple[int, int]) -> Figure:
    """In how many domains each head is on top, as a map layers x heads (table of `corehead.ranking.universal`)."""
    count = np.zeros(shape, int)
    count[table["layer"], table["head"]] = table["domains"]
    most = table.shape[1] - 3
    figure, ax = plt.subplots(figsize=(5.6, 3.2))
    colours = ["#f2f2f2", *sns.color_palette("crest", most)]
    image = ax.imshow(count, cmap=ListedColormap(colours), vmin=-0.5, vmax=most + 0.5, aspect="auto")
    for layer, head in zip(table["layer"], table["head"]):
        ax.text(head, layer, count[layer, head], ha="center", va="center", color="white", fontsize="small")
    ax.set(xlabel="query head", ylabel="layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=ax, label="domains", ticks=range(most + 1))
    return figure


# --- ablation

METRIC = {"correct": "accuracy", "logprob": "log-probability (nats)", "margin": "margin (logits)"}
CURVE = {  # colour, marker and line of what is ablated
    "top": (PALETTE[3], "o", "-"),
    "bottom": (PALETTE[0], "v", "-"),
    "random": (PALETTE[7], "s", "--"),
    "layer": (PALETTE[2], "D", ":"),
    "intact": ("black", "P", "-"),
}


def _reach(table: pd.DataFrame, value: str) -> np.ndarray:
    """(2, rows), how far the interval of a column (its _low and _high) reaches to either side."""
    return np.clip([table[value] - table[f"{value}_low"], table[f"{value}_high"] - table[value]], 0, None)


def _style(name: str, i: int) -> dict:
    """Colour, marker and line style of a line: by its name where that has one, else by its place."""
    if name in CURVE:
        return dict(zip(("color", "marker", "ls"), CURVE[name]))
    if name in DOMAIN:
        return dict(color=PALETTE[DOMAIN[name]], marker=MARKER[name])
    markers, lines = "osv^DPX*<>hdp8", ("-", "--", ":", "-.")
    return dict(color=PALETTE[i % 10], marker=markers[i % 14], ls=lines[i // 3 % 4])


def ablation_curves(
    table: pd.DataFrame,
    metric: str = "correct",
    *,
    panels: str = "task",
    lines: str = "heads",
    intact: pd.Series | None = None,
    chance: dict[str, float] | None = None,
    mark: float | None = None,
    level: float | None = None,
    xlabel: str = "heads ablated (%)",
    columns: int = 4,
) -> Figure:
    """A metric against the share of heads, one panel a task, one line for each way to choose the heads.

    Parameters
    ----------
    table : of `corehead.evaluation.summary`, with columns share, `panels` and `lines`.
    metric : "correct", "logprob" or "margin".
    panels, lines : columns that tell panels and lines apart.
    intact : the metric without ablation by panel, drawn as the point at 0.
    chance : panel -> level, drawn dotted.
    mark : a share, drawn as a vertical line.
    level : a value of the metric, drawn dashed.
    """
    names = list(dict.fromkeys(table[panels]))
    aside = table[lines].nunique() > 6  # a long legend takes a panel of its own
    columns = min(columns, len(names) + aside)
    rows = -(-(len(names) + aside) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns + 0.8, 2.6 * rows + 0.4), sharey=metric == "correct", squeeze=False
    )
    for ax, name in zip(axes.flat, names):
        for i, (line, part) in enumerate(table[table[panels] == name].groupby(lines, sort=False)):
            style = _style(line, i)
            x, y = 100 * part.share.to_numpy(), part[metric].to_numpy()
            ax.fill_between(x, part[f"{metric}_low"], part[f"{metric}_high"], color=style["color"], alpha=0.18, lw=0)
            if intact is not None:
                x, y = np.append(0, x), np.append(intact[name], y)
            ax.plot(x, y, label=line, markersize=4, **style)
        if chance is not None and name in chance and metric == "correct":
            ax.axhline(chance[name], ls=":", color="gray")
        if mark is not None:
            ax.axvline(100 * mark, color="black", lw=0.8, alpha=0.5)
        if level is not None:
            ax.axhline(level, ls="--", color="black", lw=0.8)
        ax.set(title=name.replace("_", " "), xlabel=xlabel)
        if metric == "correct":
            ax.set_ylim(0, 1.03)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel(METRIC[metric])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if len(names) < rows * columns:
        axes.flat[-1].legend(handles, labels, loc="center", fontsize="small")
    else:
        figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize="small")
    return figure


def dots(table: pd.DataFrame, value: str, *, rows: str, panels: str, xlabel: str, zero: bool = True) -> Figure:
    """Values with intervals (columns value, value_low, value_high) as dots, one panel a task, a line a row."""
    names, lines = list(dict.fromkeys(table[panels])), list(dict.fromkeys(table[rows]))
    figure, axes = plt.subplots(
        1, len(names), figsize=(1.7 * len(names) + 1.9, 0.3 * len(lines) + 1.2), sharey=True, sharex=True, squeeze=False
    )
    for ax, name in zip(axes[0], names):
        part = table[table[panels] == name].set_index(rows).loc[lines]
        error = _reach(part, value)
        ax.errorbar(part[value], range(len(lines)), xerr=error, fmt="o", color=PALETTE[0], capsize=2, markersize=4)
        if zero:
            ax.axvline(0, color="gray", lw=0.8)
        ax.set(title=name.replace("_", " "), xlabel=xlabel)
    axes[0, 0].set_yticks(range(len(lines)), lines)
    axes[0, 0].invert_yaxis()
    return figure


# --- controls


def selectivity(table: pd.DataFrame) -> Figure:
    """What each ranking's top heads carry: damage to retrieval against damage to the rest, and the difference.

    Parameters
    ----------
    table : a row a ranking (index), best first; columns retrieval, rest and selectivity, each with _low and _high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.34 * len(table) + 1.4), sharey=True, width_ratios=[1.5, 1])
    y = np.arange(len(table))
    left.hlines(y, table.rest, table.retrieval, color="#bbbbbb", lw=2.5, zorder=1)
    for name, colour, marker in (("retrieval", PALETTE[3], "o"), ("rest", PALETTE[0], "s")):
        error = _reach(table, name)
        left.errorbar(table[name], y, xerr=error, fmt=marker, color=colour, capsize=2, label=name)
    right.barh(y, table.selectivity, color=[PALETTE[3] if v > 0 else PALETTE[0] for v in table.selectivity], alpha=0.75)
    right.errorbar(table.selectivity, y, xerr=_reach(table, "selectivity"), fmt="none", color="black", capsize=2)
    for ax in (left, right):
        ax.axvline(0, color="gray", lw=0.8)
    left.set(xlabel="accuracy lost")
    left.set_yticks(y, table.index)
    left.invert_yaxis()
    left.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.set(xlabel="selectivity: retrieval less the rest")
    return figure


def tournament(table: pd.DataFrame, value: str, label: str) -> Figure:
    """Score variants x query sets: a value in each cell with its interval (columns variant, query, value)."""
    wide = {end: table.pivot(index="variant", columns="query", values=f"{value}{end}") for end in ("", "_low", "_high")}
    order = [list(dict.fromkeys(table[axis])) for axis in ("variant", "query")]
    wide = {end: part.loc[order[0], order[1]].round(2) + 0.0 for end, part in wide.items()}  # no -0.00
    text = wide[""].map("{:.2f}".format) + "\n[" + wide["_low"].map("{:.2f}".format)
    text = text + ", " + wide["_high"].map("{:.2f}".format) + "]"
    figure, ax = plt.subplots(figsize=(5.4, 3.4))
    sns.heatmap(wide[""], ax=ax, annot=text, fmt="", cmap="rocket_r", vmin=0, cbar_kws={"label": label})
    ax.set(xlabel="query rows Q", ylabel="variant")
    ax.tick_params(length=0)
    return figure


# --- acceleration


def hybrid_pattern(seen: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> Figure:
    """What a dense and a streaming head attend to, and what their caches hold at the end.

    Parameters
    ----------
    seen : name -> (N, N) int: 0 nothing, 1 attended, 2 attended as a sink.
    kept : name -> (N,) bool, the positions that the cache holds after the last one.
    """
    colours = ListedColormap(["white", PALETTE[0], PALETTE[1]])
    figure, axes = plt.subplots(
        2, len(seen), figsize=(3.4 * len(seen), 4.2), height_ratios=[9, 1], sharex=True, squeeze=False
    )
    for (above, below), (name, matrix), held in zip(axes.T, seen.items(), kept.values()):
        above.imshow(matrix, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        above.set(title=name, ylabel="query position")
        last = np.where(held, np.maximum(matrix[-1], 1), 0)
        below.imshow(last[None], cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        below.set(yticks=[], xlabel="key position", ylabel="cache")
    names = ("window", "sinks")
    figure.legend(
        handles=[Patch(color=colours(i + 1), label=name) for i, name in enumerate(names)],
        loc="outside upper right",
        ncols=2,
        fontsize="small",
    )
    return figure


def dials(table: pd.DataFrame, fixed: dict[str, dict], metric: str = "correct") -> Figure:
    """A metric against one setting after the other, one panel each, all others as `fixed` says; dense as a line.

    Parameters
    ----------
    table : of `corehead.evaluation.summary`, with a column way ("dense" or "hybrid") and one for each setting.
    fixed : setting -> values of the others.
    """
    figure, axes = plt.subplots(1, len(fixed), figsize=(3 * len(fixed), 2.8), sharey=True, squeeze=False)
    whole = table[table.way == "dense"].iloc[0]
    for ax, (name, others) in zip(axes[0], fixed.items()):
        part = table[(table.way == "hybrid") & (table[list(others)] == pd.Series(others)).all(axis=1)].sort_values(name)
        error = _reach(part, metric)
        ax.errorbar(range(len(part)), part[metric], error, fmt="o-", color=PALETTE[3], capsize=3)
        ax.axhline(whole[metric], ls="--", color="black", lw=0.8)
        ax.set_xticks(range(len(part)), [f"{x:.0%}" if name == "share" else f"{x:g}" for x in part[name]])
        ax.set(xlabel="dense share" if name == "share" else name)
        title = ", ".join(f"{k} {v:.0%}" if k == "share" else f"{k} {v}" for k, v in others.items())
        ax.set_title(title, fontsize="small")
    axes[0, 0].set(ylabel=METRIC[metric], ylim=(0, 1.03) if metric == "correct" else None)
    return figure


def frontier(table: pd.DataFrame, metric: str = "correct", intact: pd.Series | None = None) -> Figure:
    """A metric against speed, one panel a domain, one line for each way to choose the dense heads.

    Parameters
    ----------
    table : of `corehead.evaluation.summary`, with columns domain, heads, share and speed (times dense attention).
    intact : domain -> the metric of dense attention, drawn as a dashed line.
    """
    domains = list(dict.fromkeys(table.domain))
    figure, axes = plt.subplots(1, len(domains), figsize=(4.2 * len(domains), 3.4), sharey=True, squeeze=False)
    for ax, domain in zip(axes[0], domains):
        part = table[table.domain == domain]
        for i, (name, line) in enumerate(part.groupby("heads", sort=False)):
            line, style = line.sort_values("speed"), _style(name, i + 2 * (i > 1))  # no colours of CURVE
            error = _reach(line, metric)
            # a little beside each other, for several lie on one point
            ax.errorbar(line.speed + 0.01 * i, line[metric], error, label=name, capsize=2, markersize=5, **style)
        for i, ((share, speed), _) in enumerate(part.groupby(["share", "speed"])):
            place = speed, 0.08 if i % 2 else 0.02
            ax.annotate(f"{share:.0%}", place, ha="center", fontsize="x-small", xycoords=("data", "axes fraction"))
        if intact is not None:
            ax.axhline(intact[domain], ls="--", color="black", lw=0.8)
        ax.set(title=domain, xlabel="prefill, times as fast as dense\n(inside: dense share)")
        (low, high), ticks = ax.get_ylim(), ax.get_yticks()
        ax.set_yticks([t for t in ticks if low <= t <= high])
        ax.set_ylim(low - 0.15 * (high - low), high)  # room for the shares
    axes[0, 0].set_ylabel(METRIC[metric])
    _one_legend(figure)
    return figure


def speed_curves(tables: dict[str, pd.DataFrame]) -> Figure:
    """Speed-up against length, one panel a table of `corehead.speed`, one line a way; what the bound allows dotted.

    Parameters
    ----------
    tables : title -> columns tokens, way, speed-up and bound, in units of time.
    """
    figure, axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.4), squeeze=False)
    for ax, (title, table) in zip(axes[0], tables.items()):
        bound = table[table.way == "dense"].set_index("tokens").bound
        _against_length(ax, table[table.way != "dense"], "speed-up", bound)
        ax.axhline(1, color="gray", lw=0.8)
        ax.set(title=title, ylabel="times as fast as dense")
    _one_legend(figure)
    return figure


def memory_curves(tables: dict[str, pd.DataFrame]) -> Figure:
    """Columns in MiB against length, one panel each (title -> columns tokens, way and the title itself), dense too."""
    figure, axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.2), squeeze=False)
    for ax, (value, table) in zip(axes[0], tables.items()):
        _against_length(ax, table, value)
        ax.set_yscale("log")
        ax.set(title=value)
    _one_legend(figure)
    return figure


def _against_length(ax: Axes, table: pd.DataFrame, value: str, bound: pd.Series | None = None) -> None:
    """A line a way; dotted in its colour how far below `bound` (of dense, by tokens) its own bound is."""
    for i, (way, part) in enumerate(table.groupby("way", sort=False)):
        style = _style(way, i)
        ax.plot(part.tokens, part[value], label=way, markersize=4, **style)
        if bound is not None:
            ax.plot(part.tokens, bound.loc[part.tokens].to_numpy() / part.bound, color=style["color"], ls=":", lw=1)
    ticks = sorted(set(table.tokens))
    ax.set_xscale("log", base=2)
    ax.set_xlabel("tokens")
    ax.set_xticks(ticks, [f"{n / 1024:g}k" for n in ticks])


def _one_legend(figure: Figure) -> None:
    """The first panel's legend, above all panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")


# --- several models


def layer_profiles(heads: pd.DataFrame, value: str = "ram last") -> Figure:
    """Best head of every layer, one panel a model, one line a domain.

    Parameters
    ----------
    heads : columns model, domain, layer and `value`, as `corehead.testbed.survey` writes them.
    """
    models = list(dict.fromkeys(heads.model))
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns, 2.2 * rows + 0.4), sharex="col", sharey=True, squeeze=False
    )
    for ax in axes.flat[len(models) :]:
        ax.remove()
    for i, (ax, name) in enumerate(zip(axes.flat, models)):
        best = heads[heads.model == name].groupby(["domain", "layer"], sort=False)[value].max()
        for domain, line in best.groupby("domain", sort=False):
            depth = line.index.get_level_values("layer")
            ax.plot(depth / depth.max(), line, label=domain, markersize=3, **_style(domain, 0))
        ax.set_title(name, fontsize="small")
        ax.set_ylim(0, 1)
        if i + columns >= len(models):  # the lowest of its column
            ax.set_xlabel("depth")
            ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("RAM, best head")
    _one_legend(figure)
    return figure


def model_dots(table: pd.DataFrame, value: str = "correct") -> Figure:
    """A measure with its interval, one panel a domain, one row a model, one mark for each set of heads.

    Parameters
    ----------
    table : columns model, domain, heads, `value`, its _low and _high, as `corehead.testbed.survey` writes them. Sets
        whose names begin with the same word have one colour, ever paler.
    """
    domains, models = (list(dict.fromkeys(table[c])) for c in ("domain", "model"))
    kinds = list(dict.fromkeys(table["heads"]))
    figure, axes = plt.subplots(
        1, len(domains), figsize=(2.2 * len(domains) + 1.6, 0.34 * len(models) + 1.5), sharey=True, squeeze=False
    )
    for ax, domain in zip(axes[0], domains):
        for i, kind in enumerate(kinds):
            part = table[(table.domain == domain) & (table["heads"] == kind)].set_index("model").reindex(models)
            error = _reach(part, value)
            place = np.arange(len(models)) + 0.12 * (i - (len(kinds) - 1) / 2)
            name = kind.split()[0]
            paler = sum(other.split()[0] == name for other in kinds[:i])
            style = _style(name, 4) | dict(ls="none", alpha=1 - 0.3 * paler)
            ax.errorbar(part[value], place, xerr=error, label=kind, markersize=4, capsize=0, **style)
        ax.set(title=domain, xlabel=METRIC[value], xlim=(0, 1.03) if value == "correct" else None)
    axes[0, 0].set_yticks(range(len(models)), models)
    axes[0, 0].invert_yaxis()
    _one_legend(figure)
    return figure


def training_time(log: pd.DataFrame, snapshots: pd.DataFrame) -> Figure:
    """How heads come up while a model is trained: loss, accuracy and the best head's score, on one axis of steps.

    Parameters
    ----------
    log : columns step and loss.
    snapshots : columns step, domain, correct (accuracy) and score (of the best head).
    """
    figure, axes = plt.subplots(3, 1, figsize=(7, 5.4), sharex=True)
    axes[0].plot(log.step, log.loss, color="black", lw=0.8)
    axes[0].set(ylabel="loss", yscale="log")
    for ax, column, label in ((axes[1], "correct", "accuracy"), (axes[2], "score", "RAM, best head")):
        for domain, line in snapshots.groupby("domain", sort=False):
            ax.plot(line.step, line[column], label=domain, **_style(domain, 0))
        ax.set(ylabel=label, ylim=(0, 1.03))
    axes[2].set_xlabel("training step")
    axes[1].legend(ncols=4, fontsize="small", loc="lower right")
    return figure


def training_agreement(table: pd.DataFrame, chance: dict[str, float]) -> Figure:
    """Agreement with the finished model's ranking while it is trained, one panel a measure, one line a domain.

    Parameters
    ----------
    table : columns step, domain and the measures of `chance`.
    chance : measure -> expected value, drawn dotted.
    """
    figure, axes = plt.subplots(1, len(chance), figsize=(3.4 * len(chance), 2.9), sharex=True, squeeze=False)
    for ax, (measure, level) in zip(axes[0], chance.items()):
        for domain, line in table.groupby("domain", sort=False):
            ax.plot(line.step, line[measure], label=domain, markersize=4, **_style(domain, 0))
        ax.axhline(level, ls=":", color="gray")
        ax.set(xlabel="training step", title=measure, ylim=(min(-0.05, table[measure].min() - 0.05), 1.03))
    _one_legend(figure)
    return figure
