"Real images in every form that a user may have them, and every way in which they can be wrong."

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from dfcnn.core import BadInput
from dfcnn.data import sources as sources_module
from dfcnn.data.datasets import task_sequence
from dfcnn.data.sources import CIFAR100_CLASSES, OFFICEHOME_CLASSES, load_images
from dfcnn.data.tasks import officehome_groups


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, tmp_path_factory, monkeypatch):
    "An empty cache for each test; real images are decoded once for all tests and all processes."
    base = tmp_path_factory.getbasetemp()
    run = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # that of the whole run
    real = "shared" in request.fixturenames
    monkeypatch.setenv("DFCNN_CACHE", str(run / "cache-of-real-images" if real else tmp_path / "cache"))


@pytest.fixture(scope="module")
def archive(cifar, tmp_path_factory):
    "The folder of `cifar`, packed."
    path = tmp_path_factory.mktemp("packed") / "cifar100.tgz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(cifar / "cifar100", "cifar100")
    return path


@pytest.fixture
def cifar_to_change(cifar, tmp_path):
    "The folder of `cifar` over again: its files are links until they are replaced, for a copy of 12,200 takes a second."
    return Path(shutil.copytree(cifar / "cifar100", tmp_path / "cifar100", copy_function=os.link))


def replace(path: Path) -> Path:
    "`path`, without the file that was there: what is written to it now leaves the linked file as it is."
    path.unlink()
    return path


def test_cifar_folder_archive_and_cache(cifar, archive, monkeypatch):
    folder = load_images("cifar100", cifar)
    assert folder.x.shape == (12200, 3, 32, 32) and folder.classes == CIFAR100_CLASSES
    assert folder.x[folder.of("train", 7), 0, 0, 0].unique().tolist() == [14]
    assert load_images("cifar100", archive.parent).fingerprint == folder.fingerprint
    assert load_images("cifar100", archive).fingerprint == folder.fingerprint
    monkeypatch.setattr(sources_module, "decode", lambda *a: pytest.fail("the cache was not used"))
    assert load_images("cifar100", cifar).fingerprint == folder.fingerprint


def test_cifar_tasks(cifar):
    tasks = task_sequence("cifar100", data_dir=cifar)
    assert len(tasks) == 10
    for t in tasks:
        assert [len(s.y) for s in (t.train, t.valid, t.test)] == [170, 30, 1000]
        assert t.train.y.bincount().tolist() == [17] * 10 and t.test.y.bincount().tolist() == [100] * 10
        for split in (t.train, t.valid, t.test):  # normalized over each split of each task
            assert torch.allclose(split.x[:, :2].mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
            assert torch.allclose(split.x[:, :2].std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4)


def test_a_changed_folder_is_read_again(cifar_to_change, tmp_path):
    before = load_images("cifar100", tmp_path).fingerprint
    picture(replace(cifar_to_change / "train/apple/000.png"), (32, 32), (9, 9, 9))
    assert load_images("cifar100", tmp_path).fingerprint != before


def test_a_damaged_cache_is_made_again(cifar, tmp_path):
    before = load_images("cifar100", cifar).fingerprint
    (kept,) = (tmp_path / "cache").glob("cifar100-*")
    raw = bytearray(kept.read_bytes())
    raw[len(raw) // 2] ^= 255
    kept.write_bytes(raw)
    assert load_images("cifar100", cifar).fingerprint == before


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: shutil.rmtree(f / "test"), "too few images in test/apple (0 of at least 100)"),
        (lambda f: shutil.rmtree(f / "train/worm"), "too few images in train/worm (0 of at least 20)"),
        (lambda f: (f / "train/worm").rename(f / "train/wurm"), "folders that are no class of it: wurm"),
        (
            lambda f: picture(replace(f / "train/worm/000.png"), (64, 64), (0, 0, 0)),
            "000.png' is 64x64, but 32x32 was expected",
        ),
        (lambda f: replace(f / "train/worm/000.png").write_bytes(b"GIF89a"), "000.png' cannot be read"),
    ],
    ids=["no test part", "a class is missing", "another class", "another size", "no image"],
)
def test_a_wrong_cifar_folder_is_named(cifar_to_change, tmp_path, spoil, message):
    spoil(cifar_to_change)
    with pytest.raises(BadInput) as e:
        load_images("cifar100", tmp_path)
    assert message in str(e.value)


