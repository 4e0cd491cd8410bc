"""Rows of real data, and models of real kinds, after public bug reports; the values are made up."""

import json
import warnings

import pytest
import torch
import transformers as hf
from test_model import bpe, edit, new_folder, refused
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

import dpo
import model as m
import sft

TURNS = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n"
         "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ASK, TELL = {"role": "user", "content": "In 2024?"}, {"role": "assistant", "content": "I saw it."}
NO = {"role": "assistant", "content": "No."}


@pytest.fixture
def chat(tmp_path):
    """A tokenizer whose turns end with <end>, while its EOS is </s>, and which adds no BOS."""
    theirs = bpe(tmp_path, template=TURNS)
    theirs.add_special_tokens({"additional_special_tokens": ["<end>"]})
    theirs.save_pretrained(tmp_path)
    return m.Tokenizer(tmp_path)


def spell(tokenizer, example):
    return [tokenizer.transformers.decode(ids) for ids in example]


def test_the_template_writes_the_tokens(chat):
    """A reply ends with the template's end of turn, where sampling stops, too, and not with an EOS
    that the model never writes. What the template writes behind it is not learned."""
    end = chat.transformers.convert_tokens_to_ids("<end>")
    assert chat.stop_ids == {chat.eos_id, end} and end != chat.eos_id
    example = chat.encode_example([ASK], "I saw it.", 99)
    assert spell(chat, example) == ["<|im_start|>user\nIn 2024?<end>\n<|im_start|>assistant\n",
                                    "I saw it.<end>"]
    assert example[0] == chat.encode_prompt([ASK]) and example[1][-1] == end
    assert chat.decode(example[1]) == "I saw it."
    longest = len(example[0]) + 2
    assert chat.encode_example([ASK], "I saw it.", longest) == (example[0], example[1][:2])


def test_a_begun_reply_is_continued(chat):
    prompt = [ASK, {"role": "assistant", "content": "I saw"}]
    assert spell(chat, chat.encode_example(prompt, " it.", 99)) == [
        "<|im_start|>user\nIn 2024?<end>\n<|im_start|>assistant\nI saw", " it.<end>"]
    assert chat.encode_prompt(prompt) == chat.encode_example(prompt, " it.", 99)[0]


def test_a_template_without_a_border_is_refused(chat, capsys):
    """As of models that think aloud only while they are asked."""
    chat.transformers.chat_template = TURNS.replace("assistant\n{%", "assistant\n<think>{%")
    with pytest.raises(SystemExit):
        chat.encode_example([ASK], "No.", 99)
    assert "differently when a reply follows" in capsys.readouterr().err


def test_sentencepiece_adds_no_space_of_its_own(tmp_path):
    """Prompt and response are one text, and a sample's own space survives its way through text."""
    rules = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                             normalizers.Replace(" ", "\u2581")])
    rules.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rules.train_from_iterator(["a", "b", "c", "d"] * 9, trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]))
    hf.PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>",
                               unk_token="<unk>").save_pretrained(tmp_path)
    ours = m.Tokenizer(tmp_path)
    for prompt, response in (("a b", " c"), ("a b\n", "c d"), ("a", "\nb")):
        start, rest = ours.encode_example(prompt, response, 99)
        assert start + rest[:-1] == ours.encode(prompt + response) and rest[-1] == ours.eos_id
    assert ours.decode(ours.encode_example("a b", " c d", 99)[1]) == " c d"
    assert ours.decode(ours.encode_example("a b", "c d", 99)[1]) == "c d"


@pytest.mark.parametrize("adds", [False, True])
def test_bos_only_where_the_tokenizer_adds_one(adds, tmp_path):
    """GPT-2 has a BOS and puts none before a text; tiny puts one."""
    hf.AutoTokenizer.from_pretrained(m.TINY, add_bos_token=adds).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", add_bos_token=adds)
    ours = m.Tokenizer(tmp_path)
    assert ours.encode_prompt("I saw") == [ours.eos_id] * adds + ours.encode("I saw")


ROWS = {  # several spellings of one pair
    "messages": {"prompt": [ASK], "chosen": [TELL], "rejected": [NO]},
    "texts as replies": {"prompt": [ASK], "chosen": TELL["content"], "rejected": "No."},
    "a text as prompt": {"prompt": "In 2024?", "chosen": [TELL], "rejected": [NO]},
    "conversations": {"chosen": [ASK, TELL], "rejected": [ASK, NO]},
    "UltraFeedback": {"prompt": "In 2024?", "chosen": [ASK, TELL], "rejected": [ASK, NO]},
    "all": {"prompt": [ASK], "chosen": [ASK, TELL], "rejected": [ASK, NO], "label": 3, "score": 1}}


