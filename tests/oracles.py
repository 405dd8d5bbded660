"""The book's mathematics once more, slowly: float64 NumPy and plain loops, written from the papers and from nothing in the package.

A test compares the package with these. They are meant to be believed at a glance, so nothing here is vectorised that a loop can say.
"""

import math

import numpy as np

MAX_LOG = math.log(1000 / 16)  # decoding clamps tw and th here
BOX_STD = (0.1, 0.1, 0.2, 0.2)
SIZES, STRIDES = (32, 64, 128, 256, 512), (8, 16, 32, 64, 128)
RATIOS, SCALES = (0.5, 1, 2), (1, 2 ** (1 / 3), 2 ** (2 / 3))


def anchors(height, width, sizes=SIZES, strides=STRIDES, ratios=RATIOS, scales=SCALES):
    """Every anchor of a picture, (N, 4): level by level, row by row, cell by cell, ratio by ratio, scales fastest."""
    boxes = []
    for size, stride in zip(sizes, strides):
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                for ratio in ratios:
                    for scale in scales:
                        w = size * scale / math.sqrt(ratio)  # w * h == (size * scale) ** 2 and h / w == ratio
                        h = size * scale * math.sqrt(ratio)
                        boxes.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return np.array(boxes, np.float64)


def iou(a, b):
    """Intersection over union of two boxes; 0 where the union has no area."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def overlaps(first, second):
    """IoU of every pair, (N, M)."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return np.array([[iou(a, b) for b in second] for a in first], np.float64).reshape(len(first), len(second))


def encode(anchor, box, std=BOX_STD):
    """One box as (tx, ty, tw, th) relative to one anchor, divided by `std`."""
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    w, h = box[2] - box[0], box[3] - box[1]
    tx = ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / aw
    ty = ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / ah
    return np.array([tx, ty, math.log(w / aw), math.log(h / ah)]) / np.asarray(std, np.float64)


def decode(anchor, deltas, std=BOX_STD):
    """The way back: one box from one anchor and its deltas."""
    tx, ty, tw, th = (float(d) * float(s) for d, s in zip(deltas, std))
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2 + tx * aw, (anchor[1] + anchor[3]) / 2 + ty * ah
    w, h = aw * math.exp(min(tw, MAX_LOG)), ah * math.exp(min(th, MAX_LOG))
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def encode_all(anchor_boxes, boxes, std=BOX_STD):
    """`encode` row by row."""
    return np.array(
        [
            encode(a, b, std)
            for a, b in zip(np.asarray(anchor_boxes, np.float64), np.asarray(boxes, np.float64))
        ]
    )


def decode_all(anchor_boxes, deltas, std=BOX_STD):
    """`decode` row by row."""
    return np.array(
        [
            decode(a, d, std)
            for a, d in zip(np.asarray(anchor_boxes, np.float64), np.asarray(deltas, np.float64))
        ]
    )


def clip(boxes, height, width):
    """Boxes cut to the picture, x to [0, width] and y to [0, height]."""
    return np.array(
        [[min(max(v, 0.0), limit) for v, limit in zip(box, (width, height, width, height))] for box in boxes]
    )


def best_anchors(anchor_boxes, boxes, labels):
    """For every real object the index of its best anchor (the first of equals), None for padding."""
    best = []
    for box, label in zip(boxes, labels):
        values = [iou(a, box) for a in anchor_boxes]
        best.append(int(np.argmax(values)) if label >= 0 else None)
    return best


def assign(anchor_boxes, boxes, labels, negative=0.4, positive=0.5, force_match=True, std=BOX_STD):
    """One picture's targets: deltas (N, 4), NaN where the anchor isn't positive, and classes (N,)."""
    anchor_boxes, boxes = np.asarray(anchor_boxes, np.float64), np.asarray(boxes, np.float64).reshape(-1, 4)
    deltas = np.full((len(anchor_boxes), 4), np.nan)
    classes = np.full(len(anchor_boxes), -1)
    for i, anchor in enumerate(anchor_boxes):
        best, best_object = 0.0, None
        for j, (box, label) in enumerate(zip(boxes, labels)):
            if label >= 0 and iou(anchor, box) > best:
                best, best_object = iou(anchor, box), j
        # the comparisons are made with float32's rounding: 0.4 and 0.5 are exact cases in the tests
        best = np.float32(best)
        if best_object is not None and best >= np.float32(positive):
            classes[i], deltas[i] = labels[best_object], encode(anchor, boxes[best_object], std)
        elif best >= np.float32(negative):
            classes[i] = -2
    if force_match:
        for j, i in enumerate(best_anchors(anchor_boxes, boxes, labels)):
            if i is not None:
                classes[i], deltas[i] = labels[j], encode(anchor_boxes[i], boxes[j], std)
    return deltas, classes


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) without overflow."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def focal(classes, logits, alpha=0.25, gamma=2.0):
    """The focal loss of a batch, `alpha=None` switches the weighting off; class -1 is background, -2 is ignored."""
    classes, logits = np.asarray(classes), np.asarray(logits, np.float64)
    total, positives = 0.0, 0
    for b in range(classes.shape[0]):
        for n in range(classes.shape[1]):
            if classes[b, n] == -2:
                continue
            positives += classes[b, n] >= 0
            for k in range(logits.shape[2]):
                x = logits[b, n, k] if k == classes[b, n] else -logits[b, n, k]  # the logit of being right
                weight = 1.0 if alpha is None else (alpha if k == classes[b, n] else 1 - alpha)
                total += weight * math.exp(log_sigmoid(-x)) ** gamma * -log_sigmoid(x)
    return total / max(positives, 1)


