"Any network: real CNNs factorized in one call, and the contract of a method kept by them."

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

from dfcnn.core import BadInput, save_tensors, seeded, stream
from dfcnn.data.tasks import Split, Task
from dfcnn.methods.architectures import ARCHITECTURES, Architecture
from dfcnn.methods.deconvolutional import DFCNN
from dfcnn.methods.factorize import NetworkMethod, Plan, factorize
from dfcnn.methods.registry import METHODS, build_network, can_build, register
from dfcnn.testing import noise_tasks, plain_cnn
from dfcnn.training.audit import Audit
from dfcnn.training.evaluation import score
from dfcnn.training.learner import Callback, lifelong_learner, train
from dfcnn.training.optimizer import RMSProp, sum_cross_entropy
from dfcnn.experiments.configuration import RunConfig
from dfcnn.experiments.records import load_network
from dfcnn.experiments.runs import run, settings
from dfcnn.experiments.studies import lifelong_study
from test_contract import SmallDF
from test_oracle import Oracle, assert_close, compare, in_tf, load


def two_tasks(net: nn.Module, head: str, **how):
    net = factorize(net, head=head, **how)
    net.add_task("birds", classes=4)
    net.add_task("tools", classes=3)
    return net


def step(net, task: str, x: torch.Tensor, classes: int) -> None:
    "A training step of one task."
    net.train()
    net.requires_grad_(False).zero_grad()
    for p in net.trains(net.names.index(task)):
        p.requires_grad_(True)
    opt = torch.optim.SGD(net.trains(net.names.index(task)), lr=0.01)
    cross_entropy(net(x, task), torch.arange(len(x)) % classes).backward()
    opt.step()


TORCHVISION = {  # name -> (head, side of the images); small ones, to be cheap
    "resnet18": ("fc", 32),
    "mobilenet_v3_small": ("classifier.3", 32),
    "vgg11_bn": ("classifier.6", 32),
    "densenet121": ("classifier", 32),
}
TIMM = {"resnet10t": ("fc", 32), "regnetx_002": ("head.fc", 32)}


def network(name: str) -> nn.Module:
    with seeded(0, "test"):
        if name in TIMM:
            timm = pytest.importorskip("timm", reason="timm is not installed: pip install dfcnn[timm]")
            return timm.create_model(name, pretrained=False, num_classes=10)
        net = torchvision.models.get_model(name, weights=None, num_classes=10)
        if name == "vgg11_bn":  # the same with fewer of its 120 million fully connected weights
            net.classifier[0], net.classifier[3] = nn.Linear(512 * 49, 32), nn.Linear(32, 32)
            net.classifier[6] = nn.Linear(32, 10)
        return net


