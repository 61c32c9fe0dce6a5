import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import nn

import eval as ev
import model
from conftest import ROOT
from model import (ENLARGE, build, dilate, load_checkpoint, load_model, pack, predict_prob, predict_probs,
                   save_checkpoint)
from synth import RECIPES, Synth


class White(nn.Module):
    """Marks what is nearly white: right on the black and white pictures below. Blind from row `rows` on."""

    def __init__(self, rows=10_000, prob=0.9):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.size, self.threshold = 512, 0.5
        self.rows, self.logit = rows, float(np.log(prob / (1 - prob)))

    def forward(self, image):
        white = image.float().amin(1, keepdim=True) > 200
        white[:, :, self.rows:] = False
        return torch.where(white, self.logit, -9.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(model, "ENLARGE", 1)      # small pictures stay as they are, and White exact
    monkeypatch.setattr(ev, "BOOTSTRAP", 50)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    net = build()
    net.model.segmentation_head[0].weight.data *= 0.1     # no prob of 0 or 1 before training
    save_checkpoint(pack(net), path)
    return path


@pytest.fixture
def stub(monkeypatch):
    """good.pt finds all, any other file misses what is below row 10."""
    monkeypatch.setattr(ev, "load_model",
                        lambda path, device: White() if Path(path).name == "good.pt" else White(10))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(tp=0, fp=0, fn=0, pixels=100, **meta):
    return {"tp": tp, "fp": fp, "fn": fn, "pixels": pixels, "meta": meta}


def squares(n=3, size=40):
    """n pictures of a white square on black, lower ones for larger i, and their masks {0, 255}."""
    for i in range(n):
        mask = np.zeros((size, size + 8), np.uint8)
        mask[2 + 8 * i:14 + 8 * i, 10:30] = 255
        yield np.repeat(mask[..., None], 3, 2), mask


# ---------------------------------------------------------------- metrics

def test_hand_computed_two_by_two():
    mask, truth = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [255, 0]])
    counts = ev.count(mask, truth)
    assert counts == {"tp": 1, "fp": 1, "fn": 1, "pixels": 4}
    assert ev.ratios(counts) == {"iou": 1 / 3, "f1": 1 / 2, "precision": 1 / 2, "recall": 1 / 2,
                                 "excess_per_mark": 1 / 2}
    other = ev.count(np.ones((2, 2)), np.array([[0, 0], [0, 1]]))                 # IoU 1/4, F1 2/5
    s = ev.summarise([counts, other])
    assert s["iou"] == pytest.approx((1 / 3 + 1 / 4) / 2) and s["f1"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert s["dataset_iou"] == 2 / 7 and s["dataset_f1"] == 4 / 9                 # tp 2, fp 4, fn 1
    assert s["precision"] == 2 / 6 and s["recall"] == 2 / 3
    assert s["excess_per_picture"] == (1 / 4 + 3 / 4) / 2 and s["excess_per_mark"] == 4 / 3
    assert s["recall_per_picture"] == (1 / 2 + 1) / 2 and s["fully_covered"] == 1 / 2      # other is covered
    assert (s["fully_covered_low"], s["fully_covered_high"]) == (0, 1)
    assert (s["iou_low"], s["iou_high"]) == pytest.approx((1 / 4, 1 / 3))
    assert (s["n_marked"], s["n_clean"]) == (2, 0) and np.isnan(s["false_alarm_rate"])


def test_empty_masks():
    nothing, something = np.zeros((50, 50)), np.zeros((50, 50))
    something[0, :5] = 1
    clean, missed = ev.count(nothing, nothing), ev.count(nothing, something)
    assert np.isnan(ev.summarise([clean])["iou"]) and ev.summarise([clean])["false_alarm_rate"] == 0
    assert ev.summarise([clean, missed])["iou"] == 0                   # a miss is 0, clean ones do not count
    assert np.isnan(ev.summarise([missed])["precision"]) and ev.summarise([missed])["recall"] == 0
    two, three = row(fp=2, pixels=2000), row(fp=3, pixels=2000)        # .001 is allowed, more is not
    assert (ev.summarise([two])["false_alarm_rate"] == 0
            and ev.summarise([two, three])["false_alarm_rate"] == 0.5)
    assert ev.summarise([two, three] * 9)["false_alarm_rate_low"] < 0.5
    assert np.isnan(ev.summarise([three])["dataset_iou"])
    assert all(np.isnan(v) for k, v in ev.summarise([]).items() if not k.startswith("n_"))


def test_agrees_with_smp_and_with_a_slow_oracle():
    rng, rows, oracle, masks, truths = np.random.default_rng(0), [], [], [], []
    for i in range(200):
        mask, truth = (rng.random((2, 12, 9)) < rng.uniform(0, 0.6, (2, 1, 1))).astype(np.uint8)
        mask, truth = mask * (i % 9 > 0), truth * (i % 7 > 0)          # some empty, some both
        tp = fp = fn = 0
        for y in range(12):
            for x in range(9):
                tp += int(mask[y, x] == 1 and truth[y, x] == 1)
                fp += int(mask[y, x] == 1 and truth[y, x] == 0)
                fn += int(mask[y, x] == 0 and truth[y, x] == 1)
        assert ev.count(mask, truth) == {"tp": tp, "fp": fp, "fn": fn, "pixels": 108}
        rows.append(ev.count(mask, truth))
        oracle.append((tp, fp, fn))
        masks.append(torch.from_numpy(mask)[None].long())
        truths.append(torch.from_numpy(truth)[None].long())
    stats = smp.metrics.get_stats(torch.stack(masks), torch.stack(truths), mode="binary")
    assert [tuple(int(s[i]) for s in stats[:3]) for i in range(200)] == oracle
    s = ev.summarise(rows)
    assert s["dataset_iou"] == pytest.approx(float(smp.metrics.iou_score(*stats, reduction="micro")))
    assert s["dataset_f1"] == pytest.approx(float(smp.metrics.f1_score(*stats, reduction="micro")))
    assert s["precision"] == pytest.approx(float(smp.metrics.precision(*stats, reduction="micro")))
    assert s["recall"] == pytest.approx(float(smp.metrics.recall(*stats, reduction="micro")))
    marked = [part[[tp + fn > 0 for tp, _, fn in oracle]] for part in stats]
    assert s["iou"] == pytest.approx(float(smp.metrics.iou_score(*marked, reduction="micro-imagewise")))
    assert s["f1"] == pytest.approx(float(smp.metrics.f1_score(*marked, reduction="micro-imagewise")))


def test_interval_is_reproducible_and_covers(monkeypatch):
    monkeypatch.setattr(ev, "BOOTSTRAP", 1000)
    values = list(np.random.default_rng(1).random(200))
    low, high = ev.interval(values)
    assert (low, high) == ev.interval(values) and low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 200 ** 0.5, rel=0.15)  # the normal theory
    rng = np.random.default_rng(0)                                     # resample by resample, the slow way
    means = [np.mean([values[k] for k in rng.integers(200, size=200)]) for _ in range(1000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    assert ev.interval([0.5]) == (0.5, 0.5) and np.isnan(ev.interval([])[0])


def test_best_threshold_has_the_best_iou_then_the_fewest_false_alarms_then_the_most_recall():
    curve = {t: {"n_marked": 1, "iou": iou, "false_alarm_rate": rate} for t, iou, rate in (
        (0.1, 0.499, 0.3), (0.2, 0.5, 0.2), (0.3, 0.5, 0.2), (0.5, 0.49, 0.1), (0.9, 0.1, 0))}
    assert ev.best_threshold(curve) == 0.2
    with pytest.raises(ValueError, match="raise --n"):
        ev.best_threshold({0.5: {"n_marked": 0}})
    pictures = ev.Pictures("x", "-", 3, partial(make_square, 3))
    curve = ev.summarise_curve(ev.score(White(prob=0.62), pictures))
    assert list(curve) == [k / 20 for k in range(1, 20)]
    assert [curve[t]["iou"] for t in (0.05, 0.6, 0.65, 0.95)] == [1, 1, 0, 0]
    assert ev.best_threshold(curve) == 0.05                # no clean sample, and nothing to choose by IoU


def test_breakdown_takes_marks_only_where_there_is_exactly_one():
    one = {"opacity": 0.2, "kind": "credit", "blend": "normal"}
    rows = [row(1, 0, 1, marks=[one], jpeg=None), row(4, 0, 0, marks=[one, one], jpeg=60),
            row(fp=9, marks=[], jpeg=60),
            row(1, 0, 0, marks=[one | {"opacity": 1.0, "kind": "grid"}], jpeg=95)]
    table = ev.breakdown(rows)
    assert {name: s["n_marked"] for name, s in table.items()} == {
        "opacity/0.2-0.3": 1, "opacity/0.8-1": 1, "size/1-2": 1, "size/2-5": 2, "kind/credit": 1,
        "kind/grid": 1, "blend/normal": 2, "jpeg/none": 1, "jpeg/50-70": 1, "jpeg/85-100": 1}
    assert list(table)[:4] == ["opacity/0.2-0.3", "opacity/0.8-1", "size/1-2", "size/2-5"]
    assert table["opacity/0.2-0.3"]["iou"] == 0.5 and all(s["n_clean"] == 0 for s in table.values())
    assert list(ev.breakdown([row(1)])) == ["size/1-2"]                # a data set without meta.jsonl


def test_compare_is_paired():
    a = [row(50 + i % 9, 0, 50 - i % 9, pixels=1000) for i in range(40)] + [row(fp=9, pixels=100)]
    b = [r | {"tp": r["tp"] + 5, "fn": r["fn"] - 5} for r in a[:40]] + [row(pixels=100)]
    same, better, worse = ev.compare(a, a), ev.compare(a, b), ev.compare(b, a)
    assert ((same["B_minus_A"], same["B_minus_A_low"], same["B_minus_A_high"]) == (0, 0, 0)
            and same["better"] == "not shown")
    assert (better["B_minus_A"] == pytest.approx(0.05) and better["B_minus_A_low"] > 0.049
            and better["better"] == "B")
    assert worse["better"] == "A" and worse["B_minus_A_high"] < 0 and better["n_marked"] == 40
    assert (better["A_false_alarm_rate"], better["B_false_alarm_rate"]) == (1, 0)
    assert ev.compare(a[40:], b[40:])["better"] == "-"


# ---------------------------------------------------------------- scoring

def make_square(n, i):
    image, mask = list(squares(n))[i]
    return image, mask // 255, {"name": str(i), "notes": []}


def test_rows_say_the_same_as_masks_made_one_by_one():
    net, pictures = White(20), ev.Pictures("squares", "-", 3, partial(make_square, 3))
    rows = ev.score(net.train(), pictures, radius=2)
    assert net.training                                                # train.py goes on as it was
    for i, r in enumerate(rows):
        image, truth, _ = make_square(3, i)
        prob = ev.predict_prob(net, image)
        assert {k: r[k] for k in ("tp", "fp", "fn", "pixels")} == ev.count(ev.to_mask(prob, 0.5, 2), truth)
        assert r["curve"][9] == r["dilated"][0] == ev.count(prob >= 0.5, truth)
        assert r["dilated"][2] == ev.count(dilate(truth * (prob > 0.5), 3), truth)
        assert r["dilated"][-1] == r["dilated"][1] and len(r["dilated"]) == 6    # the default here is 1 pixel
    table = ev.summarise_dilation(rows)
    assert list(table) == ["0", "1", "3", "5", "10", "default"]
    assert (table["0"]["excess_per_picture"] == 0
            and table["0"]["recall"] < table["3"]["recall"] < table["10"]["recall"])
    assert table["0"]["fully_covered"] == 1 / 3 < table["10"]["fully_covered"]     # the net sees one wholly
    assert table["0"]["recall_per_picture"] == np.mean([ev.ratios(r["dilated"][0])["recall"] for r in rows])
    # one square, wholly found, grown by 1: its four sides are the excess
    alone = ev.summarise_dilation(rows[:1])["1"]
    assert alone["recall"] == 1 and alone["excess_per_mark"] == pytest.approx(2 * (12 + 20) / (12 * 20))
    assert alone["excess_per_picture"] == pytest.approx(2 * (12 + 20) / (40 * 48))


def test_the_mask_that_predict_writes_is_the_mask_that_is_scored(weights, photos):
    from predict import predict_mask
    net, image = load_model(weights), ev.load_image(sorted((photos / "val").iterdir())[0])
    prob = ev.predict_prob(net, image)
    threshold = float(np.quantile(prob, 0.8))                          # an untrained net: somewhere between
    for radius in (0, 3):
        ours = ev.to_mask(prob, threshold, radius)
        assert 0 < ours.mean() < 255
        assert np.array_equal(ours, predict_mask(image, weights, threshold, radius, device="cpu"))


def test_batch_workers_and_ranks_change_nothing(weights, photos, logos, monkeypatch):
    net, synth = load_model(weights), Synth(photos, logos, held_out=True, seed=2)
    net.threshold = 0.047                                              # near the prior of an untrained net
    pictures = ev.Pictures("default", "-", 16, partial(ev.make_marked, synth))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = ev.score(net, pictures)
    assert sum(r["tp"] for r in alone) > 0
    short = ev.score(net, ev.marked_set(synth, 16), keep=3)            # as train.py asks
    maps = [r.pop("maps") for r in short[:3]]
    assert all(image.shape[:2] == truth.shape == prob.shape for image, truth, prob in maps)
    assert short == [{k: v for k, v in r.items() if k not in ("curve", "dilated")} for r in alone]
    assert [r["index"] for r in alone] == list(range(16))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert ev.score(net, pictures) == alone                            # two workers
    monkeypatch.setattr(ev.dist, "all_gather_object",
                        lambda parts, rows: parts.__setitem__(slice(None), [rows, []]))
    parts = [ev.score(net, pictures, 0, rank, 2) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1], key=lambda r: r["index"]) == alone
    # batches: metrics are of pictures, so only the network could tell them apart, and it does not
    same = [pictures[i] for i in range(16) if pictures[i][0].shape == pictures[0][0].shape]
    probs = predict_probs(net, [image for image, _, _ in same])
    singles = [predict_probs(net, [image])[0] for image, _, _ in same]
    assert len(same) > 2 and np.allclose(probs, singles, atol=0.01)


def test_test_sets_can_be_sent_to_workers_started_afresh(photos, logos):
    for pictures in ev.synthetic_sets(photos, logos, None, 5, 2):
        image, truth, meta = pickle.loads(pickle.dumps(pictures))[1]
        assert (image.shape == (*truth.shape, 3) and image.dtype == truth.dtype == np.uint8
                and set(meta) >= {"name", "notes"})


def test_held_out_files_only(photos, logos):
    *sets, clean = ev.synthetic_sets(photos, logos, None, 5, 2)
    assert [s.name for s in sets] == list(RECIPES) and len(clean) == 10            # every photo of val/
    assert all("val" in path for s in sets for path in s.make.args[0].photos)
    assert [s.name for s in ev.synthetic_sets(photos, logos, "own", 5, 2)] == ["own", "clean photos"]
    assert not clean[0][1].any()


# ---------------------------------------------------------------- data sets on disk

@pytest.mark.parametrize("name, images, masks, extra, suffix, value, rule", [
    ("CLWD", "Watermarked_image", "Mask", "Alpha", ".jpg", 30, "> 25.5"),
    ("LOGO", "image", "mask", "wm", ".png", 200, "> 127"),
    ("LVW", "image", "mask", "background", ".png", 30, "> 25.5"),
    ("Alpha1", "image", "mask", "bg", ".jpg", 200, "> 127"),
    ("PRWD", "Watermarked_image", "alpha", "Watermark_free_image", ".jpg", 2, "> 1"),
    ("ILAW", "watermarked", "alpha", "gt", ".png", 2, "> 1"),
    ("ours", "images", "masks", "x", ".jpg", 200, "> 127"),
])
def test_layouts(name, images, masks, extra, suffix, value, rule, here, stub, capsys):
    root = here / "some set" / "val"
    for folder in (images, masks, extra):
        (root / folder).mkdir(parents=True)
    for i, (image, mask) in enumerate(squares()):
        cv2.imwrite(str(root / images / f"{i}{suffix}"), image)
        mask[0, 0] = {30: 25, 200: 127, 2: 1}[value]                   # one pixel just below the rule ...
        mask[mask == 255] = value                                      # ... and the mark above it
        cv2.imwrite(str(root / masks / f"{i}.png"),
                    np.repeat(mask[..., None], 3, 2) if name == "CLWD" else mask)
    if value == 200:
        cv2.imwrite(str(root / masks / "0.png"), next(squares())[1])
    assert ev.main([str(root), "--weights", "good.pt", "--json", "r.json"]) == 0
    err, report = capsys.readouterr().err, json.loads(Path("r.json").read_text())
    assert f"is read as {name}: {images}/ with {masks}/, 3 names, mask file {rule} of 255" in err
    assert list(report["sets"]) == ["full size", "256 x 256"]
    assert report["sets"]["full size"]["iou"] > (0.999 if suffix == ".png" else 0.9)
    assert report["sets"]["256 x 256"]["iou"] > 0.85 and report["sets"]["256 x 256"]["n_marked"] == 3
    assert ("mask is not binary" in err) == (masks != "alpha")


def test_our_exports(here, photos, logos, stub, capsys):
    import synth
    synth.main(["set", "--images", str(photos), "--logos", str(logos), "--n", "6", "--workers", "1"])
    assert ev.main(["set", "--weights", "good.pt", "--json", "r.json"]) == 0
    report = json.loads(Path("r.json").read_text())
    assert "read as ours" in capsys.readouterr().err
    assert any(name.startswith("opacity/") for name in report["breakdown"])        # known from meta.jsonl
    assert "mask is not binary" not in str(report["notes"])


@pytest.mark.skipif(os.name == "nt", reason="no pipes and odd names there")
def test_odd_files_are_named_counted_and_never_silently_dropped(here, stub, capsys, monkeypatch):
    for folder in ("images", "masks"):
        (here / "d" / folder).mkdir(parents=True)
    (image, mask), = squares(1)

    def write(name, image=None, mask=None):
        for folder, picture in (("images", image), ("masks", mask)):
            if picture is not None:
                Image.fromarray(np.uint8(picture)).save(here / "d" / folder / f"{name}.png")
    write("good", image, mask)
    write("no-mask", image)
    write("no-image", mask=mask)
    write("size", image, mask[:-1])
    write("empty", image * 0, mask * 0)
    write("grey", image, np.where(mask, 150, 100))
    write("twice", image, mask)
    Image.fromarray(image).save("d/images/twice.jpg")
    (here / "d/images/broken.png").write_bytes(b"no picture")
    cv2.imwrite("d/masks/broken.png", mask)
    (here / "d/images/notes.txt").write_text("no picture, and not called one")
    Image.new("L", (48, 40)).save("d/masks/other.png", "IM")              # a format that is not read
    Image.new("L", (999, 999)).save("d/masks/vast.png")
    monkeypatch.setattr(model, "MAX_PIXELS", 10_000)
    os.mkfifo("d/images/pipe.png")
    for name in ("other", "vast", "pipe", "=1+1", "\x1b[31m", "\udcff"):
        image_too, mask_too = not name.startswith("p"), not Path(f"d/masks/{name}.png").exists()
        write(name, image if image_too else None, mask if mask_too else None)
    assert ev.main(["d", "--weights", "good.pt", "--json", "r.json", "--worst", "9"]) == 1
    report, err = json.loads(Path("r.json").read_text()), capsys.readouterr().err
    assert {name for note, names in report["notes"].items() if note.startswith("skipped")
            for name in names} == {"no-mask", "no-image", "size", "twice", "broken", "other", "vast", "pipe"}
    assert report["notes"]["mask is empty, scored as a clean picture"] == ["empty"]
    assert report["notes"]["mask is not binary, taken as > 127"] == ["grey"]
    assert "skipped, sizes differ: 1 (size)" in err and "8 of 14 pictures were skipped" in err
    assert "14 names" in err and "Traceback" not in err and "\x1b" not in err
    full = report["sets"]["full size"]
    assert (full["n_marked"], full["n_clean"], full["iou"], full["false_alarm_rate"]) == (5, 1, 1, 0)
    assert report["sets"]["256 x 256"]["n_skipped"] == full["n_skipped"] == 8
    lines = report["pictures"]
    assert [line["set"] for line in lines] == 14 * ["full size"] + 14 * ["256 x 256"]
    lines = {line["name"]: line for line in lines[:14]}
    assert lines["size"]["notes"] == ["skipped, sizes differ: image 48x40, mask 48x39"]
    assert lines["broken"]["notes"][0].startswith("skipped, not a readable picture: ")
    assert lines["no-mask"]["notes"] == ["skipped, 1 images and 0 masks of one name"]
    assert all(("iou" in line) == ("tp" in line) == ("skipped" not in str(line["notes"]))
               for line in lines.values())
    assert lines["good"]["notes"] == [] and lines["good"]["iou"] == 1 and lines["empty"]["iou"] is None


def test_a_meta_file_of_others_is_named(here, stub, capsys):
    for folder in ("images", "masks"):
        (here / "d" / folder).mkdir(parents=True)
        cv2.imwrite(f"d/{folder}/a.png", next(squares())[0])
    Path("d/meta.jsonl").write_text('{"no": "name"}\n')
    assert ev.main(["d"]) == 2 and "d/meta.jsonl has a line" in capsys.readouterr().err


def test_an_unreadable_photo_is_no_clean_photo(here, photos, stub, capsys):
    (here / "own").mkdir()
    for i, path in enumerate(sorted((photos / "val").iterdir())[:3]):
        (here / "own" / f"{i}.jpg").write_bytes(path.read_bytes() if i else b"nothing")
    assert ev.main(["--images", "own", "--recipe", "default", "--n", "1", "--json", "r.json"]) == 1
    clean = json.loads(Path("r.json").read_text())["sets"]["clean photos"]
    assert (clean["n_clean"], clean["n_skipped"]) == (2, 1)
    assert "skipped, not a readable picture: 1 (own/0.jpg)" in capsys.readouterr().err


def test_nothing_to_score(here, stub, capsys):
    (here / "d" / "images").mkdir(parents=True)
    (here / "d" / "masks").mkdir()
    assert ev.main(["d"]) == 2 and "no picture in d/images" in capsys.readouterr().err
    cv2.imwrite("d/images/a.png", np.zeros((9, 9, 3)))
    assert ev.main(["d"]) == 2
    err = capsys.readouterr().err
    assert ("skipped, 1 images and 0 masks of one name: 1 (a)" in err
            and "not one picture could be scored" in err)


def test_logo_masks_of_another_size_are_resized_as_their_loaders_do(here, stub, capsys):
    for folder in ("image", "mask", "wm"):
        (here / "d" / folder).mkdir(parents=True)
    (image, mask), = squares(1)
    cv2.imwrite("d/image/a.png", image)
    cv2.imwrite("d/mask/a.png", cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST))
    assert ev.main(["d", "--weights", "good.pt", "--json", "r.json"]) == 0
    assert json.loads(Path("r.json").read_text())["sets"]["full size"]["iou"] == 1
    assert "resized by nearest" in capsys.readouterr().err


