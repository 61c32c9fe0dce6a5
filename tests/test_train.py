import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT
import eval as evaluation
import synth
import train
from model import Segmenter, load_checkpoint, load_model, pack, save_checkpoint
from train import loss_parts, lr_at

SMALL = {"N_EVAL": (6, 6), "N_PICTURES": 2, "LOG_EVERY": 1}                # one held-out picture is clean
OTHER = "tu-mobilenetv3_small_075"                                    # an encoder that flags() does not name


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(train, name, value)
        yield


def flags(out, photos, logos, *more):
    return ["--images", str(photos), "--logos", str(logos), "--out", str(out), "--size", "32",
            "--batch-size", "4", "--workers", "0", "--device", "cpu", "--encoder-weights", "none",
            "--arch", "linknet", "--encoder", "tu-mobilenetv3_small_050",      # 0.4 M parameters
            "--steps", "4", "--eval-every", "2", "--amp", "off", *map(str, more)]


@pytest.fixture
def start(tmp_path, photos, logos):
    """start(name, *flags): a new run in the folder of that name -> its exit code."""
    return lambda name, *more: train.main(flags(tmp_path / name, photos, logos, *more))


def resume(out, *more):
    # TensorBoard reads its files by name, which ends in second, host, process, counter: 10 sorts before 9
    while list(Path(out).glob(f"events.*.{int(time.time())}.*.{os.getpid()}.*")):
        time.sleep(0.1)
    return train.main(["--resume", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos, logos):
    """A run that nothing disturbs. No test changes it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(out, photos, logos)) == 0
    return out


@pytest.fixture
def refused(capfd):
    """refused(code): a mistake, so 2, with one sentence beside what a healthy run says -> the sentence."""
    def check(code):
        lines = [line for line in capfd.readouterr().err.splitlines()
                 if not re.search(r"^cpu: |^synth.py: | M parameters, |: step \d", line)]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("train.py: "), lines
        return lines[0]
    return check


def at_step(patch, n, act):
    """In the nth step from now, act(bce) happens."""
    real, calls = train.loss_parts, []

    def loss_parts(logits, mask):
        calls.append(1)
        terms = real(logits, mask)
        if len(calls) == n:
            act(terms[0])
        return terms
    patch.setattr(train, "loss_parts", loss_parts)


def overflow(bce):
    """What fp16 does when the scale is too high."""
    bce.register_hook(lambda grad: grad * math.inf)


def fails(error):
    """A function that does nothing else."""
    def fail(*args, **kwargs):
        raise error
    return fail


def read_log(out, key="step"):
    """The log's lines that have this key."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def read_events(out):
    return EventAccumulator(str(out), size_guidance={"images": 0, "scalars": 0}).Reload()


def plain(value):
    """Tensors as bytes, so that == compares all of a checkpoint."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def everything(out):
    """All that a run leaves, but speeds, and the log's size, which depends on their digits."""
    found = {f"{name} {key}": plain(value) for name in ("last.pt", "best.pt")
             for key, value in load_checkpoint(out / name).items() if key != "log_size"}
    found["log"] = [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in read_log(out)]
    found["events"] = [(event.step, event.value) for event in read_events(out).Scalars("loss")]
    found["files"] = sorted(path.name for path in out.iterdir() if "events" not in path.name)
    return found


def assert_same_run(a, b, but=()):
    """Bit for bit: weights, EMA, optimizer, scaler, best IoU, log lines, events. No file more, none less."""
    one, other = everything(a), everything(b)
    assert one.keys() == other.keys() and {key for key in one if one[key] != other[key]} <= set(but)


# ---------------------------------------------------------------- schedule, loss, samples, optimizer

def test_learning_rate():
    assert lr_at(0, 1000) == 1 / 100 and lr_at(99, 1000) == 1.0      # a tenth of a short run warms up
    assert lr_at(100, 10_000) == 101 / 200 and {lr_at(step, 10_000) for step in range(199, 7000)} == {1}
    assert abs(lr_at(8500, 10_000) - 0.5) < 1e-9 and lr_at(10_000, 10_000) == 0     # the last 30 per cent fall
    assert 0 < lr_at(9999, 10_000) < 1e-3 and lr_at(0, 1) == 1


def test_loss_of_a_perfect_and_of_a_clean_prediction():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, :4] = 1                                                # the second image is clean
    logits = torch.where(mask > 0, 20.0, -20.0)
    bce, soft_iou = loss_parts(logits, mask)
    assert bce < 1e-6 and soft_iou < 1e-4
    logits[1, 0, 0, 0] = 20                                           # one false pixel on the clean image
    assert loss_parts(logits, mask)[1] > 0.06
    for count in (10, 100, 1000):                                     # pixels wrongly marked on a clean image
        logits = torch.full((1, 1, 40, 40), -20.0)
        logits.view(-1)[:count] = 20
        soft_iou = loss_parts(logits, torch.zeros(1, 1, 40, 40))[1]
        assert abs(soft_iou - 0.25 * math.log(1 + count)) < 1e-3
    # p = .5, one marked pixel of four
    bce, soft_iou = loss_parts(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0], [0, 0]]]]))
    assert abs(bce - math.log(2)) < 1e-6 and abs(soft_iou - 0.25 * (1 - (0.5 + 1) / (2.5 + 1))) < 1e-6


