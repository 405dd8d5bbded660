"""The self-check: passes where all is well, and each fault makes exactly its own stage fail, in words that name the culprit."""

import json
import math
from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import drawn, head_weights, numpy, small

from retinanet_nb import selfcheck
from retinanet_nb.hyperparameters import AnchorParameters
from retinanet_nb.pictures import read_image, write_image
from retinanet_nb.selfcheck import (
    STAGES,
    Bench,
    Chosen,
    SelfCheck,
    check_filtering,
    check_learning,
    check_losses,
    choose_pictures,
    expected_focal_loss,
    perfect_outputs,
    self_check,
    write_check,
)
from retinanet_nb.records import Record

H = small(batch_norm_momentum=0.9, batch_size=4)
RATE = 2e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Twelve pictures of red and blue rectangles, some of them empty."
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for i, (image, boxes, labels) in enumerate(zip(*drawn(12, seed=5))):
        file = write_image(folder / f"p{i:02d}.png", image)
        records.append(Record(file, 128, 128, boxes[labels >= 0], labels[labels >= 0]))
    return Chosen(records, ("red", "blue"))


def changed(data, i, **fields):
    "The data set with record `i` changed."
    records = Chosen(data, data.class_names)
    records[i] = replace(
        records[i],
        **{**({"difficult": None, "crowd": None, "truncated": None} if "boxes" in fields else {}), **fields},
    )
    return records


def fails(data, stage, hyperparameters=H, **options):
    "The stage that fails, after checking that it is `stage`, that all before it are passed and none after it was tried."
    check = self_check(data, hyperparameters, progress=False, learning_rate=RATE, **options)
    at = list(STAGES).index(stage)
    assert [s.ok for s in check.stages] == [True] * at + [False] + [None] * (5 - at), str(check)
    assert check.failed == stage and not check.ok and check[stage].remedy and "✗" in str(check)
    return check[stage]


def test_drawn_pictures_are_learnt_by_heart_and_everything_is_written(data, tmp_path):
    check = self_check(data, H, steps=150, learning_rate=RATE, progress=False, folder=tmp_path / "out")
    assert check.ok and check.failed is None, str(check)
    assert check.map >= 0.9 and check.tests[-1][0] == len(check.history) <= 150
    assert [s.name for s in check.stages] == ["data", "anchors", "targets", "filtering", "losses", "learning"]
    again = SelfCheck.from_json(check.to_json())
    assert again == check and again.hyperparameters == H and str(again) == str(check)
    files = {p.name for p in (tmp_path / "out").glob("[!.]*")}
    assert files == {
        "selfcheck.json",
        "curve.png",
        *(f"{k + 1}-{r.image.stem}.jpg" for k, r in enumerate(check.records)),
    }
    assert json.loads((tmp_path / "out" / "selfcheck.json").read_text(encoding="utf-8")) == json.loads(
        check.to_json()
    )
    first = read_image(next((tmp_path / "out").glob("1-*.jpg")))
    assert first.shape[1] > 2 * first.shape[0]  # truth and detections, side by side
    assert keras.config.dtype_policy().name == "float32"


def test_the_choice_is_deterministic_and_spread_over_the_classes(data):
    names = lambda records: [r.image.name for r in records]
    chosen = choose_pictures(data, 4)
    assert names(chosen) == names(choose_pictures(list(data) and data, 4)) and len(set(names(chosen))) == 4
    assert names(choose_pictures(data, 4, seed=1)) != names(chosen)
    assert all(len(r.labels) for r in chosen)
    # One blue object among many red ones is found, whatever the seed.
    boxes = [[10, 10, 50, 50]]
    rare = Chosen([Record(f"{i}.png", 128, 128, boxes, [int(i == 7)]) for i in range(40)], ("red", "blue"))
    assert all("7.png" in names(choose_pictures(rare, 2, seed)) for seed in range(5))


def test_fewer_pictures_than_asked_for(data):
    with_objects = [r for r in data if len(r.labels)]
    assert len(choose_pictures(data, 100)) == len(with_objects) < len(data)
    assert len(choose_pictures(Chosen(with_objects[:3], data.class_names))) == 3


