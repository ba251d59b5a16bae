"""MMLongBench: long contexts of pages, needles and haystacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BeforeValidator, Field

from ..samples import Evidence, Pages, Sample, Span
from .media import image, unpack_all
from .metrics import choice_metric, doc_qa, soft_acc, sub_em, yes_no
from .mmlongbench_doc import ASK as ASK_DOC
from .rows import (
    Found,
    Integers,
    Loader,
    Names,
    Row,
    Text,
    files,
    guarded,
    images,
    json_lines,
)

SLOT = "<image>"
ASK = "Answer as concisely as you can, with a single phrase where that is possible. Question: "


def _spelled(value: Any) -> Any:
    """Numbers and lists as text."""
    # a bool is an int to Python, but no answer of these tasks: the schema refuses it
    spelled = isinstance(value, (int, float, list)) and not isinstance(value, bool)
    return str(value) if spelled else value


Spelled = Annotated[Text, BeforeValidator(_spelled)]


class DocumentQuestion(Row):
    doc_name: Text
    question: Text
    answer: Spelled
    answer_format: Literal["Integer", "Float", "String", "List", "None"]
    page_list: list[Any]  # of pictures
    ans_page_list: Integers  # in the document, from 0


class Paragraph(Row):
    text: str


class Picture(Row):
    image: Text


class Haystack(Row):
    """MM-NIAH (paragraphs with pictures between) and Visual Haystack (names of pictures alone)."""

    ctxs: list[Any]
    question: Text
    answer: Any
    positive_ctxs: list[Any]
    image_list: Names = Field(default_factory=list)
    choices_image: Names = Field(default_factory=list)
    needle_image_list: Names = Field(default_factory=list)


class Counts(Row):
    answer: Integers


class Answers(Row):
    answer: Annotated[
        list[Spelled],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
        Field(min_length=1),
    ]


@dataclass(kw_only=True)
class MMLongBench(Loader):
    """A sample for each row of one of MMLongBench's files on document questions, needles (MM-NIAH) and haystacks.

    Questions on the same pages follow each other and share them. Archives in the folder are unpacked.

    Parameters
    ----------
    split : str
        The file, as {task}_K{8,16,32,64,128}, without ".jsonl".
    """

    name, hub = "mmlongbench", "ZhaoweiWang/MMLongBench"
    patterns, context = ("*.tar.gz", "*.jsonl"), ("page_list",)
    split: str = "mmlongdoc_K8"

    def rows(self) -> Iterator[tuple[str, Any]]:
        unpack_all(self.folder)
        known = (
            ", ".join(sorted(path.stem for path in self.folder.rglob("*.jsonl"))) or "none"
        )
        [path, *_] = files(
            self.folder, f"{self.split}.jsonl", f"take as split= one of: {known}"
        )
        for name, values in json_lines(path):
            yield f"mmlongbench-{name}", values

    def __iter__(self) -> Found:
        on_documents = []
        for id, values in self.rows():
            # paths alone, so that all fit in memory and those on the same pages can be put together
            if isinstance(values, dict) and "page_list" in values:
                on_documents.append((id, values))
            else:
                yield from guarded(id, self._haystack, values)
        yield from self.by_context(on_documents)

    @cached_property
    def roots(self) -> list[Path]:
        """Folders that paths of pictures may start from."""
        below = [
            sorted(self.folder.glob(pattern)) for pattern in ("*", "*/*", "*/*/documentQA")
        ]
        return [self.folder, *chain(*below)]

    def picture(
        self, row: Row, field: str, name: Any, decoded: dict[str, Image.Image]
    ) -> Image.Image:
        """A picture by its path in the download, decoded once."""
        # a file of the download must not make us open what lies outside it
        inside = isinstance(name, str) and name and not PurePosixPath(name).is_absolute()
        if not inside or ".." in Path(name).parts:
            row.fail(field, f"{str(name)[:60]!r} is no path inside the download")
        if name not in decoded:
            path = next(
                (root / name for root in self.roots if (root / name).is_file()), None
            )
            if path is None:
                self.fetch(row, field, name)
            with row.reading(field, name):
                decoded[name] = image(path)
        return decoded[name]

    def samples(self, id: str, values: Any) -> Found:
        """Of a question on pages of documents."""
        row = DocumentQuestion.of(id, values)
        document = row.doc_name.removesuffix(".pdf")
        decoded = self.kept(str(row.page_list), dict)
        names, content = [], []
        for path in row.page_list:
            name = _page(path)
            if name is None:
                row.fail("page_list", f"{str(path)[:60]!r} does not say document and page")
            names.append(name)
            content.append(
                {"type": "text", "text": f"\nDocument {name[0]} (page {name[1]}): "}
            )
            content += images([self.picture(row, "page_list", path, decoded)])
        positions: list[int] = []
        for page in row.ans_page_list:
            # the list is cut and padded with other documents' pages: only the file's name says what a picture is
            found = [i for i, name in enumerate(names) if name == (document, page)]
            if not found:
                problem = f"page {page} of {document} is not in page_list"
                row.fail("ans_page_list", problem, "Take a longer K, or leave it out")
            positions += found
        text = f"\n{ASK_DOC}Based on Document {document}, answer the following question. {row.question}"
        # questions that the document does not answer have no pages: they serve evaluation alone
        evidence = [Pages(positions)] if positions else []
        kind = row.answer_format
        metric = partial(doc_qa, gold=row.answer, kind=kind)
        meta = dict(task=self.split, format=kind)
        yield self.sample(
            id, content, text, row.question, evidence, row.answer, metric, **meta
        )

    def _haystack(self, id: str, values: Any) -> Found:
        row = Haystack.of(id, values)
        if "image" in values:
            fix = "Take files on documents, needles or haystacks"
            row.fail("image", "belongs to another task", fix)
        # Visual Haystack: the contexts are names of pictures
        if all(isinstance(context, str) for context in row.ctxs):
            texts, names = [SLOT] * len(row.ctxs), row.ctxs + row.image_list
        else:
            texts, names = (
                [Paragraph.of(id, context).text for context in row.ctxs],
                row.image_list,
            )
        choices = [f"\n{chr(ord('A') + i)}. {SLOT}" for i in range(len(row.choices_image))]
        question = row.question + "".join(choices)
        slots = sum(text.count(SLOT) for text in texts)
        # the question's pictures come behind those of the context
        pictures = names + (row.choices_image or row.needle_image_list)
        shown = self._shown(row, pictures, slots + question.count(SLOT))
        content = []
        for text in texts:
            content += [*_interleaved(text, shown), {"type": "text", "text": "\n\n"}]
        asked = _interleaved(question, shown)
        content += [{"type": "text", "text": ASK}, *asked]
        # a question with pictures in it has several texts: the longest is what tagging looks for in the prompt
        quoted = max((text.strip() for text in _texts(asked)), key=len, default="")
        evidence = self._needles(row, names[:slots], "".join(_texts(content)))
        answer, metric = self._answer(row, values)
        meta = {"benchmark": self.name, "task": self.split}
        yield Sample(
            id,
            [{"role": "user", "content": content}],
            evidence,
            answer,
            quoted,
            meta,
            metric,
        )

    def _shown(self, row: Haystack, names: list, slots: int) -> Iterator[Image.Image]:
        """The pictures in the order of the slots that they fill."""
        # one too few or too many would shift all that follow, and with them the evidence
        if slots != len(names):
            row.fail("image_list", f"{len(names)} pictures for {slots} times {SLOT}")
        decoded: dict[str, Image.Image] = {}
        return iter([self.picture(row, "image_list", name, decoded) for name in names])

    def _needles(self, row: Haystack, names: list[str], text: str) -> list[Evidence]:
        """Where the positive contexts stand: their pictures, among those of `names`, or their pieces of the text."""
        pages: set[int] = set()
        spans: list[Evidence] = []
        named = "-image" in self.split or "_image" in self.split
        in_pictures = named or self.split.startswith("vh")
        for needle in row.positive_ctxs:
            # all pictures have the same text, so only the file's name tells them apart
            if in_pictures:
                name = (
                    needle if isinstance(needle, str) else Picture.of(row._id, needle).image
                )
                # by whole parts at the end of its path
                found = {
                    i for i, other in enumerate(names) if f"/{other}".endswith(f"/{name}")
                }
                if not found:
                    problem = f"the picture {name} is not among those shown"
                    row.fail("positive_ctxs", problem, "Leave the row out")
                pages |= found
                continue
            for piece in Paragraph.of(row._id, needle).text.split(SLOT):
                piece = piece.strip()
                if re.search(r"\w", piece):
                    # a text that stands there twice does not say where the needle is
                    if text.count(piece) != 1:
                        times = f"{piece[:60]!r} stands {text.count(piece)} times"
                        row.fail("positive_ctxs", times, "Leave the row out")
                    spans.append(Span(piece))
        return [Pages(sorted(pages))] if pages else spans

    def _answer(
        self, row: Haystack, values: dict
    ) -> tuple[str, Callable[[str], dict[str, float]]]:
        if row.choices_image:
            options = [""] * len(row.choices_image)
            if type(row.answer) is not int or not 0 <= row.answer < len(options):
                problem = (
                    f"{row.answer!r} is not among {len(options)} choices, counted from 0"
                )
                row.fail("answer", problem)
            metric = partial(choice_metric, options=options, right=row.answer)
            return chr(ord("A") + row.answer), metric
        if "counting" in self.split:
            counts = Counts.of(row._id, values).answer
            return str(counts), partial(soft_acc, counts=counts)
        if self.split.startswith("vh"):
            right = str(row.answer).strip().lower()
            if right not in ("yes", "no"):
                row.fail("answer", f"{right!r} is neither yes nor no")
            return right.capitalize(), partial(yes_no, right=right)
        # any of them counts when the model writes; the first is the one that is scored as a continuation
        golds = Answers.of(row._id, values).answer
        return golds[0], partial(sub_em, golds=golds)


def _page(path: Any) -> tuple[str, int] | None:
    """(document, page from 0) that a file name says.

    ``document/..._page7.jpg`` counts from 0, as ans_page_list does; ``document/...-8-1024.jpg``, of SlideVQA, from 1.
    """
    for pattern, first in (
        (r"([^/]+)/[^/]*page[_-]?(\d+)\.\w+$", 0),
        (r"([^/]+)/[^/]*-(\d+)-\d+\.\w+$", 1),
    ):
        found = re.search(pattern, path) if isinstance(path, str) else None
        if found and int(found[2]) >= first:
            return found[1].removesuffix(".pdf"), int(found[2]) - first
    return None


def _interleaved(text: str, shown: Iterator[Image.Image]) -> list[dict]:
    """Parts of a message: a text, its slots filled with the next pictures."""
    parts: list[dict] = []
    for i, piece in enumerate(text.split(SLOT)):
        if i:
            parts += images([next(shown)])
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _texts(parts: list[dict]) -> list[str]:
    return [part["text"] for part in parts if part["type"] == "text"]
