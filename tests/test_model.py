"""The network: sizes, parameters, initial probabilities, heads shared over levels, what it carries, what it loads."""

import gc
import math
import warnings

import keras
import numpy as np
import pytest

import oracles
from helpers import excite, head_weights, noise, numpy, small
from retinanet_nb.anchors import anchors_for_shape
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.resnet50 import BACKBONES, Normalize, bottleneck_network, resnet50
from retinanet_nb.retinanet import retinanet_model


@pytest.fixture(scope="module")
def resnet():
    return retinanet_model(20)


@pytest.fixture(scope="module")
def tiny():
    return retinanet_model(3, small(), class_names=("ball", "brick", "leaf"))


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype("float64")))


def test_parameters_of_the_documented_network(resnet):
    assert resnet.count_params() == 36_803_672


@pytest.mark.parametrize("shape", [(240, 320), (333, 500), (512, 512), (100, 130)])
def test_shapes_agree_with_the_anchors(resnet, shape):
    n = len(anchors_for_shape(shape))
    assert n == 9 * sum(math.ceil(shape[0] / s) * math.ceil(shape[1] / s) for s in oracles.STRIDES)
    spec = resnet.compute_output_spec(keras.KerasTensor((2, *shape, 3), dtype="uint8"))
    for name, last in (("regression", 4), ("classification", 20)):
        assert all(found in (None, wanted) for found, wanted in zip(spec[name].shape, (2, n, last)))


@pytest.mark.parametrize("shape", [(240, 320), (100, 130)])
def test_initial_probability_and_shapes(resnet, shape):
    out = resnet(noise(1, shape), training=False)
    assert set(out) == {"regression", "classification"}
    n = len(anchors_for_shape(shape))
    assert tuple(out["regression"].shape) == (1, n, 4) and tuple(out["classification"].shape) == (1, n, 20)
    p = sigmoid(numpy(out["classification"]))
    assert 0.005 < np.median(p) < 0.02 and p.max() < 0.2
    assert np.isfinite(numpy(out["regression"])).all()


@pytest.mark.parametrize(
    "shape", [(240, 320), (333, 500), (512, 512), (100, 130), (32, 32), (33, 1), (1, 400)]
)
def test_any_size(tiny, shape):
    out = tiny(noise(2, shape), training=False)
    n = len(anchors_for_shape(shape))
    assert tuple(out["regression"].shape) == (2, n, 4) and tuple(out["classification"].shape) == (2, n, 3)
    assert np.isfinite(numpy(out["classification"])).all()


def test_initial_probability(tiny):
    p = sigmoid(numpy(tiny(noise(2, (128, 128)), training=False)["classification"]))
    assert 0.009 < np.median(p) < 0.011 and 0.005 < p.min() and p.max() < 0.02
    other = retinanet_model(3, small(prior_probability=0.2))
    p = sigmoid(numpy(other(noise(2, (128, 128)), training=False)["classification"]))
    assert 0.18 < np.median(p) < 0.22


def test_the_heads_are_shared_over_the_levels():
    model = retinanet_model(3, small())
    pictures = noise(1, (128, 160))
    before = {k: numpy(v) for k, v in model(pictures, training=False).items()}
    _, class_bias, _, box_bias = head_weights(model, 3)  # exactly one of each
    class_bias.assign(numpy(class_bias) + 1)
    box_bias.assign(numpy(box_bias) - 2)
    after = {k: numpy(v) for k, v in model(pictures, training=False).items()}
    np.testing.assert_allclose(after["classification"], before["classification"] + 1, atol=1e-4)
    np.testing.assert_allclose(after["regression"], before["regression"] - 2, atol=1e-4)


def test_every_cell_lists_its_anchors_one_after_the_other():
    model = retinanet_model(3, small())
    ck, cb, rk, rb = head_weights(model, 3)
    for kernel in (ck, rk):
        kernel.assign(np.zeros(kernel.shape, "float32"))
    cb.assign(np.arange(27, dtype="float32"))
    rb.assign(np.arange(36, dtype="float32"))
    out = model(noise(1, (128, 160)), training=False)
    for name, size in (("classification", 27), ("regression", 36)):
        cells = numpy(out[name]).reshape(-1, size)  # nine anchors of a cell are neighbours
        np.testing.assert_allclose(cells, np.broadcast_to(cells[0], cells.shape), atol=1e-5)
        assert sorted(np.round(cells[0])) == list(range(size))


