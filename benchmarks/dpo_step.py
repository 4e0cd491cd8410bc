"""One training step of DPO and of a reward model on rankings: ours against peers. Time and memory.

    python benchmarks/dpo_step.py                       # 20 minutes on two cores, 12 GB of memory
    python benchmarks/dpo_step.py --device cuda --shape gpt2 --prompts 256 512 --pairs 16
    python benchmarks/dpo_step.py --device cuda --shape qwen --prompts 256 512 --pairs 16
    pip install trl==1.16.0 liger-kernel cut-cross-entropy   # the peers; what lacks is left out

The shape is that of TL;DR: 4 pairs, prompts of 256 tokens and responses of 32 to 64 with their EOS.
The model has GPT-2 small's shape (or that of Qwen2.5 0.5B), random weights and no dropout; beta
0.1; gradients clipped to norm 1; AdamW. fp32 on a CPU; bf16 autocast over fp32 weights on a GPU.
All cases have the same weights, token ids and reference, a model with other random weights (were
policy and reference equal, the first loss would be log 2 whatever one computes). Before any timing,
the losses of the first two steps must agree, to 1e-5 in fp32 and to 0.02 in bf16; the second one
depends on the gradients of the first.

- ours: `response_logps` and `dpo_loss` of dpo.py on packed rows, [prompt | chosen | rejected], the
  reference's log-probs precomputed. As in model.py's `load_model`, GPT-2's activation is
  gelu_pytorch_tanh, the fused form of TRL's gelu_new: the same function. `--gelu_new` takes that
  away from us, to show what the rest is worth.
- apart: the same with `collate`, a row for each response, the prompt in each of them.
- trl: DPOTrainer like for like: `precompute_ref_log_probs=True` and no gradient checkpointing,
  neither of them its default. On a CPU every position, prompt and padding included, meets the whole
  vocabulary, in tiles of 4096 tokens x 32768 columns; on a GPU the response positions alone.
- trl +ref: the same, but the reference model runs in each step, as it does by default.
- trl defaults: its true defaults, reference in each step and gradient checkpointing; but for
  bfloat16 on a CPU, also a default, which no fp32 loss equals to 1e-5.
- trl compact (CPU): as `trl`, on the path that TRL takes on CUDA, which selects the response
  positions before the vocabulary. trl.trainer.utils asks `_use_triton(device)`; here that is made
  to say yes. The kernels ask another copy of the name, so the arithmetic stays TRL's torch version.
- trl compact +ref (CPU): the same, with the reference in each step, as is TRL's default.
- liger +ref: a row for each response through the model, then `LigerFusedLinearDPOLoss`, which wants
  hidden states of the reference too, so the reference runs in each step. Compiled on a GPU only.
- cce (GPU): as `apart`, with Cut Cross-Entropy's `linear_cross_entropy` for the gather.
- ranking: `reward_scores` and `ranking_loss` of reward_model.py, as many prompts, 6 responses each,
  on packed rows; ranking apart: a row for each response.

Each case is a process that trains a step when told to; TRL's are real `train()` runs, which a
callback halts before each step. One peer at a time, its steps and ours are timed in turn; a ratio
is the median of the ratios within a round, so that a machine which others use disturbs both sides
alike. Memory: the peak of the second step above what stands between steps (weights, Adam's
moments, a reference model), so that gradients count. "whole" is all of the process; on a GPU, of
its allocator.
"""

import argparse
import ctypes
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
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2ForSequenceClassification)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dpo import collate, collate_packed, dpo_loss, response_logps  # noqa: E402
from reward_model import ranking_loss, reward_scores  # noqa: E402

BETA, LR, EOS, CHECKED, K = 0.1, 1e-6, 50256, 2, 6
TRL = {"trl": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
       "trl +ref": {"gradient_checkpointing": False},
       "trl defaults": {},
       "trl compact": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
       "trl compact +ref": {"gradient_checkpointing": False}}
OTHERS = ["apart", "liger +ref", "cce", "ranking apart"]
# Against the reference in each step, which is how TRL runs unless told otherwise.
TARGETS = [("time", "trl +ref", 0.25), ("peak", "trl +ref", 0.25),
           ("time", "trl compact +ref", 0.50), ("time", "ranking apart", 0.35)]


def make_model(args, seed, activation="gelu_pytorch_tanh", ranking=False):
    torch.manual_seed(seed)
    if args.shape == "gpt2":
        config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                            activation_function=activation, num_labels=1)
        kind = GPT2ForSequenceClassification if ranking else GPT2LMHeadModel
    else:
        config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                             num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                             tie_word_embeddings=True, num_labels=1)
        kind = Qwen2ForSequenceClassification if ranking else Qwen2ForCausalLM
    return kind(config).eval().to(args.device)


