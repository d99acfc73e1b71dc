"""Argument checks with messages that name the argument, its value and what was expected.

A leaf module: it imports torch only. Nothing here reads a tensor's values on a device that would have to be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def check_matrix(name: str, x: Tensor, *, may_be_empty: bool = False) -> None:
    """Raise unless ``x`` is a floating [rows, dim] tensor, with at least one row unless it ``may_be_empty``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape [rows, dim], got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [rows, dim], got shape {tuple(x.shape)}")
    if (x.shape[0] == 0 and not may_be_empty) or x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_pair(
    name: str, x: Tensor, other_name: str, other: Tensor, *, same_rows: bool, may_be_empty: bool = False
) -> None:
    """Raise unless both are matrices of one dtype, device and dim (and, with ``same_rows``, one number of rows)."""
    check_matrix(name, x, may_be_empty=may_be_empty)
    check_matrix(other_name, other, may_be_empty=may_be_empty)
    if same_rows and x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} and {other_name} must have the same dim, got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on the same device, got {x.device} and {other.device}")
    if x.dtype != other.dtype:
        raise ValueError(f"{name} and {other_name} must have the same dtype, got {x.dtype} and {other.dtype}")


def check_row_vector(name: str, vector: Tensor, x: Tensor, *, integer: bool) -> None:
    """Raise unless ``vector`` holds one number, an integer or a floating-point one, for each row of ``x``."""
    kind = "an integer tensor" if integer else "a floating-point tensor"
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be {kind}, got {type(vector).__name__}")
    if vector.dtype.is_floating_point is integer or vector.dtype.is_complex or vector.dtype is torch.bool:
        raise TypeError(f"{name} must be {kind}, got {vector.dtype}")
    if vector.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape ({x.shape[0]},), one for each row, got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the features, got {vector.device}")


def check_target(name: str, target: Tensor, x: Tensor, n_keys: int | None = None) -> None:
    """Raise unless ``target`` holds one index for each row of ``x``, below ``n_keys`` where that is given.

    The bound is checked on the CPU only: elsewhere it would cost a synchronisation.
    """
    check_row_vector(name, target, x, integer=True)
    readable = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if n_keys is not None and readable and int(target.max()) >= n_keys:
        raise ValueError(f"{name} must hold indices below {n_keys}, got {int(target.max())}")


def check_group(name: str, group: ProcessGroup) -> None:
    """Raise unless ``group`` is a process group that this process belongs to."""
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"{name} must be None or a torch.distributed.ProcessGroup that this rank belongs to, got {group!r}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_scalar(name: str, value: float | Tensor, *, positive: bool, hint: str = "") -> None:
    """Raise unless ``value`` is a float or a 0-d floating tensor; with ``positive``, a float must be positive."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}{hint}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a float or a 0-d floating-point tensor, got {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")
    elif positive and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_between(name: str, value: float, lowest: float, highest: float) -> None:
    """Raise unless ``value`` is a number from ``lowest`` to ``highest``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise ValueError(f"{name} must be a number from {lowest} to {highest}, got {value!r}")
