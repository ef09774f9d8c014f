"""What all benchmarks share: how threads wait, the judging of ratios, and the table at the end of the run."""

import os
from pathlib import Path

import pytest

# Threads that spin while they wait are fast on a machine of their own; beside other work each wait can cost a time
# slice, and then what has many short parallel loops looks 20 times slower than it is. OpenMP reads this as torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks import baselines
from benchmarks.comparison import baseline_key, known_ratios, missing_peers

BENCHMARKS = pytest.StashKey[list]()
HEADINGS = ("benchmark", "shape", "dtype", "ours", "ours / limit", "baseline", "peer / ours")


def pytest_addoption(parser):
    group = parser.getgroup("ratios to limits")
    group.addoption("--save-baselines", action="store_true", help="write this run's ratios as baselines, judge nothing")
    group.addoption("--baselines", type=Path, default=baselines.FOLDER, metavar="DIR", help="where baselines are")


def pytest_configure(config):
    # The plugin's own table ranks seconds of unlike things; --benchmark-verbose brings it back.
    config.option.benchmark_quiet = True
    config.stash[BENCHMARKS] = []
    if not config.option.save_baselines:
        known_ratios.update(baselines.load(config.option.baselines))


@pytest.fixture(autouse=True)
def _in_table(request, benchmark):
    yield
    if benchmark.stats and benchmark.extra_info:
        request.config.stash[BENCHMARKS].append(benchmark)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    info = item.funcargs["benchmark"].extra_info if "benchmark" in item.funcargs else {}
    judged = "baseline" in info
    if judged and (complaint := baselines.complaint(info["ratio_to_limit"], info["baseline"], info["device"])):
        pytest.fail(f"{baseline_key(info)}: {complaint}", pytrace=False)
    return outcome


def pytest_terminal_summary(terminalreporter, config):
    timed = config.stash[BENCHMARKS]
    if not timed:
        return
    rows = [HEADINGS, *map(_row, timed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("benchmarks")
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
    terminalreporter.write_line(f"{baselines.device_name()}; {baselines.versions()}")
    if missing_peers:
        terminalreporter.write_line(f"not among the peers: {', '.join(missing_peers)}")
    infos = [benchmark.extra_info for benchmark in timed]
    ratios = {baseline_key(info): info["ratio_to_limit"] for info in infos if "ratio_to_limit" in info}
    if config.option.save_baselines:
        terminalreporter.write_line(f"baselines written: {baselines.save(config.option.baselines, ratios)}")
    elif unjudged := ratios.keys() - known_ratios.keys():
        terminalreporter.write_line(
            f"no baseline for this device and these versions, so not judged: {len(unjudged)} of {len(ratios)} "
            "(--save-baselines writes them)"
        )


def _row(benchmark):
    info = benchmark.extra_info
    if "memory_ratio" in info:
        ours, limit, baseline = f"{info['extra_memory_mib']:,.0f} MiB", "", ""
        peers = info["memory_ratio"]
    else:
        ours, limit = f"{benchmark.stats.stats.min * 1e3:,.1f} ms", f"{info['ratio_to_limit']:.2f}"
        baseline = f"{info['baseline']:.2f}" if "baseline" in info else "none"
        peers = info["speedup"]
    words = ", ".join(f"{peer} {x:.2f}" for peer, x in peers.items())
    return info["name"], info["shape"], info["dtype"], ours, limit, baseline, words
