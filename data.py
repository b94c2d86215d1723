"""Files to tensors: sound, filterbanks, images; every dataset's reader; videos; the toy (§3.2.2).

    python data.py toy                                      # make the toy world in data/toy
    python data.py extract --videos FOLDER --out data/mine  # your own videos -> WAV, frames, index
    python data.py extract --videos FOLDER --segments data/audioset/eval_segments.csv
    python data.py stats --data audioset                    # for pretrain.py's --mean and --std

B  batch    S  samples of a waveform    T  frames of 10 ms    F  mel bins    R  side of an image
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # OpenMP's threads must not spin while they wait;
os.environ.setdefault("KMP_BLOCKTIME", "1")      # read when torch loads it (on macOS this one)

import argparse
import csv
import ctypes
import gzip
import io
import json
import math
import re
import signal
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from itertools import chain, dropwhile, pairwise, product
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

# ------------------------------------------------------------- commands, errors and processes
# an unknown flag fails; --help shows a script's first lines as they stand
Parser = partial(argparse.ArgumentParser, allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter)


class Unreadable(ValueError):
    """One file that can't be used; the message names it. Training skips and counts it."""


@contextmanager
def reading(path, what):
    """What fails inside is Unreadable: over a damaged or a foreign file anything may be raised."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        what = "such file" if isinstance(error, FileNotFoundError) else what
        text = " ".join(str(error).split())[:300]
        raise Unreadable(f"{path}: no {what} ({type(error).__name__}: {text})") from None


def run(main):
    """Call a script's main; what a user can mend ends in a message instead of a traceback."""
    if "RANK" in os.environ:
        end_with_parent(os.getppid())  # torchrun, however it ends
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        text = str(error) or "stopped; the same command goes on from what is saved"  # by Ctrl-C
        if "Original Traceback" in text:  # out of a worker process: the last line says it
            text = text.strip().splitlines()[-1].partition(": ")[2]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes on what Ctrl-C said already
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same, and then torchrun ends this process
        sys.stdout.flush()
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for the other ranks
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_whole(path, save):
    """save(temporary path), then rename it: `path` is whole or not there, even if we are killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part{path.suffix}")
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def end_with_parent(parent, worker=None):
    """At a process's start: end when its parent does; a DataLoader's worker leaves Ctrl-C to it."""
    if worker is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # killed before we could ask
        os._exit(1)


def loader(items, workers, **options):
    """A DataLoader whose worker processes (0: this one works) end when this one does."""
    # collate_fn is what they do: with a batch of items, with batch_size=None with each alone
    return DataLoader(items, num_workers=workers,
                      worker_init_fn=partial(end_with_parent, os.getpid()), **options)


# -------------------------------------------------------------------------------------- sound
# What can't be heard raises Unreadable.
@contextmanager
def opened(path, kind):
    """A file and its streams of a kind, "audio" or "video"; an attached cover is no video."""
    with reading(path, f"readable {kind}"):
        # a WAV that is not whole is read to the file's end, not to its header's length
        options = {} if is_whole_wav(path) else {"ignore_length": "1"}
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as file:
            cover = av.stream.Disposition.attached_pic
            streams = []
            for stream in getattr(file.streams, kind):
                if stream.codec_context and not stream.disposition & cover:
                    streams.append(stream)
            if not streams:
                raise Unreadable(f"{path}: has no {kind}")
            yield file, streams


def decoded(file, stream):
    """Frames of a stream as they come; packets that can't be decoded are left out."""
    for packet in file.demux(stream):
        with suppress(av.FFmpegError):
            yield from packet.decode()


def first_channel(frame):
    """The first channel (§3.2.2) of a decoded stretch of sound -> (n,) float32 in [-1, 1]."""
    samples = frame.to_ndarray()                            # (channels, n) or (1, n·channels)
    samples = samples[0] if frame.format.is_planar else samples[0, ::frame.layout.nb_channels]
    if samples.dtype.kind != "f":  # bytes have no sign
        samples = samples / 2 ** (8 * samples.itemsize - 1) - (samples.dtype.kind == "u")
    return samples.astype(np.float32)


def is_whole_wav(path):
    """Whether a WAV's chunks end where the file does: not after a pipe, a kill, a cut download."""
    size, at, length = os.path.getsize(path), 12, 1
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":  # AVI is RIFF, too
            return False
        while at < size and length:  # 0: never filled in, what follows may be silence
            file.seek(at + 4)
            length = int.from_bytes(file.read(4), "little")
            at += 8 + length + length % 2
    return 0 <= at - size <= 1


def sound_blocks(path):
    """First channel of a sound file, to its end: yields (rate in Hz, (n,) float32 in [-1, 1])."""
    with reading(path, "readable audio"):
        if is_whole_wav(path):
            # libsndfile is ten times as fast as FFmpeg, which knows more codecs
            with suppress(soundfile.SoundFileError), soundfile.SoundFile(os.fsencode(path)) as file:
                if file.subtype.startswith(("PCM", "FLOAT", "DOUBLE")):
                    for block in file.blocks(2 ** 16, dtype="float32", always_2d=True):
                        yield file.samplerate, block[:, 0]
                    return
    rate = None
    with opened(path, "audio") as (file, streams):
        for frame in decoded(file, streams[0]):
            rate, wave = rate or frame.sample_rate, torch.from_numpy(first_channel(frame))
            # rates may differ: two files in one, as `cat a.mp3 b.mp3` leaves them
            wave = torchaudio.functional.resample(wave, frame.sample_rate, rate)
            yield rate, wave.numpy()


