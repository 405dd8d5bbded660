"""Model files from elsewhere: damaged, doctored, of another network, with other anchors or classes. Each is one sentence
that names the file, and nothing is built before it."""

import json
import os
import shutil
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
import retinanet_nb
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.model_files import (
    ARCHITECTURE,
    FORMAT_VERSION,
    MAX_CLASSES,
    architecture_of,
    check_model_file,
    class_names_of,
    hyperparameters_of,
    save_half,
)
from retinanet_nb.retinanet import load_weights, model_card, read_model, retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box

from helpers import excite, noise, numpy, python, same_detections, small

NAMES = ("ball", "brick", "leaf")
HP = {"feature_size": 16, "box_std": (0.2, 0.2, 0.4, 0.4), "max_detections": 17, "pre_nms_top_k": 50}


@pytest.fixture(scope="module")
def model():
    return excite(retinanet_model(3, small(**HP), class_names=NAMES), 3, feature_size=16)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    retinanet_box(model).save(folder / "detector.keras")
    return folder


def rewritten(source, path, change=lambda name, content: content, **kwargs):
    "A copy of an archive with its members changed; its checksums are right."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", **kwargs) as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
    return path


def with_config(source, path, old, new):
    "A copy with `old` exchanged for `new` everywhere in the configuration."

    def change(name, content):
        if name != "config.json":
            return content
        assert old.encode() in content, old
        return content.replace(old.encode(), new.encode())

    return rewritten(source, path, change)


def refused(path, *words):
    "Both readers refuse the file, in one sentence that names it and says `words`."
    for read in (read_model, load_detector):
        with pytest.raises(ValueError) as error:
            read(path)
        said = str(error.value)
        assert str(path) in said and "\n" not in said and len(said) < len(str(path)) + 600, said
        assert all(word in said for word in words), said


def test_what_a_file_was_trained_with(files):
    for name in ("model.keras", "detector.keras"):
        assert hyperparameters_of(files / name) == small(**HP)
        assert class_names_of(files / name) == list(NAMES)
        architecture = architecture_of(files / name)
        assert set(architecture) == set(ARCHITECTURE) and architecture["box_std"] == HP["box_std"]
        assert HyperParameters(gamma=1.0).replace(**architecture).feature_size == 16
    for path in (files / "model.weights.h5", files / "nowhere.keras"):
        with pytest.raises((ValueError, FileNotFoundError), match=path.name):
            architecture_of(path)


def test_half_a_file_holds_the_same_detector(model, files, tmp_path):
    path = tmp_path / "half.keras"
    for whole, name in ((model, "model.keras"), (retinanet_box(model), "detector.keras")):
        assert save_half(whole, path) == path
        assert check_model_file(path) == check_model_file(files / name)
        for read in (read_model, load_detector, keras.models.load_model):
            weights = read(path).weights
            assert len(weights) == len(model.weights)
            for before, after in zip(model.weights, weights):
                value = numpy(before)
                if value.ndim > 1:
                    assert np.abs(value.astype("float16") - value).max() <= np.abs(value).max() / 2048
                    value = value.astype("float16").astype("float32")
                assert after.dtype == "float32" and np.array_equal(numpy(after), value), before.path
    # a kernel of random numbers takes two bytes each, nearly
    wide = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
    wide.compile("adam", "mse")
    wide.train_on_batch(np.ones((1, 1000)), np.ones((1, 1000)))  # the moments of Adam stay behind
    size = save_half(wide, path).stat().st_size
    assert 1_500_000 < size < 2_050_000
    load_weights(other := retinanet_model(3, small(**HP), NAMES), save_half(model, path))
    assert np.array_equal(numpy(other.weights[0]), numpy(model.weights[0]).astype("float16"))


