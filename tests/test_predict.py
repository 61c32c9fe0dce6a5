"""What predict.py promises: a mask of the displayed size or one sentence, for whatever lies in the folder."""
import contextlib
import errno
import functools
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, features

import model
import predict

ROOT = Path(__file__).parents[1]
SIZE = 64                                     # what the small untrained network looks at


def photo(W=60, H=40, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Untrained, small to run, and told apart from 0.5 so that masks hold both marked and unmarked pixels."""
    torch.manual_seed(0)
    net = model.build()
    net.model.segmentation_head[0].weight.data *= 0.1     # no prob near 0 or 1
    net.size = SIZE
    net.threshold = float(np.median(model.predict_prob(net.eval(), np.array(photo()))))
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    model.save_checkpoint(model.pack(net), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The small network gains nothing from threads, and it is built once."""
    threads, load = torch.get_num_threads(), predict.load_model
    torch.set_num_threads(1)
    predict.load_model = functools.lru_cache(load)
    yield
    torch.set_num_threads(threads)
    predict.load_model = load


@pytest.fixture
def run(weights, capsys):
    """run("in.jpg", ...) -> code, out, err, as on the command line."""
    def call(*argv, w=weights):
        try:
            code = predict.main([*map(str, argv), "--weights", str(w), "--device", "cpu"])
        except SystemExit as e:               # argparse
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(code=code, out=out, err=err)
    return call


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """photos/a.jpg, b.png, notes.txt and deep/c.jpg below the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    photo(seed=1).save(folder / "a.jpg")
    photo(90, 50, seed=2).save(folder / "b.png")
    photo(seed=3).save(folder / "deep" / "c.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


def tree(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if not p.is_dir())


def mask_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "L"
        mask = np.array(image)
    assert set(np.unique(mask)) <= {0, 255}
    return mask


# ---------------------------------------------------------------- names

def test_one_picture_gets_its_mask_beside_it(run, photos):
    for flags in ([], ["-q"]):                # and again
        result = run("photos/a.jpg", *flags)
        assert result.code == 0 and result.out == "photos/a_mask.png\n"
    assert mask_of("photos/a_mask.png").shape == (40, 60)


def test_a_folder_gets_a_folder_which_iopaint_pairs_by_stem(run, photos):
    result = run("photos/")
    assert result.code == 0 and result.out == "" and tree("photos_masks") == ["a.png", "b.png"]
    assert result.err.splitlines()[-1].startswith("predict.py: found marks on ")
    assert result.err.splitlines()[-1].endswith("of 2 pictures, 0 failed")


def test_recurse_keeps_the_tree_and_leaves_out_earlier_masks(run, photos):
    for _ in range(2):
        assert run("photos", "-r").code == 0
        assert run("photos/deep").code == 0   # puts photos/deep_masks into the tree
        assert run("photos/a.jpg").code == 0  # and photos/a_mask.png
    assert tree("photos_masks") == ["a.png", "b.png", "deep/c.png"]


def test_dot_is_a_folder_too(run, photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert run(".").code == 0
    assert tree("../photos_masks") == ["a.png", "b.png"]


@pytest.mark.parametrize("inputs, out, expected", [
    (["photos/a.jpg"], "m.png", ["m.png"]),
    (["photos/a.jpg"], "m/", ["m/a.png"]),
    (["photos/a.jpg", "photos/b.png"], "m", ["m/a.png", "m/b.png"]),
    (["photos/*.jpg"], "m/", ["m/a.png"]),
    (["photos"], "m", ["m/a.png", "m/b.png"]),
    (["photos", "photos/deep/c.jpg"], "m", ["m/a.png", "m/b.png", "m/c.png"]),
    (["photos", "-r"], "photos/deep2",
     ["photos/deep2/a.png", "photos/deep2/b.png", "photos/deep2/deep/c.png"]),
])
def test_out(run, photos, inputs, out, expected):
    before = set(tree("."))
    for _ in range(2):                        # the second time, the folders are there
        assert run(*inputs, "-o", out).code == 0
        assert sorted(set(tree(".")) - before) == expected


def test_glob_that_the_shell_left_alone(run, photos):
    assert run("photos/*").code == 1          # named so, notes.txt is tried, and deep/ is an input of its own
    assert {"a_mask.png", "b_mask.png", "deep_masks/c.png"} <= set(tree("photos"))


def test_rerun_of_a_shell_glob_leaves_out_its_own_masks(run, photos):
    run("photos/a.jpg", "photos/b.png")
    assert run(*sorted(map(str, photos.glob("*.*g")))).code == 0
    assert tree("photos") == ["a.jpg", "a_mask.png", "b.png", "b_mask.png", "deep/c.jpg", "notes.txt"]


def test_extra_outputs_lie_apart(run, photos):
    assert run("photos", "--prob", "--overlay").code == 0
    assert tree("photos_probs") == ["a.png", "b.png"] and tree("photos_overlays") == ["a.jpg", "b.jpg"]
    assert run("photos/a.jpg", "-o", "x.png", "--prob", "--overlay").code == 0
    assert {"x.png", "x_prob.png", "x_overlay.jpg"} <= set(tree("."))


# ---------------------------------------------------------------- stdin, stdout

def test_stdin_to_stdout_is_a_png(weights, photos):
    done = subprocess.run([sys.executable, ROOT / "predict.py", "-", "--weights", weights],
                          input=(photos / "a.jpg").read_bytes(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert mask_of(io.BytesIO(done.stdout)).shape == (40, 60)
    assert tree(photos) == ["a.jpg", "b.png", "deep/c.jpg", "notes.txt"]


def test_stdin_to_a_file(run, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    result = run("-", "-o", "m.png")
    assert result.code == 1 and "-: standard input is empty or closed" in result.err
    for out, expected in (("m.png", "m.png"), ("m/", "m/stdin.png")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=(photos / "a.jpg").open("rb")))
        assert run("-", "-o", out).code == 0
        assert mask_of(expected).shape == (40, 60)


def test_out_dash(photos, weights, capfdbinary):
    assert predict.main(["photos/b.png", "-o", "-", "--weights", str(weights)]) == 0
    assert mask_of(io.BytesIO(capfdbinary.readouterr().out)).shape == (50, 90)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left")])
@pytest.mark.parametrize("flags", [["-o", "-"], ["--json"], [], ["--list", "--threshold", "0"]])
def test_closed_stdout_is_no_drama(run, photos, monkeypatch, tmp_path, flags, error):
    with open(tmp_path / "stdout", "w") as gone:
        def write(data):
            raise error
        pipe = SimpleNamespace(write=write, flush=lambda: None, fileno=gone.fileno)
        pipe.buffer = pipe
        monkeypatch.setattr(sys, "stdout", pipe)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert run("photos/a.jpg", *flags).code == 1
    said = [line for line in err.getvalue().splitlines() if "unet on" not in line]
    assert "Errno" not in str(said) and (error.errno == 32 and not said or error.strerror in str(said))


def test_ctrl_c(run, photos, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(predict, "predict_probs", interrupt)
    result = run("photos")
    assert result.code == 130 and "stopped" in result.err and not Path("photos_masks").exists()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
def test_ctrl_c_during_the_imports(photos):
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / "predict.py", "photos"],
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:                   # a line per module, torch's own come after cv2
        if line.split()[-1] == "cv2":
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest


# ---------------------------------------------------------------- flags

def test_threshold(run, photos):
    assert run("photos/a.jpg", "--threshold", "0").code == 0
    assert (mask_of("photos/a_mask.png") == 255).all()
    assert run("photos/a.jpg", "--threshold", "1").code == 0
    assert (mask_of("photos/a_mask.png") == 0).all()


def test_dilate_and_its_default(run, photos, weights):
    net = model.load_model(weights)
    marked = model.predict_prob(net, model.load_image("photos/a.jpg")) >= net.threshold
    assert 0 < marked.mean() < 1
    for flags, radius in (([], model.default_dilation(40, 60)),
                          (["--dilate", "0"], 0),
                          (["--dilate", "4"], 4)):
        assert run("photos/a.jpg", *flags).code == 0
        assert (mask_of("photos/a_mask.png") == model.dilate(marked.astype(np.uint8), radius)).all()


def test_size_and_prob(run, photos, weights):
    net = model.load_model(weights)
    image = model.load_image("photos/b.png")
    for flags, size in (([], SIZE), (["--size", "40"], 40)):
        assert run("photos/b.png", "--prob", *flags).code == 0
        expected = (model.predict_prob(net, image, size) * 255).round()
        assert np.abs(np.array(Image.open("photos/b_prob.png")) - expected).max() == 0


def test_overlay_is_red_on_the_mask(run, photos):
    assert run("photos/a.jpg", "--overlay", "--threshold", "0").code == 0
    with Image.open("photos/a_overlay.jpg") as overlay:
        difference = (np.array(overlay, float).mean((0, 1))
                      - np.array(Image.open("photos/a.jpg"), float).mean((0, 1)))
    assert overlay.size == (60, 40) and difference[0] > 40 and difference[1] < -40 and difference[2] < -40


def test_json(run, photos):
    (photos / "bad.jpg").write_bytes(b"nothing")
    result = run("photos", "--json")
    assert result.code == 1
    lines = {Path(r["input"]).name: r for r in map(json.loads, result.out.splitlines())}
    assert "not a picture in a format that is read" in lines["bad.jpg"]["error"]
    record = lines["b.png"]
    assert (record["width"], record["height"]) == (90, 50) and record["mask"] == "photos_masks/b.png"
    mask = mask_of(record["mask"])
    assert record["coverage"] == pytest.approx((mask > 0).mean(), abs=1e-6) and 0 < record["max_prob"] < 1
    assert set(record) == {"input", "mask", "width", "height", "coverage", "max_prob", "boxes"}
    covered = np.zeros_like(mask)
    for b in record["boxes"]:
        covered[b["y"]:b["y"] + b["height"], b["x"]:b["x"] + b["width"]] = 255
    assert record["boxes"] and (covered >= mask).all()


def test_a_box_for_each_mark_with_the_letters_of_a_word_joined():
    prob = np.zeros((200, 300), np.float32)           # a default dilation is 2 pixels here
    prob[20:50, 30:36], prob[20:50, 42:48], prob[30, 45] = 0.6, 0.5, 0.75          # two letters
    prob[60:70, 46:90], prob[199, 299] = 0.5, 0.9                                  # below them, and at the edge
    mask = (prob > 0).astype(np.uint8) * 255
    mask[120, 120] = 100                              # a soft edge is no mark
    assert predict.boxes(mask, prob) == [
        {"x": 299, "y": 199, "width": 1, "height": 1, "score": 0.9},
        {"x": 30, "y": 20, "width": 18, "height": 30, "score": 0.75},
        {"x": 46, "y": 60, "width": 44, "height": 10, "score": 0.5}]
    assert predict.boxes(np.zeros_like(mask), prob) == []


def test_skip_existing(run, photos):
    run("photos")
    (Path("photos_masks") / "a.png").unlink()
    kept = os.stat("photos_masks/b.png").st_mtime_ns
    result = run("photos", "--skip-existing")
    assert result.code == 0 and "of 1 pictures, 0 failed, 1 were there already" in result.err
    assert os.stat("photos_masks/b.png").st_mtime_ns == kept and tree("photos_masks") == ["a.png", "b.png"]
    Path("photos_masks/b.png").write_bytes(b"")                           # a power cut leaves such files
    assert "of 1 pictures" in run("photos", "--skip-existing").err
    assert "of 2 pictures" in run("photos", "--skip-existing", "--prob").err
    assert "of 0 pictures, 0 failed, 2 were" in run("photos", "--skip-existing").err


def test_quiet(run, photos):
    assert run("photos", "-q").err == ""
    (photos / "bad.jpg").write_bytes(b"nothing")
    assert len(run("photos", "-q").err.splitlines()) == 1


def test_huge_pictures_are_refused(run, photos, monkeypatch):
    monkeypatch.setattr(model, "MAX_PIXELS", 2399)
    result = run("photos/a.jpg")
    assert result.code == 1 and "60x40 is over the limit of 2399 pixels" in result.err
    monkeypatch.setattr(model, "MAX_PIXELS", 2400)
    assert run("photos/a.jpg").code == 0


def test_list_prints_scores_and_names_and_writes_nothing(run, photos, weights):
    (photos / "new\nline.png").write_bytes((photos / "b.png").read_bytes())
    before, net = tree("."), model.load_model(weights)
    result = run("photos", "-r", "--list", "--threshold", "0")
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert result.code == 0 and tree(".") == before
    assert {name for _, name in lines} == {"photos/a.jpg", "photos/b.png", "photos/deep/c.jpg",
                                           r"photos/new\nline.png"}
    assert [float(score) for score, _ in lines] == sorted((float(score) for score, _ in lines), reverse=True)
    best = max(model.predict_prob(net, model.load_image(name)).max() for _, name in lines if "\\" not in name)
    assert float(lines[0][0]) == pytest.approx(best, abs=0.01)
    assert run("photos", "--list", "--threshold", "1").out == ""


def test_the_soft_edge_lies_outside_of_the_mask(run, photos, weights):
    assert run("photos/b.png", "--dilate", "1").code == 0
    hard = mask_of("photos/b_mask.png")
    assert run("photos/b.png", "--dilate", "1", "--feather", "4").code == 0
    soft = np.array(Image.open("photos/b_mask.png"))
    distance = cv2.distanceTransform(255 - hard, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    assert ((soft == 255) == (hard == 255)).all() and ((soft > 0) == (distance < 5)).all()
    assert set(np.unique(soft[distance == 1])) == {204} and set(np.unique(soft[distance == 2])) == {153}
    assert (predict.predict_mask("photos/b.png", weights, dilation=1, feather=4, device="cpu") == soft).all()


def test_note_on_large_pictures_comes_once(run, tmp_path):
    for name in "ab":
        photo(300, 200).save(tmp_path / f"{name}.png")
    assert run(tmp_path).err.count("--tile") == 1
    assert "made 3.8 times smaller: marks under about 31 pixels" in run(tmp_path / "a.png").err
    assert "--tile" not in run(tmp_path, "--tile").err


@pytest.mark.parametrize("argv, words", [
    (["a.jpg", "--device", "cuda:99"], "device"),
    (["a.jpg", "--threshold", "7"], "--threshold 7.0 is not between"),
    (["a.jpg", "--size", "3"], "--size 3"),
    (["a.jpg", "--dilate", "-1"], "--dilate -1"),
    (["a.jpg", "--feather", "-2"], "--feather -2"),
    ([".", "--list", "--json"], "--json would do nothing"),
    ([".", "--list", "-o", "x"], "--out would do nothing"),
    (["a.jpg", "-o", "m.jpg"], "PNG|.png"),
    (["a.jpg", "b.png", "-o", "-"], "stdout"),
    (["a.jpg", "-"], "stdout"),
    (["a.jpg", "-o", "-", "--json"], "stdout"),
    (["-", "--prob"], "stdout"),
    ([".", "-o", "notes.txt"], "is a file"),
    ([".", "-o", "."], "mix"),
    (["deep", "-r", "-o", "."], "mix"),
    (["empty"], "no pictures in empty, -r"),
    (["empty.jpg", "-r"], "no pictures in empty.jpg"),
    ([], "usage"),
])
def test_wrong_usage_is_2_with_a_sentence(photos, monkeypatch, capsys, weights, argv, words):
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    (photos / "empty.jpg").mkdir()
    before = tree(".")
    try:
        code = predict.main([*argv, "--weights", str(weights)])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert (code == 2 and any(word in err for word in words.split("|"))
            and "Traceback" not in err and tree(".") == before)


# ---------------------------------------------------------------- tiles

class Blur(torch.nn.Module):
    """A network that looks 3 pixels far: seen through windows with overlap, nothing may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.size, self.threshold = SIZE, 0.5

    def forward(self, x):
        x = torch.nn.functional.pad(x.float().mean(1, keepdim=True) / 64 - 2, (3, 3, 3, 3), mode="replicate")
        return torch.nn.functional.avg_pool2d(x, 7, stride=1)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(model, "pick_amp", lambda name, device: (None, "exact"))


@pytest.mark.parametrize("H, W", [(64, 64), (40, 200), (200, 65), (177, 301), (1, 300), (300, 2)])
def test_tiles_equal_the_whole(exact, H, W):
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    whole, = model.predict_probs(Blur(), [image])
    assert np.abs(predict.tiled_prob(Blur(), image, SIZE) - whole).max() < 1e-5


def test_one_tile_is_the_untiled_result(weights):
    net = model.load_model(weights)
    for image in (np.array(photo()), np.array(photo(90, 40))):     # the second is wider than SIZE, yet smaller
        assert (predict.tiled_prob(net, image, SIZE) == model.predict_prob(net, image)).all()


@pytest.mark.parametrize("length, size", [(1, 64), (64, 64), (65, 64), (1000, 64), (999, 100), (70, 33)])
def test_weights_of_windows_add_up_to_one(length, size):
    total = np.zeros(length)
    for place, weight in predict.windows(length, size):
        total[place] += weight
    assert np.abs(total - 1).max() < 1e-5
    (_, first), (_, last) = predict.windows(100, 64)
    assert np.allclose(first, last[::-1], atol=1e-5)


def test_tile_flag(run, photos, weights):
    photo(300, 200).save("large.png")
    assert run("large.png", "--tile", "--prob", "--size", "96").code == 0
    expected = predict.tiled_prob(model.load_model(weights), model.load_image("large.png"), 96)
    assert (np.array(Image.open("large_prob.png")) == (expected * 255).round()).all()


def test_tiles_of_one_large_picture_show_progress(run, photos, monkeypatch):
    photo(200, 100).save("large.png")
    bars, tqdm = [], predict.tqdm

    class Bar(tqdm):
        def __init__(self, *args, unit, disable, **options):
            bars.append((unit, disable))
            super().__init__(*args, disable=True, **options)
    monkeypatch.setattr(predict, "tqdm", Bar)
    for argv, expected in ((["large.png"], None), (["large.png", "-q"], True),
                           (["large.png", "photos/b.png", "-o", "m"], True)):
        assert run(*argv, "--tile").code == 0
        assert (" windows", expected) in bars and (" windows", None if expected else True) not in bars
        bars.clear()


# ---------------------------------------------------------------- one mark for many

@pytest.fixture
def agency(photos) -> Path:
    """Four photos of one size, one of them turned by EXIF; one of another size, and one that is broken."""
    folder = photos.parent / "agency"
    folder.mkdir()
    for i in range(3):
        photo(seed=10 + i).save(folder / f"{i}.png")
    photo(seed=13).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif(6))
    photo(40, 60, seed=14).save(folder / "upright.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


def shared_mask(folder, names, weights) -> np.ndarray:
    net = model.load_model(weights)
    probs = np.stack([model.predict_prob(net, model.load_image(folder / n)) for n in names])
    return model.to_mask(np.sqrt((probs ** 2).mean(0)), net.threshold)


def agree(a, b) -> bool:
    return a.shape == b.shape and (a != b).mean() < 0.01                  # resized after the mean, not before


def test_pictures_of_one_size_share_a_mask(run, agency, weights):
    result = run("agency", "--same-mark", "--json")
    assert result.code == 1 and "broken.png: " in result.err
    assert "pictures that share a mask: 4 of 60x40\n" in result.err
    records = {Path(r["input"]).name: r for r in map(json.loads, result.out.splitlines())}
    group = ["0.png", "1.png", "2.png", "turned.png"]
    masks = [mask_of(records[name]["mask"]) for name in group]
    assert all((mask == masks[0]).all() for mask in masks) and 0 < masks[0].mean() < 255
    assert agree(masks[0], shared_mask(agency, group, weights))
    assert [records[n]["group"] for n in (*group, "upright.png")] == [4, 4, 4, 4, 1]
    assert records["0.png"]["boxes"] == records["turned.png"]["boxes"]
    assert run("agency/upright.png").code == 0            # a group of one is a single picture
    assert (mask_of("agency_masks/upright.png") == mask_of("agency/upright_mask.png")).all()
    assert "none, each has a size of its own" in run("photos", "--same-mark").err


def test_a_mask_that_is_missing_is_made_from_the_whole_group(run, agency):
    assert run("agency", "--same-mark").code == 1
    (agency / "broken.png").unlink()
    before = mask_of("agency_masks/1.png")
    Path("agency_masks/1.png").unlink()
    kept = os.stat("agency_masks/0.png").st_mtime_ns
    result = run("agency", "--same-mark", "--skip-existing")
    assert result.code == 0 and "of 1 pictures, 0 failed, 4 were there already" in result.err
    assert os.stat("agency_masks/0.png").st_mtime_ns == kept
    assert (mask_of("agency_masks/1.png") == before).all()
    assert "of 0 pictures" in run("agency", "--same-mark", "--skip-existing").err


def test_ranks_add_up_their_groups(monkeypatch):
    one, two, three = np.full((3, 2, 2), 0, np.float32) + np.float32([0.3, 0.6, 0.9])[:, None, None]
    record = {"input": "a.png", "width": 2, "height": 2}
    theirs = {(2, 2, False): (two ** 2 + three ** 2, 2), (5, 5, False): (np.ones((5, 5)), 1)}
    monkeypatch.setattr(predict, "gather", lambda mine: [mine, theirs])
    (shared, prob), = predict.share([(record, one)], quiet=True)
    assert shared["group"] == 3 and np.allclose(prob, np.sqrt((0.09 + 0.36 + 0.81) / 3))


def video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, frames[0].size)
    for frame in frames:
        writer.write(np.array(frame)[..., ::-1])
    writer.release()


