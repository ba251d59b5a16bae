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
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

Box = tuple[float, float, float, float]
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_FOUR = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 4) + r"\s*[\])]")
_FIVE = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 5) + r"\s*[\])]")
UNANSWERABLE = "not answerable"


# Boxes and tubes


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one is empty."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0 or a[0] >= a[2] or a[1] >= a[3] or b[0] >= b[2] or b[1] >= b[3]:
        return 0.0
    both = wide * high
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def box_metric(text: str, box: Box) -> dict[str, float]:
    """RefCOCOg: IoU, and accuracy at IoU >= 0.5. The answer is the first [x1, y1, x2, y2] of the text.

    Parameters
    ----------
    text : what the model wrote.
    box : the true box, 0..1.
    """
    found = _FOUR.search(text)
    value = iou(tuple(map(float, found.groups())), box) if found else 0.0
    return {"parsed": float(found is not None), "iou": value, "acc@0.5": float(value >= 0.5)}


def tube_iou(found: Mapping[int, Box], true: Mapping[int, Box]) -> tuple[float, float]:
    """Temporal and spatio-temporal IoU of two tubes {frame: box}.

    tIoU = ``|P & G| / |P | G|`` over frames; vIoU = the sum of the boxes' IoU over P & G, divided by ``|P | G|``.
    """
    union, both = set(found) | set(true), set(found) & set(true)
    if not union:
        return 0.0, 0.0
    return len(both) / len(union), sum(iou(found[f], true[f]) for f in both) / len(union)


def tube_metric(text: str, seconds: Sequence[float], boxes: Mapping[int, Box]) -> dict[str, float]:
    """VidSTG: tIoU, vIoU, and whether vIoU exceeds 0.3 and 0.5; their means are m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5.

    The answer is every [seconds, x1, y1, x2, y2] of the text. The tube lasts from the first to the last of them; in
    between its box moves evenly.

    Parameters
    ----------
    text : what the model wrote.
    seconds : of the frames that it saw.
    boxes : the true tube over those frames, 0..1.
    """
    rows = sorted({row[0]: row for row in (tuple(map(float, m)) for m in _FIVE.findall(text))}.values())
    found: dict[int, Box] = {}
    if rows:
        table, half = np.array(rows), (seconds[1] - seconds[0]) / 2 if len(seconds) > 1 else math.inf
        inside = [i for i, s in enumerate(seconds) if table[0, 0] - half < s < table[-1, 0] + half]
        moved = [np.interp([seconds[i] for i in inside], table[:, 0], table[:, c]) for c in range(1, 5)]
        found = {i: tuple(float(column[k]) for column in moved) for k, i in enumerate(inside)}
    time, space = tube_iou(found, boxes)
    values = {"tiou": time, "viou": space, "viou@0.3": float(space > 0.3), "viou@0.5": float(space > 0.5)}
    return {"parsed": float(bool(rows)), **values}


# Pages and layouts


def recall_at(ranked: Sequence[int], true: Collection[int], k: int) -> float:
    """Share of the true pages among the first k of a ranking.

    Raises
    ------
    ValueError : there are no true pages, so that recall means nothing.
    """
    if not true:
        raise ValueError("recall without true pages: leave the question out")
    return len(set(ranked[:k]) & set(true)) / len(set(true))


def layout_recall_at(ranked: Sequence[tuple[int, Box]], true: Sequence[tuple[int, Box]], k: int) -> float:
    """Area of the true layouts that the first k of a ranking cover, divided by their area (MMDocIR).

    Parameters
    ----------
    ranked, true : (page, box) each.
    k : how many of `ranked` count.

    Raises
    ------
    ValueError : there are no true layouts.
    """
    if not true:
        raise ValueError("recall without true layouts: leave the question out")
    covered = area = 0.0
    for page, (x1, y1, x2, y2) in true:
        # cells between all edges, so that what two boxes cover counts once
        cut = [np.clip(box, [x1, y1, x1, y1], [x2, y2, x2, y2]) for p, box in ranked[:k] if p == page]
        xs, ys = (
            np.unique([lo, hi, *(b[i] for b in cut for i in (a, a + 2))]) for lo, hi, a in ((x1, x2, 0), (y1, y2, 1))
        )
        hit = np.zeros((len(ys) - 1, len(xs) - 1), bool)
        for b in cut:
            hit |= np.outer((ys[:-1] >= b[1]) & (ys[1:] <= b[3]), (xs[:-1] >= b[0]) & (xs[1:] <= b[2]))
        covered += (hit * np.outer(np.diff(ys), np.diff(xs))).sum()
        area += (x2 - x1) * (y2 - y1)
    return float(covered / area)


def page_metric(text: str, pages: Collection[int]) -> dict[str, float]:
    """MMDocIR, pages: recall@1, 3, 5 of the page numbers in the order in which the text names them.

    Parameters
    ----------
    text : what the model wrote.
    pages : the true page numbers, as the question counts them (from 1).
    """
    ranked = list(dict.fromkeys(int(n) for n in re.findall(r"(?<![\d.])\d{1,6}(?![\d.]*\d)", text)))
    return {"parsed": float(bool(ranked)), **{f"recall@{k}": recall_at(ranked, pages, k) for k in (1, 3, 5)}}


