"""Prints the speed table: samples per second, milliseconds per picture, share of the network in the whole.

    python tests/bench.py                                    # generated photos and logos/, on a bare checkout
    python tests/bench.py --images photos/ --logos logos/    # with yours; figures in the docs say which

Every figure is the median of several rounds in one process on an otherwise idle machine. Times of different
machines do not compare; ratios within one run do.
"""
import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model import (WEIGHTS, build, default_dilation, dilate, load_model, pick_amp, pick_device,  # noqa: E402
                   predict_prob, resize_prob)
from synth import RECIPES, Synth, generate_background  # noqa: E402
import train  # noqa: E402

ROUNDS = 5


def seconds(work, rounds: int = ROUNDS) -> float:
    """Median time of work(), after one round that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)


def row(name: str, value: str) -> None:
    print(f"{name:<58} {value:>16}", flush=True)


def bench_synth(images: str, logos: str) -> None:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    for recipe, size in [("default", 256)] + [(r, None) for r in RECIPES]:
        synth = Synth(images, logos, recipe, size)
        position = iter(range(10**6))
        time_of_40 = seconds(lambda: [synth.make_sample(0, next(position)) for _ in range(40)])
        row(f"synth {recipe}, {f'{size} px crops' if size else 'whole photos'}, one core",
            f"{40 / time_of_40:.0f} samples/s")
    cv2.setNumThreads(threads)


def bench_network(device: torch.device) -> None:
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    net = load_model(WEIGHTS, device)
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    row("released network, one picture, 512 x 512",
        f"{1e3 * seconds(lambda: (predict_prob(net, image), sync()), 20):.0f} ms")


def bench_training(images: str, logos: str, device: torch.device) -> None:
    """The bare step on one cached batch, then the whole of train.py: loader, clipping, EMA, logs."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    amp, _ = pick_amp("auto", device)
    train.N_EVAL, train.N_PICTURES, train.LOG_EVERY = 1, 1, 5          # steps per round
    for size, batch in ((192, 16), (256, 32)):
        net = build().to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        mask = (torch.rand(batch, 1, size, size, device=device) > 0.9).float()

        def step():
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = net(pixels)
            sum(train.loss_parts(logits.float(), mask)).backward()
            optimizer.step()
            optimizer.zero_grad()
            sync()
        bare = batch / seconds(step)
        row(f"training step, batch {batch} at {size} px", f"{bare:.1f} samples/s")
        with tempfile.TemporaryDirectory() as out:
            flags = ["--images", images, "--logos", logos, "--device", str(device), "--size", str(size),
                     "--batch-size", str(batch), "--encoder-weights", "none", "--out", out]
            # the first two rounds wait for the workers and live on what they made ahead
            train.main([*flags, "--steps", str(train.LOG_EVERY * (ROUNDS + 2))])
            lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        whole = median([line["samples_per_s"] for line in lines if "samples_per_s" in line][2:])
        row("the whole of train.py, likewise", f"{whole:.1f} samples/s")
        row("  share of the bare step", f"{100 * whole / bare:.0f} %")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:                                              # of a process that does nothing else
        import resource                                # not on Windows
        code = "import sys, train; train.N_EVAL = 1; train.main(sys.argv[1:])"
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([sys.executable, "-c", code, *flags[:-1], out, "--steps", "3", "--workers", "0"],
                           cwd=Path(train.__file__).parent, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
    row(f"peak memory of train.py, batch {batch} at {size} px", f"{peak / 2**30:.1f} GiB")


def bench_mask() -> None:
    prob = cv2.GaussianBlur((np.random.default_rng(0).random((341, 512)) > 0.7).astype(np.float32), (0, 0), 8)
    H, W = 3000, 4000

    def write():
        mask = dilate(resize_prob(prob, H, W) >= 0.3, default_dilation(H, W))
        cv2.imencode(".png", mask)
    row("resize, threshold, dilate and encode a 12-megapixel mask", f"{1e3 * seconds(write):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photos (default: 40 generated ones of 481 x 321)")
    parser.add_argument("--logos", default=str(Path(__file__).parents[1] / "logos"),
                        help="(default: %(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, why = pick_device(args.device)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"{device} ({why}), {pick_amp('auto', device)[0] or 'float32'}, torch {torch.__version__}, "
          f"Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            for i in range(40):
                cv2.imwrite(f"{folder}/{i}.jpg", generate_background(np.random.default_rng(i), 481, 321))
        bench_synth(args.images or folder, args.logos)
        bench_network(device)
        bench_mask()
        bench_training(args.images or folder, args.logos, device)


if __name__ == "__main__":
    main()
