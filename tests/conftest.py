"""What every test may rely on: quiet TensorFlow, the checkout's root, the folder of real data."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def retinanet_data():
    "The folder of real pictures and published figures that `RETINANET_DATA` names."
    folder = os.environ.get("RETINANET_DATA")
    if not folder:
        pytest.skip("RETINANET_DATA is not set: no real data here")
    if not Path(folder).is_dir():
        pytest.fail(f"RETINANET_DATA={folder} is no folder")
    return Path(folder)
