"""Local attention beside the package local-attention, SDPA under the same mask, and transformers' layer."""

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import local_attention
from lamina.kernels.local_attention import local_mask
from lamina.layers import LocalAttention
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM, WINDOW, LENGTH = 8, 64, 256, 4096
both_directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])


@both_directions
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both sides"])
@pytest.mark.parametrize("how", ["lamina", "local-attention", "SDPA with a mask"])
def bench_local_attention(benchmark, benchmark_op, how, is_causal, direction):
    benchmark.group = f"local_attention {'causal' if is_causal else 'both sides'} {direction}"
    ahead = 0 if is_causal else 1
    mask = local_mask(LENGTH, WINDOW, 1, ahead, torch.device(DEVICE))
    mask = mask.tril() if is_causal else mask

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_attention(query, key, value, window=WINDOW, look_ahead=ahead, is_causal=is_causal)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    package = pytest.importorskip("local_attention")
    theirs = package.LocalAttention(WINDOW, causal=is_causal, use_rotary_pos_emb=False)
    timed, other = {
        "lamina": (ours, theirs),
        "local-attention": (theirs, ours),
        "SDPA with a mask": (sdpa, ours),
    }[how]
    inputs = [torch.randn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3)]
    benchmark_op(timed, inputs, backward=direction != "forward", reference=other)


@both_directions
@pytest.mark.parametrize("how", ["lamina", "transformers"])
def bench_local_attention_layer(benchmark, benchmark_op, how, direction):
    benchmark.group = f"LocalAttention {direction}"
    dim = HEADS * HEAD_DIM
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=dim,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        local_attn_chunk_length=WINDOW,
        is_decoder=True,
        local_attention_probs_dropout_prob=0.0,
    )
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    layer = LocalAttention(dim, HEADS, window=WINDOW, bias=False).to(DEVICE)
    inner, out = modeling.LocalSelfAttention(config), nn.Linear(dim, dim, bias=False)
    inner.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("out")})
    out.load_state_dict(layer.out.state_dict())
    theirs = nn.ModuleList([inner, out]).to(DEVICE)

    def ours(tokens: Tensor) -> Tensor:
        return layer(tokens, is_causal=True)

    def peer(tokens: Tensor) -> Tensor:
        return out(inner(tokens).hidden_states)

    backward = direction != "forward"
    timed, other = ((ours, layer), (peer, theirs)) if how == "lamina" else ((peer, theirs), (ours, layer))
    benchmark_op(
        timed[0],
        [torch.randn(1, LENGTH, dim)],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
    )
