"""What the tests share: a small world in the real formats, a small CLIP with OpenAI's keys, real processes."""
import json
import os
import resource
import signal
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clip_load import Tokenizer
from model import CLIP
from toy import make_toy

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


def as_in_a_terminal(largest_file=None):
    """Before a process starts: Ctrl-C works, though a background shell runs the tests. largest_file: in bytes, after
    which the disk counts as full."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


@pytest.fixture(scope="session")
def run():
    """Run a script of the project as a user would; returns the finished process with its output as text."""
    def run(*command, ranks=1, check=True, start=False, env=None, cwd=None, largest_file=None):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        script, *flags = map(str, command)
        command = [sys.executable, *launcher, str(ROOT / script), *flags]
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {}), "text": True,
                   "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": cwd}
        options["preexec_fn"] = partial(as_in_a_terminal, largest_file)
        if start:
            return subprocess.Popen(command, **options | {"stdout": subprocess.DEVNULL})
        done = subprocess.run(command, **options, timeout=300, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done
    return run


def small_pretraining(world, clip, out):
    """Flags of a small pre-training on the small world: 4 steps an epoch, 5 epochs."""
    return {"--data": world, "--clip": clip, "--vocab": world / "vocab.txt.gz", "--out": out,
            "--sample-rate": 16000, "--mels": 32, "--frames": 60, "--mean": -3, "--std": 4, "--stride-time": 8,
            "--stride-mel": 8, "--batch": 16, "--epochs": 5, "--warmup-epochs": 1, "--lr-weights": 5,
            "--precision": "fp32", "--workers": 1, "--log-every": 2, "--save-every": 3}


def pytest_terminal_summary(terminalreporter):
    """What the tests of faults and damaged files have tried, as a table."""
    rows = [value for reports in terminalreporter.stats.values() for report in reports
            if getattr(report, "when", "") == "call" for name, value in report.user_properties if name == "tried"]
    if rows:
        terminalreporter.section("what was tried")
        width = max(len(row[0]) for row in rows)
        for what, count, how in sorted(rows):
            terminalreporter.line(f"{what.ljust(width)}  {count:5d}  {how}")
        terminalreporter.line(f"{'all'.ljust(width)}  {sum(row[1] for row in rows):5d}")


@pytest.fixture
def pretrain_flags(world, small_clip, tmp_path):
    return small_pretraining(world, small_clip, tmp_path / "out")


def linked(world, folder):
    """A folder of its own that finds the world's sounds and frames under the same names."""
    folder.mkdir()
    for name in ("audio", "frames"):
        (folder / name).symlink_to(world / name)
    return folder


@pytest.fixture
def leaking(world, tmp_path):
    """Six training clips under YouTube's ids; AudioCaps' val and test sets hold the clips 1 and 4."""
    folder = linked(world, tmp_path / "leaking")
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:6]]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(
            json.dumps(row | {"id": f"clip_{i:06d}"}) + "\n" for i, row in enumerate(rows)))
    for split, i in (("val", 1), ("test", 4)):
        (folder / f"{split}.csv").write_text(f"audiocap_id,youtube_id,start_time,caption\n1,clip_{i:06d},30,hm\n")
    (folder / "ac.txt").write_text("a hum\na deep buzz\n")
    return folder


def torchscript_archive(clip, path, size=64):
    """Save what OpenAI's file is: a traced CLIP in fp16 with three extra entries in its state dict."""
    clip.forward = lambda image, text: (clip.encode_image(image), clip.encode_text(text))
    for name, value in (("input_resolution", 64), ("context_length", 16), ("vocab_size", 600)):
        vars(clip).pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    traced = torch.jit.trace(clip.eval(), (torch.randn(2, 3, size, size), torch.randint(600, (2, 16))), check_trace=False)
    traced.half().save(path)


FPS, RATE = 10, 44_100  # of the videos


def make_video(path, seconds=14, pictures=True, sound=True, codec="aac", seed=0, rate=RATE):
    """An MP4 whose pictures show their own number in ten black or white bars, and whose sound is noise, returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, seconds * rate).astype(np.float32)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        if pictures:
            video = container.add_stream("mpeg4", rate=FPS)
            video.width, video.height, video.gop_size, video.bit_rate = 160, 96, 25, 2_000_000
        if sound:
            audio = container.add_stream(codec, rate=rate)
            audio.layout = "mono"
        for number in range(seconds * FPS if pictures else 0):
            bars = [255 * (number >> bit & 1) for bit in range(10)]
            image = np.repeat(np.array(bars, np.uint8), 16)[None, :, None] * np.ones((96, 1, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        for start in range(0, len(noise) if sound else 0, 1024):
            frame = av.AudioFrame.from_ndarray(noise[None, start:start + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(audio.encode(frame))
        for stream in container.streams:
            container.mux(stream.encode())
    return noise


def tiny_language_model(folder):
    """A GPT-2 with random weights that knows fourteen words."""
    import tokenizers
    import transformers
    words = ["<unk>", "<end>", "-", "\n", "a", "dog", "cat", "runs", "sleeps", "on", "the", "beach", "red", "two"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n|[^ \n]+"), "removed", invert=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                         eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=14, n_positions=128, n_embd=16, n_layer=1, n_head=2,
                                                         bos_token_id=1, eos_token_id=1)).save_pretrained(folder)


def flat(flags):
    """{"--a": 1} -> ["--a", 1]."""
    return [part for item in flags.items() for part in item]
