"""Web pages about what was found, which need nothing else, and their pictures beside them."""

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

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em}"
    "img{max-width:100%}table{border-collapse:collapse;margin-top:1em}"
    "th,td{border-bottom:1px solid #ccc;padding:3px 10px;text-align:left}"
)


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


class Section(NamedTuple):
    """A part of a page: a paragraph, then pictures, then a table.

    Attributes:
      title: Its heading; none where it is empty.
      about: The paragraph.
      pictures: In this order.
      table: Rows of cells, the first of them the names of the columns. What stands in a cell behind
        its first line is in small print.
    """

    title: str
    about: str
    pictures: Sequence[Picture] = ()
    table: Sequence[Sequence[str]] = ()


def write_page(
    folder: Path,
    name: str,
    about: str,
    pictures: Sequence[Picture],
    numbers: Mapping[str, object],
) -> Path:
    """Writes NAME.html about one task, and each picture as a PNG.

    Args:
      folder: Where to; made where it is missing.
      name: Of the page.
      about: What it is of.
      pictures: Shown in this order.
      numbers: Shown in a table below; what is no number or text is left out.

    Returns:
      The page.
    """
    shown = {key: value for key, value in numbers.items() if isinstance(value, int | float | str)}
    rows = [(key, _shown(value)) for key, value in shown.items()]
    section = Section("", "", pictures, [("found", ""), *rows] if rows else ())
    return write_sections(folder, name, name, about, [section])


def write_sections(
    folder: Path, name: str, title: str, about: str, sections: Sequence[Section]
) -> Path:
    """Writes NAME.html, whole or not at all, and each picture of its sections as a PNG.

    Args:
      folder: Where to; made where it is missing.
      name: Of the page.
      title: Its heading.
      about: Its first paragraph.
      sections: The rest.

    Returns:
      The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for picture in (picture for section in sections for picture in section.pictures):
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    page, title = folder / f"{name}.html", html.escape(title)
    draft = page.with_suffix(".part")
    draft.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(about)}</p>"
        f"{''.join(map(_section, sections))}</html>\n",
        "utf-8",
    )
    return draft.replace(page)


def _section(section: Section) -> str:
    head = f"<h2>{html.escape(section.title)}</h2>" if section.title else ""
    about = f"<p>{html.escape(section.about)}</p>" if section.about else ""
    images = "".join(
        f"<p>{html.escape(picture.about)}</p>"
        f'<img src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
        for picture in section.pictures
    )
    rows = "".join(
        f"<tr>{''.join(_cell(cell, 'td' if number else 'th') for cell in row)}</tr>"
        for number, row in enumerate(section.table)
    )
    return f"{head}{about}{images}" + f"<table>{rows}</table>" * bool(rows)


def _cell(text: str, tag: str) -> str:
    first, *more = html.escape(text).split("\n")
    small = f"<br><small>{'<br>'.join(more)}</small>" if more else ""
    return f"<{tag}>{first}{small}</{tag}>"


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
