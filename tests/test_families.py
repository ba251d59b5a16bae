"""Every architecture: boxes against painted pixels, scores and interventions against full attention matrices."""

import copy
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ask, film, image_part, picture, tiny, video_part
from test_ablation import HEADS, expected_logits, logits_of, oracle
from test_scoring import brute_force
from test_tagging import paint
from transformers import (
    DynamicCache,
    Gemma3Processor,
    LlavaImageProcessor,
    SiglipImageProcessor,
)

import corehead as ch
from corehead import circuits
from corehead.ablation import Ablation, Reference
from corehead.attention import CACHE, Hook
from corehead.batching import NULL, embedded, run_unpadded, with_question
from corehead.tagging import with_text
from corehead.testbed.models import tiny as tiny_model

# of each family: how many pixels of the processor's output a token covers, and how often a picture is resampled
GEOMETRY = {
    "qwen2_vl": (28, 1),
    "qwen2_5_vl": (28, 1),
    "qwen3_vl": (32, 1),
    "qwen3_vl_moe": (32, 1),
    "glm4v": (28, 1),
    "glm4v_moe": (28, 1),
    "llava": (14, 1),
    "llava_next": (14, 1),
    "gemma3": (28, 1),
    "idefics3": (14, 3),
    "smolvlm": (14, 3),
    "mistral3": (14, 1),
    "pixtral": (14, 1),
}
TEXT = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma", "gemma2", "gemma3_text")
VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "smolvlm")


@pytest.fixture(autouse=True)
def spelled_numbers(monkeypatch):
    """SmolVLM's processor spells the number of frames by a package that nothing else here needs."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)


@cache
def sees_patches(family: str) -> ch.MLLM:
    """A tiny model whose vision tower does not attend: a feature sees the pixels of its own patches alone."""
    mllm = copy.deepcopy(tiny(family))
    output = re.compile(r"(visual|vision)\S*(attn|attention)\.(proj|out_proj|o_proj)\.")
    zeroed = [p for name, p in mllm.model.named_parameters() if output.search(name)]
    assert zeroed
    for parameter in zeroed:
        torch.nn.init.zeros_(parameter)
    return mllm


@torch.no_grad()
def changed(family: str, a: ch.TaggedSample, b: ch.TaggedSample) -> set:
    """Positions of the tokens whose embeddings differ, by the model's own vision tower and packing."""
    before, after = (embedded(sees_patches(family), t.inputs) for t in (a, b))
    differ = before["inputs_embeds"] != after["inputs_embeds"]
    return set(np.flatnonzero(differ[0].any(-1).numpy()))


def near(family: str, medium, box) -> set:
    """Tokens whose cells meet a box after resampling: bicubic filters reach two pixels of the coarser grid."""
    pixels, times = GEOMETRY[family]
    boxes = medium.boxes
    reach = np.zeros((len(boxes), 2))
    for view in np.unique(medium.view):
        # cells at the border may be cut off, so that the widest of a view counts
        mine = (medium.view == view) & ~np.isnan(boxes[:, 0])
        if mine.any():
            cell = (boxes[mine, 2:] - boxes[mine, :2]).max(0)
            reach[mine] = 2.5 * times * np.maximum(1, cell / pixels)
    low, high = boxes[:, :2] - reach, boxes[:, 2:] + reach
    return set(medium.tokens[((low < box[2:]) & (high > box[:2])).all(1)])


