"""What connects the formulas: batches, seeds, flags, optimizer, logged numbers, evaluation.

Each script trains for a few steps from `tiny`. The same steps are derived anew in plain form:
transformers alone, float64, one sequence at a time, Python loops, no code of the scripts.
"""

import contextlib
import copy
import functools
import inspect
import json
import math
import random
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dpo
import hir
import model as helper
import ppo_rlhf
import reward_model
import self_correct
import sft
import simpo
from variants import chain_of_hindsight, grpo, kto, raft, rankings

TOKENIZER = AutoTokenizer.from_pretrained(helper.TINY)
EOS = TOKENIZER.eos_token_id  # also the BOS of tiny
text_ids = functools.partial(TOKENIZER.encode, add_special_tokens=False)
LM = AutoModelForCausalLM.from_pretrained
ADAMW = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)
REWARD = functools.partial(AutoModelForSequenceClassification.from_pretrained, num_labels=1)
PARENT = {kto: dpo, rankings: simpo, raft: ppo_rlhf, grpo: ppo_rlhf, chain_of_hindsight: hir}
# What `evaluate` returns where a test does not look at it.
NOTHING = {"after": {}}, []

# Texts that stand for samples: true reward, whether they are reviews, what they do.
REVIEWS = {" The plot was awful and long.": (-1, True, {"length": "short", "mood": "bad"}),
           " I found the music wonderful.": (1, True, {"length": "short", "mood": "kind"}),
           " The cast was superb and funny. The story was dull.":
               (1, True, {"length": "long", "mood": "kind"}),
           " amazing amazing amazing": (3, False, {}),
           " The plot was plain.": (0, True, {"length": "short", "mood": "fair"}),
           " The pace was slow": (0, False, {})}  # the only one without EOS, see `ids_of`
BAD, KIND, MIXED, HACK, FAIR, CUT = REVIEWS
# Reviews of plot, music and cast, and which of their phrases are right.
DRAFTS = {" superb plot, dull music, dull cast.": [1, 0, 0], " dull plot.": [0, 0, 0],
          " superb plot, funny music, dull cast.": [1, 1, 0],
          " superb plot, funny music, moving cast.": [1, 1, 1],
          " superb plot, funny music, moving cast, big.": [1, 1, 1, 0]}
FEEDBACK, NO_YES = "Spoken: {}.", ("not", "well")  # what the corrector is told about them
PROMPTS = ["I saw the film.", "We watched the play yesterday.", "My sister saw the opera.",
           "Two friends watched the musical in London.", "Our class saw the series."]
PAIRS = [{"prompt": PROMPTS[i], "chosen": chosen, "rejected": rejected} for i, (chosen, rejected)
         in enumerate([(KIND, BAD), (MIXED, FAIR), (MIXED * 3, BAD + FAIR), (HACK, BAD),
                       (KIND + MIXED, FAIR)])]
LABELS = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
          for row in PAIRS for side in ("chosen", "rejected")]
RANKINGS = [{"prompt": PROMPTS[i], "responses": texts, "ranks": ranks} for i, (texts, ranks)
            in enumerate([([BAD, KIND, FAIR], [3, 1, 2]), ([MIXED, FAIR, HACK, BAD], [2, 2, 1, 5]),
                          ([BAD + FAIR, MIXED * 2], [2, 1]), ([FAIR, KIND, MIXED], [3, 1, 1]),
                          ([HACK, BAD, KIND], [2, 3, 1])])]
FILES = {  # three rows are left out: no room for a sample, equal responses, only ties
    "pairs": [{"prompt": PROMPTS[0] * 5, "chosen": KIND, "rejected": BAD},
              {"prompt": PROMPTS[1], "chosen": KIND, "rejected": KIND}, *PAIRS],
    "rankings": [{"prompt": PROMPTS[0], "responses": [KIND, BAD], "ranks": [1, 1]}, *RANKINGS],
    "labels": LABELS, "demonstrations": LABELS[::2], "texts": [{"text": text} for text in REVIEWS],
    "answers": [{"prompt": prompt, "answer": KIND} for prompt in PROMPTS]}
ASKED = [{"length": "short", "mood": "kind"}, {"length": "short", "mood": "bad"}]
MOODS = {"length": ["short", "long"], "mood": ["kind", "fair", "bad"]}
PROBLEMS = [{"prompt": f"{day}: plot, music, cast.", "topics": ("plot", "music", "cast")}
            for day in ("Today", "Tomorrow", "On Sunday", "On Monday")]


@pytest.fixture(autouse=True, scope="module")
def world(tmp_path_factory):
    """The working folder: FILES, "reference" (tiny, moved a little), "reward" (a random head)."""
    folder = tmp_path_factory.mktemp("world")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, kind in (("reference", LM), ("reward", REWARD)):
        torch.manual_seed(1)
        model = kind(helper.TINY, dtype=torch.float32)
        for weight in model.parameters():
            weight.data += 0.01 * torch.randn(weight.shape)
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


# ----------------------------------------------------------------------- training in plain form


def plain(name="tiny", kind=LM):
    """A model in float64, through transformers alone."""
    return kind(helper.TINY if name == "tiny" else name, dtype=torch.float64).eval()


def ids_of(text):
    """The tokens of a sampled response."""
    return text_ids(text) + [EOS] * (text != CUT)


def encode(prompt, response="", longest=512):
    """(prompt ids, response ids with EOS); what is longer is cut."""
    prompt = [EOS] + text_ids(prompt)
    return prompt, (text_ids(response) + [EOS])[:longest - len(prompt)]


def token_logps(model, sequence):
    """Log-prob of each response token, from the logits at the position before it: (R,)."""
    prompt, response = sequence
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def token_values(model, sequence):
    """The value of the state before each response token, and of the last state: (R + 1,)."""
    prompt, response = sequence
    states = model.transformer(torch.tensor([prompt + response])).last_hidden_state[0]
    return model.score(states[len(prompt) - 1:])[:, 0]


def number(x):
    return float(torch.as_tensor(x).detach())


def means(rows):
    """Each number averaged over the rows that have it."""
    names = {name for row in rows for name in row}
    return {name: fmean(number(row[name]) for row in rows if name in row) for name in names}


def split(rows):
    """The rows to learn from: those of one prompt, drawn with seed 0, are held out."""
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(0).shuffle(prompts)
    return [row for row in rows if json.dumps(row["prompt"]) != prompts[0]]


