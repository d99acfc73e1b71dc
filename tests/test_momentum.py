"""The momentum encoder against its recursion written out, and against lightly's function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcl.memory import MomentumEncoder, cosine_momentum
from tests.test_oracles import peer


def make_encoder() -> nn.Module:
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    encoder[1].weight.requires_grad_(False)
    return encoder.double()


def test_follows_by_its_formula() -> None:
    encoder = make_encoder()
    target, online = MomentumEncoder(encoder, 0.9), nn.DataParallel(encoder)  # another name for each parameter
    expected = [p.detach().clone() for p in encoder.parameters()]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        encoder(torch.randn(6, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        momentum = None if step % 2 else cosine_momentum(step, 4, 0.5)
        target.update(online if step else encoder, momentum)
        m = 0.9 if step % 2 else cosine_momentum(step, 4, 0.5)
        expected = [m * e + (1 - m) * p.detach() for e, p in zip(expected, encoder.parameters(), strict=True)]
        for found, exact in zip(target.encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        for found, exact in zip(target.encoder.buffers(), encoder.buffers(), strict=True):
            assert torch.equal(found, exact)


def test_lightly() -> None:
    update_momentum = peer("lightly.models.utils").update_momentum
    encoder, moved = make_encoder(), make_encoder()
    target, theirs = MomentumEncoder(encoder, 0.99), copy.deepcopy(encoder)
    target.update(moved)
    update_momentum(moved, theirs, m=0.99)
    for found, exact in zip(target.encoder.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, exact)


def test_is_a_copy_without_gradients() -> None:
    encoder = make_encoder()
    target = MomentumEncoder(encoder, 0.99)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(target(x), encoder(x))
    assert not target(x).requires_grad
    assert not any(p.requires_grad for p in target.parameters())
    assert encoder[0].weight.requires_grad
    before = target.encoder[0].weight.clone()
    with torch.no_grad():
        encoder[0].weight.zero_()
    assert torch.equal(target.encoder[0].weight, before)


def test_tied_parameters_move_once() -> None:
    encoder = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    encoder[1].weight = encoder[0].weight
    target = MomentumEncoder(encoder, 0.75)
    with torch.no_grad():
        target.encoder[0].weight.zero_()
        encoder[0].weight.fill_(1)
    target.update(encoder)
    assert target.encoder[0].weight is target.encoder[1].weight
    assert (target.encoder[0].weight == 0.25).all()


def test_state_dict_round_trip() -> None:
    target, other = MomentumEncoder(make_encoder(), 0.9), MomentumEncoder(make_encoder(), 0.9)
    other.load_state_dict(target.state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    assert torch.equal(target.eval()(x), other.eval()(x))


def test_schedule() -> None:
    momenta = [cosine_momentum(step, 10, 0.99) for step in range(11)]
    assert momenta[0] == pytest.approx(0.99)
    assert momenta[-1] == 1
    assert momenta == sorted(momenta)
    schedule = peer("lightly.utils.scheduler").cosine_schedule
    assert momenta == pytest.approx([schedule(step, 11, 0.99, 1.0) for step in range(11)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MomentumEncoder(torch.relu, 0.9), TypeError, r"encoder must be a torch.nn.Module, got builtin_fun"),
        (lambda: MomentumEncoder(nn.Linear(2, 2), 1.1), ValueError, r"momentum must be a number from 0 to 1, got 1.1"),
        (
            lambda: MomentumEncoder(nn.Linear(2, 2), 0.9).update(nn.Linear(2, 3)),
            ValueError,
            r"encoder must have the parameters .*\[\(2, 2\), \(2,\)\], got \[\(3, 2\), \(3,\)\]",
        ),
        (
            lambda: MomentumEncoder(nn.Linear(2, 2), 0.9).update(nn.Linear(2, 2, bias=False)),
            ValueError,
            r"got \[\(2, 2\)\]",
        ),
        (lambda: MomentumEncoder(nn.Linear(2, 2), 0.9).update(nn.Linear(2, 2), -1), ValueError, r"momentum .* got -1"),
        (lambda: cosine_momentum(11, 10, 0.9), ValueError, r"step must be from 0 to steps, got 11 of 10"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
