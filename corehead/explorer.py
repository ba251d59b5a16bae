"""The head explorer: `Exploration` is what is computed of a sample, `Explorer` the widgets that show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.colors import to_hex

from . import plots
from .ablation import Ablation, Reference
from .batching import with_question
from .evaluation import evaluate
from .models import MLLM
from .ranking import HeadRanking, HeadSet
from .samples import Sample, SampleError
from .scoring import QUERIES, HeadScores, attention_map, query_rows, score
from .tagging import Prompt

try:
    import ipywidgets as widgets
except ImportError as error:
    fix = "pip install 'corehead[explore]'"
    raise ImportError(f"the head explorer needs ipywidgets: {fix}") from error

Samples = Iterable[Sample | tuple[Sample, Sample]]
Scores = HeadScores | HeadRanking | xr.DataArray
KINDS = "V*", "other visual", "other text", "sink"
BAR = "<div style='border-left:{2:.0f}px solid {3};padding:0 8px'>{1:.2f} {0}</div>"
PHASES = {"zero": "both", "knockout": "both", "patch": "last"}  # by mode, see `Ablation`
SHADES = [to_hex(c) for c in plt.get_cmap(plots.NUMBERS)(np.linspace(0, 1, 12))]
MAP_WIDTH = 416  # pixels


class Exploration:
    """One sample: where every head looks, and what the model answers with some heads changed.

    Parameters
    ----------
    mllm : MLLM
    sample : Sample
    donor : Sample, optional
        Its counterfactual, whose outputs heads are given in mode "patch".

    Raises
    ------
    SampleError
        The sample cannot be tagged.
    """

    def __init__(self, mllm: MLLM, sample: Sample, donor: Sample | None = None):
        prompt = Prompt(mllm, sample)
        begin, end = prompt.find_question()
        self.question = prompt.text[begin:end]
        self.tagged = prompt.tag()
        self.mllm, self.sample, self.donor = mllm, sample, donor
        self.queries = [name for name, rows in query_rows(self.tagged).items() if len(rows)]
        lacking = {"knockout": not len(self.tagged.evidence), "patch": donor is None}
        self.modes = [mode for mode in PHASES if not lacking.get(mode)]
        self._attention: dict[str, np.ndarray] = {}
        self._answers: dict[tuple, pd.Series] = {}

    def attention(self, query: str) -> np.ndarray:
        """(L, H, N) attention weights, see `corehead.scoring.attention_map`."""
        if query not in self._attention:
            self._attention[query] = attention_map(self.mllm, self.tagged, query)
        return self._attention[query]

    def mass(self, query: str) -> np.ndarray:
        """(L, H, 4) attention mass on KINDS, which sums to 1; that on V* is the sample's RAM."""
        kinds = np.full(len(self.tagged.ids), 2)
        kinds[self.tagged.visual] = 1
        kinds[0] = 3
        kinds[self.tagged.evidence] = 0
        return self.attention(query) @ np.eye(len(KINDS))[kinds]

    def answer(self, heads: HeadSet, mode: str) -> pd.Series:
        """The row of `evaluate` with these heads changed in one of `modes`; of no heads, intact."""
        key = (heads, mode) if heads else None
        if key not in self._answers:
            reference = None
            if mode == "patch":
                names = {self.sample.id: self.donor.id}
                reference = Reference(self.mllm, [self.donor], names)
            ablation = Ablation(heads, mode, PHASES[mode], reference) if heads else None
            table = evaluate(self.mllm, [self.sample], {"": ablation}, progress=False)
            self._answers[key] = table.assign(probability=np.exp(table.logprob)).iloc[0]
        return self._answers[key]

    def asking(self, question: str, answer: str) -> Exploration:
        """The same context and V*, with another question and another answer to expect."""
        both = [self.sample] if self.donor is None else [self.sample, self.donor]
        sample, *donor = [with_question(s, self.question, question) for s in both]
        return Exploration(self.mllm, replace(sample, answer=answer or None), *donor)


