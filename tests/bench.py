"""How fast is it here? A table: each figure beside its yardstick, measured in turn.

    python tests/bench.py      # under ten minutes on two cores; on CUDA also what only a GPU shows
"""
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # before torch: it sets OpenMP's environment
import clip_load
import curate
import model
import pretrain

import numpy as np
import soundfile
import torch
import transformers
from torch import nn
from torchaudio.compliance import kaldi

AUDIO = {"input_size": (1000, 128), "patch": 32, "stride": (16, 24), "channels": 1, "width": 768,
         "layers": 12, "heads": 12, "output_dim": 512}


def row(what, here, yardstick="", ratio=""):
    print(f"| {what} | {here} | {yardstick} | {ratio} |", flush=True)


def seconds(function):
    """Of one call, the device's work included."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(what, ours, yardstick, theirs, count=0, unit="clips/s", rounds=5):
    """A row: two functions called in turn after a warm-up, medians of their seconds or, where they
    work on `count` things, of these a second; and the median of theirs / ours."""
    ours()
    theirs()
    times = np.array([(seconds(ours), seconds(theirs)) for _ in range(rounds)])   # (rounds, 2)
    one, other = count / np.median(times, axis=0) if count else np.median(times, axis=0)
    row(what, f"{one:.4g} {unit if count else 's'}", f"{other:.4g} {yardstick}",
        f"{np.median(times[:, 1] / times[:, 0]):.3f}")


# ----------------------------------------------------------------------------------- the step
class Reference(nn.TransformerEncoder):
    """PyTorch's own Transformer, of the audio encoder's size."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        super().__init__(layer, 12, enable_nested_tensor=False)

    def forward(self, x, at):
        return super().forward(x)[:, 0]


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


