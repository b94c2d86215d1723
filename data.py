"""Files to tensors: sound, filterbanks, masks, frames; every dataset's reader; videos to clips (§3.2.2).

    python data.py toy                                          # make the toy world in data/toy
    python data.py extract --videos FOLDER --out data/mine      # your own videos -> WAV, frames, index
    python data.py extract --segments data/audioset/eval_segments.csv --videos VIDEOS
    python data.py stats --data audioset                        # for pretrain.py's --mean and --std

B  batch     S  samples of a waveform     T  frames of 10 ms     F  mel bins     R  side of an image
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # OpenMP's threads must not spin beside other work;
os.environ.setdefault("KMP_BLOCKTIME", "1")      # it reads these when torch loads it (macOS: this one)

import argparse
import csv
import ctypes
import gzip
import hashlib
import itertools
import json
import math
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

# ----------------------------------------------------------------------- errors and processes

class Unreadable(ValueError):
    """One file that can't be used; the message names it. Training skips and counts it."""


def run(main):
    """Call a script's main; what a user can mend ends in a message instead of a traceback."""
    name = os.path.basename(sys.argv[0])
    if "RANK" in os.environ:
        end_with_parent(os.getppid(), worker=None)  # torchrun, however it ends
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: stopped; the same command goes on from here")
    except (OSError, ValueError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same, and then torchrun ends this process
        text = str(error)
        if "Original Traceback" in text:  # out of a worker process
            text = text.strip().splitlines()[-1].partition(": ")[2]
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for the other ranks
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_whole(path, save):
    """save(temporary path), then rename it: `path` is whole or not there, whenever we are killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def end_with_parent(parent, worker):
    """At a worker process's start: leave Ctrl-C to its parent, and end when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # killed before we could ask
        os._exit(1)


def in_processes(function, items, workers):
    """function(item) for each item, in order, computed by worker processes (0: here)."""
    return DataLoader(items, batch_size=None, num_workers=workers, collate_fn=function,
                      worker_init_fn=partial(end_with_parent, os.getpid()))


# -------------------------------------------------------------------------------------- sound

DAMAGED = (av.FFmpegError, OSError, ValueError, RuntimeError, ArithmeticError, LookupError,
           TypeError, AttributeError, MemoryError)  # what decoders raise


@contextmanager
def opened(path, kind):
    """A file opened by PyAV: its container and its streams of a kind, "audio" or "video".

    What fails while it is open is Unreadable. A cover picture is no video.
    """
    try:
        # ignore_length: a WAV's header may be wrong about it
        with av.open(f"file:{path}", options={"ignore_length": "1"}) as container:
            streams = [stream for stream in container.streams if stream.type == kind
                       and stream.codec_context
                       and not stream.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise Unreadable(f"{path}: has no {'sound' if kind == 'audio' else 'pictures'}")
            yield container, streams
    except Unreadable:
        raise
    except DAMAGED as error:
        raise Unreadable(f"{path}: can't be read ({type(error).__name__}: {error})") from None


def decoded(container, stream):
    """Frames of a stream as they come; packets that can't be decoded are left out."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def channels_of(frame):
    """A decoded stretch of sound -> (channels, n) float32 in [-1, 1]."""
    samples = frame.to_ndarray()                            # (channels, n) or (1, n·channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / (np.iinfo(samples.dtype).max + 1)
    return samples.astype(np.float32)


def header_is_right(path):
    """Whether a WAV's or AIFF's header knows the file's size; FLAC's is tested by libsndfile."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        kind, said = file.read(4), file.read(4)
    order = {b"RIFF": "little", b"FORM": "big"}.get(kind)
    if order:
        return abs(8 + int.from_bytes(said, order) - size) <= 1
    return kind == b"fLaC"


def sound_blocks(path):
    """A sound file from its beginning to its end: yields (rate in Hz, (channels, n) float32).

    libsndfile reads WAV, FLAC and AIFF that know their length; FFmpeg decodes everything else, and
    no header's length is believed. Raises Unreadable.
    """
    try:
        if header_is_right(path):
            with soundfile.SoundFile(path) as file:
                plain = file.subtype.startswith(("PCM", "FLOAT", "DOUBLE"))
                if plain and 0 < file.frames < 2 ** 40:
                    for block in file.blocks(2 ** 16, dtype="float32", always_2d=True):
                        yield file.samplerate, block.T
                    return
    except (OSError, RuntimeError, TypeError, UnicodeError) as error:
        if not os.path.isfile(path):
            raise Unreadable(f"{path}: no such file") from None
        if isinstance(error, OSError) and not os.access(path, os.R_OK):
            raise Unreadable(f"{path}: {error}") from None
    with opened(path, "audio") as (container, streams):
        for frame in decoded(container, streams[0]):
            yield frame.sample_rate, channels_of(frame)


def check_wave(path, wave, rate, others=0.0):
    """Raises Unreadable where a waveform (S,) can't be heard; others: peak of other channels."""
    if not 1000 <= rate <= 1_000_000:
        raise Unreadable(f"{path}: says it has {rate} samples a second; is its header damaged?")
    if len(wave) < 0.025 * rate:
        raise Unreadable(f"{path}: {1000 * len(wave) / rate:.0f} ms of sound; needed are 25")
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    if wave.min() == wave.max():
        more = "; another channel is not, but the first is heard (§3.2.2)" if others > 0 else ""
        raise Unreadable(f"{path}: its first channel is silent{more}")


def resample(wave, rate, new_rate):
    """Waveform (S,) at another rate in Hz; odd ratios are met to one in a thousand."""
    if rate == new_rate:
        return wave
    ratio = Fraction(new_rate, rate).limit_denominator(1000)  # the filter grows with its terms
    return torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)


def load_audio(path, sample_rate, seconds=None):
    """First channel of a sound file, all of it or its first `seconds` -> (S,) float32 in [-1, 1].

    Any format, rate and sample width; resampled to `sample_rate` Hz. Raises Unreadable.
    """
    parts, length, others, rate = [], 0, 0.0, 16_000
    for rate, block in sound_blocks(path):
        parts.append(block[0])
        length += block.shape[1]
        others = max(others, np.ptp(block[1:]) if len(block) > 1 and block.size else 0.0)
        if seconds and length >= seconds * rate:
            break
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    wave = wave[:math.ceil(seconds * rate)] if seconds else wave
    check_wave(path, wave, rate, others)
    return resample(torch.from_numpy(wave.copy()), rate, sample_rate).clamp(-1, 1)


def audio_windows(path, sample_rate, seconds):
    """A recording of any length in windows, read once: yields (start, end, waveform (S,)).

    Windows of `seconds`, each half over the one before; the last one ends where the file ends. What
    is at most 2 % longer than a window is one. Raises Unreadable, at the end if all is silent.
    """
    history, at, peak = np.zeros(0, np.float32), 0, 0.0  # at: samples before `history`
    done = 0                                             # where the last window ended
    for rate, block in sound_blocks(path):
        history = np.concatenate([history, block[0]])
        peak = max(peak, float(np.ptp(block[0])) if block.size else 0.0)
        size = round(seconds * rate)
        start = done - size // 2 if done else 0
        while at + len(history) > start + 1.02 * size:
            wave = history[start - at:start - at + size]
            yield start / rate, (start + size) / rate, window(path, wave, rate, sample_rate)
            done, start = start + size, start + size - size // 2
            keep = max(0, done - size - at)              # the last window may begin from here on
            history, at = history[keep:], at + keep
    end = at + len(history)
    if not done:
        check_wave(path, history, rate if len(history) else sample_rate)
        yield 0.0, end / rate, window(path, history, rate, sample_rate)
    else:
        start = max(at, end - size)
        yield start / rate, end / rate, window(path, history[start - at:], rate, sample_rate)
    if peak == 0:
        raise Unreadable(f"{path}: its first channel is silent")


def window(path, wave, rate, sample_rate):
    """A window's samples (S,), at `sample_rate`. Raises Unreadable where they are not finite."""
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    return resample(torch.from_numpy(wave.copy()), rate, sample_rate).clamp(-1, 1)


# -------------------------------------------------------------------------------- filterbanks

def frame_length_and_shift(sample_rate):
    """Samples of a frame's window (25 ms) and from frame to frame (10 ms), rounded as Kaldi does."""
    return int(sample_rate * 0.025), int(sample_rate * 0.010)


@lru_cache
def window_and_mel_bins(sample_rate, mels, device):
    """Hanning window (25 ms,), FFT length, triangular mel bins (FFT bins, F) as Kaldi's; made once."""
    length, _ = frame_length_and_shift(sample_rate)
    fft = 2 ** math.ceil(math.log2(length))
    low = 1127 * math.log(1 + 20 / 700)                     # in mel; the bins reach from 20 Hz
    high = 1127 * math.log(1 + sample_rate / 2 / 700)
    width = (high - low) / (mels + 1)
    edges = low + torch.arange(mels + 2) * width            # (F + 2,) float32, as Kaldi's
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]                     # (F,)
    hertz = torch.arange(fft // 2 + 1) * (sample_rate / fft)
    mel = 1127 * (1 + hertz / 700).log()[:, None]                                # (FFT bins, 1)
    rising = (mel - left) / (centre - left)                                      # (FFT bins, F)
    falling = (right - mel) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return torch.hann_window(length, periodic=False, device=device), fft, triangles.to(device)


def fbank(waves, sample_rate, mels=128):
    """Kaldi's log-mel filterbanks of a batch: waveforms (B, S) -> (B, T, F), on any device.

    25 ms Hanning windows every 10 ms, no energy, no dither. The order of operations is Kaldi's: in
    the quietest bins, 100 dB below the loudest, another one shows. Raises ValueError (too short).
    """
    window, fft, mel_bins = window_and_mel_bins(sample_rate, mels, waves.device)
    length, shift = frame_length_and_shift(sample_rate)
    if waves.shape[1] < length:
        raise ValueError(f"{waves.shape[1]} samples; a frame at {sample_rate} Hz needs {length}")
    banks = []
    # a CPU's temporaries stay in its cache for some 5 s of sound; a GPU takes many clips at once
    together = 2 ** 18 if waves.device.type == "cpu" else 2 ** 25
    for x in waves.split(max(1, together // waves.shape[1])):
        frames = x.unfold(1, length, shift)                                      # (b, T, 25 ms)
        # differs from the paper, which subtracts the waveform's mean: a frame's contains it
        frames = frames - frames.mean(dim=2, keepdim=True)
        emphasised = frames[:, :, 1:] - 0.97 * frames[:, :, :-1]  # the first one's window is 0
        padded = frames.new_zeros(*frames.shape[:2], fft)                        # (b, T, FFT)
        torch.mul(emphasised, window[1:], out=padded[:, :, 1:length])
        spectrum = torch.fft.rfft(padded)                                        # (b, T, FFT bins)
        power = spectrum.real.square() + spectrum.imag.square()
        banks.append((power @ mel_bins).clamp(min=torch.finfo(torch.float32).eps).log())
    return torch.cat(banks)                                                      # (B, T, F)


@dataclass(frozen=True)
class FrontEnd:
    """What stands between a waveform and the audio encoder; travels inside every checkpoint."""
    sample_rate: int = 44_100   # Hz, that of AudioSet's files
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
        """Samples that fill all frames; the last window reaches 15 ms past its frame."""
        length, shift = frame_length_and_shift(self.sample_rate)
        return (self.frames - 1) * shift + length

    def pad(self, wave):
        """A waveform's first `samples`, zeros on its right; how many are its own."""
        wave = wave[:self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave))), len(wave)

    def load(self, path):
        """A sound file -> (samples,) padded, its length. Raises Unreadable."""
        # 0.1 s more: for the last window's 15 ms and the resampling filter
        return self.pad(load_audio(path, self.sample_rate, self.seconds + 0.1))

    def __call__(self, waves, lengths):
        """Padded waveforms (B, samples), lengths (B,) -> normalised filterbanks (B, 1, T, F)."""
        x = fbank(waves, self.sample_rate, self.mels)                            # (B, T, F)
        length, shift = frame_length_and_shift(self.sample_rate)
        heard = 1 + (lengths - length) // shift                                  # (B,) frames
        padding = torch.arange(self.frames, device=x.device) >= heard[:, None]   # (B, T)
        # differs from the paper, which does not say: padded *before* normalising (authors' code)
        x = x.masked_fill(padding[:, :, None], 0.0)
        return ((x - self.mean) / self.std)[:, None]                             # (B, 1, T, F)


def mask(x, draws):
    """A band of up to 1/5 of the frames and one of up to 1/4 of the mel bins set to 0 (§3.2.2).

    x: (B, 1, T, F) normalised; draws: (B, 4) uniform in [0, 1): width and place of either band.
    """
    # differs from the paper, which masks "one-fifth" and "one-forth": up to (authors' code)
    _, _, T, F = x.shape
    in_time = band(T, T // 5, draws[:, 0], draws[:, 1])                          # (B, T)
    in_frequency = band(F, F // 4, draws[:, 2], draws[:, 3])                     # (B, F)
    return x.masked_fill(in_time[:, None, :, None] | in_frequency[:, None, None, :], 0.0)


def band(size, widest, width, place):
    """Which of `size` places lie in a band drawn by width and place, (B,) each -> (B, size)."""
    width = (width * widest).floor()
    start = (place * (size - width)).floor()
    at = torch.arange(size, device=width.device)
    return (at >= start[:, None]) & (at < (start + width)[:, None])


# ------------------------------------------------------------------------------------- images

IMAGE_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)  # CLIP's
IMAGE_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def preprocess_image(image, size=224):
    """PIL image of any mode -> (3, R, R) float32: shorter side to R, centre crop, normalised."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)),
                         Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = (np.asarray(image, np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD      # (R, R, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                # (3, R, R)


def load_image(path, size=224):
    """Image file -> (3, R, R) float32. Raises Unreadable (missing, damaged)."""
    try:
        with Image.open(path) as image:
            return preprocess_image(ImageOps.exif_transpose(image), size)
    except (*DAMAGED, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{path}: can't be read as an image ({error})") from None


# ----------------------------------------------------------------------------------- datasets

@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of a dataset. Paths are joined with the dataset's folder."""
    id: str
    audio: str = ""         # "" where the sound is not on disk
    frames: tuple = ()      # paths of its images, in time
    labels: tuple = ()
    captions: tuple = ()
    fold: int = 0           # of a dataset with published folds, from 1
    easy: bool = False      # in ESC-10, the easier part of ESC-50

    @property
    def middle_frame(self):
        """Path of the second frame, the paper's middle one (§3.2.2), or of the only one."""
        return self.frames[:2][-1]


AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".aifc",
         ".wma", ".mka", ".au", ".caf", ".w64", ".amr", ".ac3", ".mp2", ".weba", ".spx")
VIDEO = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".qt", ".avi", ".flv", ".f4v", ".3gp", ".3g2", ".ts",
         ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".ogv")
