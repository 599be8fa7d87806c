"""The graph of an answer: whole without anything else, told in words as well, and safe whatever a class is called."""

import base64
import re
from io import BytesIO
from xml.etree import ElementTree

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_bpgcn.app.answering import Answer, Edge, Neighbor
from modeling_bpgcn.app.drawing import COLORS, GREY, HEIGHT, MAX_DRAWN, WIDTH, draw_graph, percent

SVG = "{http://www.w3.org/2000/svg}"
DIGIT, PHOTOGRAPH = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (600, 300), "blue")


def neighbor(number: int, name: str | None = "cat", weight: float = 0.1, **fields) -> Neighbor:
    picture = fields.pop("thumbnail", DIGIT)
    return Neighbor(number, name, weight, 0.5, picture, fields.pop("added", False), **fields)


def answer_with(*neighbors: Neighbor, among: tuple[Edge, ...] = (), **probabilities: float) -> Answer:
    own = tuple(Edge(0, place, one.weight) for place, one in enumerate(neighbors, 1))
    return Answer(probabilities or {"cat": 0.75, "dog": 0.25}, neighbors, own + among)


def parsed(answer: Answer, image: Image.Image | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(draw_graph(answer, image))


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text for text in svg.iter(f"{SVG}text")]


def words(svg: ElementTree.Element) -> tuple[str, str]:
    return svg.find(f"{SVG}title").text, svg.find(f"{SVG}desc").text


def lines(svg: ElementTree.Element) -> list[dict]:
    return [line.attrib for line in svg.iter(f"{SVG}line")]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_classes_weights_and_the_answer_are_written():
    svg = parsed(answer_with(neighbor(1, "cat", 0.6), neighbor(2, "dog", 0.03), neighbor(3, None, 0.004)))
    assert texts(svg) == ["cat", "60 %", "dog", "3 %", "no label", "0.4 %", "image", "cat", "75 %"]
    title, description = words(svg)
    assert title == "The image and the 3 support images that its answer rests on"
    assert "in the middle is answered with cat, 75 %" in description
    assert "cat, weight 60 %; dog, weight 3 %; no label, weight 0.4 %." in description
    assert description.endswith("no edges of the support graph.")


def test_an_added_image_and_propagated_labels_are_told_apart():
    svg = parsed(answer_with(neighbor(1, "cat", 0.6, added=True), neighbor(2, None, 0.3, propagated="dog")))
    assert texts(svg)[:4] == ["cat", "60 % added", "dog?", "30 %"]
    assert "cat, added by you, weight 60 %; no label, dog by propagated labels, weight 30 %." in words(svg)[1]
    assert [rect.get("stroke-dasharray") is not None for rect in svg.iter(f"{SVG}rect")].count(True) == 1


def test_lines_carry_weight_by_width_and_class_by_color():
    svg = parsed(answer_with(neighbor(1, "cat", 0.6), neighbor(2, "dog", 0.3), neighbor(3, "cat", 0.1)))
    drawn = sorted(lines(svg), key=lambda line: -float(line["stroke-width"]))
    assert [line["stroke"] for line in drawn] == [COLORS[0], COLORS[1], COLORS[0]]
    widths = [float(line["stroke-width"]) for line in drawn]
    assert widths == pytest.approx([10.0, 5.6, 2.7], abs=0.05)
    assert {(line["x1"], line["y1"]) for line in drawn} == {(f"{WIDTH / 2:.1f}", f"{HEIGHT / 2:.1f}")}
    fills = [rect.get("fill") for rect in svg.iter(f"{SVG}rect")]
    assert [fill for fill in fills if fill in COLORS] == [COLORS[0], COLORS[1], COLORS[0], COLORS[0]]  # the answer: cat


def test_edges_between_neighbors_are_thin_and_grey():
    among = (Edge(1, 2, 0.5), Edge(3, 1, 0.2))
    svg = parsed(answer_with(*(neighbor(i, weight=1 / 3) for i in range(3)), among=among))
    thin = [line for line in lines(svg) if line["stroke"] == GREY]
    assert len(thin) == 2
    assert len(lines(svg)) == 5
    assert max(float(line["stroke-width"]) for line in thin) <= 1
    assert "2 edges of the support graph" in words(svg)[1]


def test_more_classes_than_colors_share_the_grey():
    svg = parsed(answer_with(*(neighbor(i, f"class {i}", 0.1) for i in range(MAX_DRAWN))))
    assert {line["stroke"] for line in lines(svg)} == {*COLORS, GREY}
    assert [text for text in texts(svg) if text.startswith("class")] == [f"class {i}" for i in range(MAX_DRAWN)]