# ---------------------------------------------------------------- command line

def test_default_table(here, photos, logos, stub, capsys):
    argv = ["--images", str(photos), "--logos", str(logos), "--n", "4",
            "--weights", "good.pt", "--device", "cpu"]
    assert ev.main(argv) == 0
    out, err = capsys.readouterr()
    for name in (*RECIPES, "clean photos"):
        assert sum(line.startswith(f"| {name} ") for line in out.splitlines()[:10]) == 1
    assert "| 10 " in next(line for line in out.splitlines() if line.startswith("| clean photos"))
    assert (".696 / .788, DENet *" in out and "another test set" in out
            and "alpha > 0.08" in out and "sum abs(J-I)" in out)
    assert "Dataset IoU" in out and "excess per mark" in out and "| 0.95 " in out and "cpu: asked for" in err
    assert len({len(line) for line in out.splitlines()[1:10]}) == 1      # aligned
    assert ev.main(argv) == 0 and capsys.readouterr().out == out       # the same numbers again
    assert ev.main([*argv, "--seed", "3"]) == 0 and capsys.readouterr().out != out


def test_bare_checkout_says_what_it_runs_on(here, stub, capsys):
    assert ev.main(["--n", "2", "--weights", "good.pt", "--recipe", "default"]) == 0
    out, err = capsys.readouterr()
    assert "no --images: generated backgrounds with the held-out part of" in err
    assert "| reference" not in out and "| clean photos" in out


