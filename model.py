"""Load and save: models, tokenizers, LoRA adapters, data files, the state and report of a run.

The one file that all scripts share, with the flags that they share; nothing in it is an algorithm:

    model, tokenizer = load_model("tiny")            # or a folder, or a hub id such as "gpt2"
    ids = tokenizer.encode_prompt("I saw the film.") # BOS or chat template included
    save_model(model, tokenizer, "runs/mine")        # plain transformers loads that folder

Weights are safetensors only, and no code from a hub is ever run.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn

TINY = Path(__file__).resolve().parent / "tiny"
END = "<|endoftext|>"
LORA_ALPHA = 16
# What belongs to a saved model: everything else in a run's folder is left alone by `save_model`.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
               "vocab.json", "merges.txt", "tokenizer*", "special_tokens_map.json",
               "added_tokens.json", "chat_template*", "additional_chat_templates")


def fail(message):
    """End the program on bad input: one line on stderr, exit code 2, no traceback."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """What the scripts need of a tokenizer: encode, encode_prompt, decode, save, bos_id, eos_id.

    GPT-2's kind (`vocab.json` and `merges.txt`, nothing added) runs on tiktoken, every other on
    transformers. Text is text: `<|endoftext|>` written by a user never becomes a control token
    (but for chat messages, whose template spells control tokens out: there it may).
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.tiktoken = self.transformers = None
        gpt2 = _read_gpt2_tokenizer(folder)
        if gpt2:
            self.tiktoken, self.bos_id, self.eos_id, self.files = gpt2
        else:
            from transformers import AutoTokenizer

            if not any(any(folder.glob(p)) for p in ("tokenizer.json", "vocab.*", "*.model")):
                fail(f"{folder}: no tokenizer in this folder; put the model's own files there")
            try:
                self.transformers = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # transformers raises whatever it stumbles over
                fail(f"{folder}: cannot load a tokenizer from this folder ({error})")
            self.bos_id = self.transformers.bos_token_id
            self.eos_id = self.transformers.eos_token_id
            if self.eos_id is None:
                fail(f"{folder}: its tokenizer has no EOS token, so no response could ever end; "
                     "set eos_token in tokenizer_config.json")

    def __len__(self):
        return self.tiktoken.n_vocab if self.tiktoken else len(self.transformers)

    def encode(self, text):
        """Token ids of a text, without any control token."""
        if self.tiktoken:
            return self.tiktoken.encode_ordinary(text)
        return self.transformers.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_prompt(self, prompt):
        """Token ids of a prompt: a string after one BOS (if there is one), or chat messages."""
        if isinstance(prompt, str):
            return [self.bos_id] * (self.bos_id is not None) + self.encode(prompt)
        if not getattr(self.transformers, "chat_template", None):
            fail("the prompt is a list of messages but this tokenizer has no chat template; "
                 "give prompts as strings, or a model with a chat template")
        try:  # the template itself writes BOS where the model wants one
            return self.transformers.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # templates raise errors of their own, on roles say
            fail(f"the chat template of this model refuses the prompt {prompt} ({error})")

    def encode_example(self, prompt, response, max_length):
        """(prompt ids, response ids with EOS), or None if the prompt leaves no room for a response.

        Tokenised apart, so that no token straddles the border. A response that is too long is cut,
        and then has no EOS: it did not end there.
        """
        prompt, response = self.encode_prompt(prompt), self.encode(response) + [self.eos_id]
        room = max_length - len(prompt)
        return (prompt, response[:room]) if prompt and room > 0 else None

    def decode(self, ids):
        """Text of token ids; control tokens such as EOS are left out."""
        if self.tiktoken:  # ids beyond the tokenizer's come from models with padded vocabularies
            return self.tiktoken.decode([i for i in ids if i < len(self) and i != self.eos_id])
        return self.transformers.decode(ids, skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)

    def show(self, prompt, response, most=20):
        """Print which tokens of an example count in the loss (mask 1) and which do not (mask 0)."""
        for mask, ids in ((0, prompt), (1, response)):
            shown = ids[-most:] if mask == 0 else ids[:most]
            control = "<EOS>" if mask else "<BOS>"
            pieces = "|".join(repr(self.decode([i]) or control)[1:-1] for i in shown)
            more = len(ids) > most
            print(f"mask {mask}: {'...|' * (more and not mask)}{pieces}{'|...' * (more and mask)}"
                  f"  ({len(ids)} tokens)")

    def save(self, folder):
        """Write the files that make `AutoTokenizer.from_pretrained(folder)` this tokenizer."""
        if self.transformers:
            self.transformers.save_pretrained(folder)
            return
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _read_gpt2_tokenizer(folder):
    """(tiktoken encoding, BOS id, EOS id, files) if the folder holds GPT-2's kind, else None."""
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
    files = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
    if not {"vocab.json", "merges.txt"} <= files.keys():
        return None
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        config = json.loads((folder / "config.json").read_bytes())
        kind = settings.get("tokenizer_class") or config["model_type"]
        fast = json.loads(files.get("tokenizer.json", b"{}"))
        vocab = json.loads(files["vocab.json"])
        merges = [line.split() for line in files["merges.txt"].decode().splitlines()
                  if line and not line.startswith("#version")]
        # Some models call their tokenizer GPT-2's and cut text differently: to transformers.
        pieces = fast.get("pre_tokenizer") or {"type": "ByteLevel"}
        control = [settings.get(key, END) for key in ("bos_token", "eos_token")]
        control = [t["content"] if isinstance(t, dict) else t for t in control]
        plain = (kind in ("gpt2", "GPT2Tokenizer", "GPT2TokenizerFast")
                 and control == [END, END] and len(vocab) == 256 + len(merges) + (END in vocab)
                 and not settings.get("add_prefix_space") and "chat_template" not in settings
                 and not (folder / "chat_template.jinja").exists()
                 and not (folder / "added_tokens.json").exists()
                 and {t["content"] for t in fast.get("added_tokens", [])} <= {END}
                 and pieces["type"] == "ByteLevel" and not pieces.get("add_prefix_space"))
        # tiktoken merges the pair with the lowest id first: right if ids rise along the merges.
        order = [vocab.get(a + b, -1) for a, b in merges]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{folder}: its tokenizer files cannot be read ({error!r})")
    if not plain or END not in vocab or sorted(set(order)) != order or -1 in order:
        return None
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's rule for cutting text

    # vocab.json spells the byte b as a printable character: itself if printable, else 256, 257...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
    eos = vocab.pop(END)
    ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    encoding = tiktoken.Encoding("gpt2-files", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={END: eos})
    return encoding, eos, eos, files


