"""What the tests share: a small world in the real formats, a small CLIP, real processes."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # before torch: it sets OpenMP's environment
import clip_load
import model

import pytest
import soundfile
import torch

torch.set_num_threads(1)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                            "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0",
                            "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def command(*words, ranks=1):
    """A command line: a script of ours and its flags, under torchrun where there are ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [str(ROOT / word) if str(word).endswith(".py") else str(word) for word in words]
    return [sys.executable, *(launcher if ranks > 1 else []), *words]


def run(*words, ranks=1, check=True, cwd=None):
    """Run a script as a user does -> the finished process with its output as text."""
    home = {"HOME": str(cwd)} if cwd else {}  # a folder of its own, so without a cache
    done = subprocess.run(command(*words, ranks=ranks), env=ENVIRONMENT | home, cwd=cwd, text=True,
                          capture_output=True, timeout=300, check=False)
    assert not check or done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done


def kill(text, *words, ranks=1, count=1, signal=9):
    """Kill a script (2: Ctrl-C) a moment after its `count`th line (or step of a bar) with a text ->
    seconds until the last of its processes, which hold the pipe open, had ended; else None."""
    process = subprocess.Popen(command(*words, ranks=ranks), env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killed = 0
    for line in process.stdout:
        count -= text in line
        if count == 0 and not killed:
            time.sleep(random.uniform(0, 0.02))
            process.send_signal(signal)
            killed = time.monotonic()
    return time.monotonic() - killed if process.wait() and killed else None


def kill_at_random(stages, *words):
    """Kill a script at a random moment of each stage, named by its lines; then let it end."""
    for text in stages:
        assert kill(text, *words, count=random.randint(1, 4)), text
    run(*words)


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


def small_pretraining(world, clip, out):
    """Flags of a small pre-training on the small world: 4 steps an epoch, 5 epochs."""
    return ["--data", world, "--clip", clip, "--vocab", world / "vocab.txt.gz", "--out", out,
            "--leave-out", "none", "--sample-rate", 16000, "--mels", 32, "--frames", 100,
            "--mean", -3, "--std", 4, "--stride-time", 8, "--stride-mel", 8, "--batch", 16,
            "--epochs", 5, "--warmup-epochs", 1, "--lr-weights", 5, "--precision", "fp32",
            "--workers", 1, "--log-every", 1, "--save-every", 3]


@pytest.fixture(scope="session")
def checkpoint(world, small_clip, tmp_path_factory):
    """A checkpoint of a small pre-training, in <folder>/run; its banks lie beside it."""
    out = tmp_path_factory.mktemp("out") / "run"
    run("pretrain.py", *small_pretraining(world, small_clip, out))
    return out / "checkpoint.pt"


def write(path, text=""):
    """Write a text file, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_esc50(folder, rate, clips):
    """ESC-50 as published, in miniature. clips: [(fold, category, in ESC-10, waveform)]."""
    table = "filename,fold,target,category,esc10,src_file,take\n"
    for i, (fold, category, easy, wave) in enumerate(clips):
        write(folder / f"audio/{i}.wav")
        soundfile.write(folder / f"audio/{i}.wav", wave, rate)
        table += f"{i}.wav,{fold},0,{category},{easy},1,A\n"
    write(folder / "meta/esc50.csv", table)
