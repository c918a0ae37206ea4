"The application notebooks run through papermill (`nbdev_test` runs all others), everything that is generated from a notebook is up to date with it, and the library notebooks read as the house asks."

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from dfcnn.core import BadInput
from dfcnn.methods.registry import METHODS
from dfcnn.experiments.claims import claims, scorecard
from dfcnn.experiments.comparison import target_table

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
APPLICATIONS = [n for n in NOTEBOOKS if n.stem in ("lifelong", "ablations", "mtl", "paper", "riddle", "any_network", "analysis")]
LIBRARY = [n for n in NOTEBOOKS if n.stem[0].isdigit()]  # numbered: what the package is exported from


def call(*args, cwd=ROOT, ok=True, **env) -> subprocess.CompletedProcess:
    "Run a command of this environment; its output is shown when it fails."
    done = subprocess.run(
        [str(BIN / args[0]), *map(str, args[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **env},
    )
    assert not ok or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def papermill(out: Path, *args, ok=True, notebook=ROOT / "nbs/lifelong.ipynb") -> subprocess.CompletedProcess:
    parameters = [o for name, value in zip(args[::2], args[1::2]) for o in ("-p", name, value)]
    return call("papermill", notebook, out, *parameters, ok=ok, cwd=out.parent)


def test_lifelong_runs_through_papermill(tmp_path, monkeypatch):
    out = tmp_path / "out.ipynb"
    papermill(out, "epochs", 1, "tasks", 2, "methods", "STL DF-CNN")
    folder = tmp_path / "reports/lifelong/shapes"  # beside the rendered notebook
    assert {f.name for f in folder.iterdir() if f.is_file()} >= {
        "table.csv",
        "learning_curves.png",
        "forgetting.png",
    }
    records = [d for d in folder.iterdir() if d.is_dir()]
    assert len(records) == 2 and all((r / "summary.json").exists() for r in records)
    cells = nbformat.read(out, 4).cells
    shown = "".join(json.dumps(c.get("outputs", [])) for c in cells)
    assert "This is a short run" in shown and "stand-in" in shown
    assert (
        sum("image/png" in json.dumps(c.get("outputs", [])) for c in cells) == 7
    )  # tasks, differences, curves, forgetting, matrix, convergence, progress
    stamp = max(f.stat().st_mtime_ns for r in records for f in r.iterdir())
    monkeypatch.chdir(tmp_path)
    run_cells("lifelong", ("epochs", "1", "tasks", "2", "methods", "STL DF-CNN"))
    assert (
        max(f.stat().st_mtime_ns for r in records for f in r.iterdir()) == stamp
    ), "finished runs were run again"


def test_every_method_runs_through_papermill(tmp_path):
    papermill(tmp_path / "out.ipynb", "methods", "all", "epochs", 1, "tasks", 2)
    with (tmp_path / "reports/lifelong/shapes/table.csv").open() as f:
        shown = [row["model"] for row in csv.DictReader(f)]
    assert shown == [m.title for m in METHODS.values() if not m.beyond]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    described = "".join(json.dumps(c.get("outputs", [])) for c in cells)
    assert "leaves it out of the lifelong experiments" in described  # the paper's caveat about TF


def test_any_network_runs_through_papermill(tmp_path):
    out = tmp_path / "out.ipynb"
    papermill(out, "epochs", 1, "tasks", 1, "methods", "DF-half", notebook=ROOT / "nbs/any_network.ipynb")
    shown = "".join(json.dumps(c.get("outputs", [])) for c in nbformat.read(out, 4).cells)
    assert shown.count("image/png") == 3 and "**This is a short run**: 1 of 2000 epochs" in shown  # idea, accuracy, curves
    assert "training step" in shown and (tmp_path / "reports/any_network/shapes").is_dir()


def test_ablations_run_through_papermill(tmp_path):
    out = tmp_path / "out.ipynb"
    papermill(out, "epochs", 1, "tasks", 2, notebook=ROOT / "nbs/ablations.ipynb")
    with (tmp_path / "reports/ablations/shapes/costs.csv").open() as f:
        costs = {row["model"]: row for row in csv.DictReader(f)}
    assert costs["DF-CNN.direct"]["of each task"] == "4,567,274"
    assert costs["DF-CNN.tc2"]["shared at the start"] == "4,128"


def test_the_multi_task_study_runs_through_papermill(tmp_path):
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/mtl.ipynb"
    papermill(out, "epochs", 6, "fractions", "10% 50%", "methods", "STL TF-distillation", notebook=notebook)
    folder = tmp_path / "reports/mtl/digits-heterogeneous"
    with (folder / "table.csv").open() as f:
        table = {row["model"]: row for row in csv.DictReader(f)}
    assert list(table) == ["STL", "TF (Distillation)"] and "error at 50% (%)" in table["STL"]
    assert len(list(folder.glob("*/summary.json"))) == 4 and (folder / "errors.png").exists()
    shown = out.read_text()
    assert "This is a short run" in shown and "scikit-learn's handwritten digits" in shown


def test_mnist_shows_the_papers_errors(tmp_path, shared):
    data = ("dataset", "mnist", "data_dir", shared / "data", "fractions", "3%")
    parameters = (*data, "epochs", 5, "trials", 2)
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/mtl.ipynb"
    papermill(out, *parameters, "methods", "STL", "eval_every", 5, notebook=notebook)
    with (tmp_path / "reports/mtl/mnist-heterogeneous/table.csv").open() as f:
        (row,) = csv.DictReader(f)
    assert row["paper at 3% (%)"] == "0.99" and 0 < float(row["error at 3% (%)"].split(" ± ")[0]) < 50


def test_every_listed_claim_and_number_has_its_row(shared):
    lines = (shared / "paper/claims.md").read_text().splitlines()
    listed = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    ours = scorecard([]).id.tolist()
    assert [i for i in ours if i in listed] == listed and len(listed) > 20
    assert set(ours) - set(listed) == {"O4"}  # App. D says that of Office-Home, too
    assert target_table([]).source.tolist() == pd.read_csv(shared / "paper/targets.csv").source.tolist()


def test_the_paper_is_shown_beside_the_records(tmp_path):
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/paper.ipynb"
    records = shutil.copytree(ROOT / "reports", tmp_path / "records", ignore=shutil.ignore_patterns("*.ipynb", "*.png"))
    known = next((records / "mnist-heterogeneous").glob("DF-CNN-trial0-*"))
    other = shutil.copytree(known, records / "in-turn/mnist-heterogeneous" / known.name) / "config.json"  # with settings of its own
    other.write_text(other.read_text().replace('"uniform"', '"round-robin"'))
    papermill(out, "records", records, notebook=notebook)
    read = lambda name: list(csv.DictReader((tmp_path / f"reports/paper/{name}.csv").open()))
    assert [row["id"] for row in read("scorecard")] == [c.id for c in claims()]
    assert len(read("targets")) == 200
    known = {"reproduced", "contradicted", "undecided", "not run"}
    assert {row["verdict"] for row in read("scorecard")} <= known
    verdicts = {row["id"]: row["verdict"] for row in read("scorecard")}
    assert verdicts["C2"] == "reproduced" and verdicts["O1"] == "not run"  # counted; no images, so no records
    cells = nbformat.read(out, 4).cells
    shown = "".join(json.dumps(c.get("outputs", [])) for c in cells)
    assert shown.count("In the paper:") == 12 and shown.count("*Ours:* not run.") >= 4
    assert shown.count("image/png") >= 3  # forgetting, convergence, learning curves
    assert "SHORT RUN" in shown and "no record on Office-Home" in shown
    assert "loss mean, mean_squares_restart epoch" in shown and "draw round-robin" in shown
    assert "peak with every tenth score alone" in shown  # of the runs in long/cifar100 that were scored after every epoch


def test_the_paper_trains_for_so_many_hours_and_shows_it(tmp_path, shared):
    out, notebook, archives = tmp_path / "out.ipynb", ROOT / "nbs/paper.ipynb", tmp_path / "data"
    archives.mkdir()
    (archives / "mnist.tgz").symlink_to(shared / "data/mnist.tgz")  # no other images
    parameters = ("records", "records", "data_dir", archives, "workers", 1)
    papermill(out, *parameters, "hours", 0.01, notebook=notebook)
    shown = "".join(json.dumps(c.get("outputs", [])) for c in nbformat.read(out, 4).cells)
    assert "A first look, short" in shown and "The time is up." in shown
    made = {f.parent.name.split("-trial")[0] for f in (tmp_path / "records/runs/mnist-heterogeneous").glob("*/summary.json")}
    assert made & {"STL", "DF-CNN"} and "MNIST, heterogeneous, 3% of the data" in shown
    assert (tmp_path / "reports/paper/scorecard.csv").exists()


def test_the_riddle_runs_through_papermill(tmp_path):
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/riddle.ipynb"
    some = ("candidates", "as released, no dropout, classes in order", "methods", "STL DF-CNN")
    parameters = ("dataset", "shapes", *some, "epochs", 1, "longer", 2, "tasks", 1)
    papermill(out, *parameters, notebook=notebook)
    assert len(list((tmp_path / "reports/riddle").rglob("summary.json"))) == 3 * 2 + 2
    shown = "".join(json.dumps(c.get("outputs", [])) for c in nbformat.read(out, 4).cells)
    assert shown.count("image/png") == 2 and "mean loss and restart" in shown


def test_the_analysis_runs_through_papermill(tmp_path):
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/analysis.ipynb"
    short = ("epochs", 1, "tasks", 3, "trials", 1, "factors", "0.25 1")
    papermill(out, *short, notebook=notebook)  # no reports there: its own run is shown
    shown = "".join(json.dumps(c.get("outputs", [])) for c in nbformat.read(out, 4).cells)
    assert shown.count("image/png") == 4  # movement, filters, transfer, bases
    assert "SHORT RUN: 1 of 2000 epochs per task and 3 of 10 tasks" in shown and "in a single trial" in shown
    assert len(list((tmp_path / "reports/analysis/shapes").glob("*/shared.safetensors"))) == 1
    papermill(out, *short, "records", ROOT / "reports/full/cifar100", notebook=notebook)
    shown = "".join(json.dumps(c.get("outputs", [])) for c in nbformat.read(out, 4).cells)
    assert "the paper's 2000 epochs per task" in shown and "complete record found" in shown


def test_officehome_runs_where_its_folder_is(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cells("lifelong", ("dataset", "officehome", "data_dir", str(home), "epochs", "1", "tasks", "1", "methods", "STL"))
    (record,) = (tmp_path / "reports/lifelong/officehome").glob("*/summary.json")
    assert json.loads(record.read_text())["parameters"] == 2_679_437
    assert "paper: peak accuracy" in (tmp_path / "reports/lifelong/officehome/table.csv").read_text()


def test_cifar100_shows_the_papers_numbers(tmp_path, shared):
    short = ("epochs", 1, "tasks", 1, "methods", "STL")
    papermill(tmp_path / "out.ipynb", "dataset", "cifar100", "data_dir", shared / "data", *short)
    assert "31.2 ± 2.2" in (tmp_path / "reports/lifelong/cifar100/table.csv").read_text()


REFUSED = {  # notebook -> parameters and what is said of them
    "paper": [
        (("record", "."), "Unknown parameter 'record'. Did you mean 'records'?"),
        (("records", "nowhere"), "There is no folder 'nowhere'"),
        (("records", "."), "There are no complete run records below '.'"),
        (("hours", "-1"), "Parameter 'hours' must be a number of at least 0"),
        (("hours", "1", "data_dir", "nowhere"), "Data folder 'nowhere' does not exist"),
    ],
    "lifelong": [
        (("dataset", "cifar1000"), "Unknown data set 'cifar1000'. Did you mean 'cifar100'?"),
        (("methods", "STL XYZ"), "Unknown method 'XYZ'"),
        (("epoch", "3"), "Unknown parameter 'epoch'. Did you mean 'epochs'?"),
        (("epochs", "many"), "Parameter 'epochs' must be a whole number"),
        (("device", "cuda:7"), "Device 'cuda:7' is not available"),
        (("dataset", "cifar100", "data_dir", "nowhere"), "Data folder 'nowhere' does not exist"),
        (
            ("dataset", "officehome", "data_dir", "."),
            "There is no Office-Home in '.'. Office-Home can come from (a) the original archive",
        ),
    ],
    "riddle": [
        (("dataset", "mnist"), "Unknown data set 'mnist'"),
        (("candidates", "magic"), "Unknown candidate 'magic'"),
    ],
    "analysis": [
        (("dataset", "mnist"), "Unknown data set 'mnist'"),
        (("factors", "big"), "Parameter 'factors' must name numbers"),
        (("record", "."), "Unknown parameter 'record'. Did you mean 'records'?"),
        (("records", "."), "There are no complete records of several tasks"),
        (("tasks", "1"), "let there be at least two"),
    ],
    "ablations": [
        (
            ("dataset", "officehome", "data_dir", "."),
            "There are no sizes of DFCNNDirect for the architecture 'officehome'",
        ),
    ],
    "mtl": [
        (("dataset", "shapes"), "Unknown data set 'shapes'"),
        (("distribution", "mixed"), "Unknown distribution 'mixed'"),
        (("fractions", "3%"), "Unknown fraction of Handwritten digits of scikit-learn '3%'"),
        (("methods", "STL DEN"), "DEN learns its tasks one after the other, and these come together"),
        (("draw", "random"), "Unknown draw 'random'"),
        (("tasks", "3"), "Unknown parameter 'tasks'"),
        (("dataset", "mnist", "fractions", "3%", "data_dir", "."), "There is no MNIST in '.'"),
    ],
}


def run_cells(notebook: str, parameters: tuple[str, ...]) -> None:
    "Run a notebook's cells in this process, with parameters set where and as papermill sets them."
    shown: dict = {"In": [""]}
    for cell in nbformat.read(ROOT / f"nbs/{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code" or "%pip" in cell.source:
            continue
        exec(cell.source, shown)
        if "parameters" in cell.metadata.get("tags", []):
            given = {k: int(v) if re.fullmatch(r"-?\d+", v) else v for k, v in zip(parameters[::2], parameters[1::2])}
            shown["In"].append("\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in given.items())]))
            exec(shown["In"][-1], shown)


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [(notebook, *case) for notebook, cases in REFUSED.items() for case in cases],
    ids=lambda p: " ".join(p) if isinstance(p, tuple) else p if p in REFUSED else "",
)
def test_bad_input_ends_before_training(tmp_path, monkeypatch, notebook, parameters, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as said:
        run_cells(notebook, parameters)
    assert message in str(said.value) and not list(tmp_path.rglob("history.csv"))


@pytest.mark.parametrize("notebook", REFUSED)
def test_of_bad_input_papermill_shows_one_sentence(tmp_path, notebook):
    parameters, message = REFUSED[notebook][0]
    done = papermill(tmp_path / "out.ipynb", *parameters, ok=False, notebook=ROOT / f"nbs/{notebook}.ipynb")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and message in said
    assert "Traceback (most recent call last)" not in said.split("Exception encountered")[-1]


def test_without_its_tag_the_notebook_refuses_to_run(tmp_path):
    nb = nbformat.read(ROOT / "nbs/lifelong.ipynb", 4)
    for cell in nb.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(nb, tmp_path / "untagged.ipynb")
    done = papermill(tmp_path / "out.ipynb", "epochs", 1, ok=False, notebook=tmp_path / "untagged.ipynb")
    assert done.returncode != 0 and "still have its tag" in done.stdout + done.stderr


@pytest.mark.parametrize("notebook", APPLICATIONS, ids=lambda n: n.name)
def test_parameters_are_tagged(notebook):
    assert sum("parameters" in c.metadata.get("tags", []) for c in nbformat.read(notebook, 4).cells) == 1


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda n: n.name)
def test_exported_code_comes_one_idea_at_a_time_after_prose(notebook):
    cells = nbformat.read(notebook, 4).cells
    for before, cell in zip(cells[2:], cells[3:]):  # the first exported cell imports
        if cell.cell_type == "code" and "#| export" in cell.source:
            assert before.cell_type == "markdown", cell.source
            ideas = [node for node in ast.parse(cell.source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            assert len(ideas) < 2 or len(cell.source.splitlines()) <= 40, cell.source


def test_generated_files_are_up_to_date(tmp_path):
    copy = tmp_path / "dfcnn"
    apart = (".git", ".venv*", "lifelong", "ablations", "mtl", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*apart))
    for module in (copy / "dfcnn").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    (copy / "README.md").unlink()
    call("nbdev_clean", cwd=copy)
    call("nbdev_export", cwd=copy)
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ".ci/readme"], cwd=copy, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    stale = []
    for what in ("nbs/*.ipynb", "dfcnn/**/*.py", "README.md"):
        here, fresh = ({f.relative_to(root): f.read_text() for f in root.glob(what)} for root in (ROOT, copy))
        stale += [str(k) for k in here.keys() | fresh.keys() if here.get(k) != fresh.get(k)]
    assert not stale, f"out of date with its notebook: {stale}; run nbdev_clean, nbdev_export and .ci/readme"


def test_rooms_import_one_way():
    "The contract in .importlinter: core, then data and methods, then training, then experiments; no circles."
    call("lint-imports", "--no-cache")


def test_exported_modules_need_no_tools_of_the_workshop():
    "No module imports nbdev, papermill or Jupyter, so that the package runs where only torch, fastai and their like are installed."
    code = "import sys, dfcnn.experiments.figures; print(*{m.partition('.')[0] for m in sys.modules} & {'nbdev', 'papermill', 'nbclient', 'execnb'})"
    assert call("python", "-W", "ignore", "-c", code).stdout.split() == []
