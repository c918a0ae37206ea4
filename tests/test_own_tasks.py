"A user's own images: the life of a model in separate processes, other sizes and modes through `lifelong.ipynb`, and the time that many photos take."

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zlib
from dataclasses import replace
from io import StringIO
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from conftest import picture
from filelock import FileLock

from dfcnn.core import BadInput
from dfcnn.data.folders import photos_of_class, photos_of_task, read_folder, read_photo, task_from_folder, tasks_from_datasets, tasks_from_folder
from dfcnn.data.datasets import DATASETS, list_dataset
from dfcnn.methods.registry import METHODS, register
from dfcnn.methods.sharing import STL
from dfcnn.experiments.figures import cost_table
from dfcnn.experiments.studies import lifelong_study
from dfcnn.training.learner import Callback
from dfcnn.vision import aug_transforms, image_learner, load_learner

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def draw(folder: Path, names: str, n: int = 16, size=(20, 16)) -> None:
    "Noise around a color for each class, in files."
    rng = np.random.default_rng(sum(map(ord, folder.name)))
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            x = rng.integers(0, 90, (size[1], size[0], 3))
            x[..., c % 3] += 70 + 40 * (c // 3)
            Image.fromarray(x.astype("uint8")).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    draw(root / "photos/birds", "abc"), draw(root / "photos/tools", "ab"), draw(root / "later/fruit", "abcd")
    return root


def process(code: str, cwd: Path, ok: bool = True) -> str:
    "What a new process prints that runs these lines."
    script = f"from dfcnn.vision import *\nimport torch\n{code}"
    env = {**os.environ, "DFCNN_CACHE": str(cwd / "cache")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=cwd, capture_output=True, text=True, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def test_a_life_in_separate_processes(photos):
    kw = "device='cpu', epochs=6, folder='model'"
    first = process(f"tasks = tasks_from_folder('photos', size=16)\nprint(tasks.table().to_csv())\nimage_learner(tasks, DFCNN, {kw}).learn_next()", photos)
    assert "birds,a,11,2,3,16" in first and "birds: " in first and "tools: " not in first
    ask = "p = learn.predict('photos/birds/b/3.png', task='birds')\nprint(p[0], *p[2].tolist())"
    second = process(f"tasks = tasks_from_folder('photos', size=16)\nlearn = image_learner(tasks, DFCNN, {kw}).fit()\n{ask}", photos)
    assert "Learned already, by" in second and "tools: " in second  # the task that was over is not learned again
    before = second.strip().splitlines()[-1]
    third = process(f"learn = load_learner('model', device='cpu')\n{ask}\nlearn.add_task('later/fruit')\nlearn.export('model2')\nprint(learn.retention().to_csv())", photos)
    assert third.splitlines()[0] == before  # the same numbers in another process
    table = pd.read_csv(StringIO(third[third.index("task,") :]), index_col="task")
    assert table.index.tolist() == ["birds", "tools", "fruit"] and table.loc["fruit", "change"] == 0
    assert "before," in third and (table["now, low"] < table["now, high"]).all()
    model = load_learner(photos / "model2", "cpu")
    with pytest.raises(BadInput, match="There is a task 'birds' already"):
        model.add_task(photos / "photos/birds")


def test_a_killed_process_goes_on_and_ends_with_the_same_weights(photos, tmp_path):
    code = """
from dfcnn.training.learner import Callback
import os
class Die(Callback):
    order = 90
    def after_epoch(self):
        if self.epoch == 2 and self.learn.task == 1 and os.environ.get("DIE"): os._exit(9)
tasks = tasks_from_folder('photos', size=16)
learn = image_learner(tasks, DFCNN, device='cpu', epochs=4, patience=0, folder=FOLDER)
keep = learn.checkpoint
learn.checkpoint = lambda task, settings: keep(task, settings, every=0.0)
learn.fit(cbs=[Die()])
"""
    killed = code.replace("FOLDER", repr(str(tmp_path / "killed")))
    process("import os\nos.environ['DIE'] = '1'\n" + killed, photos, ok=False)
    assert (tmp_path / "killed/training.safetensors").exists()
    process(killed, photos)
    whole = image_learner(tasks_from_folder(photos / "photos", size=16), device="cpu", epochs=4, patience=0).fit()
    state = load_learner(tmp_path / "killed", "cpu").network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.network.state_dict().items())


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].size and not METHODS[m].network.starts_from])
def test_every_method_learns_own_tasks_and_is_restored(method, photos, tmp_path):
    tasks = tasks_from_folder(photos / "photos", size=16)
    learn = image_learner(tasks, method, epochs=2, device="cpu").fit()
    back = load_learner(learn.export(tmp_path / "model"), "cpu")
    file = photos / "photos/tools/a/0.png"
    assert torch.equal(back.predict(file, task="tools")[2], learn.predict(file, task="tools")[2])
    assert back.network.outputs == [3, 2]


