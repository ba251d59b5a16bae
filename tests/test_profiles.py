"""Notebooks under the profiles of released checkpoints: small random ones, on files of the benchmarks' schemas."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_benchmarks import (
    docir_question,
    docir_row,
    jpeg,
    lines,
    mlvu_row,
    mp4,
    numbered,
    parquet,
    refcoco_row,
    tracks,
    vidstg_row,
)
from test_project import NOTEBOOKS, PARAMS, ROOT, code_cells, saved, tags, values_of

import corehead as ch
from corehead.tasks import samples, task_set
from corehead.testbed import save, tiny

# one profile a family, on the paper's benchmarks
PROFILES = {
    "qwen3-vl-8b-benchmarks": "qwen3_vl",
    "internvl3_5-8b-benchmarks": "internvl",
    "llava-onevision-7b-benchmarks": "llava_onevision",
}
# Families differ in how media become tokens, which the first two notebooks draw: they run in every family. The others
# work on heads, by functions that are tested in every family: they run in one, each family in its turn.
RUNS = [
    pytest.param(path, profile, id=f"{path.stem}-{profile}")
    for i, path in enumerate(NOTEBOOKS)
    for turn, profile in enumerate(PROFILES)
    if i < 2 or i % 3 == turn
]
# what profiles set, smaller
TASKS = dict(
    name="benchmarks",
    retrieval={"refcocog": {}, "mmdocir": {}, "vidstg": {"max_frames": 4}},
    others={"mlvu": {"max_frames": 4}, "facts": {"ask": "Say one word. "}},
    sizes={"mmdocir": ["max_pages", [2, 3]], "vidstg": ["max_frames", [3, 6]]},
    evidence={
        "region": ["refcocog", {}],
        "pages": ["mmdocir", {}],
        "finer": ["mmdocir", {"evidence": "layouts"}],
        "tube": ["vidstg", {"max_frames": 4}],
    },
    long={"mmdocir": {}, "vidstg": {"max_frames": 4}},
    questions={},
    sweep={"window": 16, "sinks": 2, "windows": [8], "sink_counts": [0]},
    shares=[0.1, 0.25],
    new_tokens=1,
)
N = {"stability": 12, "resamples": 20}  # two of everything else


def sometimes(path: Path, module: str) -> set[str]:
    """Names of what is saved in cells under a condition: of tasks with counterfactuals, of the testbed's claims."""
    cells = ["".join(cell["source"]) for cell in code_cells(path)]
    conditional = "\n".join(cell for cell in cells if re.search("^if ", cell, re.M))
    return set(re.findall(rf'{module}\.save\(.*"(\w+)", profile\)', conditional))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    """A folder for each benchmark, with enough pictures, documents and videos for two splits and a few seeds."""
    root = tmp_path_factory.mktemp("benchmarks")
    for split in ("val", "test"):
        rows = [refcoco_row(f"{split}{i}", i) for i in range(16)]
        parquet(root / f"refcocog/data/{split}-00000-of-00001.parquet", rows)
        rows = [vidstg_row(f"{i}") for i in range(16)]
        (root / "vidstg/annotations").mkdir(parents=True, exist_ok=True)
        (root / f"vidstg/annotations/{split}_annotations.json").write_text(json.dumps(rows))
    for i in range(16):
        film = numbered() + np.uint8(2 * i)
        mp4(root / f"vidstg/video/{i}.mp4", film)
        (root / f"vidstg/video/{i}.json").write_text(json.dumps(tracks()))
        mp4(root / f"mlvu/MLVU/video/1_plotQA/v{i}.mp4", film)
    documents, cells = [], []
    for i in range(48):
        first = len(cells)
        cells += [
            {"doc_name": f"d{i}", "domain": "Guide", "passage_id": str(k), "image_path": f"d{i}_{k}.jpg",
             "image_binary": jpeg(132, 102, seed=3 * i + k), "ocr_text": "", "vlm_text": ""}
            for k in range(2)
        ]  # fmt: skip
        asked = [
            docir_question(
                page_id=[0], layout_mapping=docir_question()["layout_mapping"][:0]
            ),
            docir_question(),
        ]
        asked[0]["layout_mapping"] = [
            dict(page=0, page_size=[612.0, 792.0], bbox=[61.2, 79.2, 306.0, 396.0])
        ]
        documents.append(docir_row(f"d{i}.pdf", first, first + 1, asked))
    lines(root / "mmdocir/MMDocIR_annotations.jsonl", documents)
    parquet(root / "mmdocir/MMDocIR_pages.parquet", cells, row_group_size=2)
    rows = [mlvu_row(video=f"v{i}.mp4") for i in range(16)]
    (root / "mlvu/MLVU/json").mkdir(parents=True)
    (root / "mlvu/MLVU/json/1_plotQA.json").write_text(json.dumps(rows))
    return {name: root / name for name in ("refcocog", "vidstg", "mmdocir", "mlvu")}


