"What only a GPU can show: captured steps, stacked or not, and their agreement with a CPU. Skipped where there is none."

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfcnn.core import pick_device, precision
from dfcnn.data.folders import tasks_from_datasets
from dfcnn.data.tasks import Split, Task
from dfcnn.methods.architectures import architecture_called
from dfcnn.methods.registry import build_network
from dfcnn.methods.sharing import HPS
from dfcnn.training.audit import Audit
from dfcnn.training.checkpoint import Checkpoint
from dfcnn.training.learner import Callback, lifelong_learner, task_learner, train
from dfcnn.training.schedule import Schedule
from dfcnn.training.stacking import FastEpochs, StackedTrainer, train_together
from dfcnn.experiments.studies import lifelong_study
from dfcnn.vision import image_learner, load_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here; on a machine with one run pytest tests/test_gpu.py")
METHODS = ["STL", "HPS", "ProgNN", "TF", "DF-CNN", "DF-CNN.direct", "DF-CNN.tc2"]


def noise(trial: int) -> list[Task]:
    "Two tasks of CIFAR-100's form."
    g = torch.Generator().manual_seed(trial)
    split = lambda n: Split(torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 10)
    return [
        Task(f"noise {t}", [str(i) for i in range(10)], split(60), split(20), split(50)) for t in range(2)
    ]


def learner(method: str, trial: int = 0, device: str = "cuda", dropout: float = 0.5, epochs: int = 1, cbs=(), decay: float = 2.5e-4):
    network = build_network(method, "cifar100", seed=trial, length=2)
    network.arch = replace(network.arch, dropout=dropout)
    hyper = dict(epochs=epochs, lr=1e-4, decay=decay, batch_size=10, seed=trial)
    return lifelong_learner(network, noise(trial), **hyper, device=pick_device(device), cbs=list(cbs))


def agree(some, others, method: str, trial: int = 0) -> None:
    """Training has moved every parameter to the same place.

    A difference of one part in ten million at the start grows to a tenth of the way in six steps, where a maximum is taken of
    two values that are nearly the same; steps that were not taken would be half of the way.
    """
    networks = (some.model.cpu(), others.model.cpu(), build_network(method, "cifar100", trial, n_tasks=2))
    for (k, a), b, start in zip(networks[0].named_parameters(), *(n.parameters() for n in networks[1:])):
        moved, apart = (b - start).norm(), (a - b).norm()
        assert moved > 0, f"{k} was not trained"
        assert apart <= 0.25 * moved, f"{k}: {apart:g} apart, moved by {moved:g}"


@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_are_those_of_the_learner(method, monkeypatch):
    replays, real = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: (replays.append(1), real(g)))
    by_batch, captured = (learner(method, dropout=0.0) for _ in range(2))  # the draws differ
    a, b = train(by_batch), train_together([captured])[0]
    assert len(replays) == 2 * (6 - 3), "all but the first three steps of a task are replayed"
    assert (a.loss - b.loss).abs().max() < 1e-2
    agree(by_batch, captured, method)


def test_a_learner_that_was_trained_by_batch_is_captured():
    "What fastai keeps of the last batch belongs to another stream than the one that is captured."
    learn = learner("DF-CNN", epochs=2)
    learn.fit(1)
    train_together([learn])
    assert learn.epochs_done == 4


def as_steps_without_a_graph(make, monkeypatch) -> None:
    "What is captured and replayed gives the weights of the same steps, taken one by one."
    with precision(torch.float64):
        captured, stepped = make(), make()
        train_together([captured])
        monkeypatch.setattr(StackedTrainer, "replay", StackedTrainer.step)  # the same draws
        train_together([stepped])
    for (k, a), b in zip(captured.model.named_parameters(), stepped.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=k)


def test_a_graph_serves_all_epochs_of_a_task(monkeypatch):
    "Learning rate, images and dropout masks are those of the epoch in which it is replayed; the rate falls to a third."
    as_steps_without_a_graph(lambda: learner("DF-CNN", epochs=3, decay=1.0), monkeypatch)


