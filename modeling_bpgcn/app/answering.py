"""What the demo answers: classes, the support images they rest on and the graph around the query, for many visitors at
once, each with a temperature, a number of neighbours and added images of their own. The model itself never changes."""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ..modeling_bpgcn import BPGCNForImageClassification
from ..pretrained import RankingTemperature
from ..support_bank import SupportBank
from ..training.images import to_rgb
from ..training.thumbnails import shrink

MAX_ADDED = 20  # images a visitor adds
MAX_SHOWN = 50  # neighbours of an answer
MAX_REBUILT = 20_000  # images of a bank that is computed again for a visitor's own
CACHED_ROWS = 100_000  # rows of all visitors' banks that are kept
CACHED_BANKS = (2, 32)  # but at least and at most so many banks


@dataclass(frozen=True)
class Added:
    """An image that a visitor added: features [D], and a thumbnail to show."""

    id: int
    features: Tensor
    class_index: int
    thumbnail: PIL.Image.Image


@dataclass(frozen=True)
class Neighbor:
    """A support image that an answer rests on; the class is None where it is unknown, `similarity` in the units of the
    model's metric; `propagated`, the class that most of the labels propagated to it say, None where none arrived."""

    id: int
    class_name: str | None
    weight: float
    similarity: float
    thumbnail: PIL.Image.Image | None
    added: bool
    propagated: str | None = None


