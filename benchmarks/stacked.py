"""Stacked networks against a loop of single ones: milliseconds for an optimiser step of each member.

    python -m benchmarks.stacked            # the table on the screen
    python -m benchmarks.stacked --record   # and in book/results/stacked_benchmark.json, which the book shows

Fifteen members (three seeds of five data sets), batch 256, three hidden layers of width 32, 64, 128, 256; forward,
backward, clipping and Adam, no drawing of data. The rounds take turns; times are medians over the rounds.
"""

import argparse
import os
import statistics
import time

# One core for everybody: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from torch import Tensor, nn
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.provenance import ROOT, provenance, writable, write_record
from nsgf_lite.training import clip_members

RECORD = ROOT / "book" / "results" / "stacked_benchmark.json"
MEMBERS, BATCH, WIDTHS = 15, 256, (32, 64, 128, 256)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, t: Tensor, v: Tensor) -> None:
    loss = (network(x, t) - v).square().sum(-1).mean(-1).sum()
    optimizer.zero_grad()
    loss.backward()
    if isinstance(network, nl.networks.Stack):
        clip_members(network, 1.0)
    else:
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    if given.record:
        writable(RECORD)
    torch.set_num_threads(1)
    begin, rows, chance = time.perf_counter(), [], torch.Generator().manual_seed(0)
    x = torch.randn(MEMBERS, BATCH, 2, generator=chance)
    t, v = torch.rand(MEMBERS, BATCH, generator=chance), torch.randn(MEMBERS, BATCH, 2, generator=chance)
    for width in WIDTHS:
        singles = [
            nl.networks.seeded(lambda width=width: nl.networks.MLP(2, width=width), chance) for _ in range(MEMBERS)
        ]
        stack = nl.networks.Stack(singles)
        optimizers = [torch.optim.Adam(net.parameters(), fused=True) for net in singles]
        together = torch.optim.Adam(stack.parameters(), fused=True)
        times: dict[str, list[float]] = {"loop": [], "stack": []}
        for _ in tqdm(range(given.rounds), desc=f"width {width}"):
            start = time.perf_counter()
            for k, (net, optimizer) in enumerate(zip(singles, optimizers, strict=True)):
                step(net, optimizer, x[k], t[k], v[k])
            middle = time.perf_counter()
            step(stack, together, x, t, v)
            times["loop"].append(1e3 * (middle - start) / MEMBERS)
            times["stack"].append(1e3 * (time.perf_counter() - middle) / MEMBERS)
        row = {"width": width, **{name: statistics.median(values) for name, values in times.items()}}
        rows.append(row)
        print(f"width {width:3d}: loop {row['loop']:.2f} ms, stack {row['stack']:.2f} ms a member")
    if given.record:
        source = provenance("python -m benchmarks.stacked", time.perf_counter() - begin, ["nsgf-lite", "torch"])
        write_record(RECORD, {"provenance": source, "members": MEMBERS, "rows": rows})


if __name__ == "__main__":
    main()
