"""Says where an accelerator's time went: python benchmarks/trace_summary.py FOLDER [STEPS].

The FOLDER is one that `jax.profiler` wrote a trace of so many steps into.
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

KINDS = {
    "attention": ("cudnn", "sdpa", "flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "memories": ("memory",),
    "copies": ("memcpy", "memset", "copy", "transpose", "concatenate", "dynamic_"),
    "sums": ("reduce",),
}
"""What a kernel does, by a part of its name; the first that fits."""


def kernels(folder):
    """Yields the name, the beginning and the duration, in microseconds, of each kernel."""
    newest = max(Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    for event in events:
        line = threads.get((event.get("pid"), event.get("tid")), "")
        device = "/device:" in processes.get(event.get("pid"), "")
        if event.get("ph") == "X" and device and line.startswith("Stream"):
            yield event["name"], event["ts"], event["dur"]


def kind(name):
    """The kind of a kernel, one of `KINDS` or the rest."""
    fits = (kind for kind, words in KINDS.items() if any(word in name.lower() for word in words))
    return next(fits, "elementwise")


def table(folder, steps=1, longest=30):
    """Milliseconds a step: of all kernels, by kind, and of those that took longest."""
    kinds, each = defaultdict(float), defaultdict(lambda: [0.0, 0])
    first, last = float("inf"), 0.0
    for name, start, spent in kernels(folder):
        first, last = min(first, start), max(last, start + spent)
        spent = spent / steps / 1e3
        kinds[kind(name)] += spent
        each[name] = [each[name][0] + spent, each[name][1] + 1]
    total = sum(kinds.values())
    if not total:
        return f"no accelerator's kernels in {folder}"
    lines = [f"{total:9.2f} ms in kernels, {(last - first) / steps / 1e3:.2f} from first to last"]
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"{spent:9.2f} ms  {spent / total:6.1%}  {name}")
    for name, (spent, count) in sorted(each.items(), key=lambda item: -item[1][0])[:longest]:
        lines.append(f"{spent:9.3f} ms  {count / steps:6.0f}  {name[:80]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1))
