"""A web page about what a task found, which needs nothing else, and its pictures beside it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A drawing.

    Attributes:
      name: Of its file.
      about: What it shows.
      png: The image.
    """

    name: str
    about: str
    png: bytes


def write_page(
    folder: Path,
    name: str,
    about: str,
    pictures: Sequence[Picture],
    numbers: Mapping[str, object],
) -> Path:
    """Writes NAME.html, and each picture as a PNG.

    Args:
      folder: Where to; made where it is missing.
      name: Of the page.
      about: What it is of.
      pictures: Shown in this order.
      numbers: Shown in a table below; what is no number or text is left out.

    Returns:
      The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    images = "".join(
        f"<p>{html.escape(picture.about)}</p>"
        f'<img src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
        for picture in pictures
    )
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{_shown(value)}</td></tr>"
        for key, value in numbers.items()
        if isinstance(value, int | float | str)
    )
    page = folder / f"{name}.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em}img{max-width:100%}"
        "td{padding:0 1em 0 0}</style>"
        f"<h1>{html.escape(name)}</h1><p>{html.escape(about)}</p>{images}<table>{rows}</table>"
        "</html>\n",
        "utf-8",
    )
    return page


def draw_grid(
    name: str,
    about: str,
    grid: Float[np.ndarray, "rows columns"],
    rows: tuple[str, Sequence[object]],
    columns: tuple[str, Sequence[object]],
) -> Picture:
    """Draws shares between 0 and 1 as a heat map; NaN stays white.

    Args:
      name: Of the picture's file.
      about: What it shows.
      grid: The shares.
      rows: What rows are, and the name of each.
      columns: What columns are, and the name of each.
    """
    tall, wide = grid.shape
    figure = Figure(figsize=(2.2 + 0.7 * wide, 1.8 + 0.4 * tall), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel=columns[0], ylabel=rows[0])
    axes.set_xticks(range(wide), [str(one) for one in columns[1]])
    axes.set_yticks(range(tall), [str(one) for one in rows[1]])
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "black" if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes)
    return Picture(name, about, png(figure))


def png(figure: Figure) -> bytes:
    """Renders a figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _shown(value: object) -> str:
    return html.escape(f"{value:,.6g}" if isinstance(value, float) else str(value))