def test_graphs_of_tasks_that_take_turns(monkeypatch):
    def make():
        network = build_network("DF-CNN", "cifar100", length=2)
        hyper = dict(lr=1e-4, decay=1.0, batch_size=10)
        return task_learner(network, noise(0), Schedule([0, 1, 0, 0, 1], together=True), **hyper, device=pick_device("cuda"))

    as_steps_without_a_graph(make, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_stacked_trials_are_those_that_are_trained_alone(method):
    alone, stacked = [learner(method, t) for t in range(3)], [learner(method, t) for t in range(3)]
    for l in alone:
        train_together([l])
    train_together(stacked)
    for trial, (a, b) in enumerate(zip(alone, stacked)):
        agree(a, b, method, trial)


def test_the_first_epoch_without_dropout_agrees_with_a_cpu():
    learners = [learner("DF-CNN", device=device, dropout=0.0) for device in ("cpu", "cuda")]
    for l in learners:
        l.fit(1, cbs=FastEpochs())
    cpu, gpu = (list(l.model.cpu().tasks[0].parameters()) + l.model.shared() for l in learners)
    start = build_network("DF-CNN", "cifar100", n_tasks=1)
    for a, b, was in zip(cpu, gpu, list(start.tasks[0].parameters()) + start.shared(), strict=True):
        assert (a - b).norm() <= 0.25 * (a - was).norm()


def test_den_learns_batch_by_batch():
    "Its stages look at single batches, and grow the network on the device."
    learners = [learner("DEN", device=device, dropout=0.0, cbs=[Audit()]) for device in ("cpu", "cuda")]
    cpu, gpu = (train(l).query("split == 'train'").loss.tolist() for l in learners)
    assert len(cpu) == len(gpu) == 2 and abs(cpu[0] - gpu[0]) < 1e-2 * cpu[0]
    assert all(l.audit.changed for l in learners)


class NoWaiting(Callback):
    "Wait for the device as one likes again, once the last score has been asked for."

    order = 6  # when all Learners have paused, before the first reads its scores

    def after_epoch(self):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trials", [1, 3])
def test_nothing_waits_for_the_device_within_an_epoch(trials, monkeypatch):
    watched, real = [], StackedTrainer.epoch

    def without_waiting(trainer, start):
        if trainer.graph:  # in the first epoch a step is captured
            watched.append(1)
            torch.cuda.set_sync_debug_mode("error")
        real(trainer, start)

    monkeypatch.setattr(StackedTrainer, "epoch", without_waiting)
    try:
        histories = train_together([learner("DF-CNN", t, epochs=3, cbs=[NoWaiting()]) for t in range(trials)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watched) == 2 * 2, "two tasks of three epochs, all but the first of each"
    assert all((h.seconds >= 0).all() and h.seconds.sum() > 0 for h in histories)


def test_a_study_stacks_its_trials_by_itself(tmp_path):
    study = lifelong_study(methods="STL DEN", epochs=2, tasks=2, trials=2, output_dir=str(tmp_path))
    assert study.engine.stack and study.engine.workers == 1
    records = study.run()
    assert all(r.made_with["device"] == torch.cuda.get_device_name() for r in records)


class Reads(HPS):
    "A network that looks at its values, which no captured step can do."

    def filters(self, task: int) -> list:
        return super().filters(task) if self.conv.W[0].sum().item() < 1e9 else []


def test_a_step_that_cannot_be_captured_is_taken_as_it_is(capsys):
    hyper = dict(epochs=2, lr=1e-4, decay=2.5e-4, batch_size=10, device="cuda")
    reads, plain = (lifelong_learner(of(architecture_called("cifar100"), 0, 2), noise(0), **hyper) for of in (Reads, HPS))
    train_together([reads])
    assert "A step of Reads cannot be captured" in capsys.readouterr().out
    train_together([plain])
    agree(reads, plain, "HPS")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_the_name_of_a_device_means_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    network = build_network("STL", "cifar100", length=2)
    lifelong_learner(network, noise(0), epochs=1, lr=1e-4, decay=2.5e-4, batch_size=10, device="cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


class Stop(Callback):
    "A kill after the first task, when its checkpoint has been taken."

    order = 61

    def after_epoch(self):
        if self.epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trials", [1, 3])
def test_a_run_that_was_killed_goes_on(trials, tmp_path):
    make = lambda t, *cbs: learner("DF-CNN", t, epochs=2, cbs=[Checkpoint(tmp_path / f"{t}.safetensors"), *cbs])
    with precision(torch.float64):
        with pytest.raises(KeyboardInterrupt):
            train_together([make(t, Stop()) for t in range(trials)])
        again, whole = [make(t) for t in range(trials)], [learner("DF-CNN", t, epochs=2) for t in range(trials)]
        assert again[0].epochs_done == 2  # the others are behind, and catch up
        train_together(again), train_together(whole)
    for one, other in zip(again, whole):
        for (k, a), b in zip(one.model.named_parameters(), other.model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=k)


def test_memory_does_not_grow_with_the_tasks():
    def used(tasks: int) -> int:
        network = build_network("HPS", "cifar100", length=tasks)
        learn = lifelong_learner(network, noise(0) * (tasks // 2), epochs=1, lr=1e-4, decay=1e-3, batch_size=10, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        train_together([learn])
        return torch.cuda.max_memory_allocated()

    used(2)  # what CUDA's libraries keep
    few, many = used(2), used(12)
    assert many < few + 64 * 2**20, f"{few / 2**20:.0f} MiB for two tasks, {many / 2**20:.0f} MiB for twelve"


def test_images_of_ones_own(tmp_path):
    images = [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), i % 3) for i in range(60)]
    tasks = tasks_from_datasets({"a": images, "b": images[::-1]}, size=32)
    learn = image_learner(tasks, epochs=3, device="cuda").fit()
    learn.export(tmp_path / "model")
    one, other = (l.predict(images[0][0], task="a")[2] for l in (learn, load_learner(tmp_path / "model", device="cpu")))
    assert (one - other).abs().max() < 1e-3
