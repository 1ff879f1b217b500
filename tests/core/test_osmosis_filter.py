"""Shadow removal and seamless cloning, on scenes where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.editing.osmosis import blend, remove_shadow
from dpm_scales.errors import UserError
from support.osmosis_twins import drift_matrix, images, means

H, W = 22, 31


def scene(seed: int = 0, channels: int = 3) -> Tensor:
    """Texture between 0.2 and 1."""
    return 0.2 + 0.8 * images(2, channels, H, W, seed=seed)


def left_half(column: int = 14) -> Tensor:
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[:, :column] = True
    return mask


def rectangle() -> Tensor:
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[5:15, 8:22] = True
    return mask


def flat_across(x: Tensor, mask: Tensor) -> Tensor:
    """The scene, made equal on both sides of the mask's outline: pixels beside it take the inner one's value."""
    x = x.clone()
    for shift, axis in ((1, -1), (-1, -1), (1, -2), (-1, -2)):
        from_inside = mask.roll(shift, axis) & ~mask
        x = torch.where(from_inside, x.roll(shift, axis), x)
    return x


# --- shadows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [left_half, rectangle])
@pytest.mark.parametrize("strength", [0.5, 0.1, 3.0])
def test_a_shadow_with_an_ideal_mask_is_removed_up_to_a_factor(shape: Any, strength: float) -> None:
    mask = shape()
    clean = flat_across(scene(), mask)
    shadowed = torch.where(mask, strength * clean, clean)
    result = remove_shadow(shadowed, mask)
    factor = result / clean
    assert ((factor / means(factor)) - 1).abs().max() < 1e-3
    torch.testing.assert_close(means(result), means(shadowed), atol=1e-6, rtol=0)
    torch.testing.assert_close(remove_shadow(shadowed, mask, match="outside"), clean, atol=1e-3, rtol=0)


def test_a_shadow_on_texture_is_all_but_removed() -> None:
    """What the scene does across the outline itself is taken for shadow: an error of the order of that texture."""
    mask, clean = rectangle(), 0.6 + 0.05 * images(1, 1, H, W)
    shadowed = torch.where(mask, 0.5 * clean, clean)
    result = remove_shadow(shadowed, mask, match="outside")
    assert (result - clean).abs().max() < 0.05 and (shadowed - clean).abs().max() > 0.3


def test_the_edge_of_a_shadow_may_be_marked_instead_of_its_inside() -> None:
    """A penumbra of three columns over a scene that is constant there."""
    clean, ramp = scene(), torch.ones(W, dtype=torch.float64)
    clean[..., 12:17] = clean[..., 12:13]
    ramp[:13], ramp[13:16] = 0.5, torch.tensor([0.6, 0.75, 0.9])
    edge = torch.zeros(H, W, dtype=torch.bool)
    edge[:, 13:16] = True
    # smooth between its neighbours along the edge too: no drift is no change
    clean[..., 12:17] = clean[..., 12:17].mean((-2, -1), keepdim=True)
    result = remove_shadow(clean * ramp, edge, mask_marks="edge")
    factor = result / clean
    assert (factor / means(factor) - 1).abs().max() < 1e-3
    assert (remove_shadow(clean * ramp, edge) / clean).std() > 0.05, "as a region the mask means something else"


@pytest.mark.parametrize("light", [0.3, 4.0])
def test_lit_keeps_the_brightness_of_the_light_side_of_an_edge(light: float) -> None:
    """Two parts and a penumbra between them: the brighter part keeps its values, on whichever side it lies."""
    clean, ramp = scene(), torch.ones(W, dtype=torch.float64)
    clean[..., 12:17] = clean[..., 12:17].mean((-2, -1), keepdim=True)
    ramp[:13], ramp[13:16] = light, light ** torch.tensor([0.8, 0.5, 0.1], dtype=torch.float64)
    edge = torch.zeros(H, W, dtype=torch.bool)
    edge[:, 13:16] = True
    result = remove_shadow(clean * ramp, edge, mask_marks="edge", match="lit")
    torch.testing.assert_close(result, clean * max(light, 1.0), atol=2e-3 * max(light, 1.0), rtol=0)


def test_a_region_with_a_soft_edge() -> None:
    """The same penumbra from a mask of the region and its half width; one that is too narrow leaves some of it."""
    clean, ramp = scene(), torch.ones(W, dtype=torch.float64)
    clean[..., 11:18] = clean[..., 11:18].mean((-2, -1), keepdim=True)
    ramp[:12], ramp[12:16] = 0.5, torch.tensor([0.6, 0.7, 0.8, 0.9])
    shadowed, mask = clean * ramp, left_half(14)
    soft = remove_shadow(shadowed, mask, match="outside", penumbra=2)
    torch.testing.assert_close(soft, clean, atol=2e-3, rtol=0)
    assert (remove_shadow(shadowed, mask, match="outside", penumbra=1) - clean).abs().max() > 0.1
    band = torch.zeros(H, W, dtype=torch.bool)
    band[:, 12:16] = True
    by_edge = remove_shadow(shadowed, band, "edge", "lit")
    torch.testing.assert_close(soft, by_edge, atol=2e-3, rtol=0)
    torch.testing.assert_close(remove_shadow(shadowed, mask, match="pinned", penumbra=2), clean, atol=2e-3, rtol=0)


def test_without_a_mask_nothing_changes() -> None:
    x = scene()
    for mask in (torch.zeros(H, W, dtype=torch.bool), torch.ones(1, 1, H, W, dtype=torch.bool)):
        torch.testing.assert_close(remove_shadow(x, mask), x, atol=1e-9, rtol=0)


def test_masks_may_differ_between_samples_and_channels() -> None:
    x, masks = scene(), torch.stack([left_half(), rectangle()])[:, None]
    together = remove_shadow(x, masks)
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], remove_shadow(x[b : b + 1], masks[b, 0]), atol=1e-5, rtol=0)
    by_channel = remove_shadow(x, torch.stack([left_half(), rectangle(), left_half()])[None])
    torch.testing.assert_close(by_channel[1, 1], together[1, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(by_channel[0, 2], together[0, 2], atol=1e-5, rtol=0)


# --- cloning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["mean", "outside"])
def test_cloning_an_image_into_itself_is_the_identity(match: str) -> None:
    x = scene()
    torch.testing.assert_close(blend(x, x, rectangle(), match), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_the_brightness_of_the_foreground_does_not_matter(factor: float) -> None:
    background, foreground = scene(), scene(seed=1)
    result = blend(background, foreground, rectangle())
    torch.testing.assert_close(blend(background, factor * foreground, rectangle()), result, atol=1e-5, rtol=0)
    torch.testing.assert_close(blend(background, factor * background, rectangle()), background, atol=1e-9, rtol=0)
    torch.testing.assert_close(means(result), means(background), atol=1e-6, rtol=0)


def test_inside_is_the_foreground_and_outside_the_background_up_to_factors_where_both_are_flat_across_the_edge() -> (
    None
):
    """Foreground and background that are constant around the mask's outline fit together by a factor each."""
    mask = rectangle()
    background, foreground = flat_across(scene(), mask), flat_across(scene(seed=1), mask)
    inner = torch.zeros(H, W, dtype=torch.bool)
    inner[7:13, 10:20] = True
    background = torch.where(inner, background, torch.where(mask, 0.5, background))
    near = ~mask & (mask.roll(1, 0) | mask.roll(-1, 0) | mask.roll(1, 1) | mask.roll(-1, 1))
    background, foreground = torch.where(near, 0.5, background), torch.where(inner, foreground, 0.3)
    result = blend(background, foreground, mask, match="outside")
    torch.testing.assert_close(result * ~mask, background * ~mask, atol=1e-3, rtol=0)
    torch.testing.assert_close(result * mask, foreground / 0.3 * 0.5 * mask, atol=1e-3, rtol=0)


