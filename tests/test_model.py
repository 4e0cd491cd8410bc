"""Loading and saving: tokenizers, models, atomic writes, models that do not fit, LoRA."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import model as m  # noqa: E402
import sft  # noqa: E402

transformers.utils.logging.set_verbosity_error()
SHARED = ROOT.parent / "shared"
END = "<|endoftext|>"
NASTY = ["I saw the film.", "", " ", "     \n\n \t\t x  ", "tabs\tand\r\nreturns\r",
         "naïve “café” —", "日本語テキスト 🤗👩‍👩‍👧‍👦 ñ", "\u200b\ufeff\u00a0\u2028end",
         "we'll we’ll I'm DON'T 'tis",
         "1234567 3.14 ½²",
         END, f"a{END}b {END}{END}", "<s></s><|im_start|>user", "\x00\x07\x1b[0m", "e\u0301 vs é",
         "x" * 300, " " * 300 + "!", "if a:\n        return {'b': [1, 2]}  # c\n"]
CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
          "</s>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHAT = [{"role": "user", "content": "I saw the film."}]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tiny_copy(folder, **settings):
    """A copy of tiny/ whose tokenizer_config.json has these settings too."""
    shutil.copytree(m.TINY, folder)
    edit(folder / "tokenizer_config.json", **settings)
    return folder


def edit(path, **settings):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | settings), encoding="utf-8")


def bpe_files(folder, bos="<s>", template=None):
    """Save a small byte-level BPE that only transformers can drive; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(["I saw the film. The cast was superb."] * 3, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|im_start|>"]))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos,
                                                eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


SMALL = dict(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)


def new_folder(folder, kind, **changes):
    """A folder with a small config and a tokenizer, but without weights."""
    folder.mkdir(parents=True)
    if kind == "gpt2":
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(m.TINY / name, folder)
        settings = dict(vocab_size=733, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                        bos_token_id=732, eos_token_id=732)
        transformers.GPT2Config(**settings | changes).save_pretrained(folder)
    else:
        bpe_files(folder)
        config = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}.get(kind, kind)
        getattr(transformers, config)(**SMALL | changes).save_pretrained(folder)
    return folder


def logits(model, seed=0):
    """Logits of 2 random sequences of 7 tokens, without gradient."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=torch.randint(0, 300, (2, 7))).logits


def same(a, b):
    """Equal weights, and equal logits but for the last bits, which hang on where weights lie."""
    a.eval(), b.eval()
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(w, b.state_dict()[name]) for name, w in a.state_dict().items())
    return float((logits(a) - logits(b)).abs().max()) < 1e-6


def refused(capsys, fragments, *args, **settings):
    """load_model ends with exit code 2 and one error line that has these fragments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        m.load_model(*args, **settings)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    for fragment in fragments:
        assert fragment in lines[0]


# ---------------------------------------------------------------------------------- tokenizers


