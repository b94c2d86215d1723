"""Damaged files: every reader and loader ends in what it would have read, in a clear error, or in a counted skip.

    python -m pytest tests/test_fuzz.py tests/test_faults.py            # prints a table of what was tried
    FUZZ=10 python -m pytest -n 8 tests/test_fuzz.py                    # ten times as many files

Files are made whole, then damaged in one of several ways, always the same ones; a process of its own, with a limit on
its memory and its time, reads them.
"""
import collections
import faulthandler
import json
import multiprocessing
import os
import resource
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_video, torchscript_archive
from PIL import Image

import curate
import data
import evaluate
import listen
import prepare
import processes
import readers
from bank import Bank
from clip_load import Tokenizer, import_vipant, load_clip
from data import FrontEnd, Unreadable
from model import CLIP, VisionTransformer
from train import audio_encoder_of, load_checkpoint, save_checkpoint

MEMORY, SECONDS = 2 ** 31, 30   # a file may take that much more memory than the process has, and that long
TEXT = [b"..", b"/", b"../../etc/passwd", b"\0", b"NaN", b"1e999", b"-1", b'"', b",", b"\n", b"{", b"]", b"\\u0000",
        b"\xff\xfe", b"\xf0\x9f\x92\xa9", b"9" * 400, b"null", b"#", b"[" * 200]
NUMBERS = [(number).to_bytes(size, order) for size in (2, 4, 8) for order in ("little", "big")
           for number in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)]


def damaged(content, rng):
    """Bytes of a file -> the same with something wrong; half of the damage is within the first 300 bytes."""
    content = bytearray(content)
    end = min(len(content), 300) if rng.random() < 0.5 else len(content)
    at, length = int(rng.integers(max(1, end))), int(rng.integers(1, 65))
    match int(rng.integers(8)):
        case 0 | 1:
            for _ in range(int(rng.integers(1, 9))):
                content[int(rng.integers(max(1, end)))] ^= 1 << int(rng.integers(8))
        case 2:
            content[at:at + length] = rng.bytes(length)
        case 3:
            del content[at:at + length]
        case 4:
            content[at:at] = content[at:at + length] * int(rng.integers(1, 9))
        case 5:
            del content[at:]
        case 6:
            number = NUMBERS[int(rng.integers(len(NUMBERS)))]
            content[at:at + len(number)] = number
        case 7:
            token = TEXT[int(rng.integers(len(TEXT)))]
            content[at:at + (len(token) if rng.random() < 0.5 else 0)] = token
    return bytes(content)


# ----------------------------------------------------------------------------- what is read, and how
# make(folder, world) -> whole files; read(path) -> what they hold, in a form that can be compared.

def sounds(folder, world):
    wave = np.random.default_rng(0).normal(size=8000) * 0.1
    names = ["a.wav", "b.flac", "c.ogg", "d.mp3", "e.aiff", "f.opus"]
    for name in names:
        soundfile.write(folder / name, wave, 16_000, **({"format": "OGG", "subtype": "OPUS"} if name == "f.opus" else {}))
    return [folder / name for name in names]


def read_sound(path):
    wave = data.load_audio(path, 16_000, 1.0)
    assert wave.isfinite().all() and 0 < len(wave) <= 16_016
    return wave


def whole_sound(path):
    return prepare.pack_one(path, 16_000)


def pictures(folder, world):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.png", "c.webp", "d.gif"):
        Image.fromarray(pixels).save(folder / name)
    return sorted(folder.iterdir())


def read_picture(path):
    image = data.load_image(path, 32)
    assert image.shape == (3, 32, 32) and image.isfinite().all()
    return image


def tables(folder, world):
    ids = [f"video_{i:05d}" for i in range(8)]
    (folder / "segments.csv").write_text("# a\n# b\n# c\n" + "".join(f'{i}, 3.000, 13.000, "/m/1,/m/2"\n' for i in ids))
    (folder / "captions.csv").write_text("audiocap_id,youtube_id,start_time,caption\n"
                                         + "".join(f'{n},{i},30,"a dog, barking"\n' for n, i in enumerate(ids)))
    return sorted(folder.iterdir())


