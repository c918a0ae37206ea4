"Whatever a Learner is set to is obeyed or refused, whether it trains by batch, by epoch or stacked; and what a fastai user does with it works."

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dfcnn.core import BadInput, precision
from dfcnn.data.tasks import Task
from dfcnn.methods.base import Dropout
from dfcnn.methods.deconvolutional import DFCNN
from dfcnn.methods.expandable import DEN, Growth, GrowthStages
from dfcnn.methods.progressive import ProgNN
from dfcnn.methods.sharing import HPS, SNN, STL
from dfcnn.methods.tensor_factorization import TF
from dfcnn.testing import TOY, TOY_SIZES, noise_tasks
from dfcnn.training.callbacks import StopEarly
from dfcnn.training.checkpoint import Checkpoint
from dfcnn.training.evaluation import score
from dfcnn.training.learner import Callback, TaskLearner, lifelong_learner, task_learner, train
from dfcnn.training.optimizer import RMSProp, sum_cross_entropy
from dfcnn.training.schedule import Schedule
from dfcnn.training.stacking import StackedTrainer, by_batch, say_once, train_together
from fastai.callback.core import (
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.learner import Recorder
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper


@pytest.fixture
def double_precision():
    "Stacking rounds otherwise, so it is compared in double precision; fastai's `Recorder` knows single precision alone."
    with precision(torch.float64):
        yield


def tasks_of(trial: int, n_tasks: int) -> list[Task]:
    return noise_tasks(n_tasks, (21, 9, 20), generator=torch.Generator().manual_seed(trial))


def learner(trial: int = 0, cbs=(), n_tasks: int = 2, epochs: int = 2, network=None, **kw) -> TaskLearner:
    network = network or DFCNN(TOY, seed=trial, sizes=TOY_SIZES)
    hyper = dict(epochs=epochs, lr=1e-3, decay=1e-2, batch_size=5, seed=trial)
    return lifelong_learner(network, tasks_of(trial, n_tasks), **hyper, cbs=[c() for c in cbs], **kw)


def weights(learn) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def same(a, b) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)


# What a setting does to the numbers, on every path


class Seldom(Callback):
    "Cancel something in the second epoch, at an event that is given."

    def __init__(self, event, error, batch=None):
        self.error, self.batch = error, batch
        setattr(self, event, self.cancel)

    def cancel(self):
        if self.epoch == 1 and self.batch in (None, getattr(self, "iter", None)):
            raise self.error()


class HalfTheRate(Callback):
    def before_epoch(self):
        self.opt.set_hypers(lr=self.opt.hypers[-1]["lr"] / 2)


class Freeze(Callback):
    def before_train(self):
        self.model.head_of(self.learn.task).W[0].requires_grad_(False)


class OtherState(Callback):
    "Put other tensors in the place of weights and optimizer state, as loading a file does."

    def before_epoch(self):
        for p in self.model.trains(self.learn.task):
            p.data = p.data * 0.9
        self.opt.opt.state.clear()


class OtherBatchSize(Callback):
    "From the second epoch on."

    def before_epoch(self):
        if self.epoch:
            self.dls.train.batch_size = 10


class OtherLabels(Callback):
    "New labels in every epoch."

    def before_epoch(self):
        task = self.dls.train.tasks[self.learn.task]
        task.train = task.train._replace(y=(task.train.y + self.epoch) % len(task.classes))


class Noise(Callback):
    "Images that change in place."

    def before_epoch(self):
        self.dls.train.data.x.mul_(0.9)


class Masked(HPS):
    "Each trial looks at other pixels: what a network draws is a buffer, as torch's own layers do it."

    def __init__(self, arch, seed=0):
        super().__init__(arch, seed)
        self.register_buffer("mask", torch.rand(arch.input, generator=torch.Generator().manual_seed(seed)).round())

    def forward(self, x, task):
        return super().forward(x * self.mask, task)


class Veiled(list):
    "A list that does not show what it holds, as a long tensor does not."

    def __repr__(self):
        return "[...]"