def test_what_half_precision_cannot_hold_is_not_written(tmp_path):
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    path = save_half(dense, tmp_path / "dense.keras")
    before = path.read_bytes()
    dense.layers[0].kernel.assign([[1, 65505.0 * 2], [0, 0]])
    with pytest.raises(ValueError, match="dense.*131010.*whole"):
        save_half(dense, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    dense.layers[0].kernel.assign([[1, 0], [0, 0]])
    dense.layers[0].bias.assign([1e-8, 70000])  # vectors stay as they are
    kept = keras.models.load_model(save_half(dense, path)).layers[0].bias
    assert np.array_equal(numpy(kept), np.float32([1e-8, 70000]))
    with pytest.raises(ValueError, match="dense.h5"):
        save_half(dense, tmp_path / "dense.h5")


def test_a_model_without_card_has_no_hyperparameters(tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    assert check_model_file(tmp_path / "other.keras") == []
    for ask in (hyperparameters_of, class_names_of, architecture_of):
        with pytest.raises(ValueError, match="other.keras"):
            ask(tmp_path / "other.keras")


def test_a_detectors_own_thresholds_come_second(model, tmp_path):
    retinanet_box(model, max_detections=5).save(tmp_path / "few.keras")
    first, second = check_model_file(tmp_path / "few.keras")
    assert (first[0].max_detections, second[0].max_detections) == (17, 5)


def test_files_are_asked_without_an_engine(files):
    said = python(
        "import sys\n"
        "from retinanet_nb.model_files import architecture_of\n"
        "print(architecture_of(sys.argv[1])['backbone'], {'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules))",
        files / "detector.keras",
    )
    assert said.split() == ["tiny", "set()"]


# what is exchanged in the configuration: for what, and the field that the message names
DOCTORED = {
    "the filter's detections": ('"max_detections": 17', '"max_detections": 1000000000', "max_detections"),
    "the card's detections": (
        '\\"max_detections\\": 17',
        '\\"max_detections\\": 1000000000',
        "max_detections",
    ),
    "the filter's candidates": ('"pre_nms_top_k": 50', '"pre_nms_top_k": 1000000000', "pre_nms_top_k"),
    "the card's candidates": ('\\"pre_nms_top_k\\": 50', '\\"pre_nms_top_k\\": 10000000', "pre_nms_top_k"),
    "a threshold": ('"score_threshold": 0.05', '"score_threshold": NaN', "score_threshold"),
    "the canvas": ('\\"image_size\\": [', '\\"image_size\\": [1000000, 1000000, ', "image_size"),
    "the width": ('\\"feature_size\\": 16', '\\"feature_size\\": 1600000', "feature_size"),
    "the depth": ('\\"subnet_depth\\": 1', '\\"subnet_depth\\": 100000', "subnet_depth"),
    "the card's anchors": (
        '\\"ratios\\": [',
        '\\"ratios\\": [' + "1.5, " * 3000,
        "256 anchors",
    ),
    "the layer's anchors": ('"ratios": [', '"ratios": [' + "1.5, " * 3000, "256 anchors"),
    "the names": ('"class_names": [', '"class_names": [' + '"x", ' * 20_000, "class_names"),
    "the same names": ('"class_names": ["ball",', '"class_names": ["leaf",', "class_names"),
    "long names": ('"class_names": ["ball",', '"class_names": ["' + "b" * 5000 + '",', "class_names"),
    "names of another kind": ('"class_names": ["ball",', '"class_names": [3,', "class_names"),
    "a layer's filters": ('"filters": 96', '"filters": 960000000', "filters"),
    "a layer's kernel": ('"kernel_size": [3, 3]', '"kernel_size": [90000, 90000]', "weights"),
    "infinity": ('"epsilon": 0.001', '"epsilon": 1e999', "epsilon"),
    "a kernel without holes": ('"dilation_rate": [1, 1]', '"dilation_rate": [1, 0]', "dilation_rate"),
    "half a hole": ('"dilation_rate": [1, 1]', '"dilation_rate": [1, 0.5]', "dilation_rate"),
    "other anchors in the layer": ('"ratios": [0.5, 1, 2]', '"ratios": [0.5, 1]', "anchors"),
    "other anchors in the card": (
        '\\"sizes\\": [\\n   32',
        '\\"sizes\\": [\\n   16',
        "anchors",
    ),
    "another box_std": ('"std": [0.2', '"std": [0.3', "box_std"),
    "no hyperparameters": ('"hyperparameters": "{', '"hyperparameters": "[{', "hyperparameters"),
    "another kind": ('"hyperparameters": "{', '"hyperparameters": 3, "was": "{', "hyperparameters"),
    "deep hyperparameters": (
        '"hyperparameters": "{',
        '"hyperparameters": "{\\"anchors\\":' + "[" * 100_000 + '",  "was": "{',
        "nested too deeply",
    ),
    "a newer format": ('"format_version": 1', '"format_version": 99', "upgrade the package"),
    "a deep configuration": ('{"module"', '{"deep": ' + "[" * 5000 + "]" * 5000 + ', "module"', "too deeply"),
    "a very deep one": ('{"module"', '{"deep": ' + "[" * 10**5 + ', "module"', "too deeply"),
    "no JSON": ('{"module"', "module", "Expecting"),
}


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_detector_asks_for_too_much(files, tmp_path, what):
    old, new, field = DOCTORED[what]
    refused(with_config(files / "detector.keras", tmp_path / "doctored.keras", old, new), field)


@pytest.mark.parametrize("kind", ["detector", "model"])
def test_a_network_and_anchors_that_do_not_fit(files, tmp_path, kind):
    "Its maps are cropped to another stride, so it has more rows than there are anchors."
    path = with_config(files / f"{kind}.keras", tmp_path / "strides.keras", '"stride": 32', '"stride": 16')
    with pytest.raises(ValueError, match=r"strides.keras is damaged: .* rows and its anchors are \d+"):
        load_detector(path)


@pytest.mark.parametrize("name", ["anchors", "detections", "filter", "retinanet"])
def test_a_detector_that_lacks_a_part(files, tmp_path, name):
    # the part is there under another name, or as another kind of layer
    path = with_config(files / "detector.keras", tmp_path / "renamed.keras", f'"{name}"', f'"{name}_"')
    if name == "retinanet":  # whatever it is called
        assert load_detector(path).class_names == list(NAMES)
    else:
        with pytest.raises(ValueError, match="renamed.keras .*lacks one of its parts"):
            load_detector(path)


def test_names_of_a_network_are_as_many_as_its_classes(files, tmp_path):
    path = with_config(files / "model.keras", tmp_path / "named.keras", '"ball", ', "")
    refused(path, "2 class_names", "3 classes")
    path = with_config(files / "detector.keras", tmp_path / "named.keras", '"ball", ', "")
    with pytest.raises(ValueError, match="named.keras has 2 class_names for a network of 3 classes"):
        load_detector(path)


def test_anchors_of_a_cell_are_as_many_as_the_network_has(files, tmp_path):
    # in the cards and in the layer alike
    ours = with_config(
        files / "detector.keras", tmp_path / "card.keras", '"ratios": [0.5, 1, 2]', '"ratios": [0.5, 1]'
    )
    with zipfile.ZipFile(files / "detector.keras") as archive:
        config = archive.read("config.json").decode()
    start = config.index('\\"ratios\\": [')
    inside = config[start : config.index("]", start) + 1]
    path = with_config(ours, tmp_path / "anchors.keras", inside, '\\"ratios\\": [0.5, 1]')
    with pytest.raises(ValueError, match="anchors.keras has anchors for 24 deltas a cell"):
        load_detector(path)


def test_the_limits_leave_room(files, tmp_path):
    for old, new in (('"max_detections": 17', '"max_detections": 10000'), ("ball", "b" * 1000)):
        path = with_config(files / "detector.keras", tmp_path / "allowed.keras", old, new)
        assert len(check_model_file(path)) == 2
    for number in (0, MAX_CLASSES + 1, 10**9):
        with pytest.raises(ValueError, match="num_classes"):
            retinanet_model(number, small())
    assert FORMAT_VERSION == 1


def test_every_backbone_stays_within_the_limits(tmp_path):
    # a network's weights are overestimated by less than the hundredfold that is refused
    from retinanet_nb.model_files import _asks_for, _dictionaries
    from retinanet_nb.resnet50 import BACKBONES

    for name in ("tiny", "mobilenetv3small", "efficientnetv2b0", "densenet121"):
        assert name in BACKBONES
        for classes in (1, 80):
            model = retinanet_model(classes, small(backbone=name, feature_size=16))
            config = json.loads(json.dumps(model.get_config()))
            asked = _asks_for(list(_dictionaries(config)))
            assert model.count_params() / 2 < asked < 20 * model.count_params()


def test_a_file_with_one_changed_byte_says_so_or_is_the_same(files, tmp_path):
    rng = np.random.default_rng(0)
    whole = (files / "model.keras").read_bytes()
    weights = [numpy(w) for w in read_model(files / "model.keras").weights]
    path, told = tmp_path / "damaged.keras", 0
    # beginning and end hold the archive's own records, the middle weights
    places = [*range(0, 60, 7), *range(len(whole) - 400, len(whole), 17), *rng.integers(0, len(whole), 20)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            again = read_model(path)
        except ValueError as error:
            assert str(path) in str(error)
            told += 1
        else:
            assert all(np.array_equal(a, numpy(b)) for a, b in zip(weights, again.weights, strict=True))
            assert model_card(again).hyperparameters == small(**HP)
    assert told > len(places) / 2


def test_a_changed_weight_is_told_although_keras_reads_it(files, tmp_path):
    data = bytearray((files / "model.keras").read_bytes())
    data[len(data) // 2] ^= 0x40
    (tmp_path / "changed.keras").write_bytes(data)
    refused(tmp_path / "changed.keras", "checksum", "model.weights.h5")


@pytest.mark.parametrize(
    "what", ["text", "empty", "cut", "folder", "no config", "no weights", "twice", "bomb"]
)
def test_archives_that_are_no_models(files, tmp_path, what):
    path, whole = tmp_path / "odd.keras", (files / "model.keras").read_bytes()
    if what == "folder":
        path.mkdir()
    elif what in ("text", "empty", "cut"):
        path.write_bytes({"text": b"Dear model, ", "empty": b"", "cut": whole[: len(whole) // 2]}[what])
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            if what != "no config":
                archive.writestr("config.json", "{}")
            if what == "bomb":
                archive.writestr("model.weights.h5", bytes(2**26))
            elif what != "no weights":
                archive.writestr("model.weights.h5", "these are no weights")
            if what == "twice":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    archive.writestr("config.json", "{}")
    refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(files, tmp_path, value):
    broken = read_model(files / "model.keras")
    kernel = broken.get_layer("P3").kernel
    changed = numpy(kernel).copy()
    changed[0, 0, 0, 0] = value
    kernel.assign(changed)
    broken.save(tmp_path / "broken.keras")
    retinanet_box(broken).save(tmp_path / "detector.keras")
    broken.save_weights(tmp_path / "broken.weights.h5")
    for name in ("broken.keras", "detector.keras"):
        refused(tmp_path / name, "NaN or infinity", "P3")
    for name in ("broken.keras", "broken.weights.h5"):
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
            retinanet_model(3, small(**HP), NAMES, weights=tmp_path / name)


def test_a_compressed_archive_is_still_read(files, tmp_path):
    path = rewritten(files / "detector.keras", tmp_path / "small.keras", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < (files / "detector.keras").stat().st_size
    assert load_detector(path).class_names == list(NAMES)


def test_older_files_and_keras_itself_read_what_they_read_before(files):
    carried = os.path.join(os.path.dirname(retinanet_nb.__file__), "assets", "shapes.keras")
    assert load_detector(carried).class_names[0] == "ball"  # written before there were any checks
    ours, theirs = load_detector(files / "detector.keras"), keras.models.load_model(files / "detector.keras")
    for a, b in zip(ours(noise(1, (96, 96))), theirs(noise(1, (96, 96)))):
        np.testing.assert_array_equal(numpy(a), numpy(b))


def test_weights_for_other_anchors_are_refused(files):
    for name, value in (
        ("anchors", AnchorParameters(sizes=(16, 32, 64, 128, 256))),
        ("anchors", AnchorParameters(ratios=(1, 2, 3))),
        ("box_std", (0.1, 0.1, 0.2, 0.2)),
    ):
        for file in ("model.keras", "detector.keras"):
            with pytest.raises(ValueError) as error:
                retinanet_model(3, small(**{**HP, name: value}), NAMES, weights=files / file)
            said = str(error.value)
            assert all(word in said for word in (file, name, "architecture_of", str(value))), said


def test_rows_of_classes_are_sorted_by_name(model, files, capsys):
    order = ("leaf", "ball", "brick")
    turned = retinanet_model(3, small(**HP), order, weights=files / "model.keras")
    assert "another order" in capsys.readouterr().out
    pictures = noise(2, (96, 128))
    mine, theirs = turned(pictures, training=False), model(pictures, training=False)
    np.testing.assert_array_equal(numpy(mine["regression"]), numpy(theirs["regression"]))
    np.testing.assert_allclose(
        numpy(mine["classification"]), numpy(theirs["classification"])[..., [2, 0, 1]], atol=1e-5
    )
    assert model_card(turned).class_names == list(order)


def test_the_same_names_are_silent_and_no_names_take_the_files(model, files, capsys):
    pictures = noise(1, (96, 128))
    for names in (NAMES, None):
        same = retinanet_model(3, small(**HP), names, weights=files / "model.keras")
        assert model_card(same).class_names == list(NAMES) and capsys.readouterr().out == ""
        for name, value in model(pictures, training=False).items():
            np.testing.assert_array_equal(numpy(value), numpy(same(pictures, training=False)[name]))


def test_other_classes_in_the_same_number_start_afresh(model, files, capsys):
    other = retinanet_model(3, small(**HP), ("cat", "cow", "dog"), weights=files / "model.keras")
    assert "starts afresh" in capsys.readouterr().out
    out = other(noise(1, (96, 96)), training=False)
    p = 1 / (1 + np.exp(-numpy(out["classification"])))
    assert 0.005 < np.median(p) < 0.02
    np.testing.assert_array_equal(
        numpy(out["regression"]), numpy(model(noise(1, (96, 96)), training=False)["regression"])
    )


def test_what_a_weights_file_cannot_say_is_said(files, capsys):
    again = retinanet_model(3, small(**HP), NAMES)
    assert load_weights(again, files / "model.weights.h5") == []
    said = capsys.readouterr().out
    assert all(word in said for word in ("model.weights.h5", "anchors", "box_std", "order", "trust"))


def test_damaged_weights_files(files, tmp_path):
    whole = (files / "model.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.weights.h5").write_text("Dear weights,")
    shutil.copy(files / "model.weights.h5", tmp_path / "linked.weights.h5")
    with h5py.File(tmp_path / "linked.weights.h5", "a") as file:
        group = file["layers/functional/layers/conv2d/vars"]
        del group["0"]
        group["0"] = h5py.ExternalLink("elsewhere.h5", "/0")
    for name in ("cut", "text", "linked"):
        with pytest.raises(ValueError, match=f"{name}.weights.h5"):
            retinanet_model(3, small(**HP), NAMES, weights=tmp_path / f"{name}.weights.h5")


def test_a_loaded_detector_keeps_its_precision(model, tmp_path):
    retinanet_box(model, dtype="mixed_bfloat16", score_threshold=0.2).save(tmp_path / "quick.keras")

    def computes_in(detector):
        return detector.get_layer(model.name).get_layer("P3").compute_dtype

    changed = load_detector(tmp_path / "quick.keras", score_threshold=0.3)
    assert computes_in(changed) == computes_in(load_detector(tmp_path / "quick.keras")) == "bfloat16"
    assert changed.hyperparameters.score_threshold == 0.3 and changed.class_names == list(NAMES)
    # asked for, it changes; a training model is still wrapped in float32
    assert computes_in(load_detector(tmp_path / "quick.keras", dtype="float32")) == "float32"
    pictures = noise(2, (96, 128))
    stricter = [numpy(x) for x in changed(pictures)]
    wanted = retinanet_box(model, dtype="mixed_bfloat16", score_threshold=0.3)
    same_detections(stricter, [numpy(x) for x in wanted(pictures)])
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = retinanet_model(3, small(**HP), NAMES)
    finally:
        keras.config.set_dtype_policy("float32")
    half.save(tmp_path / "half.keras")
    assert computes_in(load_detector(tmp_path / "half.keras")) == "float32"
    assert computes_in(load_detector(tmp_path / "half.keras", dtype=None)) == "bfloat16"


@pytest.mark.parametrize(
    "kind, settings, said",
    [
        ("RegressBoxes", {"std": [0.1, 0.1, 0.2, 0.2], "coding": "corners"}, "box_coding"),
        ("FilterDetections", {"levels": {"sizes": [8, 16, 32, 64, 128]}}, "levels"),
    ],
)
def test_layers_may_not_contradict_the_card(kind, settings, said):
    from retinanet_nb.model_files import _check_agreement

    with pytest.raises(ValueError, match=said):
        _check_agreement([(kind, settings)], HyperParameters())
    plain = {"RegressBoxes": {"std": [0.1, 0.1, 0.2, 0.2]}, "FilterDetections": {"levels": {}}}
    _check_agreement([(kind, plain[kind])], HyperParameters())
