"""nbval's comparison of the notebooks: what it leaves out, and where the notebooks write meanwhile."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "data/results/testbed"
FOLDER = pytest.StashKey[str]()


def pytest_configure(config):
    """Notebooks overwrite nothing here, and find the committed tables: notebook 5 does not wait for notebook 4."""
    if "COREHEAD_OUTPUT" in os.environ:  # said by the caller, or by the process that started this worker
        return
    folder = os.environ["COREHEAD_OUTPUT"] = config.stash[FOLDER] = tempfile.mkdtemp(prefix="corehead-")
    shutil.copytree(RESULTS, Path(folder, "data/results/testbed"))


def pytest_unconfigure(config):
    if FOLDER in config.stash:
        shutil.rmtree(config.stash[FOLDER], ignore_errors=True)
        del os.environ["COREHEAD_OUTPUT"]


def pytest_collection_modifyitems(items):
    """Warnings on stderr differ between machines and versions."""
    for file in {item.parent for item in items if item.path.suffix == ".ipynb"}:
        file.skip_compare = (*file.skip_compare, "stderr")
