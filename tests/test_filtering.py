"""Filtering against the sequential algorithm: exactly the same set, for ties, chains, cuts and batches of different pictures.

Boxes have small whole coordinates and scores are sixteenths or whole thousandths, so that every comparison with a threshold is exact in
float32 and in float64 and no case is decided by rounding.
"""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import oracles
from helpers import numpy
from retinanet_nb.anchors import AnchorGenerator
from retinanet_nb.filtering import (
    BLOCK,
    DetectionFilter,
    FilterDetections,
    filter_detections,
    non_max_suppression,
)
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters

OPTIONS = dict(score_threshold=0.25, nms_threshold=0.5, pre_nms_top_k=200, max_detections=100)


@functools.cache
def compiled(options):
    """`filter_detections` as one graph where the engine has graphs, so that hundreds of examples take seconds."""

    def run(boxes, scores):
        return filter_detections(boxes, scores, **dict(options))

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(run, reduce_retracing=False)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(run)
    return run


def run(boxes, scores, **options):
    options = {**OPTIONS, **options}
    found = compiled(tuple(sorted(options.items())))(
        np.asarray(boxes, "float32"), np.asarray(scores, "float32")
    )
    found = [numpy(x) for x in found]
    batch, d = len(boxes), options["max_detections"]
    assert [x.shape for x in found] == [(batch, d, 4), (batch, d), (batch, d)]
    assert [str(x.dtype) for x in found] == ["float32", "float32", "int32"]
    for box, score, label in zip(*found):
        n = (label >= 0).sum()
        assert (label[n:] == -1).all() and (score[n:] == -1).all() and (box[n:] == -1).all()
        assert (np.diff(score[:n]) <= 0).all() and (score[:n] > options["score_threshold"]).all()
    return found


def expected(boxes, scores, **options):
    options = {**OPTIONS, **options}
    options["nms_on"] = options.pop("nms", True)
    return oracles.filter_batch(np.asarray(boxes, "float32"), np.asarray(scores, "float32"), **options)


def check(boxes, scores, **options):
    """The same detections in the same order."""
    found, wanted = run(boxes, scores, **options), expected(boxes, scores, **options)
    np.testing.assert_array_equal(found[2], wanted[2])
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-4)
    return found


def as_sets(result):
    """Detections of every picture in an order of their own: for ties, whose order is free between classes."""
    return [
        sorted((float(s), int(k), *map(float, box)) for box, s, k in zip(*picture) if k >= 0)
        for picture in zip(*result)
    ]


def pictures(rng, batch=2, n=24, k=3, span=30):
    """Whole-number boxes that overlap often; distinct scores, in thousandths."""
    xy, wh = rng.integers(0, span, (batch, n, 2)), rng.integers(1, span, (batch, n, 2))
    scores = np.stack([rng.permutation(1000)[: n * k].reshape(n, k) for _ in range(batch)]) / 1024
    return np.concatenate([xy, xy + wh], -1).astype("float32"), scores.astype("float32")


def chain(n, width=30, step=8):
    """Boxes in a row; each overlaps its neighbours by more than half, the next but one by less."""
    x = np.arange(n) * step
    return np.stack([x, np.zeros(n), x + width, np.full(n, 20)], 1).astype("float32")


