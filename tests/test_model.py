"""Loading and saving: tokenizers, models, models that do not fit, saved states, LoRA."""

import contextlib
import io
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dpo
import model as m
from reward_model import reward_scores

SHARED = ROOT.parent / "shared"
NASTY = ["", " ", "     \n\n \t\t x  ", "tabs\tand\r\nreturns\r", "naïve “café” — e\u0301 vs é",
         "日本語テキスト 🤗👩‍👩‍👧‍👦 ñ", "\u200b\ufeff\u00a0\u2028end", "we'll we’ll I'm DON'T",
         "1234567 in 2024 ½²", "a<|endoftext|>b<|endoftext|>", "<s></s><|im_start|>user",
         "\x00\x07\x1b[0m", " " * 300 + "!", "if a:\n        return {'b': [1, 2]}  # c\n"]
SEQUENCES = [([5, 6, 7], [8, 9, 2]), ([5], [11, 12, 13, 14, 2])]
kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings))


def bpe(folder, bos="<s>", template=None):
    """Save a small byte-level BPE that cuts digits one by one, unlike GPT-2; returns it."""
    rules, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.pre_tokenizer, rules.decoder = level, decoders.ByteLevel()
    rules.train_from_iterator(["I saw the film in 2024."] * 3, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=level.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|im_start|>"]))
    rules.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=rules, bos_token=bos, eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def new_folder(folder, kind, **changes):
    """A folder with a small config and a tokenizer, but without weights."""
    if kind == "gpt2":
        shutil.copytree(m.TINY, folder, ignore=lambda *_: {"model.safetensors", "make.py"})
        small = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2,
                 "activation_function": "gelu_new"}
        hf.GPT2Config.from_pretrained(m.TINY, **small | changes).save_pretrained(folder)
    else:
        bpe(folder)
        small = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                 "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 0}
        name = {"llama": "LlamaConfig"}.get(kind, kind)
        getattr(hf, name)(**small | changes).save_pretrained(folder)
    return folder


def logits(model):
    """Logits of 2 sequences of 7 tokens, one after the other: reward models have no padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=ids[None]).logits for ids in torch.arange(14).view(2, 7)])


def refused(capsys, fragment, *args, **settings):
    """load_model ends with exit code 2 and one line, which holds the folder and this fragment."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        m.load_model(*args, **settings)
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {args[0]}")
    assert fragment in lines[0], lines[0]


@pytest.mark.parametrize("folder", [m.TINY, SHARED / "gpt2", None], ids=["tiny", "gpt2", "other"])
def test_text_is_text(folder, tmp_path):
    """tiktoken gives the ids of transformers, and what a user writes never becomes a control token.
    A tokenizer that cuts text unlike GPT-2 is left to transformers."""
    if folder and not (folder / "vocab.json").exists():
        pytest.skip("needs GPT-2's tokenizer files in ../shared")
    if folder is None:
        bpe(tmp_path)
    ours = m.Tokenizer(folder or tmp_path)
    theirs = hf.AutoTokenizer.from_pretrained(folder or tmp_path)
    assert bool(ours.tiktoken) == bool(folder)
    for text in NASTY + [path.read_text() for path in ROOT.glob("*.py")]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert ours.eos_id not in ids and ours.decode([*ids, ours.eos_id]) == text


