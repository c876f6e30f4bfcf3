"""Reformers of two blocks beside transformers' and reformer-pytorch's, with the same weights and buckets.

    lamina             `Reformer`: local and hashed attention beside transformers', hashed alone beside
                       reformer-pytorch's; reversible as they are
    transformers       `ReformerModelWithLMHead`, with its default feed-forward networks of 512
    reformer_pytorch   `ReformerLM`, with its default of four times the width, not cut into chunks here

Beside transformers' no layer stands above the hashed one, so that keys and values can be kept in decoding;
both also read all tokens again at each step. reformer-pytorch's keeps none, and needs whole pairs of chunks.

Each pays for its own hashing, and is then given our buckets: float32 hashes near a tie differ. The peers
leave a token itself out by a score of -1e5 and -5e4, which costs float32 up to 0.75 % of a row; here it is
-1e3, which leaves it out as well, so that the outputs are equal.
"""

from collections.abc import Callable

import pytest
import torch
from lamina.blocks import greedy_search
from lamina.layers import LSHAttention
from lamina.layers._heads import split_heads
from lamina.models import Reformer, ReformerConfig
from lamina.models.checkpoints.reformer import config_of, load_state
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [4096, 16384, 65536] if DEVICE == "cuda" else [1024, 4096, 8192]
DIM, HEADS, VOCABULARY, CHUNK, ROUNDS, SELF = 256, 4, 256, 64, 4, -1e3
WRITTEN = 8


def paying(hashing: Callable[..., Tensor], buckets: Tensor) -> Callable[..., Tensor]:
    """Runs the hashing, and gives these buckets."""

    def run(*args, **kwargs) -> Tensor:
        hashing(*args, **kwargs)
        return buckets

    return run


def our_buckets(model: Reformer, ids: Tensor, *, padding: int = 0) -> list[Tensor]:
    """Of each hashed layer, (B, H, R L), as the peers number them: one of another round is another.

    With padding there is one more in each round, for the tokens that are put behind.
    """
    found: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        query_key = split_heads(layer.query_key(args[0]), layer.num_heads)
        buckets, options = layer._hash(query_key, None)
        rounds = torch.arange(ROUNDS, device=buckets.device)[:, None]
        n = options["num_buckets"]
        buckets = nn.functional.pad(buckets, (0, padding), value=n)
        found.append((buckets + (n + bool(padding)) * rounds).flatten(2))

    layers = [m for m in model.modules() if isinstance(m, LSHAttention)]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def transformers(ids: Tensor) -> tuple[Reformer, nn.Module, Callable[[Tensor], Tensor]]:
    library = pytest.importorskip("transformers")
    length = ids.shape[1]
    config = library.ReformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        attn_layers=["local", "lsh"],
        num_attention_heads=HEADS,
        attention_head_size=DIM // HEADS,
        feed_forward_size=512,
        axial_pos_embds=False,
        max_position_embeddings=length,
        lsh_attn_chunk_length=CHUNK,
        local_attn_chunk_length=CHUNK,
        num_hashes=ROUNDS,
        num_buckets=length // CHUNK,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )
    theirs = library.ReformerModelWithLMHead(config).to(DEVICE).train()  # else it has no backward pass
    nn.init.zeros_(theirs.lm_head.bias)  # which their version 5 holds, and never adds
    ours = Reformer(config_of(config.to_dict()), device=DEVICE)
    load_state(ours, theirs.state_dict())
    (layer,) = (m for m in theirs.modules() if hasattr(m, "self_mask_value_float32"))
    layer.self_mask_value_float32.fill_(SELF)
    (buckets,) = our_buckets(ours, ids)
    layer._hash_vectors = paying(layer._hash_vectors, buckets)
    return ours, theirs, lambda ids: theirs(ids).logits