def with_sources(values, data):
    """The same layouts, every benchmark read from its folder."""
    if isinstance(values, dict):
        return {
            k: v | {"source": str(data[k])}
            if k in data and isinstance(v, dict)
            else with_sources(v, data)
            for k, v in values.items()
        }
    if (
        isinstance(values, list)
        and len(values) == 2
        and values[0] in data
        and isinstance(values[1], dict)
    ):
        return [values[0], values[1] | {"source": str(data[values[0]])}]
    return values


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A folder for each family, in pieces, as on the hub."""
    small = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        family: str(save(tiny(family, text=small), folder / family))
        for family in PROFILES.values()
    }


def run(path: Path, given: dict) -> dict:
    """Execute a notebook's code as papermill does: the parameters of its own, then those given."""
    scope: dict = {"__name__": "__main__"}
    for cell in code_cells(path):
        exec(compile("".join(cell["source"]), path.name, "exec"), scope)
        if "parameters" in tags(cell):
            scope |= {name: value for name, value in given.items() if name in scope}
            if "n" in scope:
                scope["n"] = {what: N.get(what, 2) for what in scope["n"]}
        plt.close("all")
    return scope


@pytest.mark.slow(
    "runs whole notebooks: that they hold for other models is seen only by running them"
)
@pytest.mark.parametrize(("path", "profile"), RUNS)
def test_a_notebook_runs_on_a_checkpoint_of_the_family(
    path, profile, checkpoints, data, tmp_path, monkeypatch
):
    values = values_of(PARAMS / f"benchmarks/{profile}.yaml")
    # what the real profile sets of its tasks must be what is made smaller here
    assert set(values["tasks"]) <= set(TASKS)
    source = checkpoints[PROFILES[profile]]
    values |= {
        "model": {"source": source},
        "tasks": with_sources(TASKS, data),
        "options": values["options"] | {"store": str(tmp_path / "runs")},
    }
    results = tmp_path / "data/results" / profile
    results.mkdir(parents=True)
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    monkeypatch.chdir(ROOT / "notebooks")
    plt.switch_backend("agg")
    scope = run(path, values)
    assert scope["profile"] == profile and scope["mllm"].source == source
    tables = {file.stem for file in results.glob("*.csv")}
    assert tables <= saved(path, "results")
    assert saved(path, "results") - tables <= sometimes(path, "results")
    figures = {file.stem for file in (tmp_path / "figures" / profile).iterdir()}
    assert saved(path, "plots") - figures <= sometimes(path, "plots")
    written = {file.name for file in tmp_path.iterdir()}
    # the first notebook runs nothing that takes long
    assert written == {"data", "figures"} | ({"runs"} if path != NOTEBOOKS[0] else set())
    assert all(file.parts[-3] == profile for file in tmp_path.glob("runs/**/*.sqlite"))


ZEROSHOT = sorted(p for p in (PARAMS / "zeroshot").glob("*.yaml") if p.stem != "shared")
DRAWN = ("qwen3-vl-2b", "internvl3_5-1b", "qwen3-vl-8b")


@pytest.mark.parametrize("profile", ZEROSHOT, ids=lambda p: p.stem)
def test_numbers_of_samples_go_with_questions_on_a_context(profile):
    values = values_of(profile)
    chosen, n = task_set(**values["tasks"]), values["n"]
    for task in chosen.layouts:
        group = "retrieval" if task in chosen.retrieval else chosen.groups[task]
        counts = [n[name] for name in ("ranking", "validation", "test", "long", group)]
        assert all(count % min(8, chosen.questions.get(task, 1)) == 0 for count in counts)
    # notebook 2 asks four questions on a context
    assert n["accuracy"] % 4 == 0 and values["check_claims"] is False


