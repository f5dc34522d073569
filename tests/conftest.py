"""Settings for every test: one thread per core of this worker's share, and no deadline in hypothesis."""

import os

# Set before the first import of triton (transformers imports triton too), so that the kernels run on CPU tensors in the
# interpreter.
if os.environ.get("REVAL_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# The first call of a function often compiles, imports or fills a cache. A deadline would measure only this work.
settings.register_profile("reval", deadline=None, print_blob=True)
settings.load_profile("reval")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` on a machine without a GPU."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
