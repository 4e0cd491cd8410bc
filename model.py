"""What the scripts share: models, tokenizers, LoRA, rows of data files, and the folder of a run.

No alignment algorithm is in this file. To copy a script into a project of your own, put your model,
tokenizer and logger in the place of these:

    model, tokenizer = load_model("tiny")       # or a folder, or a hub id such as "gpt2"
    save_model(model, tokenizer, "runs/mine")   # AutoModelForCausalLM.from_pretrained loads that
    run = Run(args)                             # args.json, metrics.jsonl, --resume, the last table

No code from a hub is ever run.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
import warnings
import zlib
from datetime import timedelta
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

TINY = Path(__file__).resolve().with_name("tiny")
LORA_ALPHA = 16
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # number of this process; 0 prints and saves
READ = []  # [what, checksum] of each model and data file that this run has read


def one_line(message, *_):
    return f"warning: {printable(' '.join(str(message).split()))}\n"


logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.formatwarning = one_line  # each text is shown once
if hasattr(sys.stdout, "reconfigure"):  # what the console cannot show is "?"
    sys.stdout.reconfigure(errors="replace")


def fail(*messages):
    """End the program because of bad input: one line on stderr, exit code 2, no traceback."""
    if RANK:
        time.sleep(3)  # if rank 0 fails as well, torchrun ends this process before it prints
    print("error:", printable(" ".join("; ".join(messages).split())), file=sys.stderr)
    raise SystemExit(2)


def printable(text):
    """The text without control characters, which could move the cursor or clear the screen."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # all but tab and newline


# -------------------------------------------------------------------------------------- models


def load_model(name="tiny", head="lm", device="cpu", lora_rank=0):
    """Load a decoder-only model and its tokenizer, with fp32 weights.

    name: "tiny" (the embedded model), a folder, or a hub id. A folder with config and tokenizer but
        no weights gives random weights and a warning.
    head: "lm", or "reward" for a sequence-classification model with one label.
    lora_rank: if above 0, only LoRA adapters (and a reward head) are trained.
    Returns (model, Tokenizer). Ends with one line and exit code 2 if the model cannot be used.
    """
    folder = TINY if name == "tiny" else name
    auto = AutoModelForSequenceClassification if head == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # new weights (a reward head, adapters) are the same in each run
    info = {"missing_keys": (), "unexpected_keys": set(), "mismatched_keys": ()}
    try:
        tokenizer = Tokenizer(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if head == "reward":  # without a padding token: transformers then scores the last token
            config.num_labels, config.pad_token_id = 1, None
        activation = getattr(config, "activation_function", None)
        if activation == "gelu_new":  # the same function as one kernel: 40 % less memory
            config.activation_function = "gelu_pytorch_tanh"
        if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
            if list(Path(folder).glob("*.bin")):
                fail(f"{name}: only pickled weights, which can run code; convert to safetensors")
            warnings.warn(f"{name} holds no weights, so they are random")
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            model, info = auto.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
        if activation:
            model.config.activation_function = activation  # what is saved names what was loaded
    except Exception as error:  # transformers raises many kinds
        fail(f"{name}: cannot load this model; give a folder with all its files, or a hub id that "
             f"can be reached ({type(error).__name__}: {str(error)[:300]})")
    check_weights(model, name, info)
    model.eval()  # dropout would give two passes of one model different log-probs
    tokenizer.size = model.get_input_embeddings().num_embeddings
    if tokenizer.eos_id >= tokenizer.size:
        fail(f"{name}: the model has no embedding for its tokenizer's EOS, so no response could "
             "end; take the tokenizer that belongs to the model")
    check_model(model, name, tokenizer.size)  # on the CPU, in fp32
    try:
        model.to(device)
        if str(device).startswith("cuda"):  # TF32: tensor cores multiply what stays in fp32
            torch.set_float32_matmul_precision("high")
    except (AssertionError, RuntimeError) as error:
        fail(f"--device {device}: cannot be used here ({str(error).splitlines()[0]})")
    if lora_rank:
        add_lora(model, lora_rank)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer.context = positions or tokenizer.context
    model.small = model.num_parameters() < 1e7  # tiny, or trained from it: it has seen only toys
    if head == "lm":
        stops = model.generation_config.eos_token_id  # None, one id, or a list
        stops = set(stops if isinstance(stops, list) else [stops])
        # Some configs name an id of another tokenizer, where an ordinary word stands in this one.
        tokenizer.stop_ids |= stops & set(tokenizer.transformers.added_tokens_decoder)
    return model, tokenizer


@torch.no_grad()
def check_weights(model, name, info):
    """End with one line if weights are missing, broken, or of another kind of model."""
    saved_as_reward = "SequenceClassification" in str(model.config.architectures)
    if "SequenceClassification" in type(model).__name__ and not hasattr(model, "score"):
        fail(f"{name}: {type(model).__name__} has no score layer that the scripts find")
    if saved_as_reward and not hasattr(model, "score"):
        fail(f"{name}: this is a reward model, and a language model is needed")
    for weight, saved, expected in info["mismatched_keys"]:
        fail(f"{name}: {weight} is {tuple(saved)} in its weights, and has to be {tuple(expected)}; "
             "see config.json (a reward is one number)")
    missing = sorted(info["missing_keys"])
    if missing and (missing != ["score.weight"] or saved_as_reward):
        fail(f"{name}: its weights lack {missing[0]} and {len(missing) - 1} more")
    unused = info["unexpected_keys"] - {"lm_head.weight", "score.weight"}
    if unused:
        warnings.warn(f"{name}: {len(unused)} of its weights are not used, such as {min(unused)}; "
                      "does config.json belong to them?")
    check_finite(model, f"{name}: its weights hold NaN or infinity; it was saved broken")
    checksum = 0
    for weight in model.parameters():
        checksum = zlib.crc32(weight.contiguous().numpy(), checksum)
    READ.append([f"the weights of {name}", checksum])
    if missing:  # a new reward head, as in Stiennon et al. 2020
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)


