"""What a written answer is worth, as each benchmark defines it.

A sample's `metric` takes the text and gives named values; the first is "parsed": 0 where no answer could be found in
the text, which then counts as wrong. `table` says how many there were.
"""

from __future__ import annotations

import ast
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torchvision.ops import box_iou

from .rows import Box

DIGITS = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = rf"[-+]?{DIGITS}"
# words that go on behind a letter as they would not behind the article
BEHIND_A_LETTER = "is|was|because|since|as|and|or|but|shows?|seems"
UNANSWERABLE = "not answerable"


# Boxes and tubes


def _bracketed(text: str, count: int) -> list[tuple[float, ...]]:
    """Every [a, b, ...] or (a, b, ...) of `count` numbers in a text."""
    numbers = r"\s*,\s*".join([f"({NUMBER})"] * count)
    return [
        tuple(map(float, found))
        for found in re.findall(rf"[\[(]\s*{numbers}\s*[\])]", text)
    ]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one is empty."""
    boxes = torch.tensor([a, b], dtype=torch.float64)
    # 0 / 0 where both are empty
    return float(box_iou(boxes[:1], boxes[1:]).nan_to_num())


def box_metric(text: str, box: Box) -> dict[str, float]:
    """RefCOCOg: IoU, and accuracy at IoU >= 0.5. The answer is the first [x1, y1, x2, y2] of the text.

    Parameters
    ----------
    text : str
        What the model wrote.
    box : (x1, y1, x2, y2)
        The true box, 0..1.
    """
    found = _bracketed(text, 4)  # the first counts: listing many boxes must not help
    value = iou(found[0], box) if found else 0.0
    return {"parsed": float(bool(found)), "iou": value, "acc@0.5": float(value >= 0.5)}


def tube_iou(found: Mapping[int, Box], true: Mapping[int, Box]) -> tuple[float, float]:
    """Temporal and spatio-temporal IoU of two tubes {frame: box}.

    tIoU = ``|P & G| / |P | G|`` over frames; vIoU = the sum of the boxes' IoU over P & G, divided by ``|P | G|``.
    """
    union, both = found.keys() | true.keys(), found.keys() & true.keys()
    if not union:
        return 0.0, 0.0
    return len(both) / len(union), sum(iou(found[f], true[f]) for f in both) / len(union)


def tube_metric(
    text: str, seconds: Sequence[float], boxes: Mapping[int, Box]
) -> dict[str, float]:
    """VidSTG: tIoU, vIoU, and whether vIoU exceeds 0.3 and 0.5; their means are m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5.

    The answer is every [seconds, x1, y1, x2, y2] of the text. The tube lasts from the first to the last of them; in
    between its box moves evenly.

    Parameters
    ----------
    text : str
        What the model wrote.
    seconds : sequence of float
        Of the frames that it saw.
    boxes : mapping of int to (x1, y1, x2, y2)
        The true tube over those frames, 0..1.
    """
    # one box for each time that is named; of several the last
    rows = sorted({row[0]: row for row in _bracketed(text, 5)}.values())
    found: dict[int, Box] = {}
    if rows:
        times, *sides = np.array(rows).T
        # seconds are written rounded: a frame belongs to the tube up to half a step outside
        half = (seconds[1] - seconds[0]) / 2 if len(seconds) > 1 else math.inf
        for i, second in enumerate(seconds):
            if times[0] - half < second < times[-1] + half:
                found[i] = tuple(float(np.interp(second, times, side)) for side in sides)
    time, space = tube_iou(found, boxes)
    values = {
        "tiou": time,
        "viou": space,
        "viou@0.3": float(space > 0.3),
        "viou@0.5": float(space > 0.5),
    }
    return {"parsed": float(bool(rows)), **values}


# Pages and layouts


def recall_at(ranked: Sequence[int], true: Collection[int], k: int) -> float:
    """Share of the true pages among the first k of a ranking; ValueError where there are no true pages."""
    if not true:
        raise ValueError("recall without true pages: leave the question out")
    return len(set(ranked[:k]) & set(true)) / len(set(true))


def _area(boxes: Sequence[Box]) -> float:
    """Area that boxes cover together: what two of them cover counts once."""
    corners = np.array(boxes).reshape(-1, 4)
    xs = np.unique(corners[:, ::2])
    ys = np.unique(corners[:, 1::2])
    covered = np.zeros((len(ys), len(xs)), bool)  # cells between all edges
    for left, top, right, bottom in corners:
        rows = slice(*np.searchsorted(ys, (top, bottom)))
        covered[rows, slice(*np.searchsorted(xs, (left, right)))] = True
    return float((covered[:-1, :-1] * np.outer(np.diff(ys), np.diff(xs))).sum())


def layout_recall_at(
    ranked: Sequence[tuple[int, Box]], true: Sequence[tuple[int, Box]], k: int
) -> float:
    """Area of the true layouts that the first k of a ranking cover, divided by their area (MMDocIR).

    What two of the k cover counts once; in MMDocIR's own metric_eval.py it counts twice, and recall can exceed 1.

    Parameters
    ----------
    ranked, true : sequence of (page, box)
    k : int
        How many of `ranked` count.

    Raises
    ------
    ValueError
        There are no true layouts.
    """
    if not true:
        raise ValueError("recall without true layouts: leave the question out")
    covered = area = 0.0
    for page, (x1, y1, x2, y2) in true:
        # a box that lies outside is clipped to one without area
        inside = [
            np.clip(box, [x1, y1, x1, y1], [x2, y2, x2, y2])
            for p, box in ranked[:k]
            if p == page
        ]
        covered += _area(inside)
        area += (x2 - x1) * (y2 - y1)
    return covered / area


def page_metric(text: str, pages: Collection[int]) -> dict[str, float]:
    """MMDocIR, pages: recall@1, 3, 5 of the page numbers in the order in which the text names them.

    Parameters
    ----------
    text : str
        What the model wrote.
    pages : collection of int
        The true page numbers, as the question counts them (from 1).
    """
    # whole numbers, no parts of "3.5"; a page that is named again keeps its first rank
    ranked = list(
        dict.fromkeys(int(n) for n in re.findall(r"(?<![\d.])\d{1,6}(?![\d.]*\d)", text))
    )
    return {
        "parsed": float(bool(ranked)),
        **{f"recall@{k}": recall_at(ranked, pages, k) for k in (1, 3, 5)},
    }


# Texts


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def said(text: str) -> str:
    """What stands behind the first "Answer:", or the whole text."""
    return re.split(r"answer:", text, maxsplit=1, flags=re.IGNORECASE)[-1].strip()


def distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    # the table of all prefixes, of which one row is held
    row = list(range(len(b) + 1))
    for i, c in enumerate(a, 1):
        above, row = row, [i]
        for j, d in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (c != d)))
    return row[-1]


def anls(text: str, golds: str | Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest true answer; 0 where it is not above the threshold."""
    best = 0.0
    for gold in [golds] if isinstance(golds, str) else golds:
        a, b = text.lower().strip(), gold.lower().strip()
        best = max(best, 1 - distance(a, b) / max(len(a), len(b), 1))
    return best if best > threshold else 0.0