@dataclass(frozen=True)
class Edge:
    """`source` reads `target`: 0 is the query, 1 ... k the neighbours in their order."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class Answer:
    """`probabilities` of all classes by name, best first; `neighbors`, weightiest first; `edges` of the query to each
    of them, and those of the support graph among them."""

    probabilities: dict[str, float]
    neighbors: tuple[Neighbor, ...]
    edges: tuple[Edge, ...]


class Demonstration:
    """Answers of one model with its support bank, for any number of threads.

    `class_names`, in the model's order; `temperature` and `num_neighbors`, the model's own; `max_num_neighbors`, how
    many can be asked for.

    Args:
        model: in evaluation mode, with a support bank. It is only read.
        processor: its image processor.
        thumbnails: of the support images by id, see `training.thumbnails.read_thumbnails`.

    Raises:
        ValueError: for a model in training mode, or without a support bank.
    """

    def __init__(
        self,
        model: BPGCNForImageClassification,
        processor: BaseImageProcessor,
        thumbnails: Mapping[int, PIL.Image.Image],
    ):
        size = model.support_bank.size
        if model.training or size == 0:
            raise ValueError(
                "The demo answers from a support bank, in evaluation mode: call model.build_support_bank(dataset, ...)"
                " and model.eval()."
            )
        self.model, self.processor, self.thumbnails = model, processor, thumbnails
        self.class_names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        with torch.no_grad():
            self.temperature = float(model.bpgcn.ranking_temperature())
        self.num_neighbors = min(model.config.num_neighbors, size)
        self.max_num_neighbors = min(max(MAX_SHOWN, self.num_neighbors), size)
        least, most = CACHED_BANKS
        self._models = _Cache(min(max(least, CACHED_ROWS // size), most))

    @torch.no_grad()
    def embed(self, image: PIL.Image.Image) -> Tensor:
        """Features [D] of an image, on the CPU."""
        pixel_values = self.processor(to_rgb(image), return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values.to(self.model.device))[0].cpu()

    @torch.no_grad()
    def answer(
        self,
        features: Tensor,
        temperature: float | None = None,
        num_neighbors: int | None = None,
        added: tuple[Added, ...] = (),
    ) -> Answer:
        """The answer for features [D] of an image.

        Args:
            temperature: of the query's own edges, in units of the similarity; the model's unless given.
            num_neighbors: that the query reads; the model's unless given.
            added: images that join the bank first, as `model.add_support` would add them.

        Raises:
            ValueError: for a temperature or a number of neighbours out of range.
        """
        own = self._with_added(added)
        model = own if temperature is num_neighbors is None else self._with_options(own, temperature, num_neighbors)
        query = features[None].to(model.device)
        probabilities = model(features=query, support="bank").logits[0].softmax(-1)
        nearest = model.retrieve(features=query)
        weights, order = nearest.weights[0].sort(descending=True, stable=True)
        rows = nearest.neighbor_indices[0][order]
        labels = own.support_bank.propagated[rows].float()
        propagated = torch.where(labels.sum(-1) > 0, labels.argmax(-1), -1)
        columns = nearest.ids[0][order], nearest.classes[0][order], weights, nearest.scores[0][order], propagated
        names = dict(enumerate(self.class_names))
        of_visitor = {image.id: image.thumbnail for image in added}
        neighbors = tuple(
            Neighbor(
                id=id_,
                class_name=names.get(number),
                weight=weight,
                similarity=similarity,
                thumbnail=of_visitor.get(id_) or self.thumbnails.get(id_),
                added=id_ in of_visitor,
                propagated=names.get(likely),
            )
            for id_, number, weight, similarity, likely in zip(*(column.tolist() for column in columns), strict=True)
        )
        best = probabilities.sort(descending=True, stable=True)
        return Answer(
            {self.class_names[i]: p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)},
            neighbors,
            tuple(Edge(0, place, neighbor.weight) for place, neighbor in enumerate(neighbors, 1))
            + _edges_among(own, rows),
        )

    def add(
        self, image: PIL.Image.Image, features: Tensor, class_name: str, added: tuple[Added, ...] = ()
    ) -> tuple[Added, ...]:
        """The visitor's images and this one, of features [D].

        Raises:
            ValueError: for a class that the model does not know, too many images, or a bank that is too large to be
                computed again.
        """
        bank = self.model.support_bank
        if class_name not in self.class_names:
            raise ValueError(f"{class_name!r} is none of the model's {len(self.class_names)} classes: choose one.")
        if bank.size > MAX_REBUILT:
            raise ValueError(
                f"This model's support bank has {bank.size:,} images, and it is computed again for an added one only"
                f" up to {MAX_REBUILT:,}. Add images with: python -m modeling_bpgcn index MODEL IMAGES --add"
            )
        if len(added) >= MAX_ADDED:
            raise ValueError(f"{MAX_ADDED} images are added already: remove one first.")
        id_ = 1 + max([int(bank.ids.max()), *(other.id for other in added)])
        return *added, Added(id_, features, self.class_names.index(class_name), shrink(image))

    def _with_added(self, added: tuple[Added, ...]) -> BPGCNForImageClassification:
        if not added:
            return self.model
        return self._models.get(_digest(added), lambda: _rebuilt(self.model, added))

    def _with_options(
        self, model: BPGCNForImageClassification, temperature: float | None, num_neighbors: int | None
    ) -> BPGCNForImageClassification:
        temperature = self.temperature if temperature is None else temperature
        num_neighbors = self.num_neighbors if num_neighbors is None else num_neighbors
        low, high = RankingTemperature.bounds
        if not min(low, self.temperature) <= temperature <= max(high, self.temperature):
            raise ValueError(f"The temperature {temperature} must be between {low} and {high}.")
        if not 1 <= num_neighbors <= self.max_num_neighbors:
            raise ValueError(f"{num_neighbors} neighbors: choose 1 to {self.max_num_neighbors}.")
        view = _view(model)
        view.config.num_neighbors = num_neighbors
        if temperature != self.temperature:
            view.config.learn_temperature, view.config.ranking_temperature = False, temperature
            view.bpgcn.ranking_temperature = RankingTemperature(view.config)
        return view


def _view(model: BPGCNForImageClassification) -> BPGCNForImageClassification:
    """A model of the same modules, with a config, and with room for a temperature and a bank, of its own."""
    view, inner = _shallow(model), _shallow(model.bpgcn)
    view.bpgcn, view.config = inner, copy.copy(model.config)
    inner.config = view.config
    return view


def _shallow(module: torch.nn.Module) -> torch.nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)  # a copied module has the dict itself
    return twin


def _rebuilt(model: BPGCNForImageClassification, added: tuple[Added, ...]) -> BPGCNForImageClassification:
    """The model with a bank of its own, in which the added images are."""
    view, shared = _view(model), model.support_bank
    view.config.bank_size = 0
    bank = view.bpgcn.support_bank = SupportBank(view.config)
    rows = shared.features, shared.classes, shared.ids, shared.degree, shared.propagated, shared.states
    bank.fill(*rows, shared.fingerprint)
    # `add_support` without the digest of the backbone, which takes longer than most banks
    view._append_to_bank(
        torch.stack([image.features for image in added]).to(model.device),
        torch.tensor([image.class_index for image in added], device=model.device),
        torch.tensor([image.id for image in added], device=model.device),
        shared.fingerprint,
    )
    return view


def _edges_among(model: BPGCNForImageClassification, rows: Tensor) -> tuple[Edge, ...]:
    """The edges of the support graph among the images of these rows [k] of the bank."""
    bank = model.support_bank
    ranking = model.bpgcn.rank_in_bank(bank.features[rows].float(), bank.ids[rows])
    places = {row: place for place, row in enumerate(rows.tolist(), 1)}
    return tuple(
        Edge(source, places[row], weight)
        for source, indices, weights in zip(places.values(), *(part.tolist() for part in ranking), strict=True)
        for row, weight in zip(indices, weights, strict=True)
        if row in places and places[row] != source and weight > 0
    )


def _digest(added: tuple[Added, ...]) -> str:
    digest = hashlib.sha256()
    for image in added:
        digest.update(f"{image.id} {image.class_index} ".encode())
        digest.update(image.features.double().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Cache:
    """The models last asked for. One is built at a time, as each build takes all cores."""

    def __init__(self, size: int):
        self.size = size
        self._held: OrderedDict[str, BPGCNForImageClassification] = OrderedDict()
        self._lock, self._building = threading.Lock(), threading.Lock()

    def _find(self, key: str) -> BPGCNForImageClassification | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def get(self, key: str, build: Callable[[], BPGCNForImageClassification]) -> BPGCNForImageClassification:
        """What is held under the key, or else what `build` makes, in place of the one not asked for longest."""
        found = self._find(key)
        if found is not None:
            return found
        with self._building:
            found = self._find(key) or build()
            with self._lock:
                self._held[key] = found
                if len(self._held) > self.size:
                    self._held.popitem(last=False)
        return found
