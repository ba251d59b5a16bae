"""What people hand in: released chat templates, pictures and messages of every kind, and what is wrong with them."""

import base64
import io
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
import torch
from conftest import ask, film, image_part, picture, tiny, video_part
from PIL import Image, ImageOps
from test_tagging import changed_tokens

import corehead as ch
from corehead import testbed
from corehead.batching import NULL, context_of, same_context, with_question
from corehead.runs import digest
from corehead.samples import read_messages
from corehead.tagging import CONSTRUCTIONS, Prompt, to_image

# --- chat templates, written after what the released ones are documented to do


def qwen3_vl(opening: str) -> str:
    """ChatML; a medium stands between vision markers, a tool's reply in a user's turn; `opening` is the model's."""
    return (
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'tool' %}<tool_response>\n{% endif %}"
        "{% for part in [m.content] if m.content is string %}{{ part }}{% endfor %}"
        "{% for part in m.content if m.content is not string %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{% for call in m.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
        "{% if m.role == 'tool' %}\n</tool_response>{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )


# every medium is followed by a newline where it stands
INTERNVL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% elif part.type == 'video' %}<video>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava_onevision(behind: str, before: str, end: str) -> str:
    """Images of a message first, then its videos, then its texts, with newlines behind media or in front of texts."""
    kinds = (
        "{% for part in m.content | selectattr('type', 'equalto', 'KIND') %}<KIND>"
        + behind
        + "{% endfor %}"
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }} "
        + kinds.replace("KIND", "image")
        + kinds.replace("KIND", "video")
        + "{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        + before
        + "{{ part.text }}{% endfor %}<|im_end|>"
        + end
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TEMPLATES = {
    "Qwen3-VL Instruct": ("qwen3_vl", qwen3_vl("")),
    "Qwen3-VL Thinking": ("qwen3_vl", qwen3_vl("<think>\n")),
    "InternVL3.5": ("internvl", INTERNVL),
    "LLaVA-OneVision": ("llava_onevision", llava_onevision("", "\n", "")),
    "LLaVA-OneVision, converted": ("llava_onevision", llava_onevision("\n", "", "\n")),
}


@cache
def released(name: str) -> ch.MLLM:
    """A tiny model of its family under a template."""
    family, template = TEMPLATES[name]
    mllm = testbed.tiny(family)
    mllm.processor.chat_template = template
    return mllm


FILM, PAGE, NEXT = film(4, 60, 60), picture(60, 90), picture(60, 90, seed=1)


def conversation(evidence, video=FILM, page=PAGE, order=1, **fields) -> ch.Sample:
    """A system prompt, a film and a page in either order, a reply, another page and the question."""
    parts = [video_part(video), "alpha is 5. ", image_part(page), "beta is 7. "][::order]
    messages = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [*parts, "Ready?"]},
        {"role": "assistant", "content": [{"type": "text", "text": "Ready."}]},
        {"role": "user", "content": [image_part(NEXT), "What is it?"]},
    ]
    return ch.Sample("s", messages, evidence, "7", **fields)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", TEMPLATES)
