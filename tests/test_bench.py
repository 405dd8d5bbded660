"""The measurements themselves take minutes; here only that every line asks for something that there is, and that figures come out as the page reads them."""

import inspect
import json

import bench
import bench_lines


def test_every_line_asks_for_a_part_that_takes_what_it_is_given():
    keys = [group.key for group in bench.groups()]
    assert len(set(keys)) == len(keys)
    for group in bench.groups():
        assert group.unit in ("s", "ms", "a second") and len({line.name for line in group.lines}) == len(
            group.lines
        )
        for line in group.lines:
            inspect.signature(bench_lines.PARTS[line.part]).bind(**line.given)


def test_figures_of_a_line_and_what_is_not_installed(capsys):
    group = bench.Group(
        "key", "title", "ms", [bench.Line("one", "e", "p", count=4), bench.Line("two", "e", "p")]
    )
    one = bench.result(group.lines[0], {"times": [0.2, 0.4, 0.9], "first": 1.0}, group)
    assert one["value"] == 100 and one["runs"] == 3 and one["spread"] == (0.9 - 0.2) / 0.4
    two = bench.result(group.lines[1], {"times": [], "absent": "no module two"}, group)
    bench.show(group, [one, two])
    shown = capsys.readouterr().out
    assert "100.0 ms" in shown and "1.00" in shown and "left out: no module two" in shown
    group.unit = "a second"
    assert bench.result(group.lines[0], {"times": [0.5], "first": 1.0}, group)["value"] == 8


def test_groups_of_an_earlier_run_stay(tmp_path):
    path = tmp_path / "speed.json"
    bench.keep(path, {"machine": "old"}, {"a": 1, "b": 1})
    bench.keep(path, {"machine": "new"}, {"b": 2})
    kept = json.loads(path.read_text())
    assert kept["groups"] == {"a": 1, "b": 2} and kept["machine"] == "new"


def test_on_a_busy_machine_some_lines_are_left_out():
    lines = [{"name": "a", "engine": "torch", "value": 1.0}, {"name": "b", "engine": "jax", "value": 2.0}]
    assert bench.unfit(lines, [0.5, None]) == lines
    a, b = bench.unfit(lines, [0.5, 99.0])
    assert "99 processes" in a["absent"] and "value" not in a and b == lines[1]
