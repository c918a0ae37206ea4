"What lies in `reports/` is what today's code draws from the records there."

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dfcnn.experiments.reports import index, render
from dfcnn.experiments.comparison import side_by_side

ROOT = Path(__file__).resolve().parent.parent
ADVICE = "Run `bash .ci/reports` if the change is meant."


def same_table(here: Path, fresh: Path) -> None:
    "Compare two CSV files, numbers to five digits."
    tables = [pd.read_csv(f, keep_default_na=False, na_values=["nan"]) for f in (here, fresh)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, check_dtype=False, obj=f"{here.relative_to(ROOT)}. {ADVICE}")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, list[Path]]:
    into = tmp_path_factory.mktemp("reports")
    return into, [f.relative_to(into) for f in render(ROOT / "reports", into)]


def test_every_table_and_figure_shows_what_its_records_say(drawn):
    into, folders = drawn
    assert {f.as_posix() for f in folders} >= {"full/cifar100", "short/cifar100", "mnist-heterogeneous"}
    for folder in folders:
        names = sorted(f.name for f in (into / folder).iterdir())
        assert names == sorted(f.name for f in (ROOT / "reports" / folder).iterdir() if f.is_file()), ADVICE
        for name in names:
            if name.endswith(".csv"):
                same_table(ROOT / "reports" / folder / name, into / folder / name)


def test_the_scorecard_is_that_of_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of records are written as they are given
    side_by_side("reports", tmp_path)
    for f in sorted(tmp_path.iterdir()):
        same_table(ROOT / "reports/paper" / f.name, f)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in (ROOT / "reports/paper").iterdir()}, ADVICE


def test_the_index_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "reports/README.md").read_text() == index("reports"), ADVICE
