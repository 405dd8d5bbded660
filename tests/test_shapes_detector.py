"""The detector that the package carries: small enough, and as good as the book says, on pictures that it never saw."""

import numpy as np

from retinanet_nb.demo import shapes_detector
from retinanet_nb.evaluation import evaluate
from retinanet_nb.prediction import predict_dataset
from retinanet_nb.hyperparameters import preset
from retinanet_nb.pictures import read_image
from retinanet_nb.retinanet_box import detect
from retinanet_nb.shapes import SHAPE_CLASSES, make_shapes
from retinanet_nb.voc import VOCDataset


def test_the_carried_detector_keeps_its_promise(root, tmp_path):
    assert (root / "retinanet_nb" / "assets" / "shapes.keras").stat().st_size <= 5_000_000
    # The pictures of a split do not depend on how many the others have: these are the test pictures of `make shapes-detector`.
    data = make_shapes(tmp_path / "shapes", train=0, val=0, test=300)
    detector = shapes_detector()
    assert (
        tuple(detector.class_names) == SHAPE_CLASSES
        and detector.hyperparameters.anchors == preset("tiny").anchors
    )
    assert evaluate(detector, VOCDataset(data, "test"), progress=False, coco=False).voc07_map >= 0.90


def test_a_data_set_is_read_as_detect_reads_its_pictures(tmp_path):
    records = VOCDataset(make_shapes(tmp_path / "shapes", train=0, val=0, test=5), "test")
    detector = shapes_detector()
    found = predict_dataset(
        detector, records, batch_size=4, score_threshold=0.3, progress=False
    )  # 5 pictures: the last batch is filled up
    assert len(found) == 5 and sum(len(f.scores) for f in found) > 3
    for record, one in zip(records, found):
        same = detect(detector, read_image(record.image), 0.3)
        assert np.array_equal(one.labels, same.labels)
        np.testing.assert_allclose(one.boxes, same.boxes, atol=0.05)
        np.testing.assert_allclose(one.scores, same.scores, atol=1e-3)
