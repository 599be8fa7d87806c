"""The graph around one answer as an SVG picture: self-contained, legible on light and dark pages, and told in words."""

import base64
import math
from hashlib import sha256
from html import escape
from typing import NamedTuple

import PIL.Image

from ..training.thumbnails import encode, shrink
from .answering import Answer, Edge, Neighbor

MAX_DRAWN = 10
WIDTH, HEIGHT = 360, 460
RADII = 140, 188  # of the ellipse on which the neighbours stand: none touches another
CARD, QUERY_CARD = (78, 52), (104, 78)  # width and height of a picture; its caption hangs below
CAPTION = 30
LETTERS, SQUEEZED = 10, 13  # of a class name in the caption of a card; those between are set narrower
THINNEST, WIDEST = 1.2, 10.0
# each has a contrast of at least 4.5 to the white letters on it, and of 3 to pages that are white or nearly black
COLORS = ("#2f6fb7", "#a85d08", "#1f7d4a", "#8a4fb3", "#bb3a52", "#1f7a85", "#80602a")
GREY = "#667085"


class Card(NamedTuple):
    """A picture (None: a text in its place) with a caption of two lines, about a center."""

    center: tuple[float, float]
    size: tuple[int, int]
    image: PIL.Image.Image | None
    instead: str
    lines: tuple[str, str]
    color: str
    dashed: bool = False


def draw_graph(answer: Answer, image: PIL.Image.Image | None = None) -> str:
    """An `<svg>` element without scripts or references to anything outside of it: the query in the middle, with `image`
    if given, and the weightiest neighbours around it, clockwise from the top.

    Lines from the query are the wider the more weight they carry. Color and caption tell the class of a support image;
    one that has no label is dashed and has the class, with a question mark, that labels propagated to it. Thin grey
    lines are edges of the support graph.
    """
    shown = answer.neighbors[:MAX_DRAWN]
    title, description = describe(answer)
    colors = _class_colors([shown_class(neighbor) for neighbor in shown])
    places = [(WIDTH / 2, HEIGHT / 2), *_around(len(shown))]
    parts = [_line(places, edge, GREY, 1.0, 0.25 + 0.5 * min(edge.weight, 1.0)) for edge in _among(answer)]
    heaviest = max((neighbor.weight for neighbor in shown), default=0.0) or 1.0
    for place, neighbor in reversed(list(enumerate(shown, 1))):
        width = THINNEST + (WIDEST - THINNEST) * neighbor.weight / heaviest
        parts.append(_line(places, Edge(0, place, neighbor.weight), colors[shown_class(neighbor)], width))
    parts += [_card(_of_neighbor(*pair, colors)) for pair in zip(shown, places[1:], strict=True)]
    name, probability = next(iter(answer.probabilities.items()))
    lines = _short(name, QUERY_CARD[0]), percent(probability)
    parts.append(_card(Card(places[0], QUERY_CARD, image, "image", lines, colors.get(name, GREY))))
    body = "".join(parts)
    key = sha256((title + description + body).encode()).hexdigest()[:12]  # ids are shared by all of a page
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-labelledby="title-{key} description-{key}" font-family="system-ui, sans-serif" font-size="12.5"'
        ' text-anchor="middle" style="display:block;width:100%;max-width:560px;margin:auto">'
        f'<title id="title-{key}">{_text(title)}</title><desc id="description-{key}">{_text(description)}</desc>'
        f"{body}</svg>"
    )


def describe(answer: Answer) -> tuple[str, str]:
    """The title and the description of the picture, for those who do not see it."""
    shown = answer.neighbors[:MAX_DRAWN]
    title = f"The image and the {len(answer.neighbors)} support images that its answer rests on"
    if len(shown) < len(answer.neighbors):
        title += f", of which the {len(shown)} weightiest are drawn"
    name, probability = next(iter(answer.probabilities.items()))
    listed = "; ".join(f"{_in_words(neighbor)}, weight {percent(neighbor.weight)}" for neighbor in shown)
    among = len(_among(answer))
    description = (
        f"The image in the middle is answered with {name}, {percent(probability)}. Around it, clockwise from the top,"
        f" its neighbors by falling weight: {listed}. Thin lines between them: {among or 'no'} edges of the support"
        " graph."
    )
    return title, description


