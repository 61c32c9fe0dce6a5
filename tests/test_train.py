import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (parse_experiment_plugin_data,
                                                  parse_session_start_info_plugin_data)

import train
from conftest import ROOT
import eval as evaluation
import synth
from model import build, load_checkpoint, load_model, pack, save_checkpoint
from synth import Synth
from train import loss_parts, lr_at, positions


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "N_EVAL", 6)              # one of them is clean
    monkeypatch.setattr(train, "N_PICTURES", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 1)


# what the fixture does, for runs in processes of their own
START = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
torch.set_num_threads(1)
train.N_EVAL, train.N_PICTURES, train.LOG_EVERY = 6, 2, 1
"""


def flags(out, photos, logos, *more):
    return ["--images", str(photos), "--logos", str(logos), "--out", str(out), "--size", "32",
            "--batch-size", "4", "--workers", "0", "--device", "cpu", "--encoder-weights", "none",
            "--arch", "linknet", "--encoder", "tu-mobilenetv3_small_050",      # 0.4 M parameters
            "--steps", "4", "--eval-every", "2", *more]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_events(out):
    return EventAccumulator(str(out), size_guidance={"images": 0, "scalars": 0}).Reload()


def plain(value):
    """Tensors as lists, so that == compares all of a checkpoint."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def assert_same_run(a, b):
    """Bit for bit: weights, EMA, optimizer, scaler, best IoU, log lines, events."""
    for name in ("last.pt", "best.pt"):
        one, other = plain(load_checkpoint(a / name)), plain(load_checkpoint(b / name))
        differ = {key for key in one if one[key] != other[key]}
        assert differ <= {"log_size"}                                 # speeds have more or fewer digits
    logs = [[{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in read_log(out)]
            for out in (a, b)]
    assert logs[0] == logs[1]
    events = [[(e.step, e.value) for e in read_events(out).Scalars("loss")] for out in (a, b)]
    assert events[0] == events[1]


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
    bce, soft_iou = loss_parts(perfect, mask)
    assert bce < 1e-6 and soft_iou < 1e-4
    alarm = perfect.clone()
    alarm[1, 0, 0, 0] = 20                                            # one false pixel on the clean image
    assert loss_parts(alarm, mask)[1] > 0.06
    counts = torch.tensor([10.0, 100, 1000]).log1p()                  # pixels wrongly marked on a clean image
    for more, count in zip((10, 100, 1000), counts):
        wrong = torch.full((1, 1, 40, 40), -20.0)
        wrong.view(-1)[:more] = 20
        assert abs(loss_parts(wrong, torch.zeros(1, 1, 40, 40))[1] - 0.25 * count) < 1e-3
    logits = torch.zeros(1, 1, 2, 2)                                  # p = .5, one marked pixel of four
    bce, soft_iou = loss_parts(logits, torch.tensor([[[[1.0, 0], [0, 0]]]]))
    assert abs(bce - np.log(2)) < 1e-6 and abs(soft_iou - 0.25 * (1 - (0.5 + 1) / (2.5 + 1))) < 1e-6


def test_positions_cover_each_sample_once_over_ranks_and_restarts():
    whole = [i for batch in positions(0, 6, 8, 0, 1) for i in batch]
    assert whole == list(range(48))
    ranks = [positions(2, 6, 4, r, 2) for r in range(2)]
    assert [i for a, b in zip(*ranks) for i in (*a, *b)] == whole[16:] and len(ranks[0]) == 4


def test_evaluations_start_early_and_cost_a_tenth(monkeypatch):
    monkeypatch.setattr(train, "N_EVAL", 200)
    for steps, every, size, batch in ((1, 1000, 256, 32), (20, 10, 64, 4), (300, 1000, 192, 16),
                                      (1000, 1000, 416, 16), (20_000, 1000, 256, 32), (9000, 10**6, 416, 9)):
        args = train.parse(["--steps", str(steps), "--eval-every", str(every), "--size", str(size),
                            "--batch-size", str(batch)])[0]
        when, n = train.plan_evaluations(args)
        assert min(when) <= max(steps / 4, 1) and max(when) == steps
        assert set(range(every, steps, every)) <= when
        looks = 3 * steps * batch * (size / 512) ** 2                 # of which training costs
        assert n == train.MIN_EVAL or len(when) * n <= looks / 10
        assert n == train.N_EVAL or n == train.MIN_EVAL or len(when) * (n + 1) > looks / 10


def test_each_sample_serves_in_as_many_steps_as_echo_says():
    for steps, batch, n in ((10, 6, 3), (7, 4, 2), (3, 9, 3), (5, 4, 1)):
        device, served = torch.device("cpu"), []
        for rank in range(2):
            loader = [[torch.tensor(r), torch.tensor(r)] for r in positions(0, steps, batch, rank, 2, n)]
            rank_steps = [torch.cat([image for image, _ in batches]).tolist()
                          for batches in train.last_batches(loader, n, device)]
            assert [len(set(step)) for step in rank_steps] == [batch] * steps     # never twice in one batch
            served += sum(rank_steps, [])
            later = [[torch.tensor(r)] for r in positions(2, steps, batch, rank, 2, n)]      # a resumed run
            assert [torch.cat([b[0] for b in batches]).tolist()
                    for batches in train.last_batches(later, n, device)] == rank_steps[2:]
        assert sorted(served) == sorted(list(range(2 * steps * batch // n)) * n)


def test_an_echo_is_mirrored_and_toned():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(60, 180, (2, 3, 8, 8), dtype=np.uint8))
    mask = torch.from_numpy(rng.integers(0, 2, (2, 1, 8, 8), dtype=np.uint8))
    images, masks = (x.split(2) for x in train.echo([[image, mask]] * 4, rng))
    assert images[0].dtype == masks[0].dtype == torch.uint8 and torch.equal(images[0], image)
    for age, (a, b) in enumerate(zip(images, masks)):
        assert torch.equal(b, mask.flip(3) if age % 2 else mask)
        a = a.flip(3) if age % 2 else a
        for sample, toned in zip(image, a):                           # by a line for each channel
            for x, y in zip(sample.flatten(1).double(), toned.flatten(1).double()):
                slope, offset = np.polyfit(x.numpy(), y.numpy(), 1)
                assert (slope * x + offset - y).abs().max() < 1 and 0.84 < slope < 1.16 and abs(offset) < 17
    assert len({x.numpy().tobytes() for a in images for x in (a, a.flip(3))}) == 8           # all differ
    again = train.echo([[image, mask]] * 4, np.random.default_rng(1))
    assert not torch.equal(again[0], torch.cat(images)) and torch.equal(again[1], torch.cat(masks))


def test_synchronised_batchnorm_keeps_the_activations():
    net, image = build().eval(), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
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


def test_two_images_overfit(photos, logos):
    torch.manual_seed(0)
    source, pairs = Synth(photos, logos, size=64), []
    for i in range(100):
        image, mask, _ = source.make_sample(0, i)
        if 0.05 < mask.mean() < 0.5:
            pairs.append((torch.from_numpy(image), torch.from_numpy(mask)))
    image, mask = (torch.stack(t) for t in zip(*pairs[:2]))
    net = build().train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(45):
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
    assert [r["step"] for r in log if "held_out/iou" in r] == [1, 2, 4]         # a fifth, half, the end
    events = read_events(out)
    assert {"loss", "bce", "soft_iou", "lr", "grad_norm", "samples_per_s", "made_per_s",
            "held_out/iou", "held_out/f1", "held_out/false_alarm_rate"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in log if "loss" in r])
    assert len(events.Images("image, truth, probability")) == 3
    start = parse_session_start_info_plugin_data(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert start.hparams["size"].number_value == 32 and start.hparams["arch"].string_value == "linknet"
    metrics = parse_experiment_plugin_data(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content).metric_infos
    assert {m.name.tag for m in metrics} == set(train.METRICS) <= set(events.Tags()["scalars"])
    assert train.main(flags(out, photos, logos)) == 2                 # the folder is taken
    assert "--resume" in capsys.readouterr().err


def test_50_steps_are_17_and_33_bit_for_bit(tmp_path, photos, logos, monkeypatch, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ("--steps", "50", "--eval-every", "15", "--batch-size", "3", "--echo", "3",
            "--arch", "pspnet")                                       # which has dropout
    assert train.main(flags(whole, photos, logos, *more)) == 0
    real, calls, handlers = train.loss_parts, [], [signal.getsignal(n) for n in train.STOP_SIGNALS]

    def stops_at_17(logits, mask):
        calls.append(1)
        if len(calls) == 17:
            signal.raise_signal(train.STOP_SIGNALS[-1])               # SIGHUP, but on Windows
        return real(logits, mask)
    monkeypatch.setattr(train, "loss_parts", stops_at_17)
    assert train.main(flags(halves, photos, logos, *more)) == 130
    assert [signal.getsignal(n) for n in train.STOP_SIGNALS] == handlers
    assert load_checkpoint(halves / "last.pt")["step"] == 17
    with (halves / "log.jsonl").open("a") as f:
        f.write('{"step": 18, "loss": 9}\n{"step": 19, "lo')          # after the checkpoint, and half a line
    capsys.readouterr()
    assert train.main(["--resume", str(halves), "--arch", "fpn"]) == 2
    assert "leave out --arch fpn, which was pspnet" in capsys.readouterr().err
    assert train.main(["--resume", str(halves), "--steps", "50"]) == 0
    assert_same_run(whole, halves)


KILLS = START + """
import pathlib, random
whole, broken, flags = *map(pathlib.Path, sys.argv[1:3]), sys.argv[3:]
train.SAVE_EVERY = 0                                                  # save after every step
rng, real = random.Random(0), torch.save

def dies_in_save(left):
    def save(checkpoint, f):
        nonlocal left
        left -= 1
        if left:
            return real(checkpoint, f)
        f.write(b"half a checkpoint")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return save

def start(argv, before=lambda: None):
    pid = os.fork()                                                   # spares the imports
    if not pid:
        before()
        os._exit(train.main(argv))
    return os.waitpid(pid, 0)[1]                                      # the signal that ended it, if any

begun = [*flags, "--out", str(broken)]
resume = lambda: ["--resume", str(broken)] if (broken / "last.pt").exists() else begun
assert start([*flags, "--out", str(whole)]) == 0
for n in range(10):
    if n % 2:                                                         # while it writes a checkpoint
        torch.save = dies_in_save(rng.randrange(1, 5))
        assert start(resume()) == signal.SIGKILL
        assert len(list(broken.glob(".*.tmp"))) == 1
        torch.save = real
    else:                                # after so much work, by the kernel: as abrupt as kill -9
        seconds = rng.uniform(0.2, 0.8)
        assert start(resume(), lambda: signal.setitimer(signal.ITIMER_PROF, seconds)) == signal.SIGPROF
assert start(resume()) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not on Windows")
def test_killed_at_ten_moments_it_ends_the_same(tmp_path, photos, logos):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-c", KILLS, str(whole), str(broken),
               *flags(whole, photos, logos, "--steps", "30", "--eval-every", "10", "--batch-size", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, broken)
    assert sorted(p.name for p in whole.iterdir() if "events" not in p.name) == sorted(
        p.name for p in broken.iterdir() if "events" not in p.name)   # nothing is left lying about


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(tmp_path, photos, logos, monkeypatch, capsys):
    out, real = tmp_path / "run", torch.save

    def full(checkpoint, f):
        if checkpoint["step"] == 4:
            f.write(b"half")
            raise OSError(28, "No space left on device")
        real(checkpoint, f)
    monkeypatch.setattr(torch, "save", full)
    assert train.main(flags(out, photos, logos)) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(torch, "save", real)
    assert load_checkpoint(out / "last.pt")["step"] == 2 and not list(out.glob("*.tmp"))
    assert train.main(["--resume", str(out)]) == 0


# ---------------------------------------------------------------- many processes, parts of a batch

RANKS = START + r"""
import json
import torch.distributed as dist
real, leave = train.loss_parts, dist.destroy_process_group
dist.destroy_process_group = lambda: None                             # the group does not form a second time
enter = dist.init_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or enter(*a, **k)

def trouble(scenario):
    calls = []

    def loss_parts(logits, mask):
        calls.append(1)
        bce, soft_iou = real(logits, mask)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            if scenario == "signal":
                signal.raise_signal(signal.SIGTERM)
            if scenario == "nan":
                bce = bce * float("nan")
        return bce, soft_iou
    return loss_parts

for scenario, flags in json.loads(sys.argv[1]).items():
    train.loss_parts = trouble(scenario)
    os.write(1, f"{scenario}:{train.main(flags)}\n".encode())          # at once: two ranks, one pipe
leave()
"""


def torchrun(folder, scenarios):
    """Two ranks go through the scenarios {name: flags} -> what both said, and on stderr."""
    (folder / "ranks.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", str(folder / "ranks.py"), json.dumps(scenarios)],
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split()), done.stderr


def curve(out):
    return np.array([[r["bce"], r["soft_iou"]] for r in read_log(out) if "loss" in r])


def test_two_ranks_and_two_parts_take_the_steps_of_one(tmp_path, photos, logos):
    """Without BatchNorm, all three are the same; with, two ranks are two parts."""
    torch.manual_seed(0)
    save_checkpoint(pack(build("unet", "tu-convnext_atto", options={"decoder_use_norm": False})),
                    tmp_path / "start.pt")

    def more(out, *rest):
        return flags(tmp_path / out, photos, logos, "--steps", "5", "--batch-size", "8",
                     "--eval-every", "5", "--amp", "off", *rest)
    bare, parts = ("--init", str(tmp_path / "start.pt"), "--lr", "2e-3"), ("--accumulate", "2")
    for name, rest in (("one", bare), ("parts", bare + parts), ("fresh_parts", parts)):
        assert train.main(more(name, *rest)) == 0
    said, err = torchrun(tmp_path, {"bare": more("ranks", *bare), "fresh": more("fresh_ranks"),
                                    "signal": flags(tmp_path / "signal", photos, logos, "--arch", "unet",
                                                    "--encoder", train.ENCODER),        # as released
                                    "nan": flags(tmp_path / "nan", photos, logos)})
    assert said == sorted(["bare:0", "fresh:0", "signal:130", "nan:2"] * 2)
    for a, b in (("parts", "one"), ("ranks", "one"), ("fresh_ranks", "fresh_parts")):
        a, b = curve(tmp_path / a), curve(tmp_path / b)
        assert a.shape == b.shape == (5, 2) and np.ptp(b.sum(1)) > 0.01 and np.abs(a - b).max() < 1e-4
    # what stops one rank stops both
    assert load_checkpoint(tmp_path / "signal" / "last.pt")["step"] == 3
    assert load_checkpoint(tmp_path / "nan" / "last.pt")["step"] == 2
    assert err.count("loss is nan at step 3") == 2


def test_cuda_ranks_share_their_statistics(tmp_path, photos, logos):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    more = ("--steps", "20", "--batch-size", "16", "--amp", "off", "--device", "cuda")
    assert train.main(flags(tmp_path / "one", photos, logos, *more)) == 0
    torchrun(tmp_path, {"fresh": flags(tmp_path / "ranks", photos, logos, *more)})
    assert np.abs(curve(tmp_path / "ranks") - curve(tmp_path / "one")).max() < 1e-3


# ---------------------------------------------------------------- other starts

def test_init_takes_the_architecture_and_a_gentler_rate_and_learns_on(tmp_path, photos, logos):
    net = build("fpn", "tu-mobilenetv3_small_075")
    save_checkpoint(pack(net), tmp_path / "start.pt")
    out = tmp_path / "run"
    assert train.main(flags(out, photos, logos, "--init", str(tmp_path / "start.pt"), "--amp", "off",
                            "--batch-size", "8", "--seed", "3")) == 0
    last = load_checkpoint(out / "last.pt")
    assert (last["arch"], last["encoder"], last["args"]["seed"]) == ("fpn", "tu-mobilenetv3_small_075", 3)
    assert max(r["lr"] for r in read_log(out) if "lr" in r) <= train.INIT_LR
    assert all(n == 4 for k, n in last["model"].items() if k.endswith("num_batches_tracked"))
    same = {k for k, v in net.state_dict().items() if torch.equal(v, last["model"][k])}
    assert same == {"mean", "std"}


def test_a_new_network_learns_all_its_statistics(tmp_path, photos, logos):
    torch.save(build("fpn", "resnet18").model.encoder.state_dict(), tmp_path / "encoder.pt")
    assert train.main(flags(tmp_path / "run", photos, logos, "--arch", "fpn", "--encoder", "resnet18",
                            "--encoder-weights", str(tmp_path / "encoder.pt"), "--steps", "1")) == 0
    model = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert all(n == 1 for k, n in model.items() if k.endswith("num_batches_tracked"))


def test_own_marks_are_learned_beside_general_ones(tmp_path, photos, logos, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mark.png").write_bytes(next(logos.glob("*.png")).read_bytes())
    names = train.Mixed([("own", i) for i in range(700)], [("general", i) for i in range(300)], 0.3)
    mixed = [names[i] for i in range(1000)]
    assert [[name for name, _ in mixed[:n]].count("general") for n in (10, 1000)] == [3, 300]
    assert sorted(mixed) == sorted(names.first + names.second)        # each of both, once
    save_checkpoint(pack(build()), tmp_path / "start.pt")
    seen, real = [], train.DataLoader
    monkeypatch.setattr(train, "DataLoader", lambda data, **rest: seen.append(data) or real(data, **rest))
    one_step = ("--steps", "1", "--init", str(tmp_path / "start.pt"))
    assert train.main(flags(tmp_path / "a", photos, tmp_path / "mine", *one_step)) == 0
    assert train.main(flags(tmp_path / "b", photos, logos, *one_step)) == 0
    (tmp_path / "mine" / "font.ttf").write_bytes(b"none")
    assert train.main(flags(tmp_path / "c", photos, tmp_path / "mine", *one_step)) == 0
    assert [type(data) for data in seen] == [train.Mixed, Synth, train.Mixed]
    assert [data.first.recipe for data in seen[::2]] == ["own", "default"]         # words, where a font is
    monkeypatch.setattr(train, "LOGOS", tmp_path / "mine")             # one logo: fewer than one's own
    assert train.main(flags(tmp_path / "d", photos, logos, *one_step)) == 0 and type(seen[3]) is Synth


class Overflow(torch.autograd.Function):
    """Passes on, and back an infinite gradient: what fp16 does when the scale is too high."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@pytest.mark.filterwarnings("error::UserWarning")                     # a skipped first step is no news
def test_an_infinite_gradient_is_skipped_in_fp16_and_stops_otherwise(
        tmp_path, photos, logos, monkeypatch, capsys):
    real, calls = train.loss_parts, []

    def overflows_at_step_three(logits, mask):
        calls.append(1)
        return real(Overflow.apply(logits) if len(calls) == 3 else logits, mask)
    monkeypatch.setattr(train, "loss_parts", overflows_at_step_three)
    out = tmp_path / "fp16"
    assert train.main(flags(out, photos, logos, "--amp", "fp16")) == 0
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == 4 and len({r["lr"] for r in read_log(out) if "lr" in r}) == 4     # no step repeats
    taken, = {s["step"].item() for s in last["optimizer"]["state"].values() if "step" in s}
    assert 1 <= taken <= 3 and last["scaler"]["scale"] == 2.0**16 / 2**(4 - taken)     # halved by each skip
    assert all(torch.isfinite(v).all() for part in ("model", "ema") for v in last[part].values())
    calls.clear()
    assert train.main(flags(tmp_path / "off", photos, logos, "--amp", "off")) == 2
    assert "at step 3, gradient norm " in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "off" / "last.pt")["step"] == 2


def test_arch_encoder_lr_and_compile_reach_the_run(tmp_path, photos, logos, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    out = tmp_path / "run"
    assert train.main(flags(out, photos, logos, "--arch", "fpn", "--encoder", "tu-mobilenetv3_small_075",
                            "--lr", "1e-3", "--compile", "--amp", "bf16", "--steps", "2")) == 0
    last = load_checkpoint(out / "last.pt")
    assert compiled and (last["arch"], last["encoder"]) == ("fpn", "tu-mobilenetv3_small_075")
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
        bce, soft_iou = real(logits, mask)
        return (bce * float("nan") if len(calls) == 4 else bce), soft_iou
    monkeypatch.setattr(train, "loss_parts", explodes)
    assert train.main(flags(tmp_path / "run", photos, logos)) == 2
    assert "loss is nan at step 4" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.parametrize("more", [["--steps", "0"], ["--accumulate", "3"], ["--encoder", "mobilenetv2"],
                                  ["--echo", "0"], ["--echo", "3"], ["--steps", "1", "--echo", "2"],
                                  ["--lr", "-1"], ["--images", "nowhere"], ["--device", "tpu9"],
                                  ["--init", "none.pt"], ["--arch", "unett"], ["--resume", "nowhere"]])
def test_a_users_mistake_is_one_sentence_and_exit_2(more, tmp_path, photos, logos, capsys):
    assert train.main(flags(tmp_path / "run", photos, logos, *more)) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("cpu: ")]
    assert len(err) == 1 and err[0].startswith("train.py: ")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_though_it_reaches_the_workers_too(tmp_path, photos, logos):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"),
               *flags(out, photos, logos, "--steps", "100000", "--eval-every", "99999", "--workers", "1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 600
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)                             # as a terminal does
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in err
    step = load_checkpoint(out / "last.pt")["step"]
    assert step >= 20 and read_log(out)[-1]["step"] == step


def test_nohup_holds(tmp_path, photos, logos, monkeypatch):
    number, real = train.STOP_SIGNALS[-1], train.loss_parts
    monkeypatch.setattr(train, "loss_parts", lambda *a: signal.raise_signal(number) or real(*a))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert train.main(flags(tmp_path / "run", photos, logos)) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("trouble, says", [("killed", "is killed by signal: Killed"), ("photos", "photos in")])
def test_trouble_in_a_worker_is_one_sentence_and_leaves_no_process(
        trouble, says, tmp_path, photos, logos, monkeypatch, capsys):
    real, calls = train.loss_parts, []
    shutil.copytree(photos, tmp_path / "photos")

    def loss_parts(logits, mask):
        calls.append(1)
        if len(calls) == 3 and trouble == "killed":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        if len(calls) == 3 and trouble == "photos":
            shutil.rmtree(tmp_path / "photos" / "train")
        return real(logits, mask)
    monkeypatch.setattr(train, "loss_parts", loss_parts)
    assert train.main(flags(tmp_path / "run", tmp_path / "photos", logos, "--workers", "2",
                            "--steps", "99999", "--eval-every", "99999")) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(err) == 1 and says in err[0] and not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")       # torch's half-built loader
def test_workers_end_where_another_cannot_start(monkeypatch):
    real, started = multiprocessing.process.BaseProcess.start, []

    def start(process):
        started.append(process)
        if len(started) == 2:
            raise OSError(11, "Resource temporarily unavailable")
        real(process)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    loader = torch.utils.data.DataLoader(range(8), num_workers=2, worker_init_fn=evaluation.start_worker)
    with pytest.raises(OSError, match="Resource"):
        next(evaluation.iterate(loader))
    started[0].join(10)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_one_run_a_folder_and_after_kill_9_neither_lock_nor_worker(tmp_path, photos, logos, capsys):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags(
        out, photos, logos, "--steps", "100000", "--workers", "2")], stderr=subprocess.DEVNULL)
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [Path("/proc", pid) for pid in children]
    assert len(workers) >= 2
    assert train.main(["--resume", str(out)]) == 2
    assert "in use by another train.py" in capsys.readouterr().err
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(path.exists() for path in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with FileLock(out / ".lock", timeout=0):
        pass


def test_a_run_that_ended_while_this_one_began_is_kept(tmp_path, photos, logos, monkeypatch):
    out, done, real = tmp_path / "run", tmp_path / "done", train.first_network
    assert train.main(flags(done, photos, logos)) == 0
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    monkeypatch.setattr(train, "first_network", lambda args: done.rename(out) and real(args))
    assert train.main(flags(out, photos, logos)) == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "last.pt").unlink()                                        # best.pt is kept too
    assert train.main(flags(out, photos, logos)) == 2
    (out / "last.pt").write_bytes(before["last.pt"])

    make_data = train.make_data                                       # it saves while this one starts
    monkeypatch.setattr(train, "make_data", lambda *args: os.utime(out / "last.pt", (1, 1)) or make_data(*args))
    assert train.main(["--resume", str(out)]) == 2


STOPPED_WHILE_IT_EVALUATES = START + """
import eval
real, calls = eval.predict_prob, []
def predict_prob(*args):
    calls.append(1)
    if len(calls) == 1:
        os.killpg(0, signal.SIGTERM)                                  # as `timeout` does: the workers too
    return real(*args)
eval.predict_prob, train.N_EVAL = predict_prob, 16
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_stop_in_an_evaluation_ends_it_and_the_resumed_run_repeats_it(tmp_path, photos, logos):
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", STOPPED_WHILE_IT_EVALUATES, *flags(out, photos, logos)],
                          cwd=ROOT, start_new_session=True, capture_output=True, text=True, timeout=600)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert not any("held_out/iou" in line for line in read_log(out))
    assert load_checkpoint(out / "last.pt")["step"] == 1 and not (out / "best.pt").exists()
    assert "IoU" not in done.stderr                                   # nothing was scored
    assert len(load_model(out).state_dict()) > 0                      # and the folder serves as weights
    assert train.main(["--resume", str(out)]) == 0
    assert train.main(flags(whole, photos, logos)) == 0
    assert_same_run(whole, out)


def test_an_evaluation_that_fails_costs_no_step(tmp_path, photos, logos, monkeypatch, capsys):
    def score(*args, **kwargs):
        raise ValueError("none of the 3 photos can be read")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(flags(whole, photos, logos)) == 0
    with monkeypatch.context() as broken:
        broken.setattr(train, "score", score)
        assert train.main(flags(halves, photos, logos)) == 2
    assert "none of the 3 photos" in capsys.readouterr().err
    assert load_checkpoint(halves / "last.pt")["step"] == 1
    assert train.main(["--resume", str(halves)]) == 0
    assert_same_run(whole, halves)                                    # the scores are made up for


# ---------------------------------------------------------------- runs that move, runs that are damaged

def test_a_run_moves(tmp_path, photos, logos, monkeypatch, capsys):
    """Its photos, the checkout and the number of workers are others, and it ends as it would have."""
    whole, out, real, calls = tmp_path / "whole", tmp_path / "moved", train.loss_parts, []
    shutil.copytree(photos, tmp_path / "before")

    def stops_at_two(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    assert train.main(flags(whole, photos, logos)) == 0
    with monkeypatch.context() as m:
        m.setattr(train, "loss_parts", stops_at_two)
        assert train.main(flags(tmp_path / "run", tmp_path / "before", logos)) == 130
    (tmp_path / "run").rename(out)
    (tmp_path / "before").rename(tmp_path / "after")
    shutil.copytree(logos, tmp_path / "checkout" / "logos")
    monkeypatch.setattr(train, "LOGOS", tmp_path / "checkout" / "logos")
    assert load_checkpoint(out / "last.pt")["args"]["logos"] is None             # the checkout's own
    capsys.readouterr()
    resume = ["--resume", str(out)]
    assert train.main(resume) == 2 and "before is not a folder" in capsys.readouterr().err
    for flag, value, was in (("--arch", "fpn", "linknet"), ("--steps", "5", "4"), ("--seed", "1", "0")):
        assert train.main([*resume, flag, value]) == 2
        assert f"leave out {flag} {value}, which was {was}" in capsys.readouterr().err
    moved = ["--images", str(tmp_path / "after"), "--workers", "1", "--device", "auto", "--accumulate", "2",
             "--logos", str(tmp_path / "checkout" / "logos")]
    shutil.copytree(out, tmp_path / "parts")
    with monkeypatch.context() as m:                                  # and to a device of another precision
        m.setattr(train, "pick_amp", lambda *a: (torch.float16, "another device"))
        assert train.main(["--resume", str(tmp_path / "parts"), *moved]) == 0
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["scaler"]["scale"] > 0
    moved[4:8] = ["--device", "cpu"]
    assert train.main([*resume, *moved]) == 0
    assert "other samples" not in capsys.readouterr().err
    for name in ("last.pt", "best.pt"):
        one, other = (plain(load_checkpoint(folder / name)) for folder in (whole, out))
        assert {key for key in one if one[key] != other[key]} <= {"log_size", "args"}
    next((tmp_path / "after" / "train").iterdir()).unlink()
    assert train.main([*resume, "--images", str(tmp_path / "after")]) == 0
    err = capsys.readouterr().err
    assert "'photos': 30" in err and "'photos': 29" in err and "other samples" in err


def test_a_damaged_run_is_one_sentence(tmp_path, photos, logos, monkeypatch, capsys):
    assert train.main(flags(tmp_path / "run", photos, logos, "--steps", "1")) == 0
    path = tmp_path / "run" / "last.pt"
    good = load_checkpoint(path) | {"step": 0}
    args, optimizer = good["args"], good["optimizer"]
    state = {k: {n: torch.zeros(7) for n in v} for k, v in optimizer["state"].items()}
    released = load_checkpoint(ROOT / "weights" / "watermark.pt")
    cases = [good | {key: value} for key, value in [
        ("args", None), ("args", [1]), ("args", {}), ("args", args | {"stranger": 1}), ("optimizer", None),
        ("optimizer", {}), ("optimizer", optimizer | {"state": state}),
        ("optimizer", optimizer | {"state": {0: 1}}), ("optimizer", optimizer | {"param_groups": []}),
        ("ema", None), ("ema", {}), ("ema", [1]), ("model", {}),
        ("step", "0"), ("step", 2), ("step", -1), ("step", 0.5), ("step", None), ("best_iou", "x"),
        ("log_size", None), ("log_size", -1), ("files", 3), ("options", None), ("arch", 3),
        ("threshold", "x"), ("threshold", 2.0), ("size", None), ("size", 0), ("format", 9)]]
    cases += [good | {"args": args | {key: value}} for key, value in [
        ("steps", 1.0), ("steps", "1"), ("lr", "x"), ("size", 0), ("images", 3), ("amp", "x"), ("arch", None),
        ("seed", -1), ("compile", "no"), ("accumulate", 7)]]
    capsys.readouterr()
    for case in [*cases, released]:
        with monkeypatch.context() as m:
            m.setattr("model.load_plain", lambda path: case)          # spares the disk
            assert train.main(["--resume", str(tmp_path / "run")]) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("cpu: ")]
        assert len(err) == 1 and err[0].startswith("train.py: "), err
    torch.save(good | {"step": 1}, path)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('garbage\n{"step": 1, "lo')
    assert train.main(["--resume", str(tmp_path / "run")]) == 0 and len(read_log(tmp_path / "run")) == 2


# ---------------------------------------------------------------- a labelled set on disk

@pytest.fixture(scope="module")
def pairs(tmp_path_factory, photos, logos):
    """train/ and val/ of a small set in our own layout; in train/ also a lone mask and a broken image."""
    folder = tmp_path_factory.mktemp("pairs")
    for part, n in (("train", 6), ("val", 3)):
        assert synth.main([str(folder / part), "--images", str(photos), "--logos", str(logos),
                           "--recipe", "logo-h", "--n", str(n), "--workers", "1"]) == 0
        (folder / part / "meta.jsonl").unlink()
    (folder / "train" / "images" / "broken.png").write_bytes(b"no picture")
    (folder / "train" / "masks" / "broken.png").write_bytes(b"no picture")
    shutil.copy(folder / "val" / "masks" / "0000000.png", folder / "train" / "masks" / "lone.png")
    return folder


def test_pairs_are_crops_of_themselves(pairs, capsys):
    pictures = evaluation.folder_sets(pairs / "train")[0]
    data = train.Pairs(pictures, 64, seed=0)
    seen = set()
    for i in range(40):
        image, mask = data[i]
        assert image.shape == (3, 64, 64) and mask.shape == (1, 64, 64)
        assert image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1} and mask.any()
        assert all(np.array_equal(a, b) for a, b in zip(data[i], (image, mask)))
        seen.add(image.tobytes())
    assert len(seen) > 30 and not np.array_equal(train.Pairs(pictures, 64, seed=1)[0][0], data[0][0])
    err = capsys.readouterr().err
    assert err.count("not a readable picture: broken") == 1 == err.count(": lone")    # each told, and once


def test_pairs_keep_their_pixels_and_clean_ones_are_cut_anywhere():
    def pictures(image, mask):
        return evaluation.Pictures("x", "-", 1, lambda i: (image, mask, {"name": "", "notes": []}))
    mask = np.eye(64, dtype=np.uint8)
    crops = [train.Pairs(pictures(np.full((64, 64, 3), 7, np.uint8), mask), 64, 0)[i] for i in range(20)]
    assert all((image == 7).all() for image, _ in crops)                         # no camera
    assert any(np.array_equal(crop[0], mask) for _, crop in crops)
    noise = np.random.default_rng(0).integers(0, 256, (200, 3000, 3), dtype=np.uint8)
    clean = train.Pairs(pictures(noise, np.zeros((200, 3000), np.uint8)), 64, 0)
    assert len({clean[i][0].tobytes() for i in range(10)}) == 10


def test_a_run_on_pairs(pairs, tmp_path, photos, logos, monkeypatch, capsys):
    seen, real = [], train.DataLoader
    monkeypatch.setattr(train, "DataLoader", lambda data, **rest: seen.append(data) or real(data, **rest))
    monkeypatch.setattr(train, "score", lambda net, pictures, **rest: seen.append(pictures) or [])
    train_only = tmp_path / "train"
    shutil.copytree(pairs / "train", train_only)
    for name, more in (("mixed", ["--pairs", str(pairs / "train")]), ("alone", ["--pairs", str(train_only),
                       "--pairs-share", "1"]), ("half", ["--pairs", str(train_only)])):
        assert train.main(flags(tmp_path / name, photos, logos, "--steps", "1", *more)) == 0
    (mixed, val), (alone, own), (half, composites) = seen[:2], seen[2:4], seen[4:]
    assert (mixed.share, alone.share, half.share) == (0.5, 1, 0.5) and isinstance(mixed.second, train.Pairs)
    assert [len(p) for p in (val, own, composites)] == [3, 6, 6] and val[0][2]["name"] == "0000000"
    assert composites.name == "default"
    assert "chosen on pairs that it was trained on" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "alone" / "last.pt")["files"] == {"pairs": 8}
    assert train.main(flags(tmp_path / "x", photos, logos, "--pairs", str(photos))) == 2


@pytest.mark.parametrize("script", [train, evaluation])
def test_a_labelled_set_is_no_folder_of_clean_photos(script, pairs, logos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(["--images", str(pairs), "--logos", str(logos)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith(script.__name__)]
    assert len(err) == 1 and f"--pairs {pairs}" in err[0]
    assert not (tmp_path / "runs").exists()
    monkeypatch.chdir(pairs / "val" / "images")                       # as seen from inside
    assert script.main(["--images", ".", "--logos", str(logos)]) == 2
    assert f"--pairs {pairs / 'val'} " in capsys.readouterr().err


def test_the_clean_photos_beside_a_labelled_set_are_welcome(tmp_path):
    for name in ("Watermarked_image", "Mask", "Watermark_free_image"):           # CLWD's three
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    evaluation.refuse_pairs([str(tmp_path / "Watermark_free_image" / "1.png")])
    for name in ("Watermarked_image", "Mask"):
        with pytest.raises(ValueError, match="labelled set"):
            evaluation.refuse_pairs([str(tmp_path / name / "1.png")])


def test_help_needs_nothing(tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    running = [subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), "-h"], cwd=tmp_path, env=env,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for script in ("synth", "train", "predict")]                   # train imports all the others
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0 and "usage:" in out and not err
    assert not list(tmp_path.iterdir())
