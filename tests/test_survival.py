"Runs that are killed, and grids whose runs go on elsewhere, end with the numbers of a run that was left alone."

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from dask.distributed import Client, LocalCluster
from filelock import FileLock

from dfcnn.core import BadInput, load_tensors
from dfcnn.data.datasets import DATASETS
from dfcnn.data.images import Images
from dfcnn.methods.base import count_parameters
from dfcnn.methods.registry import build_network
from dfcnn.testing import few_images
from dfcnn.experiments.configuration import RunConfig
from dfcnn.experiments.records import load_record
from dfcnn.experiments.runs import run
from dfcnn.experiments.studies import lifelong_study

PAPER = dict(batch_size=10, lr=1e-3, decay=2.5e-4, eval_every=2)
LIFELONG = RunConfig("shapes", "DF-CNN", epochs=2, tasks=2, **PAPER)
TOGETHER = RunConfig("digits-heterogeneous-10%", "HPS", epochs=10, tasks=5, schedule="uniform", **PAPER)
CASES = [
    LIFELONG,
    replace(LIFELONG, method="DEN", epochs=4),  # its stages begin within an epoch, and it grows
    replace(TOGETHER, method="TF-distillation"),  # trains other networks first
    TOGETHER,
]
MOMENTS = 20


@lru_cache
def few(dataset: str) -> Images:
    "Images of a data set, those of the stand-in with few to test on."
    images = DATASETS[dataset].images(None)
    return few_images(images) if dataset == "shapes" else images


def work(config: RunConfig, folder: Path) -> None:
    run(config, few(config.dataset), folder, checkpoint_every=0)


def numbers(folder: Path) -> tuple:
    "All that a record says, apart from times."
    record = load_record(folder)
    summary = {k: v for k, v in record.summary.items() if "seconds" not in k}
    weights, _ = load_tensors(folder / "network.safetensors")
    return record.history.drop(columns="seconds").to_csv(), summary, {k: v.tolist() for k, v in weights.items()}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "Numbers of a case, and how long it takes in a process of its own."

    @lru_cache
    def get(case: int):
        folder, config = tmp_path_factory.mktemp("undisturbed"), CASES[case]
        few(config.dataset)
        start = time.monotonic()
        work(config, folder)
        return numbers(folder / config.name), time.monotonic() - start

    return get


@pytest.fixture(scope="session")
def processes():
    "A way to start processes that have imported the package already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dfcnn.experiments.studies"])
    return context


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_that_is_killed_goes_on(moment, tmp_path, undisturbed, processes):
    config, chance = CASES[moment % len(CASES)], random.Random(moment)
    expected, took = undisturbed(moment % len(CASES))
    if config.method == "DEN":  # else there would be no growth to go on with
        assert expected[1]["parameters"] > count_parameters(build_network("DEN", "cifar100", n_tasks=config.tasks))
    killed = False
    while not killed:
        shutil.rmtree(tmp_path / config.name, ignore_errors=True)
        process = processes.Process(target=work, args=(config, tmp_path))
        process.start()
        while not (tmp_path / config.name / "config.json").exists():
            assert process.is_alive()
            time.sleep(0.01)
        process.join(chance.uniform(0, took))
        process.kill()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0  # else it was over before, and another time is chosen
    work(config, tmp_path)
    assert numbers(tmp_path / config.name) == expected


def test_workers_stop_when_the_study_is_killed(tmp_path):
    study = f"""
from dfcnn.experiments.studies import lifelong_study
lifelong_study(methods="STL HPS", tasks=2, epochs=200, output_dir={str(tmp_path)!r}, workers=2).run()
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", study], stdout=subprocess.DEVNULL)
    progress: list[Path] = []
    while len(progress) < 2:
        assert process.poll() is None
        progress = list(tmp_path.rglob("progress.json"))
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(3)  # an epoch takes half a second
    for path in progress:
        with FileLock(path.with_name(".lock"), timeout=0):  # nobody works there any more
            assert not path.with_name("summary.json").exists()


def work_and_look(folder: Path) -> None:
    work(LIFELONG, folder)
    assert "torch._dynamo" not in sys.modules


def test_to_train_torch_dynamo_is_not_imported(tmp_path, processes):
    "It takes two seconds, in every worker of a study: see `RMSProp`."
    process = processes.Process(target=work_and_look, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def work_with_workers(folder: Path) -> None:
    lifelong_study(methods="STL HPS", tasks=1, epochs=1, output_dir=str(folder), workers=2).run()


def test_a_process_whose_study_is_over_can_end(tmp_path, processes):
    "Workers that stay for five minutes, in case there is more to do, would keep it."
    process = processes.Process(target=work_with_workers, args=(tmp_path,))
    process.start()
    while len([*tmp_path.rglob("summary.json")]) < 2:
        assert process.is_alive()
        time.sleep(0.1)
    process.join(30)
    assert process.exitcode == 0


@pytest.fixture
def dask_cluster(tmp_path):
    "Address of a dask scheduler with two workers, each a process that the test starts and stops."
    started = []

    def start(*command: str) -> None:
        dask = [sys.executable, "-m", "dask", *command]
        started.append(subprocess.Popen(dask, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    about = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(about))
    deadline = time.monotonic() + 60
    while not about.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    address = json.loads(about.read_text())["address"]
    for _ in range(2):
        start("worker", address, "--nthreads", "1", "--no-dashboard")
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield address
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=30)


def test_where_runs_are_carried_out_changes_no_number(tmp_path, dask_cluster):
    def study(name: str, **where) -> list[tuple]:
        grid = dict(methods="STL DF-CNN", epochs=1, tasks=2, trials=2, output_dir=str(tmp_path / name), device="cpu")
        records = lifelong_study(**grid, **where).run()
        assert len(records) == 4
        return [numbers(r.folder) for r in records]

    alone = study("alone", workers=1)
    assert study("side by side", workers=2) == alone
    assert study("cluster", scheduler=dask_cluster) == alone
    assert len({str(n[0]) for n in alone}) == 4  # and they are four different runs


def test_a_cluster_that_cannot_be_used_is_refused(tmp_path):
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(BadInput, match="workers of one thread each"):
            lifelong_study(output_dir=str(tmp_path), scheduler=cluster.scheduler_address)
