"""The named task sets ask what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from corehead import tasks
from corehead.runs import digest
from corehead.tasks import samples, task_set

SETS = yaml.safe_load(Path(tasks.__file__).with_name("tasks.yaml").read_text())


@pytest.mark.parametrize("name", SETS)
def test_a_set_names_only_its_own_tasks(name):
    chosen = task_set(name)
    assert not set(chosen.retrieval) & set(chosen.others)
    assert set(chosen.groups) == set(chosen.others) and set(chosen.groups.values()) <= {
        "context",
        "text only",
    }
    assert chosen.groups[chosen.plain] == "text only"
    named = [*chosen.sizes, *chosen.questions, *chosen.drawn, *chosen.long]
    assert set(named) <= set(chosen.layouts) and {
        task for task, _ in chosen.evidence.values()
    } <= set(chosen.retrieval)
    assert 0 <= chosen.chance_level < chosen.min_accuracy <= 1
    assert (
        sorted(chosen.shares) == chosen.shares
        and 0 < chosen.shares[0] <= chosen.shares[-1] <= 0.5
    )


def test_a_set_can_be_changed_and_an_unknown_one_is_named():
    changed = task_set("benchmarks", retrieval={"mmdocir": {"max_pages": 3}}, new_tokens=0)
    assert changed.retrieval == {"mmdocir": {"max_pages": 3}} and changed.new_tokens == 0
    assert changed.others == task_set("benchmarks").others
    with pytest.raises(
        ValueError, match="task set 'digit': take one of 'digits', 'english', 'benchmarks'"
    ):
        task_set("digit")
    with pytest.raises(TypeError, match="retreival"):
        task_set("digits", retreival={})


def test_samples_of_a_set_follow_each_other_task_by_task():
    chosen = task_set("digits")
    asked = chosen.samples("validation", 8, seed=1, questions=4)
    assert [s.meta["domain"] for s in asked] == [
        task for task in chosen.retrieval for _ in range(8)
    ]
    alone = samples("document", "validation", 8, 1, questions=4, pages=8)
    assert [s.id for s in asked[8:16]] == [s.id for s in alone]
    # no more questions on a context than the task allows
    others = chosen.samples("test", 8, tasks=["majority", "count"], questions=8)
    pictures = [id(s.messages[0]["content"][0]["image"]) for s in others]
    assert len(set(pictures[:8])) == 8 and len(set(pictures[8:])) == 2
    # none left over: 6 do not go into 16, and 4 do
    even = chosen.samples("test", 16, tasks=["image"], questions=6)
    assert len({id(s.messages[0]["content"][0]["image"]) for s in even}) == 4
    mapped = chosen.samples("test", 2, tasks={"document": {"pages": 2}})
    assert {len(s.messages[0]["content"]) for s in mapped} == {
        len(samples("document", n=1, pages=2)[0].messages[0]["content"])
    }


def test_contexts_grow_where_a_set_says_how():
    chosen = task_set("digits")
    assert chosen.growing("video") == {4: {"frames": 4}, 6: {"frames": 6}, 8: {"frames": 8}}
    assert chosen.growing("text_only") == {0: {}}


def test_pairs_are_those_of_tasks_that_have_them():
    """Tasks of the testbed and in plain English can be drawn with another answer; copying and benchmarks cannot."""
    digits = task_set("digits")
    pairs = digits.pairs("validation", 2, seed=3)
    assert len(pairs) == 2 * len(digits.retrieval)
    assert [base.meta["domain"] for base, _ in pairs[::2]] == list(digits.retrieval)
    assert all(base.foil == donor.answer for base, donor in pairs)
    pairs = task_set("english").pairs("validation", 2)
    assert [base.meta["domain"] for base, _ in pairs[::2]] == ["traits", "codes"]
    assert task_set("benchmarks").pairs("validation", 2) == []
    with pytest.raises(ValueError, match="no task 'documnt'"):
        tasks.counterfactuals("documnt")


DRAWN = ("digits", "english", "zeroshot")  # those that need no download


def digests() -> list[str]:
    """Of samples and pairs of every task that is drawn by code."""
    drawn = []
    for name in DRAWN:
        chosen = task_set(name)
        drawn.append(chosen.samples("test", 2, tasks=chosen.layouts, questions=2))
        drawn.append(chosen.pairs("validation", 1))
    return [digest(samples) for samples in drawn]


@pytest.mark.slow("another process imports torch and draws everything once more")
def test_samples_are_the_same_in_every_process():
    """Strings hash otherwise in each: nothing drawn may follow the order of a set."""
    environment = os.environ | {
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", "import test_tasks; print(*test_tasks.digests())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == digests(), done.stderr
