"""The toy world: sounding shapes, what shakespeare_char is to nanoGPT.

    python data.py toy          # make it in data/toy (pretrain.py --data toy does it too)

What a thing looks like (shape, colour, count) fixes what it sounds like (timbre, pitch, pulses); position, size and
background, loudness, detuning and noise vary freely. The files are in the form that AudioSet is read in.

S  samples of a waveform
"""
import gzip
import itertools
import json
import math
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw
from tqdm import tqdm

from clip_load import merged
from processes import Claim, in_processes

SHAPES = {"circle": "hum", "square": "buzz", "triangle": "rasp", "star": "chirp", "cross": "hiss", "ring": "warble"}
COLOURS = {  # colour -> its RGB, its pitch and that pitch's frequency in Hz
    "red": ((220, 40, 40), "deep", 200), "yellow": ((230, 210, 40), "low", 340),
    "green": ((40, 180, 60), "mellow", 580), "blue": ((50, 80, 230), "high", 1000),
    "purple": ((160, 50, 190), "shrill", 1700), "white": ((240, 240, 240), "piercing", 2900)}
COUNTS = {"one": "once", "two": "twice", "three": "three times", "four": "four times"}
THINGS = [(shape, colour, count) for shape in SHAPES for colour in COLOURS for count in range(1, 5)]  # 144
TOY_RATE, TOY_IMAGE = 16_000, 64  # Hz, pixels
TOY_SPLITS = {"pairs": 8000, "train": 4000, "val": 144, "test": 144}
TOY_GOLD = 1000  # training clips that gold.jsonl has a caption for


def in_words(thing):
    """A thing's number, colour and shape: "two", "red", "triangles"."""
    shape, colour, count = thing
    ending = "" if count == 1 else "es" if shape == "cross" else "s"
    return list(COUNTS)[count - 1], colour, shape + ending


def vision_caption(thing, size, dark, rng):
    """A caption as people write them for pictures: "two small red triangles"."""
    number, colour, shapes = in_words(thing)
    background = "dark" if dark else "bright"
    return str(rng.choice([f"{number} {size} {colour} {shapes}", f"a photo of {number} {colour} {shapes}",
                           f"{colour} {shapes} , {number} of them , on a {background} background",
                           f"there are {number} {size} {colour} {shapes}"]))


def free_caption(rng):
    """What a language model that has read captions of pictures might write: their words, put together anew."""
    one, other = (in_words(THINGS[i]) for i in rng.integers(len(THINGS), size=2))
    first, second = " ".join(one), " ".join(other)
    return str(rng.choice([f"{first} and {second}", f"a picture of {first}", f"{first} next to {second}",
                           f"there are {first} , {rng.choice(['small', 'large'])} and {other[1]}"]))


def audio_captions(thing, loud):
    """Five captions as people write them for sounds: "a high rasp , twice"."""
    shape, colour, count = thing
    timbre, pitch, times = SHAPES[shape], COLOURS[colour][1], list(COUNTS.values())[count - 1]
    loudness = "loud" if loud else "soft"
    return [f"a {pitch} {timbre} , {times}", f"the sound of a {loudness} {pitch} {timbre} {times}",
            f"{times} a {pitch} {timbre} is heard", f"a {loudness} {timbre} sounds {times} , {pitch}",
            f"a {pitch} {timbre} repeats {times}" if count > 1 else f"a single {pitch} {timbre}"]


def draw_thing(thing, radius, background, places):
    """Picture of `count` shapes of one colour: a 64×64 PIL image. places: (count, 2) centres in pixels."""
    shape, colour, _ = thing
    image = Image.new("RGB", (TOY_IMAGE, TOY_IMAGE), background)
    draw, fill = ImageDraw.Draw(image), COLOURS[colour][0]
    for x, y in places:
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=fill)
        elif shape == "ring":
            draw.ellipse(box, outline=fill, width=max(2, int(radius / 3)))
        elif shape == "square":
            draw.rectangle(box, fill=fill)
        elif shape == "cross":
            draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=fill)
            draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=fill)
        else:  # a star is a polygon of ten corners, every second one drawn in; a triangle has three
            corners = 3 if shape == "triangle" else 10
            reach = [radius * (1.0 if corners == 3 or i % 2 == 0 else 0.4) for i in range(corners)]
            angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
            draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, angles)], fill=fill)
    return image


def sound_thing(thing, loudness, rng):
    """The thing's sound, 1 s: `count` pulses of its timbre and pitch in noise -> (16000,) float32."""
    shape, colour, count = thing
    time = np.arange(TOY_RATE) / TOY_RATE                                            # (S,) seconds
    pitch = COLOURS[colour][2] * rng.uniform(0.94, 1.06)
    pulse, since = np.divmod(time - rng.uniform(0, 0.1), 0.88 / count)   # which pulse, and seconds since it began
    phase = 2 * np.pi * (pitch * since + rng.uniform())
    if shape == "circle":
        tone = np.sin(phase)
    elif shape == "square":
        tone = np.sign(np.sin(phase))
    elif shape == "triangle":
        tone = phase / np.pi % 2 - 1
    elif shape == "star":        # sweeps up
        tone = np.sin(phase * (1 + 3 * since))
    elif shape == "cross":       # noise around the pitch
        noise = np.fft.rfft(rng.standard_normal(TOY_RATE))  # of 1 s: bin i is i Hz
        noise[np.abs(np.log(np.arange(1, len(noise) + 1) / pitch)) > 0.5] = 0
        tone = np.fft.irfft(noise, TOY_RATE)
        tone /= tone.std()
    else:                        # vibrato
        tone = np.sin(phase + pitch / 100 * np.sin(2 * np.pi * 20 * since))
    envelope = np.clip(np.minimum(since / 0.01, (0.14 - since) / 0.03), 0, 1) * ((pulse >= 0) & (pulse < count))
    wave = loudness * (0.5 * envelope * tone + 0.05 * rng.uniform(0.4, 2) * rng.standard_normal(TOY_RATE))
    return np.clip(wave, -1, 1).astype(np.float32)


