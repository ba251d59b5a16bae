"""Every notebook, under the profiles of released checkpoints: tiny random ones on files of the real schemas."""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
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

import corehead as ch
from corehead.tasks import samples
from corehead.testbed import save, tiny

ROOT = Path(__file__).parent.parent
PARAMS = ROOT / "notebooks/params/benchmarks"
# one profile a family; what it asks of the hub is put into folders
PROFILES = {"qwen3-vl-8b": "qwen3_vl", "internvl3_5-8b": "internvl", "llava-onevision-7b": "llava_onevision"}
SMALL = dict(
    loading={"dtype": "float32"},
    region=["refcocog", {}],
    pages=["mmdocir", {}],
    finer=["mmdocir", {"evidence": "layouts"}],
    tube=["vidstg", {"max_frames": 4}],
    layouts={"refcocog": {}, "mmdocir": {}, "vidstg": {"max_frames": 4}},
    retrieval={"refcocog": {}, "mmdocir": {}, "vidstg": {"max_frames": 4}},
    long={"mmdocir": {}, "vidstg": {"max_frames": 4}},
    sizes={"refcocog": ["as it is", [""]], "mmdocir": ["max_pages", [2, 3]], "vidstg": ["max_frames", [3, 6]]},
    others={"mlvu": {"max_frames": 4}, "facts": {"ask": "Say one word. "}},
    questions=1,
    per_context={"refcocog": 1, "mmdocir": 1, "vidstg": 1},
    **dict.fromkeys(("n_accuracy", "n_samples", "n_lengths", "n_retrieval", "n_context", "n_text_only"), 2),
    **dict.fromkeys(("n_ranking", "n_validation", "n_test"), 2),
    n_reference=2,
    n_stability=12,
    data_seeds=2,
    resamples=20,
    random_draws=1,
    shares=[0.1, 0.25],
    self_repair_steps=1,
    new_tokens=0,
    window=16,
    sinks=2,
    windows=[8],
    sink_counts=[0],
    random_shares=[0.25],
)


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
        asked = [docir_question(page_id=[0], layout_mapping=docir_question()["layout_mapping"][:0]), docir_question()]
        asked[0]["layout_mapping"] = [dict(page=0, page_size=[612.0, 792.0], bbox=[61.2, 79.2, 306.0, 396.0])]
        documents.append(docir_row(f"d{i}.pdf", first, first + 1, asked))
    lines(root / "mmdocir/MMDocIR_annotations.jsonl", documents)
    parquet(root / "mmdocir/MMDocIR_pages.parquet", cells, row_group_size=2)
    rows = [mlvu_row(video=f"v{i}.mp4") for i in range(16)]
    (root / "mlvu/MLVU/json").mkdir(parents=True)
    (root / "mlvu/MLVU/json/1_plotQA.json").write_text(json.dumps(rows))
    return {name: root / name for name in ("refcocog", "vidstg", "mmdocir", "mlvu")}


def with_sources(values, data):
    """The same parameters, every benchmark read from its folder."""
    if isinstance(values, dict):
        return {
            k: v | {"source": str(data[k])} if k in data and isinstance(v, dict) else with_sources(v, data)
            for k, v in values.items()
        }
    if isinstance(values, list) and len(values) == 2 and values[0] in data and isinstance(values[1], dict):
        return [values[0], values[1] | {"source": str(data[values[0]])}]
    return values


def run(path: Path, given: dict) -> dict:
    """Execute a notebook's code as papermill does: the parameters of its own, then those given."""
    scope: dict = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{path.name}", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            scope |= {k: v for k, v in given.items() if k in scope}
        plt.close("all")
    return scope


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_every_notebook_runs_on_a_checkpoint_of_the_family(profile, data, tmp_path, monkeypatch):
    mllm = tiny(PROFILES[profile], text=dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4))
    save(mllm, tmp_path / "checkpoint")  # in pieces, as on the hub
    values = {k: v for p in ("shared", profile) for k, v in yaml.safe_load((PARAMS / f"{p}.yaml").read_text()).items()}
    # the real profile, smaller: what it names must be what is overridden here
    assert set(values) >= set(SMALL) - {"n_reference", "questions", "resamples", "random_shares"}
    given = values | with_sources(SMALL, data) | {"model": str(tmp_path / "checkpoint")}
    if profile == "qwen3-vl-8b":  # writing freely takes its time; that it works in each family is tested elsewhere
        given |= {"new_tokens": 1}
    monkeypatch.setenv("COREHEAD_OUTPUT", str(tmp_path / "out"))
    plt.switch_backend("agg")
    monkeypatch.chdir(ROOT / "notebooks")
    for path in sorted(Path(".").glob("0*.ipynb")):
        scope = run(path, given)
        assert scope["profile"] == profile and scope["mllm"].source == given["model"]
    results, figures = tmp_path / "out/data/results" / profile, tmp_path / "out/figures" / profile
    assert {p.name for p in results.iterdir()} == {p.name for p in (ROOT / "data/results/testbed").iterdir()}
    missing = {p.name for p in (ROOT / "figures").glob("*.png")} - {p.name for p in figures.iterdir()}
    assert missing == {"01_span.png"}  # no benchmark of the profile is text
    assert not [name for name in os.listdir(tmp_path / "out") if name not in ("data", "figures")]


def test_splits_and_seeds_of_a_benchmark_share_no_context(data):
    folder = dict(source=str(data["mmdocir"]))
    taken: dict[str, tuple] = {}
    for split in ("validation", "test"):
        for seed in (0, 1):
            found = samples("mmdocir", split, 6, seed, questions=2, **folder)
            assert len(found) == 6 and {s.meta["domain"] for s in found} == {"mmdocir"}
            pages = [s.messages[0]["content"][0]["image"] for s in found]
            assert pages[0] is pages[1] and pages[1] is not pages[2]  # two questions on one document
            for s in found:
                assert taken.setdefault(s.id.rsplit("-", 1)[0], (split, seed)) == (split, seed)
    assert [s.id for s in samples("mmdocir", n=3, **folder)] == [s.id for s in samples("mmdocir", n=3, **folder)]
    official = {
        s.id for split in ("validation", "test") for s in samples("refcocog", split, 8, source=data["refcocog"])
    }
    assert len(official) == 16 and all(("-val-" in name) or ("-test-" in name) for name in official)


def test_a_benchmark_that_is_too_small_says_so(data):
    with pytest.raises(ValueError, match=r"refcocog, split 'test': .* take a smaller n, or fewer seeds"):
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