def test_released_templates(name, order):
    """Every piece of evidence against painted pixels, the texts against what their tokens decode to."""
    mllm = released(name)
    decode = mllm.tokenizer.decode
    whole = mllm.tag(conversation([], order=order))
    painted = {
        ch.Frames(0, 3): {"video": np.stack([*FILM[:3], 255 - FILM[3]])},
        ch.Pages(0): {"page": ImageOps.invert(PAGE)},
        ch.Region(0, (0, 0, 30, 30)): {"page": PAGE.copy()},
    }
    painted[ch.Region(0, (0, 0, 30, 30))]["page"].paste("white", (8, 8, 22, 22))
    for piece, change in painted.items():
        found = mllm.tag(conversation([piece], order=order)).evidence
        other = mllm.tag(conversation([], order=order, **change))
        changed = changed_tokens(mllm, whole, other)
        assert len(changed) and np.isin(changed, found).all(), piece
    for text in ("beta is 7", "You are helpful.", "Ready."):
        tagged = mllm.tag(conversation([ch.Span(text)], order=order))
        assert decode(tagged.ids[tagged.evidence]) == text
    assert decode(tagged.ids[tagged.question]) == "What is it?"
    opening = "<think>\n" if name.endswith("Thinking") else "assistant\n"
    assert decode(tagged.ids[: tagged.last + 1]).endswith(opening)
    assert decode(tagged.ids[tagged.answer]) == "7" and tagged.answer[0] == tagged.last + 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_constructions_agree_under_released_templates(name):
    mllm = released(name)
    for order in (1, -1):
        for piece in (
            ch.Pages(0),
            ch.Pages([0, 1]),
            ch.Span("beta is 7"),
            ch.Frames(0, [1]),
        ):
            sample = conversation([piece], order=order)
            expected = mllm.tag(sample).evidence
            if mllm.family.name == "llava_onevision" and isinstance(piece, ch.Frames):
                with pytest.raises(ch.SampleError, match="nothing to wrap"):
                    mllm.tag(sample, "markers")
            else:
                assert np.array_equal(mllm.tag(sample, "markers").evidence, expected)
    pages = ask(image_part(PAGE), "x", image_part(NEXT), evidence=[ch.Pages(1)])
    for construction in CONSTRUCTIONS:
        found = mllm.tag(pages, construction).evidence
        assert np.array_equal(found, mllm.tag(pages).media[1].tokens)


@pytest.mark.parametrize("found", [[], [3, 4]])
def test_a_construction_that_finds_something_else_is_an_error(monkeypatch, found):
    mllm = tiny("qwen3_vl")
    wrong = lambda prompt: np.array(found, np.int64)  # noqa: E731
    for construction in ("markers", "counting"):
        monkeypatch.setitem(CONSTRUCTIONS, construction, wrong)
        sample = ask(image_part(PAGE), evidence=[ch.Pages(0)])
        with pytest.raises(ch.SampleError, match=f"{len(found)} tokens, geometry 6"):
            mllm.tag(sample, construction)
    # a film of one frame: its run of tokens ends in a newline slot, which looks at nothing
    one = ask(video_part(FILM[:1]), evidence=[ch.Frames(0, 0)])
    with pytest.raises(ch.SampleError, match="markers finds 10 tokens, geometry 9"):
        monkeypatch.undo()
        tiny("llava_onevision").tag(one, "markers")


def test_the_opening_of_the_models_turn_is_never_quoted():
    """It holds "think" and "assistant", which may be words of a question or of evidence as well."""
    for name in ("Qwen3-VL Instruct", "Qwen3-VL Thinking"):
        mllm = released(name)
        for word in ("think", "ant"):
            sample = ask(f"We {word} so. ", question=word, evidence=[ch.Span("We " + word)])
            tagged = mllm.tag(sample)
            assert mllm.tokenizer.decode(tagged.ids[tagged.question]) == word
            assert (
                mllm.tokenizer.decode(tagged.ids[tagged.question[-1] + 1 :][:1])
                == "<|im_end|>"
            )
            assert mllm.tokenizer.decode(tagged.ids[tagged.evidence]) == "We " + word
    sample = ask("We do. ", question="It?", evidence=[ch.Span("think")])
    with pytest.raises(ch.SampleError, match="'think' stands 0 times"):
        mllm.tag(sample)


