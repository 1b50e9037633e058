"""A server that is killed in the middle of anything leaves a folder that the next one can use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvbuffer.cache.disk import DiskTier
from kvbuffer.cache.disk.tier import SUBFOLDER
from tests.cache.disk.saved import content, load, prompt, save

ROOT = Path(__file__).parents[3]
SIZE = 1 << 20

# Children save until they are killed: one per place in the protocol, then some at random moments. They are forked, for
# importing PyTorch anew for each would take seconds.
PROGRAM = """
import os, pathlib, random, signal, sys, time
from kvbuffer.cache.disk import DiskTier, entry
from tests.cache.disk.saved import save

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class DyingFile:
    def __init__(self, descriptor, mode):
        self.descriptor = descriptor
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def write(self, data):
        os.write(self.descriptor, bytes(data)[: len(data) // 2])
        die()

def before_sync():
    entry.os.fsync = die

def before_rename():
    pathlib.Path.rename = die

def after_rename():
    rename = pathlib.Path.rename
    def rename_and_die(*arguments):
        rename(*arguments)
        die()
    pathlib.Path.rename = rename_and_die

def in_write():
    entry.open = DyingFile

def nowhere():
    pass

folder = pathlib.Path(sys.argv[1])
places = [in_write, before_sync, before_rename, after_rename] + 8 * [nowhere]
for number, place in enumerate(places):
    child = os.fork()
    if child == 0:
        tier = DiskTier(folder, 1 << 40, "model")
        save(tier, 100 + number, 1 << 20)
        place()
        for seed in range(1000 * (number + 1), 1000 * (number + 1) + 300):
            save(tier, seed, 1 << 20)
        os._exit(1)
    if place is nowhere:
        time.sleep(random.uniform(0.02, 0.06))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_while_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, env=environment, timeout=120)

    # What the last but one left is cleaned away by the last: so a half-written file is to be provoked once more.
    (tmp_path / SUBFOLDER / ("0" * 32 + ".writing")).write_bytes(b"kvbuffer")
    tier = DiskTier(tmp_path, 1 << 40, "model")
    assert caplog.messages == []
    names = [file.name for file in (tmp_path / SUBFOLDER).iterdir() if file.name != "lock"]
    assert all(name.endswith(".kvprefix") for name in names)
    assert tier.stats.entries == len(names)

    seeds = [*range(100, 112), *(seed for n in range(1, 13) for seed in range(1000 * n, 1000 * n + 300))]
    found = [seed for seed in seeds if tier.match(prompt(seed), None, 40) is not None]
    assert len(found) == len(names)
    # Of the first four, each has saved one entry and died in the second; the one that died last had it in place.
    assert [seed for seed in found if seed < 104] == [100, 101, 102, 103]
    assert [seed for seed in found if 1000 <= seed < 5000] == [4000]
    for seed in found:
        data = load(tier, seed)
        assert data is not None
        assert data.equal(content(seed, SIZE))
    assert tier.stats.damaged == 0
    assert save(tier, 1)
    assert load(tier, 1) is not None
    tier.close()
