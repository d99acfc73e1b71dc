"""Negatives and targets from outside the batch: a queue, a momentum encoder, a memory bank of the data set.

All of it is state that no gradient reaches; the losses that use it are :func:`fastcl.info_nce` and
:func:`fastcl.negative_cosine_similarity`.
"""

from fastcl.memory.bank import MemoryBank
from fastcl.memory.momentum import MomentumEncoder, cosine_momentum
from fastcl.memory.queue import Queue

__all__ = ["MemoryBank", "MomentumEncoder", "Queue", "cosine_momentum"]
