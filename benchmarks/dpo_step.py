"""One update of DPO: ours against peers. Time and memory.

    python benchmarks/dpo_step.py                       # 15 minutes on two cores, 12 GB of memory
    python benchmarks/dpo_step.py --data pairs.jsonl --model gpt2 --cases "trl as shipped"
    python benchmarks/dpo_step.py --device cuda --pairs 16 --json runs/gpu.json
    pip install trl==1.16.0 liger-kernel                # the peers; missing ones are left out

The model has GPT-2 small's shape, or that of the config in the folder --model, whose weights are
not used. It has random weights and no dropout; beta 0.1; gradients clipped to norm 1; AdamW. fp32
on a CPU; bf16 autocast over fp32 weights on a GPU. Without --data the pairs have the shape of
TL;DR: 4 pairs, prompts of 256 tokens and responses of 32 to 64 with their EOS. With --data they are
the first 32 of a file of {"prompt", "chosen", "rejected"}, as the tokenizer in --model reads them,
of at most 512 tokens; peers take them 8 at a time and accumulate the gradient.

All cases have the same weights, token ids and reference, a model with other random weights (were
policy and reference equal, the first loss would be log 2 whatever one computes). Before any timing,
the losses of the first two updates must agree, to 1e-5 in fp32 (1e-4 with --data, where sums of
log-probs are in the thousands) and to 0.02 in bf16; the second one depends on the gradients of the
first.

- ours: as in dpo.py: `response_logps` and `dpo_loss` over the parts of `split_batch`. The log-probs
  of the reference are there before, like those of dpo.py from the second epoch on.
- ours +ref: the same after `group_logps` of the reference: an update of the first epoch, when all
  is counted.
- ours in parts: `ours +ref` with `--max_tokens 640`, which holds one pair in the shape of TL;DR.
- trl as shipped: DPOTrainer's defaults, with the reference in each update and gradient
  checkpointing; but in fp32 on a CPU, since bfloat16, also a default, cannot agree to 1e-5. On a
  CPU every position, prompt and padding included, meets the whole vocabulary; on a GPU the response
  positions alone.
- trl: `precompute_ref_log_probs=True` and no gradient checkpointing, which is like ours.
- trl compact (CPU): as `trl`, on the path that TRL takes on CUDA, which selects the response
  positions before the vocabulary. trl.trainer.utils asks `_use_triton(device)`; here that is made
  to say yes. The kernels ask another copy of the name, so the arithmetic stays TRL's torch version.
- liger +ref: `LigerFusedLinearDPOLoss` on the parts of `split_batch`. It wants hidden states of the
  reference, so the reference runs in each update. Compiled on a GPU only.

Without peers `ours +ref` runs against `ours in parts` alone.

Each case is a process that takes a step when told to; TRL's are real `train()` runs, which a
callback halts before each update. One peer at a time, its steps and ours are timed in turn; a ratio
is the median of the ratios within a round, so that a machine which others use disturbs both sides
alike. Memory: the peak of the second update above what stands between updates (weights, Adam's
moments, a reference model), so that gradients count. "whole" is all of the process; on a GPU, of
its allocator.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measuring import Memory, add_table  # noqa: E402
from dpo import collate, dpo_loss, group_logps, response_logps, split_batch  # noqa: E402
from model import Tokenizer, fail, read_jsonl  # noqa: E402

BETA, LR, EOS, CHECKED, LENGTH = 0.1, 1e-6, 50256, 2, 512
LIKE_OURS = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
TRL = {"trl as shipped": {}, "trl": LIKE_OURS, "trl compact": LIKE_OURS}
CASES = {"ours in parts": "ours +ref", "trl as shipped": "ours +ref", "trl": "ours",
         "trl compact": "ours", "liger +ref": "ours +ref"}  # which of ours each is compared with


def make_config(folder):
    """GPT-2 small, or what the config of a folder says, without dropout."""
    config = AutoConfig.from_pretrained(folder) if folder else GPT2Config()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return config


def make_model(args, seed):
    """A model with random weights."""
    torch.manual_seed(seed)
    config = make_config(args.model)
    if args.worker.startswith("ours") and config.model_type == "gpt2":
        config.activation_function = "gelu_pytorch_tanh"  # as in model.py
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().to(args.device)


def make_pairs(args):
    """args.pairs times [(prompt ids, chosen ids), (prompt ids, rejected ids)]."""
    if not args.data:
        rng = random.Random(0)
        draw = lambda least, most: [rng.randrange(EOS) for _ in range(rng.randint(least, most))]
        prompts = [draw(256, 256) for _ in range(args.pairs)]
        return [[(prompt, draw(31, 63) + [EOS]) for _ in range(2)] for prompt in prompts]
    tokenizer, pairs = Tokenizer(args.model), []
    for row in read_jsonl(args.data):
        pair = [tokenizer.encode_example(row["prompt"], row[side], LENGTH)
                for side in ("chosen", "rejected")]
        if None not in pair and pair[0] != pair[1] and len(pairs) < args.pairs:
            pairs.append(pair)
    return pairs if len(pairs) == args.pairs else fail(f"{args.data}: only {len(pairs)} pairs")


class Meter:
    """Waits for the parent's word, then measures a step and tells the parent about it."""

    def __init__(self, device):
        self.steps, self.device = 0, device

    def begin(self):
        if not sys.stdin.readline():  # the parent is gone
            os._exit(0)
        if self.steps < CHECKED:  # later steps are timed, and shall not be disturbed
            self.memory = Memory(self.device)
        self.start = time.perf_counter()

    def end(self, loss):
        if self.device == "cuda":
            torch.cuda.synchronize()
        row = {"seconds": time.perf_counter() - self.start, "loss": float(loss)}
        if self.steps < CHECKED:
            row["peak"], row["whole"] = self.memory.peak()
        self.steps += 1
        print("STEP " + json.dumps(row), flush=True)


