"""The libraries fastcl replaces, each called the way its own documentation says.

An adapter takes the features of a case and the temperature and returns the mean loss. It is built inside the worker, so
that a library is imported only in the process that measures it. The tests import their oracles from here, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

Adapter = Callable[[list[Tensor], "Tensor | float"], Tensor]
"""(features, tau) -> mean loss, of a graph that reaches the features, and tau where that is a tensor."""


@dataclass(frozen=True)
class Peer:
    """One library, the losses it computes, and what it needs."""

    name: str
    distribution: str
    losses: dict[str, Callable[[], Adapter]]
    """for each loss, a function that imports the library and returns the adapter"""
    matrices: float = 0.0
    """N x M matrices at the peak, measured on a CPU; 0 where none is materialised"""
    cubes: float = 0.0
    """N x M x M tensors at the peak"""
    most_pairs: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    learns_scale: bool = True
    """whether the temperature gets a gradient"""


@contextmanager
def torchvision_beside_cpu_torch() -> Iterator[None]:
    """Lets torchvision's CUDA build be imported beside a CPU build of torch, for lightly and open_clip.

    Its import stops where it registers fakes for compiled operators that a CPU torch doesn't have; while this context
    is open those registrations are ignored.
    """
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    try:
        yield
    finally:
        torch.library.register_fake = original


def import_peer(module: str) -> Any:
    """Imports a module of a peer, with the workaround for torchvision where it is needed.

    Raises:
        ImportError: it isn't installed, or can't be imported beside this torch.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        with torchvision_beside_cpu_torch():
            return importlib.import_module(module)
    return importlib.import_module(module)


def lightly_nt_xent() -> Adapter:
    loss = import_peer("lightly.loss").NTXentLoss
    return lambda features, tau: loss(temperature=tau)(*features)


def pml_nt_xent() -> Adapter:
    losses = import_peer("pytorch_metric_learning.losses")
    return lambda features, tau: losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=tau))(*features)


def open_clip_clip() -> Adapter:
    loss = import_peer("open_clip.loss").ClipLoss()
    # open_clip's models normalise; its loss takes what they return.
    return lambda features, tau: loss(*_unit(features), 1 / tau)


def info_nce_pytorch() -> Adapter:
    info_nce = import_peer("info_nce").info_nce
    return lambda features, tau: info_nce(*features, temperature=tau)


def inf_cl_clip() -> Adapter:
    loss = import_peer("inf_cl").cal_flash_loss

    def both(features: list[Tensor], tau: Tensor | float) -> Tensor:
        x, y = _unit(features)
        head = next(size for size in (256, 128, 64, 32, 16) if x.shape[1] % size == 0)
        options = {"scale": 1 / tau, "head_dim": head}
        return 0.5 * (loss(x, y, **options).mean() + loss(y, x, **options).mean())

    return both


def memeff_clip() -> Adapter:
    loss = import_peer("MemoryEfficientCLIP").MemoryEfficientCLIPLoss
    return lambda features, tau: loss(temperature=tau)(*features)


def linear_cross_entropy(function: Callable[[Tensor, Tensor, Tensor], Tensor], *, both: bool) -> Adapter:
    """InfoNCE (or, with ``both``, CLIP) as a linear layer's cross entropy: the keys are the weights of the classes."""

    def adapter(features: list[Tensor], tau: Tensor | float) -> Tensor:
        x, y = _unit(features)
        target = torch.arange(len(x), device=x.device)
        loss = function(x / tau, y, target)
        return 0.5 * (loss + function(y / tau, x, target)) if both else loss

    return adapter


def _cut_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = import_peer("cut_cross_entropy").linear_cross_entropy
    # Its filter drops gradients below a threshold that 1 / N is below: without it the gradient is the loss's own.
    return lambda x, weight, target: function(x, weight, target, filter_eps=None)


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    loss = import_peer("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)


def _torch_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    function, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: function(x, weight, target, options=options)


def _as_linear_layer(
    make: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]],
) -> dict[str, Callable[[], Adapter]]:
    return {
        "info_nce": lambda: linear_cross_entropy(make(), both=False),
        "clip": lambda: linear_cross_entropy(make(), both=True),
    }


def _unit(features: list[Tensor]) -> list[Tensor]:
    return [normalize(x, dim=1) for x in features]


PEERS = (
    Peer("lightly", "lightly", {"nt_xent": lightly_nt_xent}, matrices=5, learns_scale=False),
    Peer(
        "pytorch-metric-learning",
        "pytorch-metric-learning",
        {"nt_xent": pml_nt_xent},
        cubes=4,
        most_pairs=128,
        learns_scale=False,
    ),
    Peer("open_clip", "open_clip_torch", {"clip": open_clip_clip}, matrices=4),
    Peer("info-nce-pytorch", "info-nce-pytorch", {"info_nce": info_nce_pytorch}, matrices=3, learns_scale=False),
    Peer("torch chunked", "torch", _as_linear_layer(_torch_chunked)),
    Peer("inf-cl", "inf_cl", {"clip": inf_cl_clip}, devices=("cuda",)),
    Peer("memeff", "MemoryEfficientCLIP", {"clip": memeff_clip}, devices=("cuda",), learns_scale=False),
    Peer("liger-kernel", "liger-kernel", _as_linear_layer(_liger), devices=("cuda",)),
    Peer("cut-cross-entropy", "cut-cross-entropy", _as_linear_layer(_cut_cross_entropy), devices=("cuda",)),
)