AUDIOSET_CLASSES = "class_labels_indices.csv"
TABLES = {  # dataset -> its publisher's tables, by split
    "audioset": {"train": "unbalanced_train_segments.csv", "val": "balanced_train_segments.csv",
                 "test": "eval_segments.csv"},
    "audiocaps": {"train": "train.csv", "val": "val.csv", "test": "test.csv"},
    "vggsound": dict.fromkeys(("train", "val", "test"), "vggsound.csv"),
    "clotho": {"train": "clotho_captions_development.csv", "val": "clotho_captions_validation.csv",
               "test": "clotho_captions_evaluation.csv"},
    "esc50": dict.fromkeys(("train", "val", "test"), "meta/esc50.csv"),
    "us8k": dict.fromkeys(("train", "val", "test"), "metadata/UrbanSound8K.csv"),
}
SECONDS = {"audioset": 10, "audiocaps": 10, "vggsound": 10, "clotho": 10, "esc50": 5, "us8k": 4}
HOW_TO_GET = {
    "audioset": "AudioSet comes as ids: download the videos yourself, then python data.py extract "
                "(README.md, 'Datasets'). To try without any download: python pretrain.py --data toy",
    "audiocaps": "AudioCaps: train.csv, val.csv, test.csv from https://github.com/cdjkim/audiocaps, "
                 "and its clips, into data/audiocaps",
    "vggsound": "VGGSound: vggsound.csv and its clips (Loie/VGGSound on the Hugging Face hub), then "
                "python data.py extract --segments data/vggsound/vggsound.csv --videos FOLDER",
    "clotho": "Clotho: clotho_captions_evaluation.csv and clotho_audio_evaluation.7z, unpacked, from "
              "https://zenodo.org/records/4783391 into data/clotho",
    "esc50": "ESC-50: git clone https://github.com/karolpiczak/ESC-50 data/esc50",
    "us8k": "UrbanSound8K: https://urbansounddataset.weebly.com, unpacked into data/us8k",
    "mscoco": "MSCOCO: annotations_trainval2014.zip from https://cocodataset.org, unpacked into "
              "data/mscoco",
    "toy": "The toy world: python data.py toy",
}


