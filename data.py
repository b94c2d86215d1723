"""Files to tensors: audio, filterbanks, masking, frames, readers of datasets (§3.2.2).

    python data.py toy                       # make the toy world in data/toy (pretrain.py --data toy does it too)
    python data.py extract --segments data/audioset/eval_segments.csv --videos VIDEOS    # videos -> WAV, frames, index
    python data.py stats --data audioset     # mean and std of its log-mel values, for --mean and --std
    python data.py pack --data audioset      # sounds as 16-bit samples in one file, for disks and formats that are slow

B  batch     S  samples of a waveform     T  frames of 10 ms     F  mel bins     R  side of an image in pixels
"""
import argparse
import csv
import ctypes
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from tokenize import TokenError

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torchaudio
from PIL import Image
from torch.utils.data import DataLoader


class Unreadable(ValueError):
    """One file that can't be used; the message names it. Training skips and counts it."""


class Silent(Unreadable):
    """A file, or the part of it that was asked for, whose samples are all equal."""


# --------------------------------------------------------------------------------------- audio

LONGEST = 6 * 3600  # seconds of a file that is read whole


def load_audio(path, sample_rate, seconds=None, start=0.0):
    """First channel of an audio file, `seconds` (all by default) from `start` on -> (S,) float32 in [-1, 1].

    Any format, rate and sample width that libsndfile knows; resampled to `sample_rate` Hz where it differs.
    Raises Unreadable (missing, empty, corrupt, below 25 ms, not finite), Silent.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            check_rate(path, rate)
            if start:
                file.seek(min(round(start * rate), file.frames))
            wanted, parts = math.ceil((seconds or LONGEST) * rate), []
            for at in range(0, wanted, 2 ** 16):  # in pieces: a header may promise any number of samples and channels
                size = min(2 ** 16, wanted - at)
                parts.append(file.read(size, dtype="float32", always_2d=True)[:, 0].copy())
                if len(parts[-1]) < size:
                    break
            else:
                if seconds is None:
                    raise Unreadable(f"{path}: longer than {LONGEST // 3600} hours; cut it")
    except (OSError, RuntimeError, TypeError, UnicodeError) as error:  # soundfile's; a .raw file; a name not in UTF-8
        raise Unreadable(f"{path}: can't be read as audio ({error})") from None
    if channels > 1:
        warnings.warn("some audio has more than one channel: its first is used (§3.2.2)", stacklevel=1)
    wave = np.concatenate(parts)                                                     # (S,)
    if len(wave) < 0.025 * rate:
        raise Unreadable(f"{path}: {1000 * len(wave) / rate:.0f} ms of audio; one frame needs 25 ms")
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    if wave.min() == wave.max():
        raise Silent(f"{path}: silent (every sample of its first channel is equal)")
    return resample(torch.from_numpy(wave), rate, sample_rate).clamp(-1, 1)


def check_rate(path, rate):
    """Raises Unreadable where a file's header names a rate (Hz) that no recording has."""
    if not 1000 <= rate <= 1_000_000:
        raise Unreadable(f"{path}: says it has {rate} samples a second; is its header damaged?")


def resample(wave, rate, new_rate):
    """Waveform (S,) at another rate in Hz, by a filter without delay; odd ratios are met to one in a thousand."""
    if rate == new_rate:
        return wave
    ratio = Fraction(new_rate, rate).limit_denominator(1000)  # exact for usual rates; odd ones need huge filters
    return torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)


def floating(waves):
    """16-bit samples -> float32 in [-1, 1); float32 stays as it is."""
    return waves.float() / 32768 if waves.dtype == torch.int16 else waves


def window_and_shift(sample_rate):
    """Samples of a frame's window (25 ms), and from one frame to the next (10 ms); rounded down, as Kaldi does."""
    return int(sample_rate * 0.025), int(sample_rate * 0.010)


