"""Closed-form values and gradients of every loss, from the papers' equations worked by hand."""

import itertools
import math

import pytest
import torch
from conftest import R, REF, v

from dpo import dpo_loss, ipo_loss, rdpo_loss
from hir import hir_loss, relabel
from ppo_rlhf import (adapt_beta, gae, kl_estimates, policy_loss, token_rewards, value_loss, whiten)
from reward_model import best_of_k_loss, calibration_error, ranking_loss
from self_correct import find_pairs, pair_probabilities, similarity
from sft import sft_loss
from simpo import cpo_loss, log1mexp, orpo_loss, simpo_loss, slic_loss
from variants.kto import kto_loss
from variants.raft import best_of_n_log_ratio
from variants.rankings import pro_loss, rrhf_loss

LOG2 = math.log(2)
# Every loss of a pair, of log-probs w, l, the reference's rw, rl, and lengths nw, nl.
PAIR_LOSSES = {
    "dpo": lambda w, l, rw, rl, nw, nl: dpo_loss(w, l, rw, rl, 0.5),
    "cdpo": lambda w, l, rw, rl, nw, nl: dpo_loss(w, l, rw, rl, 0.5, 0.1),
    "ipo": lambda w, l, rw, rl, nw, nl: ipo_loss(w, l, rw, rl, 0.3),
    "rdpo": lambda w, l, rw, rl, nw, nl: rdpo_loss(w, l, rw, rl, nw, nl, 0.5, 0.05),
    "simpo": lambda w, l, rw, rl, nw, nl: simpo_loss(w, l, nw, nl, 2.0, 1.0),
    "cpo": lambda w, l, rw, rl, nw, nl: cpo_loss(w, l, 0.1, 0.7),
    "orpo": lambda w, l, rw, rl, nw, nl: orpo_loss(w, l, nw, nl, 0.3),
    "slic": lambda w, l, rw, rl, nw, nl: slic_loss(w, l, 1.0, 0.7)}
RANKED_LOSSES = {"rrhf": rrhf_loss, "pro": pro_loss}
ALL = torch.ones(1, 3, dtype=torch.bool)


def row(*values, grad=False):
    """A batch of one row: (1, K) or (1, R)."""
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def pair(h):
    """Four (1,) log-probs whose log-ratio difference is h, with gradients."""
    return [v(x, grad=True) for x in (-10.0 + h, -12.0, -10.0, -12.0)]


