"""The site around the chapters: reference, citations, Colab, pictures, contrast; what can be seen of it without Quarto."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import book
import website

ROOT = book.ROOT


def faults_of(tmp_path, *texts, name="99_faults.ipynb"):
    "What `website.check_page` says about a page of these markdown texts."
    cells = [
        {"cell_type": "markdown", "id": f"c{k}", "metadata": {}, "source": t} for k, t in enumerate(texts)
    ]
    path = tmp_path / name
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return website.check_page(path)


def test_the_site_has_no_faults():
    problems = website.check()
    assert not problems, "\n".join(problems)


def test_figures_must_be_mentioned(tmp_path):
    cells = [
        {
            "cell_type": "markdown",
            "id": "a",
            "metadata": {},
            "source": "Look at @fig-x-seen, not at `@fig-x-code`.",
        },
        *(
            {
                "cell_type": "code",
                "id": n,
                "metadata": {},
                "outputs": [],
                "source": f"#| label: fig-x-{n}\ndraw()",
            }
            for n in ("seen", "code")
        ),
    ]
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert website.check_figures(path) == ["fig-x-code is mentioned nowhere in the text"]


def test_faults_are_found(tmp_path):
    found = "\n".join(
        faults_of(
            tmp_path,
            "# 99 Faults\n> None.",
            "## One\n\n#### Three\n\n| | a |\n|---|---|\n| b | c |",
            "![x](https://example.org/a.png) and [a link](https://example.org), which only a reader follows",
            '<script src="//example.org/a.js"></script>',
        )
    )
    for expected in ("'Three' is of level 4", "column has no name", "org/a.png", "org/a.js"):
        assert expected in found, found
    assert found.count("another host") == 2
    assert not faults_of(
        tmp_path, "# 99 Fine\n> None.", "## One\n\n### Two\n\n## Three\n\n| a | b |\n|:--|--:|\n| | c |"
    )
    heavy = faults_of(tmp_path, "# 99 Heavy\n> None.", random.Random(0).randbytes(website.HEAVIEST).hex())
    assert len(heavy) == 1 and "weighs" in heavy[0]


def small_copy(to):
    "The pages' folder without the pages, but one; enough for the checks of single files."
    nbs = to / "nbs"
    nbs.mkdir(parents=True)
    for name in ("references.bib", "00_detection.ipynb"):
        shutil.copy(ROOT / "nbs" / name, nbs)
    return to


def test_citations_are_held_to_their_entries(tmp_path):
    copied = small_copy(tmp_path)
    page = copied / "nbs/00_detection.ipynb"
    page.write_text(page.read_text().replace("@lin2017focal", "@lin2099local"))
    problems = website.check_citations(copied)
    assert "00_detection.ipynb: @lin2099local is not in references.bib" in problems
    assert "references.bib: lin2017focal is cited nowhere" in problems
    bib = copied / "nbs/references.bib"
    bib.write_text(bib.read_text() * 2)
    assert "references.bib: lin2017focal stands twice" in website.check_citations(copied)


def test_reference_holds_every_public_name():
    "Counted another way: by importing nothing but the text of each module's `__all__`."
    text = "\n".join(website.reference())
    listed = re.findall(r"^- \[(\w+)\]\(([\w./]+)(?:#([\w.-]+))?\)", text, re.M)
    wanted = []
    for path in (ROOT / "retinanet_nb").glob("*.py"):
        block = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.M | re.S)
        wanted += re.findall(r"'(\w+)'", block[1]) if block else []
    assert sorted(name for name, _, _ in listed) == sorted(wanted) and len(wanted) > 250
    for name, page, anchor in listed:
        if anchor:
            known = book.anchors(ROOT / "nbs" / page)
            assert anchor in known, f"{name}: {page} has no {anchor}"
    silent = [line for line in text.splitlines() if re.match(r"- \[[a-z]", line) and "): " not in line]
    assert not silent, silent


class Shell:
    "What a notebook calls `get_ipython()`."

    def __init__(self, where):
        self.where, self.called = where, []

    def __str__(self):
        return f"<{self.where} object>"

    def system(self, command):
        self.called.append(command)


def test_colab_cell_installs_there_and_nowhere_else(monkeypatch):
    text = website.colab_cell()
    for where, expected in (("google.colab._shell.Shell", 1), ("ipykernel.zmqshell.ZMQInteractiveShell", 0)):
        shell = Shell(where)
        exec(compile(text, "cell", "exec"), {"get_ipython": lambda: shell})
        assert len(shell.called) == expected
        assert all("git+https://github.com/retinanet-nb/retinanet_nb" in c for c in shell.called)


def test_colab_addresses_lead_to_the_notebooks():
    pages = [p for p in book.notebooks() if website.runs_in_colab(p)]
    assert len(pages) > 30
    for page in pages:
        address = website.colab_address(page)
        found = re.fullmatch(
            r"https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/(.+)", address
        )
        assert found[1] == "retinanet-nb/retinanet_nb" and (ROOT / found[2]).samefile(page)


def test_signatures_are_mended():
    tree = __import__("ast").parse("class Curve:\n    hits: np.ndarray\n    objects: int = 0\n")
    text = "### Curve\n\n```python\ndef Curve(\n    *args, **kwargs\n):\n```\n\n*Words.*"
    assert "Curve(\n    hits: np.ndarray,\n    objects: int = 0,\n)" in website.mend_signature(text, [tree])
    assert website.mend_signature(text, []) == "### Curve\n\n\n*Words.*"
    text = "def go(\n    data:str <a folder, or a file>=None,\n    out:str=None, # where\n):"
    assert website.mend_signature(text, []).splitlines()[1:3] == [
        "    data: str=None, # a folder, or a file",
        "    out:str=None, # where",
    ]
    assert "version='0.1', # show it and end" in website.mend_signature(
        "    version:<show it and end>='0.1'", []
    )


def test_pictures_of_the_site():
    assert (ROOT / "nbs/favicon.svg").read_text(encoding="utf-8") == website.favicon()
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert set(config["project"]["resources"]) == {"card.png", "favicon.svg"}
    site = config["website"]
    for image in (site["image"], site["open-graph"]["image"], site["twitter-card"]["image"]):
        assert image == "/card.png"
    path = ROOT / "nbs/card.png"
    with Image.open(path) as image:
        assert image.size == (1200, 630) and image.format == "PNG"
        kept = np.asarray(image.convert("RGB"), np.float32)
    assert path.stat().st_size < 300_000
    drawn = website.card().astype(np.float32)
    assert np.abs(drawn - kept).mean() < 4, "draw it again: python tests/website.py pictures"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_what_scrolls_is_within_reach_of_the_keyboard(tmp_path):
    "In a real browser, at 400 pixels, with the site's own style and script."
    page = tmp_path / "here.html"
    long = "x" * 200
    page.write_text(
        f"<!doctype html><style>{(ROOT / 'nbs/styles.css').read_text()}</style><main class='content'>"
        f"<table id='wide'><tr><td><div style='width: 900px'>{long}</div></td></tr></table>"
        "<table id='narrow'><tr><td>x</td></tr></table>"
        "<p id='sum'><math display='block'><mrow>" + "<mi>x</mi><mo>+</mo>" * 90 + "</mrow></math></p>"
        f"<p id='words'>{long}</p><h2 id='head'>{long}</h2></main>"
        "<nav class='navbar'><a class='nav-link active' href='other.html'>a</a>"
        "<a class='nav-link' href='here.html'>b</a></nav>"
        f"{(ROOT / 'nbs/after-body.html').read_text()}"
        "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>",
        encoding="utf-8",
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run(
        [*command, "--window-size=500,900", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    width, window = map(int, re.search(r"<title>(\d+) of (\d+)", dom).groups())
    assert width <= window, "the page itself scrolls sideways"
    opening = {
        name: re.search(rf"<\w+ id=\"{name}\"[^>]*>", dom)[0] for name in ("wide", "narrow", "sum", "words")
    }
    assert "tabindex" in opening["wide"] and "tabindex" in opening["sum"]
    assert "tabindex" not in opening["narrow"] and "tabindex" not in opening["words"]
    assert re.search(r"class=\"nav-link active\" href=\"here.html\"", dom)
    assert not re.search(r"class=\"nav-link active\" href=\"other.html\"", dom)


def test_contrast_is_measured_as_wcag_does():
    assert website.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert website.contrast("#777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    found = website.contrasts(
        "a, b { color: #777; } /* c { color: #fff } */ body.quarto-dark a { color: #fff; }"
    )
    assert set(found) == {("light", "a"), ("light", "b"), ("dark", "a"), ("dark", "b")}
    assert found["light", "a"] < 4.5 < found["dark", "a"] and found["dark", "b"] < 4.5


def test_text_stands_out_from_its_ground():
    found = website.contrasts((ROOT / "nbs/styles.css").read_text(encoding="utf-8"))
    weak = {k: round(v, 2) for k, v in found.items() if v < 4.5}
    assert not weak, weak
    for text in (
        "figcaption",
        "#title-block-header .description",
        "a code:not(.sourceCode)",
        ".breadcrumb-item a",
    ):
        assert {theme for theme, selector in found if selector.endswith(text)} == {"light", "dark"}, text
