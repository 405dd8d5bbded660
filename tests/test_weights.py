"""Weights trained elsewhere (chapter 3.4): the networks of others against ours, and hostile files."""

import functools
import hashlib
import http.server
import importlib.util
import os
import pickle
import threading
import time
import zipfile

import keras
import numpy as np
import pytest
import torchvision_reference as reference
from helpers import numpy, python

from retinanet_nb import torch_files, weights
from retinanet_nb.anchors import anchors_for_shape
from retinanet_nb.retinanet import model_card, retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box
from retinanet_nb.weights import COCO_CLASSES, read_keras_retinanet, read_pth, read_torchvision

ROWS = [i for i in range(91) if i not in reference.GAPS]


@pytest.fixture(scope="module")
def fixture(root):
    with np.load(root / "tests/data/torchvision.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=[1, 2])
def imported(request, tmp_path_factory):
    "`(version, model, run)` read from a file of the published form, v1 with the older names."
    state = reference.tensors(request.param)
    path = tmp_path_factory.mktemp("torchvision") / f"v{request.param}.pth"
    reference.write_pth(path, reference.older(state) if request.param == 1 else state)
    model = read_torchvision(path)
    path.unlink()
    return request.param, model, runner(model)


def runner(model):
    """Picture (H, W, 3) → what the network says, what its detector finds. Under TensorFlow traced once for all
    sizes: a trace for each is what takes the time.
    """
    detector = retinanet_box(model)
    both = keras.Model(model.input, [model(model.input), detector(model.input)])
    run = both.predict_on_batch
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        run = tf.function(both, input_signature=[tf.TensorSpec((1, None, None, 3), "uint8")])

    def once(image):
        raw, found = run(image[None])
        return {name: numpy(value)[0] for name, value in raw.items()}, [numpy(x)[0] for x in found]

    return once


def compare(run, image, rows, classes, logits, deltas, boxes, scores, labels):
    "Ours against torchvision's: logits and deltas to 1e-4, detections to 1e-3 px and 1e-4 in score."
    ours, found = run(image)
    known = np.isin(classes, ROWS)
    places = np.searchsorted(ROWS, classes[known])
    got = ours["classification"][rows[known], places]
    for a, b in ((got, logits[known]), (ours["regression"][rows], deltas)):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()
    n = int((found[1] >= 0).sum())
    assert n == len(scores)
    used = np.zeros(n, bool)
    for box, score, label in zip(boxes, scores, labels):
        near = np.abs(found[0][:n] - box).max(1) + 1e3 * used + 1e3 * (found[2][:n] != ROWS.index(label))
        j = int(near.argmin())
        assert near[j] < 1e-3 and abs(found[1][j] - score) < 1e-4
        used[j] = True


def compare_picture(i, version, model, run, fixture):
    "`compare` for picture i of the fixture."
    image = reference.picture(i)
    n = len(numpy(anchors_for_shape(image.shape[:2], model_card(model).hyperparameters.anchors)))
    known = {k: fixture[f"v{version}/{i}/{k}"] for k in ("logits", "deltas", "boxes", "scores", "labels")}
    compare(run, image, *reference.sampled(n, 91, i), **known)


def test_both_versions_say_what_torchvision_says(imported, fixture):
    version, model, run = imported
    card = model_card(model)
    assert card.class_names == list(COCO_CLASSES)
    assert card.hyperparameters.pyramid_top == ("p5" if version == 1 else "c5")
    for i in range(10):
        compare_picture(i, version, model, run, fixture)
    assert sum(len(fixture[f"v{version}/{i}/scores"]) for i in range(10)) > 100


# on another engine; one picture, since a network is compiled anew for each size
ELSEWHERE = """
import sys
import keras
import numpy as np
import test_weights as tests
import torchvision_reference as reference
engine, version, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
assert keras.backend.backend() == engine
state = reference.tensors(version)
reference.write_pth(path, reference.older(state) if version == 1 else state)
model = tests.read_torchvision(path)
with np.load(tests.__file__.replace("test_weights.py", "data/torchvision.npz")) as fixture:
    tests.compare_picture(0, version, model, tests.runner(model), fixture)
print("done")
"""


@pytest.mark.parametrize("engine, version", [("jax", 1), ("torch", 2)])
def test_another_engine_says_the_same(engine, version, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} isn't installed")
    assert "done" in python(ELSEWHERE, engine, version, tmp_path / "x.pth", KERAS_BACKEND=engine)


def test_the_fixture_is_what_torchvision_says_today(fixture):
    if reference.library() is None:
        pytest.skip("torchvision is not installed: the fixture stands for it")
    for version, eps in ((1, 0.0), (2, 1e-5)):
        model = reference.theirs(version, eps)
        logits, deltas, boxes, *_ = reference.expected(model, reference.picture(0))
        rows, classes = reference.sampled(len(logits), 91, 0)
        known = {k: fixture[f"v{version}/0/{k}"] for k in ("logits", "deltas", "boxes", "scores")}
        np.testing.assert_allclose(logits[rows, classes], known["logits"], atol=1e-3)
        np.testing.assert_allclose(deltas[rows], known["deltas"], atol=1e-3)
        np.testing.assert_allclose(boxes, known["boxes"], atol=1e-2)


def test_a_detector_file_keeps_all_of_it_and_starts_other_classes(imported, tmp_path, capsys):
    version, model, _ = imported
    if version == 1:
        pytest.skip("one of the two is enough")
    path = tmp_path / "coco.keras"
    model.save(path)
    picture = reference.picture(0)
    detector = load_detector(path)
    h = detector.hyperparameters
    assert h == model_card(model).hyperparameters
    kept = detector.get_layer("retinanet")(picture[None], training=False)
    for name, rows in model(picture[None], training=False).items():
        np.testing.assert_array_equal(numpy(kept[name]), numpy(rows))
    other = retinanet_model(2, h, ("racoon", "cat"), weights=path)
    assert "cat" in capsys.readouterr().out
    old, new = (numpy(m(picture[None], training=False)["classification"]) for m in (model, other))
    cat = COCO_CLASSES.index("cat")
    np.testing.assert_allclose(new[..., 1], old[..., cat], rtol=1e-4, atol=1e-4)
    assert abs(1 / (1 + np.exp(-np.median(new[..., 0]))) - 0.01) < 0.009
    trainable = {v.path.split("/")[-2] for v in other.trainable_variables}
    assert not any(name.endswith("_bn") for name in trainable)
    assert "c2_1_1_conv" not in trainable and "c3_1_1_conv" in trainable


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def small_state():
    "A few tensors under the names that decide what network it is."
    return {k: v for k, v in reference.tensors(2).items() if "fpn.extra" in k or "layer_blocks.0" in k}


def says(path, word, read=read_torchvision):
    "The one sentence of the ValueError, which names the file and holds `word`."
    with pytest.raises(ValueError) as error:
        read(path)
    said = str(error.value)
    assert path.name in said and word in said and "\n" not in said, said
    return said


def test_a_pickle_that_calls_is_refused_before_anything_runs(tmp_path):
    for protocol in (0, 2, 4):
        for layout in ("zip", "sequence", "bare"):
            path, trace = tmp_path / "evil.pth", tmp_path / "trace"
            program = pickle.dumps({"weights": Evil(trace)}, protocol=protocol)
            if layout == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("archive/data.pkl", program)
            else:
                path.write_bytes((torch_files._MAGIC if layout == "sequence" else b"") + program)
            says(path, "not a file of PyTorch weights")
            assert not trace.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "collections.Counter"])
