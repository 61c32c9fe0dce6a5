"""Photos in, watermark masks out.

    python predict.py in.jpg                            # writes in_mask.png beside it, in seconds on a laptop
    python predict.py photos/ --overlay                 # photos_masks/<stem>.png, photos_overlays/<stem>.jpg
    iopaint run --model lama --image photos --mask photos_masks --output clean
    python predict.py scans/ -r --tile --json > marks.jsonl         # small marks in large pictures
    cat in.jpg | python predict.py - > mask.png
    torchrun --nproc-per-node 8 predict.py photos/ --skip-existing  # shares the files; goes on after a crash

    from predict import predict_mask
    mask = predict_mask("in.jpg")                       # (H, W) uint8, 255 where marked

A mask is an 8-bit PNG, 0 or 255, of the picture's displayed size.
A picture that cannot be read or written costs one sentence on stderr, never the others.
Exit code: 0 all written, 1 some failed, 2 wrong usage or nothing to do.

Read top to bottom: library use, which pictures, decode, network, write, side by side, command line.
"""
import argparse
import contextlib
import functools
import glob
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
import uuid
import warnings
import zlib
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
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from model import (ENLARGE, MAX_PIXELS, SIZE, WEIGHTS, Segmenter, first_line, fit, load_image, load_model,
                   pick_amp, pick_device, predict_prob, predict_probs, resize_prob, square_side, to_mask)

BATCH = {"cuda": 16, "mps": 4, "cpu": 1}      # pictures of one shape per pass; a CPU gains nothing from more
NETWORKS = 4                                  # at work side by side at most, each with its share of the cores
OVERLAP, MARGIN = 1 / 4, 1 / 16               # of a window: what two share, and the rim that lacks context
DRAFT = 1.5                                   # a JPEG is decoded to at least this many times the size wanted
LEGIBLE = 8                                   # pixels: the smallest text to be seen; a guess, not measured
CLAIMS = 100_000                              # masks of this run remembered by name (30 MB)
ENDINGS = {"mask": ".png", "prob": ".png", "overlay": ".jpg"}
OURS = re.compile(r"_(mask\.png|prob\.png|overlay\.jpg|masks|probs|overlays)$")
NOT_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, a photo folder may hold them
CAMERAS = {".mpo", ".heic", ".heif", ".avif", ".jxl"}        # Pillow may lack them: none is skipped silently


# ---------------------------------------------------------------- library use

def predict_mask(image, weights=WEIGHTS, threshold: float | None = None, dilation: int | None = None,
                 size: int | None = None, tile: bool = False, device: str = "auto") -> np.ndarray:
    """Where is the watermark? -> (H, W) uint8, 255 where marked, 0 elsewhere, ready for an inpainting tool.

    image: (H, W, 3) uint8 RGB array, PIL image or path; H and W are the displayed (EXIF-turned) ones.
    threshold: probability from which a pixel is marked, see model.to_mask; None takes the one stored with the
    weights.
    dilation: pixels to grow the mask by; None grows with the picture (3 at 512), 0 is the bare prediction.
    size: the network looks at size x size pixels, None takes its own size; see model.fit. tile: see --tile.
    device: auto, cuda, cuda:1, mps or cpu. The weights are read once per process.
    Raises OSError for a file that is no complete picture, ValueError for an array of another kind.
    """
    net = cached_model(os.fspath(weights), device)
    image = load_image(image)                                             # (H, W, 3)
    prob = tiled_prob(net, image, size or net.size) if tile else predict_prob(net, image, size)
    return to_mask(prob, net.threshold if threshold is None else threshold, dilation, net.certain)


@functools.lru_cache(maxsize=2)
def cached_model(weights: str, device: str) -> Segmenter:
    return load_model(weights, pick_device(device)[0])


# ---------------------------------------------------------------- which pictures
# A picture travels as its record, a dict: first {input, mask, ...}, at the end the line that --json prints.

def find_pictures(args: argparse.Namespace) -> Iterator[dict]:
    """As the system lists them: no list and no order, so that ten million files in a folder start at once."""
    named = {os.path.abspath(n) for n in args.inputs}
    for source in args.inputs:
        folder = source if os.path.isdir(source) else None
        for path, error in scan(folder, args) if folder else [(source, None)]:
            outputs = {} if error else name_outputs(path, folder, args)
            if any(os.path.abspath(p) in named for p in outputs.values() if p != "-"):
                error = "left alone, since its output would overwrite an input"
            yield {"input": path, **outputs, "error": error} if error else {"input": path, **outputs}


