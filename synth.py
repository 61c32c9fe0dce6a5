"""Watermarked photos with exact masks, without end: sample i is a pure function of (seed, i).

    python synth.py preview.png                                     # a contact sheet on generated backgrounds
    python synth.py preview.png --images photos/ --logos logos/     # with your photos, logos and fonts
    python synth.py set/ --n 1000 --recipe clwd --images photos/    # set/images, set/masks, set/meta.jsonl

    sample = Synth("photos/", "logos/").make_sample(seed=0, i=7)    # image (3, H, W) uint8,
                                                                    # mask (1, H, W) uint8 {0, 1}

Read top to bottom: files and their split, backgrounds, marks, placing and blending, camera, recipes, the
Dataset, the command line. Colours are RGB in [0, 1]; a mark is float32 (h, w, 4), colour premultiplied
by alpha, because every blend mode used here is linear in the mark's colour and so needs no division.
"""
import argparse
import json
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset
from tqdm import tqdm

MASK_ALPHA = 0.08          # a pixel is the mark's where the mark's own alpha, before opacity, is above this
MIN_CHANGE = 8 / 255       # a mark that changes its pixels by less on average is drawn again, not labelled
HELD_OUT = 10              # per cent of the files that training never sees, by a hash of the file name
MAX_LOGO = 512             # logos are kept at this longest side, in pixels; larger ones are shrunk
PHOTO_SIDE = 1024          # photos are decoded at reduced size as long as the longest side stays above this
RETRIES = 5                # how often a mark that cannot be seen is drawn anew before the sample goes without
PHOTO_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LOGO_TYPES, FONT_TYPES = (".png", ".webp"), (".ttf", ".otf")
RECIPES = ("default", "reference", "clwd", "logo-l", "logo-h", "logo-gray")


# ---------------------------------------------------------------- files and their split

def find_files(root: str | Path | None, types: tuple[str, ...]) -> list[str]:
    """All files below root with one of the endings, sorted: an index means the same file everywhere."""
    if root is None:
        return []
    if not Path(root).is_dir():
        raise ValueError(f"{root} is not a folder")
    found = (os.path.join(d, f) for d, _, files in os.walk(root, followlinks=True) for f in files)
    return sorted(f for f in found if f.lower().endswith(types))


def is_held_out(path: str, root: str | Path) -> bool:
    """By the folder if one on the way from root is called train or val, else by a hash of the file name."""
    parts = Path(Path(root).resolve().name, Path(path).relative_to(root)).parts[:-1]
    if {"train", "val"} & set(parts):
        return "val" in parts
    return zlib.crc32(Path(path).name.encode("utf-8", "surrogateescape")) % 100 < HELD_OUT


def take_part(paths: list[str], root: str | Path, held_out: bool) -> list[str]:
    """The training or the held-out share; all, with a warning, where that would be empty (one own logo)."""
    part = [p for p in paths if is_held_out(p, root) == held_out]
    if paths and not part:
        warn_once(f"{root}: no {Path(paths[0]).suffix} file falls to the "
                  f"{'held-out' if held_out else 'training'} part, so all {len(paths)} are used for both")
    return part or paths


@lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    print(f"synth.py: {message}", file=sys.stderr)


def pick_readable(rng: np.random.Generator, paths: list[str], read):
    """A random path that read() makes something of, or the next one -> (path, what it made), or None."""
    start = int(rng.integers(len(paths))) if paths else 0
    for k in range(len(paths)):
        path = paths[(start + k) % len(paths)]
        if (found := read(path)) is not None:
            return path, found
    return None


# ---------------------------------------------------------------- backgrounds

def read_photo(path: str) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB as displayed, shrunk while decoding if it is huge; None if it cannot be read."""
    try:
        with Image.open(path) as header:
            factor = max(header.size) // PHOTO_SIDE
        flag = (cv2.IMREAD_REDUCED_COLOR_8 if factor >= 8 else cv2.IMREAD_REDUCED_COLOR_4 if factor >= 4
                else cv2.IMREAD_REDUCED_COLOR_2 if factor >= 2 else cv2.IMREAD_COLOR)
        bgr = cv2.imdecode(np.fromfile(path, np.uint8), flag)
    except Exception:                             # Pillow's plugins and cv2 raise many kinds on garbage
        bgr = None
    if bgr is None:
        warn_once(f"{path} cannot be read and is left out")
        return None
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


@lru_cache(maxsize=16)
def noise_texture(k: int) -> np.ndarray:
    """(512, 512, 3) float32 around 0: 1/f noise, the spectrum of natural images (Baradad et al. 2021)."""
    rng = np.random.default_rng(k)
    f = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None])
    f[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((3, 512, 512))) / f ** rng.uniform(0.8, 1.5)
    noise = np.fft.irfft2(spectrum).astype(np.float32).transpose(1, 2, 0)
    noise += 2 * noise.mean(2, keepdims=True)     # channels of natural images move together
    return np.ascontiguousarray((noise - noise.mean()) / noise.std())


def generate_background(rng: np.random.Generator, W: int = 480, H: int = 352) -> np.ndarray:
    """Dead leaves over 1/f texture (Lee, Mumford & Huang 2001): occluding shapes with power-law sizes."""
    image = np.empty((H, W, 3), np.float32)
    image[:] = rng.uniform(0, 1, 3)
    scene = rng.uniform(0.1, 0.9, 3)              # leaves of one scene share a palette
    for r in np.sort(rng.pareto(1.5, int(rng.integers(5, 60))) * 0.04)[::-1]:
        r = min(r, 0.7) * max(H, W)
        colour = np.clip(scene + rng.normal(0, 0.25, 3), 0, 1).tolist()
        centre = (int(rng.integers(0, W)), int(rng.integers(0, H)))
        if rng.random() < 0.5:
            axes = (int(r) + 1, int(r * rng.uniform(0.3, 1)) + 1)
            cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
            points = np.array(centre) + r * np.stack([np.cos(angles), np.sin(angles)], 1)
            cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)
    light, grain = (cv2.resize(noise_texture(int(k)), (W, H)) for k in rng.integers(0, 16, 2))
    image += rng.uniform(0, 0.15) * light + rng.uniform(0, 0.06) * grain[::-1]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------- marks: pictures of text and logos

WORDS = ("preview", "sample", "proof", "copyright", "watermark", "photo", "studio", "images", "stock",
         "draft", "confidential", "original", "press", "media", "gallery", "archive", "demo", "approved",
         "paid", "free", "final", "exclusive", "void", "design", "art", "creative", "foto", "picture",
         "do not copy", "all rights reserved", "for review only", "low res", "image bank", "fine art",
         "no reuse", "my photography")
OTHER_SCRIPTS = ("водяной знак образец фото копия москва",
                 "δείγμα φωτογραφία προεπισκόπηση αθήνα",
                 "見本 写真 版权所有 样品 图片", "샘플 사진 미리보기",
                 "عينة صورة حقوق", "दृश्य नमूना चित्र",
                 "דוגמה תמונה")
SYLLABLES = ("ba be bo ca co da de do el en fa fi ga go ha he in ja ka ki la le lo ma me mi mo na ne no or "
             "pa pe pi ra re ri ro sa se si so ta te ti to un va ve vi wa xa yo za zen ton ley son ber man "
             "well ford stein ard").split()


def pick(rng: np.random.Generator, options, weights=None):
    """One of a sequence. Unlike rng.choice it keeps Python types, and makes no array of the options."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def make_name(rng: np.random.Generator) -> str:
    return "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 4)))).capitalize()