def f1(text: str, gold: str) -> float:
    """F1 of the words of two texts."""
    a, b = Counter(plain(text).split()), Counter(plain(gold).split())
    if not b:  # an answer of nothing but articles and punctuation
        return float(text.lower().strip() == gold.lower().strip())
    return 2 * (a & b).total() / max(1, a.total() + b.total())


# addresses, files, dates, numbers: nearly right is wrong
_EXACT = re.compile(
    r"https?://|\.(py|ipynb)$|^page|^\d+([-\s]\d+)?$|[ap]\.m\b|^\d{4}[-/\s]\d{1,2}([-/\s]\d{1,2})?$"
    r"|^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$|^[\w.%+-]+@[\w.-]+\.[a-z]{2,}$"
)
_UNITS = re.compile(
    r"(?<=[\d\s])(miles?|million|billion|thousand|kg|meters|acres|minutes|feet|mm|m)\.?$"
)


def _bare(value: object) -> str:
    """A text in lower case without unit, brackets behind it, quotes, currency and per cent signs."""
    text = _UNITS.sub("", str(value).lower().strip()).strip()
    text = re.sub(r"\s*\([^)]*\)", "", text).strip()
    return text.strip("'\"").strip().lstrip("$£").rstrip("%").strip()


def _number(value: object) -> float | None:
    """The number that a text is, a comma between thousands allowed; None where it is none."""
    text = _bare(value)
    # "1,234" is a number, "1,2" is none
    text = (
        text.replace(",", "")
        if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text)
        else text
    )
    return float(text) if re.fullmatch(NUMBER + r"(?:e[-+]?\d{1,2})?", text) else None


def _close(gold: float, found: float) -> bool:
    """Equal within 1 % or to the places of both; a per cent sign may have been taken along or not."""
    for true in (gold / 100, gold, gold * 100):
        places = max(2, min(_places(true), _places(found)))
        if math.isclose(true, found, rel_tol=0.01) or round(true, places) == round(
            found, places
        ):
            return True
    return False


