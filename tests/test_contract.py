"What every listed method must keep, whatever it does inside: the contract of `11_base`, and Algorithm 1 around it."

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from dfcnn.core import BadInput, precision
from dfcnn.data.tasks import Task
from dfcnn.methods.architectures import architecture_called
from dfcnn.methods.expandable import DEN, Growth
from dfcnn.methods.factorize import NetworkMethod
from dfcnn.methods.registry import METHODS, build_network, register
from dfcnn.testing import noise_tasks, plain_cnn
from dfcnn.training.audit import Audit
from dfcnn.training.evaluation import score
from dfcnn.training.learner import Callback, lifelong_learner, task_learner, train
from dfcnn.training.schedule import Schedule, multitask_schedule
from dfcnn.training.stacking import train_together
from dfcnn.experiments.metrics import forgetting_ratio
from dfcnn.experiments.studies import multitask_study

HYPER = dict(epochs=2, lr=1e-3, decay=2.5e-4, batch_size=10)
SMALL = "own-3x8-10"  # CIFAR-100's layers and knowledge bases on images of 8 x 8 pixels: a step takes a fraction of the time


def small_tasks(n=3, images=20) -> list[Task]:
    "Tasks of few and small images."
    return noise_tasks(n, (images, 10, 30), side=8, classes=10, generator=torch.Generator().manual_seed(0))


class SmallDF(NetworkMethod):
    "A plain network with normalization and dropout, factorized."

    how = dict(head="10", budget=1.2)

    @staticmethod
    def build() -> torch.nn.Module:
        return plain_cnn()


class SmallHPS(SmallDF):
    how = dict(head="10", layers={torch.nn.Conv2d: "shared"})


class SmallSTL(SmallDF):
    how = dict(head="10", layers={torch.nn.Conv2d: "own"})


NETWORKS = {"small-DF": SmallDF, "small-HPS": SmallHPS, "small-STL": SmallSTL}  # in the place of the large ones that are listed


@pytest.fixture(params=[*(m for m in METHODS if not METHODS[m].beyond), *NETWORKS])
def method(request):
    if request.param in NETWORKS:
        register(request.param, NETWORKS[request.param])
    return request.param


def learner(method, cbs=(), seed=0, tasks=None, **kw):
    tasks = tasks or small_tasks()
    network = build_network(method, SMALL, seed=seed, length=len(tasks))
    return lifelong_learner(network, tasks, **{**HYPER, **kw}, cbs=list(cbs))


def test_only_what_a_task_may_change_changes(method):
    learn = learner(method, [Audit()])
    train(learn)
    phases = 3 if method != "DEN" else 1 + 2 * 4  # DEN's stages
    assert len(learn.audit.changed) == phases and all(learn.audit.changed)


def test_frozen_parameters_cost_no_gradients_and_no_optimizer_state(method):
    class Look(Callback):
        order = 55

        def after_step(self):
            trained = {id(p) for p in self.model.trains(self.learn.task)}
            assert {id(p) for p in self.model.parameters() if p.grad is not None} <= trained

        def after_epoch(self):
            trained = {id(p) for p in self.model.trains(self.learn.task)}
            assert {id(p) for p in self.model.parameters() if p.requires_grad} == trained
            assert {id(p) for g in self.opt.opt.param_groups for p in g["params"]} == trained
            assert {id(p) for p in self.opt.opt.state} == trained

    train(learner(method, [Look()]))


def test_every_task_starts_with_new_optimizer_state(method):
    class Look(Callback):
        order, seen = 5, ()

        def before_train(self):
            if self.task_epoch == 0:
                self.seen += (len(self.opt.opt.state),)

    learn = learner(method, [Look()])
    train(learn)
    assert learn.look.seen == (0, 0, 0)