def test_nothing_to_learn_is_refused(data):
    empty = Chosen(
        [replace(r, boxes=[], labels=[], difficult=None, crowd=None, truncated=None) for r in data],
        data.class_names,
    )
    hard = Chosen([replace(r, difficult=np.ones(len(r.labels), bool)) for r in data], data.class_names)
    for dataset in (empty, hard, Chosen([], ("red",))):
        with pytest.raises(ValueError, match="nothing to check"):
            self_check(dataset, H)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"pictures": 0}, "pictures"),
        ({"steps": 0}, "steps"),
        ({"seconds": -1}, "seconds"),
        ({"learning_rate": 0}, "learning_rate"),
    ],
)
def test_arguments_out_of_range(data, options, word):
    with pytest.raises(ValueError, match=word):
        self_check(data, H, **options)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"boxes": [[10, 10, math.nan, 60]], "labels": [0]}, "not finite"),
        ({"boxes": [[60, 10, 20, 60]], "labels": [0]}, "no area"),
        ({"boxes": [[10, 10, 400, 60]], "labels": [0]}, "beyond its picture of 128×128"),
        ({"boxes": [[10, 10, 60, 60]], "labels": [2]}, "label 2 is no class"),
        ({"boxes": [[10, 10, 60, 60]], "labels": [-1]}, "label -1 is no class"),
    ],
)
@pytest.mark.parametrize("place", ["chosen", "not chosen"])
def test_data_a_box_or_label_in_any_record(data, fields, word, place, tmp_path):
    "Also in a picture that isn't among those to be learnt."
    used = choose_pictures(data, 3)
    i = next(
        i for i, r in enumerate(data) if len(r.labels) and any(r is u for u in used) == (place == "chosen")
    )
    finding = fails(changed(data, i, **fields), "data", pictures=3, folder=tmp_path).finding
    assert word in finding and data[i].image.name in finding
    assert (
        (tmp_path / "selfcheck.json").exists()
        and not (tmp_path / "curve.png").exists()
        and len(list(tmp_path.glob("*.jpg"))) == 3
    )


def test_data_pictures_that_cannot_be_used(data, tmp_path):
    i = next(i for i, r in enumerate(data) if r is choose_pictures(data)[0])
    write_image(tmp_path / "flat.png", np.full((128, 128, 3), 9, np.uint8))
    write_image(tmp_path / "other.png", np.zeros((64, 128, 3), np.uint8))
    (tmp_path / "short.png").write_bytes(data[i].image.read_bytes()[:200])
    for name, word in (
        ("flat.png", "one colour"),
        ("other.png", "128×64"),
        ("short.png", "cut short"),
        ("gone.png", "no picture"),
    ):
        finding = fails(changed(data, i, image=tmp_path / name), "data").finding
        assert word in finding and name in finding


def test_anchors_that_fit_nothing_and_the_sizes_that_would(data):
    far = fails(data, "anchors", H.replace(anchors=AnchorParameters(sizes=(512, 600, 700, 800, 900))))
    assert "100%" in far.finding and ".png" in far.finding and "retinanet_inspect" in far.remedy
    sizes = tuple(int(v) for v in far.remedy.split("sizes=(")[1].split(")")[0].split(","))
    bench = Bench(data, H.replace(anchors=AnchorParameters(sizes=sizes)), choose_pictures(data))
    assert STAGES["data"](bench).ok and STAGES["anchors"](bench).ok


def test_anchors_out_of_reach_of_a_few_objects_only_are_said_not_failed(data):
    i = next(i for i, r in enumerate(data) if r is choose_pictures(data)[0])
    tiny = changed(data, i, boxes=[*data[i].boxes, [3, 3, 8, 8]], labels=[*data[i].labels, 0])
    bench = Bench(tiny, H, choose_pictures(tiny, 100))
    STAGES["data"](bench)
    stage = STAGES["anchors"](bench)
    assert (
        stage.ok
        and stage.finding.startswith("1 of ")
        and data[i].image.name in stage.finding
        and "5×5" in stage.finding
    )