def _places(value: float) -> int:
    """Digits behind the point, as Python writes the number; 3 where it writes none, as the repository has it."""
    _, point, digits = str(value).partition(".")
    return len(digits) if point else 3


def _entries(value: object) -> list:
    """A list, or the text of one; any other text is its only entry."""
    if isinstance(value, str) and value.strip().startswith("["):
        # as Python writes it in the benchmark's files, or as JSON; neither runs code
        for read in (ast.literal_eval, json.loads):
            try:
                value = read(value.strip())
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _score(parsed: bool, score: float) -> dict[str, float]:
    return {"parsed": float(parsed), "score": float(score)}


def _by_number(
    answer: str, gold: str, same: Callable[[float, float], bool]
) -> dict[str, float]:
    true, found = _number(gold), _number(answer)
    return _score(found is not None, None not in (true, found) and same(true, found))


def _by_text(answer: str, gold: str) -> dict[str, float]:
    # a full stop at the end of either is no difference
    true, found = (_bare(value).rstrip(".") for value in (gold, answer))
    return _score(bool(found), found == true if _EXACT.search(true) else anls(found, true))


def _by_entries(answer: str, gold: str) -> dict[str, float]:
    true, found = (sorted(map(_bare, _entries(value))) for value in (gold, answer))
    parsed = found != [""]
    # both are sorted: the order of entries does not count, their number does
    if not parsed or len(true) != len(found):
        return _score(parsed, 0)
    # the true list may be empty
    if not true or any(
        _number(entry) is not None or _EXACT.search(entry) for entry in true
    ):
        return _score(True, true == found)
    return _score(True, min(anls(f, t) for f, t in zip(found, true)))


def doc_rule(text: str, gold: str, kind: str) -> dict[str, float]:
    """MMLongBench-Doc: the rule of each answer_format, applied to what stands behind "Answer:".

    Int: equal whole numbers. Float: equal within 1 %, or 100 times so. Str and None: ANLS (0.5), but equality for
    addresses, dates and numbers. List: of one length and, in sorted order, all equal (where one is a number, a date) or
    the least ANLS of a pair.

    The repository's eval_score.py is followed but where it takes form for content: units, currency and a full stop at
    the end count for nothing (there "$6" is no whole number, and units stay, though it means to cut them), and a list
    that Python cannot read is one entry (there it stops the run). An Int whose answer is no number, as three rows have,
    is never right, as there.

    Parameters
    ----------
    text : str
        What the model wrote; the benchmark has another model cut the short answer out of it first.
    gold, kind : str
        The row's answer and answer_format.

    Raises
    ------
    ValueError
        An answer_format that the benchmark does not have.
    """
    answer = said(text)
    if kind == "Int":
        return _by_number(answer, gold, lambda true, found: int(true) == int(found))
    if kind == "Float":
        return _by_number(answer, gold, _close)
    if kind in ("Str", "None"):
        return _by_text(answer, UNANSWERABLE if kind == "None" else gold)
    if kind == "List":
        return _by_entries(answer, gold)
    raise ValueError(f"answer_format {kind!r}: take Int, Float, Str, List or None")


def doc_qa(text: str, gold: str, kind: str) -> dict[str, float]:
    """MMLongBench, document questions: a true number anywhere in the answer counts; texts by F1 of their words.

    Parameters
    ----------
    text : str
        What the model wrote.
    gold, kind : str
        The row's answer and answer_format: Integer, Float, String, List or None.

    Raises
    ------
    ValueError
        An answer_format that the benchmark does not have.
    """
    answer = said(text)
    if kind in ("Integer", "Float"):
        true = _number(gold)
        same = _close if kind == "Float" else float.__eq__
        # commas between thousands, and signs that are no hyphens
        whole = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
        found = [float(n) for n in re.findall(rf"(?<!\w){NUMBER}|{DIGITS}", whole)]
        return _score(bool(found), true is not None and any(same(true, n) for n in found))
    if kind in ("String", "None"):
        exact = _EXACT.search(gold.lower())
        return _score(
            bool(answer), gold.lower() in answer.lower() if exact else f1(answer, gold)
        )
    if kind == "List":
        entries = [str(entry) for entry in _entries(gold)]
        words = [
            entry
            for entry in entries
            if _number(entry) is None and not _EXACT.search(entry.lower())
        ]
        parts = [entry for entry in entries if entry not in words]
        parts += [" ".join(words)] * bool(words)  # texts are compared as one
        scores = [doc_qa(text, part, _kind(part))["score"] for part in parts]
        return _score(bool(answer), np.mean(scores) if scores else 0)
    raise ValueError(f"answer_format {kind!r}: take Integer, Float, String, List or None")


