"""Reward model and PPO: closed-form values and gradients, optima on a bandit, rollouts, scores."""

import itertools
import json
import math
import random

import pytest
import torch

import ppo_rlhf
import reward_model
from model import load_model, save_model
from ppo_rlhf import (adapt_beta, best_of_n_log_ratio, collate, gae, judge, kl_estimates,
                      policy_loss, sample, token_logps, token_rewards, to_rows, value_loss, whiten)
from reward_model import (average_ranks, best_of_k_loss, encode_rankings, gain_and_bias, normalize,
                          ranking_loss, rate, read_rankings, toy_ranks, toy_reward)

NO_AUTOCAST = torch.autocast("cpu", enabled=False)
R = torch.tensor([1.0, 0.5, 0.0, -0.7, 2.0], dtype=torch.float64)
REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LOG2 = math.log(2)


def row(*values, grad=False):
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


# ---------------------------------------------------------------------------- the reward model


def test_ranking_loss_values():
    """r = (2, 1, 0) in the right order; equal scores; two responses are Bradley and Terry's."""
    assert ranking_loss(row(2, 1, 0), torch.tensor([[1, 2, 3]])).item() == pytest.approx(
        0.251150, abs=1e-6)
    assert ranking_loss(row(2, 0, 1), torch.tensor([[1, 3, 2]])).item() == pytest.approx(
        0.251150, abs=1e-6)  # the order of the columns means nothing
    assert ranking_loss(row(5, 5, 5, 5), torch.tensor([[4, 2, 1, 3]])).item() == pytest.approx(LOG2)
    assert ranking_loss(row(1, 0), torch.tensor([[1, 2]])).item() == pytest.approx(
        0.313262, abs=1e-6)
    assert ranking_loss(row(1, 0), torch.tensor([[2, 1]])).item() == pytest.approx(
        1.313262, abs=1e-6)


def test_ranking_loss_gradient_and_shift():
    """Equal scores of four: -1/4, -1/12, 1/12, 1/4; a constant added to all changes nothing."""
    r = row(0, 0, 0, 0, grad=True)
    ranking_loss(r, torch.tensor([[1, 2, 3, 4]])).sum().backward()
    assert r.grad[0].tolist() == pytest.approx([-1 / 4, -1 / 12, 1 / 12, 1 / 4])
    ranks = torch.tensor([[2, 1, 3]])
    assert torch.allclose(ranking_loss(row(1, 2, 3), ranks), ranking_loss(row(8, 9, 10), ranks))


def test_ranking_loss_drops_ties_and_keeps_the_divisor():
    """Of three pairs one is tied: the other two over C(3, 2) = 3; all tied is 0, not 0/0."""
    loss = ranking_loss(row(1, 0, 0), torch.tensor([[1, 2, 2]]))
    assert loss.item() == pytest.approx(2 * 0.3132617 / 3, abs=1e-6)
    assert ranking_loss(row(1, 0, 0), torch.tensor([[1, 1, 1]])).item() == 0


@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_ranking_loss_ignores_padding(garbage):
    """K differs from prompt to prompt: what stands in the rest of a row changes no value and no
    gradient (deepspeedai/DeepSpeedExamples#316)."""
    r = torch.tensor([[2.0, 1.0, garbage, garbage], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    losses = ranking_loss(r, torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4]]))
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0.313262, abs=1e-6) and losses[1] > 1
    assert r.grad[0, 2:].tolist() == [0, 0] and torch.isfinite(r.grad).all()
    alone = ranking_loss(r[:1].detach()[:, :1], torch.tensor([[1]]))
    assert alone.item() == 0  # a single response says nothing


def test_best_of_k_values():
    """Equal scores of four: log 4 and its gradient; (1, 0, 0, 0); fewer responses by -inf."""
    r = row(0, 0, 0, 0, grad=True)
    loss = best_of_k_loss(r, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.386294, abs=1e-6)
    assert r.grad[0].tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])
    assert best_of_k_loss(row(1, 0, 0, 0), torch.tensor([0])).item() == pytest.approx(
        0.743668, abs=1e-6)
    r = row(1, 0, -math.inf, -math.inf, grad=True)
    loss = best_of_k_loss(r, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-6) and torch.isfinite(r.grad).all()