@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_networks_of_others(name):
    head, side = (TORCHVISION | TIMM)[name]
    plain = network(name)
    net = two_tasks(plain, head)
    assert net.plan.relative <= 1 and len(net.plan.layers) == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    x = torch.randn(4, 3, side, side, generator=stream(0))
    for task, other, classes in ((0, 1, 4), (1, 0, 3)):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        step(net, net.names[task], x, classes)
        after = net.state_dict()
        moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
        assert not any(k.startswith(f"tasks.{other}.") for k in moved)  # parameters and statistics
        trained = {id(p) for p in net.trains(task)}
        steep = lambda p: p.grad is not None and p.grad.abs().max() > 1e-3 * p.abs().max()  # more than rounding
        names = {k for k, p in net.named_parameters() if id(p) in trained and steep(p)}
        assert names <= moved and any(k.startswith("kb.") for k in names)
        assert any(k.startswith(f"tasks.{task}.own.") and k.endswith("running_mean") for k in moved)
    for task in net.names:
        alone = net.task_network(task)
        assert type(alone) is type(plain)
        with torch.no_grad():
            ours, theirs = net.eval()(x, task), alone(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.shape == (4, dict(birds=4, tools=3)[task])


def test_a_trained_network_is_where_the_first_task_starts():
    "With sizes that suffice nothing but the head changes, on a network with depthwise layers and other layers of its own."
    plain = network("mobilenet_v3_small")
    for m in plain.modules():  # statistics that say something
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(generator=stream(0)), m.running_var.uniform_(0.5, 2, generator=stream(1))
    plain = plain.double().eval()
    sizes = {
        k: (((m.kernel_size[0] + 1) // 2) ** 2, m.kernel_size[0] ** 2)
        for k, m in plain.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    net = factorize(plain, head="classifier.3", sizes=sizes)
    assert net.start_errors.max() < 1e-10 and list(net.start_errors.index) == list(sizes)
    net.add_task("first")
    alone, x = net.task_network("first"), torch.randn(3, 3, 32, 32, generator=stream(2)).double()
    alone.classifier[3] = plain.classifier[3]
    torch.testing.assert_close(alone(x), plain(x), rtol=1e-8, atol=1e-8)


def test_later_tasks_start_with_what_the_knowledge_bases_have_become():
    net = factorize(plain_cnn(), head="10")
    net.add_task("first")
    before = [W.detach().clone() for W, _ in net.filters(0)]
    with torch.no_grad():
        net.kb[1].mul_(1.5)
    net.add_task("second")
    after = [W for W, _ in net.filters(1)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("init", ["filters", "random"])
def test_a_task_does_not_depend_on_the_others(init):
    with seeded(0):
        plain = plain_cnn()
    one, two = (factorize(plain, head="10", init=init, seed=3) for _ in range(2))
    one.add_task("b", 4), one.add_task("c", 4)
    two.add_task("a", 7), two.add_task("c", 4)
    ours, theirs = one.state_dict(), two.state_dict()
    mine = [k for k in ours if k.startswith("tasks.1.")]
    assert mine and all(torch.equal(ours[k], theirs[k]) for k in mine)


CODE = f"""
from __future__ import annotations
import json, sys, torch
from torch import nn
from safetensors.torch import load_file
from dfcnn.core import stream
from dfcnn.methods.factorize import factorize

{inspect.getsource(plain_cnn)}
net = factorize(plain_cnn(), head="10", layers={{"3": "shared"}}, budget=1.2)
net.load_state_dict(load_file(sys.argv[1]))
x = torch.randn(3, 3, 8, 8, generator=stream(0))
print(json.dumps([net.names, [net.eval()(x, n).tolist() for n in net.names]]))
"""


def test_a_state_dict_restores_it_in_another_process(tmp_path):
    net = two_tasks(plain_cnn(), "10", layers={"3": "shared"}, budget=1.2)
    x = torch.randn(3, 3, 8, 8, generator=stream(0))
    step(net, "tools", x, 3)
    save_tensors(net.state_dict(), tmp_path / "net.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, tmp_path / "net.safetensors"],
        capture_output=True,
        text=True,
        cwd=__file__.rpartition("/")[0],
    )
    names, logits = json.loads(done.stdout) if done.returncode == 0 else pytest.fail(done.stderr)
    assert names == ["birds", "tools"]
    for name, there in zip(names, logits):
        torch.testing.assert_close(net.eval()(x, name), torch.tensor(there))


def test_a_state_of_tasks_in_another_order_is_refused():
    "A name would answer with the weights of another task: nothing but the names differs."
    there, here = factorize(plain_cnn(), head="10"), factorize(plain_cnn(), head="10")
    for name in ("birds", "tools"):
        there.add_task(name, 4)
    here.add_task("tools", 4)
    with pytest.raises(BadInput, match="The state holds the tasks birds, tools, but the network has tools"):
        here.load_state_dict(there.state_dict())


def test_a_learner_brings_tasks_by_the_names_of_the_network():
    "Else the images of one task would train another."
    split = lambda: Split(torch.randn(20, 3, 16, 16, generator=stream(0)), torch.arange(20) % 4)
    birds, tools = (Task(name, list("abcd"), split(), split(), split()) for name in ("birds", "tools"))
    net = factorize(plain_cnn(), head="10", images=(3, 16, 16))
    for name in ("tools", "birds"):
        net.add_task(name, 4)
    hyper = dict(epochs=1, lr=1e-4, decay=0, batch_size=10)
    with pytest.raises(BadInput, match="Task 1 of the network is called 'tools', and that of the images 'birds'"):
        lifelong_learner(net, [birds, tools], **hyper)
    lifelong_learner(net, [tools, birds], **hyper)
    with pytest.raises(BadInput, match="Pass images=.channels, height, width. to `factorize`"):
        lifelong_learner(factorize(plain_cnn(), head="10"), [tools, birds], **hyper)


@pytest.mark.parametrize("tasks", [dict(birds=4), dict(birds=4, tools=7)])
def test_a_state_of_fewer_tasks_or_other_classes_is_refused_and_changes_nothing(tasks):
    there, here = (factorize(plain_cnn(), head="10") for _ in range(2))
    for name, classes in tasks.items():
        there.add_task(name, classes)
    for name in ("birds", "tools"):
        here.add_task(name, 4)
    before = copy.deepcopy(here.state_dict())
    with pytest.raises(BadInput, match="The state holds the tasks birds, but the network has birds, tools|has 4 classes, not 7"):
        here.load_state_dict(there.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in here.state_dict().items())


def test_a_rule_holds_for_all_that_is_below_a_name_with_a_star():
    net = factorize(torchvision.models.resnet18(weights=None), layers={"layer*.1": "shared"})
    roles = {k: role for k, role in net.plan.roles.items() if k.startswith("layer")}
    assert all((role == "shared") == (k.split(".")[1] == "1") for k, role in roles.items() if "downsample" not in k)
    assert roles["layer2.0.downsample.0"] == "factorized"


def test_a_frozen_layer_is_refused():
    net = plain_cnn()
    net[0].requires_grad_(False)
    with pytest.raises(BadInput, match="'0.weight' is frozen"):
        factorize(net, head="10")


class Centred(nn.Module):
    "Keeps a running mean as many do: by putting a new tensor in the buffer's place."

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        h = self.conv(x).relu().mean((2, 3))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.fc(h - self.mean)


def test_a_buffer_that_is_replaced_is_each_tasks_own():
    net, x = two_tasks(Centred(), "fc"), torch.randn(4, 3, 8, 8, generator=stream(0))
    one, two = (net.task_network(name).mean.clone() for name in net.names)
    for _ in range(3):
        step(net, net.names[0], x, 4)
    assert (net.task_network(net.names[0]).mean - one).abs().max() > 0.01
    assert torch.equal(net.task_network(net.names[1]).mean, two)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x, net.names[0]), net.task_network(net.names[0])(x))


def test_layers_that_a_copy_would_leave_behind_are_refused():
    plain = Centred()
    plain.stem = lambda x: plain.conv(x)
    with pytest.raises(BadInput, match="'stem' holds on to a function with layers"):
        factorize(plain, head="fc")
    with pytest.raises(BadInput, match="gradient checkpointing"):
        factorize(torchvision.models.densenet121(weights=None, memory_efficient=True), head="classifier")


def test_tasks_of_images_in_an_array():
    net, x = two_tasks(Centred(), "fc").eval(), torch.randn(4, 3, 8, 8, generator=stream(0))
    torch.testing.assert_close(net(x, np.array([0, 1, 1, 0])), net(x, [0, 1, 1, 0]))
    with pytest.raises(BadInput, match="0 tasks are given for 0 images"):
        net(x[:0], [])


def test_a_budget_is_kept_where_nothing_is_factorized():
    with pytest.raises(BadInput, match="A budget of 0.5 cannot be met"):
        factorize(plain_cnn(), head="10", layers={nn.Conv2d: "own"}, budget=0.5)


def test_copies_and_pickles_are_of_their_own():
    net = two_tasks(plain_cnn(), "10").eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        before = net(x, "birds")
        for version in range(3):
            net.kb[0].mul_(1.0)
        other = copy.deepcopy(net)
        assert torch.equal(other(x, "birds"), before)
        other.kb[0].mul_(2)
        assert torch.equal(net(x, "birds"), before) and not torch.equal(other(x, "birds"), before)
    assert not other.tasks[0].own.state_dict().keys() ^ net.tasks[0].own.state_dict().keys()


def test_mixed_precision_trains_and_keeps_whole_filters():
    net = two_tasks(plain_cnn(), "10")
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x, "birds")
        cross_entropy(logits.float(), y).backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in net.kb)
    net.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            net(x, "birds")
        assert net.filters("birds")[0][0].dtype == torch.float32
        assert torch.equal(net(x, "birds"), copy.deepcopy(net)(x, "birds"))


def test_filters_are_generated_once_per_evaluation(monkeypatch):
    net, asked = two_tasks(plain_cnn(), "10").eval(), []
    filters = type(net).filters
    monkeypatch.setattr(type(net), "filters", lambda self, task: asked.append(task) or filters(self, task))
    images = Split(torch.randn(20, 3, 8, 8, generator=stream(0)), torch.arange(20) % 4)
    score(net, images, 0, batch_size=5)
    assert asked == [0]


def test_it_compiles():
    net = two_tasks(plain_cnn(), "10", budget=1.0).eval()
    x = torch.randn(3, 3, 8, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, "birds"), net(x, "birds"))
    compiled(x, "birds").sum().backward()
    assert net.kb[0].grad.any()
    with torch.no_grad():
        net.kb[0].mul_(2)
        torch.testing.assert_close(compiled(x, "birds"), net(x, "birds"))


