"""Mutation testing: is there a test for every line of a module? Small faults are put in one by one, and a test must fail.

    python tests/mutants.py anchors boxes            # all mutants of two modules
    python tests/mutants.py losses --list            # what would be changed
    python tests/mutants.py losses --only 17 30      # these two, with what the tests print

The known tools start a process for every mutant (cosmic-ray) or leave decorated functions and classes alone (mutmut);
importing Keras takes seconds, and half of the code in question is decorated. So here one process imports the engine and
collects the tests, and a child forked from it before any operation has run takes each mutant.
Only the tests run that reach the line in question, as a first run over the sound module notes; first the one that
killed the mutant before in the same function, then the quick ones; the first failure ends a child. A first round spends
`--budget` seconds on a mutant, a second one gives the survivors all other tests that reach them. NumPy is Keras's engine unless `--engine` says otherwise: tests that it
fails (gradients, compiled graphs) are left out, so what survives there is run again with `--engine tensorflow --only …`.
"""

import argparse
import ast
import contextlib
import copy
import functools
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the tests of each module
TESTS = {
    "anchors": ["test_anchors.py", "test_boxes.py", "test_exact.py"],  # parts go through files in the second
    "boxes": ["test_boxes.py", "test_exact.py"],
    "filtering": ["test_filtering.py", "test_exact.py"],
    "targets": ["test_targets.py", "test_exact.py"],
    "losses": ["test_losses.py", "test_exact.py"],
    **dict.fromkeys(
        ("evaluation", "arrays", "coco_metric"), ["test_evaluation.py", "test_exact_evaluation.py"]
    ),
    **dict.fromkeys(
        ("generator", "augmentation"),
        ["test_generator.py", "test_exact_generator.py", "test_augmentation.py"],
    ),
}
COMPARE = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SWAPS = {
    "maximum": "minimum",
    "max": "min",
    "argmax": "argmin",
    "any": "all",
    "floor": "ceil",
    "sqrt": "square",
}
SWAPS |= {v: k for k, v in SWAPS.items()}


# ---------------------------------------------------------------------------------------------------------------
# Mutants: (line, what was done, how to do it to a fresh copy of the tree).