# -------------------------------------------------------------------------------------- models


def load_model(name="tiny", *, head="lm", device="cpu", dtype=None, lora_rank=0):
    """Load a decoder-only model and its tokenizer, ready for log-probs: dropout off, eval mode.

    name: "tiny" (the embedded model), a folder (ours, or from `save_pretrained`), or a hub id.
        A folder with config and tokenizer but no weights gives random weights and a warning.
    head: "lm", or "reward" for a sequence-classification model with one label.
    device: "auto" (cuda if there is one, else cpu) or any torch device; dtype: of the weights,
        fp32 unless told otherwise. lora_rank: if above 0, only LoRA adapters (and a reward head)
        are trained.
    Returns (model, Tokenizer). Ends with one line and exit code 2 if the model does not fit.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = _find(name)
    tokenizer = Tokenizer(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    auto = {"lm": transformers.AutoModelForCausalLM,
            "reward": transformers.AutoModelForSequenceClassification}[head]
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
        if config.is_encoder_decoder or type(config) not in auto._model_mapping.keys():
            fail(f"{name}: a {config.model_type!r} model; minalign needs a decoder-only one")
        if head == "lm" and "SequenceClassification" in str(config.architectures):
            fail(f"{name}: a reward model, where a language model is needed")
        if head == "reward":
            if "SequenceClassification" in str(config.architectures) and config.num_labels != 1:
                fail(f"{name}: a classifier of {config.num_labels} labels; a reward model has one")
            config.num_labels = 1
            if config.pad_token_id is None:  # without one, transformers scores one text at a time
                config.pad_token_id = tokenizer.eos_id
        # Dropout would make two passes of one model differ, and so every ratio of theirs.
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        # The same function of x, as one fused kernel instead of eight.
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        # New weights (a whole model, or a reward head) depend on nothing but the folder.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if any(folder.glob("*.safetensors")):
                model, info = auto.from_pretrained(
                    folder, config=config, dtype=dtype, local_files_only=True,
                    use_safetensors=True, trust_remote_code=False, output_loading_info=True)
                new = info["missing_keys"]
                missing = sorted(key for key in new if head == "lm" or "score" not in key)
                if missing:
                    fail(f"{name}: the weights lack {missing[0]} and {len(missing) - 1} more")
            elif any(folder.glob("*.bin")) or folder not in (TINY, Path(name)):
                fail(f"{name}: no safetensors weights; pickled ones can run code when they are "
                     "loaded, so convert them (save_pretrained of transformers does)")
            else:
                print(f"warning: {name} holds no weights, so they are random", file=sys.stderr)
                model, new = auto.from_config(config, dtype=dtype), {"score.weight"}
    except SystemExit:
        raise
    except Exception as error:  # transformers and safetensors raise a dozen kinds for a bad folder
        fail(f"{name}: cannot load a model from {folder} ({type(error).__name__}: {error})")
    vocabulary = len(model.get_input_embeddings().weight)
    if len(tokenizer) > vocabulary:
        fail(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}; "
             "they do not belong together")
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: {error}; --device cpu always works")
    if head == "lm":
        _check_head(model, name)
    elif not isinstance(getattr(model, "score", None), nn.Linear):
        fail(f"{name}: {type(model).__name__} has no linear head called score; it is not supported")
    elif "score.weight" in new:  # a new head: N(0, 1/(d + 1)), as Stiennon et al. 2020
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if lora_rank:
        with torch.random.fork_rng():  # the same adapters each time, as for new weights
            torch.manual_seed(0)
            add_lora(model, lora_rank)
    return model, tokenizer


def _find(name):
    """The folder of a model: `tiny`, a local folder, or a hub id, downloaded once and cached."""
    folder = TINY if str(name) == "tiny" else Path(name)
    _finish_save(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fail(f"{name}: no config.json in this folder, so it is not a model")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), ignore_patterns=["*/*", "consolidated*"],
                                      allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model",
                                                      "*.jinja"]))
    except Exception as error:  # no network, no such repository, not a valid id, a private one
        fail(f"{name}: no folder of that name here, and the Hugging Face hub gave nothing "
             f"({type(error).__name__}); check the spelling, or give a folder, or go online once")


@torch.no_grad()
def _check_head(model, name):
    """Log-probs are gathered from hidden states @ weight: refuse a model that does more."""
    head = model.get_output_embeddings()
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    seen = []

    def spy(module, inputs, output):
        seen.append(inputs[0])
        return torch.full_like(output, 50.0)  # large, so that soft-capping and scaling show

    handle = head.register_forward_hook(spy) if head is not None else None
    try:
        hidden = model.base_model(input_ids=ids, position_ids=ids).last_hidden_state
        logits = model(input_ids=ids, position_ids=ids).logits
        plain = (torch.equal(seen[0], hidden) and getattr(head, "bias", None) is None
                 and bool((logits == 50.0).all()))
    except (TypeError, AttributeError, IndexError):
        plain = False
    finally:
        if handle:
            handle.remove()
    if not plain:
        fail(f"{name}: {type(model).__name__} does more between its hidden states and its logits "
             "than one matrix product (a bias, scaling or soft-capping); it is not supported")


def save_model(model, tokenizer, folder):
    """Save model (LoRA merged) and tokenizer so that a kill at any moment loses nothing.

    A folder cannot be replaced in one move while it holds anything, so: write all files into
    `.new`, rename that to `.commit` (from this moment on the new model counts), then move the
    files into place one by one. Whoever finds a `.commit` finishes the moves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_save(folder)
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    model.save_pretrained(new, state_dict=merged_state_dict(model))
    tokenizer.save(new)
    names = sorted(path.name for path in new.iterdir())
    (new / "files.json").write_text(json.dumps(names))
    os.rename(new, folder / ".commit")
    _finish_save(folder)


