"""The network, and everything that training and inference must agree on.

    from model import load_model, load_image, predict_prob
    net = load_model("weights/watermark.pt")           # architecture, normalisation and threshold are inside
    prob = predict_prob(net, load_image("in.jpg"))     # (H, W) float32 in [0, 1]

    python model.py import FILE --arch unet --encoder mit_b5 -o OUT    # weights of the public notebook
    python model.py export runs/x/best.pt weights/watermark.pt         # a checkpoint, small enough to release
    python model.py export runs/a runs/b mean.pt                       # the mean of two runs, often the best
    python model.py export --onnx runs/x/best.pt watermark.onnx        # for a browser or a C++ program

Read top to bottom: network, device and precision, image in, mask out, checkpoint file, command line.
"""
import argparse
import contextlib
import ctypes
import functools
import io
import math
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

with contextlib.suppress(ImportError):        # HEIC, the phones' format, where it is installed
    from pillow_heif import register_heif_opener
    register_heif_opener()

FORMAT = 1                            # version of the checkpoint dict; raise it when a key changes meaning
WEIGHTS = Path(__file__).parent / "weights" / "watermark.pt"
ENCODER = "tu-tf_efficientnet_lite0"  # plain convolutions and BatchNorm: quick on every processor
SIZE = 512                            # the network looks at SIZE x SIZE pixels, in the picture's own shape
ENLARGE = 1.5                         # smaller pictures are enlarged to SIZE, at most this many times
THRESHOLD = 0.5                       # prob from which a pixel is marked, until validation finds a better one
SURE = 0.98                           # a connected part counts if one of its pixels has this prob
SHARED = 0.5                          # threshold of a map shared by many: below it is what one of four shows
DILATE = 3 / 512                      # dilation radius per pixel of the longest side (MorphoMod uses d = 3)
MAX_PIXELS = 250_000_000              # refuse larger pictures: a decompression bomb fills the memory
DRAFT = 1.5                           # a JPEG is decoded to at least this many times the side wanted
# what pictures may be. Pillow knows more: EPS starts a program, and old formats are rarely tested.
FORMATS = "AVIF BMP DDS DIB GIF HEIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM SGI TGA TIFF WEBP".split()
PRIOR = 0.05                          # share of marked pixels that a fresh network expects before training
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- network

