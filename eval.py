"""Score a model: IoU, F1, precision, recall and false alarms, with the conventions beside the numbers.

    python eval.py                                          # released weights, generated backgrounds, logos/
    python eval.py --images photos/ --logos logos/          # the held-out share of your own files
    python eval.py data/CLWD/test                           # a published test set (see LAYOUTS)
    python eval.py --weights runs/x/best.pt --recipe default --n 50 --worst 24 --plot breakdown.png
    python eval.py --compare runs/a/best.pt runs/b/best.pt  # is B better, or only luckier?
    python eval.py --weights runs/x/best.pt --tune          # find the best threshold, keep it in the file
    torchrun --nproc-per-node 8 -- eval.py --n 10000        # many GPUs; `--` keeps --n from torchrun

Read top to bottom: metrics, test sets, scoring, tables, drawings, command line. Pictures pass the network one
at a time and sample i is a pure function of (seed, i), so batches, workers and ranks cannot change a number.
"""
import argparse
import contextlib
import json
import os
import signal
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import active_children, get_start_method
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path

import cv2
import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from model import (WEIGHTS, default_dilation, dilate, find_weights, first_line, load_checkpoint,
                   load_image, load_model, one_way_out, open_image, pick_device, predict_prob, printable,
                   readable, save_checkpoint, to_mask)
from synth import (MASK_ALPHA, OWN, PHOTO_TYPES, RECIPES, STOP_SIGNALS, Synth, generate_background, read_meta,
                   read_photo, start_worker)

CLEAN_SHARE = 0.001        # a clean picture with more than this share of its pixels marked is a false alarm
BOOTSTRAP = 1000           # resamples behind a 95 % interval
VALIDATION_SEED = 1        # train.py chooses best.pt on these samples, --tune the threshold
TEST_SEED = 2              # tables are made of these: the same held-out files, other samples
THRESHOLDS = [k / 20 for k in range(1, 20)]
TOLERANCE = 0.002          # of IoU, in the choice of a threshold
DILATIONS = (0, 1, 3, 5, 10)                      # MorphoMod's radii in pixels; predict.py's own beside them
PAPER_SIZE = 256           # pixels; SLBR, DENet, ... squash to this square: image bilinear, mask nearest
WORST = Path("worst.png")
CURVE = "precision recall dataset_iou iou false_alarm_rate"       # columns of the threshold curve
RULES = {"default": f"alpha > {MASK_ALPHA:g}", OWN: f"alpha > {MASK_ALPHA:g}", "reference": "alpha > 0",
         "clwd": "sum abs(J-I) > 15/255", "logo-l": "alpha > 0", "logo-h": "alpha > 0", "logo-gray": "alpha > 0"}
PUBLISHED = {"reference": ".385 / -, a fork's run", "logo-l": ".696 / .788, DENet",
             "logo-h": ".797 / .874, DENet", "logo-gray": ".743 / .828, DENet"}
DEFINITIONS = f"""\
IoU, F1: mean over the pictures that have a mark (a miss is 0), [95 % bootstrap interval over pictures].
Dataset IoU and F1, precision, recall: from the pixels of all pictures of the line together.
False alarm rate: share of the clean pictures with more than {CLEAN_SHARE:.1%} of their pixels marked. Clean
pictures are in no mean of IoU or F1 (SLBR counts them 0, smp and Pytorch-UNet 1).
Mask rule: where the truth is 1; scores under different rules do not compare.
Published: IoU / F1, * another test set."""


# ---------------------------------------------------------------- metrics

