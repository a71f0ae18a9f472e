import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """One thread is faster: a model has some ten thousand parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