def test_a_method_that_starts_from_trained_networks_is_refused(photos):
    with pytest.raises(BadInput, match="TF .Distillation. starts from trained networks"):
        image_learner(tasks_from_folder(photos / "photos", size=16), "TF-distillation", device="cpu")


def test_a_linked_folder_is_called_as_its_link(photos, tmp_path):
    for name, there in (("left", "a/images"), ("right", "b/images")):
        draw(tmp_path / there, "xy")
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).symlink_to(tmp_path / there)
    assert [t.name for t in tasks_from_folder(tmp_path / "photos", size=16)] == ["left", "right"]


def test_what_is_left_out_is_said_and_what_would_be_is_refused(tmp_path, capsys):
    draw(tmp_path / "photos/birds/train", "ab"), draw(tmp_path / "photos/birds/test", "ab")
    for name in ("1.heic", "2.heic", "notes.txt", ".hidden"):
        (tmp_path / "photos/birds/test/a" / name).write_text("no image")
    tasks_from_folder(tmp_path / "photos", size=16)
    assert "Left out, no images by their names: 2 .heic, 1 .txt." in capsys.readouterr().out
    picture(tmp_path / "photos/birds/test/loose.png", (20, 16), (1, 2, 3))
    with pytest.raises(BadInput, match="holds images itself, such as 'loose.png'"):
        tasks_from_folder(tmp_path / "photos", size=16)


def test_training_images_alone_are_divided(tmp_path):
    draw(tmp_path / "photos/birds/train", "ab", n=20)
    (task,) = tasks_from_folder(tmp_path / "photos", size=16)
    assert [len(s.y) for s in (task.train, task.valid, task.test)] == [28, 4, 8]
    for shares in (dict(train=0.2, valid=0.2, test=0.6), dict(train=0.05, valid=0.05, test=0.9)):
        few = torch.rand(6, 3, 16, 16), torch.arange(6) % 2
        (task,) = tasks_from_datasets({"few": few}, size=16, shares=shares)
        assert [len(s.y) for s in (task.train, task.valid, task.test)] == [2, 2, 2]  # one of each class in each set


def test_twelve_bits_in_sixteen_are_refused(tmp_path):
    draw(tmp_path / "photos/cells", "ab")
    for most, said in ((4095, "uses the lowest 12"), (65535, "")):
        values = np.linspace(0, most, 320).reshape(16, 20).astype("uint16")
        Image.fromarray(values).save(tmp_path / "photos/cells/a/0.png")
        if said:
            with pytest.raises(BadInput, match=said):
                tasks_from_folder(tmp_path / "photos", size=16)
        else:
            tasks_from_folder(tmp_path / "photos", size=16)


def png_of_sixteen_bits(values: np.ndarray) -> bytes:  # uint16 (height, width, 3)
    "A PNG in color with 16 bits for each value, which Pillow reads and does not write."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_twelve_bits_in_color_are_refused():
    levels = np.linspace(0, 1, 16 * 16 * 3).reshape(16, 16, 3)
    with pytest.raises(BadInput, match="uses the lowest 12"):
        read_photo(png_of_sixteen_bits((levels * 4095).astype("uint16")), 16)
    assert read_photo(png_of_sixteen_bits((levels * 4096).astype("uint16")), 16).max() == 16  # thirteen bits
    assert read_photo(png_of_sixteen_bits((levels * 65535).astype("uint16")), 16).max() == 255
    assert not read_photo(png_of_sixteen_bits(np.zeros((16, 16, 3), "uint16")), 16).any()  # black is black


def test_labels_that_are_no_classes_are_refused():
    x = torch.rand(6, 3, 16, 16)
    for y, said in (([0.5] * 6, "is 0.5"), ([-1, 0] * 3, "image 0 is -1"), (["a", "b"] * 3, "is 'a'")):
        with pytest.raises(BadInput, match=f"A label is the number of a class .*{said}"):
            tasks_from_datasets({"few": [(a, b) for a, b in zip(x, y)]}, size=16)
    with pytest.raises(BadInput, match="Unknown fit"):
        tasks_from_datasets({"few": (x, torch.arange(6) % 2)}, size=16, fit="stretch")


