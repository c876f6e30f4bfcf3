"""LSH attention of the last token alone, which sees every other one: a step of decoding.

Its chunk in each round is found in the order of all tokens, and the softmax over all rounds is one over all
that its chunks hold.
"""

import torch
from torch import Tensor

from ._lsh_rounds import Options, beside, chunked, in_reach, numbered, rows_at, sort_by_bucket, unit


def attend_last(query_key: Tensor, value: Tensor, buckets: Tensor, options: Options) -> Tensor:
    """What the last token is given, (B, H, 1, Dv), by causal attention. Time O(H R L log L) for the order."""
    order, labels = sort_by_bucket(buckets, None, options)
    n_rounds, length = order.shape[2:]
    size = min(options.chunk_size, length)
    options = options._replace(chunk_size=size)
    count = -(-length // size)
    place = (order == length - 1).to(torch.uint8).argmax(-1)  # (B, H, R)
    chunk = place // size + count * torch.arange(n_rounds, device=order.device)

    def around(x: Tensor, filler: int) -> Tensor:
        """What stands in and beside the chunk, (B, H, R, w), of (B, H, R, L)."""
        all_chunks = beside(chunked(x, count, size, filler), options)
        return all_chunks.gather(2, chunk.unsqueeze(-1).expand(*chunk.shape, all_chunks.shape[3]))

    tokens = around(order, length)
    seen = (tokens < length - 1) & in_reach(n_rounds, count, options, order.device)[chunk]
    if options.same_bucket:
        labels = numbered(labels)
        seen = seen & (around(labels, -1) == labels.gather(-1, place.unsqueeze(-1)))
    tokens, seen = tokens.clamp_max(length - 1).flatten(2), seen.flatten(2)
    keys = unit(rows_at(query_key, tokens), options.scale)
    scores = (query_key[:, :, -1:] @ keys.transpose(-2, -1)).squeeze(2)
    scores = scores.to(torch.promote_types(query_key.dtype, torch.float32))
    if options.deduplicate:
        meets = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & seen.unsqueeze(-2)
        scores = scores - meets.sum(-1).clamp_min(1).to(scores.dtype).log()
    alone = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(alone, 0.0)
    out = weights.to(value.dtype).unsqueeze(2) @ rows_at(value, tokens)
    return torch.where(alone.unsqueeze(-1), value[:, :, -1:], out)