def test_turns_with_tools():
    mllm = released("Qwen3-VL Instruct")
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"page": 1}}}
    messages = [
        {"role": "user", "content": [image_part(PAGE), "Zoom in."]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": [image_part(NEXT), "the total is 98,50"]},
        {"role": "user", "content": "What is it?"},
    ]
    evidence = [ch.Span("98,50"), ch.Pages(1)]
    sample = ch.Sample("s", messages, evidence, "98,50")
    tagged = mllm.tag(sample)
    text = mllm.tokenizer.decode(tagged.ids)
    assert '<tool_call>\n{"name": "zoom", "arguments": {"page": 1}}' in text
    visual = np.isin(tagged.evidence, tagged.visual)
    assert np.array_equal(tagged.evidence[visual], tagged.media[1].tokens)
    assert mllm.tokenizer.decode(tagged.ids[tagged.evidence[~visual]]) == "98,50"
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)
    messages[1] = {"role": "assistant", "content": None}
    with pytest.raises(ch.SampleError, match=r"messages\[1\]: has no content"):
        mllm.tag(ch.Sample("s", messages, evidence))


# --- pictures and videos of every kind

SIDEWAYS = 6  # EXIF's number for a picture that must be turned clockwise
UPRIGHT = picture(60, 90)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def turned() -> bytes:
    """`UPRIGHT` as a camera that was held sideways writes it."""
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    return png(UPRIGHT.transpose(Image.Transpose.ROTATE_90), exif=exif)


class OnePicture(BaseHTTPRequestHandler):
    def do_GET(self):
        data = turned()
        self.send_response(200 if self.path == "/turned.png" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *given):
        pass


@pytest.fixture(scope="module")
def served():
    with HTTPServer(("127.0.0.1", 0), OnePicture) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_source_of_a_picture_gives_the_upright_one(tmp_path, served):
    data = turned()
    path = tmp_path / "turned page.png"
    path.write_bytes(data)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    pixels = np.asarray(UPRIGHT)
    sources = [str(path), path, path.as_uri(), f"{served}/turned.png", uri, data]
    sources += [io.BytesIO(data), path.open("rb"), Image.open(path), UPRIGHT, pixels]
    sources += [
        pixels.transpose(2, 0, 1),
        torch.tensor(pixels),
        torch.tensor(pixels).permute(2, 0, 1),
    ]
    for source in sources:
        assert np.array_equal(to_image(source, "s", "here"), pixels), source
    mllm = tiny("qwen3_vl")
    region = ch.Region(0, (60, 0, 90, 30))
    expected = mllm.tag(ask(image_part(UPRIGHT), evidence=[region]))
    found = mllm.tag(ask(image_part(path), evidence=[region]))
    assert found.media[0].size == (1, 60, 90) and len(found.evidence)
    assert np.array_equal(found.evidence, expected.evidence)
    assert torch.equal(found.inputs["pixel_values"], expected.inputs["pixel_values"])


def test_open_files_are_read_as_often_as_needed(tmp_path):
    file = io.BytesIO(turned())
    first, second = (to_image(file, "s", "here") for _ in range(2))
    assert first == second and file.read() is not None  # still open
    assert digest(file) == digest(io.BytesIO(turned())) != digest(io.BytesIO(png(UPRIGHT)))


def test_digests_see_every_value_of_a_tensor():
    a, b = torch.zeros(2, 3, 60, 90, dtype=torch.uint8).unbind()
    b[1, 30, 45] = 1  # far from what repr shows
    assert digest(a) != digest(b) and digest(a) == digest(a.numpy())
    assert digest([ch.Region(np.int64(0), np.array([1.0, 2, 3, 4]))]) == digest(
        [ch.Region(0, (1.0, 2.0, 3.0, 4.0))]
    )


