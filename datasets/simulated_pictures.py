"""Pictures of the simulated catalogue: a shape in a colour with a pattern, all else left to chance."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["VISUAL_ATTRIBUTES", "draw_picture"]

COLOURS = {
    "red": (205, 40, 45),
    "orange": (240, 130, 30),
    "yellow": (240, 210, 50),
    "green": (55, 155, 75),
    "turquoise": (50, 180, 185),
    "blue": (45, 80, 190),
    "purple": (130, 60, 165),
    "brown": (115, 75, 50),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
PATTERNS = ("plain", "striped", "dotted", "checked")
# Radius as a share of the picture's side.
SIZES = {"small": 0.22, "medium": 0.31, "large": 0.40}

VISUAL_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "size": tuple(SIZES),
}
"""Values of each attribute that a picture shows."""

# Shapes are drawn this many times larger and scaled down, for smooth edges.
OVERSAMPLING = 2


def _outline(shape: str) -> np.ndarray:
    """Return the corners [points, 2] of a shape that fits the unit circle, y downwards."""
    if shape == "heart":
        angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        x = np.sin(angle) ** 3
        y = (13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / -16
        return np.stack([x, y], 1)
    if shape == "cross":
        arm = [(-0.3, -1), (0.3, -1), (0.3, -0.3)]
        corners = np.array(arm)
        turned = [np.stack([-corners[:, 1], corners[:, 0]], 1)]
        for _ in range(3):
            turned.append(np.stack([-turned[-1][:, 1], turned[-1][:, 0]], 1))
        return np.concatenate([turned[-1], *turned[:-1]])
    corners_of = {"triangle": 3, "square": 4, "star": 10}
    count = corners_of.get(shape, 48)
    angle = np.arange(count) * 2 * math.pi / count - math.pi / 2 + (math.pi / 4 if shape == "square" else 0.0)
    radius = np.where(np.arange(count) % 2, 0.45, 1.0) if shape == "star" else np.ones(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _mask(shape: str, centre: np.ndarray, radius: float, turn: float, side: int) -> np.ndarray:
    """Return how much of each pixel the shape covers [side, side], 0 to 1."""
    scale = side * OVERSAMPLING
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in ((points @ rotation) * radius + centre) * scale]

    image = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(image)
    draw.polygon(place(_outline(shape)), fill=255)
    if shape == "ring":
        draw.polygon(place(_outline("circle") * 0.55), fill=0)
    if shape == "crescent":
        draw.polygon(place(_outline("circle") * 0.85 + np.array([0.45, -0.1])), fill=0)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255.0


def _pattern(pattern: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return where the second colour goes [side, side], 0 to 1."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    angle = rng.uniform(0, math.pi)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    waves = 2 * math.pi * rng.uniform(9.0, 12.0)
    phase = rng.uniform(0, 2 * math.pi)
    if pattern == "striped":
        return (np.sin(along * waves + phase) > 0).astype(np.float32)
    if pattern == "dotted":
        return (np.sin(along * waves + phase) * np.sin(across * waves) > 0.45).astype(np.float32)
    if pattern == "checked":
        return (np.sin(along * waves * 0.7 + phase) * np.sin(across * waves * 0.7) > 0).astype(np.float32)
    return np.zeros((side, side), dtype=np.float32)


def draw_picture(value: Mapping[str, str], side: int, rng: np.random.Generator) -> Image.Image:
    """Draw one item; place, turn, shade, background, pattern angle and noise differ from picture to picture.

    Args:
        value: The item's value of each attribute; those of `VISUAL_ATTRIBUTES` are read.
        side: Width and height in pixels.
        rng: Source of everything that carries no meaning.

    Returns:
        RGB picture; a pattern's second colour is a lighter tint of the first.
    """
    radius = SIZES[value["size"]] * rng.uniform(0.95, 1.05)
    centre = 0.5 + rng.uniform(-0.06, 0.06, size=2)
    mask = _mask(value["shape"], centre, radius, rng.normal(0.0, 0.15), side)[..., None]
    fill = np.array(COLOURS[value["colour"]]) + rng.normal(0.0, 10.0, size=3)
    tint = fill + (255 - fill) * 0.7
    second = _pattern(value["pattern"], side, rng)[..., None]
    inside = fill * (1 - second) + tint * second
    grey = rng.uniform(175, 240) + rng.normal(0.0, 6.0, size=3)
    slope = np.linspace(-1, 1, side)[:, None, None] * rng.uniform(-15, 15)
    pixels = inside * mask + (grey + slope) * (1 - mask)
    pixels = pixels + rng.normal(0.0, 5.0, size=(side, side, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
