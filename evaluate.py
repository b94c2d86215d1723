"""Measure a checkpoint with text alone, and use it: every table of the paper, tagging, search (§4, Appendices D to G).

    python evaluate.py --task clotho                                  # retrieval at 10 s and 18 s: Tables 3 and 8
    python evaluate.py --task esc50 --compare a.pt b.pt               # several checkpoints in one table and one chart
    python evaluate.py --task all                                     # whatever is on disk, beside the paper's numbers
    python evaluate.py --task all --data toy                          # every task on the toy world
    python evaluate.py --task scaling --compare GC-442.pt GC-4k.pt GC.pt      # accuracy by number of pairs: Fig. 7
    python evaluate.py --task curve --compare out/*/pretrain*/checkpoint.pt   # retrieval by epoch: Fig. 5
    python evaluate.py --task tag --audio street.wav --labels "dog, rain, car horn"
    python evaluate.py --task search --audio RECORDINGS --query "glass breaking"

The tables on the screen are saved as <task>.json beside the checkpoint.

N  clips     M  captions     K  classes     D  embedding
"""
import argparse
import copy
import json
import math
import os
import sys
from collections import Counter
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bank import embed_all
from clip_load import Tokenizer, fingerprint, lengthen, load_clip
from data import load_image
from listen import recordings, search, tag
from pretrain import top1_hits
from processes import Claim, ranks, run, start_ranks, write_whole
from readers import (
    CLASS_NAMES,
    READERS,
    add_labels,
    dataset_folder,
    labels_of,
    read_segments,
    read_split,
    youtube_id,
)
from train import audio_encoder_of, load_checkpoint, read_log, versions

PROMPT = "the sound of"  # §4.1, "Prompting (usually) helps"
PROMPTS = {"prompt": PROMPT, "no prompt": ""}


# ------------------------------------------------------------------------------------- metrics

def retrieval_ranks(audio, captions, captions_per_clip=5):
    """Ranks from 0 of the right answers, audio to text (N,) and text to audio (M,); caption j belongs to clip j // 5.

    Audio to text takes the best-ranked of a clip's captions; text to audio queries with every caption. A rank is the
    number of others at least as near. Raises ValueError (not finite, wrong number of captions).
    """
    audio, captions = F.normalize(audio.float(), dim=1), F.normalize(captions.float(), dim=1)
    if not (audio.isfinite().all() and captions.isfinite().all()):
        raise ValueError("an embedding is not finite; the checkpoint's weights are broken")
    if len(captions) != captions_per_clip * len(audio):
        raise ValueError(f"{len(captions)} captions for {len(audio)} clips; needed: {captions_per_clip} a clip")
    # differs from the paper, which does not say: a tie is lost, or embeddings that are all alike would score
    similarity = (audio @ captions.T).unflatten(1, (-1, captions_per_clip))           # (N, N, 5)
    own = similarity.diagonal().T                                                     # (N, 5)
    others = ~torch.eye(len(audio), dtype=torch.bool)[:, :, None]                     # (N, N, 1)
    a2t = ((similarity >= own.amax(1)[:, None, None]) & others).sum((1, 2))           # (N,)
    return a2t, (similarity >= own).sum(0).flatten() - 1                              # (N,), (M,)


def median_rank(rank):
    """Of ranks from 0 -> from 1, as it is reported."""
    return rank.float().quantile(0.5).item() + 1  # median() would take the lower of two


def retrieval_metrics(audio, captions, captions_per_clip=5):
    """Retrieval both ways: audio (N, D), captions (5N, D) -> recall at 1, 5, 10 in %, median rank from 1."""
    result = {}
    for way, rank in zip(("a2t", "t2a"), retrieval_ranks(audio, captions, captions_per_clip)):
        result |= {f"{way}_r{k}": 100 * (rank < k).float().mean().item() for k in (1, 5, 10)}
        result[f"{way}_median"] = median_rank(rank)
    return result


def ranking(scores, target):
    """Each class's clips from the best on, whether they are positive, for each place the last of the same score.

    Scores (N, K), target (N, K) bool -> 3 × (N, K): what does not change from one resampling to the next.
    """
    order = scores.argsort(0, descending=True)                                        # (N, K)
    ranked = scores.gather(0, order)
    last = torch.ones_like(ranked, dtype=torch.bool)                                  # the end of a run of equal scores
    last[:-1] = ranked[:-1] != ranked[1:]
    place = torch.arange(len(scores))[:, None].expand_as(ranked)
    end = torch.where(last, place, len(scores)).flip(0).cummin(0).values.flip(0)      # (N, K)
    return order, target.gather(0, order), end


def average_precision(order, positive, end, weights=None):
    """Area under each class's precision-recall steps, from its `ranking` -> (K,), NaN without positives.

    Clips with equal scores are ranked together. weights: (N,) how often each clip counts, once by default.
    """
    weight = torch.ones(len(order)) if weights is None else weights.float()
    weight = weight[order]                                                            # (N, K)
    positive = positive * weight
    precision = positive.cumsum(0).gather(0, end) / weight.cumsum(0).gather(0, end).clamp(min=1e-9)
    return (precision * positive).sum(0) / positive.sum(0)                            # (K,)


