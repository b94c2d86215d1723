"""Datasets in miniature, laid out as their publishers ship them, and clips cut out of real MP4s."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import FPS, RATE, ROOT, make_video
from PIL import Image

from data import FrontEnd, Unreadable
from prepare import cut_audio, cut_frames, extract, statistics
from processes import in_processes
from readers import (
    by_video,
    files_of,
    find_files,
    held_out_by_audiocaps,
    read_coco_captions,
    read_index,
    read_segments,
    read_split,
    youtube_id,
)

A, B, C = "--abcdefghi", "bcdefghij_k", "Ycdefghijkl"  # ids as YouTube makes them: dashes, underscores, a leading Y

AUDIOSET = f"""# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=3, num_unique_labels=2, num_positive_labels=4
# YTID, start_seconds, end_seconds, positive_labels
{A}, 30.000, 40.000, "/m/09x0r,/t/dd00088"
{B}, 0.000, 8.000, "/m/09x0r"
{C}, 420.500, 430.500, "/t/dd00088"
"""
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush, ""splash"""\n'


def tone(path, rate=16_000, seconds=1.0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate), rate, **options)
    return path


@pytest.fixture
def audioset(tmp_path):
    folder = tmp_path / "audioset"
    folder.mkdir()
    (folder / "eval_segments.csv").write_bytes(AUDIOSET.replace("\n", "\r\n").encode())
    (folder / "class_labels_indices.csv").write_text(CLASSES)
    return folder


def test_audioset_as_published(audioset):
    tone(audioset / f"eval/{A}_30.wav")
    tone(audioset / f"eval/Y{C}.flac")
    speech, short, gush = read_split("audioset", audioset)
    assert speech.labels == ("Speech", 'Gush, "splash"') and speech.audio.endswith(f"eval/{A}_30.wav")
    assert short.labels == ("Speech",) and short.audio == "" and short.id == f"{B}_0"
    assert gush.id == f"{C}_420.5" and gush.audio.endswith(f"Y{C}.flac")
    assert [s.end - s.start for s in read_segments(audioset / "eval_segments.csv")] == [10, 8, 10]


@pytest.mark.parametrize(("line", "reason"), [
    (f"{A}, 30.000, 40.000", "not enough values"), (f'{A}, soon, 40.000, "/m/0"', "could not convert"),
    (f'{A}, 40.000, 30.000, "/m/0"', "no stretch"), ('../../etc, 0, 10, "/m/0"', "no id of a YouTube video"),
    (f'{A}, 0, inf, "/m/0"', "no stretch"), (f'{A}, 1, 1.001, "/m/0"', "no stretch"),
    (f'Y{A}, 0, 10, "/m/0"', "no id of a YouTube video")])
def test_a_bad_segment_is_named_by_file_and_line(audioset, line, reason):
    (audioset / "eval_segments.csv").write_text(AUDIOSET + line + "\n")
    with pytest.raises(ValueError, match=rf"eval_segments\.csv:7: .*{reason}"):
        read_split("audioset", audioset)


@pytest.mark.parametrize(("name", "parts"), [
    (A, (A, None, None)), (f"Y{A}", (A, None, None)), (C, (C, None, None)), (f"Y{C}", (C, None, None)),
    (f"{B}_30", (B, 30, None)), (f"Y{B}_30.000_40.000", (B, 30, 40)), (f"{A}_30000_40000", (A, 30_000, 40_000)),
    ("short", None), (f"{A}_x", None)])
def test_names_of_files_that_people_have(name, parts):
    assert youtube_id(name) == parts


