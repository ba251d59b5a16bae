"""MMLongBench-Doc: questions on whole documents, rendered from their PDFs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..samples import Pages
from .media import pdf_pages
from .metrics import UNANSWERABLE, doc_rule
from .rows import (
    AGAIN,
    Found,
    Integers,
    Loader,
    Names,
    Row,
    Text,
    files,
    images,
    json_list,
    parquet_rows,
)

ASK = (
    "Answer as concisely as you can, with a single phrase where that is possible; where the document does not say it, "
    "write 'Not answerable'. Question: "
)


class Question(Row):
    doc_id: Text
    question: Text
    answer: Text
    answer_format: Literal["Int", "Float", "Str", "List", "None"]
    evidence_pages: Integers  # from 1
    evidence_sources: Names = Field(default_factory=list)
    doc_type: Any = None


@dataclass(kw_only=True)
class MMLongBenchDoc(Loader):
    """A sample for each question; those on one document follow each other and share its pages.

    Two forms of the data are read: the hub's and, where a folder has no parquet file, samples.json of GitHub's
    mayubo2333/MMLongBench-Doc. The documents lie anywhere below it.

    Parameters
    ----------
    max_pages : int
        Pages shown of a document (documents/*.pdf, rendered at 144 dpi), from its first; a question on a later one is
        an error.
    """

    name, hub = "mmlongbench-doc", "yubo2333/MMLongBench-Doc"
    patterns, context = ("*.parquet", "*.pdf"), ("doc_id",)
    max_pages: int = 120

    def rows(self) -> Iterator[tuple[str, Any]]:
        hub = sorted(self.folder.rglob("*.parquet"))
        if hub:
            rows = parquet_rows(hub, set(Question.model_fields))
        else:
            [path, *_] = files(self.folder, "samples.json", "nor a *.parquet: fetch either")
            rows = enumerate(json_list(path))
        for at, values in rows:
            name = values.get("doc_id") if isinstance(values, dict) else None
            yield f"mmlongbench-doc-{str(name).removesuffix('.pdf')}-{at}", values

    @cached_property
    def documents(self) -> dict[str, Path]:
        return {path.name: path for path in self.folder.rglob("*.pdf")}

    def samples(self, id: str, values: Any) -> Found:
        row = Question.of(id, values)
        kind = row.answer_format
        wanted = row.evidence_pages
        # a page 0 says that the row counts in another way, and then no page of it is to be trusted
        if min(wanted, default=1) < 1:
            problem = f"{wanted} names a page below 1, but pages count from 1"
            row.fail("evidence_pages", problem, "Leave the row out")
        if row.doc_id not in self.documents:
            self.fetch(row, "doc_id", row.doc_id)
        path = self.documents[row.doc_id]
        last = max(wanted, default=0)
        with row.reading("doc_id", path.name):
            pages = self.kept(path, partial(pdf_pages, path, self.max_pages))
        # an error, and no sample with half of its evidence
        if last > len(pages):
            fix = (
                f"Take max_pages={last} or more" if len(pages) == self.max_pages else AGAIN
            )
            problem = f"page {last} is behind the {len(pages)} pages that are shown"
            row.fail("evidence_pages", problem, fix)
        # the model's pages count from 0; what the document does not say has none, though some rows name one
        answered = kind != "None"
        evidence = [Pages([page - 1 for page in wanted])] if wanted and answered else []
        answer = UNANSWERABLE.capitalize() if kind == "None" else row.answer
        metric = partial(doc_rule, gold=row.answer, kind=kind)
        sources = ", ".join(map(str, row.evidence_sources))
        meta = dict(task=str(row.doc_type or ""), format=kind, sources=sources)
        yield self.sample(
            id,
            images(pages),
            ASK + row.question,
            row.question,
            evidence,
            answer,
            metric,
            **meta,
        )