def pivotability(audio, images, captions, k, captions_per_clip=5):
    """Share of a clip's gold captions that its k nearest images lead to, five nearest captions each (App. F) -> (N,).

    audio, images: (N, D), captions: (5N, D), unit vectors; a caption found twice counts once.
    """
    nearest = (audio @ images.T).topk(min(k, len(images)), dim=1).indices             # (N, k)
    leads_to = (images @ captions.T).topk(min(5, len(captions)), dim=1).indices                           # (N, 5)
    found = torch.zeros(len(audio), len(captions), dtype=torch.bool)
    found.scatter_(1, leads_to[nearest].flatten(1), True)                             # (N, 5N)
    own = torch.arange(len(captions)).view(len(audio), captions_per_clip)
    return found.gather(1, own).float().mean(1)


def resamples(clips, draws):
    """How often each clip is drawn in bootstrap resamples of the test set -> (draws, N); always the same ones."""
    drawn = torch.randint(clips, (draws, clips), generator=torch.Generator().manual_seed(0))
    return torch.zeros(draws, clips).scatter_add_(1, drawn, torch.ones(draws, clips))


def interval(values, draws=1000):
    """Mean in % of a number per clip (N,) -> [mean, low, high]: the middle 95 % of its bootstrap means."""
    means = resamples(len(values), draws).double() @ values.double() / len(values)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return [100 * values.double().mean().item(), 100 * low, 100 * high]


def mean_average_precision(scores, target, draws=100):
    """(N, K) scores, (N, K) bool -> mAP in % over the classes that have a clip, [mAP, low, high]; and APs (K,).

    Drawing clips twice makes ranking easier, so resampled mAPs lie too high; the interval is mirrored at the mAP
    (the "basic" bootstrap), which takes that back: with 40 clips a class it held the truth 9 times of 10. With fewer
    than 20 it does not, and the mAP comes without an interval.
    """
    ranked = ranking(scores, target)
    precision = average_precision(*ranked)
    value = precision.nanmean().item()
    if target.sum() < 20 * target.any(0).sum():
        return 100 * value, precision
    drawn = torch.tensor([average_precision(*ranked, weights).nanmean().item()
                          for weights in tqdm(resamples(len(scores), draws), desc="interval", leave=False)])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    low, high = max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low))
    return [100 * value, 100 * low, 100 * high], precision


def chance_map(target):
    """Expected mAP in % of scores drawn blindly for target (N, K) bool: more than the share of positives.

    With p positives of n, a positive at rank r has precision (1 + (r-1)(p-1)/(n-1)) / r on average; averaged over r.
    """
    # differs from the paper, which does not say how: with few positives this lies above their share
    n, p = len(target), target.sum(0)[target.any(0)].double()                         # (), (classes with a clip,)
    harmonic = (1 / torch.arange(1, n + 1).double()).sum()
    return 100 * (((p - 1) / max(1, n - 1) * (n - harmonic) + harmonic) / n).mean().item()


# --------------------------------------------------------------------------------------- model

class Model:
    """A checkpoint's audio encoder beside the CLIP that it was trained against."""

    def __init__(self, path, clip=None, vocab=None, device="cpu", workers=2):
        checkpoint = load_checkpoint(path, ["pretrain", "finetune"])
        self.path, self.device, self.workers = Path(path), device, workers
        self.encoder, self.front_end = audio_encoder_of(checkpoint, path)
        try:
            made_with, settings, step, steps = (checkpoint[name] for name in ("clip", "settings", "step", "steps"))
            self.log_scale = checkpoint["learner"]["log_scale"].item()
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from None
        self.encoder.to(device)
        clip, vocab = clip or made_with["weights"], vocab or made_with["vocab"]
        self.clip = load_clip(clip, device)
        if fingerprint(self.clip) != made_with["fingerprint"]:
            raise ValueError(f"{clip}: not the CLIP that {path} was trained against; its fingerprint is not "
                             f"{made_with['fingerprint']}. Name the right one with --clip")
        self.tokenizer = Tokenizer(vocab, self.clip.context_length)
        if self.tokenizer.vocab_size != self.clip.token_embedding.num_embeddings:
            raise ValueError(f"{vocab}: {self.tokenizer.vocab_size} tokens, this CLIP has "
                             f"{self.clip.token_embedding.num_embeddings}; name the right one with --vocab")
        self.dimensions = self.clip.visual.proj.shape[1]
        self.source, init = settings.get("source", ""), settings.get("init")
        self.pairs = settings.get("pairs") or checkpoint.get("samples")
        row = f"+AT {self.source.upper()}" if self.source else "VA-Rand" if init == "random" else "vip-AnT"
        self.identity = {"checkpoint": str(path), "stage": checkpoint["stage"], "step": step,
                         "steps": steps, "init": init, "weights": fingerprint(self.encoder),
                         "clip": made_with["fingerprint"], "row": row}
        self.known = {}       # embeddings, for the next task of the same run
        self.missing = set()  # ids of clips that tasks did not find on disk

    def longer(self, factor):
        """The same model hearing `factor` times as much of a clip: its positions resized once more (App. D)."""
        frames = round(factor * self.front_end.frames)
        other = copy.copy(self)
        other.front_end = replace(self.front_end, frames=frames)
        other.encoder, other.known = lengthen(self.encoder, frames).eval(), {}
        return other

    def embed(self, kind, items, load=None):
        """Unit embeddings (N, D) of files of a kind, "audio" or "frames", and which could be read (N,); each made once.

        load: how to read a sound, where an item is more than a file's path.
        """
        key = (kind, *items)
        if key not in self.known:
            if kind == "frames":
                read, encode = partial(load_image, size=self.clip.image_size), self.clip.encode_image
            else:
                read, encode = load or self.front_end.load, lambda *sounds: self.encoder(self.front_end(*sounds))
            embedded, ok = embed_all(items, read, encode, self.dimensions, self.device, self.workers, kind)
            if not embedded[ok].isfinite().all():
                raise ValueError(f"{self.path}: an embedding is not finite; the checkpoint's weights are broken")
            self.known[key] = embedded, ok
        return self.known[key]

    @torch.no_grad()
    def texts(self, texts, prompt=""):
        """Unit embeddings (M, D) of texts, each after the prompt."""
        texts = [f"{prompt} {text}".strip() for text in texts]
        parts = [self.clip.encode_text(self.tokenizer(texts[i:i + 256]).to(self.device)).float().cpu()
                 for i in range(0, len(texts), 256)]
        return F.normalize(torch.cat(parts), dim=1)


