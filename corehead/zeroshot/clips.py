"""Videos in which cards pass, each with a shape and a number."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..samples import Frames, Tube
from .drawing import BLACK, WHITE, draw_shape, fitting, font, line_height, photograph
from .words import Question, Scene, check, draw, looks, numbers, shuffled

FPS = 2.0


class Clips(Scene):
    """Cards one after the other, each in front of the camera for one or two pairs of frames.

    Parameters
    ----------
    rng : np.random.Generator
    split : str
    frames : int
        An even number of at least twice the cards; frames that are left show no card.
    cards : int
        At most 16.
    side : int
        Pixels of a frame's width, at least 192; its height is three quarters of it.
    evidence : {"tube", "frames"}
        The card in its frames, or these frames as a whole.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        split: str,
        frames: int = 16,
        cards: int = 6,
        side: int = 384,
        evidence: str = "tube",
    ):
        check(1, 16, cards=cards)
        check(192, 4096, side=side)
        if frames % 2:
            raise ValueError(f"frames={frames}: take an even number")
        check(2 * cards, 1024, frames=frames)
        if evidence not in ("tube", "frames"):
            raise ValueError(f"evidence={evidence!r}: take 'tube' or 'frames'")
        self.evidence = evidence
        self.looks = shuffled(rng, looks(split))[:cards]
        self.questions = [
            Question(
                f"Which number was on the card with the {' '.join(look)}?", "number", *pair
            )
            for look, pair in zip(self.looks, draw(rng, numbers(split, 3), cards))
        ]
        width, height = side, side * 3 // 4
        self.photo = photograph(rng, width, height)
        self.card_size = width * 3 // 8, height * 4 // 5
        # Which card a pair of frames shows, -1 for none. Some vision towers see a pair as one: nothing moves in it.
        pairs = frames // 2
        long = rng.integers(1, min(2, pairs // cards) + 1, size=cards)
        runs = [[card] * length for card, length in enumerate(long.tolist())]
        runs += [[-1]] * (pairs - int(long.sum()))
        self.shown = sum(shuffled(rng, runs), [])
        free = width - self.card_size[0], height - self.card_size[1]
        self.corners = rng.integers(0, free, size=(pairs, 2), endpoint=True).tolist()

    def show(self, values):
        cards = [self._draw_card(look, value) for look, value in zip(self.looks, values)]
        film = []
        for card, corner in zip(self.shown, self.corners):
            picture = self.photo.copy()
            if card >= 0:
                picture.paste(cards[card], tuple(corner))
            film += [np.asarray(picture)] * 2
        part = {"type": "video", "video": np.stack(film), "fps": FPS}
        tubes = [self._tube(card) for card in range(len(cards))]
        whole = self.evidence == "frames"
        evidence = [[Frames(0, list(tube.boxes)) if whole else tube] for tube in tubes]
        return [part], evidence, [line_height(self._size(value)) for value in values]

    def _size(self, value: str) -> int:
        return fitting(value, 0.8 * self.card_size[0], self.card_size[1])

    def _draw_card(self, look: tuple[str, str], value: str) -> Image.Image:
        width, height = self.card_size
        card = Image.new("RGB", self.card_size, WHITE)
        pencil = ImageDraw.Draw(card)
        pencil.rectangle((0, 0, width - 1, height - 1), outline=BLACK, width=2)
        draw_shape(card, look, width // 2, height * 3 // 10, height // 5)
        middle = width // 2, height * 3 // 4
        pencil.text(middle, value, BLACK, font(self._size(value)), anchor="mm")
        return card

    def _tube(self, card: int) -> Tube:
        """The card's boxes in all frames that show it."""
        boxes = {}
        for pair, (left, top) in enumerate(self.corners):
            if self.shown[pair] == card:
                box = left, top, left + self.card_size[0], top + self.card_size[1]
                boxes |= {2 * pair: box, 2 * pair + 1: box}
        return Tube(0, boxes)