def test_the_drift_across_the_edge_is_the_mean_of_both() -> None:
    """Against the null vector of the matrix whose drift is put together edge by edge."""
    f, g = 0.2 + images(5, 6).numpy(), 0.2 + images(5, 6, seed=1).numpy()
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:4, 2:5] = True

    def drift(here: tuple[int, int], there: tuple[int, int]) -> float:
        own = [2 * (image[there] - image[here]) / (image[there] + image[here]) for image in (f, g)]
        inside = int(mask[here]) + int(mask[there])
        return [own[0], (own[0] + own[1]) / 2, own[1]][inside]

    right = np.array([[drift((i, j), (i, j + 1)) for j in range(5)] for i in range(5)])
    down = np.array([[drift((i, j), (i + 1, j)) for j in range(6)] for i in range(4)])
    null = np.linalg.svd(drift_matrix(right, down))[2][-1].reshape(5, 6)
    f_image, g_image = (torch.from_numpy(image)[None, None] for image in (f, g))
    result = blend(f_image, g_image, torch.from_numpy(mask))
    np.testing.assert_allclose(result[0, 0], null / null.mean() * f.mean(), atol=1e-6)


def test_pinned_is_the_solution_between_the_background_s_pixels() -> None:
    """Against a dense solve for the inside, with the drift put together edge by edge as above."""
    f, g = 0.2 + images(7, 9).numpy(), 0.2 + images(7, 9, seed=1).numpy()
    mask = np.zeros((7, 9), dtype=bool)
    mask[2:6, 3:9] = True

    def drift(image: Any, axis: int) -> Any:
        return 2 * np.diff(image, axis=axis) / (np.delete(image, 0, axis) + np.delete(image, -1, axis))

    def mixture(axis: int) -> Any:
        share = (np.delete(mask, 0, axis).astype(float) + np.delete(mask, -1, axis)) / 2
        return share * drift(g, axis) + (1 - share) * drift(f, axis)

    P, inside = drift_matrix(mixture(1), mixture(0)), mask.ravel()
    exact = f.ravel().copy()
    exact[inside] = np.linalg.solve(P[np.ix_(inside, inside)], -P[np.ix_(inside, ~inside)] @ exact[~inside])
    f_image, g_image = (torch.from_numpy(image)[None, None] for image in (f, g))
    result = blend(f_image, g_image, torch.from_numpy(mask), "pinned")
    np.testing.assert_allclose(result[0, 0], exact.reshape(7, 9), atol=1e-6)
    assert torch.equal(result[0, 0][~torch.from_numpy(mask)], f_image[0, 0][~torch.from_numpy(mask)])