def test_names_in_a_pickle(tmp_path, name):
    module, function = name.split(".")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a/data.pkl", f"\x80\x02c{module}\n{function}\n)R.".encode("latin1"))
    assert name in says(tmp_path / "x.pth", "nothing of it was executed")


def test_damaged_files(tmp_path):
    path = tmp_path / "x.pth"
    state = small_state()
    reference.write_pth(path, state)
    whole = path.read_bytes()
    for name, array in read_pth(path).items():
        np.testing.assert_array_equal(array, state[name])
    path.write_bytes(whole[: len(whole) // 2])
    says(path, "cut off")
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    says(path, "CRC")
    path.write_bytes(b"")
    says(path, "neither")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    says(path, "packs nothing")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_torchvision(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 2020"])
def test_pytorch_reads_the_same(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    path, block = tmp_path / "x.pth", torch.arange(24.0).reshape(4, 6)
    kinds = ("float32", "float64", "float16", "bfloat16", "int64", "int32")
    state = {kind: block.to(getattr(torch, kind)) for kind in kinds}
    # windows on one block: turned, cut out, every second one
    state |= {"turned": block.T, "cut": block[1:, 2:5], "steps": block[::2, ::3], "none": block[:0]}
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    found = read_pth(path)
    known = torch.load(path, weights_only=True)["model"]
    assert list(found) == list(known)
    for name, array in found.items():
        tensor = known[name].float() if name == "bfloat16" else known[name]
        np.testing.assert_array_equal(array, tensor.numpy())


def constant(version, value):
    "A state in which every number is the same: its file holds each tensor as one number."
    return {
        name: np.broadcast_to(np.float32(value), shape) for name, shape in reference.shapes(version).items()
    }


def test_tensors_missing_misshapen_or_left_over(tmp_path, monkeypatch):
    built = functools.cache(lambda classes, h, names: retinanet_model(classes, h, names))
    # one network for all four: it is what takes the time, and only filled here
    monkeypatch.setattr(weights, "retinanet_model", lambda classes, h, names: built(classes, h, tuple(names)))
    path, state = tmp_path / "x.pth", constant(1, 0)
    changes = (
        ("backbone.body.layer2.0.bn1.running_var", None, "lacks the tensor"),
        ("backbone.fpn.layer_blocks.1.0.bias", np.zeros(255, "float32"), "(255,)"),
        ("head.classification_head.cls_logits.weight", None, "lacks the tensor"),
        ("more.weight", np.zeros(3, "float32"), "no place for"),
    )
    for name, value, word in changes:
        changed = {k: v for k, v in {**state, name: value}.items() if v is not None}
        reference.write_pth(path, changed)
        assert name in says(path, word)


class Server(http.server.BaseHTTPRequestHandler):
    body, asked, cut = b"", 0, 0

    def do_GET(self):
        type(self).asked += 1
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        end = self.cut if self.asked == 1 and self.cut else None
        self.wfile.write(self.body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    "The published files at a local address, and an empty cache folder."
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "_ADDRESS", f"http://127.0.0.1:{served.server_address[1]}/models")
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    Server.asked, Server.cut = 0, 0
    yield served
    served.shutdown()
    served.server_close()


def published(monkeypatch, path):
    "Serve the file `path` as coco-v1, its name ending with its own checksum."
    Server.body = path.read_bytes()
    digits = hashlib.sha256(Server.body).hexdigest()[:8]
    monkeypatch.setitem(weights._RELEASED, "coco-v1", f"retinanet_resnet50_fpn_coco-{digits}.pth")
    return weights._RELEASED["coco-v1"]


def test_weights_by_name_are_fetched_once(server, monkeypatch, tmp_path):
    reference.write_pth(tmp_path / "x.pth", reference.older(constant(1, 1)))
    published(monkeypatch, tmp_path / "x.pth")
    Server.cut = len(Server.body) // 2  # the connection breaks off once
    detector = load_detector("coco-v1", max_detections=5)
    assert detector.class_names == list(COCO_CLASSES) and Server.asked == 2
    model = retinanet_model(80, detector.hyperparameters, weights="coco-v1")
    assert model_card(model).class_names == list(COCO_CLASSES) and Server.asked == 2
    assert [p.name for p in weights.cache_folder().glob("coco*")] == ["coco-v1.keras"]
    assert weights.cache_folder() == tmp_path / "cache"


def test_two_at_once_convert_once(monkeypatch, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    made = []

    def slow(folder, file, progress):
        made.append(file)
        time.sleep(0.3)
        return SimpleNamespace(save=lambda path: path.write_bytes(b"x"))

    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_released_model", slow)
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(weights.coco_weights, ["coco"] * 2)) == {tmp_path / "coco-v2.keras"}
    assert len(made) == 1


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    Server.body = b"something else"
    with pytest.raises(ValueError, match="arrived with the checksum"):
        weights.coco_weights("coco-v1", progress=False)
    assert not list((tmp_path / "cache").glob("*.keras")) and not list((tmp_path / "cache").glob("*.pth"))


@pytest.mark.parametrize("own", [False, True], ids=["downloaded", "put there by hand"])
def test_a_hostile_file_with_the_right_checksum(server, monkeypatch, tmp_path, own):
    "Nothing is executed, nothing converted; the file goes if we fetched it, and stays if the user put it there."
    evil, trace = tmp_path / "evil.pth", tmp_path / "trace"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": Evil(trace)}, protocol=2))
    cache, name = tmp_path / "cache", published(monkeypatch, evil)
    if own:
        cache.mkdir()
        (cache / name).write_bytes(evil.read_bytes())
    with pytest.raises(ValueError, match="nothing of it was executed") as error:
        weights.coco_weights("coco-v1", progress=False)
    assert ("has been deleted" in str(error.value)) != own and "\n" not in str(error.value)
    assert not trace.exists() and Server.asked == (not own)
    left = [p.name for p in cache.iterdir() if p.stat().st_size]  # a lock is an empty file
    assert left == ([name] if own else [])


def test_without_a_network_it_says_what_to_fetch(server, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_ADDRESS", "http://127.0.0.1:9/models")
    monkeypatch.setattr("retinanet_nb.download.time.sleep", lambda seconds: None)
    with pytest.raises(OSError) as error:
        weights.coco_weights("coco", progress=False)
    said = str(error.value)
    assert "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth" in said and str(tmp_path / "cache") in said
    assert "\n" not in said


def test_keras_retinanet_says_the_same(tmp_path):
    import keras_retinanet_reference as theirs

    network = theirs.network(5)
    path = tmp_path / "resnet50.h5"
    theirs.save(network, path)
    model = read_keras_retinanet(path, ("a", "b", "c", "d", "e"))
    h = model_card(model).hyperparameters
    assert (h.backbone, h.box_coding, h.box_std) == ("resnet50caffe", "corners", (0.2,) * 4)
    run, found = runner(model), 0
    for i in range(3):
        image = reference.picture(i)
        bgr = image[None, ..., ::-1].astype("float32") - np.array([103.939, 116.779, 123.68], "float32")
        deltas, scores = (numpy(x)[0] for x in network(bgr, training=False))
        ours, (boxes, best, labels) = run(image)
        assert np.abs(ours["regression"] - deltas).max() <= 1e-4 * np.abs(deltas).max()
        logits = np.log(scores) - np.log1p(-scores)
        assert np.abs(ours["classification"] - logits).max() <= 1e-4 * np.abs(logits).max()
        anchors = numpy(anchors_for_shape(image.shape[:2], h.anchors))
        possible = theirs.decoded(anchors, deltas, image.shape[:2])
        for box, score, label in zip(boxes, best, labels):
            if score >= 0:  # one of their boxes, with their score
                fits = np.abs(possible - box).max(1) < 1e-3
                assert (np.abs(scores[fits, label] - score) < 1e-4).any()
                found += 1
    assert found > 50


def test_h5_files_that_are_something_else(tmp_path):
    import h5py

    path = tmp_path / "x.h5"
    path.write_bytes(b"no HDF5")
    says(path, "no HDF5 file", read_keras_retinanet)
    with h5py.File(path, "w") as file:
        file["model_weights/dense/dense/kernel:0"] = np.zeros((3, 3))
    says(path, "res5c_branch2c", read_keras_retinanet)
    with h5py.File(path, "w") as file:
        file.create_dataset("a/b", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
    says(path, "lies in another file", read_keras_retinanet)
