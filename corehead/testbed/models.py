"""Small MLLMs of every family, built without a download: real transformers classes, real processors, no knowledge.

`untrained` gives those that `corehead.testbed.training` trains, `tiny` those that tests need: their geometry is real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from ..models import MLLM
from .scenes import ART, OWN_WORDS, VOCABULARY

# What a chat template writes for a message, and around it: IMAGE and VIDEO are the family's placeholders.
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    + CONTENT
    + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No role words: the question stands right behind the context, and the answer right behind the question.
PLAIN = (
    "{% for message in messages %}"
    + CONTENT
    + "{% if message.role == 'assistant' %}<|im_end|>"
    "{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
# pixels from -1 to 1, in every family
LOOK = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FAMILIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
TINY_DECODERS = FAMILIES.pop("tiny_decoders")


def _qwen(family, tokenizer, template, text, vision, patch, most):
    """At most `most` tokens of 2 x 2 patches a picture; nothing that has fewer is resized."""
    area = (2 * patch) ** 2
    pixels = {"shortest_edge": area, "longest_edge": area * most}
    look = LOOK | {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": pixels,
    }
    of_prompt, of_image, of_video = QWEN[family]
    processor = of_prompt(
        of_image(**look),
        tokenizer,
        # all frames as they are given: the evidence names them by number
        of_video(**look, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=template,
    )
    # M-RoPE: half of head_dim are rotary frequencies, shared among time (which gets the rest), height and width
    third = text["head_dim"] // 6
    sections = [text["head_dim"] // 2 - 2 * third, third, third]
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": sections,
    }
    if family.startswith("qwen3"):
        rope["mrope_interleaved"] = True
    start, end, image, video, *_ = tokenizer.convert_tokens_to_ids(
        list(FAMILIES[family]["tokens"].values())
    )
    border = "image" if family.startswith("glm") else "vision"
    # what the vision tower hands to the decoder is as wide as the decoder
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    config = AutoConfig.for_model(
        family,
        text_config={"rope_parameters": rope} | text,
        vision_config=vision | {"patch_size": patch, out: text["hidden_size"]},
        image_token_id=image,
        video_token_id=video,
        **{f"{border}_start_token_id": start, f"{border}_end_token_id": end},
    )
    return config, processor


# each with its processor, and those of its images and videos
QWEN = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor),
    "qwen3_vl_moe": (Qwen3VLProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor),
    "glm4v": (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor),
    "glm4v_moe": (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor),
}


def _internvl(family, tokenizer, template, text, vision, side, patch, most):
    """At most `most` tiles of a picture and a thumbnail; a token is a pixel shuffle of 2 x 2 patches."""
    size = {"height": side, "width": side}
    tokens = (side // patch // 2) ** 2  # processor and model must agree on it
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=most, **LOOK
        ),
        tokenizer,
        InternVLVideoProcessor(size=size, **LOOK),
        image_seq_length=tokens,
        chat_template=template,
    )
    config = AutoConfig.for_model(
        "internvl",
        text_config={"model_type": "qwen3"} | text,
        vision_config=vision | {"image_size": [side, side], "patch_size": [patch, patch]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    return config, processor


def _llava_onevision(family, tokenizer, template, text, vision, side, patch, most, aspect):
    """At most `most` x `most` crops of a picture, and all of it; their features are halved where `aspect` says so."""
    size = {"height": side, "width": side}
    pinpoints = _pinpoints(side, most)
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints, **LOOK),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size, **LOOK),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
        chat_template=template,
    )
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config={"model_type": "qwen2"} | text,
        vision_config=vision | _siglip(side, patch),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=aspect,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    return config, processor


def _siglip(side: int, patch: int) -> dict:
    """A SigLIP tower, with a feature for each patch and none for the whole picture."""
    return {
        "model_type": "siglip_vision_model",
        "image_size": side,
        "patch_size": patch,
        "vision_use_head": False,
    }


def _pinpoints(side: int, most: int) -> list[list[int]]:
    """Every grid of crops: the processor takes the one that fits a picture best."""
    edges = range(side, side * most + 1, side)
    return [[height, width] for height in edges for width in edges]


def _llava(family, tokenizer, template, text, vision, side, patch, most=1):
    """The middle of a picture; LLaVA-NeXT: all of it, and at most `most` x `most` crops."""
    edges = {"shortest_edge": side}
    square = {"height": side, "width": side}
    pinpoints = {}
    image_processor = CLIPImageProcessor(size=edges, crop_size=square, **LOOK)
    if family == "llava_next":
        pinpoints = {"image_grid_pinpoints": _pinpoints(side, most)}
        image_processor = LlavaNextImageProcessor(
            size=edges, crop_size=square, **pinpoints, **LOOK
        )
    of_prompt = LlavaNextProcessor if family == "llava_next" else LlavaProcessor
    processor = of_prompt(
        image_processor,
        tokenizer,
        patch_size=patch,
        # CLIP's tower has a token for the whole picture, which "default" leaves out
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = AutoConfig.for_model(
        family,
        text_config={"model_type": "llama"} | text,
        vision_config=vision
        | {"model_type": "clip_vision_model", "image_size": side, "patch_size": patch},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **pinpoints,
    )
    return config, processor


def _gemma3(family, tokenizer, template, text, vision, side, patch, tokens):
    """A picture is stretched to a square of `tokens` tokens."""
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": side, "width": side}, **LOOK),
        tokenizer,
        chat_template=template,
        image_seq_length=tokens,
    )
    begin, end, image = tokenizer.convert_tokens_to_ids(
        list(FAMILIES[family]["tokens"].values())
    )
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision | _siglip(side, patch),
        mm_tokens_per_image=tokens,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
    )
    return config, processor


def _idefics3(family, tokenizer, template, text, vision, side, patch, most):
    """At most `most` tiles along the longer side of a picture, and all of it; a token is 2 x 2 patches."""
    look = LOOK | {
        "size": {"longest_edge": most * side},
        "max_image_size": {"longest_edge": side},
    }
    tokens = (side // patch // 2) ** 2
    options = {"image_seq_len": tokens, "chat_template": template}
    if family == "smolvlm":
        video_processor = SmolVLMVideoProcessor(**look)
        processor = SmolVLMProcessor(
            SmolVLMImageProcessor(**look), tokenizer, video_processor, **options
        )
    else:
        processor = Idefics3Processor(Idefics3ImageProcessor(**look), tokenizer, **options)
    config = AutoConfig.for_model(
        family,
        text_config={"model_type": "llama"} | text,
        vision_config=vision | {"image_size": side, "patch_size": patch},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, processor


def _pixtral(family, tokenizer, template, text, vision, patch, longest):
    """A picture at its own size, `longest` px at most; in Mistral 3 a token is 2 x 2 patches, in Pixtral 12B one."""
    merge = 2 if family == "mistral3" else 1
    merged = {"spatial_merge_size": merge}
    # Pixtral 12B is a LLaVA with another vision tower, which has a feature for each patch and no other
    whole = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": longest}, patch_size=patch, **LOOK),
        tokenizer,
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=template,
    )
    config = AutoConfig.for_model(
        "llava" if family == "pixtral" else family,
        text_config={"model_type": "mistral", "sliding_window": None} | text,
        vision_config=vision
        | {"model_type": "pixtral", "image_size": longest, "patch_size": patch},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
        **(whole if family == "pixtral" else merged),
    )
    return config, processor


BUILDERS = {
    **dict.fromkeys(QWEN, _qwen),
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "llava": _llava,
    "llava_next": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "mistral3": _pixtral,
    "pixtral": _pixtral,
}


def build(
    design: str, family: str, tokenizer: PreTrainedTokenizerBase, template: str, text: dict
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of a family and its processor.

    Parameters
    ----------
    design : str
        Which vision tower and geometry of models.yaml.
    family : str
        One of `BUILDERS` that has the design.
    tokenizer : PreTrainedTokenizerBase
        With the special tokens of the family's placeholders.
    template : str
        Chat template with IMAGE and VIDEO for the placeholders.
    text : dict
        Configuration of the decoder.

    Returns
    -------
    tuple of PreTrainedModel and ProcessorMixin
    """
    known = FAMILIES[family]
    for kind in ("image", "video"):
        template = template.replace(kind.upper(), known.get(kind, ""))
    vision, geometry = known[design]["vision"], known[design]["geometry"]
    builder = BUILDERS[family]
    config, processor = builder(family, tokenizer, template, text, vision, **geometry)
    return AutoModelForImageTextToText.from_config(config), processor