@pytest.mark.parametrize("normalizer, expected", [(None, 1.25), (2, 2.5)])
def test_sft_token_mean(normalizer, expected):
    """Lengths 1 and 3, NLL (2), (1, 1, 1): 5 / 4, not the mean of means 1.5. Each response token
    has the gradient -1 / N; prompt and padding have 0."""
    logps = torch.tensor([[-2.0, -7.0, -7.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = sft_loss(logps, mask, normalizer)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(logps.grad, -mask / (normalizer or 4), atol=1e-7)


@pytest.mark.parametrize("h, beta, e, expected, slope", [
    (0.0, 0.1, 0.0, LOG2, 0.05), (0.0, 0.1, 0.1, LOG2, 0.04),
    (10.0, 0.1, 0.0, 0.313262, 0.1 / (1 + math.e)), (math.log(9) / 0.1, 0.1, 0.1, 0.325083, 0.0)])
def test_dpo_values_and_gradients(h, beta, e, expected, slope):
    """log 2 at the start; softplus(-1) at beta h = 1; cDPO at its optimum is the entropy H(0.1).
    Gradients are -+ beta (sigma(-beta h) - e): 0 for cDPO at beta h = log((1 - e) / e)."""
    inputs = pair(h)
    loss = dpo_loss(*inputs, beta, e)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert inputs[0].grad.item() == pytest.approx(-slope, abs=1e-9)
    assert inputs[1].grad.item() == pytest.approx(slope, abs=1e-9)


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
    assert rdpo_loss(*pair(0.0), v(10), v(6), 0.1, 0.05).item() == pytest.approx(.598139, abs=1e-6)


def test_kto_values():
    """a = 2, z = 0.6, beta = 0.5: 0.331812 if desirable, 0.668188 if not."""
    loss = kto_loss(v(-8, -8), v(-10, -10), torch.tensor([True, False]), v(0.6)[0], 0.5)
    assert loss.tolist() == pytest.approx([0.331812, 0.668188], abs=1e-6)


def test_kto_start_and_gradients():
    """At the start half of lambda per item, slopes -+ lambda beta / 4: bad responses go down."""
    policy = v(-3, -3, grad=True)
    loss = kto_loss(policy, policy.detach(), torch.tensor([True, False]), v(0)[0], 0.1,
                    lambda_desirable=1.5, lambda_undesirable=2.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.75, 1.0], abs=1e-6)
    assert policy.grad.tolist() == pytest.approx([-1.5 * 0.1 / 4, 2.0 * 0.1 / 4], abs=1e-7)


def test_simpo_value_and_gradient():
    """Sums (-6, -6), lengths (3, 6), beta 2, margin 1: the length divides value and gradient."""
    w, l = v(-6, grad=True), v(-6, grad=True)
    loss = simpo_loss(w, l, v(3), v(6), 2.0, 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(3.048587, abs=1e-6)
    assert w.grad.item() == pytest.approx(-0.635049, abs=1e-6)
    assert l.grad.item() == pytest.approx(0.317525, abs=1e-6)


def test_cpo_value():
    """Sums (-3, -4), beta .1: softplus(-.1) + 3; lam = 0 leaves the preference term."""
    assert cpo_loss(v(-3), v(-4), 0.1).item() == pytest.approx(3.644397, abs=1e-6)
    assert cpo_loss(v(-3), v(-4), 0.1, 0.0).item() == pytest.approx(0.644397, abs=1e-6)


def test_orpo_value():
    """p = (.5, .25): odds 1 and 1/3, so log(4/3) by lam, plus log 2."""
    w, l = v(math.log(0.5)), v(math.log(0.25))
    assert orpo_loss(w, l, v(1), v(1)).item() == pytest.approx(0.721915, abs=1e-6)
    odds = orpo_loss(w, l, v(1), v(1), 1.0) - orpo_loss(w, l, v(1), v(1), 0.0)
    assert odds.item() == pytest.approx(0.287682, abs=1e-6)


@pytest.mark.parametrize("x", [-2e-7, -1e-5, -1e-3, -0.5, -0.6931, -0.7, -3.0, -30.0, -200.0])
def test_log1mexp_is_stable(x):
    """log(1 - e^x) in fp32 near a float64 reference, down to x = -2e-7, with a finite gradient
    (huggingface/trl#1491, hpcaitech/ColossalAI#6407)."""
    y = torch.tensor([x], requires_grad=True)
    value = log1mexp(y)
    value.sum().backward()
    exact = float(y.detach())  # what fp32 makes of x
    truth = math.log(-math.expm1(exact)) if exact > -1 else math.log1p(-math.exp(exact))
    assert value.item() == pytest.approx(truth, rel=1e-5, abs=1e-30)
    slope = math.exp(exact) / math.expm1(exact)
    assert y.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-30)


def test_slic_value():
    """Sums (-3, -2.5), margin 1: hinge 1.5; a pair that is apart by more has none."""
    assert slic_loss(v(-3), v(-2.5), 1.0, 0.0).item() == pytest.approx(1.5)
    assert slic_loss(v(-3), v(-2.5), 1.0, 1.0).item() == pytest.approx(4.5)
    assert slic_loss(v(-3), v(-4.5), 1.0, 0.0).item() == 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_gradients_and_shapes(name):
    """The analytic gradient is the numeric one; (B,) in, (B,) out, each example on its own."""
    w, l, rw, rl = -2 - 5 * torch.rand(4, 4, dtype=torch.float64)
    nw, nl = torch.randint(1, 6, (2, 4)).double()
    loss = PAIR_LOSSES[name]
    w.requires_grad_(), l.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, l: loss(w, l, rw, rl, nw, nl), (w, l))
    whole = loss(w, l, rw, rl, nw, nl)
    each = [loss(*(x[b:b + 1] for x in (w, l, rw, rl, nw, nl))) for b in range(4)]
    assert whole.shape == (4,) and torch.allclose(whole, torch.cat(each))


def test_rrhf_value():
    """Means (-1, -.5), the first better: .5; the SFT term is the best one's whole sum."""
    y, n, mask = row(-4, -1), row(4, 2), torch.ones(1, 2, dtype=torch.bool)
    assert rrhf_loss(y, n, row(2, 1), mask, 0.0).item() == pytest.approx(0.5)
    assert rrhf_loss(y, n, row(2, 1), mask).item() == pytest.approx(4.5)
    assert rrhf_loss(y, n, row(1, 2), mask, 0.0).item() == 0
    assert rrhf_loss(y, n, row(1, 1), mask, 0.0).item() == 0  # a tie orders nothing


@pytest.mark.parametrize("y, sft_weight, expected", [
    (0, 0.0, 1.791759), (-1, 0.0, 2.244592), (-1, None, 2.244592 + 0.2), (-1, 1.0, 3.244592)])
def test_pro_values(y, sft_weight, expected):
    """Means all 0: log 6. Means all -1 with scores (2, 1, 0): 2.244592. The SFT weight of K = 3 is
    0.2 by default, of the best response's sum."""
    loss = pro_loss(row(y, y, y), row(1, 1, 1), row(2, 1, 0), ALL, sft_weight)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", RANKED_LOSSES)
def test_ranked_losses_ignore_order_and_padding(name):
    """The order of a row's responses means nothing, and what stands behind its end neither changes
    the loss nor has a gradient. The analytic gradient is the numeric one."""
    loss = RANKED_LOSSES[name]
    y, n, s = row(-4, -9, -2), row(4, 5, 1), row(1, 3, 2)
    plain = loss(y, n, s, ALL)
    turn = [2, 0, 1]
    assert torch.allclose(loss(y[:, turn], n[:, turn], s[:, turn], ALL), plain)
    assert torch.autograd.gradcheck(lambda y: loss(y, n, s, ALL), row(-4, -9, -2, grad=True))
    for garbage in (0.0, 1e9, math.nan):
        def more(x, value):
            return torch.cat([x, torch.full((1, 2), value, dtype=x.dtype)], 1)

        padded = more(y, garbage).requires_grad_()
        again = loss(padded, more(n, 0), more(s, 9.0), more(ALL, False))
        again.sum().backward()
        assert torch.allclose(again, plain) and (padded.grad[:, 3:] == 0).all()


@pytest.mark.parametrize("rewards, ranks, expected", [
    ((2, 1, 0), (1, 2, 3), 0.251150), ((2, 0, 1), (1, 3, 2), 0.251150),
    ((5, 5, 5, 5), (4, 2, 1, 3), LOG2), ((1, 0), (1, 2), 0.313262), ((1, 0), (2, 1), 1.313262),
    ((1, 0, 0), (1, 2, 2), 2 * 0.3132617 / 3), ((1, 0, 0), (1, 1, 1), 0), ((7,), (1,), 0)])
def test_ranking_loss_values(rewards, ranks, expected):
    """(2, 1, 0) in any order of the columns; equal scores; two responses (Bradley-Terry); one pair
    of three is tied: the others over C(3, 2) = 3. All tied, or one response: 0, not 0/0."""
    loss = ranking_loss(row(*rewards).double(), torch.tensor([ranks]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_ranking_loss_gradient_and_shift():
    """Equal scores of four: -1/4, -1/12, 1/12, 1/4; a constant added to all changes nothing."""
    r = row(0, 0, 0, 0, grad=True)
    ranking_loss(r, torch.tensor([[1, 2, 3, 4]])).sum().backward()
    assert r.grad[0].tolist() == pytest.approx([-1 / 4, -1 / 12, 1 / 12, 1 / 4])
    ranks = torch.tensor([[2, 1, 3]])
    assert torch.allclose(ranking_loss(row(1, 2, 3), ranks), ranking_loss(row(8, 9, 10), ranks))


@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_ranking_loss_ignores_padding(garbage):
    """K differs from prompt to prompt: what stands in the rest of a row changes no value and no
    gradient (deepspeedai/DeepSpeedExamples#316)."""
    r = torch.tensor([[2.0, 1.0, garbage, garbage], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    losses = ranking_loss(r, torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4]]))
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0.313262, abs=1e-6) and losses[1] > 1
    assert r.grad[0, 2:].tolist() == [0, 0] and torch.isfinite(r.grad).all()


def test_best_of_k_values():
    """Equal scores of four: log 4 and its gradient; fewer responses by -inf."""
    r = row(0, 0, 0, 0, grad=True)
    loss = best_of_k_loss(r, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert r.grad[0].tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])
    r = row(0, 1, -math.inf, -math.inf, grad=True)
    loss = best_of_k_loss(r, torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-6) and torch.isfinite(r.grad).all()


