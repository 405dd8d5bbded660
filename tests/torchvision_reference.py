"""
What torchvision itself says, for the import of its detectors (chapter 3.4).

    python tests/torchvision_reference.py tests/data/torchvision.npz

needs `torch` and `torchvision` (its wheel installs with --no-deps beside a CPU build of PyTorch; its compiled
operators may be missing then, and `nms` below stands in). Everything above `main` needs NumPy alone: seeded weights
of both versions, drawn tensor by tensor from a generator named after the tensor, so that the fixture holds expected
outputs and nothing else; ten pictures of five sizes; and a writer of files as the published ones are.
"""

import hashlib
import struct
import sys
import zipfile

import numpy as np

SIZES = ((128, 128), (128, 256), (256, 128), (256, 256), (128, 384))
GAPS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
SAMPLES = 150


def picture(i):
    "One of ten pictures: coloured waves and rectangles, (H, W, 3) uint8."
    rng = np.random.default_rng([2024, i])
    h, w = SIZES[i % 5]
    y, x = np.mgrid[:h, :w]
    image = np.stack([128 + 70 * np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.02, 0.3, (3, 3))], -1)
    for _ in range(6):
        top, left = rng.integers(0, h - 20), rng.integers(0, w - 20)
        size = rng.integers(12, 90, 2)
        image[top : top + size[0], left : left + size[1]] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype("uint8")


def shapes(version):
    "Name → shape of torchvision's RetinaNet of that version, by the names that the library writes."
    found, before = {}, 64

    def norm(name, n):
        found.update({f"{name}.{p}": (n,) for p in ("weight", "bias", "running_mean", "running_var")})

    def conv(name, *shape, bias=True):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    body, fpn = "backbone.body", "backbone.fpn"
    conv(f"{body}.conv1", 64, 3, 7, 7, bias=False)
    norm(f"{body}.bn1", 64)
    for stage, count in enumerate((3, 4, 6, 3), start=1):
        n = 32 * 2**stage
        for block in range(count):
            at = f"{body}.layer{stage}.{block}"
            for i, shape in enumerate(((n, before, 1, 1), (n, n, 3, 3), (4 * n, n, 1, 1)), start=1):
                conv(f"{at}.conv{i}", *shape, bias=False)
                norm(f"{at}.bn{i}", shape[0])
            if block == 0:
                conv(f"{at}.downsample.0", 4 * n, before, 1, 1, bias=False)
                norm(f"{at}.downsample.1", 4 * n)
            before = 4 * n
    for i, n in enumerate((512, 1024, 2048)):
        conv(f"{fpn}.inner_blocks.{i}.0", 256, n, 1, 1)
        conv(f"{fpn}.layer_blocks.{i}.0", 256, 256, 3, 3)
    conv(f"{fpn}.extra_blocks.p6", 256, 256 if version == 1 else 2048, 3, 3)
    conv(f"{fpn}.extra_blocks.p7", 256, 256, 3, 3)
    for head, last, n in (("classification_head", "cls_logits", 819), ("regression_head", "bbox_reg", 36)):
        for i in range(4):
            conv(f"head.{head}.conv.{i}.0", 256, 256, 3, 3, bias=version == 1)
            if version == 2:
                found |= {f"head.{head}.conv.{i}.1.{p}": (256,) for p in ("weight", "bias")}
        conv(f"head.{head}.{last}", n, 256, 3, 3)
    return found


def tensor(name, shape, version):
    "The seeded numbers of one tensor, float32; such that the network finds something, and ε matters."
    draw = lambda what: np.random.default_rng(
        list(hashlib.sha256(f"{version} {what}".encode()).digest())
    ).standard_normal(shape, dtype="float32")
    layer, part = name.rsplit(".", 1)
    x = draw(name)
    if len(shape) == 4:
        scale = (2 / np.prod(shape[1:])) ** 0.5
        if "cls_logits" in name:
            scale *= 0.15 if version == 1 else 0.6
        if "bbox_reg" in name:
            scale *= 0.06 if version == 1 else 0.2
        return x * np.float32(scale)
    if part == "running_mean":
        return 0.2 * x
    variance = np.exp(-4 + 2.2 * draw(f"{layer}.running_var"))
    if part == "running_var":
        return variance
    if "cls_logits" in name:
        x = (-4.5 + 0.3 * x).reshape(9, 91)
        x[:, GAPS] = -14  # as training leaves those that stand for nothing
        return x.reshape(-1).astype("float32")
    if part == "weight":
        size = np.float32(0.3 if ".bn3" in name else 0.8) * (1 + 0.2 * x)
        norm_of_body = ".bn" in name or "downsample" in name
        return size * np.sqrt(variance + 1e-5) if norm_of_body else size
    return 0.1 * x


def tensors(version, width=256):
    "All of them; with a smaller `width` pyramid and heads are narrow, which saves a minute where they are trained."
    narrow = lambda name, shape: tuple(width if n == 256 and "body" not in name else n for n in shape)
    return {name: tensor(name, narrow(name, shape), version) for name, shape in shapes(version).items()}


