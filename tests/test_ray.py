"""The same store from actors of a Ray cluster, some of them lost, and the same scores inside Ray Data. An actor takes
seconds to import what it needs, so few of them are started, and one cluster does for all."""

import contextlib
import json
import os
import pickle
import runpy
import secrets
import shutil
import signal
import sys
import tempfile
import threading

import numpy as np
import psutil
import pytest

from lark_fast.errors import UserError
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.scoring.store import read_manifest
from lark_fast.scoring.team_member import Asked, Refused, serve_on
from tests import races
from tests.command import ENVIRONMENT, Forks, make_records, write_jsonl, write_student
from tests.score_rows import table
from tests.test_engine_faults import rows_of, wait_for
from tests.test_examples import EXAMPLES

ray = pytest.importorskip("ray")

FEW = {"prestart_worker_first_driver": False}  # a process of Ray takes a second to start
QUICK = "import lark_fast.packing as p; p.CPU_WINDOW_FLOP = 0\n"  # windows of four packs


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of four CPUs: at two, two actors and a reader of Ray Data wait for each other."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets in it: its name has to be short
    before = psutil.Process().children(recursive=True)
    environment = {
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()},
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing goes over a network
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # Ray would leave one of its own in the home directory
    }
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False, "_system_config": FEW}
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=4, object_store_memory=100 << 20, _temp_dir=directory, **quiet)
        signal.signal(signal.SIGTERM, handler)  # Ray has one of its own
        # For commands: Ray takes a token to an address that it is given only where it is told so.
        patch.setitem(ENVIRONMENT, "RAY_AUTH_MODE", "token")
        patch.setitem(ENVIRONMENT, "RAY_AUTH_TOKEN", environment["RAY_AUTH_TOKEN"])
        yield ray.get_runtime_context().gcs_address
        processes = [process for process in psutil.Process().children(recursive=True) if process not in before]
        ray.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)  # which Ray has set
    assert not psutil.wait_procs(processes, 20)[1]
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def forks(tmp_path_factory, cluster):
    """Commands of a process that has imported Ray already."""
    started = Forks(tmp_path_factory.mktemp("prints"), "ray")
    yield started
    started.close()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


def words(pool, student, out, *more):
    """The words of the command; float32, so that what differs differs for a reason."""
    how = ("--dtype", "float32", "--device", "cpu", "--tokens-per-batch", 256, "--local-steps", 1)
    return ("score", "--pool", pool, "--student", student, "--out", out, *how, *more)


def actors():
    """The processes of the cluster's actors that score."""
    return [process for process in psutil.Process().children(recursive=True) if "ray::_Actor" in process_title(process)]