def _finish_save(folder):
    """Complete a save that had counted already when it was cut off; else do nothing."""
    commit = Path(folder) / ".commit"
    if not commit.is_dir():
        return
    if (commit / "files.json").is_file():
        names = json.loads((commit / "files.json").read_text())
        for old in [p for p in Path(folder).iterdir() if any(map(p.match, MODEL_FILES))]:
            if old.is_dir() and (old.name not in names or (commit / old.name).exists()):
                shutil.rmtree(old)  # a folder cannot be replaced, only removed
            elif old.name not in names:  # of another model that lay here
                old.unlink()
        for name in names:
            if (commit / name).exists():
                os.replace(commit / name, Path(folder) / name)
        (commit / "files.json").unlink()
    shutil.rmtree(commit)


# ---------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """h = W0 x + (alpha / r) B A x (Hu et al. 2021, Eq. 3); W0 is frozen, B starts at zero."""

    def __init__(self, base, rank):
        super().__init__()
        # transformers' Conv1D, GPT-2's linear layer, keeps its weight transposed: (d_in, d_out).
        self.transposed = not isinstance(base, nn.Linear)
        d_out, d_in = base.weight.shape[::-1] if self.transposed else base.weight.shape
        self.base, self.scale = base, LORA_ALPHA / rank
        like = {"device": base.weight.device,  # at least fp32: small updates are lost in bf16
                "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.A = nn.Parameter(torch.randn(rank, d_in, **like) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, rank, **like))

    def forward(self, x):
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        return self.base(x) + self.scale * (x @ a.T @ b.T)

    def merged_weight(self):
        """W0 + (alpha / r) B A, laid out as the base layer's weight."""
        update = (self.scale * (self.B @ self.A)).to(self.base.weight.dtype)
        return self.base.weight + (update.T if self.transposed else update)


def add_lora(model, rank):
    """Freeze the model and put an adapter beside every linear layer of its blocks, in place."""
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    heads = {model.get_output_embeddings(), getattr(model, "score", None)}
    layers = [(parent, name, child) for parent in model.modules()
              for name, child in parent.named_children()
              if isinstance(child, (nn.Linear, Conv1D)) and child not in heads]
    for parent, name, child in layers:
        setattr(parent, name, LoRA(child, rank))
    if hasattr(model, "score"):  # a new reward head cannot be left at random
        model.score.requires_grad_(True)


def merged_state_dict(model):
    """The state dict of the ordinary model that equals this one, adapters merged."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            state[f"{name}.weight"] = module.merged_weight().detach()
            for key in [k for k in state if k.startswith(f"{name}.") and k != f"{name}.weight"]:
                value = state.pop(key)
                if key == f"{name}.base.bias":
                    state[f"{name}.bias"] = value
    return state


# ------------------------------------------------------------------- data files, bad input told


def read_jsonl(path, flag="--data"):
    """[("file:line", object)] of a JSON Lines file; ends with one line where it is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag} {path}: cannot be read ({error}); give a UTF-8 file of JSON lines")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = json.loads(line)
                json.dumps(dict.copy(row), ensure_ascii=False).encode()  # no half characters
                rows.append((f"{path}:{number}", row))
        except (ValueError, TypeError, RecursionError) as error:
            fail(f"{path}:{number}: not a JSON object ({error}); write one object on each line")
    if not rows:
        fail(f"{flag} {path}: no rows in this file")
    return rows


