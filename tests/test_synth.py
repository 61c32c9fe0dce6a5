import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

import synth
from conftest import ROOT
from synth import KINDS, MASK_ALPHA, MIN_CHANGE, RECIPES, SEEN, Art, Synth, blend, lay, load_logo, make_text

SHAPES = (160, 120), (120, 160), (128, 128)                        # of conftest's photos, in turn
ODD = os.fsdecode(b"o.png" if sys.platform == "darwin" else b"\xff.png")        # a name that is not UTF-8


@pytest.fixture
def still(monkeypatch):
    """A sample is a photo and its marks: no drawing, no page, no leaves, no frame, no grading, no camera."""
    for name, value in (("DRAWINGS", 0), ("PAGES", 0), ("LEAVES", 0), ("passepartout", lambda rng, photo: photo),
                        ("vary", lambda rng, image, mirror: image),
                        ("camera", lambda rng, image, gentle: (image, None))):
        monkeypatch.setattr(synth, name, value)


@pytest.fixture
def paint(monkeypatch):
    """Makes every photo one colour."""
    return lambda colour: monkeypatch.setattr(
        Synth, "background", lambda self, rng: (np.full((150, 200, 3), colour, np.uint8), "plain"))


@pytest.fixture
def twins(monkeypatch):
    """Makes a sample twice from the same random numbers: with its marks, and without."""
    def make(samples, i):
        image, mask, meta = samples.make_sample(0, i)
        with monkeypatch.context() as patch:
            patch.setattr(synth, "lay", lambda image, *rest, **how: lay(     # what a drawing holds stays
                image if set(how) == {"seen"} else image.copy(), *rest, **how))
            clean, _, _ = samples.make_sample(0, i)
        return image.transpose(1, 2, 0).copy(), clean.transpose(1, 2, 0).copy(), mask[0], meta["marks"]
    return make


def metas_of(samples, n: int, seed: int = 0) -> list[dict]:
    return [samples.make_sample(seed, i)[2] for i in range(n)]


def marks_of(metas: list[dict], key: str) -> list:
    return [mark[key] for meta in metas for mark in meta["marks"]]


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **how) -> str:
    Image.fromarray(pixels).save(path, **how)
    return str(path)


# ---------------------------------------------------------------- the sample contract

@pytest.mark.parametrize("recipe", [*RECIPES, "own"])
def test_a_sample_is_a_pure_function_of_seed_and_index(photos, logos, recipe):
    one, two = (Synth(photos, logos, recipe) for _ in range(2))
    two.make_sample(0, 5)                                          # another order, warm caches
    for i in (3, 0):
        (image, mask, meta), (image2, mask2, meta2) = one.make_sample(1, i), two.make_sample(1, i)
        assert np.array_equal(image, image2) and np.array_equal(mask, mask2) and meta == meta2
        assert image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
        assert image.shape == (3, *mask.shape[1:]) and mask.shape[0] == 1
    assert not np.array_equal(image, one.make_sample(2, 0)[0])


def test_worker_count_changes_nothing(photos, logos):
    samples = Synth(photos, logos, size=96, n=12)
    alone, shared = (list(DataLoader(samples, batch_size=4, num_workers=n)) for n in (0, 2))
    for a, b in zip(alone, shared, strict=True):
        assert all(map(torch.equal, a, b))


def test_photos_keep_their_size_unless_a_crop_or_a_recipe_says_otherwise(photos, logos):
    assert set(SHAPES) <= {Synth(photos, logos).make_sample(0, i)[0].shape[:0:-1] for i in range(30)}
    assert Synth(photos, logos, size=64).make_sample(0, 0)[0].shape == (3, 64, 64)
    assert Synth(photos, logos, "clwd").make_sample(0, 0)[0].shape == (3, 256, 256)


@pytest.mark.parametrize("size", [None, 33, 64])
def test_tiny_and_very_flat_photos_serve_too(tmp_path, logos, size):
    for k, (w, h) in enumerate(((1, 1), (3, 200), (10, 10), (40, 30), (500, 20))):
        save(tmp_path / f"{k}.png", noise(h, w, k))
    tiny = Synth(tmp_path, logos, size=size)
    for i in range(200):
        image, mask = tiny[i]
        assert image.shape[1:] == mask.shape[1:] and (size is None or mask.shape == (1, size, size))


@pytest.mark.parametrize("size", [96, 160, 416])                   # photos have 120 pixels: some are small
def test_a_small_photo_is_enlarged_after_it_is_marked_or_goes_on_as_its_mirror_image(
        photos, logos, still, monkeypatch, size):
    sides, scales, mirrored, cut = [], [], [], synth.cut_window

    def cut_black(photo, W, H, *window):
        scales.append(min(W / photo.shape[1], H / photo.shape[0]))
        sides.append(window[-1])
        mirrored.append(photo.shape[1::-1] not in SHAPES)
        return np.zeros_like(cut(photo, W, H, *window))
    monkeypatch.setattr(synth, "cut_window", cut_black)
    monkeypatch.setattr(synth, "blend", lambda under, mark, opacity, mode: np.maximum(
        under, (mark[..., 3:] > 255 * MASK_ALPHA) * np.uint8(255)))          # white marks
    samples = Synth(photos, logos, size=size, kinds=("logo", "name", "site", "wordmark"))
    for i in range(100):
        image, mask = samples[i]
        assert image.shape == (3, size, size) and set(np.unique(mask)) <= {0, 1}
        assert ((image[0] > 127) != mask[0]).mean() < 0.02         # the truth goes with the mark
    assert max(scales) <= 1.01                                     # no sharp mark on an enlarged photo
    assert 20 < sum(mirrored) < 50 if size > 128 else not any(mirrored)
    assert size > 96 or min(sides) >= 48 and 30 < sum(side < 96 for side in sides) < 70


