"""Score a model: IoU, F1, precision, recall and false alarms, each with its definition.

    python eval.py --n 20                                      # a first look: 20 samples of each recipe
    python eval.py --images photos/ --logos logos/ --worst 24  # the held-out share of your files; worst.png
    python eval.py data/CLWD/test                              # a published test set, or one by synth.py
    python eval.py agency/ --same-mark                         # one mask for all images of one size
    python eval.py --compare runs/a runs/b --images photos/    # is B better, or only luckier? changed.png
    python eval.py --weights runs/a --images photos/ --tune    # find the best threshold, keep it in the file

Read top to bottom: metrics, test sets, scoring, tables, drawing, command line. Images pass the network one by
one, and sample i is a pure function of (seed, i): no batch and no thread can change a number.
"""
import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from model import (SHARED, WEIGHTS, default_dilation, dilate, find_weights, first_line, fit, load_checkpoint,
                   load_image, load_model, one_way_out, open_image, pick_device, predict_prob, predict_probs,
                   printable, replacing, resize_prob, save_checkpoint, to_mask)
from synth import OWN, PHOTO_TYPES, RECIPES, Synth, generate_background, read_meta, read_photo

FOUND = 0.5                # a mark counts as found from this IoU on
CLEAN_SHARE = 0.001        # a clean image with more than this share of its pixels marked is a false alarm
BOOTSTRAP = 1000           # resamples behind a 95 % interval
VALIDATION_SEED = 1        # train.py chooses best.pt on these samples, --tune the threshold
TEST_SEED = 2              # tables are made of these: the same held-out files, other samples
THRESHOLDS = [k / 20 for k in range(1, 20)]
TOLERANCE = 0.002          # of IoU, in the choice of a threshold
MOST_ALARMS = 0.03         # share of the clean images with something marked, likewise
DILATIONS = (0, 1, 3, 5, 10)           # MorphoMod's radii in pixels; predict.py's own beside them
PAPER_SIZE = 256           # pixels; SLBR, DENet, ... squash to this square: image bilinear, mask nearest
CHANGED = 12               # images that --compare draws
SAMPLES = 200              # of each recipe
READ_AHEAD = 4             # images that are made while the network is at work
BINS = {"opacity": (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1), "size": (0, 0.5, 1, 2, 5, 10, 20, 100)}
PERCENT = {"found", "false_alarm_rate", "fully_covered", "excess_per_image", "excess_per_mark",
           "false_alarm_rate_of_A", "of_B"}                            # columns; the others have three digits
DEFINITIONS = f"""\
IoU, F1: mean over the images that have a mark; a miss is 0. [95 % bootstrap interval over images]
Found: IoU of at least {FOUND}. All marks of an image count as one.
Dataset IoU, precision, recall: from the pixels of all images of the line together.
False alarm rate: share of the clean images with more than {CLEAN_SHARE:.1%} of their pixels marked. Clean
images are in no mean of IoU or F1 (SLBR counts them 0, smp and Pytorch-UNet 1).
Mask rule: where the truth is 1. Scores under different rules do not compare. Published: on another test set."""


# ---------------------------------------------------------------- metrics

def count(mask: np.ndarray, truth: np.ndarray) -> list[int]:
    """Pixels of one image: tp, fp, fn, all. mask, truth: the same shape, any dtype, non-zero where marked."""
    mask, truth = mask > 0, truth > 0
    tp = int(np.count_nonzero(mask & truth))
    return [tp, int(np.count_nonzero(mask)) - tp, int(np.count_nonzero(truth)) - tp, truth.size]


def is_marked(counts: np.ndarray) -> np.ndarray:
    return counts[..., 0] + counts[..., 2] > 0


