"""Images on their way to the backbone: what is found unusable before training, and how the others become pixels."""

import logging
import pickle
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BitImageProcessorPil, default_data_collator

from modeling_bpgcn.training.images import (
    AUGMENTATIONS,
    build_image_processor,
    check_image_size,
    check_images,
    image_transform,
    random_crop_flip,
    random_flip,
    random_shift,
    to_rgb,
)

ORIENTATION = 0x0112


def noise(width=40, height=30, channels=3, seed=0) -> np.ndarray:
    """Noise compresses badly: half of the bytes of its JPEG is far from the whole image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, image=None, **options) -> Path:
    (image or PIL.Image.fromarray(noise())).save(path, **options)
    return path


def files_dataset(paths) -> Dataset:
    return Dataset.from_dict({"image": [str(path) for path in paths]}, features=Features({"image": ImageFeature()}))


def through_file(image: PIL.Image.Image, format: str, **options) -> PIL.Image.Image:
    """What a user's file of this image opens as."""
    file = BytesIO()
    image.save(file, format, **options)
    return PIL.Image.open(file)


# --- conversion to RGB


def test_grey_keeps_its_values():
    grey = noise(channels=1)[:, :, 0]
    rgb = np.asarray(to_rgb(through_file(PIL.Image.fromarray(grey), "PNG")))
    assert rgb.shape == (30, 40, 3)
    for channel in range(3):
        np.testing.assert_array_equal(rgb[:, :, channel], grey)


def test_rgb_is_returned_as_it_is():
    image = PIL.Image.fromarray(noise())
    assert to_rgb(image) is image


@pytest.mark.parametrize(
    ("mode", "clear", "solid"),
    [("RGBA", (255, 0, 0, 0), (255, 0, 0, 255)), ("LA", (0, 0), (76, 255)), ("RGBa", (0, 0, 0, 0), (255, 0, 0, 255))],
)
def test_transparent_parts_become_white(mode, clear, solid):
    image = PIL.Image.new(mode, (2, 1), solid)
    image.putpixel((0, 0), clear)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 0)) == ((76, 76, 76) if mode == "LA" else (255, 0, 0))


def test_half_transparent_is_mixed_with_white():
    red, green, blue = to_rgb(PIL.Image.new("RGBA", (1, 1), (0, 0, 255, 128))).getpixel((0, 0))
    assert (red, green, blue) == pytest.approx((127, 127, 255), abs=1)


def palette_image() -> PIL.Image.Image:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return image


def test_palette_is_looked_up():
    rgb = to_rgb(through_file(palette_image(), "PNG"))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"], ids=["index", "bytes"])
def test_palette_with_a_transparent_colour(transparency):
    image = through_file(palette_image(), "PNG", transparency=transparency)
    assert image.mode == "P"
    assert "transparency" in image.info
    rgb = to_rgb(image)
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_16_bits_are_scaled_where_pil_clips_them():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = through_file(PIL.Image.fromarray(values), "PNG")
    assert image.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535, 32896]], dtype=np.int32), [0, 255, 128]),
        (np.array([[0, 200, 17]], dtype=np.int32), [0, 200, 17]),
        (np.array([[0, 2_000_000, 1_000_000]], dtype=np.int32), [0, 255, 128]),
        (np.array([[0.0, 1.0, 0.2]], dtype=np.float32), [0, 255, 51]),
        (np.array([[0.0, 250.0, 100.0]], dtype=np.float32), [0, 250, 100]),
        (np.array([[-1.0, 1.0, 0.0]], dtype=np.float32), [0, 255, 128]),
        (np.array([[np.nan, np.inf, 1.0]], dtype=np.float32), [0, 0, 255]),
        (np.zeros((1, 3), dtype=np.float32), [0, 0, 0]),
    ],
)
def test_wide_pixels_are_scaled_by_the_range_they_use(values, expected):
    image = through_file(PIL.Image.fromarray(values), "TIFF")
    assert image.mode in ("I", "F")
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 1], expected)


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes(mode):
    image = PIL.Image.fromarray(noise()).convert(mode if mode != "RGBX" else "RGBA")
    image = PIL.Image.new("RGBX", (4, 3)) if mode == "RGBX" else image
    assert image.mode == mode
    assert to_rgb(image).mode == "RGB"