def smooth_l1(classes, targets, deltas, sigma=3.0):
    """The smooth L1 loss of a batch: positives only, summed over the four deltas, divided by the positives."""
    classes = np.asarray(classes)
    total, positives = 0.0, 0
    for b in range(classes.shape[0]):
        for n in range(classes.shape[1]):
            if classes[b, n] < 0:
                continue
            positives += 1
            for c in range(4):
                d = abs(float(deltas[b][n][c]) - float(targets[b][n][c]))
                total += 0.5 * (sigma * d) ** 2 if d < 1 / sigma**2 else d - 0.5 / sigma**2
    return total / max(positives, 1)


def nms(boxes, scores, threshold):
    """The sequential greedy algorithm: indices kept, best first; of equal scores the earlier one is first."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(not iou(boxes[i], boxes[j]) > threshold for j in kept):
            kept.append(i)
    return kept


def filter_picture(
    boxes,
    scores,
    class_specific_filter=True,
    nms_on=True,
    score_threshold=0.05,
    nms_threshold=0.5,
    pre_nms_top_k=1000,
    max_detections=300,
):
    """Detections of one picture as a list of (box, score, label), best first, not padded.

    With `class_specific_filter` every (anchor, class) pair is a candidate and suppression stays within a class; without it every anchor
    has one candidate, its best class, and suppression does not look at classes.
    """
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    candidates = []  # (score, anchor, class)
    for n in range(scores.shape[0]):
        classes = range(scores.shape[1]) if class_specific_filter else [int(np.argmax(scores[n]))]
        candidates += [(scores[n, k], n, k) for k in classes if scores[n, k] > score_threshold]
    candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
    candidates = candidates[:pre_nms_top_k]
    kept = []
    for score, n, k in candidates:
        rivals = [m for _, m, other in kept if other == k or not class_specific_filter]
        if not nms_on or all(not iou(boxes[n], boxes[m]) > nms_threshold for m in rivals):
            kept.append((score, n, k))
    return [(boxes[n], score, k) for score, n, k in kept[:max_detections]]


def filter_batch(boxes, scores, max_detections=300, **options):
    """`filter_picture` for a batch, padded with -1: boxes (B, D, 4), scores (B, D), labels (B, D)."""
    batch = len(boxes)
    out = (
        np.full((batch, max_detections, 4), -1.0),
        np.full((batch, max_detections), -1.0),
        np.full((batch, max_detections), -1),
    )
    for b in range(batch):
        for d, (box, score, label) in enumerate(
            filter_picture(boxes[b], scores[b], max_detections=max_detections, **options)
        ):
            out[0][b, d], out[1][b, d], out[2][b, d] = box, score, label
    return out


def detect(logits, deltas, height, width, std=BOX_STD, anchor_options=None, **options):
    """A network's outputs to detections, the whole way: anchors, decode, clip, filter."""
    anchor_boxes = anchors(height, width, **(anchor_options or {}))
    boxes = [clip(decode_all(anchor_boxes, d, std), height, width) for d in deltas]
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return filter_batch(boxes, scores, **options)


def torchvision_anchors(height, width, sizes=SIZES, ratios=RATIOS):
    """Anchors by torchvision's rule: whole sides, whole corners, whole strides, around the cells' corners.

    `height` and `width` are those of the picture; torchvision pads it to a multiple of 32 first.
    """
    padded = [-(-n // 32) * 32 for n in (height, width)]
    boxes = []
    for size, stride in zip(sizes, STRIDES):
        rows, columns = -(-height // stride), -(-width // stride)
        down, across = padded[0] // rows, padded[1] // columns
        for row in range(rows):
            for column in range(columns):
                for ratio in ratios:
                    for side in (size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))):
                        # Python rounds a half to the even number, as torchvision's engine does
                        w, h = round(side / math.sqrt(ratio) / 2), round(side * math.sqrt(ratio) / 2)
                        x, y = column * across, row * down
                        boxes.append((x - w, y - h, x + w, y + h))
    return np.array(boxes, np.float64)


def encode_corners(anchor, box, std):
    """One box as its edges' distances from the anchor's, in widths and heights of the anchor (keras-retinanet)."""
    sides = (anchor[2] - anchor[0], anchor[3] - anchor[1]) * 2
    return [(b - a) / side / s for a, b, side, s in zip(anchor, box, sides, std)]
