"""Stage 1: an audio encoder chases frozen CLIP embeddings of video frames (§3.2, Eq. 4).

    python pretrain.py --data toy                        # minutes on a laptop: the toy world, its CLIP, vip-AnT
    python pretrain.py --data toy --init random          # VA-Rand
    python pretrain.py --data random                     # no data: how fast is the paper's step here?
    torchrun --nproc_per_node=4 pretrain.py              # the paper's run, on data/audioset

CLIP runs once over the data and leaves a bank of embeddings; the loop never sees an image. `train` is the only
training loop of the project: a learner that turns a batch into features and features into a loss, a reader of
samples, and settings. The toy's own CLIP goes through it too.

B  clips on this rank     D  embedding     M  rows of a bank     N  clips
"""
import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import timeit
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from clip_load import (
    BROKEN,
    VOCABULARY_PATH,
    Tokenizer,
    audio_encoder_from_clip,
    blank_audio_encoder,
    cached,
    clip_identity,
    fingerprint,
    load_clip,
)
from data import (
    Claim,
    FrontEnd,
    Unreadable,
    dataset_folder,
    held_out_by_audiocaps,
    is_array,
    load_image,
    mask,
    new_array,
    read_index,
    read_split,
    run,
    stamp,
    worker_starts,
    write_whole,
)
from model import CLIP, LARS, VisionTransformer, info_nce, parameter_groups, schedule
from prepare import sound_loader
from toy import make_toy

# ------------------------------------------------------------------------------------ settings

def setting(default, help, choices=None, free=False):
    """A field of a stage's settings. `free`: may differ when a run is resumed, for it does not shape the result."""
    return field(default=default, compare=not free, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Training:
    """What every training has to settle; defaults are the paper's VA pre-training (Table 5)."""
    out: str = setting("", "folder of checkpoint and log; empty: named after what is trained", free=True)
    clip: str = setting("ViT-B/32", "one of OpenAI's names, or a path to weights")
    vocab: str = setting(str(VOCABULARY_PATH), "the tokenizer's vocabulary", free=True)
    seed: int = setting(0, "fixes weights, order, frames and masks")
    sample_rate: int = setting(FrontEnd.sample_rate, "Hz; audio is resampled to it")
    mels: int = setting(FrontEnd.mels, "mel bins")
    frames: int = setting(FrontEnd.frames, "of 10 ms that the encoder hears")
    mean: float = setting(FrontEnd.mean, "of the training set's log-mel values at that rate")
    std: float = setting(FrontEnd.std, "of the same")
    stride_time: int = setting(16, "frames between patches")
    stride_mel: int = setting(24, "mel bins between patches")
    optimizer: str = setting("lars", "lars or adam", ["lars", "adam"])
    batch: int = setting(432, "clips a step over all ranks; all of them are each other's negatives")
    micro_batch: int = setting(0, "clips that a rank holds activations of; the same result with less memory, a third "
                               "more work; 0: all", free=True)
    epochs: int = setting(25, "passes over the training clips")
    steps: int = setting(0, "stop after so many; the same command without it goes on; 0: all epochs", free=True)
    warmup_epochs: float = setting(10.0, "of linear warm-up, then cosine to 0.1 %")
    lr_weights: float = setting(0.2, "peak, for weights; LARS multiplies it by batch/256")
    lr_biases: float = setting(4.8e-3, "the same for biases, norms and temperature")
    weight_decay: float = setting(1e-6, "on weights")
    precision: str = setting("auto", "auto: bf16 where the device is fast at it", ["auto", "bf16", "fp32"])
    compile: str = setting("auto", "torch.compile; auto: on CUDA", ["auto", "yes", "no"], free=True)
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that decode, a rank", free=True)
    log_every: int = setting(50, "steps between log lines", free=True)
    save_every: int = setting(1000, "steps between checkpoints, besides each epoch's end", free=True)

    @property
    def front_end(self):
        return FrontEnd(self.sample_rate, self.mels, self.frames, self.mean, self.std)

    def lr_factor(self, step, steps_per_epoch):
        """Factor on the peak learning rates at a step."""
        return schedule(step, self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch)

    def check(self):
        """Raises ValueError for numbers that can't be: not positive, a batch that the ranks can't share."""
        for least, names in ((1, ("batch", "epochs", "log_every", "save_every", "frames", "mels")),
                             (0, ("steps", "micro_batch"))):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        a_rank, left = divmod(self.batch, ranks()[1])
        if left:
            raise ValueError(f"--batch {self.batch} can't be split over {ranks()[1]} ranks")
        if self.micro_batch and a_rank % self.micro_batch:
            raise ValueError(f"--micro-batch {self.micro_batch}: {a_rank} clips a rank can't be cut into such slices")


@dataclass(frozen=True)
class Settings(Training):
    """VA pre-training; the command line is derived from this."""
    data: str = setting("audioset", "toy, random (synthetic clips, to time the step), or a folder (audioset means "
                        "data/audioset) with train.jsonl and val.jsonl")
    init: str = setting("clip", "start of the audio encoder: clip is vip-AnT, random is VA-Rand", ["clip", "random"])
    leave_out: str = setting("data/audiocaps", "folder of AudioCaps' tables: its val and test clips are left out of "
                             "training; none: train on them", free=True)  # the index's digest tells


# The paper at half its scale: 64 mel bins, patch 16, overlapping by a quarter. Mean and std are the toy's own.
TOY = Settings(data="toy", leave_out="none", clip="out/toy/clip/clip.pt", vocab="data/toy/vocab.txt.gz",
               sample_rate=16_000, mels=64, frames=100, mean=-2.21, std=3.51, stride_time=12, stride_mel=12, batch=64,
               epochs=9, warmup_epochs=0.5, lr_weights=5.0, lr_biases=7e-3, workers=1, log_every=62)
TOY_CLIP = replace(TOY, out="out/toy/clip", optimizer="adam", batch=128, epochs=8, warmup_epochs=0.3,
                   lr_weights=5e-4, lr_biases=5e-4)
# The paper's step without a file: what this machine can do.
RANDOM = Settings(data="random", init="random", steps=50, log_every=10)
PRESETS = {"toy": TOY, "random": RANDOM}


def parse(defaults, presets, argv=None, description=None):
    """Command line -> settings. --head or --data may name a preset; other flags override it; unknown ones fail."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(defaults):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), choices=f.metadata["choices"],
                            default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({f.default})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset = next((presets[given[name]] for name in ("head", "data") if given.get(name) in presets), defaults)
    return replace(preset, **given)


# ------------------------------------------------------------------------------ ranks, devices

def start_ranks():
    """Join torchrun's process group if there is one: NCCL on GPUs, gloo on CPUs. Returns this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes on a machine with {torch.cuda.device_count()} GPU(s); lower "
                             f"--nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while rank 0 looks at millions of files
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return device


def ranks():
    """(rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other ranks, if any."""
    if dist.is_initialized():
        dist.barrier()


def autocast(device, precision):
    """Autocast to bf16 where asked for, or where the device multiplies it faster than fp32."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and fast))


def matmul_rate(device, cast):
    """Measured rate of large matrix products on this device in FLOP/s: what MFU is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)

    def product():
        with cast:
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * size ** 3 / min(timeit.repeat(product, number=1, repeat=5))


