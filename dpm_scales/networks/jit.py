"""JiT, a transformer of pixel patches (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise").

An image is cut into large patches, each a token: a linear bottleneck embeds them, blocks of attention and SwiGLU
(Shazeer 2020) transform them, and a linear layer predicts the pixels. Positions enter only through rotations of the
normalised queries and keys (RoPE, Su et al. 2021, along both axes). Scale and label modulate every block (adaLN-Zero,
Peebles & Xie 2023). Written from the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_scales.errors import require, require_number
from dpm_scales.networks.base import ImageNetwork, fold, require_counts, unfold
from dpm_scales.networks.blocks import LABEL_STD, ScaleEmbedding, zero_init

_ROPE_PERIOD = 10_000.0
_EPS = 1e-6
_TOKEN_STD = 0.02


def rope_angles(rows: int, columns: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the angles of axial rotary positions, ``(rows * columns, head_dim / 2)``, row by row.

    The first half of the pairs rotates with the row, the second with the column; pair i of n in a half rotates by
    10000^(-i / n) per step.

    Args:
        head_dim: channels of an attention head, a multiple of 4.
    """
    pairs = head_dim // 4
    speed = _ROPE_PERIOD ** (-torch.arange(pairs, device=device, dtype=dtype) / pairs)
    row = (torch.arange(rows, device=device, dtype=dtype)[:, None] * speed)[:, None].expand(rows, columns, pairs)
    column = (torch.arange(columns, device=device, dtype=dtype)[:, None] * speed)[None].expand(rows, columns, pairs)
    return torch.cat([row, column], -1).flatten(0, 1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return x ``(..., N, D)``, channels (i, i + D / 2) rotated by angles of given cosine and sine ``(N, D / 2)``."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the channels, times a weight, in a single kernel also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryAttention(nn.Module):
    """Self-attention over tokens with normalised queries and keys, rotated by their positions.

    Args:
        width: channels of a token.
        num_heads: number of heads; `width / num_heads` must be a multiple of 4.
        dropout: probability in [0, 1) of dropping a value of the result.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(width // num_heads)
        self.norm_k = RMSNorm(width // num_heads)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` to tokens; the angles' cosines and sines are ``(N, width / num_heads / 2)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = rotate(self.norm_q(q), cosine, sine).to(v.dtype)
        k = rotate(self.norm_k(k), cosine, sine).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.dropout(self.project(attended))
        return out


class SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)`` (Shazeer 2020), with `hidden` channels in between."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden)
        self.project = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to ``(..., width)``."""
        gate, value = self.expand(x).chunk(2, -1)
        out: Tensor = self.project(self.dropout(F.silu(gate) * value))
        return out


class JiTBlock(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the embedding; starts as the identity.

    Args:
        width: channels of a token.
        num_heads: number of attention heads.
        hidden: channels inside of SwiGLU.
        dropout: probability in [0, 1) of dropping a value of attention's result and inside of SwiGLU.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = RotaryAttention(width, num_heads, dropout)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden, dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, emb: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` and an activated embedding ``(B, width)`` to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), scale1 + 1), cosine, sine)
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), scale2 + 1))