@kinds
@pytest.mark.parametrize("head", ["lm", "reward"])
def test_plain_transformers_loads_what_we_save(kind, head, tmp_path):
    """A saved folder is an ordinary one: equal weights, logits and ids without a line of ours."""
    model, tokenizer = m.load_model(new_folder(tmp_path / "new", kind), head)
    (tmp_path / "run").mkdir()
    m.save_model(model, tokenizer, tmp_path / "run")
    auto = hf.AutoModelForCausalLM if head == "lm" else hf.AutoModelForSequenceClassification
    theirs, again = auto.from_pretrained(tmp_path / "run"), m.load_model(tmp_path / "run", head)
    new, saved = (json.loads((tmp_path / folder / "config.json").read_text())
                  for folder in ("new", "run"))
    allowed = {"architectures", "dtype", "pad_token_id", "num_labels", "id2label", "label2id"}
    assert {key for key in new if saved.get(key) != new[key]} <= allowed
    for other in (theirs.eval(), again[0]):
        assert torch.allclose(logits(other), logits(model), atol=1e-6)
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    fast = hf.AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = [fast.encode(text, add_special_tokens=False, split_special_tokens=True) for text in NASTY]
    assert ids == list(map(tokenizer.encode, NASTY)) == list(map(again[1].encode, NASTY))
    if head == "reward":  # one number, read at EOS; the init of Stiennon et al. 2020
        score = theirs(input_ids=torch.tensor([[5, tokenizer.eos_id]])).logits  # (1, 1)
        ours = reward_scores(model, [([5], [tokenizer.eos_id])])  # other shapes in the head, so it
        assert torch.allclose(ours, score[0], atol=1e-6)  # may add 16 products in another order
        assert model.get_input_embeddings().padding_idx is None  # else EOS would get no gradient
        assert float(m.load_model("tiny", head)[0].score.weight.detach().std()) * 129**0.5 == (
            pytest.approx(1, rel=0.2))


def test_no_part_of_an_older_model_stays(tmp_path):
    """transformers would take an older file beside new shards, or an older index beside a new
    file, for the model."""
    model, tokenizer = m.load_model("tiny")
    for size in ("10GB", "1MB", "10GB", "1MB"):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        save = type(model).save_pretrained
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "save_pretrained", lambda self, folder: save(
                self, folder, max_shard_size=size))
            m.save_model(model, tokenizer, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == (1 if size == "10GB" else 3)
        assert torch.equal(m.load_model(tmp_path)[0].lm_head.weight, model.lm_head.weight)


def test_nothing_but_the_models_own_files_is_written(tmp_path):
    """Loading changes nothing in a folder or around it, whatever somebody has put there; saving
    writes the model's files, and deletes none of others."""
    def contents():
        return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
                for path in tmp_path.rglob("*")}

    folder = tmp_path / "run"
    shutil.copytree(m.TINY, folder)
    for name in (".commit/files.json", "half.new/model.safetensors", "tokenizers/mine.py",
                 "tokenizer_utils.py", "my.safetensors", "checkpoint-1.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('["../planted.py"]')
    os.symlink("../elsewhere", folder / "model.safetensors.new")
    before = contents()
    model = m.load_model(folder)
    assert contents() == before
    m.save_model(*model, folder)
    changed = {path.name for path, content in contents().items() if before.get(path) != content}
    assert before.keys() <= contents().keys() and changed <= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}


@kinds
@pytest.mark.parametrize("head", ["lm", "reward"])
def test_no_weights_are_random_and_the_same_each_time(kind, head, tmp_path):
    """Also adapters and a new reward head hang on no seed (meta-pytorch/torchtune#2335)."""
    folder = new_folder(tmp_path / "new", kind)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="holds no weights, so they are random"):
            weights.append(m.load_model(folder, head, lora_rank=seed and 2)[0].state_dict())
    assert all(map(torch.equal, *(w.values() for w in weights))) and weights[0].keys()


@kinds
def test_dropout_is_off_and_stop_ids_are_the_models(kind, tmp_path):
    """Dropout in the config: two passes are bit-equal (huggingface/trl#744: a DPO loss of 0.79 at
    step 1). generation_config may name more tokens that end a response, as Llama 3's does. An id
    that is an ordinary word in this tokenizer ends none (CodeGen#32)."""
    rates = ["resid_pdrop", "embd_pdrop", "attn_pdrop"] if kind == "gpt2" else ["attention_dropout"]
    folder = new_folder(tmp_path / "new", kind, **dict.fromkeys(rates, 0.5))
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<end>"]})
    theirs.save_pretrained(folder)
    end = theirs.convert_tokens_to_ids("<end>")
    edit(folder / "config.json", vocab_size=400 if kind == "llama" else 800)
    hf.GenerationConfig(eos_token_id=[7, 9]).save_pretrained(folder)
    m.save_model(*m.load_model(folder), folder)
    model, tokenizer = m.load_model(folder)
    first, second = (dpo.response_logps(model, SEQUENCES)[0] for _ in range(2))
    assert torch.equal(first, second) and not model.training
    assert tokenizer.stop_ids == {tokenizer.eos_id} and tokenizer.context == 64
    hf.GenerationConfig(eos_token_id=[7, end]).save_pretrained(folder)
    assert m.load_model(folder)[1].stop_ids == {tokenizer.eos_id, end}