def percent(share: float) -> str:
    """A share in [0, 1] with two digits."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def shown_class(neighbor: Neighbor) -> str | None:
    """The class of a neighbour, or else the one that labels propagated to it; None where none did."""
    return neighbor.class_name if neighbor.class_name is not None else neighbor.propagated


def _in_words(neighbor: Neighbor) -> str:
    if neighbor.added:
        return f"{neighbor.class_name}, added by you"
    if neighbor.class_name is not None:
        return neighbor.class_name
    return "no label" + (f", {neighbor.propagated} by propagated labels" if neighbor.propagated else "")


def _among(answer: Answer) -> list[Edge]:
    last = min(len(answer.neighbors), MAX_DRAWN)
    return [edge for edge in answer.edges if edge.source > 0 and max(edge.source, edge.target) <= last]


def _class_colors(names: list[str | None]) -> dict[str | None, str]:
    """The classes that come first have a color of their own; the others share the grey of no class."""
    names = list(dict.fromkeys(name for name in names if name is not None))
    return dict.fromkeys([None, *names], GREY) | dict(zip(names, COLORS, strict=False))


def _around(count: int) -> list[tuple[float, float]]:
    angles = (2 * math.pi * place / count for place in range(count))
    return [(WIDTH / 2 + RADII[0] * math.sin(a), HEIGHT / 2 - RADII[1] * math.cos(a)) for a in angles]


def _of_neighbor(neighbor: Neighbor, center: tuple[float, float], colors: dict[str | None, str]) -> Card:
    name, unlabeled = shown_class(neighbor), neighbor.class_name is None
    caption = "no label" if name is None else f"{_short(name, CARD[0])}?" if unlabeled else _short(name, CARD[0])
    weight = percent(neighbor.weight) + (" added" if neighbor.added else "")
    color = colors[name]
    return Card(center, CARD, neighbor.thumbnail, f"#{neighbor.id}", (caption, weight), color, unlabeled)


def _line(places: list[tuple[float, float]], edge: Edge, color: str, width: float, opacity: float = 1.0) -> str:
    (x, y), (u, v) = places[edge.source], places[edge.target]
    style = f'stroke="{color}" stroke-width="{width:.1f}" stroke-opacity="{opacity:.2f}"'
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}" {style}/>'


def _card(card: Card) -> str:
    (x, y), (width, height) = card.center, card.size
    left, top = x - width / 2, y - (height + CAPTION) / 2
    parts = [
        _box(left, top, width, height + CAPTION, f'rx="5" fill="{card.color}"'),
        _box(left + 2, top + 2, width - 4, height - 2, 'fill="#1f2430"'),
    ]
    if card.image is None:
        parts.append(_written(x, top + height / 2 + 4, card.instead))
    else:
        parts.append(_picture(card.image, left + 2, top + 2, width - 4, height - 2))
    if card.dashed:
        style = 'rx="4" fill="none" stroke="#ffffff" stroke-width="1.5" stroke-dasharray="4 4"'
        parts.append(_box(left + 1, top + 1, width - 2, height + CAPTION - 2, style))
    for line, text in enumerate(card.lines):
        squeezed = width - 6 if len(text) * CARD[0] > LETTERS * width else None
        parts.append(_written(x, top + height + 12 + 13 * line, text, squeezed))
    return "".join(parts)


def _picture(image: PIL.Image.Image, left: float, top: float, width: float, height: float) -> str:
    small = shrink(image)
    content = encode(small)
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    # of a drawing as small as a digit every pixel counts; a photograph may lose its margins
    few = max(small.size) < height
    style = 'style="image-rendering:pixelated"' if few else 'preserveAspectRatio="xMidYMid slice"'
    data = base64.b64encode(content).decode()
    return _box(left, top, width, height, f'{style} href="data:image/{kind};base64,{data}"', "image")


def _box(left: float, top: float, width: float, height: float, style: str, kind: str = "rect") -> str:
    return f'<{kind} x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _written(x: float, y: float, text: str, width: float | None = None) -> str:
    squeezed = "" if width is None else f' textLength="{width}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#ffffff"{squeezed}>{_text(text)}</text>'


def _short(name: str, width: int) -> str:
    letters = SQUEEZED * width // CARD[0]
    return name if len(name) <= letters else name[: letters - 1].rstrip() + "…"


def _text(text: str) -> str:
    # control characters are not allowed in XML, escaped or not
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
