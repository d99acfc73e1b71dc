"""The C++ CPU engine: a tile engine compiled for each instruction set, in ``csrc/``.

May import :mod:`fastcl.terms`, :mod:`fastcl.backends.shift` and the extension ``fastcl._C``, which is loaded on first
use. Everything here is the translation of a call into the operators of ``fastcl_cpu``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.backends.shift import fixed_shift, flag_threshold, lowest_exponent
from fastcl.terms import (
    NO_GRADIENTS,
    Axis,
    CrossEntropy,
    Gradients,
    LossAndGradients,
    Mask,
    Needs,
    Operands,
    PanelGradients,
    PanelNeeds,
    PanelOperands,
    Plan,
    Products,
    Reduce,
    Statistics,
    Tags,
)

_MINIMUM_TORCH = (2, 11)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DENSE = 4
_REDUCE_CODES = {Reduce.LSE: 0, Reduce.SUM: 1, Reduce.MAX: 2}
_TEST_CODES = {False: -1, None: 0, True: 1}


def unavailable() -> str | None:
    """Why the extension can't be used, or None."""
    return _load()[1]


def level() -> str:
    """The instruction-set level in use: the best one, or the one that ``FASTCL_CPU_LEVEL`` names."""
    return _extension().level()


def levels() -> list[str]:
    """The instruction-set levels that this machine supports, best last."""
    return _extension().levels()


def peak_flops(dtype: torch.dtype) -> float:
    """The arithmetic peak that the engine is measured against: FLOP/s of the calling thread at the level in use.

    Measured now, in some 30 ms, by a loop of independent multiply-adds (two operations each) on registers alone: the
    bfloat16 dot product where ``dtype`` is bfloat16 and the level has one, else that of float32, to which the engine
    converts. Other Python threads run meanwhile: the peak of n threads is the sum of n calls at once.

    Raises:
        ValueError: ``dtype`` is not one of float32, bfloat16, float16.
    """
    return _extension().peak_flops(str(dtype).removeprefix("torch."))


def refuses(plan: Plan) -> str | None:
    for terms in (plan.rows, plan.columns):
        for reduce, name in ((Reduce.LSE, "log-sum-exp"), (Reduce.SUM, "sum")):
            if sum(term.reduce is reduce and not term.mask.is_sparse for term in terms) > _MAX_DENSE:
                return f"more than {_MAX_DENSE} {name} terms along one axis, over more than a few pairs"
    return None


def takes(a: Tensor) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if a.device.type != "cpu":
        return f"the tensors are on {a.device}, not on the CPU"
    if a.dtype not in _DTYPES:
        return f"{a.dtype} is not one of float32, bfloat16, float16"
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    if (reason := takes(operands.a)) is not None:
        return reason
    if 0 in (*operands.shape, operands.a.shape[1]):
        return "an operand is empty"
    if plan.symmetric and (plan.columns or operands.b is not None or operands.row0 != operands.col0):
        return "a symmetric plan takes one operand, row terms only, and row0 == col0"
    return refuses(plan)


def statistics(plan: Plan, operands: Operands) -> Statistics:
    _extension()
    return Statistics(*torch.ops.fastcl_cpu.statistics(*_arguments(plan, operands)))


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    _extension()
    vectors = (v.detach().float().contiguous() for v in (*statistics, *incoming))
    a, b = torch.ops.fastcl_cpu.gradient(*_arguments(plan, operands), *vectors, needs_a, needs_b)
    return Products(a if needs_a else None, b if needs_b and not plan.symmetric else None)


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    _extension()
    loss, rows, columns, a, b, scale, positive = torch.ops.fastcl_cpu.cross_entropy(
        *_arguments(plan, operands),
        _vector(head.positive),
        _vector(head.weights),
        head.factor(plan, operands.shape[0]),
        head.normalize,
        *needs,
    )
    return LossAndGradients(
        loss,
        Statistics(rows, columns),
        Gradients(a if needs.a else None, b if needs.b else None, scale if needs.scale else None),
        positive if needs.positive else None,
    )