def test_archives_that_climb_out_or_hold_links_are_refused(tmp_path):
    for name, kind in (("../evil.png", tarfile.REGTYPE), ("cifar100/train/apple/link.png", tarfile.SYMTYPE)):
        with tarfile.open(tmp_path / "cifar100.tgz", "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
        with pytest.raises(BadInput, match="a link, a pipe, a device or a path that leaves its folder"):
            load_images("cifar100", tmp_path)


def test_home_folder(home):
    for data_dir in (home, home.parent):
        images = load_images("officehome", data_dir)
        assert images.x.shape == (2 * 65 * 10, 3, 128, 128)
    tv = images.of("Real World", 63)
    assert images.classes[63] == "TV" and abs(images.x[tv, 0].float().mean() - 63) < 3  # JPEG is not exact


def test_home_tasks(home):
    tasks = task_sequence("officehome", data_dir=home)
    groups = dict(officehome_groups())
    for t in tasks:
        assert t.classes == groups[t.name] and [len(s.y) for s in (t.train, t.valid, t.test)] == [
            13 * 6,
            13,
            13 * 3,
        ]
        assert 0 <= t.train.x.min() and t.train.x.max() <= 1  # scaled, not normalized
        domain = (t.train.x[:, 1] * 255).mean().item()
        assert abs(domain - (0 if t.name.startswith("Product") else 100)) < 3


@pytest.mark.parametrize("with_names", [True, False], ids=["names in the file", "numbers alone"])
@pytest.mark.parametrize("as_struct", [True, False], ids=["struct", "bytes"])
def test_home_parquet(tmp_path, with_names, as_struct):
    "Labels of the public files are numbers in ASCII order, where TV comes before Table."
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(value):
        out = io.BytesIO()
        Image.new("RGB", (20, 30), (value, 0, 0)).save(out, "png")
        return {"bytes": out.getvalue(), "path": None} if as_struct else out.getvalue()

    names = sorted(OFFICEHOME_CLASSES)
    rows = [
        dict(image=encoded(i), domain=d, label=i)
        for d in ("Art", "Product", "Real World")
        for i in range(65)
        for _ in range(4)
    ]
    half = len(rows) // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(part)
        if with_names:
            meta = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(meta)})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"data/train-{k:05}-of-00002.parquet")
    images = load_images("officehome", tmp_path)
    assert len(images) == 2 * 65 * 4
    for name in ("TV", "Table", "Webcam"):
        found = images.of("Product", OFFICEHOME_CLASSES.index(name))
        assert images.x[found, 0].unique().tolist() == [names.index(name)], name


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match="has no column domain"):
        load_images("officehome", tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match="cannot be read"):
        load_images("officehome", tmp_path)


@pytest.mark.parametrize("label", [-1, 65])
def test_a_parquet_label_that_is_no_class_is_refused(tmp_path, label):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"image": [b""], "domain": ["Product"], "label": [label]}), tmp_path / "x.parquet"
    )
    with pytest.raises(BadInput, match=f"has the label {label}, which is none of 65 classes"):
        load_images("officehome", tmp_path)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_damaged_archive_is_refused(archive, tmp_path, where):
    "Bits flipped in the middle of a compressed archive, and an archive cut short; whole, it is read by the test above."
    raw = archive.read_bytes()
    at = int(len(raw) * where)
    for damaged in (raw[:at] + bytes(255 - b for b in raw[at : at + 64]) + raw[at + 64 :], raw[:at]):
        (tmp_path / "cifar100.tgz").write_bytes(damaged)
        with pytest.raises(BadInput, match="cannot be read|too few images"):
            load_images("cifar100", tmp_path)


def test_torchvision_folder(tmp_path, monkeypatch):
    "What torchvision downloaded before is read in place. (Its checksums are those of the real files, so they are set aside here.)"
    import pickle

    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, n in (("train", 20), ("test", 100)):
        labels = list(range(100)) * n
        pixels = np.repeat(np.array(labels, np.uint8)[:, None], 3072, 1)
        pixels[:, 1024:2048] = 7  # the green plane
        (folder / part).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR100_CLASSES}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    images = load_images("cifar100", tmp_path)
    assert len(images) == 12000 and len(images.of("test", 3)) == 100
    assert images.x[images.of("train", 41)].unique().tolist() == [7, 41] and (images.x[:, 1] == 7).all()


