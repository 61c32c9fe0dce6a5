"""Prints the speed table of docs/SPEED.md: samples per second, milliseconds per image, share of the network.

    python tests/bench.py                                    # generated photos and logos/, on a bare checkout
    python tests/bench.py --images photos/ --logos logos/    # with yours; docs/SPEED.md says which

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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval as evaluation  # noqa: E402
from model import (WEIGHTS, Segmenter, fit, keep_freed_memory, load_model, pick_amp, pick_device,  # noqa: E402
                   predict_prob, resize_prob, to_mask)
import predict  # noqa: E402
import train  # noqa: E402
from synth import RECIPES, Synth, generate_background, read_photo  # noqa: E402

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
    print(f"| {name} | {value} |", flush=True)


def start(code: str) -> str:
    """Runs it in a fresh process beside the scripts -> its stdout."""
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def peak_memory(code: str) -> str:
    """Of a fresh process that runs the code. Not ru_maxrss: a child's begins at its parent's."""
    if not Path("/proc/self/status").exists():
        return "only on Linux"
    code += "\nprint([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    return f"{int(start(code).split()[-1]) / 1024:.0f} MB"


def make_samples(synth: Synth, first: int, n: int) -> None:
    cv2.setNumThreads(0)
    for i in range(first, first + n):
        synth.make_sample(0, i)


def bench_synth(images: str, logos: str) -> None:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    row("synth start-up: files listed, split, one logo read",
        f"{1e3 * seconds(lambda: Synth(images, logos, 'reference')):.0f} ms")
    photos = Synth(images, logos).photos
    turn = cycle(photos)
    decoding = 200 / seconds(lambda: [read_photo(next(turn)) for _ in range(200)])
    row("reading photos and nothing else, one core", f"{decoding:.0f} photos/s")
    for recipe, size in [("default", 256)] + [(r, None) for r in RECIPES]:
        synth, position = Synth(images, logos, recipe, size), iter(range(10**6))
        make_samples(synth, 10**6, 600)           # logos and fonts in the cache, as after the first seconds
        rate = 200 / seconds(lambda: [synth.make_sample(0, next(position)) for _ in range(200)])
        row(f"synth {recipe}, {f'{size} px crops' if size else 'whole photos'}, one core",
            f"{rate:.0f} samples/s, {rate / decoding:.2f} of reading")
    synth, times = Synth(images, logos, size=256), []
    for n in (1, 2):
        with ProcessPoolExecutor(n, get_context("spawn")) as pool:
            times.append(seconds(lambda: list(pool.map(make_samples, [synth] * n, [0] * n, [800] * n)), 3))
    row("synth default, 256 px crops, two processes over one", f"{2 * times[0] / times[1]:.2f} x")
    row("peak memory of a synth process, 4,000 samples", peak_memory(
        f"from synth import *; s = Synth({images!r}, {logos!r}, size=256); cv2.setNumThreads(0)\n"
        "for i in range(4000): s.make_sample(0, i)"))
    cv2.setNumThreads(threads)


def bench_network(device: torch.device) -> None:
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    net, rng = load_model(WEIGHTS, device), np.random.default_rng(0)
    image = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    row("one look at 512 x 512", f"{1e3 * seconds(lambda: (predict_prob(net, image), sync()), 20):.0f} ms")


def bench_training(images: str, logos: str, device: torch.device) -> None:
    """The bare step on one cached batch, then the whole of train.py: loader, clipping, EMA, logs."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    amp, _ = pick_amp("auto", device)
    train.N_EVAL, train.N_PICTURES, train.LOG_EVERY = (1, 1), 1, 5     # steps per round
    for size, batch in ((192, 16), (256, 32)):
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        mask = (torch.rand(batch, 1, size, size, device=device) > 0.9).float()

        net = Segmenter().to(device, memory_format=torch.channels_last).train()
        optimizer, spent = train.make_optimizer(net, 1e-3, True), []

        def step():
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = net(pixels)
            sum(train.loss_parts(logits.float(), mask)).backward()
            sync()
            begin = time.perf_counter()
            optimizer.step()
            sync()
            spent.append(time.perf_counter() - begin)
            optimizer.zero_grad()
        if device.type == "cpu" and size == 192:       # once: it cannot be taken back
            row(f"training step, batch {batch} at {size} px, before keep_freed_memory",
                f"{batch / seconds(step):.1f} samples/s")
            keep_freed_memory()
        if device.type == "cpu" and amp:
            row(f"training step, batch {batch} at {size} px, before depthwise_in_float32",
                f"{batch / seconds(step):.1f} samples/s")
            train.depthwise_in_float32(net)
        bare = batch / seconds(step)
        row(f"training step, batch {batch} at {size} px", f"{bare:.1f} samples/s")
        row("of it the optimiser", f"{100 * median(spent[-ROUNDS:]) * bare / batch:.1f} %")
        with tempfile.TemporaryDirectory() as out:
            flags = ["--images", images, "--logos", logos, "--device", str(device), "--size", str(size),
                     "--encoder-weights", "none", "--batch-size", str(batch), "--out", out]
            # the first two rounds wait for the workers and live on what they made ahead
            train.main([*flags, "--steps", str(train.LOG_EVERY * (ROUNDS + 2))])
            lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        whole = median([line["samples_per_s"] for line in lines if "samples_per_s" in line][2:])
        row("the whole of train.py", f"{whole:.1f} samples/s")
        row("share of the bare step", f"{100 * whole / bare:.0f} %")
    name = f"peak memory of train.py, batch {batch} at {size} px"
    if device.type == "cuda":
        row(name, f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
    else:                                              # of a process that does nothing else
        with tempfile.TemporaryDirectory() as out:
            flags = [*flags[:-1], out, "--steps", "3", "--workers", "0"]
            row(name, peak_memory(f"import train; train.N_EVAL = 1, 1; train.main({flags!r})"))


def bench_eval(images: str, logos: str, device: torch.device) -> None:
    """Making, scoring and counting 6 x 40 pictures, over what the network alone takes for them."""
    net, forward, inside, ratios = load_model(WEIGHTS, device), evaluation.predict_prob, [], []
    sets = [Synth(images, logos, recipe, held_out=True, seed=2) for recipe in RECIPES]

    def timed(*args):
        begin = time.perf_counter()
        prob = forward(*args)                     # on the CPU, so the device has finished
        inside.append(time.perf_counter() - begin)
        return prob
    evaluation.predict_prob = timed
    for _ in range(4):                            # the first round warms up and is not counted
        inside.clear()
        begin = time.perf_counter()
        for synth in sets:
            evaluation.score(net, evaluation.marked_set(synth, 40))
        ratios.append((time.perf_counter() - begin) / sum(inside))
    evaluation.predict_prob = forward
    row("eval, 6 x 40 pictures, over the network's own time in it", f"{median(ratios[1:]):.2f}")


def bench_mask() -> None:
    prob = cv2.GaussianBlur((np.random.default_rng(0).random((443, 591)) > 0.7).astype(np.float32), (0, 0), 8)
    prob = cv2.normalize(prob, None, 0, 1, cv2.NORM_MINMAX)           # marks all over, sure and unsure ones
    H, W = 3000, 4000

    def write():
        cv2.imencode(".png", to_mask(resize_prob(prob, H, W), 0.45))
    row("resize, threshold, dilate and encode a 12-megapixel mask", f"{1e3 * seconds(write):.0f} ms")


def bench_predict(device: torch.device) -> None:
    """A folder of 12-megapixel JPEGs; then one of them from a cold start, over the bare import."""
    with tempfile.TemporaryDirectory() as folder:
        rng, photos = np.random.default_rng(0), Path(folder, "photos")
        photos.mkdir()
        for i in range(n := 24 if device.type == "cpu" else 256):
            photo = cv2.resize(generate_background(rng, 1000, 750), (4000, 3000))
            cv2.imwrite(f"{photos}/{i}.jpg", cv2.add(photo, rng.integers(0, 12, photo.shape, np.uint8)))
        argv = [str(photos), "-q", "--device", str(device)]
        net, size, threads = load_model(WEIGHTS, device), predict.BATCH[device.type], torch.get_num_threads()
        forward, spans = predict.predict_probs, []

        def timed(*args):
            begin = time.perf_counter()
            probs = forward(*args)                # on the CPU, so the device has finished
            spans.append((begin, time.perf_counter()))
            return probs

        def at_work() -> float:
            """Seconds in which at least one of the networks side by side is busy."""
            total, end = 0.0, 0.0
            for begin, until in sorted(spans):
                total, end = total + max(until - max(begin, end), 0), max(end, until)
            return total
        predict.predict_probs = timed
        args = predict.parse(argv)
        whole = seconds(lambda: (spans.clear(), list(predict.run(args, net, predict.find_images(args)))), 3)
        predict.predict_probs = forward
        row("predict.py, a folder of 12-megapixel JPEGs", f"{n / whole:.1f} photos/s")
        row("share of the time that the network is at work", f"{100 * at_work() / whole:.0f} %")
        views = [fit(np.zeros((3000, 4000, 3), np.uint8), net.size)] * size
        sides = min(torch.get_num_threads(), predict.NETWORKS) if device.type == "cpu" else 1
        torch.set_num_threads(threads // sides)
        with ThreadPoolExecutor(sides) as pool:
            bare = seconds(lambda: list(pool.map(lambda _: forward(net, views), range(n // size)))) / n
        torch.set_num_threads(threads)
        row("over the network alone, as many side by side", f"{100 * bare * n / whole:.0f} %")
        row("peak memory of that", peak_memory(f"import predict; predict.main({argv!r})"))
        codes = (f"import predict; predict.main({[f'{photos}/0.jpg']!r})",
                 "import torch, segmentation_models_pytorch")
        cold = zip(*[[seconds(lambda: start(code), 1) for code in codes] for _ in range(ROUNDS)])
        row("one of them from a cold start; torch and smp imported, nothing else",
            "{:.2f} s; {:.2f} s".format(*map(median, cold)))


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
          f"Python {platform.python_version()}\n\n| | |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            for i in range(40):
                cv2.imwrite(f"{folder}/{i}.jpg", generate_background(np.random.default_rng(i), 481, 321))
        bench_synth(args.images or folder, args.logos)
        bench_network(device)
        bench_mask()
        bench_predict(device)
        bench_eval(args.images or folder, args.logos, device)
        bench_training(args.images or folder, args.logos, device)


if __name__ == "__main__":
    main()
