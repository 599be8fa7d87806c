"""The page of the demo: what a visitor can do, and what changes then."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import PIL.Image
from torch import Tensor
from transformers.utils import logging

from ..pretrained import RankingTemperature
from ..training.thumbnails import shrink
from . import controls, markup
from .answering import Added, Demonstration
from .uploads import UploadError, open_upload

logger = logging.get_logger(__name__)

OCTAVES, STEPS_PER_OCTAVE = 4, 4  # of temperatures on each side of the model's own
VISITOR_SECONDS = 3600  # that the images of an idle visitor are kept
UPLOAD_SECONDS = 600  # that a file is kept, which is read but once
CONCURRENCY = 2  # answers at once
QUEUE_SIZE = 64  # answers that wait
NO_IMAGE = "Choose an image first: drop one, or press an example."
NO_CLASS = "Choose the class of your image first."
NOTHING_ADDED = "There is nothing to take back: you have added no image."
SORRY = "This did not work, for a reason that stands in the server's log. Try another image, or reload the page."


@dataclass(frozen=True)
class Chosen:
    """What is kept of a visitor's image: a thumbnail, and the features [D]."""

    image: PIL.Image.Image
    features: Tensor


class RefusedError(ValueError):
    """A sentence for the visitor."""


def temperatures(own: float) -> list[float]:
    """The steps of the slider, evenly spaced in the logarithm; the model's own is one of them."""
    low, high = RankingTemperature.bounds
    reach = OCTAVES * STEPS_PER_OCTAVE
    steps = (own * 2 ** (step / STEPS_PER_OCTAVE) for step in range(-reach, reach + 1))
    return [temperature for temperature in steps if low <= temperature <= high or temperature == own]