def resample(path, wave, rate, new_rate, silent=False):
    """A file's sound (S,) at another rate, Hz. Raises Unreadable: under 25 ms, `silent`, NaN."""
    if len(wave) < 0.025 * rate:
        raise Unreadable(f"{path}: {1000 * len(wave) / rate:.0f} ms of sound; needed are 25")
    if silent:
        raise Unreadable(f"{path}: what is heard of it, its first channel (§3.2.2), is silent")
    if not 1000 <= rate <= 1_000_000:
        raise Unreadable(f"{path}: says it has {rate} samples a second; is its header damaged?")
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    ratio = Fraction(new_rate, rate).limit_denominator(1000)  # the filter grows with its terms
    wave = torch.tensor(wave)
    return torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator).clamp(-1, 1)


def load_audio(path, sample_rate, seconds=None):
    """First channel at `sample_rate` Hz, all or the first `seconds` -> (S,) float32 in [-1, 1]."""
    blocks, length, rate = [np.zeros(0, np.float32)], 0, sample_rate
    for rate, block in sound_blocks(path):
        blocks.append(block)
        length += len(block)
        if seconds and length >= seconds * rate:
            break
    wave = np.concatenate(blocks)[:math.ceil(seconds * rate) if seconds else None]   # (S,)
    return resample(path, wave, rate, sample_rate, silent=not np.diff(wave).any())


# -------------------------------------------------------------------------------- filterbanks
def frame_length_and_shift(sample_rate):
    """Samples of a frame's window (25 ms) and between frames (10 ms), rounded as Kaldi does."""
    return int(sample_rate * 0.025), int(sample_rate * 0.010)


@cache
def window_and_mel_bins(sample_rate, mels, device):
    """Hanning window (25 ms,), FFT length, triangular mel bins (FFT bins, F) as Kaldi's."""
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
    """Kaldi's log-mel filterbanks: 25 ms Hanning windows every 10 ms, (B, S) -> (B, T, F)."""
    window, fft, mel_bins = window_and_mel_bins(sample_rate, mels, waves.device)
    length, shift = frame_length_and_shift(sample_rate)
    banks = []
    # a CPU's temporaries stay in its cache for some 5 s of sound; a GPU takes many clips at once
    together = 2 ** 18 if waves.device.type == "cpu" else 2 ** 25
    for x in waves.split(max(1, together // waves.shape[1])):
        # the order of operations is Kaldi's: another one changes the quietest bins
        frames = x.unfold(1, length, shift)                                      # (b, T, 25 ms)
        # differs from the paper, which subtracts the waveform's mean: a frame's contains it
        frames = frames - frames.mean(dim=2, keepdim=True)
        frames[:, :, 1:] -= 0.97 * frames[:, :, :-1]  # the first sample's window is 0
        spectrum = torch.fft.rfft(frames * window, fft)                          # (b, T, FFT bins)
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
    def samples(self):
        """Samples that fill all frames; the last window reaches 15 ms past its frame."""
        length, shift = frame_length_and_shift(self.sample_rate)
        return (self.frames - 1) * shift + length

    def pad(self, wave):
        """A waveform's first `samples`, zeros on its right -> (samples,); how many are its own."""
        wave = wave[:self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave))), len(wave)

    def load(self, path):
        """A sound file -> (samples,) padded, its length. Raises Unreadable."""
        # 0.1 s more: for the last window's 15 ms and the resampling filter
        return self.pad(load_audio(path, self.sample_rate, self.frames / 100 + 0.1))

    def __call__(self, waves, lengths):
        """Padded waveforms (B, samples), lengths (B,) -> normalised filterbanks (B, 1, T, F)."""
        x = fbank(waves, self.sample_rate, self.mels)                            # (B, T, F)
        length, shift = frame_length_and_shift(self.sample_rate)
        own = 1 + (lengths - length) // shift                                    # (B,) frames
        padding = torch.arange(self.frames, device=x.device) >= own[:, None]     # (B, T)
        # differs from the paper, which does not say: padded *before* normalising (authors' code)
        x = x.masked_fill(padding[:, :, None], 0.0)
        return ((x - self.mean) / self.std)[:, None]                             # (B, 1, T, F)


class RememberSounds(FrontEnd):
    """A front end that keeps the waveforms that it has read: for mixtures of them."""
    load = cache(FrontEnd.load)


class Remember(FrontEnd):
    """A front end that keeps the filterbanks of what it has read, and takes them for waveforms."""
    @cache
    def load(self, path):
        wave, length = super().load(path)
        return super().__call__(wave[None], torch.tensor([length]))[0], length   # (1, T, F)

    def __call__(self, x, lengths):
        return x


def mask(x, draws):
    """(B, 1, T, F) with a band of up to 1/5 of the frames and 1/4 of the mel bins 0 (§3.2.2)."""
    # draws: (B, 4) uniform in [0, 1), width and place of either band
    # differs from the paper, which masks "one-fifth" and "one-forth": up to (authors' code)
    for axis, parts, at in ((2, 5, 0), (3, 4, 2)):
        size = x.shape[axis]
        width = (draws[:, at] * (size // parts)).floor()[:, None]                # (B, 1)
        start = (draws[:, at + 1, None] * (size - width)).floor()
        places = torch.arange(size, device=x.device)
        band = (places >= start) & (places < start + width)                      # (B, size)
        x = x.masked_fill(band[:, None, :, None] if axis == 2 else band[:, None, None], 0.0)
    return x


# ------------------------------------------------------------------------------------- images
IMAGE_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)[:, None, None]  # CLIP's
IMAGE_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)[:, None, None]


