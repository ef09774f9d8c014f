"""What all benchmarks share: how threads wait, and the table at the end of the run."""

import os

import pytest

# Threads that spin while they wait are fast on a machine of their own; beside other work each wait can cost a time
# slice, and then what has many short parallel loops looks 20 times slower than it is. OpenMP reads this as torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks.comparison import missing_peers

BENCHMARKS = pytest.StashKey[list]()
HEADINGS = ("benchmark", "shape", "dtype", "ours", "ours / limit", "peer / ours")


def pytest_configure(config):
    # The plugin's own table ranks seconds of unlike things; --benchmark-verbose brings it back.
    config.option.benchmark_quiet = True
    config.stash[BENCHMARKS] = []


@pytest.fixture(autouse=True)
def _in_table(request, benchmark):
    yield
    request.config.stash[BENCHMARKS].append(benchmark)


def pytest_terminal_summary(terminalreporter, config):
    timed = [benchmark for benchmark in config.stash[BENCHMARKS] if benchmark.stats and benchmark.extra_info]
    if not timed:
        return
    rows = [HEADINGS, *map(_row, timed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("benchmarks")
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
    if missing_peers:
        terminalreporter.write_line(f"not installed, so not among the peers: {', '.join(missing_peers)}")


def _row(benchmark):
    info = benchmark.extra_info
    if "memory_ratio" in info:
        ours, limit, peers = f"{info['extra_memory_mib']:,.0f} MiB", "", info["memory_ratio"]
    else:
        milliseconds = benchmark.stats.stats.median * 1e3
        ours, limit, peers = f"{milliseconds:,.1f} ms", f"{info['ratio_to_limit']:.2f}", info["speedup"]
    return info["name"], info["shape"], info["dtype"], ours, limit, ", ".join(f"{p} {x:.2f}" for p, x in peers.items())
