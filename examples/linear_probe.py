"""How much a linear classifier finds in frozen features of scikit-learn's digits; shared by the examples."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW, DRAWS, HELD_OUT, SEED = 3, 20, 600, 0
"""labelled images of each digit, draws of them, images that no training sees, and the seed of all draws"""


@dataclass(frozen=True)
class Accuracy:
    """Of logistic regression on held-out images."""

    few: float
    """from FEW labelled images of each digit, mean of DRAWS draws"""
    all: float
    """from the labels of all other images"""

    def __str__(self) -> str:
        return f"{100 * self.few:5.1f} %  {100 * self.all:5.1f} %"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation of several runs; of one run, its value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def spread_percent(accuracies: Sequence[Accuracy]) -> str:
    """Both accuracies in percent, in columns."""
    few, everything = ([100 * getattr(x, labelled) for x in accuracies] for labelled in ("few", "all"))
    return f"{spread(few):>10} % {spread(everything):>10} %"


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images to train on, and those that are held out: the same for everyone."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def linear_probe(features: Tensor, labels: Tensor) -> Accuracy:
    """Features [images, dim], standardised here, and their digits."""
    kept, held_out = split(labels)
    features = features.flatten(1)
    features = (features - features[kept].mean(dim=0)) / features[kept].std(dim=0).clamp_min(1e-3)
    generator = torch.Generator().manual_seed(SEED)
    of_digit = [kept[labels[kept] == digit] for digit in range(10)]
    few = [
        torch.cat([images[torch.randperm(len(images), generator=generator)[:FEW]] for images in of_digit])
        for _ in range(DRAWS)
    ]
    accuracies = [_classify(features, labels, images, held_out) for images in few]
    return Accuracy(sum(accuracies) / DRAWS, _classify(features, labels, kept, held_out))


def _classify(features: Tensor, labels: Tensor, labelled: Tensor, held_out: Tensor) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=0.1, max_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features[labelled].numpy(), labels[labelled].numpy())
    return classifier.score(features[held_out].numpy(), labels[held_out].numpy())