# --------------------------------------------------------------------------------------- tasks
# What a task measures is a result: "protocol" (what was measured on), "chance", and
# "values" {variant: {metric: [value, low, high] in %}}. Each is a table on the screen.

CLASSES = {"esc50": 50, "us8k": 10, "audioset": 527}  # of the whole sets, which the paper's numbers are about


def on_disk(model, name, folder, need, split):
    """A dataset's clips that are on disk with all they need -> (list of Clip, protocol). Raises ValueError."""
    clips, table_file = read_split(name, folder, split, need=()), READERS[name].table(folder, split)
    here = [clip for clip in clips if all(getattr(clip, key) for key in need)
            and ("audio" not in need or os.path.exists(clip.audio))]
    listed = [clip.id for clip in clips]
    if name in ("audioset", "audiocaps") and table_file.exists():  # an index holds only what was found
        found = {(youtube_id(clip.id) or [None])[0] for clip in clips}
        listed += [segment.id for segment in read_segments(table_file) if segment.video not in found]
    there = {clip.id for clip in here}
    missing = [clip for clip in listed if clip not in there]
    model.missing.update(missing)
    if not here:
        raise ValueError(f"not one of {len(listed)} clips has its {' and '.join(need)} on disk, for example "
                         f"{clips[0].audio or clips[0].id}; is the dataset unpacked in {folder}?")
    protocol = {"data": str(folder), "split": split, "listed": len(listed), "missing": missing,
                "published": table_file.exists()}
    if "audio" in need:  # the paper hears so much of a clip; who hears less is measured on another task
        seconds, whole = model.front_end.seconds, READERS[name].seconds
        with suppress(OSError, RuntimeError, TypeError, UnicodeError):  # not audio: it will be skipped
            whole = min(whole, soundfile.info(here[0].audio).duration)
        if seconds < whole - 0.01:
            raise ValueError(f"{model.path} hears {seconds:.1f} s at {model.front_end.sample_rate} Hz, and {whole:g} s "
                             f"of a clip of {name} count: its front end does not fit. Use a checkpoint with at least "
                             f"{round(100 * whole)} frames (pretrain.py --frames)")
        protocol["seconds"] = seconds
    if "captions" in need:
        protocol["captions a clip"] = count = len(here[0].captions)
        if odd := next((clip for clip in here if len(clip.captions) != count), None):
            raise ValueError(f"clip {odd.id} has {len(odd.captions)} captions, clip {here[0].id} has {count}; "
                             f"retrieval needs the same number for every clip")
    return here, protocol


def embed_split(model, name, folder, need, split="test"):
    """What a task needs of a dataset -> list of Clip, protocol, and unit embeddings (N, D) of their sounds, frames.

    name: of READERS. need: some of "audio", "frames", "labels", "captions". Raises ValueError.
    """
    clips, protocol = on_disk(model, name, folder, need, split)
    parts = [model.embed("audio", [clip.audio for clip in clips])] if "audio" in need else []
    parts += [model.embed("frames", [clip.middle_frame for clip in clips])] if "frames" in need else []
    ok = torch.stack([readable for _, readable in parts]).all(0)
    read = list(compress(clips, ok))
    if not read:
        raise ValueError(f"not one of {len(clips)} clips could be read, for example {clips[0].audio}")
    return read, protocol | {"N": len(read), "unreadable": len(clips) - len(read)}, *(part[ok] for part, _ in parts)


def retrieval(model, name, folder, by="audio"):
    """Retrieval between clips' sounds and their captions, with and without the prompt (Tables 3 and 8).

    With by="frames" a clip's second frame stands in for its sound: OracleAV-CLIP, which measures CLIP itself.
    """
    clips, protocol, features = embed_split(model, name, folder, (by, "captions"))
    count, values, chance = protocol["captions a clip"], {}, {}
    for variant, prompt in PROMPTS.items():
        texts = model.texts([caption for clip in clips for caption in clip.captions], prompt)
        values[variant] = {}
        for way, rank in zip(("a2t", "t2a"), retrieval_ranks(features, texts, count)):
            hits = {k: (rank < k).float().view(len(clips), -1).mean(1) for k in (1, 5, 10)}  # share of a clip's queries
            values[variant] |= {f"{way}_r{k}": interval(share) for k, share in hits.items()}
            values[variant][f"{way}_median"] = median_rank(rank)
    for k in (1, 5, 10):  # missed: the chance that k captions drawn blindly hold none of a clip's own
        missed = math.prod(max(0, 1 - count / max(1, count * len(clips) - i)) for i in range(k))
        chance |= {f"a2t_r{k}": 100 * (1 - missed), f"t2a_r{k}": 100 * min(1, k / len(clips))}
    return {"protocol": protocol, "chance": chance, "values": values}