def sizes_and_boxes(n: int, seed: int):
    """Heights, widths and boxes; a third of the pictures are long and narrow."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        height, width = rng.integers(28, 331, 2)
        if i % 3 == 0:
            height, width = rng.permutation([rng.integers(28, 60), rng.integers(150, 331)])
        x1, y1 = rng.integers(0, width - 4), rng.integers(0, height - 4)
        x2, y2 = rng.integers(x1 + 4, width + 1), rng.integers(y1 + 4, height + 1)
        yield int(height), int(width), tuple(map(int, (x1, y1, x2, y2)))


def check_boxes(family: str, mllm: ch.MLLM, n: int) -> None:
    """Paint a region of one of two pictures, with text between them, at `n` sizes."""
    second = image_part(picture(50, 90, seed=1))
    for i, (height, width, box) in enumerate(sizes_and_boxes(n, seed=0)):
        image = np.asarray(picture(height, width))
        which = i % 2

        def tag(array, which=which):
            parts = [image_part(array), " and ", second]
            if which:
                parts.reverse()
            return mllm.tag(ask(*parts, evidence=[ch.Pages([which])]))

        tagged = tag(image)
        medium = tagged.media[which]
        assert np.array_equal(tagged.evidence, medium.tokens)
        seen = changed(family, tagged, tag(paint(image, box)))
        assert set(medium.tokens[medium.overlaps(box)]) <= seen, (height, width, box)
        assert seen <= near(family, medium, box), (height, width, box)


@pytest.mark.parametrize("family", GEOMETRY)
def test_painting_a_region_changes_its_tokens(family):
    check_boxes(family, tiny(family), 30)


FITTED = {
    "stretched": SiglipImageProcessor(size={"height": 56, "width": 56}),
    "padded": LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ),
}


@pytest.mark.parametrize("how", FITTED)
def test_other_ways_to_fit_a_picture_into_a_square(how):
    """LLaVA models with SigLIP's processor, and with the padding of the original LLaVA-1.5."""
    mllm = copy.copy(tiny("llava"))
    mllm.processor = copy.copy(mllm.processor)
    mllm.processor.image_processor = FITTED[how]
    check_boxes("llava", mllm, 12)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_pad": True, "size": {"shortest_edge": 80}},
        {"size": {"height": 80, "width": 80}},
    ],
)
def test_what_is_cropped_from_a_square_is_refused(settings):
    mllm = copy.copy(tiny("llava"))
    mllm.processor = copy.copy(mllm.processor)
    crop = {"height": 56, "width": 56}
    mllm.processor.image_processor = LlavaImageProcessor(crop_size=crop, **settings)
    with pytest.raises(ValueError, match="are cropped to 56"):
        mllm.tag(ask(image_part(picture(60, 200)), evidence=[ch.Pages([0])]))


@pytest.mark.skipif(
    not hasattr(Gemma3Processor, "images_kwargs"),
    reason="earlier releases take the switch of a single call alone",
)
def test_pan_and_scan():
    """Gemma 3's crops, two to four of them, side by side or one above the other."""
    mllm = copy.copy(tiny("gemma3"))
    mllm.processor = copy.copy(mllm.processor)
    mllm.processor.images_kwargs = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 28,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    tagged = mllm.tag(ask(image_part(picture(300, 60)), image_part(picture(90, 200))))
    assert [m.view.max() for m in tagged.media] == [4, 2]
    assert "here are some crops" in mllm.tokenizer.decode(tagged.ids)
    check_boxes("gemma3", mllm, 12)


@pytest.mark.parametrize("family", VIDEO)
def test_painting_a_frame_changes_its_tokens(family):
    mllm = tiny(family)
    rng = np.random.default_rng(1)
    for height, width, box in sizes_and_boxes(10, seed=2):
        frames = int(rng.integers(3, 8))
        frame = int(rng.integers(frames))
        video = film(frames, height, width)
        painted = video.copy()
        painted[frame] = paint(video[frame], box)
        sample = ask("At first:", video_part(video), evidence=[ch.Tube(0, {frame: box})])
        tagged = mllm.tag(sample)
        other = mllm.tag(ask("At first:", video_part(painted)))
        seen = changed(family, tagged, other)
        [medium] = tagged.media
        first, last = medium.frames.T
        then = set(medium.tokens[(first <= frame) & (frame < last)])
        assert set(tagged.evidence) <= seen <= near(family, medium, box) & then
        # of a tube the paper's constructions take the frames whole
        assert set(mllm.tag(sample, "counting").evidence) == then
        if family in ("qwen3_vl_moe", "glm4v", "glm4v_moe", "smolvlm"):
            assert set(mllm.tag(sample, "markers").evidence) == then
        else:
            with pytest.raises(ch.SampleError, match="nothing to wrap"):
                mllm.tag(sample, "markers")


@pytest.mark.parametrize("family", GEOMETRY)
def test_the_constructions_of_the_paper_find_the_same_pages(family):
    mllm = tiny(family)
    pages = [image_part(picture(70, 110, seed=i)) for i in range(3)]
    sample = ask(*pages, "And then? ", evidence=[ch.Pages([0, 2])])
    tagged = mllm.tag(sample)
    assert np.array_equal(mllm.tag(sample, "markers").evidence, tagged.evidence)
    assert np.array_equal(mllm.tag(sample, "counting").evidence, tagged.evidence)
    span = ask(*pages, "And then? ", evidence=[ch.Span("And then?")])
    tagged = mllm.tag(span)
    assert mllm.tokenizer.decode(tagged.ids[tagged.evidence]) == "And then?"
    assert np.array_equal(mllm.tag(span, "markers").evidence, tagged.evidence)


