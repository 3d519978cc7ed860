"""What holds in every test: no network, and one seed."""

import os

# before transformers is imported: nothing here may ask the hub for anything
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