@pytest.mark.parametrize("steps, every, batch, when, n", [
    (1, 1000, 32, {1}, 8), (20, 10, 4, {4, 10, 20}, 8), (150, 1000, 16, {30, 150}, 120),
    (2500, 1000, 32, {500, 1000, 2000, 2500}, 200)])
def test_evaluations_start_early_and_a_short_run_scores_fewer_pictures(steps, every, batch, when, n, monkeypatch):
    monkeypatch.setattr(train, "N_EVAL", (8, 200))
    assert train.plan_evaluations(steps, every, batch) == (when, n)


@pytest.mark.parametrize("batch, world", [(3, 2), (4, 1)])
def test_ranks_share_the_samples_of_a_step_and_take_each_once(batch, world):
    ranks = [train.positions(0, 5, batch, rank, world) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks)):
        start = step * batch * world
        assert sorted(sum(map(list, parts), [])) == list(range(start, start + batch * world))
    assert train.positions(2, 5, batch, 0, world) == ranks[0][2:]     # a resumed run


def test_synchronised_batchnorm_keeps_the_activations():
    net, image = Segmenter().eval(), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(net(image), train.convert_sync_batchnorm(net)(image))
    assert not any(type(m) is torch.nn.BatchNorm2d for m in net.modules())


@pytest.mark.parametrize("amp, products", [(None, torch.float32), (torch.bfloat16, torch.bfloat16),
                                           (torch.float16, torch.float32)])
def test_muon_multiplies_in_bf16_only_where_the_hardware_does(amp, products, monkeypatch):
    """Where it is emulated, a step of the optimiser took longer than the network's."""
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(train, "pick_amp", lambda *a: (amp, ""))
    monkeypatch.setattr(torch, "addmm", lambda x, *a, **k: seen.append(x.dtype) or addmm(x, *a, **k))
    layer = torch.nn.Conv2d(8, 16, 3)
    optimizer, before = train.make_optimizer(layer, 1e-3, False), layer.weight.clone()
    layer(torch.rand(1, 8, 8, 8)).sum().backward()
    optimizer.step()
    assert set(seen) == {products} and not torch.equal(layer.weight, before)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_under_bf16_on_the_cpu_depthwise_convolutions_stay_in_float32(amp, start, monkeypatch):
    """Their backward in bf16 took two fifths of a step."""
    seen, conv2d = set(), torch.nn.functional.conv2d

    def spy(x, weight, bias, stride, padding, dilation, groups):
        if torch.is_grad_enabled():                    # not in an evaluation
            seen.add((groups > 1, torch.is_autocast_enabled("cpu"), x.dtype))
        return conv2d(x, weight, bias, stride, padding, dilation, groups)
    monkeypatch.setattr(train, "pick_amp", lambda *a: (amp, ""))
    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    assert start("run", "--steps", 1) == 0
    assert {part[1:] for part in seen if part[0]} == {(False, torch.float32)}
    assert {part[1:] for part in seen if not part[0]} == {(amp is not None, torch.float32)} | (
        {(True, torch.bfloat16)} if amp else set())


def test_a_pretrained_encoder_moves_slower_than_the_decoder():
    for pretrained, share in ((True, 0.3), (False, 1)):
        encoder, decoder = train.make_optimizer(Segmenter(), 1e-3, pretrained).param_groups
        assert (encoder["lr"], decoder["lr"]) == (share * 1e-3, 1e-3)
        assert len(encoder["params"]) > len(decoder["params"])