def preprocess_image(image, size=224):
    """PIL image of any mode -> (3, R, R) float32: shorter side to R, centre crop, normalised."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    width, height = (int(size * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    # a plane a colour: over a last axis of three NumPy is half as fast
    pixels = np.stack(image.split()) / np.float32(255)                           # (3, R, R)
    return torch.from_numpy((pixels - IMAGE_MEAN) / IMAGE_STD)


def load_image(path, size=224):
    """Image file -> (3, R, R) float32. Raises Unreadable (missing, damaged)."""
    with reading(path, "readable image"), Image.open(path) as image:
        return preprocess_image(ImageOps.exif_transpose(image), size)


# ----------------------------------------------------------------------------------- datasets
@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of a dataset. Paths are joined with the dataset's folder."""
    id: str
    audio: str = ""         # where it should lie; "" where nothing says so
    frames: tuple = ()      # paths of its images, in time
    labels: tuple = ()
    captions: tuple = ()
    fold: int = 0           # of a dataset with published folds, from 1
    easy: bool = False      # in ESC-10, the easier part of ESC-50
    start: float = 0.0      # s in the video, of a clip that is to be cut out of one
    end: float = 0.0        # s
    split: str = ""         # VGGSound's table has two
    audiocap_ids: tuple = ()  # one a caption

    @property
    def video(self):
        """Of a clip out of a video, YouTube's id or the file's name."""
        return self.id.rpartition("_")[0]

    @property
    def middle_frame(self):
        """Path of the second frame, the paper's middle one (§3.2.2), or of the only one."""
        return self.frames[:2][-1]


AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".aifc",
         ".wma", ".mka", ".au", ".caf", ".w64", ".amr", ".ac3", ".mp2", ".weba", ".spx", ".wv")
VIDEO = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".flv", ".f4v", ".3gp", ".3g2", ".ts",
         ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".ogv", ".qt")
SPLITS = ("train", "val", "test")
TABLES = {  # dataset -> its publisher's table of each split
    "audioset": ("unbalanced_train_segments.csv", "balanced_train_segments.csv",
                 "eval_segments.csv"),
    "audiocaps": ("train.csv", "val.csv", "test.csv"),
    "vggsound": ("vggsound.csv",) * 3,
    "clotho": ("clotho_captions_development.csv", "clotho_captions_validation.csv",
               "clotho_captions_evaluation.csv"),
    "esc50": ("meta/esc50.csv",) * 3,
    "us8k": ("metadata/UrbanSound8K.csv",) * 3}
GET_IT = "Get it: README.md, 'Datasets'; or try without a download: python pretrain.py --data toy"


def dataset_folder(place):
    """A folder by its name in data/ or by its path. Raises FileNotFoundError (how to get it)."""
    folder = Path("data") / place
    if "/" in place or Path(place).is_dir() and not folder.is_dir():
        folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. {GET_IT}")
    return folder


def table_of(name, folder, split):
    """Path of the publisher's table of a split; UrbanSound8K may be as it was unpacked."""
    table = TABLES[name][SPLITS.index(split)]
    unpacked = Path(folder) / "UrbanSound8K" / table
    return unpacked if unpacked.exists() else Path(folder) / table