class JiT(ImageNetwork):
    """Plain transformer of pixel patches, designed to predict the clean image, for images of any size.

    JiT-B/16 of the paper is JiT(width=768, depth=12, num_heads=12, patch_size=16, bottleneck=128, class_tokens=32).
    Positions are relative: the paper's additional table of absolute positions is omitted, so that a network takes
    images of any size; sides that patches do not divide are padded internally, to the right and bottom, by repeating
    the border, and the result is cropped. The output layer starts at zero, so a new network returns zeros. All shapes
    are static, and nothing waits for the device. FSDP wraps it block by block.

    Args:
        in_channels, out_channels: channels of input and result, at least 1; None until `complete`.
        width: channels of a token, even.
        depth: number of blocks.
        num_heads: number of attention heads; `width / num_heads` must be a multiple of 4.
        patch_size: side of a patch in pixels.
        bottleneck: channels between the two linear layers that embed a patch.
        mlp_ratio: size of the feed-forward layers, > 0: SwiGLU has 2/3 `mlp_ratio` `width` channels inside.
        class_tokens: number of label tokens, which join those of the image from a third of the depth on; 0 for none.
            In any case the label also modulates the blocks.
        dropout: probability in [0, 1) of dropping a value, in the middle half of the blocks.
        num_classes: number of class labels; one more index means "no label". None for a network without labels.

    Raises: UserError if an argument is outside the ranges above.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 16,
        bottleneck: int = 128,
        mlp_ratio: float = 4.0,
        class_tokens: int = 0,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, num_classes)
        counts = {"width": width, "depth": depth, "num_heads": num_heads}
        require_counts(**counts, patch_size=patch_size, bottleneck=bottleneck)
        require(
            width % num_heads == 0 and width // num_heads % 4 == 0,
            f"width is {width} and num_heads is {num_heads}; width / num_heads must be a multiple of 4: a quarter of a "
            "head's channels each are cosines and sines of rows and columns",
        )
        require_number("mlp_ratio", mlp_ratio, 0, 1000)
        hidden = int(2 * mlp_ratio * width / 3)
        require(hidden >= 1, f"mlp_ratio is {mlp_ratio}, which leaves no channel; choose more")
        require_number("class_tokens", class_tokens, 0, whole=True)
        require(0 <= dropout < 1, f"dropout is {dropout}; allowed is 0 <= dropout < 1")
        self.patch_size, self.num_heads, self.class_tokens = patch_size, num_heads, class_tokens
        self._layers = (width, depth, bottleneck, hidden, dropout)
        self._build_if_complete()

    def _build(self, in_channels: int, out_channels: int) -> None:
        """Build all layers."""
        width, depth, bottleneck, hidden, dropout = self._layers
        area, middle = self.patch_size**2, range(depth // 4, depth - depth // 4)
        self.reduce = nn.Linear(in_channels * area, bottleneck, bias=False)
        self.embed = nn.Linear(bottleneck, width)
        self.embed_scale = ScaleEmbedding(width)
        self.embed_label: nn.Embedding | None = None
        self.token_places: nn.Parameter | None = None
        self.tokens_from = depth // 3
        self.blocks = nn.ModuleList(
            JiTBlock(width, self.num_heads, hidden, dropout if i in middle else 0.0) for i in range(depth)
        )
        self.norm_out = RMSNorm(width)
        self.modulation_out = zero_init(nn.Linear(width, 2 * width))
        for part in self.modules():
            if isinstance(part, nn.Linear) and part is not self.modulation_out:
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for block in self.blocks:
            assert isinstance(block, JiTBlock)
            zero_init(block.modulation)
        self.project_out = zero_init(nn.Linear(width, out_channels * area))
        if self.num_classes is not None:
            self.embed_label = nn.Embedding(self.num_classes + 1, width)
            nn.init.normal_(self.embed_label.weight, std=LABEL_STD)
            if self.class_tokens:
                self.token_places = nn.Parameter(torch.empty(self.class_tokens, width))
                nn.init.normal_(self.token_places, std=_TOKEN_STD)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: (B, in_channels, H, W) floating point, ideally of unit variance.
            t: (B,) floating point scale in [0, 1].
            labels: (B,) int64 in [0, num_classes], where `num_classes` means "no label"; None means that for all.

        Returns: (B, out_channels, H, W).
        Raises: UserError if a shape or type is wrong, or labels are given to a network without classes.
        """
        self._check(x, t)
        emb = self.embed_scale(t)
        numbers = self._labels(labels, t)
        label = None if self.embed_label is None else self.embed_label(numbers)
        emb = F.silu(emb if label is None else emb + label)

        patches = fold(x, self.patch_size, self.patch_size)
        rows, columns = patches.shape[2:]
        # never below float32, where neighbouring positions would coincide
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = rope_angles(rows, columns, self._layers[0] // self.num_heads, x.device, dtype)
        h = self.embed(self.reduce(patches.flatten(2).transpose(1, 2)))
        count = 0
        for i, block in enumerate(self.blocks):
            if self.token_places is not None and label is not None and i == self.tokens_from:
                count = self.class_tokens
                h = torch.cat([label[:, None] + self.token_places, h], 1)
                angles = F.pad(angles, (0, 0, count, 0))  # label tokens have no position
            h = block(h, emb, angles.cos(), angles.sin())
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, -1)
        h = self.project_out(torch.addcmul(shift, self.norm_out(h[:, count:]), scale + 1))
        return unfold(h.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size, (x.shape[2], x.shape[3]))
