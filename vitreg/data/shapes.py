"""Procedural photos: one bevelled shape on a calm or rough ground, among pebbles that mean nothing.

    scene = draw(7)                     # always the same: image, mask of the object, label

A class is a shape. Place, size, turn, colours, texture, light and ground are random, so nothing but the
shape tells the class, and the mask of the object says where a model should look. Large flat areas are
there on purpose: artifacts like them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

SIZE = 96
Plane = Float[np.ndarray, "h w"]
Colours = Float[np.ndarray, "h w 3"]
Random = np.random.Generator


@dataclass(frozen=True)
class Scene:
    """A drawn photo, where its object is, and the object's class (an index into `CLASSES`)."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    label: int

    @property
    def photo(self) -> Image.Image:
        return Image.fromarray(self.image)


def draw(seed: int, size: int = SIZE, label: int | None = None) -> Scene:
    """The photo of a seed, `size` pixels square; the seed also chooses the class, unless a label is given."""
    random = np.random.default_rng(seed)
    drawn = int(random.integers(len(CLASSES)))
    label = drawn if label is None else label
    hue = random.random()
    image = _ground(random, size, hue)
    radius = random.uniform(0.22, 0.38)
    centre = random.uniform(0.9 * radius, 1 - 0.9 * radius, 2)
    light = random.uniform(0, 2 * np.pi)
    for _ in range(random.integers(4)):
        place, small = random.random(2), random.uniform(0.05, 0.11)
        if np.hypot(*(place - centre)) > radius + small:
            _paint(image, random, _pebble(random), place, small, hue, light)
    mask = _paint(image, random, SHAPES[CLASSES[label]], centre, radius, hue, light)
    image += 0.006 * random.standard_normal((size, size, 1), np.float32)  # a camera's noise
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), mask, label)


# -- the ground ------------------------------------------------------------------------------------


def _ground(random: Random, size: int, hue: float) -> Colours:
    """A flat zone and a rough one, divided by a soft line: sky and gravel, wall and cloth."""
    y, x = _pixels(size)
    turn = random.uniform(0, 2 * np.pi)
    slope = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
    value = random.uniform(0.35, 0.9)
    flat = _colour(hue, random.uniform(0.1, 0.5), value) * (1 + random.uniform(0.1, 0.5) * slope[..., None])
    near = value + float(random.choice([-1, 1])) * random.uniform(0.1, 0.3)
    rough = _colour(hue + random.normal(0, 0.06), random.uniform(0.1, 0.5), min(max(near, 0.2), 0.95))
    grain = np.zeros_like(y)
    for cells, weight in ((6, 0.3), (20, 0.4), (64, 0.5)):
        grain += weight * _noise(random, y.shape, cells)
    rough = rough * (1 + random.uniform(0.1, 0.35) * grain[..., None])
    line = slope + 0.12 * _noise(random, y.shape, 4) - random.uniform(-0.3, 0.3)
    share = _step(line / random.uniform(0.01, 0.05))[..., None]
    return flat * (1 - share) + rough * share