def count(mask: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Pixel counts of one picture. mask, truth: the same shape, any dtype, non-zero where marked."""
    mask, truth = mask > 0, truth > 0
    tp = int(np.count_nonzero(mask & truth))
    return {"tp": tp, "fp": int(np.count_nonzero(mask)) - tp, "fn": int(np.count_nonzero(truth)) - tp,
            "pixels": truth.size}


def ratios(counts: dict) -> dict[str, float]:
    """Of one picture's counts, or of a sum. NaN where the truth is empty, or there is nothing to divide."""
    tp, fp, fn = (counts[k] for k in ("tp", "fp", "fn"))
    parts = {"iou": (tp, tp + fp + fn), "f1": (2 * tp, 2 * tp + fp + fn), "precision": (tp, tp + fp),
             "recall": (tp, tp + fn), "excess_per_mark": (fp, tp + fn)}
    return {name: a / b if b and tp + fn else float("nan") for name, (a, b) in parts.items()}


def is_marked(row: dict) -> bool:
    return row["tp"] + row["fn"] > 0


def is_false_alarm(row: dict) -> bool:
    return not is_marked(row) and row["fp"] / row["pixels"] > CLEAN_SHARE


def mean(values: list) -> float:
    return float(np.mean(values)) if values else float("nan")


def interval(values: list) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean; always the same resamples, so a number can be reproduced."""
    if not values:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP, len(values)))
    low, high = np.percentile(np.asarray(values, float)[chosen].mean(1), (2.5, 97.5)).tolist()
    return low, high


def summarise(rows: list[dict]) -> dict[str, float]:
    """Counts of many pictures -> the metrics, as DEFINITIONS has them. NaN where there is nothing to divide.

    fully_covered: share of the marked pictures without a missed pixel. excess: what is marked outside the
    truth, as a share of the picture (mean) and of the truth (dataset). Each mean has its _low and _high.
    """
    marked, clean = [r for r in rows if is_marked(r)], [r for r in rows if not is_marked(r)]
    dataset = ratios({k: sum(r[k] for r in rows) for k in ("tp", "fp", "fn")})
    each = [ratios(r) for r in marked]
    means = {"iou": [r["iou"] for r in each], "f1": [r["f1"] for r in each],
             "recall_per_picture": [r["recall"] for r in each],
             "fully_covered": [r["fn"] == 0 for r in marked],
             "excess_per_picture": [r["fp"] / r["pixels"] for r in marked],
             "false_alarm_rate": [is_false_alarm(r) for r in clean]}
    summary = {"n_marked": len(marked), "n_clean": len(clean)}
    for name, values in means.items():
        summary[name], (summary[f"{name}_low"], summary[f"{name}_high"]) = mean(values), interval(values)
    return summary | {"dataset_iou": dataset["iou"], "dataset_f1": dataset["f1"], "recall": dataset["recall"],
                      "precision": dataset["precision"], "excess_per_mark": dataset["excess_per_mark"]}


def summarise_curve(rows: list[dict]) -> dict[float, dict]:
    """threshold -> metrics of the plain mask."""
    return {t: summarise([r["curve"][k] for r in rows]) for k, t in enumerate(THRESHOLDS)}


def best_threshold(curve: dict[float, dict]) -> float:
    """Of the thresholds whose per-image IoU is within TOLERANCE of the best one's, since less is noise, those
    with the fewest false alarms; of them the lowest, which has the highest recall. For validation samples,
    never for a test. ValueError where no picture has a mark."""
    if not curve[0.5]["n_marked"]:
        raise ValueError("no sample has a mark, so no threshold is better than another: raise --n")
    best = max(scores["iou"] for scores in curve.values())
    good = [t for t, scores in curve.items() if scores["iou"] >= best - TOLERANCE]
    return min(good, key=lambda t: (np.nan_to_num(curve[t]["false_alarm_rate"]), t))    # NaN: no clean sample


def summarise_dilation(rows: list[dict]) -> dict[str, dict]:
    """radius -> metrics. An inpainting tool asks: is every marked pixel covered, how much else is lost?"""
    marked = [r for r in rows if is_marked(r)]
    return {str(d): summarise([r["dilated"][k] for r in marked])
            for k, d in enumerate((*DILATIONS, "default"))}


BINS = {"opacity": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1), "size": (0, 0.5, 1, 2, 5, 10, 20, 100),
        "kind": None, "blend": None, "jpeg": (0, 50, 70, 85, 100)}


def traits(row: dict) -> dict:
    """What a picture is sorted by, None where it cannot be: its mark if exactly one, size in %, last JPEG."""
    marks, jpeg = row["meta"].get("marks", []), row["meta"].get("jpeg", 0)
    one = marks[0] if len(marks) == 1 else {}
    return {"opacity": one.get("opacity"), "size": 100 * (row["tp"] + row["fn"]) / row["pixels"],
            "kind": one.get("kind"), "blend": one.get("blend"),
            "jpeg": "none" if jpeg is None else jpeg or None}


def breakdown(rows: list[dict]) -> dict[str, dict]:
    """"axis/bin" -> metrics of the marked pictures there, each axis in rising order, empty bins left out."""
    bins = {}
    for row in filter(is_marked, rows):
        for place, (axis, value) in enumerate(traits(row).items()):
            if isinstance(value, str):
                bins.setdefault((place, -1, f"{axis}/{value}"), []).append(row)
            elif value is not None:
                edges = BINS[axis]
                k = min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)
                bins.setdefault((place, k, f"{axis}/{edges[k]:g}-{edges[k + 1]:g}"), []).append(row)
    return {key[-1]: summarise(bins[key]) for key in sorted(bins)}


def compare(rows_a: list[dict], rows_b: list[dict]) -> dict:
    """Two models, or two thresholds, on the same pictures: paired, so how hard a picture is cancels out."""
    a, b = summarise(rows_a), summarise(rows_b)
    differences = [ratios(y)["iou"] - ratios(x)["iou"] for x, y in zip(rows_a, rows_b) if is_marked(x)]
    low, high = interval(differences)
    return {"n_marked": len(differences), "iou_A": a["iou"], "iou_B": b["iou"],
            "B_minus_A": mean(differences), "B_minus_A_low": low, "B_minus_A_high": high,
            "better": "B" if low > 0 else "A" if high < 0 else "not shown" if differences else "-",
            "A_false_alarm_rate": a["false_alarm_rate"], "B_false_alarm_rate": b["false_alarm_rate"]}


# ---------------------------------------------------------------- test sets

class Pictures(Dataset):
    """A test set. make(i) -> image (H, W, 3) uint8 RGB, truth (H, W) uint8 {0, 1}, meta with `name`, `notes`.

    Image and truth are None where a picture is skipped. make is a partial of a function below: picklable.
    """

    def __init__(self, name: str, rule: str, n: int, make, published: str = ""):
        self.name, self.rule, self.n, self.make, self.published = name, rule, n, make, published or "-"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        cv2.setNumThreads(0)                      # in a worker, OpenCV's threads only fight each other
        return self.make(i)


def make_marked(synth: Synth, i: int):
    image, mask, meta = synth.make_sample(synth.seed, i)                          # (3, H, W), (1, H, W)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), mask[0], meta | {"name": str(i), "notes": []}


def marked_set(synth: Synth, n: int) -> Pictures:
    """The first n samples of a Synth."""
    published = PUBLISHED[synth.recipe] + " *" if synth.recipe in PUBLISHED else ""
    return Pictures(synth.recipe, RULES[synth.recipe], n, partial(make_marked, synth), published)


def make_clean(synth: Synth, i: int):
    if synth.photos:
        name, image = synth.photos[i], read_photo(synth.photos[i])
    else:
        name, image = f"generated {i}", generate_background(np.random.default_rng([synth.seed, i]))
    if image is None:
        return None, None, {"name": name, "notes": ["skipped, not a readable picture"]}
    return image, np.zeros(image.shape[:2], np.uint8), {"name": name, "notes": []}


def synthetic_sets(images: Path | None, logos: Path, recipe: str | None, n: int, seed: int) -> list[Pictures]:
    sets = []
    for name in [recipe] if recipe else RECIPES:
        synth = Synth(images, logos, name, held_out=True, seed=seed)
        refuse_pairs(synth.photos)
        sets.append(marked_set(synth, n))
    if recipe in (None, "default", OWN):          # all held-out photos, not only the samples left clean
        sets.append(Pictures("clean photos", "-", len(synth.photos) or n, partial(make_clean, synth)))
    return sets


# data set, folder of images, folder of masks, what else tells it, value (of 255) above which a mask file
# marks; the first that fits: CLWD has Alpha/ too, and LVW nothing of its own
LAYOUTS = (("CLWD", "Watermarked_image", "Mask", "Mask", 25.5),
           ("PRWD", "Watermarked_image", "alpha", "alpha", 1),
           ("ILAW", "watermarked", "alpha", "alpha", 1),
           ("LOGO", "image", "mask", "wm", 127),
           ("Alpha1", "image", "mask", "image/*.jpg", 127),
           ("LVW", "image", "mask", "mask", 25.5),
           ("ours", "images", "masks", "masks", 127))


def find_layout(folder: Path) -> tuple | None:
    for layout in LAYOUTS:
        _, images, masks, tell, _ = layout
        if (folder / images).is_dir() and (folder / masks).is_dir() and any(folder.glob(tell)):
            return layout
    return None


def refuse_pairs(photos: list[str]) -> None:
    """ValueError where photos, thought clean, are those of a labelled set."""
    for folder in sorted({Path(os.path.abspath(photo)).parent for photo in photos}):
        if (layout := find_layout(folder.parent)) and folder.name in layout[1:3]:
            raise ValueError(f"--images takes clean photos, and {folder} is part of a labelled set: "
                             f"train.py --pairs {folder.parent} or eval.py {folder.parent} takes it")


def folder_sets(folder: Path, most: int | None = None) -> list[Pictures]:
    """A data set on disk, at full size and in the papers' convention. ValueError where no layout fits.

    most: as many pictures, spread evenly over all.
    """
    layout = find_layout(folder)
    if layout is None:
        known = ", ".join(f"{name}: {images}/ {masks}/" for name, images, masks, *_ in LAYOUTS)
        raise ValueError(f"{folder} has no layout that is known here ({known}); "
                         "name the folder of a split, like test/")
    name, images, masks, _, above = layout
    pairs = {}                                    # stem -> its images, its masks, how it was made
    for k, part in enumerate((images, masks)):
        for path in sorted((folder / part).iterdir()):
            if path.suffix.lower() in PHOTO_TYPES:
                pairs.setdefault(path.stem, ([], [], {}))[k].append(path)
    if not pairs:
        raise ValueError(f"no picture in {folder / images} (looked for {' '.join(PHOTO_TYPES)})")
    for meta in read_meta(folder / "meta.jsonl"):                                 # of an export of synth.py
        pairs.setdefault(meta["name"], ([], [], {}))[2].update(meta)
    pairs = sorted(pairs.items())
    if most and most < len(pairs):
        pairs = [pairs[k * len(pairs) // most] for k in range(most)]
    rule, n = f"mask file > {above:g} of 255", len(pairs)
    print(f"{folder} is read as {name}: {images}/ with {masks}/, {n} names, {rule}", file=sys.stderr)
    return [Pictures("full size", rule, n, partial(make_pair, layout, pairs, None)),
            Pictures(f"{PAPER_SIZE} x {PAPER_SIZE}", rule, n, partial(make_pair, layout, pairs, PAPER_SIZE))]


def make_pair(layout: tuple, pairs: list[tuple], square: int | None, i: int):
    name, (images, masks, meta) = pairs[i]
    above, notes = layout[-1], []
    meta = meta | {"name": name, "notes": notes}
    try:
        if len(images) != 1 or len(masks) != 1:
            raise ValueError(f"{len(images)} images and {len(masks)} masks of one name")
        image = load_image(images[0])                                             # (H, W, 3)
        with readable(masks[0]):
            mask = np.asarray(open_image(masks[0])[0].convert("RGB")).max(2)      # (H, W)
        if mask.shape != image.shape[:2]:
            sizes = "sizes differ: image {1}x{0}, mask {4}x{3}".format(*image.shape, *mask.shape)
            if layout[0] != "LOGO":               # whose own loaders resize
                raise ValueError(sizes)
            notes.append(f"mask resized by nearest, {sizes}")
            mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    except (OSError, ValueError, MemoryError) as e:
        known = isinstance(e, ValueError)
        notes.append(f"skipped, {'' if known else 'not a readable picture: '}{first_line(e)}")
        return None, None, meta
    if above > 1 and not np.isin(mask, (0, 255)).all():
        notes.append(f"mask is not binary, taken as > {above:g}")
    truth = (mask > above).astype(np.uint8)
    if not truth.any():
        notes.append("mask is empty, scored as a clean picture")
    if square:
        image = cv2.resize(image, (square, square), interpolation=cv2.INTER_LINEAR)
        truth = cv2.resize(truth, (square, square), interpolation=cv2.INTER_NEAREST)
    return image, truth, meta


# ---------------------------------------------------------------- scoring

def score(net: nn.Module, pictures: Pictures, radius: int = 0, rank: int = 0, world: int = 1,
          keep: int | None = None, stop: list = ()) -> list[dict]:
    """A row for every picture, in order: meta, and unless it was skipped the counts of its mask dilated by
    radius, and under `curve` and `dilated` those at THRESHOLDS and DILATIONS.

    keep: for train.py, in place of `curve` and `dilated` the first `keep` rows have image, truth and
    probabilities under `maps`. stop: once it holds something, no further picture is scored.
    Pictures are made in workers beside the network. Rank r scores every world-th; all ranks return all rows.
    """
    share = range(rank, len(pictures), world)
    workers = min(max((os.cpu_count() or 1) // world - 1, 0), len(share) // 8)
    loader = DataLoader(Subset(pictures, share), batch_size=None, num_workers=workers, collate_fn=tuple,
                        worker_init_fn=start_worker)
    was, rows = net.training, []
    net.eval()
    with closing(iterate(loader)) as made:
        bar = tqdm(made, desc=pictures.name, total=len(share), unit="picture", leave=False, disable=None)
        for i, (image, truth, meta) in zip(share, bar):
            if stop:
                break
            rows.append({"index": i, "meta": meta})
            if image is None:
                continue
            prob = predict_prob(net, image)                                       # (H, W) float32
            plain = to_mask(prob, net.threshold, 0)
            rows[-1] |= count(dilate(plain, radius), truth)
            if keep is None:
                radii = (*DILATIONS, default_dilation(*truth.shape))
                rows[-1]["curve"] = [count(to_mask(prob, t, 0), truth) for t in THRESHOLDS]
                rows[-1]["dilated"] = [count(dilate(plain, d), truth) for d in radii]
            elif i < keep:
                rows[-1]["maps"] = image, truth, prob
    net.train(was)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = sorted(sum(parts, []), key=lambda row: row["index"])
    return rows


def iterate(loader: DataLoader) -> Iterator:
    """What the loader yields. When closed, or at an error, it ends the workers: else they live as long as the
    error's traceback, and Python waits for them for ever."""
    others, batches = active_children(), None
    try:
        with stops_blocked():
            batches = iter(loader)
        yield from batches
    except (OSError, ValueError, RuntimeError) as e:
        text = str(e).strip()
        if "DataLoader worker process" not in text:    # a worker's own error comes with its traceback
            raise
        raise OSError(text.splitlines()[-1].split(": ", 1)[-1]) from e
    finally:
        if batches and loader.num_workers:
            batches._shutdown_workers()           # torch has no public name for it
        for left in set(active_children()) - set(others):
            left.kill()                           # stuck in a sample, or of a start that failed half-way


@contextmanager
def stops_blocked() -> Iterator[None]:
    """Processes that start here are deaf to STOP_SIGNALS before start_worker runs; this one hears them later."""
    if not hasattr(signal, "pthread_sigmask"):    # Windows
        yield
        return
    if get_start_method() != "fork":              # others need it, and its own start would unblock Ctrl-C
        ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------- tables

def print_table(title: str, table: dict, columns: str) -> None:
    """Markdown, aligned. table: name of a line -> its values; columns: their keys, separated by blanks."""
    def cell(values: dict, key: str) -> str:
        value = values[key]
        if isinstance(value, (str, int)):
            return str(value)
        if value != value:                        # NaN
            return "-"
        numbers = [value, *(values[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in values)]
        percent = key.endswith(("rate", "covered")) or key.startswith("excess")
        value, *ends = (f"{100 * v:.1f}" if percent else f"{v:.3f}" for v in numbers)
        return value + " %" * percent + (f" [{', '.join(ends)}]" if ends else "")

    keys = columns.split()
    lines = [[title, *(key.replace("_", " ").replace("iou", "IoU").replace("f1", "F1") for key in keys)]]
    lines += [[printable(str(name)), *(cell(values, key) for key in keys)] for name, values in table.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print()                                       # Markdown wants blank lines around a table
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
    print()


def print_report(report: dict) -> None:
    first = next(iter(report["sets"]))
    print_table("test set", report["sets"], "n_marked iou f1 dataset_iou dataset_f1 precision recall "
                "false_alarm_rate n_clean mask_rule published")
    print(DEFINITIONS)
    print(f"\nOf {first}: by what matters. Opacity, kind and blend are of pictures with exactly one mark;\n"
          "size is the truth in % of the picture, jpeg its last quality.")
    print_table("pictures", report["breakdown"], "n_marked iou recall precision")
    print(f"Of {first}, marked pictures only: dilation in pixels "
          "(default: predict.py's, which grows with the picture).\n"
          "Fully covered: share of the pictures without a missed pixel. Excess: what is marked outside the\n"
          "truth, as a share of the picture, and of the mark.")
    print_table("dilate", report["dilation"],
                "recall recall_per_picture fully_covered excess_per_picture excess_per_mark")
    print(f"Of {first}: the plain mask at other thresholds. "
          "To choose one is --tune's work, on validation samples.")
    print_table("threshold", report["curve"], CURVE)


def list_pictures(sets: list[Pictures], results: list[list[dict]]) -> Iterator[dict]:
    """What --json tells of every picture of every set; a skipped one has no scores, and its notes say why."""
    for pictures, rows in zip(sets, results):
        for row in rows:
            counts = {key: row[key] for key in ("tp", "fp", "fn", "pixels") if key in row}
            scores = counts | ratios(row) | traits(row) if counts else {}
            yield {"set": pictures.name, "name": row["meta"]["name"], **scores, "notes": row["meta"]["notes"]}


# ---------------------------------------------------------------- drawings

def draw_worst(net: nn.Module, pictures: Pictures, rows: list[dict], n: int, radius: int) -> Image.Image:
    """The n lowest IoU (a false alarm is 0, a clean picture left clean 1), of equals the most wrong pixels.

    Two columns of image, truth, prediction under a line that says so; wrongly marked pixels are red.
    """
    def quality(row: dict) -> tuple:
        return (ratios(row)["iou"] if is_marked(row) else float(not is_false_alarm(row)),
                -row["fp"] - row["fn"])

    worst, cell = sorted(rows, key=quality)[:n], 256              # pixels
    sheet = Image.new("RGB", (6 * cell, 20 + -(-len(worst) // 2) * (cell + 16)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((0, 2), f"{pictures.name}, the {len(worst)} worst of {len(rows)}: image, truth, prediction "
              "(white: right, red: wrongly marked)", "black", font)
    for k, row in enumerate(worst):
        x, y = k % 2 * 3 * cell, 20 + k // 2 * (cell + 16)
        image, truth, meta = pictures[row["index"]]
        mask = to_mask(predict_prob(net, image), net.threshold, radius)
        prediction = np.repeat(mask[..., None], 3, axis=2)                        # (H, W, 3)
        prediction[(mask > 0) & (truth == 0)] = 230, 60, 40
        for j, picture in enumerate((image, np.repeat(truth[..., None] * 255, 3, axis=2), prediction)):
            thumb = Image.fromarray(picture)
            thumb.thumbnail((cell - 4, cell - 4))
            sheet.paste(thumb, (x + j * cell, y + 16))
        scores = f"clean, {row['fp']} pixels marked"
        if is_marked(row):
            scores = "IoU {iou:.2f}, F1 {f1:.2f}".format(**ratios(row))
        marks = [f"{m['kind']} {m['opacity']:.2f} {m['blend']}" for m in meta.get("marks", [])]
        draw.text((x, y), "   ".join([f"{meta['name']}: {scores}", *marks])[:120], "black", font)
    return sheet


def draw_breakdown(table: dict[str, dict], title: str) -> Image.Image:
    """The IoU of every bin as a bar, with its 95 % interval as a line."""
    left, scale, step = 140, 480, 20                              # pixels
    picture = Image.new("RGB", (left + scale + 120, step * (len(table) + 2)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for tick in range(0, 11, 2):
        x = left + scale * tick // 10
        draw.line((x, 2 * step, x, picture.height), (220, 220, 220))
        draw.text((x, 1.5 * step), f"IoU {tick / 10}", "black", font, anchor="mm")
    draw.text((picture.width // 2, step / 2), f"{title}: mean IoU by what matters, 95 % interval",
              "black", font, anchor="mm")
    previous = ""
    for k, (name, values) in enumerate(table.items(), 2):
        y, axis = k * step + step // 2, name.split("/")[0]
        if axis != previous:
            draw.line((0, k * step, picture.width, k * step), (170, 170, 170))
        previous = axis
        end, low, high = (left + scale * values[key] for key in ("iou", "iou_low", "iou_high"))
        draw.rectangle((left, y - 6, end, y + 6), (90, 135, 195))
        draw.line((low, y, high, y), (20, 30, 50), 2)
        draw.text((left - 8, y), name, "black", font, anchor="rm")
        draw.text((left + scale + 10, y), f"{values['iou']:.3f}  (n {values['n_marked']})",
                  "black", font, anchor="lm")
    return picture


# ---------------------------------------------------------------- command line

IDLE = {"compare": "weights tune worst plot",                 # a flag, and what would do nothing beside it
        "tune": "folder threshold dilate seed json worst plot", "folder": "images logos recipe n seed"}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # on what
    add("folder", nargs="?", type=Path, help="a data set's split on disk (default: held-out samples)")
    add("--images", type=Path, help="photos; the held-out share (default: generated backgrounds)")
    add("--logos", type=Path, default=Path(__file__).parent / "logos",
        help="logos and fonts; the held-out share (default: %(default)s)")
    add("--recipe", choices=(*RECIPES, OWN), help="only this one; own: the default with the logos of --logos "
        "and nothing else (default: all the others)")
    add("--n", type=int, default=200, help="samples of each recipe; fewer are faster (default: %(default)s)")
    add("--seed", type=int, default=TEST_SEED,
        help=f"other samples; {VALIDATION_SEED} is validation, no test (default: %(default)s)")
    # which masks
    add("--weights", type=find_weights, default=WEIGHTS,
        help="a checkpoint, a run's folder or a release (default: %(default)s)")
    add("--compare", nargs=2, type=find_weights, metavar=("A", "B"), help="two weights on the same pictures")
    add("--threshold", type=float, help="probability that marks a pixel (default: the weights' own)")
    add("--dilate", type=int, default=0, help="radius in pixels, before scoring (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    # what else is done
    add("--tune", action="store_true",
        help="store in --weights the threshold of the best IoU on validation samples")
    add("--json", type=Path, metavar="FILE",
        help="what the tables say, and every picture's scores; of a skipped one, why")
    add("--worst", type=int, metavar="N", help=f"draw the N worst of the first line to {WORST}")
    add("--plot", type=Path, metavar="FILE", help="draw the breakdown (.png)")
    args = parser.parse_args(argv)
    if (args.n < 1 or args.worst is not None and args.worst < 1 or args.dilate < 0 or args.seed < 0
            or args.threshold is not None and not 0 < args.threshold < 1):
        raise ValueError("--n and --worst must be at least 1, --dilate and --seed at least 0, "
                         "--threshold between 0 and 1")
    given = {key for key, value in vars(args).items() if value != parser.get_default(key)}
    for flag in given & set(IDLE):
        if idle := " ".join(f"--{key}" for key in IDLE[flag].split() if key in given):
            sentence = f"beside --{flag}, {idle} would do nothing: leave one out"
            raise ValueError(sentence.replace("--folder", "a folder"))
    if args.plot and args.plot.suffix.lower() not in PHOTO_TYPES:
        raise ValueError(f"--plot {args.plot} is no picture's name: call it breakdown.png")
    return args


def check_outputs(args: argparse.Namespace, outputs: list[Path]) -> None:
    """OSError or ValueError where one cannot be written, or is an input: now, not minutes later."""
    weights = [path.resolve() for path in args.compare or [args.weights]]
    inputs = [folder.resolve() for folder in (args.folder, args.images, args.logos) if folder]
    if len(set(outputs)) < len(outputs):
        raise ValueError("one file is named for two outputs")
    for path in outputs:
        new, place = not path.exists(), path.resolve()
        read = path.suffix.lower() != ".json"     # which is nothing that is read
        if place in weights or not new and read and any(folder in place.parents for folder in inputs):
            raise ValueError(f"{path} is an input and is not overwritten: choose another name or folder")
        path.open("ab").close()                   # its OSError says what is wrong
        if new:
            path.unlink()
    if args.tune and not os.access(args.weights.parent, os.W_OK):
        raise ValueError(f"--tune stores the threshold in {args.weights}, and its folder is read-only")


def report_notes(rows: list[dict]) -> dict[str, list[str]]:
    """Says on stderr which files were skipped or are odd. -> what -> names."""
    notes = {}
    for meta in (row["meta"] for row in rows):
        for note in meta["notes"]:
            notes.setdefault(note.split(":")[0], []).append(meta["name"])
    for note, names in notes.items():
        print(printable(f"{note}: {len(names)} ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"),
              file=sys.stderr)
    if skipped := sum("tp" not in row for row in rows):
        print(f"{skipped} of {len(rows)} pictures were skipped and have no score", file=sys.stderr)
    return notes


def run(args: argparse.Namespace, rank: int, world: int) -> int:
    device, why = pick_device(args.device)
    nets = [load_model(path, device) for path in args.compare or [args.weights]]
    for net in nets:
        net.threshold = args.threshold or net.threshold
    outputs = list(filter(None, (args.json, args.plot, args.worst and WORST)))
    if rank == 0:
        check_outputs(args, outputs)
    if args.folder:
        sets = folder_sets(args.folder)
    elif args.tune:
        sets = synthetic_sets(args.images, args.logos, args.recipe or "default", args.n, VALIDATION_SEED)[:1]
    else:
        sets = synthetic_sets(args.images, args.logos, args.recipe, args.n, args.seed)
    print(f"{device}: {why}", file=sys.stderr)
    if not args.images and not args.folder:
        print(f"no --images: generated backgrounds with the held-out part of {args.logos}; "
              "photos are the test", file=sys.stderr)
    results = [[score(net, pictures, args.dilate, rank, world) for pictures in sets] for net in nets]
    if rank:
        return 0

    # both sets of a folder are of the same files
    all_rows = results[0][0] if args.folder else sum(results[0], [])
    notes, skipped = report_notes(all_rows), any("tp" not in row for row in all_rows)
    scored = [[[row for row in rows if "tp" in row] for rows in part] for part in results]
    rows = scored[0][0]
    if not rows:
        raise ValueError("not one picture could be scored")
    if args.tune:
        curve = summarise_curve(rows)
        best = best_threshold(curve)
        print_table("threshold", curve, CURVE)
        save_checkpoint(load_checkpoint(args.weights) | {"threshold": best}, args.weights)
        print(f"threshold {best} is stored in {args.weights}, in place of {nets[0].threshold}")
        return int(skipped)
    report = {"flags": vars(args), "thresholds": [net.threshold for net in nets], "notes": notes}
    if args.compare:
        report["comparison"] = {s.name: compare(a, b) for s, a, b in zip(sets, *scored)}
        print_table("test set", report["comparison"],
                    "n_marked iou_A iou_B B_minus_A better A_false_alarm_rate B_false_alarm_rate")
        print("Mean IoU on the same pictures, [95 % paired bootstrap interval]; "
              "better: whose side of 0 it lies on.")
    else:
        report |= {"sets": {s.name: summarise(part) | {"n_skipped": len(s) - len(part), "mask_rule": s.rule,
                                                       "published": s.published}
                            for s, part in zip(sets, scored[0])},
                   "breakdown": breakdown(rows), "dilation": summarise_dilation(rows),
                   "curve": summarise_curve(rows), "pictures": list(list_pictures(sets, results[0]))}
        print_report(report)
    if args.json:                                 # NaN is no JSON
        plain = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
        args.json.write_text(json.dumps(plain, indent=1))
    if args.plot:
        draw_breakdown(report["breakdown"], sets[0].name).save(args.plot)
    if args.worst:
        draw_worst(nets[0], sets[0], rows, args.worst, args.dilate).save(WORST)
    for path in outputs:
        print(path, file=sys.stderr)
    return int(skipped)


@one_way_out
def main(argv=None) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args = parse(argv)
    if world > 1:
        dist.init_process_group("gloo")           # rows are plain Python and travel over the CPU
    # rank 0 speaks for all, synth.py's notices too; an error may be one rank's own and is always told
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet if rank else sys.stderr):
        code = run(args, rank, world)
    if world > 1:
        dist.barrier()                            # gloo can hang where one rank leaves while another works
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