def test_a_state_dict_restores_it(method):
    learn = learner(method)
    train(learn)
    network, x = learn.model.eval(), small_tasks()[0].test.x
    other = build_network(method, SMALL, seed=99)
    part = build_network(method, SMALL, seed=98)  # of a larger module, whose names are longer
    other.load_state_dict(network.state_dict())
    torch.nn.ModuleDict(dict(eyes=part)).load_state_dict(torch.nn.ModuleDict(dict(eyes=network)).state_dict())
    for restored in (other, part):
        assert len(restored.tasks) == 3
        with torch.no_grad():
            assert all(torch.equal(network(x, t), restored.eval()(x, t)) for t in range(3))


def test_a_task_that_comes_later_has_the_precision_of_the_rest(method):
    network = build_network(method, SMALL, n_tasks=1, length=2).double()
    network.add_task()
    assert network.eval()(torch.zeros(2, 3, 8, 8, dtype=torch.float64), 1).dtype == torch.float64


def test_initial_values_of_a_task_do_not_depend_on_the_others(method):
    one, three = (build_network(method, SMALL, 5, n_tasks=n, length=3) for n in (1, 3))
    values = dict(three.named_parameters())
    assert all(torch.equal(p, values[k]) for k, p in one.named_parameters())
    other = dict(build_network(method, SMALL, 6, n_tasks=1, length=3).named_parameters())
    drawn = [(k, p) for k, p in one.named_parameters() if p.numel() > 1 and p.std() > 1e-6]  # biases begin alike
    assert drawn and not [k for k, p in drawn if torch.equal(p, other[k])], "trials would not be independent"


def test_uses_is_what_predictions_depend_on(method):
    network = build_network(method, SMALL, n_tasks=2).eval()
    for task in range(2):
        network.zero_grad()
        network(torch.randn(2, 3, 8, 8), task).square().sum().backward()
        reached = {id(p) for p in network.parameters() if p.grad is not None}
        used = {id(p) for p in network.uses(task)}
        assert reached <= used and (method not in NETWORKS or reached == used)


def test_same_seed_same_numbers(method):
    runs = [train(learner(method, seed=s)).drop(columns="seconds") for s in (1, 1, 2)]
    assert runs[0].equals(runs[1]) and not runs[0].equals(runs[2])


def test_recorded_scores_are_those_of_the_trained_network(method):
    "Scores that are repeated instead of computed again included."
    learn = learner(method, epochs=3, eval_every=2)
    history = train(learn)
    last = history.query("split == 'test' and epoch == 9").set_index("evaluated")
    learn.model.eval()
    for t, task in enumerate(small_tasks()):
        assert score(learn.model, task.test, t) == tuple(last.loc[t, ["accuracy", "loss"]])


class Rescore(Callback):
    "Compare every score that may be repeated with a new one, after each epoch."

    order = 55

    def after_epoch(self):
        for (task, split), known in self.learn.evaluate.latest.items():
            data = getattr(self.learn.evaluate.eval_tasks[task], split)
            assert score(self.model.eval(), data, task) == known, f"task {task} has a stale score"


def test_no_score_is_repeated_after_a_change(method):
    train(learner(method, [Rescore()], epochs=4, eval_every=3))


def test_the_end_is_measured_whatever_a_method_says():
    "A method that changes an earlier task in secret, in the last epoch, is found out by the last scores."

    class Meddle(Callback):
        def before_epoch(self):
            if self.epoch == 3:
                with torch.no_grad():
                    [p.neg_() for p in self.model.uses(0)]

    learn = learner("STL", [Meddle()], tasks=small_tasks(2), eval_every=1)
    last = train(learn).query("split == 'test' and epoch == 4 and evaluated == 0").iloc[0]
    assert score(learn.model.eval(), small_tasks(2)[0].test, 0) == (last.accuracy, last.loss)


def test_no_score_is_repeated_where_all_units_are_put_back():
    network = DEN(architecture_called(SMALL), growth=Growth(units=100, split=0.0))
    train(lifelong_learner(network, small_tasks(), **{**HYPER, "epochs": 8}, cbs=[Rescore(), Audit()]))