def strings(value):
    """All texts of a JSON value."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in values for text in strings(part)]


@pytest.mark.skipif(not (SHARED / "gpt2" / "vocab.json").exists() or not (SHARED / "data").exists(),
                    reason="needs GPT-2's tokenizer files and texts in ../shared")
def test_real_gpt2_ids_are_those_of_transformers():
    """tiktoken on GPT-2's files gives transformers' ids for every text of the shared data."""
    ours = m.Tokenizer(SHARED / "gpt2")
    theirs = transformers.AutoTokenizer.from_pretrained(SHARED / "gpt2")
    assert ours.tiktoken and len(ours) == len(theirs) == 50257
    assert ours.bos_id == ours.eos_id == theirs.eos_token_id == 50256
    texts = {text for path in (SHARED / "data").glob("*.jsonl")
             for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
             for text in strings(json.loads(line))} | set(NASTY)
    assert len(texts) > 1000
    texts = sorted(texts)
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["tiny", "transformers"])
def test_text_is_text(kind, tmp_path):
    """Control tokens written by a user stay text, and decoding gives back what was encoded."""
    if kind == "transformers":
        bpe_files(tmp_path)
    folder = m.TINY if kind == "tiny" else tmp_path
    ours, theirs = m.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert bool(ours.tiktoken) == (kind == "tiny") and len(ours) == len(theirs)
    for text in NASTY:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not {ours.bos_id, ours.eos_id} & set(ids), text
        assert ours.decode(ids) == text
        assert ours.decode([ours.bos_id, *ids, ours.eos_id]) == text
    assert all(type(i) is int for i in ours.encode_prompt("I saw"))


def test_half_a_character_does_not_stop_tiktoken():
    """A lone surrogate, which JSON can hold, is encoded as the replacement character."""
    tokenizer = m.Tokenizer(m.TINY)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path):
    """A model whose vocabulary is padded may sample ids that its tokenizer lacks."""
    for tokenizer in (m.Tokenizer(m.TINY), (bpe_files(tmp_path), m.Tokenizer(tmp_path))[1]):
        ids = tokenizer.encode("I saw")
        assert tokenizer.decode([len(tokenizer), *ids, len(tokenizer) + 50]) == "I saw"


def differing(folder, kind):
    """A copy of tiny/ whose tokenizer calls itself GPT-2's, and differs from it in one point."""
    tiny_copy(folder)
    if kind == "digits":  # as SmolLM
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        rule = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
        edit(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, rule]})
    elif kind == "prefix space":
        edit(folder / "tokenizer_config.json", add_prefix_space=True)
    elif kind == "no BOS":
        edit(folder / "tokenizer_config.json", bos_token=None)
    elif kind == "another EOS":
        edit(folder / "tokenizer_config.json", eos_token="!")
    elif kind == "template":
        edit(folder / "tokenizer_config.json", chat_template=CHATML)
    elif kind == "added token":
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.add_tokens(["superb"])
        theirs.save_pretrained(folder)
    elif kind == "token without a merge":
        edit(folder / "vocab.json", QX=733)
    elif kind == "merges out of order":
        version, *merges = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
        (folder / "merges.txt").write_text("\n".join([version, *merges[::-1]]), encoding="utf-8")
    elif kind == "tokenizer.json alone":
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).unlink()
    return folder


@pytest.mark.parametrize("kind", [
    "digits", "prefix space", "no BOS", "another EOS", "template", "added token",
    "token without a merge", "merges out of order", "tokenizer.json alone"])
def test_lookalikes_of_gpt2_go_to_transformers(kind, tmp_path):
    """A tokenizer that cuts text unlike GPT-2's gives transformers' ids, not tiktoken's."""
    folder = differing(tmp_path / "copy", kind)
    ours, theirs = m.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.tiktoken is None
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    plain = m.Tokenizer(m.TINY)
    texts = ["The cast was superb in 1984 and 2001.", "QX QX1", " the the", "I saw in the film."]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    alike = all(ours.encode(text) == plain.encode(text) for text in texts)
    assert alike == (kind not in ("prefix space", "added token", "merges out of order"))
    if kind == "digits":
        rules = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert all(ours.encode(text) == rules.encode(text).ids for text in texts)


def test_template_writes_the_only_bos(tmp_path):
    """A BOS that the template emits is not doubled (EleutherAI/bergson#319)."""
    theirs = bpe_files(tmp_path, template=CHATML)
    ours = m.Tokenizer(tmp_path)
    ids = ours.encode_prompt(CHAT)
    assert ids.count(ours.bos_id) == 1 and ids[0] == ours.bos_id
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids.count(theirs.convert_tokens_to_ids("<|im_start|>")) == 2  # the user's, and ours
    assert theirs.decode(ids).endswith("<|im_start|>assistant\n")
    assert ours.encode_prompt("I saw") == [ours.bos_id, *ours.encode("I saw")]


def test_template_after_text_keeps_control_tokens(tmp_path):
    """encode() treats control tokens as text, and must not leave the template doing so too."""
    bpe_files(tmp_path, template=CHATML)
    ours = m.Tokenizer(tmp_path)
    before = ours.encode_prompt(CHAT)
    ours.encode("<s> is text")
    assert ours.encode_prompt(CHAT) == before


@pytest.mark.parametrize("template", [None, CHATML.replace("{{ bos_token }}", "")])
def test_tokenizer_without_bos(template, tmp_path):
    """No BOS, as in Qwen: no None among the ids (princeton-nlp/SimPO simpo_trainer.py:405-414)."""
    bpe_files(tmp_path, bos=None, template=template)
    ours = m.Tokenizer(tmp_path)
    assert ours.bos_id is None
    assert ours.encode_prompt("I saw") == ours.encode("I saw")
    prompt, response = ours.encode_example("I saw", " it", 20)
    assert all(type(i) is int for i in prompt + response) and response[-1] == ours.eos_id
    if template:
        assert all(type(i) is int for i in ours.encode_prompt(CHAT))


