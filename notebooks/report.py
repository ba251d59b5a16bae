"""What came out again: the paper's claims beside the committed values and those of this run.

``python report.py PROFILE``, as ``make report`` runs it, reads claims.yaml and the profile's tables; it writes
data/results/PROFILE/report.md and, for the models that ship here, the table of claims in README.md.
"""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "testbed"  # the profile that README is about
START, END = "<!-- by make report, from notebooks/claims.yaml -->\n", "<!-- end of the claims -->\n"
# columns of the report, and their widths
COLUMNS = {"value": 45, "committed": 20, "this run": 20, "agrees": 6, "as the paper has it": 25}
LEGEND = """\
Headings are what the paper says. A value agrees if it lies in the committed interval or, where there is none, reads the
same; the mean of several tasks has the mean of their intervals. Above and below: they do not overlap; like: they do,
which few samples alone can bring about: it is no equality."""


class Value(NamedTuple):
    """A number and its interval, which is the number itself where a table has none."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value):
        return cls(*[float(value)] * 3)

    def __format__(self, spec):
        return format(self.value, spec)

    def __str__(self):
        value, low, high = (f"{number:.3f}".rstrip("0").rstrip(".") for number in self)
        return value if low == high else f"{value} [{low}, {high}]"

    def includes(self, other):
        return self.low <= other.value <= self.high if self.low < self.high else str(self) == str(other)


# --- files, of this run and of the last commit


def git(*arguments):
    """What git prints, or None: it is not installed, this is no clone, or the commit has no such file."""
    try:
        run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None


def here(path):
    return (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else None


@cache
def committed(path):
    return git("show", f"HEAD:./{path}")


@cache
def parse(name, text):
    return pd.json_normalize(json.loads(text)) if name.endswith(".json") else pd.read_csv(StringIO(text))


def folder(profile):
    return f"data/results/{profile}"


# --- values


@cache
def retrieval():
    """The tasks, of any task set, in which something is looked up."""
    sets = yaml.safe_load((ROOT / "corehead/tasks.yaml").read_text())
    return [task for tasks in sets.values() for task in tasks["retrieval"]]


def measure(rows, column, how="mean"):
    bounds = [column, f"{column}_low", f"{column}_high"]
    if how in ("count", "nunique") or bounds[1] not in rows:
        value = Value.exact(rows[column].agg(how))
    else:
        chosen = rows if how == "mean" else rows[rows[column] == rows[column].agg(how)]
        value = Value(*chosen[bounds].mean())
    if math.isnan(value.value):
        raise LookupError("no such rows")
    return value


def find(spec, profile, read):
    """The value of an entry of claims.yaml, from the files that `read` finds, or in words why there is none."""
    name = spec["table"] if spec["table"].endswith(".json") else spec["table"] + ".csv"
    try:
        text = read(os.path.normpath(f"{folder(profile)}/{name}"))
        if text is None:
            return f"no {name}"
        rows = parse(name, text)
        if "rows" in spec:
            rows = rows.query(spec["rows"], local_dict={"retrieval": retrieval()}, engine="python")
        return measure(rows, spec["column"], spec.get("of", "mean"))
    except Exception as error:  # half a file, other columns: whatever it is, the report goes on
        return reason(name, error)


def reason(name, error):
    first = str(error).split("\n")[0].replace("|", "/")
    return f"{name}: {type(error).__name__}: {first}"


def values(claim, profile, read):
    specs = {key: claim | spec for key, spec in claim["values"].items()}
    ours = {key: spec for key, spec in specs.items() if profile == SHIPPED or not spec["table"].startswith("../")}
    return {key: find(spec, profile, read) for key, spec in ours.items()}


def as_the_paper_has_it(spec, found, key):
    """Such as "below random: yes"."""
    if "as" not in spec or isinstance(found[key], str):
        return ""
    word, name = spec["as"].split(" ")
    other = found.get(name) or Value.exact(name)
    if isinstance(other, str):
        return ""
    below, above = found[key].high < other.low, found[key].low > other.high
    holds = {"below": below, "above": above, "like": not below and not above}[word]
    return f"{word} {name.replace('_', ' ')}: {'yes' if holds else 'no'}"


def agrees(before, value):
    if isinstance(before, str) or isinstance(value, str):
        return ""
    return "yes" if before.includes(value) else "NO"


# --- tables


def tables(profile):
    """Names of the profile's tables that are there or were committed."""
    listed = git("ls-tree", "--name-only", "HEAD", f"./{folder(profile)}/") or ""
    paths = [*(ROOT / folder(profile)).glob("*"), *map(Path, listed.split("\n"))]
    return sorted({path.name for path in paths if path.suffix in (".csv", ".json")})


def change(name, before, now):
    """How many cells of a table differ and by how much numbers do at most; empty if none does."""
    if before is None or now is None:
        return "not committed" if before is None else "committed, and not there any more"
    if before == now:
        return ""
    before, now = (parse(name, text).astype(str).fillna("") for text in (before, now))
    if before.shape != now.shape or list(before.columns) != list(now.columns):
        return f"other rows or columns ({before.shape[0]} x {before.shape[1]}, now {now.shape[0]} x {now.shape[1]})"
    was, value = (table.apply(pd.to_numeric, errors="coerce") for table in (before, now))
    cells = ((before != now) & (was != value)).to_numpy()
    most = (value - was).abs().max().fillna(0)
    by = f", numbers by at most {most.max():.3g} ({most.idxmax()})" if most.max() else ""
    return f"{cells.sum()} of {cells.size} cells changed{by}" if cells.any() else ""


