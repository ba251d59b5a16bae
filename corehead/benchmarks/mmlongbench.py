"""MMLongBench (long contexts of pages, needles and haystacks) and MMLongBench-Doc (questions on whole documents)."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..samples import Evidence, Pages, Sample, SampleError, Span
from .media import image, pdf_pages, unpack_all
from .metrics import UNANSWERABLE, choice_metric, doc_qa, doc_rule, soft_acc, sub_em, yes_no
from .rows import AGAIN, Found, Row, files, guarded, json_lines, locate, parquet_rows

HUB = "ZhaoweiWang/MMLongBench"
DOC_HUB = "yubo2333/MMLongBench-Doc"
SLOT = "<image>"
ASK = "Answer as concisely as you can, with a single phrase where that is possible"
ASK_DOC = f"{ASK}; where the document does not say it, write 'Not answerable'. Question: "
FORMATS = ("Integer", "Float", "String", "List", "None")
DOC_FORMATS = ("Int", "Float", "Str", "List", "None")
DOC_COLUMNS = ["doc_id", "doc_type", "question", "answer", "evidence_pages", "evidence_sources", "answer_format"]


class Pictures:
    """Picture files of a download, each decoded once as long as this lives."""

    def __init__(self, roots: list[Path]):
        self.roots, self._open = roots, {}

    def __call__(self, row: Row, where: str, name: Any) -> Image.Image:
        if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
            row.fail(where, f"{str(name)[:60]!r} is no path inside the download")
        if name not in self._open:
            found = next((root / name for root in self.roots if (root / name).is_file()), None)
            if found is None:
                row.fail(where, f"there is no {name}", f"Fetch it with `hf download --repo-type dataset {HUB}`")
            self._open[name] = image(found, row.id, where)
        return self._open[name]


def samples(source: str | Path | None, *, split: str = "mmlongdoc_K8", revision: str | None = None) -> Found:
    """A sample for each row of one of MMLongBench's files on document questions, needles (MM-NIAH) and haystacks.

    Questions on the same pages follow each other and share them.

    Parameters
    ----------
    source : a folder, a hub id, or None for the benchmark's own; archives in it are unpacked.
    split : the file, as {task}_K{8,16,32,64,128}, without ".jsonl".
    revision : version on the hub.
    """
    folder = locate(source, HUB, revision=revision, patterns=["*.tar.gz", "*.jsonl"])
    unpack_all(folder)
    known = ", ".join(sorted(p.stem for p in folder.rglob("*.jsonl"))) or "none"
    [path, *_] = files(folder, f"{split}.jsonl", f"take as split= one of: {known}")
    below = [d for pattern in ("*", "*/*", "*/*/documentQA") for d in sorted(folder.glob(pattern)) if d.is_dir()]
    roots = [folder, *below]
    groups: dict[tuple, list[tuple[str, object]]] = {}
    for name, values in json_lines(path):
        id = f"mmlongbench-{name}"
        if isinstance(values, dict) and "page_list" in values:  # paths alone, so that all fit in memory
            groups.setdefault((str(values["page_list"]),), []).append((id, values))
        else:
            yield from guarded(id, _haystack, id, values, split, Pictures(roots))
    for group in groups.values():
        pictures = Pictures(roots)
        for id, values in group:
            yield from guarded(id, _pages, id, values, split, pictures)


def _page(path: Any) -> tuple[str, int] | None:
    """(document, page from 0) that a file name says.

    ``document/..._page7.jpg`` counts from 0, as ans_page_list does; ``document/...-8-1024.jpg``, of SlideVQA, from 1.
    """
    for pattern, first in ((r"([^/]+)/[^/]*page[_-]?(\d+)\.\w+$", 0), (r"([^/]+)/[^/]*-(\d+)-\d+\.\w+$", 1)):
        found = re.search(pattern, path) if isinstance(path, str) else None
        if found and int(found[2]) >= first:
            return found[1].removesuffix(".pdf"), int(found[2]) - first
    return None


def _pages(id: str, values: dict, split: str, pictures: Pictures) -> Found:
    row = Row(id, values)
    document, question = row.text("doc_name").removesuffix(".pdf"), row.text("question")
    kind, gold = row.text("answer_format"), _text(row, "answer")
    if kind not in FORMATS:
        row.fail("answer_format", f"{kind!r} is none of {', '.join(FORMATS)}")
    listed, content = row.get("page_list", list), []
    names = [_page(path) for path in listed]
    for name, path in zip(names, listed):
        if name is None:
            row.fail("page_list", f"{str(path)[:60]!r} does not say document and page")
        content.append({"type": "text", "text": f"\nDocument {name[0]} (page {name[1]}): "})
        content.append({"type": "image", "image": pictures(row, "page_list", path)})
    places = []
    for page in row.integers("ans_page_list"):
        # the list is cut and padded with other documents' pages: only the file's name says what a picture is
        found = [i for i, name in enumerate(names) if name == (document, page)]
        if not found:
            row.fail(
                "ans_page_list", f"page {page} of {document} is not in page_list", "Take a longer K, or leave it out"
            )
        places += found
    text = f"\n{ASK_DOC}Based on Document {document}, answer the following question. {question}"
    yield Sample(
        id,
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        [Pages(places)] if places else [],
        gold,
        question,
        {"benchmark": "mmlongbench", "task": split, "format": kind},
        partial(doc_qa, gold=gold, kind=kind),
    )


def _haystack(id: str, values: object, split: str, pictures: Pictures) -> Found:
    """MM-NIAH (paragraphs with pictures between) and Visual Haystack (pictures alone)."""
    row = Row(id, values)
    if "image" in row.values:
        row.fail("image", "belongs to another task", "Take files on documents, needles or haystacks")
    contexts, question = row.get("ctxs", list), row.text("question")
    if values.get("choices_image"):
        question += "".join(f"\n{chr(ord('A') + i)}. {SLOT}" for i in range(len(row.get("choices_image", list))))
    asked = values.get("choices_image") or values.get("needle_image_list") or []
    names = list(values.get("image_list") or []) + list(asked)
    if contexts and all(isinstance(context, str) for context in contexts):
        texts, names = [SLOT] * len(contexts), contexts + names
    else:
        texts = [Row(id, context).get("text", str) for context in contexts]
    places = sum(text.count(SLOT) for text in texts)
    if places + question.count(SLOT) != len(names):
        row.fail("image_list", f"{len(names)} pictures for {places + question.count(SLOT)} places {SLOT}")
    shown = iter([pictures(row, "image_list", name) for name in names])
    content = [part for text in texts for part in (*_interleaved(text, shown), {"type": "text", "text": "\n\n"})]
    pieces = _interleaved(question, shown)
    quoted = max((part["text"].strip() for part in pieces if part["type"] == "text"), key=len, default="")
    content += [{"type": "text", "text": f"{ASK}. Question: "}, *pieces]
    in_pictures = "-image" in split or "_image" in split or split.startswith("vh")
    evidence = _needles(row, names[:places], in_pictures)
    whole = "".join(part["text"] for part in content if part["type"] == "text")
    for span in evidence:
        if isinstance(span, Span) and whole.count(span.text) != 1:
            row.fail("positive_ctxs", f"{span.text[:60]!r} stands {whole.count(span.text)} times", "Leave the row out")
    answer, metric = _answer(row, split)
    meta = {"benchmark": "mmlongbench", "task": split}
    yield Sample(id, [{"role": "user", "content": content}], evidence, answer, quoted, meta, metric)


def _interleaved(text: str, shown) -> list[dict]:
    """Parts of a message: a text, its places filled with the next pictures."""
    parts: list[dict] = []
    for i, piece in enumerate(text.split(SLOT)):
        if i:
            parts.append({"type": "image", "image": next(shown)})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _needles(row: Row, names: list[str], in_pictures: bool) -> list[Evidence]:
    """Where the positive contexts stand: their pictures, among those of `names`, or their text."""
    pages: list[int] = []
    spans: list[Evidence] = []
    for needle in row.get("positive_ctxs", list):
        needle = {"image": needle} if isinstance(needle, str) else Row(row.id, needle).values
        if in_pictures:  # all pictures have the same text, so only the file's name tells them apart
            name = Row(row.id, needle).text("image")
            found = [i for i, other in enumerate(names) if other == name or other.endswith("/" + name)]
            if not found:
                row.fail("positive_ctxs", f"the picture {name} is not among those shown", "Leave the row out")
            pages += found
        else:
            text = Row(row.id, needle).text("text")
            spans += [Span(piece.strip()) for piece in text.split(SLOT) if re.search(r"\w", piece)]
    return [Pages(sorted(set(pages)))] if pages else spans


def _text(row: Row, name: str) -> str:
    """A text, number or list as text."""
    return str(row.get(name, str, int, float, list)).strip() or row.fail(name, "is empty")


def _answer(row: Row, split: str) -> tuple[str, partial]:
    if row.values.get("choices_image"):
        right, options = row.integer("answer"), [""] * len(row.values["choices_image"])
        if right >= len(options):
            row.fail("answer", f"{right} is not among {len(options)} choices, counted from 0")
        return chr(ord("A") + right), partial(choice_metric, options=options, right=right)
    if "counting" in split:
        counts = row.integers("answer")
        return str(counts), partial(soft_acc, counts=counts)
    if split.startswith("vh"):
        right = _text(row, "answer").lower()
        if right not in ("yes", "no"):
            row.fail("answer", f"{right!r} is neither yes nor no")
        return right.capitalize(), partial(yes_no, right=right)
    several = isinstance(row.values.get("answer"), list)
    golds = [str(gold) for gold in row.values["answer"]] if several else [_text(row, "answer")]
    if not golds or not all(gold.strip() for gold in golds):
        row.fail("answer", "is empty")
    return golds[0], partial(sub_em, golds=golds)


def documents(source: str | Path | None, *, revision: str | None = None, max_pages: int = 120) -> Found:
    """MMLongBench-Doc: a sample for each question; those on one document follow each other and share its pages.

    Parameters
    ----------
    source : a folder, a hub id, or None for the benchmark's own; documents/*.pdf are rendered at 144 dpi.
    revision : version on the hub.
    max_pages : pages shown of a document, from its first; a question on a later one is an error.
    """
    folder = locate(source, DOC_HUB, revision=revision, patterns=["*.parquet", "*.pdf"])
    paths = files(folder, "*.parquet", "download the benchmark again")
    at_hand = {path.name: path for path in folder.rglob("*.pdf")}
    groups: dict[str, list[tuple[str, dict]]] = {}
    for at, row in parquet_rows(paths, DOC_COLUMNS):  # texts alone: all fit in memory
        if isinstance(row, SampleError):
            yield row
        else:
            name = str(row.get("doc_id"))
            groups.setdefault(name, []).append((f"mmlongbench-doc-{name.removesuffix('.pdf')}-{at}", row))
    for group in groups.values():
        pages: list[Image.Image] = []  # of the first question that can read them
        for id, row in group:
            yield from guarded(id, _document, id, row, at_hand, pages, max_pages)


def _document(id: str, values: dict, at_hand: dict[str, Path], pages: list[Image.Image], max_pages: int) -> Found:
    row = Row(id, values)
    name, question, gold = row.text("doc_id"), row.text("question"), row.text("answer")
    kind, wanted = row.text("answer_format"), row.integers("evidence_pages")
    if kind not in DOC_FORMATS:
        row.fail("answer_format", f"{kind!r} is none of {', '.join(DOC_FORMATS)}")
    if any(page < 1 for page in wanted):
        row.fail("evidence_pages", f"{wanted} names a page below 1, but pages count from 1", "Leave the row out")
    if name not in at_hand:
        row.fail("doc_id", f"there is no {name}", f"Fetch it with `hf download --repo-type dataset {DOC_HUB}`")
    if not pages:
        pages.extend(pdf_pages(at_hand[name], max_pages, id, "doc_id"))
    if max(wanted, default=0) > len(pages):
        mend = f"Take max_pages={max(wanted)} or more" if len(pages) == max_pages else AGAIN
        row.fail("evidence_pages", f"page {max(wanted)} is behind the {len(pages)} pages that are shown", mend)
    parts = [{"type": "image", "image": picture} for picture in pages]
    yield Sample(
        id,
        [{"role": "user", "content": [*parts, {"type": "text", "text": ASK_DOC + question}]}],
        [Pages([page - 1 for page in wanted])] if wanted else [],
        UNANSWERABLE.capitalize() if kind == "None" else gold,
        question,
        {
            "benchmark": "mmlongbench-doc",
            "task": str(values.get("doc_type") or ""),
            "format": kind,
            "sources": ", ".join(map(str, row.listed("evidence_sources"))) if values.get("evidence_sources") else "",
        },
        partial(doc_rule, gold=gold, kind=kind),
    )