def minimise(loss):
    """The rewards (5,) that minimise a loss of them, by L-BFGS."""
    r = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(r)
        value.backward()
        return value

    optimizer.step(closure)
    return r.detach()


def test_bradley_terry_recovers_the_reward():
    """Pairs of Bradley and Terry's human: the minimiser is the true reward plus a constant."""
    pairs = list(itertools.permutations(range(5), 2))
    weight = torch.tensor([torch.sigmoid(R[i] - R[j]) for i, j in pairs], dtype=torch.float64)
    ranks = torch.tensor([[1, 2]]).expand(len(pairs), 2)
    x = minimise(lambda r: (weight * ranking_loss(r[torch.tensor(pairs)], ranks)).sum())
    assert (x - R).std() < 1e-6


def test_best_of_four_recovers_the_reward():
    """Picks of Luce's human among all sets of four: the true reward plus a constant."""
    sets = torch.tensor(list(itertools.combinations(range(5), 4)))  # (5, 4)
    odds = R[sets].softmax(1)
    x = minimise(lambda r: sum((odds[:, k] * best_of_k_loss(
        r[sets], torch.full((5,), k))).sum() for k in range(4)))
    assert (x - R).std() < 1e-6


def test_toy_human_is_plackett_and_luce():
    """Who comes first of three has odds e^reward, and pairs follow Bradley and Terry's model."""
    texts = [" superb", " plain", " dull"]  # rewards 1, 0, -1
    rng = random.Random(0)
    ranks = torch.tensor([toy_ranks(texts, rng) for _ in range(20000)])  # (20000, 3)
    assert (ranks.sort(1).values == torch.tensor([1, 2, 3])).all()
    first = (ranks == 1).double().mean(0)
    assert torch.allclose(first, torch.tensor([1.0, 0, -1]).double().softmax(0), atol=0.012)
    assert (ranks[:, 0] < ranks[:, 1]).double().mean().item() == pytest.approx(
        1 / (1 + math.exp(-1)), abs=0.012)


def test_gain_and_bias():
    """Scores 3, 5, 7: population SD, as in the original code."""
    gain, bias = gain_and_bias(torch.tensor([3.0, 5.0, 7.0]))
    assert (gain.item(), bias.item()) == pytest.approx((0.612372, -3.061862), abs=1e-6)


SEQUENCES = [([1, 2, 3 + i], [5 + i] * (1 + i % 4)) for i in range(24)]


def llama(folder, tiny_folder):
    """A random Llama (RMSNorm: no biases at all) with the embedded model's tokenizer."""
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=733, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=64, bos_token_id=732,
                eos_token_id=732).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["norm with a bias", "head with a bias", "no bias", "lora"])
def test_normalize(kind, tmp_path, capsys):
    """Mean 0 and SD 1 by weights alone, order kept, gain and bias as returned, kept by saving; a
    model without any bias keeps its mean, and that is said."""
    from model import TINY

    name = llama(tmp_path, TINY) if kind == "no bias" else "tiny"
    model, tokenizer = load_model(name, head="reward", lora_rank=2 if kind == "lora" else 0)
    if kind == "head with a bias":
        model.score.bias = torch.nn.Parameter(torch.tensor([0.7]))
    before = rate(model, SEQUENCES, NO_AUTOCAST)
    gain, bias = normalize(model, SEQUENCES, NO_AUTOCAST)
    now = rate(model, SEQUENCES, NO_AUTOCAST)
    assert torch.allclose(now, gain * before + bias, atol=1e-4)
    assert now.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    if kind == "no bias":
        assert "keep a mean of" in capsys.readouterr().out and bias == pytest.approx(0, abs=1e-4)
    else:
        assert now.mean().item() == pytest.approx(0, abs=1e-4)
    if kind != "head with a bias":  # which no transformers class has
        save_model(model, tokenizer, tmp_path / "saved")
        again, _ = load_model(tmp_path / "saved", head="reward")
        assert torch.allclose(rate(again, SEQUENCES, NO_AUTOCAST), now, atol=1e-5)


