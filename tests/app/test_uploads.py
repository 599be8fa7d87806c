"""Files that visitors send: images come back upright and in RGB, anything else as a sentence, and nothing explodes."""

import warnings
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from PIL import Image

from modeling_bpgcn.app.uploads import UploadError, open_upload

RED, BLUE = (220, 30, 30), (30, 30, 220)


def two_colors(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def saved(path, image: Image.Image, kind: str, **options):
    image.save(path, kind, **options)
    return path


def assert_two_colors(image: Image.Image, size: tuple[int, int] = (40, 20), tolerance: int = 40) -> None:
    assert (image.mode, image.size) == ("RGB", size)
    for place, color in (((size[0] // 5, size[1] // 2), RED), ((size[0] * 4 // 5, size[1] // 2), BLUE)):
        assert np.abs(np.subtract(image.getpixel(place), color)).max() <= tolerance


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_of_zeros(width: int, height: int) -> bytes:
    """A black image of one bit a pixel, a few kilobytes whatever its size."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    parts = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_told_by_their_content_and_not_by_their_name(kind, tmp_path):
    assert_two_colors(open_upload(str(saved(tmp_path / "image.txt", two_colors(), kind))))


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("LA", "PNG")]
)
def test_other_modes_become_rgb(mode, kind, tmp_path):
    image = Image.new(mode, (40, 20)) if mode == "I;16" else two_colors(mode)
    opened = open_upload(saved(tmp_path / "image", image, kind))
    assert (opened.mode, opened.size) == ("RGB", (40, 20))
    if mode in ("CMYK", "P"):
        assert_two_colors(opened, tolerance=60)


def test_transparent_parts_are_white(tmp_path):
    image = two_colors("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: 255 * (value > 127)))
    opened = open_upload(saved(tmp_path / "image.png", image, "PNG"))
    assert opened.getpixel((5, 1)) == (255, 255, 255)
    assert opened.getpixel((5, 18)) == RED


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    turned = two_colors().transpose(Image.Transpose.ROTATE_90)
    assert turned.size == (20, 40)
    assert_two_colors(open_upload(saved(tmp_path / "image.jpg", turned, "JPEG", exif=exif, quality=95)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_or_many_pages_the_first_is_taken(kind, tmp_path):
    others = [Image.new("RGB", (40, 20), color) for color in ("lime", "yellow", "black")]
    path = saved(tmp_path / "image", two_colors(), kind, save_all=True, append_images=others)
    with PIL.Image.open(path) as image:
        assert image.n_frames == 4
    assert_two_colors(open_upload(path))


def test_a_large_photograph_within_the_bounds_is_opened(tmp_path):
    path = saved(tmp_path / "image.jpg", two_colors(size=(6000, 4000)), "JPEG")
    assert_two_colors(open_upload(path), (6000, 4000))


# --- anything else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [20_000, 10_000, 5_001])  # of which Pillow refuses the first and warns of the second
@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, warned, tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(side, side))
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    decoded, load = [], PIL.ImageFile.ImageFile.load
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    with warnings.catch_warnings():
        warnings.simplefilter(warned, PIL.Image.DecompressionBombWarning)
        with pytest.raises(UploadError, match="More than 25 million pixels are not decoded"):
            open_upload(str(tmp_path / "bomb.png"))
    assert decoded == []
    (tmp_path / "fine.png").write_bytes(png_of_zeros(5_000, 5_000))
    assert open_upload(str(tmp_path / "fine.png")).size == (5_000, 5_000)
    assert (5_000, 5_000) in decoded


def test_text_that_expands_in_a_png_is_refused(tmp_path):
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    content = png_of_zeros(8, 8)
    (tmp_path / "text.png").write_bytes(content[:33] + text + content[33:])
    with pytest.raises(UploadError, match="image is broken"):
        open_upload(str(tmp_path / "text.png"))


@pytest.mark.parametrize(("size", "allowed"), [((100, 1), True), ((101, 1), False), ((1, 5000), False)])
def test_a_narrow_image_is_refused(size, allowed, tmp_path):
    path = saved(tmp_path / "image.png", Image.new("RGB", size), "PNG")
    if allowed:
        assert open_upload(path).size == size
    else:
        with pytest.raises(UploadError, match=f"{size[0]} x {size[1]} pixels, one side more than 100 times the other"):
            open_upload(path)


def test_a_large_file_is_refused(tmp_path):
    path = saved(tmp_path / "image.bmp", Image.new("RGB", (2000, 2000)), "BMP")
    with pytest.raises(UploadError, match="larger than 10 MB: scale the image down"):
        open_upload(path)
    assert open_upload(path, max_bytes=path.stat().st_size).size == (2000, 2000)


def jpeg() -> bytes:
    file = BytesIO()
    Image.effect_noise((200, 200), 80).save(file, "JPEG")
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script>alert(1)</script></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/etc/passwd) (r) file\nshowpage\n"
ICO = b"\0\0\1\0\1\0\x08\x08\0\0\1\0\x18\0" + (300).to_bytes(4, "little") + (22).to_bytes(4, "little") + bytes(300)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The file is empty"),
        (b"no image at all", "no image of a format that can be read: send JPEG, PNG"),
        (SVG, "no image of a format"),
        (EPS, "no image of a format"),
        (ICO, "no image of a format"),
        (jpeg()[:3000], "broken, or only a part of it arrived"),
        (jpeg()[:100], "no image of a format|broken"),
        (png_of_zeros(8, 8)[:45], "broken, or only a part of it arrived"),
        (b"GIF89a" + bytes(20), "no image of a format|broken"),
        (bytes(1000), "no image of a format"),
    ],
)
def test_what_is_no_image_gets_a_sentence(content, message, tmp_path):
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(UploadError, match=message) as raised:
        open_upload(str(tmp_path / "image.jpg"))
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("name", [".", "none.png"])
def test_what_is_no_file_gets_a_sentence(name, tmp_path):
    with pytest.raises(UploadError, match="no such file"):
        open_upload(str(tmp_path / name))


def test_any_damage_to_a_file_gives_an_image_or_a_sentence(tmp_path):
    random, path = np.random.default_rng(0), tmp_path / "image"
    refused = 0
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        file = BytesIO()
        two_colors().save(file, kind)
        for _ in range(40):
            content = np.frombuffer(file.getvalue(), np.uint8).copy()
            places = random.integers(0, len(content), 4)
            content[places] = random.integers(0, 256, 4)
            path.write_bytes(content.tobytes())
            try:
                assert open_upload(path, max_pixels=10_000).mode == "RGB"
            except UploadError:
                refused += 1
    assert 20 < refused < 220