def published(folder, world):
    (folder / "esc50.csv").write_text("filename,fold,target,category,esc10\n"
                                      + "".join(f"{n}.wav,{n % 5 + 1},0,dog,True\n" for n in range(9)))
    (folder / "UrbanSound8K.csv").write_text("slice_file_name,fold,class\n"
                                             + "".join(f"{n}.wav,{n % 5 + 1},siren\n" for n in range(9)))
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6))
    (folder / "clotho_captions_evaluation.csv").write_text(header + "\n" + "".join(
        f"{n}.wav," + ",".join(f'"caption {i}, of {n}"' for i in range(5)) + "\n" for n in range(9)))
    (folder / readers.CLASS_NAMES).write_text("index,mid,display_name\n0,/m/1,Speech\n1,/m/2,\"Dog, bark\"\n")
    return sorted(folder.iterdir())


def read_published(path):
    """The file where its dataset has it; no path of a clip may leave the dataset."""
    name = next(name for name in ("esc50", "UrbanSound8K", "clotho", "class") if path.name.startswith(name))
    root = path.parent / "root"
    place = {"esc50": root / "meta", "UrbanSound8K": root / "metadata"}.get(name, root) / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    path.rename(place)
    if name == "class":
        return readers.class_names(root)
    clips = {"esc50": readers.read_esc50, "UrbanSound8K": readers.read_us8k, "clotho": readers.read_clotho}[name](root)
    stays_inside(root, [clip.audio for clip in clips])
    return clips


def stays_inside(root, paths):
    for path in filter(None, paths):
        assert os.path.normpath(path).startswith(f"{root}{os.sep}") and "\0" not in path, path


def indexes(folder, world):
    (folder / "ours.jsonl").write_text("".join((world / "test.jsonl").read_text().splitlines(True)[:6]))
    (folder / "authors.jsonl").write_text("".join(json.dumps(
        {"id": f"video_{i:05d}", "dir": "part", "aclip": "wav", "frame": ["1.jpg", "2.jpg"], "labels": ["Speech"],
         "captions": ["a man speaks"]}) + "\n" for i in range(6)))
    return sorted(folder.iterdir())


def read_indexes(path):
    clips = readers.read_index(path, need=())
    stays_inside(path.parent, [place for clip in clips for place in (clip.audio, *clip.frames)])
    return clips


def coco(folder, world):
    rows = [{"id": i, "image_id": i, "caption": f"a dog number {i}"} for i in range(20)]
    (folder / "captions_train2014.json").write_text(json.dumps({"annotations": rows}))
    return sorted(folder.iterdir())


def vocabularies(folder, world):
    (folder / "vocab.txt.gz").write_bytes((world / "vocab.txt.gz").read_bytes())
    return sorted(folder.iterdir())


def read_vocabulary(path):
    return Tokenizer(path)(["a dog barks", "eine süße Katze"]).tolist()


SIZES = {"image_size": 32, "patch": 16, "vision_width": 64, "vision_layers": 1, "context_length": 16, "vocab_size": 600,
         "text_width": 64, "text_layers": 1, "output_dim": 16}


def clips(folder, world):
    torch.manual_seed(0)
    torch.save(CLIP(**SIZES).state_dict(), folder / "clip.pt")
    return [folder / "clip.pt"]


def scripts(folder, world):
    torch.manual_seed(0)
    torchscript_archive(CLIP(**SIZES), folder / "script.pt", size=32)
    return [folder / "script.pt"]


def read_clip(path):
    return {name: tensor.tolist() for name, tensor in load_clip(path).state_dict().items()}


def checkpoints(folder, world):
    torch.manual_seed(0)
    front_end = FrontEnd(16_000, 32, 40, 0.0, 1.0)
    encoder = VisionTransformer((40, 32), 16, (8, 8), channels=1, width=64, layers=1, heads=1, output_dim=16)
    learner = {f"audio_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_checkpoint(folder / "checkpoint.pt", {
        "stage": "pretrain", "encoder": encoder.config, "front_end": asdict(front_end), "step": 1, "steps": 1,
        "learner": learner | {"log_scale": torch.tensor(2.7)}, "settings": {}, "clip": {"fingerprint": "0"}})
    return [folder / "checkpoint.pt"]


def read_checkpoint(path):
    checkpoint = load_checkpoint(path, ["pretrain"])
    encoder, front_end = audio_encoder_of(checkpoint, path)
    return {name: tensor.tolist() for name, tensor in encoder.state_dict().items()}, front_end


