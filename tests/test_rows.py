"""Rows of real data, and models of real kinds, after public bug reports; the values are made up."""

import json
import re
import warnings

import pytest
import torch
import transformers as hf
from conftest import ROOT
from test_model import bpe, edit, new_folder, refused
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

import dpo
import hir
import model as m
import reward_model
import self_correct
import sft
from variants import rankings

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


def test_a_chat_has_one_bos(tmp_path):
    """The template writes it, and this tokenizer would add one, too, as Llama's does. A text gets
    the tokenizer's."""
    theirs = bpe(tmp_path, template="{{ bos_token }}" + TURNS)
    theirs._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", theirs.bos_token_id)])
    theirs.save_pretrained(tmp_path)
    ours = m.Tokenizer(tmp_path)
    assert ours.bos_id == ours.transformers.encode("a")[0] == theirs.bos_token_id
    for prompt in ([ASK], [ASK, TELL, ASK], "I saw"):
        for ids in (ours.encode_prompt(prompt), sum(ours.encode_example(prompt, "No.", 99), [])):
            assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1


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


REASONING = ("{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ' ' + m.name if m.name }}\n"
             "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
             "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
             "{% endfor %}<end>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}


@pytest.mark.parametrize("more, written", [
    (CALL | {"content": ""}, "<call>weather</call><end>"),
    (CALL | {"content": None}, "<call>weather</call><end>"),
    (CALL | {"content": "Wait."}, "Wait.<call>weather</call><end>"),
    ({"content": "42.", "reasoning_content": "6 * 7."}, "<think>6 * 7.</think>42.<end>")])
def test_a_reply_is_more_than_its_content(more, written, chat, tmp_path):
    """Tool calls and reasoning go to the template and are learned (fw-ai/cookbook#378,
    THUDM/slime#1008), and so does the name of who speaks."""
    chat.transformers.chat_template = REASONING
    rows = [{"messages": [ASK | {"name": "Ann"}, {"role": "assistant"} | more]}]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    row, = sft.read_demonstrations(tmp_path / "data", chat)
    prompt, response = spell(chat, chat.encode_example(row["prompt"], row["completion"], 99))
    assert response == written and prompt.startswith("<|im_start|>user Ann\n")


def test_columns_that_change_the_prompt(chat):
    """Tools go to the template (OpenRLHF/OpenRLHF#1079, huggingface/trl#6259); what the scripts
    cannot pass on is named once (hiyouga/LLaMA-Factory#5743), and a column without a value is not.
    """
    chat.transformers.chat_template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + TURNS
    row = {"messages": [ASK, TELL], "tools": [{"name": "weather"}], "system": "", "where": "F:1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = m.read_row(row, chat, "messages")
    text = spell(chat, chat.encode_example(read["prompt"], read["messages"], 99))
    assert text[0].startswith("weather <|im_start|>user\n") and text[1] == "I saw it.<end>"
    with pytest.warns(UserWarning, match=r"^F: \['system'\] beside \"prompt\" are not used"):
        m.read_row(row | {"system": "Be a pirate."}, chat, "messages")
    with pytest.warns(UserWarning, match=r"^F: \['tools'\] beside"):  # a text has no place for them
        m.read_row({"prompt": "A", "tools": [1], "where": "F:1"}, chat)


@pytest.mark.parametrize("said, right", [
    ("<think>\n\n</think>\n\nI saw it.", True), ("I saw it.", False), ("<think>\n</think>", False)])
def test_right_is_what_would_be_learned(said, right, chat, tmp_path):
    """A template may write an empty thinking block before each reply, which SFT teaches; then an
    answer is right with it (huggingface/trl#6966)."""
    block = "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' }}"
    chat.transformers.chat_template = TURNS.replace("{{ m['content']", block + "{{ m['content']")
    rows = [{"prompt": [ASK | {"content": f"{i}?"}], "answer": "I saw it."} for i in range(2)]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", str(tmp_path / "data")]
    args = hir.parse_args(flags)
    tasks, _ = hir.read_tasks(chat, args, 99)
    ids = chat.encode(said) + [max(chat.stop_ids)]
    assert hir.observe(tasks[0][0], chat.decode(ids), True)["answer"] == (
        "correct" if right else "wrong")
    args = self_correct.parse_args(flags)
    problem, = self_correct.read_problems(chat, args, 99)[0]
    assert self_correct.appraise(problem, chat.decode(ids), True, args).value == right


def test_what_a_person_spells_is_no_control_token(chat, tmp_path):
    """A chat that spells the end of a turn does not end there, on either side; what was sampled as
    a control token stays in the text (huggingface/trl#2897, volcengine/verl#1724). The names of
    control tokens need not be ASCII, as in DeepSeek's."""
    end, = chat.stop_ids - {chat.eos_id}
    prompt, reply = [ASK | {"content": "What is <end>?"}], "It is <end> or </s>, I saw."
    example = chat.encode_example(prompt, reply, 99)
    assert [ids.count(end) for ids in example] == [1, 1] and example[1][-1] == end
    assert not {chat.eos_id} & {*example[0], *example[1]} and chat.decode(example[1]) == reply
    assert "What is <end>?" in spell(chat, example)[0]
    assert chat.decode([*chat.encode("I"), end, *chat.encode(" saw"), end]) == "I<end> saw"
    chat.transformers.add_special_tokens({"additional_special_tokens": ["<｜end｜>"]})
    chat.transformers.save_pretrained(tmp_path)
    chat = m.Tokenizer(tmp_path)
    for text in ("<end>", "</s>", "<｜end｜>"):
        with pytest.warns(UserWarning, match="spells the control token " + text):
            m.read_row({"messages": [ASK, TELL | {"content": text}], "where": "F:1"}, chat,
                       "messages")


def test_nothing_is_added_to_a_begun_reply(chat, tmp_path, capsys):
    """A prompt that ends with the start of the reply (huggingface/transformers#32213) has no place
    for an instruction or a draft: they would be the assistant's own words."""
    row = {"prompt": [ASK, TELL], "answer": "No."}
    (tmp_path / "data").write_text(json.dumps(row))
    flags = ["--data", str(tmp_path / "data")]
    for add in (lambda: hir.read_tasks(chat, hir.parse_args(flags), 99),
                lambda: self_correct.read_problems(chat, self_correct.parse_args(flags), 99),
                lambda: self_correct.prompt_of(row, self_correct.Answer("No.", 0, "Wrong."))):
        with pytest.raises(SystemExit):
            add()
        line = capsys.readouterr().err
        assert "a prompt ends with the start of the reply" in line and line.count("\n") == 1
    asked = hir.ask({"prompt": [TELL, ASK]}, {"answer": "correct"})
    assert [x["content"] for x in asked] == [
        "I saw it.", "Generate a correct answer to this problem.\nIn 2024?"]


def test_half_a_character_becomes_the_replacement_character(tmp_path):
    """A lone surrogate (huggingface/transformers#8886, openai/tiktoken#82) is no text for any
    tokenizer. A whole pair of them is an emoji, which stays."""
    (tmp_path / "data").write_text('{"prompt": "I \\ud83d saw", "a": ["\\ude00"]}\n'
                                   '{"prompt": "\\ud83d\\ude00 \\\\ud83d"}')
    with pytest.warns(UserWarning, match="holds halves of characters") as found:
        first, second = m.read_jsonl(tmp_path / "data")
    assert (first["prompt"], first["a"]) == ("I \ufffd saw", ["\ufffd"]) and len(found) == 1
    assert second["prompt"] == "\U0001f600 \\ud83d"


@pytest.mark.parametrize("messages, fragment", [
    ([{"from": "human", "value": "A"}], '"messages" holds {"from": "human", "value": "A"}'),
    ([TELL], '"prompt" is missing'), ([], '"messages" is []'), ("Hello", '"prompt" is missing')])
def test_the_rows_own_keys_are_named(messages, fragment, chat, tmp_path, capsys):
    """As of exports of LLaMA-Factory and ShareGPT; "completion" was named once, which no such row
    has."""
    (tmp_path / "data").write_text(json.dumps({"messages": messages}))
    with pytest.raises(SystemExit):
        sft.read_demonstrations(tmp_path / "data", chat)
    line = capsys.readouterr().err
    assert fragment in line and "the keys of this row are ['messages']" in line


@pytest.mark.parametrize("change, fragment", [
    ({"ranks": 3}, '"responses" has to be a list'), ({"ranks": [1, 0]}, "whole numbers"),
    ({"ranks": [1, True]}, "whole numbers"), ({"ranks": [1, "2"]}, "whole numbers"),
    ({"responses": "ab"}, '"responses" has to be a list'),
    ({"responses": {"a": 1, "b": 2}}, '"responses" has to be a list'),
    ({"responses": ["a", 7]}, '"response 1" is 7'),
    ({"prompt": None}, "the keys of this row are ['prompt', 'responses', 'ranks']"),
    ({"ranks": [10**30, 3]}, None)])
def test_odd_rankings(change, fragment, tiny, capsys):
    """Only the order of ranks counts, however large they are."""
    row = {"prompt": "A", "responses": ["a", "b"], "ranks": [1, 2], "where": "F:7"} | change
    if fragment is None:
        assert reward_model.read_ranking(row, tiny[1])["ranks"] == [2, 1]
        return
    with pytest.raises(SystemExit):
        reward_model.read_ranking(row, tiny[1])
    line = capsys.readouterr().err
    assert line.startswith("error: F:7: ") and fragment in line, line


def test_ties_between_replies_that_are_messages(chat, tmp_path):
    """They cannot be sorted, and need not be."""
    replies = [TELL | {"name": "a"}, NO | {"name": "b"}, TELL]
    row = {"prompt": [ASK], "responses": [[x] for x in replies], "ranks": [2, 1, 2]}
    (tmp_path / "data").write_text(json.dumps(row))
    row, = rankings.read_rankings(tmp_path / "data", chat)
    assert row["ranks"] == (1, 2, 2) and row["chosen"] == replies[1]


@pytest.mark.parametrize("line, fragment", [
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not a JSON object"),
    ('{"a": ' + "1" * 5000 + "}", "not a JSON object"), ("[" * 100_000, "one JSON array")])
def test_json_that_cannot_be_read(line, fragment, tmp_path, capsys):
    (tmp_path / "data").write_text(line)
    with pytest.raises(SystemExit):
        m.read_jsonl(tmp_path / "data")
    assert fragment in capsys.readouterr().err


def test_empty_responses_are_named_once(tiny):
    with pytest.warns(UserWarning, match="^F: a response is an empty text, which teaches to end"):
        m.read_row({"prompt": "A", "chosen": "", "rejected": "b", "where": "F:1"}, tiny[1],
                   "chosen", "rejected")
    with pytest.warns(UserWarning, match="^F: a response is an empty text"):
        m.read_row({"prompt": "A", "answer": "", "where": "F:1"}, tiny[1], "answer")


def test_converters_of_other_formats(chat, tmp_path, monkeypatch):
    """What docs/real_models.md tells people with rows of other projects to do: each row that comes
    out is one that the scripts read."""
    page = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
    code, = re.findall("```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    row = {"instruction": "In", "input": "2024?", "output": "I saw it."}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(row))
    names = {}
    exec(code, names)
    question = ASK | {"content": "In\n2024?"}
    read, = sft.read_demonstrations("mine.jsonl", chat)
    assert (read["prompt"], read["completion"]) == ([question], "I saw it.")
    assert names["alpaca"]({"instruction": "A", "output": "B"})["messages"][0]["content"] == "A"
    turns = [("system", "Hi"), ("human", "In 2024?"), ("gpt", "I saw it.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert names["sharegpt"](row) == {
        "messages": [{"role": "system", "content": "Hi"}, ASK, TELL]}
    start = "\n\nHuman: A\n\nB?\n\nAssistant: No.\n\nHuman: In 2024?\n\nAssistant:"
    row = {"chosen": start + " I saw it.", "rejected": start + " No."}
    read = m.read_row(names["transcripts"](row) | {"where": "F:1"}, chat, "chosen", "rejected")
    assert read["prompt"] == [ASK | {"content": "A\n\nB?"}, NO, ASK]
    assert (read["chosen"], read["rejected"]) == ("I saw it.", "No.")
    assert names["transcript_texts"](row) == {
        "prompt": start, "chosen": " I saw it.", "rejected": " No."}
    assert names["plain"]({"text": " I saw\nit."}) == {"prompt": " I", "completion": " saw\nit."}
    row = {"info": {"post": "A."}, "choice": 1, "summaries": [{"text": " No."}, {"text": " It."}]}
    read = m.read_row(names["tldr"](row) | {"where": "F:1"}, chat, "chosen", "rejected")
    assert [read[key] for key in ("prompt", "chosen", "rejected")] == [
        "A.\n\nTL;DR:", " It.", " No."]
    row = {"question": "In 2024?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    read = m.read_row(names["gsm8k"](row) | {"where": "F:1"}, chat, "answer")
    assert read["prompt"] == [ASK] and hir.final(read["answer"], "number") == 42
    row = {"prompt": "In 2024?", "score_chosen": 8.0, "messages": [ASK, TELL],  # UltraFeedback
           "chosen": [ASK, TELL], "rejected": [ASK, NO]}
    read = m.read_row(row | {"where": "F:1"}, chat, "chosen", "rejected")
    assert (read["prompt"], read["chosen"], read["rejected"]) == ([ASK], "I saw it.", "No.")