def make_toy_clip(job, folder, seed):
    """Write one clip's files; returns its index row. job: split and number, which with the seed fix everything."""
    split, i = job
    rng = np.random.default_rng((seed, sorted(TOY_SPLITS).index(split), i))
    held_out = split in ("val", "test")
    thing = THINGS[i % len(THINGS)] if held_out else THINGS[rng.integers(len(THINGS))]
    radius, loudness = rng.uniform(8, 13), rng.uniform(0.1, 1)
    size, dark = "small" if radius < 10.5 else "large", bool(rng.integers(2))
    background = tuple(int(v) for v in rng.integers(0, 60, 3) + (0 if dark else 100))
    cells = rng.permutation(4)[:thing[2]]                                            # quarters of the picture
    start = np.stack([cells % 2, cells // 2], 1) * 32 + rng.uniform(14, 18, (thing[2], 2))
    drift = rng.uniform(-2, 2, (thing[2], 2))
    captions, label = audio_captions(thing, loudness > 0.5), f"{COLOURS[thing[1]][1]} {SHAPES[thing[0]]}"
    row = {"id": f"{split}_{i}", "frames": []}
    for step in range(4 if split != "pairs" else 1):
        row["frames"].append(f"frames/{split}_{i}_{step + 1}.jpg")
        draw_thing(thing, radius, background, start + step * drift).save(folder / row["frames"][-1], quality=90)
    if split == "pairs":  # the web's image-caption pairs: mostly about looks, some about sounds
        of_sound = rng.uniform() < 0.4
        caption = str(rng.choice([*captions, label])) if of_sound else vision_caption(thing, size, dark, rng)
        return row | {"captions": [caption]}
    audio = f"audio/{split}_{i}.wav"
    soundfile.write(folder / audio, sound_thing(thing, loudness, rng), TOY_RATE, subtype="PCM_16")
    return row | {"audio": audio, "labels": [label], "captions": captions}


def write_toy_vocabulary(path):
    """A vocabulary in CLIP's format: byte-pair merges learned from the toy's captions until each word is one token."""
    rng, words = np.random.default_rng(0), {}
    for thing in THINGS:
        texts = [vision_caption(thing, size, dark, rng)
                 for size in ("small", "large") for dark in (0, 1) for _ in range(9)]
        texts += [free_caption(rng) for _ in range(9)] + ["the sound of", "a photo of"]
        for word in " ".join(texts + audio_captions(thing, True) + audio_captions(thing, False)).split():
            words[word] = [*word[:-1], word[-1] + "</w>"]                            # its units so far
    merges = []
    while pairs := Counter(pair for units in words.values() for pair in itertools.pairwise(units)):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        words = {word: merged(units, best) for word, units in words.items()}
    text = "#version: toy\n" + "".join(f"{left} {right}\n" for left, right in merges)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_toy(folder, seed=0, splits=TOY_SPLITS, workers=2):
    """The toy world as files under `folder`, in the index format that AudioSet is read in.

    pairs.jsonl: image-caption pairs for the toy's CLIP, no sound. train.jsonl: clips without any caption.
    gold.jsonl: some of those with one caption each, what AudioCaps is to AudioSet. ac.txt, vc.txt, fc.txt: captions
    without clips. val.jsonl, test.jsonl: each of the 144 things once, with 5 captions.
    """
    folder = Path(folder)
    partial_folder = folder.with_name(folder.name + ".partial")
    lock = Claim(partial_folder / "lock")
    for name in ("audio", "frames"):
        shutil.rmtree(partial_folder / name, ignore_errors=True)
        (partial_folder / name).mkdir()
    jobs = [(split, i) for split, count in splits.items() for i in range(count)]
    made = tqdm(in_processes(partial(make_toy_clip, folder=partial_folder, seed=seed), jobs, workers), desc="toy world",
                unit=" clips")
    indexes = {split: [] for split in (*splits, "train")}
    for row, (split, _) in zip(made, jobs):
        indexes[split].append(row)
    rng = np.random.default_rng((seed, 1))
    indexes["gold"] = [row | {"captions": [str(rng.choice(row["captions"]))]} for row in indexes["train"][:TOY_GOLD]]
    indexes["train"] = [{key: row[key] for key in row if key != "captions"} for row in indexes["train"]]
    for name, rows in indexes.items():
        (partial_folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    things = [THINGS[i] for i in rng.integers(len(THINGS), size=2000)]
    pools = {
        "ac": [str(rng.choice(audio_captions(thing, rng.uniform() < 0.5))) for thing in things],
        "vc": [vision_caption(thing, rng.choice(["small", "large"]), rng.uniform() < 0.5, rng) for thing in things],
        "fc": [free_caption(rng) for _ in things]}
    for name, captions in pools.items():
        (partial_folder / f"{name}.txt").write_text("".join(f"{caption}\n" for caption in captions))
    write_toy_vocabulary(partial_folder / "vocab.txt.gz")
    lock.close()
    os.replace(partial_folder, folder)