@pytest.mark.parametrize("name", ROWS)
def test_spellings_of_one_pair(name, chat, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = m.read_row(ROWS[name] | {"where": "F:1"}, chat, "chosen", "rejected")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([ASK], "I saw it.", "No.")
    (tmp_path / "data").write_text(json.dumps({"messages": [ASK, TELL, ASK, NO]}))
    row, = sft.read_demonstrations(tmp_path / "data", chat)
    assert row["prompt"] == [ASK, TELL, ASK] and row["completion"] == "No."


REFUSED = {  # a row, and what the line says
    "role": ({"prompt": "A", "chosen": [TELL], "rejected": [ASK]}, "a message of the user"),
    "prompts": ({"chosen": [ASK, TELL], "rejected": [TELL, NO]}, "not all conversations"),
    "prompt": ({"prompt": [NO], "chosen": [ASK, TELL], "rejected": [ASK, NO]}, "not all conv"),
    "no prompt": ({"chosen": [TELL], "rejected": [NO]},
                  '"prompt" is missing; it has to be a text, or a list of messages with "role" and '
                  """"content"; the keys of this row are ['chosen', 'rejected']"""),
    "null": ({"prompt": [ASK | {"content": None}], "chosen": "a", "rejected": "b"},
             '"prompt" holds {"role": "user", "content": null}'),
    "parts": ({"prompt": [ASK | {"content": [{"type": "text", "text": "a"}]}], "chosen": "a",
               "rejected": "b"}, '"prompt" holds {"role": "user", "content": [{"type"'),
    "strings": ({"prompt": ["a"], "chosen": "a", "rejected": "b"}, '"prompt" holds "a"'),
    "no messages": ({"prompt": [], "chosen": "a", "rejected": "b"}, '"prompt" is []'),
    "number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, '"prompt" is 3'),
    "alpaca": ({"instruction": "A", "output": "B"}, "are ['instruction', 'output']"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "A"}]}, "are ['conversations']")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_found_is_named(name, chat, capsys):
    row, fragment = REFUSED[name]
    with pytest.raises(SystemExit) as stop:
        m.read_row(row | {"where": "F:7"}, chat, "chosen", "rejected")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: F:7: ") and error.count("\n") == 1
    assert fragment in error, error


def test_warnings_of_texts_come_once(chat):
    """Rendered control tokens teach a model to spell them; a text passes by the template. Python
    shows the same warning once, and these name the file and not the line."""
    with pytest.warns(UserWarning) as found:
        for i, text in enumerate(["plain", "<|im_start|>\nA<end>", "<|im_start|>\nB", "B"]):
            m.read_row({"prompt": text, "where": f"F:{i}"}, chat)
    texts = dict.fromkeys(str(warning.message) for warning in found)
    plain, *control = texts
    assert plain.startswith("F: ") and "give messages" in plain
    assert len(control) == 2 and all("control token" in text for text in control)
    assert chat.encode_prompt("<end>") != [max(chat.stop_ids)]


@pytest.mark.parametrize("kind, head, fragment", [
    ("MambaConfig", "reward", "for this kind of AutoModel: AutoModelForSequenceClassification"),
    ("T5Config", "lm", "for this kind of AutoModel: AutoModelForCausalLM")])
def test_models_that_cannot_be_used(kind, head, fragment, tmp_path, capsys):
    folder = new_folder(tmp_path / "new", kind, **{
        "MambaConfig": {"state_size": 4}, "T5Config": {"d_model": 16}}.get(kind, {}))
    refused(capsys, fragment, folder, head)


def test_lora_says_how_much_it_adapts(tmp_path, capsys):
    """The experts of a mixture have no linear layers, so they get no adapter."""
    folder = new_folder(tmp_path / "new", "MixtralConfig", num_local_experts=4)
    model, _ = m.load_model(folder, lora_rank=2)
    adapted = sum(x.weight.numel() for x in model.modules() if hasattr(x, "lora"))
    blocks = sum(p.numel() for name, p in model.named_parameters()
                 if not name.endswith((".A", ".B", "embed_tokens.weight", "lm_head.weight")))
    assert f"LoRA: {adapted / blocks:.0%} of the parameters" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["config", "token"])
def test_a_vocabulary_of_another_size(kind, tmp_path, capsys):
    """The true cause is named. A token more in the tokenizer does no harm until it is used."""
    folder = new_folder(tmp_path / "new", "llama")
    m.save_model(*m.load_model(folder), folder)
    if kind == "config":
        edit(folder / "config.json", vocab_size=330)
        refused(capsys, "weight is (320, 16) in its weights, and has to be (330, 16)", folder)
        return
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([f"<new{i}>" for i in range(60)])
    theirs.save_pretrained(folder)
    _, tokenizer = m.load_model(folder)
    tokenizer.encode_example("I saw", " it", 99)
    with pytest.raises(SystemExit):
        tokenizer.encode_prompt("<new59>")
    assert "no embedding for '<new59>'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("pos 1")])
def test_full_disk_is_one_line(error, tmp_path, capsys, monkeypatch):
    """Nothing half written stays, and the state before it does."""
    data = tmp_path / "data"
    data.write_text("\n".join(json.dumps({"prompt": f"I saw {i}", "chosen": " a", "rejected": " b"})
                              for i in range(9)))
    save, count = torch.save, []

    def full(state, path):
        count.append(path)
        if len(count) == 2:
            (tmp_path / "run" / "state.new").write_text("half")
            raise error
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        dpo.main(f"--data {data} --out {tmp_path / 'run'} --batch_size 2 --save_every 1 "
                 "--max_new_tokens 4".split())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "cannot be written" in line and "add --resume" in line
    assert line.count("\n") == 1 and not (tmp_path / "run" / "state.new").exists()
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 0


def test_unfinished_sentences_of_a_cut_sample(chat):
    ids = chat.encode("I saw it. In the")
    assert chat.decode(ids) == "I saw it. In the" and chat.decode(ids, whole=True) == "I saw it."
    assert chat.decode([*ids, chat.eos_id], whole=True) == "I saw it. In the"
