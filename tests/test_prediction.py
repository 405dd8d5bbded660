"""Many pictures: in order, ahead of need but not too far, one shape for the network, and one bad file stops only itself."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from retinanet_nb.pictures import write_image
from retinanet_nb.prediction import (
    canvas_size,
    in_order,
    predict,
    predict_dataset,
    predict_with_pictures,
)


class Mean:
    "Finds one box over the whole canvas, whose score is the picture's brightness."

    hyperparameters = SimpleNamespace(image_size=(32, 64))

    def __init__(self):
        self.shapes = []

    def predict_on_batch(self, images):
        self.shapes.append(images.shape)
        boxes = np.full((len(images), 2, 4), -1.0)
        boxes[:, 0] = (0, 0, 64, 32)
        scores = np.stack([images.mean((1, 2, 3)) / 255, np.full(len(images), -1.0)], 1)
        return boxes, scores, np.tile([3, -1], (len(images), 1))


@pytest.fixture
def files(tmp_path):
    "Eleven pictures of rising brightness, the fifth of which is none."
    paths = []
    for k in range(11):
        paths.append(write_image(tmp_path / f"{k:02d}.png", np.full((64, 128, 3), 20 * k, np.uint8)))
    paths[4].write_bytes(b"no picture")
    return paths


def test_order_shape_and_boxes_at_home(files):
    detector = Mean()
    found = list(predict(detector, files, batch_size=4))
    assert [path for path, _ in found] == files and isinstance(found[4][1], ValueError)
    scores = [f.scores[0] for k, (_, f) in enumerate(found) if k != 4]
    assert np.allclose(scores, [20 * k / 255 for k in range(11) if k != 4])
    for k, (_, f) in enumerate(found):
        if k != 4:  # twice as large as the canvas, and padding is gone
            assert f.boxes.tolist() == [[0, 0, 128, 64]] and f.labels.tolist() == [3]
    # ten pictures in batches of four: the last one filled up
    assert detector.shapes == [(4, 32, 64, 3)] * 3


def test_pictures_come_along_where_they_are_wanted(files):
    for k, (path, image, found) in enumerate(predict_with_pictures(Mean(), files, 3)):
        assert path == files[k]
        if k == 4:
            assert image is None and "04.png" in str(found)
        else:
            assert image.shape == (64, 128, 3) and image[0, 0, 0] == 20 * k


def test_a_threshold_and_an_impossible_batch(files):
    kept = [len(f.scores) for _, f in predict(Mean(), files[5:], 4, score_threshold=0.6)]
    assert kept == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="batch_size"):
        next(predict(Mean(), files, 0))


def test_an_evaluation_with_pictures_missing_is_none(files):
    records = [SimpleNamespace(image=path) for path in files]
    with pytest.raises(ValueError, match="04.png"):
        predict_dataset(Mean(), records, progress=False)
    assert len(predict_dataset(Mean(), records[5:], 4, progress=False)) == 6


def test_the_canvas_is_the_detectors():
    assert canvas_size(Mean()) == (32, 64) and canvas_size(object()) == (512, 512)


def test_a_long_row_of_broken_files_does_not_pile_up(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    taken = 0

    def stream():
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield bad

    results = predict(Mean(), stream(), batch_size=2)
    for _ in range(10):
        assert isinstance(next(results)[1], ValueError)
    assert taken < 100
    results.close()


def test_what_is_no_bad_file_is_raised():
    def fails(item):
        raise KeyError(item)

    with pytest.raises(KeyError):
        list(in_order(fails, range(3)))


def test_soon_waits_for_nothing():
    taken = []

    def items():
        for k in range(100):
            taken.append(k)
            time.sleep(0.02)
            yield k

    stream = in_order(lambda n: n, items(), workers=2, ahead=50, soon=True)
    assert next(stream) == (0, 0) and len(taken) < 20
    stream.close()


def test_soon_gives_what_is_under_way_even_after_ctrl_c():
    def items():
        yield from range(3)
        raise KeyboardInterrupt

    def slow(n):
        time.sleep(0.05)
        return n

    found = []
    with pytest.raises(KeyboardInterrupt):
        for n, _ in in_order(slow, items(), workers=2, soon=True):
            found.append(n)
    assert found == [0, 1, 2]


def test_one_path_is_one_picture(files):
    for path in (files[1], str(files[1])):
        ((given, found),) = predict(Mean(), path)
        assert given == path and found.scores[0] == pytest.approx(20 / 255)


def test_threads_end_with_the_stream():
    before = threading.active_count()
    stream = in_order(lambda n: n, iter(range(1000)), workers=4, ahead=8)
    assert next(stream) == (0, 0)
    stream.close()
    assert threading.active_count() <= before
