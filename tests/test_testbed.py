"""Scenes, the fast path of training, the shipped models and the survey."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import corehead as ch
from corehead.runs import digest
from corehead.testbed import counterfactuals, samples, survey, training
from corehead.testbed.models import untrained
from corehead.testbed.scenes import (
    BLANK,
    COLOURS,
    MARK_GLYPH,
    SPLITS,
    data_hash,
    digits,
    draw,
    to_samples,
    with_other_word,
)
from corehead.testbed.training import (
    CURRICULA,
    Recipe,
    answer_logits,
    batch_of,
    context_of,
    main,
    train,
)

FOLDER = Path(__file__).parent.parent / "data/testbed/qwen3vl-s"
LONG = FOLDER.with_name("qwen3vl-s-long")
LEVELS, TILED_LEVELS, LONG_LEVELS = (
    {name: domain["levels"] for name, domain in CURRICULA[curriculum]["domains"].items()}
    for curriculum in ("short", "tiled", "long")
)
SMALL = dict(layers=2, heads=4, kv_heads=2, hidden=32, intermediate=48, head_dim=8)


@pytest.fixture(scope="module")
def shipped() -> ch.MLLM:
    return ch.load(FOLDER)


@pytest.mark.parametrize("domain", ["image", "document", "video", "text"])
def test_another_word_of_the_question_is_all_that_changes(domain):
    for sample in samples(domain, n=5):
        words = sample.question.split()
        for place in range(1, len(words)):
            other = with_other_word(sample, place, np.random.default_rng(0))
            changed = [a != b for a, b in zip(words, other.question.split(), strict=True)]
            assert changed == [i == place for i in range(len(words))]
            *context, asked = other.messages[0]["content"]
            assert asked["text"] == other.question
            assert context == sample.messages[0]["content"][:-1]
            assert other.evidence == sample.evidence and other.id != sample.id


def every_layout():
    for family in ("qwen3_vl", "internvl", "llava_onevision"):
        for domain, levels in (LEVELS if family == "qwen3_vl" else TILED_LEVELS).items():
            yield from ((family, domain, layout) for layout in (levels[0], levels[-1]))
    yield from (
        ("qwen3_vl", domain, LONG_LEVELS[domain][0]) for domain in ("document", "video")
    )
    yield from (
        ("qwen3_vl", domain, levels[0] | {"own_words": True})
        for domain, levels in LEVELS.items()
    )


@pytest.mark.parametrize("family,domain,layout", [*every_layout()])
def test_fast_path_gives_the_same_ids_pixels_and_positions(family, domain, layout):
    """A training sequence is, question by question, what the real processor makes of the samples."""
    scenes = draw(domain, np.random.default_rng(3), 2, questions=3, **layout)
    mllm = untrained(family, **SMALL, own_words="own_words" in layout)
    inputs, ask = batch_of(family, scenes, layout)
    ids, mask = inputs["input_ids"], inputs["attention_mask"][0, 0]
    planes = inputs["position_ids"].reshape(-1, *ids.shape)
    length = scenes.question.shape[2] + 1
    before = ids.shape[1] - 3 * length
    assert ask.tolist() == [before + q * length + length - 2 for q in range(3)]
    for i, sample in enumerate(to_samples(scenes, "x")):
        b, q = divmod(i, 3)
        tagged = mllm.tag(sample)
        own = [*range(before), *range(before + q * length, before + (q + 1) * length)]
        assert (
            np.array_equal(ids[b, own], tagged.ids)
            and mllm.tokenizer.unk_token_id not in tagged.ids
        )
        positions = mllm.family.positions(mllm.model, tagged.inputs).reshape(-1, len(own))
        assert torch.equal(planes[:, b, own], positions.expand(len(planes), -1))
        assert torch.equal(
            mask[own][:, own], torch.ones(len(own), len(own), dtype=torch.bool).tril()
        )
        outside = np.setdiff1d(np.arange(ids.shape[1]), own)
        assert not mask[own[before:]][:, outside].any()
        for name in ("pixel_values", "pixel_values_videos"):
            assert (name in inputs) == (name in tagged.inputs)
            if name in inputs:
                mine = inputs[name].reshape(2, -1)[b]
                torch.testing.assert_close(
                    mine, tagged.inputs[name].flatten(), atol=1e-6, rtol=0
                )


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "llava_onevision"])
@pytest.mark.parametrize("domain", ["image", "document", "video", "text"])
def test_training_logits_are_the_model_s(family, domain):
    layout = (LEVELS if family == "qwen3_vl" else TILED_LEVELS)[domain][-1]
    scenes = draw(domain, np.random.default_rng(5), 2, questions=2, **layout)
    mllm = untrained(family, **SMALL)
    mllm.model.eval()
    with torch.no_grad():
        fast = answer_logits(mllm.model, *batch_of(family, scenes, layout))
        for i, sample in enumerate(to_samples(scenes, "x")):
            tagged = mllm.tag(sample)
            logits = mllm.model(**tagged.inputs).logits[0, tagged.last :]
            torch.testing.assert_close(fast[i // 2, i % 2], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
@pytest.mark.parametrize("domain", ["image", "document", "video"])
def test_tokens_of_tiles_see_one_cell_each(family, domain):
    """Every cell of a tiled layout has tokens of its own, and they are what changes when the cell does."""
    layout = TILED_LEVELS[domain][-1]
    _, _, cells = context_of(family, domain, **layout)
    shape = draw(domain, np.random.default_rng(0), 1, **layout).cells.shape[1:]
    assert set(cells.tolist()) - {-1} == set(range(np.prod(shape)))


def test_pictures_may_be_larger_than_their_cells():
    scenes = draw("image", np.random.default_rng(0), 50, questions=4, cells=4, side=3)
    framed = scenes.cells["key"] != BLANK["key"]
    assert framed.shape == (50, 1, 3, 3) and (framed.sum((1, 2, 3)) == 4).all()
    assert ((scenes.cells["glyph"] < MARK_GLYPH) == framed).all() and len(
        np.unique(framed[:, 0], axis=0)
    ) > 20
    for b in range(50):
        for q in range(4):
            [glyph] = scenes.cells["glyph"][b][scenes.evidence[b, q]]
            assert digits()[1][glyph] == scenes.answer[b, q] - 8
    scenes = draw("document", np.random.default_rng(0), 2, cells=4, side=3)
    framed = scenes.cells["key"] != BLANK["key"]
    assert framed.shape == (2, 8, 3, 3) and (framed.sum((2, 3)) == 4).all()
    with pytest.raises(ValueError, match="cells=9, side=2"):
        samples("image", cells=9, side=2)
    with pytest.raises(ValueError, match="cells=7, side=3"):
        samples("document", cells=7, side=3)


def test_items_are_what_answers_are_read_from():
    for domain in ("image", "document", "video"):
        asked = [
            s for seed in (0, 1) for s in samples(domain, n=60, questions=3, seed=seed)
        ]
        glyphs = [int(s.meta["item"].removeprefix("glyph ")) for s in asked]
        assert [str(digits()[1][glyph]) for glyph in glyphs] == [s.answer for s in asked]
        # pictures of any seed share them
        assert set(glyphs[:60]) & set(glyphs[60:]) and len(set(glyphs)) < 120
    for sample in samples("text", n=20, questions=4):
        assert sample.meta["item"] == sample.evidence[0].text
    for sample in samples("text_only", n=20):
        assert sample.meta["item"] == sample.question
    for domain in ("majority", "count"):
        assert all(s.meta["item"] == s.id for s in samples(domain, n=20, questions=2))


def test_facts_are_one_table_and_no_fact_is_chosen_and_reported():
    of_split = {}
    for split in ("train", "validation", "test"):
        found = samples("memory", split, n=4000)
        table = {s.question: s.answer for s in found}
        assert all(table[s.question] == s.answer and not s.evidence for s in found)
        assert all(s.meta["item"] == s.question for s in found)
        of_split[split] = table
    # one table: training teaches what the others ask
    assert of_split["validation"].items() <= of_split["train"].items()
    assert not of_split["validation"].keys() & of_split["test"].keys()
    assert min(len(table) for table in of_split.values()) >= 200
    # the words do not tell the digit: no word has one that stands out
    by_word = {}
    for question, answer in of_split["train"].items():
        for word in question.split()[1:]:
            by_word.setdefault(word, []).append(answer)
    assert max(max(map(a.count, a)) / len(a) for a in by_word.values()) < 0.35


def test_splits_share_no_handwriting():
    used = {split: set(range(*bounds)) for split, bounds in SPLITS.items()}
    assert (
        not used["train"] & used["validation"]
        and not (used["train"] | used["validation"]) & used["test"]
    )
    assert set.union(*used.values()) == set(range(1797))
    for split, bounds in SPLITS.items():
        for domain in ("image", "document", "video", "majority"):
            glyph = draw(domain, np.random.default_rng(0), 20, split=split).cells["glyph"]
            mine = glyph[glyph < MARK_GLYPH]
            assert mine.min() >= bounds[0] and mine.max() < bounds[1]


def test_in_own_words_domains_share_no_token_and_scenes_are_the_same():
    said = {}
    for domain, levels in LEVELS.items():
        plain, own = (
            draw(domain, np.random.default_rng(4), 2, own_words=mine, **levels[0])
            for mine in (False, True)
        )
        assert plain.cells is None or np.array_equal(plain.cells, own.cells)
        assert len(np.unique(own.question - plain.question)) == 1
        words = [own.question, own.answer, *([] if own.words is None else [own.words])]
        said[domain] = set(np.concatenate([ids.ravel() for ids in words]))
    assert len(set.union(*said.values())) == sum(map(len, said.values()))
    for base, other in counterfactuals("text", n=3, own_words=True):
        assert base.question == other.question and base.answer != base.foil == other.answer


@pytest.mark.parametrize("domain", ["image", "document", "video", "text"])
def test_the_answer_stands_in_the_evidence_alone(domain):
    scenes = draw(domain, np.random.default_rng(1), 50, split="test", questions=4)
    labels = digits()[1]
    for b in range(50):
        for q in range(4):
            if domain == "text":
                words = scenes.words[b][scenes.evidence[b, q]]
                assert (
                    list(words[:2]) == list(scenes.question[b, q, 1:])
                    and words[2] == scenes.answer[b, q]
                )
                continue
            hit, key = scenes.evidence[b, q], scenes.cells["key"][b]
            assert (
                labels[scenes.cells["glyph"][b][hit]] == scenes.answer[b, q] - 8
            ).all()  # "0" is word 8
            assert len(set(key[hit])) == 1
            same = key == key[hit][0]
            if domain == "document":  # the same key on every other page too
                assert same.sum() == 8 and hit.sum() == 1
            else:
                assert np.array_equal(same, hit)


@pytest.mark.parametrize("domain", ["document", "video"])
def test_distractors_hold_no_key(domain):
    layout = LONG_LEVELS[domain][-1]
    scenes = draw(domain, np.random.default_rng(1), 4, split="test", questions=6, **layout)
    glyph, pages = scenes.cells["glyph"], scenes.cells.shape[1]
    assert (
        pages == layout["distractors"] + 8
        and scenes.cells[0].size // (2 if domain == "video" else 1) >= 1024
    )
    framed = (scenes.cells["key"] != BLANK["key"]).any((2, 3))  # (B, P)
    bare = ~framed & (glyph < MARK_GLYPH).any((2, 3))
    for b in range(4):
        for q in range(6):
            hit = scenes.evidence[b, q]
            assert (digits()[1][glyph[b][hit]] == scenes.answer[b, q] - 8).all() and framed[
                b
            ][hit.any((1, 2))].all()
    if domain == "document":
        marked = ((glyph >= MARK_GLYPH) & (glyph < BLANK["glyph"])).any((2, 3))
        assert (framed.sum(1) == 8).all() and marked.sum() == 32
        assert (np.diff(framed.argmax(1)) != 0).any()  # not always at the same place
        assert (scenes.evidence.any((3, 4)).sum(2) == 1).all()  # on one page
    clutter = glyph[bare]
    assert 0.3 < (clutter < MARK_GLYPH).mean() < 0.7 and bare.mean() > 0.7
    first, last = SPLITS["test"]
    assert (
        (clutter[clutter < MARK_GLYPH] >= first) & (clutter[clutter < MARK_GLYPH] < last)
    ).all()


@pytest.mark.parametrize("side", [4, 6])
def test_context_tasks_are_right(side):
    scenes = draw("majority", np.random.default_rng(2), 200, side=side)
    framed = scenes.cells["key"] != BLANK["key"]
    assert (framed.sum((1, 2, 3)) == 16).all() and (
        scenes.evidence == framed[:, None]
    ).all()
    colour = scenes.cells["key"][framed].reshape(200, -1) % 8
    counts = (colour[..., None] == np.arange(8)).sum(1)
    best = np.sort(counts)[:, ::-1]
    assert (best[:, 0] > best[:, 1]).all()
    names = np.array([s.answer for s in to_samples(scenes, "x")])
    assert (names == np.array(list(COLOURS))[counts.argmax(1)]).all()
    scenes = draw("count", np.random.default_rng(2), 200, questions=2, side=side)
    framed = scenes.cells["key"] != BLANK["key"]
    for i, sample in enumerate(to_samples(scenes, "x")):
        wanted = list(COLOURS).index(sample.question.split()[1])
        shown = scenes.cells["key"][i // 2][framed[i // 2]]
        assert int(sample.answer) == (shown % 8 == wanted).sum() or shown.size > 9


@pytest.mark.parametrize("domain", ["majority", "count"])
def test_the_evidence_of_a_context_task_is_every_cell_that_is_not_blank(shipped, domain):
    [whole] = samples(domain, n=1, cells=16)
    assert whole.evidence == [ch.Region(0, (0, 0, 64, 64))]
    for sample in samples(domain, n=4, questions=2, cells=16, side=6):
        tagged = shipped.tag(sample)
        picture = np.asarray(sample.messages[0]["content"][0]["image"])
        drawn = (picture.reshape(6, 16, 6, 16, 3) < 255).any((1, 3, 4)).ravel()
        assert drawn.sum() == 16 and np.array_equal(
            np.isin(tagged.visual, tagged.evidence), drawn
        )


def test_samples_are_seeded_and_bad_requests_are_named():
    again = [digest(samples("document", n=3, seed=s)[2]) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert len({s.id for s in samples("video", n=6, questions=3)}) == 6
    assert (
        samples("image", n=2, questions=2)[0].messages[0]["content"][0]["image"] is not None
    )
    assert len(data_hash()) == 64
    for bad in (
        dict(domain="images"),
        dict(split="dev"),
        dict(n=5, questions=2),
        dict(evidence="box"),
        dict(cells=7),
    ):
        with pytest.raises(ValueError):
            samples(**{"domain": "image", "n": 4} | bad)
    with pytest.raises(ValueError, match="at most as many pages"):
        samples("document", pages=13)
    with pytest.raises(ValueError, match="even number of frames"):
        samples("video", frames=5)
    with pytest.raises(ValueError, match="distractors=3"):
        samples("video", distractors=3)
    with pytest.raises(ValueError, match="cells=49: there are 48 keys"):
        samples("image", cells=49)
    with pytest.raises(TypeError, match="hay"):
        samples("video", hay=2)


def test_shared_questions_share_their_picture():
    pair = samples("image", n=4, questions=2)
    pictures = [s.messages[0]["content"][0]["image"] for s in pair]
    assert pictures[0] is pictures[1] and pictures[1] is not pictures[2]


def test_the_shipped_model_loads_without_corehead(shipped):
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert (
        type(model).__name__ == "Qwen3VLForConditionalGeneration"
        and type(processor).__name__ == "Qwen3VLProcessor"
    )
    sample = samples("image", n=1)[0]
    inputs = processor.apply_chat_template(
        sample.messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert torch.equal(
        inputs["input_ids"][0], torch.from_numpy(shipped.tag(sample).ids[:-1])
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert (
        processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        .strip()
        .isdigit()
    )
    assert (FOLDER / "model.safetensors").stat().st_size <= 6 * 2**20
    assert shipped.n_layers * shipped.n_heads >= 96 and shipped.n_kv_heads < shipped.n_heads


def test_the_shipped_model_has_its_papers(shipped):
    card = json.loads((FOLDER / "training.json").read_text())
    assert card["data_sha256"] == data_hash()
    assert {"recipe", "steps", "minutes", "torch"} <= card.keys() and "seed" in card[
        "recipe"
    ]
    log = pd.read_csv(FOLDER / "training_log.csv")
    assert (
        card["steps"] - 25 < log.step.iloc[-1] <= card["steps"] and log.loss.iloc[-1] < 0.5
    )


@pytest.mark.parametrize(
    "domain,layout",
    [
        ("image", dict(cells=16)),
        ("document", dict(pages=8)),
        ("video", dict(frames=8)),
        ("text", dict(cells=16)),
    ],
)
def test_the_shipped_model_answers_on_digits_it_never_saw(shipped, domain, layout):
    results = ch.evaluate(
        shipped, samples(domain, "validation", 300, questions=4, **layout), progress=False
    )
    assert (
        results.correct.mean() >= 0.88
    )  # 0.90 on the test split, in notebook 2; this is another draw
    assert (results.correct == (results.prediction == results.answer)).all()
    assert ((results.margin > 0) == results.correct).all() and (results.logprob <= 0).all()


@pytest.mark.parametrize("domain,distractors", [("document", 164), ("video", 220)])
def test_the_long_model_reads_a_thousand_visual_tokens(shipped, domain, distractors):
    """How well, `test_every_model_that_ships_can_read` says."""
    card = json.loads((LONG / "training.json").read_text())
    assert card["layouts"][domain]["distractors"] == distractors
    assert card["recipe"]["curriculum"] == "long"
    assert card["recipe"]["base"] == "data/testbed/qwen3vl-s"
    [sample] = samples(domain, "validation", 1, **card["layouts"][domain])
    assert len(shipped.tag(sample).visual) >= 1024


def test_evaluation_does_not_depend_on_the_batch(shipped):
    asked = [s for d in ("image", "document", "video", "text") for s in samples(d, n=3)]
    one, many = (
        ch.evaluate(shipped, asked, batch_size=size, progress=False) for size in (1, 12)
    )
    np.testing.assert_allclose(one.logprob, many.logprob, atol=1e-4)
    asked[0].answer = None
    with pytest.raises(ch.SampleError, match="answer"):
        ch.evaluate(shipped, asked[:1], progress=False)


@pytest.mark.slow("a model is trained twice, for thirty steps after thirty of probes")
def test_thirty_steps_of_training(tmp_path, monkeypatch):
    """From a fixed seed the loss falls; a run that was killed ends as one that was not."""
    recipe = dict(
        SMALL, probe_steps=30, stage_steps=6, final_steps=0, warmup=5
    )  # five stages of six steps
    layout = LEVELS["image"][0]
    scenes = draw("image", np.random.default_rng(0), 32, questions=8, **layout)

    def loss(model):
        with torch.no_grad():
            logits = answer_logits(model, *batch_of("qwen3_vl", scenes, layout))[:, :, 0]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(scenes.answer).flatten()
        ).item()

    whole = train(Recipe(**recipe), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "training.json").read_text())["steps"] == 30
    assert loss(whole) < loss(untrained(**SMALL).model) - 1

    def killed(run, model, optimiser):
        if run.step == 17:
            raise KeyboardInterrupt
        train_step(run, model, optimiser)

    train_step = training.train_step
    monkeypatch.setattr(training, "CHECKPOINT", 10)
    monkeypatch.setattr(training, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(Recipe(**recipe), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(training, "train_step", train_step)
    with pytest.raises(ValueError, match="another recipe"):
        train(Recipe(**recipe | {"seed": 1}), tmp_path / "b")
    resumed = train(Recipe(**recipe), tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b)
    pd.testing.assert_frame_equal(
        *(pd.read_csv(tmp_path / run / "training_log.csv") for run in "ab")
    )


def test_training_goes_on_from_a_trained_model(tmp_path):
    train(Recipe(**SMALL, probe_steps=2, stage_steps=1, final_steps=0), tmp_path / "a")
    more = dict(
        SMALL,
        curriculum="long",
        base=str(tmp_path / "a"),
        stage_steps=2,
        final_steps=1,
        lr=1e-9,
        warmup=1,
    )
    found = train(Recipe(**more), tmp_path / "b")
    base = ch.load(tmp_path / "a", dtype="float32").model
    for a, b in zip(base.parameters(), found.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    card = json.loads((tmp_path / "b" / "training.json").read_text())
    assert card["steps"] == 3 and card["recipe"]["base"] == str(tmp_path / "a")
    with pytest.raises(
        ValueError,
        match="curriculum='longer': take one of 'short', 'apart', 'tiled', 'memory', 'long'",
    ):
        Recipe(curriculum="longer")


def test_a_stage_ends_at_its_own_cap(tmp_path):
    caps = dict(image=2, text=1, video=3, document=1, count=1)
    recipe = dict(SMALL, probe_steps=1, final_steps=0)
    train(Recipe(stage_steps=caps, **recipe), tmp_path / "a")
    assert json.loads((tmp_path / "a/training.json").read_text())["steps"] == 8
    with pytest.raises(
        ValueError, match="one for each of image, text, video, document, count"
    ):
        Recipe(stage_steps={"image": 2})


# the grafted model has tests of its own, and other seeds train as the first does
RECIPES = sorted(
    p for p in FOLDER.parent.glob("*.yaml") if "seed" not in p.stem and p.stem != "smollm2"
)


@pytest.mark.slow("eight models are built and trained by the steps that a real run takes")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_trains(recipe, tmp_path):
    """A few steps of each, M and L among them: the probe, the decoder, snapshots, and a folder that loads."""
    given = yaml.safe_load(recipe.read_text())
    # as wide as they are, with fewer layers, unless they go on from others
    if "base" not in given:
        given["layers"] = 3
    if "base" in given and not [
        *(FOLDER.parent.parent.parent / given["base"]).glob("*.safetensors")
    ]:
        pytest.skip("its base is not trained")
    short = dict(probe_steps=2, stage_steps=1, final_steps=0, snapshot_steps=3)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(given | short))
    main([str(tmp_path / "a.yaml")])
    stages = CURRICULA[given.get("curriculum", "short")]["stages"]
    if "base" not in given and len(stages) >= 3:  # a step each
        assert [path.name for path in (tmp_path / "a/snapshots").iterdir()] == ["00003"]
    mllm = ch.load(tmp_path / "a")
    assert mllm.family.name == given["family"] and mllm.n_layers == given.get("layers", 12)
    on_disk = [
        t.dtype
        for file in (tmp_path / "a").glob("*.safetensors")
        for t in load_file(file).values()
    ]
    assert mllm.model.dtype == torch.float32 and set(on_disk) == {torch.float16}
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "float16"
    sample = samples(
        "image",
        n=1,
        **json.loads((tmp_path / "a/training.json").read_text())["layouts"]["image"],
    )
    assert len(ch.evaluate(mllm, sample, progress=False)) == 1


def test_scales_are_what_they_are_said_to_be():
    size = {}
    for name in ("s", "m", "l"):
        given = yaml.safe_load((FOLDER.parent / f"qwen3vl-{name}.yaml").read_text())
        shape = {
            k: v
            for k, v in given.items()
            if k in ("layers", "heads", "hidden", "intermediate", "head_dim")
        }
        with torch.device("meta"):
            size[name] = untrained(**shape).model.num_parameters()
    assert 3.5 < size["m"] / size["s"] < 4.5 and 14 < size["l"] / size["s"] < 18
    assert given["layers"] * given.get("heads", 16) >= 256


def test_a_model_whose_weights_do_not_ship_names_its_recipe():
    with pytest.raises(
        FileNotFoundError, match="`make testbed MODELS=qwen3vl-m` trains it"
    ):
        ch.load(FOLDER.with_name("qwen3vl-m"))


def test_a_recipe_with_a_mistake_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("familly: internvl\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.yaml")])
    assert "unknown familly" in capsys.readouterr().err


@pytest.mark.slow("two surveys with a dozen conditions each, and patching of every head")
def test_the_survey_replaces_a_model_s_rows_and_keeps_the_others(
    tmp_path, shipped, monkeypatch
):
    for draws in ("DRAWS", "FEWER"):
        monkeypatch.setattr(survey, draws, range(2))
    (tmp_path / "testbed").mkdir()
    (tmp_path / "testbed/one").symlink_to(FOLDER)
    command = ["--testbeds", str(tmp_path / "testbed"), "--out", str(tmp_path), "--n", "12"]
    survey.main(command)
    models, first = (
        pd.read_csv(tmp_path / f"{kind}.csv") for kind in ("models", "answers")
    )
    heads = pd.read_parquet(tmp_path / "heads.parquet")
    assert len(models) == 1 and len(heads) == 4 * 192
    use = pd.read_parquet(tmp_path / "use.parquet")
    patched = pd.read_csv(tmp_path / "patched.csv")
    assert len(use) == 192 and use.use.between(-0.1, 1).all()
    sizes = patched.groupby("heads").k.first()
    assert sizes["top"] + sizes["all others"] == 192
    assert sizes["used"] + sizes["only looking"] == sizes["top"]
    assert set(first["heads"]) == {
        "intact",
        "top",
        "bottom",
        "text entropy",
        "random",
        "layer",
    }
    asked = samples("image", "validation", 12, 0, questions=6, cells=25)
    ram = ch.score(shipped, asked, progress=False).mean("ram").values
    mine = heads[heads.domain == "image"]
    np.testing.assert_allclose(ram[mine.layer, mine["head"]], mine.ram, atol=6e-5)

    gone = first.assign(model="gone")  # a model that is not there any more
    pd.concat([gone, first]).to_csv(tmp_path / "answers.csv", index=False)
    two = pd.concat([heads.assign(model="gone"), heads])
    two.to_parquet(tmp_path / "heads.parquet", index=False)
    survey.main(command)
    both = pd.read_csv(tmp_path / "answers.csv")
    assert list(dict.fromkeys(both.model)) == ["gone", "one"] and len(both) == 2 * len(gone)
    again = both[both.model == "one"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, first)
    assert len(pd.read_parquet(tmp_path / "heads.parquet")) == 2 * len(heads)


def test_the_survey_that_ships_is_whole():
    folder = FOLDER.parent.parent / "results/survey"
    models, answers = (
        pd.read_csv(folder / f"{kind}.csv") for kind in ("models", "answers")
    )
    heads = pd.read_parquet(folder / "heads.parquet")
    assert [*heads] == [
        "model",
        "step",
        "domain",
        "layer",
        "head",
        "ram",
        "ram last",
        "calibrated",
    ]
    runs = [set(zip(table.model, table.step)) for table in (models, answers, heads)]
    assert runs[0] == runs[1] == runs[2] and heads.ram.between(0, 1).all()
    use, patched = (
        pd.read_parquet(folder / "use.parquet"),
        pd.read_csv(folder / "patched.csv"),
    )
    assert set(use.model) == set(patched.model) == {path.name for path in SHIPPED}
    # these know other tasks or words
    others = {("smollm2", 0), ("qwen3vl-s-memory", 0), ("qwen3vl-s-apart", 0)}
    trained = {(path.parent.name, 0) for path in FOLDER.parent.glob("*/training.json")}
    assert trained - others <= runs[0]


def test_the_model_that_was_taught_facts_knows_them_and_still_looks_up():
    mllm = ch.load(FOLDER.with_name("qwen3vl-s-memory"))
    for domain in ("memory", "image", "text"):
        asked = samples(domain, n=60)
        assert ch.evaluate(mllm, asked, progress=False).correct.mean() >= 0.9, domain


def test_the_model_whose_domains_share_no_word_looks_up_in_all_of_them():
    folder = FOLDER.with_name("qwen3vl-s-apart")
    mllm, card = ch.load(folder), json.loads((folder / "training.json").read_text())
    for domain in survey.RETRIEVAL:
        layout = card["layouts"][domain]
        asked = samples(domain, "validation", 48, questions=6, **layout)
        assert layout["own_words"]
        assert ch.evaluate(mllm, asked, progress=False).correct.mean() >= 0.7, domain


SHIPPED = [folder for _, step, folder, _ in survey.runs(FOLDER.parent) if not step]


@pytest.mark.slow("48 questions in four domains, in one model on a thousand visual tokens")
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_every_model_that_ships_can_read(folder):
    """On validation digits, at the hardest layouts that it came to; sizes as promised."""
    mllm, card = ch.load(folder), json.loads((folder / "training.json").read_text())
    assert card["data_sha256"] == data_hash() and mllm.model.dtype == torch.float32
    if "-s" in folder.name:  # larger ones do not ship
        assert [
            file.stat().st_size <= 6 * 2**20 for file in folder.glob("*.safetensors")
        ] == [True]
    for domain in survey.RETRIEVAL:
        asked = samples(domain, "validation", 48, questions=6, **card["layouts"][domain])
        assert ch.evaluate(mllm, asked, progress=False).correct.mean() >= 0.8, domain


def test_tiles_and_thumbnail_are_really_used():
    mllm = ch.load(FOLDER.with_name("internvl-s"))
    [sample] = samples("image", "validation", 1, cells=36, side=6)
    tagged = mllm.tag(sample)
    assert (
        len(tagged.visual) == 45 and len(np.unique(tagged.media[0].view)) == 2
    )  # four tiles of nine, and all
    [sample] = samples("document", "validation", 1, cells=16, pages=3, side=6)
    tagged = mllm.tag(sample)
    assert len(tagged.visual) == 3 * 45 and len(tagged.evidence) == 45
    assert np.array_equal(
        mllm.tag(sample, "counting").evidence, tagged.evidence
    )  # cumulative offsets
