"""Join images in rows and columns, each column below its title."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpm_scales.images import PADDING_LEVEL, caption, make_grid

TITLE_SIZE, ROW_PADDING = 14, 4
"""Size of the letters and of the gaps between images, in pixels."""


def titled_columns(names: Sequence[str], columns: Sequence[Tensor]) -> Tensor:
    """Return columns of uint8 images ``(N, C, H, W)``, each below its title, as one image ``(C, H', W')``.

    Images are enlarged only by whole factors, if a title needs the width; they end `ROW_PADDING` above the bottom.

    Args:
        names: the titles.
        columns: equally many images of one size for each title.
    """
    titles = [caption(name, TITLE_SIZE) for name in names]
    images = torch.stack(list(columns), 1)
    own = images.shape[-1]
    factor = max(1, math.ceil(max(title.shape[-1] for title in titles) / own))
    table = make_grid(images.flatten(0, 1), len(columns), ROW_PADDING, factor)
    above = table.new_full((len(table), max(len(title) for title in titles), table.shape[-1]), PADDING_LEVEL)
    for index, title in enumerate(titles):
        height, width = title.shape
        left = index * (own * factor + ROW_PADDING) + ROW_PADDING + (own * factor - width) // 2
        above[:, :height, left : left + width] = title
    return torch.cat([above, table], 1)


def titled_row(pictures: Mapping[str, Tensor]) -> Tensor:
    """Return uint8 images ``(C, H, W)`` of one size side by side, each below its title, see `titled_columns`."""
    return titled_columns(list(pictures), [picture[None] for picture in pictures.values()])
