"""Tiny random models of every supported family with their real processors, built offline.

They know nothing; their geometry is real. Tests and the notebook on tagging need no more.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from ..models import MLLM
from .model import MEDIA, NAMED

TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32768,
)
# roles as ChatML writes them; a visual part becomes IMAGE or VIDEO
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges (a token a byte) and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special, *named.values()])
    extra = dict(extra_special_tokens=named) if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left", **extra
    )


def template(image: str, video: str) -> str:
    """The chat template with a family's placeholders."""
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def _qwen3_vl(real_tiles: bool, tokenizer=None, text=None):
    tokenizer = tokenizer or byte_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    options = dict(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * (4096 if real_tiles else 64)},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    video = Qwen3VLVideoProcessor(**options, do_sample_frames=False, cap_pixels_per_frame=False)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**options), tokenizer, video, chat_template=template(*MEDIA["qwen3_vl"])
    )
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(names))
    text = dict(TEXT, head_dim=8) | (text or {})
    third = text["head_dim"] // 2 // 3
    sections = [text["head_dim"] // 2 - 2 * third, third, third]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), rope_parameters=rope) | text,
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=16,
            out_hidden_size=text["hidden_size"],
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _internvl(real_tiles: bool, text=None):
    side, patch, unit = (448, 14, 16) if real_tiles else (56, 7, 4)  # a tile is unit x unit tokens
    tokenizer, size = byte_tokenizer(**NAMED["internvl"]), {"height": side, "width": side}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=12 if real_tiles else 6),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=unit * unit,
        chat_template=template(*MEDIA["internvl"]),
    )
    text = dict(TEXT, model_type="qwen3", vocab_size=len(tokenizer), head_dim=8) | (text or {})
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=[side, side],
        patch_size=[patch, patch],
    )
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=unit * unit,
    )
    return InternVLForConditionalGeneration(config), processor


def _llava_onevision(real_tiles: bool, text=None):
    side, patch, most = (384, 14, 6) if real_tiles else (56, 11, 3)  # neither patch divides its side
    limit = "anyres_max_9" if real_tiles else "anyres_max_4"
    pinpoints = [[a * side, b * side] for a in range(1, most + 1) for b in range(1, most + 1)]
    tokenizer, size = byte_tokenizer(**NAMED["llava_onevision"]), {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=limit,
        chat_template=template(*MEDIA["llava_onevision"]),
    )
    text = dict(TEXT, model_type="qwen2", vocab_size=len(tokenizer)) | (text or {})
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=limit,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _llama():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template("", "")
    return LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer))), tokenizer


def _qwen3():
    tokenizer = byte_tokenizer()
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8, vocab_size=len(tokenizer))), tokenizer


_MULTIMODAL = dict(qwen3_vl=_qwen3_vl, internvl=_internvl, llava_onevision=_llava_onevision)
_TEXT_ONLY = dict(llama=_llama, qwen3=_qwen3)


def tiny(family: str, *, real_tiles: bool = False, seed: int = 0, **options) -> MLLM:
    """A tiny random model of a family.

    Parameters
    ----------
    family : "qwen3_vl", "internvl", "llava_onevision", "llama" or "qwen3".
    real_tiles : image tiles and patches of the released checkpoints; otherwise small ones, for speed.
    seed : of the weights. Query and key weights are large, so that attention is far from uniform.
    **options : for the multimodal families, text= what to change in the decoder's configuration; for qwen3_vl alone,
        tokenizer= another one.

    Returns
    -------
    MLLM
    """
    torch.manual_seed(seed)
    build = _MULTIMODAL.get(family)
    model, processor = build(real_tiles, **options) if build else _TEXT_ONLY[family]()
    mllm = MLLM(model.eval(), processor, source=f"tiny-{family}")
    for layer in mllm.attentions:
        for projection in (layer.q_proj, layer.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.25)
    return mllm


def save(mllm: MLLM, root: str | Path, hub_id: str | None = None) -> Path:
    """Write a checkpoint as the hub has it: configurations, safetensors in pieces with an index, processor files.

    Parameters
    ----------
    mllm : a tiny model.
    root : the folder; with a hub id, the folder that HF_HUB_CACHE names.
    hub_id : "organisation/name", so that ``load(hub_id)`` finds it in the cache without a network.

    Returns
    -------
    Path, the checkpoint's folder; with a hub id its name is the commit
    """
    root = Path(root)
    if hub_id is None:
        mllm.model.save_pretrained(root, max_shard_size="100KB")
        mllm.processor.save_pretrained(root)
        return root
    repository = root / f"models--{hub_id.replace('/', '--')}"
    fresh = save(mllm, repository / "snapshots" / "fresh")
    files = sorted(file.read_bytes() for file in fresh.iterdir())
    commit = hashlib.sha1(b"".join(files)).hexdigest()
    folder = fresh.rename(fresh.with_name(commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder
