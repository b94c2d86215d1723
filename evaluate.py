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

N  clips     M  captions     K  classes     D  embedding     W  windows of a long recording
"""
import argparse
import copy
import hashlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip_load import Tokenizer, fingerprint, lengthen, load_clip
from data import (
    AUDIO,
    CLASS_NAMES,
    READERS,
    Claim,
    Unreadable,
    add_labels,
    class_names,
    dataset_folder,
    find_files,
    load_image,
    open_array,
    read_segments,
    read_split,
    run,
    write_whole,
    youtube_id,
)
from pretrain import (
    audio_encoder_of,
    embed_all,
    load_checkpoint,
    ranks,
    start_ranks,
    top1_hits,
    versions,
)

STAGES = ["pretrain", "finetune"]
PROMPT = "the sound of"  # §4, "Prompting (usually) helps"
PROMPTS = {"prompt": PROMPT, "no prompt": ""}


# ------------------------------------------------------------------------------------- metrics

def retrieval_ranks(audio, captions, captions_per_clip=5):
    """Ranks from 0 of the right answers, audio to text (N,) and text to audio (M,); caption j belongs to clip j // 5.

    Audio to text takes the best-ranked of a clip's captions; text to audio queries with every caption (§4).
    A tie counts against the model: a rank is the number of others at least as near, so that embeddings that
    are all alike score as chance or worse. Raises ValueError (not finite, wrong number of captions).
    """
    audio, captions = F.normalize(audio.float(), dim=1), F.normalize(captions.float(), dim=1)
    if not (audio.isfinite().all() and captions.isfinite().all()):
        raise ValueError("an embedding is not finite; the checkpoint's weights are broken")
    if len(captions) != captions_per_clip * len(audio):
        raise ValueError(f"{len(captions)} captions for {len(audio)} clips; needed: {captions_per_clip} a clip")
    owner = torch.arange(len(captions)) // captions_per_clip                          # (M,)
    similarity = audio @ captions.T                                                   # (N, M)
    best_own = similarity.gather(1, torch.arange(len(captions)).view(len(audio), -1)).max(1, keepdim=True).values
    others = owner != torch.arange(len(audio))[:, None]                               # (N, M)
    a2t = ((similarity >= best_own) & others).sum(1)                                  # (N,)
    right = similarity[owner, torch.arange(len(captions))]                            # (M,)
    return a2t, (similarity >= right).sum(0) - 1                                      # (N,), (M,)


def retrieval_metrics(audio, captions, captions_per_clip=5):
    """Retrieval both ways: audio (N, D), captions (5N, D) -> recall at 1, 5, 10 in %, median rank from 1."""
    result = {}
    for way, rank in zip(("a2t", "t2a"), retrieval_ranks(audio, captions, captions_per_clip)):
        result |= {f"{way}_r{k}": 100 * (rank < k).float().mean().item() for k in (1, 5, 10)}
        result[f"{way}_median"] = rank.float().quantile(0.5).item() + 1
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
    leads_to = (images @ captions.T).topk(5, dim=1).indices                           # (N, 5)
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
    ranks = ranking(scores, target)
    precision = average_precision(*ranks)
    value = precision.nanmean().item()
    if target.sum() < 20 * target.any(0).sum():
        return 100 * value, precision
    drawn = torch.tensor([average_precision(*ranks, weights).nanmean().item()
                          for weights in tqdm(resamples(len(scores), draws), desc="interval", leave=False)])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    low, high = max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low))
    return [100 * value, 100 * low, 100 * high], precision


def chance_map(target):
    """Expected mAP in % of scores drawn blindly for target (N, K) bool: more than the share of positives.

    With p positives of n, a positive at rank r has precision (1 + (r-1)(p-1)/(n-1)) / r on average; averaged over r.
    """
    n, p = len(target), target.sum(0)[target.any(0)].double()                         # (), (classes with a clip,)
    harmonic = (1 / torch.arange(1, n + 1).double()).sum()
    return 100 * (((p - 1) / max(1, n - 1) * (n - harmonic) + harmonic) / n).mean().item()


# --------------------------------------------------------------------------------------- model

class Model:
    """A checkpoint's audio encoder beside the CLIP that it was trained against."""

    def __init__(self, path, clip=None, vocab=None, device="cpu", workers=2):
        checkpoint = load_checkpoint(path, STAGES)
        self.path, self.stage, self.device, self.workers = str(path), checkpoint["stage"], device, workers
        self.encoder, self.front_end = audio_encoder_of(checkpoint, path)
        try:
            made_with, settings, scale = checkpoint["clip"], checkpoint["settings"], checkpoint["learner"]["log_scale"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from None
        self.encoder.to(device)
        self.clip = load_clip(clip or made_with["weights"], device)
        if fingerprint(self.clip) != made_with["fingerprint"]:
            raise ValueError(f"{clip or made_with['weights']}: not the CLIP that {path} was trained against; its "
                             f"fingerprint is not {made_with['fingerprint']}. Name the right one with --clip")
        self.tokenizer = Tokenizer(vocab or made_with["vocab"], self.clip.context_length)
        if self.tokenizer.vocab_size != self.clip.token_embedding.num_embeddings:
            raise ValueError(f"{vocab or made_with['vocab']}: {self.tokenizer.vocab_size} tokens, this CLIP has "
                             f"{self.clip.token_embedding.num_embeddings}; name the right one with --vocab")
        self.dimensions = self.clip.visual.proj.shape[1]
        self.log_scale = scale.item()
        source, init = settings.get("source", ""), settings.get("init")
        row = f"+AT {source.upper()}" if source else "VA-Rand" if init == "random" else "vip-AnT"
        self.identity = {"checkpoint": self.path, "stage": self.stage, "step": checkpoint["step"],
                         "steps": checkpoint["steps"], "init": init, "weights": fingerprint(self.encoder),
                         "clip": made_with["fingerprint"], "row": row}
        self.known = {}  # embeddings that an earlier task of the same run needed too

    def longer(self, factor):
        """The same model hearing `factor` times as much of a clip: its positions resized once more (App. D)."""
        frames = round(factor * self.front_end.frames)
        other = copy.copy(self)
        other.front_end = replace(self.front_end, frames=frames)
        other.encoder, other.known = lengthen(self.encoder, frames).eval(), {}
        return other

    def embed(self, kind, items, read, encode):
        """Unit embeddings (N, D) of files and which could be read (N,); kept in memory for the next task."""
        key = (kind, tuple(items))
        if key not in self.known:
            embedded, ok = embed_all(items, read, encode, self.dimensions, self.device, self.workers, kind)
            if not embedded[ok].isfinite().all():
                raise ValueError(f"{self.path}: an embedding is not finite; the checkpoint's weights are broken")
            self.known[key] = embedded, ok
        return self.known[key]

    def sounds(self, items, load=None):
        """Audio files, or whatever `load` reads -> unit embeddings (N, D), which could be read (N,)."""
        return self.embed("audio", items, load or self.front_end.load,
                          lambda wave, length: self.encoder(self.front_end(wave, length)))

    def audio(self, clips):
        """Unit embeddings (N, D) of the clips' sounds, and which could be read (N,)."""
        return self.sounds([clip.audio for clip in clips])

    def images(self, clips):
        """Unit embeddings (N, D) of the clips' second frames, and which could be read (N,)."""
        return self.embed("frames", [clip.frames[:2][-1] for clip in clips],
                          partial(load_image, size=self.clip.image_size), self.clip.encode_image)

    @torch.no_grad()
    def texts(self, texts, prompt=""):
        """Unit embeddings (M, D) of texts, each after the prompt."""
        texts = [f"{prompt} {text}".strip() for text in texts]
        parts = [self.clip.encode_text(self.tokenizer(texts[i:i + 256]).to(self.device)).float().cpu()
                 for i in range(0, len(texts), 256)]
        return F.normalize(torch.cat(parts), dim=1)


# --------------------------------------------------------------------------------------- tasks
# A task returns {part: result}; a result holds "protocol" (what was measured on), "chance" and
# "values" {variant: {metric: [value, low, high] in %}}. Each is a table on the screen.

class NothingThere(ValueError):
    """None of a dataset's clips is on disk; `missing` has their ids."""

    def __init__(self, message, missing):
        super().__init__(message)
        self.missing = missing


def load(model, name, folder, split="test", need=("audio",)):
    """A dataset's clips that are on disk -> (list of Clip, what to say of them). Raises NothingThere, ValueError."""
    clips = read_split(name, folder, split, need=())
    here = [clip for clip in clips if all(getattr(clip, key) for key in need)
            and ("audio" not in need or os.path.exists(clip.audio))]
    missing, table_file = [clip.id for clip in clips], READERS[name].table(Path(folder), split)
    if name in ("audioset", "audiocaps") and table_file.exists():  # an index holds but what was found
        found = {(youtube_id(clip.id) or [None])[0] for clip in clips}
        missing += [segment.id for segment in read_segments(table_file) if segment.video not in found]
    listed = len(missing)
    if not here:
        raise NothingThere(f"not one of {listed} clips has its {' and '.join(need)} on disk, for example "
                           f"{clips[0].audio or clips[0].id}; is the dataset unpacked in {folder}?", missing)
    there = {clip.id for clip in here}
    missing = [clip for clip in missing if clip not in there]
    try:  # the paper hears so much of a clip; who hears less is measured on another task
        whole = min(READERS[name].seconds, soundfile.info(here[0].audio).duration)
    except (OSError, RuntimeError, TypeError):
        whole = READERS[name].seconds
    if "audio" in need and model.front_end.seconds < whole - 0.01:
        raise ValueError(f"{model.path} hears {model.front_end.seconds:.1f} s at {model.front_end.sample_rate} Hz, and "
                         f"{whole:g} s of a clip of {name} count: its front end does not fit. Use a checkpoint with at "
                         f"least {round(100 * whole)} frames (pretrain.py --frames)")
    protocol = {"data": str(folder), "split": split, "listed": listed, "missing": missing,
                "published": table_file.exists()}
    return here, protocol | ({"seconds": model.front_end.seconds} if "audio" in need else {})


def kept(features, clips, protocol, *oks):
    """Clips that could be read, their rows of the features, and the protocol with the counts."""
    ok = torch.stack(oks).all(0)
    left = [clip for clip, use in zip(clips, ok.tolist()) if use]
    if not left:
        raise ValueError(f"not one of {len(clips)} clips could be read, for example {clips[0].audio}")
    counts = {"N": len(left), "unreadable": len(clips) - len(left)}
    return left, [feature[ok] for feature in features], protocol | counts


def captions_per_clip(clips):
    """How many captions each clip has. Raises ValueError where they differ, for recall would not be comparable."""
    count = len(clips[0].captions)
    odd = next((clip for clip in clips if len(clip.captions) != count), None)
    if odd:
        raise ValueError(f"clip {odd.id} has {len(odd.captions)} captions, clip {clips[0].id} has {count}; retrieval "
                         f"needs the same number for every clip")
    return count


def retrieval(model, clips, features, protocol):
    """Retrieval between clips, by what stands for them (N, D), and their captions, with and without the prompt."""
    count, values = captions_per_clip(clips), {}
    texts = [caption for clip in clips for caption in clip.captions]
    for variant, prompt in PROMPTS.items():
        embedded = model.texts(texts, prompt)
        a2t, t2a = retrieval_ranks(features, embedded, count)
        metrics = retrieval_metrics(features, embedded, count)
        for k in (1, 5, 10):
            metrics[f"a2t_r{k}"] = interval((a2t < k).float())
            metrics[f"t2a_r{k}"] = interval((t2a < k).float().view(-1, count).mean(1))  # of a clip's captions
        values[variant] = metrics
    chance = {}
    for k in (1, 5, 10):  # that k captions drawn blindly miss all of a clip's own
        missed = math.prod(max(0, 1 - count / max(1, count * len(clips) - i)) for i in range(k))
        chance |= {f"a2t_r{k}": 100 * (1 - missed), f"t2a_r{k}": 100 * min(1, k / len(clips))}
    return {"protocol": protocol | {"captions a clip": count}, "chance": chance, "values": values}


def classification(model, name, folder):
    """Zero-shot accuracy: argmax cos(audio, text of the label) (Eq. 5), by class and by published fold."""
    clips, protocol = load(model, name, folder, need=("audio", "labels"))
    listed = read_split(name, folder, need=("labels",))  # a class counts although its sounds may not be on disk
    labels = sorted({clip.labels[0] for clip in listed})
    audio, heard = model.audio(clips)
    clips, (audio,), protocol = kept([audio], clips, protocol, heard)
    protocol["published"] &= len(labels) == PAPER_CLASSES[name]
    target = torch.tensor([labels.index(clip.labels[0]) for clip in clips])           # (N,)
    fold = torch.tensor([clip.fold for clip in clips])                                # (N,)
    result = {"protocol": protocol | {"classes": len(labels), "folds": len(fold.unique())},
              "chance": {"accuracy": 100 / len(labels)}, "values": {}, "by class": {}, "by fold": {}}
    for variant, prompt in PROMPTS.items():
        hit = zero_shot(audio, model.texts(labels, prompt), target)                   # (N,)
        result["values"][variant] = {"accuracy": interval(hit)}
        result["by class"][variant] = {label: 100 * hit[target == k].mean().item()
                                       for k, label in enumerate(labels) if (target == k).any()}
        if len(fold.unique()) > 1:
            result["by fold"][variant] = [100 * hit[fold == f].mean().item() for f in fold.unique().tolist()]
    return result


def zero_shot(audio, texts, target):
    """Whether a clip's nearest label is its own: unit vectors (N, D), (K, D), target (N,) -> (N,) 0 or 1 (Eq. 5)."""
    return ((audio @ texts.T).argmax(1) == target).float()


def task_audiocaps(model, folder):
    """Retrieval between AudioCaps' test sounds and their five captions (Table 3)."""
    clips, protocol = load(model, "audiocaps", folder, need=("audio", "captions"))
    audio, heard = model.audio(clips)
    clips, (audio,), protocol = kept([audio], clips, protocol, heard)
    return {"audiocaps": retrieval(model, clips, audio, protocol)}


def task_clotho(model, folder):
    """The same on Clotho's evaluation set, on the first 10 s and on the first 18 s of a clip (Tables 3 and 8)."""
    parts = {}
    for ear in (model, model.longer(1.8)):
        clips, protocol = load(ear, "clotho", folder, need=("audio", "captions"))
        audio, heard = ear.audio(clips)
        clips, (audio,), protocol = kept([audio], clips, protocol, heard)
        parts[f"clotho {ear.front_end.seconds:g} s"] = retrieval(ear, clips, audio, protocol)
    return parts


def task_esc50(model, folder):
    """Zero-shot classification of ESC-50, or of its subset ESC-10 (Table 4, Fig. 12)."""
    return {"esc50": classification(model, "esc50", folder)}


def task_us8k(model, folder):
    """Zero-shot classification of UrbanSound8K (Table 4, Fig. 6)."""
    return {"us8k": classification(model, "us8k", folder)}


def task_audioset(model, folder):
    """AudioSet's eval set: mean average precision over its classes, each clip with several (Table 4)."""
    clips, protocol = load(model, "audioset", folder, need=("audio", "labels"))
    known = (folder / CLASS_NAMES).exists()
    labels = list(class_names(folder).values()) if known else sorted({label for clip in clips for label in clip.labels})
    strange = {label for clip in clips for label in clip.labels} - set(labels)
    if strange:
        raise ValueError(f"{folder}: a clip's label {min(strange)!r} is not in {CLASS_NAMES}")
    protocol["published"] &= len(labels) == PAPER_CLASSES["audioset"]
    audio, heard = model.audio(clips)
    clips, (audio,), protocol = kept([audio], clips, protocol, heard)
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
    return {"audioset": result}


def task_va(model, folder):
    """Retrieval between the sounds of the balanced AudioSet and their second frames (§3.2.2, Fig. 5)."""
    clips, protocol = load(model, "audioset", folder, "val", need=("audio", "frames", "labels"))
    (audio, heard), (images, seen) = model.audio(clips), model.images(clips)
    clips, (audio, images), protocol = kept([audio, images], clips, protocol, heard, seen)
    labels, values = [clip.labels for clip in clips], {}
    for way, queries, gallery in (("i2a", images, audio), ("a2i", audio, images)):
        hit, share = top1_hits(queries, gallery, labels)
        values |= {f"{way}_precision": interval(hit), f"{way}_recall": interval(share)}
    sets = Counter(frozenset(label) for label in labels)
    chance = {f"{way}_precision": 100 * sum(n * n for n in sets.values()) / len(clips) ** 2 for way in ("i2a", "a2i")}
    chance |= {f"{way}_recall": 100 / len(clips) for way in ("i2a", "a2i")}
    return {"va": {"protocol": protocol | {"label sets": len(sets)}, "chance": chance, "values": {"": values}}}


def task_oracle(model, folder):
    """OracleAV-CLIP: a clip's second frame stands in for its sound, which measures CLIP itself (Table 3)."""
    clips, protocol = load(model, "audiocaps", folder, need=("frames", "captions"))
    images, seen = model.images(clips)
    clips, (images,), protocol = kept([images], clips, protocol, seen)
    return {"oracle": retrieval(model, clips, images, protocol)}


def task_pivot(model, folder):
    """Pivotability: how far images lead from a sound to its captions, and for which categories (App. F)."""
    clips, protocol = load(model, "audiocaps", folder, need=("audio", "frames", "captions"))
    audioset = folder.parent / "audioset"
    if not any(clip.labels for clip in clips) and (audioset / CLASS_NAMES).exists():
        clips = add_labels(clips, audioset)
    (audio, heard), (images, seen) = model.audio(clips), model.images(clips)
    clips, (audio, images), protocol = kept([audio, images], clips, protocol, heard, seen)
    count = captions_per_clip(clips)
    captions = model.texts([caption for clip in clips for caption in clip.captions])
    shares = {k: pivotability(audio, images, captions, k, count) for k in (1, 2, 3, 5, 10, 20)}
    pivotable = shares[5] >= 0.6 - 1e-6                                               # (N,)
    values = {f"pivot_{k}": interval(share) for k, share in shares.items()} | {"pivotable": interval(pivotable.float())}
    categories = Counter(label for clip, use in zip(clips, pivotable.tolist()) if use for label in clip.labels)
    return {"pivot": {"protocol": protocol | {"captions a clip": count}, "chance": {}, "values": {"": values},
                      "categories": dict(categories.most_common())}}


def task_toy(model, folder):
    """The toy world in short: retrieval with the sounds, with the frames (CLIP itself), and labels."""
    return {"audio-text": task_audiocaps(model, folder)["audiocaps"],
            "image-text (CLIP itself)": task_oracle(model, folder)["oracle"],
            "zero-shot labels": task_esc50(model, folder)["esc50"]}


TASKS = {"audiocaps": (task_audiocaps, "audiocaps"), "clotho": (task_clotho, "clotho"), "esc50": (task_esc50, "esc50"),
         "us8k": (task_us8k, "us8k"), "audioset": (task_audioset, "audioset"), "va": (task_va, "audioset"),
         "oracle": (task_oracle, "audiocaps"), "pivot": (task_pivot, "audiocaps")}  # name -> function, dataset


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
PAPER_CLASSES = {"esc50": 50, "us8k": 10, "audioset": 527}
PAPER_CLIPS = {"audiocaps": 860, "oracle": 860, "clotho": 1045, "esc50": 2000, "us8k": 8732, "audioset": 16_416}
ORACLE = (4.8, 27.8, 6.6, 31.2)  # OracleAV-CLIP on AudioCaps
RETRIEVED = ("t2a_r1", "t2a_r10", "a2t_r1", "a2t_r10")


def paper_of(row, part):
    """What the paper reports for a row of its tables and a part of our results -> {variant: {metric: %}} or {}."""
    if part == "oracle":
        return {"no prompt": dict(zip(RETRIEVED, ORACLE))}
    if part in ("audiocaps", "clotho 18 s", "clotho 10 s"):
        table = ("audiocaps", "clotho 18 s", "clotho 10 s").index(part)
        return {"no prompt": dict(zip(RETRIEVED, PAPER_RETRIEVAL[row][table]))}
    if part in ("esc50", "us8k", "audioset"):
        metric, table = "map" if part == "audioset" else "accuracy", ("esc50", "us8k", "audioset").index(part)
        return {variant: {metric: value} for variant, value in zip(PROMPTS, PAPER_CLASSIFICATION[row][table])}
    return {}


NAMES = {"accuracy": "accuracy", "map": "mAP", "pivotable": "pivotable: 3 of 5 at k = 5",
         **{f"pivot_{k}": f"pivotability, k = {k}" for k in (1, 2, 3, 5, 10, 20)},
         **{f"{way}_{key}": f"{words} {name}" for way, words in
            (("a2t", "audio -> text"), ("t2a", "text -> audio"), ("i2a", "image -> audio"), ("a2i", "audio -> image"))
            for key, name in (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("median", "median rank"),
                              ("precision", "precision@1"), ("recall", "recall@1"))}}
HEADLINES = (*RETRIEVED, "accuracy", "map", "i2a_precision", "a2i_precision", "pivot_5", "pivotable")


def name_of(part, metric):
    """A metric's name on the screen; in some parts frames stand for sounds."""
    return NAMES[metric].replace("audio", "frame") if part in ("oracle", "image-text (CLIP itself)") else NAMES[metric]


def cell(value):
    """A number with its interval, or without one."""
    return f"{value[0]:.1f} [{value[1]:.1f}, {value[2]:.1f}]" if isinstance(value, list) else f"{value:.1f}"


def table(header, rows):
    """Print rows of str under a header, columns aligned."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print(("  " + row[0].ljust(widths[0])
               + "".join("   " + text.rjust(width) for text, width in zip(row[1:], widths[1:]))).rstrip())


def show(results, row):
    """Print a checkpoint's results, a table a part, beside the paper's row where the dataset is the paper's."""
    for part, result in results.items():
        protocol = result["protocol"]
        read = f"{protocol['N']} of {protocol['listed']} clips of {protocol['data']}"
        notes = [f"{read} ({len(protocol['missing'])} missing, {protocol['unreadable']} unreadable)"]
        notes += [f"the first {protocol['seconds']:g} s of each"] if "seconds" in protocol else []
        notes += [f"{value} {key}" for key, value in protocol.items() if value != 1 and
                  key in ("captions a clip", "classes", "classes without a clip", "label sets", "folds")]
        print(f"\n{part}: {', '.join(notes)}")
        paper = paper_of(row, part) if protocol["published"] else {}
        variants, header = list(result["values"]), ["%, 95 % interval"]
        for variant in variants:
            header += [f'"{PROMPT} …"' if variant == "prompt" else variant, *(["paper"] if paper.get(variant) else [])]
        rows = []
        for metric in result["values"][variants[0]]:
            line = [name_of(part, metric)]
            for variant in variants:
                line.append(cell(result["values"][variant][metric]))
                if paper.get(variant):
                    line.append(f"{paper[variant][metric]:.1f}" if metric in paper[variant] else "")
            rows.append([*line, f"{result['chance'][metric]:.1f}" if metric in result["chance"] else ""])
        table([*header, "chance" if result["chance"] else ""], rows)
        for variant, folds in result.get("by fold", {}).items():
            print(f"  by fold, {variant}: {' '.join(f'{fold:.1f}' for fold in folds)}; "
                  f"{np.mean(folds):.1f} ± {np.std(folds, ddof=1):.1f}")
        if paper:
            print(f"  paper: {'OracleAV-CLIP' if part == 'oracle' else row}, on {PAPER_CLIPS[part.split()[0]]} clips")
        if "categories" in result:
            print("  pivotable: " + (", ".join(f"{name} {count}" for name, count in
                                               list(result["categories"].items())[:20]) or "no clip with a label"))


def compare(runs):
    """Print the main numbers of several checkpoints, and the paper's, side by side. runs: [(name, row, results)]."""
    parts = {part: result for *_, results in runs for part, result in results.items()}
    papers = list(dict.fromkeys(row for _, row, _ in runs)) if any(
        result["protocol"]["published"] for result in parts.values()) else []
    rows = []
    for part, result in parts.items():
        for variant, metric in ((v, m) for m in HEADLINES for v in result["values"] if m in result["values"][v]):
            numbers = [paper_of(row, part).get(variant, {}).get(metric) if result["protocol"]["published"] else None
                       for row in papers]
            rows.append([f"{part}, {name_of(part, metric)}{f', {variant}' if variant else ''}",
                         *("-" if number is None else f"{number:.1f}" for number in numbers),
                         *(cell(results[part]["values"][variant][metric]) if part in results else "-"
                           for *_, results in runs)])
    print()
    table(["%", *(f"paper: {row}" for row in papers), *(name for name, *_ in runs)], rows)
    found = [set(results.get("pivot", {}).get("categories", {})) for *_, results in runs]
    for (name, *_), categories in list(zip(runs, found))[1:]:
        if categories - found[0]:  # Table 9
            print(f"  pivotable with {name}, not with {runs[0][0]}: {', '.join(sorted(categories - found[0]))}")


def blank_figure(width, height):
    """A matplotlib figure, in inches; imported here, for it takes half a second that most commands need not wait."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def by_class(runs, place, chart_only):
    """Per-class numbers (with the prompt) as a table, and as a bar chart <place><part>_classes.png (Fig. 6, 12)."""
    for part in {part: None for *_, results in runs for part, result in results.items() if "by class" in result}:
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
        axes = figure.subplots()
        for i, (name, score) in enumerate(scores.items()):
            axes.bar(np.arange(len(few)) + 0.8 * i / len(scores), [score.get(label, 0) for label in few],
                     0.8 / len(scores), label=name, align="edge")
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


def scaling(measured, metric, target, out):
    """Metric against the number of gold pairs, a straight line over log2(pairs), and where it meets a target (Fig. 7).

    measured: {pairs: %}. Draws `out` and returns what it prints.
    """
    pairs = sorted(measured)
    if len(pairs) < 3:
        raise ValueError(f"a line needs checkpoints of at least 3 numbers of pairs, these have {pairs}")
    x, y = [math.log2(count) for count in pairs], [measured[count] for count in pairs]
    slope, intercept, at, (low, high) = line_fit(x, y, target)
    table(["pairs", metric], [[str(count), f"{measured[count]:.1f}"] for count in pairs])
    print(f"  {metric} = {intercept:.1f} + {slope:.2f} · log2(pairs); it reaches {target:g} % at 2^{at:.1f} pairs, "
          f"95 % interval 2^{low:.1f} to 2^{high:.1f}, if it stays a line (paper, ESC-50: 81 % at 2^21)")
    figure = blank_figure(5, 4)
    axes = figure.subplots()
    ends = np.array([min(x), min(max(at, max(x)), max(x) + 12)])
    axes.plot(2 ** ends, intercept + slope * ends, "--", color="grey")
    axes.plot(pairs, y, "o")
    axes.axhline(target, color="grey", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="gold pairs", ylabel=f"{metric} (%)")
    figure.savefig(out, dpi=150)
    print(f"  drawn in {out}")
    return {"pairs": pairs, "values": y, "slope": slope, "intercept": intercept, "log2 pairs at target": at,
            "interval": [low, high if math.isfinite(high) else None], "target": target}


def task_scaling(models, folder, paths, target, out):
    """Zero-shot accuracy, with the prompt, of checkpoints fine-tuned on different numbers of gold pairs (Fig. 7)."""
    measured = {}
    for model, path in zip(models, paths):
        checkpoint = load_checkpoint(path, ["finetune"])
        if checkpoint["settings"]["source"] != "gc":
            raise ValueError(f"{path}: was fine-tuned on {checkpoint['settings']['source']}; needed: gold pairs (gc)")
        pairs = checkpoint["settings"]["pairs"] or checkpoint["samples"]
        accuracy = classification(model, "esc50", folder)["values"]["prompt"]["accuracy"][0]
        measured.setdefault(pairs, []).append(accuracy)  # several seeds are averaged
    return scaling({pairs: float(np.mean(values)) for pairs, values in measured.items()}, "zero-shot accuracy", target,
                   out / "scaling.png")


def epochs_of(log):
    """A run's validations -> name of the metric, [(epoch, %), …]; damaged lines are left out. Raises ValueError."""
    name, measured = "", []
    for line in log.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            name = next((key for key in row if key.endswith("@1")), name)
            measured += [(float(row["epoch"]), float(row[name]))] if name in row else []
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    if not measured:
        raise ValueError(f"{log}: no validation in it")
    return name, measured


def curve(paths, out):
    """Image-audio retrieval by epoch, from the logs beside the checkpoints (Fig. 5)."""
    figure = blank_figure(5, 4)
    axes = figure.subplots()
    for path in paths:
        log = path.with_name("log.jsonl")
        if not log.exists():
            raise FileNotFoundError(f"{log}: no log beside the checkpoint; pretrain.py and finetune.py leave one")
        name, measured = epochs_of(log)
        axes.plot(*zip(*measured), marker="o", label=path.parent.name)
        print(f"{path.parent.name}: {name} by epoch: {' '.join(f'{value:.1f}' for _, value in measured)}")
    axes.set(xlabel="epoch", ylabel=f"{name} (%)")
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=150)
    print(f"drawn in {out}")


