"""Which loss takes which option, and what computes it: the tables of docs/losses.md, from trying every call.

A call's plans and panel functions are caught where the engine selects a backend, and each backend is asked what it
says of them; a loss that gets there with neither is plain PyTorch.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastcl
from benchmarks.report import markdown_row
from fastcl import engine
from fastcl.losses.multiple_negatives import DIRECTIONS
from fastcl.terms import Plan

ROWS, DIM = 6, 4
OPTIONS = (
    "labels", "ids", "weight", "label_smoothing", "false_negative_margin", "label_width", "return_stats",
    "group", "exchange", "normalize", "reduction", "backend",
)  # fmt: skip
"""the keyword arguments that losses have in common"""


class Variant(NamedTuple):
    """A call of a loss, and the option that it is about."""

    loss: Callable[..., object]
    option: str
    call: Callable[..., object]


def variants() -> list[Variant]:
    """Every loss of pairs, plain and with the options that change what is computed."""
    x, y = torch.nn.functional.normalize(torch.randn(2, ROWS, DIM), dim=2)
    tags = torch.arange(ROWS) // 2
    labels, ids = {"labels": tags}, {"ids": tags}
    margin, smoothing = {"false_negative_margin": 0.1}, {"label_smoothing": 0.1}

    def of(loss: Callable[..., object], *arguments: object, **options: dict[str, object]) -> list[Variant]:
        plain = Variant(loss, "", lambda **o: loss(*arguments, **o))
        return [plain] + [
            Variant(loss, name.replace("_", " "), lambda given=given, **o: loss(*arguments, **given, **o))
            for name, given in options.items()
        ]

    return [
        *of(fastcl.nt_xent, x, y, 0.5, labels=labels, ids=ids, margin=margin, label_smoothing=smoothing),
        *of(
            fastcl.info_nce,
            x,
            y,
            0.5,
            target={"target": tags},
            negatives={"negatives": y},
            negatives_of_each_query={"negatives": y[:, None]},
            labels=labels,
            ids=ids,
            margin=margin,
            label_smoothing=smoothing,
        ),
        *of(fastcl.clip_loss, x, y, 2.0, labels=labels, ids=ids, margin=margin, label_smoothing=smoothing),
        *of(fastcl.clip_distillation_loss, x, y, 2.0, x, y, 3.0, ids=ids),
        *of(fastcl.sup_con_loss, x, tags, 0.5, ids=ids),
        *of(fastcl.dcl_loss, x, y, 0.5, ids=ids),
        *of(fastcl.macl_loss, x, y, 0.5, ids=ids),
        *of(fastcl.debiased_loss, x, y, 0.5, 0.1, ids=ids),
        *of(fastcl.hard_negative_loss, x, y, 0.5, 0.1, 1.0, ids=ids),
        *of(fastcl.alpha_cl_loss, x, y, 0.5),
        *of(fastcl.multiple_negatives_ranking_loss, x, y, 0.5, all_directions={"directions": DIRECTIONS}, ids=ids),
        *of(fastcl.siglip_loss, x, y, 2.0, -1.0),
        *of(fastcl.binary_nce_loss, x, y, 0.5),
        *of(fastcl.spectral_contrastive_loss, x, y, ids=ids),
        *of(fastcl.contrastive_loss, x, tags, 0.1, 0.9),
        *of(fastcl.triplet_loss, x, tags, swap={"mining": "hard", "swap": True}),
        *of(fastcl.lifted_structure_loss, x, tags),
    ]


class Caught(NamedTuple):
    """What a call asked of the engine: its plans, and the kernels that its panel functions have (None for none)."""

    plans: list[Plan]
    kernels: list[str | None]


def catch(call: Callable[[], object]) -> Caught:
    """What a call asks of the engine."""
    found = Caught([], [])
    select, select_panels = engine.select, engine.select_panels

    def spy(plan: Plan, *arguments: object) -> object:
        found.plans.append(plan)
        return select(plan, *arguments)

    def spy_on_panels(kernel: str | None, *arguments: object) -> object:
        found.kernels.append(kernel)
        return select_panels(kernel, *arguments)

    engine.select, engine.select_panels = spy, spy_on_panels
    try:
        call()
    finally:
        engine.select, engine.select_panels = select, select_panels
    return found


def page_tables() -> dict[str, str]:
    """By the name of the marker in docs/losses.md."""
    return {"options": options_table(), "backends": backends_table()}


def options_table() -> str:
    """Losses down, common options across."""
    losses = dict.fromkeys(variant.loss for variant in variants())
    lines = [markdown_row("loss", *(f"`{name}`" for name in OPTIONS)), markdown_row(*["---"] * (len(OPTIONS) + 1))]
    for loss in losses:
        parameters = inspect.signature(loss).parameters
        lines.append(markdown_row(f"`{loss.__name__}`", *("yes" if name in parameters else "-" for name in OPTIONS)))
    return "\n".join(lines)


def backends_table() -> str:
    """Losses and options down, backends across, with the reasons for what is refused below."""
    names = list(engine.BACKENDS)
    lines = [markdown_row("call", *(f"`{name}`" for name in names)), markdown_row(*["---"] * (len(names) + 1))]
    reasons: dict[str, int] = {}
    for variant in variants():
        caught = catch(variant.call)
        cells = []
        for name in names:
            reason = _reason(name, caught)
            cells.append("yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        option = variant.option and f", {variant.option}"
        lines.append(markdown_row(f"`{variant.loss.__name__}`{option}", *cells))
    notes = [f"({number}) {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def _reason(name: str, caught: Caught) -> str | None:
    if not caught.plans and not caught.kernels:
        return "no backend takes part: a few batched products of PyTorch compute it on any device"
    of_plans = map(engine.BACKENDS[name].refuses, caught.plans)
    of_panels = (engine.refuses_panels(name, kernel) for kernel in caught.kernels)
    return next(filter(None, itertools.chain(of_plans, of_panels)), None)