# Texts


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def said(text: str) -> str:
    """What stands behind the first "Answer:", or the whole text."""
    return re.split(r"answer:", text, maxsplit=1, flags=re.IGNORECASE)[-1].strip()


def distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = np.arange(len(b) + 1)
    steps = np.arange(len(b) + 1)
    other = np.array(list(b))
    for c in a:
        best = np.minimum(row[1:] + 1, row[:-1] + (other != c)) if len(b) else row[1:]
        start = np.concatenate([[row[0] + 1], best])
        row = np.minimum.accumulate(start - steps) + steps  # insertions, all at once
    return int(row[-1])


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
    both = (a & b).total()
    return 2 * both / (a.total() + b.total()) if both else 0.0


_EXACT = re.compile(
    r"https?://|\.(py|ipynb)$|^page|^\d+([-\s]\d+)?$|[ap]\.m\.|^\d{4}[-/\s]\d{1,2}([-/\s]\d{1,2})?$"
    r"|^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$|^[\w.%+-]+@[\w.-]+\.[a-z]{2,}$"
)  # addresses, files, dates, numbers: nearly right is wrong
_UNITS = re.compile(r"(?<=[\d\s])(miles?|million|billion|thousand|kg|meters|acres|minutes|feet|mm|m)$")


def _bare(value: object) -> str:
    """A text in lower case without unit, brackets behind it, quotes, currency and per cent signs."""
    text = _UNITS.sub("", str(value).lower().strip()).strip()
    text = re.sub(r"\s*\([^)]*\)", "", text).strip()
    return text.strip("'\"").strip().lstrip("$£").rstrip("%").strip()


def _number(value: object) -> float | None:
    """The number that a text is, a comma between thousands allowed; None where it is none."""
    text = _bare(value)
    text = text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
    return float(text) if re.fullmatch(NUMBER + r"(?:e[-+]?\d{1,2})?", text) else None


def _close(gold: float, found: float) -> bool:
    """Equal within 1 % or to two places; a per cent sign may have been taken along or not."""
    return any(
        math.isclose(g, found, rel_tol=0.01) or round(g, 2) == round(found, 2) for g in (gold / 100, gold, gold * 100)
    )


def _as_list(value: object) -> list:
    """A list, or the text of one; any other text is its only entry."""
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (ast.literal_eval, json.loads):
            try:
                value = read(value.strip())
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return list(value) if isinstance(value, (list, tuple)) else [value]


def doc_rule(text: str, gold: str, kind: str) -> dict[str, float]:
    """MMLongBench-Doc: the rule of each answer_format, applied to what stands behind "Answer:".

    Int: equal whole numbers. Float: equal within 1 %, or 100 times so. Str and None: ANLS (0.5), but equality for
    addresses, dates and numbers. List: of one length and, in sorted order, all equal (where one is a number, a date) or
    the least ANLS of a pair.

    Parameters
    ----------
    text : what the model wrote; the benchmark has another model cut the short answer out of it first.
    gold, kind : the row's answer and answer_format.

    Raises
    ------
    ValueError : an answer_format that the benchmark does not have.
    """
    answer, parsed, value = said(text), True, 0.0
    if kind == "Int":
        true, found = _number(gold), _number(answer)
        parsed = found is not None
        value = float(parsed and true is not None and int(true) == int(found))
    elif kind == "Float":
        true, found = _number(gold), _number(answer)
        parsed = found is not None
        value = float(parsed and true is not None and _close(true, found))
    elif kind in ("Str", "None"):
        true, found = _bare(UNANSWERABLE if kind == "None" else gold), _bare(answer).rstrip(".")
        parsed = bool(found)
        value = (float(true == found) if _EXACT.search(true) else anls(found, true)) if parsed else 0.0
    elif kind == "List":
        true, found = (sorted(map(_bare, _as_list(v))) for v in (gold, answer))
        parsed = any(found)
        if parsed and len(true) == len(found):
            strict = [_number(t) is not None or bool(_EXACT.search(t)) for t in true]
            value = float(true == found) if any(strict) else min(anls(f, t) for f, t in zip(found, true))
    else:
        raise ValueError(f"answer_format {kind!r}: take Int, Float, Str, List or None")
    return {"parsed": float(parsed), "score": float(value)}