def dataset_folder(place):
    """data/<place> for a dataset's name, else `place`. Raises FileNotFoundError (how to get it)."""
    folder = Path("data") / place if place in HOW_TO_GET else Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. "
                                f"{HOW_TO_GET.get(place, 'Point --data at one')}")
    return folder


def table_of(name, folder, split):
    """Path of the publisher's table of a split."""
    folder = Path(folder)
    inner = folder / "UrbanSound8K"  # the folder that unpacking makes
    return (inner if name == "us8k" and inner.is_dir() else folder) / TABLES[name][split]


def read_text(path):
    """A table's or an index's text. Raises FileNotFoundError, ValueError (not UTF-8)."""
    try:
        raw = Path(path).read_bytes()
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; it belongs to the dataset") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error}); save it as that") from None


def read_table(path, need, columns=None):
    """Rows of a CSV -> [(line, {column: field})], fields stripped, lines of blanks left out.

    need: columns that must be there and not empty; columns: their names where the file has no
    header. Raises FileNotFoundError, ValueError (file, line, and what was found instead).
    """
    text = read_text(path)
    first = text.partition("\n")[0]
    lines = csv.reader(text.splitlines(keepends=True), skipinitialspace=True,
                       delimiter=max(",;\t", key=first.count))
    rows = []
    try:
        for fields in lines:
            fields = [field.strip() for field in fields]
            if not any(fields) or columns and lines.line_num <= 3 and fields[0].startswith("#"):
                continue  # AudioSet's tables begin with comments
            if columns is None:
                columns = [field.lower() for field in fields]
                if missing := [column for column in need if column not in columns]:
                    raise ValueError(f"no column {', '.join(missing)}; there are {fields}")
                continue
            row = dict(zip(columns, fields))
            if len(fields) != len(columns) or not all(row[column] for column in need):
                raise ValueError(f"needed are {', '.join(columns)}; found: {fields}. Fields with "
                                 f"commas or line breaks belong in quotes, and none may be empty")
            rows.append((lines.line_num, row))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}:{lines.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def spelling(name):
    """A file's name, the same for NFC and NFD, for endings of any case, for blanks around it."""
    stem, ending = os.path.splitext(name.strip())
    return unicodedata.normalize("NFC", stem) + ending.lower()


@lru_cache
def spellings(folder):
    """{spelling: name} of a folder's files."""
    return {spelling(name): name for name in os.listdir(folder)} if os.path.isdir(folder) else {}


def inside(folder, name):
    """Path of a file below a folder, however a table spells it. Raises ValueError (leads out)."""
    name = name.replace("\\", "/")
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} leads out of {folder}; put a link into that folder instead")
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        parent, base = os.path.split(path)
        path = os.path.join(parent, spellings(parent).get(spelling(base), base))
    return path


