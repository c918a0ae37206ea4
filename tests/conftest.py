"What the tests share: where the reference data lie, and a number of threads that does not depend on the machine."
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DFCNN_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder with real images and the numbers of the authors' code; tests that need it skip where it is absent."
    if not (SHARED / "oracle").is_dir():
        pytest.skip(f"no reference data in {SHARED}: set DFCNN_SHARED to the folder that holds oracle/ and data/")
    return SHARED


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1))
