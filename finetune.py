"""Stage 3: a pre-trained audio encoder learns from captions (§3.3), or from labels (App. C).

    python finetune.py --source ac                     # AT, on curate.py's pairs
    python finetune.py --source gc --pairs 442         # few-shot: so many gold pairs (Fig. 7)
    python finetune.py --source gc --objective vat     # captions and frames at once (App. E)
    python finetune.py --head esc50                    # supervised, over the folds: mean ± std
    python finetune.py --head esc10                    # on a laptop: a small encoder from scratch

The loop is pretrain.py's. Here are other targets (captions, labels), other starts, and a head.

B  clips on this rank   N  clips   K  classes   D  embedding   T, F  frames and mel bins
"""
import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

from clip_load import audio_encoder_from_clip, digest, load_clip, pack_clip
from curate import CLIPS_OF
from data import (FrontEnd, RememberSounds, captions_of, dataset_folder, read_index, read_split,
                  run)
from evaluate import (PAPER, Labels, Model, average_precision, labels_of, retrieval_metrics,
                      save)
from model import VisionTransformer, join_ranks, print0, unit
from pretrain import (AudioLearner, AudioSamples, Bank, Training, frame_bank, parse, setting,
                      text_bank, train)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Settings(Training):
    """AT fine-tuning as in the paper (Table 5); PRESETS has the heads'."""
    source: str = setting("", "train on captions: curate.py's source", list(CLIPS_OF))
    head: str = setting("", "train on labels", list(PAPER["heads"]))
    data: str = setting("", "folder of the clips; empty: the source's", free=True)
    init: str = setting("", "checkpoint to start from; empty: pre-training's on this data, or on "
                        "AudioSet; for a head also clip, or random: a small encoder", free=True)
    objective: str = setting("at", "audio and captions; vat: and frames", ["at", "vat"])
    pairs: int = setting(0, "first so many of a seeded shuffle; 0: all")
    batch: int = setting(64, "clips a step over all ranks")
    last_layers: int = setting(-1, "head: blocks that learn; 0: a linear probe; -1: all")
    mixup: float = setting(0.0, "head: share of clips mixed with another")
    halve_epochs: tuple = setting((), "halve the rates after these; none: cosine")
    halve_steps: tuple = setting((), "the same")

    def lr_factor(self, step, steps, steps_per_epoch):
        """As in pre-training; or linear warm-up, then half as much after each milestone."""
        milestones = [*self.halve_steps, *(at * steps_per_epoch for at in self.halve_epochs)]
        if not milestones:
            return super().lr_factor(step, steps, steps_per_epoch)
        halvings = sum(step >= at for at in milestones)
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * 0.5 ** halvings


# Table 5: ESC-50 and US8K; then AudioSet, balanced and unbalanced.
FOLDS = Settings(batch=50, epochs=50, lr_weights=1.0, lr_biases=2.4e-2)
TAGS = Settings(data="audioset", optimizer="adam", lr_weights=5e-5, lr_biases=5e-5,
                weight_decay=1e-7, warmup_steps=1000, mixup=0.5)
PRESETS = {
    "esc50": replace(FOLDS, data="esc50"),
    "us8k": replace(FOLDS, data="us8k"),
    "audioset-balanced": replace(TAGS, batch=12, last_layers=4, halve_epochs=(5, 9, 10, 11, 12)),
    "audioset": replace(TAGS, batch=128, epochs=5, halve_steps=(
        7500, 15_000, 20_000, 25_000, 35_000, 40_000, 45_000, 50_000)),
    "esc10": Settings(data="esc50", init="random", optimizer="adam", batch=32, epochs=30,
                      warmup_epochs=3.0, lr_weights=1e-3, lr_biases=1e-3, weight_decay=0.0,
                      mixup=0.5, workers=0, log_every=100),
    "toy": Settings(data="toy", init="out/toy/pretrain/checkpoint.pt", epochs=10, warmup_epochs=1.0,
                    lr_weights=2.0, precision="fp32", workers=0, log_every=100),
}


# ---------------------------------------------------------------------------------- the start
def start_of(init):
    """The audio learner that a head starts from."""
    if init == "clip":
        return AudioLearner(audio_encoder_from_clip(load_clip("ViT-B/32")), FrontEnd())
    if init == "random":  # small enough for a laptop: 5 s at 16 kHz; mean and std are ESC-10's
        encoder = VisionTransformer((500, 64), patch=16, stride=(12, 12), channels=1, width=128,
                                    layers=3, heads=2, output_dim=512)
        return AudioLearner(encoder, FrontEnd(16_000, 64, 500, -5.71, 5.91))
    return Model(init, torch.device("cpu")).learner