def sigmoid(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.sigmoid`."""
    _extension()
    n, m = x.shape
    rows, a, b, scale, bias, shifts = torch.ops.fastcl_cpu.sigmoid(
        x.a.detach(),
        x.keys.detach(),
        x.scale.item(),
        _vector(x.bias.expand(m) if x.column_params is None else x.bias - x.column_params[0]),
        x.scale.new_ones(n) if x.row_params is None else _vector(x.row_params[0]),
        None if incoming is None else _vector(incoming[0]),
        _packed((x.tags, x.key_tags)),
        0 if x.row0 is None else int(x.row0),
        needs.a,
        needs.b,
        needs.scale,
        needs.column_params,
        needs.values,
    )
    return PanelGradients(
        a if needs.a else None,
        b if needs.b else None,
        scale if needs.scale else None,
        bias if needs.bias else None,
        None,
        shifts.neg_()[None] if needs.column_params else None,
        rows[None] if needs.values else None,
    )


_PAIR_FUNCTIONS = (
    "contrastive", "negatives", "negatives slope", "lifted", "hardest", "similarities", "nearest", "importance",
    "energy", "power importance", "power energy", "candidates", "soft targets", "squares",
)  # fmt: skip
"""as csrc/cpu/pairs.h numbers them"""


class _Sums(NamedTuple):
    """What a sweep makes of a function of every pair: values, products, and the sums of W."""

    values: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    rows: Tensor
    """[1 or 2, N]: with respect to S, and to a parameter"""
    columns: Tensor

    def gradients(
        self,
        needs: PanelNeeds,
        of_rows: Tensor | None = None,
        of_columns: Tensor | None = None,
        values: Tensor | None = None,
    ) -> PanelGradients:
        return PanelGradients(
            self.a if needs.a else None,
            self.b if needs.b else None,
            self.scale if needs.scale else None,
            self.rows[0].sum() if needs.bias else None,
            of_rows if needs.row_params else None,
            of_columns if needs.column_params else None,
            (self.values if values is None else values) if needs.values else None,
        )


def _sweep(
    function: str,
    x: PanelOperands,
    numbers: Sequence[float] = (),
    squares: tuple[Tensor, Tensor] | None = None,
    row_given: Tensor | None = None,
    column_given: Tensor | None = None,
    incoming: Tensor | None = None,
    needs: PanelNeeds = NO_GRADIENTS,
) -> _Sums:
    """``squares`` are the squared norms of rows and columns, if the distance is Euclidean."""
    _extension()
    of_rows, of_columns = (None, None) if squares is None else squares
    guide, guide_scale = ([], 0.0) if function != "soft targets" else (x.guide[:2], x.guide[2].item())
    return _Sums(
        *torch.ops.fastcl_cpu.pairs(
            x.a.detach(),
            x.keys.detach(),
            x.scale.item(),
            x.bias.item(),
            _PAIR_FUNCTIONS.index(function),
            torch.tensor([*numbers, 0.0, 0.0][:2]),
            _vector(of_rows),
            _vector(of_columns),
            _vector(row_given),
            _vector(column_given),
            list(guide),
            guide_scale,
            _vector(incoming),
            _packed((x.tags, x.key_tags)),
            0 if x.row0 is None else int(x.row0),
            needs.a,
            needs.b,
            needs.scale,
        )
    )


def _squares(x: PanelOperands, first: int = 0) -> tuple[Tensor, Tensor] | None:
    """Parameter ``first`` of rows and columns, if there is one (see :func:`fastcl.losses.distances.distances`)."""
    if x.row_params is None or len(x.row_params) == first:
        return None
    return x.row_params[first], x.column_params[first]


def _of_distances(sums: _Sums, x: PanelOperands, needs: PanelNeeds, values: Tensor | None = None) -> PanelGradients:
    """The gradients of a function of distances; S has -2 times the slope of a squared norm."""
    euclidean = x.row_params is not None and len(x.row_params) == len(sums.rows)
    of_rows, of_columns = (
        torch.cat((side[1:], -0.5 * side[:1])) if euclidean else side[1:] for side in (sums.rows, sums.columns)
    )
    return sums.gradients(needs, of_rows, of_columns, values)


def contrastive(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.contrastive`."""
    given = None if incoming is None else incoming[:3]
    sums = _sweep("contrastive", x, x.numbers, _squares(x), incoming=given, needs=needs)
    return _of_distances(sums, x, needs)


def negatives(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The first panel function of :mod:`fastcl.losses.lifted_structure`: its values, then its gradient."""
    if values is None:
        values = _sweep("negatives", x, x.numbers, _squares(x)).values
    if incoming is None:
        return NOTHING._replace(values=values)
    sums = _sweep("negatives slope", x, x.numbers, _squares(x), values, incoming=incoming, needs=needs)
    return _of_distances(sums, x, needs, values)


def lifted(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The second one."""
    given = None if incoming is None else incoming[:1]
    lse = x.row_params[:1], x.column_params[:1]
    sums = _sweep("lifted", x, x.numbers, _squares(x, 1), *lse, incoming=given, needs=needs)
    return _of_distances(sums, x, needs)


def hardest(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.triplet` that mines. A distance that is NaN is nobody's hardest."""
    farthest, positive, nearest, negative = _sweep("hardest", x, squares=_squares(x)).values
    complete = (farthest > -torch.inf) & (nearest > -torch.inf)
    columns = torch.stack((positive, negative)).where(complete, -1.0)
    return NOTHING._replace(values=columns)


def similarities(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.distances`."""
    return NOTHING._replace(values=_sweep("similarities", x, squares=_squares(x)).values)


def nearest(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The distances of :mod:`fastcl.losses.alpha_cl`."""
    positive, negative = _sweep("nearest", x, squares=_squares(x)).values
    return NOTHING._replace(values=torch.stack((positive, -negative)))


def _energy(
    importance: str, x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds
) -> PanelGradients:
    """The panel functions of :mod:`fastcl.losses.alpha_cl`: the sum of a row's importances, then the energy."""
    tau, power = x.numbers
    squares, (_, to_positive) = _squares(x), x.row_params
    numbers = (0.0,) if importance == "uniform" else (-1.0 / tau, power / 2)
    kind = "power " if importance == "power" else ""
    lse = _sweep(kind + "importance", x, numbers, squares).values[0]
    if importance == "softmax":
        lse = torch.logaddexp(lse, -to_positive / tau)
    sums = _sweep(kind + "energy", x, numbers, squares, torch.stack((to_positive, lse)), incoming=incoming, needs=needs)
    return sums.gradients(needs, torch.cat((-0.5 * sums.rows, sums.rows)), -0.5 * sums.columns)


def soft_targets(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.distillation`: both softmaxes' sums, then the cross entropy."""
    of_rows, of_columns, scale = x.guide
    guide = replace(x, a=of_rows, b=of_columns, scale=scale, bias=torch.zeros(()), guide=())
    both = torch.cat([_sweep("candidates", s).values for s in (x, guide)])
    return _sweep("soft targets", x, row_given=both, incoming=incoming, needs=needs).gradients(needs)


def squares(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.spectral`."""
    return _sweep("squares", x, incoming=incoming, needs=needs).gradients(needs)


def triplets(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.triplet` that takes all."""
    _extension()
    margin, semihard = x.numbers
    of_rows, of_columns = (None, None) if x.row_params is None else _squares(x)
    sums = torch.ops.fastcl_cpu.triplets(
        x.a.detach(),
        x.keys.detach(),
        x.scale.item(),
        x.bias.item(),
        margin,
        bool(semihard),
        _vector(of_rows),
        _vector(of_columns),
        None if incoming is None else _vector(incoming[0]),
        _packed((x.tags, x.key_tags)),
        0 if x.row0 is None else int(x.row0),
        needs.a,
        needs.b,
        needs.scale,
    )
    return _of_distances(_Sums(*sums), x, needs)


NOTHING = PanelGradients(*[None] * 7)
PANEL_KERNELS = {
    "sigmoid": sigmoid,
    "contrastive": contrastive,
    "negatives": negatives,
    "lifted": lifted,
    "hardest": hardest,
    "similarities": similarities,
    "nearest": nearest,
    **{f"energy_{rule}": functools.partial(_energy, rule) for rule in ("softmax", "uniform", "power")},
    "soft_targets": soft_targets,
    "squares": squares,
    "triplets": triplets,
}


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _arguments(plan: Plan, operands: Operands) -> tuple:
    target = operands.target if plan.tests("target") else None
    scale = operands.scale.item()
    shift = float(fixed_shift(operands, scale))
    return (
        operands.a.detach(),
        None if operands.b is None else operands.b.detach(),
        scale,
        shift,
        flag_threshold(operands),
        lowest_exponent(operands, shift),
        None if target is None else target.to(torch.int64).contiguous(),
        [] if plan.names_pairs else _tags(plan, operands),
        operands.row0,
        operands.col0,
        _term_codes(plan),
        plan.symmetric,
    )


def _tags(plan: Plan, operands: Operands) -> list[Tensor | None]:
    """What the plan's masks test about rows and columns."""
    sides = ((operands.row_tags, Axis.ROW), (operands.column_tags, Axis.COLUMN))[: 1 if operands.b is None else 2]
    both = (
        Tags(*(tag if tested else None for tag, tested in zip(tags, plan.tags_tested(axis), strict=True)))
        for tags, axis in sides
    )
    return _packed(tuple(both), plan.label_width)


def _packed(both: tuple[Tags, ...], label_width: int = 0) -> list[Tensor | None]:
    """Tags of rows and columns for the engine: labels int32 [3, .], ids int32 [.], thresholds float32 [.]."""
    none = [None] * len(both)
    labels = none if both[0].labels is None else _ranks([tags.labels for tags in both], label_width)
    ids = none if both[0].ids is None else _ranks([tags.ids for tags in both], 0)
    found: list[Tensor | None] = []
    for label, id_, tags in zip(labels, ids, both, strict=True):
        found += [label, None if id_ is None else id_[0], _vector(tags.threshold)]
    return found + [None] * (2 * len(Tags._fields) - len(found))


def _ranks(tags: list[Tensor], width: int) -> list[Tensor]:
    """For each of the tags its rank, the first of the ranks that are within ``width``, and how many more these are.

    Ranks are among all tags and fit into 32 bits, whatever the tags are.
    """
    sizes = [len(x) for x in tags]
    values, rank = torch.unique(torch.cat(tags), return_inverse=True)
    first = last = torch.arange(len(values))
    if width:
        limits = torch.iinfo(values.dtype)
        first = torch.searchsorted(values, values.clamp(min=limits.min + width) - width)
        last = torch.searchsorted(values, values.clamp(max=limits.max - width) + width, right=True) - 1
    codes = torch.stack((rank, first[rank], (last - first)[rank])).to(torch.int32)
    return [part.contiguous() for part in codes.split(sizes, dim=1)]


@functools.lru_cache(maxsize=256)
def _term_codes(plan: Plan) -> Tensor:
    """The plan's terms as int64 [T, 7]: reduce, axis, and the tests of the mask in their order."""
    codes = [
        (
            _REDUCE_CODES[term.reduce],
            int(term.axis is Axis.COLUMN),
            *(_TEST_CODES[getattr(term.mask, test.name)] for test in fields(Mask)),
        )
        for term in plan.terms
    ]
    return torch.tensor(codes, dtype=torch.int64).reshape(-1, 2 + len(fields(Mask)))


@functools.lru_cache(maxsize=1)
def _load():
    """The extension or None, and the reason why it could not be loaded or None."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _MINIMUM_TORCH:
        return None, f"the C++ engine needs torch {'.'.join(map(str, _MINIMUM_TORCH))}, this is {torch.__version__}"
    try:
        from fastcl import _C
    except ImportError as error:
        return None, f"the C++ extension is not built or can't be loaded ({error})"
    return _C, None


def _extension():
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension
