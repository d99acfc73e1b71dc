"""The vocabulary every loss is written in: which pairs count, how they are reduced, and over what operands.

A leaf module: it imports torch, for annotations, dtypes and its setting of precision, and nothing else of fastcl. A
:class:`Plan` is a few :class:`Term`\\ s over ``S = scale * A @ B.T``; a backend computes all of a plan's terms in one
sweep over tiles of S.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Reduce(enum.Enum):
    """How the admitted pairs of a row (or column) become one number."""

    LSE = "lse"
    """log-sum-exp of the logits; -inf where no pair is admitted"""
    SUM = "sum"
    """sum of the logits; 0 where no pair is admitted"""
    MAX = "max"
    """largest logit, without a gradient; -inf where no pair is admitted"""


class Axis(enum.Enum):
    """Whether a term yields one number for each row of S or for each column."""

    ROW = "row"
    COLUMN = "column"


AXES = (Axis.ROW, Axis.COLUMN)
"""both, as a tuple: torch.compile of torch 2.11 can't go through an enumeration"""


@dataclass(frozen=True)
class Mask:
    """An AND of tests on the pair (i, j): each is absent (None), required (True) or forbidden (False).

    ``self_pair`` tests ``i + row0 == j + col0``; ``target`` tests ``j + col0 == target[i]``; ``label`` tests
    ``|label of i - label of j| <= label_width`` (equality, unless the plan has a width); ``id`` tests the equality of
    ids; ``above`` tests ``scale * <a[i], b[j]> > threshold`` of the row, or of the column for a term along columns.
    """

    self_pair: bool | None = None
    target: bool | None = None
    label: bool | None = None
    id: bool | None = None
    above: bool | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether a row admits only the few pairs that a test names, instead of all but those."""
        return bool(self.self_pair or self.target)

    @property
    def names_pairs(self) -> bool:
        """Whether the self pair and the target are all that is tested, at most two columns of each row."""
        return self.label is None and self.id is None and self.above is None

    def encode(self) -> str:
        """The tests that are not absent, with their signs."""
        tests = ((test.name, getattr(self, test.name)) for test in fields(self))
        return ",".join(f"{'+' if wanted else '-'}{name}" for name, wanted in tests if wanted is not None)

    @staticmethod
    def decode(text: str) -> Mask:
        """The inverse of :meth:`encode`."""
        return Mask(**{test[1:]: test[0] == "+" for test in text.split(",") if test})


@dataclass(frozen=True)
class Term:
    """One reduction of the logits along one axis, over the pairs its mask admits."""

    reduce: Reduce
    mask: Mask = field(default_factory=Mask)
    axis: Axis = Axis.ROW


@dataclass(frozen=True)
class Plan:
    """The terms one loss needs; ``symmetric`` means B is A, so that only half of S has to be looked at.

    ``label_width`` is how far two labels may be apart and still pass a mask's test of ``label``.
    """

    terms: tuple[Term, ...]
    symmetric: bool = False
    label_width: int = 0

    @property
    def rows(self) -> tuple[Term, ...]:
        """The terms along rows, in the order of the rows of ``Statistics.rows``."""
        return tuple(term for term in self.terms if term.axis is Axis.ROW)

    @property
    def columns(self) -> tuple[Term, ...]:
        """The terms along columns, in the order of the rows of ``Statistics.columns``."""
        return tuple(term for term in self.terms if term.axis is Axis.COLUMN)

    def tests(self, name: str) -> bool:
        """Whether any mask of the plan has the test of this name."""
        return any(getattr(term.mask, name) is not None for term in self.terms)

    def tags_tested(self, axis: Axis) -> tuple[bool, bool, bool]:
        """Which of an axis' labels, ids and threshold any mask looks at."""
        thresholds = any(term.mask.above is not None for term in self.terms if term.axis is axis)
        return self.tests("label"), self.tests("id"), thresholds

    @property
    def names_pairs(self) -> bool:
        """Whether no mask tests more than the self pair and the target."""
        return all(term.mask.names_pairs for term in self.terms)

    def encode(self) -> str:
        """The plan as a string, the form in which it crosses into a torch operator.

        >>> Plan((Term(Reduce.LSE, Mask(self_pair=False)),), symmetric=True).encode()
        'symmetric lse:row:-self_pair'
        """
        kind = "symmetric" if self.symmetric else "general"
        terms = (f"{term.reduce.value}:{term.axis.value}:{term.mask.encode()}" for term in self.terms)
        return " ".join((f"{kind}~{self.label_width}" if self.label_width else kind, *terms))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def decode(text: str) -> Plan:
        """The inverse of :meth:`encode`."""
        head, *codes = text.split(" ")
        kind, _, width = head.partition("~")
        terms = []
        for code in codes:
            reduce, axis, tests = code.split(":")
            terms.append(Term(Reduce(reduce), Mask.decode(tests), Axis(axis)))
        return Plan(tuple(terms), symmetric=kind == "symmetric", label_width=int(width or 0))


class Tags(NamedTuple):
    """What masks test about the rows of one operand: int64 labels and ids, and logits as thresholds, [rows] each."""

    labels: Tensor | None = None
    ids: Tensor | None = None
    threshold: Tensor | None = None

    def part(self, rows: slice) -> Tags:
        """The tags of some of the rows."""
        return Tags(*(None if tag is None else tag[rows] for tag in self))


NO_TAGS = Tags()


def split_tags(tags: Sequence[Tensor | None]) -> tuple[Tags, Tags]:
    """The rows' tags and the columns' from the form in which they cross into an operator."""
    half = len(Tags._fields)
    return Tags(*tags[:half]), Tags(*tags[half:])


@dataclass(frozen=True)
class Operands:
    """What a plan is computed over: S[i, j] = scale * <a[i], b[j]>, with b = a where ``b`` is None.

    ``a`` is [N, D] and ``b`` [M, D], of one dtype and device; ``scale`` is 0-d in the accumulation dtype; ``target`` is
    int64 [N] or None. ``norm_bound`` is an upper bound of ``|a[i]| * |b[j]|`` where the caller knows one (1 for unit
    vectors). ``row0`` and ``col0`` are the global indices of ``a[0]`` and ``b[0]`` when these are shards.
    ``row_tags`` and ``column_tags`` hold what masks test about the rows of a and of b.
    """

    a: Tensor
    b: Tensor | None
    scale: Tensor
    target: Tensor | None = None
    norm_bound: float | None = None
    row0: int = 0
    col0: int = 0
    row_tags: Tags = NO_TAGS
    column_tags: Tags = NO_TAGS

    @property
    def keys(self) -> Tensor:
        """``b``, or ``a`` where the plan is symmetric."""
        return self.a if self.b is None else self.b

    @property
    def key_tags(self) -> Tags:
        """The tags of ``keys``."""
        return self.row_tags if self.b is None else self.column_tags

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M), the shape of S."""
        return self.a.shape[0], self.keys.shape[0]

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.a.dtype)


@dataclass(frozen=True)
class CrossEntropy:
    """The one number that a softmax loss makes of a plan's statistics, with all that is known before the sweep.

    Each LSE term L of the plan, over negatives only, stands for the losses softplus(L[i] - positive[i]). The loss of i
    is their mean over the LSE terms, times ``weights[i]`` where given; the number is the sum over i, divided by N where
    ``mean``. ``positive`` [N] is the positives' logits, or None where the plan's SUM term is. With ``normalize`` the
    rows of a and b are scaled to unit length first, and gradients are with respect to the rows as they were given.
    """

    positive: Tensor | None = None
    weights: Tensor | None = None
    mean: bool = True
    normalize: bool = False

    def factor(self, plan: Plan, rows: int) -> float:
        """What softplus(L[i] - positive[i]) is multiplied by in the number, but for the weights."""
        count = sum(term.reduce is Reduce.LSE for term in plan.terms)
        return 1.0 / (count * rows) if self.mean else 1.0 / count


class Needs(NamedTuple):
    """Which gradients are wanted."""

    a: bool
    b: bool
    scale: bool
    positive: bool = False

    @property
    def product_a(self) -> bool:
        """Whether W @ B has to be formed: the scale's gradient falls out of either product."""
        return self.a or (self.scale and not self.b)


