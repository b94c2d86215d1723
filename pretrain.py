"""Stage 1: an audio encoder chases frozen CLIP embeddings of video frames (§3.2, Eq. 4).

    python pretrain.py --data toy                # minutes on a laptop: toy world, its CLIP, vip-AnT
    python pretrain.py --data toy --init random  # VA-Rand
    python pretrain.py --data data/mine          # your own videos, after data.py extract
    torchrun --nproc_per_node=4 pretrain.py      # the paper's run, on data/audioset

CLIP never changes, so it runs once over all frames and leaves a *bank* of embeddings. What is left
is an audio encoder that chases rows of an array: `train`, which serves every stage.

B  clips on this rank   N  clips   M  rows of a bank   D  embedding   T, F  frames and mel bins
"""
import json
import os
import runpy
import sys
import time
import timeit
from argparse import SUPPRESS
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from clip_load import (Tokenizer, audio_encoder_from_clip, digest, load_clip, load_tokenizer,
                       pack_clip, read_weights, short_digest)
from data import (GET_IT, TABLES, FrontEnd, Parser, Remember, Unreadable, dataset_folder,
                  load_image, loader, make_toy, mask, read_index, read_published, read_split,
                  reading, run, write_whole)
from model import (CLIP, LARS, LOG_SCALE, VisionTransformer, info_nce, join_ranks,
                   parameter_groups, print0, rank_and_size, schedule, unit)

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

# ----------------------------------------------------------------------------------- settings
def setting(default, help, choices=None, free=False):
    """A field of a stage's settings. `free`: may change when a run goes on."""
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


@dataclass(frozen=True)
class Training:
    """What every training has to settle; defaults are the paper's VA pre-training (Table 5)."""
    out: str = setting("", "the run's folder; empty: out/<dataset>/<what is trained>", free=True)
    seed: int = setting(0, "fixes weights, order, frames and masks")
    optimizer: str = setting("lars", "of Table 5", ["lars", "adam"])
    batch: int = setting(432, "clips a step over all ranks; each other's negatives")
    epochs: int = setting(25, "passes over the training clips")
    steps: int = setting(0, "train for so many instead, measured at their end")
    warmup_epochs: float = setting(10.0, "of linear warm-up, then cosine to 0.1 %")
    warmup_steps: int = setting(0, "of linear warm-up instead")
    lr_weights: float = setting(0.2, "peak for weights; with lars times batch/256")
    lr_biases: float = setting(4.8e-3, "the same for biases, norms and temperature")
    weight_decay: float = setting(1e-6, "on weights")
    precision: str = setting("auto", "auto: bf16 where it is fast", ["auto", "bf16", "fp32"])
    compile: str = setting("auto", "torch.compile; auto: on CUDA", ["auto", "yes", "no"], free=True)
    recompute: bool = setting(False, "compute activations twice: less memory", free=True)
    workers: int = setting(min(8, os.cpu_count() or 1), "decoding processes a rank", free=True)
    log_every: int = setting(50, "steps between log lines", free=True)
    save_every: int = setting(1000, "steps between checkpoints, besides epochs' ends", free=True)

    def lr_factor(self, step, steps, steps_per_epoch):
        """Factor on the peak learning rates at a step of so many."""
        return schedule(step, steps, self.warmup_steps or self.warmup_epochs * steps_per_epoch)


@dataclass(frozen=True)
class Settings(Training):
    """VA pre-training; the command line is derived from this."""
    data: str = setting("audioset", "a dataset's name or its folder", free=True)
    clip: str = setting("ViT-B/32", "one of OpenAI's names, or a path to weights", free=True)
    vocab: str = setting("", "path of the tokenizer's vocabulary; empty: CLIP's", free=True)
    init: str = setting("clip", "start: clip is vip-AnT, random is VA-Rand", ["clip", "random"])
    leave_out: str = setting("data/audiocaps", "its test clips do not train; or none", free=True)
    sample_rate: int = setting(FrontEnd.sample_rate, "Hz; audio is resampled to it")
    mels: int = setting(FrontEnd.mels, "mel bins")
    frames: int = setting(FrontEnd.frames, "of 10 ms that the encoder hears")
    mean: float = setting(FrontEnd.mean, "of the training set's log-mel values at that rate")
    std: float = setting(FrontEnd.std, "of the same")
    stride_time: int = setting(16, "frames between patches")
    stride_mel: int = setting(24, "mel bins between patches")