@lru_cache
def window_and_mel_bins(sample_rate, mels, device):
    """Hanning window (25 ms,), FFT length, and triangular mel bins as Kaldi has them; made once.

    The mel bins are cut into four bands, each with the slice of FFT bins that it covers and a matrix (covered FFT bins,
    F / 4): in the whole matrix nearly everything is zero.
    """
    length, _ = window_and_shift(sample_rate)
    fft = 2 ** math.ceil(math.log2(length))

    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, sample_rate / 2))  # in mel
    width = (high - low) / (mels + 1)
    edges = low + torch.arange(mels + 2) * width     # (F + 2,) float32, as Kaldi's: in double they differ by 1e-5
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]                         # (F,)
    mel = 1127 * (1 + torch.arange(fft // 2 + 1)[:, None] * (sample_rate / fft) / 700).log()  # (FFT bins, 1)
    bins = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    bands = []
    for band in bins.to(device).tensor_split(4, dim=1):
        covered = band.any(1).nonzero().flatten().tolist() or [0]
        covered = slice(covered[0], covered[-1] + 1)
        bands.append((covered, band[covered].contiguous()))
    return torch.hann_window(length, periodic=False, device=device), fft, bands


def fbank(waves, sample_rate, mels=128):
    """Kaldi's log-mel filterbanks: waveforms (B, S) -> (B, T, F), on any device (§3.2.2).

    25 ms Hanning window every 10 ms, no energy, no dither: torchaudio.compliance.kaldi.fbank for a batch, its
    roundings included (the quietest bins lie 100 dB below the loudest, where the order of two operations shows).
    """
    window, fft, bands = window_and_mel_bins(sample_rate, mels, waves.device)
    length, shift = window_and_shift(sample_rate)
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
        power = (spectrum.real.square() + spectrum.imag.square()).flatten(0, 1)      # (b·T, FFT bins)
        energy = torch.cat([power[:, covered] @ band for covered, band in bands], 1)
        energy = energy.unflatten(0, frames.shape[:2])                               # (b, T, F)
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
        length, shift = window_and_shift(self.sample_rate)
        return (self.frames - 1) * shift + length

    def load(self, path, start=0.0):
        """Audio file from `start` s on -> (samples,) zero-padded; its length. Raises Unreadable."""
        return self.padded(load_audio(path, self.sample_rate, self.seconds + 0.1, start))

    def padded(self, wave):
        """A waveform's first `samples`, zero-padded on the right; its length."""
        wave = wave[:self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave))), len(wave)

    def load_window(self, place):
        """The same for a window (path, start) of a long recording, which may be silent for a while."""
        try:
            return self.load(*place)
        except Silent:
            return torch.zeros(self.samples), self.samples

    def __call__(self, waves, lengths):
        """Padded waveforms (B, samples) float32 or int16, lengths (B,) -> normalised filterbanks (B, 1, T, F).

        The waveform's mean, which the paper subtracts (§3.2.2), goes with each frame's own mean.
        """
        x = fbank(floating(waves), self.sample_rate, self.mels)                      # (B, T, F)
        length, shift = window_and_shift(self.sample_rate)
        heard = 1 + (lengths - length) // shift                                      # (B,) frames
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
    easy: bool = False      # in ESC-10, the easier part of ESC-50


@contextmanager
def reading(path, what="a CSV in UTF-8", missing="no such file; it belongs to the dataset as published"):
    """A dataset's text file, open. Raises FileNotFoundError that says `missing`, ValueError where it is not `what`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: {missing}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not {what} ({error})") from None


def inside(folder, name):
    """Path of a file below a folder, as a table or an index names it -> str. Raises ValueError where it leads out."""
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} leads out of {folder}; put a link into that folder instead")
    return os.path.join(folder, name)


def read_index(path, need=("audio",)):
    """An index, one JSON object a line -> list of Clip. The authors' lines (those with "dir") are read too.

    need: keys that every line must have besides "id". Raises FileNotFoundError, ValueError (file and line).
    """
    path, clips = Path(path), []
    names = class_names(path.parent)
    with reading(path, "UTF-8 text", "no such index. README.md, 'Your own sounds', says what it holds") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    clips.append(clip_of_line(line, path.parent, names, ("id", *need)))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not clips:
        raise ValueError(f"{path}: no clips in it")
    return clips


def clip_of_line(line, folder, names, need):
    """A line of the index in `folder` -> Clip. names: {mid: name} of AudioSet's classes. Raises ValueError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    row = row if isinstance(row, dict) else {}
    row = from_authors(row) if "dir" in row else row
    missing = [key for key in need if row.get(key) in (None, "", [])]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; a line here needs {', '.join(need)}")
    audio, frames, labels, captions = (row.get(key) or [] for key in ("audio", "frames", "labels", "captions"))
    for key, value in (("frames", frames), ("labels", labels), ("captions", captions)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key} must be a list of strings")
    if audio and not isinstance(audio, str):
        raise ValueError("audio must be a string")
    return Clip(str(row["id"]), inside(folder, audio) if audio else "",
                tuple(inside(folder, frame) for frame in frames),
                tuple(names.get(label, label) for label in labels), tuple(captions))


