"""Train a testbed MLLM from nothing: ``python -m corehead.testbed.train data/testbed/NAME.yaml``.

The vision tower first learns to see (linear probes), then the decoder learns one domain after the other, each from
easy layouts to hard ones; mixing all domains from the first step stalls. Several questions stand behind one context in
a training sequence, each attending to the context and to itself alone, at the positions it would have alone: a
sequence of ten questions is exactly ten prompts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from ..models import MLLM, load
from .generator import CELL, COLOURS, MARKS, N_KEYS, STYLES, VOCABULARY, Scenes, data_hash, digits, draw, to_samples
from .model import build_model, build_processor
from .pretrained import graft

# Layouts of each domain, easy to hard; a domain moves on when its running accuracy passes ADVANCE.
LEVELS: dict[str, list[dict[str, int]]] = {
    "image": [dict(cells=c) for c in (4, 9, 16, 25)],
    "text": [dict(cells=c) for c in (4, 8, 16)],
    "majority": [dict(cells=c) for c in (9, 16)],
    "count": [dict(cells=c) for c in (4, 9, 16)],
    "text_only": [{}],
    "document": [
        dict(cells=1, pages=4),
        *(dict(cells=2, pages=p) for p in (2, 3, 4)),
        *(dict(cells=4, pages=p) for p in (2, 3, 4, 5, 6, 7, 8)),
    ],
    "video": [dict(cells=2, frames=4), dict(cells=4, frames=6), dict(cells=6, frames=8)],
}
ADVANCE, PASSED = 0.85, 0.93
# Domains in the order in which they come in, with the accuracy that lets the next stage begin.
STAGES: list[tuple[str, dict[str, float]]] = [
    ("image", {"image": PASSED}),
    ("text", {"text": PASSED, "majority": 0.8, "text_only": PASSED}),
    ("video", {"video": PASSED}),
    ("document", {"document": PASSED}),
    ("count", {"count": 0.6}),
]
# A trained model goes on to long contexts: 8 pages or frames with keys among ever more without.
LONG_LEVELS = {domain: levels[-1:] for domain, levels in LEVELS.items()} | {
    "document": [LEVELS["document"][-1] | dict(hay=h) for h in (8, 16, 32, 64, 112, 164)],
    "video": [LEVELS["video"][-1] | dict(hay=h) for h in (8, 24, 64, 120, 220)],
}
# Pictures and pages that fill tiles of 3 x 3 cells, so that a token sees one cell.
TILED_LEVELS = LEVELS | {
    "image": [dict(cells=4, side=3), dict(cells=9, side=3), *(dict(cells=c, side=6) for c in (16, 25, 36))],
    "majority": [dict(cells=9, side=3), dict(cells=16, side=6)],
    "count": [dict(cells=4, side=3), dict(cells=9, side=3), dict(cells=16, side=6)],
    "document": [
        dict(cells=1, pages=4, side=3),
        *(dict(cells=2, pages=p, side=3) for p in (2, 3, 4)),
        *(dict(cells=4, pages=p, side=3) for p in (2, 3, 4, 5, 6, 7, 8)),
    ],
}
CURRICULA = {
    "short": (LEVELS, STAGES),
    "tiled": (TILED_LEVELS, STAGES),
    "long": (LONG_LEVELS, [*STAGES, ("long", {"document": PASSED, "video": PASSED})]),
}
QUESTIONS = {"majority": 1, "count": 6}
TOKENS = 5000  # a batch has fewer scenes where they are long
BATCH = {
    "image": 32,
    "text": 24,
    "document": 24,
    "heading": 24,
    "video": 24,
    "majority": 48,
    "count": 32,
    "text_only": 16,
}


@dataclass
class Recipe:
    """All that determines a training run.

    A stage of the curriculum ends when its domains are good enough, or after `stage_steps`, one number for all stages
    or one each. `weights` is the dtype on disk alone: a model is trained, and loaded again, in float32.
    """

    out: str = "data/testbed/qwen3vl-s"
    family: str = "qwen3_vl"
    curriculum: str = "short"
    base: str = ""
    layers: int = 12
    heads: int = 16
    kv_heads: int = 4
    hidden: int = 128
    intermediate: int = 256
    head_dim: int = 16
    seed: int = 0
    lr: float = 2e-3
    warmup: int = 60
    probe_steps: int = 800
    stage_steps: int | dict[str, int] = 2500
    final_steps: int = 1000
    weight_decay: float = 0.01
    snapshot_steps: int = 0
    weights: str = "float32"
    max_seconds: float = math.inf


@dataclass(frozen=True)
class Layout:
    """What all scenes of a layout share in a family, found by the real processor.

    Attributes
    ----------
    ids : (L,) the context's token ids, of a text context its blanks.
    positions : (3, L) for Qwen3-VL, (1, L) for the others.
    grid : (1, 3), of one picture or video, for Qwen3-VL.
    cells : (V,) which cell, counted over all pictures, each visual token sees; -1 for several, or none.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    grid: torch.Tensor | None
    cells: torch.Tensor


