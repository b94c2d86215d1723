"""The pictures of README.md: the idea, what the encoder hears, how training went, what it finds.

    python pretrain.py --data toy && python tests/figures.py            # into assets/
    python tests/figures.py --recording ../shared/data/esc10/audio/5-177957-A-40.ogg

N  clips     T  frames of 10 ms     F  mel bins     D  embedding
"""
import argparse
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

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

FROZEN, LEARNED = "#7a7a7a", "#c8382e"
CPU = torch.device("cpu")
matplotlib.rcParams["image.interpolation"] = "nearest"


def blank(width, height, *parts, **options):
    """A figure of so many inches, and the axes of its parts."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*parts, **options)


def save(figure, path):
    """A small PNG: 256 colours are enough for all of these."""
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def filterbanks(path, front_end):
    """What the encoder hears of a file -> (T, F)."""
    return data.Remember(**vars(front_end)).load(path)[0][0]


def show_sound(axes, x, end):
    """Filterbanks (T, F), time to the right until `end`, low frequencies at the bottom."""
    axes.imshow(x.T, origin="lower", aspect="auto", cmap="magma", extent=(0, end, 0, x.shape[1]))


def show_clip(left, right, clip, front_end):
    """A clip's sound and its frame, each in its axes."""
    show_sound(left, filterbanks(clip.audio, front_end), front_end.frames / 100)
    right.imshow(Image.open(clip.middle_frame))


def idea(path, clip, text, front_end):
    """Three modalities, and which edges are frozen and which learned (Fig. 3), around one clip."""
    figure = Figure(figsize=(9, 4.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 4.6))
    axes.axis("off")
    places = {"image": (4.5, 3.55), "audio": (1.5, 0.95), "text": (7.5, 0.95)}
    centred, inner = {"ha": "center", "va": "center"}, {}
    for name, (x, y) in places.items():
        inner[name] = axes.inset_axes((x - 0.8, y - 0.5, 1.6, 1), transform=axes.transData)
        inner[name].set(xticks=[], yticks=[], xlabel=name)
    for one, other, colour, style, x, y, words in (
            ("image", "text", FROZEN, "-", 7.4, 2.5,
             "CLIP: frozen,\nlearned by OpenAI from\nimage-caption pairs"),
            ("image", "audio", LEARNED, "-", 1.5, 2.5,
             "1  learned: the encoder's\nembedding of a sound matches\nCLIP's of a frame"),
            ("audio", "text", LEARNED, "--", 4.5, 0.95,
             "there without a single pair,\nfor both are near the image\n\n\n"
             "2  sharpened with captions that\nCLIP picks for the frames")):
        axes.annotate("", places[other], places[one], arrowprops={
            "arrowstyle": "<->", "color": colour, "linestyle": style, "linewidth": 2,
            "shrinkA": 62, "shrinkB": 62})
        axes.text(x, y, words, color=colour, **centred)
    show_clip(inner["audio"], inner["image"], clip, front_end)
    inner["text"].text(0.5, 0.5, textwrap.fill(f"“{text}”", 20), **centred)
    save(figure, path)


def training(path, log):
    """Loss, temperature and validation by epoch, from a run's log.jsonl."""
    rows = [row | row.get("validation", {}) for row in map(json.loads, log.open())]
    score = next(iter(rows[-1]["validation"]))
    figure, panels = blank(9, 2.7, 1, 3)
    for axes, name in zip(panels, ("loss", "temperature", score)):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), color=LEARNED)
        axes.set(xlabel="epoch", title=name)
    panels[0].axhline(2 * math.log(rows[0]["settings"]["batch"]), color=FROZEN, linestyle="--",
                      label="guessing: 2·log(batch)")
    panels[0].legend()
    panels[2].set(ylim=(0, None), title=f"{score} (%)")
    save(figure, path)


def spectrogram(path, sound, front_end):
    """A sound as the encoder gets it in evaluation, and three times as in training (§3.2.2)."""
    x = filterbanks(sound, front_end)                                            # (T, F)
    draws = torch.from_numpy(np.random.default_rng(0).random((3, 4), dtype=np.float32))
    panels = [x, *data.mask(x.expand(3, 1, -1, -1), draws)[:, 0]]                # 4 × (T, F)
    figure, row = blank(9, 2.5, 1, 4, sharey=True)
    for axes, panel, title in zip(row, panels, ("as heard", "masked", "masked", "masked")):
        show_sound(axes, panel, front_end.frames / 100)
        axes.set(xlabel="seconds", title=title)
    row[0].set_ylabel("mel bin")
    save(figure, path)


