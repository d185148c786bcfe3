"""Contact sheets: many small pictures with captions on one large one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
LEGIBLE = 192  # pixels: pictures whose longer edge is shorter are enlarged by a whole factor


def _wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """Breaks `text` into at most `lines` lines of `width` pixels; a caption that does not fit ends in '...'."""
    out: list[str] = []
    line = ""
    for char in " ".join(text.split()):
        if line and font.getlength(line + char) > width:
            # Break at the last blank where there is one, so that words stay whole.
            head, blank, tail = line.rpartition(" ")
            out.append(head if blank and char != " " else line)
            line = (tail if blank and char != " " else "") + char
            line = line.lstrip()
        else:
            line += char
    out.append(line)
    if len(out) > lines:
        last = out[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        out = out[: lines - 1] + [last + "..."]
    return out


def contact_sheet(
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    caption_lines: int = 3,
) -> Image.Image:
    """Lays pictures out in rows on white, each with its caption below.

    Args:
      images: PIL pictures or uint8 arrays [H, W, 3]; sizes may differ.
      captions: one per image; none by default.
      columns: pictures per row; by default a nearly square sheet of at most 8 columns.
      scale: enlargement by whole pixels (nearest neighbour); by default what makes small pictures legible.
      caption_lines: a caption is wrapped to at most this many lines.

    Returns:
      The sheet, RGB.

    Raises:
      ValueError: when there is no image, or another number of captions than images.
    """
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
    if not pictures:
        raise ValueError("A contact sheet needs at least one image.")
    captions = [""] * len(pictures) if captions is None else list(captions)
    if len(captions) != len(pictures):
        raise ValueError(f"A contact sheet of {len(pictures)} images got {len(captions)} captions; give one per image.")
    longest = max(max(picture.size) for picture in pictures)
    scale = max(1, LEGIBLE // longest) if scale is None else scale
    pictures = [
        picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    columns = min(len(pictures), columns or min(8, math.ceil(math.sqrt(len(pictures)))))
    rows = math.ceil(len(pictures) / columns)
    cell_width = max(picture.width for picture in pictures)
    cell_height = max(picture.height for picture in pictures)
    font_size = int(np.clip(cell_width // 16, 12, 40))
    font = ImageFont.load_default(size=font_size)
    line_height = round(font_size * 1.25)
    wrapped = [_wrap(caption, font, cell_width, caption_lines) if caption else [] for caption in captions]
    text_height = max(len(lines) for lines in wrapped) * line_height
    sheet = Image.new(
        "RGB",
        (columns * (cell_width + MARGIN) + MARGIN, rows * (cell_height + text_height + MARGIN) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        row, column = divmod(index, columns)
        x = MARGIN + column * (cell_width + MARGIN)
        y = MARGIN + row * (cell_height + text_height + MARGIN)
        sheet.paste(picture, (x + (cell_width - picture.width) // 2, y))
        for i, line in enumerate(lines):
            draw.text((x, y + cell_height + i * line_height + 2), line, fill="black", font=font)
    return sheet
