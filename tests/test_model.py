import math
import os
import pickle
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image

import model
from conftest import ROOT
from model import (Segmenter, default_dilation, dilate, from_checkpoint, load_checkpoint, load_encoder,
                   load_image, load_model, pack, pick_amp, pick_device, predict_prob, predict_probs,
                   save_checkpoint)

SMALL = "tu-mobilenetv3_small_050"


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Segmenter().eval()


@pytest.fixture
def saved(net, tmp_path):
    save_checkpoint(pack(net), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("call, words", [
    (lambda: Segmenter("unett"), ["unett", "deeplabv3plus"]),
    (lambda: Segmenter("unet", "resnet17"), ["resnet17", "resnet18"]),
    (lambda: Segmenter("unet", "tu-resnet17"), ["resnet17"]),
    (lambda: Segmenter("linknet", "mit_b0"), ["not supported"]),               # smp says so itself
    (lambda: load_encoder(Segmenter("linknet", SMALL), "none.pt"), ["none.pt"]),
    (lambda: pick_device("tpu9"), ["'tpu9' is not there"]),
    (lambda: load_image(np.zeros((2, 3), np.uint8)), ["uint8 array"])])
def test_a_mistake_is_a_sentence_that_says_what_exists(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert all(word in str(e.value) for word in words)


def test_the_network_is_smps_own_with_normalisation_and_any_size_inside(net):
    theirs = smp.create_model("unet", model.ENCODER, encoder_weights=None, in_channels=3, classes=1).eval()
    theirs.load_state_dict(net.model.state_dict())
    assert str(net.model) == str(theirs) and sum(p.numel() for p in net.parameters()) < 6e6
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.IMAGENET_MEAN, model.IMAGENET_STD))
    for H, W in ((1, 1), (1, 70), (33, 64), (64, 64), (100, 45)):
        image = noise(2, 3, H, W)
        padded = F.pad((image / 255 - mean) / std, (0, -W % 32, 0, -H % 32), mode="replicate")
        logits = net(image)
        assert logits.shape == (2, 1, H, W) and torch.allclose(logits, theirs(padded)[..., :H, :W], atol=1e-4)


def test_a_fresh_network_expects_the_base_rate():
    logits, mask = Segmenter().train()(noise(4, 3, 64, 64)), (torch.rand(4, 1, 64, 64) < model.PRIOR).float()
    loss = F.binary_cross_entropy_with_logits(logits, mask)
    assert abs(loss - 0.1985) < 0.1                                # the entropy of one in twenty


@pytest.mark.parametrize("arch, encoder", [
    ("unet", model.ENCODER), ("unet", "mobilenet_v2"), ("unet", SMALL), ("fpn", "resnet18"),
    ("deeplabv3plus", "efficientnet-b0"), ("segformer", "mit_b0"), ("upernet", "tu-regnety_002")])
def test_fused_batchnorm_changes_nothing(arch, encoder):
    torch.manual_seed(0)
    image, net = noise(1, 3, 64, 96), Segmenter(arch, encoder).eval()
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:                                                # statistics that do something
        m.running_mean.uniform_(-0.1, 0.1)
        m.running_var.uniform_(0.5, 1.5)
    before, fused = net(image), model.fuse_batchnorm(net)
    assert (fused(image) - before).abs().max() < 1e-3 * before.abs().max()
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert left < len(norms) and not (left and arch == "unet")


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


@pytest.mark.parametrize("encoder, archs", [
    ("resnet18", "unet unetplusplus fpn linknet manet pspnet deeplabv3plus segformer"),
    ("mit_b0", "unet fpn manet pspnet deeplabv3plus segformer")])
def test_smp_architectures_and_encoders_learn(encoder, archs):
    for arch in archs.split():
        net = Segmenter(arch, encoder).train()
        net(noise(2, 3, 64, 64)).mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in net.parameters()), arch


