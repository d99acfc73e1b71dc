"""Encoders that run twice: chunk by chunk without a graph, and again with one when backward brings the gradients.

May import :mod:`fastcl.trees`. :func:`encode` is the one mechanism under everything in :mod:`fastcl.gradcache`: what it
returns belongs to a single autograd node, whose backward replays chunk after chunk with the random numbers and the
autocast settings of the first pass. So any loss may follow, and from chunk to chunk nothing is kept but the batch, the
outputs and their gradients.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from fastcl.trees import map_leaves, replace_tensors, tensors_of

Progress = Callable[[str, int, int], object]
"""Called after each chunk with the pass ("encode" or "replay"), the chunks done, and the chunks of that pass."""


class EncoderCall:
    """One encoder, the batch that it is given, and the chunks that it is given it in."""

    def __init__(self, name: str, encoder: Callable[..., Any], args: tuple, kwargs: dict, chunk_size: int) -> None:
        self.name, self.encoder, self.inputs = name, encoder, (args, kwargs)
        rows = _count_rows(name, self.inputs)
        self.bounds = [(i, min(i + chunk_size, rows)) for i in range(0, rows, chunk_size)]
        self.tensors = tensors_of(self.inputs, into_lists=False)
        modules = _modules_of(encoder)
        self.synchronizing = [m for m in modules if hasattr(m, "no_sync") or hasattr(m, "set_requires_gradient_sync")]
        """modules that reduce gradients over ranks: DistributedDataParallel has the first method, FSDP2 the second"""
        parameters = (p for m in modules for p in m.parameters(recurse=False))
        self.on_devices = _one_per_device([*tensors_of(self.inputs), *parameters])
        self.autocast = _AutocastState.now()
        self.random_states: list[_RandomState] = []
        self.differentiable: list[int] = []
        """which of the output's tensors have a gradient"""
        if len(self.bounds) > 1 and any(isinstance(m, _BatchNorm) and m.training for m in modules):
            _warn_of_batch_norm()

    def chunk(self, begin: int, end: int) -> tuple[tuple, dict]:
        """The encoder's arguments for some rows: views of the batch."""
        return map_leaves(lambda x: x[begin:end] if _has_rows(x) else x, self.inputs, into_lists=False)

    def encode(self, progress: Callable[[], object]) -> Any:
        """The output for all rows, without a graph.

        The first chunk runs with one, and loses it, where gradients are wanted: it tells which outputs have any.
        """
        wanted = torch.is_grad_enabled()
        joined: _JoinedOutput | None = None
        for begin, end in self.bounds:
            if wanted:
                self.random_states.append(_RandomState.now(self.on_devices))
            args, kwargs = self.chunk(begin, end)
            first = joined is None
            with torch.set_grad_enabled(wanted and first), _synchronized_over_ranks(self.synchronizing, ()):
                output = self.encoder(*args, **kwargs)
            if first:
                joined = _JoinedOutput(self.name, output, self.bounds[-1][1])
                self.differentiable = [i for i, x in enumerate(tensors_of(output)) if x.requires_grad]
            joined.write(begin, end, output)
            del output
            progress()
        return joined.finish()

    def differentiable_of(self, output: Any) -> list[Tensor]:
        """The tensors of an output that have a gradient."""
        tensors = tensors_of(output)
        return [tensors[i] for i in self.differentiable]

    def replay(
        self, gradients: Sequence[Tensor | None], at_last: Sequence[nn.Module], progress: Callable[[], object]
    ) -> list[Tensor | None]:
        """Backward through every chunk, given the gradients of the differentiable outputs.

        Gradients of parameters are accumulated where they belong, those of the input tensors are returned. Modules of
        ``at_last`` reduce theirs over ranks with the last chunk, others not at all.
        """
        results = [torch.zeros_like(x) if x.requires_grad else None for x in self.tensors]
        for (begin, end), random_state in zip(self.bounds, self.random_states, strict=True):
            arguments = self.chunk(begin, end)
            leaves = [
                x.detach().requires_grad_(whole.requires_grad)
                for x, whole in zip(tensors_of(arguments, into_lists=False), self.tensors, strict=True)
            ]
            args, kwargs = replace_tensors(arguments, leaves, into_lists=False)
            last = end == self.bounds[-1][1]
            with _synchronized_over_ranks(self.synchronizing, at_last if last else ()):
                with torch.enable_grad(), random_state.restored(), self.autocast.restored():
                    outputs = self.differentiable_of(self.encoder(*args, **kwargs))
                # A scalar is the same in each chunk; it is differentiated once.
                found = [
                    (output, gradient[begin:end] if gradient.dim() else gradient)
                    for output, gradient in zip(outputs, gradients, strict=True)
                    if gradient is not None and (gradient.dim() or last)
                ]
                if found:
                    torch.autograd.backward(*zip(*found, strict=True))
                del outputs, found
            for result, leaf in zip(results, leaves, strict=True):
                if leaf.grad is not None:
                    (result[begin:end] if leaf.dim() else result).add_(leaf.grad)
            progress()
        return results


