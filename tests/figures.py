"""The pictures of README.md: the idea, what the encoder hears, how training went, what it finds.

    python pretrain.py --data toy && python tests/figures.py            # into assets/
    python tests/figures.py --recording ../shared/data/esc10/audio/5-212059-A-12.ogg

N  clips     T  frames of 10 ms     F  mel bins     D  embedding
"""
import argparse
import io
import json
import math
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # before torch: it sets OpenMP's environment
import clip_load
import evaluate
import pretrain

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

FROZEN, LEARNED = "#7a7a7a", "#c8382e"
CPU = torch.device("cpu")


def blank(width, height):
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """A small PNG: 256 colours are enough for all of these."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    image = Image.open(drawn).convert("RGB").quantize(256)
    data.write_whole(path, lambda part: image.save(part, "PNG", optimize=True))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def filterbanks(path, front_end):
    """What the encoder hears of a file -> (T, F)."""
    wave, length = front_end.load(path)
    return front_end(wave[None], torch.tensor([length]))[0, 0]


def show_sound(axes, x, end):
    """Filterbanks (T, F), time to the right until `end`, low frequencies at the bottom."""
    axes.imshow(x.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
                extent=(0, end, 0, x.shape[1]))


def show_frame(axes, clip):
    with Image.open(clip.middle_frame) as image:
        axes.imshow(image.convert("RGB"))


def idea(path, clip, text, front_end):
    """Three modalities, and which edges are frozen and which learned (Fig. 3), around one clip."""
    figure = Figure(figsize=(9, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 4.6))
    axes.axis("off")
    boxes = {"image": (4.5, 3.55, 1.2, 1.2), "audio": (1.5, 0.95, 1.7, 1.0),
             "text": (7.5, 0.95, 1.7, 1.0)}  # centre, width, height in inches
    for one, other, colour, style in (("image", "text", FROZEN, "-"),
                                      ("image", "audio", LEARNED, "-"),
                                      ("audio", "text", LEARNED, "--")):
        axes.annotate("", boxes[other][:2], boxes[one][:2], arrowprops={
            "arrowstyle": "<->", "color": colour, "linewidth": 2.2, "linestyle": style,
            "shrinkA": 62, "shrinkB": 62})
    for x, y, words, colour in (
            (7.4, 2.5, "CLIP: frozen,\nlearned by OpenAI from\nimage-caption pairs", FROZEN),
            (1.5, 2.5, "1  learned: the encoder's\nembedding of a sound matches\nCLIP's of a frame",
             LEARNED),
            (4.5, 1.37, "there without a single pair,\nfor both are near the image", LEARNED),
            (4.5, 0.45, "2  sharpened with captions that\nCLIP picks for the frames", LEARNED)):
        axes.text(x, y, words, color=colour, ha="center", va="center", fontsize=10)
    inner = {}
    for name, (x, y, width, height) in boxes.items():
        place = (x - width / 2, y - height / 2, width, height)
        inner[name] = axes.inset_axes(place, transform=axes.transData)
        inner[name].set(xticks=[], yticks=[])
        axes.text(x, y - height / 2 - 0.2, name, ha="center", va="center", weight="bold")
    show_frame(inner["image"], clip)
    show_sound(inner["audio"], filterbanks(clip.audio, front_end), front_end.seconds)
    inner["text"].text(0.5, 0.5, textwrap.fill(f"“{text}”", 20), ha="center", va="center")
    save(figure, path)


def training(path, log):
    """Loss, temperature and validation by epoch, from a run's log.jsonl."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    validated = [row for row in rows if "after" in row]
    batch = rows[0]["settings"]["batch"]
    figure = blank(9, 2.7)
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "loss"), (middle, "temperature")):
        axes.plot([row["epoch"] for row in steps], [row[name] for row in steps], color=LEARNED)
        axes.set(xlabel="epoch", title=name)
    left.axhline(2 * math.log(batch), color=FROZEN, linestyle="--", linewidth=1,
                 label="guessing: 2·log(batch)")
    left.legend(fontsize="small")
    name = next(key for key in validated[0] if "@1" in key)
    right.plot([row["after"] for row in validated], [row[name] for row in validated], marker=".",
               color=LEARNED)
    right.set(xlabel="epoch", title=f"validation: {name} (%)", ylim=(0, None))
    save(figure, path)


def spectrogram(path, sound, front_end):
    """A sound as the encoder gets it in evaluation, and three times as in training (§3.2.2)."""
    x = filterbanks(sound, front_end)                                            # (T, F)
    draws = torch.from_numpy(np.random.default_rng(0).random((3, 4), dtype=np.float32))
    panels = [x, *data.mask(x.expand(3, 1, -1, -1), draws)[:, 0]]                # 4 × (T, F)
    figure = blank(9, 2.5)
    titles = ("as heard", "masked", "masked", "masked")
    for axes, panel, title in zip(figure.subplots(1, 4, sharey=True), panels, titles):
        show_sound(axes, panel, front_end.seconds)
        axes.set(xlabel="seconds", title=title)
    figure.axes[0].set_ylabel("mel bin")
    save(figure, path)


