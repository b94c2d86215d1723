"""What the tests share: a small world in the real formats, a small CLIP with OpenAI's keys, real processes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clip_load import Tokenizer
from data import make_toy
from model import CLIP

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    """Recordings and golden values, where they lie beside the project; tests that need them skip elsewhere."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs ../shared with golden values and recordings")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world of 64 training clips, used by many tests; they add banks and mined pairs and change nothing else."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    make_toy(folder, splits={"pairs": 32, "train": 64, "val": 24, "test": 24})
    return folder


@pytest.fixture(scope="session")
def small_clip(world, tmp_path_factory):
    """Path of a random CLIP's state dict, as torch.save leaves it: patch 16, 64 pixels, width 64."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(world / "vocab.txt.gz")
    clip = CLIP(image_size=64, patch=16, vision_width=64, vision_layers=2, context_length=16,
                vocab_size=tokenizer.vocab_size, text_width=64, text_layers=1, output_dim=32)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def run():
    """Run a script of the project as a user would; returns the finished process with its output as text."""
    def run(*command, ranks=1, check=True, start=False, env=None):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        script, *flags = map(str, command)
        command = [sys.executable, *launcher, str(ROOT / script), *flags]
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {}), "text": True,
                   "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if start:
            return subprocess.Popen(command, **options | {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL})
        done = subprocess.run(command, **options, timeout=300, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done
    return run


@pytest.fixture
def pretrain_flags(world, small_clip, tmp_path):
    """Flags of a small pre-training on the small world: 4 steps an epoch, 5 epochs."""
    return {"--data": world, "--clip": small_clip, "--vocab": world / "vocab.txt.gz", "--out": tmp_path / "out",
            "--sample-rate": 16000, "--mels": 32, "--frames": 60, "--mean": -3, "--std": 4, "--stride-time": 8,
            "--stride-mel": 8, "--batch": 16, "--epochs": 5, "--warmup-epochs": 1, "--lr-weights": 5,
            "--precision": "fp32", "--workers": 1, "--log-every": 2, "--save-every": 3}


def linked(world, folder):
    """A folder of its own that finds the world's sounds and frames under the same names."""
    folder.mkdir()
    for name in ("audio", "frames"):
        (folder / name).symlink_to(world / name)
    return folder


def flat(flags):
    """{"--a": 1} -> ["--a", 1]."""
    return [part for item in flags.items() for part in item]
