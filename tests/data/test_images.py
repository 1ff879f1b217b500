from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales import images
from dpm_scales.errors import UserError


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_psnr_is_the_closed_form() -> None:
    """An error of d at every second value: 10 log10(255^2 / (d^2 / 2)); of nothing, without bound."""
    truth = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    truth[0] = 250  # differences are not those of unsigned numbers
    image = truth.clone()
    image[..., ::2] = torch.where(truth[..., ::2] > 5, truth[..., ::2] - 5, truth[..., ::2] + 5)
    assert images.psnr(image, truth) == pytest.approx(10 * math.log10(255**2 / 12.5), rel=1e-12)
    assert images.psnr(truth, truth) == math.inf


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-0.3, 7.5)])
def test_ranges_are_inverse_on_all_levels(value_range: tuple[float, float]) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = images.to_range(levels, value_range)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == pytest.approx(value_range)
    assert torch.equal(images.to_uint8(x, value_range), levels)
    half = images.to_range(levels, (-1.0, 1.0), dtype=torch.bfloat16)
    assert torch.equal(images.to_uint8(half, (-1.0, 1.0)), levels)


def test_to_uint8_clips_and_rounds() -> None:
    x = torch.tensor([-5.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 9.0, float("nan"), float("inf")])
    assert images.to_uint8(x, (0.0, 1.0)).tolist() == [0, 0, 0, 1, 255, 255, 0, 255]


def test_ranges_refuse_wrong_input() -> None:
    with pytest.raises(ValueError, match="uint8"):
        images.to_range(torch.zeros(2), (0.0, 1.0))
    with pytest.raises(ValueError, match="below"):
        images.to_uint8(torch.zeros(2), (1.0, 1.0))


def test_grid_places_every_image() -> None:
    cells = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 3).contiguous()
    sheet = images.make_grid(cells, columns=2, padding=1, upscale=2)
    assert sheet.shape == (3, 3 * 5 + 1, 2 * 7 + 1)
    for index in range(5):
        top, left = index // 2 * 5 + 1, index % 2 * 7 + 1
        assert (sheet[:, top : top + 4, left : left + 6] == index + 1).all()
    assert (sheet[:, 11:15, 8:14] == images.PADDING_LEVEL).all()  # the cell without an image
    assert (sheet[:, 0] == images.PADDING_LEVEL).all()