def get_text(place, row, key, example):
    """A text of a row: a string; for a prompt also a list of chat messages, for a response one."""
    value = row.get(key)
    chat = lambda m: isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m
    if isinstance(value, list) and value and all(map(chat, value)):
        if key == "prompt":
            return value
        value = value[0]["content"] if len(value) == 1 else None
    if not isinstance(value, str) or not value.strip():
        fail(f'{place}: "{key}" is missing, empty or not a text; a row looks like {example}')
    return value


def split_by_prompt(rows, count, seed):
    """(rows to learn from, rows held out): `count` prompts, at most a tenth, with all rows."""
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    if len(prompts) < 2:
        fail("--data: at least two different prompts are needed, one of them to be held out")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[:max(1, min(count, len(prompts) // 10))])
    split = {True: [], False: []}
    for row in rows:
        split[json.dumps(row["prompt"]) in held_out].append(row)
    return split[False], split[True]


# --------------------------------------------------------------------- the shared command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not the None of flags whose help says what they are derived from."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def common_flags(parser, out, batch_size, lr_help):
    """Add the flags that every script has, with the same meaning."""
    parser.formatter_class = Help
    parser.allow_abbrev = False  # a flag that is not spelled out may one day mean another
    parser.error = lambda message: fail(f"{message}; see --help")
    flag = parser.add_argument_group("common").add_argument
    flag("--model", default="tiny", help="tiny, a folder, or a hub id such as gpt2")
    flag("--data", help="JSON Lines file to learn from; without it the toy task runs")
    flag("--out", default=out, help="folder for the model, metrics, curves and samples")
    flag("--resume", action="store_true", help="go on with the interrupted run in --out")
    flag("--steps", type=int, help="optimizer steps (derived: what --epochs takes)")
    flag("--epochs", type=float, default=1.0, help="passes over the data")
    flag("--batch_size", type=int, default=batch_size, help="examples per optimizer step")
    flag("--accumulate", type=int, default=1, help="parts that a batch is computed in, one after "
         "another: saves memory, does not change the result")
    flag("--lr", type=float, help=f"peak learning rate (derived: {lr_help})")
    flag("--max_grad_norm", type=float, default=1.0, help="longer gradients are shortened to this")
    flag("--lora_rank", type=int, default=0, help="train LoRA adapters of this rank; 0: all "
         "weights")
    flag("--max_length", type=int, help="tokens of prompt and response together; longer responses "
         "are cut (derived: the model's context)")
    flag("--max_new_tokens", type=int, default=64, help="longest sample, in tokens")
    flag("--held_out", type=int, default=16, help="prompts of --data kept for the evaluation")
    flag("--save_every", type=int, default=100, help="steps between saved states, for --resume")
    flag("--seed", type=int, default=0, help="the same seed gives the same result")
    flag("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda or mps")
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
         help="of the arithmetic; weights stay float32 (auto: bfloat16 on cuda)")


def check_flags(args, zero_allowed=(), any_allowed=()):
    """End with one line if a number is out of range: above 0, or not below where 0 is allowed."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{name} {value}: must be a number")
        if (isinstance(value, (int, float)) and not isinstance(value, bool)
                and name not in ("seed", *any_allowed)):
            zero = name in ("lora_rank", *zero_allowed)
            if not (value > 0 or zero and value == 0):
                fail(f"--{name} {value}: must be a number {'not below' if zero else 'above'} 0")
            if value > 1e38:
                fail(f"--{name} {value}: too large for float32")
    if not -(2**63) <= args.seed < 2**63:
        fail(f"--seed {args.seed}: must fit into 64 bits")
    for path in (Path(args.out), *Path(args.out).parents):
        if path.exists() and not path.is_dir():
            fail(f"--out {args.out}: {path} is a file, and a folder is needed")


def settle(args, model, lr_small, lr):
    """Fill in the flags that depend on the model; returns the autocast context of --dtype."""
    small = sum(p.numel() for p in model.parameters()) < 1e7
    if args.lr is None:  # adapters start at zero and want larger steps
        args.lr = (lr_small if small else lr) * ((2 if small else 10) if args.lora_rank else 1)
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    args.max_length = args.max_length or context
    if args.max_length > context:
        fail(f"--max_length {args.max_length}: the model has only {context} positions")
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and model.device.type == "cuda")
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


# ---------------------------------------------------------------------------- state of a run


def save_state(folder, args, model, optimizer, **rest):
    """Write all that a run needs to go on bit for bit, in one file, atomically."""
    state = dict(rest, args=vars(args), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                 cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                 model={n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    torch.save(state, Path(folder) / "state.pt.new")
    os.replace(Path(folder) / "state.pt.new", Path(folder) / "state.pt")


def load_state(folder, args):
    """Read what `save_state` wrote; ends with one line if there is none or the flags differ."""
    path = Path(folder) / "state.pt"
    if not path.is_file():
        fail(f"--resume: no interrupted run in {folder}; start one without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs pickled code
        state["args"], state["step"], state["model"], state["optimizer"]
    except Exception as error:  # torch raises many kinds for a file that is not its own
        fail(f"--resume: {path} cannot be read ({type(error).__name__}); start without --resume")
    for key, value in state["args"].items():
        # A run that diverged may go on from its last good state with another learning rate.
        if key not in ("resume", "out", "device", "lr") and getattr(args, key, None) != value:
            fail(f"--resume: the run in {folder} was started with --{key} {value}, not "
                 f"{getattr(args, key, None)}; give the same flags, or another --out")
    return state


def restore(state, model, optimizer):
    """Put a loaded state back into the model, the optimizer and the random generators."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def check_finite(args, step, health):
    """End with one line if a number made of the loss and the gradient norm is none."""
    if not math.isfinite(health):
        how = f"start again with --lr {args.lr / 10:g}"
        if (Path(args.out) / "state.pt").exists():
            how = f"--resume --lr {args.lr / 10:g} goes on from the last good state, in {args.out}"
        fail(f"step {step + 1}: the loss or its gradient is {health}, most likely because --lr "
             f"{args.lr:g} is too high; {how}")


def checkpoint(args, step, health, pressed, model, optimizer, **rest):
    """Called before each update: stop if loss or gradient are no numbers; save when it is time to.

    health: any number made of the loss and the gradient norm; pressed: what `deferred_interrupt`
    gives. Saving before an update keeps only weights that are known to give a finite loss.
    """
    check_finite(args, step, health)
    if pressed or (step and step % args.save_every == 0):
        save_state(args.out, args, model, optimizer, step=step, **rest)
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def deferred_interrupt():
    """Inside this block Ctrl-C only fills the list that it gives; a second one acts at once.

    Half an optimizer step could not be resumed, so the loop looks at the list between steps.
    """
    pressed = []

    def handler(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
        if pressed:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def stopped(folder):
    """End the program after Ctrl-C, with exit code 130, saying how to go on."""
    how = " ".join(["python", *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))
    saved = (Path(folder) / "state.pt").is_file()
    print(f"\nstopped; go on with: {how}" if saved else "\nstopped before the first step",
          file=sys.stderr)
    raise SystemExit(130)


# ------------------------------------------------------------------------- what a run leaves


def open_log(folder, args, done=0):
    """Begin a run's folder, or go on after `done` steps: args.json, and metrics.jsonl, opened."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[:done] if done else []
    if not done:
        (folder / "state.pt").unlink(missing_ok=True)
    path.write_text("".join(lines))
    (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    return path.open("a", buffering=1)  # line by line, so that a kill loses nothing


def report(folder, columns, samples):
    """Print a table and some samples; write samples.txt and results.json.

    columns: {"before": metrics, "after": metrics}, say: a row for each metric of the last one.
    samples: a list of {"prompt": text, "before": text, "after": text}, or whatever names fit.
    """
    names = list(columns)
    keys = list(columns[names[-1]])
    width = max(map(len, keys))
    lines = [f"{'':{width}} " + " ".join(f"{name:>10}" for name in names)]
    for key in keys:
        values = [columns[name].get(key) for name in names]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{key:{width}} " + " ".join(f"{cell:>10}" for cell in cells))
    print("\n" + "\n".join(lines) + "\n")
    texts = []
    for sample in samples:
        width = max(map(len, sample))
        texts.append("".join(f"{name:{width}}: {text}\n" for name, text in sample.items()))
    # An untrained model writes any bytes; a terminal would obey some of them.
    texts = ["".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in t) for t in texts]
    print("\n".join(texts[:4]))
    folder = Path(folder)
    (folder / "samples.txt").write_text("\n".join([*lines, "", *texts]), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(columns, indent=2) + "\n")
    print(f"metrics.jsonl, curves.png, samples.txt and results.json are in {folder}")


def plot(folder, panels, title="", histograms=None, points=None):
    """Draw curves.png: a panel for each list of names in metrics.jsonl, and perhaps one more.

    histograms: {label: values}; points: {label: (x, y)}; title: what is on the x axis of these.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    extra = histograms or points
    figure, axes = plt.subplots(1, len(panels) + bool(extra), squeeze=False,
                                figsize=(4 * (len(panels) + bool(extra)), 3.2))
    for axis, names in zip(axes[0], panels):
        for name in names:
            axis.plot([row["step"] for row in log], [row.get(name, math.nan) for row in log],
                      label=name, lw=1)
        axis.set_xlabel("step")
    for label, values in (histograms or {}).items():
        axes[0][-1].hist(values.flatten(), bins=40, density=True, alpha=0.6, label=label)
    for label, (x, y) in (points or {}).items():
        axes[0][-1].plot(x, y, marker="o", ms=4, lw=1, label=label)
    if extra:
        axes[0][-1].set_xlabel(title)
    for axis in axes[0]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)