class OwnMasks(HPS):
    "The same without a buffer: in a list."

    def __init__(self, arch, seed=0):
        super().__init__(arch, seed)
        self.mask = Veiled([torch.rand(arch.input, generator=torch.Generator().manual_seed(seed)).round()])

    def forward(self, x, task):
        return super().forward(x * self.mask[0], task)


class Hooked(HPS):
    "With hooks on its parameters."

    def __init__(self, arch, seed=0):
        super().__init__(arch, seed)
        for p in self.parameters():
            p.register_hook(lambda g: g * 0.1)


class OwnStep(TaskLearner):
    def _step(self):
        self.opt.set_hypers(lr=1e-4)
        super()._step()


class MoreDropout(HPS):
    "With dropout before the first layer, too."

    def __init__(self, *args):
        super().__init__(*args)
        self.early = Dropout(0.3)

    def forward(self, x, task):
        return super().forward(self.early(x), task)


def rmsprop(**kw):
    return partial(OptimWrapper, opt=partial(RMSProp, **kw))


def halve_decay(learn):
    learn.opt.set_hypers(decay=0.5)


def own_step(learn):
    learn.__class__ = OwnStep


def hook(learn):
    learn.model.register_forward_hook(lambda network, given, result: result * 1.5)


SETTINGS = {  # name: settings, callbacks, what is done to the Learner, whether steps stay fast
    "loss": (dict(loss_func=F.cross_entropy), [], None, False),
    "Adam": (dict(opt_func=Adam), [], None, False),
    "Adam's settings": (dict(opt_func=partial(Adam, mom=0.5, sqr_mom=0.9, eps=1e-3, wd=0.1)), [], None, False),
    "SGD": (dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9))), [], None, False),
    "decay of the mean square": (dict(opt_func=rmsprop(decay=0.5)), [], None, True),
    "eps": (dict(opt_func=rmsprop(eps=0.1)), [], None, True),
    "setting of the optimizer": ({}, [], halve_decay, True),
    "rate in a callback": ({}, [HalfTheRate], None, True),
    "batch size in a callback": ({}, [OtherBatchSize], None, True),
    "labels in a callback": ({}, [OtherLabels], None, True),
    "images in a callback": ({}, [Noise], None, True),
    "frozen parameter": ({}, [Freeze], None, False),
    "loaded state": ({}, [OtherState], None, True),
    "GradientClip": ({}, [lambda: GradientClip(0.01)], None, False),
    "ParamScheduler": ({}, [lambda: ParamScheduler(dict(lr=SchedCos(1e-2, 1e-4)))], None, False),
    "own step": ({}, [], own_step, False),
    "hook": ({}, [], hook, True),
    "CancelFit": ({}, [lambda: Seldom("after_epoch", CancelFitException)], None, True),
    "CancelFit at a start": ({}, [lambda: Seldom("before_epoch", CancelFitException)], None, True),
    "CancelEpoch": ({}, [lambda: Seldom("before_epoch", CancelEpochException)], None, True),
    "CancelEpoch before training": ({}, [lambda: Seldom("before_train", CancelEpochException)], None, True),
    "CancelTrain": ({}, [lambda: Seldom("before_train", CancelTrainException)], None, True),
    "CancelFit in a batch": ({}, [lambda: Seldom("after_batch", CancelFitException, 2)], None, False),
    "CancelEpoch in a batch": ({}, [lambda: Seldom("after_batch", CancelEpochException, 2)], None, False),
    "CancelTrain in a batch": ({}, [lambda: Seldom("after_batch", CancelTrainException, 2)], None, False),
    "CancelBatch": ({}, [lambda: Seldom("before_batch", CancelBatchException, 2)], None, False),
    "CancelStep": ({}, [lambda: Seldom("before_step", CancelStepException, 2)], None, False),
}


@cache
def by_default(path: str, dtype: torch.dtype) -> torch.Tensor:
    learn = learner()
    PATHS[path](learn)
    return weights(learn)


def stacked(learn):
    train_together([learner(7), learn, learner(8)])  # not the one that leads


PATHS = dict(plain=train, fast=lambda learn: train_together([learn]), stacked=stacked)


