"""The public primitive: differentiable row and column statistics of S = scale * A @ B.T + bias.

May import :mod:`fastcl.terms`, :mod:`fastcl.checks`, :mod:`fastcl.engine` and :mod:`fastcl.distributed`. It owns the
two torch operators of one rank, their fakes and their autograd; a loss only combines the vectors that come out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl import distributed, engine
from fastcl.checks import (
    check_choice,
    check_group,
    check_matrix,
    check_pair,
    check_row_vector,
    check_scalar,
    check_target,
)
from fastcl.terms import (
    NO_TAGS,
    Axis,
    Needs,
    Operands,
    Plan,
    Reduce,
    Statistics,
    Tags,
    Term,
    accumulation_dtype,
    split_tags,
)


def pairwise(
    a: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    *,
    target: Tensor | None = None,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    label_width: int = 0,
    norm_bound: float | None = None,
    row0: int = 0,
    col0: int = 0,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
    call: str = "loss=pairwise",
) -> tuple[Tensor, ...]:
    r"""Reductions of :math:`S_{ij} = \text{scale}\,\langle a_i, b_j\rangle + \text{bias}`, without ever holding S.

    Every term reduces, for each row i (or column j), the logits that its mask admits; see :class:`fastcl.Term` and
    :class:`fastcl.Mask`. All terms are computed in one sweep over tiles of S, and the gradient recomputes the tiles.
    With ``b=None`` S is that of ``a`` with itself: only half of it is computed, and every term must lie along rows.

    Args:
        a: features [N, D] in float64, float32, bfloat16 or float16, of any strides.
        b: features [M, D] of the same dtype and device, or None for ``a`` itself.
        terms: what to compute.
        scale: a float or a 0-d tensor, which may require grad.
        bias: a float or a 0-d tensor, which may require grad.
        target: int64 [N], for masks that test ``target``; an index that names no key matches nothing.
        tags, key_tags: what masks test about the rows of ``a`` and of ``b``: ``Tags(labels, ids, threshold)``, integers
            [N] or [M] for the first two, logits without the bias, and without gradient, for the third; with ``b=None``
            only ``tags``.
        label_width: how far apart two labels may be and still count as equal.
        norm_bound: an upper bound of ``|a_i| * |b_j|`` if one is known (1 for unit vectors), to save the norms.
        row0, col0: global indices of ``a[0]`` and ``b[0]``, which ``self_pair`` and ``target`` refer to.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group, whose ranks all make this call: ``a`` and ``b`` are this rank's shards
            of the matrices of all ranks, in the order of the ranks, and may be empty. The results are those of this
            rank's rows and columns. ``target`` names keys of all ranks; with ``b=None`` it names rows of this shard.
            Gradients are those of the sum of all ranks' objectives. ``row0`` and ``col0`` must be 0.
        exchange: "ring", "gather" or "auto", how the shards travel; see docs/many-ranks.md.
        call: lines ``name=value`` on which, besides everything here, all ranks must agree.

    Returns:
        One tensor for each term, [N] or [M], in float32 (float64 for float64 features). ``MAX`` carries no gradient.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
        RuntimeError: a second derivative is asked for.

    Complexity: with P = N * M * D multiply-adds, P forward and up to 3 P backward; half of both with ``b=None``. Memory
    beyond operands and gradients is O(N + M).

    Example: the decoupled contrastive loss (Yeh et al., 2022), negatives only in the denominator.

    >>> import torch
    >>> from fastcl import Mask, Reduce, Term, pairwise
    >>> def dcl(z1, z2, tau):
    ...     z = torch.nn.functional.normalize(torch.cat((z1, z2)), dim=1)
    ...     partner = torch.arange(len(z)).roll(len(z1))
    ...     negatives, positive = pairwise(
    ...         z, None, [Term(Reduce.LSE, Mask(self_pair=False, target=False)), Term(Reduce.SUM, Mask(target=True))],
    ...         scale=1 / tau, target=partner)
    ...     return (negatives - positive).mean()
    >>> z = torch.eye(4, 8)
    >>> round(dcl(z, z, 1.0).item(), 4)  # log 6 negatives at similarity 0, positive at 1
    0.7918
    """
    plan = Plan(tuple(terms), symmetric=b is None, label_width=label_width)
    _check_operands(plan, a, b, scale, target, row0, col0, shards=group is not None)
    all_tags = checked_tags(plan, a, b, tags, key_tags)
    if bias is not None:
        check_scalar("bias", bias, positive=False)
    dtype = accumulation_dtype(a.dtype)
    a, b = autocast(a), None if b is None else autocast(b)
    if target is not None:
        target = target.to(torch.int64)
    check_choice("exchange", exchange, distributed.EXCHANGES)
    operands = (a, b, scalar_tensor(scale, dtype, a.device), target, all_tags, plan.encode(), norm_bound)
    if group is None:
        rows, columns = torch.ops.fastcl.pairwise_statistics(*operands, row0, col0, backend)
        count = functools.partial(admitted_count, row0=row0, col0=col0)
    else:
        check_group("group", group)
        call = "\n".join((call, *agreement(a, b, scale, bias)))
        rows, columns, lengths = torch.ops.fastcl.statistics_over_ranks(
            *operands, backend, group.group_name, exchange, call
        )
        count = functools.partial(_admitted_over_ranks, symmetric=b is None, lengths=lengths, rank=group.rank())
    values = {Axis.ROW: iter(rows.unbind()), Axis.COLUMN: iter(columns.unbind())}
    results = []
    for term in plan.terms:
        value = next(values[term.axis])
        if bias is not None:
            shift = scalar_tensor(bias, dtype, a.device)
            if term.reduce is Reduce.SUM:
                if not term.mask.names_pairs:
                    raise ValueError(f"bias must be None with {term}: add it to the sum, times the pairs it is over")
                n, m = len(a), len(a if b is None else b)
                shift = shift * count(term, n=n, m=m, target=target, device=a.device)
            value = value + shift
        results.append(value.detach() if term.reduce is Reduce.MAX else value)
    return tuple(results)


def admitted_count(
    term: Term, *, n: int, m: int, target: Tensor | None, row0: int, col0: int, device: torch.device
) -> Tensor:
    """How many pairs the term's mask admits in each row (or column) of an N x M matrix; what a SUM takes of a bias."""
    i = torch.arange(n, device=device)
    self_column = i + (row0 - col0)
    target_column = self_column.new_full((n,), -1) if target is None else target - col0
    has_self = (self_column >= 0) & (self_column < m)
    has_target = (target_column >= 0) & (target_column < m)
    has_both = has_self & (self_column == target_column)

    def along(has: Tensor, column: Tensor) -> Tensor:
        if term.axis is Axis.ROW:
            return has.long()
        return has.new_zeros(m, dtype=torch.int64).scatter_add(0, column.clamp(0, m - 1), has.long())

    selves, targets = along(has_self, self_column), along(has_target, target_column)
    both, everything = along(has_both, self_column), m if term.axis is Axis.ROW else n
    mask = term.mask
    # Inclusion and exclusion over the two tests: a test that is absent admits its set and the rest alike.
    in_self = {None: everything, True: selves, False: everything - selves}[mask.self_pair]
    if mask.target is None:
        return in_self if isinstance(in_self, Tensor) else torch.full_like(selves, in_self)
    in_both = {None: targets, True: both, False: targets - both}[mask.self_pair]
    return in_both if mask.target else in_self - in_both


