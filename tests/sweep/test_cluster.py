"""Sweeps on a Dask cluster: nothing is lost with a worker, and a scheduler that is not what it should be is one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from commandline import refused, save_toy

from spte.cli.migration.options import combinations
from spte.sweep import Journal, Sweep, sweep
from spte.sweep.points import SchedulerError, measure

distributed = pytest.importorskip("distributed", reason="needs distributed: pip install 'kvm-spte[cluster]'")


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.npz")


def points_of(toy, *bandwidths):
    return combinations([("bandwidth", bandwidths), ("log", ("bitmap", "ring")), ("cost", ("guess",))], {"trace": toy, "max_ns": 3 * 10**9})


@pytest.fixture
def cluster(tmp_path):
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")) as made:
        yield made


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # distributed's, of the worker that is killed
@pytest.mark.parametrize(("traces", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_cluster_that_loses_a_worker_half_way_loses_nothing(tmp_path, cluster, traces, victim):
    toys = [save_toy(tmp_path / f"toy{i}.npz", f"toy {i}") for i in range(traces)]
    plan = Sweep([point for toy in toys for point in points_of(toy, *range(10**6, 10**6 + 8))])
    done = []

    def half_way(finished, total, what):
        done.append(finished)
        if finished == (1 if traces == 2 else total // 4):
            os.kill(cluster.workers[victim].process.pid, signal.SIGKILL)

    with Journal(tmp_path / "journal", plan.digest) as journal:
        figures = sweep(plan, scheduler=cluster.scheduler_address, journal=journal, progress=half_way)
    assert done == list(range(1, len(plan.points) + 1))
    told = [json.loads(line)["point"] for line in (tmp_path / "journal").read_text().splitlines()[1:]]
    assert sorted(told) == list(range(len(plan.points)))
    assert figures == [measure(point, *plan.inputs(point)) for point in plan.points]


@contextmanager
def started(module, *argv):
    argv = [sys.executable, "-m", f"distributed.cli.{module}", "--no-dashboard", *map(str, argv)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def scheduler(tmp_path):
    told = tmp_path / "scheduler.json"
    with started("dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--scheduler-file", told) as process:
        deadline = time.monotonic() + 60
        while not told.exists() or not told.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, json.loads(told.read_text())["address"]


@pytest.mark.long
def test_a_scheduler_that_dies_is_one_line_and_what_is_finished_is_kept(capfd, toy, tmp_path, scheduler):
    process, address = scheduler
    plan = Sweep(points_of(toy, *range(10**6, 10**6 + 8)))
    refusal = pytest.raises(SchedulerError, match=r"died.*run the same command again")
    worker = started("dask_worker", address, "--no-nanny", "--nthreads", 1, "--local-directory", tmp_path)
    with worker, Journal(tmp_path / "journal", plan.digest) as journal, refusal:
        sweep(plan, scheduler=address, journal=journal, progress=lambda *_: process.kill())
    assert capfd.readouterr() == ("", "")
    with Journal(tmp_path / "journal", plan.digest) as journal:
        assert 0 < len(journal.done) < len(plan.points)


@pytest.mark.long
def test_a_scheduler_without_workers_is_one_line(capsys, toy, monkeypatch, scheduler):
    monkeypatch.setattr("spte.sweep.cluster.WORKERS_S", 0.5)
    _, address = scheduler
    err = refused(capsys, "sweep", toy, "--vary", "vcpus=1,2", "--scheduler", address)
    assert f"the Dask scheduler at '{address}' has no worker; start one: dask worker {address}; run the same command again" in err


@pytest.mark.long
@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_what_listens_and_is_no_scheduler_is_one_line(capsys, toy, monkeypatch, greeting):
    monkeypatch.setattr("spte.sweep.cluster.CONNECT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet, args=(server, greeting))
        thread.start()
        try:
            err = refused(capsys, "sweep", toy, "--vary", "vcpus=1,2", "--scheduler", f"tcp://127.0.0.1:{server.getsockname()[1]}")
        finally:
            thread.join()
    assert "what listens there does not speak Dask's protocol" in err


def greet(server, greeting):
    connection, _ = server.accept()
    with connection:
        connection.sendall(greeting)
        while connection.recv(4096):  # until the other side gives up
            pass


@pytest.mark.long  # the connection is tried for 5 s
def test_a_scheduler_that_is_not_there_is_one_line(capsys, toy):
    err = refused(capsys, "sweep", toy, "--vary", "vcpus=1,2", "--scheduler", "tcp://127.0.0.1:9")
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:9'" in err
    assert "no Dask scheduler answers at 'moon'" in refused(capsys, "sweep", toy, "--scheduler", "moon")
