"""Runs: which samples are done, what a stopped run goes on with, what fails, and the same bits again."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ask, image_part, picture, tiny
from PIL import Image

import corehead as ch
from corehead import runs, testbed
from corehead.ablation import curve
from corehead.runs import digest, fingerprint, provenance, run
from corehead.store import Store

CARD = {"model": "toy"}


def questions(mllm, n: int = 18) -> list[ch.Sample]:
    """Three questions on each picture; the pictures are of several sizes, so that batches of several lengths wait."""
    pictures = [image_part(picture(40 + 40 * (i % 3), 60, seed=i)) for i in range(n // 3)]
    return [
        ask(
            pictures[i // 3],
            id=f"s{i}",
            question=f"Where is {i}?",
            evidence=[ch.Region(0, (0, 0, 30, 30))],
        )
        for i in range(n)
    ]


def toys(n: int) -> list[ch.Sample]:
    return [ask(id=f"s{i}", question=f"{i}?", meta={"i": i}) for i in range(n)]


class Toy:
    """Work that counts letters, `size` samples at a time; it notes its batches, with the keys that each lacked."""

    def __init__(self, size: int = 2, bad: tuple[str, ...] = ()):
        self.size, self.bad, self.batches, self.closed = size, bad, [], False

    def __call__(self, mllm, samples, lacking, fail):
        waiting = []
        try:
            for sample in samples:
                if sample is None:
                    continue
                if sample.id in self.bad:
                    fail(ch.SampleError(sample.id, "question", "is bad", "Ask another"))
                    continue
                waiting.append(sample)
                if len(waiting) == self.size:
                    yield self.rows(waiting, lacking)
                    waiting = []
            if waiting:
                yield self.rows(waiting, lacking)
        finally:
            self.closed = True

    def rows(self, samples, lacking):
        keys = lacking(sample.id for sample in samples)
        self.batches.append(([sample.id for sample in samples], keys))
        return [
            {"sample": s.id, "key": key, "value": f"{s.id}/{key}"}
            for s in samples
            for key in keys
        ]


def go(samples, work=None, **options) -> runs.Finished:
    return run(
        None, samples, work or Toy(), **{"provenance": CARD, "progress": False} | options
    )


def until(samples, stop: int):
    """The samples up to one where the user gives up."""
    for i, sample in enumerate(samples):
        if i == stop:
            raise KeyboardInterrupt
        yield sample


@pytest.fixture
def appended(monkeypatch) -> list[list[str]]:
    """Names in what is appended to stores from here on."""
    seen, original = [], Store.append

    def append(self, rows):
        original(self, rows)
        seen.append([row["sample"] for row in rows])

    monkeypatch.setattr(Store, "append", append)
    return seen


@pytest.fixture
def bars(monkeypatch) -> list:
    """The progress bars from here on."""
    seen, original = [], runs.tqdm

    def bar(**options):
        seen.append(original(**options | {"disable": False, "file": io.StringIO()}))
        return seen[-1]

    monkeypatch.setattr(runs, "tqdm", bar)
    return seen


# --- one run


def test_a_run_brings_a_row_for_every_sample_and_key(bars):
    samples = toys(5)
    finished = go((s for s in samples), keys=["a", "b"])
    assert list(finished.samples) == [s.id for s in samples] and not finished.failures
    assert {place: row["value"] for place, row in finished.rows.items()} == {
        (s.id, key): f"{s.id}/{key}" for s in samples for key in "ab"
    }
    assert all(
        row["digest"] == digest(samples[int(name[1:])])
        for (name, _), row in finished.rows.items()
    )
    assert [s.meta for s in finished.samples.values()] == [s.meta for s in samples]
    assert not any(s.messages for s in finished.samples.values()) and all(
        s.messages for s in samples
    )
    go(samples, keys=["a", "b"])
    assert [(bar.total, bar.n) for bar in bars] == [(None, 10), (10, 10)]


def test_every_batch_is_kept_as_soon_as_it_is_finished(tmp_path, appended):
    seen = []

    def drawn():
        for sample in toys(6):
            seen.append((sample.id, sum(map(len, appended))))
            yield sample

    go(drawn(), store=tmp_path)
    assert seen == [("s0", 0), ("s1", 0), ("s2", 2), ("s3", 2), ("s4", 4), ("s5", 4)]


def test_samples_that_are_tagged_already_have_their_index_for_a_name():
    mllm = tiny("llama")
    tagged = [mllm.tag(sample) for sample in toys(2)]
    tagged[1].sample = None
    seen = []

    def work(mllm, samples, lacking, fail):
        for item in samples:
            seen.append(item)
            yield [{"sample": item.sample.id, "key": ""}]

    finished = run(mllm, tagged, work, provenance=CARD, progress=False)
    assert list(finished.rows) == [("s0", ""), ("1", "")]
    assert (
        all(isinstance(item, ch.TaggedSample) for item in seen) and tagged[1].sample is None
    )
    assert finished.digests["s0"] == finished.digests["1"] or not np.array_equal(
        tagged[0].ids, tagged[1].ids
    )


# --- runs that go on


def test_a_run_that_was_stopped_goes_on_with_what_is_left(tmp_path, appended, bars):
    samples, whole = toys(9), Toy(2)
    expected = go(samples, whole)
    with pytest.raises(KeyboardInterrupt):
        go(until(samples, 5), Toy(2), store=tmp_path)
    with pytest.raises(ValueError, match="resume=True"):
        go(samples, store=tmp_path)
    left = Toy(2)
    appended.clear()
    again = go(samples, left, store=tmp_path, resume=True)
    assert again.rows == expected.rows and list(again.samples) == list(expected.samples)
    assert left.batches == whole.batches[2:] and appended == [
        names for names, _ in left.batches
    ]
    third = Toy()
    assert (
        go(samples, third, store=tmp_path, resume=True).rows == expected.rows
        and not third.batches
    )
    assert [bar.n for bar in bars] == [9, 4, 9, 9]


def test_what_is_finished_leaves_a_gap(tmp_path):
    samples, seen = toys(6), []
    go([samples[1], samples[4]], store=tmp_path)

    def work(mllm, given, lacking, fail):
        seen.extend(given)
        yield []

    go(samples, work, store=tmp_path, resume=True)
    assert seen == [samples[0], None, samples[2], samples[3], None, samples[5]]


def test_a_store_takes_more_samples_and_more_keys(tmp_path, appended, bars):
    samples, work = toys(4), Toy(2)
    go(samples[:3], work, keys=["a"], store=tmp_path)
    work.batches, more = [], Toy(2)
    finished = go(samples, more, keys=["a", "b"], store=tmp_path, resume=True)
    assert more.batches == [(["s0", "s1"], ["b"]), (["s2", "s3"], ["a", "b"])]
    assert [row["value"] for row in finished.rows.values()] == [
        *(f"s{i}/a" for i in range(3)),
        *("s0/b", "s1/b", "s2/b", "s3/a", "s3/b"),
    ]
    assert appended[-1] == ["s2", "s3", "s3"]  # what s2 had was not kept twice
    with Store(tmp_path, CARD, resume=True) as store:
        assert len(store.rows) == 8
    assert [(bar.total, bar.n) for bar in bars] == [(3, 3), (8, 8)]


def test_another_content_under_a_known_name_is_refused(tmp_path):
    samples = toys(3)
    go(samples, store=tmp_path)
    samples[1].answer = "8"
    with pytest.raises(
        ValueError, match="sample 's1' is not the one in the store: it has another content"
    ):
        go(samples, store=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"another configuration \(model differ\)"):
        go(samples, store=tmp_path, resume=True, provenance={"model": "other"})


# --- what fails


def test_what_fails_is_recorded_and_the_run_goes_on(tmp_path, bars):
    samples = toys(6)
    options = dict(keys=["a", "b"], store=tmp_path, on_error="record")
    finished = go(samples, Toy(2, bad=("s1", "s5")), **options)
    assert finished.failures == {
        name: f"sample {name!r}, question: is bad. Ask another." for name in ("s1", "s5")
    }
    assert {name for name, _ in finished.rows} == {"s0", "s2", "s3", "s4"} and len(
        finished.samples
    ) == 6
    again = Toy(2, bad=("s5",))
    finished = go(samples, again, resume=True, **options)  # what failed is tried again
    assert list(finished.failures) == ["s5"] and again.batches == [(["s1"], ["a", "b"])]
    assert [(bar.total, bar.n) for bar in bars] == [(12, 12), (12, 12)]


def test_an_error_stops_the_run_and_what_was_finished_is_kept(tmp_path):
    samples, work = toys(8), Toy(2, bad=("s5",))
    with pytest.raises(
        ch.SampleError, match=r"sample 's5', question: is bad\. Ask another"
    ):
        go(samples, work, store=tmp_path)
    assert work.closed and [names for names, _ in work.batches] == [
        ["s0", "s1"],
        ["s2", "s3"],
    ]
    with Store(tmp_path, CARD, resume=True) as store:
        assert [row["sample"] for row in store.rows] == ["s0", "s1", "s2", "s3"]


def test_a_picture_that_is_cut_off_is_one_sample_that_fails():
    mllm, file = tiny("qwen3_vl"), io.BytesIO()
    picture(60, 60).save(file, "PNG")
    cut_off = Image.open(io.BytesIO(file.getvalue()[:3000]))
    samples = [ask(image_part(cut_off), id="bad"), *questions(mllm, 3)]
    scores = ch.score(mllm, samples, progress=False)
    assert list(scores.data.sample.values) == ["s0", "s1", "s2"]
    assert (
        list(scores.failures["sample"]) == ["bad"]
        and "truncated" in scores.failures.reason[0]
    )


def test_a_store_that_fails_ends_the_work(tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "append", full)
    work = Toy()
    with pytest.raises(OSError, match="No space left") as error:
        go(toys(9), work, store=tmp_path)
    assert work.closed and len(work.batches) == 1 and error.value.errno == 28


def test_bad_options_are_named(tmp_path):
    for options, problem in (
        (dict(on_error="ignore"), "on_error='ignore': take 'record' or 'raise'"),
        (dict(batch_size=0), "batch_size=0: take at least 1"),
        (dict(engine="rays"), "engine='rays': take one of 'local', 'ray'"),
        (
            dict(workers=2),
            "workers=2 with engine='local': take at least 1, with engine='ray'",
        ),
        (dict(engine="ray", workers=0), "workers=0 with engine='ray': take at least 1"),
        (
            dict(edited=True, store=tmp_path),
            r"inside ablate\(\) there is neither a store nor",
        ),
        (
            dict(edited=True, engine="ray"),
            r"inside ablate\(\) there is neither a store nor engine='ray'",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            go(toys(1), **options)
    assert go(toys(1), edited=True).rows and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="two samples have the id 's0': ids must differ"):
        go(toys(2) + toys(1))
    assert go([]).rows == {}


# --- digests and provenance


def test_digests_tell_contents_apart(tmp_path):
    image = picture(9, 9)
    values = [1, 1.0, "1", True, None, [1], [[1]], [1, 2], {"a": 1}, {"b": 1}, {"a": [1]}]
    values += [
        np.zeros(4),
        np.zeros((2, 2)),
        np.zeros(4, np.float32),
        np.arange(4.0),
        image,
        image.convert("L"),
    ]
    values += [
        picture(9, 9, seed=1),
        ask(),
        ask(image_part(image)),
        ask(answer="8"),
        ask(evidence=[ch.Pages([0])]),
    ]
    values += [
        ask(evidence=[ch.Region(0, (0, 0, 1, 1))]),
        ask(evidence=[ch.Region(0, (0, 0, 1, 2))]),
        ask(id="s1"),
    ]
    found = [digest(value) for value in values]
    assert len(set(found)) == len(values) and all(len(d) == 16 for d in found)
    assert digest({"b": [image.copy()], "a": (1, 2)}) == digest({"a": [1, 2], "b": [image]})
    assert digest(ask(image_part(image))) == digest(
        ask(image_part(image.copy()), meta={"not": "content"})
    )
    # what a model sees: the colours of a palette, and what is in a file
    coloured = image.quantize(8)
    other = coloured.copy()
    other.putpalette(coloured.getpalette()[::-1])
    assert digest(coloured) != digest(other)
    path = tmp_path / "page.png"
    image.save(path)
    before = digest(ask(image_part(str(path))))
    picture(9, 9, seed=1).save(path)
    assert digest(ask(image_part(str(path)))) != before
    mllm = tiny("qwen3_vl")
    tagged = [mllm.tag(ask(image_part(picture(48, 48, seed=seed)))) for seed in (0, 1, 0)]
    first, second, again = map(digest, tagged)
    assert first == again != second
    large = np.zeros(10**6)
    large[5 * 10**5] = 1e-9
    assert digest(large) != digest(np.zeros(10**6))


def test_provenance_is_the_model_and_not_the_place(tmp_path):
    mllm = tiny("qwen3_vl")
    a, b = (
        provenance(ch.load(testbed.save(mllm, tmp_path / name)), n=1) for name in ("a", "b")
    )
    assert {k for k in a if a[k] != b[k]} == {"model"} and a["options"] == {"n": 1}
    assert str(tmp_path) not in json.dumps(a | {"model": ""})
    # rows of an older corehead are not taken for this one's
    assert a["corehead"] == ch.__version__
    changed = testbed.tiny("qwen3_vl")
    before = fingerprint(changed.model)
    assert before == fingerprint(mllm.model)
    next(changed.model.parameters()).data.flatten()[0] += 1
    assert fingerprint(changed.model) != before


# --- the same bits


def test_two_runs_give_the_same_bits():
    tables = []
    for _ in range(2):
        mllm = testbed.tiny("qwen3_vl")
        samples = questions(mllm)
        scores = ch.score(mllm, samples, batch_size=2, progress=False)
        ranking = scores.rank("ram")
        conditions = (
            {"intact": None}
            | curve(ranking, [0.2], "random", draws=range(2))
            | curve(ranking, [0.2])
        )
        tables.append(
            (
                scores,
                ranking,
                ch.evaluate(mllm, samples, conditions, batch_size=2, progress=False),
            )
        )
    (scores, ranking, answers), (scores2, ranking2, answers2) = tables
    assert scores.data.identical(scores2.data)
    assert np.array_equal(ranking.order, ranking2.order)
    pd.testing.assert_frame_equal(answers, answers2, check_exact=True)


def killed_somewhere(folder: Path, kills: int) -> None:
    """In a process of its own: fork runs, kill them at random points until `kills` died, and compare what they leave.

    A point is the drawing of a sample, the begin and end of an append, and every few steps of SQLite in between.
    """
    mllm = testbed.tiny("qwen3_vl")
    samples, draw, append = questions(mllm), random.Random(0), Store.append

    def attempt(store: Path, stop: int | None, out: Path) -> bool:
        """Whether a run in a child came to its end before it was killed at point `stop`."""
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0
        passed, status = 0, 1

        def point() -> int:
            nonlocal passed
            passed += 1
            if passed == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0

        def append_between_points(self, rows):
            point()
            self._database.set_progress_handler(point, 5)
            append(self, rows)
            point()

        def drawn():
            for sample in samples:
                point()
                yield sample

        try:
            Store.append = append_between_points
            data = ch.score(
                mllm, drawn(), batch_size=2, store=store, resume=True, progress=False
            ).data
            out.write_bytes(pickle.dumps(data))
            status = 0
        finally:
            os._exit(status)

    settings = provenance(mllm, null=True)

    def finished(store: Path) -> list[str]:
        with Store(store, settings, resume=True) as keep:
            return [row["sample"] for row in keep.rows]

    whole = folder / "whole.pickle"
    assert attempt(folder / "whole", None, whole)
    died = started = 0
    while died < kills:
        store, out, kept = folder / f"run{started}", folder / f"run{started}.pickle", []
        started += 1
        while not attempt(store, draw.randrange(1, 40), out):
            died += 1
            now = finished(store)
            assert now[: len(kept)] == kept and len(set(now)) == len(now)
            kept = now
        assert sorted(finished(store)) == sorted(sample.id for sample in samples)
        assert pickle.loads(out.read_bytes()).identical(pickle.loads(whole.read_bytes()))
    print(died, started)


@pytest.mark.slow(
    "twenty processes are killed, and each imports torch and transformers anew"
)
def test_kill_minus_nine_twenty_times(tmp_path):
    """Nothing is lost, nothing is there twice, and the table has the bits of a run that nobody stopped."""
    code = "import sys; from pathlib import Path; import test_runs as t; t.killed_somewhere(Path(sys.argv[1]), 20)"
    path = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    died, started = map(int, done.stdout.split())
    assert died >= 20 and started > 1
