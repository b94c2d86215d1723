"""Stage 2: captions for clips that have none: CLIP looks at a clip's frames and picks from a pool (§3.3, Table 2).

    python curate.py --source ac                 # captions of sounds, but not of which: leaves data/audioset/ac.jsonl
    python curate.py --source vc --preview 8     # captions of pictures; eight clips to look at in data/audioset/vc.png
    python curate.py generate                    # a language model writes captions into data/audioset/fc.txt
    torchrun --nproc_per_node=4 curate.py --source fc
    python curate.py --source ac --data toy

ac, fc and vc are mined; rc, gl and gc come with AudioCaps: random captions, AudioSet's labels, the gold captions.
finetune.py trains on what this leaves: an index like any other, its captions filled in.

M  frames     P  captions of the pool     D  embedding     k  captions kept per frame
b  frames, c  captions, p  captions of a product: how many are compared at a time     s  groups of captions looked into
"""
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bank import frame_bank, shared_arrays, text_embeddings
from clip_load import Tokenizer, cached, fingerprint, load_clip
from evaluate import PROMPT, blank_figure
from pretrain import TOY, training_clips
from processes import Claim, barrier, ranks, run, start_ranks, write_whole
from readers import (
    CLASS_NAMES,
    add_labels,
    dataset_folder,
    read_coco_captions,
    read_index,
    read_segments,
    read_split,
)
from train import Training, parse, setting

MINED = {"ac": PROMPT, "fc": "a photo of", "vc": "a photo of"}  # mined sources: what is put before captions (Table 2)
PAPER_PAIRS = {"ac": 1_080_078, "fc": 1_224_621, "vc": 1_172_276, "rc": 44_118, "gl": 120_816, "gc": 44_118}
SOURCES = list(PAPER_PAIRS)


@dataclass(frozen=True)
class Settings:
    """Mining, and what the paper mines (Table 2); the command line is derived from this."""
    source: str = setting("", "ac: AudioCaps' and Clotho's captions; fc: generated ones; vc: MSCOCO's; rc: random "
                          "ones; gl: AudioSet's labels; gc: gold ones", SOURCES)
    data: str = setting("", "folder of the clips; empty: audioset for ac, fc, vc, audiocaps for rc, gl, gc")
    clip: str = setting(Training.clip, "one of OpenAI's names, or a path to weights")
    vocab: str = setting(Training.vocab, "the tokenizer's vocabulary")
    leave_out: str = setting("data/audiocaps", "as in pretrain.py: folder of AudioCaps' tables, or none")
    # differs from the paper (§3.3: "a video frame", "the top candidate captions"): ten for each of four, as theirs
    k: int = setting(10, "captions that each frame picks; a clip's set is the union over its frames")
    threshold: float = setting(-1.0, "leave out captions whose cosine with the frame is below this")
    seed: int = setting(0, "of rc's random captions")
    preview: int = setting(0, "draw so many clips with their captions into <source>.png")
    workers: int = setting(Training.workers, "processes that decode, a rank")
    rows: int = setting(16_384, "frames that are searched at a time")
    columns: int = setting(65_536, "captions that are compared at a time")


# The toy's pool has about six captions of a thing where a million have hundreds: the nearest ten would be mostly wrong.
TOY_CURATION = Settings(data="toy", clip=TOY.clip, vocab=TOY.vocab, leave_out="none", k=3, workers=1)


def folder_of(source, data):
    """Where a source's clips lie, unless `data` says so: what is mined is AudioSet's. Raises FileNotFoundError."""
    return dataset_folder(data or ("audioset" if source in MINED else "audiocaps"))


# ------------------------------------------------------------------------------------- the pool