whole_boxes = arrays("int64", (2, 24, 4), elements=st.integers(1, 30)).map(
    lambda b: np.concatenate([b[..., :2], b[..., :2] + b[..., 2:]], -1).astype("float32")
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    boxes=whole_boxes,
    sixteenths=arrays("int64", (2, 24, 3), elements=st.integers(0, 16)),
    specific=st.booleans(),
    threshold=st.sampled_from([0.25, 0.5]),
)
def test_ties_and_all(boxes, sixteenths, specific, threshold):
    scores = (sixteenths / 16).astype("float32")
    options = dict(class_specific_filter=specific, nms_threshold=threshold)
    found = run(boxes, scores, **options)
    assert as_sets(found) == as_sets(expected(boxes, scores, **options))
    for box, score, label in zip(*found):
        n = (label >= 0).sum()
        for i in range(n):
            for j in range(i):
                if label[i] == label[j] or not specific:
                    assert oracles.iou(box[i].astype("float64"), box[j].astype("float64")) <= threshold


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    specific=st.booleans(),
    cut=st.sampled_from(
        [
            dict(pre_nms_top_k=20),
            dict(max_detections=5),
            dict(pre_nms_top_k=7, max_detections=3),
            dict(score_threshold=0.5),
        ]
    ),
)
def test_cuts(seed, specific, cut):
    check(*pictures(np.random.default_rng(seed)), class_specific_filter=specific, **cut)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_pictures_permutes_the_results(seed):
    rng = np.random.default_rng(seed)
    boxes, scores = pictures(rng, batch=4)
    scores[1] *= 0.2  # nothing above the threshold
    order = rng.permutation(4)
    found, again = run(boxes, scores), run(boxes[order], scores[order])
    for a, b in zip(found, again):
        np.testing.assert_array_equal(a[order], b)


def test_a_picture_does_not_depend_on_its_neighbours():
    boxes, scores = pictures(np.random.default_rng(0), batch=3)
    together = run(boxes, scores)
    for b in range(3):
        for whole, part in zip(together, run(boxes[b : b + 1], scores[b : b + 1])):
            np.testing.assert_array_equal(whole[b : b + 1], part)


@pytest.mark.parametrize("n", [32, 33, 64, 150])
@pytest.mark.parametrize("scores", ["falling", "rising", "random", "inward"])
def test_long_chains(n, scores):
    order = {
        "falling": np.arange(n)[::-1],
        "rising": np.arange(n),
        "random": np.random.default_rng(n).permutation(n),
        "inward": np.abs(np.arange(n) * 2 - n),
    }[scores]
    values = (0.3 + order / 1024).astype("float32")[None, :, None]
    found = check(chain(n)[None], values)
    if scores in ("falling", "rising"):
        assert (found[2] >= 0).sum() == -(-n // 2)  # every other one


def test_a_chain_through_classes():
    n = 64
    values = np.zeros((1, n, 4), "float32")
    order = np.random.default_rng(1).permutation(n)
    values[0, np.arange(n), np.arange(n) % 4] = 0.3 + order / 1024
    assert (check(chain(n)[None], values)[2] >= 0).sum() == n  # neighbours are of different classes
    assert (check(chain(n)[None], values, class_specific_filter=False)[2] >= 0).sum() < n


def test_identical_boxes():
    boxes = np.tile(np.array([5, 5, 20, 20], "float32"), (1, 40, 1))
    scores = np.full((1, 40, 2), 0.5, "float32")
    found = run(boxes, scores)
    assert sorted(found[2][0][found[2][0] >= 0]) == [0, 1]  # one of each class
    found = run(boxes, scores, class_specific_filter=False)
    assert (found[2] >= 0).sum() == 1
    found = run(boxes, scores, nms=False)
    assert (found[2] >= 0).sum() == 80


def test_equal_scores_keep_the_first_of_a_class():
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 0, 60, 10]]], "float32")
    found = run(boxes, np.full((1, 4, 1), 0.5, "float32"))
    assert as_sets(found) == [[(0.5, 0, 0, 0, 10, 10), (0.5, 0, 50, 0, 60, 10)]]


def test_thresholds_are_strict_and_exact():
    boxes = np.array(
        [[[0, 0, 10, 10], [0, 0, 10, 5], [30, 0, 40, 10], [30, 0, 40, 6]]], "float32"
    )  # IoU 0.5 and 0.6
    scores = np.array([[[0.75], [0.5], [0.75], [0.5]]], "float32")
    assert (check(boxes, scores)[2] >= 0).sum() == 3  # 0.5 is not above 0.5, 0.6 is
    assert (check(boxes, scores, score_threshold=0.5)[2] >= 0).sum() == 2  # 0.5 is not above 0.5
    assert (check(boxes, scores, nms_threshold=0.75)[2] >= 0).sum() == 4


def test_without_suppression():
    boxes, scores = pictures(np.random.default_rng(2))
    for specific in (True, False):
        check(boxes, scores, nms=False, class_specific_filter=specific)
        check(boxes, scores, nms=False, class_specific_filter=specific, max_detections=4)