def test_threshold_and_dilate(here, weights, photos, capsys):
    def run(*flags):
        assert ev.main(["--images", str(photos), "--recipe", "default", "--n", "4",
                        "--weights", str(weights), "--json", "r", *flags]) == 0
        return json.loads(Path("r").read_text())
    all_marked, none_marked = run("--threshold", "0.001"), run("--threshold", "0.999")
    assert all_marked["sets"]["default"]["recall"] == 1 and none_marked["sets"]["default"]["recall"] == 0
    assert none_marked["sets"]["default"]["precision"] is None and none_marked["thresholds"] == [0.999]
    assert all_marked["sets"]["clean photos"] | {"n_clean": 10, "false_alarm_rate": 1, "iou": None} == \
        all_marked["sets"]["clean photos"]
    prob = predict_prob(load_model(weights), np.array(Image.open(next(photos.rglob("*.jpg")))))
    some = [run("--threshold", str(np.median(prob)), "--dilate", d) for d in ("0", "3")]
    assert some[0]["sets"]["default"]["recall"] < some[1]["sets"]["default"]["recall"]
    assert (some[0]["dilation"]["3"]["recall"] == some[1]["dilation"]["3"]["recall"]
            == some[1]["sets"]["default"]["recall"])
    assert some[0]["curve"] == some[1]["curve"]


