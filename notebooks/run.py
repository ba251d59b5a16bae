"""Run a notebook from its first cell to its last, as `make reproduce` does, and keep what does not change by itself.

``python run.py 04_ablation_curves.ipynb RESULT.ipynb -f params/quick.yaml`` prints one line: how long it took, or the
cell that failed. ``python run.py --clean *.ipynb`` cleans notebooks that were saved by hand.
"""

import argparse
import fcntl
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
WIDGET = "application/vnd.jupyter.widget-view+json"
logging.getLogger("papermill").setLevel("ERROR")
# `make test` compares outputs: a bar that shows here and not there would be a difference
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # kernels warn about the debugger otherwise


def passing(output):
    """Whether an output is of the run alone: warnings, and bars, whose widgets live in a kernel that is gone."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def clean(path):
    """Drop what changes from run to run (times, paths, widgets) and what went to stderr; keep the rest."""
    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    notebook.metadata = KERNEL
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if not tag.startswith("papermill")]
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not passing(output)]
    if nbformat.writes(notebook) != before:
        nbformat.write(notebook, path)


def parameters(notebook, files):
    """What profiles set, of it what this notebook asks for; a later file goes before an earlier one."""
    known = papermill.inspect_notebook(str(notebook))
    values = {}
    for file in files:
        values |= yaml.safe_load(Path(file).read_text())
    return {name: value for name, value in values.items() if name in known}


def run(notebook, result, files):
    """Execute a notebook in its folder; returns the reason why it failed, or None."""
    try:
        # by sockets in a folder of its own: a kernel that starts beside this one may take a port that seemed free
        with tempfile.TemporaryDirectory() as folder:
            papermill.execute_notebook(
                str(notebook),
                str(result),
                parameters(notebook, files),
                cwd=str(HERE),
                kernel_name="python3",
                start_timeout=600,  # many kernels that start at once are slow
                progress_bar=False,
                config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
            )
    except PapermillExecutionError as error:
        first = error.evalue.strip().split("\n")[0]
        return f"in cell [{error.exec_count}]: {error.ename}: {first}"
    except DeadKernelError:
        return "because its kernel died: out of memory?"
    clean(result)
    return None


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help="a notebook and the file to write, or --clean")
    parser.add_argument("--clean", action="store_true", help="clean these notebooks, run nothing")
    parser.add_argument("-f", dest="files", action="append", default=[], metavar="YAML", help="parameters; repeatable")
    given = parser.parse_args()
    if given.clean:
        for path in given.notebooks:
            clean(path)
        return
    if len(given.notebooks) != 2:
        parser.error("give a notebook and the file to write")
    notebook, result = map(Path, given.notebooks)
    result.parent.mkdir(parents=True, exist_ok=True)
    # two runs into one file would move it away under each other; a lock goes with its process, however that ends
    with result.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{notebook.stem:<24} not run: another make runs it in this folder, wait for that")
        start = time.monotonic()
        failed = run(notebook, result, given.files)
        took = duration(time.monotonic() - start)
    if failed:
        sys.exit(f"{notebook.stem:<24} FAILED after {took} {failed}  (all of it: jupyter lab {result})")
    print(f"{notebook.stem:<24} done in {took}", flush=True)


if __name__ == "__main__":
    main()