def test_the_papers_network_by_the_authors_numbers(shared):
    "Filters, logits, gradients and updates of the authors' code, by the paper's CNN as a plain network."
    z = Oracle(shared / "oracle", "dfcnn_cifar100_10_init", "dfcnn_cifar100_10_steps")
    theirs = DFCNN(ARCHITECTURES["cifar100"], seed=0)
    theirs.add_task(), theirs.add_task()
    shapes = load(theirs, z)
    net = as_plain(theirs).eval()
    pairs = list(counterparts(net, theirs))
    assert len(pairs) == len(list(net.parameters())) == len(shapes)
    with torch.no_grad():
        for ours, given in pairs:
            ours.copy_(given)

    def back(of) -> dict:
        "Values or gradients of ours, by the authors' names and in their layouts."
        values = {id(given): of(ours) for ours, given in pairs}
        return in_tf(theirs, shapes, lambda p: values[id(p)])

    batch = lambda t: (torch.from_numpy(z[f"x/t{t}"]).permute(0, 3, 1, 2), torch.from_numpy(z[f"y/t{t}"]).long())
    for t in (0, 1):
        assert_close(net(batch(t)[0], t).detach(), z[f"logits/t{t}"], f"logits of task {t}")
        for i, (W, _) in enumerate(net.filters(t)):
            assert_close(W.detach().permute(2, 3, 1, 0), z[f"filter/t{t}.conv{i}.W"], f"filter {i}", 1e-6)
    x, y = batch(0)
    optimizer = RMSProp(net.trains(0), lr=1e-4)
    for step in (1, 2, 3):
        net.zero_grad()
        sum_cross_entropy(net(x, 0), y).backward()
        gradients = back(lambda p: p.grad)
        if step == 1:
            assert compare(z, "grad0", gradients) == len(gradients) > 10
        optimizer.step()
        if step != 2:
            assert compare(z, f"step{step}", back(lambda p: p)) == len(gradients)


