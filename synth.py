"""Watermarked photos with exact masks, without end: sample i is a pure function of (seed, i).

    python synth.py preview.png                                     # a contact sheet on generated backgrounds
    python synth.py preview.png --images photos/ --logos logos/     # with your photos, logos and fonts
    python synth.py set/ --n 1000 --recipe clwd --images photos/    # set/images, set/masks, set/meta.jsonl

    sample = Synth("photos/", "logos/").make_sample(seed=0, i=7)    # image (3, H, W) uint8,
                                                                    # mask (1, H, W) uint8 {0, 1}

Read top to bottom: files and their split, letters, backgrounds, drawing, kinds of marks, laying a mark, the
camera, crops, recipes, the command line. To add a kind of mark, write one function and one line of KINDS.
A mark is uint8 RGBA (h, w, 4), colour premultiplied by alpha, because every blend mode used here is linear in
the mark's colour and so needs no division. Coverage is uint8 (h, w). Colours are RGB in [0, 1].
"""
import argparse
import json
import math
import os
import re
import signal
import sys
import unicodedata
import uuid
import zlib
from bisect import bisect
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import lru_cache, reduce
from itertools import accumulate, count, islice
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

MASK_ALPHA = 0.08          # the mask is where the mark's own alpha, before opacity, is above this
MIN_CHANGE = 10            # levels of 255 by which a pixel must change to be seen on flat ground
TEXTURE = 0.9              # share of the local contrast by which it must change on textured ground
COLOUR = 0.5               # share of the strongest channel's change that counts: blue on brown is seen
SEEN = 0.55                # a mark is laid again if a smaller share of its pixels is seen
RETRIES = 5                # a mark is laid again so often; then the sample goes without it
HELD_OUT = 10              # per cent of the files that training never sees, by a hash of the file name
MAX_LOGO = 512             # logos are kept at this longest side, in pixels; larger ones are shrunk
LOGO_CACHE = 800           # logos that each process keeps decoded: this bounds its memory
PHOTO_SIDE = 1024          # photos are decoded at reduced size as long as the longest side stays above this
MAX_PIXELS = 100_000_000   # larger pictures are left out, but not JPEG photos, which decode at 1/8
FLAT = 20                  # levels of 255: an opaque logo loses a ground that is this near to white or black
DRAWINGS = 0.06            # share of the backgrounds that are flat drawings
PAGES = 0.03               # share that are drawn pages or screens
LEAVES = 0.02              # share that are dead leaves, beside photos
LOOK = 460                 # pixels of the short side of most photos when predict.py looks at them
ENLARGED = 0.5             # share of the crops that are marked and saved small, then enlarged
CONTINUED = 0.35           # share of the photos smaller than the crop that are continued by their mirror image
COUNTS = {0: 27, 1: 48, 2: 15, 3: 6, 4: 4}        # number of marks -> weight: with misses, a third is clean
BLENDS = {"normal": 80, "multiply": 8, "screen": 6, "overlay": 6}      # blend mode -> weight
EXPORTED = 8               # samples that a worker of an export makes at a time
PHOTO_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LOGO_TYPES, FONT_TYPES = (".png", ".webp", ".jpg", ".jpeg"), (".ttf", ".otf")
FORMATS = "BMP JPEG PNG TIFF WEBP".split()        # what Pillow may open; EPS would start a program
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
TEMPORARY = "." + 32 * "[0-9a-f]" + ".tmp"        # glob of unfinished files, which a kill leaves behind
OWN = "own"                # the default recipe with the given logos alone: no words, no marks but these
RECIPES = {                # way of compositing -> where its truth is 1; published IoU / F1, of another test set
    "default": (f"alpha > {MASK_ALPHA:g}", "-"), "reference": ("alpha > 0", ".385 / -, a fork's run"),
    "clwd": ("sum abs(J-I) > 15/255", "-"), "logo-l": ("alpha > 0", ".696 / .788, DENet"),
    "logo-h": ("alpha > 0", ".797 / .874, DENet"), "logo-gray": ("alpha > 0", ".743 / .828, DENet")}
Image.MAX_IMAGE_PIXELS = None                     # our own limit, in place of Pillow's error


# ---------------------------------------------------------------- files and their split

def find_files(root: str | Path | None, types: tuple[str, ...]) -> list[str]:
    """All files below root with one of the endings, sorted: an index means the same file everywhere.

    Links to folders are followed, and each folder is entered once, by its own name if it has one below root.
    What cannot be read, or is no file (a named pipe), is left out and said.
    """
    if root is None:
        return []
    if not Path(root).is_dir():
        raise ValueError(f"{root} is not a folder")
    found, folders, links, entered = [], [str(root)], [], set()
    while folders or links:
        folder = (folders or links).pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as e:
            warn_once(f"{folder} cannot be listed and is left out ({e.strerror})")
            continue
        if (identity := (status.st_dev, status.st_ino)) in entered:
            continue
        entered.add(identity)
        for entry in entries:                     # a Mac puts ._x.jpg, notes about it, beside x.jpg
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append(entry.path)
            elif entry.name.lower().endswith(types) and not entry.name.startswith("._"):
                if os.path.isfile(entry.path):
                    found.append(entry.path)
                else:
                    warn_once(f"{entry.path} is no file and is left out")
    return sorted(found)


def is_held_out(path: str, root: str | Path) -> bool:
    """Decides by a folder on the way from root that is called train or val, else by a hash of the file name."""
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
    say(message)


def say(message: str) -> None:
    """Prints on stderr, without the newlines and terminal commands that file names may hold."""
    print("synth.py:", "".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)


def is_too_large(path: str, header: Image.Image) -> bool:
    if header.width * header.height <= MAX_PIXELS:
        return False
    warn_once(f"{path} has more than {MAX_PIXELS // 10**6} megapixels and is left out")
    return True


def pick_readable(rng: np.random.Generator, paths: list[str], read):
    """A random path, or the next one that read() can read -> (path, what it read), or None."""
    start = int(rng.integers(len(paths))) if paths else 0
    for k in range(len(paths)):
        path = paths[(start + k) % len(paths)]
        if (found := read(path)) is not None:
            return path, found
    return None


def pick(rng: np.random.Generator, options, weights=None):
    """One of a sequence, or a key of a dict of weights. Unlike rng.choice it keeps Python types."""
    if isinstance(options, dict):
        options, weights = tuple(options), tuple(options.values())
    if weights is None:
        return options[int(rng.random() * len(options))]
    sums = list(accumulate(weights))
    return options[bisect(sums, rng.random() * sums[-1])]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


# ---------------------------------------------------------------- letters: what marks say, in which script

WORDS = ("preview|sample|proof|copyright|watermark|photo|studio|images|stock|draft|confidential|original|"
         "press|media|gallery|archive|demo|approved|paid|free|final|exclusive|void|design|art|creative|foto|"
         "picture|do not copy|all rights reserved|for review only|low res|image bank|fine art|no reuse|"
         "my photography").split("|")
TEXTS = {                  # what is said -> templates; make_text fills in what is in braces
    "words": "{word}|{word}|{word}|{word}|{word}|{word}|{name}|{name}|{name} {name}|{name} {word}|{site}.com|"
             "www.{site}.com|{site}.net|{site}.org|{n2}|#{n4}|No. {n5}|ID {n7}|{n9}|{A}|{A}{A}|{A}{A}{A}",
    "name": "{name}|{name}|{name} {name}|{word}",
    "site": "www.{site}.com|{site}.com|{site}{site}.com|{site}.net|{site}.de|{site}.co.uk|{site}.cn|@{site}|"
            "{n3}-{n3}-{n4}|+{n2} {n3} {n6}|{n4} {n4}",
    "credit": "© {name}|© {name} {name}|© {year} {name} {name}|{name} {year}|Photo by {name}|"
              "Photo: {name} {name}|{year}-{m}-{m} {m}:{n2}|{m} {m} {year}|{name} Photography|"
              "www.{site}.com|{name} {name}|"
              "Copyright {year} {name}. All rights reserved.|photo stock {n9}",
    "label": "AI|AI generated|AI-generated|Made with AI|Created with AI|Imagined with AI|Generated by {name}|"
             "Content credentials|Shot on {name} {n2}|{name} Dual Camera|{name} AI|{name}|{name}"}
SCRIPTS = {                # script -> first and last letter, words
    "Han": ("一", "鿿", "样品 图片 版权所有 禁止转载 摄影 预览 内部资料 仅供参考 由AI生成 AI生成 水印 原创 工作室"),
    "Kana": ("ぁ", "ヺ", "サンプル 見本 写真 無断転載禁止 プレビュー スタジオ AI生成 フォト"),
    "Hangul": ("가", "힣", "샘플 사진 미리보기 저작권 무단복제금지 스튜디오 AI생성 견본"),
    "Arabic": ("ء", "ي", "عينة صورة محفوظة حقوق معاينة تصوير مسودة سري"),
    "Hebrew": ("א", "ת", "דוגמה תמונה צילום סטודיו טיוטה סודי"),
    "Devanagari": ("ऄ", "ह", "नमूना चित्र फोटो गोपनीय छवि नकल"),
    "Bengali": ("অ", "হ", "নমুনা ছবি আলোকচিত্র গোপনীয়"),
    "Tamil": ("அ", "ஹ", "மாதிரி படம் புகைப்படம்"),
    "Thai": ("ก", "ฮ", "ตัวอย่าง ภาพถ่าย ลิขสิทธิ์ ห้ามคัดลอก"),
    "Greek": ("Α", "ω", "δείγμα φωτογραφία προεπισκόπηση αθήνα"),
    "Cyrillic": ("А", "я", "образец фото копия водяной москва студия черновик предпросмотр"),
    "Georgian": ("ა", "ჰ", "ნიმუში ფოტო სურათი ასლი"),
    "Armenian": ("Ա", "ֆ", "նմուշ լուսանկար պատկեր")}
