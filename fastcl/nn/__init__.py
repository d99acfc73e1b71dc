"""The losses as modules, with the names and arguments that lightly, pytorch-metric-learning, open_clip and
sentence-transformers use.

May import :mod:`fastcl.losses`. A learnable temperature is stored as the logarithm of its inverse, ``logit_scale``.
"""

from fastcl.nn.images_and_texts import (
    ClipLoss,
    DistillClipLoss,
    SigLipLoss,
)
from fastcl.nn.pairs import (
    BinaryNCELoss,
    ContrastiveLoss,
    LiftedStructureLoss,
    SpectralContrastiveLoss,
    TripletMarginLoss,
)
from fastcl.nn.softmax import (
    AlphaCLLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    HardNegativeLoss,
    InfoNCELoss,
    MACLLoss,
    MultipleNegativesRankingLoss,
    NTXentLoss,
    SupConLoss,
)
from fastcl.nn.without_pairs import (
    BarlowTwinsLoss,
    CosineSimilarityLoss,
    NegativeCosineSimilarity,
    SoftmaxLoss,
    SwaVLoss,
)

__all__ = [
    "AlphaCLLoss",
    "BarlowTwinsLoss",
    "BinaryNCELoss",
    "ClipLoss",
    "ContrastiveLoss",
    "CosineSimilarityLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DistillClipLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MACLLoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SigLipLoss",
    "SoftmaxLoss",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "SwaVLoss",
    "TripletMarginLoss",
]
