"""The diagnostics against dense formulas in float64, and the surrogate bounds on data where both losses are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastcl import diagnostics
from tests.cases import available_backends


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    x = F.normalize(torch.randn(40, 5, dtype=torch.float64), dim=1)
    return x.requires_grad_(), F.normalize(x.detach() + 0.6 * torch.randn_like(x), dim=1).requires_grad_()


def test_retrieval_is_a_rank_in_the_whole_matrix(pair) -> None:
    query, key = pair
    s, ks = (query @ key.T).detach(), (1, 3, 8)
    found = diagnostics.retrieval_accuracy(query, key, ks)
    for accuracy, matrix in ((found.query_to_key, s), (found.key_to_query, s.T)):
        places = matrix.argsort(dim=1, descending=True).argsort(dim=1).diagonal()
        expected = torch.tensor([(places < k).double().mean() for k in ks]).double()
        torch.testing.assert_close(accuracy, expected)
        assert 0 < accuracy[0] < accuracy[2] < 1


def test_retrieval_of_duplicates_and_of_collapsed_features(pair) -> None:
    query, key = (torch.cat((x, x)).detach() for x in pair)
    ids = torch.arange(40).repeat(2)
    once = diagnostics.retrieval_accuracy(*pair, (1,))
    torch.testing.assert_close(diagnostics.retrieval_accuracy(query, key, (1,), ids=ids), once)
    assert diagnostics.retrieval_accuracy(query, key, (1,)).query_to_key < once.query_to_key
    constant = torch.ones(6, 3)  # a tie is a miss
    assert diagnostics.retrieval_accuracy(constant, constant, (5, 6)).key_to_query.tolist() == [0, 1]


def test_entropy(pair) -> None:
    query, key = pair
    p = (query @ key.T / 0.2).softmax(dim=1)
    expected, found = -(p * p.log()).sum(dim=1), diagnostics.softmax_entropy(query, key, 0.2, normalize=False)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(40, dtype=torch.float64)
    exact = torch.autograd.grad((weights * expected).sum(), pair)
    for x, y in zip(torch.autograd.grad((weights * found).sum(), pair), exact, strict=True):
        torch.testing.assert_close(x, y)
    almost_certain = diagnostics.softmax_entropy(query, query, 1e-4)
    assert torch.isfinite(almost_certain).all()
    assert almost_certain.max() < 1e-2


@pytest.mark.parametrize("backend", available_backends())
def test_hardest_negative(pair, backend: str) -> None:
    query, key = (x.float() for x in pair)
    expected = (query @ key.T).fill_diagonal_(-torch.inf).amax(dim=1)
    found = diagnostics.hardest_negative(query, key, backend=backend)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_mutual_information_of_a_gaussian_is_bounded() -> None:
    """Views of correlation 0.9 in two dimensions, with the density ratio that is known: I = -log(1 - 0.81)."""
    rho, exact = 0.9, -math.log(1 - 0.9**2)
    x = torch.randn(2048, 2, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn_like(x)
    log_ratio = (rho * x @ y.T - rho**2 / 2 * (x.square().sum(1)[:, None] + y.square().sum(1))) / (1 - rho**2)
    loss = (log_ratio.logsumexp(dim=1) - log_ratio.diagonal()).mean()
    bound, ceiling = diagnostics.mutual_information(loss, 2048)
    assert ceiling == math.log(2048)
    assert 0.9 * exact < bound < 1.03 * exact
    few = torch.stack([(s.logsumexp(1) - s.diagonal()).mean() for s in (log_ratio[i : i + 4, i : i + 4]
                       for i in range(0, 2048, 4))]).mean()  # fmt: skip
    assert diagnostics.mutual_information(few, 4).lower_bound < math.log(4) < exact


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment(pair, alpha: float) -> None:
    x, y = pair
    found = diagnostics.alignment(3 * x, y, alpha=alpha)
    torch.testing.assert_close(found, (x - y).norm(dim=1).pow(alpha).mean())
    same = x.detach().requires_grad_()
    diagnostics.alignment(same, same.detach(), alpha=alpha).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
def test_uniformity(pair, t: float) -> None:
    z, _ = pair
    expected = torch.pdist(F.normalize(z, dim=1)).square().mul(-t).exp().mean().log()
    found = diagnostics.uniformity(2 * z, t=t)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


def contrastive_and_supervised(points: Tensor, priors: Tensor, negatives: int) -> tuple[float, float]:
    """Both losses of features [classes, examples, D], each example as likely as another of its class.

    The supervised loss is exact, the contrastive one a mean over 20,000 draws.
    """
    classes, examples, _ = points.shape
    means = points.mean(dim=1)
    log_p = (points @ means.T).log_softmax(dim=2)
    supervised = -(priors[:, None] * log_p[torch.arange(classes), :, torch.arange(classes)]).sum() / examples

    def draw(of_class: Tensor) -> Tensor:
        return points[of_class, torch.randint(examples, of_class.shape)]

    losses = []
    for _ in range(20):
        anchor = torch.multinomial(priors, 1000, replacement=True)
        others = torch.multinomial(priors, 1000 * negatives, replacement=True).view(1000, negatives)
        x, positive = draw(anchor), draw(anchor)
        logits = torch.cat(((x * positive).sum(1, keepdim=True), torch.einsum("nd,nkd->nk", x, draw(others))), dim=1)
        losses.append(-logits.log_softmax(dim=1)[:, 0].mean())
    return float(torch.stack(losses).mean()), float(supervised)


@pytest.mark.parametrize("negatives", [1, 8, 128])
@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_the_downstream_loss_is_within_its_bounds(even: bool, classes: int, noise: float, negatives: int) -> None:
    priors = torch.ones(classes) if even else torch.linspace(1, 4, classes)
    priors = priors / priors.sum()
    for norm in (0.5, 1.0, 1.4):
        centers = F.normalize(torch.randn(classes, 1, 6), dim=2)
        points = norm * F.normalize(centers + noise * torch.randn(classes, 30, 6), dim=2)
        loss, supervised = contrastive_and_supervised(points, priors, negatives)
        bounds = diagnostics.surrogate_bounds(loss, negatives, classes, priors=priors.tolist(), norm=norm)
        assert bounds.lower <= supervised + 0.02
        assert supervised <= bounds.upper + 0.02
        assert bounds.lower < bounds.upper


def test_the_bounds_of_a_constant_feature_have_a_closed_form() -> None:
    """R_cont = log(K + 1) and the downstream loss is log C; for features of norm 0 the upper gap is log(1 + 1 / K)."""
    for negatives in (1, 10, 1000):
        lower, upper = diagnostics.surrogate_bounds(math.log(negatives + 1), negatives, 7, norm=1e-9)
        assert upper == pytest.approx(math.log(7) + math.log1p(1 / negatives))
        assert lower == pytest.approx(math.log(7) - math.log1p(1 / negatives))


OVER_RANKS = {
    "retrieval_accuracy": lambda x, y, ids, **o: torch.cat(diagnostics.retrieval_accuracy(x, y, (1, 3), ids=ids, **o)),
    "softmax_entropy": lambda x, y, _, **o: diagnostics.softmax_entropy(x, y, 0.3, **o),
    "hardest_negative": lambda x, y, _, **o: diagnostics.hardest_negative(x, y, backend="tiled", **o),
    "alignment": lambda x, y, _, **o: diagnostics.alignment(x, y, alpha=1.0, **o),
    "uniformity": lambda x, y, _, **o: diagnostics.uniformity(x + y, backend="tiled", **o),
}


def check_the_union(rank: int, lengths: list[int]) -> None:
    """Values, and gradients after the mean over ranks, are those of the union of the ranks' rows."""
    x, y = torch.randn(2, sum(lengths), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y += 2 * x
    ids = torch.arange(len(x)) * 5 // 3 % 6
    whole = [t.clone().requires_grad_() for t in (x, y)]
    own = [t.split(lengths)[rank].clone().requires_grad_() for t in (x, y)]
    for name, call in OVER_RANKS.items():
        expected = call(*whole, ids)
        found = call(*own, ids.split(lengths)[rank], group=dist.group.WORLD)
        of_rows = name in ("softmax_entropy", "hardest_negative")
        torch.testing.assert_close(found, expected.split(lengths)[rank] if of_rows else expected, msg=name)
        assert found.requires_grad is expected.requires_grad
        if not expected.requires_grad:
            continue
        exact = torch.autograd.grad(expected.mean(), whole)
        # The rows' mean is over those of all ranks; what every rank has already is the same number on each.
        gradients = torch.autograd.grad(found.sum() * len(lengths) / len(x) if of_rows else found, own)
        for gradient, of_all in zip(gradients, exact, strict=True):
            torch.testing.assert_close(gradient / len(lengths), of_all.split(lengths)[rank], msg=name)


@pytest.mark.parametrize("lengths", [[5, 4], [7, 0]])
def test_over_ranks(worlds, lengths: list[int]) -> None:
    worlds(2).run(check_the_union, lengths)


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics.retrieval_accuracy(X, X[:3]), r"query and key must have the same shape"),
        (lambda: diagnostics.retrieval_accuracy(X, X, (0,)), r"k must be an integer of at least 1, got 0"),
        (lambda: diagnostics.softmax_entropy(X, X, 0.0), r"tau must be positive, got 0.0"),
        (lambda: diagnostics.mutual_information(1.0, 0), r"candidates must be an integer of at least 1, got 0"),
        (lambda: diagnostics.softmax_entropy(X, X[:0], 0.1), r"key must have at least one row"),
        (lambda: diagnostics.alignment(X, X, alpha=-1.0), r"alpha must be positive, got -1.0"),
        (lambda: diagnostics.uniformity(X[:1]), r"z must have at least 2 rows to be apart, got shape \(1, 4\)"),
        (lambda: diagnostics.surrogate_bounds(1.0, 4, 1), r"classes must be at least 2, got 1"),
        (lambda: diagnostics.surrogate_bounds(1.0, 4, 2, priors=[0.5]), r"priors must be 2 numbers .* got \[0.5\]"),
        (lambda: diagnostics.surrogate_bounds(1.0, 4, 2, priors=[0.5, 0.6]), r"sum to 1, got \[0.5, 0.6\]"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", OVER_RANKS.values(), ids=OVER_RANKS)
def test_a_group_is_a_process_group(call) -> None:
    with pytest.raises(TypeError, match=r"group must be None or a torch.distributed.ProcessGroup .* got 3"):
        call(X, X, torch.arange(6), group=3)