def test_targets_objects_annotated_twice(data):
    twice = Chosen(
        [
            replace(
                r,
                boxes=np.repeat(r.boxes, 2, 0),
                labels=np.repeat(r.labels, 2),
                difficult=None,
                crowd=None,
                truncated=None,
            )
            for r in data
        ],
        data.class_names,
    )
    finding = fails(twice, "targets").finding
    assert "annotated twice" in finding and ".png" in finding
    other_class = Chosen(
        [replace(r, labels=[int(l) if i % 2 else 1 - int(l) for i, l in enumerate(r.labels)]) for r in twice],
        data.class_names,
    )
    assert "annotated twice" in fails(other_class, "targets").finding


def crowd(data):
    "Every object with a neighbour of its class that overlaps it by an IoU of a half, where there is room."

    def beside(r):
        w = (r.boxes[:, 2:3] - r.boxes[:, :1]) / 3
        more = r.boxes + np.where(r.boxes[:, 2:3] + w <= 128, w, -w) * np.float32([1, 0, 1, 0])
        return replace(
            r,
            boxes=np.concatenate([r.boxes, more]),
            labels=np.tile(r.labels, 2),
            difficult=None,
            crowd=None,
            truncated=None,
        )

    return Chosen([beside(r) for r in data], data.class_names)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"score_threshold": 0.95}, "score_threshold of 0.95"),
        ({"nms_threshold": 0.0}, "nms_threshold of 0"),
        ({"max_detections": 1}, "max_detections of 1"),
        ({"pre_nms_top_k": 1}, "pre_nms_top_k of 1"),
    ],
)
def test_filtering_names_the_threshold(data, changes, words):
    stage = fails(crowd(data), "filtering", H.replace(**changes))
    assert words in stage.finding and ".png" in stage.finding and next(iter(changes)) in stage.remedy


def test_perfect_outputs_are_the_targets(data):
    "High where an anchor answers for an object, and there in its class only; the surer the better the anchor fits."
    bench = Bench(data, H, choose_pictures(data))
    for name in ("data", "anchors", "targets"):
        STAGES[name](bench)
    deltas, scores = perfect_outputs(bench)
    np.testing.assert_array_equal(deltas, bench.deltas)
    positive = bench.classes >= 0
    assert positive.any() and (scores[~positive] < 0.001).all() and ((scores > 0.5).sum(-1) == positive).all()
    assert (
        (scores[positive].argmax(-1) == bench.classes[positive]).all()
        and (0.8 <= scores[positive].max(-1)).all()
        and (scores <= 0.9).all()
    )


def test_a_check_without_training_is_written_without_a_curve(data, tmp_path):
    check = self_check(
        data, H.replace(anchors=AnchorParameters(sizes=(400, 500, 600, 700, 800))), progress=False
    )
    write_check(check, tmp_path / "check")
    assert (
        not (tmp_path / "check" / "curve.png").exists()
        and SelfCheck.from_json((tmp_path / "check" / "selfcheck.json").read_text()).failed == "anchors"
    )


def test_filtering_perfect_outputs_are_worth_one_also_beside_difficult_objects(data):
    records = Chosen(
        [replace(r, difficult=[i > 0 for i in range(len(r.labels))]) for r in crowd(data)], data.class_names
    )
    for dataset in (crowd(data), records):
        bench = Bench(dataset, H.replace(nms_threshold=0.6), choose_pictures(dataset))
        for name in ("data", "anchors", "targets"):
            assert STAGES[name](bench).ok
        assert check_filtering(bench).ok and bench.ceiling == pytest.approx(1)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (None, 0.0), (0.75, 1.0)])
def test_the_first_loss_that_the_prior_promises(alpha, gamma):
    classes = np.array([[-1, -1, 2, -2], [-1, 0, -1, -2]])
    h = H.replace(alpha=alpha, gamma=gamma, prior_probability=0.1)
    total = 0.0
    for c in classes.ravel():
        for k in range(3):
            if c == -2:
                continue
            p_t, weight = (0.1, alpha) if c == k else (0.9, None if alpha is None else 1 - alpha)
            total += (1 if weight is None else weight) * (1 - p_t) ** gamma * -math.log(p_t)
    assert expected_focal_loss(classes, 3, h) == pytest.approx(total / 2, rel=1e-9)


