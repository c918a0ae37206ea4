"Records that are in the repository can be read by a process that imports nothing else."

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfcnn.checkpoint import save_tensors
from dfcnn.datasets import DATASETS
from dfcnn.registry import build_network
from dfcnn.runs import load_record

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(f.parent.relative_to(ROOT) for f in (ROOT / "reports").rglob("summary.json"))


def fresh(code: str, *args) -> str:
    "What a new process prints."
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_committed_records_can_be_read():
    assert any("mnist" in str(r) for r in RECORDS)
    code = "import sys; from dfcnn.runs import load_record; [print(repr(load_record(f).config.short)) for f in sys.argv[1:]]"
    said = fresh(code, *RECORDS).splitlines()
    assert len(said) == len(RECORDS) and any("of 2000 epochs" in s for s in said)


@pytest.mark.parametrize("method", ["STL", "DF-CNN.tc2"])
def test_a_network_of_a_multi_task_record_is_loaded(method, tmp_path):
    "The weights are not in the repository; here a network of the record's form stands for them."
    (record,) = [r for r in RECORDS if "mnist-heterogeneous" in str(r) and f"{method}-trial0" in r.name]
    shutil.copytree(ROOT / record, tmp_path / "record")
    config = load_record(ROOT / record).config
    network = build_network(method, DATASETS[config.dataset].architecture, n_tasks=config.tasks)
    save_tensors(network.state_dict(), tmp_path / "record/network.safetensors")
    code = "import sys; from dfcnn.runs import load_network; print(len(load_network(sys.argv[1]).tasks))"
    assert fresh(code, tmp_path / "record") == str(config.tasks) == "5"