# --------------------------------------------------------------------------------------- banks

class Readable(torch.utils.data.Dataset):
    """Items read one by one for inference: row -> (row, tensors), or (row, None, why) where it can't be read."""

    def __init__(self, items, read):
        self.items, self.read = items, read

    def __getitem__(self, row):
        try:
            return row, self.read(self.items[row])
        except Unreadable as error:
            return row, None, str(error)


def split_readable(samples):
    """Collate for Readable: (rows, batch of tensors), (rows, reasons) of the unreadable."""
    good, bad = [s for s in samples if s[1] is not None], [s for s in samples if s[1] is None]
    return ([s[0] for s in good], default_collate([s[1] for s in good]) if good else None,
            [s[0] for s in bad], [s[2] for s in bad])


@torch.no_grad()
def embed(items, read, encode, out, state, device, workers, description=None, unit=True):
    """Fill out (M, D) with embeddings of items, of length 1 if `unit`; state (M,) becomes 1, or 2 where unreadable.

    Rows whose state is not 0 are done already. The ranks share the rest. read(item) -> tensor(s), in worker
    processes; encode(tensors) -> (B, D). With a description there is a progress bar.
    """
    rank, size = ranks()
    todo = np.arange(rank, len(state), size)  # a rank's share depends on no other rank's progress
    todo = todo[np.asarray(state)[todo] == 0]
    if not len(todo):
        return
    loader = DataLoader(Readable(items, read), 128, sampler=todo.tolist(), num_workers=workers,
                        collate_fn=split_readable, worker_init_fn=worker_starts)
    with tqdm(total=len(todo), desc=description, disable=rank > 0 or not description, unit="") as bar:
        for rows, tensors, bad, reasons in loader:
            if rows:
                tensors = tensors if isinstance(tensors, (tuple, list)) else [tensors]
                features = encode(*(tensor.to(device) for tensor in tensors))                # (B, D)
                features = F.normalize(features.float(), dim=1) if unit else features.float()
                out[rows] = features.cpu().numpy()
                state[rows] = 1
            for row, reason in zip(bad, reasons):
                state[row] = 2
                bar.write(f"skipped: {reason}", file=sys.stderr)
            bar.update(len(rows) + len(bad))


def embed_all(items, read, encode, dimensions, device, workers=0, description=None, unit=True):
    """Embeddings of items in memory, the same on every rank: (N, D) float32, (N,) bool readable."""
    out, state = np.zeros((len(items), dimensions), np.float32), np.zeros(len(items), np.uint8)
    embed(items, read, encode, out, state, device, workers, description, unit=unit)
    out, state = torch.from_numpy(out).to(device), torch.from_numpy(state).to(device)
    if dist.is_initialized():
        dist.all_reduce(out)
        dist.all_reduce(state)
    return out.cpu(), state.cpu() == 1


def is_unit(rows):
    """Which rows (..., D) have length 1, but for the rounding of fp16 -> (...,) bool; one that holds NaN has not."""
    rows = rows.astype(np.float32)
    return np.abs((rows * rows).sum(-1) - 1) < 0.01


class Bank:
    """Frozen target embeddings on disk, (M, D) fp16 unit vectors, and the rows that belong to each clip."""

    def __init__(self, path, rows, starts):
        self.path, self.rows, self.starts = path, rows, starts
        self.embeddings = np.load(path, mmap_mode="r")                                       # (M, D)

    def __reduce__(self):  # a worker process opens the file itself
        return Bank, (self.path, self.rows, self.starts)

    def of(self, clip):
        """Rows that belong to a clip; empty if none of its frames could be read."""
        return self.rows[self.starts[clip]:self.starts[clip + 1]]

    def draw(self, clip, rng):
        """One of a clip's embeddings -> (D,) float32. Raises ValueError where it is none."""
        row = rng.choice(self.of(clip))
        target = self.embeddings[row]
        if not is_unit(target):
            raise ValueError(f"{self.path}: row {row} is not a unit vector, so the file is damaged; delete its folder "
                             f"to make it anew")
        return torch.from_numpy(target.astype(np.float32))

    def check(self):
        """Raises ValueError where all targets are alike, so that there is nothing to learn from them."""
        if len(self.rows) == 0:
            return
        some = self.embeddings[self.rows[np.linspace(0, len(self.rows) - 1, 1000).astype(int)]].astype(np.float32)
        if np.abs(some - some[0]).max() < 1e-3:
            raise ValueError(f"{self.path}: its rows are all alike, so there is nothing to learn; do the frames, or "
                             f"the captions, differ?")


