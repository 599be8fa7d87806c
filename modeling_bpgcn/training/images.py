"""Images on their way to the backbone: checked before training, converted to RGB, augmented, made pixel values."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessorPil
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHECKED_AT_ONCE = 64
NAMED_IN_ERROR = 10
# The range each wide mode is likely to use, narrowest first; the first one that holds the brightest pixel is taken.
FULL_SCALES = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255, 65535)}


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any PIL image to 8-bit RGB, upright by its EXIF tag; transparent parts become white.

    16-bit, 32-bit and float images are scaled to 8 bits, where PIL's own `convert` clips them.
    """
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.partition(";")[0] in ("I", "F"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        background = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    scales = FULL_SCALES.get(image.mode, FULL_SCALES["I;16"])
    low, high = min(values.min(), 0.0), values.max()
    full = next((scale for scale in scales if scale >= high), high)
    return PIL.Image.fromarray(np.rint((values - low) / (full - low) * 255).astype(np.uint8))


def check_images(
    dataset: Dataset,
    image_column: str = "image",
    minimum_size: int = 1,
    skip: bool = False,
    name: str = "the data set",
) -> Dataset:
    """Open every image and return the data set, without the unusable images if `skip`.

    Unusable: empty, truncated or corrupt, of a mode that has no way to RGB, larger than PIL's limit against
    decompression bombs, or with a side shorter than `minimum_size` pixels (the patch).

    Raises:
        ValueError: an image is unusable and `skip` is false, or no usable image is left.
    """
    problems = find_unusable_images(dataset, image_column, minimum_size)
    if not problems:
        return dataset
    summary = f"{len(problems)} of {len(dataset)} images of {name} cannot be used"
    if not skip:
        more = f"\n  ... and {len(problems) - NAMED_IN_ERROR} more" if len(problems) > NAMED_IN_ERROR else ""
        listed = "".join(f"\n  {problem}" for problem in list(problems.values())[:NAMED_IN_ERROR])
        raise ValueError(
            f"{summary}:{listed}{more}\nRepair or remove them, or go on without them: --skip_unreadable_images true"
        )
    if len(problems) == len(dataset):
        raise ValueError(f"{summary}: none is left. The first: {problems[0]}")
    logger.warning(f"{summary} and are skipped:" + "".join(f"\n  {problem}" for problem in problems.values()))
    return dataset.select([row for row in range(len(dataset)) if row not in problems])


def find_unusable_images(dataset: Dataset, image_column: str, minimum_size: int) -> dict[int, str]:
    """Map the row of each unusable image to its file name (or row number) and the reason."""
    files = dataset.with_format(None).select_columns(image_column).cast_column(image_column, ImageFeature(decode=False))

    def check_rows(rows: range) -> dict[int, str]:
        problems = {}
        for row in rows:
            file = files[row][image_column]
            if reason := _reason_unusable(file, minimum_size):
                problems[row] = f"{_file_name(file) or f'row {row}'}: {reason}"
        return problems

    chunks = [range(start, min(start + CHECKED_AT_ONCE, len(files))) for start in range(0, len(files), CHECKED_AT_ONCE)]
    problems = {}
    with (
        logging.tqdm(total=len(files), desc="Checking images", unit="image") as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        for chunk, found in zip(chunks, threads.map(check_rows, chunks), strict=True):
            problems.update(found)
            progress.update(len(chunk))
    return problems


def _file_name(file: dict | None) -> str | None:
    return file["path"] if file else None


def _reason_unusable(file: dict | None, minimum_size: int) -> str | None:
    if file is None or (file["bytes"] is None and file["path"] is None):
        return "no image in this row"
    try:
        with open_image(file) as image:
            width, height = image.size
            # JPEG only: every byte is still read, but an eighth of the pixels is enough to know that it can be.
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
            image.load()
            to_rgb(image.crop((0, 0, 1, 1)))
            image.getexif()
    except Exception as error:  # PIL's decoders raise nearly any class on broken data
        return str(error) or type(error).__name__
    if min(width, height) < minimum_size:
        return f"{width} x {height} pixels, smaller than a patch of {minimum_size} x {minimum_size}"
    return None


def open_image(file: dict) -> PIL.Image.Image:
    """Open, without decoding it, an image of a data set: `path` and `bytes`, one of which may be None."""
    if file["bytes"] is not None:
        return _open_bytes(file["bytes"])
    if "://" in file["path"]:
        return ImageFeature().decode_example(file)
    if Path(file["path"]).stat().st_size == 0:
        raise ValueError("empty file")
    return PIL.Image.open(file["path"])


def _open_bytes(content: bytes) -> PIL.Image.Image:
    if not content:
        raise ValueError("empty file")
    return PIL.Image.open(BytesIO(content))


def keep(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image as it is."""
    return image


def random_flip(image: PIL.Image.Image) -> PIL.Image.Image:
    """Mirror left and right with probability 1/2."""
    return PIL.ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


def random_crop_flip(image: PIL.Image.Image) -> PIL.Image.Image:
    """Cut a random square of 25 to 100 % of the area of the largest one, then mirror with probability 1/2."""
    width, height = image.size
    scale, left, top = torch.rand(3).tolist()
    side = max(1, round(min(width, height) * (0.25 + 0.75 * scale) ** 0.5))
    left, top = round(left * (width - side)), round(top * (height - side))
    return random_flip(image.crop((left, top, left + side, top + side)))


def random_shift(image: PIL.Image.Image) -> PIL.Image.Image:
    """Move every second image by up to an eighth of each side (at least a pixel); what it uncovers is black."""
    if torch.rand(()) < 0.5:
        return image
    reach = [max(1, side // 8) for side in image.size]
    offset = [int(torch.randint(-pixels, pixels + 1, ())) for pixels in reach]
    shifted = PIL.Image.new(image.mode, image.size)
    shifted.paste(image, tuple(offset))
    return shifted


# All of them draw from torch's global generator, which the trainer seeds for each batch (`RepeatableRows`).
AUGMENTATIONS = {"none": keep, "flip": random_flip, "crop_flip": random_crop_flip, "shift": random_shift}


def build_image_processor(
    name_or_path: str | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> BaseImageProcessor:
    """Load the image processor of a backbone (Hub name or local folder), or build one for training from scratch.

    With `image_size` the shorter side is resized to it and the centre cut out, whatever the aspect; without it the
    processor keeps its own size. `name_or_path=None` gives mean = std = 0.5, and 8 x 8 pixels (digits) by default.

    Raises:
        ValueError: the size is no multiple of `patch_size` (its border would be lost silently), or is not fixed.
    """
    options = {"do_convert_rgb": True}
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        options |= {
            "do_resize": True,
            "size": {"shortest_edge": image_size},
            "do_center_crop": True,
            "crop_size": square,
        }
    if name_or_path is not None:
        # Pixels must not depend on whether torchvision happens to be installed.
        processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **options)
    else:
        scratch = {"size": {"height": 8, "width": 8}, "do_center_crop": False, "rescale_factor": 1 / 255}
        processor = BitImageProcessorPil(**{**scratch, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **options})
    for side in output_size(processor):
        check_image_size(side, patch_size)
    return processor


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what the processor returns.

    Raises:
        ValueError: they depend on the image, so that images could not share a batch.
    """
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    if not (size and size.height and size.width):
        raise ValueError(f"the image processor has no fixed output size ({size}): choose one with --image_size")
    return size.height, size.width


def check_image_size(image_size: int, patch_size: int | None) -> None:
    """Raise ValueError unless `image_size` is a positive multiple of `patch_size` (None: any size will do)."""
    patch_size = patch_size or 1
    below = image_size // patch_size * patch_size
    if image_size >= patch_size and below == image_size:
        return
    nearest = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
    raise ValueError(
        f"image size {image_size} is not a multiple of the backbone's patch size {patch_size}: "
        f"pass --image_size {nearest}"
    )


def image_transform(processor: BaseImageProcessor, augmentation: str = "none") -> Callable[[dict], dict]:
    """Make what `dataset.with_transform` takes: rows of `load_image_data` -> `pixel_values`, `labels`, `node_ids`.

    Pixel values are float32 [3, H, W] an image; the others are integers.

    Raises:
        ValueError: unknown `augmentation`.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}")
    return partial(_transform, processor=processor, augment=AUGMENTATIONS[augmentation])


def _transform(rows: dict, processor: BaseImageProcessor, augment: Callable) -> dict:
    images = [augment(to_rgb(image)) for image in rows["image"]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixel_values, "labels": rows["label"], "node_ids": rows["node_id"]}