def fan_in_init(
    parameters: Iterable[tuple[str, torch.Tensor]], known: dict[str, float]
) -> None:
    """Normal weights of standard deviation 1 / sqrt(fan in), or what is `known` for a part of their name."""
    for name, weight in parameters:
        if weight.dim() > 1:  # biases and norms stay as they are
            std = next(
                (known[part] for part in known if part in name), weight[0].numel() ** -0.5
            )
            torch.nn.init.normal_(weight, std=std)


def _tokenizer(
    core: Tokenizer, family: str, special: tuple[str, ...], **options
) -> PreTrainedTokenizerFast:
    """A tokenizer with general special tokens, and those of a family behind them."""
    named = FAMILIES[family]["tokens"] if family in FAMILIES else {}
    core.add_special_tokens([*special, *named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=named,
        **options,
    )


def _word_tokenizer(family: str, own_words: bool = False) -> PreTrainedTokenizerFast:
    """The words of the scenes, the same ids in every family; what a family needs besides stands behind them."""
    known = VOCABULARY | OWN_WORDS if own_words else VOCABULARY
    between_frames = (
        ("Frame", ":") if family == "internvl" else ()
    )  # its processor writes them
    words = known | {word: len(known) + i for i, word in enumerate(between_frames)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(True),  # each a token
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    if own_words:
        core.add_tokens(list(OWN_WORDS))  # or they would be split at their signs
    return _tokenizer(
        core, family, ART["special"], unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def _byte_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _tokenizer(core, family, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def name_tokens(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    """Give a tokenizer of another origin the special tokens that a family's processor asks for by name."""
    named = FAMILIES[family]["tokens"]
    tokenizer.add_special_tokens({"extra_special_tokens": list(named.values())})
    # what extra_special_tokens= does when a tokenizer is made
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


def untrained(
    family: str = "qwen3_vl",
    layers: int = 12,
    heads: int = 16,
    kv_heads: int = 4,
    hidden: int = 128,
    intermediate: int = 256,
    head_dim: int = 16,
    seed: int = 0,
    own_words: bool = False,
) -> MLLM:
    """A random model that can be trained at this size, with a vocabulary of words.

    Linear weights have standard deviation 1 / sqrt(fan in), embeddings 0.5 (transformers' 0.02 stalls at this width);
    Qwen3-VL's deepstack merger starts at zero.

    Pictures: 8 px patches. qwen3_vl: a cell is one token. internvl: tiles of 3 x 3 cells, a cell of a tile is one
    token. llava_onevision: views of 3 x 3 cells, a cell of a view is four tokens; pictures of 6 x 6 cells are four
    crops whose features are halved to one token a cell, frames likewise.

    Parameters
    ----------
    family : str
        "qwen3_vl", "internvl" or "llava_onevision".
    layers, heads, kv_heads, hidden, intermediate, head_dim : int
        Of the decoder.
    seed : int
        Of the weights.
    own_words : bool
        A vocabulary in which each domain has words of its own besides, as `corehead.testbed.scenes.draw` may use them.

    Returns
    -------
    MLLM
    """
    torch.manual_seed(seed)
    tokenizer = _word_tokenizer(family, own_words)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2**15,  # long documents and videos
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    model, processor = build("testbed", family, tokenizer, PLAIN, text)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    # Qwen3-VL's tower knows positions by its rotary embedding too, the others' by a learned one alone
    known = {
        "embed_tokens": 0.5,
        "pos_embed": 0.02,
        "position_embedding": 0.3,
        "deepstack_merger_list.0.linear_fc2": 0,  # adds nothing until it has learnt
    }
    fan_in_init(model.named_parameters(), known)
    # what generate() ends and pads with, in the checkpoint too
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return MLLM(model, processor)


def tiny(
    family: str,
    *,
    real_tiles: bool = False,
    seed: int = 0,
    text: dict | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MLLM:
    """A tiny random model of a family.

    Parameters
    ----------
    family : str
        One of `BUILDERS`, or the model_type of a plain language model. "smolvlm" needs the package num2words.
    real_tiles : bool
        Image tiles and patches of the released checkpoints; otherwise small ones, for speed.
    seed : int
        Of the weights. Query and key weights are large, so that attention is far from uniform.
    text : dict or None
        What to change in the decoder's configuration.
    tokenizer : PreTrainedTokenizerBase or None
        Another one than a token a byte.

    Returns
    -------
    MLLM
    """
    torch.manual_seed(seed)
    processor = tokenizer or _byte_tokenizer(family)
    decoder = {
        "vocab_size": len(processor),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2**15,
    }
    # what an architecture needs beside: experts, layers with a window
    decoder |= TINY_DECODERS.get(family, {}) | (text or {})
    decoder.setdefault("head_dim", decoder["hidden_size"] // decoder["num_attention_heads"])
    if family in BUILDERS:
        model, processor = build(
            "real_tiles" if real_tiles else "tiny", family, processor, CHATML, decoder
        )
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **decoder))
        # the other stands for base models, which have no template
        processor.chat_template = CHATML if family == "llama" else None
    mllm = MLLM(model.eval(), processor, source=f"tiny-{family}")
    # near-uniform attention would hide what is wrong with masks and positions
    for layer in mllm.attentions:
        for projection in (layer.q_proj, layer.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.25)
    # Gemma 3's projector starts at zero, and all pictures would be alike
    for name, parameter in mllm.model.named_parameters():
        if "mm_input_projection" in name:
            torch.nn.init.normal_(parameter, std=0.25)
    return mllm


def save(mllm: MLLM, root: str | Path, hub_id: str | None = None) -> Path:
    """Write a checkpoint as the hub has it: configurations, safetensors in pieces with an index, processor files.

    Parameters
    ----------
    mllm : MLLM
        A tiny model.
    root : str or Path
        The folder; with a hub id, the folder that HF_HUB_CACHE names.
    hub_id : str or None
        "organisation/name", so that ``load(hub_id)`` finds it in the cache without a network.

    Returns
    -------
    Path
        The checkpoint's folder; with a hub id its name is the commit.
    """
    folder = Path(root)
    if hub_id is not None:
        # any 40 hexadecimal digits; by the id, so that it is the same again
        commit = hashlib.sha1(hub_id.encode()).hexdigest()
        repository = folder / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        folder = repository / "snapshots" / commit
    # small pieces, so that even a tiny model has several and an index
    mllm.model.save_pretrained(folder, max_shard_size="100KB")
    mllm.processor.save_pretrained(folder)
    return folder