def make_text(rng: np.random.Generator, font: str | None) -> str:
    """What wordmarks say: trade word, invented name, domain or number; another script if the font has it."""
    kind = rng.random()
    if kind < 0.12:
        word = pick(rng, pick(rng, OTHER_SCRIPTS).split())
        if has_glyphs(font, word):
            return word
    if kind < 0.4:
        text = pick(rng, WORDS)
    elif kind < 0.6:
        text = make_name(rng) + pick(rng, ("", "", " " + make_name(rng), " " + pick(rng, WORDS)))
    elif kind < 0.8:
        text = (pick(rng, ("www.", "", "")) + make_name(rng).lower()
                + pick(rng, (".com", ".net", ".org", ".de", ".co.uk")))
    elif kind < 0.9:
        text = pick(rng, ("", "#", "ID ", "No. ")) + str(rng.integers(10, 10 ** int(rng.integers(3, 10))))
    else:
        text = "".join(pick(rng, "ABCDEFGHIKLMNOPRSTUVWXYZ") for _ in range(int(rng.integers(1, 4))))
    return pick(rng, (str, str.upper, str.title, str.lower))(text)


def make_credit(rng: np.random.Generator) -> str:
    """The small line in a corner: copyright, author, date."""
    name = make_name(rng) + pick(rng, ("", " " + make_name(rng), " Photography", ".com"))
    date = f"{rng.integers(1998, 2027)}"
    stamp = (f"{date}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02} "
             f"{rng.integers(0, 24):02}:{rng.integers(0, 60):02}")
    return pick(rng, (f"© {name}", f"© {date} {name}", f"{name} {date}", f"Photo by {name}",
                      f"Photo: {name}", stamp, name, f"www.{name.split()[0].lower()}.com",
                      f"Copyright {date} {name}. All rights reserved.",
                      f"{date[2:]} {rng.integers(1, 13)} {rng.integers(1, 29)}",
                      f"photo stock {rng.integers(10**6, 10**9)}"))


@lru_cache(maxsize=128)
def load_font(path: str | None, px: int):
    try:
        return ImageFont.truetype(path, px) if path else ImageFont.load_default(px)
    except OSError:
        warn_once(f"{path} is no readable font, Pillow's own takes its place")
        return ImageFont.load_default(px)


@lru_cache(maxsize=4096)
def has_glyphs(path: str | None, text: str) -> bool:
    """Fonts draw one and the same box for every character they lack."""
    font = load_font(path, 24)
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(c)) not in (missing, b"") for c in text.replace(" ", ""))


def draw_glyphs(text: str, font: str | None, px: int, spacing: float = 0) -> np.ndarray:
    """(h, w) float32 coverage in [0, 1] of text, letters about px pixels high, cropped tightly."""
    font = load_font(font, max(px, 4))
    if spacing:                                  # letters far apart, as in many logos
        text = "\u200a".join(text) if spacing < 0.5 else " ".join(text)
    left, top, right, bottom = font.getbbox(text)
    w, h = min(max(int(right - left), 1), 4096), min(max(int(bottom - top), 1), 4096)
    canvas = Image.new("L", (w, h))
    ImageDraw.Draw(canvas).text((-left, -top), text, 255, font=font)
    return np.asarray(canvas, np.float32) / 255


def pad(a: np.ndarray, n: int) -> np.ndarray:
    return cv2.copyMakeBorder(a, n, n, n, n, cv2.BORDER_CONSTANT)


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    return cv2.warpAffine(a, np.float32([[1, 0, dx], [0, 1, dy]]), (a.shape[1], a.shape[0]))


def tint(a: np.ndarray, colour) -> np.ndarray:
    """Coverage (h, w) and a colour, 3 values or (h, w, 3) of them -> premultiplied mark (h, w, 4)."""
    return np.dstack([a[..., None] * np.asarray(colour, np.float32), a])


