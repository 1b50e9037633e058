"""What was saved is found again, also after a restart, as much of it as fits."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from kvbuffer.cache.disk import DiskTier, entry
from kvbuffer.cache.disk.tier import SUBFOLDER
from kvbuffer.errors import ConfigError
from tests.cache.disk.saved import MIB, Open, content, files, geometry, load, prompt, same, save


def test_what_is_saved_is_found_and_loaded(reopen: Open) -> None:
    tier = reopen()
    assert save(tier, 1)
    match = tier.match([*prompt(1), 7, 8], None, 42)
    assert match is not None
    assert (match.num_tokens, match.geometry) == (40, geometry(30, 40))
    assert same(tier.load(match), content(1, 1000))
    stats = tier.stats
    assert (stats.entries, stats.saved, stats.loaded) == (1, 1, 1)
    assert stats.bytes == stats.saved_bytes == stats.loaded_bytes == match.num_bytes


@pytest.mark.parametrize(("max_tokens", "expected"), [(29, None), (30, 30), (39, 39), (40, 40), (99, 40)])
def test_a_prefix_may_be_cut_back_as_far_as_its_records_reach(reopen: Open, max_tokens: int, expected: object) -> None:
    tier = reopen()
    save(tier, 1)
    match = tier.match(prompt(1), None, max_tokens)
    assert (match and match.num_tokens) == expected


def test_a_restart_finds_everything(reopen: Open) -> None:
    tier = reopen()
    for seed in range(5):
        save(tier, seed)
    before = tier.stats
    tier = reopen()
    assert (tier.stats.entries, tier.stats.bytes) == (before.entries, before.bytes)
    for seed in range(5):
        assert same(load(tier, seed), content(seed, 1000))


def test_closing_writes_what_is_queued(reopen: Open) -> None:
    tier = reopen()
    for seed in range(5):
        tier.save(prompt(seed), None, geometry(30, 40), content(seed, 1000))
    assert reopen().stats.entries == 5


def test_saving_the_same_again_writes_nothing(reopen: Open) -> None:
    tier = reopen()
    assert save(tier, 1)
    assert save(tier, 1)
    assert tier.stats.saved == tier.stats.entries == 1


def test_contradictory_arguments_are_a_bug_of_the_caller(reopen: Open) -> None:
    with pytest.raises(RuntimeError, match="41 tokens in 9 bytes cannot be saved as Geometry"):
        reopen().save(prompt(1, 41), None, geometry(30, 40), content(1, 9))


class TestSalts:
    def test_a_prefix_is_found_under_its_own_salt_only(self, reopen: Open) -> None:
        tier = reopen()
        for number, salt in enumerate([None, "", "a", "b", "\ud800"]):
            assert tier.match(prompt(1), salt, 40) is None
            save(tier, 1, 1000 + number, salt)
        for number, salt in enumerate([None, "", "a", "b", "\ud800"]):
            data = load(tier, 1, salt)
            assert data is not None
            assert len(data) == 1000 + number

    def test_salts_are_not_written_to_the_disk(self, reopen: Open, tmp_path: Path) -> None:
        save(reopen(), 1, salt="tenant-secret")
        (file,) = files(tmp_path)
        assert b"tenant-secret" not in file.read_bytes() + file.name.encode()


class TestBound:
    def test_it_holds_at_every_moment(self, reopen: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        fsync = os.fsync

        def watch(descriptor: int) -> None:
            sizes.append(sum(file.stat().st_size for file in (tmp_path / SUBFOLDER).iterdir()))
            fsync(descriptor)

        monkeypatch.setattr(entry.os, "fsync", watch)
        tier = reopen(max_bytes=20_000)
        for seed in range(60):
            assert save(tier, seed, 500 + 97 * seed)
            assert tier.stats.bytes == sum(file.stat().st_size for file in files(tmp_path))
        assert len(sizes) >= 60
        assert 15_000 < max(sizes) <= 20_000
        assert tier.stats.evicted == 60 - tier.stats.entries

    def test_what_was_not_used_for_longest_goes_first(self, reopen: Open) -> None:
        tier = reopen(max_bytes=4500)
        for seed in (1, 2, 3):
            save(tier, seed)
        load(tier, 1)
        save(tier, 4)
        assert [load(tier, seed) is not None for seed in (1, 2, 3, 4)] == [True, False, True, True]

    def test_the_order_of_use_survives_a_restart(self, reopen: Open, tmp_path: Path) -> None:
        tier = reopen()
        for seed in (1, 2, 3):
            save(tier, seed)
        for time, file in enumerate(files(tmp_path)):
            os.utime(file, ns=(time, time))
        load(tier, 2)
        tier = reopen(max_bytes=1500)
        assert [load(tier, seed) is not None for seed in (1, 2, 3)] == [False, True, False]

    def test_an_entry_larger_than_the_bound_is_refused_and_evicts_nothing(self, reopen: Open) -> None:
        tier = reopen(max_bytes=2500)
        save(tier, 1)
        assert not save(tier, 2, 2400)
        assert (tier.stats.refused, tier.stats.entries, tier.stats.evicted) == (1, 1, 0)

    def test_an_entry_may_fill_the_bound_exactly(self, reopen: Open) -> None:
        tier = reopen()
        save(tier, 1)
        size = tier.stats.bytes
        tier = reopen(max_bytes=size)
        assert save(tier, 2)
        assert (tier.stats.entries, tier.stats.bytes) == (1, size)

    def test_what_is_evicted_between_match_and_load_is_a_miss(self, reopen: Open) -> None:
        tier = reopen(max_bytes=1500)
        save(tier, 1)
        match = tier.match(prompt(1), None, 40)
        assert match is not None
        save(tier, 2)
        assert tier.load(match) is None
        assert tier.stats.damaged == 0

    def test_loaded_data_outlives_its_eviction(self, reopen: Open) -> None:
        tier = reopen(max_bytes=1500)
        save(tier, 1)
        data = load(tier, 1)
        save(tier, 2)
        assert load(tier, 1) is None
        assert same(data, content(1, 1000))


class TestQueue:
    def test_saving_does_not_wait_for_the_disk_and_drops_what_does_not_fit(
        self, reopen: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go, fsync = threading.Event(), os.fsync

        def wait(descriptor: int) -> None:
            assert go.wait(10)
            fsync(descriptor)

        monkeypatch.setattr(entry.os, "fsync", wait)
        tier = reopen(queue_bytes=3500)
        accepted = [tier.save(prompt(seed), None, geometry(30, 40), content(seed, 1000)) for seed in range(5)]
        assert accepted == [True, True, True, False, False]
        assert (tier.stats.dropped, tier.stats.saved) == (2, 0)
        go.set()
        tier.flush()
        assert tier.stats.saved == 3
        assert save(tier, 4)

    def test_threads_that_save_and_load_under_a_tight_bound_get_only_what_was_saved(self, reopen: Open) -> None:
        tier = reopen(max_bytes=6000)
        wrong, hits = [], []

        def work(first: int) -> None:
            for step in range(30):
                seed = (first * 7 + step * 5) % 11
                save(tier, seed)
                for wanted in (seed, (seed + step) % 11):
                    data = load(tier, wanted)
                    if data is not None:
                        hits.append(wanted)
                        wrong.extend([wanted] * (not same(data, content(wanted, 1000))))

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tier.flush()
        assert wrong == []
        assert hits
        stats = tier.stats
        assert (stats.damaged, stats.saving) == (0, True)
        assert stats.entries == stats.saved - stats.evicted <= 4


class TestFolder:
    def test_only_the_owner_may_enter_it(self, reopen: Open, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        (tmp_path / SUBFOLDER).mkdir(mode=0o755)
        save(reopen(), 1)
        assert stat.S_IMODE((tmp_path / SUBFOLDER).stat().st_mode) == 0o700
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in (tmp_path / SUBFOLDER).iterdir())
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755

    def test_it_is_created_with_its_parents(self, tmp_path: Path) -> None:
        DiskTier(tmp_path / "a" / "b", MIB, "model").close()
        assert (tmp_path / "a" / "b" / SUBFOLDER).is_dir()

    def test_a_second_server_is_refused(self, reopen: Open, tmp_path: Path) -> None:
        first = reopen()
        with pytest.raises(ConfigError, match=r"--cache-dir: .* is in use by another process: give each server a"):
            DiskTier(tmp_path, MIB, "model")
        assert save(first, 1)
        first.close()
        DiskTier(tmp_path, MIB, "model").close()

    def test_an_unusable_folder_is_an_error_that_names_the_option(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"--cache-dir: .*file/prefixes cannot be used .*give a folder that"):
            DiskTier(tmp_path / "file", MIB, "model")

    def test_after_closing_nothing_is_saved_or_found(self, reopen: Open) -> None:
        tier = reopen()
        save(tier, 1)
        tier.close()
        tier.close()
        assert not save(tier, 2)
        assert load(tier, 1) is None


def test_loading_must_be_worth_it(reopen: Open) -> None:
    tier = reopen()
    assert tier.cheaper_to_load(MIB, 1, prefill_rate=1e9)
    save(tier, 1)
    load(tier, 1)
    assert tier.cheaper_to_load(1000, 1000, prefill_rate=1.0)
    assert not tier.cheaper_to_load(1 << 50, 1000, prefill_rate=1000.0)
