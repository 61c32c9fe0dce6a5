"""Photos in, watermark masks out.

    python predict.py in.jpg                            # in_mask.png beside it, in seconds on a laptop
    python predict.py photos/ --stored                  # photos_masks/<stem>.png, ready for
    iopaint run --model lama --image photos --mask photos_masks --output clean
    python predict.py agency/ --same-mark               # one mark in one place: one mask for each size
    python predict.py clip.mp4                          # one mask for all frames
    python predict.py photos/ -r --list                 # which pictures carry a mark; writes nothing
    python predict.py scans/ --tile --json > marks.jsonl            # small marks in large pictures
    cat in.jpg | python predict.py - > mask.png
    torchrun --nproc-per-node 8 predict.py photos/ --skip-existing  # shares the files; goes on after a crash

A mask is an 8-bit PNG of the picture's displayed size, 255 where marked and 0 elsewhere, and grey only in the
soft edge of --feather.
A picture that cannot be read or written costs one sentence on stderr, never the others.
Exit code: 0 all written, 1 some failed, 2 wrong usage or nothing to do.

A line of --json has input, mask, width, height; coverage, the marked share of the pixels; max_prob, the
highest probability in the picture; boxes, one for each mark, best first, with the highest probability in it as
its score. Some have orientation (EXIF), group (how many pictures share the mask) or error.

From Python, also from the threads of a server:

    from predict import boxes, predict_mask
    mask = predict_mask("in.jpg")                       # (H, W) uint8, 255 where marked

    from model import load_image, load_model, predict_prob, to_mask
    net = load_model()
    prob = predict_prob(net, load_image("in.jpg"))      # (H, W) float32; prob.max() is the picture's score
    mask = to_mask(prob, net.threshold)
    marks = boxes(mask, prob)                           # [{"x": 12, "y": 340, "width": 200, ...}, ...]

Read top to bottom: library use, which images, read, predict, write, side by side, command line.
"""
import argparse
import contextlib
import functools
import glob
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":                    # a Ctrl-C while torch is imported just ends us
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed as dist
from tqdm import tqdm

from model import (ENLARGE, FORMATS, MAX_PIXELS, SHARED, SIZE, SURE, WEIGHTS, Segmenter, default_dilation,
                   dilate, first_line, fit, load_image, load_model, one_way_out, pick_amp, pick_device,
                   predict_prob, predict_probs, printable, read_image, replacing, resize_prob, square_side,
                   to_mask)

BATCH = {"cuda": 16, "mps": 4, "cpu": 1}      # pictures of one shape in a pass; a CPU gains nothing from two
NETWORKS = 4                                  # so many at most work side by side, each on its share of cores
OVERLAP, MARGIN = 1 / 4, 1 / 16               # shares of a window: overlap of two, rim that lacks context
FRAMES = 64                                   # of a video that are looked at
LEGIBLE = 8                                   # pixels: the smallest text to be seen; a guess, not measured
ENDINGS = {"prob": ".png", "overlay": ".jpg", "mask": ".png"}      # the mask is written last, as a sign
OURS = re.compile(r"_(mask\.png|prob\.png|overlay\.jpg|masks|probs|overlays)$")
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
PICTURES |= {".heic", ".heif", ".avif", ".jxl"}              # Pillow may lack them: none is skipped silently
LOADING = threading.Lock()


# ---------------------------------------------------------------- library use

def predict_mask(image, weights=WEIGHTS, threshold: float | None = None, dilation: int | None = None,
                 size: int | None = None, tile: bool = False, device: str = "auto",
                 feather: int = 0) -> np.ndarray:
    """Where is the watermark? -> (H, W) uint8, 255 where marked, 0 elsewhere, ready for an inpainting tool.

    image: path, PIL image or (H, W, 3) uint8 RGB array; H and W are the displayed (EXIF-turned) ones.
    threshold: probability from which a pixel is marked; None takes the one stored with the weights.
    dilation, feather: see model.to_mask. size: the network looks at size x size pixels; None takes its own.
    tile: see --tile. device: auto, cuda, cuda:1, mps or cpu; which one it is, is said on stderr, once.
    Raises OSError for a file that is no complete picture, ValueError for an array of another kind.
    """
    with LOADING:                             # read once, however many threads ask
        net = network(os.fspath(weights), device)
    size = size or net.size
    if isinstance(image, (str, os.PathLike)):
        image, facts = read_image(image, None if tile else size)          # (H, W, 3), or smaller
        shape = facts["height"], facts["width"]
    else:
        image = load_image(image)                                         # (H, W, 3)
        shape = image.shape[:2]
    prob = one_prob(net, image if tile else fit(image, size, shape), size, tile)
    threshold = net.threshold if threshold is None else threshold
    return to_mask(resize_prob(prob, *shape), threshold, dilation, feather)