def test_template_gives_ids_not_a_batch(tmp_path):
    """Since transformers 5 templates give a BatchEncoding (natolambert/rlhf-book PR #416)."""
    bpe_files(tmp_path, template=CHATML)
    ours = m.Tokenizer(tmp_path)
    ids = ours.encode_prompt(CHAT)
    assert type(ids) is list and all(type(i) is int for i in ids)
    prompt, response = ours.encode_example(CHAT, "Yes.", 60)
    assert prompt == ids and response == [*ours.encode("Yes."), ours.eos_id]
    batch = sft.collate([(prompt, response)], "cpu")
    assert batch["input_ids"].shape == (1, len(ids) + len(response))


def test_messages_without_a_template(capsys):
    """A chat for a tokenizer that has no template ends with one line that says what to do."""
    tokenizer = m.Tokenizer(m.TINY)
    with pytest.raises(SystemExit) as stop:
        tokenizer.encode_prompt(CHAT)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert "no chat template" in lines[0] and "prompts as strings" in lines[0]


def test_template_that_refuses(tmp_path, capsys):
    """Many templates know no system role, or want turns to alternate: one line, no traceback."""
    bpe_files(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SystemExit) as stop:
        m.Tokenizer(tmp_path).encode_prompt(CHAT)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert "template" in lines[0] and "roles must alternate" in lines[0]


# ------------------------------------------------------------------------------- load and save


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_plain_transformers_loads_what_we_save(kind, tmp_path):
    """A saved folder is an ordinary one: equal logits and equal ids without a line of ours."""
    model, tokenizer = m.load_model(new_folder(tmp_path / "new", kind))
    m.save_model(model, tokenizer, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(theirs, model) and type(theirs) is type(model)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in NASTY:
        ids = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == tokenizer.encode(text)
    assert (fast.bos_token_id, fast.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    again, tokens = m.load_model(tmp_path / "saved")
    assert same(again, model) and tokens.encode("I saw") == tokenizer.encode("I saw")
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.name.startswith(".")]


def test_template_survives_saving(tmp_path):
    """The chat template travels with the model."""
    folder = new_folder(tmp_path / "new", "llama")
    bpe_files(folder, template=CHATML)
    model, tokenizer = m.load_model(folder)
    m.save_model(model, tokenizer, tmp_path / "saved")
    assert m.Tokenizer(tmp_path / "saved").encode_prompt(CHAT) == tokenizer.encode_prompt(CHAT)


def test_several_templates_are_saved_twice(tmp_path):
    """A tokenizer with several templates makes a folder, which a second save must get past too."""
    folder = new_folder(tmp_path / "new", "llama")
    bpe_files(folder, template={"default": CHATML, "other": "x" + CHATML})
    model, tokenizer = m.load_model(folder)
    for _ in range(2):
        m.save_model(model, tokenizer, tmp_path / "saved")
        again = m.load_model(tmp_path / "saved")[1].transformers
        assert again.chat_template == tokenizer.transformers.chat_template
    m.save_model(*m.load_model("tiny"), tmp_path / "saved")
    m.save_model(*m.load_model("tiny"), tmp_path / "fresh")
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("saved", "fresh")]
    assert names[0] == names[1]


@pytest.mark.parametrize("first, second", [("gpt2", "llama"), ("llama", "gpt2")])
def test_no_stale_files(first, second, tmp_path):
    """Another model over an old one: none of its files stays, and what is not a model's does."""
    folder = new_folder(tmp_path / "a", first)
    m.save_model(*m.load_model(folder), tmp_path / "run")
    run = tmp_path / "run"
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json",
             "chat_template.jinja", "added_tokens.json", "special_tokens_map.json",
             "tokenizer.model"]
    mine = ["metrics.jsonl", "args.json", "results.json", "samples.txt", "curves.png", "notes.json"]
    for name in stale + mine:
        (run / name).write_text("{}\n")
    model, tokenizer = m.load_model(new_folder(tmp_path / "b", second))
    m.save_model(model, tokenizer, run)
    m.save_model(model, tokenizer, tmp_path / "fresh")
    fresh = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in run.iterdir()} == fresh | set(mine)
    assert all((run / name).read_text() == "{}\n" for name in mine)
    loaded, tokens = m.load_model(run)
    assert same(loaded, model)
    assert tokens.encode("I saw") == tokenizer.encode("I saw")