def test_a_model_is_written_by_one_process_at_a_time(photos, tmp_path):
    learn = image_learner(tasks_from_folder(photos / "photos", size=16)[:1], device="cpu", epochs=1).fit()
    learn.export(tmp_path)
    before = (tmp_path / "model.json").read_text()
    learn.history = learn.history.iloc[1:]  # so that there is something to write
    writer = threading.Thread(target=learn.export, args=(tmp_path,))
    with FileLock(tmp_path / ".lock"):  # as another process holds it
        writer.start()
        writer.join(0.5)
        assert writer.is_alive() and (tmp_path / "model.json").read_text() == before
    writer.join(30)
    assert (tmp_path / "model.json").read_text() != before


def test_the_same_lines_run_again(photos, tmp_path):
    "With `fit(epochs)` too, after a task that was interrupted and after the end."
    tasks = tasks_from_folder(photos / "photos", size=16)
    learn = image_learner(tasks, device="cpu", folder=tmp_path / "model")

    class Interrupt(Callback):
        def before_fit(self):
            if learn.learned:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(epochs=1, cbs=[Interrupt()])
    assert learn.settings.epochs == 40  # what was said of one call holds for it alone
    for _ in range(2):
        again = image_learner(tasks, device="cpu", folder=tmp_path / "model").fit(epochs=1)
        assert [t.epochs for t in again.learned] == [1, 1]
    with pytest.raises(BadInput, match="All tasks are learned"):
        again.learner()


def test_a_task_that_was_prepared_for_another_model_is_refused(photos):
    learn = image_learner(tasks_from_folder(photos / "photos", size=16), "STL", epochs=1, device="cpu").fit()
    (other,) = tasks_from_folder(photos / "later", size=16)
    with pytest.raises(BadInput, match="were not prepared as this model's are"):
        learn.add_task(other)
    learn.add_task(task_from_folder(photos / "later/fruit", learn.prepare), epochs=1)
    assert learn.names == ["birds", "tools", "fruit"]


def test_a_model_that_cannot_be_kept_is_learned_all_the_same(photos, tmp_path, monkeypatch):
    learn = image_learner(tasks_from_folder(photos / "photos", size=16), "STL", epochs=1, device="cpu", folder=tmp_path / "m").fit()

    def full(*a):
        raise OSError("No space left on device")

    monkeypatch.setattr(learn, "export", full)
    with pytest.raises(OSError):
        learn.add_task(photos / "later/fruit")
    assert learn.names == [t.name for t in learn.learned] == ["birds", "tools", "fruit"]
    assert len(learn.retention()) == 3
    monkeypatch.undo()  # there is room again
    with pytest.raises(BadInput, match="could not be kept: `fit\\(\\)` keeps it"):
        learn.add_task(photos / "later/fruit")
    learn.fit()
    assert load_learner(tmp_path / "m", "cpu").names == ["birds", "tools", "fruit"]
    assert not list((tmp_path / "m").glob("training*"))


def test_a_folder_that_takes_no_files_is_noticed_before_training(photos, tmp_path, monkeypatch):
    def refused(*a, **kw):
        raise PermissionError("Permission denied")

    learn = image_learner(tasks_from_folder(photos / "photos", size=16), "STL", epochs=1, device="cpu", folder=tmp_path / "m")
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(BadInput, match="Nothing can be written to .*Permission denied"):
        learn.fit()
    assert not learn.learned and not list((tmp_path / "m").iterdir())


def test_a_folder_that_is_no_path_is_refused(photos):
    learn = image_learner(tasks_from_folder(photos / "photos", size=16), "STL", epochs=1, device="cpu").fit()
    for folder in ("~nosuch/x", "a\0b", ""):
        with pytest.raises(BadInput, match="Parameter 'folder' must be a path"):
            learn.add_task(folder)


