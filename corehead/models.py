"""MLLM: a transformers model, its processor and its family; load() finds and checks a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .attention import capped
from .families import FAMILIES, Family, family_of
from .samples import Sample

if TYPE_CHECKING:
    from .tagging import TaggedSample

GIB = 2**30
# tokens that the decoder computes at once: many keep a GPU busy, and activations are of one chunk at a time
PREFILL_CHUNK = 2**13


@dataclass(eq=False)
class MLLM:
    """A language model, multimodal or not, with what corehead needs to know of it.

    Parameters
    ----------
    model : PreTrainedModel
        A transformers model of a supported family, of any dtype and with any attention. It is put in eval mode. Of one
        that torch.compile or PEFT wraps, what is inside is taken: adapters stay in its layers, and what is compiled
        runs as it was written while corehead looks.
    processor : ProcessorMixin or PreTrainedTokenizerBase, optional
        Its processor (a tokenizer for plain language models); None for bare token ids.
    source : str
        Where it came from, for provenance.
    revision : str, optional
        Commit or tag, for provenance.

    Raises
    ------
    ValueError
        The architecture or its decoder is not supported, or PEFT adds a prompt, which is no part of the model inside.
    """

    model: PreTrainedModel
    processor: Any = None
    source: str = ""
    revision: str | None = None
    family: Family = field(init=False)

    def __post_init__(self):
        self.model = getattr(self.model, "_orig_mod", self.model)
        if hasattr(self.model, "get_base_model"):
            inside = self.model.get_base_model()
            # PEFT has nothing else to give where a learned prompt stands in front of the tokens
            if inside is getattr(self.model, "base_model", None):
                raise ValueError(
                    "the model has a learned prompt, whose tokens corehead cannot see"
                )
            self.model = inside
        self.family = family_of(self.model.config)
        self._check_decoder()
        self.model.eval()

    def _check_decoder(self):
        """Some families come with decoders that attend in a way which attention weights alone do not tell."""
        layers = dict(enumerate(self.decoder.layers))
        kind = f"decoders of model_type {self.text_config.model_type!r} are not supported"
        # a state goes from token to token, and no mask keeps the questions apart that share a context
        recurrent = [i for i in layers if not hasattr(layers[i], "self_attn")]
        if recurrent:
            raise ValueError(f"{kind}: layers {recurrent} have no softmax attention")
        if any(hasattr(layer.self_attn, "sinks") for layer in layers.values()):
            raise ValueError(
                f"{kind}: attention weights do not sum to one, because there are learned sinks"
            )

    @cached_property
    def text_config(self) -> PretrainedConfig:
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def n_heads(self) -> int:
        """Query heads a layer."""
        return self.text_config.num_attention_heads

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, query heads a layer)."""
        return self.n_layers, self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.text_config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.attentions[0].head_dim

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that holds `layers`."""
        return self.family.decoder(self.model)

    @property
    def attentions(self) -> list[torch.nn.Module]:
        """The self-attention module of every decoder layer."""
        return [layer.self_attn for layer in self.decoder.layers]

    def o_proj(self, layer: int) -> torch.Tensor:
        """What the heads of a layer write with, (hidden, H * D).

        Raises
        ------
        ValueError
            The weight alone does not say it: there is an adapter beside it, or it is packed.
        """
        linear = self.attentions[layer].o_proj
        if type(linear) is not torch.nn.Linear:
            raise ValueError(
                f"o_proj of layer {layer} is a {type(linear).__name__}: merge adapters into the model "
                "(merge_and_unload), or load it without quantisation"
            )
        return linear.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the vocabulary, by what the decoder's last norm gives, (..., hidden) to (..., V)."""
        logits = self.model.get_output_embeddings()(hidden)
        # Gemma 2 bounds these as well as those of attention
        return capped(logits, getattr(self.text_config, "final_logit_softcapping", None))

    @property
    def windows(self) -> list[int | None]:
        """How many of the last keys each layer sees, a row's own included; None is all."""
        config = self.text_config
        window = getattr(config, "sliding_window", None)
        # where layers are all of one kind, some configurations name none
        kinds = (
            getattr(config, "layer_types", None) or ["sliding_attention"] * self.n_layers
        )
        return [window if kind == "sliding_attention" else None for kind in kinds]

    @property
    def device(self) -> torch.device:
        """Where token ids go in; layers may be on others."""
        return device_of(self.model.get_input_embeddings())

    @property
    def tokenizer(self) -> Any:
        if self.processor is None:
            raise ValueError(
                "this MLLM was made without a processor: pass processor=, or give TaggedSamples"
            )
        return getattr(self.processor, "tokenizer", self.processor)

    def tag(self, sample: Sample, construction: str = "geometry") -> TaggedSample:
        """Tokenise a sample by the model's own processor and find its tokens.

        Parameters
        ----------
        sample : Sample
            Messages, evidence, answer.
        construction : {"geometry", "markers", "counting"}
            Geometry is for any evidence, markers (eqs. 6-8, 11-13, 15-17) for Pages, Frames and Span, counting (eqs.
            9-10, 14, 18-19) for Pages and Frames. All three give the same evidence tokens wherever they apply. Of a
            Tube the paper's two take the frames whole.

        Returns
        -------
        TaggedSample

        Raises
        ------
        SampleError
            Evidence that does not fit the sample, media that cannot be read, a prompt that is too long. The message
            names sample, field and fix.
        """
        # the one thing here that needs tagging, which comes later in the package
        from .tagging import Prompt

        return Prompt(self, sample).tag(construction)

    def __repr__(self) -> str:
        name = self.source or type(self.model).__name__
        heads = f"{self.n_layers} layers x {self.n_heads} heads ({self.n_kv_heads} KV)"
        windows = [window for window in self.windows if window is not None]
        if windows:
            heads += f", {len(windows)} layers with a window of {windows[0]}"
        size = f"{self.model.num_parameters():,} parameters in {self.model.dtype}"
        return f"MLLM({name}: {self.family.name}, {heads}, {size.replace('torch.', '')})"


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate takes them to if they are offloaded."""
    weight = next(module.parameters())
    if not weight.is_meta:
        return weight.device
    # accelerate leaves a placeholder on "meta", and its hook loads the weights whenever the module runs
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    return next(
        (torch.device(h.execution_device) for h in hooks if h is not None), weight.device
    )


@dataclass(frozen=True)
class Memory:
    """What scoring takes, in bytes.

    Attributes
    ----------
    weights : int
        Parameters and buffers.
    cache : int
        Keys and values of all tokens in all layers.
    work : int
        Embeddings of all tokens, with the vision tower's features for the first layers (deepstack); one layer over one
        chunk, one layer's keys in float32, and the attention rows that are read.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def memory(
    source: str | Path | PretrainedConfig,
    dtype: str | torch.dtype = "auto",
    *,
    tokens: int = 0,
) -> Memory:
    """What it takes to score a prompt, from the configuration alone: nothing is loaded.

    Parameters
    ----------
    source : str, Path or PretrainedConfig
        A checkpoint's folder or hub id, of which config.json is read, or a configuration.
    dtype : str or torch.dtype
        As for `load`; "auto" is the one that the checkpoint was saved in.
    tokens : int
        Length of the context; 0 counts the weights alone.

    Returns
    -------
    Memory
        In bytes.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load`.

    Examples
    --------
    >>> print(ch.models.memory("Qwen/Qwen3-VL-8B-Instruct", "bfloat16", tokens=131072))
    """
    config = (
        source if isinstance(source, PretrainedConfig) else _read_config(_find(str(source)))
    )
    dtype = _dtype(config, dtype)
    # on "meta" tensors have shapes and no memory; tied weights are one parameter, and count once
    with torch.device("meta"):
        model = family_of(config).auto_model.from_config(config, dtype=dtype)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    if not tokens:
        return Memory(weights, 0, 0)
    text = config.get_text_config()
    head_dim = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    keys = text.num_key_value_heads * head_dim * tokens  # of one layer
    deepstack = getattr(
        getattr(config, "vision_config", None), "deepstack_visual_indexes", ()
    )
    features = (1 + len(deepstack)) * tokens * text.hidden_size
    heads = text.num_attention_heads * head_dim
    # roughly what one layer holds at once: residual stream and norms, queries and outputs of heads, the MLP's three
    width = 6 * text.hidden_size + 4 * heads + 3 * text.intermediate_size
    layer = min(tokens, PREFILL_CHUNK) * width
    float32 = 4 * (
        2 * keys + 4 * 2**26
    )  # keys and their transpose, blocks of attention rows
    return Memory(
        weights=weights,
        cache=2 * text.num_hidden_layers * keys * dtype.itemsize,
        work=(features + layer) * dtype.itemsize + float32,
    )