# The tests of atomicity run this file as a script, which forks a child to be killed at every step.


def fingerprint(model, tokenizer):
    """A digest of a model's class and weights and of what its tokenizer does."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    digest.update(str(tokenizer.encode_prompt("I saw the film.")).encode())
    return digest.hexdigest()


def killed_at(moment, work, classes=()):
    """Fork a child that does `work` and dies at this moment, just before a file operation.

    Returns whether it died. classes: of the models whose save_pretrained counts too.
    """
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9), f"the child failed by itself: {code}"
        return code == 9
    try:
        ticks = itertools.count(1)

        def tick():
            if next(ticks) == moment:
                os._exit(9)

        def counted(function):
            def run(*args, **kwargs):
                tick()
                return function(*args, **kwargs)
            return run

        for owner, name in [(os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"),
                            (Path, "write_text"), (Path, "write_bytes"), (torch, "save"),
                            *((c, "save_pretrained") for c in classes)]:
            setattr(owner, name, counted(getattr(owner, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def two_models(case, tmp):
    kinds = {"same": ("gpt2", "gpt2"), "other": ("gpt2", "llama")}[case]
    models = [m.load_model(new_folder(tmp / str(i), kind)) for i, kind in enumerate(kinds)]
    with torch.no_grad():
        for parameter in models[1][0].parameters():
            parameter.add_(0.5)
    return models


def kill_while_saving(tmp, case):
    """Kill at every moment of saving a second model over a first; prints what was found after."""
    models = two_models(case, tmp)
    names = dict(zip(map(lambda pair: fingerprint(*pair), models), ("old", "new")))
    folder, found = tmp / "run", []
    classes = {type(model) for model, _ in models}

    def start_over():
        shutil.rmtree(folder, ignore_errors=True)
        m.save_model(*models[0], folder)
        (folder / "metrics.jsonl").write_text("mine\n")

    def check():
        name = names[fingerprint(*m.load_model(folder))]  # a KeyError if it is neither
        assert (folder / "metrics.jsonl").read_text() == "mine\n"
        return name

    for moment in itertools.count(1):
        start_over()
        died = killed_at(moment, lambda: m.save_model(*models[1], folder), classes)
        found.append(check())
        if moment % 4 == 1:  # the next save is not disturbed by what was left
            m.save_model(*models[0], folder)
            assert check() == "old" and not list(folder.glob(".*"))
        if not died:
            break
    # Killed once in the moves, then again at every moment of finishing them.
    committed = found.index("new") + 1
    for moment in itertools.count(1):
        start_over()
        assert killed_at(committed, lambda: m.save_model(*models[1], folder), classes)
        died = killed_at(moment, lambda: m.load_model(folder))
        assert check() == "new"
        if not died:
            break
    return {"found": found, "again": moment}


def kill_at_random(tmp, rounds=16):
    """SIGKILL a child that saves two models in turn, over and over, at random times."""
    models = two_models("other", tmp)
    names = dict(zip(map(lambda pair: fingerprint(*pair), models), ("old", "new")))
    folder, found, rng = tmp / "run", [], random.Random(0)
    m.save_model(*models[0], folder)
    (folder / "metrics.jsonl").write_text("mine\n")
    start = time.time()
    m.save_model(*models[0], folder)
    once = time.time() - start
    for _ in range(rounds):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                for i in itertools.count():
                    m.save_model(*models[i % 2], folder)
                    os.write(writing, b".")
            finally:
                os._exit(1)
        os.read(reading, 1)  # the child is at work
        time.sleep(rng.uniform(0, 4 * once))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(reading), os.close(writing)
        found.append(names[fingerprint(*m.load_model(folder))])
        assert (folder / "metrics.jsonl").read_text() == "mine\n"
    return found


def kill_while_saving_state(tmp):
    """Kill at every moment of writing a second state over a first, and in the midst of a write."""
    args = sft.parse_args(["--out", str(tmp)])
    model, _ = m.load_model(new_folder(tmp / "0", "gpt2"))
    optimizer = torch.optim.AdamW(model.parameters())
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    m.save_state(tmp, args, model, optimizer, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    save = torch.save

    def half(state, path):
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os._exit(9)

    found = []
    for moment in (0, 1, 2, 3):
        torch.save = half if moment == 0 else save
        died = killed_at(moment, lambda: m.save_state(tmp, args, model, optimizer, step=2))
        state = m.load_state(tmp, args)
        expected = first if state["step"] == 1 else dict(model.named_parameters())
        assert all(torch.equal(state["model"][name], p) for name, p in expected.items())
        found.append(state["step"])
    assert not died and not (tmp / "state.pt.new").exists()
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What the functions above find, run in one process of their own."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                        "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path_factory.mktemp("killed"))],
                          env=env, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["same", "other"])
def test_kill_while_saving(case, killed):
    """A kill before any file operation leaves exactly the old or exactly the new model."""
    found = killed[case]["found"]
    # One point of no return: old up to there, new from there on. The last save was not killed.
    assert found == sorted(found, reverse=True) and found[0] == "old" and found[-1] == "new"
    # save_pretrained, the list of files and the rename; then each file's move and the clean-up.
    assert found.count("old") >= 4 and found.count("new") >= 8 and killed[case]["again"] >= 8


def test_kill_at_random_times(killed):
    """The same for SIGKILL at any time, in the midst of writing a file too."""
    assert len(killed["random"]) == 16 and set(killed["random"]) == {"old", "new"}


def test_kill_while_saving_state(killed):
    """A kill while state.pt is written, or half of it is, leaves the state before it, whole."""
    assert killed["state"] == [1, 1, 1, 2]


# ------------------------------------------------------------------------- models that do not fit


def test_unknown_name_offline(tmp_path):
    """Without a network an unknown name ends within seconds, in one line that says what to do."""
    code = ("import sys, time, transformers, huggingface_hub; from model import load_model\n"
            "from transformers import AutoModelForCausalLM; start = time.time()\n"
            "try: load_model('no-such/model')\n"
            "finally: print(time.time() - start)")
    env = {key: value for key, value in os.environ.items()
           if not key.startswith("HF_") and "proxy" not in key.lower()}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=60)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "no-such/model" in lines[0] and "give a folder, or go online" in lines[0]
    assert float(done.stdout) < 5


def test_folder_without_config(tmp_path, capsys):
    """A folder that is no model is named, and not looked for on the hub."""
    refused(capsys, (str(tmp_path), "no config.json"), tmp_path)


def break_folder(folder, kind):
    """A copy of tiny/, broken in one way."""
    tiny_copy(folder)
    weights = folder / "model.safetensors"
    if kind == "pickled weights":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif kind == "missing weights":
        state = load_file(weights)
        del state["transformer.h.1.mlp.c_fc.weight"], state["transformer.h.1.mlp.c_fc.bias"]
        save_file(state, weights, metadata={"format": "pt"})
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100_000])
    elif kind == "weights of another width":
        edit(folder / "config.json", n_embd=64)
    elif kind == "small vocabulary":
        edit(folder / "config.json", vocab_size=700)
        weights.unlink()
    elif kind == "unknown kind":
        edit(folder / "config.json", model_type="abacus")
    elif kind == "broken config":
        (folder / "config.json").write_text('{"model_type": "gpt2"')
    elif kind == "no tokenizer":
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).unlink()
    elif kind == "broken merges":
        with (folder / "merges.txt").open("a") as file:
            file.write("lonely\n")
    elif kind == "broken vocab":
        (folder / "vocab.json").write_text("[]")
    elif kind == "broken tokenizer_config":
        (folder / "tokenizer_config.json").write_text("[]")
    elif kind == "broken tokenizer.json":
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": 1}')
    return folder


@pytest.mark.parametrize("kind, fragments", [
    ("pickled weights", ("pickled", "can run code", "safetensors")),
    ("missing weights", ("lack transformer.h.1.mlp.c_fc.bias and 1 more",)),
    ("truncated weights", ("cannot load a model", "SafetensorError")),
    ("weights of another width", ("cannot load a model", "size")),
    ("small vocabulary", ("733 tokens", "only 700", "do not belong together")),
    ("unknown kind", ("abacus",)), ("broken config", ("cannot be read",)),
    ("no tokenizer", ("tokenizer",)), ("broken merges", ("tokenizer files cannot be read",)),
    ("broken vocab", ("tokenizer files cannot be read",)),
    ("broken tokenizer_config", ("tokenizer files cannot be read",)),
    ("broken tokenizer.json", ("cannot load a tokenizer",))])
def test_broken_folder(kind, fragments, tmp_path, capsys):
    """A model folder that is damaged or incomplete is named, with what is wrong with it."""
    folder = break_folder(tmp_path / "broken", kind)
    refused(capsys, (str(folder), *fragments), folder)


def test_encoder_decoder(tmp_path, capsys):
    """A T5 has no log-probs of a prompt and its continuation: refused by kind."""
    folder = tiny_copy(tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    transformers.T5Config(vocab_size=733, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                          num_heads=2).save_pretrained(folder)
    refused(capsys, (str(folder), "'t5'", "decoder-only"), folder)
    refused(capsys, (str(folder), "'t5'", "decoder-only"), folder, head="reward")


def test_reward_model_is_no_language_model(tmp_path, capsys):
    """A reward model's folder loaded as a language model would get a random or wrong head."""
    m.save_model(*m.load_model("tiny", head="reward"), tmp_path)
    refused(capsys, (str(tmp_path), "a reward model, where a language model is needed"), tmp_path)


