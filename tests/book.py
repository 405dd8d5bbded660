"""What the Makefile and the tests both do with the book: `python tests/book.py check | docs | readme | constraints | result | carry`.

- `check(root)`: figures, references, links, sidebar; a list of sentences, empty where all is well.
- `process(root)`: nbdev's own processing into `_proc`, the notebooks as Quarto gets them.
- `docs(root)`: both, then `quarto render` into `_docs` where Quarto is found.
- `readme(root)`: the text of README.md and its pictures, from `nbs/index.ipynb`.
- `constraints(root)`: the installed versions, without local paths.
- `result(name, run, report, …)`: what the chapter of results keeps of a run, `nbs/results/NAME.json`.
- `carry(path, data, split, name)`: the detector in a file becomes the one of photographs that the package carries, with its figures.
"""

import ast
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
QUARTO = "1.9.38"  # pinned in .github/workflows/site.yml too
FENCE = re.compile(r"(^```.*?^```\s*?$|^~~~.*?^~~~\s*?$)", re.M | re.S)
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^()\s>]*(?:\([^()]*\)[^()\s>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
REFERENCE = re.compile(r"(?<![\w@`.])@((?:fig|tbl|eq|sec|lst)-[\w-]*\w)")
# What TensorFlow writes on the error stream when it is imported; no setting stops it.
GREETING = re.compile(
    r"WARNING: All log messages before absl|[IW]\d{4} 00:00:\d|\d{4}-\d\d-\d\d .*(cpu_feature_guard|oneDNN|cuda)|To enable the following instructions"
)
LABEL = re.compile(r"\{#((?:fig|tbl|eq|sec|lst)-[\w-]+)[^}]*\}")


# --- notebooks -------------------------------------------------------------------------------------------------------


def notebooks(root=ROOT):
    "Every notebook of the book, in reading order; folders and files that start with `_` or `.` are no part of it."
    nbs = Path(root) / "nbs"
    found = [p for p in nbs.rglob("*.ipynb") if not any(part[0] in "_." for part in p.relative_to(nbs).parts)]
    return sorted(
        found,
        key=lambda p: (p.name != "index.ipynb", len(p.relative_to(nbs).parts), p.relative_to(nbs).as_posix()),
    )


def read(path):
    "The notebook as a dictionary."
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell):
    "A cell's source as one string."
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def directives(cell):
    "The `#|` lines at the top of a code cell: `{'export': '', 'label': 'fig-x', …}`; Quarto's options as YAML gives them."
    return dict(_directives(source(cell))) if cell["cell_type"] == "code" else {}


@lru_cache(None)  # a cell is asked many times, and YAML takes its time
def _directives(text):
    found, options = {}, []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = re.match(r"#\s?\|(.*)", line)
        if not match:
            break
        text = match[1][1:] if match[1].startswith(" ") else match[1]
        if re.match(r"[\w-]+:(\s|$)", text) or (text[:1] == " " and options):
            options.append(text)
        elif text.strip():
            word, _, rest = text.strip().partition(" ")
            found[word] = rest.strip()
    try:
        found.update(yaml.safe_load("\n".join(options)) or {} if options else {})
    except yaml.YAMLError as error:
        found["broken"] = str(error).splitlines()[0]
    return found


def is_hidden(cell):
    "Whether neither source nor outputs of this cell reach the page."
    options = directives(cell)
    return (
        bool({"hide", "exporti"} & set(options))
        or options.get("include") is False
        or options.get("output") is False
    )


def is_skipped(cell):
    "Whether a run of the tests leaves this cell out: `#| eval: false`, `#| slow`."
    options = directives(cell)
    return options.get("eval") is False or "slow" in options


def has_picture(cell):
    "Whether the cell's saved outputs hold a picture."
    return any(
        key in output.get("data", {})
        for output in cell.get("outputs", [])
        for key in ("image/png", "image/svg+xml", "image/jpeg")
    )


def prose(cell):
    "The text of a markdown cell without code, where an `@` or a bracket means nothing."
    return INLINE_CODE.sub("", FENCE.sub("", source(cell)))


# --- the check -------------------------------------------------------------------------------------------------------


def slug(heading):
    "The identifier that Pandoc gives a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    text = re.sub(r"[^\w\s.-]", "", text.lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip())) or "section"


def anchors(path):
    "Everything on a page that a link may point to: headings, labels, exported names."
    found = set()
    for cell in read(path)["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            for line in FENCE.sub("", text).splitlines():
                if match := re.match(r"#{1,6}\s+(.*?)(?:\s+\{#([\w-]+)[^}]*\})?\s*$", line):
                    found.add(match[2] or slug(match[1]))
            found.update(LABEL.findall(text))
        elif {"export", "exports"} & set(directives(cell)):
            found.update(name.lower() for name in re.findall(r"^(?:def|class)\s+(\w+)", text, re.M))
        if label := directives(cell).get("label"):
            found.add(str(label))
    return found


def mixes_imports(cell):
    """Whether a cell imports and does something besides. nbdev runs such a cell when it makes the site (it needs the imports
    for the signatures it prints), without the cells before it: what is not an import then fails or complains."""
    options = directives(cell)
    if (
        cell["cell_type"] != "code"
        or {"export", "exports", "exporti"} & set(options)
        or options.get("eval") is False
    ):
        return False
    if re.match(r"\s*%%", source(cell)):
        return False
    try:
        nodes = list(ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", source(cell), flags=re.M))))
    except SyntaxError:
        return False
    return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes) and any(
        isinstance(n, (ast.Expr, ast.Assign)) for n in nodes
    )


def check(root=ROOT):
    "Faults of the book as sentences, each with the page that it stands on."
    root, problems, owner = Path(root), [], {}
    nbs, pages = root / "nbs", notebooks(root)
    known = {p.resolve(): anchors(p) for p in pages}
    for page in pages:
        name, labels, wanted = page.relative_to(nbs).as_posix(), set(), []
        say = lambda text: problems.append(f"{name}: {text}")
        cells = read(page)["cells"]
        first = source(cells[0]) if cells else ""
        if not re.match(r"#\s+\S", first):
            say("its first cell does not start with a title (# …)")
        elif not re.search(r"^>\s+\S", first, re.M):
            say("its first cell has no one-line summary (> …)")
        # nbdev makes the page's head from this cell and drops the cell
        rest = [
            line for line in first.splitlines() if line.strip() and not re.match(r"#\s|>\s|- [\w-]+: ", line)
        ]
        if rest:
            say(
                f"its first cell holds more than title and summary, which nbdev drops from the site; give it a cell of its own: {rest[0][:60]}…"
            )
        for cell in cells:
            options = directives(cell)
            if mixes_imports(cell):
                say(
                    "imports stand together with other code in a cell; split it:\n    "
                    + source(cell).strip()[:200].replace("\n", "\n    ")
                )
            if "broken" in options:
                say(f"a cell's options are no YAML: {options['broken']}")
            label = str(options.get("label", ""))
            shown = has_picture(cell) and not is_hidden(cell)
            if label.startswith("fig-"):
                labels.add(label)
                if label in owner:
                    say(f"the label {label} is used before, on {owner[label]}")
                owner[label] = name
                if not has_picture(cell) and not is_skipped(cell):
                    say(f"the cell of {label} has no picture in its outputs")
            if label.startswith("fig-") or shown:
                what = label or "a picture (" + source(cell).strip().splitlines()[-1][:60] + ")"
                if not label.startswith("fig-"):
                    say(f"{what} has no label (#| label: fig-…)")
                for key, word in (("fig-cap", "caption"), ("fig-alt", "alternative text")):
                    if not str(options.get(key) or "").strip():
                        say(f"{what} has no {word} (#| {key}: …)")
            if cell["cell_type"] != "markdown":
                continue
            text = prose(cell)
            for found in LABEL.findall(text):
                if found in owner:
                    say(f"the label {found} is used before, on {owner[found]}")
                owner[found] = name
                labels.add(found)
            wanted += REFERENCE.findall(text)
            for picture, words, target in LINK.findall(text):
                if picture and not words.strip():
                    say(f"the picture {target} has no alternative text")
                if re.match(r"[a-z]+:", target):
                    continue
                path, _, fragment = target.partition("#")
                file = (page.parent / path).resolve() if path else page.resolve()
                if not file.exists():
                    say(f"the link [{words}]({target}) leads to no file")
                elif not file.is_relative_to(nbs.resolve()):
                    say(f"the link [{words}]({target}) leaves the site")
                elif fragment and file in known and fragment not in known[file]:
                    say(f"the link [{words}]({target}) leads to no heading")
            for tag in re.findall(r"<img\b[^>]*>", text):
                if not re.search(r"alt=[\"'][^\"']+", tag):
                    say(f"{tag[:60]} has no alternative text")
        problems += [
            f"{name}: the reference @{ref} leads to nothing on this page"
            for ref in wanted
            if ref not in labels
        ]
    return problems + check_sidebar(root)


def sidebar_pages(root, contents):
    "The pages that a part of the sidebar lists, in their order."
    nbs = Path(root) / "nbs"
    if isinstance(contents, str) and "*" in contents:  # Quarto puts in what the pattern finds, by name
        return sorted(p.relative_to(nbs).as_posix() for p in nbs.glob(contents))
    if isinstance(contents, str):
        return [contents]
    if isinstance(contents, dict):
        own = [contents["href"]] if "href" in contents else []
        return own + sidebar_pages(root, contents.get("contents", []))
    return [page for part in contents for page in sidebar_pages(root, part)]


def check_sidebar(root=ROOT):
    "Every page stands once in the sidebar of `_quarto.yml`, and every entry there is a page."
    root = Path(root)
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))

    listed = sidebar_pages(root, config["website"]["sidebar"]["contents"])
    links = [
        e["href"]
        for side in ("left", "right")
        for e in config["website"]["navbar"].get(side, [])
        if "://" not in e["href"]
    ]
    pages = {p.relative_to(root / "nbs").as_posix() for p in notebooks(root)}
    problems = [
        f"_quarto.yml: {page} stands twice in the sidebar"
        for page in sorted({p for p in listed if listed.count(p) > 1})
    ]
    problems += [f"_quarto.yml: there is no page {page}" for page in sorted(set(listed + links) - pages)]
    problems += [
        f"_quarto.yml: the page {page} is missing from the sidebar" for page in sorted(pages - set(listed))
    ]
    if (root / "nbs/_quarto.yml").read_bytes() != (root / "_quarto.yml").read_bytes():
        problems.append("nbs/_quarto.yml is not the link to ../_quarto.yml (make mend)")
    return problems