class Unfinished:
    """A video of 90 frames that does not know its length."""

    def __init__(self, path):
        self.at = 0

    def get(self, what):
        return -9.2e18

    def set(self, what, k):
        self.at = k

    def read(self):
        return self.at < 90, np.full((4, 4, 3), self.at, np.uint8) if self.at < 90 else None


def test_a_video_is_a_group_of_its_frames(run, photos, weights, monkeypatch):
    video("photos/clip.avi", [photo(seed=k // 30) for k in range(90)])
    looks, real = [], predict.predict_probs
    monkeypatch.setattr(predict, "FRAMES", 12)
    monkeypatch.setattr(predict, "predict_probs", lambda net, views: looks.append(views) or real(net, views))
    assert run("photos/clip.avi", "--overlay").out == "photos/clip_mask.png\n"
    assert len(looks) == predict.FRAMES and Image.open("photos/clip_overlay.jpg").size == (60, 40)
    for k in range(3):
        photo(seed=k).save(f"{k}.png")
    expected = shared_mask(Path(), ["0.png", "1.png", "2.png"], weights)
    assert (mask_of("photos/clip_mask.png") != expected).mean() < 0.1     # a video's frames lose detail
    assert run("photos", "-o", "m").code == 0 and tree("m") == ["a.png", "b.png"]
    result = run("photos", "-o", "m", "--same-mark", "--tile")
    assert result.code == 0 and tree("m") == ["a.png", "b.png", "clip.png"]
    Path("m/a.png").unlink()
    looks.clear()                             # nothing depends on the video
    assert run("photos", "-o", "m", "--same-mark", "--skip-existing").code == 0 and len(looks) == 2
    video("short.avi", [photo(seed=1)] * 3)
    looks.clear()
    assert run("short.avi").code == 0 and len(looks) == 3
    with monkeypatch.context() as m:          # a recording that was cut off: one a second
        m.setattr(cv2, "VideoCapture", Unfinished)
        assert [int(frame[0, 0, 0]) for frame in predict.frames("x.webm")] == [0, 30, 60]
    Path("no.mp4").write_bytes(b"nothing")
    result = run("no.mp4", "-q")
    assert result.code == 1 and result.err == "predict.py: no.mp4: not a video that OpenCV can read\n"
    with pytest.raises(OSError, match="rename it"):                    # OpenCV crashes
        next(predict.frames("\udcff.mp4"))


# ---------------------------------------------------------------- masks that fit where they go

@pytest.mark.parametrize("turn", range(1, 9))
def test_stored_masks_fit_the_pixels_of_the_file(run, photos, turn):
    photo(seed=2).save("turned.jpg", exif=exif(turn), quality=95)
    assert run("turned.jpg", "--json").code == 0
    displayed = mask_of("turned_mask.png")
    result = run("turned.jpg", "--stored", "--json", "--overlay", "--prob")
    stored, record = Image.open("turned_mask.png"), json.loads(result.out)
    assert stored.size == Image.open("turned.jpg").size == (record["width"], record["height"]) == (60, 40)
    assert Image.open("turned_overlay.jpg").size == Image.open("turned_prob.png").size == (60, 40)
    stored.getexif()[0x0112] = turn
    assert (np.array(predict.ImageOps.exif_transpose(stored)) == displayed).all()
    assert record.get("orientation", 1) == turn
    box, mask = record["boxes"][0], np.array(Image.open("turned_mask.png"))
    assert mask[box["y"]:box["y"] + box["height"], box["x"]:box["x"] + box["width"]].any(1).all()


def test_what_a_user_should_know_is_said_once(run, photos):
    for name in "xy":
        photo().save(photos / f"{name}.jpg", exif=exif(6))
        photo().save(photos / f"{name}{name}.tif", save_all=True, append_images=[photo()] * 2)
    photo().save(photos / "m.mpo", save_all=True, append_images=[photo()])     # a phone's, with its depth map
    err = run("photos").err
    assert err.count("--stored") == 1 and "photos/x.jpg is displayed turned" in err
    assert err.count("the first was looked at") == 1 and "photos/xx.tif has 3 pages" in err
    assert "--stored" not in run("photos", "--stored").err + run("photos/a.jpg").err + run("photos", "-q").err


def test_the_overlay_and_python_do_not_change_the_mask(run, tmp_path, weights):
    noise = np.random.default_rng(0).integers(-60, 60, (1000, 1600, 1))
    image = np.asarray(photo(1600, 1000, seed=5)).astype(int) + noise
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "large.jpg")
    masks = []
    for flags in ([], ["--overlay"]):
        assert run(tmp_path / "large.jpg", *flags).code == 0
        masks.append(mask_of(tmp_path / "large_mask.png"))
    masks.append(predict.predict_mask(tmp_path / "large.jpg", weights, device="cpu"))
    assert 0 < masks[0].mean() < 255 and all((mask == masks[0]).all() for mask in masks[1:])


# ---------------------------------------------------------------- library use

def test_predict_mask_takes_path_array_and_picture(run, photos, weights):
    predict.network.cache_clear()
    masks = [predict.predict_mask(source, weights, device="cpu") for source in
             ("photos/a.jpg", Path("photos/a.jpg"),
              Image.open("photos/a.jpg"), np.array(Image.open("photos/a.jpg")))]
    run("photos/a.jpg")
    assert predict.network.cache_info().misses == 2 and predict.network.cache_info().hits == 3
    for mask in masks:
        assert (mask.shape == (40, 60) and mask.dtype == np.uint8
                and (mask == mask_of("photos/a_mask.png")).all())
    with pytest.raises(ValueError, match="uint8"):
        predict.predict_mask(np.zeros((4, 4), np.float32), weights, device="cpu")
    with pytest.raises(OSError):
        predict.predict_mask("photos/notes.txt", weights, device="cpu")


def test_predict_mask_options(photos, weights):
    call = {"weights": weights, "device": "cpu"}
    assert predict.predict_mask("photos/a.jpg", threshold=0.0, **call).all()
    bare, grown = (predict.predict_mask("photos/a.jpg", dilation=d, **call) for d in (0, 5))
    assert (grown >= bare).all() and grown.sum() > bare.sum()
    assert predict.predict_mask("photos/a.jpg", size=32, tile=True, **call).shape == (40, 60)


def test_threads_that_start_together_read_the_weights_once(photos, weights, monkeypatch, capsys):
    load, calls, masks = predict.load_model, [], []

    def slow(*args):
        calls.append(args)
        time.sleep(0.2)
        return load(*args)
    monkeypatch.setattr(predict, "load_model", slow)
    predict.network.cache_clear()
    threads = [threading.Thread(target=lambda: masks.append(
        predict.predict_mask("photos/b.png", weights, device="cpu"))) for _ in range(8)]
    for work in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            work(thread)
    assert len(calls) == 1 and len(masks) == 8 and all((mask == masks[0]).all() for mask in masks)
    assert capsys.readouterr().err.count("cpu (asked for)") == 1


# ---------------------------------------------------------------- a corpus of awkward pictures

def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(W: int, H: int) -> bytes:
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b""))


