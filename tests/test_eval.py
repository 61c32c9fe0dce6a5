"""What eval.py promises: numbers by their definitions, every layout, and nothing skipped in silence."""
import json
import os
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
import predict
import synth
from model import Segmenter, dilate, load_checkpoint, load_model, pack, predict_prob, save_checkpoint
from synth import RECIPES, Synth


class White(nn.Module):
    """Marks what is nearly white: right on the black and white images below. Blind from row `rows` on."""

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
    monkeypatch.setattr(model, "ENLARGE", 1)      # small images stay as they are, and White exact
    monkeypatch.setattr(model, "SURE", 0)         # an untrained network is never sure
    monkeypatch.setattr(ev, "BOOTSTRAP", 50)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    net = Segmenter()
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
    return {"counts": np.array([[tp, fp, fn, pixels]]), "meta": meta}


def squares(n=3, size=40):
    """n images of a white square on black, lower ones for larger i, and their masks {0, 255}."""
    for i in range(n):
        mask = np.zeros((size, size + 8), np.uint8)
        mask[2 + 8 * i:14 + 8 * i, 10:30] = 255
        yield np.repeat(mask[..., None], 3, 2), mask


def make_square(n, i):
    image, mask = list(squares(n))[i]
    return image, mask // 255, {"name": str(i), "notes": []}


def write_set(*names, n=3, masks=("images", "masks"), suffix=".png"):
    """Folder d with the squares as 0, 1, ..., or under the given names."""
    for folder in masks:
        Path("d", folder).mkdir(parents=True, exist_ok=True)
    for name, (image, mask) in zip(names or range(n), squares(n)):
        cv2.imwrite(f"d/{masks[0]}/{name}{suffix}", image)
        cv2.imwrite(f"d/{masks[1]}/{name}.png", mask)


def report(*argv, code=0):
    assert ev.main([*map(str, argv), "--json", "r.json"]) == code
    return json.loads(Path("r.json").read_text())


# ---------------------------------------------------------------- metrics

def test_hand_computed_two_by_two():
    mask, truth = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [255, 0]])
    assert ev.count(mask, truth) == [1, 1, 1, 4]
    other = ev.count(np.ones((2, 2)), np.array([[0, 0], [0, 1]]))                 # IoU 1/4, F1 2/5
    s = ev.summarise([[1, 1, 1, 4], other])
    expected = {"n_marked": 2, "n_clean": 0, "iou": (1 / 3 + 1 / 4) / 2, "iou_low": 1 / 4, "iou_high": 1 / 3,
                "f1": (1 / 2 + 2 / 5) / 2, "dataset_iou": 2 / 7, "dataset_f1": 4 / 9,         # tp 2, fp 4, fn 1
                "precision": 2 / 6, "recall": 2 / 3, "recall_per_image": (1 / 2 + 1) / 2, "found": 0,
                "fully_covered": 1 / 2, "fully_covered_low": 0, "fully_covered_high": 1,
                "excess_per_image": (1 / 4 + 3 / 4) / 2, "excess_per_mark": 4 / 3}
    assert {name: s[name] for name in expected} == pytest.approx(expected)
    assert np.isnan(s["false_alarm_rate"])
    assert ev.summarise([[1, 1, 0, 4], [1, 2, 0, 4]])["found"] == 1 / 2          # IoU 1/2 is found


def test_empty_masks():
    clean, missed = [0, 0, 0, 2500], [0, 0, 5, 2500]
    assert np.isnan(ev.summarise([clean])["iou"]) and ev.summarise([clean])["false_alarm_rate"] == 0
    assert ev.summarise([clean, missed])["iou"] == 0                   # a miss is 0, clean ones do not count
    assert np.isnan(ev.summarise([missed])["precision"]) and ev.summarise([missed])["recall"] == 0
    two, three = [0, 2, 0, 2000], [0, 3, 0, 2000]                      # .001 is allowed, more is not
    assert [ev.summarise(rows)["false_alarm_rate"] for rows in ([two], [two, three])] == [0, 0.5]
    assert ev.summarise([two, three] * 9)["false_alarm_rate_low"] < 0.5
    assert np.isnan(ev.summarise([three])["dataset_iou"])
    assert all(np.isnan(v) for k, v in ev.summarise([]).items() if not k.startswith("n_"))
    assert ev.quality(np.array([clean, missed, two, three, [1, 0, 1, 9]])).tolist() == [1, 0, 1, 0, 0.5]


