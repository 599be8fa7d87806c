"""What the page says of an answer, as HTML: numbers in `<data>` elements, escaped texts, pictures told in words."""

import base64
from html import escape

import PIL.Image

from ..training.thumbnails import CRISP, encode, shrink
from .answering import Answer, Neighbor
from .drawing import draw_graph, shown_class
from .drawing import percent as short_percent

MAX_CLASSES = 5  # of the table that is open
MAX_FIGURES = 10  # of neighbours that are open
MAX_EXAMPLES = 6

INTRODUCTION = """
<h1>Classes by neighbours</h1>
<p>This model compares your image with those of its <em>support bank</em>, of which some or all are labelled. It ranks
them by similarity and lets the nearest ones speak, each with a weight; a graph network makes an answer of what they
say. You see the classes, the images that the answer rests on, and the graph between them.</p>
"""
CHOOSE = "<h2>1. Choose an image</h2>"
CHOOSE_EXAMPLE = "<p>Or take one of the bank, which will find itself:</p>"
RANK = """
<h2>2. Turn the ranking</h2>
<p>A low temperature trusts the few nearest images, a high one hears all of them alike.</p>
"""
TEACH = """
<h2>3. Add your image to the bank</h2>
<p>Say what it shows, and see how the answer moves. It joins a copy of the bank that is yours alone and is forgotten
when you leave.</p>
"""
ANSWER, GRAPH, NEIGHBORS = "<h2>Answer</h2>", "<h2>Ranking graph</h2>", "<h2>The images it rests on</h2>"
WAITING = "<p>It appears here as soon as you choose an image.</p>"
GRAPH_CAPTION = (
    "Your image is in the middle. The thicker a line, the more weight its neighbour has; thin lines join neighbours of"
    " each other. A dashed frame and a question mark: the image has no label of its own, and its class is the one that"
    " spread to it through the graph."
)


def percent(share: float) -> str:
    """A probability, in which an added image can be seen to move it."""
    return f"{100 * share:.1f} %"


def picture(image: PIL.Image.Image, description: str) -> str:
    """An `<img>` that carries its file."""
    content = encode(shrink(image))
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    crisp = ' class="crisp"' if max(image.size) <= CRISP else ""
    data = base64.b64encode(content).decode()
    return f'<img{crisp} alt="{escape(description)}" src="data:image/{kind};base64,{data}">'


def alert(text: str) -> str:
    """What went wrong."""
    return f'<p class="problem">{escape(text)}</p>' if text else ""


def options(names: list[str]) -> str:
    """`<option>` elements, whose values are the places of the names."""
    return "".join(f'<option value="{place}">{escape(name)}</option>' for place, name in enumerate(names))


def examples(images: list[tuple[PIL.Image.Image, str]]) -> str:
    """A button for each image and the name of its class."""
    buttons = (
        f'<li><button type="button" data-place="{place}">{picture(image, f"Example of {name}")}</button></li>'
        for place, (image, name) in enumerate(images)
    )
    return f'<ul class="examples">{"".join(buttons)}</ul>'


def classes(answer: Answer, before: Answer | None) -> str:
    """A table of the classes, best first, the first few open; with `before`, also what it was without the visitor's
    images, and all that was among the first few then."""
    names = list(answer.probabilities)
    open_names = names[:MAX_CLASSES]
    if before is not None:
        open_names += [name for name in list(before.probabilities)[:1] if name not in open_names]
    others = [name for name in names if name not in open_names]
    table = _class_table(open_names, answer, before, "The likeliest classes")
    if others:
        rest = _class_table(others, answer, before, "The other classes")
        table += f"<details><summary>The other {len(others)} classes</summary>{rest}</details>"
    return table