def test_calls_before_their_time_are_refused(photos):
    learn = image_learner(tasks_from_folder(photos / "photos", size=16)[:1], "STL", epochs=np.int64(1), device="cpu")
    with pytest.raises(BadInput, match="No task is learned yet"):
        learn.retention()
    for epochs in (-1, 1.5):
        with pytest.raises(BadInput, match="'n_epoch' must be a whole number"):
            learn.learner().fit(epochs)
    with pytest.raises(BadInput, match="There are no tasks to learn"):
        image_learner(tasks_from_folder(photos / "photos", size=16)[:0], device="cpu")
    with pytest.raises(BadInput, match="'n' must be a whole number"):
        learn.show_batch("birds", 0)
    assert learn.fit().names == ["birds"]
    with pytest.raises(BadInput, match="Unknown task 0"):
        learn.predict(photos / "photos/birds/a/0.png", task=0)


def test_lifelong_takes_a_folder(photos, tmp_path):
    args = ["-p", "dataset", "folders", "-p", "data_dir", str(photos / "photos"), "-p", "size", "16", "-p", "epochs", "2", "-p", "methods", "STL SNN DF-CNN"]
    out = tmp_path / "out.ipynb"
    done = subprocess.run([BIN / "papermill", ROOT / "nbs/lifelong.ipynb", out, *args], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "reports/lifelong/folders/table.csv")
    assert table.model.tolist() == ["STL", "SNN", "DF-CNN"] and not any("paper" in c for c in table.columns)
    shown = "".join(json.dumps(c.get("outputs", [])) for c in json.loads(out.read_text())["cells"])
    assert "These images are your own" in shown and shown.count("image/png") == 7


def test_costs_where_tasks_have_unlike_numbers_of_classes(photos, tmp_path):
    study = lifelong_study("folders", data_dir=str(photos / "photos"), size=16, methods="STL", epochs=1, output_dir=str(tmp_path), device="cpu", workers=1)
    assert len(set(study.configs[0].classes)) > 1
    assert cost_table(study.run()).grown.tolist() == ["0"]  # only DEN grows


def test_real_archives_as_tasks(shared, tmp_path):
    "CIFAR-10 as tasks of four and six classes, MNIST as a third: color and grey, 32 and 28 pixels."
    groups = dict(things="airplane automobile ship truck", animals="bird cat deer dog frog horse", digits="0 1 2 3 4 5 6 7 8 9")
    task_of = {c: task for task, classes in groups.items() for c in classes.split()}
    count: dict[str, int] = {}
    for archive in ("cifar10", "mnist"):
        with tarfile.open(shared / f"data/{archive}.tgz") as tar:
            for member in tar:
                part, label, name = ("", "", *PurePosixPath(member.name).parts)[-3:]
                if member.isfile() and part == "train" and count.get(label, 0) < 12:
                    count[label] = count.get(label, 0) + 1
                    file = tmp_path / "photos" / task_of[label] / label / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(tar.extractfile(member).read())
    tasks = tasks_from_folder(tmp_path / "photos", size=32)
    assert {t.name: len(t.classes) for t in tasks} == dict(animals=6, digits=10, things=4)
    learn = image_learner(tasks, epochs=1, device="cpu").fit()
    assert len(learn.predict([f for f in (tmp_path / "photos/digits/3").iterdir()], task="digits")) == 12
    back = load_learner(learn.export(tmp_path / "model"), "cpu")
    assert back.network.arch.like == "cifar100" and back.retention().images.tolist() == [12, 20, 8]


def test_many_photos_are_read_fast_and_kept(tmp_path, monkeypatch):
    "A tenth of the 5,000 photos that are promised in under a minute, and far less the second time."
    monkeypatch.setenv("DFCNN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(500):
        file = tmp_path / f"photos/task{i % 2}/class{i // 2 % 5}/{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (8, 10, 3), dtype="uint8"))
        small.resize((500, 400), Image.Resampling.BICUBIC).save(file, quality=90)
    seconds = []
    for _ in range(2):
        start = time.process_time()  # of this process alone, however busy the machine is
        tasks = tasks_from_folder(tmp_path / "photos")
        seconds.append(time.process_time() - start)
    assert len(tasks) == 2 and seconds[0] < 12 and seconds[1] < min(2, seconds[0])


@pytest.mark.parametrize("method", ["DF-CNN", "ProgNN"])  # a chain of layers, and a recorded list of operations
def test_a_task_network_needs_nothing_of_this_package(photos, tmp_path, method):
    learn = image_learner(tasks_from_folder(photos / "photos", size=20), method, epochs=1, device="cpu").fit()
    x = torch.rand(5, 3, 20, 20)
    torch.save((learn.task_network("tools"), x), tmp_path / "alone.pt")
    code = "import torch, sys\nnet, x = torch.load('alone.pt', weights_only=False)\ntorch.save(net(x), 'logits.pt')\nassert not any(m.startswith('dfcnn') for m in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (learn.prepare.mean, learn.prepare.std))
    expected = learn.network.eval()((x - mean) / std, 1)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["DF-CNN", "ProgNN"])
