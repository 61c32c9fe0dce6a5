import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import synth
from conftest import ROOT
from synth import MASK_ALPHA, MIN_CHANGE, RECIPES, Marks, Synth, blend, draw_mark, lay, load_logo, make_text


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


def test_clean_samples_have_an_empty_mask_and_are_every_sixth(samples):
    metas = [samples.make_sample(0, i) for i in range(150)]
    clean = [mask for _, mask, meta in metas if not meta["marks"]]
    assert all(not mask.any() for mask in clean)
    assert 0.12 < len(clean) / 150 < 0.45                          # also where the crop misses a mark


def test_generated_backgrounds_serve_without_any_photo(logos):
    image, mask, meta = Synth(None, logos).make_sample(0, 1)
    assert meta["photo"] == "generated" and image.std() > 5


# ---------------------------------------------------------------- mask rule

def test_outside_the_mask_nothing_changes_and_inside_something_does(logos):
    marks = Marks([str(p) for p in sorted(logos.glob("*.png"))], [])
    laid = 0
    for i in range(150):
        rng = np.random.default_rng(i)
        clean = np.full((150, 200, 3), rng.uniform(0, 1, 3), np.float32)
        image, mask = clean.copy(), np.zeros((150, 200), np.uint8)
        if not lay(image, mask, draw_mark(rng, marks, 200, 150), (0, 0), rng.uniform(0.12, 1), "normal"):
            assert np.array_equal(image, clean) and not mask.any()          # not seen, not labelled, not laid
            continue
        laid += 1
        change = np.abs(image - clean)
        assert change[mask == 0].max(initial=0) <= MASK_ALPHA + 1e-5        # at most the faintest rim
        assert change[mask == 1].mean() >= MIN_CHANGE
    assert laid > 75


def test_a_white_mark_on_a_white_photo_is_not_labelled():
    mark, matrix = np.ones((10, 10, 4), np.float32), np.float64([[1, 0, 5], [0, 1, 5]])
    image, mask = np.ones((30, 30, 3), np.float32), np.zeros((30, 30), np.uint8)
    assert lay(image, mask, (mark, matrix, {"wrap": False}), (0, 0), 0.5, "normal") is None
    assert not mask.any()
    image[:] = 0.5
    assert lay(image, mask, (mark, matrix, {"wrap": False}), (0, 0), 0.5, "normal")
    assert mask.sum() == 100 and mask[5:15, 5:15].all()


@pytest.mark.parametrize("mode, expected", [("normal", 0.55), ("multiply", 0.32), ("screen", 0.68),
                                            ("overlay", 0.44), ("soft light", 0.4288)])
def test_blend_modes_against_their_definitions(mode, expected):
    u, c, a = 0.4, 0.7, 1.0                                        # opaque colour c on photo u, then at half
    opaque = {"normal": c, "multiply": u * c, "screen": 1 - (1 - u) * (1 - c), "overlay": 2 * u * c,
              "soft light": (1 - 2 * c) * u * u + 2 * c * u}[mode]
    layer = np.float32([[[c * a] * 3 + [a]]])
    got = blend(np.full((1, 1, 3), u, np.float32), layer, 0.5, mode)
    assert np.allclose(got, (u + opaque) / 2, atol=1e-6)
    assert mode in ("overlay", "soft light", "multiply", "screen") or np.allclose(got, expected, atol=1e-6)
    layer[..., :3] *= 0.5                                          # premultiplied: half alpha is half opacity
    layer[..., 3] *= 0.5
    assert np.allclose(blend(np.full((1, 1, 3), u, np.float32), layer, 1.0, mode), got, atol=1e-6)


# ---------------------------------------------------------------- kinds and text

def test_every_kind_of_mark_appears_and_is_named(samples):
    kinds = {m["kind"] for i in range(250) for m in samples.make_sample(0, i)[2]["marks"]}
    assert kinds == set(synth.KINDS)


def test_tiles_repeat_over_the_whole_picture(logos):
    marks = Marks([], [])
    cell = np.zeros((20, 30, 4), np.float32)
    cell[5:10, 5:10] = 1
    layer, _ = synth.warp(cell, np.float64([[1, 0, 0], [0, 1, 0]]), 90, 60, wrap=True)
    assert np.array_equal(layer[:20, :30], layer[40:60, 60:90]) and layer[..., 3].sum() == 9 * 25
    assert marks.any_logo(np.random.default_rng(0)) is None


def test_text_in_another_script_only_where_the_font_has_it():
    rng = np.random.default_rng(0)
    texts = {make_text(rng, None) for _ in range(300)}             # Pillow's own font is Latin
    assert not any(ord(c) > 0x2FFF for text in texts for c in text)
    assert synth.has_glyphs(None, "Sample") and not synth.has_glyphs(None, "版权")


# ---------------------------------------------------------------- published recipes

def test_logo_recipes_keep_their_ranges(photos, logos):
    for recipe, low, high in (("logo-l", 0.35, 0.60), ("logo-h", 0.60, 0.85), ("logo-gray", 0.35, 0.60)):
        metas = [Synth(photos, logos, recipe).make_sample(0, i)[2]["marks"][0] for i in range(60)]
        opacity = [m["opacity"] for m in metas]
        assert low <= min(opacity) and max(opacity) <= high
        assert abs(np.mean(opacity) - (low + high) / 2) < 0.04
        assert all(low * 119 <= m["width"] == m["height"] <= high * 129 for m in metas)


def test_reference_recipe(photos, logos):
    metas = [Synth(photos, logos, "reference").make_sample(0, i)[2]["marks"] for i in range(80)]
    assert {len(m) for m in metas} == {1, 2, 3, 4, 5}
    marks = [m for group in metas for m in group]
    assert {m["blend"] for m in marks} == {"normal", "multiply", "overlay"}
    assert (0.3 <= min(m["opacity"] for m in marks)
            and abs(np.mean([m["angle"] == 0 for m in marks]) - 0.5) < 0.12)


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
    assert not set(train.marks.logos) & set(val.marks.logos) and val.marks.logos
    assert ({train.make_sample(0, i)[2]["photo"] for i in range(40)}
            <= {p.rsplit("/")[-1] for p in train.photos} | {"generated"})


def test_one_own_logo_serves_both_parts_and_says_so(tmp_path, logos, capsys):
    shutil.copy(logos / "emblem-fox.png", tmp_path)
    assert Synth(None, tmp_path).marks.logos == Synth(None, tmp_path, held_out=True).marks.logos
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
    Image.fromarray(good[..., :3]).save(tmp_path / "opaque.png")
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


def test_the_sample_logos_are_many_and_all_usable():
    paths = sorted((ROOT / "logos").glob("*.png"))
    assert len(paths) >= 40 and all(load_logo(str(p)) for p in paths)