@contextmanager
def shared_arrays(folder, note, made_of, arrays):
    """Arrays in files of `folder` that all ranks fill together, and that a killed run leaves to the next one.

    note: name of a file that holds `made_of`, a dict of what decides the content. Where it says otherwise, or an array
    is not whole, all arrays begin anew as zeros. arrays: {name: (dtype, shape)}. No other run gets the folder until
    every rank is done. Yields the arrays, mapped into memory.
    """
    paths, note, made_of = {name: folder / f"{name}.npy" for name in arrays}, folder / note, json.dumps(made_of)
    if ranks()[0] == 0:
        lock = Claim(folder / "lock", wait=True)
        fits = note.exists() and note.read_bytes() == made_of.encode()
        if not (fits and all(is_array(paths[name], *kind) for name, kind in arrays.items())):
            note.unlink(missing_ok=True)
            for name, kind in arrays.items():
                new_array(paths[name], *kind)
            write_whole(note, lambda part: part.write_text(made_of))
    barrier()
    yield [np.load(path, mmap_mode="r+") for path in paths.values()]
    barrier()
    if ranks()[0] == 0:
        lock.close()


def stored(folder, made_of, items, read, encode, dimensions, device, workers=0):
    """Unit embeddings of items kept in `folder` -> path of the file, (M, D) fp16, and which rows could be made (M,).

    Built once; reused when made of the same (as shared_arrays says), carried on with when a build was cut short.
    """
    folder, (rank, size) = Path(folder), ranks()
    arrays = {"embeddings": (np.float16, (len(items), dimensions)), "state": (np.uint8, (len(items),))}
    with shared_arrays(folder, "bank.json", made_of, arrays) as (embeddings, state):
        rows, done = embeddings[rank::size], state[rank::size]  # this rank's share, as `embed` cuts it
        done[done != 1] = 0  # what could not be read last time is tried again, and named again
        for i in range(0, len(done), 2 ** 16):  # what a power cut lost is made again
            done[i:i + 2 ** 16][~is_unit(rows[i:i + 2 ** 16])] = 0
        embed(items, read, encode, embeddings, state, device, workers, f"bank {folder}")
        assert done.all(), "everything is embedded or unreadable by now"
    return folder / "embeddings.npy", np.asarray(state) == 1


def frame_bank(folder, clips, clip, device, workers):
    """Bank of CLIP's embeddings of all frames of all clips, kept in `folder`.

    It is made anew when a file changes (names, sizes, times). Raises ValueError where over 1 % of the clips have no
    readable frame.
    """
    frames, digest = [frame for c in clips for frame in c.frames], hashlib.sha256(str(clip.image_size).encode())
    for frame in frames if ranks()[0] == 0 else []:  # who alone compares it
        digest.update(f"{frame} {stamp(frame) if os.path.exists(frame) else None}\n".encode())
    made_of = {"clip": fingerprint(clip), "files": digest.hexdigest(), "frames": len(frames), "clips": len(clips)}
    path, done = stored(folder, made_of, frames, partial(load_image, size=clip.image_size), clip.encode_image,
                        clip.visual.proj.shape[1], device, workers)
    rows = np.flatnonzero(done)
    starts = np.searchsorted(rows, np.cumsum([0] + [len(c.frames) for c in clips]))
    empty = int((np.diff(starts) == 0).sum())
    if ranks()[0] == 0 and len(rows) < len(frames):
        print(f"{folder}: {len(frames) - len(rows)} of {len(frames)} frames unreadable, {empty} of {len(clips)} clips "
              f"left out for it", file=sys.stderr)
    if empty > 0.01 * len(clips):
        raise ValueError(f"{empty} of {len(clips)} clips have no readable frame, over 1 %; see the messages above "
                         f"(delete {folder} to try again)")
    return Bank(path, rows, starts)


def text_embeddings(folder, texts, clip, tokenizer, device):
    """Unit text embeddings of CLIP, kept in `folder`, (M, D) fp16 -> their path."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    made_of = {"clip": fingerprint(clip), "tokens": tokenizer.vocab_size, "texts": digest, "count": len(texts)}
    path, _ = stored(folder, made_of, texts, lambda text: tokenizer([text])[0], clip.encode_text,
                     clip.text_projection.shape[1], device)
    return path


def caption_bank(folder, clips, captions, clip, tokenizer, device):
    """Bank of CLIP's embeddings of captions, each a row, for clips whose captions are among them."""
    row = {caption: i for i, caption in enumerate(captions)}
    path = text_embeddings(folder, captions, clip, tokenizer, device)
    rows = np.array([row[caption] for c in clips for caption in c.captions], dtype=np.int64)
    return Bank(path, rows, np.cumsum([0] + [len(c.captions) for c in clips]))


# ---------------------------------------------------------------------------- learner and samples