def from_authors(row):
    """A line of the authors' index, {dir}/aclip/{id}.{aclip} and {dir}/frame/{id}.{frame} -> as a line of ours."""
    def paths(kind):
        endings = row.get(kind) or []
        endings = endings if isinstance(endings, list) else [endings]
        return ["/".join(filter(None, (str(row["dir"]), kind, f"{row.get('id')}.{ending}"))) for ending in endings]

    return row | {"audio": (paths("clip") or paths("aclip") or [""])[0], "frames": paths("frame")}


def read_csv(path, need):
    """Rows of a CSV with a header as dicts. Raises FileNotFoundError, ValueError (missing columns)."""
    with reading(path) as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows or [{}], 2):
        missing = [column for column in need if row.get(column) is None]
        if missing:
            raise ValueError(f"{path}:{number}: no {', '.join(missing)}")
    return rows


def read_folds(table, name, label, sound):
    """A table whose clips have one label and a published fold -> list of Clip; underscores become spaces.

    name, label: its columns; sound: where in audio/, beside the table's folder, a row's sound lies.
    """
    audio = table.parent.parent / "audio"
    return [Clip(row[name], inside(audio, sound.format_map(row)), labels=(row[label].replace("_", " "),),
                 fold=int(row["fold"]) if re.fullmatch("[0-9]{1,2}", row["fold"]) else 0,
                 easy=row.get("esc10") == "True")
            for row in read_csv(table, (name, "fold", label))]


def read_esc50(folder, split="test"):
    """ESC-50 (or ESC-10) as published -> list of Clip, the same for every split."""
    return read_folds(READERS["esc50"].table(folder, split), "filename", "category", "{filename}")


def read_us8k(folder, split="test"):
    """UrbanSound8K as published -> list of Clip, the same for every split."""
    return read_folds(READERS["us8k"].table(folder, split), "slice_file_name", "class", "fold{fold}/{slice_file_name}")


CLOTHO_SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}


def read_clotho(folder, split="test"):
    """Clotho as published -> list of Clip with 5 captions."""
    sounds, keys = folder / CLOTHO_SPLITS[split], [f"caption_{i}" for i in range(1, 6)]
    return [Clip(row["file_name"], inside(sounds, row["file_name"]), captions=tuple(row[key] for key in keys))
            for row in read_csv(READERS["clotho"].table(folder, split), ("file_name", *keys))]


def read_coco_captions(folder, split="train"):
    """MSCOCO 2014's captions of a split (train, val) as published -> list of str, white space evened out."""
    name = f"captions_{split}2014.json"
    path = Path(next(iter(find_files(folder, (name,))), Path(folder) / name))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        return [" ".join(row["caption"].split()) for row in rows]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. {HOW_TO_GET['mscoco']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not MSCOCO's captions ({type(error).__name__}: {error})") from None


# AudioSet and AudioCaps come as ids of YouTube videos and a start; what is on disk is named after them, somehow.

CLASS_NAMES = "class_labels_indices.csv"
AUDIOSET_SPLITS = {"train": "unbalanced_train_segments", "val": "balanced_train_segments", "test": "eval_segments"}
AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64")
VIDEO = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".qt", ".avi", ".flv", ".f4v", ".3gp", ".3g2", ".ts", ".m2ts",
         ".mpg", ".mpeg", ".wmv", ".asf", ".ogv", ".m4a", ".mka", ".aac", ".wma", *AUDIO)  # sound alone comes last
YOUTUBE = re.compile(r"Y?([\w-]{11})(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?", re.ASCII)


