import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Which kernels are taken, and what memory they need for themselves, is to be the same on processors with and without AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from limbeck.core.memory import keep_freed_memory

keep_freed_memory()  # as the command line does


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
