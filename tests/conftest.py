"""What all tests share: kernels run on the GPU where there is one, else in Triton's interpreter, on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any is imported


# Modules that take a minute or more, longest first: begun last, one of them would run on alone.
LONGEST = (
    *("aot", "engine_faults", "team", "token_stats", "diagnosis", "benchmarks", "ray", "training_ranks", "engine"),
    *("training_recipes", "forward", "store_faults", "pilot", "evaluation", "linear_cross_entropy", "topk_triton"),
    *("training_run", "trainers", "local", "estimate", "demo", "tensor_parallel"),
)


def pytest_collection_modifyitems(items):
    """The longest modules first; the order within a module, and of all others, stays."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Commands in processes that need not import everything anew: what any of them needs is imported once."""
    from tests.command import EVIDENCE, RANKS, Forks

    started = Forks(tmp_path_factory.mktemp("prints"), *EVIDENCE, *RANKS)
    yield started
    started.close()


@pytest.fixture(scope="module")
def one_thread():
    """As ENVIRONMENT in command.py has it for other processes: sums in another order have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, capfd):
    """The command line in this process, which does not measure the machine."""
    from tests.students import Command

    monkeypatch.setattr("lark_fast.flop.matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr("lark_fast.training.run.matmul_ceiling", lambda *_: 1e12)
    return Command(monkeypatch, capfd)