class Segmenter(nn.Module):
    """An smp network with random weights, its normalisation and padding inside.

    options: more arguments of smp.create_model, of JSON types. Raises ValueError with one sentence.
    `model`, `mean` and `std` keep the names of the public notebook, so that its weights import key by key.
    """

    def __init__(self, arch: str = "unet", encoder: str = ENCODER, options: dict | None = None):
        super().__init__()
        self.arch, self.encoder, self.options = arch, encoder, options or {}
        self.size, self.threshold = SIZE, THRESHOLD
        try:
            self.model = smp.create_model(arch, encoder, encoder_weights=None, **self.options)
        except Exception as e:                # smp and timm raise a dozen kinds, and name the mistake
            raise ValueError(f"no {arch} on {encoder}: {first_line(e)}") from e
        *_, last = (part for part in self.model.segmentation_head.modules() if isinstance(part, nn.Conv2d))
        nn.init.constant_(last.bias, math.log(PRIOR / (1 - PRIOR)))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, 3, H, W) uint8 RGB (or float in [0, 255]), any H and W -> logits (B, 1, H, W)."""
        H, W = image.shape[-2:]
        x = (image.float() / 255 - self.mean) / self.std
        stride = getattr(self.model.encoder, "output_stride", 32)
        # replicate, not reflect: reflection needs a picture larger than the padding
        x = F.pad(x, (0, -W % stride, 0, -H % stride), mode="replicate")   # (B, 3, H', W')
        x = x.contiguous(memory_format=memory_format(x.device))
        return self.model(x)[..., :H, :W]                                  # (B, 1, H, W)


def load_encoder(net: Segmenter, weights: str) -> None:
    """Fills the encoder, and takes the normalisation that goes with its weights.

    weights: "imagenet", which smp downloads, or a file with the encoder's state dict. A file may hold `mean`
    and `std` beside its tensors, for input in [0, 1]; ImageNet's are taken otherwise.
    Raises ValueError with one sentence.
    """
    try:
        if weights == "imagenet":             # smp wants True where timm knows the weights
            known = True if net.encoder.startswith("tu-") else weights
            state = smp.encoders.get_encoder(net.encoder, weights=known).state_dict()
            settings = smp.encoders.get_preprocessing_params(net.encoder, weights)
        else:
            state = load_checkpoint(weights)
            settings = {name: state.pop(name) for name in ("mean", "std") if name in state}
        for name in settings.keys() & {"mean", "std"}:
            getattr(net, name).copy_(torch.as_tensor(settings[name], dtype=torch.float32).view(1, 3, 1, 1))
        net.model.encoder.load_state_dict(state)
    except Exception as e:                    # smp, timm, torch and the hub raise a dozen kinds
        raise ValueError(f"encoder {net.encoder} cannot take {weights}: {first_line(e)}") from e


def fuse_batchnorm(net: nn.Module) -> nn.Module:
    """Folds each BatchNorm into the convolution before it, in place: less to compute at inference.

    timm's BatchNormAct2d is a BatchNorm with its activation inside, which stays.
    """
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (name, conv), (following, bn) in zip(children, children[1:]):
            if type(conv) in (nn.Conv2d, Conv2dSame) and type(bn) in (nn.BatchNorm2d, BatchNormAct2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, following, getattr(bn, "act", nn.Identity()))
    return net


# ---------------------------------------------------------------- device and precision

def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """-> (device, reason). name: auto, cuda, cuda:1, mps, cpu. ValueError when it is not there."""
    why = "asked for"
    if name == "auto":
        name, why = (("cuda", "a CUDA GPU was found") if torch.cuda.is_available() else
                     ("mps", "Apple's GPU was found") if torch.backends.mps.is_available() else
                     ("cpu", "no GPU was found"))
    if name == "cuda":                        # under torchrun, each process has its GPU
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:                            # the latter: built without it
        raise ValueError(f"device {name!r} is not there: {first_line(e)}") from e
    return torch.device(name), why


def pick_amp(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """-> (autocast dtype or None, reason). name: auto, bf16, fp16, off."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name], "asked for"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bf16"
    if device.type == "cuda" or device.type == "cpu" and has_cpu_bf16():
        return torch.bfloat16, "bf16 is in the hardware"
    return None, f"float32 is the safe choice on {device.type}"


