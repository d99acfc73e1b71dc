"""fastcl: contrastive losses whose N x N similarity matrix never exists.

>>> import torch, fastcl
>>> z1, z2 = torch.randn(2, 8, 16, requires_grad=True)
>>> fastcl.nt_xent(z1, z2, tau=0.5).shape
torch.Size([])
"""

from fastcl import diagnostics, memory, nn, similarity
from fastcl.engine import list_backends
from fastcl.gradcache import GradCache, cached
from fastcl.losses.alpha_cl import alpha_cl_loss
from fastcl.losses.binary_nce import binary_nce_loss
from fastcl.losses.clip import clip_loss
from fastcl.losses.common import LossStats
from fastcl.losses.contrastive import contrastive_loss
from fastcl.losses.dcl import dcl_loss
from fastcl.losses.debiased import debiased_loss, hard_negative_loss
from fastcl.losses.distillation import clip_distillation_loss
from fastcl.losses.info_nce import info_nce
from fastcl.losses.lifted_structure import lifted_structure_loss
from fastcl.losses.macl import macl_loss
from fastcl.losses.multiple_negatives import multiple_negatives_ranking_loss
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.siglip import siglip_loss
from fastcl.losses.spectral import spectral_contrastive_loss
from fastcl.losses.sup_con import sup_con_loss
from fastcl.losses.triplet import triplet_loss
from fastcl.losses.without_pairs import (
    barlow_twins_loss,
    cosine_similarity_loss,
    negative_cosine_similarity,
    sinkhorn,
    softmax_classification_loss,
    swav_loss,
)
from fastcl.pairwise import pairwise
from fastcl.terms import Axis, Mask, Reduce, Tags, Term
from fastcl.top_k import TopK, top_k

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "GradCache",
    "LossStats",
    "Mask",
    "Reduce",
    "Tags",
    "Term",
    "TopK",
    "alpha_cl_loss",
    "barlow_twins_loss",
    "binary_nce_loss",
    "cached",
    "clip_distillation_loss",
    "clip_loss",
    "contrastive_loss",
    "cosine_similarity_loss",
    "dcl_loss",
    "debiased_loss",
    "diagnostics",
    "hard_negative_loss",
    "info_nce",
    "lifted_structure_loss",
    "list_backends",
    "macl_loss",
    "memory",
    "multiple_negatives_ranking_loss",
    "negative_cosine_similarity",
    "nn",
    "nt_xent",
    "pairwise",
    "siglip_loss",
    "similarity",
    "sinkhorn",
    "softmax_classification_loss",
    "spectral_contrastive_loss",
    "sup_con_loss",
    "swav_loss",
    "top_k",
    "triplet_loss",
]
