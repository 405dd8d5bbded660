"""The carried detector of photographs, trained from nothing on a processor: how `retinanet_nb/assets/photos.keras` was made.

    RETINANET_DATA=… python tests/photos.py shrink   # VOC2007's training pictures, at most 288 pixels
    python tests/photos.py name --epochs 14          # the body learns to name objects cut out of them
    python tests/photos.py find --minutes 180        # the detector learns to find them (after 48 and 95, chapter 11)
    python tests/photos.py find --minutes 250 --since 180 --top 0.5
    python tests/photos.py write photos.keras        # half precision, for the package
    python tests/photos.py sheet sheet.jpg           # what it finds in 24 pictures of `val`

Pictures, augmentation, anchors, targets and losses are the package's. The steps are not Keras's: PyTorch alone, with channels last and bfloat16, takes
two thirds of the time that they take under TensorFlow, so `Twin` has the same layers under the same names, and `tests/test_photos.py` holds the two together. A run that is
killed goes on where it was after its last epoch. Everything lies in `--folder` (runs/photos).
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from retinanet_nb.anchors import AnchorGenerator
from retinanet_nb.boxes import box_coder
from retinanet_nb.detections import detect, load_detector
from retinanet_nb.generator import train_generator
from retinanet_nb.hyperparameters import VOC_CLASSES, AnchorParameters, preset
from retinanet_nb.losses import focal_loss, smooth_l1_loss
from retinanet_nb.model_files import carried_figures, save_half
from retinanet_nb.pictures import draw_detections, read_image, write_image
from retinanet_nb.records import Record, Records
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.retinanet_box import retinanet_box
from retinanet_nb.targets import Matcher, assign_targets
from retinanet_nb.voc import VOCDataset

# The first part of the training never sees these three: chapter 11 asks what the detector so far is worth to somebody who comes with a hundred pictures of them.
HELD_OUT = ("boat", "cow", "sheep")
# The parts of the training: side of the canvas, the classes whose pictures are left out, the share of mosaics, and the share of the time at which the part
# ends. Small pictures first: the more the network sees in an hour, the better it learns to name; then comes finding small things, and at last pictures as they are.
PARTS = (
    (160, HELD_OUT, 0.5, 0.15),
    (160, (), 0.5, 0.6),
    (192, (), 0.5, 0.87),
    (224, (), 0.0, 1.0),
)
SETTINGS = preset("tiny").replace(
    backbone="small",
    feature_size=96,
    image_size=(192, 192),
    batch_size=16,
    anchors=AnchorParameters(sizes=(16, 32, 64, 128, 256)),
    learning_rate=2e-3,
    weight_decay=0.03,
    mosaic=0.5,
    crop=0.5,
    scale_jitter=(0.6, 1.4),
    color_jitter=0.3,
    repeat_rare=0.08,
    precision="float32",
    seed=1,
)


def put(path, thing):
    "Save for PyTorch; a file that is cut off replaces nothing."
    torch.save(thing, f"{path}.new")
    os.replace(f"{path}.new", path)


def shrink(data, folder, side=288):
    "The training pictures at most `side` pixels high and wide, as files, and a list of them with their boxes."
    (folder / "small").mkdir(parents=True, exist_ok=True)
    rows = []
    for record in VOCDataset(data / "voc2007", "train", VOC_CLASSES):
        image = read_image(record.image)
        scale = min(1, side / max(image.shape[:2]))
        h, w = (round(n * scale) for n in image.shape[:2])
        path = folder / "small" / f"{record.image.stem}.jpg"
        small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(path), small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        boxes = record.boxes * np.array([w / record.width, h / record.height] * 2)
        rows.append(
            {
                "image": str(path),
                "width": w,
                "height": h,
                "boxes": boxes.tolist(),
                "labels": record.labels.tolist(),
                "difficult": record.difficult.tolist(),
            }
        )
    (folder / "small.json").write_text(json.dumps(rows))


def pictures(folder, without=()):
    "The small pictures as a data set, but for those that show one of the classes `without`."
    rows = json.loads((folder / "small.json").read_text())
    banned = {VOC_CLASSES.index(name) for name in without}
    records = [Record(**row) for row in rows if not banned & set(row["labels"])]
    return Records(records, VOC_CLASSES)


def same(x, size, stride):
    "`x` (B, C, H, W), padded where Keras's `same` is not symmetric, and the padding that is left to the convolution."
    total = [max((math.ceil(n / stride) - 1) * stride + size - n, 0) for n in x.shape[2:]]
    if all(n % 2 == 0 for n in total):
        return x, tuple(n // 2 for n in total)
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in total)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


class Twin(nn.Module):
    "The network of `retinanet_model(20, SETTINGS)` in PyTorch: a module for every layer with weights, under its name."

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer in self.of(model):
            weights = layer.get_weights()
            if isinstance(layer, keras.layers.Conv2D):
                size, _, inputs, outputs = weights[0].shape
                module = nn.Conv2d(inputs, outputs, size, layer.strides[0], bias=len(weights) > 1)
            elif isinstance(layer, keras.layers.BatchNormalization):
                module = nn.BatchNorm2d(len(weights[0]), layer.epsilon, 1 - layer.momentum)
            else:
                module = nn.GroupNorm(layer.groups, len(weights[0]), layer.epsilon)
            self.layers[layer.name] = module
        self.classes = model.output["classification"].shape[-1]
        self.load(model)

    @staticmethod
    def of(model):
        "The layers of a Keras model that have weights of their own."
        layers = model._flatten_layers(include_self=False)
        return [layer for layer in layers if layer.weights and not isinstance(layer, keras.Model)]

    @staticmethod
    def tensors(module):
        "The tensors of a module in the order of Keras."
        names = ("weight", "bias", "running_mean", "running_var")
        return [t for name in names if (t := getattr(module, name, None)) is not None]

    @torch.no_grad()
    def load(self, model):
        "Take the weights of the Keras model."
        for layer in self.of(model):
            for mine, theirs in zip(self.tensors(self.layers[layer.name]), layer.get_weights(), strict=True):
                theirs = torch.tensor(theirs)
                mine.copy_(theirs.permute(3, 2, 0, 1) if theirs.ndim == 4 else theirs)

    @torch.no_grad()
    def save(self, model):
        "Give the weights to the Keras model."
        for layer in self.of(model):
            mine = [t.float() for t in self.tensors(self.layers[layer.name])]
            layer.set_weights([(t.permute(2, 3, 1, 0) if t.ndim == 4 else t).numpy().copy() for t in mine])

    def convolve(self, x, name):
        layer = self.layers[name]
        x, padding = same(x, layer.kernel_size[0], layer.stride[0])
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, padding)

    def normed(self, x, name):
        return self.layers[f"{name}_bn"](self.convolve(x, f"{name}_conv"))

    def body(self, images):
        "C3, C4 and C5 of pictures (B, H, W, 3) 0…255."
        x = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        x = F.relu(self.normed(x.contiguous(memory_format=torch.channels_last), "stem"))
        stages = []
        for stage in (2, 3, 4, 5):
            block = 1
            while f"c{stage}_{block}_1_conv" in self.layers:
                at = f"c{stage}_{block}"
                skip = self.normed(x, f"{at}_skip") if block == 1 else x
                x = F.relu(self.normed(x, f"{at}_1"))
                x = F.relu(self.normed(x, f"{at}_2") + skip)
                block += 1
            stages.append(x)
        return stages[1:]

    def levels(self, c3, c4, c5):
        "P3…P7."
        m5 = self.convolve(c5, "C5_reduced")
        m4 = self.down(m5, self.convolve(c4, "C4_reduced"))
        m3 = self.down(m4, self.convolve(c3, "C3_reduced"))
        p6 = self.convolve(c5, "P6")
        p7 = self.convolve(F.relu(p6), "P7")
        return [*(self.convolve(m, f"P{k}") for k, m in ((3, m3), (4, m4), (5, m5))), p6, p7]

    @staticmethod
    def down(coarse, fine):
        height, width = fine.shape[2:]
        return fine + F.interpolate(coarse, scale_factor=2)[..., :height, :width]

    def head(self, x, kind, outputs):
        for i in range(SETTINGS.subnet_depth):
            x = self.convolve(x, f"{kind}_subnet_{i}")
            x = F.relu(self.layers[f"{kind}_subnet_{i}_norm"](x))
        x = self.convolve(x, f"{kind}_subnet_output")
        return x.permute(0, 2, 3, 1).reshape(len(x), -1, outputs)

    def forward(self, images):
        "Deltas (B, N, 4) and logits (B, N, K)."
        levels = self.levels(*self.body(images))
        kinds = (("regression", 4), ("classification", self.classes))
        return tuple(torch.cat([self.head(x, *kind) for x in levels], 1) for kind in kinds)


def fresh(classes=VOC_CLASSES):
    "The package's model with its own initial weights."
    keras.utils.set_random_seed(SETTINGS.seed)
    return retinanet_model(len(classes), SETTINGS, classes)


def optimizer(*modules):
    "AdamW; biases and the scales of norms do not decay."
    parameters = [p for module in modules for p in module.parameters()]
    decay = [p for p in parameters if p.ndim > 1]
    free = [p for p in parameters if p.ndim == 1]
    groups = [{"params": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=SETTINGS.weight_decay, betas=(0.9, 0.99), fused=True)


def set_rate(optimizer, step, share, warmup, top=1.0):
    "Warm-up, then a cosine from `top` of the rate down to a hundredth of that over the `share` of the run that is done."
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    for group in optimizer.param_groups:
        group["lr"] = top * SETTINGS.learning_rate * min(1, (step + 1) / warmup) * cosine


def cut_out(dataset, side=96):
    "Every object that is not tiny, with a quarter of its size around it: pictures (side, side, 3) and labels."
    crops, labels = [], []
    for record in dataset:
        image = read_image(record.image)
        for (x1, y1, x2, y2), label in zip(record.boxes, record.labels):
            w, h = x2 - x1, y2 - y1
            if w * h < 400:
                continue
            rows = slice(int(max(0, y1 - h / 4)), int(min(record.height, y2 + h / 4)))
            columns = slice(int(max(0, x1 - w / 4)), int(min(record.width, x2 + w / 4)))
            crops.append(cv2.resize(image[rows, columns], (side, side), interpolation=cv2.INTER_AREA))
            labels.append(label)
    return crops, np.array(labels)


def look(crop, rng, side=64):
    "A crop as the network sees it: (side, side, 3); without `rng` as it is."
    if rng is not None:
        h = rng.integers(56, 97)
        w = rng.integers(max(48, int(h * 0.75)), h + 1)
        y, x = rng.integers(0, 97 - h), rng.integers(0, 97 - w)
        crop = crop[y : y + h, x : x + w]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.7:
            crop = np.clip(crop * rng.uniform(0.7, 1.3) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)
    return cv2.resize(np.ascontiguousarray(crop), (side, side), interpolation=cv2.INTER_LINEAR)


def name_objects(folder, epochs, batch=64):
    "The body learns to name objects that are cut out of the pictures without HELD_OUT; rare classes are seen more often."
    crops, labels = cut_out(pictures(folder, HELD_OUT))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(crops))
    held, train = order[:400], np.sort(order[400:])
    weight = 1 / np.sqrt(np.bincount(labels, minlength=20).clip(1))[labels[train]]
    weight /= weight.sum()
    net = Twin(fresh()).to(memory_format=torch.channels_last)
    top = nn.Linear(256, 20)
    adam, per_epoch, step = optimizer(net, top), len(train) // batch, 0

    def scores(x):
        with torch.autocast("cpu", torch.bfloat16):
            c5 = net.body(torch.from_numpy(x))[-1]
        return top(c5.float().mean((2, 3)))

    for epoch in range(epochs):
        net.train()
        for _ in range(per_epoch):
            pick = rng.choice(train, batch, p=weight)
            x, y = np.stack([look(crops[i], rng) for i in pick]), torch.from_numpy(labels[pick]).long()
            # mixup: half of the batches blend every picture with another, and its name too
            keep = rng.beta(0.2, 0.2) if rng.random() < 0.5 else 1.0
            other = rng.permutation(batch)
            x = (keep * x + (1 - keep) * x[other]).astype(np.uint8)
            set_rate(adam, step, step / (epochs * per_epoch), 100)
            out = scores(x)
            mine, theirs = (
                F.cross_entropy(out, t, label_smoothing=0.05) for t in (y, y[torch.from_numpy(other)])
            )
            adam.zero_grad()
            (keep * mine + (1 - keep) * theirs).backward()
            adam.step()
            step += 1
        net.eval()
        with torch.no_grad():
            guess = scores(np.stack([look(crops[i], None) for i in held])).argmax(1).numpy()
        print(
            f"epoch {epoch + 1}: {np.mean(guess == labels[held]):.3f} of 400 other objects named", flush=True
        )
        put(folder / "named.pt", net.state_dict())


class Run:
    "The training of the detector: network, average, optimizer and where it stands; saved after every epoch."

    def __init__(self, folder):
        self.folder, self.net = folder, Twin(fresh())
        self.net.load_state_dict(torch.load(folder / "named.pt", weights_only=True))
        self.net.to(memory_format=torch.channels_last)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.adam = optimizer(self.net)
        self.step, self.epoch, self.part, self.seconds, self.history = 0, 0, 0, 0.0, []
        self.coder, self.matcher = box_coder(SETTINGS), Matcher.of(SETTINGS)
        self.focal = focal_loss(SETTINGS.alpha, SETTINGS.gamma)
        self.smooth = smooth_l1_loss(SETTINGS.sigma)
        if (folder / "find.state").exists():
            state = torch.load(folder / "find.state", weights_only=True)
            self.net.load_state_dict(state.pop("net"))
            self.adam.load_state_dict(state.pop("adam"))
            vars(self).update(state)
        self.open()

    def save(self):
        "Where the run stands; and, as `train` writes them, what `python tests/book.py result` reads."
        state = {k: getattr(self, k) for k in ("average", "step", "epoch", "part", "seconds", "history")}
        put(
            self.folder / "find.state",
            {**state, "net": self.net.state_dict(), "adam": self.adam.state_dict()},
        )
        config = {
            "hyperparameters": json.loads(SETTINGS.to_json()),
            "engine": f"PyTorch {torch.__version__}",
            "keras": keras.__version__,
            "pictures": len(self.batches.dataset),
        }
        for name, thing in (("config", config), ("history", self.history)):
            (self.folder / f"{name}.json").write_text(json.dumps(thing, indent=1))

    def note(self, losses, seconds):
        "One more epoch, with the (classification, box) losses of its steps."
        named, placed = np.mean(losses, axis=0).tolist()
        self.epoch += 1
        entry = {
            "epoch": self.epoch,
            "loss": named + SETTINGS.box_loss_weight * placed,
            "classification": named,
            "box": placed,
        }
        self.history.append({**entry, "canvas": PARTS[self.part][0], "seconds": seconds})
        print(
            f"epoch {self.epoch}, {self.seconds / 60:.1f} min: classes {named:.4f}, boxes {placed:.4f}",
            flush=True,
        )
        self.save()

    def open(self):
        "The pictures and anchors of this part of the training."
        side, without, mosaic, _ = PARTS[self.part]
        h = SETTINGS.replace(image_size=(side, side), mosaic=mosaic)
        dataset = pictures(self.folder, without)
        print(f"{len(dataset)} pictures on a canvas of {h.image_size}", flush=True)
        self.batches = train_generator(dataset, h, workers=1)
        self.anchors = AnchorGenerator(h.anchors)(h.image_size)

    def go_back(self, share):
        "A run that is given more time than before goes back to smaller pictures, but never to fewer classes."
        while self.part > 1 and share < PARTS[self.part - 1][-1]:
            self.part -= 1
            self.open()

    def next_part(self):
        "The part of the training that follows; classes that were background until now begin afresh."
        self.part += 1
        self.open()
        if PARTS[self.part - 1][1] == PARTS[self.part][1]:
            return
        put(self.folder / "some.pt", self.average)
        out = self.net.layers["classification_subnet_output"]
        rows = [a * 20 + VOC_CLASSES.index(n) for a in range(9) for n in HELD_OUT]
        with torch.no_grad():
            out.weight[rows] = torch.randn_like(out.weight[rows]) * 0.01
            out.bias[rows] = -math.log(99)
            for part in ("weight", "bias"):
                mine = self.average[f"layers.classification_subnet_output.{part}"]
                mine[rows] = getattr(out, part)[rows].detach()

    def learn(self, images, truth, share, top=1.0):
        "One step; gives both losses."
        most = max(1, int((truth["labels"] >= 0).sum(1).max()))
        boxes, labels = (torch.from_numpy(truth[k][:, :most]) for k in ("boxes", "labels"))
        with torch.no_grad():
            deltas, classes = assign_targets(
                self.anchors, boxes, labels, matcher=self.matcher, coder=self.coder
            )
        set_rate(self.adam, self.step, share, 300, top)
        with torch.autocast("cpu", torch.bfloat16):
            regression, logits = self.net(torch.from_numpy(images))
        named, placed = self.focal(classes, logits.float()), self.smooth(classes, deltas, regression.float())
        self.adam.zero_grad()
        (named + SETTINGS.box_loss_weight * placed).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), SETTINGS.clip_norm)
        self.adam.step()
        self.step += 1
        with torch.no_grad():
            towards = 1 - min(0.999, (1 + self.step) / (20 + self.step))
            now = self.net.state_dict()
            moving = [k for k, v in now.items() if v.dtype.is_floating_point]
            torch._foreach_lerp_([self.average[k] for k in moving], [now[k] for k in moving], towards)
        return named.item(), placed.item()


def find_objects(folder, minutes, since=0.0, top=1.0):
    """Train until so many minutes of the main thread have been spent, however many epochs these are: the rate falls with them. A run that was over after
    `since` minutes is taken up with `top` of the rate, which falls anew.
    """
    run = Run(folder)

    def done():
        return (run.seconds / 60 - since) / (minutes - since)

    run.go_back(done())
    while (share := done()) < 1:
        while share >= PARTS[run.part][-1]:
            run.next_part()
        run.batches.set_epoch(run.epoch)
        run.net.train()
        losses, begin = [], run.seconds
        for i in range(len(run.batches)):
            start = time.thread_time()
            losses.append(run.learn(*run.batches[i], share, top))
            run.seconds += time.thread_time() - start
            share = done()
            if share >= PARTS[run.part][-1]:
                break
        run.note(losses, run.seconds - begin)


def write(folder, path, size, without=()):
    "The average of the weights as a detector of the package, in half precision; without some classes for chapter 11."
    model = fresh()
    net = Twin(model)
    some = folder / "some.pt"
    net.load_state_dict(
        torch.load(some, weights_only=True)
        if without
        else torch.load(folder / "find.state", weights_only=True)["average"]
    )
    net.save(model)
    keep = [i for i, name in enumerate(VOC_CLASSES) if name not in without]
    h = SETTINGS.replace(image_size=(size, size))
    small = retinanet_model(len(keep), h, [VOC_CLASSES[i] for i in keep])
    found = {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}
    for v in small.weights:
        w = found[v.path]
        if "classification_subnet_output" in v.path:
            w = w.reshape(*w.shape[:-1], -1, 20)[..., keep].reshape(v.shape)
        v.assign(w)
    print(save_half(retinanet_box(small), path), path.stat().st_size, "bytes")


def sheet(data, path, columns=6):
    """What the carried detector finds in 24 pictures that it has not seen. They are chosen by what they show, not by how well it does: of every class the first
    picture of `val` in which it is the largest object and fills a fifth of the picture, and the next of the four commonest classes. Shown is what scores
    enough for `retinanet_detect`, an object with its best name alone.
    """
    threshold = carried_figures()["score"]
    count, wanted = np.zeros(len(VOC_CLASSES), int), {}
    for record in VOCDataset(data / "voc2007", "val", VOC_CLASSES):
        count += np.bincount(record.labels, minlength=len(count))
        x1, y1, x2, y2 = record.boxes.T
        areas = (x2 - x1) * (y2 - y1)
        if areas.max() > 0.2 * record.height * record.width:
            wanted.setdefault(int(record.labels[np.argmax(areas)]), []).append(record)
    chosen = [wanted[label][0] for label in sorted(wanted)]
    chosen += [wanted[label][1] for label in np.argsort(-count)[: 24 - len(chosen)].tolist()]
    detector, tiles = load_detector("photos", class_specific_filter=False), []
    for record in chosen:
        image = read_image(record.image)
        found = detect(detector, image, threshold)
        scale = min(240 / image.shape[0], 300 / image.shape[1])
        size = tuple(round(n * scale) for n in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        boxes = found.boxes * scale
        image = draw_detections(image, boxes, found.scores, found.labels, detector.class_names, threshold)
        tile = np.full((250, 310, 3), 255, np.uint8)
        top, left = ((n - m) // 2 for n, m in zip(tile.shape[:2], image.shape[:2]))
        tile[top:, left:][: image.shape[0], : image.shape[1]] = image
        tiles.append(tile)
    rows = [np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)]
    write_image(path, np.vstack(rows))
    print(path, " ".join(record.image.stem for record in chosen))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["shrink", "name", "find", "write", "sheet"])
    parser.add_argument("path", type=Path, nargs="?", help="what write or sheet writes")
    parser.add_argument("--folder", type=Path, default=Path("runs/photos"))
    parser.add_argument("--epochs", type=int, default=14, help="of name")
    parser.add_argument(
        "--minutes",
        type=float,
        default=97,
        help="of find, of its main thread: with OMP_NUM_THREADS=2 a second core's come on top",
    )
    parser.add_argument(
        "--since",
        type=float,
        default=0,
        help="of find: the minutes after which a run was over that is taken up",
    )
    parser.add_argument("--top", type=float, default=1, help="of find: the share of the rate to begin with")
    parser.add_argument(
        "--size", type=int, default=224, help="side of the canvas that write gives the detector"
    )
    parser.add_argument(
        "--without-held-out", action="store_true", help="write the detector after the first part"
    )
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if a.stage == "shrink":
        shrink(Path(os.environ["RETINANET_DATA"]), a.folder)
    elif a.stage == "name":
        name_objects(a.folder, a.epochs)
    elif a.stage == "find":
        find_objects(a.folder, a.minutes, a.since, a.top)
    elif a.stage == "sheet":
        sheet(Path(os.environ["RETINANET_DATA"]), a.path)
    else:
        write(a.folder, a.path, a.size, HELD_OUT if a.without_held_out else ())


if __name__ == "__main__":
    main()
