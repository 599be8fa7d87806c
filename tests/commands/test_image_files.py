"""Image files: what names lead to, what is decoded as what, and what cannot be read and why."""

import contextlib
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_bpgcn.commands.image_files import ImageReader, decode, find_images, printable
from modeling_bpgcn.training.images import to_rgb


@pytest.fixture(scope="module")
def processor(model_folder):
    return AutoImageProcessor.from_pretrained(model_folder, backend="pil")


def read(files, processor, **options):
    """A reader after its last batch, and its batches."""
    rows = [{"path": str(file), "bytes": None} for file in files]
    defaults = {"batch_size": 4, "num_workers": 0, "disable_tqdm": True}
    reader = ImageReader(rows, [str(file) for file in files], processor, torch.device("cpu"), **(defaults | options))
    return reader, list(reader)


def reason(file, processor) -> str | None:
    reader, [batch] = read([file], processor)
    assert (batch.pixel_values is None) == bool(reader.failures)
    return reader.failures[0][1] if reader.failures else None


def photo(path, size=(12, 9), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(Image.new(mode, (1, 1)).getbands())))
    Image.fromarray(
        pixels.astype(np.uint8).squeeze(-1) if mode == "L" else pixels.astype(np.uint8),
        mode if mode == "CMYK" else None,
    ).save(path, **options)
    return path


def test_folders_are_searched_at_any_depth_and_each_file_comes_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("1.png", "a/2.JPG", "a/b/3.webp", "a/notes.txt", ".hidden/4.png", "a/.5.png"):
        (tmp_path / name).touch()
    found = find_images([str(tmp_path), str(tmp_path / "a" / "b" / ".." / "2.JPG"), str(tmp_path / "a" / "2.JPG")])
    assert [file.name for file in found] == ["1.png", "a/2.JPG", "a/b/3.webp"]
    assert [file.path for file in found] == [str(tmp_path / file.name) for file in found]


def test_globs_are_expanded_but_files_of_such_names_come_first(tmp_path):
    for name in ("a1.png", "a2.png", "a[1].png", "deep/a3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_images([str(tmp_path / "a?.png")])] == ["a1.png", "a2.png"]
    assert [file.name for file in find_images([str(tmp_path / "a[1].png")])] == ["a[1].png"]
    assert [file.name for file in find_images([str(tmp_path / "**" / "a3.png")])] == ["a3.png"]
    assert [file.name for file in find_images([str(tmp_path / "d*")])] == ["a3.png"]  # a folder that a glob matches


def test_a_name_that_leads_nowhere_is_reported_as_a_file(tmp_path, processor):
    (tmp_path / "empty").mkdir()
    missing, empty = find_images([str(tmp_path / "no*.png"), str(tmp_path / "empty")])
    assert (missing.path, empty.path) == (str(tmp_path / "no*.png"), str(tmp_path / "empty"))
    assert reason(missing.path, processor) == "No such file or directory"
    assert reason(empty.path, processor) == "a folder without images"


def test_what_cannot_be_read_has_its_reason_and_the_rest_goes_on(tmp_path, processor):
    good = [photo(tmp_path / f"good {number}.png") for number in range(3)]
    whole = photo(tmp_path / "cut.jpg", (64, 64)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "zero.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    photo(tmp_path / "thin.png", (1, 101))
    broken = {
        "cut.jpg": "truncated",
        "text.jpg": "not an image",
        "zero.png": "empty file",
        "loop.png": "symbolic links",
        "pipe.png": "not a regular file",
        "thin.png": "1 x 101 pixels, one side more than 100 times the other",
    }
    files = [good[0], *(tmp_path / name for name in broken), *good[1:]]
    reader, batches = read(files, processor)
    assert [row for batch in batches for row in batch.rows] == [0, 7, 8]
    assert [name for name, _ in reader.failures] == [str(tmp_path / name) for name in broken]
    for (_, why), expected in zip(reader.failures, broken.values(), strict=True):
        assert expected in why


@contextlib.contextmanager
def unprivileged():
    """Root may read everything: within, root is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read(processor):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        secret, open_ = photo(folder / "secret.png"), photo(folder / "open.png")
        secret.chmod(0)
        assert reason(open_, processor) is None  # loads what decoding needs
        with unprivileged():
            found = reason(open_, processor), reason(secret, processor)
    assert found == (None, "Permission denied")


@pytest.mark.parametrize("side", [9_460, 20_000])  # between Pillow's two limits, and above both
def test_bombs_are_refused_by_their_header(tmp_path, processor, side):
    content = photo(tmp_path / "bomb.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    (tmp_path / "bomb.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert "than the 89,478,485 that are decoded: scale it down" in reason(tmp_path / "bomb.png", processor)


def test_every_mode_is_decoded_as_in_training_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    files = [photo(tmp_path / "turned.jpg", exif=exif)]
    files += [photo(tmp_path / f"{mode}.png", mode=mode) for mode in ("L", "RGBA", "LA")]
    files += [photo(tmp_path / "cmyk.jpg", mode="CMYK")]
    Image.open(files[0]).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(np.arange(0, 60_000, 600, dtype=np.uint16).reshape(10, 10)).save(tmp_path / "deep.png")
    for file in [*files, tmp_path / "palette.png", tmp_path / "deep.png"]:
        decoded = decode({"path": str(file), "bytes": None})
        assert decoded.mode == "RGB", file
        assert np.array_equal(decoded, to_rgb(Image.open(file))), file
        assert np.array_equal(decoded, decode({"path": None, "bytes": file.read_bytes()})), file
    assert decode({"path": str(files[0]), "bytes": None}).size == (9, 12)
    assert np.ptp(decode({"path": str(tmp_path / "deep.png"), "bytes": None})) > 200


def test_workers_give_the_same_batches_in_the_same_order(tmp_path, processor):
    files = [photo(tmp_path / f"{number}.png", (8 + number, 8)) for number in range(9)]
    files[4].write_bytes(b"")
    alone, expected = read(files, processor)
    helped, batches = read(files, processor, num_workers=2)
    assert helped.loader.num_workers == 2
    assert helped.failures == alone.failures == [(str(files[4]), "empty file")]
    for batch, other in zip(batches, expected, strict=True):
        assert batch.rows == other.rows
        assert torch.equal(batch.pixel_values, other.pixel_values)


def test_a_single_batch_needs_no_worker(tmp_path, processor):
    reader, _ = read([photo(tmp_path / "1.png")], processor, num_workers=3)
    assert reader.loader.num_workers == 0


def test_oddities_of_a_readable_file_stay_silent(tmp_path, processor):
    image = Image.new("P", (8, 8))
    image.save(tmp_path / "odd.png", transparency=bytes([0] * 256))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert reason(tmp_path / "odd.png", processor) is None
    assert not caught


def test_names_cannot_write_over_the_terminal():
    assert printable("Größe 1.png") == "Größe 1.png"
    assert printable("a\x1b[2J\n.png") == "a\\x1b[2J\\n.png"
    assert "\udcff" not in printable("caf\udcff.png")