def masked_input(learner, batch):
    """A batch's filterbanks, normalised and masked (B, 1, T, F); learner.heard keeps mean, std, share of padding."""
    with torch.no_grad(), torch.autocast(batch["wave"].device.type, enabled=False):
        x = learner.front_end(batch["wave"], batch["length"])                                # (B, 1, T, F)
        padding = 1 - batch["length"].float().mean() / learner.front_end.samples
        learner.heard = {"input_mean": x.mean(), "input_std": x.std(), "padding": padding}
        return mask(x, batch["draws"])


class AudioLearner(nn.Module):
    """The trained part: audio encoder and temperature. Batches come from AudioSamples."""

    def __init__(self, audio_encoder, front_end):
        super().__init__()
        self.audio_encoder, self.front_end = audio_encoder, front_end
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch):
        """Batch -> audio features (B, D), their targets (B, kinds, D)."""
        return self.audio_encoder(masked_input(self, batch)), batch["target"]

    def loss(self, audio, targets):
        """The contrastive losses with each kind of target, summed: one in pre-training (Eq. 4), two in VAT (App. E)."""
        self.kinds = targets.shape[1]
        return sum(info_nce(audio, target, self.log_scale) for target in targets.unbind(1))

    def guessing(self, batch):
        """The loss of who guesses in a batch of so many: an encoder that hears nothing."""
        return self.kinds * 2 * math.log(batch)

    def report(self):
        """Numbers for the log; of the input, the last batch's."""
        return {"temperature": self.log_scale.neg().exp().item()} | {k: v.item() for k, v in self.heard.items()}

    def flops(self):
        """Of one sample's forward and backward pass (the backward costs two forwards)."""
        return 3 * self.audio_encoder.flops()

    def embed(self, paths, device, workers=0):
        """Embeddings of sound files, the same on every rank: (N, D) unit vectors, (N,) bool readable."""
        def encode(wave, length):
            return self.audio_encoder(self.front_end(wave, length))                          # (B, D)

        return embed_all(paths, self.front_end.load, encode, self.audio_encoder.config["output_dim"], device, workers)


class AudioSamples:
    """Clips with banks of targets: sample i is its waveform, a row of each of its banks and the draws for its mask."""

    def __init__(self, clips, banks, load, train_on=None):
        """load(path) -> waveform, its length. train_on: for each clip whether it is one of the samples; default all."""
        self.clips = np.array([i for i in range(len(clips)) if (train_on is None or train_on[i])
                               and all(len(bank.of(i)) for bank in banks)])
        self.paths = np.array([clips[i].audio.encode() for i in self.clips])  # one array: forked workers share it
        self.banks, self.load = banks, load
        for bank in banks:
            bank.check()

    def __len__(self):
        return len(self.clips)

    def read(self, i, rng):
        wave, length = self.load(self.paths[i].decode())
        targets = torch.stack([bank.draw(self.clips[i], rng) for bank in self.banks])               # (kinds, D)
        return {"wave": wave, "length": length, "target": targets,
                "draws": torch.from_numpy(rng.random(4, dtype=np.float32))}


class RandomSamples:
    """Synthetic clips of the front end's length with random targets: the step and its input without any file."""
    paths = ()

    def __init__(self, front_end, dimensions, count=10 ** 7):
        self.samples, self.count = front_end.samples, count
        self.noise = torch.randint(-2 ** 15, 2 ** 15, (2 * self.samples,), dtype=torch.int16)
        self.targets = F.normalize(torch.randn(1000, dimensions), dim=1)

    def __len__(self):
        return self.count

    def read(self, i, rng):
        start = int(rng.integers(self.samples))
        return {"wave": self.noise[start:start + self.samples], "length": self.samples,
                "target": self.targets[rng.integers(1000)][None],                                   # (kinds, D)
                "draws": torch.from_numpy(rng.random(4, dtype=np.float32))}


class Draws(torch.utils.data.Dataset):
    """Samples by (epoch, i): all chance in a sample follows from seed, epoch and i, whoever reads it when."""

    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __getitem__(self, key):
        (epoch, i), reasons = key, []
        for step in range(min(100, len(self.samples))):  # where a clip can't be read the next one steps in
            try:
                sample = self.samples.read((i + step) % len(self.samples), np.random.default_rng((self.seed, epoch, i)))
                return sample | {"skipped": reasons[0] if reasons else ""}
            except Unreadable as error:
                reasons.append(str(error))
        raise ValueError(f"not one of {len(reasons)} clips in a row can be read, for example {reasons[0]}")


def batches(count, batch, epochs, seed, start=0):
    """Batch by batch from step `start` on, this rank's part of each: lists of (epoch, i); the last few drop out."""
    rank, size = ranks()
    steps = count // batch
    for step in range(start, epochs * steps):
        epoch, at = divmod(step, steps)
        if at == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(count)
        mine = order[at * batch:(at + 1) * batch].reshape(size, -1)[rank]
        yield [(epoch, int(i)) for i in mine]


# --------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, content):
    """Write a checkpoint: `path` is always a whole one, even after a power cut."""
    def save(part):
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, save)