def test_encoder_weights_from_a_file(net, tmp_path):
    path = tmp_path / "encoder.pt"
    state = {k: torch.full_like(v, 0.01) for k, v in net.model.encoder.state_dict().items()}
    torch.save(state | {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}, path)
    load_encoder(loaded := Segmenter(), path)
    assert all((v == 0.01).all() for v in loaded.model.encoder.state_dict().values() if v.is_floating_point())
    assert loaded.mean.flatten().tolist() == [0.5] * 3 and loaded.std.flatten().tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="encoder resnet18 cannot take .*encoder.pt"):
        load_encoder(Segmenter("unet", "resnet18"), path)


@pytest.mark.parametrize("encoder, asked", [(model.ENCODER, True), ("resnet18", "imagenet")])
def test_imagenet_weights_come_from_smp_with_their_normalisation(encoder, asked, monkeypatch):
    theirs, net = smp.encoders.get_encoder(encoder), Segmenter("unet", encoder)
    monkeypatch.setattr(smp.encoders, "get_encoder", lambda name, weights: theirs if weights == asked else None)
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params",
                        lambda *_: {"input_space": "RGB", "mean": [0.5] * 3, "std": [0.25] * 3})
    load_encoder(net, "imagenet")
    assert all(torch.equal(net.model.encoder.state_dict()[k], v) for k, v in theirs.state_dict().items())
    assert net.mean.flatten().tolist() == [0.5] * 3 and net.std.flatten().tolist() == [0.25] * 3


