"""Stage 2: captions for clips that have none (§3.3, Table 2).

    python curate.py --source ac                 # captions of sounds, but not of which
    python curate.py --source vc --preview 8     # captions of pictures; eight clips to look at
    python curate.py generate                    # a language model writes the captions of fc
    torchrun --nproc_per_node=4 curate.py --source fc
    python curate.py --source ac --data toy

ac, vc and fc are mined: CLIP looks at a clip's frames and picks captions from a pool. rc, gl and gc
come with AudioCaps: random captions, AudioSet's labels, the gold captions. What is left for
finetune.py: out/<dataset>/<source>.jsonl, a line a clip, {"id", "captions", "scores"}.

M  frames, b of them at a time   P  captions of the pool   k  that a frame picks   D  embedding
"""
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from clip_load import load_clip, load_tokenizer, short_digest
from data import (captions_of, dataset_folder, find_files, read_published, read_split, read_text,
                  reading, run)
from evaluate import PAPER, PROMPT, save
from model import join_ranks, print0
from pretrain import (CHUNK, TOY, Training, frame_bank, in_chunks, open_chunk, parse, setting,
                      text_bank, training_clips)

import numpy as np
import torch
from PIL import Image

POOL_PROMPTS = {"ac": PROMPT, "vc": "a photo of", "fc": "a photo of"}  # of what is mined (Table 2)
CLIPS_OF = {"ac": "audioset", "vc": "audioset", "fc": "audioset",
            "rc": "audiocaps", "gl": "audiocaps", "gc": "audiocaps"}


@dataclass(frozen=True)
class Settings:
    """Curation, and what the paper mines; the command line is derived from this."""
    source: str = setting("", "where captions come from", list(CLIPS_OF))
    data: str = setting("", "folder of the clips; empty: audioset, or audiocaps for rc, gl, gc")
    out: str = setting("", "folder of the pairs; empty: out/<dataset>")
    clip: str = setting("ViT-B/32", "as in pretrain.py")
    vocab: str = setting("", "as in pretrain.py")
    leave_out: str = setting("data/audiocaps", "as in pretrain.py")
    # differs from the paper ("a video frame", "the top captions"): ten for each of four (authors')
    k: int = setting(10, "captions that a frame picks")
    threshold: float = setting(-1.0, "least cosine of a frame and its caption")
    preview: int = setting(0, "draw so many clips into <source>.png")
    model: str = setting("EleutherAI/gpt-j-6b", "generate: of transformers, a name or a folder")
    prompts: int = setting(250_000, "generate: each gives about four captions")
    seed: int = setting(0, "of rc's captions and of prompts")
    workers: int = setting(Training.workers, "decoding processes a rank")


# ----------------------------------------------------------------------------------- the pool
def caption_pool(source, folder, out):
    """A mined source's captions, each once; <source>.txt comes first. Raises FileNotFoundError."""
    files = [path for path in (folder / f"{source}.txt", out / f"{source}.txt") if path.exists()]
    if files:
        lines = read_text(files[0]).splitlines()
    elif source == "ac":  # the captions alone: whose they are is not looked at
        clips = read_published(dataset_folder("audiocaps") / "train.csv")
        lines = captions_of(clips + read_split("clotho", dataset_folder("clotho"), "train"))
    elif source == "vc":
        coco, lines = dataset_folder("mscoco"), []
        for name in ("captions_train2014.json", "captions_val2014.json"):
            with reading(coco, f"readable {name}"):
                rows = json.loads(read_text(find_files(coco, (name,))[0]))["annotations"]
                lines += [" ".join(row["caption"].split()) for row in rows]
    else:
        raise FileNotFoundError(f"{out}/fc.txt: missing; python curate.py generate writes it")
    pool = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not pool:
        raise ValueError(f"no caption in the pool of {source}")
    return pool


def generate(settings, folder, out, device):
    """A language model reads captions of pictures and goes on with its own (§3.3, FC) -> fc.txt."""
    from transformers import pipeline
    shown = caption_pool("vc", folder, out)
    model = pipeline("text-generation", settings.model, device=device, dtype=torch.float16)
    model.tokenizer.pad_token = model.tokenizer.eos_token  # GPT-J has none

    def make(start, end):
        for at in range(start, end, 64):
            rng = np.random.default_rng((settings.seed, at))
            torch.manual_seed(rng.integers(2 ** 62))
            prompts = []
            for eight in rng.integers(len(shown), size=(min(64, end - at), 8)):
                prompts.append("".join(f"- {shown[i]}\n" for i in eight) + "-")
            written = model(prompts, batch_size=len(prompts), return_full_text=False,
                            do_sample=True, top_p=0.95, max_new_tokens=64)
            yield np.array([text["generated_text"] for (text,) in written])

    parts = out / f"fc-{short_digest(settings.model, str(settings.seed), *shown)}"
    captions = dict.fromkeys(shown)  # each once; those that are shown come first
    for path in in_chunks(parts, settings.prompts, make, settings.model):
        for text in open_chunk(path).tolist():
            for line in text.split("\n")[:-1]:  # the last one may be cut off
                line = line.strip(' -"')
                if 3 <= len(line.split()) <= 40:
                    captions[line] = None
    new = list(captions)[len(shown):]
    save(out / "fc.txt", lambda part: part.write_text("\n".join(new), "utf-8"))
    print0(f"{len(new)} captions. next: python curate.py --source fc")


# ------------------------------------------------------------------------------------- mining
FOUND = np.dtype([("cosine", np.float32), ("caption", np.int32)])


def nearest(images, pool, k):
    """images (b, D), pool (P, D) -> their k largest cosines, and whose these are, 2 × (b, k)."""
    return (images @ pool.T).topk(min(k, len(pool)))


