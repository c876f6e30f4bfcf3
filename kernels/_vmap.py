"""What `torch.func.vmap` makes of a registered operation: one call, whose batch holds what is mapped over."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def fold_into_batch(
    operation: CustomOpDef,
    by_batch: Sequence[str],
    *,
    broadcast: Sequence[str] = (),
    alone: Sequence[str] = (),
) -> None:
    """Registers it. Where it does not apply, calls are made one after the other, as without it.

    Args:
        operation: whose results begin with the batch; what does not has nothing in it.
        by_batch: names of the arguments that begin with the batch.
        broadcast: names of those that begin with the batch or with 1.
        alone: names of arguments with which calls cannot be one, such as the seed of dropout. What no list
            names is for the whole batch, and makes several calls where it is mapped itself.
    """
    names = list(inspect.signature(operation._init_fn).parameters)

    def rule(info: Any, in_dims: Sequence[Any], *given: Any) -> tuple[Any, Any]:
        called = dict(zip(names, given, strict=True))
        mapped = {n: dim for n, dim in zip(names, in_dims, strict=True) if isinstance(dim, int)}
        if mapped.keys() - {*by_batch, *broadcast} or any(called[name] is not None for name in alone):
            return _one_by_one(operation, info.batch_size, mapped, called)
        first = called[by_batch[0]]
        batch = first.shape[1 if mapped.get(by_batch[0]) == 0 else 0]
        for name in (*by_batch, *broadcast):
            tensor = called[name]
            if tensor is None or (name in broadcast and name not in mapped and tensor.shape[0] == 1):
                continue
            tensor = tensor.movedim(mapped[name], 0) if name in mapped else tensor.unsqueeze(0)
            tensor = tensor.expand(info.batch_size, batch, *tensor.shape[2:])
            called[name] = tensor.reshape(info.batch_size * batch, *tensor.shape[2:])
        found = operation(*called.values())
        outputs = found if isinstance(found, tuple) else (found,)
        has_batch = [len(out) == info.batch_size * batch for out in outputs]
        outputs = tuple(
            out.view(info.batch_size, batch, *out.shape[1:]) if has else out
            for out, has in zip(outputs, has_batch, strict=True)
        )
        dims = tuple(0 if has else None for has in has_batch)
        return (outputs, dims) if isinstance(found, tuple) else (outputs[0], dims[0])

    operation.register_vmap(rule)


def _one_by_one(
    operation: CustomOpDef, times: int, mapped: dict[str, int], called: dict[str, Any]
) -> tuple[Any, Any]:
    found = [
        operation(*(t.select(mapped[n], k) if n in mapped else t for n, t in called.items()))
        for k in range(times)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    outputs = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return outputs, (0,) * len(outputs)
