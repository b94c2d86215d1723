"""What is done to a dataset once: cut clips out of videos, pack sounds, find mean and standard deviation (§3.2.2).

    python data.py toy
    python data.py extract --segments data/audioset/eval_segments.csv --videos VIDEOS
    python data.py pack --data audioset
    python data.py stats --data audioset

S  samples of a waveform     N  sounds     T  frames of 10 ms     F  mel bins
"""
import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from tqdm import tqdm

from data import FrontEnd, Silent, Unreadable, check_rate, load_audio, resample
from processes import Claim, in_processes, new_array, stamp, write_whole
from readers import (
    AUDIOSET_SPLITS,
    VIDEO,
    by_video,
    class_names,
    dataset_folder,
    dataset_in,
    files_of,
    find_files,
    read_segments,
    read_split,
)
from toy import TOY_SPLITS, make_toy

# ------------------------------------------------------------------------- from videos to clips

SLACK = 0.5  # seconds that a video may lack: tables are in whole seconds, videos are not
DAMAGED = (av.FFmpegError, AttributeError, ValueError, RuntimeError, ArithmeticError, LookupError, MemoryError)


@contextmanager
def opened(path, kind):
    """A file opened with PyAV: container, its first stream of kind "audio" or "video".

    What goes wrong with it, here or while it is open, is Unreadable: decoders fail in many ways.
    """
    try:
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except (OSError, *DAMAGED) as error:
        raise Unreadable(f"{path}: can't be opened ({error})") from None
    try:
        with container:
            streams = [stream for stream in container.streams if stream.type == kind and stream.codec_context]
            if not streams:
                raise Unreadable(f"{path}: has no {'sound' if kind == 'audio' else 'pictures'}")
            yield container, streams[0]
    except DAMAGED as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path}: {type(error).__name__}: {error}") from None


def decoded(container, stream, start):
    """Frames of a stream from `start` (seconds from the file's own beginning) or a little earlier on: (time, frame).

    Where the file is damaged the frames end; that a stretch came out short is the caller's to notice.
    """
    zero = (container.start_time or 0) / av.time_base
    try:
        for back in (0, 5, 20, math.inf):  # a container that has no index is entered anywhere
            container.seek(max(0, int((max(0, start - back) + zero) / stream.time_base)), stream=stream)
            frames = ((frame.time - zero, frame) for frame in container.decode(stream) if frame.time is not None)
            if stream.type == "video" and back < math.inf:  # what comes before a key frame is not whole
                frames = itertools.dropwhile(lambda found: not found[1].key_frame, frames)
            first = next(frames, None)
            if first is None or first[0] <= start or start <= back:
                break
        if first:
            yield first
            yield from frames
    except (OSError, ValueError, av.FFmpegError):
        return


def first_channel(frame):
    """A decoded stretch of sound -> its first channel, (n,) in [-1, 1]."""
    samples = frame.to_ndarray()                                                     # (channels, n) or (1, channels·n)
    samples = samples[0] if frame.format.is_planar else samples[0, ::frame.layout.nb_channels]
    if samples.dtype.kind == "f":
        return samples
    silence, loudest = (128, 128) if samples.dtype == np.uint8 else (0, np.iinfo(samples.dtype).max + 1)
    return (samples.astype(np.float32) - silence) / loudest


def cut_audio(path, start, end, sample_rate):
    """First channel of `start` to `end` (seconds) of a video or audio file -> (S,) float32. Raises Unreadable.

    Sample-accurate: frames lie where their time stamps say, decoding begins a second early for codecs that need a
    run-up, and the resampling filter has no delay.
    """
    with opened(path, "audio") as (container, stream):
        rate = stream.rate
        check_rate(path, rate)
        wave, covered, at = np.zeros(round((end - start) * rate), np.float32), 0, None
        for time, frame in decoded(container, stream, start - 1):
            samples, due = first_channel(frame), round((time - start) * rate)
            at = due if at is None or abs(due - at) > 0.02 * rate else at  # times may be in whole milliseconds
            first, last = max(at, 0), min(at + len(samples), len(wave))
            if last > first:
                wave[first:last] = samples[first - at:last - at]
                covered += last - first
            at += len(samples)
            if at >= len(wave):
                break
        begins = float((stream.start_time or 0) * stream.time_base) - (container.start_time or 0) / av.time_base - start
        wanted = len(wave) - max(0, round(begins * rate))  # a sound track that sets in late is silent before
        if covered < wanted - SLACK * rate or not covered:
            raise Unreadable(f"{path}: has {covered / rate:.1f} of {len(wave) / rate:g} s of sound from {start:g} s on")
        return resample(torch.from_numpy(wave), rate, sample_rate)