def test_json_worst_and_plot(here, photos, logos, stub, capsys):
    argv = ["--images", str(photos), "--logos", str(logos), "--recipe", "default", "--n", "9",
            "--weights", "bad.pt", "--json", "r.json", "--worst", "5", "--plot", "p.png"]
    assert ev.main(argv) == 0
    assert capsys.readouterr().err.split()[-3:] == ["r.json", "p.png", "worst.png"]
    report = json.loads(Path("r.json").read_text())
    lines = report["pictures"]
    assert len(lines) == 9 + 10 and list(report["sets"]) == ["default", "clean photos"]
    ious = [line["iou"] for line in lines if line["iou"] is not None]
    assert np.mean(ious) == pytest.approx(report["sets"]["default"]["iou"])
    assert (sum(line["tp"] for line in lines) / sum(line["tp"] + line["fn"] for line in lines)
            == pytest.approx(report["sets"]["default"]["recall"]))
    assert set(lines[0]) >= {"set", "name", *ev.BINS}
    assert Image.open("worst.png").size == (6 * 256, 20 + 3 * (256 + 16)) and Image.open("p.png").width > 500


def test_the_worst_come_first():
    pictures = ev.Pictures("x", "-", 3, partial(make_square, 3))       # row 20 cuts the 2nd, most of the 3rd
    net = White(20)
    sheet = np.asarray(ev.draw_worst(net, pictures, ev.score(net, pictures), 2, 0))
    assert sheet.shape == (20 + 256 + 16, 6 * 256, 3)
    truths = [sheet[36:76, 256 + k * 768:256 + k * 768 + 48, 0] > 128 for k in (0, 1)]
    assert (np.array_equal(truths[0], make_square(3, 2)[1] > 0)
            and np.array_equal(truths[1], make_square(3, 1)[1] > 0))
    prediction = sheet[36:76, 512:512 + 48]
    assert np.array_equal(prediction[:20, :, 0] > 128, truths[0][:20]) and not prediction[20:].any()


