"""What holds for the repository as a whole: notebooks, profiles, environments, figures, size and shape."""

import ast
import fcntl
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import shape
import yaml
from conftest import picture, tiny
from PIL import Image

import corehead as ch

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

# The core of the package, as tests/shape.py counts it
MAX_FUNCTION_LINES = 60
MAX_COMPLEXITY = 15
MAX_TOKENS_A_LINE = 10
# A cell of a notebook, its parameters aside
MAX_CELL_LINES = 12
MAX_PARAMETERS = 6
# Those of the default profile, all notebooks together
MAX_FIGURES = 20
# All tracked files
MAX_BYTES = 45 * 2**20

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "corehead"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
EXPLORER = ROOT / "notebooks/explore.ipynb"  # has no number, parameters or tables
RUNNER = ROOT / "notebooks/run.py"
PARAMS = ROOT / "notebooks/params"
LEFT_OUT = {
    "smollm2": ("01_", "06_")
}  # notebooks that a profile has no use for, as in the Makefile
# what stands in shared.yaml holds for all profiles beside it
PROFILES = sorted(p for p in PARAMS.glob("**/*.yaml") if p.stem != "shared")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
and_the_explorer = pytest.mark.parametrize(
    "path", [*NOTEBOOKS, EXPLORER], ids=lambda p: p.stem
)


def code_cells(path: Path) -> list[dict]:
    return [
        cell
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def source(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in code_cells(path))


def parameters(path: Path) -> dict:
    """Names and values of the parameters cell, which holds literals and nothing else."""
    [cell] = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    values = {}
    for statement in ast.parse("".join(cell["source"])).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        [target] = statement.targets
        value = ast.literal_eval(statement.value)
        values |= (
            {target.id: value}
            if isinstance(target, ast.Name)
            else dict(zip([t.id for t in target.elts], value))
        )
    return values


def values_of(profile: Path) -> dict:
    """What a profile sets, with what it shares; nothing is set twice."""
    values = yaml.safe_load(profile.read_text())
    shared = profile.with_name("shared.yaml")
    common = yaml.safe_load(shared.read_text()) if shared.exists() else {}
    assert not set(common) & set(values)
    return common | values


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no clone, or git is not installed")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    return [
        ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()
    ]


# --- notebooks


