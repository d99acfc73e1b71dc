"""A plan as the kernels take it: tuples of small integers that are compile-time constants.

A column of a symmetric plan is a row looked at from the other side, so its column terms are its row terms; the kernels
evaluate their masks on (j, i) there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from fastcl.terms import Plan, Reduce, Term

TermCode = tuple[int, int, int, int, int, int]
"""A reduction, then the tests of a :class:`fastcl.terms.Mask` in their order, as ``kernels/tile.py`` names them."""

LSE_CODE, SUM_CODE, MAX_CODE = range(3)
_REDUCES = {Reduce.LSE: LSE_CODE, Reduce.SUM: SUM_CODE, Reduce.MAX: MAX_CODE}
_TESTS = {None: 0, True: 1, False: 2}


class Constants(NamedTuple):
    """What the kernels are specialised on."""

    row_terms: tuple[TermCode, ...]
    column_terms: tuple[TermCode, ...]
    symmetric: bool
    uses_self: bool
    uses_target: bool
    label_width: int

    def as_arguments(self) -> dict[str, Any]:
        return {name.upper(): value for name, value in self._asdict().items()}


def constants(plan: Plan) -> Constants:
    rows = tuple(map(_code, plan.rows))
    return Constants(
        row_terms=rows,
        column_terms=rows if plan.symmetric else tuple(map(_code, plan.columns)),
        symmetric=plan.symmetric,
        uses_self=any(term.mask.self_pair is not None for term in plan.terms),
        uses_target=plan.tests("target"),
        label_width=plan.label_width,
    )


def table_entry(kernel: str, plan: Plan) -> str:
    """Which entry of a tuning table holds the tiles of a kernel for this plan."""
    if not plan.names_pairs:
        tiles = "_tags"
    elif kernel == "sweep" and plan.symmetric and sum(not term.mask.is_sparse for term in plan.rows) > 1:
        tiles = "_several"
    else:
        tiles = ""
    return kernel + ("_symmetric" if plan.symmetric else "") + tiles


def _code(term: Term) -> TermCode:
    return _REDUCES[term.reduce], *(_TESTS[getattr(term.mask, test.name)] for test in fields(term.mask))