@pytest.mark.parametrize("size", [96, None])
def test_clean_samples_have_an_empty_mask_and_are_every_third(photos, logos, size):
    samples = Synth(photos, logos, size=size)
    masks = [mask for _, mask, meta in (samples.make_sample(0, i) for i in range(300)) if not meta["marks"]]
    assert not any(mask.any() for mask in masks)
    assert 0.26 < len(masks) / 300 < 0.46                          # also where the crop misses a mark


def test_a_small_crop_lies_on_a_frame_as_large_as_predict_looks_at():
    rng = np.random.default_rng(0)
    for W, H, size, largest in ((3000, 2000, 96, 460), (3000, 2000, 192, 460), (3000, 2000, 320, 608),
                                (500, 352, 192, 352), (120, 160, 192, 120)):
        frames = np.array([synth.choose_frame(rng, W, H, size) for _ in range(300)])
        short = frames[:, :2].min(1)
        assert short.max() == largest and short.min() <= size and (frames[:, 2] <= short).all()
        assert np.allclose(frames[:, 0] / frames[:, 1], W / H, rtol=0.02)


@pytest.mark.parametrize("sort, share", [("page", "PAGES"), ("drawing", "DRAWINGS")])
def test_what_belongs_to_a_page_or_a_drawing_is_no_mark(photos, logos, monkeypatch, sort, share):
    for name in ("PAGES", "DRAWINGS", "LEAVES"):
        monkeypatch.setattr(synth, name, int(name == share))
    images, masks, metas = zip(*(Synth(photos, logos).make_sample(0, i) for i in range(40)))
    assert {meta["photo"] for meta in metas} == {sort}
    assert set(marks_of(metas, "kind")) <= set(synth.DRAWN_KINDS)
    clean = [i for i in range(40) if not metas[i]["marks"]]
    assert clean and not any(masks[i].any() for i in clean)
    edges = [cv2.Canny(images[i][0], 80, 160).mean() for i in clean]
    assert np.median(edges) > (10 if sort == "page" else 1)                    # written or drawn all over


def test_a_painted_photo_has_few_tones_and_white_stays_white(monkeypatch):
    monkeypatch.setattr(synth, "curve", lambda rng, image, strength: image)
    image, painted = np.tile(np.arange(256, dtype=np.uint8)[:, None], (64, 1, 3)), 0
    for seed in range(600):
        varied = synth.vary(np.random.default_rng(seed), image.copy(), mirror=False)
        if len(np.unique(varied)) < 20:
            painted += 1
            assert np.abs(varied.astype(int) - image).max() <= 32
    assert 4 < painted < 30                                            # of 600, 15 are expected


def test_a_mark_that_differs_in_colour_alone_is_seen():
    """Blue on brown of the same brightness, as a person sees it; a grey photo would hide it."""
    before, after = (np.full((40, 40, 3), colour, np.uint8) for colour in ((120, 80, 40), (90, 78, 130)))
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(int) for image in (before, after)]
    assert abs(grey[0] - grey[1]).max() < MIN_CHANGE / 2
    inside = np.full((40, 40), 255, np.uint8)
    assert synth.seen_share(before, after, inside) == (1, 1)
    assert synth.seen_share(before, before + np.uint8(3), inside) == (0, 0)


def test_neither_photos_nor_logos_are_needed():
    image, _, meta = Synth().make_sample(0, 1)
    assert meta["photo"] == "generated" and image.std() > 5
    assert {"logo", "tiles"} <= set(marks_of(metas_of(Synth(size=96), 60), "kind"))