def over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Porter-Duff over, premultiplied."""
    return top + bottom * (1 - top[..., 3:])


def pick_colour(rng: np.random.Generator) -> np.ndarray:
    """White is what most marks are; then greys, black, and any colour."""
    kind = rng.random()
    if kind < 0.5:
        return np.ones(3, np.float32)
    if kind < 0.75:
        return np.full(3, pick(rng, (0.0, rng.uniform(0.05, 0.95), rng.uniform(0.6, 0.95))), np.float32)
    colour = rng.uniform(0, 1, 3).astype(np.float32)
    colour[int(rng.integers(3))] = pick(rng, (0, 1))              # saturated, as brands are
    return colour


def style(rng: np.random.Generator, a: np.ndarray, colour: np.ndarray | None = None) -> np.ndarray:
    """Coverage (h, w) -> a mark as designers make it: shadow, outline, emboss, hollow letters, gradient."""
    colour = pick_colour(rng) if colour is None else colour
    other = np.float32(np.full(3, colour.mean() < 0.5))           # the contrasting black or white
    h = a.shape[0]
    kind = pick(rng, ("plain", "shadow", "outline", "hollow", "emboss", "gradient"), (45, 25, 8, 8, 8, 6))
    edge = max(1, round(h * rng.uniform(0.01, 0.05)))
    if kind != "plain":
        a = pad(a, 3 * edge + 1)
    if kind == "shadow":
        depth, blur = rng.uniform(0.3, 0.8), float(edge * rng.uniform(0.3, 1))
        shadow = cv2.GaussianBlur(shift(a, edge, edge), (0, 0), blur) * depth
        return over(tint(a, colour), tint(shadow, other))
    if kind in ("outline", "hollow"):
        ring = cv2.dilate(a, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * edge + 1, 2 * edge + 1)))
        if kind == "outline":
            return over(tint(a, colour), tint(ring, other))
        return tint(np.clip(ring - a, 0, 1), colour)
    if kind == "emboss":
        light, dark = np.clip(a - shift(a, edge, edge), 0, 1), np.clip(a - shift(a, -edge, -edge), 0, 1)
        face = tint(a * np.float32(pick(rng, (0.1, 0.4, 0.8))), colour)
        return over(over(tint(light, (1, 1, 1)), tint(dark, (0, 0, 0))), face)
    if kind == "gradient":
        across, down = (np.linspace(0, 1, n, dtype=np.float32) for n in (a.shape[1], a.shape[0]))
        ramp = np.broadcast_to(across if rng.random() < 0.5 else down[:, None], a.shape)[..., None]
        return tint(a, colour * (1 - ramp) + pick_colour(rng) * ramp)
    return tint(a, colour)


def put_box(rng: np.random.Generator, mark: np.ndarray) -> np.ndarray:
    """A semi-opaque plate behind a mark, dark under light ones."""
    mark = pad(mark, max(2, round(mark.shape[0] * rng.uniform(0.1, 0.5))))
    colour = np.zeros(3) if mark[..., :3].sum() > 0.5 * 3 * mark[..., 3].sum() else np.ones(3)
    plate = np.full(mark.shape[:2], rng.uniform(0.2, 0.8), np.float32)
    return over(mark, tint(plate, colour if rng.random() < 0.8 else pick_colour(rng)))


@lru_cache(maxsize=256)
def load_logo(path: str) -> tuple[np.ndarray, ...] | None:
    """Premultiplied uint8 RGBA, cropped, at full, half, quarter ... size; None if it cannot serve."""
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                warn_once(f"{path} has no transparency, so nothing tells the mark from its surroundings: "
                          "it is left out; save it as a PNG with an alpha channel")
                return None
            image = image.convert("RGBA")
            image.thumbnail((MAX_LOGO, MAX_LOGO))
            rgba = np.array(image)
    except Exception as e:                       # Pillow's plugins raise many kinds on garbage
        warn_once(f"{path} cannot be read and is left out ({type(e).__name__})")
        return None
    box = cv2.boundingRect((rgba[..., 3] > 255 * MASK_ALPHA).astype(np.uint8))
    if min(box[2:]) < 3:
        warn_once(f"{path} is empty, or smaller than 3 pixels, and is left out")
        return None
    rgba = rgba[box[1]:box[1] + box[3], box[0]:box[0] + box[2]]
    rgba[..., :3] = (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] + 127) // 255
    levels = [rgba]
    while min(levels[-1].shape[:2]) >= 32:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return tuple(levels)


def resize_logo(levels: tuple[np.ndarray, ...], w: int, h: int) -> np.ndarray:
    """From the smallest level that is large enough -> float32 (h, w, 4)."""
    level = next((x for x in reversed(levels) if x.shape[1] >= w and x.shape[0] >= h), levels[0])
    shrinking = level.shape[1] > w or level.shape[0] > h
    level = cv2.resize(level, (max(w, 1), max(h, 1)),
                       interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return level.astype(np.float32) / 255


def fit(w: float, h: float, longest: float) -> tuple[int, int]:
    scale = longest / max(w, h)
    return max(round(w * scale), 1), max(round(h * scale), 1)


def stack(parts: list[np.ndarray], axis: int, gap: int, align: float = 0.5) -> np.ndarray:
    """Pictures beside (axis 1) or below (axis 0) each other; align across: 0 at the start, 0.5 centred."""
    size = max(p.shape[1 - axis] for p in parts)
    padded = []
    for p in parts:
        free = size - p.shape[1 - axis]
        before, widths = round(free * align), [(0, 0)] * p.ndim
        widths[1 - axis], widths[axis] = (before, free - before), (gap if padded else 0, 0)
        padded.append(np.pad(p, widths))
    return np.concatenate(padded, axis)


def pad_to(mark: np.ndarray, h: int, w: int) -> np.ndarray:
    """The mark in the middle of an empty h x w cell (or larger, where it is larger)."""
    dy, dx = max(h - mark.shape[0], 0), max(w - mark.shape[1], 0)
    return cv2.copyMakeBorder(mark, dy // 2, dy - dy // 2, dx // 2, dx - dx // 2, cv2.BORDER_CONSTANT)


# ---------------------------------------------------------------- marks: the kinds that people meet

class Marks:
    """The logos and fonts to draw from. Each method draws one kind of mark at its final size, in pixels."""

    def __init__(self, logos: list[str], fonts: list[str]):
        self.logos, self.fonts = logos, fonts

    def any_logo(self, rng: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]] | None:
        return pick_readable(rng, self.logos, load_logo)

    def font(self, rng: np.random.Generator) -> str | None:
        return pick(rng, self.fonts) if self.fonts else None

    def logo(self, rng, longest: float) -> np.ndarray:
        """In its own colours, or as most sites use it: one colour."""
        found = self.any_logo(rng)
        if found is None:
            return self.text(rng, longest, longest)
        levels = found[1]
        w, h = fit(levels[0].shape[1], levels[0].shape[0], longest)
        mark = resize_logo(levels, w, h)
        if rng.random() < 0.45:
            return mark
        return style(rng, mark[..., 3])

    def text(self, rng, longest: float, highest: float, text: str | None = None) -> np.ndarray:
        """One line, scaled to the width asked for but no letter higher than asked for."""
        font = self.font(rng)
        text = make_text(rng, font) if text is None else text
        spacing = pick(rng, (0, 0.3, 1), (80, 12, 8))
        width = draw_glyphs(text, font, 32, spacing=spacing).shape[1]
        px = int(np.clip(32 * longest / width, 8, max(8, highest)))
        mark = style(rng, draw_glyphs(text, font, px, spacing=spacing))
        return put_box(rng, mark) if rng.random() < 0.08 else mark

    def lines(self, rng, highest: float) -> np.ndarray:
        """Two to four lines: name / by company, or a block of text laid over the photo."""
        n = pick(rng, (2, 3, 4), (75, 15, 10))
        colour, font = pick_colour(rng), self.font(rng)
        rows = [draw_glyphs(make_text(rng, font), font, int(max(9, highest / n * rng.uniform(0.4, 0.9))))
                for _ in range(n)]
        return style(rng, stack(rows, 0, round(highest * 0.1), align=pick(rng, (0, 0.5))), colour)

    def lockup(self, rng, longest: float) -> np.ndarray:
        """A logo beside or above its wordmark."""
        found = self.any_logo(rng)
        if found is None:
            return self.lines(rng, longest / 3)
        axis, font = pick(rng, (1, 0), (70, 30)), self.font(rng)
        levels = found[1]
        side = longest * (0.25 if axis else 0.45)
        emblem = resize_logo(levels, *fit(levels[0].shape[1], levels[0].shape[0], side))
        word = draw_glyphs(make_text(rng, font), font, int(max(9, side * rng.uniform(0.3, 0.8))))
        gap = max(2, round(side * rng.uniform(0.05, 0.3)))
        if rng.random() < 0.7:
            return style(rng, stack([emblem[..., 3], word], axis, gap))
        return stack([emblem, tint(word, pick_colour(rng))], axis, gap)

    def stamp(self, rng, longest: float) -> np.ndarray:
        """Text in a box or a ring, as rubber stamps are."""
        font = self.font(rng)
        word = draw_glyphs(make_text(rng, font), font, int(max(9, longest * rng.uniform(0.08, 0.2))))
        a = pad(word, max(4, round(word.shape[0] * 0.6)))
        line = max(1, round(word.shape[0] * rng.uniform(0.05, 0.15)))
        h, w = a.shape
        if rng.random() < 0.6:
            cv2.rectangle(a, (line, line), (w - 1 - line, h - 1 - line), 1.0, line, cv2.LINE_AA)
        else:
            a = pad_to(a, w, w)
            h, w = a.shape
            for r in (0.48, 0.42):
                cv2.ellipse(a, (w // 2, h // 2), (int(w * r), int(h * r)), 0, 0, 360, 1.0, line, cv2.LINE_AA)
        return tint(a, pick_colour(rng))

    def unit(self, rng, longest: float) -> np.ndarray:
        """What is repeated over the picture."""
        kind = rng.random()
        if kind < 0.3:
            return self.logo(rng, longest)
        if kind < 0.85:
            return self.text(rng, longest, longest / 2)
        return self.lockup(rng, longest)

    def tiles(self, rng, W: int, H: int) -> np.ndarray:
        """One cell of an endless pattern, with gaps; rows shifted as bricks half of the time."""
        unit = self.unit(rng, log_uniform(rng, 0.08, 0.4) * max(W, H))
        h, w = unit.shape[:2]
        cell = pad_to(unit, round(h * rng.uniform(1.1, 4)), round(w * rng.uniform(1.05, 2)))
        if rng.random() < 0.5:
            cell = np.concatenate([cell, np.roll(cell, cell.shape[1] // 2, axis=1)])
        return cell

    def lattice(self, rng, W: int, H: int) -> np.ndarray:
        """One cell of a net of thin lines, with a small wordmark at the node most of the time."""
        w = round(max(W, H) * log_uniform(rng, 0.12, 0.6))
        h = max(8, round(w * rng.uniform(0.5, 1.2)))
        a, colour = np.zeros((h, w), np.float32), pick_colour(rng)
        thick = pick(rng, (1, 1, 2, 3))
        for y0, y1 in ((0, h - 1), (h - 1, 0)):                    # diagonals: neighbours meet at the corners
            cv2.line(a, (0, y0), (w - 1, y1), 1.0, thick, cv2.LINE_AA)
        cell = tint(a * np.float32(rng.uniform(0.3, 1)), colour)
        if rng.random() < 0.75:
            node = self.unit(rng, w * rng.uniform(0.3, 0.6))[:h, :w]
            y, x = (h - node.shape[0]) // 2, (w - node.shape[1]) // 2
            region = cell[y:y + node.shape[0], x:x + node.shape[1]]
            if rng.random() < 0.5:
                region[:] = 0                                      # the net is often cut out around the word
            region[:] = over(node, region)
        return cell

    def strokes(self, rng, W: int, H: int) -> np.ndarray:
        """Lines across the whole picture: a cross, one diagonal, or some parallels."""
        a = np.zeros((H, W), np.float32)
        thick = max(1, round(H * log_uniform(rng, 0.002, 0.015)))
        kind = rng.random()
        ends = ([((0, 0), (W, H)), ((0, H), (W, 0))] if kind < 0.6
                else [((0, 0), (W, H))] if kind < 0.75
                else [((0, y), (W, y + int(rng.integers(-H // 4, H // 4 + 1))))
                      for y in rng.integers(0, H, int(rng.integers(1, 4))).tolist()])
        for p, q in ends:
            cv2.line(a, p, q, 1.0, thick, cv2.LINE_AA)
        return tint(a, pick_colour(rng))

    def band(self, rng, W: int, H: int) -> np.ndarray:
        """A strip over the whole width with text or a logo on it, as stock sites put at the bottom."""
        h = max(12, round(H * rng.uniform(0.05, 0.16)))
        strip = np.zeros((h, W, 4), np.float32)
        dark = rng.random() < 0.7
        for x in (round(W * 0.03), round(W * rng.uniform(0.5, 0.8))):
            a = draw_glyphs(make_credit(rng), self.font(rng),
                            max(8, round(h * rng.uniform(0.3, 0.7))))[:h, :W - x]
            y = (h - a.shape[0]) // 2
            strip[y:y + a.shape[0], x:x + a.shape[1]] = tint(a, np.ones(3) * dark)
        return over(strip, tint(np.full((h, W), rng.uniform(0.3, 1), np.float32), np.ones(3) * (not dark)))


# kind -> weight in the default recipe
KINDS = {"logo": 28, "text": 20, "lines": 8, "lockup": 12, "credit": 16, "stamp": 4, "tiles": 10,
         "lattice": 6, "strokes": 3, "band": 3}


def draw_mark(rng: np.random.Generator, marks: Marks, W: int, H: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """-> mark (h, w, 4), the 2x3 matrix that lays it on a W x H picture, and what it is."""
    kind = pick(rng, tuple(KINDS), tuple(KINDS.values()))
    angle, wrap = 0.0, kind in ("tiles", "lattice")
    longest, highest = log_uniform(rng, 0.12, 0.95) * W, log_uniform(rng, 0.03, 0.35) * H
    if kind == "logo":
        share = rng.uniform(0.3, 1.0) if rng.random() < 0.6 else log_uniform(rng, 0.08, 0.5)
        mark = marks.logo(rng, share * min(W, H))
    elif kind == "credit":
        px = log_uniform(rng, 0.02, 0.06) * H
        mark = (marks.text(rng, 0.9 * W, px, make_credit(rng)) if rng.random() < 0.8
                else marks.logo(rng, 4 * px))
    elif kind in ("tiles", "lattice", "strokes", "band"):
        mark = getattr(marks, kind)(rng, W, H)
    elif kind == "text":
        mark = marks.text(rng, longest, highest)
    elif kind == "lines":
        mark = marks.lines(rng, highest)
    else:
        mark = getattr(marks, kind)(rng, longest)
    h, w = mark.shape[:2]
    x, y = rng.uniform(-0.3, 1.3, 2) * (W - w, H - h)              # anywhere, overhang too
    margin = rng.uniform(0.005, 0.05) * min(W, H)
    if kind in ("credit", "logo", "text", "lockup", "lines") and (kind == "credit" or rng.random() < 0.3):
        x = pick(rng, (margin, W - w - margin, (W - w) / 2), (35, 50, 15))     # in a corner, or between two
        y = pick(rng, (margin, H - h - margin), (25, 75))
    elif kind == "strokes":
        x = y = 0
    elif kind == "band":
        x, y = 0, pick(rng, (H - h, 0, rng.uniform(0, H - h)), (70, 20, 10))
    elif rng.random() < 0.4:
        x, y = (W - w) / 2, (H - h) / 2
    if kind in ("stamp", "tiles", "lattice") or (
            kind in ("logo", "text", "lines", "lockup") and rng.random() < 0.3):
        angle = pick(rng, (0, rng.uniform(-45, 45), rng.uniform(-180, 180), 90, -90), (20, 55, 15, 5, 5))
        if kind == "lattice" and rng.random() < 0.7:
            angle = 0
    elif kind == "credit" and rng.random() < 0.06:                 # up the side
        angle, x = 90, pick(rng, (margin, W - h - margin)) - (w - h) / 2
        y = rng.uniform(0, max(H - w, 0)) + (w - h) / 2
    matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, 1.0)
    matrix[:, 2] += np.round([x, y])                               # whole pixels: an upright mark stays sharp
    return mark, matrix, {"kind": kind, "width": w, "height": h, "angle": round(float(angle), 1),
                          "wrap": wrap}


# ---------------------------------------------------------------- placing and blending

def warp(mark: np.ndarray, matrix: np.ndarray, W: int, H: int, wrap: bool = False):
    """The mark on a W x H picture -> (the part that lands in it, (row, column slices)); None if outside."""
    x0, y0, x1, y1 = 0, 0, W, H
    if not wrap:
        h, w = mark.shape[:2]
        corners = np.float64([[-1, -1, 1], [w, -1, 1], [-1, h, 1], [w, h, 1]]) @ matrix.T
        x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        x1, y1 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, (W, H))
        if x1 <= x0 or y1 <= y0:
            return None
    shifted = matrix - [[0, 0, x0], [0, 0, y0]]
    mode = cv2.BORDER_WRAP if wrap else cv2.BORDER_CONSTANT
    layer = cv2.warpAffine(mark, shifted, (int(x1 - x0), int(y1 - y0)), flags=cv2.INTER_LINEAR,
                           borderMode=mode)
    return layer, (slice(y0, y1), slice(x0, x1))


def blend(under: np.ndarray, layer: np.ndarray, opacity: float, mode: str) -> np.ndarray:
    """under (h, w, 3), layer (h, w, 4) premultiplied -> composite (h, w, 3). With mark colour c, alpha a and
    photo u: u (1 - a) + a B(u, c), and every B here is linear in c, so a B(u, c) needs only p = a c."""
    p, a = layer[..., :3] * np.float32(opacity), layer[..., 3:] * np.float32(opacity)
    if mode == "multiply":                        # B = u c
        p = under * p
    elif mode == "screen":                        # B = u + c - u c
        p = under * (a - p) + p
    elif mode == "overlay":                       # B = 2 u c for dark u, 1 - 2 (1 - u)(1 - c) for light
        p = np.where(under < 0.5, 2 * under * p, a - 2 * (1 - under) * (a - p))
    elif mode == "soft light":                    # B = (1 - 2 c) u^2 + 2 c u (Pegtop)
        p = under * under * (a - 2 * p) + 2 * p * under
    return under * (1 - a) + p


def rotate(mark: np.ndarray, angle: float) -> np.ndarray:
    """Turned about its centre, the canvas grown to hold all of it."""
    if angle == 0:
        return mark
    h, w = mark.shape[:2]
    matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, 1.0)
    W = int(np.ceil(h * abs(matrix[0, 1]) + w * abs(matrix[0, 0])))
    H = int(np.ceil(h * abs(matrix[0, 0]) + w * abs(matrix[0, 1])))
    matrix[:, 2] += ((W - w) / 2, (H - h) / 2)
    return cv2.warpAffine(mark, matrix, (W, H))


def paste(image, mask, layer, x: int, y: int, opacity: float, mode: str) -> dict:
    """Lays an upright layer on the image in place, marks every pixel with alpha, and tells what was done."""
    warped = warp(layer, np.float64([[1, 0, x], [0, 1, y]]), image.shape[1], image.shape[0])
    if warped is not None:
        layer, where = warped
        image[where] = blend(image[where], layer, opacity, mode)
        mask[where] |= layer[..., 3] > 0.5 / 255
    return {"kind": "logo", "opacity": opacity, "blend": mode, "x": x, "y": y}


def lay(image, mask, drawn, origin, opacity: float, mode: str) -> dict | None:
    """Lays a drawn mark on the window of the frame that begins at origin, in place.

    -> what was laid; {} where the mark is outside the window; None, with nothing changed, where it cannot be
    seen, so that another one should be drawn.
    """
    mark, matrix, meta = drawn
    matrix = matrix - [[0, 0, origin[0]], [0, 0, origin[1]]]
    warped = warp(mark, matrix, image.shape[1], image.shape[0], meta["wrap"])
    if warped is None:
        return {}
    layer, where = warped
    inside = layer[..., 3] > MASK_ALPHA
    if not inside.any():
        return {}
    under = image[where]
    composite = blend(under, layer, opacity, mode)
    if np.abs(composite - under)[inside].mean() < MIN_CHANGE:
        return None
    image[where] = composite
    mask[where] |= inside
    return {k: v for k, v in meta.items() if k != "wrap"} | {"opacity": round(opacity, 3), "blend": mode}


# ---------------------------------------------------------------- camera: what happens to pictures afterwards

def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int, subsample: bool = True) -> np.ndarray:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
             cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if subsample else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    # BGR or RGB: it only halves chroma
    return cv2.imdecode(cv2.imencode(".jpg", image, flags)[1], cv2.IMREAD_COLOR)


def camera(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, int | None]:
    """uint8 (H, W, 3) -> the same size after saving, sharing and saving again; the last JPEG quality."""
    H, W = image.shape[:2]
    if rng.random() < 0.15:
        image = jpeg(image, int(rng.integers(60, 96)))
    if rng.random() < 0.2:                        # down and up again
        s = rng.uniform(0.5, 0.95)
        small = cv2.resize(image, (max(int(W * s), 1), max(int(H * s), 1)), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (W, H), interpolation=pick(rng, (cv2.INTER_LINEAR, cv2.INTER_CUBIC)))
    kind = rng.random()
    if kind < 0.1:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    elif kind < 0.2:                              # unsharp mask
        amount = rng.uniform(0.3, 1.2)
        image = cv2.addWeighted(image, 1 + amount, cv2.GaussianBlur(image, (0, 0), 1.0), -amount, 0)
    elif kind < 0.3:
        noise = np.empty(image.shape, np.int16)
        cv2.setRNGSeed(int(rng.integers(2**31)))  # OpenCV fills int16 directly; seeded, so reproducible
        cv2.randn(noise, 0, rng.uniform(2, 12))
        image = cv2.add(image, noise, dtype=cv2.CV_8U)
    if rng.random() < 0.15:
        image = curve(rng, image, 0.06)
    if rng.random() > 0.75:
        return image, None
    quality = int(rng.integers(30, 96))
    return jpeg(image, quality, rng.random() < 0.75), quality


def curve(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """A tone curve per channel: exposure, contrast and colour cast in one table look-up."""
    x = np.linspace(0, 1, 256)[:, None]
    gamma = np.exp(rng.normal(0, 3 * strength) + rng.normal(0, strength, 3))
    table = x ** gamma * (1 + rng.normal(0, strength)) + rng.normal(0, strength / 2)
    return cv2.LUT(image, (np.clip(table, 0, 1) * 255).astype(np.uint8)[None])


def vary(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """The photo before it is marked: mirrored, graded, grey or framed."""
    if rng.random() < 0.5:
        photo = cv2.flip(photo, 1)
    if rng.random() < 0.3:
        photo = curve(rng, photo, 0.1)
    if rng.random() < 0.04:
        photo = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return passepartout(rng, photo) if rng.random() < 0.05 else photo


def cut_window(photo: np.ndarray, W: int, H: int, x: int, y: int, w: int, h: int) -> np.ndarray:
    """The w x h window at (x, y) of the photo as if it were W x H, without resizing what is not seen."""
    ph, pw = photo.shape[:2]
    top, left = y * ph // H, x * pw // W
    crop = photo[top:max(round((y + h) * ph / H), top + 1), left:max(round((x + w) * pw / W), left + 1)]
    if crop.shape[:2] == (h, w):
        return crop
    return cv2.resize(crop, (w, h), interpolation=cv2.INTER_AREA if crop.shape[0] > h else cv2.INTER_CUBIC)


def passepartout(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A plain border, with a thin line or not: photographers frame, and a frame is no mark."""
    n = max(2, round(min(photo.shape[:2]) * rng.uniform(0.01, 0.1)))
    colour = pick(rng, (0, 255, int(rng.integers(256))))
    photo = photo.copy()
    H, W = photo.shape[:2]
    cv2.rectangle(photo, (0, 0), (W - 1, H - 1), (colour,) * 3, 2 * n)
    if rng.random() < 0.4:
        cv2.rectangle(photo, (n + 2, n + 2), (W - n - 3, H - n - 3), (255 - colour,) * 3, 1)
    return photo