def test_grid_defaults_are_near_square_and_visible() -> None:
    assert images.make_grid(noise(16, 1, 8, 8)).shape == (1, 4 * 33 + 1, 4 * 33 + 1)
    _, height, width = images.make_grid(noise(12, 3, 32, 96)).shape
    assert 0.5 < height / width < 2
    assert images.make_grid(noise(1, 3, 64, 64), padding=0).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="uint8"):
        images.make_grid(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_class_grid_has_a_named_row_for_each_class(channels: int) -> None:
    """Images of a class stand in its row, in their order; what is left of them is its name, one for each."""
    cells = torch.arange(1, 8, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, channels, 8, 8).contiguous()
    sheet = images.make_class_grid(cells, [2, 0, 2, 0, 5, 2, 0], ["cat", "dog", "cow", "ox", "eel", "pig"])
    margin = sheet.shape[2] - (3 * 33 + 1)
    assert sheet.shape[:2] == (channels, 3 * 33 + 1) and margin > 20
    for row, numbers in enumerate(([1, 3, 6], [0, 2, 5], [4])):
        for column, number in enumerate(numbers):
            top, left = 33 * row + 1, margin + 33 * column + 1
            assert (sheet[:, top : top + 32, left : left + 32] == number + 1).all()
    names = [sheet[0, 33 * row : 33 * row + 33, :margin].tolist() for row in range(3)]
    assert names[0] != names[1] != names[2] != names[0]
    assert all(max(max(line) for line in name) > 200 for name in names)
    assert (sheet[:, 34 + 33 :, margin + 33 + 1 :] == images.PADDING_LEVEL).all()  # a class of one


def test_class_grid_of_many_images_and_many_classes_stays_a_sheet() -> None:
    _, height, width = images.make_class_grid(noise(25, 1, 8, 8), [3] * 25).shape
    assert height == 3 * 33 + 1 and 10 * 33 < width < 11 * 33 + 30  # rows of ten
    _, height, width = images.make_class_grid(noise(45, 1, 8, 8), list(range(45))).shape
    assert height == 20 * 33 + 1 and width > 3 * (33 + 20)


@pytest.mark.parametrize("name", ["Z\u00fcrich", "\x1b]0;x\x07\n", "\u732b", "x" * 5000, ""])
def test_class_grid_takes_any_name(name: str) -> None:
    """Accents are left out; the number stands for what the font can't write."""
    sheet = images.make_class_grid(noise(2, 1, 8, 8), [0, 1], [name, "b"])
    like = {"Z\u00fcrich": "Zurich", "x" * 5000: "x" * 21 + "..."}.get(name, "0")
    assert torch.equal(sheet, images.make_class_grid(noise(2, 1, 8, 8), [0, 1], [like, "b"]))
    assert sheet.shape[2] < 400


def test_png_metadata_is_read_back_and_changes_no_pixel(tmp_path: Path) -> None:
    image, path = noise(1, 5, 9), tmp_path / "a.png"
    images.save_png(path, image)
    plain = path.read_bytes()
    images.save_png(path, image, {"seed": "3", "number": "12"})
    with Image.open(path) as picture:
        assert picture.info == {"seed": "3", "number": "12"}
    assert torch.equal(images.load_image(path), image)
    images.save_png(path, image, {})
    assert path.read_bytes() == plain


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip(tmp_path: Path, channels: int, mode: str) -> None:
    image, path = noise(channels, 5, 9), tmp_path / "new" / "a.png"
    images.save_png(path, image)
    with Image.open(path) as picture:
        assert picture.mode == mode
    assert torch.equal(images.load_image(path), image)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_gif_keeps_frames_and_duration(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((1, 4, 6), level, dtype=torch.uint8) for level in (0, 100, 255)])
    images.save_gif(tmp_path / "a.gif", frames, duration_ms=70)
    with Image.open(tmp_path / "a.gif") as picture:
        with pytest.raises(EOFError):
            picture.seek(3)
        assert picture.info["duration"] == 70
        for index, level in enumerate((0, 100, 255)):
            picture.seek(index)
            assert set(picture.convert("L").tobytes()) == {level}


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    images.write_text(path, "old ä\n")
    with pytest.raises(RuntimeError), images.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == "old ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    images.write_bytes(tmp_path / "file", b"x")
    with pytest.raises(UserError, match=r"cannot write .*png"):
        images.save_png(tmp_path / "file" / "a.png", noise(1, 2, 2))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        images.save_png(tmp_path / "folder.png", noise(1, 2, 2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.png"]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    array = noise(1, 4, 7)
    Image.fromarray(array[0].numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(images.load_image(tmp_path / "a.png"), array.rot90(-1, (1, 2)))


def test_transparency_is_composited_on_white() -> None:
    def load(picture: Image.Image, channels: int | None = None, **options: object) -> torch.Tensor:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        return images.load_image(buffer.getvalue(), channels)

    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (load(clear) == 255).all()
    half = load(Image.new("LA", (2, 2), (0, 128)))
    assert half.shape == (1, 2, 2)
    assert half.unique().tolist() == [127]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert load(palette)[:, 0, 0].tolist() == [200, 100, 50]
    assert (load(palette, transparency=1) == 255).all()
    assert load(palette, 1).shape == (1, 2, 2)
    assert load(Image.new("L", (2, 2), 7), 3)[:, 0, 0].tolist() == [7, 7, 7]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert images.load_image(tmp_path / "a.tif")[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / f"a.{suffix}")
    loaded = images.load_image(tmp_path / f"a.{suffix}")
    assert torch.equal(loaded, torch.from_numpy(levels.astype(np.uint8))[None])
    assert images.load_image(tmp_path / f"a.{suffix}", channels=3).shape == (3, 16, 16)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_truncated_and_foreign_files_are_named(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(3, 64, 64).permute(1, 2, 0).numpy()).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert images.load_image(whole).shape == (3, 64, 64)
    with pytest.raises(UserError, match=rf"cut\.{suffix}: not a readable image") as caught:
        images.load_image(cut)
    assert "\n" not in str(caught.value)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png: not a readable"):
        images.load_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="upload: not a readable"):
        images.load_image(b"hello", name="upload")


def test_missing_file_and_wrong_channels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png: no such file"):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="channels=2"):
        images.load_image(b"", channels=2)


def test_resize_is_antialiased() -> None:
    stripes = torch.zeros(1, 32, 32, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = images.resize(stripes, (8, 8))
    assert small.shape == (1, 8, 8)
    assert (small[:, :, 1:-1].int() - 127).abs().max() < 16
    assert images.resize(noise(2, 3, 8, 8), (4, 6)).shape == (2, 3, 4, 6)