def test_classes_suppress_each_other_only_when_asked():
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9]]], "float32")
    scores = np.array([[[0.9, 0.4], [0.3, 0.8]]], "float32")
    assert [(round(float(s), 1), k) for s, k in zip(*[x[0, :3] for x in check(boxes, scores)[1:]])] == [
        (0.9, 0),
        (0.8, 1),
        (-1.0, -1),
    ]
    found = check(boxes, scores, class_specific_filter=False)
    assert list(found[2][0, :2]) == [0, -1]
    # an anchor may speak for two classes, but with class_specific_filter=False only for its best
    apart = np.array([[[0, 0, 10, 10], [50, 0, 60, 10]]], "float32")
    assert (check(apart, scores)[2] >= 0).sum() == 4
    assert (check(apart, scores, class_specific_filter=False)[2] >= 0).sum() == 2


def test_nothing_above_the_threshold():
    boxes, scores = pictures(np.random.default_rng(3))
    for specific in (True, False):
        for nms in (True, False):
            found = run(boxes, scores * 0.1, class_specific_filter=specific, nms=nms)
            assert all((x == -1).all() for x in found)


@pytest.mark.parametrize("n, k", [(1, 1), (3, 2), (5, 1)])
def test_fewer_candidates_than_the_limits(n, k):
    boxes, scores = pictures(np.random.default_rng(4), n=n, k=k)
    check(boxes, scores)
    check(boxes, scores, class_specific_filter=False)
    check(boxes, scores, pre_nms_top_k=1000, max_detections=300)
    check(boxes, scores, pre_nms_top_k=2, max_detections=300)
    check(boxes, scores, nms=False)


def test_pictures_of_one_batch_that_differ():
    boxes, scores = pictures(np.random.default_rng(5), batch=5, n=40)
    boxes[1], scores[1] = chain(40), 0
    scores[1, :, 2] = np.linspace(0.3, 0.9, 40)
    scores[2] = 0
    scores[3, 1:] = 0
    scores[3, 0] = (0.1, 0.875, 0.2)
    boxes[4], scores[4] = boxes[4, :1], 0.5
    found, wanted = run(boxes, scores), expected(boxes, scores)
    assert as_sets(found) == as_sets(wanted)
    assert [(label >= 0).sum() for label in found[2]][1:] == [20, 0, 1, 3]


def test_many_classes_far_from_the_origin():
    # offsets per class, a usual trick, lose the pixels in float32 here
    rng = np.random.default_rng(6)
    boxes, scores = pictures(rng, n=12, k=80)
    boxes += 4000
    check(boxes, scores, pre_nms_top_k=1000, max_detections=300)


def test_scores_and_boxes_of_a_real_size():
    rng = np.random.default_rng(7)
    centre, side = rng.uniform(0, 500, (2, 1500, 2)), rng.uniform(10, 200, (2, 1500, 2))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], -1).astype("float32")
    scores = (rng.uniform(0, 1, (2, 1500, 5)) ** 4).astype("float32")
    defaults = dict(score_threshold=0.05, nms_threshold=0.5, pre_nms_top_k=1000, max_detections=300)
    check(boxes, scores, **defaults)
    check(boxes, scores, class_specific_filter=False, **defaults)


def test_the_defaults_are_the_documented_ones():
    rng = np.random.default_rng(8)
    boxes, scores = pictures(rng, n=24, k=3)
    scores = scores * 0.2
    found = [numpy(x) for x in filter_detections(boxes, scores)]
    wanted = oracles.filter_batch(
        boxes, scores, score_threshold=0.05, nms_threshold=0.5, pre_nms_top_k=1000, max_detections=300
    )
    assert found[0].shape == (2, 300, 4)
    np.testing.assert_array_equal(found[2], wanted[2])
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="compiles with TensorFlow")
def test_under_xla():
    import tensorflow as tf

    boxes, scores = pictures(np.random.default_rng(9))
    jitted = tf.function(lambda b, s: filter_detections(b, s, **OPTIONS), jit_compile=True)
    for a, b in zip(jitted(boxes, scores), run(boxes, scores)):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6)


