"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, config G), written from the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_scales.errors import is_whole, require, require_number
from dpm_scales.networks.base import ImageNetwork, fold, require_counts, unfold
from dpm_scales.networks.magnitude import Gain, MPLayer, ScaleWaves, mp_cat, mp_silu, mp_sum, pixel_norm

# the paper's shares of the second operand: label, residual, attention, skip connection
_LABEL, _RESIDUAL, _ATTENTION, _SKIP = 0.5, 0.3, 0.3, 0.5


class CosineAttention(nn.Module):
    """Self-attention over pixels with normalised queries, keys and values, summed with its input.

    Args:
        channels: channels of the input and the result.
        head_dim: channels of a head; divides `channels`.
        rate_scale: factor on the learning rate.
    """

    def __init__(self, channels: int, head_dim: int, rate_scale: float) -> None:
        super().__init__()
        self.num_heads = channels // head_dim
        self.qkv = MPLayer(channels, 3 * channels, (1, 1), rate_scale)
        self.project = MPLayer(channels, channels, (1, 1), rate_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to the same shape."""
        height, width = x.shape[2:]
        qkv = self.qkv(x).flatten(2).transpose(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = pixel_norm(qkv, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.project(attended.transpose(1, 2).unflatten(2, (height, width)))
        return mp_sum(x, y, _ATTENTION)


class MPBlock(nn.Module):
    """A residual block of the encoder or decoder (Fig. 21).

    Args:
        in_channels, out_channels: channels of the input and the result.
        embedding_dim: width of the embedding.
        decoder: whether the block belongs to the decoder, which does not normalise its input.
        resample: "down" or "up" halves or doubles the sides of the input; None keeps them.
        head_dim: channels of an attention head; None for no attention.
        dropout: probability in [0, 1) of dropping a value before the second convolution.
        rate_scale: factor on the learning rate.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        decoder: bool,
        resample: str | None,
        head_dim: int | None,
        dropout: float,
        rate_scale: float,
    ) -> None:
        super().__init__()
        self.decoder, self.resample = decoder, resample
        inner = in_channels if decoder else out_channels
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else MPLayer(in_channels, out_channels, (1, 1), rate_scale)
        self.conv1 = MPLayer(inner, out_channels, (3, 3), rate_scale)
        self.modulation = MPLayer(embedding_dim, out_channels, (), rate_scale)
        self.gain = Gain(rate_scale)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPLayer(out_channels, out_channels, (3, 3), rate_scale)
        self.attention = nn.Identity() if head_dim is None else CosineAttention(out_channels, head_dim, rate_scale)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` and an embedding ``(B, embedding_dim)`` to ``(B, out_channels, H', W')``."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decoder:
            x = pixel_norm(self.shortcut(x))
        y = self.conv1(mp_silu(x))
        y = mp_silu(y * (self.modulation(emb, self.gain()) + 1)[:, :, None, None])
        y = self.conv2(self.dropout(y))
        x = self.shortcut(x) if self.decoder else x
        out: Tensor = self.attention(mp_sum(x, y, _RESIDUAL))
        return out


class EDM2(ImageNetwork):
    """Magnitude-preserving U-Net without biases and group norms, for images of any size.

    EDM2-S of the paper is EDM2(widths=[192, 384, 576, 768], blocks_per_level=3, attention_levels=[2, 3]). Sizes that
    the levels do not divide are padded internally, as in `UNet`. The output gain starts at zero, so a new network
    returns zeros. All shapes are static, and nothing waits for the device. FSDP wraps it block by block.

    `after_step` must be called after each optimiser step, as `train.py` and `dpm_scales.train` do; see
    `networks.magnitude`. Weight decay then has almost no effect on the layers.

    Args:
        in_channels, out_channels: channels of input and result, at least 1; None until `complete`.
        widths: channels at each level, finest first.
        blocks_per_level: residual blocks per level on the way down, and one more on the way up.
        attention_levels: indices into `widths` of the levels with attention; None for the coarsest level. The middle
            always has it.
        head_dim: channels of an attention head; divides the widths with attention.
        patch_size: side of the square of pixels that is folded into channels first and unfolded last; 1 in the paper.
        dropout: probability in [0, 1) of dropping a value inside each residual block.
        rate_scale: > 0; parameters are stored divided by it, so that Adam's learning rate acts like one `rate_scale`
            times as large in the paper: with 10, the default rate of 1e-3 acts like the paper's 1e-2.
        num_classes: number of class labels; one more index means "no label". None for a network without labels.

    Raises: UserError if an argument is outside the ranges above.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 128),
        blocks_per_level: int = 1,
        attention_levels: Sequence[int] | None = None,
        head_dim: int = 64,
        patch_size: int = 1,
        dropout: float = 0.0,
        rate_scale: float = 10.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, num_classes)
        require_counts(blocks_per_level=blocks_per_level, head_dim=head_dim, patch_size=patch_size)
        ok = isinstance(widths, Sequence) and len(widths) >= 1 and all(is_whole(width, 1) for width in widths)
        require(ok, f"widths is {widths!r}; give a list of one or more whole numbers from 1")
        levels = (len(widths) - 1,) if attention_levels is None else attention_levels
        require(
            isinstance(levels, Sequence) and all(is_whole(level, 0) and level < len(widths) for level in levels),
            f"attention_levels is {levels!r}; give a list of indices into widths, 0 to {len(widths) - 1}",
        )
        for width in {widths[-1], *(widths[level] for level in levels)}:
            require(width % head_dim == 0, f"head_dim is {head_dim}; it must divide the attended width {width}")
        require(0 <= dropout < 1, f"dropout is {dropout}; allowed is 0 <= dropout < 1")
        require_number("rate_scale", rate_scale, 0, 1e6)
        require(rate_scale > 0, f"rate_scale must be > 0, got {rate_scale}")
        self.patch_size = patch_size
        self.multiple = patch_size * 2 ** (len(widths) - 1)
        self._layers = (tuple(widths), blocks_per_level, tuple(levels), head_dim, dropout, float(rate_scale))
        self._build_if_complete()

    def _build(self, in_channels: int, out_channels: int) -> None:
        """Build all layers."""
        widths, blocks_per_level, levels, head_dim, dropout, rate_scale = self._layers
        area, embedding_dim = self.patch_size**2, max(widths)

        def block(
            inputs: int, level: int, decoder: bool, resample: str | None = None, attends: bool = False
        ) -> MPBlock:
            heads = head_dim if attends else None
            outputs = inputs if resample else widths[level]
            return MPBlock(inputs, outputs, embedding_dim, decoder, resample, heads, dropout, rate_scale)

        self.waves = ScaleWaves(widths[0])
        self.embed_scale = MPLayer(widths[0], embedding_dim, (), rate_scale)
        self.embed_label: MPLayer | None = None
        if self.num_classes is not None:
            self.embed_label = MPLayer(self.num_classes + 1, embedding_dim, (), rate_scale)

        # an additional channel of ones in place of biases
        self.conv_in = MPLayer(in_channels * area + 1, widths[0], (3, 3), rate_scale)
        self.encoder, current = nn.ModuleList(), widths[0]
        skips = [current]
        for level in range(len(widths)):
            if level > 0:
                self.encoder.append(block(current, level, False, "down"))
                skips.append(current)
            for _ in range(blocks_per_level):
                self.encoder.append(block(current, level, False, attends=level in levels))
                current = widths[level]
                skips.append(current)

        last = len(widths) - 1
        self.middle = nn.ModuleList([block(current, last, True, attends=True), block(current, last, True)])
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(widths))):
            if level < last:
                self.decoder.append(block(current, level, True, "up"))
            for _ in range(blocks_per_level + 1):
                self.decoder.append(block(current + skips.pop(), level, True, attends=level in levels))
                current = widths[level]
        self.conv_out = MPLayer(current, out_channels * area, (3, 3), rate_scale)
        self.gain_out = Gain(rate_scale)

    def after_step(self) -> None:
        """Scale the rows of all weights back to their fixed length (forced weight normalisation)."""
        for part in self.modules():
            if isinstance(part, MPLayer):
                part.after_step()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply the network; arguments, result and errors are those of `UNet.forward`."""
        self._check(x, t)
        emb = self._embed(t, labels)
        folded = fold(x, self.patch_size, self.multiple)
        h = self.conv_in(torch.cat([folded, torch.ones_like(folded[:, :1])], 1))
        skips = [h]
        for module in self.encoder:
            h = module(h, emb)
            skips.append(h)
        for module in self.middle:
            h = module(h, emb)
        for module in self.decoder:
            h = module(h if module.resample else mp_cat(h, skips.pop(), _SKIP), emb)
        h = self.conv_out(h, self.gain_out())
        return unfold(h, self.patch_size, (x.shape[2], x.shape[3]))

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the ``(B, embedding_dim)`` embedding of scale and label."""
        emb: Tensor = self.embed_scale(self.waves(t).to(self.embed_scale.weight.dtype))
        numbers = self._labels(labels, t)
        if self.embed_label is not None and numbers is not None and self.num_classes is not None:
            count = self.num_classes + 1
            one_hot = (numbers[:, None] == torch.arange(count, device=t.device)).to(emb.dtype)
            emb = mp_sum(emb, self.embed_label(one_hot * count**0.5), _LABEL)
        return mp_silu(emb)