def test_a_tokenizer_that_puts_a_space_in_front(tmp_path):
    """With add_prefix_space the helper of `decode` is " a", and all of it has to go."""
    shutil.copytree(m.TINY, tmp_path / "spaced")
    hf.AutoTokenizer.from_pretrained(m.TINY, add_prefix_space=True).save_pretrained(
        tmp_path / "spaced")
    tokenizer = m.load_model(tmp_path / "spaced")[1]
    assert tokenizer.transformers.tokenize("The plot")[0] != "The"
    assert tokenizer.decode(tokenizer.encode(" The plot was dull.")) == " The plot was dull."


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("config, changes", [
    ("Gemma2Config", {}), ("CohereConfig", {}), ("GraniteConfig", {"logits_scaling": 2.0}),
    ("PhiConfig", {})])
def test_more_than_a_matrix_after_the_hidden_states(config, changes, weights, tmp_path, capsys):
    """Soft-capping, scaling or a bias after the head would make gathered log-probs wrong, also
    where logits are still small. It is what a model does that is refused, not its name."""
    folder = new_folder(tmp_path / "new", config, **changes)
    if weights:
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder))
        if config == "PhiConfig":
            model.lm_head.bias.data.fill_(1e-4)  # far below the logits
        model.save_pretrained(folder)
    if weights or config != "PhiConfig":  # a new bias is zero
        refused(capsys, "one matrix product", folder)
    if config == "Gemma2Config" and not weights:
        edit(folder / "config.json", final_logit_softcapping=None)
        assert m.load_model(folder)


@pytest.mark.parametrize("kind, fragment", [
    ("NaN", "NaN or infinity"), ("a weight is missing", "lack transformer.ln_f.weight and 0 more"),
    ("reward model", "this is a reward model"), ("no EOS", "no EOS token"),
    ("reward model without a head", "lack score.weight"), ("pickled weights", "only pickled"),
    ("no tokenizer", "tokenizer"), ("noise", "cannot load"), ("no row for EOS", "no embedding")])
def test_broken_folder(kind, fragment, tmp_path, capsys):
    """A model folder that does not fit is named, with what is wrong with it."""
    folder, head = tmp_path / "broken", "lm"
    shutil.copytree(m.TINY, folder)
    path = folder / "model.safetensors"
    if kind.startswith("reward model"):
        m.save_model(*m.load_model("tiny", "reward"), folder)
    weights = load_file(path)
    if kind == "NaN":
        weights["transformer.ln_f.weight"][0] = float("nan")
    weights.pop({"a weight is missing": "transformer.ln_f.weight",
                 "reward model without a head": "score.weight"}.get(kind), None)
    save_file(weights, path, metadata={"format": "pt"})
    if kind == "reward model without a head":
        head = "reward"
    elif kind == "no EOS":
        bpe(folder)
        edit(folder / "tokenizer_config.json", eos_token=None)
    elif kind == "no row for EOS":
        theirs = hf.AutoTokenizer.from_pretrained(folder)
        theirs.add_special_tokens({"eos_token": "<eos>"})
        theirs.save_pretrained(folder)
    elif kind == "noise":
        path.write_bytes(b"noise")
    elif kind == "pickled weights":  # they could run code
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "no tokenizer":
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).unlink()
    refused(capsys, fragment, folder, head)


@pytest.mark.parametrize("kind, head", [(kind, head) for head in ("lm", "reward")
                                        for kind in ("gpt2", "llama", "MambaConfig")][:-1])
