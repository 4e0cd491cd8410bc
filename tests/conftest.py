"""Shared by all tests: the repository on the path, the embedded model, one seed."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny():
    """The embedded model and its tokenizer. Never trained by a test: copy it first."""
    from model import load_model

    return load_model("tiny")


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
