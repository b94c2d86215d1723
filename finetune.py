"""Stage 3: a pre-trained audio encoder learns from captions (§3.3), or with a head from labels (Appendix C).

    python finetune.py --source ac                       # AT: curate.py's pairs -> out/audioset/at-ac/checkpoint.pt
    python finetune.py --source gc --pairs 442           # few-shot: so many gold pairs (Fig. 7)
    python finetune.py --source gc --objective vat       # captions and frames at once (Appendix E)
    python finetune.py --head esc50                      # supervised, over the published folds: mean ± std
    python finetune.py --head esc10                      # ... on a laptop: ESC-10 from scratch with a small encoder
    python finetune.py ladder                            # the toy world: every row of the tables, and the claims

The loop is train.py's; here are other targets (a bank of captions), another start (a checkpoint), and a head.

B  clips on this rank     D  embedding     K  classes     N  clips
"""
import copy
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bank import caption_bank, embed_all, frame_bank
from clip_load import (
    Tokenizer,
    audio_encoder_from_clip,
    cached,
    clip_identity,
    fingerprint,
    load_clip,
)
from curate import SOURCES, folder_of
from data import floating
from evaluate import average_precision, ranking, retrieval_metrics, save_json
from model import VisionTransformer
from prepare import sound_loader
from processes import ranks, run, start_ranks
from readers import (
    READERS,
    dataset_folder,
    labels_of,
    read_index,
    read_split,
)
from train import (
    AudioLearner,
    AudioSamples,
    Training,
    audio_encoder_of,
    digest_of,
    load_checkpoint,
    masked_input,
    parse,
    setting,
    train,
    versions,
)

# ------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class Settings(Training):
    """AT fine-tuning as in the paper (Table 5); PRESETS has the supervised heads'."""
    source: str = setting("", "train on captions: which of curate.py's pairs", SOURCES)
    head: str = setting("", "train on labels: whose", ["esc50", "esc10", "us8k", "audioset-balanced", "audioset"])
    data: str = setting("", "folder of the clips; empty: where curate.py puts the source, or the head's dataset")
    init: str = setting("out/audioset/pretrain/checkpoint.pt", "start from: a checkpoint, clip or random weights")
    objective: str = setting("at", "at: audio and captions; vat: audio and frames too", ["at", "vat"])
    pairs: int = setting(0, "the first so many pairs of a shuffle that depends on the seed alone; 0: all")
    batch: int = setting(64, "clips a step over all ranks")
    last_layers: int = setting(-1, "head: encoder blocks that learn, counted from the last; 0: a linear probe, -1: all")
    mixup: float = setting(0.0, "head: share of clips that are mixed with another one")
    milestones: str = setting("", "halve the rates at these steps, or epochs where an e follows (5e,9e); empty: cosine")
    warmup_steps: int = setting(0, "of linear warm-up, with milestones")
    fold: int = setting(0, "head: train and test on this fold alone; 0: on each in turn", free=True)
    width: int = setting(768, "of an encoder that starts from random weights")
    layers: int = setting(12, "of the same")
    patch: int = setting(32, "of the same")

    def check(self):
        super().check()
        if not re.fullmatch(r"( *\d+(\.\d+)?e? *(,(?!$)|$))*", self.milestones):
            raise ValueError(f"--milestones {self.milestones}: needed are numbers of steps, or of epochs with an e "
                             f"behind them, separated by commas")

    def lr_factor(self, step, steps_per_epoch):
        """As in pre-training, or linear warm-up and then half as much from each milestone on (Table 5)."""
        if not self.milestones:
            return super().lr_factor(step, steps_per_epoch)
        passed = 0
        for milestone in self.milestones.replace(" ", "").split(","):
            at = float(milestone.removesuffix("e"))
            passed += step >= (at * steps_per_epoch if milestone.endswith("e") else at)
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * 0.5 ** passed


