"""Imports run one way, from the vocabulary in terms to the modules in nn."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastcl

PACKAGE = Path(fastcl.__file__).parent
LAYERS = (
    ("terms", "checks", "exchange", "trees", "tuning", "_C", "_cuda"),
    ("backends",),
    ("engine",),
    ("distributed",),
    ("pairwise",),
    ("cross_entropy",),
    ("panels",),
    ("panelwise",),
    ("losses", "similarity"),
    ("replay", "top_k"),
    ("nn", "gradcache", "memory", "diagnostics"),
    ("doctor",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """The top-level parts of fastcl that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("fastcl.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in LAYERS"
    for part in imported(path):
        assert part == own or LEVEL[part] < LEVEL[own], f"{path.name} ({own}) must not import fastcl.{part}"


# What without_pairs computes is the textbook formula already.
NO_REFERENCE = ("__init__", "common", "distances", "sigmoid", "without_pairs")


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (PACKAGE / "losses").glob("*.py") if p.stem not in NO_REFERENCE),
    ids=lambda p: p.stem,
)
def test_every_loss_has_a_reference_without_fastcl(path: Path) -> None:
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    names = {node.id for node in ast.walk(functions["reference"]) if isinstance(node, ast.Name)}
    ours = set(functions) | {"pairwise", "cross_entropy", "normalize_rows", "softmax_loss", "inverse", "fastcl"}
    assert not names & (ours - {"reference"})


def test_no_file_is_long_without_a_reason() -> None:
    long = [p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 500]
    assert long == []