def youtube_id(name):
    """`{id}`, `Y{id}`, `{id}_{start}` or `{id}_{start}_{end}` -> (id, start, end), numbers as they stand; or None."""
    found = YOUTUBE.fullmatch(name)
    return found and (found[1], *(number and float(number) for number in found.groups()[1:]))


def class_names(folder):
    """AudioSet's class_labels_indices.csv -> {mid: name} in the order of its index; {} where it is not in `folder`."""
    table = Path(folder) / CLASS_NAMES
    rows = read_csv(table, ("index", "mid", "display_name")) if table.exists() else []
    return {row["mid"]: row["display_name"] for row in rows}


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a YouTube video, as AudioSet and AudioCaps list it."""
    video: str
    start: float            # seconds
    end: float
    labels: tuple = ()      # AudioSet's mids
    captions: tuple = ()

    @property
    def id(self):
        return f"{self.video}_{f'{self.start:.3f}'.rstrip('0').rstrip('.')}"


def read_segments(path):
    """AudioSet's CSVs (three lines of comment) or AudioCaps' (a header, a row a caption) -> list of Segment."""
    with reading(path) as file:
        published_by_audioset = file.read(1) == "#"
        file.seek(0)
        lines = list(csv.reader(file, skipinitialspace=True)) if published_by_audioset else []
    if published_by_audioset:
        rows = [(number, line) for number, line in enumerate(lines, 1) if line and not line[0].startswith("#")]
    else:
        rows = [(number, (row["youtube_id"], row["start_time"], None, row["caption"]))
                for number, row in enumerate(read_csv(path, ("youtube_id", "start_time", "caption")), 2)]
    segments = {}
    for number, row in rows:
        try:
            video, start, end, text = row
            segment = Segment(video, float(start), float(start) + 10 if end is None else float(end))
            if not re.fullmatch(r"[\w-]{11}", video, re.ASCII):
                raise ValueError(f"{video!r} is no id of a YouTube video")
            if not (segment.start >= 0 and 0.025 <= segment.end - segment.start <= 3600):
                raise ValueError(f"{start} to {segment.end:g} s is no stretch to cut out")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        captions = segments.get(segment.id, segment).captions
        segments[segment.id] = (replace(segment, labels=tuple(text.split(","))) if published_by_audioset else
                                replace(segment, captions=(*captions, text)))
    if not segments:
        raise ValueError(f"{path}: no segments in it")
    return list(segments.values())


def find_files(folder, endings):
    """Files below a folder with one of these endings, links followed -> sorted list of paths."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(place, name) for name in names
                  if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found)


def by_video(paths):
    """Files named after YouTube videos -> {id: [(start or None, end or None, path)]}."""
    files = {}
    for path in paths:
        if parts := youtube_id(os.path.splitext(os.path.basename(path))[0]):
            files.setdefault(parts[0], []).append((*parts[1:], path))
    return files


def files_of(segment, files):
    """The segment's files -> [(whether it begins at the segment's start, path)], the likeliest first.

    Those with its start in the name (seconds or milliseconds), then those named by the id alone; pictures before sound.
    """
    def fits(start, end):
        milliseconds = start == round(1000 * segment.start, 3) and (end is None or end >= start + 25)
        return start is None or start == segment.start or milliseconds

    found = [(start is not None, path) for start, end, path in files.get(segment.video, ()) if fits(start, end)]
    return sorted(found, key=lambda file: (not file[0], VIDEO.index(os.path.splitext(file[1])[1].lower()), file[1]))


def read_youtube(name, folder, split):
    """A split of AudioSet or AudioCaps, with the sounds below `folder` -> list of Clip; audio "" where missing."""
    files, names = by_video(find_files(folder, AUDIO)), class_names(folder)
    return [Clip(segment.id, next((path for _, path in files_of(segment, files)), ""), captions=segment.captions,
                 labels=tuple(names.get(mid, mid) for mid in segment.labels))
            for segment in read_segments(READERS[name].table(folder, split))]