# Table 5: ESC50 and US8K; then AudioSet, balanced and unbalanced. SMALL is for a laptop.
SUPERVISED = {"batch": 50, "epochs": 50, "lr_weights": 1.0, "lr_biases": 2.4e-2}
TAGGING = {"optimizer": "adam", "lr_weights": 5e-5, "lr_biases": 5e-5, "weight_decay": 1e-7, "warmup_steps": 1000,
           "mixup": 0.5}
SMALL = {"sample_rate": 16_000, "mels": 64, "stride_time": 12, "stride_mel": 12, "workers": 1}
PRESETS = {
    "esc50": replace(Settings(), head="esc50", **SUPERVISED), "us8k": replace(Settings(), head="us8k", **SUPERVISED),
    "audioset-balanced": replace(Settings(), head="audioset-balanced", batch=12, epochs=25, last_layers=4,
                                 milestones="5e,9e,10e,11e,12e", **TAGGING),
    "audioset": replace(Settings(), head="audioset", batch=128, epochs=5,
                        milestones="7500,15000,20000,25000,35000,40000,45000,50000", **TAGGING),
    "toy": replace(Settings(), data="toy", init="out/toy/pretrain/checkpoint.pt", epochs=6, warmup_epochs=0.5,
                   lr_weights=2.0, lr_biases=4.8e-3, log_every=62, **SMALL),
    "esc10": replace(Settings(), head="esc10", data="esc50", init="random", frames=500, mean=-5.71, std=5.91, patch=16,
                     width=128, layers=3, optimizer="adam", batch=32, epochs=30, warmup_epochs=3.0, lr_weights=1e-3,
                     lr_biases=1e-3, weight_decay=0.0, mixup=0.5, log_every=100, **SMALL),
}


# --------------------------------------------------------------------------------- the start

def checkpoint_of(settings):
    """The checkpoint that fine-tuning starts from; None where it starts from CLIP's weights or from random ones."""
    return None if settings.init in ("clip", "random") else load_checkpoint(settings.init, ["pretrain", "finetune"])


def clip_of(settings, device):
    """The CLIP whose texts and frames are the targets, the start's own -> model, its clip_identity."""
    weights, vocab, checkpoint = settings.clip, settings.vocab, checkpoint_of(settings)
    if checkpoint and weights == Training.clip:  # not said otherwise
        weights = checkpoint["clip"]["weights"]
    if checkpoint and vocab == Training.vocab:
        vocab = checkpoint["clip"]["vocab"]
    weights = cached(weights)
    clip = load_clip(weights, device)
    identity = clip_identity(clip, weights, vocab)
    if checkpoint and identity["fingerprint"] != checkpoint["clip"]["fingerprint"]:
        raise ValueError(f"{weights}: not the CLIP that {settings.init} was trained against; name the right one "
                         f"with --clip")
    return clip, identity


def starting_encoder(settings, clip):
    """The audio encoder that fine-tuning starts from, its front end, and its temperature's log_scale or None.

    clip: the CLIP whose embeddings are the targets, None for a head, which has none. A checkpoint brings its front end
    along. Raises ValueError where a flag wants another one, or another encoder.
    """
    strides = (settings.stride_time, settings.stride_mel)
    if settings.init == "clip":
        return audio_encoder_from_clip(clip, settings.frames, settings.mels, strides), settings.front_end, None
    if settings.init == "random":
        heads = settings.width // 64
        if not heads or settings.width % heads:
            raise ValueError(f"--width {settings.width}: can't be cut into {heads} heads; take a multiple of 64")
        torch.manual_seed(settings.seed)
        encoder = VisionTransformer((settings.frames, settings.mels), settings.patch, strides, channels=1,
                                    width=settings.width, layers=settings.layers, heads=heads,
                                    output_dim=clip.visual.config["output_dim"] if clip else 512)
        return encoder, settings.front_end, None
    checkpoint = checkpoint_of(settings)
    encoder, front_end = audio_encoder_of(checkpoint, settings.init)
    fixed = asdict(front_end) | {name: encoder.config[name] for name in ("patch", "width", "layers")}
    fixed |= zip(("stride_time", "stride_mel"), encoder.config["stride"])
    given = {word.split("=")[0] for word in sys.argv}  # a default may differ from the checkpoint, a flag may not
    for name, value in fixed.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in given and getattr(settings, name) != value:
            raise ValueError(f"{flag} {getattr(settings, name)}: {settings.init} was trained with {value}, which can't "
                             f"be changed afterwards")
    return encoder, front_end, checkpoint["learner"]["log_scale"]