SYLLABLES = ("ba be bo ca co da de do el en fa fi ga go ha he in ja ka ki la le lo ma me mi mo na ne no or "
             "pa pe pi ra re ri ro sa se si so ta te ti to un va ve vi wa xa yo za zen ton ley son ber man "
             "well ford stein ard").split()
HAS_RAQM = features.check("raqm")                 # shapes Arabic and Indic letters, and turns right to left


@lru_cache(maxsize=None)
def read_font(path: str) -> str | None:
    """The path if the font can be drawn: FreeType opens fonts whose letters it then cannot draw."""
    try:
        ImageFont.truetype(path, 12).getmask("Aa1")
        return path
    except OSError as e:
        warn_once(f"{path} cannot be drawn and is left out ({e})")
        return None


def open_font(path: str | None, px: int, engine=None):
    return ImageFont.truetype(path, px, layout_engine=engine) if path else ImageFont.load_default(px)


load_font = lru_cache(maxsize=32)(open_font)
measure_font = lru_cache(maxsize=256)(open_font)  # at one size: what a font has, and how wide it is


@lru_cache(maxsize=2**16)
def has_letter(path: str | None, letter: str) -> bool:
    """Fonts draw one and the same box, or nothing, for every letter they lack; damaged ones raise OSError."""
    font = measure_font(path, 12, ImageFont.Layout.BASIC)
    try:
        drawn, missing = (bytes(font.getmask(c)) for c in (letter, "\uffff"))
    except OSError:
        return False
    return drawn != missing or not missing if letter == " " else drawn not in (missing, b"")


@lru_cache(maxsize=None)
def scripts_of(path: str | None) -> dict[str, tuple[list[str], list[str]]]:
    """Script -> the letters and the words of it that the font has, for the scripts of which it has any."""
    found = {}
    for script, (first, last, words) in SCRIPTS.items():
        words = [word for word in words.split() if all(has_letter(path, c) for c in word)]
        if words:
            letters = (c for c in map(chr, range(ord(first), ord(last) + 1)) if c.isalpha())
            letters = [c for c in letters if has_letter.__wrapped__(path, c)]
            if len(letters) >= 20:                # less is a few signs of another script's font
                found[script] = letters, words
    return found


def fill(rng: np.random.Generator, field: str) -> str:
    """A field of a template: an invented name, a trade word, a year, a month, a letter, or n figures."""
    if field in ("name", "site"):
        name = "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 4))))
        return name.capitalize() if field == "name" else name
    if field == "word":
        return pick(rng, WORDS)
    if field == "A":
        return pick(rng, "ABCDEFGHIKLMNOPRSTUVWXYZ")
    if field in ("year", "m"):
        return str(rng.integers(1998, 2028) if field == "year" else rng.integers(1, 13))
    return str(rng.integers(10 ** (int(field[1]) - 1), 10 ** int(field[1])))


def make_text(rng: np.random.Generator, font: str | None, what: str = "words") -> str:
    """One of TEXTS, or words in another script that the font has. A font without Latin gets only the latter."""
    text = re.sub(r"{(\w+)}", lambda field: fill(rng, field[1]), pick(rng, TEXTS[what].split("|")))
    if what in ("words", "name"):
        text = pick(rng, (str, str.upper, str.title, str.lower))(text)
    scripts = scripts_of(font)
    if not scripts or (rng.random() < 0.7 and all(has_letter(font, c) for c in text)):
        return text
    script = pick(rng, tuple(scripts))
    letters, words = scripts[script]
    if rng.random() < 0.6:
        return pick(rng, words)
    n = int(rng.integers(2, 5 if script in ("Han", "Kana", "Hangul") else 9))
    return "".join(pick(rng, letters) for _ in range(n))


def draw_glyphs(text: str, font: str | None, px: int) -> np.ndarray:
    """Coverage of a text, its lines set at px pixels, cropped tightly."""
    if not HAS_RAQM and unicodedata.bidirectional(text[-1:] or " ") in ("R", "AL"):
        text = text[::-1]
    if not has_letter(font, " "):
        text = text.replace(" ", "")
    try:
        rows = [load_font(font, px).getmask(line) for line in text.split("\n")]
    except OSError as e:
        warn_once(f"{font} has letters that cannot be drawn: another font stands in for them ({e})")
        return draw_glyphs(text, None, px)
    rows = [np.frombuffer(bytes(a), np.uint8).reshape(a.size[::-1]) for a in rows if all(a.size)]
    a = stack(rows, 0, px // 5)[:2048, :4096] if rows else np.zeros((1, 1), np.uint8)
    x, y, w, h = cv2.boundingRect(a)
    return a[y:y + max(h, 1), x:x + max(w, 1)]


def text_width(text: str, font: str | None) -> float:
    """Of one line, at 32 pixels."""
    try:
        return measure_font(font, 32).getlength(text)
    except OSError:                               # draw_glyphs has a word on that
        return measure_font(None, 32).getlength(text)


# ---------------------------------------------------------------- backgrounds

def read_photo(path: str) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB as displayed, shrunk while decoding if it is huge; None if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as header:
            factor = max(header.size) // PHOTO_SIDE
            if header.format not in ("JPEG", "MPO") and is_too_large(path, header):
                return None
        flag = (cv2.IMREAD_REDUCED_COLOR_8 if factor >= 8 else cv2.IMREAD_REDUCED_COLOR_4 if factor >= 4
                else cv2.IMREAD_REDUCED_COLOR_2 if factor >= 2 else cv2.IMREAD_COLOR)
        return cv2.cvtColor(cv2.imdecode(np.fromfile(path, np.uint8), flag), cv2.COLOR_BGR2RGB)
    except Exception:                             # Pillow's plugins and cv2 raise many kinds on garbage
        warn_once(f"{path} cannot be read and is left out")
        return None


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


def draw_shape(rng, image: np.ndarray, centre: tuple[int, int], r: float, colour, line: int = -1) -> None:
    """An ellipse, filled or a line, or a polygon; r pixels from its centre at most."""
    if rng.random() < 0.5:
        axes = (int(r) + 1, int(r * rng.uniform(0.3, 1)) + 1)
        cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour, line, cv2.LINE_AA)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        points = np.array(centre) + r * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)


