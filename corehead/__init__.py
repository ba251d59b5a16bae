"""Find, prove and use the few attention heads through which a multimodal LLM looks things up.

The modules, in the order in which a sample travels, which is the order to read them in:

samples       what is asked, and where the answer stands
families      which pixels and frames each visual token covers, one class an architecture
models        MLLM, load(): a transformers model, its processor and its family
tagging       from a sample to token indices: the evidence V*, question, answer
attention     the one attention function, with hooks that read rows or change heads
batching      questions on one context share its prefill; how a batch is run
runs, store   the resumable loop of a run; its results in one SQLite file
scoring       RAM and its variants for every head: score() -> HeadScores
ranking       HeadSet, HeadRanking, random heads, agreement and its chance level
ablation      Ablation, ablate(), curve()
patching      what heads do: their outputs put into a counterfactual
gates         factors on heads, their gradients, and the heads that training would close
controls      the other head scores that RAM is compared with
circuits      what heads write when they look at the evidence: direct logits, readouts
retrieval     heads as retrievers: pages ranked by the attention that heads pay to them
sinks         visual tokens that every row looks at, and RAM without them
hybrid        HybridAttention: full heads, streaming heads, the split KV cache
evaluation    accuracy, log-probability and margin under many conditions: evaluate()
stats         intervals and tests over crossed contexts and items; summary(), compare()
plots, tasks  figures; the named task sets of the profiles
explorer      explore(): the head explorer, for JupyterLab and voila

Beside the core: testbed, zeroshot, benchmarks, bench, distributed (engine="ray").
"""

from importlib import import_module as _import

from .ablation import Ablation, ablate
from .evaluation import evaluate
from .hybrid import HybridAttention, from_duo_attention, hybrid_attention
from .models import MLLM, load
from .ranking import HeadRanking, HeadSet, random_heads
from .runs import VERSION as __version__
from .samples import Frames, Pages, Region, Sample, SampleError, Span, Tube
from .scoring import HeadScores, score
from .stats import heads_for_share
from .tagging import TaggedSample

__all__ = [
    "MLLM",
    "Ablation",
    "Frames",
    "HeadRanking",
    "HeadScores",
    "HeadSet",
    "HybridAttention",
    "Pages",
    "Region",
    "Sample",
    "SampleError",
    "Span",
    "TaggedSample",
    "Tube",
    "__version__",
    "ablate",
    "evaluate",
    "from_duo_attention",
    "heads_for_share",
    "hybrid_attention",
    "load",
    "random_heads",
    "score",
]


def __getattr__(name: str):
    """``ch.plots`` sets a style, the others are not for everybody: they are imported when they are asked for."""
    if name in ("patching", "plots", "testbed", "benchmarks"):
        return _import(f".{name}", __name__)
    if name == "explore":  # needs ipywidgets
        return _import(".explorer", __name__).explore
    raise AttributeError(f"module 'corehead' has no attribute {name!r}")
