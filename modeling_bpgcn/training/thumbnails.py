"""Small pictures of the support images, in a table beside the model, so that answers can show what they rest on."""

from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path

import PIL.Image
import pyarrow.compute  # comes with datasets
import pyarrow.parquet
from datasets import Features, Value
from datasets import Image as ImageFeature
from transformers.utils import cached_file, logging

from ..modeling_bpgcn import BPGCNForImageClassification
from .images import open_image, to_rgb

logger = logging.get_logger(__name__)

THUMBNAILS_FILE = "support_thumbnails.parquet"
SIDE = 128  # pixels of the longer side, at most
CRISP = 64  # up to this side PNG, which keeps every pixel as it is
QUALITY = 85  # of JPEG
ROWS_AT_ONCE = 1000  # that a viewer of the table reads


def shrink(image: PIL.Image.Image, side: int = SIDE) -> PIL.Image.Image:
    """A copy in RGB and upright of at most `side` pixels a side, in the image's proportions; small ones keep theirs."""
    small = to_rgb(image).copy()
    small.thumbnail((side, side))
    return small


def open_thumbnail(file: dict) -> PIL.Image.Image:
    """`shrink` of an image of a data set (`path` and `bytes`, one of which may be None), decoded no larger than that
    needs.

    Raises:
        OSError, ValueError: it cannot be opened, or is broken.
    """
    with open_image(file) as image:
        image.draft(None, (2 * SIDE, 2 * SIDE))  # JPEG can be decoded at a half, a quarter or an eighth
        return shrink(image)


def encode(image: PIL.Image.Image) -> bytes:
    """An RGB image as a JPEG file, or as PNG where it is so small that JPEG would blur it."""
    file = BytesIO()
    if max(image.size) <= CRISP:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_thumbnails(folder: str | Path, ids: Iterable[int], images: Iterable[PIL.Image.Image | bytes | None]) -> Path:
    """Write `support_thumbnails.parquet`, a row of `id` (int64) and `image` for each support image; returns its path.

    Args:
        ids: of all images of the bank, in its order.
        images: as many, of any size; a file that `encode` made is written as it is, None leaves a gap.
    """
    rows = {"id": [], "image": []}
    for id_, image in zip(ids, images, strict=True):
        content = encode(shrink(image)) if isinstance(image, PIL.Image.Image) else image
        rows["id"].append(int(id_))
        rows["image"].append(None if content is None else {"bytes": content, "path": None})
    path = Path(folder) / THUMBNAILS_FILE
    schema = Features({"id": Value("int64"), "image": ImageFeature()}).arrow_schema  # by which datasets knows images
    table = pyarrow.Table.from_pydict(rows, schema=schema)
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS_AT_ONCE)
    return path


def read_thumbnails(name: str, model: BPGCNForImageClassification, revision: str | None = None) -> "Thumbnails":
    """The thumbnails of the model's bank by id, each decoded when it is asked for; none where no table lies beside the
    model (a folder or a Hub name), or one of another bank."""
    path = cached_file(name, THUMBNAILS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return Thumbnails({})
    try:
        # the number first: a table of another bank may be large
        if pyarrow.parquet.read_metadata(path).num_rows == model.support_bank.size:
            table = pyarrow.parquet.read_table(path, columns=["id", "image"])
            ids, files = table["id"].to_pylist(), pyarrow.compute.struct_field(table["image"], "bytes")
            if ids == model.support_bank.ids.tolist():
                return Thumbnails({id_: file for id_, file in zip(ids, files, strict=True) if file.is_valid})
        problem = "is of another support bank"
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:  # those of pyarrow
        problem = f"is no table of thumbnails ({error})"
    logger.warning(f"{path} {problem}: neighbors have no pictures. Build it with `index --thumbnails`.")
    return Thumbnails({})


class Thumbnails(Mapping):
    """RGB images by id, of the bytes of JPEG and PNG files; one that is too large for a thumbnail or cannot be decoded
    is not there."""

    def __init__(self, files: Mapping[int, pyarrow.Scalar]):
        self._files = files

    def file(self, id_: int) -> bytes | None:
        """The file of an image as it is stored, None where there is none."""
        return self._files[id_].as_py() if id_ in self._files else None

    def __getitem__(self, id_: int) -> PIL.Image.Image:
        content = self._files[id_].as_py()
        try:
            with PIL.Image.open(BytesIO(content), formats=("JPEG", "PNG")) as image:
                if max(image.size) > SIDE:
                    raise ValueError(f"{image.size} pixels")
                image.load()
                return to_rgb(image)
        except Exception as error:  # Pillow's decoders raise nearly any class on broken data
            raise KeyError(id_) from error

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
