"""
keras-retinanet's network rebuilt from its definition with plain Keras layers (chapter 3.4).

Source: github.com/fizyr/keras-retinanet, `models/retinanet.py`, `models/resnet.py`, `utils/anchors.py`, and
github.com/broadinstitute/keras-resnet, `models/_2d.py` and `blocks/_2d.py`,
whose layer names are those of the files.
"""

import h5py
import numpy as np

from retinanet_nb.engine import keras, ops

layers = keras.layers


def backbone(x):
    "C3, C4 and C5 of normalised pictures."
    norm = lambda x, name: layers.BatchNormalization(epsilon=1e-5, name=name)(x)
    relu = lambda x: layers.Activation("relu")(x)
    conv = lambda x, n, k, name, stride=1: layers.Conv2D(n, k, strides=stride, use_bias=False, name=name)(x)
    x = layers.ZeroPadding2D(3)(x)
    x = relu(norm(conv(x, 64, 7, "conv1", 2), "bn_conv1"))
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    found = []
    for stage, count in enumerate((3, 4, 6, 3)):
        n = 64 * 2**stage
        for block in range(count):
            at = f"{stage + 2}{chr(ord('a') + block)}"
            stride = 2 if block == 0 and stage > 0 else 1
            y = relu(norm(conv(x, n, 1, f"res{at}_branch2a", stride), f"bn{at}_branch2a"))
            y = layers.ZeroPadding2D(1)(y)
            y = relu(norm(conv(y, n, 3, f"res{at}_branch2b"), f"bn{at}_branch2b"))
            y = norm(conv(y, 4 * n, 1, f"res{at}_branch2c"), f"bn{at}_branch2c")
            if block == 0:
                x = norm(conv(x, 4 * n, 1, f"res{at}_branch1", stride), f"bn{at}_branch1")
            x = relu(layers.Add()([y, x]))
        found.append(x)
    return found[1:]


def pyramid(c3, c4, c5):
    conv = lambda x, k, name, stride=1: layers.Conv2D(256, k, strides=stride, padding="same", name=name)(x)
    double = lambda x: layers.UpSampling2D(2, interpolation="nearest")(x)
    p5 = conv(c5, 1, "C5_reduced")
    p4 = layers.Add()([double(p5), conv(c4, 1, "C4_reduced")])
    p3 = layers.Add()([double(p4), conv(c3, 1, "C3_reduced")])
    p6 = conv(c5, 3, "P6", 2)
    p7 = conv(layers.Activation("relu")(p6), 3, "P7", 2)
    return [conv(p3, 3, "P3"), conv(p4, 3, "P4"), conv(p5, 3, "P5"), p6, p7]


def submodel(kind, values):
    x = inputs = keras.Input((None, None, 256))
    for i in range(4):
        x = layers.Conv2D(256, 3, padding="same", activation="relu", name=f"pyramid_{kind}_{i}")(x)
    x = layers.Conv2D(9 * values, 3, padding="same", name=f"pyramid_{kind}")(x)
    x = layers.Reshape((-1, values))(x)
    if kind == "classification":
        x = layers.Activation("sigmoid")(x)
    return keras.Model(inputs, x, name=f"{kind}_submodel")


def network(num_classes, seed=0):
    "The training model with seeded weights: BGR pictures less the mean → (deltas, probabilities)."
    inputs = keras.Input((None, None, 3))
    levels = pyramid(*backbone(inputs))
    parts = submodel("regression", 4), submodel("classification", num_classes)
    joined = [layers.Concatenate(axis=1)([part(level) for level in levels]) for part in parts]
    model = keras.Model(inputs, joined, name="retinanet")
    rng = np.random.default_rng(seed)
    for v in model.weights:
        x = rng.standard_normal(tuple(v.shape), dtype="float32")
        layer, part = v.path.split("/")[-2:]
        if part == "kernel":
            last = {"conv1": 0.01, "pyramid_classification": 0.2, "pyramid_regression": 0.2}.get(layer, 1.0)
            x *= last * (2 / np.prod(v.shape[:3])) ** 0.5
        elif part == "moving_variance":
            x = np.exp(x)
        elif part == "gamma":
            x = (0.3 if "2c" in layer else 0.8) * (1 + 0.2 * x)
        else:
            x = 0.1 * x - 4.5 * (layer == "pyramid_classification")
        v.assign(x)
    return model


def save(model, path):
    "The weights as Keras 2 wrote them with `model.save('….h5')`."
    with h5py.File(path, "w") as file:
        top = file.create_group("model_weights")
        for v in model.weights:
            layer, part = v.path.split("/")[-2:]
            group = "classification_submodel" if "classification" in layer else layer
            group = "regression_submodel" if "regression" in layer else group
            top[f"{group}/{layer}/{part}:0"] = np.asarray(ops.convert_to_numpy(v))


def decoded(anchors, deltas, size):
    "Their boxes: edges moved by deltas · 0.2 of the anchor's width and height, cut to the picture."
    w, h = (anchors[:, 2] - anchors[:, 0])[:, None], (anchors[:, 3] - anchors[:, 1])[:, None]
    boxes = anchors + 0.2 * deltas * np.concatenate([w, h, w, h], 1)
    return boxes.clip(0, [size[1], size[0]] * 2)
