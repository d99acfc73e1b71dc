"""The memory bank: the formulas of instance discrimination in float64, a file that outlives the process, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.measure import gradient_step, peak_memory
from fastcl.memory import MemoryBank
from fastcl.memory import bank as bank_module

SIZE, DIM, BATCH, TAU = 50, 6, 8, 0.2


def make(dtype: torch.dtype = torch.float64, **options) -> tuple[MemoryBank, torch.Tensor, torch.Tensor]:
    bank = MemoryBank(SIZE, DIM, dtype=dtype, **options)
    indices = torch.randperm(SIZE)[:BATCH]
    features = 3 * bank.rows[indices] + torch.randn(BATCH, DIM, dtype=dtype)
    return bank, features.requires_grad_(), indices


def test_starts_with_unit_rows_of_a_generator() -> None:
    first, second = (MemoryBank(SIZE, DIM, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    torch.testing.assert_close(first.rows.norm(dim=1), torch.ones(SIZE))
    large = MemoryBank(20_000, 3).rows
    assert large.mean(dim=0).abs().max() < 0.03, "rows should be uniform on the sphere"


def test_update_by_its_formula() -> None:
    bank, features, indices = make(momentum=0.3)
    expected = bank.rows.clone()
    expected[indices] = normalize(0.3 * expected[indices] + 0.7 * normalize(features.detach(), dim=1), dim=1)
    bank.update(indices, features)
    torch.testing.assert_close(bank.rows, expected, rtol=1e-12, atol=1e-12)
    assert not bank.rows.requires_grad
    bank.update(indices, features, momentum=1.0)
    torch.testing.assert_close(bank.rows, expected, rtol=1e-12, atol=1e-12)


def test_of_an_example_that_comes_twice_the_last_counts() -> None:
    bank, features, _ = make()
    indices = torch.tensor([4, 9, 4, 1, 9, 4, 0, 2])
    assert bank_module._last_occurrences(indices).tolist() == [5, 4, 5, 3, 4, 5, 6, 7]
    bank.update(indices, features, momentum=0.0)
    last = torch.tensor([6, 3, 7, 5, 4])
    torch.testing.assert_close(bank.rows[[0, 1, 2, 4, 9]], normalize(features.detach(), dim=1)[last])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_full_softmax_by_its_formula(reduction: str) -> None:
    bank, features, indices = make()
    found = bank.softmax_loss(features, indices, TAU, reduction=reduction)
    logits = normalize(features, dim=1) @ bank.rows.T / TAU
    exact = logits.logsumexp(dim=1) - logits[torch.arange(BATCH), indices]
    exact = {"mean": exact.mean(), "sum": exact.sum(), "none": exact}[reduction]
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    weights = torch.rand(exact.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * weights).sum(), features)[0] for loss in (found, exact)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("each", [False, True], ids=["shared", "each its own"])
def test_nce_by_its_formula(each: bool) -> None:
    bank, features, indices = make()
    for call in range(2):
        negatives = bank.sample(*((BATCH, 12) if each else (12,)))
        drawn = bank.rows[negatives.expand(BATCH, 12)]
        unit = normalize(features, dim=1)
        positive = (unit * bank.rows[indices]).sum(dim=1).div(TAU).exp()
        negative = torch.einsum("bd,bkd->bk", unit, drawn).div(TAU).exp()
        if call == 0:
            z = SIZE * negative.detach().mean()

        def h(unnormalised: torch.Tensor, z: torch.Tensor = z) -> torch.Tensor:
            return unnormalised / z / (unnormalised / z + 12 / SIZE)

        exact = -h(positive).log() - (1 - h(negative)).log().sum(dim=1)
        found = bank.nce_loss(features, indices, TAU, negatives=negatives, reduction="none")
        # log_z is kept in float32
        torch.testing.assert_close(bank.log_z.double(), z.log(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(loss.sum(), features)[0] for loss in (found, exact)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        mean = bank.nce_loss(features, indices, TAU, negatives=negatives)
        torch.testing.assert_close(mean, exact.mean(), rtol=1e-6, atol=1e-6)


def test_nce_does_not_overflow_at_low_temperature() -> None:
    bank, features, indices = make(torch.float32)
    loss = bank.nce_loss(features, indices, 0.005, negatives=bank.sample(20))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_half_precision_features_and_a_float32_bank() -> None:
    bank, features, indices = make(torch.float32)
    half, negatives = features.detach().bfloat16(), bank.sample(20)
    for loss in (
        lambda x: bank.softmax_loss(x, indices, TAU),
        lambda x: bank.nce_loss(x, indices, TAU, negatives=negatives),
    ):
        torch.testing.assert_close(loss(half), loss(half.float()), rtol=1e-2, atol=1e-2)
    bank.update(indices, half)
    assert bank.rows.dtype == torch.float32


def test_sample() -> None:
    bank = MemoryBank(7, DIM)
    drawn = bank.sample(3, 400, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 400)
    assert drawn.unique().tolist() == list(range(7))


def test_state_dict_round_trip() -> None:
    bank, features, indices = make()
    bank.nce_loss(features, indices, TAU, negatives=bank.sample(9))
    other = MemoryBank(SIZE, DIM, dtype=torch.float64)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.rows, bank.rows)
    assert torch.equal(other.log_z, bank.log_z)
    assert not other.log_z.isnan()


def test_a_file_survives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "bank.bin"
    code = f"""