@pytest.mark.parametrize("config, changes", [
    ("Gemma2Config", dict(head_dim=8)), ("CohereConfig", {}),
    ("GraniteConfig", dict(logits_scaling=2.0)), ("PhiConfig", {})])
def test_more_than_a_matrix_after_the_hidden_states(config, changes, tmp_path, capsys):
    """Soft-capping, scaling or a bias after the head would make gathered log-probs wrong."""
    folder = new_folder(tmp_path / "new", config, **changes)
    name = config.removesuffix("Config")
    refused(capsys, (str(folder), f"{name}ForCausalLM", "one matrix product"), folder)


def test_gemma2_without_soft_capping_is_welcome(tmp_path):
    """It is what a model does that is refused, not its name."""
    folder = new_folder(tmp_path / "new", "Gemma2Config", head_dim=8, final_logit_softcapping=None)
    assert type(m.load_model(folder)[0]).__name__ == "Gemma2ForCausalLM"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_device(capsys):
    """A device that is not there is an error, while auto finds one that is."""
    there = torch.cuda.is_available()
    if not there:
        refused(capsys, ("--device cuda", "--device cpu"), "tiny", device="cuda")
    refused(capsys, ("--device abacus", "--device cpu"), "tiny", device="abacus")
    assert m.load_model("tiny", device="auto")[0].device.type == ("cuda" if there else "cpu")


