"""Mistakes a person makes end in one clear sentence that names the culprit."""

import keras
import numpy as np
import pytest

from helpers import noise, small
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.retinanet_box import detect, retinanet_box


def says(error, *words):
    """The message holds the words, is no essay and no dump."""
    text = str(error.value)
    assert 10 < len(text) < 600 and text.count("\n") <= 2, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", None])
def test_number_of_classes(count):
    with pytest.raises((ValueError, TypeError)) as error:
        retinanet_model(count, small())
    says(error, "num_classes", str(count))


def test_class_names_of_another_number():
    with pytest.raises(ValueError) as error:
        retinanet_model(3, small(), class_names=("ball", "brick"))
    says(error, "3", "brick")


def test_unknown_backbone():
    with pytest.raises(ValueError) as error:
        retinanet_model(2, small(backbone="resnet51"))
    says(error, "resnet51", "resnet50")


def test_imagenet_without_a_network(monkeypatch, tmp_path):
    import socket

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, unreachable)
    monkeypatch.setattr(
        "keras.src.backend.config._KERAS_DIR", str(tmp_path)
    )  # no weights from an earlier day
    with pytest.raises((ValueError, OSError, RuntimeError)) as error:
        retinanet_model(
            2, HyperParameters(backbone="resnet50", feature_size=16, subnet_depth=1), weights="imagenet"
        )
    says(error, "ImageNet", "resnet50", "no network")


def test_weights_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        retinanet_model(2, small(), weights=tmp_path / "nowhere.keras")
    says(error, "nowhere.keras")
    for name in ("text.keras", "text.weights.h5"):
        (tmp_path / name).write_text("this is no model")
        with pytest.raises(ValueError) as error:
            retinanet_model(2, small(), weights=str(tmp_path / name))
        says(error, name)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        retinanet_model(2, small(), weights="imagenette")
    says(error, "imagenette")


def test_weights_of_another_network(tmp_path):
    retinanet_model(2, small(feature_size=16)).save(tmp_path / "narrow.keras")
    with pytest.raises(ValueError) as error:
        retinanet_model(2, small(feature_size=24), weights=tmp_path / "narrow.keras")
    says(error, "narrow.keras")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(ValueError) as error:
        retinanet_model(2, small(), weights=tmp_path / "other.keras")
    says(error, "other.keras")


def test_pictures_of_the_wrong_rank():
    box = retinanet_box(retinanet_model(2, small()))
    for picture in (
        np.zeros((64, 64), "uint8"),
        np.zeros((1, 1, 64, 64, 3), "uint8"),
        np.zeros((64, 64, 4), "uint8"),
        np.zeros(3),
    ):
        with pytest.raises(ValueError) as error:
            detect(box, picture)
        says(error, str(picture.shape[0]))
    with pytest.raises(ValueError):
        detect(box, [noise(1, (64, 64))[0], np.zeros((64, 64), "uint8")])
    with pytest.raises((ValueError, TypeError)):
        detect(box, [noise(1, (64, 64))[0], None])
    with pytest.raises(FileNotFoundError, match="cat.jpg"):
        detect(box, ["cat.jpg", None])
    with pytest.raises((ValueError, TypeError)):
        detect(box, None)


def test_not_a_retinanet():
    other = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 1)])
    with pytest.raises((ValueError, TypeError)) as error:
        retinanet_box(other)
    says(error)


@pytest.mark.parametrize(
    "bad",
    [
        dict(image_size=(0, 512)),
        dict(image_size=(512,)),
        dict(feature_size=0),
        dict(subnet_depth=-1),
        dict(prior_probability=0.0),
        dict(prior_probability=1.0),
        dict(prior_probability=-0.5),
        dict(box_std=(0.1, 0.1, 0.2)),
        dict(box_std=(0.1, 0.1, 0.0, 0.2)),
        dict(negative_overlap=0.6, positive_overlap=0.5),
        dict(positive_overlap=1.5),
        dict(alpha=1.5),
        dict(gamma=-1.0),
        dict(sigma=0.0),
        dict(score_threshold=1.5),
        dict(nms_threshold=-0.1),
        dict(pre_nms_top_k=0),
        dict(max_detections=0),
        dict(optimizer="adamant"),
        dict(learning_rate=0.0),
    ],
    ids=str,
)
def test_hyperparameters(bad):
    with pytest.raises((ValueError, TypeError)) as error:
        HyperParameters(**bad)
    says(error, next(iter(bad)))
    with pytest.raises((ValueError, TypeError)):
        HyperParameters().replace(**bad)


def test_hyperparameters_that_do_not_exist():
    for make in (
        lambda: HyperParameters(feature_sise=64),
        lambda: HyperParameters().replace(feature_sise=64),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            make()
        says(error, "feature_sise")


@pytest.mark.parametrize(
    "bad",
    [
        dict(sizes=(32, 64, 128)),
        dict(strides=(8, 16)),
        dict(ratios=()),
        dict(scales=(1, 0)),
        dict(ratios=(-1, 1)),
        dict(sizes=(0, 64, 128, 256, 512)),
    ],
    ids=str,
)
def test_anchor_parameters(bad):
    with pytest.raises((ValueError, TypeError)) as error:
        AnchorParameters(**bad)
    says(error)


def test_thresholds_of_a_detector():
    model = retinanet_model(2, small())
    for bad in (dict(score_threshold=1.5), dict(nms_threshold=-0.1), dict(max_detections=0)):
        with pytest.raises(ValueError) as error:
            retinanet_box(model, **bad)
        says(error, next(iter(bad)))
