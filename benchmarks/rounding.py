"""How far do log-probs move when the head's product is rounded as a GPU rounds it?

    python benchmarks/rounding.py                                    # tiny, in a second
    python benchmarks/rounding.py --model gpt2 --data pairs.jsonl    # {"prompt", "chosen"}

The log-prob of a token is z_y - log sum_v exp(z_v), z = W h. A GPU's tensor cores round W and h to
10 bits of mantissa (TF32) or to 7 (bf16) before they multiply, and add up in fp32. Here both are
rounded by hand, and all else is done in float64, so a CPU can tell what the rounding does. As in
`GatherLogps` the target's own logit z_y is no such product, but a sum in fp32: it is not rounded.
A log-prob can then be a little above 0.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dpo import collate, hidden_states, toy_prompts  # noqa: E402
from model import load_model, read_jsonl  # noqa: E402


def round_to(x, bits):
    """x with so many bits of mantissa behind the leading one, to the nearest."""
    mantissa, exponent = torch.frexp(x)  # the mantissa's absolute value is in [1/2, 1)
    return torch.ldexp(torch.round(mantissa * 2.0**(bits + 1)), exponent - bits - 1)


def logps(hidden, weight, targets, bits=None):
    """Log-probs of the targets: (N, D), (V, D), (N,) -> (N,), and the logits (N, V)."""
    own = (hidden * weight[targets]).sum(1)  # (N,)
    if bits:
        hidden, weight = round_to(hidden, bits), round_to(weight, bits)
    logits = hidden @ weight.T
    return own - logits.logsumexp(1), logits


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub id or folder")
    parser.add_argument("--data", help='JSON Lines file of {"prompt", "chosen"}; None: toy reviews')
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    if args.data:
        rows = [(row["prompt"], row["chosen"]) for row in read_jsonl(args.data)[:16]]
    else:
        rows = [(prompt, " The plot was dull and long. I found the cast superb.")
                for prompt in toy_prompts()[:20]]
    examples = [tokenizer.encode_example(*row, tokenizer.context) for row in rows]
    ids, where, targets, _ = collate([x for x in examples if x is not None], "cpu")
    hidden = hidden_states(model, ids, where).double()
    weight = model.get_output_embeddings().weight.double()
    exact, logits = logps(hidden, weight, targets)
    print(f"{args.model}: {len(hidden)} tokens, D={hidden.shape[1]}, V={len(weight)}; logits: SD "
          f"{logits.std():.1f}, at most {logits.abs().max():.0f}; mean log-prob "
          f"{exact.mean():.2f}\n")
    print("change of a token's log-prob, nats      SD       mean      worst    above 0")
    for name, bits in (("TF32, 10 bits", 10), ("bf16, 7 bits", 7)):
        rounded = logps(hidden, weight, targets, bits)[0]
        moved = rounded - exact
        print(f"{name:30} {moved.std():11.5f} {moved.mean():+10.5f} {moved.abs().max():10.5f} "
              f"{(rounded > 0).double().mean():10.1%}")


if __name__ == "__main__":
    main()