# ------------------------------------------------------------------ captions: AT, VAT, few-shot
def paired_clips(path, settings, folder):
    """A folder's clips with the captions in `path`. Raises FileNotFoundError, ValueError (none)."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; run python curate.py --source {settings.source} "
                                f"--data {settings.data or folder.name} --out {path.parent}")
    listed = read_split(CLIPS_OF[settings.source], folder, "train")
    known = {c.id: c for c in listed if c.audio and (c.frames or settings.objective == "at")}
    pairs = read_index(path, need=("captions",))
    clips = [replace(known[c.id], captions=c.captions) for c in pairs if c.id in known]
    print0(f"{path}: {len(clips)} of {len(pairs)} clips have sound (for vat, frames) in {folder}")
    if not clips:
        raise ValueError(f"{folder}: has no clip of {path}")
    return clips


def take_pairs(clips, count, seed):
    """Clips with `count` captions of a seeded shuffle; fewer are among more. Raises ValueError."""
    captions = captions_of(clips)
    owners = np.repeat(range(len(clips)), [len(c.captions) for c in clips])
    if not 0 < count <= len(captions):
        raise ValueError(f"--pairs {count}: there are {len(captions)}")
    taken = {}
    for at in np.random.default_rng(seed).permutation(len(captions))[:count]:
        taken.setdefault(owners[at], []).append(captions[at])
    return [replace(clips[i], captions=tuple(taken[i])) for i in sorted(taken)]


def recall_on(folder, model, workers):
    """(learner) -> audio-text recall on a folder's captioned val clips, or else on AudioCaps'."""
    clips = []
    for place in (Path("data/audiocaps"), folder):
        listed = read_split("audiocaps", place, "val") if any(place.glob("val.*")) else []
        clips = [c for c in listed if c.audio and c.captions] or clips
    if not clips:
        return lambda learner: {}
    count = len(clips[0].captions)
    clips = [c for c in clips if len(c.captions) == count]
    texts = model.embed_texts(captions_of(clips))                                # (5N, D)

    def validate(learner):
        audio = learner.embed([c.audio for c in clips], workers)                 # (N, D)
        scores = retrieval_metrics(audio, texts, count)
        return {"audio->text R@1": scores["a2t_r1"], "text->audio R@1": scores["t2a_r1"]}

    return validate


def finetune_on_captions(settings, device):
    """AT or VAT fine-tuning; leaves <out>/checkpoint.pt."""
    folder = dataset_folder(settings.data or CLIPS_OF[settings.source])
    few = f"-{settings.pairs}" if settings.pairs else ""
    out = Path(settings.out or f"out/{folder.name}/{settings.objective}-{settings.source}{few}")
    banks = out.parent / "banks"
    # differs from the paper, which does not say: the temperature goes on from what was learned
    model = Model(settings.init, device)
    clips = paired_clips(out.parent / f"{settings.source}.jsonl", settings, folder)
    captions = list(dict.fromkeys(captions_of(clips)))  # runs with fewer pairs share their bank
    if settings.pairs:
        clips = take_pairs(clips, settings.pairs, settings.seed)
    paths = text_bank(banks, captions, model.clip, model.tokenizer)
    number = {caption: row for row, caption in enumerate(captions)}
    rows = np.array([number[caption] for caption in captions_of(clips)])
    targets = [Bank(paths, rows, [len(c.captions) for c in clips])]
    if settings.objective == "vat":
        targets.append(frame_bank(banks, clips, model.clip, settings.workers))
    batch = min(settings.batch, len(clips))
    settings = replace(settings, out=str(out), pairs=len(rows), batch=batch)
    print0(f"{len(rows)} pairs of {len(clips)} clips, in batches of {batch}")
    samples = AudioSamples(clips, targets, model.learner.front_end, settings.seed)
    about = {"stage": "finetune", "start": digest(model.learner.audio_encoder),
             "clip": pack_clip(model.clip, model.tokenizer)}
    train(model.learner, samples, settings, about, recall_on(folder, model, settings.workers),
          device)
    task = "toy" if settings.data == "toy" else "all"
    print0(f"next: python evaluate.py --task {task} --checkpoint {out}/checkpoint.pt")


# -------------------------------------------------------------------- labels: supervised heads
class MixedSamples(AudioSamples):
    """Samples of which a share, `mixup`, are mixtures of two."""
    mixup = 0.0
    remember = RememberSounds

    def read(self, i, rng):
        sample = super().read(i, rng)
        if rng.random() < self.mixup:  # differs from the paper, which has none: as in authors' code
            other = super().read(rng.integers(len(self)), rng)
            share = rng.beta(10, 10)
            for name in ("wave", "target"):
                sample[name] = share * sample[name] + (1 - share) * other[name]
            sample["length"] = max(sample["length"], other["length"])
        return sample


class HeadLearner(AudioLearner):
    """Audio encoder, LayerNorm and a linear layer onto K classes (App. C)."""

    def __init__(self, start, classes, loss, last_layers):
        super().__init__(start.audio_encoder, start.front_end)
        self.log_scale.requires_grad_(False)  # without pairs the temperature stays
        self.loss = loss
        encoder = self.audio_encoder
        D, blocks = encoder.config["output_dim"], encoder.transformer.resblocks
        # differs from the paper, which has the linear layer alone: as in the authors' code
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, classes))
        if 0 <= last_layers < len(blocks):
            encoder.requires_grad_(False)
            for part in (*blocks, encoder.ln_post, encoder.proj)[-2 - last_layers:]:
                part.requires_grad_(last_layers > 0)  # what follows the blocks learns with them

    def forward(self, batch):
        """Batch -> logits and targets, 2 × (B, K)."""
        audio, targets = super().forward(batch)                                  # (B, D), (B, 1, K)
        return self.head(unit(audio)).float(), targets[:, 0]


def rounds_of(settings, folder):
    """Yields (round, clips to train on, clips to test on): each fold, or once AudioSet's splits."""
    name = PRESETS[settings.head].data
    if name == "audioset":
        split = "val" if settings.head == "audioset-balanced" else "train"  # val: the balanced set
        yield "eval", read_split(name, folder, split), read_split(name, folder, "test")
        return
    clips = [c for c in read_split(name, folder) if c.easy or settings.head != "esc10"]
    if not clips:
        raise ValueError(f"{folder}: no clip of {settings.head} in it")
    for fold in sorted({c.fold for c in clips}):
        others = [c for c in clips if c.fold != fold]
        yield f"fold{fold}", others, [c for c in clips if c.fold == fold]