class Encoded(NamedTuple):
    """What :func:`encode` returns."""

    outputs: list[Any]
    """of each call, the whole batch's output in the structure that the encoder gave it"""
    without_gradient: Callable[[Tensor], list[str]]
    """names of the calls that need a gradient and that a loss isn't connected to"""


def encode(calls: Sequence[EncoderCall], progress: Progress | None = None) -> Encoded:
    """Run all calls chunk by chunk; where gradients are enabled, backward replays those that have any."""
    report = _reporter(progress, "encode", calls)
    outputs = [call.encode(report) for call in calls]
    replayed = [call for call in calls if call.differentiable]
    if not replayed:
        return Encoded(outputs, lambda loss: [])
    ends = [x for call, output in zip(calls, outputs, strict=True) for x in call.differentiable_of(output)]
    owners = [call.name for call in replayed for _ in call.differentiable]
    # Parameters are no inputs of the node, so that an empty tensor has to ask for a gradient.
    connected = _ReplayFunction.apply(
        functools.partial(_replay, replayed, progress),
        ends,
        torch.empty(0, requires_grad=True),
        *(x for call in replayed for x in call.tensors),
    )
    node, new = connected[0].grad_fn, {id(x): y for x, y in zip(ends, connected, strict=True)}

    def without_gradient(loss: Tensor) -> list[str]:
        reached = {owners[i] for i in _outputs_reached(loss, node)}
        return [name for name in dict.fromkeys(owners) if name not in reached]

    return Encoded([map_leaves(lambda x: new.get(id(x), x), output) for output in outputs], without_gradient)