def our_loss(model, pairs, reference_logps, part):
    """The summed loss of a part of the pairs, as in dpo.py."""
    logps, _ = response_logps(model, [sequence for g in part for sequence in pairs[g]])
    reference = reference_logps[part].to(model.device)  # (b, 2)
    return dpo_loss(*logps.view(-1, 2).unbind(1),  # (2b,) -> (b, 2) -> (b,) each
                    *reference.unbind(1), BETA).sum()


def run(args, meter):
    """Ours, and Liger: the loop of dpo.py."""
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as in model.py
    if args.worker == "ours in parts":
        args.max_tokens = 640
    pairs, model, reference = make_pairs(args), make_model(args, 0), make_model(args, 1)
    if args.worker == "ours":
        reference_logps = group_logps(reference, pairs, args.max_tokens)  # (pairs, 2)
        del reference
    elif args.worker == "liger +ref":
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
        fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=args.device == "cuda")

    def liger_loss(part):
        # Liger wants the chosen responses first, and targets in a rectangle, shifted by the caller.
        sequences = [pairs[g][side] for side in (0, 1) for g in part]
        ids, where, targets, _ = collate(sequences, args.device)
        labels = torch.full_like(ids, -100)  # (2b, T)
        labels.view(-1)[where] = targets  # (2b*T,)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            hidden = model.base_model(ids, use_cache=False).last_hidden_state
            with torch.no_grad():
                old = reference.base_model(ids, use_cache=False).last_hidden_state
            return len(part) * fused(model.lm_head.weight, hidden, labels, ref_input=old,
                                     ref_weight=reference.lm_head.weight)[0]

    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    while True:
        meter.begin()
        total = 0.0
        if args.worker in ("ours +ref", "ours in parts"):
            reference_logps = group_logps(reference, pairs, args.max_tokens)
        for part in split_batch(pairs, args.max_tokens):
            if args.worker == "liger +ref":
                loss = liger_loss(part)
            else:
                loss = our_loss(model, pairs, reference_logps, part)
            (loss / len(pairs)).backward()
            total += loss.detach() / len(pairs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.end(total)


def run_trl(args, meter):
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    if args.worker == "trl compact":
        trl.trainer.utils._use_triton = lambda device: True
    losses = []

    class Callback(TrainerCallback):
        def on_step_begin(self, *_, **__):
            losses.clear()
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end(sum(losses) / len(losses))

    class Trainer(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    # The trainer wants text. Here a text is its token ids, and this tokenizer reads them.
    words = Words(models.WordLevel({str(i): i for i in range(EOS + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS),
                                        pad_token=str(EOS))
    text = lambda ids: "".join(f" {i}" for i in ids)
    data = Dataset.from_list([
        {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
        for (prompt, chosen), (_, rejected) in make_pairs(args)])
    size = min(8, args.pairs) if args.data else args.pairs
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, per_device_train_batch_size=size, max_length=LENGTH, max_steps=10**6,
            gradient_accumulation_steps=args.pairs // size, learning_rate=LR, beta=BETA,
            lr_scheduler_type="constant", adam_beta2=0.99, bf16=args.device == "cuda",
            use_cpu=args.device == "cpu", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, **TRL[args.worker])
        trainer = Trainer(make_model(args, 0), make_model(args, 1), args=config, train_dataset=data,
                          processing_class=tokenizer, callbacks=[Callback()])
        if config.precompute_ref_log_probs:
            trainer.ref_model = None  # it has done its work
        trainer.train()


class Worker:
    """A case in a process of its own that waits to be told to take a step."""

    def __init__(self, name):
        quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
                 "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", name], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | quiet,
            start_new_session=True)  # Ctrl-C reaches the parent alone, which ends its workers

    def step(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and has said why
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        raise SystemExit("a case has failed: see above")


def missing(case, device):
    """Why a case cannot run here, or None."""
    package = {"ours in parts": "torch", "liger +ref": "liger_kernel"}.get(case, "trl")
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if case == "trl compact" and device == "cuda":
        return "it is what TRL does on a GPU anyway"


def race(names, rounds, tolerance):
    """Steps of ours and perhaps of a peer, in turn: {name: seconds}, {name: (peak, whole)}."""
    workers = {name: Worker(name) for name in names}
    try:
        for step in range(CHECKED):
            rows = {name: worker.step() for name, worker in workers.items()}
            print(f"losses of step {step + 1}:",
                  ", ".join(f"{name} {row['loss']:.7f}" for name, row in rows.items()), flush=True)
            losses = [row["loss"] for row in rows.values()]
            if not abs(losses[0] - losses[-1]) <= tolerance:
                raise SystemExit(f"the losses differ by more than {tolerance}")
        times = {name: [row["seconds"]] for name, row in rows.items()}  # of the second step
        for _ in range(rounds - 1):
            for name, worker in workers.items():
                times[name].append(worker.step()["seconds"])
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    return times, {name: (row["peak"], row["whole"]) for name, row in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help='JSON Lines file of {"prompt", "chosen", "rejected"}; '
                        "None: pairs of random tokens in the shape of TL;DR")
    parser.add_argument("--model", help="folder with a config and, for --data, a tokenizer; "
                        "None: GPT-2 small")
    parser.add_argument("--pairs", type=int, help="pairs of an update; None: 4, with --data 32")
    parser.add_argument("--max_tokens", type=int, default=4096, help="ours: as in dpo.py")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES,
                        help="whom to run against")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--json", help="file to which the table is appended")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.pairs = args.pairs or (32 if args.data else 4)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; leave the flag out for the CPU")
    if args.data and not args.model:
        raise SystemExit("--data: also give --model, a folder with config and tokenizer")
    if args.data and args.pairs > 8 and args.pairs % 8:
        raise SystemExit("--pairs: peers take 8 at a time; give a multiple of 8")
    if min(args.rounds, args.pairs, args.max_tokens) < 1:
        raise SystemExit("--rounds, --pairs and --max_tokens must be at least 1")
    if args.worker:
        return (run_trl if args.worker in TRL else run)(args, Meter(args.device))

    lengths = [len(prompt + response) for pair in make_pairs(args) for prompt, response in pair]
    where = (f"{torch.get_num_threads()} threads, fp32 on the CPU" if args.device == "cpu"
             else f"bf16 autocast on {torch.cuda.get_device_name()}")
    config = make_config(args.model)
    with torch.device("meta"):  # only to count its weights
        size = AutoModelForCausalLM.from_config(config).num_parameters() / 1e6
    setting = (f"torch {torch.__version__}, {where}: {config.model_type}, {size:.0f}M parameters; "
               f"{args.pairs} pairs, sequences of {min(lengths)} to {max(lengths)} tokens, "
               f"{statistics.mean(lengths):.0f} on average")
    print(setting)
    tolerance = 0.02 if args.device == "cuda" else 1e-4 if args.data else 1e-5
    seconds, memory, ratios = {}, {}, {}
    for case in args.cases:
        if missing(case, args.device):
            print(f"skipped: {case} ({missing(case, args.device)})")
            continue
        own = CASES[case]
        times, peaks = race((own, case), args.rounds, tolerance)
        memory |= peaks
        seconds.setdefault(own, []).extend(times[own])
        seconds[case] = times[case]
        ratios[case] = {
            "time": statistics.median(x / y for x, y in zip(times[own], times[case])),
            "peak": memory[own][0] / memory[case][0]}
    if not seconds:
        seconds, memory = race(["ours"], args.rounds, tolerance)

    if args.json:
        add_table(args.json, "dpo_step", setting, "ours / it", [
            {"case": name, "seconds": statistics.median(times), "least": min(times),
             "tokens_per_second": sum(lengths) / statistics.median(times),
             "peak_mib": memory[name][0], "whole_mib": memory[name][1],
             **{f"{what}_ratio": ratio for what, ratio in ratios.get(name, {}).items()}}
            for name, times in seconds.items()])
    print(f"\n{'':16} {'median s':>9} {'min s':>7} {'ours / it':>10} {'peak MiB':>9} "
          f"{'ours / it':>10} {'whole MiB':>10}")
    for name, times in seconds.items():
        ratio = ratios.get(name, {"time": 1.0, "peak": 1.0})
        print(f"{name:16} {statistics.median(times):9.3f} {min(times):7.3f} {ratio['time']:10.2f} "
              f"{memory[name][0]:9.0f} {ratio['peak']:10.2f} {memory[name][1]:10.0f}")
    targets = {"time": 0.30} if args.data else {"time": 0.40, "peak": 0.40}
    print("\ntargets, set for the CPU")
    for what, most in targets.items() if "trl as shipped" in ratios else ():
        value = ratios["trl as shipped"][what]
        verdict = "not measured" if value != value else "met" if value <= most else "MISSED"
        print(f"  {what} of ours +ref / trl as shipped: {value:.2f}, at most {most:.2f}: {verdict}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
