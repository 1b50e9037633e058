"""What the numbers were measured on; shared with ``kvbuffer bench``."""

from kvbuffer.bench.machine import ForeignLoad, commit, describe, measure_limits

__all__ = ["ForeignLoad", "commit", "describe", "measure_limits"]
