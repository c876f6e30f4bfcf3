"""The weights of `torch.nn.Transformer`, which has the blocks alone: no embeddings and no last layer."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..base import Model
from .mapping import Rule, fill

_LEAF = r"\.(?P<leaf>weight|bias)"
_ATTENTIONS = {"self_attn": "attention", "multihead_attn": "cross_attention"}
_PARTS = {
    "encoder": {"norm1": "attention_norm", "norm2": "feed_forward_norm"},
    "decoder": {"norm1": "attention_norm", "norm2": "cross_attention_norm", "norm3": "feed_forward_norm"},
}
_RULES = [
    *(
        Rule(rf"{stack}\.layers\.(\d+)\.{theirs}{_LEAF}", rf"{stack}.blocks.\1.{ours}.\g<leaf>")
        for stack, norms in _PARTS.items()
        for theirs, ours in (norms | {"linear1": "feed_forward.up", "linear2": "feed_forward.down"}).items()
    ),
    *(
        Rule(
            rf"(encoder|decoder)\.layers\.(\d+)\.{theirs}\.(query|key|value|out){_LEAF}",
            rf"\1.blocks.\2.{ours}.\3.\g<leaf>",
        )
        for theirs, ours in _ATTENTIONS.items()
    ),
    Rule(rf"(encoder|decoder)\.norm{_LEAF}", r"\1.norm.\g<leaf>"),
]


def load_state(model: Model, state: Mapping[str, Tensor]) -> None:
    """Fills the blocks of a `Transformer`; its embeddings, learned positions and last layer stay.

    A `Transformer` that computes the same has `bias=True, final_norm=True, norm_eps=1e-5`.

    Raises:
        ValueError: a name is left over on either side, or a shape differs.
    """
    own = ("source_embedding", "target_embedding", "positions", "head")
    fill(model, dict(_split(state)), _RULES, optional=own)


def _split(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """With three projections where theirs are one."""
    for name, tensor in state.items():
        before, joint, leaf = name.partition(".in_proj_")
        if joint:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"{before}.{part}.{leaf}", rows
        else:
            yield name.replace(".out_proj.", ".out."), tensor
