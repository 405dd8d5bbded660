"""The language of the book: terms explained before they are used, spelling, idiom, figures that the text names, how a chapter ends."""

import ast
import re
from functools import cache

import pytest
import yaml

import book

ROOT = book.ROOT
WORDS = ROOT / "tests/words.txt"

# --- what a page says --------------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]*)\)")
TAG = re.compile(r"</?[a-z][^>]*>")


def blocks(cells):
    "Paragraphs, list items, table rows, headings and captions of a page in reading order, as they stand."
    for cell in cells:
        if cell["cell_type"] == "markdown":
            text = MATH.sub(" ", FENCE.sub("", book.source(cell)))
            for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\. ))", text):
                if paragraph.strip():
                    yield " ".join(paragraph.split())
        else:
            options = book.directives(cell)
            for key in ("fig-cap", "fig-alt", "code-summary"):
                if options.get(key):
                    yield MATH.sub(" ", str(options[key]))


@cache
def plain(block):
    "A block without code, addresses, references and tags: what is read aloud."
    return re.sub(r"@[\w-]+", " ", TAG.sub(" ", LINK.sub("] ", CODE.sub(" ", block))))


@cache
def cells(name):
    "The cells of a page."
    return book.read(ROOT / "nbs" / name)["cells"]


@cache
def pages():
    "Pages in the order of the sidebar, each with its blocks; the home page, which sums up, is left out."
    order = []

    def walk(entries):
        if isinstance(entries, str):
            entries = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").glob(entries))
        for entry in entries:
            if isinstance(entry, dict):
                walk(entry["contents"])
            elif entry != "index.ipynb":
                order.append(entry)

    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    walk(settings["website"]["sidebar"]["contents"])
    return {name: list(blocks(cells(name))) for name in order}


MADE = {"reference.ipynb", "bibliography.ipynb"}  # of docstrings, which are read themselves, and of titles
WRITTEN = [name for name in pages() if name not in MADE]


# --- nothing is used before it is explained ----------------------------------------------------------------------------

# A term, and the page that explains it. A page before that one may use the term where the paragraph of its first use
# links to the explanation, or says where it comes.
TERMS = {
    r"anchors?": "00_detection.ipynb",
    r"backbones?": "00_detection.ipynb",
    r"pyramid": "00_detection.ipynb",
    r"IoU": "00_detection.ipynb",
    r"logits?": "00_detection.ipynb",
    r"deltas?": "00_detection.ipynb",
    r"suppression": "00_detection.ipynb",
    r"focal loss": "00_detection.ipynb",
    r"AP|mAP": "00_detection.ipynb",
    r"documented system": "00_detection.ipynb",
    r"canvas(es)?": "00a_pictures.ipynb",
    r"recurring picture": "00b_shapes.ipynb",
    r"difficult objects?|`difficult`": "00b_shapes.ipynb",
    r"engines?": "01_hyperparameters.ipynb",
    r"presets?": "01_hyperparameters.ipynb",
    r"hyperparameters?": "01_hyperparameters.ipynb",
    r"ImageNet": "02_resnet50.ipynb",
    r"strides?": "02_resnet50.ipynb",
    r"feature maps?": "02_resnet50.ipynb",
    r"residual": "02_resnet50.ipynb",
    r"BatchNorm": "02a_batch_norm.ipynb",
    r"feature pyramid": "03a_fpn.ipynb",
    r"subnets?": "03b_subnets.ipynb",
    r"prior": "03b_subnets.ipynb",
    r"GroupNorm": "03b_subnets.ipynb",
    r"bfloat16": "04a_anchors.ipynb",
    r"clamps?|clamped": "04b_boxes.ipynb",
    r"positive anchors?": "05a_targets.ipynb",
    r"`force_match`|forced match": "05a_targets.ipynb",
    r"cross entropy": "05b_losses.ipynb",
    r"smooth L1|Smooth L1": "05b_losses.ipynb",
    r"records?": "06a_voc.ipynb",
    r"devkit|development kit": "06a_voc.ipynb",
    r"COCO": "06b_formats.ipynb",
    r"augmentations?": "06g_augmentation.ipynb",
    r"coverage": "06d_inspection.ipynb",
    r"recall": "07a_evaluation.ipynb",
    r"false alarms?": "07a_evaluation.ipynb",
    r"AP50|AP75|VOC07": "07a_evaluation.ipynb",
    r"Adam|AdamW|SGD": "07b_training.ipynb",
    r"warm-?up": "07b_training.ipynb",
    r"weight decay": "07b_training.ipynb",
    r"checkpoints?": "07b_training.ipynb",
    r"moving average of the weights": "07b_training.ipynb",
    r"confusion matrix": "07d_mistakes.ipynb",
}
PROMISE = re.compile(r"\b(comes?|explained|explains|more of it) (below|later|in)\b|\b[Cc]hapters? \[?\d")


