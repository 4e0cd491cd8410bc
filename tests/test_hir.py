"""HIR: closed-form values, gradients and optima, hindsight, what each algorithm may learn from."""

import argparse
import itertools
import math
import random

import pytest
import torch

import hir
from hir import (BAD, CHOICES, GOOD, alternatives, ask, chains, gather_entropy, hir_loss, in_words,
                 observe, output_statistics, relabel, sequences_of, toy_done, toy_instructions,
                 toy_review, usable)


def v(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# ------------------------------------------------------------------------------------- the loss


def test_uniform_logits():
    """V = 10: log 10 + log 2 - 0.001 log 10 = 2.993430, with smoothing and both weights on."""
    flat = v(math.log(0.1))
    loss = hir_loss(flat[:, None].expand(1, 2), -flat, vocabulary_logps=flat)
    assert loss.item() == pytest.approx(2.993430, abs=1e-6)


@pytest.mark.parametrize("smoothing, value", [(0.0, 0.126928), (0.2, 0.526928)])
def test_contrast_of_a_gap_of_two(smoothing, value):
    """Mean log-probs 2 apart; the supervised term is taken off."""
    logps = v(-1, -3)[None]
    loss = hir_loss(logps, v(0), 1.0, 0.0, smoothing, v(-5)).item()
    supervised = hir_loss(logps, v(0), 0.0, 0.0, smoothing, v(-5)).item()
    assert loss - supervised == pytest.approx(value, abs=1e-6)
    assert supervised == pytest.approx((1 - smoothing) * 1 + smoothing * 5, abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_ignored_instruction_costs_log_two(smoothing):
    """Equal log-probs under both instructions: log 2, smoothed or not; log C for C of them."""
    for C in (2, 5):
        loss = hir_loss(v(-4).expand(1, C), v(0), 1.0, 0.0, smoothing, v(-4)).item()
        assert loss - 4 == pytest.approx(math.log(C), abs=1e-9)


def test_smoothed_contrast_is_least_at_a_share_of_one_minus_e():
    """At a share of 0.8 the smoothed term is H(0.2) = 0.500402 and its gradient is 0."""
    logps = v(math.log(0.8), math.log(0.2), grad=True)
    contrast = (hir_loss(logps[None], v(0), 1.0, 0.0, 0.2, v(0))
                - hir_loss(logps[None], v(0), 0.0, 0.0, 0.2, v(0)))
    contrast.sum().backward()
    assert contrast.item() == pytest.approx(0.500402, abs=1e-6)
    assert logps.grad.abs().max() < 1e-12


def test_smoothing_is_spread_over_all_alternatives():
    """C = 3 and shares (.5, .3, .2): 0.8 on the first, 0.1 on each of the others."""
    logps = v(0.5, 0.3, 0.2).log()[None]
    loss = hir_loss(logps, v(0), 1.0, 0.0, 0.2, v(0)).item() + 0.8 * math.log(0.5)
    assert loss == pytest.approx(-.8 * math.log(.5) - .1 * math.log(.3) - .1 * math.log(.2))


def test_gradients():
    """-1 from L_sup, -(1 - share) from L_con, and -beta from the entropy, each term on its own."""
    logps, entropy = v(-1, -3, grad=True), v(1.5, grad=True)
    hir_loss(logps[None], entropy, 1.0, 0.001, 0.0).sum().backward()
    share = math.exp(-1) / (math.exp(-1) + math.exp(-3))
    assert logps.grad.tolist() == pytest.approx([-1 - (1 - share), 1 - share])
    assert entropy.grad.item() == pytest.approx(-0.001)
    vocabulary = v(-6, grad=True)
    hir_loss(v(-1)[None], v(1.5), 1.0, 0.001, 0.2, vocabulary).sum().backward()
    assert vocabulary.grad.item() == pytest.approx(-0.2)


def test_one_instruction_alone_has_no_contrast():
    """C = 1 (FARL, Chain of Hindsight): the supervised term, whatever alpha is."""
    assert hir_loss(v(-1)[None], v(0), 7.0, 0.0, 0.2, v(-2)).item() == pytest.approx(1.2)


def test_label_smoothing_needs_the_vocabulary():
    with pytest.raises(ValueError, match="vocabulary_logps"):
        hir_loss(v(-1, -2)[None], v(0))


def test_no_epsilon_inside_the_logarithms():
    """HIR's code adds 1e-8 inside its logs, which stops the gradient where a share is near 0."""
    logps = v(-60, -1, grad=True)
    hir_loss(logps[None], v(0), 1.0, 0.0, 0.0).sum().backward()
    assert logps.grad.tolist() == pytest.approx([-2, 1])


def test_optimum_is_farls_with_contrast_and_entropy_off():
    """A tabular model of four outputs under two instructions, trained on what hindsight makes of a
    sampler's outputs: for "correct" it ends where FARL ends, the correct outputs' distribution.
    """
    sampler, correct = v(0.4, 0.3, 0.2, 0.1), torch.tensor([True, False, True, False])
    ends = {}
    for algo in ("hir", "farl"):
        logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)  # (instruction, output)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logp = logits.log_softmax(1)
            own = torch.where(correct, logp[0], logp[1])  # under the instruction it obeys
            other = torch.where(correct, logp[1], logp[0])
            losses = hir_loss(torch.stack([own, other], 1), v(0, 0, 0, 0), 0.0, 0.0, 0.0)
            weight = sampler if algo == "hir" else sampler * correct
            (weight * losses).sum().backward()
            return (weight * losses).sum()

        optimizer.step(closure)
        ends[algo] = logits.detach().softmax(1)
    for end in ends.values():
        assert torch.allclose(end[0], v(2 / 3, 0, 1 / 3, 0), atol=1e-5)
    assert torch.allclose(ends["hir"][1], v(0, 0.75, 0, 0.25), atol=1e-5)
    assert torch.allclose(ends["farl"][1], v(0.25, 0.25, 0.25, 0.25), atol=1e-6)  # never trained


# ---------------------------------------------------------------------- entropy and vocabulary


@pytest.mark.parametrize("columns", [1, 7, 50, 4096])
def test_entropy_in_chunks(columns, monkeypatch):
    """Value and both gradients equal the naive ones to 1e-10, however the vocabulary is cut."""
    monkeypatch.setattr(hir.GatherLogps, "COLUMNS", columns)
    hidden = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, dtype=torch.float64)
    logp = (hidden @ weight.T).log_softmax(1)
    naive = -(logp.exp() * logp).sum(1)
    ours = gather_entropy(hidden, weight)
    assert torch.allclose(ours, naive, rtol=0, atol=1e-10)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight), upstream),
                    torch.autograd.grad(naive, (hidden, weight), upstream)):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def examples(tokenizer):
    texts = [("Write a short, kind review:", " The cast was superb."),
             ("Write a long, bad review of it:", " The plot was dull. I found the cast weak."),
             ("Hm:", " It was.")]
    return [(tokenizer.encode_prompt(p), tokenizer.encode(r) + [tokenizer.eos_id])
            for p, r in texts]


