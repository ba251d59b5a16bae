"""Train a testbed MLLM from nothing: ``python -m corehead.testbed.training data/testbed/NAME.yaml``.

The vision tower first learns to see (linear probes), then the decoder learns one domain after the other, each from
easy layouts to hard ones (curricula.yaml); mixing all domains from the first step stalls. Several questions stand
behind one context in a training sequence, each attending to the context and to itself alone, at the positions it would
have alone: a sequence of ten questions is exactly ten prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..families import Medium
from ..models import MLLM, load
from .graft import graft
from .models import untrained
from .scenes import (
    BLANK,
    CELL,
    COLOURS,
    MARK_GLYPH,
    MARKS,
    STYLES,
    VOCABULARY,
    Scenes,
    data_hash,
    digits,
    draw,
    render,
    to_samples,
)

CURRICULA = yaml.safe_load(Path(__file__).with_name("curricula.yaml").read_text())
TOKENS = 5000  # of a batch's contexts
CHECKPOINT = 100  # steps
PROBES = {
    "glyph": 10 + len(MARKS),
    "colour": len(COLOURS),
    "style": len(STYLES),
    "heading": len(MARKS),
}
IGNORED = -100  # label of what a probe is not asked


@dataclass
class Recipe:
    """All that determines a training run.

    Attributes
    ----------
    family : str
        "qwen3_vl", "internvl" or "llava_onevision".
    curriculum : str
        One of curricula.yaml.
    base : str
        Folder of a trained model, which then learns the curriculum's last stage alone.
    layers, heads, kv_heads, hidden, intermediate, head_dim : int
        As in `untrained`.
    seed : int
        Of weights and scenes.
    own_words : bool
        Each domain in words that no other has, those of answers too.
    lr, warmup : float, int
        Learning rate, and steps until it is reached.
    probe_steps : int
        Steps that teach the vision tower.
    stage_steps : int or dict
        Steps after which a stage ends even if its domains are not good enough, one number or one for each stage.
    final_steps : int
        Steps on all domains at the end, with a cosine schedule.
    snapshot_steps : int
        Keep the model every so many steps; 0 for never.
    """

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
    own_words: bool = False
    lr: float = 2e-3
    warmup: int = 60
    probe_steps: int = 800
    stage_steps: int | dict[str, int] = 2500
    final_steps: int = 1000
    snapshot_steps: int = 0

    def __post_init__(self):
        if self.curriculum not in CURRICULA:
            raise ValueError(
                f"curriculum={self.curriculum!r}: take one of {', '.join(map(repr, CURRICULA))}"
            )
        stages = CURRICULA[self.curriculum]["stages"]
        if isinstance(self.stage_steps, int):
            self.stage_steps = dict.fromkeys(stages, self.stage_steps)
        if self.stage_steps.keys() != stages.keys():
            raise ValueError(
                f"stage_steps={self.stage_steps}: give one number, or one for each of {', '.join(stages)}"
            )


@cache
def geometry(family: str, own_words: bool = False) -> MLLM:
    """A family's processor, and a model for its geometry."""
    # only its processor and its position ids are asked for: the decoder never runs
    return untrained(family, layers=1, heads=1, kv_heads=1, own_words=own_words)


