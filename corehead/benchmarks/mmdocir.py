"""MMDocIR: a question on a long document, and the pages and layouts that answer it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from ..samples import Pages, Region, Sample, SampleError
from .media import image
from .metrics import page_metric
from .rows import AGAIN, Found, Row, files, guarded, json_lines, locate, parquet_rows

HUB = "MMDocIR/MMDocIR_Evaluation_Dataset"
ASK = "Give the numbers of the pages, counted from 1, that answer the question, the surest first. Question: "
ASPECT = 0.03  # by which the shape of a page's picture may differ from page_size


def samples(
    source: str | Path | None,
    *,
    revision: str | None = None,
    evidence: str = "pages",
    max_pages: int = 120,
) -> Found:
    """A sample for each question; those on one document follow each other and share its pages.

    Annotations and pages are joined by row: page k of a document is row ``page_indices[0] + k`` of pages.parquet.

    Parameters
    ----------
    source : a folder, a hub id, or None for the benchmark's own.
    revision : version on the hub.
    evidence : "pages", whole ones, or "layouts", their regions.
    max_pages : pages shown of a document, from its first; a question on a later one is an error.
    """
    if evidence not in ("pages", "layouts"):
        raise ValueError(f"evidence={evidence!r}: take 'pages' or 'layouts'")
    folder = locate(source, HUB, revision=revision, patterns=["*annotations.jsonl", "*pages*.parquet"])
    mend = "download the benchmark again"
    [path, *_] = files(folder, "*annotations.jsonl", mend)
    tables = files(folder, "*pages*.parquet", mend)
    documents = []
    for name, values in json_lines(path):
        try:
            row = Row(f"mmdocir-{name}", values)
            ends = row.integers("page_indices")
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
                row.fail("page_indices", f"{ends} is no [first, last]")
            documents.append((*ends, row))
        except SampleError as error:
            yield error
    documents.sort(key=lambda d: d[0])
    rows = parquet_rows(tables, ["doc_name", "image_binary"], batch=8)
    kept: dict[int, dict | SampleError] = {}  # rows that documents still to come may need
    at = -1
    for first, last, row in documents:
        kept = {k: v for k, v in kept.items() if k >= first}
        while at < last and (entry := next(rows, None)) is not None:
            at, cell = entry
            if isinstance(cell, SampleError) and cell.where == "file":
                rows = iter(())  # which rows follow is not known
                yield cell
            elif at >= first:
                kept[at] = cell
        yield from guarded(row.id, _document, row, first, last, kept, evidence, max_pages)


def _document(row: Row, first: int, last: int, cells: dict, evidence: str, max_pages: int) -> Found:
    name, pages = row.text("doc_name").removesuffix(".pdf"), []
    for at in range(first, min(last + 1, first + max_pages)):
        cell = cells.get(at)
        if not isinstance(cell, dict):
            row.fail("page_indices", f"row {at} of the pages is missing" + (f" ({cell.problem})" if cell else ""))
        if str(cell.get("doc_name")).removesuffix(".pdf") != name:
            row.fail("page_indices", f"row {at} of the pages is of {cell.get('doc_name')!r}, not of {name!r}")
        pages.append(cell.get("image_binary"))
    decoded: list[Image.Image] = []  # when the first question needs them
    for k, values in enumerate(row.get("questions", list)):
        id = f"mmdocir-{name}-q{k}"
        yield from guarded(id, _question, id, values, row, last - first + 1, pages, decoded, evidence)


def _question(id, values, document: Row, count: int, pages: list, decoded: list, evidence: str) -> Iterator[Sample]:
    row = Row(id, values)
    question, wanted = row.text("Q"), row.integers("page_id")
    if not wanted:
        row.fail("page_id", "names no page")
    for page in wanted:
        _inside(row, "page_id", page, count, len(pages))
    if not decoded:
        fresh = [image(data, id, f"page {i}") for i, data in enumerate(pages)]
        decoded.extend(fresh)
    layouts = []
    for entry in row.rows("layout_mapping"):
        page = entry.integer("page")
        _inside(row, "layout_mapping.page", page, count, len(pages))
        if page not in wanted:
            row.fail("layout_mapping.page", f"page {page} is not among page_id {wanted}")
        (width, height), box = entry.numbers("page_size", 2), entry.numbers("bbox", 4)
        shown = decoded[page]
        if min(width, height) <= 0 or abs(width / height * shown.height / shown.width - 1) > ASPECT:
            row.fail(
                "layout_mapping.page_size",
                f"{width} x {height} is not of the shape of page {page}'s {shown.width} x {shown.height} px",
            )
        x, y = shown.width / width, shown.height / height
        scaled = box[0] * x, box[1] * y, box[2] * x, box[3] * y
        layouts.append(Region(page, row.box("layout_mapping.bbox", scaled, shown.size)))
    if evidence == "layouts" and not layouts:
        row.fail("layout_mapping", "names no layout", "Take evidence='pages'")
    numbers = [page + 1 for page in wanted]
    parts = [{"type": "image", "image": picture} for picture in decoded]
    meta = {
        "benchmark": "mmdocir",
        "task": ", ".join(map(str, row.listed("type"))) if values.get("type") else "",
        "domain": str(document.values.get("domain", "")),
        "reply": str(values.get("A", "")),
    }
    yield Sample(
        id,
        [{"role": "user", "content": [*parts, {"type": "text", "text": ASK + question}]}],
        layouts if evidence == "layouts" else [Pages(wanted)],
        ", ".join(map(str, numbers)),
        question,
        meta,
        partial(page_metric, pages=numbers),
    )


def _inside(row: Row, where: str, page: int, count: int, shown: int) -> None:
    if not 0 <= page < count:
        row.fail(where, f"page {page} is not in the document, which has {count} pages, counted from 0", AGAIN)
    if page >= shown:
        row.fail(where, f"page {page} is behind the {shown} pages that are shown", f"Take max_pages={page + 1} or more")
