"""How fast is it here? Each figure beside its yardstick, measured in turn; one table at the end.

    python tests/bench.py      # under ten minutes on two cores; on CUDA also what only a GPU shows
"""
import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # before torch: it sets OpenMP's environment
import clip_load
import curate
import model
import pretrain

import av
import numpy as np
import soundfile
import torch
import transformers
from torch import nn
from torchaudio.compliance import kaldi

AUDIO = {"input_size": (1000, 128), "patch": 32, "stride": (16, 24), "channels": 1, "width": 768,
         "layers": 12, "heads": 12, "output_dim": 512}
ROWS = []  # (what, ours, yardstick, ratio)


def row(what, ours, yardstick="", ratio=""):
    ROWS.append((what, ours, yardstick, ratio))
    print(" | ".join(ROWS[-1]), flush=True)


def seconds(function):
    """Of one call, the device's work included."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def paired(one, other, rounds=5):
    """Two functions in turn, after a warm-up -> median seconds of each, median of other / one."""
    one(), other()
    times = [(seconds(one), seconds(other)) for _ in range(rounds)]
    ours, theirs = zip(*times)
    ratio = statistics.median(b / a for a, b in times)
    return statistics.median(ours), statistics.median(theirs), ratio


# ----------------------------------------------------------------------------------- the step
class Reference(nn.TransformerEncoder):
    """PyTorch's own Transformer, of the audio encoder's size."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        super().__init__(layer, 12, enable_nested_tensor=False)

    def forward(self, x, first_only):
        return super().forward(x)


def training_step(reference, batch, bf16, device="cpu", recompute=False, compiled=False):
    """A function that takes one step: forward, loss against fixed targets, backward, LARS."""
    encoder = model.VisionTransformer(**AUDIO)
    if reference:
        encoder.transformer = Reference()
    encoder.to(device).train()
    encoder.transformer.recompute = recompute
    if compiled:
        encoder.compile()
    x = torch.randn(batch, 1, 1000, 128, device=device)
    targets = torch.randn(batch, 512, device=device)
    log_scale = torch.tensor(model.LOG_SCALE, device=device)
    optimizer = model.LARS(model.parameter_groups(encoder, 0, 0, 1e-6), lr=1e-4)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            features = encoder(x)
        model.info_nce(features, targets, log_scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(batch, *flags):
    """GiB of a process of its own that takes two steps (see main)."""
    command = [sys.executable, __file__, "--memory", str(batch), *flags]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench_step(batch=8):
    ours, theirs = peak_memory(batch), peak_memory(batch, "--reference")
    row("peak memory of the step, batch 8", f"{ours:.2f} GiB",
        f"{theirs:.2f} nn.TransformerEncoder", f"{ours / theirs:.3f}")
    plain, recomputed = peak_memory(16), peak_memory(16, "--recompute")
    row("the same at batch 16 with --recompute", f"{recomputed:.2f} GiB", f"{plain:.2f} without",
        f"{recomputed / plain:.3f}")
    for bf16 in (False, True):
        steps = [training_step(reference, batch, bf16) for reference in (False, True)]
        ours, theirs, ratio = paired(*steps, rounds=3)
        row(f"the paper's step, batch 8, {'bf16' if bf16 else 'fp32'}",
            f"{batch / ours:.2f} clips/s", f"{batch / theirs:.2f} nn.TransformerEncoder",
            f"{ratio:.3f}")


# ---------------------------------------------------------------------------------- the input
def kaldi_fbank(wave, rate):
    return kaldi.fbank((wave - wave.mean())[None], sample_frequency=rate, htk_compat=True,
                       use_energy=False, num_mel_bins=128, window_type="hanning", dither=0.0,
                       frame_shift=10)


def bench_filterbanks():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for rate in (44_100, 16_000):
        waves = torch.randn(16, 10 * rate) * 0.1
        ours, theirs, ratio = paired(lambda: data.fbank(waves, rate),
                                     lambda: [kaldi_fbank(wave, rate) for wave in waves])
        row(f"filterbanks of 10 s, {rate} Hz, one thread", f"{16 / ours:.0f} clips/s",
            f"{16 / theirs:.0f} Kaldi", f"{ratio:.2f}")
    torch.set_num_threads(threads)


def write_mp3(path, wave, rate):
    with av.open(str(path), "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=rate, layout="mono")
        samples = (wave * 32767).astype(np.int16)[None]
        for start in range(0, samples.shape[1], 1152):
            frame = av.AudioFrame.from_ndarray(samples[:, start:start + 1152], "s16p", "mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def bench_decoding():
    """What a core decodes: 10 s clips at the training rate, as files of three kinds."""
    rate, front_end = 44_100, data.FrontEnd()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        wave = 0.3 * np.sin(np.cumsum(rng.normal(0.1, 0.01, 10 * rate)))
        wave = (wave + rng.normal(0, 0.01, 10 * rate)).astype(np.float32).clip(-1, 1)
        soundfile.write(f"{folder}/x.wav", wave, rate, "PCM_16")
        soundfile.write(f"{folder}/x.ogg", wave, rate)
        write_mp3(f"{folder}/x.mp3", wave, rate)
        for ending in ("wav", "ogg", "mp3"):
            path = f"{folder}/x.{ending}"
            ours, theirs, ratio = paired(lambda: front_end.load(path),
                                         lambda: soundfile.read(path, dtype="float32"), rounds=9)
            row(f"a core decodes 10 s clips, {ending}", f"{1 / ours:.0f} clips/s",
                f"{1 / theirs:.0f} soundfile", f"{ratio:.2f}")


def bench_tokenizer():
    merges = [f"{chr(a)} {chr(b)}" for a in range(97, 123) for b in range(97, 123)]
    tokenizer = clip_load.Tokenizer(merges)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("etaoin shrdlu "), 60)) for _ in range(2000)]
    symbols = list(tokenizer.ids)
    theirs = transformers.CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)},
                                        merges=[tuple(merge.split()) for merge in merges])

    def ours():
        clip_load.Tokenizer(merges)(texts)  # anew: it remembers words

    mine, yardstick, ratio = paired(ours, lambda: theirs(texts, truncation=True, max_length=77))
    row("tokenizer", f"{2000 / mine:.0f} texts/s", f"{2000 / yardstick:.0f} transformers",
        f"{ratio:.2f}")