@pytest.mark.parametrize("head", ["lm", "reward"])
def test_no_weights_are_random_and_the_same_each_time(head, tmp_path, capsys):
    """A folder without weights warns; its weights hang on no seed, and leave none changed."""
    folder = new_folder(tmp_path / "new", "llama")
    capsys.readouterr()
    torch.manual_seed(1)
    first, _ = m.load_model(folder, head=head)
    drawn = torch.rand(1)
    assert capsys.readouterr().err == f"warning: {folder} holds no weights, so they are random\n"
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # loading took nothing from the generator
    second, _ = m.load_model(folder, head=head)
    assert first.state_dict().keys() == second.state_dict().keys()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(next(first.parameters()).detach().std()) > 0


# ----------------------------------------------------------------------------- what is loaded


SEQUENCES = [([5, 6, 7], [8, 9, 2]), ([5], [11, 12, 13, 14, 2]), ([5, 6, 7, 8, 9, 10], [2])]


@pytest.mark.parametrize("script", [dpo, sft])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_log_probs_of_other_models(kind, script, tmp_path):
    """The gathered log-probs are log_softmax of the model's own logits, padded or alone."""
    model, _ = m.load_model(new_folder(tmp_path / "new", kind))
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform
            parameter.add_(torch.randn_like(parameter) * 0.3)
        sums, lengths = script.response_logps(model, script.collate(SEQUENCES, "cpu"))
        for i, (prompt, response) in enumerate(SEQUENCES):
            logps = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            positions = range(len(prompt) - 1, len(prompt + response) - 1)
            expected = sum(logps[t, token] for t, token in zip(positions, response, strict=True))
            assert abs(float(sums[i] - expected)) < 1e-4
            assert float(lengths[i]) == len(response)


