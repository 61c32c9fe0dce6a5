import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from conftest import ROOT
from model import build, load_checkpoint, load_model, pack, save_checkpoint
from train import Positions, loss_parts, lr_at


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "N_EVAL", 6)              # one of them is clean
    monkeypatch.setattr(train, "N_PICTURES", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 1)


def flags(out, photos, logos, *more):
    return ["--images", str(photos), "--logos", str(logos), "--out", str(out), "--size", "32",
            "--batch-size", "4", "--workers", "0", "--device", "cpu", "--encoder-weights", "none",
            "--steps", "4", "--eval-every", "2", *more]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- schedule, loss, positions

def test_learning_rate():
    assert lr_at(0, 1000) == 1 / 100 and lr_at(99, 1000) == 1.0      # a tenth of a short run warms up
    assert lr_at(100, 10_000) == 101 / 200 and lr_at(199, 10_000) == 1.0
    assert abs(lr_at(5100, 10_000) - 0.505) < 1e-9 and abs(lr_at(10_000, 10_000) - 0.01) < 1e-9
    assert lr_at(0, 1) > 0
    values = [lr_at(s, 500) for s in range(500)]
    assert (all(a <= b for a, b in zip(values[:50], values[1:50]))
            and all(a >= b for a, b in zip(values[50:], values[51:])))


def test_loss_of_a_perfect_and_of_a_clean_prediction():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, :4] = 1                                                # the second image is clean
    perfect = torch.where(mask > 0, 20.0, -20.0)
    bce, dice = loss_parts(perfect, mask)
    assert bce < 1e-6 and dice < 1e-4
    alarm = perfect.clone()
    alarm[1, 0, 0, 0] = 20                                            # one false pixel on the clean image
    assert loss_parts(alarm, mask)[1] > 0.2
    logits = torch.zeros(1, 1, 2, 2)                                  # p = .5, one marked pixel of four
    bce, dice = loss_parts(logits, torch.tensor([[[[1.0, 0], [0, 0]]]]))
    assert abs(bce - np.log(2)) < 1e-6 and abs(dice - (1 - (2 * 0.5 + 1) / (2 + 1 + 1))) < 1e-6


def test_positions_cover_each_sample_once_over_ranks_and_restarts():
    whole = [i for batch in Positions(0, 6, 8, 0, 1) for i in batch]
    assert whole == list(range(48))
    ranks = [list(Positions(2, 6, 4, r, 2)) for r in range(2)]
    assert [i for a, b in zip(*ranks) for i in (*a, *b)] == whole[16:] and len(Positions(2, 6, 4, 0, 2)) == 4


def test_two_images_overfit(photos, logos):
    from synth import Synth
    torch.manual_seed(0)
    source, pairs = Synth(photos, logos, size=64), []
    for i in range(100):
        image, mask, _ = source.make_sample(0, i)
        if 0.05 < mask.mean() < 0.5:
            pairs.append((torch.from_numpy(image), torch.from_numpy(mask)))
    image, mask = (torch.stack(t) for t in zip(*pairs[:2]))
    net = build().train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(100):
        loss = sum(loss_parts(net(image), mask.float()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pred = net(image) > 0
    iou = (pred & (mask > 0)).sum() / (pred | (mask > 0)).sum()
    assert iou > 0.95


# ---------------------------------------------------------------- a run

def test_a_run_writes_what_it_promises(tmp_path, photos, logos, capsys):
    out = tmp_path / "run"
    assert train.main(flags(out, photos, logos)) == 0
    assert {"last.pt", "best.pt", "log.jsonl", "args.json"} <= {p.name for p in out.iterdir()}
    err = capsys.readouterr().err
    assert "cpu: asked for" in err and "30 photos" in err and "best held-out IoU" in err
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == 4 and last["args"]["size"] == 32 and last["best_iou"] >= 0
    load_model(out / "best.pt")
    log = read_log(out)
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4]
    events = EventAccumulator(str(out), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {"loss", "bce", "dice", "lr", "grad_norm", "samples_per_s", "held_out/iou", "held_out/f1",
            "held_out/false_alarm_rate"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in log if "loss" in r])
    assert len(events.Images("image, truth, probability")) == 2
    assert train.main(flags(out, photos, logos)) == 2                 # the folder is taken
    assert "--resume" in capsys.readouterr().err


def test_resume_is_exact(tmp_path, photos, logos, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(flags(whole, photos, logos)) == 0
    real = train.save_checkpoint

    def dies_after_step_two(checkpoint, path):
        real(checkpoint, path)
        if path.name == "last.pt" and checkpoint["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", dies_after_step_two)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(halves, photos, logos))
    monkeypatch.setattr(train, "save_checkpoint", real)
    with (halves / "log.jsonl").open("a") as f:
        f.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')            # after the checkpoint, and half a line
    assert train.main(["--resume", str(halves)]) == 0
    a, b = (load_checkpoint(f / "last.pt") for f in (whole, halves))
    for key in ("model", "ema"):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
    assert (a["best_iou"] == b["best_iou"] and a["scheduler"] == b["scheduler"]
            and torch.equal(a["rng"], b["rng"]))
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[n], b["optimizer"]["state"][k][n]) for n in state)
    strip = [[{k: v for k, v in r.items() if k != "samples_per_s"} for r in read_log(f)]
             for f in (whole, halves)]
    assert str(strip[0]) == str(strip[1])                             # str: NaN equals NaN


