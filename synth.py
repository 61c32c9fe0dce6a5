"""Watermarked photos with exact masks, without end: sample i is a pure function of (seed, i).

    python synth.py preview.png                                     # a contact sheet on generated backgrounds
    python synth.py preview.png --images photos/ --logos logos/     # with your photos, logos and fonts
    python synth.py set/ --n 1000 --recipe clwd --images photos/    # set/images, set/masks, set/meta.jsonl

    sample = Synth("photos/", "logos/").make_sample(seed=0, i=7)    # image (3, H, W) uint8,
                                                                    # mask (1, H, W) uint8 {0, 1}

Read top to bottom: files and their split, backgrounds, marks, placing and blending, camera, recipes, the
Dataset, the command line. A mark is uint8 RGBA (h, w, 4), colour premultiplied by alpha, because every
blend mode used here is linear in the mark's colour and so needs no division. Colours are RGB in [0, 1].
"""
import argparse
import io
import json
import math
import os
import signal
import sys
import zlib
from bisect import bisect
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, count, islice, repeat
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

MASK_ALPHA = 0.08          # a pixel is the mark's where the mark's own alpha, before opacity, is above this
MIN_CHANGE = 8             # levels of 255: a mark that changes its pixels by less is drawn anew, not labelled
HELD_OUT = 10              # per cent of the files that training never sees, by a hash of the file name
MAX_LOGO = 512             # logos are kept at this longest side, in pixels; larger ones are shrunk
LOGO_CACHE = 800           # logos kept decoded in each process; the bound of its memory
PHOTO_SIDE = 1024          # photos are decoded at reduced size as long as the longest side stays above this
MAX_PIXELS = 100_000_000   # pictures beyond this are left out, JPEG photos excepted: those decode at 1/8
ENLARGED = 0.5             # share of the crops that were saved small, and then made larger
CONTINUED = 0.3            # share of the photos under the crop's side that go on as their mirror image instead
RETRIES = 5                # how often a mark that cannot be seen is drawn anew before the sample goes without
PHOTO_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LOGO_TYPES, FONT_TYPES = (".png", ".webp"), (".ttf", ".otf")
Image.MAX_IMAGE_PIXELS = None                     # our own limit, in place of Pillow's error
RECIPES = ("default", "reference", "clwd", "logo-l", "logo-h", "logo-gray")
# recipe -> weight in training crops, where there are logos. plain: see Synth.default. Without reference: a
# quarter of what it labels cannot be seen
CROPS = {"default": 52, "plain": 18, "clwd": 10, "logo-l": 6, "logo-h": 6, "logo-gray": 8}
OWN = "own"                # the default recipe with the given logos alone: no words, no marks but these


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


def is_too_large(path: str, header: Image.Image) -> bool:
    if header.width * header.height <= MAX_PIXELS:
        return False
    warn_once(f"{path} has more than {MAX_PIXELS // 10**6} megapixels and is left out")
    return True


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
            if header.format not in ("JPEG", "MPO") and is_too_large(path, header):
                return None
        flag = (cv2.IMREAD_REDUCED_COLOR_8 if factor >= 8 else cv2.IMREAD_REDUCED_COLOR_4 if factor >= 4
                else cv2.IMREAD_REDUCED_COLOR_2 if factor >= 2 else cv2.IMREAD_COLOR)
        bgr = cv2.imdecode(np.fromfile(path, np.uint8), flag)
    except Exception:                             # Pillow's plugins and cv2 raise many kinds on garbage
        bgr = None
    if bgr is None:
        warn_once(f"{path} cannot be read and is left out")
        return None
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, bgr)


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
        return options[int(rng.random() * len(options))]
    sums = list(accumulate(weights))
    return options[bisect(sums, rng.random() * sums[-1])]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


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


@contextmanager
def drawing(path: str | None):
    """FreeType opens fonts whose letters it then cannot draw, and its error does not name the file."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{path} opens as a font but cannot be drawn ({e}): remove it") from e


@lru_cache(maxsize=4096)
def has_glyphs(path: str | None, text: str) -> bool:
    """Fonts draw one and the same box for every character they lack."""
    font = load_font(path, 24)
    with drawing(path):
        missing = bytes(font.getmask("\uffff"))
        return all(bytes(font.getmask(c)) not in (missing, b"") for c in text.replace(" ", ""))


def space_out(text: str, spacing: float) -> str:
    """Letters far apart, as in many logos: 0 as they are, under .5 by hair spaces, else by full ones."""
    return text if not spacing else ("\u200a" if spacing < 0.5 else " ").join(text)


def draw_glyphs(text: str, font: str | None, px: int) -> np.ndarray:
    """(h, w) uint8 coverage of one line of text, set at px pixels, cropped tightly."""
    face = load_font(font, px)
    with drawing(font):
        size = (min(int(face.getlength(text)) + 2 * px, 4096), min(sum(face.getmetrics()) + px, 2048))
        canvas = Image.new("L", size)
        ImageDraw.Draw(canvas).text((px, px // 2), text, 255, font=face)
    a = np.asarray(canvas)
    x, y, w, h = cv2.boundingRect(a)
    return a[y:y + max(h, 1), x:x + max(w, 1)]


def pad(a: np.ndarray, n: int) -> np.ndarray:
    return cv2.copyMakeBorder(a, n, n, n, n, cv2.BORDER_CONSTANT)


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    return cv2.warpAffine(a, np.float32([[1, 0, dx], [0, 1, dy]]), (a.shape[1], a.shape[0]))


def tint(a: np.ndarray, colour) -> np.ndarray:
    """Coverage (h, w) uint8 and an RGB colour in [0, 1] -> mark (h, w, 4)."""
    table = (np.arange(256)[:, None] * np.array([*colour, 1]) + 0.5).astype(np.uint8)          # (256, 4)
    return table.view(np.uint32)[:, 0].take(a).view(np.uint8).reshape(*a.shape, 4)


def over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Porter-Duff over, premultiplied."""
    seen = cv2.merge([cv2.bitwise_not(cv2.extractChannel(top, 3))] * 4)
    return cv2.add(top, cv2.multiply(bottom, seen, scale=1 / 255))


