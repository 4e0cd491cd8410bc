"""Closed-form values and gradients of every loss, from the papers' equations worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from dpo import PAIR_LOSSES, dpo_loss, ipo_loss, kto_loss, kto_reference_point, rdpo_loss
from sft import sft_loss

LOG2 = math.log(2)


def pair(h):
    """Four (1,) log-probs whose log-ratio difference is h, with gradients."""
    values = (-10.0 + h, -12.0, -10.0, -12.0)
    return [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values]


@pytest.mark.parametrize("reduction, expected", [("token mean", 1.25), ("given normalizer", 2.5)])
def test_sft_token_mean(reduction, expected):
    """Lengths 1 and 3, NLL (2), (1, 1, 1): 5 / 4, not the mean of means 1.5."""
    logps = torch.tensor([[-2.0, -7.0, -7.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = sft_loss(logps, mask, None if reduction == "token mean" else 2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_sft_uniform_model():
    """All-zero logits over ten tokens: log 10 per token."""
    logps = torch.zeros(2, 5, 10).log_softmax(-1)[..., 0]
    assert sft_loss(logps, torch.ones(2, 5)).item() == pytest.approx(2.302585, abs=1e-6)


def test_sft_gradient_is_minus_mask_over_count():
    """Each response token pulls with 1 / N; prompt and padding pull with 0."""
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    sft_loss(logps, mask).backward()
    assert torch.allclose(logps.grad, -mask / 4, atol=1e-7)


@pytest.mark.parametrize(
    "h, beta, e, expected",
    [
        (0.0, 0.1, 0.0, LOG2),
        (0.0, 0.1, 0.1, LOG2),
        (10.0, 0.1, 0.0, 0.313262),
        (math.log(9) / 0.1, 0.1, 0.1, 0.325083),
    ],
)
def test_dpo_values(h, beta, e, expected):
    """log 2 at the start; softplus(-1) at beta h = 1; cDPO at its optimum is the entropy H(0.1)."""
    assert dpo_loss(*pair(h), beta, e).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("e, expected", [(0.0, 0.05), (0.1, 0.04)])
def test_dpo_gradients_at_start(e, expected):
    """-+ beta (1 - 2e) / 2 on the chosen and on the rejected log-prob."""
    inputs = pair(0.0)
    dpo_loss(*inputs, 0.1, e).sum().backward()
    assert inputs[0].grad.item() == pytest.approx(-expected, abs=1e-9)
    assert inputs[1].grad.item() == pytest.approx(expected, abs=1e-9)


def test_dpo_gradient_away_from_start():
    """Eq. (7)'s gradient: -beta sigma(-beta h) on the chosen log-prob."""
    inputs = pair(3.0)
    dpo_loss(*inputs, 0.5).sum().backward()
    assert inputs[0].grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)), abs=1e-9)


def test_cdpo_stationary_at_its_optimum():
    """One pair's minimiser is beta h = log((1 - e) / e)."""
    inputs = pair(math.log(9) / 0.1)
    dpo_loss(*inputs, 0.1, 0.1).sum().backward()
    assert abs(inputs[0].grad.item()) < 1e-9


def test_dpo_stays_finite_far_out():
    """logsigmoid, never log(sigmoid): fp32 at beta h = -1000."""
    far = torch.tensor([-10000.0])
    zero = torch.zeros(1)
    assert dpo_loss(far, zero, zero, zero, 0.1).item() == pytest.approx(1000.0)


def test_ipo_values_and_gradient():
    """tau 0.1: 25 and slope -10 at the start; zero at h = 5."""
    inputs = pair(0.0)
    loss = ipo_loss(*inputs, 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(25.0, abs=1e-6)
    assert inputs[0].grad.item() == pytest.approx(-10.0, abs=1e-6)
    assert ipo_loss(*pair(5.0), 0.1).item() == pytest.approx(0.0, abs=1e-12)


def test_rdpo_sign():
    """Lengths 10 and 6, alpha 0.05 at the start: 0.598139; the misprinted minus gives 0.798139."""
    loss = rdpo_loss(*pair(0.0), torch.tensor([10.0]), torch.tensor([6.0]), 0.1, 0.05)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)
    minus = F.softplus(torch.tensor(0.05 * 4)).item()
    assert minus == pytest.approx(0.798139, abs=1e-6)


