"""How pages and package are written: code shown, narrow, in functions of one idea; what is not there yet can only shrink."""

import ast
import re
import subprocess
import sys

import pytest

import book
import sizes

ROOT = book.ROOT
PAGES = book.notebooks()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
VISIBLE, ELSEWHERE = 100, 110  # columns; tests are formatted to the latter, long sentences in them aside
LONGEST_FUNCTION = 40  # lines of a function's body, without its signature and docstring
LONGEST_RUN = 40  # lines of visible code without a word between

# Pages whose longest run of code is above the limit, and by how much. Nothing may be added, and numbers may
# only fall; a page that has come below the limit is struck from the list.
LONG_RUNS = {}


def code_cells(page):
    "Source, options and visibility of a page's code cells, with None for every cell of text between."
    for cell in book.read(page)["cells"]:
        if cell["cell_type"] != "code":
            yield None
            continue
        options = book.directives(cell)
        hidden = bool({"hide", "default_exp"} & set(options)) or options.get("echo") is False
        folded = str(options.get("code-fold", "")).lower() == "true"
        lines = [line for line in book.source(cell).splitlines() if not line.startswith("#|")]
        yield lines, options, not hidden and not folded


@every_page
def test_width(page):
    "No line is wider than the page's column bears; captions and other options are prose and don't count."
    wide = []
    for cell in filter(None, code_cells(page)):
        lines, _, visible = cell
        limit = VISIBLE if visible else ELSEWHERE
        wide += [f"{len(line)}: {line.strip()[:80]}" for line in lines if len(line) > limit]
    assert not wide, "\n".join(wide)


def body_lines(function):
    "Lines of a function without its signature and docstring."
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_have_one_idea():
    long = []
    for path in sorted((ROOT / "retinanet_nb").glob("*.py")):
        if path.name == "_modidx.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and body_lines(node) > LONGEST_FUNCTION:
                long.append(f"{path.stem}.{node.name}: {body_lines(node)} lines")
    assert not long, "\n".join(long)


def test_the_first_line_of_a_docstring_ends_no_code_halfway():
    "The site sets the first line in italics, which breaks where code goes on in the second."
    broken = []
    for path in sorted((ROOT / "retinanet_nb").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if first.count("`") % 2:
                    broken.append(f"{path.stem}.{node.name}: {first}")
    assert not broken, "\n".join(broken)


def longest_run(page):
    "Most lines of visible code on a page that no text interrupts."
    longest = run = 0
    for cell in code_cells(page):
        if cell is None:
            run = 0
        elif cell[2]:
            run += sum(bool(line.strip()) for line in cell[0])
            longest = max(longest, run)
    return longest


@every_page
def test_a_word_between(page):
    name, longest = page.relative_to(ROOT / "nbs").as_posix(), longest_run(page)
    allowed = LONG_RUNS.get(name, LONGEST_RUN)
    assert longest <= allowed, f"{longest} lines of code without a word between; {allowed} are allowed here"


def test_the_list_of_long_runs_only_shrinks():
    "An entry that is no longer needed, or larger than needed, is mended here."
    stale = []
    for page, name in zip(PAGES, NAMES):
        longest = longest_run(page)
        if name in LONG_RUNS and longest < LONG_RUNS[name]:
            stale.append(f"{name}: {longest} instead of {LONG_RUNS[name]}")
    assert not stale, "\n".join(stale)
    assert not set(LONG_RUNS) - set(NAMES)


@every_page
def test_exported_code_is_shown(page):
    "`#| export` removes a cell from the site; exported definitions stand in `#| exports` cells."
    hidden = []
    for cell in filter(None, code_cells(page)):
        lines, options, _ = cell
        if {"export", "exporti"} & set(options):
            tree = ast.parse("\n".join(lines))
            hidden += [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not hidden, f"not on the page: {', '.join(hidden)}"


@every_page
def test_no_backticks_in_comments_of_exported_code(page):
    "nbdev makes links of them inside code."
    found = []
    for cell in filter(None, code_cells(page)):
        lines, options, _ = cell
        if "exports" in options:
            found += [line.strip() for line in lines if re.search(r"(^|\s)#[^'\"]*`", line)]
    assert not found, "\n".join(found)


@every_page
def test_pages_do_not_end_with_exported_code(page):
    "nbdev looks for what follows such a cell, and fails where nothing does."
    last = book.read(page)["cells"][-1]
    assert last["cell_type"] != "code" or "exports" not in book.directives(last)


def test_formatted():
    "ruff formats notebooks to the column of the site, tests to that of an editor."
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "nbs", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}\nrun: ruff format nbs tests"


def test_sizes_are_measured():
    "By hand: three functions, one of them inside another, and a page with two open lines."
    source = (
        'def a(x):\n    "What."\n    return x\n\n\ndef b():\n    def c():\n        return 1\n    return c\n'
    )
    assert sizes.functions(source) == [("a", 3, 34), ("b", 4, 51), ("c", 2, 25)]
    assert [row[:2] for row in sizes.without_docstring(source)] == [("a", 1), ("b", 3), ("c", 1)]
    assert sizes.spread(range(1, 12)) == (6, 10)
    cells = [("markdown", "# Two [words](page.ipynb)"), ("code", "#| exports\nx = 1\n\ny = 2")]
    cells += [
        ("code", "#| hide\nz = 3"),
        ("code", '#| code-fold: true\n#| fig-cap: "Three more words"\nz = 3'),
    ]
    page = {"cells": [dict(cell_type=kind, source=text) for kind, text in cells]}
    assert sizes.reading(page) == (5, 2)
    assert sizes.minutes(400, 60) == 4
    assert set(sizes.pages()) >= {"00a_pictures", "index"}
