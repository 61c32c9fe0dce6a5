"""Train a watermark segmenter: on a bare checkout, on your photos and logos, on a laptop or on many GPUs.

    python train.py                                                      # without data: generated backgrounds
    python train.py --images photos/ --logos logos/ --out runs/mine      # the real thing
    python train.py --resume runs/mine                                   # goes on after a stop, bit for bit
    python train.py --init weights/watermark.pt --logos mine/ --images photos/ --size 416 --steps 1000  # mine
    python train.py --steps 20 --size 64 --batch-size 4 --eval-every 10  # does it all work? under a minute
    torchrun --nproc-per-node 8 train.py --images photos/ --batch-size 256                      # many GPUs

Watch it with `tensorboard --logdir runs`. There are no epochs: sample i is a pure function of (seed, i), and
the step tells which samples it takes, so the data position is the step, and resuming is exact.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.optim import Muon, muon
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

from eval import STOP_SIGNALS, breakdown, evaluate, ignore_stop, summarise
from model import (ENCODER, SIZE, build, channels_last, from_checkpoint, keep_freed_memory, load_checkpoint,
                   pack, pick_amp, pick_device, save_checkpoint)
from synth import FONT_TYPES, OWN, Synth, find_files

WARMUP = 200               # steps of linear warm-up, or a tenth of the run where that is less
MIN_LR = 0.01              # the cosine ends at this share of the peak
LR, INIT_LR = 2e-3, 5e-4   # peak, of a new network and with --init
ENCODER_LR = 0.3           # a pretrained encoder moves slower than the fresh decoder, by this factor
WEIGHT_DECAY = 0.01
BETAS = 0.9, 0.999         # of NAdamW, which takes the biases, the norms and the depthwise convolutions
TONE = 0.15, 0.06          # an echo's contrast and brightness differ from the sample's by up to these shares
IOU_WEIGHT = 0.25          # of the soft IoU in the loss, beside the cross-entropy's 1
CLIP = 1.0                 # largest gradient norm
EMA_DECAY = 0.999          # averages over about the last thousand steps
GENERAL = 0.3              # with --init and few own logos: share of samples with ours, against forgetting
LOG_EVERY = 20             # steps
SAVE_EVERY = 180           # seconds; an evaluation can be an hour away, on a GPU half a million samples
N_EVAL = 200               # held-out photos that choose best.pt, always the same ones
EVAL_SHARE = 0.1           # of the time: in a short run, fewer photos (but eight) keep the evaluation to this
N_PICTURES = 8             # held-out samples shown in TensorBoard
METRICS = ("held_out/iou", "held_out/f1", "held_out/false_alarm_rate")     # beside the flags in TensorBoard
LOGOS = Path(__file__).parent / "logos"
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz              # timm's; see make_optimizer


def lr_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to MIN_LR."""
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return MIN_LR + (1 - MIN_LR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def loss_parts(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, 1, H, W) float32, mask (B, 1, H, W) float32 {0, 1} -> the terms of the loss, to be added:
    binary cross-entropy, and IOU_WEIGHT times the soft IoU loss, as in SLBR.

    IoU is per image, with one pixel added above and below, so that clean images count (smp's DiceLoss and
    JaccardLoss are zero there). For those it is -ln IoU (UnitBox, Yu et al. 2016), the log of the pixels
    marked: 1 - IoU is all but 1 from a few dozen on, and no longer pushes. The model card has the comparison.
    """
    bce = F.binary_cross_entropy_with_logits(logits, mask)
    prob = logits.sigmoid()
    inter = (prob * mask).sum((1, 2, 3))                                  # (B,)
    union = (prob + mask).sum((1, 2, 3)) - inter                          # (B,)
    iou = (inter + 1) / (union + 1)
    is_clean = mask.amax((1, 2, 3)) == 0
    return bce, IOU_WEIGHT * torch.where(is_clean, -iou.log(), 1 - iou).mean()


def make_optimizer(net: nn.Module, lr: float, pretrained: bool) -> Muon:
    """Muon (Jordan et al. 2024) for the convolutions, its updates as large as AdamW's would be (Liu et al.
    2025), and NAdamW for the rest. docs/LOG.md compares it with AdamW.

    timm always multiplies matrices in bf16. A processor without bf16 in hardware emulates that and takes 35
    times as long as in float32, so there they are float32 here.
    """
    has_bf16 = pick_amp("auto", next(net.parameters()).device)[0] is torch.bfloat16
    muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ,
                                              dtype=torch.bfloat16 if has_bf16 else torch.float32)
    encoder, decoder = [], []
    for name, p in net.named_parameters():
        (encoder if name.startswith("model.encoder.") else decoder).append(p)
    return Muon([{"params": encoder, "lr": lr * (ENCODER_LR if pretrained else 1)},
                 {"params": decoder, "lr": lr}], weight_decay=WEIGHT_DECAY, nesterov=True, betas=BETAS)


class Mixed(Dataset):
    """Your samples, with an even GENERAL share of general ones between them; pure in i like both."""

    def __init__(self, own: Synth, general: Synth):
        self.own, self.general = own, general

    def __getitem__(self, i: int):
        is_general = int((i + 1) * GENERAL) > int(i * GENERAL)
        return (self.general if is_general else self.own)[i]


def positions(first: int, steps: int, batch: int, rank: int, world: int, echo: int = 1) -> list[range]:
    """The sample indices of each loader batch from step `first` on, for one of `world` ranks.

    batch: samples of a rank in a step. A loader batch has batch / echo of them, since each serves in `echo`
    steps: a step takes the last `echo` loader batches. The first steps borrow the run's last ones, so that no
    sample serves less often.
    """
    n = batch // echo
    starts = ((k % steps * world + rank) * n for k in range(first - echo + 1, steps))
    return [range(start, start + n) for start in starts]


def last_batches(loader: Iterable, n: int, device: torch.device) -> Iterator[list]:
    """Yields the last n loader batches, on the device, newest first."""
    window = deque(maxlen=n)
    for batch in loader:
        window.appendleft([part.to(device, non_blocking=True) for part in batch])
        if len(window) == n:
            yield list(window)


def echo(batches: list, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Loader batches, newest first -> image (B, 3, H, W) uint8, mask (B, 1, H, W) uint8 {0, 1}.

    Data echoing (Choi et al. 2019): a sample serves in several steps and looks different in each. The newest
    stay as they were made. Older ones get another contrast and brightness; every second time, a mirror image.
    """
    images, masks = [], []
    for age, (image, mask) in enumerate(batches):
        if age % 2:
            image, mask = image.flip(3), mask.flip(3)
        if age:
            changes = rng.uniform(-1, 1, (2, len(image), 3, 1, 1)).astype(np.float32)
            contrast, brightness = torch.from_numpy(changes).to(image.device)         # (B / n, 3, 1, 1)
            image = image * (1 + TONE[0] * contrast) + 255 * TONE[1] * brightness
            image = image.round().clamp(0, 255).to(torch.uint8)
        images.append(image)
        masks.append(mask)
    return torch.cat(images), torch.cat(masks)


