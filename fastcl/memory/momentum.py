"""An encoder that follows another one: MoCo's keys, BYOL's targets. May import :mod:`fastcl.checks`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.checks import check_between


class MomentumEncoder(nn.Module):
    r"""An encoder that follows another one slowly: MoCo's key encoder, the target network of BYOL.

    After each step of the optimizer,

    .. math:: \theta' \leftarrow m\,\theta' + (1 - m)\,\theta

    for parameters; buffers (BatchNorm's running statistics) are copied. It has no trainable parameters and computes
    without a graph, so that what it returns needs no ``detach()``.

        target = fastcl.memory.MomentumEncoder(encoder, momentum=0.999)
        ...
        optimizer.step()
        target.update(encoder)  # or target.update(encoder, cosine_momentum(step, steps, 0.996))

    Args:
        encoder: is copied; wrap it in DistributedDataParallel, or compile it, after that. Either form can be given to
            :meth:`update`.
        momentum: m, from 0 (a copy of the last step) to 1 (frozen). MoCo takes 0.999, BYOL 0.996 rising to 1. In half
            precision steps so small vanish by rounding: keep the parameters in float32.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: an update reads both encoders' parameters once, in a few fused kernels.

    Source: He et al., 2020 (arXiv:1911.05722); Grill et al., Bootstrap Your Own Latent, 2020 (arXiv:2006.07733).

    >>> import torch, fastcl
    >>> encoder = torch.nn.Linear(1, 1, bias=False)
    >>> target = fastcl.memory.MomentumEncoder(encoder, momentum=0.75)
    >>> _ = torch.nn.init.zeros_(target.encoder.weight), torch.nn.init.ones_(encoder.weight)
    >>> target.update(encoder)
    >>> target(torch.ones(1, 1))
    tensor([[0.2500]])
    """

    def __init__(self, encoder: nn.Module, momentum: float) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        check_between("momentum", momentum, 0, 1)
        self.momentum = momentum
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.encoder(*args, **kwargs)

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float | None = None) -> None:
        """One step towards ``encoder``, with this ``momentum`` instead of the constructor's if it is given."""
        if momentum is not None:
            check_between("momentum", momentum, 0, 1)
        parameters = _aligned("parameters", self.encoder.parameters(), encoder.parameters())
        buffers = _aligned("buffers", self.encoder.buffers(), encoder.buffers())
        if parameters[0]:
            torch._foreach_lerp_(*parameters, 1.0 - (self.momentum if momentum is None else momentum))
        if buffers[0]:
            torch._foreach_copy_(*buffers)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"


def cosine_momentum(step: int, steps: int, momentum: float) -> float:
    r"""BYOL's schedule, from ``momentum`` at step 0 to 1 at the last: :math:`1 - (1 - m)(\cos(\pi k / K) + 1) / 2`.

    >>> from fastcl.memory import cosine_momentum
    >>> [round(cosine_momentum(step, 100, 0.996), 4) for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    check_between("momentum", momentum, 0, 1)
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step must be from 0 to steps, got {step} of {steps}")
    return 1.0 - (1.0 - momentum) * (math.cos(math.pi * step / steps) + 1.0) / 2.0


def _aligned(name: str, mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    mine, theirs = list(mine), list(theirs)
    shapes, expected = ([tuple(x.shape) for x in tensors] for tensors in (theirs, mine))
    if shapes != expected:
        raise ValueError(f"encoder must have the {name} of the one that was copied, {expected}, got {shapes}")
    return mine, theirs