def scan(folder: str, args: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Yields (picture, None), and (folder, reason) for one that cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (is_ours(entry.path)
                        or args.out and os.path.abspath(entry.path) == os.path.abspath(args.out)):
                    continue
                if entry.is_dir(follow_symlinks=False):                   # a link could lead round in circles
                    if args.recurse:
                        yield from scan(entry.path, args)
                elif os.path.splitext(entry.name)[1].lower() in picture_endings():
                    yield entry.path, None
    except OSError as e:
        yield folder, reason(e)


def is_ours(path: str) -> bool:
    """Output of an earlier run: in_mask.png beside in.jpg, photos_masks beside photos."""
    source = OURS.sub("", path)
    return source != path and any(os.path.exists(source + e) for e in ("", *picture_endings()))


@functools.lru_cache(maxsize=1)
def picture_endings() -> set[str]:
    known = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - NOT_PHOTOS}
    return known | CAMERAS | {e.upper() for e in known | CAMERAS}


def name_outputs(path: str, folder: str | None, args: argparse.Namespace) -> dict[str, str]:
    """folder: the input folder that holds `path`, None for a file that the user named."""
    kinds = ["mask"] + ["prob"] * args.prob + ["overlay"] * args.overlay
    if folder or args.out_is_folder:
        # photos/ -> photos_masks, photos_probs, photos_overlays: iopaint pairs by stem, so kinds must not mix
        base = args.out or folder
        beside = os.path.join(base, os.pardir, os.path.basename(os.path.abspath(base)))
        roots = {kind: os.path.normpath(f"{beside}_{kind}s") for kind in kinds}
        roots["mask"] = args.out or roots["mask"]
        name = os.path.relpath(path, folder) if folder else "stdin" if path == "-" else os.path.basename(path)
        return {kind: os.path.join(roots[kind], os.path.splitext(name)[0] + ENDINGS[kind]) for kind in kinds}
    base = os.path.splitext(args.out or path)[0]
    outputs = {kind: f"{base}_{kind}{ENDINGS[kind]}" for kind in kinds}
    return {**outputs, "mask": args.out or outputs["mask"]}


def claim(record: dict, claims: dict[str, str], started: int) -> None:
    """Fails a picture whose mask another one of this run has taken: a.jpg and a.png in one folder.

    The names of ten million files would cost gigabytes: old ones are forgotten, then the mask's age tells.
    """
    mask = os.path.abspath(record["mask"])
    if len(claims) == CLAIMS and mask not in claims:
        del claims[next(iter(claims))]
        if os.path.exists(mask) and os.stat(mask).st_mtime_ns >= started:
            claims[mask] = "another picture"
    other = claims.setdefault(mask, record["input"])
    if other != record["input"]:
        record["error"] = (f"{printable(other)} has the same mask, {printable(record['mask'])}; "
                           "rename one of them")


# ---------------------------------------------------------------- decode

def read(record: dict, args: argparse.Namespace,
         size: int) -> tuple[dict, np.ndarray | None, np.ndarray | None]:
    """-> (record, image, view): image (H, W, 3) for the overlay, view for the network. In a thread."""
    start = time.perf_counter()
    source = record["input"]
    try:
        if "error" in record:
            return record, None, None
        if source == "-":
            source = io.BytesIO(sys.stdin.buffer.read())
        elif os.path.exists(source) and not os.path.isfile(source):
            raise OSError("not a regular file")                           # a named pipe would block for ever
        with Image.open(source) as file:
            W, H = full = file.size
            if W * H > args.max_pixels:
                raise ValueError(f"{W}x{H} is over the limit of {args.max_pixels} pixels, "
                                 "--max-pixels raises it")
            # A JPEG decodes to a half, quarter or eighth in a fraction of the time. Not if both sides could
            # come out equal: which one is longer tells, further down, whether EXIF turned the picture.
            scale = DRAFT * size / square_side(H, W)
            small = not args.tile and not args.overlay and abs(W - H) >= 8 and scale < 1
            drafted = small and file.draft(None, (int(W * scale) + 1, int(H * scale) + 1))
            image = load_image(file, args.max_pixels)                     # (H, W, 3)
        H, W = image.shape[:2]
        if drafted:
            W, H = sorted(full, reverse=W > H)
        record["width"], record["height"] = W, H
        view = image if args.tile else fit(image, size)
        record["milliseconds"] = 1000 * (time.perf_counter() - start)
        return record, image if args.overlay else None, view
    except Exception as e:                    # Pillow raises a dozen kinds on garbage; the run goes on
        return {**record, "error": reason(e)}, None, None