def _layout(family: str, domain: str, layout: dict[str, int]) -> Layout:
    return _found(family, domain, tuple(sorted(layout.items())))


@cache
def _found(family: str, domain: str, items: tuple[tuple[str, int], ...]) -> Layout:
    scene = draw(domain, np.random.default_rng(0), 1, **dict(items))
    mllm = _shapes(family)
    tagged = mllm.tag(to_samples(scene, "layout")[0])
    keep = len(tagged.ids) - scene.question.shape[-1] - 1  # without question and answer
    positions = mllm.family.positions(mllm, tagged.inputs).reshape(-1, len(tagged.ids))[:, :keep]
    cells, (r, c) = [], scene.key.shape[2:]
    for medium in tagged.image_grid:
        box = medium.boxes.round(6)
        low, high = box[:, 1::-1] // CELL, -(-box[:, :1:-1] // CELL)  # (n, 2), rows and columns
        one = (high - low == 1).all(1)
        first = medium.frames[:, 0] if medium.kind == "video" else medium.index
        cells.append(np.where(one, first * r * c + np.nan_to_num(low) @ (c, 1), -1).astype(np.int64))
    grids = [tagged.inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in tagged.inputs]
    return Layout(
        tagged.inputs["input_ids"][0, :keep],
        positions.expand(3, -1) if family == "qwen3_vl" else positions,
        grids[0][:1] if grids else None,
        torch.from_numpy(np.concatenate([*cells, np.zeros(0, np.int64)])),
    )


@cache
def _shapes(family: str) -> MLLM:
    """A family's processor, and a model for its geometry."""
    return MLLM(build_model(layers=1, heads=1, kv_heads=1, family=family), build_processor(family))


