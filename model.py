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
import difflib
import errno
import functools
import io
import math
import os
import pickle
import platform
import sys
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import timm
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
# what a checkpoint holds: about the network, then about the run, which is None in released weights
NETWORK = {"format": int, "arch": str, "encoder": str, "options": dict, "size": int, "threshold": float,
           "model": dict}
RUN = {"ema": dict, "optimizer": dict, "scaler": dict, "step": int, "best_iou": float, "args": dict,
       "files": dict, "log_size": int}
WEIGHTS = Path(__file__).parent / "weights" / "watermark.pt"
ENCODER = "tu-tf_efficientnet_lite0"  # plain convolutions and BatchNorm: quick on every processor
OLD_NETWORK = "a615433"               # the last commit that reads the weights before these
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
MOST = 1024                           # no number in a checkpoint's options is larger
SENTENCE = 300                        # letters of an error's sentence: it may quote a damaged file
UNWRITTEN = errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO         # the reader has left, a full disk
# RuntimeErrors of torch that are the machine's fault; others are the program's, and their traceback tells more
NO_MEMORY = "DataLoader worker (pid", "CUDA out of memory", "MPS backend out of memory", "[enforce fail at alloc"
PRIOR = 0.05                          # share of marked pixels that a fresh network expects before training
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- network

class Segmenter(nn.Module):
    """An smp network with its normalisation and padding inside.

    `model`, `mean` and `std` keep the names of the public notebook's Lightning module, so that its weights
    import key by key.
    """

    def __init__(self, arch: str, encoder: str, options: dict | None = None):
        super().__init__()
        self.arch, self.encoder, self.options = arch, encoder, options or {}
        self.size, self.threshold = SIZE, THRESHOLD
        self.model = smp.create_model(arch, encoder, encoder_weights=None, in_channels=3, classes=1,
                                      **self.options)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, 3, H, W) uint8 RGB (or float in [0, 255]), any H and W -> logits (B, 1, H, W)."""
        H, W = image.shape[-2:]
        x = (image.float() / 255 - self.mean) / self.std
        stride = getattr(self.model.encoder, "output_stride", 32)
        # replicate, not reflect: reflection needs a picture larger than the padding
        x = F.pad(x, (0, -W % stride, 0, -H % stride), mode="replicate")   # (B, 3, H', W')
        x = x.contiguous(
            memory_format=torch.channels_last if channels_last(x.device) else torch.contiguous_format)
        return self.model(x)[..., :H, :W]                                  # (B, 1, H, W)


def build(arch: str = "unet", encoder: str = ENCODER, encoder_weights: str = "none",
          options: dict | None = None) -> Segmenter:
    """A new network.

    encoder_weights: "imagenet" (downloaded by smp), "none" or a file with a state dict of the encoder.
    A file may hold `mean` and `std` beside its tensors, for input in [0, 1]; ImageNet's are taken otherwise.
    Raises ValueError with one sentence where a name is unknown or a file does not fit, ConnectionError where
    the weights cannot be downloaded.
    """
    known = smp.encoders.get_encoder_names()
    # timm would also take hf-hub:NAME, and ask the network
    if encoder not in known and not (encoder.startswith("tu-") and timm.is_model(encoder[3:])):
        close = difflib.get_close_matches(encoder, known, n=5, cutoff=0.5)
        raise ValueError(f"unknown encoder {encoder!r}{'; close to it: ' * bool(close)}{', '.join(close)}; "
                         f"timm's go by tu-NAME; smp has {', '.join(known)}")
    try:
        net = Segmenter(arch, encoder, options)
    except KeyError as e:                     # smp's own sentence lists the architectures
        raise ValueError(e.args[0]) from e
    except Exception as e:                    # smp and timm raise a dozen kinds
        raise ValueError(f"smp cannot build {arch} on {encoder}: {first_line(e)}") from e
    *_, last = (part for part in net.model.segmentation_head.modules() if isinstance(part, nn.Conv2d))
    nn.init.constant_(last.bias, math.log(PRIOR / (1 - PRIOR)))
    if encoder_weights == "none":
        return net
    state, settings = ((load_plain(encoder_weights), {}) if Path(encoder_weights).is_file() else
                       download_encoder(encoder, encoder_weights))
    try:
        for name in ("mean", "std"):
            if (value := state.pop(name, settings.get(name))) is not None:
                getattr(net, name).copy_(torch.as_tensor(value, dtype=torch.float32).view(1, 3, 1, 1))
        net.model.encoder.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as e:
        raise ValueError(f"{encoder_weights} does not hold the weights of encoder {encoder}: "
                         f"{first_line(e)}") from e
    return net


def download_encoder(encoder: str, name: str) -> tuple[dict, dict]:
    """The encoder's published weights through smp, and its input settings.

    Raises ConnectionError within seconds where the hub cannot be reached, ValueError for a name smp lacks.
    """
    import huggingface_hub
    try:                                      # smp itself would retry for 23 s and print a stack of warnings
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=4).close()
    except urllib.error.HTTPError:
        pass                                  # an answer, if an unfriendly one: the hub is there
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True       # a copy in the cache still serves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = smp.encoders.get_encoder(encoder, weights=name).state_dict()
        return state, smp.encoders.get_preprocessing_params(encoder, name)
    except Exception as e:                    # smp, timm and hub raise a dozen kinds, all the same to a user
        kind = ConnectionError if huggingface_hub.constants.HF_HUB_OFFLINE else ValueError
        raise kind(f"no weights {name!r} for encoder {encoder} ({first_line(e).rstrip('.')}); "
                   "--encoder-weights none trains without them, "
                   "--encoder-weights FILE takes a local file") from e


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
    own = int(os.environ.get("LOCAL_RANK", 0))                 # under torchrun, each process has its GPU
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", own), "a CUDA GPU was found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple's GPU was found"
        return torch.device("cpu"), "no GPU was found"
    try:
        device = torch.device("cuda", own) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {name!r} is not there: {first_line(e)}") from e
    return device, "asked for"


def pick_amp(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """-> (autocast dtype or None, reason). name: auto, bf16, fp16, off."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16 in hardware"
        return torch.float16, "this GPU has no bf16"
    if device.type == "cpu" and has_cpu_bf16():
        return torch.bfloat16, "this CPU has AMX, or AVX512-BF16 that pays"
    return None, f"float32 is the safe choice on {device.type}"