def test_normalize_one_score(capsys):
    """Scores that are all the same have no scale: they stay, and that is said."""
    model, _ = load_model("tiny", head="reward")
    torch.nn.init.zeros_(model.score.weight)
    assert normalize(model, SEQUENCES, NO_AUTOCAST) == (1.0, 0.0)
    assert "one and the same score" in capsys.readouterr().out


def test_rankings_encoded(tiny):
    """The first of identical responses stays; what is tied, or does not fit, is counted; EOS ends
    each response, with the same function that PPO uses (OpenRLHF/OpenRLHF#300)."""
    _, tokenizer = tiny
    rows = [{"prompt": "A", "responses": [" x", " y", " x"], "ranks": [3, 1, 2]},
            {"prompt": "A", "responses": [" x", " y"], "ranks": [1, 1]},
            {"prompt": "A", "responses": [" x", " y", " z"], "ranks": [1, 1, 2]},
            {"prompt": "A" * 600, "responses": [" x", " y"], "ranks": [1, 2]}]
    examples, lost = encode_rankings(tokenizer, rows, 64, "ranking")
    assert [ranks for _, ranks in examples] == [[3, 1], [1, 1, 2]]
    assert lost == {"dropped": 1, "identical": 1, "tied": 1, "cut": 0}
    assert examples[0][0][0] == tokenizer.encode_example("A", " x", 64)
    assert all(r[-1] == tokenizer.eos_id for responses, _ in examples for _, r in responses)
    examples, lost = encode_rankings(tokenizer, rows, 64, "best_of_k")
    assert [ranks for _, ranks in examples] == [[3, 1]] and lost["tied"] == 2


def test_pairs_are_rankings_of_two(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "A", "chosen": " x", "rejected": " y"}) + "\n"
                    + json.dumps({"prompt": "B", "responses": [" x", " y"], "ranks": [2, 1]}))
    assert read_rankings(path) == [
        {"prompt": "A", "responses": [" x", " y"], "ranks": [1, 2]},
        {"prompt": "B", "responses": [" x", " y"], "ranks": [2, 1]}]


def test_average_ranks():
    """Ties share the middle of their ranks, as in Spearman's correlation."""
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 0.0])).tolist() == [3.0, 1.5, 3.0, 0.5]


def test_evaluation_of_known_scores(monkeypatch):
    """Accuracy is strict (equal scores are no success), the ceiling and the calibration are those
    worked by hand, and ties of the human count nowhere."""
    test = [([None] * 3, [1, 2, 2]), ([None] * 2, [2, 1])]
    scores = torch.tensor([2.0, 1.0, 2.0, 0.5, 0.0])
    monkeypatch.setattr(reward_model, "rate", lambda *_: scores)
    truths = torch.tensor([3.0, 2.0, 2.0, 0.0, 1.0])
    metrics, (predicted, observed), _ = reward_model.evaluate(None, test, truths, NO_AUTOCAST)
    assert metrics["pairs/accuracy"] == pytest.approx(1 / 3)  # right, equal, wrong
    assert metrics["pairs/ceiling"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    assert metrics["pairs/loss"] == pytest.approx(
        (0.3132617 + LOG2 + math.log(1 + math.exp(0.5))) / 3, abs=1e-6)
    # Win rates of the first: 0.731 (won), 0.5 (won), 0.622 (lost), in three different tenths.
    assert observed.tolist() == [1, 0, 1]
    assert predicted.tolist() == pytest.approx([0.5, 0.622459, 0.731059], abs=1e-6)
    assert metrics["calibration/error"] == pytest.approx((0.5 + 0.622459 + 0.268941) / 3, abs=1e-6)


# ------------------------------------------------------------------------------ PPO's equations


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
    """R = (0, 0, 1), V = (.5, .6, .7): three lambdas; returns are advantages plus values."""
    advantages, returns = gae(row(0, 0, 1), row(0.5, 0.6, 0.7), torch.ones(1, 3), 1.0, lam)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(returns, advantages + row(0.5, 0.6, 0.7))


def test_gae_with_the_score_behind_eos_differs():
    """TRL's placement adds a step: other advantages, so where the score stands is no detail."""
    advantages, _ = gae(row(0, 0, 0, 1), row(0.5, 0.6, 0.7, 0.8), torch.ones(1, 4))
    assert advantages[0, :3].tolist() == pytest.approx((0.456725, 0.3755, 0.29), abs=1e-6)


def lengths_mask(generator, B=6, T=9):
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    return torch.arange(T) < lengths[:, None]


def test_gae_is_the_loop_and_ignores_padding():
    """Equal to a loop over real tokens for random masks, whatever stands on the pads: a value
    there must not be bootstrapped from (alibaba/ROLL#447, natolambert/rlhf-book PR #216)."""
    g = torch.Generator().manual_seed(0)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5)):
        mask = lengths_mask(g)
        rewards, values = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for b in range(len(mask)):
            n, later = int(mask[b].sum()), 0.0
            for t in reversed(range(n)):
                following = values[b, t + 1] if t + 1 < n else 0.0
                later = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * later
                assert advantages[b, t] == pytest.approx(float(later), abs=1e-12)
                assert returns[b, t] == pytest.approx(float(later + values[b, t]), abs=1e-12)
            assert (advantages[b, n:] == 0).all() and (returns[b, n:] == 0).all()
        for garbage in (100.0, math.nan, math.inf):
            dirty = gae(rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage),
                        mask, gamma, lam)
            assert torch.equal(dirty[0], advantages) and torch.equal(dirty[1], returns)
        left = gae(rewards.flip(1), values.flip(1), mask.flip(1), gamma, lam)  # pads on the left
        assert (left[0][~mask.flip(1)] == 0).all() and (left[1][~mask.flip(1)] == 0).all()