def test_photos_are_turned_upright():
    image = PIL.Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held upright: turn by 90 degrees, clockwise
    upright = to_rgb(through_file(image, "PNG", exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


# --- checks before training


@pytest.fixture
def good(tmp_path) -> list[Path]:
    return [
        save(tmp_path / "photo.jpg"),
        save(tmp_path / "drawing.png"),
        save(tmp_path / "palette.gif", palette_image().resize((32, 32))),
        save(tmp_path / "scan.png", PIL.Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16))),
        save(tmp_path / "logo.png", PIL.Image.new("RGBA", (20, 20))),
    ]


@pytest.fixture
def bad(tmp_path) -> dict[str, Path]:
    paths = {
        name: tmp_path / f"{name}.{suffix}" for name, suffix in (("text", "jpg"), ("empty", "png"), ("cut", "jpg"))
    }
    paths["text"].write_text("404: not found")
    paths["empty"].touch()
    whole = save(tmp_path / "whole.jpg", PIL.Image.fromarray(noise(300, 200))).read_bytes()
    paths["cut"].write_bytes(whole[: len(whole) // 2])
    paths["cut_png"] = tmp_path / "cut_png.png"
    paths["cut_png"].write_bytes(save(tmp_path / "whole.png").read_bytes()[:-2000])
    paths["gone"] = tmp_path / "gone.jpg"
    return paths


def test_usable_images_pass_unchanged(good):
    dataset = files_dataset([*good, good[0]])  # twice the same file is fine
    assert check_images(dataset, "image", minimum_size=16) is dataset


def test_a_single_image_passes(good):
    assert len(check_images(files_dataset(good[:1]))) == 1


def test_unusable_images_are_named_with_reason_count_and_remedy(good, bad):
    with pytest.raises(ValueError, match=r"5 of 10 images of the data set cannot be used") as caught:
        check_images(files_dataset([*good, *bad.values()]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for line, (name, reason) in zip(
        lines[1:],
        [
            ("text", "cannot identify"),
            ("empty", "empty file"),
            ("cut", "truncated"),
            ("cut_png", ""),
            ("gone", "No such"),
        ],
        strict=False,
    ):
        assert line.startswith(f"  {bad[name]}: "), line
        assert reason in line
    assert "--skip_unreadable_images true" in lines[-1]


@pytest.mark.parametrize("kept", range(5, 100, 5))
def test_a_jpeg_cut_anywhere_is_found(tmp_path, kept):
    whole = save(tmp_path / "whole.jpg", PIL.Image.fromarray(noise(300, 200)), progressive=kept % 2 == 0).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * kept // 100])
    assert check_images(files_dataset([tmp_path / "whole.jpg"])) is not None
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        check_images(files_dataset([tmp_path / "cut.jpg"]))


def test_at_most_ten_are_named(tmp_path, good):
    broken = [tmp_path / f"broken{number:02d}.jpg" for number in range(13)]
    for path in broken:
        path.touch()
    with pytest.raises(ValueError, match=r"13 of 18 images") as caught:
        check_images(files_dataset(good + broken))
    assert str(caught.value).count("broken") == 10
    assert "... and 3 more" in str(caught.value)


def test_images_smaller_than_a_patch_are_unusable(tmp_path):
    small, large = save(tmp_path / "small.png", PIL.Image.new("L", (100, 13))), save(tmp_path / "large.png")
    dataset = files_dataset([small, large])
    assert check_images(dataset, minimum_size=13) is dataset
    with pytest.raises(ValueError, match=r"small\.png: 100 x 13 pixels, smaller than a patch of 14 x 14"):
        check_images(dataset, minimum_size=14)


def test_decompression_bombs_are_unusable(tmp_path, monkeypatch):
    bomb = save(tmp_path / "bomb.png", PIL.Image.new("1", (500, 500)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png: .*decompression bomb"):
        check_images(files_dataset([bomb]))


def test_embedded_images_are_named_by_row_or_stored_name(good):
    rows = [
        {"bytes": good[0].read_bytes(), "path": None},
        {"bytes": b"broken", "path": None},
        {"bytes": b"", "path": "a/cat.jpg"},
        None,
    ]
    dataset = Dataset.from_dict({"photo": rows}, features=Features({"photo": ImageFeature()}))
    with pytest.raises(ValueError, match=r"3 of 4 images of split 'test'") as caught:
        check_images(dataset, "photo", name="split 'test'")
    assert "row 1: cannot identify" in str(caught.value)
    assert "a/cat.jpg: empty file" in str(caught.value)
    assert "row 3: no image" in str(caught.value)


def test_skipping_keeps_the_others_in_order_and_lists_what_is_skipped(good, bad, caplog):
    paths = [good[0], bad["cut"], *good[1:], bad["empty"]]
    dataset = files_dataset(paths).add_column("node_id", list(range(7)))
    with caplog.at_level(logging.WARNING):
        kept = check_images(dataset, skip=True)
    assert kept["node_id"][:] == [0, 2, 3, 4, 5]
    assert [row["path"] for row in kept.cast_column("image", ImageFeature(decode=False))["image"]] == list(
        map(str, good)
    )
    assert "2 of 7 images" in caplog.text
    assert all(str(bad[name]) in caplog.text for name in ("cut", "empty"))


def test_skipping_everything_is_an_error(bad):
    with pytest.raises(ValueError, match=r"none is left"):
        check_images(files_dataset(bad.values()), skip=True)


def test_more_images_than_are_checked_at_once(tmp_path, good):
    broken = tmp_path / "broken.jpg"
    broken.touch()
    dataset = files_dataset([broken, *good * 40, broken, *good * 2])
    assert len(check_images(dataset, skip=True)) == len(dataset) - 2 > 200


# --- random changes


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_repeats_with_torch_and_does_not_write_to_its_input(name):
    original = noise()
    image = PIL.Image.fromarray(original.copy())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [np.asarray(AUGMENTATIONS[name](image)) for _ in range(20)]
    torch.set_rng_state(state)
    second = [np.asarray(AUGMENTATIONS[name](image)) for _ in range(20)]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(np.asarray(image), original)
    versions = {one.tobytes() for one in first}
    assert (len(versions) == 1) == (name == "none")


def test_flip_mirrors_about_half_of_the_time():
    image = PIL.Image.fromarray(noise())
    mirrored = noise()[:, ::-1]
    flips = sum(np.array_equal(np.asarray(random_flip(image)), mirrored) for _ in range(200))
    assert 70 < flips < 130


def test_crops_are_squares_of_a_quarter_to_all_of_the_short_side():
    image = PIL.Image.fromarray(noise(80, 40))
    sizes = [random_crop_flip(image).size for _ in range(300)]
    assert all(width == height and 20 <= width <= 40 for width, height in sizes)
    assert min(sizes) <= (22, 22)
    assert max(sizes) >= (38, 38)


def test_shift_moves_pixels_by_at_most_an_eighth():
    image = PIL.Image.new("L", (16, 8))
    image.putpixel((8, 4), 255)
    places = {tuple(np.argwhere(np.asarray(random_shift(image)))[0]) for _ in range(400)}
    assert places == {(row, column) for row in (3, 4, 5) for column in (6, 7, 8, 9, 10)}


def test_a_single_pixel_survives_augmentation_as_an_image():
    for augment in AUGMENTATIONS.values():
        assert augment(PIL.Image.new("RGB", (1, 1))).size == (1, 1)


# --- image processor


@pytest.fixture
def backbone(tmp_path) -> str:
    """A local folder with the image processor of a backbone at 224 pixels, as DINOv2 ships it."""
    size = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessorPil(**size, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(
        tmp_path / "net"
    )
    return str(tmp_path / "net")


def test_image_size_resizes_the_short_side_and_cuts_the_centre(backbone):
    processor = build_image_processor(backbone, image_size=28, patch_size=14)
    wide = PIL.Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    pixel_values = processor([wide], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 28, 28)
    white = (1 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    torch.testing.assert_close(pixel_values[0, :, 14, 14], white)
    torch.testing.assert_close(pixel_values[0, :, 14, 3], white)  # squashed to a square, this would be black


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (28, 28), (20, 15), (31, 29)])
def test_any_aspect_gives_the_same_size(backbone, size):
    processor = build_image_processor(backbone, image_size=28, patch_size=14)
    assert processor([PIL.Image.new("RGB", size)], return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def test_without_image_size_the_processor_keeps_its_own(backbone):
    processor = build_image_processor(backbone, patch_size=14)
    assert processor([PIL.Image.new("RGB", (50, 60))], return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


def test_image_size_survives_saving(backbone, tmp_path):
    build_image_processor(backbone, image_size=28).save_pretrained(tmp_path / "saved")
    reloaded = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    assert reloaded([PIL.Image.new("L", (50, 60))], return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def test_processor_for_digits_centres_the_values_and_crops_nothing():
    processor = build_image_processor()
    pixels = noise(8, 8)
    pixel_values = processor([PIL.Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    assert pixel_values.dtype == torch.float32
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "remedy"), [(100, 16, "96 or 112"), (15, 14, "14 or 28"), (10, 16, "16"), (0, 4, "4")]
)
def test_image_size_must_be_a_multiple_of_the_patch(image_size, patch_size, remedy):
    with pytest.raises(ValueError, match=rf"image size {image_size} .* {patch_size}: pass --image_size {remedy}$"):
        check_image_size(image_size, patch_size)


def test_image_size_is_checked_against_the_patch_whoever_chose_it(backbone):
    with pytest.raises(ValueError, match=r"pass --image_size 28 or 42"):
        build_image_processor(backbone, image_size=30, patch_size=14)
    with pytest.raises(ValueError, match=r"image size 224 .* pass --image_size 210 or 225"):
        build_image_processor(backbone, patch_size=15)
    check_image_size(28, 14)
    check_image_size(29, None)


def test_a_processor_without_fixed_size_asks_for_image_size(tmp_path):
    BitImageProcessorPil(do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no fixed output size .*--image_size"):
        build_image_processor(str(tmp_path))
    assert build_image_processor(str(tmp_path), image_size=16).crop_size["height"] == 16


# --- transform


def rows_dataset() -> Dataset:
    images = [
        PIL.Image.fromarray(noise(8, 8, seed=seed)).convert(mode) for seed, mode in enumerate(["RGB", "L", "RGBA"])
    ]
    features = Features({"image": ImageFeature(), "label": Value("int64"), "node_id": Value("int64")})
    return Dataset.from_dict({"image": images, "label": [1, -100, 0], "node_id": [7, 8, 9]}, features=features)


def test_transform_gives_pixel_values_labels_and_node_ids():
    dataset = rows_dataset().with_transform(image_transform(build_image_processor()))
    row = dataset[1]
    assert row["pixel_values"].shape == (3, 8, 8)
    assert row["pixel_values"].dtype == torch.float32
    assert (row["labels"], row["node_ids"]) == (-100, 8)
    assert set(row) == {"pixel_values", "labels", "node_ids"}


def test_transformed_rows_collate_to_a_batch():
    transform = pickle.loads(pickle.dumps(image_transform(build_image_processor(), "shift")))
    dataset = rows_dataset().with_transform(transform)
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=default_data_collator)))
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [1, -100, 0]
    assert batch["node_ids"].tolist() == [7, 8, 9]


def test_an_unknown_augmentation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'mixup'.*none, flip, crop_flip, shift"):
        image_transform(build_image_processor(), "mixup")


def test_reading_a_palette_with_transparency_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rgb(through_file(palette_image(), "PNG", transparency=b"\x00\xff"))