@pytest.mark.parametrize("script", [dpo, sft])
def test_samples_ignore_generation_config(script, tmp_path):
    """Sampling is at temperature 1 over all tokens, whatever generation_config.json a model brings.

    generate fills what it is not told from there (huggingface/trl#3029, NVIDIA/NeMo-Aligner#46).
    """
    folder = tiny_copy(tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.1, "top_k": 1, "min_p": 0.9, "no_repeat_ngram_size": 1,
         "suppress_tokens": [13], "typical_p": 0.1, "min_new_tokens": 9}))
    answers = []
    for name in ("tiny", folder):
        model, tokenizer = m.load_model(name)
        prompts = [tokenizer.encode_prompt("I saw the film.")] * 8
        answers.append(script.sample(model, tokenizer, prompts, 10, seed=0)[0])
    assert model.generation_config.min_p == 0.9  # which is saved again, as it came
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)),
    ("llama", dict(attention_dropout=0.1)), ("qwen2", dict(attention_dropout=0.1))])
def test_dropout_is_off(kind, changes, tmp_path):
    """Dropout in the config: two passes in train() are bit-equal (huggingface/trl#744)."""
    model, _ = m.load_model(new_folder(tmp_path / "new", kind, **changes))
    assert not model.training
    model.train()
    batch = dpo.collate(SEQUENCES, "cpu")
    first, second = dpo.response_logps(model, batch)[0], dpo.response_logps(model, batch)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, dpo.response_logps(model.eval(), batch)[0])


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_faster_gelu_is_the_same_function(dtype, tolerance, tmp_path):
    """gelu_new is replaced by a fused kernel of the same formula, to 1e-6 and better."""
    folder = tiny_copy(tmp_path / "copy")
    edit(folder / "config.json", activation_function="gelu_new")
    ours, _ = m.load_model(folder, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert theirs.config.activation_function == "gelu_new"
    assert ours.config.activation_function == "gelu_pytorch_tanh"
    gap = (logits(ours) - logits(theirs.eval())).abs().max()
    assert 0 < float(gap) < tolerance
    x = torch.linspace(-9, 9, 9001)
    old, new = map(transformers.activations.ACT2FN.__getitem__, ("gelu_new", "gelu_pytorch_tanh"))
    assert float((old(x) - new(x)).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_reward_head(kind, tmp_path):
    """head="reward": one score a sequence; saved and loaded again it is the same one."""
    model, tokenizer = m.load_model(new_folder(tmp_path / "new", kind), head="reward")
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 16)
    assert logits(model).shape == (2, 1)
    m.save_model(model, tokenizer, tmp_path / "saved")
    again, _ = m.load_model(tmp_path / "saved", head="reward")
    assert same(again, model) and float(logits(model).std()) > 0


# ---------------------------------------------------------------------------------------- LoRA


def linear(kind, d_in, d_out):
    """A layer from d_in to d_out: GPT-2's keeps its weight transposed."""
    return Conv1D(d_out, d_in) if kind == "gpt2" else nn.Linear(d_in, d_out, bias=False)


def adapters(model):
    return [module for module in model.modules() if isinstance(module, m.LoRA)]


def randomise(model):
    """Give B values, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.B.normal_(std=0.05)


kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@kinds
def test_lora_starts_as_the_base(kind, tmp_path):
    """B = 0: the first output is bit-equal to the base model's, so the policy is the reference."""
    folder = new_folder(tmp_path / "new", kind)
    base, tuned = m.load_model(folder)[0], m.load_model(folder, lora_rank=2)[0]
    per_layer = 4 if kind == "gpt2" else 7  # attention and MLP, and not the head
    assert len(adapters(tuned)) == 2 * per_layer
    assert torch.equal(logits(base), logits(tuned))
    randomise(tuned)
    assert not torch.allclose(logits(base), logits(tuned), atol=1e-3)


@kinds
def test_lora_first_gradient(kind, tmp_path):
    """At step 0 the gradient of A is zero, because B is, and that of B is not."""
    model, _ = m.load_model(new_folder(tmp_path / "new", kind), lora_rank=2)
    dpo.response_logps(model, dpo.collate(SEQUENCES, "cpu"))[0].sum().backward()
    for adapter in adapters(model):
        assert not adapter.A.grad.any() and adapter.B.grad.any()
        assert adapter.base.weight.grad is None


@kinds
def test_lora_parameter_count(kind, tmp_path):
    """r (d + k) trainable parameters a layer: 22 at d = 6, k = 5, r = 2; and no others."""
    adapter = m.LoRA(linear(kind, 5, 6), 2)
    assert adapter.A.shape == (2, 5) and adapter.B.shape == (6, 2)
    assert adapter.A.numel() + adapter.B.numel() == 22
    model, _ = m.load_model(new_folder(tmp_path / "new", kind), lora_rank=3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(3 * sum(a.base.weight.shape) for a in adapters(model)) > 0


@kinds
def test_lora_scalar_example(kind):
    """W0 = 1, A = 2, B = 3, alpha = 2, r = 1, x = 1 give 13: the scale is there, once."""
    layer = linear(kind, 1, 1)
    adapter = m.LoRA(layer, 1)
    assert adapter.scale == m.LORA_ALPHA and m.LoRA(layer, 4).scale == m.LORA_ALPHA / 4
    adapter.scale = 2 / 1
    with torch.no_grad():
        for tensor, value in ((layer.weight, 1), (adapter.A, 2), (adapter.B, 3)):
            tensor.fill_(value)
        assert adapter(torch.ones(1, 1)).item() == 13 == adapter.merged_weight().item()


@kinds
def test_lora_merged_is_unmerged(kind, tmp_path):
    """In float64 merged and unmerged differ by less than 1e-12, weights transposed or not."""
    torch.manual_seed(0)
    adapter = m.LoRA(linear(kind, 5, 6), 2).double()
    adapter.B.data.normal_()
    x = torch.randn(3, 5, dtype=torch.float64)
    weight = adapter.merged_weight().T if kind == "llama" else adapter.merged_weight()
    plain = x @ weight + (adapter.base.bias if kind == "gpt2" else 0)
    assert float((adapter(x) - plain).detach().abs().max()) < 1e-12

    folder = new_folder(tmp_path / "new", kind)
    tuned, _ = m.load_model(folder, dtype="float64", lora_rank=2)
    randomise(tuned)
    merged, _ = m.load_model(folder, dtype="float64")
    before = logits(merged)
    merged.load_state_dict(m.merged_state_dict(tuned))
    assert float((logits(tuned) - before).abs().max()) > 1e-3
    assert float((logits(tuned) - logits(merged)).abs().max()) < 1e-12


@kinds
def test_lora_freezes_the_rest(kind, tmp_path):
    """Optimizer steps with weight decay leave every weight but the adapters' bit-identical."""
    model, _ = m.load_model(new_folder(tmp_path / "new", kind), lora_rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".A", ".B")) for name in trained)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        (-dpo.response_logps(model, dpo.collate(SEQUENCES, "cpu"))[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (name not in trained), name


@kinds
def test_lora_saves_an_ordinary_model(kind, tmp_path):
    """The saved folder has merged weights under ordinary names and the tuned model's logits."""
    folder = new_folder(tmp_path / "new", kind)
    base, _ = m.load_model(folder)
    model, tokenizer = m.load_model(folder, lora_rank=2)
    randomise(model)
    expected = logits(model)
    m.save_model(model, tokenizer, tmp_path / "saved")
    assert torch.equal(logits(model), expected)  # saving leaves the model as it was
    assert not list((tmp_path / "saved").glob("adapter*"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.state_dict().keys() == base.state_dict().keys()
    assert float((logits(theirs.eval()) - expected).abs().max()) < 1e-5
    assert float((logits(base) - expected).abs().max()) > 1e-3


@kinds
def test_lora_init_hangs_on_no_seed(kind, tmp_path):
    """A is random, but the same in each run (one seed for all: meta-pytorch/torchtune#2335)."""
    folder = new_folder(tmp_path / "new", kind)
    first, second = (adapters(m.load_model(folder, lora_rank=2)[0]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.A, b.A) and float(a.A.detach().std()) > 0 and not a.B.any()


@kinds
def test_lora_reward_model(kind, tmp_path):
    """The new head of a reward model is trained along, and saved with the merged weights."""
    model, tokenizer = m.load_model(new_folder(tmp_path / "new", kind), head="reward", lora_rank=2)
    assert model.score.weight.requires_grad and not isinstance(model.score, m.LoRA)
    randomise(model)
    m.save_model(model, tokenizer, tmp_path / "saved")
    again, _ = m.load_model(tmp_path / "saved", head="reward")
    assert float((logits(again) - logits(model)).abs().max()) < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(json.dumps({"same": kill_while_saving(place / "same", "same"),
                      "other": kill_while_saving(place / "other", "other"),
                      "random": kill_at_random(place / "random"),
                      "state": kill_while_saving_state(place / "state")}))
