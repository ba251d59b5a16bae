"""MMDocIR: a question on a long document, and the pages and layouts that answer it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, Strict, field_validator

from ..samples import Evidence, Pages, Region, SampleError
from .media import image
from .metrics import page_metric
from .rows import (
    Corners,
    Found,
    Integers,
    Loader,
    Names,
    Positive,
    Row,
    Text,
    files,
    guarded,
    images,
    json_lines,
    parquet_rows,
)

ASK = "Give the numbers of the pages, counted from 1, that answer the question, the surest first. Question: "
ASPECT = 0.03  # by which the shape of a page's picture may differ from page_size


class Document(Row):
    """A line of the annotations; page k of a document is row ``page_indices[0] + k`` of pages.parquet."""

    doc_name: Text
    page_indices: Annotated[Integers, Field(min_length=2, max_length=2)]  # first and last
    questions: list[Any]
    domain: Any = ""

    @field_validator("page_indices")
    @classmethod
    def _in_order(cls, ends: list[int]) -> list[int]:
        if not 0 <= ends[0] <= ends[1]:
            raise ValueError("is no [first, last]")
        return ends

    def pages(self, cells: dict[int, Any], most: int) -> list[bytes]:
        """The picture files of at most so many of its pages."""
        first, last = self.page_indices
        name = self.doc_name.removesuffix(".pdf")
        pages = []
        for at in range(first, min(last + 1, first + most)):
            cell = cells.get(at)
            if not isinstance(cell, dict):
                why = f" ({cell.problem})" if cell else ""
                self.fail("page_indices", f"row {at} of the pages is missing{why}")
            # the annotations go by row number: of another version of the file it would be another page
            if str(cell.get("doc_name")).removesuffix(".pdf") != name:
                problem = (
                    f"row {at} of the pages is of {cell.get('doc_name')!r}, not of {name!r}"
                )
                self.fail("page_indices", problem)
            pages.append(cell.get("image_binary"))
        return pages

    def check(self, row: Row, field: str, page: int, shown: int) -> None:
        """Fail where a page is not among those that are shown."""
        count = self.page_indices[1] - self.page_indices[0] + 1
        if not 0 <= page < count:
            problem = f"page {page} is not in the document, which has {count} pages, counted from 0"
            row.fail(field, problem)
        # what is not shown cannot be looked at: such evidence would count as attention that is missing
        if page >= shown:
            fix = f"Take max_pages={page + 1} or more"
            row.fail(field, f"page {page} is behind the {shown} pages that are shown", fix)


class Layout(Row):
    page: int
    page_size: Annotated[tuple[Positive, Positive], Strict(False)]
    bbox: Corners


class Question(Row):
    Q: Text
    page_id: Annotated[Integers, Field(min_length=1)]  # in the document, from 0
    type: Names = Field(default_factory=list)
    A: Any = ""


class LayoutQuestion(Question):
    layout_mapping: list[Layout]


@dataclass(kw_only=True)
class MMDocIR(Loader):
    """A sample for each question; those on one document follow each other and share its pages.

    Parameters
    ----------
    evidence : str
        "pages", whole ones, or "layouts", their regions.
    max_pages : int
        Pages shown of a document, from its first; a question on a later one is an error.
    """

    name, hub = "mmdocir", "MMDocIR/MMDocIR_Evaluation_Dataset"
    patterns = ("*annotations.jsonl", "*pages*.parquet")
    evidence: str = "pages"
    max_pages: int = 120

    def __post_init__(self):
        if self.evidence not in ("pages", "layouts"):
            raise ValueError(f"evidence={self.evidence!r}: take 'pages' or 'layouts'")

    def __iter__(self) -> Found:
        [path, *_] = files(self.folder, "*annotations.jsonl")
        rows = parquet_rows(
            files(self.folder, "*pages*.parquet"), {"doc_name", "image_binary"}
        )
        documents = []  # texts alone, so that all fit in memory
        for name, values in json_lines(path):
            try:
                documents.append(Document.of(f"mmdocir-{name}", values))
            except SampleError as error:
                yield error
        cells: dict[int, Any] = {}  # rows of pages that documents still to come may need
        at = -1
        # in the order of their pages, so that the large file is read once, from front to back
        for document in sorted(documents, key=lambda document: document.page_indices[0]):
            first, last = document.page_indices
            cells = {row: cell for row, cell in cells.items() if row >= first}
            while at < last and (entry := next(rows, None)) is not None:
                at, cell = entry
                if isinstance(cell, SampleError) and cell.where == "file":
                    rows = iter(())  # which rows follow is not known
                    yield cell
                elif at >= first:  # no document to come has those before
                    cells[at] = cell
            yield from guarded(document._id, self._document, document, cells)

    def _document(self, id: str, document: Document, cells: dict[int, Any]) -> Found:
        pages = document.pages(cells, self.max_pages)
        shown: list[
            Image.Image
        ] = []  # the questions share these objects, and so one prefill
        for k, values in enumerate(document.questions):
            id = f"mmdocir-{document.doc_name.removesuffix('.pdf')}-q{k}"
            yield from guarded(id, self._question, values, document, pages, shown)

    def _question(
        self, id: str, values: Any, document: Document, pages: list[bytes], shown: list
    ) -> Found:
        # whole pages need no layouts, and then a faulty one does not cost the question
        on_pages = self.evidence == "pages"
        row = (Question if on_pages else LayoutQuestion).of(id, values)
        for page in row.page_id:
            document.check(row, "page_id", page, len(pages))
        if not shown:  # the pages are decoded when the first question needs them
            shown += [_decoded(row, i, data) for i, data in enumerate(pages)]
        evidence: list[Evidence] = [Pages(row.page_id)]
        if not on_pages:
            evidence = [_region(row, part, document, shown) for part in row.layout_mapping]
        if not evidence:
            row.fail("layout_mapping", "names no layout", "Take evidence='pages'")
        numbers = [page + 1 for page in row.page_id]
        task = ", ".join(map(str, row.type))
        meta = dict(task=task, domain=str(document.domain), reply=str(row.A))
        # retrieval is what it asks for: the answer is the pages; the words of the reply are kept beside it
        answer = ", ".join(map(str, numbers))
        metric = partial(page_metric, pages=numbers)
        yield self.sample(
            id, images(shown), ASK + row.Q, row.Q, evidence, answer, metric, **meta
        )


def _decoded(row: Question, page: int, data: bytes) -> Image.Image:
    with row.reading(f"page {page}", "the picture"):
        return image(data)


def _region(row: LayoutQuestion, layout: Layout, document: Document, shown: list) -> Region:
    """A layout, scaled from the units of its page_size to pixels."""
    page, (width, height), (x1, y1, x2, y2) = layout.page, layout.page_size, layout.bbox
    document.check(row, "layout_mapping.page", page, len(shown))
    if page not in row.page_id:
        row.fail("layout_mapping.page", f"page {page} is not among page_id {row.page_id}")
    picture = shown[page]
    # boxes are scaled, which is right only if the picture shows the same page in the same shape
    if abs(width / height * picture.height / picture.width - 1) > ASPECT:
        problem = f"{width} x {height} is not of the shape of page {page}'s {picture.width} x {picture.height} px"
        row.fail("layout_mapping.page_size", problem)
    x, y = picture.width / width, picture.height / height
    box = x1 * x, y1 * y, x2 * x, y2 * y
    return Region(page, row.inside("layout_mapping.bbox", box, picture.size))
