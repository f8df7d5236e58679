import os

import torch

# Before peft_pte is imported: its shape annotations are checked in tests, and Triton kernels run on the CPU.
os.environ.setdefault("PEFT_PTE_CHECK_SHAPES", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

transformers.logging.set_verbosity_error()
# Tests run side by side and their models are tiny: threads would only get in each other's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what needs transformers' own adapter methods where those ask for a newer peft; the assertion is of a test that expects another error."""
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        if Version(MIN_PEFT_VERSION) > Version(peft.__version__) and "The version of PEFT you are using" in str(error):
            pytest.skip(f"transformers {transformers.__version__} itself wants peft {MIN_PEFT_VERSION} for this")
        raise


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
