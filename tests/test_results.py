"What `results.ipynb` says in words is what its records say: each phrase stands beside the numbers that it speaks of."

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest

from dfcnn.experiments.figures import REACHED, differences, lead, target
from dfcnn.experiments.metrics import accuracy_by_epoch, convergence_epochs, forgetting_ratio, own_phase
from dfcnn.experiments.records import Record, load_records

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG, FULL, RESTART, MNIST = "short/cifar100", "long/cifar100", "full/cifar100", "mean_and_restart/cifar100", "mnist-heterogeneous"
AGAINST_ALL = "mnist-homogeneous"
PEAK, END, LAST = REACHED
WHOLE = {word: n for n, word in enumerate("one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split(), 1)}
PART = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5}


@cache
def prose() -> str:
    cells = nbformat.read(ROOT / "nbs/results.ipynb", as_version=4).cells
    return " ".join(" ".join(c.source for c in cells if c.cell_type == "markdown").split())


@cache
def study(folder: str) -> list[Record]:
    return load_records(ROOT / "reports" / folder)


def mean(folder: str, method: str, what: str | Callable) -> float:
    "Of a key of summaries, or of a function of histories; over tasks and trials."
    found = [r.summary[what] if isinstance(what, str) else np.mean(what(r.history)) for r in study(folder) if r.config.method == method]
    return float(np.mean(found))


def above_stl(folder: str, method: str, what: str = PEAK) -> float:
    return float(differences(study(folder), what)["above STL"][method].mean())


def df_cnn_above(folder: str, method: str, what: str = PEAK) -> float:
    return float(differences(study(folder), what)["DF-CNN above it"][method].mean())


def trials(folder: str, method: str) -> np.ndarray:
    "How far DF-CNN is above a method after the last task, trial by trial."
    return differences(study(folder), LAST)["DF-CNN above it"][method].to_numpy()


def ends(folder: str) -> list[float]:
    "Accuracy at the end of a task of all methods but DF-CNN.tc2."
    return [100 * mean(folder, m, END) for m in {r.config.method for r in study(folder)} - {"DF-CNN.tc2"}]


def after(folder: str, method: str, epochs: int) -> float:
    return 100 * mean(folder, method, lambda history: accuracy_by_epoch(history)[epochs])


def passes(method: str) -> float:
    "Epochs of the full schedule until the mean of tasks is above the peak that the paper prints."
    (record,) = (r for r in study(FULL) if r.config.method == method)
    accuracy = 100 * accuracy_by_epoch(record.history)
    return float(accuracy.index[accuracy > target("cifar100", method, "peak_per_task_accuracy")[0]][0])


def kept(folder: str, method: str) -> float:
    return 100 * mean(folder, method, lambda history: forgetting_ratio(history, "end").iloc[-1, :-1])


def converged(folder: str, method: str, reference: str) -> float:
    return mean(folder, method, lambda history: convergence_epochs(history, of=reference))


def counted(folder: str) -> Counter:
    "Trials of each method."
    return Counter(r.config.method for r in study(folder))


def tenth_task(folder: str) -> float:
    "Test accuracy that STL reaches on it within 30 epochs, first trial."
    own = own_phase(study(folder)[0].history).loc[9]
    return 100 * float(own.accuracy[own.task_epoch <= 30].max())


def trend(folder: str, method: str) -> float:
    "Points that the lead over STL grows with each task."
    points = lead(study(folder))[method].mean()
    return float(np.polyfit(points.index, points, 1)[0])


def paper_error(method: str, setting: str) -> float:
    "Test error on MNIST at 3% of the data, in percent."
    return target("mnist", method, "error_rate_percent", setting, "3%")[0]


def our_error(method: str, folder: str) -> float:
    return 100 * mean(folder, method, "test_error")


def errors(method: str) -> float:
    "Test error on MNIST's pairs over the paper's."
    return our_error(method, MNIST) / paper_error(method, "mtl_heterogeneous")


def below(method: str) -> float:
    "How far the error of one-vs-all tasks is below the paper's, in percent of it."
    return 100 * (1 - our_error(method, AGAINST_ALL) / paper_error(method, "mtl_homogeneous"))


def ranked(error: Callable, of: str) -> list[str]:
    "Methods of one-vs-all tasks, the smallest error first."
    return sorted({r.config.method for r in study(AGAINST_ALL)}, key=lambda m: error(m, of))


def spread(error: Callable, of: str) -> float:
    found = [error(m, of) for m in ("STL", "DF-CNN", "DF-CNN.tc2")]
    return max(found) - min(found)


SAID = {  # phrase -> the numbers in it, from the records
    # the paper's schedule
    "it is ten points ahead of single networks and twelve ahead of HPS": lambda: [after(FULL, "DF-CNN", 30) - after(FULL, m, 30) for m in ("STL", "HPS")],
    "and end two points behind": lambda: [df_cnn_above(FULL, "STL", END)],
    "STL passes the paper's between 40 and 50 epochs": lambda: [passes("STL") - 10, passes("STL")],
    "DF-CNN and HPS between 20 and 30": lambda: [passes("DF-CNN") - 10, passes("HPS")],
    "for DF-CNN and STL, 422 and 280": lambda: [converged(FULL, m, "peak") for m in ("DF-CNN", "STL")],
    "DF-CNN takes 76 epochs, STL 178 and HPS 422": lambda: [converged(FULL, m, "level") for m in ("DF-CNN", "STL", "HPS")],
    "DF-CNN keeps 99% of what it had learned": lambda: [kept(FULL, "DF-CNN")],
    "HPS keeps 82%": lambda: [kept(FULL, "HPS")],
    "STL reaches 26%": lambda: [tenth_task(FULL)],
    "and 34% in a short run": lambda: [tenth_task(SHORT)],
    "In this trial it does so by 0.4 points a task": lambda: [trend(FULL, "DF-CNN")],
    # with a mean loss and a restart
    "learns in a third of their epochs": lambda: [converged(RESTART, "DF-CNN", "peak") / converged(RESTART, "STL", "peak")],
    "it is nearly ten points ahead of them": lambda: [df_cnn_above(RESTART, "STL")],
    "HPS is eight points above single networks": lambda: [above_stl(RESTART, "HPS")],
    "from two points on the first task to thirteen on the": lambda: lead(study(RESTART))["HPS"].iloc[0, [0, 4]],
    # short runs
    "1.3 points in the peak": lambda: [df_cnn_above(SHORT, "STL-large")],
    "leads it by four points": lambda: [above_stl(SHORT, "DF-CNN-reduced")],
    "HPS keeps 86% of what its tasks had at their end, DEN 93%": lambda: [kept(SHORT, m) for m in ("HPS", "DEN")],
    "by half a point with every task": lambda: [(trend(SHORT, "HPS") + trend(SHORT, "DEN")) / 2],
    # 200 epochs a task
    "in three trials of each of the eight methods": lambda: [*{*counted(LONG).values()}, len(counted(LONG))],
    "a task is learned to 40 to 43% by all": lambda: [f(ends(LONG)) for f in (min, max)],
    "In the peak DF-CNN is 0.2 points ahead": lambda: [df_cnn_above(LONG, "STL-large")],
    "after the last task 0.4 points behind": lambda: [-df_cnn_above(LONG, "STL-large", LAST)],
    "is two here, and one after the last task": lambda: [df_cnn_above(LONG, "STL"), df_cnn_above(LONG, "STL", LAST)],
    "HPS then forgets a fifth": lambda: [1 - kept(LONG, "HPS") / 100],
    "seven points behind DF-CNN in two trials": lambda: [np.median(trials(LONG, "HPS")), sum(trials(LONG, "HPS") < 7.5)],
    "and thirteen in the": lambda: [max(trials(LONG, "HPS"))],
    "ends half a point behind the full": lambda: [df_cnn_above(LONG, "DF-CNN-reduced", LAST)],
    "has a peak 0.6 points below STL's and ends 1.2 points below it": lambda: [-above_stl(LONG, "DEN", reached) for reached in (PEAK, LAST)],
    "the paper has its peak one point below": lambda: [np.subtract(*(target("cifar100", m, "peak_per_task_accuracy")[0] for m in ("STL", "DEN")))],
    "DEN keeps 99% of what its tasks had at their end (93% in short runs)": lambda: [kept(LONG, "DEN"), kept(SHORT, "DEN")],
    "stays eleven points behind single networks": lambda: [-above_stl(LONG, "DF-CNN.tc2", LAST)],
    # multi-task learning
    "STL and HPS have about a fifth fewer than the paper's": lambda: [1 - (errors("STL") + errors("HPS")) / 2],
    "DF-CNN has half as many again": lambda: [errors("DF-CNN") - 1],
    "ten tasks, the same fraction and schedule, in one trial": lambda: [{r.config.tasks for r in study(AGAINST_ALL)}.pop(), *{*counted(AGAINST_ALL).values()}],
    "lie within 0.02 points of each other (0.06 in the paper)": lambda: [spread(our_error, AGAINST_ALL), spread(paper_error, "mtl_homogeneous")],
    "All errors lie below the paper's, by 6 to 27%": lambda: [f(map(below, counted(AGAINST_ALL))) for f in (min, max)],
}


@pytest.mark.parametrize("phrase", SAID)
def test_a_number_in_words_is_that_of_the_records(phrase):
    assert phrase in prose(), "The words have changed. So should the phrase here."
    numbers = [w for w in re.findall(r"[\d.]*\d|\w+", phrase) if w in WHOLE | PART or w[0].isdigit()]
    values = list(SAID[phrase]())
    assert len(numbers) == len(values) > 0
    for number, value in zip(numbers, values):
        said = (WHOLE | PART).get(number) or float(number)
        assert abs(value - said) <= (0.05 if number in PART else 0.5 / 10 ** len(number.partition(".")[2])) + 1e-9, (number, value)


def test_the_order_of_one_vs_all_errors_is_as_said():
    assert "HPS has the smallest error, as in the paper, where it shares the first place with DF-CNN.direct" in prose()
    assert "TF, which is last in the paper, is second here" in prose()
    ours, theirs = ranked(our_error, AGAINST_ALL), ranked(paper_error, "mtl_homogeneous")
    assert (ours[:2], {*theirs[:2]}, theirs[-1]) == (["HPS", "TF"], {"HPS", "DF-CNN.direct"}, "TF")
    assert paper_error(theirs[0], "mtl_homogeneous") == paper_error(theirs[1], "mtl_homogeneous")