@functools.lru_cache(maxsize=2)
def network(weights: str, device: str, quiet: bool = False) -> Segmenter:
    place, why = pick_device(device)
    net, (dtype, why_dtype) = load_model(weights, place), pick_amp("auto", place)
    if not quiet:
        say(f"{net.arch} on {net.encoder}, {place} ({why}), {dtype or torch.float32} ({why_dtype})")
    return net


# ---------------------------------------------------------------- which images
# An image travels as its record, a dict: first {input, mask, ...}, at the end the line that --json prints.

def find_images(args: argparse.Namespace) -> list[dict]:
    """All inputs as records, in the order of their names.

    A record with `error` is not predicted. One with `present` has its outputs already.
    """
    records, owners = [], {}
    for source in args.inputs:
        folder = source if os.path.isdir(source) else None
        for path, error in scan(folder, args) if folder else [(source, None)]:
            records.append({"input": path, "error": error} if error else
                           {"input": path, **name_outputs(path, folder, args)})
    inputs = {identity(record["input"]) for record in records} - {None}
    for record in records:
        outputs = [record[kind] for kind in ENDINGS if kind in record]
        other = owners.setdefault(os.path.realpath(outputs[-1]), record["input"]) if outputs else None
        if any(identity(path) in inputs for path in outputs):
            record["error"] = "left alone, since its output would overwrite an input"
        elif outputs and other != record["input"]:
            record["error"] = f"{printable(other)} has the same mask, {printable(record['mask'])}; rename one"
        elif outputs and args.skip_existing and all(os.path.isfile(p) and os.path.getsize(p) for p in outputs):
            record["present"] = True
    return records


def identity(path: str) -> tuple[int, int] | None:
    """The same for all names of one file; None where there is none."""
    with contextlib.suppress(OSError):
        return (status := os.stat(path)).st_dev, status.st_ino


