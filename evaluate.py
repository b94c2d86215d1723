"""What a checkpoint has learned, measured with text alone; and its use: tag, search (§4, App. D-G).

    python evaluate.py --task esc50                        # one task; all: whatever is on disk
    python evaluate.py --task all --data toy               # every task on the toy world
    python evaluate.py --task clotho --checkpoint A.pt B.pt            # side by side
    python evaluate.py --task scaling --checkpoint GC-442.pt GC-4k.pt GC.pt             # Fig. 7
    python evaluate.py --task curve --checkpoint out/*/pretrain*/checkpoint.pt          # Fig. 5
    python evaluate.py --task tag --audio street.wav --labels "Male speech, man speaking" rain
    python evaluate.py --task search --audio RECORDINGS --query "glass breaking" --top 10

N clips, M captions, K classes, W windows, D embedding; a2t audio to text, i2a image to audio
"""
import copy
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from clip_load import Tokenizer, digest, lengthen, make_clip, short_digest
from data import (FrontEnd, Parser, Unreadable, captions_of, class_names, dataset_folder,
                  find_files, load_image, read_published, read_split, read_text, reading,
                  resample, run, sound_blocks, table_of, write_whole)
from model import VisionTransformer, join_ranks, print0, rank_and_size, unit
from pretrain import AudioLearner, Training, embed_all, load_checkpoint, top1_hits

import numpy as np
import torch
from tqdm import tqdm

PROMPT = "the sound of"  # §4.1, "Prompting (usually) helps"
PROMPTS = {"prompt": PROMPT, "no prompt": ""}

# ------------------------------------------------------------------------------------ metrics
def percent(values):
    """Mean of a number per clip (N,), in %."""
    return 100 * values.mean().item()


def interval(values):
    """The same -> [mean, low, high]; 95 % of 1000 means of N clips drawn from the N lie between."""
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (1000, len(values)), generator=seeded)
    means = 100 * values[drawn].mean(1)                                          # (1000,)
    return [percent(values), *means.quantile(torch.tensor([0.025, 0.975])).tolist()]


def retrieval_metrics(audio, captions, captions_per_clip=5, mean=percent, gallery=None):
    """Both ways' recall at 1, 5, 10 and median rank (from 1), by `mean`: `percent` or `interval`.

    audio (N, D), captions (5N, D); gallery (N,): sounds meet only what has the same number.
    """
    similarity = unit(audio) @ unit(captions).T                                  # (N, 5N)
    if gallery is not None:
        of_caption = gallery.repeat_interleave(captions_per_clip)                # (5N,)
        similarity[gallery[:, None] != of_caption] = -torch.inf
    own = similarity.unflatten(1, (-1, captions_per_clip)).diagonal().T          # (N, 5)
    best = own.amax(1, keepdim=True)                                             # (N, 1)
    # differs from the paper, which does not say: a tie is lost (so is NaN), or equal features score
    a2t = (~(similarity < best)).sum(1) - (~(own < best)).sum(1)                 # (N,)
    t2a = (~(similarity < own.flatten())).sum(0) - 1                             # (5N,)
    result = {}
    for way, rank in (("a2t", a2t[:, None]), ("t2a", t2a.view_as(own))):
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = mean((rank < k).float().mean(1))
        result[f"{way}_median"] = 1 + rank.float().quantile(0.5).item()
    return result


def average_precision(scores, target):
    """Mean precision down to each positive: scores, bool target (N, K) -> (K,), NaN without any."""
    means = []
    for score, positive in zip(scores.T, target.T):                              # (N,), (N,)
        own = score[positive]                                                    # (P,)
        above = (score >= own[:, None]).sum(1)  # clips down to each; equal ones rank together
        found = (own >= own[:, None]).sum(1)  # positives among them
        means.append((found / above).mean())
    return torch.stack(means)


def pivotability(audio, images, captions, k):
    """Share of its captions (5N, D) that a sound's k nearest images lead to, 5 each (App. F)."""
    near = (audio @ images.T).topk(min(k, len(images))).indices                  # (N, k)
    leads_to = (images @ captions.T).topk(min(5, len(captions))).indices         # (N, 5)
    found = torch.zeros(len(audio), len(captions))
    found.scatter_(1, leads_to[near].flatten(1), 1.0)                            # (N, 5N)
    return found.unflatten(1, (len(audio), -1)).diagonal().mean(0)               # (N,)


