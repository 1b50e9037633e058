"""Traces are made as described and read as published; the simulated caches find what they should."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from prefix_simulation import markdown, simulate
from prefix_systems import LruCache, NoCache, Oracle, Ours, hit_tokens, num_tokens, systems, true_bytes
from prefix_traces import GENERATORS, MOONCAKE_BLOCK, Request, read_burstgpt, read_mooncake, read_trace

GIB = 1 << 30
SIZES = true_bytes()


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def first(name: str, count: int, seed: int = 3) -> list[Request]:
    return list(islice(GENERATORS[name](seed), count))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_makes_one_trace_in_the_order_of_time(name: str) -> None:
    requests = first(name, 60)
    assert requests == first(name, 60)
    assert requests != first(name, 60, seed=4)
    assert requests == sorted(requests, key=lambda request: request.time)
    assert all(request.prompt and request.output for request in requests)


@pytest.mark.parametrize(("name", "least", "most"), [("no reuse", 0, 0), ("few-shot", 0.4, 1), ("agents", 0.6, 1)])
def test_prompts_begin_like_earlier_ones_as_much_as_their_trace_says(name: str, least: float, most: float) -> None:
    requests = first(name, 100)
    found = hit_tokens(Oracle(SIZES, num_tokens(requests)), requests)
    assert least <= found / sum(len(request.prompt) for request in requests) <= most


def test_a_chat_goes_on_from_its_last_answer_and_leaves_thoughts_out() -> None:
    for name, answered in (("chat", True), ("reasoning chat", False)):
        requests = first(name, 50)
        continued = 0
        for i, later in enumerate(requests):
            for earlier in requests[:i]:
                shared = common(later.prompt, earlier.prompt + earlier.output)
                if shared >= len(earlier.prompt) - 2 and shared > 100:
                    continued += 1
                    assert (shared == len(earlier.prompt + earlier.output)) == answered
        assert continued > 10


def test_mooncakes_blocks_are_texts_of_512_tokens() -> None:
    one, other = read_mooncake(
        [
            '{"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]}\n',
            '{"timestamp": 3500, "input_length": 1536, "output_length": 2, "hash_ids": [0, 1, 7]}\n',
            "\n",
        ]
    )
    assert (one.time, len(one.prompt), len(one.output)) == (0.0, 1100, 3)
    assert (other.time, len(other.prompt), len(other.output)) == (3.5, 1536, 2)
    assert common(one.prompt, other.prompt) == 2 * MOONCAKE_BLOCK
    assert not set(one.output) & {*other.output, *one.prompt, *other.prompt}


def test_mooncakes_lengths_must_fit_the_blocks() -> None:
    with pytest.raises(ValueError, match="513 tokens in 1 blocks of 512"):
        list(read_mooncake(['{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}']))


def test_burstgpts_sessions_go_on_from_their_own_text() -> None:
    lines = [
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5.0,a,3,GPT-4,100,20,120,Conversation log",
        "6.5,b,3,GPT-4,100,20,120,Conversation log",
        "7.0,a,3,GPT-4,90,0,90,Conversation log",
        "8.0,a,3,GPT-4,150,20,170,Conversation log",
        "9.0,a,3,GPT-4,50,20,70,Conversation log",
    ]
    a, b, later, short = read_burstgpt(lines)
    assert (a.time, len(a.prompt), len(a.output)) == (5.0, 100, 20)
    assert common(a.prompt, b.prompt) == 0
    assert (len(later.prompt), common(later.prompt, a.prompt + a.output)) == (150, 120)
    assert short.prompt == a.prompt[:50]


def test_burstgpt_without_sessions_has_nothing_in_common() -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    one, other = read_burstgpt([header, "5,ChatGPT,472,18,490,Conversation log", "45,ChatGPT,472,9,481,API log"])
    assert not set(one.prompt) & set(other.prompt)


def test_the_suffix_tells_the_format(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 1000, "input_length": 5, "output_length": 2, "hash_ids": [3]}\n')
    assert [request.time for request in read_trace(file)] == [1.0]
    with pytest.raises(ValueError, match=r"\.jsonl \(Mooncake\) and \.csv \(BurstGPT\)"):
        list(read_trace(tmp_path / "trace.txt"))


def test_sizes_are_those_of_the_model() -> None:
    assert SIZES.state == 36 * 32 * 128 * 128 * 2
    assert SIZES.attention_page == 12 * 2 * 2 * 256 * 16 * 2
    assert SIZES.snapshot - SIZES.plain_snapshot == SIZES.record_page + SIZES.ring_input


def test_each_cache_finds_what_it_is_made_to_find() -> None:
    text = list(range(2000))
    requests = [
        Request(0, text[:1200], text[1200:1300]),  # computed
        Request(1, text[:1301], [-1]),  # goes on from the end
        Request(2, text[:1100], [-2]),  # leaves the text before it ends: a branch that is made a checkpoint
        Request(3, [*text[:1099], -3], [-4]),  # the same branch again
    ]
    expected = {
        Oracle(SIZES, num_tokens(requests)): [0, 1300, 1099, 1099],
        Ours(64 * GIB, SIZES): [0, 1300, 0, 1099],
        LruCache(64 * GIB, SIZES, 528, at_blocks=True): [0, 1056, 1056, 1056],
        LruCache(64 * GIB, SIZES, 16, at_blocks=False): [0, 1300, 0, 0],
        NoCache(): [0, 0, 0, 0],
    }
    for system, found in expected.items():
        assert [system.serve(request) for request in requests] == found, type(system).__name__


@pytest.mark.parametrize("name", ["chat", "tree of thoughts", "agents"])
@pytest.mark.parametrize("part", [1, 4])
def test_nobody_finds_more_than_the_oracle(name: str, part: int) -> None:
    requests = first(name, 60)
    oracle = Oracle(SIZES, num_tokens(requests))
    best = hit_tokens(oracle, requests)
    assert 0 < oracle.least_bytes <= oracle.unbounded_bytes
    for system in systems(oracle.unbounded_bytes // part, SIZES).values():
        assert 0 <= hit_tokens(system, requests) <= best


def test_the_table_has_a_row_per_trace_and_budget() -> None:
    table = markdown({name: simulate(first(name, 200), SIZES) for name in ("few-shot", "no reuse")})
    assert table.count("\n| few-shot") == table.count("\n| no reuse") == 4
    assert "| few-shot | 1/10 |" in table
