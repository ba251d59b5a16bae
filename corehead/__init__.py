"""Find, prove and use the few attention heads through which a multimodal LLM looks things up."""

from importlib import import_module as _import
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from packaging.version import Version

_MINIMUM = {"torch": "2.9", "transformers": "5.17"}


def check_versions(minimum: dict[str, str]) -> None:
    """Raise ImportError, with what to install, where a package is missing or older than `minimum` says."""
    for package, least in minimum.items():
        try:
            found = _version(package)
        except PackageNotFoundError:
            found = None
        if found is None or Version(found) < Version(least):
            have = f"{package} {found} is installed" if found else f"{package} is not installed"
            raise ImportError(f'corehead needs {package} >= {least}, but {have}: pip install "{package}>={least}"')


check_versions(_MINIMUM)

from .ablation import Ablation, ablate  # noqa: E402
from .acceleration import Acceleration, accelerate, from_duo_attention  # noqa: E402
from .evaluation import evaluate  # noqa: E402
from .models import MLLM, load  # noqa: E402
from .ranking import HeadRanking, HeadSet, heads_for_share, random_heads  # noqa: E402
from .samples import Frames, Pages, Region, Sample, SampleError, Span, Tube  # noqa: E402
from .scoring import HeadScores, score  # noqa: E402
from .tagging import Tagged  # noqa: E402

__all__ = [
    "MLLM",
    "Ablation",
    "Acceleration",
    "Frames",
    "HeadRanking",
    "HeadScores",
    "HeadSet",
    "Pages",
    "Region",
    "Sample",
    "SampleError",
    "Span",
    "Tagged",
    "Tube",
    "ablate",
    "accelerate",
    "evaluate",
    "from_duo_attention",
    "heads_for_share",
    "load",
    "random_heads",
    "score",
]


def __getattr__(name: str):
    """``ch.plots`` sets a style, the others are not for everybody: they are imported when they are asked for."""
    if name in ("plots", "testbed", "benchmarks"):
        return _import(f".{name}", __name__)
    raise AttributeError(f"module 'corehead' has no attribute {name!r}")