# --------------------------------------------------------------------- a checkpoint as a model
class Model:
    """A checkpoint: what hears (encoder, front end, temperature), and the CLIP that it chased."""

    def __init__(self, path, device):
        checkpoint = load_checkpoint(path, ["pretrain", "finetune"])
        self.name = str(path).removesuffix("/checkpoint.pt")
        with reading(path, "checkpoint of this version"):
            encoder = VisionTransformer(**checkpoint["encoder"])
            self.learner = AudioLearner(encoder, FrontEnd(**checkpoint["front_end"])).to(device)
            self.learner.load_state_dict(checkpoint["learner"])
            self.learner.eval()
            self.clip = make_clip(checkpoint["clip"]["state"], device)
            self.tokenizer = Tokenizer(checkpoint["clip"]["merges"], self.clip.context_length)
        self.scale = self.learner.log_scale.exp().item()  # 1/temperature
        settings = checkpoint["settings"]
        start = "VA-Rand" if settings.get("init") == "random" else "vip-AnT"
        self.row = settings.get("source", "").upper() or start  # of the paper's tables
        self.pairs = settings.get("pairs")  # that fine-tuning had
        self.missing = set()  # clips that tasks do not find on disk

    def embed(self, clips, kind):
        """Unit embeddings of clips' "audio" or "frames" -> (N, D); zeros for what can't be read."""
        if kind == "audio":
            return self.learner.embed([clip.audio for clip in clips], Training.workers)
        return embed_all([clip.middle_frame for clip in clips],
                         partial(load_image, size=self.clip.image_size), self.clip.encode_image,
                         self.clip.visual, Training.workers)

    def embed_texts(self, texts, prompt=""):
        """Unit embeddings of texts, each after the prompt -> (M, D); underscores become spaces."""
        tokens = self.tokenizer([f"{prompt} {text}".replace("_", " ") for text in texts])
        parts = [self.clip.encode_text(part) for part in tokens.split(256)]
        return unit(torch.cat(parts)).cpu()


# -------------------------------------------------------------------------------------- tasks
# Each leaves a result: what was measured, "chance" {metric: %}, "values" {variant: {metric: [value,
# low, high] in %, or one number without an interval}}.
CLASSES = {"esc50": 50, "us8k": 10, "audioset": 527}  # of the sets that the paper is about


def prepare(model, name, folder, kinds, need=(), split="test"):
    """What a task needs -> clips, what is to be said of them, embeddings (N, D) of each kind."""
    listed, table = read_split(name, folder, split, need), table_of(name, folder, split)
    clips = [clip for clip in listed if ("audio" not in kinds or os.path.isfile(clip.audio))
             and ("frames" not in kinds or clip.frames)]
    gone = {clip.id for clip in set(listed) - set(clips)}
    if table.exists() and name in ("audioset", "audiocaps", "vggsound"):
        indexed = {clip.id[:11] for clip in listed}  # YouTube's ids of what was found
        gone |= {row.id for row in read_published(table)
                 if row.video not in indexed and row.split in ("", split)}
    model.missing |= gone
    counts = {len(clip.captions): clip.id for clip in clips}
    if "captions" in need and len(counts) > 1:
        raise ValueError(f"{folder}: clips differ in the number of their captions: {counts}")
    features = [model.embed(clips, kind) for kind in kinds]
    good = torch.stack([rows.any(1) for rows in features]).all(0)                # (N,)
    clips = [clip for clip, readable in zip(clips, good) if readable]
    about = {"data": str(folder), "clips": len(clips), "listed": len(good) + len(gone),
             "missing": sorted(gone), "unreadable": len(good) - len(clips),
             "looked_for": listed[0].audio or listed[0].id, "labels": labels_of(listed, folder),
             "published": table.exists(), "chance": {}}
    if not clips:
        raise ValueError("{data}: no {0} of {listed} clips to read; looked for {looked_for} …"
                         .format(" and ".join(kinds), **about))
    return clips, about, *(rows[good] for rows in features)


def labels_of(clips, folder):
    """AudioSet's classes in order, where `folder` holds them; then clips' other labels, sorted."""
    known = list(class_names(folder).values())
    used = set().union(*(clip.labels for clip in clips))
    return known + sorted(used - set(known))


