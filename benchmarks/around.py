"""What PyTorch does around the kernels, counted and not guessed: the losses run on fake tensors, which hold nothing.

Each operator's operands and results are bytes that go through memory, and their lifetimes give the peak.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import TAU, Case
from benchmarks.measure import gradient_step
from fastcl.backends.panels import TALLEST
from fastcl.backends.shift import fixed_shift
from fastcl.backends.softmax import narrowed, scale_gradient
from fastcl.cross_entropy import Options
from fastcl.terms import Needs, Operands, Plan, Products, Statistics, waiting_dtype

_PARTIAL_SLOTS = 32
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Counted:
    """Operators that compute, kernels of the backend's own besides those that look at S, the bytes all of these read
    and write, the FLOPs of the operators' products, bytes held at the peak."""

    operators: int
    kernels: int
    bytes: int
    product_flops: int
    peak: int


@functools.cache
def around_kernels(case: Case, workspace: int) -> Counted:
    """Value and gradients by fastcl on a GPU with this much workspace, without its kernels and the products with W."""
    return _count(case, lambda *inputs: case.table_row.call(*inputs, reduction="mean"), workspace)


@functools.cache
def dense(case: Case) -> Counted:
    """Value and gradients by the textbook formula in eager PyTorch."""
    return _count(case, lambda *inputs: case.table_row.reference(*inputs).mean(), 0)


def _count(case: Case, loss: Callable[..., Tensor], workspace: int) -> Counted:
    learned = case.cost.learns_scale
    with FakeTensorMode():
        features = [
            torch.empty(case.pairs, case.dim, dtype=case.torch_dtype, requires_grad=True)
            for _ in case.table_row.features
        ]
        tau = torch.empty((), requires_grad=True) if learned else TAU
        step = gradient_step(lambda *_: loss(features, tau), [*features, tau] if learned else features)
        with _Counter(workspace) as counter:
            step()
    return Counted(counter.operators, counter.kernels, counter.bytes, counter.product_flops, counter.peak)


class _Counter(TorchDispatchMode):
    """Counts operators; in place of fastcl's own it runs what the `triton` backend runs, with kernels left out."""

    def __init__(self, workspace: int) -> None:
        super().__init__()
        self.workspace = workspace
        self.operators = self.kernels = self.bytes = self.product_flops = self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastcl.cross_entropy.default:
            with self:
                return self._cross_entropy(*args)
        result = function(*args, **(kwargs or {}))
        operands, results = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (args, result))
        if function.is_view or not results:
            return result
        if "empty" not in function.__name__:
            self.operators += 1
            self.bytes += sum(_bytes(x) for x in (*operands, *results))
        if function is torch.ops.aten.mm.default:
            self.product_flops += 2 * results[0].numel() * operands[0].shape[1]
        self._remember(operands, results)
        return result

    def _remember(self, operands: list[Tensor], results: list[Tensor]) -> None:
        known = {x.untyped_storage()._cdata for x in operands}
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for storage in (x.untyped_storage() for x in results):
            if storage._cdata not in known:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def _cross_entropy(self, a, b, scale, target, positive, weights, text, tags):
        call = Options.decode(text)
        operands = Operands(a, b, scale, target, call.norm_bound)
        if call.normalize:
            operands = replace(operands, a=torch.empty_like(a), b=None if b is None else torch.empty_like(b))
            for x in (a,) if b is None else (a, b):
                self._kernel(x, x)
        else:
            fixed_shift(operands, scale)
        statistics = _statistics(call.plan, operands)
        needs, dtype = call.needs, waiting_dtype(a.dtype, _GPU)
        gradient_a = torch.empty(a.shape, dtype=dtype) if needs.a and needs.b else None
        products = self._products(operands, needs, keeps_rows=gradient_a is not None)
        slope = scale_gradient(call.plan, operands, products) if needs.scale else None
        del operands
        if gradient_a is not None:
            self._finish(a, gradient_a, call.normalize)
        elif needs.a:
            gradient_a = narrowed(products.a, dtype)
            self._finish(a, gradient_a, call.normalize)
        gradient_b = None
        if needs.b:
            gradient_b = narrowed(products.b, dtype)
            self._finish(b, gradient_b, call.normalize)
        self.kernels += 1
        loss = torch.empty(a.shape[0]).sum()
        gradients = gradient_a, gradient_b, slope, None if positive is None else torch.empty_like(positive)
        return loss, *statistics, *(scale.new_empty(0) if g is None else g for g in gradients)

    def _finish(self, x: Tensor, gradient: Tensor, normalize: bool) -> None:
        """A float32 product of the shape of ``x`` is turned into the gradient."""
        self.bytes += x.numel() * 4 + _bytes(gradient)
        if normalize:
            self._kernel(x)
        else:
            self.operators += 1

    def _kernel(self, *moved: Tensor) -> None:
        self.kernels += 1
        self.bytes += sum(_bytes(x) for x in moved)

    def _products(self, operands: Operands, needs: Needs, keeps_rows: bool) -> Products:
        """The float32 sums, of W @ B only a panel's rows where they are finished one panel after the other."""
        (n, d), m = operands.a.shape, operands.keys.shape[0]
        panel = min(self.workspace, n * m * operands.a.element_size())
        workspace = torch.empty(panel, dtype=torch.uint8)
        sum_a = torch.empty(min(n, TALLEST) if keeps_rows else n, d) if needs.product_a else None
        sum_b = torch.empty(m, d) if needs.b else None
        del workspace
        return Products(None if keeps_rows else sum_a, sum_b)


def _statistics(plan: Plan, operands: Operands) -> Statistics:
    sizes = [(len(terms), count) for terms, count in zip((plan.rows, plan.columns), operands.shape, strict=True)]
    for terms, count in sizes:
        torch.empty(terms, _PARTIAL_SLOTS, count)
    return Statistics(*(torch.empty(size) for size in sizes))


def _bytes(x: Tensor) -> int:
    # An expanded tensor repeats what it has.
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
