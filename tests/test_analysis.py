"Analysis: on records whose result is known, on the committed ones by plain counting, and on a run that is stopped half-way."

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dfcnn.core import load_tensors
from dfcnn.data.datasets import DATASETS
from dfcnn.experiments.analysis import (
    KEPT,
    KeepShared,
    agreement_table,
    analysis_study,
    base_movement,
    base_table,
    filter_similarity,
    gains_and_losses,
    in_turn,
    rank_correlation,
    run_and_keep,
    transfer_matrix,
)
from dfcnn.experiments.configuration import RunConfig
from dfcnn.experiments.engine import StopAt, TimeIsUp
from dfcnn.experiments.records import load_records
from dfcnn.experiments.runs import run
from dfcnn.methods.registry import build_network
from dfcnn.testing import made_up

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = [r for f in ("full", "long") for r in sorted((ROOT / f"reports/{f}/cifar100").glob("*-trial0-*"))]


def test_a_task_that_falls_and_comes_back():
    record = made_up("DF-CNN", 0, [[80], [60, 50], [90, 50, 40]], names=["birds", "tools", "trees"])
    T, S = (100 * transfer_matrix(record.history, since).to_numpy() for since in ("end", "step"))
    np.testing.assert_allclose(T[1:, :-1], [[-20, np.nan], [10, 0]], atol=1e-9)
    np.testing.assert_allclose(S[1:, :-1], [[-20, np.nan], [30, 0]], atol=1e-9)
    told = gains_and_losses([record], test_images=400)
    assert told[["task", "learned"]].values.tolist() == [["birds", "trees"], ["tools", "trees"], ["birds", "tools"]]
    np.testing.assert_allclose(told.step, [30, 0, -20], atol=1e-9)
    errors = [0.3 / ((0.6 * 0.4 + 0.9 * 0.1) / 400) ** 0.5, 0, -0.2 / ((0.8 * 0.2 + 0.6 * 0.4) / 400) ** 0.5]
    np.testing.assert_allclose(told["in standard errors"], errors, atol=1e-9)
    assert gains_and_losses([record], most=1).step.round(6).tolist() == [30, -20]


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda f: f"{f.parent.parent.name}-{f.name}")
def test_transfer_of_committed_records_is_what_plain_counting_gives(folder):
    (record,) = load_records(folder)
    last: dict[tuple[int, int], tuple[int, float]] = {}  # (trained, evaluated) -> the latest test accuracy
    with (folder / "history.csv").open() as f:
        for row in csv.DictReader(f):
            key, epoch = (int(row["trained"]), int(row["evaluated"])), int(row["epoch"])
            if row["split"] == "test" and epoch >= last.get(key, (0, 0.0))[0]:
                last[key] = epoch, float(row["accuracy"])
    T, S = transfer_matrix(record.history), transfer_matrix(record.history, "step")
    n = record.config.tasks
    assert T.shape == (n, n) and n == 10
    for i in range(n):
        for j in range(n):
            if i <= j:
                assert np.isnan(T.iloc[i, j]) and np.isnan(S.iloc[i, j])
                continue
            assert T.iloc[i, j] == pytest.approx(last[i, j][1] - last[j, j][1], abs=1e-12)
            assert S.iloc[i, j] == pytest.approx(last[i, j][1] - last[i - 1, j][1], abs=1e-12)
    if record.config.method in ("STL", "STL-large", "ProgNN"):
        assert np.nanmax(np.abs(T)) == 0  # no task trains what an earlier one uses
    else:
        assert np.nanmin(T) < 0


def test_an_interval_asks_for_ranks_alone():
    "Which task of a pair comes first does not matter, nor by how much the ranks lie apart."
    g = np.random.default_rng(1)
    pairs = pd.DataFrame([dict(a=a, b=b, x=g.normal()) for b in range(10) for a in range(b)])
    pairs["y"] = pairs.x + g.normal(size=len(pairs))
    once, swapped = rank_correlation(pairs, "x", "y"), rank_correlation(pairs.rename(columns=dict(a="b", b="a")), "x", "y")
    assert once == swapped  # which of a pair comes first does not matter
    rho, low, high = once
    assert low < rho < high and low > 0  # they do go together
    monotone = rank_correlation(pairs.assign(y=pairs.y**3), "x", "y")
    np.testing.assert_allclose(monotone, once, atol=1e-12)  # ranks alone matter
    assert np.isnan(rank_correlation(pairs[:2], "x", "y")[0])  # too few pairs for a rank correlation


