import math
import os
import pickle
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import model
from conftest import ROOT
from model import (build, default_dilation, dilate, fit, from_checkpoint, fuse_batchnorm, load_checkpoint,
                   load_image, load_model, old_probs, pack, pick_amp, pick_device, predict_prob,
                   predict_probs, resize_prob, save_checkpoint)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build().eval()


@pytest.fixture
def saved(net, tmp_path):
    save_checkpoint(pack(net), tmp_path / "w.pt")
    return tmp_path / "w.pt"


# ---------------------------------------------------------------- network

@pytest.mark.parametrize("H, W", [(1, 1), (1, 70), (33, 64), (64, 64), (100, 45)])
def test_any_size_in_the_same_size_out(net, H, W):
    with torch.no_grad():
        logits = net(torch.zeros(2, 3, H, W, dtype=torch.uint8))
    assert logits.shape == (2, 1, H, W) and torch.isfinite(logits).all()


def test_the_network_is_smps_own(net):
    import segmentation_models_pytorch as smp
    theirs = smp.create_model("unet", model.ENCODER, encoder_weights=None, in_channels=3, classes=1)
    assert str(net.model) == str(theirs) and type(net.model) is type(theirs)
    assert sum(p.numel() for p in net.parameters()) < 6e6


def test_normalisation_is_inside(net):
    seen = []
    handle = net.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    handle.remove()
    expected = (1 - torch.tensor(model.IMAGENET_MEAN)) / torch.tensor(model.IMAGENET_STD)
    assert torch.allclose(seen[0][0, :, 0, 0], expected)


def test_a_fresh_network_expects_the_base_rate(net):
    image = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    mask = (torch.rand(4, 1, 64, 64) < model.PRIOR).float()
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy_with_logits(build().train()(image), mask)
    entropy = -(model.PRIOR * math.log(model.PRIOR) + (1 - model.PRIOR) * math.log(1 - model.PRIOR))
    assert abs(loss - entropy) < 0.1


@pytest.mark.parametrize("arch, encoder", [
    ("unet", model.ENCODER), ("unet", "mobilenet_v2"), ("unet", "tu-mobilenetv3_small_050"),
    ("fpn", "resnet18"), ("deeplabv3plus", "efficientnet-b0"), ("segformer", "mit_b0"),
    ("upernet", "tu-regnety_002")])
def test_fused_batchnorm_changes_nothing(arch, encoder):
    torch.manual_seed(0)
    image, net = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8), build(arch, encoder)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:                                                # statistics that do something
        m.running_mean.uniform_(-0.1, 0.1)
        m.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        before = net.eval()(image)
        assert (fuse_batchnorm(net)(image) - before).abs().max() < 1e-3 * before.abs().max()
    left = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) < len(norms) and not (left and arch == "unet")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch, model
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.empty(50_000_000, dtype=torch.uint8).fill_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        default = faults()
        model.keep_freed_memory()
        faults()
        assert faults() < default / 10, (default, faults())"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


ARCHS = ["unet", "unetplusplus", "fpn", "linknet", "manet", "pspnet", "deeplabv3plus", "segformer"]


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0"])
@pytest.mark.parametrize("arch", ARCHS)
def test_smp_architectures_and_encoders(arch, encoder):
    if encoder == "mit_b0" and arch in ("unetplusplus", "linknet"):
        with pytest.raises(ValueError, match="cannot build"):        # smp says so itself
            build(arch, encoder)
        return
    net = build(arch, encoder).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = [p.clone() for p in net.parameters()]
    net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))


@pytest.mark.parametrize("kwargs, words", [({"arch": "unett"}, ["unett", "deeplabv3plus"]),
                                           ({"encoder": "resnet17"}, ["resnet17", "resnet18", "tu-"]),
                                           ({"encoder": "tu-hf-hub:timm/resnet18"}, ["unknown encoder"])])
def test_a_typo_lists_what_exists(kwargs, words):
    with pytest.raises(ValueError) as e:
        build(**kwargs)
    assert all(word in str(e.value) for word in words)