def test_device_and_precision_come_with_their_reasons():
    device, why = pick_device("cpu")
    assert device.type == "cpu" and why == "asked for" and pick_device("auto")[1].endswith("found")
    for name, dtype in (("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert pick_amp(name, device) == (dtype, "asked for")
    assert pick_amp("auto", torch.device("mps")) == (None, "float32 is the safe choice on mps")


@pytest.mark.parametrize("amx, avx, isa, pays", [
    (True, True, None, True), (False, True, "default", True), (True, True, "AVX2", False),
    (False, False, None, False)])
def test_bf16_on_the_cpu_only_where_it_is_in_the_hardware(monkeypatch, amx, avx, isa, pays):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    dtype, why = pick_amp("auto", torch.device("cpu"))
    assert dtype == (torch.bfloat16 if pays else None) and ("hardware" if pays else "safe") in why


# ---------------------------------------------------------------- image in, mask out

def test_images_of_every_mode():
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    picture = Image.fromarray(grey)
    for image, expected in [
            (picture, grey), (picture.convert("P"), grey), (Image.fromarray(grey > 99), (grey > 99) * 255),
            (Image.fromarray(grey.astype(np.uint16) * 257), grey),
            (Image.fromarray(grey.astype(np.uint16)), 0 * grey),                         # never stretched
            (Image.fromarray(grey.astype(np.float32) / 255), grey),
            (Image.merge("LA", [Image.new("L", (8, 6)), picture]), 255 - grey),
            (Image.new("CMYK", (8, 6)), np.full((6, 8), 255))]:
        got = load_image(image)
        assert got.shape == (6, 8, 3) and got.dtype == np.uint8 and load_image(got) is got, image.mode
        assert np.abs(got[..., 0].astype(int) - expected).max() <= 1, image.mode


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(OSError, match="not a picture in a format that is read"):
        load_image(tmp_path / "a.jpg")


def test_fit_and_resize_back():
    for shape, size, full, expected in [
            ((300, 1000), 274, None, (150, 500)), ((300, 1000), 548, None, (300, 1000)),
            ((300, 1000), 2000, None, (300, 1000)),
            ((300, 400), 512, None, (443, 591)), ((300, 400), 1024, None, (443, 591)),   # 512 x 512 pixels
            ((1, 5000), 512, None, (1, 2048)),                                           # as one of 16 : 1
            ((100, 90), 512, None, (150, 135)), ((100, 90), 95, None, (100, 90)),        # no further; as asked
            ((150, 500), 274, (300, 1000), (150, 500)),                                  # decoded at half
            ((1024, 3400), 512, None, (281, 933)), ((151, 501), 512, (1024, 3400), (281, 933))]:
        image = np.zeros((*shape, 3), np.uint8)
        seen = model.fit(image, size, full)
        assert seen.shape == (*expected, 3) and (seen is image) == (shape == expected), (shape, size, full)
        assert model.resize_prob(np.ones(expected, np.float32), *shape).shape == shape


def test_predict_is_batch_independent(saved, monkeypatch):
    monkeypatch.setattr(model, "pick_amp", lambda *a: (None, ""))    # an untrained network magnifies bf16's
    net, images = load_model(saved), list(noise(3, 40, 50, 3).numpy())
    alone = np.stack([predict_probs(net, [image])[0] for image in images])
    assert alone.shape == (3, 40, 50) and alone.dtype == np.float32 and 0 <= alone.min() <= alone.max() <= 1
    assert np.abs(alone - predict_probs(net, images)).max() < 1e-3


def test_dilation_is_rounds_of_the_cross():
    mask = (np.random.default_rng(0).random((60, 80)) > 0.99).astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for radius in (0, 1, 3, 10):
        assert np.array_equal(dilate(mask, radius), cv2.dilate(mask, cross, iterations=radius) * 255)
    assert not dilate(np.zeros((5, 5), np.uint8), 3).any()
    assert [default_dilation(300, 512), default_dilation(3000, 4096), default_dilation(8, 8)] == [3, 24, 1]


@pytest.mark.parametrize("threshold, sure, expected", [
    (0.4, {}, "110000011"), (0.99, {}, "000000010"), (0.4, {"sure": 0}, "110111011"), (0.97, {}, "010000010"),
    (0, {}, "111111111")])
def test_a_mask_is_the_connected_parts_that_hold_a_sure_pixel(threshold, sure, expected):
    prob = np.float32([[0.5, 0.985, 0.3, 0.7, 0.975, 0.5, 0.1, 0.995, 0.4]])
    mask = model.to_mask(prob, threshold, 0, **sure)
    assert mask.dtype == np.uint8 and np.array_equal(mask[0], [255 * int(c) for c in expected])
    assert np.array_equal(model.to_mask(prob.T, threshold, 0, **sure), mask.T)


def test_parts_that_touch_at_a_corner_are_connected():
    assert model.to_mask(np.float32([[0.99, 0.1], [0.1, 0.6]]), 0.5, 0).tolist() == [[255, 0], [0, 255]]
    assert not model.to_mask(np.zeros((4, 4), np.float32), 0.5).any()


# ---------------------------------------------------------------- checkpoint file

def test_bad_weights_are_one_sentence_that_names_the_file(net, saved, tmp_path):
    good, path = saved.read_bytes(), tmp_path / "odd.pt"
    odd = [{"model": 1}, {"encoder": 3}, {"encoder": ["x"]}, {"arch": "dpt"}, {"options": {3: 4}}, {"ema": [1]}]
    for bad, words in [
            (good[:5000], "damaged"), (b"", "damaged"), ([1], "no file of plain tensors"),
            *((code, "damaged, or no file of plain") for code in (pickle.dumps(exec, 2), {"arch": exec})),
            ({"format": 99}, "another format"),
            ({"options": {"subpixel": True}}, "the last commit that reads older weights is a615433"),
            ({"encoder": "resnet18"}, "other weights than unet on resnet18"),
            *((change, "odd.pt") for change in odd)]:
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        else:
            torch.save(pack(net) | bad if isinstance(bad, dict) else bad, path)
        with pytest.raises(ValueError, match=words) as e:
            load_model(path)
        assert "odd.pt" in (said := model.first_line(e.value)) and said.isprintable()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="odd.pt is not one of our checkpoints.*'format'.*model.py import"):
        load_model(path)


def test_a_full_disk_keeps_the_old_checkpoint(net, saved, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")
    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="cannot write .*w.pt: No space left on device"):
        save_checkpoint(pack(net), saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["w.pt"]


def test_no_link_is_written_through(net, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("w.pt", "w.pt.tmp"):
        (tmp_path / name).symlink_to("mine")
    save_checkpoint(pack(net), tmp_path / "w.pt")
    assert (tmp_path / "mine").read_text() == "mine" and load_checkpoint(tmp_path / "w.pt")


def test_a_file_or_the_folder_of_a_run_is_read_as_it_was_saved(tmp_path):
    for name in ("last", "best"):                                     # last.pt alone, as before the first score
        net, path = Segmenter("linknet", SMALL), tmp_path / f"{name}.pt"
        save_checkpoint(pack(net), path)
        for place in (path, tmp_path):
            again = from_checkpoint(load_checkpoint(place), place).state_dict()
            assert all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "none.pt"):
        with pytest.raises(FileNotFoundError, match="no weights at"):
            load_model(tmp_path / nothing)


# ---------------------------------------------------------------- one way out, and the commands

@pytest.mark.parametrize("error, code, text", [
    (ValueError("x\x1b[2Jy\nand more"), 2, r"x\x1b[2Jy"), (MemoryError(), 2, "MemoryError"),
    (FileNotFoundError(2, "No such file", "a"), 2, "[Errno 2] No such file: 'a'"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."), 2, "CUDA out of memory. Tried ..."),
    (KeyboardInterrupt(), 130, "stopped before the end")])
def test_an_error_is_one_sentence_and_a_code(error, code, text, capsys):
    def main(argv):
        raise error
    assert model.one_way_out(main)() == code
    assert capsys.readouterr().err == f"test_model.py: {text}\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.one_way_out(lambda argv: torch.zeros(1, 2) @ torch.zeros(3, 4))()


def test_a_reader_that_leaves_early_needs_no_word():
    code = "import model; raise SystemExit(model.one_way_out(lambda argv: print('x\\n' * 10**5))())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.wait() == 1 and not process.stderr.read()


def test_export_is_half_the_size_and_holds_the_averaged_weights(net, tmp_path, capsys, monkeypatch):
    source, out, ema = tmp_path / "best.pt", tmp_path / "out.pt", Segmenter().state_dict()
    save_checkpoint(pack(net, ema=ema, optimizer={"big": torch.zeros(10**6)}), source)
    monkeypatch.setattr(sys, "argv", ["model.py", "export", str(source), str(out)])
    assert model.main() == 0 and "MB" in capsys.readouterr().out
    assert out.stat().st_size < 13e6 and load_checkpoint(out).keys() == pack(net).keys()
    exported = from_checkpoint(load_checkpoint(out), out).state_dict()
    assert all(torch.allclose(exported[k], v, rtol=1e-3, atol=1e-6) for k, v in ema.items())


def test_a_variance_too_large_for_half_precision_is_exported_and_loads(tmp_path, capsys):
    net = Segmenter("linknet", SMALL)
    norm = next(part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d))
    norm.running_var.fill_(1e6)
    save_checkpoint(pack(net), tmp_path / "best.pt")
    assert model.main(["export", str(tmp_path), str(tmp_path / "out.pt")]) == 0
    exported = load_checkpoint(tmp_path / "out.pt")["model"]
    assert load_model(tmp_path / "out.pt") and 1e6 in [float(v.max()) for v in exported.values()]
    assert {v.dtype for v in exported.values() if v.ndim > 1} == {torch.float16}


def test_export_of_several_is_their_mean(tmp_path, capsys):
    paths, states = [str(tmp_path / f"{i}.pt") for i in range(3)], []
    for path in paths:
        net = Segmenter("linknet", SMALL)
        net.model.decoder.requires_grad_(False)                        # no matter: a state has all tensors
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        save_checkpoint(pack(net), path)
    assert model.main(["export", *paths, str(tmp_path / "mean.pt")]) == 0
    mean = load_checkpoint(tmp_path / "mean.pt")["model"]
    for name, value in mean.items():
        expected = sum(state[name].double() for state in states) / 3
        assert torch.allclose(value.double(), expected, rtol=1e-3, atol=1e-6), name
    save_checkpoint(pack(Segmenter("fpn", SMALL)), paths[1])
    capsys.readouterr()
    for command, words in ((paths, f"0.pt is linknet on {SMALL}"), (["--onnx", *paths], "--onnx takes one")):
        assert model.main(["export", *command, str(tmp_path / "no.pt")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no.pt").exists()


def test_onnx_says_what_torch_says(saved, tmp_path, capsys, monkeypatch):
    command = ["export", "--onnx", str(saved), str(tmp_path / "w.onnx")]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "onnx", None)                         # as where it is not installed
        assert model.main(command) == 2 and os.listdir(tmp_path) == ["w.pt"]
        assert "pip install onnx" in capsys.readouterr().err
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    net, code = load_model(saved), model.main(command)
    props = {p.key: p.value for p in onnx.load(tmp_path / "w.onnx").metadata_props}
    assert code == 0 and props == {"size": "512", "threshold": "0.5", "sure": "0.98"}
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(tmp_path / "w.onnx", providers=["CPUExecutionProvider"])
    for B, H, W in ((1, 64, 96), (2, 50, 33), (1, 7, 130)):
        image = noise(B, H, W, 3)
        prob, = session.run(["prob"], {"image": image.numpy()})
        expected = net(image.permute(0, 3, 1, 2)).sigmoid()[:, 0].numpy()
        assert prob.shape == (B, H, W) and prob.dtype == np.float32 and np.ptp(prob) > 0.01
        assert np.abs(prob - expected).max() < 1e-4


def test_import_of_the_public_notebook(tmp_path, capsys):
    theirs = smp.create_model("unet", "mit_b0", encoder_weights=None, in_channels=3, classes=1).eval()
    state = {f"model.{k}": v for k, v in theirs.state_dict().items()}
    state |= {"mean": torch.full((1, 3, 1, 1), 0.4), "std": torch.full((1, 3, 1, 1), 0.2)}
    torch.save(state, tmp_path / "notebook.pth")
    command = ["import", str(tmp_path / "notebook.pth"), "-o", str(tmp_path / "ours.pt"), "--arch"]
    for arch, encoder in (("fpn", "mit_b0"), ("unet", "resnet18")):
        assert model.main([*command, arch, "--encoder", encoder]) == 2
        err = capsys.readouterr().err
        assert f"notebook.pth has other weights than {arch} on {encoder}" in err and len(err.splitlines()) == 1
    assert model.main([*command, "unet", "--encoder", "mit_b0"]) == 0
    image = noise(1, 3, 64, 64)
    ours = load_model(tmp_path / "ours.pt")(image)
    assert torch.allclose(ours, theirs((image / 255 - 0.4) / 0.2), atol=1e-4)


def test_the_released_weights_find_the_name_and_the_credit_of_the_demo_photo():
    net, image = load_model(), load_image(ROOT / "demo.jpg")                               # 1200 x 800
    mask = model.to_mask(predict_prob(net, image), net.threshold, 0) > 0
    assert (net.arch, net.encoder, net.options) == ("unet", model.ENCODER, {})
    for x, y, w, h in ((286, 332, 630, 134), (910, 755, 266, 28)):
        assert mask[y:y + h, x:x + w].any(0).mean() > 0.8                                  # of its columns
        mask[y - 8:y + h + 8, x - 8:x + w + 8] = False
    assert not mask.any()
