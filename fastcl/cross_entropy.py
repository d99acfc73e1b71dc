"""The softmax losses as one operator: value and gradients together, from as few sweeps as the backend can.

May import :mod:`fastcl.terms`, :mod:`fastcl.engine` and :mod:`fastcl.pairwise`. A loss that is one number, a sum over
rows whose weights are known before the sweep, needs no second operator call for its gradient; one that looks along rows
only needs no second look at S either. The gradients are made with the value, where a gradient is recorded at all, and
wait for the factor that backward brings, in :func:`fastcl.terms.waiting_dtype`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import engine
from fastcl.pairwise import autocast, checked_tags, refuse_double_backward, scalar_tensor
from fastcl.terms import (
    NO_TAGS,
    Axis,
    CrossEntropy,
    Needs,
    Operands,
    Plan,
    Tags,
    Term,
    accumulation_dtype,
    split_tags,
    waiting_dtype,
)


def cross_entropy(
    a: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    scale: float | Tensor = 1.0,
    *,
    positive: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    target: Tensor | None = None,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    label_width: int = 0,
    norm_bound: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The softmax cross entropy over the pairs of S, and the statistics it comes from.

    With :math:`S_{ij} = \text{scale}\,\langle a_i, b_j\rangle`, each LSE term :math:`L` of ``terms``, whose mask admits
    negatives only, and the positive's logit :math:`p_i`,

    .. math:: \sum_i w_i \,\text{softplus}(L_i - p_i) = \sum_i w_i \log\bigl(1 + e^{L_i - p_i}\bigr),

    averaged over the LSE terms, and over i for ``reduction="mean"``.

    Args:
        a, b, scale, target, tags, key_tags, label_width, norm_bound, backend: as in :func:`fastcl.pairwise.pairwise`.
        terms: LSE terms of the negatives, one SUM term along rows that is the positive's logit (unless ``positive`` is
            given), and any MAX terms. Terms along columns need as many columns as rows.
        positive: [N], the positives' logits, which may require grad.
        weights: [N], a constant weight for each row (and column); a row of weight 0 has no say at all.
        reduction: "mean" or "sum" over i.
        normalize: scale the rows of a and b to unit length first.

    Returns:
        The loss (0-d), and the value of each term, without gradient.

    Raises:
        RuntimeError: a second derivative is asked for. That the arguments fit is the caller's to check.

    Complexity: with P = N * M * D multiply-adds, value and gradients take 2 P with ``b=None``, 3 P for terms along rows
    only (2 P if only one of a and b requires grad), 4 P otherwise, and O(N + M) memory beyond a copy of a and b where
    ``normalize``, gradients that wait for backward, and float32 sums for them. Without gradients half a P or one.

    >>> import torch
    >>> from fastcl.terms import Mask, Reduce, Term
    >>> terms = [Term(Reduce.LSE, Mask(self_pair=False)), Term(Reduce.SUM, Mask(self_pair=True))]
    >>> loss, _ = cross_entropy(torch.eye(3), torch.eye(3), terms)  # log(1 + 2 / e)
    >>> round(loss.item(), 4)
    0.5514
    """
    plan = Plan(tuple(terms), symmetric=b is None, label_width=label_width)
    all_tags = checked_tags(plan, a, b, tags, key_tags)
    dtype = accumulation_dtype(a.dtype)
    a, b = autocast(a), None if b is None else autocast(b)
    scale = scalar_tensor(scale, dtype, a.device)
    recorded = torch.is_grad_enabled()
    needs = Needs(*(recorded and x is not None and x.requires_grad for x in (a, b, scale, positive)))
    options = Options(plan, reduction == "mean", normalize, norm_bound, needs, backend)
    target = None if target is None else target.to(torch.int64)
    # The operator is for tracers. Plain tensors skip it: the call alone takes longer than a batch of 32 does.
    traced = torch.compiler.is_compiling() or type(a) not in (Tensor, torch.nn.Parameter)
    loss, rows, columns, *_ = _ValueAndGradients.apply(
        a, b, scale, target, positive, weights, options.encode() if traced else options, all_tags
    )
    values = {Axis.ROW: iter(rows.unbind()), Axis.COLUMN: iter(columns.unbind())}
    return loss, tuple(next(values[term.axis]) for term in plan.terms)


