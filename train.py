"""*The* training loop of all stages: an audio encoder chases rows of banks (§3.2, Eq. 4).

`train` takes a learner that turns a batch into features and features into a loss, a reader of samples, and settings.
It leaves a checkpoint and a log, goes on from them after a kill, and does not know which stage it is: pretrain.py and
finetune.py hand it theirs, and so does the toy's own CLIP.

B  clips on this rank     D  embedding     T  frames     F  mel bins     N  clips
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
import timeit
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from bank import embed_all
from clip_load import BROKEN, VOCABULARY_PATH
from data import FrontEnd, Unreadable, mask
from model import (
    LARS,
    LOG_SCALE,
    VisionTransformer,
    info_nce,
    parameter_groups,
    schedule,
)
from processes import Claim, barrier, ranks, stamp, worker_starts, write_whole

# ------------------------------------------------------------------------------------ settings

def setting(default, help, choices=None, free=False):
    """A field of a stage's settings. `free`: may differ when a run is resumed, for it does not shape the result."""
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


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
    warmup_epochs: float = setting(10.0, "of linear warm-up (Table 5), then cosine to 0.1 %")
    lr_weights: float = setting(0.2, "peak, for weights; with lars times batch/256")
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
        per_rank, left = divmod(self.batch, ranks()[1])
        if left:
            raise ValueError(f"--batch {self.batch} can't be split over {ranks()[1]} ranks")
        if self.micro_batch and per_rank % self.micro_batch:
            raise ValueError(f"--micro-batch {self.micro_batch}: {per_rank} clips a rank can't be cut into such slices")


def parse(defaults, presets, argv=None, description=None):
    """Command line -> settings. --head or --data may name a preset; other flags override it; unknown ones fail."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(defaults):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), choices=f.metadata["choices"],
                            default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({f.default})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset = next((presets[given[name]] for name in ("head", "data") if given.get(name) in presets), defaults)
    return replace(preset, **given)


# ---------------------------------------------------------------------------- learner and samples

def masked_input(learner, batch):
    """A batch's filterbanks, normalised and masked (B, 1, T, F); learner.input keeps mean, std, share of padding."""
    # bf16 would round the mel energies
    with torch.no_grad(), torch.autocast(batch["wave"].device.type, enabled=False):
        x = learner.front_end(batch["wave"], batch["length"])                                # (B, 1, T, F)
        padding = 1 - batch["length"].float().mean() / learner.front_end.samples
        learner.input = {"input_mean": x.mean(), "input_std": x.std(), "padding": padding}
        return mask(x, batch["draws"])


class AudioLearner(nn.Module):
    """The trained part: audio encoder and temperature. Batches come from AudioSamples."""

    def __init__(self, audio_encoder, front_end):
        super().__init__()
        self.audio_encoder, self.front_end = audio_encoder, front_end
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, batch):
        """Batch -> audio features (B, D), their targets (B, kinds, D)."""
        return self.audio_encoder(masked_input(self, batch)), batch["target"]

    def loss(self, audio, targets):
        """The contrastive losses with each kind of target, summed: one in pre-training (Eq. 4), two in VAT (App. E)."""
        self.kinds = targets.shape[1]  # for `guessing`
        return sum(info_nce(audio, target, self.log_scale) for target in targets.unbind(1))

    def guessing(self, candidates):
        """The loss of who guesses, each candidate alike: log(candidates) for each way and kind of target."""
        return self.kinds * 2 * math.log(candidates)

    def report(self):
        """Numbers for the log; of the input, the last batch's."""
        return {"temperature": self.log_scale.neg().exp().item()} | {k: v.item() for k, v in self.input.items()}

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
        self.indices = np.array([i for i in range(len(clips)) if (train_on is None or train_on[i])
                                 and all(len(bank.of(i)) for bank in banks)])
        self.paths = np.array([os.fsencode(clips[i].audio) for i in self.indices])  # one array: forked workers share it
        self.banks, self.load = banks, load
        for bank in banks:
            bank.check()

    def __len__(self):
        return len(self.indices)

    def read(self, i, rng):
        wave, length = self.load(os.fsdecode(self.paths[i]))
        targets = torch.stack([bank.draw(self.indices[i], rng) for bank in self.banks])             # (kinds, D)
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