# --- the site --------------------------------------------------------------------------------------------------------


def process(root=ROOT):
    "Run nbdev's processing from the project at `root` into its `_proc`; returns what it printed. Raises on failure."
    code = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=2, force=True)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    printed = "".join(line for line in run.stdout.splitlines(keepends=True) if not GREETING.match(line))
    if run.returncode:
        raise RuntimeError(f"nbdev could not process the notebooks:\n{printed}")
    return printed


def shown_docs(cell):
    "The outputs of a processed cell that documents a function."
    return [o for o in cell.get("outputs", []) if "show_doc(" in source(cell) and "data" in o]


def check_processed(root=ROOT):
    "Faults of `_proc`: a page that is missing, that has no title or an error in it."
    root, problems = Path(root), []
    for page in notebooks(root):
        name = page.relative_to(root / "nbs")
        made = root / "_proc" / name
        if not made.exists():
            problems.append(f"{name}: was not processed")
            continue
        cells = read(made)["cells"]
        front = source(cells[0]) if cells and cells[0]["cell_type"] == "raw" else ""
        if "title:" not in front or "output-file:" not in front:
            problems.append(f"{name}: has no title after processing")
        if "description:" not in front:
            problems.append(f"{name}: has no description after processing")
        signatures = "".join(
            "".join(o["data"].get("text/markdown", "")) for c in cells for o in shown_docs(c)
        )
        problems += [
            f"{name}: a signature that tells nothing: {found}"
            for found in re.findall(r"\*args, \*\*kwargs|\w+:\w* ?<.*>", signatures)
        ]
        problems += [
            f"{name}: an error stands in its outputs"
            for c in cells
            for o in c.get("outputs", [])
            if o["output_type"] == "error"
        ]
    return problems