def used_too_early(pages, terms):
    "Sentences about first uses of a term, on pages before the one that explains it, which don't say where that is."
    order, faults = list(pages), []
    for term, home in terms.items():
        pattern = re.compile(
            rf"(?<![\w-])(?:{term})(?![\w-])", 0 if re.search("[A-Z]", term) else re.IGNORECASE
        )
        assert home in pages, f"{home}, which explains {term}, is not in the sidebar"
        assert any(pattern.search(readable(block)) for block in pages[home]), f"{home} doesn't explain {term}"
        for name in order[: order.index(home)]:
            told = (block for block in pages[name] if not block.startswith("#"))  # a heading can't say where
            first = next((block for block in told if pattern.search(readable(block))), None)
            if first is None:
                continue
            sentence = next(
                part for part in [*re.split(r"(?<=[.?!:]) ", first), first] if pattern.search(readable(part))
            )
            if PROMISE.search(sentence):
                continue
            targets = [target.partition("#")[0].rpartition("/")[2] for target in LINK.findall(first)]
            if home.rpartition("/")[2] not in targets:
                faults.append(f"{name}: “{term}” comes in {home}: {first[:160]}")
    return faults


@cache
def readable(block):
    "A block without addresses and references; code stays, for some terms are code."
    return re.sub(r"@[\w-]+", " ", TAG.sub(" ", LINK.sub("] ", block)))


def test_nothing_is_used_before_it_is_explained():
    faults = used_too_early(pages(), TERMS)
    assert not faults, "\n".join(faults)


def planted(name, text):
    "The book with one more cell at the start of a page."
    return {**pages(), name: [*blocks([{"cell_type": "markdown", "source": text}]), *pages()[name]]}


@pytest.mark.parametrize(
    "text, found",
    [
        ("The *confusion matrix* tells.", True),
        ("A list:\n\n- one\n- the confusion matrix\n", True),
        ("The confusion matrix tells, see [7.1](07a_evaluation.ipynb).", True),  # explained on another page
        ("What comes later is long. The confusion matrix tells.", True),  # a promise about something else
        ("The [confusion matrix](07d_mistakes.ipynb#which-class-for-which) tells.", False),
        ("The confusion matrix, which comes in 7.4, tells.", False),
        ("`confusion_matrix` tells.", False),  # a name in code is not the word
        ("Nothing.", False),
    ],
)
def test_a_planted_term_is_found(text, found):
    term = {r"confusion matrix": "07d_mistakes.ipynb"}
    faults = used_too_early(planted("02_resnet50.ipynb", text), term)
    assert bool(faults) is found, faults
    assert all(fault.startswith("02_resnet50.ipynb: “confusion matrix”") for fault in faults)


# --- spelling ----------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
DOCSTRING_CODE = re.compile(r"`[^`]+`|\b\w*[_.=/\d]\w*\b|\b[a-z]+[A-Z]\w*|\([^()]*[,*/][^()]*\)")


def words_of(text):
    "The words of a text as they are looked up: small letters, without the genitive's s."
    for token in TOKEN.findall(text):
        word = token.replace("’", "'").lower()
        yield re.sub(r"'s$|s'$", lambda m: "s" if m[0] == "s'" else "", word)