def has_cpu_bf16() -> bool:
    """Is bf16 faster than float32? With AMX, or with AVX512-BF16 where a core does more of it in a cycle.

    Intel's do not: on a Xeon with its AMX hidden, bf16 lost to float32. Without either, or where oneDNN is
    told to leave them alone, oneDNN emulates bf16 and takes ten times as long as in float32.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper() not in ("DEFAULT", "AVX512_CORE_AMX"):
        return False
    amx, avx = (getattr(torch.cpu, check, bool)()            # private, and younger than torch 2.4
                for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return amx or avx and "GenuineIntel" not in cpu_name()


def cpu_name() -> str:
    """The processor's name and maker, "" where the system does not tell."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else platform.processor()


def keep_freed_memory() -> None:
    """On the CPU, this process keeps the memory it frees and uses it again at the next step.

    By default glibc returns every large block to the system, which then has to zero it page by page: in
    training a fifth of the time (`tests/bench.py` has a row). Elsewhere this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)                   # M_MMAP_MAX: no block of its own for anything
        libc.mallopt(-1, -1)                  # M_TRIM_THRESHOLD: never give back


def channels_last(device: torch.device) -> bool:
    """Faster on CUDA and CPU; slow or wrong on MPS (pytorch #193349, #180984)."""
    return device.type != "mps"


# ---------------------------------------------------------------- image in

def load_image(source) -> np.ndarray:
    """Any picture as it is displayed -> (H, W, 3) uint8 RGB.

    source: path, binary file, PIL image or HWC uint8 array. EXIF orientation is applied, transparency lies on
    white, 16-bit and float greys are scaled by their full range (never stretched per image), of an animation
    the first frame.
    Raises OSError for a file that is no complete picture, ValueError for one over MAX_PIXELS.
    """
    if not isinstance(source, np.ndarray):
        return read_image(source)[0]
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
        raise ValueError(f"expected an (H, W, 3) uint8 array, got {source.shape} {source.dtype}")
    return source


def read_image(source, size: int | None = None) -> tuple[np.ndarray, dict]:
    """As load_image -> the image, and facts about the file.

    size: the network will look at size x size pixels, so a large picture is made smaller, though not by all of
    the way: a JPEG as it is decoded, which takes a fraction of the time. None gives it in full.
    facts: width and height of the displayed picture in full; orientation (EXIF) where it is turned; pages where
    there are several.
    """
    with readable(source):
        file, full = open_image(source, size)
        file.load()
        facts = {}
        try:
            turn = file.getexif().get(0x0112)     # TIFF and HEIC are turned by now
            facts |= {"orientation": turn} if turn in range(2, 9) else {}
            image = ImageOps.exif_transpose(file) if facts else file
        except Exception:                         # garbage in the EXIF block is no reason to refuse the picture
            image = file
        W, H = full or image.size
        if full and facts.get("orientation", 1) > 4:
            W, H = H, W
        facts |= {"width": W, "height": H}
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
            grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            full = (1 if image.mode == "F" and grey.max() <= 1
                    else 255 if grey.max() <= 255 and image.mode == "F" else 65535)
            image = Image.fromarray((np.clip(grey / full, 0, 1) * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        if size and (times := int(square_side(*image.size) / (DRAFT * size))) > 1:
            image = image.reduce(times)           # before it is an array, which takes three times the memory
        pixels = np.asarray(image)
        with contextlib.suppress(Exception):      # garbage after the first page; in MPO, a phone's depth map
            facts |= {"pages": file.n_frames} if file.format != "MPO" and file.n_frames > 1 else {}
        return pixels, facts


@contextlib.contextmanager
def readable(source) -> Iterator[None]:
    """Pillow's plugins raise a dozen kinds of errors on garbage. They become OSError; ValueError stays."""
    try:
        yield
    except UnidentifiedImageError:
        heic = str(source).lower().endswith((".heic", ".heif")) and "HEIF" not in Image.OPEN
        raise OSError("HEIC is read once pillow-heif is installed: pip install pillow-heif" if heic else
                      "not a picture in a format that is read (JPEG, PNG, WebP, TIFF, ...)") from None
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as e:
        raise OSError(f"not a readable picture: {first_line(e)}") from e


def open_image(source, size: int | None = None) -> tuple[Image.Image, tuple[int, int] | None]:
    """Reads the header -> PIL image, and (width, height) in full where it will be decoded smaller.

    source: path, binary file or PIL image. size: see read_image.
    Raises UnidentifiedImageError for a file in none of FORMATS, ValueError for a picture over MAX_PIXELS.
    """
    Image.init()                              # all of Pillow's plugins
    Image.MAX_IMAGE_PIXELS = None             # our own limit in place of Pillow's warning
    if isinstance(source, (str, os.PathLike)) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("not a regular file")   # a named pipe would block for ever
    file = source if isinstance(source, Image.Image) else Image.open(
        source, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    W, H = file.size
    if W * H > MAX_PIXELS:
        raise ValueError(f"{W}x{H} is over the limit of {MAX_PIXELS} pixels")
    scale = DRAFT * size / square_side(H, W) if size else 1
    drafted = scale < 1 and file.draft(None, (int(W * scale) + 1, int(H * scale) + 1))
    return file, (W, H) if drafted else None


def square_side(H: int, W: int) -> float:
    """Side in pixels of the square with the same area.

    Very flat images count as 16 : 1, because they are mostly padding.
    """
    return max(math.sqrt(H * W), max(H, W) / 4)


def fit(image: np.ndarray, size: float, shape: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, ...) -> what the network is to see: the same with at most `size` x `size` pixels.

    Pictures under SIZE are enlarged to it, at most ENLARGE times, as training has seen it (synth.ENLARGED): a
    letter needs its pixels. docs/LOG.md has the comparison.
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


def default_dilation(H: int, W: int) -> int:
    """Radius in pixels that grows with the picture: 3 at 512."""
    return max(1, round(DILATE * max(H, W)))


# ---------------------------------------------------------------- checkpoint file

def pack(net: Segmenter, **training) -> dict:
    """The checkpoint dict: plain tensors and JSON types. training: what is in RUN, or nothing."""
    return {"format": FORMAT, "arch": net.arch, "encoder": net.encoder, "options": net.options,
            "size": net.size, "threshold": net.threshold,
            "model": net.state_dict(), **dict.fromkeys(RUN), **training}


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """A crash or a full disk never costs the file that was there. Raises OSError with one sentence."""
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:                # RuntimeError: how torch.save reports a failed write
        raise OSError(f"{path} could not be written ({getattr(e, 'strerror', None) or first_line(e)}); "
                      "what was there is untouched") from e


def load_plain(path: Path) -> dict:
    """torch.load that runs no code and answers with one sentence: FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if zipfile.is_zipfile(path):                    # torch writes checksums, but does not read them
            with zipfile.ZipFile(path) as file:         # and stores its tensors as they are
                if any(entry.compress_type for entry in file.infolist()) or file.testzip():
                    raise ValueError("a tensor in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} is refused: it is damaged, or holds code instead of plain tensors") from e
    except Exception as e:                              # torch and zipfile raise a dozen kinds on garbage
        raise ValueError(f"{path} is no complete weights file: {first_line(e)}") from e
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return state


def find_weights(path: Path) -> Path:
    """A weights file itself; of the folder of a run best.pt, or last.pt where nothing was evaluated yet."""
    best, last = Path(path) / "best.pt", Path(path) / "last.pt"
    return best if best.is_file() else last if Path(path).is_dir() else Path(path)


def load_checkpoint(path: Path) -> dict:
    """Raises FileNotFoundError or ValueError with one sentence. path: a file, or the folder of a run."""
    path = find_weights(path)
    checkpoint = load_plain(path)
    if not (all(isinstance(checkpoint.get(name), kind) or name in RUN and checkpoint.get(name) is None
                for name, kind in {**NETWORK, **RUN}.items())
            and 32 <= checkpoint["size"] <= 65536 and 0 < checkpoint["threshold"] < 1
            and all(isinstance(n, (int, float)) and 0 <= n <= MOST for value in checkpoint["options"].values()
                    for n in (value if isinstance(value, (list, tuple)) else [value]))):
        raise ValueError(f"{path} is not one of our checkpoints "
                         "(python model.py import takes the public notebook's)")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {checkpoint['format']}, this code reads {FORMAT}")
    if "subpixel" in checkpoint["options"]:
        raise ValueError(f"{path} holds an older network; the last commit that reads it is {OLD_NETWORK}")
    return dict.fromkeys(RUN) | checkpoint


def from_checkpoint(checkpoint: dict, ema: bool = True) -> Segmenter:
    """The network of a checkpoint, with its averaged weights where it has them, on the CPU, in float32.

    Raises ValueError with one sentence where it cannot be built, filled or run.
    """
    parts = checkpoint["arch"], checkpoint["encoder"], "none", checkpoint["options"]
    state = checkpoint["ema"] if ema and checkpoint["ema"] else checkpoint["model"]
    named = f"{parts[0]} on {parts[1]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # shapes alone, since a small file may name a network that fills the memory; some cannot be built so
            with contextlib.suppress(ValueError), torch.device("meta"):
                sketch = build(*parts)
                sketch.load_state_dict(state)
        net = build(*parts)
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        raise ValueError(f"its tensors do not fit {named}: {first_line(e)}") from e
    net.size, net.threshold = checkpoint["size"], checkpoint["threshold"]
    try:                                      # else each picture would be blamed for it
        with torch.inference_mode():
            logits = net.eval()(torch.zeros(1, 3, 64, 96))                         # (1, 1, 64, 96)
    except Exception as e:                    # whatever an odd network raises
        raise ValueError(f"{named} cannot look at a picture: {first_line(e)}") from e
    tensors = logits, *net.state_dict().values()
    if logits.shape != (1, 1, 64, 96) or not all(t.isfinite().all() for t in tensors):
        raise ValueError(f"the weights of {named} are not finite, or its output is no map")
    return net.train()


def load_model(path: Path = WEIGHTS, device: torch.device | str = "cpu") -> Segmenter:
    """best.pt, last.pt, a run's folder or the released file -> the network, for inference on `device`."""
    checkpoint = load_checkpoint(path)
    try:
        net = from_checkpoint(checkpoint)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    net = fuse_batchnorm(net.eval().requires_grad_(False)).to(device)
    return net.to(memory_format=torch.channels_last) if channels_last(net.mean.device) else net


def import_notebook(path: Path, arch: str, encoder: str) -> Segmenter:
    """The public notebook's .pth (Lightning, with keys mean, std and model.*) as one of our networks."""
    state = load_plain(path)
    state = state.get("state_dict", state)
    net = build(arch, encoder, "none", options={})            # smp's own decoder widths, as in the notebook
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not {arch} on {encoder}: {' '.join(str(e).split())}") from e
    return net


def export(paths: list[Path]) -> dict:
    """Checkpoints of one network -> what inference needs: the mean of their weights, in half precision.

    The mean of several runs is often better than each of them ("model soup", Wortsman et al. 2022). Vectors
    stay in float32, since a running variance may lie above 65,504, where half precision ends.
    Raises ValueError where the networks differ.
    """
    nets, mean = [from_checkpoint(load_checkpoint(path)) for path in paths], {}
    for path, net in zip(paths, nets):
        if (net.arch, net.encoder, net.options) != (nets[0].arch, nets[0].encoder, nets[0].options):
            raise ValueError(f"no mean of two networks: {paths[0]} is {nets[0].arch} on {nets[0].encoder}, "
                             f"{path} is {net.arch} on {net.encoder}")
    for name, value in nets[0].state_dict().items():
        if value.is_floating_point():         # not BatchNorm's counts of batches
            value = torch.stack([net.state_dict()[name] for net in nets]).mean(0)
            value = value.half() if value.ndim > 1 else value
        mean[name] = value
    return pack(nets[0], model=mean)


class OneLook(nn.Module):
    """What export_onnx writes: image (B, H, W, 3) uint8 RGB -> prob (B, H, W) float32 in [0, 1]."""

    def __init__(self, net: Segmenter):
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image.permute(0, 3, 1, 2)).sigmoid()[:, 0]


def export_onnx(path: Path) -> bytes:
    """The network for any height and width, normalisation and padding inside.

    Give it the picture as fit() makes it. Its metadata has `size`, and `threshold` and `sure` of to_mask.
    Raises ValueError where the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as e:
        raise ValueError("ONNX needs one more package: pip install onnx") from e
    net, file = load_model(path), io.BytesIO()
    sizes = {0: "batch", 1: "height", 2: "width"}
    with warnings.catch_warnings():           # this exporter is the old one: the new one fixes the sizes
        warnings.simplefilter("ignore")
        torch.onnx.utils.export(OneLook(net).eval(), (torch.zeros(1, 64, 96, 3, dtype=torch.uint8),), file,
                                opset_version=17, input_names=["image"], output_names=["prob"],
                                dynamic_axes={"image": sizes, "prob": sizes})
    graph = onnx.load_from_string(file.getvalue())
    facts = {"size": net.size, "threshold": net.threshold, "sure": SURE}
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(graph)
    return graph.SerializeToString()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Writes a temporary file and renames it to `path` at the end. So `path` is complete, whatever kills us.

    Makes the folder where it is missing. Raises OSError.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):    # renamed already, or never made
            os.unlink(temporary)


# ---------------------------------------------------------------- one way out

def printable(text: str) -> str:
    """Escapes what a sentence must not hold: newlines, a terminal's commands, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What went wrong, in one short line."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])[:SENTENCE]


def one_way_out(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a script's main. A mistake of the user or the machine is one sentence on stderr and an exit code.

    1 where an output could not be written, 2 for other errors, 130 for Ctrl-C.
    """
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        name = Path(main.__code__.co_filename).name
        # a closed stream is None, and print would say nothing. A file opened for reading refuses to print.
        for stream, mode in (("stdin", "r"), ("stdout", "r"), ("stderr", "w")):
            if getattr(sys, stream) is None:
                setattr(sys, stream, open(os.devnull, mode))
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print(f"{name}: stopped before the end", file=sys.stderr)
            return 130
        except (OSError, ValueError, MemoryError, RuntimeError) as e:
            text, code = first_line(e), 2
            if isinstance(e, RuntimeError):
                if not text.startswith(NO_MEMORY):
                    raise
                text += " Did memory run out?"
            elif isinstance(e, io.UnsupportedOperation):
                text, code = "standard output is closed", 1
            elif isinstance(e, OSError) and e.errno in UNWRITTEN:
                text, code = f"cannot write: {e.strerror}", 1
                with contextlib.suppress(OSError, ValueError):             # what print still holds goes nowhere
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(e, BrokenPipeError):     # head leaves early, and needs no word on it
                print(f"{name}: {text}", file=sys.stderr)
            return code
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
        save_checkpoint(pack(import_notebook(args.file, args.arch, args.encoder)), args.out)
    elif args.onnx:
        if len(args.files) > 1:
            raise ValueError("--onnx takes one checkpoint: export their mean first")
        with replacing(args.out) as file:
            file.write(export_onnx(args.files[0]))
    else:
        save_checkpoint(export(args.files), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