def _admitted_over_ranks(
    term: Term,
    *,
    n: int,
    m: int,
    target: Tensor | None,
    device: torch.device,
    symmetric: bool,
    lengths: Tensor,
    rank: int,
) -> Tensor:
    """The same for this rank's rows (or columns) of the global matrix; tensor arithmetic, for torch.compile's sake."""
    rows, columns = lengths.sum(dim=1).unbind()
    row0, col0 = lengths[:, :rank].sum(dim=1).unbind()
    if symmetric:
        own = admitted_count(term, n=n, m=n, target=target, row0=0, col0=0, device=device)
        return own if term.mask.is_sparse else own + (rows - n)
    if term.axis is Axis.ROW:
        return admitted_count(term, n=n, m=columns, target=target, row0=row0, col0=0, device=device)
    if term.mask.target is not None:
        raise ValueError(f"bias must be None with {term}: how many targets a column has is known to no rank")
    return admitted_count(replace(term, axis=Axis.ROW), n=m, m=rows, target=None, row0=col0, col0=0, device=device)


def agreement(a: Tensor, b: Tensor | None, scale: float | Tensor, bias: float | Tensor | None) -> tuple[str, str, str]:
    """What the ranks must agree on besides the operands' dtype and dim, as lines name=value."""
    wanted = [x is not None and isinstance(x, Tensor) and x.requires_grad for x in (a, b, scale)]
    names = [name for name, want in zip(("rows", "keys", "scale"), wanted, strict=True) if want]
    gradients = ", ".join(names) if names and torch.is_grad_enabled() else "nothing"
    scale, bias = ("a tensor" if isinstance(value, Tensor) else value for value in (scale, bias))
    return f"gradient of={gradients}", f"scale={scale}", f"bias={bias}"