def test_a_step_takes_clipped_gradients(start, monkeypatch):
    norms, real = [], train.make_optimizer

    def make_optimizer(net, *rest):
        optimizer = real(net, *rest)
        squares = (p.grad.square().sum() for p in net.parameters() if p.grad is not None)
        optimizer.register_step_pre_hook(lambda *_: norms.append(math.sqrt(sum(squares))))
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    at_step(monkeypatch, 1, lambda bce: bce.register_hook(lambda grad: 1e4 * grad))
    assert start("run", "--steps", 1) == 0 and norms == pytest.approx([1], rel=1e-3)


@pytest.mark.parametrize("n, kept", [(0, 0.1), (90, 0.91), (10**6, 0.999)])
def test_the_average_of_a_short_run_forgets_its_first_weights(n, kept):
    averaged = [torch.ones(1)]
    train.update_average(averaged, [torch.zeros(1)], torch.tensor(n))
    assert float(averaged[0]) == pytest.approx(kept)


def test_best_pt_is_the_best_of_all_evaluations(start, tmp_path, monkeypatch):
    ious = iter((0.2, 0.5, 0.3))
    monkeypatch.setattr(train, "assess", lambda *_: next(ious))
    assert start("run") == 0
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert (best["step"], best["best_iou"]) == (2, 0.5)


def test_two_images_overfit(photos, logos):
    torch.manual_seed(0)
    source = synth.Synth(photos, logos, size=64)
    pairs = [source.make_sample(0, i)[:2] for i in range(100)]
    pairs = [(image, mask) for image, mask in pairs if 0.05 < mask.mean() < 0.5][:2]
    image, mask = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
    net = Segmenter().train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(45):
        optimizer.zero_grad()
        sum(loss_parts(net(image), mask.float())).backward()
        optimizer.step()
    pred = net(image) > 0
    assert (pred & (mask > 0)).sum() / (pred | (mask > 0)).sum() > 0.95


# ---------------------------------------------------------------- a run, what stops it, how it goes on

def test_a_run_writes_what_it_promises(start, tmp_path, capfd):
    out = tmp_path / "run"
    assert start("run") == 0
    assert {"last.pt", "best.pt", "log.jsonl", "args.json"} <= {path.name for path in out.iterdir()}
    said = capfd.readouterr().err
    assert "cpu: asked for" in said and "30 photos" in said and "best held-out IoU" in said
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == 4 and last["args"]["size"] == 32 and last["best_iou"] >= 0
    load_model(out / "best.pt")
    assert [line["step"] for line in read_log(out, "loss")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_log(out, "held_out/iou")] == [1, 2, 4]     # a fifth, half, the end
    events = read_events(out)
    assert {"loss", "bce", "soft_iou", "lr", "grad_norm", "samples_per_s", "held_out/iou", "held_out/f1",
            "held_out/false_alarm_rate"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in read_log(out, "loss")])
    assert len(events.Images("image, truth, probability")) == 3


def stop_in_evaluation(patch):
    real = evaluation.predict_prob
    patch.setattr(evaluation, "predict_prob", lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args))


def fill_disk(patch):
    at_step(patch, 4, lambda bce: patch.setattr(os, "replace", fails(OSError(28, "No space left on device"))))


@pytest.mark.parametrize("trouble, kept, code, says", [
    (lambda patch: patch.setattr(train, "score", fails(ValueError("no photo can be read"))), 1, 2, "no photo"),
    (stop_in_evaluation, 1, 130, "step 1 of 4; --resume"),            # and no IoU: nothing was scored
    (lambda patch: at_step(patch, 3, lambda bce: signal.raise_signal(signal.SIGINT)), 3, 130, "step 3 of 4"),
    (fill_disk, 2, 2, "last.pt: No space left on device"),
    (lambda patch: at_step(patch, 4, lambda bce: bce.mul_(math.nan)), 2, 2, "loss is nan at step 4"),
    (lambda patch: at_step(patch, 3, overflow), 2, 2, "at step 3, gradient norm ")])
