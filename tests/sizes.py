"""How large functions are and how long pages take to read, today or at any git revision: python tests/sizes.py [--revision R]."""

import argparse
import ast
import json
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 30  # of prose; of code that stands open, two seconds a line
LONGEST_PAGE = 25  # minutes


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def files(folder, suffix, revision=None):
    "Path → text of the files under a folder, from the working tree or from a revision."
    if revision is None:
        paths = sorted((ROOT / folder).rglob(f"*{suffix}"))
        paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
        return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}
    names = git("ls-tree", "-r", "--name-only", revision, folder).splitlines()
    return {name: git("show", f"{revision}:{name}") for name in names if name.endswith(suffix)}


def functions(source):
    "Name, lines and characters of each function, its whole text with signature and docstring; inner ones on their own too."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_source_segment(source, node)
            found.append((node.name, text.count("\n") + 1, len(text)))
    return found


def without_docstring(source):
    "The same, of the body alone: neither signature nor docstring."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[ast.get_docstring(node, clean=False) is not None :]
            if body:
                lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
                found.append((node.name, len(lines), len("\n".join(lines))))
    return found


def spread(values):
    "Median and ninth decile."
    values = sorted(values)
    return statistics.median(values), statistics.quantiles(values, n=10, method="inclusive")[8]


def module_sizes(revision=None, measure=functions):
    "How many functions the package has, and median and ninth decile of their lines and characters."
    sources = {
        k: v for k, v in files("retinanet_nb", ".py", revision).items() if not k.endswith("_modidx.py")
    }
    found = [f for source in sources.values() for f in measure(source)]
    return len(found), spread([f[1] for f in found]), spread([f[2] for f in found])


def reading(notebook):
    "Words of prose and lines of code that stand open on a page."
    words = lines = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"\]\([^)]*\)|<[^>]+>|[|#*`$>-]", " ", source).split())
        elif cell["cell_type"] == "code":
            options = [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]
            caption = [o.split(":", 1)[1] for o in options if o.startswith("fig-cap:")]
            words += sum(len(text.split()) for text in caption)
            shut = ("hide", "default_exp", "code-fold: true", "echo: false", "export ", "exporti")
            if any(o.startswith(shut) or o == "export" for o in options):
                continue
            lines += sum(bool(r.strip()) and not r.startswith("#|") for r in source.splitlines())
    return words, lines


def minutes(words, lines):
    return words / WORDS_A_MINUTE + lines / LINES_A_MINUTE


def pages(revision=None):
    "Page → words, lines and minutes."
    found = {}
    for name, text in files("nbs", ".ipynb", revision).items():
        words, lines = reading(json.loads(text))
        found[name.removeprefix("nbs/").removesuffix(".ipynb")] = (words, lines, minutes(words, lines))
    return found


def table(revision=None):
    "All of it as text."
    out = [f"functions of the package, {revision or 'today'}"]
    for title, measure in (("whole", functions), ("body without signature and docstring", without_docstring)):
        count, lines, characters = module_sizes(revision, measure)
        out.append(
            f"  {count} functions, {title}: lines {lines[0]:.0f} (median) {lines[1]:.0f} (ninth decile),"
            f" characters {characters[0]:.0f} and {characters[1]:.0f}"
        )
    found = pages(revision)
    out.append(f"\n{'page':32} words  lines of open code  minutes")
    for name, (words, lines, time) in sorted(found.items(), key=lambda item: -item[1][2]):
        out.append(f"{name:32} {words:5}  {lines:18}  {time:7.1f}{'  *' if time > LONGEST_PAGE else ''}")
    words, lines, time = (sum(page[k] for page in found.values()) for k in range(3))
    out.append(f"{f'{len(found)} pages':32} {words:5}  {lines:18}  {time:7.1f}")
    out.append(
        f"at {WORDS_A_MINUTE} words and {LINES_A_MINUTE} lines of open code a minute;"
        f" * is over {LONGEST_PAGE} minutes"
    )
    return "\n".join(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revision", help="any git revision; the working tree where none is given")
    print(table(parser.parse_args().revision))