class Statistics(NamedTuple):
    """What a sweep yields: ``rows`` [len(plan.rows), N] and ``columns`` [len(plan.columns), M]."""

    rows: Tensor
    columns: Tensor


class Products(NamedTuple):
    """The gradient's two products in the accumulation dtype, None where nobody asked.

    With W[i, j] = sum over terms of (incoming gradient) * (slope of the term at S[i, j]): ``a`` is W @ B [N, D] and
    ``b`` is W.T @ A [M, D]. A symmetric plan has one operand, so ``a`` is (W + W.T) @ A and ``b`` is None.
    """

    a: Tensor | None
    b: Tensor | None


class Gradients(NamedTuple):
    """Gradients of a, b and the scale, None where nobody asked."""

    a: Tensor | None
    b: Tensor | None
    scale: Tensor | None


class LossAndGradients(NamedTuple):
    """What a :class:`CrossEntropy` comes to, with its gradients in the accumulation dtype or in ``waiting_dtype``."""

    loss: Tensor
    statistics: Statistics
    gradients: Gradients
    positive: Tensor | None


@dataclass(frozen=True)
class PanelOperands:
    """What a panel function (:mod:`fastcl.panels`) is computed over: S = scale * A @ B.T + bias, and more.

    ``a`` is [N, D] and ``b`` [M, D] or None for ``a``; ``scale`` and ``bias`` are 0-d in the accumulation dtype.
    ``row_params`` [P, N] and ``column_params`` [Q, M] are float parameters. The own key of row i is the column
    ``row0 + i``, where ``row0`` is 0-d or None for 0. ``guide`` is the features and the scale of a second S, or empty.
    """

    a: Tensor
    b: Tensor | None
    scale: Tensor
    bias: Tensor
    row_params: Tensor | None
    column_params: Tensor | None
    row0: Tensor | None
    tags: Tags
    key_tags: Tags
    numbers: Sequence[float] = ()
    guide: Sequence[Tensor] = ()

    @property
    def keys(self) -> Tensor:
        """``b``, or ``a`` where there is one operand."""
        return self.a if self.b is None else self.b

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M), the shape of S."""
        return len(self.a), len(self.keys)


class PanelNeeds(NamedTuple):
    """What is wanted of a kernel that stands for a panel function: its values, and gradients of its operands."""

    a: bool
    b: bool
    scale: bool
    bias: bool
    row_params: bool
    column_params: bool
    values: bool = True

    @property
    def product_a(self) -> bool:
        """Whether W @ B has to be formed: the scale's gradient falls out of either product."""
        return self.a or (self.scale and not self.b)


NO_GRADIENTS = PanelNeeds(False, False, False, False, False, False)


class PanelGradients(NamedTuple):
    """What such a kernel yields in the accumulation dtype, None where nobody asked; ``values`` are [outputs, N]."""

    a: Tensor | None
    b: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    row_params: Tensor | None
    column_params: Tensor | None
    values: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def waiting_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a gradient of features waits for the factor that backward brings.

    bfloat16 has float32's range, so that waiting in it costs one rounding more and saves half of the memory that a
    device is short of. In float16 a gradient of about 1/N that a loss scaler has yet to multiply would be lost.
    """
    narrow = dtype is torch.bfloat16 and device.type != "cpu"
    return torch.bfloat16 if narrow else accumulation_dtype(dtype)


def wants_tf32() -> bool:
    """Whether a GPU's products of float32 may round their operands to tf32, as ``torch.mm`` does there.

    ``torch.get_float32_matmul_precision`` raises where the precision was set for a backend, but tracers can read it.
    """
    if torch.compiler.is_compiling():
        return torch.get_float32_matmul_precision() != "highest"
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