@torch.no_grad()
def check_model(model, name, size):
    """End with one line if the scripts would compute wrong log-probs with this model."""
    ids = torch.arange(8, device=model.device)[None] % size

    def states(T):
        return model.base_model(input_ids=ids[:, :T]).last_hidden_state  # (1, T, D)

    hidden = states(8)
    if not torch.allclose(hidden[:, :7], states(7), atol=1e-3 * float(hidden.std())):
        fail(f"{name}: in {type(model).__name__} a token sees those behind it, so it would see the "
             "answer; take a model with causal attention")
    if hasattr(model, "score"):  # a reward head, which the scripts do not take apart
        return
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    head.weight.mul_(1024)  # large logits, so that soft-capping shows
    logits = model(input_ids=ids).logits  # (1, 8, V)
    product = states(8) @ head.weight.T  # (1, 8, V); the head may be the embedding, too
    head.weight.div_(1024)  # exact, as 1024 is a power of two
    if bias is not None and bias.any() or not torch.allclose(
            logits, product, atol=1e-3 * float(product.std())):
        fail(f"{name}: {type(model).__name__} does more between its hidden states and its "
             "logits than one matrix product (a bias, scaling, soft-capping): not supported")


def check_finite(model, message):
    """End with this message if a weight is NaN or infinite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        fail(message)


def save_model(model, tokenizer, folder):
    """Write the model (adapters merged) and the tokenizer as plain transformers loads them."""
    check_finite(model, "training diverged: weights are NaN or infinite; use a lower --lr")
    if dist.is_initialized():  # from here on rank 0 works alone
        dist.destroy_process_group()
        if RANK:
            raise SystemExit(0)
    merge_lora(model)
    # Files of an older model here would be taken for parts of this one.
    old = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|chat_template\.jinja"
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in Path(folder).iterdir():
        if re.fullmatch(old, path.name):
            path.unlink()
    model.save_pretrained(folder)
    tokenizer.transformers.save_pretrained(folder)


# ---------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """An adapter: adds (alpha / r) B A x to the output W0 x of a layer (Hu et al. 2021, Eq. 3).

    B starts at zero, so the model computes at first what it computed before.
    """

    def __init__(self, weight, rank):
        super().__init__()
        d_out, d_in = weight.shape
        self.scale = LORA_ALPHA / rank
        self.A = nn.Parameter(torch.randn(rank, d_in).to(weight) * d_in**-0.5)
        self.B = nn.Parameter(weight.new_zeros(d_out, rank))

    def forward(self, layer, inputs, output):
        return output + self.scale * (inputs[0] @ self.A.T) @ self.B.T


def add_lora(model, rank):
    """Freeze the model and give each linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    total = model.base_model.num_parameters(exclude_embeddings=True)
    layers = [layer for layer in model.base_model.modules()
              if isinstance(layer, (nn.Linear, Conv1D))]
    if len({layer.weight for layer in layers}) < len(layers):
        fail("--lora_rank: some layers of this model share their weights, so no adapter could be "
             "added to one of them alone; leave the flag out")
    for layer in layers:
        layer.lora = LoRA(weight_of(layer), rank)
        layer.hook = layer.register_forward_hook(layer.lora)  # called after the layer
        if model.device.type == "cuda":  # as autocast would cast it, again for each token
            layer.weight.data = layer.weight.data.bfloat16()
    adapted = sum(layer.weight.numel() for layer in layers)
    print(f"LoRA: {adapted / total:.0%} of the parameters outside the embedding have an adapter")
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to the weights of their layers, and remove them."""
    for layer in list(model.modules()):
        if hasattr(layer, "lora"):
            layer.weight.data = layer.weight.data.to(layer.lora.A)  # fp32
            weight_of(layer).add_(layer.lora.scale * layer.lora.B @ layer.lora.A)  # (d_out, d_in)
            layer.hook.remove()
            del layer.lora, layer.hook


def weight_of(layer):
    """The weight of a linear layer, (d_out, d_in). GPT-2's Conv1D stores it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


