"""Scenes of the shapes world and their exact rendering.

A scene is a plain background and one to four flat objects, each a class x colour x size on a cell of a 3 x 3 grid.
An image is 48 x 48 pixels: one cell is 16 pixels wide, which is one token of the tiny model (VAE factor 8, patch 2).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

GRID = 3
CELL = 16
IMAGE_SIZE = GRID * CELL
NUM_CELLS = GRID * GRID

CLASSES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 185),
    "black": (25, 25, 25),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (160, 160, 160),
    "pink": (250, 185, 205),
    "cyan": (165, 230, 235),
}
# Side of the object's bounding square in pixels.
SIZES = {"small": 10, "large": 14}
CELL_NAMES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One object: `cell` counts row by row from the top left, 0 to 8."""

    cell: int
    shape: str
    color: str
    size: str = "large"

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels."""
        row, column = divmod(self.cell, GRID)
        half = SIZES.get(self.size, CELL) / 2
        x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
        return x - half, y - half, x + half, y + half


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and objects on different cells, in the order of their cells."""

    background: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        if len(set(cells)) != len(cells):
            raise ValueError(f"Two objects share a cell in {self.things}; give each its own.")
        object.__setattr__(self, "things", tuple(sorted(self.things)))

    def at(self, cell: int) -> Thing | None:
        return next((thing for thing in self.things if thing.cell == cell), None)

    @property
    def free_cells(self) -> list[int]:
        taken = {thing.cell for thing in self.things}
        return [cell for cell in range(NUM_CELLS) if cell not in taken]

    def replace(self, cell: int, thing: Thing | None) -> Scene:
        """The scene with another object, or none, at `cell`."""
        kept = tuple(t for t in self.things if t.cell != cell)
        return Scene(self.background, kept + (() if thing is None else (thing,)))


@functools.cache
def templates() -> dict[tuple[str, str], np.ndarray]:
    """(class, size) -> float32 [CELL, CELL] coverage of each pixel, anti-aliased by 8 x 8 supersampling."""
    factor = 8
    axis = (np.arange(CELL * factor) + 0.5) / factor - CELL / 2
    x, y = np.meshgrid(axis, axis)
    out = {}
    for size, side in SIZES.items():
        half = side / 2
        square = (abs(x) <= half) & (abs(y) <= half)
        arm = side // 5
        masks = {
            "circle": x**2 + y**2 <= half**2,
            "square": square,
            "triangle": square & (abs(x) <= (y + half) / 2),
            "cross": square & ((abs(x) <= arm) | (abs(y) <= arm)),
        }
        for shape in CLASSES:
            blocks = masks[shape].reshape(CELL, factor, CELL, factor)
            out[shape, size] = blocks.mean(axis=(1, 3)).astype(np.float32)
    return out


def render(scene: Scene) -> np.ndarray:
    """uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        row, column = divmod(thing.cell, GRID)
        cover = templates()[thing.shape, thing.size][..., None]
        window = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        window[:] = window * (1 - cover) + np.asarray(COLORS[thing.color], np.float32) * cover
    return np.rint(image).astype(np.uint8)


def random_thing(rng: np.random.Generator, cell: int) -> Thing:
    """Any class, colour and size at `cell`."""
    return Thing(
        cell,
        CLASSES[rng.integers(len(CLASSES))],
        list(COLORS)[rng.integers(len(COLORS))],
        list(SIZES)[rng.integers(len(SIZES))],
    )


def random_scene(rng: np.random.Generator, count: int) -> Scene:
    """`count` arbitrary objects on arbitrary cells."""
    cells = rng.permutation(NUM_CELLS)[:count]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(background, tuple(random_thing(rng, int(cell)) for cell in cells))
