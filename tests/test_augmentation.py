"""Augmentation: boxes follow their pictures exactly, what is off by default changes nothing, and chance has an address."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_generator import find, scenes

from retinanet_nb.augmentation import flip_horizontally, flip_vertically, turn
from retinanet_nb.generator import make_example
from retinanet_nb.hyperparameters import HyperParameters


def areas(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@given(scenes(), st.integers(-5, 9))
@settings(deadline=None, max_examples=40)
def test_turns_and_vertical_flips_find_their_objects(scene, quarters):
    image, boxes = scene
    for (other, moved), (again, back) in (
        ((view := turn(image, boxes, quarters)), turn(*view, -quarters)),
        ((view := flip_vertically(image, boxes)), flip_vertically(*view)),
    ):
        for c in range(3):
            assert find(other, c).tolist() == moved[c].tolist()
        np.testing.assert_array_equal(areas(moved), areas(boxes))
        assert (moved >= 0).all() and (moved <= [other.shape[1], other.shape[0]] * 2).all()
        assert (again == image).all() and (back == boxes).all()
    assert turn(image, np.zeros((0, 4), np.float32), quarters)[1].shape == (0, 4)


@given(scenes())
@settings(deadline=None, max_examples=15)
def test_the_eight_views_of_a_picture_hang_together(scene):
    """Two mirrors are half a turn; a mirror between two turns undoes the turning."""
    image, boxes = scene
    half, both = turn(image, boxes, 2), flip_vertically(*flip_horizontally(image, boxes))
    assert (half[0] == both[0]).all() and (half[1] == both[1]).all()
    back = turn(*flip_horizontally(*turn(image, boxes, 1)), 1)
    mirrored = flip_horizontally(image, boxes)
    assert (back[0] == mirrored[0]).all() and (back[1] == mirrored[1]).all()


def test_a_turn_by_hand():
    image = np.zeros((80, 100, 3), np.uint8)
    image[0, 99] = 7  # the upper right corner goes to the upper left one
    turned, boxes = turn(image, [[10, 20, 30, 60]])
    assert turned.shape == (100, 80, 3) and turned[0, 0, 0] == 7 and turned.flags["C_CONTIGUOUS"]
    assert boxes.tolist() == [[20, 70, 60, 90]]


@pytest.mark.parametrize("option, ways", [({"vertical_flip": 0.5}, 2), ({"quarter_turns": True}, 4)])
def test_all_ways_come_about_equally_often(option, ways):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    plain = HyperParameters(image_size=(24, 24), flip=0.0)
    seen = {}
    for seed in range(200):
        canvas, _, _ = make_example(image, [], [], plain.replace(**option), np.random.default_rng(seed))
        seen[canvas.tobytes()] = seen.get(canvas.tobytes(), 0) + 1
        off = make_example(image, [], [], plain, np.random.default_rng(seed))
        assert (off[0] == image).all()
    assert len(seen) == ways and min(seen.values()) > 0.7 * 200 / ways


def test_an_option_does_not_change_the_luck_of_the_others():
    """Which pictures are mirrored, recoloured and zoomed is the same with turns and without."""
    image = np.full((40, 40, 3), 90, np.uint8)
    image[:20, :20] = 200  # turned, it still has the same mean and a corner
    hp = HyperParameters(image_size=(40, 40), flip=0.5, color_jitter=0.4)
    for seed in range(20):
        without, with_turns = (
            make_example(image, [], [], options, np.random.default_rng(seed))[0]
            for options in (hp, hp.replace(vertical_flip=1.0, quarter_turns=True))
        )
        assert sorted(without.ravel()) == sorted(with_turns.ravel())
