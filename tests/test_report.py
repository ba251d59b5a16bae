"""The reproduction report: what agrees, what changed, what is missing; and README's claims, which it writes."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "notebooks/report.py"
CLAIMS = yaml.safe_load((ROOT / "notebooks/claims.yaml").read_text())

# two claims; the second is of the models that ship, and of no other profile
SMALL = """
few:
  {paper: Few are needed, source: abstract, notebook: 04_curves, table: curves, column: correct,
   verdict: "{top:.0%} of {intact:.2f}, by {heads:.0f} heads",
   values: {
     intact: {is: intact, rows: heads == 'intact' and domain in @retrieval},
     top: {is: without the top, rows: heads == 'top' and domain in @retrieval, as: below intact},
     worst: {is: at least, rows: heads == 'top', of: min, as: like top},
     heads: {is: how many, table: chosen.json, column: rule.k}}}
fast:
  {paper: It is faster, source: appendix, notebook: 06_speed, table: ../bench/speed, column: times,
   verdict: "{times:.1f} times",
   values: {times: {is: times as fast, as: above 1}}}
"""
CURVES = pd.DataFrame(
    [
        ["intact", "image", 0.9, 0.8, 1.0],
        ["intact", "text", 0.8, 0.6, 0.9],
        ["intact", "sums", 0.0, 0.0, 0.1],  # nothing is looked up in it
        ["top", "image", 0.3, 0.2, 0.4],
        ["top", "text", 0.1, 0.0, 0.3],
    ],
    columns=["heads", "domain", "correct", "correct_low", "correct_high"],
)
README = "before\n{start}old\n{end}after\n"


class Clone:
    """A repository of two claims, whose tables can be changed and reported."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        for name in ("notebooks", "corehead", "data/results/testbed", "data/results/bench"):
            (root / name).mkdir(parents=True)
        shutil.copy(SCRIPT, root / "notebooks")
        (root / "notebooks/claims.yaml").write_text(SMALL)
        (root / "corehead/tasks.yaml").write_text(
            "digits: {retrieval: {image: {}, text: {}}}"
        )
        (root / "data/results/bench/speed.csv").write_text("times\n1.84\n")
        self.write(CURVES, k=6)
        scope = runpy.run_path(str(SCRIPT))
        (root / "README.md").write_text(
            README.format(start=scope["START"], end=scope["END"])
        )

    def write(self, curves, k, profile="testbed"):
        folder = self.root / "data/results" / profile
        folder.mkdir(exist_ok=True)
        curves.to_csv(folder / "curves.csv", index=False)
        (folder / "chosen.json").write_text(f'{{"rule": {{"k": {k}, "curve": [1, 2]}}}}')

    def commit(self):
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
            self.git(*command)

    def git(self, *command):
        subprocess.run(["git", "-C", self.root, *command], check=True)

    def report(self, profile="testbed"):
        """Cells of each value by its name, and the lines of the terminal."""
        runpy.run_path(str(self.root / "notebooks/report.py"))["main"](profile)
        text = (self.root / f"data/results/{profile}/report.md").read_text()
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.split("\n")
            if line.startswith("| ")
        ]
        assert len({len(row) for row in rows}) <= 1
        return {row[0]: row[1:] for row in rows}, self.capsys.readouterr().out

    def readme(self):
        return (self.root / "README.md").read_text()


@pytest.fixture
def clone(tmp_path, capsys):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    return Clone(tmp_path, capsys)


def test_a_run_that_is_the_same_agrees_and_writes_the_readme(clone):
    clone.commit()
    cells, told = clone.report()
    # of two tasks the mean, and the mean of their intervals; the third is none that looks up
    assert cells["intact"][1:3] == ["0.85 [0.7, 0.95]", "yes"]
    assert cells["without the top"] == ["0.2 [0.1, 0.35]"] * 2 + [
        "yes",
        "below intact: yes",
    ]
    assert cells["at least"][1:] == ["0.1 [0, 0.3]", "yes", "like top: yes"]
    assert cells["how many"] == ["6", "6", "yes", ""]
    assert cells["times as fast"] == ["1.84", "1.84", "yes", "above 1: yes"]
    assert "5 of 5 values agree, 2 of 2 tables are the same" in told
    assert told.count("as the paper has it") == 1 and "\n\n" not in told
    rows = re.findall(r"^\| (.*) \|$", clone.readme(), re.M)
    assert rows[1:] == [
        "Few are needed | 20 % of 0.85, by 6 heads | [04](notebooks/04_curves.ipynb)",
        "It is faster | 1.8 times | [06](notebooks/06_speed.ipynb)",
    ]
    assert clone.readme().startswith("before\n") and clone.readme().endswith("after\n")
    before = clone.readme()
    clone.report()
    assert clone.readme() == before


