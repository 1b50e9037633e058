"""Loading must be worth its time, by what was measured."""

from __future__ import annotations

import pytest

from kvbuffer.cache.disk.bandwidth import Bandwidth


def test_what_is_unknown_gets_the_benefit_of_the_doubt() -> None:
    bandwidth = Bandwidth()
    assert bandwidth.bytes_per_second is None
    assert bandwidth.cheaper_to_load(1 << 40, 1, prefill_rate=1e9)
    bandwidth.observe_load(100, 1.0)
    assert bandwidth.cheaper_to_load(1 << 40, 1, prefill_rate=0)


def test_the_shorter_time_decides() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_load(1000, 1.0)
    # 2,000 bytes take 2 s; at 10 tokens/s that is the time of 20 tokens.
    assert bandwidth.cheaper_to_load(2000, 21, prefill_rate=10)
    assert not bandwidth.cheaper_to_load(2000, 19, prefill_rate=10)


def test_saves_stand_in_until_something_is_loaded() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_save(1000, 1.0)
    assert bandwidth.bytes_per_second == 1000
    bandwidth.observe_load(500, 0.1)
    assert bandwidth.bytes_per_second == pytest.approx(5000)
    bandwidth.observe_save(1, 100.0)
    assert bandwidth.bytes_per_second == pytest.approx(5000)


def test_the_estimate_follows_a_disk_that_changes() -> None:
    bandwidth = Bandwidth()
    for _ in range(10):
        bandwidth.observe_load(1000, 0.1)
    for _ in range(50):
        bandwidth.observe_load(1000, 1.0)
    assert bandwidth.bytes_per_second == pytest.approx(1000, rel=0.01)


def test_large_transfers_count_more() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_load(1_000_000, 1.0)
    bandwidth.observe_load(10, 0.01)
    assert bandwidth.bytes_per_second == pytest.approx(1_000_000, rel=0.02)


def test_a_disk_that_was_slow_once_is_tried_again_some_time() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_load(1000, 10.0)
    refused = 0
    while not bandwidth.cheaper_to_load(1000, 100, prefill_rate=100):
        refused += 1
        assert refused < 1000
    assert refused > 100