def test_agrees_with_smp_and_with_a_slow_oracle():
    rng, rows, oracle, masks, truths = np.random.default_rng(0), [], [], [], []
    for i in range(200):
        mask, truth = (rng.random((2, 12, 9)) < rng.uniform(0, 0.6, (2, 1, 1))).astype(np.uint8)
        mask, truth = mask * (i % 9 > 0), truth * (i % 7 > 0)          # some empty, some both
        pixels = list(zip(mask.flat, truth.flat))
        oracle.append(tuple(sum(pixel == pair for pixel in pixels) for pair in ((1, 1), (1, 0), (0, 1))))
        rows.append(ev.count(mask, truth))
        masks.append(torch.from_numpy(mask)[None].long())
        truths.append(torch.from_numpy(truth)[None].long())
    assert rows == [[*counts, 108] for counts in oracle]
    stats = smp.metrics.get_stats(torch.stack(masks), torch.stack(truths), mode="binary")
    assert [tuple(int(s[i]) for s in stats[:3]) for i in range(200)] == oracle
    marked = [part[[tp + fn > 0 for tp, _, fn in oracle]] for part in stats]
    s = ev.summarise(rows)
    for name, metric in (("dataset_iou", "iou_score"), ("dataset_f1", "f1_score"), ("precision", "precision"),
                         ("recall", "recall"), ("iou", "iou_score"), ("f1", "f1_score")):
        which, reduction = (marked, "micro-imagewise") if name in ("iou", "f1") else (stats, "micro")
        assert s[name] == pytest.approx(float(getattr(smp.metrics, metric)(*which, reduction=reduction))), name


