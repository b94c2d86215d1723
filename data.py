"""Files to tensors: audio, filterbanks, masking, frames, readers of datasets, the toy world (§3.2.2).

    python data.py toy                       # make the toy world in data/toy (pretrain.py --data toy does it too)

B  batch     S  samples of a waveform     T  frames of 10 ms     F  mel bins     R  side of an image in pixels
"""
import argparse
import csv
import gzip
import json
import math
import os
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image, ImageDraw
from tqdm import tqdm


class Unreadable(ValueError):
    """One file that can't be used; the message names it. Training skips and counts it."""


# --------------------------------------------------------------------------------------- audio

def load_audio(path, sample_rate, seconds=None):
    """First channel of an audio file, its first `seconds` (all by default) -> (S,) float32 in [-1, 1].

    Any format, rate and sample width that libsndfile knows; resampled to `sample_rate` Hz where it differs.
    Raises Unreadable (missing, empty, corrupt, below 25 ms, silent, not finite).
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            wave = file.read(-1 if seconds is None else math.ceil(seconds * rate), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError) as error:  # soundfile's own is a RuntimeError; TypeError: a .raw file
        raise Unreadable(f"{path}: can't be read as audio ({error})") from None
    if not 1000 <= rate <= 1_000_000:
        raise Unreadable(f"{path}: says it has {rate} samples a second; is its header damaged?")
    if channels > 1:
        warnings.warn("some audio has more than one channel: its first is used (§3.2.2)", stacklevel=1)
    wave = wave[:, 0]                                                                # (S,)
    if len(wave) < 0.025 * rate:
        raise Unreadable(f"{path}: {1000 * len(wave) / rate:.0f} ms of audio; one frame needs 25 ms")
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    if wave.min() == wave.max():
        raise Unreadable(f"{path}: silent (every sample of its first channel is equal)")
    wave = torch.from_numpy(wave)
    if rate != sample_rate:
        ratio = Fraction(sample_rate, rate).limit_denominator(1000)  # exact for usual rates; odd ones need huge filters
        wave = torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)
    return wave.clamp(-1, 1)


@lru_cache
def window_and_mel_bins(sample_rate, mels, device):
    """Hanning window (25 ms,) and triangular mel bins (FFT bins, F), as Kaldi has them; made once."""
    length = int(sample_rate * 0.025)
    fft = 2 ** math.ceil(math.log2(length))

    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, sample_rate / 2))  # in mel
    width = (high - low) / (mels + 1)
    edges = low + torch.arange(mels + 2) * width     # (F + 2,) float32, as Kaldi's: in double they differ by 1e-5
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]                         # (F,)
    mel = 1127 * (1 + torch.arange(fft // 2 + 1)[:, None] * (sample_rate / fft) / 700).log()  # (FFT bins, 1)
    bins = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return torch.hann_window(length, periodic=False, device=device), bins.to(device)


def fbank(waves, sample_rate, mels=128):
    """Kaldi's log-mel filterbanks: waveforms (B, S) -> (B, T, F), on any device (§3.2.2).

    25 ms Hanning window every 10 ms, no energy, no dither: torchaudio.compliance.kaldi.fbank for a batch, its
    roundings included (the quietest bins lie 100 dB below the loudest, where the order of two operations shows).
    """
    window, mel_bins = window_and_mel_bins(sample_rate, mels, waves.device)
    length, shift, fft = len(window), int(sample_rate * 0.010), 2 * (len(mel_bins) - 1)
    if waves.shape[1] < length:
        raise ValueError(f"{waves.shape[1]} samples; one frame at {sample_rate} Hz needs {length}")
    out = []
    # A CPU's temporaries stay in its cache if it takes some 5 s of sound at a time; a GPU wants many clips at once.
    for x in waves.split(max(1, (2 ** 18 if waves.device.type == "cpu" else 2 ** 25) // waves.shape[1])):
        frames = x.unfold(1, length, shift)                                          # (b, T, 25 ms)
        frames = frames - frames.mean(2, keepdim=True)
        padded = frames.new_zeros(*frames.shape[:2], fft)                            # (b, T, FFT)
        emphasised = frames[:, :, 1:] - 0.97 * frames[:, :, :-1]  # the first sample needs none: its window is 0
        torch.mul(emphasised, window[1:], out=padded[:, :, 1:length])
        spectrum = torch.fft.rfft(padded)                                            # (b, T, FFT bins)
        energy = (spectrum * spectrum.conj()).real @ mel_bins                        # (b, T, F)
        out.append(energy.clamp(min=torch.finfo(torch.float32).eps).log())
    return torch.cat(out)


@dataclass(frozen=True)
class FrontEnd:
    """What stands between a waveform and the audio encoder; travels inside every checkpoint."""
    sample_rate: int = 44_100   # Hz, AudioSet's files' own
    mels: int = 128             # mel bins
    frames: int = 1000          # of 10 ms
    mean: float = -4.93839311   # of AudioSet's log-mel values at 44.1 kHz
    std: float = 5.75751113

    @property
    def seconds(self):
        """How much of a clip the encoder hears."""
        return self.frames * 0.010

    @property
    def samples(self):
        """Samples that fill all frames (a window reaches 15 ms past its frame)."""
        return (self.frames - 1) * int(self.sample_rate * 0.010) + int(self.sample_rate * 0.025)

    def load(self, path):
        """Audio file -> (samples,) float32 without its mean, zero-padded, and its length before. Raises Unreadable."""
        wave = load_audio(path, self.sample_rate, seconds=self.seconds + 0.1)[:self.samples]
        return torch.nn.functional.pad(wave - wave.mean(), (0, self.samples - len(wave))), len(wave)

    def __call__(self, waves, lengths):
        """Padded waveforms (B, samples), lengths (B,) -> normalised filterbanks (B, 1, T, F)."""
        x = fbank(waves, self.sample_rate, self.mels)                                # (B, T, F)
        heard = 1 + (lengths - int(self.sample_rate * 0.025)) // int(self.sample_rate * 0.010)
        padding = torch.arange(self.frames, device=x.device) >= heard[:, None]       # (B, T)
        x = x.masked_fill(padding[:, :, None], 0.0)  # zeros on the right *before* normalising, as the authors do
        return ((x - self.mean) / self.std)[:, None]                                 # (B, 1, T, F)


def mask(x, draws):
    """One band of up to 1/5 of the frames and one of up to 1/4 of the mel bins set to 0 (§3.2.2).

    x: (B, 1, T, F) normalised filterbanks; draws: (B, 4) uniform in [0, 1): width and place of either band.
    """
    for dim, share, width, place in ((2, 5, draws[:, 0], draws[:, 1]), (3, 4, draws[:, 2], draws[:, 3])):
        size = x.shape[dim]
        width = (width * (size // share)).floor()                                    # (B,)
        start = (place * (size - width)).floor()                                     # (B,)
        at = torch.arange(size, device=x.device)
        band = (at >= start[:, None]) & (at < (start + width)[:, None])              # (B, T) or (B, F)
        x = x.masked_fill(band[:, None, :, None] if dim == 2 else band[:, None, None, :], 0.0)
    return x


# -------------------------------------------------------------------------------------- images

IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def preprocess_image(image, size=224):
    """PIL image of any mode -> (3, R, R) float32: shorter side to R (bicubic), centre crop, CLIP's normalisation."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    if short != size:
        image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)          # (R, R, 3)
    pixels = (pixels / 255 - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                                    # (3, R, R)


def load_image(path, size=224):
    """Image file -> (3, R, R) float32. Raises Unreadable (missing, corrupt, truncated)."""
    try:
        with Image.open(path) as image:
            return preprocess_image(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{path}: can't be read as an image ({error})") from None


# ------------------------------------------------------------------------------------- readers

@dataclass(frozen=True, slots=True)
class Clip:
    """One line of an index. Paths are joined with the index's folder."""
    id: str
    audio: str = ""
    frames: tuple = ()      # paths of the clip's images, in time
    labels: tuple = ()
    captions: tuple = ()
    fold: int = 0           # of a dataset with published folds, from 1


HOW_TO_GET = {
    "audioset": "AudioSet comes as ids: download the videos yourself, then see 'The full run' in README.md. "
                "To try without any download: python pretrain.py --data toy",
    "esc50": "ESC-50: git clone https://github.com/karolpiczak/ESC-50 data/esc50, or point --data at it",
    "clotho": "Clotho: download clotho_audio_evaluation.7z and clotho_captions_evaluation.csv from "
              "https://zenodo.org/records/4783391 into data/clotho, or point --data at it",
    "toy": "The toy world: python data.py toy",
}


def dataset_folder(place):
    """data/<place> for a dataset's name, else `place` itself. Raises FileNotFoundError that says how to get it."""
    folder = Path("data") / place if place in HOW_TO_GET else Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. {HOW_TO_GET.get(place, 'Point --data at one')}")
    return folder


def read_index(path, need=("audio",)):
    """An index, one JSON object a line -> list of Clip.

    need: keys that every line must have besides "id". Raises FileNotFoundError, ValueError (file and line).
    """
    path, clips = Path(path), []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from None
                missing = [key for key in ("id", *need) if not isinstance(row, dict) or row.get(key) in (None, "", [])]
                if missing:
                    raise ValueError(f"{path}:{number}: lacks {', '.join(missing)}; a line here needs "
                                     f"{', '.join(('id', *need))}")
                lists = {key: row.get(key, []) for key in ("frames", "labels", "captions")}
                wrong = [key for key, value in lists.items()
                         if not isinstance(value, list) or not all(isinstance(item, str) for item in value)]
                if wrong or not isinstance(row.get("audio", ""), str):
                    raise ValueError(f"{path}:{number}: {', '.join(wrong) or 'audio'} must be "
                                     f"{'a list of strings' if wrong else 'a string'}")
                clips.append(Clip(str(row["id"]), str(path.parent / row["audio"]) if row.get("audio") else "",
                                  tuple(str(path.parent / frame) for frame in lists["frames"]),
                                  tuple(lists["labels"]), tuple(lists["captions"])))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such index. README.md, 'Index', says what it holds") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if not clips:
        raise ValueError(f"{path}: no clips in it")
    return clips


def read_csv(path, need):
    """Rows of a CSV with a header as dicts. Raises FileNotFoundError, ValueError (missing columns)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; it belongs to the dataset as published") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 ({error})") from None
    for number, row in enumerate(rows or [{}], 2):
        missing = [column for column in need if row.get(column) is None]
        if missing:
            raise ValueError(f"{path}:{number}: no {', '.join(missing)}")
    return rows


def read_esc50(folder):
    """ESC-50 (or ESC-10) as published -> list of Clip with one label and a fold; underscores become spaces."""
    folder = Path(folder)
    return [Clip(row["filename"], str(folder / "audio" / row["filename"]), labels=(row["category"].replace("_", " "),),
                 fold=int(row["fold"]) if row["fold"].isdigit() else 0)
            for row in read_csv(folder / "meta" / "esc50.csv", ("filename", "fold", "category"))]


def read_clotho(folder, split="evaluation"):
    """Clotho as published -> list of Clip with 5 captions."""
    folder, keys = Path(folder), [f"caption_{i}" for i in range(1, 6)]
    return [Clip(row["file_name"], str(folder / split / row["file_name"]), captions=tuple(row[key] for key in keys))
            for row in read_csv(folder / f"clotho_captions_{split}.csv", ("file_name", *keys))]


# ------------------------------------------------------------------------------- the toy world
# What shakespeare_char is to nanoGPT: sounding shapes. What a thing looks like (shape, colour, count) fixes what
# it sounds like (timbre, pitch, pulses); position, size and background, loudness, detuning and noise vary freely.

SHAPES = {"circle": "hum", "square": "buzz", "triangle": "rasp", "star": "chirp", "cross": "hiss", "ring": "warble"}
COLOURS = {  # colour -> its RGB, its pitch and that pitch's frequency in Hz
    "red": ((220, 40, 40), "deep", 200), "yellow": ((230, 210, 40), "low", 340),
    "green": ((40, 180, 60), "mellow", 580), "blue": ((50, 80, 230), "high", 1000),
    "purple": ((160, 50, 190), "shrill", 1700), "white": ((240, 240, 240), "piercing", 2900)}
COUNTS = {"one": "once", "two": "twice", "three": "three times", "four": "four times"}
THINGS = [(shape, colour, count) for shape in SHAPES for colour in COLOURS for count in range(1, 5)]  # 144
TOY_RATE, TOY_IMAGE = 16_000, 64  # Hz, pixels


def vision_caption(thing, size, dark, rng):
    """A caption as people write them for pictures: "two small red triangles"."""
    shape, colour, count = thing
    number = list(COUNTS)[count - 1]
    shapes = shape if count == 1 else shape + "es" if shape == "cross" else shape + "s"
    background = "dark" if dark else "bright"
    return str(rng.choice([f"{number} {size} {colour} {shapes}", f"a photo of {number} {colour} {shapes}",
                           f"{colour} {shapes} , {number} of them , on a {background} background",
                           f"there are {number} {size} {colour} {shapes}"]))


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
        noise = np.fft.rfft(rng.standard_normal(TOY_RATE))
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
    row = {"id": f"{split}_{i}", "frames": []}
    for step in range(4 if split != "pairs" else 1):
        row["frames"].append(f"frames/{split}_{i}_{step + 1}.jpg")
        draw_thing(thing, radius, background, start + step * drift).save(folder / row["frames"][-1], quality=90)
    if split == "pairs":  # the web's image-caption pairs: mostly about looks, some about sounds
        texts = [*audio_captions(thing, loudness > 0.5), f"{COLOURS[thing[1]][1]} {SHAPES[thing[0]]}"]
        row["captions"] = [str(rng.choice(texts)) if rng.uniform() < 0.4 else vision_caption(thing, size, dark, rng)]
        return row
    row["audio"] = f"audio/{split}_{i}.wav"
    soundfile.write(folder / row["audio"], sound_thing(thing, loudness, rng), TOY_RATE, subtype="PCM_16")
    row["labels"] = [f"{COLOURS[thing[1]][1]} {SHAPES[thing[0]]}"]
    if held_out:
        row["captions"] = audio_captions(thing, loudness > 0.5)
    return row


TOY_SPLITS = {"pairs": 8000, "train": 4000, "val": 144, "test": 144}


def make_toy(folder, seed=0, splits=TOY_SPLITS, workers=2):
    """The toy world as files under `folder`, in the index format that AudioSet is read in.

    pairs.jsonl: image-caption pairs for the toy's CLIP, no sound. train.jsonl: clips without any caption.
    val.jsonl, test.jsonl: each of the 144 things once, with 5 captions.
    """
    folder = Path(folder)
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    for name in ("audio", "frames"):
        (partial_folder / name).mkdir(parents=True)
    jobs = [(split, i) for split, count in splits.items() for i in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(partial(make_toy_clip, folder=partial_folder, seed=seed), jobs, chunksize=100),
                         total=len(jobs), desc="toy world", unit=" clips"))
    for split in splits:
        with open(partial_folder / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row, job in zip(rows, jobs) if job[0] == split)
    write_toy_vocabulary(partial_folder / "vocab.txt.gz")
    os.replace(partial_folder, folder)


def write_toy_vocabulary(path):
    """A vocabulary in CLIP's format whose merges spell the toy's words, so that each word is one token."""
    rng, words = np.random.default_rng(0), set()
    for thing in THINGS:
        texts = [vision_caption(thing, size, dark, rng)
                 for size in ("small", "large") for dark in (0, 1) for _ in range(9)]
        words.update(" ".join(texts + audio_captions(thing, True) + audio_captions(thing, False)).split())
    merges = dict.fromkeys((word[:i], word[i] + ("</w>" if i == len(word) - 1 else ""))
                           for word in sorted(words) for i in range(1, len(word)))
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: toy\n" + "".join(f"{left} {right}\n" for left, right in merges))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["toy"], help="toy: make the toy world")
    parser.add_argument("--out", default="data/toy", help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        sys.exit(f"{args.out} exists; delete it to make it anew")
    make_toy(args.out, args.seed)
    print(f"{args.out}: {', '.join(f'{split} {count}' for split, count in TOY_SPLITS.items())}; "
          f"next: python pretrain.py --data toy")
