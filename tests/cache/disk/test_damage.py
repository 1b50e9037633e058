"""A bad file or a bad disk costs the entry, never the server."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from kvbuffer.cache.disk import tier
from kvbuffer.cache.disk.entry import SUFFIX, TEMPORARY_SUFFIX
from kvbuffer.cache.disk.tier import SUBFOLDER
from tests.cache.disk.saved import Open, break_disk, content, files, load, prompt, same, save


class TestDamage:
    """Files change behind the tier's back."""

    @pytest.fixture
    def saved(self, reopen: Open, tmp_path: Path) -> Path:
        """The file of an entry, the tier being closed."""
        tier = reopen()
        save(tier, 1)
        tier.close()
        return files(tmp_path)[0]

    @pytest.mark.parametrize("length", [0, 7, 8, 20, 60, 300, 500, -1])
    def test_a_torn_file_is_ignored_with_one_warning(
        self, reopen: Open, saved: Path, length: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved.write_bytes(saved.read_bytes()[:length])
        tier = reopen()
        assert load(tier, 1) is None
        (warning,) = caplog.messages
        assert warning.startswith(f"--cache-dir: ignoring {saved}: ")
        assert save(tier, 1)
        assert same(load(tier, 1), content(1, 1000))

    def test_a_file_of_another_version_is_ignored_with_one_warning(
        self, reopen: Open, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved.write_bytes(saved.read_bytes().replace(b"kvbuffer\1", b"kvbuffer\2", 1))
        assert load(reopen(), 1) is None
        assert caplog.messages == [
            f"--cache-dir: ignoring {saved}: written in version 2 of the format, this is version 1"
        ]

    def test_a_file_under_anothers_name_is_ignored(
        self, reopen: Open, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = saved.rename(saved.with_name("0" * 32 + SUFFIX))
        assert load(reopen(), 1) is None
        assert caplog.messages == [f"--cache-dir: ignoring {other}: its content belongs to another name"]

    def test_files_of_others_are_ignored_and_left_alone(
        self, reopen: Open, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        strangers = [saved.parent / name for name in ("notes.txt", f"x{SUFFIX}", "0" * 32 + SUFFIX, "1" * 32 + SUFFIX)]
        for stranger in strangers[:2]:
            stranger.write_text("mine")
        strangers[2].mkdir()
        strangers[3].symlink_to(strangers[0])
        tier = reopen(max_bytes=1500)
        save(tier, 2)
        assert tier.stats.entries == 1
        assert sorted(caplog.messages) == sorted(
            f"--cache-dir: ignoring {stranger}: not a file of the cache" for stranger in strangers
        )
        assert all(stranger.exists() for stranger in strangers)

    def test_a_torn_file_takes_room_until_it_is_evicted(self, reopen: Open, saved: Path) -> None:
        saved.write_bytes(saved.read_bytes()[:-1])
        tier = reopen(max_bytes=1500)
        assert tier.stats.entries == 1
        assert save(tier, 2)
        assert not saved.exists()
        assert tier.stats.entries == 1

    def test_another_models_entries_are_not_used_but_kept(self, reopen: Open, saved: Path) -> None:
        tier = reopen(fingerprint="another model")
        assert load(tier, 1) is None
        save(tier, 1, 1100)
        assert same(load(tier, 1), content(1, 1100))
        assert same(load(reopen(), 1), content(1, 1000))

    @pytest.mark.parametrize("offset", [0, 8, 12, 16, 32, 36, 200, 300, 500, 1000, -1])
    def test_an_entry_that_is_damaged_while_it_is_in_use_is_a_miss_and_removed(
        self, reopen: Open, saved: Path, offset: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        tier = reopen()
        whole = bytearray(saved.read_bytes())
        whole[offset] ^= 4
        saved.write_bytes(whole)
        assert load(tier, 1) is None
        assert [f"--cache-dir: not using {saved}: " in message for message in caplog.messages] == [True]
        assert not saved.exists()
        assert tier.match(prompt(1), None, 40) is None
        assert (tier.stats.damaged, tier.stats.entries, tier.stats.bytes) == (1, 0, 0)
        assert save(tier, 1)
        assert same(load(tier, 1), content(1, 1000))

    def test_an_entry_that_someone_deleted_is_a_miss(self, reopen: Open, saved: Path) -> None:
        tier = reopen()
        saved.unlink()
        assert load(tier, 1) is None
        assert (tier.stats.damaged, tier.stats.bytes) == (1, 0)

    def test_what_a_crash_left_half_written_is_deleted(
        self, reopen: Open, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        half = saved.with_name("0" * 32 + TEMPORARY_SUFFIX)
        half.write_bytes(b"kvbuf")
        assert same(load(reopen(), 1), content(1, 1000))
        assert not half.exists()
        assert caplog.messages == []


class TestDiskErrors:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
    def test_a_disk_that_cannot_be_written_to_ends_saving_and_nothing_else(
        self, reopen: Open, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        tier = reopen()
        save(tier, 1)
        break_disk(monkeypatch, number)
        save(tier, 2)
        assert not save(tier, 3)
        (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
        assert record.levelno == logging.ERROR
        assert os.strerror(number) in record.getMessage()
        assert "nothing is saved any more until the server is restarted" in record.getMessage()
        assert (tier.stats.saving, tier.stats.dropped, tier.stats.entries) == (False, 2, 1)
        assert same(load(tier, 1), content(1, 1000))
        assert len(files(tmp_path)) == 1
        assert not list((tmp_path / SUBFOLDER).glob(f"*{TEMPORARY_SUFFIX}"))

    def test_a_restart_saves_again(self, reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as broken:
            break_disk(broken, errno.ENOSPC)
            save(reopen(), 1)
        tier = reopen()
        assert tier.stats.saving
        assert save(tier, 1)
        assert load(tier, 1) is not None

    def test_an_entry_that_cannot_be_read_is_a_miss_and_stays_where_it_is(
        self, reopen: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = reopen()
        save(disk, 1)

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as broken:
            broken.setattr(tier, "map_payload", fail)
            assert load(disk, 1) is None
        assert disk.match(prompt(1), None, 40) is None
        assert (disk.stats.damaged, disk.stats.saving, disk.stats.entries) == (1, True, 1)
        assert same(load(reopen(), 1), content(1, 1000))

    def test_the_folder_vanishes(self, reopen: Open, tmp_path: Path) -> None:
        tier = reopen()
        save(tier, 1)
        shutil.rmtree(tmp_path / SUBFOLDER)
        assert load(tier, 1) is None
        save(tier, 2)
        assert not tier.stats.saving