def caption_pool(source, folder):
    """The captions that a source offers, each once -> list of str. `<folder>/<source>.txt`, one a line, comes first.

    Raises FileNotFoundError (what to get), ValueError (no captions).
    """
    own = Path(folder) / f"{source}.txt"
    if own.exists():
        lines, where = own.read_text(encoding="utf-8").splitlines(), own
    elif source == "ac":  # the captions alone: what they describe is not looked at
        audiocaps, clotho = dataset_folder("audiocaps"), dataset_folder("clotho")
        lines = [caption for segment in read_segments(audiocaps / "train.csv") for caption in segment.captions]
        lines += [caption for clip in read_split("clotho", clotho, "train") for caption in clip.captions]
        where = f"{audiocaps} and {clotho}"
    elif source == "vc":
        where = dataset_folder("mscoco")
        lines = read_coco_captions(where, "train") + read_coco_captions(where, "val")
    else:
        raise FileNotFoundError(f"{own}: no such file. Generated captions: python curate.py generate --out {own}")
    pool = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not pool:
        raise ValueError(f"{where}: no caption in it")
    return pool


# -------------------------------------------------------------------------------------- mining

GROUP = 64  # captions of which only the best one is looked at first
# What a shortlist is computed in -> how many captions it holds beyond k, and how far rounding may shift its cosines,
# the fp32 sum's own rounding aside. fp16 holds the vectors as they are and rounds the cosine (2^-11); bf16 rounds both
# vectors and the cosine (2^-8 each).
ROUGH = {torch.float32: (6, 0.0), torch.float16: (6, 2.0 ** -11), torch.bfloat16: (22, 2.0 ** -7 + 2.0 ** -8)}


def rough_type(device):
    """What a device multiplies fastest: fp16 on a GPU, bf16 on a CPU that has units for it, fp32 otherwise."""
    if torch.device(device).type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def rows_of(captions, rows, device):
    """Rows of a pool that lies on disk, or on the device already -> tensor on the device."""
    if torch.is_tensor(captions):
        return captions[rows]
    return torch.from_numpy(np.array(captions[rows.cpu().numpy() if torch.is_tensor(rows) else rows])).to(device)