# ---------------------------------------------------------------------------- a user's own sounds

def windows(path, seconds):
    """Starts in seconds of windows that cover a recording, each half over the one before; the last ends where it ends.

    Raises Unreadable.
    """
    try:
        length = soundfile.info(path).duration
    except (OSError, RuntimeError, TypeError) as error:
        raise Unreadable(f"{path}: can't be read as audio ({error})") from None
    if not 0 < length < 1e6:  # a week and a half; streamed files may not know their length
        raise Unreadable(f"{path}: says it lasts {length:g} s; was it cut off? Copying it with an audio tool may help")
    last = max(0.0, length - seconds)
    return [*np.arange(0, last, seconds / 2).tolist(), last]


def remembered(place, dimensions):
    """What `hear` has kept of a recording (W, 1 + D), None where there is nothing, or it is damaged."""
    content = open_array(place)
    fits = content is not None and content.dtype == np.float32 and content.ndim == 2
    if not fits or content.shape[1] != 1 + dimensions or not np.isfinite(content).all():
        return None
    lengths = np.linalg.norm(content[:, 1:], axis=1)
    return torch.from_numpy(content.copy()) if (abs(lengths - 1) < 1e-3).all() else None


def save_array(path, array):
    """np.save under just this name."""
    with open(path, "wb") as file:
        np.save(file, array)


