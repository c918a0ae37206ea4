"Records that are in the repository can be read by a process that imports nothing else."

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfcnn.core import BadInput, save_tensors
from dfcnn.data.datasets import DATASETS
from dfcnn.methods.expandable import DEN
from dfcnn.methods.registry import build_network
from dfcnn.experiments.configuration import RunConfig
from dfcnn.experiments.records import folder_lock, load_network, load_record, made_by, made_with, probe
from dfcnn.experiments.runs import run

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
    code = "import sys; from dfcnn.experiments.records import load_record; [print(repr(load_record(f).config.short)) for f in sys.argv[1:]]"
    records = [r for r in RECORDS if "riddle" not in r.parts]  # whose methods are listed by the notebook alone that made them
    said = fresh(code, *records).splitlines()
    assert len(said) == len(records) > 20 and any("of 2000 epochs" in s for s in said)


SHORT = RunConfig("shapes", "DEN", epochs=1, tasks=2, batch_size=10, lr=1e-4, decay=0.0, eval_every=1)


def test_the_probe_goes_through_all_stages_of_den(monkeypatch):
    "What is never carried out may change unnoticed."
    called = set()

    def watched(name, real):
        return lambda self, *args: (called.add(name), real(self, *args))[1]

    for name in ("prune", "split"):
        monkeypatch.setattr(DEN, name, watched(name, getattr(DEN, name)))
    monkeypatch.setattr("dfcnn.experiments.records._probes", {})
    probe(SHORT, DATASETS["shapes"].images(None))
    assert called == {"prune", "split"}


def test_a_record_says_that_convolutions_used_tf32(monkeypatch):
    "On a GPU torch lets them, unless it is told otherwise."
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for allowed in (False, True):
            matmul.allow_tf32, cudnn.allow_tf32 = False, allowed
            about = made_with(replace(SHORT, method="STL"), DATASETS["shapes"].images(None), torch.device("cuda"))
            assert about["tf32"] is allowed
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("method", ["STL", "DF-CNN.tc2"])
def test_a_network_of_a_multi_task_record_is_loaded(method, tmp_path):
    "The weights are not in the repository; here a network of the record's form stands for them."
    (record,) = [r for r in RECORDS if "mnist-heterogeneous" in str(r) and f"{method}-trial0" in r.name]
    shutil.copytree(ROOT / record, tmp_path / "record")
    config = load_record(ROOT / record).config
    network = build_network(method, DATASETS[config.dataset].architecture, n_tasks=config.tasks)
    save_tensors(network.state_dict(), tmp_path / "record/network.safetensors", made_by=made_by(tmp_path / "record"))
    code = "import sys; from dfcnn.experiments.records import load_network; print(len(load_network(sys.argv[1]).tasks))"
    assert fresh(code, tmp_path / "record") == str(config.tasks) == "5"


RECORD = next(ROOT / r for r in RECORDS if "reports/full" in r.as_posix())


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("dataset", "nowhere", "The data set 'nowhere' is not listed"),
        ("method", "../../evil", "The method '../../evil' is not listed"),
        ("method", ["STL"], r"'method' of a run must be of type str, but it is \['STL'\]"),
        ("epochs", "20", "'epochs' of a run must be of type int, but it is '20'"),
    ],
)
def test_a_network_of_a_record_that_names_what_is_not_there(field, value, said, tmp_path):
    content = json.loads((RECORD / "config.json").read_text())
    content["config"][field] = value
    (tmp_path / "record").mkdir()
    (tmp_path / "record/config.json").write_text(json.dumps(content))
    shutil.copy(RECORD / "history.csv", tmp_path / "record")
    with pytest.raises(BadInput, match=said):
        load_network(tmp_path / "record")
    assert [f.name for f in tmp_path.iterdir()] == ["record"]


def test_no_run_writes_outside_of_its_folder(tmp_path):
    config = replace(load_record(RECORD).config, method="../../evil")
    with pytest.raises(BadInput, match="'../../evil' is not listed"):
        run(config, DATASETS["shapes"].images(None), tmp_path / "a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["config.json", "summary.json", "history.csv"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"{}x"], ids=["empty", "nested", "bytes", "no JSON"])
def test_a_damaged_record_is_refused_with_advice(file, content, tmp_path):
    for name in ("config.json", "summary.json", "history.csv"):
        shutil.copy(RECORD / name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match="does not hold the record of a run .* Move the folder away"):
        load_record(tmp_path)


def test_what_a_killed_write_has_left_is_removed(tmp_path):
    for name in (".tmpAb3dEf", ".history.csv.x1y2z3"):
        (tmp_path / name).write_text("half")
    with folder_lock(tmp_path):
        assert {f.name for f in tmp_path.iterdir()} <= {".lock"}