def make_prompts(args, k=2):
    """args.pairs x (prompt, k responses), as lists of token ids."""
    rng = random.Random(0)
    draw = lambda length: [rng.randrange(EOS) for _ in range(length)]
    return [(draw(rng.randint(*args.prompts)),
             *(draw(rng.randint(31, 63)) + [EOS] for _ in range(k))) for _ in range(args.pairs)]


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


class Meter:
    """Waits for the parent's word, then measures a step and tells the parent about it."""

    def __init__(self, device):
        self.steps, self.cuda = 0, device == "cuda"

    def begin(self):
        if not sys.stdin.readline():  # the parent is gone
            os._exit(0)
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 1024
        self.linux = Path("/proc/self/clear_refs").exists() and not self.cuda
        if self.linux and self.steps < CHECKED:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not count as standing
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most resident, starts again
            self.before = self.kilobytes("VmRSS")
        self.start = time.perf_counter()

    def end(self, loss):
        if self.cuda:
            torch.cuda.synchronize()
        row = {"seconds": time.perf_counter() - self.start, "loss": float(loss),
               "peak": math.nan, "whole": math.nan}
        if self.cuda:
            row["whole"] = torch.cuda.max_memory_allocated() / 2**20
        elif self.linux and self.steps < CHECKED:
            row["whole"] = self.kilobytes("VmHWM") / 1024
        if row["whole"] == row["whole"]:
            row["peak"] = row["whole"] - self.before / 1024
        self.steps += 1
        print("STEP " + json.dumps(row), flush=True)

    def kilobytes(self, key):
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def cce_logps(model, batch):
    """As `response_logps`, with Cut Cross-Entropy's gather."""
    from cut_cross_entropy import linear_cross_entropy

    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch["index"])  # (B*T, D) -> (N, D)
    weight = model.get_output_embeddings().weight
    nll = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), batch["targets"],
                               reduction="none").float()  # (N,)
    return nll.new_zeros(len(batch["last"])).index_add(0, batch["rows"], -nll), None


def run(args, meter):
    """All cases but TRL's: a plain training loop around `losses`, (B,)."""
    torch.manual_seed(0)
    name, activation = args.worker, "gelu_new" if args.gelu_new else "gelu_pytorch_tanh"
    ranking = name.startswith("ranking")
    groups = make_prompts(args, K if ranking else 2)
    sequences = [(prompt, y) for prompt, *responses in groups for y in responses]
    place = collate_packed if name in ("ours", "ranking") else collate
    model = make_model(args, 0, activation, ranking)

    if ranking:
        ranks = torch.arange(1, K + 1, device=args.device).expand(len(groups), K)  # (B, K)

        def losses():
            with autocast(args):
                rewards = reward_scores(model, place(sequences, args.device))  # (B*K,)
            return ranking_loss(rewards.view(-1, K), ranks)  # (B*K,) -> (B, K)

    elif name == "liger +ref":
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        reference = make_model(args, 1, activation)
        weight = reference.get_output_embeddings().weight
        fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=args.device == "cuda")
        # Liger wants the chosen responses first, targets in a rectangle, and shifted by the caller.
        sequences = sequences[::2] + sequences[1::2]

        def losses():
            batch = collate(sequences, args.device)
            rows = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
            labels = torch.full_like(rows["input_ids"], -100)  # (2B, T)
            labels.view(-1)[batch["index"]] = batch["targets"]  # (2B*T,)
            with autocast(args):
                hidden = model.base_model(**rows, use_cache=False).last_hidden_state
                with torch.no_grad():
                    old = reference.base_model(**rows, use_cache=False).last_hidden_state
                return fused(model.get_output_embeddings().weight, hidden, labels,
                             ref_input=old, ref_weight=weight)[0][None]

    else:
        logps = cce_logps if name == "cce" else response_logps
        with torch.no_grad(), autocast(args):
            reference, _ = response_logps(
                make_model(args, 1, activation), collate(sequences, args.device))  # (2B,)

        def losses():
            with autocast(args):
                sums, _ = logps(model, place(sequences, args.device))  # (2B,), pair after pair
            return dpo_loss(*sums.view(-1, 2).T, *reference.view(-1, 2).T, BETA)

    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    while True:
        meter.begin()
        loss = losses().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.end(loss.detach())


def run_trl(args, meter):
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    if args.worker.startswith("trl compact"):
        trl.trainer.utils._use_triton = lambda device: True

    class Callback(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end(trainer.loss)

    class Trainer(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            self.loss = super().compute_loss(*args, **kwargs)
            return self.loss

    # The trainer wants text. Here a text is its token ids, and this tokenizer reads them.
    words = Tokenizer(models.WordLevel({str(i): i for i in range(EOS + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS),
                                        pad_token=str(EOS))
    text = lambda ids: "".join(f" {i}" for i in ids)
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), map(text, pair)))
                              for pair in make_prompts(args)])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, per_device_train_batch_size=args.pairs, max_steps=10**6, learning_rate=LR,
            beta=BETA, lr_scheduler_type="constant", adam_beta2=0.95, bf16=args.device == "cuda",
            use_cpu=args.device == "cpu", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, **TRL[args.worker])
        policy, reference = (make_model(args, seed, "gelu_new") for seed in (0, 1))
        trainer = Trainer(policy, reference, args=config, train_dataset=data,
                          processing_class=tokenizer, callbacks=[Callback()])
        if config.precompute_ref_log_probs:
            trainer.ref_model = None  # it has done its work
        row = trainer.train_dataset[0]
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == make_prompts(args)[0]
        trainer.train()


