"""What all tests share: kernels run on the GPU where there is one, else in Triton's interpreter, on the CPU."""

import inspect
import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any is imported


def pytest_configure():
    """Half of its time Triton's interpreter looks through all of its language for what is built in, at each call of a
    function. That does not change, so it is looked up once.
    """
    if find_spec("triton") is None:
        return
    from triton.language import core
    from triton.runtime import interpreter

    built_in = {}

    def patch_builtin(package, *rest):
        if package not in built_in:
            built_in[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in built_in[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # and is not replaced already, by the function that calls this one
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


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