def test_a_file_is_taken_by_its_start_then_by_its_id(tmp_path):
    """Start in seconds or milliseconds; a file of another stretch of the video is not the clip; pictures before sound."""
    segment, = (s for s in read_segments(write(tmp_path / "s.csv", AUDIOSET)) if s.video == A)
    for names, chosen in (((f"{A}", f"{A}_30"), f"{A}_30"), ((f"{A}_60", f"{A}_30000_40000"), f"{A}_30000_40000"),
                          ((f"{A}_60",), ""), ((f"{A}_60", f"Y{A}"), f"Y{A}"), ((), ""),
                          ((f"{A}_30000_30010",), "")):
        found = [path for _, path in files_of(segment, by_video([f"x/{name}.wav" for name in names]))]
        assert found[:1] == ([f"x/{chosen}.wav"] if chosen else [])
    both = by_video([f"x/{A}.m4a", f"x/{A}.webm", f"y/{A}_30.wav"])
    assert files_of(segment, both) == [(True, f"y/{A}_30.wav"), (False, f"x/{A}.webm"), (False, f"x/{A}.m4a")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_find_files_follows_links_and_survives_a_circle(tmp_path):
    tone(tmp_path / "real/a.wav")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "data")
    write(tmp_path / "real/.hidden.wav", "")
    assert [os.path.basename(path) for path in find_files(tmp_path / "data", (".wav",))] == ["a.wav"]


def test_audiocaps_as_published(tmp_path):
    rows = [(A, 30, f"A man says, “hello” {i}") for i in range(5)] + [(B, 0, 'Rain, then "thunder"')] * 5
    rows = [*rows[::2], *rows[1::2]]  # a clip's five rows need not be neighbours
    with open(tmp_path / "test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audiocap_id", "youtube_id", "start_time", "caption"),
                                    *((i, *row) for i, row in enumerate(rows))])
    tone(tmp_path / f"audio/{A}.wav")
    hello, rain = read_split("audiocaps", tmp_path)
    assert sorted(hello.captions) == [f"A man says, “hello” {i}" for i in range(5)] and hello.audio
    assert rain.captions == ('Rain, then "thunder"',) * 5 and not rain.audio


@pytest.mark.parametrize("place", [".", "UrbanSound8K"])
def test_urbansound8k_as_published(tmp_path, place):
    (tmp_path / place / "metadata").mkdir(parents=True)
    write(tmp_path / place / "metadata/UrbanSound8K.csv",
          "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
          "100-3-0-0.wav,100,0.0,0.3,1,5,3,dog_bark\n101-5-0-1.wav,101,1.0,5.0,2,10,5,engine_idling\n")
    dog, engine = read_split("us8k", tmp_path)
    assert dog.labels == ("dog bark",) and dog.fold == 5 and engine.fold == 10
    assert engine.audio == str(tmp_path / place / "audio/fold10/101-5-0-1.wav")


def test_mscoco_captions_as_published(tmp_path):
    (tmp_path / "annotations").mkdir()
    write(tmp_path / "annotations/captions_val2014.json", json.dumps(
        {"info": {}, "images": [], "annotations": [{"image_id": 1, "id": 2, "caption": "A café, “closed”.\n"},
                                                   {"image_id": 1, "id": 3, "caption": "Two  dogs"}]}))
    assert read_coco_captions(tmp_path, "val") == ["A café, “closed”.", "Two dogs"]
    with pytest.raises(FileNotFoundError, match=r"captions_train2014\.json.*annotations_trainval2014\.zip"):
        read_coco_captions(tmp_path, "train")
    write(tmp_path / "captions_train2014.json", '{"annotations": [{"id": 2}]}')
    with pytest.raises(ValueError, match="not MSCOCO's captions"):
        read_coco_captions(tmp_path, "train")