def hear(model, paths, cache):
    """Recordings of any length -> [(path, starts of windows (W,), unit embeddings (W, D))], unreadable ones left out.

    Embeddings are kept in the folder `cache`, a file a recording, by its path, size and time and by the model.
    """
    places = {}
    cache.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            say(f"skipped: {path}: {error.strerror}", file=sys.stderr)
            continue
        made_of = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, model.identity["weights"], model.front_end)
        places[path] = cache / (hashlib.sha256(repr(made_of).encode()).hexdigest()[:32] + ".npy")
    known = {path: remembered(place, model.dimensions) for path, place in places.items()}
    todo, batch = [path for path in places if known[path] is None], []
    lock = Claim(cache / "lock", wait=True) if todo and ranks()[0] == 0 else None
    for path in todo:
        try:
            batch += [(path, start) for start in windows(path, model.front_end.seconds)]
        except Unreadable as error:
            say(f"skipped: {error}", file=sys.stderr)
        if batch and (len(batch) >= 1024 or path == todo[-1]):
            embedded, ok = model.sounds(batch, model.front_end.load_window)
            for name in dict.fromkeys(name for name, _ in batch):
                own = [i for i, (other, _) in enumerate(batch) if other == name]
                rows = [i for i in own if ok[i]]
                starts = torch.tensor([batch[i][1] for i in rows]).view(-1, 1)
                known[name] = torch.cat([starts, embedded[rows]], 1).float()          # (W, 1 + D)
                if len(rows) == len(own) and ranks()[0] == 0:  # what could not be read is tried again next time
                    write_whole(places[name], lambda part, name=name: save_array(part, known[name].numpy()))
            batch, model.known = [], {}
    if lock:
        lock.close()
    heard = [(path, content[:, 0].tolist(), content[:, 1:]) for path, content in known.items()
             if content is not None and len(content)]
    if not heard:
        raise ValueError(f"nothing to listen to: not one of {len(paths)} files could be read")
    return heard