def ratios(counts: np.ndarray) -> dict[str, np.ndarray]:
    """counts (..., 4) of images, or a sum -> each metric (...). NaN where the truth or a divisor is empty."""
    tp, fp, fn, pixels = np.moveaxis(np.where(is_marked(counts)[..., None], counts, np.nan), -1, 0)
    with np.errstate(invalid="ignore"):
        return {"iou": tp / (tp + fp + fn), "f1": 2 * tp / (2 * tp + fp + fn), "precision": tp / (tp + fp),
                "recall": tp / (tp + fn), "excess_per_image": fp / pixels, "excess_per_mark": fp / (tp + fn)}


def quality(counts: np.ndarray) -> np.ndarray:
    """IoU of a marked image; of a clean one 0 for a false alarm, else 1."""
    silent = counts[..., 1] <= CLEAN_SHARE * counts[..., 3]
    return np.where(is_marked(counts), ratios(counts)["iou"], silent)


def mean(values: np.ndarray) -> tuple[float, float, float]:
    """-> mean and its 95 % percentile bootstrap interval, NaN of nothing. The resamples are always the same."""
    if not len(values):
        return 3 * (float("nan"),)
    chosen = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP, len(values)))
    return float(np.mean(values)), *np.percentile(values[chosen].mean(1), (2.5, 97.5)).tolist()


def summarise(counts: np.ndarray) -> dict[str, float]:
    """(n, 4) counts of n images -> the metrics, as DEFINITIONS has them. NaN where there is nothing to divide.

    fully_covered: share of the marked images without a missed pixel. excess: what is marked outside the truth,
    as a share of the image (mean) and of the truth (dataset). Each mean has its _low and _high.
    """
    counts = np.reshape(counts, (-1, 4))
    marked, clean = counts[is_marked(counts)], counts[~is_marked(counts)]
    each, dataset = ratios(marked), ratios(counts.sum(0))
    means = {"iou": each["iou"], "f1": each["f1"], "found": each["iou"] >= FOUND,
             "recall_per_image": each["recall"], "fully_covered": marked[:, 2] == 0,
             "excess_per_image": each["excess_per_image"], "false_alarm_rate": quality(clean) == 0}
    summary = {"n_marked": len(marked), "n_clean": len(clean)}
    for name, values in means.items():
        summary[name], summary[f"{name}_low"], summary[f"{name}_high"] = mean(values)
    return summary | {"dataset_iou": float(dataset["iou"]), "dataset_f1": float(dataset["f1"]),
                      **{name: float(dataset[name]) for name in ("precision", "recall", "excess_per_mark")}}


def best_threshold(curve: dict[float, dict], clean: dict[float, dict]) -> float:
    """Among the thresholds with nearly the best IoU, the one with the fewest false alarms.

    Only those count that raise at most MOST_ALARMS on clean images; where none does, all of them.
    Of equal ones the lowest, since it has the highest recall. ValueError where no image has a mark.
    """
    if not curve[0.5]["n_marked"]:
        raise ValueError("no sample has a mark, so no threshold is better than another: raise --n")
    alarms = {t: np.nan_to_num(scores["false_alarm_rate"]) for t, scores in clean.items()}     # NaN: no image
    if not (quiet := [t for t in curve if alarms[t] <= MOST_ALARMS]):
        print(f"no threshold leaves {1 - MOST_ALARMS:.0%} of the clean images unmarked, so IoU alone decides",
              file=sys.stderr)
    choice = quiet or list(curve)
    best = max(curve[t]["iou"] for t in choice)
    return min((t for t in choice if curve[t]["iou"] >= best - TOLERANCE), key=lambda t: (alarms[t], t))


def traits(row: dict) -> dict:
    """What an image is sorted by: size of the truth in % of the image; opacity and kind if it has one mark."""
    marks, (tp, _, fn, pixels) = row["meta"].get("marks", []), row["counts"][0].tolist()
    one = marks[0] if len(marks) == 1 else {}
    return {"opacity": one.get("opacity"), "size": 100 * (tp + fn) / pixels, "kind": one.get("kind")}


