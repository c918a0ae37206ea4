"What the tests share: where the reference data lie, and one thread for each process."

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the programs that tests start
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # the tests go side by side already: studies start no workers unless they are told to

import pytest
from PIL import Image

from dfcnn.data.sources import CIFAR100_CLASSES, OFFICEHOME_CLASSES
from dfcnn.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DFCNN_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder with real images and the numbers of the authors' code; tests that need it skip where it is absent."
    if not (SHARED / "oracle").is_dir():
        pytest.skip(
            f"no reference data in {SHARED}: set DFCNN_SHARED to the folder that holds oracle/ and data/"
        )
    return SHARED


@pytest.fixture(autouse=True)
def methods_as_they_were():
    "What a test lists as a method is not listed for the next one."
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def picture(path: Path, size, color) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    "A folder with the form of CIFAR-100: the red of an image is its class, the green its number."
    root = tmp_path_factory.mktemp("cifar")
    for part, n in (("train", 22), ("test", 100)):
        for c, name in enumerate(CIFAR100_CLASSES):
            for i in range(n):
                picture(
                    root / "cifar100" / part / name / f"{i:03}.png",
                    (32, 32),
                    (2 * c, 2 * i, 0 if part == "train" else 255),
                )
    return root


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    "A folder with the form of Office-Home's archive, photos of several sizes, a domain that is not used and a file that is no image."
    root = tmp_path_factory.mktemp("home") / "OfficeHomeDataset_10072016"
    for d, domain in enumerate(("Product", "Real World", "Art")):
        for c, name in enumerate(OFFICEHOME_CLASSES):
            for i in range(10):
                picture(root / domain / name / f"{i:05}.jpg", (40 + i, 60), (c, 100 * d, 0))
    (root / "ImageInfo.csv").write_text("not an image")
    return root
