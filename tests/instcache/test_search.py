"""The search finds every instruction within sigma and no other: what brute force finds, by another implementation.

Small vocabularies are searched whole: transformers scores every sequence of tokens in float32, and sigma is put
between, and on, what they cost.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kvbuffer.errors import CapacityError
from kvbuffer.instcache import search as search_module
from kvbuffer.instcache import tree as tree_module
from kvbuffer.instcache.search import Found, Search, score
from kvbuffer.instcache.tree import Tree, node_bytes
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from tests.support.checkpoints import CHECKPOINTS, make_checkpoint

VOCAB, END, FORBIDDEN, MAX_TOKENS = 8, 2, 5, 3
ALLOWED = [token != FORBIDDEN for token in range(VOCAB)]
HEAD = [1, 3, 4]
#: Between the engine and transformers, both in float32.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        return make_checkpoint(folder, name, vocab_size=VOCAB)

    return make


def decoder(path: Path) -> Decoder:
    return Decoder(path, ModelConfig.from_folder(path), torch.float32, 256, show_progress=False)


def tree_of(model: Decoder, head: list[int] = HEAD, nodes: int = 400, max_tokens: int = MAX_TOKENS) -> Tree:
    tree = Tree(model, head, max_tokens, nodes * node_bytes(model, len(head) + max_tokens))
    poison(tree)
    return tree


def poison(tree: Tree) -> None:
    """What no node owns is NaN."""
    free = torch.from_numpy(tree._free[: tree.num_free]).long()
    for cache_ in tree._caches:
        for tensor in (cache_.pages,) if hasattr(cache_, "pages") else (cache_.rings, *cache_.records):
            tensor[free] = float("nan")


def found_by(tree: Tree, sigma: float, **options) -> dict[tuple[int, ...], float]:
    free = tree.num_free
    found = [one for batch in Search(tree, sigma, END, ALLOWED, **options).run() for one in batch]
    assert tree.num_free == free, "memory was lost"
    result = {tuple(one.tokens): one.cost for one in found}
    assert len(result) == len(found), "something was found twice"
    return result


def brute_force(path: Path, head: list[int] = HEAD) -> dict[tuple[int, ...], float]:
    """What every instruction costs, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = [token for token in range(VOCAB) if ALLOWED[token] and token != END]
    costs: dict[tuple[int, ...], float] = {}
    for length in range(MAX_TOKENS + 1):
        texts = list(itertools.product(tokens, repeat=length))
        ids = torch.tensor([[*head, *text, END] for text in texts])
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)
        each = -logp[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, len(head) - 1 :].sum(1)
        costs.update(zip(texts, each.tolist(), strict=True))
    return costs


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_finds_what_brute_force_finds(models, name: str) -> None:
    expected = brute_force(models(name))
    ordered = sorted(expected.values())
    tree = tree_of(decoder(models(name)))
    # In the middle of the widest gaps, so that rounding decides nothing.
    gaps = np.diff(ordered[: len(ordered) * 3 // 4])
    for place in np.argsort(-gaps)[:4]:
        sigma = ordered[place] + gaps[place] / 2
        found = found_by(tree, sigma)
        assert found.keys() == {text for text, cost in expected.items() if cost <= sigma}
        assert all(cost == pytest.approx(expected[text], abs=TOLERANCE) for text, cost in found.items())
    assert found_by(tree, min(ordered) - 1e-2) == {}
    assert found_by(tree, 1e9).keys() == expected.keys()


def test_sigma_itself_is_within(models) -> None:
    tree = tree_of(decoder(models("qwen3_5")))
    every = found_by(tree, 1e9)
    for cost in sorted(every.values())[3:200:40]:
        within = {text for text, other in every.items() if other <= cost}
        assert found_by(tree, cost).keys() == within
        assert found_by(tree, np.nextafter(cost, 0)).keys() == {t for t in within if every[t] != cost}


def test_ties_are_found_together(tmp_path: Path) -> None:
    """Tokens with the same embedding and the same logit: every text has twins that cost the same, to the bit."""
    path = make_checkpoint(tmp_path, "qwen3_next_tied", vocab_size=VOCAB)
    file = path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["model.embed_tokens.weight"][6] = weights["model.embed_tokens.weight"][7]
    save_file(weights, file, metadata={"format": "pt"})
    tree = tree_of(decoder(path))
    every = found_by(tree, 1e9)
    for sigma in sorted(every.values())[5:150:29]:
        found = found_by(tree, sigma)
        assert found
        for text, cost in found.items():
            twin = tuple({6: 7, 7: 6}.get(token, token) for token in text)
            assert found[twin] == cost


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_scores_are_the_searchs_own(models, name: str, backend: str) -> None:
    """To the bit, whatever is computed beside them."""
    tree = tree_of(decoder(models(name)))
    found = found_by(tree, 8.0)
    free = tree.num_free
    scores = score(tree, END, [*found, (1,) * (MAX_TOKENS + 1), ()])
    assert tree.num_free == free
    assert scores[-2] == np.inf
    assert scores[-1] == pytest.approx(tree.root_costs[END])
    if backend == "cpu":
        assert scores[:-2].tolist() == list(found.values())
    else:
        np.testing.assert_allclose(scores[:-2], list(found.values()), atol=TOLERANCE)


@pytest.mark.parametrize("nodes", [14, 20, 61])
def test_little_memory_and_small_batches_change_nothing(models, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(models("qwen3_next"))
    expected = found_by(tree_of(model), 9.0)
    assert found_by(tree_of(model, nodes=nodes), 9.0) == expected
    monkeypatch.setattr(search_module, "MAX_BATCH", 3)
    monkeypatch.setattr(tree_module, "MAX_BATCH", 3)
    assert found_by(tree_of(model), 9.0) == expected


def test_too_little_memory_is_refused(models) -> None:
    with pytest.raises(CapacityError, match="cannot hold instructions of 3 tokens"):
        tree_of(decoder(models("qwen3_next")), nodes=6)


def test_a_long_beginning_becomes_a_state_that_all_share(models) -> None:
    head = [1, 3, 4, 6] * 10
    expected = brute_force(models("qwen3_5"), head)
    tree = tree_of(decoder(models("qwen3_5")), head)
    assert tree._checkpoint == len(head)
    found = found_by(tree, 1e9)
    assert found.keys() == expected.keys()
    assert max(abs(cost - expected[text]) for text, cost in found.items()) < 5 * TOLERANCE


def test_texts_across_attention_pages(models, rng: torch.Generator) -> None:
    """Longer than a page of 16 keys, whose nodes share full pages and copy the last."""
    path = models("qwen3_5")
    tree = tree_of(decoder(path), nodes=2000, max_tokens=40)
    stem = torch.randint(3, VOCAB, (30,), generator=rng).tolist()
    texts = [stem[:cut] + torch.randint(3, VOCAB, (10,), generator=rng).tolist() for cut in (0, 11, 13, 20, 29, 30)]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = []
    for text in texts:
        ids = torch.tensor([[*HEAD, *text, END]])
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)
        expected.append(-float(logp[0, :-1].gather(1, ids[0, 1:, None])[len(HEAD) - 1 :].sum()))
    np.testing.assert_allclose(score(tree, END, texts), expected, atol=2e-3)


@pytest.mark.parametrize("stop_after", [1, 4, 15])
def test_a_search_goes_on_from_where_it_was(models, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "MAX_BATCH", 7)
    model = decoder(models("qwen3_next"))
    expected = found_by(tree_of(model), 9.0)
    first = Search(tree_of(model), 9.0, END, ALLOWED)
    before: list[Found] = [one for batch in itertools.islice(first.run(), stop_after) for one in batch]
    after = found_by(tree_of(model), 9.0, frontier=first.frontier())
    assert {tuple(one.tokens): one.cost for one in before} | after == expected
    assert len(before) + len(after) == len(expected)