def where_alpha(mark: np.ndarray, alpha: float) -> np.ndarray:
    """(h, w) uint8, 255 where the mark's alpha is above `alpha` of 1."""
    return cv2.inRange(cv2.extractChannel(mark, 3), int(255 * alpha) + 1, 255)


def pick_colour(rng: np.random.Generator) -> np.ndarray:
    """White is what most marks are; then greys, black, and any colour."""
    kind = rng.random()
    if kind < 0.5:
        return np.ones(3)
    if kind < 0.75:
        return np.full(3, pick(rng, (0.0, rng.uniform(0.05, 0.95), rng.uniform(0.6, 0.95))))
    colour = rng.uniform(0, 1, 3)
    colour[int(rng.integers(3))] = pick(rng, (0, 1))              # saturated, as brands are
    return colour


def style(rng: np.random.Generator, a: np.ndarray, colour: np.ndarray | None = None) -> np.ndarray:
    """Coverage (h, w) -> a mark as designers make it: shadow, outline, emboss, hollow letters, gradient."""
    colour = pick_colour(rng) if colour is None else colour
    other = np.full(3, float(colour.mean() < 0.5))                # the contrasting black or white
    kind = pick(rng, ("plain", "shadow", "outline", "hollow", "emboss", "gradient"), (45, 25, 8, 8, 8, 6))
    edge = max(1, round(a.shape[0] * rng.uniform(0.01, 0.05)))
    if kind != "plain":
        a = pad(a, 3 * edge + 1)
    if kind == "shadow":
        shadow = cv2.GaussianBlur(shift(a, edge, edge), (0, 0), float(edge * rng.uniform(0.3, 1)))
        return over(tint(a, colour), tint(cv2.convertScaleAbs(shadow, alpha=rng.uniform(0.3, 0.8)), other))
    if kind in ("outline", "hollow"):
        ring = cv2.dilate(a, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * edge + 1, 2 * edge + 1)))
        return (over(tint(a, colour), tint(ring, other)) if kind == "outline"
                else tint(cv2.subtract(ring, a), colour))
    if kind == "emboss":
        light, dark = (tint(cv2.subtract(a, shift(a, n, n)), (v,) * 3) for n, v in ((edge, 1), (-edge, 0)))
        face = tint(cv2.convertScaleAbs(a, alpha=pick(rng, (0.1, 0.4, 0.8))), colour)
        return over(over(light, dark), face)
    if kind == "gradient":
        ramp = np.linspace(0, 255, a.shape[1], dtype=np.uint8)[None].repeat(a.shape[0], 0)
        if rng.random() < 0.5:
            ramp = cv2.resize(ramp[:1].T, a.shape[::-1])
        rest = cv2.multiply(a, ramp, scale=1 / 255)
        return cv2.add(tint(rest, pick_colour(rng)), tint(cv2.subtract(a, rest), colour))
    return tint(a, colour)


def put_box(rng: np.random.Generator, mark: np.ndarray) -> np.ndarray:
    """A semi-opaque plate behind a mark, dark under light ones."""
    mark = pad(mark, max(2, round(mark.shape[0] * rng.uniform(0.1, 0.5))))
    r, g, b, a = mark.mean((0, 1))
    colour = (float(r + g + b < 1.5 * a),) * 3 if rng.random() < 0.8 else pick_colour(rng)
    return over(mark, tint(np.full(mark.shape[:2], rng.integers(50, 205), np.uint8), colour))


def read_logo(path: str) -> np.ndarray | None:
    """(h, w, 4) uint8 RGBA, not premultiplied; None, with the reason said, if it cannot serve.

    In a logo without transparency, pure white or black that touches the border becomes transparent.
    """
    try:
        data = np.fromfile(path, np.uint8)
        with Image.open(io.BytesIO(data)) as image:
            if is_too_large(path, image):
                return None
            opaque = not image.has_transparency_data
            rgba = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)          # faster than Pillow, where it serves
            if opaque or rgba is None or rgba.dtype != np.uint8 or rgba.ndim != 3 or rgba.shape[2] != 4:
                rgba = np.array(image.convert("RGBA"))
            else:
                rgba = cv2.cvtColor(rgba, cv2.COLOR_BGRA2RGBA)
    except Exception as e:                       # Pillow's plugins raise many kinds on garbage
        warn_once(f"{path} cannot be read and is left out ({type(e).__name__})")
        return None
    if opaque:
        for pure in (255, 0):
            plain = (rgba[..., :3] == pure).all(2).astype(np.uint8)
            parts = cv2.connectedComponents(plain, connectivity=4)[1]
            border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
            rgba[np.isin(parts, border[border > 0]), 3] = 0
        if rgba[..., 3].all():
            warn_once(f"{path} has no transparency and no pure white or black around it, so nothing tells "
                      "the mark from its surroundings: it is left out; save it as a PNG with an alpha channel")
            return None
        warn_once(f"{path} has no transparency: the pure white or black around it is taken for clear")
    return rgba