def test_onnx_gives_the_same_logits(photos, tmp_path, method):
    ort = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    learn = image_learner(tasks_from_folder(photos / "photos", size=20), method, epochs=1, device="cpu").fit()
    path = learn.export_onnx("birds", tmp_path / "birds.onnx")
    x = torch.rand(5, 3, 20, 20)
    (logits,) = ort.InferenceSession(path).run(None, dict(pixels=x.numpy()))
    assert np.abs(logits - learn.task_network("birds")(x).numpy()).max() < 1e-5


def test_without_the_extra_onnx_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    learn = image_learner(tasks_from_folder(photos / "photos", size=16), epochs=1, device="cpu").fit()
    with pytest.raises(BadInput, match="pip install 'dfcnn\\[onnx\\]'"):
        learn.export_onnx("birds", tmp_path / "birds.onnx")


def test_a_data_set_that_a_user_lists_is_known_to_workers(tmp_path):
    shapes = DATASETS["shapes"]
    mine = replace(shapes, name="mine", title="My images", groups=lambda: shapes.groups()[:2])
    list_dataset(mine)
    try:
        records = lifelong_study("mine", methods="STL HPS", epochs=1, tasks=1, workers=2, data_dir=None, output_dir=str(tmp_path)).run()
    finally:
        del DATASETS["mine"]
    assert [r.config.dataset for r in records] == ["mine", "mine"]


def test_other_test_images_are_not_taken_for_those_of_a_model(photos, tmp_path):
    "Names, classes and numbers of images are the same; what a later task does is told by the images that the model keeps."
    shutil.copytree(photos / "photos", tmp_path / "photos")
    image_learner(tasks_from_folder(tmp_path / "photos", size=16), "STL", epochs=1, device="cpu", folder=tmp_path / "model").fit()
    for file in (tmp_path / "photos/birds").rglob("*.png"):
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    with pytest.raises(BadInput, match="a model of other tasks, images or settings"):
        image_learner(tasks_from_folder(tmp_path / "photos", size=16), "STL", epochs=1, device="cpu", folder=tmp_path / "model")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_task_that_was_interrupted_begins_again_with_other_labels(photos, tmp_path, capsys, split):
    tasks, how = tasks_from_folder(photos / "photos", size=16)[:1], dict(epochs=3, device="cpu", folder=tmp_path / "model")

    class Interrupt(Callback):
        def after_epoch(self):
            if self.epoch == 1:
                raise KeyboardInterrupt

    learn = image_learner(tasks, "STL", **how)
    keep_at_once = learn.checkpoint
    learn.checkpoint = lambda *of: keep_at_once(*of, every=0)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(cbs=Interrupt())
    data = getattr(tasks[0], split)
    tasks[0] = replace(tasks[0], **{split: data._replace(y=data.y.flip(0))})
    assert image_learner(tasks, "STL", **how).fit().learned[0].epochs == 3
    assert "was made by another configuration, other images" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "valid"])
def test_corrected_labels_are_not_taken_for_those_of_a_model(photos, tmp_path, split):
    tasks, how = tasks_from_folder(photos / "photos", size=16), dict(epochs=1, device="cpu", folder=tmp_path / "model")
    image_learner(tasks, "STL", **how).fit()
    assert len(image_learner(tasks, "STL", **how).learned) == 2
    data = getattr(tasks[0], split)
    tasks[0] = replace(tasks[0], **{split: data._replace(y=data.y.flip(0))})
    with pytest.raises(BadInput, match="a model of other tasks, images or settings"):
        image_learner(tasks, "STL", **how)


class Forward(STL):
    "A method of a user."


class Backward(STL):
    "The same, changed: its classes are counted from the other end."

    def forward(self, x, task):
        return super().forward(x, task).flip(1)