def theirs(folder, world):
    torch.manual_seed(0)
    eye = CLIP(**SIZES).visual.state_dict()
    ear = {("pre_encoder." if name.split(".")[0] in ("conv1", "ln_pre") else "misc.") + name: tensor
           for name, tensor in eye.items()}
    torch.save({"cfg": {}, "model": [{}, ear, {}, {"logit_scale": torch.tensor(2.7)}]}, folder / "theirs.pth")
    return [folder / "theirs.pth"]


def read_theirs(path):
    return import_vipant(path, read_theirs.clip, mels=32, stride=(16, 16))["front_end"]


read_theirs.clip = CLIP(**SIZES)


def arrays(folder, world):
    rows = np.random.default_rng(0).normal(size=(40, 16))
    np.save(folder / "embeddings.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    starts = rows[:, 8:9] / np.linalg.norm(rows[:, :8], axis=1, keepdims=True)
    unit = rows[:, :8] / np.linalg.norm(rows[:, :8], axis=1, keepdims=True)
    np.save(folder / "heard.npy", np.concatenate([starts, unit], 1).astype(np.float32))
    return sorted(folder.iterdir())


def read_array(path):
    """A bank is made anew where its array is another one; its rows are unit vectors; a search hears a file again."""
    if path.name == "heard.npy":
        content = listen.remembered(path, 8)
        if content is None:
            raise ValueError(f"{path}: heard anew")
        return content
    if not processes.is_array(path, np.float16, (40, 16)):
        raise ValueError(f"{path}: made anew")
    bank = Bank(str(path), np.arange(40), np.arange(0, 41))
    drawn = torch.stack([bank.draw(i, np.random.default_rng(0)) for i in range(40)])
    assert (drawn.norm(dim=1) - 1).abs().max() < 0.01
    return drawn


def packs(folder, world):
    prepare.pack(folder, [readers.Clip(str(i), path) for i, path in enumerate(map(str, sounds(folder, world)[:2]))], 16_000, 0)
    return [path for path in sorted((folder / "packed-16000").iterdir()) if path.suffix != ".i16"]


def read_pack(path):
    """What says where a pack's sounds lie, damaged: not one sample may come from elsewhere."""
    place = path.parent / "root/packed-16000"
    place.mkdir(parents=True, exist_ok=True)
    for other in (path.parent.parent / "whole/packed-16000").iterdir():
        (place / other.name).write_bytes(other.read_bytes())
    path.rename(place / path.name.split("-")[-1])
    load = prepare.sound_loader(place.parent, FrontEnd(16_000, 32, 50))
    wave, length = load(str(place.parent / "a.wav"))
    assert wave.shape == (FrontEnd(16_000, 32, 50).samples,) and 0 < length <= len(wave)
    return wave.tolist()


def videos(folder, world):
    for name, codec in (("video_00000.mp4", "aac"), ("video_00001.mkv", "flac"), ("video_00002.avi", "libmp3lame")):
        make_video(folder / name, seconds=3, codec=codec)
    return sorted(folder.iterdir())


def read_video(path):
    segment = readers.Segment(path.name[-15:].split(".")[0][-11:], 0.0, 2.5)
    status, reason = prepare.Extraction(path.parent / "out", 16_000, 48)((segment, [(True, str(path))]))
    if status not in ("done", "no pictures"):
        raise Unreadable(reason)
    wave = data.load_audio(path.parent / "out" / prepare.Extraction(path.parent / "out", 16_000, 48).paths(segment)[0], 16_000)
    assert len(wave) == 40_000
    return status


def notes(folder, world):
    (folder / "fc.txt.json").write_text(json.dumps({"made_of": {"model": "m"}, "batches": 1, "bytes": 10}))
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, "epoch": i, "loss": 1.0, "precision@1": 2.0}) + "\n"
                                              for i in range(9)))
    return sorted(folder.iterdir())


def read_note(path):
    """The note beside generated captions; a log, of which what is damaged is left out."""
    if "json.l" not in path.name and "log" not in path.name:
        return curate.read_note(path)
    return evaluate.epochs_of(path)