def test_what_is_transparent_stands_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    key = png(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    for image, value in (
        (clear, 255),
        (np.asarray(clear), 255),
        (half, 127),
        (png(palette, transparency=1), 255),
        (palette, 9),
        (key, 255),
    ):
        assert np.unique(to_image(image, "s", "here")).tolist() == [value]
    opaque = picture(20, 30)
    assert to_image(opaque.convert("RGBA"), "s", "here") == opaque


@pytest.mark.parametrize("make", [
    lambda: Image.fromarray(np.full((40, 40), 30_000, np.uint16)),
    lambda: png(Image.fromarray(np.full((40, 40), 30_000, np.uint16))),
    lambda: Image.new("I", (40, 40), 300),
    lambda: Image.new("F", (40, 40), 0.5),
    lambda: torch.rand(3, 40, 40),
    lambda: np.full((40, 40, 3), 300),
    lambda: np.zeros((40, 40, 3), bool),
])  # fmt: skip
def test_pictures_of_more_than_8_bits_are_refused(make):
    with pytest.raises(ch.SampleError, match="cannot be read as an image") as caught:
        tiny("qwen3_vl").tag(ask(image_part(make())))
    assert caught.value.where == "messages[0].content[0]"


def test_pictures_of_several_frames_are_refused():
    """Of a film or a scanned document all but the first would be lost."""
    for name in ("GIF", "TIFF", "PNG", "WEBP"):
        file = io.BytesIO()
        PAGE.save(file, name, save_all=True, append_images=[NEXT])
        with pytest.raises(ch.SampleError, match="2 frames or pages: give each"):
            to_image(file, "s", "here")
        file = io.BytesIO()
        PAGE.save(file, name)
        assert to_image(file, "s", "here").size == PAGE.size
    preview = io.BytesIO()
    PAGE.save(preview, "MPO", save_all=True, append_images=[PAGE.resize((9, 6))])
    assert to_image(preview, "s", "here").size == PAGE.size


def test_an_error_does_not_quote_a_whole_picture():
    part = {"type": "image", "base64": base64.b64encode(bytes(10**5)).decode()}
    for given in (part, image_part("no/such/" + "x" * 10**5)):
        with pytest.raises(ch.SampleError) as caught:
            tiny("qwen3_vl").tag(ask(given))
        assert len(str(caught.value)) < 1000


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A film of eight frames of one grey each, at four a second."""
    path = tmp_path_factory.mktemp("films") / "a clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(8):
            pixels = np.full((64, 64, 3), 20 + 25 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def test_videos_in_every_form_are_the_same(mllm, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    images = [Image.fromarray(frame) for frame in FILM]
    for path, image in zip(paths, images):
        image.save(path)
    expected = mllm.tag(ask(video_part(FILM), evidence=[ch.Frames(0, 2)]))
    frames = torch.tensor(FILM)
    for video in (
        frames,
        frames.permute(0, 3, 1, 2),
        list(FILM),
        images,
        tuple(map(str, paths)),
    ):
        found = mllm.tag(ask(video_part(video), evidence=[ch.Frames(0, 2)]))
        assert found.media[0].size == (4, 60, 60)
        assert np.array_equal(found.evidence, expected.evidence)
        assert np.array_equal(found.ids, expected.ids)
        for name, value in expected.inputs.items():
            assert not torch.is_tensor(value) or torch.equal(found.inputs[name], value)


def test_video_files_are_sampled_at_the_rate_that_is_given(clip):
    mllm = tiny("qwen3_vl")
    for source in ({"path": str(clip)}, {"video": clip}, {"url": clip.as_uri()}):
        part = {"type": "video", "fps": 2, **source}
        tagged = mllm.tag(ask(part, evidence=[ch.Frames(0, 3)]))
        assert tagged.media[0].size == (4, 64, 64)  # frames 0, 2, 4, 6 of the file
        text = mllm.tokenizer.decode(tagged.ids)
        assert "<0.2 seconds>" in text and "<1.2 seconds>" in text
    brightness = [
        frame.mean() for frame in Prompt(mllm, ask(part))._read_media()["video"][0]
    ]
    assert np.allclose(brightness, [20, 70, 120, 170], atol=4)
    for part in ({"path": str(clip)}, {"video": FILM}):
        with pytest.raises(ch.SampleError, match="its 'fps' is nan"):
            mllm.tag(ask({"type": "video", **part}))
    for wrong in (9, 0, "often"):
        with pytest.raises(ch.SampleError, match="no video that can be read"):
            mllm.tag(ask({"type": "video", "path": str(clip), "fps": wrong}))
    with pytest.raises(ch.SampleError, match=r"content\[0\]\.video\[1\]: cannot be read"):
        mllm.tag(ask(video_part([PAGE, "nowhere.png"])))
    with pytest.raises(ch.SampleError, match="same shape"):
        mllm.tag(ask(video_part([PAGE, picture(60, 60)])))


def test_videos_have_time_stamps_of_their_own():
    """Not the first one's for all, nor any that were made up."""
    sample = ask(video_part(FILM, fps=2.0), video_part(film(4, 60, 60, seed=1), fps=8.0))
    text = (mllm := tiny("qwen3_vl")).tokenizer.decode(mllm.tag(sample).ids)
    assert re.findall(r"<([\d.]+) seconds>", text) == ["0.2", "1.2", "0.1", "0.3"]


def test_single_images_are_read_alike_behind_several():
    """LLaVA-OneVision crops single images alone; no setting may stay behind."""
    mllm = tiny("llava_onevision")
    page = ch.Pages(0)
    single = ask(image_part(PAGE), evidence=[page], id="single")
    several = ask(image_part(PAGE), image_part(NEXT), evidence=[page], id="several")
    before = mllm.tag(single)
    assert not np.array_equal(mllm.tag(several).evidence, before.evidence)
    assert np.array_equal(mllm.tag(single).evidence, before.evidence)
    options = dict(progress=False, null=False)
    together = ch.score(mllm, [single, several], **options).per_sample("ram").values
    for found, sample in zip(together, (single, several)):
        alone = ch.score(mllm, [sample], **options).per_sample("ram").values[0]
        assert np.allclose(found, alone, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_a_tokenizers_own_limits_and_padding_are_not_used(family):
    """A cut would take the end of the prompt in silence; padding stands in front, whatever the tokenizer says."""
    plain = tiny(family)
    mllm = testbed.tiny(family)
    tokenizer = mllm.tokenizer
    tokenizer.init_kwargs |= {"max_length": 20, "truncation": True}
    tokenizer._tokenizer.enable_truncation(max_length=20)
    tokenizer.model_max_length = 20
    tokenizer.padding_side = "right"
    samples = [
        ask("x" * i, "alpha is 5. ", id=str(i), evidence=[ch.Span("alpha")])
        for i in range(3)
    ]
    for sample in samples:
        assert np.array_equal(mllm.tag(sample).ids, plain.tag(sample).ids)
    found, expected = (ch.evaluate(m, samples, progress=False) for m in (mllm, plain))
    assert np.allclose(found.logprob, expected.logprob, atol=1e-5)


# --- messages of every convention


def written(tmp_path, **source) -> ch.Sample:
    """A sample whose picture part is written in one of the conventions."""
    messages = [{"role": "user", "content": [source, "What is it?"]}]
    return ch.Sample("s", messages, ch.Region(0, (0, 0, 30, 30)), "7")


def test_conventions_of_messages_are_one_sample(tmp_path):
    path = tmp_path / "page.png"
    PAGE.save(path)
    data = path.read_bytes()
    coded = base64.b64encode(data).decode()
    uri = f"data:image/png;base64,{coded}"
    conventions = [
        {"type": "image", "image": PAGE},
        {"type": "image", "image": PAGE, "text": None, "video": None},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "path": str(path)},
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "image_url", "image_url": uri},
        {"image": str(path)},
        {"type": "image", "image": {"bytes": data, "path": None}},
    ]
    mllm = tiny("qwen3_vl")
    expected = mllm.tag(written(tmp_path, **conventions[0]))
    assert len(expected.evidence)
    for part in conventions:
        sample = written(tmp_path, **part)
        tagged = mllm.tag(sample)
        assert np.array_equal(tagged.ids, expected.ids)
        assert np.array_equal(tagged.evidence, expected.evidence)
        assert torch.equal(tagged.inputs["pixel_values"], expected.inputs["pixel_values"])
        # and whatever asks for the context sees the picture
        [(role, medium), (_, question)] = context_of(sample)
        assert role == "user" and medium is not None and question == ""
        assert same_context(sample, written(tmp_path, **part))
        blank = with_question(sample, "What is it?", NULL)
        assert np.array_equal(Prompt(mllm, blank).media[0].boxes, expected.media[0].boxes)
    assert sample.messages[0]["content"][0] == part  # nothing of the user's is changed