def test_encoder_weights_from_a_file(net, tmp_path):
    state = {k: torch.full_like(v, 0.01) for k, v in net.model.encoder.state_dict().items()}
    torch.save({**state, "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)},
               tmp_path / "encoder.pt")
    loaded = build(encoder_weights=str(tmp_path / "encoder.pt"))
    assert all((v == 0.01).all() for v in loaded.model.encoder.state_dict().values() if v.is_floating_point())
    assert loaded.mean.flatten().tolist() == [0.5] * 3 and loaded.std.flatten().tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="encoder.pt does not hold the weights of encoder resnet18"):
        build("unet", "resnet18", str(tmp_path / "encoder.pt"))


def test_no_network_is_one_sentence_within_five_seconds(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr(model.urllib.request, "urlopen", unreachable)
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="--encoder-weights none.*--encoder-weights FILE") as e:
        build("unet", "resnet34", "imagenet")
    assert time.monotonic() - begin < 5 and "\n" not in str(e.value)


# ---------------------------------------------------------------- device and precision

def test_device_and_precision_give_their_reasons():
    device, why = pick_device("cpu")
    assert device.type == "cpu" and why == "asked for"
    assert pick_device("auto")[1].endswith("found")
    with pytest.raises(ValueError, match="'tpu9' is not there"):
        pick_device("tpu9")
    assert pick_amp("off", device)[0] is None and pick_amp("bf16", device)[0] is torch.bfloat16
    assert pick_amp("fp16", device)[0] is torch.float16
    dtype, why = pick_amp("auto", device)
    assert (dtype is torch.bfloat16) == model.has_cpu_bf16() and "CPU" in why or "cpu" in why
    assert pick_amp("auto", torch.device("mps"))[0] is None


@pytest.mark.parametrize("amx, avx, name, pays", [
    (True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False),
    (False, True, "AuthenticAMD", True), (False, True, "", True), (False, False, "AuthenticAMD", False)])
def test_bf16_on_the_cpu_only_where_it_pays(monkeypatch, amx, avx, name, pays):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(model, "cpu_name", lambda: f"vendor_id: {name}")
    assert pick_amp("auto", torch.device("cpu"))[0] == (torch.bfloat16 if pays else None)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")               # oneDNN emulates bf16 then
    assert pick_amp("auto", torch.device("cpu"))[0] is None


# ---------------------------------------------------------------- image in, mask out