def test_whiten_values():
    """(1, 2, 3): population variance; the mean may be kept; pads neither count nor matter."""
    assert whiten(row(1, 2, 3), torch.ones(1, 3))[0].tolist() == pytest.approx(
        [-1.224745, 0, 1.224745], abs=1e-6)
    assert whiten(row(1, 2, 3), torch.ones(1, 3), shift_mean=False)[0].tolist() == pytest.approx(
        [0.775255, 2, 3.224745], abs=1e-6)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    for garbage in (1e6, math.nan):
        assert whiten(row(1, 2, 3, garbage, garbage), mask)[0].tolist() == pytest.approx(
            [-1.224745, 0, 1.224745, 0, 0], abs=1e-6)
    assert torch.isfinite(whiten(row(5, 1), torch.tensor([[1, 0]]))).all()  # one token
    g = torch.Generator().manual_seed(1)
    mask = lengths_mask(g)
    white = whiten(torch.randn(mask.shape, generator=g) * 3 + 2, mask)[mask]
    assert white.mean().abs() < 1e-6 and white.var(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("A, ratio, expected, gradient", [
    (1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5), (-1, 1.5, 1.5, 1.5), (-1, 0.5, 0.8, 0)])
def test_policy_loss_values(A, ratio, expected, gradient):
    """The four corners: what helps is clipped and has no gradient, what hurts has both."""
    logps = row(math.log(ratio), grad=True)
    loss = policy_loss(logps, row(0), row(A), torch.ones(1, 1), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_value_loss_values():
    """V = 0, v = 1, return 2: the clipped error (0.2 - 2)^2 / 2 is larger, and has no gradient."""
    v = row(1, grad=True)
    loss = value_loss(v, row(0), row(2), torch.ones(1, 1), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(1.62, abs=1e-6) and v.grad.item() == 0
    v = row(-1, grad=True)  # it moved away from the return: the full error, and a gradient
    loss = value_loss(v, row(0), row(2), torch.ones(1, 1), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(4.5, abs=1e-6) and v.grad.item() == pytest.approx(-3)


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
    by_token = [loss(new[b:b + 1, t:t + 1], old[b:b + 1, t:t + 1], target[b:b + 1, t:t + 1],
                     torch.ones(1, 1), 0.2) for b, t in mask.nonzero().tolist()]
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


def test_kl_estimates_against_enumeration():
    """pi = (.5, .5), rho = (.25, .75): under pi both average KL(pi || rho) = .143841. With u the
    other way round, as in a well-known teaching code, k3 would average .189492 and k1 -.143841."""
    pi, rho = row(0.5, 0.5).log(), row(0.25, 0.75).log()
    each = [kl_estimates(pi[:, i:i + 1], rho[:, i:i + 1], torch.ones(1, 1)) for i in (0, 1)]
    k1, k3 = (0.5 * sum(float(e[k]) for e in each) for k in (0, 1))
    assert k1 == pytest.approx(0.143841, abs=1e-6) and k3 == pytest.approx(0.143841, abs=1e-6)
    swapped = [kl_estimates(rho[:, i:i + 1], pi[:, i:i + 1], torch.ones(1, 1)) for i in (0, 1)]
    k1, k3 = (0.5 * sum(float(e[k]) for e in swapped) for k in (0, 1))
    assert (k1, k3) == pytest.approx((-0.143841, 0.189492), abs=1e-6)


def test_kl_estimates_sum_over_tokens_and_ignore_padding():
    """Nats a response: sums over its tokens, mean over responses."""
    logps, rho = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logps[1, 2:] = math.nan
    k1, k3 = kl_estimates(logps, rho, mask)
    assert k1.item() == pytest.approx(1.5)
    assert k3.item() == pytest.approx(3 * (math.exp(-0.5) - 1 + 0.5), abs=1e-6)


def test_k3_near_zero():
    """A log-ratio of 1e-3 in fp32: e^u - 1 - u by subtraction is off by some percent
    (natolambert/rlhf-book PR #525)."""
    u = torch.tensor([[1e-3]])
    _, k3 = kl_estimates(torch.zeros(1, 1), u, torch.ones(1, 1))
    truth = math.expm1(float(u)) - float(u)
    assert k3.item() == pytest.approx(truth, rel=2e-4)
    assert (u.exp() - 1 - u).item() != pytest.approx(truth, rel=1e-2)


def test_best_of_n_against_enumeration():
    """20 samples in the proportions of the bandit's reference: the exact KL of the best of four,
    below its bound; continuous rewards reach the bound."""
    pool = R.repeat_interleave((REF * 20).round().long())[None]  # (1, 20)
    ratio = best_of_n_log_ratio(R[None], pool, 4)[0]
    pi = REF * ratio.exp()
    assert pi.sum().item() == pytest.approx(1)
    assert (pi * ratio).sum().item() == pytest.approx(0.553158, abs=1e-6)
    pool = torch.rand(1, 2000, dtype=torch.float64)
    ratio = best_of_n_log_ratio(pool, pool, 4)
    assert (ratio.exp() * ratio).mean().item() == pytest.approx(0.636294, abs=2e-3)


def test_ppo_reaches_the_optimum_of_the_bandit():
    """One-token responses, rollouts of 4096, the script's own equations: E[r] - beta KL comes to
    beta log Z = .942758 within 0.02."""
    beta, logits = 0.5, REF.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    mask = torch.ones(4096, 1)
    for _ in range(80):
        with torch.no_grad():
            pi = logits.softmax(0)
            y = torch.multinomial(pi, 4096, replacement=True)[:, None]  # (B, 1)
            old, rho = pi.log()[y], REF.log()[y]
            rewards = token_rewards(R[y[:, 0]], old, rho, mask, beta)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask)
            advantages = whiten(advantages, mask)
        for _ in range(4):
            loss = policy_loss(logits.log_softmax(0)[y], old, advantages, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pi = logits.detach().softmax(0)
    assert (pi * (R - beta * (pi / REF).log())).sum().item() == pytest.approx(0.942758, abs=0.02)


# ------------------------------------------------------------------------- rollouts and scores


def test_sample_keeps_the_log_probs_of_its_samples(tiny):
    """What sampling keeps is what scoring computes, to 1e-5, for prompts of very different lengths,
    padded on the left (CarperAI/trlx#107)."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(p) for p in (
        "I saw the film.", "We watched the musical with friends. " * 6, "A") * 5]
    responses, kept = sample(model, tokenizer, prompts, 24, seed=0, size=4)
    sequences = list(zip(prompts, responses))
    mask = torch.arange(24) < torch.tensor([len(r) for r in responses])[:, None]
    with torch.no_grad():
        scored = to_rows(token_logps(model, collate(sequences, "cpu")), mask)
    assert [len(k) for k in kept] == [len(r) for r in responses] and (mask.sum(1) > 1).all()
    assert (to_rows(torch.tensor(sum(kept, [])), mask) - scored).abs().max() < 1e-5
    assert (scored[~mask] == 0).all()


def test_sample_samples_the_model_itself():
    """Mean NLL of 3000 first tokens is the entropy of the model's own distribution, broad here and
    thus truncated by `generate`'s own top-k of 50, though the model came with a generation_config
    that says otherwise (huggingface/trl#3029, #235)."""
    model, tokenizer = load_model("tiny")
    prompt = tokenizer.encode_prompt("I saw the film yesterday. The")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.3)  # flatter logits
        model.transformer.ln_f.bias.mul_(0.3)
        logp = model(torch.tensor([prompt])).logits[0, -1].log_softmax(0)
    spoiled = type(model.generation_config)(do_sample=True, top_k=2, temperature=0.5, top_p=0.5,
                                            suppress_tokens=logp.topk(50).indices.tolist())
    model.generation_config = spoiled
    _, kept = sample(model, tokenizer, [prompt] * 3000, 1, seed=0, size=1000)
    entropy = -(logp.exp() * logp).sum()
    deviation = ((logp.exp() * logp**2).sum() - entropy**2).sqrt()
    assert entropy > 3 and (logp > math.log(1e-3)).sum() > 100
    assert abs(-torch.tensor(kept).mean() - entropy) < 4 * deviation / 3000**0.5


def test_judge(tiny, monkeypatch):
    """The toy's true reward of the text, but for a response without EOS, which scores what the flag
    says; a reward model reads prompt, text and one EOS, as in its training."""
    model, tokenizer = tiny
    args = ppo_rlhf.parse_args(["--missing_eos_score", "-7"])
    good, eos = tokenizer.encode(" The cast was superb."), tokenizer.eos_id
    scores, texts = judge(None, tokenizer, ["A", "A"], [good + [eos], good], args, NO_AUTOCAST)
    assert scores.tolist() == [1, -7] and texts == [" The cast was superb."] * 2
    seen = []
    monkeypatch.setattr(ppo_rlhf, "rate", lambda model, rows, _: seen.extend(rows)
                        or torch.ones(len(rows)))
    judge((model, tokenizer), tokenizer, ["A"], [good + [eos]], args, NO_AUTOCAST)
    examples, _ = encode_rankings(tokenizer, [
        {"prompt": "A", "responses": [" The cast was superb.", " B"], "ranks": [1, 2]}], 512,
        "ranking")
    assert seen == [examples[0][0][0]]


def test_value_is_of_the_state_before_the_token(tiny):
    """The value of token t must not have seen token t: another token there leaves it unchanged."""
    model, _ = load_model("tiny", head="reward")
    value = lambda *response: ppo_rlhf.token_values(
        model, collate([([1, 2, 3], list(response))], "cpu"))
    a, b = value(5, 6, 7), value(5, 6, 8)
    assert torch.allclose(a, b, atol=1e-6) and len(a) == 3
    assert not torch.allclose(value(5, 6, 7)[2], value(5, 9, 7)[2], atol=1e-3)


def test_nothing_moves_at_a_vanishing_learning_rate(tmp_path):
    """pi/pi_old stays 1 over all epochs and minibatches, with padding: no clipping, no KL to the
    old policy, and at step 1 none to the reference (CarperAI/trlx#508, NVIDIA/NeMo-Aligner#68)."""
    ppo_rlhf.main(["--lr", "1e-30", "--steps", "2", "--samples", "2", "--batch_size", "24",
                   "--device", "cpu", "--out", str(tmp_path)])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        assert abs(numbers["policy/kl_old"]) < 1e-9 and numbers["policy/clip_fraction"] == 0
        assert abs(numbers["kl/policy_reference"]) < 1e-4 and abs(numbers["kl/k3"]) < 1e-6


def test_a_wrong_old_log_prob_is_noticed(tmp_path, monkeypatch, capsys):
    """A model that scores its samples otherwise than it drew them is told of, with the size."""
    original = ppo_rlhf.per_token
    monkeypatch.setattr(ppo_rlhf, "per_token", lambda *args: original(*args) * 0.9)
    with pytest.raises(SystemExit) as stop:
        ppo_rlhf.main(["--steps", "1", "--samples", "2", "--batch_size", "8", "--device", "cpu",
                       "--out", str(tmp_path)])
    assert stop.value.code == 2 and "pi/pi_old is off 1" in capsys.readouterr().err


def test_toy_reward_is_hackable():
    """Words count wherever they stand: that is what --beta 0 finds."""
    assert toy_reward(" amazing amazing amazing") == 3


def test_controller_moves_beta(tmp_path, monkeypatch):
    """The controller gets the KL that is logged, k1, and its answer is the next step's beta."""
    monkeypatch.setattr(ppo_rlhf, "adapt_beta", lambda beta, kl, target: beta + kl + target)
    ppo_rlhf.main(["--kl_target", "0.5", "--steps", "3", "--samples", "2", "--batch_size", "16",
                   "--lr", "2e-3", "--device", "cpu", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl/beta"] == 0.5 and abs(rows[1]["kl/policy_reference"]) > 1e-3
    for before, after in zip(rows, rows[1:]):
        assert after["kl/beta"] == pytest.approx(
            before["kl/beta"] + before["kl/policy_reference"] + 0.5)


def test_ptx_learns_its_texts(tmp_path):
    """PPO-ptx: with a large coefficient the loss on the pretraining text falls, without it not."""
    path = tmp_path / "ptx.jsonl"
    path.write_text('{"text": "Nobody said a word about the lost camera in Oslo."}\n')
    losses = []
    for coefficient in ("1e-9", "5"):
        ppo_rlhf.main(["--ptx_data", str(path), "--ptx_coef", coefficient, "--steps", "4",
                       "--samples", "2", "--batch_size", "16", "--device", "cpu",
                       "--out", str(tmp_path / "out")])
        rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["ptx/loss"] for line in rows])
    assert losses[0][0] > 1 and losses[1][-1] < losses[0][-1] - 0.5


def test_refit_learns_fresh_rankings():
    """A reward model that scores backwards is set right by rankings of the toy's human, and comes
    out with mean 0 and SD 1 on the samples given."""
    reward = load_model("tiny", head="reward")
    words = ppo_rlhf.POSITIVE + ppo_rlhf.NEGATIVE
    rng = random.Random(0)
    texts = [f" The cast was {a} and {b}." for a, b in (rng.sample(words, 2) for _ in range(512))]
    rows = [{"prompt": "A", "responses": texts[i:i + 4], "ranks": toy_ranks(texts[i:i + 4], rng)}
            for i in range(0, 512, 4)]
    args = ppo_rlhf.parse_args(["--relabel_rankings", "64", "--relabel_lr", "1e-3"])
    ppo_rlhf.refit(reward, rows, [("A", text) for text in texts[:64]], args, NO_AUTOCAST)
    model, tokenizer = reward
    scores = rate(model, [tokenizer.encode_example("A", t, 64) for t in texts[:64]], NO_AUTOCAST)
    truth = torch.tensor([toy_reward(text) for text in texts[:64]])
    assert scores.mean().abs() < 0.02 and abs(scores.std() - 1) < 0.02
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.5


def test_flags_change_numbers(tmp_path, monkeypatch):
    """Each of these flags changes the second step's numbers (modelscope/ms-swift#10167)."""
    monkeypatch.setattr(ppo_rlhf, "evaluate", lambda *_: ({"after": {"x": 0.0}}, [], None))
    monkeypatch.setattr(ppo_rlhf, "plot", lambda *_: None)

    def second(*flags):
        ppo_rlhf.main([*flags, "--lr", "3e-3", "--steps", "2", "--batch_size", "8", "--device",
                       "cpu", "--out", str(tmp_path)])
        row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
        return [row["policy/loss"], row["scores/mean"], row.get("value/loss")]

    plain = second()
    for flags in (["--clip", "0.01"], ["--clip_value", "0.01"], ["--gamma", "0.8"],
                  ["--lam", "0.5"], ["--whiten_rewards"], ["--beta", "5"], ["--ppo_epochs", "1"],
                  ["--minibatches", "1"], ["--adam_eps", "0.1"], ["--algo", "raft"], ["--n", "8"]):
        assert second(*flags) != plain, flags
