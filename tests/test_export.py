"""Exported detectors: each format run in its runtime gives what the detector gives; what can't be carried, a name that is
taken and files from elsewhere are one sentence, and nothing is written or lost."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'retinanet_nb[openvino,onnx,litert]'")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import onnx
from retinanet_nb import detections, export, retinanet_box as retinanet_box_module
from retinanet_nb.detections import EXPORTED
from retinanet_nb.export import (
    OPENERS,
    ExportedDetector,
    export_detector,
    exported_once,
    filter_arrays,
    load_exported,
)
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.retinanet_box import retinanet_box

from helpers import excite, noise, numpy, python, same_detections, small

H, W = 64, 96


@pytest.fixture(scope="module")
def detector():
    h = small(feature_size=16, image_size=(H, W), max_detections=20, pre_nms_top_k=100, score_threshold=0.1)
    model = retinanet_model(3, h, class_names=["ball", "brick", "leaf"])
    rng = np.random.default_rng(2)
    for w in model.weights:  # as after a training, or there would be nothing to fold
        if "moving_mean" in w.path or w.path.endswith("bn/beta"):
            w.assign(rng.normal(0, 0.2, w.shape))
        if "moving_variance" in w.path or w.path.endswith("bn/gamma"):
            w.assign(rng.uniform(0.5, 2, w.shape))
    excite(model, 3, feature_size=16)
    return retinanet_box(model)


@pytest.fixture(scope="module")
def pictures():
    return noise(3, (H, W))


@pytest.fixture(scope="module")
def files(detector, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for name, options in FILES.items():
        apart = export_detector(detector, folder / name, pictures=pictures, **options)
        assert max(apart.values()) < 1e-3, (name, apart)
    return folder


FILES = {
    "plain.onnx": {},
    "inside.onnx": {"suppression": "inside"},
    "free.onnx": {"batch": None, "size": None},
    "plain.xml": {},
    "inside.xml": {"suppression": "inside"},
    "free.xml": {"batch": None, "size": None},
    "plain.tflite": {},
    "two.tflite": {"batch": 2},
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_what_the_detector_gives(detector, files, pictures, name):
    exported = load_exported(files / name)
    assert exported.class_names == detector.class_names
    assert exported.hyperparameters == detector.hyperparameters
    ours = [numpy(x) for x in detector.predict_on_batch(pictures)]
    theirs = exported.predict_on_batch(pictures)  # three pictures through files for one, two or any number
    assert (ours[1] >= 0).sum() > 10, "too few detections to tell anything"
    for a, b, tolerance in zip(ours, theirs, (1e-3, 1e-4, 0)):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("name", ["free.onnx", "free.xml"])
def test_a_free_file_takes_any_size(detector, files, name):
    other = noise(1, (70, 130), 5)
    for a, b in zip(detector.predict_on_batch(other), load_exported(files / name).predict_on_batch(other)):
        np.testing.assert_allclose(numpy(a), b, atol=1e-3)


def test_a_canvas_of_any_sides(detector, tmp_path):
    "OpenVINO merges a padding of known width into the convolution behind it, and wrongly."
    size = (100, 130)
    pictures = noise(1, size, 7)
    apart = export_detector(detector, tmp_path / "odd.xml", size=size, pictures=pictures)
    assert max(apart.values()) < 1e-3, apart
    theirs = load_exported(tmp_path / "odd.xml").predict_on_batch(pictures)
    ours = [numpy(x) for x in detector.predict_on_batch(pictures)]
    assert (theirs[1] >= 0).sum() > 3
    same_detections(ours, theirs)


def test_detect_fits_to_the_canvas_of_the_file(detector, tmp_path):
    export_detector(detector, tmp_path / "x.onnx", size=(32, 64))
    exported = load_exported(tmp_path / "x.onnx")
    assert exported.hyperparameters.image_size == (32, 64)
    found = detections.detect(exported, noise(1, (H, W))[0], 0.1)
    assert len(found) and (found.boxes[:, 2] <= W).all() and (found.boxes[:, 2] > 64).any()


def test_no_batch_norm_is_left(detector, pictures, tmp_path):
    "A SavedModel keeps the graph as it was written, so what isn't in it is in no other file either."
    import tensorflow as tf

    assert any("bn/moving_variance" in w.path for w in detector.weights)
    export_detector(detector, tmp_path / "model")
    graph = (tmp_path / "model" / "saved_model.pb").read_bytes()
    assert b"_conv" in graph
    for word in (b"_bn", b"batchnorm", b"BatchNorm", b"moving_variance", b"Rsqrt"):
        assert word not in graph
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    answer = loaded.detect(tf.constant(pictures[:1]))
    ours = export._boxes_and_scores(detector).predict_on_batch(pictures[:1])
    for name, value in zip(("boxes", "scores"), ours):
        np.testing.assert_allclose(numpy(answer[name]), numpy(value), atol=1e-3)


def test_a_fixed_file_takes_one_size(files):
    with pytest.raises(ValueError, match=r"plain.onnx takes pictures of 96×64 pixels, not 50×40"):
        load_exported(files / "plain.onnx").predict_on_batch(np.zeros((1, 40, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="batch of pictures"):
        load_exported(files / "plain.onnx").predict_on_batch(np.zeros((40, 50, 3), np.uint8))


def test_either_name_opens_either_file(files, detector, pictures, tmp_path):
    detector.save(tmp_path / "x.keras")
    assert set(EXPORTED) == set(OPENERS)
    for module in (detections, retinanet_box_module):
        opened = module.load_detector(files / "plain.onnx")
        assert isinstance(opened, ExportedDetector)
        whole = module.load_detector(tmp_path / "x.keras", max_detections=7)
        assert whole.predict_on_batch(pictures)[0].shape == (3, 7, 4)
        found, wanted = module.detect(opened, pictures[0], 0.2), module.detect(detector, pictures[0], 0.2)
        assert found.names == wanted.names and len(found)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)


@pytest.mark.parametrize("file", ["plain.onnx", "plain.xml", "plain.tflite"])
def test_no_engine_is_needed(files, file):
    answer = python(
        f"""
