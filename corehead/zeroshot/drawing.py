"""Text, shapes and photographs, by what the package's dependencies bring along."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from .words import COLOURS

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# corners, where the first one points to (in turns, clockwise from the right), and how far in the corners between are
OUTLINES = {
    "circle": (72, 0, 1.0),
    "square": (4, 1 / 8, 1.0),
    "triangle": (3, 3 / 4, 1.0),
    "diamond": (4, 0, 1.0),
    "star": (5, 3 / 4, 0.55),
    "hexagon": (6, 0, 1.0),
}
# width and height of the text that has room inside, and how far below the middle, all in radii
ROOM = {
    "circle": (1.4, 0.8, 0),
    "square": (1.2, 0.9, 0),
    "triangle": (0.85, 0.4, 0.12),
    "diamond": (1.1, 0.7, 0),
    "star": (1.0, 0.36, 0),
    "hexagon": (1.3, 0.7, 0),
}


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib.get_data_path()) / "fonts/ttf" / name
    # Pillow's own layout: whether raqm, the other one, is there depends on the machine
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def line_height(size: int) -> int:
    """Pixels from the highest to the lowest that a letter may reach."""
    return sum(font(size).getmetrics())


def fitting(text: str, width: float, height: float) -> int:
    """The largest size in which a text is so wide and its capitals so high at most."""
    size = 8
    while font(size + 1).getlength(text) <= width and 0.73 * (size + 1) <= height:
        size += 1
    return size


def ink_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever stands out."""
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    return BLACK if luminance > 128 else WHITE


def shape_box(x: int, y: int, radius: int) -> tuple[int, int, int, int]:
    """What a shape covers, its rim of two pixels included."""
    return x - radius - 2, y - radius - 2, x + radius + 3, y + radius + 3


def draw_shape(
    picture: Image.Image,
    look: tuple[str, str],
    x: int,
    y: int,
    radius: int,
    text: str = "",
) -> int:
    """Draw a shape around (x, y) and a text inside; returns the height of the text's line."""
    colour, shape = look
    corners, turn, inner = OUTLINES[shape]
    angles = 2 * np.pi * (turn + np.arange(2 * corners) / (2 * corners))
    # every second point lies between two corners: on the side, or further in
    between = inner if inner < 1 else np.cos(np.pi / corners)
    radii = radius * np.where(np.arange(2 * corners) % 2, between, 1)
    points = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)
    fill = tuple(COLOURS[colour])
    pencil = ImageDraw.Draw(picture)
    pencil.polygon([tuple(point) for point in points], fill, BLACK, width=2)
    width, height, below = ROOM[shape]
    size = fitting(text, width * radius, height * radius)
    middle = x, y + round(below * radius)
    pencil.text(middle, text, ink_on(fill), font(size), anchor="mm")
    return line_height(size)


@cache
def _photo(name: str) -> Image.Image:
    return Image.fromarray(load_sample_image(name))


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A piece of one of scikit-learn's two photographs, pale, as a background."""
    photo = _photo(("china.jpg", "flower.jpg")[rng.integers(2)])
    # the largest piece of these proportions, or a smaller one
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.6, 1)
    size = int(width * scale), int(height * scale)
    left = int(rng.integers(photo.width - size[0] + 1))
    top = int(rng.integers(photo.height - size[1] + 1))
    piece = photo.crop((left, top, left + size[0], top + size[1])).resize((width, height))
    return Image.blend(piece, Image.new("RGB", piece.size, WHITE), 0.5)