def docs(root=ROOT):
    "Check and process the book, and render it where Quarto is found. Returns the exit status: 1 where a check fails."
    import website

    root = Path(root)
    print(f"Checking {len(notebooks(root))} pages: figures, references, links, sidebar")
    problems = check(root) + website.check(root)
    if not problems:
        print("Processing the notebooks with nbdev into _proc")
        printed = process(root).strip()
        website.finish(root)
        problems = check_processed(root) + ([f"nbdev complained:\n{printed}"] if printed else [])
    if problems:
        print(*problems, f"{len(problems)} fault(s); nothing was rendered", sep="\n")
        return 1
    if not shutil.which("quarto"):
        print(
            f"The book is in order, but NOTHING WAS RENDERED: Quarto is not on the PATH. It is a program of its own, not a "
            f"Python package: get version {QUARTO} from https://quarto.org/docs/download/ (a package or an archive for Linux, macOS "
            f"and Windows), see that `quarto --version` answers, and run `make docs` again. The pages as Quarto will get them are in _proc."
        )
        return 0
    print(
        "Rendering with Quarto",
        subprocess.run(["quarto", "--version"], capture_output=True, text=True).stdout.strip(),
    )
    run = subprocess.run(
        ["quarto", "render", "--no-cache"],
        cwd=root / "_proc",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    warned = [line for line in run.stdout.splitlines() if re.search(r"WARN|ERROR|[Uu]nable to resolve", line)]
    if run.returncode or warned:
        print(
            run.stdout if run.returncode else "\n".join(warned),
            "Quarto complained; _docs is left as it was",
            sep="\n",
        )
        return 1
    shutil.rmtree(root / "_docs", ignore_errors=True)
    shutil.move(root / "_proc/_docs", root / "_docs")
    print("The site is in _docs: open _docs/index.html")
    return 0


# --- README.md and constraints.txt -----------------------------------------------------------------------------------


def address(page):
    "Where the page of a notebook, named from `nbs/`, stands on the site."
    folder, _, stem = page.removesuffix(".ipynb").rpartition("/")
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z0-9]*_", "", stem) + ".html")