def changes(node):
    """The faults that can be put into one node: pairs of a text and a function that changes such a node in place."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in COMPARE.get(type(op), ()):
                yield (
                    f"{type(op).__name__} → {new.__name__}",
                    lambda n, i=i, new=new: n.ops.__setitem__(i, new()),
                )
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        new = BINARY[type(node.op)]
        yield f"{type(node.op).__name__} → {new.__name__}", lambda n, new=new: setattr(n, "op", new())
    elif isinstance(node, ast.BoolOp):
        new = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} → {new.__name__}", lambda n, new=new: setattr(n, "op", new())
    elif isinstance(node, ast.IfExp):
        yield "the other branch", lambda n: n.__dict__.update(body=n.orelse, orelse=n.body)
    elif isinstance(node, (ast.If, ast.While)):
        yield "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    elif isinstance(node, ast.Slice):
        for name in ("lower", "upper", "step"):
            if getattr(node, name) is not None:
                yield f"no {name} bound", lambda n, name=name: setattr(n, name, None)
    elif isinstance(node, ast.Call):
        yield from _call_changes(node)
    elif isinstance(node, ast.Return) and not (node.value is None or _is_none(node.value)):
        yield "return None", lambda n: setattr(n, "value", ast.Constant(None))
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        for i, d in enumerate(node.decorator_list):
            yield f"without @{ast.unparse(d)[:40]}", lambda n, i=i: n.decorator_list.pop(i)


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _call_changes(node):
    for i in range(len(node.args)):
        yield f"argument {i + 1} of {ast.unparse(node.func)[:30]} left out", lambda n, i=i: n.args.pop(i)
    for i, k in enumerate(node.keywords):
        yield f"{k.arg or '**'} of {ast.unparse(node.func)[:30]} left out", lambda n, i=i: n.keywords.pop(i)
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    if name in SWAPS:
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield f"{name} → {SWAPS[name]}", lambda n, field=field, new=SWAPS[name]: setattr(n.func, field, new)


def replacements(node):
    """The expressions that one could stand in for."""
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield not value
        elif isinstance(value, (int, float)):
            yield value + 1
            yield value - 1
        elif isinstance(value, str) and value:
            yield value + "x"
        elif value is None:
            yield 0
    elif isinstance(node, ast.UnaryOp):
        yield node.operand


def mutants(source):
    """Every mutant of a module: (line, text, a function that makes its tree)."""
    tree = ast.parse(source)
    for path, node in _walk(tree, ()):
        for text, change in changes(node):
            line = node.lineno if hasattr(node, "lineno") else 0
            yield line, text, functools.partial(_changed, tree, path, change)
        for new in replacements(node):
            put = new if isinstance(new, ast.AST) else ast.Constant(new)
            text = f"{ast.unparse(node)[:40]} → {ast.unparse(put)[:40]}"
            yield node.lineno, text, functools.partial(_replaced, tree, path, put)
        for i, statement in enumerate(
            getattr(node, "body", ()) if isinstance(getattr(node, "body", None), list) else ()
        ):
            if isinstance(statement, (ast.Raise, ast.AugAssign)) or _is_call(statement):
                text = f"left out: {ast.unparse(statement)[:50]}"
                yield statement.lineno, text, functools.partial(_without, tree, path, i)


def _changed(tree, path, change):
    fresh = copy.deepcopy(tree)
    change(_at(fresh, path))
    return fresh


def _replaced(tree, path, put):
    fresh = copy.deepcopy(tree)
    holder, (field, index) = _at(fresh, path[:-1]), path[-1]
    if index is None:
        setattr(holder, field, put)
    else:
        getattr(holder, field)[index] = put
    return fresh


def _without(tree, path, i):
    fresh = copy.deepcopy(tree)
    _at(fresh, path).body[i] = ast.Pass()
    return fresh


def _is_call(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def _at(tree, path):
    for field, index in path:
        tree = getattr(tree, field) if index is None else getattr(tree, field)[index]
    return tree


def _walk(node, path):
    """Nodes whose value matters, with the way to each; no docstrings, annotations, messages or imports."""
    yield path, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "format_spec") or isinstance(
            node, (ast.Raise, ast.Import, ast.ImportFrom)
        ):
            continue
        for index, inner in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(inner, ast.AST) or isinstance(inner, (ast.JoinedStr, ast.expr_context)):
                continue
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                continue
            if isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "__all__":
                continue
            yield from _walk(inner, (*path, (field, index)))


# ---------------------------------------------------------------------------------------------------------------
# The tests are collected once, with the sound module; a forked child puts in one mutant and runs them.


def put_in(module, code):
    """Execute the mutated code as the module, and give it to everybody who holds something of the sound one."""
    sound = sys.modules[f"retinanet_nb.{module}"]
    before = dict(vars(sound))
    exec(code, vars(sound))
    new = {id(v): vars(sound)[k] for k, v in before.items() if k in vars(sound) and _is_own(v, sound, k)}
    for other in list(sys.modules.values()):
        mine = getattr(other, "__file__", None) or ""
        if other is not sound and mine.startswith(str(ROOT)):
            for k, v in list(vars(other).items()):
                if id(v) in new and not k.startswith("__"):
                    setattr(other, k, new[id(v)])


def _is_own(value, module, name):
    return getattr(value, "__module__", None) == module.__name__ or (
        name.isupper() and not isinstance(value, (bool, int))
    )


def places(source):
    """For every line of a module: the name of its function ("" outside of any), and the lines of which a test must run one
    to notice a change there; None where every test may notice it.
    """
    found = {}

    def visit(body, name):
        for node in body:
            inner = [b for b in (getattr(node, f, None) for f in ("body", "orelse", "finalbody")) if b]
            inner += [h.body for h in getattr(node, "handlers", ())]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            last = min([node.end_lineno, *(b[0].lineno - 1 for b in inner)])
            lines = range(first, max(first, last) + 1)
            within = name
            if isinstance(node, ast.FunctionDef):  # a default, a decorator: seen without a call, too
                within, need = f"{name}.{node.name}" if name else node.name, None
            elif isinstance(node, ast.ClassDef):
                within, need = node.name, None
            else:
                need = lines if in_function(name) else None
            found.update((line, (within, need)) for line in lines)
            for b in inner:
                visit(b, within)

    tree = ast.parse(source)
    classes = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}

    def in_function(name):
        return name and name not in classes

    visit(tree.body, "")
    return found


class Mutation:
    """A pytest plugin that takes the place of running the tests: once with the sound module, then with each mutant."""

    def __init__(self, module, options):
        self.module, self.options = module, options
        self.path = ROOT / "retinanet_nb" / f"{module}.py"
        self.failed, self.seconds, self.lines, self.survivors = set(), {}, {}, []
        self.killers = {}  # function → the test that killed a mutant of it last

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def fork(self, items, code, limit):
        """Run the tests in a child, to the first failure where there is a mutant; its exit status, or None for too long."""
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                status = self.run(items, code)
            finally:
                os._exit(status)
        end = time.time() + limit
        while time.time() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None

    def run(self, items, code):
        if not self.options.show:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        if code is not None:
            put_in(self.module, code)
        for item, following in zip(items, [*items[1:], None]):
            with self.noting(item.nodeid if code is None else None):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed and code is not None:
                self.options.notes.write_text(item.nodeid)
                return 1
        if code is None:
            lines = {k: sorted(v) for k, v in self.lines.items()}
            self.options.notes.write_text(json.dumps([sorted(self.failed), self.seconds, lines]))
        return 0

    @contextlib.contextmanager
    def noting(self, test):
        """Note every line of the module that a test runs, in any thread."""
        seen, name = self.lines.setdefault(test, set()), str(self.path)

        def line(frame, event, _):
            seen.add(frame.f_lineno)
            return line

        def call(frame, event, _):
            if frame.f_code.co_filename == name:
                return line(frame, event, _)

        if test is not None:
            threading.settrace(call), sys.settrace(call)
        try:
            yield
        finally:
            sys.settrace(None), threading.settrace(None)

    def sound(self, items):
        """Run the tests once with the sound module; those to use, the quick ones first, and what each takes and reaches."""
        started = time.time()
        # a process that a test starts reads the sound module
        items = [i for i in items if "subprocess" not in inspect.getsource(i.function)]
        assert self.fork(items, None, 900) == 0, "the tests could not be run"
        failed, seconds, lines = json.loads(self.options.notes.read_text())
        failed += [t for t, s in seconds.items() if s > self.options.slowest and t not in failed]
        items = sorted((i for i in items if i.nodeid not in failed), key=lambda i: seconds[i.nodeid])
        took = time.time() - started
        print(f"{self.module}: {len(items)} tests, {len(failed)} left out, {took:.0f} s", flush=True)
        return items, seconds, {test: set(some) for test, some in lines.items()}

    def fitting(self, items, seconds, lines, place):
        """The tests that reach a place, the last killer of its function first."""
        function, need = place
        reach = [i for i in items if need is None or not lines[i.nodeid].isdisjoint(need)]
        likely = self.killers.get(function)
        return sorted(reach, key=lambda i: i.nodeid != likely or seconds[i.nodeid] > 1)

    def split(self, tests, seconds):
        """The tests that fit into the budget, one at least, and the others."""
        spent, n = 0, 0
        while n < len(tests) and (n == 0 or spent + seconds[tests[n].nodeid] <= self.options.budget):
            spent += seconds[tests[n].nodeid]
            n += 1
        return tests[:n], tests[n:]

    def killed(self, tests, code, seconds, function):
        """Whether one of the tests fails with the mutant; which one is remembered."""
        if not tests:
            return False
        status = self.fork(tests, code, 10 + 8 * sum(seconds[i.nodeid] for i in tests))
        if status == 1:
            self.killers[function] = self.options.notes.read_text()
        return status != 0

    def pytest_runtestloop(self, session):
        started = time.time()
        items, seconds, lines = self.sound(session.items)
        source = self.path.read_text()
        found, text_of, place_of = list(mutants(source)), source.splitlines(), places(source)
        numbers = self.options.only or range(0, len(found), self.options.every)
        gc.collect(), gc.freeze()  # children share the memory
        counts, alive = {}, []
        for count, number in enumerate(numbers):
            if count % 100 == 0 < count:
                print(f"  … {count} at {time.time() - started:.0f} s, {len(alive)} alive", flush=True)
            line, text, make = found[number]
            code = compile(ast.unparse(ast.fix_missing_locations(make())), str(self.path), "exec")
            function = place_of[line][0]
            first, rest = self.split(self.fitting(items, seconds, lines, place_of[line]), seconds)
            dead = self.killed(first, code, seconds, function)
            if not dead:
                alive.append((number, code, rest, bool(first)))
            tried, killed = counts.get(function, (0, 0))
            counts[function] = tried + 1, killed + dead
        print(
            f"  … {len(alive)} alive at {time.time() - started:.0f} s; now with all their tests", flush=True
        )
        for number, code, rest, reached in alive:
            line, text, _ = found[number]
            function = place_of[line][0]
            if self.killed(rest, code, seconds, function):
                counts[function] = counts[function][0], counts[function][1] + 1
                continue
            self.survivors.append(number)
            how = "survives" if reached else "is reached by no test"
            print(
                f"  {number:4} {how}, line {line}: {text}    | {text_of[line - 1].strip()[:70]}", flush=True
            )
        self.tell(counts, len(numbers), time.time() - started)
        return True

    def tell(self, counts, ran, seconds):
        """The score of every function and of the module."""
        print("  tried and killed: " + ", ".join(f"{f or 'outside'} {n}/{k}" for f, (n, k) in counts.items()))
        left = len(self.survivors)
        print(
            f"{self.module}: {ran - left} of {ran} mutants killed ({1 - left / ran:.1%}) on {self.options.engine}"
            f" in {seconds:.0f} s; survivors: {' '.join(map(str, self.survivors))}",
            flush=True,
        )


def score(module, options):
    """Collect the tests of a module and run its mutants."""
    import pytest
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    tests = [str(ROOT / "tests" / t) for t in TESTS[module] if (ROOT / "tests" / t).exists()]
    with tempfile.TemporaryDirectory() as folder:
        options.notes = Path(folder) / "notes.json"
        pytest.main(
            ["-q", "-s", "-p", "no:cacheprovider", "--no-header", "-k", options.tests, *tests],
            plugins=[Mutation(module, options)],
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="+", choices=list(TESTS))
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants")
    parser.add_argument("--show", action="store_true", help="show what the tests print")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--every", type=int, default=1, help="take every N-th mutant")
    parser.add_argument("--slowest", type=float, default=60, help="leave out tests that take more seconds")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.5,
        help="seconds of tests in the first round; what lives gets the rest",
    )
    parser.add_argument("--tests", default="", help="only tests with such names, as pytest's -k")
    parser.add_argument("--engine", default="numpy", choices=("numpy", "tensorflow", "jax"))
    options = parser.parse_args()
    os.environ.update(
        KERAS_BACKEND=options.engine, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", MPLBACKEND="Agg"
    )
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if options.list:
        for module in options.modules:
            for number, (line, text, _) in enumerate(
                mutants((ROOT / "retinanet_nb" / f"{module}.py").read_text())
            ):
                print(f"{module} {number:4} line {line}: {text}")
        return
    if len(options.modules) > 1:  # each in a process of its own
        for module in options.modules:
            subprocess.run([sys.executable, __file__, module, "--engine", options.engine], check=False)
        return
    score(options.modules[0], options)


if __name__ == "__main__":
    main()
