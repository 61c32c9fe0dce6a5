import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import synth
from conftest import ROOT
from synth import KINDS, MASK_ALPHA, MIN_CHANGE, RECIPES, SEEN, Art, Synth, blend, lay, load_logo, make_text


@pytest.fixture
def samples(photos, logos):
    return Synth(photos, logos, size=96, n=12)


# ---------------------------------------------------------------- the sample contract

@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sample_is_a_pure_function_of_seed_and_index(photos, logos, recipe):
    one, two = (Synth(photos, logos, recipe) for _ in range(2))
    two.make_sample(0, 5)                                          # another order, warm caches
    for i in (3, 0):
        (image, mask, meta), (image2, mask2, meta2) = one.make_sample(1, i), two.make_sample(1, i)
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (3, *mask.shape[1:]) and mask.shape[0] == 1
        assert set(np.unique(mask)) <= {0, 1}
        assert np.array_equal(image, image2) and np.array_equal(mask, mask2) and meta == meta2
    assert not np.array_equal(one.make_sample(1, 0)[0], one.make_sample(2, 0)[0])


def test_worker_count_changes_nothing(samples):
    def collect(workers):
        return [[t.numpy() for t in batch]
                for batch in DataLoader(samples, batch_size=4, num_workers=workers)]
    for a, b in zip(collect(0), collect(2), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


def test_sizes(photos, logos):
    assert Synth(photos, logos, size=64).make_sample(0, 0)[0].shape == (3, 64, 64)
    shapes = {Synth(photos, logos).make_sample(0, i)[0].shape[1:] for i in range(30)}
    assert {(120, 160), (160, 120), (128, 128)} <= shapes          # landscape, portrait, square, as they are
    assert Synth(photos, logos, "clwd").make_sample(0, 0)[0].shape == (3, 256, 256)


def test_some_crops_were_saved_small_and_then_enlarged(photos, logos, monkeypatch):
    saved = []                                                     # sides at which the camera sees crops
    monkeypatch.setattr(synth, "camera", lambda rng, image, gentle: (saved.append(len(image)) or image, None))
    monkeypatch.setattr(synth, "vary", lambda rng, image, mirror: np.zeros_like(image))
    monkeypatch.setattr(synth, "blend", lambda under, mark, opacity, mode: np.maximum(
        under, (mark[..., 3:] > 255 * MASK_ALPHA) * np.uint8(255)))          # white marks on black
    enlarged = Synth(photos, logos, size=96, kinds=("logo", "name", "site", "wordmark"))
    for i in range(100):
        image, mask, _ = enlarged.make_sample(0, i)
        assert image.shape == (3, 96, 96) and set(np.unique(mask)) <= {0, 1}
        assert ((image[0] > 127) != mask[0]).mean() < 0.02         # the truth went with the mark
    assert min(saved) >= 48 and 30 < sum(side < 96 for side in saved) < 70


@pytest.mark.parametrize("size", [None, 33, 64])
def test_tiny_and_very_flat_photos_serve_too(tmp_path, logos, size):
    for k, (w, h) in enumerate(((1, 1), (3, 200), (10, 10), (40, 30), (500, 20))):
        noise = np.random.default_rng(k).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{k}.png")
    tiny = Synth(tmp_path, logos, size=size, n=200)
    for i in range(200):
        image, mask = tiny[i]
        assert image.shape[1:] == mask.shape[1:] and (size is None or mask.shape == (1, size, size))


def test_no_mark_lies_unenlarged_on_an_enlarged_photo(photos, logos, monkeypatch):
    scales, cut = [], synth.cut_window                             # sizes of the ground that is marked, to the photo's
    monkeypatch.setattr(synth, "cut_window", lambda photo, W, H, *window:
                        (scales.append(min(W / photo.shape[1], H / photo.shape[0])), cut(photo, W, H, *window))[1])
    for size in (96, 160, 416):                                    # photos of 120 pixels: as in use, some are small
        large = Synth(photos, logos, size=size)
        for i in range(60):
            large.make_sample(0, i)
    assert len(scales) == 180 and max(scales) <= 1.01


def test_photos_smaller_than_the_crop_may_go_on_in_place_of_being_enlarged(tmp_path, monkeypatch):
    photo = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    for name, value in (("ENLARGED", 0), ("PAGES", 0), ("LEAVES", 0), ("COUNTS", {0: 1})):
        monkeypatch.setattr(synth, name, value)
    monkeypatch.setattr(synth, "camera", lambda rng, image, gentle: (image, None))
    monkeypatch.setattr(synth, "vary", lambda rng, image, mirror: image)
    monkeypatch.setattr(synth, "passepartout", lambda rng, photo: photo)

    def sharpness(size, continued):
        monkeypatch.setattr(synth, "CONTINUED", continued)
        crops = (Synth(tmp_path, size=size).make_sample(0, i)[0] for i in range(40))
        return np.mean([cv2.Laplacian(crop[0], cv2.CV_32F).std() for crop in crops])
    assert sharpness(160, 1) > 1.2 * sharpness(160, 0)
    assert sharpness(64, 1) == sharpness(64, 0)                    # large enough: nothing to go on with


def test_clean_samples_have_an_empty_mask_and_are_every_third(photos, logos):
    for size in (96, None):
        metas = [Synth(photos, logos, size=size).make_sample(0, i) for i in range(300)]
        clean = [mask for _, mask, meta in metas if not meta["marks"]]
        assert all(not mask.any() for mask in clean)
        assert 0.26 < len(clean) / 300 < 0.46                      # also where the crop misses a mark


def test_crops_in_a_row_share_a_photo_and_whole_pictures_do_not(photos, logos):
    def names(size):
        metas = [Synth(photos, logos, size=size).make_sample(0, i)[2] for i in range(40)]
        return [[m["photo"] for m in metas[k:k + 4] if m["photo"].endswith("jpg")] for k in range(0, 40, 4)]
    assert all(len(set(four)) <= 1 for four in names(96)) and len({f[0] for f in names(96) if f}) > 5
    assert sum(len(set(four)) > 1 for four in names(None)) > 7


def test_pages_are_backgrounds_and_their_text_is_no_mark(photos, logos, monkeypatch):
    monkeypatch.setattr(synth, "PAGES", 1)
    metas = [Synth(photos, logos).make_sample(0, i) for i in range(40)]
    assert {meta["photo"] for *_, meta in metas} == {"page"}
    assert {m["kind"] for *_, meta in metas for m in meta["marks"]} <= set(synth.PAGE_KINDS)
    clean = [(image, mask) for image, mask, meta in metas if not meta["marks"]]
    assert clean and all(not mask.any() for _, mask in clean)
    edges = [cv2.Canny(image[0], 80, 160).mean() for image, _ in clean]
    assert np.median(edges) > 10                                   # written all over


@pytest.mark.parametrize("H, W", [(300, 400), (130, 100)])
def test_a_crop_keeps_image_and_mask_together_and_looks_at_the_mark(H, W):
    mask = np.zeros((H, W), np.uint8)
    mask[H // 2:H // 2 + 15, W // 2:W // 2 + 20] = 1
    image, shares = np.repeat(mask[..., None] * 255, 3, 2), []
    for i in range(40):
        window, truth = synth.crop(np.random.default_rng(i), image, mask, 96)
        assert window.shape == (96, 96, 3) and truth.shape == (96, 96) and truth.max(initial=0) <= 1
        assert ((window[..., 0] > 127) == truth).mean() > 0.99
        shares.append(truth.mean())
    assert min(shares) > 0 and max(shares) > 1.5 * min(shares)     # at several scales


def test_generated_backgrounds_serve_without_any_photo(logos):
    image, mask, meta = Synth(None, logos).make_sample(0, 1)
    assert meta["photo"] == "generated" and image.std() > 5


# ---------------------------------------------------------------- mask rule

def test_outside_the_mask_nothing_changes_and_inside_something_does(logos):
    art = Art([str(p) for p in sorted(logos.glob("*.png"))], [])
    laid = 0
    for i in range(150):
        rng = np.random.default_rng(i)
        _, draw, low, high = KINDS[list(KINDS)[i % len(KINDS)]]
        clean = np.full((150, 200, 3), rng.integers(0, 256, 3), np.uint8)
        image, mask = clean.copy(), np.zeros((150, 200), np.uint8)
        mark, matrix = draw(rng, art, 200, 150)
        found = lay(image, mask, mark, matrix, rng.uniform(low, high), "normal")
        if found not in ("plain", "faint"):
            assert np.array_equal(image, clean) and not mask.any()          # not seen, not labelled, not laid
            continue
        laid += 1
        change = cv2.absdiff(image, clean)
        assert change[mask == 0].max(initial=0) <= 255 * MASK_ALPHA + 1     # at most the faintest rim
        seen = cv2.blur(cv2.cvtColor(change, cv2.COLOR_RGB2GRAY), (3, 3))[mask == 1] >= MIN_CHANGE
        assert seen.mean() >= SEEN - 0.1                           # seen over its own box there
    assert laid > 100


def test_a_white_mark_on_a_white_photo_is_not_labelled():
    mark, matrix = np.full((10, 10, 4), 255, np.uint8), np.float64([[1, 0, 5], [0, 1, 5]])
    image, mask = np.full((30, 30, 3), 255, np.uint8), np.zeros((30, 30), np.uint8)
    assert lay(image, mask, mark, matrix, 0.5, "normal") == "unseen" and not mask.any()
    image[:] = 128
    assert lay(image, mask, mark, matrix + [[0, 0, 40], [0, 0, 0]], 0.5, "normal") == "outside"
    assert lay(image, mask, mark, matrix, 0.1, "normal") == "faint" and mask.sum() == 100
    image[:] = 128
    assert lay(image, mask, mark, matrix, 0.5, "normal") == "plain"
    assert mask[5:15, 5:15].all() and mask.sum() == 100 and (image[5:15, 5:15] == 192).all()


def test_a_change_that_shows_on_flat_ground_is_hidden_by_texture():
    mark, matrix = np.full((60, 60, 4), 255, np.uint8), np.float64([[1, 0, 20], [0, 1, 20]])
    noise = np.random.default_rng(0).normal(0, 1, (100, 100, 1)).repeat(3, 2)
    found = []
    for contrast in (0, 9, 16, 50):
        image = np.clip(110 + contrast * noise, 0, 255).astype(np.uint8)
        found.append(lay(image, np.zeros((100, 100), np.uint8), mark, matrix, 0.15, "normal"))
    assert found == ["plain", "plain", "faint", "unseen"]


def test_marks_that_are_labelled_can_be_seen_after_the_camera(photos, logos, monkeypatch):
    """The camera is given the marked picture, and the clean one with the same random numbers."""
    shares, camera, clean = [], synth.camera, {}
    vary = synth.vary
    monkeypatch.setattr(synth, "vary", lambda rng, image, mirror: clean.setdefault("last", []).append(
        vary(rng, image, mirror)) or clean["last"][-1].copy())

    def both(rng, image, gentle):
        state = rng.bit_generator.state
        shot, quality = camera(rng, image, gentle)
        rng.bit_generator.state = state
        clean["pair"] = camera(rng, clean["last"][-1], gentle)[0], shot
        return shot, quality
    monkeypatch.setattr(synth, "camera", both)
    seen = Synth(photos, logos)
    for i in range(200):
        _, mask, meta = seen.make_sample(0, i)
        if mask.sum() > 50:
            shares.append(synth.seen_share(*clean["pair"], mask[0] * 255)[0])
    assert len(shares) > 100 and np.mean(np.array(shares) > 0.5) > 0.97


@pytest.mark.parametrize("mode", ["normal", "multiply", "screen", "overlay"])
def test_blend_modes_against_their_definitions(mode):
    rng = np.random.default_rng(0)
    u, c = rng.integers(0, 256, (2, 50, 60, 3)).astype(np.uint8)
    a = rng.integers(0, 256, (50, 60, 1)).astype(np.uint8)
    p = (c / 255 * a + 0.5).astype(np.uint8)                       # premultiplied
    U, C, A = u / 255, np.divide(p, a, out=np.zeros(p.shape), where=a > 0), a / 255
    B = {"normal": C, "multiply": U * C, "screen": 1 - (1 - U) * (1 - C),
         "overlay": np.where(U < 0.5, 2 * U * C, 1 - 2 * (1 - U) * (1 - C))}[mode]
    for opacity in (0.3, 1.0):
        expected = 255 * (U * (1 - A * opacity) + B * A * opacity)
        got = blend(u, np.dstack([p, a]), opacity, mode)
        assert got.dtype == np.uint8 and np.abs(got - np.clip(expected, 0, 255)).max() <= 0.51


def test_a_placed_mark_has_the_size_and_place_asked_for():
    mark = np.full((40, 60, 4), 255, np.uint8)
    for w, h in ((60, 40), (30, 20), (90, 30)):
        layer, (rows, columns) = synth.warp(mark, synth.placement(mark, w, h, 0, 12, 7), 200, 150)
        ys, xs = np.nonzero(layer[..., 3] > 127)
        assert (xs.min() + columns.start, ys.min() + rows.start) == (12, 7)
        assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (w, h)
    W, H = synth.turned_size(60, 40, 90)
    assert (W, H) == (40, 60) and synth.turned_size(60, 40, 0) == (60, 40)
    layer, (rows, columns) = synth.warp(mark, synth.placement(mark, 60, 40, 90, 50, 50), 200, 150)
    ys, xs = np.nonzero(layer[..., 3] > 127)
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (40, 60)            # turned about its own centre
    assert abs(xs.mean() + columns.start - 79.5) < 0.6 and abs(ys.mean() + rows.start - 69.5) < 0.6


# ---------------------------------------------------------------- kinds and text

def test_every_kind_of_mark_appears_and_is_named(samples):
    kinds = {m["kind"] for i in range(350) for m in samples.make_sample(0, i)[2]["marks"]}
    assert kinds == set(synth.KINDS)


def test_tiles_repeat_over_the_whole_picture():
    cell = np.zeros((20, 30, 4), np.uint8)
    cell[5:10, 5:10] = 255
    for turned in (0, 1):
        mark, matrix = synth.repeated(np.random.default_rng(0), cell, 190, 160, turned)
        part, (rows, columns) = synth.warp(mark, matrix, 190, 160)
        layer = np.zeros((160, 190), np.uint8)
        layer[rows, columns] = part[..., 3]
        quarters = [q.mean() for half in np.split(layer, 2) for q in np.split(half, 2, 1)]
        assert min(quarters) > 0.7 * 255 * 25 / 600 and max(quarters) < 1.4 * 255 * 25 / 600
    assert Art([], []).any_logo(np.random.default_rng(0)) is None


def test_signs_of_every_family_are_drawn_at_the_size_asked_for():
    signs = [synth.draw_sign(np.random.default_rng(i), side) for side in (12, 40) for i in range(40)]
    assert {a.shape for a in signs} == {(12, 12), (40, 40)}
    assert all(0.03 < (a > 127).mean() < 0.97 for a in signs)
    star, box = (synth.superformula(100, 4, p) > 127 for p in (0.5, 8))
    assert star[50, 8] and star[8, 50] and not star[25, 25] and box[22, 22]      # pointed, and not


def test_labels_are_small_and_near_a_corner_mostly_the_lower_right(photos, logos):
    art, right, widths = Art([], []), 0, []
    for i in range(200):
        mark, matrix = synth.label(np.random.default_rng(i), art, 416, 416)
        x, y = matrix[:, 2] + np.array(mark.shape[1::-1]) / 2
        right += x > 208 and y > 208
        widths.append(mark.shape[1] / 416)
    assert right > 120 and np.quantile(widths, 0.95) < 0.34 and min(widths) > 0.015
    marks = [m for i in range(40) for m in Synth(photos, logos, kinds=("label",)).make_sample(0, i)[2]["marks"]]
    assert all(0.35 <= m["opacity"] <= 0.9 for m in marks)


def test_one_kind_alone_can_be_asked_for(photos, logos):
    for kind in synth.KINDS:
        only = Synth(photos, logos, size=96, kinds=(kind,))
        assert {m["kind"] for i in range(8) for m in only.make_sample(0, i)[2]["marks"]} == {kind}


def test_recipe_own_lays_the_given_logos_and_nothing_else(photos, logos, monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a word was drawn")
    monkeypatch.setattr(synth, "draw_glyphs", refuse)
    monkeypatch.setattr(synth, "PAGES", 0)                         # a page's own text is no mark
    own = Synth(photos, logos, "own", size=96)
    marks = [m for i in range(60) for m in own.make_sample(0, i)[2]["marks"]]
    assert {m["kind"] for m in marks} == {"logo", "tiles"}
    assert {m["blend"] for m in marks} > {"normal"} and len({m["opacity"] for m in marks}) > 20
    with pytest.raises(ValueError, match="recipe own needs logos"):
        Synth(photos, tmp_path, "own")


def test_text_in_another_script_only_where_the_font_has_it():
    rng = np.random.default_rng(0)
    texts = {make_text(rng, None) for _ in range(300)}             # Pillow's own font is Latin
    assert not any(ord(c) > 0x2FFF for text in texts for c in text)
    assert synth.has_letter(None, "S") and synth.has_letter(None, " ") and not synth.has_letter(None, "版")


def test_scripts_are_found_by_their_letters_and_words_drawn_with_them(monkeypatch):
    monkeypatch.setattr(synth, "SCRIPTS", {"Upper": ("A", "Z", "SAMPLE PHOTO"), "Han": synth.SCRIPTS["Han"]})
    synth.scripts_of.cache_clear()
    assert {s: len(letters) for s, (letters, words) in synth.scripts_of(None).items()} == {"Upper": 26}
    monkeypatch.setattr(synth, "has_letter", lambda path, c: c.isupper())         # a font without other letters
    texts = {make_text(np.random.default_rng(i), None) for i in range(60)}
    assert all(text.isupper() for text in texts) and {"SAMPLE", "PHOTO"} < texts and len(texts) > 10
    synth.scripts_of.cache_clear()


def test_a_font_that_opens_but_cannot_be_drawn_is_named_and_left_out(tmp_path, capsys):
    font = bytearray(synth.ImageFont.load_default(20).font_bytes)
    (tmp_path / "good.ttf").write_bytes(font)
    at = font.index(b"glyf")                                       # junk for letters
    start, length = (int.from_bytes(font[at + k:at + k + 4], "big") for k in (8, 12))
    font[start:start + length] = b"\xff" * length
    (tmp_path / "broken.ttf").write_bytes(font)
    (tmp_path / "no.otf").write_bytes(b"no font")
    art = Synth(None, tmp_path).art
    assert {os.path.basename(art.font(np.random.default_rng(i))) for i in range(20)} == {"good.ttf"}
    err = capsys.readouterr().err
    assert "broken.ttf cannot be drawn" in err and "no.otf cannot be drawn" in err


def test_right_to_left_without_raqm_and_upright_columns(monkeypatch):
    set_as, font = [], synth.open_font(None, 20)

    class Recorder:
        @staticmethod
        def getmask(line):
            set_as.append(line)
            return font.getmask("x")
    row, column = synth.draw_glyphs("AB", None, 30), synth.draw_glyphs("A\nB", None, 30)
    assert row.shape[1] > row.shape[0] and column.shape[0] > 1.5 * column.shape[1]
    monkeypatch.setattr(synth, "load_font", lambda path, px: Recorder)
    for has_raqm in (True, False):
        monkeypatch.setattr(synth, "HAS_RAQM", has_raqm)
        for text in ("שלום", "abc", "版\n权"):
            synth.draw_glyphs(text, None, 20)
    assert set_as == ["שלום", "abc", "版", "权", "םולש", "abc", "版", "权"]


# ---------------------------------------------------------------- published recipes

def draws(photos, logos, recipe, n=2000) -> list[dict]:
    recipe = Synth(photos, logos, recipe)
    return [recipe.make_sample(7, i)[2] for i in range(n)]


def near(values, mean: float, sd: float) -> bool:
    """Within four standard errors of the law's mean."""
    return abs(np.mean(values) - mean) < 4 * sd / len(values) ** 0.5


SD = 12 ** -0.5                # of U(0, 1)


@pytest.mark.parametrize("recipe, low, high", [("logo-l", 0.35, 0.60), ("logo-h", 0.60, 0.85),
                                               ("logo-gray", 0.35, 0.60)])
def test_the_logo_recipes_follow_their_law(photos, logos, recipe, low, high):
    metas = draws(photos / "train", logos, recipe)
    marks = [meta["marks"][0] for meta in metas]
    assert all(len(meta["marks"]) == 1 and meta["jpeg"] is None for meta in metas)
    opacity, width = (np.array([m[k] for m in marks]) for k in ("opacity", "width"))
    assert low <= opacity.min() and opacity.max() <= high
    assert near(opacity, (low + high) / 2, SD * (high - low))
    assert near([m["angle"] for m in marks], 180, SD * 360)
    assert all(m["height"] == m["width"] and m["blend"] == "normal" for m in marks)
    square = np.array([int(meta["photo"][:-4]) % 3 == 2 for meta in metas])      # conftest: 128 x 128
    sides = width[square] / 128                                    # the least of two U(low, high)
    assert low - 0.005 <= sides.min() and sides.max() <= high + 0.005
    assert near(sides, low + (high - low) / 3, (high - low) / 18 ** 0.5)


def test_the_reference_recipe_follows_its_law(photos, logos):
    metas = draws(photos / "train", logos, "reference")
    marks = [m for meta in metas for m in meta["marks"]]
    assert near([len(meta["marks"]) for meta in metas], 3, 2 ** 0.5)
    assert {len(meta["marks"]) for meta in metas} == {1, 2, 3, 4, 5}
    assert near([m["opacity"] for m in marks], 0.65, SD * 0.7)
    assert all(near([m["blend"] == b for m in marks], 1 / 3, 0.47) for b in ("normal", "multiply", "overlay"))
    assert near([m["angle"] == 0 for m in marks], 0.5, 0.5)
    assert near([m["angle"] for m in marks if m["angle"]], 180, SD * 360)
    whole = (200, 200, 128 * 2 ** 0.5)                             # diagonals of conftest's shapes
    diagonal = [np.hypot(m["width"], m["height"]) / whole[int(meta["photo"][:-4]) % 3]
                for meta in metas for m in meta["marks"]]
    assert near(diagonal, 0.375, SD * 0.65) and 0.04 < min(diagonal) and max(diagonal) < 0.72
    for meta in metas:                                             # at least 10 pixels inside
        W, H = ((160, 120), (120, 160), (128, 128))[int(meta["photo"][:-4]) % 3]
        for m in meta["marks"]:
            w, h = synth.turned_size(m["width"], m["height"], m["angle"])
            assert min(10, w) <= m["x"] + w and m["x"] <= W - min(10, w)
            assert min(10, h) <= m["y"] + h and m["y"] <= H - min(10, h)


def test_the_clwd_recipe_follows_its_law(photos, logos):
    metas = draws(photos / "train", logos, "clwd", 1200)     # 256 x 256 each, so the slowest
    marks = [meta["marks"][0] for meta in metas]
    assert all(len(meta["marks"]) == 1 and meta["jpeg"] == 75 for meta in metas)
    for side in ("width", "height"):
        assert near([m[side] for m in marks], 133, SD * 247)
        assert {10 <= m[side] <= 256 for m in marks} == {True}
    assert near([m["opacity"] for m in marks], 0.5, SD * 0.4)
    assert {m["blend"] for m in marks} == {"normal"}
    for m in marks:                                                # wholly inside
        w, h = synth.turned_size(m["width"], m["height"], m["angle"])
        assert m["x"] >= 0 and m["y"] >= 0 and m["x"] + w <= 256 and m["y"] + h <= 256


@pytest.mark.parametrize("recipe", ["reference", "logo-l", "logo-h", "logo-gray"])
def test_truth_of_the_pasted_recipes_is_any_alpha(photos, logos, recipe, monkeypatch):
    marked = Synth(photos, logos, recipe)
    monkeypatch.setattr(synth, "pick", lambda rng, options, weights=None: options[0])      # blend: normal
    for i in range(12):
        changed = False
        for level in (0, 255):                                     # whatever its colour, one of them shows it
            ground = np.full((150, 200, 3), level, np.uint8)
            monkeypatch.setattr(Synth, "background", lambda self, rng: (ground.copy(), "plain"))
            image, mask, _ = marked.make_sample(0, i)
            changed |= (image != level).any(0)
        assert not (changed & (mask[0] == 0)).any()
        assert mask.sum() <= 1.1 * changed.sum()                   # less the rim that rounds to nothing


def test_logo_gray_has_no_colour(photos, logos, monkeypatch):
    monkeypatch.setattr(Synth, "background", lambda self, rng: (np.full((90, 90, 3), 99, np.uint8), "plain"))
    images = [Synth(photos, logos, "logo-gray").make_sample(0, i)[0].astype(int) for i in range(12)]
    assert np.ptp(images, axis=1).max() <= 1 and np.ptp(images) > 50


def test_clwd_truth_is_the_visible_difference(photos, logos, monkeypatch):
    monkeypatch.setattr(synth, "jpeg", lambda image, quality: image)
    marked = Synth(photos, logos, "clwd")
    for i in range(10):
        image, mask, meta = marked.make_sample(0, i)
        assert 0.3 <= meta["marks"][0]["opacity"] <= 0.7
        monkeypatch.setattr(synth, "blend", lambda under, layer, opacity, mode: under)
        clean = marked.make_sample(0, i)[0]
        monkeypatch.undo()
        monkeypatch.setattr(synth, "jpeg", lambda image, quality: image)
        assert np.array_equal(mask[0], np.abs(image.astype(int) - clean).sum(0) > 15)


# ---------------------------------------------------------------- split and bad input

def test_the_split_does_not_move_when_files_are_added(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.jpg").touch()
    first = synth.find_files(tmp_path, (".jpg",))
    held = {p for p in first if synth.is_held_out(p, tmp_path)}
    assert 0.05 < len(held) / 300 < 0.16
    (tmp_path / "a").mkdir()
    shutil.move(tmp_path / "7.jpg", tmp_path / "a" / "7.jpg")       # only the name matters, not the folder
    assert synth.is_held_out(str(tmp_path / "a" / "7.jpg"), tmp_path) == (str(tmp_path / "7.jpg") in held)


def test_folders_called_train_and_val_are_the_split(photos):
    train, val = Synth(photos), Synth(photos, held_out=True)
    assert len(train.photos) == 30 and len(val.photos) == 10
    assert all("/val/" in p for p in val.photos) and len(Synth(photos / "val", held_out=True).photos) == 10


def test_no_held_out_logo_or_photo_is_ever_drawn_in_training(photos, logos):
    train, val = Synth(photos, logos), Synth(photos, logos, held_out=True)
    assert not set(train.art.logos) & set(val.art.logos) and val.art.logos
    assert ({train.make_sample(0, i)[2]["photo"] for i in range(40)}
            <= {p.rsplit("/")[-1] for p in train.photos} | {"generated", "page"})


def test_one_own_logo_serves_both_parts_and_says_so(tmp_path, logos, capsys):
    shutil.copy(logos / "emblem-fox.png", tmp_path)
    assert Synth(None, tmp_path).art.logos == Synth(None, tmp_path, held_out=True).art.logos
    assert "used for both" in capsys.readouterr().err


def test_a_corrupt_photo_among_good_ones_is_named_once_and_passed_over(tmp_path, photos, logos, capsys):
    shutil.copytree(photos / "train", tmp_path / "train")
    for i in range(10):
        (tmp_path / "train" / f"{i}.jpg").write_bytes(b"no picture")
    some = Synth(tmp_path, logos)
    again = Synth(tmp_path, logos)
    for i in range(25):
        assert np.array_equal(some.make_sample(0, i)[0], again.make_sample(0, i)[0])
    err = capsys.readouterr().err
    assert "cannot be read" in err and len(err.splitlines()) == len(set(err.splitlines()))


def test_awkward_logos(tmp_path, capsys):
    good = np.zeros((40, 60, 4), np.uint8)
    good[10:30, 10:50] = 200
    Image.fromarray(good).save(tmp_path / "good.png")
    Image.fromarray(good[..., :3] // 2 + 90).save(tmp_path / "opaque.png")   # on grey
    Image.fromarray(good * 0).save(tmp_path / "empty.png")
    Image.fromarray(good[10:11, 10:11]).save(tmp_path / "dot.png")
    Image.fromarray(good).convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(good).convert("LA").save(tmp_path / "la.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    big = Image.new("RGBA", (3000, 2000))
    big.paste((255, 0, 0, 255), (100, 100, 2900, 1900))
    big.save(tmp_path / "big.png")
    usable = {p.name for p in tmp_path.iterdir() if load_logo(str(p))}
    assert usable == {"good.png", "palette.png", "la.png", "big.png"}
    assert max(load_logo(str(tmp_path / "big.png"))[0].shape) <= synth.MAX_LOGO
    assert load_logo(str(tmp_path / "good.png"))[0].shape == (20, 40, 4)         # cropped to what is there
    err = capsys.readouterr().err
    assert all(f"{name}.png" in err for name in ("opaque", "empty", "dot", "broken"))
    assert "alpha channel" in err


def test_a_macs_notes_are_no_pictures_and_a_drawing_is_told_how_to_become_one(tmp_path, capsys):
    for name in ("._a.png", "a.svg", "._b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    assert synth.find_files(tmp_path, synth.LOGO_TYPES) == []
    assert Synth(None, tmp_path).art.logos == [] and "rsvg-convert" in capsys.readouterr().err


@pytest.mark.parametrize("ground, name", [(255, "jpeg"), (250, "jpg"), (245, "png"), (12, "jpg"), (255, "webp")])
def test_an_opaque_logo_is_cut_from_a_nearly_white_or_black_ground(ground, name, tmp_path, capsys):
    logo = np.full((80, 120, 3), ground, np.uint8)
    cv2.circle(logo, (60, 40), 30, (200, 30, 30), -1, cv2.LINE_AA)
    path = str(tmp_path / f"a.{name}")
    Image.fromarray(logo).save(path, quality=85)
    assert synth.find_files(tmp_path, synth.LOGO_TYPES) == [path]
    cut = load_logo(path)[0]
    assert abs(cut.shape[0] - 61) <= 4 and abs(cut.shape[1] - 61) <= 4
    disc = np.hypot(*(np.mgrid[:cut.shape[0], :cut.shape[1]] - np.array(cut.shape[:2])[:, None, None] / 2 + 0.5)) < 30.5
    assert ((cut[..., 3] > 127) == disc).mean() > 0.97
    assert "taken for clear" in capsys.readouterr().err
    logo[:] = (180, 40, 60)                                        # nothing but the rectangle
    Image.fromarray(logo).save(path.replace("a.", "b."), quality=85)
    assert load_logo(path.replace("a.", "b.")) is None and "b." in capsys.readouterr().err


def test_pure_surroundings_of_an_opaque_logo_are_cut_out(tmp_path, capsys):
    logo = np.full((40, 60, 3), 255, np.uint8)
    logo[10:30, 10:50] = (200, 30, 30)
    logo[15:25, 20:40] = 255                                       # white inside the mark is the mark's
    Image.fromarray(logo).save(tmp_path / "white.png")
    Image.fromarray(255 - logo).save(tmp_path / "black.png")
    for name in ("white", "black"):
        path = str(tmp_path / f"{name}.png")
        cut = load_logo(path)[0]
        assert cut.shape == (20, 40, 4) and (cut[..., 3] == 255).all()
    assert capsys.readouterr().err.count("taken for clear") == 2
    argv = [str(tmp_path / "x.png"), "--logos", str(tmp_path), "--recipe", "clwd", "--n", "2"]
    assert synth.main(argv) == 0


def test_photos_of_every_mode(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.full((60, 90), 40000, np.uint16)).save(tmp_path / "deep.png")
    rgb.convert("P").save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.resize((4200, 2800)).save(tmp_path / "huge.jpg")
    for path in tmp_path.iterdir():
        photo = synth.read_photo(str(path))
        assert photo.dtype == np.uint8 and photo.shape[2] == 3, path
        expected = {"turned.jpg": (90, 60), "huge.jpg": (700, 1050)}.get(path.name, (60, 90))
        assert photo.shape[:2] == expected, path
    assert abs(int(synth.read_photo(str(tmp_path / "deep.png")).mean()) - 40000 // 257) <= 1


def test_only_pictures_are_opened_whatever_their_names(tmp_path, monkeypatch, capsys):
    odd = os.fsdecode(os.fsencode(tmp_path) + (b"/o.png" if sys.platform == "darwin" else b"/\xff.png"))
    Image.new("RGBA", (40, 30), (90, 0, 0, 200)).save(odd)
    assert synth.read_logo(odd).shape == (30, 40, 4) and synth.read_photo(odd).shape == (30, 40, 3)
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    for kind in ("EPS", "IM", "TGA"):
        Image.new("RGB", (40, 30)).save(tmp_path / "x.png", kind)
        assert synth.read_photo(str(tmp_path / "x.png")) is None
        assert synth.read_logo(str(tmp_path / "x.png")) is None


@pytest.mark.skipif(os.name == "nt", reason="no links and pipes for all there")
def test_each_folder_once_and_only_files(tmp_path, capsys):
    deep = tmp_path / "photos" / "a"
    deep.mkdir(parents=True)
    for path in (deep / "x.jpg", deep / "y.JPG", tmp_path / "z.jpg", deep / "._x.jpg", deep / "x.txt"):
        path.touch()
    for name, target in (("1", "."), ("2", "."), ("a/up", ".."), ("more", "a"), ("w.jpg", "../z.jpg"),
                         ("gone.jpg", "nowhere"), ("circle", "circle"), ("out", "../other")):
        (tmp_path / "photos" / name).symlink_to(target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "v.jpg").touch()
    os.mkfifo(deep / "pipe\x1b.jpg")
    names = synth.find_files(tmp_path / "photos", (".jpg",))
    assert [str(Path(n).relative_to(tmp_path / "photos")) for n in names] == ["a/x.jpg", "a/y.JPG", "out/v.jpg",
                                                                            "w.jpg"]
    err = capsys.readouterr().err
    assert "pipe?.jpg is no file" in err and "gone.jpg is no file" in err and len(err.splitlines()) == 2
    folders, deep = [], str(tmp_path / "photos")
    for _ in range(1100):
        folders.append(deep := f"{deep}/d")
        os.mkdir(deep)
    Path(f"{deep}/y.jpg").touch()
    assert f"{deep}/y.jpg" in synth.find_files(tmp_path / "photos", (".jpg",))
    os.unlink(f"{deep}/y.jpg")                                     # pytest could not clear them away
    for folder in folders[::-1]:
        os.rmdir(folder)


def test_a_photo_of_400_megapixels_costs_no_memory(tmp_path, capsys, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "vast.png")
    assert synth.read_photo(str(tmp_path / "vast.png")) is None and "megapixels" in capsys.readouterr().err
    monkeypatch.setattr(synth, "MAX_PIXELS", 10**6)                # a JPEG decodes at an eighth of its size
    Image.new("RGB", (9000, 3000)).save(tmp_path / "wide.jpg")
    assert synth.read_photo(str(tmp_path / "wide.jpg")).shape == (375, 1125, 3)


@pytest.mark.parametrize("argv", [["x.png", "--images", "nowhere"], ["x.png", "--logos", "nowhere"],
                                  ["x.png", "--images", "EMPTY"],
                                  ["x.png", "--recipe", "clwd", "--logos", "EMPTY"]])
def test_a_missing_or_empty_folder_is_one_sentence_and_exit_2(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert synth.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("synth.py: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------- command line

def test_preview(tmp_path, photos, logos):
    out = tmp_path / "preview.png"
    assert synth.main([str(out), "--images", str(photos), "--n", "7", "--seed", "3", "--size", "64"]) == 0
    assert Image.open(out).size == (6 * 320, 4 * 320)
    assert synth.main([str(out), "--images", str(photos), "--kinds"]) == 0
    assert Image.open(out).size[1] == 200 * len(synth.KINDS)


def test_export_is_byte_identical_for_any_worker_count_and_restartable(tmp_path, photos):
    def export(name, n, workers):
        argv = ["--images", str(photos), "--recipe", "logo-l", "--held-out", "--seed", "5"]
        assert synth.main([str(tmp_path / name), "--n", str(n), "--workers", str(workers), *argv]) == 0
        return {p.relative_to(tmp_path / name): p.read_bytes()
                for p in (tmp_path / name).rglob("*") if p.is_file()}
    whole = export("a", 12, 1)
    assert len(whole) == 25 and export("b", 12, 2) == whole
    export("c", 5, 2)
    with (tmp_path / "c" / "meta.jsonl").open("a") as f:
        f.write('{"name": "00000')                                 # a crash in the middle of a line
    (tmp_path / "c" / "images" / "0000004.png").write_bytes(b"kept")
    assert export("c", 12, 1) == whole | {
        (tmp_path / "c" / "images" / "0000004.png").relative_to(tmp_path / "c"): b"kept"}
    line = json.loads((tmp_path / "a" / "meta.jsonl").read_text().splitlines()[3])
    assert line["name"] == "0000003" and {"photo", "marks", "coverage", "seed", "recipe"} <= set(line)
    mask = cv2.imread(str(tmp_path / "a" / "masks" / "0000003.png"), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(mask)) <= {0, 255} and abs((mask > 0).mean() - line["coverage"]) < 1e-6
    assert synth.main([str(tmp_path / "a"), "--n", "12", "--recipe", "clwd"]) == 2  # it holds another recipe


@pytest.mark.parametrize("argv", [["photos/x.png", "--images", "photos"], [".", "--images", "images"]])
def test_an_input_is_not_overwritten(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/x.png", "images/0000000.png"):
        Path(name).parent.mkdir()
        Image.new("RGB", (40, 30)).save(name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert synth.main([*argv, "--n", "1"]) == 2 and "would overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_no_link_is_written_through(tmp_path, photos):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "set" / "images").mkdir(parents=True)
    for name in ("0000000.tmp", "0000000.png"):
        (tmp_path / "set" / "images" / name).symlink_to("../../mine")
    assert synth.main([str(tmp_path / "set"), "--images", str(photos), "--n", "1", "--workers", "1"]) == 0
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("line", [b"{", b"[1]", b"3", b"\xff\xfe\0", b'{"name": "a"}', b"[" * 10**5,
                                  b'{"name": 1, "recipe": "clwd", "seed": 0, "jpeg": 75, "marks": []}',
                                  b'{"name": "a", "recipe": "clwd", "seed": 0, "jpeg": "x", "marks": []}',
                                  b'{"name": "a", "recipe": "clwd", "seed": 0, "jpeg": 7, "marks": [{}]}'])
def test_a_foreign_meta_file_is_named_and_kept(line, tmp_path, capsys):
    (tmp_path / "meta.jsonl").write_bytes(line + b"\n")
    assert synth.main([str(tmp_path), "--n", "1"]) == 2
    assert "has a line that synth.py never wrote" in capsys.readouterr().err
    assert (tmp_path / "meta.jsonl").read_bytes() == line + b"\n"


def test_a_worker_that_is_killed_ends_it(tmp_path, photos, monkeypatch, capsys):
    def killed(todo, **rest):
        yield next(todo)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield from todo
    monkeypatch.setattr(synth, "tqdm", killed)
    assert synth.main([str(tmp_path / "set"), "--images", str(photos), "--workers", "2", "--n", "9999"]) == 2
    assert "a worker was killed" in capsys.readouterr().err and not multiprocessing.active_children()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, photos):
    argv = [sys.executable, str(ROOT / "synth.py"), str(tmp_path / "set"), "--images", str(photos),
            "--recipe", "clwd", "--workers", "2", "--n"]
    run = subprocess.Popen([*argv, "100000"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    meta = tmp_path / "set" / "meta.jsonl"

    def wait_for(lines):
        while not (meta.exists() and meta.read_text().count("\n") > lines):
            assert run.poll() is None
            time.sleep(0.05)
    if Path("/proc").is_dir():                                     # kill -9 leaves no worker
        wait_for(0)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.kill()
        run.communicate()
        deadline = time.monotonic() + 10
        while any(Path("/proc", pid).exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(workers) == 2
        run = subprocess.Popen([*argv, "100000"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(meta.read_text().count("\n") + 8 if meta.exists() else 8)
    os.killpg(run.pid, signal.SIGINT)                              # as a terminal does: to the workers too
    err = run.communicate(timeout=30)[1].splitlines()
    assert run.returncode == 130 and "Traceback" not in "".join(err)
    assert err[-1].startswith("synth.py: stopped")
    n = meta.read_text().count("\n") + 4
    assert subprocess.run([*argv, str(n)], capture_output=True).returncode == 0
    names = [json.loads(line)["name"] for line in meta.read_text().splitlines()]
    assert names == [f"{i:07}" for i in range(n)]
    assert all((tmp_path / "set" / f / f"{name}.png").exists() for name in names for f in ("images", "masks"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_ctrl_c_between_two_samples_ends_it_too(tmp_path, photos, monkeypatch):
    def interrupted(todo, **rest):
        yield next(todo)
        signal.raise_signal(signal.SIGINT)
        yield from todo
    monkeypatch.setattr(synth, "tqdm", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert synth.main([str(tmp_path / "set"), "--images", str(photos), "--recipe", "clwd", "--workers", "2",
                       "--n", "3000"]) == 130
    assert len(list((tmp_path / "set" / "images").iterdir())) < 1000
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_sample_logos_are_many_and_all_usable():
    paths = sorted((ROOT / "logos").glob("*.png"))
    assert len(paths) >= 40 and all(load_logo(str(p)) for p in paths)
