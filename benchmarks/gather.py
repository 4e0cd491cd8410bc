"""The log-prob gather of dpo.py against its peers: forward and backward, time and peak memory.

    python benchmarks/gather.py                    # about 6 minutes on two cores, 4 GB of memory
    pip install trl liger-kernel                   # the peers; without them their rows are skipped

Every case takes hidden states (N, D), an output embedding (V, D) and targets (N,), gives a log-prob
per target, puts the same DPO loss on them (N / 256 responses, the first half chosen), and computes
the gradients of both inputs. Before any timing, all must agree.

- ours: `gather_logps`, which walks over the vocabulary, 4096 columns at a time.
- naive: `log_softmax().gather()`, the baseline; it holds the N x V logits several times over.
- over tokens: as short as ours, but it walks over the tokens, 256 at a time.
- four products: matrix products alone, in the same chunks as ours: the floor of whatever computes
  its logits again in the backward pass (naive needs only three products).
- liger log-prob: the per-token log-probs behind Liger's GRPO loss, in chunks of the vocabulary.
- liger dpo: `LigerFusedLinearDPOLoss`, a pair at a time, gradients made in its forward pass. Not
  compiled, as that needs a C++ compiler; no reference model.
- trl full: `selective_log_softmax` on whole logits. trl chunked: what TRL's trainers run, asked for
  log-probs alone (its DPOTrainer also asks for entropy, mean logits and accuracy).
- torch: `linear_cross_entropy`, in chunks of tokens.

On a GPU the check is in fp32, and products are then timed with inputs rounded to TF32, as the
scripts have them.

Time: all cases in turn in one process, round after round; a ratio is the median of the ratios
within a round, so that a machine which others use disturbs both sides alike. Memory: a process for
each case; the peak above what stood before, so that gradients count and inputs do not.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measuring import Memory, add_table  # noqa: E402
from dpo import dpo_loss, gather_logps  # noqa: E402

RESPONSE, BETA = 256, 0.1
OWN = 4  # the first four cases need no other library
TARGETS = [("time", 1.15), ("peak", 0.25)]  # of ours / naive


def naive(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


class OverTokens(torch.autograd.Function):
    """The other walk: logits of 256 tokens and the whole vocabulary at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        logps = []
        for h, t in zip(hidden.split(256), targets.split(256)):
            logits = h @ weight.T  # (256, V)
            logps.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunks = (x.split(256) for x in (hidden, targets, grad, grad_hidden))
        for h, t, g, out in zip(*chunks):
            d = -(h @ weight.T).softmax(1)  # (256, V)
            d.scatter_add_(1, t[:, None], d.new_ones(len(t), 1)).mul_(g[:, None])
            torch.mm(d, weight, out=out)
            grad_weight.addmm_(d.T, h)
        return grad_hidden, grad_weight, None


@torch.no_grad()
def four_products(hidden, weight, targets):
    for w in weight.split(4096):
        hidden @ w.T
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for w, grad_w in zip(weight.split(4096), grad_weight.split(4096)):
        logits = hidden @ w.T
        grad_hidden.addmm_(logits, w)
        grad_w.addmm_(logits.T, hidden)


def cases():
    """{name: function of hidden, weight, targets}; a line for each peer that is not there."""
    found = {"ours": gather_logps, "naive": naive, "over tokens": OverTokens.apply,
             "four products": four_products}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as L
        dpo = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=False)
        found["liger log-prob"] = lambda h, w, t: L.apply(h, w, t, None, 1.0, 4096)  # its default
        found["liger dpo"] = lambda h, w, t: dpo(
            w, h.view(-1, RESPONSE, h.shape[1]), t.view(-1, RESPONSE))[0]
    except ImportError as error:
        print(f"skipped: Liger ({error})")
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax
        found["trl full"] = lambda h, w, t: selective_log_softmax(
            (h @ w.T).view(-1, RESPONSE, len(w)), t.view(-1, RESPONSE)).flatten()
        found["trl chunked"] = lambda h, w, t: ChunkedLogProbFunction.apply(
            h, w, None, t, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))[0]
    except ImportError as error:
        print(f"skipped: TRL ({error})")
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda h, w, t: -F.linear_cross_entropy(
            h, w, t, reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    return found


def make_inputs(N, D, V, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device) / D**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), device=device)