def shown(container, stream, start):
    """Pictures of a stream from `start` on -> (picture, from when, until when it is shown), in seconds."""
    picture, since = None, 0.0
    for time, following in decoded(container, stream, start):
        if picture:
            yield picture, since, time - 1e-4
        picture, since = following, time
    if picture:  # the last one stays for a while
        yield picture, since, since + max(SLACK, float((picture.duration or 0) * stream.time_base))


def cut_frames(path, times, side):
    """The pictures shown at these times (seconds, ascending) -> list of PIL images, shorter side at most `side` pixels.

    Raises Unreadable where a picture is missing; one that comes up to half a second late will do.
    """
    times, images = list(times), []
    with opened(path, "video") as (container, stream):
        for picture, since, until in shown(container, stream, times[0]):
            while times and since <= times[0] + SLACK and times[0] <= until:
                images.append(picture.to_image())
                del times[0]
            if not times:
                break
        else:
            raise Unreadable(f"{path}: has no picture at {times[0]:.1f} s")
        factor = side / min(images[0].size) if side else 1
        if factor < 1:
            size = [round(length * factor) for length in images[0].size]
            images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
        return images


@dataclass(frozen=True)
class Extraction:
    """Cuts a segment out of its video: `audio/xx/{id}.wav`, `frames/xx/{id}_1.jpg` … 4 below `out`."""
    out: Path
    sample_rate: int    # Hz
    side: int           # pixels of a frame's shorter side, 0 for as it is

    def paths(self, segment):
        """Where a segment's files go, relative to `out`: the WAV, four JPEGs. 4,000 folders share two million clips."""
        place = f"{segment.video[:2]}/{segment.id}"
        return f"audio/{place}.wav", [f"frames/{place}_{i}.jpg" for i in range(1, 5)]

    def __call__(self, job):
        """(segment, its files as from files_of) -> (status, reason): done, no pictures, unreadable or missing.

        A file gets its name when it is whole, and the WAV comes last: where all are there, the clip is done.
        """
        segment, videos = job
        audio, frames = self.paths(segment)
        audio = self.out / audio
        samples = round((segment.end - segment.start) * self.sample_rate)
        there = audio.exists() and audio.stat().st_size == 44 + 2 * samples  # a WAV header and 16 bits a sample
        if there and (self.out / frames[-1]).exists():
            return "done", "extracted earlier"
        best = ("no pictures", "extracted earlier") if there else ("missing", f"no {segment.video}.* among the videos")
        for begins_there, video in videos:
            offset = segment.start if begins_there else 0.0
            found = self.cut(video, segment.start - offset, segment.end - offset, audio, frames)
            if found[0] == "done":
                return found
            best = found if best[0] == "missing" or found[0] == "no pictures" else best
        return best

    def cut(self, video, start, end, audio, frames):
        """Write the files of one clip, as far as the video has them -> (status, reason)."""
        status, reason = "unreadable", ""
        try:
            wave = cut_audio(video, start, end, self.sample_rate).clamp(-1, 1)
            rounded = (wave * 32_767).round()
            if not wave.isfinite().all() or rounded.min() == rounded.max():
                raise Unreadable(f"{video}: silent, or not finite, from {start:g} to {end:g} s")
            status = "no pictures"
            times = [start + i * (end - start) / 3 for i in range(4)]  # §3.2.2: 4 equally spaced, both ends included
            for name, image in zip(frames, cut_frames(video, times, self.side)):
                write_whole(self.out / name, lambda path, image=image: image.save(path, "JPEG", quality=95))
            status = "done"
        except Unreadable as error:
            reason = str(error)
            if status == "unreadable":
                return status, reason
        write_whole(audio, lambda path: soundfile.write(path, wave.numpy(), self.sample_rate, "PCM_16", format="WAV"))
        return status, reason