def corpus() -> dict[bytes, tuple[bytes | Image.Image, tuple[int, int] | str]]:
    """file name -> (content, size (W, H) of the mask, "fails", or "either" where Pillow versions differ)."""
    base, size, files = photo(), (60, 40), {}
    jpg, png = encode(base, "JPEG", quality=90), encode(base, "PNG")
    big = encode(photo(700, 500), "JPEG")

    def add(name, content, expected=size):
        files[name if isinstance(name, bytes) else os.fsencode(name)] = (content, expected)

    # damaged
    for tenth in range(10):
        add(f"cut{tenth}.jpg", jpg[:len(jpg) * tenth // 10], "fails")
        add(f"cut{tenth}-large.jpg", big[:len(big) * tenth // 10], "fails")
    add("cut.png", png[:len(png) // 2], "fails")
    add("crc-header.png", png[:29] + b"\0\0\0\0" + png[33:], "fails")
    add("crc-data.png", png[:-16] + b"\0\0\0\0" + png[-12:], "either")
    add("cut.gif", encode(base, "GIF")[:300], "either")
    add("cut.webp", encode(base, "WEBP")[:100], "fails")
    add("cut.tif", encode(base, "TIFF")[:3000], "fails")
    if features.check("avif"):
        add("cut.avif", encode(base, "AVIF")[:-200], "fails")
    dds = encode(base, "DDS")
    add("no-format.dds", dds[:80] + bytes(4) + dds[84:], "fails")         # flags of the pixel format
    add("cut.bmp", encode(base, "BMP")[:300], "fails")
    add("text.jpg", b"I am a text file\n", "fails")
    add("page.png", b"<!doctype html><html></html>", "fails")
    add("zip.jpg", b"PK\x03\x04" + bytes(100), "fails")
    for ending in ("bmp", "gif", "ico", "j2k", "sgi", "tga",
                   "webp", "heic", "pcx", "ppm", "icns", "dds"):
        add(f"noise-{ending}.{ending}", np.random.default_rng(1).bytes(400), "fails")
    add("tail.jpg", jpg + b"rubbish after the end")
    add("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n", "fails")
    # claims to be huge
    add("bomb.png", png_bomb(100_000, 100_000), "fails")
    add("bomb.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(30), "fails")
    add("bomb.bmp",
        b"BM" + struct.pack("<IIIIiiHH", 200, 0, 54, 40, 90_000, 90_000, 1, 24) + bytes(100), "fails")
    # shapes
    for W, H in ((1, 1), (2, 2), (1, 5000), (5000, 1), (31, 33), (129, 128), (40_000, 2)):
        add(f"{W}x{H}.png", encode(photo(W, H), "PNG"), (W, H))
    for W, H in ((1, 5000), (1000, 999), (1001, 640)):
        add(f"{W}x{H}-b.jpg", encode(photo(W, H), "JPEG"), (W, H))
    # pixel formats
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        add(f"mode {mode}.png",
            encode(base.convert("L").convert(mode) if mode == "I;16" else base.convert(mode), "PNG"))
    grey = np.array(base.convert("L"), np.float32)
    add("float.tif", encode(Image.fromarray(grey / 255), "TIFF"))
    add("float-nan.tif", encode(Image.fromarray(np.where(grey > 100, np.nan, grey * 1e9)), "TIFF"))
    add("grey32.tif", encode(base.convert("I"), "TIFF"))
    add("grey16.tif", encode(Image.fromarray((grey * 257).astype(np.uint16)), "TIFF"))
    add("rgb16.png", cv2.imencode(".png", (np.array(base).astype(np.uint16) * 257))[1].tobytes())
    add("lab.tif", encode(base.convert("LAB"), "TIFF"))
    for kind, ending in (("JPEG", "jpg"), ("TIFF", "tif")):
        add(f"cmyk-{ending}.{ending}", encode(base.convert("CMYK"), kind))
        add(f"grey-{ending}.{ending}", encode(base.convert("L"), kind))
    add("transparent-b.gif", encode(base.convert("P"), "GIF", transparency=0))
    add("transparent.png", encode(base.convert("P"), "PNG", transparency=bytes(range(256))))
    add("progressive.jpg", encode(base, "JPEG", progressive=True))
    # file formats, the first frame of those that move
    for kind in ("BMP", "PPM", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "WEBP", "AVIF"):
        if kind not in ("JPEG2000", "AVIF") or features.check({"JPEG2000": "jpg_2000", "AVIF": "avif"}[kind]):
            add(f"kind {kind}.{'jp2' if kind == 'JPEG2000' else kind.lower()}", encode(base, kind))
    frames = {"save_all": True, "append_images": [photo(seed=9), photo(seed=8)]}
    add("moving-a.gif", encode(base, "GIF", **frames))
    add("moving-b.webp", encode(base, "WEBP", **frames))
    add("moving-c.png", encode(base, "PNG", **frames))
    add("stack.tif", encode(base, "TIFF", **frames))
    add("two.mpo", encode(base, "MPO", **frames))
    # what cameras and editors attach
    for orientation in range(1, 9):
        expected = (60, 40) if orientation < 5 else (40, 60)
        add(f"exif{orientation}.jpg", encode(base, "JPEG", exif=exif(orientation)), expected)
    add("exif6-large.jpg", encode(photo(700, 500), "JPEG", exif=exif(6)), (500, 700))
    add("exif8-almost-square.jpg", encode(photo(1000, 999), "JPEG", exif=exif(8)), (999, 1000))
    add("exif6-b.png", encode(base, "PNG", exif=exif(6)), (40, 60))
    add("exif6-c.webp", encode(base, "WEBP", exif=exif(6)), (40, 60))
    add("exif6-d.tif", encode(base, "TIFF", exif=exif(6)), "either")
    add("exif99.jpg", encode(base, "JPEG", exif=exif(99)))
    add("exif-garbage.jpg", encode(base, "JPEG", exif=b"Exif\0\0II*\0" + bytes(range(200))))
    add("exif-garbage-b.png", encode(base, "PNG", exif=b"Exif\0\0MM\0*" + b"\xff" * 50))
    add("icc-garbage.jpg", encode(base, "JPEG", icc_profile=bytes(range(256))))
    add("icc-garbage-b.png", encode(base, "PNG", icc_profile=b"no profile"))
    # names
    for name in ("with space.jpg", "quote's.jpg", 'double".jpg', "new\nline.jpg", "émoji 🎈.jpg",
                 "UPPER.JPG", "-dash.jpg", "100%s.jpg", "a.b.c.jpg", "[1].jpg", "back\\slash.jpg",
                 "$HOME.jpg", "x" * 251 + ".jpg"):
        add(name, jpg)
    add(b"latin1-\xe9\xff.jpg", jpg)
    add("bad new\nline.jpg", b"", "fails")
    add(b"bad latin1-\xe9.jpg", b"", "fails")
    return files


CORPUS = corpus()


@pytest.fixture(scope="module")
def ran(tmp_path_factory, weights):
    """One run over the corpus and what no file content can make: links, pipes, folders, locked files."""
    root = tmp_path_factory.mktemp("corpus")
    folder = os.fsencode(root / "photos")
    os.mkdir(folder)
    for name, (content, _) in CORPUS.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content)
    photos = root / "photos"
    (photos / "a folder.jpg").mkdir()
    photo().save(photos / "a folder.jpg" / "inside.jpg")
    (photos / "broken link.jpg").symlink_to("nowhere.jpg")
    (photos / "circle.jpg").symlink_to("circle.jpg")
    (photos / "good link.jpg").symlink_to("tail.jpg")
    (photos / "readme.txt").write_text("no picture")
    os.mkfifo(photos / "pipe.jpg")
    photo().save(photos / "locked.jpg")
    (photos / "locked.jpg").chmod(0)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = predict.main([str(photos), "--weights", str(weights), "--device", "cpu", "--json"])
    records = {os.fsencode(os.path.basename(r["input"])): r
               for r in map(json.loads, out.getvalue().splitlines())}
    return SimpleNamespace(code=code, err=err.getvalue().splitlines(), records=records, root=root)


def check(ran, name: bytes, expected):
    record = ran.records[name]
    shown = predict.printable(os.fsdecode(name))
    shown = shown[1:-1] if shown[0] in "'\"" else shown                   # repr of the whole path
    sentences = [line for line in ran.err
                 if f"/{shown}: " in line or f"/{shown}': " in line or f'/{shown}": ' in line]
    mask = os.path.join(os.fsencode(ran.root / "photos_masks"), os.path.splitext(name)[0] + b".png")
    if expected == "either":
        expected = "fails" if "error" in record else (record["width"], record["height"])
    if expected == "fails":
        assert len(sentences) == 1 and not os.path.exists(mask) and len(record["error"]) < 200
        assert "Error" not in record["error"]                             # a sentence, no class of Python's
    else:
        assert not sentences and mask_of(mask).shape[::-1] == expected == (record["width"], record["height"])


def test_the_corpus_is_large():
    assert len(CORPUS) >= 80


@pytest.mark.parametrize("name", CORPUS, ids=lambda name: ascii(os.fsdecode(name))[1:40])
def test_a_mask_or_one_sentence(ran, name):
    check(ran, name, CORPUS[name][1])


def test_what_is_no_file(ran):
    check(ran, b"broken link.jpg", "fails")
    check(ran, b"circle.jpg", "fails")
    check(ran, b"pipe.jpg", "fails")
    check(ran, b"good link.jpg", (60, 40))
    check(ran, b"locked.jpg", (60, 40) if os.access(ran.root / "photos/locked.jpg", os.R_OK) else "fails")
    assert b"a folder.jpg" not in ran.records and b"readme.txt" not in ran.records


def test_the_whole_run(ran):
    failed = [r for r in ran.records.values() if "error" in r]
    assert ran.code == 1
    # one each, the device, the summary, and what is said once: of large ones, turned ones, several pages
    assert len(ran.err) == len(failed) + 5
    assert ran.err[-1].endswith(f" of {len(ran.records)} pictures, {len(failed)} failed")
    written = [n for _, _, names in os.walk(os.fsencode(ran.root / "photos_masks")) for n in names]
    assert len(written) == len(ran.records) - len(failed) and all(n.endswith(b".png") for n in written)


def test_what_pillow_logs_is_not_said_twice(run, tmp_path, caplog):
    samples = b"\x15\x01\x03\0\x01\0\0\0"             # how many a pixel has: tag, type, count
    data = encode(photo(), "TIFF")
    assert data.count(samples + b"\x03") == 1
    (tmp_path / "many.tif").write_bytes(data.replace(samples + b"\x03", samples + b"\x90"))
    ran = run(tmp_path / "many.tif", "-q")
    assert ran.code == 1 and ran.err.count("\n") == 1 and not caplog.records


def test_smaller_decoding_of_large_jpegs_hardly_changes_the_result(tmp_path, run, weights):
    photo(1600, 1000, seed=5).save(tmp_path / "large.jpg", exif=exif(6))
    assert run(tmp_path / "large.jpg", "--prob").code == 0
    expected = model.predict_prob(model.load_model(weights), model.load_image(tmp_path / "large.jpg"))
    assert expected.shape == (1600, 1000)
    assert np.abs(np.array(Image.open(tmp_path / "large_prob.png")) / 255 - expected).max() < 0.012


# ---------------------------------------------------------------- nothing is lost

def test_two_pictures_that_want_one_mask(run, photos):
    photo(seed=4).save(photos / "a.webp")
    for flags in ([], [], ["--skip-existing"]):           # a mask of an earlier run is no rival
        result = run("photos", *flags)
        assert result.code == 1 and "1 failed" in result.err
        sentence, = [line for line in result.err.splitlines() if "same mask" in line]
        assert "a.jpg" in sentence and "a.webp" in sentence
    assert tree("photos_masks") == ["a.png", "b.png"]


def test_one_file_under_two_names_is_one_picture(run, photos):
    assert "of 1 pictures, 0 failed" in run("photos/a.jpg", "photos/deep/../a.jpg").err


def test_what_no_jpeg_can_hold(run, photos):
    photo(70_000, 2).save("wide.png")
    result = run("wide.png", "--overlay")
    assert (result.code == 1 and "wide_overlay.jpg: 70000x2 is too large" in result.err
            and not Path("wide_mask.png").exists())


@pytest.mark.parametrize("argv", [["photos/b.png", "-o", "photos/b.png"], ["photos/b.png", "-o", "link.png"],
                                  ["photos/b.png", "-o", "folder link/b.png"],
                                  ["photos/b.png", "photos/deep/c.jpg", "-o", "photos"],
                                  ["photos/deep/b.jpg", "photos/b.png", "-o", "photos"]])
def test_an_input_is_never_overwritten(run, photos, argv):
    photo().save(photos / "deep" / "b.jpg")
    Path("link.png").symlink_to("photos/b.png")
    Path("folder link").symlink_to("photos")
    before = (photos / "b.png").read_bytes()
    assert run(*argv).code in (0, 1)
    assert (photos / "b.png").read_bytes() == before


def test_one_bad_among_good(run, photos):
    (photos / "bad.jpg").write_bytes(b"")
    result = run("photos", "photos/missing.jpg", "-o", "m")
    assert result.code == 1 and "2 failed" in result.err and tree("m") == ["a.png", "b.png"]
    assert "photos/missing.jpg: No such file or directory" in result.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_full_or_locked_output_folder(run, photos, monkeypatch, number):
    replace = os.replace

    def fail_once(source, target, failed=[]):
        if not failed:
            failed.append(target)
            raise OSError(number, os.strerror(number), source)
        replace(source, target)
    monkeypatch.setattr(predict.os, "replace", fail_once)
    result = run("photos")
    assert (result.code == 1 and "1 failed" in result.err
            and os.strerror(number) in result.err and "cannot write" in result.err)
    assert len(tree("photos_masks")) == 1     # and no temporary file


def test_output_folder_that_is_a_file(run, photos):
    Path("photos_masks").write_text("in the way")
    result = run("photos")
    assert result.code == 1 and result.err.count("cannot write") == 2


def test_output_that_is_a_folder(run, photos):
    Path("photos_masks/a.png").mkdir(parents=True)
    result = run("photos", "--skip-existing")
    assert (result.code == 1 and "cannot write photos_masks/a.png" in result.err
            and tree("photos_masks") == ["b.png"])


def test_what_is_at_work_at_once_is_bounded_by_pixels(monkeypatch):
    monkeypatch.setattr(predict, "MAX_PIXELS", 10)
    at_work, most, lock = [], [], threading.Lock()

    def work(weight):
        with lock:
            at_work.append(weight)
            most.append((sum(at_work), len(at_work)))
        time.sleep(0.01)
        with lock:
            at_work.remove(weight)
        return weight
    weights = [9, 9, 30, 9, *[2] * 20, 0, 0, 0]
    with ThreadPoolExecutor(8) as pool:
        assert list(predict.ahead(pool, work, weights, 8, lambda weight: weight)) == weights
    assert all(total <= 10 or n == 1 for total, n in most) and max(n for _, n in most) > 2


def test_networks_work_side_by_side_on_the_cpu(run, photos, monkeypatch):
    both, real, inner = threading.Barrier(2, timeout=20), predict.predict_probs, []

    def wait_for_each_other(net, views):
        inner.append(torch.get_num_threads())
        if len(inner) <= 2:
            both.wait()                           # broken, and so an error, where one comes after the other
        return real(net, views)
    monkeypatch.setattr(predict, "predict_probs", wait_for_each_other)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    assert run(photos, "-q").code == 0 and set(inner) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_network_out_of_memory_is_a_sentence(run, photos, monkeypatch):
    def fail(net, images):
        raise RuntimeError("out of memory\nwith details")
    monkeypatch.setattr(predict, "predict_probs", fail)
    result = run("photos")
    assert result.code == 1 and result.err.count("a smaller --size may help: out of memory") == 2


def test_locked_folder_inside(run, photos, monkeypatch):
    scandir = os.scandir

    def locked(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(predict.os, "scandir", locked)
    for flags in ([], ["--skip-existing"]):
        result = run("photos", "-r", *flags)
        assert (result.code == 1 and "photos/deep: Permission denied" in result.err
                and tree("photos_masks") == ["a.png", "b.png"])


def test_a_mac_s_shadow_files_are_no_pictures(run, photos):
    (photos / "._a.jpg").write_bytes(b"a shadow")
    assert run("photos").code == 0 and run("photos/._a.jpg").code == 1    # named, it is tried


def test_folders_may_be_deeper_than_python_recurses(run, photos):
    folders, deep = [], str(photos)
    for _ in range(1100):
        folders.append(deep := f"{deep}/d")
        os.mkdir(deep)
    (photos / "deep" / "c.jpg").rename(f"{deep}/c.jpg")
    result = run("photos", "-r", "--list")
    os.unlink(f"{deep}/c.jpg")                # pytest could not clear them away
    for folder in folders[::-1]:
        os.rmdir(folder)
    assert result.code == 0 and "of 3 pictures, 0 failed" in result.err


def test_heic(run, photos, monkeypatch):
    kinds = {kind: plugin for kind, plugin in Image.OPEN.items() if kind != "HEIF"}
    with monkeypatch.context() as m:          # as where pillow-heif is not installed
        m.setattr(Image, "OPEN", kinds)
        Path("photos/phone.HEIC").write_bytes(b"nothing")
        result = run("photos")
        assert result.code == 1
        assert "photos/phone.HEIC: HEIC is read once pillow-heif is installed" in result.err
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    photo().save("photos/phone.HEIC", "HEIF")
    assert run("photos").code == 0 and mask_of("photos_masks/phone.png").shape == (40, 60)


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "code", "format", "nan", "folder"])
def test_bad_weights_are_one_sentence(run, photos, weights, kind, tmp_path):
    bad = tmp_path / "bad.pt"
    checkpoint = torch.load(weights, weights_only=True)
    if kind == "empty":
        bad.write_bytes(b"")
    elif kind == "cut":
        bad.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "code":
        torch.save({**checkpoint, "args": Planted()}, bad)
    elif kind == "format":
        torch.save({**checkpoint, "format": 99}, bad)
    elif kind == "nan":
        state = {k: v * float("nan") if v.is_floating_point() else v for k, v in checkpoint["model"].items()}
        torch.save({**checkpoint, "model": state}, bad)
    elif kind == "folder":
        bad.mkdir()
    result = run("photos", w=bad)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "bad.pt" in result.err
    assert not Path("planted").exists() and not Path("photos_masks").exists()


def test_ranks_share_the_files(run, photos, monkeypatch):
    for i in range(20):
        photo(20, 20).save(photos / f"{i}.png")
    photo().save(photos / "a.bmp")            # wants the mask of a.jpg: one rank must see both
    monkeypatch.setenv("WORLD_SIZE", "3")
    done, codes = [], []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        result = run("photos", "--json")
        done += [json.loads(line)["input"] for line in result.out.splitlines()]
        codes.append(result.code)
    assert len(done) == len(set(done)) == 23 and sorted(codes) == [0, 0, 1]


def test_torchrun_writes_all_and_fails_at_the_end(photos, weights):
    """torchrun would stop the other ranks as soon as one ends with a failure."""
    for i in range(10):
        photo(20, 20, seed=i).save(photos / f"{i}.png")
    (photos / "bad.jpg").write_bytes(b"")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", ROOT / "predict.py", "photos", "--weights", weights,
                           "--same-mark"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(tree("photos_masks")) == 12, done.stderr
    assert done.stderr.count("of 13 pictures, 1 failed") == 1
    assert done.stderr.count("share a mask: 10 of 20x20\n") == 1           # five of each rank
    assert len({(Path("photos_masks") / f"{i}.png").read_bytes() for i in range(10)}) == 1


# The parent loads everything and runs nothing, so that its children can be forked and killed at once.
KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import predict
net = predict.load_model(sys.argv[2])
predict.load_model = lambda path, device: net
rng = random.Random(0)
for k in range(21):
    child = os.fork()
    if child == 0:
        os._exit(predict.main(["photos", "-q", "--skip-existing", "--device", "cpu"]))
    if k < 20:
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), \
len(os.listdir("photos_masks")) if os.path.isdir("photos_masks") else 0, flush=True)
    for name in os.listdir("photos_masks") if os.path.isdir("photos_masks") else []:
        if name.endswith(".png"):
            predict.Image.open(os.path.join("photos_masks", name)).load()
"""


def test_kill_at_20_moments_then_skip_existing(photos, weights):
    for i in range(80):
        photo(200, 150, seed=i).save(photos / f"{i}.jpg")
    done = subprocess.run([sys.executable, "-c", KILLED, ROOT, weights],
                          capture_output=True, text=True, timeout=300)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 21 and lines[-1][0] == 0, done.stderr
    assert sum(code == -signal.SIGKILL for code, _ in lines) >= 5, lines
    masks = [n for n in tree("photos_masks") if n.endswith(".png")]
    assert len(masks) == 82
    for name in masks:
        mask_of(Path("photos_masks") / name)
    assert all(n.startswith(".") and n.endswith(".tmp") for n in set(tree("photos_masks")) - set(masks))