@cache
def texts():
    "(where, text) of everything that is read: prose, captions, docstrings of the package."
    found = [("index.ipynb", plain(b)) for b in blocks(cells("index.ipynb"))]
    made = {
        "reference.ipynb",
        "bibliography.ipynb",
    }  # of docstrings, which are read themselves, and of titles
    found += [(name, plain(block)) for name, page in pages().items() if name not in made for block in page]
    for path in sorted((ROOT / "retinanet_nb").glob("*.py")):
        if path.name == "_modidx.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                text = MATH.sub(" ", ast.get_docstring(node))
                found.append((f"{path.name}, {node.name}", DOCSTRING_CODE.sub(" ", text)))
    return found


@pytest.fixture(scope="module")
def dictionary():
    from spellchecker import SpellChecker

    return SpellChecker(language="en", distance=1)


@pytest.fixture(scope="module")
def own_words():
    return set(WORDS.read_text(encoding="utf-8").split())


def misspelled(texts, dictionary, own_words):
    "Each unknown word with the first place where it stands."
    found = {}
    for where, text in texts:
        for word in words_of(text):
            if len(word) > 2 and word not in own_words and word not in found and word not in dictionary:
                found[word] = where
    return found


def test_spelling(dictionary, own_words):
    found = misspelled(texts(), dictionary, own_words)
    assert not found, "mend them, or add them to tests/words.txt: " + ", ".join(
        f"{word} ({where})" for word, where in sorted(found.items())
    )


def test_own_words_are_a_list(dictionary, own_words):
    "Sorted, each once, in small letters, and none that the dictionary has."
    lines = WORDS.read_text(encoding="utf-8").split()
    assert lines == sorted(own_words)
    assert not [word for word in lines if word in dictionary or word != word.lower() or len(word) < 3]


@pytest.mark.parametrize("wrong", ["recieve", "seperate", "occured", "detctor", "ancors", "wich"])
def test_a_planted_misspelling_is_found(wrong, dictionary, own_words):
    text = f"Anchors **{wrong}** their objects' boxes: the picture’s `recieved` one isn't _theirs_."
    assert misspelled([("here", plain(text))], dictionary, own_words) == {wrong: "here"}


# One way throughout: British, with -ise, and regular participles. Names (Apache License) and Keras's words stay.
AMERICAN = re.compile(
    r"\b(colou?red?|gray\w*|neighbor\w*|favor\w*|behavior\w*|centers?|centered|label(ed|ing)|artifacts?"
    r"|\w*(normal|recogn|vector|general|organ|regular|visual|initial|summar|minim|maxim)iz(e[srd]?|ing|ations?)"
    r"|(?<!Apache )[Ll]icenses?|meters?|model(ed|ing)|learnt|spelt|burnt|color(s|ed|ful)?)\b"
)


def spelled_otherwise(blocks):
    found = [(match[0], block) for block in blocks for match in AMERICAN.finditer(plain(block))]
    return [f"{word}: {block[:120]}" for word, block in found if "colour" not in word]


@pytest.mark.parametrize("name", WRITTEN)
def test_spelled_one_way(name):
    faults = spelled_otherwise(pages()[name])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text, found", [("A gray color.", 2), ("A grey colour, coloured.", 0), ("`color`", 0)]
)
def test_planted_spellings(text, found):
    assert len(spelled_otherwise([text])) == found


# --- idiom -------------------------------------------------------------------------------------------------------------

# What has been mended once and would not be written by anybody whose language this is.
UNIDIOMATIC = {
    r"[Aa]t each cell wait": "nine anchors wait in each cell",
    r"\bha(s|ve) the say\b": "decides",
    r"\bthousand million": "billion",
    r"\bthe lying ones\b": "those that lie on their side",
    r"\bthrows? the dice\b": "draws at random",
    r"(^|[.:;!] |- )Who (only |also )?\w+s\b(?![^.?]*\?)": "if you …, or: those who …",
    r"(^|[.:;!] |\()[Ww]hoever (?!he |she |they )": "if you …, or: those who …",
    r"\bone (text )?(file|line|record|XML) an? (picture|object|epoch|split)\b": "one … for each …",
    r"(^|[.;] )Else,? ": "Otherwise",
    r"\b(lets?|more) doubles\b": "duplicates",
    r"\bhas its own mind\b": "has a mind of its own",
    r"\bhow (an?|the) \w+ looks? like\b": "what … looks like",
    r"\b(is|are) customary since\b": "has been customary since",
    r", sharing means to\b": "means …ing",
    r"\bheld against (the|each)\b": "compared with",
}


