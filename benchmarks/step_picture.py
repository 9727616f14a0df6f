"""Stage times as stacked bars, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 1100, 34, 16, 130, 110, 40
COLORS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#6b9e5f", "#6d8fc0", "#d2691e")
INK, PAPER = "#202020", "#ffffff"
MIN_LABEL = 34  # pixels of a piece that has its number written on it


def draw_bars(path: Path, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """One bar a row, its pieces in milliseconds; each bar has a scale of its own, told beside it.

    A shared scale would leave nothing to see of the fast ones beside the slow one, so the bars are
    drawn twice: to a shared scale above, each filling the width below.
    """
    names = list(next(iter(rows.values())))
    longest = max(sum(pieces.values()) for pieces in rows.values()) or 1.0
    block = len(rows) * (BAR + GAP)
    height = TOP + 2 * (block + TOP) + 26 * -(-len(names) // 3) + 10
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    draw.text((12, 10), title, fill=INK, font=font)
    y = TOP
    for shared in (True, False):
        what = "same scale" if shared else "each on its own scale"
        draw.text((12, y), what, fill=INK, font=small)
        y += 20
        for name, pieces in rows.items():
            total = sum(pieces.values())
            scale = (WIDTH - LEFT - RIGHT) / ((longest if shared else total) or 1.0)
            draw.text((12, y + 8), name, fill=INK, font=font)
            x = float(LEFT)
            for color, value in zip(COLORS, pieces.values(), strict=False):
                width = value * scale
                draw.rectangle((x, y, x + width, y + BAR), fill=color)
                if width > MIN_LABEL:
                    draw.text((x + 3, y + 10), f"{value:.3g}", fill=PAPER, font=small)
                x += width
            draw.text((x + 6, y + 8), f"{total:.4g} ms", fill=INK, font=font)
            y += BAR + GAP
        y += TOP - 20
    for i, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        left, top = 12 + (i % 3) * 350, y + 26 * (i // 3)
        draw.rectangle((left, top, left + 16, top + 16), fill=color)
        draw.text((left + 22, top), name, fill=INK, font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