def older(state):
    "The same with the names of the published v1 file."
    found = {}
    for name, array in state.items():
        parts = name.split(".")
        if parts[0] == "head" and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        elif parts[2] in ("inner_blocks", "layer_blocks"):
            del parts[4]
        found[".".join(parts)] = array
    return found


def _text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def _whole(*numbers):
    return b"".join(b"J" + struct.pack("<i", n) for n in numbers)


def write_pth(path, state):
    "`state` as `torch.save` writes it, written without PyTorch; float32 and int64."
    # tensors that are one number, broadcast, are windows on one block, as PyTorch allows
    spread = [array for array in state.values() if array.size > 1 and not any(array.strides)]
    block = max(spread, key=np.size).ravel() if spread else None
    program = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    with zipfile.ZipFile(path, "w") as archive:
        if spread:
            archive.writestr("archive/data/shared", block.tobytes())
        for i, (name, array) in enumerate(state.items()):
            kind = b"Float" if array.dtype == "float32" else b"Long"
            shared = array.size > 1 and not any(array.strides)
            key, numbers = ("shared", block) if shared else (str(i), array)
            steps = [s // array.itemsize for s in np.ascontiguousarray(array).strides]
            program += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", _text("storage")]
            program += [
                b"ctorch\n",
                kind,
                b"Storage\n",
                _text(key),
                _text("cpu"),
                _whole(numbers.size),
                b"tQ",
            ]
            program += [_whole(0), b"(", _whole(*array.shape), b"t(", _whole(*steps), b"t\x89"]
            program += [b"ccollections\nOrderedDict\n)RtR"]
            if not shared:
                archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/data.pkl", b"".join([*program, b"u."]))
        archive.writestr("archive/version", b"3\n")


def sampled(n, k, i):
    "Which of n rows, and which class of each, the fixture holds for picture i."
    rng = np.random.default_rng([7, i])
    return rng.integers(0, n, SAMPLES), rng.integers(0, k, SAMPLES)


def nms(boxes, scores, threshold):
    "A stand-in for torchvision's compiled suppression, box by box."
    import torch

    boxes, left = boxes.float().numpy(), scores.float().numpy().argsort(kind="stable")[::-1]
    area, kept = (boxes[:, 2:] - boxes[:, :2]).prod(1), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        ends = np.minimum(boxes[best, 2:], boxes[left, 2:])
        both = (ends - np.maximum(boxes[best, :2], boxes[left, :2])).clip(0).prod(1)
        left = left[both / (area[best] + area[left] - both) <= threshold]
    return torch.tensor(kept, dtype=torch.long)


def library():
    "torchvision, also where its compiled operators are missing; None where it isn't installed."
    try:
        import torch
    except ImportError:
        return None
    try:
        from torchvision import ops
        from torchvision.models import detection

        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        return detection
    except ImportError:
        return None
    except (RuntimeError, NotImplementedError, AttributeError):
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    stand_in = torch.library.Library("torchvision", "DEF")
    library.kept = stand_in  # alive as long as its operators are wanted
    for name in ("nms", "qnms"):  # the second is only named on import
        stand_in.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stand_in.impl("nms", nms, "CPU")
    import torchvision.ops.boxes
    from torchvision.models import detection

    torchvision.ops.boxes._assert_has_ops = lambda: None

    return detection


def theirs(version, eps):
    "torchvision's model with the seeded weights and BatchNorm's ε."
    import torch

    detection = library()
    build = detection.retinanet_resnet50_fpn if version == 1 else detection.retinanet_resnet50_fpn_v2
    model = build(weights=None, weights_backbone=None, progress=False).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors(version).items()}
    missing, rest = model.load_state_dict(state, strict=False)
    assert not rest and all(name.endswith("num_batches_tracked") for name in missing), (missing, rest)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = eps
    return model


def expected(model, image):
    "Logits (N, 91), deltas (N, 4), boxes, scores and COCO's numbers of torchvision's model for one picture."
    import torch

    picture = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    model.transform.min_size, model.transform.max_size = (min(image.shape[:2]),), 10_000
    seen = []
    watch = model.head.register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        found = model([picture])[0]
    watch.remove()
    (raw,) = seen
    rows = [raw[k][0].numpy() for k in ("cls_logits", "bbox_regression")]
    return *rows, *(found[k].numpy() for k in ("boxes", "scores", "labels"))


def main(path):
    models = {1: theirs(1, 0.0), 2: theirs(2, 1e-5)}
    kept = {}
    for i in range(10):
        for version, model in models.items():
            logits, deltas, boxes, scores, labels = expected(model, picture(i))
            rows, classes = sampled(len(logits), 91, i)
            print(
                f"v{version} picture {i}: logits up to {logits.max():.1f}, {(logits > -2.944).sum()} candidates,"
                f" {len(scores)} detections of {len(set(labels))} classes",
                flush=True,
            )
            kept |= {f"v{version}/{i}/logits": logits[rows, classes], f"v{version}/{i}/deltas": deltas[rows]}
            kept |= {f"v{version}/{i}/boxes": boxes, f"v{version}/{i}/scores": scores}
            kept[f"v{version}/{i}/labels"] = labels.astype("uint8")
        np.savez_compressed(path, **kept)


if __name__ == "__main__":
    main(sys.argv[1])
