"What the tests share: where the reference data lie, and one thread for each process."
from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the programs that tests start

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DFCNN_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder with real images and the numbers of the authors' code; tests that need it skip where it is absent."
    if not (SHARED / "oracle").is_dir():
        pytest.skip(f"no reference data in {SHARED}: set DFCNN_SHARED to the folder that holds oracle/ and data/")
    return SHARED
