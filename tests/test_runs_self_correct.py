"""Whole runs of self_correct.py, short: what they leave, which pairs they learn from, that the
generator stays, that each flag is used, that they repeat, stop and go on exactly, and that the
numbers of the table are what they say."""

import copy
import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as hub
import self_correct

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TOY = ("--problems 8 --pool 4 --explore 2 --rounds 3 --epochs 1 --batch_size 4 --warm_up 0 "
       "--corrections 1 --max_new_tokens 24 --device cpu").split()
DATA = ("--pool 4 --explore 2 --rounds 2 --epochs 1 --batch_size 8 --max_new_tokens 16 "
        "--device cpu").split()  # 18 problems to learn from: K = 3
FORM = re.compile(r"Item (\d+):\nDraft:(.*)\n(.*)\nBetter:")


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, weights):
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """A file of twenty problems; two of them are held out."""
    path = tmp_path_factory.mktemp("data") / "items.jsonl"
    rows = [{"prompt": f"Item {i}:", "answer": f"yes {i}\n"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="session")
def critic(tmp_path_factory):
    """The folder of tiny after a short warm-up: its drafts are sometimes worth something."""
    model, tokenizer = hub.load_model("tiny")
    args = self_correct.parse_args(["--warm_up", "40"])
    rows = self_correct.toy_rows(64, False)
    self_correct.toy_warm_up(model, tokenizer, rows, args, torch.autocast("cpu", enabled=False))
    hub.save_model(model, tokenizer, tmp_path_factory.mktemp("critic"))
    return str(tmp_path_factory.getbasetemp() / "critic0")


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A copy of tiny whose tokenizer knows fewer merges."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(hub.TINY, folder)
    merges = (hub.TINY / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(merges[:40]))
    return str(folder)


@pytest.fixture
def bare(monkeypatch):
    """Runs without their evaluation and curves, for tests of the training alone."""
    column = {"value": 0.0, "stop_rule/value": 0.0, "resampled/value": 0.0}
    monkeypatch.setattr(self_correct, "evaluate", lambda model, tokenizer, rows, tries, args, _: (
        {name: column for name in ("draft", *map(str, range(1, 1 + args.corrections)))}, []))
    monkeypatch.setattr(self_correct, "plot", lambda *_, **__: None)


@pytest.fixture
def stub(monkeypatch):
    """`sample` without a model: to an item a third right answers, a few of these without an end; to
    a play a word of any mood for each topic. Returns its calls, as dictionaries."""
    calls = []

    def sample(model, tokenizer, prompts, max_new_tokens, seed, size=256):
        call = {"model": id(model), "seed": seed, "prompts": [], "texts": []}
        calls.append(call)
        responses = []
        for n, ids in enumerate(prompts):
            prompt, rng = tokenizer.decode(ids), random.Random(f"{seed} {n}")
            ended = [tokenizer.eos_id]
            if prompt.startswith("Item"):
                number, chance = re.match(r"Item (\d+)", prompt)[1], rng.random()
                by = " fix" if "Draft" in prompt else ""
                text = f" no {rng.randrange(99)}{by}" if chance > 1 / 3 else f" yes {number}"
                ended *= not 0.25 < chance < 1 / 3
            else:
                words = re.findall(r"\w+", prompt.split("\nSpoken")[0])
                topics = [word for word in words if word in self_correct.TOPICS]
                text = self_correct.toy_draft(rng, topics)
            call["prompts"].append(prompt)
            call["texts"].append(text)
            responses.append(tokenizer.encode(text) + ended)
        return responses, None

    monkeypatch.setattr(self_correct, "sample", sample)
    return calls


@pytest.fixture
def seen(monkeypatch):
    """What passes through a run: `batches`, the sequences that are trained; `grads` of each step;
    `pool`, `tries` and `explored` as they are saved at last; `models` that were loaded."""
    seen = SimpleNamespace(batches=[], grads=[], models=[])
    collate, load = self_correct.collate, self_correct.load_model
    save, clip = self_correct.save_state, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(self_correct, "collate", lambda sequences, device: (
        seen.batches.append(sequences), collate(sequences, device))[1])
    monkeypatch.setattr(self_correct.nn.utils, "clip_grad_norm_", lambda weights, most: (
        seen.grads.append([w.grad.clone() for w in weights]), clip(weights, most))[1])
    monkeypatch.setattr(self_correct, "save_state", lambda *args, **rest: (
        vars(seen).update(rest), save(*args, **rest)))

    def load_model(*args, **rest):
        model, tokenizer = load(*args, **rest)
        seen.models.append((model, weights_of(model)))
        return model, tokenizer

    monkeypatch.setattr(self_correct, "load_model", load_model)
    return seen


def interrupt_at(monkeypatch, when):
    """Ctrl-C in the step `when`, just before its update."""
    original = self_correct.checkpoint

    def press(args, step, health, pressed, *rest, **more):
        if step == when:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs, and fills the list
        return original(args, step, health, pressed, *rest, **more)

    monkeypatch.setattr(self_correct, "checkpoint", press)
    return lambda: monkeypatch.setattr(self_correct, "checkpoint", original)


# ------------------------------------------------------------------------------ what they leave


def test_a_toy_run_leaves_what_is_promised(tmp_path, critic, capsys):
    """The whole path, warm-up included: a model that plain transformers loads, flags, log, curves,
    the traces of held-out drafts, and the table of three corrections."""
    flags = ("--problems 16 --pool 4 --explore 2 --rounds 2 --epochs 1 --batch_size 8 --warm_up 2 "
             "--max_new_tokens 20 --device cpu --out").split()
    last = self_correct.main([*flags, str(tmp_path), "--model", critic])
    assert [*results(tmp_path)] == ["draft", "1", "2", "3"]
    assert results(tmp_path)["3"] == last
    names = {f"{rule}{v}" for rule in ("", "stop_rule/", "resampled/") for v in ("value", "perfect")
             } | {"similarity/own_draft", "similarity/other_draft"}
    assert {*results(tmp_path)["draft"]} == names
    assert {*last} - {"damaged"} == names | {"changed"}  # damaged: if any was perfect before
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Tonight: plot.", return_tensors="pt").input_ids
    mine, _ = hub.load_model(tmp_path)
    start, _ = hub.load_model("tiny")
    with torch.no_grad():
        assert torch.allclose(plain.eval()(ids).logits, mine(ids).logits, atol=1e-4)
        assert not torch.allclose(start(ids).logits, mine(ids).logits, atol=1e-2)
    used = json.loads((tmp_path / "args.json").read_text())
    assert (used["pool"], used["rounds"], used["alpha"], used["lr"]) == (4, 2, 10.0, 1e-3)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {*rows[0]} == {"step", "loss", "grad_norm", "lr", "pool/answers", "pool/value",
                          "pool/problems"}
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert not (tmp_path / "state.pt").exists()
    text = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    for name in ("prompt", "draft ", "1     ", "2     ", "3     "):
        assert len(re.findall(f"^{name}:", text, re.M)) == 12
    assert "prompt: Tonight: " in text and "stop_rule/perfect" in text
    assert "similarity/own_draft" in capsys.readouterr().out


def test_no_nan_in_the_results(tmp_path, items, stub, monkeypatch):
    """A table of drafts that are all wrong is still JSON without NaN."""
    monkeypatch.setattr(self_correct, "appraise", lambda row, text, ended: (0.0, "Wrong."))
    self_correct.main([*DATA, "--rounds", "0", "--data", items, "--out", str(tmp_path)])
    assert "NaN" not in (tmp_path / "results.json").read_text()


# --------------------------------------------------------------------- what they learn from


@pytest.mark.parametrize("feedback", ["text", "none"])
def test_pairs_go_from_wrong_to_right(tmp_path, feedback, items, stub, seen, bare):
    """Rows of a file: an answer is worth 1 if it matches and ends, else 0; each example corrects a
    wrong answer of the pool into a right one to the same prompt, its EOS included."""
    self_correct.main([*DATA, "--feedback", feedback, "--data", items, "--out", str(tmp_path)])
    tokenizer = hub.load_model("tiny")[1]
    decode, eos = tokenizer.decode, tokenizer.eos_id
    wrong, right = {}, {}
    for answers in seen.pool:
        for ids, value, words in answers:
            match = re.fullmatch(r" yes (\d+)", decode(ids))
            assert value == float(bool(match) and ids[-1] == eos) and len(ids) > 2
            assert words == ("That is right." if value else "That is wrong.")
            (right if value else wrong).setdefault(decode(ids), []).append(ids)
    assert len(right) > 9 and len(wrong) > 30
    assert any(ids[-1] != eos for group in wrong.values() for ids in group)
    batches = seen.batches[:6]  # what follows is the last check of the weights
    assert [len(batch) for batch in batches] == [8] * 6 and len(log(tmp_path)) == 6
    for prompt, better in sum(batches, []):
        number, draft, words = FORM.fullmatch(decode(prompt)).groups()
        assert words == ("That is wrong." if feedback == "text" else "")
        assert better == tokenizer.encode(f" yes {number}") + [eos] and draft in wrong
        answers = next(a for a in seen.pool if better in [ids for ids, _, _ in a])
        assert draft in [decode(ids) for ids, value, _ in answers if value == 0]
    for call in stub[2:]:
        assert all(bool("That is" in p) == (feedback == "text") for p in call["prompts"])


def test_exploration_adds_new_answers_once(tmp_path, items, stub, seen, bare):
    """Each round but the first asks the corrector, not the generator, for --explore corrections of
    each problem's answers; what is new joins the pool, once, and the log tells of it."""
    for rounds in ("1", "3"):
        del stub[:], seen.models[:]
        self_correct.main([*DATA, "--rounds", rounds, "--data", items, "--out", str(tmp_path)])
        drafts, _, *explorations = stub
        corrector = id(seen.models[0][0])
        assert drafts["model"] != corrector and len(drafts["texts"]) == 18 * 4
        assert len(explorations) == int(rounds) - 1 == seen.explored
        assert {call["model"] for call in explorations} <= {corrector}
        tokenizer = hub.load_model("tiny")[1]
        known, before = [[] for _ in seen.pool], []
        for n, call in enumerate([drafts, *explorations]):
            assert all(("Draft:" in prompt) == bool(n) for prompt in call["prompts"])
            assert len(call["texts"]) == 18 * (2 if n else 4)
            for at, text in enumerate(call["texts"]):
                known[at // (2 if n else 4)].append(text)
                if n:  # it corrects what stood in the pool of the same problem before
                    draft = FORM.fullmatch(call["prompts"][at])[2]
                    assert draft in before[at // 2]
            before = [set(texts) for texts in known]
        for answers, texts in zip(seen.pool, before, strict=True):
            ids = [tuple(ids) for ids, _, _ in answers]
            assert len(ids) == len(set(ids))
            assert {tokenizer.decode(y) for y in ids} == texts
        counts = [row["pool/answers"] for row in log(tmp_path)]
        assert len(counts) == 3 * int(rounds) and counts[-1] == sum(map(len, seen.pool))
        assert all(len(set(counts[i:i + 3])) == 1 for i in range(0, len(counts), 3))
        assert counts[::3] == sorted(set(counts[::3])) and len(set(counts)) == int(rounds)
        values = [v for answers in seen.pool for _, v, _ in answers]
        assert log(tmp_path)[-1]["pool/value"] == sum(values) / len(values)
        fixed = any("fix" in text for texts in before for text in texts)
        assert fixed == (rounds == "3")


# --------------------------------------------------------------------------- the generator


@pytest.mark.parametrize("own", [False, True])
def test_generator_stays_as_it_is(tmp_path, own, items, stub, seen, bare, monkeypatch):
    """Derived or given, the generator is bit for bit the start at the end, and shares nothing with
    the corrector, which is another by then."""
    made = []
    monkeypatch.setattr(self_correct, "copy", SimpleNamespace(deepcopy=lambda model: (
        made.append(copy.deepcopy(model)), made[-1])[1]))
    given = ["--generator", "tiny"] if own else []
    self_correct.main([*DATA, *given, "--data", items, "--out", str(tmp_path)])
    (corrector, start), *rest = seen.models
    generator = rest[0][0] if own else made[0]
    assert len(rest) == own and stub[0]["model"] == stub[1]["model"] == id(generator)
    assert same(generator, start) and not same(corrector, start)
    places = {p.data_ptr() for p in corrector.parameters()}
    assert not places & {p.data_ptr() for p in generator.parameters()}
    assert all(p.grad is None for p in generator.parameters())


def test_generator_is_not_kept(tmp_path, items, stub, bare, monkeypatch):
    """After the drafts nothing holds the generator: training has its memory to itself."""
    made, alive = [], []

    def deepcopy(model):
        twin = copy.deepcopy(model)
        made.append(weakref.ref(twin))
        return twin

    original = self_correct.checkpoint
    monkeypatch.setattr(self_correct, "copy", SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(self_correct, "checkpoint", lambda *args, **rest: (
        gc.collect(), alive.append(made[0]() is not None), original(*args, **rest)))
    self_correct.main([*DATA, "--steps", "1", "--data", items, "--out", str(tmp_path)])
    assert alive == [False] and len(made) == 1


def test_generator_with_another_tokenizer(tmp_path, items, other, stub, seen, bare):
    """Its drafts arrive in the corrector's own tokens, with EOS, and are the same texts, worth what
    they were worth; the held-out ones too."""
    self_correct.main([*DATA, "--rounds", "1", "--generator", other, "--data", items,
                       "--out", str(tmp_path)])
    theirs, mine = hub.Tokenizer(other), hub.load_model("tiny")[1]
    text = stub[0]["texts"][0]
    assert theirs.encode(text) != mine.encode(text)
    for n, answers in enumerate(seen.pool):
        assert {mine.decode(ids) for ids, _, _ in answers} == {
            *stub[0]["texts"][4 * n:4 * n + 4]}
    assert [mine.decode(ids) for answers in seen.tries for ids, _, _ in answers] == (
        stub[1]["texts"])
    for ids, value, _ in sum(seen.pool + seen.tries, []):
        assert ids == mine.encode(mine.decode(ids)) + [mine.eos_id]
        assert value == 0 or " yes " in mine.decode(ids)


def test_generator_with_a_shorter_context(tmp_path, items, stub, capsys):
    """A generator that cannot read what the corrector can is refused, with what would do."""
    model, tokenizer = hub.load_model("tiny")
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:256])
    model.config.n_positions = 256
    hub.save_model(model, tokenizer, tmp_path / "short")
    argv = [*DATA, "--data", items, "--generator", str(tmp_path / "short"), "--out",
            str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        self_correct.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--max_length 256" in error and not (tmp_path / "out").exists()
    self_correct.main([*argv, *"--rounds 0 --corrections 1 --max_length 256".split()])
    assert [*results(tmp_path / "out")] == ["draft", "1"]


@pytest.mark.parametrize("own", [False, True])
def test_rounds_0_only_corrects(tmp_path, own, items, other, stub, capsys):
    """No update: the weights are those that were loaded, and the table is there all the same."""
    given = ["--generator", other] if own else []
    self_correct.main([*DATA, *given, "--rounds", "0", "--data", items, "--out", str(tmp_path)])
    assert "stop_rule/perfect" in capsys.readouterr().out and log(tmp_path) == []
    assert [*results(tmp_path)] == ["draft", "1", "2", "3"]
    loaded, _ = hub.load_model("tiny")
    assert same(hub.load_model(tmp_path)[0], weights_of(loaded))
    assert (tmp_path / "curves.png").exists() and len(stub) == 5  # drafts twice, three corrections


# ---------------------------------------------------------------- every flag changes a number


def test_each_flag_of_the_training_is_used(tmp_path, critic, stub, bare):
    """Each of these gives other weights, and a flag at its default the same."""
    flags = ["", "--seed 0", "--alpha 0", "--beta 20", "--pool 5", "--explore 3",
             "--feedback none", "--rounds 2"]
    found = {}
    for n, flag in enumerate(flags):
        out = tmp_path / str(n)
        self_correct.main([*TOY, "--model", critic, *flag.split(), "--out", str(out)])
        found[flag] = digest(out)
    assert found.pop("--seed 0") == found[""]
    assert len(set(found.values())) == len(flags) - 1


def test_flags_of_the_evaluation_change_the_table_only(tmp_path, critic, monkeypatch):
    """--stop_at and --corrections leave the weights as they are, but not the table."""
    monkeypatch.setattr(self_correct, "plot", lambda *_, **__: None)
    tables, hashes = [], set()
    for n, flag in enumerate(("", "--stop_at 0", "--corrections 2")):
        out = tmp_path / str(n)
        self_correct.main([*TOY, *"--rounds 2 --steps 3".split(), "--model", critic, *flag.split(),
                           "--out", str(out)])
        tables.append(results(out))
        hashes.add(digest(out))
    plain, early, more = tables
    assert len(hashes) == 1 and [*more] == ["draft", "1", "2"] and [*plain] == ["draft", "1"]
    differ = {key for key in plain["1"] if plain["1"][key] != early["1"][key]
              and plain["1"][key] == plain["1"][key]}
    assert differ and differ <= {"stop_rule/value", "stop_rule/perfect"}


# ----------------------------------------------------------------- the same, stopped, in parts


def test_same_seed_same_weights(tmp_path, critic, bare):
    """Two runs with one seed leave the same file, another seed leaves another."""
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(ord(out))
        random.seed(ord(out))
        self_correct.main([*TOY, "--model", critic, *"--warm_up 2 --rounds 2 --seed".split(), seed,
                           "--out", str(tmp_path / out)])
    a, b, c = (digest(tmp_path / out) for out in "abc")
    assert a == b != c


def test_first_gradient_is_that_of_plain_logits(tmp_path, items, stub, seen, bare):
    """At once or in unequal parts, of responses of unequal lengths: the loss is the mean over all
    tokens of the better answers, no token of a prompt among them, by plain autograd on single
    unpadded sequences (huggingface/transformers#34191: a mean of part means is off)."""
    logs = []
    for parts in (1, 2, 3):
        del seen.batches[:], seen.grads[:]
        self_correct.main([*DATA, *"--steps 4 --batch_size 7 --lr 1e-3 --accumulate".split(),
                           str(parts), "--data", items, "--out", str(tmp_path / str(parts))])
        logs.append(log(tmp_path / str(parts)))
        assert [len(part) for part in seen.batches[:parts]] == {
            1: [7], 2: [4, 3], 3: [3, 3, 1]}[parts]
        batch = sum(seen.batches[:parts], [])
        assert len({len(better) for _, better in batch}) > 1
        model, total = hub.load_model("tiny")[0], 0
        for prompt, better in batch:
            logits = model(torch.tensor([prompt + better])).logits[0, len(prompt) - 1:-1]
            total = total - logits.log_softmax(1)[range(len(better)), better].sum()
        loss = total / sum(len(better) for _, better in batch)
        loss.backward()
        assert logs[-1][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for weight, grad in zip(model.parameters(), seen.grads[0], strict=True):
            assert torch.allclose(weight.grad, grad, atol=1e-5, rtol=1e-4)
    for row, *others in zip(*logs, strict=True):
        assert row["grad_norm"] > 0.01
        for other in others:
            assert other == pytest.approx(row, rel=1e-3, abs=1e-5)


RESUMED = [(3, []), (3, ["--lora_rank", "2"]), (4, [])]


@pytest.mark.parametrize("when, extra", RESUMED, ids=["in a round", "lora", "between rounds"])
def test_resumed_equals_uninterrupted(tmp_path, when, extra, critic, seen, monkeypatch, capsys):
    """Ctrl-C in the middle of a round, or just after an exploration, ends with 130; --resume then
    gives the same bits, weights, pool, metrics and table, as no Ctrl-C would have given."""
    monkeypatch.setattr(self_correct, "plot", lambda *_, **__: None)
    flags = [*TOY, "--model", critic, *extra, "--out"]  # three rounds of two steps
    self_correct.main([*flags, str(tmp_path / "whole")])
    pool, calls, original = seen.pool, [], self_correct.respond
    release = interrupt_at(monkeypatch, when)
    monkeypatch.setattr(self_correct, "respond", lambda *args: (
        calls.append(len(args[3][0]) > 1), original(*args))[1])
    with pytest.raises(SystemExit) as stop:
        self_correct.main([*flags, str(tmp_path / "parts")])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert len(log(tmp_path / "parts")) == when and (tmp_path / "parts" / "state.pt").exists()
    release()
    torch.manual_seed(99)
    self_correct.main([*flags, str(tmp_path / "parts"), "--resume"])
    assert calls == [False] * 2 + [True] * 3  # drafts; two explorations, and the one correction
    assert [*map(repr, seen.pool)] == [*map(repr, pool)]
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert repr(results(tmp_path / "whole")) == repr(results(tmp_path / "parts"))


# ---------------------------------------------------------------------- the numbers of the table


def test_the_numbers_of_the_table(tiny, monkeypatch):
    """Three chains of two corrections by hand: each number is what its name says. The stop rule
    keeps the first answer that is good enough, though later ones are worse; as many tries as
    corrections, and one, are what it is compared with; damaged counts the perfect ones alone."""
    tokenizer = tiny[1]
    answer = lambda text, value: (tokenizer.encode(text) + [tokenizer.eos_id], value, f"{value}!")
    tries = [[answer("a b c d", .5), answer("e", .25), answer("f", 1.0)],
             [answer("p q r s", 1.0), answer("e", .0), answer("f", .0)],
             [answer("x y", .0), answer("e", .6), answer("f", .2)]]
    corrections = {1: [answer("a b c e", 1.0), answer("p q", .5), answer("x y", .0)],
                   2: [answer("a b c e", 1.0), answer("p q r s t", .25), answer("p q r s", .75)]}
    asked = []

    def respond(model, tokenizer, rows, tasks, seed, args, autocast):
        asked.append((tasks, seed))
        return corrections[len(asked)]

    monkeypatch.setattr(self_correct, "respond", respond)
    args = SimpleNamespace(corrections=2, stop_at=1.0, seed=7)
    columns, texts = self_correct.evaluate(None, tokenizer, [{}] * 3, tries, args, None)
    assert texts == [["a b c d", "a b c e", "a b c e"], ["p q r s", "p q", "p q r s t"],
                     ["x y", "x y", "p q r s"]]
    first = [answers[0] for answers in tries]
    for (tasks, _), before in zip(asked, (first, corrections[1]), strict=True):
        assert tasks == [(i, *y) for i, y in enumerate(before)]
    assert len({seed for _, seed in asked}) == 2
    third = 1 / 3
    assert [*columns] == ["draft", "1", "2"]
    assert columns["draft"] == pytest.approx({
        "value": .5, "perfect": third, "stop_rule/value": .5, "stop_rule/perfect": third,
        "resampled/value": .5, "resampled/perfect": third, "similarity/own_draft": 1,
        "similarity/other_draft": 0})
    assert columns["1"] == pytest.approx({
        "value": .5, "perfect": third, "stop_rule/value": 2 / 3, "stop_rule/perfect": 2 / 3,
        "resampled/value": .7, "resampled/perfect": third, "similarity/own_draft": .75,
        "similarity/other_draft": 0, "changed": 2 / 3, "damaged": 1})
    assert columns["2"] == pytest.approx({
        "value": 2 / 3, "perfect": third, "stop_rule/value": 2.75 / 3, "stop_rule/perfect": 2 / 3,
        "resampled/value": 2.6 / 3, "resampled/perfect": 2 / 3,
        "similarity/own_draft": (.75 + .8 + 0) / 3, "similarity/other_draft": third,
        "changed": 2 / 3, "damaged": 0})
    for stop_at, value, perfect in ((.5, .75, third), (0, .5, third), (2, 2 / 3, third)):
        del asked[:]
        args.stop_at = stop_at
        again, _ = self_correct.evaluate(None, tokenizer, [{}] * 3, tries, args, None)
        assert again["2"] == pytest.approx(columns["2"] | {
            "stop_rule/value": value, "stop_rule/perfect": perfect})


# ------------------------------------------------------------------------ nothing to learn from


def ends_with_one_line(argv, capsys, best):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        self_correct.main(argv)
    line, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert stop.value.code == 2
    for words in (f"(values: {best} to {best})", "--generator", "--pool"):
        assert words in line
    return line


def test_pool_without_improvement(tmp_path, items, stub, monkeypatch, capsys):
    """If no answer is better than another there is nothing to learn: the values are told, and what
    to do, and nothing is written."""
    for best in (0, 1):
        monkeypatch.setattr(self_correct, "appraise", lambda *_: (float(best), "So it is."))
        line = ends_with_one_line([*DATA, "--pool", "3", "--data", items, "--out",
                                   str(tmp_path / "out")], capsys, best)
        assert "than 3" in line and not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the questions in ../shared")
def test_real_questions(tmp_path, capsys, bare):
    """The embedded model cannot count objects: one line says so, unless it happened to be right."""
    argv = [*DATA, *"--max_new_tokens 8 --pool 1 --corrections 1 --steps 2 --rounds 1".split(),
            "--data", str(SHARED / "bbh_object_counting.jsonl"), "--out", str(tmp_path)]
    try:
        self_correct.main(argv)
    except SystemExit as stop:
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.code == 2 and "(values: 0 to 0)" in error
    else:
        assert len(log(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_readmes_numbers(tmp_path, seed):
    """The default run: three corrections make nearly all reviews perfect, as many tries do not; the
    corrector reads its draft, corrects again what it left, and spoils little."""
    last = self_correct.main(["--seed", seed, "--device", "cpu", "--out", str(tmp_path)])
    assert last["stop_rule/perfect"] > 0.9 and last["resampled/perfect"] < 0.4
    assert last["similarity/own_draft"] > 2 * last["similarity/other_draft"]
    assert last["damaged"] < 0.08
    columns = results(tmp_path)
    assert columns["2"]["stop_rule/perfect"] > columns["1"]["stop_rule/perfect"]
