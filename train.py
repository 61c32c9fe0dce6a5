"""Train a watermark segmenter: on a bare checkout, on your photos and logos, on a laptop or on many GPUs.

    python train.py                                                      # without data: generated backgrounds
    python train.py --images photos/ --logos logos/ --out runs/mine      # the real thing
    python train.py --resume runs/mine                                   # goes on after a stop
    python train.py --init weights/watermark.pt --logos mine/ --images photos/ --size 320 --steps 150  # mine
    python train.py --pairs data/CLWD/train --images photos/             # a labelled set, mixed with our own
    python train.py --steps 20 --size 64 --batch-size 4 --eval-every 10  # does it all work? under a minute
    torchrun --nproc-per-node 8 train.py --images photos/ --batch-size 256                      # many GPUs

Watch it with `tensorboard --logdir runs`. There are no epochs: sample i is a pure function of (seed, i), and
the step tells which samples it takes, so the data position is the step. A resumed run takes the same steps.
On the same machine, with the same device and number of threads, it ends with the same weights bit for bit;
a GPU, which adds up in any order, only nearly.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.optim import Muon, muon
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from eval import (VALIDATION_SEED, Pictures, breakdown, find_layout, folder_sets, marked_set, refuse_pairs,
                  score, summarise)
from model import (ENCODER, Segmenter, from_checkpoint, keep_freed_memory, load_checkpoint,
                   load_encoder, memory_format, one_way_out, pack, pick_amp, pick_device, save_checkpoint)
from synth import FONT_TYPES, OWN, Synth, crop, find_files, start_worker, warn_once

WARMUP = 200               # steps of linear warm-up, at most a tenth of the run
DECAY = 0.3                # the learning rate falls to zero over this last share of the run
LR, INIT_LR = 2e-3, 1.5e-3  # peak learning rate of a new network, and with --init
ENCODER_LR = 0.3           # a pretrained encoder moves slower than the fresh decoder, by this factor
WEIGHT_DECAY = 0.01
BETAS = 0.9, 0.999         # of NAdamW, which takes the biases, the norms and the depthwise convolutions
IOU_WEIGHT = 0.25          # of the soft IoU in the loss, beside the cross-entropy's 1
CLIP = 1.0                 # largest gradient norm
EMA_DECAY = 0.999          # averages over about the last thousand steps
GENERAL = 0.3              # share of samples with our logos, against forgetting, with --init and few own ones
LOG_EVERY = 20             # steps
SAVE_EVERY = 180           # seconds between saves: the next evaluation can be an hour away
FIRST_EVAL = 0.2           # the first evaluation comes after this share of the run, with the first best.pt
N_EVAL = 8, 200            # held-out pictures that choose best.pt, always the same ones: at least, at most
EVAL_SHARE = 0.05          # between these, as many as this share of the run's samples
N_PICTURES = 8             # held-out samples shown in TensorBoard
LOGOS = Path(__file__).parent / "logos"
LEAST = {"steps": 1, "batch_size": 1, "eval_every": 1, "size": 32, "seed": 0, "workers": 0}
MOVES = "images", "logos", "pairs", "device", "workers", "steps"       # flags that --resume takes anew
STOPS = signal.SIGINT, signal.SIGTERM      # they end a run, which is saved
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz        # timm's; see make_optimizer


def lr_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear decay to zero (Hägele et al. 2024)."""
    warmup = max(min(WARMUP, steps // 10), 1)
    return min((step + 1) / warmup, 1, (steps - step) / (DECAY * steps))


def loss_parts(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the loss: binary cross-entropy, and IOU_WEIGHT times a soft IoU loss, as in SLBR.

    logits (B, 1, H, W) float32, mask (B, 1, H, W) float32 {0, 1}. The IoU is per image. One pixel is added to
    both sides of the fraction, so that clean images count; in smp's DiceLoss and JaccardLoss they do not.
    On clean images the loss is -ln IoU (UnitBox, Yu et al. 2016), because 1 - IoU hardly grows beyond a few
    dozen wrong pixels. docs/LOG.md has the comparison.
    """
    bce = F.binary_cross_entropy_with_logits(logits, mask)
    prob = logits.sigmoid()
    inter = (prob * mask).sum((1, 2, 3))                                  # (B,)
    union = (prob + mask).sum((1, 2, 3)) - inter                          # (B,)
    iou = (inter + 1) / (union + 1)
    is_clean = mask.amax((1, 2, 3)) == 0
    return bce, IOU_WEIGHT * torch.where(is_clean, -iou.log(), 1 - iou).mean()


def make_optimizer(net: nn.Module, lr: float, pretrained: bool) -> Muon:
    """Muon for the convolutions (Jordan et al. 2024), NAdamW for the rest. docs/LOG.md compares it with AdamW.

    The updates are as large as AdamW's would be (Liu et al. 2025). timm multiplies matrices in bf16. A
    processor that only emulates bf16 takes 35 times as long as in float32, so it gets float32 here.
    """
    has_bf16 = pick_amp("auto", next(net.parameters()).device)[0] is torch.bfloat16
    muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ,
                                              dtype=torch.bfloat16 if has_bf16 else torch.float32)
    encoder, decoder = [], []
    for name, p in net.named_parameters():
        (encoder if name.startswith("model.encoder.") else decoder).append(p)
    return Muon([{"params": encoder, "lr": lr * (ENCODER_LR if pretrained else 1)},
                 {"params": decoder, "lr": lr}], weight_decay=WEIGHT_DECAY, nesterov=True, betas=BETAS)


def depthwise_in_float32(net: nn.Module) -> None:
    """On the CPU, depthwise convolutions leave autocast: oneDNN's bf16 backward takes five times as long."""
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            conv.forward = torch.autocast("cpu", enabled=False)(
                lambda x, forward=conv.forward: forward(x.float()).to(x.dtype))


class Mixed(Dataset):
    """Two data sets. An even `share` of the samples comes from the second. Sample i stays a function of i."""

    def __init__(self, first: Dataset, second: Dataset, share: float):
        self.first, self.second, self.share = first, second, share

    def __getitem__(self, i: int):
        before, after = int(i * self.share), int((i + 1) * self.share)        # samples of the second so far
        return self.second[before] if after > before else self.first[i - before]


class Pairs(Dataset):
    """Training crops of a labelled set on disk: sample i is a random pair, a pure function of (seed, i)."""

    def __init__(self, pictures: Pictures, size: int, seed: int):
        self.pictures, self.size, self.seed = pictures, size, seed

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image (3, H, W) uint8 RGB, mask (1, H, W) uint8 {0, 1}."""
        cv2.setNumThreads(0)                           # in a worker, OpenCV's threads only fight each other
        rng, n = np.random.default_rng([self.seed, i]), len(self.pictures)
        for k in (int(rng.integers(n)) + np.arange(n)) % n:        # the next one where that cannot be read
            image, mask, meta = self.pictures[k]
            for note in meta["notes"]:
                warn_once(f"--pairs, {meta['name']}: {note}")
            if image is not None:
                image, mask = crop(rng, image, mask, self.size)
                return np.ascontiguousarray(image.transpose(2, 0, 1)), mask[None]
        raise ValueError(f"none of the {n} pairs of --pairs can be read")


def make_data(args: argparse.Namespace, n_eval: int) -> tuple[Dataset, Pictures, dict[str, int]]:
    """-> training crops, the held-out pictures that choose best.pt, how many files there are of each sort.

    With --init, one's own logos come without words unless a font lies beside them, and a share of general
    samples lets the network forget less of other marks.
    """
    fine_tunes, logos = args.init and args.logos, args.logos or LOGOS
    alone = args.pairs and args.pairs_share == 1
    recipe = OWN if fine_tunes and not find_files(logos, FONT_TYPES) else "default"
    own = data = Synth(args.images, logos, recipe, args.size, seed=args.seed)
    refuse_pairs(own.photos)
    held_out = marked_set(Synth(args.images, logos, recipe, held_out=True, seed=VALIDATION_SEED), n_eval)
    files = {"photos": len(own.photos), "logos": len(own.art.logos), "fonts": len(own.art.fonts)}
    if fine_tunes:
        general = Synth(args.images, LOGOS, size=args.size, seed=args.seed)
        if files["logos"] < len(general.art.logos):              # a large collection is general by itself
            data = Mixed(own, general, GENERAL)
    if args.pairs:
        folder = Path(args.pairs).resolve()
        pairs, val = folder_sets(folder)[0], folder.with_name("val")
        data = Mixed(data, Pairs(pairs, args.size, args.seed), args.pairs_share)
        files = {"pairs": len(pairs)} | ({} if alone else files)
        if val != folder and find_layout(val):
            held_out = folder_sets(val, n_eval)[0]
        elif alone:
            held_out = folder_sets(folder, n_eval)[0]
            print(f"no val/ beside {folder}: best.pt is chosen on pairs that it was trained on",
                  file=sys.stderr)
    if not args.images and not alone:
        print("no --images: backgrounds are generated, which is enough to try things; "
              "photos make a far better model", file=sys.stderr)
    return data, held_out, files


def plan_evaluations(steps: int, every: int, batch: int) -> tuple[set[int], int]:
    """-> the steps after which held-out pictures are scored, and how many pictures."""
    first = min(every, max(int(FIRST_EVAL * steps), 1))
    return {first, *range(every, steps, every), steps}, int(np.clip(EVAL_SHARE * steps * batch, *N_EVAL))


def positions(first: int, steps: int, batch: int, rank: int, world: int) -> list[range]:
    """The sample indices of each step from `first` on, for one of `world` ranks. batch: samples of a rank."""
    starts = ((step * world + rank) * batch for step in range(first, steps))
    return [range(start, start + batch) for start in starts]


def update_average(averaged: list, current: list, n: torch.Tensor) -> None:
    """EMA whose memory grows with the run, so that short runs are not stuck at the initial weights."""
    get_ema_multi_avg_fn(min(EMA_DECAY, (1 + int(n)) / (10 + int(n))))(averaged, current, n)


def parse(argv=None) -> tuple[argparse.Namespace, dict | None]:
    """-> the flags, and the checkpoint with which --resume goes on."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # data
    add("--images", metavar="DIR", help="clean photos, at any depth (default: generated backgrounds)")
    add("--logos", metavar="DIR",
        help="logos (PNG with alpha), and fonts for text marks (default: the logos/ of this checkout)")
    add("--pairs", metavar="DIR", help="a labelled set, as eval.py reads it; all of it is trained on, and "
        "val/ beside it, where there is one, chooses best.pt")
    add("--pairs-share", type=float, default=0.5, metavar="SHARE",
        help="share of the samples that come from --pairs; 1 takes nothing else (default: %(default)s)")
    add("--size", type=int, default=256, metavar="PX", help="side of a training crop (default: %(default)s)")
    add("--workers", type=int, metavar="N", default=max((os.cpu_count() or 2) - 1, 1),
        help="processes that make samples (default: all cores but one)")
    # network
    add("--arch", default="unet", help="an smp architecture (default: %(default)s)")
    add("--encoder", default=ENCODER, help="an smp encoder, or tu-NAME of timm (default: %(default)s)")
    add("--encoder-weights", metavar="FILE", help="imagenet (downloaded), none, or a file with the encoder's "
        "tensors (default: imagenet, or none where it cannot be downloaded)")
    add("--init", metavar="FILE", help="start from this checkpoint or run's folder, with its architecture; "
        "the learning rate falls, and a share of samples keeps the marks of our logos/")
    # optimisation
    add("--steps", type=int, default=20_000, metavar="N", help="length of the run (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N",
        help="samples per step over all GPUs; lower it if memory runs out (default: %(default)s)")
    add("--lr", type=float, help=f"peak learning rate (default: {LR:g}, with --init {INIT_LR:g})")
    add("--seed", type=int, default=0, help="of samples and initial weights (default: %(default)s)")
    # machine
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="precision; auto takes what the device does fast and safely (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile: pays on a GPU in long runs, not on the CPU")
    # run
    add("--out", default="runs/watermark", metavar="DIR", help="folder of the run (default: %(default)s)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps between evaluations; the first is "
        "after a fifth of the run at the latest, the last at its end (default: %(default)s)")
    add("--resume", metavar="DIR", help="go on with this run and its flags; only "
        + ", ".join(f"--{name}" for name in MOVES) + " may be given anew")
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        last = Path(args.resume, "last.pt")
        checkpoint = load_checkpoint(last) if last.is_file() else {}
        if not checkpoint.get("args"):
            raise ValueError(f"{args.resume} holds no run that can go on: no last.pt, or weights alone")
        parser.set_defaults(**checkpoint["args"], out=args.resume, resume=args.resume)
        args, ours = parser.parse_args(argv), vars(parser.parse_args([]))
        for name, value in vars(args).items():
            if value != ours[name] and name not in MOVES:
                raise ValueError(f"--resume takes all but {', '.join(MOVES)} from the run: "
                                 f"leave out --{name.replace('_', '-')} {value}")
    if args.logos and Path(args.logos).resolve() == LOGOS.resolve():
        args.logos = None                              # the checkout's own: nobody's mark, and it may move
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    if checkpoint and args.steps < checkpoint["step"]:
        raise ValueError(f"{args.resume} has taken {checkpoint['step']} steps already: raise --steps")
    if not (0 < args.pairs_share <= 1 and 0 < (LR if args.lr is None else args.lr) < math.inf):
        raise ValueError("--lr must be above 0, --pairs-share above 0 and at most 1")
    return args, checkpoint


def new_network(args: argparse.Namespace) -> Segmenter:
    """Sets args.encoder_weights to "none" where ImageNet's were not asked for and cannot be downloaded."""
    net = Segmenter(args.arch, args.encoder)
    try:
        if args.encoder_weights != "none":
            load_encoder(net, args.encoder_weights or "imagenet")
    except ValueError as e:
        if args.encoder_weights:
            raise
        print(f"going on from random weights, which takes far more steps: {e}", file=sys.stderr)
        args.encoder_weights = "none"
    return net


@contextmanager
def open_run(out: Path, flags: dict, checkpoint: dict | None) -> Iterator[tuple]:
    """Yields TensorBoard's writer and the log, without what a crashed run wrote after its last checkpoint."""
    step, size = (checkpoint["step"], checkpoint["log_size"]) if checkpoint else (0, 0)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("ab") as log, closing(SummaryWriter(out, purge_step=step + 1)) as board:
        log.truncate(size)
        log.seek(0, os.SEEK_END)
        (out / "args.json").write_text(json.dumps(flags, indent=2))
        yield board, log


def record(board: SummaryWriter, log, step: int, values: dict[str, float]) -> None:
    values = {name: value for name, value in values.items() if math.isfinite(value)}       # NaN is no JSON
    for name, value in values.items():
        board.add_scalar(name, value, step)
    log.write(json.dumps({"step": step, **values}).encode() + b"\n")
    log.flush()
    board.flush()


def assess(board: SummaryWriter, log, net: nn.Module, pictures: Pictures, step: int, stop: list):
    """Scores the held-out pictures and shows the first ones -> IoU. None where stopped, or without a mark."""
    rows = [row for row in score(net, pictures, keep=N_PICTURES, stop=stop) if row["counts"] is not None]
    if stop or not rows:
        return None
    scores, grid = summarise([row["counts"][0] for row in rows]), []
    record(board, log, step, {f"held_out/{name}": value for name, value in scores.items()}
           | {f"iou_by_{name}": values["iou"] for name, values in breakdown(rows).items()})
    for image, truth, prob in (row["maps"] for row in rows if "maps" in row):
        maps = [image, *(np.repeat(np.uint8(255 * a)[..., None], 3, 2) for a in (truth, prob))]    # (H, W, 3)
        grid.append(np.hstack([cv2.resize(a, (256, 256), interpolation=cv2.INTER_AREA) for a in maps]))
    board.add_image("image, truth, probability", np.vstack(grid), step, dataformats="HWC")
    return None if math.isnan(scores["iou"]) else scores["iou"]


def mean_over_ranks(values: torch.Tensor, world: int) -> list[float]:
    if world > 1:
        dist.all_reduce(values)
    return (values / world).tolist()


def run(args: argparse.Namespace, checkpoint: dict | None) -> int:
    """-> exit code: 0, or 130 where a signal stopped it."""
    out, rank, world = Path(args.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if checkpoint is None and any((out / name).exists() for name in ("last.pt", "best.pt")):
        raise ValueError(f"{out} already holds a run: --resume {out} goes on with it, "
                         "--out names another folder")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {world} processes")
    device, why = pick_device(args.device)
    amp, why_amp = pick_amp(args.amp, device)
    print(f"{device}: {why}. {str(amp or 'float32').removeprefix('torch.')}: {why_amp}.", file=sys.stderr)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    evaluations, n_eval = plan_evaluations(args.steps, args.eval_every, args.batch_size)
    train_set, held_out, files = make_data(args, n_eval)

    # -- network: from a run, from a checkpoint, or new
    torch.manual_seed(args.seed)                       # of the initial weights
    net = (from_checkpoint(checkpoint, out / "last.pt", ema=False) if checkpoint else
           from_checkpoint(load_checkpoint(args.init), args.init) if args.init else new_network(args))
    net.to(device, memory_format=memory_format(device))
    if world > 1 and device.type == "cuda":            # on the CPU, which lacks it, each rank sees its share
        net = convert_sync_batchnorm(net)              # timm's: torch's would drop timm's activations
    net.train()

    # -- optimisation
    pretrained = bool(args.init) or args.encoder_weights != "none"
    optimizer = make_optimizer(net, args.lr or (INIT_LR if args.init else LR), pretrained)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    ema = AveragedModel(net, multi_avg_fn=update_average, use_buffers=True)
    parts, step, best_iou = {"ema": ema.module, "optimizer": optimizer, "scaler": scaler}, 0, None
    if checkpoint:
        step, best_iou = checkpoint["step"], checkpoint["best_iou"]
        ema.n_averaged.fill_(step)
        for name, part in parts.items():
            if checkpoint[name]:                       # {}: the scaler of a device that needs none
                part.load_state_dict(checkpoint[name])
    if device.type == "cpu" and amp:                   # after the EMA's copy, which has its own weights
        depthwise_in_float32(net)
    if args.compile:
        net.compile()
    forward = DistributedDataParallel(net) if world > 1 else net
    batches = positions(step, args.steps, args.batch_size // world, rank, world)
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers,
                        prefetch_factor=4 if args.workers else None, pin_memory=device.type == "cuda",
                        worker_init_fn=start_worker)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, "
          + ", ".join(f"{n} {sort}" for sort, n in files.items()) + f"; steps {step} to {args.steps}",
          file=sys.stderr)

    # -- the loop: save and evaluate, then take a step
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}

    def save(name: str) -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(pack(net, step=step, best_iou=best_iou, args=flags, log_size=log.tell(), **states),
                        out / name)

    stop, stopped = [], False
    for number in STOPS:                               # the run ends after the step or the picture it is at
        signal.signal(number, lambda *_: stop.append(1))
    opened = open_run(out, flags, checkpoint) if rank == 0 else nullcontext((None, None))
    with opened as (board, log), tqdm(initial=step, total=args.steps, unit="step", disable=None) as bar:
        samples, saved = iter(loader), time.perf_counter()
        clock, timed = saved, step                     # the speed is taken from there on
        while True:
            due = step in evaluations
            if rank == 0 and (stopped or due or time.perf_counter() - saved > SAVE_EVERY):
                save("last.pt")
                saved = time.perf_counter()
            if due and not stopped:
                iou = assess(board, log, ema.module, held_out, step, stop) if rank == 0 else None
                if iou is not None and (best_iou is None or iou >= best_iou):
                    best_iou = iou
                    save("best.pt")
                stopped, = mean_over_ranks(torch.tensor([float(bool(stop))], device=device), world)
                clock, timed = time.perf_counter(), step
            if stopped or step == args.steps:
                break

            # (B, 3, H, W) and (B, 1, H, W) uint8
            image, mask = (part.to(device, non_blocking=True) for part in next(samples))
            step += 1
            # dropout, too, is a function of the step
            torch.manual_seed(int(np.random.default_rng([args.seed, step, rank]).integers(2**63)))
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * lr_at(step - 1, args.steps)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = forward(image)                            # (B, 1, H, W)
            losses = torch.stack(loss_parts(logits.float(), mask.float()))         # (2,)
            scaler.scale(losses.sum()).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            # the mean over all samples, and all ranks stop together
            facts = torch.cat([losses.detach(), norm.view(1), losses.new_tensor([bool(stop)])])
            bce, soft_iou, norm, stopped = mean_over_ranks(facts, world)
            # an infinite gradient alone is normal in fp16: the scaler skips the step and scales less
            if not math.isfinite(bce + soft_iou) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise ValueError(f"loss is {bce + soft_iou} at step {step}, gradient norm {norm}: try a "
                                 f"lower --lr or --amp off, with --init {out} if it was saved before")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update_parameters(net)

            bar.update()
            if rank == 0 and (step % LOG_EVERY == 0 or step == args.steps or stopped):
                rate = (step - timed) * args.batch_size / (time.perf_counter() - clock)
                clock, timed = time.perf_counter(), step
                record(board, log, step, {"loss": bce + soft_iou, "bce": bce, "soft_iou": soft_iou,
                                          "lr": group["lr"], "grad_norm": norm, "samples_per_s": rate})
                bar.set_postfix(loss=f"{bce + soft_iou:.3f}", best_iou=best_iou, refresh=False)
    scored = "" if best_iou is None else f", best held-out IoU {best_iou:.3f}"
    print(f"{out}: step {step} of {args.steps}{scored}" + f"; --resume {out} goes on" * bool(stopped),
          file=sys.stderr)
    return 130 if stopped else 0


@one_way_out
def main(argv=None) -> int:
    rank, handlers = int(os.environ.get("RANK", 0)), {number: signal.getsignal(number) for number in STOPS}
    try:
        # rank 0 speaks for all; an error may be one rank's own and is always told
        with open(os.devnull, "w") as quiet, redirect_stderr(quiet if rank else sys.stderr):
            return run(*parse(argv))
    except (OSError, ValueError, RuntimeError) as e:
        if "DataLoader worker" not in str(e):          # torch's words where a worker fails or is killed
            raise
        raise OSError(f"a worker that makes samples failed: {str(e).strip().splitlines()[-1]}") from e
    finally:                                           # as it was found, for those who call main from Python
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