def as_plain(theirs: DFCNN):
    "The paper's CNN as a plain network, factorized with the same sizes."
    sizes = {name: (kb, c) for name, (_, kb), c in zip("0369", theirs.sizes.kb, theirs.sizes.c)}
    net = factorize(paper_network(theirs.arch), head="16", sizes=sizes, init="random")
    for _ in theirs.tasks:
        net.add_task()
    return net


def counterparts(net, theirs: DFCNN):
    "Our parameters and those of `DFCNN`, in pairs."
    yield from zip(net.kb, theirs.kb)
    for own, given in zip(net.tasks, theirs.tasks):
        yield from zip(own.generators.parameters(), given.generators.parameters())
        for i, name in enumerate(("14", "16")):
            layer = own.own.get_submodule(name)
            yield from ((layer.weight, given.head.W[i]), (layer.bias, given.head.b[i]))


def paper_network(arch: Architecture) -> nn.Sequential:
    "The CNN of App. B.3 without hidden sizes of its own: convolutions at 0, 3, 6, 9, fully connected at 14 and 16."
    blocks = []
    for (cin, cout, k), pool in zip(arch.conv_shapes, arch.pools):
        blocks += [nn.Conv2d(cin, cout, k, padding=k // 2), nn.ReLU(), nn.MaxPool2d(pool) if pool else nn.Identity()]
    (hidden,) = arch.hidden
    connected = nn.Linear(arch.features, hidden), nn.ReLU(), nn.Linear(hidden, arch.outputs)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(arch.dropout), *connected)


# What tests/test_contract.py does not ask of such networks, since others have no statistics


FEW = Architecture(name="few", input=(3, 8, 8), kernels=(3,), channels=(8,), pools=(0,), hidden=(), outputs=10)


def few_tasks(n=3, images=20) -> list[Task]:
    return noise_tasks(n, (images, 10, 30), classes=10, generator=torch.Generator().manual_seed(0))


def learner(method, cbs=(), seed=0, **kw):
    hyper = dict(epochs=2, lr=1e-3, decay=2.5e-4, batch_size=10) | kw
    return lifelong_learner(method(FEW, seed), few_tasks(), **hyper, cbs=list(cbs))


def test_each_task_has_statistics_of_its_own():
    learn = learner(SmallDF)
    train(learn)
    means = [dict(t.own.named_buffers())["1.running_mean"] for t in learn.model.tasks]
    assert len({tuple(m.tolist()) for m in means}) == 3


def test_the_audit_sees_statistics_of_other_tasks():
    class Careless(Callback):
        def after_epoch(self):
            if self.learn.task == 1:
                self.model.tasks[0].own.get_buffer("1.running_mean").add_(1e-6)

    with pytest.raises(AssertionError, match="tasks.0.own.1.running_mean"):
        train(learner(SmallDF, [Audit(), Careless()]))


def test_settings_are_part_of_a_record():
    config = RunConfig("shapes", "STL", epochs=1, tasks=1, batch_size=10, lr=1e-3, decay=0.0, eval_every=1)
    plan = json.loads(json.dumps(settings(SmallDF(FEW), config)))["plan"]
    assert set(plan) == set(Plan.__dataclass_fields__) and plan["head"] == "10"


def test_a_study_takes_it_and_goes_on_where_it_was_stopped(tmp_path):
    "With a registered network of one's own: records, checkpoints, the network loaded from a record."

    class Stop(Callback):
        order = 70

        def after_epoch(self):
            if self.epoch == 2:
                raise KeyboardInterrupt

    how = dict(methods="DF-small", epochs=2, tasks=2, workers=1, device="cpu")
    register("DF-small", SmallDF)
    try:
        whole = lifelong_study(output_dir=str(tmp_path / "whole"), **how).run()[0]
        study = lifelong_study(output_dir=str(tmp_path / "parts"), **how)
        folder = tmp_path / "parts/shapes"
        with pytest.raises(KeyboardInterrupt):
            run(study.configs[0], study.images, folder, cbs=[Stop()], checkpoint_every=0)
        resumed = run(study.configs[0], study.images, folder)
        assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
        one, two = (load_network(r.folder).state_dict() for r in (whole, resumed))
        assert all(torch.equal(v, two[k]) for k, v in one.items())
    finally:
        METHODS.pop("DF-small")


def test_listed_resnets_learn_in_a_study(tmp_path):
    methods = "HPS-resnet18 DF-resnet18"
    study = lifelong_study(methods=methods, epochs=1, tasks=1, output_dir=str(tmp_path), workers=1)
    assert "DF, ResNet-18 |" in study.describe()
    records = study.run()
    assert [r.config.method for r in records] == methods.split()
    hps, df = (r.summary["parameters"] for r in records)
    assert 0.97 * hps < df < hps
    assert load_network(records[1].folder).names == ["task 1"]


def test_methods_of_other_networks_are_not_among_all():
    assert [m.name for m in METHODS.values() if m.beyond] == ["STL-resnet18", "HPS-resnet18", "DF-resnet18"]
    with pytest.raises(BadInput, match=r"takes no images of \(1, 28, 28\)"):
        build_network("DF-resnet18", "mnist-5")


class LooksAtValues(nn.Module):
    "A layer that does not work on a tensor without values."

    def forward(self, x):
        return x if x.abs().sum().item() >= 0 else -x


class Looking(NetworkMethod):
    how = dict(head="3")

    @staticmethod
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), LooksAtValues(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))


def test_a_network_that_looks_at_values_is_asked_with_them_which_images_it_takes(monkeypatch):
    monkeypatch.setitem(METHODS, "Looking", None)  # gone when the test is over
    register("Looking", Looking)
    assert can_build("Looking", "cifar100") and not can_build("Looking", "officehome")
    with pytest.raises(BadInput, match=r"takes no images of \(3, 128, 128\)"):
        build_network("Looking", "officehome")
