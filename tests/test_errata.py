"""Errata that readers trip over: each formula as printed beside ours, and what each one does.

All are slips of sign, factor or order in tables, lectures and code that are well worth reading, and
some have been corrected since. Every test computes both sides, so that a number decides. The bandit
is in tests/conftest.py; docs/errata.md tells where each slip was printed.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import I, J, LENGTHS, MU, NOISY, R, best_policy, tilted, v

import model as m
from dpo import dpo_loss, ipo_loss, rdpo_loss, response_logps
from ppo_rlhf import kl_estimates
from reward_model import best_of_k_loss, ranking_loss
from self_correct import find_pairs
from simpo import simpo_loss
from variants.kto import add_mismatched, kto_loss

CERTAIN = (torch.sign(R[:, None] - R[None, :]) + 1) / 2  # the better always wins; 1/2 with itself


def test_rdpo_has_a_plus_before_alpha():
    """A table in the SimPO paper, and a lecture that follows it, subtract alpha (|y_w| - |y_l|);
    R-DPO's reward r - alpha |y| gives a plus. Lengths 10 and 6 at the start: .598139, printed
    .798139. DPO's optimum has a mean length of 7.89, R-DPO's 6.54, the printed one 9.25: longer."""
    def printed(w, l, rw, rl, nw, nl, beta, alpha):
        return -F.logsigmoid(beta * (w - rw - l + rl) - alpha * (nw - nl))

    for loss, start, length in ((rdpo_loss, 0.598139, 6.54), (printed, 0.798139, 9.25)):
        value = loss(v(-10), v(-12), v(-10), v(-12), v(10), v(6), 0.1, 0.05)
        assert value.item() == pytest.approx(start, abs=1e-6)
        policy = best_policy(lambda *y: loss(*y, LENGTHS[I], LENGTHS[J], 0.5, 0.05))
        assert (policy @ LENGTHS).item() == pytest.approx(length, abs=0.01)
    assert (tilted(R, 0.5) @ LENGTHS).item() == pytest.approx(7.89, abs=0.01)


def test_kto_lowers_rejected_responses():
    """The same table has plus lambda_l sigma(z - beta a_l), where KTO's loss has a minus. A step of
    gradient descent, rate 1, beta .1, takes a rejected log-prob of -12 to -12.025; printed: up, to
    -11.975. The chosen one goes up either way."""
    def printed(policy, reference, desirable, kl, beta):
        a = beta * (policy - reference)
        return torch.where(desirable, -torch.sigmoid(a - kl), torch.sigmoid(kl - a))

    for loss, rejected in ((kto_loss, -12.025), (printed, -11.975)):
        policy = v(-10, -12, grad=True)
        loss(policy, v(-10, -12), torch.tensor([True, False]), v(0.0), 0.1).sum().backward()
        assert (policy - policy.grad).tolist() == pytest.approx([-9.975, rejected])


def test_psi_of_ipo_is_the_identity():
    """A well-known book gives IPO a Psi(q) = log(q/(1 - q)); that one is DPO's, IPO's is q itself.
    The optimum is ref exp(E Psi(p(y > y')) / beta) / Z: with certain labels the logit is infinite,
    and DPO puts all mass on one response, where IPO stays at (.544, .206, .111, .037, .102)."""
    def dpo(*y):
        return dpo_loss(*y, 0.5)

    def ipo(*y):
        return ipo_loss(*y, 0.5)

    for loss, psi in ((dpo, torch.logit), (ipo, torch.clone)):
        assert torch.allclose(best_policy(loss), tilted(psi(NOISY) @ MU, 0.5), rtol=0, atol=1e-6)
    certain = MU[I] * MU[J] * CERTAIN[I, J]
    assert best_policy(dpo, certain)[4] > 1 - 1e-9
    bounded = best_policy(ipo, certain)
    assert bounded.tolist() == pytest.approx([.5444, .2064, .1107, .0371, .1015], abs=1e-4)
    assert torch.allclose(bounded, tilted(CERTAIN @ MU, 0.5), rtol=0, atol=1e-6)


def test_gamma_of_simpo_is_a_margin_or_a_ratio():
    """"beta 2, gamma .5": in the paper and in TRL the margin is .5, in the paper's code and in a
    book it is gamma times beta, 1. Two responses with equal means lose .974077 or 1.313262."""
    same = v(-4), v(-8), v(4), v(8)  # means of -1
    assert simpo_loss(*same, 2.0, 0.5).item() == pytest.approx(0.974077, abs=1e-6)
    assert simpo_loss(*same, 2.0, 0.5 * 2.0).item() == pytest.approx(1.313262, abs=1e-6)


def test_reward_loss_takes_sigma_of_the_difference():
    """A slide has log(sigma(r_w) - r_l) where InstructGPT has log(sigma(r_w - r_l)). At (2, 1) ours
    is .313262, the slide's NaN. It is finite for 10 of 20 pairs of five rewards, and once all
    rewards are raised by 3 for none; ours does not change at all."""
    def printed(r):
        return -torch.log(torch.sigmoid(r[:, 0]) - r[:, 1])

    ranks = torch.tensor([[1, 2]])
    assert ranking_loss(v(2, 1)[None], ranks).item() == pytest.approx(0.313262, abs=1e-6)
    pairs = torch.stack([R[I], R[J]], 1)[I != J]  # (20, 2), either one as the chosen
    ours = ranking_loss(pairs, ranks.expand(20, 2))
    assert torch.allclose(ours, F.softplus(pairs[:, 1] - pairs[:, 0]))
    assert torch.allclose(ranking_loss(pairs + 3, ranks.expand(20, 2)), ours)
    finite = [int(printed(x).isfinite().sum()) for x in (v(2, 1)[None], pairs, pairs + 3)]
    assert finite == [0, 10, 0]


def test_best_of_four_has_a_minus():
    """Eq. (1) of Ziegler et al. is the log-likelihood of the human's pick, without the minus of a
    loss. Minimised as printed it takes the pick's probability from 1/4 to below 1e-6, ours to .98.
    """
    ends = []
    for loss in (best_of_k_loss, lambda rewards, best: rewards.log_softmax(1)[:, best]):
        rewards = torch.zeros(1, 4, dtype=torch.float64)
        for _ in range(100):
            rewards.requires_grad_()
            slope, = torch.autograd.grad(loss(rewards, torch.tensor([2])).sum(), rewards)
            rewards = rewards.detach() - slope
        ends.append(rewards.softmax(1)[0, 2].item())
    assert ends[0] > 0.98 and ends[1] < 1e-6


def test_kl_estimators_take_reference_over_policy():
    """Schulman's k1 = -u and k3 = e^u - 1 - u need u = log rho - log pi. With u = log pi - log rho,
    as a book's code had it before it was corrected, k1 averages -.143841 and k3 .189492 under pi,
    where KL(pi || rho) is .143841."""
    pi, rho = v(0.5, 0.5), v(0.25, 0.75)
    for p, q, expected in ((pi, rho, (0.143841, 0.143841)), (rho, pi, (-0.143841, 0.189492))):
        each = [kl_estimates(p[y].log().view(1, 1), q[y].log().view(1, 1), torch.ones(1, 1))
                for y in (0, 1)]  # (k1, k3) of either sample
        means = [float(sum(pi[y] * each[y][k] for y in (0, 1))) for k in (0, 1)]
        assert means == pytest.approx(expected, abs=1e-6)


def test_reference_point_of_kto_is_of_mismatched_responses():
    """A book's code rolls the log-ratios of matched rejected responses by one and then averages: a
    mean does not see the roll. Matched ratios of -2 and mismatched ones of .5: z is .5, there 0."""
    def mean_ratio(sequences):
        return v(*(-2 if response == 10 + prompt else 0.5 for prompt, response in sequences)).mean()

    examples = [{"prompt": x, "response": 10 + x, "sequence": (x, 10 + x)} for x in range(3)]
    tokenizer = SimpleNamespace(encode_example=lambda prompt, response, *_: (prompt, response))
    args = SimpleNamespace(seed=0, max_length=9)
    matched, mismatched = zip(*add_mismatched(tokenizer, examples, examples, args))
    assert mean_ratio(matched) == mean_ratio(matched[1:] + matched[:1]) == -2
    assert mean_ratio(mismatched) == 0.5 and [prompt for prompt, _ in mismatched] == [0, 1, 2]


def test_orpo_averages_over_the_response_alone():
    """ORPO's own code masks with attention[:-1] - prompt[1:]: a padded row has |y| + 1 terms, the
    last of them log P(pad). In units of log 2 a response of -2, -1 and a pad of -4 average -7/3
    there, -3/2 here; the batch's longest, which has no pad, averages -7/4 in both."""
    after = v(1 / 2, 1 / 4, 1 / 4)  # P(EOS), P(1), P(2) after a word; EOS, 0, is the pad too
    table = torch.stack([v(1 / 16, 1 / 2, 7 / 16), after, after]).log()  # of a bigram model
    model = SimpleNamespace(
        base_model=lambda input_ids, **_: SimpleNamespace(last_hidden_state=table[input_ids]),
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.eye(3, dtype=torch.float64)),
        device=torch.device("cpu"), dtype=torch.float64)
    sums, lengths = response_logps(model, [([1, 2], [1, 0]), ([1, 2], [2, 1, 2, 0])])
    assert lengths.tolist() == [2, 4]
    assert (sums / lengths / math.log(2)).tolist() == pytest.approx([-3 / 2, -7 / 4])

    ids = torch.tensor([[1, 2, 1, 0, 0, 0], [1, 2, 2, 1, 2, 0]])
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    mask = attention[:, :-1] - torch.tensor([[1, 0, 0, 0, 0]] * 2)  # (2, T - 1)
    printed = (table[ids[:, :-1], ids[:, 1:]] * mask).sum(1) / mask.sum(1)
    assert mask.sum(1).tolist() == [3, 4]
    assert (printed / math.log(2)).tolist() == pytest.approx([-7 / 3, -7 / 4])


def test_lora_is_scaled_by_alpha_over_r(monkeypatch):
    """Slides often write W0 x + B A x and drop alpha/r. With W0 = 1, A = 2, B = 3, alpha = 2, r = 1
    and x = 1 that is 7; LoRA's output is 13, with the adapter apart and merged."""
    monkeypatch.setattr(m, "LORA_ALPHA", 2)
    layer = torch.nn.Linear(1, 1, bias=False)
    lora = m.LoRA(layer.weight, 1)
    for weight, value in ((layer.weight, 1), (lora.A, 2), (lora.B, 3)):
        torch.nn.init.constant_(weight, value)
    x = torch.ones(1, 1)
    assert (layer(x) + x @ lora.A.T @ lora.B.T).item() == 7
    layer.lora, layer.hook = lora, layer.register_forward_hook(lora)
    assert layer(x).item() == 13
    m.merge_lora(layer)
    assert layer(x).item() == 13 and not hasattr(layer, "lora")


def test_corrections_go_from_worse_to_better():
    """A widely used lecture shows a training pair of Self-Correct as (correct, wrong). The paper's
    go upwards: of values (0, .5, 1) three pairs that gain 2/3 on average, and the best answer is
    never corrected. Reversed, the three lose 2/3 on average, and the worst is never corrected."""
    values = [0, 0.5, 1]
    printed = [(k, j) for j in range(3) for k in range(3) if values[j] < values[k]]
    for pairs, gain, corrected in ((find_pairs(values), 2 / 3, {0, 1}), (printed, -2 / 3, {1, 2})):
        assert len(pairs) == 3 and {j for j, _ in pairs} == corrected
        assert sum(values[k] - values[j] for j, k in pairs) / 3 == pytest.approx(gain)
