"""The Transformer beside `torch.nn.Transformer` with the same weights, and its ways to decode.

    lamina      encoder and decoder, on embedded tokens, as PyTorch's model has no embeddings
    torch.nn    PyTorch's, which in evaluation takes its fused path for the encoder

Decoding writes as many tokens as the sources have: `lamina` keeps keys and values, `uncached` reads all
tokens again at each step, and so does `torch.nn`, which has no cache. The tokens are the same.
"""

import pytest
import torch
from lamina.blocks import beam_search, greedy_search
from lamina.models import Transformer, TransformerConfig
from lamina.models.checkpoints.torch_transformer import load_state
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH = (16, 32) if DEVICE == "cpu" else (64, 128)
CONFIG = TransformerConfig(
    vocab_size=8000,
    dim=256 if DEVICE == "cpu" else 512,
    encoder_depth=3 if DEVICE == "cpu" else 6,
    decoder_depth=3 if DEVICE == "cpu" else 6,
    num_heads=4 if DEVICE == "cpu" else 8,
    hidden_dim=1024 if DEVICE == "cpu" else 2048,
    bias=True,
    final_norm=True,
    norm_eps=1e-5,
)


def ours_and_theirs() -> tuple[Transformer, nn.Transformer]:
    torch.manual_seed(0)
    ours = Transformer(CONFIG, device=DEVICE).eval()
    theirs = nn.Transformer(
        CONFIG.dim,
        CONFIG.num_heads,
        CONFIG.encoder_depth,
        CONFIG.decoder_depth,
        CONFIG.hidden_dim,
        batch_first=True,
        device=DEVICE,
    ).eval()
    load_state(ours, theirs.state_dict())
    return ours, theirs


def sources(padding: float) -> Tensor:
    """Lengths from some to all, with that share of padding; every sequence ends in the end's token."""
    lengths = torch.linspace(1 - 2 * padding, 1, BATCH).mul(LENGTH).round().clamp(1, LENGTH).long()
    ids = torch.randint(3, CONFIG.vocab_size, (BATCH, LENGTH))
    ids[torch.arange(BATCH), lengths - 1] = CONFIG.end_id
    return ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], CONFIG.padding_id).to(DEVICE)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("padding", [0.0, 0.25])
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_transformer(benchmark, benchmark_op, how, padding, direction):
    benchmark.group = f"Transformer ({BATCH}, {LENGTH}) {padding:.0%} padding {direction}"
    model, peer = ours_and_theirs()
    key_mask = None if padding == 0 else sources(padding) != CONFIG.padding_id
    hidden = None if key_mask is None else ~key_mask
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).triu(1)

    def ours(source: Tensor, target: Tensor) -> Tensor:
        memory = model.encoder(source, key_mask=key_mask)
        return model.decoder(target, memory, memory_key_mask=key_mask, is_causal=True)

    def theirs(source: Tensor, target: Tensor) -> Tensor:
        return peer(
            source,
            target,
            tgt_mask=future,
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )

    backward = direction != "forward"
    timed, other = ((ours, model), (theirs, peer)) if how == "lamina" else ((theirs, peer), (ours, model))
    blocks = sum(p.numel() for p in peer.parameters())
    benchmark_op(
        timed[0],
        [torch.randn(BATCH, LENGTH, CONFIG.dim) for _ in range(2)],
        backward=backward,
        parameters=weights(timed[1]) if backward else (),
        reference=other[0],
        reference_parameters=weights(other[1]) if backward else (),
        flops=(6 if backward else 2) * blocks * BATCH * LENGTH,
    )


def weights(model: nn.Module) -> list[Tensor]:
    """Of the blocks: ours has embeddings too."""
    stacks = (model.get_submodule(stack) for stack in ("encoder", "decoder"))
    return [p for stack in stacks for p in stack.parameters()]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("how", ["lamina", "uncached", "torch.nn"])
def bench_decoding(benchmark, benchmark_op, how, num_beams):
    some = sources(0.25)[::4]
    benchmark.group = f"Transformer {tuple(some.shape)} writes {LENGTH} tokens, {num_beams} beams"
    model, peer = ours_and_theirs()
    search = {"max_length": LENGTH, "end_id": CONFIG.end_id, "padding_id": CONFIG.padding_id}

    def cached(source: Tensor) -> Tensor:
        return model.generate(source, num_beams=num_beams, max_length=LENGTH).best.double()

    def by(decoding, source: Tensor) -> Tensor:
        prompt = source.new_full((len(source), 1), CONFIG.start_id)
        if num_beams == 1:
            return greedy_search(decoding, prompt, **search).best.double()
        return beam_search(decoding, prompt, num_beams=num_beams, **search).best.double()

    def uncached(source: Tensor) -> Tensor:
        return by(model.decoding(source, use_cache=False), source)

    def theirs(source: Tensor) -> Tensor:
        return by(TorchDecoding(model, peer, source), source)

    operation = {"lamina": cached, "uncached": uncached, "torch.nn": theirs}[how]
    with torch.no_grad():
        benchmark_op(operation, [some], backward=False, reference=uncached if how == "lamina" else cached)


class TorchDecoding:
    """PyTorch's model at work, within our embeddings and last layer."""

    def __init__(self, model: Transformer, peer: nn.Transformer, source: Tensor) -> None:
        self.model, self.peer = model, peer
        self.hidden = source == CONFIG.padding_id
        embedded = model.positions(model.source_embedding(source))
        self.memory = peer.encoder(embedded, src_key_padding_mask=self.hidden)
        self.tokens = source.new_empty(len(source), 0)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens], 1)
        length = self.tokens.shape[1]
        x = self.peer.decoder(
            self.model.positions(self.model.target_embedding(self.tokens)),
            self.memory,
            tgt_mask=torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1),
            memory_key_padding_mask=self.hidden,
            tgt_is_causal=True,
        )
        logits = self.model.target_embedding.logits(x[:, -1])
        logits[:, [CONFIG.padding_id, CONFIG.start_id]] = -torch.inf
        return logits

    def reorder(self, rows: Tensor) -> None:
        self.memory, self.hidden, self.tokens = self.memory[rows], self.hidden[rows], self.tokens[rows]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("padding", [0.25, 0.5])
@pytest.mark.parametrize("how", ["lamina-packed", "lamina-padded"])
def bench_packed_encoder(benchmark, benchmark_op, how, padding, direction):
    benchmark.group = f"Transformer's encoder ({BATCH}, {LENGTH}) {padding:.0%} padding {direction}"
    model, _ = ours_and_theirs()
    backward = direction != "forward"
    parameters = [*model.encoder.parameters(), model.source_embedding.weight] if backward else []

    def encoded(source: Tensor, *, packed: bool = how == "lamina-packed") -> Tensor:
        tokens, key_mask = model.encode(source, packed=packed)
        return tokens if packed else tokens * key_mask.unsqueeze(-1)

    benchmark_op(
        encoded,
        [sources(padding)],
        backward=backward,
        parameters=parameters,
        reference=lambda source: encoded(source, packed=how != "lamina-packed"),
        reference_parameters=parameters,
    )
