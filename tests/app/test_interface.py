"""What visitors do, without a browser: the page says what the demonstration answers, and faults in sentences."""

import asyncio
import logging
import re
from itertools import pairwise

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

pytest.importorskip("gradio")

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.app import interface, markup
from modeling_bpgcn.app.answering import MAX_ADDED, Demonstration
from modeling_bpgcn.app.interface import Handlers, build_interface, temperatures
from modeling_bpgcn.training.thumbnails import read_thumbnails

from .conftest import CLASS_NAMES, NUM_NEIGHBORS

OWN = interface.OCTAVES * interface.STEPS_PER_OCTAVE  # step of the model's own temperature


@pytest.fixture(scope="module")
def demonstration(model_folder):
    model = BPGCNForImageClassification.from_pretrained(model_folder).eval()
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    return Demonstration(model, processor, read_thumbnails(str(model_folder), model))


@pytest.fixture(scope="module")
def handlers(demonstration):
    return Handlers(demonstration, max_bytes=2**20, max_pixels=10**6)


@pytest.fixture
def picture(pictures):
    return str(pictures / "class 1" / "15.png")


def values(html: str, kind: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<data class="{kind}" value="([^"]+)"', html)]


def choose(handlers, picture, temperature=OWN, k=NUM_NEIGHBORS):
    return handlers.choose(picture, (), temperature, k - 1)


def assert_shows(page: list, answer) -> None:
    """Alert, status, classes, graph, neighbours and bank are those of an answer."""
    alert, status, classes, graph, neighbors, _ = page
    assert alert == ""
    assert next(iter(answer.probabilities)) in status
    assert values(classes, "share") == pytest.approx(list(answer.probabilities.values()), abs=1e-8)
    assert values(neighbors, "weight") == pytest.approx([near.weight for near in answer.neighbors], abs=1e-8)
    assert values(neighbors, "similarity") == pytest.approx([near.similarity for near in answer.neighbors], abs=1e-8)
    assert "<svg" in graph


def test_an_image_is_answered_as_the_model_answers(handlers, demonstration, picture):
    chosen, *page = choose(handlers, picture)
    with Image.open(picture) as image:
        pixels = demonstration.processor(image.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        expected = demonstration.model(**pixels).logits[0].softmax(-1)
    assert values(page[2], "share") == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-6)
    assert_shows(page, demonstration.answer(chosen.features))
    assert sum(values(page[4], "weight")) == pytest.approx(1, abs=1e-5)
    assert len(values(page[4], "weight")) == NUM_NEIGHBORS


def test_the_sliders_change_the_answer(handlers, demonstration, picture):
    chosen, *first = choose(handlers, picture)
    _, *page = handlers.turn(chosen, (), OWN + 6, 8)
    assert_shows(page, demonstration.answer(chosen.features, handlers.temperatures[OWN + 6], 9))
    assert len(values(page[4], "weight")) == 9
    assert page[2] != first[2]
    assert page[4] != first[4]


def test_the_temperatures_are_even_in_the_logarithm():
    steps = temperatures(0.07)
    assert steps[OWN] == 0.07
    assert steps[0] == pytest.approx(0.07 / 16)
    assert steps[-1] == pytest.approx(0.07 * 16)
    assert {round(b / a, 6) for a, b in pairwise(steps)} == {round(2**0.25, 6)}
    assert min(temperatures(0.002)) >= 0.001
    assert 0.002 in temperatures(0.002)


def test_an_added_image_moves_the_answer_and_is_taken_back(handlers, demonstration, picture):
    chosen, *before = choose(handlers, picture)
    added, *page = handlers.add(chosen, (), 0, OWN, NUM_NEIGHBORS - 1)
    assert_shows(page, demonstration.answer(chosen.features, added=added))
    assert 'class="added"' in page[4]
    assert "added by you" in page[4]
    assert f"Your image, {CLASS_NAMES[0]}" in page[4]
    share, earlier = values(page[2], "share"), values(page[2], "before")
    assert sorted(earlier) == pytest.approx(sorted(values(before[2], "share")))
    assert max(abs(new - old) for new, old in zip(share, earlier, strict=True)) > 1e-3
    assert "You have added 1 image: daisy." in page[5]
    assert "before, " in page[5]
    left, *page = handlers.take_back(chosen, added, OWN, NUM_NEIGHBORS - 1)
    assert left == ()
    assert page == before


