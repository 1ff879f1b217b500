"""A U-Net conditioned on a scale and, optionally, on a class label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_scales.errors import is_whole, require
from dpm_scales.networks.base import ImageNetwork, fold, require_counts, unfold
from dpm_scales.networks.blocks import (
    LABEL_STD,
    Downsample,
    ResidualBlock,
    ScaleEmbedding,
    SelfAttention,
    Upsample,
    group_norm,
    zero_init,
)

_MIN_WIDTH = 4  # a group of the norm has at least four channels


class Stage(nn.Module):
    """A residual block and, if `num_heads` is given, self-attention after it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        embedding_dim: width of the embedding.
        dropout: probability in [0, 1) of dropping a value inside the residual block.
        num_heads: number of attention heads, or None for no attention.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float, num_heads: int | None
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, embedding_dim, dropout)
        self.attention = nn.Identity() if num_heads is None else SelfAttention(out_channels, num_heads)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) and an activated embedding (B, embedding_dim) to (B, out_channels, H, W)."""
        out: Tensor = self.attention(self.residual(x, emb))
        return out


class UNet(ImageNetwork):
    """U-Net of residual blocks with adaptive group norm and self-attention, for images of any size.

    The layout is ADM's (Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis"): every level holds
    `blocks_per_level` residual blocks on the way down and one more on the way up, and every intermediate result of
    the way down is concatenated on the way up. Unlike there, the resampling convolutions also change the width. The
    output convolution starts at zero, so a new network returns zeros.
    Sizes that the levels do not divide are padded internally, to the right and bottom, by repeating the border, and the
    result is cropped. All shapes are static: `torch.compile(fullgraph=True)` works, and nothing waits for the device.

    Args:
        in_channels: channels of the input, at least 1. None leaves the network without layers until `complete` is
            called, which `models.Model` does.
        out_channels: channels of the result, at least 1; None as for `in_channels`.
        widths: channels at each level, finest first; at least one level, each at least 4 channels. None for three
            levels of `width`, twice and four times as many channels.
        blocks_per_level: residual blocks per level on the way down, at least 1.
        attention_levels: indices into `widths` of the levels with self-attention after every residual block; the
            middle of the network always has it. None for the coarsest level.
        embedding_dim: width of the scale and label embedding; even, at least 4. None for four times the channels of
            the finest level.
        patch_size: side of the square of pixels that is folded into channels before the first convolution and
            unfolded after the last. 2 makes the network about four times cheaper.
        num_heads: number of attention heads. Give this or `head_dim`; with neither there is one head.
        head_dim: channels per attention head.
        dropout: probability in [0, 1) of dropping a value inside each residual block.
        num_classes: number of class labels. One more index, `num_classes`, means "no label". None builds a network
            without labels.
        extra_decoder_block: ADM's extra block per level on the way up, to which the results of the first and the
            resampling convolutions are concatenated. Without it only those of residual blocks are, and the network is
            about a third cheaper.
        width: channels at the finest level, at least 4; determines `widths` where that is None.

    Raises:
        UserError: if an argument is outside the ranges above.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        widths: Sequence[int] | None = None,
        blocks_per_level: int = 1,
        attention_levels: Sequence[int] | None = None,
        embedding_dim: int | None = None,
        patch_size: int = 1,
        num_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        extra_decoder_block: bool = True,
        width: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, num_classes)
        if widths is None:
            width = 32 if width is None else width
            require(is_whole(width, _MIN_WIDTH), f"width is {width!r}; give a whole number of at least {_MIN_WIDTH}")
            widths = (width, 2 * width, 4 * width)
        else:
            require(width is None, f"widths is {widths!r} and width is {width!r}; give only one of them")
        heads = {"num_heads": num_heads, "head_dim": head_dim}
        given = {name: value for name, value in heads.items() if value is not None}
        require_counts(blocks_per_level=blocks_per_level, patch_size=patch_size, **given)
        require(
            isinstance(widths, Sequence) and len(widths) >= 1 and all(is_whole(w, _MIN_WIDTH) for w in widths),
            f"widths is {widths!r}; give a list of one or more whole numbers, each at least {_MIN_WIDTH}",
        )
        require(
            attention_levels is None
            or isinstance(attention_levels, Sequence)
            and all(is_whole(level, 0) and level < len(widths) for level in attention_levels),
            f"attention_levels is {attention_levels!r}; give a list of indices into widths, 0 to {len(widths) - 1}",
        )
        require(
            num_heads is None or head_dim is None,
            f"num_heads is {num_heads} and head_dim is {head_dim}; give only one of them",
        )
        require(0 <= dropout < 1, f"dropout is {dropout}; allowed is 0 <= dropout < 1")

        self.patch_size = patch_size
        self.multiple = patch_size * 2 ** (len(widths) - 1)
        self.extra_decoder_block = extra_decoder_block
        embedding_dim = 4 * widths[0] if embedding_dim is None else embedding_dim
        attended = (len(widths) - 1,) if attention_levels is None else tuple(attention_levels)
        self._layers = (tuple(widths), blocks_per_level, attended, embedding_dim)
        self._heads = (num_heads, head_dim, dropout)
        self._build_if_complete()

    def _build(self, in_channels: int, out_channels: int) -> None:
        """Build all layers."""
        widths, blocks_per_level, attention_levels, embedding_dim = self._layers
        num_heads, head_dim, dropout = self._heads
        num_classes, extra_decoder_block = self.num_classes, self.extra_decoder_block
        self.embed_scale = ScaleEmbedding(embedding_dim)
        self.embed_label: nn.Embedding | None = None
        if num_classes is not None:
            self.embed_label = nn.Embedding(num_classes + 1, embedding_dim)
            nn.init.normal_(self.embed_label.weight, std=LABEL_STD)

        def heads(width: int) -> int:
            if head_dim is None:
                return num_heads or 1
            require(width % head_dim == 0, f"head_dim is {head_dim}; it must divide the attended width {width}")
            return width // head_dim

        def stage(inputs: int, level: int) -> Stage:
            attended = heads(widths[level]) if level in attention_levels else None
            return Stage(inputs, widths[level], embedding_dim, dropout, attended)

        area = self.patch_size**2
        self.conv_in = nn.Conv2d(in_channels * area, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        current = widths[0]
        skips = [current] if extra_decoder_block else []
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(Downsample(current, width))
                current = width
                if extra_decoder_block:
                    skips.append(current)
            for _ in range(blocks_per_level):
                self.encoder.append(stage(current, level))
                current = width
                skips.append(current)

        self.middle1 = Stage(current, current, embedding_dim, dropout, heads(current))
        self.middle2 = Stage(current, current, embedding_dim, dropout, None)

        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.decoder.append(Upsample(current, width))
                current = width
            for _ in range(blocks_per_level + int(extra_decoder_block)):
                self.decoder.append(stage(current + skips.pop(), level))
                current = width

        self.norm_out = group_norm(widths[0])
        self.conv_out = zero_init(nn.Conv2d(widths[0], out_channels * area, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: (B, in_channels, H, W) floating point, ideally of unit variance.
            t: (B,) floating point scale in [0, 1].
            labels: (B,) int64 in [0, num_classes], where `num_classes` means "no label"; None means that for all.
                The values are not checked here, since that would wait for the device.

        Returns:
            (B, out_channels, H, W), in the memory format of the convolutions' weights.

        Raises:
            UserError: if a shape or type is wrong, or labels are given to a network without classes.
        """
        self._check(x, t)
        emb = F.silu(self._embed(t, labels))
        h = self.conv_in(fold(x, self.patch_size, self.multiple))
        skips = [h] if self.extra_decoder_block else []
        for module in self.encoder:
            resamples = isinstance(module, Downsample)
            h = module(h) if resamples else module(h, emb)
            if self.extra_decoder_block or not resamples:
                skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for module in self.decoder:
            h = module(h) if isinstance(module, Upsample) else module(torch.cat([h, skips.pop()], dim=1), emb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return unfold(h, self.patch_size, (x.shape[2], x.shape[3]))

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the ``(B, embedding_dim)`` embedding of scale and label."""
        emb: Tensor = self.embed_scale(t)
        numbers = self._labels(labels, t)
        return emb if self.embed_label is None else emb + self.embed_label(numbers)
