"""The quantiser: its formulas, who gets which gradient, its averages and restarts."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import use_backend
from lamina.layers import VectorQuantizer
from torch import Tensor, distributed
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
WIDE = {"dtype": torch.float64}


def drawn(quantizer: VectorQuantizer, scale: float = 1.0) -> VectorQuantizer:
    """With a codebook of order one, and its averages with it."""
    with torch.no_grad():
        quantizer.codebook.normal_(std=scale)
        if quantizer.ema_sum is not None:
            quantizer.ema_sum.copy_(quantizer.codebook)
    return quantizer


def state(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return copy.deepcopy(quantizer.state_dict())


@given(seed=seeds, masked=st.booleans())
def test_is_the_formula(seed, masked):
    torch.manual_seed(seed)
    quantizer, x = drawn(VectorQuantizer(7, 3, commitment=0.3, **WIDE)), torch.randn(2, 5, 3, **WIDE)
    mask = torch.rand(2, 5) < 0.7 if masked else torch.ones(2, 5, dtype=torch.bool)
    actual = quantizer(x, mask=mask if masked else None)
    codebook = quantizer.codebook.detach().numpy()
    output, indices, loss, counts = np.zeros((2, 5, 3)), np.full((2, 5), -1), 0.0, np.zeros(7)
    for b, i in np.argwhere(mask.numpy()):
        vector = x[b, i].numpy()
        k = min(range(7), key=lambda k: ((vector - codebook[k]) ** 2).sum())
        output[b, i], indices[b, i] = codebook[k], k
        loss += 1.3 * ((vector - codebook[k]) ** 2).mean()
        counts[k] += 1
    entropy = -sum(c / counts.sum() * math.log(c / counts.sum()) for c in counts if c)
    assert np.array_equal(actual.output.detach().numpy(), output)
    assert np.array_equal(actual.indices.numpy(), indices)
    assert actual.loss.item() == pytest.approx(loss / max(counts.sum(), 1))
    assert actual.perplexity.item() == pytest.approx(math.exp(entropy) if counts.any() else 0)
    assert actual.usage.item() == pytest.approx((counts > 0).mean())


def test_perplexity_of_one_code_and_of_all():
    quantizer = VectorQuantizer(5, 3)
    codes = quantizer.codebook.detach()
    even, one = quantizer(codes.repeat(4, 1)), quantizer(codes[:1].repeat(4, 1))
    assert (even.perplexity.item(), even.usage.item()) == pytest.approx((5, 1))
    for single in one, quantizer(codes[:1]):
        assert (single.perplexity.item(), single.usage.item()) == pytest.approx((1, 0.2))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_gradient_goes_straight_through_and_commitment_pulls(ema_decay):
    quantizer = drawn(VectorQuantizer(7, 3, commitment=0.3, ema_decay=ema_decay, **WIDE)).eval()
    x = torch.randn(2, 5, 3, requires_grad=True, **WIDE)
    out, cotangent = quantizer(x), torch.randn(2, 5, 3, **WIDE)
    (through,) = torch.autograd.grad(out.output, x, cotangent, retain_graph=True)
    assert torch.equal(through, cotangent)
    (pull,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(pull, 0.3 * 2 * (x - out.output).detach() / x.numel())


def test_commitment_is_on_the_term_of_x_and_not_on_the_codebooks():
    x = torch.randn(11, 3, requires_grad=True, **WIDE)
    gradients = []
    for commitment in 0.0, 0.25, 4.0:
        quantizer = VectorQuantizer(7, 3, commitment=commitment, **WIDE)
        with torch.no_grad():
            quantizer.codebook.copy_(torch.linspace(-1, 1, 21, **WIDE).sin().view(7, 3))
        gradients.append(torch.autograd.grad(quantizer(x).loss, (x, quantizer.codebook)))
    (x0, e0), (x1, e1), (x2, e2) = gradients
    assert torch.equal(e0, e1)
    assert torch.equal(e0, e2)
    assert not x0.any()
    torch.testing.assert_close(x2, 16 * x1)


def test_codebook_gradient_is_of_the_chosen_codes_alone():
    quantizer, x = drawn(VectorQuantizer(7, 3, **WIDE)), torch.randn(4, 3, **WIDE)
    out = quantizer(x)
    (gradient,) = torch.autograd.grad(out.loss, quantizer.codebook)
    expected = torch.zeros(7, 3, **WIDE)
    for vector, k in zip(x, out.indices, strict=True):
        expected[k] += 2 * (quantizer.codebook[k].detach() - vector) / x.numel()
    torch.testing.assert_close(gradient, expected)
    out = quantizer(x.requires_grad_())
    assert torch.autograd.grad(out.output.sum(), quantizer.codebook, allow_unused=True) == (None,)


def test_encoder_codebook_and_decoder_all_learn():
    encoder, quantizer, decoder = torch.nn.Linear(5, 3), drawn(VectorQuantizer(7, 3)), torch.nn.Linear(3, 5)
    x = torch.randn(11, 5)
    quantized = quantizer(encoder(x))
    ((decoder(quantized.output) - x).square().mean() + quantized.loss).backward()
    for parameter in (*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()):
        assert parameter.grad.abs().max() > 0


def test_gradient_of_the_codebook():
    """Of the codebook alone: in x the output has no derivative, but the straight-through rule."""
    quantizer, x = drawn(VectorQuantizer(3, 2, commitment=0.0, **WIDE), scale=3.0), torch.randn(5, 2, **WIDE)

    def loss(codebook: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer, {"codebook": codebook}, (x,)).loss

    codebook = quantizer.codebook.detach().clone().requires_grad_()
    assert gradcheck(loss, codebook)
    assert gradgradcheck(loss, codebook)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 5, 4), (0, 4), (2, 0, 4), (1, 1, 4)])
@pytest.mark.parametrize("training", [False, True])
def test_any_leading_dimensions(shape, training):
    quantizer = VectorQuantizer(7, 4, ema_decay=0.9, restart_below=0.5).train(training)
    out = quantizer(torch.randn(shape))
    assert (out.output.shape, out.indices.shape) == (shape, shape[:-1])
    assert all(t.isfinite().all() for t in (out.output, out.loss, out.perplexity, out.usage))
    assert all(t.isfinite().all() for t in quantizer.state_dict().values())


@given(seed=seeds)
def test_images_are_tokens_with_their_channels_elsewhere(seed):
    torch.manual_seed(seed)
    tokens = drawn(VectorQuantizer(7, 4, ema_decay=0.9, **WIDE))
    images = VectorQuantizer(7, 4, ema_decay=0.9, channel_dim=1, **WIDE)
    images.load_state_dict(tokens.state_dict())
    x, mask = torch.randn(2, 4, 3, 5, **WIDE), torch.rand(2, 3, 5) < 0.7
    actual, expected = images(x, mask=mask), tokens(x.permute(0, 2, 3, 1), mask=mask)
    assert torch.equal(actual.output.permute(0, 2, 3, 1), expected.output)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(images.state_dict(), tokens.state_dict())


def test_lookup_gives_the_output_back():
    for channel_dim, shape in (-1, (2, 3, 5, 4)), (1, (2, 4, 3, 5)):
        quantizer = drawn(VectorQuantizer(7, 4, channel_dim=channel_dim)).eval()
        out = quantizer(torch.randn(shape), mask=torch.rand(2, 3, 5) < 0.7)
        assert (out.indices == -1).any()
        assert torch.equal(quantizer.lookup(out.indices), out.output)


@given(seed=seeds, ema=st.booleans())
def test_what_takes_no_part_has_no_influence(seed, ema):
    torch.manual_seed(seed)
    one = drawn(VectorQuantizer(7, 3, ema_decay=0.9 if ema else None, restart_below=0.95, **WIDE))
    other = copy.deepcopy(one)
    x, mask = torch.randn(2, 5, 3, **WIDE), torch.rand(2, 5) < 0.6
    padded = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    results = []
    for quantizer, given_x in (one, x), (other, padded):
        torch.manual_seed(seed)
        leaf = given_x.clone().requires_grad_()
        out = quantizer(leaf, mask=mask)
        of = [leaf, *quantizer.parameters()]
        results.append([*out, *torch.autograd.grad(out.output.sum() + out.loss, of)])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    gradient = results[0][5]
    assert not gradient[~mask].any()
    assert not results[0][0][~mask].any()


@given(seed=seeds)
def test_masked_equals_left_out(seed):
    torch.manual_seed(seed)
    one = drawn(VectorQuantizer(7, 3, ema_decay=0.9, **WIDE))
    other = copy.deepcopy(one)
    x, mask = torch.randn(11, 3, **WIDE), torch.rand(11) < 0.6
    a, b = one(x, mask=mask), other(x[mask])
    torch.testing.assert_close(a[2:], b[2:])
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_averages_move_by_the_formula():
    decay, eps, codes = 0.8, 0.01, 5
    quantizer = drawn(VectorQuantizer(codes, 2, ema_decay=decay, eps=eps, **WIDE))
    count, total = np.ones(codes), quantizer.codebook.numpy().copy()
    for _ in range(3):
        codebook = quantizer.codebook.numpy().copy()
        x = torch.randn(13, 2, **WIDE)
        chosen = ((x.numpy()[:, None] - codebook) ** 2).sum(-1).argmin(-1)
        quantizer(x)
        for k in range(codes):
            count[k] = decay * count[k] + (1 - decay) * (chosen == k).sum()
            total[k] = decay * total[k] + (1 - decay) * x.numpy()[chosen == k].sum(0)
        smoothed = (count + eps) / (count.sum() + codes * eps) * count.sum()
        np.testing.assert_allclose(quantizer.ema_count.numpy(), count)
        np.testing.assert_allclose(quantizer.ema_sum.numpy(), total)
        np.testing.assert_allclose(quantizer.codebook.numpy(), total / smoothed[:, None])


def test_one_code_of_one_channel_without_memory_is_the_mean():
    quantizer, x = VectorQuantizer(1, 1, ema_decay=0.0, **WIDE), torch.randn(11, 1, **WIDE)
    mask = torch.arange(11) < 4
    assert not quantizer(x, mask=mask).indices[mask].any()
    torch.testing.assert_close(quantizer.codebook, x[mask].mean(0, keepdim=True))


def test_with_averages_the_loss_is_commitment_alone_and_the_codebook_is_no_parameter():
    quantizer, x = drawn(VectorQuantizer(7, 3, commitment=0.3, ema_decay=0.9)), torch.randn(11, 3)
    out = quantizer(x)
    assert out.loss.item() == pytest.approx(0.3 * (x - out.output).square().mean().item())
    assert list(quantizer.parameters()) == []
    assert set(quantizer.state_dict()) == {"codebook", "ema_count", "ema_sum"}
    assert set(VectorQuantizer(7, 3).state_dict()) == {"codebook"}


def test_the_output_is_of_the_codes_before_their_step():
    quantizer, x = drawn(VectorQuantizer(7, 3, ema_decay=0.5)), torch.randn(11, 3)
    before = quantizer.codebook.clone()
    out = quantizer(x)
    assert torch.equal(out.output, before[out.indices])
    assert not torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_evaluation_changes_nothing_and_draws_nothing(ema_decay):
    quantizer, x = VectorQuantizer(7, 3, ema_decay=ema_decay, restart_below=9.0).eval(), torch.randn(11, 3)
    before, stream = state(quantizer), torch.get_rng_state()
    quantizer(x)
    torch.testing.assert_close(state(quantizer), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_dead_codes_restart_as_vectors_of_the_batch(ema_decay):
    quantizer = VectorQuantizer(6, 2, ema_decay=ema_decay, restart_below=0.8)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [9, 9], [0, 1], [8, 9], [9, 8], [1, 0]]))
        quantizer.ema_count.fill_(0.5)  # unused in this batch they stay under 0.8
        if ema_decay is not None:
            quantizer.ema_sum.copy_(0.5 * quantizer.codebook)
    x = torch.rand(40, 2)
    out = quantizer(x)
    used = torch.zeros(6, dtype=torch.bool).scatter_(0, out.indices, True)
    count = 0.99 * 0.5 if ema_decay is None else 0.25
    dead = ~used if ema_decay is not None else quantizer.ema_count <= 0.8
    assert dead[[1, 3, 4]].all()
    assert count < 0.8
    fresh = quantizer.codebook.detach()[dead]
    places = (fresh.unsqueeze(1) == x).all(-1)
    assert (places.sum(-1) == 1).all(), "a restarted code is no vector of the batch"
    assert len(places.nonzero()[:, 1].unique()) == dead.sum(), "two codes took one vector"
    torch.testing.assert_close(quantizer.ema_count[dead], torch.full((int(dead.sum()),), 0.8))
    if ema_decay is not None:
        torch.testing.assert_close(quantizer.ema_sum[dead], 0.8 * fresh)


def test_living_codes_stay():
    quantizer = drawn(VectorQuantizer(3, 2, restart_below=0.9))
    before = quantizer.codebook.detach().clone()
    quantizer(before.repeat(5, 1))
    assert torch.equal(quantizer.codebook, before)


def test_more_dead_codes_than_vectors_wait():
    quantizer = VectorQuantizer(50, 2, restart_below=2.0)
    before, x = quantizer.codebook.detach().clone(), torch.randn(7, 2)
    mask = torch.tensor([True] * 4 + [False] * 3)
    quantizer(x, mask=mask)
    changed = (quantizer.codebook != before).any(-1)
    assert changed.sum() == 4
    assert {tuple(row) for row in quantizer.codebook[changed].tolist()} == {tuple(r) for r in x[:4].tolist()}
    quantizer(x, mask=torch.zeros(7, dtype=torch.bool))  # with no vector at all nothing is replaced
    assert (quantizer.codebook != before).any(-1).sum() == 4


def test_restarts_follow_the_seed():
    outcomes = []
    x = torch.randn(31, 3)
    for seed in 1, 1, 2:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(19, 3, restart_below=5.0)
        torch.manual_seed(seed)
        quantizer(x)
        outcomes.append(quantizer.codebook.detach())
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_restarts_save_a_collapsed_codebook():
    clusters = 10 * torch.randn(16, 4)
    used = {}
    for restart_below in None, 0.5:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(16, 4, ema_decay=0.8, restart_below=restart_below)
        for _ in range(30):
            out = quantizer(clusters.repeat(8, 1) + 0.1 * torch.randn(128, 4))
        used[restart_below] = out.usage.item()
    assert used[None] < 0.8 < used[0.5]


def test_autocast_and_half_precision_keep_loss_and_averages_in_float32():
    quantizer = drawn(VectorQuantizer(7, 3, ema_decay=0.9))
    exact = copy.deepcopy(quantizer)
    x = torch.randn(11, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(x)
    expected = exact(x.float())
    assert (out.output.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(quantizer.state_dict(), exact.state_dict())
    half = VectorQuantizer(7, 3, ema_decay=0.9, dtype=torch.bfloat16)
    assert (half.codebook.dtype, half.ema_sum.dtype) == (torch.bfloat16, torch.float32)
    for dtype in torch.float16, torch.bfloat16:
        assert quantizer(x.to(dtype)).output.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_training_step_on_the_kernels_is_that_of_the_definitions(ema_decay, masked, dtype, kernels_device):
    x = torch.randn(2, 70, 6, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 70) < 0.7 if masked else None
    first = drawn(VectorQuantizer(11, 6, ema_decay=ema_decay, restart_below=0.5))
    outcomes = []
    for backend in "reference", "triton":
        quantizer = copy.deepcopy(first)
        torch.manual_seed(1)
        with use_backend(backend):
            out = quantizer(x, mask=mask)
        of = [x, *quantizer.parameters()]
        gradients = torch.autograd.grad(out.output.float().sum() + out.loss, of)
        outcomes.append([*out, *gradients, *quantizer.state_dict().values()])
    torch.testing.assert_close(*outcomes)


def test_training_compiles_whole():
    torch._dynamo.reset()
    eager = drawn(VectorQuantizer(7, 3, ema_decay=0.9, restart_below=0.95, **WIDE))
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in 5, 11:
        x, mask = torch.randn(2, length, 3, **WIDE), torch.rand(2, length) < 0.7
        torch.manual_seed(0)
        expected = eager(x, mask=mask)
        torch.manual_seed(0)
        torch.testing.assert_close(tuple(compiled(x, mask=mask)), tuple(expected))
        torch.testing.assert_close(other.state_dict(), eager.state_dict())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_one_process_of_a_group_is_as_none(ema_decay, tmp_path):
    alone = drawn(VectorQuantizer(7, 3, ema_decay=ema_decay, restart_below=0.95))
    grouped, x = copy.deepcopy(alone), torch.randn(11, 3)
    torch.manual_seed(0)
    alone(x)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        grouped(x)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(grouped.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_statistics_are_summed_over_processes(monkeypatch):
    """A second process with the same batch: every sum doubles."""
    one = drawn(VectorQuantizer(7, 3, ema_decay=0.9, **WIDE))
    two, x = copy.deepcopy(one), torch.randn(11, 3, **WIDE)
    two(x.repeat(2, 1))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    out = one(x)
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    assert out.perplexity <= 7


def test_restarts_are_those_of_the_first_process(monkeypatch):
    quantizer, codes = VectorQuantizer(3, 2, restart_below=5.0), torch.randn(3, 2)

    def from_another(tensor: Tensor, source: int) -> None:
        assert source == 0
        tensor.copy_(torch.cat([torch.tensor([[1.0], [0.0], [1.0]]), codes], -1))

    before = quantizer.codebook.detach().clone()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed, "broadcast", from_another)
    quantizer(torch.randn(11, 2))
    assert torch.equal(quantizer.codebook, torch.stack([codes[0], before[1], codes[2]]))


def theirs(quantizer: VectorQuantizer, **options) -> torch.nn.Module:
    library = pytest.importorskip("vector_quantize_pytorch")
    peer = library.VectorQuantize(quantizer.dim, quantizer.num_codes, rotation_trick=False, **options)
    with torch.no_grad():
        peer._codebook.embed.copy_(quantizer.codebook)
        peer._codebook.embed_avg.copy_(quantizer.codebook)
    return peer


def test_averages_are_those_of_vector_quantize_pytorch():
    ours = drawn(VectorQuantizer(17, 5, commitment=0.7, ema_decay=0.8))
    peer = theirs(ours, decay=0.8, commitment_weight=0.7)
    for _ in range(3):
        x = torch.randn(3, 11, 5, requires_grad=True)
        mask = torch.rand(3, 11) < 0.8
        out, (output, indices, loss) = ours(x, mask=mask), peer(x, mask=mask)
        assert torch.equal(out.indices, indices)
        torch.testing.assert_close((out.output, out.loss), (output, loss))
        cotangent = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad((out.output, out.loss), x, (cotangent, torch.ones(()))),
            torch.autograd.grad((output, loss), x, (cotangent, torch.ones(()))),
        )
        torch.testing.assert_close(ours.ema_count, peer._codebook.cluster_size[0])
        torch.testing.assert_close(ours.ema_sum, peer._codebook.embed_avg[0])
        torch.testing.assert_close(ours.codebook, peer._codebook.embed[0])
    indices = out.indices.clamp_min(0)
    assert torch.equal(ours.lookup(indices), peer.get_codes_from_indices(indices))


def test_a_learned_codebook_is_that_of_vector_quantize_pytorch():
    ours = drawn(VectorQuantizer(17, 5, commitment=1.0, channel_dim=1))
    peer = theirs(
        ours, learnable_codebook=True, ema_update=False, commitment_weight=1.0, accept_image_fmap=True
    )
    x = torch.randn(2, 5, 7, 3, requires_grad=True)
    out, (output, indices, loss) = ours(x), peer(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close((out.output, out.loss), (output, 2 * loss))  # one mean square for both terms
    cotangents = torch.randn_like(x), torch.tensor(0.6)
    actual = torch.autograd.grad((out.output, out.loss), (x, ours.codebook), cotangents)
    expected = torch.autograd.grad((output, loss), (x, peer._codebook.embed), cotangents)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1][0])


@pytest.mark.parametrize("legacy", [False, True])
def test_the_losses_of_taming_transformers(legacy):
    """Its class, without its one-hot product: β on the right term, or, as it was published, on the other."""
    beta, codebook = 0.25, torch.randn(11, 4, requires_grad=True, **WIDE)
    z = torch.randn(2, 4, 3, 5, requires_grad=True, **WIDE)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
    quantized = codebook[distances.argmin(1)].view(2, 3, 5, 4).permute(0, 3, 1, 2)
    commitment, learning = (quantized.detach() - z).square().mean(), (quantized - z.detach()).square().mean()
    expected = commitment + beta * learning if legacy else learning + beta * commitment
    quantizer = VectorQuantizer(11, 4, commitment=1 / beta if legacy else beta, channel_dim=1, **WIDE)
    quantizer.codebook.data.copy_(codebook.detach())
    loss = quantizer(z).loss * (beta if legacy else 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (z, quantizer.codebook)), torch.autograd.grad(expected, (z, codebook))
    )


def test_starts_as_the_papers_do():
    quantizer = VectorQuantizer(100, 64, ema_decay=0.9)
    assert quantizer.codebook.abs().max() <= 0.01
    assert quantizer.codebook.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.05)
    assert torch.equal(quantizer.ema_count, torch.ones(100))
    assert torch.equal(quantizer.ema_sum, quantizer.codebook)


def test_repr_tells_how_it_learns():
    assert repr(VectorQuantizer(7, 3)) == "VectorQuantizer(7, 3, commitment=0.25)"
    told = repr(VectorQuantizer(7, 3, ema_decay=0.9, restart_below=0.5))
    assert "ema_decay=0.9, restart_below=0.5" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes and dim must be at least 1, got 0 and 3"),
        ({"dim": 0}, "num_codes and dim must be at least 1, got 7 and 0"),
        ({"commitment": -0.1}, "commitment must not be negative, got -0.1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), or None, got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), or None, got -0.1"),
        ({"eps": 0.0}, "eps must be greater than 0, got 0.0"),
        ({"restart_below": 0.0}, "restart_below must be greater than 0, or None, got 0.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"num_codes": 7, "dim": 3, **options})


def test_wrong_inputs_are_refused():
    quantizer = VectorQuantizer(7, 3)
    with pytest.raises(ValueError, match=r"x must have 3 channels in dimension -1, got \(2, 5\)"):
        quantizer(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x must have 3 channels in dimension 1, got \(3,\)"):
        VectorQuantizer(7, 3, channel_dim=1)(torch.randn(3))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 5\).* got torch.float32 of shape"):
        quantizer(torch.randn(2, 5, 3), mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 5\).* of shape \(5,\)"):
        quantizer(torch.randn(2, 5, 3), mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="indices must be integers, got torch"):
        quantizer.lookup(torch.ones(3))