@pytest.mark.parametrize("family", ("llava_next", "idefics3"))
def test_counting_refuses_pages_of_different_lengths(family):
    """Where the family knows equal blocks alone."""
    pages = [image_part(picture(height, 300)) for height in (40, 300)]
    sample = ask(*pages, evidence=[ch.Pages([0])])
    with pytest.raises(ch.SampleError, match=r"blocks of .*geometry"):
        tiny(family).tag(sample, "counting")


@pytest.mark.parametrize("family", sorted(set(GEOMETRY) - {*VIDEO, "qwen3_vl"}))
def test_families_without_videos_refuse_them(family):
    with pytest.raises(ch.SampleError, match="messages") as caught:
        tiny(family).tag(ask(video_part(film(2, 40, 40)), id="v3"))
    assert caught.value.sample_id == "v3"


def test_images_and_videos_of_one_token_are_kept_apart():
    """GLM-4V tells them apart by what stands around them, and its model reads one of the two."""
    parts = image_part(picture(60, 60)), video_part(film(2, 60, 60))
    with pytest.raises(ch.SampleError, match="one of the two at a time") as caught:
        tiny("glm4v").tag(ask(*parts, id="m1"))
    assert caught.value.sample_id == "m1"


def test_what_a_crop_leaves_out_maps_to_no_token():
    """LLaVA-1.5 sees the middle square alone; the whole page stays a page."""
    mllm = tiny("llava")
    image = image_part(picture(60, 200))
    with pytest.raises(ch.SampleError, match="maps to no token"):
        mllm.tag(ask(image, evidence=[ch.Region(0, (0, 0, 60, 60))]))
    assert len(mllm.tag(ask(image, evidence=[ch.Region(0, (60, 0, 80, 60))])).evidence)
    assert len(mllm.tag(ask(image, evidence=[ch.Pages([0])])).evidence) == 16


# --- scores and interventions


def question(text: str, *content, **options) -> ch.Sample:
    """A sample that says which text asks its question."""
    sample = ask(*content, question=text, **options)
    sample.question = text
    return sample


def samples_of(family: str) -> list[ch.Sample]:
    """Two questions on one context of pictures and text, and one in front of its picture."""
    if family in TEXT:
        records = "".join(f"key{i} is {i * i}. " for i in range(6))
        evidence = [[ch.Span("key1 is 1.")], [ch.Span("key5 is 25.")]]
        return [
            question(f"key{i}?", records, id=f"t{i}", evidence=piece, answer="at once")
            for i, piece in enumerate(evidence)
        ]
    first, second = picture(70, 110), picture(50, 60, seed=2)
    parts = image_part(first), "Page 1.", image_part(second)
    evidence = [[ch.Region(0, (30, 10, 70, 40))], [ch.Pages([1]), ch.Span("Page 1")]]
    samples = [
        question("Where" + "?" * i, *parts, id=f"s{i}", evidence=piece, answer="left")
        for i, piece in enumerate(evidence)
    ]
    # nothing can be shared where the question stands in front of the picture
    region = ch.Region(0, (40, 0, 60, 30))
    last = question("Is it?", id="r", evidence=[region], answer="no")
    last.messages[0]["content"].append(image_part(first))
    if family not in VIDEO:
        return [*samples, last]
    # two seconds a frame: Qwen2.5-VL's positions depend on it
    tube = ch.Tube(0, {1: (0, 0, 30, 30)})
    video = video_part(film(4, 60, 70), fps=0.5)
    moving = question("Which?", "Look:", video, id="v", evidence=[tube], answer="the first")
    return [*samples, last, moving]


@pytest.mark.parametrize("family", [*GEOMETRY, *TEXT])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_full_matrices(family, batch_size):
    mllm = tiny(family)
    samples = samples_of(family)
    options = {"batch_size": batch_size, "on_error": "raise", "progress": False}
    scores = ch.score(mllm, samples, **options)
    for i, sample in enumerate(samples):
        row = scores.data.isel(sample=i)
        expected = brute_force(mllm, mllm.tag(sample))
        for name, values in expected.items():
            np.testing.assert_allclose(row[name], values, atol=1e-5, err_msg=name)
        blank = mllm.tag(with_question(sample, sample.question, NULL))
        np.testing.assert_allclose(
            row.null_evidence, brute_force(mllm, blank)["evidence"], atol=1e-5
        )


