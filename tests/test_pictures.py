"Pictures: reading against an independent decoder, fitting against float64 arithmetic, drawing, diagrams."

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import xml.etree.ElementTree as ET
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from retinanet_nb import pictures
from retinanet_nb.diagrams import Diagram
from retinanet_nb.pictures import (
    Fit,
    draw_caption,
    draw_detections,
    fit_to_canvas,
    label_color,
    read_header,
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


# --- one reader: header and pixels by one rule ------------------------------------------------------------------------

FLAG = np.zeros((40, 64, 3), np.uint8)  # nothing that is turned or mirrored looks the same
FLAG[:, :32], FLAG[:, 32:], FLAG[:10] = (220, 30, 40), (30, 60, 200), (40, 160, 80)
# how a picture must be stored, so that the orientation shows it upright
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)
MODES = dict(
    JPEG=("RGB", "L", "CMYK"),
    PNG=("RGB", "L", "P", "1", "LA", "RGBA"),
    WEBP=("RGB", "RGBA"),
    TIFF=("RGB", "L", "P", "1", "RGBA", "LA", "CMYK"),
    BMP=("RGB", "L", "P", "1"),
    GIF=("P", "L"),
)
# an appended video holds markers of its own
APPENDED = b"\0" * 100 + b"\xff\xd8\xff\xda\0\2" + b"x" * 50


