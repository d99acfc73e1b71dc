"""What the modules with a temperature share: it is fixed, or learned as the logarithm of its inverse, ``logit_scale``.

May import :mod:`fastcl.checks`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_scalar


def log_scale(temperature: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(-math.log(temperature)))


def bounded_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    # The bound holds the value but passes the gradient: a plain clamp would freeze a scale that ever exceeded it.
    scale = log_scale.exp()
    return scale - (scale - scale.clamp(max=max_scale)).detach()


class TemperatureLoss(nn.Module):
    """Holds a temperature, fixed or learnable, and the options that every call of the loss takes."""

    def __init__(
        self,
        temperature: float,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature, positive=True)
        check_scalar("max_scale", max_scale, positive=True)
        self.max_scale = max_scale
        self.fixed_temperature = None if learnable else float(temperature)
        self.logit_scale = log_scale(temperature) if learnable else None
        self.options = {
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "group": group,
            "exchange": exchange,
        }

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use; where it is learnable, a 0-d tensor with its gradient."""
        if self.logit_scale is None:
            return self.fixed_temperature
        return 1.0 / bounded_scale(self.logit_scale, self.max_scale)

    def extra_repr(self) -> str:
        learnable = "" if self.logit_scale is None else f", learnable=True, max_scale={self.max_scale}"
        return f"temperature={torch.as_tensor(self.temperature).item():.4g}{learnable}"