def test_interval_is_reproducible_and_covers(monkeypatch):
    monkeypatch.setattr(ev, "BOOTSTRAP", 1000)
    values = np.random.default_rng(1).random(200)
    average, low, high = ev.mean(values)
    assert (average, low, high) == ev.mean(values) and low < average < high and average == values.mean()
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 200 ** 0.5, rel=0.15)  # the normal theory
    rng = np.random.default_rng(0)                                     # resample by resample, the slow way
    means = [np.mean([values[k] for k in rng.integers(200, size=200)]) for _ in range(1000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    assert ev.mean(np.array([0.5])) == (0.5, 0.5, 0.5) and np.isnan(ev.mean(np.array([]))).all()


def test_best_threshold_is_quiet_then_has_the_best_iou_the_fewest_false_alarms_the_most_recall(capsys):
    curve = {t: {"n_marked": 1, "iou": iou, "false_alarm_rate": rate} for t, iou, rate in (
        (0.1, 0.499, 0.3), (0.15, 0.4985, 0.1), (0.2, 0.5, 0.2), (0.3, 0.5, 0.1), (0.5, 0.49, 0))}
    assert ev.best_threshold(curve, curve) == 0.5          # the only one with 3 % at most
    curve[0.5]["false_alarm_rate"] = 0.04
    assert ev.best_threshold(curve, curve) == 0.15         # none has
    assert "no threshold leaves 97% of the clean images unmarked" in capsys.readouterr().err
    silent = {t: {"false_alarm_rate": float("nan")} for t in curve}                        # no clean image
    assert ev.best_threshold(curve, silent) == 0.1 and not capsys.readouterr().err
    with pytest.raises(ValueError, match="raise --n"):
        ev.best_threshold({0.5: {"n_marked": 0}}, {})


def test_breakdown_takes_marks_only_where_there_is_exactly_one():
    one = {"opacity": 0.2, "kind": "credit", "blend": "normal"}
    rows = [row(1, 0, 1, marks=[one]), row(4, 0, 0, marks=[one, one]), row(fp=9, marks=[]),
            row(1, 0, 0, marks=[one | {"opacity": 1.0, "kind": "grid"}])]
    table = ev.breakdown(rows)
    assert {name: s["n_marked"] for name, s in table.items()} == {
        "opacity/0-0.2": 1, "opacity/0.8-1": 1, "size/0.5-1": 1, "size/1-2": 1, "size/2-5": 1,
        "kind/credit": 1, "kind/grid": 1}
    assert table["opacity/0-0.2"]["iou"] == 0.5 and all(s["n_clean"] == 0 for s in table.values())
    assert list(ev.breakdown([row(1)])) == ["size/0.5-1"]              # a data set without meta.jsonl


def test_compare_is_paired():
    a = np.array([[50 + i % 9, 0, 50 - i % 9, 1000] for i in range(40)] + [[0, 9, 0, 100]])
    b = np.array([[tp + 5, fp, fn - 5, n] for tp, fp, fn, n in a[:40]] + [[0, 0, 0, 100]])
    for one, other, better, low, high in ((a, a, "not shown", 0, 0), (a, b, "B", 0.049, 0.051),
                                          (b, a, "A", -0.051, -0.049)):
        c = ev.compare(one, other)
        assert c["better"] == better and low <= c["B_minus_A_low"] <= c["B_minus_A_high"] <= high
        assert c["B_minus_A"] == pytest.approx((low + high) / 2) and c["n_marked"] == 40
    c = ev.compare(a, b)
    assert (c["false_alarm_rate_of_A"], c["of_B"]) == (1, 0) and ev.compare(a[40:], b[40:])["better"] == "-"


# ---------------------------------------------------------------- scoring

def test_rows_say_the_same_as_masks_made_one_by_one():
    net, pictures = White(20), ev.Pictures("squares", "-", 3, partial(make_square, 3))
    rows = ev.score(net.train(), pictures, radius=2)
    assert net.training                                                # train.py goes on as it was
    for i, r in enumerate(rows):
        image, truth, _ = make_square(3, i)
        prob = predict_prob(net, image)
        radii = (*ev.DILATIONS, model.default_dilation(*truth.shape))
        masks = [model.to_mask(prob, 0.5, 2), *[prob >= t for t in ev.THRESHOLDS],
                 *[dilate(prob >= 0.5, d) for d in radii]]
        assert r["index"] == i and r["counts"].tolist() == [ev.count(mask, truth) for mask in masks]


def test_the_mask_that_predict_writes_is_the_mask_that_is_scored(weights, photos):
    net, image = load_model(weights), ev.load_image(sorted((photos / "val").iterdir())[0])
    prob = ev.prob_of(net, image, None)
    threshold = float(np.quantile(prob, 0.8))                          # an untrained net: somewhere between
    for radius in (0, 3):
        ours = ev.to_mask(prob, threshold, radius)
        assert 0 < ours.mean() < 255
        assert np.array_equal(ours, predict.predict_mask(image, weights, threshold, radius, device="cpu"))


def test_same_mark_scores_the_masks_that_predict_shares(here, weights, capsys):
    for folder in ("images", "masks"):
        Path("d", folder).mkdir(parents=True)
    for i, (W, H) in enumerate([(90, 60)] * 3 + [(70, 70)]):
        cv2.imwrite(f"d/images/{i}.png", np.random.default_rng(i).integers(0, 256, (H, W, 3), np.uint8))
        cv2.imwrite(f"d/masks/{i}.png", np.uint8(np.arange(W) < W / 2) * np.full((H, 1), 255, np.uint8))
    threshold = str(np.median(predict_prob(load_model(weights), ev.load_image("d/images/0.png"))))
    flags = ["--weights", str(weights), "--threshold", threshold, "--device", "cpu"]
    for same in ([], ["--same-mark"]):
        ours = report("d", *same, *flags)
        assert predict.main(["d/images", "-o", "masks", "--dilate", "0", *same, *flags]) == 0
        for i, line in enumerate(ours["pictures"][:4]):
            masks = [cv2.imread(f"{folder}/{i}.png", 0) for folder in ("masks", "d/masks")]
            assert [line[name] for name in ("tp", "fp", "fn", "pixels")] == ev.count(*masks)
    assert list(ours["sets"]) == ["full size"]
    assert "share a mask: 3 of 90x60, 1 of 70x70" in capsys.readouterr().err


def test_neither_reading_ahead_nor_keeping_maps_changes_a_number(weights, photos, logos):
    net, data = load_model(weights), Synth(photos, logos, held_out=True, seed=2)
    net.threshold = 0.047                                              # near the prior of an untrained net
    pictures = ev.marked_set(data, 16)
    rows = ev.score(net, pictures)
    assert [r["index"] for r in rows] == list(range(16)) and sum(r["counts"][0, 0] for r in rows) > 0
    for i in (15, 3):
        image, truth, meta = pictures[i]                               # as if no other had been made
        prob = predict_prob(net, image)
        assert rows[i]["counts"][0].tolist() == ev.count(prob >= 0.047, truth) and rows[i]["meta"] == meta
    short = ev.score(net, pictures, keep=3)                            # as train.py asks
    assert [len(r.get("maps", ())) for r in short[:4]] == [3, 3, 3, 0]
    assert all(np.array_equal(a["counts"], b["counts"][:1]) for a, b in zip(short, rows))
    assert ev.score(net, pictures, stop=[True]) == []


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
    write_set(masks=(images, masks), suffix=suffix)
    Path("d", extra).mkdir()
    for i, (_, mask) in enumerate(squares()):
        mask[0, 0] = {30: 25, 200: 127, 2: 1}[value]                   # one pixel just below the rule ...
        if i or value != 200:
            mask[mask == 255] = value                                  # ... and the mark above it
        cv2.imwrite(f"d/{masks}/{i}.png", np.repeat(mask[..., None], 3, 2) if name == "CLWD" else mask)
    ours, err = report("d", "--weights", "good.pt"), capsys.readouterr().err
    sets = ours["sets"]
    for line, (_, mask) in zip(ours["pictures"][3:], squares()):       # as SLBR and others squash a mask
        squashed = cv2.resize(mask, (256, 256), interpolation=cv2.INTER_NEAREST)
        assert line["tp"] + line["fn"] == np.count_nonzero(squashed)
    assert f"is read as {name}: {images}/ with {masks}/, 3 names, mask file {rule} of 255" in err
    assert list(sets) == ["full size", "256 x 256"]
    assert sets["full size"]["iou"] > (0.999 if suffix == ".png" else 0.9)
    assert sets["256 x 256"]["iou"] > 0.85 and sets["256 x 256"]["n_marked"] == 3


def palette(colours):
    """Class numbers -> an indexed picture."""
    def make(truth):
        picture = Image.fromarray(truth, "P")
        picture.putpalette(colours)
        return picture
    return make


def with_alpha(inside, outside):
    """The mask is where it is not transparent, whatever the colours."""
    return lambda truth: Image.fromarray(np.dstack([
        np.where(truth[..., None] > 0, inside, outside).astype(np.uint8), truth * 255]), "RGBA")


MASKS = {
    "0 and 255": lambda truth: Image.fromarray(truth * 255),
    "black and white": lambda truth: Image.fromarray(truth > 0),
    "class numbers": Image.fromarray, "class numbers, two of them": lambda truth: Image.fromarray(truth * 7),
    "red on black": lambda truth: Image.fromarray(truth[..., None] * np.uint8((255, 0, 0))),
    "palette": palette([0, 0, 0, 255, 255, 255]), "dark palette": palette([0, 0, 0, 0, 64, 0]),
    "alpha, black": with_alpha((0, 0, 0), (0, 0, 0)), "alpha, white": with_alpha((255,) * 3, (255,) * 3),
    "opaque alpha": lambda truth: Image.fromarray(truth * 255).convert("RGBA"),
    "grey and alpha": lambda truth: Image.merge("LA", [Image.fromarray(0 * truth + 200),
                                                       Image.fromarray(truth * 255)]),
    "16 bit": lambda truth: Image.fromarray(truth * np.uint16(65535)),
    "16-bit class numbers": lambda truth: Image.fromarray(truth.astype(np.uint16))}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_as_people_have_them(kind, tmp_path):
    truth = np.zeros((40, 48), np.uint8)
    truth[8:24, 16:40] = 1
    for expected in (truth, 0 * truth):
        MASKS[kind](expected).save(tmp_path / "mask.png")
        mask = ev.read_mask(tmp_path / "mask.png", 127)
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)


def test_jpeg_masks_are_read_without_their_noise(tmp_path):
    truth = np.zeros((40, 48), np.uint8)
    truth[8:24, 16:40] = 1
    Image.fromarray(truth * 255).save(tmp_path / "mask.jpg", quality=30)
    assert np.array_equal(ev.read_mask(tmp_path / "mask.jpg", 127), truth)
    Image.fromarray(truth * 9).save(tmp_path / "mask.jpg", quality=30)                     # as good as black
    assert not ev.read_mask(tmp_path / "mask.jpg", 127).any()


def test_our_exports(here, photos, logos, stub, capsys):
    synth.main(["set", "--images", str(photos), "--logos", str(logos), "--n", "6", "--workers", "1"])
    ours = report("set", "--weights", "good.pt", "--n", "4")
    assert "read as ours" in (err := capsys.readouterr().err) and "marks nothing" not in err    # it says so itself
    assert any(name.startswith("opacity/") for name in ours["breakdown"])          # known from meta.jsonl
    assert [p["name"] for p in ours["pictures"][:4]] == [f"{i:07}" for i in (0, 1, 3, 4)]      # spread over all


@pytest.mark.skipif(os.name == "nt", reason="no pipes and odd names there")
def test_odd_files_are_named_counted_and_never_silently_dropped(here, stub, capsys, monkeypatch):
    (image, mask), = squares(1)
    write_set("good", n=1)
    cv2.imwrite("d/masks/twice.png", mask)

    def write(name, image=None, mask=None):
        for folder, picture in (("images", image), ("masks", mask)):
            if picture is not None:
                Image.fromarray(np.uint8(picture)).save(here / "d" / folder / f"{name}.png")
    write("no-mask", image)
    write("no-image", mask=mask)
    write("size", image, mask[:-1])
    write("empty", image * 0, mask * 0)
    for suffix in ("png", "jpg"):
        Image.fromarray(image).save(f"d/images/twice.{suffix}")
    Path("d/images/broken.png").write_bytes(b"no picture")
    cv2.imwrite("d/masks/broken.png", mask)
    Path("d/images/notes.txt").write_text("no picture, and not called one")
    Image.new("L", (48, 40)).save("d/masks/other.png", "IM")           # a format that is not read
    Image.new("L", (999, 999)).save("d/masks/vast.png")
    monkeypatch.setattr(model, "MAX_PIXELS", 10_000)
    for name in ("other", "vast", "=1+1", "\x1b[31m", "\udcff"):
        write(name, image, mask if name not in ("other", "vast") else None)
    ours, err = report("d", "--weights", "good.pt", "--worst", "9", code=1), capsys.readouterr().err
    assert {name for note, names in ours["notes"].items() if note.startswith("skipped")
            for name in names} == {"no-mask", "no-image", "size", "twice", "broken", "other", "vast"}
    assert ours["notes"]["mask marks nothing, taken for a clean picture"] == ["empty"]
    assert "skipped, sizes differ: 1 (size)" in err and "7 of 12 pictures were skipped" in err
    assert "12 names" in err and "Traceback" not in err and "\x1b" not in err
    full = ours["sets"]["full size"]
    assert (full["n_marked"], full["n_clean"], full["iou"], full["false_alarm_rate"]) == (4, 1, 1, 0)
    assert ours["sets"]["256 x 256"]["n_skipped"] == full["n_skipped"] == 7
    assert [line["set"] for line in ours["pictures"]] == 12 * ["full size"] + 12 * ["256 x 256"]
    lines = {line["name"]: line for line in ours["pictures"][:12]}
    assert lines["size"]["notes"] == ["skipped, sizes differ: image 48x40, mask 48x39"]
    assert lines["broken"]["notes"][0].startswith("skipped, not a readable picture: ")
    assert lines["no-mask"]["notes"] == ["skipped, 1 images and 0 masks of one name"]
    assert all(("iou" in line) == ("tp" in line) == ("skipped" not in str(line["notes"]))
               for line in lines.values())
    assert lines["good"]["notes"] == [] and lines["good"]["iou"] == 1 and lines["empty"]["iou"] is None


def test_an_unreadable_photo_is_no_clean_photo(here, photos, stub, capsys):
    Path("own").mkdir()
    for i, path in enumerate(sorted((photos / "val").iterdir())[:3]):
        Path(f"own/{i}.jpg").write_bytes(path.read_bytes() if i else b"nothing")
    clean = report("--images", "own", "--recipe", "default", "--n", "1", code=1)["sets"]["clean photos"]
    assert (clean["n_clean"], clean["n_skipped"]) == (2, 1)
    assert "skipped, not a readable picture: 1 (own/0.jpg)" in capsys.readouterr().err


def test_nothing_to_score(here, stub, capsys):
    write_set(n=0)
    assert ev.main(["d"]) == 2 and "no picture in d/images" in capsys.readouterr().err
    cv2.imwrite("d/images/a.png", np.zeros((9, 9, 3)))
    assert ev.main(["d"]) == 2
    err = capsys.readouterr().err
    assert "skipped, 1 images and 0 masks of one name: 1 (a)" in err
    assert "not one picture could be scored" in err
    Path("d/meta.jsonl").write_text('{"no": "name"}\n')
    assert ev.main(["d"]) == 2 and "d/meta.jsonl has a line" in capsys.readouterr().err


def test_logo_masks_of_another_size_are_resized_as_their_loaders_do(here, stub, capsys):
    write_set(n=1, masks=("image", "mask"))
    Path("d/wm").mkdir()
    mask = next(squares(1))[1].repeat(2, 0).repeat(2, 1)
    cv2.imwrite("d/mask/0.png", mask)
    assert report("d", "--weights", "good.pt")["sets"]["full size"]["iou"] == 1
    assert "resized by nearest" in capsys.readouterr().err


# ---------------------------------------------------------------- command line

def test_two_sentences_then_one_table_and_more_only_if_asked_for(here, photos, logos, stub, capsys):
    argv = ["--images", str(photos), "--logos", str(logos), "--n", "4", "--weights", "good.pt", "--device",
            "cpu"]
    ours = report(*argv)
    out, err = capsys.readouterr()
    lines, sets = out.splitlines(), ours["sets"].values()
    found = sum((p["iou"] or 0) >= ev.FOUND for p in ours["pictures"])
    assert lines[0] == f"It found {found} of {sum(s['n_marked'] for s in sets)} marks."
    alarms, clean = (round(sum(s["n_clean"] * (s["false_alarm_rate"] or 0) ** k for s in sets)) for k in (1, 0))
    assert lines[1] == f"It marked something on {alarms} of {clean} clean images."
    assert [line.split()[1] for line in lines[5:12]] == [*RECIPES, "clean"]
    assert len({len(line) for line in lines[3:12]}) == 1               # aligned
    assert lines[11].split("|")[10].strip() == "10"
    assert ".696 / .788, DENet" in out and "alpha > 0.08" in out and "sum abs(J-I)" in out
    assert "Dataset IoU" in out and "excess per mark" not in out and "threshold" not in out
    assert "cpu: asked for" in err and "34 images to look at, about " in err
    assert ev.main([*argv, "--tables"]) == 0
    more = capsys.readouterr().out
    assert more.startswith(out) and "| default at threshold" in more and "excess per mark" in more
    rates = [s["false_alarm_rate"] for s in ours["curves"]["clean photos"].values()]
    assert len(rates) == 19 and rates == sorted(rates, reverse=True) and "| clean photos at threshold" in more
    assert ev.main([*argv, "--seed", "3"]) == 0 and capsys.readouterr().out != out


def test_bare_checkout_says_what_it_runs_on(here, stub, capsys):
    assert ev.main(["--n", "1", "--recipe", "default"]) == 0
    out, err = capsys.readouterr()
    assert "no --images: generated backgrounds with the held-out part of" in err and "nan" not in out
    assert "| reference" not in out and "| clean photos" in out


def test_threshold_and_dilate(here, weights, photos):
    argv = ["--images", photos, "--recipe", "default", "--n", "4", "--weights", weights]
    everything, nothing = report(*argv, "--threshold", "0.001"), report(*argv, "--threshold", "0.999")
    assert everything["sets"]["default"]["recall"] == 1 and nothing["sets"]["default"]["recall"] == 0
    assert nothing["sets"]["default"]["precision"] is None and nothing["thresholds"] == [0.999]
    clean = everything["sets"]["clean photos"]
    assert (clean["n_clean"], clean["false_alarm_rate"], clean["iou"]) == (10, 1, None)
    prob = predict_prob(load_model(weights), np.array(Image.open(next(photos.rglob("*.jpg")))))
    none, three = (report(*argv, "--threshold", np.median(prob), "--dilate", d) for d in (0, 3))
    recall = three["sets"]["default"]["recall"]
    assert none["sets"]["default"]["recall"] < recall
    assert recall == none["dilation"]["3"]["recall"] == three["dilation"]["3"]["recall"]
    assert none["curves"] == three["curves"]


def test_files_are_there_before_the_first_line_of_the_tables(here, photos, logos, stub, capsys, monkeypatch):
    def leave(*_):
        raise BrokenPipeError(32, "Broken pipe")                       # as head does
    monkeypatch.setattr(ev, "print_report", leave)
    argv = ["--images", photos, "--logos", logos, "--recipe", "default", "--n", "9", "--weights", "bad.pt"]
    ours = report(*argv, "--worst", "5", code=1)
    assert capsys.readouterr().err.split()[-2:] == ["r.json", "worst.png"]
    assert len(ours["pictures"]) == 9 + 10 and list(ours["sets"]) == ["default", "clean photos"]
    ious = [line["iou"] for line in ours["pictures"] if line["iou"] is not None]
    assert np.mean(ious) == pytest.approx(ours["sets"]["default"]["iou"])
    assert set(ours["pictures"][0]) >= {"set", "name", "tp", "fp", "fn", "pixels", "f1", "recall", "kind"}
    assert Image.open("worst.png").size == (6 * 256, 20 + 3 * (256 + 16))


def test_the_worst_come_first(here, stub, monkeypatch):
    monkeypatch.setattr(ev, "load_model", lambda path, device: White(20))      # cuts 1, most of 2
    write_set()
    assert ev.main(["d", "--worst", "2"]) == 0
    sheet = np.asarray(Image.open("worst.png"))
    assert sheet.shape == (20 + 256 + 16, 6 * 256, 3)
    truths = [sheet[36:76, 256 + k * 768:256 + k * 768 + 48, 0] > 128 for k in (0, 1)]
    assert all(np.array_equal(a, make_square(3, i)[1] > 0) for a, i in zip(truths, (2, 1)))
    predicted = sheet[36:76, 512:512 + 48]
    assert np.array_equal(predicted[:20, :, 0] > 128, truths[0][:20]) and not predicted[20:].any()
    monkeypatch.setattr(ev, "load_model", lambda path, device: White(0))       # finds nothing at all
    large = np.full((40, 48), 255, np.uint8)
    for folder in ("images", "masks"):
        cv2.imwrite(f"d/{folder}/1.png", large)
    assert ev.main(["d", "--worst", "1"]) == 0                         # of equals the most wrong pixels
    assert (np.asarray(Image.open("worst.png"))[36:76, 256:304] == 255).all()


def test_compare(here, stub, photos, capsys):
    write_set()
    ours = report("d", "--compare", "bad.pt", "good.pt")
    out = capsys.readouterr().out
    better = ours["comparison"]["full size"]
    assert better["better"] == "B" and better["iou_of_B"] == 1 and "paired bootstrap" in out
    assert [[line["iou"] for line in ours["pictures"][k][:3]] for k in "AB"] == [[8 / 12, 0, 0], [1, 1, 1]]
    drawn = [line.split("|")[1:4] for line in out.splitlines() if line.startswith(("| 0 ", "| 1 ", "| 2 "))]
    assert [(name.strip(), b.strip()) for name, _, b in drawn] == [(name, "IoU 1.00") for name in "210"]
    sheet = np.asarray(Image.open("changed.png"))
    assert sheet.shape == (20 + 2 * (256 + 16), 8 * 256, 3)
    truth, a, b = (sheet[36:76, k * 256:k * 256 + 48, 0] > 128 for k in (1, 2, 3))       # of 2, which A misses
    assert truth.any() and np.array_equal(b, truth) and not a.any()
    same = report("--compare", "good.pt", "good.pt", "--n", "3", "--images", photos)["comparison"]
    assert list(same) == [*RECIPES, "clean photos"]
    assert all(same[name][f"B_minus_A{end}"] == 0 for name in RECIPES for end in ("", "_low", "_high"))


def test_tune_stores_what_validation_prefers(here, weights, photos, capsys, monkeypatch):
    path, seeds = here / "mine.pt", []
    save_checkpoint(load_checkpoint(weights) | {"step": 7, "threshold": 0.5}, path)
    counts = np.array([[9 if k == 7 else 5, 0, 5, 100] for k in range(1 + 19 + 6)])      # .35 is the best
    monkeypatch.setattr(ev, "score", lambda net, pictures, *rest: seeds.append(pictures.make.args[0].seed)
                        or [{"index": 0, "meta": {"name": "", "notes": []}, "counts": counts}])
    assert ev.main(["--weights", str(path), "--tune", "--images", str(photos), "--n", "3"]) == 0
    after, before = load_checkpoint(path), load_checkpoint(weights)
    assert after["threshold"] == load_model(path).threshold == 0.35 and after["step"] == 7
    assert set(seeds) == {ev.VALIDATION_SEED} != {ev.TEST_SEED}
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    assert "threshold 0.35 is stored" in capsys.readouterr().out


@pytest.mark.parametrize("argv, say", [
    (["--weights", "none.pt"], "no weights at none.pt"),
    (["nowhere", "--weights", "W"], "nowhere has no layout that is known here"),
    (["--images", "nowhere", "--weights", "W"], "nowhere is not a folder"),
    (["--weights", "W", "--device", "cuda:77"], "cuda:77"),
    (["--n", "0"], "--n must be at least 1"),
    (["--threshold", "1.5"], "--threshold must lie between 0 and 1"),
    (["--threshold", "0"], "--threshold must lie between 0 and 1"),
    (["--worst", "-3"], "--worst must be at least 1"),
    (["--dilate", "-1"], "--dilate must be at least 0"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["d", "--recipe", "clwd"], "a folder is scored as it is"),
    (["--same-mark"], "name the folder"),
    (["--compare", "W", "junk.pt"], "junk.pt is damaged"),
    (["--compare", "W", "empty.pt"], "empty.pt is damaged"),
    (["--weights", "W", "--json", "no/r.json"], "cannot write no/r.json"),
    (["--weights", "W", "--json", "folder"], "cannot write folder"),
    (["--weights", "W", "--json", "W"], "is an input and is not overwritten"),
    (["--weights", "W", "--worst", "3", "--images", "."], "worst.png is an input"),
    (["--weights", "W", "--json", "folder/meta.jsonl", "folder"], "meta.jsonl is an input"),
])
def test_a_mistake_gets_one_sentence(argv, say, here, weights, capsys, monkeypatch):
    Path("junk.pt").write_text("no weights")
    Path("empty.pt").touch()
    Path("folder").mkdir()
    for name in ("worst.png", "folder/meta.jsonl"):
        Path(name).write_text("mine")
    monkeypatch.setattr(ev, "score", lambda *_: pytest.fail("scored before it was checked"))
    before = weights.read_bytes()
    assert ev.main([str(weights) if a == "W" else a for a in argv]) == 2
    assert weights.read_bytes() == before and Path("worst.png").read_text() == "mine"
    assert Path("folder/meta.jsonl").read_text() == "mine"
    err = capsys.readouterr().err
    assert say in err.splitlines()[-1] and err.splitlines()[-1].startswith("eval.py: ")


@pytest.mark.parametrize("argv", [["--compare", "a", "b", "--tune"], ["--tune", "--tables"],
                                  ["--recipe", "none"]])
def test_what_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as e:
        ev.main(argv)
    assert e.value.code == 2 and argv[0] in capsys.readouterr().err


def test_ctrl_c_is_one_line(here, stub, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(ev, "predict_prob", stop)
    assert ev.main(["--n", "1", "--recipe", "default", "--json", "r.json"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "eval.py: stopped before the end"
    assert not Path("r.json").exists()
