"""How figures look, and where they go."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def shades(number: int, name: str = "viridis_r") -> list[Any]:
    """Colours for an ordered choice, light to dark; the palest that still shows on white first."""
    from matplotlib import colormaps

    return [colormaps[name](0.2 + 0.75 * i / max(number - 1, 1)) for i in range(number)]


def save(figure: Any, folder: str | os.PathLike | None, name: str) -> None:
    """`folder`/`name` holds the figure as a small PNG file, which tells nothing but the figure;
    without a folder nothing is written.
    """
    if not folder:
        return
    from PIL import Image

    path = pathlib.Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # 64 colours are enough for lines and their smooth edges, and take a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
