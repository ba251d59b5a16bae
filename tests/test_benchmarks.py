"""Benchmarks: files of the real schema with small media, every trap of theirs, and metrics worked out by hand."""

import io
import itertools
import json
import math
import random
import stat
import tarfile
import zipfile

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FAMILIES, ask, film, image_part, picture, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import corehead as ch
from corehead.ablation import Ablation
from corehead.benchmarks import BENCHMARKS, load, media, metrics
from corehead.benchmarks.__main__ import describe, main
from corehead.benchmarks.rows import Row
from corehead.tagging import Prompt

MANY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# Files of the real schemas


def jpeg(height=48, width=64, seed=0) -> bytes:
    out = io.BytesIO()
    picture(height, width, seed).save(out, "JPEG")
    return out.getvalue()


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def refcoco_row(id="1", seed=0, **change):
    return {
        "question_id": id,
        "image": {"bytes": jpeg(seed=seed), "path": None},
        "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
        "answer": ["the left cat", "cat that sleeps"],
        "segmentation": [8.0, 16.0, 24.0, 16.0, 24.0, 40.0, 8.0, 40.0],
        "bbox": [8.0, 16.0, 16.0, 24.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{id}.jpg",
    } | change


def refcocog(folder, rows=None, **options):
    parquet(
        folder / "data/val-00000-of-00001.parquet",
        [refcoco_row()] if rows is None else rows,
        **options,
    )
    return folder


def mp4(path, frames, fps=10):
    """A film that keeps colours apart, so that a frame's number can be read from its brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = (
            *frames.shape[1:3],
            "yuv420p",
            10**6,
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count=20, height=48, width=64):
    return np.stack(
        [np.full((height, width, 3), 10 + 10 * i, np.uint8) for i in range(count)]
    )


def vidstg_row(vid="77", **change):
    return {
        "vid": vid,
        "fps": 10.0,
        "frame_count": 20,
        "width": 64,
        "height": 48,
        "subject/objects": [{"tid": 0, "category": "dog"}, {"tid": 1, "category": "ball"}],
        "used_segment": {"begin_fid": 4, "end_fid": 18},
        "used_relation": {
            "subject_tid": 0,
            "object_tid": 1,
            "predicate": "chase",
            "begin_fid": 6,
            "end_fid": 12,
        },
        "temporal_gt": {"begin_fid": 6, "end_fid": 12},
        "captions": [{"description": "a dog chases a ball", "type": "dog", "target_id": 0}],
        "questions": [
            {"description": "what does the dog chase?", "type": "ball", "target_id": 1}
        ],
    } | change


def tracks(count=20):
    """Object 0 moves right by a pixel a frame; object 1 stands still."""
    boxes = [
        [
            {
                "tid": 0,
                "bbox": {"xmin": f, "ymin": 8, "xmax": f + 16, "ymax": 24},
                "generated": 0,
                "tracker": "none",
            },
            {
                "tid": 1,
                "bbox": {"xmin": 40, "ymin": 8, "xmax": 64, "ymax": 40},
                "generated": 0,
                "tracker": "none",
            },
        ]
        for f in range(count)
    ]
    return {
        "version": "VERSION 1.0",
        "video_id": "77",
        "frame_count": count,
        "trajectories": boxes,
    }


def vidstg(folder, rows=None, film=None, boxes=None):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations/val_annotations.json").write_text(
        json.dumps([vidstg_row()] if rows is None else rows)
    )
    mp4(folder / "video/0001/77.mp4", numbered() if film is None else film)
    (folder / "video/0001/77.json").write_text(
        json.dumps(tracks() if boxes is None else boxes)
    )
    return folder


def docir_question(**change):
    return {
        "Q": "What is drawn?",
        "A": "a tower",
        "type": "['Figure', 'Text']",
        "page_id": [1],
        "layout_mapping": [
            {"page": 1, "page_size": [612.0, 792.0], "bbox": [61.2, 79.2, 306.0, 396.0]}
        ],
    } | change


def docir_row(name="b.pdf", first=2, last=4, questions=None):
    questions = (
        [docir_question(), docir_question(Q="Where?", page_id=[0, 2], layout_mapping=[])]
        if questions is None
        else questions
    )
    return {
        "doc_name": name,
        "domain": "Guide",
        "page_indices": [first, last],
        "layout_indices": [0, 9],
        "questions": questions,
    }


def mmdocir(folder, rows=None, pages=None):
    lines(folder / "MMDocIR_annotations.jsonl", [docir_row()] if rows is None else rows)
    if pages is None:
        pages = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]
    cells = [
        {"doc_name": doc, "domain": "Guide", "passage_id": str(k), "image_path": f"{doc}_{k}.jpg",
         "image_binary": jpeg(132, 102, seed=10 * ord(doc) + k), "ocr_text": "", "vlm_text": ""}
        for doc, k in pages
    ]  # fmt: skip
    parquet(folder / "MMDocIR_pages.parquet", cells, row_group_size=2)
    return folder


def pdf(path, pages=3, size=(72, 108)):
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [Image.new("RGB", size, (80 * i, 0, 0)) for i in range(pages)]
    shown[0].save(path, save_all=True, append_images=shown[1:], resolution=72)
    return path


def doc_row(**change):
    return {
        "doc_id": "x.pdf",
        "doc_type": "Brochure",
        "question": "How many?",
        "answer": "3",
        "evidence_pages": "[2]",
        "evidence_sources": "['Chart', 'Pure-text (Plain-text)']",
        "answer_format": "Int",
    } | change


def official_longdoc(folder, rows, pages=3):
    """As the repository has it; other JSON files lie about there."""
    (folder / "data").mkdir()
    (folder / "data/samples.json").write_text(
        rows if isinstance(rows, str) else json.dumps(rows)
    )
    (folder / "results.json").write_text("[1]")
    pdf(folder / "data/documents/x.pdf", pages)
    return folder


def longdoc(folder, rows=None, pages=3):
    parquet(
        folder / "data/train-00000-of-00001.parquet", [doc_row()] if rows is None else rows
    )
    pdf(folder / "documents/x.pdf", pages)
    return folder


def docqa_row(**change):
    return {
        "id": "q1",
        "doc_name": "x.pdf",
        "question": "How many?",
        "answer": "3",
        "ans_page_list": [7],
        "answer_sources": ["Chart"],
        "answer_format": "Integer",
        "page_list": [
            "mmlongdoc/other/other_page7.png",
            "mmlongdoc/x/x_page3.png",
            "mmlongdoc/x/x_page7.png",
        ],
    } | change


def niah_row(**change):
    return {
        "id": "n1",
        "ctxs": [
            {"id": "0", "text": "First hay <image> and more."},
            {"id": "1", "text": "The needle is red <image>."},
        ],
        "image_list": ["mm-niah/niah/0.png", "mm-niah/niah/1.png"],
        "needle_image_list": [],
        "question": "What is the needle?",
        "positive_ctxs": [
            {
                "type": "text",
                "text": "The needle is red <image>.",
                "has_ans": True,
                "nid": 0,
            }
        ],
        "answer": "red",
        "category": "retrieval-text",
    } | change


def mmlongbench(folder, rows, split="mmlongdoc_K8"):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with tarfile.open(folder / "0_mmlb_data.tar.gz", "w:gz") as data:
        add(data, f"mmlb_data/documentQA/{split}.jsonl", text)
    names = [
        "other/other_page7",
        "x/x_page3",
        "x/x_page7",
        "deck/a-deck-3-1024",
        "deck/a-deck-4-1024",
    ]
    names = [
        *(f"documentQA/mmlongdoc/{name}" for name in names),
        *(f"mm-niah/niah/{i}" for i in range(4)),
    ]
    with tarfile.open(folder / "1_images.tar.gz", "w:gz") as images:
        for i, name in enumerate(names):
            out = io.BytesIO()
            picture(40, 40, i).save(out, "PNG")
            add(images, f"mmlb_image/{name}.png", out.getvalue())
    return folder


def add(archive, name, data=b"", **header):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in header.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def mlvu_row(**change):
    return {
        "video": "v.mp4",
        "duration": 2.0,
        "question": "What does it do?",
        "candidates": ["runs", "sleeps", "eats", "sits"],
        "answer": "eats",
        "question_type": "plotQA",
    } | change


def mlvu(folder, rows=None, stem="1_plotQA"):
    (folder / "MLVU/json").mkdir(parents=True, exist_ok=True)
    (folder / f"MLVU/json/{stem}.json").write_text(
        json.dumps([mlvu_row()] if rows is None else rows)
    )
    mp4(folder / f"MLVU/video/{stem}/v.mp4", numbered())
    return folder


MAKE = {
    "refcocog": refcocog,
    "vidstg": vidstg,
    "mmdocir": mmdocir,
    "mmlongbench": lambda folder: mmlongbench(folder, [docqa_row()]),
    "mmlongbench-doc": longdoc,
    "mlvu": mlvu,
}


def read(name, folder, **options):
    """(samples, errors) of a benchmark."""
    errors = []
    return list(load(name, folder, errors=errors.append, **options)), errors


def only_error(name, folder, **options) -> ch.SampleError:
    samples, errors = read(name, folder, **options)
    assert not samples
    [error] = errors
    return error


def content(sample):
    return sample.messages[0]["content"]


# RefCOCOg


def test_refcocog_boxes_are_corner_and_size(tmp_path):
    samples = list(load("refcocog", refcocog(tmp_path), split="val"))
    assert [s.question for s in samples] == ["the left cat", "cat that sleeps"]
    for s in samples:
        assert s.evidence == [ch.Region(0, (8, 16, 24, 40))]
        assert s.answer == "[0.12, 0.33, 0.38, 0.83]"
        assert (
            s.metric(s.answer)["iou"] > 0.94
            and s.metric("[0.125, 0.3333333, 0.375, 0.8333333]")["iou"] > 0.999
        )
        assert content(s)[-1]["text"].endswith(s.question)
    assert content(samples[0])[0]["image"] is content(samples[1])[0]["image"]


def test_refcocog_catches_corners_where_sizes_should_be(tmp_path):
    error = only_error(
        "refcocog",
        refcocog(tmp_path, [refcoco_row(bbox=[30.0, 20.0, 50.0, 40.0], segmentation=[])]),
    )
    assert error.where == "bbox" and "not inside its picture" in error.problem
    error = only_error(
        "refcocog", refcocog(tmp_path, [refcoco_row(bbox=[16.0, 24.0, 8.0, 16.0])])
    )
    assert error.where == "bbox" and "outline" in error.problem


def test_rows_on_one_picture_come_together(tmp_path):
    rows = [
        refcoco_row("1", 0),
        refcoco_row("2", 1),
        refcoco_row("3", 0),
        refcoco_row("4", 1),
    ]
    samples = list(load("refcocog", refcocog(tmp_path, rows)))
    assert [s.id.split("-")[2] for s in samples] == list("11332244")
    assert len({id(content(s)[0]["image"]) for s in samples}) == 2


def test_refcocog_without_pixels_has_corners_and_checks_them(tmp_path):
    (tmp_path / "coco/train2014").mkdir(parents=True)
    (tmp_path / "coco/train2014/1.jpg").write_bytes(jpeg())
    row = {
        "ref_id": 5,
        "sentences": [
            {"raw": "the left cat", "sent": "the left cat", "sent_id": 1, "tokens": ["the"]}
        ],
        "image_path": "coco/train2014/1.jpg",
        "bbox": [8.0, 16.0, 24.0, 40.0],
        "raw_anns": json.dumps({"bbox": [8.0, 16.0, 16.0, 24.0], "area": 384.0}),
    }
    [sample] = load("refcocog", refcocog(tmp_path, [row]))
    assert sample.evidence == [ch.Region(0, (8, 16, 24, 40))]
    error = only_error(
        "refcocog", refcocog(tmp_path, [row | {"bbox": [8.0, 16.0, 16.0, 24.0]}])
    )
    assert error.where == "bbox" and "raw_anns" in error.problem


# VidSTG


def test_vidstg_maps_source_frames_to_sampled_ones(tmp_path):
    samples, errors = read("vidstg", vidstg(tmp_path), fps=5)
    assert not errors and [s.question for s in samples] == [
        "a dog chases a ball",
        "what does the dog chase?",
    ]
    [tube], part = samples[0].evidence, content(samples[0])[0]
    # segment [4, 18) at half the rate: 4 6 8 10 12 14 16; of these [6, 12) is true
    shown = [round((frame.mean() - 10) / 10) for frame in part["video"]]
    assert shown == [4, 6, 8, 10, 12, 14, 16] and part["frames_indices"] == [
        0,
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    assert part["fps"] == 10
    assert tube == ch.Tube(0, {1: (6, 8, 22, 24), 2: (8, 8, 24, 24), 3: (10, 8, 26, 24)})
    assert samples[1].evidence[0].boxes[1] == (40, 8, 64, 40)
    assert content(samples[1])[0]["video"] is part["video"]
    assert samples[0].answer.startswith("[0.2, 0.09, 0.17, 0.34, 0.50] [0.4, ")
    assert (
        samples[0].metric(samples[0].answer)["tiou"] == 1
        and samples[0].metric(samples[0].answer)["viou"] > 0.9
    )


def test_vidstg_cuts_the_tube_to_the_segment_and_ends_are_exclusive(tmp_path):
    row = vidstg_row(temporal_gt={"begin_fid": 0, "end_fid": 6}, questions=[])
    [sample] = load("vidstg", vidstg(tmp_path, [row]), fps=10)
    assert sorted(sample.evidence[0].boxes) == [0, 1]  # source frames 4 and 5
    row = vidstg_row(temporal_gt={"begin_fid": 0, "end_fid": 4})
    assert only_error("vidstg", vidstg(tmp_path, [row])).where == "temporal_gt"


def test_vidstg_at_most_so_many_frames(tmp_path):
    samples = list(load("vidstg", vidstg(tmp_path), fps=10, max_frames=3))
    assert content(samples[0])[0]["frames_indices"] == [0, 6, 13]  # of 4, 10, 17
    assert samples[0].evidence == [ch.Tube(0, {1: (10, 8, 26, 24)})]
    samples, errors = read("vidstg", vidstg(tmp_path), fps=10, max_frames=2)
    assert (
        not samples
        and all("raise fps=" in e.fix and "-0-" in e.sample_id for e in errors)
        and len(errors) == 2
    )


def test_vidstg_rows_on_one_segment_come_together(tmp_path):
    other = vidstg_row(used_segment={"begin_fid": 0, "end_fid": 20})
    samples = list(load("vidstg", vidstg(tmp_path, [vidstg_row(), other, vidstg_row()])))
    assert [s.id.split("-")[3] for s in samples] == list("002211")


def test_vidstg_another_cut_of_the_video_is_an_error(tmp_path):
    for row in (vidstg_row(frame_count=30), vidstg_row(width=128), vidstg_row(vid="78")):
        assert only_error("vidstg", vidstg(tmp_path, [row])).where in (
            "vid",
            "trajectories[6]",
        )
    error = only_error("vidstg", vidstg(tmp_path, boxes=tracks(8)))
    assert "fewer than 12" in error.problem


def test_vidstg_half_a_video_is_an_error(tmp_path):
    """A Matroska file that was cut still plays, up to the cut."""
    noise = film(20, 48, 64)
    mp4(tmp_path / "whole.mkv", noise)
    whole = (tmp_path / "whole.mkv").read_bytes()
    vidstg(tmp_path / "data")
    path = tmp_path / "data/video/0001/77.mp4"
    path.write_bytes(whole)
    assert len(read("vidstg", tmp_path / "data")[0]) == 2
    path.write_bytes(whole[: len(whole) // 2])
    assert only_error("vidstg", tmp_path / "data").where == "vid"


def test_large_frames_are_shrunk_and_boxes_with_them(tmp_path):
    frames = film(4, 48, 1536)
    clip = media.video(mp4(tmp_path / "v.mp4", frames), fps=10, most=9)
    assert (
        clip.frames.shape == (4, 24, 768, 3) and clip.size == (1536, 48) and clip.total == 4
    )
    assert clip.scaled((0, 0, 1536, 48)) == (0, 0, 768, 24)


# MMDocIR


def test_mmdocir_joins_by_row_counts_from_0_and_scales_layouts(tmp_path):
    samples, errors = read("mmdocir", mmdocir(tmp_path))
    assert not errors and [s.evidence for s in samples] == [
        [ch.Pages([1])],
        [ch.Pages([0, 2])],
    ]
    first, second = samples
    shown = [part["image"] for part in content(first)[:-1]]
    assert len(shown) == 3  # page_indices [2, 4] holds its end
    for k, page in enumerate(shown):
        expected = Image.open(io.BytesIO(jpeg(132, 102, seed=10 * ord("b") + k)))
        assert np.array_equal(np.asarray(page), np.asarray(expected))
    assert all(
        a["image"] is b["image"] for a, b in zip(content(first)[:-1], content(second)[:-1])
    )
    assert (
        first.answer == "2" and second.answer == "1, 3" and first.meta["reply"] == "a tower"
    )
    assert first.meta["task"] == "Figure, Text"  # a list as Python writes it
    [sample] = load("mmdocir", tmp_path, evidence="layouts", n=1)
    [region] = sample.evidence
    assert region.image == 1 and region.box == pytest.approx((10.2, 13.2, 51, 66))


def test_mmdocir_never_takes_another_document(tmp_path):
    rows = [
        docir_row("a.pdf", 0, 1, [docir_question()]),
        docir_row(first=1, last=3),
        docir_row("c.pdf", 5, 7),
    ]
    samples, errors = read("mmdocir", mmdocir(tmp_path, rows))
    assert [s.id for s in samples] == ["mmdocir-a-q0"]
    assert [e.where for e in errors] == ["page_indices"] * 2
    assert "is of 'a', not of 'b'" in errors[0].problem and "missing" in errors[1].problem


def test_mmdocir_a_broken_page_names_the_questions(tmp_path):
    mmdocir(tmp_path)
    [path] = tmp_path.glob("*.parquet")
    cells = pq.read_table(path).to_pylist()
    cells[3]["image_binary"] = cells[3]["image_binary"][:200]
    parquet(path, cells)
    samples, errors = read("mmdocir", tmp_path)
    assert not samples
    assert [(e.sample_id, e.where) for e in errors] == [
        ("mmdocir-b-q0", "page 1"),
        ("mmdocir-b-q1", "page 1"),
    ]


def test_mmdocir_documents_may_come_in_any_order(tmp_path):
    rows = [docir_row(), docir_row("a.pdf", 0, 1, [docir_question()])]
    samples, errors = read("mmdocir", mmdocir(tmp_path, rows))
    assert [s.id for s in samples] == [
        "mmdocir-a-q0",
        "mmdocir-b-q0",
        "mmdocir-b-q1",
    ] and not errors


@pytest.mark.parametrize(
    "change, where",
    [
        ({"page_id": [3]}, "page_id"),
        ({"page_id": [-1]}, "page_id"),
        ({"page_id": []}, "page_id"),
        ({"page_id": "[1"}, "page_id"),
        (
            {
                "layout_mapping": [
                    {"page": 0, "page_size": [612, 792], "bbox": [0, 0, 9, 9]}
                ]
            },
            "layout_mapping.page",
        ),
        (
            {
                "layout_mapping": [
                    {"page": 1, "page_size": [792, 612], "bbox": [0, 0, 9, 9]}
                ]
            },
            "layout_mapping.page_size",
        ),
        (
            {
                "layout_mapping": [
                    {"page": 1, "page_size": [612, 792], "bbox": [0, 0, 999, 9]}
                ]
            },
            "layout_mapping.bbox",
        ),
        (
            {
                "layout_mapping": [
                    {"page": 1, "page_size": [612, 792], "bbox": [9, 9, 9, 99]}
                ]
            },
            "layout_mapping.bbox",
        ),
        ({"layout_mapping": [{"page": 1}]}, "layout_mapping.page_size"),
        ({"layout_mapping": None}, "layout_mapping"),
        ({"Q": " "}, "Q"),
    ],
)
def test_mmdocir_names_the_bad_field(tmp_path, change, where):
    rows = [docir_row(questions=[docir_question(**change), docir_question()])]
    samples, errors = read("mmdocir", mmdocir(tmp_path, rows), evidence="layouts")
    assert [s.id for s in samples] == ["mmdocir-b-q1"]
    assert [(e.sample_id, e.where) for e in errors] == [("mmdocir-b-q0", where)]
    # a faulty layout costs no question on whole pages
    samples, errors = read("mmdocir", tmp_path)
    on_layouts = where.startswith("layout_mapping")
    assert len(samples) == 1 + on_layouts and len(errors) == 1 - on_layouts
    if on_layouts:
        assert [s.evidence for s in samples] == [[ch.Pages([1])]] * 2


def test_mmdocir_shows_at_most_so_many_pages(tmp_path):
    samples, errors = read("mmdocir", mmdocir(tmp_path), max_pages=2)
    assert len(content(samples[0])) == 3 and "max_pages=3" in errors[0].fix


# MMLongBench-Doc


def test_longdoc_pages_count_from_1_and_are_rendered_at_144_dpi(tmp_path):
    rows = [
        doc_row(),
        doc_row(evidence_pages="[1, 3]", question="Who?"),
        doc_row(evidence_pages="[]", answer_format="None"),
    ]
    samples, errors = read("mmlongbench-doc", longdoc(tmp_path, rows))
    assert not errors
    assert [s.evidence for s in samples] == [[ch.Pages([1])], [ch.Pages([0, 2])], []]
    shown = [part["image"] for part in content(samples[0])[:-1]]
    assert [p.size for p in shown] == [(144, 216)] * 3
    assert [np.asarray(p)[50, 50, 0] // 70 for p in shown] == [0, 1, 2]
    assert (
        samples[2].answer == "Not answerable"
        and samples[0].meta["sources"] == "Chart, Pure-text (Plain-text)"
    )
    assert all(
        a["image"] is b["image"]
        for a, b in zip(content(samples[0])[:-1], content(samples[1])[:-1])
    )


@pytest.mark.parametrize(
    "change, where",
    [
        ({"evidence_pages": "[0]"}, "evidence_pages"),
        ({"evidence_pages": "[4]"}, "evidence_pages"),
        ({"evidence_pages": "[1"}, "evidence_pages"),
        ({"evidence_pages": "['1']"}, "evidence_pages"),
        ({"evidence_pages": "__import__('os').abort()"}, "evidence_pages"),
        ({"answer_format": "Integer"}, "answer_format"),
        ({"doc_id": "y.pdf"}, "doc_id"),
        ({"answer": None}, "answer"),
    ],
)
def test_longdoc_names_the_bad_field(tmp_path, change, where):
    samples, errors = read(
        "mmlongbench-doc", longdoc(tmp_path, [doc_row(**change), doc_row()])
    )
    assert (
        len(samples) == 1
        and [e.where for e in errors] == [where]
        and errors[0].sample_id.endswith("-0")
    )


def test_longdoc_reads_the_repository_as_the_hub(tmp_path):
    rows = [doc_row(), doc_row(evidence_pages="[0]"), doc_row(doc_id="y.pdf")]
    (tmp_path / "hub").mkdir()
    (tmp_path / "git").mkdir()
    hub, bad = read("mmlongbench-doc", longdoc(tmp_path / "hub", rows))
    git, bad_git = read("mmlongbench-doc", official_longdoc(tmp_path / "git", rows))
    assert [(s.id, s.evidence, s.answer, s.meta) for s in git] == [
        (s.id, s.evidence, s.answer, s.meta) for s in hub
    ]
    assert [str(e) for e in bad_git] == [str(e) for e in bad]
    assert len(git) == 1 and [e.where for e in bad] == ["evidence_pages", "doc_id"]
    # of both, the hub's
    (tmp_path / "hub/samples.json").write_text("[]")
    assert len(read("mmlongbench-doc", tmp_path / "hub")[0]) == 1
    assert main(["mmlongbench-doc", "--check", str(tmp_path / "git")]) == 1


def test_longdoc_names_a_broken_samples_json(tmp_path):
    error = only_error("mmlongbench-doc", official_longdoc(tmp_path, "[{"))
    assert error.sample_id == "samples.json" and "is no JSON" in error.problem


def test_longdoc_an_unanswerable_question_has_no_evidence(tmp_path):
    """Six rows of the repository name a page all the same."""
    row = doc_row(answer="Not answerable", answer_format="None", evidence_pages="[2]")
    [sample], errors = read("mmlongbench-doc", longdoc(tmp_path, [row]))
    assert not errors and not sample.evidence and sample.answer == "Not answerable"


def test_longdoc_names_the_pages_to_show(tmp_path):
    error = only_error(
        "mmlongbench-doc", longdoc(tmp_path, [doc_row(evidence_pages="[3]")]), max_pages=2
    )
    assert "max_pages=3" in error.fix


# MMLongBench


def test_docqa_finds_pages_by_file_name(tmp_path):
    rows = [
        docqa_row(),
        docqa_row(id="q2", ans_page_list=[3]),
        docqa_row(ans_page_list=[], answer="None", answer_format="None"),
    ]
    samples, errors = read("mmlongbench", mmlongbench(tmp_path, rows))
    assert not errors and [s.evidence for s in samples] == [
        [ch.Pages([2])],
        [ch.Pages([1])],
        [],
    ]
    images = [
        [part["image"] for part in content(s) if part["type"] == "image"] for s in samples
    ]
    assert all(a is b for a, b in zip(images[0], images[1]))
    assert content(samples[0])[2]["text"] == "\nDocument x (page 3): "
    error = only_error(
        "mmlongbench", mmlongbench(tmp_path / "cut", [docqa_row(ans_page_list=[8])])
    )
    assert error.where == "ans_page_list" and "not in page_list" in error.problem


def test_slides_count_from_1_in_their_file_names(tmp_path):
    slides = ["mmlongdoc/deck/a-deck-3-1024.png", "mmlongdoc/deck/a-deck-4-1024.png"]
    row = docqa_row(doc_name="deck", page_list=slides, ans_page_list=[3])
    [sample] = load("mmlongbench", mmlongbench(tmp_path / "a", [row]))
    assert sample.evidence == [ch.Pages([1])]
    row["page_list"] = ["mmlongdoc/deck/a-deck-0-1024.png"]
    assert (
        only_error("mmlongbench", mmlongbench(tmp_path / "b", [row])).where == "page_list"
    )


def test_docqa_paths_stay_inside(tmp_path):
    for path in ("/etc/x/page7.png", "../../x/page7.png", 7):
        error = only_error(
            "mmlongbench",
            mmlongbench(tmp_path / str(path)[-8:], [docqa_row(page_list=[path])]),
        )
        assert error.where == "page_list"


def test_niah_needles_in_text_and_pictures(tmp_path):
    [text] = load(
        "mmlongbench",
        mmlongbench(tmp_path / "a", [niah_row()], "niah_retrieval-text_K8"),
        split="niah_retrieval-text_K8",
    )
    assert (
        text.evidence == [ch.Span("The needle is red")]
        and text.metric("It is Red.")["sub_em"] == 1
    )
    name = "niah_retrieval-image_K8"
    # all contexts of pictures read alike
    hay = [{"type": "image", "text": "<image>", "image": f"niah/{i}.png"} for i in range(2)]
    row = niah_row(ctxs=hay, positive_ctxs=hay[1:], question="Which was shown?", answer=1)
    row["choices_image"] = ["mm-niah/niah/2.png", "mm-niah/niah/3.png"]
    [sample] = load("mmlongbench", mmlongbench(tmp_path / "b", [row], name), split=name)
    assert sample.evidence == [ch.Pages([1])] and sample.answer == "B"
    assert [p["type"] for p in content(sample)].count(
        "image"
    ) == 4 and sample.question.startswith("Which was shown?")
    assert (
        sample.metric("Answer: B")["accuracy"] == 1
        and sample.metric("no idea")["parsed"] == 0
    )
    name = "niah_counting-image_K8"
    row = niah_row(
        ctxs=hay, positive_ctxs=hay, question="How often is <image> shown?", answer=[0, 2]
    )
    row["needle_image_list"] = ["mm-niah/niah/2.png"]
    [sample] = load("mmlongbench", mmlongbench(tmp_path / "c", [row], name), split=name)
    assert (
        sample.evidence == [ch.Pages([0, 1])]
        and sample.answer == "[0, 2]"
        and sample.metric("[1, 1]")["soft_acc"] == 1
    )
    for change, where in [
        (dict(image_list=[]), "image_list"),
        (dict(image="i.png"), "image"),
        (dict(positive_ctxs=[{"text": "The needle is blue"}]), "positive_ctxs"),
        (dict(question="The needle is red?"), "positive_ctxs"),  # it would stand twice
        (dict(answer=""), "answer"),
    ]:
        assert (
            only_error(
                "mmlongbench", mmlongbench(tmp_path / str(change), [niah_row(**change)])
            ).where
            == where
        )
    name = "retrieval-image_K8"
    row = niah_row(
        ctxs=hay, positive_ctxs=[{"type": "image", "text": "<image>", "image": "9.png"}]
    )
    assert (
        only_error(
            "mmlongbench", mmlongbench(tmp_path / "e", [row], name), split=name
        ).where
        == "positive_ctxs"
    )


def test_haystack_of_pictures(tmp_path):
    row = {
        "id": "1",
        "ctxs": ["mm-niah/niah/0.png", "mm-niah/niah/1.png"],
        "positive_ctxs": ["mm-niah/niah/1.png"],
        "question": "Is there a cat?",
        "answer": "Yes",
    }
    name = "vh_single_K8"
    [sample] = load("mmlongbench", mmlongbench(tmp_path, [row], name), split=name)
    assert (
        sample.evidence == [ch.Pages([1])] and sample.metric("no... yes")["accuracy"] == 1
    )


def test_a_missing_file_names_those_that_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="mmlongdoc_K8"):
        list(
            load("mmlongbench", mmlongbench(tmp_path, [docqa_row()]), split="mmlongdoc_K7")
        )


# MLVU


def test_mlvu_has_no_evidence_and_its_prompt_ends_in_a_bracket(tmp_path):
    rows = [mlvu_row(), mlvu_row(duration=3, answer="runs")]
    samples, errors = read("mlvu", mlvu(tmp_path, rows), fps=5, max_frames=4)
    assert not errors and all(s.evidence == [] for s in samples)
    assert [s.answer for s in samples] == ["C", "A"]
    text = content(samples[0])[-1]["text"]
    assert text.endswith("Best option: (") and "(C) eats" in text
    assert content(samples[0])[0]["video"] is content(samples[1])[0]["video"]
    assert content(samples[0])[0]["frames_indices"] == [0, 6, 13, 19]
    assert samples[0].metric("C) eats")["accuracy"] == 1


def test_mlvu_an_answer_that_is_no_candidate_is_an_error(tmp_path):
    error = only_error(
        "mlvu",
        mlvu(tmp_path, [mlvu_row(answer="flies", question_type="findNeedle")], "2_needle"),
    )
    assert error.where == "answer" and "0 times" in error.problem
    assert (
        "2 times"
        in only_error(
            "mlvu", mlvu(tmp_path / "b", [mlvu_row(candidates=["eats", "eats"])])
        ).problem
    )
    [sample] = load(
        "mlvu", mlvu(tmp_path / "c", [mlvu_row(question_type="findNeedle")], "2_needle")
    )
    assert sample.meta["task"] == "needle"


# Metrics, by hand


def test_iou():
    assert metrics.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert metrics.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert (
        metrics.iou((0, 0, 1, 1), (1, 0, 2, 1))
        == metrics.iou((1, 1, 0, 0), (0, 0, 1, 1))
        == 0
    )
    box = (0.0, 0.0, 0.5, 0.5)
    assert metrics.box_metric("It is [0.0, 0, .5, 0.25].", box) == {
        "parsed": 1,
        "iou": 0.5,
        "acc@0.5": 1,
    }
    assert metrics.box_metric("It is [0, 0, 0.5, 0.24].", box)["acc@0.5"] == 0
    for text in ("", "0 0 0.5 0.5", "[nan, 0, 1, 1]", "[0, 0, 1]", "[0, 0, 0.5, 0.5, 1]"):
        assert metrics.box_metric(text, box) == {"parsed": 0, "iou": 0, "acc@0.5": 0}


def test_tube_iou():
    box, half = (0, 0, 1, 1), (0, 0, 1, 0.5)
    assert metrics.tube_iou({1: half, 2: half, 3: half}, {2: box, 3: box, 4: box}) == (
        0.5,
        0.25,
    )
    assert metrics.tube_iou({}, {1: box}) == (0, 0) and metrics.tube_iou(
        {1: box}, {2: box}
    ) == (
        0,
        0,
    )
    seconds, true = [0.0, 0.5, 1.0, 1.5], {1: box, 2: box, 3: box}
    # the middle one is filled in
    found = metrics.tube_metric("[0.5, 0, 0, 1, 1] [1.5, 0, 0, 1, 0.5]", seconds, true)
    assert (
        found["tiou"] == 1
        and found["viou"] == pytest.approx((1 + 0.75 + 0.5) / 3)
        and found["viou@0.5"] == 1
    )
    assert metrics.tube_metric("nothing", seconds, true) == dict.fromkeys(found, 0.0)
    [late] = [metrics.tube_metric("[99, 0, 0, 1, 1]", seconds, true)]
    assert late["parsed"] == 1 and late["tiou"] == 0


def test_recall():
    assert (
        metrics.recall_at([3, 1, 2], [1, 4], 1) == 0
        and metrics.recall_at([3, 1, 2], [1, 4], 3) == 0.5
    )
    assert metrics.page_metric("pages 4, 2 and 10", [2, 10]) == {
        "parsed": 1,
        "recall@1": 0,
        "recall@3": 1,
        "recall@5": 1,
    }
    assert metrics.page_metric("none", [2])["parsed"] == 0
    with pytest.raises(ValueError, match="without true pages"):
        metrics.recall_at([1], [], 1)
    true = [(0, (0, 0, 10, 10)), (1, (0, 0, 10, 10))]
    ranked = [
        (0, (0, 0, 5, 10)),
        (0, (0, 0, 5, 10)),
        (0, (4, 0, 20, 5)),
        (1, (20, 20, 30, 30)),
    ]
    assert metrics.layout_recall_at(ranked, true, 1) == 0.25
    assert metrics.layout_recall_at(ranked, true, 2) == 0.25  # covered twice counts once
    assert metrics.layout_recall_at(ranked, true, 4) == pytest.approx((50 + 25) / 200)
    with pytest.raises(ValueError, match="without true layouts"):
        metrics.layout_recall_at(ranked, [], 1)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
@MANY
def test_distance_is_levenshteins(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = min(
            table[i, j] + (a[i] != b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1
        )
    assert metrics.distance(a, b) == table[-1, -1]


def test_anls():
    assert metrics.anls("Paris", ["London", "paris"]) == 1
    assert metrics.anls("pares", "paris") == pytest.approx(0.8)
    assert metrics.anls("ab", "ax") == 0  # 0.5 is not above the threshold
    assert metrics.anls("", "x") == 0


@pytest.mark.parametrize(
    "text, gold, kind, score, parsed",
    [
        ("Answer: 7", "7", "Int", 1, 1),
        ("7.0", "7", "Int", 1, 1),
        ("1,234", "1234", "Int", 1, 1),
        ("17", "7", "Int", 0, 1),
        ("seven", "7", "Int", 0, 0),
        ("", "7", "Int", 0, 0),
        ("nan", "7", "Int", 0, 0),
        ("inf", "7", "Float", 0, 0),
        ("12.5%", "12.5", "Float", 1, 1),
        ("0.125", "12.5%", "Float", 1, 1),
        ("$12.6", "12.5", "Float", 1, 1),
        ("13", "12.5", "Float", 0, 1),
        ("7 miles", "7", "Int", 1, 1),
        ("to", "tom", "Str", 2 / 3, 1),  # the m is no unit
        ("Pares", "paris", "Str", 0.8, 1),
        ("2019-01-02", "2019-01-03", "Str", 0, 1),
        ("Not answerable.", "Not answerable", "None", 1, 1),
        ("Paris", "Not answerable", "None", 0, 1),
        ("['b', 'a']", "['a', 'b']", "List", 1, 1),
        ("['a']", "['a', 'b']", "List", 0, 1),
        ("['pares', 'london']", "['London', 'Paris']", "List", 0.8, 1),
        ("[1, 3]", "[1, 2]", "List", 0, 1),
        ("", "['a']", "List", 0, 0),
        # as the repository writes them: with a full stop, with a unit, empty, of a kind that is none
        ("M.A.", "M.A.", "Str", 1, 1),
        ("Scott Bradley", "Scott Bradley.", "Str", 1, 1),
        ("April 5, 10 45 a.m.", "April 5, 10 45 a.m.", "Str", 1, 1),
        ("April 5, 10 46 a.m", "April 5, 10 45 a.m.", "Str", 0, 1),
        ("399 million.", "399 million", "Str", 1, 1),
        ("[]", "[]", "List", 1, 1),
        ("['a']", "[]", "List", 0, 1),
        ("yes", "yes", "Int", 0, 0),
        ("0.002", "0.3", "Float", 0, 1),  # both would be 0.00 to two places
        ("0.004", "0.001", "Float", 0, 1),
    ],
)
def test_rule_of_each_answer_format(text, gold, kind, score, parsed):
    found = metrics.doc_rule(text, gold, kind)
    assert found == {"parsed": parsed, "score": pytest.approx(score)}


@pytest.mark.parametrize(
    "text, gold, kind, score",
    [
        ("Answer: it is 7 or 8", "7", "Integer", 1),
        ("it is 70", "7", "Integer", 0),
        ("about 12.51", "12.5", "Float", 1),
        ("the red tower", "red house", "String", 0.5),
        ("see https://a.b/c", "https://a.b/c", "String", 1),
        ("red tower and 7", '["red", 7]', "List", (2 / 5 + 1) / 2),
        ("", "7", "Integer", 0),
        ("pages 3-5", "5", "Integer", 1),
        ("in 2019-2020", "2020", "Integer", 1),
        ("it is -5", "-5", "Integer", 1),
        ("3,4", "4", "Integer", 1),
        ("1,234", "1234", "Integer", 1),
        ("a", "A", "String", 1),
        ("the", "A", "String", 0),
        ("", "red", "String", 0),
    ],
)
def test_docqa_rule(text, gold, kind, score):
    found = metrics.doc_qa(text, gold, kind)
    assert found == {"parsed": float(bool(text)), "score": pytest.approx(score)}


def test_text_metrics():
    assert metrics.sub_em("Answer: The Red, tower!", ["blue", "red tower"])["sub_em"] == 1
    # what stands before "Answer:" counts too
    assert metrics.sub_em("A red tower. Answer: see above", "tower")["sub_em"] == 1
    assert metrics.sub_em("", ["the"]) == {"parsed": 0, "sub_em": 0}
    assert (
        metrics.sub_em("anything", ["!"])["sub_em"] == 0
    )  # an empty text would stand in any
    assert metrics.soft_acc("[1, 2] no: [2, 2]", [4])["soft_acc"] == 1
    assert metrics.soft_acc("none", [0]) == {"parsed": 0, "soft_acc": 0}
    assert metrics.yes_no("", "no") == {"parsed": 0, "accuracy": 0}


@pytest.mark.parametrize(
    "text, found",
    [
        ("C", 2),
        ("C) eats", 2),
        ("(B)", 1),
        ("Best option: (D) sits", 3),
        ("The answer is B.", 1),
        ("Option A", 0),
        ("eats", 2),
        ("A dog eats", None),
        ("E", None),
        ("Because", None),
        ("(A) or (B)", None),
        ("A or B", None),
        ("B or C", None),
        ("B eats", 1),
        ("maybe (A), maybe (B)", None),
        ("A and not another", 0),
        ("A is correct.", 0),
        ("The answer is A because the dog eats", 0),
        ("Option A is right", 0),
        ("The answer is a dog", None),
        ("A-frame houses", None),
        ("", None),
    ],
)
def test_letters(text, found):
    assert metrics.letter(text, ["runs", "sleeps", "eats", "sits"]) == found


def test_tables_count_what_could_not_be_read():
    rows = [
        ("needle", "C"),
        ("needle", "?"),
        ("count", "B"),
        ("count", "B"),
        ("count", "C"),
    ]
    options = dict(options=["a", "b", "c"], right=2)
    results = pd.DataFrame(
        [
            {"task": task, "written": text, **metrics.choice_metric(text, **options)}
            for task, text in rows
        ]
    )
    whole = metrics.table(results)
    assert whole.loc["all"].to_dict() == {"n": 5, "unparsed": 1, "accuracy": 0.4}
    assert metrics.table(results, "task").loc["count", "accuracy"] == pytest.approx(1 / 3)
    assert metrics.macro_mean(results, "accuracy") == pytest.approx((1 / 2 + 1 / 3) / 2)


@given(st.text(max_size=60) | st.from_regex(r"[\[\](),.0-9 A-Da-z-]{0,60}", fullmatch=True))
@MANY
def test_no_text_breaks_a_metric_and_none_unread_is_right(text):
    box = (0.0, 0.0, 0.5, 0.5)
    found = [
        metrics.box_metric(text, box),
        metrics.tube_metric(text, [0.0, 1.0], {0: box}),
        metrics.page_metric(text, [2]),
        *(
            metrics.doc_rule(text, gold, kind)
            for gold, kind in [("7", "Int"), ("7", "Float"), ("x", "Str"), ("[1]", "List")]
        ),
        *(
            metrics.doc_qa(text, gold, kind)
            for gold, kind in [
                ("7", "Integer"),
                ("7", "Float"),
                ("x", "String"),
                ("[1]", "List"),
            ]
        ),
        metrics.sub_em(text, ["x"]),
        metrics.soft_acc(text, [0]),
        metrics.choice_metric(text, ["a", "b"], 1),
        metrics.yes_no(text, "no"),
    ]
    for values in found:
        assert next(iter(values)) == "parsed" and all(
            0 <= v <= 1 and math.isfinite(v) for v in values.values()
        )
        assert values["parsed"] or not any(values.values())


# Archives


@pytest.mark.parametrize(
    "header",
    [
        dict(name="../out"),
        dict(name="a/../../out"),
        dict(name="link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        dict(name="link", type=tarfile.SYMTYPE, linkname="../../out"),
        dict(name="link", type=tarfile.LNKTYPE, linkname="../out"),
        dict(name="pipe", type=tarfile.FIFOTYPE),
        dict(name="disk", type=tarfile.CHRTYPE),
    ],
)
def test_archives_cannot_write_elsewhere(tmp_path, header):
    header = dict(header)
    (tmp_path / "out").write_bytes(b"mine")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        add(archive, "good", b"fine")
        add(archive, header.pop("name"), **header)
    with pytest.raises(ValueError, match="not unpacked"):
        media.unpack(tmp_path / "x.tar.gz")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "x.tar.gz"]
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_what_an_archive_says_to_be_absolute_lies_inside(tmp_path):
    outside = tmp_path / "outside"
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        add(archive, str(outside), b"fine")
    folder = media.unpack(tmp_path / "x.tar.gz")
    assert not outside.exists() and [p.name for p in folder.rglob("*") if p.is_file()] == [
        "outside"
    ]


@pytest.mark.parametrize(
    "name, kind", [("../out", 0), ("/out", 0), ("a/../../out", 0), ("link", stat.S_IFLNK)]
)
def test_zip_archives_cannot_either(tmp_path, name, kind):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (kind | 0o644) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good", b"fine")
        archive.writestr(entry, b"/etc/passwd")
    folder = media.unpack(tmp_path / "x.zip")
    assert folder == tmp_path / "x" and {p.name for p in tmp_path.iterdir()} == {
        "x",
        "x.zip",
    }
    # what would lie outside is left out; a link is a file with a path in it
    assert (
        [p.name for p in folder.iterdir()] == ["good"]
        if not kind
        else not (folder / "link").is_symlink()
    )


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_archives_have_a_size_bound_and_broken_ones_leave_nothing(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", bytes(2**22))
    else:
        with tarfile.open(path, "w:gz") as archive:
            add(archive, "zeros", bytes(2**22))
    with pytest.raises(ValueError, match="times its size"):
        media.unpack(path)
    path.write_bytes(b"PK no")
    with pytest.raises(ValueError, match="download it again"):
        media.unpack(path)
    assert [p.name for p in tmp_path.rglob("*")] == [name]


def test_a_python_that_cannot_unpack_safely_says_so(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "good", b"fine")
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ValueError, match=r"3\.10\.12"):
        media.unpack(tmp_path / "x.tar")


def test_vidor_is_read_from_its_zip_archives(tmp_path):
    vidstg(tmp_path)
    with zipfile.ZipFile(tmp_path / "training-video-part1.zip", "w") as archive:
        archive.writestr("video/", b"")
        archive.write(tmp_path / "video/0001/77.mp4", "video/0001/77.mp4")
    with zipfile.ZipFile(tmp_path / "training-annotation.zip", "w") as archive:
        archive.write(tmp_path / "video/0001/77.json", "training/0001/77.json")
    for path in (tmp_path / "video/0001").iterdir():
        path.unlink()
    assert len(list(load("vidstg", tmp_path))) == 2


def test_half_an_archive_leaves_nothing_and_a_whole_one_is_unpacked_once(tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "d/a.bin", random.Random(0).randbytes(5000), mode=0o4777)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="download it again"):
        media.unpack(path)
    path.write_bytes(whole)
    folder = media.unpack(path)
    assert folder == tmp_path / "x" and (folder / "d/a.bin").stat().st_mode & 0o7022 == 0
    (folder / "d/a.bin").unlink()
    assert media.unpack(path) == folder and not list(folder.rglob("*.bin"))


# Where data come from


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_without_network_the_command_is_named(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"hf download --repo-type dataset \S+/\S+ .*--local-dir"
    ):
        next(load(name))
    with pytest.raises(FileNotFoundError, match=r"hf download .*--local-dir \S*nowhere"):
        next(load(name, tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no .* below"):
        next(load(name, tmp_path))


def test_options_are_checked(tmp_path):
    for given_, match in [
        (dict(name="coco"), "take one of refcocog"),
        (dict(name="mlvu", split="dev"), "mlvu has no option split="),
        (dict(name="mlvu", errors="ignore"), "'raise', 'skip'"),
        (dict(name="mlvu", n=-1), "n=-1"),
    ]:
        with pytest.raises(ValueError, match=match):
            load(**given_)
    with pytest.raises(ValueError, match="evidence="):
        next(load("mmdocir", tmp_path, evidence="words"))


def test_errors_raise_or_are_skipped_and_n_is_kept(tmp_path):
    rows = [refcoco_row("1", answer=["a"]), refcoco_row("2", bbox=[1.0]), refcoco_row("3")]
    folder = refcocog(tmp_path, rows)
    found = load("refcocog", folder)
    assert next(found).question == "a"
    with pytest.raises(ch.SampleError, match=r"refcocog-val-2-1.*bbox.*Download"):
        next(found)
    with pytest.warns(UserWarning, match="refcocog-val-2-1"):
        assert len(list(load("refcocog", folder, errors="skip"))) == 3
    assert len(list(load("refcocog", folder, n=1))) == 1


def test_rows_are_streamed(tmp_path, monkeypatch):
    """The first samples come before the last rows are read."""
    folder = refcocog(
        tmp_path, [refcoco_row(str(i), i % 3) for i in range(400)], row_group_size=16
    )
    seen = []
    whole = pq.ParquetFile.iter_batches

    def watched(self, *a, row_groups, **k):
        seen.extend(row_groups)
        return whole(self, *a, row_groups=row_groups, **k)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    next(load("refcocog", folder))
    assert len(seen) == 8  # of 25


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_check_reports_and_exits_by_what_it_finds(name, tmp_path, capsys):
    MAKE[name](tmp_path)
    assert main([name, "--check", str(tmp_path)]) == 0
    assert "0 bad rows" in capsys.readouterr().out
    assert main([name, "--check", str(tmp_path / "nowhere")]) == 1
    assert "hf download" in capsys.readouterr().err


def test_check_names_bad_rows(tmp_path, capsys):
    refcocog(
        tmp_path,
        [refcoco_row("1"), *(refcoco_row(str(i), bbox=[1.0]) for i in range(2, 14))],
    )
    assert main(["refcocog", "--check", str(tmp_path), "--split", "val"]) == 1
    out = capsys.readouterr().out
    assert (
        "2 samples, 12 bad rows" in out
        and "and 2 more" in out
        and out.count("bbox: ") == 10
    )
    assert "refcocog-val-2-1" in out and "evidence: boxes: 1 (1 to 1)" in out
    [sample, *_] = load("refcocog", tmp_path, n=1)
    assert describe(sample)[
        "evidence: share of the picture's area in a box"
    ] == pytest.approx(16 * 24 / (64 * 48))


# Broken rows and media


def test_one_bad_sentence_does_not_take_the_others_of_its_row_along(tmp_path):
    captions = [{"description": text, "target_id": 0} for text in ("a dog", " ", "the dog")]
    captions.append({"description": "a dog", "target_id": "0"})
    samples, errors = read(
        "vidstg", vidstg(tmp_path, [vidstg_row(captions=captions, questions=[])])
    )
    assert [s.question for s in samples] == ["a dog", "the dog"]
    assert [(e.sample_id[-3:], e.where) for e in errors] == [
        ("0-1", "description"),
        ("0-3", "target_id"),
    ]


@pytest.mark.parametrize(
    "change, where, problem",
    [
        ({"duration": "2.0"}, "duration", "valid number"),
        ({"duration": float("inf")}, "duration", "finite"),
        ({"duration": True}, "duration", "valid number"),
        ({"duration": 0}, "duration", "greater than 0"),
        ({"question": 3}, "question", "valid string"),
        ({"question": None}, "question", "valid string"),
        ({"candidates": "eats"}, "candidates", "valid list"),
        ({"video": " "}, "video", "at least 1 character"),
    ],
)
def test_a_field_of_another_type_says_what_it_should_be_and_what_it_is(
    tmp_path, change, where, problem
):
    error = only_error("mlvu", mlvu(tmp_path, [mlvu_row(**change)]))
    assert (error.sample_id, error.where) == (
        "mlvu-1_plotQA-0",
        where,
    ) and problem in error.problem
    assert repr(str(change[where]))[1:-1] in error.problem and "Download" in error.fix
    row = mlvu_row()
    del row[where]
    assert "required" in only_error("mlvu", mlvu(tmp_path, [row])).problem


junk = (
    st.none()
    | st.booleans()
    | st.integers(-5, 99)
    | st.floats()
    | st.text(max_size=9)
    | st.lists(st.integers(-2, 9), max_size=3)
)


def rows_of(name, row, mutate, path):
    """Files with a broken row between two good ones; how many samples and which id must come."""
    if name == "vidstg":
        return vidstg(
            path, [vidstg_row(questions=[]), row, vidstg_row(questions=[])]
        ), "vidstg-val-"
    if name == "mlvu":
        return mlvu(path, [mlvu_row(), row, mlvu_row()]), "mlvu-1_plotQA-1"
    if name == "mmdocir":
        return mmdocir(
            path, [docir_row(questions=[docir_question(), row, docir_question()])]
        ), "mmdocir-b-q1"
    rows = [docqa_row(), row, docqa_row()]
    return mmlongbench(path, rows), "mmlongbench-mmlongdoc_K8:2"


GOOD = {
    "vidstg": vidstg_row(questions=[]),
    "mlvu": mlvu_row(),
    "mmdocir": docir_question(),
    "mmlongbench": docqa_row(),
}


@pytest.mark.parametrize("name", sorted(GOOD))
@given(data=st.data())
@settings(MANY, max_examples=25)
def test_a_broken_row_never_stops_the_others(name, data, tmp_path_factory):
    row = dict(GOOD[name])
    field = data.draw(st.sampled_from(sorted(row)))
    if data.draw(st.booleans()):
        del row[field]
    else:
        row[field] = data.draw(junk)
    row = data.draw(st.just(row) | junk)
    folder, id = rows_of(name, row, field, tmp_path_factory.mktemp("broken"))
    samples, errors = read(name, folder)
    assert len(samples) >= 2 and len(samples) + len(errors) == 3
    assert all(e.sample_id.startswith(id) and e.where and e.fix for e in errors)
    good, [first, *_, last] = {"vidstg": 3}.get(name, 0), samples
    assert first.evidence == last.evidence and (good or name == "mlvu" or first.evidence)
    if (
        len(samples) == 3
    ):  # what was broken played no part in the evidence, or is still inside the media
        mllm = tiny("qwen3_vl")
        for s in samples:
            assert not s.evidence or len(mllm.tag(s).evidence)


@pytest.mark.parametrize("kind", ["jpeg", "pdf", "mp4"])
@given(data=st.data())
@settings(MANY, max_examples=15)
def test_broken_media_name_the_sample(kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    if kind == "jpeg":
        whole = jpeg()
    elif kind == "pdf":
        whole = pdf(folder / "x.pdf", 2).read_bytes()
    else:
        whole = mp4(folder / "x.mp4", numbered(8)).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    broken = whole[:start] + data.draw(st.binary(max_size=40))
    if data.draw(st.booleans()):  # a hole rather than a cut
        broken += whole[len(broken) :]
    path = folder / f"broken.{kind}"
    path.write_bytes(broken)
    read_it = {
        "jpeg": lambda: np.asarray(media.image(broken)).shape,
        "pdf": lambda: len(media.pdf_pages(path, 9)),
        "mp4": lambda: media.video(path, fps=10, most=99).frames.shape[1:],
    }[kind]
    row = Row.of("s7", {})
    try:
        with row.reading("media", path.name):
            assert read_it()
    except ch.SampleError as error:
        assert (
            error.sample_id == "s7"
            and error.where == "media"
            and error.fix
            and path.name in error.problem
        )


@given(data=st.data())
@settings(MANY, max_examples=15)
def test_a_broken_parquet_file_goes_on_or_says_so(data, tmp_path_factory):
    folder = refcocog(
        tmp_path_factory.mktemp("parquet"),
        [refcoco_row(str(i), i) for i in range(4)],
        row_group_size=1,
    )
    [path] = folder.rglob("*.parquet")
    whole = bytearray(path.read_bytes())
    start, hole = (
        data.draw(st.integers(0, len(whole) - 1)),
        data.draw(st.binary(min_size=1, max_size=200)),
    )
    whole[start : start + len(hole)] = hole
    path.write_bytes(bytes(whole))
    samples, errors = read("refcocog", folder)
    assert all(e.sample_id and e.where for e in errors)
    assert all(s.evidence[0].box[0] < s.evidence[0].box[2] for s in samples)


def test_broken_files_are_named_and_the_others_read(tmp_path):
    folder = refcocog(tmp_path)
    (folder / "data/val-00000-of-00000.parquet").write_bytes(b"PAR1 no")
    samples, errors = read("refcocog", folder)
    assert len(samples) == 2 and [(e.sample_id, e.where) for e in errors] == [
        ("val-00000-of-00000.parquet", "file")
    ]
    mmdocir(tmp_path / "docs", ["{no json", docir_row()])
    samples, errors = read("mmdocir", tmp_path / "docs")
    assert len(samples) == 2 and errors[0].sample_id.endswith(":1")
    (tmp_path / "docs/MMDocIR_pages.parquet").write_bytes(b"PAR1 no")
    samples, errors = read("mmdocir", tmp_path / "docs")
    assert not samples and [e.where for e in errors] == ["row", "file", "page_indices"]
    mlvu(tmp_path / "mlvu")
    (tmp_path / "mlvu/MLVU/json/9_summary.json").write_text(
        "{"
    )  # an open-ended task is not read
    (tmp_path / "mlvu/MLVU/json/2_needle.json").write_text("{")
    samples, errors = read("mlvu", tmp_path / "mlvu")
    assert len(samples) == 1 and errors[0].sample_id == "2_needle.json"


def test_an_id_that_stands_twice_is_an_error(tmp_path):
    samples, errors = read("mmdocir", mmdocir(tmp_path, [docir_row(), docir_row()]))
    assert len(samples) == 2 and [e.where for e in errors] == ["id", "id"]


# From a file to scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_loaded_samples_are_tagged_and_share_their_context(name, family, tmp_path):
    mllm = tiny(family)
    MAKE[name](tmp_path)
    before = None
    for sample in load(name, tmp_path, n=2):
        prompt = Prompt(mllm, sample, like=before)
        tagged = prompt.tag()
        assert len(tagged.evidence) > 0 if sample.evidence else name == "mlvu"
        assert len(tagged.question) and len(tagged.answer)
        assert before is None or prompt.shares
        before = prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_region_and_a_tube_become_the_right_tokens(family, tmp_path):
    mllm = tiny(family)
    [sample] = load("refcocog", refcocog(tmp_path), n=1)
    tagged = mllm.tag(sample)
    [medium] = tagged.media
    for token, (x1, y1, x2, y2) in zip(medium.tokens, medium.boxes):
        meets = x1 < 24 and x2 > 8 and y1 < 40 and y2 > 16
        assert (token in tagged.evidence) == meets or np.isnan(x1)
    [sample] = load("vidstg", vidstg(tmp_path), n=1, fps=5)
    tagged = mllm.tag(sample)
    [medium] = tagged.media
    frames = {
        f
        for token, (a, b) in zip(medium.tokens, medium.frames)
        if token in tagged.evidence
        for f in range(a, b)
    }
    step = 2 if family == "qwen3_vl" else 1  # frames of a token
    assert frames == {
        f
        for true in (1, 2, 3)
        for f in range(true // step * step, (true // step + 1) * step)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_answers_of_a_benchmark(family, tmp_path):
    mllm = tiny(family)
    refcocog(tmp_path)
    scores = ch.score(mllm, load("refcocog", tmp_path), progress=False)
    ram = scores.per_sample("ram")
    assert ram.shape == (2, mllm.n_layers, mllm.n_heads) and bool((ram > 0).all())
    cut = {"intact": None, "cut": Ablation(ch.HeadSet.of([(0, 1), (1, 2)], mllm.shape))}
    results = ch.evaluate(
        mllm, load("refcocog", tmp_path), cut, new_tokens=5, progress=False
    )
    assert list(results.columns[-3:]) == ["parsed", "iou", "acc@0.5"] and len(results) == 4
    assert results.context.nunique() == 1  # both sentences on one prefill
    whole = metrics.table(results, "condition")
    assert (
        whole["n"].tolist() == [2, 2]
        and whole["unparsed"].tolist() == [2, 2]
        and whole["iou"].sum() == 0
    )
    for name, context in (("intact", None), ("cut", cut["cut"].heads)):
        for sample in load("refcocog", tmp_path):
            inputs = mllm.tag(ch.Sample(sample.id, sample.messages)).inputs
            options = dict(max_new_tokens=5, do_sample=False)
            if context is None:
                ids = mllm.model.generate(**inputs, **options)
            else:
                with ch.ablate(mllm, context):
                    ids = mllm.model.generate(**inputs, **options)
            text = mllm.tokenizer.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            row = results[(results.condition == name) & (results["sample"] == sample.id)]
            assert row.written.item() == text


def test_a_store_keeps_what_was_written(tmp_path):
    mllm = tiny("qwen3_vl")
    sample = ask(
        image_part(picture(40, 40)),
        metric=lambda text: {"parsed": 1.0, "length": float(len(text))},
    )
    options = dict(store=tmp_path / "run", new_tokens=3, progress=False)
    first = ch.evaluate(mllm, [sample], **options)
    again = ch.evaluate(mllm, [sample], resume=True, **options)
    pd.testing.assert_frame_equal(first, again)
    assert first.length.item() == len(first.written.item())
    with pytest.raises(ValueError, match="new_tokens"):
        ch.evaluate(mllm, [sample], new_tokens=-1)


def test_pictures_are_upright_and_on_white_as_samples_are(tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (30, 20)).save(turned, exif=exif)
    assert media.image(turned).size == (20, 30)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (3, 3)).save(clear)
    assert media.image(clear.read_bytes()).getpixel((0, 0)) == (255, 255, 255)
