"""LSH attention of the last token alone, which sees every other one: a step of decoding.

Its chunk in each round is found in the order of all tokens, and the softmax over all rounds is one over all
that its chunks hold.
"""

import torch
from torch import Tensor

from ._lsh_rounds import Options, numbered, sort_by_bucket, unit


def attend_last(query_key: Tensor, value: Tensor, buckets: Tensor, options: Options) -> Tensor:
    """What the last token is given, (B, H, 1, Dv), by causal attention. Time O(H R L log L) for the order."""
    order, labels = sort_by_bucket(buckets, None, options)
    n_rounds, length = order.shape[2:]
    size = min(options.chunk_size, length)
    count = -(-length // size)
    place = (order == length - 1).to(torch.uint8).argmax(-1)  # (B, H, R)
    # The chunks that it sees, numbered through all rounds, and the places in them: (B, H, R S c).
    steps = torch.arange(-options.look_back, options.look_ahead + 1, device=order.device)
    within = (place // size).unsqueeze(-1) + steps
    if options.circular:  # a ring shorter than the reach would come round to the same chunk twice
        seen = (steps < n_rounds * count - options.look_back).expand(within.shape)
    else:
        seen = (within >= 0) & (within < count)
    first = count * torch.arange(n_rounds, device=order.device).unsqueeze(-1)
    chunks = (within + first) % (n_rounds * count)
    places = (chunks % count * size).unsqueeze(-1) + torch.arange(size, device=order.device)
    seen = (seen.unsqueeze(-1) & (places < length)).flatten(2)
    at = ((chunks // count * length).unsqueeze(-1) + places.clamp_max(length - 1)).flatten(2)
    tokens = order.flatten(2).gather(-1, at)
    seen = seen & (tokens != length - 1)
    if options.same_bucket:
        labels = numbered(labels)
        own = labels.gather(-1, place.unsqueeze(-1))  # (B, H, R, 1)
        seen = seen & (labels.flatten(2).gather(-1, at).unflatten(-1, (n_rounds, -1)) == own).flatten(2)
    query = query_key[:, :, -1:]
    keys = unit(_rows(query_key, tokens), options.scale)
    scores = (query @ keys.transpose(-2, -1)).squeeze(2)
    scores = scores.to(torch.promote_types(query_key.dtype, torch.float32))
    if options.deduplicate:
        meets = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & seen.unsqueeze(-2)
        scores = scores - meets.sum(-1).clamp_min(1).to(scores.dtype).log()
    alone = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(alone, 0.0)
    out = weights.to(value.dtype).unsqueeze(2) @ _rows(value, tokens)
    return torch.where(alone.unsqueeze(-1), value[:, :, -1:], out)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, H, N, D) of (B, H, L, D), at (B, H, N)."""
    return x.gather(2, tokens.unsqueeze(-1).expand(*tokens.shape, x.shape[3]))