def load_checkpoint(path, stages):
    """A checkpoint of one of `stages` as a dict of tensors and plain values. Raises FileNotFoundError, ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # PyTorch does not compare checksums
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint. Make it with pretrain.py, or name one") from None
    except (*BROKEN, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {why})") from None
    stage = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if stage not in stages:
        raise ValueError(f"{path}: " + (f"a checkpoint of stage '{stage}'" if stage else "not a checkpoint of ours")
                         + f"; needed here: {' or '.join(stages)}")
    return checkpoint


def audio_encoder_of(checkpoint, path):
    """Audio encoder, frozen, and front end out of a loaded checkpoint. Raises ValueError."""
    prefix = "audio_encoder."
    try:
        encoder, front_end = VisionTransformer(**checkpoint["encoder"]), FrontEnd(**checkpoint["front_end"])
        if tuple(encoder.input_size) != (front_end.frames, front_end.mels):
            raise ValueError(f"its front end gives {front_end.frames}×{front_end.mels} values, its encoder takes "
                             f"{'×'.join(map(str, encoder.input_size))}")
        encoder.load_state_dict({key[len(prefix):]: value for key, value in checkpoint["learner"].items()
                                 if key.startswith(prefix)})
    except (KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    return encoder.eval().requires_grad_(False), front_end


def versions():
    """What a checkpoint and a log say of the software that made them."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}


def digest_of(clips):
    """Short hex digest of an index's content."""
    return hashlib.sha256("\n".join(map(repr, clips)).encode()).hexdigest()[:16]


def decisive(settings, made_of):
    """What a run's result follows from: its settings, and out of its identity or checkpoint the data and weights."""
    return settings | {"index": made_of.get("data"), "samples": made_of.get("samples"),
                       "clip weights": made_of.get("clip", {}).get("fingerprint"),
                       "start": made_of.get("start", {}).get("weights")}


