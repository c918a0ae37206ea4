"The totals of trainable parameters, against the authors' own count and the paper's tables."

from __future__ import annotations

import csv

import pytest
import torch

from dfcnn.methods.base import count_parameters
from dfcnn.methods.registry import build_network
from dfcnn.experiments.figures import parameter_table, targets

KNOWN = {  # (architecture, tasks) -> totals by the sizes of the authors' code
    ("cifar100", 10): {
        "SNN": 328_426,
        "STL": 3_284_260,
        "STL-large": 9_345_860,
        "HPS": 2_694_148,
        "ProgNN": 3_508_637,
        "DEN": 2_694_148,  # what it starts with: HPS
        "TF": 3_301_125,
        "DF-CNN": 7_963_252,
        "DF-CNN.tc2": 2_995_168,
    },
    ("officehome", 10): {
        "STL": 26_794_370,
        "STL-large": 129_285_250,
        "HPS": 12_274_562,
        "ProgNN": 32_718_543,
        "DF-CNN": 201_827_202,
    },
    ("mnist-10", 10): {
        "STL": 1_525_460,
        "HPS": 1_056_596,
        "TF": 1_531_905,
        "DF-CNN": 2_581_528,
        "DF-CNN.direct": 12_892_652,
        "DF-CNN.tc2": 1_182_874,
    },
    ("mnist-5", 5): {
        "STL": 762_730,
        "HPS": 554_346,
        "TF": 769_025,
        "DF-CNN": 1_063_574,
        "DF-CNN.direct": 4_972_018,
        "DF-CNN.tc2": 593_219,
    },
    ("cifar10-10", 10): {
        "STL": 3_279_060,
        "HPS": 2_688_948,
        "TF": 3_295_925,
        "TF-uniform": 3_295_925,
        "DF-CNN": 7_958_052,
        "DF-CNN.tc2": 2_989_968,
    },
    ("cifar10-5", 5): {
        "STL": 1_639_530,
        "HPS": 1_377_258,
        "TF": 1_656_095,
        "TF-distillation": 1_656_095,
        "DF-CNN": 3_979_242,
        "DF-CNN.direct": 22_834_602,
        "DF-CNN.tc2": 1_497_048,
    },
}


def total(method: str, architecture: str, tasks: int) -> int:
    with torch.device("meta"):  # shapes without memory: Office-Home's DF-CNN has 202 million values
        return count_parameters(build_network(method, architecture, n_tasks=tasks))


@pytest.mark.parametrize("architecture, tasks, method", [(*k, m) for k, v in KNOWN.items() for m in v])
def test_totals(architecture, tasks, method):
    assert total(method, architecture, tasks) == KNOWN[architecture, tasks][method]


def test_totals_against_the_authors_count(shared):
    names = {
        "STL": "STL",
        "SNN": "SNN",
        "HPS": "HPS",
        "TF": "TF",
        "PROG": "ProgNN",
        "DFCNN": "DF-CNN",
        "DFCNN_direct": "DF-CNN.direct",
        "DFCNN_tc2": "DF-CNN.tc2",
    }
    data = {
        "mnist5": "mnist-5",
        "mnist10": "mnist-10",
        "cifar10_5": "cifar10-5",
        "cifar10_10": "cifar10-10",
        "cifar100_10": "cifar100",
        "officehome": "officehome",
    }
    checked = 0
    with (shared / "oracle/param_counts.csv").open() as f:
        for row in csv.DictReader(f):
            if row["built"] == "yes" and row["model_type"] in names:
                ours = total(names[row["model_type"]], data[row["data_type"]], int(row["num_tasks"]))
                assert ours == int(row["num_trainable_var"]), row
                checked += 1
    assert checked == 46


PAPER = [  # (architecture, tasks, the paper's total): App. B.3, Fig. 4d, Table 2
    ("cifar100", 10, 2.80e6),
    ("cifar10-10", 10, 2.3e6),
    ("cifar10-5", 5, 1.2e6),
]


@pytest.mark.parametrize("architecture, tasks, paper", PAPER)
def test_reduced_networks_are_within_one_percent_of_the_paper(architecture, tasks, paper):
    assert abs(total("DF-CNN-reduced", architecture, tasks) / paper - 1) < 0.01


def test_every_total_of_the_paper_is_counted():
    "Each model size in the file of the paper's numbers has its row in the table of sizes."
    stated = targets().query("metric == 'parameters_total_M'")
    assert parameter_table()["paper (M)"].notna().sum() == len(stated)