def say(*words, file=None):
    """Print on one rank; a file name that is no text is shown with escapes."""
    if ranks()[0] == 0:
        print(*(word.encode(errors="backslashreplace").decode() for word in words), file=file)


def stretch(start, seconds):
    """0:10.0-0:20.0"""
    return "-".join(f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
                    for tenths in (round(10 * start), round(10 * (start + seconds))))


def tag(model, paths, labels, cache):
    """Print how likely each label is for each window of each recording, given that one of them fits (Eq. 5)."""
    texts = model.texts(labels, PROMPT)                                               # (K, D)
    for path, starts, audio in hear(model, paths, cache):
        chances = (math.exp(model.log_scale) * audio @ texts.T).softmax(1)            # (W, K)
        say(f"\n{path}")
        for start, chance in zip(starts, chances):
            best = chance.argsort(descending=True)[:5].tolist()
            say(f"  {stretch(start, model.front_end.seconds)}   "
                + ", ".join(f"{labels[k]} {100 * chance[k]:.0f} %" for k in best))


def search(model, paths, queries, cache, top=10):
    """Print the stretches of the recordings that fit each query best. Returns [[(cosine, path, start), …], …]."""
    heard, answers = hear(model, paths, cache), []
    audio = torch.cat([embeddings for *_, embeddings in heard])                       # (W, D)
    place = [(path, start) for path, starts, _ in heard for start in starts]
    for query, cosines in zip(queries, model.texts(queries) @ audio.T):               # (W,)
        found = []
        for i in cosines.argsort(descending=True).tolist():
            path, start = place[i]
            if all(path != other or abs(start - at) >= model.front_end.seconds for _, other, at in found):
                found.append((cosines[i].item(), path, start))
            if len(found) == top:
                break
        say(f"\n{query}")
        for cosine, path, start in found:
            say(f"  {cosine:.3f}   {stretch(start, model.front_end.seconds)}   {path}")
        answers.append(found)
    return answers


