"""What every test may rely on: quiet TensorFlow, the checkout's root, the folder of real data; and who begins."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores: threads of each would wait for those of the others
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, "1")
    # what is compiled here runs a few times: a compiler that thinks long loses more than it gains
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

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


# Each takes most of a minute or more, and shares nothing with the rest of its module that takes long to make.
LONG = (
    "test_notebook_runs[07b_training.ipynb]",
    "test_a_run_killed_at_random_moments_ends_as_if_left_alone",
    "test_notebook_runs[10_cli.ipynb]",
    "test_engine[jax]",
    "test_two_processes_or_devices_end_with_the_weights_of_one",
    "test_notebook_runs[tutorials/your_pictures.ipynb]",
    "test_a_power_cut_during_a_run_costs_nothing_that_was_kept",
    "test_a_whole_run_on_another_engine[jax]",
    "test_another_engine_says_the_same[jax-1]",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Every process begins with long tests, so that only short ones are left where they are shared out at the end.

    `--dist worksteal` gives each of the processes a part of the list, and later takes from the end of the fullest.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes < 2:
        return
    long = sorted((i for i in items if i.name in LONG), key=lambda i: LONG.index(i.name))
    others, ordered, left = [i for i in items if i.name not in LONG], [], len(items)
    for k in range(processes):
        size = left // (processes - k)
        left -= size
        first = long[k::processes]
        room = max(0, size - len(first))
        ordered += first + others[:room]
        del others[:room]
    items[:] = ordered + others