def answer_logprob(tagged: ch.TaggedSample, logits: torch.Tensor) -> float:
    """Of the whole answer, by the logits (N, V) of a sequence."""
    n = len(tagged.answer)
    log = logits[-n - 1 : -1].log_softmax(-1)
    ids = torch.from_numpy(tagged.ids[tagged.answer])
    return float(log[torch.arange(n), ids].sum())


@pytest.mark.parametrize("family", [*GEOMETRY, *TEXT])
@pytest.mark.parametrize(
    "mode, phase",
    [("zero", "both"), ("mean", "question"), ("knockout", "question"), ("patch", "last")],
)
def test_interventions_are_those_on_full_matrices(family, mode, phase):
    """Behind a shared prefix and alone, padded: logits by attention matrices and head outputs that are edited."""
    mllm = tiny(family)
    samples = samples_of(family)
    reference = given = None
    if mode in ("mean", "patch"):
        reference = samples
        names = [sample.id for sample in samples]
        donors = dict(zip(names, names[-1:] + names[:-1]))
        given = Reference(mllm, reference, donors if mode == "patch" else None)
    conditions = {"intact": None, "cut": Ablation(HEADS, mode, phase, given)}
    found = ch.evaluate(mllm, samples, conditions, batch_size=3, progress=False)
    found = found.set_index(["condition", "sample"]).logprob
    for sample in samples:
        tagged = mllm.tag(sample)
        logits = expected_logits(mllm, tagged, mode, phase, reference)
        expected = answer_logprob(tagged, logits)
        assert found["cut", sample.id] == pytest.approx(expected, abs=1e-4)
    assert abs(found["cut"] - found["intact"]).max() > 1e-6


# --- layers with a window


class Windows(Hook):
    """Notes the window of every layer."""

    def __init__(self):
        self.windows = {}

    def output(self, call, out):
        self.windows[call.layer] = call.window
        return out


def test_windows_are_those_that_the_layers_attend_by():
    """What the configuration says against what every layer hands to its attention function."""
    for family in [*GEOMETRY, *TEXT]:
        mllm = tiny(family)
        seen = Windows()
        run_unpadded(mllm, [mllm.tag(samples_of(family)[0])], seen.everywhere(mllm))
        assert [seen.windows[layer] for layer in range(mllm.n_layers)] == mllm.windows
    assert tiny("gemma3").windows == [12, None] and tiny("mistral").windows == [12, 12]
    assert "1 layers with a window of 12" in repr(tiny("gemma3"))
    assert "window" not in repr(tiny("llama"))


@pytest.mark.parametrize("family", ("gemma2", "gemma3", "mistral", "gemma3_text"))
@pytest.mark.parametrize("mode", ("zero", "knockout"))
def test_generate_under_an_ablation_of_windowed_layers(family, mode):
    """Token by token behind a cache, what forward passes without one give; roles know keys outside the window, too."""
    mllm = tiny(family)
    sample = samples_of(family)[1]
    sample.answer = None
    tagged = mllm.tag(sample)
    known = tagged if mode == "knockout" else None
    inputs = tagged.inputs
    with ch.ablate(mllm, HEADS, mode, "question" if known else "both", tagged=known):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        found = mllm.model.generate(**inputs, **options)[0, len(tagged.ids) :]
        for token in found.tolist():
            logits = mllm.model(**inputs, use_cache=False).logits[0, -1]
            assert token == int(logits.argmax())
            inputs = with_text(inputs, inputs["input_ids"].shape[1], [token])
        if known:
            cache = DynamicCache(config=mllm.text_config)
            cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
            decoder = mllm.decoder
            with pytest.raises(ValueError, match=r"begin with an empty DynamicCache"):
                decoder(input_ids=inputs["input_ids"], **{CACHE: cache})


def streaming(full: ch.HeadSet, window: int, sinks: int) -> dict:
    """Edits for the oracle: what streaming heads must not see."""

    def edit(layer):
        def before(logits):
            rows, keys = logits.shape[2:]
            i = torch.arange(keys - rows, keys)[:, None]
            j = torch.arange(keys)
            hidden = (i - j > window) & (j >= sinks)
            streams = ~torch.tensor(full.mask[layer])[:, None, None]
            return logits.masked_fill(hidden & streams, -torch.inf)

        return before, None

    return {layer: edit(layer) for layer in range(len(full.mask))}


# layer 0 has a window of its own; of layer 1 a whole KV group is full, or single heads of both
HYBRIDS = {
    "group": ch.HeadSet.of([*((0, h) for h in range(6)), (1, 0), (1, 1), (1, 2)], (2, 6)),
    "mixed": ch.HeadSet.of([*((0, h) for h in range(6)), (1, 2), (1, 3)], (2, 6)),
}