import torch
from fastcl.memory import MemoryBank
from fastcl.memory import bank as bank_module
bank = MemoryBank({SIZE}, {DIM}, path={str(path)!r})
bank.update(torch.tensor([3]), torch.eye(1, {DIM}), momentum=0.0)
torch.save(bank.rows.clone(), {str(tmp_path / "rows.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    bank = MemoryBank(SIZE, DIM, path=path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["bank.bin", "rows.pt"]
    assert torch.equal(bank.rows, torch.load(tmp_path / "rows.pt"))
    assert torch.equal(bank.rows[3], torch.eye(DIM)[0])
    assert list(bank.state_dict()) == ["log_z"]

    same = MemoryBank(SIZE, DIM, path=str(path))
    features, indices = torch.randn(BATCH, DIM, requires_grad=True), torch.arange(BATCH)
    bank.update(indices, features)
    assert torch.equal(same.rows, bank.rows), "two banks of one file are one bank"
    assert torch.isfinite(bank.softmax_loss(features, indices, TAU))
    assert torch.isfinite(bank.nce_loss(features, indices, TAU, negatives=bank.sample(9)))
    with pytest.raises(ValueError, match=r"a file of 1224 bytes, 51 x 6 torch.float32, got .*bank.bin of 1200"):
        MemoryBank(SIZE + 1, DIM, path=path)


def test_of_two_processes_that_start_a_file_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = tmp_path / "bank.bin", []
    draw = bank_module._draw_unit_rows

    def draw_slowly(rows: torch.Tensor, generator: torch.Generator | None) -> None:
        draw(rows, generator)
        if not first:
            monkeypatch.setattr(os, "getpid", lambda: -1)
            first.append(None)
            first[0] = MemoryBank(SIZE, DIM, path=path)

    monkeypatch.setattr(bank_module, "_draw_unit_rows", draw_slowly)
    second = MemoryBank(SIZE, DIM, path=path)
    assert torch.equal(first[0].rows, second.rows)
    second.update(torch.tensor([0]), torch.eye(1, DIM), momentum=0.0)
    assert torch.equal(first[0].rows, second.rows)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.bin"]


def test_refresh_replaces_every_row_or_says_which_were_left_out() -> None:
    bank, encoder = MemoryBank(SIZE, DIM), torch.nn.Linear(4, DIM)
    inputs = torch.randn(SIZE, 4)
    order = torch.randperm(SIZE)
    batches = [(part, inputs[part]) for part in order.split(16)]
    bank.refresh(encoder, batches)
    torch.testing.assert_close(bank.rows, normalize(encoder(inputs).detach(), dim=1))
    with pytest.raises(ValueError, match="got nothing for 16 of 50 examples"):
        bank.refresh(encoder, batches[1:])


def test_the_full_softmax_takes_no_matrix_of_logits() -> None:
    bank, batch = MemoryBank(16_384, 8), 2_048
    features, indices = torch.randn(batch, 8, requires_grad=True), torch.arange(batch)
    step = gradient_step(lambda x: bank.softmax_loss(x, indices, TAU), [features])
    step()
    assert peak_memory(step, "cpu") < 4 * batch * 16_384 / 4


ROWS, INDICES = torch.ones(2, DIM), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda bank: MemoryBank(0, DIM), ValueError, r"size must be an integer of at least 1, got 0"),
        (lambda bank: MemoryBank(5, DIM, momentum=2), ValueError, r"momentum must be a number from 0 to 1, got 2"),
        (
            lambda bank: bank.update(INDICES, ROWS[:, :2]),
            ValueError,
            r"features must have shape \[rows, 6\], got \(2, 2\)",
        ),
        (lambda bank: bank.update(INDICES[:1], ROWS), ValueError, r"indices must have shape \(2,\)"),
        (lambda bank: bank.update(INDICES + 5, ROWS), ValueError, r"indices must hold indices below 5, got 6"),
        (lambda bank: bank.update(INDICES - 1, ROWS), ValueError, r"indices must not be negative, got -1"),
        (lambda bank: bank.update(INDICES, ROWS, momentum=-0.1), ValueError, r"momentum .* from 0 to 1, got -0.1"),
        (lambda bank: bank.softmax_loss(ROWS, INDICES, 0.0), ValueError, r"tau must be positive, got 0.0"),
        (
            lambda bank: bank.softmax_loss(ROWS.to("meta"), INDICES.to("meta"), 1.0),
            ValueError,
            r"features must be on cpu like the rows, got meta",
        ),
        (
            lambda bank: bank.nce_loss(ROWS, INDICES, 1.0, negatives=torch.zeros(3, 4, dtype=torch.int64)),
            ValueError,
            r"negatives must have shape \[m\] or \[2, m\], not empty, got \(3, 4\)",
        ),
        (
            lambda bank: bank.nce_loss(ROWS, INDICES, 1.0, negatives=ROWS),
            TypeError,
            r"integer tensor, got torch.float32",
        ),
        (
            lambda bank: bank.nce_loss(ROWS, INDICES, 1.0, negatives=INDICES, reduction="max"),
            ValueError,
            r"reduction must be one of .* got 'max'",
        ),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(MemoryBank(5, DIM))