class Labels:
    """A bank of labels: clip i's row is 1 for each of its classes, else 0, (K,)."""

    def __init__(self, clips, classes):
        self.rows = torch.zeros(len(clips), len(classes), dtype=torch.bool)      # (N, K)
        for row, clip in zip(self.rows, clips):
            row[[classes.index(label) for label in clip.labels]] = True

    def draw(self, i, rng):
        return self.rows[i].float()


def retrieval(model, name, folder, by="audio"):
    """Sounds, or by="frames" second frames (OracleAV-CLIP), and captions (Tables 3, 8)."""
    clips, about, features = prepare(model, name, folder, (by,), ("captions",))
    captions = captions_of(clips)
    gallery = torch.tensor([clip.fold for clip in clips])  # the toy's test set has several
    count, values = len(clips[0].captions), {}
    for variant, prompt in PROMPTS.items():
        texts = model.embed_texts(captions, prompt)                              # (5N, D)
        values[variant] = retrieval_metrics(features, texts, count, interval, gallery)
    chance = 100 * len(gallery.unique()) / len(clips)  # the same both ways
    about["chance"] = {"a2t_r1": chance, "t2a_r1": chance}
    return about | {"values": values}


def zero_shot(model, name, folder):
    """Labels by cosine alone (Eq. 5; Table 4, Fig. 6, 12): accuracy, for AudioSet mAP; by class."""
    clips, about, audio = prepare(model, name, folder, ("audio",), ("labels",))
    labels = about["labels"]
    about["published"] &= CLASSES.get(name) == len(labels)
    target = Labels(clips, labels).rows                                          # (N, K)
    fold = torch.tensor([clip.fold for clip in clips])                           # (N,)
    values, by_class = {}, {}
    for variant, prompt in PROMPTS.items():
        scores = audio @ model.embed_texts(labels, prompt).T                     # (N, K)
        if name == "audioset":
            of_class = average_precision(scores, target)                         # (K,)
            values[variant] = {"map": 100 * of_class.nanmean().item()}
        else:
            hit = target.gather(1, scores.argmax(1, keepdim=True)).float()       # (N, 1)
            of_class = (hit * target).sum(0) / target.sum(0)                     # (K,)
            values[variant] = {"accuracy": interval(hit[:, 0])}
            if len(fold.unique()) > 1:
                of_fold = [percent(hit[fold == f]) for f in fold.unique()]
                values[variant] |= {"mean_of_folds": np.mean(of_fold),
                                    "std_of_folds": np.std(of_fold, ddof=1)}
        tested = target.any(0).nonzero().flatten()
        by_class[variant] = {labels[k]: 100 * of_class[k].item() for k in tested}
    about["chance"]["accuracy"] = 100 / len(labels)
    return about | {"values": values, "by class": by_class}


def image_audio(model, name, folder):
    """AudioSet's balanced set: second frames and sounds find each other (§3.2.2, Fig. 5)."""
    clips, about, audio, images = prepare(model, name, folder, ("audio", "frames"), split="val")
    values = {}
    for way, asks, answers in (("i2a", images, audio), ("a2i", audio, images)):
        hit, share = top1_hits(asks, answers, clips)
        values |= {f"{way}_precision": interval(hit), f"{way}_recall": interval(share)}
    return about | {"values": {"": values}}


def pivots(model, name, folder):
    """How far images lead from sounds to their captions (App. F, Fig. 10)."""
    clips, about, *features = prepare(model, name, folder, ("audio", "frames"), ("captions",))
    texts, values = model.embed_texts(captions_of(clips)), {}
    for k in (1, 5, 20):
        share = pivotability(*features, texts, k)                                # (N,)
        values[f"pivotability_{k}"] = interval(share)
        values[f"pivotable_{k}"] = interval((share > 0.599).float())  # three captions of five
    return about | {"values": {"": values}}


TASKS = {"audiocaps": retrieval, "clotho": retrieval, "esc50": zero_shot, "us8k": zero_shot,
         "vggsound": zero_shot, "audioset": zero_shot, "va": image_audio, "pivot": pivots,
         "oracle": partial(retrieval, by="frames")}
DATASETS = {"va": "audioset", "pivot": "audiocaps", "oracle": "audiocaps"}
TOY_PARTS = {"frame-text": "oracle", "audio-text": "audiocaps", "labels": "esc50"}


