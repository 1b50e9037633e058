"""The predictive cache's part of ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvbuffer.server.instcache import InstCache

# Metric name, help, attribute of InstCacheStats.
_COUNTERS = (
    ("instcache_queries", "Requests looked up in the predictive cache.", "queries"),
    ("instcache_hits", "Requests answered from it.", "hits"),
    ("instcache_hit_tokens", "Output tokens of these answers.", "hit_tokens"),
    ("instcache_hit_bytes", "Bytes of text of these answers.", "hit_bytes"),
    ("instcache_seconds_saved", "What these would have taken, by what a token of the others takes.", "seconds_saved"),
    ("instcache_damaged", "Entries that could not be read.", "damaged"),
    ("instcache_swaps", "Stores that took the place of another.", "swaps"),
)


class InstCacheCollector(Collector):
    """Reads the predictive cache's counters when it is scraped."""

    def __init__(self, instcache: InstCache, model_name: str) -> None:
        self._instcache = instcache
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield every metric, labelled with the model's name."""
        labels, stats = [self._model_name], self._instcache.stats
        for name, help_text, attribute in _COUNTERS:
            counter = CounterMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
            counter.add_metric(labels, getattr(stats, attribute))
            yield counter
        bypassed = CounterMetricFamily(
            "kvbuffer:instcache_bypassed", "Requests not looked up, by why.", labels=["model_name", "reason"]
        )
        for reason, count in stats.bypassed.items():
            bypassed.add_metric([*labels, reason], count)
        yield bypassed
        for name, help_text, value in (
            ("instcache_entries", "Answers in the store.", self._instcache.num_entries),
            ("instcache_bytes", "Size of the store.", self._instcache.num_bytes),
        ):
            gauge = GaugeMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