def read_index(path, need=()):
    """An index, one JSON object a line -> list of Clip. The authors' lines are read, too.

    need: keys that every line must have besides "id". Raises FileNotFoundError, ValueError.
    """
    path, clips = Path(path), []
    names = class_names(path.parent)
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            if line.strip():
                clips.append(clip_of_line(json.loads(line), path.parent, names, ("id", *need)))
        except (ValueError, RecursionError) as error:  # json's is a ValueError
            kind = "not a JSON object" if isinstance(error, json.JSONDecodeError) else "can't be used"
            raise ValueError(f"{path}:{number}: {kind} ({error})") from None
    if not clips:
        raise ValueError(f"{path}: no clips in it")
    return clips


def clip_of_line(row, folder, names, need):
    """A line of the index in `folder` -> Clip. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("each line is one {…}")
    keys = sorted(row)
    if "dir" in row:  # the authors': {dir}/aclip/{id}.{aclip}, {dir}/frame/{id}.{frame}
        sounds, frames = row.get("aclip") or row.get("clip") or [], row.get("frame") or []
        sounds, frames = ([x] if isinstance(x, str) else x for x in (sounds, frames))
        row = row | {"audio": "".join(f"{row['dir']}/aclip/{row.get('id')}.{x}" for x in sounds[:1]),
                     "frames": [f"{row['dir']}/frame/{row.get('id')}.{x}" for x in frames]}
    missing = [key for key in need if row.get(key) in (None, "", [])]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; has {', '.join(keys)}")
    for key in ("frames", "labels", "captions"):
        value = row.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key} must be a list of strings")
    if not isinstance(row.get("audio", ""), str):
        raise ValueError("audio must be a string")
    frames = tuple(inside(folder, frame) for frame in row.get("frames") or [])
    labels = tuple(names.get(label, label) for label in row.get("labels") or [])
    audio = inside(folder, row["audio"]) if row.get("audio") else ""
    return Clip(str(row["id"]), audio, frames, labels, tuple(row.get("captions") or []))


def read_split(name, folder, split="test", need=()):
    """A split of a dataset -> list of Clip: <split>.jsonl where it is there, else as published.

    need: keys that an index's lines must have. Raises FileNotFoundError, ValueError.
    """
    folder = Path(folder)
    index = folder / f"{split}.jsonl"
    if index.exists():
        return read_index(index, need)
    table = table_of(name, folder, split) if name in TABLES else index
    if not table.exists():
        raise FileNotFoundError(f"{folder}: holds neither {index.name} nor "
                                f"{table.relative_to(folder)}. {HOW_TO_GET.get(name, '')}")
    if name in ("audioset", "audiocaps", "vggsound"):
        return read_youtube(table, split)
    clips = []
    for _, row in read_table(table, NEEDED[name]):
        if name == "clotho":
            sounds = folder / table.stem.removeprefix("clotho_captions_")
            captions = tuple(" ".join(row[f"caption_{i}"].split()) for i in range(1, 6))
            name_of = row["file_name"]
            clips.append(Clip(name_of, inside(sounds, name_of), captions=captions))
            continue
        sound = row["filename"] if name == "esc50" else f"fold{row['fold']}/{row['slice_file_name']}"
        label = row["category" if name == "esc50" else "class"].replace("_", " ")
        clips.append(Clip(os.path.basename(sound), inside(table.parent.parent / "audio", sound),
                          labels=(label,), fold=int(row["fold"]) if row["fold"].isdigit() else 0,
                          easy=row.get("esc10") == "True"))
    return clips


NEEDED = {"clotho": ("file_name", *(f"caption_{i}" for i in range(1, 6))),
          "esc50": ("filename", "fold", "category"), "us8k": ("slice_file_name", "fold", "class")}


def read_coco_captions(folder, split):
    """MSCOCO 2014's captions of a split (train, val) -> list of str."""
    name = f"captions_{split}2014.json"
    path = next(iter(find_files(folder, (name,))), None)
    if not path:
        raise FileNotFoundError(f"{folder}: no {name} in it. {HOW_TO_GET['mscoco']}")
    try:
        rows = json.loads(read_text(path))["annotations"]
        return [" ".join(row["caption"].split()) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not MSCOCO's captions ({error})") from None


# AudioSet, AudioCaps and VGGSound come as YouTube's ids; what is on disk is named after them.

@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a video, as a table lists it or as a user's own video is cut."""
    video: str
    start: float            # seconds
    end: float
    labels: tuple = ()
    captions: tuple = ()
    split: str = ""
    numbers: tuple = ()     # AudioCaps' own ids

    @property
    def id(self):
        return f"{self.video}_{round(self.start, 3):g}"


def read_segments(path):
    """AudioSet's tables (which begin with #), VGGSound's, AudioCaps' -> list of Segment."""
    path = Path(path)
    if path.name == "vggsound.csv":
        columns = ["youtube_id", "start_time", "label", "split"]
    elif read_text(path).startswith("#"):
        columns = ["youtube_id", "start_time", "end_time", "positive_labels"]
    else:
        columns = None
    segments = {}
    for line, row in read_table(path, columns or ("youtube_id", "start_time", "caption"), columns):
        try:
            start = float(row["start_time"])
            segment = Segment(row["youtube_id"], start, float(row.get("end_time") or start + 10))
            if not re.fullmatch(r"[\w-]{11}", segment.video, re.ASCII):
                raise ValueError(f"{segment.video!r} is no id of a YouTube video")
            if not (segment.start >= 0 and 0.025 <= segment.end - segment.start <= 3600):
                raise ValueError(f"{start:g} to {segment.end:g} s is no stretch to cut out")
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        known = segments.get(segment.id, segment)
        labels = row.get("positive_labels", "").split(",") if "positive_labels" in row else ()
        segments[segment.id] = replace(
            known, labels=(row["label"],) if "label" in row else tuple(filter(None, labels)),
            split=row.get("split", ""),
            captions=(*known.captions, " ".join(row["caption"].split())) if "caption" in row else (),
            numbers=known.numbers + ((row["audiocap_id"],) if "audiocap_id" in row else ()))
    return list(segments.values())


def find_files(folder, endings):
    """Files below a folder with one of these endings, links followed -> sorted list of paths."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [os.path.join(place, name) for name in names
                  if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found)


YOUTUBE_NAMES = (  # {id}, Y{id}, {id}_{start}, {id}_{start}_{end}, …; Title [{id}], Title-{id}
    re.compile(r"Y?(?P<id>[\w-]{11})(?P<rest>(?:[ _.,-]+\d+)*)", re.ASCII),
    re.compile(r".*[\[-](?P<id>[\w-]{11})\]?(?P<rest>)"))


def by_name(paths):
    """Files by what they may be named after, a YouTube id or a number -> {name: [(rest, path)]}."""
    files = {}
    for path in paths:
        stem = re.sub(r"\.f\d+$", "", os.path.splitext(os.path.basename(path))[0])  # yt-dlp's
        names = {(stem, "")}
        for pattern in YOUTUBE_NAMES:
            if found := pattern.fullmatch(stem):
                names.add((found["id"], found["rest"]))
        for name, rest in names:
            files.setdefault(name, []).append((rest, path))
    return files


def files_of(segment, files):
    """The segment's files -> [(whether it begins where the segment does, path)], likeliest first.

    Those with its start in the name, in seconds or milliseconds; then those named by the id alone.
    """
    found = [(True, path) for number in segment.numbers for _, path in files.get(number, ())]
    for rest, path in files.get(segment.video, ()):
        numbers = re.findall(r"\d+(?:[.,]\d+)?|\d+", rest)
        first = {float(numbers[0].replace(",", ".")), float(re.split("[.,]", numbers[0])[0])} \
            if numbers else set()
        if not numbers or first & {segment.start, 1000 * segment.start}:
            found.append((bool(numbers), path))
    videos_first = sorted(found, key=lambda file: (not file[0], file[1].lower().endswith(AUDIO), file[1]))
    return list(dict.fromkeys(videos_first))


def class_names(folder):
    """AudioSet's classes {mid: name}, in the order of its table; {} where `folder` lacks that."""
    table = Path(folder) / AUDIOSET_CLASSES
    rows = read_table(table, ("index", "mid", "display_name")) if table.exists() else []
    return {row["mid"]: row["display_name"] for _, row in rows}


def labels_of(clips, folder):
    """Labels in AudioSet's order where `folder` holds its classes, else the clips' own, sorted."""
    used, known = {label for clip in clips for label in clip.labels}, class_names(folder).values()
    if known and (strange := used - set(known)):
        raise ValueError(f"{folder}: a clip's label {min(strange)!r} is not in {AUDIOSET_CLASSES}")
    return list(known) or sorted(used)


def read_youtube(table, split):
    """A published table, with the sounds found below its folder -> list of Clip."""
    files, names = by_name(find_files(table.parent, AUDIO)), class_names(table.parent)
    clips = []
    for segment in read_segments(table):
        if segment.split in ("", split):
            found = files_of(segment, files)
            labels = tuple(names.get(mid, mid) for mid in segment.labels)
            clips.append(Clip(segment.id, found[0][1] if found else "", (), labels, segment.captions))
    return clips


def add_labels(clips, folder):
    """AudioCaps' clips with the labels that AudioSet, whose tables are in `folder`, gives them."""
    names, labels = class_names(folder), {}
    for table in TABLES["audioset"].values():
        if (Path(folder) / table).exists():
            for segment in read_segments(Path(folder) / table):
                labels[segment.video] = tuple(names.get(mid, mid) for mid in segment.labels)
    return [replace(clip, labels=labels.get(clip.id[:11], clip.labels)) for clip in clips]


def held_out_by_audiocaps(clips, tables, folder):
    """Which clips' videos AudioCaps tests, so that training leaves them out -> list of bool.

    tables: folder of AudioCaps' tables. Where they are missing, clips of `folder` are refused if
    it is AudioSet's or VGGSound's (it holds their tables); one's own videos have none to fear.
    """
    paths = [Path(tables) / f"{split}.csv" for split in ("val", "test")]
    if not all(path.exists() for path in paths):
        published = [table for name in ("audioset", "vggsound") for table in TABLES[name].values()]
        if any((Path(folder) / table).exists() for table in published):
            raise FileNotFoundError(f"{tables}: no val.csv and test.csv, so what AudioCaps tests "
                                    f"can't be left out of training. {HOW_TO_GET['audiocaps']}; or "
                                    f"--leave-out none")
        return [False] * len(clips)
    videos = {segment.video for path in paths for segment in read_segments(path)}
    return [clip.id[:11] in videos for clip in clips]


# ------------------------------------------------------------------------- videos to clips

SLACK = 0.5  # seconds that a video may lack: tables are in whole seconds, videos are not


def frames_from(path, kind, start, track=0):
    """Decoded frames of a file from `start` (s from its beginning) or before on: (seconds, frame).

    Seeks to before it. Where nothing comes then, or too late, from the beginning without a seek.
    """
    for seeks in (True, False):
        with opened(path, kind) as (container, streams):
            zero, came = (container.start_time or 0) / av.time_base, False
            if seeks:
                container.seek(max(0, int((start + zero) * av.time_base)))
            for frame in decoded(container, streams[track]):
                if frame.time is None:
                    continue
                if seeks and not came and (frame.time - zero > start or kind == "video"
                                           and not frame.key_frame):  # too late, or not whole
                    if frame.time - zero > start:
                        break
                    continue
                came = True
                yield frame.time - zero, frame
            if came:
                return


def cut_audio(path, start, end, sample_rate):
    """First channel of `start` to `end` (s) of a video or sound file -> (S,) float32.

    Of several sound tracks the first that is not silent. Raises Unreadable.
    """
    with opened(path, "audio") as (_, streams):
        tracks = len(streams)
    for track in range(tracks):
        wave, rate = cut_track(path, start, end, track)
        if np.ptp(wave) > 0:
            break
    check_wave(path, wave, rate)
    return resample(torch.from_numpy(wave), rate, sample_rate)


def cut_track(path, start, end, track):
    """A sound track's first channel from `start` to `end` -> (S,) float32, its rate in Hz."""
    wave, covered, at = None, 0, None
    for seconds, frame in frames_from(path, "audio", max(0, start - 1), track):  # codecs' run-up
        rate, samples = frame.sample_rate, channels_of(frame)[0]
        if wave is None:
            wave = np.zeros(round((end - start) * rate), np.float32)
            covered = max(0, round((seconds - start) * rate))  # before it sets in, it is silent
        due = round((seconds - start) * rate)
        at = due if at is None or abs(due - at) > 0.02 * rate else at  # stamps may be in whole ms
        first, last = max(at, 0), min(at + len(samples), len(wave))
        if last > first:
            wave[first:last] = samples[first - at:last - at]
            covered += last - first
        at += len(samples)
        if at >= len(wave):
            break
    if wave is None or covered < len(wave) - SLACK * rate:
        heard = 0 if wave is None else covered / rate
        raise Unreadable(f"{path}: has {heard:.1f} s of sound between {start:g} and {end:g} s")
    return wave, rate


def cut_frames(path, times, side):
    """The pictures shown at these times (s, ascending) -> list of PIL images, upright.

    Shorter side at most `side` pixels. Raises Unreadable where a picture is missing; one that comes
    up to half a second late will do.
    """
    times, images, last, since = list(times), [], None, 0.0
    for seconds, frame in frames_from(path, "video", times[0]):
        while times and seconds > times[0] + 0.002:  # until then the last one was shown
            if last is None and seconds > times[0] + SLACK:
                break
            images.append(upright(last or frame, side))
            del times[0]
        if not times or (last is None and seconds > times[0] + SLACK):
            break
        last, since = frame, seconds
    if last is not None:  # the last one stays for a while
        stays = since + max(SLACK, float((last.duration or 0) * last.time_base))
        images += [upright(last, side) for at in times if at <= stays]
        times = [at for at in times if at > stays]
    if times:
        raise Unreadable(f"{path}: has no picture at {times[0]:.1f} s")
    return images


def upright(frame, side):
    """A decoded picture turned as its file says -> PIL image, shorter side at most `side`."""
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    factor = min(1, side / min(image.size)) if side else 1
    return image.resize([round(length * factor) for length in image.size],
                        Image.Resampling.BICUBIC)


def own_pieces(folder):
    """A folder of videos in pieces of 10 s, a last one of 5 s or more -> [(Segment, files)]."""
    pieces = []
    for path in find_files(folder, VIDEO):
        name = os.path.splitext(os.path.relpath(path, folder))[0].replace("/", "_")
        try:
            with opened(path, "video") as (container, streams):
                length = (container.duration or 0) / av.time_base
                if not length:  # as a recorder leaves it that writes into a pipe
                    times = [packet.pts * packet.time_base for packet in container.demux(streams[0])
                             if packet.pts is not None]
                    length = float(max(times) - min(times))
        except Unreadable:
            length = 10.0  # the piece that says why it can't be read
        for start in range(0, max(1, int(length + 5) // 10) * 10, 10):
            segment = Segment(name, float(start), max(start + 5.0, min(start + 10.0, length)))
            pieces.append((segment, [(False, path)]))
    return pieces


@dataclass(frozen=True)
class Extraction:
    """Cuts segments out of their videos: audio/xx/{id}.wav, frames/xx/{id}_1.jpg … 4 in `out`."""
    out: Path
    sample_rate: int    # Hz
    side: int           # pixels of a frame's shorter side, 0: as it is

    def paths(self, segment):
        """Where a segment's files go, relative to `out`. 4,000 folders share two million clips."""
        place = f"{segment.video[:2]}/{segment.id}"
        return f"audio/{place}.wav", [f"frames/{place}_{i}.jpg" for i in range(1, 5)]

    def __call__(self, job):
        """(segment, its files) -> (status, reason): done, no pictures, unreadable or missing."""
        segment, files = job
        audio, frames = self.paths(segment)
        if (self.out / frames[-1]).exists():  # which is written last
            if soundfile.info(self.out / audio).samplerate == self.sample_rate:
                return "done", ""
        status, reasons = "missing", [f"no file named after {segment.video}"]
        wave = images = None
        for begins_there, path in files:
            offset = segment.start if begins_there else 0.0
            start, end = segment.start - offset, segment.end - offset
            try:
                if wave is None:
                    wave = cut_audio(path, start, end, self.sample_rate)
            except Unreadable as error:
                reasons.append(str(error))
            try:
                if images is None:  # 4 equally spaced (§3.2.2), both ends included
                    times = [start + i * (end - start) / 3 for i in range(4)]
                    images = cut_frames(path, times, self.side)
            except Unreadable as error:
                reasons.append(str(error))
        if files:
            status = "unreadable" if wave is None else "no pictures" if images is None else "done"
            reasons = reasons[1:]
        if wave is not None:
            write_whole(self.out / audio, lambda part: soundfile.write(
                part, wave.clamp(-1, 1).numpy(), self.sample_rate, "PCM_16"))
            for name, image in zip(frames, images or []):
                write_whole(self.out / name, partial(image.save, format="JPEG", quality=95))
        return status, "" if status == "done" else "; ".join(reasons)


def validates(video):
    """Whether a video of a set without validation validates: one in fifty, by its name's hash."""
    return int(hashlib.sha256(video.encode("utf-8", "replace")).hexdigest(), 16) % 50 == 0


def extract(table, videos, out, sample_rate=FrontEnd.sample_rate, side=224, workers=2):
    """Cut a table's segments, or without a table pieces of 10 s, out of the videos in a folder.

    Leaves <split>.jsonl and <split>_report.csv (a line a segment: id, status, reason) in `out`.
    Called again it goes on. Raises FileNotFoundError, ValueError (nothing found).
    """
    out = Path(out)
    if not Path(videos).is_dir():
        raise FileNotFoundError(f"{videos}: no such folder; --videos names the one with the videos")
    if table:
        files = by_name(find_files(videos, VIDEO + AUDIO))
        jobs = [(segment, files_of(segment, files)) for segment in read_segments(table)]
        names = class_names(Path(table).parent)
        by_table = {name: split for split, name in TABLES["audioset"].items()}
        default = by_table.get(Path(table).name, Path(table).stem)
    else:
        jobs, names, default = own_pieces(videos), {}, "train"
    splits = []
    for segment, _ in jobs:
        split = segment.split or default
        own_validation = segment.split == "train" or not table
        splits.append("val" if own_validation and validates(segment.video) else split)
    if not table and "val" not in splits and len({segment.video for segment, _ in jobs}) > 1:
        first = jobs[0][0].video  # few videos: one of them validates
        splits = ["val" if segment.video == first else "train" for segment, _ in jobs]
    cut, counts = Extraction(out, sample_rate, side), Counter()
    indexes, reports = {split: [] for split in splits}, {split: [] for split in splits}
    found = sum(bool(files) for _, files in jobs)
    bar = tqdm(in_processes(cut, jobs, workers), unit=" clips", desc=f"{found} of {len(jobs)} found")
    for (status, reason), (segment, _), split in zip(bar, jobs, splits):
        counts[status] += 1
        reports[split].append((segment.id, status, reason))
        if status == "unreadable":
            bar.write(f"skipped: {reason}", file=sys.stderr)
        if status in ("done", "no pictures"):
            audio, frames = cut.paths(segment)
            row = {"id": segment.id, "audio": audio, "frames": frames if status == "done" else [],
                   "labels": [names.get(mid, mid) for mid in segment.labels],
                   "captions": segment.captions}
            row = {key: value for key, value in row.items() if value}
            indexes[split].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split in indexes:
        with open(out / f"{split}_report.csv", "w", newline="", errors="backslashreplace") as file:
            csv.writer(file).writerows([("id", "status", "reason"), *reports[split]])
        if indexes[split]:
            text = "".join(indexes[split])
            write_whole(out / f"{split}.jsonl", lambda part, text=text: part.write_text(text))
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not any(indexes.values()):
        raise ValueError(f"{videos}: no clip came out of {len(jobs)} segments ({summary or 'no video'}"
                         f"); reasons in {out}/*_report.csv. Is it the right folder?")
    print(f"{len(jobs)} segments: {summary}; index and reasons in {out}\n"
          f"next: python pretrain.py --data {out}")


def statistics(clips, front_end, workers=2):
    """Mean and std of clips' log-mel values as the encoder gets them, padding included; their number.

    Raises ValueError where no clip can be read.
    """
    total, read = torch.zeros(3, dtype=torch.float64), 0
    plain = replace(front_end, mean=0.0, std=1.0)
    for sums in tqdm(in_processes(partial(sums_of, front_end=plain), clips, workers), unit=" clips"):
        if sums is not None:
            total, read = total + sums, read + 1
    if not read:
        raise ValueError(f"not one of {len(clips)} clips can be read")
    count, first, second = total.tolist()
    return first / count, math.sqrt(second / count - (first / count) ** 2), read


def sums_of(clip, front_end):
    """Number, sum and sum of squares of a clip's log-mel values (3,); None for a bad clip."""
    try:
        wave, length = front_end.load(clip.audio)
    except Unreadable as error:
        print(f"skipped: {error}", file=sys.stderr)
        return None
    x = front_end(wave[None], torch.tensor([length])).double()                   # (1, 1, T, F)
    return torch.stack([torch.tensor(x.numel()).double(), x.sum(), x.square().sum()])


# ------------------------------------------------------------------------------ the toy world
# Sounding shapes, what shakespeare_char is to nanoGPT. What a thing looks like (shape, colour, count)
# fixes what it sounds like (timbre, pitch, pulses); all else varies freely.

SHAPES = {"circle": "hum", "square": "buzz", "triangle": "rasp", "star": "chirp", "cross": "hiss",
          "ring": "warble"}
COLOURS = {  # colour -> its RGB, its pitch, and that pitch in Hz
    "red": ((220, 40, 40), "deep", 200), "yellow": ((230, 210, 40), "low", 340),
    "green": ((40, 180, 60), "mellow", 580), "blue": ((50, 80, 230), "high", 1000),
    "purple": ((160, 50, 190), "shrill", 1700), "white": ((240, 240, 240), "piercing", 2900)}
COUNTS = {"one": "once", "two": "twice", "three": "three times", "four": "four times"}
THINGS = list(itertools.product(SHAPES, COLOURS, range(1, 5)))  # 144
TOY_RATE, TOY_IMAGE = 16_000, 64  # Hz, pixels
TOY_SPLITS = {"pairs": 8000, "train": 4000, "val": 576, "test": 144}
TOY_GOLD = 1000  # training clips that gold.jsonl has a caption for
# What makes the paper's world hard, and its method work:
OFF_SCREEN = 0.5  # of the training videos show another thing than the one that sounds
OF_SOUND = 0.03   # of the web's captions name the sound, not the looks; none is a bare label,
SAYS_SO = 0.5     # and every second of these says "the sound of"
UNKNOWN = ("star", "cross", "ring")  # captions of pictures (VC) know only half of what there is
TWO_THINGS = 0.1  # of a language model's captions (FC), which know all, add a thing not there


def in_words(thing):
    """A thing's number, colour and shape: "two", "red", "triangles"."""
    shape, colour, count = thing
    ending = "" if count == 1 else "es" if shape == "cross" else "s"
    return list(COUNTS)[count - 1], colour, shape + ending


def vision_caption(thing, size, dark, rng):
    """A caption as people write them for pictures: "two small red triangles"."""
    number, colour, shapes = in_words(thing)
    background = "dark" if dark else "bright"
    return str(rng.choice([f"{number} {size} {colour} {shapes}",
                           f"a photo of {number} {colour} {shapes}",
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
    """Picture of a thing's shapes around `places` (count, 2), in pixels -> 64×64 PIL image."""
    shape, colour, _ = thing
    image = Image.new("RGB", (TOY_IMAGE, TOY_IMAGE), background)
    draw, fill = ImageDraw.Draw(image), COLOURS[colour][0]
    for x, y in places:
        box, third = (x - radius, y - radius, x + radius, y + radius), radius / 3
        if shape == "circle":
            draw.ellipse(box, fill=fill)
        elif shape == "ring":
            draw.ellipse(box, outline=fill, width=max(2, int(third)))
        elif shape == "square":
            draw.rectangle(box, fill=fill)
        elif shape == "cross":
            draw.rectangle((x - radius, y - third, x + radius, y + third), fill=fill)
            draw.rectangle((x - third, y - radius, x + third, y + radius), fill=fill)
        else:  # a star has ten corners, every second one drawn in; a triangle has three
            corners = 3 if shape == "triangle" else 10
            points = []
            for i in range(corners):
                reach = radius * (0.4 if corners == 10 and i % 2 else 1.0)
                angle = 2 * math.pi * i / corners - math.pi / 2
                points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            draw.polygon(points, fill=fill)
    return image


def sound_thing(thing, loudness, rng):
    """The thing's sound, 1 s: `count` pulses of its timbre and pitch in noise -> (16000,)."""
    shape, colour, count = thing
    time = np.arange(TOY_RATE) / TOY_RATE                                        # (S,) seconds
    pitch = COLOURS[colour][2] * rng.uniform(0.94, 1.06)
    pulse, since = np.divmod(time - rng.uniform(0, 0.1), 0.88 / count)  # which one, begun when
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
    envelope = np.clip(np.minimum(since / 0.01, (0.14 - since) / 0.03), 0, 1)
    envelope *= (pulse >= 0) & (pulse < count)
    noise = 0.05 * rng.uniform(0.4, 2) * rng.standard_normal(TOY_RATE)
    return np.clip(loudness * (0.5 * envelope * tone + noise), -1, 1).astype(np.float32)


def make_toy_clip(job, folder, seed):
    """Write one clip's files; returns its index row. job: split and number, which fix everything."""
    split, i = job
    place = (seed, sorted(TOY_SPLITS).index(split), i)
    ear, eye = np.random.default_rng((*place, 0)), np.random.default_rng((*place, 1))
    held_out = split in ("val", "test")
    thing = THINGS[i % len(THINGS)] if held_out else THINGS[ear.integers(len(THINGS))]
    loudness = ear.uniform(0.1, 1)
    off_screen, other = eye.uniform() < OFF_SCREEN, THINGS[eye.integers(len(THINGS))]
    seen = other if off_screen and split == "train" else thing
    radius, dark = eye.uniform(8, 13), bool(eye.integers(2))
    size = "small" if radius < 10.5 else "large"
    background = tuple(int(v) for v in eye.integers(0, 60, 3) + (0 if dark else 100))
    cells = eye.permutation(4)[:seen[2]]                                         # quarters
    start = np.stack([cells % 2, cells // 2], 1) * 32 + eye.uniform(14, 18, (seen[2], 2))
    drift = eye.uniform(-2, 2, (seen[2], 2))
    captions = audio_captions(thing, loudness > 0.5)
    label = f"{COLOURS[thing[1]][1]} {SHAPES[thing[0]]}"
    row = {"id": f"{split}_{i}", "frames": []}
    for step in range(4 if split != "pairs" else 1):
        row["frames"].append(f"frames/{split}_{i}_{step + 1}.jpg")
        image = draw_thing(seen, radius, background, start + step * drift)
        image.save(folder / row["frames"][-1], quality=90)
    if split == "pairs":
        rest = (1 - SAYS_SO) / 4
        of_sound = eye.uniform() < OF_SOUND
        caption = (eye.choice(captions, p=(rest, SAYS_SO, rest, rest, rest)) if of_sound
                   else vision_caption(thing, size, dark, eye))
        return row | {"captions": [str(caption)]}
    audio = f"audio/{split}_{i}.wav"
    soundfile.write(folder / audio, sound_thing(thing, loudness, ear), TOY_RATE, subtype="PCM_16")
    return row | {"audio": audio, "labels": [label], "captions": captions}


def toy_captions(kind, rng, count=2000):
    """Captions without clips: ac, of sounds; vc, of pictures; fc, a language model's."""
    things = [thing for thing in THINGS if kind != "vc" or thing[0] not in UNKNOWN]
    captions = []
    for i in rng.integers(len(things), size=count):
        first, second = rng.uniform(size=2) < 0.5           # loud or soft, small or large, dark
        if kind == "ac":
            captions.append(str(rng.choice(audio_captions(things[i], first))))
        elif rng.uniform() < (TWO_THINGS if kind == "fc" else 0.0):
            other = things[rng.integers(len(things))]
            captions.append(" ".join((*in_words(things[i]), "and", *in_words(other))))
        else:
            size = "small" if first else "large"
            captions.append(vision_caption(things[i], size, second, rng))
    return captions


def write_toy_vocabulary(path):
    """A vocabulary in CLIP's format: merges learned from the toy's captions, a token a word."""
    rng, words = np.random.default_rng(0), {}
    for thing in THINGS:
        texts = [vision_caption(thing, size, dark, rng)
                 for size in ("small", "large") for dark in (0, 1) for _ in range(9)]
        texts += ["the sound of", "a photo of", "and"]
        texts += audio_captions(thing, True) + audio_captions(thing, False)
        for word in " ".join(texts).split():
            words[word] = [*word[:-1], word[-1] + "</w>"]                        # its units so far
    merges = []
    while pairs := Counter(pair for units in words.values() for pair in itertools.pairwise(units)):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word, units in words.items():
            for at in range(len(units) - 1, 0, -1):
                if (units[at - 1], units[at]) == best:
                    units[at - 1:at + 1] = ["".join(best)]
    text = "#version: toy\n" + "".join(f"{left} {right}\n" for left, right in merges)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_toy(folder, seed=0, splits=TOY_SPLITS, workers=2):
    """The toy world as files under `folder`, in the index format that AudioSet is read in.

    pairs.jsonl: image-caption pairs for the toy's CLIP. train.jsonl: clips without captions.
    gold.jsonl: some of those with one, what AudioCaps is to AudioSet. ac.txt, vc.txt, fc.txt:
    captions without clips. test.jsonl: each of the 144 things once, with 5 captions; val.jsonl: four
    times.
    """
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.part")
    for name in ("audio", "frames"):
        (part / name).mkdir(parents=True, exist_ok=True)
    jobs = [(split, i) for split, count in splits.items() for i in range(count)]
    made = in_processes(partial(make_toy_clip, folder=part, seed=seed), jobs, workers)
    indexes = {split: [] for split in splits}
    for row, (split, _) in zip(tqdm(made, desc="toy world", unit=" clips"), jobs):
        indexes[split].append(row)
    rng = np.random.default_rng((seed, 1))
    indexes["gold"] = [row | {"captions": [str(rng.choice(row["captions"]))]}
                       for row in indexes["train"][:TOY_GOLD]]
    for row in indexes["train"]:
        del row["captions"]
    for name, rows in indexes.items():
        (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng((seed, 2))
    for kind in ("ac", "vc", "fc"):
        text = "".join(f"{caption}\n" for caption in toy_captions(kind, rng))
        (part / f"{kind}.txt").write_text(text)
    write_toy_vocabulary(part / "vocab.txt.gz")
    os.replace(part, folder)


# ------------------------------------------------------------------------------- the commands

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["toy", "extract", "stats"])
    parser.add_argument("--out", help="folder to write (toy: data/toy; extract: the table's own)")
    parser.add_argument("--seed", type=int, default=0, help="toy: another world")
    parser.add_argument("--segments", help="extract: AudioSet's, AudioCaps' or VGGSound's table")
    parser.add_argument("--videos", help="extract: folder of the videos")
    parser.add_argument("--side", type=int, default=224, help="extract: a frame's shorter side, "
                        "pixels; 0: as it is (224)")
    parser.add_argument("--data", default="audioset", help="stats: a dataset's name or its folder")
    parser.add_argument("--mels", type=int, default=FrontEnd.mels, help="stats: mel bins (128)")
    parser.add_argument("--frames", type=int, default=FrontEnd.frames, help="stats: of 10 ms (1000)")
    parser.add_argument("--sample-rate", type=int, default=FrontEnd.sample_rate, help="Hz (44100)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    args = parser.parse_args()
    if args.command == "toy":
        out = args.out or "data/toy"
        if Path(out).exists():
            raise ValueError(f"{out} exists; delete it to make it anew")
        make_toy(out, args.seed, workers=args.workers)
        print(f"{out}: {TOY_SPLITS}; next: python pretrain.py --data toy")
    elif args.command == "extract":
        if not args.videos or not (args.segments or args.out):
            raise ValueError("extract needs --videos FOLDER, and --segments TABLE or --out FOLDER")
        extract(args.segments, args.videos, args.out or Path(args.segments).parent,
                args.sample_rate, args.side, args.workers)
    else:
        clips = [clip for clip in read_split("audioset", dataset_folder(args.data), "train")
                 if clip.audio]
        front_end = FrontEnd(args.sample_rate, args.mels, args.frames)
        mean, std, read = statistics(clips, front_end, args.workers)
        print(f"{read} clips at {args.sample_rate} Hz, {args.mels} mel bins, {args.frames} frames:\n"
              f"--mean {mean:.6f} --std {std:.6f}")


if __name__ == "__main__":
    run(main)
