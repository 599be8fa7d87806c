"""Images that strangers send: bounded before anything is decoded, and opened as formats that are common."""

from pathlib import Path

import PIL.Image

from ..commands.image_files import MAX_ASPECT
from ..training.images import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TOO_MANY_PIXELS = PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning


class UploadError(ValueError):
    """A file that is not opened, with a sentence for the visitor."""


def open_upload(path: str, max_bytes: int = 10 * 2**20, max_pixels: int = 25_000_000) -> PIL.Image.Image:
    """The image of a file as 8-bit RGB and upright, the first one of an animation or of many pages.

    Raises:
        UploadError: for a file that is too large, of another format, broken, of more than `max_pixels`, or with one
            side more than 100 times the other. A file that claims too many pixels is not decoded.
    """
    file = Path(path)
    if not file.is_file():
        raise UploadError("There is no such file: send it again.")
    size = file.stat().st_size
    if size == 0:
        raise UploadError("The file is empty: send it again.")
    if size > max_bytes:
        raise UploadError(f"The file is larger than {max_bytes / 2**20:g} MB: scale the image down.")
    try:
        with PIL.Image.open(file, formats=FORMATS) as image:
            _check_size(image, max_pixels)
            image.load()
            return to_rgb(image)
    except UploadError:
        raise
    except PIL.UnidentifiedImageError:
        raise UploadError(
            "This is no image of a format that can be read: send JPEG, PNG, WebP, GIF, BMP or TIFF."
        ) from None
    except TOO_MANY_PIXELS:
        raise UploadError(_too_many(max_pixels)) from None
    except Exception as error:  # Pillow's decoders raise nearly any class on broken data
        raise UploadError("The image is broken, or only a part of it arrived: send it again.") from error


def _check_size(image: PIL.Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UploadError(f"The image has {width} x {height} pixels. {_too_many(max_pixels)}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UploadError(
            f"The image has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut it up."
        )


def _too_many(max_pixels: int) -> str:
    return f"More than {max_pixels / 1e6:g} million pixels are not decoded: scale the image down."
