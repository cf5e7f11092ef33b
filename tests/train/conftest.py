"""A fixture for tests of SFT."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """These models are too small for two threads, which wait for each other ten times as long on a busy machine. Gives
    the number of threads for those that are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)