def breakdown(rows: list[dict]) -> dict[str, dict]:
    """"opacity/0.2-0.3", ... -> metrics of the marked images there, empty bins left out."""
    marked, bins = [(traits(row), row["counts"][0]) for row in rows if is_marked(row["counts"][0])], {}
    for axis, edges in BINS.items():
        for low, high in zip(edges, edges[1:]):
            bins[f"{axis}/{low:g}-{high:g}"] = [c for t, c in marked if low < (t[axis] or -1) <= high]
    for kind in sorted({t["kind"] for t, _ in marked} - {None}):
        bins[f"kind/{kind}"] = [c for t, c in marked if t["kind"] == kind]
    return {name: summarise(counts) for name, counts in bins.items() if counts}


def compare(a: np.ndarray, b: np.ndarray) -> dict:
    """(n, 4) counts of two models on the same images. Paired, so that how hard an image is cancels out."""
    ious = [ratios(counts)["iou"][is_marked(a)] for counts in (a, b)]
    difference, low, high = mean(ious[1] - ious[0])
    alarms = [summarise(counts)["false_alarm_rate"] for counts in (a, b)]
    return {"n_marked": len(ious[0]), "iou_of_A": mean(ious[0])[0], "iou_of_B": mean(ious[1])[0],
            "B_minus_A": difference, "B_minus_A_low": low, "B_minus_A_high": high,
            "better": "B" if low > 0 else "A" if high < 0 else "not shown" if len(ious[0]) else "-",
            "false_alarm_rate_of_A": alarms[0], "of_B": alarms[1]}


# ---------------------------------------------------------------- test sets

@dataclass
class Pictures(Dataset):
    """A test set. make(i) -> image (H, W, 3) uint8 RGB, truth (H, W) uint8 {0, 1}, meta with `name`, `notes`.

    Image and truth are None where an image is skipped. make is a partial of a function below: picklable.
    """
    name: str
    rule: str                                     # where the truth is 1
    n: int
    make: Callable
    published: str = "-"                          # IoU and F1

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        return self.make(i)


def make_marked(synth: Synth, i: int):
    image, mask, meta = synth.make_sample(synth.seed, i)                          # (3, H, W), (1, H, W)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), mask[0], meta | {"name": str(i), "notes": []}


def make_clean(synth: Synth, i: int):
    if synth.photos:
        name, image = synth.photos[i], read_photo(synth.photos[i])
    else:
        name, image = f"generated {i}", generate_background(np.random.default_rng([synth.seed, i]))
    if image is None:
        return None, None, {"name": name, "notes": ["skipped, not a readable picture"]}
    return image, np.zeros(image.shape[:2], np.uint8), {"name": name, "notes": []}


def marked_set(synth: Synth, n: int) -> Pictures:
    """The first n samples of a Synth."""
    rule, published = RECIPES["default" if synth.recipe == OWN else synth.recipe]
    return Pictures(synth.recipe, rule, n, partial(make_marked, synth), published)


def synthetic_sets(images: Path | None, logos: Path, recipe: str | None, n: int, seed: int) -> list[Pictures]:
    names = [recipe] if recipe else RECIPES
    first, *others = (Synth(images, logos, name, held_out=True, seed=seed) for name in names)
    refuse_pairs(first.photos)
    sets = [marked_set(synth, n) for synth in (first, *others)]
    if recipe in (None, "default", OWN):          # all held-out photos, not only the samples left clean
        sets.append(Pictures("clean photos", "-", len(first.photos) or n, partial(make_clean, first)))
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

    most: as many images, spread evenly over all.
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


def read_mask(path: Path, above: float) -> np.ndarray:
    """A mask file as people have them -> (H, W) uint8 {0, 1}, 1 where marked. Errors: see model.open_image.

    Marked is what is brighter than `above` of 255 in its strongest channel. A mask that is nowhere so bright
    holds class numbers: all that is not 0 is marked, but not in a JPEG, whose black is not exact. Where a file
    is transparent somewhere, its alpha is the mask, as editors export it.
    """
    pixels = np.asarray(open_image(path)[0].convert("RGBA"))                      # (H, W, 4)
    mask = pixels[..., 3] if pixels[..., 3].min() < 255 else pixels[..., :3].max(2)
    has_classes = mask.max() <= above and path.suffix.lower() not in (".jpg", ".jpeg")
    return (mask > (0 if has_classes else above)).astype(np.uint8)