def add_labels(clips, folder):
    """Clips of AudioCaps with the labels that AudioSet (its CSVs in `folder`) gives to the same videos."""
    names = class_names(folder)
    tables = [Path(folder) / f"{table}.csv" for table in AUDIOSET_SPLITS.values()]
    labels = {segment.video: tuple(names.get(mid, mid) for mid in segment.labels)
              for table in tables if table.exists() for segment in read_segments(table)}
    return [replace(clip, labels=labels.get((youtube_id(clip.id) or [""])[0], ())) for clip in clips]


def held_out_by_audiocaps(clips, folder):
    """Which clips' videos are in AudioCaps' val or test set, so that training leaves them out -> list of bool.

    Raises FileNotFoundError where the clips are YouTube's and AudioCaps' tables are not in `folder`.
    """
    videos = [(youtube_id(Path(clip.id).stem) or youtube_id(Path(clip.audio).stem) or [None])[0] for clip in clips]
    if not any(videos):
        return [False] * len(clips)
    tables = [Path(folder) / f"{split}.csv" for split in ("val", "test")]
    missing = [str(table) for table in tables if not table.exists()]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)}: not there, so clips that AudioCaps tests with can't be left "
                                f"out of training. Get the tables (https://github.com/cdjkim/audiocaps) or pass "
                                f"--leave-out none")
    held_out = {segment.video for table in tables for segment in read_segments(table)}
    return [video in held_out for video in videos]


@dataclass(frozen=True)
class Reader:
    """How a dataset lies on disk as published."""
    read: callable      # (folder, split) -> list of Clip
    table: callable     # (folder, split) -> the file that lists its clips
    seconds: float      # of a clip that the paper hears


def us8k_root(folder):
    """Where the archive's content lies: the folder itself, or the UrbanSound8K/ that unpacking makes."""
    return folder / "UrbanSound8K" if (folder / "UrbanSound8K").is_dir() else folder


READERS = {
    "audioset": Reader(partial(read_youtube, "audioset"),
                       lambda folder, split: folder / f"{AUDIOSET_SPLITS[split]}.csv", 10),
    "audiocaps": Reader(partial(read_youtube, "audiocaps"), lambda folder, split: folder / f"{split}.csv", 10),
    "clotho": Reader(read_clotho, lambda folder, split: folder / f"clotho_captions_{CLOTHO_SPLITS[split]}.csv", 10),
    "esc50": Reader(read_esc50, lambda folder, split: folder / "meta/esc50.csv", 5),
    "us8k": Reader(read_us8k, lambda folder, split: us8k_root(folder) / "metadata/UrbanSound8K.csv", 4),
}

HOW_TO_GET = {
    "audioset": "AudioSet comes as ids: download the videos yourself, then see 'The full run' in README.md. "
                "To try without any download: python pretrain.py --data toy",
    "audiocaps": "AudioCaps: train.csv, val.csv and test.csv from https://github.com/cdjkim/audiocaps, and its clips "
                 "as 'Datasets' in README.md says, into data/audiocaps, or point --data at it",
    "esc50": "ESC-50: git clone https://github.com/karolpiczak/ESC-50 data/esc50, or point --data at it",
    "us8k": "UrbanSound8K: unpack UrbanSound8K.tar.gz from https://urbansounddataset.weebly.com into data/us8k, "
            "or point --data at it",
    "clotho": "Clotho: download clotho_audio_evaluation.7z and clotho_captions_evaluation.csv from "
              "https://zenodo.org/records/4783391 into data/clotho, or point --data at it",
    "mscoco": "MSCOCO's captions: unpack annotations_trainval2014.zip from https://cocodataset.org into data/mscoco",
    "toy": "The toy world: python data.py toy",
}


def dataset_folder(place):
    """data/<place> for a dataset's name, else `place` itself. Raises FileNotFoundError that says how to get it."""
    folder = Path("data") / place if place in HOW_TO_GET else Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. {HOW_TO_GET.get(place, 'Point --data at one')}")
    return folder


def read_split(name, folder, split="test", need=("audio",)):
    """A split (train, val, test) of a dataset -> list of Clip: `<split>.jsonl` where it is there, else as published.

    name: one of READERS. need: as for read_index. Raises FileNotFoundError, ValueError (file and line).
    """
    folder = Path(folder)
    index, table = folder / f"{split}.jsonl", READERS[name].table(folder, split)
    if index.exists():
        return read_index(index, need)
    if not table.exists():
        raise FileNotFoundError(f"{folder}: holds neither {index.name} nor {table.relative_to(folder)}. "
                                f"{HOW_TO_GET[name]}")
    return READERS[name].read(folder, split)