def test_statistics_are_those_of_the_model(tiny):
    """Mean log-prob, entropy and log-prob over the vocabulary, from the model's own logits."""
    model, tokenizer = tiny
    own = examples(tokenizer)
    with torch.no_grad():
        logps, entropy, vocabulary = output_statistics(model, own + own[::-1], 3)
        for k, (prompt, output) in enumerate(own):
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1:-1]
            naive = logits.log_softmax(1)  # (R, V)
            expected = naive.gather(1, torch.tensor(output)[:, None]).mean()
            assert logps[k].item() == pytest.approx(expected.item(), abs=1e-5)
            assert logps[5 - k].item() == pytest.approx(expected.item(), abs=1e-5)
            h = -(naive.exp() * naive).sum(1).mean()
            assert entropy[k].item() == pytest.approx(h.item(), abs=1e-5)
            assert vocabulary[k].item() == pytest.approx(naive.mean().item(), abs=1e-4)
    assert len(entropy) == len(vocabulary) == 3


def test_pads_do_not_move_any_term(tiny):
    """HIR's code divides by the padded length (offline_trainer.py): here an output's statistics are
    the same alone and in a batch with longer ones."""
    model, tokenizer = tiny
    own = examples(tokenizer)
    with torch.no_grad():
        together = output_statistics(model, own, 3)
        for k, example in enumerate(own):
            alone = output_statistics(model, [example], 1)
            for a, b in zip(together, alone):
                assert a[k].item() == pytest.approx(b[0].item(), abs=1e-5)