KINDS = {  # name -> (make, read, files to damage, whether what is accepted must be what was written)
    "sounds: WAV, FLAC, Ogg, MP3, AIFF, Opus": (sounds, read_sound, 700, False),
    "the same, whole": (sounds, whole_sound, 300, False),
    "pictures: JPEG, PNG, WebP, GIF": (pictures, read_picture, 500, False),
    "videos: MP4, MKV, AVI": (videos, read_video, 300, False),
    "AudioSet's and AudioCaps' CSVs": (tables, readers.read_segments, 500, False),
    "ESC-50's, UrbanSound8K's, Clotho's CSVs, class names": (published, read_published, 500, False),
    "indexes, ours and the authors'": (indexes, read_indexes, 600, False),
    "MSCOCO's captions": (coco, lambda path: readers.read_coco_captions(path.parent), 150, False),
    "vocabularies": (vocabularies, read_vocabulary, 150, True),
    "CLIP's weights": (clips, read_clip, 300, True),
    "CLIP's TorchScript archive": (scripts, read_clip, 300, True),
    "checkpoints": (checkpoints, read_checkpoint, 400, True),
    "the authors' checkpoints": (theirs, read_theirs, 200, True),
    "banks, remembered sounds": (arrays, read_array, 300, False),
    "packs' tables": (packs, read_pack, 300, True),
    "notes, logs": (notes, read_note, 200, False),
}


def read_damaged(kind, folder, count, seed, report):
    """In a process of its own: damage and read `count` files; write how each ended, or what went wrong, to `report`."""
    make, read, _, exact = KINDS[kind]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2), os.dup2(2, 1)  # decoders talk
    torch.set_num_threads(1)
    whole = {path.name: path.read_bytes() for path in sorted((folder / "whole").rglob("*"))
             if path.is_file() and path in make.files}
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    rng, ends, wrong, slowest = np.random.default_rng(seed), collections.Counter(), [], 0.0
    expected = {}
    for i in range(-len(whole), count):  # first each file as it is
        name = list(whole)[i % len(whole)]
        place = folder / "tried"
        place.mkdir(exist_ok=True)
        path = place / name
        path.write_bytes(whole[name] if i < 0 else damaged(whole[name], rng))
        before, began = path.read_bytes(), time.perf_counter()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            result = read(path)
            if isinstance(result, str) and kind == "the same, whole":
                raise Unreadable(result)
            if i < 0:
                expected[name] = repr(result)
            same = repr(result) == expected[name]
            ends["as it was" if same else "as something else"] += i >= 0
            if exact and not same:
                wrong.append(f"{name} {i}: accepted as something else")
        except (Unreadable, ValueError, FileNotFoundError) as error:
            ends["refused"] += i >= 0
            if place.name not in str(error) or i < 0:
                wrong.append(f"{name} {i}: does not name the file: {type(error).__name__}: {error}")
        except BaseException as error:  # noqa: BLE001  that there is no other is what is tested
            wrong.append(f"{name} {i}: {type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.perf_counter() - began)
        if wrong and str(i) in wrong[-1].split(":")[0]:
            (folder / f"wrong_{i}_{name}").write_bytes(before)
        os.system(f"rm -rf '{place}'")
    stray = sorted(path.name for path in folder.iterdir() if path.name not in ("whole", "report.json")
                   and not path.name.startswith("wrong"))
    report.write_text(json.dumps({"ends": ends, "wrong": wrong[:20], "slowest": slowest, "stray": stray}))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, world, tmp_path, record_property):
    make, _, count, _ = KINDS[kind]
    count = int(count * float(os.environ.get("FUZZ", "1")))
    (tmp_path / "whole").mkdir()
    make.files = set(make(tmp_path / "whole", world))
    report = tmp_path / "report.json"
    process = multiprocessing.get_context("fork").Process(
        target=read_damaged, args=(kind, tmp_path, count, list(KINDS).index(kind), report))
    process.start()
    process.join(600)
    process.kill()
    assert process.exitcode == 0, f"the reading process ended with {process.exitcode}; see {tmp_path}"
    found = json.loads(report.read_text())
    assert not found["wrong"] and not found["stray"], (found, str(tmp_path))
    ends = found["ends"]
    assert ends.get("refused", 0) > 0 and found["slowest"] < SECONDS
    record_property("tried", ("damaged: " + kind, count,
                              ", ".join(f"{ends[end]} {end}" for end in ("refused", "as it was", "as something else")
                                        if end in ends)))
