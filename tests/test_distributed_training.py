"""What surrounds a loss over many ranks: DDP, FSDP2, torch.compile, modules, and the conventions of the packages that
users come from. Every function whose first argument is ``rank`` runs on each rank of a gloo world.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastcl
from benchmarks.peers import import_peer
from fastcl import engine
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference
from tests.ranks import World

EXACT = 1e-10
DIM = 6
PAIRS = [5, 3]


@pytest.fixture
def two(worlds: Callable[[int], World]) -> World:
    return worlds(2)


class Model(nn.Module):
    """Two encoders and a scale and bias of the loss, as in CLIP and SigLIP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, DIM)).double()
        self.text = nn.Linear(DIM, DIM).double()
        self.log_scale = nn.Parameter(torch.tensor([0.9], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-0.4], dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.image(images), self.text(texts), self.log_scale.exp()[0], self.bias[0]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(PAIRS), DIM, generator=generator, dtype=torch.float64)
    return images, images + 0.5 * torch.randn(sum(PAIRS), DIM, generator=generator, dtype=torch.float64)


def train(model: nn.Module, batch: list[Tensor], loss: Callable[..., Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    curve = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(*model(*batch))
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


def curves(rank: int, wrap: str) -> tuple[list[float], list[float]]:
    """Five steps of one process with the global batch, and of the ranks with their shards."""
    alone = Model()
    expected = train(alone, list(data()), lambda *outputs: clip_reference(*outputs).mean())
    model = Model()
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for module in (model.image, model.text, model):
            wrapped = fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    shard = [x.split(PAIRS)[rank] for x in data()]
    found = train(wrapped, shard, lambda *outputs: fastcl.clip_loss(*outputs, group=dist.group.WORLD))
    for x, y in zip(model.parameters(), alone.parameters(), strict=True):
        x = x.full_tensor() if wrap == "fsdp2" else x
        torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)
    return expected, found


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_training_is_that_of_one_process_with_the_global_batch(two: World, wrap: str) -> None:
    for expected, found in two.run(curves, wrap):
        assert found == pytest.approx(expected, rel=EXACT)
        assert found[-1] < found[0]


def compiled(rank: int, backend: str) -> None:
    torch._dynamo.reset()
    model, shard = Model(), [x.split(PAIRS)[rank] for x in data()]

    def step(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = fastcl.clip_loss(*model(images, texts), return_stats=True, group=dist.group.WORLD)
        return loss + fastcl.nt_xent(images, model.text(texts), 0.2, group=dist.group.WORLD), stats.accuracy

    results = []
    for run in (step, torch.compile(step, backend=backend, fullgraph=True)):
        model.zero_grad()
        loss, accuracy = run(*shard)
        loss.backward()
        results.append((loss.detach(), accuracy, *(x.grad.clone() for x in model.parameters())))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)


def test_compile_does_not_break_the_graph(two: World) -> None:
    two.run(compiled, "aot_eager")


def check_modules(rank: int) -> None:
    group, (x, y) = dist.group.WORLD, data()
    shard = [t.split(PAIRS)[rank] for t in (x, y)]
    for criterion, alone, expected in (
        (fastcl.nn.NTXentLoss(0.3, group=group), fastcl.nn.NTXentLoss(0.3), nt_xent_reference(x, y, 0.3).mean()),
        (fastcl.nn.InfoNCELoss(0.3, group=group, exchange="ring"), fastcl.nn.InfoNCELoss(0.3), None),
        (fastcl.nn.ClipLoss(0.3, group=group), fastcl.nn.ClipLoss(0.3), clip_reference(x, y, 1 / 0.3).mean()),
    ):
        # The temperature of a module is a float32 parameter.
        torch.testing.assert_close(criterion(*shard), alone(x, y), rtol=EXACT, atol=EXACT)
        if expected is not None:
            torch.testing.assert_close(criterion(*shard), expected, rtol=1e-6, atol=1e-6)


def test_modules(two: World) -> None:
    two.run(check_modules)


def warnings_of(rank: int) -> tuple[int, int]:
    counts = []
    for group in (dist.group.WORLD, None):
        engine._warn_of_ranks.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastcl.nt_xent(*data(), 0.2, group=group)
        counts.append(sum("negatives are not shared" in str(each.message) for each in caught))
    return counts[0], counts[1]


def test_only_a_loss_without_group_warns(two: World) -> None:
    assert two.run(warnings_of) == [(0, 1)] * 2


def check_arguments(rank: int) -> None:
    shard = data()
    with pytest.raises(TypeError, match=r"group must be None or a torch\.distributed\.ProcessGroup"):
        fastcl.clip_loss(*shard, 2.0, group="world")
    with pytest.raises(ValueError, match="exchange must be one of 'auto', 'ring', 'gather', got 'mesh'"):
        fastcl.clip_loss(*shard, 2.0, group=dist.group.WORLD, exchange="mesh")
    with pytest.raises(ValueError, match="row0 and col0 must be 0 with a group"):
        fastcl.pairwise(*shard, [fastcl.Term(fastcl.Reduce.LSE)], row0=3, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"text_features must have the same shape, got \(0, 6\)"):
        fastcl.clip_loss(shard[0][:0], shard[1], 2.0, group=dist.group.WORLD)


def test_arguments(two: World) -> None:
    two.run(check_arguments)


class Shares:
    """How a package's gradients, after the mean over ranks, relate to those of the loss of the global batch."""

    def __init__(
        self, loss: Tensor, exact_loss: Tensor, features: list[Tensor], exact: list[Tensor], scale=None
    ) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        inputs = [*features, *([] if scale is None else [scale])]
        gradients = list(torch.autograd.grad(loss, inputs))
        exact_gradients = list(torch.autograd.grad(exact_loss, exact))
        if scale is not None:
            theirs = gradients.pop()
            dist.all_reduce(theirs)
            self.scale = (theirs / size / exact_gradients.pop()).item()
        theirs = torch.cat(gradients) / size
        wanted = torch.cat([x.chunk(size)[rank] for x in exact_gradients])
        self.features = (theirs * wanted).sum().item() / (wanted * wanted).sum().item()
        self.error = ((theirs - self.features * wanted).norm() / wanted.norm()).item()
        self.value = (loss / exact_loss).item()


def equal_shards() -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of the global batch, and of this rank's half."""
    exact = [nn.functional.normalize(x, dim=1).requires_grad_() for x in data()]
    return exact, [x.detach().chunk(2)[dist.get_rank()].clone().requires_grad_() for x in exact]


def open_clip(rank: int, local_loss: bool, gather_with_grad: bool) -> Shares | str:
    try:
        criterion = import_peer("open_clip.loss").ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=2)
    except ModuleNotFoundError as error:
        return str(error)
    exact, features = equal_shards()
    scales = [torch.tensor(6.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = criterion(*features, scales[1])
    return Shares(loss, clip_reference(*exact, scales[0]).mean(), features, [*exact, scales[0]], scales[1])


@pytest.mark.parametrize(
    ("local_loss", "gather_with_grad", "features", "scale"),
    [(False, False, 0.5, 1.0), (False, True, 1.0, 1.0), (True, True, 1.0, 1.0), (True, False, None, 1.0)],
)
def test_convention_of_open_clip(two: World, local_loss: bool, gather_with_grad: bool, features, scale) -> None:
    for shares in two.run(open_clip, local_loss, gather_with_grad):
        if isinstance(shares, str):
            pytest.skip(f"open_clip is not installed: {shares}")
        if features is None:
            assert shares.error > 0.1, "no multiple of the gradient"
        else:
            assert shares.features == pytest.approx(features)
            assert shares.error < 1e-6
        if not local_loss:
            assert shares.value == pytest.approx(1.0)
        assert shares.scale == pytest.approx(scale)


def lightly(rank: int) -> Shares | str:
    try:
        criterion = import_peer("lightly.loss").NTXentLoss(temperature=0.3, gather_distributed=True)
    except ModuleNotFoundError as error:
        return str(error)
    exact, features = equal_shards()
    shares = Shares(criterion(*features), nt_xent_reference(*exact, 0.3).mean(), features, exact)
    ours = fastcl.nt_xent(*features, 0.3, group=dist.group.WORLD)
    torch.testing.assert_close(ours, nt_xent_reference(*exact, 0.3).mean(), rtol=EXACT, atol=EXACT)
    return shares


def test_convention_of_lightly(two: World) -> None:
    of_ranks = two.run(lightly)
    for shares in of_ranks:
        if isinstance(shares, str):
            pytest.skip(f"lightly is not installed: {shares}")
        assert shares.features == pytest.approx(1.0)
        assert shares.error < 1e-6
    assert sum(shares.value for shares in of_ranks) / 2 == pytest.approx(1.0)
    assert of_ranks[0].value != pytest.approx(of_ranks[1].value), "each rank reports the mean of its own rows"
