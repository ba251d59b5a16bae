"""Where notebooks write, and how they are kept clean (``python -m corehead.notebooks clean FILE ...``)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEEP = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def output(*parts: str) -> Path:
    """A folder for what notebooks write, made if it is missing.

    The environment variable COREHEAD_OUTPUT takes the place of the repository, so that tests overwrite nothing.
    """
    folder = Path(os.environ.get("COREHEAD_OUTPUT", ROOT), *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results(profile: str) -> Path:
    """The folder of a profile's tables."""
    return output("data", "results", profile)


def clean(path: str | Path) -> None:
    """Drop what changes from run to run (times, paths, widget states), and what went to stderr; keep the rest."""
    path = Path(path)
    notebook = json.loads(path.read_text())
    notebook["metadata"] = KEEP
    kept = []
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        tags = [tag for tag in tags if not tag.startswith("papermill")]
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
            for output in cell["outputs"]:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        kept.append(cell)
    notebook["cells"] = kept
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if text != path.read_text():
        path.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] != ["clean"]:
        sys.exit("usage: python -m corehead.notebooks clean FILE ...")
    for name in sys.argv[2:]:
        clean(name)