def scan(folder: str, args: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Yields (image, None), and (folder, reason) for one that cannot be listed. Links to folders are left."""
    folders, endings = [folder], PICTURES | VIDEOS if args.same_mark else PICTURES
    while folders:
        try:
            entries = sorted(os.scandir(folder := folders.pop()), key=lambda entry: entry.name)
        except OSError as e:
            yield folder, reason(e)
            continue
        for entry in entries:                 # a Mac puts ._x.jpg beside x.jpg
            if (entry.name.startswith("._") or is_ours(entry.path)
                    or args.out and os.path.abspath(entry.path) == os.path.abspath(args.out)):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders += [entry.path] * args.recurse
            elif os.path.splitext(entry.name)[1].lower() in endings:
                yield entry.path, None


def is_ours(path: str) -> bool:
    """Output of an earlier run: in_mask.png beside in.jpg, photos_masks beside photos."""
    source = OURS.sub("", path)
    return source != path and any(os.path.exists(source + e) for ending in ("", *PICTURES, *VIDEOS)
                                  for e in (ending, ending.upper()))


def is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEOS


def name_outputs(path: str, folder: str | None, args: argparse.Namespace) -> dict[str, str]:
    """folder: the input folder that holds `path`, None for a file that the user named."""
    kinds = [kind for kind, wanted in zip(ENDINGS, (args.prob, args.overlay, not args.list)) if wanted]
    if folder or args.out_is_folder:
        # photos/ -> photos_masks, photos_probs, photos_overlays: iopaint pairs by stem, so kinds must not mix
        base = args.out or folder
        beside = os.path.join(base, os.pardir, os.path.basename(os.path.abspath(base)))
        roots = {kind: os.path.normpath(f"{beside}_{kind}s") for kind in kinds}
        roots["mask"] = args.out or roots.get("mask")
        name = os.path.relpath(path, folder) if folder else "stdin" if path == "-" else os.path.basename(path)
        return {kind: os.path.join(roots[kind], os.path.splitext(name)[0] + ENDINGS[kind]) for kind in kinds}
    base = os.path.splitext(args.out or path)[0]
    outputs = {kind: f"{base}_{kind}{ENDINGS[kind]}" for kind in kinds}
    return outputs | ({"mask": args.out} if args.out else {})


# ---------------------------------------------------------------- read

def measure(record: dict, args: argparse.Namespace, size: int) -> tuple[dict, int]:
    """-> record, and how many pixels read() will decode; 0 where it will say why not. In a thread."""
    with contextlib.suppress(Exception), Image.open(record["input"]) as file:
        return record, file.width * file.height
    return record, 0


def read(item: tuple[dict, int], args: argparse.Namespace, size: int) -> tuple[dict, np.ndarray | None]:
    """-> (record, view): what the network is to see, None for an error or a video. In a thread."""
    record, _ = item
    try:
        source = record["input"]
        if "error" in record:
            return record, None
        if source == "-":
            args.stdin = sys.stdin.buffer.read()
            if not args.stdin:
                raise OSError("standard input is empty")
        elif is_video(source) and os.path.isfile(source):
            H, W = next(frames(source)).shape[:2]
            return {**record, "width": W, "height": H}, None
        source = io.BytesIO(args.stdin) if source == "-" else source
        image, facts = read_image(source, None if args.tile else size)    # (H, W, 3), or smaller
        return record | facts, image if args.tile else fit(image, size, (facts["height"], facts["width"]))
    except Exception as e:                    # Pillow raises a dozen kinds on garbage; the run goes on
        return {**record, "error": reason(e)}, None


def frames(path: str) -> Iterator[np.ndarray]:
    """At most FRAMES frames spread over a video, each (H, W, 3) uint8 RGB. OSError where there is none."""
    if path.encode("utf-8", "ignore").decode() != path:        # OpenCV crashes on such a name
        raise OSError("a video's name must be UTF-8: rename it")
    video = cv2.VideoCapture(path)
    n, found = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0
    # a recording that was cut off does not know its length: then one a second
    for k in np.unique(np.linspace(0, n - 1, FRAMES).astype(int)) if n > 0 else range(0, 30 * FRAMES, 30):
        video.set(cv2.CAP_PROP_POS_FRAMES, k)
        ok, frame = video.read()
        if ok:
            found += 1
            yield frame[..., ::-1]
    if not found:
        raise OSError("not a video that OpenCV can read")


# ---------------------------------------------------------------- predict

def batches(images: Iterable, n: int) -> Iterator[list[tuple]]:
    """Collects what read() gives into lists for one pass. An image waits for n - 1 others of its shape."""
    waiting = {}
    for record, view in images:
        shape = None if view is None else view.shape
        waiting.setdefault(shape, []).append((record, view))
        if shape is None or len(waiting[shape]) == n or sum(map(len, waiting.values())) > 4 * n:
            yield waiting.pop(shape)
    yield from waiting.values()


def predict(group: list[tuple], net: Segmenter, args: argparse.Namespace, size: int) -> list[tuple]:
    """A list of batches() -> (record, prob) of each image; prob (h, w), or None at an error. In a thread."""
    record, view = group[0]
    if "error" in record:
        return group
    try:
        if view is None:                      # a video
            total = n = 0
            for frame in frames(record["input"]):
                view = frame if args.tile else fit(frame, size)
                total, n = total + one_prob(net, view, size, args.tile) ** 2, n + 1
            probs = [np.sqrt(total / n)]      # as share() does
        elif args.tile:
            probs = [one_prob(net, view, size, True, not (args.many or args.quiet)) for _, view in group]
        else:
            probs = predict_probs(net, [view for _, view in group])
        return [(record, prob) for (record, _), prob in zip(group, probs)]
    except RuntimeError as e:                 # out of memory, most likely
        error = f"the network failed, a smaller --size may help: {first_line(e)}"
        return [({**record, "error": error}, None) for record, _ in group]


def one_prob(net: Segmenter, view: np.ndarray, size: int, tile: bool, show: bool = False) -> np.ndarray:
    return tiled_prob(net, view, size, show) if tile else predict_probs(net, [view])[0]


def tiled_prob(net: Segmenter, image: np.ndarray, size: int, show: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 at full resolution -> (H, W) float32, from overlapping windows with blended seams."""
    H, W = image.shape[:2]
    if square_side(H, W) <= size:             # nothing to cut
        return predict_prob(net, image, size)
    prob = np.zeros((H, W), np.float32)
    places = [(row, column) for row in windows(H, size) for column in windows(W, size)]
    batch_size = BATCH[net.mean.device.type]
    for k in tqdm(range(0, len(places), batch_size), unit=" windows", disable=None if show else True):
        batch = places[k:k + batch_size]
        parts = predict_probs(net, [image[y, x] for (y, _), (x, _) in batch])
        for ((y, wy), (x, wx)), part in zip(batch, parts):
            prob[y, x] += part * wy[:, None] * wx
    return prob


def windows(length: int, size: int) -> list[tuple[slice, np.ndarray]]:
    """Along one side: where each window lies and the weights of its pixels, which add up to 1 everywhere."""
    size = min(size, length)
    overlap, margin = OVERLAP * size, MARGIN * size
    n = 1 if size == length else int(np.ceil((length - overlap) / (size - overlap)))
    starts = np.linspace(0, length - size, n).round().astype(int)
    # where a window meets another, its rim weighs nothing, then comes a ramp; elsewhere it has its full weight
    ramp, full = (np.arange(size) + 0.5 - margin) / (overlap - 2 * margin), np.ones(size)
    weights = np.zeros((n, length), np.float32)
    for k, start in enumerate(starts):
        rise, fall = ramp if k > 0 else full, ramp[::-1] if k < n - 1 else full
        weights[k, start:start + size] = np.minimum(rise, fall).clip(0, 1)
    weights /= weights.sum(0)
    return [(slice(start, start + size), weights[k, start:start + size]) for k, start in enumerate(starts)]


def share(results: Iterable[tuple], quiet: bool) -> Iterator[tuple]:
    """--same-mark: images of one size get one map, the root mean square of theirs.

    It found more than the mean, the median and others did (docs/LOG.md). Memory: one map for each size.
    """
    squares, waiting = {}, []
    for record, prob in results:
        if prob is None:
            yield record, None
            continue
        size = record["width"], record["height"], is_video(record["input"]) and record["input"]
        total, n = squares.get(size, (0, 0))
        squares[size] = total + prob ** 2, n + 1
        waiting.append((record, size))
    parts, groups = gather(squares), {}
    for size in {size for part in parts for size in part}:
        totals, ns = zip(*(part[size] for part in parts if size in part))
        groups[size] = np.sqrt(sum(totals) / sum(ns)), sum(ns)
    if not quiet:
        named = sorted((-n, f"{n} of {W}x{H}") for (W, H, _), (_, n) in groups.items() if n > 1)
        more = f", and {len(named) - 20} smaller groups" * (len(named) > 20)
        say("pictures that share a mask: "
            + (", ".join(name for _, name in named[:20]) + more or "none, each has a size of its own"))
    for record, size in waiting:
        prob, n = groups[size]
        yield record | {"group": n}, prob


# ---------------------------------------------------------------- write

def write(result: tuple, args: argparse.Namespace, own_threshold: float) -> dict:
    """Threshold, dilate, save -> the finished record. In a thread."""
    record, prob = result
    if prob is None or "present" in record:
        return record
    is_shared = args.same_mark or is_video(record["input"])
    sure = 0 if is_shared else None           # the mean of many maps is hardly ever sure
    threshold = args.threshold
    if threshold is None:
        threshold = SHARED if is_shared else own_threshold
    try:
        record["max_prob"] = round(float(prob.max()), 4)
        if args.list:
            return record | {"coverage": float((to_mask(prob, threshold, 0, sure=sure) > 0).mean())}
        prob = resize_prob(prob, record["height"], record["width"])       # (H, W)
        mask = to_mask(prob, threshold, args.dilate, args.feather, sure)
        if args.stored:
            mask, prob = unturn(mask, record), unturn(prob, record)
            record["height"], record["width"] = mask.shape
        if args.prob:
            save(record["prob"], (prob * 255).round().astype(np.uint8))
        if args.overlay:
            source = io.BytesIO(args.stdin) if record["input"] == "-" else record["input"]
            image = next(frames(source)) if is_video(record["input"]) else load_image(source)
            image = unturn(image, record) if args.stored else image
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            image[mask > 0] = image[mask > 0] // 2 + np.uint8((0, 0, 128))
            save(record["overlay"], image)
        save(record["mask"], mask)
        record["coverage"] = round(float((mask == 255).mean()), 6)
        if args.json:
            record["boxes"] = boxes(mask, prob)
        return record
    except (BrokenPipeError, io.UnsupportedOperation):       # of stdout
        raise
    except Exception as e:                    # a full disk, a read-only folder, no memory: the run goes on
        return {**record, "error": reason(e)}


def unturn(pixels: np.ndarray, record: dict) -> np.ndarray:
    """Displayed order of the pixels -> the file's. An EXIF turn undoes itself; 6 and 8 undo each other."""
    turn, image = record.get("orientation", 1), Image.fromarray(pixels)
    image.getexif()[0x0112] = {6: 8, 8: 6}.get(turn, turn)
    return np.asarray(ImageOps.exif_transpose(image))


def boxes(mask: np.ndarray, prob: np.ndarray) -> list[dict]:
    """One box for each mark, best first: x, y, width, height in pixels, and its highest probability as score.

    mask (H, W) uint8, 255 where marked; prob (H, W). Parts that are nearer than four default dilations make
    one mark, as the letters of a word do.
    """
    marked, found = mask == 255, []
    n, labels, stats, _ = cv2.connectedComponentsWithStats(dilate(marked, 2 * default_dilation(*mask.shape)))
    for k in range(1, n):                     # 0 is what lies between
        x, y, width, height, _ = stats[k].tolist()
        around = np.s_[y:y + height, x:x + width]
        part = (labels[around] == k) & marked[around]
        dx, dy, width, height = cv2.boundingRect(part.astype(np.uint8))
        found.append({"x": x + dx, "y": y + dy, "width": width, "height": height,
                      "score": round(float(prob[around][part].max()), 4)})
    return sorted(found, key=lambda box: -box["score"])


def save(path: str, pixels: np.ndarray) -> None:
    try:
        ok, data = cv2.imencode(".jpg" if path.endswith(".jpg") else ".png", pixels)
    except cv2.error:                         # OpenCV 4; 5 returns False
        ok = False
    if not ok:
        raise OSError(f"cannot write {printable(path)}: "
                      f"{pixels.shape[1]}x{pixels.shape[0]} is too large for its format")
    if path == "-":
        sys.stdout.buffer.write(data.tobytes())
        sys.stdout.buffer.flush()
        return
    with replacing(path) as file:
        file.write(data.tobytes())


# ---------------------------------------------------------------- side by side

def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, n: int,
          pixels: Callable = lambda item: 0) -> Iterator:
    """map() in threads and in order, at most n items ahead, so that memory is bounded.

    pixels: item -> how many it has. Together the items ahead have at most MAX_PIXELS.
    Threads are enough: Pillow, cv2 and torch let go of the GIL while they work.
    """
    window, weights = deque(), deque()
    for item in items:
        weights.append(pixels(item))
        while window and (len(window) > n or sum(weights) > MAX_PIXELS):
            weights.popleft()
            yield window.popleft().result()
        window.append(pool.submit(function, item))
    while window:
        yield window.popleft().result()


