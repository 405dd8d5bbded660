"""Questions of a reader, more than thirty: each has its answer on a page, under a heading, and the answer's words are there."""

import pytest

import book

# question, page, heading (as its link), words that the answer can't do without
QUESTIONS = [
    ("What does a detector give back?", "00_detection", "the-task", "box"),
    ("What is IoU?", "00_detection", "when-is-a-box-right", "union"),
    ("How do the parts fit together?", "00_detection", "the-whole-system-on-one-map", "anchors"),
    ("What is the documented system?", "91_documented_system", "the-code", "ResNet50"),
    ("Are boxes pixels or edges?", "00a_pictures", "what-a-picture-is", "edges"),
    ("Which preset do I take?", "01_hyperparameters", "presets", "from-scratch"),
    ("Why residual connections?", "02_resnet50", "why-residual-connections", "identity"),
    ("Why is my mAP 0 while the loss falls?", "02a_batch_norm", "the-trap", "moving"),
    ("Why does P6 come from C5?", "03a_fpn", "two-levels-more", "C5"),
    ("What does the prior π do?", "03b_subnets", None, "prior"),
    ("Where do class names live?", "03c_retinanet", "a-model-that-knows-what-it-is", "ModelCard"),
    ("Why these sizes and scales of anchors?", "04a_anchors", "why-these-sizes-and-scales", "1.26"),
    ("What does `class_specific_filter` do?", "04c_filtering", "one-class-or-all", "class"),
    ("What is suppression?", "04c_filtering", "suppression-for-a-whole-batch-at-once", "steps"),
    ("How do I use a saved detector?", "04d_retinanet_box", "saving-and-loading", "load_detector"),
    ("Why fit a picture before detection?", "04d_retinanet_box", "one-call-for-a-picture", "canvas"),
    ("What happens to an anchor with an IoU of 0.45?", "05a_targets", None, "ignored"),
    ("Why focal loss?", "05b_losses", "focal-loss", "easy"),
    ("Where does a VOC pixel end?", "06a_voc", "where-does-a-pixel-end", "edge"),
    ("My data are a CSV file", "tutorials/questions", "my-annotations-are-a-csv-file", "path"),
    ("How do I write a CSV file?", "tutorials/your_pictures", "four-formats", "five empty fields"),
    ("My labels are YOLO's", "tutorials/your_pictures", "four-formats", "fractions"),
    ("How do I split my pictures?", "tutorials/your_pictures", "split", "video"),
    ("Which tool do I label with?", "tutorials/your_pictures", "label", "CVAT"),
    ("What do I label next?", "tutorials/your_pictures", "look-at-the-mistakes", "missed"),
    ("I have a detector for other classes", "tutorials/your_pictures", "train", "afresh"),
    ("The loss is NaN", "tutorials/questions", "the-loss-is-nan", "warmup_steps"),
    ("The mAP is 0", "tutorials/questions", "the-map-is-0-though-the-loss-falls", "BatchNorm"),
    ("The mAP is 0: what do I look at first?", "tutorials/curves", "the-map-is-0-in-this-order", "selfcheck"),
    ("What does a healthy curve look like?", "tutorials/curves", "a-healthy-run", "background"),
    ("Are my labels wrong?", "tutorials/curves", "wrong-labels", "whatever their class"),
    ("I have no TensorFlow", "tutorials/questions", "i-have-no-tensorflow-or-dont-want-it", "KERAS_BACKEND"),
    ("Does it run under JAX or PyTorch?", "tutorials/deploying", "another-engine", "JAX"),
    ("Can I export to ONNX?", "tutorials/deploying", "one-file-for-a-runtime", "ONNX"),
    ("How do I build a server?", "tutorials/deploying", "a-server", "FastAPI"),
    ("It runs out of memory", "tutorials/questions", "it-runs-out-of-memory", "batch_size"),
    ("May I use two machines?", "tutorials/questions", "may-i-use-two-machines", "machines"),
    ("What is known of several machines?", "09b_machines", "what-was-run", "not run"),
    ("I have a million pictures", "tutorials/questions", "i-have-a-million-pictures", "--ray"),
    ("How do I detect on a cluster?", "09c_shards", "on-a-ray-cluster", "RAY_ADDRESS"),
    (
        "How do I use two graphics cards?",
        "tutorials/several_devices",
        "jax-one-line-before-the-training",
        "DataParallel",
    ),
    ("It is slow", "tutorials/questions", "it-is-slow", "workers"),
    ("Which threshold do I take?", "tutorials/first_detection", "how-sure-is-sure-enough", "false alarm"),
    (
        "What are the three arrays?",
        "tutorials/first_detection",
        "minute-four-what-the-three-arrays-mean",
        "scores",
    ),
    ("May I use my own backbone?", "tutorials/own_parts", "a-backbone", "registered"),
    ("May I use my own loss?", "tutorials/own_parts", "a-loss", "losses_of"),
    ("May I use my own augmentation?", "tutorials/own_parts", "augmentation", "rng"),
    ("How do I go on with a run?", "tutorials/questions", "it-was-interrupted", "--resume"),
    ("VOC07 against COCO", "tutorials/questions", "why-is-cocos-ap-so-much-lower-than-vocs", "0.95"),
    (
        "What replaces `convert_model`?",
        "tutorials/coming_from",
        "from-keras-retinanet",
        "retinanet_box(model)",
    ),
    ("My objects are too small", "tutorials/small_objects", "three-ways-out", "anchors"),
    ("Was it measured, and where?", "tutorials/questions", "what-was-measured-where", "two cores"),
    ("How good does it get?", "11_results", None, "minutes"),
]


def test_there_are_at_least_thirty():
    questions = [question for question, *_ in QUESTIONS]
    assert len(set(questions)) == len(questions) >= 30


def test_each_tutorial_answers_something():
    "A tutorial that answers no question of the list is not found by who asks."
    pages = {p.stem for p in (book.ROOT / "nbs/tutorials").glob("*.ipynb")}
    assert pages == {page.split("/")[1] for _, page, *_ in QUESTIONS if page.startswith("tutorials/")}


def test_the_page_of_questions_leads_to_each_tutorial():
    page = "\n".join(map(book.source, book.read(book.ROOT / "nbs/tutorials/questions.ipynb")["cells"]))
    others = {p.name for p in (book.ROOT / "nbs/tutorials").glob("*.ipynb")} - {"questions.ipynb"}
    assert not [name for name in others if f"]({name}" not in page]


@pytest.mark.parametrize("question, page, heading, word", QUESTIONS, ids=[q for q, *_ in QUESTIONS])
def test_question_has_its_answer(question, page, heading, word):
    path = book.ROOT / "nbs" / f"{page}.ipynb"
    assert path.exists(), page
    if heading is not None:
        assert heading in book.anchors(path), f"{page} has no heading #{heading}"
    text = section(path, heading)
    assert word.lower() in text.lower(), f"{page}#{heading} doesn't speak of {word}"


def section(path, heading):
    "The text below a heading up to the next of its rank or higher; the whole page for None."
    import re

    lines, inside, level = [], heading is None, 0
    for cell in book.read(path)["cells"]:
        source = book.source(cell)
        if cell["cell_type"] != "markdown":
            if inside:
                lines.append(source)
            continue
        for line in source.splitlines():
            match = re.match(r"(#{1,6})\s+(.*)", line)
            if match and heading is not None:
                if book.slug(match[2]) == heading:
                    inside, level = True, len(match[1])
                elif inside and len(match[1]) <= level:
                    inside = False
            if inside:
                lines.append(line)
    return "\n".join(lines)