def process_title(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def begun(out, run, more=0):
    """Wait until a run has written something, and more than so many rows."""
    wait_for(lambda: list(out.glob("journal-*")) and len(rows_of(out)) > more, run, 300)


def same(out, whole):
    """Bit for bit the store of another run."""
    assert table(out).equals(table(whole))
    assert (out / "rejected.jsonl").read_bytes() == (whole / "rejected.jsonl").read_bytes()
    assert not list(out.glob("journal-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, forks, student):
    """A pool, and its scores by a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    records = list(make_records(150, 4))
    pool = write_jsonl(directory / "pool.jsonl", [*records[:500], {"messages": "broken"}, *records[500:]])
    forks.run(*words(pool, student, directory / "s"), before=QUICK)
    return pool, directory / "s"


def test_an_actor_is_killed(tmp_path, forks, student, cluster, whole):
    """What a local run has begun goes on in two actors; one is killed, and the end is the same bits."""
    pool, once = whole
    out = tmp_path / "s"
    forks.run(*words(pool, student, out, "--limit", 40), before=QUICK)
    how = ("--engine", "ray", "--ray-address", cluster, "--devices", 2, "--json")
    run = forks.start(*words(pool, student, out, *how), before=QUICK)
    begun(out, run, 60)
    actors()[0].kill()
    run.ended(0)
    done = json.loads(run.stdout)
    assert (done["scored"], done["kept"], done["rejected"]) == (560, 40, 1)
    assert done["devices"] == 2
    assert done["lost_processes"] == 1
    assert "was lost (ActorDiedError): its passes are done again" in run.stderr
    assert read_manifest(out)["config"]["engine"] == "ray"
    same(out, once)


def test_a_race(tmp_path, forks, student, cluster):
    """Problems race in actors as they do here."""
    pool = write_jsonl(tmp_path / "pool.jsonl", list(races.make_records())[:60])
    how = ("score", "--pool", pool, "--student", student, "--dtype", "float32", "--device", "cpu", "--race", 2)
    forks.run(*how, "--out", tmp_path / "here", before=races.RACE_SHORT_ONES)
    there = ("--engine", "ray", "--ray-address", cluster, "--devices", 1, "--out", tmp_path / "there")
    forks.run(*how, *there, before=races.RACE_SHORT_ONES)
    ours, theirs = (table(tmp_path / name) for name in ("there", "here"))
    columns = ["problem_id", "candidate_id", "n_raced", "winner", "audited"]
    assert ours.select(columns).equals(theirs.select(columns))
    assert sum(ours["n_raced"].to_pylist()) < sum(ours["n_tokens"].to_pylist())
    np.testing.assert_allclose(ours["nll"], theirs["nll"], rtol=1e-6)


def test_killed_and_gone_on_with_without_ray(tmp_path, forks, student, cluster, whole):
    """kill -9 of the command: its actors end with it, and a process of this machine goes on."""
    pool, once = whole
    out, how = tmp_path / "s", ("--engine", "ray", "--ray-address", cluster, "--devices", 1)
    run = forks.start(*words(pool, student, out, *how), before=QUICK)
    begun(out, run)
    own = actors()
    run.kill(signal.SIGKILL)
    run.wait()
    assert own
    assert not psutil.wait_procs(own, 20)[1]
    kept = len(rows_of(out))
    assert kept < 600
    done = forks.run(*words(pool, student, out), before=QUICK)
    assert f"{600 - kept} trajectories scored" in done.stdout
    same(out, once)
    assert [part.read_bytes() for part in part_files(out)] == [part.read_bytes() for part in part_files(once)]


def test_sigterm_is_not_for_ray(tmp_path, forks, student, cluster, whole):
    """It stops a run that waits for a GPU that the cluster does not have."""
    how = ("--engine", "ray", "--ray-address", cluster, "--devices", 1, "--device", "cuda")
    run = forks.start("score", "--pool", whole[0], "--student", student, "--out", tmp_path / "s", *how)
    told = "lark-fast: the Ray cluster has 0 GPUs for 1 actors; the others start when it has more\n"
    wait_for(lambda: run.stderr == told, run)
    run.kill(signal.SIGTERM)
    run.ended(130)
    assert run.stdout == ""


def asked(student, **changes):
    """What a member is told first."""
    config = ScoreConfig(pool=(), student=str(student), out="", device="cpu", dtype="float32")
    return Asked(config=config, device="cpu", members=1, **changes)


@pytest.mark.parametrize(
    ("broken", "message"),
    [(True, "cannot be loaded as a student"), (False, "other weights or another config than where the command runs")],
)
def test_a_node_says_why_it_cannot_score(tmp_path, student, broken, message):
    from lark_fast.scoring.ray_cluster import Ends

    if broken:
        for file in student.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    ends = Ends()
    threading.Thread(target=serve_on, args=(ends, "10.0.0.5"), daemon=True).start()
    ends.received.put(pickle.dumps(asked(tmp_path if broken else student, weights=["of another"])))
    refused = pickle.loads(ends.told.get(timeout=60))
    assert isinstance(refused, Refused)
    assert message in refused.reason
    assert refused.reason.endswith("(on 10.0.0.5)")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("--engine", "ray", "--ray-address", "127.0.0.1:9"), "--ray-address 127.0.0.1:9: no Ray cluster that can be"),
        (("--ray-address", "local"), "--ray-address: goes with --engine ray"),
        (("--ray-address", "local", "--dry-run"), "--ray-address: goes with --engine ray"),
        (("--engine", "ray", "--device-map", "auto"), "--engine ray gives each actor a student of its own"),
    ],
)
def test_what_does_not_go(tmp_path, forks, student, whole, how, message):
    arguments = ("score", "--pool", whole[0], "--student", student, "--out", tmp_path / "s")
    refused = forks.run(*arguments, *how, code=2)
    assert refused.stderr.startswith(f"lark-fast: {message}")
    assert refused.stderr.count("\n") == 1


def test_ray_is_not_installed(tmp_path, whole, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lark_fast.scoring.ray_cluster", raising=False)
    config = ScoreConfig(pool=(str(whole[0]),), student=str(student), out=str(tmp_path / "s"), engine="ray")
    with pytest.raises(UserError, match=r"^--engine ray: Ray is not installed; pip install 'lark-fast\[ray\]'$"):
        score_pool(config)


GPUS = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}]
CPUS = [{"CPU": 8.0}, {"CPU": 5.0}, {}]


@pytest.mark.parametrize(
    ("nodes", "devices", "device", "chosen"),
    [
        (GPUS, None, "auto", (["cuda:0"] * 12, {"num_gpus": 1, "num_cpus": 1})),
        (GPUS, "all", "cuda", (["cuda:0"] * 12, {"num_gpus": 1, "num_cpus": 1})),
        (GPUS, "3", "auto", (["cuda:0"] * 3, {"num_gpus": 1, "num_cpus": 1})),
        (GPUS, None, "cpu", (["cpu"] * 3, {"num_gpus": 0, "num_cpus": 8})),
        (CPUS, None, "auto", (["cpu"] * 2, {"num_gpus": 0, "num_cpus": 5})),
        (CPUS, "3", "auto", (["cpu"] * 3, {"num_gpus": 0, "num_cpus": 4})),
        (CPUS, "13", "cpu", (["cpu"] * 13, {"num_gpus": 0, "num_cpus": 1})),
        (CPUS, "20", "cpu", (["cpu"] * 20, {"num_gpus": 0, "num_cpus": 1})),
        (CPUS, "2", "cuda", (["cuda:0"] * 2, {"num_gpus": 1, "num_cpus": 1})),  # a cluster that grows gets some
    ],
)
def test_actors_and_what_they_take(nodes, devices, device, chosen):
    from lark_fast.scoring.ray_cluster import choose_actors

    assert choose_actors(nodes, devices, device) == chosen


@pytest.mark.parametrize(
    ("devices", "device", "message"),
    [
        ("0,1", "auto", "--devices 0,1: with --engine ray a number of actors, or all"),
        ("0", "auto", "--devices 0: with"),
        ("2", "cuda:1", "--device cuda:1: which one is Ray's to say"),
        (None, "cuda", "--device cuda: the Ray cluster has no GPU"),
    ],
)
def test_actors_that_cannot_be(devices, device, message):
    from lark_fast.scoring.ray_cluster import choose_actors

    with pytest.raises(UserError, match=message):
        choose_actors(CPUS, devices, device)


def test_the_example_stands_alone(tmp_path, cluster, one_thread, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["ray_scoring.py"])
    runpy.run_path(str(EXAMPLES / "ray_scoring.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "48 trajectories scored" in printed
    assert printed.endswith("48 trajectories; no nll is further than 0e+00 from that of a run without Ray\n")
    ours, theirs = (table(tmp_path / "example-run" / name) for name in ("scores", "scores-ray"))
    assert theirs.equals(ours)
    assert ray.is_initialized()  # it was not the example's to end


def test_scores_in_a_pipeline_of_ray_data(cluster, student, one_thread):
    """With rows that cannot be scored among them, and with g_hat by problem."""
    import pandas
    import ray.data

    from lark_fast import Scorer, g_hat
    from lark_fast.dropins.ray_data import ScoreBatches, with_g_hat

    records = list(make_records(6, 3))
    twin = records[4] | {"candidate_id": 9}
    rows = [*records, {"problem_id": 2, "candidate_id": 7, "teacher": "", "messages": []}, twin]
    ray.data.DataContext.get_current().enable_progress_bars = False
    arguments = {"fn_constructor_args": (str(student),), "fn_constructor_kwargs": {"dtype": "float32"}}
    scored = ray.data.from_items(rows).map_batches(ScoreBatches, **arguments, concurrency=1, batch_size=8)
    # As ``map_groups`` does, whose shuffle would start four workers more.
    groups = [with_g_hat(group) for _, group in scored.to_pandas().groupby("problem_id")]
    made = {(row["problem_id"], row["candidate_id"]): row for group in groups for row in group.to_dict("records")}
    assert made.keys() == {(row["problem_id"], row["candidate_id"]) for row in rows}
    refused = made.pop((2, 7))
    assert "messages" in refused["rejected"]
    assert pandas.isna([refused["nll"], refused["g_hat"]]).all()
    rows.pop(-2)
    expected = Scorer.from_pretrained(str(student), dtype="float32", device="cpu").score(rows)
    energies = g_hat([s.nll for s in expected], [s.brier for s in expected], [s.problem_id for s in expected])
    for one, energy in zip(expected, energies, strict=True):
        row = made[one.problem_id, one.candidate_id]
        assert (row["n_tokens"], row["rejected"], row["teacher"]) == (one.n_tokens, "", one.teacher)
        for name in ("nll", "brier", "entropy", "rank_mean", "rsr", "rho"):
            assert row[name] == pytest.approx(getattr(one, name), rel=1e-6)
        assert row["g_hat"] == pytest.approx(energy, rel=1e-5, abs=1e-6)
    arrays = {name: groups[1][name].to_numpy() for name in groups[1]}
    assert with_g_hat(arrays)["g_hat"].tolist() == groups[1]["g_hat"].tolist()
    assert made[1, 9]["g_hat"] == made[1, 1]["g_hat"]  # the same tokens: they tie exactly