def test_filters_made_alike_are_found():
    "Three tasks: the second has the filters of the first in another order, with the next layer's inputs in that order too."
    net = build_network("STL", "cifar100", n_tasks=3).eval()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (net.filters(t) for t in (0, 1))
        for (W, b), (V, c) in zip(first, second):
            V.copy_(W), c.copy_(b)
        second[0][0].copy_(first[0][0][order]), second[0][1].copy_(first[0][1][order])
        second[1][0].copy_(first[1][0][:, order])
    x = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    alike = filter_similarity(net, x).set_index(["layer", "a", "b"])
    assert alike.cosine[1, 0, 1] < 0.5 and alike.cosine[2, 0, 1] < 0.5  # the cosine is misled by the order
    np.testing.assert_allclose([alike.cka[l, 0, 1] for l in (1, 2, 3, 4)], 1, atol=1e-5)  # CKA is not
    np.testing.assert_allclose([alike.cosine[l, 0, 1] for l in (3, 4)], 1, atol=1e-6)
    assert max(alike.cka[4, a, 2] for a in (0, 1)) < 0.99
    classes = pd.DataFrame([dict(a=0, b=1, likeness=1.0), dict(a=0, b=2, likeness=0.0), dict(a=1, b=2, likeness=-1.0)])
    table = agreement_table(alike.reset_index(), classes)
    assert table.index.tolist() == [1, 2, 3, 4] and table.columns.tolist() == ["cosine, likeness", "cka, likeness"]


def test_an_interval_is_as_wide_as_tasks_are_few():
    "What a task brings to all of its pairs is there once for each task: pairs drawn one by one would not know."
    g = np.random.default_rng(0)
    own = g.normal(size=(2, 12))  # of each task: one for x, one for y
    pairs = pd.DataFrame([dict(a=a, b=b, x=own[0, a] + own[0, b], y=own[1, a] + own[1, b]) for b in range(12) for a in range(b)])
    _, low, high = rank_correlation(pairs, "x", "y")
    drawn = [pairs.iloc[g.integers(len(pairs), size=len(pairs))] for _ in range(500)]
    by_pairs = np.quantile([d.x.corr(d.y, method="spearman") for d in drawn], [0.025, 0.975])
    assert high - low > 1.3 * np.ptp(by_pairs)


@pytest.fixture
def config():
    return RunConfig("shapes", "DF-CNN", 1, 3, 10, 1e-4, 2.5e-4, 1)


def test_a_run_that_was_stopped_has_kept_the_same(tmp_path, config):
    images = DATASETS["shapes"].images(None)
    whole = KeepShared(tmp_path / "whole.safetensors")
    run(config, images, tmp_path / "whole", cbs=[whole])
    with pytest.raises(TimeIsUp):  # after the first epoch, which is the first task
        run(config, images, tmp_path / "parts", cbs=[KeepShared(), StopAt(time.time())])
    rest = KeepShared(tmp_path / "parts.safetensors")
    run(config, images, tmp_path / "parts", cbs=[rest])
    assert len(whole.kept) == len(rest.kept) == 4
    for one, other in zip(whole.kept, rest.kept):
        assert one.keys() == other.keys() and all(p.equal(other[k]) for k, p in one.items())
    written = in_turn(load_tensors(tmp_path / "parts.safetensors")[0])
    assert base_movement(written).equals(base_movement(whole.kept)) and base_movement(written).shape == (3, 4)


def test_a_study_is_read_again_and_not_trained(tmp_path):
    asked = dict(factors="0.5 2", epochs=1, tasks=2, trials=1, output_dir=str(tmp_path), device="cpu", workers=1)
    study, told = analysis_study(**asked, records=str(ROOT / "reports/long/cifar100"))
    there = {f.parent.name for f in (ROOT / "reports/long/cifar100").glob("*/summary.json")}  # more with every long run
    assert [{r.folder.name for r in g} for g in told] == [there] and len(there) >= 3
    record, kept = run_and_keep(study)
    assert record.config.method == "DF-CNN" and (record.folder / KEPT).exists()
    table = base_table(study.run())
    assert table.index.tolist() == [0.5, 1, 2] and table.base.tolist() == [216, 432, 864]
    stamp = max(f.stat().st_mtime_ns for f in tmp_path.rglob("history.csv"))
    study, _ = analysis_study(**asked)
    run_and_keep(study), study.run()
    assert max(f.stat().st_mtime_ns for f in tmp_path.rglob("history.csv")) == stamp
