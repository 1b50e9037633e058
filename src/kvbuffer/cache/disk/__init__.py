"""The tier below memory: prefixes that were evicted, and conversations across a restart, in files.

entry.py      the format of a file
index.py      which files there are, and which of them serves a prompt
writer.py     a thread that writes, so that no step waits for a disk
tier.py       DiskTier: the three together in a folder
identity.py   what makes two models' caches interchangeable
bandwidth.py  whether loading is cheaper than computing
"""

from kvbuffer.cache.disk.entry import Geometry
from kvbuffer.cache.disk.identity import fingerprint
from kvbuffer.cache.disk.index import DiskMatch
from kvbuffer.cache.disk.tier import DiskStats, DiskTier

__all__ = ["DiskMatch", "DiskStats", "DiskTier", "Geometry", "fingerprint"]