def test_added_images_stay_when_another_is_chosen(handlers, picture, pictures):
    chosen, *_ = choose(handlers, picture)
    added, *_ = handlers.add(chosen, (), 2, OWN, 3)
    _, *page = handlers.choose(str(pictures / "class 1" / "16.png"), added, OWN, 3)
    assert values(page[2], "before")
    nothing, *page = handlers.choose(None, added, OWN, 3)
    assert nothing is None
    assert page[2] == page[3] == page[4] == markup.WAITING
    assert "You have added 1 image" in page[5]


def refusal(result: list) -> str:
    """The sentence of an alert that leaves all else as it is."""
    first, alert, *others = result
    assert {str(part) for part in (first, *others)} == {"{'__type__': 'update'}"}
    assert alert.startswith('<p class="problem">')
    return alert


def test_what_cannot_be_is_refused_in_a_sentence(handlers, picture):
    chosen, *_ = choose(handlers, picture)
    assert interface.NO_IMAGE in refusal(handlers.add(None, (), 0, OWN, 3))
    assert interface.NO_CLASS in refusal(handlers.add(chosen, (), None, OWN, 3))
    assert interface.NOTHING_ADDED in refusal(handlers.take_back(chosen, (), OWN, 3))
    added = handlers.add(chosen, (), 0, OWN, 3)[0] * MAX_ADDED
    assert f"{MAX_ADDED} images are added already" in refusal(handlers.add(chosen, added, 0, OWN, 3))


@pytest.mark.parametrize("place", [-1, 99, 1.5, True, "1", None, [0], {"path": "x"}])
def test_a_setting_out_of_range_is_refused(handlers, picture, place):
    chosen, *_ = choose(handlers, picture)
    assert "out of range" in refusal(handlers.turn(chosen, (), place, 3))
    assert "out of range" in refusal(handlers.turn(chosen, (), OWN, place))
    if place is not None:
        assert "out of range" in refusal(handlers.add(chosen, (), place, OWN, 3))


def test_a_broken_file_clears_the_page_and_says_why(handlers, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    chosen, alert, _, *page = handlers.choose(str(tmp_path / "broken.png"), (), OWN, 3)
    assert chosen is None
    assert "no image of a format" in alert
    assert page[:3] == [markup.WAITING] * 3
    Image.new("RGB", (1001, 1000)).save(tmp_path / "large.png")
    assert "1001 x 1000 pixels" in handlers.choose(str(tmp_path / "large.png"), (), OWN, 3)[1]


def test_a_fault_of_the_program_stays_in_the_log(handlers, picture, monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record)
    interface.logger.addHandler(handler)
    monkeypatch.setattr(handlers.demonstration, "embed", lambda image: 1 / 0)
    alert = refusal(choose(handlers, picture))
    interface.logger.removeHandler(handler)
    assert "server&#x27;s log" in alert
    assert "division" not in alert
    [record] = messages
    assert record.exc_info[0] is ZeroDivisionError


def test_the_examples_are_of_all_classes(handlers, demonstration, monkeypatch):
    assert [name for _, name in handlers.examples] == CLASS_NAMES
    monkeypatch.setattr(markup, "MAX_EXAMPLES", 2)
    assert [name for _, name in interface.examples(demonstration)] == [CLASS_NAMES[0], CLASS_NAMES[2]]
    monkeypatch.setattr(demonstration, "thumbnails", {})
    assert interface.examples(demonstration) == []

    async def build():  # Gradio opens an event loop, and leaves it open, where none runs
        build_interface(demonstration, 1, 1)

    asyncio.run(build())  # a page without examples


def test_names_are_no_markup(handlers, picture):
    _, *page = choose(handlers, picture, k=30)
    assert CLASS_NAMES[2] not in "".join(page[2:])
    assert "&lt;b&gt;tulip&lt;/b&gt; ${1 + 1}" in page[2]
    assert "&lt;b&gt;" in markup.options(CLASS_NAMES)
    assert "&lt;script&gt;" in markup.alert("<script>")


def test_pictures_and_places_are_told_in_words(handlers, picture):
    _, *page = choose(handlers, picture, k=12)
    figures = re.findall(r"<li><figure.*?</li>", page[4])
    assert len(figures) == 12
    for place, figure in enumerate(figures, 1):
        assert re.search(r'alt="Support image 1\d\d, [^"]+"', figure)
        assert f">{place}. " in figure
    assert any("no label, " in figure for figure in figures)
    assert "<summary>The other 2 images</summary>" in page[4]
    assert "<caption>" in page[2] or "<caption " in page[2]
