"""How fast is it? Each figure beside its yardstick, paired in one run; nothing here runs in the test suite.

    python tests/bench.py step                              # the paper's step against torch.nn.TransformerEncoder
    python tests/bench.py input --data data/esc50           # clips into the step against soundfile + Kaldi
    pip install faiss-cpu && python tests/bench.py mining   # exact top 10 against faiss.IndexFlatIP
"""
import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torchaudio.compliance import kaldi

import curate
from data import FrontEnd, load_audio, mask
from model import LARS, VisionTransformer, info_nce, parameter_groups
from prepare import pack, sound_loader
from readers import read_split

AUDIO = {"input_size": (1000, 128), "patch": 32, "stride": (16, 24), "channels": 1, "width": 768, "layers": 12,
         "heads": 12, "output_dim": 512}


def paired(one, other, rounds):
    """Seconds of two functions, run in turn after a warm-up -> medians, and the median of their ratio other / one."""
    one(), other()
    times = []
    for _ in range(rounds):
        times.append([])
        for function in (one, other):
            began = time.perf_counter()
            function()
            times[-1].append(time.perf_counter() - began)
    return *(statistics.median(column) for column in zip(*times)), statistics.median(b / a for a, b in times)


def training_step(encoder, batch, precision):
    """A function that takes one step: forward, loss against fixed targets, backward, LARS."""
    x, targets = torch.randn(batch, 1, 1000, 128), torch.randn(batch, 512)
    scale = torch.tensor(2.66)
    optimizer = LARS(parameter_groups(encoder, 1e-3, 1e-5, 1e-6))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = encoder(x)
        info_nce(features, targets, scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


class Reference(nn.TransformerEncoder):
    """PyTorch's own Transformer, of the audio encoder's size."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        super().__init__(layer, 12, enable_nested_tensor=False)

    def forward(self, x, first_only):
        return super().forward(x)


def reference_encoder():
    """The same encoder around PyTorch's Transformer."""
    encoder = VisionTransformer(**AUDIO)
    encoder.transformer = Reference()
    return encoder


def step(args):
    if args.memory:  # a process of its own for each
        take = training_step(VisionTransformer(**AUDIO) if args.memory == "ours" else reference_encoder(), args.batch,
                             "fp32")
        take(), take()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
        return
    # first, while this process is small: on Linux a child's peak is never below its parent's
    again = [sys.executable, __file__, "step", "--batch", str(args.batch), "--memory"]
    ours, theirs = (float(subprocess.run([*again, who], check=True, capture_output=True, text=True).stdout)
                    for who in ("ours", "theirs"))
    print(f"fp32 peak memory of the process: {ours:.2f} GiB, torch.nn.TransformerEncoder {theirs:.2f}; "
          f"ratio {ours / theirs:.3f}")
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
            print("bf16: this CPU does not multiply it")
            continue
        ours, theirs, ratio = paired(training_step(VisionTransformer(**AUDIO), args.batch, precision),
                                     training_step(reference_encoder(), args.batch, precision), args.rounds)
        print(f"{precision}: {args.batch / ours:.2f} clips/s, torch.nn.TransformerEncoder {args.batch / theirs:.2f}; "
              f"speed ratio {ratio:.3f}", flush=True)


def input_(args):
    """CPU seconds a clip from file to what the encoder takes, on one core."""
    torch.set_num_threads(1)
    clips = read_split("esc50", Path(args.data), "test")[:args.clips]
    front_end = FrontEnd(44_100, 128, 500)

    def kaldi_by_clip():
        for clip in clips:
            wave = load_audio(clip.audio, 44_100)
            x = kaldi.fbank((wave - wave.mean())[None], sample_frequency=44_100, htk_compat=True, use_energy=False,
                            num_mel_bins=128, window_type="hanning", dither=0.0, frame_shift=10)[:500]
            x = nn.functional.pad(x, (0, 0, 0, 500 - len(x)))
            mask(((x - front_end.mean) / front_end.std)[None, None], torch.rand(1, 4))

    def ours(load, filterbanks=True):
        def run():
            for start in range(0, len(clips), 32):
                waves, lengths = zip(*(load(clip.audio) for clip in clips[start:start + 32]))
                waves, lengths = torch.stack(waves), torch.tensor(lengths)
                if filterbanks:
                    mask(front_end(waves, lengths), torch.rand(len(waves), 4))
        return run

    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder) / "links"
        links.mkdir()
        moved = []
        for clip in clips:
            link = links / Path(clip.audio).name
            link.symlink_to(Path(clip.audio).resolve())
            moved.append(type(clip)(clip.id, str(link)))
        clips = moved
        pack(links, clips, 44_100)
        packed = sound_loader(links, front_end)
        for name, run in (("from the files", ours(front_end.load)), ("from the pack", ours(packed))):
            mine, yardstick, ratio = paired(run, kaldi_by_clip, args.rounds)
            print(f"{name}: {len(clips) / mine:.0f} clips/s a core, soundfile + Kaldi {len(clips) / yardstick:.0f}; "
                  f"speed ratio {ratio:.2f}", flush=True)
        files, pack_, _ = paired(ours(front_end.load, filterbanks=False), ours(packed, filterbanks=False), args.rounds)
        print(f"with filterbanks on the device a core is left with decoding: {len(clips) / files:.0f} clips/s from the "
              f"files, {len(clips) / pack_:.0f} from the pack")


def mining(args):
    import faiss  # a yardstick, not a dependency
    rng = np.random.default_rng(0)
    images, captions = (rng.standard_normal((args.rows, 512), dtype=np.float32) for _ in range(2))
    images, captions = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16) for x in (images, captions))
    with tempfile.TemporaryDirectory() as folder:
        folder, found = Path(folder), {}
        np.save(folder / "images.npy", images)
        np.save(folder / "captions.npy", captions)

        def ours():
            with tempfile.TemporaryDirectory(dir=folder) as out:
                found["ours"] = np.array(curate.mine(folder / "images.npy", folder / "captions.npy", out, 10)[1])

        def theirs():
            index = faiss.IndexFlatIP(512)
            index.add(captions.astype(np.float32))
            found["faiss"] = index.search(images.astype(np.float32), 10)[1]

        mine, yardstick, ratio = paired(ours, theirs, args.rounds)
    same = (found["ours"] == found["faiss"]).mean()
    print(f"{args.rows} × {args.rows} × 512, top 10: {mine:.1f} s, faiss {yardstick:.1f} s; speed ratio {ratio:.2f}; "
          f"{100 * same:.4f} % of the answers are the same (faiss rounds in fp32)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "input", "mining"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", default="data/esc50", help="input: ESC-50, or a part of it")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"step": step, "input": input_, "mining": mining}[args.what](args)


if __name__ == "__main__":
    main()