def zero_shot(audio, texts, target):
    """Whether a clip's nearest label is its own: unit vectors (N, D), (K, D), target (N,) -> (N,) 0 or 1 (Eq. 5)."""
    return ((audio @ texts.T).argmax(1) == target).float()


def classification(model, name, folder):
    """Zero-shot accuracy, by class and by published fold too (Table 4, Fig. 6, 12)."""
    clips, protocol, audio = embed_split(model, name, folder, ("audio", "labels"))
    listed = read_split(name, folder, need=("labels",))  # a class counts although its sounds may not be on disk
    labels = sorted({clip.labels[0] for clip in listed})
    protocol["published"] &= len(labels) == CLASSES[name]
    target = torch.tensor([labels.index(clip.labels[0]) for clip in clips])           # (N,)
    fold = torch.tensor([clip.fold for clip in clips])                                # (N,)
    folds = fold.unique().tolist()
    result = {"protocol": protocol | {"classes": len(labels), "folds": len(folds)},
              "chance": {"accuracy": 100 / len(labels)}, "values": {}, "by class": {}, "by fold": {}}
    for variant, prompt in PROMPTS.items():
        hit = zero_shot(audio, model.texts(labels, prompt), target)                   # (N,)
        result["values"][variant] = {"accuracy": interval(hit)}
        result["by class"][variant] = {labels[k]: 100 * hit[target == k].mean().item()
                                       for k in target.unique().tolist()}
        if len(folds) > 1:
            result["by fold"][variant] = [100 * hit[fold == f].mean().item() for f in folds]
    return result


def audioset(model, folder):
    """AudioSet's eval set: mean average precision over its classes, each clip with several (Table 4)."""
    labels = labels_of(read_split("audioset", folder, need=()), folder)  # a class counts without its sounds, too
    clips, protocol, audio = embed_split(model, "audioset", folder, ("audio", "labels"))
    protocol["published"] &= len(labels) == CLASSES["audioset"]
    number = {label: k for k, label in enumerate(labels)}
    target = torch.zeros(len(clips), len(labels), dtype=torch.bool)                   # (N, K)
    for i, clip in enumerate(clips):
        target[i, [number[label] for label in clip.labels]] = True
    tested = target.any(0)
    result = {"protocol": protocol | {"classes": len(labels), "classes without a clip": int((~tested).sum())},
              "chance": {"map": chance_map(target)}, "values": {}, "by class": {}}
    for variant, prompt in PROMPTS.items():
        value, precision = mean_average_precision(audio @ model.texts(labels, prompt).T, target)
        result["values"][variant] = {"map": value}
        result["by class"][variant] = {labels[k]: 100 * precision[k].item() for k in tested.nonzero().flatten()}
    return result


def image_audio(model, folder):
    """Retrieval between the sounds of the balanced AudioSet and their second frames (§3.2.2, Fig. 5)."""
    clips, protocol, audio, images = embed_split(model, "audioset", folder, ("audio", "frames", "labels"), "val")
    labels, values, chance = [clip.labels for clip in clips], {}, {}
    sets = Counter(map(frozenset, labels))
    for way, queries, gallery in (("i2a", images, audio), ("a2i", audio, images)):
        hit, share = top1_hits(queries, gallery, labels)
        values |= {f"{way}_precision": interval(hit), f"{way}_recall": interval(share)}
        chance |= {f"{way}_precision": 100 * sum(n * n for n in sets.values()) / len(clips) ** 2,
                   f"{way}_recall": 100 / len(clips)}
    return {"protocol": protocol | {"label sets": len(sets)}, "chance": chance, "values": {"": values}}


def pivots(model, folder):
    """Pivotability: how far images lead from a sound to its captions, and for which categories (App. F)."""
    clips, protocol, audio, images = embed_split(model, "audiocaps", folder, ("audio", "frames", "captions"))
    published = folder.parent / "audioset"
    if not any(clip.labels for clip in clips) and (published / CLASS_NAMES).exists():
        clips = add_labels(clips, published)
    captions = model.texts([caption for clip in clips for caption in clip.captions])
    shares = {k: pivotability(audio, images, captions, k, protocol["captions a clip"]) for k in (1, 2, 3, 5, 10, 20)}
    pivotable = shares[5] >= 0.6 - 1e-6                                               # (N,)
    values = {f"pivot_{k}": interval(share) for k, share in shares.items()} | {"pivotable": interval(pivotable.float())}
    categories = Counter(label for clip in compress(clips, pivotable) for label in clip.labels)
    return {"protocol": protocol, "chance": {}, "values": {"": values}, "categories": dict(categories.most_common())}