def test_videos_tell_contexts_apart():
    films = [film(4, 60, 60, seed=seed) for seed in (0, 1)]
    first, second = (ask({"type": "video", "video": list(f), "fps": 1}) for f in films)
    assert same_context(first, ask({"type": "video", "video": list(films[0]), "fps": 1}))
    assert not same_context(first, second)


@pytest.mark.parametrize("part, problem", [
    ({"type": "image", "image": PAGE, "max_pixels": 50_000}, "max_pixels would not be heeded"),
    ({"type": "video", "video": FILM, "nframes": 2}, "nframes would not be heeded"),
    ({"type": "image", "image": PAGE, "url": "page.png"}, "there is no 'image' in it"),
    ({"type": "input_audio", "input_audio": "x"}, "'input_audio' is unknown"),
    ({}, "'None' is unknown"),
    (5, "int is no part"),
    ({"type": "text", "text": 5}, "its text is 5"),
])  # fmt: skip
def test_parts_that_would_be_misread_are_refused(part, problem):
    messages = [{"role": "user", "content": [part, "What is it?"]}]
    with pytest.raises(ch.SampleError, match=problem) as caught:
        tiny("qwen3_vl").tag(ch.Sample("s", messages))
    assert caught.value.where == "messages[0].content[0]"


def test_boxes_have_units(mllm):
    page = [image_part(PAGE)]  # 90 x 60
    pixels = mllm.tag(ask(*page, evidence=[ch.Region(0, (45, 15, 90, 45))])).evidence
    for unit, whole in (("fraction", 1), ("thousandth", 1000)):
        box = (0.5 * whole, 0.25 * whole, whole, 0.75 * whole)
        tagged = mllm.tag(ask(*page, evidence=[ch.Region(0, box, unit)]))
        assert np.array_equal(tagged.evidence, pixels)
        box = (0, 0, 0.25 * whole, 0.5 * whole)
        tube = mllm.tag(ask(video_part(FILM), evidence=[ch.Tube(0, {1: box}, unit)]))
        same = mllm.tag(ask(video_part(FILM), evidence=[ch.Tube(0, {1: (0, 0, 15, 30)})]))
        assert np.array_equal(tube.evidence, same.evidence)
    for piece, problem in (
        (ch.Region(0, (0.1, 0.2, 0.5, 1)), "Say unit='fraction'"),
        (ch.Region(0, (0, 0, 1, 1)), "Say unit='fraction'"),
        (ch.Region(0, (100, 100, 900, 900)), "or unit='fraction' or 'thousandth'"),
        (ch.Region(0, (0, 0, 45, 30), "fraction"), "no box inside"),
        (ch.Region(0, (0, 0, 1100, 900), "thousandth"), "no box inside"),
        (ch.Region(0, (0, 0, 50, 50), "percent"), "unit 'percent' is unknown"),
    ):
        with pytest.raises(ch.SampleError, match=problem):
            mllm.tag(ask(*page, evidence=[piece]))