# ---------------------------------------------------------------- recipes

class Synth(Dataset):
    """Samples without end.

    images, logos: folders, searched to any depth (None: generated backgrounds, text marks only).
    size: side of a square crop, for training; None keeps each photo's own size.
    held_out takes the share of photos, logos and fonts that training never sees.
    Index i of the Dataset is make_sample(seed, i); n is its length.
    Raises ValueError with one sentence where a folder is missing or holds nothing usable.
    """

    def __init__(self, images=None, logos=None, recipe="default", size=None, held_out=False, seed=0,
                 n=2**31 - 1):
        if recipe not in RECIPES:
            raise ValueError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
        self.recipe, self.size, self.seed, self.n = recipe, size, seed, n
        self.photos = take_part(find_files(images, PHOTO_TYPES), images, held_out)
        if images is not None and not self.photos:
            raise ValueError(f"no photo in {images} (looked for {' '.join(PHOTO_TYPES)})")
        self.marks = Marks(*(take_part(find_files(logos, types), logos, held_out)
                             for types in (LOGO_TYPES, FONT_TYPES)))
        if recipe != "default" and self.marks.any_logo(np.random.default_rng(0)) is None:
            raise ValueError(f"recipe {recipe} needs logos, and there is no usable one in {logos}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image (3, H, W) uint8 RGB, mask (1, H, W) uint8 {0, 1}."""
        cv2.setNumThreads(0)                      # in a worker, OpenCV's threads only fight each other
        image, mask, _ = self.make_sample(self.seed, i)
        return image, mask

    def make_sample(self, seed: int, i: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """-> image (3, H, W) uint8 RGB, mask (1, H, W) uint8 {0, 1}, and how it was made (JSON types)."""
        rng = np.random.default_rng([seed, i])
        make = {"default": self.default, "reference": self.reference, "clwd": self.clwd}.get(
            self.recipe, self.logo_set)
        image, mask, meta = make(rng)
        meta |= {"recipe": self.recipe, "seed": seed, "index": i, "coverage": round(float(mask.mean()), 6)}
        return np.ascontiguousarray(image.transpose(2, 0, 1)), mask[None], meta

    def background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A photo (H, W, 3) uint8 and its name."""
        if not self.photos:
            return generate_background(rng), "generated"
        found = pick_readable(rng, self.photos, read_photo)
        if found is None:
            raise ValueError(f"none of the {len(self.photos)} photos can be read")
        return found[1], Path(found[0]).name

    # -- ours

    def default(self, rng: np.random.Generator):
        """What people meet: any number of marks on a photo or a window of it; then the camera."""
        generated = not self.photos or rng.random() < 0.03
        photo, name = (generate_background(rng), "generated") if generated else self.background(rng)
        photo = vary(rng, photo)
        H, W = photo.shape[:2]
        if self.size:                             # marks lie on the whole frame; the crop is a window of it
            # half of the time the window holds all it can, since a large mark needs its surroundings
            largest = max(self.size, min(1.9 * self.size, 1.1 * min(H, W)))
            scale = (self.size if rng.random() < 0.5 else rng.uniform(self.size, largest)) / min(H, W)
            H, W = max(round(H * scale), self.size), max(round(W * scale), self.size)
        count = pick(rng, (0, 1, 2, 3, 4), (17, 50, 20, 9, 4))
        drawn = [draw_mark(rng, self.marks, W, H) for _ in range(count)]
        h, w = (self.size, self.size) if self.size else (H, W)
        oy, ox = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        if drawn and rng.random() < 0.85 and not drawn[0][2]["wrap"]:      # look where the first mark is
            mark, matrix, _ = drawn[0]
            at = matrix @ [rng.uniform(0, mark.shape[1]), rng.uniform(0, mark.shape[0]), 1]
            at = np.clip(at - rng.uniform(0.15, 0.85, 2) * (w, h), 0, (W - w, H - h))
            ox, oy = at.astype(int).tolist()
        image = cut_window(photo, W, H, ox, oy, w, h).astype(np.float32) / 255
        mask, laid = np.zeros((h, w), np.uint8), []
        for mark in drawn:
            for _ in range(RETRIES):
                opacity = pick(rng, (rng.uniform(0.12, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.8, 1)),
                               (50, 27, 23))
                mode = pick(rng, ("normal", "screen", "multiply", "overlay", "soft light"), (76, 8, 6, 6, 4))
                if (done := lay(image, mask, mark, (ox, oy), opacity, mode)) is not None:
                    laid += [done] if done else []
                    break
                mark = draw_mark(rng, self.marks, W, H)
        image, quality = camera(rng, to_uint8(image))
        return image, mask, {"photo": name, "marks": laid, "jpeg": quality}

    # -- the field's (RECIPES in README): one or more logos, pasted; each keeps its own rule of truth

    def reference(self, rng: np.random.Generator):
        """The public notebook: 1-5 logos, diagonal U(.05, .70) of the image's, truth where alpha > 0."""
        photo, name = self.background(rng)
        H, W = photo.shape[:2]
        image, mask, metas = photo.astype(np.float32) / 255, np.zeros((H, W), np.uint8), []
        for _ in range(int(rng.integers(1, 6))):
            path, levels = self.marks.any_logo(rng)
            lh, lw = levels[0].shape[:2]
            scale = rng.uniform(0.05, 0.70) * np.hypot(W, H) / np.hypot(lw, lh)
            angle = rng.uniform(0, 360) if rng.random() < 0.5 else 0.0
            layer = rotate(resize_logo(levels, max(round(lw * scale), 1), max(round(lh * scale), 1)), angle)
            h, w = layer.shape[:2]
            x, y = (int(rng.integers(min(10 - n, N - 10), max(10 - n, N - 10) + 1))
                    for n, N in ((w, W), (h, H)))
            metas.append(paste(image, mask, layer, x, y, rng.uniform(0.3, 1),
                               pick(rng, ("normal", "multiply", "overlay")))
                         | {"mark": Path(path).name, "angle": angle, "width": w, "height": h})
        return to_uint8(image), mask, {"photo": name, "marks": metas, "jpeg": None}

    def clwd(self, rng: np.random.Generator):
        """WDNet's CLWD: 256 x 256, one logo, width and height each U{10..256}; truth where it changed the
        photo by more than 15/255 summed over RGB; then JPEG 75."""
        photo, name = self.background(rng)
        clean = cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        path, levels = self.marks.any_logo(rng)
        logo = resize_logo(levels, *(int(v) for v in rng.integers(10, 257, 2)))
        for angle in (*rng.uniform(0, 360, 20), 0.0):              # wholly inside: the first angle that fits
            layer = rotate(logo, angle)
            h, w = layer.shape[:2]
            if max(h, w) <= 256:
                break
        image, x, y = clean.copy(), int(rng.integers(256 - w + 1)), int(rng.integers(256 - h + 1))
        meta = paste(image, np.zeros((256, 256), np.uint8), layer, x, y, rng.uniform(0.3, 0.7), "normal")
        meta |= {"mark": Path(path).name, "angle": float(angle), "width": logo.shape[1],
                 "height": logo.shape[0]}
        mask = (np.abs(to_uint8(image).astype(int) - to_uint8(clean)).sum(2) > 15).astype(np.uint8)
        return jpeg(to_uint8(image), 75), mask, {"photo": name, "marks": [meta], "jpeg": 75}

    def logo_set(self, rng: np.random.Generator):
        """LOGO-L, -H, -Gray: one square-resized logo, side min(U·W, U·H), opacity U, any angle; truth where
        its alpha > 0. The ranges are the papers'; the authors' synthesis notebook itself uses .4 to .8."""
        low, high = (0.60, 0.85) if self.recipe == "logo-h" else (0.35, 0.60)
        photo, name = self.background(rng)
        H, W = photo.shape[:2]
        path, levels = self.marks.any_logo(rng)
        side = max(round(min(rng.uniform(low, high) * W, rng.uniform(low, high) * H)), 1)
        logo = resize_logo(levels, side, side)
        if self.recipe == "logo-gray":
            logo[..., :3] = (logo[..., :3] @ np.float32([0.299, 0.587, 0.114]))[..., None]
        angle = rng.uniform(0, 360)
        layer = rotate(logo, angle)
        h, w = layer.shape[:2]
        x, y = (int(rng.integers(min(N - n, 0), max(N - n, 0) + 1)) for n, N in ((w, W), (h, H)))
        image, mask = photo.astype(np.float32) / 255, np.zeros((H, W), np.uint8)
        meta = paste(image, mask, layer, x, y, rng.uniform(low, high), "normal")
        meta |= {"mark": Path(path).name, "angle": angle, "width": side, "height": side}
        return to_uint8(image), mask, {"photo": name, "marks": [meta], "jpeg": None}


# ---------------------------------------------------------------- command line

def contact_sheet(synth: Synth, seed: int, n: int, cell: int = 320) -> Image.Image:
    """n samples in rows of six, each image above its mask."""
    columns = 6
    sheet = Image.new("RGB", (columns * cell, -(-n // columns) * 2 * cell), "white")
    for i in range(n):
        image, mask, _ = synth.make_sample(seed, i)
        for row, picture in enumerate((image.transpose(1, 2, 0), np.repeat(mask[0][..., None] * 255, 3, 2))):
            thumb = Image.fromarray(picture)
            thumb.thumbnail((cell - 6, cell - 6))
            sheet.paste(thumb, (i % columns * cell, (i // columns * 2 + row) * cell))
    return sheet


def write_sample(synth: Synth, out: Path, seed: int, i: int) -> str:
    """Writes images/ and masks/ of sample i, by temporary name and rename -> its line for meta.jsonl."""
    cv2.setNumThreads(0)
    image, mask, meta = synth.make_sample(seed, i)
    for folder, picture in (("images", image.transpose(1, 2, 0)[..., ::-1]), ("masks", mask[0] * 255)):
        path = out / folder / f"{i:07}.png"
        path.with_suffix(".tmp").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        os.replace(path.with_suffix(".tmp"), path)
    return json.dumps({"name": f"{i:07}", **meta}) + "\n"


def export(synth: Synth, out: Path, seed: int, n: int, workers: int) -> None:
    """The same bytes for any number of workers. A sample is there once its line is in meta.jsonl."""
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    meta = out / "meta.jsonl"
    lines = meta.read_text().splitlines(keepends=True) if meta.exists() else []
    done = len([line for line in lines if line.endswith("\n")])
    if done:
        first = json.loads(lines[0])
        if (first["recipe"], first["seed"]) != (synth.recipe, seed):
            raise ValueError(f"{out} holds recipe {first['recipe']}, seed {first['seed']}: "
                             "choose another folder")
    meta.write_text("".join(lines[:done]))        # a half-written last line never counts
    with meta.open("a") as f, ProcessPoolExecutor(workers) as pool:
        todo = pool.map(write_sample, repeat(synth), repeat(out), repeat(seed), range(done, n), chunksize=8)
        for line in tqdm(todo, total=n, initial=min(done, n), unit="sample", disable=None):
            f.write(line)
            f.flush()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path,
                        help="a picture (.png, .jpg) for a contact sheet, or a folder for a data set")
    # what is mixed
    parser.add_argument("--images", type=Path, help="folder of photos (default: generated backgrounds)")
    parser.add_argument("--logos", type=Path, default=Path(__file__).parent / "logos",
                        help="folder of logos with alpha, and of fonts for text marks (default: %(default)s)")
    parser.add_argument("--recipe", choices=RECIPES, default="default",
                        help="how marks are laid on photos (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="take the files that training never sees")
    parser.add_argument("--size", type=int,
                        help="square crops of this side, as in training (default: whole photos)")
    # how many
    parser.add_argument("--n", type=int, default=24, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed, other samples (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes for a data set (default: all cores)")
    args = parser.parse_args(argv)
    try:
        synth = Synth(args.images, args.logos, args.recipe, args.size, args.held_out)
        if args.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
            contact_sheet(synth, args.seed, args.n).save(args.out)
        else:
            export(synth, args.out, args.seed, args.n, args.workers)
    except (ValueError, OSError) as e:
        print(f"synth.py: {e}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
