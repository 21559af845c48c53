"""One thread per test: models this small gain nothing from a second one, and busy machines lose much.

Imported by the conftest of each folder whose tests want it.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