def test_gradient_is_the_same_each_time(tiny):
    """Bit for bit, on two threads too: else one seed would not give one result."""
    model, tokenizer = tiny
    own = examples(tokenizer) * 24
    weight, grads = model.get_output_embeddings().weight, []
    for _ in range(6):
        logps, entropy, vocabulary = output_statistics(model, own, len(own))
        loss = hir_loss(logps[:, None], entropy, 1.0, 0.001, 0.2, vocabulary).sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_gradient_of_the_whole_loss_in_the_weights(tiny):
    """Through all three statistics at once, against plain autograd on whole logits."""
    import copy

    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    own = examples(tokenizer)
    sequences = own + [(own[1][0], r) for _, r in own]  # an alternative: another's instruction
    grads = []
    for naive in (False, True):
        if naive:
            rows = []
            for p, r in sequences:
                logp = model(torch.tensor([p + r])).logits[0, len(p) - 1:-1].log_softmax(1)
                rows.append((logp.gather(1, torch.tensor(r)[:, None]).mean(),
                             -(logp.exp() * logp).sum(1).mean(), logp.mean()))
            logps, entropy, vocabulary = (torch.stack(x) for x in zip(*rows))
            entropy, vocabulary = entropy[:3], vocabulary[:3]
        else:
            logps, entropy, vocabulary = output_statistics(model, sequences, 3)
        loss = hir_loss(logps.view(2, 3).T, entropy, 1.0, 0.5, 0.2, vocabulary).sum()
        grads.append(torch.autograd.grad(loss, model.get_output_embeddings().weight)[0])
    assert torch.allclose(*grads, rtol=0, atol=1e-5)  # the vocabulary's mean is taken in float32
    assert grads[0].abs().max() > 0.1


# ------------------------------------------------------------------------------------- hindsight


def test_relabeling_is_idempotent_and_keeps_what_was_followed():
    """For each instruction and each thing that an output can do."""
    everything = [dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())]
    for wanted in (everything[0], everything[-1], {"length": "long"}):
        for done in [*everything, {}]:
            obeyed = relabel(wanted, done)
            assert relabel(obeyed, done) == obeyed
            follows = bool(done) and all(done[key] == wanted[key] for key in wanted)
            assert (obeyed == wanted) == follows
    assert relabel({"answer": "correct"}, {"answer": "wrong"}) == {"answer": "wrong"}


def test_toy_done_names_what_a_review_does():
    done = lambda *values: dict(zip(CHOICES, values))
    assert toy_done(" The plot was dull.") == done("short", "bad", "plot")
    assert toy_done(" I found the cast superb and weak.") == done("short", "fair", "cast")
    assert toy_done(" The music was calm. I found the plot funny.") == done("long", "kind", "music")
    for text in ("", " The plot was dull", " The plot dull.", " The plot was dull. Well.",
                 "The plot was dull.", " I found the plot was dull.", " The sea was calm."):
        assert toy_done(text) == {}, text
    rng = random.Random(0)
    assert all(toy_done(toy_review(rng)) for _ in range(200))


def test_all_instructions_and_the_held_out_ones():
    """48 of them, all worded differently; 8 are never asked; the split is always the same."""
    asked, held_out = toy_instructions(3, False), toy_instructions(3, True)
    assert (len(asked), len(held_out)) == (40, 8)
    assert len({in_words(i) for i in asked + held_out + [{}]}) == 49
    assert toy_instructions(3, True) == held_out
    assert {i["topic"] for i in asked} == set(CHOICES["topic"])
    assert in_words(asked[0] | {"length": "long", "mood": "bad", "topic": "plot"}) == (
        "Write a long, bad review of the plot:")
    assert in_words({"length": "short", "mood": "kind"}) == "Write a short, kind review:"
    assert in_words({"length": "short"}) == "Write a short review:"


def test_alternatives_break_one_requirement():
    """None is obeyed; with --data it is the other of the two; junk is told from what was wanted."""
    rng = random.Random(0)
    obeyed = {"length": "long", "mood": "bad", "topic": "plot"}
    others = alternatives(obeyed, None, CHOICES, 300, rng)
    for other in others:
        changed = [key for key in obeyed if other[key] != obeyed[key]]
        assert len(changed) == 1 and other[changed[0]] in CHOICES[changed[0]]
    assert len({in_words(other) for other in others}) == 1 + 2 + 7
    assert obeyed["topic"] == "plot"  # not changed in place
    choices = {"answer": ["correct", "wrong"]}
    assert alternatives({"answer": "wrong"}, None, choices, 1, rng) == [{"answer": "correct"}]
    assert alternatives({}, obeyed, CHOICES, 2, rng) == [obeyed, obeyed]