def test_a_model_is_not_read_by_other_code_of_its_method(photos, tmp_path, capsys):
    register("Mine", Forward)
    try:
        image_learner(tasks_from_folder(photos / "photos", size=16), "Mine", epochs=3, device="cpu", folder=tmp_path / "model").fit()
        register("Mine", Backward)
        with pytest.raises(BadInput, match="other code of its method 'Mine'.*Use the code that made it"):
            load_learner(tmp_path / "model", "cpu")
        register("Mine", type("Renamed", (Forward,), dict(__module__=__name__, note="changes nothing")))
        assert "As many test images are classified correctly" not in capsys.readouterr().out
        load_learner(tmp_path / "model", "cpu").export(tmp_path / "bare", images=False)
        assert "As many test images are classified correctly" in capsys.readouterr().out
        register("Mine", Backward)
        load_learner(tmp_path / "bare", "cpu")
        assert "no test images here to tell" in capsys.readouterr().out
    finally:
        METHODS.pop("Mine")


def test_files_that_change_places_are_read_again(tmp_path, monkeypatch):
    "Files of one size and one date, as they come out of an archive."
    monkeypatch.setenv("DFCNN_CACHE", str(tmp_path / "cache"))
    for c, grey in (("a", 50), ("b", 200)):
        (tmp_path / "photos/task" / c).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (16, 16), grey).save(tmp_path / f"photos/task/{c}/{i}.bmp")
    files = sorted((tmp_path / "photos").rglob("*.bmp"))
    for f in files:
        os.utime(f, (1e9, 1e9))
    grey = lambda: [int(i.x[i.y == label].float().mean()) for i in [read_folder(tmp_path / "photos", 16)] for label in (0, 1)]
    assert grey() == grey() == [50, 200]
    for one, other in zip(files[:4], files[4:]):
        one.rename(tmp_path / "between"), other.rename(one), (tmp_path / "between").rename(other)
    assert grey() == [200, 50]


def test_a_name_that_is_no_text_is_refused(monkeypatch):
    "Of a task and of a class. Python gives bytes that are not UTF-8 as lone surrogates; not every system lets a test make such a folder."
    odd = Path("caf\udce9")
    with pytest.raises(BadInput, match="caf.*is not UTF-8. Rename it"):
        photos_of_task(odd)
    monkeypatch.setattr("dfcnn.data.folders.listing", lambda folder: ([], [folder / "1.png"]))
    with pytest.raises(BadInput, match="caf.*is not UTF-8. Rename it"):
        photos_of_class("birds", "all", odd)


def test_odd_images_are_read_or_refused(photos, tmp_path):
    prepare = tasks_from_folder(photos / "photos", size=16).prepare
    x = torch.rand(3, 16, 16).bfloat16()
    assert torch.equal(prepare(x), prepare(x.float()))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(BadInput, match="The image cannot be read"), Image.open(tmp_path / "half.png") as image:
        prepare(image)


def test_images_in_a_list_and_labels_in_an_array():
    images, labels = [np.full((20, 20, 3), 40 * i, "uint8") for i in range(6)], np.arange(6) % 2
    (task,) = tasks_from_datasets({"few": (images, labels)}, size=16)
    assert sum(len(s.y) for s in (task.train, task.valid, task.test)) == 6


def test_a_folder_with_something_else_in_it_is_left_alone(photos, tmp_path):
    (tmp_path / "history.csv").write_text("of a CSVLogger")
    with pytest.raises(BadInput, match="holds something that is no model"):
        image_learner(tasks_from_folder(photos / "photos", size=16), device="cpu", folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["history.csv"]


def test_reading_photos_leaves_warnings_as_they_were(photos, tmp_path, monkeypatch):
    "`catch_warnings` is not for threads: what one of them changes may stay."
    monkeypatch.setenv("DFCNN_CACHE", str(tmp_path))
    before = list(warnings.filters)
    for size in (17, 18):
        tasks_from_folder(photos / "photos", size=size)
    assert warnings.filters == before


def test_augmented_images_are_shown_as_augmented(photos):
    tasks = tasks_from_folder(photos / "photos", size=16)
    plain, augmented = (image_learner(tasks, device="cpu", tfms=tfms) for tfms in ((), aug_transforms(do_flip=False)))
    pictures = lambda learn, split: np.stack([ax.images[0].get_array() for ax in learn.show_batch(tasks[0].name, 4, split).axes[:4]])
    assert (pictures(plain, "train") != pictures(augmented, "train")).any()
    assert (pictures(plain, "valid") == pictures(augmented, "valid")).all()