# ----------------------------------------------------------------------------------- the command

def recordings(places):
    """Files, and the audio files below folders. Raises FileNotFoundError, ValueError (none)."""
    gone = [place for place in places if not os.path.exists(place)]
    if gone:
        raise FileNotFoundError(f"{gone[0]}: no such file or folder")
    paths = [path for place in places for path in (find_files(place, AUDIO) if os.path.isdir(place) else [place])]
    if not paths:
        raise ValueError(f"{', '.join(places)}: no audio file in it; looked for {', '.join(AUDIO)}")
    return list({os.path.realpath(path): path for path in paths}.values())  # each once


def measure(model, tasks, data, save):
    """Run tasks on their datasets, or on the folder `data` -> results, what could not run {task: reason}.

    save(results, reasons) is called after each. Raises what a single task raises, ValueError where none could run.
    """
    results, reasons = {}, {}
    for name in tasks:
        function, dataset = TASKS.get(name, (task_toy, "toy"))
        try:
            results |= function(model, dataset_folder(data or dataset))
        except (OSError, ValueError) as error:
            if len(tasks) == 1:
                raise
            reasons[name] = str(error)
        if results:
            save(results, reasons)
    if not results:
        raise ValueError("no task could run here. " + " ".join(f"{name}: {why}." for name, why in reasons.items()))
    return results, reasons