def encode(image, kind, mode="RGB", orientation=None, how="exif", **options):
    "A picture file, its orientation noted in EXIF or in XMP."
    if kind == "WEBP":
        options["lossless"] = True
    if kind == "JPEG":
        options.update(quality=97, subsampling=0)
    if orientation is not None and how == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    elif orientation is not None and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    elif orientation is not None and kind == "TIFF":
        options["tiffinfo"] = ImageFileDirectory_v2()
        options["tiffinfo"][700] = XMP.format(orientation).encode()
        options["tiffinfo"].tagtype[700] = 1
    elif orientation is not None:
        options["xmp"] = XMP.format(orientation).encode()
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image))
    if mode in ("1", "P"):  # without dither, which depends on the direction
        picture = picture.convert("L").convert(mode, dither=Image.Dither.NONE)
    picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_header_and_pixels_agree(tmp_path, kind, mode):
    "Every format and colour mode × orientation in EXIF, in XMP, or none × bytes behind the picture."
    grey = mode in ("1", "P", "L", "LA")
    upright = np.asarray(Image.open(io.BytesIO(encode(FLAG, kind, mode))).convert("RGB")).astype(int)
    places = ("none", "exif", "xmp") if kind not in ("BMP", "GIF") else ("none",)
    for how in places:
        for orientation in (1,) if how == "none" else range(1, 9):
            note = None if how == "none" else orientation
            data = encode(STORED[orientation](FLAG), kind, mode, note, how)
            for extra in (b"", APPENDED):
                path = tmp_path / f"{how}-{orientation}-{len(extra)}.{kind.lower()}"
                path.write_bytes(data + extra)
                header, image = read_header(path), read_image(path)
                stored = STORED[orientation](FLAG).shape[:2]
                assert header == (40, 64, orientation, stored), path
                assert image.shape == (40, 64, 3) and image.flags.c_contiguous
                # four corners and every pixel between them
                assert abs(image - upright).max() <= (12 if kind == "JPEG" else 0), path
                assert grey or (image[0, 0, 1] > 100 and image[-1, 0, 0] > 150 and image[-1, -1, 2] > 150)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_both_refuse_the_same(tmp_path, kind):
    "Cut anywhere, with bytes before the header, or with the header damaged: one verdict, which names the file."
    noise = RNG.integers(0, 256, (40, 64, 3), dtype=np.uint8)  # no strip of equal pixels can be missed
    whole, path = encode(noise, kind, exif=Image.Exif()), tmp_path / "x.jpg"
    path.write_bytes(whole)
    assert read_header(path)[:2] == read_image(path).shape[:2] == (40, 64)
    bad = [whole[:length] for length in {1, 5, 11, 20, *range(30, len(whole) - 2, 211), len(whole) - 2}]
    bad += [b"\0\0" + whole, b"\xff\xd8" + whole[1:], b"\n" + whole]
    if kind == "GIF":  # its last byte is only a full stop
        bad = [data for data in bad if len(data) != len(whole) - 2]
    for data in bad:
        path.write_bytes(data)
        errors = []
        for read in (read_header, read_image):
            with pytest.raises(ValueError, match=r"x\.jpg") as error:
                read(path)
            errors.append(str(error.value))
        assert errors[0] == errors[1] and "\n" not in errors[0]
    # and whatever one byte is changed to, they are of one mind
    for place in range(2, min(len(whole), 400), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            size = read_header(path)[:2]
        except ValueError:
            with pytest.raises(ValueError, match=r"x\.jpg"):
                read_image(path)
            continue
        try:
            assert read_image(path).shape[:2] == size
        except ValueError as error:  # damage inside the coded pixels shows only on decoding
            assert "cannot be decoded" in str(error) and "x.jpg" in str(error)


def test_motion_photos(tmp_path):
    "A video behind the end marker, whatever it holds, and however it ends; and one behind a picture that is cut."
    whole = encode(FLAG, "JPEG")
    for tail in (b"ftypmp42" * 50, whole, whole[:-300], b"\xff\xda", b"\xff\xd9", b"\xff", b"\0"):
        (tmp_path / "x.jpg").write_bytes(whole + tail)
        assert read_header(tmp_path / "x.jpg") == (40, 64, 1, (40, 64))
        assert np.array_equal(read_image(tmp_path / "x.jpg"), read_image(tmp_path / "x.jpg"))
    (tmp_path / "x.jpg").write_bytes(whole[:-100] + b"ftypmp42" * 50)
    for read in (read_header, read_image):
        with pytest.raises(ValueError, match="cut short"):
            read(tmp_path / "x.jpg")
    # stray bytes between two blocks of the header do no harm to either
    end = 4 + int.from_bytes(whole[4:6], "big")  # of the first block
    (tmp_path / "x.jpg").write_bytes(whole[:end] + b"\0\0" + whole[end:] + b"\0")
    assert read_header(tmp_path / "x.jpg")[:2] == read_image(tmp_path / "x.jpg").shape[:2] == (40, 64)


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    data = encode(STORED[6](FLAG), "PNG", orientation=6)
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    (tmp_path / "x.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    assert read_header(tmp_path / "x.png") == (40, 64, 6, (64, 40))
    assert np.array_equal(read_image(tmp_path / "x.png"), FLAG)


def test_damaged_exif_means_upright(tmp_path):
    data = (
        encode(FLAG, "JPEG", orientation=6).replace(b"MM\0*", b"MM\xff\xff").replace(b"II*\0", b"II\xff\xff")
    )
    (tmp_path / "x.jpg").write_bytes(data)
    assert read_header(tmp_path / "x.jpg") == (40, 64, 1, (40, 64))
    assert read_image(tmp_path / "x.jpg").shape == FLAG.shape
    (tmp_path / "x.tif").write_bytes(encode(FLAG, "TIFF", orientation=9))
    assert read_header(tmp_path / "x.tif").orientation == 1


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_limit_on_pixels(tmp_path, kind, monkeypatch):
    path = tmp_path / "x.any"
    path.write_bytes(encode(FLAG, kind))
    for read in (read_header, read_image):
        with pytest.raises(ValueError, match=r"x\.any has 64×40 pixels.*RETINANET_MAX_PIXELS"):
            read(path, max_pixels=2559)
        read(path, max_pixels=2560)
    # Pillow's own limit, here far below ours, neither stops nor warns, and is what it was afterwards
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header(path)[:2] == read_image(path).shape[:2] == (40, 64)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_huge_picture_costs_nothing(tmp_path):
    "A PNG that says 30,000 × 30,000 is refused before a pixel is decoded."
    data = bytearray(encode(FLAG, "PNG"))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "x.png").write_bytes(data)
    tracemalloc.start()
    for read in (read_header, read_image):
        with pytest.raises(
            ValueError, match=r"30,000×30,000 pixels, which is 900 million.*limit of 300 million"
        ):
            read(tmp_path / "x.png")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_the_limit_can_be_raised_from_outside():
    def limit(text):
        code = "import retinanet_nb.pictures as p; print(p.MAX_PIXELS)"
        env = {**os.environ, "RETINANET_MAX_PIXELS": text}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert limit("12345").stdout.strip() == "12345"
    for bad in ("-3", "many", "0", "1e9"):
        assert "RETINANET_MAX_PIXELS must be a whole number" in limit(bad).stderr


def test_transparency_is_blended_in_strips(tmp_path, monkeypatch):
    "The result does not depend on the strips, and what they need is small beside it."
    rgba = RNG.integers(0, 256, (600, 700, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "x.png", compress_level=1)
    whole = read_image(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "_STRIP", 7000)
    read_image(tmp_path / "x.png")
    tracemalloc.start()
    strips = read_image(tmp_path / "x.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(whole, strips)
    file = (tmp_path / "x.png").stat().st_size
    assert peak < file + 1.5 * strips.nbytes  # the file, the result, and a few rows


# --- sixteen bits ------------------------------------------------------------------------------------------------------


def png16(image, color, extra=b""):
    "A PNG of 16 bits a channel, written by hand; `extra` are chunks before the pixels."

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    h, w = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    extra = b"".join(chunk(name, content) for name, content in extra) if extra else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(image, bits, photometric, data=None, **tags):
    "An uncompressed TIFF of one strip, written by hand; further tags as t274=6."
    h, w = image.shape[:2]
    channels = image.shape[2] if image.ndim == 3 else 1
    data = image.astype({8: "<u1", 16: "<u2", 32: "<f4"}.get(bits)).tobytes() if data is None else data
    data += b"\0" * (len(data) % 2)
    entries = {256: [w], 257: [h], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [8]}
    entries |= {277: [channels], 278: [h], 279: [len(data)]} | {int(k[1:]): [v] for k, v in tags.items()}
    table, beyond = b"", b""
    end = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        kind, letter = (4, "I") if tag in (256, 257, 273, 278, 279) else (3, "H")
        value = struct.pack(f"<{len(values)}{letter}", *values)
        if len(value) > 4:
            beyond, value = beyond + value, struct.pack("<I", end + len(beyond))
        table += struct.pack("<HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    start = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return start + struct.pack("<H", len(entries)) + table + b"\0" * 4 + beyond


def twelve_bits(image):
    "Numbers of 8 bits as packed numbers of 12."
    rows = []
    for row in image.reshape(len(image), -1).astype(int) * 16:
        bits = "".join(f"{x:012b}" for x in row)
        rows.append(int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big"))
    return b"".join(rows)


GREY_FLAG, OPAQUE = FLAG[..., 0], np.full((40, 64), 65535, np.uint16)
HALF = OPAQUE.copy()
HALF[20:] = 0
ON_WHITE = np.where(HALF[..., None] > 0, FLAG, 255)
DEEP = FLAG.astype(np.uint16)
SIXTEEN = {
    "png": (png16(DEEP * 257, 2), FLAG),
    "png grey": (png16(DEEP[..., 0] * 257, 0), GREY_FLAG[..., None]),
    "png alpha": (png16(np.dstack([DEEP * 257, HALF]), 6), ON_WHITE),
    "png grey alpha": (png16(np.dstack([DEEP[..., 0] * 257, HALF]), 4), ON_WHITE[..., :1]),
    "png transparent colour": (
        png16(DEEP * 257, 2, [(b"tRNS", struct.pack(">HHH", 220 * 257, 30 * 257, 40 * 257))]),
        np.where((FLAG == (220, 30, 40)).all(-1)[..., None], 255, FLAG),
    ),
    "png transparent grey": (
        png16(DEEP[..., 0] * 257, 0, [(b"tRNS", struct.pack(">H", 220 * 257))]),
        np.where(GREY_FLAG == 220, 255, GREY_FLAG)[..., None],
    ),
    "png of 12 bits that says so": (png16(DEEP * 16, 2, [(b"sBIT", b"\x0c" * 3)]), FLAG),
    "png of 12 bits, stretched": (png16(DEEP * 257, 2, [(b"sBIT", b"\x0c" * 3)]), FLAG),
    "png of 12 bits with alpha": (
        png16(np.dstack([DEEP * 16, HALF]), 6, [(b"sBIT", b"\x0c\x0c\x0c\x10")]),
        ON_WHITE,
    ),
    "tiff": (tiff(DEEP * 257, 16, 2), FLAG),
    "tiff grey": (tiff(DEEP[..., 0] * 257, 16, 1), GREY_FLAG[..., None]),
    "tiff zero is white": (tiff(65535 - DEEP[..., 0] * 257, 16, 0), GREY_FLAG[..., None]),
    "tiff 8 bits zero is white": (tiff(255 - GREY_FLAG, 8, 0), GREY_FLAG[..., None]),
    "tiff alpha": (tiff(np.dstack([DEEP * 257, HALF]), 16, 2, t338=2), ON_WHITE),
    "tiff of 12 bits": (tiff(DEEP[..., 0], 12, 1, twelve_bits(GREY_FLAG)), GREY_FLAG[..., None]),
    **{f"tiff orientation {o}": (tiff(STORED[o](DEEP) * 257, 16, 2, t274=o), FLAG) for o in range(2, 9)},
    **{
        f"tiff grey orientation {o}": (
            tiff(STORED[o](DEEP)[..., 0] * 257, 16, 1, t274=o),
            GREY_FLAG[..., None],
        )
        for o in (3, 6)
    },
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits(tmp_path, name):
    data, expected = SIXTEEN[name]
    (tmp_path / "x").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "x")
    assert read_header(tmp_path / "x")[:2] == image.shape[:2]
    assert abs(image.astype(int) - expected).max() <= (1 if "12" in name else 0)


@pytest.mark.parametrize(
    "bits, warned", [(8, True), (10, True), (12, True), (14, True), (15, False), (16, False)]
)
def test_nothing_becomes_black_without_a_word(tmp_path, bits, warned):
    "Numbers of fewer bits in a file of 16 that doesn't say so: by 65535, with a warning, once for each folder."
    most = (1 << bits) - 1
    deep = (FLAG.astype(np.uint32) * most // 220).clip(0, most)
    for name, data in (
        ("a.png", png16(deep, 2)),
        ("b.tif", tiff(deep, 16, 2)),
        ("c.tif", tiff(deep[..., 0], 16, 1)),
    ):
        (tmp_path / name).mkdir()
        for file in ("x", "y"):
            (tmp_path / name / file).write_bytes(data)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                image = read_image(tmp_path / name / file)
            assert abs(image[..., 0] - deep[..., 0] / 257).max() <= 0.51
            assert len(said) == (warned and file == "x")
            assert not said or f"{name}{os.sep}x has 16 bits, but no value above {most:,}" in str(
                said[0].message
            )
    (tmp_path / "black.png").write_bytes(png16(deep * 0, 2))  # black is black
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not read_image(tmp_path / "black.png").any()


def test_numbers_without_white_are_refused(tmp_path):
    for name, data, words in (
        ("float", tiff(GREY_FLAG, 32, 1, t339=3), "floating-point numbers.*8 or 16 bits"),
        ("floats", tiff(FLAG, 32, 2), "cannot be decoded"),
        ("planes", tiff(DEEP * 257, 16, 2, t284=2), "cannot be decoded"),
    ):
        (tmp_path / name).write_bytes(data)
        for read in (read_header, read_image):
            with pytest.raises(ValueError, match=f"{name} .*{words}"):
                read(tmp_path / name)
    Image.fromarray(FLAG[..., 0].astype(np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ValueError, match="32-bit integers"):
        read_header(tmp_path / "int.tif")


# --- names, permissions ----------------------------------------------------------------------------------------------


def test_names_that_are_no_utf8(tmp_path, picture):
    path = tmp_path / os.fsdecode(b"gr\xfc\xdfe.png")
    try:
        write_image(path, picture)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert os.fsencode(path.name) == b"gr\xfc\xdfe.png" and os.listdir(os.fsencode(tmp_path)) == [
        b"gr\xfc\xdfe.png"
    ]
    assert read_header(path)[:2] == read_image(path).shape[:2] == picture.shape[:2]
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError) as error:
        read_image(path)
    assert "gr\udcfc\udcdfe.png" in str(error.value)


def test_no_permission_is_not_no_picture(tmp_path, picture, monkeypatch):
    path = write_image(tmp_path / "x.png", picture)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    for read in (read_header, read_image):
        with pytest.raises(ValueError, match=r"x\.png cannot be opened: permission denied"):
            read(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # would wait for ever
    for read in (read_header, read_image):
        with pytest.raises(ValueError, match="pipe.png is no regular file"):
            read(tmp_path / "pipe.png")
        with pytest.raises(FileNotFoundError, match="there is no picture"):
            read(tmp_path / "pipe.png" / "x.png")
        with pytest.raises(ValueError, match="cannot be opened"):
            read(tmp_path / ("x" * 300 + ".png"))
        with pytest.raises(ValueError, match="directory"):
            read(tmp_path)


def test_the_users_limit_of_pillow_stays_in_threads(tmp_path, monkeypatch):
    "Many threads that lift Pillow's limit leave it as it was."
    (tmp_path / "x.webp").write_bytes(encode(FLAG, "WEBP"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: read_image(tmp_path / "x.webp").shape, range(60)))
    assert set(sizes) == {(40, 64, 3)} and Image.MAX_IMAGE_PIXELS == 100


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