@pytest.mark.parametrize("family", ("gemma2", "gemma3", "gemma3_text"))
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_attention_beside_layers_with_a_window(family, name):
    mllm, full = tiny(family), HYBRIDS[name]
    condition = ch.HybridAttention(full, window=9, sinks=3)
    samples = samples_of(family)
    found = ch.evaluate(mllm, samples, {"hybrid": condition}, progress=False)
    for sample, logprob in zip(samples, found.logprob):
        tagged = mllm.tag(sample)
        with oracle(mllm, streaming(full, 9, 3)):
            logits = logits_of(mllm, tagged)
        assert logprob == pytest.approx(answer_logprob(tagged, logits), abs=1e-4)
    ids = torch.arange(10, 70)[None]
    with ch.hybrid_attention(mllm, full, window=9, sinks=3), torch.no_grad():
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        written = mllm.model.generate(input_ids=ids, **options)
        logits = mllm.model(input_ids=written, use_cache=False).logits[0, 59:-1]
    assert torch.equal(logits.argmax(-1), written[0, 60:])
    with oracle(mllm, streaming(full, 9, 3)), torch.no_grad():
        expected = mllm.model(input_ids=written).logits[0, 59:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ("gemma3", "gemma3_text", "mistral"))
def test_hybrid_attention_refuses_layers_with_a_window(family):
    mllm = tiny(family)
    layers = r"\[0, 1\]" if family == "mistral" else r"\[0\]"
    with (
        pytest.raises(
            ValueError, match=f"layers {layers} have a window of their own.*as full"
        ),
        ch.hybrid_attention(mllm, [(0, 0)], 4),
    ):
        pass


# what norms the sum of a layer's heads, and what Gemma adds to a norm's weights
NORMS = {
    "gemma3_text": ("post_attention_layernorm", 1),
    "glm4v": ("post_self_attn_layernorm", 0),
}


@pytest.mark.parametrize("family", NORMS)
def test_what_heads_write_passes_the_norm_behind_them(family):
    """The direct logits go through the weights of the norm behind the heads, and the last norm's."""
    mllm = copy.deepcopy(tiny(family))
    decoder = mllm.decoder
    name, one = NORMS[family]
    torch.manual_seed(0)
    for layer in decoder.layers:
        torch.nn.init.normal_(getattr(layer, name).weight)
    sample = samples_of(family)[1]
    sample.answer = "5"
    options = {"candidates": "0123456789", "progress": False}
    found = circuits.answer_written(mllm, [sample], **options)
    tokens = mllm.tokenizer("0123456789")["input_ids"]
    weights = mllm.model.get_output_embeddings().weight[tokens]
    written = circuits.written(mllm, [sample], progress=False).isel(sample=0)
    for index, layer in enumerate(decoder.layers):
        # an answer of one token has one row that predicts it
        vectors = torch.from_numpy(written.values[index]) * (
            one + getattr(layer, name).weight
        )
        said = (vectors * (one + decoder.norm.weight) @ weights.T).argmax(-1)
        assert np.array_equal(found.values[0, index], (said == 5).numpy())


@torch.no_grad()
def test_internvl_with_a_mixture_of_experts():
    """InternVL 3.5 comes with Qwen3's experts as well: another decoder, and the family stays."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mllm = tiny_model("internvl", text={"model_type": "qwen3_moe"} | experts)
    assert "Qwen3MoeModel" in type(mllm.decoder).__name__
    sample = samples_of("internvl")[0]
    scores = ch.score(mllm, [sample], null=False, on_error="raise", progress=False)
    for name, values in brute_force(mllm, mllm.tag(sample)).items():
        np.testing.assert_allclose(scores.data.isel(sample=0)[name], values, atol=1e-5)


# what InternVL 3.5 comes with, too; and Qwen3.5's layers
REFUSED = {
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "learned sinks"),
    "qwen3_5_text": (
        {"layer_types": ["linear_attention", "full_attention"]},
        r"layers \[0\] have no softmax attention",
    ),
}


@pytest.mark.parametrize("decoder", REFUSED)
def test_decoders_that_attend_in_another_way_are_refused(decoder):
    text, problem = REFUSED[decoder]
    with pytest.raises(ValueError, match=f"'{decoder}' are not supported: .*{problem}"):
        tiny_model("internvl", text={"model_type": decoder} | text)