class Options(NamedTuple):
    """All that is not a tensor; in one string for the operator, on whose every argument torch spends time."""

    plan: Plan
    mean: bool
    normalize: bool
    norm_bound: float | None
    needs: Needs
    backend: str | None

    def encode(self) -> str:
        flags = "".join("01"[flag] for flag in (self.mean, self.normalize, *self.needs))
        return f"{flags}|{self.norm_bound!r}|{self.backend or ''}|{self.plan.encode()}"

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def decode(text: str) -> Options:
        flags, norm_bound, backend, plan = text.split("|")
        mean, normalize, *needs = (flag == "1" for flag in flags)
        bound = None if norm_bound == "None" else float(norm_bound)
        return Options(Plan.decode(plan), mean, normalize, bound, Needs(*needs), backend or None)


SevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _compute(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    positive: Tensor | None,
    weights: Tensor | None,
    options: Options,
    tags: Sequence[Tensor | None],
) -> SevenTensors:
    """The loss, its statistics, and the gradients of a, b, scale and positive, empty where not needed."""
    found = engine.cross_entropy(
        options.plan,
        Operands(a, b, scale, target, 1.0 if options.normalize else options.norm_bound, 0, 0, *split_tags(tags)),
        CrossEntropy(positive, weights, options.mean, options.normalize),
        options.needs,
        options.backend,
    )
    dtype = waiting_dtype(a.dtype, a.device)
    matrices = (scale.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in found.gradients[:2])
    others = (scale.new_empty(0) if g is None else g for g in (found.gradients.scale, found.positive))
    return found.loss, *found.statistics, *matrices, *others


@torch.library.custom_op("fastcl::cross_entropy", mutates_args=())
def _operator(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    positive: Tensor | None,
    weights: Tensor | None,
    options: str,
    tags: Sequence[Tensor | None],
) -> SevenTensors:
    return _compute(a, b, scale, target, positive, weights, Options.decode(options), tags)


@_operator.register_fake
def _(a, b, scale, target, positive, weights, options, tags):
    call, dtype = Options.decode(options), accumulation_dtype(a.dtype)
    plan, n, m = call.plan, a.shape[0], (a if b is None else b).shape[0]
    waiting = waiting_dtype(a.dtype, a.device)

    def gradient_of(x: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        return scale.new_empty(x.shape if needed else (0,), dtype=dtype)

    return (
        scale.new_empty((), dtype=dtype),
        scale.new_empty((len(plan.rows), n), dtype=dtype),
        scale.new_empty((len(plan.columns), m), dtype=dtype),
        *map(gradient_of, (a, b, scale, positive), call.needs, (waiting, waiting, dtype, dtype)),
    )


class _ValueAndGradients(torch.autograd.Function):
    """The derivative; as a class it costs a small batch less than registered with the operator."""

    @staticmethod
    def forward(a, b, scale, target, positive, weights, options, tags):
        run = torch.ops.fastcl.cross_entropy if isinstance(options, str) else _compute
        return run(a, b, scale, target, positive, weights, options, tags)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, scale, _, positive, *_ = inputs
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, scale, positive, *others[2:])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        a, b, scale, positive, *gradients = ctx.saved_tensors
        results = [None] * 8
        for at, x, gradient in zip((0, 1, 2, 4), (a, b, scale, positive), gradients, strict=True):
            if ctx.needs_input_grad[at] and grad_loss is not None:
                if torch.is_grad_enabled():
                    results[at] = (FirstDerivative.apply(gradient, x) * grad_loss).to(x.dtype)
                else:
                    # no third copy in a wider dtype
                    factor = grad_loss
                    if gradient.dtype is not factor.dtype:
                        factor = factor.reshape((1,) * gradient.dim())  # one without dimensions would be rounded
                    results[at] = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=x.dtype))
        return tuple(results)


# torch asks for the signature at every call, and finds one that is kept much faster.
_ValueAndGradients.forward.__signature__ = inspect.signature(_ValueAndGradients.forward)


class FirstDerivative(torch.autograd.Function):
    """A gradient that depends on ``x`` in a way that autograd doesn't know: its own derivative is refused."""

    @staticmethod
    def forward(gradient, x):
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward(ctx, *grads)