def _dtype(
    config: PretrainedConfig, dtype: str | torch.dtype, device: str | None = None
) -> torch.dtype:
    """A dtype by name: see `load`. Without a device, as on a GPU."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if dtype == "fastest":
        slow = on_cpu and not torch.cpu._is_amx_tile_supported()
        return torch.float32 if slow else torch.bfloat16
    if dtype != "auto":
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            names = "'auto', 'fastest', 'float32', 'bfloat16' or 'float16'"
            raise ValueError(f"dtype={dtype!r}: take {names}")
        return found
    # a configuration may hold its dtype as a string, or none at all
    saved = _dtype(config, config.dtype or torch.float32)
    # float16 on disk is for size: CPUs compute it slowly and imprecisely
    return torch.float32 if on_cpu and saved == torch.float16 else saved


def _check_device(device: str) -> None:
    try:
        if device != "auto":
            torch.empty(0, device=torch.device(device))
    # each backend raises a kind of its own
    except Exception as error:
        said = str(error).splitlines()[0].rstrip(".")
        fix = "take 'cpu', 'auto', or what torch.accelerator.current_accelerator() names"
        raise ValueError(f"device={device!r} is not there ({said}): {fix}") from error


def free_memory(device: str) -> int:
    """Bytes of free memory on a device; for "auto" on all of them."""
    if device == "auto":  # layers that fit on no GPU stay in the host's memory
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        return sum(map(free_memory, [*gpus, "cpu"]))
    if torch.device(device).type == "cuda":
        # what torch holds and does not use is free as well
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


def _require_memory(
    name: str, config: PretrainedConfig, dtype: torch.dtype, device: str
) -> None:
    # before loading, because a process that runs out of memory may be killed without a word
    need = memory(config, dtype).weights
    free = free_memory(device)
    if need > free:
        raise MemoryError(
            f"{name}: its weights take {need / GIB:.1f} GiB in {dtype}, but {device} has {free / GIB:.1f} GiB free. "
            "Take dtype='bfloat16', device='auto' (all GPUs and the host's memory), or a smaller checkpoint"
        )


def _find(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint's config.json: the one given, or that of a hub id in the hub's cache."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    # whatever looks like a path is one: the hub would only say that it has no such repository
    hub_id = name.count("/") == 1 and not name.startswith(("data/", "."))
    if folder.is_dir() or folder.is_absolute() or not hub_id:
        fix = "Give a checkpoint's folder, or a hub id"
        if folder.with_name(f"{folder.name}.yaml").is_file():
            fix = f"`make testbed MODELS={folder.name}` trains it"
        raise FileNotFoundError(f"{name}: no such folder, or no config.json in it. {fix}")
    page = f"https://huggingface.co/{name}"
    fetch = f"`hf download {name}" + (f" --revision {revision}`" if revision else "`")
    try:
        # config.json alone: architecture and memory are checked before gigabytes are fetched
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (OSError, HFValidationError) as error:
        if isinstance(error, GatedRepoError):
            fix = f"Ask for access at {page}, then `hf auth login` and {fetch}"
        elif isinstance(error, RevisionNotFoundError):
            fix = f"There is no revision {revision!r}. Take a branch, tag or commit that {page}/tree/main lists"
        else:
            fix = f"With a network, {fetch} fetches it; without one, give the folder"
        said = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(f"{name}: cannot be loaded ({said}). {fix}") from error


def _read_config(folder: Path) -> PretrainedConfig:
    """The configuration in a folder, of a supported architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # an architecture that transformers does not know, with code of its own or without
    except ValueError as error:
        raise ValueError(
            f"{folder}: its model_type is not supported; {', '.join(FAMILIES)} are. Code that a checkpoint brings "
            "along is not run: take the checkpoint in transformers' own format (InternVL's end in -HF)"
        ) from error
    family_of(config)
    if quantised := getattr(config, "quantization_config", None):
        method = (
            quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised
        )
        raise ValueError(
            f"{folder}: its weights are quantised ({method}), which needs a package of its own: load it by "
            "transformers, and wrap it: corehead.MLLM(model, processor)"
        )
    return config


