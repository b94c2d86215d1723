"""Stage 1: an audio encoder chases frozen CLIP embeddings of video frames (§3.2, Eq. 4).

    python pretrain.py --data toy                        # minutes on a laptop: the toy world, its CLIP, vip-AnT
    python pretrain.py --data toy --init random          # VA-Rand
    python pretrain.py --data random                     # no data: how fast is the paper's step here?
    python pretrain.py --data random --batch 8 --steps 5 --log-every 1      # ... on a CPU
    torchrun --nproc_per_node=4 pretrain.py              # the paper's run, on data/audioset

bank.py embeds the frames, train.py is the loop; here is what they are given. Defaults are the paper's run; --data toy
and --data random bring their own (PRESETS).

B  clips on this rank     D  embedding     N  clips     L  tokens     R  side of an image
"""
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bank import embed_all, frame_bank
from clip_load import (
    Tokenizer,
    audio_encoder_from_clip,
    blank_audio_encoder,
    cached,
    clip_identity,
    load_clip,
)
from data import load_image
from model import CLIP, VisionTransformer, info_nce
from prepare import sound_loader
from processes import barrier, ranks, run, start_ranks
from readers import dataset_folder, held_out_by_audiocaps, read_index, read_split
from toy import make_toy
from train import (
    AudioLearner,
    AudioSamples,
    RandomSamples,
    Training,
    digest_of,
    parse,
    save_checkpoint,
    setting,
    train,
)

# ------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class Settings(Training):
    """VA pre-training; the command line is derived from this."""
    data: str = setting("audioset", "toy, random (synthetic clips, to time the step), or a folder (audioset means "
                        "data/audioset) with train.jsonl and val.jsonl")
    init: str = setting("clip", "start of the audio encoder: clip is vip-AnT, random is VA-Rand", ["clip", "random"])
    leave_out: str = setting("data/audiocaps", "folder of AudioCaps' tables: its val and test clips are left out of "
                             "training; none: train on them", free=True)  # another choice changes the clips' digest


# The paper at half its scale: 64 mel bins, patches of 16 pixels (the toy CLIP's), overlapping by a quarter. Mean and
# std are the toy's own; 62 steps are an epoch.
TOY = Settings(data="toy", leave_out="none", clip="out/toy/clip/clip.pt", vocab="data/toy/vocab.txt.gz",
               sample_rate=16_000, mels=64, frames=100, mean=-2.21, std=3.51, stride_time=12, stride_mel=12, batch=64,
               epochs=9, warmup_epochs=0.5, lr_weights=5.0, lr_biases=7e-3, workers=1, log_every=62)
TOY_CLIP = replace(TOY, out="out/toy/clip", optimizer="adam", batch=128, epochs=8, warmup_epochs=0.3,
                   lr_weights=5e-4, lr_biases=5e-4)
# The paper's step without a file: what this machine can do.
RANDOM = Settings(data="random", init="random", steps=50, log_every=10)
PRESETS = {"toy": TOY, "random": RANDOM}


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

    def guessing(self, candidates):
        return 2 * math.log(candidates)

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


def make_toy_world(weights, device):
    """Make data/toy, and train the toy's CLIP on its image-caption pairs unless it is there or `weights` is another."""
    if ranks()[0] == 0 and not Path("data/toy").exists():
        make_toy("data/toy")
    barrier()
    if weights != TOY.clip or Path(weights).exists():
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
        return {f"image->text {k}": v for k, v in top1(images, texts, [[c.id] for c in val]).items()}

    identity = {"stage": "toy-clip", "data": digest_of(pairs)}
    train(learner, PairSamples(pairs, tokenizer, 64), TOY_CLIP, identity, validate, device)
    if ranks()[0] == 0:
        save_checkpoint(weights, learner.clip.state_dict())
    barrier()


# ------------------------------------------------------------------------------------- stage 1

def top1_hits(queries, gallery, labels):
    """Top-1 retrieval where relevant means the same label *set* (§3.2.2) -> precision, recall of each query (N,).

    queries, gallery: (N, D) unit vectors of the same N clips; labels: N collections of labels.
    """
    assert not any(isinstance(each, str) for each in labels), "a string would be a set of letters"
    sets = [frozenset(each) for each in labels]
    number = {each: k for k, each in enumerate(dict.fromkeys(sets))}
    kind = torch.tensor([number[each] for each in sets])                                            # (N,)
    best = torch.cat([(part @ gallery.T).argmax(1) for part in queries.split(1024)])               # (N,)
    hit = (kind[best] == kind).float()
    return hit, hit / torch.bincount(kind)[kind]


def top1(queries, gallery, labels):
    """The means of top1_hits in %."""
    precision, recall = top1_hits(queries, gallery, labels)
    return {"precision@1": 100 * precision.mean().item(), "recall@1": 100 * recall.mean().item()}


def training_clips(folder, leave_out):
    """The clips of a folder's training split that have frames, and which of them train: not those AudioCaps tests with.

    All of them go into the bank, so that another --leave-out finds it made. Raises FileNotFoundError, ValueError (no
    clip is left).
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
    """Second frames' embeddings, the paper's middle ones (clips that have any, D), and which clips have any (N,)."""
    rows = [bank.of(i)[:2][-1:] for i in range(len(clips))]  # the second, or the only one, or none
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
        found = top1(images[heard[has_image]], audio[both], labels)  # images has no row for a clip without a frame
        return {f"image->audio {k}": v for k, v in found.items()}
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
    learner = AudioLearner(encoder, settings.front_end)
    samples = AudioSamples(clips, [train_bank], sound_loader(folder, settings.front_end), train_on)
    identity = {"stage": "pretrain", "data": digest_of([c for c, use in zip(clips, train_on) if use]),
                "front_end": asdict(settings.front_end), "encoder": encoder.config, "clip": made_with}
    train(learner, samples, settings, identity, frame_retrieval(val, val_bank, device, settings.workers), device)


def time_steps(settings, device):
    """The paper's step on synthetic clips: its speed is in the log, nothing else is kept."""
    torch.manual_seed(settings.seed)
    encoder = VisionTransformer((settings.frames, settings.mels), 32, (settings.stride_time, settings.stride_mel),
                                channels=1, width=768, layers=12, heads=12, output_dim=512)
    train(AudioLearner(encoder, settings.front_end), RandomSamples(settings.front_end, 512), settings,
          {"stage": "random", "data": ""}, validate=None, device=device)


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