def test_evidence_in_numbers_of_any_kind():
    box = (0, 0, 30, 30)
    assert (
        ch.Pages(3) == ch.Pages([3]) == ch.Pages(np.int64(3)) == ch.Pages(torch.tensor(3))
    )
    assert ch.Pages(range(2)) == ch.Pages(np.arange(2)) == ch.Pages(torch.arange(2))
    assert ch.Frames(np.int8(0), 2) == ch.Frames(0, [2]) == ch.Frames(0, torch.tensor([2]))
    assert ch.Region(torch.tensor(0), np.array(box)) == ch.Region(0, list(box))
    tube = ch.Tube(0, {np.int64(1): torch.tensor(box)})
    assert tube == ch.Tube(0, {1: box}) and type(next(iter(tube.boxes))) is int
    mllm = tiny("qwen3_vl")
    several = ask(image_part(PAGE), evidence=[ch.Region(0, box)])
    several.evidence = (ch.Region(0, torch.tensor(box, dtype=torch.float16)),)
    alone = ch.Sample("s", several.messages, ch.Region(0, box), "7")
    assert alone.evidence == [ch.Region(0, box)]
    assert np.array_equal(mllm.tag(alone).evidence, mllm.tag(several).evidence)


def sample_with(**fields) -> ch.Sample:
    messages = [{"role": "user", "content": [image_part(PAGE), "What is it?"]}]
    given = dict(id="bad", messages=messages, evidence=[ch.Pages(0)], answer="7") | fields
    return ch.Sample(**given)