@pytest.mark.parametrize("H, W", [(300, 400), (130, 100)])
def test_a_crop_keeps_image_and_mask_together_and_looks_at_the_mark(H, W):
    mask = np.zeros((H, W), np.uint8)
    mask[H // 2:H // 2 + 15, W // 2:W // 2 + 20] = 1
    image, shares = np.repeat(mask[..., None] * 255, 3, 2), []
    for i in range(40):
        window, truth = synth.crop(np.random.default_rng(i), image, mask, 96)
        assert window.shape == (96, 96, 3) and truth.shape == (96, 96) and truth.max() <= 1
        assert ((window[..., 0] > 127) == truth).mean() > 0.99
        shares.append(truth.mean())
    assert min(shares) > 0 and max(shares) > 1.5 * min(shares)     # at several scales


# ---------------------------------------------------------------- mask rule

def test_outside_the_mask_nothing_changes_and_inside_something_does(logos, still, paint, twins, monkeypatch):
    monkeypatch.setattr(synth, "COUNTS", {1: 1})
    samples, laid = Synth(None, logos), 0
    for i in range(150):
        paint(np.random.default_rng(i).integers(0, 256, 3))
        image, clean, mask, marks = twins(samples, i)
        change = cv2.absdiff(image, clean)
        assert change[mask == 0].max(initial=0) <= 255 * MASK_ALPHA + 1     # at most the faintest rim
        laid += len(marks)
        assert len(marks) <= 1 and mask.any() == change.any() == bool(marks)
    assert laid > 100


def test_every_kind_of_mark_is_laid_so_that_it_is_seen(logos):
    art, laid = synth.Art([str(p) for p in sorted(logos.glob("*.png"))], []), 0
    for i in range(150):
        rng = np.random.default_rng(i)
        _, draw, low, high = synth.KINDS[list(synth.KINDS)[i % len(synth.KINDS)]]
        clean = np.full((150, 200, 3), rng.integers(0, 256, 3), np.uint8)
        image, mask = clean.copy(), np.zeros((150, 200), np.uint8)
        mark, matrix = draw(rng, art, 200, 150)
        if lay(image, mask, mark, matrix, rng.uniform(low, high), "normal") in ("plain", "faint"):
            laid += 1
            change = cv2.absdiff(image, clean)
            change = cv2.max(cv2.cvtColor(change, cv2.COLOR_RGB2GRAY), change.max(2) // 2)
            seen = cv2.blur(change, (3, 3))[mask == 1] >= MIN_CHANGE
            assert seen.mean() >= SEEN - 0.1                       # seen over its own box there
    assert laid > 100


def test_a_mark_is_labelled_and_laid_only_where_it_shows():
    white, texture = np.full((60, 60, 4), 255, np.uint8), np.random.default_rng(0).normal(0, 1, (100, 100, 1))
    for grey, contrast, opacity, x, expected, result in (
            (255, 0, 0.50, 20, "unseen", 255), (128, 0, 0.50, 100, "outside", 128),
            (128, 0, 0.10, 20, "faint", 141), (128, 0, 0.50, 20, "plain", 192),
            (110, 0, 0.15, 20, "plain", 132), (110, 9, 0.15, 20, "plain", None),       # texture hides it
            (110, 16, 0.15, 20, "faint", None), (110, 50, 0.15, 20, "unseen", None)):
        ground = np.clip(grey + contrast * texture.repeat(3, 2), 0, 255).astype(np.uint8)
        image, mask = ground.copy(), np.zeros((100, 100), np.uint8)
        assert lay(image, mask, white, np.float64([[1, 0, x], [0, 1, 20]]), opacity, "normal") == expected
        laid = expected in ("plain", "faint")
        assert mask[20:80, 20:80].all() == laid and mask.sum() == 3600 * laid
        assert np.array_equal(image[mask == 0], ground[mask == 0])
        assert result is None or (image[20:80, 20:80] == result).all()
    ramp = np.arange(40, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(4, 2)        # alpha 0 to 39 of 255
    lay(image, mask, ramp, np.eye(2, 3), 1, "normal", seen=0)
    assert not mask[:20, :21].any() and mask[:20, 21:40].all()     # .08 of 255 is 20.4


def test_marks_that_are_labelled_can_be_seen_after_the_camera(logos, twins, monkeypatch):
    monkeypatch.setattr(synth, "COUNTS", {1: 1})
    pairs = [twins(Synth(None, logos), i)[:3] for i in range(150)]
    shares = [synth.seen_share(clean, image, mask * 255)[0] for image, clean, mask in pairs if mask.sum() > 50]
    assert len(shares) > 100 and np.mean(np.array(shares) > 0.5) > 0.97


@pytest.mark.parametrize("mode, definition", [
    ("normal", lambda u, c: c), ("multiply", lambda u, c: u * c),
    ("screen", lambda u, c: 1 - (1 - u) * (1 - c)),
    ("overlay", lambda u, c: np.where(u < 0.5, 2 * u * c, 1 - 2 * (1 - u) * (1 - c)))])
def test_blend_modes_against_their_definitions(mode, definition):
    under, colour, alpha = noise(50, 60, 0), noise(50, 60, 1), noise(50, 60, 2)[..., :1]
    mark = np.dstack([(colour / 255 * alpha + 0.5).astype(np.uint8), alpha])            # premultiplied
    colour = np.divide(mark[..., :3], alpha, out=np.zeros(colour.shape), where=alpha > 0)
    for opacity in (0.3, 1.0):
        share = alpha / 255 * opacity
        expected = 255 * (under / 255 * (1 - share) + definition(under / 255, colour) * share)
        got = blend(under, mark, opacity, mode)
        assert got.dtype == np.uint8 and np.abs(got - np.clip(expected, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("w, h, angle, x, y, box", [
    (60, 40, 0, 12, 7, (60, 40)), (30, 20, 0, 12, 7, (30, 20)), (90, 30, 0, 12, 7, (90, 30)),
    (60, 40, 90, 50, 50, (40, 60))])
def test_a_placed_mark_has_the_size_and_place_asked_for(w, h, angle, x, y, box):
    mark = np.full((40, 60, 4), 255, np.uint8)
    layer, (rows, columns) = synth.warp(mark, synth.placement(mark, w, h, angle, x, y), 200, 150)
    ys, xs = np.nonzero(layer[..., 3] > 127)
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == box == synth.turned_size(w, h, angle)
    assert abs((xs.min() + xs.max() + 1 - w) / 2 + columns.start - x) < 0.6        # turned about its centre
    assert abs((ys.min() + ys.max() + 1 - h) / 2 + rows.start - y) < 0.6


# ---------------------------------------------------------------- kinds and text

def test_every_kind_of_mark_appears_and_can_be_asked_for_alone(photos, logos):
    for kinds, n in ((tuple(KINDS), 350), *(((kind,), 8) for kind in KINDS)):
        assert set(marks_of(metas_of(Synth(photos, logos, size=96, kinds=kinds), n), "kind")) == set(kinds)


def test_tiles_repeat_over_the_whole_picture():
    cell = np.zeros((20, 30, 4), np.uint8)
    cell[5:10, 5:10] = 255
    for turned in (0, 1):
        part, where = synth.warp(*synth.repeated(np.random.default_rng(0), cell, 190, 160, turned), 190, 160)
        layer = np.zeros((160, 190))
        layer[where] = part[..., 3] / 255
        quarters = layer.reshape(2, 80, 2, 95).mean((1, 3)) / (25 / 600)
        assert quarters.min() > 0.7 and quarters.max() < 1.4


def test_a_star_has_points_and_a_box_has_none():
    star, box = (synth.superformula(100, 4, p) > 127 for p in (0.5, 8))
    assert star[50, 8] and star[8, 50] and not star[25, 25] and box[22, 22]


def test_labels_are_small_and_near_a_corner_mostly_the_lower_right(photos, logos):
    drawn = [synth.label(np.random.default_rng(i), Art([], []), 416, 416) for i in range(200)]
    widths = [mark.shape[1] / 416 for mark, _ in drawn]
    assert np.quantile(widths, 0.95) < 0.34 and min(widths) > 0.015
    centres = [matrix[:, 2] + np.array(mark.shape[1::-1]) / 2 for mark, matrix in drawn]
    assert sum(x > 208 and y > 208 for x, y in centres) > 120
    opacities = marks_of(metas_of(Synth(photos, logos, kinds=("label",)), 40), "opacity")
    assert min(opacities) >= 0.35 and max(opacities) <= 0.9


def test_recipe_own_lays_the_given_logos_and_nothing_else(photos, logos, monkeypatch):
    monkeypatch.setattr(synth, "draw_glyphs", lambda *_: pytest.fail("a word was drawn"))
    monkeypatch.setattr(synth, "PAGES", 0)                         # a page's own text is no mark
    metas = metas_of(Synth(photos, logos, "own", size=96), 60)
    assert set(marks_of(metas, "kind")) == {"logo", "tiles"}
    assert set(marks_of(metas, "blend")) > {"normal"} and len(set(marks_of(metas, "opacity"))) > 20


def test_words_are_in_another_script_only_where_the_font_has_it(monkeypatch):
    def texts():
        return {make_text(np.random.default_rng(i), None) for i in range(300)}
    assert max(map(ord, "".join(texts()))) <= 0x2FFF               # Pillow's own font is Latin
    assert [synth.has_letter(None, c) for c in "S 版"] == [True, True, False]
    monkeypatch.setattr(synth, "SCRIPTS", {"Upper": ("A", "Z", "SAMPLE PHOTO"), "Han": synth.SCRIPTS["Han"]})
    found = synth.scripts_of.__wrapped__(None)                     # not from its cache
    assert {script: len(letters) for script, (letters, _) in found.items()} == {"Upper": 26}
    monkeypatch.setattr(synth, "scripts_of", lambda font: found)
    monkeypatch.setattr(synth, "has_letter", lambda font, c: c.isupper())      # a font without other letters
    drawn = texts()
    assert all(map(str.isupper, drawn)) and {"SAMPLE", "PHOTO"} < drawn and len(drawn) > 10


def test_a_font_that_opens_but_cannot_be_drawn_is_named_and_left_out(tmp_path, capsys):
    font = bytearray(synth.ImageFont.load_default(20).font_bytes)
    (tmp_path / "good.ttf").write_bytes(font)
    at = font.index(b"glyf")                                       # junk for letters
    start, length = (int.from_bytes(font[at + k:at + k + 4], "big") for k in (8, 12))
    font[start:start + length] = b"\xff" * length
    (tmp_path / "broken.ttf").write_bytes(font)
    (tmp_path / "no.otf").write_bytes(b"no font")
    art = Synth(None, tmp_path).art
    assert {Path(art.font(np.random.default_rng(i))).name for i in range(20)} == {"good.ttf"}
    err = capsys.readouterr().err
    assert "broken.ttf cannot be drawn" in err and "no.otf cannot be drawn" in err


def test_right_to_left_without_raqm_and_upright_columns(monkeypatch):
    row, column = synth.draw_glyphs("AB", None, 30), synth.draw_glyphs("A\nB", None, 30)
    assert row.shape[1] > row.shape[0] and column.shape[0] > 1.5 * column.shape[1]
    set_as, letter = [], synth.open_font(None, 20).getmask("x")
    recorder = SimpleNamespace(getmask=lambda line: set_as.append(line) or letter)
    monkeypatch.setattr(synth, "load_font", lambda path, px: recorder)
    for has_raqm in (True, False):
        monkeypatch.setattr(synth, "HAS_RAQM", has_raqm)
        for text in ("שלום", "abc", "版\n权"):
            synth.draw_glyphs(text, None, 20)
    assert set_as == ["שלום", "abc", "版", "权", "םולש", "abc", "版", "权"]


# ---------------------------------------------------------------- published recipes

SD = 12 ** -0.5                                                    # of U(0, 1)


def uniform(low: float, high: float) -> tuple[float, ...]:
    """Mean, standard deviation, least and largest value."""
    return (low + high) / 2, SD * (high - low), low, high


def logo_law(low: float, high: float) -> dict[str, tuple[float, ...]]:
    side = low + (high - low) / 3, (high - low) / 18 ** 0.5, low - 0.005, high + 0.005     # least of two
    return {"opacity": uniform(low, high), "angle": uniform(0, 360), "aspect": (1, 0.1, 1, 1), "side": side}


LAWS = {                   # recipe -> samples, numbers of marks, blend modes, JPEG, pixels inside, laws
    "logo-l": (2000, [1], ["normal"], None, 0, logo_law(0.35, 0.60)),
    "logo-h": (2000, [1], ["normal"], None, 0, logo_law(0.60, 0.85)),
    "logo-gray": (2000, [1], ["normal"], None, 0, logo_law(0.35, 0.60)),
    "reference": (2000, [1, 2, 3, 4, 5], ["multiply", "normal", "overlay"], None, 10, {
        "opacity": uniform(0.3, 1), "angle": uniform(0, 360), "upright": (0.5, 0.5, 0, 1),
        "diagonal": (0.375, SD * 0.65, 0.04, 0.72)}),
    "clwd": (1200, [1], ["normal"], 75, 256, {                     # 256 x 256 each, so the slowest
        "opacity": uniform(0.3, 0.7), "width": (133, SD * 247, 10, 256), "height": (133, SD * 247, 10, 256)})}


@pytest.mark.parametrize("recipe", LAWS)
def test_a_published_recipe_follows_its_law(photos, logos, recipe):
    n, numbers, blends, jpeg, inside, laws = LAWS[recipe]
    metas, marks = metas_of(Synth(photos / "train", logos, recipe), n, seed=7), []

    def near(values, mean, sd):                                    # within four standard errors
        return abs(np.mean(values) - mean) < 4 * sd / len(values) ** 0.5
    for meta in metas:
        W, H = (256, 256) if recipe == "clwd" else SHAPES[int(Path(meta["photo"]).stem) % 3]
        for mark in meta["marks"]:
            w, h = mark["width"], mark["height"]
            marks.append(mark | {"aspect": w / h, "diagonal": np.hypot(w, h) / np.hypot(W, H),
                                 "upright": mark["angle"] == 0, "angle": mark["angle"] or None,
                                 "side": w / W if W == H else None})
            for at, n, N in zip((mark["x"], mark["y"]), synth.turned_size(w, h, mark["angle"]), (W, H)):
                assert -n + min(inside, n) <= at <= N - min(inside, n)
    for key, (mean, sd, low, high) in laws.items():
        values = [mark[key] for mark in marks if mark[key] is not None]
        assert near(values, mean, sd) and low <= min(values) and max(values) <= high, key
    counts = [len(meta["marks"]) for meta in metas]
    assert sorted(set(counts)) == numbers and near(counts, np.mean(numbers), 2 ** 0.5)
    assert sorted({mark["blend"] for mark in marks}) == blends and {meta["jpeg"] for meta in metas} == {jpeg}
    assert all(near([mark["blend"] == mode for mark in marks], 1 / len(blends), 0.47) for mode in blends)


@pytest.mark.parametrize("recipe", ["reference", "logo-l", "logo-h", "logo-gray"])
def test_truth_of_the_pasted_recipes_is_any_alpha(logos, recipe, paint, monkeypatch):
    monkeypatch.setattr(synth, "pick", lambda rng, options, weights=None: options[0])      # blend: normal
    for i in range(12):
        changed = False
        for level in (0, 255):                                     # whatever its colour, one of them shows it
            paint(level)
            image, mask, _ = Synth(None, logos, recipe).make_sample(0, i)
            changed |= (image != level).any(0)
        assert not (changed & (mask[0] == 0)).any()
        assert mask.sum() <= 1.1 * changed.sum()                   # less the rim that rounds to nothing


def test_logo_gray_has_no_colour(logos, paint):
    paint(99)
    images = [Synth(None, logos, "logo-gray").make_sample(0, i)[0] for i in range(12)]
    assert np.ptp(images, axis=1).max() <= 1 and np.ptp(images) > 50


def test_clwd_truth_is_the_visible_difference(photos, logos, twins, monkeypatch):
    monkeypatch.setattr(synth, "jpeg", lambda image, quality: image)
    for i in range(10):
        image, clean, mask, _ = twins(Synth(photos, logos, "clwd"), i)
        assert np.array_equal(mask, np.abs(image.astype(int) - clean).sum(2) > 15)


# ---------------------------------------------------------------- split and bad input

def test_the_split_does_not_move_when_files_are_added_or_moved(tmp_path):
    names = [f"{tmp_path}/{i}.jpg" for i in range(300)]
    held_out = synth.take_part(names, tmp_path, held_out=True)
    assert held_out == [name for name in names if zlib.crc32(Path(name).name.encode()) % 100 < 10]

    def moved(names):                                              # only the name matters, not the folder
        return [name.replace(f"{tmp_path}/", f"{tmp_path}/a/") for name in names]
    assert synth.take_part(names + moved(names), tmp_path, held_out=True) == held_out + moved(held_out)


def test_training_never_sees_what_is_held_out(photos, logos):
    train, val = Synth(photos, logos), Synth(photos, logos, held_out=True)
    assert len(train.photos) == 30 and len(val.photos) == 10       # folders called train and val are the split
    assert val.photos == Synth(photos / "val", held_out=True).photos
    assert all("/val/" in path for path in val.photos)
    assert not set(train.art.logos) & set(val.art.logos) and val.art.logos
    drawn = {meta["photo"] for meta in metas_of(train, 40)}
    assert drawn <= {Path(path).name for path in train.photos} | {"drawing", "generated", "page"}


def test_one_own_logo_serves_both_parts_and_says_so(tmp_path, logos, capsys):
    shutil.copy(logos / "emblem-fox.png", tmp_path)
    assert Synth(None, tmp_path).art.logos == Synth(None, tmp_path, held_out=True).art.logos
    assert "used for both" in capsys.readouterr().err


def test_awkward_photos_are_read_as_shown_or_named_once_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    rgb, exif = Image.fromarray(noise(60, 90)), Image.Exif()
    exif[0x0112] = 6                                               # it lies on its side
    for name, picture, shape, how in (
            ("cmyk.jpg", rgb.convert("CMYK"), (60, 90), {}), ("grey.png", rgb.convert("L"), (60, 90), {}),
            ("palette.png", rgb.convert("P"), (60, 90), {}), (ODD, rgb.convert("RGBA"), (60, 90), {}),
            ("turned.jpg", rgb, (90, 60), {"exif": exif}),
            ("large.jpg", rgb.resize((4200, 2800)), (700, 1050), {}),
            ("huge.jpg", Image.new("RGB", (9000, 3000)), (375, 1125), {}),
            ("vast.png", Image.new("1", (20_000, 20_000)), None, {}),          # 400 megapixels
            *((f"{kind}.png", rgb, None, {"format": kind}) for kind in ("EPS", "IM", "TGA")),
            ("deep.png", Image.fromarray(np.full((60, 90), 40000, np.uint16)), (60, 90), {})):
        picture.save(tmp_path / name, **how)
        photo = synth.read_photo(str(tmp_path / name))
        assert photo is None if shape is None else photo.dtype == np.uint8 and photo.shape == (*shape, 3), name
    assert abs(int(photo.mean()) - 40000 // 257) <= 1              # of the deep one
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert synth.read_photo(str(tmp_path / "broken.png")) is None
    one, two = (Synth(tmp_path, size=64) for _ in range(2))
    assert all(np.array_equal(one[i][0], two[i][0]) for i in range(25))
    err = capsys.readouterr().err
    assert all(err.count(f"{name}.png") == 1 for name in ("EPS", "IM", "TGA", "vast", "broken"))
    assert "vast.png has more than 100 megapixels" in err and "broken.png cannot be read" in err
    monkeypatch.setattr(synth, "MAX_PIXELS", 10**6)                # a JPEG decodes at an eighth of its size
    assert synth.read_photo(str(tmp_path / "huge.jpg")).shape == (375, 1125, 3)


def test_awkward_logos_are_used_or_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    good, big = np.zeros((40, 60, 4), np.uint8), np.zeros((2000, 3000, 4), np.uint8)
    good[10:30, 10:50], big[100:1900, 100:2900] = 200, (255, 0, 0, 255)
    white = np.full((40, 60, 3), 255, np.uint8)
    white[10:30, 10:50] = (200, 30, 30)
    white[15:25, 20:40] = 255                                      # white inside the mark is the mark's
    for name, pixels in (("good", good), ("big", big), ("white", white), ("black", 255 - white),
                         (ODD[:-4], good), ("opaque", good[..., :3] // 2 + 90), ("blank", white * 0),
                         ("empty", good * 0), ("dot", good[10:11, 10:11])):
        save(tmp_path / f"{name}.png", pixels)
    for kind in ("EPS", "IM", "TGA"):
        save(tmp_path / f"{kind}.png", white, format=kind)
    Image.fromarray(good).convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(good).convert("LA").save(tmp_path / "la.png")
    for name in ("broken.png", "a.svg", "._a.png", "._b.jpg"):     # ._*: a Mac's notes
        (tmp_path / name).write_bytes(b"\x89PNG no")
    logos = {Path(path).stem: load_logo(path) for path in synth.find_files(tmp_path, synth.LOGO_TYPES)}
    left_out = {name for name, levels in logos.items() if levels is None}
    assert left_out == {"opaque", "blank", "empty", "dot", "broken", "EPS", "IM", "TGA"}
    assert set(logos) - left_out == {"good", "big", "white", "black", "palette", "la", ODD[:-4]}
    assert max(logos["big"][0].shape) <= synth.MAX_LOGO
    assert all(logos[name][0].shape == (20, 40, 4) for name in ("good", "white", "black"))           # cropped
    assert all((logos[name][0][..., 3] == 255).all() for name in ("white", "black"))
    argv = [str(tmp_path / "x.png"), "--logos", str(tmp_path), "--recipe", "clwd", "--n", "2"]
    assert synth.main(argv) == 0
    err = capsys.readouterr().err
    assert all(f"{name}.png" in err for name in left_out)
    assert "alpha channel" in err and err.count("taken for clear") == 2 and "rsvg-convert" in err


@pytest.mark.parametrize("ground, name", [(255, "a.jpeg"), (250, "a.jpg"), (245, "a.png"), (12, "a.jpg"),
                                          (255, "a.webp")])
def test_an_opaque_logo_is_cut_from_a_nearly_white_or_black_ground(ground, name, tmp_path):
    logo = np.full((80, 120, 3), ground, np.uint8)
    cv2.circle(logo, (60, 40), 30, (200, 30, 30), -1, cv2.LINE_AA)
    path = save(tmp_path / name, logo, quality=85)
    assert synth.find_files(tmp_path, synth.LOGO_TYPES) == [path]
    alpha = load_logo(path)[0][..., 3]
    h, w = alpha.shape
    assert abs(h - 61) <= 4 and abs(w - 61) <= 4
    disc = np.hypot(*np.ogrid[0.5 - h / 2:h / 2, 0.5 - w / 2:w / 2]) < 30.5
    assert ((alpha > 127) == disc).mean() > 0.97


@pytest.mark.skipif(os.name == "nt", reason="no links and pipes for all there")
def test_each_folder_is_entered_once_however_deep_and_only_files_are_found(tmp_path, capsys):
    root, deep = tmp_path / "photos", "d/" * 1100
    for path in (root / "a", tmp_path / "other"):
        path.mkdir(parents=True)
    for path in ("a/x.jpg", "a/y.JPG", "../z.jpg", "a/._x.jpg", "a/x.txt", "../other/v.jpg"):
        (root / path).touch()
    for name, target in (("1", "."), ("2", "."), ("a/up", ".."), ("more", "a"), ("w.jpg", "../z.jpg"),
                         ("gone.jpg", "nowhere"), ("circle", "circle"), ("out", "../other")):
        (root / name).symlink_to(target)
    os.mkfifo(root / "a" / "pipe\x1b.jpg")
    subprocess.run(["mkdir", "-p", root / deep], check=True)
    (root / deep / "y.jpg").touch()
    names = [os.path.relpath(path, root) for path in synth.find_files(root, (".jpg",))]
    subprocess.run(["rm", "-r", root / "d"], check=True)           # pytest could not clear it away
    assert names == ["a/x.jpg", "a/y.JPG", f"{deep}y.jpg", "out/v.jpg", "w.jpg"]
    err = capsys.readouterr().err
    assert "pipe?.jpg is no file" in err and "gone.jpg is no file" in err and len(err.splitlines()) == 2


def test_the_sample_logos_are_many_and_all_usable(logos):
    paths = sorted(logos.glob("*.png"))
    assert len(paths) >= 40 and all(load_logo(str(path)) for path in paths)


# ---------------------------------------------------------------- command line

LINE = {"name": "a", "recipe": "clwd", "seed": 0, "jpeg": 75, "marks": []}             # of an export
FOREIGN = [b"{", b"[1]", b"3", b"\xff\xfe\0", b'{"name": "a"}', b"[" * 10**5, *(
    json.dumps(LINE | wrong).encode() for wrong in ({"name": 1}, {"jpeg": "x"}, {"jpeg": 7, "marks": [{}]}))]
MISTAKES = {               # what follows synth.py -> a part of what it says
    "x.png --images nowhere": "nowhere is not a folder", "x.png --logos nowhere": "nowhere is not a folder",
    "x.png --images empty": "no photo in empty", "x.png --logos empty --recipe clwd": "needs logos",
    "x.png --logos empty --recipe own": "needs logos", "photos/x.png --images photos": "would overwrite",
    ". --images images": "would overwrite", "set --recipe default": "set holds recipe clwd, seed 0",
    "set --recipe clwd --seed 1": "set holds recipe clwd, seed 0"}


@pytest.mark.parametrize("argv, sentence, line", [
    *((*mistake, json.dumps(LINE).encode()) for mistake in MISTAKES.items()),
    *(("set", "has a line that synth.py never wrote", line) for line in FOREIGN)])
def test_a_mistake_is_one_sentence_and_exit_2_and_changes_no_file(
        argv, sentence, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/x.png", "images/0000000.png", "set/meta.jsonl", "empty/x.txt"):
        Path(name).parent.mkdir()
        Path(name).write_bytes(line + b"\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert synth.main([*argv.split(), "--n", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("synth.py: ") and sentence in err and len(err.splitlines()) == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_preview(tmp_path, photos):
    out = tmp_path / "preview.png"
    assert synth.main([str(out), "--images", str(photos), "--n", "7", "--seed", "3", "--size", "64"]) == 0
    assert Image.open(out).size == (6 * 320, 4 * 320)
    assert synth.main([str(out), "--images", str(photos), "--kinds"]) == 0
    assert Image.open(out).size[1] == 200 * len(synth.KINDS)


def test_export_is_byte_identical_for_any_worker_count_and_restartable(tmp_path, photos, logos):
    def export(name, n, workers):
        argv = ["--images", str(photos), "--recipe", "logo-l", "--held-out", "--seed", "5"]
        assert synth.main([str(tmp_path / name), "--n", str(n), "--workers", str(workers), *argv]) == 0
        return {path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
                for path in (tmp_path / name).rglob("*") if path.is_file()}
    mine = tmp_path / "mine"
    mine.write_text("mine")
    whole = export("a", 12, 1)
    assert len(whole) == 25 and export("b", 12, 2) == whole
    export("c", 5, 2)
    with (tmp_path / "c" / "meta.jsonl").open("a") as f:
        f.write('{"name": "00000')                                 # a crash in the middle of a line
    (tmp_path / "c" / "images" / "0000004.png").write_bytes(b"kept")
    (tmp_path / "c" / "images" / "0000007.png").symlink_to(mine)   # no link is written through
    assert export("c", 12, 1) == whole | {"images/0000004.png": b"kept"} and mine.read_text() == "mine"
    line = json.loads(whole["meta.jsonl"].splitlines()[3])
    assert line["name"] == "0000003" and (line["seed"], line["recipe"]) == (5, "logo-l") and line["photo"]
    assert synth.is_held_out(str(logos / line["marks"][0]["mark"]), logos)
    mask = cv2.imread(str(tmp_path / "a" / "masks" / "0000003.png"), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(mask)) <= {0, 255} and abs((mask > 0).mean() - line["coverage"]) < 1e-6


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("event, code, sentence", [
    (lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL), 2, "a worker was killed"),
    (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped")])
def test_an_export_ends_with_a_killed_worker_or_ctrl_c(
        event, code, sentence, tmp_path, photos, monkeypatch, capsys):
    def ended(todo, **rest):
        yield next(todo)
        event()
        yield from todo
    monkeypatch.setattr(synth, "tqdm", ended)
    handler = signal.getsignal(signal.SIGINT)
    argv = [str(tmp_path), "--images", str(photos), "--workers", "2", "--n", "9999"]
    assert synth.main(argv) == code
    assert sentence in capsys.readouterr().err and not multiprocessing.active_children()
    assert len(list((tmp_path / "images").iterdir())) < 1000
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_export_goes_on_exactly_after_kill_9_and_after_ctrl_c(tmp_path, photos):
    out, meta = tmp_path / "set", tmp_path / "set" / "meta.jsonl"
    argv = [sys.executable, str(ROOT / "synth.py"), str(out), "--images", str(photos), "--recipe", "clwd",
            "--workers", "2", "--n"]

    def count():
        return meta.read_text().count("\n") if meta.exists() else 0

    def start():
        """Returns after eight more samples."""
        wanted = count() + 8
        run = subprocess.Popen([*argv, "100000"], stderr=subprocess.PIPE, text=True, start_new_session=True)
        while count() <= wanted:
            assert run.poll() is None
            time.sleep(0.05)
        return run
    run = start()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in workers):     # kill -9 leaves no worker
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) == 2 or not Path("/proc").is_dir()
    run = start()
    os.killpg(run.pid, signal.SIGINT)                              # as a terminal does: to the workers too
    err = run.communicate(timeout=30)[1].splitlines()
    assert run.returncode == 130 and "Traceback" not in "".join(err)
    assert err[-1].startswith("synth.py: stopped")
    n = count() + 4
    assert subprocess.run([*argv, str(n)], capture_output=True).returncode == 0
    names = [json.loads(line)["name"] for line in meta.read_text().splitlines()]
    assert names == [f"{i:07}" for i in range(n)]
    assert all((out / folder / f"{name}.png").exists() for name in names for folder in ("images", "masks"))
    assert not list(tmp_path.rglob("*.tmp"))