def memory_of_two_steps(reference, batch, recompute):
    step = training_step(reference, batch, bf16=False, recompute=recompute)
    step()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def peak_memory(*arguments):
    """GiB of a process of its own that takes two steps."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc gives back what is freed
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(memory_of_two_steps, *arguments).result()


def bench_step(batch=8):
    # first of all: a process begins with the peak of the one that starts it
    ours, theirs = peak_memory(False, batch, False), peak_memory(True, batch, False)
    row(f"peak memory of the step, batch {batch}", f"{ours:.2f} GiB",
        f"{theirs:.2f} nn.TransformerEncoder", f"{ours / theirs:.3f}")
    plain, recomputed = (peak_memory(False, 2 * batch, recompute) for recompute in (False, True))
    row(f"the same at batch {2 * batch} with --recompute", f"{recomputed:.2f} GiB",
        f"{plain:.2f} without", f"{recomputed / plain:.3f}")
    for bf16 in (False, True):
        ours, theirs = (training_step(reference, batch, bf16) for reference in (False, True))
        compare(f"the paper's step, batch {batch}, {'bf16' if bf16 else 'fp32'}", ours,
                "nn.TransformerEncoder", theirs, batch, rounds=3)


# ---------------------------------------------------------------------------------- the input
def kaldi_fbank(wave, rate):  # (S,) -> (T, F)
    return kaldi.fbank(wave[None], sample_frequency=rate, htk_compat=True, use_energy=False,
                       num_mel_bins=128, window_type="hanning", dither=0.0, frame_shift=10)


def bench_filterbanks(count=16):
    torch.set_num_threads(1)
    for rate in (44_100, 16_000):
        waves = torch.randn(count, 10 * rate) * 0.1
        compare(f"filterbanks of 10 s, {rate} Hz, one thread", lambda: data.fbank(waves, rate),
                "Kaldi", lambda: [kaldi_fbank(wave, rate) for wave in waves], count)


def bench_decoding():
    """What a core decodes: 10 s clips at the training rate, as files of three kinds."""
    rate, front_end, rng = 44_100, data.FrontEnd(), np.random.default_rng(0)
    wave = 0.3 * np.sin(np.cumsum(rng.normal(0.1, 0.01, 10 * rate)))
    wave += rng.normal(0, 0.01, 10 * rate)
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("wav", "ogg", "mp3"):
            path = f"{folder}/x.{ending}"
            soundfile.write(path, wave, rate)
            compare(f"a core decodes 10 s clips, {ending}", lambda: front_end.load(path),
                    "soundfile", lambda: soundfile.read(path, dtype="float32"), 1, rounds=9)


def bench_tokenizer(count=2000):
    merges = [f"{chr(a)} {chr(b)}" for a in range(97, 123) for b in range(97, 123)]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("etaoin shrdlu "), 60)) for _ in range(count)]
    ids = {symbol: i for i, symbol in enumerate(clip_load.Tokenizer(merges).ids)}
    theirs = transformers.CLIPTokenizer(vocab=ids, merges=[tuple(m.split()) for m in merges])
    compare("tokenizer", lambda: clip_load.Tokenizer(merges)(texts),  # anew: it remembers words
            "transformers", lambda: theirs(texts, truncation=True, max_length=77), count, "texts/s")


# --------------------------------------------------------------------------------------- mining
def bench_mining(frames, captions, device):
    images, texts = (model.unit(torch.randn(n, 512)).to(device) for n in (frames, captions))

    def product():
        for block in images.split(512):
            block @ texts.T

    compare(f"top 10 of {captions:,} captions for {frames:,} frames",
            lambda: [curate.nearest(block, texts, 10) for block in images.split(512)],
            "the product alone", product, rounds=3)


# ------------------------------------------------------------------------- what only a GPU shows
def rate_of(function, count=432, rounds=10):
    """How many of the `count` things that a function works on it does in a second."""
    function()
    return count / np.median([seconds(function) for _ in range(rounds)])


def bench_cuda():
    with torch.autocast("cuda", torch.bfloat16):
        peak_rate = pretrain.matmul_rate(torch.device("cuda"))
    row("large matrix products, bf16", f"{peak_rate / 1e12:.0f} TFLOP/s")
    flops = 3 * model.VisionTransformer(**AUDIO).flops()
    for compiled, recompute in ((False, False), (True, False), (True, True)):
        torch.cuda.reset_peak_memory_stats()
        step = training_step(False, 432, True, "cuda", recompute, compiled)
        first, rate = seconds(step), rate_of(step)
        name = ("compiled" if compiled else "eager") + (", --recompute" if recompute else "")
        row(f"the paper's step, batch 432, bf16, {name}", f"{rate:.0f} clips/s",
            f"MFU {rate * flops / peak_rate:.2f}",
            f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB, first step {first:.0f} s")
        del step  # its memory is not the next one's
    host = 0.1 * torch.randn(432, data.FrontEnd().samples)
    waves = host.to("cuda")
    row("filterbanks of 10 s, 44100 Hz, CUDA",
        f"{rate_of(lambda: data.fbank(waves, 44_100)):.0f} clips/s")
    encoder = model.VisionTransformer(**AUDIO).to("cuda").eval()
    x = torch.randn(64, 1, 1000, 128, device="cuda")
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast("cuda", torch.bfloat16):
            rounded = encoder(x)
    row("cosine of bf16 embeddings with fp32",
        f"{torch.cosine_similarity(exact, rounded).min():.5f}")
    pinned, step = host.pin_memory(), training_step(False, 432, True, "cuda")

    def copy_and_step():
        pinned.to("cuda", non_blocking=True)
        step()

    compare("the step and its batch's copy", copy_and_step, "without", step)
    bench_mining(100_000, 1_000_000, "cuda")


def main():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}\n")
    print("| what | here | yardstick | ratio, above 1 is faster |\n|---|---|---|---|")
    bench_step()
    bench_mining(10_000, 100_000, "cpu")
    bench_filterbanks()  # on one thread, as all that follows
    bench_decoding()
    bench_tokenizer()
    if torch.cuda.is_available():
        bench_cuda()


if __name__ == "__main__":
    main()
