"""Prefix caching for hybrid models: what was computed for one request serves the next that begins with the same text.

tree.py         pages of tokens and, along their paths, the snapshots from which a text can be resumed
store.py        the trees, and the cache's references to the blocks that they name
cache.py        PrefixCache: what requests ask of it
eviction.py     frees blocks: what is worth least goes first
usefulness.py   what a snapshot or a page is worth, learned from what was used
queue.py        items in the order of a worth that changes
pins.py         what is kept from eviction for some time
checkpoints.py  where the prefill of a prompt leaves snapshots
"""

from kvbuffer.cache.prefix.cache import PrefixCache, PrefixCounters, PrefixMatch
from kvbuffer.cache.prefix.checkpoints import checkpoint_positions
from kvbuffer.cache.prefix.tree import Origin

__all__ = ["Origin", "PrefixCache", "PrefixCounters", "PrefixMatch", "checkpoint_positions"]