@dataclass
class Batch:
    """Tensors of one training step; L = prefix + Q * (Lq + 1).

    Attributes
    ----------
    ids : (B, L); positions : (3 or 1, 1, L); mask : (1, 1, L, L) bool, True where a row may attend.
    media : pixels and their geometry, as the model's forward takes them.
    ask : (Q,) rows that predict the answers; answer : (B, Q).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    media: dict[str, torch.Tensor]
    ask: torch.Tensor
    answer: torch.Tensor

    def to(self, device):
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if k != "media"}
        return Batch(**moved, media={k: v.to(device, non_blocking=True) for k, v in self.media.items()})


def batch_of(scenes: Scenes, layout: dict[str, int], family: str = "qwen3_vl") -> Batch:
    """Tensorise scenes without PIL and chat template, one context for many questions (tests hold it to both)."""
    shared = _layout(family, scenes.domain, layout)
    b, q, lq = scenes.question.shape
    n, length = len(shared.ids), lq + 1  # a question and its answer
    ids = torch.empty(b, n + q * length, dtype=torch.long)
    ids[:, :n] = torch.from_numpy(scenes.words) if scenes.words.shape[1] else shared.ids
    ids[:, n:] = torch.from_numpy(np.concatenate([scenes.question, scenes.answer[..., None]], -1).reshape(b, -1))
    start = int(shared.positions.max()) + 1 if n else 0
    turn = (start + torch.arange(length)).repeat(q).expand(len(shared.positions), -1)
    positions = torch.cat([shared.positions, turn], 1)
    block = torch.cat([torch.full((n,), -1), torch.arange(q).repeat_interleave(length)])
    mask = ((block == -1)[None] | (block[:, None] == block[None])).tril()
    ask = n + lq - 1 + length * torch.arange(q)
    media = _media(family, scenes, shared)
    return Batch(ids, positions[:, None], mask[None, None], media, ask, torch.from_numpy(scenes.answer))


def _media(family: str, scenes: Scenes, shared: Layout) -> dict[str, torch.Tensor]:
    """A batch's pixels: Qwen3-VL's patches straight from the cells, the others' by their image processors."""
    if not scenes.key.size:
        return {}
    video, (b, pictures) = scenes.domain == "video", scenes.key.shape[:2]
    if family == "qwen3_vl":
        patches, grid = torch.from_numpy(scenes.patches()), shared.grid.repeat(b if video else b * pictures, 1)
        if video:
            return dict(pixel_values_videos=patches, video_grid_thw=grid)
        return dict(pixel_values=patches, image_grid_thw=grid)
    processor, pixels = _shapes(family).processor, torch.from_numpy(scenes.pixels()).permute(0, 1, 4, 2, 3)
    if video:
        found = processor.video_processor(videos=list(pixels), return_tensors="pt")["pixel_values_videos"]
        return dict(pixel_values=found.flatten(0, 1)) if family == "internvl" else dict(pixel_values_videos=found)
    if family == "internvl":
        found = processor.image_processor(list(pixels.flatten(0, 1)), crop_to_patches=True, return_tensors="pt")
        return dict(pixel_values=found["pixel_values"])
    return dict(processor.image_processor([list(scene) for scene in pixels], return_tensors="pt"))


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (B, Q, 2, V): after each question, and after each answer (where the turn ends)."""
    hidden = model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions.expand(-1, len(batch.ids), -1).squeeze(0),  # (3, B, L) or (B, L)
        use_cache=False,
        **batch.media,
    ).last_hidden_state
    return model.lm_head(torch.stack([hidden[:, batch.ask], hidden[:, batch.ask + 1]], 2))


def _eyes(model: nn.Module) -> list[nn.Parameter]:
    """What is taught to see and then frozen: the vision tower and the projector, without deepstack's branch."""
    parts = "visual.", "vision_tower.", "multi_modal_projector."
    return [p for name, p in model.model.named_parameters() if name.startswith(parts) and "deepstack" not in name]