def test_calibration_error():
    """Pairs are drawn from the judge's own rates, so its error is near 0. A judge twice as sure
    has a larger one. By hand: rates of 1/2 and 3/4, and both pairs won: (1/2 - 1/2, 3/4 - 1)."""
    margins = torch.randn(20000) * 2
    margins = torch.where(torch.rand(20000) < margins.sigmoid(), margins, -margins)
    assert calibration_error(margins) < 0.01 and calibration_error(2 * margins) > 0.05
    assert calibration_error(torch.tensor([0.0, math.log(3)])) == pytest.approx(1 / 8, abs=1e-6)


def lengths_mask(generator, B=6, T=9):
    """True on the real tokens of B responses of random lengths: (B, T)."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    return torch.arange(T) < lengths[:, None]


def test_reward_stands_on_eos():
    """The score on the last token of a full and of a short response, the penalty on every token,
    nothing behind (huggingface/trl#1893)."""
    logps, rho = torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.tensor([[-2.0, -2.0, -1.0]] * 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logps, rho, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 0.0, 11.0], [-0.5, 20.0, 0.0]]


@pytest.mark.parametrize("lam, expected", [
    (0.95, (0.46575, 0.385, 0.3)), (1.0, (0.5, 0.4, 0.3)), (0.0, (0.1, 0.1, 0.3))])
