"""The instruments of page 12: their data are the package's, and in a real browser they say what the package says."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import book
from retinanet_nb.boxes import overlaps
from retinanet_nb.playground import (
    anchor_instrument,
    as_address,
    curve_instrument,
    focal_instrument,
    threshold_instrument,
    web_color,
)
from retinanet_nb.pictures import label_color

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
PICTURE = np.full((60, 80, 3), 200, np.uint8)
BOXES = np.array([[10, 10, 40, 40], [12, 12, 42, 42], [50, 20, 70, 50], [11, 11, 41, 41]], float)
SCORES, LABELS = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 0, 1, 1])


def data_of(instrument):
    "What the script gets, read back from the page."
    text = re.search(r"data = (\{.*?\});\n", instrument._repr_html_(), re.S)[1]
    return json.loads(text.replace("<\\/", "</"))


def said(tmp_path, instrument, script="", width=1000):
    "What the instrument's sentence says in a browser, after `script` has moved something; and what it measured."
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<body>{instrument._repr_html_()}<script>"
        "const move = (k, v) => { const i = document.querySelectorAll('input')[k]; i.value = v;"
        " i.dispatchEvent(new Event('input')); };"
        f"{script}; document.title = document.documentElement.scrollWidth;</script>",
        encoding="utf-8",
    )
    dom = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    sentence = re.search(r'<p aria-live="polite">(.*?)</p>', dom, re.S)
    assert sentence, dom[-2000:]
    return html.unescape(sentence[1]), int(re.search(r"<title>(\d+)</title>", dom)[1]), dom


def test_data_are_the_packages():
    data = data_of(threshold_instrument(PICTURE, BOXES, SCORES, LABELS, ("a", "</script>")))
    assert [c["box"] for c in data["candidates"]] == BOXES.tolist()
    assert [c["score"] for c in data["candidates"]] == SCORES.tolist() and data["names"] == ["a", "</script>"]
    assert data["colors"] == [web_color(0), web_color(1)] and (data["width"], data["height"]) == (80, 60)
    assert bytes.fromhex(web_color(3)[1:]) == bytes(label_color(3))
    assert data["picture"] == as_address(PICTURE)
    assert data_of(anchor_instrument(PICTURE, BOXES[:2], "ab"))["boxes"] == BOXES[:2].tolist()
    assert data_of(curve_instrument([True, False], 3)) == dict(right=[1, 0], objects=3, width=640, height=330)
    assert data_of(focal_instrument())["width"] == 640


@browser
def test_thresholds_in_a_browser(tmp_path):
    instrument = threshold_instrument(PICTURE, BOXES, SCORES, LABELS, ("a", "b"))
    assert np.asarray(overlaps(BOXES[:1], BOXES[1:2]))[0, 0] > 0.5
    assert (
        "4 of 4 candidates" in said(tmp_path, instrument)[0] and "3 of them" in said(tmp_path, instrument)[0]
    )
    # everything survives where nothing is suppressed; two have a score of 0.75
    assert "; 4 of them survive" in said(tmp_path, instrument, "move(1, 1)")[0]
    assert "2 of 4 candidates" in said(tmp_path, instrument, "move(0, 0.75)")[0]


@browser
def test_anchor_in_a_browser(tmp_path):
    "A square object is reached by a square anchor of its size, and not by one twice as large."
    instrument = anchor_instrument(PICTURE, [[4, 4, 36, 36]], ["square"])
    assert "reaches 1 of 1" in said(tmp_path, instrument, "move(0, 32); move(3, 3)")[0]
    assert "reaches 0 of 1" in said(tmp_path, instrument, "move(0, 64); move(3, 3)")[0]


@browser
def test_focal_loss_in_a_browser(tmp_path):
    "At γ = 0 and α = ½ the shares are those of cross entropy."
    text, _, _ = said(tmp_path, focal_instrument(), "move(0, 0); move(1, 0.5); move(2, 0.02)")
    background, objects = -100_000 * np.log(0.98), -100 * np.log(0.3)
    assert f"makes {100 * background / (background + objects):.0f} % of the loss" in text


@browser
def test_curve_in_a_browser(tmp_path):
    text, _, _ = said(tmp_path, curve_instrument([1, 0, 1, 0], 4), "move(0, 3)")
    assert "3 detections: 2 of 4" in text and "precision 0.67" in text
    assert f"so far {0.25 + 0.25 * 2 / 3:.3f}" in text


@browser
def test_on_a_telephone_and_by_keyboard(tmp_path):
    for instrument in (
        threshold_instrument(PICTURE, BOXES, SCORES, LABELS, "ab"),
        curve_instrument([1, 0], 2),
    ):
        _, width, dom = said(tmp_path, instrument, width=400)
        assert width <= 500  # Chromium's window is never narrower than that
        sliders = re.findall(r"<input[^>]*>", dom)
        assert sliders and all('aria-label="' in s and 'type="range"' in s for s in sliders)


@browser
def test_the_saved_page_says_what_the_package_says(tmp_path):
    "The first instrument, as it stands in the book, and the numbers printed below it."
    cells = book.read(book.ROOT / "nbs/12_playground.ipynb")["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    pages = ["".join(o["data"]["text/html"]) for o in outputs if "text/html" in o.get("data", {})]
    printed = "".join("".join(o["text"]) for o in outputs if "text" in o)
    passed, survive = re.search(r"(\d+) candidates pass 0.5, (\d+) survive", printed).groups()

    class Saved:
        def _repr_html_(self):
            return pages[0]

    text, _, _ = said(tmp_path, Saved())
    assert text.startswith(f"{passed} of ") and f"; {survive} of them survive" in text