@and_the_explorer
def test_every_code_cell_was_executed_in_order(path):
    code = [cell for cell in code_cells(path) if cell["source"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [
        o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


@every_notebook
def test_committed_notebooks_are_the_default_profile(path):
    assert parameters(path)["profile"] == "testbed"


@and_the_explorer
def test_committed_notebooks_are_clean(path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    runpy.run_path(str(RUNNER))["clean"](copy)
    assert Path(copy).read_text() == path.read_text()


@every_notebook
def test_parameters_are_few(path):
    assert len(parameters(path)) <= MAX_PARAMETERS


@and_the_explorer
def test_cells_are_short(path):
    for cell in code_cells(path):
        lines = [
            line
            for line in "".join(cell["source"]).split("\n")
            if line.strip() and line.strip()[0] != "#"
        ]
        assert len(lines) <= MAX_CELL_LINES or "parameters" in tags(cell), lines[:2]


def takeaway(path: Path) -> str:
    """The box on a notebook's first screen."""
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    [box] = [line for line in first.split("\n") if line.startswith("> **Takeaway.**")]
    return box


def numbers_beside_claims(text: str, notebook: str) -> list[str]:
    """Numbers of a text that are no claim of a notebook's tables, neither as they stand nor in percent."""
    claims = pd.read_csv(ROOT / f"data/results/testbed/claims_{notebook}.csv").value
    text = re.sub(r"\[[^]]*\]\([^)]*\)|arXiv [\d.]+|[Nn]otebooks? \d", "", text)
    numbers = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)( %)?", text)
    assert numbers, "a claim without a number"
    unknown = []
    for number, percent in numbers:
        # half a unit of the last digit, and what rounding to four decimals took from the table
        unit = 10.0 ** -len(number.partition(".")[2])
        values = 100 * claims if percent else claims
        distance = (values.abs() - float(number)).abs()
        if not (distance <= 0.5 * unit + (1e-2 if percent else 1e-4)).any():
            unknown.append(number + percent)
    return unknown


@every_notebook
def test_numbers_of_the_takeaway_are_claims_of_the_tables(path):
    assert numbers_beside_claims(takeaway(path), path.stem[:2]) == []


@and_the_explorer
def test_a_cell_that_is_not_compared_says_why(path):
    for cell in code_cells(path):
        if "nbval-ignore-output" in tags(cell):
            assert cell["source"][0].startswith("# not compared"), cell["source"][0]


@and_the_explorer
def test_no_notebook_sets_a_style_or_defines_a_function(path):
    assert not re.search(r"^\s*(def|class) |rcParams|fontsize|plt\.", source(path), re.M)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.stem)
def test_every_key_of_a_profile_is_a_parameter_somewhere(profile):
    """papermill only warns about a mistyped one."""
    from corehead.tasks import task_set

    known = set().union(*map(parameters, NOTEBOOKS))
    values = values_of(profile)
    assert set(values) <= known and values["profile"] == profile.stem
    counts = {path: set(parameters(path).get("n", ())) for path in NOTEBOOKS}
    needed = [
        names
        for path, names in counts.items()
        if not path.stem.startswith(LEFT_OUT.get(profile.stem, ()))
    ]
    assert set().union(*needed) <= set(values["n"]) <= set().union(*counts.values())
    task_set(**values.get("tasks", {"name": "digits"}))


# --- what notebooks leave behind


def saved(path: Path, module: str) -> set[str]:
    """Names under which a notebook saves its figures or tables: plots.save(figure, NAME, profile)."""
    calls = [
        node for node in ast.walk(ast.parse(source(path))) if isinstance(node, ast.Call)
    ]
    return {
        ast.literal_eval(call.args[1])
        for call in calls
        if ast.unparse(call.func) == f"{module}.save"
    }


def test_figures_are_those_that_notebooks_save_and_the_gallery_shows_each():
    names = sorted(name for path in NOTEBOOKS for name in saved(path, "plots"))
    assert len(names) == len(set(names)) <= MAX_FIGURES
    assert sorted(path.stem for path in (ROOT / "figures").glob("*.png")) == names
    gallery = (ROOT / "figures/README.md").read_text()
    entries = re.findall(
        r"^## (.+)\?\n\n!\[(.+)\]\((\w+)\.png\)\n\n.+ \[(.+)\]\(\.\./notebooks/\4\.ipynb\)$",
        gallery,
        re.M,
    )
    # a question, its picture, an answer and the notebook that draws it, in their order
    assert (
        [name for _, _, name, _ in entries] == names == re.findall(r"(\w+)\.png", gallery)
    )
    for _, _, name, notebook in entries:
        assert name in saved(ROOT / f"notebooks/{notebook}.ipynb", "plots")


def test_figures_of_other_profiles_have_names_that_notebooks_save():
    names = set().union(*(saved(path, "plots") for path in NOTEBOOKS))
    assert {path.stem for path in (ROOT / "figures").glob("*/*.png")} <= names


def test_figures_that_are_shown_are_there():
    cells = [c for path in NOTEBOOKS for c in json.loads(path.read_text())["cells"]]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for text in [(ROOT / "README.md").read_text(), *texts]:
        for name in re.findall(r"figures/[\w/-]+\.png", text):
            assert (ROOT / name).exists(), name


def test_figures_are_small(tracked):
    assert not [path for path in tracked if path.suffix == ".pdf"]
    modes = {path.name: Image.open(path).mode for path in tracked if path.suffix == ".png"}
    assert {
        name: mode for name, mode in modes.items() if mode != "P"
    } == {}  # a palette of 256 colours


def test_tables_that_notebooks_write_are_committed_and_no_others():
    tables = {f"{name}.csv" for path in NOTEBOOKS for name in saved(path, "results")}
    others = {
        name
        for path in NOTEBOOKS
        for name in re.findall(r'results\(profile\) / "([\w.]+)"', source(path))
    }
    there = {path.name for path in (ROOT / "data/results/testbed").iterdir()}
    assert there - {"report.md"} == tables | others
    rule = json.loads((ROOT / "data/results/testbed/threshold.json").read_text())
    assert 0 < rule["p"] <= 0.5 and len(rule["heads"]) == round(rule["p"] * 192)


def test_the_tree_is_small(tracked):
    assert sum(path.stat().st_size for path in tracked) <= MAX_BYTES


# --- the package


def core_functions() -> list[tuple[str, int, int]]:
    files = [path for path in PACKAGE.rglob("*.py") if shape.is_core(path, PACKAGE)]
    return [function for path in files for function in shape.functions(path)]


def test_functions_of_the_core_are_short_and_simple():
    functions = core_functions()
    assert [
        (name, lines) for name, lines, _ in functions if lines > MAX_FUNCTION_LINES
    ] == []
    assert [
        (name, branches) for name, _, branches in functions if branches > MAX_COMPLEXITY
    ] == []


def test_code_of_the_core_is_not_dense():
    assert shape.report(PACKAGE)["core"]["tokens a code line"] <= MAX_TOKENS_A_LINE


def test_imports_go_one_way_and_the_core_needs_nothing_outside_it():
    graph = shape.imports(PACKAGE)
    assert shape.levels(graph)[1] == []
    outside = {
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if name.split(".")[0] not in shape.NOT_CORE
        and target.split(".")[0] in shape.NOT_CORE
    }
    assert outside == set()


def test_the_page_for_your_own_model_runs(monkeypatch, tmp_path):
    page = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ch, "load", lambda *source, **options: tiny("qwen3_vl"))
    exec(page, {"page": picture(650, 310)})
    assert {path.name for path in tmp_path.iterdir()} == {
        "heads.json",
        "head_score.json",
        "pattern",
    }


# --- the tests


def test_slow_tests_say_why_they_must_be():
    for path in (ROOT / "tests").glob("*.py"):
        tree = ast.parse(path.read_text())
        reasons = {
            id(node.func): node.args
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow":
                [reason] = reasons.get(id(node)) or [None]
                assert isinstance(reason, ast.Constant) and len(reason.value) > 10, (
                    f"{path.name}:{node.lineno}"
                )


# --- environments


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


# --- make

# stands in for every Python that make calls: notes which notebooks it runs, fails for those that are named
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo True ;;
  "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip"*) echo "no route to host"; exit 1 ;;
  *run.py*)
    echo "$2" >> runs
    case "$2" in *"${FAILING:-none}"*) exit 1 ;; esac
    mkdir -p "$(dirname "$3")" && cp "$2" "$3" ;;
  *report.py*) echo "report of $2" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """What make looks at, with a Python that runs nothing."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PARAMS, tmp_path / "notebooks/params")
    for path in (RUNNER, *NOTEBOOKS, PACKAGE / "ranking.py"):
        there = tmp_path / path.relative_to(ROOT)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(python, tmp_path / ".venv/bin/python")
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"
    }
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True
    )


def touch(path: Path) -> None:
    time.sleep(0.1)  # longer than the clock of a file system ticks
    path.touch()


def ran(folder: Path) -> list[str]:
    """Names of the notebooks that ran since this was asked last."""
    log = folder / "runs"
    names = [Path(line).stem for line in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(names)


def test_make_alone_prints_the_targets():
    text = make(ROOT).stdout
    for target in (
        "setup",
        "reproduce",
        "quick",
        "report",
        "test",
        "test-fast",
        "lint",
        "testbed",
        "survey",
        "bench",
        "bench-gpu",
        "clean",
    ):
        assert re.search(rf"^{target}\s", text, re.M)


def test_make_runs_a_notebook_again_if_what_it_is_made_from_changed(clone):
    names = [path.stem for path in NOTEBOOKS]
    assert make(clone, "reproduce").returncode == 0
    assert ran(clone) == names
    again = make(clone, "reproduce")
    assert "nothing has changed" in again.stdout and ran(clone) == []
    touch(clone / "notebooks" / f"{names[-1]}.ipynb")
    make(clone, "reproduce")
    assert ran(clone) == names[-1:]
    for changed in ("corehead/ranking.py", "notebooks/run.py"):
        touch(clone / changed)
        make(clone, "reproduce")
        assert ran(clone) == names
    make(clone, "reproduce", "FORCE=1")
    assert ran(clone) == names
    make(
        clone, "reproduce", "FORMAT=pdf"
    )  # figures for print are another run, and leave the notebooks as they are
    assert ran(clone) == names
    make(clone, "reproduce")
    assert ran(clone) == []


def test_make_gives_each_profile_its_parameters_and_its_place(clone):
    make(clone, "quick")
    assert len(ran(clone)) == len(NOTEBOOKS)
    assert {path.name for path in (clone / "data/results/quick").iterdir()} == {
        path.name for path in NOTEBOOKS
    }
    touch(clone / "notebooks/params/quick.yaml")
    assert make(clone, "reproduce", "PROFILE=testbed").returncode == 0
    make(clone, "reproduce", "PROFILE=quick")
    assert len(ran(clone)) == 2 * len(NOTEBOOKS)
    for folder, name in (
        ("zeroshot", "qwen3-vl-8b"),
        ("benchmarks", "qwen3-vl-8b-benchmarks"),
    ):
        told = make(clone, "--dry-run", "reproduce", f"PROFILE={name}").stdout
        there = f"notebooks/params/{folder}"
        assert "1 at once" in told
        assert f"-f {there}/shared.yaml -f {there}/{name}.yaml" in told


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ch.__version__


def test_clean_leaves_what_took_hours(clone):
    make(clone, "quick")
    kept = [clone / "data/cache" / name for name in ("VidSTG", "runs/qwen3-vl-8b/04")]
    for folder in kept:
        folder.mkdir(parents=True)
    assert make(clone, "clean").returncode == 0
    assert all(folder.is_dir() for folder in kept)
    assert {path.name for path in (clone / "data/cache").iterdir()} == {"VidSTG", "runs"}


def test_a_notebook_that_fails_does_not_stop_the_others(clone):
    names = [path.stem for path in NOTEBOOKS]
    assert make(clone, "reproduce", FAILING="02_").returncode != 0
    assert ran(clone) == names
    assert make(clone, "reproduce").returncode == 0
    assert ran(clone) == [name for name in names if name.startswith("02_")]


def test_every_run_ends_with_a_report_even_if_a_notebook_fails(clone):
    failed = make(clone, "reproduce", "PROFILE=quick", FAILING="02_")
    assert failed.returncode != 0 and failed.stdout.count("report of quick") == 1
    for again in (make(clone, "reproduce", "PROFILE=quick"), make(clone, "report")):
        assert again.returncode == 0 and again.stdout.count("report of") == 1
    assert "nothing has changed" in make(clone, "reproduce", "PROFILE=quick").stdout


def test_make_says_what_is_wrong_in_one_line(clone):
    told = make(clone, "reproduce", "PROFILE=nobody")
    assert told.returncode != 0 and "PROFILE is one of testbed quick" in told.stderr
    told = make(clone, "reproduce", "NOTEBOOKS=07_more")
    assert told.returncode != 0 and 'no notebook "07_more"' in told.stderr
    assert len(told.stderr.splitlines()) == 1 and ran(clone) == []
    shutil.rmtree(clone / ".venv")
    told = make(clone, "setup", "PYTHON=false")
    assert (
        told.returncode != 0
        and "needs Python 3.10 or later, and false is not" in told.stderr
    )
    told = make(clone, "setup", "PYTHON=./python")
    assert told.returncode != 0 and "no network, no space" in told.stderr
    assert (
        "no route to host" in (clone / ".venv/install.log").read_text()
        and not (clone / ".venv/.ready").exists()
    )


# --- the runner


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs code as the last cell of a notebook whose parameters are n = 1, and n = 2 in a profile."""
    main = runpy.run_path(str(RUNNER))["main"]
    values = tmp_path / "values.yaml"
    values.write_text("n: 2\nunknown: 3\n")

    def run(code: str) -> Path:
        cells = [
            nbformat.v4.new_code_cell(c)
            for c in ("import sys\nn = 1", "print(n, file=sys.stderr)", code)
        ]
        cells[0].metadata.tags = ["parameters"]
        kernel = {
            "kernelspec": {
                "name": "python3",
                "language": "python",
                "display_name": "Python 3",
            }
        }
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "one.ipynb"
        )
        result = tmp_path / "out/one.ipynb"
        monkeypatch.setattr(
            sys,
            "argv",
            ["run.py", str(tmp_path / "one.ipynb"), str(result), "-f", str(values)],
        )
        main()
        return result

    return run


def test_the_runner_executes_a_notebook_and_cleans_it(run, capsys):
    result = run("n + 1")
    assert re.fullmatch(r"one +done in \d+:\d\d\n", capsys.readouterr().out)
    cells = code_cells(result)
    assert [cell["outputs"] for cell in cells[:-1]] == [
        [],
        [],
        [],
    ]  # with the injected one; stderr is gone
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["3"]
    assert "papermill" not in json.dumps(cells) and "unknown" not in source(result)


def test_the_runner_leaves_a_notebook_alone_that_another_runs(run, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/one.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"^one +not run: another make runs it"):
            run("n + 1")
    assert run("n + 1").exists()


def test_the_runner_names_the_cell_that_failed(run):
    with pytest.raises(
        SystemExit,
        match=r"^one +FAILED after .* in cell \[4\]: ZeroDivisionError: .*out/one.ipynb\)$",
    ):
        run("n / 0")
    with pytest.raises(SystemExit, match="kernel died"):
        run("import os; os._exit(1)")