def unidiomatic(blocks):
    return [
        f"{found[0]} → {better}"
        for block in blocks
        for pattern, better in UNIDIOMATIC.items()
        for found in re.finditer(pattern, plain(block))
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_idiom(name):
    faults = unidiomatic(pages()[name])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        "At each cell wait nine anchors; at each cell wait more.",
        "Who wants a detector, must train it.",
        "It helps. Whoever only reads can go on.",
        "VOC writes one file a picture.",
        "The score has the say.",
    ],
)
def test_planted_idiom(text):
    assert unidiomatic([text])
    assert not unidiomatic(["Those who want a detector must train it, and ask whoever knows how."])


# --- figures, and how a chapter ends -----------------------------------------------------------------------------------


def unmentioned(cells):
    "Labels of figures that no text on their page refers to."
    labels = [str(book.directives(cell).get("label", "")) for cell in cells]
    told = " ".join(
        book.source(cell)
        if cell["cell_type"] == "markdown"
        else str(book.directives(cell).get("fig-cap", ""))
        for cell in cells
    )
    return [
        label for label in labels if label.startswith("fig-") and not re.search(rf"@{label}(?![\w-])", told)
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_figures_are_mentioned(name):
    missing = unmentioned(cells(name))
    assert not missing, f"no text says @{', @'.join(missing)}"


def test_an_unmentioned_figure_is_found():
    figure = {"cell_type": "code", "source": '#| label: fig-x\n#| fig-cap: "X"\nshow()'}
    say = lambda text: {"cell_type": "markdown", "source": text}
    assert unmentioned([say("See @fig-x-more."), figure]) == ["fig-x"]
    assert unmentioned([say("See @fig-x."), figure]) == []


CHAPTERS = [name for name in pages() if re.match(r"0[0-8][a-z]?_", name)]


def faults_of_ending(cells):
    "What is missing at a chapter's end: three lines, three to five questions with answers, an exercise, the next step."
    text = "\n\n".join(book.source(cell) for cell in cells if cell["cell_type"] == "markdown")
    _, found, end = text.rpartition("\n## In short\n") if "\n## In short\n" in text else ("", "", text)
    if not found and not text.startswith("## In short\n"):
        return ["no “In short”"]
    summary = end.partition("\n## ")[0]
    faults = []
    lines = re.findall(r"^- ", summary, re.MULTILINE)
    if len(lines) != 3:
        faults.append(f"{len(lines)} lines of summary, not 3")
    questions = re.findall(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", end, re.DOTALL)
    if not 3 <= len(questions) <= 5:
        faults.append(f"{len(questions)} questions, not 3 to 5")
    faults += [f"no answer to: {question}" for question, answer in questions if not answer.strip()]
    if "**Exercise.**" not in end:
        faults.append("no exercise")
    if not re.search(r"\]\(\w+\.ipynb[^)]*\)", end.rpartition("**Exercise.**")[2] + text[-600:]):
        faults.append("no link to the next page")
    return faults


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_ends(name):
    faults = faults_of_ending(cells(name))
    assert not faults, "; ".join(faults)


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("- ", "", "lines of summary"),
        ("<details>", "<div>", "questions"),
        ("**Exercise.**", "", "no exercise"),
        ("## In short", "## Summary", "no “In short”"),
    ],
)
def test_a_missing_ending_is_found(old, new, fault):
    spoilt = [{**cell, "source": book.source(cell).replace(old, new)} for cell in cells(CHAPTERS[0])]
    assert any(fault in found for found in faults_of_ending(spoilt))
