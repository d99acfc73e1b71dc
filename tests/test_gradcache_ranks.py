"""GradCache on two ranks: gradients are the mean over ranks, and each module reduces them once a step."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.losses.clip import reference
from tests.chunks import CHUNK, EXACT, Encoder, uncached

RANKS = 2
ROWS = (23, 17)
"""of each rank: not the same number of chunks"""


def clip(image: Tensor, text: Tensor) -> Tensor:
    return fastcl.clip_loss(image, text, 3.0, normalize=True)


def clip_of_all_ranks(image: Tensor, text: Tensor) -> Tensor:
    return fastcl.clip_loss(image, text, 3.0, normalize=True, group=dist.group.WORLD)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "own batch": (clip, False),
    "whole batch": (clip_of_all_ranks, True),
}
"""how each rank calls its loss, and whether that is the loss of the union of the ranks' batches"""

WRAPPED = ("modules", "functions", "shared", "one module", "accumulated")


class TwoTowers(nn.Module):
    """Both encoders as one module, which is called for one of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"image": Encoder(6), "text": Encoder(6)})

    def forward(self, x: Tensor, tower: str) -> Tensor:
        return self.towers[tower](x)


class Trainer:
    """A module that hides in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def encode(self, x: Tensor) -> Tensor:
        return self.model(x)


class Operators(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.called.append(str(operator))
        return operator(*args, **(kwargs or {}))


def batch(rank: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2, rows, 6, generator=generator, dtype=torch.float64).unbind()


def expected(
    encoders: list[Callable], parameters: list[Tensor], union: bool, steps: int, rows: tuple[int, ...]
) -> list:
    """Without ranks, wrappers and a cache: the mean over ranks, summed over steps."""
    total = torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        outputs = []
        for rank in range(RANKS):
            torch.manual_seed(rank + step)
            outputs.append([uncached(f)(x) for f, x in zip(encoders, batch(rank, step, rows[rank]), strict=True)])
        features = [[torch.cat(x) for x in zip(*outputs, strict=True)]] if union else outputs
        total = total + sum(reference(*x, 3.0, normalize=True).mean() for x in features) / len(features)
    return list(torch.autograd.grad(total, parameters))


def found(encoders: list[Callable], loss: Callable, steps: int, rows: tuple[int, ...], silent: list[nn.Module]) -> None:
    """The steps of this rank; until the last one, modules of ``silent`` reduce nothing."""
    cache, rank = fastcl.GradCache(encoders, loss, chunk_size=CHUNK), dist.get_rank()
    for step in range(steps):
        with ExitStack() as stack:
            for module in silent if step < steps - 1 else ():
                stack.enter_context(module.no_sync())
            torch.manual_seed(rank + step)
            cache(*batch(rank, step, rows[rank]))


def distributed_data_parallel(which: str, loss: str) -> None:
    """Every module reduces its gradients once, with the last chunk of the last encoder that it is."""
    (call, union), steps = LOSSES[loss], 2 if which == "accumulated" else 1
    modules = {"shared": [Encoder(6)], "one module": [TwoTowers()]}.get(which, [Encoder(6), Encoder(6)])
    parameters = [p for module in modules for p in module.parameters()]

    def encoders_of(modules: list[nn.Module]) -> list[Callable]:
        if which == "one module":
            return [functools.partial(modules[0], tower=tower) for tower in ("image", "text")]
        if which == "functions":
            first, second = modules
            return [lambda x: first(x), Trainer(second).encode]
        return modules * (2 // len(modules))

    judge = expected(encoders_of(modules), parameters, union, steps, ROWS)
    wrapped = [DistributedDataParallel(m, find_unused_parameters=which == "one module") for m in modules]
    reductions = [0] * len(wrapped)

    # Not annotated: torch wants the types themselves there, not their names.
    def count(module, bucket):
        reductions[module] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    for i, module in enumerate(wrapped):
        module.register_comm_hook(i, count)
    found(encoders_of(wrapped), call, steps, ROWS, wrapped)
    assert reductions == [1] * len(wrapped), reductions
    torch.testing.assert_close([p.grad for p in parameters], judge, **EXACT)


def fully_sharded(loss: str) -> None:
    """One reduce-scatter a step for each sharded group: a layer and the rest of each encoder."""
    call, union = LOSSES[loss]
    modules = [Encoder(6), Encoder(6)]
    rows = (ROWS[0],) * RANKS  # gathering parameters takes all ranks, in every chunk
    judge = expected(modules, [p for m in modules for p in m.parameters()], union, 1, rows)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for module in modules:
        fully_shard(module.layers[0], mesh=mesh)
        fully_shard(module, mesh=mesh)
    for _ in range(2):  # nothing of the first step may be left for the second
        for module in modules:
            module.zero_grad()
        with Operators() as operators:
            found(modules, call, 1, rows, [])
        reductions = [name for name in operators.called if "reduce_scatter" in name]
        assert len(reductions) == 4, reductions
        gradients = [p.grad.full_tensor() for module in modules for p in module.parameters()]
        torch.testing.assert_close(gradients, judge, **EXACT)


SCENARIOS = {
    f"{function.__name__} {' '.join(arguments)}": (function, arguments)
    for loss in LOSSES
    for function, arguments in (
        *((distributed_data_parallel, (which, loss)) for which in WRAPPED),
        (fully_sharded, (loss,)),
    )
}


def run_all(rank: int, folder: str) -> None:
    """What one rank does: all scenarios, so that its process is started once, and a file with their errors."""
    torch.set_num_threads(1)
    errors = {}
    for i, (name, (function, arguments)) in enumerate(SCENARIOS.items()):
        store = f"file://{folder}/store{i}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
        torch.manual_seed(0)
        try:
            function(*arguments)
        except Exception:
            errors[name] = traceback.format_exc()
        dist.destroy_process_group()
    Path(folder, f"errors{rank}.json").write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong on each rank, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_all, (str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"errors{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_two_ranks(scenario: str, errors: list[dict[str, str]]) -> None:
    assert [own[scenario] for own in errors if scenario in own] == []
