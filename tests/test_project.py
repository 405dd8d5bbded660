"""The project around the chapters: package, README and site in step with the notebooks; clean notebooks; a wheel that
works elsewhere; a Makefile that mends and merges."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from nbdev.clean import clean_nb

import book
import website

ROOT = book.ROOT
PAGES = book.notebooks()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
MACHINE = re.compile(r"/(?:tmp|home|root|work|Users|var/folders|private|mnt)/\w|[A-Z]:\\\\?Users")


def run(*command, cwd, **more):
    "A command's output; its failure is the test's."
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **more,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def project_copy(to):
    "The sources of the project in another folder."
    to.mkdir(exist_ok=True)
    for name in (
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "_quarto.yml",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "nbs", to / "nbs", ignore=shutil.ignore_patterns(".*", "runs"), symlinks=True)
    return to


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# --- the package and its notebooks -----------------------------------------------------------------------------------


def test_package_in_step_with_notebooks(tmp_path):
    copied = project_copy(tmp_path / "project")
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copied)
    fresh = {p.name: p.read_text(encoding="utf-8") for p in (copied / "retinanet_nb").glob("*.py")}
    ours = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "retinanet_nb").glob("*.py")}
    assert set(fresh) == set(ours), (
        f"modules without notebook, or the reverse: {sorted(set(fresh) ^ set(ours))}"
    )
    changed = sorted(name for name in ours if ours[name] != fresh[name])
    assert not changed, f"{changed} differ from their notebooks: edit the notebooks and run nbdev_export"


def public_names():
    "`(module, name, definition)` for every public function and class of the package, read without importing it."
    for path in sorted((ROOT / "retinanet_nb").glob("*.py")):
        if path.name.startswith("_"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield path.stem, node.name, node


def test_every_public_name_has_a_docstring():
    without = [f"{module}.{name}" for module, name, node in public_names() if not ast.get_docstring(node)]
    assert not without, f"no docstring: {', '.join(without)}"


def names_used(tree):
    "Names that a piece of code reads or calls; importing one is not using it."
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    return used


def asserts(tree):
    "Whether a notebook's cell asserts anything."
    return any(
        isinstance(node, ast.Assert)
        or isinstance(node, ast.Call)
        and getattr(node.func, "id", "").startswith("test_")
        for node in ast.walk(tree)
    )


def names_in_tests():
    "Names used in the tests, or in a notebook's cell that asserts something; commands, which tests run by name, too."
    used = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= names_used(tree)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.startswith("retinanet_")
            ):
                used.add(node.value)
    for page in PAGES:
        for cell in book.read(page)["cells"]:
            own = {"export", "exporti", "exports"} & set(book.directives(cell))
            if cell["cell_type"] != "code" or own or book.is_skipped(cell):
                continue
            try:
                tree = ast.parse(re.sub(r"^\s*[%!].*", "", book.source(cell), flags=re.M))
            except SyntaxError:
                continue
            if asserts(tree):
                used |= names_used(tree)
    return used


def test_every_public_name_is_tested():
    """Every public function is used where something is asserted: in a test, or in a notebook's cell that asserts. A class
    may also be one that a public function makes, for then it is tested with that."""
    tested, made = names_in_tests(), set()
    for path in (ROOT / "retinanet_nb").glob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        made |= {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")
        }
        made |= {
            n.id
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef)
            for b in c.bases
            for n in ast.walk(b)
            if isinstance(n, ast.Name)
        }
        made |= {
            node.exc.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name)
        }
    without = []
    for module, name, node in public_names():
        if name in tested or isinstance(node, ast.ClassDef) and name in made:
            continue
        without.append(f"{module}.{name}")
    assert not without, f"used in no asserting place: {', '.join(without)}"


def test_hyperparameters_cost_nothing():
    code = (
        "import sys, time; t = time.process_time(); import retinanet_nb.hyperparameters; t = time.process_time() - t; "
        "print(sorted({'tensorflow', 'keras', 'jax', 'torch', 'numpy', 'cv2', 'matplotlib'} & set(sys.modules)), t)"
    )
    heavy, seconds = run(sys.executable, "-c", code, cwd=ROOT).rsplit(maxsplit=1)
    assert heavy == "[]", f"importing hyperparameters imports {heavy}"
    assert float(seconds) < 1


# --- the notebooks ---------------------------------------------------------------------------------------------------


@every_page
def test_notebook_is_clean(page):
    nb = book.read(page)
    nbformat.validate(nbformat.from_dict(nb))
    cleaned = copy.deepcopy(nb)
    clean_nb(cleaned, clean_ids=False)
    assert cleaned == nb, "has metadata or execution counts: run nbdev_clean"
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"]), "two cells share an id"
    assert page.stat().st_size < 1_000_000, f"is {page.stat().st_size / 1e6:.1f} MB: draw smaller pictures"


@every_page
def test_notebook_outputs(page):
    nb = book.read(page)
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and book.source(c).strip()]
    faults = []
    for cell in code:
        for output in cell["outputs"]:
            where = f"the output of\n{book.source(cell)[:300]}\n"
            if output["output_type"] == "error":
                faults.append(where + "is an error")
            if output["output_type"] == "stream" and output["name"] == "stderr":
                faults.append(where + "is a warning or a log: " + "".join(output["text"])[:300])
            texts = [output.get("text", "")] + [
                v for k, v in output.get("data", {}).items() if k.startswith("text/") or "svg" in k
            ]
            text = "\n".join(t if isinstance(t, str) else "".join(t) for t in texts)
            if found := MACHINE.search(text):
                faults.append(
                    where
                    + f"holds a path of one machine: …{text[max(0, found.start() - 20) : found.end() + 40]}…"
                )
            if found := re.search(r"<[^<>]* at 0x[0-9a-f]{6,}>", text):
                faults.append(where + f"holds an address that changes with every run: {found[0]}")
    assert not faults, "\n".join(faults)
    # checks that are folded print nothing, and neither do definitions
    speaks = [
        c for c in code if not {"default_exp", "hide", "exports", "code-fold"} & set(book.directives(c))
    ]
    if any(not book.is_skipped(c) for c in speaks):
        assert any(c["outputs"] for c in code), "no cell has outputs: execute it and save"


def test_figures_references_links_and_sidebar():
    problems = book.check()
    assert not problems, "\n".join(problems)


def test_check_finds_faults(tmp_path):
    "The check is no rubber stamp: each fault put into a page is found."
    copied = project_copy(tmp_path / "project")
    cell = lambda kind, text, **more: {
        "cell_type": kind,
        "id": f"c{abs(hash(text)) % 10**8}",
        "metadata": {},
        "source": text,
        **more,
    }
    picture = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": "AAAA"}}]
    page = {
        "cells": [
            cell("markdown", "# 99 Faults\n\n> None."),
            cell(
                "markdown",
                "See @fig-nowhere, [a page](99z_missing.ipynb), [a place](99_faults.ipynb#nothing-here) and ![](../LICENSE).",
            ),
            cell(
                "markdown",
                "`@fig-in-code` and `[x](y.ipynb)` are code; [fine](#heading-two) is fine.\n\n## Heading two",
            ),
            cell(
                "code",
                "#| label: fig-x\n#| fig-cap: A picture\ndraw()",
                outputs=picture,
                execution_count=None,
            ),
            cell(
                "code",
                "#| label: fig-x\n#| fig-cap: Again\n#| fig-alt: Again\ndraw()",
                outputs=picture,
                execution_count=None,
            ),
            cell("code", "draw_bare()", outputs=picture, execution_count=None),
            cell(
                "code",
                "#| label: fig-y\n#| fig-cap: None\n#| fig-alt: None\npass",
                outputs=[],
                execution_count=None,
            ),
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (copied / "nbs/99_faults.ipynb").write_text(json.dumps(page))
    known = set(book.check(ROOT))
    text = "\n".join(p for p in book.check(copied) if p not in known)
    for expected in (
        "@fig-nowhere leads to nothing",
        "(99z_missing.ipynb) leads to no file",
        "#nothing-here) leads to no heading",
        "leaves the site",
        "picture ../LICENSE has no alternative text",
        "fig-x has no alternative text",
        "fig-x is used before",
        "(draw_bare()) has no label",
        "(draw_bare()) has no caption",
        "fig-y has no picture",
        "99_faults.ipynb is missing from the sidebar",
    ):
        assert expected in text, f"not found: {expected}\n{text}"
    assert "in-code" not in text and "y.ipynb)" not in text and "heading-two" not in text


# --- the site, README.md ---------------------------------------------------------------------------------------------


def test_nbdev_processes_the_notebooks(tmp_path):
    copied = project_copy(tmp_path / "project")
    shutil.copytree(ROOT / "retinanet_nb", copied / "retinanet_nb")
    printed = book.process(copied)
    website.finish(copied)
    assert not re.search(r"warn|error|traceback", printed, re.I), printed
    problems = book.check_processed(copied)
    assert not problems, "\n".join(problems)
    assert (
        yaml.safe_load((copied / "_proc/_quarto.yml").read_text(encoding="utf-8"))["project"]["type"]
        == "website"
    )
    for name in (
        "styles.css",
        "site.scss",
        "after-body.html",
        "404.qmd",
        "references.bib",
        "favicon.svg",
        "card.png",
    ):
        assert (copied / "_proc" / name).exists(), f"{name} was left behind"
    linked = [
        p for p in (copied / "_proc").rglob("*.ipynb") if "Open in Colab" in p.read_text(encoding="utf-8")
    ]
    wanted = [p for p in book.notebooks(copied) if website.runs_in_colab(p)]
    assert sorted(p.name for p in linked) == sorted(p.name for p in wanted)


def test_quarto_configuration(settings):
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    site = config["website"]
    assert list(config["format"]) == ["html"]
    assert config["project"]["output-dir"] == settings["doc_path"]
    assert site["title"] == settings["title"] and site["description"] == settings["description"]
    assert site["repo-url"] == settings["git_url"] and site["repo-branch"] == settings["branch"]
    assert site["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert set(config["format"]["html"]["theme"]) == {"light", "dark"}


def test_readme_in_step_with_index():
    text, pictures = book.readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, (
        "README.md differs from nbs/index.ipynb: make readme"
    )
    for name, data in pictures.items():
        assert (ROOT / name).read_bytes() == data, f"{name} differs from nbs/index.ipynb: make readme"
    for picture, words, target in book.LINK.findall(book.INLINE_CODE.sub("", book.FENCE.sub("", text))):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / target.partition("#")[0]).exists(), (
                f"README.md: [{words}]({target}) leads to no file"
            )
    commands = re.search(r"^```sh\n(git clone .*?)^```", text, re.M | re.S)[1]
    assert "make demo" in commands and "make test" in commands


def test_readme_figures_are_those_measured():
    "What the first screen claims stands in the result of `make demo`."
    text, _ = book.readme()
    result = book.read(ROOT / "nbs/results/shapes.json")
    assert result["commands"] == ["make demo"]
    line = next(line for line in text.splitlines() if line.startswith("- **Results:**"))
    minutes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    assert f"{minutes[round(result['processor_minutes'])]} minutes of processor time" in line
    assert f"in {result['test']['pictures']} new pictures" in line
    assert f"VOC07 mAP of **{result['test']['voc07_map']:.2f}**" in line


def test_readme_leads_to_the_site_and_to_the_notebooks():
    text, _ = book.readme()
    found = re.findall(
        r"\]\(https://retinanet-nb\.github\.io/retinanet_nb/([\w/]+\.html)[^)]*\) \(\[notebook\]\(nbs/([^)]+)\)\)",
        text,
    )
    assert {page for _, page in found} >= {n for n in NAMES if n != "index.ipynb"}
    for address, page in found:
        assert address == book.address(page)
    assert book.address("04a_anchors.ipynb") == "anchors.html"
    assert book.address("tutorials/questions.ipynb") == "tutorials/questions.html"


# --- packaging -------------------------------------------------------------------------------------------------------


def test_wheel_works_elsewhere(tmp_path, settings):
    copied = project_copy(tmp_path / "project")
    shutil.copytree(
        ROOT / "retinanet_nb", copied / "retinanet_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path / "dist",
        cwd=copied,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 17e6
    elsewhere = tmp_path / "elsewhere"
    venv.create(elsewhere, with_pip=False)
    python = elsewhere / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    # the requirements are those already installed here; a .pth file adds their folder, but not the editable install in it
    library = Path(sysconfig.get_path("purelib", vars={"base": str(elsewhere)}))
    (library / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import retinanet_nb, importlib.metadata as m; print(retinanet_nb.__file__); print(m.version('retinanet_nb'), retinanet_nb.__version__)\n"
        "from pathlib import Path; print(sorted(p.name for p in (Path(retinanet_nb.__file__).parent / 'assets').glob('*')))"
    )
    where, versions, assets = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).resolve().is_relative_to(library.resolve())
    assert versions.split() == [settings["version"]] * 2
    assert assets == str(sorted(p.name for p in (ROOT / "retinanet_nb/assets").glob("*")))
    names = [line.split("=")[0].strip() for line in settings["console_scripts"].splitlines() if line.strip()]
    started = {
        n: subprocess.Popen(
            [elsewhere / "bin" / n, "--help"],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in names
    }
    for name, process in started.items():
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name} --help ended with {process.returncode}:\n{printed}"
        assert f"usage: {name}" in printed, printed


def test_constraints_hold_what_is_installed(settings):
    "constraints.txt names a published version of every requirement, the very one that these tests see."
    from importlib.metadata import version
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines)
    pinned = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    assert not [name for name in pinned if name.startswith(("torch", "nvidia"))]
    for text in (settings["requirements"] + " " + settings["dev_requirements"]).split():
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt: make constraints"
        assert pinned[name] == version(name), (
            f"{name}: installed {version(name)}, pinned {pinned[name]}: make install or make constraints"
        )
        assert requirement.specifier.contains(pinned[name])


def test_workflows_pin_what_they_install():
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            assert not job["runs-on"].endswith("latest"), path.name
            for step in job["steps"]:
                if "uses" not in step:
                    continue
                assert re.fullmatch(r"[\w./-]+@v\d+(\.\d+)*", step["uses"]), f"{path.name}: {step['uses']}"
                if "setup-python" in step["uses"]:
                    assert step["with"]["python-version"]
                if "quarto-actions/setup" in step["uses"]:
                    assert str(step["with"]["version"]) == book.QUARTO


# --- make ------------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@needs_make
def test_make_mends_the_link(tmp_path):
    copied = project_copy(tmp_path / "project")
    link = copied / "nbs/_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
    assert run("make", "--no-print-directory", "mend", cwd=copied).strip() == ""
    link.unlink()
    link.write_text("../_quarto.yml")  # what a checkout without links writes
    assert "Mended nbs/_quarto.yml" in run("make", "--no-print-directory", "mend", cwd=copied)
    assert link.read_bytes() == (copied / "_quarto.yml").read_bytes()
    assert run("make", "--no-print-directory", "mend", cwd=copied).strip() == ""


@needs_make
@needs_git
def test_merge_driver_merges_by_cells(tmp_path):
    "Two branches that change neighbouring outputs and different cells merge into a notebook that opens."
    copied = project_copy(tmp_path / "project")
    assert "no merge driver" in run(
        "make", "--no-print-directory", "merge-driver", cwd=copied
    )  # no git checkout: says so and goes on
    shutil.copy(ROOT / ".gitattributes", copied)
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    git = lambda *args: run(
        "git",
        "-c",
        "user.name=A Tester",
        "-c",
        "user.email=tester@example.org",
        *args,
        cwd=copied,
        env=environment,
    )
    git("init", "-q", "-b", "main")
    run("make", "--no-print-directory", "merge-driver", cwd=copied, env=environment)
    (copied / ".venv").mkdir()
    (copied / ".venv/bin").symlink_to(Path(sys.executable).parent)
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(f"x = {k}", id=f"cell{k}") for k in range(4)]
    )
    page = copied / "nbs/00_merge.ipynb"

    def commit(cells, message):
        for k, text in cells.items():
            nb.cells[k].source = text
        nbformat.write(nb, page)
        git("add", "nbs/00_merge.ipynb", ".gitattributes")
        git("commit", "-q", "-m", message)

    commit({}, "start")
    git("checkout", "-q", "-b", "other")
    commit({3: "x = 30"}, "theirs")
    git("checkout", "-q", "main")
    nb.cells[3].source = "x = 3"
    commit({0: "x = -1"}, "ours")
    git("merge", "-q", "other", "-m", "both")
    assert [c.source for c in nbformat.read(page, 4).cells] == ["x = -1", "x = 1", "x = 2", "x = 30"]
    # both change the same cell: a conflict, yet one between cells, in a notebook that still opens
    git("checkout", "-q", "other")
    nb.cells[0].source = "x = 0"
    commit({1: "x = 100"}, "theirs again")
    git("checkout", "-q", "main")
    nb.cells[0].source, nb.cells[3].source = "x = -1", "x = 30"
    commit({1: "x = 200"}, "ours again")
    merged = subprocess.run(
        [
            "git",
            "-c",
            "user.name=A Tester",
            "-c",
            "user.email=tester@example.org",
            "merge",
            "other",
            "-m",
            "both again",
        ],
        cwd=copied,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert merged.returncode == 1
    sources = [book.source(c) for c in book.read(page)["cells"]]
    assert "x = 100" in sources and "x = 200" in sources and any("<<<<<<<" in s for s in sources)


def test_what_begins_early_is_there():
    from conftest import LONG

    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in LONG:
        function, _, rest = name.partition("[")
        assert f"def {function}(" in source, name
        assert function != "test_notebook_runs" or (ROOT / "nbs" / rest.removesuffix("]")).is_file(), name
