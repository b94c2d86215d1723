"""Pictures to look at: the idea, how a training went, what the encoder hears, what it finds (Fig. 3, 4, 5).

    python figures.py                                       # of the toy's run, beside its checkpoint
    python figures.py --out assets                          # those in README.md
    python figures.py --data audiocaps --checkpoint out/audioset/pretrain/checkpoint.pt

Each picture is one function. What belongs to a single task is drawn by evaluate.py and curate.py.

N  clips     T  frames of 10 ms     F  mel bins     D  embedding
"""
import argparse
import io
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_load import audio_encoder_from_clip
from data import FrontEnd, load_audio, mask
from evaluate import Model, blank_figure
from processes import run, write_whole
from readers import dataset_folder, dataset_in, read_split
from train import read_log

FROZEN, LEARNED = "#7a7a7a", "#c8382e"


def save(figure, path):
    """Write a figure as a small PNG: 256 colours are enough for all of these."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    image = Image.open(drawn).convert("RGB").quantize(256)
    write_whole(path, lambda part: image.save(part, "PNG", optimize=True))


def filterbanks(clip, front_end):
    """What the encoder hears of a clip -> (T, F)."""
    wave, length = front_end.load(clip.audio)
    return front_end(wave[None], torch.tensor([length]))[0, 0]


def show_spectrogram(axes, x, end):
    """Draw filterbanks (T, F), time to the right until `end`, low frequencies at the bottom."""
    axes.imshow(x.T, origin="lower", aspect="auto", cmap="magma", extent=(0, end, 0, x.shape[1]),
                interpolation="nearest")


def show_frame(axes, clip):
    """Draw the clip's middle frame."""
    with Image.open(clip.middle_frame) as image:
        axes.imshow(image.convert("RGB"))


def idea(path, clip, text, front_end):
    """Three modalities, and which edges are frozen and which are learned (Fig. 3), around one clip."""
    figure = blank_figure(9, 4.6)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 4.6))
    axes.axis("off")
    places = {"image": (4.5, 3.55), "audio": (1.5, 0.95), "text": (7.5, 0.95)}  # in inches
    size = {"image": (1.2, 1.2), "audio": (1.7, 1.0), "text": (1.7, 1.0)}

    def edge(one, other, colour, style):
        axes.annotate("", places[other], places[one], arrowprops={
            "arrowstyle": "<->", "color": colour, "linewidth": 2.2, "linestyle": style, "shrinkA": 62, "shrinkB": 62})

    def note(x, y, words, colour):
        axes.text(x, y, words, color=colour, ha="center", va="center", fontsize=10)

    edge("image", "text", FROZEN, "-")
    note(7.4, 2.5, "CLIP: frozen,\nlearned by OpenAI from\nimage-caption pairs", FROZEN)
    edge("image", "audio", LEARNED, "-")
    note(1.5, 2.5, "1  learned: the encoder's\nembedding of a sound matches\nCLIP's of a frame", LEARNED)
    edge("audio", "text", LEARNED, "--")
    note(4.5, 1.37, "there without a single pair,\nfor both are near the image", LEARNED)
    note(4.5, 0.45, "2  sharpened with captions that CLIP\npicks for the clip's frames", LEARNED)
    boxes = {}
    for name, (x, y) in places.items():
        width, height = size[name]
        boxes[name] = axes.inset_axes((x - width / 2, y - height / 2, width, height), transform=axes.transData)
        boxes[name].set(xticks=[], yticks=[])
        axes.text(x, y - height / 2 - 0.2, name, ha="center", va="center", weight="bold")
    show_frame(boxes["image"], clip)
    show_spectrogram(boxes["audio"], filterbanks(clip, front_end), front_end.seconds)
    boxes["text"].text(0.5, 0.5, textwrap.fill(f"“{text}”", 20), ha="center", va="center", parse_math=False)
    save(figure, path)