def extract(table, videos, out, sample_rate=FrontEnd.sample_rate, side=224, workers=2):
    """Cut a table's segments out of the videos below a folder; returns {status: count}.

    Leaves `<split>.jsonl` (the index) and `<split>_report.csv` (a line a segment: id, status, reason) in `out`. Called
    again it goes on where it was cut short, keeps what is there even if its video is gone, and tries again what was
    missing or unreadable. Raises FileNotFoundError, ValueError (other settings than before, nothing found).
    """
    table, out = Path(table), Path(out)
    segments, files, names = read_segments(table), by_video(find_files(videos, VIDEO)), class_names(table.parent)
    split = {table: split for split, table in AUDIOSET_SPLITS.items()}.get(table.stem, table.stem)
    index, report = out / f"{split}.jsonl", out / f"{split}_report.csv"
    lock = Claim(out / f"{split}.lock")
    note, made_with = out / "extract.json", json.dumps({"sample_rate": sample_rate, "side": side})
    if note.exists() and note.read_text() != made_with:
        raise ValueError(f"{out} was extracted with {note.read_text()}, not {made_with}; choose another --out")
    write_whole(note, lambda path: path.write_text(made_with))
    cut, jobs = Extraction(out, sample_rate, side), [(segment, files_of(segment, files)) for segment in segments]
    bar = tqdm(in_processes(cut, jobs, workers), unit=" clips",
               desc=f"{split}: {sum(bool(found) for _, found in jobs)} of {len(jobs)} videos found")
    rows, clips, counts = io.StringIO(), [], dict.fromkeys(("done", "no pictures", "unreadable", "missing"), 0)
    csv.writer(rows).writerow(("id", "status", "reason"))
    for (status, reason), (segment, _) in zip(bar, jobs):
        csv.writer(rows).writerow((segment.id, status, reason))
        counts[status] += 1
        if status == "unreadable":
            bar.write(f"skipped: {reason}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        if status in ("done", "no pictures"):
            audio, frames = cut.paths(segment)
            clip = {"id": segment.id, "audio": audio, "frames": frames if status == "done" else [],
                    "labels": [names.get(mid, mid) for mid in segment.labels], "captions": segment.captions}
            clips.append(json.dumps({key: value for key, value in clip.items() if value}, ensure_ascii=False) + "\n")
    write_whole(report, lambda path: path.write_text(rows.getvalue(), "utf-8", "backslashreplace", newline=""))
    summary = f"{len(segments)} segments: " + ", ".join(f"{count} {status}" for status, count in counts.items())
    if not clips:
        raise ValueError(f"{summary}; reasons in {report}. Is {videos} the right folder?")
    write_whole(index, lambda path: path.write_text("".join(clips), "utf-8"))
    lock.close()
    print(f"{summary}\nindex {index}, reasons in {report}")
    return counts


# ----------------------------------------------------------------------------------- the pack

class Pack:
    """A dataset's sounds at one rate as 16-bit samples in one memory-mapped file: nothing is left to decode.

    Made by `pack`. What a file of 16 bits at that rate holds is kept exactly, everything else is rounded to 16 bits.
    """

    def __init__(self, folder, front_end):
        self.folder, self.front_end = Path(folder), front_end
        self.paths = np.load(self.folder / "paths.npy", mmap_mode="r")                # (N,) bytes, sorted
        self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")              # (N + 1,)
        self.waves = np.memmap(self.folder / "waves.i16", np.int16, "r")              # (all samples,)

    def __reduce__(self):  # a worker process opens the files itself
        return Pack, (self.folder, self.front_end)

    def load(self, path):
        """As FrontEnd.load, but int16. Raises Unreadable, Silent."""
        name = os.fsencode(os.path.relpath(path, self.folder.parent))
        at = int(np.searchsorted(self.paths, name))
        if at == len(self.paths) or self.paths[at] != name or self.starts[at] == self.starts[at + 1]:
            wave, length = self.front_end.load(path)
            return sixteen_bit(wave), length
        end = min(self.starts[at + 1], self.starts[at] + self.front_end.samples)
        wave = np.array(self.waves[self.starts[at]:end])
        if wave.min() == wave.max():
            raise Silent(f"{path}: silent (every sample of its first {self.front_end.seconds:g} s is equal)")
        return self.front_end.padded(torch.from_numpy(wave))


def sixteen_bit(wave):
    """Float32 in [-1, 1] -> the nearest int16."""
    return (wave * 32768).round().clamp(-32768, 32767).to(torch.int16)


def file_of(folder, name):
    """A packed sound's file, as the pack names it: relative to the dataset's folder, in bytes."""
    return os.path.normpath(os.path.join(os.path.abspath(folder), os.fsdecode(name)))


def pack_one(path, sample_rate):
    """A file's samples (S,) int16, or why it can't be read."""
    try:
        return sixteen_bit(load_audio(path, sample_rate))
    except Unreadable as error:
        return str(error)


def pack(folder, clips, sample_rate, workers=2):
    """Write the clips' sounds into <folder>/packed-<rate>, for training to read; goes on where it was cut short.

    Returns the pack's folder, how many sounds it holds, how many could not be read. Raises ValueError where there is
    a pack of other files, which may be all that is left of them.
    """
    out = Path(folder) / f"packed-{sample_rate}"
    lock = Claim(out / "lock")
    names = sorted({os.fsencode(os.path.relpath(clip.audio, folder)) for clip in clips})
    files = [file_of(folder, name) for name in names]
    stamps = np.array([stamp(path) for path in files], np.int64)                      # (N, 2)
    if not (out / "stamps.npy").exists():  # written last: the other tables are there where it is
        np.save(out / "paths.npy", np.array(names))
        new_array(out / "starts.npy", np.int64, (len(names) + 1,))
        np.load(out / "starts.npy", mmap_mode="r+")[1:] = -1
        (out / "waves.i16").write_bytes(b"")
        np.save(out / "new.npy", stamps)
        os.replace(out / "new.npy", out / "stamps.npy")
    elif (np.load(out / "paths.npy").tolist() != names
          or not ((stamps == 0) | (np.load(out / "stamps.npy") == stamps)).all()):
        raise ValueError(f"{out} was made of other files, or some have changed; delete it to make it anew")
    (out / "digest").unlink(missing_ok=True)
    starts = np.load(out / "starts.npy", mmap_mode="r+")                              # (N + 1,), -1 where not written
    with open(out / "waves.i16", "rb+") as file:
        done = int(((starts >= 0) & (2 * starts <= file.seek(0, os.SEEK_END))).sum()) - 1
        starts[done + 1:] = -1
        file.truncate(2 * starts[done])  # what a killed run wrote beyond its last entry
        file.seek(0, os.SEEK_END)
        bar = tqdm(in_processes(partial(pack_one, sample_rate=sample_rate), files[done:], workers), total=len(names),
                   initial=done, desc=str(out), unit=" clips")
        for i, samples in enumerate(bar, done):
            if isinstance(samples, str):
                bar.write(f"skipped: {samples}", file=sys.stderr)
                samples = torch.zeros(0, dtype=torch.int16)
            file.write(samples.numpy().tobytes())
            file.flush()
            starts[i + 1] = starts[i] + len(samples)
    if starts[-1] == 0:
        shutil.rmtree(out)
        raise ValueError(f"not one of {len(names)} sounds can be read")
    starts.flush()
    write_whole(out / "digest", lambda path: path.write_text(digest_of_tables(out)))
    skipped = int((np.diff(starts) == 0).sum())
    lock.close()
    return out, len(names) - skipped, skipped


def digest_of_tables(out):
    """Of what says where a pack's sounds lie, which must be right to the last bit."""
    tables = b"".join((out / f"{name}.npy").read_bytes() for name in ("paths", "starts", "stamps"))
    return hashlib.sha256(tables).hexdigest()


def sound_loader(folder, front_end):
    """How training reads sounds: front_end.load, or the folder's pack where it has one at that rate.

    Raises ValueError where the pack was cut short, or a file has changed since.
    """
    out = Path(folder) / f"packed-{front_end.sample_rate}"
    if not (out / "stamps.npy").exists():
        return front_end.load
    try:
        whole = (out / "digest").read_bytes() == digest_of_tables(out).encode()
        whole = whole and (out / "waves.i16").stat().st_size == 2 * np.load(out / "starts.npy", mmap_mode="r")[-1]
    except OSError:
        whole = False
    if not whole:
        raise ValueError(f"{out} is not whole: run python data.py pack again, or delete it")
    pack = Pack(out, front_end)
    if os.environ.get("RANK", "0") == "0":
        for name, then in zip(pack.paths, np.load(out / "stamps.npy").tolist()):
            path = file_of(folder, name)
            if stamp(path) not in ((0, 0), tuple(then)):  # a file that is gone has done its duty
                raise ValueError(f"{path} has changed since {out} was made; delete that to read the files again")
        print(f"{len(pack.paths)} sounds are read from {out}")
    return pack.load


# --------------------------------------------------------------------------------- statistics

def sums(clip, front_end):
    """A clip's log-mel values: (count, sum, sum of squares) as (3,) float64, or why it can't be read."""
    try:
        wave, length = front_end.load(clip.audio)
    except Unreadable as error:
        return str(error)
    x = front_end(wave[None], torch.tensor([length])).double()                       # (1, 1, T, F), mean 0, std 1
    return torch.stack([torch.tensor(x.numel(), dtype=torch.float64), x.sum(), x.square().sum()])


def statistics(clips, front_end, workers=2):
    """Mean and standard deviation of the clips' log-mel values as the encoder sees them, padding included.

    Returns (mean, std, clips read). front_end's own mean and std are ignored. Raises ValueError if none can be read.
    """
    total, read = torch.zeros(3, dtype=torch.float64), 0
    measure = partial(sums, front_end=replace(front_end, mean=0.0, std=1.0))
    bar = tqdm(in_processes(measure, clips, workers), desc="statistics", unit=" clips")
    for result in bar:
        if isinstance(result, str):
            bar.write(f"skipped: {result}", file=sys.stderr)
        else:
            total, read = total + result, read + 1
    if not read:
        raise ValueError(f"not one of {len(clips)} clips could be read")
    count, first, second = total.tolist()
    return first / count, math.sqrt(second / count - (first / count) ** 2), read


# --------------------------------------------------------------------------------- the commands

def main():
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
    names = {split: dataset_in(folder, split) for split in ("train", "val", "test")}
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
