"""Closed-form values and gradients of every loss, from the papers' equations worked by hand."""

import itertools
import math

import pytest
import torch
from conftest import R, REF, v

from dpo import dpo_loss, ipo_loss, rdpo_loss
from hir import hir_loss, relabel
from ppo_rlhf import (
    adapt_beta,
    gae,
    kl_estimates,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from reward_model import best_of_k_loss, calibration_error, ranking_loss
from self_correct import find_pairs, pair_probabilities, similarity
from sft import sft_loss
from simpo import cpo_loss, log1mexp, orpo_loss, simpo_loss, slic_loss
from variants.kto import kto_loss
from variants.raft import best_of_n_log_ratio
from variants.rankings import pro_loss, rrhf_loss

LOG2 = math.log(2)

# Every loss of a pair. Each argument has two entries, for the chosen and the rejected response:
# the policy's log-probs, the reference's log-probs, and the lengths.
PAIR_LOSSES = {
    "dpo": lambda policy, reference, lengths:
        dpo_loss(*policy, *reference, beta=0.5),
    "cdpo": lambda policy, reference, lengths:
        dpo_loss(*policy, *reference, beta=0.5, label_smoothing=0.1),
    "ipo": lambda policy, reference, lengths:
        ipo_loss(*policy, *reference, tau=0.3),
    "rdpo": lambda policy, reference, lengths:
        rdpo_loss(*policy, *reference, *lengths, beta=0.5, alpha=0.05),
    "simpo": lambda policy, reference, lengths:
        simpo_loss(*policy, *lengths, beta=2.0, gamma=1.0),
    "cpo": lambda policy, reference, lengths:
        cpo_loss(*policy, beta=0.1, lam=0.7),
    "orpo": lambda policy, reference, lengths:
        orpo_loss(*policy, *lengths, lam=0.3),
    "slic": lambda policy, reference, lengths:
        slic_loss(*policy, delta=1.0, lam=0.7),
}
RANKED_LOSSES = {"rrhf": rrhf_loss, "pro": pro_loss}
ALL = torch.ones(1, 3, dtype=torch.bool)


def row(*values, grad=False):
    """A batch of one row: (1, K) or (1, R)."""
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def pair(h):
    """Four (1,) log-probs whose log-ratio difference is h, with gradients.

    Their order is policy chosen, policy rejected, reference chosen, reference rejected.
    """
    logps = (-10.0 + h, -12.0, -10.0, -12.0)
    return [v(x, grad=True) for x in logps]


# ---------------------------------------------------------------------- supervised fine-tuning


@pytest.mark.parametrize("normalizer, expected", [(None, 1.25), (2, 2.5)])
def test_sft_token_mean(normalizer, expected):
    """The loss is a mean over tokens, not over responses.

    The lengths are 1 and 3, the NLLs (2) and (1, 1, 1): 5 / 4, not the mean of means 1.5. Each
    response token has the gradient -1 / N. The prompt and the padding have 0.
    """
    logps = torch.tensor([[-2.0, -7.0, -7.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])

    loss = sft_loss(logps, mask, normalizer)
    loss.backward()

    tokens = normalizer or 4
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(logps.grad, -mask / tokens, atol=1e-7)


# ---------------------------------------------------------- losses of a pair, with a reference


@pytest.mark.parametrize("h, beta, smoothing, expected, slope", [
    (0.0, 0.1, 0.0, LOG2, 0.05),
    (0.0, 0.1, 0.1, LOG2, 0.04),
    (10.0, 0.1, 0.0, 0.313262, 0.1 / (1 + math.e)),
    (math.log(9) / 0.1, 0.1, 0.1, 0.325083, 0.0),
])
def test_dpo_values_and_gradients(h, beta, smoothing, expected, slope):
    """The loss is log 2 at the start and softplus(-1) at beta h = 1.

    The gradients are -+ beta (sigma(-beta h) - e), where e is the label smoothing. For cDPO they
    are 0 at beta h = log((1 - e) / e), its optimum, where the loss is the entropy H(0.1).
    """
    inputs = pair(h)
    chosen, rejected = inputs[:2]

    loss = dpo_loss(*inputs, beta, smoothing)
    loss.sum().backward()

    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(-slope, abs=1e-9)
    assert rejected.grad.item() == pytest.approx(slope, abs=1e-9)


def test_ipo_values_and_gradient():
    """With tau = 0.1 the start has the loss 25 and the slope -10. The loss is zero at h = 5."""
    start = pair(0.0)
    chosen = start[0]

    loss = ipo_loss(*start, tau=0.1)
    loss.sum().backward()

    assert loss.item() == pytest.approx(25.0, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(-10.0, abs=1e-6)

    optimum = ipo_loss(*pair(5.0), tau=0.1)
    assert optimum.item() == pytest.approx(0.0, abs=1e-12)


def test_rdpo_sign():
    """Lengths 10 and 6 and alpha 0.05 give 0.598139 at the start.

    The minus that is a misprint gives 0.798139.
    """
    loss = rdpo_loss(*pair(0.0), v(10), v(6), beta=0.1, alpha=0.05)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)


def test_kto_values():
    """With a = 2, z = 0.6, beta = 0.5 the loss is 0.331812 if desirable and 0.668188 if not."""
    policy = v(-8, -8)
    reference = v(-10, -10)
    desirable = torch.tensor([True, False])
    kl = v(0.6)[0]

    loss = kto_loss(policy, reference, desirable, kl, beta=0.5)

    assert loss.tolist() == pytest.approx([0.331812, 0.668188], abs=1e-6)


def test_kto_start_and_gradients():
    """At the start each item costs half of its lambda.

    The slopes are -+ lambda beta / 4, so that bad responses go down.
    """
    policy = v(-3, -3, grad=True)
    reference = policy.detach()
    desirable = torch.tensor([True, False])
    kl = v(0)[0]
    weights = {"lambda_desirable": 1.5, "lambda_undesirable": 2.0}

    loss = kto_loss(policy, reference, desirable, kl, beta=0.1, **weights)
    loss.sum().backward()

    slopes = [-1.5 * 0.1 / 4, 2.0 * 0.1 / 4]
    assert loss.tolist() == pytest.approx([0.75, 1.0], abs=1e-6)
    assert policy.grad.tolist() == pytest.approx(slopes, abs=1e-7)


# ------------------------------------------------------- losses of a pair, without a reference


def test_simpo_value_and_gradient():
    """The length divides the value and the gradient.

    The sums are (-6, -6), the lengths (3, 6), beta is 2 and the margin 1.
    """
    chosen = v(-6, grad=True)
    rejected = v(-6, grad=True)

    loss = simpo_loss(chosen, rejected, v(3), v(6), beta=2.0, gamma=1.0)
    loss.sum().backward()

    assert loss.item() == pytest.approx(3.048587, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(-0.635049, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.317525, abs=1e-6)


def test_cpo_value():
    """Sums (-3, -4) and beta 0.1 give softplus(-0.1) + 3.

    With lam = 0 only the preference term is left.
    """
    chosen = v(-3)
    rejected = v(-4)

    both_terms = cpo_loss(chosen, rejected, beta=0.1)
    preference = cpo_loss(chosen, rejected, beta=0.1, lam=0.0)

    assert both_terms.item() == pytest.approx(3.644397, abs=1e-6)
    assert preference.item() == pytest.approx(0.644397, abs=1e-6)


def test_orpo_value():
    """The probabilities (1/2, 1/4) have the odds 1 and 1/3.

    So the loss is log 2 plus lam times log(4/3).
    """
    chosen = v(math.log(0.5))
    rejected = v(math.log(0.25))
    length = v(1)

    loss = orpo_loss(chosen, rejected, length, length)
    assert loss.item() == pytest.approx(0.721915, abs=1e-6)

    with_odds = orpo_loss(chosen, rejected, length, length, lam=1.0)
    without_odds = orpo_loss(chosen, rejected, length, length, lam=0.0)
    odds = with_odds - without_odds
    assert odds.item() == pytest.approx(0.287682, abs=1e-6)


@pytest.mark.parametrize("x", [-2e-7, -1e-5, -1e-3, -0.5, -0.6931, -0.7, -3.0, -30.0, -200.0])
def test_log1mexp_is_stable(x):
    """In fp32, log(1 - e^x) stays near a float64 reference, down to x = -2e-7.

    Its gradient is finite (huggingface/trl#1491, hpcaitech/ColossalAI#6407).
    """
    y = torch.tensor([x], requires_grad=True)
    value = log1mexp(y)
    value.sum().backward()

    exact = float(y.detach())  # what fp32 makes of x
    if exact > -1:
        truth = math.log(-math.expm1(exact))
    else:
        truth = math.log1p(-math.exp(exact))
    slope = math.exp(exact) / math.expm1(exact)

    assert value.item() == pytest.approx(truth, rel=1e-5, abs=1e-30)
    assert y.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-30)


def test_slic_value():
    """Sums (-3, -2.5) and a margin of 1 give a hinge of 1.5.

    A pair that is apart by more than the margin has none.
    """
    hinge = slic_loss(v(-3), v(-2.5), delta=1.0, lam=0.0)
    both_terms = slic_loss(v(-3), v(-2.5), delta=1.0, lam=1.0)
    far_apart = slic_loss(v(-3), v(-4.5), delta=1.0, lam=0.0)

    assert hinge.item() == pytest.approx(1.5)
    assert both_terms.item() == pytest.approx(4.5)
    assert far_apart.item() == 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_gradients_and_shapes(name):
    """The analytic gradient is the numeric one.

    The loss takes (B,) and returns (B,), and each example stands on its own.
    """
    loss = PAIR_LOSSES[name]
    logps = -2 - 5 * torch.rand(4, 4, dtype=torch.float64)
    policy, reference = logps[:2], logps[2:]
    lengths = torch.randint(1, 6, (2, 4)).double()

    def of_policy(chosen, rejected):
        return loss((chosen, rejected), reference, lengths)

    chosen = policy[0].clone().requires_grad_()
    rejected = policy[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(of_policy, (chosen, rejected))

    whole = loss(policy, reference, lengths)
    assert whole.shape == (4,)

    for b in range(4):
        one = slice(b, b + 1)
        alone = loss(policy[:, one], reference[:, one], lengths[:, one])
        assert alone.shape == (1,)
        assert torch.allclose(whole[one], alone)


# ------------------------------------------------------------------------- losses of a ranking


def test_rrhf_value():
    """The means are (-1, -0.5) and the first is better, so the hinge is 0.5.

    The SFT term is the whole sum of the best one.
    """
    logps = row(-4, -1)
    lengths = row(4, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)

    hinge = rrhf_loss(logps, lengths, row(2, 1), mask, sft_weight=0.0)
    both_terms = rrhf_loss(logps, lengths, row(2, 1), mask)
    in_order = rrhf_loss(logps, lengths, row(1, 2), mask, sft_weight=0.0)
    tie = rrhf_loss(logps, lengths, row(1, 1), mask, sft_weight=0.0)

    assert hinge.item() == pytest.approx(0.5)
    assert both_terms.item() == pytest.approx(4.5)
    assert in_order.item() == 0
    assert tie.item() == 0  # a tie orders nothing


@pytest.mark.parametrize("y, sft_weight, expected", [
    (0, 0.0, 1.791759),
    (-1, 0.0, 2.244592),
    (-1, None, 2.244592 + 0.2),
    (-1, 1.0, 3.244592),
])
def test_pro_values(y, sft_weight, expected):
    """Means that are all 0 give log 6. Means of -1 with scores (2, 1, 0) give 2.244592.

    The SFT weight of K = 3 is 0.2 by default, and it multiplies the best response's sum.
    """
    logps = row(y, y, y)
    lengths = row(1, 1, 1)
    scores = row(2, 1, 0)

    loss = pro_loss(logps, lengths, scores, ALL, sft_weight)

    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", RANKED_LOSSES)
def test_ranked_losses_ignore_order_and_padding(name):
    """The order of a row's responses means nothing.

    What stands behind the end of a row neither changes the loss nor has a gradient. The analytic
    gradient is the numeric one.
    """
    loss = RANKED_LOSSES[name]
    logps = row(-4, -9, -2)
    lengths = row(4, 5, 1)
    scores = row(1, 3, 2)
    plain = loss(logps, lengths, scores, ALL)

    turn = [2, 0, 1]
    turned = loss(logps[:, turn], lengths[:, turn], scores[:, turn], ALL)
    assert torch.allclose(turned, plain)

    def of_logps(x):
        return loss(x, lengths, scores, ALL)

    assert torch.autograd.gradcheck(of_logps, row(-4, -9, -2, grad=True))

    def pad(x, value):
        padding = torch.full((1, 2), value, dtype=x.dtype)
        return torch.cat([x, padding], 1)

    for garbage in (0.0, 1e9, math.nan):
        padded = pad(logps, garbage).requires_grad_()

        again = loss(padded, pad(lengths, 0), pad(scores, 9.0), pad(ALL, False))
        again.sum().backward()

        assert torch.allclose(again, plain)
        assert (padded.grad[:, 3:] == 0).all()


# ------------------------------------------------------------------ losses of the reward model


@pytest.mark.parametrize("rewards, ranks, expected", [
    ((2, 1, 0), (1, 2, 3), 0.251150),
    ((2, 0, 1), (1, 3, 2), 0.251150),  # the same, with the columns in another order
    ((5, 5, 5, 5), (4, 2, 1, 3), LOG2),  # equal scores
    ((1, 0), (1, 2), 0.313262),  # two responses: Bradley-Terry
    ((1, 0), (2, 1), 1.313262),
    ((1, 0, 0), (1, 2, 2), 2 * 0.3132617 / 3),  # one pair of three is tied
    ((1, 0, 0), (1, 1, 1), 0),  # all are tied
    ((7,), (1,), 0),  # one response
])
def test_ranking_loss_values(rewards, ranks, expected):
    """The sum over pairs that are not tied is divided by the number of all pairs, C(K, 2).

    If all are tied, or if there is one response, the loss is 0, not 0/0.
    """
    loss = ranking_loss(row(*rewards).double(), torch.tensor([ranks]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_ranking_loss_gradient_and_shift():
    """Four equal scores have the gradient -1/4, -1/12, 1/12, 1/4.

    A constant that is added to all scores changes nothing.
    """
    rewards = row(0, 0, 0, 0, grad=True)
    ranking_loss(rewards, torch.tensor([[1, 2, 3, 4]])).sum().backward()
    assert rewards.grad[0].tolist() == pytest.approx([-1 / 4, -1 / 12, 1 / 12, 1 / 4])

    ranks = torch.tensor([[2, 1, 3]])
    loss = ranking_loss(row(1, 2, 3), ranks)
    shifted = ranking_loss(row(8, 9, 10), ranks)
    assert torch.allclose(loss, shifted)


@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_ranking_loss_ignores_padding(garbage):
    """K differs from prompt to prompt, so that some rows end in padding.

    What stands there changes no value and no gradient (deepspeedai/DeepSpeedExamples#316).
    """
    rewards = torch.tensor(
        [[2.0, 1.0, garbage, garbage], [0.0, 1.0, 2.0, 3.0]],
        requires_grad=True,
    )
    ranks = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4]])

    losses = ranking_loss(rewards, ranks)
    losses.sum().backward()

    assert losses[0].item() == pytest.approx(0.313262, abs=1e-6)
    assert losses[1] > 1
    assert rewards.grad[0, 2:].tolist() == [0, 0]
    assert torch.isfinite(rewards.grad).all()


def test_best_of_k_values():
    """Four equal scores have the loss log 4, and its gradient.

    A prompt with fewer responses has -inf in the rest of its row.
    """
    rewards = row(0, 0, 0, 0, grad=True)
    loss = best_of_k_loss(rewards, best=torch.tensor([0]))
    loss.sum().backward()

    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert rewards.grad[0].tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])

    rewards = row(0, 1, -math.inf, -math.inf, grad=True)
    loss = best_of_k_loss(rewards, best=torch.tensor([1]))
    loss.sum().backward()

    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert torch.isfinite(rewards.grad).all()