def _class_table(names: list[str], answer: Answer, before: Answer | None, caption: str) -> str:
    head = '<th scope="col">Class</th><th scope="col">Probability</th>'
    head += '<th scope="col">Before</th>' if before is not None else ""
    rows = []
    for name in names:
        cells = f'<th scope="row">{escape(name)}</th><td>{_bar(answer.probabilities[name])}</td>'
        if before is not None:
            share = before.probabilities[name]
            cells += f'<td><data class="before" value="{share:.9f}">{percent(share)}</data></td>'
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<table class="classes"><caption class="hidden-text">{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _bar(share: float) -> str:
    width = f"{100 * min(max(share, 0), 1):.1f}%"
    return (
        f'<span class="bar" aria-hidden="true"><span style="width:{width}"></span></span>'
        f'<data class="share" value="{share:.9f}">{percent(share)}</data>'
    )


def neighbors(answer: Answer) -> str:
    """A figure for each neighbour, weightiest first, the first few open."""
    figures = [_figure(place, neighbor) for place, neighbor in enumerate(answer.neighbors, 1)]
    shown, rest = "".join(figures[:MAX_FIGURES]), figures[MAX_FIGURES:]
    lists = f'<ol class="neighbors">{shown}</ol>'
    if rest:
        summary = f"The other {len(rest)} images"
        lists += (
            f"<details><summary>{summary}</summary>"
            f'<ol class="neighbors" start="{MAX_FIGURES + 1}">{"".join(rest)}</ol></details>'
        )
    return lists


def _figure(place: int, neighbor: Neighbor) -> str:
    name, in_words = _class_of(neighbor)
    whose = "Your image" if neighbor.added else f"Support image {neighbor.id}"
    if neighbor.thumbnail is None:
        image = f'<span class="missing">{whose}</span>'
    else:
        image = picture(neighbor.thumbnail, f"{whose}, {in_words}")
    badge = '<span class="badge">added by you</span>' if neighbor.added else ""
    weight, similarity = short_percent(neighbor.weight), f"{neighbor.similarity:.3f}"
    return (
        f'<li><figure class="{"added" if neighbor.added else "support"}">{image}'
        f'<figcaption><span class="name">{place}.'
        f" {escape(name)}</span>{badge}"
        f'<span>weight <data class="weight" value="{neighbor.weight:.9f}">{weight}</data></span>'
        f'<span>similarity <data class="similarity" value="{neighbor.similarity:.9f}">{similarity}</data></span>'
        "</figcaption></figure></li>"
    )


def _class_of(neighbor: Neighbor) -> tuple[str, str]:
    """In short, as the drawing has it, and in words."""
    name = shown_class(neighbor)
    if name is None:
        return "no label", "no label"
    if neighbor.class_name is None:
        return f"{name}?", f"no label, {name} by those around it"
    return name, name


def graph(answer: Answer, image: PIL.Image.Image | None) -> str:
    """The drawing, with the words that a reader of it needs."""
    return f'<figure class="graph">{draw_graph(answer, image)}<figcaption>{GRAPH_CAPTION}</figcaption></figure>'


def bank_summary(names: list[str]) -> str:
    """The classes of the images that the visitor has added."""
    if not names:
        return "<p>You have added nothing yet.</p>"
    images = "1 image" if len(names) == 1 else f"{len(names)} images"
    return f"<p>You have added {images}: {', '.join(map(escape, names))}.</p>"


def moves(answer: Answer, before: Answer | None, names: list[str]) -> str:
    """What the added images moved: the class of the last one, and the likeliest ones before and after."""
    if before is None:
        return ""
    told = dict.fromkeys([names[-1], *list(before.probabilities)[:1], *list(answer.probabilities)[:1]])
    shares = ((name, percent(before.probabilities[name]), percent(answer.probabilities[name])) for name in told)
    moved = "".join(f"<li>{escape(name)}: {earlier} before, {now} now</li>" for name, earlier, now in shares)
    return f'<ul class="moves">{moved}</ul>'


def announcement(answer: Answer, temperature: float, num_neighbors: int) -> str:
    """The answer in a sentence, for a screen reader."""
    name, share = next(iter(answer.probabilities.items()))
    return (
        f"{name}, {percent(share)}. It rests on {len(answer.neighbors)} images, at temperature {temperature:.3g} and"
        f" {num_neighbors} neighbours."
    )