def test_lora(kind, head, tmp_path):
    """It starts as the base model, bit for bit (B = 0); only adapters of the blocks, and a reward
    head, are trained; what is saved is an ordinary model that does what the adapted one did."""
    folder = new_folder(tmp_path / "new", kind)
    base, _ = m.load_model(folder, head)
    model, tokenizer = m.load_model(folder, head, lora_rank=2)
    adapters = [module for module in model.modules() if isinstance(module, m.LoRA)]
    assert len(adapters) == 2 * (7 if kind == "llama" else 4)  # attention and MLP
    assert torch.equal(logits(base), logits(model))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        model(input_ids=torch.arange(14)[None]).logits.square().mean().backward()
        if step == 0:  # B is 0, so A has no gradient yet
            assert not any(a.A.grad.any() for a in adapters if a.A.grad is not None)
        optimizer.step()
    for name, p in model.named_parameters():
        trained = name.endswith((".A", ".B", "score.weight"))
        moved = trained and "dt_proj" not in name  # Mamba does not call this layer
        assert p.requires_grad == trained and torch.equal(p, start[name]) == (not moved), name
    adapted = logits(model)
    m.save_model(model, tokenizer, folder)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert (logits(base) - adapted).abs().max() > 1e-3
    auto = hf.AutoModelForCausalLM if head == "lm" else hf.AutoModelForSequenceClassification
    plain, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for merged in (model, plain.eval(), m.load_model(folder, head)[0]):
        assert torch.allclose(logits(merged), adapted, atol=1e-4 * float(adapted.abs().max()))


def test_lora_needs_weights_that_are_not_shared(tmp_path, capsys):
    """As in Zamba2: each of the layers would have an adapter, and the one weight all of them."""
    model, _ = m.load_model()
    model.transformer.h[1].attn.c_attn.weight = model.transformer.h[0].attn.c_attn.weight
    with pytest.raises(SystemExit):
        m.add_lora(model, 2)
    assert "some layers of this model share their weights" in capsys.readouterr().err