@cache
def context_of(
    family: str, domain: str, **layout: int
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """What all scenes of a layout share in a family, found by the real processor.

    Returns
    -------
    ids : np.ndarray
        (L,) the context's token ids.
    positions : torch.Tensor
        (3, L) for Qwen3-VL with pictures, otherwise (1, L).
    cells : np.ndarray
        (V,) which cell, counted over all pictures, each visual token sees; -1 for several, or none.
    """
    # any scene will do: what cells show changes pixels, not token ids and positions
    scenes = draw(domain, np.random.default_rng(0), 1, **layout)
    mllm = geometry(family, layout.get("own_words", False))
    tagged = mllm.tag(to_samples(scenes, "layout")[0])
    length = len(tagged.ids) - scenes.question.shape[-1] - 1  # without question and answer
    positions = mllm.family.positions(mllm.model, tagged.inputs)
    positions = positions.reshape(-1, len(tagged.ids))[:, :length]
    cells = [_cells(medium, *scenes.cells.shape[2:]) for medium in tagged.media]
    return (
        tagged.ids[:length],
        positions,
        np.concatenate(cells) if cells else np.zeros(0, np.int64),
    )


def _cells(medium: Medium, rows: int, columns: int) -> np.ndarray:
    # rounded, or a box that ends at a cell's edge would count as reaching into the next one
    left, top, right, bottom = (
        medium.boxes.round(6).T / CELL
    )  # NaN where a token sees nothing
    single = (np.ceil(right) - np.floor(left) == 1) & (np.ceil(bottom) - np.floor(top) == 1)
    picture = medium.index + medium.frames[:, 0]  # a frame of the only video, or an image
    cell = (picture * rows + np.floor(top)) * columns + np.floor(left)
    return np.where(single, cell, -1).astype(np.int64)


def media(family: str, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Pixels and their geometry, as the model's forward takes them."""
    if scenes.cells is None:
        return {}
    pixels = torch.from_numpy(render(scenes.cells)).permute(
        0, 1, 4, 2, 3
    )  # (B, P, 3, H, W)
    processor = geometry(family).processor
    if scenes.domain == "video":
        found = processor.video_processor(videos=list(pixels), return_tensors="pt")
    else:
        found = processor.image_processor(
            [list(scene) for scene in pixels], return_tensors="pt"
        )
    if family != "internvl":
        return dict(found)
    tiles = found["pixel_values_videos" if scenes.domain == "video" else "pixel_values"]
    return {"pixel_values": tiles.flatten(0, -4)}  # it takes frames as pictures


def batch_of(
    family: str, scenes: Scenes, layout: dict[str, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scenes as a model takes them, one context for many questions, without PIL and chat template.

    Parameters
    ----------
    family : str
        As in `Recipe`.
    scenes : Scenes
        B scenes with Q questions.
    layout : dict
        What they were drawn with.

    Returns
    -------
    inputs : dict of torch.Tensor
        Token ids (B, L), position ids, a mask (1, 1, L, L), pixels; L = context + Q * (question + answer).
    ask : torch.Tensor
        (Q,) rows that predict the answers.
    """
    ids, positions, _ = context_of(family, scenes.domain, **layout)
    b, q, words = scenes.question.shape
    length, turn = len(ids), words + 1  # with the answer
    context = scenes.words if scenes.cells is None else ids[None].repeat(b, 0)
    turns = np.concatenate([scenes.question, scenes.answer[..., None]], -1).reshape(b, -1)
    # where a question alone would go on: with M-RoPE that is less than the number of tokens
    start = int(positions.max()) + 1 if length else 0
    # the same positions for each question, as if it were the only one
    after = (start + torch.arange(turn)).repeat(q).expand(len(positions), -1)
    # which question each token belongs to; -1 is the context, which all may see
    block = np.maximum(np.arange(-length, q * turn) // turn, -1)
    mask = np.tril((block == -1) | (block[:, None] == block))
    position_ids = torch.cat([positions, after], 1)[:, None].expand(-1, b, -1)
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate([context, turns], 1)),
        "position_ids": position_ids.squeeze(0),  # (3, B, L) or (B, L)
        "attention_mask": torch.from_numpy(mask)[None, None],
    }
    return inputs | media(family, scenes), torch.arange(
        length + words - 1, length + q * turn, turn
    )


def answer_logits(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], ask: torch.Tensor
) -> torch.Tensor:
    """Logits (B, Q, 2, V): after each question, and after each answer (where the turn ends)."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    # logits of these rows alone: no loss is on the context
    return model.lm_head(torch.stack([hidden[:, ask], hidden[:, ask + 1]], 2))


@dataclass
class Domain:
    """How far a domain has come: its entry of curricula.yaml, the present level, and the running accuracy there."""

    levels: list[dict[str, int]]
    goal: float
    scenes: int
    questions: int
    weight: int = 1
    level: int = 0
    accuracy: float = 0.0
    seen: int = 0

    @property
    def at_last_level(self) -> bool:
        return self.level == len(self.levels) - 1

    @property
    def done(self) -> bool:
        # a few good batches are no proof
        return self.at_last_level and self.accuracy >= self.goal and self.seen >= 20

    def note(self, layout: dict[str, int], accuracy: float) -> None:
        """Update the accuracy, and move on when it is good enough."""
        # an easier layout, which comes back now and then, says nothing of the present level
        if layout != self.levels[self.level]:
            return
        self.seen += 1
        # a plain mean at first, then one that forgets: what counts is how good it is now
        self.accuracy += max(0.08, 1 / self.seen) * (accuracy - self.accuracy)
        # easier levels keep coming back, so that none must be perfect before the next
        if (
            self.seen >= 12
            and self.accuracy > min(0.85, self.goal)
            and not self.at_last_level
        ):
            self.level, self.accuracy, self.seen = self.level + 1, 0.0, 0


@dataclass
class Run:
    """Where a training run stands: with the weights and the optimiser's state, all that a checkpoint holds."""

    recipe: Recipe
    step: int = 0
    stage: int = 0
    stage_start: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)
    # loss and accuracy since the last row of the log
    window: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self):
        curriculum = CURRICULA[self.recipe.curriculum]
        self.stages = list(curriculum["stages"].items())
        self.domains = {
            name: Domain(**entry) for name, entry in curriculum["domains"].items()
        }
        if self.recipe.own_words:
            for domain in self.domains.values():
                domain.levels = [level | {"own_words": True} for level in domain.levels]
        # apart from the tower's randomness: scenes do not depend on how long it was taught
        self.rng = np.random.default_rng([self.recipe.seed, 2])

    @property
    def final(self) -> bool:
        """Whether all stages are over."""
        return self.stage == len(self.stages)

    @property
    def finished(self) -> bool:
        return self.final and self.step - self.stage_start >= self.recipe.final_steps

    def rate(self) -> float:
        """The learning rate of this step."""
        rate = self.recipe.lr * min(1.0, (self.step + 1) / self.recipe.warmup)
        # a stage ends when its goals are reached, nobody knows when: only the final steps can follow a schedule
        if not self.final:
            return rate
        spent = (self.step - self.stage_start) / self.recipe.final_steps
        return rate * (0.02 + 0.98 * (1 + math.cos(math.pi * spent)) / 2)

    def choose(self) -> tuple[str, dict[str, int]]:
        """Domain and layout of this step: two thirds for what is being learnt, the rest keeps the older domains."""
        older = [name for _, names in self.stages[: self.stage] for name in names]
        if self.final:
            weights = np.array([self.domains[name].weight for name in older])
            name = str(self.rng.choice(older, p=weights / weights.sum()))
        else:
            # what has reached its goal waits for the others of its stage
            new = self.stages[self.stage][1]
            pending = [name for name in new if not self.domains[name].done] or new
            name = str(
                self.rng.choice(pending if not older or self.rng.random() < 0.67 else older)
            )
        domain = self.domains[name]
        easier = self.rng.random() < 0.3  # now and then, against forgetting
        return name, domain.levels[
            self.rng.integers(domain.level + 1) if easier else domain.level
        ]

    def note(self, name: str, layout: dict[str, int], loss: float, accuracy: float) -> None:
        """What a step came to; it may end the stage."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {self.step}: lower the rate")
        rate = self.rate()  # that this step had: taken before the step counts
        self.domains[name].note(layout, accuracy)
        self.window.append((loss, accuracy))
        self.step += 1
        if not self.final:
            stage, names = self.stages[self.stage]
            over = self.step - self.stage_start >= self.recipe.stage_steps[stage]
            if over or all(self.domains[name].done for name in names):
                self.stage, self.stage_start = self.stage + 1, self.step
        if self.step % 25 == 0:
            what = " ".join(
                f"{name}@{d.level}:{d.accuracy:.2f}" for name, d in self.domains.items()
            )
            stage = "all" if self.final else self.stages[self.stage][0]
            self.write(self.step, stage, what, *np.mean(self.window, 0).tolist(), rate)
            self.window.clear()

    def write(
        self,
        step: int,
        stage: str,
        what: str,
        loss: float,
        accuracy: float,
        rate: float = 0.0,
    ) -> None:
        row = {"step": step, "stage": stage, "what": what}
        self.log.append(row | {"loss": loss, "accuracy": accuracy, "lr": rate})
        print(f"{step} {stage} {what} loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)


def _tower(model: PreTrainedModel) -> list[nn.Parameter]:
    """What is taught to see and then frozen: the vision tower and the projector, without deepstack's branch."""
    # deepstack's branch feeds layers of the decoder, and learns with them
    parts = "visual.", "vision_tower.", "multi_modal_projector."
    named = model.model.named_parameters()
    return [p for name, p in named if name.startswith(parts) and "deepstack" not in name]


def _labels(scenes: Scenes, cells: np.ndarray) -> list[torch.Tensor]:
    """What the probes should say of the tokens that see `cells`, (B * tokens,) each; no heading for pictures."""
    glyph_class = np.concatenate([digits()[1], 10 + np.arange(len(MARKS)), [IGNORED]])
    framed = (
        scenes.cells["key"] != BLANK["key"]
    )  # without a frame there is no colour to tell
    labels = [
        glyph_class[scenes.cells["glyph"]],
        np.where(framed, scenes.cells["key"] % len(COLOURS), IGNORED),
        np.where(framed, scenes.cells["key"] // len(COLOURS), IGNORED),
    ]
    if scenes.domain == "document":  # the first cell of each page holds its mark
        mark = scenes.cells["glyph"][:, :, :1, :1] - MARK_GLYPH
        labels.append(np.broadcast_to(mark, scenes.cells.shape))
    return [
        torch.from_numpy(label.reshape(len(label), -1)[:, cells].ravel())
        for label in labels
    ]


def _teach_tower(model: PreTrainedModel, run: Run) -> None:
    """Teach the vision tower what a cell shows: linear probes on the merged tokens for glyph, colour and style.

    A fourth probe asks every token of a page for the page's heading, which the tower's attention can bring there; so
    the heading becomes one more property of a cell, and a document does not need a hop that a picture does not.
    """
    recipe, device = run.recipe, model.device
    # they exist for this lesson alone, and are dropped
    probes = nn.Linear(recipe.hidden, sum(PROBES.values())).to(device)
    taught = [*_tower(model), *probes.parameters()]
    optimiser = torch.optim.AdamW(taught, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, recipe.probe_steps)
    rng = np.random.default_rng([recipe.seed, 1])
    # pictures teach what a cell shows, documents also the heading
    pages = [level for level in run.domains["document"].levels if level["pages"] == 4]
    layouts = [("image", run.domains["image"].levels[1:4]), ("document", pages[:3])]
    for step in range(1, recipe.probe_steps + 1):
        domain, choices = layouts[step % 2]
        layout = choices[step // 2 % 3]
        scenes = draw(domain, rng, 20, **layout)
        cells = context_of(recipe.family, domain, **layout)[2]
        pixels = {
            name: values.to(device) for name, values in media(recipe.family, scenes).items()
        }
        tokens = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        seen = tokens.view(len(scenes.cells), len(cells), -1)[:, cells >= 0].flatten(0, 1)
        logits = probes(seen).split(list(PROBES.values()), -1)
        labels = [label.to(device) for label in _labels(scenes, cells[cells >= 0])]
        # a picture has three labels for four probes: that of the heading rests
        loss = sum(F.cross_entropy(logit, label) for logit, label in zip(logits, labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 1:  # a step on documents, which has all probes
            right = [
                (x.argmax(-1) == y)[y != IGNORED].float().mean().item()
                for x, y in zip(logits, labels)
            ]
            what = " ".join(
                f"{name}:{accuracy:.2f}" for name, accuracy in zip(PROBES, right)
            )
            run.write(step, "vision", what, loss.item(), right[0])


def _start(
    recipe: Recipe, checkpoint: Path, device: str
) -> tuple[Run, PreTrainedModel, torch.optim.Optimizer]:
    """A run at its beginning, or where a checkpoint was made."""
    shape = (
        "family",
        "layers",
        "heads",
        "kv_heads",
        "hidden",
        "intermediate",
        "head_dim",
        "seed",
        "own_words",
    )
    model = (
        untrained(**{name: getattr(recipe, name) for name in shape})
        .model.to(device)
        .train()
    )
    tower = set(_tower(model))
    decoder = [parameter for parameter in model.parameters() if parameter not in tower]
    optimiser = torch.optim.AdamW(decoder, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(recipe)
    if checkpoint.exists():
        # not weights alone: the run with its random state, as this program wrote it
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        run = state["run"]
        if run.recipe != recipe:
            raise ValueError(
                f"{checkpoint} belongs to another recipe: remove it, or train into another folder"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    elif recipe.base:
        model.load_state_dict(
            load(recipe.base, dtype="float32", device=device).model.state_dict()
        )
        run.stage = len(run.stages) - 1  # what comes before is what the base has learnt
    else:
        _teach_tower(model, run)
    for parameter in tower:  # pictures alone would make it forget the headings
        parameter.requires_grad_(False)
    return run, model, optimiser


def train_step(run: Run, model: PreTrainedModel, optimiser: torch.optim.Optimizer) -> None:
    """One batch of the run's choice."""
    family, group = run.recipe.family, optimiser.param_groups[0]
    group["lr"] = run.rate()
    name, layout = run.choose()
    length = len(context_of(family, name, **layout)[0])
    domain = run.domains[name]
    # memory goes with the tokens of a batch: fewer scenes where they are long
    n = min(domain.scenes, 1 + TOKENS // max(length, 1))
    scenes = draw(name, run.rng, n, questions=domain.questions, **layout)
    inputs, ask = batch_of(family, scenes, layout)
    inputs = {key: values.to(model.device) for key, values in inputs.items()}
    logits = answer_logits(model, inputs, ask)
    answer = torch.from_numpy(scenes.answer).to(model.device)
    end = torch.full_like(answer, VOCABULARY["<|im_end|>"])
    loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answer.flatten())
    end_loss = F.cross_entropy(logits[:, :, 1].flatten(0, 1), end.flatten())
    optimiser.zero_grad()
    # every turn ends with the same token: soon learnt, and of little weight beside the answers
    (loss + 0.1 * end_loss).backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()
    right = logits[:, :, 0].argmax(-1) == answer
    run.note(name, layout, loss.item(), right.float().mean().item())


def train(recipe: Recipe, out: str | Path, device: str = "cpu") -> PreTrainedModel:
    """Train, or go on training, the model of a recipe.

    A run that was interrupted goes on from its last checkpoint (every 100 steps) with the same random numbers.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    out : str or Path
        The folder that gets everything.
    device : str
        Where to train.

    Returns
    -------
    PreTrainedModel

    Raises
    ------
    ValueError
        A checkpoint of another recipe lies in the folder.
    FloatingPointError
        The loss is not finite.
    """
    out, clock = Path(out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, part = out / "checkpoint.pt", out / "checkpoint.part"
    run, model, optimiser = _start(recipe, checkpoint, device)
    while not run.finished:
        train_step(run, model, optimiser)
        now = time.perf_counter()
        run.seconds += now - clock
        clock = now
        if run.step % CHECKPOINT == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"run": run}, part)
            part.replace(checkpoint)  # whole or not at all, whenever the run is killed
        if recipe.snapshot_steps and run.step % recipe.snapshot_steps == 0:
            save(model, run, out / "snapshots" / f"{run.step:05d}")
    save(model.eval(), run, out)
    checkpoint.unlink(missing_ok=True)
    return model


def save(model: PreTrainedModel, run: Run, out: Path) -> None:
    """Write weights in float16, config, processor, the log and a card that says how they came about."""
    # half the size, and RAM moves by less than 2e-4; training goes on in float32
    copy.deepcopy(model).half().save_pretrained(out)
    geometry(run.recipe.family, run.recipe.own_words).processor.save_pretrained(out)
    pd.DataFrame(run.log).round(6).to_csv(out / "training_log.csv", index=False)
    card = {
        "recipe": asdict(run.recipe),
        "layouts": {
            name: domain.levels[domain.level] for name, domain in run.domains.items()
        },
        "data_sha256": data_hash(),
        "steps": run.step,
        "minutes": round(run.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {model.device.type}",
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipe", type=Path, help="NAME.yaml; the model goes to the folder NAME beside it"
    )
    parser.add_argument("--out", type=Path, help="another folder")
    options = parser.parse_args(arguments)
    given = yaml.safe_load(options.recipe.read_text()) or {}
    pretrained = given.get("family") == "smollm2"
    known = ("family", "steps", "seed") if pretrained else asdict(Recipe()).keys()
    unknown = given.keys() - known
    if unknown:
        parser.error(
            f"{options.recipe}: unknown {', '.join(sorted(unknown))}; a recipe has {', '.join(known)}"
        )
    out = options.out or options.recipe.with_suffix("")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if pretrained:
        graft(out, given.get("steps", 1200), given.get("seed", 0), device)
    else:
        train(Recipe(**given), out, device)


if __name__ == "__main__":
    main()