def generate_background(rng: np.random.Generator, W: int = 480, H: int = 352) -> np.ndarray:
    """Dead leaves over 1/f texture (Lee, Mumford & Huang 2001): occluding shapes with power-law sizes."""
    image = np.empty((H, W, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    scene = rng.uniform(0.1, 0.9, 3)              # leaves of one scene share a palette
    for r in np.sort(rng.pareto(1.5, int(rng.integers(5, 60))) * 0.04)[::-1]:
        r = min(r, 0.7) * max(H, W)
        colour = (255 * np.clip(scene + rng.normal(0, 0.25, 3), 0, 1)).tolist()
        centre = (int(rng.integers(0, W)), int(rng.integers(0, H)))
        draw_shape(rng, image, centre, r, colour)
    light, grain = (cv2.resize(noise_texture(int(k)), (W, H)) for k in rng.integers(0, 16, 2))
    noise = cv2.addWeighted(light, 255 * rng.uniform(0, 0.15), grain[::-1], 255 * rng.uniform(0, 0.06), 0)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def print_text(rng, art: "Art", image: np.ndarray, x: int, y: int, w: int, h: int, px: int, ink) -> None:
    """Fills a box of the image with lines of one long text, cut where they end."""
    font, box = art.font(rng), image[max(y, 0):y + h, max(x, 0):x + w]
    text = draw_glyphs(" ".join(make_text(rng, font) for _ in range(3 + max(w, 1) // (5 * px))), font, px)
    a = np.zeros(box.shape[:2], np.uint8)
    for top in range(0, len(a) - len(text), max(int(1.5 * px), len(text))):
        n = w if rng.random() < 0.8 else int(w * rng.uniform(0.3, 1))
        line = text[:, int(rng.integers(max(text.shape[1] - n, 1))):][:, :min(n, a.shape[1])]
        a[top:top + len(text), :line.shape[1]] = line
    if a.size:
        box[:] = blend(box, tint(a, ink), 1, "normal")


def generate_page(rng: np.random.Generator, art: "Art") -> np.ndarray:
    """A scanned page, slide or screen with its own text, table, chart, buttons and stamp: none is a mark."""
    W, H = pick(rng, ((352, 480), (352, 480), (544, 352), (352, 600)))
    screen = W > H or rng.random() < 0.3
    dark = screen and rng.random() < 0.4
    paper = (rng.integers(10, 70, 3) if dark else 255 - rng.integers(0, 25, 3)).tolist()
    ink = (rng.uniform(0.7, 1) if dark else rng.uniform(0, 0.35),) * 3
    desk = np.clip(rng.integers(20, 236) + rng.normal(0, 30, 3), 0, 255)
    image = np.full((H, W, 3), desk if screen else paper, np.uint8)
    colours = (255 * np.stack([pick_colour(rng) for _ in range(4)])).tolist()
    for _ in range(int(rng.integers(1, 4)) if screen else 1):      # windows, the last one on top; or the page
        m, px = int(rng.integers(6, 30)), int(rng.integers(7, 13))
        x, y, w, h = 0, 0, W, H
        if screen:
            x, y = int(rng.integers(W // 3)), int(rng.integers(H // 3))
            w, h = int(rng.integers(W // 2, W - x + 1)), int(rng.integers(H // 2, H - y + 1))
            cv2.rectangle(image, (x, y), (x + w, y + h), paper, -1)
            cv2.rectangle(image, (x, y), (x + w, y + 18), pick(rng, colours), -1)
            for k in range(3):
                cv2.circle(image, (x + w - 9 - 13 * k, y + 9), 4, pick(rng, colours), -1, cv2.LINE_AA)
            y, h = y + 18, h - 18
        x, y, w, h = x + m, y + m, w - 2 * m, h - 2 * m
        if rng.random() < 0.6:                    # a heading
            print_text(rng, art, image, x, y, w, 4 * px, int(px * rng.uniform(1.4, 2.2)), ink)
            y, h = y + 4 * px, h - 4 * px
        part, n, what = max(h // 2, 1), int(rng.integers(3, 8)), pick(rng, ("text", "text", "chart", "table"))
        for k, top in enumerate(rng.integers(0, part, n).tolist() if what != "text" else ()):
            left = x + k * w // n
            if what == "chart":
                cv2.rectangle(image, (left, y + top), (left + w // n - 5, y + part), pick(rng, colours), -1)
            else:
                cv2.rectangle(image, (x, y), (x + w, y + part * (k + 1) // n), (128,) * 3, 1)
                cv2.rectangle(image, (left, y), (x + w, y + part), (128,) * 3, 1)
                print_text(rng, art, image, left + 3, y + 3, w // n - 5, part - 4, px, ink)
        if what != "text":
            y, h = y + part + 8, h - part - 8
        for k in range(columns := pick(rng, (1, 1, 2))):
            print_text(rng, art, image, x + k * w // columns, y, w // columns - 8, h - 30, px, ink)
        for k in range(pick(rng, (0, 2, 3)) if screen else 0):                                       # buttons
            cv2.rectangle(image, (x + 75 * k, y + h - 22), (x + 75 * k + 64, y + h), pick(rng, colours), -1)
            print_text(rng, art, image, x + 75 * k + 6, y + h - 19, 50, 2 * px, px, ink)
    if not screen and rng.random() < 0.3:                          # a stamp of its own
        mark, matrix = stamp(rng, art, W, H)
        lay(image, np.zeros((H, W), np.uint8), mark, matrix, rng.uniform(0.5, 1), "multiply", seen=0)
    if not screen and rng.random() < 0.6:                          # scanned: a little turned, soft, grainy
        turn = cv2.getRotationMatrix2D((W / 2, H / 2), rng.uniform(-2, 2), 1)
        image = cv2.warpAffine(image, turn, (W, H), borderMode=cv2.BORDER_REPLICATE)
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
        shade = cv2.resize(noise_texture(int(rng.integers(16))), (W, H))
        image = cv2.add(image, shade * rng.uniform(0, 8), dtype=cv2.CV_8U)
    return image


def draw_rows(rng, image: np.ndarray, colour) -> None:
    """Rows of small boxes, all alike or not: lines of text, books on a shelf, dashes, icons."""
    H, W = image.shape[:2]
    left, top = int(rng.integers(W)), int(rng.integers(H))
    columns, rows = int(rng.integers(2, 14)), int(rng.integers(1, 6))
    w, h, alike = int(rng.integers(2, 16)), int(log_uniform(rng, 1, 20)), rng.random() < 0.5
    for bottom in range(top + h, top + h + rows * (2 * h + 3), 2 * h + 3):
        x = left
        for _ in range(columns):
            wide = w if alike else int(w * log_uniform(rng, 0.4, 4)) + 1
            high = h if alike else h + int(rng.integers(h + 1))
            cv2.rectangle(image, (x, bottom - high), (x + wide, bottom), colour, -1)
            x += wide + int(rng.integers(1, 6))


def generate_drawing(rng: np.random.Generator, art: "Art") -> np.ndarray:
    """A flat illustration of shapes, rows of small things and emblems. They belong to it: none is a mark."""
    W, H = pick(rng, ((480, 352), (352, 480), (416, 416), (544, 352)))
    image = np.full((H, W, 3), 255 if rng.random() < 0.4 else rng.integers(150, 256, 3), np.uint8)
    if rng.random() < 0.3:                        # from one colour to another
        shade = np.linspace(0, 1, H)[:, None, None] * rng.integers(-60, 60, 3)                     # (H, 1, 3)
        image = np.clip(image + shade, 0, 255).astype(np.uint8)
    colours = (255 * np.stack([pick_colour(rng) for _ in range(5)])).tolist()
    for _ in range(int(rng.integers(0, 12))):
        centre, r = (int(rng.integers(W)), int(rng.integers(H))), W * log_uniform(rng, 0.02, 0.4)
        draw_shape(rng, image, centre, r, pick(rng, colours), pick(rng, (-1, 1, 3), (60, 20, 20)))
    for _ in range(pick(rng, (0, 1, 2, 3), (40, 20, 20, 20))):
        draw_rows(rng, image, pick(rng, colours))
    for _ in range(int(rng.integers(0, 6))):
        emblem = art.emblem(rng, log_uniform(rng, 0.04, 0.9) * H)
        if rng.random() < 0.5:
            emblem = tint(cv2.extractChannel(emblem, 3), np.array(pick(rng, colours)) / 255)
        lay(image, np.zeros((H, W), np.uint8), *anywhere(rng, emblem, W, H, turned=0.3), 1, "normal", seen=0)
    return image


def passepartout(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A plain border, with a thin line or not: photographers frame, and a frame is no mark."""
    for n in (1, max(2, round(min(photo.shape[:2]) * rng.uniform(0.01, 0.1))))[rng.random() < 0.6:]:
        grey = int(pick(rng, (0, 255, rng.integers(256))))
        photo = cv2.copyMakeBorder(photo, n, n, n, n, cv2.BORDER_CONSTANT, value=(grey,) * 3)
    return photo


def vary(rng: np.random.Generator, image: np.ndarray, mirror: bool = True) -> np.ndarray:
    """The photo before it is marked: mirrored, graded, grey or as if painted."""
    if mirror and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if rng.random() < 0.3:
        image = curve(rng, image, 0.1)
    if rng.random() < 0.04:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if rng.random() < 0.05:                       # as if painted: flat areas, half of the time in few tones
        image = cv2.medianBlur(image, pick(rng, (3, 5, 7, 9)))
        if rng.random() < 0.5:
            step = 256 // int(rng.integers(4, 12))
            tones = np.minimum(np.arange(256) // step * step + step // 2, 255)
            image = cv2.LUT(image, tones.astype(np.uint8))
    return image


# ---------------------------------------------------------------- drawing

def pad(a: np.ndarray, n: int) -> np.ndarray:
    return cv2.copyMakeBorder(a, n, n, n, n, cv2.BORDER_CONSTANT)


def pad_to(mark: np.ndarray, h: int, w: int) -> np.ndarray:
    """The mark in the middle of an empty h x w cell (or larger, where it is larger)."""
    dy, dx = max(h - mark.shape[0], 0), max(w - mark.shape[1], 0)
    return cv2.copyMakeBorder(mark, dy // 2, dy - dy // 2, dx // 2, dx - dx // 2, cv2.BORDER_CONSTANT)


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    return cv2.warpAffine(a, np.float32([[1, 0, dx], [0, 1, dy]]), (a.shape[1], a.shape[0]))


def stack(parts: list[np.ndarray], axis: int, gap: int, align: float = 0.5) -> np.ndarray:
    """Pictures beside (axis 1) or below (axis 0) each other; align across: 0 at the start, 0.5 centred."""
    size, padded = max(p.shape[1 - axis] for p in parts), []
    for p in parts:
        free = size - p.shape[1 - axis]
        before, first = round(free * align), gap if padded else 0
        edges = (first, 0, before, free - before) if axis == 0 else (before, free - before, first, 0)
        padded.append(cv2.copyMakeBorder(p, *edges, cv2.BORDER_CONSTANT))
    return np.concatenate(padded, axis)


def tint(a: np.ndarray, colour) -> np.ndarray:
    """Coverage and a colour -> mark (h, w, 4)."""
    table = (np.arange(256)[:, None] * np.array([*colour, 1]) + 0.5).astype(np.uint8)          # (256, 4)
    return table.view(np.uint32)[:, 0].take(a).view(np.uint8).reshape(*a.shape, 4)


def over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Porter-Duff over, premultiplied."""
    seen = cv2.merge([cv2.bitwise_not(cv2.extractChannel(top, 3))] * 4)
    return cv2.add(top, cv2.multiply(bottom, seen, scale=1 / 255))


def inverted(mark: np.ndarray) -> np.ndarray:
    """White becomes black, and every colour its complement."""
    a = cv2.extractChannel(mark, 3)
    return cv2.subtract(cv2.merge([a] * 4), cv2.bitwise_and(mark, (255, 255, 255, 0)))


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


def style(rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
    """Coverage -> a mark as designers make it: plain, with a shadow, an outline, hollow or embossed."""
    colour = pick_colour(rng)
    other = np.full(3, float(colour.mean() < 0.5))                # the contrasting black or white
    kind = pick(rng, {"plain": 50, "shadow": 26, "outline": 8, "hollow": 8, "emboss": 8})
    edge = max(1, round(a.shape[0] * rng.uniform(0.01, 0.05)))
    if kind == "plain":
        return tint(a, colour)
    a = pad(a, 3 * edge + 1)
    if kind == "shadow":
        shadow = cv2.GaussianBlur(shift(a, edge, edge), (0, 0), float(edge * rng.uniform(0.3, 1)))
        return over(tint(a, colour), tint(cv2.convertScaleAbs(shadow, alpha=rng.uniform(0.3, 0.8)), other))
    if kind == "emboss":
        light, dark = (tint(cv2.subtract(a, shift(a, n, n)), (v,) * 3) for n, v in ((edge, 1), (-edge, 0)))
        face = tint(cv2.convertScaleAbs(a, alpha=pick(rng, (0.1, 0.4, 0.8))), colour)
        return over(over(light, dark), face)
    ring = cv2.dilate(a, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * edge + 1, 2 * edge + 1)))
    return (over(tint(a, colour), tint(ring, other)) if kind == "outline"
            else tint(cv2.subtract(ring, a), colour))


def rounded_box(h: int, w: int, radius: int, line: int = 0) -> np.ndarray:
    """Coverage of a box with round corners, filled, or an outline of `line` pixels."""
    a, fill = Image.new("L", (w, h)), None if line else 255
    ImageDraw.Draw(a).rounded_rectangle((0, 0, w - 1, h - 1), radius, fill, 255, max(line, 1))
    return np.array(a)


def put_plate(rng: np.random.Generator, a: np.ndarray, opaque: bool = False) -> np.ndarray:
    """Coverage on a plate with square or round corners, dark under light letters: a mark."""
    a = pad(a, max(2, round(a.shape[0] * rng.uniform(0.15, 0.6))))
    ink = pick_colour(rng)
    plate = np.full(3, float(ink.mean() < 0.5)) if rng.random() < 0.5 else pick_colour(rng)
    if abs(ink.mean() - plate.mean()) < 0.3:
        ink = np.full(3, float(plate.mean() < 0.5))
    box = rounded_box(*a.shape, int(a.shape[0] * pick(rng, (0, 0.2, 0.5))))
    box = box if opaque else cv2.convertScaleAbs(box, alpha=rng.uniform(0.2, 0.8))
    return over(tint(a, ink), tint(box, plate))


def superformula(side: int, m: int, p: float, turn: float = 0) -> np.ndarray:
    """Coverage (side, side) of a shape with m-fold symmetry: pointed for p < 1, round for 2, a box for more.

    Gielis, "A generic geometric transformation that unifies ... natural and abstract shapes", 2003.
    """
    t = np.linspace(0, 2 * np.pi, 40 * m, endpoint=False)
    r = (np.abs(np.cos(m * t / 4)) ** p + np.abs(np.sin(m * t / 4)) ** p) ** (-1 / p)
    r *= 0.97 / r.max()
    points = side / 2 * (1 + np.stack([r * np.sin(t + turn), r * np.cos(t + turn)], 1))
    a = np.zeros((side, side), np.uint8)
    cv2.fillPoly(a, [np.round(16 * points).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    return a


def draw_sign(rng: np.random.Generator, side: float) -> np.ndarray:
    """Coverage (side, side) of one of the small signs that generators and phones put on pictures."""
    n = max(int(side), 9)
    a, line, half = np.zeros((n, n), np.uint8), max(1, round(n * rng.uniform(0.06, 0.14))), (n // 2, n // 2)
    kind = pick(rng, {"star": 30, "sparkle": 15, "ring": 14, "flower": 13, "badge": 14, "cat": 14})
    if kind == "star":
        return superformula(n, 4, rng.uniform(0.45, 0.75))
    if kind == "flower":
        return superformula(n, int(rng.integers(3, 9)), rng.uniform(0.6, 1.6), rng.uniform(0, 1))
    if kind == "badge":                           # a round-cornered box with a star cut out of it
        star = superformula(max(n * 6 // 10, 4), 4, rng.uniform(0.5, 1))
        return cv2.subtract(rounded_box(n, n, int(n * rng.uniform(0.15, 0.5))), pad_to(star, n, n))
    if kind == "sparkle":                         # a large star and one or two small ones
        for share, x, y in ((0.75, 0, 0.25), (0.4, 0.6, 0), (0.3, 0.7, 0.65))[:pick(rng, (2, 3))]:
            star = superformula(max(int(share * n), 2), 4, 0.55)
            room = a[int(y * n):, int(x * n):][:len(star), :len(star)]
            np.maximum(room, star, out=room)
    elif kind == "ring":                          # whole or open, with a dot or without
        end = pick(rng, (360, 270, 300))
        cv2.ellipse(a, half, (n // 2 - line,) * 2, rng.uniform(0, 360), 0, end, 255, line, cv2.LINE_AA)
        if rng.random() < 0.5:
            cv2.circle(a, half, n // 6, 255, -1, cv2.LINE_AA)
    else:                                         # the outline of a cat's head: two ears, two eyes
        a = superformula(n, 4, 2.5)
        for x in (0, n - 1):
            cv2.fillPoly(a, [np.int32([(x, 0), (x, n // 2), (n // 2, n // 4)])], 255, cv2.LINE_AA)
        a = cv2.subtract(a, cv2.erode(a, None, iterations=line))
        for x in (n * 35 // 100, n * 65 // 100):
            cv2.circle(a, (x, n * 55 // 100), max(1, line // 2), 255, -1, cv2.LINE_AA)
    return a


def cut_out(rgb: np.ndarray) -> np.ndarray | None:
    """Alpha (h, w) for an opaque logo: 0 on the nearly white or black ground that touches its border.

    Edges are unmixed from the ground over two pixels. None where too little of the border is ground.
    """
    def border(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]])
    ground = np.median(border(rgb), 0)
    if FLAT < ground.max() and ground.min() < 255 - FLAT:
        return None
    distance = np.abs(rgb - ground).max(2).astype(np.float32)
    parts = cv2.connectedComponents((distance <= FLAT).astype(np.uint8), connectivity=4)[1]
    outer = np.unique(border(parts))
    clear = np.isin(parts, outer[outer > 0])
    if clear.mean() < 0.02 or border(clear).mean() < 0.3 or clear.all():
        return None
    edge = cv2.dilate(clear.astype(np.uint8), None, iterations=2) > 0
    full = cv2.dilate(distance, None, iterations=3) + 1e-6         # what the mark differs by, close by
    return np.where(clear, 0, np.where(edge, 255 * distance / full, 255)).astype(np.uint8)


def read_logo(path: str) -> np.ndarray | None:
    """(h, w, 4) uint8 RGBA, not premultiplied; None, with the reason said, if it cannot serve."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if is_too_large(path, image):
                return None
            opaque = not image.has_transparency_data
            # cv2 is faster, where it serves; given the name itself, it crashes on one that is not UTF-8
            rgba = None if opaque else cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
            if rgba is None or rgba.dtype != np.uint8 or rgba.shape[2:] != (4,):
                rgba = np.array(image.convert("RGBA"))
            else:
                rgba = cv2.cvtColor(rgba, cv2.COLOR_BGRA2RGBA)
    except Exception as e:                       # Pillow's plugins raise many kinds on garbage
        warn_once(f"{path} cannot be read and is left out ({type(e).__name__})")
        return None
    if opaque:
        if (alpha := cut_out(rgba[..., :3])) is None:
            warn_once(f"{path} has no transparency and no white or black ground, so nothing tells the mark "
                      "from its surroundings: it is left out; save it as a PNG with an alpha channel")
            return None
        warn_once(f"{path} has no transparency: the white or black around it is taken for clear")
        rgba[..., 3] = alpha
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


class Art:
    """The logos and fonts to draw with. words: whether marks may be words."""

    def __init__(self, logos: list[str], fonts: list[str], words: bool = True):
        self.logos, self.fonts, self.words = logos, fonts, words

    def any_logo(self, rng: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]] | None:
        return pick_readable(rng, self.logos, load_logo)

    def font(self, rng: np.random.Generator) -> str | None:
        found = pick_readable(rng, self.fonts, read_font)
        return found and found[0]

    def emblem(self, rng: np.random.Generator, longest: float) -> np.ndarray:
        """A logo as a mark in its own colours, or a sign where there are no logos."""
        if (found := self.any_logo(rng)) is None:
            return tint(draw_sign(rng, longest), pick_colour(rng))
        h, w = found[1][0].shape[:2]
        size = tuple(max(round(n * longest / max(w, h)), 1) for n in (w, h))
        return cv2.resize(pick_level(found[1], *size), size, interpolation=cv2.INTER_LINEAR)

    def logo(self, rng: np.random.Generator, longest: float) -> np.ndarray:
        """The logo in its own colours, or in one colour, as most sites use it."""
        mark = self.emblem(rng, longest)
        return mark if rng.random() < 0.6 else style(rng, cv2.extractChannel(mark, 3))

    def line(self, rng, longest: float, highest: float, what="words", font: str | None = None) -> np.ndarray:
        """Coverage of one line of text, or of one column, within the length and letter height asked for."""
        font = font or self.font(rng)
        text = make_text(rng, font, what)
        if len(text) < 9 and all("\u3040" < c < "\uabff" for c in text) and rng.random() < 0.25:
            text, width = "\n".join(text), 1.5 * 32 * len(text)       # Chinese and Japanese also in columns
        else:
            if text.isascii() and rng.random() < 0.1:
                text = " ".join(text)                                # letters far apart, as in many logos
            width = max(text_width(text, font), 1)
        return draw_glyphs(text, font, int(max(8, min(32 * longest / width, highest))))


# ---------------------------------------------------------------- the kinds of marks that people meet
# Each takes rng, the art, the picture's width and height, and gives a mark and the 2x3 matrix that lays it.

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


def anywhere(rng, mark: np.ndarray, W: int, H: int, turned: float = 0, corner: float = 0, stretch: float = 1):
    """In the middle or anywhere, over the edge too, or upright in a corner; turned, corner: shares.

    stretch: width over height, times what they are.
    """
    if rng.random() < corner:
        return in_corner(rng, mark, W, H)
    angle = pick(rng, (rng.uniform(-45, 45), rng.uniform(-180, 180), 90, -90), (60, 28, 6, 6))
    w, h = round(mark.shape[1] * stretch ** 0.5), round(mark.shape[0] / stretch ** 0.5)
    x, y = (0.5, 0.5) if rng.random() < 0.4 else rng.uniform(-0.3, 1.3, 2)
    angle = angle if rng.random() < turned else 0
    return mark, placement(mark, w, h, angle, round(x * (W - w)), round(y * (H - h)))


def in_corner(rng, mark: np.ndarray, W: int, H: int, across=(35, 15, 50), down=(25, 75)):
    """Near the edge; across: weights of left, middle and right, down: of top and bottom."""
    h, w = mark.shape[:2]
    margin = rng.uniform(0.005, 0.05) * min(W, H)
    x, y = pick(rng, (margin, (W - w) / 2, W - w - margin), across), pick(rng, (margin, H - h - margin), down)
    return mark, placement(mark, w, h, 0, round(x), round(y))      # whole pixels: an upright mark stays sharp


def repeated(rng, cell: np.ndarray, W: int, H: int, turned: float):
    """A cell side by side without end."""
    angle = rng.uniform(-60, 60) if rng.random() < turned else 0
    w, h = (round(math.hypot(W, H)),) * 2 if angle else (W, H)
    mark = np.tile(cell, (h // cell.shape[0] + 1, w // cell.shape[1] + 1, 1))
    h, w = mark.shape[:2]
    x, y = ((N - n) // 2 if angle else -int(rng.integers(n - N + 1)) for n, N in ((w, W), (h, H)))
    return mark, placement(mark, w, h, angle, x, y)


def logo(rng, art, W, H):
    """A logo, upright in a corner, or stretched and turned anywhere as CLWD and the LOGO sets do."""
    share = rng.uniform(0.3, 1.0) if rng.random() < 0.6 else log_uniform(rng, 0.08, 0.5)
    stretch = log_uniform(rng, 0.16, 6) if rng.random() < 0.5 else 1
    return anywhere(rng, art.logo(rng, share * min(W, H)), W, H, turned=0.6, corner=0.25, stretch=stretch)


def name(rng, art, W, H):
    """A large plain name in one flat colour, with an emblem beside or above it or without."""
    word = art.line(rng, log_uniform(rng, 0.3, 1) * W, log_uniform(rng, 0.07, 0.55) * H, "name")
    if rng.random() < 0.35:
        emblem = cv2.extractChannel(art.emblem(rng, min(word.shape[0] * rng.uniform(1, 2.2), 0.5 * H)), 3)
        word = stack([emblem, word], pick(rng, (1, 0)), round(word.shape[0] * rng.uniform(0.1, 0.5)))
    return anywhere(rng, tint(word, pick_colour(rng)), W, H, turned=0.15, corner=0.3)


def across(rng, art, W, H):
    """One word over the whole picture, along its diagonal most of the time."""
    word = art.line(rng, rng.uniform(0.5, 1.05) * math.hypot(W, H), 0.35 * min(W, H), "name")
    if rng.random() < 0.2:
        word = pad(word, 2 * (line := max(1, word.shape[0] // 20)) + word.shape[0] // 6)
        word = cv2.max(word, rounded_box(*word.shape, 0, line))
    diagonal = math.degrees(math.atan2(H, W)) * pick(rng, (1, 1, -1))
    mark, angle = tint(word, pick_colour(rng)), diagonal if rng.random() < 0.8 else 0
    return mark, placement(mark, *word.shape[::-1], angle, (W - word.shape[1]) // 2, (H - word.shape[0]) // 2)


def site(rng, art, W, H):
    """A site's name, a telephone number, a badge, or a strip over the whole width: flat, nearly opaque."""
    word = art.line(rng, log_uniform(rng, 0.15, 0.95) * W, log_uniform(rng, 0.025, 0.15) * H, "site")
    if rng.random() < 0.25:
        emblem = cv2.extractChannel(art.emblem(rng, word.shape[0] * 1.3), 3)
        word = stack([emblem, word], 1, word.shape[0] // 3)
    plate = pick(rng, {"none": 55, "badge": 30, "strip": 15})
    if plate == "strip":
        mark = put_plate(rng, pad_to(word, 0, 2 * W), opaque=True)
        return mark, placement(mark, *mark.shape[1::-1], 0, -W // 2, pick(rng, (0, H - len(mark)), (20, 80)))
    mark = tint(word, pick_colour(rng)) if plate == "none" else put_plate(rng, word, opaque=True)
    return (in_corner if rng.random() < 0.6 else anywhere)(rng, mark, W, H)


def draw_wordmark(rng, art, longest: float, highest: float, emblem: float) -> np.ndarray:
    """One to four lines with the effects of photo programs; emblem: chance of one beside or above them."""
    n, font = pick(rng, {1: 72, 2: 20, 3: 5, 4: 3}), art.font(rng)
    rows = [art.line(rng, longest, highest / n * rng.uniform(0.5, 1), font=font) for _ in range(n)]
    word = stack(rows, 0, round(rows[0].shape[0] * 0.3), pick(rng, (0, 0.5)))
    if rng.random() < emblem:
        axis, gap = pick(rng, {1: 70, 0: 30}), max(2, round(word.shape[0] * rng.uniform(0.1, 0.5)))
        logo = art.emblem(rng, word.shape[0] * rng.uniform(1.2, 2.5))
        if rng.random() < 0.3:                    # in its own colours
            return stack([logo, tint(word, pick_colour(rng))], axis, gap)
        word = stack([cv2.extractChannel(logo, 3), word], axis, gap)
    return put_plate(rng, word) if rng.random() < 0.06 else style(rng, word)


def wordmark(rng, art, W, H):
    """Words with effects, with a logo or without, at any angle."""
    longest, highest = log_uniform(rng, 0.12, 0.95) * W, log_uniform(rng, 0.03, 0.35) * H
    return anywhere(rng, draw_wordmark(rng, art, longest, highest, emblem=0.4), W, H, turned=0.4, corner=0.3)


def credit(rng, art, W, H):
    """The photographer's line at the edge, or up the side, or his small logo."""
    px = log_uniform(rng, 0.02, 0.06) * H
    mark = art.logo(rng, 4 * px) if rng.random() < 0.15 else style(rng, art.line(rng, 0.9 * W, px, "credit"))
    if rng.random() < 0.06:
        mark = np.ascontiguousarray(np.rot90(mark))
    return in_corner(rng, mark, W, H)


def label(rng, art, W, H):
    """What image generators and phones put on pictures: a sign, a short phrase or both, white or grey."""
    width, what = log_uniform(rng, 0.05, 0.26) * W, pick(rng, {"sign": 30, "words": 35, "both": 35})
    parts = []
    if what != "sign":
        rows = pick(rng, {1: 85, 2: 15})
        longest = max(width, 40) * (0.8 if what == "both" else 1)
        lines = [art.line(rng, longest, 0.06 * H, "label") for _ in range(rows)]
        parts = [stack(lines, 0, max(2, lines[0].shape[0] // 3), align=0)]
    if what != "words":
        side = parts[0].shape[0] * rng.uniform(1, 1.8) if parts else min(width, 0.12 * W)
        parts = [draw_sign(rng, side), *parts]
    a = stack(parts, 1, max(2, parts[-1].shape[0] // 3))
    if rng.random() < 0.25:                       # in a pill
        a = pad(a, max(4, a.shape[0] // 2))
        a = cv2.max(a, rounded_box(*a.shape, int(len(a) * pick(rng, (0.3, 0.5))), max(1, len(a) // 25)))
    grey = 1 if rng.random() < 0.75 else rng.uniform(0.45, 0.95)
    return in_corner(rng, tint(a, (grey,) * 3), W, H, across=(17, 8, 75), down=(13, 87))


def stamp(rng, art, W, H):
    """A word in a box, or inside two rings."""
    longest = log_uniform(rng, 0.15, 0.7) * min(W, H)
    word = art.line(rng, longest, longest * rng.uniform(0.1, 0.25))
    a, line = pad(word, max(4, round(word.shape[0] * 0.6))), max(1, word.shape[0] // pick(rng, (8, 14)))
    if rng.random() < 0.7:
        a = cv2.max(a, rounded_box(*a.shape, pick(rng, (0, a.shape[0] // 5)), line))
    else:
        a = pad_to(a, max(a.shape), max(a.shape))
        for r in (0.48, 0.42):
            cv2.circle(a, (len(a) // 2,) * 2, int(len(a) * r), 255, line, cv2.LINE_AA)
    return anywhere(rng, tint(a, pick_colour(rng)), W, H, turned=0.8)


def draw_unit(rng, art, longest: float) -> np.ndarray:
    """What is repeated over a picture: a logo or a wordmark."""
    if not art.words or rng.random() < 0.3:
        return art.logo(rng, longest)
    return draw_wordmark(rng, art, longest, longest / 2, emblem=0.2)


def tiles(rng, art, W, H):
    """One mark again and again, with gaps; rows shifted as bricks half of the time."""
    unit = draw_unit(rng, art, log_uniform(rng, 0.08, 0.4) * max(W, H))
    h, w = unit.shape[:2]
    cell = pad_to(unit, round(h * rng.uniform(1.1, 4)), round(w * rng.uniform(1.05, 2)))
    if rng.random() < 0.5:
        cell = np.concatenate([cell, np.roll(cell, cell.shape[1] // 2, axis=1)])
    return repeated(rng, cell, W, H, turned=0.7)


def grid(rng, art, W, H):
    """A net of thin lines, with a small mark at its nodes most of the time; or a cross or parallels."""
    colour = pick_colour(rng)
    if rng.random() < 0.3:
        a, thick = np.zeros((H, W), np.uint8), max(1, round(H * log_uniform(rng, 0.003, 0.015)))
        parallels = [((0, y), (W, y + int(rng.integers(-H // 4, H // 4 + 1))))
                     for y in rng.integers(0, H, int(rng.integers(1, 4))).tolist()]
        cross = [((0, 0), (W, H)), ((0, H), (W, 0))]
        for p, q in pick(rng, (cross, cross[:1], parallels), (60, 15, 25)):
            cv2.line(a, p, q, 255, thick, cv2.LINE_AA)
        return tint(a, colour), np.eye(2, 3)
    w = max(8, round(max(W, H) * log_uniform(rng, 0.12, 0.6)))
    h = max(8, round(w * rng.uniform(0.5, 1.2)))
    a, thick, strength = np.zeros((h, w), np.uint8), pick(rng, (1, 1, 2, 3)), int(rng.integers(120, 256))
    for y0, y1 in ((0, h - 1), (h - 1, 0)):                        # diagonals: neighbours meet at the corners
        cv2.line(a, (0, y0), (w - 1, y1), strength, thick, cv2.LINE_AA)
    cell = tint(a, colour)
    if rng.random() < 0.75:
        node = draw_unit(rng, art, w * rng.uniform(0.3, 0.6))[:h, :w]
        y, x = (h - node.shape[0]) // 2, (w - node.shape[1]) // 2
        room = cell[y:y + node.shape[0], x:x + node.shape[1]]
        room[:] = node if rng.random() < 0.5 else over(node, room)             # net cut out around it, or not
    return repeated(rng, cell, W, H, turned=0.25)


# name -> weight, function, lowest and highest opacity
KINDS = {"logo": (34, logo, 0.12, 1), "name": (16, name, 0.15, 1), "site": (14, site, 0.8, 1),
         "wordmark": (22, wordmark, 0.12, 1), "credit": (16, credit, 0.2, 1),
         "label": (12, label, 0.35, 0.9), "across": (5, across, 0.12, 0.9), "stamp": (5, stamp, 0.15, 1),
         "tiles": (14, tiles, 0.12, 0.9), "grid": (10, grid, 0.12, 0.9)}
OWN_KINDS = ("logo", "tiles")
DRAWN_KINDS = ("across", "tiles", "grid", "label", "credit")       # on pages and drawings: logos are their own


# ---------------------------------------------------------------- laying a mark

def warp(mark: np.ndarray, matrix: np.ndarray, W: int, H: int):
    """The mark on a W x H picture -> (the part that lands in it, (row, column slices)); None if outside."""
    (a, b, c), (d, e, f) = matrix.tolist()
    h, w = mark.shape[:2]                         # its corners, and a pixel around
    xs, ys = zip(*((a * x + b * y + c, d * x + e * y + f) for x in (-1, w) for y in (-1, h)))
    x0, y0 = max(math.floor(min(xs)), 0), max(math.floor(min(ys)), 0)
    x1, y1 = min(math.ceil(max(xs)) + 1, W), min(math.ceil(max(ys)) + 1, H)
    if x1 <= x0 or y1 <= y0:
        return None
    if (a, b, d, e) == (1, 0, 0, 1) and c % 1 == f % 1 == 0:                   # upright, at its own size
        x0, y0, x1, y1 = max(int(c), 0), max(int(f), 0), min(int(c) + w, W), min(int(f) + h, H)
        if x1 <= x0 or y1 <= y0:
            return None
        return mark[y0 - int(f):y1 - int(f), x0 - int(c):x1 - int(c)], (slice(y0, y1), slice(x0, x1))
    part = cv2.warpAffine(mark, matrix - [[0, 0, x0], [0, 0, y0]], (x1 - x0, y1 - y0))
    return part, (slice(y0, y1), slice(x0, x1))


def blend(under: np.ndarray, mark: np.ndarray, opacity: float, mode: str) -> np.ndarray:
    """under (h, w, 3) uint8, mark (h, w, 4) premultiplied -> composite (h, w, 3) uint8.

    With photo u, mark colour c and alpha a the composite is u + a (B(u, c) - u). Every B here is linear in c,
    so that the change a (B - u) needs only the premultiplied p = a c, and u a, and u p.
    """
    p = cv2.cvtColor(mark, cv2.COLOR_RGBA2RGB)
    a = cv2.cvtColor(cv2.extractChannel(mark, 3), cv2.COLOR_GRAY2RGB)
    if mode == "normal":                          # B = c
        change = cv2.addWeighted(p, opacity, under.astype(np.uint16) * a, -opacity / 255, 0, dtype=cv2.CV_32F)
        return cv2.add(under, change, dtype=cv2.CV_8U)
    ua, up = (cv2.multiply(under, x, scale=opacity / 255, dtype=cv2.CV_32F) for x in (a, p))
    if mode == "multiply":                        # B = u c
        change = up - ua
    elif mode == "screen":                        # B = u + c - u c
        change = p * np.float32(opacity) - up
    elif mode == "overlay":                       # B = 2 u c for dark u, 1 - 2 (1 - u)(1 - c) for light
        dark, white = 2 * up - ua, cv2.addWeighted(p, 2 * opacity, a, -opacity, 0, dtype=cv2.CV_32F)
        change = np.where(under < 128, dark, white - dark)
    return cv2.add(under, change, dtype=cv2.CV_8U)


def seen_share(before: np.ndarray, after: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Share of the pixels `inside` (h, w) uint8 whose change a person sees, and sees plainly: twice as large.

    before, after: (h, w, 3) uint8. A pixel must change by MIN_CHANGE, and by TEXTURE times the local contrast
    that hides it: the mean distance from the local mean over 21 pixels. The change is the larger of the
    grey value's and COLOUR times the strongest channel's.
    """
    grey = cv2.cvtColor(before, cv2.COLOR_RGB2GRAY)
    contrast = cv2.blur(cv2.absdiff(grey, cv2.blur(grey, (21, 21))), (21, 21))
    needed = cv2.max(cv2.convertScaleAbs(contrast, alpha=TEXTURE), MIN_CHANGE)
    change = cv2.absdiff(before, after)
    strongest = reduce(cv2.max, cv2.split(change))
    change = cv2.max(cv2.cvtColor(change, cv2.COLOR_RGB2GRAY), cv2.convertScaleAbs(strongest, alpha=COLOUR))
    change = cv2.bitwise_and(cv2.blur(change, (3, 3)), inside)
    n = max(cv2.countNonZero(inside), 1)
    return tuple(np.count_nonzero(change >= least) / n for least in (needed, cv2.add(needed, needed)))


def lay(image, mask, mark, matrix, opacity: float, mode: str, alpha: float = MASK_ALPHA, seen: float = SEEN):
    """Lays a mark on the image (H, W, 3) uint8 and its truth on the mask (H, W) uint8 {0, 1}, both in place.

    The truth is where the mark's own alpha is above `alpha`. -> "plain" or "faint", as it can be seen.
    "unseen" where less than the share `seen` of it can be, "outside" where it is: then nothing is laid.
    """
    if (warped := warp(mark, matrix, image.shape[1], image.shape[0])) is None:
        return "outside"
    part, where = warped
    inside = where_alpha(part, alpha)
    if not inside.any():
        return "outside"
    composite, plainly = blend(image[where], part, opacity, mode), 1
    if seen:
        share, plainly = seen_share(image[where], composite, inside)
        if share < seen:
            return "unseen"
    image[where] = composite
    mask[where] |= inside & 1
    return "plain" if plainly >= seen else "faint"


# ---------------------------------------------------------------- camera: what happens to pictures afterwards

def jpeg(image: np.ndarray, quality: int, subsample: bool = True) -> np.ndarray:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
             cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if subsample else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    # BGR or RGB: it only halves chroma
    return cv2.imdecode(cv2.imencode(".jpg", image, flags)[1], cv2.IMREAD_COLOR)


def camera(rng, image: np.ndarray, gentle: bool = False) -> tuple[np.ndarray, int | None]:
    """uint8 (H, W, 3) -> the same size after saving, sharing and saving again; the last JPEG quality.

    gentle: saved well, once at most, so that a faint mark does not vanish.
    """
    H, W = image.shape[:2]
    if gentle or rng.random() < 0.35:             # saved once and well, or not at all
        quality = pick(rng, (None, int(rng.integers(75, 97))))
        return (jpeg(image, quality) if quality else image), quality
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


# ---------------------------------------------------------------- crops

def choose_frame(rng: np.random.Generator, W: int, H: int, size: int) -> tuple[int, int, int]:
    """The size to which a W x H picture is resized, and the side of the crop there -> (W, H, side).

    A photo is never enlarged before it is marked: the mark would be sharper than its background, as in no real
    picture. A crop that is smaller than `size` is enlarged at the end, mark and background together.
    """
    side = round(size / rng.uniform(1, 2)) if rng.random() < ENLARGED else size
    side = max(min(side, W, H), size // 4)        # tiny photos are enlarged all the same
    # a small crop lies on a frame of up to LOOK pixels, so that marks are as large as when predict.py looks;
    # at times it holds all of the short side, since a large mark needs its surroundings
    largest = max(side, min(max(1.9, LOOK / size) * side, W, H))
    short = pick(rng, (side, largest, rng.uniform(side, largest)), (30, 25, 45))
    return max(round(W * short / min(W, H)), side), max(round(H * short / min(W, H)), side), side


def cut_window(photo: np.ndarray, W: int, H: int, x: int, y: int, w: int, h: int) -> np.ndarray:
    """The w x h window at (x, y) of the photo resized to W x H; only this window is resized."""
    ph, pw = photo.shape[:2]
    top, left = y * ph // H, x * pw // W
    window = photo[top:max(round((y + h) * ph / H), top + 1), left:max(round((x + w) * pw / W), left + 1)]
    if window.shape[:2] == (h, w):
        return window.copy()
    shrink = h / window.shape[0]                  # area averaging is slow, and matters below 0.6
    return cv2.resize(window, (w, h), interpolation=cv2.INTER_CUBIC if shrink > 1 else
                      cv2.INTER_LINEAR if shrink > 0.6 else cv2.INTER_AREA)


def enlarge(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, size: int):
    if len(mask) == size:
        return image, mask
    image = cv2.resize(image, (size, size), interpolation=pick(rng, (cv2.INTER_LINEAR, cv2.INTER_CUBIC)))
    return image, cv2.resize(mask * 255, (size, size)) >> 7


def crop(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, size: int):
    """image (H, W, 3), mask (H, W) uint8 {0, 1} -> a size x size crop of both that looks at the mark."""
    H, W = mask.shape
    fw, fh, side = choose_frame(rng, W, H, size)
    x, y, w, h = cv2.boundingRect(mask) if mask.any() else (0, 0, W, H)
    at = rng.uniform((x, y), (x + w, y + h)) * fw / W - rng.uniform(0.15, 0.85, 2) * side
    x, y = np.clip(at, 0, (fw - side, fh - side)).astype(int).tolist()
    image, mask = (cut_window(a, fw, fh, x, y, side, side) for a in (image, mask * 255))
    return enlarge(rng, image, mask >> 7, size)


# ---------------------------------------------------------------- recipes

class Synth:
    """Samples without end: a map-style Dataset, though not in name, so that this file starts without torch.

    images, logos: folders, searched to any depth (None: generated backgrounds, drawn marks only).
    size: side of a square crop, for training; None keeps each photo's own size.
    held_out takes the share of photos, logos and fonts that training never sees.
    Index i of the Dataset is make_sample(seed, i); n is its length.
    kinds: names of the kinds of marks in the default recipe. Recipe "own" lays the given logos and nothing
    else, single or tiled: for those who look for one mark.
    Raises ValueError with one sentence where a folder is missing or holds nothing usable.
    """

    def __init__(self, images=None, logos=None, recipe="default", size=None, held_out=False, seed=0,
                 n=2**31 - 1, kinds=tuple(KINDS)):
        if recipe not in (*RECIPES, OWN):
            raise ValueError(f"no recipe {recipe!r}; there are {', '.join((*RECIPES, OWN))}")
        self.images, self.recipe, self.size, self.seed, self.n = images, recipe, size, seed, n
        self.kinds = OWN_KINDS if recipe == OWN else kinds
        self.photos = take_part(find_files(images, PHOTO_TYPES), images, held_out)
        if images is not None and not self.photos:
            raise ValueError(f"no photo in {images} (looked for {' '.join(PHOTO_TYPES)})")
        self.art = Art(*(take_part(find_files(logos, types), logos, held_out)
                         for types in (LOGO_TYPES, FONT_TYPES)), words=recipe != OWN)
        if drawings := find_files(logos, (".svg",)):
            warn_once(f"{drawings[0]} is a drawing ({len(drawings)} in all): make it a picture with "
                      "`rsvg-convert -w 512 in.svg -o out.png` or Inkscape; left out")
        if recipe != "default" and self.art.any_logo(np.random.default_rng(0)) is None:
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
        ours = self.recipe in ("default", OWN)
        image, mask, meta = self.default(rng) if ours else self.published(rng)
        meta |= {"recipe": self.recipe, "seed": seed, "index": i,
                 "coverage": round(cv2.countNonZero(mask) / mask.size, 6)}
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

    def draw_mark(self, rng, W: int, H: int, kinds: tuple[str, ...]):
        """-> kind, mark, matrix that lays it on a W x H picture, opacity, blend mode."""
        kind = pick(rng, kinds, [KINDS[k][0] for k in kinds])
        _, draw, low, high = KINDS[kind]
        opacity = low + (high - low) * rng.random() ** 1.3         # more faint ones, since some are not seen
        return kind, *draw(rng, self.art, W, H), opacity, pick(rng, BLENDS)

    def ground(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """What a sample lies on, (H, W, 3) uint8, and its name: a photo, a drawing, a page or dead leaves."""
        kind = pick(rng, {"drawing": DRAWINGS, "page": PAGES, "generated": LEAVES,
                          "photo": 1 - DRAWINGS - PAGES - LEAVES})
        if kind == "photo":
            return self.background(rng)
        if kind == "generated":
            return generate_background(rng), kind
        draw = generate_page if kind == "page" else generate_drawing
        return draw(rng, self.art), kind

    def default(self, rng: np.random.Generator):
        """What people meet: any number of marks on a photo, or a window of it; then the camera."""
        photo, name = self.ground(rng)
        drawn_kinds = tuple(k for k in self.kinds if k in DRAWN_KINDS) if name in ("page", "drawing") else ()
        kinds = drawn_kinds or self.kinds
        if self.size and min(photo.shape[:2]) < self.size and rng.random() < CONTINUED:
            bottom, right = (max(round(self.size * rng.uniform(1, 1.3)) - n, 0) for n in photo.shape[:2])
            photo = cv2.copyMakeBorder(photo, 0, bottom, 0, right, cv2.BORDER_REFLECT)
        if rng.random() < 0.05:
            photo = passepartout(rng, photo)
        H, W = photo.shape[:2]
        w, h = W, H
        if self.size:                             # marks lie on the whole frame; the crop is a window of it
            W, H, w = choose_frame(rng, W, H, self.size)
            h = w
        drawn = [self.draw_mark(rng, W, H, kinds) for _ in range(pick(rng, COUNTS))]
        ox, oy = int(rng.integers(W - w + 1)), int(rng.integers(H - h + 1))
        if drawn and rng.random() < 0.85:         # look where the first mark is
            _, mark, matrix, _, _ = drawn[0]
            at = matrix @ [*rng.uniform(0, mark.shape[1::-1]), 1] - rng.uniform(0.15, 0.85, 2) * (w, h)
            ox, oy = np.clip(at, 0, (W - w, H - h)).astype(int).tolist()
        image = vary(rng, cut_window(photo, W, H, ox, oy, w, h), mirror=name != "page")
        mask, laid, gentle = np.zeros((h, w), np.uint8), [], False
        for kind, mark, matrix, opacity, mode in drawn:
            for k in range(RETRIES):
                found = lay(image, mask, mark, matrix - [[0, 0, ox], [0, 0, oy]], opacity, mode)
                if found in ("plain", "faint"):
                    laid.append({"kind": kind, "opacity": round(opacity, 3), "blend": mode})
                    gentle |= found == "faint"
                if found != "unseen":
                    break
                if k % 2:
                    kind, mark, matrix, opacity, mode = self.draw_mark(rng, W, H, kinds)
                else:                             # as people do: stronger; words light on dark, dark on light
                    opacity, mode = min(opacity * rng.uniform(1.4, 2.6), KINDS[kind][3]), "normal"
                    mark = mark if kind in OWN_KINDS else inverted(mark)
        image, quality = camera(rng, image, gentle)
        if self.size:
            image, mask = enlarge(rng, image, mask, self.size)
        return image, mask, {"photo": name, "window": [ox, oy, W, H], "marks": laid, "jpeg": quality}

    # -- the field's

    def published(self, rng: np.random.Generator):
        """Logos pasted as the literature does; truth is where alpha > 0, but for CLWD.

        reference: the public notebook: 1-5 logos, diagonal U(.05, .70) of the image's, any may overhang.
        clwd: WDNet's CLWD: 256 x 256, one logo, width and height each U{10..256}, wholly inside; truth where
        it changed the photo by more than 15/255 summed over RGB; then JPEG 75.
        logo-l, -h, -gray: one square-resized logo, side min(U.W, U.H), opacity U, any angle. The ranges are
        the papers'; the authors' synthesis notebook itself uses .4 to .8.
        """
        recipe, (clean, photo) = self.recipe, self.background(rng)
        if recipe == "clwd":
            clean = cv2.resize(clean, (256, 256), interpolation=cv2.INTER_AREA)
        (H, W), image, marks = clean.shape[:2], clean.copy(), []
        mask = np.zeros((H, W), np.uint8)
        for _ in range(int(rng.integers(1, 6)) if recipe == "reference" else 1):
            path, levels = self.art.any_logo(rng)
            angle, mode = rng.uniform(0, 360), "normal"
            if recipe == "reference":
                h, w = levels[0].shape[:2]
                scale = rng.uniform(0.05, 0.70) * math.hypot(W, H) / math.hypot(w, h)
                w, h, opacity = max(round(w * scale), 1), max(round(h * scale), 1), rng.uniform(0.3, 1)
                angle, mode = pick(rng, (0.0, angle)), pick(rng, ("normal", "multiply", "overlay"))
            elif recipe == "clwd":
                (w, h), opacity = rng.integers(10, 257, 2).tolist(), rng.uniform(0.3, 0.7)
                angle = next((a for a in rng.uniform(0, 360, 20) if max(turned_size(w, h, a)) <= 256), 0.0)
            else:
                low, high = (0.60, 0.85) if recipe == "logo-h" else (0.35, 0.60)
                w = h = max(round(min(rng.uniform(low, high) * W, rng.uniform(low, high) * H)), 1)
                opacity = rng.uniform(low, high)
            level, box = pick_level(levels, w, h), turned_size(w, h, angle)
            if recipe == "logo-gray":
                level = cv2.merge([cv2.cvtColor(level, cv2.COLOR_RGBA2GRAY)] * 3 + [level[..., 3]])
            inside = (10, 10) if recipe == "reference" else box           # pixels of its turned box, at least
            x, y = (int(rng.integers(min(k - n, N - k), max(k - n, N - k) + 1))
                    for k, n, N in zip(inside, box, (W, H)))
            matrix = placement(level, w, h, angle, x + (box[0] - w) / 2, y + (box[1] - h) / 2)
            lay(image, mask, level, matrix, opacity, mode, alpha=0, seen=0)
            marks.append({"kind": "logo", "x": x, "y": y, "width": w, "height": h, "angle": angle,
                          "opacity": opacity, "blend": mode, "mark": Path(path).name})
        if recipe == "clwd":
            mask = (cv2.absdiff(image, clean).sum(2, dtype=np.uint16) > 15).astype(np.uint8)
            image = jpeg(image, 75)
        return image, mask, {"photo": photo, "marks": marks, "jpeg": 75 if recipe == "clwd" else None}


# ---------------------------------------------------------------- command line

def contact_sheet(rows: list[list[np.ndarray]], cell: tuple[int, int], names=()) -> Image.Image:
    """Rows of pictures (H, W, 3), each row's name before it."""
    left = 100 if names else 0
    sheet = Image.new("RGB", (max(map(len, rows)) * cell[0] + left, len(rows) * cell[1]), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            thumb = Image.fromarray(picture)
            thumb.thumbnail((cell[0] - 6, cell[1] - 6))
            sheet.paste(thumb, (x * cell[0] + left, y * cell[1]))
    for y, name in enumerate(names):
        place, font = (8, (y + 0.5) * cell[1]), ImageFont.load_default(18)
        ImageDraw.Draw(sheet).text(place, name, "black", font, anchor="lm")
    return sheet


def preview(synth: Synth, seed: int, n: int) -> Image.Image:
    """n samples in rows of six, each image above its mask."""
    rows = []
    for first in range(0, n, 6):
        samples = [synth.make_sample(seed, i) for i in range(first, min(first + 6, n))]
        rows += [[image.transpose(1, 2, 0) for image, _, _ in samples],
                 [np.repeat(mask[0][..., None] * 255, 3, 2) for _, mask, _ in samples]]
    return contact_sheet(rows, (320, 320))


def preview_kinds(images, logos, seed: int, columns: int = 6) -> Image.Image:
    """A row of crops for each kind of mark in the default recipe, its name before it."""
    rows = []
    for row, kind in enumerate(KINDS):
        synth = Synth(images, logos, size=256, kinds=(kind,))
        samples = (synth.make_sample(seed + row, i)[:2] for i in count())
        marked = (image.transpose(1, 2, 0) for image, mask in samples if mask.mean() >= 0.004)
        rows.append(list(islice(marked, columns)))
    return contact_sheet(rows, (200, 200), tuple(KINDS))


def write_samples(synth: Synth, out: Path, seed: int, numbers: range) -> list[str]:
    """Writes a worker's share -> its lines. Several, since the list of photos travels with each share."""
    cv2.setNumThreads(0)
    return [write_sample(synth, out, seed, i) for i in numbers]


def write_sample(synth: Synth, out: Path, seed: int, i: int) -> str:
    """Writes images/ and masks/ of sample i, by temporary name and rename -> its line for meta.jsonl."""
    image, mask, meta = synth.make_sample(seed, i)
    for folder, picture in (("images", image.transpose(1, 2, 0)[..., ::-1]), ("masks", mask[0] * 255)):
        half = out / folder / f".{uuid.uuid4().hex}.tmp"
        try:
            with half.open("xb") as f:
                f.write(cv2.imencode(".png", picture)[1])
            os.replace(half, out / folder / f"{i:07}.png")
        finally:
            half.unlink(missing_ok=True)
    return json.dumps({"name": f"{i:07}", **meta}) + "\n"


def read_meta(path: Path) -> list[dict]:
    """The lines of an export's meta.jsonl but a half-written last one; none where there is no such file.

    ValueError where write_sample never wrote such a line.
    """
    metas = []
    try:
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if line.endswith(b"\n"):
                metas.append(meta := json.loads(line))
                marks = meta["marks"]             # to add or to join what is of another type is a TypeError
                sum([meta["seed"], meta["jpeg"] or 0, *(mark["opacity"] for mark in marks)])
                "".join([meta["name"], meta["recipe"], *(mark["kind"] + mark["blend"] for mark in marks)])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} has a line that synth.py never wrote: move it away") from e
    return metas


def export(synth: Synth, out: Path, seed: int, n: int, workers: int) -> None:
    """The same bytes for any number of workers. A sample is there once its line is in meta.jsonl."""
    metas = read_meta(out / "meta.jsonl")
    for meta in metas[:1]:
        if (meta["recipe"], meta["seed"]) != (synth.recipe, seed):
            raise ValueError(f"{out} holds recipe {meta['recipe']}, seed {meta['seed']}: "
                             "choose another folder")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for left in (out / folder).glob(TEMPORARY):
            left.unlink()
    stop = []                                     # it ends the export after the next line
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in STOP_SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN}             # as nohup leaves SIGHUP
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        with (out / "meta.jsonl").open("ab+") as f:
            f.seek(0)
            f.truncate(sum(map(len, islice(f, len(metas)))))
            # not pool.map: where a worker is killed, it disturbs the thread that ends the others
            todo = range(len(metas), n)
            shares = deque(pool.submit(write_samples, synth, out, seed, todo[i:i + EXPORTED])
                           for i in range(0, len(todo), EXPORTED))
            lines = (line for _ in range(len(shares)) for line in shares.popleft().result())
            for line in tqdm(lines, total=n, initial=min(len(metas), n), unit="sample", disable=None):
                f.write(line.encode())
                f.flush()
                if stop:
                    raise KeyboardInterrupt
    except BrokenExecutor as e:
        if stop:                                  # SIGTERM to the whole group, say
            raise KeyboardInterrupt from e
        raise OSError("a worker was killed: did memory run out? Try fewer --workers") from e
    finally:
        pool.shutdown(cancel_futures=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_worker(worker: int = 0) -> None:
    """A worker leaves Ctrl-C to the main process, and ends with it, even while it waits in a full pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)      # not the main process's, which a fork inherits
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path,
                        help="a picture (.png, .jpg) for a contact sheet, or a folder for a data set")
    # what is mixed
    parser.add_argument("--images", type=Path, help="folder of photos (default: generated backgrounds)")
    parser.add_argument("--logos", type=Path, default=Path(__file__).parent / "logos",
                        help="folder of logos, and of fonts for words (default: %(default)s)")
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
        for folder in filter(None, (args.images, args.logos)):
            if (args.out.is_file() and folder.resolve() in args.out.resolve().parents
                    or folder.resolve() in ((args.out / name).resolve() for name in ("images", "masks"))):
                raise ValueError(f"{args.out} would overwrite what lies in {folder}: choose another name")
        synth = Synth(args.images, args.logos, args.recipe, args.size, args.held_out)
        if args.kinds:
            preview_kinds(args.images, args.logos, args.seed).save(args.out)
        elif args.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
            preview(synth, args.seed, args.n).save(args.out)
        else:
            export(synth, args.out, args.seed, args.n, args.workers)
    except (ValueError, OSError, MemoryError) as e:
        say(str(e) or "memory ran out")
        return 2
    except KeyboardInterrupt:
        print("synth.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(args.out, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