# ------------------------------------------------------------- files that are whole, or not there

def write_whole(path, save):
    """save(temporary path), then rename it: `path` is always whole. Raises OSError that names the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # what a killed run leaves, the next one overwrites
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # soundfile's and torch.save's are RuntimeErrors
        part.unlink(missing_ok=True)
        said = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or f"{said}; is the disk full?"
        raise OSError(f"{path}: can't be written ({reason}); the same command goes on from here") from None


def new_array(path, dtype, shape):
    """An array of zeros in a file, its room on the disk taken. Raises OSError that names the path.

    Memory that is mapped to a full disk ends the process at the first write to it, without a word.
    """
    def save(part):
        try:
            np.lib.format.open_memmap(part, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                with open(part, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(part))
        except OSError as error:
            need = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
            raise OSError(error.errno, f"{error.strerror}; it needs {need:.2g} GB") from None

    Path(path).unlink(missing_ok=True)  # makes room; who has mapped an earlier one keeps it
    write_whole(path, save)


def open_array(path):
    """The array in a file, not read into memory; None where there is none, for a flipped bit can do anything."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, TokenError):
        return None


def is_array(path, dtype, shape):
    """Whether there is such an array."""
    array = open_array(path)
    return array is not None and array.dtype == dtype and array.shape == shape


class Claim:
    """Holds a file that no other process can hold, until `close` or the process's end, however it ends.

    Raises ValueError, with the holder's identity, where another process has it; with `wait` it waits instead.
    """

    def __init__(self, path, wait=False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = self.path.open("a+", errors="backslashreplace")
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.file.seek(0)
                holder = f"{path} is held by {self.file.read().strip() or 'another process'}"
                if not wait:
                    raise ValueError(f"{holder}; wait for it, or choose another folder") from None
                print(f"{holder}; waiting", file=sys.stderr, flush=True)
                fcntl.lockf(self.file, fcntl.LOCK_EX)
            except OSError:
                return  # a file system without locks
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(self.file.fileno())):
                break  # and not a file that its holder has just removed
            self.file.close()
        self.file.truncate(0)
        print(Path(sys.argv[0]).name, *sys.argv[1:], f"(process {os.getpid()} on {socket.gethostname()}, since "
              f"{datetime.now().isoformat(' ', 'seconds')})", file=self.file, flush=True)

    def close(self):
        self.path.unlink(missing_ok=True)
        self.file.close()


def stamp(path):
    """Size and time of a file, (0, 0) where there is none."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


# --------------------------------------------------------------------------- many processes

def worker_starts(worker):
    """A worker process leaves Ctrl-C to its parent, does not inherit its handler of SIGTERM, and ends when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *error: None  # a thread that hands over tensors; errors in items travel to the parent
    if sys.platform == "linux":  # at once: the next run may already write the same files
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def in_processes(function, items, workers):
    """Iterate over function(item) in the order of items, computed by `workers` processes (0: by this one).

    A DataLoader that makes no batches hands single items to collate_fn, in workers that end when their parent does.
    """
    return DataLoader(items, batch_size=None, num_workers=workers, collate_fn=function, worker_init_fn=worker_starts)


# ------------------------------------------------------------------------------------ commands