class Seeded(torch.utils.data.Dataset):
    """Samples by (epoch, i): all chance in a sample follows from seed, epoch and i, whoever reads it when."""

    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __getitem__(self, key):
        (epoch, i), reasons = key, []
        for offset in range(min(100, len(self.samples))):  # for a clip that can't be read the next one steps in
            try:
                rng = np.random.default_rng((self.seed, epoch, i))
                sample = self.samples.read((i + offset) % len(self.samples), rng)
                return sample | {"skipped": reasons[0] if reasons else ""}  # the others' own turns tell of them
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
        raise FileNotFoundError(f"{path}: no such checkpoint. Make it with pretrain.py, or name another; the toy's is "
                                "out/toy/pretrain/checkpoint.pt") from None
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
    except BROKEN as error:
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
    free = {f.name for f in fields(settings) if f.metadata["free"]}
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
        self.device, self.skipped = device, skipped  # on all ranks; skipped_here: on this one, since the last line
        self.restart()

    def restart(self):
        self.loss, self.steps, self.skipped_here = torch.zeros((), device=self.device), 0, 0
        self.waited, self.began = 0.0, time.perf_counter()

    def next_batch(self, source):
        """A batch out of a DataLoader's iterator, on the device."""
        asked = time.perf_counter()
        batch = next(source)
        self.waited += time.perf_counter() - asked
        for why in filter(None, batch.pop("skipped")):
            print(f"skipped: {why}", file=sys.stderr)
            self.skipped_here += 1
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def add(self, loss):
        self.loss += loss.detach()
        self.steps += 1

    def read(self):
        """Mean loss over steps and ranks, seconds. Waits for the device, as nothing else in the loop does."""
        sums = torch.stack([self.loss, torch.tensor(float(self.skipped_here), device=self.device)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.skipped += int(sums[1].item())
        return sums[0].item() / self.steps / ranks()[1], time.perf_counter() - self.began


def read_log(path):
    """A run's log.jsonl -> list of dict; lines that a kill cut off, or that are no numbers of ours, are left out."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no log beside the checkpoint; pretrain.py and finetune.py leave one")
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                lines.append(row)
    return lines


class Log:
    """log.jsonl, headed by the command, and a line on the console; rank 0 writes. A resumed run drops later lines."""

    def __init__(self, path, step, header):
        self.path = path
        if ranks()[0] > 0:
            return
        lines = read_log(path) if step and path.exists() else []
        lines = [line for line in lines if line.get("step", 0) <= step] + [header | {"versions": versions()}]
        write_whole(path, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in lines)))
        print(f"{header['stage']}: {header['samples']} samples, {header['ranks']} rank(s) on {header['device']}, "
              f"{'from step ' + str(step) if step else 'from the start'}; log in {path}", flush=True)
        if torch.cuda.is_available():
            print("the seed fixes samples and masks; on a GPU the weights of two runs may still differ by rounding, "
                  "for it adds in no fixed order", flush=True)

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


def autocast(device, precision):
    """Autocast to bf16 where asked for, or where the device multiplies it faster than fp32."""
    # False: a card that emulates bf16 is not fast at it
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
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


def make_optimizer(learner, settings):
    """LARS or Adam over two groups, each with its peak learning rate."""
    # differs from the paper, which does not say: LARS's rates are for 256 clips a step, as in the authors' code
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
    weights = [p for p in learner.parameters() if p.requires_grad]
    loss = learner.loss(*features)
    at_all = torch.autograd.grad(loss, features + weights, allow_unused=True)  # weights: the loss uses log_scale alone
    at_features, at_weights = at_all[:len(features)], at_all[len(features):]
    at_slices = zip(*(gradient.split(count) for gradient in at_features))
    for i, (part, gradients) in enumerate(zip(slices, at_slices)):
        last = i == len(slices) - 1
        with nullcontext() if last or model is learner else model.no_sync():  # ranks average once, in the last
            with cast:
                again = model(part)
            # the gradient of Σ f·g is g times f's own: the chain rule, with g from the whole batch
            surrogate = sum((f.float() * g).sum() for f, g in zip(again, gradients) if f.requires_grad)
            if last:
                surrogate = surrogate + sum((p * g).sum() for p, g in zip(weights, at_weights) if g is not None)
            surrogate.backward()
    return loss


def doubts(loss, guessing, temperature=0.07, input_mean=0.0, input_std=1.0, padding=0.0):
    """What an epoch's last numbers say of a run that would come to nothing -> list of str; defaults raise no doubt."""
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
             guessing(candidates) -> the loss of who guesses
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
    flop_rate = matmul_rate(device, cast)
    meter = Meter(device, skipped)
    source = iter(DataLoader(
        Seeded(samples, settings.seed), num_workers=settings.workers, worker_init_fn=worker_starts,
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
        # all weights are looked at only before they are saved
        stop_if_lost(step, mean_loss, learner.parameters() if saves else (), meter.skipped, len(samples), path)
        speed, report = meter.steps * settings.batch / seconds, learner.report()
        log.training(step, epoch=step / steps_per_epoch, loss=mean_loss, **report,
                     lr_weights=optimizer.param_groups[0]["lr"], lr_biases=optimizer.param_groups[1]["lr"],
                     clips_per_second=speed, waiting=meter.waited / seconds, skipped=meter.skipped,
                     mfu=speed * learner.flops() / flop_rate / size, eta=seconds / meter.steps * (last - step))
        if epoch_ends and validate:
            # the last step's loss: the mean since the last line would hide what has just gone wrong
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