# ---------------------------------------------------------------- network

def batches(pictures: Iterable, claims: dict, batch_size: int) -> Iterator[list[tuple]]:
    """What read() gives, in lists for one pass each: pictures wait for others of their shape to fill it."""
    started, waiting = time.time_ns(), {}
    for record, image, view in pictures:
        if "error" not in record:
            claim(record, claims, started)
        if "error" in record:
            yield [(record, None, None)]
            continue
        group = waiting.setdefault(view.shape, [])
        group.append((record, image, view))
        if len(group) == batch_size or sum(map(len, waiting.values())) > 4 * batch_size:
            yield waiting.pop(view.shape)
    yield from waiting.values()


def predict(group: list[tuple], net: Segmenter, args: argparse.Namespace, size: int) -> list[tuple]:
    """One of batches() -> for each of its pictures (record, image, prob). In a thread."""
    if "error" in group[0][0]:
        return group
    start = time.perf_counter()
    views = [view for _, _, view in group]
    try:
        probs = [tiled_prob(net, view, size) for view in views] if args.tile else predict_probs(net, views)
    except RuntimeError as e:                 # out of memory, most likely
        error = f"the network failed, a smaller --size may help: {first_line(e)}"
        return [({**record, "error": error}, None, None) for record, _, _ in group]
    spent = 1000 * (time.perf_counter() - start) / len(group)
    return [({**record, "milliseconds": record["milliseconds"] + spent}, image, prob)
            for (record, image, _), prob in zip(group, probs)]


def tiled_prob(net: Segmenter, image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 at full resolution -> (H, W) float32, from overlapping windows with blended seams."""
    H, W = image.shape[:2]
    if square_side(H, W) <= size:             # nothing to cut
        return predict_prob(net, image, size)
    prob = np.zeros((H, W), np.float32)
    places = [(row, column) for row in windows(H, size) for column in windows(W, size)]
    batch_size = BATCH[net.mean.device.type]
    for k in range(0, len(places), batch_size):
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
    inside = np.arange(size) + 0.5                                        # distance from a window's start
    weights = np.zeros((n, length), np.float32)
    for k, start in enumerate(starts):
        # an end that meets another window: nothing over the rim, then a ramp;
        # an end of the picture: full weight
        rise = (inside - margin) / (overlap - 2 * margin) if k > 0 else np.ones(size)
        fall = (inside[::-1] - margin) / (overlap - 2 * margin) if k < n - 1 else np.ones(size)
        weights[k, start:start + size] = np.minimum(rise, fall).clip(0, 1)
    weights /= weights.sum(0)
    return [(slice(start, start + size), weights[k, start:start + size]) for k, start in enumerate(starts)]


# ---------------------------------------------------------------- write

def write(result: tuple, args: argparse.Namespace, threshold: float, certain: float) -> dict:
    """Threshold, dilate, save -> the finished record. In a thread."""
    start = time.perf_counter()
    record, image, prob = result
    if "error" in record:
        return record
    try:
        prob = resize_prob(prob, record["height"], record["width"])       # (H, W)
        mask = to_mask(prob, threshold, args.dilate, certain)
        if args.prob:
            save(record["prob"], (prob * 255).round().astype(np.uint8))
        if args.overlay:
            red = cv2.addWeighted(image, 0.5, np.full_like(image, (255, 0, 0)), 0.5, 0)
            save(record["overlay"], np.where(mask[..., None] > 0, red, image)[..., ::-1])
        save(record["mask"], mask)            # last: where the mask is, all is
        record["coverage"] = round(cv2.countNonZero(mask) / mask.size, 6)
        record["max_prob"] = round(float(prob.max()), 4)
        if args.json:
            record["boxes"] = boxes(mask, prob)
        record["milliseconds"] = round(record["milliseconds"] + 1000 * (time.perf_counter() - start), 1)
        return record
    except BrokenPipeError:
        raise
    except Exception as e:                    # a full disk, a read-only folder, no memory: the run goes on
        return {**record, "error": reason(e)}


def boxes(mask: np.ndarray, prob: np.ndarray) -> list[dict]:
    """The connected marks; the score is a mark's highest probability."""
    n, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    marked, scores = mask > 0, np.zeros(n, np.float32)
    np.maximum.at(scores, labels[marked], prob[marked])
    return [{"x": x, "y": y, "width": width, "height": height, "score": round(score, 4)}
            for (x, y, width, height, _), score in zip(stats[1:].tolist(), scores[1:].tolist())]


def save(path: str, pixels: np.ndarray) -> None:
    """Under a temporary name, then renamed: whatever kills us, a file under the final name is complete."""
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
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as f:
            f.write(data)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"cannot write {printable(path)}: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):    # renamed already, or never made
            os.unlink(temporary)


# ---------------------------------------------------------------- side by side

def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, n: int) -> Iterator:
    """map() in threads and in order, n items ahead: memory is bounded however many there are.

    Threads are enough: Pillow, cv2 and torch let go of the GIL while they work.
    """
    window = deque()
    for item in items:
        window.append(pool.submit(function, item))
        if len(window) > n:
            yield window.popleft().result()
    while window:
        yield window.popleft().result()


