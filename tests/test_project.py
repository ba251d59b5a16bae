"""What holds for the repository as a whole: notebooks, profiles, environments, figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from corehead import notebooks

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
PARAMS = ROOT / "notebooks/params"
SHARED = PARAMS / "benchmarks/shared.yaml"  # by all profiles beside it
PROFILES = sorted(p for p in PARAMS.glob("**/*.yaml") if p != SHARED)


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def parameters(path) -> dict:
    [cell] = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    scope: dict = {}
    exec("".join(cell["source"]), scope)
    return {k: v for k, v in scope.items() if not k.startswith("__")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_code_cell_was_executed_in_order(path):
    code = [c for c in cells(path) if "".join(c["source"]).strip()]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_the_default_profile_and_clean(path, tmp_path):
    assert parameters(path)["profile"] == "testbed"
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    notebooks.clean(copy)
    assert copy.read_text() == path.read_text()


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.stem)
def test_every_key_of_a_profile_is_a_parameter_somewhere(profile):
    """papermill only warns about a mistyped one."""
    known = set().union(*(parameters(path) for path in NOTEBOOKS))
    values = yaml.safe_load(profile.read_text())
    if profile.parent == SHARED.parent:
        shared = yaml.safe_load(SHARED.read_text())
        assert not set(shared) & set(values)
        values |= shared
    assert set(values) <= known and values["profile"] == profile.stem


def test_no_notebook_sets_a_style_or_defines_a_function():
    for path in NOTEBOOKS:
        source = "\n".join("".join(c["source"]) for c in cells(path))
        assert not re.search(r"^\s*(def|class) |rcParams|fontsize|plt\.", source, re.M), path.name


def test_figures_in_the_readme_exist_and_every_figure_is_in_it():
    shown = set(re.findall(r"figures/([\w]+)\.png", (ROOT / "README.md").read_text()))
    saved = set()
    for path in NOTEBOOKS:
        source = "\n".join("".join(c["source"]) for c in cells(path))
        saved |= set(re.findall(r'plots\.save\(figure, "(\w+)"', source))
    assert shown == saved
    for name in saved:
        assert (ROOT / f"figures/{name}.png").exists() and (ROOT / f"figures/{name}.pdf").exists()


def test_tables_that_notebooks_write_are_committed_and_no_others():
    written = set()
    for path in NOTEBOOKS:
        written |= set(
            re.findall(r'results\(profile\) / "([\w.]+)"', "".join("".join(c["source"]) for c in cells(path)))
        )
    assert {path.name for path in (ROOT / "data/results/testbed").iterdir()} == written
    rule = json.loads((ROOT / "data/results/testbed/threshold.json").read_text())
    assert 0 < rule["p"] <= 0.5 and len(rule["heads"]) == round(rule["p"] * 192)


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_conda_and_pip_make_the_same_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    packages = [p for p in conda["dependencies"] if isinstance(p, str)]
    [pip] = [p["pip"] for p in conda["dependencies"] if isinstance(p, dict)]
    assert pip == ["-e .[dev]"]  # everything comes from pyproject.toml
    assert sorted(re.split("[=<>]", p)[0] for p in packages) == ["pip", "python"]
    [python] = [p.split("=")[1] for p in packages if p.startswith("python")]
    least = project["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))
    locked = {
        re.split("[=@ ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().split("\n")
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[=<>\[]", w)[0].lower() for w in wanted} <= locked


def test_make_alone_prints_the_targets():
    text = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True).stdout
    for target in ("setup", "reproduce", "test", "lint", "testbed", "bench", "bench-gpu", "clean"):
        assert re.search(rf"^{target}\s", text, re.M)


def test_make_reproduce_names_a_profile_that_is_not_there():
    run = subprocess.run(["make", "-C", ROOT, "reproduce", "PROFILE=nobody"], capture_output=True, text=True)
    assert run.returncode != 0 and "notebooks/params/nobody.yaml" in run.stderr


def test_the_benchmark_runs(tmp_path):
    from corehead import bench

    times = bench.measure_times(256, 1)
    assert set(times) == set(bench.WAYS) and all(t[0] > 0 for t in times.values())
    assert bench.measure_memory("plain", 256) >= 0
    rows = bench.sharing_rows((1, 2), repeats=1, tokens=256)
    assert [row["questions"] for row in rows] == [1, 1, 2, 2] and all(row["time / together"] > 0 for row in rows)
    rows = bench.ablation_rows(None, conditions=2, repeats=1, tokens=256)
    assert len(rows) == 6 and all(row["time / together"] > 0 for row in rows)
    rows = bench.store_rows([200, 300])
    assert [(row["table"], row["rows"]) for row in rows] == [(t, n) for t in ("answers", "scores") for n in (200, 300)]