@pytest.mark.parametrize("profile", ["smollm2", "quick"])
def test_samples_of_every_size_can_be_drawn(profile):
    """As notebook 2 asks for them, four questions on a context."""
    values = values_of(PARAMS / f"{profile}.yaml")
    chosen = task_set(**values.get("tasks", {"name": "digits"}))
    for task in chosen.layouts:
        for size, layout in chosen.growing(task).items():
            asked = chosen.samples(
                "test", values["n"]["accuracy"], tasks={task: layout}, questions=4
            )
            assert len({s.id for s in asked}) == values["n"]["accuracy"], (task, size)


@pytest.mark.parametrize("name", DRAWN)
def test_samples_of_a_zero_shot_profile_can_be_drawn(name):
    """Of its own and its largest layouts: the other profiles have those of one of these."""
    profiles = {path.stem: values_of(path)["tasks"] for path in ZEROSHOT}
    assert all(tasks in (profiles[n] for n in DRAWN) for tasks in profiles.values())
    chosen = task_set(**profiles[name])
    for task in chosen.layouts:
        together = min(8, chosen.questions.get(task, 1))
        *_, largest = chosen.growing(task).values()
        chosen.samples("test", min(4, together), tasks={task: largest}, questions=4)
        assert len(chosen.samples("test", together, tasks=[task], questions=8)) == together
    chosen.samples("validation", 8, tasks=chosen.long, questions=8)
    for task, layout in chosen.evidence.values():
        assert samples(task, n=1, **layout)[0].evidence
    assert len(chosen.pairs("validation", 1)) == len(chosen.retrieval)


@pytest.mark.slow("runs a whole notebook: only so is seen what its cells need of the tasks")
def test_a_notebook_runs_on_zero_shot_tasks(tmp_path, monkeypatch):
    """The first one, which shows every kind of evidence; the others work on heads, whatever is asked."""
    values = values_of(PARAMS / "zeroshot/internvl3_5-1b.yaml")
    source = save(tiny("internvl"), tmp_path / "checkpoint")
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path))
    monkeypatch.chdir(ROOT / "notebooks")
    plt.switch_backend("agg")
    scope = run(NOTEBOOKS[0], values | {"model": {"source": str(source)}})
    assert set(scope["shown"]) == {"region", "pages", "finer", "tube", "span"}
    figures = {file.stem for file in (tmp_path / "figures/internvl3_5-1b").iterdir()}
    assert figures == saved(NOTEBOOKS[0], "plots")


def test_splits_and_seeds_of_a_benchmark_share_no_context(data):
    folder = dict(source=str(data["mmdocir"]))
    taken: dict[str, tuple] = {}
    for split in ("validation", "test"):
        for seed in (0, 1):
            found = samples("mmdocir", split, 6, seed, questions=2, **folder)
            assert len(found) == 6 and {s.meta["domain"] for s in found} == {"mmdocir"}
            pages = [s.messages[0]["content"][0]["image"] for s in found]
            assert (
                pages[0] is pages[1] and pages[1] is not pages[2]
            )  # two questions on one document
            for s in found:
                assert taken.setdefault(s.id.rsplit("-", 1)[0], (split, seed)) == (
                    split,
                    seed,
                )
    assert [s.id for s in samples("mmdocir", n=3, **folder)] == [
        s.id for s in samples("mmdocir", n=3, **folder)
    ]
    official = {
        s.id
        for split in ("validation", "test")
        for s in samples("refcocog", split, 8, source=data["refcocog"])
    }
    assert len(official) == 16 and all(
        ("-val-" in name) or ("-test-" in name) for name in official
    )


def test_a_benchmark_that_is_too_small_says_so(data):
    with pytest.raises(
        ValueError, match=r"refcocog, split 'test': .* take a smaller n, or fewer seeds"
    ):
        samples("refcocog", "test", 20, seed=3, questions=2, source=data["refcocog"])
    with pytest.raises(ValueError, match="no split 'train': take one of validation, test"):
        samples("mmdocir", "train", 2, source=data["mmdocir"])


def test_a_metric_decides_what_is_right(data):
    mllm = tiny("qwen3_vl")
    asked = samples("refcocog", n=2, source=data["refcocog"])
    for s in asked:
        s.metric = lambda text, s=s: {"parsed": 1.0, "iou": 0.5 if s is asked[0] else 0.4}
    table = ch.evaluate(mllm, asked, new_tokens=1, progress=False)
    assert table.correct.tolist() == [True, False] and table.iou.tolist() == [0.5, 0.4]