@torch.library.custom_op("fastcl::pairwise_statistics", mutates_args=())
def _statistics(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    tags: Sequence[Tensor | None],
    plan: str,
    norm_bound: float | None,
    row0: int,
    col0: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    engine.warn_if_ranks_are_apart()
    operands = Operands(a, b, scale, target, norm_bound, row0, col0, *split_tags(tags))
    return tuple(engine.statistics(Plan.decode(plan), operands, backend))


@_statistics.register_fake
def _(a, b, scale, target, tags, plan, norm_bound, row0, col0, backend):
    decoded, dtype = Plan.decode(plan), accumulation_dtype(a.dtype)
    n, m = a.shape[0], (a if b is None else b).shape[0]
    return a.new_empty((len(decoded.rows), n), dtype=dtype), a.new_empty((len(decoded.columns), m), dtype=dtype)


@torch.library.custom_op("fastcl::pairwise_gradient", mutates_args=())
def _gradient(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    tags: Sequence[Tensor | None],
    rows: Tensor,
    columns: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    plan: str,
    norm_bound: float | None,
    row0: int,
    col0: int,
    needs_a: bool,
    needs_b: bool,
    needs_scale: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = engine.gradient(
        Plan.decode(plan),
        Operands(a, b, scale, target, norm_bound, row0, col0, *split_tags(tags)),
        Statistics(rows, columns),
        Statistics(grad_rows, grad_columns),
        Needs(needs_a, needs_b, needs_scale),
        backend,
    )
    return tuple(scale.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_gradient.register_fake
def _(a, b, scale, target, tags, rows, columns, grad_rows, grad_columns, *options):
    *_, needs_a, needs_b, needs_scale, _ = options
    nothing = scale.new_empty(0)
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format) if needs_a else nothing,
        torch.empty_like(b, memory_format=torch.contiguous_format) if needs_b else scale.new_empty(0),
        torch.empty_like(scale) if needs_scale else scale.new_empty(0),
    )


def _save_for_gradient(ctx, inputs, output) -> None:
    a, b, scale, target, tags, *options = inputs
    ctx.save_for_backward(a, b, scale, target, *tags, *output)
    ctx.options = options


def _backward(ctx, grad_rows: Tensor, grad_columns: Tensor):
    *operands_and_tags, rows, columns = ctx.saved_tensors
    operands, tags = operands_and_tags[:4], operands_and_tags[4:]
    plan, norm_bound, row0, col0, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastcl.pairwise_gradient(
        *operands, tags, rows, columns, grad_rows, grad_columns, plan, norm_bound, row0, col0, *needs, backend
    )
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*wanted, *[None] * 7)


def refuse_double_backward(ctx, *grads: Tensor):
    """The derivative of a gradient."""
    raise RuntimeError(
        "fastcl's losses can be differentiated once: their gradient recomputes the logits tile by tile and has no "
        "derivative of its own. For second derivatives use the dense formula, `reference()` beside each loss."
    )


_statistics.register_autograd(_backward, setup_context=_save_for_gradient)
_gradient.register_autograd(refuse_double_backward)


def _check_operands(
    plan: Plan,
    a: Tensor,
    b: Tensor | None,
    scale: float | Tensor,
    target: Tensor | None,
    row0: int,
    col0: int,
    shards: bool,
) -> None:
    if shards and (row0 or col0):
        raise ValueError(f"row0 and col0 must be 0 with a group, whose ranks' order says it, got {row0} and {col0}")
    if b is None:
        check_matrix("a", a, may_be_empty=shards)
        if plan.columns:
            raise ValueError("terms must lie along rows when b is None, since S is symmetric; got a column term")
        if row0 != col0:
            raise ValueError(f"row0 and col0 must be equal when b is None, got {row0} and {col0}")
    else:
        check_pair("a", a, "b", b, same_rows=False, may_be_empty=shards)
    if not plan.terms:
        raise ValueError("terms must hold at least one Term, got none")
    check_scalar("scale", scale, positive=False)
    if target is not None:
        check_target("target", target, a)
    elif plan.tests("target"):
        raise ValueError("target must be given, because a term's mask tests it; got None")


def checked_tags(plan: Plan, a: Tensor, b: Tensor | None, tags: Tags, key_tags: Tags) -> list[Tensor | None]:
    """The tags that the plan's masks test: three of the rows, then three of the columns."""
    found: list[Tensor | None] = []
    for prefix, given, x, axis in (("tags", tags, a, Axis.ROW), ("key_tags", key_tags, b, Axis.COLUMN)):
        for name, tag, tested in zip(Tags._fields, given, plan.tags_tested(axis), strict=True):
            if not tested or x is None:
                found.append(None)
                continue
            is_integer = name != "threshold"
            check_row_vector(f"{prefix}.{name}", tag, x, integer=is_integer)
            found.append(tag.to(torch.int64) if is_integer else tag.detach().to(accumulation_dtype(a.dtype)))
    return found


def scalar_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor; a tensor keeps its gradient."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def autocast(x: Tensor) -> Tensor:
    """What torch.matmul would make of features under autocast; the scale is never cast, and float64 neither."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