def measure(model, task, folder):
    """A task on the dataset in a folder -> {part: result}."""
    if task == "toy":
        return {part: measure(model, name, folder)[name] for part, name in TOY_PARTS.items()}
    if task == "clotho":  # on 10 s, and on 18 s with positions resized once more (App. D)
        learner = model.learner
        front_end = replace(learner.front_end, frames=round(1.8 * learner.front_end.frames))
        longer = copy.copy(model)
        longer.learner = AudioLearner(lengthen(learner.audio_encoder, front_end.frames), front_end)
        return {f"clotho {each.learner.front_end.frames / 100:g} s": retrieval(each, task, folder)
                for each in (model, longer)}
    return {task: TASKS[task](model, DATASETS.get(task, task), folder)}


# ------------------------------------------------------------------------------------- tables
# What the paper reports: {row: {part: {variant: {metric: %}}}}, "pairs", "heads" (Tables 2-4, 7, 8)
PAPER = json.loads(read_text(Path(__file__).parent / "assets/paper.json"))


def cell(number):
    """A number as tables show it, with its interval if it has one."""
    if isinstance(number, list):
        return "{:.1f} [{:.1f}, {:.1f}]".format(*number)
    return "" if number is None else f"{number:.1f}"


def show(part, runs):
    """Print a part's table: columns for checkpoints, for what the paper reports, for chance."""
    columns, result = {}, runs[0]["results"][part]
    for one in runs:
        columns[one["checkpoint"]] = one["results"][part]["values"]
        if result["published"]:
            row = "OracleAV-CLIP" if part == "oracle" else one["row"]
            columns[f"paper: {row}"] = PAPER[row].get(part, {})
    columns["chance"] = dict.fromkeys(result["values"], result["chance"])
    print0("\n{}: {clips} of {listed} clips in {data} (looked for {looked_for} …), {unreadable} "
           "unreadable".format(part, **result))
    line = "  " + " {:23}" * (1 + len(columns))
    print0(line.format("%", *columns))
    for variant, values in result["values"].items():
        for metric in values:
            numbers = [column.get(variant, {}).get(metric) for column in columns.values()]
            print0(line.format(f"{metric} {variant}", *map(cell, numbers)))


def tell(row, results):
    """The toy's last screen: the story in five lines."""
    frames, sounds, labels = (results[part]["values"] for part in TOY_PARTS)
    numbers = [frames["no prompt"]["a2t_r1"], sounds["no prompt"]["a2t_r1"],
               results["audio-text"]["chance"]["a2t_r1"], labels["prompt"]["accuracy"],
               labels["no prompt"]["accuracy"], results["labels"]["chance"]["accuracy"]]
    print0("CLIP itself, frame -> text R@1: {1} %\n{0}, audio -> text R@1: {2} %\nchance: {3} %\n"
           "zero-shot labels: {4} %, without the prompt {5} %, chance {6} %\n"
           "climb on: python tests/ladder.py".format(row, *map(cell, numbers)))


# ------------------------------------------------------------------------------------- charts
def save(path, write):
    """write_whole, by rank 0."""
    if rank_and_size()[0] == 0:
        write_whole(path, write)
        print(f"saved in {path}")