def test_calibration_error():
    """Pairs are drawn from the judge's own rates, so its error is near 0.

    A judge who is twice as sure has a larger error. Last, by hand: two pairs with the rates 1/2
    and 3/4 are both won. The gaps are 1/2 - 1/2 and 3/4 - 1.
    """
    margins = torch.randn(20000) * 2
    won = torch.rand(20000) < margins.sigmoid()
    margins = torch.where(won, margins, -margins)

    assert calibration_error(margins) < 0.01
    assert calibration_error(2 * margins) > 0.05

    by_hand = torch.tensor([0.0, math.log(3)])
    assert calibration_error(by_hand) == pytest.approx(1 / 8, abs=1e-6)


# ----------------------------------------------------------------------------------------- PPO


def lengths_mask(generator, B=6, T=9):
    """True on the real tokens of B responses of random lengths: (B, T)."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    return torch.arange(T) < lengths[:, None]


def test_reward_stands_on_eos():
    """The score stands on the last token of a full response and of a short one.

    The penalty stands on every token, and nothing behind the end (huggingface/trl#1893).
    """
    scores = torch.tensor([10.0, 20.0])
    logps = torch.tensor([[-1.0, -2.0, -3.0]] * 2)
    reference = torch.tensor([[-2.0, -2.0, -1.0]] * 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])

    rewards = token_rewards(scores, logps, reference, mask, beta=0.5)

    full, short = rewards.tolist()
    assert full == [-0.5, 0.0, 11.0]
    assert short == [-0.5, 20.0, 0.0]


@pytest.mark.parametrize("lam, expected", [
    (0.95, (0.46575, 0.385, 0.3)),
    (1.0, (0.5, 0.4, 0.3)),
    (0.0, (0.1, 0.1, 0.3)),
])
def test_gae_values(lam, expected):
    """The rewards are (0, 0, 1) and the values (0.5, 0.6, 0.7).

    Returns are advantages plus values. A value behind the end is not bootstrapped from
    (alibaba/ROLL#447, natolambert/rlhf-book PR #216).
    """
    mask = row(1, 1, 1, 0)

    for pad in (0.0, 100.0, math.nan):
        rewards = row(0, 0, 1, pad)
        values = row(0.5, 0.6, 0.7, pad)

        advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=lam)

        assert advantages[0].tolist() == pytest.approx([*expected, 0], abs=1e-6)
        assert torch.equal(returns, advantages + row(0.5, 0.6, 0.7, 0))


def test_whiten_values():
    """(1, 2, 3) less their mean, over the root of their population variance. Pads do not matter."""
    expected = [-1.224745, 0, 1.224745]
    assert whiten(row(1, 2, 3), torch.ones(1, 3))[0].tolist() == pytest.approx(expected, abs=1e-6)
    for garbage in (100.0, math.nan):
        padded = row(1, 2, 3, garbage, garbage)
        white = whiten(padded, torch.tensor([[1, 1, 1, 0, 0]]))
        assert white[0].tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)


@pytest.mark.parametrize("advantage, ratio, expected, gradient", [
    (1, 1.5, -1.2, 0),
    (1, 0.5, -0.5, -0.5),
    (-1, 1.5, 1.5, 1.5),
    (-1, 0.5, 0.8, 0),
])
def test_policy_loss_values(advantage, ratio, expected, gradient):
    """These are the four corners of the clipped objective.

    A move that helps is clipped and has no gradient. A move that hurts costs its full price and
    has a gradient.
    """
    logps = row(math.log(ratio), grad=True)
    old_logps = row(0)
    mask = torch.ones(1, 1)

    loss = policy_loss(logps, old_logps, row(advantage), mask, clip=0.2)
    loss.backward()

    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("value, expected, gradient", [
    (1, 1.62, 0),
    (-1, 4.5, -3),
])
def test_value_loss_values(value, expected, gradient):
    """The old value is 0 and the return is 2.

    With a value of 1 the clipped error (0.2 - 2)^2 / 2 is larger, and has no gradient. A value of
    -1 moved away from the return: it has the full error, and a gradient.
    """
    values = row(value, grad=True)
    old_values = row(0)
    returns = row(2)

    loss = value_loss(values, old_values, returns, torch.ones(1, 1), clip=0.2)
    loss.backward()

    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_losses_are_token_means_that_ignore_padding(loss):
    """The loss is a mean over real tokens, which is taken here by hand.

    Garbage on pads changes neither value nor gradient. Parts that are divided by the tokens of the
    whole add up to the whole (huggingface/trl#2995).
    """
    generator = torch.Generator().manual_seed(2)
    mask = lengths_mask(generator)
    data = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64) * 0.3
    new, old, target = data

    x = new.clone().requires_grad_()
    whole = loss(x, old, target, mask, clip=0.2)
    whole.backward()

    # The mean over tokens, one call per token.
    by_token = []
    for b, t in mask.nonzero().tolist():
        token = data[:, b:b + 1, t:t + 1]  # new, old and target of this token
        by_token.append(loss(*token, torch.ones(1, 1), clip=0.2))
    mean = float(sum(by_token)) / len(by_token)
    assert whole.item() == pytest.approx(mean)

    # The same batch in three parts of two rows.
    total = 0.0
    for i in (0, 2, 4):
        part = slice(i, i + 2)
        total += loss(*data[:, part], mask[part], clip=0.2, normalizer=mask.sum())
    assert float(total) == pytest.approx(whole.item())

    for garbage in (1e9, math.nan):
        new, old, target = data.masked_fill(~mask, garbage)
        y = new.clone().requires_grad_()

        again = loss(y, old, target, mask, clip=0.2)
        again.backward()

        assert again.item() == whole.item()
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kl, expected", [
    (12, 0.204),
    (6.6, 0.202),
    (0, 0.196),
    (6, 0.2),
])
def test_adaptive_controller(kl, expected):
    """Beta is 0.2 and the target is 6. The error is clipped at 0.2 both ways."""
    beta = adapt_beta(0.2, kl, target=6)
    assert beta == pytest.approx(expected, abs=1e-9)


def test_kl_estimates():
    """The estimates are in nats a response: a sum over its tokens, a mean over responses.

    Nothing behind the ends of the responses counts.
    """
    logps = torch.full((2, 4), -1.0)
    logps[1, 2:] = math.nan
    reference = torch.full((2, 4), -1.5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    k1, k3 = kl_estimates(logps, reference, mask)

    k3_of_a_token = math.exp(-0.5) - 1 + 0.5
    assert k1.item() == pytest.approx(1.5)
    assert k3.item() == pytest.approx(3 * k3_of_a_token, abs=1e-6)


# ----------------------------------------------------------------------------------- best of n


def test_best_of_n_against_enumeration():
    """On the bandit the best of four has its exact KL.

    With continuous rewards the KL is equal to its bound.
    """
    counts = (REF * 20).round().long()
    pool = R.repeat_interleave(counts)[None]  # (1, 20)
    ratio = best_of_n_log_ratio(R[None], pool, n=4)[0]
    best = REF * ratio.exp()
    kl = (best * ratio).sum()

    assert best.sum().item() == pytest.approx(1)
    assert kl.item() == pytest.approx(0.553158, abs=1e-6)

    pool = torch.rand(1, 2000, dtype=torch.float64)
    ratio = best_of_n_log_ratio(pool, pool, n=4)
    kl = (ratio.exp() * ratio).mean()
    bound = math.log(4) - 3 / 4

    assert kl.item() == pytest.approx(bound, abs=2e-3)


# ------------------------------------------------------------ hindsight instruction relabeling


@pytest.mark.parametrize("logps, smoothing, expected", [
    # A gap of two.
    ((-1, -3), 0.0, 0.126928),
    ((-1, -3), 0.2, 0.526928),
    # The instruction is ignored.
    ((-4, -4), 0.0, LOG2),
    ((-4, -4), 0.2, LOG2),
    ((-4,) * 5, 0.2, math.log(5)),
    # H(0.2), the least.
    ((math.log(0.8), math.log(0.2)), 0.2, 0.500402),
    # Smoothing puts 0.8 on the first and 0.1 on each other.
    (
        (math.log(0.5), math.log(0.3), math.log(0.2)),
        0.2,
        -0.8 * math.log(0.5) - 0.1 * math.log(0.3) - 0.1 * math.log(0.2),
    ),
    # One instruction alone (FARL, Chain of Hindsight) has no contrast.
    ((-1,), 0.2, 0.0),
])
def test_hir_contrast(logps, smoothing, expected):
    """The contrast, which alpha weighs, and the supervised term are each tested by themselves."""
    def loss(alpha):
        batch = row(*logps).double()
        return hir_loss(batch, v(0), alpha, 0.0, smoothing, v(-5)).item()

    supervised = loss(0.0)
    by_hand = -(1 - smoothing) * logps[0] + smoothing * 5
    assert supervised == pytest.approx(by_hand, abs=1e-9)

    assert loss(1.0) - supervised == pytest.approx(expected, abs=1e-6)
    assert loss(3.0) - supervised == pytest.approx(3 * expected, abs=1e-5)


def test_hir_gradients():
    """Each term has its own gradient.

    L_sup has -1 and L_con has share - 1. The entropy has -beta. With smoothing e the gradient of
    L_con is 0 at a share of 1 - e.
    """
    logps = v(-1, -3, grad=True)
    entropy = v(1.5, grad=True)

    loss = hir_loss(logps[None], entropy, alpha=1.0, beta=0.001, label_smoothing=0.0)
    loss.sum().backward()

    share = math.exp(-1) / (math.exp(-1) + math.exp(-3))
    assert logps.grad.tolist() == pytest.approx([-1 - (1 - share), 1 - share])
    assert entropy.grad.item() == pytest.approx(-0.001)

    # With smoothing.
    logps = v(math.log(0.8), math.log(0.2), grad=True)
    vocabulary = v(-6, grad=True)

    loss = hir_loss(logps[None], v(1.5), 1.0, 0.001, 0.2, vocabulary)
    loss.sum().backward()

    assert logps.grad.tolist() == pytest.approx([-0.8, 0])
    assert vocabulary.grad.item() == -0.2


def test_relabeling_is_idempotent_and_keeps_what_was_followed():
    """This holds for each instruction and each thing that an output can do. {} obeys nothing."""
    choices = {
        "length": ["short", "long"],
        "mood": ["kind", "bad"],
        "topic": ["plot", "cast"],
    }
    everything = []
    for values in itertools.product(*choices.values()):
        everything.append(dict(zip(choices, values)))

    for wanted in (everything[0], everything[-1], {"length": "long"}, {}):
        for done in [*everything, {}]:
            obeyed = relabel(wanted, done)
            assert relabel(obeyed, done) == obeyed

            expected = {key: done[key] for key in wanted} if done else {}
            assert obeyed == expected

    obeyed = relabel({"answer": "correct"}, {"answer": "wrong"})
    assert obeyed == {"answer": "wrong"}


# ----------------------------------------------------------------------------- self-correction


@pytest.mark.parametrize("alpha, beta, expected", [
    (1, 0, (0.622459, 0.377541)),
    (1, 1, (0.5, 0.5)),
    (0, 0, (0.5, 0.5)),
    (0, 2, (0.268941, 0.731059)),
    (1000, 0, (1, 0)),
    (0, -1e4, (1, 0)),
])
def test_pair_probabilities(alpha, beta, expected):
    """Two corrections of one answer have improvements (1, 0.5) and proximities (0.5, 1).

    Large weights do not overflow.
    """
    improvement = v(1, 0.5)
    proximity = v(0.5, 1)
    hypothesis = torch.tensor([0, 0])

    p = pair_probabilities(improvement, proximity, hypothesis, alpha, beta)

    assert p.tolist() == pytest.approx(expected, abs=1e-6)


def test_pairs_are_strictly_better():
    """The values (0, 0, 1) have two pairs, and (0, 0.5, 1) have three.

    A pair goes from the worse answer to the better one, not back.
    """
    assert find_pairs([0, 0, 1]) == [(0, 2), (1, 2)]
    assert find_pairs([0, 0.5, 1]) == [(0, 1), (0, 2), (1, 2)]
    assert find_pairs([1, 0]) == [(1, 0)]

    assert find_pairs([0.5, 0.5]) == []
    assert find_pairs([1]) == []
    assert find_pairs([]) == []


@pytest.mark.parametrize("a, b, expected", [
    ("a b c d", "a b c d", 1),
    ("a b c d", "a x c d", 3 / 4),
    ("a b c d", "b c d", 3 / 4),
    ("a b", "c d e f", 0),
    ("", "", 1),
    ("", "a", 0),
    ("kitten sitting", "sitting kitten", 0),
    ("a b c", "a b c d e f", 1 / 2),
    (" a  b\n", "a b", 1),
])
def test_similarity_is_one_minus_the_edit_distance_in_words(a, b, expected):
    """The distance is divided by the longer text's number of words. It is symmetric."""
    forward = similarity(a, b)
    backward = similarity(b, a)

    assert forward == backward
    assert forward == pytest.approx(expected)