@pytest.fixture(scope="module")
def ready(data):
    "A workbench with its network after the first step, and the weights it had before."
    bench = Bench(data, H, choose_pictures(data), steps=12, learning_rate=1e-7)
    for name in ("data", "anchors", "targets", "filtering"):
        assert STAGES[name](bench).ok
    assert check_losses(bench).ok
    return bench, bench.trainer.model.get_weights()


@pytest.fixture
def bench(ready):
    bench, weights = ready
    bench.trainer.model.set_weights(weights)
    bench.history.clear()
    bench.tests.clear()
    return bench


def test_losses_near_the_prior_and_all_parts_moved(bench):
    stage = check_losses(bench)
    assert stage.ok and "in all parts" in stage.finding
    said, promised = (
        float(stage.finding.split(word)[1].split()[0].strip(",;")) for word in ("classification", "promises")
    )
    assert said == pytest.approx(promised, rel=0.3)


def test_losses_a_bias_that_was_never_set(bench):
    head_weights(bench.trainer.model, 2)[1].assign(np.full(18, 3.0, "float32"))
    stage = check_losses(bench)
    assert stage.ok is False and "not that of a fresh network" in stage.finding


def test_losses_not_a_number(bench):
    head_weights(bench.trainer.model, 2)[1].assign(np.full(18, np.nan, "float32"))
    stage = check_losses(bench)
    assert stage.ok is False and "not a number" in stage.finding
    for w in bench.trainer.optimizer.variables:  # Adam remembers what it saw
        if not np.isfinite(numpy(w)).all():
            w.assign(np.zeros(w.shape, "float32"))


def test_learning_at_a_rate_that_moves_nothing(bench):
    check_losses(bench)
    stage = check_learning(bench)
    assert (
        stage.ok is False
        and "not fallen to a third" in stage.finding
        and "learning_rate than 1e-07" in stage.remedy
    )
    assert len(bench.history) == 12 and bench.tests[-1][0] == 12


def test_learning_out_of_time_says_so(bench):
    check_losses(bench)
    bench.deadline = 0.0
    try:
        stage = check_learning(bench)
    finally:
        bench.deadline = math.inf
    assert stage.ok is False and "time given was used up" in stage.finding and len(bench.history) == 1


def test_losses_a_part_without_a_gradient_and_a_frozen_one(data):
    stage = fails(data, "losses", H.replace(box_loss_weight=0.0, freeze_stages=5))
    assert (
        "did not move the regression subnet" in stage.finding
        and "backbone" not in stage.finding
        and "box_loss_weight" in stage.remedy
    )


def test_learning_batch_norm_whose_statistics_stay_behind(data):
    stage = fails(data, "learning", H.replace(batch_norm_momentum=0.9999), steps=40)
    assert "momentum of 0.9999" in stage.finding and "batch_norm_momentum=0.9" in stage.remedy


def test_a_check_replaces_nothing_of_somebody_elses(data, tmp_path, monkeypatch):
    "Refused before any work; the file's bytes are the same afterwards."
    monkeypatch.setattr(selfcheck, "_run_stages", lambda bench: pytest.fail("work had begun"))
    first = choose_pictures(data, 8)[0].image.stem
    for name in ("selfcheck.json", "curve.png", f"1-{first}.jpg"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"my own")
        with pytest.raises(ValueError, match=name):
            self_check(data, H, progress=False, folder=folder)
        assert (folder / name).read_bytes() == b"my own"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"stages": 3}',
        '{"stages": [{"nme": 1}]}',
        '{"stages": [], "pictures": 1}',
    ],
)
def test_a_report_that_is_none(text):
    with pytest.raises(ValueError, match="no report of a self-check"):
        SelfCheck.from_json(text)