def said(*content) -> list[dict]:
    return [{"role": "user", "content": [*content, "What is it?"]}]


BAD = {
    "answer, a number": (dict(answer=7), "answer"),
    "answer, NaN": (dict(answer=float("nan")), "answer"),
    "foil, a number": (dict(foil=8), "foil"),
    "question, a number": (dict(question=7), "question"),
    "meta, no dictionary": (dict(meta=None), "meta"),
    "meta, a list in it": (dict(meta={"tags": [1, 2]}), "meta"),
    "messages, a string": (dict(messages="What is it?"), "messages"),
    "messages, none": (dict(messages=None), "messages"),
    "messages, empty": (dict(messages=[]), "messages"),
    "a message, a string": (dict(messages=["What is it?"]), r"messages\[0\]"),
    "evidence, None": (dict(evidence=None), "evidence"),
    "evidence, a string": (dict(evidence="page 3"), "evidence"),
    "evidence, a number": (dict(evidence=[3]), r"evidence\[0\]"),
    "page, a string": (dict(evidence=ch.Pages("12")), r"evidence\[0\]"),
    "page, a fraction": (dict(evidence=ch.Pages([0.5])), r"evidence\[0\]"),
    "page, nothing": (dict(evidence=ch.Pages(None)), r"evidence\[0\]"),
    "region, no box": (dict(evidence=ch.Region(0, None)), r"evidence\[0\]"),
    "region, no index": (dict(evidence=ch.Region("a", (0, 0, 9, 9))), r"evidence\[0\]"),
    "tube, a list": (dict(evidence=ch.Tube(0, [(0, 0, 9, 9)])), r"evidence\[0\]"),
    "tube, keys of JSON": (
        dict(messages=said(video_part(FILM)), evidence=ch.Tube(0, {"0": (0, 0, 9, 9)})),
        r"evidence\[0\]: frame '0'",
    ),
    "span, a number": (dict(evidence=ch.Span(5)), r"evidence\[0\]"),
    "no pixel": (
        dict(messages=said(image_part(np.zeros((0, 5, 3), np.uint8)))),
        "messages",
    ),
    "no second": (dict(messages=said(video_part(FILM, fps=0))), "messages"),
    "frame indices, words": (
        dict(messages=said({**video_part(FILM), "frames_indices": ["a"] * 4})),
        r"messages\[0\].content\[0\]",
    ),
    "frame indices, below 0": (
        dict(messages=said({**video_part(FILM), "frames_indices": [-1, 0, 1, 2]})),
        r"messages\[0\].content\[0\]",
    ),
    "frame indices, backwards": (
        dict(messages=said({**video_part(FILM), "frames_indices": [3, 2, 1, 0]})),
        r"messages\[0\].content\[0\]",
    ),
    "meta, a column": (dict(meta={"context": "page 3"}), "meta: context"),
    "a text with a picture in it": (
        dict(messages=said({"text": "What?", "image": np.zeros((8, 8, 3), np.uint8)})),
        r"messages\[0\].content\[0\]: a text with image in it",
    ),
    "half a character": (dict(messages=said("What \ud800 is")), "messages"),
}