def read_text(path):
    """A table's or an index's text."""
    with reading(path, "text in UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_table(path, make):
    """make({column, lower case: field}) of each row of a CSV -> list. Raises Unreadable."""
    text, columns, made = read_text(path), None, []
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    if text.startswith(("#", "YTID,")):  # AudioSet's, with comments for a header, or without #
        columns = ("youtube_id", "start_time", "end_time", "positive_labels")
        text = re.sub("(?m)^(#|YTID,).*", "", text)
    elif Path(path).name.startswith("vggsound"):
        columns = ("youtube_id", "start_time", "label", "split")
    rows = csv.DictReader(io.StringIO(text), columns, restkey="surplus", delimiter=delimiter,
                          skipinitialspace=True)
    row = None
    try:
        for row in rows:
            if not any(row.values()):  # as spreadsheets leave them
                continue
            if "surplus" in row or not all(field and field.strip() for field in row.values()):
                raise ValueError("each column needs a field, none empty, commas in quotes")
            made.append(make({column.strip().lower(): row[column].strip() for column in row}))
    except Exception as error:
        text = f"needs a column {error}" if isinstance(error, KeyError) else error
        raise Unreadable(f"{path}:{rows.line_num}: {text}; there is {row}") from None
    if not made:
        raise Unreadable(f"{path}: no rows in it")
    return made


def class_names(folder):
    """AudioSet's classes {mid: name}, in the order of its table; {} where `folder` lacks that."""
    table = Path(folder) / "class_labels_indices.csv"
    if table.exists():
        return dict(read_table(table, lambda row: (row["mid"], row["display_name"])))
    return {}


def spelling(name):
    """A file's name, the same for NFC and NFD, in any case, with any number of blanks."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


@cache
def spellings(folder):
    """{spelling: name} of a folder's files."""
    return {spelling(name): name for name in os.listdir(folder)} if os.path.isdir(folder) else {}


def inside(folder, name):
    """Path of a file below a folder, however a table spells it."""
    path = os.path.join(folder, name)
    if os.path.exists(path):
        return path
    parent, base = os.path.split(os.path.join(folder, name.replace("\\", "/")))
    return os.path.join(parent, spellings(parent).get(spelling(base), base))


def find_files(folder, endings=AUDIO + VIDEO):
    """Files below a folder with one of these endings, links followed -> paths, videos last."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [os.path.join(place, name) for name in names
                  if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found, key=lambda path: (path.lower().endswith(VIDEO), path))


# AudioSet, AudioCaps and VGGSound come as YouTube's ids. A file's name is AudioCaps' own number, or
# holds the id (Y{id}, Title [{id}], …), then perhaps where it begins, in s or ms; else it is whole.
def with_files(segments, folder):
    """Segments with their files -> [(segment, [(file begins with it, path)])], likeliest first."""
    named, found = defaultdict(list), defaultdict(list)
    for segment in segments:
        for name in (segment.video, *segment.audiocap_ids):
            named[name].append(segment)
    for path in find_files(folder):
        stem = os.path.splitext(os.path.basename(path))[0]
        for at in range(max(1, len(stem) - 10)):
            for segment in named.get(stem[at:at + 11], ()):
                start = re.match(r"\]?[ _.,-]*(\d+)", stem[at + 11:])
                begins_there = bool(start) or len(stem) < 11
                if not start or int(start[1]) in (int(segment.start), int(1000 * segment.start)):
                    found[segment.id].append((begins_there, path))
    for files in found.values():
        files.sort(key=lambda file: not file[0])
    return [(segment, found[segment.id]) for segment in segments]


def clip_of_row(row, table, names):
    """A row of a publisher's table, with AudioSet's class names, -> Clip. Raises ValueError."""
    if "file_name" in row:  # Clotho
        sound, sounds = row["file_name"], table.stem.removeprefix("clotho_captions_")
        captions = tuple(row[f"caption_{i}"] for i in range(1, 6))
        return Clip(sound, inside(table.parent / sounds, sound), captions=captions)
    if "fold" in row:
        if "slice_file_name" in row:  # UrbanSound8K
            sound, label, sounds = row["slice_file_name"], row["class"], f"audio/fold{row['fold']}"
        else:  # ESC-50
            sound, label, sounds = row["filename"], row["category"], "audio"
        return Clip(sound, inside(table.parent.parent / sounds, sound),
                    labels=(label.replace("_", " "),), fold=int(row["fold"]),
                    easy=row.get("esc10", "").lower() == "true")  # spreadsheets write TRUE
    video, start = row["youtube_id"], float(row["start_time"])
    end = float(row.get("end_time", start + 10))
    if not (re.fullmatch(r"[\w-]{11}", video, re.ASCII) and 0 <= start < end):
        raise ValueError("needed: the id of a YouTube video, a start before its end")
    segment = partial(Clip, f"{video}_{round(start, 3):g}", start=start, end=end)
    if "label" in row:  # VGGSound
        return segment(labels=(row["label"],), split=row["split"])
    if "positive_labels" in row:  # AudioSet
        mids = [mid.strip() for mid in row["positive_labels"].split(",")]
        return segment(labels=tuple(names.get(mid, mid) for mid in mids))
    caption = " ".join(row["caption"].split())
    return segment(captions=(caption,), audiocap_ids=(row.get("audiocap_id"),))


def read_published(path):
    """A publisher's table -> list of Clip; those out of YouTube's videos have no files yet."""
    path, clips = Path(path), {}
    for new in read_table(path, partial(clip_of_row, table=path, names=class_names(path.parent))):
        clip = clips.setdefault(new.id, new)
        if clip is not new:  # AudioCaps has a row a caption
            clips[clip.id] = replace(clip, captions=clip.captions + new.captions,
                                     audiocap_ids=clip.audiocap_ids + new.audiocap_ids)
    return list(clips.values())


def clip_of(row, folder, names, need):
    """A line of the index in `folder` -> Clip. Raises ValueError."""
    lists = {}
    for key in ("audio", "frames", "labels", "captions", "aclip", "frame"):
        value = row.get(key) or []
        lists[key] = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text.strip() for text in lists[key]):
            raise ValueError(f"{key} must be a list of strings, none empty")
    if "dir" in row:  # the authors' form
        for key, kind in (("audio", "aclip"), ("frames", "frame")):
            lists[key] = [f"{row['dir']}/{kind}/{row['id']}.{ending}" for ending in lists[kind]]
    missing = [key for key in ("id", *need) if lists.get(key, row.get(key)) in (None, "", [])]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; has {', '.join(sorted(row))}")
    audio = inside(folder, lists["audio"][0]) if lists["audio"] else ""
    frames = tuple(inside(folder, frame) for frame in lists["frames"])
    labels = tuple(names.get(label, label) for label in lists["labels"])
    return Clip(str(row["id"]), audio, frames, labels, tuple(lists["captions"]),
                int(row.get("fold") or 0))


def read_index(path, need=()):
    """Lines of an index, each with the keys in `need` -> list of Clip. Raises Unreadable."""
    path, clips = Path(path), {}
    names = class_names(path.parent)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            with reading(f"{path}:{number}", "fitting JSON object"):
                clip = clip_of(json.loads(line), path.parent, names, need)
                if clips.setdefault(clip.id, clip) is not clip:
                    raise ValueError(f"a second clip with the id {clip.id}")
    if not clips:
        raise Unreadable(f"{path}: no clips in it")
    return list(clips.values())


def read_split(name, folder, split="test", need=()):
    """Clips of <split>.jsonl, with the keys `need`, or as published. Raises FileNotFoundError."""
    index = Path(folder) / f"{split}.jsonl"
    if index.exists():
        return read_index(index, ("audio", *need))
    table = table_of(name, folder, split)
    if not table.exists():
        raise FileNotFoundError(f"{folder}: neither {index.name} nor {table.name} in it. {GET_IT}")
    clips = [clip for clip in read_published(table) if clip.split in ("", split)]
    if any(clip.audio for clip in clips):  # which their table names
        return clips
    for i, (clip, files) in enumerate(with_files(clips, table.parent)):
        for begins_there, path in reversed(files):
            if begins_there or path.lower().endswith(AUDIO):  # whole videos are for `extract`
                clips[i] = replace(clip, audio=path)
    return clips


def captions_of(clips):
    """All captions of clips, one clip's after another's -> list of str."""
    return list(chain.from_iterable(clip.captions for clip in clips))


# ----------------------------------------------------------------------------- videos to clips
SLACK = 0.5  # seconds that a video may lack: tables are in whole seconds, videos are not


def frames_from(path, kind, start, track=0):
    """A track's decoded frames from `start` or before on: yields (s from the beginning, frame)."""
    for seek in (True, False):  # without, where after a seek nothing comes, or too late
        with opened(path, kind) as (file, streams):
            zero = (file.start_time or 0) / av.time_base
            if seek:
                with suppress(av.FFmpegError):  # of a file that can't be entered but at its start
                    # a second's run-up: for codecs, and because MPEG-TS is entered late
                    file.seek(max(0, int((start - 1 + zero) * av.time_base)))
            frames = ((frame.time - zero, frame) for frame in decoded(file, streams[track])
                      if frame.time is not None)
            if seek and kind == "video":  # what comes before a key frame is not whole
                frames = dropwhile(lambda pair: not pair[1].key_frame, frames)
            first = next(frames, None)
            if first and (first[0] <= start or not seek):
                yield first
                yield from frames
                return


def cut_audio(path, start, end, sample_rate):
    """Sound from `start` to `end` (s), of the first track not silent -> (S,). Raises Unreadable."""
    with opened(path, "audio") as (_, streams):
        tracks = len(streams)
    for track in range(tracks):
        blocks, until = [], -math.inf
        for seconds, frame in frames_from(path, "audio", start, track):
            if not blocks:
                begin, rate = seconds, frame.sample_rate
            blocks.append(first_channel(frame))
            until = seconds + len(blocks[-1]) / rate
            if until >= end:
                break
        if until < end - SLACK:
            raise Unreadable(f"{path}: its sound ends before {end:g} s")
        size = round((end - start) * rate)
        late = min(size, round((begin - start) * rate))  # samples; below 0 it begins before
        # zeros where the track sets in late, and for what it lacks
        wave = np.pad(np.concatenate(blocks), (max(0, late), size))[max(0, -late):][:size]
        if wave.any():
            break
    return resample(path, wave, rate, sample_rate, silent=not np.diff(wave).any())


def cut_frames(path, times):
    """The pictures shown at these times (s, ascending) -> PIL images. Raises Unreadable."""
    shown, until, images = {}, -math.inf, []
    for seconds, frame in frames_from(path, "video", times[0]):
        if not shown and seconds > times[0] + SLACK:
            raise Unreadable(f"{path}: its first picture comes at {seconds:.1f} s")
        for at in times:
            if at not in shown or seconds <= at + 0.002:  # stamps may be in ms
                shown[at] = frame
        until = seconds + float((frame.duration or 0) * frame.time_base)
        if seconds > times[-1]:
            break
    if times[-1] > until + SLACK:
        raise Unreadable(f"{path}: has no picture at {times[-1]:.1f} s")
    for frame in shown.values():
        image = frame.to_image().rotate(frame.rotation, expand=True)  # upright, as the file says
        images.append(ImageOps.scale(image, min(1, 224 / min(image.size))))  # CLIP sees no more
    return images


def own_videos(folder):
    """A folder's videos, after their sound if that is another file -> [(name, files)]."""
    videos = {}
    for path in find_files(folder):
        name = re.sub(r"(\.f\d+)?\.\w+$", "", os.path.relpath(path, folder))  # yt-dlp's .f137
        videos.setdefault(name, []).append((False, path))
    return [(name, files) for name, files in videos.items() if files[-1][1].lower().endswith(VIDEO)]


def pieces_of(video):
    """One of own_videos in pieces of 10 s, a last one of 5 s or more -> [(Clip, files)]."""
    name, files = video
    length, ends, pieces = 0.0, {}, []  # ends: of sound and of pictures; no header is believed
    # of what can't be read one piece is left, whose cutting says why
    for _, path in files:
        with suppress(Unreadable), opened(path, "video") as (file, _):
            for packet in file.demux():
                if packet.pts is not None and packet.stream.type in ("audio", "video"):
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    ends[packet.stream.type] = max(end, ends.get(packet.stream.type, 0.0))
            length = min(ends.values()) - (file.start_time or 0) / av.time_base
    for start in range(0, max(1, int(length / 10 + 0.5)) * 10, 10):
        end = max(start + 5.0, min(start + 10.0, length))
        pieces.append((Clip(f"{name}_{start}", start=start, end=end, split="train"), files))
    return pieces


def cut_clip(job, out, sample_rate):
    """Cut a (segment, files) out -> done, no pictures, unreadable or missing; reason; index row."""
    segment, files = job
    place = f"{segment.video[:2]}/{segment.id}"  # 4,000 folders share two million clips
    row = {"id": segment.id, "audio": f"audio/{place}.wav",
           "frames": [f"frames/{place}_{i}.jpg" for i in range(1, 5)],
           "labels": segment.labels, "captions": segment.captions}
    if (out / row["frames"][-1]).exists():  # which is written last
        return "done", "", row
    wave, images, reasons = None, [], []
    for begins_there, path in files:
        start = 0.0 if begins_there else segment.start
        end = start + segment.end - segment.start
        times = [start + i * (end - start) / 3 for i in range(4)]                # §3.2.2
        try:
            wave = cut_audio(path, start, end, sample_rate) if wave is None else wave
        except Unreadable as error:
            reasons.append(str(error))
        try:
            images = images or cut_frames(path, times)
        except Unreadable as error:
            reasons.append(str(error))
    if wave is None:
        return "unreadable" if files else "missing", "; ".join(reasons), {}
    write_whole(out / row["audio"], partial(soundfile.write, data=wave.numpy(),
                                            samplerate=sample_rate, subtype="PCM_16"))
    if not images:
        return "no pictures", "; ".join(reasons), row | {"frames": []}
    for frame, image in zip(row["frames"], images):
        write_whole(out / frame, partial(image.save, quality=95))
    return "done", "", row


def extract(table, videos, out, sample_rate, workers):
    """Cut a table's segments, or pieces of 10 s, out of videos -> `out`: files, indexes, report."""
    if not Path(videos).is_dir():
        raise FileNotFoundError(f"{videos}: no such folder for --videos")
    out, stem = Path(out), Path(table or "train").stem
    out.mkdir(parents=True, exist_ok=True)
    if table:
        jobs = with_files(read_published(table), videos)
    else:
        pieces = loader(own_videos(videos), workers, batch_size=None, collate_fn=pieces_of)
        jobs = list(chain.from_iterable(tqdm(pieces, "lengths", unit=" videos")))
    default = dict(zip(TABLES["audioset"], SPLITS)).get(f"{stem}.csv", stem)
    reasons = out / f"{stem}_report.csv"
    for split in {segment.split or default for segment, _ in jobs}:
        if (out / f"{split}.jsonl").exists() and not reasons.exists():
            raise ValueError(f"{out}/{split}.jsonl is there, of other clips; choose another --out")
    rows, report = [], [("id", "status", "reason")]
    cut_one = partial(cut_clip, out=out, sample_rate=sample_rate)
    cut = loader(jobs, workers, batch_size=None, collate_fn=cut_one)
    for (status, reason, row), (segment, _) in zip(tqdm(cut, unit=" clips"), jobs):
        report.append((segment.id, status, reason))
        if row:
            rows.append((segment, row))
        if status == "unreadable":
            tqdm.write(f"skipped: {reason}", file=sys.stderr)
    names = {segment.video for segment, row in rows if segment.split == "train" and row["frames"]}
    # of a set without validation one video in fifty, by its name's checksum, validates; or one
    val = {name for name in names if zlib.crc32(os.fsencode(name)) % 50 == 0}
    val = val or set(sorted(names)[1:2])
    indexes = {}
    for segment, row in rows:
        split = "val" if segment.video in val else segment.split or default
        indexes.setdefault(split, []).append(json.dumps(row) + "\n")
    with open(reasons, "w", newline="", errors="backslashreplace") as file:
        csv.writer(file).writerows(report)
    for split, lines in indexes.items():
        write_whole(out / f"{split}.jsonl", partial(Path.write_text, data="".join(lines)))
    counts = Counter(status for _, status, _ in report[1:])
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not indexes:
        raise ValueError(f"{videos}: no clip in it ({summary or 'no video'}); reasons in {out}")
    print(f"{summary}; index and reasons in {out}")
    if "train" in indexes:
        print(f"next: python pretrain.py --data {out}")


def statistics(clips, front_end):
    """Print mean and std of log-mel values, of up to 10,000 clips. Raises ValueError (none)."""
    plain, moments = replace(front_end, mean=0.0, std=1.0), []
    for i in tqdm(np.random.default_rng(0).permutation(len(clips))[:10_000], unit=" clips"):
        with suppress(Unreadable):
            wave, length = plain.load(clips[i].audio)
            x = plain(wave[None], torch.tensor([length])).double()               # (1, 1, T, F)
            moments.append((x.mean().item(), x.square().mean().item()))
    if not moments:
        raise ValueError(f"not one of {len(clips)} clips can be read")
    mean, square = np.mean(moments, axis=0)
    print(f"{len(moments)} clips that can be read, as {front_end}:\n"
          f"--mean {mean:.6f} --std {math.sqrt(square - mean ** 2):.6f}")


# ------------------------------------------------------------------------------ the toy world
# Sounding shapes, what shakespeare_char is to nanoGPT. What a thing looks like (shape, colour,
# count) fixes what it sounds like (timbre, pitch, pulses); all else varies freely.
SHAPES = {  # shape -> how far its corners lie from its middle, its timbre, and that one's wave
    "circle": ([1] * 24, "hum", lambda phase, t, noise: np.sin(phase)),
    "diamond": ([1] * 4, "buzz", lambda phase, t, noise: np.sign(np.sin(phase))),
    "triangle": ([1] * 3, "rasp", lambda phase, t, noise: phase / np.pi % 2 - 1),
    "star": ([1, 0.4] * 5, "chirp", lambda phase, t, noise: np.sin(phase * (1 + 3 * t))),
    "spark": ([1, 0.3] * 4, "hiss", lambda phase, t, noise: np.sin(phase + noise.cumsum() / 2)),
    "ring": ([1] * 24, "warble", lambda phase, t, noise: np.sin(phase + 8 * np.sin(125 * t)))}
COLOURS = {  # colour -> its RGB, its pitch, and that pitch in Hz
    "red": ((220, 40, 40), "deep", 200), "yellow": ((230, 210, 40), "low", 340),
    "green": ((40, 180, 60), "mellow", 580), "blue": ((50, 80, 230), "high", 1000),
    "purple": ((160, 50, 190), "shrill", 1700), "white": ((240, 240, 240), "piercing", 2900)}
COUNTS = {"one": "once", "two": "twice", "three": "three times", "four": "four times"}
THINGS = list(product(SHAPES, COLOURS, range(1, 5)))  # 144
TOY_RATE = 16_000  # Hz
TOY_SPLITS = {"pairs": 8000, "train": 4000, "val": 144, "test": 576}
TOY_GOLD = 2000  # training clips that gold.jsonl has a caption for
# What makes the paper's world hard, and its method work:
OFF_SCREEN = 0.5  # of the training videos show another thing than the one that sounds
OF_SOUND = 0.03   # of the web's captions name the sound, not the looks; none is a bare label,
SAYS_SO = 0.8     # and four of five of these say "the sound of"
UNKNOWN = ("star", "spark", "ring")  # captions of pictures (VC) know only half of what there is
TWO_THINGS = 0.2  # of a language model's captions (FC), which know all, add a thing not there


def vision_captions(thing, small, dark):
    """Four captions as people write them for pictures: "two small red triangles"."""
    shape, colour, count = thing
    number, size = list(COUNTS)[count - 1], "small" if small else "large"
    shapes = shape + ("s" if count > 1 else "")
    behind = "dark" if dark else "bright"
    return [f"{number} {size} {colour} {shapes}", f"a photo of {number} {colour} {shapes}",
            f"{colour} {shapes} , {number} of them , on a {behind} background",
            f"there are {number} {size} {colour} {shapes}"]


def audio_captions(thing, loud):
    """Five captions as people write them for sounds: "a high rasp , twice"."""
    shape, colour, count = thing
    timbre, pitch, times = SHAPES[shape][1], COLOURS[colour][1], list(COUNTS.values())[count - 1]
    loudness = "loud" if loud else "soft"
    return [f"a {pitch} {timbre} , {times}", f"the sound of a {loudness} {pitch} {timbre} {times}",
            f"{times} a {pitch} {timbre} is heard",
            f"a {loudness} {timbre} sounds {times} , {pitch}",
            f"a {pitch} {timbre} repeats {times}" if count > 1 else f"a single {pitch} {timbre}"]


def draw_thing(thing, radius, background, places):
    """Picture of a thing's shapes around `places` (count, 2), in pixels -> 64×64 PIL image."""
    shape, colour, _ = thing
    image = Image.new("RGB", (64, 64), background)
    reach, rgb = radius * np.array(SHAPES[shape][0]), COLOURS[colour][0]
    angles = 2 * np.pi * np.arange(len(reach)) / len(reach) - np.pi / 2  # the first one is on top
    corners = reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)     # (corners, 2)
    fill = None if shape == "ring" else rgb
    for place in places:
        ImageDraw.Draw(image).polygon((place + corners).ravel().tolist(), fill, rgb, width=3)
    return image


