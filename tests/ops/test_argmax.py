"""The largest logit: the lowest of equals, and none where a row cannot be trusted."""

import pytest
import torch

from kvbuffer.ops import dispatch
from kvbuffer.ops.argmax import finite_argmax

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["portable", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(dispatch, "cpu_kernels", lambda: None)
    elif dispatch.cpu_kernels() is None:
        pytest.skip("no compiled kernels")


@pytest.mark.parametrize("width", [1, 5, 16, 17, 100, 1000])
def test_the_largest_element_wherever_it_is(width: int) -> None:
    rows = torch.stack([torch.arange(width).roll(place).float() - width for place in range(width)])
    assert finite_argmax(rows).tolist() == [(width - 1 + place) % width for place in range(width)]


@pytest.mark.parametrize("width", [3, 40])
def test_the_lowest_of_equals(width: int) -> None:
    rows = torch.full((4, width), -1.0)
    for row, places in enumerate([(0, 1), (1, 2), (0, width - 1), (width - 2, width - 1)]):
        rows[row, list(places)] = 2.0
    assert finite_argmax(rows).tolist() == [0, 1, 0, width - 2]


@pytest.mark.parametrize("width", [3, 16, 40])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_none_in_rows_that_cannot_be_trusted(width: int, place: int) -> None:
    good = torch.zeros(width)
    bad = [good.clone() for _ in range(2)]
    bad[0][place], bad[1][place] = NAN, INF
    low = good.clone()
    low[place] = -INF
    expected = [-1, -1, 1 if place == 0 else 0, -1]
    assert finite_argmax(torch.stack([*bad, low, torch.full((width,), -INF)])).tolist() == expected


def test_rows_may_be_strided() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert finite_argmax(rows[:, :20]).tolist() == [row[:20].argmax().item() for row in rows]