def reformer_pytorch(ids: Tensor) -> tuple[Reformer, nn.Module, Callable[[Tensor], Tensor]]:
    library = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    library.TOKEN_SELF_ATTN_VALUE = SELF
    length = ids.shape[1]
    theirs = library.ReformerLM(
        VOCABULARY,
        DIM,
        2,
        length,
        heads=HEADS,
        dim_head=DIM // HEADS,
        bucket_size=CHUNK,
        n_hashes=ROUNDS,
        ff_chunks=1,
        causal=True,
        absolute_position_emb=True,
    ).to(DEVICE)
    ours = Reformer(
        ReformerConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            depth=2,
            layers=("lsh",),
            num_heads=HEADS,
            head_dim=None,
            hidden_dim=4 * DIM,
            axial_shape=None,
            max_length=length,
            chunk_size=CHUNK,
            num_hashes=ROUNDS,
            num_buckets=length // CHUNK,
            scaling="root",
            circular=True,
            streams="mean",
            activation="gelu",
            dropout=0.0,
            norm_eps=1e-5,
        ),
        device=DEVICE,
    )
    pairs = [
        (ours.embedding, theirs.token_emb),
        (ours.positions, theirs.pos_emb.emb),
        (ours.norm, theirs.norm),
        (ours.head, theirs.out[1]),
    ]
    inner = []
    for block, their in zip(ours.blocks.blocks, theirs.reformer.layers.blocks, strict=True):
        attention, feed_forward = their.f.net, their.g.net
        heads = attention.fn
        heads.to_out.bias = None
        pairs += [
            (block.first.norm, attention.norm),
            (block.first.layer.query_key, heads.toqk),
            (block.first.layer.value, heads.tov),
            (block.first.layer.out, heads.to_out),
            (block.second.norm, feed_forward.norm),
            (block.second.layer.up, feed_forward.fn.fn.w1),
            (block.second.layer.down, feed_forward.fn.fn.w2),
        ]
        inner.append(heads.lsh_attn)
    for mine, of in pairs:
        mine.load_state_dict(of.state_dict())
    for layer, buckets in zip(inner, our_buckets(ours, ids), strict=True):
        layer.hash_vectors = paying(layer.hash_vectors, buckets.flatten(0, 1))
    return ours, theirs, theirs


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("peer", [transformers, reformer_pytorch], ids=lambda p: p.__name__)
@pytest.mark.parametrize("how", ["lamina", "peer"])
def bench_reformer(benchmark, benchmark_op, how, peer, length, direction):
    benchmark.group = f"Reformer L={length} {direction} beside {peer.__name__}"
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, length), device=DEVICE)
    ours, theirs, call = peer(ids)
    timed, other = ((ours, ours), (call, theirs)) if how == "lamina" else ((call, theirs), (ours, ours))
    backward = direction != "forward"
    benchmark_op(
        timed[0],
        [ids],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
    )


@pytest.mark.parametrize("length", LENGTHS[:2])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("how", ["lamina", "transformers"])
def bench_decoding(benchmark, benchmark_op, how, use_cache, length):
    kept = "with" if use_cache else "without"
    benchmark.group = f"Reformer writes {WRITTEN} tokens behind {length}, {kept} a cache"
    torch.manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, length), device=DEVICE)
    with torch.no_grad():
        # Positions for what is written, and for what transformers pads to a whole chunk.
        ours, theirs, _ = transformers(prompt.new_zeros(1, length + 2 * CHUNK))
        ours.eval()
        theirs.eval()
        search = {"max_length": WRITTEN, "end_id": -1}

        def generated(prompt: Tensor) -> Tensor:
            return greedy_search(ours.decoding(use_cache=use_cache), prompt, **search).best.double()

        whole = torch.cat([prompt, generated(prompt).long()], 1)
        steps = TheirSteps(ours, theirs, whole, length, use_cache)

        def their_generated(prompt: Tensor) -> Tensor:
            return greedy_search(steps.decoding(), prompt, **search).best.double()

        timed, other = (generated, their_generated) if how == "lamina" else (their_generated, generated)
        benchmark_op(timed, [prompt], backward=False, reference=other)


class TheirSteps:
    """transformers' model at work, given our buckets for each step of what is written."""

    def __init__(
        self, ours: Reformer, theirs: nn.Module, whole: Tensor, length: int, use_cache: bool
    ) -> None:
        self.model, self.use_cache = theirs, use_cache
        (self.layer,) = (m for m in theirs.modules() if hasattr(m, "self_mask_value_float32"))
        self.hashing = type(self.layer)._hash_vectors.__get__(self.layer)
        self.hashed = {}
        for n in range(length, whole.shape[1]):
            padding = 0 if use_cache else -n % CHUNK
            (buckets,) = our_buckets(ours, whole[:, :n], padding=padding)
            if use_cache and n > length:  # it hashes the new token alone
                buckets = buckets.unflatten(-1, (ROUNDS, -1))[..., -1]
            self.hashed[n] = buckets

    def decoding(self) -> Callable[[Tensor], Tensor]:
        read, kept = None, None

        def step(tokens: Tensor) -> Tensor:
            nonlocal read, kept
            read = tokens if read is None else torch.cat([read, tokens], 1)
            self.layer._hash_vectors = paying(self.hashing, self.hashed[read.shape[1]])
            if not self.use_cache:
                return self.model(read, use_cache=False).logits[:, -1]
            found = self.model(tokens, past_buckets_states=kept, use_cache=True)
            kept = found.past_buckets_states
            return found.logits[:, -1]

        return step