def explore(
    mllm: MLLM, samples: Samples, scores: Scores | Mapping[str, Scores] | None = None
) -> Explorer:
    """Open the head explorer, a widget for JupyterLab and voila.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample or (Sample, Sample)
        A pair is a sample and its counterfactual, as of `corehead.testbed.counterfactuals`: heads can be patched, too.
    scores : HeadScores, HeadRanking, DataArray (layer, head) or mapping of str to them, optional
        What the map of heads shows, by name. None scores the samples.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        There are no samples; scores of another kind, or of a model of another shape.
    ImportError
        ipywidgets is not installed.
    """
    pairs = [s if isinstance(s, tuple) else (s, None) for s in samples]
    if not pairs or not all(isinstance(pair[0], Sample) for pair in pairs):
        raise ValueError("samples: give at least one, each a Sample or a pair of them")
    if scores is None:
        scores = score(mllm, [sample for sample, _ in pairs], null=False)
    if not isinstance(scores, Mapping):
        scores = {"RAM" if isinstance(scores, HeadScores) else "scores": scores}
    return Explorer(mllm, pairs, {n: _as_ranking(mllm, n, s) for n, s in scores.items()})


def _as_ranking(mllm: MLLM, name: str, scores: Scores) -> HeadRanking:
    """Scores of any kind as a ranking of the model's heads."""
    if isinstance(scores, HeadScores):
        scores = scores.rank()
    elif isinstance(scores, xr.DataArray) and set(scores.dims) == {"layer", "head"}:
        scores = HeadRanking(scores.transpose("layer", "head").values)
    elif not isinstance(scores, HeadRanking):
        kind = getattr(scores, "dims", type(scores).__name__)
        fix = "Give HeadScores, a HeadRanking or a DataArray, such as use.mean('sample')"
        raise ValueError(f"scores {name!r}: {kind} is not (layer, head). {fix}")
    scores.check(mllm)
    return scores