def test_every_bin_is_a_bar_of_its_length():
    one = {"opacity": 0.2, "kind": "text", "blend": "normal"}
    table = ev.breakdown([row(1, 0, 1, marks=[one]), row(1, 0, 0, marks=[one])])
    picture = np.asarray(ev.draw_breakdown(table, "default"))
    assert picture.shape == (20 * (2 + len(table)), 740, 3)
    bars = [(picture[y] == (90, 135, 195)).all(1).nonzero()[0] for y in range(45, len(picture), 20)]
    assert all(abs(bar[-1] - (140 + 480 * s["iou"])) <= 1 for bar, s in zip(bars, table.values()))
    assert ev.draw_breakdown({}, "default").height == 40               # no picture had a mark


def test_compare(here, stub, photos, logos, capsys):
    for i in range(2):
        (here / "d" / ("images", "masks")[i]).mkdir(parents=True)
    for i, (image, mask) in enumerate(squares(3)):
        cv2.imwrite(f"d/images/{i}.png", image)
        cv2.imwrite(f"d/masks/{i}.png", mask)
    assert ev.main(["d", "--compare", "bad.pt", "good.pt", "--json", "r.json"]) == 0
    assert ev.main(["--compare", "good.pt", "good.pt", "--n", "3", "--images", str(photos),
                    "--json", "s.json"]) == 0
    better, same = (json.loads(Path(p).read_text())["comparison"] for p in ("r.json", "s.json"))
    assert better["full size"]["better"] == "B" and better["full size"]["iou_B"] == 1
    assert list(same) == [*RECIPES, "clean photos"]
    assert all(s["B_minus_A"] == s["B_minus_A_low"] == s["B_minus_A_high"] == 0
               for n, s in same.items() if n in RECIPES)
    assert "paired bootstrap" in capsys.readouterr().out