def test_a_run_that_breaks_says_why_and_resumes_to_the_same_end(
        trouble, kept, code, says, whole, start, tmp_path, monkeypatch, capfd):
    out, handlers = tmp_path / "run", [signal.getsignal(number) for number in train.STOPS]
    with monkeypatch.context() as patch:
        trouble(patch)
        assert start("run") == code
    assert [signal.getsignal(number) for number in train.STOPS] == handlers
    said = capfd.readouterr().err
    assert says in said.splitlines()[-1] and said.count("train.py: ") == (code == 2) and "Traceback" not in said
    assert load_checkpoint(out / "last.pt")["step"] == kept and not list(out.glob("*.tmp"))
    assert (out / "best.pt").exists() == bool(read_log(out, "held_out/iou")) == (kept > 1)
    load_model(out)                                                   # the folder serves as weights
    with (out / "log.jsonl").open("a") as log:
        log.write('garbage\n{"step": 19, "lo')                        # after the checkpoint, and half a line
    assert resume(out, "--steps", "4") == 0
    assert_same_run(whole, out)


@pytest.mark.filterwarnings("error::UserWarning")                     # a skipped first step is no news
def test_a_resumed_run_drops_out_what_it_would_have(start, tmp_path, monkeypatch):
    assert start("whole", "--arch", "fpn") == 0                       # which has dropout
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda bce: signal.raise_signal(signal.SIGINT))
        assert start("run", "--arch", "fpn") == 130
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_infinite_gradient_is_skipped_in_fp16(start, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, overflow)
    assert start("run", "--amp", "fp16") == 0
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["step"] == 4                                          # and the schedule goes on
    assert [line["lr"] for line in read_log(tmp_path / "run", "lr")] == [
        train.LR * lr_at(step, 4) for step in range(4)]
    taken, = {s["step"].item() for s in last["optimizer"]["state"].values() if "step" in s}
    assert 1 <= taken <= 3 and last["scaler"]["scale"] == 2.0**16 / 2**(4 - taken)     # halved by each skip
    assert all(torch.isfinite(v).all() for part in ("model", "ema") for v in last[part].values())


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 130), ("SIGKILL", -9)])
def test_however_a_run_is_stopped_no_worker_stays(name, code, tmp_path, photos, logos):
    out, more = tmp_path / "run", ("--steps", "100000", "--eval-every", "20", "--workers", "2")
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags(out, photos, logos, *more)],
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    # a terminal sends Ctrl-C to the workers too
    (os.killpg if name == "SIGINT" else os.kill)(process.pid, getattr(signal, name))
    said = process.communicate(timeout=60)[1]                         # open until the last worker is gone
    assert process.returncode == code
    step = load_checkpoint(out / "last.pt")["step"]
    assert step >= 20 and (code < 0 or read_log(out)[-1]["step"] == step and "Traceback" not in said)