def finetune_on_labels(settings, device):
    """Train and test a head on each round; print mean ± std (App. C)."""
    folder = dataset_folder(settings.data)
    torch.manual_seed(settings.seed)
    start = start_of(settings.init)
    out = Path(settings.out or f"out/{folder.name}/head-{settings.head}")
    metric, loss = "accuracy", F.cross_entropy  # Eq. 6
    if "audioset" in settings.head:  # Eq. 7: several labels a clip
        metric, loss = "mAP", F.binary_cross_entropy_with_logits
    results = {}
    for name, *both in rounds_of(settings, folder):
        clips, test = ([c for c in part if c.audio and c.labels] for part in both)
        if not clips or not test:
            raise ValueError(f"{folder}: {name} lacks clips with sound and labels")
        classes = labels_of(clips + test, folder)
        torch.manual_seed(settings.seed)
        learner = HeadLearner(copy.deepcopy(start), len(classes), loss, settings.last_layers)
        samples = MixedSamples(clips, [Labels(clips, classes)], start.front_end, settings.seed)
        samples.mixup = settings.mixup
        target = Labels(test, classes).rows                                      # (N, K)

        def validate(learner):
            features = learner.embed([c.audio for c in test], settings.workers)  # (N, D)
            read = features.any(dim=1)                                           # (N,)
            logits = learner.head(features[read].to(device)).cpu()               # (·, K)
            if metric == "mAP":
                value = average_precision(logits, target[read]).nanmean()
            else:
                value = target[read, logits.argmax(1)].float().mean()
            return {metric: 100 * value.item()}

        about = {"stage": "head", "start": digest(start.audio_encoder), "labels": classes}
        train(learner, samples, replace(settings, out=str(out / name)), about, validate, device)
        results[name] = validate(learner.eval())[metric]  # a finished run trains no step
    values = np.array(list(results.values()))
    spread = values.std(ddof=min(1, len(values) - 1))
    print0(f"{settings.head}: {metric} {values.mean():.1f} ± {spread:.1f} % (paper: "
           f"{PAPER['heads'][settings.head]})")
    done = {"settings": vars(settings), "results": results}
    save(out / "head.json", lambda part: part.write_text(json.dumps(done)))


def main():
    settings = parse(Settings(), PRESETS, description=__doc__)
    if bool(settings.source) == bool(settings.head):
        raise ValueError("needed: --source, for captions, or --head, for labels")
    own = Path("out", Path(settings.data).name, "pretrain/checkpoint.pt")
    start = settings.init or (own if own.exists() else "out/audioset/pretrain/checkpoint.pt")
    finetune = finetune_on_captions if settings.source else finetune_on_labels
    finetune(replace(settings, init=str(start)), join_ranks())


if __name__ == "__main__":
    run(main)
