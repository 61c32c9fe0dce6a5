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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import model
import predict

ROOT = Path(__file__).parents[1]
SIZE = 64                                     # what the small untrained network looks at


def photo(W=60, H=40, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR))


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tree(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if not p.is_dir())


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def mask_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "L"
    mask = pixels(path)
    assert set(np.unique(mask)) <= {0, 255}
    return mask


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Iterator[Path]:
    """Untrained, small to run, and told apart from 0.5 so that masks hold both marked and unmarked pixels.

    Such a network is never sure. So the tests here, but for one, do without SURE, and share by its threshold.
    """
    torch.manual_seed(0)
    net = model.Segmenter()
    net.model.segmentation_head[0].weight.data *= 0.1     # no prob near 0 or 1
    net.size = SIZE
    net.threshold = float(np.median(model.predict_prob(net.eval(), np.array(photo()))))
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    model.save_checkpoint(model.pack(net), path)
    with pytest.MonkeyPatch.context() as patch:           # it is built once
        patch.setattr(predict, "load_model", functools.lru_cache(predict.load_model))
        patch.setattr(model, "SURE", 0)
        patch.setattr(predict, "SHARED", net.threshold)
        yield path


@pytest.fixture
def run(weights, capsys):
    """run("photos -r") -> code, out, err, as on the command line, and what --json printed, by picture."""
    def call(command):
        try:
            code = predict.main(["--weights", str(weights), "--device", "cpu", *command.split()])
        except SystemExit as e:               # argparse
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = [json.loads(line) for line in out.splitlines()] if "--json" in command else []
        records = {os.path.basename(record["input"]): record for record in lines}
        return SimpleNamespace(code=code, out=out, err=err, records=records)
    return call


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """The current folder holds photos/a.jpg, b.png, deep/c.jpg and two files that no folder run looks at."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    photo(seed=1).save(folder / "a.jpg")
    photo(90, 50, seed=2).save(folder / "b.png")
    photo(seed=3).save(folder / "deep" / "c.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.jpg").write_bytes(b"a Mac's shadow file")
    return folder


def stop(error):
    def function(*_):
        raise error
    return function


# ---------------------------------------------------------------- names, and what goes wrong

@pytest.mark.parametrize("commands, outputs", [
    ("photos/a.jpg", "photos/a_mask.png"), ("photos/a.jpg photos/deep/../a.jpg", "photos/a_mask.png"),
    ("photos/", "photos_masks/a.png photos_masks/b.png"),                 # iopaint pairs by stem
    ("photos/.", "photos_masks/a.png photos_masks/b.png"),
    ("photos -r | photos/deep | photos/a.jpg",                            # one leaves masks in the other's tree
     "photos_masks/a.png photos_masks/b.png photos_masks/deep/c.png photos/deep_masks/c.png photos/a_mask.png"),
    ("photos/[!n]*", "photos/a_mask.png photos/b_mask.png photos/deep_masks/c.png"),
    ("photos/a.jpg -o m.png", "m.png"), ("photos/a.jpg -o m/", "m/a.png"), ("photos/*.jpg -o m/", "m/a.png"),
    ("photos/a.jpg photos/b.png -o m", "m/a.png m/b.png"), ("photos -o m", "m/a.png m/b.png"),
    ("photos photos/deep/c.jpg -o m", "m/a.png m/b.png m/c.png"),
    ("photos -r -o photos/new", "photos/new/a.png photos/new/b.png photos/new/deep/c.png"),
    ("- -o m.png", "m.png"), ("- -o m/", "m/stdin.png"),
    ("photos --prob --overlay", "photos_masks/a.png photos_masks/b.png photos_probs/a.png photos_probs/b.png "
                                "photos_overlays/a.jpg photos_overlays/b.jpg"),
    ("photos/a.jpg -o x.png --prob --overlay", "x.png x_prob.png x_overlay.jpg")])
def test_names_of_outputs(run, photos, monkeypatch, commands, outputs):
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=(photos / "a.jpg").read_bytes))
    monkeypatch.setattr(sys, "stdin", stdin)
    before = set(tree("."))
    for command in commands.split(" | ") * 2:             # the second time, the masks are there
        result = run(f"{command} -q")
        assert result.code == 0 and result.err == ""
    assert set(tree(".")) - before == set(outputs.split())


@pytest.fixture
def troubles(photos, monkeypatch):
    """Beside the photos, what cannot be read or written. Stdin is empty, and 140,000 pixels are the limit."""
    for folder in ("blocked", "twins", "locked/inside", "m/a.png", "empty", "empty.jpg"):
        Path(folder).mkdir(parents=True)
    for name in ("nothing.jpg", "no.mp4", "\udcff.mp4", "phone.HEIC", "blocked_masks"):
        Path(name).touch()
    for name in ("b.jpg", "blocked/a.jpg", "twins/a.jpg", "twins/a.webp", "locked/a.jpg"):
        photo().save(name)
    photo(70_000, 2).save("wide.png")
    photo(70_001, 2).save("over.png")
    Path("link.png").symlink_to("photos/b.png")
    Path("link").symlink_to("photos")
    tag, data = b"\x15\x01\x03\0\x01\0\0\0", encode(photo(), "TIFF")      # how many samples a pixel has
    assert data.count(tag + b"\x03") == 1
    Path("many.tif").write_bytes(data.replace(tag + b"\x03", tag + b"\x90"))
    scandir, denied = os.scandir, stop(PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(os, "scandir", lambda f: (denied if str(f).endswith("inside") else scandir)(f))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    monkeypatch.setattr(model, "MAX_PIXELS", 140_000)
    # as where pillow-heif is not installed
    monkeypatch.setattr(Image, "OPEN", {kind: plugin for kind, plugin in Image.OPEN.items() if kind != "HEIF"})


@pytest.mark.parametrize("command, sentences, written", [
    ("photos photos/none.jpg nothing.jpg -o n",
     "photos/none.jpg: No such file or directory | nothing.jpg: not a picture in a format", "n/a.png n/b.png"),
    ("photos/*.txt", "photos/notes.txt: not a picture in a format that is read", ""),
    ("photos/._a.jpg", "photos/._a.jpg: not a picture in a format that is read", ""),     # named, it is tried
    ("many.tif", "many.tif: ", ""),           # and nothing that Pillow logs
    ("phone.HEIC", "phone.HEIC: HEIC is read once pillow-heif is installed", ""),
    ("no.mp4", "no.mp4: not a video that OpenCV can read", ""),
    ("\udcff.mp4", r"\udcff.mp4: a video's name must be UTF-8: rename it", ""),           # OpenCV crashes
    ("over.png", "over.png: 70001x2 is over the limit of 140000 pixels", ""),
    ("wide.png --overlay", "wide.png: cannot write wide_overlay.jpg: 70000x2 is too large for its format", ""),
    ("- -o n.png", "-: standard input is empty", ""),
    ("locked -r", "locked/inside: Permission denied", "locked_masks/a.png"),
    ("blocked", "blocked/a.jpg: cannot write blocked_masks/a.png: ", ""),                 # the folder is a file
    ("photos -o m", "photos/a.jpg: cannot write m/a.png: ", "m/b.png"),                   # the file is a folder
    ("twins", "twins/a.webp: twins/a.jpg has the same mask, twins_masks/a.png; rename", "twins_masks/a.png"),
    ("photos/b.png -o photos/b.png", "photos/b.png: left alone, since its output would overwrite an input", ""),
    ("photos/b.png -o link.png", "photos/b.png: left alone", ""),
    ("photos/b.png -o link/b.png", "photos/b.png: left alone", ""),
    ("photos/b.png photos/deep/c.jpg -o photos", "photos/b.png: left alone", "photos/c.png"),
    ("b.jpg photos/b.png -o photos", "b.jpg: left alone | photos/b.png: left alone", "")])
def test_a_failure_is_one_sentence_and_changes_no_file(run, troubles, caplog, command, sentences, written):
    before = {name: Path(name).read_bytes() for name in tree(".")}
    for flag in ("", "", "--skip-existing"):  # no mask of an earlier run hides it
        result, expected = run(f"{command} -q {flag}"), sentences.split(" | ")
        lines = result.err.splitlines()
        assert result.code == 1 and len(lines) == len(expected) and not caplog.records
        assert all(line.startswith(f"predict.py: {sentence}") for sentence, line in zip(expected, lines))
        assert set(tree(".")) - set(before) == set(written.split())
        assert all(Path(name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("command, words", [
    ("photos/a.jpg --device cuda:99", "device"), ("photos/a.jpg --threshold 7", "--threshold 7.0 is not"),
    ("photos/a.jpg --size 3", "--size 3"), ("photos/a.jpg --dilate -1", "--dilate -1"),
    ("photos/a.jpg --feather -2", "--feather -2"), ("photos/a.jpg -o m.jpg", ".png"), ("", "required: INPUT"),
    ("photos --list --json", "--json would do nothing"), ("photos --list -o x", "--out would do nothing"),
    ("photos/a.jpg b.jpg -o -", "stdout"), ("photos/a.jpg -", "stdout"), ("photos/a.jpg -o - --json", "stdout"),
    ("- --prob", "stdout"), ("photos -o b.jpg", "is a file"), ("photos -o photos", "mix"),
    ("photos/deep -r -o photos", "mix"), ("empty", "no pictures in empty, -r"),
    ("empty.jpg -r", "no pictures in empty.jpg\n"), ("photos --weights none.pt", "none.pt"),
    ("photos --weights empty", "empty"), ("photos --weights nothing.jpg", "nothing.jpg")])
def test_wrong_usage_is_2_with_a_sentence(run, troubles, command, words):
    before = tree(".")
    result = run(command)
    assert result.code == 2 and words in result.err.splitlines(True)[-1] and tree(".") == before


@pytest.mark.parametrize("place, error, code, sentence, times", [
    (predict, RuntimeError("out of memory\nwith details"), 1, "a smaller --size may help: out of memory\n", 2),
    (predict, KeyboardInterrupt(), 130, "stopped; every mask written so far is whole", 1),
    (os, OSError(errno.ENOSPC, "No space left"), 1, "cannot write photos_masks/b.png: No space left", 1),
    (os, OSError(errno.EROFS, "Read-only"), 1, "cannot write photos_masks/a.png: Read-only", 1)])
def test_a_machine_that_fails_is_a_sentence_too(run, photos, monkeypatch, place, error, code, sentence, times):
    monkeypatch.setattr(place, "replace" if place is os else "predict_probs", stop(error))
    result = run("photos -q")
    assert result.code == code and result.err.count(sentence) == times
    assert not Path("photos_masks").exists() or tree("photos_masks") == []     # and no temporary file


# ---------------------------------------------------------------- stdin, stdout, Ctrl-C

def test_stdout_takes_a_mask_as_png(weights, photos, capfdbinary):
    before = tree(photos)
    done = subprocess.run([sys.executable, ROOT / "predict.py", "-", "--weights", weights],
                          input=(photos / "a.jpg").read_bytes(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert mask_of(io.BytesIO(done.stdout)).shape == (40, 60)
    assert predict.main(["photos/b.png", "-o", "-", "--weights", str(weights)]) == 0
    assert mask_of(io.BytesIO(capfdbinary.readouterr().out)).shape == (50, 90) and tree(photos) == before


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left")])
@pytest.mark.parametrize("flags", ["-o -", "--json", "", "--list --threshold 0"])
def test_closed_stdout_is_no_drama(photos, weights, monkeypatch, flags, error):
    with open("stdout", "w") as gone:
        pipe = SimpleNamespace(write=stop(error), flush=lambda: None, fileno=gone.fileno)
        pipe.buffer = pipe
        monkeypatch.setattr(sys, "stdout", pipe)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = predict.main(["photos/a.jpg", "-q", "--weights", str(weights),
                                 "--device", "cpu", *flags.split()])
    said, is_mask = err.getvalue(), flags == "-o -"
    if error.errno == 32:                         # head leaves early
        assert code == 1 and said == ""
    else:                                         # a mask is a picture that failed; text ends the program
        assert code == (1 if is_mask else 2) and error.strerror in said and said.count("\n") == 1
        assert not (is_mask and "Errno" in said)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
def test_ctrl_c_during_the_imports_just_ends(photos):
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / "predict.py", "photos"],
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:                   # a line per module, torch's own come after cv2
        if line.split()[-1] == "cv2":
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, options, look", [
    ("", {}, model.predict_prob), ("--size 50", {"size": 50}, model.predict_prob),
    ("--threshold 0", {"threshold": 0}, model.predict_prob),
    ("--threshold 1", {"threshold": 1}, model.predict_prob),
    ("--dilate 0", {"dilation": 0}, model.predict_prob),
    ("--dilate 3 --feather 4", {"dilation": 3, "feather": 4}, model.predict_prob),
    ("--tile --size 40", {"tile": True, "size": 40}, predict.tiled_prob),
    ("--tile --size 70", {"tile": True, "size": 70}, model.predict_prob)])     # one window, though less wide
def test_each_flag_and_its_option_in_python(run, photos, weights, flags, options, look):
    net, image = model.load_model(weights), model.load_image("photos/b.png")
    prob = look(net, image, options.get("size", SIZE))
    hard = model.dilate(prob >= options.get("threshold", net.threshold), options.get("dilation", 1))
    outside = cv2.distanceTransform(255 - hard, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    mask = (255 * (1 - outside / (options.get("feather", 0) + 1)).clip(0)).round()        # a soft edge, or none
    record = run(f"photos/b.png --prob --overlay --json {flags}").records["b.png"]
    assert (pixels("photos/b_prob.png") == (prob * 255).round()).all()
    for ours in (pixels("photos/b_mask.png"),
                 predict.predict_mask("photos/b.png", weights, device="cpu", **options)):
        assert ours.dtype == np.uint8 and ours.shape == (50, 90) and (ours == mask).all()
    red = np.where(mask[..., None] > 0, image // 2 + np.uint8((128, 0, 0)), image)
    assert np.abs(pixels("photos/b_overlay.jpg") - red.astype(float)).mean((0, 1)).max() < 10   # JPEG blurs
    assert (record["width"], record["height"], record["mask"]) == (90, 50, "photos/b_mask.png")
    assert record["coverage"] == pytest.approx((hard > 0).mean(), abs=1e-6)
    assert record["max_prob"] == pytest.approx(prob.max(), abs=0.01)
    assert set(record) == {*predict.ENDINGS, *"input width height coverage max_prob boxes".split()}
    assert record["boxes"] == predict.boxes(hard, prob)


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


def test_list_prints_scores_and_names_and_writes_nothing(run, photos, weights):
    (photos / "new\nline.png").write_bytes((photos / "b.png").read_bytes())
    before, net = tree("."), model.load_model(weights)
    result = run("photos -r --list --threshold 0")
    assert result.code == 0 and tree(".") == before
    scores, names = zip(*(line.split("\t") for line in result.out.splitlines()))
    assert set(names) == {"photos/a.jpg", "photos/b.png", "photos/deep/c.jpg", r"photos/new\nline.png"}
    best = max(model.predict_prob(net, model.load_image(name)).max() for name in names if "\\" not in name)
    assert list(scores) == sorted(scores, reverse=True) and float(scores[0]) == pytest.approx(best, abs=0.01)
    assert run("photos --list --threshold 1").out == ""


def test_skip_existing_and_the_summary(run, photos):
    result = run("photos")
    assert result.out == "" and result.err.splitlines()[-1].startswith("predict.py: found marks on ")
    assert result.err.endswith(" of 2 pictures, 0 failed\n")
    Path("photos_masks/a.png").unlink()
    kept = os.stat("photos_masks/b.png").st_mtime_ns
    assert "of 1 pictures, 0 failed, 1 were there already" in run("photos --skip-existing").err
    assert os.stat("photos_masks/b.png").st_mtime_ns == kept and tree("photos_masks") == ["a.png", "b.png"]
    Path("photos_masks/b.png").write_bytes(b"")                           # a power cut leaves such files
    assert "of 1 pictures" in run("photos --skip-existing").err
    assert "of 2 pictures" in run("photos --skip-existing --prob").err
    assert "of 0 pictures, 0 failed, 2 were" in run("photos --skip-existing").err


def test_what_a_user_should_know_is_said_once(run, photos):
    for name in "xy":
        photo().save(photos / f"{name}.jpg", exif=exif(6))
        photo(300, 200).save(photos / f"{name}l.png")
    err = run("photos").err
    assert err.count("--stored") == 1 and "photos/x.jpg is displayed turned" in err
    assert err.count("--tile") == 1 and "xl.png made 3.8 times smaller: marks under about 31 pixels" in err
    assert "--stored" not in run("photos --stored").err and "--tile" not in run("photos --tile").err
    assert len(run("photos/a.jpg").err.splitlines()) == 1 and run("photos -q").err == ""  # the summary


@pytest.mark.parametrize("turn", range(1, 9))
def test_stored_masks_fit_the_pixels_of_the_file(run, photos, turn):
    photo(seed=2).save("turned.jpg", exif=exif(turn), quality=95)
    run("turned.jpg")
    displayed = mask_of("turned_mask.png")
    record = run("turned.jpg --stored --json --overlay --prob").records["turned.jpg"]
    assert record.get("orientation", 1) == turn
    for name in ("turned.jpg", "turned_mask.png", "turned_overlay.jpg", "turned_prob.png"):
        assert Image.open(name).size == (record["width"], record["height"]) == (60, 40)
    stored, box = Image.open("turned_mask.png"), record["boxes"][0]
    columns, rows = slice(box["x"], box["x"] + box["width"]), slice(box["y"], box["y"] + box["height"])
    assert np.array(stored)[rows, columns].any(1).all()
    stored.getexif()[0x0112] = turn
    assert (np.array(ImageOps.exif_transpose(stored)) == displayed).all()


def test_smaller_decoding_hardly_changes_a_large_jpeg_s_result(tmp_path, run, weights):
    noise = np.random.default_rng(0).integers(-60, 60, (1000, 1600, 1))
    image = (np.asarray(photo(1600, 1000, seed=5)) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "large.jpg", exif=exif(6))
    assert run(f"{tmp_path}/large.jpg --prob").code == 0
    mask = mask_of(tmp_path / "large_mask.png")
    assert mask.shape == (1600, 1000) and 0 < mask.mean() < 255
    expected = model.predict_prob(model.load_model(weights), model.load_image(tmp_path / "large.jpg"))
    assert np.abs(pixels(tmp_path / "large_prob.png") / 255 - expected).max() < 0.012
    # nor do the overlay, which needs all pixels, and Python
    assert run(f"{tmp_path}/large.jpg --overlay").code == 0
    assert (mask_of(tmp_path / "large_mask.png") == mask).all()
    assert (predict.predict_mask(tmp_path / "large.jpg", weights, device="cpu") == mask).all()


# ---------------------------------------------------------------- tiles, library use

class Blur:
    """A network that looks 3 pixels far: seen through windows with overlap, nothing may change."""

    mean, size, threshold = torch.zeros(1), SIZE, 0.5

    def __call__(self, x):
        x = torch.nn.functional.pad(x.float().mean(1, keepdim=True) / 64 - 2, (3, 3, 3, 3), mode="replicate")
        return torch.nn.functional.avg_pool2d(x, 7, stride=1)


@pytest.mark.parametrize("H, W", [(64, 64), (40, 200), (200, 65), (177, 301), (1, 300), (300, 2), (70, 999)])
def test_tiles_equal_the_whole(monkeypatch, H, W):
    monkeypatch.setattr(model, "pick_amp", lambda name, device: (None, "exact"))
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    whole, = model.predict_probs(Blur(), [image])
    assert np.abs(predict.tiled_prob(Blur(), image, SIZE) - whole).max() < 1e-5


def test_tiles_of_one_large_picture_show_progress(run, photos, monkeypatch):
    def bar(items, unit, disable, **_):
        bars.append((unit, disable))
        return items
    bar.write = predict.tqdm.write
    monkeypatch.setattr(predict, "tqdm", bar)
    for command, disable in (("photos/b.png", None), ("photos/b.png -q", True), ("photos", True)):
        bars = []
        assert run(f"{command} --tile --size 40").code == 0
        assert {off for unit, off in bars if unit == " windows"} == {disable}


def test_predict_mask_takes_path_array_and_picture(run, photos, weights):
    call = functools.partial(predict.predict_mask, weights=weights, device="cpu")
    assert run("photos/a.jpg -q").out == "photos/a_mask.png\n"
    for source in ("photos/a.jpg", Path("photos/a.jpg"), Image.open("photos/a.jpg"), pixels("photos/a.jpg")):
        assert np.array_equal(call(source), mask_of("photos/a_mask.png"))
    with pytest.raises(ValueError, match="uint8"):
        call(np.zeros((4, 4), np.float32))
    with pytest.raises(OSError):
        call("photos/notes.txt")


def test_threads_that_start_together_read_the_weights_once(photos, weights, monkeypatch, capsys):
    load, calls = predict.load_model, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.2)
        return load(*args)
    monkeypatch.setattr(predict, "load_model", slow)
    predict.network.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        masks = list(pool.map(lambda _: predict.predict_mask("photos/b.png", weights, device="cpu"), range(8)))
    assert len(calls) == 1 and all((mask == masks[0]).all() for mask in masks)
    assert capsys.readouterr().err.count("cpu (asked for)") == 1


# ---------------------------------------------------------------- one mark for many

def shared_mask(names, weights) -> np.ndarray:
    net = model.load_model(weights)
    probs = np.stack([model.predict_prob(net, model.load_image(name)) for name in names])
    return model.to_mask(np.sqrt((probs ** 2).mean(0)), net.threshold)


def test_pictures_of_one_size_share_a_mask(run, photos, weights):
    Path("agency").mkdir()
    group = [f"agency/{i}.png" for i in range(4)]
    for i, name in enumerate(group[:3]):
        photo(seed=10 + i).save(name)
    photo(seed=13).transpose(Image.Transpose.ROTATE_90).save(group[3], exif=exif(6))      # turned
    photo(40, 60, seed=14).save("agency/upright.png")
    Path("agency/broken.png").write_bytes(b"nothing")
    result = run("agency --same-mark --json")
    assert result.code == 1 and "agency/broken.png: " in result.err
    assert "pictures that share a mask: 4 of 60x40\n" in result.err
    masks = [mask_of(f"agency_masks/{i}.png") for i in range(4)]
    assert all((mask == masks[0]).all() for mask in masks) and 0 < masks[0].mean() < 255
    assert (masks[0] != shared_mask(group, weights)).mean() < 0.01        # resized after the mean, not before
    assert [result.records[f"{name}.png"]["group"] for name in (0, 1, 2, 3, "upright")] == [4, 4, 4, 4, 1]
    assert result.records["0.png"]["boxes"] == result.records["3.png"]["boxes"]
    assert run("agency/upright.png").code == 0            # a group of one is a single picture
    assert (mask_of("agency_masks/upright.png") == mask_of("agency/upright_mask.png")).all()
    assert "none, each has a size of its own" in run("photos --same-mark").err
    # one that is missing is made from the whole group
    Path("agency/broken.png").unlink()
    Path("agency_masks/1.png").unlink()
    kept = os.stat("agency_masks/0.png").st_mtime_ns
    again = "agency --same-mark --skip-existing"
    assert "of 1 pictures, 0 failed, 4 were there already" in run(again).err
    assert os.stat("agency_masks/0.png").st_mtime_ns == kept
    assert (mask_of("agency_masks/1.png") == masks[0]).all() and "of 0 pictures" in run(again).err


def test_what_many_show_needs_no_sure_pixel(run, photos, monkeypatch):
    monkeypatch.setattr(model, "SURE", 0.98)
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (60, 40))
    for _ in range(3):
        writer.write(cv2.cvtColor(np.array(photo()), cv2.COLOR_RGB2BGR))
    writer.release()
    assert "found marks on 0 of 2" in run("photos").err and run("photos --list").out == ""
    assert "found marks on 2 of 2" in run("photos -o shared --same-mark").err
    assert "found marks on 1 of 1" in run("clip.avi").err
    monkeypatch.setattr(predict, "SHARED", 0.5)                        # no prob of this network is so high
    assert "found marks on 0 of 2" in run("photos -o none --same-mark").err
    assert "found marks on 0 of 1" in run("clip.avi -o none.png").err
    assert "found marks on 2 of 2" in run("photos -o all --same-mark --threshold 0.01").err


def test_a_video_is_a_group_of_its_frames(run, photos, weights, monkeypatch):
    clip, short = [photo(seed=k // 30) for k in range(90)], [photo()] * 3
    for name, frames in (("photos/clip.avi", clip), ("short.avi", short)):
        writer = cv2.VideoWriter(name, cv2.VideoWriter_fourcc(*"MJPG"), 10, (60, 40))
        for frame in frames:
            writer.write(np.array(frame)[..., ::-1])
        writer.release()
    looks, real = [], predict.predict_probs
    monkeypatch.setattr(predict, "FRAMES", 12)
    monkeypatch.setattr(predict, "predict_probs", lambda net, views: looks.append(views) or real(net, views))
    assert run("photos/clip.avi --overlay").out == "photos/clip_mask.png\n"
    assert len(looks) == predict.FRAMES and pixels("photos/clip_overlay.jpg").shape == (40, 60, 3)
    for k in range(3):
        photo(seed=k).save(f"{k}.png")
    expected = shared_mask(["0.png", "1.png", "2.png"], weights)
    assert (mask_of("photos/clip_mask.png") != expected).mean() < 0.1     # a video's frames lose detail
    looks.clear()
    assert run("short.avi").code == 0 and len(looks) == 3
    assert run("photos -o m").code == 0 and tree("m") == ["a.png", "b.png"]
    looks.clear()
    assert run("photos -o m --same-mark --tile --size 40").code == 0
    assert tree("m") == ["a.png", "b.png", "clip.png"] and len(looks) == 2 + 6 + 12 * 2   # windows
    Path("m/a.png").unlink()
    looks.clear()                             # nothing depends on the video
    assert run("photos -o m --same-mark --skip-existing").code == 0 and len(looks) == 2


def test_a_video_that_does_not_know_its_length_gives_a_frame_a_second(monkeypatch):
    at = []
    unfinished = SimpleNamespace(get=lambda what: -9.2e18, set=lambda what, k: at.append(k),
                                 read=lambda: (at[-1] < 90, np.full((4, 4, 3), at[-1])))
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: unfinished)
    assert [int(frame[0, 0, 0]) for frame in predict.frames("x.webm")] == [0, 30, 60]


# ---------------------------------------------------------------- a corpus of awkward pictures

def corpus() -> dict[str, tuple[bytes, tuple[int, int] | str]]:
    """name -> (content, size (W, H) of the mask, "fails", or "either" where Pillow versions differ)."""
    base, jpg, size, turned = photo(), encode(photo(), "JPEG", quality=90), (60, 40), (40, 60)
    png, dds, large = encode(base, "PNG"), encode(base, "DDS"), encode(photo(700, 500), "JPEG")
    palette, grey = base.convert("P"), np.array(base.convert("L"), np.float32)
    header = png[12:16] + struct.pack(">II", 100_000, 100_000) + png[24:29]
    moving = {"save_all": True, "append_images": [photo(seed=9), photo(seed=8)]}
    rare = [kind for kind, name in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(name)]
    rare += [kind for kind in ("HEIF",) if kind in Image.OPEN]
    files = {}

    def add(expected, contents):
        files.update({name: (content, expected) for name, content in contents.items()})

    # damaged
    for tenth in range(10):
        add("fails", {f"cut{tenth}.jpg": jpg[:len(jpg) * tenth // 10],
                      f"cut{tenth}-large.jpg": large[:len(large) * tenth // 10]})
    for kind, length in (("WEBP", 100), ("TIFF", 3000), ("BMP", 300), *[("AVIF", -200)] * ("AVIF" in rare)):
        add("fails", {f"cut-{kind}.{kind}": encode(base, kind)[:length]})
    for ending in ("bmp", "gif", "ico", "j2k", "sgi", "tga", "webp", "heic", "pcx", "ppm", "icns", "dds"):
        add("fails", {f"noise-{ending}.{ending}": np.random.default_rng(1).bytes(400)})
    add("fails", {
        "cut-PNG.png": png[:len(png) // 2], "crc-a.png": png[:29] + bytes(4) + png[33:],
        "no-format.dds": dds[:80] + bytes(4) + dds[84:],                  # flags of the pixel format
        "text.jpg": b"I am a text file\n", "page.png": b"<!doctype html><html></html>",
        "zip.jpg": b"PK\x03\x04" + bytes(100),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n"})
    add("either", {"crc-b.png": png[:-16] + bytes(4) + png[-12:], "cut-GIF.gif": encode(base, "GIF")[:300]})
    add(size, {"tail.jpg": jpg + b"rubbish after the end"})
    # claims to be huge
    bmp = struct.pack("<IIIIiiHH", 200, 0, 54, 40, 90_000, 90_000, 1, 24)
    add("fails", {"bomb-a.png": png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:],
                  "bomb-b.bmp": b"BM" + bmp + bytes(100),
                  "bomb-c.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(30)})
    # shapes
    for W, H in ((1, 1), (2, 2), (1, 5000), (5000, 1), (31, 33), (129, 128), (40_000, 2)):
        add((W, H), {f"{W}x{H}.png": encode(photo(W, H), "PNG")})
    for W, H in ((1, 5000), (1000, 999), (1001, 640)):
        add((W, H), {f"{W}x{H}-b.jpg": encode(photo(W, H), "JPEG")})
    # pixel formats
    for mode in ("1", "L", "LA", "P", "RGBA"):
        add(size, {f"mode {mode}.png": encode(base.convert(mode), "PNG")})
    for kind, modes in {"JPEG": ("CMYK", "L"), "TIFF": ("CMYK", "L", "I", "LAB")}.items():
        add(size, {f"mode {mode}-{kind}.{kind}": encode(base.convert(mode), kind) for mode in modes})
    add(size, {
        "grey16.png": encode(base.convert("L").convert("I;16"), "PNG"),
        "grey16-b.tif": encode(Image.fromarray((grey * 257).astype(np.uint16)), "TIFF"),
        "float.tif": encode(Image.fromarray(grey / 255), "TIFF"),
        "float-nan.tif": encode(Image.fromarray(np.where(grey > 100, np.nan, grey * 1e9)), "TIFF"),
        "rgb16.png": cv2.imencode(".png", np.array(base).astype(np.uint16) * 257)[1].tobytes(),
        "transparent-b.gif": encode(palette, "GIF", transparency=0),
        "transparent.png": encode(palette, "PNG", transparency=bytes(range(256))),
        "progressive.jpg": encode(base, "JPEG", progressive=True)})
    # file formats, the first frame of those that move
    for kind in ("BMP", "PPM", "TGA", "PCX", "SGI", "DDS", "WEBP", *rare):
        ending = {"JPEG2000": "jp2", "HEIF": "HEIC"}.get(kind, kind.lower())
        add(size, {f"kind {kind}.{ending}": encode(base, kind)})
    for kind, ending in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif"), ("MPO", "mpo")):
        add(size, {f"moving {kind}.{ending}": encode(base, kind, **moving)})
    # what cameras and editors attach
    for turn in (1, 2, 3, 4, 5, 6, 7, 8, 99):
        add(turned if 5 <= turn <= 8 else size, {f"exif{turn}.jpg": encode(base, "JPEG", exif=exif(turn))})
    add((500, 700), {"exif6-large.jpg": encode(photo(700, 500), "JPEG", exif=exif(6))})
    add((999, 1000), {"exif8-almost-square.jpg": encode(photo(1000, 999), "JPEG", exif=exif(8))})
    add(turned, {f"exif6-{kind}.{kind}": encode(base, kind, exif=exif(6)) for kind in ("PNG", "WEBP")})
    add("either", {"exif6-d.tif": encode(base, "TIFF", exif=exif(6))})
    add(size, {"exif-garbage.jpg": encode(base, "JPEG", exif=b"Exif\0\0II*\0" + bytes(range(200))),
               "exif-garbage-b.png": encode(base, "PNG", exif=b"Exif\0\0MM\0*" + b"\xff" * 50),
               "icc-garbage.jpg": encode(base, "JPEG", icc_profile=bytes(range(256))),
               "icc-garbage-b.png": encode(base, "PNG", icc_profile=b"no profile")})
    # names
    for name in ("with space", "quote's", 'double"', "new\nline", "émoji 🎈", "-dash", "100%s", "a.b.c",
                 "[1]", "back\\slash", "$HOME", "x" * 251, "latin1-\udce9\udcff"):
        add(size, {f"{name}.jpg": jpg})
    add(size, {"UPPER.JPG": jpg})
    add("fails", {"bad new\nline.jpg": b"", "bad latin1-\udce9.jpg": b""})
    # no files, or no plain ones: the test makes them
    add("fails", {"broken link.jpg": None, "circle.jpg": None})
    add(size, {"good link.jpg": None})
    add("either", {"locked.jpg": None})       # root may read it
    return files


def test_a_mask_or_one_sentence_for_each_file(run, tmp_path):
    photos, files = tmp_path / "photos", corpus()
    (photos / "a folder.jpg").mkdir(parents=True)         # neither it nor what is inside is wanted
    photo().save(photos / "a folder.jpg" / "inside.jpg")
    for name, (content, _) in files.items():
        if content is not None:
            (photos / name).write_bytes(content)
    for name, target in {"broken link": "nowhere", "circle": "circle", "good link": "tail"}.items():
        (photos / f"{name}.jpg").symlink_to(f"{target}.jpg")
    photo().save(photos / "locked.jpg")
    (photos / "locked.jpg").chmod(0)
    predict.network.cache_clear()
    result = run(f"{photos} --json")
    assert result.code == 1 and set(result.records) == set(files)
    lines, masks = result.err.splitlines(), set()
    for name, (_, expected) in files.items():
        record, mask = result.records[name], f"{os.path.splitext(name)[0]}.png"
        sentences = [line for line in lines if f"/{predict.printable(name)}: " in line]
        if expected == "fails" or expected == "either" and "error" in record:
            assert len(sentences) == 1 and len(record["error"]) < 200, name
            # no class of Python's, and no other picture's fault
            assert "Error" not in record["error"] and "same mask" not in record["error"], name
        else:
            masks.add(mask)
            shape, size = mask_of(tmp_path / "photos_masks" / mask).shape, (record["width"], record["height"])
            assert not sentences and shape[::-1] == size and expected in (size, "either"), name
    assert set(tree(tmp_path / "photos_masks")) == masks
    # a sentence each, the device, the summary, and what is said once: of large and of turned ones
    failed = len(files) - len(masks)
    assert len(lines) == failed + 4 and lines[-1].endswith(f" of {len(files)} pictures, {failed} failed")


def test_folders_may_be_deeper_than_python_recurses(run, photos):
    deep = [f"{photos}{'/d' * n}" for n in range(1, 1101)]
    for folder in deep:
        os.mkdir(folder)
    (photos / "deep" / "c.jpg").rename(f"{deep[-1]}/c.jpg")
    result = run("photos -r --list")
    os.unlink(f"{deep[-1]}/c.jpg")            # pytest could not clear them away
    for folder in deep[::-1]:
        os.rmdir(folder)
    assert result.code == 0 and "of 3 pictures, 0 failed" in result.err


# ---------------------------------------------------------------- side by side, and killed

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
        both.wait()                               # broken, and so an error, where one comes after the other
        return real(net, views)
    monkeypatch.setattr(predict, "predict_probs", wait_for_each_other)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    assert run("photos -q").code == 0 and inner == [1, 1] and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_ranks_share_the_files_and_fail_together(photos, weights):
    """torchrun would stop the other ranks as soon as one ends with a failure."""
    for i in range(10):
        photo(20, 20, seed=i).save(photos / f"{i}.png")
    photo().save(photos / "a.bmp")            # wants the mask of a.jpg, which another rank has
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    threshold = str(model.load_checkpoint(weights)["threshold"])
    predicts = [ROOT / "predict.py", "photos", "--weights", weights, "--same-mark", "--json",
                "--threshold", threshold]
    done = subprocess.run([*torchrun, *predicts], capture_output=True, text=True, timeout=300)
    masks = [f"{i}.png" for i in range(10)]
    assert done.returncode == 1 and tree("photos_masks") == [*masks, "a.png", "b.png"], done.stderr
    assert done.stderr.count("of 13 pictures, 1 failed") == 1
    assert done.stderr.count("share a mask: 10 of 20x20\n") == 1           # five of each rank
    inputs = [json.loads(line)["input"] for line in done.stdout.splitlines()]            # each once
    assert sorted(inputs) == [f"photos/{name}" for name in (*masks, "a.bmp", "a.jpg", "b.png")]
    shared = {Path(f"photos_masks/{name}").read_bytes() for name in masks}
    expected = shared_mask([photos / name for name in masks], weights)
    assert len(shared) == 1 and (mask_of("photos_masks/0.png") != expected).mean() < 0.01


# The parent loads everything and runs nothing, so that its children can be forked and killed at once.
KILLED = """
import glob, os, random, signal, sys, time
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
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    for name in glob.glob("photos_masks/*.png"):
        predict.Image.open(name).load()
"""


def test_kill_at_20_moments_then_skip_existing(photos, weights):
    for i in range(80):
        photo(200, 150, seed=i).save(photos / f"{i}.jpg")
    done = subprocess.run([sys.executable, "-c", KILLED, ROOT, weights],
                          capture_output=True, text=True, timeout=300)
    codes = [int(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(codes) == 21 and codes[-1] == 0, done.stderr
    assert codes.count(-signal.SIGKILL) >= 5, codes
    masks = [name for name in tree("photos_masks") if name.endswith(".png")]
    assert len(masks) == 82 and all(mask_of(f"photos_masks/{name}").size for name in masks)
    left = set(tree("photos_masks")) - set(masks)
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