# ---------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A transformers tokenizer; where the vocabulary is GPT-2's kind, tiktoken does the encoding.

    A prompt is a text, or a list of chat messages that the model's chat template renders, or such a
    list with tools: {"messages", "tools"}. A response is a text, or a message of the assistant. In
    a text "<|endoftext|>" is encoded letter by letter; the template writes control tokens.
    """

    def __init__(self, folder):
        self.transformers = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tiktoken = gpt2_encoding(self.transformers)
        added = self.transformers.added_tokens_decoder
        self.hidden = {chr(0x10F000 + i): token.content  # control tokens, see `hide`
                       for i, token in enumerate(added.values()) if token.special}
        if not self.encode("a"):
            fail(f"{folder}: its tokenizer files are missing; put them into the folder")
        words = [x for x in self.transformers.get_vocab() if x.isascii() and x.isalpha()]
        word = max(words, key=len, default="a")
        if len(self.encode(word)) == len(word) > 1:
            warnings.warn(f"{folder}: its tokenizer has a token for {word!r}, and spells it letter "
                          "by letter; is merges.txt empty?")
        self.eos_id = self.transformers.eos_token_id
        if self.eos_id is None:
            fail(f"{folder}: its tokenizer has no EOS token, so no response could end; set "
                 "eos_token in tokenizer_config.json")
        bos = self.transformers.bos_token_id  # not every tokenizer puts it before a text
        self.bos_id = bos if bos in self.transformers.encode("a")[:1] else None
        self.stop_ids = {self.eos_id} | self.end_of_turn()  # load_model adds the model's own
        self.context = 1024  # positions of the model; load_model sets it
        self.size = 10**9  # rows of the model's embedding; load_model sets it

    def end_of_turn(self):
        """The control token that the chat template writes after a reply: {id}, or an empty set."""
        try:
            text = self.render([{"role": "user", "content": "Hello"}], "Reply")
        except Exception:  # there is no template, or it wants other messages
            return set()
        ids = self.encode(text.rpartition("Reply")[2], control=True)
        return set([i for i in ids if i in self.transformers.added_tokens_decoder][:1])

    def encode(self, text, control=False):
        """Token ids of a text. control: whether "<|endoftext|>" in it becomes the control token."""
        if self.tiktoken and not control:
            return self.tiktoken.encode_ordinary(text)
        ids = []
        for piece in re.split("([\U0010f000-\U0010ffff])", text):
            letters = self.hidden.get(piece)
            ids += self.transformers.encode(letters or piece, add_special_tokens=False,
                                            split_special_tokens=not control or bool(letters))
        return ids

    def hide(self, message):
        """The message with a private character for each control token that its content spells.

        A person who writes "<|im_end|>" must not end a turn: `encode` reads the letters.
        """
        content = message.get("content") or ""
        for character, token in self.hidden.items():
            content = content.replace(token, character)
        return message | {"content": content}

    def render(self, prompt, response=None):
        """The text of a prompt, ready for its response, or with the response."""
        if isinstance(prompt, str):
            return prompt + (response or "")
        tools = None
        if isinstance(prompt, dict):
            prompt, tools = prompt["messages"], prompt["tools"]
        begun = prompt[-1]["role"] == "assistant"  # the prompt ends with the start of the reply
        more = {"add_generation_prompt": not begun, "continue_final_message": begun}
        if response is not None:
            if isinstance(response, str):
                response = {"role": "assistant", "content": response}
            if begun:
                *prompt, start = prompt
                response = response | {"content": start["content"] + response["content"]}
            prompt, more = [*prompt, response], {}
        return self.transformers.apply_chat_template(
            [self.hide(message) for message in prompt], tools=tools, tokenize=False, **more)

    def encode_prompt(self, prompt, response=None):
        """Token ids of a prompt, ready for its response, or with it. An empty text becomes EOS."""
        chat = not isinstance(prompt, str)
        bos = [] if chat or self.bos_id is None else [self.bos_id]  # a template writes its own
        try:
            text = self.render(prompt, response)
        except Exception as error:  # there is no template, or it refuses a role, for example
            fail(f"the model's chat template cannot render {json.dumps(prompt)[:200]} ({error}); "
                 "give texts, or take an instruct model")
        ids = bos + self.encode(text, control=chat) or [self.eos_id]
        if max(ids, default=0) >= self.size:
            fail(f"the model has no embedding for {self.transformers.decode([max(ids)])!r}, which "
                 "its tokenizer knows; take the tokenizer that belongs to the model")
        return ids

    def encode_example(self, prompt, response, max_length, room=1):
        """(prompt ids, response ids), or None if the prompt leaves less room than `room`.

        A response ends with EOS, or with the token that the chat template writes after a reply. One
        that is too long is cut, and has no such end. Prompt and response are encoded as one text,
        unless one token would cover the end of the prompt and the start of the response.
        """
        ids, both = self.encode_prompt(prompt), self.encode_prompt(prompt, response)
        start, whole = self.render(prompt), self.render(prompt, response)
        if not whole.startswith(start):
            fail("the chat template writes a prompt differently when a reply follows, so it is "
                 f"unknown where the reply begins; give texts. Without a reply: {start[-200:]!r}")
        rest = both[len(ids):]
        if both[:len(ids)] != ids:
            rest = self.encode(whole[len(start):], control=not isinstance(prompt, str))
        rest.append(self.eos_id)
        length = 1 + next(i for i, token in enumerate(rest) if token in self.stop_ids)
        left = min(max_length, self.context) - len(ids)
        return (ids, rest[:min(length, left)]) if left >= room else None

    def decode(self, ids, whole=False):
        """The text of a response without the stop token at its end.

        whole: if the response was cut, drop its last, unfinished sentence.
        """
        cut = not ids or ids[-1] not in self.stop_ids
        kept = ids if cut else ids[:-1]
        # SentencePiece drops a leading space. So an "a" is decoded in front, and then removed.
        first, text = (self.transformers.decode([*self.encode("a"), *ids],
                                                clean_up_tokenization_spaces=False)
                       for ids in ([], kept))
        text = text[len(first):]
        if whole and cut:  # ends of sentences in Latin, Chinese, Hindi, Arabic and other scripts
            ends = ".!?…。！？．｡।॥؟۔։።။។"
            text = text[:max(map(text.rfind, ends)) + 1]
        return text

    def show(self, prompt, response):
        """Print an example: its prompt, and the tokens of its response."""
        print("prompt    :", repr(self.transformers.decode(prompt)))
        print("response  :", [self.transformers.decode([i]) for i in response])


def gpt2_encoding(tokenizer):
    """A tiktoken encoding that equals a tokenizer of GPT-2's kind; None for all other kinds."""
    byte = {character: b for b, character in bytes_to_unicode().items()}  # how GPT-2 spells bytes
    # Contractions, digits, spaces, accents, scripts and emoji, on which the two are compared.
    probe = ("I'd say it's  a test:\n\n\tin 2024, 1234567 naïve cafés — 漢字 🙂   "
             "they'll see...\n")
    if not all(token.special for token in tokenizer.added_tokens_decoder.values()):
        return None  # a word that was added to the vocabulary is not spelled by merges
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in tokenizer.get_vocab().items()
                 if i not in tokenizer.added_tokens_decoder}
        encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens={})
        if encoding.encode_ordinary(probe) == tokenizer.encode(probe, add_special_tokens=False):
            return encoding
    except (KeyError, ValueError):  # a token that is not made of GPT-2's bytes
        pass
    return None


