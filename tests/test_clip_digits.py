"""The two-tower example's quick form, as a stranger runs it, and what its descriptions say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytest.importorskip("matplotlib", reason="the example needs matplotlib")

from examples import clip_digits

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    picture = tmp_path / "clip.png"
    command = [sys.executable, "-m", "examples.clip_digits", "--quick", "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (accuracy,) = re.findall(r"zero-shot accuracy (\S+) %", done.stdout)
    (peak,) = re.findall(r"beyond the batch: (\d+) MB", done.stdout)
    assert float(accuracy) > 50  # chance is 10
    assert 0 < float(peak) <= clip_digits.PEAK_MB
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_descriptions_fit_the_drawings() -> None:
    """Larger drawings have more ink, bolder ones darker ink, and the digit is the source's."""
    images, labels = clip_digits.load_images()
    drawn, tokens = clip_digits.draw_pairs(images, labels, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(tokens.unique(dim=0), clip_digits.TOKENS.unique(dim=0))

    def ink(word: str) -> float:
        return drawn[(tokens == clip_digits.VOCABULARY.index(word)).any(dim=1)].mean().item()

    assert ink("small") < ink("large")
    assert ink("faint") < ink("bold")
    assert len(set(clip_digits.DESCRIPTIONS)) == 270


def test_no_step_may_take_more_than_is_stated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clip_digits, "PEAK_MB", 0)
    monkeypatch.setattr(clip_digits, "QUICK_BATCH", 600)
    monkeypatch.setattr(clip_digits, "QUICK_STEPS", 3)
    monkeypatch.setattr(sys, "argv", ["clip_digits", "--quick", "--picture", str(tmp_path / "clip.png")])
    with pytest.raises(SystemExit):
        clip_digits.main()