def restore(path, learner, optimizer, settings, identity, files):
    """Go on from a run's own checkpoint, if there is one -> step, skipped clips of the epoch so far, sizes of `files`.

    The sizes, in bytes, are looked at by rank 0. Raises ValueError where the checkpoint was made with other settings,
    samples or CLIP, or where a file is another one: going on would be another run.
    """
    sizes = torch.tensor([stamp(file)[0] for file in files] if ranks()[0] == 0 else [], dtype=torch.int64)
    if not path.exists():
        return 0, 0, sizes
    saved = load_checkpoint(path, [identity["stage"]])
    then, now = decisive(saved["settings"], saved), decisive(asdict(settings), identity)
    free = {f.name for f in fields(settings) if not f.compare}
    changed = {name: (then.get(name), value) for name, value in now.items()
               if name not in free and then.get(name) != value}
    if changed:
        raise ValueError(f"{path} was made otherwise (then, now): {changed}; choose another --out, or delete it")
    known = saved.get("sizes", sizes)[:len(sizes)]
    differs = (sizes != known) & (sizes > 0) & (known > 0)  # what is gone is skipped and counted
    if differs.any():
        first = os.fsdecode(files[differs.nonzero()[0].item()])
        raise ValueError(f"{first} is not the file it was when {path} was made, nor are {int(differs.sum()) - 1} "
                         f"others; choose another --out, or delete it")
    learner.load_state_dict(saved["learner"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["skipped"], torch.where(sizes > 0, sizes, known)


# ------------------------------------------------------------------------------------ the loop

class Meter:
    """Of the steps since the log's last line: loss, time, waiting for data. Of the epoch: clips that were skipped."""

    def __init__(self, device, skipped):
        self.device, self.skipped = device, skipped  # skipped counts on all ranks; missed on this one, since the line
        self.restart()

    def restart(self):
        self.loss, self.steps, self.missed = torch.zeros((), device=self.device), 0, 0
        self.waited, self.began = 0.0, time.perf_counter()

    def next_batch(self, source):
        """A batch out of a DataLoader's iterator, on the device."""
        asked = time.perf_counter()
        batch = next(source)
        self.waited += time.perf_counter() - asked
        for why in filter(None, batch.pop("skipped")):
            print(f"skipped: {why}", file=sys.stderr)
            self.missed += 1
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def add(self, loss):
        self.loss += loss.detach()
        self.steps += 1

    def read(self):
        """Mean loss over steps and ranks, seconds. Waits for the device, as nothing else in the loop does."""
        sums = torch.stack([self.loss, torch.tensor(float(self.missed), device=self.device)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.skipped += int(sums[1].item())
        return sums[0].item() / self.steps / ranks()[1], time.perf_counter() - self.began


class Log:
    """log.jsonl, headed by the command, and a line on the console; rank 0 writes. A resumed run drops later lines."""

    def __init__(self, path, step, header):
        self.path = path
        if ranks()[0] > 0:
            return
        lines = path.read_text().splitlines() if step and path.exists() else []
        lines = [line for line in lines if self.step_of(line) <= step] + [json.dumps(header | {"versions": versions()})]
        write_whole(path, lambda part: part.write_text("".join(line + "\n" for line in lines)))
        print(f"{header['stage']}: {header['samples']} samples, {header['ranks']} rank(s) on {header['device']}, "
              f"{'from step ' + str(step) if step else 'from the start'}; log in {path}", flush=True)
        if torch.cuda.is_available():
            print("the seed fixes samples and masks; on a GPU the weights of two runs may still differ by rounding, "
                  "for it adds in no fixed order", flush=True)

    @staticmethod
    def step_of(line):
        """Step of a log line: 0 of a header, infinite of a line that a kill cut off."""
        try:
            return json.loads(line).get("step", 0)
        except ValueError:
            return math.inf

    def training(self, step, **values):
        """Numbers since the last line, and how the run fares."""
        temperature = f"temperature {values['temperature']:.4f} | " if "temperature" in values else ""
        eta = int(values["eta"])
        self.write(f"epoch {values['epoch']:.2f} step {step} | loss {values['loss']:.3f} | {temperature}"
                   f"lr {values['lr_weights']:.3g} {values['lr_biases']:.3g} | "
                   f"{values['clips_per_second']:.1f} clips/s | waiting {100 * values['waiting']:.0f} % | "
                   f"MFU {100 * values['mfu']:.0f} % | "
                   f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
                   + (f" | skipped {values['skipped']}" if values["skipped"] else ""), step=step, **values)

    def write(self, line, **values):
        if ranks()[0] == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            print(line, flush=True)


def make_optimizer(learner, settings):
    """LARS or Adam over two groups, each with its peak learning rate."""
    scale = settings.batch / 256 if settings.optimizer == "lars" else 1.0
    groups = parameter_groups(learner, settings.lr_weights * scale, settings.lr_biases * scale, settings.weight_decay)
    for group in groups:
        group["peak"] = group["lr"]
    return LARS(groups) if settings.optimizer == "lars" else torch.optim.Adam(groups)


def backward_in_slices(model, learner, batch, count, cast):
    """Loss of a batch and its gradients, with the activations of `count` samples at a time (Gao et al., 2021).

    The features of all slices come first, without activations. Then the loss, its gradient at every feature, and each
    slice once more, to send its features' gradients on into the weights.
    """
    slices = [dict(zip(batch, parts)) for parts in zip(*(value.split(count) for value in batch.values()))]
    with torch.no_grad(), cast:
        features = [torch.cat(parts).requires_grad_() for parts in zip(*map(learner, slices))]
    loss, weights = learner.loss(*features), [p for p in learner.parameters() if p.requires_grad]
    *at_features, at_weights = *torch.autograd.grad(loss, features, retain_graph=True), torch.autograd.grad(
        loss, weights, allow_unused=True)                      # of the weights, the loss itself has but a temperature
    at_slices = zip(*(gradient.split(count) for gradient in at_features))
    for i, (part, gradients) in enumerate(zip(slices, at_slices)):
        last = i == len(slices) - 1
        with nullcontext() if last or model is learner else model.no_sync():
            with cast:
                again = model(part)
            sent_on = sum((f.float() * g).sum() for f, g in zip(again, gradients) if f.requires_grad)
            if last:
                sent_on = sent_on + sum((p * g).sum() for p, g in zip(weights, at_weights) if g is not None)
            sent_on.backward()
    return loss


def doubts(loss, guessing, temperature=0.07, input_mean=0.0, input_std=1.0, padding=0.0):
    """What an epoch's last numbers say of a run that would come to nothing -> list of str."""
    found = []
    if loss > 0.99 * guessing:
        found.append(f"the loss, {loss:.3f}, is that of guessing, {guessing:.3f}. After the warm-up that means: lower "
                     f"--lr-weights and --lr-biases")
    if not 0.005 < temperature < 1:
        found.append(f"the temperature, {temperature:.2g}, has left 0.005 to 1, where this loss learns; lower "
                     f"--lr-biases")
    if not (abs(input_mean) < 0.7 and 0.4 < input_std < 2):
        found.append(f"the encoder's input has mean {input_mean:.2f} and std {input_std:.2f} instead of 0 and 1: do "
                     f"rate, mean and std fit these sounds? python data.py stats computes those of a dataset")
    if padding > 0.9:
        found.append(f"{100 * padding:.0f} % of what the encoder hears is padding: it wants longer sounds, or fewer "
                     f"--frames")
    return found


def stop_if_lost(step, loss, weights, skipped, samples, checkpoint):
    """Raises FloatingPointError where loss or weights are not finite, ValueError where over 1 % can't be read."""
    if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in weights):
        raise FloatingPointError(f"the loss is {loss} and the weights diverge at step {step}. The last good checkpoint "
                                 f"stays in {checkpoint}; lower --lr-weights or --lr-biases, or use --precision fp32")
    if skipped > 0.01 * samples:
        raise ValueError(f"{skipped} clips of this epoch could not be read, over 1 % of {samples}; mend or remove the "
                         f"files named above")


def train(learner, samples, settings, identity, validate, device):
    """*The* training loop: leaves <out>/checkpoint.pt and log.jsonl, and goes on from them if they are there.

    learner: forward(batch) -> features; loss(*features) -> (); report() -> numbers to log; flops() of a sample;
             guessing(batch) -> the loss of who guesses
    samples: len(), paths of their files, read(i, rng) -> dict of tensors; raises Unreadable
    identity: what the checkpoint says of itself, "stage" included
    validate: (learner) -> dict of numbers, called on every rank after each epoch; None: a timing, nothing is kept
    """
    rank, size = ranks()
    path = Path(settings.out) / "checkpoint.pt"
    steps_per_epoch = len(samples) // settings.batch
    if steps_per_epoch == 0:
        raise ValueError(f"{len(samples)} samples do not fill one batch of {settings.batch}; lower --batch")
    steps = settings.epochs * steps_per_epoch
    last = min(steps, settings.steps or steps)
    lock = Claim(path.with_name("lock")) if rank == 0 else None
    learner.to(device).train()
    optimizer = make_optimizer(learner, settings)
    identity = identity | {"samples": len(samples)}
    start, skipped, sizes = restore(path, learner, optimizer, settings, identity, samples.paths)
    gpu = device.type == "cuda"
    log = Log(path.with_name("log.jsonl"), start, identity | {
        "command": sys.argv, "settings": asdict(settings), "ranks": size,
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"})
    if settings.compile == "yes" or (settings.compile == "auto" and gpu):
        for module in learner.modules():
            if isinstance(module, VisionTransformer):
                module.compile()
    model = DistributedDataParallel(learner) if size > 1 else learner
    cast = autocast(device, settings.precision)
    rate = matmul_rate(device, cast)
    meter = Meter(device, skipped)
    source = iter(DataLoader(
        Draws(samples, settings.seed), num_workers=settings.workers, worker_init_fn=worker_starts,
        batch_sampler=batches(len(samples), settings.batch, settings.epochs, settings.seed, start),
        prefetch_factor=4 if settings.workers else None, pin_memory=gpu))

    for step in range(start + 1, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_factor(step - 1, steps_per_epoch) * group["peak"]
        batch = meter.next_batch(source)
        if settings.micro_batch:
            loss = backward_in_slices(model, learner, batch, settings.micro_batch, cast)
        else:
            with cast:
                features = model(batch)
            loss = learner.loss(*features)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.add(loss)

        epoch_ends = step % steps_per_epoch == 0
        saves = validate and (epoch_ends or step % settings.save_every == 0 or step == last)
        if not (saves or meter.steps == settings.log_every or step == last):
            continue
        mean_loss, seconds = meter.read()
        stop_if_lost(step, mean_loss, learner.parameters() if saves else (), meter.skipped, len(samples), path)
        speed, report = meter.steps * settings.batch / seconds, learner.report()
        log.training(step, epoch=step / steps_per_epoch, loss=mean_loss, **report,
                     lr_weights=optimizer.param_groups[0]["lr"], lr_biases=optimizer.param_groups[1]["lr"],
                     clips_per_second=speed, waiting=meter.waited / seconds, mfu=speed * learner.flops() / rate / size,
                     skipped=meter.skipped, eta=seconds / meter.steps * (last - step))
        if epoch_ends and validate:
            for doubt in doubts(loss.item(), learner.guessing(settings.batch), **report):
                log.write(f"  warning: {doubt}", step=step, warning=doubt)
            meter.skipped = 0
            epoch, found = step // steps_per_epoch, validate(learner.eval())
            log.write(f"  after epoch {epoch}: " + ", ".join(f"{name} {value:.1f} %" for name, value in found.items()),
                      step=step, epoch=epoch, **found)
            learner.train()
        if rank == 0 and saves:
            save_checkpoint(path, identity | {
                "settings": asdict(settings), "versions": versions(), "step": step, "steps": steps, "sizes": sizes,
                "skipped": meter.skipped, "learner": learner.state_dict(), "optimizer": optimizer.state_dict()})
        meter.restart()
    barrier()
    if rank == 0:
        lock.close()


# --------------------------------------------------------------------------------- the toy's CLIP

class ClipLearner(nn.Module):
    """The toy's CLIP itself, learned from image-caption pairs: the L_cst(V, T) term of Eq. 3."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, batch):
        return self.clip.encode_image(batch["image"]), self.clip.encode_text(batch["tokens"])  # 2 × (B, D)

    def loss(self, images, texts):
        return info_nce(images, texts, self.clip.logit_scale)

    def guessing(self, batch):
        return 2 * math.log(batch)

    def report(self):
        return {"temperature": self.clip.logit_scale.neg().exp().item()}

    def flops(self):
        return 3 * (self.clip.visual.flops() + self.clip.transformer.flops(self.clip.context_length))


class PairSamples:
    """Image-caption pairs, few enough to stay in memory: sample i is a picture and one of its captions."""
    paths = ()

    def __init__(self, clips, tokenizer, image_size):
        self.images = torch.stack([load_image(clip.frames[0], image_size) for clip in clips])   # (N, 3, R, R)
        self.tokens = [tokenizer(clip.captions) for clip in clips]                              # N × (captions, L)

    def __len__(self):
        return len(self.tokens)

    def read(self, i, rng):
        return {"image": self.images[i], "tokens": self.tokens[i][rng.integers(len(self.tokens[i]))]}


def make_toy_world(clip, device):
    """Make data/toy, and train the toy's CLIP on its image-caption pairs unless it is there or `clip` is another."""
    if ranks()[0] == 0 and not Path("data/toy").exists():
        make_toy("data/toy")
    barrier()
    if clip != TOY.clip or Path(clip).exists():
        return
    torch.manual_seed(TOY_CLIP.seed)
    tokenizer = Tokenizer(TOY.vocab, context_length=16)
    pairs = read_index("data/toy/pairs.jsonl", need=("frames", "captions"))
    val = read_index("data/toy/val.jsonl", need=("frames", "captions", "labels"))
    learner = ClipLearner(CLIP(image_size=64, patch=16, vision_width=128, vision_layers=3, context_length=16,
                               vocab_size=tokenizer.vocab_size, text_width=128, text_layers=1, output_dim=64))

    def validate(learner):
        images, _ = embed_all([c.frames[1] for c in val], partial(load_image, size=64), learner.clip.encode_image,
                              64, device)
        texts, _ = embed_all([c.captions[0] for c in val], lambda text: tokenizer([text])[0], learner.clip.encode_text,
                             64, device)
        return {f"image->text {k}": v for k, v in top1(images, texts, [c.id for c in val]).items()}

    identity = {"stage": "toy-clip", "data": digest_of(pairs)}
    train(learner, PairSamples(pairs, tokenizer, 64), TOY_CLIP, identity, validate, device)
    if ranks()[0] == 0:
        save_checkpoint(clip, learner.clip.state_dict())
    barrier()


# ------------------------------------------------------------------------------------- stage 1

def top1_hits(queries, gallery, labels):
    """Top-1 retrieval where relevant means the same label *set* (§3.2.2) -> precision, recall of each query (N,).

    queries, gallery: (N, D) unit vectors of the same N clips; labels: N collections of labels.
    """
    kinds = {}
    kind = torch.tensor([kinds.setdefault(frozenset(label), len(kinds)) for label in labels])      # (N,)
    best = torch.cat([(part @ gallery.T).argmax(1) for part in queries.split(1024)])               # (N,)
    hit = (kind[best] == kind).float()
    return hit, hit / torch.bincount(kind)[kind]


def top1(queries, gallery, labels):
    """The means of top1_hits in %."""
    precision, recall = top1_hits(queries, gallery, labels)
    return {"precision@1": 100 * precision.mean().item(), "recall@1": 100 * recall.mean().item()}


def training_clips(folder, leave_out):
    """The clips of a folder's training split that have frames, and which of them train: not those AudioCaps tests with.

    Raises FileNotFoundError, ValueError (no clip is left).
    """
    listed = read_split("audioset", folder, "train")
    clips = [clip for clip in listed if clip.audio and clip.frames]
    if not clips:
        raise ValueError(f"{folder}: not one of {len(listed)} clips has sound and frames; python data.py extract makes "
                         f"them from videos")
    held_out = held_out_by_audiocaps(clips, leave_out) if leave_out != "none" else [False] * len(clips)
    count = len(clips) - sum(held_out)
    if not count:
        raise ValueError(f"{folder}: every clip is in AudioCaps' val or test set ({leave_out}); --leave-out none "
                         f"trains on them")
    if ranks()[0] == 0 and leave_out != "none":
        print(f"{folder}: {sum(held_out)} clips left out, for AudioCaps' val and test sets hold them ({leave_out})")
    if ranks()[0] == 0 and count < len(listed):
        print(f"{folder}: {count} of {len(listed)} clips train")
    return clips, [not held for held in held_out]


def second_frames(clips, bank):
    """The embedding of each clip's second frame, the paper's middle one (N, D), and which clips have any (N,)."""
    rows = [bank.of(i)[:2][-1:] for i in range(len(clips))]
    has = torch.tensor([len(row) > 0 for row in rows])
    return torch.from_numpy(bank.embeddings[np.concatenate(rows)].astype(np.float32)), has


def frame_retrieval(clips, bank, device, workers):
    """(learner) -> how well clips' second frames find their sounds, in % (Fig. 5)."""
    if not clips:
        return lambda learner: {}
    images, has_image = second_frames(clips, bank)

    def validate(learner):
        audio, heard = learner.embed([c.audio for c in clips], device, workers)
        both = heard & has_image
        if not both.any():
            return {}
        labels = [c.labels for c, use in zip(clips, both) if use]
        return {f"image->audio {k}": v for k, v in top1(images[heard[has_image]], audio[both], labels).items()}
    return validate


def pretrain(settings, device):
    """VA pre-training (§3.2); leaves <out>/checkpoint.pt."""
    folder = dataset_folder(settings.data)
    clips, train_on = training_clips(folder, settings.leave_out)
    val = [clip for clip in read_split("audioset", folder, "val") if clip.frames]
    weights = cached(settings.clip)
    clip = load_clip(weights, device)
    banks, made_with = folder / "banks", clip_identity(clip, weights, settings.vocab)
    train_bank = frame_bank(banks / f"train-{made_with['fingerprint']}", clips, clip, device, settings.workers)
    val_bank = frame_bank(banks / f"val-{made_with['fingerprint']}", val, clip, device, settings.workers)
    torch.manual_seed(settings.seed)
    start = audio_encoder_from_clip if settings.init == "clip" else blank_audio_encoder
    encoder = start(clip, settings.frames, settings.mels, (settings.stride_time, settings.stride_mel))
    learner = AudioLearner(encoder, settings.front_end).requires_grad_(True)
    samples = AudioSamples(clips, [train_bank], sound_loader(folder, settings.front_end), train_on)
    identity = {"stage": "pretrain", "data": digest_of([c for c, use in zip(clips, train_on) if use]),
                "front_end": asdict(settings.front_end), "encoder": encoder.config,
                "clip": made_with}
    train(learner, samples, settings, identity, frame_retrieval(val, val_bank, device, settings.workers), device)


def time_steps(settings, device):
    """The paper's step on synthetic clips: its speed is in the log, nothing else is kept."""
    torch.manual_seed(settings.seed)
    encoder = VisionTransformer((settings.frames, settings.mels), 32, (settings.stride_time, settings.stride_mel),
                                channels=1, width=768, layers=12, heads=12, output_dim=512)
    train(AudioLearner(encoder, settings.front_end), RandomSamples(settings.front_end, 512), settings,
          {"stage": "random", "data": ""}, None, device)


def main():
    settings = parse(Settings(), PRESETS, description=__doc__)
    device = start_ranks()
    settings.check()
    if settings.data == "random":
        time_steps(replace(settings, out=settings.out or "out/random"), device)
        return
    if settings.data == "toy":
        make_toy_world(settings.clip, device)
    run_name = "pretrain" if settings.init == "clip" else "pretrain-random"
    settings = replace(settings, out=settings.out or f"out/{dataset_folder(settings.data).name}/{run_name}")
    pretrain(settings, device)
    if ranks()[0] == 0 and settings.data == "toy":
        flags = ["--task", "toy", "--checkpoint", f"{settings.out}/checkpoint.pt"]
        print("\n$ python evaluate.py " + " ".join(flags), flush=True)
        alone = {name: value for name, value in os.environ.items() if name != "RANK"}  # not a rank of this run
        done = subprocess.run([sys.executable, Path(__file__).with_name("evaluate.py"), *flags], check=False, env=alone)
        sys.exit(done.returncode)


if __name__ == "__main__":
    run(main)