def doc_qa(text: str, gold: str, kind: str) -> dict[str, float]:
    """MMLongBench, document questions: a true number anywhere in the answer counts; texts by F1 of their words.

    Parameters
    ----------
    text : what the model wrote.
    gold, kind : the row's answer and answer_format: Integer, Float, String, List or None.

    Raises
    ------
    ValueError : an answer_format that the benchmark does not have.
    """
    answer = said(text)
    if kind == "List":
        entries = [str(entry) for entry in _as_list(gold)]
        soft = [e for e in entries if _number(e) is None and not _EXACT.search(e.lower())]
        merged = [" ".join(soft)] * bool(soft) + [e for e in entries if e not in soft]
        kinds = ["String" if (n := _number(e)) is None else "Integer" if n == int(n) else "Float" for e in merged]
        value = float(np.mean([doc_qa(text, e, k)["score"] for e, k in zip(merged, kinds)])) if merged else 0.0
    elif kind in ("Integer", "Float"):
        true, found = _number(gold), [float(n) for n in re.findall(NUMBER, answer.replace(",", ""))]
        same = (lambda n: n == true) if kind == "Integer" else (lambda n: _close(true, n))
        value = float(true is not None and any(same(n) for n in found))
        return {"parsed": float(bool(found)), "score": value}
    elif kind in ("String", "None"):
        value = float(gold.lower() in answer.lower()) if _EXACT.search(gold.lower()) else f1(answer, gold)
    else:
        raise ValueError(f"answer_format {kind!r}: take Integer, Float, String, List or None")
    return {"parsed": float(bool(answer)), "score": value}


def sub_em(text: str, golds: str | Sequence[str]) -> dict[str, float]:
    """A true answer stands in the text, both in lower case and without articles and punctuation."""
    answer, every = plain(said(text)), [golds] if isinstance(golds, str) else golds
    known = [gold for gold in map(plain, every) if gold]  # an empty text stands in any
    return {"parsed": float(bool(answer)), "sub_em": float(any(gold in answer for gold in known))}


def soft_acc(text: str, counts: Sequence[int]) -> dict[str, float]:
    """Counts of needles: the sum of the last list of whole numbers (without a list, of all of them) is the true one."""
    answer = said(text)
    lists = re.findall(r"\[[\d\s,]+\]", answer)
    found = [int(n) for n in re.findall(r"\d{1,9}", lists[-1] if lists else answer)]
    return {"parsed": float(bool(found)), "soft_acc": float(bool(found) and sum(found) == sum(counts))}


def yes_no(text: str, right: str) -> dict[str, float]:
    """The last "yes" or "no" of the text is the right one."""
    found = re.findall(r"\b(yes|no)\b", said(text).lower())
    return {"parsed": float(bool(found)), "accuracy": float(bool(found) and found[-1] == right.strip().lower())}


def letter(text: str, options: Sequence[str]) -> int | None:
    """Which option a text takes: by its letter or, word for word, by its text; None where that is not to be told."""
    last, text = chr(ord("A") + len(options) - 1), text.strip()
    bracketed = set(re.findall(rf"\(([A-{last}])\)", text))
    if len(bracketed) > 1:
        return None
    for pattern in (rf"^\W*([A-{last}])(?![A-Za-z'])", rf"(?i:answer|option)(?: is)?:?\s*\(?([A-{last}])(?![A-Za-z'])"):
        found = re.search(pattern, text)
        behind = text[found.end() :] if found else ""
        # "A man ..." is the article, "A or B" is no choice
        if found and not re.match(r"\W+(or|and)\b", behind) and not (found[1] == "A" and re.match(r"\s+[a-z]", behind)):
            return ord(found[1]) - ord("A")
    same = [i for i, option in enumerate(options) if plain(option) and plain(option) == plain(said(text))]
    if len(same) == 1:
        return same[0]
    return ord(bracketed.pop()) - ord("A") if bracketed else None


def choice_metric(text: str, options: Sequence[str], right: int) -> dict[str, float]:
    """Multiple choice (MLVU; mc_acc of MMLongBench): the option that the text takes is the right one.

    Parameters
    ----------
    text : what the model wrote.
    options : their texts, or empty texts where they are pictures.
    right : index of the right one.
    """
    found = letter(text, options)
    return {"parsed": float(found is not None), "accuracy": float(found == right)}


# Tables


def table(results: pd.DataFrame, by: str | list[str] | None = None) -> pd.DataFrame:
    """Means of the metrics of ``ch.evaluate(..., new_tokens=...)``.

    Parameters
    ----------
    results : its rows; the metrics are the columns behind "parsed".
    by : columns to group by, such as "condition"; None gives one row.

    Returns
    -------
    DataFrame : n, unparsed (how many answers could not be read; they count as wrong), and the mean of each metric.
    """
    names = list(results.columns[results.columns.get_loc("parsed") + 1 :])
    groups = [("all", results)] if by is None else results.groupby(by, sort=False)
    rows = {key: {"n": len(g), "unparsed": int((g["parsed"] != 1).sum()), **g[names].mean()} for key, g in groups}
    return pd.DataFrame.from_dict(rows, orient="index")


def macro_mean(results: pd.DataFrame, metric: str, task: str = "task") -> float:
    """Mean over tasks of the mean over a task's questions (MLVU's M-Avg)."""
    return float(results.groupby(task)[metric].mean().mean())
