"""engine="ray" on this machine: the local engine's tables, also when a worker dies or a run stops."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, image_part, tiny
from test_runs import questions

import corehead as ch
from corehead.ablation import Ablation, Reference, curve
from corehead.batching import MAX_QUESTIONS
from corehead.distributed import shards
from corehead.store import Store
from corehead.testbed import save

RAY = dict(engine="ray", workers=2, progress=False)
ONE = RAY | {"workers": 1}  # a worker takes long to start, and not every test needs two
slow = pytest.mark.slow(
    "Ray starts its workers anew for every run, and each imports torch and transformers"
)


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Ray on this machine, for two workers."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # workers do not see this folder
    # Jupyter brings a checker of URLs that jsonschema imports, in each of Ray's processes; it takes seconds to compile
    # its grammar, and on a busy machine Ray gives up waiting. jsonschema does without it where it cannot be imported.
    folder = tmp_path_factory.mktemp("light")
    (folder / "rfc3987_syntax.py").write_text("raise ImportError")
    path = os.pathsep.join(
        [str(folder), str(Path(ch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        options = dict(
            include_dashboard=False, object_store_memory=10**8, log_to_driver=False
        )
        ray.init(num_cpus=2, num_gpus=0, **options)
        before = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # as Ray's workers have it: sums over other pieces have other last bits
        yield ray
        torch.set_num_threads(before)
        ray.shutdown()


def appended(monkeypatch, stop_after: int | None = None) -> list[str]:
    """Names of what is appended to stores from here on; Ctrl-C after some appends."""
    seen, calls, original = [], [], Store.append

    def append(self, rows):
        original(self, rows)
        seen.extend(row["sample"] for row in rows)
        calls.extend(
            [len(rows)] if rows else []
        )  # of the last batch there may be nothing but failures
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "append", append)
    return seen


def test_shards_never_split_what_shares_a_context():
    samples = questions(None, 18)
    assert [[s.id for s in shard] for shard in shards(samples, 2)] == [
        [f"s{i}" for i in range(begin, begin + 6)] for begin in (0, 6, 12)
    ]
    asked = [
        ask("One text.", id=f"t{i}", question=f"{i}?") for i in range(MAX_QUESTIONS + 1)
    ]
    assert [len(shard) for shard in shards(asked, 1)] == [
        MAX_QUESTIONS,
        1,
    ]  # a chunk ends there in any case
    inside = [ask(id=text, question=text) for text in ("One. a?", "One. b?", "Two. c?")]
    for sample in inside:  # the question is a piece of a part
        sample.question = sample.id[5:]
    assert [len(shard) for shard in shards(inside, 1)] == [2, 1]
    left_out = [*samples[:2], None, None, samples[2], None, *samples[3:6], None]
    cut = list(shards(left_out, 2))
    assert cut == [[*samples[:2], None, None, samples[2], None], [*samples[3:6], None]]
    assert (
        list(shards([None, None], 2)) == []
    )  # a run that has nothing left to do needs no workers


@slow
def test_ablation_curves_are_the_local_ones(ray):
    mllm = tiny("qwen3_vl")
    samples = questions(mllm)
    ranking = ch.HeadRanking(np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads)))
    reference = Reference(mllm, samples[:3])
    conditions = {
        "intact": None,
        **curve(ranking, [0.1, 0.3]),
        "mean": Ablation(ranking.top(0.2), "mean", reference=reference),
        "resample": Ablation(ranking.top(0.2), "resample", reference=reference),
        "fast": ch.HybridAttention(ranking.top(0.2), window=16),
    }
    far = ch.evaluate(mllm, samples, conditions, batch_size=1, **ONE)
    assert reference.mllm is mllm
    pd.testing.assert_frame_equal(
        far, ch.evaluate(mllm, samples, conditions, batch_size=1, progress=False)
    )
    samples[-1].answer = None
    with pytest.raises(ch.SampleError, match="answer: is missing"):
        ch.evaluate(mllm, samples[-1:], **RAY)


@dataclass(frozen=True)
class Deadly(os.PathLike):
    """The path of a picture; the first process but the driver that opens it is killed."""

    path: str
    flag: str
    driver: int

    def __fspath__(self):
        if os.getpid() != self.driver and not Path(self.flag).exists():
            Path(self.flag).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.path


@slow
def test_the_table_is_the_local_one_even_if_a_worker_is_killed(ray, tmp_path, monkeypatch):
    mllm = tiny("qwen3_vl")
    # leaves hooks that cannot be pickled by value
    mllm.model(torch.arange(9)[None], output_attentions=True)
    samples = questions(mllm)
    samples[9].messages[0]["content"][0]["image"].save(tmp_path / "picture.png")
    picture, flag = str(tmp_path / "picture.png"), str(tmp_path / "flag")
    deadly = Deadly(picture, flag, driver=os.getpid())
    for sample in samples[9:12]:
        sample.messages[0]["content"][0] = image_part(deadly)
    bad = ask(image_part("nowhere.png"), id="bad")
    seen = appended(monkeypatch)
    far = ch.score(mllm, [*samples, bad], batch_size=1, store=tmp_path / "s", **RAY)
    assert int((tmp_path / "flag").read_text()) != os.getpid()
    # nothing is lost, and nothing is there twice
    assert sorted(seen) == sorted(s.id for s in samples)
    local = ch.score(mllm, [*samples, bad], batch_size=1, progress=False)
    assert far.data.identical(local.data) and far.failures.equals(local.failures)


@slow
def test_a_run_that_was_stopped_goes_on_with_either_engine(ray, tmp_path, monkeypatch):
    mllm = tiny("qwen3_vl")
    samples, store = questions(mllm), tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        appended(patch, stop_after=2)
        ch.score(mllm, samples, batch_size=1, store=store, **ONE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        second = appended(patch, stop_after=2)
        ch.score(mllm, samples, batch_size=1, store=store, resume=True, **ONE)
    third = appended(monkeypatch)
    whole = ch.score(mllm, samples, batch_size=1, store=store, resume=True, progress=False)
    assert len(second) == 6 and len(third) == 6 and not set(second) & set(third)
    local = ch.score(mllm, samples, batch_size=1, progress=False)
    assert {k: v for k, v in whole.data.items() if not v.identical(local.data[k])} == {}
    third.clear()
    again = ch.score(mllm, samples, batch_size=1, store=store, resume=True, **RAY)
    assert not third and again.data.identical(whole.data)


@slow
def test_workers_load_a_checkpoint_by_its_source(ray, tmp_path):
    mllm = ch.load(save(tiny("llama"), tmp_path / "model"))
    samples = [ask("key is 7. ", id="s", evidence=[ch.Span("key is 7.")], question="key?")]
    far = ch.score(mllm, samples, **RAY)
    assert far.data.identical(ch.score(mllm, samples, progress=False).data)
    next(mllm.model.parameters()).data[0] += 1
    with pytest.raises(Exception, match="the weights in memory are not those of"):
        ch.score(mllm, samples, **RAY)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    mllm = tiny("llama")
    for function in (ch.score, ch.evaluate):
        with pytest.raises(ImportError, match=r"pip install 'corehead\[ray\]'"):
            function(mllm, [ask(id="s")], **RAY)


def test_bad_engines_are_named():
    mllm = tiny("llama")
    for function in (ch.score, ch.evaluate):
        with pytest.raises(ValueError, match="engine='rays': take one of 'local', 'ray'"):
            function(mllm, [], engine="rays")
        with pytest.raises(ValueError, match="workers=2 with engine='local'"):
            function(mllm, [], workers=2)
        with pytest.raises(ValueError, match="workers=0"):
            function(mllm, [], engine="ray", workers=0)
        with (
            pytest.raises(ValueError, match=r"inside ablate\(\) there is neither"),
            ch.ablate(mllm, [(0, 1)]),
        ):
            function(mllm, [], **RAY)