@pytest.mark.parametrize("y, x", [(20, 20), (20, 236), (108, 20), (108, 236), (60, 150)])
def test_outputs_lie_where_their_anchors_lie(y, x):
    model = excite(retinanet_model(3, small()), 3, seed=1)
    picture = np.full((1, 128, 256, 3), 120, "uint8")
    changed = picture.copy()
    changed[0, y - 12 : y + 12, x - 12 : x + 12] = (250, 0, 0)
    change = np.abs(
        numpy(model(changed, training=False)["classification"])
        - numpy(model(picture, training=False)["classification"])
    )[0].sum(-1)
    anchors = oracles.anchors(128, 256)
    first = 9 * 16 * 32  # those of P3
    cells = change[:first].reshape(-1, 9).sum(1)
    centre = anchors[4:first:9].reshape(-1, 2, 2).mean(1)
    most = np.argsort(-cells)[:9]  # the patch is three cells wide and high
    # coarse levels smear the change over their cells; columns before rows would lie a hundred pixels off
    np.testing.assert_allclose(np.median(centre[most], 0), [x, y], atol=32)


def test_other_anchors():
    anchors = AnchorParameters(ratios=(0.5, 2), scales=(1,))
    model = retinanet_model(4, small(anchors=anchors))
    out = model(noise(1, (100, 130)), training=False)
    n = len(anchors_for_shape((100, 130), anchors))
    assert tuple(out["regression"].shape) == (1, n, 4) and tuple(out["classification"].shape) == (1, n, 4)


def test_float_pictures_are_the_same_pictures(tiny):
    pictures = noise(2, (100, 130))
    a, b = tiny(pictures, training=False), tiny(pictures.astype("float32"), training=False)
    for name in a:
        np.testing.assert_allclose(numpy(a[name]), numpy(b[name]), atol=1e-5)


def test_depth_and_width_of_the_heads():
    def heads(feature_size, depth, k):
        convolution = 9 * feature_size * feature_size + feature_size
        return 2 * depth * convolution + (9 * feature_size * 9 * k + 9 * k) + (9 * feature_size * 36 + 36)

    sizes = {}
    for depth in (1, 3):
        for k in (1, 7):
            sizes[depth, k] = retinanet_model(
                k, small(feature_size=16, subnet_depth=depth)
            ).count_params() - heads(16, depth, k)
    assert len(set(sizes.values())) == 1  # backbone and pyramid are the same