# ---- blocks of candidates


def sequential(boxes, scores, labels, threshold, limit):
    """The sequential algorithm, one candidate after the other, in NumPy: (B, limit), -1 where no more are kept."""
    found = np.full((len(boxes), limit), -1)
    for picture, (b, s, k) in enumerate(zip(boxes.astype("float64"), scores, labels)):
        kept = []
        for i in np.argsort(-s, kind="stable"):
            if s[i] < 0 or len(kept) == limit:
                break
            of = [j for j in kept if k[j] == k[i]]
            width, height = np.minimum(b[i, 2:], b[of, 2:]).T - np.maximum(b[i, :2], b[of, :2]).T
            shared = np.clip(width, 0, None) * np.clip(height, 0, None)
            area = [(b[j, 2] - b[j, 0]) * (b[j, 3] - b[j, 1]) for j in (i, *of)]
            if not (shared > threshold * (area[0] + area[1:] - shared)).any():
                kept.append(i)
        found[picture, : len(kept)] = kept
    return found


def crowd(rng, n, kind):
    """Three pictures of n candidates: boxes on whole pixels, scores with many ties, some below 0."""
    xy, wh = rng.integers(0, 60, (3, n, 2)), rng.integers(1, 40, (3, n, 2))
    boxes = np.concatenate([xy, xy + wh], -1).astype("float32")
    scores = (rng.integers(-4, 20, (3, n)) / 32).astype("float32")
    if kind == "chains":
        boxes[:] = chain(n)
        scores[0], scores[1] = np.arange(n, 0, -1) / 1024, np.arange(n) / 1024
    if kind == "heaps":  # every block full of copies of boxes that were kept long ago
        boxes = boxes[:, rng.integers(0, min(n, 9), n)]
    if kind == "uneven":  # one picture is finished at once, one never begins
        scores[0, 5:], scores[1] = -1, -1
    return boxes, scores, rng.integers(0, 3, (3, n))


@pytest.mark.parametrize("kind", ["random", "chains", "heaps", "uneven"])
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 500])
def test_blocks_give_what_the_sequential_algorithm_gives(kind, n):
    for seed, limit in enumerate((1, 7, BLOCK, 300)):
        rng = np.random.default_rng([seed, n])
        boxes, scores, labels = crowd(rng, n, kind)
        threshold = (0.25, 0.5, 0.75)[seed % 3]
        found = numpy(non_max_suppression(boxes, scores, labels, threshold, limit))
        np.testing.assert_array_equal(found, sequential(boxes, scores, labels, threshold, limit))