def grid(path, recording):
    """The paper's tokens over a recording: 61×5 patches of 32×32, 16 frames and 24 bins apart."""
    front_end = data.FrontEnd()
    wave, length = front_end.pad(data.load_audio(recording, 44_100).repeat(2))  # ESC-10's are 5 s
    x = front_end(wave[None], torch.tensor([length]))[0, 0]                      # (T, F)
    figure, axes = blank(9, 2.8)
    show_sound(axes, x, front_end.frames)
    times, bins = np.meshgrid(16 + 16 * np.arange(61), 16 + 24 * np.arange(5))
    axes.plot(times.ravel(), bins.ravel(), ".", color="white", markersize=3)
    for i, j, colour in ((20, 2, "#5ec8ff"), (21, 2, "#8cff8c"), (20, 3, "#ffd75e")):
        axes.add_patch(Rectangle((16 * i, 24 * j), 32, 32, fill=False, color=colour, linewidth=1.8))
    axes.set(xlabel="frame of 10 ms", ylabel="mel bin",
             title="61×5 patches of 32×32, by their centres; three of them in full")
    save(figure, path)


def similarity(path, model, clips, texts):
    """Cosines of every sound with every text, before training (CLIP's eye listens) and after."""
    trained, front_end = model.learner.audio_encoder, model.learner.front_end
    untrained = clip_load.audio_encoder_from_clip(model.clip, *trained.config["input_size"],
                                                  trained.config["stride"])
    targets = model.embed_texts(texts)                                           # (N, D)
    figure, panels = blank(9, 4.6, 1, 2)
    for axes, encoder, title in zip(panels, (untrained, trained),
                                    ("CLIP's eye, untrained", "after")):
        learner = pretrain.AudioLearner(encoder.eval(), front_end)
        audio = learner.embed([clip.audio for clip in clips])
        cosines = audio @ targets.T                                              # (N, N)
        own = (cosines.argmax(1) == torch.arange(len(cosines))).float().mean().item()
        drawn = axes.imshow(cosines - cosines.mean(), cmap="RdBu_r", vmin=-0.8, vmax=0.8)
        axes.set(xlabel="text", ylabel="sound")
        axes.set_title(f"{title}: own text nearest for {100 * own:.0f} % of sounds", fontsize=10)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.7, label="cosine, its mean subtracted")
    save(figure, path)


def retrieval(path, model, clips, texts, count=4):
    """What is found for sounds spread evenly over the set: the sound, its frame, five texts."""
    audio = model.learner.embed([clip.audio for clip in clips])
    cosines = audio @ model.embed_texts(texts).T                                 # (N, N)
    figure, rows = blank(9, 1.35 * count, count, 3, width_ratios=(2, 1.2, 5))
    for row, i in zip(rows, np.linspace(0, len(clips) - 1, count).round().astype(int)):
        show_clip(row[0], row[1], clips[i], model.learner.front_end)
        for axes in row:
            axes.axis("off")
        for line, j in enumerate(cosines[i].argsort(descending=True)[:5].tolist()):
            style = {"color": LEARNED, "weight": "bold"} if j == i else {}
            row[2].text(0, 0.9 - 0.2 * line, f"{cosines[i, j]:.2f}  {texts[j]}", va="center",
                        fontsize=9, **style)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recording", help="for the grid: a sound file of about ten seconds")
    args = parser.parse_args()
    out, run = Path("assets"), Path("out/toy/pretrain")
    out.mkdir(exist_ok=True)
    model = evaluate.Model(run / "checkpoint.pt", CPU)
    clips = data.read_split("toy", "data/toy", "test")[:144]  # each thing once
    texts = [clip.captions[0] for clip in clips]
    idea(out / "idea.png", clips[90], texts[90], model.learner.front_end)
    training(out / "training.png", run / "log.jsonl")
    spectrogram(out / "spectrogram.png", clips[90].audio, model.learner.front_end)
    similarity(out / "similarity.png", model, clips, texts)
    retrieval(out / "retrieval.png", model, clips, texts)
    if args.recording:
        grid(out / "grid.png", args.recording)


if __name__ == "__main__":
    data.run(main)