def update_average(averaged: list, current: list, n: torch.Tensor) -> None:
    """EMA whose memory grows with the run, so that short runs are not stuck at the initial weights."""
    decay = min(EMA_DECAY, (1 + int(n)) / (10 + int(n)))
    for old, new in zip(averaged, current):
        if old.is_floating_point():
            old.lerp_(new.to(old.dtype), 1 - decay)
        else:
            old.copy_(new)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    parser.add_argument("--images",
                        help="folder of clean photos, searched to any depth (default: generated backgrounds)")
    parser.add_argument("--logos", default=str(LOGOS), help="folder of logos (PNG with alpha) and fonts for "
                        "text marks (default: %(default)s)")
    parser.add_argument("--cut-out", action="store_true",
                        help="for logos without alpha: their pure white or black surroundings become clear")
    parser.add_argument("--size", type=int, default=256,
                        help="side of a training crop in pixels (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1),
                        help="processes that make samples (default: all cores but one)")
    # network
    parser.add_argument("--arch", default="unet", help="an smp architecture (default: %(default)s)")
    parser.add_argument("--encoder", default=ENCODER,
                        help="an smp encoder, or tu-NAME of timm (default: %(default)s)")
    parser.add_argument("--encoder-weights", help="imagenet (downloaded), none, or a file with the encoder's "
                        "tensors (default: imagenet, or none where it cannot be downloaded)")
    parser.add_argument("--init", help="start from this checkpoint with its architecture; "
                        "the learning rate falls, and a share of samples keeps the marks of logos/")
    # optimisation
    parser.add_argument("--steps", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step over all GPUs "
                        "(default: %(default)s)")
    parser.add_argument("--echo", type=int, default=1, metavar="N", help="if the GPU waits for samples: use "
                        "each in N steps, mirrored and toned differently (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="if memory runs out: take "
                        "each batch in N parts, for the same step (default: %(default)s)")
    parser.add_argument("--lr", type=float,
                        help=f"peak learning rate (default: {LR:g}, with --init {INIT_LR:g})")
    parser.add_argument("--seed", type=int, default=0,
                        help="of samples and initial weights (default: %(default)s)")
    # machine
    parser.add_argument("--device", default="auto",
                        help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                        help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile: slower start, faster steps on a GPU (on the CPU slower ones)")
    # run
    parser.add_argument("--out", default="runs/watermark", help="folder of the run (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=1000, help="steps (default: %(default)s)")
    parser.add_argument("--resume", metavar="DIR", help="go on with this run; every other flag comes from it")
    args = parser.parse_args(argv)
    if args.resume:
        last = Path(args.resume) / "last.pt"
        if not last.exists():
            raise ValueError(f"no {last}: {args.resume} is no run, or stopped before its first save")
        ours = vars(args) | load_checkpoint(last)["args"] | {"out": args.resume}
        args = argparse.Namespace(**ours)
        for name, value in vars(parser.parse_args(argv, argparse.Namespace(**ours))).items():
            if value != ours[name]:
                raise ValueError(f"--resume takes every flag from the run: leave out "
                                 f"--{name.replace('_', '-')} {value}, which was {ours[name]}")
    elif min(args.steps, args.batch_size, args.eval_every, args.echo, args.accumulate) < 1 or args.size < 32:
        raise ValueError("--steps, --batch-size, --echo, --accumulate and --eval-every must be at least 1, "
                         "--size at least 32")
    elif args.echo > args.steps:
        raise ValueError(f"--echo {args.echo} needs as many --steps, not {args.steps}")
    elif args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr} is no learning rate: it must be above 0")
    return args


def run(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("accumulate", "echo"):
        if args.batch_size % (multiple := world * getattr(args, name)):
            raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {world} processes with "
                             f"--{name} {getattr(args, name)}: make it a multiple of {multiple}")
    device, why = pick_device(args.device)
    amp, why_amp = pick_amp(args.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    say = print if rank == 0 else lambda *a, **k: None
    say(f"{device}: {why}. {str(amp or 'float32').removeprefix('torch.')}: {why_amp}.", file=sys.stderr)

    # -- network: from a run, from a checkpoint, or new
    out, start = Path(args.out), 0
    checkpoint = load_checkpoint(out / "last.pt") if args.resume else None
    if checkpoint and checkpoint.get("rng") is not None:
        raise ValueError(f"{out} was begun with another optimiser, by an older train.py: "
                         f"--init {out}/last.pt goes on from its weights")
    if checkpoint is None and (out / "last.pt").exists():
        raise ValueError(f"{out} already holds a run: --resume {out} goes on with it, "
                         "--out names another folder")
    torch.manual_seed(args.seed)                       # of the decoder's initial weights
    if checkpoint:
        net = from_checkpoint(checkpoint, ema=False)
    elif args.init:
        net = from_checkpoint(load_checkpoint(Path(args.init)))
    else:
        net = first_network(args)
    net.to(device, memory_format=torch.channels_last if channels_last(device) else torch.preserve_format)
    if world > 1 and device.type == "cuda":            # on the CPU, which lacks it, each rank sees its share
        net = convert_sync_batchnorm(net)              # timm's: torch's would drop timm's activations
    net.train()

    # -- data
    fine_tunes = args.init and Path(args.logos).resolve() != LOGOS.resolve()
    # words are among one's own marks where their font lies beside the logos
    recipe = OWN if fine_tunes and not find_files(args.logos, FONT_TYPES) else "default"
    own = train_set = Synth(args.images, args.logos, recipe, args.size, seed=args.seed, cut_out=args.cut_out)
    if fine_tunes:
        general = Synth(args.images, LOGOS, size=args.size, seed=args.seed)
        if len(own.marks.logos) < len(general.marks.logos):        # a large collection is general by itself
            train_set = Mixed(own, general)
    held_out = Synth(args.images, args.logos, recipe, held_out=True, seed=1, cut_out=args.cut_out)
    if not args.images:
        say("no --images: backgrounds are generated, which is enough to try things; "
            "photos make a far better model", file=sys.stderr)

    # -- optimisation
    pretrained = bool(args.init) or args.encoder_weights != "none"
    optimizer = make_optimizer(net, args.lr or (INIT_LR if args.init else LR), pretrained)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_at(step, args.steps))
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    # torch takes a first step that the scaler skips for a wrong order; the schedule follows the data instead
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    ema = AveragedModel(net, multi_avg_fn=update_average, use_buffers=True)
    best_iou = 0.0
    if checkpoint:
        start, best_iou = checkpoint["step"], checkpoint["best_iou"]
        ema.module.load_state_dict(checkpoint["ema"])
        ema.n_averaged.fill_(start)
        for part, state in ((optimizer, "optimizer"), (scheduler, "scheduler"), (scaler, "scaler")):
            part.load_state_dict(checkpoint[state])
    model = torch.compile(net) if args.compile else net
    if world > 1:
        # running statistics play no part in training, and only rank 0's are ever saved or scored
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    loader = DataLoader(train_set,
                        batch_sampler=positions(start, args.steps, args.batch_size // world, rank, world,
                                                args.echo),
                        num_workers=args.workers, prefetch_factor=4 if args.workers else None,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_stop)
    # a sample costs about three looks at as many pixels: forward and backward
    looks = 3 * min(args.eval_every, args.steps) * args.batch_size * (args.size / SIZE) ** 2
    n_eval = int(min(max(EVAL_SHARE * looks, 8), N_EVAL))

    # -- run folder
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        plain = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
        (out / "args.json").write_text(json.dumps(plain, indent=2))
        pending = bool(checkpoint and checkpoint.get("pending"))       # did its last evaluation not end?
        trim_log(out / "log.jsonl", start, pending)
        for left in out.glob("*.pt.tmp"):              # of a kill in the middle of a save
            left.unlink()
        board, log = SummaryWriter(out, purge_step=start + 1), (out / "log.jsonl").open("a")
        for summary in hparams(plain, dict.fromkeys(METRICS, 0)):      # its tab shows their latest values
            board.file_writer.add_summary(summary)
        say(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, "
            f"{len(own.photos)} photos, {len(own.marks.logos)} logos, {len(own.marks.fonts)} fonts; "
            f"steps {start} to {args.steps}", file=sys.stderr)

    def record(step: int, **values: float) -> None:
        values = {k: v for k, v in values.items() if math.isfinite(v)}         # NaN is no JSON
        for name, value in values.items():
            board.add_scalar(name, value, step)
        log.write(json.dumps({"step": step, **values}) + "\n")
        log.flush()
        board.flush()

    def save(name: str, step: int, pending: bool = False) -> None:
        os.fsync(log.fileno())                         # the disk never has a checkpoint without its log lines
        save_checkpoint(pack(net, ema=ema.module.state_dict(), optimizer=optimizer.state_dict(),
                             scheduler=scheduler.state_dict(), scaler=scaler.state_dict(), step=step,
                             pending=pending, best_iou=best_iou, args=plain), out / name)

    def assess(step: int) -> None:
        nonlocal best_iou
        rows = evaluate(ema.module, held_out, n_eval)
        scores = summarise(rows)
        show(board, ema.module, held_out, step)
        record(step, **{f"held_out/{k}": v for k, v in scores.items()},
               **{f"iou_by_{k}": v["iou"] for k, v in breakdown(rows).items()})
        if scores["iou"] >= best_iou:
            best_iou = scores["iou"]
            save("best.pt", step)
        save("last.pt", step)

    stop = []                                          # Ctrl-C and SIGTERM end it after the step, with a save
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop.append(1))

    # -- the loop
    if rank == 0 and pending:
        assess(start)
    bar = tqdm(last_batches(loader, args.echo, device), initial=start, total=args.steps, unit="step",
               disable=None if rank == 0 else True)
    clock = saved = time.perf_counter()
    step = timed = start
    for step, batches in enumerate(bar, start + 1):
        rng = np.random.default_rng([args.seed, step, rank])
        torch.manual_seed(int(rng.integers(2**63)))    # dropout, too, is a function of the step
        image, mask = echo(batches, rng)                                  # (B, 3, H, W), (B, 1, H, W) uint8
        optimizer.zero_grad(set_to_none=True)
        losses, n = torch.zeros(2, device=device), args.accumulate        # bce, soft IoU
        for i, (x, y) in enumerate(zip(image.chunk(n), mask.float().chunk(n)), 1):
            model.require_backward_grad_sync = i == n  # ranks exchange gradients once, after the last part
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(x)
            parts = torch.stack(loss_parts(logits.float(), y)) / n
            scaler.scale(parts.sum()).backward()
            losses += parts.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        facts = torch.cat([losses, norm.view(1), losses.new_tensor([bool(stop)])])
        if world > 1:                                  # the mean over all samples, and all stop together
            dist.all_reduce(facts)
        bce, soft_iou, norm, stopped = (facts / world).tolist()
        # an infinite gradient alone is everyday life for fp16: the scaler skips the step and scales less
        if not math.isfinite(bce + soft_iou) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise ValueError(f"loss is {bce + soft_iou} at step {step}, gradient norm {norm}, "
                             f"lr {scheduler.get_last_lr()[-1]:.2g}: try a lower --lr or --amp off"
                             + f", --init {out}/last.pt has the last good state" * (out / "last.pt").exists())
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        ema.update_parameters(net)

        last = stopped or step == args.steps
        evaluates = step % args.eval_every == 0 or step == args.steps
        if rank == 0 and (step % LOG_EVERY == 0 or last):
            rate = (step - timed) * args.batch_size / (time.perf_counter() - clock)
            clock, timed = time.perf_counter(), step
            record(step, loss=bce + soft_iou, bce=bce, soft_iou=soft_iou,
                   lr=scheduler.get_last_lr()[-1], grad_norm=norm, samples_per_s=rate,
                   made_per_s=rate / args.echo)
            bar.set_postfix(loss=f"{bce + soft_iou:.3f}", iou=f"{best_iou:.3f}", refresh=False)
        if rank == 0 and (evaluates or last or time.perf_counter() - saved > SAVE_EVERY):
            save("last.pt", step, pending=evaluates)   # before the evaluation: what ends that costs no step
            saved = time.perf_counter()
        if rank == 0 and evaluates:
            assess(step)
            clock, timed = time.perf_counter(), step
        if stopped:
            break
    if rank == 0:
        board.close()
        log.close()
    say(f"{out}: step {step} of {args.steps}, best held-out IoU {best_iou:.3f}", file=sys.stderr)
    return 130 if step < args.steps else 0