def _noise(random: Random, shape: tuple[int, ...], cells: int) -> Plane:
    """Smooth noise, about -1 to 1, with that many bumps across."""
    small = Image.fromarray(random.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


# -- things on it ----------------------------------------------------------------------------------


def _paint(
    image: Colours,
    random: Random,
    shape: Callable[[Plane, Plane], Plane],
    centre: Float[np.ndarray, "2"],
    radius: float,
    hue: float,
    light: float,
) -> Bool[np.ndarray, "h w"]:
    """Put a shape and its shadow on the image, in place; returns where the shape is."""
    size, mask = len(image), np.zeros(image.shape[:2], bool)
    window = tuple(_span(c, radius + 0.08, size) for c in centre[::-1])
    image, (y, x) = image[window], (plane[window] for plane in _pixels(size))
    turn = random.uniform(0, 2 * np.pi)
    cos, sin = math.cos(turn), math.sin(turn)

    def distance(dx: float, dy: float) -> Plane:
        """To the edge of the shape when moved by that much, negative inside; in widths of the image."""
        u, v = (x - float(centre[0] + dx)) / radius, (y - float(centre[1] + dy)) / radius
        return shape(cos * u + sin * v, cos * v - sin * u) * radius

    shadow = 0.55 * _step(-distance(0.05 * math.cos(light), 0.05 * math.sin(light)) / 0.03)
    image *= 1 - shadow[..., None]
    edge = distance(0.0, 0.0)
    covered = _step(-edge * size)[..., None]  # one pixel of antialiasing
    image *= 1 - covered
    image += covered * _surface(random, edge, x, y, hue, light, 1 / size)
    mask[window] = edge < 0
    return mask


def _span(centre: float, reach: float, size: int) -> slice:
    return slice(max(int((centre - reach) * size), 0), int((centre + reach) * size) + 1)


def _surface(
    random: Random, edge: Plane, x: Plane, y: Plane, hue: float, light: float, pixel: float
) -> Colours:
    """The colours of a bevelled body that light falls on, plain or patterned."""
    opposite = hue + random.uniform(0.25, 0.75)
    colour = _colour(opposite, random.uniform(0.45, 0.95), random.uniform(0.55, 1.0))
    rise_y, rise_x = np.gradient(edge, pixel)
    lit = -(rise_x * math.cos(light) + rise_y * math.sin(light)) * np.exp(-np.abs(edge) / 0.022)
    bright = 0.92 + 0.14 * _pattern(random, x, y) + 0.38 * lit
    return colour * bright[..., None] + 0.5 * np.maximum(lit - 0.55, 0)[..., None]


def _pattern(random: Random, x: Plane, y: Plane) -> Plane | float:
    """Nothing, stripes, checks or stains, about -1 to 1."""
    kind, turn, often = random.integers(4), random.uniform(0, 2 * np.pi), random.uniform(50, 100)
    cos, sin = often * math.cos(turn), often * math.sin(turn)
    if kind == 0:
        return 0.0
    if kind == 1:
        return np.tanh(3 * np.sin(cos * x + sin * y))
    if kind == 2:
        return np.tanh(3 * np.sin(cos * x + sin * y) * np.sin(cos * y - sin * x))
    return _noise(random, x.shape, 12)


def _pebble(random: Random) -> Callable[[Plane, Plane], Plane]:
    waves = [(k, random.uniform(0, 0.35 / k), random.uniform(0, 2 * np.pi)) for k in (2, 3, 5)]

    def pebble(x: Plane, y: Plane) -> Plane:
        angle = np.arctan2(y, x)
        return np.hypot(x, y) - 0.8 - sum(a * np.cos(k * angle + phase) for k, a, phase in waves)

    return pebble


# -- shapes: (x, y) in radii -> about the distance to the edge, negative inside ---------------------


def _polygon(x: Plane, y: Plane, corners: int, inner: float) -> Plane:
    """A star of that many points, whose inner corners lie at that share of the outer ones' distance."""
    half = math.pi / corners
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)
    r = np.hypot(x, y)
    back, up = 1 - inner * math.cos(half), inner * math.sin(half)  # along the side from an outer corner
    return ((r * np.cos(angle) - 1) * up + r * np.sin(angle) * back) / math.hypot(back, up)


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.95, 0.78 - np.hypot(x - 0.5, y))


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.95, y - 0.28), np.maximum(y - 0.95, x - 0.28))


def _flower(x: Plane, y: Plane) -> Plane:
    petals = 0.5 + 0.48 * np.abs(np.cos(2.5 * np.arctan2(y, x)))
    return 0.6 * np.maximum(np.hypot(x, y) - petals, 0.16 - np.hypot(x, y))


def _gear(x: Plane, y: Plane) -> Plane:
    r, teeth = np.hypot(x, y), np.clip(3 * np.cos(9 * np.arctan2(y, x)), -1, 1)
    return np.maximum(0.7 * (r - 0.79 - 0.15 * teeth), 0.3 - r)


def _heart(x: Plane, y: Plane) -> Plane:
    u, v = (x + y) / 1.05, (x - y) / 1.05  # a square on its corner, and a disc on each of two sides
    square = np.maximum(np.abs(u), np.abs(v)) - 0.6
    lobes = np.minimum(np.hypot(u - 0.6, v), np.hypot(u, v - 0.6)) - 0.6
    return 0.74 * np.minimum(square, lobes)


def _leaf(x: Plane, y: Plane) -> Plane:
    body = np.hypot(np.abs(x) + 0.8, y) - 1.26
    vein = np.minimum(0.05 - np.abs(x), 0.5 - y)
    return np.maximum(body, vein)


def _spiral(x: Plane, y: Plane) -> Plane:
    r, pitch = np.hypot(x, y), 0.4
    turn = (r / pitch - np.arctan2(y, x) / (2 * np.pi)) % 1
    return np.maximum(np.abs(turn - 0.5) * pitch - 0.11, r - 0.95)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "crescent": _crescent,
    "cross": _cross,
    "disc": lambda x, y: np.hypot(x, y) - 0.88,
    "flower": _flower,
    "gear": _gear,
    "heart": _heart,
    "leaf": _leaf,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.24,
    "spiral": _spiral,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.72,
    "star": lambda x, y: _polygon(x, y, 5, 0.42),
    "triangle": lambda x, y: _polygon(x, y, 3, 0.5),
}
CLASSES = tuple(SHAPES)


# -- helpers ---------------------------------------------------------------------------------------


@cache
def _pixels(size: int) -> tuple[Plane, Plane]:
    """y and x of the pixels' centres, 0 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    return y, x


def _step(x: Plane) -> Plane:
    """0 to 1, smooth, where x goes from -1/2 to 1/2."""
    x = np.clip(x + 0.5, 0, 1)
    return x * x * (3 - 2 * x)


def _colour(hue: float, saturation: float, value: float) -> Float[np.ndarray, "3"]:
    """RGB of a hue (0 to 1, around), by the usual formula."""
    sector = (hue * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return rgb.astype(np.float32)
