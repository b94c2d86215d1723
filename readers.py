"""Every dataset's reader, as its publisher ships it, and the index that replaces them: a dataset -> list of Clip.

`read_split` is what the stages call; README.md, 'Datasets', says what each folder holds.
"""
import csv
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path


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

    @property
    def middle_frame(self):
        """Path of the second frame, the paper's middle one (§3.2.2), or of the only one."""
        return self.frames[:2][-1]


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


def labels_of(clips, folder):
    """AudioSet's labels, in its order where `folder` holds the table, else those of the clips. Raises ValueError."""
    used, known = {label for clip in clips for label in clip.labels}, list(class_names(folder).values())
    if known and (strange := used - set(known)):
        raise ValueError(f"{folder}: a clip's label {min(strange)!r} is not in {CLASS_NAMES}")
    return known or sorted(used)


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
    "audioset": "AudioSet comes as ids: download the videos yourself, then see 'Datasets' and 'The full run' in "
                "README.md. To try without any download: python pretrain.py --data toy",
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


def dataset_in(folder, split):
    """Name of the dataset that a folder holds as published, None where it holds none."""
    return next((name for name, reader in READERS.items() if reader.table(Path(folder), split).exists()), None)


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
