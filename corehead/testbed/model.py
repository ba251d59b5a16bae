"""The tiny MLLM: real transformers classes, a real processor, built without a download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .generator import SPECIALS, VOCABULARY

# The question stands right behind the context and the answer right behind the question: no role words.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<|im_end|>{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)


def build_processor() -> Qwen3VLProcessor:
    """A `Qwen3VLProcessor` with a vocabulary of words, 8 px patches, 2 x 2 merge, and no resizing below 1024 cells."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("isolated")]
    )
    core.add_special_tokens(list(SPECIALS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    options = dict(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 256 * 32768},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**options),
        tokenizer,
        Qwen3VLVideoProcessor(**options, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    layers: int = 12,
    heads: int = 16,
    kv_heads: int = 4,
    hidden: int = 128,
    intermediate: int = 256,
    head_dim: int = 16,
    seed: int = 0,
) -> Qwen3VLForConditionalGeneration:
    """A random `Qwen3VLForConditionalGeneration` that can be trained at this size.

    Linear weights have standard deviation 1 / sqrt(fan in), embeddings 0.5 (transformers' 0.02 stalls at this width);
    the deepstack merger starts at zero.
    """
    torch.manual_seed(seed)
    ids = VOCABULARY
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=32768,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
                "mrope_interleaved": True,
            },
            pad_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            bos_token_id=None,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=256,
            num_heads=4,
            patch_size=8,
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
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = 0.5 if "embed_tokens" in name else 0.02 if "pos_embed" in name else weight[0].numel() ** -0.5
            torch.nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model
