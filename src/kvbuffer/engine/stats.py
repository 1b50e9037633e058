"""A reading of the engine's counters and pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbuffer.cache.disk import DiskStats
from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.pools import POOL_KINDS, PoolKind
from kvbuffer.cache.prefix import PrefixCounters
from kvbuffer.cache.residency import Residency
from kvbuffer.engine.scheduler import Scheduler
from kvbuffer.engine.speculative.speculator import SpeculativeStats, Speculator


@dataclass(frozen=True)
class PoolStats:
    """Blocks of one kind, or the bytes of all kinds.

    Attributes:
        used: held by running requests.
        cached: held by cached prefixes alone; given up when requests need them.
        total: the most that there can be.
    """

    used: int = 0
    cached: int = 0
    total: int = 0


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine's counters and pools.

    Attributes:
        num_running: requests with memory.
        num_waiting: requests without.
        num_without_state: running requests that live on records alone.
        num_preemptions: requests put back in the queue because memory ran out.
        num_folds: buffers folded into states, counted per request.
        delays: steps in which the next request could not start, by what was missing.
        pools: the blocks, by kind.
        memory: the bytes that all pools share.
        resident_bytes: bytes that the system has given, for these blocks and for free ones.
        prefixes: what the prefix cache was asked and had.
        disk: the second tier; None without one.
        speculative: what became of drafts; None without speculation.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_without_state: int = 0
    num_preemptions: int = 0
    num_folds: int = 0
    delays: dict[str, int] = field(default_factory=dict)
    pools: dict[PoolKind, PoolStats] = field(default_factory=dict)
    memory: PoolStats = field(default_factory=PoolStats)
    resident_bytes: int = 0
    prefixes: PrefixCounters = field(default_factory=PrefixCounters)
    disk: DiskStats | None = None
    speculative: SpeculativeStats | None = None


def read_stats(
    scheduler: Scheduler,
    memory: RequestMemory,
    residency: Residency,
    speculator: Speculator | None,
    disk: DiskStats | None,
) -> EngineStats:
    """Return the counters and pools as they are now; may be called from any thread."""
    pools = {kind: _pool_stats(memory, kind) for kind in POOL_KINDS}
    sizes = [memory.pools.by_kind(kind).block_bytes for kind in POOL_KINDS]
    return EngineStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_without_state=memory.rows.num_used - int((memory.slot >= 0).sum()),
        num_preemptions=scheduler.num_preemptions,
        num_folds=scheduler.num_folds,
        delays=dict(scheduler.delays),
        pools=pools,
        memory=PoolStats(
            sum(pool.used * size for pool, size in zip(pools.values(), sizes, strict=True)),
            sum(pool.cached * size for pool, size in zip(pools.values(), sizes, strict=True)),
            memory.pools.budget,
        ),
        resident_bytes=residency.num_bytes,
        prefixes=PrefixCounters() if memory.prefixes is None else memory.prefixes.counters,
        disk=disk,
        speculative=None if speculator is None else speculator.stats,
    )


def _pool_stats(memory: RequestMemory, kind: PoolKind) -> PoolStats:
    pool, used = memory.pools.by_kind(kind), memory.num_in_use(kind)
    return PoolStats(used, pool.num_used - used, pool.size)