def test_training_by_the_epoch_is_training_by_the_batch(method):
    plain, fast = learner(method), learner(method)
    history = train(plain).drop(columns="seconds")
    assert train_together([fast])[0].drop(columns="seconds").equals(history)
    other = fast.model.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in plain.model.state_dict().items())


@pytest.fixture
def double_precision():
    "Two ways of computing the same thing agree tightly here; single precision depends on the processor."
    with precision(torch.float64):
        yield


def test_stacked_trials_get_the_numbers_that_they_get_alone(method, double_precision):
    few = dict(epochs=1, batch_size=4, tasks=small_tasks(2, images=8))
    alone, stacked = ([learner(method, seed=s, **few) for s in (0, 1)] for _ in range(2))
    for l, one in zip(alone, train_together(stacked)):
        both = train(l).merge(one, on=["epoch", "evaluated", "split"])
        assert len(both) == len(one) and ((both.loss_x / both.loss_y) - 1).abs().max() < 1e-9
    for a, b in zip(alone, stacked):
        other = b.model.state_dict()
        for k, v in a.model.state_dict().items():
            torch.testing.assert_close(v, other[k], rtol=1e-7, atol=1e-10, msg=k)


@pytest.mark.parametrize("how", [train, lambda learn: train_together([learn])[0]], ids=["by batch", "by epoch"])
def test_images_are_shuffled_and_dropout_takes_part(method, how):
    learn = learner(method, epochs=2)
    images = learn.dls.train.tasks[2].train.x.flatten(1)
    seen, masks = [], []

    def note_images(network, given):
        if network.training and given[1] == 2:
            seen.extend((images == x).all(1).nonzero().item() for x in given[0].flatten(1))

    def note_dropout(dropout, given, result):
        if dropout.training:
            left = result != 0
            torch.testing.assert_close(result[left], 2 * given[0][left])
            masks.append((left, given[0] != 0))

    class Attach(Callback):
        def before_phase(self):
            if self.learn.task == 2 and not self.model._forward_pre_hooks:
                self.model.register_forward_pre_hook(note_images)
                of_head = getattr(self.model.head_of(2), "dropout", None)
                dropout = of_head or next(m for m in self.model.modules() if isinstance(m, torch.nn.Dropout))
                dropout.register_forward_hook(note_dropout)

    learn.add_cb(Attach())
    how(learn)
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert sorted(first) != first and sorted(second) != second
    assert len(masks) == 4 and abs(sum(left[there].float().mean().item() for left, there in masks) / 4 - 0.5) < 0.05
    for (a, here), (b, there) in combinations(masks, 2):
        assert a.shape != b.shape or (a != b)[here & there].any(), "two batches have the same dropout"  # a DEN grows


def test_isolated_tasks_keep_their_score_exactly():
    history = train(learner("STL", epochs=3))
    last = history.query("split == 'test' and evaluated == 0 and (epoch == 3 or epoch == 9)")
    assert last.accuracy.nunique() == 1 and last.loss.nunique() == 1
    assert (forgetting_ratio(history).iloc[-1, :-1] <= 1).all()


def test_no_parameter_is_random_state_of_the_caller(method):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(learner(method, epochs=1))
    assert torch.equal(torch.rand(1), expected)


class Spoil(Callback):
    "Weights that become NaN with the last batch of the last epoch."

    order = 5  # before the scores

    def after_train(self):
        if self.epoch + 1 == self.n_epoch:
            self.model.head_of(self.learn.task).W[0].data.fill_(float("nan"))


def test_a_network_that_is_no_number_has_no_accuracy():
    for how in (train, lambda learn: train_together([learn])):
        with pytest.raises(FloatingPointError, match="valid loss of task 1 is nan after epoch 2 of task 3"):
            how(learner("HPS", [Spoil(), SpoilShared()]))
        with pytest.raises(FloatingPointError, match="valid loss of task 3 is nan after epoch 2 of task 3"):
            how(learner("STL", [Spoil()]))