TASKS = {  # name -> dataset, function(model, folder) -> {part: result}
    "audiocaps": ("audiocaps", lambda model, folder: {"audiocaps": retrieval(model, "audiocaps", folder)}),
    # 10 s and 18 s (App. D)
    "clotho": ("clotho", lambda model, folder: {
        f"clotho {ear.front_end.seconds:g} s": retrieval(ear, "clotho", folder) for ear in (model, model.longer(1.8))}),
    "esc50": ("esc50", lambda model, folder: {"esc50": classification(model, "esc50", folder)}),
    "us8k": ("us8k", lambda model, folder: {"us8k": classification(model, "us8k", folder)}),
    "audioset": ("audioset", lambda model, folder: {"audioset": audioset(model, folder)}),
    "va": ("audioset", lambda model, folder: {"va": image_audio(model, folder)}),
    "oracle": ("audiocaps", lambda model, folder: {"oracle": retrieval(model, "audiocaps", folder, by="frames")}),
    "pivot": ("audiocaps", lambda model, folder: {"pivot": pivots(model, folder)}),
    "toy": ("toy", lambda model, folder: {  # at the end of pretrain.py; not in `all`, which has each of these by itself
        "audio-text": retrieval(model, "audiocaps", folder),
        "image-text (CLIP itself)": retrieval(model, "audiocaps", folder, by="frames"),
        "zero-shot labels": classification(model, "esc50", folder)}),
}


# -------------------------------------------------------------------------------------- tables

PAPER_RETRIEVAL = {  # R@1 and R@10 of text -> audio, then of audio -> text: AudioCaps, Clotho at 18 s, Clotho at 10 s
    "VA-Rand": ((1.3, 7.3, 5.6, 24.5), (1.3, 7.5, 3.2, 13.5), (1.4, 7.4, 3.2, 13.1)),
    "vip-AnT": ((0.8, 7.9, 10.1, 38.1), (1.9, 9.5, 7.0, 25.6), (1.9, 10.1, 6.1, 23.7)),
    "+AT AC": ((9.9, 45.6, 15.2, 52.9), (6.7, 29.1, 7.1, 30.7), (5.9, 26.3, 8.2, 30.3)),
    "+AT FC": ((8.9, 41.5, 14.7, 50.0), (6.5, 27.7, 7.8, 29.7), (5.7, 26.6, 6.6, 28.0)),
    "+AT VC": ((6.9, 35.7, 13.5, 49.4), (5.5, 25.6, 7.6, 28.2), (5.2, 25.2, 7.0, 25.9)),
    "+AT RC": ((3.8, 19.9, 10.7, 38.1), (3.5, 16.9, 5.5, 24.9), (3.5, 16.3, 5.7, 23.6)),
    "+AT GL": ((12.4, 52.9, 13.0, 51.2), (6.7, 29.0, 6.8, 27.0), (6.0, 27.1, 6.1, 25.4)),
    "+AT GC": ((27.7, 78.0, 34.3, 79.7), (11.1, 40.5, 11.8, 41.0), (10.2, 39.0, 10.3, 37.2)),
}
PAPER_CLASSIFICATION = {  # with and without the prompt: ESC-50, US8K, AudioSet
    "VA-Rand": ((37.6, 33.0), (41.9, 38.1), (1.7, 2.0)), "vip-AnT": ((57.1, 49.9), (44.7, 37.8), (2.6, 2.8)),
    "+AT AC": ((62.8, 55.7), (54.0, 47.0), (11.6, 12.3)), "+AT FC": ((62.5, 58.0), (52.7, 50.0), (11.2, 12.2)),
    "+AT VC": ((61.9, 58.0), (52.7, 50.3), (8.9, 10.7)), "+AT RC": ((51.6, 36.1), (42.3, 28.5), (4.1, 4.6)),
    "+AT GL": ((67.2, 64.5), (62.6, 61.0), (15.4, 18.9)), "+AT GC": ((69.5, 64.2), (71.9, 67.1), (13.3, 13.6)),
}
PAPER_CLIPS = {"audiocaps": 860, "oracle": 860, "clotho": 1045, "esc50": 2000, "us8k": 8732, "audioset": 16_416}
ORACLE = (4.8, 27.8, 6.6, 31.2)  # OracleAV-CLIP on AudioCaps
RETRIEVED = ("t2a_r1", "t2a_r10", "a2t_r1", "a2t_r10")


def paper_of(row, part):
    """What the paper reports for a row of its tables and a part of our results -> {variant: {metric: %}} or {}."""
    retrieved = {"oracle": ORACLE} | dict(zip(("audiocaps", "clotho 18 s", "clotho 10 s"), PAPER_RETRIEVAL[row]))
    if part in retrieved:
        return {"no prompt": dict(zip(RETRIEVED, retrieved[part]))}
    classified = dict(zip(("esc50", "us8k", "audioset"), PAPER_CLASSIFICATION[row]))
    metric = "map" if part == "audioset" else "accuracy"
    return {variant: {metric: value} for variant, value in zip(PROMPTS, classified.get(part, ()))}


HEADLINES = (*RETRIEVED, "accuracy", "map", "i2a_precision", "a2i_precision", "pivot_5", "pivotable")
WORDS = {"a2t": "audio -> text", "t2a": "text -> audio", "i2a": "image -> audio", "a2i": "audio -> image",
         "r1": "R@1", "r5": "R@5", "r10": "R@10", "median": "median rank", "precision": "precision@1",
         "recall": "recall@1", "map": "mAP", "pivot": "pivotability, k =", "pivotable": "pivotable: 3 of 5 at k = 5"}


def name_of(part, metric):
    """A metric's name on the screen; in some parts frames stand for sounds."""
    name = " ".join(WORDS.get(word, word) for word in metric.split("_"))
    return name.replace("audio", "frame") if part in ("oracle", "image-text (CLIP itself)") else name