def draw(path, title, lines):
    """{name: {x: y}} as a PNG. matplotlib is imported here: most commands need none."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(9, 4), layout="constrained").subplots()
    for name, points in lines.items():
        axes.plot(points.keys(), points.values(), "o-", label=name)
    axes.set_title(title)
    axes.tick_params("x", rotation=90)
    axes.legend()
    save(path, axes.figure.savefig)


def draw_classes(path, part, runs):
    """By class, with the prompt; of many classes the best and the worst (Fig. 6, 12)."""
    lines, labels = {}, []
    for one in runs:
        scores = one["results"][part]["by class"]["prompt"]
        labels = labels or sorted(scores, key=scores.get, reverse=True)
        some = labels[:25] + labels[25:][-25:]
        lines[one["checkpoint"]] = {label: scores[label] for label in some}
    draw(path, f"{part} by class (%)", lines)


def scaling(models, folder, target, out):
    """Accuracy over log2(gold pairs), a line, where it meets `target` (Fig. 7: 81 % at 2^21)."""
    accuracies = {}  # by number of pairs; several seeds are averaged
    for model in models:
        accuracy = zero_shot(model, "esc50", folder)["values"]["prompt"]["accuracy"][0]
        accuracies.setdefault(model.pairs, []).append(accuracy)
    if len(accuracies) < 3 or not all(accuracies):
        raise ValueError("needed: checkpoints of finetune.py --source gc --pairs N, three N")
    pairs = sorted(accuracies)
    x, y = np.log2(pairs), [np.mean(accuracies[count]) for count in pairs]
    (slope, intercept), r2 = np.polyfit(x, y, 1), np.corrcoef(x, y)[0, 1] ** 2
    at = (target - intercept) / slope if slope > 0 else np.inf
    line = f"{intercept:.1f} + {slope:.2f} · log2(pairs), R² {r2:.2f}, {target:g} % at 2^{at:.1f}"
    print0(f"accuracy at {pairs} pairs:", *map(cell, y), f"\n{line}")
    fit = {end: slope * end + intercept for end in (*x, min(at, 30))}
    draw(out / "scaling.png", "zero-shot accuracy (%) over log2(gold pairs)",
         {"measured": dict(zip(x, y)), line: fit})


def curve(paths, out):
    """Validation by epoch, from the logs beside checkpoints (Fig. 5: image -> audio)."""
    lines = {}  # {run and metric: {epoch: %}}
    for path in paths:
        for line in path.with_name("log.jsonl").read_text().splitlines():
            row = json.loads(line)
            for metric, score in row.get("validation", {}).items():
                lines.setdefault(f"{path.parent}, {metric}", {})[row["epoch"]] = score
    for name, scores in lines.items():
        print0(f"{name}:", *map(cell, scores.values()))
    draw(out / "curve.png", "validation (%) by epoch", lines)


# ---------------------------------------------------------------------------- your own sounds
def audio_windows(path, sample_rate, seconds):
    """A recording in windows, each half over the one before: yields (start, end in s, (S,))."""
    parts, rate, silent = [np.zeros(0, np.float32)], sample_rate, True
    start, end = 0, 0  # samples: where the next window begins, where `parts` end
    for rate, block in sound_blocks(path):
        parts.append(block)
        end += len(block)
        silent = silent and not np.diff(block).any()
        size = round(seconds * rate)
        while end > start + 1.02 * size:  # what is hardly longer than a window is one
            wave = np.concatenate(parts)[start - end:]
            window = resample(path, wave[:size], rate, sample_rate)
            yield start / rate, (start + size) / rate, window
            parts = [wave]  # all of it: the last window may begin before the next one
            start += size - size // 2
    wave = np.concatenate(parts)[-size if start else 0:]  # ends where the file ends
    yield (end - len(wave)) / rate, end / rate, resample(path, wave, rate, sample_rate, silent)


@torch.no_grad()
def embed_windows(model, path):
    """A recording's windows -> (W, 2 + D): start and end in s, unit embedding, 0 where silent."""
    front_end, rows = model.learner.front_end, []
    for start, end, wave in audio_windows(path, front_end.sample_rate, front_end.frames / 100):
        padded, length = front_end.pad(wave)                                     # (S,)
        feature = unit(model.learner.encode((padded[None], torch.tensor([length]))))[0].cpu()
        rows.append(torch.cat([torch.tensor([start, end]), feature * wave.diff().any()]))
    return torch.stack(rows)


def hear(model, places, memory):
    """Files and folders -> windows, [(path, start, end, embedding (D,))]; kept in `memory`."""
    paths, heard = [], []
    for place in places:
        paths += find_files(place) if os.path.isdir(place) else [place]
    ear = digest(model.learner.audio_encoder) + str(model.learner.front_end)
    for path in tqdm(paths, "listening"):
        of_file = f"{os.path.realpath(path)} {os.path.getsize(path)} {os.path.getmtime(path)}"
        kept = memory / f"{short_digest(of_file, ear)}.npy"
        try:
            if not kept.exists():
                write_whole(kept, partial(np.save, arr=embed_windows(model, path)))
            rows = torch.tensor(np.load(kept))                                   # (W, 2 + D)
            heard += [(path, *row[:2].tolist(), row[2:]) for row in rows]
        except Unreadable as error:
            tqdm.write(f"skipped: {error}", sys.stderr)
    if not heard:
        raise ValueError(f"none of {len(paths)} recordings in {', '.join(places)} can be heard")
    return heard


def place_of(path, start, end):
    """Where a window is, as it is printed: street.wav 0:10.0-0:20.0."""
    tenths = round(10 * start), round(10 * end)
    return f"{path} " + "-".join(f"{t // 600}:{t % 600 / 10:04.1f}" for t in tenths)