# Half the paper's patches and mel bins, side by side; mean, std are the toy's; 62 steps an epoch.
# No workers: one process reads each file once, several would each remember their own.
TOY = Settings(data="toy", leave_out="none", clip="out/toy/clip/clip.pt",
               vocab="data/toy/vocab.txt.gz", sample_rate=16_000, mels=64, frames=100, mean=-2.16,
               std=3.5, stride_time=16, stride_mel=16, batch=64, epochs=7, warmup_epochs=0.5,
               lr_weights=5.0, lr_biases=7e-3, precision="fp32", workers=0, log_every=62)


def parse(defaults, presets, argv=None, description=None):
    """Command line -> settings. --head or `--data toy` means a preset, which flags override."""
    parser = Parser(description=description, argument_default=SUPPRESS)
    for f in fields(defaults):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": "store_true"}
        elif f.type is tuple:
            kind = {"type": float, "nargs": "+"}
        text = f"{f.metadata['help']} ({getattr(defaults, f.name)})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.get("head") or ("toy" if given.get("data") == "toy" else None)
    return replace(presets.get(preset, defaults), **given)


# ---------------------------------------------------------------------- banks, in chunk files
CHUNK = 4096  # rows in a file
open_chunk = lru_cache(partial(np.load, mmap_mode="r"))  # path -> array, mapped into memory


def in_chunks(folder, count, make, description):
    """`count` rows in files of CHUNK, made by the ranks in turn, and kept -> the files' paths."""
    # make(start, end) yields rows in parts (b, ...)
    rank, size = rank_and_size()
    paths = [Path(folder) / f"{start:09d}.npy" for start in range(0, count, CHUNK)]
    todo = [i for i in range(rank, len(paths), size) if not paths[i].exists()]
    total = min(count, len(todo) * CHUNK)
    with tqdm(total=total, desc=description, unit="", disable=rank > 0 or not todo) as bar:
        for i in todo:
            parts = []
            for part in make(i * CHUNK, min((i + 1) * CHUNK, count)):
                parts.append(part)
                bar.update(len(part))
            write_whole(paths[i], partial(np.save, arr=np.concatenate(parts)))
    if size > 1:
        torch.distributed.barrier()  # the other ranks' files are there, too
    return paths


def read_batch(items, read):
    """Items read in a worker process -> their number, places of good ones, a batch of these."""
    samples = {}
    for i, item in enumerate(items):
        try:
            samples[i] = read(item)
        except Unreadable as error:
            print(f"skipped: {error}", file=sys.stderr)
    return len(items), list(samples), default_collate([*samples.values()]) if samples else None


@torch.no_grad()
def embed(items, read, encode, D, workers=0):
    """Unit vectors of encode(batch of read(item)): yields (b, D) on the CPU, zeros for bad ones."""
    read_some = partial(read_batch, read=read)
    for count, good, batch in loader(items, workers, batch_size=128, collate_fn=read_some):
        features = torch.zeros(count, D)
        if good:
            features[good] = unit(encode(batch)).cpu()
        yield features


def embed_all(items, read, encode, tower, workers):
    """Unit embeddings in memory, all on each rank -> (N, D) on the CPU. tower: encode's module."""
    rank, size = rank_and_size()
    D = tower.proj.shape[1]
    features = torch.zeros(len(items), D, device=tower.proj.device)
    parts = embed(items[rank::size], read, encode, D, workers)
    features[rank::size] = torch.cat([torch.zeros(0, D), *parts])
    if size > 1:
        torch.distributed.all_reduce(features)  # a sum: one rank made a row, the others left it 0
    return features.cpu()