@pytest.mark.parametrize("value,agrees", [(0.5, "yes"), (0.7, "NO")])
def test_a_value_agrees_inside_the_committed_interval_alone(clone, value, agrees):
    clone.commit()
    curves = CURVES.copy()
    curves.loc[3, ["correct", "correct_high"]] = value, 0.95
    clone.write(curves, k=6)
    clone.git("add", ".")  # what is staged is not committed
    cells, told = clone.report()
    mean = (value + 0.1) / 2
    assert cells["without the top"][:3] == [
        "0.2 [0.1, 0.35]",
        f"{mean:.3g} [0.1, 0.625]",
        agrees,
    ]
    assert f"{4 + (agrees == 'yes')} of 5 values agree, 1 of 2 tables are the same" in told
    # two numbers of one row, the farther from 0.4 to 0.95
    assert (
        "`curves.csv`: 2 of 25 cells changed, numbers by at most 0.55 (correct_high)"
        in told
    )
    assert f"{mean:.0%} of 0.85".replace("%", " %") in clone.readme()


def test_what_follows_from_the_paper_is_seen_to_fail(clone):
    curves = CURVES.copy()
    curves.loc[3:, ["correct", "correct_low", "correct_high"]] = 0.8, 0.7, 0.9
    clone.write(curves, k=6)
    (clone.root / "data/results/bench/speed.csv").write_text("times\n0.9\n")
    cells, _ = clone.report()
    assert cells["without the top"][-1] == "below intact: no"
    assert cells["times as fast"][-1] == "above 1: no"


def test_a_value_without_an_interval_agrees_if_it_reads_the_same(clone):
    clone.commit()
    clone.write(CURVES, k=7)
    cells, told = clone.report()
    assert cells["how many"][:3] == ["6", "7", "NO"]
    assert "`chosen.json`: 1 of 2 cells changed, numbers by at most 1 (rule.k)" in told


def test_other_rows_other_columns_and_new_tables_are_named(clone):
    clone.commit()
    folder = clone.root / "data/results/testbed"
    clone.write(CURVES[:4], k=6)
    (folder / "more.csv").write_text("a\n1\n")
    told = clone.report()[1]
    assert "`curves.csv`: other rows or columns (5 x 5, now 4 x 5)" in told
    assert "`more.csv`: not committed" in told and "The same: chosen.json" in told
    clone.write(CURVES.rename(columns={"correct_low": "low"}), k=6)
    assert "`curves.csv`: other rows or columns (5 x 5, now 5 x 5)" in clone.report()[1]


def test_missing_and_broken_tables_are_said_in_a_line_and_leave_the_readme(clone):
    clone.commit()
    before, folder = clone.readme(), clone.root / "data/results/testbed"
    (folder / "curves.csv").unlink()
    cells, told = clone.report()
    assert cells["without the top"] == ["0.2 [0.1, 0.35]", "no curves.csv", "", ""]
    assert cells["how many"][:3] == ["6", "6", "yes"]
    assert "`curves.csv`: committed, and not there any more" in told
    (folder / "chosen.json").unlink()
    told = clone.report()[1]
    assert "no curves.csv, no chosen.json: notebook 04_curves writes it" in told
    assert "README.md stays as it is: no curves.csv, no chosen.json" in told
    broken = {"curves.csv": "heads,domain\ntop,image\n", "chosen.json": '{"rule": {"k"'}
    for name, text in broken.items():
        (folder / name).write_text(text)
    told = clone.report()[1]
    assert "KeyError: 'correct'" in told and "JSONDecodeError" in told
    (folder / "curves.csv").write_text(CURVES[:3].to_csv(index=False))
    cells, told = clone.report()
    assert "no such rows" in cells["without the top"][1] and cells["intact"][2] == "yes"
    assert clone.readme() == before


