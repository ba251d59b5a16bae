"""Look-ups in plain English: what is told, what is asked, and what is split."""

import numpy as np
import pytest

from corehead.tasks import counterfactuals, samples
from corehead.testbed import prose
from corehead.testbed.scenes import SPLITS

each_task = pytest.mark.parametrize("task", prose.TASKS)


def texts(sample):
    return [part["text"] for part in sample.messages[0]["content"]]


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_what_the_asked_sentence_says(task, split):
    for sample in samples(task, split, 400, questions=2, sentences=12):
        context, question = texts(sample)
        told, again = (part.splitlines() for part in context.split("\n\n"))
        assert len(told) == 12 and len(again) == 3 and set(again) < set(told)
        # the question quotes one sentence alone, and the model goes on with its end
        [line] = [line for line in told if line.startswith(question)]
        assert line == f"{question}{sample.answer}." and line not in again
        assert told.index(line) == sample.meta["place"]
        # a span must stand in the prompt once
        [span] = sample.evidence
        assert (context + question).count(span.text) == 1 and span.text == sample.answer


def test_it_takes_the_person_to_know_which_sentence_is_meant():
    for sample in samples("traits", n=50, sentences=8):
        told = texts(sample)[0].split("\n\n")[0].splitlines()
        kinds = [line.split(" ", 1)[1].rsplit(" ", 1)[0] for line in told]
        assert all(kinds.count(kind) == 2 for kind in kinds)
        assert len({line.split()[0] for line in told}) == 8


@each_task
def test_nothing_of_one_split_is_in_another(task):
    for kind in prose.WORDS[task]:
        words = [set(prose.values(task, split)[kind]) for split in SPLITS]
        assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]
    names = [set(prose.people(split)) for split in SPLITS]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    # at least 200 facts are asked in 300 questions
    asked = samples(task, "test", 300, questions=3)
    assert len({(s.question, s.answer) for s in asked}) >= 200


@each_task
def test_counterfactuals_differ_in_one_value(task):
    for base, donor in counterfactuals(task, "validation", 100):
        assert base.answer.strip()[0] != donor.answer.strip()[0]
        (a, question), (b, other) = texts(base), texts(donor)
        assert question == other and base.foil == donor.answer and donor.foil == base.answer
        changed = [(x, y) for x, y in zip(a.splitlines(), b.splitlines()) if x != y]
        assert changed == [(f"{question}{base.answer}.", f"{question}{donor.answer}.")]
        assert b.count(donor.answer) == 1


def test_depth_and_seed():
    depths = {0.0: 0, 0.5: 4, 1.0: 7}
    for depth, place in depths.items():
        assert {s.meta["place"] for s in samples("traits", n=20, depth=depth)} == {place}
    same, again, other = (samples("codes", n=5, seed=seed) for seed in (0, 0, 1))
    assert same == again and [s.answer for s in same] != [s.answer for s in other]


@pytest.mark.parametrize(
    "wrong,words",
    [
        (dict(task="cars"), "task='cars'"),
        (dict(split="dev"), "split='dev'"),
        (dict(sentences=3), "sentences=3"),
        (dict(sentences=500), "sentences=500"),
        (dict(questions=3), "n=10, questions=3"),
        (dict(questions=10), "questions=10"),
        (dict(depth=2.0), "depth=2.0"),
        (dict(depth=0.5, questions=2), "depth=0.5, questions=2"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        prose.samples(**dict(task="traits", n=10) | wrong)


def test_places_are_drawn_evenly():
    places = [s.meta["place"] for s in samples("traits", n=800)]
    counts = np.bincount(places, minlength=8)
    # eight places, 800 draws: five standard deviations are 47
    assert abs(counts - 100).max() < 47