def changes(profile):
    found = {}
    for name in tables(profile):
        path = f"{folder(profile)}/{name}"
        try:
            found[name] = change(name, committed(path), here(path))
        except Exception as error:  # as above
            found[name] = reason(name, error)
    return found


# --- what is written


def line(cells, compared):
    shown = [name for name in COLUMNS if compared or name not in ("committed", "agrees")]
    return "| " + " | ".join(cells[name].ljust(COLUMNS[name]) for name in shown) + " |"


def of_claim(claim, before, now, compared):
    """Lines on a claim: a table of its values, or why there are none."""
    lines = [f"## {claim['paper']} ({claim['source']})", ""]
    if all(isinstance(value, str) for value in now.values()):
        return [*lines, f"{', '.join(dict.fromkeys(now.values()))}: notebook {claim['notebook']} writes it", ""]
    rows = [dict(zip(COLUMNS, COLUMNS))]
    for key, value in now.items():
        spec = claim["values"][key]
        paper = as_the_paper_has_it(spec, now, key)
        cells = [spec["is"], str(before[key]), str(value), agrees(before[key], value), paper]
        rows.append(dict(zip(COLUMNS, cells)))
    header, *rest = (line(row, compared) for row in rows)
    return [*lines, header, re.sub("[^|]", "-", header), *rest, ""]


def of_tables(found):
    """Lines on the tables, those that changed first."""
    same = [name for name, what in found.items() if not what]
    lines = ["## Tables", "", *(f"* `{name}`: {what}" for name, what in found.items() if what)]
    return lines + ([textwrap.fill("* The same: " + ", ".join(same), 120)] if same else [])


def report(profile, claims, now):
    """The report in Markdown: claims, then tables."""
    before = {name: values(claim, profile, committed) for name, claim in claims.items()}
    found = changes(profile)
    first = "None of these tables is committed, as far as git says: this run stands beside the paper alone."
    if compared := any(committed(f"{folder(profile)}/{name}") for name in found):
        told = [agrees(before[name][key], value) for name, part in now.items() for key, value in part.items()]
        yes, no, same = told.count("yes"), told.count("NO"), list(found.values()).count("")
        commit = git("rev-parse", "--short", "HEAD").strip()
        first = f"Beside commit {commit}, {yes} of {yes + no} values agree, {same} of {len(found)} tables are the same."
    text = [f"# Reproduction report: {profile}", "", first, "", LEGEND, ""]
    for name, claim in claims.items():
        text += of_claim(claim, before[name], now[name], compared) if now[name] else []
    return "\n".join(text + (of_tables(found) if compared else [])) + "\n"


def on_a_page(text):
    """The same for a terminal: no blank lines, no rules, and the header of the tables once."""
    lines = [line for line in text.split("\n") if line and not line.startswith("|-")]
    lines = [line for i, line in enumerate(lines) if not line.startswith("| value ") or line not in lines[:i]]
    return "\n".join(re.sub("^#+ ", "", line).replace("|", " ").rstrip() for line in lines)


def claims_table(claims, now):
    """README's table, its verdicts filled."""
    lines = ["| the paper says | verdict | evidence |", "|---|---|---|"]
    for name, claim in claims.items():
        verdict = re.sub(r"(?<=\d)%", " %", claim["verdict"].format(**now[name]))
        file = claim["notebook"]
        lines.append(f"| {claim['paper']} | {verdict} | [{file[:2]}](notebooks/{file}.ipynb) |")
    return "\n".join(lines) + "\n"


def write_readme(claims, now):
    """Fill README's table; a verdict without a number is none, and leaves it as it is."""
    missing = {value: None for found in now.values() for value in found.values() if isinstance(value, str)}
    if missing:
        return f"README.md stays as it is: {', '.join(missing)}"
    path, table = ROOT / "README.md", claims_table(claims, now)
    between = re.compile(f"(?<={re.escape(START)}).*(?={re.escape(END)})", re.S)
    text, filled = between.subn(lambda _: table, path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    return f"README.md {'has the claims of this run' if filled else 'has lost the marks around its claims'}"


def main(profile):
    if not tables(profile):
        return print(f"{folder(profile)} has no tables: make reproduce PROFILE={profile} writes them")
    claims = yaml.safe_load((ROOT / "notebooks/claims.yaml").read_text(encoding="utf-8"))
    now = {name: values(claim, profile, here) for name, claim in claims.items()}
    text = report(profile, claims, now)
    path = f"{folder(profile)}/report.md"
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)  # git may know tables of a folder that is gone
    (ROOT / path).write_text(text, encoding="utf-8")
    print(on_a_page(text), path, sep="\n")
    if profile == SHIPPED:
        print(write_readme(claims, now))


if __name__ == "__main__":
    main(sys.argv[1])