# --------------------------------------------------------------------------------------- mining
def bench_mining(frames, captions, device):
    rng = torch.Generator().manual_seed(0)
    images = pretrain.unit(torch.randn(frames, 512, generator=rng)).to(device)
    texts = pretrain.unit(torch.randn(captions, 512, generator=rng)).to(device)

    def product():
        for start in range(0, captions, 8192):
            images @ texts[start:start + 8192].T

    ours, theirs, ratio = paired(lambda: curate.nearest(images, texts, 10), product, rounds=3)
    row(f"top 10 of {captions:,} captions for {frames:,} frames", f"{ours:.2f} s",
        f"{theirs:.2f} the product alone", f"{ratio:.2f}")


# ------------------------------------------------------------------------- what only a GPU shows
def bench_cuda(batch=432):
    device = torch.device("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        rate = pretrain.matmul_rate(device)
    row("large matrix products, bf16", f"{rate / 1e12:.0f} TFLOP/s")
    flops = 3 * model.VisionTransformer(**AUDIO).flops()
    for compiled, recompute in ((False, False), (True, False), (True, True)):
        torch.cuda.reset_peak_memory_stats()
        step = training_step(False, batch, True, device, recompute, compiled)
        first = seconds(step)
        step()
        took = statistics.median(seconds(step) for _ in range(10))
        name = "compiled" if compiled else "eager"
        row(f"the paper's step, batch {batch}, bf16, {name}{', --recompute' if recompute else ''}",
            f"{batch / took:.0f} clips/s", f"MFU {batch / took * flops / rate:.2f}",
            f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB, first step {first:.0f} s")
    waves = torch.randn(batch, data.FrontEnd().samples, device=device) * 0.1
    data.fbank(waves, 44_100)
    took = statistics.median(seconds(lambda: data.fbank(waves, 44_100)) for _ in range(10))
    row("filterbanks of 10 s, 44100 Hz, CUDA", f"{batch / took:.0f} clips/s")
    encoder = model.VisionTransformer(**AUDIO).to(device).eval()
    x = torch.randn(64, 1, 1000, 128, device=device)
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast("cuda", torch.bfloat16):
            rounded = encoder(x)
    worst = torch.cosine_similarity(exact, rounded).min()
    row("cosine of bf16 embeddings with fp32", f"{worst:.5f}")
    host = torch.randn(batch, data.FrontEnd().samples).pin_memory()
    step, copies = training_step(False, batch, True, device), [host.to(device)]

    def step_and_copy():
        copies[0] = host.to(device, non_blocking=True)
        step()

    both, alone, ratio = paired(step_and_copy, step)
    row("the step with its batch copied meanwhile", f"{both:.3f} s", f"{alone:.3f} without",
        f"{ratio:.3f}")
    bench_mining(100_000, 1_000_000, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        step = training_step(args.reference, args.memory, bf16=False, recompute=args.recompute)
        step(), step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak / 2 ** (30 if sys.platform == "darwin" else 20))
        return
    bench_step()
    bench_filterbanks()
    bench_decoding()
    bench_tokenizer()
    bench_mining(10_000, 100_000, "cpu")
    if torch.cuda.is_available():
        bench_cuda()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}\n")
    print("| what | here | yardstick | ratio, above 1 is faster |\n|---|---|---|---|")
    for cells in ROWS:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
