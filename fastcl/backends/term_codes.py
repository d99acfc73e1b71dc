"""A plan's terms as the numbers in which they cross into the C++ engines.

May import :mod:`fastcl.terms` only.
"""

from __future__ import annotations

import functools
from dataclasses import fields

import torch
from torch import Tensor

from fastcl.terms import Axis, Mask, Plan, Reduce

_REDUCE_CODES = {Reduce.LSE: 0, Reduce.SUM: 1, Reduce.MAX: 2}
_TEST_CODES = {False: -1, None: 0, True: 1}


@functools.lru_cache(maxsize=256)
def term_codes(plan: Plan) -> Tensor:
    """The plan's terms as int64 [T, 7]: reduce, axis, and the tests of the mask in their order."""
    codes = [
        (
            _REDUCE_CODES[term.reduce],
            int(term.axis is Axis.COLUMN),
            *(_TEST_CODES[getattr(term.mask, test.name)] for test in fields(Mask)),
        )
        for term in plan.terms
    ]
    return torch.tensor(codes, dtype=torch.int64, device="cpu").reshape(-1, 2 + len(fields(Mask)))
