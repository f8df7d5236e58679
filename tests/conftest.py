import os

import torch

# Before peft_pte is imported: its shape annotations are checked in tests, and Triton kernels run on the CPU.
os.environ.setdefault("PEFT_PTE_CHECK_SHAPES", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import transformers

transformers.logging.set_verbosity_error()
# Tests run side by side and their models are tiny: threads would only get in each other's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