def training(path, log):
    """Loss, temperature and what validation gave, by epoch, from a run's log.jsonl."""
    lines = read_log(log)
    steps, validations = [row for row in lines if "loss" in row], [row for row in lines if "epoch" in row]
    batch = next((row["settings"]["batch"] for row in lines if "settings" in row), None)
    figure = blank_figure(9, 2.7)
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "loss"), (middle, "temperature")):
        axes.plot([row["epoch"] for row in steps], [row.get(name, np.nan) for row in steps], color=LEARNED)
        axes.set(xlabel="epoch", title=name)
    if batch and any("temperature" in row for row in steps):  # a contrastive loss
        left.axhline(2 * math.log(batch), color=FROZEN, linestyle="--", linewidth=1, label="guessing: 2·log(batch)")
        left.legend(fontsize="small")
    for name in dict.fromkeys(key for row in validations for key in row if "@1" in key):
        right.plot(*zip(*((row["epoch"], row[name]) for row in validations if name in row)), marker=".", label=name)
        right.legend(fontsize="small")
    right.set(xlabel="epoch", title="validation (%)", ylim=(0, None))
    save(figure, path)


def spectrogram(path, clip, front_end):
    """A sound as the encoder gets it in evaluation, and three times as in training, masked at random (§3.2.2)."""
    x = filterbanks(clip, front_end)                                                 # (T, F)
    draws = torch.from_numpy(np.random.default_rng(0).random((3, 4), dtype=np.float32))
    panels = [x, *mask(x.expand(3, 1, -1, -1), draws)[:, 0]]                          # 4 × (T, F)
    figure = blank_figure(9, 2.5)
    for axes, panel, title in zip(figure.subplots(1, 4, sharey=True), panels, ("as heard", *["masked"] * 3)):
        show_spectrogram(axes, panel, front_end.seconds)
        axes.set(xlabel="seconds", title=title)
    figure.axes[0].set_ylabel("mel bin")
    save(figure, path)