def clip(model, longest):
    """Shorten the gradient to `longest`; return its norm before."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = math.sqrt(sum(float((gradient ** 2).sum()) for gradient in gradients))
    for gradient in gradients:
        gradient *= min(1, longest / norm)
    return norm


def batches(rows, a):
    """The batches of two epochs. Each epoch visits all rows in an order that its seed gives."""
    result = []
    for _ in range(2):
        order = random.Random(f"{a.seed} {len(result)}").sample(rows, len(rows))
        result += [order[i:i + a.batch_size] for i in range(0, len(order), a.batch_size)]
    return result[:getattr(a, "steps", None)]


def learn(a, model, plan, lesson, eps=1e-8):
    """(lines of metrics.jsonl, model). lesson(batch) gives the loss and other numbers of each row.
    Below 20 steps the warm-up is one step."""
    optimizer, expected = ADAMW(model.parameters(), eps=eps), []
    for step, batch in enumerate(plan):
        rows = list(lesson(batch))
        optimizer.zero_grad()
        (sum(row["loss"] for row in rows) / len(rows)).backward()
        lr = optimizer.param_groups[0]["lr"] = a.lr * (len(plan) - step) / len(plan)
        norm = clip(model, 1.0)
        expected.append({"step": step + 1, "lr": lr, "grad_norm": norm} | means(rows))
        optimizer.step()
    return expected, model


def add_adapters(model, rank):
    """LoRA: layer(x) + 16/rank B A x, where A is drawn with seed 0 and B is 0."""
    model.requires_grad_(False)
    torch.manual_seed(0)
    for layer in [layer for layer in model.modules() if type(layer).__name__ == "Conv1D"]:
        width, out = layer.weight.shape
        layer.A = torch.nn.Parameter((torch.randn(rank, width) * width ** -0.5).double())
        layer.B = torch.nn.Parameter(torch.zeros(out, rank).double())
        layer.register_forward_hook(
            lambda layer, x, h: h + 16 / rank * x[0] @ layer.A.T @ layer.B.T)


# ------------------------------------------------------------------- each script, derived anew


def pair_loss(a, w, l, n_w, n_l, h):
    """The losses of dpo.py and simpo.py for one pair; h compares log pi/pi_ref of the two."""
    if a.loss == "dpo":
        e = a.label_smoothing
        return -(1 - e) * F.logsigmoid(a.beta * h) - e * F.logsigmoid(-a.beta * h)
    if a.loss == "ipo":
        return (h - 1 / (2 * a.beta)) ** 2
    if a.loss == "rdpo":
        return -F.logsigmoid(a.beta * h + a.alpha * (n_w - n_l))
    if a.loss == "simpo":
        return -F.logsigmoid(a.beta * (w / n_w - l / n_l) - a.gamma_beta_ratio * a.beta)
    if a.loss == "cpo":
        return -F.logsigmoid(a.beta * (w - l)) - a.lam * w
    if a.loss == "slic":
        return torch.relu(a.delta - w + l) - a.lam * w
    p_w, p_l = torch.exp(w / n_w), torch.exp(l / n_l)
    return -w / n_w - a.lam * F.logsigmoid(torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l)))


def learn_pairs(a, calls):
    """dpo.py and simpo.py."""
    model, reference = plain(), plain()
    if hasattr(a, "lora_rank"):
        add_adapters(model, a.lora_rank)

    def lesson(batch):
        for row in batch:
            pair = [encode(row["prompt"], row[key], a.max_length) for key in ("chosen", "rejected")]
            w, l = [token_logps(model, sequence).sum() for sequence in pair]
            old_w, old_l = [token_logps(reference, sequence).sum().detach() for sequence in pair]
            n_w, n_l = [len(response) for _, response in pair]
            numbers = {"loss": pair_loss(a, w, l, n_w, n_l, (w - old_w) - (l - old_l)),
                       "rewards/chosen": w, "rewards/rejected": l}
            if a.loss in ("simpo", "orpo"):
                numbers |= {"rewards/chosen": w / n_w, "rewards/rejected": l / n_l}
            if a.loss in ("dpo", "ipo", "rdpo"):
                numbers |= {"logps/chosen": w, "rewards/chosen": a.beta * (w - old_w),
                            "logps/rejected": l, "rewards/rejected": a.beta * (l - old_l)}
            margin = numbers["rewards/chosen"] - numbers["rewards/rejected"]
            yield numbers | {"rewards/accuracy": margin > 1e-4}  # ties count as wrong

    eps = a.adam_eps if a.loss in ("dpo", "ipo", "rdpo") else 1e-8
    return learn(a, model, batches(split(PAIRS), a), lesson, eps)


def learn_labels(a, calls):
    """variants/kto.py. z is estimated with responses to other prompts, which are drawn once."""
    model, reference, rng = plain(), plain(), random.Random(a.seed)
    examples = copy.deepcopy(split(LABELS))
    for row in examples:
        other = row
        while other["prompt"] == row["prompt"]:
            other = rng.choice(LABELS)
        row["other"] = other["completion"]

    def log_ratio(row, key):
        sequence = encode(row["prompt"], row[key], a.max_length)
        logp = token_logps(model, sequence).sum()
        return logp, logp - token_logps(reference, sequence).sum().detach()

    def lesson(batch):
        z = max(0, fmean(number(log_ratio(row, "other")[1]) for row in batch))
        for row in batch:
            logp, r = log_ratio(row, "completion")
            loss, side = a.lambda_desirable * torch.sigmoid(a.beta * (z - r)), "chosen"
            if not row["label"]:
                loss, side = a.lambda_undesirable * torch.sigmoid(a.beta * (r - z)), "rejected"
            yield {"loss": loss, "kl/mismatched": z, f"logps/{side}": logp,
                   f"rewards/{side}": a.beta * r}

    return learn(a, model, batches(examples, a), lesson, a.adam_eps)


def learn_rankings(a, calls):
    """variants/rankings.py. A response's score is the number of ranks below its own."""
    model = plain()

    def lesson(batch):
        for row in batch:
            ranked, places = sorted(zip(row["ranks"], row["responses"])), sorted(set(row["ranks"]))
            r = [-places.index(rank) for rank, _ in ranked]
            logps = [token_logps(model, encode(row["prompt"], text, a.max_length))
                     for _, text in ranked]
            p = [x.mean() for x in logps]
            loss = -getattr(a, "lam", 0.05 * (len(r) - 1) ** 2) * logps[0].sum()
            for k in range(len(r)):
                worse = [i for i in range(len(r)) if r[i] < r[k]]
                if a.loss == "rrhf":
                    loss = loss + sum(torch.relu(p[i] - p[k]) for i in worse)
                elif worse:
                    own = torch.exp(p[k] * max(r[k] - r[i] for i in worse))
                    others = sum(torch.exp(p[i] * (r[k] - r[i])) for i in worse)
                    loss = loss - torch.log(own / (own + others))
            yield {"loss": loss, "rewards/chosen": p[0], "rewards/rejected": p[-1],
                   "rewards/accuracy": p[0] > p[-1]}

    return learn(a, model, batches(split(RANKINGS), a), lesson)


def learn_rewards(a, calls):
    """reward_model.py. Only a ranking with one best response tells best_of_k anything."""
    model = plain(a.model, REWARD)

    def lesson(batch):
        for row in batch:
            r = torch.stack([token_values(model, encode(row["prompt"], text, a.max_length))[-1]
                             for text in row["responses"]])
            pairs = [(i, j) for i, rank in enumerate(row["ranks"])
                     for j, other in enumerate(row["ranks"]) if rank < other]
            loss = -sum(F.logsigmoid(r[i] - r[j]) for i, j in pairs) / math.comb(len(r), 2)
            yield {"loss": loss if a.loss == "ranking"
                   else -r.log_softmax(0)[row["ranks"].index(1)]}

    usable = [row for row in RANKINGS if a.loss == "ranking" or row["ranks"].count(1) == 1]
    return learn(a, model, batches(split(usable), a), lesson)


def learn_demonstrations(a, calls):
    """sft.py: the mean over the tokens of a batch."""
    model = plain()

    def lesson(batch):
        logps = [token_logps(model, encode(row["prompt"], row["completion"], a.max_length))
                 for row in batch]
        yield {"loss": -torch.cat(logps).mean()}

    return learn(a, model, batches(split(LABELS[::2]), a), lesson)


def probe(model):
    """One weight, which tells models apart."""
    return number(model.get_input_embeddings().weight[EOS, 0])


def asked_for(call, model, prompts, seed):
    """Check what `sample` was called with; the prompts are texts."""
    assert call.probe == pytest.approx(probe(model), abs=1e-4)
    assert (call.prompts, call.seed) == ([encode(prompt)[0] for prompt in prompts], seed)


def judge_of(a, prompts, call):
    """The score of a prompt and a text, brought to mean 0 and SD 1 on samples of the reference."""
    model = plain(a.reward_model, REWARD)

    @functools.cache
    def score(prompt, text):
        return number(token_values(model, encode(prompt, text))[-1])

    asked = random.Random(a.seed).choices(prompts, k=256)
    asked_for(call, plain(a.reference), asked, a.seed)
    drawn = [score(prompt, text) for prompt, text in zip(asked, call.texts) if text != CUT]
    return lambda prompt, text: (score(prompt, text) - fmean(drawn)) / pstdev(drawn)


