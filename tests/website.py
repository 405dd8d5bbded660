"""What the site has beyond the chapters: `python tests/website.py reference | pictures | colab | check`.

- `reference(root)`: the page of every public name, made from the modules; `write_reference` writes it.
- `favicon()`, `card()`: the site's two pictures, drawn by code.
- `finish(root)`: what nbdev leaves undone in `_proc`: signatures, and each page's link to Colab.
- `check(root)`: citations, headings, tables, figures, weight, other hosts; a list of sentences, empty where all is well.
- `contrasts(root)`: how well each coloured text of `styles.css` stands out from its ground.
"""

import ast
import gzip
import io
import json
import re
import sys
from pathlib import Path

import yaml

import book

ROOT = book.ROOT
HEAVIEST = 700_000  # bytes that a page brings over the wire, without the site's style, which all pages share
COLAB = "https://colab.research.google.com/github/"


def repository(root=ROOT):
    "Address and branch of the sources, from `_quarto.yml`."
    site = yaml.safe_load((Path(root) / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    return site["repo-url"], site["repo-branch"]


# --- every public name -----------------------------------------------------------------------------------------------


def title(page):
    "A page's title, `4.1 Anchors`."
    return re.match(r"#\s+(.*)", book.source(book.read(page)["cells"][0]))[1].strip()


def modules(root=ROOT):
    "`{module: page}` in reading order."
    found = {}
    for page in book.notebooks(root):
        for cell in book.read(page)["cells"]:
            if name := book.directives(cell).get("default_exp"):
                found[str(name)] = page
    return found


def public(module, root=ROOT):
    "The names in the `__all__` of a module of the package, read without importing it, and its tree."
    path = Path(root) / "retinanet_nb" / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value), tree
    return [], tree


def definition(name, tree):
    "The statement of a module that makes `name`; None where it comes from another module."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in names:
            return node
    return None


def first_sentence(text):
    "The first sentence of a docstring, on one line."
    paragraph = re.split(r"\n\s*\n", text.strip())[0]
    line = re.sub(r"\s+", " ", paragraph)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", line)[0]


def remark(node, lines):
    "The comment above a statement or behind it, or else its value, if that is short."
    above, at = [], node.lineno - 2
    while at >= 0 and re.match(r"#\s+(?![|%])\S", lines[at]):
        above.insert(0, lines[at].lstrip("# ").strip())
        at -= 1
    if above:
        return " ".join(above)
    if behind := re.search(r"\s#\s+(.*)$", lines[node.lineno - 1]):
        return behind[1].strip()
    value = re.sub(r"\s+", " ", ast.unparse(node.value))
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return ""
    return f"`{value}`" if len(value) <= 60 and "`" not in value else ""


def describe(node, module, root=ROOT):
    "One line on what a statement of a module defines: its docstring's first sentence, or its comment or value."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return first_sentence(ast.get_docstring(node) or "")
    lines = (Path(root) / "retinanet_nb" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    return remark(node, lines)


def headings(page):
    "`{public name: (heading, its identifier)}`: under what each exported name of a page is explained."
    found, heading = {}, None
    for cell in book.read(page)["cells"]:
        if cell["cell_type"] == "markdown":
            for line in book.FENCE.sub("", book.source(cell)).splitlines():
                if match := re.match(r"##+\s+(.*?)(?:\s+\{#([\w-]+)[^}]*\})?\s*$", line):
                    heading = re.sub(r"[`*]", "", match[1]), match[2] or book.slug(match[1])
        elif {"export", "exports"} & set(book.directives(cell)):
            try:
                tree = ast.parse(book.source(cell))
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found.setdefault(node.name, heading)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.setdefault(node.id, heading)
    return found


def home(name, module, names):
    "The module where a name is defined, which for one that is passed on is another."
    if definition(name, names[module][1]) is not None:
        return module
    return next(
        m for m, (listed, tree) in names.items() if name in listed and definition(name, tree) is not None
    )


def entry(name, module, page, under, tree, root):
    "The line of one name: link, description, and the heading that it stands under."
    path = page.relative_to(Path(root) / "nbs").as_posix()
    node = definition(name, tree)
    documented = isinstance(node, (ast.FunctionDef, ast.ClassDef))
    anchor = name.lower() if documented else (under[1] if under else "")
    line = f"- [{name}]({path}{'#' + anchor if anchor else ''})"
    if text := describe(node, module, root):
        line += f": {text.rstrip('.:')}."
    if under:
        line += f" *In [{under[0]}]({path}#{under[1]}).*"
    return line


def reference(root=ROOT):
    "The cells' texts of the page of every public name."
    pages = modules(root)
    names = {module: public(module, root) for module in pages}
    under = {module: headings(page) for module, page in pages.items()}
    count = sum(len(listed) for listed, _ in names.values())
    texts = [
        "# Reference\n> Every public name of the package, one line each, with the page and the heading that explain it.",
        f"The package has {count} public names in {len(pages)} modules. A name leads to its signature and arguments, the "
        "heading behind it to the explanation. What a user needs is a dozen of them: "
        "[HyperParameters](01_hyperparameters.ipynb#hyperparameters), [retinanet_model](03c_retinanet.ipynb#retinanet_model), "
        "[VOCDataset](06a_voc.ipynb#vocdataset), [COCODataset and CSVDataset](06b_formats.ipynb), "
        "[train](07b_training.ipynb#train), [evaluate](07a_evaluation.ipynb#evaluate), "
        "[retinanet_box, load_detector and detect](04d_retinanet_box.ipynb).\n\n"
        "This page is made from the modules by `python tests/website.py reference`; a test sees that it is complete.",
    ]
    for module, page in pages.items():
        listed, _ = names[module]
        if not listed:
            continue
        lines = []
        for name in sorted(listed, key=str.lower):
            own = home(name, module, names)
            lines.append(entry(name, own, pages[own], under[own].get(name), names[own][1], root))
        path = page.relative_to(Path(root) / "nbs").as_posix()
        texts.append(
            f"## retinanet_nb.{module} {{#module-{module}}}\n\n[{title(page)}]({path})\n\n" + "\n".join(lines)
        )
    return texts


def reference_notebook(root=ROOT):
    "The page of every public name as a notebook's dictionary."
    cells = [
        {"cell_type": "markdown", "id": f"4ef{k:05x}", "metadata": {}, "source": text.splitlines(True)}
        for k, text in enumerate(reference(root))
    ]
    like = book.read(Path(root) / "nbs/00_detection.ipynb")
    return {"cells": cells, **{k: v for k, v in like.items() if k != "cells"}}


def summary(page):
    "A page's title and the one line below it."
    text = book.source(book.read(page)["cells"][0])
    return title(page), re.search(r"^>\s+(\S.*?)\s*$", text, re.M)[1]


def contents(root=ROOT):
    "The home page's list of all pages, in the groups of the sidebar."
    root = Path(root)
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    groups = [e for e in config["website"]["sidebar"]["contents"] if isinstance(e, dict)]
    lines = ["## The chapters", ""]
    for page in book.sidebar_pages(
        root, [e for e in config["website"]["sidebar"]["contents"] if isinstance(e, str)]
    ):
        if page != "index.ipynb":
            name, told = summary(root / "nbs" / page)
            lines.append(f"- [{name}]({page}): {told}")
    for group in groups:
        lines += ["", f"**{group['section']}**", ""]
        for page in book.sidebar_pages(root, group["contents"]):
            name, told = summary(root / "nbs" / page)
            lines.append(f"- [{name}]({page}): {told}")
    return "\n".join(lines)


CONTENTS = "94f36a59"  # the cell of the home page that holds them


def write_reference(root=ROOT):
    "Write the page of every public name, the home page's list of pages, and README.md."
    path = Path(root) / "nbs/reference.ipynb"
    text = json.dumps(reference_notebook(root), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    home_page = Path(root) / "nbs/index.ipynb"
    nb = book.read(home_page)
    for cell in nb["cells"]:
        if cell["id"] == CONTENTS:
            cell["source"] = contents(root).splitlines(True)
    home_page.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.name}: {text.count('- [')} names")
    book.write_readme(root)


# --- pictures of the site --------------------------------------------------------------------------------------------


def favicon():
    "The site's sign, SVG: a thing, its box, and the box's caption."
    ink, box, thing = "#22303c", "#e69f00", "#56b4e9"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img"><title>retinanet_nb</title>'
        f'<rect width="64" height="64" rx="13" fill="{ink}"/>'
        f'<circle cx="33" cy="37" r="15" fill="{thing}"/>'
        f'<rect x="14" y="18" width="38" height="38" fill="none" stroke="{box}" stroke-width="5"/>'
        f'<rect x="11.5" y="8" width="24" height="12.5" fill="{box}"/></svg>\n'
    )


def strip(height=240, seeds=((116,), None, (168,))):
    "Three drawn pictures side by side, each with what the carried detector finds; `None` is the recurring one."
    import numpy as np

    import retinanet_nb
    from retinanet_nb.pictures import draw_detections
    from retinanet_nb.retinanet_box import detect, load_detector
    from retinanet_nb.shapes import draw_scene, recurring_picture

    detector = load_detector(Path(retinanet_nb.__file__).parent / "assets/shapes.keras")
    size = height, height * 4 // 3
    images = [recurring_picture()[0] if s is None else draw_scene(s, size)[0] for s in seeds]
    drawn = [
        draw_detections(i, f.boxes, f.scores, f.labels, detector.class_names)
        for i, f in zip(images, detect(detector, images))
    ]
    return np.concatenate(drawn, axis=1)


def card():
    "The picture that social networks show beside a link: 1200 × 630 pixels, RGB."
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#22303c")
    canvas = FigureCanvasAgg(figure)
    seen = figure.add_axes((0, 1 - 300 / 630, 1, 300 / 630))
    seen.imshow(strip(), interpolation="lanczos", aspect="auto")
    seen.set_axis_off()
    words = dict(family="DejaVu Sans", color="#ffffff", va="baseline")
    figure.text(0.045, 0.325, "retinanet_nb", size=52, weight="bold", **words)
    figure.text(0.045, 0.205, "RetinaNet as a book that runs", size=30, **words)
    line = "every line explained, pictured and tested in a notebook"
    figure.text(0.045, 0.105, line, size=20, **{**words, "color": "#c8d3dc"})
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_pictures(root=ROOT):
    "Write the site's pictures."
    from PIL import Image

    nbs = Path(root) / "nbs"
    (nbs / "favicon.svg").write_text(favicon(), encoding="utf-8")
    image = Image.fromarray(card()).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    (nbs / "card.png").write_bytes(held.getvalue())
    print(f"favicon.svg, card.png: {len(held.getvalue()):,} bytes")


# --- Colab -----------------------------------------------------------------------------------------------------------

NOT_IN_COLAB = {
    "11_results.ipynb",
    "11a_speed.ipynb",
    "curves.ipynb",
}  # reads files that lie beside the notebook, where Colab has the notebook alone


def colab_cell(root=ROOT):
    "The cell that installs the package in Colab, as it stands at the head of every page with code."
    address, _ = repository(root)
    return (
        "#| hide\n"
        "# In Colab the package must be installed first; anywhere else this does nothing.\n"
        'if "google.colab" in str(get_ipython()):\n'
        "    get_ipython().system(\n"
        f'        "pip install -q git+{address}"\n'
        "    )"
    )


def runs_in_colab(page):
    "Whether a page has code to run and needs nothing but the package."
    if page.name in NOT_IN_COLAB:
        return False
    return any(c["cell_type"] == "code" and not book.is_hidden(c) for c in book.read(page)["cells"])


def colab_address(page, root=ROOT):
    "Where Colab opens a page."
    address, branch = repository(root)
    path = page.relative_to(root).as_posix()
    return f"{COLAB}{address.removeprefix('https://github.com/')}/blob/{branch}/{path}"


def write_colab(root=ROOT):
    "Put the cell that installs the package behind the title of every page that lacks it."
    import hashlib

    for page in book.notebooks(root):
        nb = book.read(page)
        sources = [book.source(c) for c in nb["cells"]]
        if not runs_in_colab(page) or colab_cell(root) in sources:
            continue
        cell = {
            "cell_type": "code",
            "execution_count": None,
            "id": hashlib.sha256(page.name.encode()).hexdigest()[:8],
            "metadata": {},
            "outputs": [],
            "source": colab_cell(root).splitlines(True),
        }
        nb["cells"].insert(1, cell)
        page.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(page.name)


# --- what nbdev leaves undone ----------------------------------------------------------------------------------------


def fields(name, trees):
    "`field: type` of the class `name`, as its body declares them."
    for tree in trees:
        node = definition(name, tree)
        if isinstance(node, ast.ClassDef):
            return [
                f"{n.target.id}: {ast.unparse(n.annotation)}"
                + (f" = {ast.unparse(n.value)}" if n.value is not None else "")
                for n in node.body
                if isinstance(n, ast.AnnAssign)
            ]
    return []


def mend_signature(text, trees):
    """A signature as a reader can use it: options of commands with their help behind them, and the fields of a class
    instead of `*args, **kwargs`."""
    lines = []
    for line in text.splitlines():
        option = re.match(r"(\s*)(\w+):(\w*) ?<(.*)>(=.*?)?,?$", line)
        if option:
            space, name, kind, told, default = option.groups()
            line = f"{space}{name}{': ' * bool(kind)}{kind}{default or ''}, # {told}"
        lines.append(line)
    text = "\n".join(lines)

    def known(match):
        own = fields(match[1], trees)
        inside = "\n".join(f"    {f}," for f in own)
        return f"{match[1]}(\n{inside}\n)" if own else ""

    text = re.sub(r"def (\w+)\(\n\s*\*args, \*\*kwargs\n\):", known, text)
    return re.sub(r"```python\n\s*```\n", "", text)


def finish(root=ROOT):
    "Mend the pages in `_proc`: signatures, and a link to Colab in each page's head."
    root = Path(root)
    trees = [public(module, root)[1] for module in modules(root)]
    for page in book.notebooks(root):
        made = root / "_proc" / page.relative_to(root / "nbs")
        nb, nested = book.read(made), False
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown":
                nested = nested or bool(re.search(r"^## ", book.FENCE.sub("", book.source(cell)), re.M))
            if "show_doc(" not in book.source(cell):
                continue
            for output in cell.get("outputs", []):
                for kind in set(output.get("data", {})) & {"text/markdown", "text/plain"}:
                    text = "".join(output["data"][kind])
                    if not nested:  # on a page without sections, nbdev's headings would skip a level
                        text = re.sub(r"^### ", "## ", text, flags=re.M)
                    output["data"][kind] = mend_signature(text, trees).splitlines(True)
        if runs_in_colab(page):
            front = yaml.safe_load(book.source(nb["cells"][0]).strip().strip("-"))
            front["other-links"] = [
                {"text": "Open in Colab", "icon": "play-circle", "href": colab_address(page, root)}
            ]
            nb["cells"][0]["source"] = f"---\n{yaml.dump(front, allow_unicode=True)}\n---\n\n"
        made.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the check -------------------------------------------------------------------------------------------------------

CITATION = re.compile(r"(?<![\w@/.])@([a-z]+\d{4}[a-z]+)\b")


def check_citations(root=ROOT):
    "Every cited key has its entry in `references.bib`, and every entry is cited."
    root = Path(root)
    entries = re.findall(r"^@\w+\{([^,\s]+)", (root / "nbs/references.bib").read_text(encoding="utf-8"), re.M)
    problems = [
        f"references.bib: {key} stands twice" for key in sorted({k for k in entries if entries.count(k) > 1})
    ]
    cited = set()
    for page in book.notebooks(root):
        for cell in book.read(page)["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for key in CITATION.findall(book.prose(cell)):
                cited.add(key)
                if key not in entries:
                    problems.append(f"{page.name}: @{key} is not in references.bib")
    return problems + [f"references.bib: {key} is cited nowhere" for key in sorted(set(entries) - cited)]


def check_headings(page):
    "No heading skips a level, and none but the first is of level 1."
    problems, last = [], 1
    for cell in book.read(page)["cells"][1:]:
        if cell["cell_type"] != "markdown":
            continue
        for line in book.FENCE.sub("", book.source(cell)).splitlines():
            if match := re.match(r"(#{1,6})\s+(\S.*)", line):
                level = len(match[1])
                if level == 1 or level > last + 1:
                    problems.append(f"the heading {match[2]!r} is of level {level} behind one of {last}")
                last = level
    return problems


def check_tables(page):
    "No table has a column without a name."
    problems = []
    for cell in book.read(page)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        lines = book.FENCE.sub("", book.source(cell)).splitlines()
        for head, rule in zip(lines, lines[1:]):
            if re.match(r"\s*\|?[\s:|-]*-[\s:|-]*\|[\s:|-]*$", rule) and head.lstrip().startswith("|"):
                names = [n.strip() for n in re.split(r"(?<!\\)\|", head.strip().strip("|"))]
                if not all(names):
                    problems.append(f"a table's column has no name: {head.strip()[:60]}")
    return problems


def check_figures(page):
    "Every figure on a page is mentioned in its text."
    cells = book.read(page)["cells"]
    mentioned = {
        r for c in cells if c["cell_type"] == "markdown" for r in book.REFERENCE.findall(book.prose(c))
    }
    labels = [str(book.directives(c).get("label", "")) for c in cells if not book.is_hidden(c)]
    silent = [label for label in labels if label.startswith("fig-") and label not in mentioned]
    return [f"{label} is mentioned nowhere in the text" for label in silent]


def shown(page):
    "What a page brings to a browser: the texts of its cells, and its outputs."
    for cell in book.read(page)["cells"]:
        if cell["cell_type"] == "markdown":
            yield book.source(cell)
        elif not book.is_hidden(cell):
            if book.directives(cell).get("echo") is not False:
                yield book.source(cell)
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                best = next(
                    (k for k in ("text/html", "image/svg+xml", "image/png", "image/jpeg") if k in data), None
                )
                text = data[best] if best else output.get("text", data.get("text/plain", ""))
                yield text if isinstance(text, str) else "".join(text)


def page_weight(page):
    "Bytes that a page brings over the wire: its text as a server packs it, and pictures, which don't get smaller by that."
    return sum(len(gzip.compress(text.encode(), 6)) for text in shown(page))


# what a browser fetches by itself, as against what a reader follows
FETCHED = re.compile(
    r"!\[[^\]]*\]\(\s*<?(?:https?:)?//[^)\s]+"
    r"|<(?:img|script|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>\"']+"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^\s>\"']+"
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//[^\s;\"')]+"
    r"|url\(\s*[\"']?(?:https?:)?//[^)\"']+"
    r"|\b(?:fetch|importScripts)\(\s*[\"'](?:https?:)?//[^\"']+"
)


def check_page(page, root=ROOT):
    "Faults of one page as the site shows it."
    problems = check_headings(page) + check_tables(page) + check_figures(page)
    weight = page_weight(page)
    if weight > HEAVIEST:
        problems.append(f"weighs {weight / 1e6:.2f} MB, over {HEAVIEST / 1e6:.2f}: draw smaller pictures")
    for text in shown(page):
        problems += [f"fetches from another host: {found[:80]}" for found in FETCHED.findall(text)]
    sources = [book.source(c) for c in book.read(page)["cells"]]
    if runs_in_colab(page) and colab_cell(root) not in sources:
        problems.append("has no cell that installs the package in Colab: python tests/website.py colab")
    if page.name not in NOT_IN_COLAB:
        beside = re.compile(r"Path\(\s*[\"'](?:results|\.\.)[\"'/]")
        problems += ["reads a file beside it, which Colab lacks" for s in sources if beside.search(s)][:1]
    return problems


def check_numbers(root=ROOT):
    "The numbers in the titles: none twice, none left out."
    numbers, problems = [], []
    for page in book.notebooks(root):
        if match := re.match(r"((?:\d+|[A-Z])(?:\.\d+)?(?:, \d+\.\d+)*)\s", title(page)):
            numbers += [(n, page.name) for n in match[1].split(", ")]
    names = [n for n, _ in numbers]
    problems += [f"the number {n} is given twice" for n in sorted({n for n in names if names.count(n) > 1})]
    for number in names:
        chapter, _, section = number.partition(".")
        if section and int(section) > 1 and f"{chapter}.{int(section) - 1}" not in names:
            problems.append(f"there is {number}, but no {chapter}.{int(section) - 1}")
    return problems


def check_link_numbers(root=ROOT):
    "A link whose words are a number, such as 6.7 or A.12, leads to the page of that number."
    problems = []
    for page in book.notebooks(root):
        for cell in book.read(page)["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for number, target in re.findall(
                r"\[(?:[Cc]hapter |[Aa]ppendix )?((?:\d+|[A-Z])\.\d+)\]\(([\w/.]+\.ipynb)", book.source(cell)
            ):
                there = (page.parent / target).resolve()
                if there.is_file() and number not in re.findall(r"(?:\d+|[A-Z])\.\d+", title(there)):
                    problems.append(f"{page.name}: the link {number} leads to {title(there)!r}")
    return problems


def check(root=ROOT):
    "Faults of the site as sentences."
    root = Path(root)
    problems = check_citations(root) + check_numbers(root) + check_link_numbers(root)
    for page in book.notebooks(root):
        name = page.relative_to(root / "nbs").as_posix()
        problems += [f"{name}: {fault}" for fault in check_page(page, root)]
    for file in ("styles.css", "site.scss", "after-body.html", "404.qmd", "favicon.svg"):
        text = (root / "nbs" / file).read_text(encoding="utf-8")
        problems += [f"{file}: fetches from another host: {found[:80]}" for found in FETCHED.findall(text)]
    wanted = reference_notebook(root)
    if book.read(root / "nbs/reference.ipynb")["cells"] != wanted["cells"]:
        problems.append("reference.ipynb: differs from the modules: python tests/website.py reference")
    if contents(root) not in [book.source(c) for c in book.read(root / "nbs/index.ipynb")["cells"]]:
        problems.append("index.ipynb: its list differs from the pages: python tests/website.py reference")
    return problems


# --- contrast --------------------------------------------------------------------------------------------------------

# the grounds that text may lie on: page, bars and folded blocks of the themes cosmo and darkly
GROUNDS = {"light": ("#ffffff", "#f8f9fa"), "dark": ("#222222", "#303030")}


def luminance(color):
    "Relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 defines it."
    digits = color.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    "Contrast of two colours, 1…21."
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rules(css):
    "`(selector, {property: value})` of every rule of a flat style sheet."
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        properties = dict(re.findall(r"([\w-]+)\s*:\s*([^;]+)", body))
        for selector in selectors.split(","):
            yield selector.strip(), {k: v.strip() for k, v in properties.items()}


def contrasts(css):
    "`{(theme, selector): contrast}` of every text that a style sheet colours, on the worst ground it may lie on."
    found, dark = {}, "body.quarto-dark "
    colored = {s: p for s, p in rules(css) if re.fullmatch(r"#[0-9a-fA-F]{3,6}", p.get("color", ""))}
    for selector in {s.removeprefix(dark) for s in colored}:
        for theme in GROUNDS:
            own = colored.get(dark + selector) if theme == "dark" else None
            own = own or colored.get(selector)
            if own is None:
                continue
            ground = own.get("background-color") or own.get("background") or ""
            grounds = (ground,) if ground.startswith("#") else GROUNDS[theme]
            found[theme, selector] = min(contrast(own["color"], g) for g in grounds)
    return found


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "check"
    if command == "reference":
        write_reference()
    elif command == "pictures":
        write_pictures()
    elif command == "colab":
        write_colab()
    elif command == "check":
        faults = check()
        print(*faults, f"{len(faults)} fault(s)", sep="\n")
        sys.exit(bool(faults))
    else:
        sys.exit(f"unknown command {command!r}; one of reference, pictures, colab, check")