def test_init_takes_the_architecture_and_a_gentler_rate(tmp_path, photos, logos):
    save_checkpoint(pack(build("fpn", "resnet18")), tmp_path / "start.pt")
    out = tmp_path / "run"
    assert train.main(flags(out, photos, logos, "--init", str(tmp_path / "start.pt"), "--amp", "off",
                            "--seed", "3")) == 0
    last = load_checkpoint(out / "last.pt")
    assert (last["arch"], last["encoder"], last["args"]["seed"]) == ("fpn", "resnet18", 3)
    assert max(r["lr"] for r in read_log(out) if "lr" in r) <= 5e-4


def test_arch_encoder_lr_and_compile_reach_the_run(tmp_path, photos, logos, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    out = tmp_path / "run"
    assert train.main(flags(out, photos, logos, "--arch", "linknet", "--encoder", "resnet18", "--lr", "1e-3",
                            "--compile", "--amp", "bf16")) == 0
    assert compiled and load_checkpoint(out / "last.pt")["arch"] == "linknet"
    assert max(r["lr"] for r in read_log(out) if "lr" in r) <= 1e-3


def test_without_photos_or_hub_it_trains_all_the_same(tmp_path, logos, monkeypatch, capsys):
    def unreachable(*args):
        raise ConnectionError("no weights; --encoder-weights none trains without them")
    monkeypatch.setattr("model.download_encoder", unreachable)
    common = ["--out", str(tmp_path / "run"), "--size", "32", "--batch-size", "2", "--steps", "1",
              "--workers", "0"]
    assert train.main(common) == 0
    err = capsys.readouterr().err
    assert "backgrounds are generated" in err and "random weights" in err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["args"]["encoder_weights"] == "none"
    common[1] = str(tmp_path / "other")
    assert train.main([*common, "--encoder-weights", "imagenet"]) == 2    # asked for by name: no surprise


def test_an_infinite_loss_stops_with_a_sentence_and_keeps_the_checkpoint(
        tmp_path, photos, logos, monkeypatch, capsys):
    real, calls = train.loss_parts, []

    def explodes(logits, mask):
        calls.append(1)
        bce, dice = real(logits, mask)
        return (bce * float("nan") if len(calls) == 4 else bce), dice
    monkeypatch.setattr(train, "loss_parts", explodes)
    assert train.main(flags(tmp_path / "run", photos, logos)) == 2
    assert "loss is nan at step 4" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.parametrize("more", [["--steps", "0"], ["--images", "nowhere"], ["--device", "tpu9"],
                                  ["--init", "none.pt"], ["--arch", "unett"], ["--resume", "nowhere"]])
def test_a_users_mistake_is_one_sentence_and_exit_2(more, tmp_path, photos, logos, capsys):
    assert train.main(flags(tmp_path / "run", photos, logos, *more)) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("cpu: ")]
    assert len(err) == 1 and err[0].startswith("train.py: ")
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_the_run_goes_on(tmp_path, photos, logos):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"),
               *flags(out, photos, logos, "--steps", "100000", "--eval-every", "99999")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 90
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    step = load_checkpoint(out / "last.pt")["step"]
    assert step >= 20 and read_log(out)[-1]["step"] == step


@pytest.mark.parametrize("script", ["synth", "model", "train", "predict", "eval"])
def test_help_needs_nothing(script, tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "-h"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr
    assert not list(tmp_path.iterdir())