def test_the_authors_index_and_layout(audioset):
    rows = [{"id": A, "dir": "balanced", "aclip": ["wav"], "frame": ["1.jpg", "2.jpg"], "bos": 30, "eos": 40,
             "labels": ["/m/09x0r"], "captions": ["hi"]},
            {"id": B, "dir": "", "clip": ["30.flac"], "frame": "jpg", "bos": 0, "eos": 8, "labels": ["unlisted"]}]
    write(audioset / "test.jsonl", "\r\n".join(map(json.dumps, rows)) + "\r\n")
    one, two = read_index(audioset / "test.jsonl", need=("audio", "frames", "labels"))
    assert one.audio == str(audioset / f"balanced/aclip/{A}.wav") and one.captions == ("hi",)
    assert one.frames == tuple(str(audioset / f"balanced/frame/{A}.{i}.jpg") for i in (1, 2)) and one.labels == ("Speech",)
    assert two.audio == str(audioset / f"clip/{B}.30.flac") and two.frames == (str(audioset / f"frame/{B}.jpg"),)


def test_a_folder_that_holds_nothing_says_what_is_missing(tmp_path):
    for name, table in (("audioset", "eval_segments.csv"), ("clotho", "clotho_captions_evaluation.csv"),
                        ("us8k", "UrbanSound8K.csv"), ("audiocaps", "test.csv")):
        with pytest.raises(FileNotFoundError, match=rf"neither test\.jsonl nor .*{table}"):
            read_split(name, tmp_path)


def test_clips_that_audiocaps_tests_with_are_left_out_of_training(tmp_path, audioset):
    (audioset / "eval_segments.csv").rename(audioset / "unbalanced_train_segments.csv")
    clips = read_split("audioset", audioset, "train")
    with pytest.raises(FileNotFoundError, match=r"val\.csv and .*test\.csv.*--leave-out none"):
        held_out_by_audiocaps(clips, tmp_path)
    for split, video in (("val", A), ("test", C)):
        write(tmp_path / f"{split}.csv", f"audiocap_id,youtube_id,start_time,caption\n1,{video},30,hm\n")
    assert held_out_by_audiocaps(clips, tmp_path) == [True, False, True]


# ---------------------------------------------------------------------------------- extraction



def number_of(image):
    """What the bars of a picture say."""
    row = np.asarray(image.convert("L").resize((160, 96)))[48]
    return sum(int(row[16 * bit + 8] > 127) << bit for bit in range(10))


def lag(wave, reference):
    """By how many samples `wave` lags behind `reference`: where their correlation peaks."""
    size = 2 * max(len(wave), len(reference))
    peak = int(np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(reference, size).conj()).argmax())
    return peak if peak < size // 2 else peak - size


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return path, make_video(path)


@pytest.mark.parametrize("start", [0.0, 0.5, 3.0, 3.3371])
def test_sound_is_cut_to_the_sample(video, start):
    path, noise = video
    wave = cut_audio(path, start, start + 8, RATE).numpy()
    assert len(wave) == 8 * RATE and abs(lag(wave, noise[round(start * RATE):][:len(wave)])) <= 1


def test_sound_is_cut_to_the_sample_at_another_rate(video):
    path, noise = video
    wave = cut_audio(path, 2.0, 12.0, 22_050).numpy()
    assert len(wave) == 220_500 and abs(lag(np.repeat(wave, 2), noise[2 * RATE:12 * RATE])) <= 1


@pytest.mark.parametrize("start", [0.0, 3.0, 3.35])
def test_frames_are_those_shown_at_their_times(video, start):
    times = [start + i * 10 / 3 for i in range(4)]
    assert [number_of(image) for image in cut_frames(video[0], times, 0)] == [int(FPS * time + 1e-6) for time in times]


def test_frames_are_made_as_small_as_clip_looks_at_them(video):
    assert [image.size for image in cut_frames(video[0], [1.0], 48)] == [(80, 48)]
    assert [image.size for image in cut_frames(video[0], [1.0], 224)] == [(160, 96)]  # never larger


def segments_csv(path, videos, start=2, end=12):
    return write(path, "# a\n# b\n# c\n" + "".join(f'{video}, {start}.000, {end}.000, "/m/09x0r"\n' for video in videos))


def names(count):
    return [f"video_{i:05d}" for i in range(count)]