def test_gae_values(lam, expected):
    """R = (0, 0, 1), V = (.5, .6, .7): three lambdas; returns are advantages plus values. A value
    behind the end is not bootstrapped from (alibaba/ROLL#447, natolambert/rlhf-book PR #216)."""
    for pad in (0.0, 100.0, math.nan):
        advantages, returns = gae(row(0, 0, 1, pad), row(0.5, 0.6, 0.7, pad), row(1, 1, 1, 0),
                                  1.0, lam)
        assert advantages[0].tolist() == pytest.approx([*expected, 0], abs=1e-6)
        assert torch.equal(returns, advantages + row(0.5, 0.6, 0.7, 0))


def test_whiten_values():
    """(1, 2, 3): population variance; the mean may be kept; pads neither count nor matter."""
    ones, root = torch.ones(1, 3), 1.224745
    for shift, expected in ((True, [-root, 0, root]), (False, [2 - root, 2, 2 + root])):
        assert whiten(row(1, 2, 3), ones, shift)[0].tolist() == pytest.approx(expected, abs=1e-6)
        for garbage in (100.0, math.nan):
            x, mask = row(1, 2, 3, garbage, garbage), torch.tensor([[1, 1, 1, 0, 0]])
            white = whiten(x, mask, shift)[0].tolist()
            assert white == pytest.approx([*expected, 0, 0], abs=1e-6)


@pytest.mark.parametrize("A, ratio, expected, gradient", [
    (1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5), (-1, 1.5, 1.5, 1.5), (-1, 0.5, 0.8, 0)])