def test_another_profile_stands_beside_the_paper_alone(clone):
    clone.commit()
    clone.write(CURVES, k=9, profile="mine")
    before = clone.readme()
    cells, told = clone.report("mine")
    assert cells["without the top"] == ["0.2 [0.1, 0.35]", "below intact: yes"]
    assert cells["how many"] == ["9", ""]
    # what was timed here is no result of another model
    assert "times as fast" not in cells and "It is faster" not in told
    assert "None of these tables is committed" in told and "## Tables" not in told
    assert clone.readme() == before
    clone_main = runpy.run_path(str(clone.root / "notebooks/report.py"))["main"]
    clone_main("theirs")
    assert "make reproduce PROFILE=theirs" in clone.capsys.readouterr().out


def test_without_git_this_run_is_reported_alone(clone, monkeypatch):
    cells, told = clone.report()  # no clone
    assert cells["how many"] == ["6", ""] and "as far as git says" in told
    clone.commit()
    monkeypatch.setenv("PATH", "")  # not installed
    assert clone.report() == (cells, told)


# --- this repository


@pytest.fixture(scope="module")
def scope():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def found(scope):
    return {
        name: scope["values"](claim, scope["SHIPPED"], scope["here"])
        for name, claim in CLAIMS.items()
    }


def test_the_readme_says_what_the_tables_say(scope, found):
    text = (ROOT / "README.md").read_text()
    [between] = re.findall(f"{scope['START']}(.*){scope['END']}", text, re.S)
    assert between == scope["claims_table"](CLAIMS, found), "make report writes it anew"
    assert text.count("\n") <= 120


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_verdict_has_no_number_of_its_own(claim):
    """But of the rows that are asked for: the top 5 %, of share == 0.05."""
    rows = " ".join(spec.get("rows", "") for spec in claim["values"].values())
    for number in re.findall(
        r"(?<![\w.])\d+(?:\.\d+)?", re.sub(r"{.*?}", "", claim["verdict"])
    ):
        assert re.search(rf"== ({number}|{float(number) / 100:g})\b", rows), number
    assert (ROOT / f"notebooks/{claim['notebook']}.ipynb").exists()
    asked = {spec.get("as", "below 0").split()[1] for spec in claim["values"].values()}
    assert asked <= {*claim["values"], "0", "1"}


def test_values_are_those_that_the_notebooks_claim(found):
    """The same numbers, from the notebooks' last cells."""
    tables = [pd.read_csv(path) for path in ROOT.glob("data/results/testbed/claims_0*.csv")]
    claimed = pd.concat(tables).drop_duplicates("claim").set_index("claim").value
    names = {
        "few.top": "top, heads",
        "few.used": "looks, used, heads",
        "few.idle": "looks, not used, heads",
        "few.flipped": "looks, used, flipped",
        "few.idle_flipped": "looks, not used, flipped",
        "few.others_flipped": "all others, flipped",
        "necessary.intact": "intact, zeroed",
        "necessary.top": "top 5%, zeroed",
        "necessary.random": "random 5%, zeroed",
        "necessary.bottom": "bottom 5%, zeroed",
        "knockout.knockout": "five, knockout",
        "knockout.zeroed": "five, zeroed edges",
        "ram.other_ram": "seed 2, top",
        "ram.other_entropy": "seed 2, text entropy",
        "selective.retrieval": "RAM, retrieval",
        "selective.others": "RAM, others",
        "selective.zeroed": "selectivity, RAM",
        "selective.resampled": "selectivity, RAM, resample",
        "selective.facts": "facts by heart, RAM",
        "selective.facts_random": "facts by heart, random",
        "pretrained.intact": "SmolLM2, intact, min",
        "pretrained.top": "SmolLM2, top, max",
        "pretrained.random": "SmolLM2, random, min",
        "pretrained.random_most": "SmolLM2, random, max",
        "pretrained.bottom": "SmolLM2, bottom, max",
        "pretrained.facts": "SmolLM2, intact, facts",
        "pretrained.facts_top": "SmolLM2, top, facts",
        "pretrained.facts_random": "SmolLM2, random, facts",
        "pretrained.rule": "SmolLM2, heads by the rule",
        "pretrained.used": "SmolLM2, heads, looks, used",
        "pretrained.idle": "SmolLM2, heads, looks, not used",
    }
    for name, claim in names.items():
        name, key = name.split(".")
        # a notebook rounds what it claims to two decimals, or to four
        assert found[name][key].value == pytest.approx(claimed[claim], abs=5.1e-3), claim
    kept = claimed[["RAM, document", "RAM, video"]]
    assert (found["fast"]["least"].value, found["fast"]["most"].value) == (
        kept.min(),
        kept.max(),
    )