def identity_of(stage, clips, settings, encoder, front_end):
    """What a checkpoint says of the clips it was trained on and of what training started from."""
    return {"stage": stage, "data": digest_of(clips), "front_end": asdict(front_end), "encoder": encoder.config,
            "start": {"path": settings.init, "weights": fingerprint(encoder)}}


# ---------------------------------------------------------------------- captions: AT, VAT, few-shot

def take_pairs(clips, count, seed):
    """The first `count` (clip, caption) pairs of a seeded shuffle, so that fewer are always among more -> list of Clip.

    Raises ValueError where there are not so many.
    """
    pairs = [(i, caption) for i, clip in enumerate(clips) for caption in clip.captions]
    if not 0 < count <= len(pairs):
        raise ValueError(f"--pairs {count}: there are {len(pairs)}")
    chosen = {}
    for at in np.random.default_rng(seed).permutation(len(pairs))[:count]:
        i, caption = pairs[at]
        chosen.setdefault(i, []).append(caption)
    return [replace(clips[i], captions=tuple(chosen[i])) for i in sorted(chosen)]


def pairs_of(index, settings):
    """An index's clips with the captions that train, and every caption of it: fewer pairs have the same bank."""
    listed = [clip for clip in read_index(index) if clip.captions]
    usable = [clip for clip in listed if clip.frames or settings.objective == "at"]
    if len(usable) < len(listed) and ranks()[0] == 0:
        print(f"{index}: {len(listed) - len(usable)} clips without frames left out", file=sys.stderr)
    clips = take_pairs(usable, settings.pairs, settings.seed) if settings.pairs else usable
    if not clips:
        raise ValueError(f"{index}: no clip with a caption" + (" and frames" if settings.objective == "vat" else ""))
    return clips, list(dict.fromkeys(caption for clip in usable for caption in clip.captions))


def with_full_batch(settings, samples):
    """The settings, with a smaller batch where so few samples do not fill one: an epoch needs a full batch."""
    if samples >= settings.batch:
        return settings
    rank, size = ranks()
    smaller = 2 ** int(math.log2(max(2, samples)))
    if smaller % size:
        raise ValueError(f"{samples} clips make batches of {smaller}, which can't be split over {size} ranks")
    if rank == 0:
        print(f"{samples} clips do not fill a batch of {settings.batch}: batches of {smaller}", file=sys.stderr)
    return replace(settings, batch=smaller)


def captioned_validation(folder):
    """Validation clips with sound and equally many captions: the folder's own, else AudioCaps', else none."""
    for place in (folder, Path("data/audiocaps")):
        try:
            clips = [clip for clip in read_split("audiocaps", place, "val") if clip.audio and clip.captions]
        except FileNotFoundError:
            continue
        if clips:
            return [clip for clip in clips if len(clip.captions) == len(clips[0].captions)]
    return []


def retrieval_validation(clips, clip, tokenizer, device, workers):
    """(learner) -> audio-text recall on validation clips; {} where there are none, or none can be read."""
    if not clips:
        return lambda learner: {}
    texts, _ = embed_all([caption for c in clips for caption in c.captions], lambda text: tokenizer([text])[0],
                         clip.encode_text, clip.text_projection.shape[1], device)
    texts = texts.view(len(clips), -1, texts.shape[1])                                        # (N, captions, D)

    def validate(learner):
        audio, heard = learner.embed([c.audio for c in clips], device, workers)
        if not heard.any():
            return {}
        metrics = retrieval_metrics(audio[heard], texts[heard].flatten(0, 1), texts.shape[1])
        return {"audio->text R@1": metrics["a2t_r1"], "text->audio R@1": metrics["t2a_r1"]}
    return validate


