"""Small photos, logos and weights that the tests make themselves, and the five scripts on the path."""
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

torch.set_num_threads(1)       # small tensors: two threads mostly wait for each other

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """40 generated pictures of several shapes, in train/ and val/."""
    from synth import generate_background
    folder = tmp_path_factory.mktemp("data") / "photos"
    for part, n in (("train", 30), ("val", 10)):
        (folder / part).mkdir(parents=True)
        for i in range(n):
            W, H = ((160, 120), (120, 160), (128, 128))[i % 3]
            image = generate_background(np.random.default_rng([n, i]), W, H)
            cv2.imwrite(str(folder / part / f"{i}.jpg"), image)
    return folder


@pytest.fixture(scope="session")
def logos() -> Path:
    return ROOT / "logos"
