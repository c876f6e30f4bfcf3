"""Attention weights of any model, without touching the model.

Every attention in Lamina has a method `weights` beside its `forward`, with the same arguments: the definition
of what the fused path computes and does not store. `capture_attention` hooks on to the modules that have it,
and calls it with what each forward is called with.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_computing: ContextVar[bool] = ContextVar("computing", default=False)


class AttentionRecord(dict[str, list[Tensor]]):
    """What `capture_attention` saw: name of the attention module -> its weights, one tensor a call.

    The names are those of `model.named_modules()` ("" is the model itself), in the order of the first calls.
    A module that stands under several names keeps the first; one that is called twice has two tensors.

    Example:
        >>> from lamina.viz import AttentionRecord
        >>> record = AttentionRecord({"encoder.0": [torch.zeros(2), torch.ones(2)]})
        >>> record.last()
        [tensor([1., 1.])]
    """

    def last(self) -> list[Tensor]:
        """The weights of every module's last call, in the order of the first calls: what a rollout takes."""
        return [calls[-1] for calls in self.values()]


@contextmanager
def capture_attention(
    model: nn.Module, *, device: torch.device | str | None = None
) -> Iterator[AttentionRecord]:
    """Records the attention weights of every call of `model` inside the block.

    The model's output, mode, gradients and random stream are what they are without it; its forward stays on
    the fused path. Each attention costs its (B, H, Lq, Lk) weights once more, in time and memory. Dropout is
    left out of them. Inside the block compiled code runs eagerly, in the whole process, as hooks do not reach
    into a compiled graph. A user's own hook on a part of an attention (its projections) sees one call more.

    Args:
        model: has at least one submodule with a method `weights(query, ...)`; it may be compiled.
            Parts that join it inside the block are not seen.
        device: where the weights are kept, "cpu" to spare a GPU's memory; where they arise if None.

    Yields:
        A dict that each call fills: module name -> list of (B, H, Lq, Lk), detached; (B, Lq, Lk) for a layer
        of one head.

    Raises:
        ValueError: no submodule has weights to show; or, in the call of the model, an attention is given
            something that its weights cannot take, such as a cache: run the whole sequence without one.

    Example:
        >>> from lamina.layers import MultiHeadAttention
        >>> from lamina.viz import capture_attention
        >>> attention = MultiHeadAttention(8, num_heads=2)
        >>> with capture_attention(attention) as record:
        ...     output = attention(torch.randn(3, 5, 8))
        >>> [weights.shape for weights in record[""]]
        [torch.Size([3, 2, 5, 5])]
    """
    attentions = {name: module for name, module in model.named_modules() if _has_weights(module)}
    if not attentions:
        raise ValueError(
            f"model must have a submodule with a method weights(query, ...), {type(model).__name__} has none"
        )
    record = AttentionRecord()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it costs seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in attentions.items():
            # torch.compile wraps a module in one that calls it "_orig_mod".
            plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
            hook = _recorder(record, plain, device)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield record


def attention_rollout(weights: Sequence[Tensor], *, skip: float = 0.5) -> Tensor:
    """How much of each input token reaches each token of the top, through all layers.

    .. math:: R = \\prod_{l = L}^{1} \\left( s I + (1 - s) \\bar A_l \\right)

    where :math:`\\bar A_l` is the mean over the heads. A row that attends to nothing keeps its own token.

    Args:
        weights: one (B, H, L, L) or (B, L, L) per layer, the first layer first: `AttentionRecord.last`.
        skip: the share :math:`s` of the residual connection; the paper takes one half.

    Returns:
        (B, L, L): row i holds the shares of token i at the top, and sums to one.

    Raises:
        ValueError: no layer, a layer that is not self-attention of the first one's size, or a `skip` outside
            [0, 1].

    Reference:
        Abnar, Zuidema. Quantifying Attention Flow in Transformers. ACL 2020. Section 3.

    Example:
        >>> from lamina.viz import attention_rollout
        >>> layers = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(4)]
        >>> attention_rollout(layers).shape
        torch.Size([2, 5, 5])
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip must lie in [0, 1], got {skip}")
    if len(weights) == 0:
        raise ValueError("weights must hold one tensor per layer, got none")
    precise = [layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in weights]
    means = [layer.mean(1) if layer.ndim == 4 else layer for layer in precise]
    B, L = means[0].shape[0], means[0].shape[-1]
    for index, (layer, mean) in enumerate(zip(weights, means, strict=True)):
        if mean.shape != (B, L, L):
            raise ValueError(
                f"weights must all be (B, H, L, L) or (B, L, L) of one B and L, "
                f"got {tuple(layer.shape)} in layer {index}"
            )
    identity = torch.eye(L, device=means[0].device, dtype=means[0].dtype)
    rollout = identity.expand(B, L, L)
    for mean in means:
        step = skip * identity + (1 - skip) * mean
        # A masked row sums to `skip` or to zero: what it lacks is its own.
        step = step + torch.diag_embed(1 - step.sum(-1))
        rollout = step @ rollout
    return rollout


def _has_weights(module: nn.Module) -> bool:
    method = getattr(type(module), "weights", None)
    return inspect.isfunction(method) and "query" in inspect.signature(method).parameters


def _recorder(
    record: AttentionRecord, name: str, device: torch.device | str | None
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _computing.get():  # an attention whose weights call another attention's forward
            return
        arguments = _arguments_of_weights(module, name, args, kwargs)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        accelerators = {t.device for t in tensors if t.is_cuda}
        token = _computing.set(True)
        try:
            # A layer that draws (random hashes) draws here what its forward is about to draw.
            with torch.random.fork_rng(devices=list(accelerators)), torch.no_grad():
                weights = module.weights(**arguments)
        finally:
            _computing.reset(token)
        record.setdefault(name, []).append(weights.detach().to(device=device))

    return hook


def _arguments_of_weights(
    module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What forward was called with, as far as `weights` takes it; an error where the rest matters."""
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    known = inspect.signature(module.weights).parameters
    for parameter, value in given.items():
        ignored = parameter in known or parameter == "value"
        if not ignored and value is not signature.parameters[parameter].default and value is not None:
            raise ValueError(
                f"{parameter} must be left out while attention is captured, got a {type(value).__name__}: "
                f"the weights of {name or 'the model'} ({type(module).__name__}) do not take it"
            )
    return {parameter: value for parameter, value in given.items() if parameter in known}