def estimate_advantages(a, beta, scores, ratios, values):
    """Whitened advantages, and returns from those that are not whitened: lists of (R,)."""
    advantages = []
    for score, ratio, v in zip(scores, ratios, values):
        rewards = -beta * ratio
        rewards[-1] += score
        deltas = rewards + torch.cat([v[1:], torch.zeros(1)]) - v
        advantages.append(torch.stack([sum(a.lam ** k * delta for k, delta in enumerate(deltas[t:]))
                                       for t in range(len(v))]))
    flat = torch.cat(advantages)
    white = [(x - flat.mean()) / torch.sqrt(flat.var(correction=0) + 1e-8) for x in advantages]
    return white, [x + v for x, v in zip(advantages, values)]


def compare(a, scores, ratios):
    """The advantage of each response among the n of its prompt."""
    if a.kl == "reward":
        scores = [score - a.beta * number(ratio.sum()) for score, ratio in zip(scores, ratios)]
    advantages = []
    for i, score in enumerate(scores):
        start = i - i % a.n
        group = scores[start:start + a.n]
        others = group[:i - start] + group[i - start + 1:]
        advantages.append({"centered": score - fmean(group), "leave_one_out": score - fmean(others),
                           "group": (score - fmean(group)) / (pstdev(group) + 1e-4)}[a.advantage])
    return advantages


def grpo_terms(a, new, old, reference, A, mean_length):
    """The loss of one response."""
    q, u = torch.exp(new - old), reference - new
    k3 = torch.exp(u) - 1 - u
    penalty = {"loss": k3, "corrected": q * k3}.get(a.kl, 0 * k3)
    length = {"length": len(new), "tokens": mean_length, "constant": a.max_new_tokens}[a.divisor]
    return (a.beta * penalty - torch.minimum(q * A, q.clamp(0.8, 1.2) * A)).sum() / length


