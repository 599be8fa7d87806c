"""Image files named on a command line: found, decoded in worker processes, and named where they cannot be read."""

import glob
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor

from ..training.images import open_image, to_rgb
from ..training.sources import IMAGE_SUFFIXES, visible_files

MAX_PIXELS = 89_478_485  # 256 MiB as RGB, where Pillow begins to warn of decompression bombs
MAX_ASPECT = 100  # 1 x 100,000 pixels are few, until the shorter side is resized to the backbone's
NAMED_AT_THE_END = 20


class ImageFile(NamedTuple):
    """`path` opens it; `name` is the path below the folder that was asked for, or the file's own name."""

    path: str
    name: str


class ImageBatch(NamedTuple):
    """`rows` of the images that could be read, their `pixel_values` [B, C, H, W] (None if there is none), and the
    reasons of the others by row."""

    rows: list[int]
    pixel_values: Tensor | None
    failures: dict[int, str]


def find_images(names: Sequence[str]) -> list[ImageFile]:
    """The named files, the images at any depth of the named folders and what globs match, each once.

    A name that leads to no image stays in the list, to be reported like a file that cannot be read.
    """
    found = {}
    for name in names:
        path = Path(name).expanduser()
        # Path.glob wants a folder to start from
        matches = [] if os.path.lexists(path) else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        for match in map(Path, matches or [path]):
            inside = visible_files(match) if match.is_dir() else []
            images = [ImageFile(str(match / f), str(f)) for f in inside if f.suffix.lower() in IMAGE_SUFFIXES]
            for file in images or [ImageFile(str(match), match.name)]:
                found.setdefault(os.path.abspath(file.path), file)  # noqa: PTH100 - Path.absolute keeps `..`
    return list(found.values())


def printable(name: str) -> str:
    """A name as one line of a terminal: control characters and bytes that are no UTF-8 are escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def decode(file: dict) -> PIL.Image.Image:
    """The image of a `path` or of `bytes`, as 8-bit RGB and upright.

    Raises:
        ValueError: there is no such image, or it is too large or too narrow to decode.
        OSError: it cannot be opened, or is broken.
    """
    if file["bytes"] is None and file["path"] is None:
        raise ValueError("no image in this row")
    if file["bytes"] is None and "://" not in file["path"]:
        mode = Path(file["path"]).stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would never end
            raise ValueError("a folder without images" if stat.S_ISDIR(mode) else "not a regular file")
    with open_image(file) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded: scale it down")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut it up")
        image.load()
        return to_rgb(image)


class DecodedImages(Dataset):
    """What the image processor makes of each file: (row, pixel values [C, H, W]), or (row, why there are none)."""

    def __init__(self, files: Sequence[dict], processor: BaseImageProcessor):
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of bombs, which `decode` refuses, and of oddities that do no harm
                image = decode(self.files[row])
                return row, self.processor(image, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # Pillow's decoders raise nearly any class on broken data
            return row, _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image, or of no format that Pillow reads"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"far more pixels than the {MAX_PIXELS:,} that are decoded: scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _collate(items: list[tuple[int, Tensor | str]]) -> ImageBatch:
    read = {row: pixels for row, pixels in items if isinstance(pixels, Tensor)}
    pixel_values = torch.stack(list(read.values())) if read else None
    return ImageBatch(list(read), pixel_values, {row: reason for row, reason in items if row not in read})


class ImageReader:
    """Iterate over files as `ImageBatch`es in their order, with a progress bar and each unreadable file on stderr.

    Args:
        files: rows of `path` and `bytes`, one of which may be None.
        names: what to call each file.
        num_workers: processes that decode; none is started for a single batch.

    `failures` has (name, reason) of the files that could not be read so far.
    """

    def __init__(
        self,
        files: Sequence[dict],
        names: Sequence[str],
        processor: BaseImageProcessor,
        device: torch.device,
        *,
        batch_size: int,
        num_workers: int,
        disable_tqdm: bool,
    ):
        self.names, self.device, self.disable_tqdm = names, device, disable_tqdm
        self.failures: list[tuple[str, str]] = []
        batches = -(-len(files) // batch_size)
        self.loader = DataLoader(
            DecodedImages(files, processor),
            batch_size=batch_size,
            num_workers=min(num_workers, batches) if batches > 1 else 0,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[ImageBatch]:
        with tqdm(total=len(self.names), unit="image", disable=self.disable_tqdm) as bar:
            for batch in self.loader:
                for row, reason in batch.failures.items():
                    self.failures.append((self.names[row], reason))
                    tqdm.write(_line(*self.failures[-1]), file=sys.stderr)
                if batch.rows:
                    batch = batch._replace(pixel_values=batch.pixel_values.to(self.device, non_blocking=True))
                yield batch
                bar.update(len(batch.rows) + len(batch.failures))

    def finish(self) -> None:
        """Say once more what could not be read, and then leave with exit status 1."""
        if not self.failures:
            return
        lines = [f"{len(self.failures)} of {len(self.names)} images could not be read:"]
        lines += [f"  {_line(*failure)}" for failure in self.failures[:NAMED_AT_THE_END]]
        if len(self.failures) > NAMED_AT_THE_END:
            lines.append(f"  ... and {len(self.failures) - NAMED_AT_THE_END} more, named above")
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(1)


def _line(name: str, reason: str) -> str:
    return f"{printable(name)}: {printable(reason)}"