def grid(path, clips, patch=32, stride=(16, 24)):
    """The paper's tokens on a spectrogram: 61×5 patches of 32×32, 16 frames and 24 mel bins apart (§3.2.2, Fig. 4).

    What is heard is many of the clips in a row, as much as the paper hears of one.
    """
    front_end, sounds = FrontEnd(), []
    for clip in clips[::max(1, len(clips) // 10)]:
        if sum(map(len, sounds)) < front_end.samples:
            sounds.append(load_audio(clip.audio, front_end.sample_rate))
    wave, length = front_end.padded(torch.cat(sounds))
    x = front_end(wave[None], torch.tensor([length]))[0, 0]                          # (T, F)
    rows, columns = ((size - patch) // step + 1 for size, step in zip(x.shape, stride))
    centres = [(stride[0] * i + patch / 2, stride[1] * j + patch / 2) for i in range(rows) for j in range(columns)]
    figure = blank_figure(9, 2.8)
    axes = figure.subplots()
    show_spectrogram(axes, x, front_end.frames)
    axes.plot(*zip(*centres), ".", color="white", markersize=3)
    for (i, j), colour in {(20, 2): "#5ec8ff", (21, 2): "#8cff8c", (20, 3): "#ffd75e"}.items():
        left, right, low, high = stride[0] * i, stride[0] * i + patch, stride[1] * j, stride[1] * j + patch
        axes.plot((left, right, right, left, left), (low, low, high, high, low), color=colour, linewidth=1.8)
    axes.set(xlabel="frame of 10 ms", ylabel="mel bin",
             title=f"{rows}×{columns} patches of {patch}×{patch}, by their centres; three of them in full")
    save(figure, path)


def similarity(path, model, clips, texts):
    """Cosines of every sound with every text, before training (CLIP's eye, listening) and after."""
    paths = [clip.audio for clip in clips]
    after, heard = model.embed("audio", paths)
    trained, config = model.encoder, model.encoder.config
    model.encoder, model.known = audio_encoder_from_clip(model.clip, *config["input_size"], config["stride"]), {}
    before, _ = model.embed("audio", paths)
    model.encoder, model.known = trained, {}
    targets = model.texts(texts)[heard]                                               # (N, D)
    figure = blank_figure(9, 4.6)
    for axes, (title, audio) in zip(figure.subplots(1, 2), (("CLIP's eye, untrained", before), ("after", after))):
        cosines = audio[heard] @ targets.T                                            # (N, N)
        best = 100 * (cosines.argmax(1) == torch.arange(len(cosines))).float().mean().item()
        drawn = axes.imshow(cosines - cosines.mean(), cmap="RdBu_r", vmin=-0.8, vmax=0.8, interpolation="nearest")
        axes.set(xlabel="text", ylabel="sound", title=f"{title}: own text nearest for {best:.0f} % of sounds")
        axes.title.set_fontsize(10)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.7, label="cosine, its mean subtracted")
    save(figure, path)


def retrieval(path, model, clips, texts, count=6):
    """What is found for sounds spread evenly over the set, not chosen: the sound, its frame, the nearest five texts."""
    audio, heard = model.embed("audio", [clip.audio for clip in clips])
    cosines = audio @ model.texts(texts).T                                            # (N, N)
    shown = heard.nonzero().flatten()
    shown = shown[torch.linspace(0, len(shown) - 1, min(count, len(shown))).round().long()].tolist()
    figure = blank_figure(9, 1.35 * len(shown))
    for row, i in zip(figure.subplots(len(shown), 3, squeeze=False, width_ratios=(2, 1.2, 5)), shown):
        show_spectrogram(row[0], filterbanks(clips[i], model.front_end), model.front_end.seconds)
        if clips[i].frames:
            show_frame(row[1], clips[i])
        for axes in row:
            axes.axis("off")
        for line, j in enumerate(cosines[i].argsort(descending=True)[:5].tolist()):
            right = texts[j] == texts[i]
            row[2].text(0, 0.9 - 0.2 * line, f"{cosines[i, j]:.2f}  {textwrap.shorten(texts[j], 70)}", va="center",
                        fontsize=9, color=LEARNED if right else "black", weight="bold" if right else "normal",
                        parse_math=False)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", help="(out/audioset/pretrain/checkpoint.pt; for the toy out/toy/pretrain/…)")
    parser.add_argument("--data", default="toy", help="a dataset's name or its folder: test clips with sounds, and "
                                                      "captions or labels (toy)")
    parser.add_argument("--out", help="folder of the pictures (the checkpoint's own)")
    parser.add_argument("--clips", type=int, default=144, help="of the test set that are looked at (144)")
    args = parser.parse_args()
    folder = dataset_folder(args.data)
    checkpoint = Path(args.checkpoint or f"out/{'toy' if folder.name == 'toy' else 'audioset'}/pretrain/checkpoint.pt")
    model = Model(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    listed = read_split(dataset_in(folder, "test") or "audioset", folder)
    clips = [clip for clip in listed if (clip.captions or clip.labels) and clip.audio and Path(clip.audio).exists()]
    if not clips:
        raise ValueError(f"{folder}: not one of {len(listed)} test clips has its sound and a caption or a label")
    clips = [clips[i] for i in np.linspace(0, len(clips) - 1, min(args.clips, len(clips))).round().astype(int)]
    texts = [clip.captions[0] if clip.captions else ", ".join(clip.labels) for clip in clips]
    out = Path(args.out or checkpoint.parent)
    example = 5 * len(clips) // 8  # of the toy: three purple stars
    if clips[example].frames:
        idea(out / "idea.png", clips[example], texts[example], model.front_end)
    if (log := checkpoint.with_name("log.jsonl")).exists():  # imported checkpoints have none
        training(out / "training.png", log)
    spectrogram(out / "spectrogram.png", clips[example], model.front_end)
    grid(out / "grid.png", clips)
    similarity(out / "similarity.png", model, clips, texts)
    retrieval(out / "retrieval.png", model, clips, texts)
    print(f"to look at: the PNGs in {out}")


if __name__ == "__main__":
    run(main)