def save_json(path, content):
    """Write JSON, whole or not at all."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=[*TASKS, "toy", "all", "scaling", "curve", "tag", "search"])
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
    own_sounds = args.task in ("tag", "search")
    if own_sounds and not (args.audio and (labels if args.task == "tag" else args.query)):
        parser.error(f"--task {args.task} needs --audio and {'--labels' if args.task == 'tag' else '--query'}")
    if args.compare and (args.checkpoint or own_sounds):
        parser.error("--compare goes with neither --checkpoint nor tag nor search")
    if args.top < 1:
        parser.error("--top: at least 1")
    device = start_ranks()
    toy = args.task == "toy" or Path(args.data or "").name == "toy"
    paths = [Path(path) for path in
             args.compare or [args.checkpoint or f"out/{'toy' if toy else 'audioset'}/pretrain/checkpoint.pt"]]
    out = Path(args.out) if args.out else paths[0].parent
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    if own_sounds:
        files, model = recordings(args.audio), Model(paths[0], args.clip, args.vocab, device, args.workers)
        if args.task == "tag":
            tag(model, files, labels, out / "heard")
        else:
            search(model, files, args.query, out / "heard", args.top)
        return
    if args.task == "curve":
        curve(paths, out / "curve.png")
        return
    tasks, runs = list(TASKS) if args.task == "all" else [args.task], []
    if args.task != "all":
        place = {"toy": "toy", "scaling": "esc50"}.get(args.task) or TASKS[args.task][1]
        folder = dataset_folder(args.data or place)  # before the checkpoint is asked for
    models = [Model(path, args.clip, args.vocab, device, args.workers) for path in paths]  # what is broken shows now
    if args.task == "scaling":
        result = task_scaling(models, folder, paths, args.target, out)
        if ranks()[0] == 0:
            save_json(out / "scaling.json", result | {"checkpoints": [model.identity for model in models]})
        return
    missing = set()
    for path, model in zip(paths, models):
        row = args.row or model.identity["row"]
        name, stem = (path.parent.name, "") if path.name == "checkpoint.pt" else (path.stem, f"{path.stem}.")
        name = str(path) if name in [other for other, *_ in runs] else name
        saved = (out if args.out else path.parent) / f"{f'{name}.' if args.out and not stem else stem}{args.task}.json"

        lock = Claim(f"{saved}.lock") if ranks()[0] == 0 else None

        def save(results, reasons, model=model, saved=saved):
            if ranks()[0] == 0:
                save_json(saved, {"task": args.task, "model": model.identity, "versions": versions(),
                                  "results": results, "not measured": reasons})

        try:
            results, reasons = measure(model, tasks, args.data, save)
        except NothingThere as error:
            list_missing(args.list_missing, error.missing)
            raise
        missing |= {clip for result in results.values() for clip in result["protocol"]["missing"]}
        list_missing(args.list_missing, missing)
        runs.append((name, row, results))
        if ranks()[0] == 0:
            print(f"\n{path}: {model.identity['stage']}, step {model.identity['step']} of {model.identity['steps']}")
            show(results, row)
            for task, reason in reasons.items():
                print(f"\n{task}: not measured. {reason}")
            lock.close()
            print(f"\nsaved in {saved}")
    if ranks()[0] == 0:
        if args.task != "toy":
            stem = "" if paths[0].name == "checkpoint.pt" else f"{paths[0].stem}."
            by_class(runs, f"{out}/{stem}", chart_only=args.task == "all")
        if len(runs) > 1 or args.task == "all":
            compare(runs)


def list_missing(path, clips):
    """Write ids of missing clips to a file, a line each."""
    if path and ranks()[0] == 0:
        Path(path).write_text("".join(f"{clip}\n" for clip in sorted(clips)))
        print(f"{len(clips)} missing clips listed in {path}")


if __name__ == "__main__":
    run(main)