def test_images_of_every_mode(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    cases = {"grey": (Image.fromarray(grey), grey), "palette": (Image.fromarray(grey).convert("P"), grey),
             "bilevel": (Image.fromarray(grey > 99), (grey > 99) * 255),
             "16 bit": (Image.fromarray(grey.astype(np.uint16) * 257), grey),
             "float": (Image.fromarray(grey.astype(np.float32) / 255), grey),
             "transparent": (Image.merge("LA", [Image.new("L", (8, 6), 0), Image.fromarray(grey)]),
                             255 - grey),
             "cmyk": (Image.new("CMYK", (8, 6)), np.full((6, 8), 255))}
    for name, (image, expected) in cases.items():
        got = load_image(image)
        assert got.shape == (6, 8, 3) and got.dtype == np.uint8, name
        assert np.abs(got[..., 0].astype(int) - expected).max() <= 1, name
    array = np.zeros((2, 3, 3), np.uint8)
    assert load_image(array) is array
    with pytest.raises(ValueError, match="uint8 array"):
        load_image(np.zeros((2, 3), np.uint8))


def test_exif_is_applied_and_its_garbage_ignored(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (20, 10)).save(tmp_path / "t.jpg", exif=exif)
        assert load_image(tmp_path / "t.jpg").shape[:2] == ((10, 20) if orientation < 5 else (20, 10))
    Image.new("RGB", (20, 10)).save(tmp_path / "g.jpg", exif=b"Exif\0\0garbage")
    assert load_image(tmp_path / "g.jpg").shape == (10, 20, 3)


def test_a_bomb_is_refused_and_a_broken_file_is_an_oserror(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "a.png")
    with monkeypatch.context() as m:
        m.setattr(model, "MAX_PIXELS", 1000)
        with pytest.raises(ValueError, match="300x300 is over the limit of 1000 pixels"):
            load_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(OSError):
        load_image(tmp_path / "a.png")


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
def test_postscript_starts_no_program_and_a_pipe_does_not_block(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    Image.new("RGB", (20, 10)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(OSError, match="not a picture in a format that is read"):
        load_image(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        load_image(tmp_path / "pipe.jpg")


def test_fit_and_resize_back():
    image = np.zeros((300, 1000, 3), np.uint8)
    assert fit(image, 274).shape == (150, 500, 3) and fit(image, 548) is image and fit(image, 2000) is image
    assert fit(image[:, :400], 512).shape == fit(image[:, :400], 1024).shape == (443, 591, 3)  # 512 x 512 pixels
    assert fit(np.zeros((1, 5000, 3), np.uint8), 512).shape == (1, 2048, 3)         # as one of 16 : 1
    assert fit(image[:100, :90], 512).shape == (150, 135, 3)                        # and no further
    assert fit(image[:150, :500], 274, (300, 1000)).shape == (150, 500, 3)          # decoded at half its size
    full = np.zeros((1024, 3400, 3), np.uint8)
    assert fit(image[:151, :501], 512, (1024, 3400)).shape == fit(full, 512).shape
    assert fit(image[:100, :90], 95).shape == (100, 90, 3)                          # never beyond what is asked
    assert resize_prob(np.ones((150, 500), np.float32), 300, 1000).shape == (300, 1000)


def test_predict_is_batch_independent(saved, monkeypatch):
    monkeypatch.setattr(model, "pick_amp", lambda *a: (None, ""))    # an untrained network magnifies bf16's
    net = load_model(saved)
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(3)]
    together = predict_probs(net, images)
    for image, prob in zip(images, together):
        alone, = predict_probs(net, [image])
        assert alone.shape == (40, 50) and alone.dtype == np.float32 and 0 <= alone.min() <= alone.max() <= 1
        assert np.abs(alone - prob).max() < 1e-3


def test_dilation_is_rounds_of_the_cross():
    rng = np.random.default_rng(0)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for radius in (0, 1, 3, 10):
        mask = (rng.random((60, 80)) > 0.99).astype(np.uint8)
        assert np.array_equal(dilate(mask, radius), cv2.dilate(mask, cross, iterations=radius) * 255)
    assert not dilate(np.zeros((5, 5), np.uint8), 3).any()
    assert (default_dilation(300, 512) == 3 and default_dilation(3000, 4096) == 24
            and default_dilation(8, 8) == 1)


# ---------------------------------------------------------------- checkpoint file

def test_round_trip(net, saved):
    checkpoint = torch.load(saved, weights_only=True)                # plain data
    assert {*model.NETWORK, *model.RUN} == set(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(
        net.state_dict().values(), from_checkpoint(load_checkpoint(saved)).state_dict().values()))


def test_averaged_weights_are_preferred(net, tmp_path):
    ema = {k: torch.full_like(v, 0.5) for k, v in net.state_dict().items()}
    save_checkpoint(pack(net, ema=ema), tmp_path / "w.pt")
    assert (from_checkpoint(load_checkpoint(tmp_path / "w.pt"))
            .model.segmentation_head[0].weight == 0.5).all()


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/evil-was-here", "w"))


def test_bad_weights_are_one_sentence_each(net, saved, tmp_path):
    bad = tmp_path / "bad.pt"
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_model(bad)
    bad.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(ValueError, match="no complete weights file|refused"):
        load_model(bad)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="no complete weights file"):
        load_model(bad)
    bad.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        load_model(bad)
    torch.save({"arch": Evil()}, bad)
    with pytest.raises(ValueError, match="refused"):
        load_model(bad)
    torch.save(pack(net) | {"format": 99}, bad)
    with pytest.raises(ValueError, match="format 99"):
        load_model(bad)
    torch.save(pack(net) | {"encoder": "resnet18"}, bad)
    with pytest.raises(ValueError, match="do not fit"):
        load_model(bad)
    torch.save(pack(net, model={k: v * float("nan") if v.is_floating_point() else v
                                for k, v in net.state_dict().items()}), bad)
    with pytest.raises(ValueError, match="not finite"):
        load_model(bad)
    flipped = bytearray(saved.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    bad.write_bytes(flipped)
    with pytest.raises(ValueError, match="a tensor in it is damaged"):
        load_model(bad)


@pytest.mark.parametrize("change", [
    {"model": 1}, {"encoder": 3}, {"encoder": ["x"]}, {"encoder": "x" * 10**6}, {"encoder": "\x1b[2J\n"},
    {"encoder": "tu-hf-hub:timm/resnet18"}, {"arch": "dpt"}, {"size": 10**9}, {"size": 0.5},
    {"threshold": math.nan}, {"threshold": math.inf}, {"threshold": -0.5}, {"threshold": 0.0},
    {"options": {"subpixel": True, "residuals": [10**6]}}, {"options": {"residuals": 3, "subpixel": 1}},
    {"options": {"decoder_channels": [10**9] * 5}}, {"options": {"checkpoint_path": "x"}}, {"options": {3: 4}},
    {"step": "7"}, {"ema": [1]}, {"encoder": "timm-efficientnet-l2"}], ids=lambda change: str(change)[:40])
def test_an_odd_checkpoint_is_one_short_sentence_at_once(change, net, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("it asks the network"))
    torch.save(pack(net) | change, tmp_path / "odd.pt")
    built, real = [], model.smp.create_model
    monkeypatch.setattr(model.smp, "create_model", lambda *a, **k: built.append(real(*a, **k)) or built[-1])
    with pytest.raises(ValueError) as e:
        load_model(tmp_path / "odd.pt")
    said = model.first_line(e.value)
    assert len(said) <= 300 and said.isprintable() and "odd.pt" in said
    if change.get("encoder") == "timm-efficientnet-l2":                   # a name alone takes no memory
        assert all(next(network.parameters()).is_meta for network in built)


def test_a_network_that_cannot_run_is_the_files_fault(saved, monkeypatch):
    monkeypatch.setattr(model.Segmenter, "forward", lambda *_: torch.zeros(1, 2) @ torch.zeros(3, 4))
    with pytest.raises(ValueError, match="w.pt: unet on .* cannot look at a picture: mat1 and mat2"):
        load_model(saved)


def test_a_full_disk_keeps_the_old_checkpoint(net, saved, monkeypatch):
    before = saved.read_bytes()

    def fails_half_way(checkpoint, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError):
        save_checkpoint(pack(net), saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["w.pt"]


def test_no_link_is_written_through(net, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("w.pt", "w.pt.tmp"):
        (tmp_path / name).symlink_to("mine")
    save_checkpoint(pack(net), tmp_path / "w.pt")
    assert (tmp_path / "mine").read_text() == "mine" and load_checkpoint(tmp_path / "w.pt")


# ---------------------------------------------------------------- one way out

@pytest.mark.parametrize("error, code, text", [
    (ValueError("x\x1b[2Jy\nand more" + "z" * 10**6), 2, r"x\x1b[2Jy"),
    (ValueError("z" * 10**6), 2, "z" * 300),
    (FileNotFoundError(2, "No such file", "a"), 2, "[Errno 2] No such file: 'a'"),
    (OSError(28, "No space left"), 1, "cannot write: No space left"),
    (BrokenPipeError(32, "Broken pipe"), 1, None),
    (MemoryError(), 2, "MemoryError"), (KeyboardInterrupt(), 130, "stopped before the end"),
    (RuntimeError("CUDA out of memory. Tried ..."), 2, "CUDA out of memory. Tried ... Did memory run out?"),
    (RuntimeError("DataLoader worker (pid 7) is killed."), 2,
     "DataLoader worker (pid 7) is killed. Did memory run out?")])
def test_an_error_is_one_sentence_and_a_code(error, code, text, capsys):
    def main(argv):
        raise error
    assert model.one_way_out(main)() == code
    assert capsys.readouterr().err == (f"test_model.py: {text}\n" if text else "")


def test_a_fault_of_the_program_keeps_its_traceback():
    def main(argv):
        raise RuntimeError("mat1 and mat2")
    with pytest.raises(RuntimeError):
        model.one_way_out(main)()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has one")
@pytest.mark.parametrize("closed, code, text", [("stdout", 1, "standard output is closed"), ("stdin", 0, ""),
                                                ("full", 1, "cannot write: No space left on device")])
def test_closed_and_full_streams(closed, code, text, capsys, monkeypatch):
    def main(argv):
        print("x" * 99)
        return len(sys.stdin.read()) if closed == "stdin" else 0
    stream = open("/dev/full", "w") if closed == "full" else None
    monkeypatch.setattr(sys, closed.replace("full", "stdout"), stream)
    assert model.one_way_out(main)() == code
    if closed == "full":
        sys.stdout.close()                        # as Python does at its end: nothing is left to fail
    assert capsys.readouterr().err == (f"test_model.py: {text}\n" if text else "")



def test_export_is_half_the_size_and_holds_the_same(net, tmp_path, capsys):
    save_checkpoint(pack(net, ema=net.state_dict(), optimizer={"big": torch.zeros(10**6)}),
                    tmp_path / "best.pt")
    monkey = ["export", str(tmp_path / "best.pt"), str(tmp_path / "out.pt")]
    assert run(monkey) == 0 and "MB" in capsys.readouterr().out
    assert ((tmp_path / "out.pt").stat().st_size < 13e6
            and load_checkpoint(tmp_path / "out.pt")["optimizer"] is None)
    a, b = (from_checkpoint(load_checkpoint(tmp_path / f)).state_dict() for f in ("best.pt", "out.pt"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-6) for k in a)


def run(argv):
    import sys
    old, sys.argv = sys.argv, ["model.py", *argv]
    try:
        return model.main()
    finally:
        sys.argv = old


def test_onnx_says_what_torch_says(saved, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "onnx", None)                         # as where it is not installed
        assert run(["export", "--onnx", str(saved), str(tmp_path / "w.onnx")]) == 2
        assert "pip install onnx" in capsys.readouterr().err and not list(tmp_path.glob("*onnx*"))
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    assert run(["export", "--onnx", str(saved), str(tmp_path / "w.onnx")]) == 0
    net = load_model(saved)
    props = {p.key: p.value for p in onnx.load(tmp_path / "w.onnx").metadata_props}
    assert props == {"size": str(net.size), "threshold": str(net.threshold)}
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(tmp_path / "w.onnx", providers=["CPUExecutionProvider"])
    for B, H, W in ((1, 64, 96), (2, 50, 33), (1, 7, 130)):
        image = np.random.default_rng(H).integers(0, 256, (B, H, W, 3), np.uint8)
        prob, = session.run(["prob"], {"image": image})
        with torch.inference_mode():
            expected = net(torch.from_numpy(image).permute(0, 3, 1, 2)).sigmoid()[:, 0].numpy()
        assert prob.shape == (B, H, W) and prob.dtype == np.float32 and np.ptp(prob) > 0.01
        assert np.abs(prob - expected).max() < 1e-4


def test_import_of_the_public_notebook(tmp_path, capsys):
    import segmentation_models_pytorch as smp
    theirs = smp.create_model("unet", "mit_b0", encoder_weights=None, in_channels=3, classes=1)
    state = {"mean": torch.full((1, 3, 1, 1), 0.4), "std": torch.full((1, 3, 1, 1), 0.2),
             **{f"model.{k}": v for k, v in theirs.state_dict().items()}}
    torch.save(state, tmp_path / "notebook.pth")
    flags = ["import", str(tmp_path / "notebook.pth"), "-o", str(tmp_path / "ours.pt")]
    assert run([*flags, "--arch", "unet", "--encoder", "mit_b0"]) == 0
    ours = load_model(tmp_path / "ours.pt")
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(ours(image), theirs.eval()((image / 255 - 0.4) / 0.2), atol=1e-4)
    capsys.readouterr()
    assert run([*flags, "--arch", "fpn", "--encoder", "mit_b0"]) == 2
    assert run([*flags, "--arch", "unet", "--encoder", "resnet18"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "is not fpn on mit_b0" in err[0] and "is not unet on resnet18" in err[1]


# ---------------------------------------------------------------- only for today's weights/watermark.pt

def test_the_released_file_is_read_as_it_was():
    net = load_model()
    assert isinstance(net, model.OldSegmenter) and len(net.model.decoder.blocks) == 4
    assert sum(isinstance(m, model.Residual) for m in net.modules()) == 10
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    prob, mirrored = (predict_prob(net, np.ascontiguousarray(x)) for x in (image, image[:, ::-1]))
    assert np.abs(prob[:, ::-1] - mirrored).max() < 0.02           # it looks at both; bf16
    again = from_checkpoint(pack(from_checkpoint(load_checkpoint(model.WEIGHTS))))     # as with --init
    assert type(again) is type(net)


class Scripted(torch.nn.Module):
    """A network that answers each look with the next of the given probabilities, constant over the picture."""

    def __init__(self, *answers):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.answers, self.seen = list(answers), []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        prob = torch.tensor([self.answers.pop(0) for _ in x], dtype=torch.float32)
        return prob.logit(1e-6)[:, None, None, None].expand(-1, 1, *x.shape[2:])


@pytest.mark.parametrize("plain, mirrored, third, expected", [
    (0.9, 0.1, 0.8, 0.8), (0.9, 0.1, 0.0, 0.1), (0.1, 0.9, 1.0, 0.9),       # the median of the three
    (0.9, 0.7, None, 0.8), (0.2, 0.0, None, 0.1)])                          # no dispute: the mean of two
def test_a_smaller_look_decides_where_two_disagree(plain, mirrored, third, expected):
    image = np.zeros((50, 100, 3), np.uint8)
    net = Scripted(0.5, plain, 0.5, mirrored, *[third] * (third is not None))         # of the second of two
    probs = old_probs(net, [image, image])
    expected = min(expected, allowed(expected))
    assert np.allclose(probs[0], allowed(0.5), atol=1e-5) and np.allclose(probs[1], expected, atol=1e-5)
    assert net.seen == [(4, 3, 50, 100)] + [(1, 3, 30, 60)] * (third is not None)
    assert probs[1].shape == (50, 100) and not net.answers
    if third is not None:
        assert old_probs(Scripted(plain, mirrored, third), [image[:1, :1]])[0].shape == (1, 1)


def allowed(surest: float) -> float:
    odds = (surest / (1 - surest)) ** 0.5 / 12.2
    return odds / (1 + odds)


def test_a_picture_counts_as_much_as_its_surest_pixel():
    image = np.zeros((8, 8, 3), np.uint8)
    for surest, most in ((0.5, 0.08), (0.99, 0.45), (0.999, 0.72), (0.9999, 0.89)):
        assert allowed(surest) == pytest.approx(most, abs=0.005)
        probs, = old_probs(Scripted(surest, surest), [image])
        assert np.allclose(probs, allowed(surest), rtol=1e-3)
    net = Scripted(1.0, 1.0)
    assert np.allclose(old_probs(net, [image])[0], 1, atol=0.02)     # nothing is taken from what is sure


def test_the_folder_of_a_run_serves_as_weights(tmp_path):
    torch.manual_seed(0)
    for name in ("last", "best"):                                     # last.pt alone, as before the first score
        net = build("linknet", "tu-mobilenetv3_small_050")
        save_checkpoint(pack(net, ema=net.state_dict()), tmp_path / f"{name}.pt")
        path, stem = tmp_path / f"{name}.pt", "model.encoder.model.conv_stem.weight"
        assert model.find_weights(tmp_path) == path == model.find_weights(path)
        assert torch.equal(load_checkpoint(tmp_path)["model"][stem], net.state_dict()[stem])
    assert len(load_model(tmp_path).state_dict()) > 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_model(tmp_path / "empty")
