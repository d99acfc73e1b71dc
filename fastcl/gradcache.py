"""Gradient caching: batches limited by neither the loss's memory nor the encoders' activations.

May import :mod:`fastcl.replay`. Encoders run in chunks without a graph, the loss and its gradients are those of the
whole batch, and each chunk is run again with its share of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.replay import EncoderCall, Progress, encode


class GradCache:
    r"""A training step over a batch of any size, in the memory of a few chunks.

    With encoders :math:`f_k`, inputs :math:`x_k` and a loss :math:`\ell` of the whole batch, the gradient is a sum over
    chunks c of rows,

    .. math:: \frac{d\ell}{d\theta} = \sum_k \sum_c \frac{\partial f_k(x_{k,c})}{\partial\theta}^{\!\top}
              \frac{\partial\ell}{\partial f_k(x_{k,c})}

    so that only one chunk's activations need to exist at a time. It is exact: the same gradient as without chunks, with
    the masks of dropout that each chunk drew, whatever follows.

        criterion = fastcl.nn.ClipLoss(0.07, normalize=True)  # its temperature is a parameter of the optimizer, too
        step = fastcl.GradCache([image_encoder, text_encoder], loss=criterion, chunk_size=256)
        loss = step(images, texts)  # gradients are in the parameters
        optimizer.step()

    Args:
        encoders: modules, or any callables; the same one may come twice. An encoder's output may be a tensor, or a
            tuple, list, mapping or dataclass with tensors. Their first dimension is the chunk's; a 0-d tensor is fine
            where every chunk returns the same (a scale).
        loss: called with the output of each encoder for the whole batch, and with the step's keyword arguments; returns
            a 0-d tensor.
        chunk_size: rows that an encoder is given at a time; one number, or one for each encoder.
        progress: show a line of progress on standard error, or call this after each chunk with the pass ("encode" or
            "replay"), the chunks done, and the chunks of the pass.

    A step takes one input for each encoder: a tensor, or a list with one element for each row (sequences of several
    lengths, texts), is its only argument; a tuple is its arguments; a mapping (Hugging Face's ``BatchEncoding``) is its
    keyword arguments. Tensors and lists are cut along their rows, all else is passed as it is.

    Raises:
        TypeError, ValueError: an argument doesn't fit; an encoder's inputs differ in batch size; the loss returns
            something else than a scalar, isn't connected to one of the trainable encoders, or nothing is trainable.

    Complexity: one forward of each encoder more than without chunks (none for an encoder without gradients), and the
    loss's own cost. Memory is that of one chunk's forward and backward, of the outputs and their gradients, and of the
    loss.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021
    (arXiv:2101.06983).

    >>> import torch, fastcl
    >>> encoder = torch.nn.Linear(8, 4)
    >>> step = fastcl.GradCache([encoder, encoder], loss=fastcl.nn.NTXentLoss(0.5), chunk_size=16)
    >>> x = torch.randn(50, 8)
    >>> loss = step(x, x + 0.1)
    >>> loss.requires_grad, encoder.weight.grad.shape
    (False, torch.Size([4, 8]))
    """

    def __init__(
        self,
        encoders: Sequence[Callable[..., Any]],
        loss: Callable[..., Tensor],
        *,
        chunk_size: int | Sequence[int],
        progress: bool | Progress = False,
    ) -> None:
        if not isinstance(encoders, (Sequence, nn.ModuleList)) or not all(map(callable, encoders)) or not len(encoders):
            raise TypeError(f"encoders must be a sequence of callables, got {encoders!r}")
        if not callable(loss):
            raise TypeError(f"loss must be callable, got {loss!r}")
        sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * len(encoders)
        if len(sizes) != len(encoders):
            raise ValueError(f"chunk_size must be one number, or one for each of {len(encoders)} encoders, got {sizes}")
        self.encoders, self.loss_function = list(encoders), loss
        self.chunk_sizes = [_checked_size(size) for size in sizes]
        self.progress = _progress(progress)

    def __call__(self, *inputs: Any, **loss_arguments: Any) -> Tensor:
        """The whole step: adds to the parameters' gradients and returns the loss, detached."""
        loss = self.loss(*inputs, **loss_arguments)
        if not loss.requires_grad:
            raise ValueError("a step needs gradients, which are disabled here; loss() alone computes the value")
        loss.backward()
        return loss.detach()

    def loss(self, *inputs: Any, **loss_arguments: Any) -> Tensor:
        """The loss as a tensor whose ``backward()`` replays the encoders.

        It can be scaled, added to other losses and back-propagated like any other. Only ``backward()`` without
        ``inputs=`` reaches the parameters: ``torch.autograd.grad`` doesn't see them. Under ``torch.no_grad`` this is an
        evaluation in chunks.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(f"inputs must be one for each of {len(self.encoders)} encoders, got {len(inputs)}")
        calls = [
            EncoderCall(f"encoders[{i}]", encoder, *_arguments(x), size)
            for i, (encoder, x, size) in enumerate(zip(self.encoders, inputs, self.chunk_sizes, strict=True))
        ]
        encoded = encode(calls, self.progress)
        loss = self.loss_function(*encoded.outputs, **loss_arguments)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return a 0-d tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f"loss must return a 0-d tensor, got shape {tuple(loss.shape)}")
        if torch.is_grad_enabled():
            if missing := encoded.without_gradient(loss):
                raise ValueError(
                    f"loss must depend on the output of every encoder, {', '.join(missing)} get no gradient"
                )
            if not loss.requires_grad:
                raise ValueError("encoders and loss have nothing to train: no output requires grad, nor does the loss")
        return loss


def cached(
    encoder: Callable[..., Any] | None = None, *, chunk_size: int, progress: bool | Progress = False
) -> Callable[..., Any]:
    """An encoder that takes any batch in the memory of one chunk, for training loops of one's own.

    Its output is that of ``encoder`` for the whole batch, and ``backward()`` of whatever is computed from it replays
    the encoder chunk by chunk. Use it as a function or as a decorator. Arguments are cut along their rows where they
    are tensors or lists, in tuples and mappings too. All else is as in :class:`GradCache`. Each call is replayed by
    itself: an encoder in DistributedDataParallel reduces its gradients once for each call.

    >>> import torch, fastcl
    >>> image, text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
    >>> encode_image, encode_text = (fastcl.cached(f, chunk_size=16) for f in (image, text))
    >>> loss = fastcl.clip_loss(encode_image(torch.randn(50, 8)), encode_text(torch.randn(50, 6)), 10.0)
    >>> (loss + 0.01 * image.weight.square().sum()).backward()
    >>> image.weight.grad.shape, text.weight.grad.shape
    (torch.Size([4, 8]), torch.Size([4, 6]))

    >>> @fastcl.cached(chunk_size=16)
    ... def unit(x):
    ...     return torch.nn.functional.normalize(image(x))
    >>> unit(torch.randn(50, 8)).shape
    torch.Size([50, 4])
    """
    if encoder is None:
        return functools.partial(cached, chunk_size=chunk_size, progress=progress)
    if not callable(encoder):
        raise TypeError(f"encoder must be callable, got {encoder!r}")
    size, report = _checked_size(chunk_size), _progress(progress)

    def encode_in_chunks(*args: Any, **kwargs: Any) -> Any:
        return encode([EncoderCall("encoder", encoder, args, kwargs, size)], report).outputs[0]

    return encode_in_chunks


def _arguments(x: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(x, tuple):
        return x, {}
    return ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"chunk_size must be an integer, got {size!r}")
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {size}")
    return size


def _progress(progress: bool | Progress) -> Progress | None:
    if callable(progress):
        return progress
    return _progress_line if progress else None


def _progress_line(stage: str, done: int, total: int) -> None:
    end = "\r\033[K" if done == total else ""
    print(f"\r{stage} {done:,} of {total:,} chunks{end}", end="", file=sys.stderr, flush=True)