def embed_to_disk(folder, kind, names, items, read, encode, clip, workers=0):
    """CLIP's unit embeddings of items, (M, D) fp16, in a folder named after them -> chunk files."""
    def make(start, end):
        for features in embed(items[start:end], read, encode, clip.visual.proj.shape[1], workers):
            yield features.half().numpy()

    folder = Path(folder) / f"{kind}-{short_digest(digest(clip), *names)}"
    return in_chunks(folder, len(items), make, f"CLIP embeds {len(items)} {kind}")


def text_bank(folder, texts, clip, tokenizer):
    """CLIP's embeddings of texts, as embed_to_disk leaves them."""
    return embed_to_disk(folder, "texts", texts, texts, lambda text: tokenizer([text])[0],
                         clip.encode_text, clip)


def frame_bank(folder, clips, clip, workers):
    """Bank of CLIP's embeddings of all frames of clips."""
    frames = list(chain.from_iterable(c.frames for c in clips))
    names = [c.id for c in clips] + [os.path.basename(frame) for frame in frames]
    read = partial(load_image, size=clip.image_size)
    paths = embed_to_disk(folder, "frames", names, frames, read, clip.encode_image, clip, workers)
    return Bank(paths, np.arange(len(frames)), [len(c.frames) for c in clips])


class Bank:
    """Embeddings (M, D) in chunk files, 0 for what can't be read; clip i has counts[i] `rows`."""

    def __init__(self, paths, rows, counts):
        self.paths, self.rows, self.starts = paths, rows, np.cumsum([0, *counts])

    def of(self, i):
        """Numbers of clip i's rows."""
        return self.rows[self.starts[i]:self.starts[i + 1]]

    def draw(self, i, rng):
        """One of clip i's embeddings at random -> (D,). Raises Unreadable where it has none."""
        for row in rng.permutation(self.of(i)):
            target = torch.tensor(open_chunk(self.paths[row // CHUNK])[row % CHUNK]).float()
            if target.any():
                return target
        raise Unreadable(f"clip {i} (from 0): no readable frame")


# ------------------------------------------------------------------------ learner and samples
class AudioLearner(nn.Module):
    """What learns: audio encoder and temperature. Batches come from AudioSamples."""

    def __init__(self, audio_encoder, front_end):
        super().__init__()
        self.audio_encoder, self.front_end = audio_encoder, front_end
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, batch):
        """Batch -> audio features (B, D), their targets (B, kinds, D)."""
        wave = batch["wave"]
        # no autocast: bf16 would round the mel energies
        with torch.autocast(wave.device.type, enabled=False):
            x = mask(self.front_end(wave, batch["length"]), batch["draws"])      # (B, 1, T, F)
        return self.audio_encoder(x), batch["target"]

    def loss(self, audio, targets):
        """Contrastive losses with each kind of target, summed: one (Eq. 4), in VAT two (App. E)."""
        return sum(info_nce(audio, target, self.log_scale) for target in targets.unbind(1))

    def encode(self, batch):
        """Padded waveforms and their lengths, on any device -> audio features (B, D)."""
        wave, length = (part.to(self.audio_encoder.proj.device) for part in batch)
        return self.audio_encoder(self.front_end(wave, length))

    def embed(self, paths, workers=0):
        """Unit embeddings of sound files -> (N, D), zeros where one can't be read."""
        if isinstance(self.front_end, Remember):
            workers = 0  # what a worker process remembers ends with it
        return embed_all(paths, self.front_end.load, self.encode, self.audio_encoder, workers)


class AudioSamples:
    """samples[epoch, i], by seed, epoch, i alone: wave (S,), length, target (kinds, D), draws."""
    remember = Remember  # the front end of a small set

    def __init__(self, clips, banks, front_end, seed):
        # an array, for forked workers copy a list's strings when they count references to them
        self.paths = np.array([os.fsencode(clip.audio) for clip in clips])
        names = (short_digest(clip.id, *clip.captions, *clip.labels) for clip in clips)
        self.clips = f"{len(clips)}, {short_digest(*names)}"  # which they are
        self.banks, self.front_end, self.seed = banks, front_end, seed
        if 4 * len(clips) * front_end.samples < 2 ** 28:  # bytes
            self.front_end = self.remember(**vars(front_end))

    def __len__(self):
        return len(self.paths)

    def read(self, i, rng):
        wave, length = self.front_end.load(os.fsdecode(self.paths[i]))
        target = torch.stack([bank.draw(i, rng) for bank in self.banks])         # (kinds, D)
        draws = rng.random(4, np.float32)
        return {"wave": wave, "length": length, "target": target, "draws": draws}

    def __getitem__(self, key):
        epoch, i = key
        for offset in range(min(100, len(self))):  # the next one steps in for a bad one
            rng = np.random.default_rng((self.seed, epoch, i + offset))
            try:
                return self.read((i + offset) % len(self), rng) | {"skipped": offset > 0}
            except Unreadable as error:
                reason = f"skipped: {error}"
            if offset == 0:  # the others are named in their own turn
                print(reason, file=sys.stderr)
        raise ValueError(f"{offset + 1} clips in a row can't be read; {reason}")


def batches(count, batch, seed, start, steps):
    """This rank's part, [(epoch, i)], of batches `start` to `steps`; an epoch's rest drops out."""
    rank, size = rank_and_size()
    for step in range(start, steps):
        epoch, at = divmod(step, count // batch)
        if at == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(count)
        mine = order[at * batch:(at + 1) * batch].reshape(size, -1)[rank]
        yield [(epoch, int(i)) for i in mine]


def check_input(samples):
    """Warn where what the encoder hears is not normalised: wrong --mean and --std."""
    some = default_collate([samples[0, i] for i in range(min(32, len(samples)))])
    x = samples.front_end(some["wave"], some["length"])                          # (32, 1, T, F)
    if abs(x.mean()) > 0.7 or not 0.4 < x.std() < 2:
        print0(f"warning: input's mean {x.mean():.2f}, std {x.std():.2f}: see data.py stats")


# -------------------------------------------------------------------------------- checkpoints
def load_checkpoint(path, stages):
    """A checkpoint of one of `stages`, a dict. Raises FileNotFoundError, Unreadable."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; run pretrain.py, or clip_load.py vipant")
    with reading(path, f"{' or '.join(stages)} checkpoint"):
        checkpoint = read_weights(path)
        if checkpoint["stage"] not in stages:
            raise ValueError(f"of stage '{checkpoint['stage']}'")
    return checkpoint


def resume(path, learner, optimizer, settings, about):
    """Go on from a run's own checkpoint, if any -> step. Raises ValueError (of another run)."""
    if not path.exists():
        return 0
    saved = load_checkpoint(path, [about["stage"]])
    then = saved | saved["settings"]  # an imported one has no "clips" and "start"
    now = vars(settings) | {"clips": about["clips"], "start": about["start"]}
    free = {f.name for f in fields(settings) if f.metadata["free"]}
    changed = [f"{name} was {then.get(name)!r} and is {value!r}" for name, value in now.items()
               if name not in free and then.get(name) != value]
    if changed:
        raise ValueError(f"{path}: {', '.join(changed)}; choose another --out, or delete it")
    learner.load_state_dict(saved["learner"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


# ----------------------------------------------------------------------------------- the loop
def make_optimizer(learner, settings):
    """LARS or Adam over weights and biases, each with its peak learning rate."""
    # differs from the paper, which does not say: LARS's rates are for 256 clips a step (authors')
    scale = settings.batch / 256 if settings.optimizer == "lars" else 1.0
    groups = parameter_groups(learner, settings.lr_weights * scale, settings.lr_biases * scale,
                              settings.weight_decay)
    return LARS(groups) if settings.optimizer == "lars" else torch.optim.Adam(groups)


def matmul_rate(device):
    """Measured rate of large matrix products in FLOP/s: MFU is the share of it that is used."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, 1, device=device) @ torch.randn(1, size, device=device)  # autocast's type
    times = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5)  # .item() waits for it
    return 2 * size ** 3 / min(times)


def train(learner, samples, settings, about, validate, device):
    """The training loop of every stage, over AudioSamples; leaves checkpoint.pt and log.jsonl.

    learner   forward(batch) -> features; loss(*features) -> ()
    about     what the checkpoint says of itself: "stage", "start" (a digest), and more
    validate  (learner) -> dict of numbers in %, called on every rank after each epoch
    """
    rank, size = rank_and_size()
    count = len(samples)
    gpu = device.type == "cuda"
    path = Path(settings.out) / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if settings.batch % size or not 0 < settings.batch <= count:
        raise ValueError(f"--batch {settings.batch}: up to {count}, shared by {size} rank(s)")
    steps_per_epoch = count // settings.batch
    steps = settings.steps or settings.epochs * steps_per_epoch
    if settings.precision == "auto":
        cpu_is_fast = torch.cpu._is_avx512_bf16_supported()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else cpu_is_fast
        settings = replace(settings, precision="bf16" if fast else "fp32")
    learner.to(device).train()
    learner.front_end = samples.front_end  # a small set's takes filterbanks
    check_input(samples)
    optimizer = make_optimizer(learner, settings)
    about = about | {"clips": samples.clips}
    start = resume(path, learner, optimizer, settings, about)
    learner.audio_encoder.transformer.recompute = settings.recompute
    if settings.compile == "yes" or settings.compile == "auto" and gpu:
        learner.audio_encoder.compile()
    model = nn.parallel.DistributedDataParallel(learner) if size > 1 else learner
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    with autocast:  # clips/s, if all were matrix products; a backward pass costs two forward
        peak_speed = size * matmul_rate(device) / (3 * learner.audio_encoder.flops())
    order = batches(count, settings.batch, settings.seed, start, steps)
    source = loader(samples, settings.workers, batch_sampler=order, pin_memory=gpu)
    # written line by line, by rank 0; a resumed run repeats some steps
    log = open(os.devnull if rank else path.with_name("log.jsonl"), "a", buffering=1)
    print(json.dumps({"command": sys.argv, "settings": vars(settings), "ranks": size}), file=log)
    print0(f"{settings.out}: {count} clips, step {start} of {steps}, {size} rank(s) on {device}")
    logged, began, skipped = start, time.perf_counter(), 0
    losses = torch.zeros((), device=device)  # summed on the device: to read it waits for the step

    for step, batch in enumerate(source, start + 1):
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * settings.lr_factor(step - 1, steps, steps_per_epoch)
        # batch
        if (step - 1) % steps_per_epoch == 0:
            skipped = 0
        skipped += batch.pop("skipped").sum().item()
        batch = {name: part.to(device, non_blocking=True) for name, part in batch.items()}
        # step
        with autocast:
            features = model(batch)
        loss = learner.loss(*features)  # outside of DDP, whose hooks are on the parameters
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.detach()
        # log
        epoch_ends = step == steps if settings.steps else step % steps_per_epoch == 0
        saves = epoch_ends or step % settings.save_every == 0
        if not saves and step % settings.log_every:
            continue
        mean_loss, seconds = losses.item() / (step - logged), time.perf_counter() - began
        if not all(p.isfinite().all() for p in (losses, *learner.parameters())):
            raise ValueError(f"loss {mean_loss}: weights diverge; lower --lr-weights, --lr-biases")
        if skipped > max(10, 0.01 * count / size):
            raise ValueError(f"{skipped} clips of this epoch can't be read, more than ten and more "
                             f"than 1 %; mend or remove the files named above, and the banks")
        speed = (step - logged) * settings.batch / seconds
        numbers = {"epoch": step / steps_per_epoch, "loss": mean_loss,
                   "temperature": learner.log_scale.neg().exp().item(),
                   "lr": optimizer.param_groups[0]["lr"], "clips/s": speed,
                   "MFU": speed / peak_speed, "skipped": skipped,
                   "minutes left": (steps - step) * settings.batch / speed / 60}
        scores = validate(learner.eval()) if epoch_ends else {}
        learner.train()
        line = " | ".join(f"{name} {value:.4g}" for name, value in (numbers | scores).items())
        print(json.dumps({"step": step, **numbers, "validation": scores}), file=log)
        print0(f"step {step} | {line}")
        # save
        if saves and rank == 0:
            write_whole(path, partial(torch.save, about | {
                "encoder": learner.audio_encoder.config, "front_end": vars(learner.front_end),
                "settings": vars(settings), "step": step, "torch": str(torch.__version__),
                "learner": learner.state_dict(), "optimizer": optimizer.state_dict()}))
        losses.zero_()
        logged, began = step, time.perf_counter()


# ------------------------------------------------------------------------------------ stage 1
def top1_hits(queries, gallery, clips):
    """Top-1 by label *set* (§3.2.2), else clip; both (N, D) -> precision, recall, 2 × (N,)."""
    sets = ["\n".join(sorted(set(clip.labels))) or clip.id for clip in clips]
    kind = torch.from_numpy(np.unique(sets, return_inverse=True)[1])             # (N,)
    best = torch.cat([(part @ gallery.T).argmax(1) for part in queries.split(1024)])  # (N,)
    hit = (kind[best] == kind).float()
    return hit, hit / torch.bincount(kind)[kind]


def frame_retrieval(folder, clip, workers):
    """(learner) -> how often a val clip's second frame finds a sound of its labels, % (Fig. 5)."""
    try:
        listed = read_split("audioset", folder, "val")
    except FileNotFoundError as error:
        print0(f"no validation: {error}")
        return lambda learner: {}
    clips = [each for each in listed if each.audio and each.frames]
    read = partial(load_image, size=clip.image_size)
    second = [each.middle_frame for each in clips]
    images = embed_all(second, read, clip.encode_image, clip.visual, workers)    # (N, D)

    def validate(learner):
        audio = learner.embed([each.audio for each in clips], workers)           # (N, D)
        both = audio.any(1) & images.any(1)  # can be read
        if not both.any():
            return {}
        hit, _ = top1_hits(images[both], audio[both], [clips[i] for i in both.nonzero()])
        return {"image->audio precision@1": 100 * hit.mean().item()}

    return validate


def held_out_by_audiocaps(tables, folder):
    """Videos that AudioCaps tests, which must not train -> set. Raises FileNotFoundError."""
    val, test = Path(tables) / "val.csv", Path(tables) / "test.csv"
    if val.exists() and test.exists():
        return {segment.video for segment in read_published(val) + read_published(test)}
    youtubes = (*TABLES["audioset"], *TABLES["vggsound"])  # asked for beside their tables
    if any((Path(folder) / table).exists() for table in youtubes):
        raise FileNotFoundError(f"{tables}: no val.csv and test.csv of AudioCaps, whose clips are "
                                f"to be left out of training; or --leave-out none. {GET_IT}")
    return set()


def training_clips(folder, leave_out):
    """A folder's training clips with sound and frames, without those that AudioCaps tests."""
    listed = read_split("audioset", folder, "train")
    whole = [clip for clip in listed if clip.audio and clip.frames]
    held_out = set() if leave_out == "none" else held_out_by_audiocaps(leave_out, folder)
    clips = [clip for clip in whole if clip.id[:11] not in held_out]
    print0(f"{folder}: {len(clips)} of {len(listed)} clips train; {len(listed) - len(whole)} lack "
           f"sound or frames, {len(whole) - len(clips)} are of videos that AudioCaps tests")
    if not clips:
        raise ValueError(f"{folder}: no clip to train on; data.py extract cuts them out of videos")
    return clips


def pretrain(settings, device):
    """VA pre-training (§3.2); leaves <out>/checkpoint.pt."""
    folder = dataset_folder(settings.data)
    banks = Path(settings.out).parent / "banks"  # beside the run: other runs use them too
    clips = training_clips(folder, settings.leave_out)
    clip = load_clip(settings.clip, device)
    tokenizer = load_tokenizer(settings.vocab, clip)
    validate = frame_retrieval(folder, clip, settings.workers)
    bank = frame_bank(banks, clips, clip, settings.workers)
    strides = settings.stride_time, settings.stride_mel
    encoder = audio_encoder_from_clip(clip, settings.frames, settings.mels, strides)
    if settings.init == "random":  # VA-Rand (§4)
        torch.manual_seed(settings.seed)
        encoder = VisionTransformer(**encoder.config)
    front_end = FrontEnd(settings.sample_rate, settings.mels, settings.frames, settings.mean,
                         settings.std)
    samples = AudioSamples(clips, [bank], front_end, settings.seed)
    about = {"stage": "pretrain", "start": digest(clip), "clip": pack_clip(clip, tokenizer)}
    train(AudioLearner(encoder, front_end), samples, settings, about, validate, device)


# ------------------------------------------------------------------------------ the toy's CLIP
def make_toy_world():
    """Make data/toy, and its CLIP from its image-caption pairs, by L_cst(V, T) of Eq. 3."""
    if not Path("data/toy").exists():
        make_toy("data/toy")
    if Path(TOY.clip).exists():
        return
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOY.vocab, context_length=16)
    clip = CLIP(image_size=64, patch=16, vision_width=128, vision_layers=3, context_length=16,
                vocab_size=tokenizer.vocab_size, text_width=128, text_layers=1, output_dim=64)
    pairs = read_index("data/toy/pairs.jsonl", need=("frames", "captions"))
    images = torch.stack([load_image(pair.frames[0], 64) for pair in pairs])     # (N, 3, R, R)
    tokens = tokenizer([pair.captions[0] for pair in pairs])                     # (N, L)
    optimizer = torch.optim.Adam(clip.parameters(), fused=True)
    order = torch.cat([torch.randperm(len(pairs)) for _ in range(5)]).split(128)  # 5 epochs
    for step, rows in enumerate(tqdm(order, desc="the toy's CLIP")):
        optimizer.param_groups[0]["lr"] = 5e-4 * schedule(step, len(order), warmup_steps=20)
        loss = info_nce(clip.encode_image(images[rows]), clip.encode_text(tokens[rows]),
                        clip.logit_scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_whole(TOY.clip, partial(torch.save, clip.state_dict()))


def main():
    settings = parse(Settings(), {"toy": TOY}, description=__doc__)
    toy = settings.data == "toy"
    if toy and os.environ.get("RANK", "0") == "0":
        make_toy_world()
    device = join_ranks()  # where the others wait for the toy's CLIP
    name = "pretrain" if settings.init == "clip" else "pretrain-random"
    out = settings.out or f"out/{dataset_folder(settings.data).name}/{name}"
    pretrain(replace(settings, out=out), device)
    flags = ["--checkpoint", f"{out}/checkpoint.pt", "--task", "toy" if toy else "all"]
    print0(f"next: python evaluate.py {' '.join(flags)}; or --task search --audio DIR --query TEXT")
    if toy and "RANK" not in os.environ:
        sys.argv[1:] = flags  # in this process, which has imported PyTorch already
        runpy.run_path(Path(__file__).with_name("evaluate.py"), run_name="__main__")


if __name__ == "__main__":
    run(main)
