"""The arg max of rows: the first of equals, and no place in a row whose largest element is no finite number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from kvbuffer.ops.argmax import finite_argmax


@pytest.mark.parametrize("columns", [1, 15, 16, 37, 1024, 5003, 40_000])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_place_is_that_of_the_first_largest_element(backend: str, rng: Generator, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=rng).round(decimals=2)  # many equals
    places = finite_argmax(x)
    assert places.dtype == torch.int64
    assert places.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]


@pytest.mark.parametrize("place", [0, 17, 1030, 2999])
def test_a_row_with_nan_or_infinity_has_none_and_the_others_are_served(backend: str, place: int) -> None:
    x = torch.zeros(5, 3000)
    x[:, 2000] = 1.0
    x[1, place] = math.nan
    x[2, place] = math.inf
    x[3, place] = -math.inf
    x[4] = -math.inf
    assert finite_argmax(x).tolist() == [2000, -1, -1, 2000, -1]
