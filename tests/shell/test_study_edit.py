"""`evolve.py task=shadow` and `task=clone`: files in, files out, one line for a mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales.commands.retouch import place
from dpm_scales.errors import UserError
from support.osmosis_twins import drift_matrix, images
from support.reference import Array
from support.shell import Outcome, call, files

H, W = 18, 26


def save(path: Path, image: Array) -> Path:
    """uint8 ``(H, W)`` or ``(H, W, 3)``, or bool, as a PNG."""
    Image.fromarray(255 * image.astype(np.uint8) if image.dtype == bool else image).save(path)
    return path


def pixels(path: Path) -> Array:
    return np.asarray(Image.open(path)).astype(np.float64)


def texture(seed: int = 0, channels: int = 3, size: tuple[int, int] = (H, W)) -> Array:
    """Values between 60 and 240, uint8 ``(H, W, C)``."""
    return (60 + 180 * images(*size, channels, seed=seed).numpy()).round().astype(np.uint8)


def rectangle(size: tuple[int, int] = (H, W), box: tuple[int, int, int, int] = (5, 8, 12, 19)) -> Array:
    """True in rows and columns from (top, left) to (bottom, right)."""
    mask = np.zeros(size, dtype=bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


def flat_around(image: Array, mask: Array, value: int, reach: int = 2) -> Array:
    """The image, constant within `reach` pixels of the mask's outline."""
    wide, narrow = mask.copy(), mask.copy()
    for _ in range(reach):
        for axis in (0, 1):
            for shift in (1, -1):
                wide |= np.roll(wide, shift, axis)
                narrow &= np.roll(narrow, shift, axis)
    return np.where((wide & ~narrow)[..., None], value, image).astype(np.uint8)


def edit(out: Path, *options: str) -> Outcome:
    """A finished edit in the folder above `out`."""
    again = out.exists()
    outcome = call("evolve.py", *options, f"out={out}", cwd=out.parent)
    assert outcome.status == 0, outcome.err
    assert ("beside it, in place of the former ones" in outcome.out) == again
    assert sorted(files(out)) == ["comparison.png", "result.png"]
    return outcome