# --------------------------------------------------------------------------------- data files


def read_jsonl(path):
    """The objects of a JSON Lines file. Each gets a key "where": file and line, for messages."""
    rows = []
    if Path(path).suffix in (".parquet", ".arrow", ".csv"):
        fail(f"{path}: not a file of JSON lines; datasets.load_dataset({Path(path).suffix[1:]!r}, "
             f'data_files="{path}")["train"].to_json("mine.jsonl") writes one')
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read ({error}); give a UTF-8 file of JSON lines")
    if text.lstrip().startswith("["):
        fail(f"{path}: this is one JSON array; write each row as an object on a line of its own, "
             "for example with jq -c '.[]'")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                if re.search(r"\\u[dD]", line):  # perhaps half an emoji, which no tokenizer takes
                    raw = json.dumps(json.loads(line), ensure_ascii=False)
                    line = raw.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                    if line != raw:
                        warnings.warn(f"{path}: holds halves of characters, which become \ufffd")
                rows.append(json.loads(line) | {"where": f"{path}:{number}"})
            except (ValueError, TypeError, RecursionError) as error:
                fail(f"{path}:{number}: not a JSON object ({error}); write one object on each line")
    READ.append([f"the rows of {path}", zlib.crc32(text.strip().encode())])
    return rows or fail(f"{path}: no rows in this file")