@pytest.fixture(scope="module")
def failures():
    """Of one run over all that is bad, with good samples between."""
    samples = []
    for name, (fields, _) in BAD.items():
        samples += [sample_with(id=f"good {name}"), sample_with(id=name, **fields)]
    # one by one, as a reader of a benchmark gives them
    scores = ch.score(tiny("qwen3_vl"), iter(samples), progress=False, batch_size=4)
    assert scores.data.sizes["sample"] == len(BAD)
    return scores.failures.set_index("sample").reason


@pytest.mark.parametrize("name", BAD)
def test_a_run_records_a_bad_sample_and_goes_on(failures, name):
    _, where = BAD[name]
    assert failures.index.is_unique and set(failures.index) == set(BAD)
    assert re.match(f"sample {name!r}, {where}", failures[name])
    problem, _, fix = failures[name].rpartition(". ")
    assert problem and fix.endswith(".")


def test_evaluate_leaves_a_bad_sample_out_under_every_condition():
    mllm = tiny("qwen3_vl")
    heads = ch.HeadSet(np.eye(*mllm.shape, dtype=bool))
    calls = []

    def metric(text):
        calls.append(text)
        return {"parsed": 1, "value": 1 / (len(calls) != 2)}

    samples = [
        sample_with(id="good"),
        sample_with(id="a number", answer=7),
        sample_with(id="metric", metric=metric),
        sample_with(id="no metric", metric=dict),
    ]
    conditions = {"intact": None, "none": ch.Ablation(heads)}
    options = dict(new_tokens=1, progress=False)
    answers = ch.evaluate(mllm, samples, conditions, on_error="record", **options)
    assert answers["sample"].tolist() == ["good", "good"]
    failed = {f["sample"]: f["reason"] for f in answers.attrs["failures"]}
    assert set(failed) == {"a number", "metric", "no metric"}
    # once, though "no metric" fails under both conditions
    assert len(answers.attrs["failures"]) == 3
    assert "ZeroDivisionError" in failed["metric"]
    with pytest.raises(ch.SampleError, match="'a number', answer: 7 is no text"):
        ch.evaluate(mllm, samples, conditions, **options)
    with pytest.raises(
        ValueError, match=r"no sample could be evaluated; the first: .*answer"
    ):
        ch.evaluate(mllm, samples[1:2], on_error="record", **options)


@pytest.mark.parametrize("samples, problem", [
    (sample_with(), "samples is a Sample: give a list"),
    ("doc7.json", "samples is a str: give a list"),
    ([sample_with(), {"id": "dict"}], r"samples\[1\] is a dict"),
])  # fmt: skip
def test_what_is_no_list_of_samples_is_named(samples, problem):
    for run in (ch.score, ch.evaluate):
        with pytest.raises(TypeError, match=problem):
            run(tiny("qwen3_vl"), samples, progress=False)


def test_messages_read_from_json_are_unchanged_by_reading():
    messages = json.loads(
        json.dumps(said({"type": "image_url", "image_url": {"url": "x"}}))
    )
    sample = ch.Sample(7, messages)
    assert sample.id == "7"
    [message] = read_messages(sample)
    assert message["content"][0] == {"type": "image", "image": "x"}
    assert message["content"][1] == {"type": "text", "text": "What is it?"}
    assert (
        sample.messages
        == messages
        == said({"type": "image_url", "image_url": {"url": "x"}})
    )
