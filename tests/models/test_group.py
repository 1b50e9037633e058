"""What the layers of a group share."""

from __future__ import annotations

import pytest
import torch

from kvbuffer.models.group import sigmoid_of_rows


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (33, 1), (2, 9, 1)])
def test_a_rows_sigmoid_does_not_depend_on_the_others(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    alone = torch.stack([sigmoid_of_rows(row.view(1, 1)) for row in x.flatten()])
    assert torch.equal(sigmoid_of_rows(x).flatten(), alone.flatten())
    torch.testing.assert_close(sigmoid_of_rows(x), torch.sigmoid(x))