def finetune_on_captions(settings, device):
    """AT or VAT fine-tuning; leaves <out>/checkpoint.pt."""
    source = settings.source
    folder = folder_of(source, settings.data)
    index = folder / f"{source}.jsonl"
    if not index.exists():
        raise FileNotFoundError(f"{index}: no pairs yet. Run: python curate.py --source {source}"
                                + (f" --data {settings.data}" if settings.data else ""))
    clip, made_with = clip_of(settings, device)
    tokenizer = Tokenizer(made_with["vocab"], clip.context_length)
    clips, captions = pairs_of(index, settings)
    place, mark = folder / "banks", made_with["fingerprint"]
    banks = [caption_bank(place / f"{source}-texts-{mark}", clips, captions, clip, tokenizer, device)]
    if settings.objective == "vat":
        banks.append(frame_bank(place / f"{source}-frames-{mark}-{settings.pairs}-{settings.seed}", clips, clip,
                                device, settings.workers))
    encoder, front_end, log_scale = starting_encoder(settings, clip)
    learner = AudioLearner(encoder, front_end).requires_grad_(True)  # a checkpoint's encoder comes frozen
    if log_scale is not None:  # differs from the paper, which does not say: the temperature belongs to what was learned
        learner.log_scale.data.copy_(log_scale)
    name = f"{settings.objective}-{source}" + (f"-{settings.pairs}" if settings.pairs else "")
    settings = replace(settings, out=settings.out or f"out/{folder.name}/{name}")
    identity = identity_of("finetune", clips, settings, encoder, front_end) | {"clip": made_with}
    if ranks()[0] == 0:
        print(f"{index}: {len(clips)} clips, {sum(len(c.captions) for c in clips)} pairs -> {settings.out}")
    samples = AudioSamples(clips, banks, sound_loader(folder, front_end))
    validate = retrieval_validation(captioned_validation(folder), clip, tokenizer, device, settings.workers)
    train(learner, samples, with_full_batch(settings, len(samples)), identity, validate, device)
    if ranks()[0] == 0:
        task = f"toy --data {settings.data}" if folder.name == "toy" else "all"
        print(f"next: python evaluate.py --task {task} --checkpoint {settings.out}/checkpoint.pt")


# -------------------------------------------------------------------------- labels: supervised heads

class HeadLearner(nn.Module):
    """Audio encoder, LayerNorm and a linear layer onto the classes (Appendix C)."""

    def __init__(self, audio_encoder, front_end, classes, multi_label, last_layers):
        super().__init__()
        self.audio_encoder, self.front_end, self.multi_label = audio_encoder, front_end, multi_label
        dimensions, blocks = audio_encoder.config["output_dim"], audio_encoder.transformer.resblocks
        # differs from the paper, which has the linear layer alone: a LayerNorm before it, as in the authors' code
        self.head = nn.Sequential(nn.LayerNorm(dimensions), nn.Linear(dimensions, classes))
        learning = min(last_layers, len(blocks)) if last_layers >= 0 else len(blocks)
        audio_encoder.requires_grad_(learning == len(blocks))
        if learning:  # what follows the blocks learns with them
            for part in (*blocks[-learning:], audio_encoder.ln_post, audio_encoder.proj):
                part.requires_grad_(True)

    def logits(self, wave, length):
        """Padded waveforms (B, samples), their lengths (B,) -> (B, K)."""
        return self.head(self.audio_encoder(self.front_end(wave, length)))

    def forward(self, batch):
        return self.head(self.audio_encoder(masked_input(self, batch))), batch["target"]      # 2 × (B, K)

    def loss(self, logits, target):
        """Eq. 6, or Eq. 7 for clips with several labels (averaged over the labels); targets may be mixtures."""
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), target)
        return F.cross_entropy(logits.float(), target)

    def guessing(self, candidates):
        """As AudioLearner's; inf where clips have several labels: what a guess costs hangs on how frequent they are."""
        return math.inf if self.multi_label else math.log(self.head[1].out_features)

    def report(self):
        return {k: v.item() for k, v in self.input.items()}

    def flops(self):
        """Of one sample's forward pass and of the backward pass through the blocks that learn."""
        blocks = self.audio_encoder.transformer.resblocks
        learning = sum(next(block.parameters()).requires_grad for block in blocks) / len(blocks)
        return (1 + 2 * learning) * self.audio_encoder.flops()


