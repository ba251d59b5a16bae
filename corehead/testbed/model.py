"""The tiny MLLMs: real transformers classes, real processors, built without a download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .generator import CELL, SPECIALS, VOCABULARY

# The question stands right behind the context and the answer right behind the question: no role words.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<|im_end|>{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
PATCH = CELL // 2
TILE = 3 * CELL  # pixels; a page of the testbed and a frame of its videos are one tile
MEDIA = {  # what the template writes for an image and for a video
    "qwen3_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    "internvl": ("<IMG_CONTEXT>\n", "<video>\n"),
    "llava_onevision": ("<image>\n", "<video>\n"),
}
NAMED = {  # special tokens that a processor asks its tokenizer for
    "qwen3_vl": {},
    "internvl": dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    ),
    "llava_onevision": dict(image_token="<image>", video_token="<video>"),
}
WORDS = {"internvl": ("Frame", ":")}  # that a processor writes between visual tokens


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words and digits, the same ids in every family; what a family needs besides stands behind them."""
    words = VOCABULARY | {w: len(VOCABULARY) + i for i, w in enumerate(WORDS.get(family, ()))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("isolated")]
    )
    named = NAMED[family]
    core.add_special_tokens([*SPECIALS, *named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        **(dict(extra_special_tokens=named) if named else {}),
    )


def name_tokens(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    """Give a tokenizer of another origin the special tokens that a family's processor asks for by name."""
    named = NAMED[family]
    tokenizer.add_special_tokens({"extra_special_tokens": list(named.values())})
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


def build_processor(family: str = "qwen3_vl") -> ProcessorMixin:
    """The family's own processor with a vocabulary of words.

    qwen3_vl : 8 px patches, 2 x 2 merge: a cell is one token; no resizing below 32768 cells.
    internvl : tiles of 3 x 3 cells, 8 px patches, pixel shuffle 2 x 2: a cell of a tile is one token; a thumbnail.
    llava_onevision : views of 3 x 3 cells, 8 px patches: a cell of a view is four tokens; pictures of 6 x 6 cells are
        four crops whose features are halved to one token a cell (anyres_max_1), frames likewise.
    """
    tokenizer = _tokenizer(family)
    options = dict(chat_template=CHAT_TEMPLATE.replace("IMAGE", MEDIA[family][0]).replace("VIDEO", MEDIA[family][1]))
    look = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    size = {"height": TILE, "width": TILE}
    if family == "internvl":
        return InternVLProcessor(
            GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=9, **look),
            tokenizer,
            InternVLVideoProcessor(size=size, **look),
            image_seq_length=(TILE // CELL) ** 2,
            **options,
        )
    if family == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_pinpoints(), **look),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=size, **look),
            num_image_tokens=(TILE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_1",
            **options,
        )
    look |= dict(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": CELL**2, "longest_edge": CELL**2 * 32768},
    )
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**look),
        tokenizer,
        Qwen3VLVideoProcessor(**look, do_sample_frames=False, cap_pixels_per_frame=False),
        **options,
    )


def _pinpoints() -> list[list[int]]:
    return [[a * TILE, b * TILE] for a in range(1, 4) for b in range(1, 4)]


def build_model(
    layers: int = 12,
    heads: int = 16,
    kv_heads: int = 4,
    hidden: int = 128,
    intermediate: int = 256,
    head_dim: int = 16,
    seed: int = 0,
    family: str = "qwen3_vl",
) -> PreTrainedModel:
    """A random model of a family that can be trained at this size.

    Linear weights have standard deviation 1 / sqrt(fan in), embeddings 0.5 (transformers' 0.02 stalls at this width);
    Qwen3-VL's deepstack merger starts at zero.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer(family)
    ids = tokenizer.get_vocab()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
        rope_parameters=rope,
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        bos_token_id=None,
    )
    # a token of LLaVA-OneVision sees a quarter of a cell and must gather the rest by attention, which takes width
    vision = dict(zip(("hidden_size", "intermediate_size"), (128, 512) if family == "llava_onevision" else (64, 256)))
    if family == "internvl":
        config = InternVLConfig(
            text_config=dict(text, model_type="qwen3"),
            vision_config=vision
            | dict(
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=[TILE, TILE],
                patch_size=[PATCH, PATCH],
                layer_scale_init_value=1.0,
            ),
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=(TILE // CELL) ** 2,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config)
    elif family == "llava_onevision":
        config = LlavaOnevisionConfig(
            text_config=dict(text, model_type="qwen2"),
            vision_config=vision
            | dict(
                model_type="siglip_vision_model",
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=TILE,
                patch_size=PATCH,
                vision_use_head=False,
            ),
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=_pinpoints(),
            vision_aspect_ratio="anyres_max_1",
            tie_word_embeddings=False,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
    else:
        sections = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
        text["rope_parameters"] = rope | {"mrope_section": sections, "mrope_interleaved": True}
        config = Qwen3VLConfig(
            text_config=text,
            vision_config=vision
            | dict(
                depth=2,
                num_heads=4,
                patch_size=PATCH,
                spatial_merge_size=2,
                temporal_patch_size=2,
                out_hidden_size=hidden,
                num_position_embeddings=256,
                deepstack_visual_indexes=[0],
            ),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
        model = Qwen3VLForConditionalGeneration(config)
    # Qwen3-VL's tower knows places by its rotary embedding too, the others' by a learned one alone
    known = {"embed_tokens": 0.5, "pos_embed": 0.02, "position_embedding": 0.3}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = next((known[part] for part in known if part in name), weight[0].numel() ** -0.5)
            torch.nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    if family == "qwen3_vl":
        for merger in model.model.visual.deepstack_merger_list:
            torch.nn.init.zeros_(merger.linear_fc2.weight)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model