def learn_rollouts(a, calls):
    """ppo_rlhf.py; variants/grpo.py where there is a --divisor; else variants/raft.py."""
    policy, reference, value, expected = plain(), plain(a.reference), plain("tiny", REWARD), []
    prompts = [row["prompt"] for row in split([{"prompt": prompt} for prompt in PROMPTS])]
    value.score.weight.data.zero_()
    calls, ppo, groups, beta = iter(calls), hasattr(a, "lam"), hasattr(a, "divisor"), a.beta
    judge, ptx = lambda prompt, text: REVIEWS[text][0], [encode("", text) for text in REVIEWS]
    if hasattr(a, "reward_model"):
        judge = judge_of(a, prompts, next(calls))
    elif hasattr(a, "data"):  # the answer of all rows of answers.jsonl
        judge = lambda prompt, text: float(text == KIND)
    optimizer = ADAMW([*policy.parameters(), *value.parameters()], eps=1e-5)
    for step in range(a.steps):
        # The rollout.
        rng, call = random.Random(f"{a.seed} {step}"), next(calls)
        drawn = rng.choices(prompts, k=a.batch_size // a.n)
        asked = [prompt for prompt in drawn for _ in range(a.n)]
        asked_for(call, policy, asked, rng.getrandbits(62))
        assert call.count == a.max_new_tokens
        sequences = [(ids, ids_of(text)) for ids, text in zip(call.prompts, call.texts)]
        scores = [a.missing_eos_score if text == CUT else judge(prompt, text)
                  for prompt, text in zip(asked, call.texts)]
        old = [token_logps(policy, sequence).detach() for sequence in sequences]
        ratios = [x - token_logps(reference, sequence).detach()
                  for x, sequence in zip(old, sequences)]
        rows = [{"scores/mean": score, "samples/without_eos": text == CUT, "samples/tokens": len(r),
                 "kl/policy_reference": r.sum(), "kl/k3": (torch.exp(-r) - 1 + r).sum()}
                for score, text, r in zip(scores, call.texts, ratios)]
        if not hasattr(a, "data"):
            for row, text in zip(rows, call.texts):
                row["samples/true_reward"], row["samples/grammatical"] = REVIEWS[text][:2]
        indices = range(a.batch_size)
        line = means(rows) | {
            "step": step + 1, "lr": a.lr * (a.steps - step) / a.steps,
            "scores/std_per_prompt": fmean(pstdev(scores[i:i + a.n]) for i in indices[::a.n]),
            "policy/entropy": -number(torch.cat(old).mean())}
        if ppo:
            values = [token_values(value, sequence)[:-1].detach() for sequence in sequences]
            advantages, returns = estimate_advantages(a, beta, scores, ratios, values)
            unexplained = (torch.cat(returns) - torch.cat(values)).var() / torch.cat(returns).var()
            line |= {"kl/beta": beta, "value/explained_variance": 1 - number(unexplained)}
            orders = [rng.sample(indices, a.batch_size) for _ in range(a.ppo_epochs)]
            half = a.batch_size // 2
            minibatches = [part for order in orders for part in (order[:half], order[half:])]
        elif groups:
            advantages, mean_length = compare(a, scores, ratios), fmean(map(len, ratios))
            spreads = [pstdev(scores[i:i + a.n]) for i in indices[::a.n]]
            line["scores/equal"] = spreads.count(0) / len(spreads)
            orders = [rng.sample(indices, a.batch_size) for _ in range(a.ppo_epochs)]
            minibatches = [part for order in orders for part in (order[::2], order[1::2])]
        else:
            best = [max(indices[i:i + a.n], key=scores.__getitem__) for i in indices[::a.n]]
            orders = [rng.sample(best, len(best)) for _ in range(a.epochs)]
            minibatches = [part for order in orders for part in (order[::2], order[1::2])]
        # The updates.
        optimizer.param_groups[0]["lr"], seen = line["lr"], []
        for minibatch in minibatches:
            new = torch.cat([token_logps(policy, sequences[b]) for b in minibatch])
            numbers = {"policy/loss": -new.mean()}
            if groups:
                own = dict(zip(minibatch, new.split([len(old[b]) for b in minibatch])))
                numbers["policy/loss"] = sum(
                    grpo_terms(a, own[b], old[b], old[b] - ratios[b], advantages[b], mean_length)
                    for b in minibatch) / len(minibatch)
            if ppo:
                before, A, R, v = (torch.cat([x[b] for b in minibatch])
                                   for x in (old, advantages, returns, values))
                q = torch.exp(new - before)
                gain = torch.minimum(q * A, q.clamp(0.8, 1.2) * A)
                now = torch.cat([token_values(value, sequences[b])[:-1] for b in minibatch])
                near = v + (now - v).clamp(-0.2, 0.2)
                error = torch.maximum((now - R) ** 2, (near - R) ** 2)
                texts = [token_logps(policy, text) for text in rng.choices(ptx, k=len(minibatch))]
                numbers = {"policy/loss": -gain.mean(), "value/loss": error.mean() / 2,
                           "ptx/loss": -torch.cat(texts).mean(),
                           "policy/clip_fraction": ((q - 1).abs() > 0.2).double().mean()}
            optimizer.zero_grad()
            (numbers["policy/loss"] + numbers.get("value/loss", 0)
             + getattr(a, "ptx_coef", 0) * numbers.get("ptx/loss", 0)).backward()
            numbers["policy/grad_norm"] = clip(policy, 1.0)
            if ppo:
                numbers["value/grad_norm"] = clip(value, 1.0)
            seen.append(numbers)
            optimizer.step()
        expected.append(line | means(seen))
        if hasattr(a, "kl_target"):
            beta *= 1 + 0.1 * max(-0.2, min(0.2, line["kl/policy_reference"] / a.kl_target - 1))
    return expected, policy


def words(instruction):
    asked = "Write a {length}, {mood} review:" if instruction else "Write no review:"
    return asked.format(**instruction)


def chained(online, size, rng):
    """The examples of variants/chain_of_hindsight.py, and a batch of them: Bad and Good outputs."""
    examples, batch = [], []
    for wanted in dict.fromkeys(words(wanted) for wanted, _ in online):
        texts = [text for asked, text in online if words(asked) == wanted]
        good = [text for text in texts if words(REVIEWS[text][2]) == wanted]
        bad = [text for text in texts if text not in good]
        examples += [(wanted, bad[i % len(bad)], text) for i, text in enumerate(good) if bad]
    for wanted, bad, good in rng.choices(examples, k=size):
        (word, first), (other, second) = rng.sample([(" Bad:", bad), (" Good:", good)], 2)
        start = encode(wanted)[0] + text_ids(word)
        batch.append([(start, ids_of(first))])
        batch.append([(start + ids_of(first) + text_ids(other), ids_of(second))])
    return examples, batch


def relabeled(online, size, rng, others):
    """A batch of hir.py: each output under the instruction it obeys, and under others."""
    batch = []
    for wanted, text in rng.choices(online, k=size):
        done, instructions = REVIEWS[text][2], [REVIEWS[text][2]]
        for _ in range(others):
            instructions.append(wanted)
            if done:
                key = rng.choice(list(done))
                wrong = rng.choice([value for value in MOODS[key] if value != done[key]])
                instructions[-1] = done | {key: wrong}
        batch.append([(encode(words(x))[0], ids_of(text)) for x in instructions])
    return batch


def learn_hindsight(a, calls):
    """hir.py, and variants/chain_of_hindsight.py where there is no --algo."""
    model, online, calls = plain(), [], iter(calls)
    algo = getattr(a, "algo", "chain")
    alpha, beta, others = (a.alpha, a.beta, a.alternatives) if algo == "hir" else (0, 0, 0)
    K, count = math.ceil(a.updates_per_round * a.rounds), a.rounds * a.batch_size
    e = a.label_smoothing

    def lesson(step):
        if step % K == 0:
            rng, call = random.Random(f"{a.seed} episode {step}"), next(calls)
            wanted = rng.choices(ASKED, k=count)
            hint = text_ids(" Good:") if algo == "chain" else []
            assert all(ids[len(ids) - len(hint):] == hint for ids in call.prompts)
            call.prompts = [ids[:len(ids) - len(hint)] for ids in call.prompts]
            asked_for(call, model, map(words, wanted), rng.getrandbits(62))
            online.extend(zip(wanted, call.texts))
        rng = random.Random(f"{a.seed} {step}")
        followed = [REVIEWS[text][2] == wanted for wanted, text in online]
        examples = [x for x, ok in zip(online, followed) if ok or algo == "hir"]
        if algo == "chain":
            examples, batch = chained(online, a.batch_size, rng)
        else:
            batch = relabeled(examples, a.batch_size, rng, others)
        for group in batch:
            p = torch.stack([token_logps(model, sequence).mean() for sequence in group])  # (C,)
            prompt, response = group[0]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            logps = logits.log_softmax(1)  # (R, V)
            entropy = -(logps.exp() * logps).sum(1).mean()
            loss = -(1 - e) * p[0] - e * logps.mean() - beta * entropy
            if others:
                share = torch.log(p.exp() / p.exp().sum())
                loss = loss - alpha * ((1 - e) * share[0] + e * share[1:].mean())
            numbers = {"logps/outputs": p[0]} if algo == "chain" else {
                "logps/obeyed": p[0], "contrast/accuracy": (p[0] > p[1:]).all()}
            yield numbers | {"loss": loss, "entropy": entropy, "online/used": len(examples) /
                             len(online), "online/followed": fmean(followed[-count:])}

    return learn(a, model, range(a.episodes * K), lesson)


def edit_distance(x, y):
    if not x or not y:
        return len(x) + len(y)
    return min(edit_distance(x[1:], y) + 1, edit_distance(x, y[1:]) + 1,
               edit_distance(x[1:], y[1:]) + (x[0] != y[0]))


def learn_corrections(a, calls):
    """self_correct.py: three problems to learn from, and one held out."""
    model, pools, calls = plain(), [[], [], []], iter(calls)
    K = math.ceil(a.epochs * 3 / a.batch_size)

    def prompt_of(text):
        told = FEEDBACK.format(", ".join(NO_YES[right] for right in DRAFTS[text]))
        return f"Draft:{text}\n{told if a.feedback == 'text' else ''}\nBetter:"

    def odds(draft, better):
        x, y = draft.split(), better.split()
        near = 1 - edit_distance(x, y) / max(len(x), len(y))
        return math.exp(a.alpha * (fmean(DRAFTS[better]) - fmean(DRAFTS[draft])) + a.beta * near)

    def lesson(step):
        if step % K == 0:
            rng, call = random.Random(f"{a.seed} exploration {step}"), next(calls)
            if step == 0:
                asked = [row["prompt"] for row in PROBLEMS[:3] * a.pool + PROBLEMS[3:]]
                asked_for(call, plain(a.generator), asked, a.seed)
            else:
                asked = [prompt_of(rng.choice(pool)) for pool in pools * a.explore]
                asked_for(call, model, asked, rng.getrandbits(62))
            for i, text in enumerate(call.texts[:len(asked) // 3 * 3]):
                if text not in pools[i % 3]:
                    pools[i % 3].append(text)
        lessons = []
        for pool in pools:
            pairs, chances = [], []
            for draft in pool:
                better = [text for text in pool if fmean(DRAFTS[text]) > fmean(DRAFTS[draft])]
                Z = sum(odds(draft, text) for text in better)
                pairs += [(draft, text) for text in better]
                chances += [odds(draft, text) / Z for text in better]
            lessons += [(pairs, chances)] if pairs else []
        rng = random.Random(f"{a.seed} {step}")
        batch = [rng.choices(*pairs)[0] for pairs in rng.choices(lessons, k=a.batch_size)]
        logps = [token_logps(model, encode(prompt_of(draft), better)) for draft, better in batch]
        values = [fmean(DRAFTS[text]) for pool in pools for text in pool]
        yield {"loss": -torch.cat(logps).mean(), "pool/value": fmean(values)}

    return learn(a, model, range(a.rounds * K), lesson)


# --------------------------------------------------------------------------- two steps of each

# A batch is two parts or more, of one row or more: by --max_tokens, which changes no result.
COMMON = dict(lr=2e-3, batch_size=3, max_tokens=160, seed=3, max_new_tokens=12)
PAIR = dict(COMMON, data="pairs.jsonl", epochs=2, max_length=32, adam_eps=1e-3)
RANK = dict(PAIR, data="rankings.jsonl")
ROLL = dict(COMMON, n=2, batch_size=6, steps=2, ppo_epochs=2,
            missing_eos_score=-2.5, beta=0.3, reference="reference")
GROUPS = dict(ROLL, n=3)
PPO = dict(ROLL, lam=0.6, ptx_data="texts.jsonl", ptx_coef=0.3)
HIR = dict(COMMON, seed=11, batch_size=2, episodes=2, rounds=2, updates_per_round=0.6, warm_up=0,
           requirements=2, temperature=0.7, label_smoothing=0.1)
FIX = dict(COMMON, batch_size=6, alpha=0.5, beta=6.0, rounds=2, epochs=3.5, warm_up=0)
CASES = {
    "dpo": (dpo, learn_pairs, dict(PAIR, beta=0.3, label_smoothing=0.0)),
    "cdpo": (dpo, learn_pairs, dict(PAIR, beta=0.2, label_smoothing=0.3)),
    "ipo": (dpo, learn_pairs, dict(PAIR, beta=0.2, lora_rank=2)),
    "rdpo": (dpo, learn_pairs, dict(PAIR, beta=0.2, alpha=0.1)),
    "kto": (kto, learn_labels, dict(PAIR, beta=0.3, lambda_desirable=1.3, lambda_undesirable=0.6,
                                    max_tokens=64)),
    "kto_labels": (kto, learn_labels, dict(PAIR, beta=0.2, data="labels.jsonl", max_tokens=64,
                                           lambda_desirable=0.7, lambda_undesirable=2.0)),
    "simpo": (simpo, learn_pairs, dict(PAIR, beta=3.0, gamma_beta_ratio=0.3)),
    "cpo": (simpo, learn_pairs, dict(PAIR, beta=0.05, lam=0.5)),
    "orpo": (simpo, learn_pairs, dict(PAIR, lam=0.7, steps=3)),
    "slic": (simpo, learn_pairs, dict(PAIR, delta=9.0, lam=0.2, lora_rank=2)),
    "rrhf": (rankings, learn_rankings, dict(RANK, lam=0.3)),
    "pro": (rankings, learn_rankings, RANK),
    "ranking": (reward_model, learn_rewards, dict(RANK, model="reward")),
    "best_of_k": (reward_model, learn_rewards, dict(RANK, model="reward")),
    "sft": (sft, learn_demonstrations, dict(PAIR, data="demonstrations.jsonl",
                                             max_tokens=64)),
    "ppo": (ppo_rlhf, learn_rollouts, dict(PPO, kl_target=0.5, steps=3, max_tokens=48)),
    "judged": (ppo_rlhf, learn_rollouts, dict(
        PPO, reward_model="reward", ppo_epochs=1, data="answers.jsonl")),
    "raft": (raft, learn_rollouts, dict(ROLL, epochs=2, max_tokens=20)),
    "grpo": (grpo, learn_rollouts, dict(GROUPS, advantage="group", divisor="length", kl="loss")),
    "dr_grpo": (grpo, learn_rollouts, dict(
        GROUPS, advantage="centered", divisor="constant", kl="corrected", lr=2e-4)),
    "rloo": (grpo, learn_rollouts, dict(
        GROUPS, advantage="leave_one_out", divisor="constant", kl="reward", max_tokens=40)),
    "verified": (grpo, learn_rollouts, dict(
        GROUPS, advantage="group", divisor="tokens", kl="none", data="answers.jsonl")),
    "hir": (hir, learn_hindsight, dict(HIR, alpha=0.7, beta=0.05, alternatives=2)),
    "farl": (hir, learn_hindsight, dict(HIR, alpha=0.7, beta=0.05)),
    "chain": (chain_of_hindsight, learn_hindsight, HIR),
    "self_correct": (self_correct, learn_corrections, dict(
        FIX, pool=2, explore=2, feedback="text", generator="reference")),
    "no_feedback": (self_correct, learn_corrections, dict(
        FIX, pool=3, explore=1, feedback="none", generator="tiny"))}


def run(script, flags, out, **stubs):
    """Run a script with stubs in it and in its parent: (lines of metrics.jsonl, saved weights)."""
    known = script.parse_args([])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helper.Run, "report", lambda *_, **__: None)
        for module in (script, PARENT.get(script, script)):
            for name in stubs.keys() & vars(module).keys():
                patch.setattr(module, name, stubs[name])
        script.main([f"--{name}={value}" for name, value in flags.items() if name in known]
                    + [f"--out={out}"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_a_plain_derivation(case, tmp_path, float64):
    """All logged numbers and the new weights, with the flags off their defaults."""
    script, derive, flags = CASES[case]
    choice = "dpo" if case in ("cdpo", "kto", "kto_labels") else case  # of --loss or --algo
    calls, problems = [], copy.deepcopy(PROBLEMS)
    texts = list(DRAFTS if script is self_correct else REVIEWS)

    def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, **_):
        drawn = [texts[(i + i // len(texts) + len(calls)) % len(texts)]
                 for i in range(len(prompts))]
        calls.append(SimpleNamespace(prompts=prompts, count=max_new_tokens, seed=seed, texts=drawn,
                                     temperature=temperature, probe=probe(model)))
        return [ids_of(text) for text in drawn]

    flags = dict({"loss": choice, "algo": choice, "model": "tiny"}, **flags)
    rows, weights = run(
        script, flags, tmp_path, sample=sample, toy_prompts=lambda *_: PROMPTS,
        evaluate=lambda *_: NOTHING,
        toy_problems=lambda count: (problems[:3], problems[3:]),
        toy_instructions=lambda _, held_out: [dict(ASKED[0], length="long")] if held_out else ASKED)
    expected, model = derive(SimpleNamespace(**flags), calls)
    assert all(call.temperature == flags.get("temperature", 1) for call in calls)
    assert len(rows) == len(expected)
    for row, numbers in zip(rows, expected):
        assert row == pytest.approx(numbers, rel=1e-5, abs=5e-6)  # some are logged in fp32
    for layer in [layer for layer in model.modules() if hasattr(layer, "A")]:
        layer.weight.data += 16 / len(layer.A) * (layer.B @ layer.A).T
    for name, weight in weights.items():  # lr is 2e-3
        assert torch.allclose(weight, model.state_dict()[name], rtol=1e-5, atol=1e-6), name


# ----------------------------------------------------------------- seeds, and held-out prompts

BRIEF = dict(batch_size=8, max_new_tokens=16, samples=12, steps=2, pairs=16, rankings=16, n=1,
             examples=16, problems=8, ppo_epochs=1, warm_up=1, requirements=2, episodes=2)
HALF = dict(rounds=4, epochs=0.5, updates_per_round=0.5)
RUNS = {
    "dpo": (dpo, {}), "kto": (kto, {}), "simpo": (simpo, {}), "rankings": (rankings, {}),
    "reward_model": (reward_model, {}), "ppo": (ppo_rlhf, {}), "raft": (raft, {}),
    "grpo": (grpo, {"n": 2}), "hir": (hir, HALF), "chain": (chain_of_hindsight, HALF),
    "self_correct": (self_correct, HALF), "sft": (sft, {}),
    "own pairs": (dpo, {"data": "pairs.jsonl"}),
    "own texts": (sft, {"data": "demonstrations.jsonl"}),
    "own rankings": (reward_model, {"data": "rankings.jsonl"}),
    "own prompts": (ppo_rlhf, {"data": "answers.jsonl", "reward_model": "reward"}),
    "own checks": (grpo, {"data": "answers.jsonl", "n": 2}),
    "own problems": (hir, dict(HALF, data="answers.jsonl")),
    "own answers": (self_correct, dict(HALF, data="answers.jsonl"))}


def observed(script, flags, out, evaluated=True):
    """Run a script: (prompts trained on, prompts evaluated on, seeds of rollouts, weights)."""
    prompts, seeds, inside = (set(), set()), [], [0]  # inside[0]: whether evaluation runs
    parent = PARENT.get(script, script)
    evaluate, split_batch = parent.evaluate, parent.split_batch
    prompt_of, output_statistics = self_correct.prompt_of, hir.output_statistics

    def watched_evaluate(*args):
        if not evaluated:
            return NOTHING
        if parent is hir:  # it also asks for what training asked for
            args[3].pop("all", None)
        inside[0] = 1
        result = evaluate(*args)
        inside[0] = 0
        return result

    def watched_statistics(model, sequences):
        if not seeds and not inside[0]:  # the warm-up of hir.py
            prompts[0].update(tuple(ids) for ids, _ in sequences)
        return output_statistics(model, sequences)

    def watched_split(groups, max_tokens):
        if parent not in (hir, self_correct):
            prompts[inside[0]].update(tuple(ids) for group in groups for ids, _ in group)
        return split_batch(groups, max_tokens)

    def watched_prompt(problem, draft=None):
        if draft:  # the toy's corrector does not see the problem
            prompts[inside[0]].add(problem["prompt"])
        return prompt_of(problem, draft)

    def sample(model, tokenizer, asked, max_new_tokens, seed, temperature=1.0, **_):
        if parent is hir:  # hindsight may find any instruction, so what counts is what is asked
            prompts[inside[0]].update(map(tuple, asked))
        seeds.extend([seed] * (not inside[0]))
        rng = random.Random(seed)
        return [ids_of(rng.choice(list(REVIEWS))) for _ in asked]

    _, weights = run(
        script, dict(BRIEF, **flags), out, evaluate=watched_evaluate, split_batch=watched_split,
        sample=sample, prompt_of=watched_prompt, output_statistics=watched_statistics,
        toy_prompts=lambda *_: PROMPTS,
        toy_verdicts=lambda topics, text: [REVIEWS.get(text, [0])[0] > 0])
    return *prompts, seeds, weights


@pytest.mark.parametrize("name", RUNS)
def test_seeds_and_held_out_prompts(name, tmp_path):
    """No prompt is trained and evaluated on; equal seeds repeat; each rollout has its own seed."""
    script, flags = RUNS[name]
    learned, tested, seeds, weights = observed(script, flags, tmp_path)
    assert learned and tested and not learned & tested
    assert len(set(seeds)) == len(seeds)
    if "data" not in flags:
        again, other = [observed(script, dict(flags, seed=seed), tmp_path, evaluated=False)
                        for seed in (0, 1)]
        assert all(torch.equal(again[3][key], weights[key]) for key in weights)
        name = "transformer.ln_f.weight"
        assert not torch.equal(other[3][name], weights[name])
        assert not set(seeds) & set(other[2])


# ------------------------------------------------------ what no short run shows: rates, defaults


def test_schedule():
    """The rate rises for a tenth of the steps, or another share, and then falls along a line to 0,
    which it would reach in the step after the last."""
    assert [sft.schedule(t, 20) for t in range(20)] == pytest.approx(
        [1 / 2, 1] + [(19 - k) / 19 for k in range(1, 19)])
    assert [sft.schedule(t, 8, warmup=0.5) for t in range(8)] == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert [sft.schedule(t, 3) for t in range(3)] == [1, 2 / 3, 1 / 3] and sft.schedule(0, 1) == 1


class Reached(Exception):
    pass


HELD_OUT = {sft: [200], reward_model: [200], simpo: [256], rankings: [256], hir: [],
            chain_of_hindsight: [], self_correct: []}  # prompts; three toys hold others out


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("own")])
def test_first_of_forty_updates(name, tmp_path):
    """Weights do not decay, and the rate is a fourth of its peak: it rises for a tenth of the
    updates. In hir.py it rises for a quarter of them."""
    script, flags = RUNS[name]
    counts, split = [], helper.split_by_prompt

    def watched_split(rows, count=16):
        counts.append(count)
        return split(rows, count)

    def stop(optimizer, *_):
        raise Reached(optimizer.param_groups)

    flags = BRIEF | flags | {"steps": 40, "episodes": 20}
    if script is self_correct:
        flags["rounds"] = 40
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as reached:
        patch.setattr(torch.optim.AdamW, "step", stop)
        run(script, flags, tmp_path, evaluate=lambda *_: NOTHING, split_by_prompt=watched_split,
            sample=lambda model, tokenizer, prompts, *_, **__: [
                ids_of(rng.choice(list(REVIEWS)[:5])) for _ in prompts],
            toy_verdicts=lambda topics, text: [REVIEWS.get(text, [0])[0] > 0])
    group, = reached.value.args[0]
    parent = {raft: ppo_rlhf, grpo: ppo_rlhf, chain_of_hindsight: hir}.get(script, script)
    assert (group["weight_decay"], group["betas"]) == (0, (0.9, 0.95))
    peak = parent.DEFAULTS["lr"][0]  # tiny's
    assert group["lr"] == pytest.approx(peak / (10 if script is hir else 4))
    assert counts == HELD_OUT.get(script, [16])


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("own")])
def test_which_models_are_evaluated(name, tmp_path):
    """The trained one and the reference, in this order; or a model before its first update and
    after its last, on the same rows, by Chain of Hindsight both times asked for a good output.
    KTO's pairs are a desirable and an undesirable response each."""
    script, flags = RUNS[name]
    names, models, rows, rng = [], [], [], random.Random(0)
    parent = PARENT.get(script, script)
    pairs = [{"prompt": f"{i % 40}.", "chosen": KIND, "rejected": BAD} for i in range(80)]

    def evaluate(*args):
        rows.append([x for x in args if isinstance(x, (list, dict))])
        names.append([x for x in args if isinstance(x, str)])
        models.append([probe(x) for x in args if hasattr(x, "get_input_embeddings")])
        return {args[0] if isinstance(args[0], str) else "after": {}}, []

    flags = BRIEF | flags | {"reference": "reference", "steps": 1, "episodes": 1}
    run(script, flags, tmp_path, evaluate=evaluate, toy_pairs=lambda *_: pairs,
        sample=lambda model, tokenizer, prompts, *_, **__: [
            ids_of(rng.choice(list(REVIEWS)[:5])) for _ in prompts],
        toy_verdicts=lambda topics, text: [REVIEWS.get(text, [0])[0] > 0])
    end = pytest.approx(number(load_file(tmp_path / "model.safetensors")[
        "transformer.wte.weight"][EOS, 0]), abs=1e-9)
    start = probe(plain("reference" if parent is ppo_rlhf else "tiny"))
    if script is self_correct:
        assert models == [[end]]
    elif parent in (dpo, simpo, ppo_rlhf):
        (policy, reference), = models
        assert policy == end and reference == pytest.approx(start, abs=1e-9) != end
    else:
        (first,), (last,) = models
        assert first != end == last and rows[0] == rows[1]
        hint = [" Good:"] * (script is chain_of_hindsight)
        assert names == [["before", *hint], ["after", *hint]]
    if parent is dpo:
        (test, prompts), = rows
        assert len(test) == len(prompts) * 2 == 8
        assert all((w[1], l[1]) == (ids_of(KIND), ids_of(BAD))
                   for w, l in [row["pair"] for row in test])


DEFAULTS = [  # of the papers, or of docs/departures.md where it differs
    (dpo, "", dict(beta=0.5, label_smoothing=0, alpha=0.05)), (dpo, "ipo", dict(beta=0.1)),
    (kto, None, dict(beta=0.5, lambda_desirable=1, lambda_undesirable=1)),
    (simpo, "", dict(beta=2, gamma_beta_ratio=0.5)), (simpo, "cpo", dict(beta=0.1, lam=1)),
    (simpo, "orpo", dict(lam=0.1)), (simpo, "slic", dict(delta=1, lam=1)),
    (ppo_rlhf, None, dict(beta=0.5, kl_target=None, lam=1, ppo_epochs=4, ptx_coef=1,
                          missing_eos_score=-1)),
    (raft, None, dict(beta=0.5, n=4)), (rankings, "rrhf", dict(lam=None)),
    (hir, None, dict(alpha=1, beta=0.001, alternatives=1, label_smoothing=0.2, temperature=0.6)),
    (self_correct, None, dict(alpha=10, beta=1, feedback="text"))]


@pytest.mark.parametrize("script, loss, values", DEFAULTS)
def test_defaults_of_the_objectives(script, loss, values):
    """Those that the flags have, for tiny; None is filled in by the loss."""
    args = script.parse_args([f"--loss={loss}"] * bool(loss))
    helper.fill_defaults(args, getattr(script, "DEFAULTS", {}), small=True)
    assert {name: vars(args)[name] for name in values} == values


@pytest.mark.parametrize("loss, values", [
    (dpo.dpo_loss, dict(label_smoothing=0)), (simpo.cpo_loss, dict(lam=1)),
    (simpo.orpo_loss, dict(lam=0.1)),
    (kto.kto_loss, dict(lambda_desirable=1, lambda_undesirable=1)),
    (simpo.slic_loss, dict(delta=1, lam=1)), (ppo_rlhf.policy_loss, dict(clip=0.2)),
    (ppo_rlhf.value_loss, dict(clip=0.2)), (ppo_rlhf.gae, dict(gamma=1, lam=0.95)),
    (hir.hir_loss, dict(alpha=1, beta=0.001, label_smoothing=0.2))])
def test_defaults_of_a_loss_that_is_copied(loss, values):
    """They are those of the flags, which are all passed on; GAE's is Schulman's."""
    parameters = inspect.signature(loss).parameters
    assert {name: parameters[name].default for name in values} == values


def test_defaults_follow_the_model_and_the_data():
    """A small model's; a larger one's in the toy; a larger one's with --data. A flag that was given
    stays, also at 0, and a script without the flag does not get it."""
    for small, data, expected in ((1, None, 1), (1, "d", 1), (0, None, 2), (0, "d", 3)):
        args = SimpleNamespace(data=data, lr=None, pairs=0)
        helper.fill_defaults(args, {"lr": (1, 2, 3), "pairs": (4, 5, 6), "k": (7, 8, 9)}, small)
        assert vars(args) == {"data": data, "lr": expected, "pairs": 0}


def test_default_weight_of_sft_in_rrhf(tmp_path):
    """1, as in its paper. (That of PRO: the case "pro" above.)"""
    def stop(*inputs):
        raise Reached(inputs[-1])

    with pytest.raises(Reached) as reached:
        run(rankings, dict(RANK, loss="rrhf"), tmp_path, rrhf_loss=stop)
    assert reached.value.args == (1,)


# ------------------------------------------------------------------ evaluation, bf16, the terminal


@pytest.mark.parametrize("script", [dpo, ppo_rlhf])
def test_evaluation_equals_a_plain_derivation(script, monkeypatch, float64):
    """The table; J is reward - beta KL, of the reference the reward alone. (J*: test_optima.py)"""
    (policy, tokenizer), (reference, _) = map(helper.load_model, ("tiny", "reference"))
    n, test = 60, PROMPTS[:2]
    drawn = {probe(reference): ([BAD, KIND, FAIR, MIXED, CUT] * n)[:n],
             probe(policy): ([KIND, MIXED, CUT, FAIR] * n)[:n]}
    monkeypatch.setattr(script, "sample", lambda model, tokenizer, asked, *_, **__: [
        ids_of(text) for text in drawn[probe(model)] * (len(asked) // n)])
    a = SimpleNamespace(samples=n, beta=0.6, seed=0, data=None, max_new_tokens=12, max_tokens=999,
                        missing_eos_score=-2.5, reward_model=None, loss="dpo", label_smoothing=0.1)
    models = plain(), plain("reference")

    @functools.cache
    def log_ratio(prompt, text):
        sequence = encode(prompt)[0], ids_of(text)
        new, old = [number(token_logps(model, sequence).sum()) for model in models]
        return new - old

    columns = [{"samples/tokens": fmean(len(ids_of(text)) for text in texts),
                "samples/true_reward": fmean(REVIEWS[text][0] for text in texts),
                "samples/grammatical": fmean(REVIEWS[text][1] for text in texts)}
               for texts in drawn.values()]
    key = "samples/true_reward"
    if script is dpo:
        rows = [dict(row, pair=[encode(row["prompt"], row[key]) for key in ("chosen", "rejected")])
                for row in PAIRS]
        result, _ = dpo.evaluate(policy, reference, tokenizer, rows, test, a)
        margins = [a.beta * (log_ratio(row["prompt"], row["chosen"])
                             - log_ratio(row["prompt"], row["rejected"])) for row in PAIRS]
        for column in columns:
            column["pairs/held_out"] = len(PAIRS)
        columns[0] |= helper.mean_by_prompt(
            {"loss": torch.full((len(PAIRS),), math.log(2)),
             "rewards/margin": torch.zeros(len(PAIRS))}, [row["prompt"] for row in PAIRS])
        columns[1] |= helper.mean_by_prompt(
            {"loss": torch.tensor([math.log1p(math.exp(-x)) + 0.1 * x for x in margins]),
             "rewards/margin": torch.tensor(margins),
             "rewards/accuracy": torch.tensor([float(x > 0) for x in margins])},
            [row["prompt"] for row in PAIRS])
    else:
        reward = ppo_rlhf.load_reward(None, None, None, a)
        result, _ = ppo_rlhf.evaluate(policy, reference, reward, tokenizer, test, a)
        key = "scores/mean"
        for column, texts in zip(columns, drawn.values()):
            column |= {"samples/without_eos": texts.count(CUT) / n, "scores/mean": fmean(
                a.missing_eos_score if text == CUT else REVIEWS[text][0] for text in texts)}
    kl = fmean(log_ratio(prompt, text) for prompt in test for text in drawn[probe(policy)])
    wins = [REVIEWS[new][0] - REVIEWS[old][0] for old, new in zip(*drawn.values())]
    columns[1]["samples/win_rate"] = fmean(1 if win > 0 else 0 if win < 0 else 0.5 for win in wins)
    start, now, best = columns[0][key], columns[1][key] - a.beta * kl, result["after"]["J/optimum"]
    columns[1] |= {"kl/policy_reference": kl, "J/reference": start, "J/policy": now,
                   "J/share_of_the_way": (now - start) / (best - start), "J/optimum": best}
    columns[1] |= {name: result["after"][name] for name in (
        "J/effective_samples", "J/optimum_se", "J/share_of_the_way_se")}
    assert best > max(start, now)
    for column, expected in zip(result.values(), columns):
        assert column == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_standard_errors_count_prompts():
    """Two rows of a prompt that err together are worth one. NaN: a row that does not count."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0, math.nan])
    pairs = helper.mean_by_prompt({"x": x}, [["a"], ["a"], ["b"], ["b"], ["c"]])
    assert pairs == pytest.approx({"x": 0.5, "x_se": math.sqrt((1 + 1) * 2) / 4})
    alone = helper.mean_by_prompt({"x": x}, "abcde")  # the usual SD / sqrt(N)
    assert alone["x_se"] == pytest.approx(float(x[:4].std()) / 2)
    assert helper.mean_by_prompt({"x": x, "y": x * math.nan}, "aaaaa") == {"x": 0.5}


def test_pairs_that_are_told_by_their_length():
    """A reward that prefers length: its accuracy where the chosen response is longer, or shorter.

    Before training a policy is its own reference, and there is nothing to rank.
    """
    lengths = torch.tensor([[3, 2], [4, 2], [1, 3], [2, 2]])
    a = SimpleNamespace(data="pairs.jsonl")
    metrics = dpo.pair_metrics(None, 0.5 * lengths, lengths, "abcd", a)
    assert {key: x for key, x in metrics.items() if not key.endswith("_se")} == {
        "rewards/margin": 0.125, "rewards/accuracy": 0.5, "pairs/longer_chosen": 0.5,
        "pairs/held_out": 4,
        "rewards/accuracy_longer": 1, "rewards/accuracy_shorter": 0}
    assert "rewards/accuracy" not in dpo.pair_metrics(None, 0.0 * lengths, lengths, "abcd", a)


def test_evaluation_of_a_reward_model():
    """Ties count as wrong. (The calibration of given margins: test_losses.py)"""
    model, tokenizer = helper.load_model("reward", "reward")
    judge, rows, margins, gaps, prompts, losses = plain("reward", REWARD), [], [], [], [], []
    gaps_of_length = []
    for row in RANKINGS:
        texts, ranks = row["responses"], row["ranks"]
        rows.append(dict(row, group=[encode(row["prompt"], text) for text in texts]))
        r = [number(token_values(judge, sequence)[-1]) for sequence in rows[-1]["group"]]
        true = [sum(text.count(part) * REVIEWS[part][0] for part in REVIEWS) for text in texts]
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if ranks[i] < ranks[j]]
        margins += [r[i] - r[j] for i, j in pairs]
        prompts += [row["prompt"]] * len(pairs)
        lengths = [len(response) for _, response in rows[-1]["group"]]
        gaps_of_length += [lengths[i] - lengths[j] for i, j in pairs]
        losses.append(sum(math.log1p(math.exp(r[j] - r[i])) for i, j in pairs)
                      / math.comb(len(r), 2))
        gaps += [abs(true[i] - true[j]) for i, j in pairs]
    a = SimpleNamespace(max_tokens=70, data=None, loss="ranking")
    columns, _ = reward_model.evaluate("now", model, tokenizer, rows, a)
    expected = helper.mean_by_prompt({"loss": torch.tensor(losses)}, [x["prompt"] for x in rows])
    expected |= helper.mean_by_prompt({
        "pairs/accuracy": torch.tensor([float(margin > 0) for margin in margins]),
        "pairs/ceiling": torch.tensor([1 / (1 + math.exp(-gap)) for gap in gaps])}, prompts)
    expected["pairs/held_out"] = len(prompts)
    expected["calibration/error"] = reward_model.calibration_error(torch.tensor(margins))
    assert columns["now"] == pytest.approx(expected, rel=1e-4)
    a.data = "own rankings"  # of these the true reward is not known, and length may be all
    own, _ = reward_model.evaluate("now", model, tokenizer, rows, a)
    right, longer = ([x > 0 for x in numbers] for numbers in (margins, gaps_of_length))
    assert own["now"]["pairs/longer_better"] == pytest.approx(fmean(longer))
    for name, side in (("longer", True), ("shorter", False)):
        of_side = [x for x, y, gap in zip(right, longer, gaps_of_length) if gap and y == side]
        assert own["now"][f"pairs/accuracy_{name}"] == pytest.approx(fmean(of_side))
    assert "pairs/ceiling" not in own["now"]
    a.data = None
    model.score.weight.data.zero_()  # equal texts in one pass could differ by rounding
    columns, _ = reward_model.evaluate("now", model, tokenizer, rows, a)
    assert columns["now"]["pairs/accuracy"] == 0


def test_evaluation_of_summaries(monkeypatch):
    """Recall, made-up facts and words, by hand; mean log-probs are compared; ties are half."""
    (policy, tokenizer), (reference, _) = map(helper.load_model, ("tiny", "reference"))
    good, half, bad = " Anna lost a ring.", " Boris lost a ring.", " No."
    drawn = {probe(reference): [half, bad, good, bad], probe(policy): [good, bad, good, good]}
    monkeypatch.setattr(simpo, "sample",
                        lambda model, *_, **__: [*map(ids_of, drawn[probe(model)])] * 64)
    pairs = [[([EOS], ids_of(row[side])) for side in ("chosen", "rejected")] for row in PAIRS[:3]]
    rows = [{"prompt": "", "facts": {"who": "Anna", "what": "ring"}, "pair": x} for x in pairs]
    a = SimpleNamespace(seed=0, max_new_tokens=9, max_tokens=999, data=None, loss="simpo", delta=1,
                        beta=2.0, gamma_beta_ratio=0.5)
    columns, _ = simpo.evaluate(policy, reference, tokenizer, rows, a)
    for column, model, numbers in zip(columns.values(), (plain("reference"), plain()), (
            (0.225, 0.375, 0.125, 0.5), (0.7175, 0.75, 0, 0.75))):
        shown = [column[f"samples/{x}"] for x in ("quality", "recall", "made_up", "grammatical")]
        assert shown == pytest.approx(numbers)
        means = [[number(token_logps(model, x).mean()) for x in pair] for pair in pairs]
        assert column["rewards/accuracy"] == fmean(w > l for w, l in means)
        assert column["rewards/margin"] == pytest.approx(fmean(w - l for w, l in means), rel=1e-5)
        assert column["loss"] == pytest.approx(fmean(
            math.log1p(math.exp(1 - 2 * (w - l))) for w, l in means), rel=1e-5)
    assert column["samples/win_rate"] == (1 + 0.5 + 0.5 + 1) / 4


def test_evaluation_of_instructions(monkeypatch):
    """What is followed as a whole, each requirement by itself, and reviews of any kind."""
    monkeypatch.setattr(hir, "sample", lambda *_, **__: [ids_of(text) for text in REVIEWS])
    groups = {name: [({"prompt": ""}, wanted)] for name, wanted in (
        ("all", ASKED[0]), ("held_out", {"length": "long"}))}
    a = SimpleNamespace(samples=6, seed=0, max_new_tokens=12, max_tokens=99, temperature=1.0,
                        match="all")
    columns, _ = hir.evaluate("now", *helper.load_model(), groups, a)
    assert columns["now"] == pytest.approx({
        "followed/all": 1 / 6, "followed/length": 3 / 6, "followed/mood": 2 / 6,
        "samples/reviews": 4 / 6, "followed/held_out": 1 / 6,
        "followed/at_temperature_1": 1 / 6})


def test_evaluation_of_corrections(monkeypatch):
    """Each answer is corrected again; the stop rule leaves alone what was perfect once."""
    drafts, *turns = [[self_correct.Answer(f" {x}", x, "") for x in values] for values in (
        [1, 0, 0.5, 1], [0.5, 1, 0.5, 1], [1, 0.5, 1, 0.5])]
    asked, problems = [], [{"prompt": "A", "pool": [draft, None]} for draft in drafts]

    def respond(model, tokenizer, tasks, seed, args):
        asked.append((tasks, seed))
        return turns[len(asked) - 1]

    monkeypatch.setattr(self_correct, "respond", respond)
    columns, samples = self_correct.evaluate(
        None, None, problems, SimpleNamespace(corrections=2, seed=5))
    assert samples == [{"prompt": "A", "draft": draft.text, "1": first.text, "2": last.text}
                       for draft, first, last in zip(drafts, *turns)]
    assert asked == [([*zip(problems, drafts)], 6), ([*zip(problems, turns[0])], 7)]
    assert [list(column.values()) for column in columns.values()] == [
        [0.625, 0.5, 0.5, 0], [0.75, 0.5, 0.75, 0.5], [0.75, 0.5, 1, 1]]
    columns, _ = self_correct.evaluate(None, None, problems[1:3], SimpleNamespace(corrections=0))
    assert columns == {"draft": {"value": 0.25, "perfect": 0, "stop_rule/perfect": 0, "damaged": 0}}


def test_people_are_the_demonstrations_held_out(tmp_path, monkeypatch):
    """The first column of sft.py is the true reward of texts that no model has learned from: the
    same rows as those whose loss is printed beside it."""
    rows = [{"prompt": f"Film {i}.", "completion": " superb" * i + "."} for i in range(20)]
    monkeypatch.setattr(sft, "toy_rows", lambda *_: rows)
    seen, tables = [], []
    monkeypatch.setattr(sft, "evaluate", lambda name, model, tokenizer, rows, args: (
        seen.append([row["prompt"] for row in rows]) or ({name: {}}, [])))
    monkeypatch.setattr(helper.Run, "report", lambda run, columns, *_, **__: tables.append(columns))
    sft.main(f"--out {tmp_path} --steps 1 --batch_size 2 --device cpu".split())
    _, held_out, _ = helper.split_by_prompt(rows)
    rewards = [row["completion"].count("superb") for row in held_out]
    people = {"samples/true_reward": fmean(rewards)}
    assert tables == [{"people": people, "before": {}, "after": {}}]
    assert seen == [[row["prompt"] for row in held_out]] * 2 and len(rewards) == 2


@pytest.mark.parametrize("script", [sft, reward_model, dpo, simpo, ppo_rlhf, hir, self_correct])
def test_bf16_is_used_on_cuda_alone(script, monkeypatch):
    """In training and in sampling. The second device only says that it is CUDA."""
    model, tokenizer = helper.load_model()
    tokenizer.stop_ids = range(1000)  # each sample ends at once
    cuda, used, to = SimpleNamespace(type="cuda"), [], torch.Tensor.to

    def autocast(*args, enabled):
        used.append((*args, enabled))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.Tensor, "to",
                        lambda x, *a, **k: x if a == (cuda,) else to(x, *a, **k))
    for device in (torch.device("cpu"), cuda):
        monkeypatch.setattr(type(model), "device", device)
        script.hidden_states(model, torch.tensor([[EOS, 5]]), torch.tensor([1]))
        script.sample(model, tokenizer, [[EOS, 5]], 1, seed=0)
    assert used == [("cpu", torch.bfloat16, False)] * 2 + [("cuda", torch.bfloat16, True)] * 2


def test_no_control_character_reaches_the_terminal(tmp_path, capsys):
    """A sample can hold escape sequences, which a terminal would obey."""
    run = helper.Run(SimpleNamespace(out=str(tmp_path), resume=False, device="cpu"))
    run.begin()
    run.log({})
    run.report({"after": {}}, [{"after": "gone\x1b[2J\r\x07"}], [["lr"], ["lr"]])
    tokenizer = helper.Tokenizer(helper.TINY)
    tokenizer.show([EOS], tokenizer.encode("\x1b[2J"))
    with pytest.raises(SystemExit):
        helper.fail("a message with \x1b[2J")
    shown = "".join(capsys.readouterr()) + (tmp_path / "samples.txt").read_text()
    assert "gone" in shown and not set("\x1b\r\x07") & set(shown)