def relink(text, site):
    "Markdown from `nbs/` as it must read one folder up: links to pages lead to the site, and to the notebook beside it."

    def fix(match):
        target = match[3]
        if target.startswith("#") or re.match(r"[a-z]+:", target):
            return match[0]
        page, sign, place = target.partition("#")
        if page.endswith(".ipynb"):
            return f"[{match[2]}]({site}/{address(page)}{sign}{place}) ([notebook](nbs/{page}))"
        return match[0].replace(f"({target}", f"({posixpath.normpath(posixpath.join('nbs', target))}", 1)

    return "".join(part if k % 2 else LINK.sub(fix, part) for k, part in enumerate(FENCE.split(text)))


def readme(root=ROOT):
    "The text of README.md and its pictures as `{path: bytes}`, made from `nbs/index.ipynb` with nbconvert."
    import nbformat
    from nbconvert import MarkdownExporter

    config = yaml.safe_load((Path(root) / "_quarto.yml").read_text(encoding="utf-8"))
    site = config["website"]["site-url"]
    nb = nbformat.read(Path(root) / "nbs/index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}  # colours on GitHub
    nb.cells, alts = [c for c in nb.cells if not is_hidden(c)], {}
    for k, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = re.sub(r" \(@fig-[\w-]+\)", "", cell.source)  # GitHub numbers no figures
            cell.source = re.sub(r"@fig-[\w-]+", "the picture above", relink(cell.source, site))
        else:
            options = directives(cell)
            alts[k] = str(options.get("fig-alt", "picture"))
            if options.get("echo") is False:
                cell.source = ""
                continue
            cell.source = re.sub(r"\A(?:#\s?\|.*\n?)+", "", cell.source).strip()
    text, resources = MarkdownExporter().from_notebook_node(
        nb, {"unique_key": "README", "output_files_dir": "README_files"}
    )
    text = re.sub(
        r"!\[\w+\]\((README_files/README_(\d+)_)",
        lambda m: f"![{alts.get(int(m[2]), 'picture')}]({m[1]}",
        text,
    )
    text = re.sub(r"```python\n\s*```\n", "", text)  # of cells that show their picture only
    note = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", dict(resources.get("outputs") or {})


def write_readme(root=ROOT):
    "Write what `readme` gives."
    text, pictures = readme(root)
    shutil.rmtree(Path(root) / "README_files", ignore_errors=True)
    for name, data in pictures.items():
        (Path(root) / name).parent.mkdir(exist_ok=True)
        (Path(root) / name).write_bytes(data)
    (Path(root) / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(pictures)} picture(s)")


def constraints(root=ROOT):
    "Write constraints.txt from what is installed here: published versions only, no PyTorch (optional, and platform-bound)."
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [
        line
        for line in frozen.splitlines()
        if re.fullmatch(r"[\w.-]+==[\w.!+]+", line)
        and not re.match(r"(pip|torch\w*|triton|nvidia-[\w-]+|retinanet_nb)==", line)
    ]
    head = (
        "# Every version that the tests saw (make constraints). Used with pip's -c: it installs nothing by itself.\n"
        f"# Python {sys.version_info.major}.{sys.version_info.minor}, {sys.platform}\n"
    )
    (Path(root) / "constraints.txt").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(lines)} versions")