def grid(path, recording):
    """The paper's tokens over a recording: 61×5 patches of 32×32, 16 frames and 24 bins apart."""
    front_end = data.FrontEnd()
    wave = data.load_audio(recording, front_end.sample_rate)
    wave = wave.repeat(1 + front_end.samples // len(wave))  # ESC-10's are 5 s
    wave, length = front_end.pad(wave)
    x = front_end(wave[None], torch.tensor([length]))[0, 0]                      # (T, F)
    figure = blank(9, 2.8)
    axes = figure.subplots()
    show_sound(axes, x, front_end.frames)
    times, bins = np.meshgrid(16 + 16 * np.arange(61), 16 + 24 * np.arange(5))
    axes.plot(times.ravel(), bins.ravel(), ".", color="white", markersize=3)
    for i, j, colour in ((20, 2, "#5ec8ff"), (21, 2, "#8cff8c"), (20, 3, "#ffd75e")):
        left, low = 16 * i, 24 * j
        axes.plot((left, left + 32, left + 32, left, left), (low, low, low + 32, low + 32, low),
                  color=colour, linewidth=1.8)
    axes.set(xlabel="frame of 10 ms", ylabel="mel bin",
             title="61×5 patches of 32×32, by their centres; three of them in full")
    save(figure, path)


def similarity(path, model, clips, texts):
    """Cosines of every sound with every text, before training (CLIP's eye listens) and after."""
    config = model.learner.audio_encoder.config
    untrained = clip_load.audio_encoder_from_clip(model.clip, *config["input_size"],
                                                  config["stride"])
    targets = model.embed_texts(texts)                                           # (N, D)
    figure = blank(9, 4.6)
    for axes, encoder, title in zip(figure.subplots(1, 2), (untrained, model.learner.audio_encoder),
                                    ("CLIP's eye, untrained", "after")):
        learner = pretrain.AudioLearner(encoder.eval(), model.learner.front_end)
        audio = learner.embed([clip.audio for clip in clips], CPU)
        cosines = audio @ targets.T                                              # (N, N)
        own = (cosines.argmax(1) == torch.arange(len(cosines))).float().mean().item()
        drawn = axes.imshow(cosines - cosines.mean(), cmap="RdBu_r", vmin=-0.8, vmax=0.8,
                            interpolation="nearest")
        axes.set(xlabel="text", ylabel="sound")
        axes.set_title(f"{title}: own text nearest for {100 * own:.0f} % of sounds", fontsize=10)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.7, label="cosine, its mean subtracted")
    save(figure, path)


def retrieval(path, model, clips, texts, count=4):
    """What is found for sounds spread evenly over the set: the sound, its frame, five texts."""
    paths = [clip.audio for clip in clips]
    audio = model.learner.embed(paths, CPU)
    cosines = audio @ model.embed_texts(texts).T                                 # (N, N)
    figure = blank(9, 1.35 * count)
    rows = figure.subplots(count, 3, width_ratios=(2, 1.2, 5))
    for (left, middle, right), i in zip(rows, np.linspace(0, len(clips) - 1, count).round()):
        i = int(i)
        front_end = model.learner.front_end
        show_sound(left, filterbanks(clips[i].audio, front_end), front_end.seconds)
        show_frame(middle, clips[i])
        for axes in (left, middle, right):
            axes.axis("off")
        for line, j in enumerate(cosines[i].argsort(descending=True)[:5].tolist()):
            own = j == i
            right.text(0, 0.9 - 0.2 * line, f"{cosines[i, j]:.2f}  {texts[j]}", va="center",
                       fontsize=9, color=LEARNED if own else "black",
                       weight="bold" if own else "normal")
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="out/toy/pretrain/checkpoint.pt")
    parser.add_argument("--recording", help="for the grid: a sound file of about ten seconds")
    parser.add_argument("--out", default="assets", help="folder of the pictures")
    args = parser.parse_args()
    out, checkpoint = Path(args.out), Path(args.checkpoint)
    model = evaluate.Model(checkpoint, CPU)
    clips = data.read_split("toy", "data/toy", "test", need=("audio", "frames", "captions"))
    clips = clips[:144]  # each thing once
    texts = [clip.captions[0] for clip in clips]
    idea(out / "idea.png", clips[90], texts[90], model.learner.front_end)
    training(out / "training.png", checkpoint.with_name("log.jsonl"))
    spectrogram(out / "spectrogram.png", clips[90].audio, model.learner.front_end)
    similarity(out / "similarity.png", model, clips, texts)
    retrieval(out / "retrieval.png", model, clips, texts)
    if args.recording:
        grid(out / "grid.png", args.recording)


if __name__ == "__main__":
    data.run(main)
