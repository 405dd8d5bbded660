"""What pip, make and the workflows are told: floors, extras, engines; and what an installation without an engine says."""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from retinanet_nb.engine import ENGINES, choose_engine

from helpers import python

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    "The metadata that pip would see, made by setuptools from a copy of the sources."
    folder = tmp_path_factory.mktemp("sources")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "retinanet_nb", folder / "retinanet_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "import setuptools.build_meta as b; print('dist-info', b.prepare_metadata_for_build_wheel('made'))"
    (folder / "made").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = re.search(r"^dist-info (.*)$", done.stdout, re.MULTILINE)[1]
    return Parser().parsestr((folder / "made" / name / "METADATA").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def required(metadata):
    "Extra ('' for what everybody gets) → name → requirement."
    found = {}
    for text in metadata.get_all("Requires-Dist"):
        requirement = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', text)
        found.setdefault(extra[1] if extra else "", {})[requirement.name] = requirement
    return found


def test_python_has_a_floor_that_unpacks_safely(metadata):
    allowed = SpecifierSet(metadata["Requires-Python"])
    assert all(v in allowed for v in ("3.11.4", "3.12.0", "3.13.1")) and "3.11.3" not in allowed
    import tarfile

    assert hasattr(tarfile, "data_filter")  # what 3.11.4 brought


def test_floors(required):
    def lowest(name, extra=""):
        return min(Version(s.version) for s in required[extra][name].specifier if s.operator == ">=")

    assert lowest("keras") >= Version("3.15")  # the safe mode of older ones can be passed
    assert lowest("opencv-python-headless") >= Version("4.11.0.86")
    assert lowest("tensorflow", "tensorflow") >= Version("2.18")


def test_engines_are_extras_and_none_is_forced(required):
    assert not set(ENGINES) & set(required[""])
    for engine in ENGINES:
        assert list(required[engine]) == [engine]
    assert {"pytest", "nbdev", "jax"} <= set(required["dev"]) and "tensorflow" not in required["dev"]


def test_nbdev_reads_the_settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert re.fullmatch(r"3\.\d+", config["DEFAULT"]["min_python"])
    from nbdev.config import get_config

    assert get_config(path=str(ROOT)).min_python == config["DEFAULT"]["min_python"]


def test_pytorch_is_what_ci_runs():
    assert re.search(
        r'^export TORCH="\$\{TORCH-torch==[\d.]+\}"$', (ROOT / ".ci/run").read_text(), re.MULTILINE
    )
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert workflow["env"]["TORCH"].endswith("+cpu")  # not gigabytes for graphics cards
    assert {"3.11", "3.13"} <= set(workflow["strategy"]["matrix"]["python-version"])


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_installs_the_default_engine_and_pytorch_on_demand(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def commands(*arguments):
        clean = {k: v for k, v in os.environ.items() if k not in ("TORCH", "EXTRAS", "MAKEFLAGS", "MFLAGS")}
        done = subprocess.run(
            ["make", "-n", "test", *arguments], cwd=tmp_path, capture_output=True, text=True, env=clean
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain = commands()
    assert "-e '.[tensorflow,dev]'" in plain and "torch" not in plain.replace("pytorch", "")
    assert "(3, 11, 4)" in plain
    assert "-e '.[jax,dev]'" in commands("EXTRAS=jax,dev")
    with_torch = commands("TORCH=torch==2.13.0")
    install, test = with_torch.index("'torch==2.13.0'"), with_torch.index("-m pytest")
    assert with_torch.index("-e '.[tensorflow,dev]'") < install < test


# `None` in sys.modules makes a package look as if it weren't installed
WITHOUT = "import sys\nfor name in {!r}: sys.modules[name] = None\n"


@pytest.mark.parametrize("module", ["retinanet_box", "boxes", "losses", "targets", "anchors", "resnet50"])
def test_without_any_engine_there_is_one_sentence(module):
    code = (
        WITHOUT.format(ENGINES) + "try: import retinanet_nb." + module + "\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    said = python(code, KERAS_BACKEND="", KERAS_HOME="/nowhere")
    assert "pip install 'retinanet_nb[tensorflow]'" in said and said.count("\n") == 1


def test_hyperparameters_and_model_files_need_no_engine():
    code = (
        WITHOUT.format((*ENGINES, "keras")) + "import retinanet_nb.hyperparameters, retinanet_nb.model_files"
    )
    python(code + "; print('fine')", KERAS_BACKEND="")


def test_the_engine_that_is_there_is_taken():
    pytest.importorskip("jax")
    code = WITHOUT.format(["tensorflow", "torch"]) + (
        "import retinanet_nb.boxes, keras\nprint(keras.backend.backend())"
    )
    assert python(code, KERAS_BACKEND="", KERAS_HOME="/nowhere").split() == ["jax"]


def test_how_an_engine_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def choose(told, *installed):
        monkeypatch.delenv("KERAS_BACKEND", raising=False)
        if told:
            monkeypatch.setenv("KERAS_BACKEND", told)
        return choose_engine(installed.__contains__), os.environ.get("KERAS_BACKEND")

    assert choose(None, "tensorflow", "jax", "torch") == ("tensorflow", None)  # Keras's own default
    assert choose(None, "jax", "torch") == ("jax", "jax")
    assert choose(None, "torch") == ("torch", "torch")
    assert choose("torch", "tensorflow", "torch") == ("torch", "torch")
    assert choose("openvino") == ("openvino", "openvino")
    for told, installed in (("jax", ("tensorflow",)), (None, ())):
        with pytest.raises(ModuleNotFoundError, match="pip install"):
            choose(told, *installed)
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    assert choose(None, "tensorflow", "torch") == ("torch", None)
    assert choose(None, "tensorflow") == ("tensorflow", "tensorflow")
    for damaged in ("", "[]", "{", "\xff"):
        (tmp_path / "keras.json").write_text(damaged, encoding="latin1")
        assert choose(None, "tensorflow") == ("tensorflow", None)
