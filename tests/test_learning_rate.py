"""The range test: rates in equal ratios, the loss of each step, the step that is suggested, and that nothing of it stays."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import fails

from retinanet_nb import cli, learning_rate
from retinanet_nb.hyperparameters import preset
from retinanet_nb.learning_rate import (
    WIDTH,
    LossOfEachStep,
    RateSearch,
    find_learning_rate,
    plot_rates,
    range_schedule,
    smoothed,
    suggested_step,
)
from retinanet_nb.shapes import make_shapes
from retinanet_nb.voc import VOCDataset


@given(st.integers(2, 300), st.floats(-9, -2), st.floats(0.1, 6))
@settings(max_examples=30, deadline=None)
def test_rates_grow_by_one_ratio(steps, start, span):
    schedule = range_schedule(10**start, 10 ** (start + span), steps)
    k = steps // 2
    for step, expected in ((0, start), (k, start + span * k / (steps - 1)), (steps - 1, start + span)):
        assert math.isclose(float(schedule(step)), 10**expected, rel_tol=1e-3)


def fed(losses, steps, epoch=7):
    "What the callback keeps of losses that `fit` shows as means since the epoch began."
    watch = LossOfEachStep(steps)
    watch.set_model(keras.Model())
    watch.model.stop_training = False
    for k, _ in enumerate(losses):
        if k % epoch == 0:
            watch.on_epoch_begin(k // epoch)
        since = losses[k - k % epoch : k + 1]
        watch.on_train_batch_end(k % epoch, {"loss": np.float32(np.mean(since))})
        if watch.model.stop_training:
            break
    return watch


@given(st.lists(st.floats(0.5, 1.9), min_size=1, max_size=40), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_each_loss_is_got_back_from_the_means(losses, steps):
    watch = fed(losses, steps)
    n = min(len(losses), steps)
    np.testing.assert_allclose(watch.losses, losses[:n], atol=1e-4)
    assert bool(watch.model.stop_training) == (steps <= len(losses))


@pytest.mark.parametrize("last", [math.nan, math.inf, 8.1])
def test_an_explosion_ends_it(last):
    watch = fed([2.0, 1.0, last, 1.0], 100)
    assert watch.losses == [2.0, 1.0] and watch.model.stop_training
    assert fed([2.0, 7.9, 1.0], 100).losses == pytest.approx([2.0, 7.9, 1.0], abs=1e-5)
    assert fed([math.nan], 100).losses == []


def naive(losses):
    "The same mean, step by step."
    cut = [min(v, max(losses[:WIDTH])) for v in losses]
    half = WIDTH // 2
    return [float(np.mean(cut[max(0, k - half) : k + half + 1])) for k in range(len(cut))]


@given(st.lists(st.floats(0.1, 50), min_size=WIDTH, max_size=80))
@settings(max_examples=40, deadline=None)
def test_smoothing_is_a_mean_of_neighbours(losses):
    np.testing.assert_allclose(smoothed(losses), naive(losses), rtol=1e-6)


@given(st.floats(-4.5, -2.5), st.integers(0, 10**6), st.floats(0.1, 100), st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_suggestion_lies_where_a_known_fall_ends(middle, seed, factor, level):
    "Nine tenths of a logistic fall are done at nine times its middle; only the curve's shape counts."
    rates = np.geomspace(1e-7, 1, 141)
    noise = np.random.default_rng(seed).normal(0, 0.02, 141)
    losses = 3 - 2 / (1 + 10**middle / rates) + noise + (rates / 0.5) ** 4
    step = suggested_step(losses)
    assert abs(math.log10(rates[step]) - middle - math.log10(9)) < 0.4
    assert abs(suggested_step(factor * losses + level) - step) <= 1  # rounding at the limit
    assert suggested_step(3 + 0.0 * noise) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(
        tmp_path_factory.mktemp("rates") / "shapes", train=12, val=1, test=1, size=(64, 64), seed=2
    )


class Trained:
    "In place of a trainer: its losses fall to a half and then explode."

    def __init__(self, class_names, hyperparameters, optimizer):
        self.made.append(self)
        self.h, self.optimizer, self.names = hyperparameters, optimizer, class_names

    def fit(self, generator, epochs, callbacks, **options):
        self.epochs, self.batches, step = epochs, len(generator), 0
        (watch,) = callbacks
        watch.set_model(keras.Model())
        watch.model.stop_training = False
        for epoch in range(epochs):
            watch.on_epoch_begin(epoch)
            losses = []
            for batch in range(self.batches):
                rate = float(self.optimizer._learning_rate(step))
                losses.append(3 - 2 / (1 + 1e-3 / rate) + (rate > 0.2) * 100)
                watch.on_train_batch_end(batch, {"loss": np.mean(losses)})
                step += 1
                if watch.model.stop_training:
                    return


def test_a_search_is_a_short_training(data, monkeypatch):
    "Schedule, warm-up and average are left out, all else is as in training. (The chapter searches with a real network.)"
    Trained.made = []
    monkeypatch.setattr(learning_rate, "build_trainer", Trained)
    h = preset("tiny").replace(image_size=(64, 64), batch_size=4, ema_momentum=0.9, optimizer="sgd")
    found = find_learning_rate(VOCDataset(data, "train"), h, steps=60, workers=0)
    (made,) = Trained.made
    assert made.h == h.replace(schedule="constant", warmup_steps=0, ema_momentum=None)
    assert isinstance(made.optimizer, keras.optimizers.SGD) and not made.optimizer.use_ema
    assert (made.batches, made.epochs) == (3, 20)
    # it ended at the explosion, which is left out
    n = int(np.argmax(np.geomspace(1e-6, 1, 60) > 0.2))
    np.testing.assert_allclose(found.rates, np.geomspace(1e-6, 1, 60)[:n], rtol=1e-3)
    np.testing.assert_allclose(found.losses, 3 - 2 / (1 + 1e-3 / found.rates), atol=1e-4)
    assert 2e-3 < found.suggestion < 2e-2
    for bad in (dict(steps=19), dict(lowest=0.0), dict(lowest=1.0), dict(highest=math.inf)):
        with pytest.raises(ValueError, match="range test"):
            find_learning_rate(VOCDataset(data, "train"), h, **bad)


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_first_loss_that_is_no_number_names_its_pictures(data, monkeypatch, first):
    class Broken(Trained):
        def fit(self, generator, epochs, callbacks, **options):
            callbacks[0].set_model(keras.Model())
            callbacks[0].on_epoch_begin(0)
            callbacks[0].on_train_batch_end(0, {"loss": first})

    Trained.made = []
    monkeypatch.setattr(learning_rate, "build_trainer", Broken)
    h = preset("tiny").replace(image_size=(64, 64), batch_size=4)
    with pytest.raises(
        FloatingPointError, match=rf"the loss is {first} after step 1 .*train_\d+\.jpg.*boxes"
    ):
        find_learning_rate(VOCDataset(data, "train"), h, steps=20, workers=0)
    with pytest.raises(TypeError, match="hyperparameters is 'tiny'"):
        find_learning_rate(VOCDataset(data, "train"), "tiny")


def test_what_is_said_and_drawn():
    rates = np.geomspace(1e-6, 1, 50)
    losses = 3 - 2 / (1 + 1e-3 / rates)
    search = RateSearch(rates, losses, 2e-3)
    assert str(search).startswith(
        "learning rate: 2.0e-03, where"
    ) and "50 steps from 1.0e-06 to 1.0e+00" in str(search)
    assert "retinanet_selfcheck" in str(RateSearch(rates, losses, None))
    ax = plot_rates(search)
    assert ax.get_xscale() == "log" and "suggested: 2.0e-03" in [
        t.get_text() for t in ax.get_legend().get_texts()
    ]


def test_the_command_says_it_and_ends(data, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def search(dataset, h):
        asked.update(dataset=dataset, h=h)
        return "learning rate: 0.5"

    monkeypatch.setattr(learning_rate, "find_learning_rate", search)
    cli.retinanet_train(str(data), preset="tiny", split="train", batch_size=2, find_learning_rate=True)
    assert capsys.readouterr().out.splitlines()[-1] == "learning rate: 0.5"
    assert len(asked["dataset"]) == 12 and asked["h"].batch_size == 2 and list(tmp_path.iterdir()) == []
    for words in (dict(resume="run"), {}):
        error = fails(capsys, cli.retinanet_train, find_learning_rate=True, **words)
        assert "begins afresh" in error or "no run to resume" in error
