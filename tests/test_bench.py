"""The measurements themselves take minutes; here only that every line asks for something that there is, and that figures come out as the page reads them."""

import inspect
import json
from collections import namedtuple
from types import SimpleNamespace

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
    assert bench.unfit(lines, 0.1) == lines
    a, b = bench.unfit(lines, 99.0)
    assert "99.0 cores" in a["absent"] and "value" not in a and b == lines[1]


def test_the_work_of_others_is_what_is_left_of_the_machine(monkeypatch):
    whole = namedtuple("whole", "user nice system idle iowait guest")(10.0, 1.0, 4.0, 100.0, 3.0, 1.0)
    spent = {0: (2.0, 1.0, 1.0, 0.5, 9.0), 7: (3.0, 0.5, 0.0, 0.0, 9.0)}  # the last is waiting for a disk
    process = lambda pid=0: SimpleNamespace(cpu_times=lambda: spent[pid])
    monkeypatch.setattr(bench, "psutil", SimpleNamespace(cpu_times=lambda: whole, Process=process))
    run = bench.Bench("unused")
    assert run.at_work() == 15.0 - 4.5  # a guest's time is also the user's
    run.processes["torch"] = SimpleNamespace(process=SimpleNamespace(pid=7))
    assert run.at_work() == 15.0 - 4.5 - 3.5
