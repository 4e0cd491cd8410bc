"""What the benchmarks share: peak memory, and tables in a JSON file."""

import ctypes
import json
import math
from pathlib import Path

import torch


class Memory:
    """Peak memory, in MiB, of what runs after this object is made.

    On CUDA it is the allocator's. On Linux it is the most that was ever resident, for which a
    process has to be new: memory that was freed before is used again. Elsewhere it is NaN.
    """

    def __init__(self, device):
        self.cuda, self.before = device == "cuda", math.nan
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not count as standing
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most resident, starts again
            self.before = resident("VmRSS")

    def peak(self):
        """(above what stood before, of the whole process or allocator)."""
        if math.isnan(self.before):
            return math.nan, math.nan
        whole = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident("VmHWM")
        return whole - self.before, whole


def resident(key):
    """VmRSS or VmHWM of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def add_table(path, benchmark, setting, ratio, rows):
    """Append a table to a JSON file, which is a list of them. NaN becomes null.

    ratio: what the columns of ratios mean. rows: dicts with "case" and numbers.
    """
    path = Path(path)
    tables = json.loads(path.read_text()) if path.exists() else []
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    tables.append({"benchmark": benchmark, "setting": setting, "ratio": ratio, "rows": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1) + "\n")