# --- results ----------------------------------------------------------------------------------------------------------


def result(name, run, report, machine, minutes, *commands, root=ROOT):
    "Keep of a run's folder and of a report.json what the chapter of results shows: no paths, no pictures, a few kilobytes. `minutes` of processor time."
    run = Path(run)
    config, history, report = (
        json.loads(Path(p).read_text(encoding="utf-8"))
        for p in (run / "config.json", run / "history.json", report)
    )
    if config["hyperparameters"]["weights"]:
        config["hyperparameters"]["weights"] = Path(config["hyperparameters"]["weights"]).name
    short = lambda v: None if v is None else float(f"{v:.6g}")
    kept = {
        "commands": list(commands),
        "machine": machine,
        "processor_minutes": float(minutes),
        "engine": f"{config['engine']}, Keras {config['keras']}",
        "pictures": config["pictures"],
        "hyperparameters": config["hyperparameters"],
        "history": [{k: short(v) for k, v in entry.items()} for entry in history],
        "test": {
            "pictures": report["pictures"],
            "voc07_map": short(report["voc07_map"]),
            "coco": {k: short(v) for k, v in report["coco"].items()},
            "classes": {
                c: {"objects": v["objects"], "voc07": short(v["voc07"]), "coco": short(v["coco"])}
                for c, v in report["classes"].items()
            },
        },
    }
    path = Path(root) / "nbs/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.relative_to(root)}: {path.stat().st_size:,} bytes")


MOST_CARRIED = 12_000_000  # bytes of a detector that comes with the package


def carry(path, data, split="val", name="Pascal VOC 2007", root=ROOT):
    "Make the detector in a file the one of photographs that the package carries: in half precision, and measured so on pictures that it did not learn from."
    from retinanet_nb.evaluation import evaluate
    from retinanet_nb.files import write_json
    from retinanet_nb.model_files import save_half
    from retinanet_nb.retinanet_box import load_detector
    from retinanet_nb.voc import VOCDataset

    assets = Path(root) / "retinanet_nb/assets"
    with tempfile.TemporaryDirectory() as folder:
        half = save_half(load_detector(path), Path(folder) / "photos.keras")
        if half.stat().st_size > MOST_CARRIED:
            sys.exit(f"{half.stat().st_size:,} bytes are too many for the package")
        detector = load_detector(half)
        report = evaluate(detector, VOCDataset(data, split, detector.class_names), coco=False)
        figures = {
            "voc07_map": round(report.voc07_map, 4),
            "pictures": report.pictures,
            "score": round(report.best_f1.score, 2),
            "data": f"{name} ({split})",
            "weights": detector.count_params(),
        }
        shutil.copy(half, assets / "photos.keras")
        write_json(assets / "photos.json", figures)
    print(
        f"{report}\n{assets / 'photos.keras'}: {(assets / 'photos.keras').stat().st_size:,} bytes, {figures}"
    )


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "check"
    if command == "check":
        import website

        faults = check() + website.check()
        print(*faults, f"{len(notebooks())} pages, {len(faults)} fault(s)", sep="\n")
        sys.exit(bool(faults))
    elif command == "docs":
        sys.exit(docs())
    elif command == "readme":
        write_readme()
    elif command == "constraints":
        constraints()
    elif command == "result":
        result(*sys.argv[2:])
    elif command == "carry":
        carry(*sys.argv[2:])
    else:
        sys.exit(f"unknown command {command!r}; one of check, docs, readme, constraints, result, carry")