def sound_thing(thing, loudness, rng):
    """The thing's sound, 1 s: `count` pulses of its timbre and pitch in noise -> (16000,)."""
    shape, colour, count = thing
    seconds = np.arange(TOY_RATE) / TOY_RATE                                     # (S,)
    pitch = COLOURS[colour][2] * rng.uniform(0.94, 1.06)
    pulse, since = np.divmod(seconds - rng.uniform(0, 0.1), 0.88 / count)  # which one, begun when
    noise = rng.standard_normal(TOY_RATE)
    tone = SHAPES[shape][2](2 * np.pi * (pitch * since + rng.uniform()), since, noise)
    envelope = np.clip(np.minimum(since / 0.01, (0.14 - since) / 0.03), 0, 1)
    envelope *= (pulse >= 0) & (pulse < count)
    wave = 0.5 * envelope * tone + 0.05 * rng.uniform(0.4, 2) * noise
    return np.clip(loudness * wave, -1, 1).astype(np.float32)


def make_toy_clip(i, split, folder, seed):
    """Write one clip's files -> its index row. Number and split fix everything."""
    place = (seed, sorted(TOY_SPLITS).index(split), i)
    ear, eye = np.random.default_rng((*place, 0)), np.random.default_rng((*place, 1))
    held_out = split in ("val", "test")
    thing = THINGS[i % 144 if held_out else ear.integers(144)]
    loudness = ear.uniform(0.1, 1)
    off_screen = eye.uniform() < OFF_SCREEN and split == "train"
    other = THINGS[eye.integers(144)]
    seen = other if off_screen else thing
    radius, dark = eye.uniform(8, 13), bool(eye.integers(2))
    background = tuple(int(v) for v in eye.integers(0, 60, 3) + (0 if dark else 100))
    cells = eye.permutation(4)[:seen[2]]                                         # quarters
    start = np.stack([cells % 2, cells // 2], 1) * 32 + eye.uniform(14, 18, (seen[2], 2))
    drift = eye.uniform(-2, 2, (seen[2], 2))
    captions = audio_captions(thing, loudness > 0.5)
    row = {"id": f"{split}_{i}", "frames": []}
    for step in range(4 if split != "pairs" else 1):
        row["frames"].append(f"frames/{split}_{i}_{step + 1}.jpg")
        image = draw_thing(seen, radius, background, start + step * drift)
        image.save(folder / row["frames"][-1], quality=90)
    if split == "pairs":
        rest = (1 - SAYS_SO) / 4
        if eye.uniform() < OF_SOUND:
            caption = eye.choice(captions, p=(rest, SAYS_SO, rest, rest, rest))
        else:
            caption = eye.choice(vision_captions(thing, radius < 10.5, dark))
        return row | {"captions": [str(caption)]}
    audio = f"audio/{split}_{i}.wav"
    with open(folder / audio, "wb") as file:  # by its path, soundfile would wait for the disk
        soundfile.write(file, sound_thing(thing, loudness, ear), TOY_RATE, "PCM_16", format="WAV")
    label = f"{COLOURS[thing[1]][1]} {SHAPES[thing[0]][1]}"
    fold = {"fold": i // 144 + 1} if held_out else {}  # each thing once in a gallery
    return row | {"audio": audio, "labels": [label], "captions": captions} | fold


def toy_captions(kind, rng):
    """2,000 captions without clips: ac, of sounds; vc, of pictures; fc, a language model's."""
    things = [thing for thing in THINGS if kind != "vc" or thing[0] not in UNKNOWN]
    captions = []
    for i in rng.integers(len(things), size=2000):
        first, second = rng.uniform(size=2) < 0.5           # loud or soft, small or large, dark
        if kind == "ac":
            caption = rng.choice(audio_captions(things[i], first))
        elif rng.uniform() < TWO_THINGS and kind == "fc":
            two = [things[i], things[rng.integers(len(things))]]
            photos = [vision_captions(thing, first, second)[1] for thing in two]
            caption = " and ".join(photos).replace("a photo of ", "")
        else:
            caption = rng.choice(vision_captions(things[i], first, second))
        captions.append(str(caption))
    return captions


def write_toy_vocabulary(path):
    """A vocabulary in CLIP's format: merges learned from the toy's captions, a token a word."""
    texts = ["and"]
    for thing, yes in product(THINGS, (True, False)):
        texts += vision_captions(thing, yes, yes) + audio_captions(thing, yes)
    words = [f" {' '.join(word)}</w> " for word in set(" ".join(texts).split())]
    text = "#version: toy\n"
    while pairs := Counter(chain(*map(pairwise, map(str.split, words)))):
        pair = " ".join(max(sorted(pairs), key=pairs.get))
        text += f"{pair}\n"
        words = [word.replace(f" {pair} ", f" {pair.replace(' ', '')} ") for word in words]
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_toy(folder, seed=0, splits=TOY_SPLITS, workers=2):
    """The toy world as files under `folder`, in the index format that AudioSet is read in.

    pairs.jsonl: image-caption pairs for the toy's CLIP. train.jsonl: clips without captions.
    gold.jsonl: some of those with one, what AudioCaps is to AudioSet. val.jsonl: each of the 144
    things once, with 5 captions; test.jsonl: four times. ac.txt, vc.txt, fc.txt: captions alone.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; delete it to make it anew")
    part = folder.with_name(f"{folder.name}.part")
    for name in ("audio", "frames"):
        (part / name).mkdir(parents=True, exist_ok=True)
    indexes = {"gold": []}
    for split, count in splits.items():
        make = partial(make_toy_clip, split=split, folder=part, seed=seed)
        make = np.vectorize(make, otypes=[object])
        # some at a time: to hand a clip over takes a worker longer than to make it
        made = loader(range(count), workers, batch_size=16, collate_fn=make)
        bar = tqdm(made, f"toy world, {split}", unit=" × 16 clips")
        indexes[split] = list(chain.from_iterable(bar))
    rng = np.random.default_rng((seed, 1))
    for row in indexes["train"]:
        captions = row.pop("captions")
        if len(indexes["gold"]) < TOY_GOLD:
            indexes["gold"].append(row | {"captions": [str(rng.choice(captions))]})
    for name, rows in indexes.items():
        (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng((seed, 2))
    for kind in ("ac", "vc", "fc"):
        (part / f"{kind}.txt").write_text("\n".join(toy_captions(kind, rng)) + "\n")
    write_toy_vocabulary(part / "vocab.txt.gz")
    os.replace(part, folder)


# ------------------------------------------------------------------------------- the commands
def main():
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("command", choices=["toy", "extract", "stats"])
    flag("--out", help="folder to write (toy: data/toy; extract: the table's own)")
    flag("--segments", help="extract: AudioSet's, AudioCaps' or VGGSound's table")
    flag("--videos", help="extract: folder of the videos")
    flag("--data", default="audioset", help="stats: a dataset's name or its folder")
    flag("--mels", type=int, default=FrontEnd.mels, help="stats: mel bins (128)")
    flag("--frames", type=int, default=FrontEnd.frames, help="stats: of 10 ms (1000)")
    flag("--sample-rate", type=int, default=FrontEnd.sample_rate, help="Hz (44100)")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    args = parser.parse_args()
    if args.command == "toy":
        make_toy(args.out or "data/toy", workers=args.workers)
    elif args.command == "extract":
        if not args.videos or not (args.segments or args.out):
            raise ValueError("extract needs --videos FOLDER, and --segments TABLE or --out FOLDER")
        out = args.out or Path(args.segments).parent
        extract(args.segments, args.videos, out, args.sample_rate, args.workers)
    else:
        folder = dataset_folder(args.data)
        clips = read_split(folder.name if folder.name in TABLES else "audioset", folder, "train")
        front_end = FrontEnd(args.sample_rate, args.mels, args.frames)
        statistics([clip for clip in clips if clip.audio], front_end)


if __name__ == "__main__":
    run(main)