def shortlist(queries, captions, size, columns, rough):
    """The `size` captions nearest to each query, but for rounding: (b, D) -> cosines, nearest first, indices (b, size).

    Sorting all cosines would take as long as computing them. The nearest `size` are among the `size` groups whose
    best members are nearest, so only these are sorted.
    """
    gpu, device, chunk = queries.device.type == "cuda", queries.device, min(columns, len(captions))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums of fp16 products stay fp32
    queries = queries.to(rough)
    # -(-a // b) is a / b rounded up; a CPU likes small products
    tile, panel = (len(queries), -(-chunk // GROUP) * GROUP) if gpu else (1024, 1024)
    room = queries.new_empty(-(-chunk // panel) * min(tile, len(queries)) * panel)  # fresh memory each time is slow
    best = [None] * -(-len(queries) // tile)
    for start in range(0, len(captions), chunk):
        part = rows_of(captions, slice(start, start + chunk), device).to(queries.dtype)              # (c, D)
        panels = part.split(panel)
        for i, some in enumerate(queries.split(tile)):                                               # (b, D)
            block = room[:len(panels) * len(some) * panel].view(len(panels), len(some), panel)       # (c/p, b, p)
            for products, those in zip(block, panels):
                torch.mm(some, those.T, out=products[:, :len(those)])
            block[-1, :, len(panels[-1]):] = -torch.inf
            groups = block.unflatten(2, (-1, GROUP))                                           # (c/p, b, p/64, 64)
            nearest = groups.amax(3).transpose(0, 1).flatten(1)                                      # (b, c/64)
            chosen = nearest.topk(min(size, nearest.shape[1]), sorted=False).indices                 # (b, s)
            each, row = groups.shape[2], torch.arange(len(some), device=device)[:, None]             # groups a panel
            members = groups[chosen // each, row, chosen % each].flatten(1).float()                  # (b, s·64)
            cosine, at = members.topk(min(size, len(part)))                                          # (b, size)
            index = start + chosen.gather(1, at // GROUP) * GROUP + at % GROUP
            if start:
                cosine, index = torch.cat([best[i][0], cosine], 1), torch.cat([best[i][1], index], 1)
                cosine, keep = cosine.topk(min(size, cosine.shape[1]))                               # (b, size)
                index = index.gather(1, keep)
            best[i] = cosine, index
    return tuple(torch.cat(parts) for parts in zip(*best))


def top_captions(images, captions, k, columns=65_536, device="cpu", rough=None):
    """Each image's k nearest captions, exactly: (b, D), (P, D) fp16 unit vectors -> cosines, indices (b, k).

    captions: an array in memory or on disk, or a tensor on the device. Ties are ranked by index.

    A shortlist is found in what the device is fast at and its cosines computed again in float64, where a dot product of
    fp16 unit vectors has no rounding (terms are multiples of 2^-48, partial sums at most 1 in size: 49 bits of 53).
    What is not on the shortlist is at best a rounding error nearer than the last that is; where that could matter, the
    row is done again in float64 over all captions. So the result depends on no block size and no device.
    """
    rough = rough or rough_type(device)
    spare, error = ROUGH[rough]
    queries, size = torch.as_tensor(images, device=device), min(k + spare, len(captions))            # (b, D)
    fast, index = shortlist(queries, captions, size, columns, rough)
    index = index.sort(1).values                     # so that a stable sort by cosine leaves ties in order
    exact = []
    for part, near in zip(queries.split(256), index.split(256)):
        near = rows_of(captions, near, device).float().double()  # by way of fp32: six times faster   (256, size, D)
        exact.append((part.double()[:, None] @ near.transpose(1, 2))[:, 0])                          # (256, size)
    exact, order = torch.cat(exact).sort(dim=1, descending=True, stable=True)
    cosines, indices = exact[:, :k].float().cpu().numpy(), index.gather(1, order)[:, :k].cpu().numpy()
    error += images.shape[1] * 2.0 ** -23            # of a sum of D terms in fp32
    unsure = (exact[:, min(k, size) - 1] <= fast[:, -1] + error) & (size < len(captions))
    unsure &= queries.any(1)                         # a row of zeros is an unreadable frame's
    unsure = unsure.nonzero().flatten().tolist()
    if unsure and rough == torch.bfloat16:           # fp32 settles most of them
        cosines[unsure], indices[unsure] = top_captions(images[unsure], captions, k, columns, device, torch.float32)
        return cosines, indices
    for row in unsure:
        everything = torch.cat([rows_of(captions, slice(i, i + columns), device).double() @ queries[row].double()
                                for i in range(0, len(captions), columns)]).cpu().numpy()            # (P,)
        indices[row] = np.lexsort((np.arange(len(captions)), -everything))[:k]
        cosines[row] = everything[indices[row]]
    return cosines, indices


def mine(images, captions, folder, k, device="cpu", rows=16_384, columns=65_536, made_of=None):
    """Each image's k nearest captions, kept in `folder`: files of (M, D), (P, D) fp16 -> cosines, indices (M, k).

    Memory holds a block of images and a block of captions, whatever their numbers. The ranks share the blocks of
    images; a search that was cut short goes on where it was. made_of: dict of what decides the result.
    """
    images, captions = np.load(images, mmap_mode="r"), np.load(captions, mmap_mode="r")
    (rank, size), count, k = ranks(), len(images), min(k, len(captions))
    made_of = {"k": k, "images": count, "captions": len(captions), **(made_of or {})}
    arrays = {"cosines": (np.float32, (count, k)), "indices": (np.int32, (count, k)), "done": (np.uint8, (count,))}
    with (shared_arrays(Path(folder), "mined.json", made_of, arrays) as (cosines, indices, done),
          tqdm(total=count, desc=f"mining in {folder}", unit=" frames", unit_scale=True, disable=rank > 0) as bar):
        if torch.device(device).type == "cuda" and captions.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            captions = torch.from_numpy(np.array(captions)).to(device)  # read once instead of once a block
        for start in range(rank * rows, count, size * rows):
            block = slice(start, min(start + rows, count))
            if not done[block].all():
                cosines[block], indices[block] = top_captions(np.array(images[block]), captions, k, columns, device)
                done[block] = 1
            bar.update(min(size * rows, count - bar.n))
    return cosines, indices


def union(cosines, indices, threshold):
    """A clip's captions: its frames' (frames, k) merged, nearest first, with their best cosines -> indices, cosines."""
    best = {}
    for cosine, index in zip(cosines.ravel().tolist(), indices.ravel().tolist()):
        if cosine >= threshold:
            best[index] = max(cosine, best.get(index, cosine))
    order = sorted(best, key=lambda index: (-best[index], index))
    return order, [best[index] for index in order]


# --------------------------------------------------------------------------------------- pairs

def gold_clips(folder):
    """AudioCaps' training clips with gold captions (toy: gold.jsonl), those whose sound is on disk -> list of Clip."""
    if (folder / "gold.jsonl").exists():
        return read_index(folder / "gold.jsonl", need=("audio", "captions"))
    listed = read_split("audiocaps", folder, "train", need=("audio", "captions"))
    clips = [clip for clip in listed if clip.audio]
    if not clips:
        raise ValueError(f"{folder}: not one of AudioCaps' {len(listed)} training clips has its sound on disk")
    return clips


def with_captions(source, clips, folder, seed):
    """Gold clips as rc, gl and gc pair them: with random captions, with labels, with their own."""
    if source == "gc":
        return clips
    if source == "rc":  # as Table 2 says: AudioCaps' pairs, the alignment broken; §3.3 has "a random caption from AC"
        pool, rng = [caption for clip in clips for caption in clip.captions], np.random.default_rng(seed)
        return [replace(clip, captions=(pool[i],)) for clip, i in zip(clips, rng.integers(len(pool), size=len(clips)))]
    audioset = folder.parent / "audioset"
    if not any(clip.labels for clip in clips) and (audioset / CLASS_NAMES).exists():
        clips = add_labels(clips, audioset)
    labelled = [replace(clip, captions=clip.labels) for clip in clips if clip.labels]
    if not labelled:
        raise ValueError(f"{folder}: no clip has a label; AudioSet's CSVs and {CLASS_NAMES} belong into {audioset}")
    return labelled


def write_index(path, clips, captions):
    """Write clips with their captions as an index -> numbers of clips with any, and of pairs.

    captions: for each clip its captions and their cosines (or None), one clip at a time.
    """
    folder, counts = path.parent, []

    def save(part):
        with open(part, "w", encoding="utf-8") as file:
            for clip, (texts, scores) in zip(clips, captions):
                if not texts:
                    continue
                row = {"id": clip.id, "audio": os.path.relpath(clip.audio, folder), "labels": list(clip.labels),
                       "frames": [os.path.relpath(frame, folder) for frame in clip.frames], "captions": list(texts)}
                if scores:
                    row["scores"] = [round(score, 4) for score in scores]
                file.write(json.dumps({key: value for key, value in row.items() if value}, ensure_ascii=False) + "\n")
                counts.append(len(texts))

    write_whole(path, save)
    return len(counts), sum(counts)


def preview(path, clips, found, count):
    """A contact sheet: `count` clips spread over the set, a frame each, with the captions that they got."""
    chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int).tolist()
    figure = blank_figure(9, 1.8 * len(chosen))
    for (left, right), i in zip(figure.subplots(len(chosen), 2, squeeze=False, width_ratios=(1, 4)), chosen):
        texts, scores = found(i)
        if clips[i].frames:
            with Image.open(clips[i].middle_frame) as image:
                left.imshow(image.convert("RGB"))
        left.axis("off")
        right.axis("off")
        lines = [f"{score:.3f}  {text}" for score, text in zip(scores, texts)] if scores else texts
        right.text(0, 0.5, "\n".join([clips[i].id, *lines[:6]]), va="center", fontsize=8, parse_math=False)
    figure.savefig(path, dpi=120)
    print(f"to look at: {path}")


def mined_captions(settings, folder, device):
    """What CLIP picks for a folder's clips -> clips, how many of them train, (i) -> captions and cosines, a remark."""
    source, banks = settings.source, folder / "banks"
    pool = caption_pool(source, folder)
    clips, train_on = training_clips(folder, settings.leave_out)
    clip = load_clip(cached(settings.clip), device)
    tokenizer, name = Tokenizer(settings.vocab, clip.context_length), fingerprint(clip)
    frames = frame_bank(banks / f"train-{name}", clips, clip, device, settings.workers)
    texts = [f"{MINED[source]} {caption}" for caption in pool]
    embedded = text_embeddings(banks / f"{source}-{name}", texts, clip, tokenizer, device)
    made_of = {"frames": frames.path.with_name("bank.json").read_text(),
               "pool": embedded.with_name("bank.json").read_text(),
               "readable": hashlib.sha256(frames.rows.tobytes()).hexdigest()}
    cosines, indices = mine(frames.path, embedded, folder / "mined" / f"{source}-{name}", settings.k, device,
                            settings.rows, settings.columns, made_of)

    def found(i):
        rows = frames.of(i) if train_on[i] else []
        order, scores = union(cosines[rows], indices[rows], settings.threshold)
        return [pool[j] for j in order], scores

    long = sum(len(tokenizer.encode(text)) > clip.context_length for text in texts) if ranks()[0] == 0 else 0
    cut = f", {long} of them cut to {clip.context_length} tokens" if long else ""
    blind = sum(len(frames.of(i)) == 0 for i in range(len(clips)))
    return clips, sum(train_on), found, f", pool of {len(pool)} captions{cut}, {blind} clips without a readable frame"


def curate(settings, device):
    """Make <folder>/<source>.jsonl and say how many pairs it holds."""
    source, mined = settings.source, settings.source in MINED
    folder = folder_of(source, settings.data)
    index = folder / f"{source}.jsonl"
    lock = Claim(f"{index}.lock") if ranks()[0] == 0 else None
    if mined:
        clips, count, found, notes = mined_captions(settings, folder, device)
    else:
        clips = with_captions(source, gold_clips(folder), folder, settings.seed)
        count, notes = len(clips), ""

        def found(i):
            return clips[i].captions, None

    if ranks()[0] == 0:
        kept, pairs = write_index(index, clips, map(found, range(len(clips))))
        if not kept:
            raise ValueError(f"no clip has a caption with a cosine of {settings.threshold} or more; lower --threshold")
        print(f"{index}: {kept} of {count} clips with captions, {pairs} pairs (paper: {PAPER_PAIRS[source]}){notes}")
        if settings.preview:
            preview(index.with_suffix(".png"), clips, found, settings.preview)
        lock.close()
        print(f"next: python finetune.py --source {source}" + (f" --data {settings.data}" if settings.data else ""))
    barrier()


# -------------------------------------------------------------------------------- free captions

@dataclass(frozen=True)
class Generation:
    """Captions out of a language model that has read captions of pictures (§3.3, FC)."""
    model: str = setting("EleutherAI/gpt-j-6b", "any causal language model that transformers loads: a name or a folder")
    out: str = setting("data/audioset/fc.txt", "file of captions, one a line")
    count: int = setting(1_000_000, "captions to make")
    shots: int = setting(8, "of MSCOCO's captions that each prompt shows")
    data: str = setting("mscoco", "folder of MSCOCO's captions, or a file with a caption a line")
    batch: int = setting(64, "prompts at a time")
    tokens: int = setting(64, "new tokens a prompt: room for some captions")
    top_p: float = setting(0.95, "sampled from the most likely tokens that make up this share")
    temperature: float = setting(1.0, "of sampling")
    seed: int = setting(0, "of prompts and sampling")


def clean(text):
    """What a model wrote after "- " -> its captions: whole lines, without bullets, of 3 to 40 words."""
    lines = text.split("\n")[:-1]  # the last line may be cut off
    lines = [" ".join(re.sub(r"^\s*(?:[-*•]|\d+[.)])?\s*", "", line).strip("\"' ").split()) for line in lines]
    return [line for line in lines if 3 <= len(line.split()) <= 40 and not re.search(r"https?:|[<>{}\[\]|#]", line)]


def read_note(path):
    """What `generate` keeps beside its captions: its settings, batches and bytes so far. Raises ValueError."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"made_of": dict(state["made_of"]), "batches": int(state["batches"]), "bytes": int(state["bytes"])}
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and the captions beside it") from None


@torch.no_grad()
def continuations(model, tokenizer, primers, settings, number):
    """Batch `number` of what a model writes after captions drawn from `primers` -> pairs of its text and these."""
    rng = np.random.default_rng((settings.seed, number))
    torch.manual_seed(settings.seed * 1_000_003 + number)
    shown = [[primers[i] for i in rng.integers(len(primers), size=settings.shots)] for _ in range(settings.batch)]
    prompts = tokenizer(["".join(f"- {line}\n" for line in lines) + "-" for lines in shown], return_tensors="pt",
                        padding=True).to(model.device)
    tokens = model.generate(**prompts, do_sample=True, max_new_tokens=settings.tokens, top_p=settings.top_p,
                            temperature=settings.temperature, pad_token_id=tokenizer.pad_token_id)
    written = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1]:], skip_special_tokens=True)
    return zip(written, shown)


def generate(settings, device):
    """Append captions to settings.out until there are enough; goes on where it was cut short, with the same captions.

    Raises FileNotFoundError, ValueError (transformers is missing, another run's file).
    """
    try:
        from transformers import (  # only here is it needed
            AutoModelForCausalLM,
            AutoTokenizer,
        )
    except ImportError:
        raise ValueError("curate.py generate needs transformers: pip install transformers") from None
    out, note = Path(settings.out), Path(settings.out + ".json")
    primers = (Path(settings.data).read_text(encoding="utf-8").splitlines() if Path(settings.data).is_file() else
               read_coco_captions(dataset_folder(settings.data), "train"))
    made_of = {name: getattr(settings, name) for name in ("model", "shots", "batch", "tokens", "top_p", "temperature",
                                                          "seed")} | {"primers": len(primers)}
    state = read_note(note) if note.exists() else {"made_of": made_of, "batches": 0, "bytes": 0}
    if state["made_of"] != made_of or (out.exists() and not note.exists()):
        raise ValueError(f"{out} was made otherwise; choose another --out, or delete it and {note}")
    lock = Claim(f"{out}.lock")
    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float16 if device.type == "cuda" else torch.float32).to(device).eval()
    with open(out, "ab+") as file:
        if file.seek(0, os.SEEK_END) < state["bytes"]:
            raise ValueError(f"{out} is shorter than when {note} was written; delete both")
        file.truncate(state["bytes"])  # what a killed run wrote beyond its last note
        file.seek(0)
        known = {line.lower() for line in file.read().decode().splitlines()}
        barren = 0
        with tqdm(total=settings.count, initial=len(known), desc=str(out), unit=" captions") as bar:
            while len(known) < settings.count:
                before = len(known)
                for text, shown in continuations(model, tokenizer, primers, settings, state["batches"]):
                    for caption in clean(text):
                        if caption.lower() not in known and caption not in shown and len(known) < settings.count:
                            known.add(caption.lower())
                            file.write(caption.encode() + b"\n")
                file.flush()
                state |= {"batches": state["batches"] + 1, "bytes": file.seek(0, os.SEEK_END)}
                write_whole(note, lambda path, state=state: path.write_text(json.dumps(state)))
                bar.update(len(known) - before)
                barren = barren + 1 if len(known) == before else 0
                if barren == 20:
                    raise ValueError(f"{settings.model} wrote no new caption in 20 batches; {len(known)} are in {out}")
    lock.close()
    print(f"{out}: {len(known)} captions; next: python curate.py --source fc")


def main():
    if sys.argv[1:2] == ["generate"]:
        generate(parse(Generation(), {}, sys.argv[2:], "Write captions with a language model."), start_ranks())
        return
    settings = parse(Settings(), {"toy": TOY_CURATION}, description=__doc__)
    if not settings.source:
        raise ValueError(f"--source is needed: one of {', '.join(SOURCES)}; or: python curate.py generate")
    curate(settings, start_ranks())


if __name__ == "__main__":
    run(main)