def tag(model, heard, labels):
    """Print each window's five likeliest labels: a softmax at the learned temperature (Eq. 5)."""
    if len(labels) == 1:  # a file, a label a line: one label alone would always be right
        labels = [line for line in read_text(labels[0]).split("\n") if line.strip()]
    texts = model.embed_texts(labels, PROMPT)                                    # (K, D)
    for *place, feature in heard:
        shares = (model.scale * texts @ feature).softmax(0)                      # (K,)
        best = shares.argsort(descending=True)[:5]
        answer = ", ".join(f"{labels[k]} {100 * shares[k]:.0f} %" for k in best)
        print0(f"{place_of(*place)}   {answer if feature.any() else 'silent'}")


def search(model, heard, queries, top):
    """Print the `top` windows nearest to each query, no two of which overlap."""
    for query, text in zip(queries, model.embed_texts(queries)):
        print0(f"\n{query}")
        found = []
        for path, start, end, feature in sorted(heard, key=lambda window: -(window[3] @ text)):
            apart = [path != other or start > last - 0.01 or end < first + 0.01
                     for other, first, last in found]
            if feature.any() and all(apart) and len(found) < top:
                found.append((path, start, end))
                print0(f"  {feature @ text:.3f}   {place_of(path, start, end)}")


# -------------------------------------------------------------------------------- the command
def run_tasks(models, args, out):
    """Measure with each model, save (the first's results, "beside" them the others'), print."""
    runs = [{"checkpoint": model.name, "row": model.row, "results": {}} for model in models]
    parts, errors = {}, []  # names of all results, in order
    for task in TASKS if args.task == "all" else [args.task]:
        try:
            folder = args.data or dataset_folder(DATASETS.get(task, task))
            for model, one in zip(models, runs):
                one["results"] |= measure(model, task, folder)
                parts |= one["results"]
        except (OSError, ValueError) as error:
            errors.append(f"{task}: not measured. {error}")
    if args.list_missing:
        missing = "\n".join([*sorted(models[0].missing), ""])
        save(args.list_missing, lambda part: part.write_text(missing))
    if not parts:
        raise ValueError("\n".join(errors))
    print0("\n".join(errors))
    text = json.dumps(runs[0] | {"beside": runs[1:]}, indent=1)
    save(out / f"{args.task}.json", lambda part: part.write_text(text))
    if args.task == "toy":
        for one in runs:
            tell(one["row"], one["results"])
        return
    for part in parts:
        with_part = [one for one in runs if part in one["results"]]
        show(part, with_part)
        if "by class" in with_part[0]["results"][part]:
            draw_classes(out / f"{part}_classes.png", part, with_part)


def main():
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--task", required=True, choices=[*TASKS, *"toy all scaling curve tag search".split()])
    flag("--checkpoint", nargs="+", type=Path, help="one, or several side by side")
    flag("--data", type=dataset_folder, help="a dataset's name or its folder (data/<the task's>)")
    flag("--out", help="where results, charts and what was heard go (beside the checkpoint)")
    flag("--list-missing", metavar="FILE", help="for the names of clips that are not on disk")
    flag("--target", type=float, default=81, help="scaling: accuracy to reach (81 %%, people)")
    flag("--audio", nargs="+", help="tag, search: recordings, or folders of them")
    flag("--labels", nargs="+", help="tag: the choice, or a file with a label a line")
    flag("--query", nargs="+", help="search: words to look for, each in quotes")
    flag("--top", type=int, default=10, help="search: how many answers (10)")
    args = parser.parse_args()
    sounds = args.task in ("tag", "search")
    if sounds and not (args.audio and (args.query if args.task == "search" else args.labels)):
        parser.error("needed: --audio, and --labels for tag, --query for search")
    device = join_ranks()
    world = "toy" if Path(args.data or args.task).name == "toy" else "audioset"
    paths = args.checkpoint or [Path(f"out/{world}/pretrain/checkpoint.pt")]
    out = Path(args.out or paths[0].parent)
    if args.task == "curve":
        return curve(paths, out)
    models = [Model(path, device) for path in paths]
    if sounds:
        heard = hear(models[0], args.audio, out / "heard")
    if args.task == "search":
        search(models[0], heard, args.query, args.top)
    elif args.task == "tag":
        tag(models[0], heard, args.labels)
    elif args.task == "scaling":
        scaling(models, args.data or dataset_folder("esc50"), args.target, out)
    else:
        run_tasks(models, args, out)


if __name__ == "__main__":
    run(main)
