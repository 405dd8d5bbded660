"Pictures: reading against an independent decoder, fitting against float64 arithmetic, drawing, diagrams."

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from retinanet_nb import pictures
from retinanet_nb.diagrams import Diagram
from retinanet_nb.pictures import (
    Fit,
    draw_caption,
    draw_detections,
    fit_to_canvas,
    label_color,
    read_image,
    show,
    show_grid,
    write_image,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def picture():
    "A smooth picture without any symmetry."
    ys, xs = np.mgrid[:37, :53]
    return np.stack([xs * 4, ys * 6, 200 - xs - ys], axis=-1).astype(np.uint8)


def test_import_is_light():
    "Neither TensorFlow nor keras nor matplotlib is loaded by an import."
    code = "import sys, retinanet_nb.pictures, retinanet_nb.shapes; print([m for m in ('tensorflow', 'keras', 'jax', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "png"),
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("RGB", "bmp"),
        ("RGB", "tiff"),
        ("L", "tiff"),
    ],
)
def test_lossless_modes_agree_with_pillow(tmp_path, picture, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(picture).convert(mode).save(path)
    assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix, mode", [("jpg", "RGB"), ("jpg", "L"), ("png", "RGB"), ("png", "RGBA")])
def test_exif(tmp_path, picture, orientation, suffix, mode):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).convert(mode).save(
        path, exif=exif, **({"quality": 97, "subsampling": 0} if suffix == "jpg" else {})
    )
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    got = read_image(path)
    assert got.shape == expected.shape and got.flags.c_contiguous
    assert abs(got - expected).max() <= (4 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits(tmp_path, picture, suffix):
    path = tmp_path / f"x.{suffix}"
    cv2.imwrite(str(path), picture[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(read_image(path), picture)


def test_transparency_shows_white(tmp_path, picture):
    alpha = RNG.integers(0, 256, (*picture.shape[:2], 1))
    Image.fromarray(np.concatenate([picture, alpha.astype(np.uint8)], axis=2)).save(tmp_path / "x.png")
    expected = picture * (alpha / 255) + 255 * (1 - alpha / 255)
    assert abs(read_image(tmp_path / "x.png") - expected).max() < 0.51
    indexed = Image.fromarray(picture).quantize(8)
    indexed.save(tmp_path / "p.png", transparency=3)  # one colour of the palette is transparent
    hidden = np.asarray(indexed) == 3
    assert hidden.any() and (read_image(tmp_path / "p.png")[hidden] == 255).all()


@pytest.mark.parametrize(
    "options", [dict(format="JPEG"), dict(format="JPEG", progressive=True), dict(format="PNG")]
)
def test_every_truncation_is_refused(tmp_path, picture, options):
    path = tmp_path / "x.jpg"
    Image.fromarray(picture).save(path, **options)
    whole = path.read_bytes()
    read_image(path)
    for length in sorted({1, 2, 3, 10, *range(20, len(whole) - 1, 97), len(whole) - 9, len(whole) - 2}):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.jpg"):
            read_image(path)


def test_truncated_behind_a_thumbnail(tmp_path, picture):
    "A thumbnail's end marker in the header is not the picture's."
    Image.fromarray(picture).save(tmp_path / "thumb.jpg")
    thumb = (tmp_path / "thumb.jpg").read_bytes()
    block = b"\xff\xe1" + (len(thumb) + 2).to_bytes(2, "big") + thumb
    data = thumb[:2] + block + thumb[2:]
    (tmp_path / "x.jpg").write_bytes(data)
    assert read_image(tmp_path / "x.jpg").shape == picture.shape
    (tmp_path / "x.jpg").write_bytes(data[:-40])
    with pytest.raises(ValueError, match="cut short"):
        read_image(tmp_path / "x.jpg")


def test_bytes_behind_the_end_are_fine(tmp_path, picture):
    "Phones append video and depth maps."
    path = write_image(tmp_path / "x.jpg", picture)
    expected = read_image(path)
    path.write_bytes(path.read_bytes() + b"\0" * 1000)
    assert np.array_equal(read_image(path), expected)


def test_read_errors(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("hello")
    for path, error, words in (
        (tmp_path / "none.jpg", FileNotFoundError, "no picture"),
        (tmp_path, ValueError, "directory"),
        (tmp_path / "empty.jpg", ValueError, "empty"),
        (tmp_path / "text.png", ValueError, "not a picture"),
    ):
        with pytest.raises(error) as e:
            read_image(path)
        assert words in str(e.value) and path.name in str(e.value) and "\n" not in str(e.value)


def test_write_is_atomic(tmp_path, picture, monkeypatch):
    path = write_image(tmp_path / "a" / "x.png", picture)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError):
        write_image(path, 255 - picture)
    assert np.array_equal(read_image(path), picture)


@pytest.mark.parametrize(
    "size, canvas",
    [
        ((333, 500), (512, 512)),
        ((500, 333), (160, 240)),
        ((7, 1900), (160, 160)),
        ((1, 1), (64, 32)),
        ((5, 3000), (32, 32)),
        ((240, 320), (240, 320)),
    ],
)
def test_fit(size, canvas):
    image = np.full((*size, 3), 9, np.uint8)
    out, fit = fit_to_canvas(image, canvas)
    scale = min(np.float64(canvas[0]) / size[0], np.float64(canvas[1]) / size[1])
    assert out.shape == (*canvas, 3) and out.dtype == np.uint8 and fit == Fit(scale, size, canvas)
    filled = (out == 9).all(-1)
    h, w = filled.any(1).sum(), filled.any(0).sum()
    assert filled.sum() == h * w and filled[:h, :w].all() and not out[~filled].any()
    assert abs(h - max(1, size[0] * scale)) <= 0.51 and abs(w - max(1, size[1] * scale)) <= 0.51
    boxes = np.sort(RNG.random((100, 2, 2)) * size[::-1], axis=1).reshape(-1, 4)
    assert abs(fit.to_canvas(boxes) - boxes * scale).max() < 1e-3
    assert abs(fit.to_image(fit.to_canvas(boxes)) - boxes).max() < 2e-3
    assert fit.to_image(np.zeros((2, 0, 4))).shape == (2, 0, 4)


def test_content_and_boxes_agree():
    "Edges of a bright block, found to a part of a pixel by its brightness, lie where to_canvas says."
    for h, w, size in ((333, 500, (160, 160)), (97, 203, (512, 512)), (480, 360, (129, 417))):
        image = np.zeros((h, w, 3), np.uint8)
        box = np.array([w // 3, h // 4, w - 15, h - 12])
        image[box[1] : box[3], box[0] : box[2]] = 240
        canvas, fit = fit_to_canvas(image, size)
        row, column = canvas.max(0)[:, 0] / 240, canvas.max(1)[:, 0] / 240
        x1, y1, x2, y2 = fit.to_canvas(box)
        assert abs(row.sum() - (x2 - x1)) < 0.15 and abs(column.sum() - (y2 - y1)) < 0.15
        assert abs((row * (np.arange(size[1]) + 0.5)).sum() / row.sum() - (x1 + x2) / 2) < 0.1
        assert abs((column * (np.arange(size[0]) + 0.5)).sum() / column.sum() - (y1 + y2) / 2) < 0.1


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_fit_refuses(bad):
    with pytest.raises(ValueError, match="shape"):
        fit_to_canvas(bad, (32, 32))


def test_colors():
    colors = [label_color(i) for i in range(200)]
    assert len(set(colors)) == 200 and all(
        0 <= c <= 255 and isinstance(c, int) for color in colors for c in color
    )
    gaps = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(colors[:20]) for b in colors[:i]]
    assert min(gaps) > 25
    assert label_color(np.int32(5)) == colors[5] and label_color(-1) == label_color(-2) != colors[0]


def test_captions_stay_inside_and_readable():
    for size in ((40, 40), (160, 160), (700, 900)):
        for box in (
            (-50, -50, 5, 5),
            (size[1] - 2, size[0] - 2, size[1] + 90, size[0] + 90),
            (0, 0, *size[::-1]),
            (size[1] - 1, 0, size[1], 4),
        ):
            for label in range(12):
                image = np.full((*size, 3), 127, np.uint8)
                draw_caption(image, box, "brick 0.55", label_color(label))
                ys, xs = np.nonzero((image != 127).any(-1))
                patch = image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].reshape(-1, 3)
                assert (patch == label_color(label)).all(1).mean() > 0.3  # the label is there, whole
                luminance = patch @ np.array([0.299, 0.587, 0.114])
                assert (
                    abs(luminance - np.dot(label_color(label), (0.299, 0.587, 0.114))).max() > 100
                )  # and letters that stand out


def test_detections_are_drawn_on_a_copy():
    image = np.full((100, 120, 3), 50, np.uint8)
    boxes = np.array([[10, 40, 60, 90], [70, 40, 110, 90], [-1, -1, -1, -1]], np.float32)
    out = draw_detections(image, boxes, np.array([0.9, 0.4, -1]), np.array([1, 2, -1]), ("a", "b", "c"))
    assert (image == 50).all() and tuple(out[89, 30]) == label_color(1) and (out[:, 66:] == 50).all()
    both = draw_detections(image, boxes, np.array([0.9, 0.4, -1]), np.array([1, 2, -1]), score_threshold=0.3)
    assert tuple(both[89, 90]) == label_color(2)
    truth = draw_detections(image, boxes[:2], None, [1, 2], ("a", "b", "c"))
    assert tuple(truth[89, 90]) == label_color(2)
    draw_detections(image[:, ::-1], boxes[:2], None, [1, 2])  # a view with negative strides


def test_show_places_edges_on_whole_numbers():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = show(np.zeros((30, 40, 3), np.uint8), title="t")
    assert tuple(ax.get_images()[0].get_extent()) == (0, 40, 30, 0) and ax.get_title() == "t"
    assert len(show_grid([np.zeros((30, 40), np.uint8)] * 5, columns=2).axes) == 6
    show(np.full((5, 5, 3), 254.6))
    plt.close("all")
    pictures.book_style()


def test_diagram_is_xml():
    svg = (
        Diagram(300, 200, title='<&"')
        .box(1, 2, 30, 40, "<a>\n& b")
        .arrow(0, 0, 30, 40, text="x<y")
        .text(5, 5, "é → &")
        .line(0, 0, 1, 1)
        .svg()
    )
    ns, root = "{http://www.w3.org/2000/svg}", ET.fromstring(svg)
    assert root.get("viewBox") == "0 0 300 200" and root.find(ns + "title").text == '<&"'
    assert [t.text for t in root.iter(ns + "text")] == ["<a>", "& b", "x<y", "é → &"]
    points = [tuple(map(float, p.split(","))) for p in root.find(ns + "polygon").get("points").split()]
    assert points[0] == (30, 40)
    back = np.mean(points[1:], axis=0)  # the middle of the head's base lies on the way, before the point
    assert np.allclose(np.cross([*back, 0], [30, 40, 0]), 0, atol=5) and np.hypot(*back) < 50
    assert "0x" not in repr(Diagram(1, 1))