def cell(value):
    """A number with its interval, or without one."""
    return f"{value[0]:.1f} [{value[1]:.1f}, {value[2]:.1f}]" if isinstance(value, list) else f"{value:.1f}"


def table(header, rows):
    """Print rows of str under a header, columns aligned."""
    rows = [header, *rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *texts in rows:
        print("   ".join(["  " + name.ljust(first), *map(str.rjust, texts, widths)]).rstrip())


def show(results, row):
    """Print a checkpoint's results, a table a part, beside the paper's row where the dataset is the paper's."""
    for part, result in results.items():
        protocol, chance = result["protocol"], result["chance"]
        notes = [f"({len(protocol['missing'])} missing, {protocol['unreadable']} unreadable)"]
        notes += [f"the first {protocol['seconds']:g} s of each"] if "seconds" in protocol else []
        notes += [f"{protocol[key]} {key}" for key in ("captions a clip", "classes", "classes without a clip",
                                                       "label sets", "folds") if protocol.get(key, 1) != 1]
        print(f"\n{part}: {protocol['N']} of {protocol['listed']} clips of {protocol['data']} {', '.join(notes)}")
        paper = paper_of(row, part) if protocol["published"] else {}
        columns = []  # (header, {metric: number})
        for variant, values in result["values"].items():
            columns.append((f'"{PROMPT} …"' if variant == "prompt" else variant, values))
            columns += [("paper", paper[variant])] if variant in paper else []
        columns += [("chance", chance)] if chance else []
        table(["%, 95 % interval", *(header for header, _ in columns)],
              [[name_of(part, metric), *(cell(numbers[metric]) if metric in numbers else "" for _, numbers in columns)]
               for metric in columns[0][1]])
        for variant, folds in result.get("by fold", {}).items():
            print(f"  by fold, {variant}: {' '.join(f'{fold:.1f}' for fold in folds)}; "
                  f"{np.mean(folds):.1f} ± {np.std(folds, ddof=1):.1f}")
        if paper:
            print(f"  paper: {'OracleAV-CLIP' if part == 'oracle' else row}, on {PAPER_CLIPS[part.split()[0]]} clips")
        if "categories" in result:
            categories = [f"{name} {count}" for name, count in result["categories"].items()]
            print(f"  pivotable clips by category, largest first: {', '.join(categories[:20]) or 'none has a label'}")


def compare(runs):
    """Print the main numbers of several checkpoints, and the paper's, side by side. runs: [(name, row, results)]."""
    names, paper_rows, measured = zip(*runs)
    parts = {part: result for results in measured for part, result in results.items()}
    published = {part for part, result in parts.items() if result["protocol"]["published"]}
    paper_rows = list(dict.fromkeys(paper_rows)) if published else []
    rows = []
    for part, result in parts.items():
        for variant, metric in ((v, m) for m in HEADLINES for v in result["values"] if m in result["values"][v]):
            numbers = [paper_of(row, part).get(variant, {}).get(metric) if part in published else None
                       for row in paper_rows]
            numbers += [results[part]["values"][variant][metric] if part in results else None for results in measured]
            rows.append([f"{part}, {name_of(part, metric)}{f', {variant}' if variant else ''}",
                         *("-" if number is None else cell(number) for number in numbers)])
    print()
    table(["%", *(f"paper: {row}" for row in paper_rows), *names], rows)
    first, *others = [set(results.get("pivot", {}).get("categories", {})) for results in measured]
    for name, categories in zip(names[1:], others):
        if categories - first:  # Table 9
            print(f"  pivotable with {name}, not with {names[0]}: {', '.join(sorted(categories - first))}")


def blank_figure(width, height):
    """A matplotlib figure, in inches; imported here, for it takes half a second that most commands need not wait."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def by_class(runs, place, chart_only):
    """Per-class numbers (with the prompt) as a table, and as a bar chart <place><part>_classes.png (Fig. 6, 12)."""
    for part in dict.fromkeys(part for *_, results in runs for part in results if "by class" in results[part]):
        scores = {name: results[part]["by class"]["prompt"] for name, _, results in runs if part in results}
        first = next(iter(scores.values()))
        labels = sorted(first, key=first.get, reverse=True)
        few = labels if len(labels) <= 60 else [*labels[:10], *labels[-10:]]
        if not chart_only:
            print(f'\n{part} by class, "{PROMPT} …"'
                  + ("" if few is labels else f": the best and worst 10 of {len(labels)}"))
            table(["%", *scores], [[label, *(f"{score.get(label, math.nan):.1f}" for score in scores.values())]
                                   for label in few])
        figure = blank_figure(max(5, 0.28 * len(few) * max(1, len(scores) / 2)), 4)
        axes, width = figure.subplots(), 0.8 / len(scores)
        for i, (name, score) in enumerate(scores.items()):
            axes.bar(np.arange(len(few)) + 0.8 * i / len(scores), [score.get(label, 0) for label in few], width,
                     label=name, align="edge")
        axes.set_xticks(np.arange(len(few)) + 0.4, few, rotation=90)
        axes.set(ylabel="average precision (%)" if part == "audioset" else "accuracy (%)", title=part)
        axes.legend(fontsize="small")
        figure.savefig(f"{place}{part}_classes.png", dpi=150)
        print(f"{part} by class: {place}{part}_classes.png")


# ------------------------------------------------------------------------------------- curves

def line_fit(x, y, target, draws=10_000):
    """Straight line through points, and where it reaches `target` -> slope, intercept, x there, its 95 % interval.

    x, y: (n,) with n >= 3. The interval is parametric: slope and intercept are drawn from the normal distribution that
    least squares gives them (residuals estimate the noise, Student's t widens it for few points). Draws whose slope is
    not positive never reach the target and count as infinity.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    design = np.stack([x, np.ones_like(x)], 1)                                        # (n, 2)
    (slope, intercept), *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ (slope, intercept)
    free = len(x) - 2
    covariance = residual @ residual / free * np.linalg.inv(design.T @ design)
    rng = np.random.default_rng(0)
    scale = np.sqrt(free / rng.chisquare(free, draws))[:, None]
    drawn = (slope, intercept) + scale * rng.multivariate_normal((0, 0), covariance, draws)
    with np.errstate(divide="ignore"):
        reached = np.where(drawn[:, 0] > 0, (target - drawn[:, 1]) / np.maximum(drawn[:, 0], 1e-12), np.inf)
    at = (target - intercept) / slope if slope > 0 else math.inf
    return slope, intercept, at, np.quantile(reached, [0.025, 0.975], method="lower").tolist()


def accuracy_by_pairs(models, folder):
    """Zero-shot accuracy, with the prompt, of checkpoints fine-tuned on gold pairs -> {pairs: %}, seeds averaged."""
    for model in models:
        if model.source != "gc":
            raise ValueError(f"{model.path}: was fine-tuned on {model.source or 'no captions'}; "
                             f"needed: gold pairs (gc)")
    measured = {pairs: [] for pairs in sorted(model.pairs for model in models)}
    if len(measured) < 3:
        raise ValueError(f"a line needs checkpoints of at least 3 numbers of pairs, these have {list(measured)}")
    for model in models:
        measured[model.pairs].append(classification(model, "esc50", folder)["values"]["prompt"]["accuracy"][0])
    return {pairs: float(np.mean(accuracies)) for pairs, accuracies in measured.items()}


def scaling(measured, target, out):
    """Accuracy by number of gold pairs {pairs: %}, a line over log2(pairs), and where it meets a target (Fig. 7).

    Draws `out` and returns what it prints.
    """
    pairs, y, metric = list(measured), list(measured.values()), "zero-shot accuracy"
    x = [math.log2(count) for count in pairs]
    slope, intercept, at, (low, high) = line_fit(x, y, target)
    table(["pairs", metric], [[str(count), cell(value)] for count, value in measured.items()])
    print(f"  {metric} = {intercept:.1f} + {slope:.2f} · log2(pairs); it reaches {target:g} % at 2^{at:.1f} pairs, "
          f"95 % interval 2^{low:.1f} to 2^{high:.1f}, if it stays a line (paper, ESC-50: 81 % at 2^21)")
    figure = blank_figure(5, 4)
    axes = figure.subplots()
    ends = np.array([x[0], min(max(at, x[-1]), x[-1] + 12)])
    axes.plot(2 ** ends, intercept + slope * ends, "--", color="grey")
    axes.plot(pairs, y, "o")
    axes.axhline(target, color="grey", linewidth=0.5, label=f"{target:g} %")
    axes.legend(fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="gold pairs", ylabel=f"{metric} (%)")
    figure.savefig(out, dpi=150)
    print(f"  drawn in {out}")
    return {"pairs": pairs, "values": y, "slope": slope, "intercept": intercept, "log2 pairs at target": at,
            "interval": [low, high if math.isfinite(high) else None], "target": target}


def epochs_of(log):
    """A run's validations -> name of the metric, [(epoch, %), …]. Raises FileNotFoundError, ValueError (none)."""
    name, measured = "", []
    for row in read_log(log):
        name = next((key for key in row if key.endswith("@1")), name)
        with suppress(ValueError, KeyError, TypeError):  # damaged
            measured += [(float(row["epoch"]), float(row[name]))] if name in row else []
    if not measured:
        raise ValueError(f"{log}: no validation in it")
    return name, measured


def curve(paths, out):
    """Image-audio retrieval by epoch, from the logs beside the checkpoints (Fig. 5)."""
    figure = blank_figure(5, 4)
    axes = figure.subplots()
    for path, name in zip(paths, names_of(paths)):
        metric, measured = epochs_of(path.with_name("log.jsonl"))
        axes.plot(*zip(*measured), marker="o", label=name)
        print(f"{name}: {metric} by epoch: {' '.join(f'{value:.1f}' for _, value in measured)}")
    axes.set(xlabel="epoch", ylabel=f"{metric} (%)")
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=150)
    print(f"drawn in {out}")


# ----------------------------------------------------------------------------------- the command

def names_of(paths):
    """What to call checkpoints: their files' names, their folders' for checkpoint.pt, the path where that is taken."""
    names = []
    for path in paths:
        name = path.resolve().parent.name if path.name == "checkpoint.pt" else path.stem
        names.append(str(path) if name in names else name)
    return names


def save_json(path, content):
    """Write JSON, whole or not at all."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def measure(model, task, data, saved):
    """Run a task, or all, each on its dataset or on the folder `data` -> {part: result}, {task: why it could not run}.

    Saved as JSON after each.
    """
    results, errors = {}, {}
    tasks = [name for name in TASKS if name != "toy"] if task == "all" else [task]
    for name in tasks:
        dataset, function = TASKS[name]
        try:
            results |= function(model, dataset_folder(data or dataset))
        except (OSError, ValueError) as error:
            errors[name] = error
        if results and ranks()[0] == 0:
            save_json(saved, {"task": task, "model": model.identity, "versions": versions(), "results": results,
                              "not measured": {name: str(error) for name, error in errors.items()}})
    return results, errors


def measure_all(models, args, out):
    """Each model's tables, then all of them side by side."""
    runs, paths = [], [model.path for model in models]
    prefixes = ["" if path.name == "checkpoint.pt" else f"{path.stem}." for path in paths]
    first = ranks()[0] == 0
    for model, path, name, prefix in zip(models, paths, names_of(paths), prefixes):
        saved = path.with_name(f"{prefix}{args.task}.json")
        if args.out:
            saved = out / f"{name.strip('/').replace('/', '_')}.{args.task}.json"
        with closing(Claim(f"{saved}.lock")) if first else nullcontext():
            results, errors = measure(model, args.task, args.data, saved)
        if args.list_missing and first and (results or model.missing):
            Path(args.list_missing).write_text("".join(f"{clip}\n" for clip in sorted(model.missing)))
            print(f"{len(model.missing)} missing clips listed in {args.list_missing}")
        if not results and args.task != "all":
            raise errors[args.task]
        if not results:
            reasons = " ".join(f"{task}: {error}." for task, error in errors.items())
            raise ValueError(f"no task could run here. {reasons}")
        row = args.row or model.identity["row"]
        runs.append((name, row, results))
        print(f"\n{path}: {model.identity['stage']}, step {model.identity['step']} of {model.identity['steps']}")
        show(results, row)
        for task, error in errors.items():
            print(f"\n{task}: not measured. {error}")
        print(f"\nsaved in {saved}")
    if args.task != "toy" and first:
        by_class(runs, f"{out}/{prefixes[0]}", chart_only=args.task == "all")
    if len(runs) > 1 or args.task == "all":
        compare(runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=[*TASKS, "all", "scaling", "curve", "tag", "search"])
    parser.add_argument("--checkpoint", help="of pretrain.py, finetune.py or clip_load.py import-vipant "
                                             "(out/audioset/pretrain/checkpoint.pt; for the toy out/toy/pretrain/…)")
    parser.add_argument("--compare", nargs="+", metavar="CHECKPOINT", help="several checkpoints, side by side")
    parser.add_argument("--data", help="the dataset's folder (data/<its name>)")
    parser.add_argument("--out", help="folder for what is saved (the checkpoint's own)")
    parser.add_argument("--row", choices=PAPER_RETRIEVAL, help="the paper's row to print beside (the checkpoint's own)")
    parser.add_argument("--list-missing", metavar="FILE", help="write the ids of clips not on disk to this file")
    parser.add_argument("--audio", nargs="+", metavar="FILE", help="tag, search: recordings, or folders of them")
    parser.add_argument("--labels", help='tag: labels to choose from, separated by commas: "dog, rain"')
    parser.add_argument("--query", nargs="+", metavar="TEXT", help="search: what to look for")
    parser.add_argument("--target", type=float, default=81, help="scaling: accuracy to reach (81 %%: people on ESC-50)")
    parser.add_argument("--top", type=int, default=10, help="search: answers to print (10)")
    parser.add_argument("--clip", help="CLIP's weights (those the checkpoint names)")
    parser.add_argument("--vocab", help="the tokenizer's vocabulary (the one the checkpoint names)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    args = parser.parse_args()
    labels = [label.strip() for label in (args.labels or "").split(",") if label.strip()]
    if args.task == "tag" and not (args.audio and labels):
        parser.error("--task tag needs --audio and --labels")
    if args.task == "search" and not (args.audio and args.query):
        parser.error("--task search needs --audio and --query")
    if args.compare and (args.checkpoint or args.task in ("tag", "search")):
        parser.error("--compare goes with neither --checkpoint nor tag nor search")
    if args.top < 1:
        parser.error("--top: at least 1")

    device = start_ranks()
    if ranks()[0] > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the first speaks for all
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    world = "toy" if "toy" in (args.task, Path(args.data or "").name) else "audioset"
    paths = [Path(path) for path in args.compare or [args.checkpoint or f"out/{world}/pretrain/checkpoint.pt"]]
    out = Path(args.out or paths[0].parent)
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    if args.task == "curve":
        curve(paths, out / "curve.png")
        return
    if args.task in ("tag", "search"):
        files = recordings(args.audio)
    elif args.task != "all":  # a missing dataset is said before a missing checkpoint
        folder = dataset_folder(args.data or ("esc50" if args.task == "scaling" else TASKS[args.task][0]))
    models = [Model(path, args.clip, args.vocab, device, args.workers) for path in paths]  # what is broken shows now
    if args.task == "tag":
        tag(models[0], files, labels, PROMPT, out / "heard")
    elif args.task == "search":
        search(models[0], files, args.query, out / "heard", args.top)
    elif args.task == "scaling":
        measured = accuracy_by_pairs(models, folder)
        if ranks()[0] == 0:
            result = scaling(measured, args.target, out / "scaling.png")
            save_json(out / "scaling.json", result | {"checkpoints": [model.identity for model in models]})
    else:
        measure_all(models, args, out)


if __name__ == "__main__":
    run(main)