def make_pair(layout: tuple, pairs: list[tuple], square: int | None, i: int):
    name, (images, masks, meta) = pairs[i]
    above, notes = layout[-1], []
    meta = meta | {"name": name, "notes": notes}
    try:
        if len(images) != 1 or len(masks) != 1:
            raise ValueError(f"{len(images)} images and {len(masks)} masks of one name")
        image = load_image(images[0])                                             # (H, W, 3)
        truth = read_mask(masks[0], above)                                        # (H, W)
        if truth.shape != image.shape[:2]:
            sizes = "sizes differ: image {1}x{0}, mask {4}x{3}".format(*image.shape, *truth.shape)
            if layout[0] != "LOGO":               # whose own loaders resize
                raise ValueError(sizes)
            notes.append(f"mask resized by nearest, {sizes}")
            truth = cv2.resize(truth, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    except (OSError, ValueError, MemoryError) as e:
        known = isinstance(e, ValueError)
        notes.append(f"skipped, {'' if known else 'not a readable picture: '}{first_line(e)}")
        return None, None, meta
    if not truth.any() and meta.get("marks") != []:        # which an export of synth.py tells
        notes.append("mask marks nothing, taken for a clean picture")
    if square:
        image = cv2.resize(image, (square, square), interpolation=cv2.INTER_LINEAR)
        truth = cv2.resize(truth, (square, square), interpolation=cv2.INTER_NEAREST)
    return image, truth, meta


# ---------------------------------------------------------------- scoring

def score(net: nn.Module, pictures: Pictures, radius: int = 0, shared: dict | None = None,
          keep: int | None = None, stop: list = ()) -> list[dict]:
    """A row for every image, in order: index, meta and counts, which are None where the image was skipped.

    counts (n, 4): of the mask dilated by radius, then at each of THRESHOLDS, then at each of DILATIONS and at
    predict.py's own. shared: see share_probs. keep: for train.py; counts have the first line alone, and the
    first `keep` rows image, truth and probabilities under `maps`. stop: once it holds something, no further
    image is scored.
    """
    was, rows, sure = net.training, [], 0 if shared else None
    net.eval()
    for i, (image, truth, meta) in enumerate(ahead(pictures)):
        if stop:
            break
        rows.append({"index": i, "meta": meta, "counts": None})
        if image is None:
            continue
        prob = prob_of(net, image, shared)                                        # (H, W) float32
        plain = to_mask(prob, net.threshold, 0, sure=sure)
        masks = [dilate(plain, radius)]
        if keep is None:
            masks += [to_mask(prob, threshold, 0, sure=sure) for threshold in THRESHOLDS]
            masks += [dilate(plain, r) for r in (*DILATIONS, default_dilation(*truth.shape))]
        elif i < keep:
            rows[-1]["maps"] = image, truth, prob
        rows[-1]["counts"] = np.array([count(mask, truth) for mask in masks])
    net.train(was)
    return rows


def prob_of(net: nn.Module, image: np.ndarray, shared: dict | None) -> np.ndarray:
    return resize_prob(shared[image.shape], *image.shape[:2]) if shared else predict_prob(net, image)


def share_probs(net: nn.Module, pictures: Pictures) -> dict[tuple, np.ndarray]:
    """--same-mark: shape -> the map of all images of this shape, at the network's own resolution.

    It is the root mean square of their maps, as in predict.py.
    """
    squares = {}
    for image, _, _ in ahead(pictures):
        if image is not None:
            prob, = predict_probs(net, [fit(image, net.size)])
            total, n = squares.get(image.shape, (0, 0))
            squares[image.shape] = total + prob ** 2, n + 1
    sizes = [f"{n} of {shape[1]}x{shape[0]}" for shape, (_, n) in squares.items()]
    print(f"images that share a mask: {', '.join(sizes[:20])}{', ...' * (len(sizes) > 20)}", file=sys.stderr)
    return {shape: np.sqrt(total / n) for shape, (total, n) in squares.items()}


def ahead(pictures: Pictures) -> Iterator[tuple]:
    """The images in order, made by a thread beside the network."""
    window, pool = deque(), ThreadPoolExecutor(1)
    try:
        for i in tqdm(range(len(pictures)), pictures.name, unit="image", leave=False, disable=None):
            while len(window) <= min(READ_AHEAD, len(pictures) - 1 - i):
                window.append(pool.submit(pictures.__getitem__, i + len(window)))
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- tables

def tables(sets: list[Pictures], counts: list[np.ndarray]) -> dict:
    """counts: of each set (n, masks, 4), masks as score() has them -> what --json and print_report tell.

    Dilation is of the first set, curves of the first and the last, which may be the clean photos.
    """
    first, radii = counts[0][is_marked(counts[0][:, 0])], (*DILATIONS, "default")
    return {"sets": {s.name: summarise(c[:, 0]) | {"n_skipped": len(s) - len(c), "mask_rule": s.rule,
                                                   "published": s.published} for s, c in zip(sets, counts)},
            "dilation": {str(d): summarise(first[:, 1 + len(THRESHOLDS) + k]) for k, d in enumerate(radii)},
            "curves": {s.name: {t: summarise(c[:, 1 + k]) for k, t in enumerate(THRESHOLDS)}
                       for s, c in ((sets[0], counts[0]), (sets[-1], counts[-1])) if len(c)}}


def print_table(title: str, table: dict, columns: str) -> None:
    """Markdown, aligned. table: name of a line -> its values; columns: their keys, separated by blanks."""
    def cell(values: dict, key: str) -> str:
        value, form = values[key], ".1%" if key in PERCENT else ".3f"
        if not isinstance(value, float):
            return str(value)
        if value != value:                        # NaN
            return "-"
        ends = [format(values[key + end], form) for end in ("_low", "_high") if key + end in values]
        return format(value, form) + (f" [{', '.join(ends)}]" if ends else "")

    keys = columns.split()
    lines = [[title, *(key.replace("_", " ").replace("iou", "IoU").replace("f1", "F1") for key in keys)]]
    lines += [[printable(str(name)), *(cell(values, key) for key in keys)] for name, values in table.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print()                                       # Markdown wants blank lines around a table
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
    print()


def print_report(report: dict, counts: np.ndarray, more: bool) -> None:
    """First what a person wants to know, then the metrics; the other tables only if asked for."""
    marked = is_marked(counts)
    if marked.any():
        print(f"It found {(quality(counts[marked]) >= FOUND).sum()} of {marked.sum()} marks.")
    if not marked.all():
        alarms = (quality(counts[~marked]) == 0).sum()
        print(f"It marked something on {alarms} of {(~marked).sum()} clean images.")
    print_table("test set", report["sets"], "n_marked found iou f1 dataset_iou precision recall "
                "false_alarm_rate n_clean mask_rule published")
    print(DEFINITIONS)
    if not more:
        return
    print_table("images", report["breakdown"], "n_marked found iou recall precision")
    print("Opacity and kind are of images with exactly one mark; size is the truth in % of the image.")
    print_table("dilate", report["dilation"],
                "recall recall_per_image fully_covered excess_per_image excess_per_mark")
    print("Marked images only. Dilation in pixels; default is predict.py's, which grows with the image. Fully\n"
          "covered: share of the images without a missed pixel. Excess: what is marked outside the truth.")
    for name, curve in report["curves"].items():
        print_table(f"{name} at threshold", curve, "iou precision recall false_alarm_rate"
                    if curve[0.5]["n_marked"] else "false_alarm_rate n_clean")
    print("The plain mask at other thresholds. To choose one is --tune's work, on validation samples.")


def print_comparison(report: dict, title: str, chosen: list[tuple]) -> None:
    print_table("test set", report["comparison"],
                "n_marked iou_of_A iou_of_B B_minus_A better false_alarm_rate_of_A of_B")
    print("Mean IoU on the same images, [95 % paired bootstrap interval]; better: whose side of 0 it lies on.")
    print_table(title, {a["meta"]["name"]: {"A": describe(a["counts"][0]), "B": describe(b["counts"][0])}
                        for a, b in chosen}, "A B")


def list_pictures(sets: list[Pictures], results: list[list[dict]]) -> Iterator[dict]:
    """What --json tells of every image of every set; a skipped one has no scores, and its notes say why."""
    for pictures, rows in zip(sets, results):
        for row in rows:
            scores = {}
            if row["counts"] is not None:
                scores = dict(zip(("tp", "fp", "fn", "pixels"), row["counts"][0].tolist())) | traits(row)
                scores |= {name: float(value) for name, value in ratios(row["counts"][0]).items()}
            yield {"set": pictures.name, "name": row["meta"]["name"], **scores, "notes": row["meta"]["notes"]}


def report_notes(rows: list[dict]) -> dict[str, list[str]]:
    """Says on stderr which files were skipped or are odd. -> what -> names."""
    notes = {}
    for meta in (row["meta"] for row in rows):
        for note in meta["notes"]:
            notes.setdefault(note.split(":")[0], []).append(meta["name"])
    for note, names in notes.items():
        print(printable(f"{note}: {len(names)} ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"),
              file=sys.stderr)
    if skipped := sum(row["counts"] is None for row in rows):
        print(f"{skipped} of {len(rows)} pictures were skipped and have no score", file=sys.stderr)
    return notes


# ---------------------------------------------------------------- drawing

def describe(counts: np.ndarray) -> str:
    return f"IoU {quality(counts):.2f}" if is_marked(counts) else f"clean, {counts[1]} pixels marked"


def draw(title: str, pictures: Pictures, chosen: list[tuple], masks: list[Callable]) -> Image.Image:
    """Two columns of image, truth and predictions; wrongly marked pixels are red.

    chosen: for each image its row under each of the models; masks: of each model, from an image to its mask.
    """
    cell, panels = 256, 2 + len(masks)            # pixels; panels of one image
    sheet = Image.new("RGB", (2 * panels * cell, 20 + -(-len(chosen) // 2) * (cell + 16)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((0, 2), f"{pictures.name}, {title}: image, truth, prediction{' of A, of B' * (panels > 3)} "
             "(white: right, red: wrongly marked)", "black", font)
    for k, rows in enumerate(chosen):
        x, y = k % 2 * panels * cell, 20 + k // 2 * (cell + 16)
        image, truth, meta = pictures[rows[0]["index"]]
        predicted = [np.repeat(mask(image)[..., None], 3, axis=2) for mask in masks]           # (H, W, 3)
        for panel in predicted:
            panel[(panel[..., 0] > 0) & (truth == 0)] = 230, 60, 40
        for j, panel in enumerate((image, np.repeat(truth[..., None] * 255, 3, axis=2), *predicted)):
            thumb = Image.fromarray(panel)
            thumb.thumbnail((cell - 4, cell - 4))
            sheet.paste(thumb, (x + j * cell, y + 16))
        scores = " -> ".join(describe(row["counts"][0]) for row in rows)
        marks = [f"{m['kind']} {m['opacity']:.2f} {m['blend']}" for m in meta.get("marks", [])]
        pen.text((x, y), "   ".join([f"{meta['name']}: {scores}", *marks])[:40 * panels], "black", font)
    return sheet


# ---------------------------------------------------------------- command line

def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # on what
    add("folder", nargs="?", type=Path, help="a labelled set on disk (default: held-out samples)")
    add("--images", type=Path, help="photos; the held-out share (default: generated backgrounds)")
    add("--logos", type=Path, default=Path(__file__).parent / "logos",
        help="logos and fonts; the held-out share (default: %(default)s)")
    add("--recipe", choices=(*RECIPES, OWN), help="only this one; own: the default with the logos of --logos "
        "and nothing else (default: all the others)")
    add("--n", type=int, help="images of each recipe, or of the folder; fewer are faster "
        f"(default: {SAMPLES}; of a folder all)")
    add("--seed", type=int, help=f"other samples (default: {TEST_SEED}; {VALIDATION_SEED} with --tune)")
    # which masks
    add("--weights", type=find_weights, default=WEIGHTS,
        help="a checkpoint, a run's folder or a release (default: %(default)s)")
    add("--same-mark", action="store_true",
        help="images of one size in the folder share a mask, as in predict.py")
    add("--threshold", type=float, help="probability that marks a pixel (default: the weights' own)")
    add("--dilate", type=int, default=0, help="radius in pixels, before scoring (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    # what is done
    one = parser.add_mutually_exclusive_group().add_argument
    one("--compare", nargs=2, type=find_weights, metavar=("A", "B"),
        help=f"two weights on the same images; draws the {CHANGED} that changed most to changed.png")
    one("--tune", action="store_true", help="store the best threshold for IoU in the weights' file")
    one("--tables", action="store_true",
        help="print more: by opacity, size and kind, over dilations and over thresholds")
    add("--worst", type=int, metavar="N", help="draw the N worst of the first line to worst.png")
    add("--json", type=Path, metavar="FILE",
        help="all tables, and the scores of every image or why it has none")
    args = parser.parse_args(argv)
    for name, low in {"n": 1, "worst": 1, "dilate": 0, "seed": 0}.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise ValueError(f"--{name} must be at least {low}")
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise ValueError("--threshold must lie between 0 and 1")
    if args.folder and (args.images or args.recipe):
        raise ValueError("a folder is scored as it is: leave out --images and --recipe")
    if args.same_mark and not args.folder:
        raise ValueError("--same-mark is for a folder of images that carry one mark: name the folder")
    return args


def check_outputs(args: argparse.Namespace, outputs: list[Path]) -> None:
    """ValueError where one cannot be written, or is an input: now, not minutes later."""
    weights = [path.resolve() for path in args.compare or [args.weights]]
    inputs = [folder.resolve() for folder in (args.folder, args.images, args.logos) if folder]
    for path in outputs:
        place, read = path.resolve(), path.suffix.lower() != ".json"      # no input is a .json
        if place in weights or path.exists() and read and any(folder in place.parents for folder in inputs):
            raise ValueError(f"{path} is an input and is not overwritten: choose another name or folder")
    for path in outputs + [args.weights] * args.tune:
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}: it is a folder, or its folder is missing or read-only")


def say_how_long(net: nn.Module, sets: list[Pictures], looks: int) -> None:
    image, times = sets[0][0][0], []
    for _ in range(3 if image is not None else 0):     # the first time, much is set up
        begin = time.perf_counter()
        predict_prob(net, image)
        times.append(time.perf_counter() - begin)
    if times:
        seconds = looks * max(times[1:])
        about = f"{seconds / 60:.0f} minutes" if seconds > 100 else f"{seconds:.0f} seconds"
        print(f"{looks} images to look at, about {about} or a little more", file=sys.stderr)


@one_way_out
def main(argv=None) -> int:
    args = parse(argv)
    sheet = Path("changed.png") if args.compare else Path("worst.png") if args.worst else None
    outputs = [path for path in (args.json, sheet) if path]
    check_outputs(args, outputs)
    device, why = pick_device(args.device)
    print(f"{device}: {why}", file=sys.stderr)
    nets = [load_model(path, device) for path in args.compare or [args.weights]]
    for net in nets:
        net.threshold = args.threshold or (SHARED if args.same_mark else net.threshold)
    seed = args.seed if args.seed is not None else VALIDATION_SEED if args.tune else TEST_SEED
    if args.folder:
        sets = folder_sets(args.folder, args.n)[:1 if args.same_mark or args.tune else 2]
    else:
        recipe = args.recipe or ("default" if args.tune else None)                 # and the clean photos
        sets = synthetic_sets(args.images, args.logos, recipe, args.n or SAMPLES, seed)
        if not args.images:
            print(f"no --images: generated backgrounds with the held-out part of {args.logos}; "
                  "photos are the test", file=sys.stderr)
    say_how_long(nets[0], sets, sum(map(len, sets)) * len(nets) * (1 + args.same_mark))
    shared = [share_probs(net, sets[0]) if args.same_mark else None for net in nets]
    all_rows = [[score(net, s, args.dilate, maps) for s in sets] for net, maps in zip(nets, shared)]
    results = [[[row for row in rows if row["counts"] is not None] for rows in part] for part in all_rows]
    once = 1 if args.folder else None             # both sets of a folder are of the same files
    notes, rows = report_notes(sum(all_rows[0][:once], [])), results[0][0]
    if not rows:
        raise ValueError("not one picture could be scored")
    report = {"flags": vars(args), "thresholds": [net.threshold for net in nets], "notes": notes}

    # of each model and each set (images, masks, 4), masks as score() has them; a set may be empty
    shape = rows[0]["counts"].shape
    counts = [[np.reshape([row["counts"] for row in part], (len(part), *shape)) for part in parts]
              for parts in results]
    masks = [lambda image, net=net, maps=maps: to_mask(prob_of(net, image, maps), net.threshold, args.dilate,
                                                       sure=0 if maps else None)
             for net, maps in zip(nets, shared)]
    if args.compare:
        report["comparison"] = {s.name: compare(a[:, 0], b[:, 0]) for s, a, b in zip(sets, *counts)}
        report["pictures"] = {name: list(list_pictures(sets, rows)) for name, rows in zip("AB", all_rows)}
        a, b = (part[0][:, 0] for part in counts)
        order = np.lexsort((abs(a[:, 1] - b[:, 1]), abs(quality(a) - quality(b))))[::-1][:args.worst or CHANGED]
        title = f"the {len(order)} of {len(rows)} that changed most"
    else:
        report |= tables(sets, counts[0]) | {"breakdown": breakdown(rows),
                                             "pictures": list(list_pictures(sets, all_rows[0]))}
        a = counts[0][0][:, 0]
        order = np.lexsort((-a[:, 1] - a[:, 2], quality(a)))[:args.worst or 0]
        title = f"the {len(order)} worst of {len(rows)}"
    chosen = [tuple(part[0][k] for part in results) for k in order]
    # the files first: a reader of the tables may leave early, as head does
    if args.json:                                 # NaN is no JSON
        plain = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
        with replacing(args.json) as file:
            file.write(json.dumps(plain, indent=1).encode())
    if sheet:
        with replacing(sheet) as file:
            draw(title, sets[0], chosen, masks).save(file, "PNG")
    print(*outputs, sep="\n", end="\n" * bool(outputs), file=sys.stderr)
    if args.compare:
        print_comparison(report, f"{sets[0].name}, {title}", chosen)
    else:
        print_report(report, np.concatenate([part[:, 0] for part in counts[0][:once]]), args.tables)
    if args.tune:
        curve = report["curves"][sets[0].name]
        best = best_threshold(curve, report["curves"][sets[-1].name])
        print_table("threshold", curve, "iou precision recall false_alarm_rate")
        save_checkpoint(load_checkpoint(args.weights) | {"threshold": best}, args.weights)
        print(f"threshold {best} is stored in {args.weights}, in place of {nets[0].threshold}")
    return int(sum(map(len, results[0])) < sum(map(len, all_rows[0])))


if __name__ == "__main__":
    sys.exit(main())
