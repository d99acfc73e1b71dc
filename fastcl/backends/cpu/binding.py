"""The extension ``fastcl._C``: loading it, what it takes, and vectors and tags as it wants them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastcl.terms import Tags

_MINIMUM_TORCH = (2, 11)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Any, str | None]:
    """The extension or None, and the reason why it could not be loaded or None."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _MINIMUM_TORCH:
        return None, f"the C++ engine needs torch {'.'.join(map(str, _MINIMUM_TORCH))}, this is {torch.__version__}"
    try:
        from fastcl import _C
    except ImportError as error:
        return None, f"the C++ extension is not built or can't be loaded ({error})"
    return _C, None


def extension() -> Any:
    """The extension, or an error."""
    loaded, reason = load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def unavailable() -> str | None:
    """Why the extension can't be used, or None."""
    return load()[1]


def takes(a: Tensor) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if a.device.type != "cpu":
        return f"the tensors are on {a.device}, not on the CPU"
    if a.dtype not in _DTYPES:
        return f"{a.dtype} is not one of float32, bfloat16, float16"
    return None


def vector(x: Tensor | None) -> Tensor | None:
    """Numbers for each row, as the engine reads them."""
    return None if x is None else x.detach().float().contiguous()


def packed(both: tuple[Tags, ...], label_width: int = 0) -> list[Tensor | None]:
    """Tags of rows and columns for the engine: labels int32 [3, .], ids int32 [.], thresholds float32 [.]."""
    none = [None] * len(both)
    labels = none if both[0].labels is None else _ranks([tags.labels for tags in both], label_width)
    ids = none if both[0].ids is None else _ranks([tags.ids for tags in both], 0)
    found: list[Tensor | None] = []
    for label, id_, tags in zip(labels, ids, both, strict=True):
        found += [label, None if id_ is None else id_[0], vector(tags.threshold)]
    return found + [None] * (2 * len(Tags._fields) - len(found))


def _ranks(tags: list[Tensor], width: int) -> list[Tensor]:
    """For each of the tags its rank, the first of the ranks that are within ``width``, and how many more these are.

    Ranks are among all tags and fit into 32 bits, whatever the tags are.
    """
    sizes = [len(x) for x in tags]
    values, rank = torch.unique(torch.cat(tags), return_inverse=True)
    first = last = torch.arange(len(values), device="cpu")
    if width:
        limits = torch.iinfo(values.dtype)
        first = torch.searchsorted(values, values.clamp(min=limits.min + width) - width)
        last = torch.searchsorted(values, values.clamp(max=limits.max - width) + width, right=True) - 1
    codes = torch.stack((rank, first[rank], (last - first)[rank])).to(torch.int32)
    return [part.contiguous() for part in codes.split(sizes, dim=1)]
