"""``/metrics`` in Prometheus' format, under vLLM's names with ``kvbuffer:`` in place of ``vllm:``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvbuffer.cache.pools import PoolKind
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.engine.request_metrics import Histogram
from kvbuffer.engine.speculative.speculator import SpeculativeStats

# Metric name, help, attribute of EngineStats.
_GAUGES = (
    ("num_requests_running", "Requests in the running batch.", "num_running"),
    ("num_requests_waiting", "Requests waiting to be scheduled.", "num_waiting"),
    ("num_requests_without_state", "Running requests that live on records alone.", "num_without_state"),
)
_COUNTERS = (
    ("num_preemptions", "Requests put back in the queue because memory ran out.", "num_preemptions"),
    ("folds", "KV buffers folded into their states, counted per request.", "num_folds"),
)
# Kind of block, name in the metrics, help.
_POOLS: tuple[tuple[PoolKind, str, str], ...] = (
    ("attention_pages", "attention_pages", "Pages of full attention's keys and values"),
    ("slots", "state_slots", "Linear-attention state slots"),
    ("record_pages", "record_pages", "Pages of KV buffer records"),
    ("rings", "rings", "Rings of convolution inputs"),
)
# Metric name, help, attribute of DiskStats.
_DISK_COUNTERS = (
    ("disk_cache_saved", "Prefixes written to the cache directory.", "saved"),
    ("disk_cache_loaded", "Prefixes read from the cache directory.", "loaded"),
    ("disk_cache_dropped", "Prefixes not written because writing could not keep up, or was off.", "dropped"),
    ("disk_cache_damaged", "Files of the cache directory that turned out unusable.", "damaged"),
)
# Metric name, help, attribute of SpeculativeStats.
_SPECULATIVE_COUNTERS = (
    ("spec_decode_num_drafts", "Drafts verified.", "num_drafts"),
    ("spec_decode_num_draft_tokens", "Tokens in them.", "num_draft_tokens"),
    ("spec_decode_num_accepted_tokens", "Tokens of them that were accepted.", "num_accepted_tokens"),
    ("spec_decode_draft_seconds", "Time spent drafting.", "draft_seconds"),
    ("spec_decode_verify_seconds", "Time of the steps that verified drafts.", "verify_seconds"),
)
# Metric name, help, attribute of RequestMetrics.
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From arrival to the first token.", "time_to_first_token"),
    ("inter_token_latency_seconds", "Between two tokens of a request.", "inter_token_latency"),
    ("e2e_request_latency_seconds", "From arrival to the end.", "e2e_latency"),
    ("request_queue_time_seconds", "From arrival to the first step that ran the request.", "queue_time"),
    ("request_prefill_time_seconds", "From the first step to the first token.", "prefill_time"),
    ("request_decode_time_seconds", "From the first token to the last.", "decode_time"),
)


class EngineCollector(Collector):
    """Reads the engine's counters when it is scraped, so that they cost nothing in between."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield every metric, labelled with the model's name."""
        stats, metrics = self._engine.engine.stats, self._engine.metrics
        labels = [self._model_name]
        for name, help_text, attribute in _GAUGES:
            gauge = GaugeMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
            gauge.add_metric(labels, getattr(stats, attribute))
            yield gauge
        for kind, name, help_text in _POOLS:
            pool = stats.pools[kind]
            for suffix, state, blocks in (
                ("_in_use", "in use by running requests", pool.used),
                ("_cached", "held by cached prefixes alone", pool.cached),
                ("", "there can be", pool.total),
            ):
                gauge = GaugeMetricFamily(f"kvbuffer:{name}{suffix}", f"{help_text} {state}.", labels=["model_name"])
                gauge.add_metric(labels, blocks)
                yield gauge
        for name, help_text, number in (
            ("cache_bytes_in_use", "Bytes of states, records and pages in use by running requests.", stats.memory.used),
            ("cache_bytes_cached", "Bytes held by cached prefixes alone.", stats.memory.cached),
            ("cache_bytes", "Bytes that both may take together.", stats.memory.total),
            ("cache_bytes_resident", "Bytes that the system has given for them.", stats.resident_bytes),
            (
                "kv_cache_usage_perc",
                "Share of the bytes in use by running requests, 0 to 1.",
                stats.memory.used / max(1, stats.memory.total),
            ),
        ):
            gauge = GaugeMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
            gauge.add_metric(labels, number)
            yield gauge
        delays = CounterMetricFamily(
            "kvbuffer:admission_delays",
            "Steps in which the next request could not start, by the limit that bound.",
            labels=["model_name", "limit"],
        )
        for limit, count in stats.delays.items():
            delays.add_metric([self._model_name, limit], count)
        yield delays
        totals = [(name, help_text, getattr(stats, attribute)) for name, help_text, attribute in _COUNTERS]
        totals.append(
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefixes.query_tokens)
        )
        totals.append(("prefix_cache_hits", "Prompt tokens found there and not computed.", stats.prefixes.hit_tokens))
        if stats.disk is not None:
            totals += [
                (name, help_text, getattr(stats.disk, attribute)) for name, help_text, attribute in _DISK_COUNTERS
            ]
        if stats.speculative is not None:
            totals += [
                (name, help_text, getattr(stats.speculative, attribute))
                for name, help_text, attribute in _SPECULATIVE_COUNTERS
            ]
            yield _accepted_per_position(stats.speculative, self._model_name)
        totals.append(("prompt_tokens", "Prompt tokens processed.", metrics.prompt_tokens))
        totals.append(("generation_tokens", "Tokens generated.", metrics.generation_tokens))
        for name, help_text, total in totals:
            counter = CounterMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
            counter.add_metric(labels, total)
            yield counter
        finished = CounterMetricFamily(
            "kvbuffer:request_success",
            "Requests by how they ended.",
            labels=["model_name", "finished_reason"],
        )
        for reason in ("stop", "length", "abort"):
            finished.add_metric([self._model_name, reason], metrics.finished[reason])
        yield finished
        rejected = CounterMetricFamily(
            "kvbuffer:request_rejected",
            "Requests refused with 429 by which limit was reached, the whole queue's or the client's.",
            labels=["model_name", "reason"],
        )
        for reason in ("queue_full", "client_queue_full"):
            rejected.add_metric([self._model_name, reason], metrics.rejected[reason])
        yield rejected
        for name, help_text, attribute in _HISTOGRAMS:
            yield _histogram_family(name, help_text, self._model_name, getattr(metrics, attribute))


def _accepted_per_position(stats: SpeculativeStats, model_name: str) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "kvbuffer:spec_decode_num_accepted_tokens_per_pos",
        "Drafts of which so many tokens and one more were accepted.",
        labels=["model_name", "position"],
    )
    for position, count in enumerate(stats.num_accepted_tokens_per_pos):
        family.add_metric([model_name, str(position)], count)
    return family


def _histogram_family(name: str, help_text: str, model_name: str, histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"kvbuffer:{name}", help_text, labels=["model_name"])
    buckets, total = [], 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([model_name], buckets, histogram.sum)
    return family


def make_registry(engine: AsyncEngine, model_name: str) -> CollectorRegistry:
    """Return the registry that ``/metrics`` writes out; each application has its own."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name))
    ProcessCollector(registry=registry)
    return registry
