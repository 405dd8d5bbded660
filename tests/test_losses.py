"""Both losses against plain loops, at the edges of floating point, and their gradients."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import oracles
from helpers import numpy
from retinanet_nb.losses import focal_loss, smooth_l1_loss


def batch(seed, b=2, n=30, k=4, spread=4.0):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-2, k, (b, n)).astype("int32")
    return classes, rng.normal(0, spread, (b, n, k)).astype("float32")


def gradient(loss, x):
    """The gradient of a scalar function at `x` on whichever engine runs."""
    engine = keras.backend.backend()
    if engine == "tensorflow":
        import tensorflow as tf

        x = tf.Variable(x)
        with tf.GradientTape() as tape:
            value = loss(x)
        return tape.gradient(value, x).numpy()
    if engine == "jax":
        import jax

        return np.asarray(jax.grad(loss)(x))
    import torch

    x = torch.tensor(x, requires_grad=True)
    loss(x).backward()
    return x.grad.numpy()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    alpha=st.sampled_from([0.25, 0.5, 0.9]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
)
def test_focal_loss(seed, alpha, gamma):
    classes, logits = batch(seed)
    found = numpy(focal_loss(alpha, gamma)(classes, logits))
    assert found.shape == ()
    np.testing.assert_allclose(found, oracles.focal(classes, logits, alpha, gamma), rtol=1e-4)


def test_focal_loss_of_one_anchor_by_hand():
    p = 0.2
    logit = float(np.log(p / (1 - p)))
    hard = numpy(focal_loss(0.25, 2.0)(np.array([[0]]), np.array([[[logit]]], "float32")))
    np.testing.assert_allclose(hard, 0.25 * 0.8**2 * -np.log(0.2), rtol=1e-5)
    easy = numpy(focal_loss(0.25, 2.0)(np.array([[-1]]), np.array([[[logit]]], "float32")))
    np.testing.assert_allclose(easy, 0.75 * 0.2**2 * -np.log(0.8), rtol=1e-5)


def test_gamma_zero_is_cross_entropy():
    classes, logits = batch(1)
    found = numpy(focal_loss(None, 0.0)(classes, logits))
    keep = classes != -2
    targets = np.eye(4)[np.maximum(classes, 0)] * (classes >= 0)[..., None]
    p = 1 / (1 + np.exp(-logits.astype("float64")))
    entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    np.testing.assert_allclose(found, entropy[keep].sum() / (classes >= 0).sum(), rtol=1e-5)
    np.testing.assert_allclose(found, oracles.focal(classes, logits, None, 0.0), rtol=1e-5)


def test_huge_logits():
    classes = np.array([[0, 0, -1, -1, -2]])
    logits = np.array([[[1e4], [-1e4], [1e4], [-1e4], [1e4]]], "float32")
    found = numpy(focal_loss(0.25, 2.0)(classes, logits))
    # the right ones cost nothing, the wrong ones |x|, weighted, over two positives
    np.testing.assert_allclose(found, (0.25 * 1e4 + 0.75 * 1e4) / 2, rtol=1e-5)
    for gamma in (0.0, 0.5, 2.0):
        slope = gradient(lambda x: focal_loss(0.25, gamma)(classes, x), logits)
        assert np.isfinite(slope).all(), gamma
    np.testing.assert_allclose(slope.ravel(), [0, -0.125, 0.375, 0, 0], atol=1e-5)


def test_focal_gradient_is_that_of_the_formula():
    classes, logits = batch(2, b=1, n=6, k=3, spread=2.0)
    slope = gradient(lambda x: focal_loss(0.25, 2.0)(classes, x), logits)
    step = 1e-5
    for index in np.ndindex(logits.shape):
        up, down = logits.astype("float64"), logits.astype("float64")
        up[index] += step
        down[index] -= step
        expected = (oracles.focal(classes, up) - oracles.focal(classes, down)) / (2 * step)
        np.testing.assert_allclose(slope[index], expected, rtol=1e-3, atol=1e-6)


def test_ignored_anchors_count_nowhere():
    classes, logits = batch(3)
    targets, deltas = np.random.default_rng(3).normal(size=(2, 2, 30, 4)).astype("float32")
    ignored = classes == -2
    assert ignored.any()
    other, other_deltas = logits.copy(), deltas.copy()
    other[ignored] = 1e3
    other_deltas[ignored] = -1e3
    focal, smooth = focal_loss(0.25, 2.0), smooth_l1_loss(3.0)
    np.testing.assert_allclose(numpy(focal(classes, logits)), numpy(focal(classes, other)), rtol=1e-6)
    np.testing.assert_allclose(
        numpy(smooth(classes, targets, deltas)), numpy(smooth(classes, targets, other_deltas)), rtol=1e-6
    )
    assert (gradient(lambda x: focal(classes, x), logits)[ignored] == 0).all()
    assert (gradient(lambda x: smooth(classes, targets, x), deltas)[classes < 0] == 0).all()


def test_a_batch_without_objects():
    logits = np.random.default_rng(4).normal(size=(2, 10, 3)).astype("float32")
    deltas = np.ones((2, 10, 4), "float32")
    background, ignored = np.full((2, 10), -1), np.full((2, 10), -2)
    np.testing.assert_allclose(
        numpy(focal_loss(0.25, 2.0)(background, logits)), oracles.focal(background, logits), rtol=1e-5
    )
    assert numpy(focal_loss(0.25, 2.0)(ignored, logits)) == 0
    for classes in (background, ignored):
        assert numpy(smooth_l1_loss(3.0)(classes, np.zeros_like(deltas), deltas)) == 0
    assert np.isfinite(gradient(lambda x: focal_loss(0.25, 2.0)(background, x), logits)).all()


def test_the_divisor_is_the_positives_of_the_whole_batch():
    classes, logits = batch(5, b=3)
    positives = (classes >= 0).sum()
    whole = numpy(focal_loss(0.25, 2.0)(classes, logits)) * positives
    parts = [
        numpy(focal_loss(0.25, 2.0)(classes[b : b + 1], logits[b : b + 1])) * max((classes[b] >= 0).sum(), 1)
        for b in range(3)
    ]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sigma=st.sampled_from([1.0, 3.0, 0.5]),
    spread=st.sampled_from([0.05, 0.5, 5.0]),
)
def test_smooth_l1(seed, sigma, spread):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-2, 4, (2, 30)).astype("int32")
    targets, deltas = rng.normal(0, spread, (2, 2, 30, 4)).astype("float32")
    found = numpy(smooth_l1_loss(sigma)(classes, targets, deltas))
    assert found.shape == ()
    np.testing.assert_allclose(
        found, oracles.smooth_l1(classes, targets, deltas, sigma), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_smooth_l1_by_hand(sigma):
    edge = 1 / sigma**2
    for d, expected in (
        (edge / 2, 0.5 * (sigma * edge / 2) ** 2),
        (edge, edge - 0.5 * edge),
        (2.0, 2.0 - 0.5 * edge),
        (0.0, 0.0),
    ):
        for sign in (1, -1):
            deltas = np.array([[[sign * d, 0, 0, 0]]], "float32")
            found = numpy(smooth_l1_loss(sigma)(np.array([[2]]), np.zeros((1, 1, 4), "float32"), deltas))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_smooth_l1_gradient():
    classes = np.array([[0, 1, -1, -2]])
    deltas = np.array([[[0.05, -0.05, 3, -3], [0, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9]]], "float32")
    slope = gradient(lambda x: smooth_l1_loss(3.0)(classes, np.zeros_like(deltas), x), deltas)
    np.testing.assert_allclose(slope[0, 0], np.array([9 * 0.05, -9 * 0.05, 1, -1]) / 2, rtol=1e-5)
    assert (slope[0, 1:] == 0).all()


def test_garbage_targets_of_background_do_no_harm():
    classes = np.array([[0, -1]])
    targets = np.array([[[0, 0, 0, 0], [1e30, -1e30, 1e30, 0]]], "float32")
    deltas = np.zeros_like(targets)
    assert numpy(smooth_l1_loss(3.0)(classes, targets, deltas)) == 0
