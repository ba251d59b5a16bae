"""The head explorer: its numbers against the package's own, its widgets by hand, and all of it in a browser."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import shape
import xarray as xr
from conftest import ask, image_part, picture, tiny

import corehead as ch
from corehead import patching
from corehead.explorer import KINDS, PHASES, Exploration
from corehead.scoring import QUERIES, group_mass
from corehead.testbed.scenes import counterfactuals

ROOT = Path(__file__).parent.parent
ROW = ["prediction", "correct", "logprob", "margin"]


@pytest.fixture(scope="module")
def testbed() -> ch.MLLM:
    return ch.load(ROOT / "data/testbed/qwen3vl-s")


@pytest.fixture(scope="module")
def pairs() -> list:
    """One counterfactual pair of pictures, one of videos, one of texts."""
    return [counterfactuals(domain, n=1)[0] for domain in ("image", "video", "text")]


def seen(**more) -> ch.Sample:
    """A question on a picture, answered in its upper left corner."""
    evidence = [ch.Region(0, (0, 0, 30, 30))]
    return ask(image_part(picture(64, 96)), **{"evidence": evidence} | more)


def ranked(mllm: ch.MLLM) -> ch.HeadRanking:
    layers, heads = mllm.shape
    return ch.HeadRanking(
        np.random.default_rng(0).permutation(layers * heads).reshape(mllm.shape)
    )


# --- what is computed


@pytest.mark.parametrize("query", QUERIES)
def test_mass_is_that_of_groups_and_ram(mllm, query):
    exploration = Exploration(mllm, seen())

    def groups_of(tagged):
        groups = np.full(len(tagged.ids), KINDS.index("other text"))
        groups[0] = KINDS.index("sink")
        groups[tagged.visual] = KINDS.index("other visual")
        groups[tagged.evidence] = KINDS.index("V*")
        return groups

    [(_, _, wanted)] = group_mass(mllm, [exploration.sample], groups_of, query)
    mass = exploration.mass(query)
    np.testing.assert_allclose(mass, wanted, atol=1e-6)
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-5)
    ram = ch.score(mllm, [exploration.sample], progress=False).mean("ram", query)
    np.testing.assert_allclose(mass[..., 0], ram, atol=1e-6)


@pytest.mark.parametrize("mode", ["zero", "knockout"])
def test_answers_are_those_inside_ablate(testbed, pairs, mode):
    exploration = Exploration(testbed, *pairs[0])
    heads = ch.HeadSet.of([(2, 8), (2, 9)], testbed.shape)
    intact = exploration.answer(ch.HeadSet.of([], testbed.shape), mode)
    assert (
        intact.prediction
        == ch.evaluate(testbed, [pairs[0][0]], progress=False).prediction[0]
    )
    changed = exploration.answer(heads, mode)
    with ch.ablate(testbed, heads, mode, PHASES[mode]):
        wanted = ch.evaluate(testbed, [pairs[0][0]], progress=False).iloc[0]
    assert changed.prediction == wanted.prediction and changed.logprob != intact.logprob
    np.testing.assert_allclose(changed.logprob, wanted.logprob, atol=1e-5)
    np.testing.assert_allclose(changed.probability, np.exp(wanted.logprob), atol=1e-5)


def test_patched_answers_are_those_of_patching(testbed, pairs):
    heads = ch.HeadSet.of([(2, head) for head in range(16)], testbed.shape)
    [row] = patching.patch(
        testbed, pairs[:1], {"": heads}, only_right=False, progress=False
    ).itertuples()
    answer = Exploration(testbed, *pairs[0]).answer(heads, "patch")
    assert answer.prediction == row.prediction == pairs[0][1].answer
    np.testing.assert_allclose(answer.logprob, row.logprob, atol=1e-5)


def test_what_a_sample_lacks_is_not_offered():
    mllm = tiny("qwen3_vl")
    whole = Exploration(mllm, seen(), seen(id="other"))
    assert (whole.modes, whole.queries) == (list(PHASES), list(QUERIES))
    bare = Exploration(mllm, seen(evidence=[], answer=None))
    assert (bare.modes, bare.queries) == (["zero"], ["question", "last"])


def test_another_question_is_asked_of_sample_and_donor(testbed, pairs):
    base, donor = pairs[0]
    asked = Exploration(testbed, base, donor).asking("digit dotted grey", "3")
    assert (
        asked.question
        == asked.sample.question
        == asked.donor.question
        == "digit dotted grey"
    )
    assert asked.sample.answer == "3" and base.answer != "3"
    parts = [
        *base.messages[0]["content"][:-1],
        {"type": "text", "text": "digit dotted grey"},
    ]
    other = replace(
        base, messages=[{"role": "user", "content": parts}], question=None, answer="3"
    )
    wanted = ch.evaluate(testbed, [other], progress=False).iloc[0]
    found = asked.answer(ch.HeadSet.of([], testbed.shape), "zero")
    assert found[ROW].tolist() == wanted[ROW].tolist()
    np.testing.assert_array_equal(asked.tagged.evidence, testbed.tag(base).evidence)


# --- what is shown


def crossed(explorer) -> ch.HeadSet:
    """The heads with a cross on the map."""
    marked = [place for place, button in explorer.buttons.items() if button.description]
    return ch.HeadSet.of(marked, explorer.mllm.shape)


def test_a_head_that_is_clicked_is_shown_and_one_that_is_ticked_changed(testbed, pairs):
    explorer = ch.explore(testbed, pairs, ranked(testbed))
    picture, text, intact = (
        p.value for p in (explorer.picture, explorer.tokens, explorer.answers)
    )
    explorer.buttons[2, 8].click()
    assert explorer.head.value == (2, 8) and not explorer.tick.value
    framed = [
        p for p, button in explorer.buttons.items() if button.layout is explorer.framed
    ]
    assert framed == [(2, 8)]
    assert explorer.picture.value != picture and explorer.tokens.value != text
    ram = explorer.exploration.mass("question")[2, 8, 0]
    assert f"{ram:.2f} V*" in explorer.mass.value
    assert explorer.answers.value == intact
    explorer.tick.value = True
    assert list(explorer.ticked) == list(crossed(explorer)) == [(2, 8)]
    changed = explorer.exploration.answer(explorer.ticked, "zero")
    assert "zero: 1 of 192" in explorer.answers.value
    assert f"{changed.probability:.3f}" in explorer.answers.value
    assert f"P({pairs[0][0].answer})" in explorer.answers.value
    explorer.buttons[0, 0].click()
    assert not explorer.tick.value and list(explorer.ticked) == [(2, 8)]
    explorer.buttons[2, 8].click()
    assert explorer.tick.value
    explorer.tick.value = False
    assert not explorer.ticked and not crossed(explorer)


def test_the_slider_changes_the_top_of_the_map(testbed, pairs):
    maps = {
        "RAM": ranked(testbed),
        "use": xr.DataArray(-ranked(testbed).values, dims=("layer", "head")),
    }
    explorer = ch.explore(testbed, pairs, maps)
    best = tuple(maps["RAM"].order[0])
    assert explorer.head.value == best
    assert explorer.buttons[best].style is explorer.shades[-1]
    explorer.top.value = 7
    assert (
        explorer.ticked
        == crossed(explorer)
        == ch.HeadSet.of(maps["RAM"].order[:7], testbed.shape)
    )
    explorer.scores.value = "use"
    assert explorer.buttons[best].style is explorer.shades[0]
    explorer.top.value = 5
    assert explorer.ticked == ch.HeadSet.of(maps["RAM"].order[:-6:-1], testbed.shape)
    explorer.mode.value = "patch"
    assert "patch: 5 of 192" in explorer.answers.value


def test_another_sample_and_other_rows(testbed, pairs):
    [base, _], [_, donor], _ = pairs
    explorer = ch.explore(testbed, [base, (pairs[1][0], donor), *pairs[2]], ranked(testbed))
    assert explorer.mode.options == ("zero", "knockout")
    text = explorer.tokens.value
    explorer.query.value = "last"
    assert explorer.tokens.value != text
    explorer.sample.value = 1
    assert explorer.question.value == pairs[1][0].question
    assert explorer.expected.value == pairs[1][0].answer
    assert explorer.mode.options == tuple(PHASES) and explorer.query.value == "last"
    assert explorer.picture.layout.display == "block"
    explorer.sample.value = 2  # words alone
    assert explorer.picture.layout.display == "none"


def test_what_is_wrong_is_said_and_nothing_old_is_shown_beside_it(testbed, pairs):
    broken = replace(pairs[0][0], id="broken", evidence=[ch.Pages([3])])
    explorer = ch.explore(testbed, [*pairs, broken], ranked(testbed))
    explorer.question.value = "<|image_pad|>"
    explorer.ask.click()
    assert (
        "the processor refuses them" in explorer.message.value
        and explorer.body.layout.display == "none"
    )
    explorer.question.value = "digit dotted grey"
    explorer.ask.click()
    assert explorer.body.layout.display == "flex"
    assert f"V* is that of “{pairs[0][0].question}”" in explorer.message.value
    explorer.expected.value = ""
    explorer.ask.click()
    assert "answer: is missing. Give the text" in explorer.answers.value
    explorer.sample.value = 3
    assert "image 3 is out of range" in explorer.message.value
    assert explorer.body.layout.display == "none" and explorer.ask.disabled
    explorer.sample.value = 1
    assert explorer.body.layout.display == "flex" and not explorer.ask.disabled


def test_scores_of_every_kind_and_of_none():
    mllm = tiny("qwen3_vl")
    samples = [seen(), seen(id="s1", question="What else?")]
    scores = ch.score(mllm, samples, progress=False)
    for given in (None, scores, scores.rank(), scores.mean().T, {"RAM": scores}):
        explorer = ch.explore(mllm, samples, given)
        [ranking] = explorer.rankings.values()
        np.testing.assert_allclose(ranking.values, scores.mean(), atol=1e-6)
    for given, problem in (
        (
            scores.per_sample(),
            r"'scores': \('sample', 'layer', 'head'\) is not .*mean\('sample'\)",
        ),
        ({"mine": [1, 2]}, "'mine': list is not"),
        (ch.HeadRanking(np.eye(3)), "3 x 3 heads, but this one"),
    ):
        with pytest.raises(ValueError, match=problem):
            ch.explore(mllm, samples, given)
    for none in ([], ["a question"]):
        with pytest.raises(ValueError, match="samples: give at least one, each a Sample"):
            ch.explore(mllm, none, scores)


def test_ipywidgets_are_asked_for_by_the_explorer_alone(monkeypatch):
    package = ROOT / "corehead"
    files = [
        path.name
        for path in package.rglob("*.py")
        if "import ipywidgets" in path.read_text()
    ]
    assert files == ["explorer.py"]
    assert not [
        name for name, targets in shape.imports(package).items() if "explorer" in targets
    ]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "corehead.explorer")
    with pytest.raises(ImportError, match=r"pip install 'corehead\[explore\]'"):
        ch.explore  # noqa: B018


# --- in a browser


@pytest.fixture
def page():
    """A page of a headless Chromium: the system's, or the one that playwright has."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("needs a Chromium: the system's, or `playwright install chromium`")
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(300_000)  # milliseconds; the kernel has much to import
        yield page
        browser.close()


@pytest.fixture
def served(tmp_path):
    """The address at which voila serves the notebook."""
    pytest.importorskip("voila", reason="needs voila: pip install voila")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook = ROOT / "notebooks/explore.ipynb"
    command = [sys.executable, "-m", "voila", notebook, "--no-browser", f"--port={port}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/voila/static/voila.js").close()
            break
        except OSError:
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


@pytest.mark.slow("starts voila, a kernel that loads torch and a model, and a browser")
def test_a_head_is_clicked_and_ticked_in_a_browser(page, served):
    page.goto(served, wait_until="commit")
    head = page.get_by_title("layer 2, head 8", exact=True)
    head.wait_for()
    shown = page.locator("img").last
    before = shown.get_attribute("src")
    head.click()
    page.wait_for_function(
        "before => [...document.images].at(-1).src != before", arg=before
    )
    page.get_by_label("change this head").check()
    changed = page.get_by_role("row").filter(has_text="zero: 1 of 192")
    changed.wait_for()
    intact = page.get_by_role("row").filter(has_text="intact")
    assert head.inner_text() == "✕"
    assert changed.inner_text().split()[-2:] != intact.inner_text().split()[-2:]