def _probe_visual(model: nn.Module, recipe: Recipe, log) -> None:
    """Teach the vision tower what a cell shows: linear probes on the merged tokens for glyph, colour and style.

    A fourth probe asks every token of a page for the page's heading, which the tower's attention can bring there; so
    the heading becomes one more property of a cell, and a document does not need a hop that a picture does not. Then
    the tower is frozen, for pictures alone would make it forget the headings; its deepstack branch goes on learning.
    """
    eyes, device = _eyes(model), next(model.parameters()).device
    sizes = dict(glyph=10 + len(MARKS), colour=len(COLOURS), style=len(STYLES), heading=len(MARKS))
    heads = nn.ModuleDict({name: nn.Linear(recipe.hidden, size) for name, size in sizes.items()}).to(device)
    glyph_class = torch.from_numpy(np.concatenate([digits()[1], 10 + np.arange(len(MARKS)), [-100]]))
    optimiser = torch.optim.AdamW([*eyes, *heads.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, recipe.probe_steps)
    rng = np.random.default_rng([recipe.seed, 1])
    right: dict[str, list[float]] = {name: [] for name in sizes}
    levels = CURRICULA[recipe.curriculum][0]
    layouts = {"image": levels["image"][1:4], "document": [d for d in levels["document"] if d["pages"] == 4][:3]}
    for step in range(recipe.probe_steps):
        domain = ("image", "document")[step % 2]
        layout = layouts[domain][step // 2 % 3]
        scenes = draw(domain, rng, 20, **layout)
        shared = _layout(recipe.family, domain, layout)
        media = {k: v.to(device) for k, v in _media(recipe.family, scenes, shared).items()}
        seen = model.model.get_image_features(**media).pooler_output
        tokens = torch.cat(list(seen)) if isinstance(seen, (tuple, list)) else seen.flatten(0, -2)
        one = shared.cells >= 0  # tokens that see one cell
        tokens = tokens.view(len(scenes.key), len(one), -1)[:, one].flatten(0, 1)

        def shown(x, cells=shared.cells[one]):  # (B, P, R, C) -> (B * tokens,)
            return torch.from_numpy(x.reshape(len(x), -1))[:, cells].flatten()

        key, glyph = shown(scenes.key), shown(scenes.glyph)
        answers = dict(
            glyph=glyph_class[glyph],
            colour=torch.where(key < N_KEYS, key % len(COLOURS), -100),
            style=torch.where(key < N_KEYS, key // len(COLOURS), -100),
        )
        if domain == "document":  # the first cell of each page holds its mark
            answers["heading"] = shown(scenes.glyph[:, :, :1, :1] - len(digits()[1]) + 0 * scenes.glyph)
        loss = 0.0
        for name, answer in answers.items():
            answer = answer.to(device)
            out = heads[name](tokens)
            loss = loss + F.cross_entropy(out, answer)
            asked = answer >= 0
            right[name].append((out.argmax(-1) == answer)[asked].float().mean().item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            accuracy = {name: float(np.mean(values[-25:])) for name, values in right.items()}
            what = " ".join(f"{name}:{a:.2f}" for name, a in accuracy.items())
            log(step + 1, "vision", what, loss.item(), accuracy["glyph"], 0.0)


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    curriculum: str = "short"
    step: int = 0
    stage: int = 0
    stage_start: int = 0
    seconds: float = 0.0
    level: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def levels(self) -> dict[str, list[dict[str, int]]]:
        return CURRICULA[self.curriculum][0]

    @property
    def stages(self) -> list[tuple[str, dict[str, float]]]:
        return CURRICULA[self.curriculum][1]

    def goal(self, domain: str) -> float:
        """Accuracy that a domain must reach."""
        return next(stage[domain] for _, stage in self.stages if domain in stage)


def _choose(rng, progress: Progress) -> tuple[str, dict[str, int]]:
    """The domain and layout of a step: two thirds for what is being learnt, the rest keeps the older domains."""
    done = [d for _, stage in progress.stages[: progress.stage] for d in stage]
    new = list(progress.stages[progress.stage][1]) if progress.stage < len(progress.stages) else []
    pending = [d for d in new if _short(progress, d)] or new
    if not new:
        domain = str(rng.choice(done, p=_shares(done)))
    else:
        domain = str(rng.choice(pending if not done or rng.random() < 0.67 else done))
    level = progress.level.get(domain, 0)
    if rng.random() < 0.3:  # an easier layout now and then
        level = int(rng.integers(level + 1))
    return domain, progress.levels[domain][level]


def _shares(domains) -> np.ndarray:
    weight = np.array([{"document": 3.0, "image": 2.0, "video": 2.0, "text": 1.0}.get(d, 1.0) for d in domains])
    return weight / weight.sum()


def _short(progress: Progress, domain: str) -> bool:
    last = progress.level.get(domain, 0) == len(progress.levels[domain]) - 1
    low = progress.accuracy.get(domain, 0.0) < progress.goal(domain)
    return not last or low or progress.seen.get(domain, 0) < 20


def _note(progress: Progress, domain: str, layout: dict[str, int], accuracy: float) -> None:
    """Update the running accuracy of a domain at its present level, and move it on when it is good enough."""
    level, levels = progress.level.get(domain, 0), progress.levels[domain]
    if layout != levels[level]:
        return
    seen = progress.seen[domain] = progress.seen.get(domain, 0) + 1
    rate = max(0.08, 1 / seen)
    progress.accuracy[domain] = (1 - rate) * progress.accuracy.get(domain, 0.0) + rate * accuracy
    if seen >= 12 and progress.accuracy[domain] > min(ADVANCE, progress.goal(domain)) and level < len(levels) - 1:
        progress.level[domain] = level + 1
        progress.accuracy[domain], progress.seen[domain] = 0.0, 0


def train(recipe: Recipe, device: str = "cpu", quiet: bool = False) -> nn.Module:
    """Train, or go on training, the model of a recipe; the folder ``recipe.out`` gets everything.

    A run that was interrupted goes on from its last checkpoint (every 100 steps) with the same random numbers.
    """
    if recipe.curriculum not in CURRICULA:
        raise ValueError(f"curriculum={recipe.curriculum!r}: take one of {', '.join(map(repr, CURRICULA))}")
    stages, caps = [name for name, _ in CURRICULA[recipe.curriculum][1]], recipe.stage_steps
    caps = caps if isinstance(caps, dict) else dict.fromkeys(stages, caps)
    if set(caps) != set(stages):
        raise ValueError(f"stage_steps={caps}: give one number, or one for each of {', '.join(stages)}")
    if not isinstance(getattr(torch, recipe.weights, None), torch.dtype):
        raise ValueError(f"weights={recipe.weights!r}: take a dtype, 'float32' or 'bfloat16'")
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log_file = out / "checkpoint.pt", out / "training_log.csv"
    model = build_model(**{name: getattr(recipe, name) for name in signature(build_model).parameters}).to(device)
    model.train()
    frozen = {*_eyes(model)}
    trained = [p for p in model.parameters() if p not in frozen]
    decay = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    progress, rng = Progress(recipe.curriculum), np.random.default_rng([recipe.seed, 2])
    began = time.perf_counter()

    def log(step, stage, what, loss, accuracy, rate):
        seconds = round(progress.seconds + time.perf_counter() - began, 1)
        row = dict(step=step, stage=stage, what=what, loss=round(loss, 4), accuracy=round(accuracy, 4), lr=rate)
        row["seconds"] = seconds
        fresh = not log_file.exists() or not log_file.stat().st_size
        with log_file.open("a", newline="") as f:
            writer = csv.DictWriter(f, row.keys())
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        if not quiet:
            print(*row.values(), flush=True)

    window: list[tuple[float, float]] = []  # loss and accuracy since the last row of the log
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        if state["recipe"] != asdict(recipe) | {"max_seconds": state["recipe"]["max_seconds"]}:
            raise ValueError(f"{checkpoint} belongs to another recipe: remove it, or train into another folder")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        rng.bit_generator.state = state["rng"]
        progress = Progress(**state["progress"])
        log_file.write_text(state["log"])
        window = state["window"]
    else:
        log_file.unlink(missing_ok=True)
        if recipe.base:  # begin with the last stage; the first ones have been taught
            model.load_state_dict(load(recipe.base, device=device).model.state_dict())
            progress.stage = len(progress.stages) - 1
        else:
            _probe_visual(model, recipe, log)
    for p in frozen:
        p.requires_grad_(False)

    stop = False
    while True:
        final = progress.stage == len(progress.stages)
        spent = progress.step - progress.stage_start
        if final and spent >= recipe.final_steps:
            break
        rate = recipe.lr * min(1.0, (progress.step + 1) / recipe.warmup)
        if final:
            rate *= 0.02 + 0.98 * (1 + math.cos(math.pi * spent / recipe.final_steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate
        domain, layout = _choose(rng, progress)
        length = len(_layout(recipe.family, domain, layout).ids)
        n = min(BATCH[domain], 1 + TOKENS // (length or 1))
        scenes = draw(domain, rng, n, questions=QUESTIONS.get(domain, 12), **layout)
        batch = batch_of(scenes, layout, recipe.family).to(device)
        logits = answer_logits(model, batch)
        end = torch.full_like(batch.answer, VOCABULARY["<|im_end|>"])
        targets = torch.stack([batch.answer, end], 2)
        loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), batch.answer.flatten())
        total = loss + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), targets[:, :, 1].flatten())
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        accuracy = (logits[:, :, 0].argmax(-1) == batch.answer).float().mean().item()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()} at step {progress.step}: lower the rate")
        _note(progress, domain, layout, accuracy)
        progress.step += 1
        window.append((loss.item(), accuracy))
        if not final:
            waiting = any(_short(progress, d) for d in progress.stages[progress.stage][1])
            if not waiting or progress.step - progress.stage_start >= caps[stages[progress.stage]]:
                progress.stage, progress.stage_start = progress.stage + 1, progress.step
        if progress.step % 25 == 0:
            stage = stages[progress.stage] if progress.stage < len(stages) else "all"
            what = " ".join(f"{d}@{progress.level.get(d, 0)}:{a:.2f}" for d, a in progress.accuracy.items())
            log(progress.step, stage, what, *np.mean(window, 0).tolist(), round(rate, 6))
            window.clear()
        spent_seconds = progress.seconds + time.perf_counter() - began
        stop = spent_seconds > recipe.max_seconds
        if progress.step % 100 == 0 or stop:
            state = dict(
                model=model.state_dict(),
                optimiser=optimiser.state_dict(),
                rng=rng.bit_generator.state,
                progress=asdict(progress) | {"seconds": spent_seconds},
                recipe=asdict(recipe),
                window=window,
                log=log_file.read_text() if log_file.exists() else "",
            )
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
        if recipe.snapshot_steps and progress.step % recipe.snapshot_steps == 0:
            save(model, recipe, progress, out / "snapshots" / f"{progress.step:05d}")
        if stop:
            break
    progress.seconds += time.perf_counter() - began
    model.eval()
    save(model, recipe, progress, out)
    if not stop:
        checkpoint.unlink(missing_ok=True)
    return model


def save(model: nn.Module, recipe: Recipe, progress: Progress, out: Path) -> None:
    """Write weights, config, processor and a card that says how they came about."""
    state = {name: values.to(getattr(torch, recipe.weights)) for name, values in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state, max_shard_size="16MB")
    build_processor(recipe.family).save_pretrained(out)
    layouts = {domain: levels[progress.level.get(domain, 0)] for domain, levels in progress.levels.items()}
    card = dict(
        recipe={k: v for k, v in asdict(recipe).items() if k not in ("out", "max_seconds")},
        layouts=layouts,  # the hardest that it came to
        data_sha256=data_hash(),
        steps=progress.step,
        minutes=round(progress.seconds / 60, 1),
        threads=torch.get_num_threads(),
        machine=f"{platform.machine()}, {'GPU' if next(model.parameters()).is_cuda else 'CPU'}",
        torch=torch.__version__,
    )
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="NAME.yaml; the model goes to the folder NAME beside it")
    parser.add_argument("--out", type=Path, help="another folder")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="stop then; the same command goes on")
    options = parser.parse_args(arguments)
    given = yaml.safe_load(options.recipe.read_text()) or {}
    pretrained = given.get("family") == "smollm2"
    known = {"family", "steps", "seed"} if pretrained else asdict(Recipe()).keys()
    unknown = given.keys() - known
    if unknown:
        parser.error(f"{options.recipe}: unknown {', '.join(sorted(unknown))}; a recipe has {', '.join(known)}")
    out, device = str(options.out or options.recipe.with_suffix("")), "cuda" if torch.cuda.is_available() else "cpu"
    if pretrained:
        graft(out, device=device, **{k: v for k, v in given.items() if k != "family"})
    else:
        train(Recipe(**given | dict(out=out, max_seconds=options.max_seconds)), device)


if __name__ == "__main__":
    main()