def test_all_scores_of_a_large_picture_above_the_threshold():
    rng = np.random.default_rng(0)
    xy, wh = rng.integers(0, 400, (1, 49104, 2)), rng.integers(10, 100, (1, 49104, 2))
    boxes = np.concatenate([xy, xy + wh], -1).astype("float32")
    # each score once, so that the best thousand are the same everywhere
    scores = (rng.permutation(49104 * 20).reshape(1, 49104, 20) + 2**17) / 2**21
    scores = scores.astype("float32")
    found = run(boxes, scores, score_threshold=0.05, pre_nms_top_k=1000, max_detections=300)
    best = np.argsort(-scores.ravel())[:1000]
    kept = sequential(boxes[:, best // 20], scores.reshape(1, -1)[:, best], best[None] % 20, 0.5, 300)[0]
    kept = best[kept[kept >= 0]]
    assert scores.min() > 0.05 and len(kept) == 300
    np.testing.assert_array_equal(found[0][0], boxes[0, kept // 20])
    np.testing.assert_array_equal(found[1][0], scores.ravel()[kept])
    np.testing.assert_array_equal(found[2][0], kept % 20)


# ---- candidates level by level


def by_level(boxes, scores, sizes, k, **options):
    """The sequential algorithm on what each level's best k leave: all other scores are wiped out first."""
    scores, start = scores.copy(), 0
    for size in sizes:
        rows = scores[:, start : start + size].reshape(len(scores), -1)
        if not options.get("class_specific_filter", True):
            rows = scores[:, start : start + size].max(-1)
        for b, row in enumerate(rows):
            # of equals the first stay, as everywhere
            gone = np.argsort(-row, kind="stable")[k:]
            answers = scores[b, start : start + size].reshape(len(row), -1)
            answers[gone] = 0
            scores[b, start : start + size] = answers.reshape(size, -1)
        start += size
    return expected(boxes, scores, pre_nms_top_k=10_000, **options)


@pytest.mark.parametrize("specific", [True, False])
@pytest.mark.parametrize("k", [1, 3, 500])
def test_each_level_sends_its_own_candidates(specific, k):
    rng, sizes = np.random.default_rng(3), (20, 9, 4, 2, 1)
    xy = rng.integers(0, 30, (6, 36, 2))
    boxes = np.concatenate([xy, xy + rng.integers(4, 20, (6, 36, 2))], -1).astype("float32")
    scores = (rng.permutation(6 * 36 * 3).reshape(6, 36, 3) / 1024).astype("float32")
    options = dict(class_specific_filter=specific, max_detections=40)
    found = run(boxes, scores, pre_nms_top_k=k, level_sizes=sizes, **options)
    for a, b in zip(found, by_level(boxes, scores, sizes, k, **options)):
        np.testing.assert_array_equal(a, b)
    # all at once is another list wherever the bound bites, and the same where it doesn't
    together = run(boxes, scores, pre_nms_top_k=k, **options)
    assert all(np.array_equal(a, b) for a, b in zip(found, together)) == (k == 500)


def test_a_crowd_of_small_ones_does_not_push_out_the_large_one():
    boxes = np.concatenate([np.arange(20)[:, None] * 8 + np.array([0, 0, 6, 6]), [[0, 0, 160, 100]]])
    scores = np.array([0.75] * 20 + [0.5])[:, None]
    for sizes, there in (((20, 1), True), (None, False)):
        found = run(boxes[None], scores[None], pre_nms_top_k=10, level_sizes=sizes)
        assert (found[1][0] == 0.5).any() == there
        assert (found[1][0] == 0.75).sum() == 10


def test_the_layer_knows_the_levels_of_any_picture():
    anchors, rng = AnchorParameters(ratios=(1,), scales=(1,)), np.random.default_rng(0)
    options = dict(pre_nms_top_k=5, max_detections=30, score_threshold=0.25)
    layer = FilterDetections(**options, levels=anchors)
    inputs = [keras.Input((None, 4)), keras.Input((None, 2)), keras.Input((None, None, 3))]
    model = keras.Model(inputs, layer(inputs))
    copy = keras.Model.from_config(model.get_config(), {"FilterDetections": FilterDetections})
    for shape in ((64, 96), (40, 130)):
        sizes = AnchorGenerator(anchors).level_sizes(shape)
        xy = rng.integers(0, 90, (2, sum(sizes), 2))
        boxes = np.concatenate([xy, xy + 12], -1).astype("float32")
        scores = rng.random((2, sum(sizes), 2)).astype("float32")
        wanted = filter_detections(boxes, scores, **options, level_sizes=sizes)
        for each in (model, copy):
            found = each.predict_on_batch([boxes, scores, np.zeros((2, *shape, 3), "float32")])
            for a, b in zip(found, wanted):
                np.testing.assert_array_equal(numpy(a), numpy(b))


def test_the_filter_of_hyperparameters():
    h = HyperParameters(score_threshold=0.25, nms_threshold=0.75, pre_nms_top_k=7, max_detections=9)
    found = DetectionFilter.of(h.replace(top_k_per_level=True), nms=False)
    assert found == DetectionFilter(True, False, 0.25, 0.75, 7, 9, True)
    boxes, scores = np.zeros((1, 4, 4), "float32"), np.full((1, 4, 1), 0.5, "float32")
    plain = DetectionFilter.of(h)
    # without top_k_per_level the levels don't count
    for a, b in zip(plain(boxes, scores, (2, 2)), plain(boxes, scores)):
        np.testing.assert_array_equal(numpy(a), numpy(b))