def test_models_are_checked_on_the_cpu(monkeypatch):
    """In TF32 or bf16 two passes of a causal model differ, so there it would be refused."""
    seen = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: seen.append(device))
    monkeypatch.setattr(m, "check_model", lambda model, *_: seen.append("checked"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    m.load_model(device="cuda")
    assert seen == ["checked", "cuda", "high"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_frozen_weights_are_bf16_on_cuda(kind, tmp_path, monkeypatch):
    """There autocast makes bf16 of them, and keeps no copy, since they want no gradient: it would
    do so again for every token. The log-probs are the same to the last bit, and fp32 is saved."""
    folder = new_folder(tmp_path / "new", kind)
    fp32, bf16 = (m.load_model(folder)[0] for _ in range(2))
    m.add_lora(fp32, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(bf16), "device", SimpleNamespace(type="cuda"))
        torch.manual_seed(1)
        m.add_lora(bf16, 2)
    for a, b in zip(fp32.modules(), bf16.modules(), strict=True):
        if isinstance(a, m.LoRA):
            a.B.data.normal_()
            b.load_state_dict(a.state_dict())
    found, casts = [], []
    for model in (fp32, bf16):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            found.append(logits(model))
        casts += [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    layers = [layer for layer in bf16.modules() if hasattr(layer, "lora")]
    assert torch.equal(*found) and casts[0] - casts[1] == 2 * len(layers)  # of 2 sequences
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    rounded, layer = layers[0].weight.float(), layers[0]
    delta = layer.lora.scale * layer.lora.B @ layer.lora.A  # (d_out, d_in)
    m.merge_lora(bf16)
    assert {weight.dtype for weight in bf16.state_dict().values()} == {torch.float32}
    assert torch.allclose(m.weight_of(layer), (rounded.T if kind == "gpt2" else rounded) + delta)


@pytest.mark.parametrize("kind", ["config", "tokenizer", "known"])
def test_no_code_of_a_folder_is_run(kind, tmp_path, monkeypatch, capsys):
    """transformers asks on the terminal whether it may run a folder's own code; nobody is asked
    here, and "y" on standard input runs nothing. A known kind of model needs no such code."""
    folder, ran = new_folder(tmp_path / "new", "llama"), tmp_path / "ran"
    m.save_model(*m.load_model(folder), folder)
    code = (f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
            "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n")
    (folder / "own.py").write_text(code)
    if kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
        edit(folder / "tokenizer_config.json", tokenizer_class="Own",
             auto_map={"AutoTokenizer": [None, "own.Own"]})
    else:
        edit(folder / "config.json", model_type="llama" if kind == "known" else "mine",
             auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if kind == "known":
        m.load_model(folder)
    else:
        refused(capsys, "cannot load this model", folder)
    assert not ran.exists()


def test_added_words_are_one_token(tmp_path):
    """Ordinary words that were added to GPT-2's vocabulary are not spelled by merges, so tiktoken
    would take them apart (huggingface/tokenizers#1309, minimaxir/gpt-2-simple#260)."""
    theirs = hf.AutoTokenizer.from_pretrained(m.TINY)
    theirs.add_tokens(["[MOL]", "<scene>"])
    theirs.save_pretrained(tmp_path)
    ours, text = m.Tokenizer(tmp_path), "I saw the [MOL] film <scene> last night."
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert {len(theirs) - 1, len(theirs) - 2} < {*ours.encode(text)} and ours.tiktoken is None


def test_no_word_ends_a_response(tmp_path):
    """A config may keep its class's default EOS, which is an ordinary word of this tokenizer
    (salesforce/CodeGen#32, huggingface/transformers#7275): it stays in the middle of a response."""
    folder = new_folder(tmp_path / "new", "llama")
    word = m.Tokenizer(folder).encode("#")[0]
    edit(folder / "config.json", eos_token_id=word)
    _, tokenizer = m.load_model(folder)
    ids = tokenizer.encode_example("A", "1 # 2 # 3", 64)[1]
    assert ids.count(word) == 2 and tokenizer.decode(ids) == "1 # 2 # 3"
    assert ids[-1] == tokenizer.eos_id and tokenizer.stop_ids == {tokenizer.eos_id}


@pytest.mark.parametrize("kind, head", [("Gemma3TextConfig", "lm"), ("Gemma3TextConfig", "reward"),
                                        ("BertConfig", "lm")])
def test_a_token_may_not_see_those_behind_it(kind, head, tmp_path, capsys):
    """With attention in both directions every token sees its answer, so the loss is too good
    (huggingface/transformers#31673, UKPLab/sentence-transformers#3513)."""
    folder = new_folder(tmp_path / "new", kind, use_bidirectional_attention=True)
    auto = hf.AutoModelForCausalLM if head == "lm" else hf.AutoModelForSequenceClassification
    config = hf.AutoConfig.from_pretrained(folder, num_labels=1)
    auto.from_config(config).save_pretrained(folder)
    refused(capsys, "a token sees those behind it", folder, head)
    if "Gemma" in kind:
        edit(folder / "config.json", use_bidirectional_attention=False)
        assert m.load_model(folder, head)


def test_weights_that_are_not_used_are_counted(tmp_path):
    """A config with fewer layers than the weights, and eight-bit weights beside their scales."""
    folder = tmp_path / "new"
    shutil.copytree(m.TINY, folder)
    edit(folder / "config.json", n_layer=1)
    with pytest.warns(UserWarning, match=r"new: 11 of its weights are not used, such as tran"):
        m.load_model(folder)
    edit(folder / "config.json", n_layer=hf.AutoConfig.from_pretrained(m.TINY).n_layer)
    weights = load_file(folder / "model.safetensors")
    large = [name for name, w in weights.items() if w.ndim == 2]
    for name in large:
        weights[name + ".scale"] = weights[name].abs().amax(1) / 127
        weights[name] = (weights[name] / weights[name + ".scale"][:, None]).to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=rf"new: {len(large)} of its weights are not used"):
        m.load_model(folder)


@pytest.mark.parametrize("content", ["", "#version: 0.2\n"])
def test_a_tokenizer_without_merges(content, tmp_path):
    """It spells each word letter by letter, and the model has never seen that."""
    shutil.copytree(m.TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "merges.txt").write_text(content)
    with pytest.warns(UserWarning, match="letter by letter; is merges.txt empty"):
        m.Tokenizer(tmp_path)


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_the_device_is_named(device, capsys, monkeypatch):
    """And not the model, which has nothing to do with it."""
    def to(*_):  # as where there is none
        raise AssertionError("Torch not compiled with CUDA enabled")

    if device == "cuda":
        monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(SystemExit) as stop:
        m.load_model(device=device)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"error: --device {device}: cannot be used")


@pytest.mark.parametrize("count, small", [(10**7 - 1, True), (10**7, False)])
def test_small_is_below_ten_million_parameters(count, small, monkeypatch):
    """The defaults and the toys of a script depend on it."""
    monkeypatch.setattr(hf.PreTrainedModel, "num_parameters", lambda *_: count)
    assert m.load_model()[0].small == small