def mine(frames, captions, k, device):
    """Frames' k nearest captions -> (M, k) of FOUND. frames: a Bank; captions: chunk files."""
    pool = torch.cat([torch.tensor(open_chunk(path)) for path in captions])      # (P, D)
    pool = pool.to(device).float()

    def make(start, end):
        chunk = torch.tensor(open_chunk(frames.paths[start // CHUNK])).to(device).float()
        for images in chunk.split(512):                                          # (b, D)
            cosines, indices = nearest(images, pool, k)                          # 2 × (b, k)
            cosines[~images.any(dim=1)] = -torch.inf  # an unreadable frame picks nothing
            found = np.empty(cosines.shape, FOUND)
            found["cosine"], found["caption"] = cosines.cpu(), indices.cpu()
            yield found

    bank = frames.paths[0].parent
    folder = bank.with_name("mined-" + short_digest(bank.name, captions[0].parent.name, str(k)))
    paths = in_chunks(folder, len(frames.rows), make, "frames pick captions")
    return np.concatenate([open_chunk(path) for path in paths])


def union(found, pool, threshold):
    """What a clip's frames found, (frames, k) of FOUND -> what its line holds, nearest first."""
    best = {}  # caption -> its best cosine
    for cosine, caption in sorted(found.ravel().tolist(), reverse=True):
        if cosine >= threshold:
            best.setdefault(pool[caption], round(cosine, 4))
    return {"captions": list(best), "scores": list(best.values())}


def mined_pairs(settings, folder, out, device):
    """What CLIP picks for a folder's clips -> clips, (i) -> what clip i's line holds."""
    pool = caption_pool(settings.source, folder, out)
    clips = training_clips(folder, settings.leave_out)
    clip = load_clip(settings.clip, device)
    tokenizer = load_tokenizer(settings.vocab, clip)
    texts = [f"{POOL_PROMPTS[settings.source]} {caption}" for caption in pool]
    frames = frame_bank(out / "banks", clips, clip, settings.workers)
    captions = text_bank(out / "banks", texts, clip, tokenizer)
    mined = mine(frames, captions, settings.k, device)                           # (M, k)
    return clips, lambda i: union(mined[frames.of(i)], pool, settings.threshold)


# -------------------------------------------------------------------------------------- pairs
def gold_pairs(source, folder, seed):
    """Gold clips, AudioCaps' train or a gold.jsonl -> these, (i) -> what clip i's line holds."""
    split = "gold" if (folder / "gold.jsonl").exists() else "train"
    clips = read_split("audiocaps", folder, split, need=("captions",))
    if source == "gl" and not any(clip.labels for clip in clips):  # AudioCaps' tables have none
        labels = {}
        for table in dataset_folder("audioset").glob("*_segments.csv"):
            labels |= {segment.video: segment.labels for segment in read_published(table)}
        clips = [replace(clip, labels=labels.get(clip.id[:11], ())) for clip in clips]
    captions = [clip.labels if source == "gl" else clip.captions for clip in clips]
    if source == "rc":  # as in Table 2; §3.3 has "a random caption from AC"
        pool = captions_of(clips)
        drawn = np.random.default_rng(seed).integers(len(pool), size=len(clips))
        captions = [[pool[j]] for j in drawn]
    return clips, lambda i: {"captions": captions[i]}


def preview(path, clips, found, count):
    """A contact sheet: `count` clips, a frame of each beside its first captions."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 1.8 * count))
    for row in range(count):
        i = row * len(clips) // count  # spread over the set
        axes = figure.add_subplot(count, 4, 4 * row + 1)
        if clips[i].frames:
            axes.imshow(Image.open(clips[i].middle_frame))
        axes.text(1.1, 0.5, "\n".join(found(i)["captions"][:6]), va="center", parse_math=False,
                  transform=axes.transAxes)
        axes.axis("off")
    figure.savefig(path)


def curate(settings, folder, out, device):
    """Make <out>/<source>.jsonl, a line for each clip that gets a caption; say how many pairs."""
    source, counts = settings.source, []  # of each line's captions
    if source in POOL_PROMPTS:
        clips, found = mined_pairs(settings, folder, out, device)
    else:
        clips, found = gold_pairs(source, folder, settings.seed)

    def write(part):
        with open(part, "w") as file:
            for i, clip in enumerate(clips):
                row = {"id": clip.id} | found(i)
                if row["captions"]:
                    file.write(json.dumps(row) + "\n")
                    counts.append(len(row["captions"]))
        if not counts:
            raise ValueError("not one clip gets a caption; lower --threshold")

    save(out / f"{source}.jsonl", write)
    if settings.preview:
        save(out / f"{source}.png", lambda part: preview(part, clips, found, settings.preview))
    print0(f"{len(counts)} of {len(clips)} clips with captions, {sum(counts)} pairs (paper: "
           f"{PAPER['pairs'][source]})\nnext: python finetune.py --source {source} "
           f"--data {settings.data or folder.name} --out {out}/at-{source}")


def main():
    # the toy's pool has few captions of a thing: of the nearest ten most would be of other things
    toy = Settings(data="toy", clip=TOY.clip, vocab=TOY.vocab, leave_out="none", k=1)
    generates = sys.argv[1:2] == ["generate"]
    settings = parse(Settings(), {"toy": toy}, sys.argv[2 if generates else 1:], __doc__)
    if not settings.source and not generates:
        raise ValueError(f"--source is needed: one of {', '.join(CLIPS_OF)}")
    folder = dataset_folder(settings.data or CLIPS_OF[settings.source or "fc"])
    out = Path(settings.out or f"out/{folder.name}")
    (generate if generates else curate)(settings, folder, out, join_ranks())


if __name__ == "__main__":
    run(main)