def test_kto_values():
    """a = 2, z = 0.6, beta = 0.5: 0.331812 if desirable, 0.668188 if not."""
    policy, reference = torch.tensor([-8.0, -8.0]), torch.tensor([-10.0, -10.0])
    loss = kto_loss(policy, reference, torch.tensor([True, False]), torch.tensor(0.6), 0.5)
    assert loss.tolist() == pytest.approx([0.331812, 0.668188], abs=1e-6)


def test_kto_start_and_gradients():
    """At the start half of lambda per item, slopes -+ lambda beta / 4: bad responses go down.

    The table in the SimPO paper has a plus where KTO has a minus; with it they would go up.
    """
    policy = torch.tensor([-3.0, -3.0], requires_grad=True)
    loss = kto_loss(
        policy,
        policy.detach(),
        torch.tensor([True, False]),
        torch.tensor(0.0),
        0.1,
        lambda_desirable=1.5,
        lambda_undesirable=2.0,
    )
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.75, 1.0], abs=1e-6)
    assert policy.grad.tolist() == pytest.approx([-1.5 * 0.1 / 4, 2.0 * 0.1 / 4], abs=1e-7)


def test_kto_reference_point():
    """Ratios (-1, 0.5, 0.2): their mean is negative, so z = 0. Clamping first would give 0.233."""
    assert kto_reference_point(torch.tensor([-1.0, 0.5, 0.2])).item() == 0.0
    assert kto_reference_point(torch.tensor([1.0, -0.5, 0.1])).item() == pytest.approx(0.2)


def test_every_loss_choice_changes_the_number():
    """A --loss that is silently ignored trains the wrong thing (modelscope/ms-swift#10167)."""
    from dpo import parse_args

    chosen, rejected = torch.tensor([-9.0]), torch.tensor([-12.0])
    same = torch.tensor([-10.0])
    lengths = torch.tensor([10.0]), torch.tensor([6.0])
    values = {
        name: loss(chosen, rejected, same, same, *lengths, parse_args(["--loss", name])).item()
        for name, loss in PAIR_LOSSES.items()
    }
    assert len({round(value, 6) for value in values.values()}) == len(values) == 4


def test_sum_or_mean_of_logps():
    """Doubling every token doubles DPO's margin, not IPO's on means (huggingface/trl#1265)."""
    from dpo import parse_args

    args, ipo = parse_args([]), parse_args(["--loss", "ipo", "--tau", "0.25"])
    once = [torch.tensor([v]) for v in (-9.0, -12.0, -10.0, -11.0)]
    twice = [2 * x for x in once]
    short, long = [torch.tensor([5.0]), torch.tensor([7.0])], [
        torch.tensor([10.0]),
        torch.tensor([14.0]),
    ]
    margin = lambda loss: -math.log(math.expm1(loss))  # inverse of softplus(-margin)
    dpo_once, dpo_twice = (
        PAIR_LOSSES["dpo"](*x, *n, args).item() for x, n in ((once, short), (twice, long))
    )
    assert margin(dpo_twice) == pytest.approx(2 * margin(dpo_once), rel=1e-5)
    ipo_once, ipo_twice = (
        PAIR_LOSSES["ipo_mean"](*x, *n, ipo).item() for x, n in ((once, short), (twice, long))
    )
    assert ipo_once == pytest.approx(ipo_twice, abs=1e-6)
    assert PAIR_LOSSES["ipo"](*once, *short, ipo).item() != pytest.approx(
        PAIR_LOSSES["ipo"](*twice, *long, ipo).item(), abs=1e-2
    )
