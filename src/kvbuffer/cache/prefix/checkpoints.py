"""Where the prefill of a prompt leaves snapshots for texts to come."""

from __future__ import annotations

from kvbuffer.cache.prefix.cache import PrefixMatch


def checkpoint_positions(
    match: PrefixMatch, num_tokens: int, num_free: int, *, chunk: int, split: int = 1, min_saving: int = 64
) -> list[int]:
    """Return the numbers of tokens after which prefill should leave a snapshot, in order.

    Where this prompt leaves a text that is cached, a third is likely to leave it too: a snapshot there is worth another
    one's place. Anywhere else it is a guess, made at the borders of prefill chunks, evenly spread, and only with slots
    that nobody uses. The ends of prompt and output are for the caller to add.

    Args:
        match: what of the prompt is cached.
        num_tokens: length of the prompt.
        num_free: state slots that are free.
        chunk: tokens that prefill computes at a time.
        split: prefill can stop at multiples of this many tokens.
        min_saving: tokens that a snapshot must save a later request, at least.
    """
    branch = match.branch // split * split
    wanted = [branch] if match.num_tokens + min_saving <= branch < num_tokens else []
    step = max(chunk // split, 1) * split
    borders = [
        border
        for border in range(step, num_tokens, step)
        if border >= match.num_tokens + min_saving and border != branch
    ]
    spare = max(0, num_free - len(wanted))
    every = -(-len(borders) // spare) if spare else 0
    return sorted(wanted + (borders[every - 1 :: every] if every else []))