class Worker:
    """A case in a process of its own that waits to be told to take a step."""

    def __init__(self, name):
        quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
                 "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", name], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | quiet)

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        raise SystemExit("a case has failed: see above")


def missing(case, device):
    """Why a case cannot run here, or None."""
    package = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(
        case.split()[0])
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if case == "cce" and device == "cpu":
        return "Cut Cross-Entropy's kernels need a GPU"
    if case.startswith("trl compact") and device == "cuda":
        return "it is what TRL does on a GPU anyway"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each case")
    parser.add_argument("--cases", nargs="+", default=[*TRL, *OTHERS], choices=[*TRL, *OTHERS],
                        help="whom to run against")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--shape", default="gpt2", choices=["gpt2", "qwen"],
                        help="the model's shape: GPT-2 small or Qwen2.5 0.5B")
    parser.add_argument("--pairs", type=int, default=4, help="pairs, or rankings, of a step")
    parser.add_argument("--prompts", nargs=2, type=int, default=[256, 256], metavar=("MIN", "MAX"),
                        help="least and most tokens of a prompt")
    parser.add_argument("--gelu_new", action="store_true", help="TRL's activation on our side too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; leave the flag out for the CPU")
    if min(args.rounds, args.pairs, *args.prompts) < 1 or args.prompts[0] > args.prompts[1]:
        raise SystemExit("--rounds, --pairs and --prompts must be at least 1, and MIN at most MAX")
    if args.worker:
        return (run_trl if args.worker in TRL else run)(args, Meter(args.device))

    cases = []
    for case in args.cases:
        reason = missing(case, args.device)
        cases += [] if reason else [case]
        if reason:
            print(f"skipped: {case} ({reason})")
    where = (f"{torch.get_num_threads()} threads, fp32 on the CPU" if args.device == "cpu"
             else f"bf16 autocast on {torch.cuda.get_device_name()}")
    print(f"torch {torch.__version__}, {where}: {args.shape}, {args.pairs} prompts of "
          f"{args.prompts[0]} to {args.prompts[1]} tokens")
    tolerance = 1e-5 if args.device == "cpu" else 0.02
    seconds, memory, ratios = {}, {}, {}
    for case in cases:
        own = "ranking" if case == "ranking apart" else "ours"
        workers = {name: Worker(name) for name in (own, case)}
        for step in range(CHECKED):
            rows = {name: worker.step() for name, worker in workers.items()}
            print(f"losses of step {step + 1}:",
                  ", ".join(f"{name} {row['loss']:.7f}" for name, row in rows.items()), flush=True)
            if not abs(rows[own]["loss"] - rows[case]["loss"]) <= tolerance:
                raise SystemExit(f"the losses differ by more than {tolerance}")
        memory |= {name: (row["peak"], row["whole"]) for name, row in rows.items()}
        times = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                times[name].append(worker.step()["seconds"])
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
        seconds.setdefault(own, []).extend(times[own])
        seconds[case] = times[case]
        ratios[case] = {
            "time": statistics.median(x / y for x, y in zip(times[own], times[case])),
            "least": min(times[own]) / min(times[case]),
            "peak": memory[own][0] / memory[case][0]}
    if any(peak != peak for peak, _ in memory.values()):
        print("memory was not measured: that needs Linux, or CUDA")

    print(f"\n{'':16} {'median s':>9} {'min s':>7} {'ours / it':>10} {'peak MiB':>9} "
          f"{'ours / it':>10} {'whole MiB':>10}")
    for name, times in seconds.items():
        ratio = ratios.get(name, {"time": 1.0, "peak": 1.0})
        print(f"{name:16} {statistics.median(times):9.3f} {min(times):7.3f} {ratio['time']:10.2f} "
              f"{memory[name][0]:9.0f} {ratio['peak']:10.2f} {memory[name][1]:10.0f}")
    print("\ntargets, set for the CPU")
    for what, other, most in TARGETS:
        if other in ratios:
            value = ratios[other][what]
            verdict = "not measured" if value != value else "met" if value <= most else "MISSED"
            least = f" (of the minima {ratios[other]['least']:.2f})" if what == "time" else ""
            print(f"  {what} of ours / {other}: {value:.2f}{least}, at most {most:.2f}: {verdict}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
