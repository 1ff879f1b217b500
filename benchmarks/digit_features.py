"""Provide features of digits for evaluate.py and `dpm-scales ema`: those of the classifier that judges MNIST here.

python -m benchmarks.digit_features mnist.npz
python train.py data=array data.path=mnist.npz ... ema.power_lengths=[0.05,0.10] run_dir=runs/mine
dpm-scales ema runs/mine 'features={_target_: benchmarks.digit_features.DigitFeatures}' reference=mnist.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.judged_images import mnist_digits
from benchmarks.judges import MnistJudge
from dpm_scales.metrics import FeatureNetwork
from dpm_scales.storage import atomic_write


class DigitFeatures(FeatureNetwork):
    """The 64 activations of the last hidden layer of `MnistJudge`'s classifier, which is trained first.

    Args:
        seed: seed of the classifier.
    """

    name, dim, input_side = "digits", 64, 32

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        judge = MnistJudge(seed)
        layers = zip(judge.classifier.coefs_[:-1], judge.classifier.intercepts_[:-1], strict=True)
        for number, (weight, bias) in enumerate(layers):
            self.register_buffer(f"weight_{number}", torch.from_numpy(weight).float())
            self.register_buffer(f"bias_{number}", torch.from_numpy(bias).float())

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the features ``(B, 64)`` of images ``(B, 3, 32, 32)`` in 0 to 255."""
        hidden = pixels[:, 0].flatten(1) / 255
        for number in range(2):
            weight, bias = self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}")
            hidden = torch.relu(hidden @ weight.to(hidden) + bias.to(hidden))
        return hidden


def main() -> None:
    """Write the images and labels to the .npz file that the first argument names."""
    images, labels = mnist_digits()
    with atomic_write(Path(sys.argv[1])) as file:
        np.savez_compressed(file, images=images, labels=labels)


if __name__ == "__main__":
    main()