def test_hyperparameters_and_names_survive_saving(tmp_path):
    from retinanet_nb.retinanet_box import retinanet_box

    hp = small(score_threshold=0.125, nms_threshold=0.375, max_detections=17, box_std=(0.5, 0.5, 0.25, 0.25))
    model = excite(retinanet_model(2, hp, class_names=("left", "right")), 2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    pictures = noise(2, (100, 130))
    # Keras reads plain layers, A.18's are quicker
    for name, value in model(pictures, training=False).items():
        other = numpy(again(pictures, training=False)[name])
        np.testing.assert_allclose(numpy(value), other, rtol=1e-5, atol=1e-5)
    first, second = retinanet_box(model), retinanet_box(again)
    assert tuple(first.class_names) == tuple(second.class_names) == ("left", "right")
    outputs = [[numpy(x) for x in box(pictures)] for box in (first, second)]
    assert (
        outputs[0][1].shape == (2, 17)
        and (outputs[0][1][outputs[0][1] >= 0] > 0.125).all()
        and (outputs[0][2] >= 0).any()
    )
    for a, b in zip(*outputs):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_its_card_gets_the_defaults():
    from retinanet_nb.retinanet_box import retinanet_box

    model = excite(retinanet_model(2, small(max_detections=17)), 2, size=(32, 32))
    card = next(layer for layer in model.layers if type(layer).__name__ == "ModelCard")
    assert not card.weights
    regression, classification = card.input
    plain = keras.Model(model.input, {"regression": regression, "classification": classification})
    box = retinanet_box(plain)
    assert numpy(box(noise(1, (32, 32)))[1]).shape == (1, 300) and len(box.class_names) == 2


def test_hyperparameters_to_json_and_back():
    for hp in (
        HyperParameters(),
        small(box_std=(0.5, 0.5, 0.25, 0.25), anchors=AnchorParameters(ratios=(1,), scales=(1, 1.5))),
    ):
        again = HyperParameters.from_json(hp.to_json())
        assert again == hp and again.anchors == hp.anchors and hash(again) == hash(hp)
    changed = HyperParameters().replace(gamma=1.5)
    assert changed.gamma == 1.5 and HyperParameters().gamma == 2.0
    with pytest.raises(AttributeError):
        changed.gamma = 3.0


def test_hyperparameters_are_the_documented_ones():
    hp = HyperParameters()
    documented = dict(
        backbone="resnet50",
        image_size=(512, 512),
        feature_size=256,
        subnet_depth=4,
        prior_probability=0.01,
        box_std=(0.1, 0.1, 0.2, 0.2),
        negative_overlap=0.4,
        positive_overlap=0.5,
        force_match=True,
        alpha=0.25,
        gamma=2.0,
        sigma=3.0,
        score_threshold=0.05,
        nms_threshold=0.5,
        pre_nms_top_k=1000,
        max_detections=300,
        optimizer="adam",
        learning_rate=1e-5,
    )
    assert {name: getattr(hp, name) for name in documented} == documented and hp.anchors == AnchorParameters()


DAMAGED = {
    "not JSON": "gamma: 1.5",
    "a list": "[]",
    "nothing": "null",
    "nested": '{"anchors":' * 100_000,
    "nested lists": "[" * 100_000,
    "another type": '{"gamma": "fast"}',
    "not finite": '{"gamma": NaN}',
    "infinite": '{"epochs": 1e400}',
    "digits": '{"epochs": ' + "1" * 5000 + "}",
    "too large": '{"gamma": ' + "1" * 400 + "}",
    "anchors": '{"anchors": {"size": 3}}',
    "anchors of a list": '{"anchors": [1]}',
    "a method's word": '{"self": 1}',
    "a long name": '{"' + "z" * 100_000 + '": 1}',
    "a long value": '{"backbone": ["' + "z" * 100_000 + '"]}',
    "out of range": '{"seed": -1}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_hyperparameters_of_a_damaged_file_name_it(text):
    with pytest.raises(ValueError) as error:
        HyperParameters.from_json(text, source="run/config.json")
    said = str(error.value)
    assert said.startswith("run/config.json: ") and len(said) < 1000, said


def test_hyperparameters_from_what_is_no_text():
    for wrong in (None, 3, b"\xff"):
        with pytest.raises(ValueError, match="not valid JSON"):
            HyperParameters.from_json(wrong)
    assert HyperParameters.from_json({"gamma": 1.5}) == HyperParameters(gamma=1.5)
    with pytest.raises(ValueError, match="^run: .*gama"):
        HyperParameters.from_json({"gama": 1.5}, source="run")


def test_the_metric_that_chooses_the_best_epoch():
    assert HyperParameters().best_metric == "voc07"
    assert HyperParameters.from_json("{}").best_metric == "voc07"  # files written before
    for name in ("voc07", "voc", "coco"):
        assert HyperParameters.from_json(HyperParameters(best_metric=name).to_json()).best_metric == name
    for wrong in ("map", "VOC07", None, 1, float("nan")):
        with pytest.raises(ValueError, match="HyperParameters.best_metric"):
            HyperParameters(best_metric=wrong)


def test_a_text_is_told_from_a_number():
    with pytest.raises(ValueError, match="not '0.5'"):
        HyperParameters(gamma="0.5")


def body(model):
    """The weights that don't depend on the number of classes, by value."""
    return [numpy(w) for w in model.weights if w.shape[-1] not in (2 * 9, 5 * 9)]


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_weights_from_a_file(tmp_path, ending, capsys, caplog):
    hp = small(feature_size=24)
    old = excite(retinanet_model(2, hp), 2, feature_size=24, seed=3)
    path = tmp_path / f"old{ending}"
    old.save(path) if ending == ".keras" else old.save_weights(path)
    pictures = noise(1, (96, 96))
    same = retinanet_model(2, hp, weights=path)
    for name, value in old(pictures, training=False).items():
        np.testing.assert_array_equal(numpy(value), numpy(same(pictures, training=False)[name]))
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        other = retinanet_model(5, hp, weights=str(path))
    said = "".join(capsys.readouterr()) + " ".join(str(w.message) for w in told) + caplog.text
    assert "class" in said  # that the head starts afresh is said, however
    for a, b in zip(body(old), body(other), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        numpy(old(pictures, training=False)["regression"]),
        numpy(other(pictures, training=False)["regression"]),
    )
    p = sigmoid(numpy(other(pictures, training=False)["classification"]))
    assert p.shape[-1] == 5 and 0.005 < np.median(p) < 0.02


def test_training_reaches_every_weight():
    model = retinanet_model(3, small())
    assert model.trainable_weights
    pictures = noise(1, (128, 128)).astype("float32")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients with TensorFlow")
    import tensorflow as tf

    with tf.GradientTape() as tape:
        out = model(pictures, training=True)
        value = tf.reduce_sum(out["regression"] ** 2) + tf.reduce_sum(out["classification"] ** 2)
    for weight, slope in zip(
        model.trainable_weights, tape.gradient(value, [w.value for w in model.trainable_weights])
    ):
        assert slope is not None, weight.path


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_feature_sizes_of_every_backbone(name):
    images = keras.Input((None, None, 3))
    model = keras.Model(images, list(resnet50(images, name=name)))
    for height, width in ((240, 320), (333, 500)):
        features = model(noise(1, (height, width)), training=False)
        sizes = [tuple(f.shape[1:3]) for f in features]
        assert sizes == [(math.ceil(height / s), math.ceil(width / s)) for s in (8, 16, 32)]
        assert all(np.isfinite(numpy(f)).all() and numpy(f).std() > 0 for f in features)
    del model, features
    gc.collect()  # sixty million parameters at a time are enough


@pytest.mark.parametrize("stride_at, one, three", [(1, (2, 2), (1, 1)), (2, (1, 1), (2, 2))])
def test_where_a_stage_takes_its_stride(stride_at, one, three):
    network = bottleneck_network(stride_at=stride_at, blocks=(1, 1, 1, 1))
    assert network.get_layer("c3_1_1_conv").strides == one
    assert network.get_layer("c3_1_2_conv").strides == three
    with pytest.raises(ValueError, match="weights='coco'"):
        bottleneck_network("imagenet")


@pytest.mark.parametrize(
    "name, module",
    [
        ("resnet50", "resnet"),
        ("resnet101", "resnet"),
        ("resnet152", "resnet"),
        ("mobilenetv2", "mobilenet_v2"),
        ("mobilenetv3large", "mobilenet_v3"),
        ("mobilenetv3small", "mobilenet_v3"),
        ("efficientnetv2b0", "efficientnet_v2"),
        ("densenet121", "densenet"),
    ],
)
def test_every_backbone_has_its_own_preprocessing(name, module):
    pictures = noise(1, (32, 64)).astype("float32")
    images = keras.Input((None, None, 3))
    inside = next(
        layer
        for layer in keras.Model(images, list(resnet50(images, name="tiny"))).layers
        if isinstance(layer, Normalize)
    )
    found = numpy(type(inside)(BACKBONES[name].preprocess)(pictures))
    np.testing.assert_allclose(
        found, getattr(keras.applications, module).preprocess_input(pictures.copy()), atol=1e-5
    )


def test_padding_inside_does_not_depend_on_what_lies_outside(tiny):
    # 100 x 130 is padded to 128 x 160 with the mean colour; nothing of the picture is lost or moved
    picture = noise(1, (100, 130))
    changed = picture.copy()
    changed[0, 99, 129] = 255 - changed[0, 99, 129]
    a, b = (numpy(tiny(p, training=False)["regression"]) for p in (picture, changed))
    assert np.abs(a - b).max() > 0