def test_a_damaged_torchvision_folder_is_refused(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/train").write_bytes(b"not what torchvision left")
    with pytest.raises(BadInput, match="holds a damaged CIFAR-100"):
        load_images("cifar100", tmp_path)


def test_no_network_names_the_other_ways(monkeypatch):
    import urllib.request

    def no_network(*a, **kw):
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(
        BadInput, match=r"could not be downloaded .* \(b\) a folder `cifar100` or an archive `cifar100.tgz`"
    ):
        load_images("cifar100")


def test_a_download_that_broke_does_not_block_the_next(monkeypatch, tmp_path):
    from torchvision.datasets import MNIST

    def half(self):
        Path(self.raw_folder).mkdir(parents=True)
        raise OSError("the connection was closed")

    monkeypatch.setattr(MNIST, "download", half)
    for _ in range(2):
        with pytest.raises(BadInput, match="could not be downloaded .*the connection was closed"):
            load_images("mnist")
    assert not (tmp_path / "cache/torchvision/MNIST").exists()


def test_a_data_set_of_the_package_keeps_its_name():
    from dataclasses import replace

    from dfcnn.data.datasets import DATASETS, list_dataset

    with pytest.raises(BadInput, match="'shapes' is a data set of this package"):
        list_dataset(DATASETS["shapes"])
    for title in ("one", "another"):
        list_dataset(replace(DATASETS["shapes"], name="mine", title=title))
    assert DATASETS.pop("mine").title == "another"


def test_real_cifar100(shared):
    images = load_images("cifar100", shared / "data")
    assert len(images) == 20000 and images.classes == CIFAR100_CLASSES
    tasks = task_sequence("cifar100", images, n_tasks=3)
    assert sorted(t.name for t in tasks) == ["task 1", "task 2", "task 3"]
    assert all(len(t.test.y) == 1000 for t in tasks)
    first = next(t for t in tasks if t.name == "task 1")
    assert first.classes == "beaver aquarium_fish orchid bottle apple bed bee bear bridge bicycle".split()


def test_real_cifar100_is_learned(shared):
    "A few epochs on real images are enough to leave chance behind."
    from dfcnn.training.learner import lifelong_learner, train
    from dfcnn.methods.registry import build_network
    from dfcnn.experiments.metrics import peak_accuracy

    tasks = task_sequence("cifar100", data_dir=shared / "data", n_tasks=1)
    learn = lifelong_learner(
        build_network("DF-CNN", "cifar100"), tasks, epochs=12, lr=1e-4, decay=2.5e-4, batch_size=10
    )
    assert peak_accuracy(train(learn))[0] > 0.25


COUNTS_OF_THE_PAPER = [  # (data set, distribution, fraction) -> training, validation, test images of a task
    ("mnist", "heterogeneous", "3%", 300, 60, 1800),
    ("mnist", "heterogeneous", "30%", 3000, 600, 1800),
    ("mnist", "homogeneous", "3%", 300, 30, 2000),
    ("mnist", "homogeneous", "10%", 1000, 100, 2000),
    ("cifar10", "heterogeneous", "4%", 340, 60, 2000),
    ("cifar10", "homogeneous", "30%", 2500, 500, 2000),
]


@pytest.mark.parametrize("source, distribution, fraction, train, valid, test", COUNTS_OF_THE_PAPER)
def test_multitask_counts_and_balance(shared, source, distribution, fraction, train, valid, test):
    tasks = task_sequence(f"{source}-{distribution}-{fraction}", data_dir=shared / "data")
    assert len(tasks) == (5 if distribution == "heterogeneous" else 10)
    for task in tasks:
        assert [len(s.y) for s in (task.train, task.valid, task.test)] == [train, valid, test]
        for split, n in ((task.train, train), (task.valid, valid)):
            assert split.y.sum() == n // 2, "half true, half false"
        # the test set has fewer than half of some digits (892 fives): the other side fills up
        assert abs(int(task.test.y.sum()) - test // 2) <= (110 if source == "mnist" else 0)
    x = tasks[0].train.x
    assert x.shape[1:] == ((1, 28, 28) if source == "mnist" else (3, 32, 32))
    if source == "mnist":
        assert x.min() == 0 and x.max() == 1
    else:
        assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_multitask_sets_share_no_image(shared):
    for task in task_sequence("mnist-homogeneous-3%", data_dir=shared / "data")[:3]:
        images = [x.numpy().tobytes() for s in (task.train, task.valid, task.test) for x in s.x]
        assert len(set(images)) == len(images)


def test_one_vs_all_tasks_share_images(shared):
    "The authors' run has 1,599 different training images over its ten tasks, and 2,936 if each draws for itself."

    def different(dataset: str, part: str) -> int:
        tasks = task_sequence(dataset, images)
        return len({x.numpy().tobytes() for task in tasks for x in getattr(task, part).x})

    images = load_images("mnist", shared / "data")
    assert 1550 < different("mnist-homogeneous-3%", "train") < 1640
    assert different("mnist-homogeneous-3%", "valid") == 150
    assert different("mnist-homogeneous-3%-independent", "train") > 2800


@pytest.mark.parametrize("distribution, reason", [("heterogeneous", "are wanted"), ("homogeneous", "too few for")])
def test_a_fraction_that_needs_more_images_than_there_are(shared, tmp_path, distribution, reason):
    from dfcnn.experiments.studies import multitask_study

    with pytest.raises(BadInput, match=f"{reason}.* [Cc]hoose a smaller fraction"):
        multitask_study("cifar10", distribution, "4% 70%", data_dir=shared / "data", output_dir=tmp_path)