def trained(setting: str, path: str) -> tuple[TaskLearner, int]:
    "A Learner with a setting, and the number of epochs that went fast."
    settings, cbs, change, _ = SETTINGS[setting]
    learn, fast, real = learner(cbs=cbs, **settings), [], StackedTrainer.epoch
    if change:
        change(learn)

    def counted(trainer, start):
        fast.extend(l for l in trainer.learners if l is learn)
        real(trainer, start)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(StackedTrainer, "epoch", counted)
        PATHS[path](learn)
    return learn, len(fast)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_obeyed_on_every_path(setting):
    dtype = torch.float64 if SETTINGS[setting][3] else torch.float32
    with precision(dtype):
        compare_paths(setting, dtype)


def compare_paths(setting, dtype):
    plain, none = trained(setting, "plain")
    assert none == 0 and not same(weights(plain), by_default("plain", dtype)), "the setting changes nothing"
    history = plain.evaluate.history.drop(columns="seconds")
    for path in ("fast", "stacked"):
        learn, fast = trained(setting, path)
        assert same(weights(learn), weights(plain)), path
        assert (fast > 0) == SETTINGS[setting][3], path
        assert learn.epochs_done == plain.epochs_done
        other = learn.evaluate.history.drop(columns="seconds")
        keys = ["epoch", "trained", "evaluated", "split", "accuracy"]
        assert other[keys].equals(history[keys]) and same(*(torch.tensor(h.loss.to_numpy()) for h in (other, history)))


def test_without_a_setting_all_paths_agree(double_precision):
    results = [by_default(path, torch.float64) for path in PATHS]
    assert all(same(results[0], r) for r in results)


@pytest.mark.parametrize("kind", [Masked, OwnMasks, Hooked])
def test_stacked_trials_compute_with_what_is_their_own(double_precision, kind):
    alone, company = ([learner(t, network=kind(TOY, t)) for t in range(2)] for _ in range(2))
    for l in alone:
        train(l)
    train_together(company)
    mask = lambda l: [channel.tolist() for channel in getattr(l.model, "mask", ())]
    assert (mask(company[0]) != mask(company[1])) == (kind is not Hooked)
    for a, b in zip(alone, company):
        assert same(weights(a), weights(b)) and mask(a) == mask(b)
        assert a.evaluate.history.accuracy.equals(b.evaluate.history.accuracy)


class WithoutHead(HPS):
    "Its layers are its own, and it has no `head`."

    between = torch.nn.Identity

    def new_task(self, generator):
        size = torch.Size(self.arch.input).numel()
        return torch.nn.ModuleDict(dict(last=torch.nn.Sequential(torch.nn.Flatten(), self.between(), torch.nn.Linear(size, 10))))

    def forward(self, x, task):
        return self.tasks[task].last(x)


class WithoutHeadButDropout(WithoutHead):
    between = partial(Dropout, 0.2)


@pytest.mark.parametrize("kind, why", [(WithoutHead, ""), (WithoutHeadButDropout, "there is dropout elsewhere than at the head")])
def test_layers_of_another_make_are_trained(kind, why):
    plain, fast = (learner(network=kind(TOY), n_tasks=1) for _ in range(2))
    fast.model.load_state_dict(plain.model.state_dict())
    train(plain), train_together([fast])
    assert by_batch(fast) == why and torch.allclose(weights(plain), weights(fast), atol=1e-5)