def test_relabelled_prompt_differs_only_in_the_instruction():
    """HIR's code swaps instructions by string replacement, with two spellings of one of them; here
    the problem stays, character for character, and one function words the instruction."""
    row = {"prompt": "Generate a correct answer. 1 + 1?", "answer": "2"}
    right, wrong = (ask(row, {"answer": kind}) for kind in ("correct", "wrong"))
    assert right == "Generate a correct answer to this problem.\n" + row["prompt"]
    assert wrong == "Generate a wrong answer to this problem.\n" + row["prompt"]
    chat = {"prompt": [{"role": "system", "content": "Be brief."},
                       {"role": "user", "content": "1 + 1?"}]}
    told = ask(chat, {"answer": "wrong"}, BAD)
    assert told[0] == chat["prompt"][0] and told[1] == {
        "role": "user", "content": "Generate a wrong answer to this problem.\n1 + 1? Bad:"}
    assert chat["prompt"][1]["content"] == "1 + 1?"


def test_judge_matches_exactly_and_only_finished_answers():
    """A substring of the answer is not the answer (HIR's code counts it as one)."""
    row = {"prompt": "Sort:", "answer": "(B) 12"}
    judged = {text: observe(row, text, True)["answer"]
              for text in (" (B) 12\n", "(B) 12", "(B)", "(B) 123", "")}
    assert judged == {" (B) 12\n": "correct", "(B) 12": "correct", "(B)": "wrong",
                      "(B) 123": "wrong", "": "wrong"}
    assert observe(row, "(B) 12", False) == {"answer": "wrong"}
    assert observe({"prompt": ""}, " The plot was dull.", False) == {}


RIGHT, WRONG = {"answer": "correct"}, {"answer": "wrong"}
ONLINE = [(0, RIGHT, WRONG, [1]), (0, RIGHT, RIGHT, [2]), (0, RIGHT, WRONG, [3]),
          (1, RIGHT, RIGHT, [4]), (2, RIGHT, WRONG, [5])]


def test_who_learns_from_what():
    """HIR from all samples, FARL from the successes, CoH from a success beside a failure."""
    assert usable(ONLINE, "hir") == ONLINE
    assert usable(ONLINE, "farl") == [ONLINE[1], ONLINE[3]]
    assert usable(ONLINE, "coh") == chains(ONLINE) == [(0, RIGHT, [1], [2])]
    assert chains(ONLINE + [(0, RIGHT, RIGHT, [6])]) == [(0, RIGHT, [1], [2]), (0, RIGHT, [3], [6])]


def test_what_a_batch_trains_on(tiny):
    """HIR: the sampled ids, under the instruction obeyed and then under the other; FARL: as asked;
    CoH: both outputs in one text, in either order, each after its word."""
    tokenizer = tiny[1]
    rows = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    run = lambda algo, batch, seed=0: sequences_of(
        batch, rows, {"answer": ["correct", "wrong"]}, tokenizer,
        argparse.Namespace(algo=algo, alternatives=1), random.Random(seed))
    words = lambda i, kind, more="": tokenizer.encode_prompt(ask(rows[i], {"answer": kind}, more))
    own, others = run("hir", ONLINE[:2])
    assert own == [(words(0, "wrong"), [1]), (words(0, "correct"), [2])]
    assert others == [[(words(0, "correct"), [1]), (words(0, "wrong"), [2])]]
    assert run("farl", [ONLINE[3]]) == ([(words(1, "correct"), [4])], [])
    orders = [run("coh", chains(ONLINE), seed)[0] for seed in range(8)]
    good, bad = words(0, "correct", GOOD), words(0, "correct", BAD)
    for order in orders:
        assert order in ([(good, [2]), (good + [2] + tokenizer.encode(BAD), [1])],
                         [(bad, [1]), (bad + [1] + tokenizer.encode(GOOD), [2])])
    assert orders[0] != orders[1] or len({str(order) for order in orders}) == 2