def test_extraction_end_to_end(run, tmp_path):
    """One whole video, one cut beforehand, and everything that can be wrong with the others."""
    whole, ready, mute, blind, cut, text, missing, late = videos = names(8)
    noise = make_video(tmp_path / f"in/some/{whole}.mp4")
    make_video(tmp_path / f"in/Y{ready}_2.mp4", seconds=11, seed=1)
    make_video(tmp_path / f"in/{mute}.mp4", sound=False)
    make_video(tmp_path / f"in/{blind}.mp4", pictures=False)
    make_video(tmp_path / f"in/{late}.mp4", seconds=5)
    content = (tmp_path / f"in/some/{whole}.mp4").read_bytes()
    (tmp_path / f"in/{cut}.mp4").write_bytes(content[:len(content) // 2])
    (tmp_path / f"in/{text}.mp4").write_text("not found")
    (tmp_path / "out").mkdir()
    table = segments_csv(tmp_path / "out/eval_segments.csv", videos)
    write(tmp_path / "out/class_labels_indices.csv", CLASSES)
    done = run("data.py", "extract", "--segments", table, "--videos", tmp_path / "in", "--workers", "2")
    assert "8 segments: 2 done, 1 no pictures, 4 unreadable, 1 missing" in done.stdout
    index = {clip.id: clip for clip in read_index(tmp_path / "out/test.jsonl", need=("audio", "labels"))}
    assert set(index) == {f"{name}_2" for name in (whole, ready, blind)}
    clip = index[f"{whole}_2"]
    wave, rate = soundfile.read(clip.audio)
    assert rate == RATE and wave.shape == (10 * RATE,) and soundfile.info(clip.audio).subtype == "PCM_16"
    assert abs(lag(wave, noise[2 * RATE:12 * RATE])) <= 1 and clip.labels == ("Speech",)
    assert [number_of(Image.open(frame)) for frame in clip.frames] == [20, 53, 86, 120]
    assert [number_of(Image.open(frame)) for frame in index[f"{ready}_2"].frames] == [0, 33, 66, 100]
    assert index[f"{blind}_2"].frames == ()
    with open(tmp_path / "out/test_report.csv", newline="") as file:
        report = {row["id"]: row for row in csv.DictReader(file)}
    for name, status, reason in ((mute, "unreadable", "no sound"), (cut, "unreadable", "s of sound from 2 s on"), (missing, "missing", "no "),
                                 (text, "unreadable", "can't be opened"), (late, "unreadable", "has 3.0 of 10 s of sound from 2 s on")):
        assert report[f"{name}_2"]["status"] == status and reason in report[f"{name}_2"]["reason"], report
    assert not list((tmp_path / "out").glob("**/*.part"))


def test_a_video_that_was_cut_off_keeps_what_comes_before_the_cut(tmp_path):
    """A stream format survives losing its end: sound up to there is right, beyond there it is an error."""
    noise = make_video(tmp_path / "v.mkv")
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "v.mkv").read_bytes()[:(tmp_path / "v.mkv").stat().st_size // 2])
    wave = cut_audio(tmp_path / "cut.mkv", 0, 4, RATE).numpy()
    assert abs(lag(wave, noise[:4 * RATE])) <= RATE // 1000  # Matroska's time stamps are whole milliseconds
    with pytest.raises(Unreadable, match=r"cut\.mkv: has \d\.\d of 10 s of sound from 2 s on"):
        cut_audio(tmp_path / "cut.mkv", 2, 12, RATE)
    with pytest.raises(Unreadable, match=r"cut\.mkv: has no picture at "):
        cut_frames(tmp_path / "cut.mkv", [2, 5.3, 8.7, 12], 0)


def test_extraction_that_was_killed_goes_on_and_leaves_nothing_half_written(tmp_path):
    """SIGKILL half-way: what has a name is whole, workers end too, and the next run redoes nothing that was done."""
    make_video(tmp_path / "one.mp4")
    (tmp_path / "in").mkdir()
    for name in names(12):
        os.link(tmp_path / "one.mp4", tmp_path / f"in/{name}.mp4")
    table = segments_csv(tmp_path / "train.csv", names(12))
    command = [sys.executable, str(ROOT / "data.py"), "extract", "--segments", str(table), "--videos",
               str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    audio = tmp_path / "out/audio"
    while len(list(audio.glob("*/*.wav"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(200):  # the workers notice that their parent is gone
        if subprocess.run(["pgrep", "-g", str(process.pid)], stdout=subprocess.DEVNULL, check=False).returncode:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers outlive the killed run")
    early = {path: path.stat().st_mtime_ns for path in audio.glob("*/*.wav")}
    assert 3 <= len(early) < 12 and not (tmp_path / "out/train.jsonl").exists()
    for path in early:
        assert soundfile.info(path).frames == 10 * RATE
        assert len(list((tmp_path / "out/frames/vi").glob(f"{path.stem}_?.jpg"))) == 4
    counts = extract(table, tmp_path / "in", tmp_path / "out", workers=0)
    assert counts == {"done": 12, "no pictures": 0, "unreadable": 0, "missing": 0}
    assert all(path.stat().st_mtime_ns == then for path, then in early.items())
    assert len(read_index(tmp_path / "out/train.jsonl", need=("audio", "frames"))) == 12
    assert not list((tmp_path / "out").glob("**/*.part"))
    images = {path.read_bytes() for path in (tmp_path / "out/frames").glob("*/*_2_1.jpg")}
    assert len(images) == 1  # the same video gives the same frame, before the kill and after it


def test_what_was_extracted_stays_when_its_video_goes(tmp_path, capsys):
    """People download, extract and delete shard by shard; a wrong --videos must not empty the index either."""
    for name in names(2):
        make_video(tmp_path / f"in/{name}.mp4")
    (tmp_path / "in/other.mp4.part").write_text("somebody's download")
    table = segments_csv(tmp_path / "train.csv", names(3))
    extract(table, tmp_path / "in", tmp_path / "in", workers=0)
    (tmp_path / f"in/{names(2)[0]}.mp4").unlink()
    assert extract(table, tmp_path / "in", tmp_path / "in", workers=0)["done"] == 2
    assert (tmp_path / "in/other.mp4.part").exists()
    with pytest.raises(ValueError, match=r'extracted with \{"sample_rate": 44100'):
        extract(table, tmp_path / "in", tmp_path / "in", sample_rate=16_000, workers=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"0 done.*3 missing.*Is .*empty the right folder"):
        extract(table, tmp_path / "empty", tmp_path / "elsewhere", workers=0)
    assert not (tmp_path / "elsewhere/train.jsonl").exists()


def test_of_several_files_the_one_that_has_pictures_is_taken(tmp_path):
    video, = names(1)
    make_video(tmp_path / f"in/{video}.m4a", pictures=False)
    make_video(tmp_path / f"in/{video}.mkv")
    (tmp_path / f"in/{video}.mp4").write_bytes(b"")
    counts = extract(segments_csv(tmp_path / "train.csv", [video]), tmp_path / "in", tmp_path, workers=0)
    assert counts["done"] == 1


def test_a_still_picture_lasts_and_a_picture_that_comes_late_does_not_count(tmp_path):
    with av.open(str(tmp_path / "still.mp4"), "w") as container:
        video = container.add_stream("mpeg4", rate=1)
        video.width, video.height = 160, 96
        for second in range(14):
            image = np.full((96, 160, 3), 10 * second, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(video.encode())
    images = cut_frames(tmp_path / "still.mp4", [4, 4 + 10 / 3, 4 + 20 / 3, 14], 0)  # the last second's picture lasts
    assert [round(np.asarray(image.convert("L")).mean() / 10) for image in images] == [4, 7, 10, 13]
    with pytest.raises(Unreadable, match="no picture at 15"):
        cut_frames(tmp_path / "still.mp4", [15.0], 0)


@pytest.mark.parametrize("start", [0.0, 3.0, 7.5])
def test_streams_without_an_index_give_the_right_pictures_too(tmp_path, start):
    """MPEG-TS: seeking lands anywhere, and pictures can be decoded only from the next key frame on."""
    make_video(tmp_path / "v.ts")
    times = [start + i * 2 for i in range(4)]
    assert [number_of(image) for image in cut_frames(tmp_path / "v.ts", times, 0)] == [
        int(FPS * time + 1e-6) for time in times]


def test_a_hole_in_the_sound_is_noticed(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 14 * RATE).astype(np.float32)
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        audio = container.add_stream("flac", rate=RATE)
        audio.layout = "mono"
        for start in range(0, len(noise), 1024):
            if not 5 * RATE < start < 9 * RATE:
                frame = av.AudioFrame.from_ndarray(
                    (noise[None, start:start + 1024] * 32_767).astype(np.int16), "s16", "mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
                container.mux(audio.encode(frame))
        container.mux(audio.encode())
    assert len(cut_audio(tmp_path / "v.mkv", 0, 4, RATE)) == 4 * RATE
    with pytest.raises(Unreadable, match=r"has [56]\.\d of 10 s of sound from 3 s on"):
        cut_audio(tmp_path / "v.mkv", 3, 13, RATE)


def test_audiocaps_clips_can_be_extracted_too(tmp_path):
    make_video(tmp_path / f"in/{A}.mp4")
    write(tmp_path / "test.csv", "audiocap_id,youtube_id,start_time,caption\n"
          + "".join(f'{i},{A},2,"a hum, loud {i}"\n' for i in range(5)))
    extract(tmp_path / "test.csv", tmp_path / "in", tmp_path, workers=0)
    clip, = read_split("audiocaps", tmp_path, need=("audio", "frames", "captions"))
    assert clip.captions == tuple(f"a hum, loud {i}" for i in range(5)) and len(clip.frames) == 4


# ---------------------------------------------------------------------------------- statistics

def test_statistics_are_those_of_all_values(world):
    """One pass in pieces equals mean and std of everything stacked, with the padding of short clips."""
    clips = read_index(world / "train.jsonl")[:20]
    front_end = FrontEnd(16_000, 32, 120, mean=5.0, std=3.0)  # longer than a clip; its own mean and std don't matter
    plain = FrontEnd(16_000, 32, 120, mean=0.0, std=1.0)
    waves, lengths = zip(*(plain.load(clip.audio) for clip in clips))
    everything = plain(torch.stack(waves), torch.tensor(lengths)).double()
    mean, std, read = statistics(clips, front_end, workers=1)
    assert read == 20 and mean == pytest.approx(everything.mean().item(), abs=1e-5)
    assert std == pytest.approx(everything.std(correction=0).item(), abs=1e-5)


def test_the_stats_command_prints_flags_to_paste_and_leaves_out_what_it_cannot_read(run, world, tmp_path):
    done = run("data.py", "stats", "--data", world, "--sample-rate", "16000", "--mels", "32", "--frames", "100")
    assert "64 clips at 16000 Hz" in done.stdout and "--mean -" in done.stdout and "--std " in done.stdout
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    first, second = (clip.audio for clip in read_index(broken / "train.jsonl")[:2])
    Path(first).write_bytes(b"no sound")
    soundfile.write(second, np.zeros(16_000), 16_000)
    done = run("data.py", "stats", "--data", broken, "--sample-rate", "16000", "--mels", "32", "--frames", "100")
    assert "62 clips at 16000 Hz" in done.stdout and first in done.stderr and second in done.stderr
    for flag, reason in (("--frames", "--mels and --frames are at least 1"), ("--sample-rate", "--sample-rate is in Hz")):
        done = run("data.py", "stats", "--data", world, flag, "0", check=False)
        assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr


def test_work_in_processes_keeps_its_order():
    assert list(in_processes(str.upper, ["b", "a", "c"], 2)) == ["B", "A", "C"]