def test_tune_stores_what_validation_prefers_and_shows_no_test(here, weights, photos, capsys, monkeypatch):
    path = here / "mine.pt"
    save_checkpoint(load_checkpoint(weights) | {"step": 7, "threshold": 0.5}, path)
    seeds = []
    monkeypatch.setattr(ev, "score", lambda net, pictures, *rest: (
        seeds.append(pictures.make.args[0].seed)
        or [row(notes=[]) | {"curve": [row(tp=9 if k == 6 else 5, fn=5) for k in range(19)]}]))
    assert ev.main(["--weights", str(path), "--tune", "--images", str(photos), "--n", "3"]) == 0
    out = capsys.readouterr().out
    after, before = load_checkpoint(path), load_checkpoint(weights)
    assert (after["threshold"] == 0.35 and after["step"] == 7
            and seeds == [ev.VALIDATION_SEED] != [ev.TEST_SEED])
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    assert load_model(path).threshold == 0.35 and "threshold 0.35 is stored" in out and "published" not in out


@pytest.mark.parametrize("argv, say", [
    (["--weights", "none.pt"], "no weights at none.pt"),
    (["nowhere", "--weights", "W"], "nowhere has no layout that is known here"),
    (["--images", "nowhere", "--weights", "W"], "nowhere is not a folder"),
    (["--weights", "W", "--device", "cuda:77"], "cuda:77"),
    (["--n", "0"], "--n and --worst must be at least 1"),
    (["--threshold", "1.5"], "--threshold between 0 and 1"),
    (["--threshold", "0"], "--threshold between 0 and 1"),
    (["--worst", "0"], "must be at least 1"),
    (["--worst", "-3"], "must be at least 1"),
    (["--dilate", "-1"], "--dilate and --seed at least 0"),
    (["--seed", "-1"], "--dilate and --seed at least 0"),
    (["--compare", "a", "b", "--plot", "x.png"], "beside --compare, --plot would do nothing"),
    (["--compare", "a", "b", "--weights", "c", "--worst", "3"], "beside --compare, --weights --worst would"),
    (["d", "--tune"], "beside --tune, a folder would do nothing"),
    (["--tune", "--json", "x", "--dilate", "2"], "beside --tune, --dilate --json would do nothing"),
    (["d", "--recipe", "clwd", "--n", "5"], "beside a folder, --recipe --n would do nothing"),
    (["--compare", "W", "junk.pt"], "junk.pt is refused"),
    (["--compare", "W", "empty.pt"], "empty.pt is no complete weights file"),
    (["--weights", "W", "--json", "no/r.json"], "no/r.json"),
    (["--weights", "W", "--json", "folder"], "folder"),
    (["--weights", "W", "--plot", "p.txt"], "--plot p.txt is no picture's name"),
    (["--weights", "W", "--json", "r.png", "--plot", "r.png"], "one file is named for two outputs"),
    (["--weights", "W", "--json", "W"], "is an input and is not overwritten"),
    (["--weights", "W", "--plot", "folder/photo.png", "--images", "folder"], "photo.png is an input"),
    (["--weights", "W", "--json", "folder/meta.jsonl", "folder"], "meta.jsonl is an input"),
])
def test_a_mistake_gets_one_sentence(argv, say, here, weights, capsys, monkeypatch):
    Path("junk.pt").write_text("no weights")
    Path("empty.pt").touch()
    Path("folder").mkdir()
    for name in ("photo.png", "meta.jsonl"):
        (here / "folder" / name).write_text("mine")
    monkeypatch.setattr(ev, "score", lambda *_: pytest.fail("scored before it was checked"))
    before = weights.read_bytes()
    assert ev.main([str(weights) if a == "W" else a for a in argv]) == 2
    assert weights.read_bytes() == before
    assert (here / "folder" / "photo.png").read_text() == "mine" and not Path("r").exists()
    err = capsys.readouterr().err
    assert say in err.splitlines()[-1] and err.splitlines()[-1].startswith("eval.py: ")


