"""What the tests share: a small world in the real formats, a small CLIP, real processes."""
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # before torch: it sets OpenMP's environment
import clip_load
import model

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    """Recordings and golden values, where they lie beside the project."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs ../shared with golden values and recordings")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world of 64 training clips, which all tests only read."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    data.make_toy(folder, splits={"pairs": 32, "train": 64, "val": 24, "test": 24}, workers=0)
    return folder


@pytest.fixture(scope="session")
def small_clip(world, tmp_path_factory):
    """Path of a random CLIP's state dict: patch 16, 64 pixels, width 64."""
    torch.manual_seed(0)
    tokenizer = clip_load.Tokenizer(world / "vocab.txt.gz")
    clip = model.CLIP(image_size=64, patch=16, vision_width=64, vision_layers=2, context_length=16,
                      vocab_size=tokenizer.vocab_size, text_width=64, text_layers=1, output_dim=32)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    return path


def command(script, *flags, ranks=1):
    """A script's command line, under torchrun where there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / script), *map(str, flags)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                            "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run():
    """Run a script as a user does -> the finished process with its output as text."""
    def run(script, *flags, ranks=1, check=True, cwd=None):
        done = subprocess.run(command(script, *flags, ranks=ranks), env=ENVIRONMENT, cwd=cwd,
                              text=True, capture_output=True, timeout=300, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def kill():
    """Run a script and kill it (SIGKILL) after so many seconds, or when it has printed a line that
    begins with a text -> whether it was still running."""
    def kill(when, script, *flags, ranks=1, cwd=None):
        process = subprocess.Popen(command(script, *flags, ranks=ranks), env=ENVIRONMENT, cwd=cwd,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        timer = threading.Timer(300 if isinstance(when, str) else when, process.kill)
        timer.start()
        for line in process.stdout:
            if isinstance(when, str) and line.startswith(when):
                process.kill()
        timer.cancel()
        return process.wait() == -signal.SIGKILL

    return kill


@pytest.fixture
def pretrain_flags(world, small_clip, tmp_path):
    """Flags of a small pre-training on the small world: 4 steps an epoch, 5 epochs."""
    return small_pretraining(world, small_clip, tmp_path / "out" / "run")


def small_pretraining(world, clip, out):
    return ["--data", world, "--clip", clip, "--vocab", world / "vocab.txt.gz", "--out", out,
            "--leave-out", "none", "--sample-rate", 16000, "--mels", 32, "--frames", 60,
            "--mean", -3, "--std", 4, "--stride-time", 8, "--stride-mel", 8, "--batch", 16,
            "--epochs", 5, "--warmup-epochs", 1, "--lr-weights", 5, "--precision", "fp32",
            "--workers", 1, "--log-every", 2, "--save-every", 3]


@pytest.fixture(scope="session")
def checkpoint(run, world, small_clip, tmp_path_factory):
    """A checkpoint of a small pre-training, in <folder>/run; its banks lie beside it."""
    out = tmp_path_factory.mktemp("out") / "run"
    run("pretrain.py", *small_pretraining(world, small_clip, out))
    return out / "checkpoint.pt"