class Remember:
    """A `load` that keeps what it has read."""

    def __init__(self, load):
        self.load, self.known = load, {}

    def __call__(self, path):
        if path not in self.known:
            self.known[path] = self.load(path)
        return self.known[path]


class LabelledSamples:
    """Clips with labels: sample i is a waveform and its classes, or with probability `mixup` a mixture of two clips."""

    def __init__(self, clips, labels, load, mixup=0.0):
        self.clips, self.load, self.mixup = clips, load, mixup
        self.paths = [clip.audio for clip in clips]
        self.number = {label: k for k, label in enumerate(labels)}

    def __len__(self):
        return len(self.clips)

    def target(self, i):
        """Classes of clip i as 0 and 1 (K,)."""
        target = torch.zeros(len(self.number))
        target[[self.number[label] for label in self.clips[i].labels]] = 1.0
        return target

    def read(self, i, rng):
        (wave, length), target = self.load(self.paths[i]), self.target(i)
        wave = floating(wave)
        if rng.random() < self.mixup:  # differs from the paper, which has no mix-up: as in the authors' code
            share, j = rng.beta(10, 10), int(rng.integers(len(self)))
            other, other_length = self.load(self.paths[j])
            wave, length = share * wave + (1 - share) * floating(other), max(length, other_length)
            target = share * target + (1 - share) * self.target(j)
        return {"wave": wave, "length": length, "target": target,
                "draws": torch.from_numpy(rng.random(4, dtype=np.float32))}


def measure_head(learner, samples, device, workers):
    """Accuracy of a head on clips with one label each, mAP on those with several -> in %, and clips that were read."""
    target = torch.stack([samples.target(i) for i in range(len(samples))])                    # (N, K)
    logits, heard = embed_all(samples.paths, samples.load, learner.logits, target.shape[1], device, workers,
                              unit=False)                                                     # (N, K), (N,)
    logits, target = logits[heard], target[heard]
    if learner.multi_label:
        value = average_precision(*ranking(logits, target.bool())).nanmean()
    else:
        value = (logits.argmax(1) == target.argmax(1)).float().mean()
    return 100 * value.item(), len(target)


def rounds_of(settings):
    """What a head is trained and tested on -> folder, labels, {round: (training clips, test clips)}.

    AudioSet is one round; where clips come in folds, each fold is tested on by who learned from the others.
    """
    if settings.head.startswith("audioset"):
        folder = dataset_folder(settings.data or "audioset")
        splits = ("val" if settings.head == "audioset-balanced" else "train", "test")  # the balanced set is our val
        sets = [[clip for clip in read_split("audioset", folder, split) if clip.audio and clip.labels]
                for split in splits]
        for split, clips in zip(splits, sets):
            if not clips:
                raise ValueError(f"{folder}: not one clip of its {split} split has sound and labels")
        return folder, labels_of([*sets[0], *sets[1]], folder), {"eval": sets}
    name = "esc50" if settings.head == "esc10" else settings.head
    folder = dataset_folder(settings.data or name)
    clips = [clip for clip in READERS[name].read(folder, "test") if clip.easy or settings.head != "esc10"]
    folds = sorted({clip.fold for clip in clips})
    if len(folds) < 2:
        raise ValueError(f"{folder}: needs clips in several folds, has {folds}")
    if settings.fold and settings.fold not in folds:
        raise ValueError(f"--fold {settings.fold}: {folder} has {folds}")
    return folder, sorted({clip.labels[0] for clip in clips}), {
        f"fold {fold}": ([clip for clip in clips if clip.fold != fold], [clip for clip in clips if clip.fold == fold])
        for fold in folds if settings.fold in (0, fold)}


