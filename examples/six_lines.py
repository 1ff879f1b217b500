"""Learn handwritten digits of 8x8 pixels and draw new ones, in about a minute on two cores.

It writes digits.png, and a model in digits/ for `python sample.py model=digits out=samples/digits`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

import dpm_scales as ds


def main(steps: int = 1000) -> None:
    """Train for a number of steps, and write the model and a picture of samples."""
    images = torch.from_numpy(load_digits().images[:, None] * 15.9).to(torch.uint8)  # (1797, 1, 8, 8)

    process = ds.Blurring(blur=ds.SinSquaredBlur(blur_sigma_max=4.0))
    model = ds.Model(ds.UNet(width=16), process, image_size=8, channels=1)
    ds.train(model, images, steps=steps)
    model.save("digits")
    samples = ds.load("digits").sample(64, seed=0)
    ds.save_png("digits.png", ds.make_grid(samples))


if __name__ == "__main__":
    main()