def _kind(entry: str) -> str:
    number = _number(entry)
    if number is None:
        return "String"
    return "Integer" if number.is_integer() else "Float"


def sub_em(text: str, golds: str | Sequence[str]) -> dict[str, float]:
    """A true answer stands anywhere in the text, both in lower case and without articles and punctuation."""
    answer = plain(text)
    every = [golds] if isinstance(golds, str) else golds
    known = [gold for gold in map(plain, every) if gold]  # an empty text stands in any
    return {
        "parsed": float(bool(answer)),
        "sub_em": float(any(gold in answer for gold in known)),
    }


def soft_acc(text: str, counts: Sequence[int]) -> dict[str, float]:
    """Counts of needles: the sum of the last list of whole numbers (without a list, of all of them) is the true one."""
    answer = said(text)
    lists = re.findall(r"\[[\d\s,]+\]", answer)
    found = [int(n) for n in re.findall(r"\d{1,9}", lists[-1] if lists else answer)]
    return {
        "parsed": float(bool(found)),
        "soft_acc": float(bool(found) and sum(found) == sum(counts)),
    }


def yes_no(text: str, right: str) -> dict[str, float]:
    """The last "yes" or "no" of the text is the right one; for an answer with neither MMLongBench takes a guess."""
    found = re.findall(r"\b(yes|no)\b", said(text).lower())
    return {"parsed": float(bool(found)), "accuracy": float(found[-1:] == [right])}


def letter(text: str, options: Sequence[str]) -> int | None:
    """Which option a text takes: by its letter or, word for word, by its text; None where that is not to be told."""
    last = chr(ord("A") + len(options) - 1)
    text = text.strip()
    bracketed = set(re.findall(rf"\(([A-{last}])\)", text))
    # who names several takes none
    if len(bracketed) > 1:
        return None
    # a letter in front, or one behind "answer" or "option"
    for pattern in (
        rf"^\W*([A-{last}])(?![A-Za-z']|-[a-z])",
        rf"(?i:answer|option)(?: is)?:?\s*\(?([A-{last}])(?![A-Za-z']|-[a-z])",
    ):
        found = re.search(pattern, text)
        behind = text[found.end() :] if found else ""
        # "A man ..." is the article, "A or B" is no choice
        article = re.match(rf"\s+(?!({BEHIND_A_LETTER})\b)[a-z]", behind)
        several = re.match(rf"\W+(or|and)\W+[A-{last}]\b", behind)
        if found and not several and not (found[1] == "A" and article):
            return ord(found[1]) - ord("A")
    # no letter: the option's own words, if they are one option's alone
    answer = plain(said(text))
    same = [
        i for i, option in enumerate(options) if plain(option) and plain(option) == answer
    ]
    if len(same) == 1:
        return same[0]
    return ord(bracketed.pop()) - ord("A") if bracketed else None


def choice_metric(text: str, options: Sequence[str], right: int) -> dict[str, float]:
    """Multiple choice (MLVU; mc_acc of MMLongBench): the option that the text takes is the right one.

    Parameters
    ----------
    text : str
        What the model wrote.
    options : sequence of str
        Their texts, or empty texts where they are pictures.
    right : int
        Index of the right one.
    """
    found = letter(text, options)
    return {"parsed": float(found is not None), "accuracy": float(found == right)}


# Tables


def table(results: pd.DataFrame, by: str | list[str] | None = None) -> pd.DataFrame:
    """Means of the metrics of ``ch.evaluate(..., new_tokens=...)``.

    Parameters
    ----------
    results : DataFrame
        Its rows; the metrics are the columns of numbers behind "parsed".
    by : str or list of str, optional
        Columns to group by, such as "condition"; None gives one row.

    Returns
    -------
    DataFrame
        n, unparsed (how many answers could not be read; they count as wrong), and the mean of each metric.
    """
    # `evaluate` puts a metric's values last, and "parsed" is the first of them
    behind = results.iloc[:, results.columns.get_loc("parsed") + 1 :]
    grouping = [by] if isinstance(by, str) else list(by or [])
    metrics = behind.drop(columns=grouping, errors="ignore").select_dtypes(
        ["number", "bool"]
    )
    groups = results.groupby((lambda row: "all") if by is None else by, sort=False)
    counts = groups["parsed"].agg(
        n="size", unparsed=lambda parsed: int((parsed != 1).sum())
    )
    return counts.join(groups[list(metrics)].mean())


def macro_mean(results: pd.DataFrame, metric: str, task: str = "task") -> float:
    """Mean over tasks of the mean over a task's questions (MLVU's M-Avg)."""
    return float(results.groupby(task)[metric].mean().mean())