def run(case, hidden, weight, targets):
    """Loss and both gradients; None of `four_products`."""
    hidden.grad = weight.grad = None
    loss = case(hidden, weight, targets)
    if loss is not None:
        if loss.dim():  # log-probs; Liger's DPO gives the loss itself
            chosen, rejected = loss.view(-1, RESPONSE).sum(1).chunk(2)
            loss = dpo_loss(chosen, rejected, 0, 0, BETA).mean()
        loss.backward()
        loss = loss.detach(), hidden.grad, weight.grad
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return loss


def check(found, inputs):
    want = run(naive, *inputs)
    print("largest difference from naive, over its largest entry:")
    for name, case in found.items():
        if (got := run(case, *inputs)) is not None:
            apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want)]
            print(f"  {name:15} loss {apart[0]:.0e}, gradients: hidden states {apart[1]:.0e}, "
                  f"embedding {apart[2]:.0e}")
            if not max(apart) < 1e-4:
                raise SystemExit(f"{name} computes something else")


def peak(case, args):
    """MiB above what stood before one run of a case; on a CPU for a process of its own."""
    run(case, *make_inputs(2 * RESPONSE, 64, 512, args.device))  # loads code, starts threads
    inputs = make_inputs(args.N, args.D, args.V, args.device)
    memory = Memory(args.device)
    run(case, *inputs)
    return memory.peak()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, text in [("N", 2048, "response tokens, a multiple of 512"),
                                ("D", 768, "width"), ("V", 50257, "vocabulary"),
                                ("rounds", 5, "timings of each case")]:
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    parser.add_argument("--peers", nargs="*",
                        help="rows beside the first four; none named: none (None: all)")
    parser.add_argument("--json", help="file to which the table is appended")
    parser.add_argument("--memory", help="only print the peak of this case, in MiB")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; leave the flag out for the CPU")
    found = cases()
    if args.memory:
        return print(peak(found[args.memory], args))

    where = (f"fp32, cpu, {torch.get_num_threads()} threads" if args.device == "cpu"
             else f"TF32, {torch.cuda.get_device_name()}")
    setting = f"torch {torch.__version__}: N={args.N} D={args.D} V={args.V}, {where}"
    print(setting)
    if args.peers is not None:
        found = {name: case for i, (name, case) in enumerate(found.items())
                 if i < OWN or name in args.peers}
    inputs = make_inputs(args.N, args.D, args.V, args.device)
    check(found, inputs)  # also warms up
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as in model.py
        for case in found.values():
            run(case, *inputs)
    seconds = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, case in found.items():
            start = time.perf_counter()
            run(case, *inputs)
            seconds[name].append(time.perf_counter() - start)
    flags = [f"--{key}={value}" for key, value in vars(args).items()
             if key not in ("peers", "json", "memory")]
    if args.device == "cuda":
        peaks = {name: peak(case, args) for name, case in found.items()}
    else:
        peaks = {name: float(subprocess.check_output(
            [sys.executable, __file__, *flags, "--memory", name], text=True,
            start_new_session=True).split()[-1]) for name in found}
    if peaks["ours"] != peaks["ours"]:
        print("memory was not measured: that needs Linux, or CUDA")

    ratio = {"time": lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b])),
             "peak": lambda a, b: peaks[a] / peaks[b]}
    if args.json:
        add_table(args.json, "gather", setting, "it / naive", [
            {"case": name, "seconds": statistics.median(times), "least": min(times),
             "tokens_per_second": args.N / statistics.median(times), "peak_mib": peaks[name],
             **{f"{what}_ratio": of(name, "naive") for what, of in ratio.items()}}
            for name, times in seconds.items()])
    print(f"\n{'':15} {'median s':>9} {'min s':>7} {'/ naive':>8} {'/ four':>7} {'peak MiB':>9} "
          f"{'/ naive':>8}")
    for name, times in seconds.items():
        print(f"{name:15} {statistics.median(times):9.3f} {min(times):7.3f} "
              f"{ratio['time'](name, 'naive'):8.2f} {ratio['time'](name, 'four products'):7.2f} "
              f"{peaks[name]:9.0f} {ratio['peak'](name, 'naive'):8.2f}")
    print("\ntargets")
    for what, most in TARGETS:
        value = ratio[what]("ours", "naive")
        verdict = "not measured" if value != value else "met" if value <= most else "MISSED"
        least = min(seconds["ours"]) / min(seconds["naive"])
        least = f" (of the minima {least:.2f})" if what == "time" else ""
        print(f"  {what} of ours / naive: {value:.2f}{least}, at most {most:.2f}: {verdict}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