def test_of_many_neighbors_the_weightiest_are_drawn_and_that_is_said():
    among = (Edge(1, 2, 0.5), Edge(1, 40, 0.5), Edge(45, 2, 0.5))
    svg = parsed(answer_with(*(neighbor(i, f"c{i}", (50 - i) / 1275) for i in range(50)), among=among))
    assert "50 support images" in words(svg)[0]
    assert "of which the 10 weightiest are drawn" in words(svg)[0]
    assert [text for text in texts(svg) if re.fullmatch(r"c\d+", text)] == [f"c{i}" for i in range(MAX_DRAWN)]
    assert len(lines(svg)) == MAX_DRAWN + 1
    assert len(list(svg.iter(f"{SVG}image"))) == MAX_DRAWN


@pytest.mark.parametrize("count", range(MAX_DRAWN + 1))
def test_cards_lie_within_the_picture_and_touch_no_other(count):
    svg = parsed(answer_with(*(neighbor(i) for i in range(count))), PHOTOGRAPH)
    boxes = []
    for rect in svg.iter(f"{SVG}rect"):
        if rect.get("fill") in (*COLORS, GREY):
            x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            boxes.append((x, y, x + width, y + height))
    assert len(boxes) == count + 1
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert top >= 0
        assert right <= WIDTH
        assert bottom <= HEIGHT
        for other in boxes[:i]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def test_pictures_are_inside_and_small_ones_keep_their_pixels():
    svg = parsed(answer_with(neighbor(1), neighbor(2, thumbnail=None)), PHOTOGRAPH)
    images = [image.attrib for image in svg.iter(f"{SVG}image")]
    kinds = []
    for image in images:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", image["href"]).groups()
        with PIL.Image.open(BytesIO(base64.b64decode(content))) as picture:
            kinds.append((kind, picture.format, picture.size, "pixelated" in image.get("style", "")))
    assert kinds == [("png", "PNG", (8, 8), True), ("jpeg", "JPEG", (128, 64), False)]
    assert "#2" in texts(svg)  # in place of a picture


# --- where it is shown -----------------------------------------------------------------------------------------------


def test_it_scales_to_its_page_and_is_one_image_to_a_screen_reader():
    svg = parsed(answer_with(neighbor(1)))
    assert svg.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    assert svg.get("role") == "img"
    assert svg.get("width") is svg.get("height") is None
    named = svg.get("aria-labelledby").split()
    assert named == [svg.find(f"{SVG}title").get("id"), svg.find(f"{SVG}desc").get("id")]
    other = parsed(answer_with(neighbor(1, "dog")))
    assert set(other.get("aria-labelledby").split()).isdisjoint(named)  # both may be on one page


def luminance(color: str) -> float:
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", [*COLORS, GREY])
def test_colors_are_legible_under_white_letters_and_on_light_and_dark_pages(color):
    own = luminance(color) + 0.05
    assert 1.05 / own >= 4.5  # letters, WCAG 1.4.3
    assert own / (luminance("#111827") + 0.05) >= 3  # lines and borders, WCAG 1.4.11


@pytest.mark.parametrize(
    "name", ['<script>alert("1")</script>', "a & b", "\"'><image href=x>", "bell\x07\x00", "]]>", ""]
)
def test_names_of_classes_are_text(name):
    for one in (neighbor(1, name), neighbor(1, None, propagated=name)):
        answer = answer_with(one, **{name: 1.0})
        drawn = draw_graph(answer, DIGIT)
        svg = ElementTree.fromstring(drawn)
        assert {element.tag.removeprefix(SVG) for element in svg.iter()} == {
            *("svg", "title", "desc", "line", "rect", "image", "text")
        }
        plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
        assert f"is answered with {plain}, 100 %" in words(svg)[1]


@given(name=st.text(min_size=1), other=st.none() | st.text(), weight=st.floats(0, 1))
def test_any_name_gives_a_whole_picture_without_references(name, other, weight):
    drawn = draw_graph(answer_with(neighbor(1, name, weight), neighbor(2, None, propagated=other), **{name: weight}))
    svg = ElementTree.fromstring(drawn.encode())
    attributes = [item for element in svg.iter() for item in element.attrib.items()]
    assert not [key for key, _ in attributes if key.startswith("on")]
    assert all(value.startswith("data:image/") for key, value in attributes if key.endswith("href"))
    assert "url(" not in "".join(value for key, value in attributes if not key.endswith("href"))


def test_long_names_are_squeezed_and_then_cut():
    svg = parsed(
        answer_with(
            neighbor(1, "c" * 10), neighbor(2, "d" * 13), neighbor(3, "e" * 30), neighbor(4, None, propagated="f" * 30)
        )
    )
    shown = {text.text: text.get("textLength") for text in svg.iter(f"{SVG}text")}
    assert shown["c" * 10] is None
    assert shown["d" * 13] == shown["e" * 12 + "…"] == shown["f" * 12 + "…?"] == "72"
    assert "e" * 30 in words(svg)[1]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.5, "50 %"), (0.0996, "10 %"), (0.0994, "9.9 %"), (0.00012, "0.012 %"), (0, "0 %")],
)
def test_shares_are_told_in_two_digits(share, text):
    assert percent(share) == text
