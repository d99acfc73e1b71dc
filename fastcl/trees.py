"""Nested inputs and outputs of models: tuples, lists, mappings and dataclasses with tensors in them.

A leaf module: it imports nothing of fastcl.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_leaves(function: Callable[[Any], Any], tree: Any, *, into_lists: bool = True) -> Any:
    """The same structure with ``function`` applied to every leaf, in a fixed order.

    Tuples (named ones too), mappings, dataclasses and, with ``into_lists``, lists are structure; all else is a leaf. A
    mapping that can't be changed comes back as a dict. Hugging Face's ``BatchEncoding`` is a mapping, its
    ``ModelOutput`` a dataclass.

    >>> map_leaves(lambda x: 2 * x, {"a": (1, 2), "b": [3]})
    {'a': (2, 4), 'b': [6]}
    """

    def recurse(x: Any) -> Any:
        return map_leaves(function, x, into_lists=into_lists)

    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: recurse(getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **values)
    if isinstance(tree, Mapping):
        result = copy.copy(tree) if isinstance(tree, MutableMapping) else dict(tree)
        result.update({key: recurse(value) for key, value in tree.items()})
        return result
    if isinstance(tree, tuple):
        values = [recurse(x) for x in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, list) and into_lists:
        return [recurse(x) for x in tree]
    return function(tree)


def tensors_of(tree: Any, *, into_lists: bool = True) -> list[Tensor]:
    """All tensors of a structure, in the order of :func:`map_leaves`."""
    found: list[Tensor] = []

    def collect(x: Any) -> Any:
        if isinstance(x, Tensor):
            found.append(x)
        return x

    map_leaves(collect, tree, into_lists=into_lists)
    return found


def replace_tensors(tree: Any, tensors: Iterable[Tensor], *, into_lists: bool = True) -> Any:
    """The structure with its tensors, in the order of :func:`tensors_of`, replaced."""
    remaining = iter(tensors)
    return map_leaves(lambda x: next(remaining) if isinstance(x, Tensor) else x, tree, into_lists=into_lists)