def examples(demonstration: Demonstration) -> list[tuple[PIL.Image.Image, str]]:
    """The first image that has a thumbnail, of some classes from all over their list, and the class."""
    bank, names = demonstration.model.support_bank, demonstration.class_names
    first: dict[int, PIL.Image.Image] = {}
    for id_, number in zip(bank.ids.tolist(), bank.classes.tolist(), strict=True):
        if number >= 0 and number not in first and id_ in demonstration.thumbnails:
            first[number] = demonstration.thumbnails[id_]
    numbers = sorted(first)
    return [(first[number], names[number]) for number in numbers[:: -(-len(numbers) // markup.MAX_EXAMPLES) or 1]]


def answers_in_sentences(handler: Callable[..., list]) -> Callable[..., list]:
    """A handler that shows what went wrong as an alert, and leaves the rest of the page and the visitor's state."""

    @functools.wraps(handler)
    def guarded(self: "Handlers", *arguments) -> list:
        try:
            return handler(self, *arguments)
        except RefusedError as refusal:
            problem = str(refusal)
        except Exception:
            logger.exception(f"{handler.__name__} failed:")
            problem = SORRY
        return [gr.skip(), markup.alert(problem), *[gr.skip()] * 5]

    return guarded


class Handlers:
    """What a visitor can do. Each method returns what has become of the visitor's state and, as `_page` has them, the
    parts of the page.

    Args:
        demonstration: what answers, shared by all visitors.
        max_bytes, max_pixels: of an image that is sent.
    """

    def __init__(self, demonstration: Demonstration, max_bytes: int, max_pixels: int):
        self.demonstration = demonstration
        self.limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
        self.temperatures = temperatures(demonstration.temperature)
        self.examples = examples(demonstration)

    @answers_in_sentences
    def choose(self, path: str | None, added: tuple[Added, ...], temperature: int, neighbors: int) -> list:
        """Another image, or none."""
        if path is None:
            return [None, *self._page(None, added, temperature, neighbors)]
        try:
            image = open_upload(path, **self.limits)
        except UploadError as error:
            problem, *page = self._page(None, added, temperature, neighbors)
            problem = markup.alert(str(error))
            return [None, problem, *page]
        chosen = Chosen(shrink(image), self.demonstration.embed(image))
        return [chosen, *self._page(chosen, added, temperature, neighbors)]

    @answers_in_sentences
    def turn(self, chosen: Chosen | None, added: tuple[Added, ...], temperature: int, neighbors: int) -> list:
        """Another temperature or number of neighbours, as steps of their sliders."""
        return [gr.skip(), *self._page(chosen, added, temperature, neighbors)]

    @answers_in_sentences
    def add(
        self, chosen: Chosen | None, added: tuple[Added, ...], place: int | None, temperature: int, neighbors: int
    ) -> list:
        """The image joins the visitor's bank, with the class at this place."""
        if chosen is None:
            raise RefusedError(NO_IMAGE)
        if place is None:
            raise RefusedError(NO_CLASS)
        name = _at(place, self.demonstration.class_names)
        try:
            added = self.demonstration.add(chosen.image, chosen.features, name, added)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        return [added, *self._page(chosen, added, temperature, neighbors)]

    @answers_in_sentences
    def take_back(self, chosen: Chosen | None, added: tuple[Added, ...], temperature: int, neighbors: int) -> list:
        """The image that was added last leaves the visitor's bank."""
        if not added:
            raise RefusedError(NOTHING_ADDED)
        return [added[:-1], *self._page(chosen, added[:-1], temperature, neighbors)]

    def example(self, event: gr.EventData) -> PIL.Image.Image:
        """The example that was pressed."""
        try:
            return _at(event._data.get("place"), self.examples)[0]
        except RefusedError as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None

    def _page(self, chosen: Chosen | None, added: tuple[Added, ...], temperature_step: int, k_step: int) -> list:
        """Alert, status, classes, graph, neighbours and bank as HTML."""
        names = [self.demonstration.class_names[image.class_index] for image in added]
        if chosen is None:
            return ["", "", markup.WAITING, markup.WAITING, markup.WAITING, markup.bank_summary(names)]
        temperature = _at(temperature_step, self.temperatures)
        k = _at(k_step, range(1, self.demonstration.max_num_neighbors + 1))
        answer = self.demonstration.answer(chosen.features, temperature, k, added)
        before = self.demonstration.answer(chosen.features, temperature, k) if added else None
        return [
            "",
            markup.announcement(answer, temperature, k),
            markup.classes(answer, before),
            markup.graph(answer, chosen.image),
            markup.neighbors(answer),
            markup.bank_summary(names) + markup.moves(answer, before, names),
        ]


def _at(place: int, items: Sequence) -> Any:
    """What is at a place that the page has sent, which anybody can do in its name."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(items):
        raise RefusedError("This setting is out of range: reload the page.")
    return items[place]


def build_interface(demonstration: Demonstration, max_bytes: int, max_pixels: int) -> gr.Blocks:
    """The page, not yet served; `server.build_app` does that with the theme and the bounds that belong to it."""
    handlers = Handlers(demonstration, max_bytes, max_pixels)
    with gr.Blocks(title="BPGCN", analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as page:
        chosen = gr.State(None, time_to_live=VISITOR_SECONDS)
        added = gr.State((), time_to_live=VISITOR_SECONDS)
        controls.fragment(markup.INTRODUCTION)
        alert, status = controls.live("alert", elem_id="alert"), controls.live("status", elem_id="status")
        with gr.Row():
            with gr.Column(elem_id="choose"):
                controls.fragment(markup.CHOOSE)
                upload = controls.upload()
                if handlers.examples:
                    controls.fragment(markup.CHOOSE_EXAMPLE)
                    gallery = controls.examples(handlers.examples)
                    gallery.click(handlers.example, None, upload, **_event(show_progress="hidden"))
            with gr.Column(elem_id="answer"):
                controls.fragment(markup.ANSWER)
                classes = controls.fragment(markup.WAITING)
        with gr.Row():
            with gr.Column(elem_id="settings"):
                temperature, neighbors = _settings(handlers)
                controls.fragment(markup.TEACH)
                label = controls.choice("class", "Class of your image", demonstration.class_names)
                with gr.Row():
                    add = gr.Button("Add to the bank", variant="primary", min_width=120, elem_id="add")
                    take_back = gr.Button("Take back the last", min_width=120, elem_id="take-back")
                bank = controls.fragment(markup.bank_summary([]), elem_id="bank")
            with gr.Column(elem_id="graph"):
                controls.fragment(markup.GRAPH)
                graph = controls.fragment(markup.WAITING)
        with gr.Column(elem_id="neighbors"):
            controls.fragment(markup.NEIGHBORS)
            nearest = controls.fragment(markup.WAITING)

        parts, settings = [alert, status, classes, graph, nearest, bank], [temperature, neighbors]
        upload.change(
            handlers.choose,
            [upload, added, *settings],
            [chosen, *parts],
            **_event(show_progress="minimal", show_progress_on=classes),
        )
        gr.on(
            [temperature.change, neighbors.change],
            handlers.turn,
            [chosen, added, *settings],
            [chosen, *parts],
            **_event(show_progress="hidden"),
        )
        inputs, outputs = [chosen, added, label, *settings], [added, *parts]
        add.click(handlers.add, inputs, outputs, **_event(show_progress="hidden"))
        take_back.click(handlers.take_back, [chosen, added, *settings], outputs, **_event(show_progress="hidden"))
    page.queue(max_size=QUEUE_SIZE, api_open=False)
    return page


def _settings(handlers: Handlers) -> tuple[gr.HTML, gr.HTML]:
    demonstration = handlers.demonstration
    controls.fragment(markup.RANK)
    own = [" (the model's own)" if t == demonstration.temperature else "" for t in handlers.temperatures]
    labels = [f"{temperature:.3g}{note}" for temperature, note in zip(handlers.temperatures, own, strict=True)]
    start = handlers.temperatures.index(demonstration.temperature)
    temperature = controls.steps("temperature", "Temperature of the ranking", labels, start)
    counts = range(1, demonstration.max_num_neighbors + 1)
    labels = [f"{k} (the model's own)" if k == demonstration.num_neighbors else str(k) for k in counts]
    return temperature, controls.steps("count", "Number of neighbours, k", labels, demonstration.num_neighbors - 1)


def _event(**options) -> dict:
    """Of an event that the page alone may cause; of a slider that moves on, only the last one counts."""
    return {
        "api_visibility": "private",
        "trigger_mode": "always_last",
        "concurrency_id": "answers",
        "concurrency_limit": CONCURRENCY,
    } | options
