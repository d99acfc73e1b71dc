"""The losses without pairs as modules. May import :mod:`fastcl.losses`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_scalar
from fastcl.losses.without_pairs import (
    barlow_twins_loss,
    cosine_similarity_loss,
    negative_cosine_similarity,
    softmax_classification_loss,
    swav_loss,
)


class NegativeCosineSimilarity(nn.Module):
    """:func:`fastcl.negative_cosine_similarity` as a module, for BYOL and SimSiam: ``criterion(p1, z2.detach())``."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        return negative_cosine_similarity(p, z, reduction=self.reduction)


class SwaVLoss(nn.Module):
    """:func:`fastcl.swav_loss` as a module, with lightly's arguments; ``group`` stands for its
    ``sinkhorn_gather_distributed``.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature, positive=True)
        self.options = {
            "tau": temperature,
            "sinkhorn_iterations": sinkhorn_iterations,
            "sinkhorn_epsilon": sinkhorn_epsilon,
            "group": group,
        }

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor] = (),
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return swav_loss(high_resolution_outputs, low_resolution_outputs, queue_outputs, **self.options)


class BarlowTwinsLoss(nn.Module):
    """:func:`fastcl.barlow_twins_loss` as a module: ``BarlowTwinsLoss()(z_a, z_b)``."""

    def __init__(self, lambda_param: float = 5e-3, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.lambda_param, self.group = lambda_param, group

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins_loss(z_a, z_b, lambda_param=self.lambda_param, group=self.group)


class SoftmaxLoss(nn.Module):
    """:func:`fastcl.softmax_classification_loss` with its classifier, as in sentence-transformers.

    The embeddings come in place of a model and its texts: ``criterion(u, v, labels)``. ``classifier`` is the linear
    layer that is trained with the encoder.
    """

    def __init__(
        self,
        embedding_dimension: int,
        num_labels: int,
        concatenation_sent_rep: bool = True,
        concatenation_sent_difference: bool = True,
        concatenation_sent_multiplication: bool = False,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        vectors = 2 * concatenation_sent_rep + concatenation_sent_difference + concatenation_sent_multiplication
        self.classifier = nn.Linear(vectors * embedding_dimension, num_labels)
        self.options = {
            "concatenation_sent_rep": concatenation_sent_rep,
            "concatenation_sent_difference": concatenation_sent_difference,
            "concatenation_sent_multiplication": concatenation_sent_multiplication,
            "reduction": reduction,
        }

    def forward(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        return softmax_classification_loss(u, v, labels, self.classifier.weight, self.classifier.bias, **self.options)


class CosineSimilarityLoss(nn.Module):
    """:func:`fastcl.cosine_similarity_loss` as a module, given embeddings: ``criterion(u, v, scores)``."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, u: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        return cosine_similarity_loss(u, v, scores, reduction=self.reduction)
