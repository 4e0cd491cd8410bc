"""Shared by all tests: one thread, one seed, and a small bandit.

The bandit is a prompt with five responses, about which all is known; Bradley-Terry labels them.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def v(*values, grad=False):
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


R = v(1.0, 0.5, 0.0, -0.7, 2.0)
REF = v(0.40, 0.25, 0.20, 0.10, 0.05)
LENGTHS = v(4, 9, 6, 3, 12)
MU = v(0.3, 0.2, 0.2, 0.2, 0.1)  # how often a response is compared
I, J = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
NOISY = torch.sigmoid(R[:, None] - R[None, :])  # how often i is preferred to j
PAIRS = MU[I] * MU[J] * NOISY[I, J]  # (25,): how often i is compared with j and preferred


def minimise(loss, start):
    """The vector that minimises a smooth loss, by L-BFGS."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=4000, tolerance_grad=1e-13, tolerance_change=1e-17,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    for _ in range(4):
        optimizer.step(closure)
    return x.detach()


def best_policy(loss, weight=PAIRS):
    """The policy (5,) that minimises a loss of (log-probs of i, of j, the reference's of both)."""
    def expected(logits):
        y = logits.log_softmax(0)
        return (weight * loss(y[I], y[J], REF.log()[I], REF.log()[J])).sum()

    return minimise(expected, REF.log()).softmax(0)


def tilted(reward, beta):
    """ref exp(r / beta) / Z: the policy with the most reward at a KL penalty of beta."""
    return (REF.log() + reward / beta).softmax(0)


@pytest.fixture(scope="session")
def tiny():
    """The embedded model and its tokenizer. Tests that train have to load their own."""
    from model import load_model

    return load_model("tiny")


@pytest.fixture
def float64(monkeypatch):
    """The scripts in float64: in fp32 Adam would turn the rounding of a gradient near 0, which
    differs from processor to processor, into a step as long as any."""
    monkeypatch.setattr("model.check_model", lambda model, *_: model.double())  # of each new model
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