def _explain(folder: Path, error: Exception) -> str:
    """Why weights could not be read, and the fix, where the error itself does not say so."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            # this reads the header, which says how long the file must be
            with safe_open(file, "pt"):
                pass
        except SafetensorError as damage:
            return f"{file.name} is damaged or cut off ({damage}). Fetch it again"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not files:
        return (
            f"there are pickled weights alone ({pickled[0]}), and reading those can run code. Take a revision with "
            f"safetensors, or, where you trust the file, let transformers convert it: from_pretrained({str(folder)!r}, "
            f"use_safetensors=False).save_pretrained({str(folder)!r})"
        )
    return f"{error}. Fetch or train the checkpoint again"


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    revision: str | None = None,
) -> MLLM:
    """Load a checkpoint from a folder or the hub.

    Parameters
    ----------
    source : str or Path
        A folder, or a hub id such as "Qwen/Qwen3-VL-8B-Instruct". With HF_HUB_OFFLINE=1 the hub's cache is read alone.
        Weights are read from safetensors only, and code that a checkpoint brings along is not run.
    dtype : str or torch.dtype
        "auto", "fastest", "float32", "bfloat16", "float16" or a torch dtype. "auto" is as saved, but float16 becomes
        float32 on a CPU. "fastest" is bfloat16 on GPUs (Ampere and later are meant) and on CPUs with matrix units for
        it (AMX), and float32 on other CPUs, which would take several times as long in 16 bits. A printed `MLLM` says
        which it is.
    device : str
        "cpu", "cuda", "cuda:1" ..., or "auto" to spread the layers over what there is.
    revision : str, optional
        Branch, tag or commit on the hub; None is its main branch. `MLLM.revision` is the commit.

    Returns
    -------
    MLLM
        In eval mode.

    Raises
    ------
    FileNotFoundError
        No such folder, and not to be had from the hub.
    MemoryError
        The weights do not fit on the device: see `memory`.
    ValueError
        The architecture is not supported; a file of weights is missing, damaged, quantised or no safetensors; the
        weights do not fit the architecture; the dtype or device is not to be had; a revision is asked of a folder.
    """
    _check_device(device)
    name = str(source)
    folder = _find(name, revision)
    if revision is not None and Path(name).is_dir():
        raise ValueError(f"revision={revision!r}: {name} is a folder, and has but one")
    config = _read_config(folder)
    # the hub's cache names a snapshot's folder by its commit; a branch that moves meanwhile must not mix two of them
    if folder.parent.name == "snapshots":
        revision = folder.name
    dtype = _dtype(config, dtype, device)
    _require_memory(name, config, dtype, device)
    family = family_of(config)
    trusted = {"revision": revision, "trust_remote_code": False}
    # Where weights are missing transformers warns, and draws them at random. Here misfits of all kinds are collected,
    # to be refused together below.
    options = {
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    # with a device map weights go straight to where they belong
    if device != "cpu":
        options["device_map"] = device
    try:
        model, info = family.auto_model.from_pretrained(name, **options, **trusted)
    except (
        Exception
    ) as error:  # safetensors and transformers raise many kinds for a bad file
        problem = f"{name}: the weights cannot be read: {_explain(folder, error)}"
        raise ValueError(problem) from error
    keys = ("missing_keys", "mismatched_keys", "unexpected_keys")
    misfits = {
        key: sorted(info[key])[:3] for key in keys if info[key]
    }  # three of each name it
    if misfits:
        problem = f"{name}: the weights do not fit the architecture: {misfits}"
        raise ValueError(f"{problem}. Fetch or train it again")
    processor = family.auto_processor.from_pretrained(name, **trusted)
    return MLLM(model.eval(), processor, source=name, revision=revision)