def test_mixed_takes_the_stronger_drift_of_both() -> None:
    """A flat foreground adds nothing, a flat background hides nothing; of two textures both are seen."""
    x, y, mask = scene(), scene(seed=1), rectangle()
    flat = torch.full_like(x, 0.4)
    torch.testing.assert_close(blend(x, flat, mask, mixed=True), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(blend(flat, x, mask, mixed=True), blend(flat, x, mask), atol=1e-9, rtol=0)
    stripes, rows = 0.5 + 0.3 * torch.sin(torch.arange(W, dtype=torch.float64)), torch.arange(H, dtype=torch.float64)
    down = (0.5 + 0.3 * torch.sin(rows))[:, None]
    both = blend(stripes.expand(1, 1, H, W), down.expand(1, 1, H, W), mask, mixed=True)[0, 0, 7:13, 10:20]
    torch.testing.assert_close(both, stripes[10:20] * down[7:13] * (both.mean() / 0.25), rtol=0.25, atol=0)
    assert (blend(x, y, mask, mixed=True) - blend(x, y, mask)).abs().max() > 0.05


def test_match_keeps_the_mean_of_all_or_of_what_lies_outside() -> None:
    background, foreground, mask = scene(), scene(seed=1), left_half()
    whole, outside = blend(background, foreground, mask), blend(background, foreground, mask, "outside")
    torch.testing.assert_close(means(whole), means(background), atol=1e-6, rtol=0)
    torch.testing.assert_close(means(outside * ~mask), means(background * ~mask), atol=1e-9, rtol=0)
    ratio = outside / whole
    torch.testing.assert_close(ratio, means(ratio).expand_as(ratio), atol=1e-9, rtol=0)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_number_format_and_offset() -> None:
    mask = rectangle()
    clean = flat_across(scene(), mask)
    black = clean - clean.min()
    shadowed = torch.where(mask, 0.5 * clean, clean) - 0.05
    assert remove_shadow(clean.float(), mask).dtype == torch.float32
    with pytest.raises(UserError, match="positive"):
        remove_shadow(black, mask)
    restored = remove_shadow(shadowed, mask, offset=0.05, match="outside")
    torch.testing.assert_close(restored + 0.05, clean, atol=1e-3, rtol=0)
    torch.testing.assert_close(blend(black, black, mask, offset=0.01), black, atol=1e-9, rtol=0)


IMAGE, MASK = torch.full((1, 3, 6, 7), 0.5), torch.zeros(6, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask": MASK.T}, ["mask", "(7, 6)", "(1, 3, 6, 7)"]),
        ({"mask": MASK[None]}, ["mask", "(1, 6, 7)"]),
        ({"mask": MASK.expand(2, 1, 6, 7)}, ["mask", "(2, 1, 6, 7)"]),
        ({"mask": MASK.float()}, ["mask", "bool", "mask > 0.5"]),
        ({"mask": [[True]]}, ["mask", "bool", "list"]),
        ({"image": IMAGE[0]}, ["(B, C, H, W)", "(3, 6, 7)"]),
        ({"image": (255 * IMAGE).to(torch.uint8)}, ["float", "torch.uint8"]),
        ({"image": 0 * IMAGE}, ["positive", "offset"]),
        ({"image": -IMAGE, "offset": 0.1}, ["positive", "-0.5", "offset=0.1"]),
        ({"image": IMAGE * math.nan}, ["positive", "nan"]),
        ({"offset": -1.0}, ["offset", "-1.0"]),
        ({"match": "outsides"}, ["did you mean 'outside'", "mean"]),
        ({"match": "outside", "mask": ~MASK}, ["outside the mask"]),
        ({"mask_marks": "edge", "match": "outside"}, ["outside", "lit or mean"]),
        ({"mask_marks": "edge", "match": "pinned"}, ["pinned", "lit or mean"]),
        ({"mask_marks": "edge", "penumbra": 2}, ["penumbra", "mask_marks=region"]),
        ({"penumbra": -1}, ["penumbra", "-1"]),
        ({"penumbra": 1.5}, ["penumbra", "1.5"]),
        ({"mask_marks": "edges"}, ["did you mean 'edge'", "region"]),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict[str, Any], words: list[str]) -> None:
    def check(call: Any, **options: Any) -> None:
        with pytest.raises(UserError) as caught:
            call(**options)
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message

    check(remove_shadow, **({"image": IMAGE, "mask": MASK} | arguments))
    if not arguments.keys() & {"mask_marks", "penumbra"}:
        image = arguments.get("image", IMAGE)
        rest = {name: value for name, value in arguments.items() if name != "image"}
        check(blend, **({"background": image, "foreground": IMAGE, "mask": MASK} | rest))
        if "image" in arguments:
            check(blend, **({"background": IMAGE, "foreground": image, "mask": MASK} | rest))


def test_images_of_two_sizes_are_not_blended() -> None:
    with pytest.raises(UserError, match=r"one shape, got \(1, 3, 6, 7\) and \(1, 3, 7, 6\)"):
        blend(IMAGE, IMAGE.mT, MASK)