def test_one_sample_without_a_mark_is_scored_too(here, stub, capsys, monkeypatch):
    monkeypatch.setattr(ev, "make_marked", ev.make_clean)
    assert ev.main(["--n", "1", "--recipe", "default", "--worst", "9", "--plot", "p.png"]) == 0
    out = capsys.readouterr().out
    assert "nan" not in out and "| default      | 0        | -" in out
    assert Image.open("worst.png").height == 20 + 256 + 16 and Image.open("p.png").height == 40


def test_ctrl_c_is_one_line(here, stub, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(ev, "predict_prob", stop)
    assert ev.main(["--n", "1", "--recipe", "default", "--json", "r.json"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "eval.py: stopped before the end"
    assert not Path("r.json").exists()


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit) as e:
        ev.main(["-h"])
    assert e.value.code == 0 and "--tune" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        ev.main(["--recipe", "nonsense"])
    assert e.value.code == 2


def test_torchrun_gives_the_same_table_and_one_set_of_notices(here, weights, logos, capsys, monkeypatch):
    for module, name, value in ((ev, "BOOTSTRAP", 1000), (model, "ENLARGE", ENLARGE)):
        monkeypatch.setattr(module, name, value)                       # as in the processes below
    argv = ["--weights", str(weights), "--logos", str(logos),
            "--recipe", "default", "--n", "5", "--threshold", "0.05", "--device", "cpu"]
    assert ev.main(argv) == 0
    alone = capsys.readouterr()
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node", "2", "--", str(ROOT / "eval.py"), *argv],
                         capture_output=True, text=True, timeout=300,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and run.stdout == alone.out, run.stderr
    assert "no --images" in alone.err
    for line in alone.err.splitlines():
        assert run.stderr.count(line) == 1, run.stderr