def check_text(row, key):
    """row[key], which has to be a text or a list of chat messages; ends with one line if not."""
    value, found = row.get(key), "is missing"
    if key in row:
        found = f"is {json.dumps(value)[:80]}"
    if isinstance(value, list) and value:
        odd = [x for x in value if not isinstance(x, dict) or not isinstance(x.get("role"), str)
               or not isinstance(x.get("content"), str) and not x.get("tool_calls")]
        found = f"holds {json.dumps(odd[0])[:80]}" if odd else ""
    if found and not isinstance(value, str):
        keys = [x for x in row if not re.match("where$|response ", x)]  # those of the file
        fail(f'{row["where"]}: "{key}" {found}; it has to be a text, or a list of messages with '
             f'"role" and "content"; the keys of this row are {keys}; docs/real_models.md shows '
             "what is read")
    return value


def read_row(row, tokenizer, *keys):
    """The row with its "prompt" as Tokenizer takes it, and with a response for each of `keys`.

    In a file a response may also be a list of messages that ends with it; those before it are the
    prompt. A reply that has more than role and content, such as tool calls, stays a message.
    """
    row, prompts = dict(row), []
    for key in keys:
        if isinstance(check_text(row, key), list):
            *before, reply = row[key]
            if reply["role"] != "assistant":
                fail(f'{row["where"]}: "{key}" ends with a message of the {reply["role"]}, and not '
                     "with a reply of the assistant")
            row[key] = reply if reply.keys() - {"role", "content"} else reply["content"]
            if before:
                prompts.append(before)
            elif isinstance(row.get("prompt"), str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if prompts:
        if isinstance(row.get("prompt"), list):
            prompts.append(row["prompt"])
        if prompts != [prompts[0]] * max(len(keys), len(prompts)):
            fail(f'{row["where"]}: the responses of this row are not all conversations with the '
                 "same prompt")
        row["prompt"] = prompts[0]
    warn_of_row(row, tokenizer, check_text(row, "prompt"), [row[key] for key in keys])
    if isinstance(row["prompt"], list) and row.get("tools"):
        row["prompt"] = {"messages": row["prompt"], "tools": row["tools"]}
    return row


def warn_of_row(row, tokenizer, prompt, responses):
    """Print, once for a file, what is in a row and will not do what a person may expect."""
    path, text = row["where"].rpartition(":")[0], str([prompt, responses])
    for token in tokenizer.hidden.values():
        if token in text:
            warnings.warn(f"{path}: a text spells the control token {token}, which is read as "
                          "plain letters; give messages, and the chat template writes it")
    if "" in responses:
        warnings.warn(f"{path}: a response is an empty text, which teaches to end at once")
    given = {key for key in row if row[key]}  # a file may have a column that is mostly empty
    unused = {"system", "functions", "documents", "images", "input", "history"} & given
    if isinstance(prompt, str):
        unused |= {"tools"} & given
        if tokenizer.transformers.chat_template:
            warnings.warn(f"{path}: a prompt is a plain text, so the chat template of this model "
                          "is not used; give messages to use it")
    if unused:
        warnings.warn(f'{path}: {sorted(unused)} beside "prompt" are not used; what the model is '
                      "to read has to stand in the prompt")


def add_to_prompt(prompt, before="", after=""):
    """The prompt with more text before and after it, in a chat in its last message."""
    if isinstance(prompt, str):
        return before + prompt + after
    if isinstance(prompt, dict):
        return prompt | {"messages": add_to_prompt(prompt["messages"], before, after)}
    *others, last = prompt
    if last["role"] == "assistant":
        fail("a prompt ends with the start of the reply, and this script would add to it; let each "
             f"prompt end with a message of the user: {json.dumps(last)[:80]}")
    return [*others, last | {"content": before + (last.get("content") or "") + after}]


def split_by_prompt(rows, count=16):
    """(rows to learn from, rows held out, held-out prompts).

    All rows of `count` prompts are held out. Where that is more than a tenth of the prompts, it is
    a tenth of them, but at least one. They are the same prompts for every seed.
    """
    if not rows:
        fail("no row is left; use a lower --max_new_tokens or, where there is one, a higher "
             "--max_length")
    prompts = sorted({json.dumps(row["prompt"], sort_keys=True) for row in rows})
    random.Random(0).shuffle(prompts)
    held_out = [json.loads(prompt) for prompt in prompts[:max(1, min(count, len(prompts) // 10))]]
    test = [row for row in rows if row["prompt"] in held_out]
    rows = [row for row in rows if row["prompt"] not in held_out]
    if not rows:
        fail("at least two different prompts are needed, since one of them is held out")
    print(f"held out: {len(test)} of {len(test) + len(rows)} rows, all those of {len(held_out)} of "
          f"{len(prompts)} prompts")
    return rows, test, held_out


def mean_by_prompt(numbers, prompts):
    """{name: mean, name_se: its standard error} for each name of {name: numbers (N,) of N rows}.

    Rows with one prompt may be alike, so the standard error counts prompts: the deviations of a
    prompt's rows are added up before they are squared. A NaN stands for no number.
    """
    places = {str(prompt): i for i, prompt in enumerate(prompts)}
    places = torch.tensor([places[str(prompt)] for prompt in prompts])  # (N,), one for each prompt
    metrics = {}
    for name, x in numbers.items():
        known = ~x.isnan()  # (N,)
        P = len(set(places[known].tolist()))
        if P:
            metrics[name] = float(x[known].double().mean())
        if P > 1:
            off = x[known].double() - metrics[name]
            sums = torch.zeros(len(x)).double().index_add(0, places[known], off)  # (N,)
            variance = float(sums.square().sum()) * P / (P - 1)
            metrics[f"{name}_se"] = math.sqrt(variance) / int(known.sum())
    return metrics


# --------------------------------------------------------------------------- several processes


def start_ranks(args):
    """Join the processes that torchrun has started, if it has. Only rank 0 shows anything."""
    if TORCHRUN and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(f"cuda:{os.environ['LOCAL_RANK']}")
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl",
                                timeout=timedelta(minutes=5))
        if RANK:
            sys.stdout = open(os.devnull, "w")
            sys.stderr.isatty = lambda: False  # then tqdm draws no bar
            warnings.simplefilter("ignore")


def share(items):
    """The items that this process works on: every world-size-th, beginning with its rank."""
    return items[RANK::dist.get_world_size()] if dist.is_initialized() else items


def all_gather(item):
    """The items of all processes, in a list: [item] without torchrun. Tensors must be on a CPU."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def add_gradients(model):
    """Make the gradient the sum over all processes. A process without a part adds 0."""
    for weight in model.parameters():
        if dist.is_initialized() and weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)


# --------------------------------------------------------------------------------- flags


def number(low, high=10**9):
    """An argparse type: a number from low to high, and a whole one if low is a whole number."""
    def convert(text):
        try:
            value = type(low)(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also for NaN
            kind = "whole number" if isinstance(low, int) else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind} from {low} to {high}")
        return value

    return convert


# Names for a flag's type. What is larger has no meaning, or no end.
NUMBERS = {"positive": number(1), "whole": number(0), "amount": number(0.0, 1e30),
           "fraction": number(0.0, 1.0), "real": number(-1e30, 1e30)}


def new_parser(file, text, defaults=None, trains=True):
    """A parser with the flags that `load_model` and `Run` read. A script adds its own.

    file: of the script, which names its --out. text: its docstring, of which --help shows the first
    line. defaults: see `fill_defaults`.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, convert in NUMBERS.items():
        parser.register("type", name, convert)
    flag = parser.add_argument
    if trains:
        flag("--model", default="tiny", help="tiny, a folder, or a hub id such as gpt2")
    flag("--out", default=f"runs/{Path(file).stem}", help="folder for all that the run makes")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    flag("--max_tokens", type="positive", default=4096,
         help="tokens in a pass through the model: bounds memory, changes no gradient")
    if not trains:
        parser.set_defaults(resume=False)
        return parser
    flag("--lora_rank", type="whole", default=0,
         help="train adapters of this rank, which need a higher --lr; 0: all weights")
    flag("--seed", type="whole", default=0, help="the same seed gives the same result")
    flag("--save_every", type="positive", default=50, help="steps between saved states")
    flag("--resume", action="store_true", help="go on from the last saved state in --out")
    if defaults:
        parser.epilog = "Defaults, of models below 10M, larger ones in the toy, with --data: " + (
            "; ".join(f"--{name} {values}" for name, values in defaults.items()))
    return parser


def fill_defaults(args, defaults, small):
    """Give each flag that was not given its default.

    defaults: {flag: (for a small model, for a larger one in the toy, for a larger one with --data)}
    """
    for flag, values in defaults.items():
        if getattr(args, flag, 0) is None:
            setattr(args, flag, values[0 if small else 2 if args.data else 1])


def warn_of_few(steps, args):
    """Say so if a file makes only a few updates."""
    if args.data and steps < 30 and not args.steps:
        warnings.warn(f"only {steps} updates, from which little is learned; use a lower "
                      "--batch_size or more --epochs")


# ---------------------------------------------------------------------------- a run's folder

PATHS = ("model", "reference", "policy", "generator", "reward_model", "judge", "data", "ptx_data")
# What may differ when a run is resumed. Of PATHS the content is compared.
FREE = ("out", "resume", "device", "save_every", "lr", "max_tokens", "samples", *PATHS)


class Run:
    """The folder --out: args.json, metrics.jsonl, state.pt for --resume, and the final report.

    With torchrun only rank 0 writes.
    """

    def __init__(self, args):
        start_ranks(args)
        READ.clear()
        self.args, self.folder = args, Path(args.out)
        self.state, self.metrics = self.folder / "state.pt", self.folder / "metrics.jsonl"
        for flag in ("out", *PATHS):
            path = getattr(args, flag, None)
            if path == "":
                fail(f"--{flag} is empty; is a variable of the shell not set?")
            if flag != "out" and self.folder.resolve() in (TINY, Path(path or TINY).resolve()):
                fail(f"--out {args.out}: a model has this folder or this name; give another folder")
            if path and Path(path).resolve() == self.metrics.resolve():
                fail(f"--{flag} {path}: this run would overwrite it; give another --out")
        if args.resume and not self.state.is_file():
            fail(f"--resume: no interrupted run in {args.out}; start one without --resume")
        try:
            if not RANK:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.metrics.open("a").close()  # tries to write it
        except OSError as error:
            fail(f"--out {args.out}: cannot be written ({error}); give another folder")

    def begin(self):
        """Begin a new run, now that all it needs has been read. An older one here goes."""
        if not RANK:
            self.state.unlink(missing_ok=True)
            self.metrics.write_text("")
            text = json.dumps(vars(self.args), indent=2) + "\n"
            (self.folder / "args.json").write_text(text)

    def load_state(self, model, optimizer, **new):
        """With --resume, put the saved state into model and optimizer; return the rest of it.

        A new run gets step 0 and the values in `new`. Comes after all models and data are read: a
        state is only taken if flags, data and weights are those that it was made with.
        """
        state = {"step": 0} | new
        self.flags = {key: value for key, value in vars(self.args).items() if key not in FREE}
        if not self.args.resume:
            self.begin()
            return state
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
            for key, value in self.flags.items():
                if value != state["flags"][key]:
                    fail(f"--resume: the run in {self.folder} was started with --{key} "
                         f"{state['flags'][key]}; give the same, or another --out")
            for (what, checksum), (_, before) in zip(READ, state["read"], strict=True):
                if checksum != before:
                    fail(f"--resume: {what} are not those that the run in {self.folder} began "
                         "with; give the same, or another --out")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if type(state["step"]) is not int or state["step"] < 0:
                raise ValueError("step")
            rows = self.metrics.read_text().splitlines(keepends=True)[:state["step"]]
        except Exception as error:  # torch raises many kinds for a file that is not its own
            fail(f"--resume: {self.state} is no state of this script with these models and data "
                 f"({type(error).__name__}); start again without --resume")
        if not RANK:  # without the lines of steps that will be made again
            self.folder.joinpath("metrics.new").write_text("".join(rows))
            os.replace(self.folder / "metrics.new", self.metrics)
        return state

    def save_state(self, step, model, optimizer, **rest):
        """Write all that --resume needs. A kill while writing leaves the previous state intact."""
        if RANK:
            return
        try:
            torch.save(dict(rest, flags=self.flags, read=READ, step=step, model=model.state_dict(),
                            optimizer=optimizer.state_dict()), self.folder / "state.new")
        except RuntimeError as error:  # the disk is full
            raise OSError(error)
        os.replace(self.folder / "state.new", self.state)

    def log(self, row):
        """Append a line to metrics.jsonl."""
        if not RANK:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def report(self, columns, samples, panels):
        """Print a table and samples; write results.json, samples.txt and curves.png.

        columns: {"before": metrics, "after": metrics}; a table row for each metric of the last,
        with its standard error, if there is one: name_se for the metric "name".
        samples: [{"prompt": text, "before": text, ...}]. panels: for each panel of the figure a
        list of names in metrics.jsonl.
        """
        if RANK:
            return
        last = list(columns.values())[-1]
        space = " " * 9 * any(key.endswith("_se") for key in last)
        table = " " * 25 + space.join(f"{column:>11}" for column in columns)
        for key in last:
            if not key.endswith("_se"):
                table += f"\n{key:25}"
                for column in columns.values():
                    value = column.get(key, "")
                    table += f"{value:11.3f}" if isinstance(value, float) else f"{value:>11}"
                    error = column.get(f"{key}_se")
                    table += space if error is None else f" +- {error:.3f}"
                table = table.rstrip()
        texts = [printable("\n".join(f"{key:9}: {text}" for key, text in sample.items()))
                 for sample in samples]
        (self.folder / "samples.txt").write_text("\n\n".join([table, *texts]), encoding="utf-8")
        (self.folder / "results.json").write_text(json.dumps(columns, indent=2))
        self.state.unlink(missing_ok=True)  # this run is complete
        if panels:
            from matplotlib.figure import Figure
            rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
            figure = Figure(figsize=(4 * len(panels), 3))
            for number, keys in enumerate(panels, 1):
                axis = figure.add_subplot(1, len(panels), number)
                for key in keys:  # a row without it leaves a gap
                    axis.plot([row.get(key) for row in rows], label=key)
                axis.set_xlabel("step")
                axis.legend()
            figure.savefig(self.folder / "curves.png", bbox_inches="tight")
        end = f"All that this run has made is in {self.folder}"
        print("\n\n".join(["", table, *texts[:4], end]))


def launch(train, args):
    """train(args). Ctrl-C (exit code 130), a full disk or memory (2) end it with one line."""
    try:
        return train(args)
    except (KeyboardInterrupt, OSError, SafetensorError, RuntimeError) as error:
        memory = "out of memory" in str(error) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        if RANK:  # rank 0 says it
            raise SystemExit(2)
        Path(args.out, "state.new").unlink(missing_ok=True)  # it may be half written
        remedy = "no state has been saved yet"
        if Path(args.out, "state.pt").exists():
            remedy = "add --resume to go on from the last saved state"
        if isinstance(error, KeyboardInterrupt):
            print("\nstopped;", remedy, file=sys.stderr)
            raise SystemExit(130)
        if memory:
            fail("out of memory: use a lower --max_tokens, which changes no gradient", remedy)
        fail(f"{args.out}: cannot be written ({error})", remedy)