@lru_cache(maxsize=LOGO_CACHE)
def load_logo(path: str) -> tuple[np.ndarray, ...] | None:
    """The logo as a mark, cropped, at full, half, quarter ... size; None if it cannot serve."""
    if (rgba := read_logo(path)) is None:
        return None
    x, y, w, h = cv2.boundingRect(where_alpha(rgba, MASK_ALPHA))
    if min(w, h) < 3:
        warn_once(f"{path} is empty, or smaller than 3 pixels, and is left out")
        return None
    rgba = cv2.cvtColor(rgba[y:y + h, x:x + w], cv2.COLOR_RGBA2mRGBA)           # premultiplied
    if (shrink := MAX_LOGO / max(w, h)) < 1:
        rgba = cv2.resize(rgba, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    levels = [rgba]
    while min(levels[-1].shape[:2]) >= 32:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return tuple(levels)


def pick_level(levels: tuple[np.ndarray, ...], w: float, h: float) -> np.ndarray:
    """The smallest level that is at least w x h, so that what is left to shrink is less than a half."""
    return next((x for x in reversed(levels) if x.shape[1] >= w and x.shape[0] >= h), levels[0])


def resize_logo(levels: tuple[np.ndarray, ...], longest: float) -> np.ndarray:
    h, w = levels[0].shape[:2]
    scale = longest / max(w, h)
    size = max(round(w * scale), 1), max(round(h * scale), 1)
    return cv2.resize(pick_level(levels, *size), size, interpolation=cv2.INTER_LINEAR)


def stack(parts: list[np.ndarray], axis: int, gap: int, align: float = 0.5) -> np.ndarray:
    """Pictures beside (axis 1) or below (axis 0) each other; align across: 0 at the start, 0.5 centred."""
    size, padded = max(p.shape[1 - axis] for p in parts), []
    for p in parts:
        free = size - p.shape[1 - axis]
        before, first = round(free * align), gap if padded else 0
        edges = (first, 0, before, free - before) if axis == 0 else (before, free - before, first, 0)
        padded.append(cv2.copyMakeBorder(p, *edges, cv2.BORDER_CONSTANT))
    return np.concatenate(padded, axis)


def pad_to(mark: np.ndarray, h: int, w: int) -> np.ndarray:
    """The mark in the middle of an empty h x w cell (or larger, where it is larger)."""
    dy, dx = max(h - mark.shape[0], 0), max(w - mark.shape[1], 0)
    return cv2.copyMakeBorder(mark, dy // 2, dy - dy // 2, dx // 2, dx - dx // 2, cv2.BORDER_CONSTANT)


def bend(a: np.ndarray, radius: int) -> np.ndarray:
    """A line of text (h, w) around a circle, its middle at the top -> (2 radius, 2 radius)."""
    h, n = a.shape[0], max(round(2 * np.pi * radius), a.shape[1])
    polar = np.zeros((n, radius), np.uint8)                        # rows: angle; columns: distance
    start = (3 * n // 4 - a.shape[1] // 2) % n                     # angle 0 is at three o'clock, clockwise
    polar[:a.shape[1], radius - h:] = a[::-1].T
    polar = np.roll(polar, start, axis=0)
    return cv2.warpPolar(polar, (2 * radius, 2 * radius), (radius, radius), radius,
                         cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP | cv2.WARP_FILL_OUTLIERS)


# ---------------------------------------------------------------- marks: the kinds that people meet

class Marks:
    """The logos and fonts to draw from. Each method draws one kind of mark at its final size, in pixels."""

    def __init__(self, logos: list[str], fonts: list[str], words: bool = True):
        self.logos, self.fonts, self.words = logos, fonts, words

    def any_logo(self, rng: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]] | None:
        return pick_readable(rng, self.logos, load_logo)

    def font(self, rng: np.random.Generator) -> str | None:
        return pick(rng, self.fonts) if self.fonts else None

    def word(self, rng, px: float) -> np.ndarray:
        font = self.font(rng)
        return draw_glyphs(make_text(rng, font), font, int(max(9, px)))

    def logo(self, rng, longest: float) -> np.ndarray:
        """In its own colours, or as most sites use it: one colour."""
        found = self.any_logo(rng)
        if found is None:
            return self.text(rng, longest, longest)
        mark = resize_logo(found[1], longest)
        return mark if rng.random() < 0.6 else style(rng, cv2.extractChannel(mark, 3))

    def text(self, rng, longest: float, highest: float, text: str | None = None) -> np.ndarray:
        """One line, scaled to the width asked for but no letter higher than asked for."""
        font = self.font(rng)
        text = space_out(text or make_text(rng, font), pick(rng, (0, 0.3, 1), (80, 12, 8)))
        with drawing(font):
            width = max(load_font(font, 32).getlength(text), 1)
        mark = style(rng, draw_glyphs(text, font, int(max(8, min(32 * longest / width, highest)))))
        return put_box(rng, mark) if rng.random() < 0.08 else mark

    def lines(self, rng, highest: float) -> np.ndarray:
        """Two to four lines: name / by company, or a block of text laid over the photo."""
        n = pick(rng, (2, 3, 4), (75, 15, 10))
        font = self.font(rng)
        words = [make_text(rng, font) for _ in range(n)]
        if n == 2 and rng.random() < 0.4:
            words[1] = "by " + words[1]
        rows = [draw_glyphs(word, font, int(max(9, highest / n * rng.uniform(0.4, 0.9)))) for word in words]
        return style(rng, stack(rows, 0, round(highest * 0.1), align=pick(rng, (0, 0.5))))

    def lockup(self, rng, longest: float) -> np.ndarray:
        """A logo beside or above its wordmark."""
        found = self.any_logo(rng)
        if found is None:
            return self.lines(rng, longest / 3)
        axis = pick(rng, (1, 0), (70, 30))
        side = longest * (0.25 if axis else 0.45)
        emblem, word = resize_logo(found[1], side), self.word(rng, side * rng.uniform(0.3, 0.8))
        gap = max(2, round(side * rng.uniform(0.05, 0.3)))
        if rng.random() < 0.7:
            return style(rng, stack([cv2.extractChannel(emblem, 3), word], axis, gap))
        return stack([emblem, tint(word, pick_colour(rng))], axis, gap)

    def stamp(self, rng, longest: float) -> np.ndarray:
        """Text in a box or inside two rings, or a seal."""
        kind, colour = rng.random(), pick_colour(rng)
        if kind >= 0.75:
            return self.seal(rng, longest, colour)
        word = self.word(rng, longest * rng.uniform(0.08, 0.2))
        a = pad(word, max(4, round(word.shape[0] * 0.6)))
        line = max(1, round(word.shape[0] * rng.uniform(0.05, 0.15)))
        if kind < 0.5:
            cv2.rectangle(a, (line, line), (a.shape[1] - 1 - line, a.shape[0] - 1 - line), 255, line)
        else:
            a = pad_to(a, a.shape[1], a.shape[1])
            for r in (0.48, 0.42):
                cv2.circle(a, (a.shape[1] // 2,) * 2, int(a.shape[1] * r), 255, line, cv2.LINE_AA)
        return tint(a, colour)

    def seal(self, rng, longest: float, colour) -> np.ndarray:
        """Text along a ring, a logo or letters inside it."""
        radius, font = max(24, round(longest * rng.uniform(0.25, 0.5))), self.font(rng)
        text = " · ".join(make_text(rng, font) for _ in range(2)).upper()
        text = draw_glyphs(text, font, max(9, int(radius * rng.uniform(0.15, 0.3))))[:radius // 2]
        a = pad(bend(text, radius), max(3, radius // 8))
        middle, line = (a.shape[0] // 2,) * 2, max(1, radius // pick(rng, (20, 40)))
        for r in (1.06, 0.94 - text.shape[0] / radius)[:pick(rng, (0, 1, 2))]:
            cv2.circle(a, middle, round(radius * r), 255, line, cv2.LINE_AA)
        room = (radius - text.shape[0]) * 1.1
        inner = self.logo(rng, room) if rng.random() < 0.5 else tint(self.word(rng, room / 3), colour)
        if (scale := 1.3 * room / max(inner.shape[:2])) < 1:
            inner = cv2.resize(inner, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return over(tint(a, colour), pad_to(inner, *a.shape))

    def unit(self, rng, longest: float) -> np.ndarray:
        """What is repeated over the picture."""
        kind = rng.random()
        if kind < 0.3 or not self.words:
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
        a, thick, strength = np.zeros((h, w), np.uint8), pick(rng, (1, 1, 2, 3)), int(rng.integers(80, 256))
        for y0, y1 in ((0, h - 1), (h - 1, 0)):                    # diagonals: neighbours meet at the corners
            cv2.line(a, (0, y0), (w - 1, y1), strength, thick, cv2.LINE_AA)
        cell = tint(a, pick_colour(rng))
        if rng.random() < 0.75:
            node = self.unit(rng, w * rng.uniform(0.3, 0.6))[:h, :w]
            y, x = (h - node.shape[0]) // 2, (w - node.shape[1]) // 2
            region = cell[y:y + node.shape[0], x:x + node.shape[1]]
            region[:] = node if rng.random() < 0.5 else over(node, region)     # net cut out around it, or not
        return cell

    def strokes(self, rng, W: int, H: int) -> np.ndarray:
        """Lines across the whole picture: a cross, one diagonal, or some parallels."""
        a = np.zeros((H, W), np.uint8)
        thick = max(1, round(H * log_uniform(rng, 0.002, 0.015)))
        kind = rng.random()
        ends = ([((0, 0), (W, H)), ((0, H), (W, 0))] if kind < 0.6
                else [((0, 0), (W, H))] if kind < 0.75
                else [((0, y), (W, y + int(rng.integers(-H // 4, H // 4 + 1))))
                      for y in rng.integers(0, H, int(rng.integers(1, 4))).tolist()])
        for p, q in ends:
            cv2.line(a, p, q, 255, thick, cv2.LINE_AA)
        return tint(a, pick_colour(rng))

    def band(self, rng, W: int, H: int) -> np.ndarray:
        """A strip over the whole width with text or a logo on it, as stock sites put at the bottom."""
        h = max(12, round(H * rng.uniform(0.05, 0.16)))
        a, dark = np.zeros((h, W), np.uint8), rng.random() < 0.7
        for x in (round(W * 0.03), round(W * rng.uniform(0.5, 0.8))):
            text = draw_glyphs(make_credit(rng), self.font(rng), max(8, round(h * rng.uniform(0.3, 0.7))))
            text = text[:h, :W - x]
            y = (h - text.shape[0]) // 2
            a[y:y + text.shape[0], x:x + text.shape[1]] = text
        strip = np.full((h, W), rng.integers(76, 256), np.uint8)
        return over(tint(a, (float(dark),) * 3), tint(strip, (float(not dark),) * 3))


# kind -> weight in the default recipe
KINDS = {"logo": 50, "text": 20, "lines": 8, "lockup": 12, "credit": 16, "stamp": 4, "tiles": 10,
         "lattice": 6, "strokes": 3, "band": 3}
OWN_KINDS = {"logo": 80, "tiles": 20}
# the words, nets and tiles of stock sites
PLAIN_KINDS = {"text": 22, "lines": 6, "lockup": 22, "credit": 22, "tiles": 14, "lattice": 10, "band": 4}


def draw_mark(rng: np.random.Generator, marks: Marks, W: int, H: int, kinds: dict[str, float] = KINDS):
    """-> mark (h, w, 4) uint8, the 2x3 matrix that lays it on a W x H picture, and what it is."""
    kind = pick(rng, tuple(kinds), tuple(kinds.values()))
    angle, wrap, squash = 0.0, kind in ("tiles", "lattice"), 1.0
    longest, highest = log_uniform(rng, 0.12, 0.95) * W, log_uniform(rng, 0.03, 0.35) * H
    if kind == "logo":
        share = rng.uniform(0.3, 1.0) if rng.random() < 0.6 else log_uniform(rng, 0.08, 0.5)
        mark = marks.logo(rng, share * min(W, H))
        squash = log_uniform(rng, 0.25, 4) if rng.random() < 0.5 else 1.0      # stretched to fill a format
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
    h, w = round(mark.shape[0] / squash ** 0.5), round(mark.shape[1] * squash ** 0.5)
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
            kind in ("logo", "text", "lines", "lockup") and rng.random() < (0.5 if kind == "logo" else 0.3)):
        angle = pick(rng, (0, rng.uniform(-45, 45), rng.uniform(-180, 180), 90, -90),
                     (5, 30, 65, 0, 0) if kind == "logo" else (20, 55, 15, 5, 5))
        if kind == "lattice" and rng.random() < 0.7:
            angle = 0
    elif kind == "credit" and rng.random() < 0.06:                 # up the side
        angle, x = 90, pick(rng, (margin, W - h - margin)) - (w - h) / 2
        y = rng.uniform(0, max(H - w, 0)) + (w - h) / 2
    x, y = round(x), round(y)                                      # an upright mark stays sharp
    return mark, placement(mark, w, h, angle, x, y), {
        "kind": kind, "x": x, "y": y, "width": w, "height": h, "angle": round(float(angle), 1), "wrap": wrap}


# ---------------------------------------------------------------- placing and blending

def placement(mark: np.ndarray, w: float, h: float, angle: float, x: float, y: float) -> np.ndarray:
    """2x3 matrix: the mark made w x h pixels, its corner at (x, y), then turned about its own centre."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    sx, sy = w / mark.shape[1], h / mark.shape[0]
    matrix = np.array([[cos * sx, sin * sy, 0], [-sin * sx, cos * sy, 0]])
    centre = np.array([mark.shape[1] - 1, mark.shape[0] - 1]) / 2
    matrix[:, 2] = np.array([x + (w - 1) / 2, y + (h - 1) / 2]) - matrix[:, :2] @ centre
    return matrix


def turned_size(w: float, h: float, angle: float) -> tuple[int, int]:
    """Width and height of the upright box around a w x h box that is turned by angle degrees."""
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return math.ceil(h * sin + w * cos - 1e-9), math.ceil(h * cos + w * sin - 1e-9)


def warp(mark: np.ndarray, matrix: np.ndarray, W: int, H: int, wrap: bool = False):
    """The mark on a W x H picture -> (the part that lands in it, (row, column slices)); None if outside."""
    x0, y0, x1, y1 = 0, 0, W, H
    if not wrap:
        (a, b, c), (d, e, f) = matrix.tolist()
        h, w = mark.shape[:2]                     # its corners, and a pixel around
        xs, ys = zip(*((a * x + b * y + c, d * x + e * y + f) for x in (-1, w) for y in (-1, h)))
        x0, y0 = max(math.floor(min(xs)), 0), max(math.floor(min(ys)), 0)
        x1, y1 = min(math.ceil(max(xs)) + 1, W), min(math.ceil(max(ys)) + 1, H)
        if x1 <= x0 or y1 <= y0:
            return None
    layer = cv2.warpAffine(mark, matrix - [[0, 0, x0], [0, 0, y0]], (x1 - x0, y1 - y0),
                           borderMode=cv2.BORDER_WRAP if wrap else cv2.BORDER_CONSTANT)
    return layer, (slice(y0, y1), slice(x0, x1))


def blend(under: np.ndarray, layer: np.ndarray, opacity: float, mode: str) -> np.ndarray:
    """under (h, w, 3) uint8, layer (h, w, 4) premultiplied -> composite (h, w, 3) uint8.

    With photo u, mark colour c and alpha a the composite is u + a (B(u, c) - u). Every B here is linear in c,
    so that the change a (B - u) needs only the premultiplied p = a c, and u a, and u p.
    """
    p = cv2.cvtColor(layer, cv2.COLOR_RGBA2RGB)
    a = cv2.merge([cv2.extractChannel(layer, 3)] * 3)
    ua = cv2.multiply(under, a, scale=1 / 255, dtype=cv2.CV_32F)
    if mode == "normal":                          # B = c
        change = cv2.subtract(p, ua, dtype=cv2.CV_32F)
    else:
        up = cv2.multiply(under, p, scale=1 / 255, dtype=cv2.CV_32F)
        if mode == "multiply":                    # B = u c
            change = up - ua
        elif mode == "screen":                    # B = u + c - u c
            change = p - up
        elif mode == "overlay":                   # B = 2 u c for dark u, 1 - 2 (1 - u)(1 - c) for light
            change = np.where(under < 128, 2 * up - ua, 2 * (p + ua - up) - a - ua)
        elif mode == "soft light":                # B = (1 - 2 c) u^2 + 2 c u (Pegtop)
            change = under * np.float32(1 / 255) * (ua - 2 * up) + 2 * up - ua
    return cv2.convertScaleAbs(cv2.scaleAdd(change, opacity, under.astype(np.float32)))


def lay(image, mask, mark, matrix, opacity: float, mode: str, wrap=False, alpha=MASK_ALPHA, least=MIN_CHANGE):
    """Lays a mark on the image (H, W, 3) uint8 and its truth on the mask (H, W) uint8 {0, 1}, both in place.

    -> mean change of the pixels with more than `alpha`, in levels of 255. Where it is under `least`, nothing
    is laid; None, and nothing laid, where the mark lies outside.
    """
    if (warped := warp(mark, matrix, image.shape[1], image.shape[0], wrap)) is None:
        return None
    layer, where = warped
    inside = where_alpha(layer, alpha)
    composite = blend(image[where], layer, opacity, mode)
    change = sum(cv2.mean(cv2.absdiff(composite, image[where]), inside)) / 3
    if change >= least:
        image[where] = composite
        mask[where] |= inside & 1
    return change if inside.any() else None


def paste(image, mask, path, levels, w: int, h: int, angle: float, x: int, y: int, opacity, mode) -> dict:
    """Lays a logo, made w x h, its turned box with the corner at (x, y), and tells what was done."""
    level, (W, H) = pick_level(levels, w, h), turned_size(w, h, angle)
    matrix = placement(level, w, h, angle, x + (W - w) / 2, y + (H - h) / 2)
    lay(image, mask, level, matrix, opacity, mode, alpha=0, least=0)
    return {"kind": "logo", "x": x, "y": y, "width": w, "height": h, "angle": angle, "opacity": opacity,
            "blend": mode, "mark": Path(path).name}


# ---------------------------------------------------------------- camera: what happens to pictures afterwards

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


def vary(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The photo before it is marked: mirrored, graded or grey."""
    if rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if rng.random() < 0.3:
        image = curve(rng, image, 0.1)
    if rng.random() < 0.04:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return image


def cut_window(photo: np.ndarray, W: int, H: int, x: int, y: int, w: int, h: int) -> np.ndarray:
    """The w x h window at (x, y) of the photo as if it were W x H, without resizing what is not seen."""
    ph, pw = photo.shape[:2]
    top, left = y * ph // H, x * pw // W
    crop = photo[top:max(round((y + h) * ph / H), top + 1), left:max(round((x + w) * pw / W), left + 1)]
    if crop.shape[:2] == (h, w):
        return crop.copy()
    shrink = h / crop.shape[0]                    # area averaging is slow, and matters below 0.6
    return cv2.resize(crop, (w, h), interpolation=cv2.INTER_CUBIC if shrink > 1 else
                      cv2.INTER_LINEAR if shrink > 0.6 else cv2.INTER_AREA)


def crop(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, side: int):
    """image (H, W, 3), mask (H, W) uint8 {0, 1} -> both scaled, and their side x side window at the mark."""
    h, w = mask.shape
    least = min(h, w)
    short = side if rng.random() < 0.3 else rng.uniform(side, max(side, min(1.9 * side, 1.5 * least)))
    W, H = (max(round(n * short / least), side) for n in (w, h))
    ways = (cv2.INTER_AREA, cv2.INTER_AREA) if short < least else (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    image, mask = (cv2.resize(a, (W, H), interpolation=way) for a, way in zip((image, mask * 255), ways))
    mask //= 128
    x, y, w, h = cv2.boundingRect(mask) if mask.any() else (0, 0, W, H)
    at = rng.uniform((x, y), (x + w, y + h)) - rng.uniform(0.15, 0.85, 2) * side
    x, y = np.clip(at, 0, (W - side, H - side)).astype(int).tolist()
    window = np.s_[y:y + side, x:x + side]
    return image[window].copy(), mask[window].copy()


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

class Synth:
    """Samples without end: a map-style Dataset, though not in name, so that this file starts without torch.

    images, logos: folders, searched to any depth (None: generated backgrounds, text marks only).
    size: side of a square crop, for training; None keeps each photo's own size. The default recipe's crops
    are mixed as CROPS says, where there are logos and the kinds are all of KINDS.
    held_out takes the share of photos, logos and fonts that training never sees.
    Index i of the Dataset is make_sample(seed, i); n is its length.
    kinds: kind of mark -> weight, in the default recipe. Recipe "own" lays the given logos and nothing else,
    single or tiled: for those who look for one mark.
    Raises ValueError with one sentence where a folder is missing or holds nothing usable.
    """

    def __init__(self, images=None, logos=None, recipe="default", size=None, held_out=False, seed=0,
                 n=2**31 - 1, kinds=KINDS):
        if recipe not in (*RECIPES, OWN):
            raise ValueError(f"no recipe {recipe!r}; there are {', '.join((*RECIPES, OWN))}")
        self.images, self.recipe, self.size, self.seed, self.n = images, recipe, size, seed, n
        self.kinds = OWN_KINDS if recipe == OWN else kinds
        self.photos = take_part(find_files(images, PHOTO_TYPES), images, held_out)
        if images is not None and not self.photos:
            raise ValueError(f"no photo in {images} (looked for {' '.join(PHOTO_TYPES)})")
        self.marks = Marks(*(take_part(find_files(logos, types), logos, held_out)
                             for types in (LOGO_TYPES, FONT_TYPES)), words=recipe != OWN)
        self.mixes = False                        # are the crops mixed as CROPS says?
        if recipe != "default" or size:
            usable = self.marks.any_logo(np.random.default_rng(0)) is not None
            if recipe != "default" and not usable:
                raise ValueError(f"recipe {recipe} needs logos, and there is no usable one in {logos}")
            self.mixes = recipe == "default" and kinds is KINDS and usable

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
        recipe = pick(rng, tuple(CROPS), tuple(CROPS.values())) if self.mixes else self.recipe
        make = {"default": self.default, OWN: self.default, "plain": partial(self.default, plain=True),
                "reference": self.reference,
                "clwd": self.clwd}.get(recipe, partial(self.logo_set, recipe=recipe))
        image, mask, meta = make(rng)
        if self.mixes and recipe not in ("default", "plain"):      # those make crops themselves
            image, mask = crop(rng, image, mask, self.size)
        if recipe != self.recipe:
            meta["crop_of"] = recipe
        meta |= {"recipe": self.recipe, "seed": seed, "index": i, "coverage": round(float(mask.mean()), 6)}
        planes = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(image, list(planes))            # much faster than a transposed copy
        return planes, mask[None], meta

    def background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A photo (H, W, 3) uint8 and its name."""
        if not self.photos:
            return generate_background(rng), "generated"
        found = pick_readable(rng, self.photos, read_photo)
        if found is None:
            raise ValueError(f"none of the {len(self.photos)} photos in {self.images} can be read")
        return found[1], Path(found[0]).name

    # -- ours

    def default(self, rng: np.random.Generator, plain: bool = False):
        """What people meet: any number of marks on a photo or a window of it; then the camera.

        plain: always marked, by PLAIN_KINDS in normal mode, and saved once and well, or not at all.
        """
        kinds = PLAIN_KINDS if plain else self.kinds
        generated = not self.photos or rng.random() < 0.03
        photo, name = (generate_background(rng), "generated") if generated else self.background(rng)
        if rng.random() < 0.05:
            photo = passepartout(rng, photo)
        if self.size and min(photo.shape[:2]) < self.size and rng.random() < CONTINUED:
            # enlarged, every scene would be softer than the marks on it; large photos made small are not
            more = rng.uniform(0.2, 1)
            bottom, right = (round(n * more) for n in photo.shape[:2])
            photo = cv2.copyMakeBorder(photo, 0, bottom, 0, right, cv2.BORDER_REFLECT)
        H, W = photo.shape[:2]
        if side := self.size:                     # marks lie on the whole frame; the crop is a window of it
            if rng.random() < ENLARGED:           # as model.fit does with small pictures
                side = round(side / rng.uniform(1, 2))
            # half of the time the window holds all it can, since a large mark needs its surroundings
            largest = max(side, min(1.9 * side, 1.1 * min(H, W)))
            scale = (side if rng.random() < 0.5 else rng.uniform(side, largest)) / min(H, W)
            H, W = max(round(H * scale), side), max(round(W * scale), side)
        # the other crops of CROPS are all marked; with them, a third of all is clean
        clean = 0 if plain else 104 if self.mixes else 22
        count = pick(rng, (0, 1, 2, 3, 4), (clean, 48, 18, 8, 4))
        drawn = [draw_mark(rng, self.marks, W, H, kinds) for _ in range(count)]
        h, w = (side, side) if side else (H, W)
        oy, ox = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        if drawn and rng.random() < 0.85 and not drawn[0][2]["wrap"]:      # look where the first mark is
            mark, matrix, _ = drawn[0]
            at = matrix @ [rng.uniform(0, mark.shape[1]), rng.uniform(0, mark.shape[0]), 1]
            at = np.clip(at - rng.uniform(0.15, 0.85, 2) * (w, h), 0, (W - w, H - h))
            ox, oy = at.astype(int).tolist()
        image = vary(rng, cut_window(photo, W, H, ox, oy, w, h))
        mask, laid = np.zeros((h, w), np.uint8), []
        for mark, matrix, meta in drawn:
            for _ in range(RETRIES):
                opacity = pick(rng, (rng.uniform(0.12, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.8, 1)),
                               (40, 38, 22))
                mode = "normal" if plain else pick(
                    rng, ("normal", "screen", "multiply", "overlay", "soft light"), (68, 8, 11, 10, 3))
                matrix = matrix - [[0, 0, ox], [0, 0, oy]]
                change = lay(image, mask, mark, matrix, opacity, mode, meta["wrap"])
                if change is None:                # outside the window
                    break
                if change >= MIN_CHANGE:
                    laid.append(meta | {"opacity": round(opacity, 3), "blend": mode})
                    break
                mark, matrix, meta = draw_mark(rng, self.marks, W, H, kinds)
        if not plain:
            image, quality = camera(rng, image)
        elif quality := pick(rng, (None, int(rng.integers(75, 97)))):
            image = jpeg(image, quality)
        if side != self.size:
            image = cv2.resize(image, (self.size, self.size),
                               interpolation=pick(rng, (cv2.INTER_LINEAR, cv2.INTER_CUBIC)))
            mask = cv2.resize(mask * 255, (self.size, self.size)) // 128
        return image, mask, {"photo": name, "window": [ox, oy, W, H], "marks": laid, "jpeg": quality}

    # -- the field's (RECIPES in README): one or more logos, pasted; each keeps its own rule of truth

    def reference(self, rng: np.random.Generator):
        """The public notebook: 1-5 logos, diagonal U(.05, .70) of the image's, truth where alpha > 0."""
        image, name = self.background(rng)
        H, W = image.shape[:2]
        mask, metas = np.zeros((H, W), np.uint8), []
        for _ in range(int(rng.integers(1, 6))):
            path, levels = self.marks.any_logo(rng)
            lh, lw = levels[0].shape[:2]
            scale = rng.uniform(0.05, 0.70) * math.hypot(W, H) / math.hypot(lw, lh)
            w, h = max(round(lw * scale), 1), max(round(lh * scale), 1)
            angle = rng.uniform(0, 360) if rng.random() < 0.5 else 0.0
            x, y = (int(rng.integers(min(10 - n, N - 10), max(10 - n, N - 10) + 1))      # may overhang
                    for n, N in zip(turned_size(w, h, angle), (W, H)))
            mode = pick(rng, ("normal", "multiply", "overlay"))
            metas.append(paste(image, mask, path, levels, w, h, angle, x, y, rng.uniform(0.3, 1), mode))
        return image, mask, {"photo": name, "marks": metas, "jpeg": None}

    def clwd(self, rng: np.random.Generator):
        """WDNet's CLWD: 256 x 256, one logo, width and height each U{10..256}; truth where it changed the
        photo by more than 15/255 summed over RGB; then JPEG 75."""
        photo, name = self.background(rng)
        clean = cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA)
        path, levels = self.marks.any_logo(rng)
        w, h = rng.integers(10, 257, 2).tolist()
        angle = next((a for a in rng.uniform(0, 360, 20) if max(turned_size(w, h, a)) <= 256), 0.0)
        x, y = (int(rng.integers(256 - n + 1)) for n in turned_size(w, h, angle))        # wholly inside
        image, mask = clean.copy(), np.zeros((256, 256), np.uint8)
        meta = paste(image, mask, path, levels, w, h, angle, x, y, rng.uniform(0.3, 0.7), "normal")
        mask = (cv2.absdiff(image, clean).sum(2, dtype=np.uint16) > 15).astype(np.uint8)
        return jpeg(image, 75), mask, {"photo": name, "marks": [meta], "jpeg": 75}

    def logo_set(self, rng: np.random.Generator, recipe: str):
        """LOGO-L, -H, -Gray: one square-resized logo, side min(U·W, U·H), opacity U, any angle; truth where
        its alpha > 0. The ranges are the papers'; the authors' synthesis notebook itself uses .4 to .8."""
        low, high = (0.60, 0.85) if recipe == "logo-h" else (0.35, 0.60)
        image, name = self.background(rng)
        H, W = image.shape[:2]
        path, levels = self.marks.any_logo(rng)
        side = max(round(min(rng.uniform(low, high) * W, rng.uniform(low, high) * H)), 1)
        if recipe == "logo-gray":
            grey = [cv2.cvtColor(level, cv2.COLOR_RGBA2GRAY) for level in levels]
            levels = [cv2.merge([g, g, g, level[..., 3]]) for g, level in zip(grey, levels)]
        angle, mask = rng.uniform(0, 360), np.zeros((H, W), np.uint8)
        x, y = (int(rng.integers(min(N - n, 0), max(N - n, 0) + 1))
                for n, N in zip(turned_size(side, side, angle), (W, H)))
        meta = paste(image, mask, path, levels, side, side, angle, x, y, rng.uniform(low, high), "normal")
        return image, mask, {"photo": name, "marks": [meta], "jpeg": None}


# ---------------------------------------------------------------- command line

def contact_sheet(synth: Synth, seed: int, n: int, cell: int = 320, columns: int = 6) -> Image.Image:
    """n samples in rows of six, each image above its mask."""
    sheet = Image.new("RGB", (columns * cell, -(-n // columns) * 2 * cell), "white")
    for i in range(n):
        image, mask, _ = synth.make_sample(seed, i)
        for row, picture in enumerate((image.transpose(1, 2, 0), np.repeat(mask[0][..., None] * 255, 3, 2))):
            thumb = Image.fromarray(picture)
            thumb.thumbnail((cell - 6, cell - 6))
            sheet.paste(thumb, (i % columns * cell, (i // columns * 2 + row) * cell))
    return sheet


def sheet_of_kinds(images, logos, seed: int, cell: tuple[int, int] = (300, 200), columns=4) -> Image.Image:
    """A row for each kind of mark in the default recipe, its name before it."""
    sheet = Image.new("RGB", (columns * cell[0] + 80, len(KINDS) * cell[1]), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for row, kind in enumerate(KINDS):
        synth = Synth(images, logos, kinds={kind: 1})
        samples = (synth.make_sample(seed + row, i)[:2] for i in count(1))
        shown = (image for image, mask in samples if mask.mean() >= 0.002)       # not clean, nor next to it
        pen.text((8, (row + 0.5) * cell[1]), kind, "black", font=font, anchor="lm")
        for column, image in enumerate(islice(shown, columns)):
            thumb = Image.fromarray(image.transpose(1, 2, 0))
            thumb.thumbnail((cell[0] - 6, cell[1] - 6))
            sheet.paste(thumb, (column * cell[0] + 80, row * cell[1]))
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
    # Ctrl-C is the main process's business: it is noted, and ends the export after the next line, when each
    # worker has finished its samples; as an exception it would leave the pool to make all the others first
    stop = []
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(1))
    try:
        with meta.open("a") as f, ProcessPoolExecutor(workers, initializer=signal.signal,
                                                      initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            todo = pool.map(write_sample, repeat(synth), repeat(out), repeat(seed), range(done, n),
                            chunksize=8)
            for line in tqdm(todo, total=n, initial=min(done, n), unit="sample", disable=None):
                f.write(line)
                f.flush()
                if stop:
                    pool.shutdown(cancel_futures=True)
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, handler)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path,
                        help="a picture (.png, .jpg) for a contact sheet, or a folder for a data set")
    # what is mixed
    parser.add_argument("--images", type=Path, help="folder of photos (default: generated backgrounds)")
    parser.add_argument("--logos", type=Path, default=Path(__file__).parent / "logos",
                        help="folder of logos with alpha, and of fonts for text marks (default: %(default)s)")
    parser.add_argument("--recipe", choices=(*RECIPES, OWN), default="default",
                        help="how marks are laid on photos; own: the default with these logos and nothing "
                        "else (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="take the files that training never sees")
    parser.add_argument("--size", type=int,
                        help="square crops of this side, as in training (default: whole photos)")
    parser.add_argument("--kinds", action="store_true", help="contact sheet with a row for each kind of mark")
    # how many
    parser.add_argument("--n", type=int, default=24, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed, other samples (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes for a data set (default: all cores)")
    args = parser.parse_args(argv)
    try:
        synth = Synth(args.images, args.logos, args.recipe, args.size, args.held_out)
        if args.kinds:
            sheet_of_kinds(args.images, args.logos, args.seed).save(args.out)
        elif args.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
            contact_sheet(synth, args.seed, args.n).save(args.out)
        else:
            export(synth, args.out, args.seed, args.n, args.workers)
    except (ValueError, OSError) as e:
        print(f"synth.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synth.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