def test_policy_loss_values(A, ratio, expected, gradient):
    """The four corners: what helps is clipped and has no gradient, what hurts has both."""
    logps = row(math.log(ratio), grad=True)
    loss = policy_loss(logps, row(0), row(A), torch.ones(1, 1), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("value, expected, gradient", [(1, 1.62, 0), (-1, 4.5, -3)])
def test_value_loss_values(value, expected, gradient):
    """Old value 0, return 2. A value of 1: the clipped error (0.2 - 2)^2 / 2 is larger, and has no
    gradient. A value of -1 moved away from the return: the full error, and a gradient."""
    values = row(value, grad=True)
    loss = value_loss(values, row(0), row(2), torch.ones(1, 1), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_losses_are_token_means_that_ignore_padding(loss):
    """By hand a mean over real tokens; garbage on pads changes neither value nor gradient; parts
    divided by the tokens of the whole add up to it (huggingface/trl#2995)."""
    g = torch.Generator().manual_seed(2)
    mask = lengths_mask(g)
    new, old, target = torch.randn(3, *mask.shape, generator=g, dtype=torch.float64) * 0.3
    x = new.clone().requires_grad_()
    whole = loss(x, old, target, mask, 0.2)
    whole.backward()
    by_token = [loss(*(a[b:b + 1, t:t + 1] for a in (new, old, target)), torch.ones(1, 1), 0.2)
                for b, t in mask.nonzero().tolist()]
    assert whole.item() == pytest.approx(float(sum(by_token)) / len(by_token))
    parts = [loss(new[i:i + 2], old[i:i + 2], target[i:i + 2], mask[i:i + 2], 0.2,
                  normalizer=mask.sum()) for i in (0, 2, 4)]
    assert float(sum(parts)) == pytest.approx(whole.item())
    for garbage in (1e9, math.nan):
        y, *rest = (a.masked_fill(~mask, garbage) for a in (new, old, target))
        y.requires_grad_()
        again = loss(y, *rest, mask, 0.2)
        again.backward()
        assert again.item() == whole.item() and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kl, expected", [(12, 0.204), (6.6, 0.202), (0, 0.196), (6, 0.2)])
def test_adaptive_controller(kl, expected):
    """beta .2, target 6: the error is clipped at 0.2 both ways."""
    assert adapt_beta(0.2, kl, 6) == pytest.approx(expected, abs=1e-9)


def test_kl_estimates():
    """Nats a response: a sum over its tokens, a mean over responses, nothing behind their ends."""
    logps, rho = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    logps[1, 2:] = math.nan
    k1, k3 = kl_estimates(logps, rho, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert k1.item() == pytest.approx(1.5)
    assert k3.item() == pytest.approx(3 * (math.exp(-0.5) - 1 + 0.5), abs=1e-6)


def test_best_of_n_against_enumeration():
    """The exact KL of the best of four on the bandit; with continuous rewards it has its bound."""
    pool = R.repeat_interleave((REF * 20).round().long())[None]  # (1, 20)
    ratio = best_of_n_log_ratio(R[None], pool, 4)[0]
    best = REF * ratio.exp()
    assert best.sum().item() == pytest.approx(1)
    assert (best * ratio).sum().item() == pytest.approx(0.553158, abs=1e-6)
    pool = torch.rand(1, 2000, dtype=torch.float64)
    ratio = best_of_n_log_ratio(pool, pool, 4)
    assert (ratio.exp() * ratio).mean().item() == pytest.approx(math.log(4) - 3 / 4, abs=2e-3)


@pytest.mark.parametrize("logps, e, expected", [
    ((-1, -3), 0.0, 0.126928), ((-1, -3), 0.2, 0.526928),  # a gap of two
    ((-4, -4), 0.0, LOG2), ((-4, -4), 0.2, LOG2), ((-4,) * 5, 0.2, math.log(5)),  # ignored
    ((math.log(0.8), math.log(0.2)), 0.2, 0.500402),  # H(0.2), the least
    ((math.log(0.5), math.log(0.3), math.log(0.2)), 0.2,  # 0.8 on the first, 0.1 on each other
     -0.8 * math.log(0.5) - 0.1 * math.log(0.3) - 0.1 * math.log(0.2)),
    ((-1,), 0.2, 0.0)])  # one instruction alone (FARL, Chain of Hindsight) has no contrast
def test_hir_contrast(logps, e, expected):
    """The contrast by itself, which alpha weighs, and the supervised term by itself."""
    def loss(alpha):
        return hir_loss(row(*logps).double(), v(0), alpha, 0.0, e, v(-5)).item()

    assert loss(0.0) == pytest.approx(-(1 - e) * logps[0] + e * 5, abs=1e-9)
    assert loss(1.0) - loss(0.0) == pytest.approx(expected, abs=1e-6)
    assert loss(3.0) - loss(0.0) == pytest.approx(3 * expected, abs=1e-5)


def test_hir_gradients():
    """L_sup: -1; L_con: share - 1, with smoothing 0 at a share of 1 - e; the entropy: -beta."""
    logps, entropy = v(-1, -3, grad=True), v(1.5, grad=True)
    hir_loss(logps[None], entropy, 1.0, 0.001, 0.0).sum().backward()
    share = math.exp(-1) / (math.exp(-1) + math.exp(-3))
    assert logps.grad.tolist() == pytest.approx([-1 - (1 - share), 1 - share])
    assert entropy.grad.item() == pytest.approx(-0.001)
    logps, vocabulary = v(math.log(0.8), math.log(0.2), grad=True), v(-6, grad=True)
    hir_loss(logps[None], v(1.5), 1.0, 0.001, 0.2, vocabulary).sum().backward()
    assert logps.grad.tolist() == pytest.approx([-0.8, 0]) and vocabulary.grad.item() == -0.2


def test_relabeling_is_idempotent_and_keeps_what_was_followed():
    """For each instruction and each thing that an output can do; {} obeys nothing."""
    choices = {"length": ["short", "long"], "mood": ["kind", "bad"], "topic": ["plot", "cast"]}
    everything = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    for wanted in (everything[0], everything[-1], {"length": "long"}, {}):
        for done in [*everything, {}]:
            obeyed = relabel(wanted, done)
            assert relabel(obeyed, done) == obeyed
            assert obeyed == ({key: done[key] for key in wanted} if done else {})
    assert relabel({"answer": "correct"}, {"answer": "wrong"}) == {"answer": "wrong"}


@pytest.mark.parametrize("alpha, beta, expected", [
    (1, 0, (0.622459, 0.377541)), (1, 1, (0.5, 0.5)), (0, 0, (0.5, 0.5)),
    (0, 2, (0.268941, 0.731059)), (1000, 0, (1, 0)), (0, -1e4, (1, 0))])
def test_pair_probabilities(alpha, beta, expected):
    """Improvements (1, .5) and proximities (.5, 1) of two corrections of one answer. Large weights
    do not overflow."""
    p = pair_probabilities(v(1, 0.5), v(0.5, 1), torch.tensor([0, 0]), alpha, beta)
    assert p.tolist() == pytest.approx(expected, abs=1e-6)


def test_pairs_are_strictly_better():
    """v = (0, 0, 1) has 2 pairs, v = (0, .5, 1) has 3; from the worse to the better, not back."""
    assert find_pairs([0, 0, 1]) == [(0, 2), (1, 2)]
    assert find_pairs([0, 0.5, 1]) == [(0, 1), (0, 2), (1, 2)]
    assert find_pairs([1, 0]) == [(1, 0)]
    assert find_pairs([0.5, 0.5]) == find_pairs([1]) == find_pairs([]) == []


@pytest.mark.parametrize("a, b, expected", [
    ("a b c d", "a b c d", 1), ("a b c d", "a x c d", 3 / 4), ("a b c d", "b c d", 3 / 4),
    ("a b", "c d e f", 0), ("", "", 1), ("", "a", 0), ("kitten sitting", "sitting kitten", 0),
    ("a b c", "a b c d e f", 1 / 2), (" a  b\n", "a b", 1)])
def test_similarity_is_one_minus_the_edit_distance_in_words(a, b, expected):
    """Over the longer one's number of words; symmetric."""
    assert similarity(a, b) == similarity(b, a) == pytest.approx(expected)