def test_hooks_are_not_captured():
    "A graph would replay what they did once: on a GPU such a network goes by batch."
    learn = learner()
    hook(learn)
    assert by_batch(learn) == ""
    learn.dls.device = torch.device("cuda")
    assert by_batch(learn) == "its hooks would be captured once and not be called again"
    learn = learner()
    next(learn.model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    assert by_batch(learn) == "a hook waits for accumulated gradients"


def test_dropout_elsewhere_goes_by_batch():
    learners = [learner(network=MoreDropout(TOY)) for _ in range(2)]
    assert "dropout elsewhere" in by_batch(learners[0])
    train(learners[0]), train_together(learners[1:])
    assert torch.equal(*map(weights, learners))


def test_the_reason_is_said_once(capsys):
    say_once.cache_clear()
    for _ in range(2):
        train_together([learner(cbs=[lambda: GradientClip(1.0)])])
    said = [line for line in capsys.readouterr().out.splitlines() if "batch by batch" in line]
    assert said == ["DFCNN is trained batch by batch, since Recorder, GradientClip look at single batches."]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s._replace(y=s.y[:-1]), r"has 21 images and 20 labels in 'train'"),
        (lambda s: s._replace(y=s.y + 1), r"has labels from 1 to \d+ in 'train', but \d+ classes"),
        (lambda s: s._replace(y=s.y - 1), r"has labels from -1 to \d+ in 'train'"),
        (lambda s: s._replace(y=s.y.int()), "labels of torch.int32"),
        (lambda s: s._replace(y=s.y[:, None]), r"labels of torch.int64 with the shape \(21, 1\)"),
        (lambda s: s._replace(x=s.x.byte()), "images of torch.uint8"),
        (lambda s: s._replace(x=s.x.double()), "images of torch.float64"),
        (lambda s: s._replace(x=s.x[..., 1:]), r"has images \(3, 8, 7\) in 'train'"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(change, said):
    task = tasks_of(0, 1)[0]
    task = replace(task, train=change(task.train))
    with pytest.raises(BadInput, match=said):
        lifelong_learner(DFCNN(TOY, sizes=TOY_SIZES), [task], epochs=1, lr=1e-3, decay=1e-2, batch_size=5)


def test_what_is_scored_is_looked_at_too():
    hyper = dict(epochs=1, lr=1e-3, decay=1e-2, batch_size=5)
    task = tasks_of(0, 1)[0]
    with pytest.raises(BadInput, match=r"has images \(3, 7, 8\) in 'valid'"):
        lifelong_learner(HPS(TOY), [replace(task, valid=task.valid._replace(x=task.valid.x[:, :, 1:]))], **hyper)
    bare = [replace(task, test=type(task.test)(task.test.x[:0], task.test.y[:0]))]
    with pytest.raises(BadInput, match="has no images in 'test' to be scored on"):
        lifelong_learner(HPS(TOY), bare, **hyper)
    train(lifelong_learner(HPS(TOY), bare, **hyper, eval_every=None))


@pytest.mark.parametrize("epochs, said", [([], "one epoch or more"), ([0, -1], "at least 0, but it is -1"), ([0.5], "whole number"), ([0, 2], "trains task 3, but there are 2")])
def test_schedules_of_other_tasks_are_refused(epochs, said):
    with pytest.raises(BadInput, match=said):
        task_learner(HPS(TOY), tasks_of(0, 2), Schedule(epochs), lr=1e-3, decay=1e-2, batch_size=5)


def test_intervals_of_nothing_are_refused():
    for what in ("eval_every", "score_every", "batch_size"):
        with pytest.raises(BadInput, match=f"Parameter '{what}' must be a whole number of at least 1"):
            hyper = dict(epochs=1, lr=1e-3, decay=1e-2, batch_size=5) | {what: 0}
            lifelong_learner(DFCNN(TOY, sizes=TOY_SIZES), tasks_of(0, 1), **hyper)


@pytest.mark.parametrize(
    "loss, images",
    [(sum_cross_entropy, 5), (torch.nn.CrossEntropyLoss(reduction="sum"), 5), (F.cross_entropy, 1), (torch.nn.CrossEntropyLoss(), 1)],
)
def test_den_weighs_its_penalties_by_the_loss(loss, images):
    stages = SimpleNamespace(pred=torch.zeros(5, 2), learn=SimpleNamespace(loss_func=loss))
    assert GrowthStages.images_in_loss(stages) == images


def test_a_closure_is_refused():
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(BadInput, match="takes no closure"):
        RMSProp([p], lr=0.1).step(lambda: p.sum())


REFUSED = {
    "MixedPrecision": (lambda l: l.add_cb(MixedPrecision()), "MixedPrecision does nothing on a CPU"),
    "ReduceLROnPlateau": (lambda l: l.add_cb(ReduceLROnPlateau()), "would be overruled"),
    "SaveModelCallback": (lambda l: l.add_cb(SaveModelCallback()), r"trains the tasks \[1, 2\]: the later ones would be lost"),
    "weight decay": (lambda l: setattr(l, "wd", 0.1), "no weight decay"),
    "MixUp": (lambda l: l.add_cb(MixUp()), "MixUp mixes what a network is given"),
    "late checkpoint": (lambda l: l.add_cb(Checkpoint("c")), "when its Learner is made"),
    "StopEarly": (lambda l: l.add_cb(StopEarly(0)), "ends the training of one task"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_before_training(what, path):
    change, message = REFUSED[what]
    learn = learner()
    change(learn)
    before = weights(learn)
    with pytest.raises(BadInput, match=message):
        PATHS[path](learn)
    assert torch.equal(weights(learn), before) and learn.evaluate.history.empty


# Learners that leave a stack, or come late


class Stumble(Callback):
    def __init__(self, epoch, error):
        self.at, self.error = epoch, error

    def before_train(self):
        if self.epoch == self.at:
            raise self.error("stumbled")


def test_an_error_in_one_leaves_the_others_going(double_precision):
    alone = [learner(t) for t in range(3)]
    company = [learner(t, cbs=[lambda: Stumble(2, ValueError)] if t == 1 else []) for t in range(3)]
    for l in alone:
        train(l)
    with pytest.raises(ValueError, match="stumbled"):
        train_together(company)
    assert [l.epochs_done for l in company] == [4, 2, 4]
    assert all(same(weights(alone[t]), weights(company[t])) for t in (0, 2))
    company[1].remove_cb(Stumble)
    train_together(company)  # the one that is left goes on
    assert same(weights(alone[1]), weights(company[1]))
    tables = [l.evaluate.history.drop(columns=["seconds", "loss"]) for l in (alone[1], company[1])]
    assert tables[0].equals(tables[1]), "an epoch that was broken off and begins again has its rows once"


@pytest.mark.parametrize("event", ["before_train", "after_train"])
def test_a_first_epoch_that_is_broken_off_has_its_rows_once(event):
    whole, broken = learner(), learner(cbs=[lambda: First(event)])
    train(whole)
    with pytest.raises(ValueError):
        broken.fit()
    broken.fit()
    rows = broken.evaluate.history[["epoch", "task_epoch", "trained", "evaluated", "split"]]
    assert rows.equals(whole.evaluate.history[rows.columns])


class First(Callback):
    "An error the first time."

    def __init__(self, event):
        self.times = 0
        setattr(self, event, self.stumble)

    def stumble(self):
        self.times += 1
        if self.times == 1:
            raise ValueError("stumbled")


def test_an_error_in_the_steps_is_raised(monkeypatch):
    def fails(trainer, start):
        raise MemoryError("full")

    monkeypatch.setattr(StackedTrainer, "epoch", fails)
    with pytest.raises(MemoryError, match="full"):
        train_together([learner(t) for t in range(2)])


def test_an_interruption_ends_all_at_once():
    company = [learner(t, cbs=[lambda: Stumble(2, KeyboardInterrupt)] if t == 1 else []) for t in range(3)]
    with pytest.raises(KeyboardInterrupt):
        train_together(company)
    assert [l.epochs_done for l in company] == [2, 2, 2]
    assert all(not hasattr(l, "fast_epochs") for l in company), "what was added for the time of `fit` is gone"
    train_together(company[::2])
    assert [l.epochs_done for l in company] == [4, 2, 4]


def test_one_that_was_taken_up_later_meets_the_others(tmp_path, double_precision):
    alone = learner(1)
    train(alone)
    ahead = learner(1, cbs=[lambda: Checkpoint(tmp_path / "c.safetensors", every=0)])
    ahead.fit(3)
    company = [learner(0), learner(1, cbs=[lambda: Checkpoint(tmp_path / "c.safetensors", every=0)]), learner(2)]
    assert [l.epochs_done for l in company] == [0, 3, 0]
    histories = train_together(company)
    assert same(weights(company[1]), weights(alone)) and [len(h) for h in histories] == [len(alone.evaluate.history)] * 3


def test_the_caller_is_left_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train_together([learner(t) for t in range(2)])
    assert torch.equal(torch.rand(1), expected) and torch.is_grad_enabled()


# What a fastai user does


def test_fit_goes_on_where_it_stopped():
    whole, parts = learner(), learner()
    whole.fit()
    for n in (1, 2, 1):
        parts.fit(n)
    assert torch.equal(weights(whole), weights(parts))
    keys = ["epoch", "trained", "evaluated", "split", "loss"]
    assert whole.evaluate.history[keys].equals(parts.evaluate.history[keys])
    with pytest.raises(BadInput, match="has 4 epochs, of which 4 are over, and 1 more are asked for"):
        parts.fit(1)
    parts.fit()  # nothing is left
    with pytest.raises(BadInput, match="leave `start_epoch` at 0"):
        learner().fit(1, start_epoch=2)


def test_fit_takes_a_learning_rate_and_new_state():
    a, b, c = learner(), learner(), learner()
    a.fit(1), b.fit(1, lr=1e-2), c.fit(1)
    assert not same(weights(a), weights(b)) and b.opt.hypers[-1]["lr"] == 1e-2
    a.fit(1), c.fit(1, reset_opt=True)
    assert a.opt.hypers[-1]["lr"] == 1e-3 / 1.01 and not same(weights(a), weights(c))
    assert {id(p) for p in c.opt.opt.state} == {id(p) for p in c.model.trains(0)}


def test_weight_decay_is_taken_where_there_is_one():
    learners = [learner(opt_func=Adam) for _ in range(2)]
    learners[0].fit(), learners[1].fit(wd=0.5)
    assert learners[1].opt.hypers[-1]["wd"] == 0.5, "for the second task, too"
    assert not same(*map(weights, learners))


def test_adam_is_taken_up_again(tmp_path):
    keep = [lambda: Checkpoint(tmp_path / "c.safetensors", every=0)]
    whole, first = learner(opt_func=Adam), learner(opt_func=Adam, cbs=keep)
    whole.fit(), first.fit(3)
    second = learner(opt_func=Adam, cbs=keep)
    assert second.epochs_done == 3
    second.fit()
    assert torch.equal(weights(whole), weights(second))


def test_recorder_and_metrics():
    plain, learn = learner(), learner(metrics=accuracy)
    plain.fit(), learn.fit()
    assert torch.equal(weights(plain), weights(learn)), "recording changes no number"
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    own = learn.evaluate.history.query("split == 'valid' and trained == evaluated and task_epoch > 0")
    assert [v[2] for v in learn.recorder.values] == pytest.approx(own.accuracy.tolist())
    assert len(learn.recorder.losses) == 4 * 4
    learn.recorder.plot_loss()


def test_logger_and_progress(tmp_path, capsys):
    learn = learner(cbs=[ProgressCallback, CSVLogger], path=tmp_path)
    learn.fit()
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,valid_loss,time" and [l[0] for l in lines[1:]] == list("0123")
    assert "valid_loss" in capsys.readouterr().out


def test_early_stopping_ends_a_fit_and_the_next_goes_on():
    learn = learner(cbs=[lambda: EarlyStoppingCallback("accuracy", min_delta=2.0)], epochs=3, metrics=accuracy)
    learn.fit()
    assert learn.epochs_done == 2  # no epoch is better than the first by 2
    learn.remove_cb(EarlyStoppingCallback)
    learn.fit()
    whole = learner(epochs=3)
    whole.fit()
    assert torch.equal(weights(learn), weights(whole))


def test_the_best_epoch_is_kept(tmp_path):
    learn = learner(epochs=4, path=tmp_path, n_tasks=1)
    seen = []
    learn.add_cb(Callback(after_epoch=lambda self: seen.append(weights(self.learn))))
    learn.fit(cbs=SaveModelCallback("valid_loss"))
    losses = [v[1] for v in learn.recorder.values]
    assert torch.equal(weights(learn), seen[losses.index(min(losses))])
    every = learner(path=tmp_path, cbs=[lambda: SaveModelCallback(every_epoch=True, fname="every")])
    every.fit()
    assert len(list(tmp_path.glob("models/every_*.pth"))) == 4


def test_fast_steps_keep_no_graph_of_single_batches():
    "A GPU could not capture a step beside it."
    learn = learner()
    learn.fit(1)
    assert learn.loss_grad.grad_fn is not None
    train_together([learn])
    assert learn.loss_grad is None


def test_save_and_load(tmp_path):
    whole, learn = learner(path=tmp_path), learner(path=tmp_path)
    whole.fit()
    learn.fit(3)
    learn.save("third")
    learn.fit()
    learn.load("third")
    learn.epochs_done = 3
    train_together([learn])  # goes on from the loaded tensors
    assert torch.equal(weights(whole), weights(learn))
    learn.fit(0)
    first = learner(path=tmp_path)
    first.save("first")
    with pytest.raises(BadInput, match="holds 1 tasks, but the network has 2"):
        learn.load("first")


def test_one_cycle():
    learn = learner(cbs=[Recorder])
    learn.fit(1)
    learn.fit_one_cycle(2, lr_max=1e-2)
    rates = learn.recorder.lrs
    assert max(rates) == pytest.approx(1e-2) and rates[0] == pytest.approx(1e-2 / 25) and rates[-1] < 1e-3
    assert rates.index(max(rates)) == len(rates) // 4
    with pytest.raises(BadInput, match="no momentum"):
        learner().fit_one_cycle(1, moms=(0.9, 0.8, 0.9))
    sliced = learner(cbs=[Recorder])
    sliced.fit_one_cycle(2, slice(1e-2))
    assert max(sliced.recorder.lrs) == pytest.approx(1e-2)
    adam = learner(opt_func=Adam)
    adam.fit_one_cycle()
    assert adam.epochs_done == 4 and len(adam.recorder.hps["mom"]) == 16


@pytest.mark.parametrize("done", [0, 3])
def test_lr_find_leaves_everything_as_it_was(tmp_path, done):
    plain, learn = learner(path=tmp_path), learner(path=tmp_path, cbs=[lambda: Checkpoint(tmp_path / "c", every=0)])
    plain.fit(done) if done else None
    learn.fit(done) if done else None
    before = weights(learn)
    found = learn.lr_find(num_it=30, show_plot=False)
    assert 1e-7 < found.valley < 10 and torch.equal(weights(learn), before)
    assert learn.epochs_done == done and len(learn.evaluate.history) == len(plain.evaluate.history)
    plain.fit(), learn.fit()
    assert torch.equal(weights(plain), weights(learn))


@pytest.mark.parametrize("kind", [DEN, TF])
def test_optimizers_of_networks_that_take_other_shapes_outlive_lr_find(tmp_path, kind):
    plain, learn = (learner(network=kind(TOY), path=tmp_path) for _ in range(2))
    plain.fit(1), learn.fit(1)
    learn.lr_find(num_it=10, show_plot=False)
    assert learn.opt.opt.state
    plain.fit(), learn.fit()
    assert torch.equal(weights(plain), weights(learn))


@pytest.mark.parametrize("at", [6, 9])  # while new units are trained alone, and after
def test_den_does_not_grow_twice_where_an_epoch_is_broken_off(at):
    class Break(Callback):
        def after_batch(self):
            if self.learn.task == 1 and self.training and self.iter == at and not hasattr(self, "over"):
                self.over = True
                raise KeyboardInterrupt

    network = DEN(TOY, growth=replace(Growth(), loss=0.0, units=4, split=1e9, group=1e-4))
    learn = lifelong_learner(network, tasks_of(0, 2), epochs=1, lr=1e-3, decay=1e-2, batch_size=2, cbs=[Break()])
    with pytest.raises(KeyboardInterrupt):
        learn.fit()
    learn.fit()
    assert [entry["stage"] for entry in learn.growth_stages.log].count("expand") == 1


def test_a_network_that_was_changed_between_fits_is_scored_anew():
    learn = learner(network=STL(TOY), epochs=3)
    learn.fit(4)
    for p in learn.model.tasks[0].parameters():
        p.data = torch.zeros_like(p)
    learn.fit(1)  # not the last epoch, after which all are scored anyway
    first = learn.evaluate.history.query("evaluated == 0 and split == 'test' and epoch == 5")
    assert first.loss.item() == pytest.approx(score(learn.model.eval(), tasks_of(0, 2)[0].test, 0)[1])


@pytest.mark.parametrize("kind", [DEN, TF])
def test_states_of_other_networks_are_refused(kind):
    other, network = STL(TOY), kind(TOY)
    other.add_task(), network.add_task()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(BadInput, match="The state is not that of a"):
        network.load_state_dict(other.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_state_of_fewer_tasks_is_refused():
    small, large = SNN(TOY), SNN(TOY)  # whose tasks own nothing, so that torch would miss nothing
    small.add_task(), large.add_task(), large.add_task()
    with pytest.raises(BadInput, match="holds 1 tasks, but the network has 2"):
        large.load_state_dict(small.state_dict())


def test_a_callback_that_is_called_hears_every_event():
    class Hears(Callback):
        events = ()

        def __call__(self, event_name):
            self.events += (event_name,)

    learn = learner(cbs=[Hears])
    learn.fit(1)
    assert "before_batch" in learn.hears.events and "Hears" in by_batch(learn)


@pytest.mark.parametrize("setting", [dict(default_cbs=True), dict(train_bn=False), dict(wd_bn_bias=True), dict(splitter=list)])
def test_settings_of_fastai_without_effect_are_refused(setting):
    with pytest.raises(BadInput, match=f"`{[*setting][0]}` has no effect here"):
        learner(**setting)


def test_validate_and_predict():
    plain, learn = learner(), learner(metrics=accuracy)
    plain.fit(), learn.fit(3)
    history, before = len(learn.evaluate.history), weights(learn)
    loss, share = learn.validate()
    known = learn.evaluate.history.query("split == 'valid'").iloc[-1]
    assert share == pytest.approx(known.accuracy)
    probabilities, y = learn.get_preds()
    valid = tasks_of(0, 2)[1].valid
    assert torch.equal(y, valid.y) and torch.allclose(probabilities.sum(1), torch.ones(9))
    *_, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert losses.mean().item() == pytest.approx(known.loss) and (decoded == y).double().mean() == pytest.approx(known.accuracy)
    assert len(learn.get_preds(0)[1]) == 21, "all training images"
    assert learn.validate(0) == learn.validate(0), "in the data's order, none left out"
    assert len(learner().validate()) == 1
    assert len(learn.evaluate.history) == history and torch.equal(weights(learn), before) and learn.task == 1
    learn.fit()
    assert torch.equal(weights(plain), weights(learn)), "nothing of this has changed the training"


def test_a_run_obeys_its_callbacks(tmp_path):
    from dfcnn.data.datasets import DATASETS
    from dfcnn.experiments.configuration import RunConfig
    from dfcnn.experiments.runs import run

    how = dict(epochs=1, tasks=1, batch_size=10, lr=1e-4, decay=2.5e-4, eval_every=1)
    config, images = RunConfig(dataset="shapes", method="HPS", **how), DATASETS["shapes"].images(None)
    losses = [
        run(config, images, tmp_path / str(i), cbs=cbs).history.loss.iloc[-1]
        for i, cbs in enumerate(([], [GradientClip(1e-3)]))
    ]
    assert losses[0] != losses[1]
    with pytest.raises(BadInput, match="MixedPrecision does nothing on a CPU"):
        run(config, images, tmp_path / "refused", cbs=[MixedPrecision()])


def test_a_progressive_network_has_room_for_any_number_of_tasks():
    "8 channels shared out among the adapters of a fifth column would leave none to each; a task with as few learns all the same."
    net = ProgNN(TOY)
    for _ in range(6):
        net.add_task()
    net(torch.rand(2, *TOY.input), 5).sum().backward()
    assert all(p.grad is not None and p.numel() for p in net.trains(5))
