"""Thumbnails beside a model: small, faithful, of this bank and no other, and read without trusting them."""

import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_bpgcn.training import thumbnails
from modeling_bpgcn.training.thumbnails import (
    SIDE,
    THUMBNAILS_FILE,
    encode,
    open_thumbnail,
    read_thumbnails,
    shrink,
    write_thumbnails,
)
from tests.model_factory import captured_warnings, tiny_model

IDS = [7, 3, 100]


def noise(size: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width: int = 300, height: int = 200) -> Image.Image:
    """Colours that change slowly, as in a photograph."""
    bands = [Image.linear_gradient("L").resize((width, height)), Image.radial_gradient("L").resize((width, height))]
    return Image.merge("RGB", (*bands, bands[0].rotate(180)))


@pytest.fixture
def model():
    model = tiny_model()
    model.set_support_bank(torch.randn(3, 8), torch.tensor([0, 1, -100]), torch.tensor(IDS))
    return model


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


# --- write and read --------------------------------------------------------------------------------------------------


def test_thumbnails_come_back_by_id(model, tmp_path):
    digit, photograph = noise(8), smooth()
    assert write_thumbnails(tmp_path, IDS, iter([digit, photograph, None])) == tmp_path / THUMBNAILS_FILE
    found = read_thumbnails(str(tmp_path), model)
    assert list(found) == [7, 3]
    assert found[7].tobytes() == digit.tobytes()  # every pixel
    assert found[3].size == (SIDE, 85)
    assert far(found[3], photograph.resize((SIDE, 85))) < 4
    assert 100 not in found
    assert found.get(100) is found.get(5) is found.file(100) is None


def test_the_table_is_one_that_datasets_reads_as_images(model, tmp_path):
    path = write_thumbnails(tmp_path, IDS, [noise(8), smooth(), None])
    table = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.features == {"id": Value("int64"), "image": ImageFeature()}
    assert table["id"][:] == IDS
    assert [None if image is None else image.format for image in table["image"]] == ["PNG", "JPEG", None]


def test_files_are_written_again_as_they_are(model, tmp_path):
    write_thumbnails(tmp_path, IDS, [smooth(), noise(64), smooth(50, 300)])
    once = read_thumbnails(str(tmp_path), model)
    files = [once.file(id_) for id_ in IDS]
    write_thumbnails(tmp_path, IDS, files)
    again = read_thumbnails(str(tmp_path), model)
    assert [again.file(id_) for id_ in IDS] == files
    assert len(set(files)) == 3


def test_a_thousand_rows_and_more_come_back(tmp_path):
    model = tiny_model(head="linear")
    model.set_support_bank(torch.randn(1100, 8), torch.zeros(1100, dtype=torch.long))
    write_thumbnails(tmp_path, range(1100), (Image.new("RGB", (2, 2), (i % 256, i // 256, 9)) for i in range(1100)))
    found = read_thumbnails(str(tmp_path), model)
    assert [found[i].getpixel((0, 0)) for i in (0, 999, 1000, 1099)] == [
        (i % 256, i // 256, 9) for i in (0, 999, 1000, 1099)
    ]


def test_ids_and_images_must_be_as_many(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_thumbnails(tmp_path, IDS, [noise(8)])


# --- a single image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "small"), [((8, 8), (8, 8)), ((128, 30), (128, 30)), ((129, 64), (128, 64)), ((50, 5000), (1, 128))]
)
def test_no_side_is_over_128_pixels_and_small_images_keep_theirs(size, small):
    image = Image.new("RGB", size)
    assert shrink(image).size == small
    assert image.size == size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new(mode, (300, 200))
    assert shrink(image).mode == "RGB"
    with PIL.Image.open(BytesIO(encode(shrink(image)))) as file:
        assert file.format == "JPEG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_is_opened_small_and_upright(kind, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(1200, 800).save(tmp_path / "image", kind, exif=exif)
    decoded, convert = [], thumbnails.to_rgb
    monkeypatch.setattr(thumbnails, "to_rgb", lambda image: decoded.append(image.size) or convert(image))
    expected = shrink(smooth(1200, 800).transpose(Image.Transpose.ROTATE_270))
    decoded.clear()
    for file in (
        {"path": str(tmp_path / "image"), "bytes": None},
        {"path": None, "bytes": (tmp_path / "image").read_bytes()},
    ):
        small = open_thumbnail(file)
        assert small.size == expected.size == (85, 128)
        assert far(small, expected) < 4
    assert decoded == [(600, 400) if kind == "JPEG" else (1200, 800)] * 2  # JPEG at the half


# --- what is not trusted ---------------------------------------------------------------------------------------------


def test_without_a_table_there_are_none(model, tmp_path):
    with captured_warnings(thumbnails.logger) as said:
        assert read_thumbnails(str(tmp_path), model) == {}
    assert said == []


@pytest.mark.parametrize("ids", [[7, 3], [7, 3, 101], [3, 7, 100], [7, 3, 100, 101]])
def test_those_of_another_bank_are_not_taken(ids, model, tmp_path):
    write_thumbnails(tmp_path, ids, [noise(8)] * len(ids))
    with captured_warnings(thumbnails.logger) as said:
        assert read_thumbnails(str(tmp_path), model) == {}
    assert len(said) == 1
    assert "is of another support bank: neighbors have no pictures" in said[0]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_no_table_is_said_and_never_unpickled(model, tmp_path):
    sprung = tmp_path / "sprung"
    others = [b"", b"PAR1 and no more", pickle.dumps(Trap(sprung))]
    for columns in ({"id": IDS}, {"id": IDS, "image": IDS}, {"id": ["a", "b", "c"], "image": ["x"] * 3}):
        Dataset.from_dict(columns).to_parquet(tmp_path / "other")
        others.append((tmp_path / "other").read_bytes())
    for content in others:
        (tmp_path / THUMBNAILS_FILE).write_bytes(content)
        with captured_warnings(thumbnails.logger) as said:
            assert read_thumbnails(str(tmp_path), model) == {}
        assert len(said) == 1, content[:20]
        assert "is no table of thumbnails" in said[0]
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


def test_pictures_that_are_broken_or_large_are_not_there(model, tmp_path):
    large = BytesIO()
    Image.new("1", (4000, 4000)).save(large, "PNG")
    gif = BytesIO()
    noise(8).save(gif, "GIF")
    for content in (
        large.getvalue(),
        gif.getvalue(),
        b"",
        encode(noise(100))[:2000],
        pickle.dumps(Trap(tmp_path / "sprung")),
    ):
        write_thumbnails(tmp_path, IDS, [content, noise(8), content])
        found = read_thumbnails(str(tmp_path), model)
        assert found.get(7) is None
        assert found[3].size == (8, 8)
    assert not (tmp_path / "sprung").exists()