def has_cpu_bf16() -> bool:
    """AMX or AVX512-BF16, and oneDNN may use it. Otherwise it emulates bf16, ten times as slow as float32."""
    checks = "_is_amx_tile_supported", "_is_avx512_bf16_supported"         # private; torch 2.4 lacks the second
    return (os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper() in ("DEFAULT", "AVX512_CORE_AMX")
            and any(getattr(torch.cpu, check, bool)() for check in checks))


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for the next step; only with glibc.

    By default glibc returns large blocks to the system, which has to zero them again. In training on a CPU
    this takes a fifth of the time (`tests/bench.py` has a row).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)                   # M_MMAP_MAX: no block of its own for anything
        libc.mallopt(-1, -1)                  # M_TRIM_THRESHOLD: never give back


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last is faster on CUDA and CPU; slow or wrong on MPS (pytorch #193349, #180984)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


# ---------------------------------------------------------------- image in

def load_image(source) -> np.ndarray:
    """Any picture as it is displayed -> (H, W, 3) uint8 RGB. source: as in read_image, or such an array."""
    if not isinstance(source, np.ndarray):
        return read_image(source)[0]
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
        raise ValueError(f"expected an (H, W, 3) uint8 array, got {source.shape} {source.dtype}")
    return source


def read_image(source, size: int | None = None) -> tuple[np.ndarray, dict]:
    """-> (H, W, 3) uint8 RGB as displayed, and facts about the file: width, height, orientation (EXIF).

    Transparency lies on white. 16-bit and float greys are scaled by their full range, never stretched per
    image. Of an animation it is the first frame. source, size, errors: see open_image.
    """
    image, facts = open_image(source, size)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        most = next((m for m in (1, 255) if image.mode == "F" and grey.max() <= m), 65535)
        image = Image.fromarray((np.clip(grey / most, 0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")), facts


def open_image(source, size: int | None = None) -> tuple[Image.Image, dict]:
    """-> a PIL image, decoded and turned by EXIF, and the facts of read_image.

    source: path, binary file or PIL image. size: the network will look at size x size pixels, so a large JPEG
    is decoded smaller, in a fraction of the time. The facts `width` and `height` are in full all the same.
    Raises OSError for a file that is no complete picture, ValueError for one over MAX_PIXELS.
    """
    Image.init()                              # all of Pillow's plugins
    Image.MAX_IMAGE_PIXELS = None             # our own limit in place of Pillow's warning
    kinds = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=kinds)
        W, H = image.size
        if W * H > MAX_PIXELS:
            raise ValueError(f"{W}x{H} is over the limit of {MAX_PIXELS} pixels")
        if size and (scale := DRAFT * size / square_side(H, W)) < 1:
            image.draft(None, (int(W * scale) + 1, int(H * scale) + 1))
        image.load()
        turn = 1
        with contextlib.suppress(Exception):  # garbage in the EXIF block is no reason to refuse the picture
            turn = image.getexif().get(0x0112, 1)                          # TIFF and HEIC are turned by now
            image = ImageOps.exif_transpose(image) if turn != 1 else image
    except UnidentifiedImageError:
        if str(source).lower().endswith((".heic", ".heif")) and "HEIF" not in kinds:
            raise OSError("HEIC is read once pillow-heif is installed: pip install pillow-heif") from None
        raise OSError("not a picture in a format that is read (JPEG, PNG, WebP, TIFF, ...)") from None
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as e:                    # Pillow's plugins raise a dozen kinds on garbage
        raise OSError(f"not a readable picture: {first_line(e)}") from e
    facts = {"width": H, "height": W} if turn in range(5, 9) else {"width": W, "height": H}
    return image, facts | ({"orientation": turn} if turn in range(2, 9) else {})


def square_side(H: int, W: int) -> float:
    """Side in pixels of the square with the same area. Very flat images, mostly padding, count as 16 : 1."""
    return max(math.sqrt(H * W), max(H, W) / 4)


def fit(image: np.ndarray, size: float, shape: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, ...) -> what the network is to see: the same with at most `size` x `size` pixels.

    Pictures under SIZE are enlarged to it, at most ENLARGE times: a letter needs its pixels (docs/LOG.md).
    shape: (H, W) in full, where `image` is decoded smaller.
    """
    H, W = shape or image.shape[:2]
    side = square_side(H, W)
    scale = min(size / side, max(min(SIZE / side, ENLARGE), 1))
    h, w = max(round(H * scale), 1), max(round(W * scale), 1)
    if (h, w) == image.shape[:2]:
        return image
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


# ---------------------------------------------------------------- mask out

@torch.inference_mode()
def predict_probs(net: Segmenter, images: list[np.ndarray]) -> np.ndarray:
    """Images of one shape, each (H, W, 3) uint8 RGB -> (B, H, W) float32 probabilities."""
    device = net.mean.device
    batch = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)      # (B, 3, H, W)
    dtype, _ = pick_amp("auto", device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = net(batch)                                                        # (B, 1, H, W)
    return logits.float().sigmoid()[:, 0].cpu().numpy()


def predict_prob(net: Segmenter, image: np.ndarray, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1]. size: see fit; None for net.size."""
    prob, = predict_probs(net, [fit(image, size or net.size)])
    return resize_prob(prob, *image.shape[:2])


def resize_prob(prob: np.ndarray, H: int, W: int) -> np.ndarray:
    """Back to the picture's own size, before the threshold, so that edges stay smooth."""
    return prob if prob.shape == (H, W) else cv2.resize(prob, (W, H), interpolation=cv2.INTER_LINEAR)


def to_mask(prob: np.ndarray, threshold: float, radius: int | None = None, feather: int = 0,
            sure: float | None = None) -> np.ndarray:
    """(H, W) probabilities -> (H, W) uint8, 255 where marked, 0 elsewhere.

    Hysteresis (Canny 1986): of the pixels from `threshold` on, the connected parts that hold one from `sure`.
    radius: of the dilation in pixels; None grows with the picture.
    feather: width in pixels of a soft edge outside of that, where 255 falls to 0; for tools that blend.
    sure: None takes SURE; 0 takes every pixel from the threshold on, which suits the mean of many maps.
    """
    sure = max(SURE if sure is None else sure, threshold)
    mask = np.uint8(prob >= threshold)
    x, y, w, h = cv2.boundingRect(mask)
    if w:
        around = np.s_[y:y + h, x:x + w]      # marks are small, and pictures large
        n, parts = cv2.connectedComponents(mask[around])                           # (h, w), 0 outside
        is_sure = np.zeros(n, np.uint8)
        is_sure[parts[prob[around] >= sure]] = 1
        mask[around] = is_sure[parts]
    mask = dilate(mask, default_dilation(*prob.shape) if radius is None else radius)
    if feather:
        distance = cv2.distanceTransform(255 - mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        mask = (255 * np.clip(1 - distance / (feather + 1), 0, 1)).round().astype(np.uint8)
    return mask


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """`radius` rounds of the 3x3 cross (MorphoMod's) in one pass: a diamond of city-block distance <= radius.

    mask (H, W) uint8 or bool, non-zero where marked -> (H, W) uint8 {0, 255}.
    """
    grown = np.uint8(mask != 0)
    grown *= 255
    x, y, w, h = cv2.boundingRect(grown)
    if radius > 0 and w:
        around = np.s_[max(y - radius, 0):y + h + radius, max(x - radius, 0):x + w + radius]
        grown[around] = (cv2.distanceTransform(255 - grown[around], cv2.DIST_L1, 3) <= radius) * np.uint8(255)
    return grown


def default_dilation(H: int, W: int) -> int:
    """Radius in pixels that grows with the picture: 3 at 512."""
    return max(1, round(DILATE * max(H, W)))


# ---------------------------------------------------------------- checkpoint file

def pack(net: Segmenter, **training) -> dict:
    """The checkpoint: a dict of plain tensors and JSON types. training: what train.py needs to go on."""
    return {"format": FORMAT, "arch": net.arch, "encoder": net.encoder, "options": net.options,
            "size": net.size, "threshold": net.threshold, "model": net.state_dict(), **training}


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Raises OSError with one sentence; what was there is kept then."""
    data = io.BytesIO()                       # torch.save would hide the reason of a failed write
    torch.save(checkpoint, data)
    with replacing(path) as file:
        file.write(data.getbuffer())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Writes a temporary file and renames it to `path` at the end. So `path` is complete, whatever kills us.

    Makes the folder where it is missing. Raises OSError with one sentence.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"cannot write {printable(str(path))}: {e.strerror or first_line(e)}") from e
    finally:
        with contextlib.suppress(OSError):    # renamed already, or never made
            os.unlink(temporary)


def find_weights(path: Path) -> Path:
    """A weights file itself; of the folder of a run best.pt, or last.pt where nothing was evaluated yet."""
    best, last = Path(path) / "best.pt", Path(path) / "last.pt"
    return best if best.is_file() else last if Path(path).is_dir() else Path(path)


def load_checkpoint(path: Path) -> dict:
    """A dict of plain tensors and JSON types, without running code of the file. path: see find_weights.

    Raises FileNotFoundError or ValueError with one sentence.
    """
    if not (path := find_weights(path)).is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:                    # torch raises a dozen kinds, and advises to run the code
        raise ValueError(f"{path} is damaged, or no file of plain tensors ({type(e).__name__})") from e


def from_checkpoint(checkpoint: dict, path: Path, ema: bool = True) -> Segmenter:
    """The network on the CPU, in float32. ema: with its averaged weights, where the checkpoint has them.

    path: named in the one sentence of a ValueError, where the checkpoint is not of our making.
    """
    try:
        if checkpoint["format"] != FORMAT or "subpixel" in checkpoint["options"]:
            raise ValueError("another format; the last commit that reads older weights is a615433")
        net = Segmenter(checkpoint["arch"], checkpoint["encoder"], checkpoint["options"])
        net.load_state_dict(ema and checkpoint.get("ema") or checkpoint["model"])
        net.size, net.threshold = checkpoint["size"], checkpoint["threshold"]
    except KeyError as e:
        raise ValueError(f"{path} is not one of our checkpoints: it has no {e} "
                         "(python model.py import takes the public notebook's)") from e
    except RuntimeError as e:                 # of load_state_dict, a line for each tensor
        raise ValueError(f"{path} has other weights than {net.arch} on {net.encoder}") from e
    except Exception as e:
        raise ValueError(f"{path} is not one of our checkpoints: {first_line(e)}") from e
    return net


def load_model(path: Path = WEIGHTS, device: torch.device | str = "cpu") -> Segmenter:
    """best.pt, last.pt, a run's folder or the released file -> the network, for inference on `device`."""
    net = from_checkpoint(load_checkpoint(path), path).eval().requires_grad_(False)
    return fuse_batchnorm(net).to(device, memory_format=memory_format(torch.device(device)))


# ---------------------------------------------------------------- command line

def export(paths: list[Path]) -> dict:
    """Checkpoints of one network -> what inference needs: the mean of their weights, in half precision.

    The mean of several runs is often better than each of them ("model soup", Wortsman et al. 2022). Vectors
    stay in float32, since a running variance may lie above 65,504, where half precision ends.
    """
    nets = [from_checkpoint(load_checkpoint(path), path) for path in paths]
    kinds = [f"{net.arch} on {net.encoder} {net.options or ''}" for net in nets]
    if len(set(kinds)) > 1:
        raise ValueError("no mean of two networks: " + ", ".join(map("{} is {}".format, paths, kinds)))
    mean = nets[0].state_dict()
    for name, value in mean.items():
        if value.is_floating_point():         # not BatchNorm's counts of batches
            value = torch.stack([net.state_dict()[name] for net in nets]).mean(0)
        mean[name] = value.half() if value.ndim > 1 else value
    return pack(nets[0], model=mean)


class OneLook(nn.Module):
    """What --onnx writes: image (B, H, W, 3) uint8 RGB, as fit() makes it -> prob (B, H, W) in [0, 1]."""

    def __init__(self, net: Segmenter):
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image.permute(0, 3, 1, 2)).sigmoid()[:, 0]


def export_onnx(path: Path) -> bytes:
    """The network for any height and width. Metadata: `size` of fit(), `threshold` and `sure` of to_mask().

    Raises ValueError where the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as e:
        raise ValueError("ONNX needs one more package: pip install onnx") from e
    net, file, sizes = load_model(path), io.BytesIO(), {0: "batch", 1: "height", 2: "width"}
    with warnings.catch_warnings():           # this exporter is the old one: the new one fixes the sizes
        warnings.simplefilter("ignore")
        torch.onnx.utils.export(OneLook(net).eval(), (torch.zeros(1, 64, 96, 3, dtype=torch.uint8),), file,
                                opset_version=17, input_names=["image"], output_names=["prob"],
                                dynamic_axes={"image": sizes, "prob": sizes})
    graph = onnx.load_from_string(file.getvalue())
    facts = {"size": net.size, "threshold": net.threshold, "sure": SURE}
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
    return graph.SerializeToString()


def printable(text: str) -> str:
    """Escapes what a sentence must not hold: newlines, a terminal's commands, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def one_way_out(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a script's main: a mistake of the user or the machine is one sentence on stderr and exit code 2.

    Ctrl-C is 130.
    """
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        name = Path(main.__code__.co_filename).name
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:                        # head leaves early, and needs no word on it
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            print(f"{name}: stopped before the end", file=sys.stderr)
            return 130
        except (OSError, ValueError, MemoryError, torch.cuda.OutOfMemoryError) as e:
            print(f"{name}: {first_line(e)}", file=sys.stderr)
            return 2
    return wrapped


@one_way_out
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="take the public notebook's .pth")
    p.add_argument("file", type=Path)
    p.add_argument("--arch", default="unet",
                   help="the architecture it was trained with (default: %(default)s)")
    p.add_argument("--encoder", default="mit_b5", help="likewise (default: %(default)s)")
    p.add_argument("-o", "--out", type=Path, required=True)
    p = commands.add_parser("export", help="strip a checkpoint for release, in half precision")
    p.add_argument("files", type=Path, nargs="+", metavar="file",
                   help="a checkpoint, or the folder of a run; of several of one network, the mean is taken")
    p.add_argument("out", type=Path)
    p.add_argument("--onnx", action="store_true",
                   help="write ONNX instead: uint8 RGB (B, H, W, 3) in, probabilities (B, H, W) out")
    args = parser.parse_args(argv)
    if args.command == "import":
        state = load_checkpoint(args.file)
        notebook = {"format": FORMAT, "arch": args.arch, "encoder": args.encoder, "options": {}, "size": SIZE,
                    "threshold": THRESHOLD, "model": state.get("state_dict", state)}
        save_checkpoint(pack(from_checkpoint(notebook, args.file)), args.out)
    elif args.onnx:
        if len(args.files) > 1:
            raise ValueError("--onnx takes one checkpoint: export their mean first")
        data = export_onnx(args.files[0])
        with replacing(args.out) as file:
            file.write(data)
    else:
        save_checkpoint(export(args.files), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