def run(script):
    """Run a script's main; a stop and what a user can mend end in one line, not in a traceback, under torchrun too."""
    rank, name = int(os.environ.get("RANK", "0")), Path(sys.argv[0]).name
    if "RANK" not in os.environ:  # torchrun has its own way to end its processes
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        script()
    except KeyboardInterrupt:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # before they find nobody to send to, and say so
            worker.kill()
        print(f"\n{name}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        if rank > 0 and isinstance(error, FileNotFoundError):
            sys.exit(1)  # what is missing is missing for all: rank 0 says so
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of a worker's, without its traceback
        if isinstance(error, torch.OutOfMemoryError):
            message = f"{str(error).splitlines()[0]} Take less at a time: --micro-batch, --rows, --batch"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += "; make room, then the same command goes on from here"
        elif isinstance(error, RuntimeError):
            if not any(word in str(error) for word in ("gloo", "NCCL", "DataLoader worker (pid")):
                raise
            message = f"another process of this run ended ({message}); the same command goes on from here"
        message = f"{name}{f' (rank {rank})' if rank else ''}: {message}"
        if dist.is_initialized():  # the others wait for this rank: it must not wait for them
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    from prepare import extract, pack, statistics  # they import this file
    from toy import TOY_SPLITS, make_toy

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="toy | extract | stats | pack")
    command = partial(commands.add_parser, allow_abbrev=False)
    toy = command("toy", help="make the toy world")
    toy.add_argument("--out", default="data/toy", help="folder to make (data/toy)")
    toy.add_argument("--seed", type=int, default=0)
    cut = command("extract", help="cut WAV and frames out of videos")
    cut.add_argument("--segments", required=True, help="AudioSet's or AudioCaps' CSV, as published")
    cut.add_argument("--videos", required=True, help="folder with {id}.mp4, or {id}_{start}.mp4 that begin at start")
    cut.add_argument("--out", help="folder for audio/, frames/ and the index (the CSV's own)")
    cut.add_argument("--side", type=int, default=224, help="shorter side of a frame in pixels, 0: as it is (224)")
    stats = command("stats", help="mean and std of a dataset's log-mel values")
    packs = command("pack", help="sounds as 16-bit samples in one file, which training then reads")
    for each in (stats, packs):
        each.add_argument("--data", default="audioset", help="a dataset's name or its folder (audioset)")
    stats.add_argument("--split", default="train", choices=["train", "val", "test"], help="(train)")
    stats.add_argument("--mels", type=int, default=FrontEnd.mels, help="mel bins (128)")
    stats.add_argument("--frames", type=int, default=FrontEnd.frames, help="of 10 ms that the encoder hears (1000)")
    for each in (cut, stats, packs):
        each.add_argument("--sample-rate", type=int, default=FrontEnd.sample_rate, help="Hz (44100)")
        each.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    args = parser.parse_args()
    if args.command == "toy":
        if Path(args.out).exists():
            raise ValueError(f"{args.out} exists; delete it to make it anew")
        make_toy(args.out, args.seed)
        print(f"{args.out}: {', '.join(f'{split} {count}' for split, count in TOY_SPLITS.items())}; "
              f"next: python pretrain.py --data toy")
        return
    if args.sample_rate < 1000:
        raise ValueError("--sample-rate is in Hz, at least 1000")
    if args.command == "extract":
        if args.side < 0:
            raise ValueError("--side is in pixels, at least 0")
        if not Path(args.videos).is_dir():
            raise FileNotFoundError(f"{args.videos}: no such folder; --videos names the one with the downloaded videos")
        out = args.out or Path(args.segments).parent
        extract(args.segments, args.videos, out, args.sample_rate, args.side, args.workers)
        return
    if args.command == "stats" and min(args.mels, args.frames) < 1:
        raise ValueError("--mels and --frames are at least 1")
    folder = dataset_folder(args.data)
    names = {split: next((name for name, reader in READERS.items() if reader.table(folder, split).exists()), None)
             for split in ("train", "val", "test")}  # of the dataset that the folder holds as published
    there = [split for split, name in names.items() if name or (folder / f"{split}.jsonl").exists()]
    splits = [args.split] if args.command == "stats" else there or ["train"]
    clips = [clip for split in splits for clip in read_split(names[split] or "audioset", folder, split) if clip.audio]
    if args.command == "pack":
        out, count, skipped = pack(folder, clips, args.sample_rate, args.workers)
        print(f"{out}: {count} sounds, {(out / 'waves.i16').stat().st_size / 1e9:.2f} GB, {skipped} unreadable; "
              f"training at {args.sample_rate} Hz reads it from now on")
    else:
        mean, std, read = statistics(clips, FrontEnd(args.sample_rate, args.mels, args.frames), args.workers)
        print(f"{read} clips at {args.sample_rate} Hz, {args.mels} mel bins, {args.frames} frames:\n"
              f"--mean {mean:.6f} --std {std:.6f}")


if __name__ == "__main__":
    run(main)