def _replay(
    calls: list[EncoderCall], progress: Progress | None, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The second pass over several calls: the gradients of their input tensors from those of their outputs."""
    remaining = iter(gradients)
    own = {call: [next(remaining) for _ in call.differentiable] for call in calls}
    for call in calls:
        if all(gradient is None for gradient in own[call]):
            raise ValueError(f"{call.name} got no gradient from the loss: does the loss use its output?")
    last_call = {module: call for call in calls for module in call.synchronizing}
    report = _reporter(progress, "replay", calls)
    results: list[Tensor | None] = []
    for call in calls:
        results += call.replay(own[call], [m for m in call.synchronizing if last_call[m] is call], report)
    return results


class _ReplayFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, replay: Callable, outputs: list[Tensor], _: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        ctx.set_materialize_grads(False)
        # So that autograd notices a batch that was changed in place before its replay.
        ctx.save_for_backward(*inputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, None, None, *ctx.replay(gradients)


class _JoinedOutput:
    """One output for the whole batch, written chunk by chunk into memory of its own.

    A copy, because what an encoder returns is often a view of something much larger.
    """

    def __init__(self, name: str, first: Any, rows: int) -> None:
        self.name, self.structure = name, map_leaves(lambda x: x.detach() if isinstance(x, Tensor) else x, first)
        self.tensors = [
            x.new_empty((rows, *x.shape[1:]), requires_grad=False) if x.dim() else x for x in tensors_of(self.structure)
        ]
        self.same = [torch.ones_like(x, dtype=torch.bool) for x in self.tensors if not x.dim()]

    def write(self, begin: int, end: int, output: Any) -> None:
        parts = [x.detach() for x in tensors_of(output)]
        if len(parts) != len(self.tensors):
            raise ValueError(
                f"{self.name} must return as many tensors for each chunk, got {len(self.tensors)} and then {len(parts)}"
            )
        same = iter(self.same)
        for whole, part in zip(self.tensors, parts, strict=True):
            if not whole.dim():
                next(same).logical_and_(part == whole)
            elif part.shape != (expected := (end - begin, *whole.shape[1:])):
                raise ValueError(
                    f"{self.name} must return tensors with one row for each row of a chunk, alike in all chunks: "
                    f"expected shape {expected}, got {tuple(part.shape)}"
                )
            else:
                whole[begin:end] = part

    def finish(self) -> Any:
        if not all(self.same):
            raise ValueError(
                f"{self.name} returned a 0-d tensor that differs from chunk to chunk: one number for a chunk has no "
                f"meaning for the batch; return one for each row"
            )
        return replace_tensors(self.structure, self.tensors)


class _RandomState(NamedTuple):
    """The state of the CPU's generator and of those of the devices in use."""

    cpu: Tensor
    device_type: str
    devices: list[int]
    states: list[Tensor]

    @staticmethod
    def now(on_devices: list[Tensor]) -> _RandomState:
        device_type = on_devices[0].device.type if on_devices else "cpu"
        return _RandomState(torch.get_rng_state(), device_type, *get_device_states(*on_devices))

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


class _AutocastState(NamedTuple):
    """Whether autocast is on, and to which dtype, for each type of device here."""

    options: list[dict[str, Any]]

    @staticmethod
    def now() -> _AutocastState:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        return _AutocastState(
            [
                {
                    "device_type": device_type,
                    "enabled": torch.is_autocast_enabled(device_type),
                    "dtype": torch.get_autocast_dtype(device_type),
                    "cache_enabled": torch.is_autocast_cache_enabled(),
                }
                for device_type in types
                if torch.amp.is_autocast_available(device_type)
            ]
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for options in self.options:
                stack.enter_context(torch.autocast(**options))
            yield


@contextmanager
def _synchronized_over_ranks(modules: Iterable[nn.Module], allowed: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, only those of ``modules`` that are ``allowed`` to reduce their gradients over ranks in backward."""
    with ExitStack() as stack:
        for module in modules:
            last = any(module is other for other in allowed)
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(last)
                module.set_is_last_backward(last)
                stack.callback(module.set_requires_gradient_sync, True)
                stack.callback(module.set_is_last_backward, True)
            elif not last:
                stack.enter_context(module.no_sync())
        yield


def _has_rows(x: Any) -> bool:
    return isinstance(x, list) or len(getattr(x, "shape", ())) > 0


def _count_rows(name: str, inputs: Any) -> int:
    sizes: list[int] = []

    def see(x: Any) -> Any:
        if _has_rows(x):
            sizes.append(len(x))
        if isinstance(x, list) and any(t.requires_grad for t in tensors_of(x)):
            raise ValueError(f"{name} was given a list with a tensor that requires grad; give one tensor with all rows")
        return x

    map_leaves(see, inputs, into_lists=False)
    if not sizes:
        raise ValueError(f"{name} must be given a tensor or a list with one row for each sample, got none")
    if len(set(sizes)) > 1:
        raise ValueError(f"{name} must be given inputs of one batch size, got {', '.join(map(str, sizes))} rows")
    if sizes[0] == 0:
        raise ValueError(f"{name} must be given at least one row, got an empty batch")
    return sizes[0]


def _modules_of(encoder: Any) -> list[nn.Module]:
    """The modules behind a callable: itself, what it is a method or a partial of, what its code refers to by name.

    Where one of these is an object of another kind, a trainer for example, the modules that it has as attributes.
    """
    others: list[Any] = []
    if isinstance(encoder, functools.partial):
        roots = [encoder.func, *encoder.args, *encoder.keywords.values()]
    elif inspect.ismethod(encoder):
        roots = [encoder.__self__]
    elif inspect.isfunction(encoder):
        variables = inspect.getclosurevars(inspect.unwrap(encoder))
        roots, others = list(variables.nonlocals.values()), list(variables.globals.values())
    else:
        roots = [encoder]
    for root in roots:
        if not isinstance(root, nn.Module):
            others += getattr(root, "__dict__", {}).values()
    modules = (m for x in (*roots, *others) if isinstance(x, nn.Module) for m in x.modules())
    return list(dict.fromkeys(modules))


def _one_per_device(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each device but the CPU, and one for the current CUDA device once CUDA is in use."""
    found = {x.device: x for x in tensors if x.device.type not in ("cpu", "meta")}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.setdefault(torch.device("cuda", torch.cuda.current_device()), torch.empty(0, device="cuda"))
    return list(found.values())


def _outputs_reached(loss: Tensor, node: Any) -> set[int]:
    """Which outputs of an autograd node the graph of ``loss`` starts from."""
    reached, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        for function, output in getattr(stack.pop(), "next_functions", ()):
            if function is node:
                reached.add(output)
            elif function is not None and function not in seen:
                seen.add(function)
                stack.append(function)
    return reached


def _reporter(progress: Progress | None, stage: str, calls: Sequence[EncoderCall]) -> Callable[[], object]:
    if progress is None:
        return lambda: None
    total, done = sum(len(call.bounds) for call in calls), iter(range(1, 1 << 62))
    return lambda: progress(stage, next(done), total)


@functools.cache
def _warn_of_batch_norm() -> None:
    warnings.warn(
        "an encoder has BatchNorm in training mode: in gradient caching it normalises by the statistics of each chunk, "
        "not of the batch, and updates its running statistics twice for each. The usual remedies: GroupNorm or "
        "LayerNorm in its place, its eval() mode, or chunks that are large enough.",
        RuntimeWarning,
        stacklevel=2,
    )