import sys
import numpy as np
from retinanet_nb.detections import detect, load_detector
detector = load_detector({str(files / file)!r})
print(len(detect(detector, np.zeros(({H}, {W}, 3), np.uint8), score_threshold=0)))
print(detector.predict_on_batch(np.zeros((1, {H}, {W}, 3), np.uint8))[0].shape)
print({{"keras", "tensorflow", "jax", "torch"}} & set(sys.modules) or "no engine")
"""
    )
    assert "no engine" in str(answer)
    assert "(1, 20, 4)" in str(answer)


@pytest.mark.parametrize("suppression", ["inside", "outside"])
def test_candidates_level_by_level(detector, pictures, tmp_path, suppression):
    by_level = retinanet_box(
        detector.get_layer("retinanet"), pre_nms_top_k=3, top_k_per_level=True, max_detections=20
    )
    export_detector(by_level, tmp_path / "x.onnx", suppression=suppression, pictures=pictures)
    ours, theirs = (
        by_level.predict_on_batch(pictures),
        load_exported(tmp_path / "x.onnx").predict_on_batch(pictures),
    )
    assert (theirs[1][0] >= 0).sum() > 3  # more than one level would give
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(numpy(a), b, atol=1e-3)
    with pytest.raises(ValueError, match="size can't be free"):
        export_detector(by_level, tmp_path / "y.onnx", size=None)


@pytest.mark.parametrize("name", ["x.onnx", "x.xml"])
def test_classes_that_compete_inside_the_file(detector, pictures, tmp_path, name):
    one = retinanet_box(detector.get_layer("retinanet"), class_specific_filter=False, max_detections=20)
    export_detector(one, tmp_path / name, suppression="inside", pictures=pictures)
    ours, theirs = one.predict_on_batch(pictures), load_exported(tmp_path / name).predict_on_batch(pictures)
    assert (theirs[1] >= 0).sum() > 10
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(numpy(a), b, atol=1e-3)


def test_eight_bits(detector, pictures, tmp_path):
    export_detector(detector, tmp_path / "int8.onnx", precision="int8", pictures=pictures)
    exported = load_exported(tmp_path / "int8.onnx")
    assert exported.card.precision == "int8" and exported.class_names == detector.class_names
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node}
    assert "QuantizeLinear" in kinds
    scores = exported.predict_on_batch(pictures)[1]
    assert np.abs(scores[:, 0] - numpy(detector.predict_on_batch(pictures)[1])[:, 0]).max() < 0.2


def test_half_the_size(detector, files, pictures, tmp_path):
    export_detector(detector, tmp_path / "half.xml", precision="half", pictures=pictures)
    assert (tmp_path / "half.bin").stat().st_size < 0.6 * (files / "plain.bin").stat().st_size


def test_a_saved_model_names_its_outputs(detector, pictures, tmp_path):
    import tensorflow as tf

    export_detector(detector, tmp_path / "model", suppression="inside")
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert json.loads(loaded.card().numpy())["class_names"] == list(detector.class_names)
    answer = loaded.signatures["serving_default"](images=tf.constant(pictures[:1]))
    ours = dict(zip(("boxes", "scores", "labels"), detector.predict_on_batch(pictures[:1])))
    for name, value in ours.items():
        np.testing.assert_allclose(numpy(value), numpy(answer[name]), atol=1e-3)


@pytest.mark.parametrize("suppression", ["inside", "outside"])
def test_a_saved_model_is_run_before_it_is_handed_over(
    detector, pictures, tmp_path, monkeypatch, suppression
):
    write = export.WRITERS[""]
    far = export_detector(detector, tmp_path / "model", suppression=suppression, pictures=pictures)
    assert max(far.values()) < 1e-3

    def spoilt(function, *rest):
        write(function, *rest)
        import tensorflow as tf

        path, weights = rest[1], function.network.variables
        kept = [v.numpy() for v in weights]
        for v in weights:
            v.assign(v * 0.9)
        tf.io.gfile.rmtree(str(path))
        write(function, *rest)
        for v, w in zip(weights, kept):
            v.assign(w)

    monkeypatch.setitem(export.WRITERS, "", spoilt)
    with pytest.raises(ValueError, match="was not written: its boxes or scores differ"):
        export_detector(detector, tmp_path / "other", suppression=suppression, pictures=pictures)
    assert not (tmp_path / "other").exists()


REFUSED = {
    "a name": ("x.pt", {}, "should end in"),
    "a batch": ("x.tflite", {"batch": None}, "one size"),
    "a loop": ("x.tflite", {"suppression": "inside"}, "suppression outside"),
    "many at once": ("x.onnx", {"suppression": "inside", "batch": 4}, "batch must be 1"),
    "a word": ("x.onnx", {"suppression": "within"}, "inside or outside"),
    "a precision": ("x.xml", {"precision": "int4"}, "float32 or half"),
    "no pictures": ("x.onnx", {"precision": "int8"}, "int8 needs pictures"),
    "two in int8": (
        "x.onnx",
        {"precision": "int8", "batch": 2, "pictures": np.zeros((1, H, W, 3), np.uint8)},
        "one picture at a time: batch must be 1",
    ),
    "a batch of none": ("x.onnx", {"batch": 0}, "batch must be at least 1"),
    "a negative batch": ("x.xml", {"batch": -3}, "batch must be at least 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_cannot_carry(detector, tmp_path, what):
    name, options, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        export_detector(detector, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_detector_that_does_not_suppress(detector, tmp_path):
    every = retinanet_box(detector.get_layer("retinanet"), nms=False)
    with pytest.raises(ValueError, match="suppression must be outside"):
        export_detector(every, tmp_path / "x.onnx", suppression="inside")
    assert not list(tmp_path.iterdir())


def test_an_exported_file_is_not_exported_again(files, tmp_path, capsys):
    from retinanet_nb import cli

    with pytest.raises(ValueError, match="plain.onnx is exported already"):
        export_detector(load_exported(files / "plain.onnx"), tmp_path / "x.onnx")
    with pytest.raises(SystemExit):
        cli.retinanet_export(str(files / "plain.onnx"), out=str(tmp_path / "x.onnx"))
    assert "plain.onnx is exported already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_exporting_needs_tensorflow(detector, tmp_path, monkeypatch):
    from retinanet_nb.engine import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="exporting needs TensorFlow"):
        export_detector(detector, tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["x.onnx", "x.xml", "x.tflite", "x"])
def test_no_file_of_anybody_is_replaced(detector, tmp_path, name):
    beside = {"x.xml": "x.bin", "x.tflite": "x.tflite.json"}.get(name, name)
    (tmp_path / beside).write_text("mine")
    for attempt in (
        lambda: export.check_target(tmp_path / name),
        lambda: export_detector(detector, tmp_path / name),
    ):
        with pytest.raises(FileExistsError, match="exists"):
            attempt()
    assert [p.name for p in tmp_path.iterdir()] == [beside] and (tmp_path / beside).read_text() == "mine"


def test_another_result_is_not_handed_over(detector, pictures, tmp_path, monkeypatch):
    "The check compares; here with a file whose scores are half of what they were."
    plain = export.OPENERS[".onnx"]

    def halved(path, precision):
        opened = plain(path, precision)
        return opened._replace(run=lambda images: [a / (1 + k) for k, a in enumerate(opened.run(images))])

    monkeypatch.setitem(export.OPENERS, ".onnx", halved)
    with pytest.raises(ValueError, match="was not written: its boxes or scores differ"):
        export_detector(detector, tmp_path / "x.onnx", pictures=pictures)
    assert not list(tmp_path.iterdir())


def doctored(files, tmp_path, change):
    model = onnx.load(str(files / "plain.onnx"))
    entry = model.metadata_props[0]
    values = json.loads(entry.value)
    change(values)
    entry.value = json.dumps(values)
    onnx.save(model, str(tmp_path / "doctored.onnx"))
    return tmp_path / "doctored.onnx"


DOCTORED = {
    "names": lambda v: v.pop("class_names"),
    "a size": lambda v: v["hyperparameters"].update(image_size=[10**9, 10**9]),
    "a field": lambda v: v["hyperparameters"].update(backbone=7),
    "a threshold": lambda v: v["options"].update(max_detections=-1),
    "an option": lambda v: v["options"].update(exec="rm"),
    "more": lambda v: v.update(more=1),
    "a version": lambda v: v.update(format_version=99),
    "none": lambda v: v.clear(),
}


@pytest.mark.parametrize("what", DOCTORED)
def test_what_a_file_says_of_itself_is_checked(files, tmp_path, what):
    path = doctored(files, tmp_path, DOCTORED[what])
    with pytest.raises(ValueError) as error:
        load_exported(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.onnx", "x.xml", "x.tflite"])
@pytest.mark.parametrize(
    "content", [b"", b"nothing of the kind", b"<?xml version='1.0'?><net/>", b"\x08\x01" * 99]
)
def test_files_from_elsewhere(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_exported(tmp_path / name)
    assert name in str(error.value)


def test_only_openvino_is_told_a_precision(files):
    assert load_exported(files / "plain.xml", "bfloat16").class_names
    for name, precision in (("plain.onnx", "bfloat16"), ("plain.tflite", "half"), ("plain.xml", "int4")):
        with pytest.raises(ValueError, match=f"{name} can be computed in float32"):
            load_exported(files / name, precision)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no exported detector"):
        load_exported(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="should end in"):
        load_exported(tmp_path / "x.pt")


def test_a_runtime_that_is_missing(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"retinanet_nb\[onnx\]"):
        ExportedDetector(files / "plain.onnx")


@pytest.mark.parametrize("seed", range(4))
def test_the_filter_equals_the_one_in_the_graph(seed):
    from retinanet_nb.filtering import filter_detections

    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (400, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 30, (400, 2))], 1).astype("float32")
    scores = rng.choice([0.04, 0.05, 0.3, 0.31, 0.9], (400, 3)).astype("float32")  # many are equal
    options = {
        "class_specific_filter": bool(seed % 2),
        "nms": seed < 3,
        "max_detections": 50,
        "pre_nms_top_k": 150,
    }
    for a, b in zip(
        filter_detections(boxes[None], scores[None], **options), filter_arrays(boxes, scores, **options)
    ):
        np.testing.assert_array_equal(numpy(a)[0], b)


def test_the_command(detector, pictures, tmp_path, capsys):
    from retinanet_nb import cli
    from retinanet_nb.pictures import write_image

    detector.save(tmp_path / "street.keras")
    (tmp_path / "album").mkdir()
    for k, picture in enumerate(pictures):
        write_image(tmp_path / "album" / f"{k}.png", picture)
    cli.retinanet_export(str(tmp_path / "street.keras"), sample=str(tmp_path / "album"))
    assert "street.onnx" in capsys.readouterr().out
    cli.retinanet_export(str(tmp_path / "street.keras"), format="openvino", free_size=True, batch=0)
    cli.retinanet_detect(str(tmp_path / "street.onnx"), [str(tmp_path / "album")], str(tmp_path / "a"), 0.2)
    cli.retinanet_detect(str(tmp_path / "street.keras"), [str(tmp_path / "album")], str(tmp_path / "b"), 0.2)
    exported, original = (json.loads((tmp_path / k / "detections.json").read_text()) for k in "ab")
    assert str(exported) != "{}" and len(str(exported)) > 300
    for a, b in zip(_numbers(exported), _numbers(original), strict=True):
        assert abs(a - b) < 1e-2


def _numbers(value):
    "All numbers in a JSON value, in order."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "torch"}, "--format must be onnx"),
        ({"format": "onnx", "out": "x.xml"}, "should end in .onnx"),
        ({"out": "x.pt"}, "should end in"),
        ({"format": "litert", "batch": 0}, "one size"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, monkeypatch, options, said):
    from retinanet_nb import cli

    monkeypatch.chdir(tmp_path)
    options = {"out": "x", **options}
    with pytest.raises((SystemExit, ValueError)) as error:
        cli.retinanet_export("shapes", **options)
    assert said in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_are_compared_before_the_filter():
    "A box that one filter keeps and the other drops by rounding is no difference of 20 pixels."
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]])
    scores = np.array([[0.9, 0.1], [0.04, 0.0]])
    moved = boxes + [[0.5], [7]]  # the second is below the threshold
    assert np.allclose(export._numbers_apart((boxes, scores), (moved, scores + 0.003), 0.05), (0.5, 0.003))
    assert export._numbers_apart((boxes, scores), (moved, scores + 0.02), 0.05)[0] == 7


def test_a_detector_is_compiled_once(detector, monkeypatch, tmp_path):
    "Kept in the cache folder under its checksum, and never beside the file; another detector gets a file of its own."
    from retinanet_nb import export, retinanet_box

    made, said = [], []
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: detector)
    monkeypatch.setattr(
        export, "export_detector", lambda d, path, replace: (made.append(path), path.touch(), {})
    )
    model = tmp_path / "models" / "cells.keras"
    model.parent.mkdir()
    model.write_bytes(b"one")
    first = exported_once(model, say=said.append)
    assert exported_once(model, say=said.append) == first and len(made) == len(said) == 1
    assert first.is_relative_to(tmp_path / "cache") and str(first) in said[0]
    model.write_bytes(b"another")
    assert exported_once(model, say=said.append) != first and len(made) == 2
    assert [p.name for p in model.parent.iterdir()] == ["cells.keras"]


def test_two_processes_compile_once(monkeypatch, tmp_path):
    "While one waits for the folder, the other has made the file; nothing is made again, nor said."
    from contextlib import contextmanager

    from retinanet_nb import export, retinanet_box

    @contextmanager
    def locked(folder, patience):
        assert patience > 60
        folder.mkdir(parents=True)
        for path in expected:
            path.touch()
        yield folder

    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: None)
    monkeypatch.setattr(export, "export_detector", lambda d, path, replace: expected.append(path))
    model = tmp_path / "cells.keras"
    model.write_bytes(b"one")
    expected, said = [], []
    made = exported_once(model, say=said.append)  # as if alone, to learn the name
    monkeypatch.setattr(export, "locked", locked)
    (tmp_path / "cache" / "openvino").rename(tmp_path / "before")
    assert exported_once(model, say=said.append) == made and made.is_file()
    assert expected == [made] and len(said) == 1


def test_the_second_waits_for_the_first(monkeypatch, tmp_path):
    import time
    from concurrent.futures import ThreadPoolExecutor

    from retinanet_nb import export, retinanet_box

    def slow(detector, path, replace):
        made.append(path)
        time.sleep(0.3)
        path.touch()

    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: None)
    monkeypatch.setattr(export, "export_detector", slow)
    (tmp_path / "cells.keras").write_bytes(b"one")
    made, say = [], lambda text: None
    with ThreadPoolExecutor(2) as pool:
        given = [pool.submit(exported_once, tmp_path / "cells.keras", say) for _ in range(2)]
    assert [future.result() for future in given] == made * 2


def test_where_an_export_goes():
    from retinanet_nb.cli_detect import _export_target

    target = lambda *words: str(_export_target(*words))
    assert target("runs/street.v1.keras", None, None) == "runs/street.v1.onnx"
    assert target("street.v1.keras", None, "openvino") == "street.v1.xml"
    assert target("street.v1.keras", None, "saved_model") == "street.v1"
    assert target("photos", "x", "litert") == "x.tflite" and target("photos", "x.xml", None) == "x.xml"
    assert target("photos", None, None) == "photos.onnx"


def test_what_the_engine_of_a_command_may_be(capsys, tmp_path):
    from retinanet_nb.cli_detect import retinanet_detect

    for model, engine, words in (
        ("x.keras", "torch", "must be openvino"),
        ("x.onnx", "openvino", "another runtime"),
    ):
        with pytest.raises(SystemExit):
            retinanet_detect(str(tmp_path / model), ["photo.jpg"], engine=engine)
        assert words in capsys.readouterr().err