class SpoilShared(Spoil):
    def after_train(self):
        if self.epoch + 1 == self.n_epoch:
            self.model.conv.W[0].data.fill_(float("nan"))


def test_a_diverging_loss_stops_the_run():
    with pytest.raises(FloatingPointError, match="loss is nan in batch 2 of epoch 1 of task 1"):
        train(learner("STL", lr=1e18))


def together(method, cbs=(), schedule=(1, 0, 0, 2, 1), **kw):
    network = build_network(method, SMALL, seed=0, length=3)
    hyper = {k: v for k, v in HYPER.items() if k != "epochs"}
    return task_learner(network, small_tasks(), Schedule(schedule, together=True, **kw), **hyper, cbs=list(cbs))


def test_multi_task_learning_keeps_the_contract(method):
    if METHODS[method].network.in_sequence:
        with pytest.raises(BadInput, match="one after the other"):
            together(method)
        return
    learn = together(method, [Audit()], eval_every=2)
    history = train(learn)
    assert len(learn.audit.changed) == 4  # 1, 0 0, 2, 1
    scored = history[history.split == "test"].groupby("epoch").evaluated.apply(list).to_dict()
    assert scored == {epoch: [0, 1, 2] for epoch in (0, 2, 4, 5)}
    last = history.query("split == 'test' and epoch == 5").set_index("evaluated")
    learn.model.eval()
    for t, task in enumerate(small_tasks()):
        assert score(learn.model, task.test, t) == tuple(last.loc[t, ["accuracy", "loss"]])


@pytest.mark.parametrize("schedule", [(0, 0), (1, 1, 0)])
def test_tasks_that_are_never_drawn_are_scored(method, schedule):
    if METHODS[method].network.in_sequence:
        with pytest.raises(BadInput, match="one after the other"):
            together(method, schedule=schedule)
        return
    history = train(together(method, [Audit()], schedule=schedule))
    last = history.query(f"split == 'test' and epoch == {len(schedule)}")
    assert last.evaluated.tolist() == [0, 1, 2]


def test_a_task_that_comes_again_finds_its_optimizer_state():
    class Look(Callback):
        order, seen = 5, ()

        def before_train(self):
            self.seen += ((self.learn.task, len(self.opt.opt.state)),)

    learn = together("HPS", [Look()])
    train(learn)
    n = len(learn.model.trains(0))
    assert learn.look.seen == ((1, 0), (0, 0), (0, n), (2, 0), (1, n))


def test_tasks_may_differ_in_their_number_of_classes(method):
    tasks = small_tasks()
    for task, classes in zip(tasks, (10, 3, 6)):
        task.classes = task.classes[:classes]
        for split in (task.train, task.valid, task.test):
            split.y.remainder_(classes)
    learn = learner(method, [Audit()], tasks=tasks)
    train(learn)
    net, x = learn.model.eval(), tasks[0].test.x[:4]
    assert [net(x, t).shape[1] for t in range(3)] == [10, 3, 6] == net.outputs
    other = build_network(method, SMALL, seed=9, length=3)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(other.eval()(x, t), net(x, t)) for t in range(3))
    with pytest.raises(BadInput, match="Task 2 of this .* has 3 classes, not 10"):
        lifelong_learner(net, small_tasks(), **HYPER)


def test_all_methods_of_a_trial_see_the_same_draws(tmp_path):
    config = multitask_study(methods="STL HPS", trials=2, epochs=50, output_dir=str(tmp_path)).configs
    draws = {(c.method, c.trial): tuple(c.full_schedule.tasks) for c in config}
    assert draws["STL", 0] == draws["HPS", 0] != draws["STL", 1]
    assert set(multitask_schedule(5, 500).tasks) == set(range(5))