# --- shadows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["penumbra=0"], ["match=outside"], ["match=lit", "tol=1e-7"]])
def test_a_shadow_on_a_scene_that_is_flat_around_its_edge_is_removed_to_the_grey_level(
    options: list[str], tmp_path: Path
) -> None:
    mask = rectangle()
    clean = flat_around(texture() // 4 * 4, mask, 160)
    save(tmp_path / "photo.png", np.where(mask[..., None], clean // 4 * np.array([1, 2, 2]), clean).astype(np.uint8))
    save(tmp_path / "mask.png", mask)
    edit(tmp_path / "out", "task=shadow", "image=photo.png", "mask=mask.png", "offset=0", *options)
    assert np.abs(pixels(tmp_path / "out/result.png") - clean).max() <= 1


def test_the_edge_of_a_grey_photo_s_shadow(tmp_path: Path) -> None:
    """A penumbra of three columns, marked alone: the lit side keeps its brightness; match=mean keeps the mean."""
    factor = np.repeat([0.5, 0.625, 0.75, 0.875, 1.0], [9, 1, 1, 1, 14])
    edge = (factor > 0.5) & (factor < 1.0) & np.ones((H, 1), dtype=bool)
    clean = texture(channels=1)[..., 0] // 8 * 8
    clean[:, 7:14] = 160
    shadowed = (clean * factor).astype(np.uint8)
    save(tmp_path / "photo.png", shadowed), save(tmp_path / "mask.png", edge)
    command = ("task=shadow", "image=photo.png", "mask=mask.png", "mask_marks=edge", "offset=0")
    edit(tmp_path / "lit", *command)
    result = pixels(tmp_path / "lit/result.png")
    assert result.shape == (H, W) and np.abs(result - clean).max() <= 1
    edit(tmp_path / "mean", *command, "match=mean")
    assert abs(pixels(tmp_path / "mean/result.png").mean() - shadowed.mean()) < 0.3


def test_pinned_leaves_every_byte_outside_the_mask_and_its_penumbra(tmp_path: Path) -> None:
    photo, mask = texture(), rectangle()
    save(tmp_path / "photo.png", photo), save(tmp_path / "mask.png", mask)
    edit(tmp_path / "out", "task=shadow", "image=photo.png", "mask=mask.png", "penumbra=2")
    changed = (pixels(tmp_path / "out/result.png") != photo).any(-1)
    assert changed.any() and not changed[~rectangle(box=(3, 6, 14, 21))].any()
    assert changed[~mask].any(), "the penumbra reaches beyond the mask"


# --- cloning ----------------------------------------------------------------------------------------------------------


def exact_clone(f: Array, g: Array, mask: Array, mixed: bool) -> Array:
    """One channel, outside pinned, by a dense solve."""

    def drift(image: Array, axis: int) -> Array:
        return 2 * np.diff(image, axis=axis) / (np.delete(image, 0, axis) + np.delete(image, -1, axis))

    def mixture(axis: int) -> Array:
        share = (np.delete(mask, 0, axis).astype(float) + np.delete(mask, -1, axis)) / 2
        own, new = drift(f, axis), drift(g, axis)
        if mixed:
            new = np.where(np.abs(new) < np.abs(own), own, new)
        return share * new + (1 - share) * own

    P, inside, exact = drift_matrix(mixture(1), mixture(0)), mask.ravel(), f.ravel().copy()
    exact[inside] = np.linalg.solve(P[np.ix_(inside, inside)], -P[np.ix_(inside, ~inside)] @ exact[~inside])
    return exact.reshape(f.shape)


@pytest.mark.parametrize("at", [(4, 9), (-3, 15), (11, -2), None])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_smaller_foreground_is_cloned_where_it_is_wanted(
    at: tuple[int, int] | None, mixed: bool, tmp_path: Path
) -> None:
    """Against dense solves; what hangs over is cut off, and none is given for the middle."""
    f, g, mask = texture(), texture(seed=1, size=(9, 11)), rectangle((9, 11), (1, 0, 8, 9))
    save(tmp_path / "f.png", f), save(tmp_path / "g.png", g), save(tmp_path / "m.png", mask)
    options = [] if at is None else [f"at=[{at[0]},{at[1]}]"]
    files_given = ("background=f.png", "foreground=g.png", "mask=m.png")
    edit(tmp_path / "out", "task=clone", *files_given, f"mixed={str(mixed).lower()}", *options)
    top, left = at or ((H - 9) // 2, (W - 11) // 2)
    # an enlarged foreground, its border pixels repeated, of which the background's rectangle is cut
    margin = 30
    wide = np.pad(g, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    window = (slice(margin - top, margin - top + H), slice(margin - left, margin - left + W))
    inside = np.pad(mask, margin)[window]
    assert inside.any()
    exact = [exact_clone(f[..., c] + 1.02, wide[window][..., c] + 1.02, inside, mixed) - 1.02 for c in range(3)]
    result = pixels(tmp_path / "out/result.png")
    np.testing.assert_allclose(result, np.stack(exact, -1).clip(0, 255), atol=0.51)
    assert np.array_equal(result[~inside], f[~inside])


def test_match_outside_keeps_the_background_s_mean_where_it_is_seen(tmp_path: Path) -> None:
    f, g, mask = texture(), texture(seed=1), rectangle()
    save(tmp_path / "f.png", f), save(tmp_path / "g.png", g), save(tmp_path / "m.png", mask)
    command = ("task=clone", "background=f.png", "foreground=g.png", "mask=m.png")
    edit(tmp_path / "out", *command, "match=outside")
    result = pixels(tmp_path / "out/result.png")
    np.testing.assert_allclose(result[~mask].mean(0), f[~mask].mean(0), atol=0.5)
    assert (result[~mask] != f[~mask]).any(), "the seam is shared by both sides"


def test_what_is_cut_from_a_foreground() -> None:
    foreground, mask = torch.arange(12.0).reshape(1, 3, 4), torch.ones(3, 4, dtype=torch.bool)
    canvas, inside = place(foreground, mask, (4, 5), (2, -1))
    assert canvas[0].tolist() == [[1, 2, 3, 3, 3]] * 3 + [[5, 6, 7, 7, 7]]
    assert inside.int().tolist() == [[0] * 5, [0] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    with pytest.raises(UserError, match=r"no white pixel of the mask lies at=\[4,0\]"):
        place(foreground, mask, (4, 5), (4, 0))
    with pytest.raises(UserError, match="covers the whole background"):
        place(foreground, mask, (2, 3), (0, 0))


# --- files ------------------------------------------------------------------------------------------------------------


def test_comparison_shows_the_inputs_beside_the_result(tmp_path: Path) -> None:
    f, g, mask = texture(size=(32, 40)), texture(seed=1, size=(32, 40)), rectangle((32, 40))
    save(tmp_path / "f.png", f), save(tmp_path / "g.png", g), save(tmp_path / "m.png", mask)
    white = np.where(mask[..., None], np.uint8(255), np.uint8(0)) * np.ones(3, dtype=np.uint8)
    for task, inputs, cells in (
        ("shadow", ("image=f.png", "mask=m.png"), [f, white]),
        ("clone", ("background=f.png", "foreground=g.png", "mask=m.png"), [f, np.where(mask[..., None], g, f), white]),
    ):
        edit(tmp_path / task, f"task={task}", *inputs)
        sheet = pixels(tmp_path / task / "comparison.png")
        factor = (sheet.shape[1] - 4) // (len(cells) + 1) // 40  # titles need the width
        height, step = 32 * factor, 40 * factor + 4
        assert factor > 1 and sheet.shape[1:] == ((len(cells) + 1) * step + 4, 3)
        for k, cell in enumerate([*cells, pixels(tmp_path / task / "result.png")]):
            shown = sheet[-4 - height : -4, step * k + 4 : step * k + step]
            np.testing.assert_array_equal(shown, cell.repeat(factor, 0).repeat(factor, 1))
            title = sheet[: -8 - height, step * k + 4 : step * k + step]
            assert len(np.unique(title)) > 2  # something is written there, and nothing in the gaps
            assert (sheet[:, step * k : step * k + 4] == 128).all()


def test_black_pixels_grey_masks_and_names_with_spaces(tmp_path: Path) -> None:
    """The usual offset makes black pixels no mistake, and a mask is white from half on."""
    photo = texture()
    photo[3, 4] = 0
    save(tmp_path / "my photo, 1.png", photo), save(tmp_path / "mask.png", rectangle())
    save(tmp_path / "it's a mask.png", np.where(rectangle(), 128, 127).astype(np.uint8))
    for mask, out in (("it's a mask.png", "o=1, two"), ("mask.png", "plain")):
        edit(tmp_path / out, "task=shadow", "image=my photo, 1.png", f"mask={mask}", "match=outside")
    assert files(tmp_path / "o=1, two") == files(tmp_path / "plain")


def test_a_second_edit_takes_the_place_of_the_first_and_says_what_it_clipped(tmp_path: Path) -> None:
    bright = texture(channels=1)[..., 0]
    bright[rectangle()] = 255
    save(tmp_path / "photo.png", bright), save(tmp_path / "mask.png", rectangle())
    command = ("task=shadow", "image=photo.png", "mask=mask.png", "match=mean")
    edit(tmp_path / "out", *command)
    first = files(tmp_path / "out")
    photo = texture(seed=3, channels=1)[..., 0]
    photo[rectangle()] //= 4
    photo[8, 12] = 255
    save(tmp_path / "photo.png", photo)
    outcome = edit(tmp_path / "out", *command, "match=outside")
    assert files(tmp_path / "out")["result.png"] != first["result.png"]
    assert re.search(r"[1-9]\.\d\d% of its values lay beyond black or white and are clipped", outcome.out)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("desk")
    save(root / "a.png", texture()), save(root / "b.png", texture(seed=1)), save(root / "m.png", rectangle())
    save(root / "grey.png", texture(channels=1)[..., 0]), save(root / "small.png", texture(size=(6, 7)))
    save(root / "sm.png", rectangle((6, 7), (1, 1, 4, 5)))
    black = texture()
    black[0, 0] = 0
    save(root / "black.png", black)
    save(root / "white.png", np.ones((H, W), dtype=bool)), save(root / "none.png", np.zeros((H, W), dtype=bool))
    (root / "text.png").write_text("hello")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:300])
    (root / "file").write_text("no folder")
    (root / "old").mkdir()
    save(root / "old" / "result.png", texture())
    return root


SHADOW, CLONE = "task=shadow image=a.png mask=m.png ", "task=clone background=a.png foreground=b.png mask=m.png "

MISTAKES = {
    "task=shadw image=a.png mask=m.png": "unknown task 'shadw': did you mean 'shadow'",
    "task=shadow mask=m.png": "image has no value yet; give it on the command line",
    "task=shadow image=a.png": "mask has no value yet",
    "task=clone background=a.png mask=m.png": "foreground has no value yet",
    "image=a.png mask=m.png": "unknown option 'image': it belongs to task=shadow",
    SHADOW + "at=[1,2]": "unknown option 'at': it belongs to task=clone",
    SHADOW + "mask_mark=edge": "unknown option 'mask_mark': did you mean 'mask_marks'",
    SHADOW + "process=heat": "task=shadow has its own process; drop process=",
    # names and values
    SHADOW + "mask_marks=edges": "unknown mask_marks 'edges': did you mean 'edge'",
    SHADOW + "match=ouside": "unknown match 'ouside': did you mean 'outside'",
    SHADOW + "mask_marks=edge match=pinned": "match=pinned would keep the shadow: mask_marks=edge needs lit or mean",
    SHADOW + "mask_marks=edge penumbra=3": "penumbra is for mask_marks=region",
    SHADOW + "penumbra=-1": "penumbra must be a whole number of px >= 0, got -1",
    SHADOW + "penumbra=wide": "penumbra must be a whole number of px >= 0, got 'wide'",
    SHADOW + "offset=-1": "offset must be a number >= 0 and <= 1, got -1",
    SHADOW + "offset=dark": "offset must be a number .*'dark'",
    SHADOW + "tol=0": "tol must be a number >= 1e-12",
    SHADOW + "device=gpu": "unknown device 'gpu'",
    CLONE + "match=lit": "unknown match 'lit': .*outside, pinned",
    CLONE + "mixed=3": "mixed must be true or false, got 3",
    CLONE + "at=3": r"at must be null or \[row,column\], two whole numbers, got 3",
    CLONE + "at=[1,2,3]": r"at must be null or \[row,column\]",
    CLONE + "at=[1.5,2]": r"at must be null or \[row,column\]",
    CLONE + "at=[90,0]": r"no white pixel of the mask lies at=\[90,0\] in a background of 18x26",
    # files
    "task=shadow image=nowhere.png mask=m.png": "nowhere.png: no such file",
    "task=shadow image=a.png mask=nowhere.png": "nowhere.png: no such file",
    "task=shadow image=text.png mask=m.png": "text.png: not a readable image",
    "task=shadow image=cut.png mask=m.png": "cut.png: not a readable image",
    "task=shadow image=old mask=m.png": "old: not a readable image",
    "task=shadow image=a.png mask=sm.png": "sm.png has 6x7 pixels, a.png 18x26 .*; a mask needs the same size",
    "task=clone background=a.png foreground=small.png mask=m.png": "m.png has 18x26 pixels, small.png 6x7",
    "task=shadow image=a.png mask=white.png": "white.png is white everywhere",
    "task=shadow image=a.png mask=none.png": "none.png is black everywhere",
    "task=clone background=small.png foreground=b.png mask=m.png at=[-5,-9]": "mask covers the whole background",
    "task=clone background=a.png foreground=grey.png mask=m.png": "a.png is RGB and grey.png is grey; convert one",
    "task=clone background=grey.png foreground=b.png mask=m.png": "grey.png is grey and b.png is RGB",
    "task=shadow image=black.png mask=m.png offset=0": "black.png has black pixels, .*set offset",
    "task=clone background=a.png foreground=black.png mask=m.png offset=0": "black.png has black pixels",
    SHADOW + "out=file": "can't write to file: .*; choose another folder",
    SHADOW + "out=file/out": "can't write to file/out: Not a directory",
    "task=shadow image=old/result.png mask=m.png out=old": "image=old/result.png would be overwritten; choose another",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(command: str, desk: Path) -> None:
    before: dict[str, Any] = files(desk)
    out = [] if "out=" in command else ["out=new"]
    outcome = call("evolve.py", *command.split(), *out, cwd=desk)
    assert outcome.status == 2, outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(MISTAKES[command], lines[0]), outcome.err
    assert files(desk) == before and not (desk / "new").exists()