def run(args: argparse.Namespace, net: Segmenter) -> dict[str, int]:
    """Reads ahead, predicts and writes behind, all in threads -> counts for the summary."""
    counts = dict.fromkeys(("seen", "present", "done", "found", "failed"), 0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    size, noted, claims = args.size or net.size, args.tile or args.quiet, {}

    def to_do() -> Iterator[dict]:
        for record in find_pictures(args):
            counts["seen"] += 1
            outputs = [record[kind] for kind in ENDINGS if kind in record]
            # shared out by the mask's name, so that two pictures that want one mask meet in one process
            if zlib.crc32(os.fsencode(record.get("mask", record["input"]))) % world != rank:
                continue
            whole = (args.skip_existing and outputs
                     and all(os.path.isfile(p) and os.path.getsize(p) for p in outputs))
            if whole and os.path.abspath(record["mask"]) not in claims:
                counts["present"] += 1
            else:
                yield record

    threads = max(min(os.cpu_count() or 1, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    batch_size = BATCH[net.mean.device.type]
    depth = threads + 2 * (batch_size - 1)
    # on the CPU several networks side by side, since the threads of one wait for its slowest
    networks = min(threads, NETWORKS) if args.many and net.mean.device.type == "cpu" else 1
    inner = torch.get_num_threads()
    torch.set_num_threads(max(inner // networks, 1))
    pool, networks_pool = ThreadPoolExecutor(threads), ThreadPoolExecutor(networks)
    try:
        pictures = ahead(pool, functools.partial(read, args=args, size=size), to_do(), depth)
        groups = ahead(networks_pool, functools.partial(predict, net=net, args=args, size=size),
                       batches(pictures, claims, batch_size), networks)
        probs = itertools.chain.from_iterable(groups)
        threshold = net.threshold if args.threshold is None else args.threshold
        finish = functools.partial(write, args=args, threshold=threshold, certain=net.certain)
        written = ahead(pool, finish, probs, depth)
        for record in tqdm(written, unit=" pictures", disable=True if args.quiet else None):
            counts["done"] += 1
            if "error" in record:
                counts["failed"] += 1
                say(f"{printable(record['input'])}: {record['error']}")
            else:
                counts["found"] += record["coverage"] > 0
                shrunk = square_side(record["height"], record["width"]) / size
                if shrunk > 2 and not noted:
                    noted = True
                    say(f"the network sees {printable(record['input'])} made {shrunk:.1f} times smaller: "
                        f"marks under about {LEGIBLE * shrunk:.0f} pixels may be missed, "
                        "--tile looks at all of them")
            if args.json:
                print(json.dumps(record), flush=True)
    finally:
        for p in (networks_pool, pool):       # after Ctrl-C: writes begun are finished, the rest dropped
            p.shutdown(cancel_futures=True)
        torch.set_num_threads(inner)
    return counts


def sum_over_ranks(counts: dict[str, int]) -> dict[str, int]:
    """torchrun kills all ranks as soon as one fails: so all of them end together, with one result."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return counts
    total = torch.tensor(list(counts.values()))
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return dict(zip(counts, total.tolist()))


# ---------------------------------------------------------------- command line

def say(text: str) -> None:
    tqdm.write(f"predict.py: {text}", file=sys.stderr)                    # leaves a progress bar whole


def printable(path: str) -> str:
    """File names may hold newlines and bytes that are not UTF-8; a sentence must not."""
    return path if path.isprintable() else repr(path)


def reason(error: Exception) -> str:
    """What went wrong, in one line without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(error, (OSError, ValueError, RuntimeError)):           # the last: Pillow's DDS and AVIF
        return getattr(error, "strerror", None) or first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # in and out
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures, folders, globs, or - for stdin")
    parser.add_argument("-o", "--out",
                        help="a .png for the mask, a folder for many, - for stdout (default: see above)")
    parser.add_argument("-r", "--recurse", action="store_true", help="also the folders inside folders")
    parser.add_argument("--prob", action="store_true",
                        help="also write probabilities, an 8-bit PNG, 255 for 1.0")
    parser.add_argument("--overlay", action="store_true",
                        help="also write the picture with its marks tinted red")
    parser.add_argument("--json", action="store_true",
                        help="print a line per picture: size, coverage, boxes, ...")
    parser.add_argument("--skip-existing", action="store_true",
                        help="leave out pictures that have their outputs")
    # what counts as a mark
    parser.add_argument("--weights", default=WEIGHTS,
                        help="a checkpoint, or the folder of a run (default: %(default)s)")
    parser.add_argument("--threshold", type=float,
                        help="mark pixels from this probability on (the released weights also ask for more "
                             "nearby and in the picture: see model.to_mask); raise it against false alarms "
                             "(default: the one stored with the weights)")
    parser.add_argument("--dilate", type=int,
                        help="grow the mask by this radius in pixels, 0 turns it off "
                             "(default: grows with the picture, 3 at 512)")
    parser.add_argument("--size", type=int,
                        help="the network looks at SIZE x SIZE pixels, in the picture's shape; raise it for "
                             "small marks, lower it if you run out of memory (default: as trained; smaller "
                             f"pictures are enlarged to {SIZE} x {SIZE}, at most {ENLARGE} times)")
    parser.add_argument("--tile", action="store_true",
                        help="full resolution through overlapping windows of --size: "
                             "finds small marks, may miss huge ones, takes longer")
    # machine
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                        help="refuse larger pictures, which could fill "
                             "the memory (default: %(default)s)")
    parser.add_argument("--device", default="auto",
                        help="auto, cuda, cuda:1, mps, cpu (default: %(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but failures")
    args = parser.parse_args(argv)

    limits = {"threshold": (0, 1), "dilate": (0, 10_000), "size": (32, 65536), "max_pixels": (1, 1 << 40)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")

    # globs, which Windows shells leave to us; each input once; without what an earlier run put beside them
    names = [n for p in args.inputs
             for n in ([p] if os.path.lexists(p) else glob.glob(p, recursive=True) or [p])]
    names = list({os.path.abspath(n): n for n in names}.values())
    args.inputs = names if len(names) == 1 else [n for n in names if not is_ours(os.path.normpath(n))]

    folders = [n for n in args.inputs if os.path.isdir(n)]
    many = bool(folders) or len(args.inputs) > 1
    if "-" in args.inputs and not args.out:
        args.out = "-"
    args.many, args.out_is_folder = many, bool(args.out) and (
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


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    Image.MAX_IMAGE_PIXELS = None             # --max-pixels instead
    cv2.setNumThreads(1)                      # pictures side by side, not threads inside each
    # OpenCV 4 and 5 name it differently; silent, since the one sentence is ours to say
    (cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
    warnings.filterwarnings("ignore", module="PIL")                       # of odd files it reads all the same
    logging.getLogger("PIL").setLevel(logging.CRITICAL)                   # and what it says before it raises
    try:
        device, why = pick_device(args.device)
        net = load_model(args.weights, device)
    except (OSError, ValueError) as e:
        say(str(e))
        return 2
    if not args.quiet:
        dtype, why_dtype = pick_amp("auto", device)
        say(f"{net.arch} on {net.encoder}, {device} ({why}), {dtype or torch.float32} ({why_dtype})")
    try:
        counts = sum_over_ranks(run(args, net))
    except KeyboardInterrupt:
        say("stopped; every mask written so far is whole, --skip-existing goes on from here")
        return 130
    except BrokenPipeError:                   # the reader of our stdout has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if counts["seen"] == 0:
        say(f"no pictures in {', '.join(map(printable, args.inputs))}"
            + ", -r looks deeper" * (not args.recurse))
        return 2
    if not args.quiet and not ("TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["RANK"])):
        present = f", {counts['present']} were there already" if args.skip_existing else ""
        say(f"found marks on {counts['found']} of {counts['done']} pictures, "
            f"{counts['failed']} failed{present}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
