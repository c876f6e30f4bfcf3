"""The choice of what runs an operation, and what it says about it."""

import warnings

import lamina.kernels.backend as backend_module
import pytest
import torch
from lamina.kernels import additive_scores, dot_product_attention, explain, operations, use_backend
from lamina.kernels.backend import choose, forced_backend, triton_refusal


def test_a_block_forces_and_restores_even_on_an_error():
    assert forced_backend() is None
    with use_backend("torch"):
        with use_backend("reference"):
            assert forced_backend() == "reference"
        assert forced_backend() == "torch"

    def fails():
        with use_backend("torch"):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert forced_backend() is None


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend must be one of reference, torch, triton, got 'cuda'"):
        use_backend("cuda").__enter__()


@pytest.mark.parametrize(
    ("refusals", "chosen"),
    [
        ({}, "triton"),
        ({"triton": "no"}, "torch"),
        ({"torch": "no"}, "triton"),
        ({"triton": "no", "torch": "no"}, "reference"),
    ],
)
def test_the_first_path_that_is_not_refused_runs(refusals, chosen):
    assert choose("an operation", refusals) == chosen


def test_a_forced_path_that_refuses_says_why_once_and_the_next_runs():
    with use_backend("triton"):
        with pytest.warns(UserWarning, match="an operation does not run on 'triton': too long"):
            assert choose("an operation", {"triton": "too long"}) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose("an operation", {"triton": "too long"}) == "torch"
        with pytest.warns(UserWarning, match="too wide"):
            choose("an operation", {"triton": "too wide"})


def test_triton_refuses_what_it_cannot_run(monkeypatch):
    tensor = torch.randn(3)
    assert "on cpu, not on a CUDA device" in triton_refusal(tensor)
    with use_backend("triton"):
        assert triton_refusal(tensor) is None
        monkeypatch.setattr(backend_module, "_HAS_TRITON", False)
        assert triton_refusal(tensor) == "Triton is not installed"
    monkeypatch.setattr(backend_module, "_HAS_TRITON", True)
    answers = []

    def operation(x):
        with use_backend("triton"):
            answers.append(triton_refusal(x))
        return x

    torch.func.jvp(operation, (tensor,), (tensor,))
    assert "forward-mode" in answers[0]
    torch.func.grad(lambda x: operation(x).sum())(tensor)
    assert "torch.func takes a derivative" in answers[1]
    torch.func.vmap(operation)(tensor)
    assert answers[2] is None


def test_explains_without_running():
    query = torch.randn(2, 3, 5)
    explanation = explain(additive_scores, query, query, torch.randn(5))
    assert explanation.chosen == "reference"
    assert set(explanation.refusals) == {"torch", "triton"}
    text = str(explanation)
    assert text.startswith("additive_scores runs on 'reference'")
    assert "not on a CUDA device" in text
    assert text.endswith("reference  taken")
    with use_backend("triton"):
        explanation = explain(additive_scores, query, query, torch.randn(5))
        assert "triton     taken: use_backend asks for it" in str(explanation)
        assert "reference  not asked: 'triton' comes first" in str(explanation)
    assert explanation.chosen == "triton"


def test_explains_the_operation_that_it_is_asked_of():
    query = torch.randn(1, 2, 60, 4)
    assert explain(dot_product_attention, query, query, query, is_causal=True).chosen == "torch"
    with pytest.raises(ValueError, match=r"operation must be one of additive_attention, .*got 'relu'"):
        explain(torch.relu, query)


def test_every_operation_is_declared():
    assert {"additive_scores", "dot_product_attention"} <= set(operations())
    assert all(function.__name__ == name for name, function in operations().items())