class Explorer(widgets.VBox):
    """The widgets of `explore`; `exploration` is what they show, `ticked` the heads that are changed."""

    def __init__(self, mllm: MLLM, pairs: list[tuple], rankings: Mapping[str, HeadRanking]):
        self.mllm, self.pairs, self.rankings = mllm, pairs, rankings
        self.ticked = self.no_heads = HeadSet.of([], mllm.shape)
        places = [(f"layer {i}, head {j}", (i, j)) for i, j in np.ndindex(mllm.shape)]
        best = tuple(next(iter(rankings.values())).order[0].tolist())
        ids = [(pair[0].id, i) for i, pair in enumerate(pairs)]
        self.sample = widgets.Dropdown(options=ids, description="sample")
        self.question = widgets.Text(description="question")
        self.expected = widgets.Text(description="answer")
        self.ask = widgets.Button(description="ask")
        self.scores = widgets.Dropdown(options=list(rankings), description="map")
        self.top = widgets.IntSlider(max=len(places), description="change top")
        self.top.continuous_update = False
        self.mode = widgets.ToggleButtons(options=list(PHASES))
        self.query = widgets.Dropdown(options=QUERIES, description="rows of")
        self.head = widgets.Dropdown(options=places, value=best, description="head")
        self.tick = widgets.Checkbox(description="change this head", indent=False)
        self.picture = widgets.Image()
        panels = (widgets.HTML() for _ in range(4))
        self.message, self.answers, self.mass, self.tokens = panels
        left = [self.scores, self._make_map(), self.top, self.mode, self.answers]
        right = [self.query, self.head, self.tick, self.mass, self.picture, self.tokens]
        self.body = widgets.HBox([widgets.VBox(left), widgets.VBox(right)])
        asked = widgets.HBox([self.sample, self.question, self.expected, self.ask])
        super().__init__([asked, self.message, self.body])
        self._open()
        self.sample.observe(self._open, "value")
        self.scores.observe(self._paint, "value")
        self.query.observe(self._look, "value")
        self.head.observe(self._look, "value")
        self.tick.observe(self._tick_one, "value")
        self.top.observe(self._tick_top, "value")
        self.mode.observe(self._answer, "value")
        self.ask.on_click(self._ask)

    def _make_map(self) -> widgets.GridBox:
        """A button a head; styles and layouts are shared, since a thousand of each would be slow."""
        columns = self.mllm.n_heads
        size = f"{np.clip(MAP_WIDTH // columns, 14, 26)}px"
        box = {"width": size, "height": size, "padding": "0", "margin": "0"}
        self.plain = widgets.Layout(border="1px solid #ddd", **box)
        self.framed = widgets.Layout(border=f"3px solid {plots.EVIDENCE}", **box)
        self.shades = [widgets.ButtonStyle(button_color=shade) for shade in SHADES]
        for style in self.shades[len(SHADES) // 2 :]:
            style.text_color = "white"
        label = "<center style='font-size:9px;line-height:{}'>{}</center>".format
        labels = [widgets.HTML(label(size, i)) for i in range(max(self.mllm.shape))]
        cells = [widgets.HTML(), *labels[:columns]]
        self.buttons = {}
        for name, (layer, head) in self.head.options:
            self.buttons[layer, head] = button = widgets.Button(tooltip=name)
            button.on_click(lambda _, i=layer, j=head: setattr(self.head, "value", (i, j)))
            cells += [button] if head else [labels[layer], button]
        template = f"repeat({columns + 1}, {size})"
        return widgets.GridBox(cells, layout={"grid_template_columns": template})

    def _open(self, _=None) -> None:
        """Another sample."""
        self.base = None
        try:
            self.base = Exploration(self.mllm, *self.pairs[self.sample.value])
        except SampleError as error:
            return self._show(None, str(error))
        self.exploration = self.base  # what new options of a control draw
        self.question.value = self.base.question
        self.expected.value = self.base.sample.answer or ""
        self.query.options = self.base.queries
        self.mode.options = self.base.modes
        self._show(self.base)

    def _ask(self, _=None) -> None:
        """Another question, or another answer to expect."""
        try:
            exploration = self.base.asking(self.question.value, self.expected.value)
        except SampleError as error:
            return self._show(None, str(error))
        other = exploration.question != self.base.question
        self._show(exploration, f"V* is that of “{self.base.question}”" if other else "")

    def _show(self, exploration: Exploration | None, message: str = "") -> None:
        self.exploration = exploration
        self.ask.disabled = self.base is None
        self.message.value = f"<b style='color:{plots.EVIDENCE}'>{escape(message)}</b>"
        self.body.layout.display = "none" if exploration is None else "flex"
        if exploration is not None:
            self._look()
            self._answer()

    def _tick_one(self, change) -> None:
        head = HeadSet.of([self.head.value], self.mllm.shape)
        self._tick(self.ticked | head if change.new else self.ticked - head)

    def _tick_top(self, _) -> None:
        best = self.rankings[self.scores.value].order[: self.top.value]
        self._tick(HeadSet.of(best, self.mllm.shape))

    def _tick(self, heads: HeadSet) -> None:
        self.ticked = heads
        self.tick.value = self.head.value in heads
        self._paint()
        self._answer()

    def _paint(self, _=None) -> None:
        """The map, on a scale with 0: a cross on heads that are changed, a frame around the chosen one."""
        values = self.rankings[self.scores.value].values
        low = min(0, values.min())
        shades = (values - low) / (values.max() - low or 1) * (len(SHADES) - 1)
        for place, button in self.buttons.items():
            button.style = self.shades[round(shades[place])]
            button.layout = self.framed if place == self.head.value else self.plain
            button.description = "✕" if self.ticked.mask[place] else ""

    def _look(self, _=None) -> None:
        """Where the chosen head looks."""
        head, query, tagged = self.head.value, self.query.value, self.exploration.tagged
        self.tick.value = head in self.ticked
        self._paint()
        weights = self.exploration.attention(query)[head]
        mass = zip(KINDS, self.exploration.mass(query)[head])
        self.mass.value = "".join(
            BAR.format(k, m, 300 * m, plots.TOKENS[k]) for k, m in mass
        )
        self.tokens.value = plots.shaded_text(tagged, self.mllm.tokenizer, weights)
        self.picture.layout.display = "block" if tagged.media else "none"
        if tagged.media:
            png = BytesIO()
            figure = plots.attention(tagged, weights)
            figure.savefig(png, format="png", dpi=100)
            plt.close(figure)  # a notebook would show it again
            self.picture.value = png.getvalue()

    def _answer(self, _=None) -> None:
        """What the model answers, intact and changed."""
        mode = self.mode.value
        changed = f"{mode}: {len(self.ticked)} of {self.ticked.mask.size}"
        sets = {"intact": self.no_heads, changed: self.ticked}
        try:
            rows = {name: self.exploration.answer(sets[name], mode) for name in sets}
        except ValueError as error:
            self.answers.value = escape(str(error))
            return
        table = pd.DataFrame(rows).T[["prediction", "probability", "margin"]]
        table.columns = ["says", f"P({self.exploration.sample.answer})", "logit margin"]
        self.answers.value = table.to_html(border=0, float_format="{:.3f}".format)
