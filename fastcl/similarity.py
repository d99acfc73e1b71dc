"""Other similarities than the dot product, as transformed features whose dot product they are: every loss takes them.

May import :mod:`fastcl.terms` and :mod:`fastcl.checks`. The losses are called with ``normalize=False`` then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.checks import check_matrix, check_pair
from fastcl.terms import accumulation_dtype

_PARTS = {torch.bfloat16: 3, torch.float16: 3}
"""columns over which a squared norm is spread: 3 of half precision hold the 24 bits of a float32"""


def negative_squared_distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Features whose dot products are minus the squared distances of a and b.

    .. math:: \langle a'_i, b'_j\rangle = -|a_i - b_j|^2 = 2\langle a_i, b_j\rangle - |a_i|^2 - |b_j|^2

    The squared norms are columns beside the features. In half precision each takes three, so that it keeps the
    precision of a float32: the dot products, which accumulate in float32, are distances of the features as they are.

    Args:
        a, b: [N, D] and [M, D], in one dtype (float64, float32, bfloat16, float16) and on one device.

    Returns:
        a' [N, D + 2] and b' [M, D + 2] (D + 6 in half precision), in the dtype of a and b. Gradients in half precision
        are a difference of two, each of which is rounded to it. In float16 squared norms above 65504 overflow.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O((N + M) * D).

    >>> import torch, fastcl
    >>> a, b = torch.randn(5, 8), torch.randn(7, 8)
    >>> x, y = fastcl.similarity.negative_squared_distance(a, b)
    >>> torch.allclose(x @ y.T, -torch.cdist(a, b).square(), atol=1e-4)
    True
    >>> loss = fastcl.info_nce(x[:4], y[:4], 0.5, normalize=False)  # softmax of -|a - b|^2 / 0.5
    """
    check_pair("a", a, "b", b, same_rows=False, may_be_empty=True)
    of_a, of_b = _negative_squares(a), _negative_squares(b)
    ones_a, ones_b = torch.ones_like(of_a[:, :1]), torch.ones_like(of_b[:, :1])
    parts = of_a.shape[1]
    return torch.cat((2 * a, of_a, ones_a.expand(-1, parts)), dim=1), torch.cat(
        (b, ones_b.expand(-1, parts), of_b), dim=1
    )


def bilinear(a: Tensor, b: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Features whose dot products are the bilinear similarity :math:`a_i^\top M b_j`, which is not symmetric.

    Args:
        a: [N, D].
        b: [M, E], of the same dtype and device.
        matrix: [D, E], which may require grad: the M of contrastive predictive coding.

    Returns:
        a @ matrix [N, E], and b.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: N * D * E multiply-adds.

    >>> import torch, fastcl
    >>> query, key, matrix = torch.randn(5, 8), torch.randn(5, 3), torch.randn(8, 3)
    >>> loss = fastcl.info_nce(*fastcl.similarity.bilinear(query, key, matrix), 1.0, normalize=False)
    """
    check_matrix("a", a, may_be_empty=True)
    check_matrix("matrix", matrix)
    if matrix.shape[0] != a.shape[1]:
        raise ValueError(f"matrix must have a row for each of the {a.shape[1]} columns of a, got {tuple(matrix.shape)}")
    product = a @ matrix
    check_pair("a @ matrix", product, "b", b, same_rows=False, may_be_empty=True)
    return product, b


def _negative_squares(x: Tensor) -> Tensor:
    """-|x_i|^2 as a sum of columns in the dtype of ``x``, the first of which carries its gradient."""
    rest = -x.to(accumulation_dtype(x.dtype)).square().sum(dim=1, keepdim=True)
    parts = []
    for _ in range(_PARTS.get(x.dtype, 1)):
        parts.append(rest.to(x.dtype))
        rest = (rest - parts[-1]).detach()
    return torch.cat(parts, dim=1)