def mean_and_spread(values):
    """Mean ± standard deviation; of a single value there is none."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


PAPER_HEADS = {"esc50": "95.7 ± 1.4", "us8k": "86.0 ± 2.8", "audioset-balanced": "37.9", "audioset": "44.7"}


def finetune_on_labels(settings, device):
    """Train a head on each round (fold) and print its test accuracy or mAP, mean ± std over folds (Appendix C)."""
    began, (folder, labels, rounds) = time.time(), rounds_of(settings)
    multi_label = settings.head.startswith("audioset")
    measure = "mAP" if multi_label else "accuracy"
    clip, made_with = clip_of(settings, device) if settings.init == "clip" else (None, {"weights": ""})
    start, front_end, _ = starting_encoder(settings, clip)
    start_name = Path(settings.init).parent.name if "/" in settings.init else settings.init
    out = Path(settings.out or f"out/{folder.name}/head-{settings.head}-{start_name}"
               + (f"-last{settings.last_layers}" if settings.last_layers >= 0 else ""))
    load, workers, count = sound_loader(folder, front_end), settings.workers, sum(map(len, next(iter(rounds.values()))))
    if 4 * front_end.samples * count * max(1, workers) * ranks()[1] < 4e9:  # bytes in all processes
        load, workers = Remember(load), 0  # 0: measure here; workers are new at each validation and would forget
    results = {}
    for name, (training, test) in rounds.items():
        place = out / name.replace(" ", "")
        encoder = copy.deepcopy(start)  # each round starts anew
        torch.manual_seed(settings.seed)
        learner = HeadLearner(encoder, front_end, len(labels), multi_label, settings.last_layers)
        samples = LabelledSamples(training, labels, load, settings.mixup)
        test_samples = LabelledSamples(test, labels, load)
        identity = identity_of("head", training, settings, encoder, front_end)
        identity |= {"labels": labels, "clip": {"weights": made_with["weights"]}}

        def validate(learner, test_samples=test_samples):
            return {measure: measure_head(learner, test_samples, device, workers)[0]}

        if ranks()[0] == 0:
            print(f"{name}: {len(training)} clips train, {len(test)} test -> {place}")
        train(learner, samples, replace(settings, out=str(place)), identity, validate, device)
        results[name], heard = measure_head(learner.eval(), test_samples, device, workers)
        if ranks()[0] == 0:
            print(f"{name}: {measure} {results[name]:.1f} % on {heard} of {len(test)} clips")
    if ranks()[0] == 0:
        values = list(results.values())
        print(f"\n{settings.head}, {measure} in %: "
              + ", ".join(f"{name} {value:.1f}" for name, value in results.items())
              + f"\nmean {mean_and_spread(values)}, {len(labels)} classes; paper: "
              f"{PAPER_HEADS.get(settings.head, '-')}; {(time.time() - began) / 60:.1f} min")
        save_json(out / "head.json", {"head": settings.head, "settings": asdict(settings), "results": results,
                                      "mean": np.mean(values), "versions": versions()})


# ----------------------------------------------------------------------------------- the command

def main():
    if sys.argv[1:2] == ["ladder"]:
        from ladder import Ladder, run_ladder  # it imports this file

        run_ladder(parse(Ladder(), {}, sys.argv[2:], "Every row of the paper's tables on the toy world."))
        return
    settings = parse(Settings(), PRESETS, description=__doc__)
    if bool(settings.source) == bool(settings.head):
        raise ValueError("either --source (train on captions) or --head (train on labels) is needed")
    device = start_ranks()
    settings.check()
    if settings.head:
        finetune_on_labels(settings, device)
    else:
        finetune_on_captions(settings, device)


if __name__ == "__main__":
    run(main)
