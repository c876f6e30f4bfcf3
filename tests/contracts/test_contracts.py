"""What every public layer, block and model keeps, from one list that no part can stand outside of."""

import copy
import importlib
import pickle
import pkgutil
from typing import Any

import contracts.cases
import lamina.blocks
import lamina.layers
import lamina.models
import pytest
import torch
from contracts.case import Case, tensors
from torch import Tensor, nn

CASES = [
    case
    for module in pkgutil.iter_modules(contracts.cases.__path__)
    for case in importlib.import_module(f"contracts.cases.{module.name}").CASES
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_differentiable_case = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)


def made(case: Case, *, training: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module whose parameters are all of order one: zero initialisation would hide what they do."""
    module = case.make(device=None, dtype=dtype).train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def called(case: Case, module: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return tensors(module(*case.args(dtype), **case.kwargs(dtype)))


def gradients(outputs: list[Tensor], of: list[Tensor]) -> tuple[Tensor | None, ...]:
    wanted = [t for t in outputs if t.requires_grad]
    torch.manual_seed(2)
    return torch.autograd.grad(wanted, of, [torch.randn_like(t) for t in wanted], allow_unused=True)


@pytest.mark.parametrize("folder", [lamina.layers, lamina.blocks, lamina.models], ids=lambda f: f.__name__)
def test_every_public_part_is_in_the_list(folder):
    parts = [getattr(folder, name) for name in folder.__all__]
    parts = [p for p in parts if isinstance(p, type) and issubclass(p, nn.Module)]
    parts = {p.__name__ for p in parts if p.forward is not nn.Module.forward}  # a base cannot be called
    assert parts - {case.part for case in CASES} == set()


@every_case
def test_takes_device_and_dtype(case):
    module = case.make(device="meta", dtype=torch.float64)
    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert all(t.device.type == "meta" for t in (*module.parameters(), *module.buffers()))
    assert all(t.dtype is torch.float64 for t in held)
    outputs = called(case, made(case, dtype=torch.float64), torch.float64)
    assert all(t.dtype is torch.float64 for t in outputs if t.is_floating_point())


@every_case
def test_state_dict_carries_everything(case):
    module, other = made(case), made(case)
    expected = called(case, module)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(called(case, other), expected, rtol=0, atol=0)
    # Made without memory and filled from a checkpoint: what the state dict does not carry must be remade.
    empty = case.make(device="meta", dtype=torch.float32).to_empty(device="cpu").eval()
    empty.load_state_dict(module.state_dict())
    torch.testing.assert_close(called(case, empty), expected, rtol=0, atol=0)


@every_case
def test_deepcopy_and_pickle(case):
    module = made(case)
    expected = called(case, module)
    for twin in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        torch.testing.assert_close(called(case, twin), expected, rtol=0, atol=0)


@every_case
def test_evaluation_is_deterministic_and_draws_nothing(case):
    module = made(case)
    expected = called(case, module)
    state = torch.get_rng_state()
    inputs = case.args(torch.float32), case.kwargs(torch.float32)
    drawn = torch.get_rng_state()
    module(*inputs[0], **inputs[1])
    assert torch.equal(torch.get_rng_state(), drawn), "an evaluation advanced the caller's random stream"
    torch.set_rng_state(state)
    torch.testing.assert_close(called(case, module), expected, rtol=0, atol=0)


@every_case
def test_training_is_a_function_of_the_seed(case):
    module = made(case, training=True)
    state = copy.deepcopy(module.state_dict())
    expected = called(case, module)
    module.load_state_dict(state)
    torch.testing.assert_close(called(case, module), expected, rtol=0, atol=0)


@every_case
def test_inputs_are_left_alone(case):
    module = made(case, training=True)
    args, kwargs = case.args(torch.float32), case.kwargs(torch.float32)
    before = [t.clone() for t in tensors([args, kwargs])]
    module(*args, **kwargs)
    torch.testing.assert_close(tensors([args, kwargs]), before, rtol=0, atol=0, equal_nan=True)


@every_case
def test_rows_of_a_batch_do_not_meet(case):
    if any(0 not in dims for dims in case.dynamic) or tensors(case.kwargs(torch.float32)):
        pytest.skip("its first dimension is no batch, or a keyword argument carries the batch too")
    module, args, kwargs = made(case), case.args(torch.float32), case.kwargs(torch.float32)
    whole = tensors(module(*args, **kwargs))
    first = [a[:1] if isinstance(a, Tensor) else a for a in args]
    alone = tensors(module(*first, **kwargs))
    if len(whole[0]) == len(alone[0]):
        pytest.skip("its output has no batch")
    torch.testing.assert_close(alone[0][0], whole[0][0])


@every_differentiable_case
def test_every_parameter_gets_a_gradient(case):
    if not case.trains:
        pytest.skip("declared: not every parameter reaches the output in one call")
    module = made(case, training=True)
    names, parameters = (
        zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
    )
    for name, gradient in zip(
        names, gradients(called(case, module), list(parameters)) if names else (), strict=True
    ):
        assert gradient is not None, f"{name} has no part in the output"
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, f"the gradient of {name} is zero"


def differentiable_args(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.args(dtype)
    )


def check_compiled(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Compiled as a whole, with dynamic shapes, it gives the same outputs and gradients."""
    torch._dynamo.reset()
    module = made(case, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    args, kwargs = differentiable_args(case, dtype), case.kwargs(dtype)
    for argument, dims in zip([a for a in args if isinstance(a, Tensor)], case.dynamic, strict=False):
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(argument, dim)
    expected, actual = tensors(module(*args, **kwargs)), tensors(compiled(*args, **kwargs))
    torch.testing.assert_close(actual, expected)
    of = [t for t in (*module.parameters(), *args) if isinstance(t, Tensor) and t.requires_grad]
    if case.differentiable and of:
        torch.testing.assert_close(gradients(actual, of), gradients(expected, of))


@every_case
def test_compiles_whole(case):
    check_compiled(case, "aot_eager")


@pytest.mark.slow
@every_case
def test_compiles_whole_by_inductor(case):
    # In float64, where another order of the same sums is no difference worth a tolerance.
    check_compiled(case, "inductor", torch.float64)


@every_case
def test_exports(case):
    if not case.exports:
        pytest.skip("declared: it cannot be exported")
    module, args, kwargs = made(case), case.args(torch.float32), dict(case.kwargs(torch.float32))
    program = torch.export.export(module, args, kwargs, strict=False)
    torch.testing.assert_close(tensors(program.module()(*args, **kwargs)), tensors(module(*args, **kwargs)))


@every_differentiable_case
def test_autocast_stays_near_and_trains(case):
    module = made(case)
    expected = called(case, module)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = called(case, module)
    for actual, exact in zip(outputs, expected, strict=True):
        if exact.is_floating_point() and exact.numel():
            error = (actual.float() - exact).norm() / exact.norm().clamp_min(1e-6)
            assert error < 0.05, f"relative error {error:.3g}"
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters and any(t.requires_grad for t in outputs):
        assert all(g is None or g.dtype is torch.float32 for g in gradients(outputs, parameters))