def first_network(args: argparse.Namespace) -> nn.Module:
    """A new network; sets args.encoder_weights to what it was built from, which a resumed run must know."""
    asked = args.encoder_weights
    try:
        args.encoder_weights = asked or "imagenet"
        return build(args.arch, args.encoder, args.encoder_weights)
    except ConnectionError as e:
        if asked:
            raise
        print(f"train.py: {e}. Going on from random weights, which takes far more steps.", file=sys.stderr)
        args.encoder_weights = "none"
        return build(args.arch, args.encoder)


def trim_log(path: Path, step: int, pending: bool) -> None:
    """Drops the lines that a run wrote after its last checkpoint, and half a line that a crash left.

    pending: the scores of the last step are still to come, and go too.
    """
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        half = path.with_name(path.name + ".tmp")
        records = map(json.loads, lines)
        half.write_text("".join(line for line, record in zip(lines, records) if record["step"] < step or
                                record["step"] == step and not (pending and "held_out/iou" in record)))
        os.replace(half, path)


@torch.inference_mode()
def show(board: SummaryWriter, net: nn.Module, held_out: Synth, step: int) -> None:
    """Image, truth and probability of the same held-out samples, one row each."""
    net.eval()
    rows = []
    for i in range(N_PICTURES):
        image, mask, _ = held_out.make_sample(held_out.seed, i)
        image = torch.from_numpy(image).to(net.mean.device)[None]        # (1, 3, H, W)
        prob = net(image).float().sigmoid()                               # (1, 1, H, W)
        truth = torch.from_numpy(mask).to(image.device)[None].float()
        row = torch.cat([image / 255, truth.expand(-1, 3, -1, -1), prob.expand(-1, 3, -1, -1)])
        rows.append(F.interpolate(row, (256, 256), mode="area"))
    board.add_image("image, truth, probability", make_grid(torch.cat(rows).cpu(), nrow=6), step)


def main(argv=None) -> int:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return run(parse(argv))
    except (OSError, ValueError) as e:
        tqdm.write(f"train.py: {e}", file=sys.stderr)  # on a line of its own, not behind the bar
        return 2
    finally:                                           # as it was found, for those who call main from Python
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
