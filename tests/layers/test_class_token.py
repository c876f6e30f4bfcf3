"""Class and distillation tokens: their places, the way back, and transformers' DeiT."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import ClassToken, LearnedPositions2d, PatchEmbedding
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(0, 5)


@given(seed=seeds, length=sizes, distillation=st.booleans())
def test_stands_before_the_tokens_and_comes_off_again(seed, length, distillation):
    torch.manual_seed(seed)
    layer, x = ClassToken(5, distillation=distillation), torch.randn(3, length, 5)
    tokens = layer(x)
    n = 1 + distillation
    assert layer.num_tokens == n
    assert tokens.shape == (3, n + length, 5)
    for row, alone in zip(tokens, x, strict=True):
        assert torch.equal(row[:n], layer.weight)
        assert torch.equal(row[n:], alone)
    *learned, rest = layer.split(tokens)
    assert len(learned) == n
    assert all(torch.equal(token, tokens[:, i]) for i, token in enumerate(learned))
    assert torch.equal(rest, x)


@pytest.mark.parametrize("distillation", [False, True])
def test_gradients(distillation):
    layer = ClassToken(3, distillation=distillation, dtype=torch.float64)
    x = torch.randn(2, 4, 3, requires_grad=True, dtype=torch.float64)

    def of(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, x)

    assert gradcheck(of, (x, layer.weight))
    assert gradgradcheck(of, (x, layer.weight))


def test_equals_the_embeddings_of_transformers_deit():
    modeling = pytest.importorskip("transformers.models.deit.modeling_deit")
    config = modeling.DeiTConfig(image_size=12, patch_size=4, num_channels=3, hidden_size=10)
    theirs = modeling.DeiTEmbeddings(config).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    factory = {"dtype": torch.float64}
    patches = PatchEmbedding(10, 4, in_channels=3, **factory)
    tokens = ClassToken(10, distillation=True, **factory)
    positions = LearnedPositions2d((3, 3), 10, num_prefix_tokens=tokens.num_tokens, **factory)
    table = theirs.position_embeddings[0]
    patches.load_state_dict(theirs.patch_embeddings.projection.state_dict())
    tokens.load_state_dict({"weight": torch.cat([theirs.cls_token[0], theirs.distillation_token[0]])})
    positions.load_state_dict({"prefix": table[:2], "weight": table[2:]})
    images = torch.randn(2, 3, 12, 12, **factory).requires_grad_()
    expected, actual = theirs(images), positions(tokens(patches(images)))
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(actual, [images, tokens.weight, positions.prefix], cotangent)
    of = [images, theirs.cls_token, theirs.distillation_token, theirs.position_embeddings]
    image, first, second, places = torch.autograd.grad(expected, of, cotangent)
    torch.testing.assert_close(ours[0], image)
    torch.testing.assert_close(ours[1], torch.cat([first[0], second[0]]))
    torch.testing.assert_close(ours[2], places[0, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_kept(dtype):
    layer, x = ClassToken(5, dtype=dtype), torch.randn(2, 3, 5).to(dtype)
    assert layer(x).dtype is dtype
    assert torch.equal(layer(x)[:, 1:], x)


def test_starts_normal_or_at_zero():
    assert ClassToken(20_000).weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert ClassToken(20_000, std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.03)
    state = torch.get_rng_state()
    assert (ClassToken(7, std=0.0).weight == 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert ClassToken(7, distillation=True).weight.shape == (2, 7)


def test_repr_tells_the_tokens():
    assert repr(ClassToken(5)) == "ClassToken(5, distillation=False, std=0.02)"
    assert repr(ClassToken(5, distillation=True)) == "ClassToken(5, distillation=True, std=0.02)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassToken(5)(torch.ones(2, 3, 4)), r"tokens must be \(B, L, 5\), got \(2, 3, 4\)"),
        (lambda: ClassToken(5)(torch.ones(3, 5)), r"tokens must be \(B, L, 5\), got \(3, 5\)"),
        (
            lambda: ClassToken(5, distillation=True).split(torch.ones(2, 1, 5)),
            r"tokens must be \(B, L, C\) with L at least 2, got \(2, 1, 5\)",
        ),
        (lambda: ClassToken(5).split(torch.ones(2, 5)), r"tokens must be \(B, L, C\) with L at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