@pytest.mark.parametrize("trouble, says", [("killed", "is killed by signal: Killed"), ("photos", "photos in")])
def test_trouble_in_a_worker_is_one_sentence_and_leaves_no_process(
        trouble, says, start, tmp_path, photos, monkeypatch, refused):
    mine = shutil.copytree(photos, tmp_path / "photos")
    at_step(monkeypatch, 3, lambda bce: shutil.rmtree(mine / "train") if trouble == "photos" else
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    assert says in refused(start("run", "--images", mine, "--workers", "2",
                                 "--steps", "99999", "--eval-every", "99999"))
    gc.collect()                                                      # torch's error holds its own frame
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------- many processes

def go_through(scenarios):
    """What each of two ranks does: a run per scenario of {name: flags}. It tells their exit codes."""
    enter, leave = dist.init_process_group, dist.destroy_process_group
    dist.destroy_process_group = lambda: None                         # the group does not form a second time
    dist.init_process_group = lambda *a, **k: dist.is_initialized() or enter(*a, **k)
    troubles = {"signal": lambda bce: signal.raise_signal(signal.SIGTERM),
                "nan": lambda bce: bce.mul_(math.nan)}
    for name, argv in json.loads(scenarios).items():
        with pytest.MonkeyPatch.context() as patch:
            if os.environ["RANK"] == "1" and name in troubles:
                at_step(patch, 3, troubles[name])
            os.write(1, f"{name}:{train.main(argv)}\n".encode())      # at once: two ranks, one pipe
    leave()


def torchrun(scenarios):
    """Two ranks go through the scenarios -> what both said, and on stderr."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", __file__, "go_through", json.dumps(scenarios)],
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split()), done.stderr


def curve(out):
    return np.array([[line["bce"], line["soft_iou"]] for line in read_log(out, "loss")])


def test_two_ranks_take_the_steps_of_one(tmp_path, photos, logos):
    """Without BatchNorm, whose statistics are each rank's own on the CPU."""
    torch.manual_seed(0)
    options = {"decoder_use_norm": False, "decoder_channels": [16] * 5}
    save_checkpoint(pack(Segmenter("unet", "tu-test_convnext", options)), tmp_path / "start.pt")

    def more(out, *rest):
        return flags(tmp_path / out, photos, logos, "--steps", "5", "--batch-size", "8",
                     "--eval-every", "5", *rest)
    bare = "--init", tmp_path / "start.pt", "--lr", "2e-3"
    assert train.main(more("one", *bare)) == 0
    said, err = torchrun({"bare": more("ranks", *bare), "nan": more("nan"),
                          "signal": more("signal", "--arch", "unet", "--encoder", train.ENCODER,
                                         "--amp", "auto")})           # as released
    assert said == sorted(["bare:0", "signal:130", "nan:2"] * 2)
    one, ranks = curve(tmp_path / "one"), curve(tmp_path / "ranks")
    assert one.shape == ranks.shape == (5, 2) and np.ptp(one.sum(1)) > 0.01 and np.abs(one - ranks).max() < 1e-4
    # what stops one rank stops both
    assert load_checkpoint(tmp_path / "signal" / "last.pt")["step"] == 3
    assert load_checkpoint(tmp_path / "nan" / "last.pt")["step"] == 1
    assert err.count("loss is nan at step 3") == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_ranks_share_their_statistics(start, tmp_path, photos, logos):
    more = ("--steps", "20", "--batch-size", "16", "--device", "cuda")
    assert start("one", *more) == 0
    torchrun({"fresh": flags(tmp_path / "ranks", photos, logos, *more)})
    assert np.abs(curve(tmp_path / "ranks") - curve(tmp_path / "one")).max() < 1e-3


# ---------------------------------------------------------------- other starts

@pytest.mark.parametrize("more, rate", [
    ("--init start.pt", train.INIT_LR),
    (f"--arch fpn --encoder {OTHER} --encoder-weights encoder.pt --lr 1e-3 --compile --amp bf16", 1e-3)])
def test_flags_of_the_network_reach_it_and_all_of_it_learns(more, rate, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, compiled = Segmenter("fpn", OTHER), []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    save_checkpoint(pack(net), Path("start.pt"))
    torch.save(net.model.encoder.state_dict(), "encoder.pt")
    assert start("run", *more.split(), "--batch-size", "8", "--seed", "3") == 0
    last, rates = load_checkpoint(Path("run/last.pt")), [line["lr"] for line in read_log(Path("run"), "lr")]
    assert (last["arch"], last["encoder"], last["args"]["seed"]) == ("fpn", OTHER, 3)
    assert max(rates) <= rate and bool(compiled) == ("--compile" in more)
    model, before = last["model"], net.state_dict()
    assert all(n == 4 for key, n in model.items() if key.endswith("num_batches_tracked"))
    assert {key for key in before if torch.equal(before[key], model[key])} == {"mean", "std"}


def test_without_photos_or_hub_it_trains_all_the_same(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "load_encoder", fails(ValueError("no weights")))
    common = ["--size", "32", "--batch-size", "2", "--steps", "1", "--workers", "0", "--out"]
    assert train.main([*common, str(tmp_path / "run")]) == 0
    said = capfd.readouterr().err
    assert "backgrounds are generated" in said and "random weights" in said
    assert load_checkpoint(tmp_path / "run" / "last.pt")["args"]["encoder_weights"] == "none"
    # asked for by name: no surprise
    assert train.main([*common, str(tmp_path / "other"), "--encoder-weights", "imagenet"]) == 2


def data_of(*more):
    """What a run with these flags takes: its samples, its held-out pictures, its numbers of files."""
    return train.make_data(train.parse(flags("", *more))[0], 6)


def test_own_marks_are_learned_beside_general_ones(tmp_path, photos, logos, monkeypatch):
    names = train.Mixed([("own", i) for i in range(700)], [("general", i) for i in range(300)], 0.3)
    mixed = [names[i] for i in range(1000)]
    assert [[name for name, _ in mixed[:n]].count("general") for n in (10, 1000)] == [3, 300]
    assert sorted(mixed) == sorted(names.first + names.second)        # each of both, once
    mine, init = tmp_path / "mine", ("--init", "start.pt")
    mine.mkdir()
    shutil.copy(next(logos.glob("*.png")), mine)
    data = data_of(photos, mine, *init)[0]
    assert (type(data), data.share, data.first.recipe) == (train.Mixed, 0.3, "own")
    (mine / "font.ttf").write_bytes(b"none")
    assert data_of(photos, mine, *init)[0].first.recipe == "default"  # words, where a font is
    assert type(data_of(photos, mine)[0]) is type(data_of(photos, logos, *init)[0]) is synth.Synth
    assert data_of(photos, train.LOGOS, *init)[0].recipe == "default"  # the checkout's own: as without them
    monkeypatch.setattr(train, "LOGOS", mine)                         # one logo: fewer than one's own
    assert type(data_of(photos, logos, *init)[0]) is synth.Synth


# ---------------------------------------------------------------- mistakes, runs that move, damage

@pytest.mark.parametrize("more, says", [
    ("--steps 0", "--steps must be at least 1"), ("--lr -1", "--lr must be above 0"),
    ("--pairs-share 0", "--pairs-share above 0"), ("--device tpu9", "'tpu9' is not there"),
    ("--arch unett", "unett"), ("--encoder mobilenetv2", "mobilenet_v2"),
    ("--images nowhere", "nowhere is not a folder"), ("--pairs nowhere", "nowhere has no layout"),
    ("--init none.pt", "no weights at none.pt"), ("--resume nowhere", "no last.pt, or weights alone"),
    ("--resume {whole} --arch fpn", "leave out --arch fpn"),
    ("--resume {whole} --seed 1", "leave out --seed 1"),
    ("--images {pairs}", "--pairs {pairs}"), ("--images .", "--pairs {pairs}/val ")])
def test_a_users_mistake_is_one_sentence_and_exit_2(
        more, says, whole, pairs, start, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(pairs / "val" / "images")                       # a labelled set is no clean photos
    more, says = (text.format(whole=whole, pairs=pairs) for text in (more, says))
    assert says in refused(start("run", *more.split()))
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(whole, start, tmp_path, refused):
    out = shutil.copytree(whole, tmp_path / "run")
    for name in ("none", "last.pt"):                                  # best.pt is kept too
        (out / name).unlink(missing_ok=True)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert f"--resume {out}" in refused(start("run"))
        assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_run_moves(whole, start, tmp_path, photos, logos, monkeypatch, refused):
    """Its photos, the checkout and the number of workers are others, and it ends as it would have."""
    shutil.copytree(photos, tmp_path / "before")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda bce: signal.raise_signal(signal.SIGINT))
        assert start("run", "--images", tmp_path / "before") == 130
    out = (tmp_path / "run").rename(tmp_path / "moved")
    after = (tmp_path / "before").rename(tmp_path / "after")
    checkout = shutil.copytree(logos, tmp_path / "checkout" / "logos")
    monkeypatch.setattr(train, "LOGOS", checkout)
    assert load_checkpoint(out / "last.pt")["args"]["logos"] is None             # the checkout's own
    assert "before is not a folder" in refused(resume(out))
    moved = ("--images", after, "--workers", "1", "--logos", checkout)
    fp16 = shutil.copytree(out, tmp_path / "fp16")
    with monkeypatch.context() as patch:                              # to a device of another precision
        patch.setattr(train, "pick_amp", lambda *a: (torch.float16, "another device"))
        assert resume(fp16, *moved, "--device", "auto") == 0
    assert load_checkpoint(fp16 / "last.pt")["scaler"]["scale"] > 0
    assert resume(out, *moved, "--device", "cpu") == 0
    assert_same_run(whole, out, but=("last.pt args", "best.pt args"))


def test_a_run_is_prolonged(whole, tmp_path, refused):
    """Nothing is lost where it stops before the learning rate falls."""
    out = shutil.copytree(whole, tmp_path / "run")
    assert "has taken 4 steps already" in refused(resume(out, "--steps", 3))
    assert resume(out, "--steps", 10) == 0
    last = load_checkpoint(out / "last.pt")
    assert (last["step"], last["args"]["steps"]) == (10, 10)
    assert [line["lr"] for line in read_log(out, "lr")][4:] == [train.LR * lr_at(step, 10) for step in range(4, 10)]


@pytest.mark.parametrize("change, says", [
    ({"args": None}, "no last.pt, or weights alone"), ({"model": {}}, "last.pt has other weights than linknet"),
    ({"arch": "unett"}, "unett"), ({"format": 9}, "another format")])
def test_a_run_that_cannot_go_on_is_one_sentence(change, says, whole, monkeypatch, refused):
    case = load_checkpoint(whole / "last.pt") | change
    monkeypatch.setattr(train, "load_checkpoint", lambda path: case)
    assert says in refused(resume(whole))


# ---------------------------------------------------------------- a labelled set on disk

@pytest.fixture(scope="module")
def pairs(tmp_path_factory, photos, logos):
    """train/ and val/ of a small set in our own layout; in train/ also a lone mask and a broken image."""
    folder = tmp_path_factory.mktemp("pairs")
    for part, n in (("train", 6), ("val", 3)):
        assert synth.main([str(folder / part), "--images", str(photos), "--logos", str(logos),
                           "--recipe", "logo-h", "--n", str(n), "--workers", "1"]) == 0
        (folder / part / "meta.jsonl").unlink()
    for part in ("images", "masks"):
        (folder / "train" / part / "broken.png").write_bytes(b"no picture")
    shutil.copy(folder / "val" / "masks" / "0000000.png", folder / "train" / "masks" / "lone.png")
    return folder


def test_pairs_are_cut_anywhere_at_their_own_pixels_and_pure_in_seed_and_index():
    def crops(seed, image, mask):
        pictures = train.Pictures("x", "-", 1, lambda i: (image, mask, {"name": "", "notes": []}))
        return [train.Pairs(pictures, 64, seed)[i] for i in range(20)]
    diagonal = np.eye(64, dtype=np.uint8)
    for image, mask in (grey := crops(0, np.full((64, 64, 3), 7, np.uint8), diagonal)):
        assert image.shape == (3, 64, 64) and image.dtype == np.uint8 and (image == 7).all()       # no camera
        assert mask.shape == (1, 64, 64) and mask.dtype == np.uint8 and mask.any() and mask.max() == 1
    assert any(np.array_equal(mask[0], diagonal) for _, mask in grey)
    noise = np.random.default_rng(0).integers(0, 256, (200, 3000, 3), dtype=np.uint8)
    clean = [[image.tobytes() for image, _ in crops(seed, noise, np.zeros((200, 3000), np.uint8))]
             for seed in (0, 0, 1)]
    assert clean[0] == clean[1] and clean[0][0] != clean[2][0] and len(set(clean[0][:10])) == 10


def test_a_run_on_pairs(pairs, start, tmp_path, photos, logos, capfd):
    lone, alone = shutil.copytree(pairs / "train", tmp_path / "lone"), ("--pairs-share", "1")
    for folder, more, share, held_out in ((pairs / "train", (), 0.5, ("full size", 3)),            # of val/
                                          (lone, (), 0.5, ("default", 6)), (lone, alone, 1, ("full size", 6))):
        data, pictures, files = data_of(photos, logos, "--pairs", folder, *more)
        assert data.share == share and isinstance(data.second, train.Pairs) and files["pairs"] == 8
        assert (pictures.name, len(pictures)) == held_out
        assert ("chosen on pairs that it was trained on" in capfd.readouterr().err) == (share == 1)
    assert start("run", "--pairs", lone, *alone) == 0
    said = capfd.readouterr().err
    assert said.count("broken: skipped, not a readable picture") == 1 == said.count("lone: skipped")     # once


def test_the_clean_photos_beside_a_labelled_set_are_welcome(tmp_path, capfd):
    for name in ("Watermarked_image", "Mask", "Watermark_free_image"):           # CLWD's three
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    train.refuse_pairs([str(tmp_path / "Watermark_free_image" / "1.png")])
    for name in ("Watermarked_image", "Mask"):
        assert evaluation.main(["--images", str(tmp_path / name)]) == 2
        said = capfd.readouterr().err
        assert said.count("eval.py: ") == 1 and f"--pairs {tmp_path} " in said


def test_help_needs_nothing(tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    running = [subprocess.Popen([sys.executable, ROOT / f"{script}.py", "-h"], cwd=tmp_path, env=env,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for script in ("synth", "train", "predict")]           # train imports all the others
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0 and "usage:" in out and not err
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":                                            # for tests with processes of their own
    vars(train).update(SMALL)
    globals()[sys.argv[1]](*sys.argv[2:])