def run(args: argparse.Namespace, net: Segmenter, records: list[dict]) -> Iterator[dict]:
    """Reads ahead, predicts and writes behind, all in threads -> the finished records."""
    threads = max(min(os.cpu_count() or 1, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    batch_size, size = BATCH[net.mean.device.type], args.size or net.size
    depth = threads + 2 * (batch_size - 1)
    # on the CPU several networks side by side, since the threads of one wait for its slowest
    networks = min(threads, NETWORKS) if args.many and net.mean.device.type == "cpu" else 1
    inner = torch.get_num_threads()
    torch.set_num_threads(max(inner // networks, 1))
    pool, networks_pool = ThreadPoolExecutor(threads), ThreadPoolExecutor(networks)
    try:
        measured = ahead(pool, functools.partial(measure, args=args, size=size), records, depth)
        images = ahead(pool, functools.partial(read, args=args, size=size), measured, depth,
                       lambda item: item[1])
        groups = ahead(networks_pool, functools.partial(predict, net=net, args=args, size=size),
                       batches(images, batch_size), networks,
                       lambda group: sum(view.size // 3 for _, view in group if view is not None))
        probs = (result for group in groups for result in group)
        if args.same_mark:
            probs = share(probs, args.quiet or dist.is_initialized() and dist.get_rank() > 0)
        finish = functools.partial(write, args=args, own_threshold=net.threshold)
        yield from ahead(pool, finish, probs, depth,
                         lambda result: result[0].get("width", 0) * result[0].get("height", 0))
    finally:
        for p in (networks_pool, pool):       # after Ctrl-C: writes begun are finished, the rest dropped
            p.shutdown(cancel_futures=True)
        torch.set_num_threads(inner)


def gather(part) -> list:
    """A list of what each rank of torchrun has, on all ranks. Without torchrun, a list of one."""
    if not dist.is_initialized():
        return [part]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


# ---------------------------------------------------------------- command line

def say(text: str) -> None:
    # leaves a progress bar whole; text and newline in one, since ranks share stderr
    tqdm.write(f"predict.py: {text}\n", sys.stderr, end="")


def reason(error: Exception) -> str:
    """What went wrong, in one line without the file's name."""
    return getattr(error, "strerror", None) or first_line(error)


def notes(record: dict, args: argparse.Namespace, size: int) -> dict[str, str]:
    """What the user should know of this image, by kind. main() says the first of each kind."""
    name, told = printable(record["input"]), {}
    shrunk = square_side(record["height"], record["width"]) / size
    if shrunk > 2 and not args.tile:
        told["small"] = (f"the network sees {name} made {shrunk:.1f} times smaller: marks under about "
                         f"{LEGIBLE * shrunk:.0f} pixels may be missed, --tile looks at all of them")
    if "orientation" in record and not (args.stored or args.list):
        told["turned"] = (f"{name} is displayed turned by its EXIF data, and so is its mask; iopaint and "
                          "others do not turn: for them, give --stored")
    return told


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # in and out
    add("inputs", nargs="+", metavar="INPUT", help="pictures, videos, folders, globs, or - for stdin")
    add("-o", "--out", help="a .png for the mask, a folder for many, - for stdout (default: see above)")
    add("-r", "--recurse", action="store_true", help="also the folders inside folders")
    add("--prob", action="store_true", help="also write probabilities, an 8-bit PNG, 255 for 1.0")
    add("--overlay", action="store_true", help="also write the picture with its marks tinted red")
    add("--json", action="store_true", help="print a line for each picture, see above")
    add("--list", action="store_true",
        help="print score and name of the pictures that carry a mark, best first; write nothing")
    add("--stored", action="store_true",
        help="masks in the file's own order of pixels, for tools like iopaint that ignore its EXIF turn")
    add("--skip-existing", action="store_true", help="leave out pictures that have their outputs")
    # what counts as a mark
    add("--weights", default=WEIGHTS, help="a checkpoint, or the folder of a run (default: %(default)s)")
    add("--same-mark", action="store_true",
        help="all carry one mark in one place, as photos of one agency or pages of one site do: those of one "
             "size share a mask, which finds more; in folders, takes videos too")
    add("--threshold", type=float,
        help=f"mark pixels from this probability on, in parts that reach {SURE} somewhere; lower it where "
             "marks are covered only in part, raise it to .99 or more against false alarms (default: the "
             f"weights' own; {SHARED} for videos and --same-mark, where no part needs to be sure)")
    add("--dilate", type=int,
        help="grow the mask by this radius in pixels, 0 turns it off (default: 3 at 512, more for larger)")
    add("--feather", type=int, default=0, metavar="R",
        help="a soft edge of R pixels outside of that, for tools that blend (default: %(default)s)")
    add("--size", type=int,
        help="the network looks at SIZE x SIZE pixels, in the picture's shape; raise it for small marks, "
             "lower it if you run out of memory (default: as trained; smaller pictures are enlarged to "
             f"{SIZE} x {SIZE}, at most {ENLARGE} times)")
    add("--tile", action="store_true",
        help="full resolution through overlapping windows of --size: finds small marks, may miss huge ones, "
             "takes longer")
    # machine
    add("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: %(default)s)")
    add("-q", "--quiet", action="store_true", help="nothing on stderr but failures")
    args = parser.parse_args(argv)

    for name, high in {"threshold": 1, "dilate": 10_000, "feather": 10_000, "size": 65536}.items():
        value, low = getattr(args, name), 32 if name == "size" else 0
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value} is not between {low} and {high}")
    for name in ("out", "prob", "overlay", "json", "stored", "skip_existing", "dilate", "feather"):
        if args.list and getattr(args, name):
            parser.error(f"--list writes nothing, so --{name.replace('_', '-')} would do nothing")

    # Windows shells leave globs to us. Each input counts once, and outputs of an earlier run do not count.
    names = [n for p in args.inputs
             for n in ([p] if os.path.lexists(p) else sorted(glob.glob(p, recursive=True)) or [p])]
    names = list({os.path.abspath(n): n for n in names}.values())
    args.inputs = names if len(names) == 1 else [n for n in names if not is_ours(os.path.normpath(n))]

    folders = [n for n in args.inputs if os.path.isdir(n)]
    args.many = many = bool(folders) or len(args.inputs) > 1
    if "-" in args.inputs and not args.list:
        args.out = args.out or "-"
    args.out_is_folder = bool(args.out) and (
        many or args.out.endswith(("/", os.sep)) or os.path.isdir(args.out))
    if args.out == "-":
        if many or args.json or args.prob or args.overlay:
            parser.error("stdout takes one mask and nothing else: name a file or folder with -o")
    elif args.out_is_folder:
        if os.path.exists(args.out) and not os.path.isdir(args.out):
            parser.error(f"-o {args.out} is a file, and these inputs need a folder")
        for folder in folders:
            source, out = Path(folder).resolve(), Path(args.out).resolve()
            if source == out or args.recurse and source.is_relative_to(out):
                parser.error(f"-o {args.out} would mix masks with the pictures of {folder}, "
                             "name another folder")
    elif args.out and not args.out.lower().endswith(".png"):
        parser.error(f"-o {args.out}: end it in .png for a mask, or in / for a folder")
    return args


@one_way_out
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cv2.setNumThreads(1)                      # pictures side by side, not threads inside each
    # OpenCV 4 and 5 name it differently; silent, since the one sentence is ours to say
    (cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")                 # and on videos
    warnings.filterwarnings("ignore", module="PIL")                       # of odd files it reads all the same
    logging.getLogger("PIL").setLevel(logging.CRITICAL)                   # and what it says before it raises
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    records = find_images(args)
    if not records:
        say(f"no pictures in {', '.join(map(printable, args.inputs))}"
            + ", -r looks deeper" * (not args.recurse))
        return 2
    net = network(os.fspath(args.weights), args.device, args.quiet)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    # with --same-mark, a picture that has its mask already still counts for the others of its size
    everyone = args.same_mark and any("present" not in r for r in records)
    todo = [r for r in records[rank::world]
            if "present" not in r or everyone and not is_video(r["input"])]
    done, told = [], set()
    try:
        for record in tqdm(run(args, net, todo), total=len(todo), unit=" pictures",
                           disable=True if args.quiet else None):
            if "present" in record:
                continue
            done.append((record.get("coverage"), record.get("max_prob"), printable(record["input"])))
            if "error" in record:
                say(f"{printable(record['input'])}: {record['error']}")
            elif not args.quiet:
                for kind, text in notes(record, args, args.size or net.size).items():
                    if kind not in told:
                        say(text)
                    told.add(kind)
            if args.json:
                print(json.dumps(record) + "\n", end="", flush=True)             # at once: ranks share stdout
            elif len(records) == 1 and "error" not in record and record.get("mask", "-") != "-":
                print(printable(record["mask"]), flush=True)
        done = sum(gather(done), [])          # torchrun kills all ranks when one fails: so all end together
        found = sorted(((score, name) for coverage, score, name in done if coverage), reverse=True)
        if args.list and rank == 0:
            print(*(f"{score:.4f}\t{name}\n" for score, name in found), sep="", end="", flush=True)
    except KeyboardInterrupt:
        say("stopped; every mask written so far is whole, --skip-existing goes on from here")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    failed = sum(coverage is None for coverage, _, _ in done)
    if not args.quiet and rank == 0:
        present = f", {len(records) - len(done)} were there already" if args.skip_existing else ""
        say(f"found marks on {len(found)} of {len(done)} pictures, {failed} failed{present}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
