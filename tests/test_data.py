"""What people have on disk becomes the right tensors: sound, images, tables, videos."""
import json
import random
import struct
from dataclasses import replace

import curate
import data
import evaluate
import pretrain
from data import Clip, Unreadable, fbank, load_audio, read_index, read_split

import av
import numpy as np
import pytest
import soundfile
import torch
from bench import kaldi_fbank
from conftest import kill_at_random, run, write
from PIL import Image

RATE = 16_000


def chirp(seconds, rate=RATE):
    t = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 50 * t) * t)).astype(np.float32)


def packets_of(file, codec, wave, rate=RATE, begins=0):
    """A mono sound, encoded by FFmpeg as a new track of a file."""
    stream = file.add_stream(codec, rate=rate, layout="mono")
    frame = av.AudioFrame.from_ndarray(wave[None], "flt", "mono")
    frame.sample_rate, frame.pts = rate, begins * rate
    return stream.encode(frame) + stream.encode(None)


def encode(path, wave, codec="libmp3lame", rate=RATE):
    """Write a sound, as MP3 without a header that says its length."""
    with av.open(str(path), "w", options={"write_xing": "0", "id3v2_version": "0"}) as file:
        file.mux(packets_of(file, codec, wave, rate))


# -------------------------------------------------------------------------------- filterbanks
@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_filterbanks_are_kaldis(rate):
    """Of a chirp over faint noise: quiet bins are 80 dB below loud ones, as in recordings."""
    noise = torch.randn(rate, generator=torch.Generator().manual_seed(rate))
    wave = torch.from_numpy(chirp(1, rate)) + 1e-3 * noise
    theirs = kaldi_fbank(wave, rate)                                             # (T, F)
    assert theirs.max() - theirs.min() > 18
    assert (fbank(wave[None], rate)[0] - theirs).abs().max() < 1e-4


def test_short_clips_are_padded_before_normalising_and_masks_are_bands_of_zeros():
    front_end = data.FrontEnd(RATE, 32, frames=100, mean=-4.0, std=2.0)
    wave, length = front_end.pad(torch.from_numpy(chirp(0.5)))
    x = front_end(wave[None], torch.tensor([length]))[0, 0]                      # (T, F)
    assert (x[48:] == 2).all() and (x[:48] != 2).all()  # (0 - mean) / std
    draws = torch.tensor([[0.99, 0.0, 0.99, 0.99], [0.5, 0.5, 0.0, 0.5]])
    first, second = data.mask(torch.ones(2, 1, 50, 16), draws)[:, 0]
    assert (first[:9] == 0).all() and (first[:, 12:15] == 0).all()
    assert (first[9:, :12] == 1).all() and (first[9:, 15] == 1).all()
    assert (second == 0).any(1).nonzero().flatten().tolist() == list(range(22, 27))


def test_preprocessing_is_clips(shared):
    golden = np.load(shared / "golden/preprocess.npz")
    names = {f"image_{i}": f"output_{i}" for i in range(4)} | {"gray": "gray_output"}
    for image, output in names.items():
        ours = data.preprocess_image(Image.fromarray(golden[image])).numpy()
        assert np.abs(ours - golden[output]).max() * 0.26 <= 2 / 255  # std of CLIP's pixels


# -------------------------------------------------------------------------------------- sound
def make_sounds(folder):
    """The same 3 s in every kind of file -> {path: how far samples may be off}; 0.1: and moved."""
    wave = chirp(3)
    made = {"PCM_16": 1e-4, "PCM_24": 1e-6, "PCM_U8": 0.01, "FLOAT": 0, "ULAW": 0.03, "GSM610": 0.3}
    for kind in made:
        soundfile.write(folder / kind, wave, RATE, kind, format="WAV")
    soundfile.write(folder / "stereo.wav", np.stack([wave, -wave], 1), RATE)
    right = (folder / "PCM_16").read_bytes()
    sizes = {"piped.wav": (2 ** 32 - 1, 2 ** 32 - 1), "never closed.wav": (0, 0),
             "cut off.wav": (192036, 192000), "only data lies.wav": (96036, 32000)}
    for name, lengths in sizes.items():
        riff, size = (struct.pack("<I", length) for length in lengths)
        (folder / name).write_bytes(right[:4] + riff + right[8:40] + size + right[44:])
    for name, part in (("x.aiff", wave), ("x.flac", wave), ("1.ogg", wave[:RATE]),
                       ("2.ogg", wave[RATE:])):
        soundfile.write(folder / name, part, RATE)
    flac = (folder / "x.flac").read_bytes()
    for name, samples in (("piped.flac", 0), ("lies.flac", RATE)):
        (folder / name).write_bytes(flac[:22] + samples.to_bytes(4, "big") + flac[26:])
    exact = [*sizes, "stereo.wav", "x.aiff", "x.flac", "piped.flac", "lies.flac"]
    codecs = {"x.m4a": "aac", "x.aac": "aac", "x.mp3": "libmp3lame", "mp3.wav": "libmp3lame",
              "x.avi": "libmp3lame", "g722.wav": "g722"}
    for name, codec in codecs.items():
        encode(folder / name, wave, codec)
    encode(folder / "x.webm", chirp(3, 48_000), "libopus", 48_000)
    encode(folder / "1.mp3", chirp(3, 44_100)[:44_100], rate=44_100)
    encode(folder / "2.mp3", chirp(3, 22_050)[22_050:], rate=22_050)
    # a title in Latin-1 that calls itself UTF-8, and a cover of 9 kB
    tag = b"TIT2" + struct.pack(">IH", 6, 0) + b"\3\xe9\xff\x80\x81\xfe"
    tag += b"APIC" + struct.pack(">IH", 9000, 0) + bytes(9000)
    (folder / "tag").write_bytes(b"ID3\3\0\0\0\0" + bytes([len(tag) >> 7, len(tag) & 127]) + tag)
    copies = {"really webm.mp3": ["x.webm"], "no ending": ["x.m4a"], "cover.mp3": ["tag", "x.mp3"],
              "two.mp3": ["1.mp3", "2.mp3"], "chained.ogg": ["1.ogg", "2.ogg"]}
    for name, parts in copies.items():
        (folder / name).write_bytes(b"".join((folder / part).read_bytes() for part in parts))
    made |= dict.fromkeys(exact, 1e-4) | dict.fromkeys([*codecs, *copies, "x.webm"], 0.1)
    return {folder / name: loss for name, loss in made.items()}


def test_every_kind_of_file_gives_the_same_sound(tmp_path):
    wave = chirp(3)
    for path, loss in make_sounds(tmp_path).items():
        heard, half = (load_audio(path, RATE, seconds).numpy() for seconds in (None, 1.5))
        assert abs(len(heard) - 3 * RATE) < 0.15 * RATE and len(half) == 24_000, path  # codecs pad
        away = []
        for shift in range(-2400, 2400) if loss == 0.1 else [0]:  # or begin a little late
            right = wave[24_000 + shift:40_000 + shift]
            away.append(np.abs(heard[24_000:40_000:50] - right[::50]).max())
        assert min(away) <= loss, path


def test_what_can_not_be_heard_is_named(tmp_path):
    silent, sound = np.zeros(RATE), chirp(1)
    for name, wave, why in (("short", sound[:368], "23 ms"), ("empty", sound[:0], "0 ms"),
                            ("silent", silent, "silent"), ("constant", silent + 0.3, "silent"),
                            ("right", np.stack([silent, sound], 1), "silent"),
                            ("nan", np.where(np.arange(RATE) == 9, np.nan, sound), "NaN")):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, wave, RATE, "FLOAT")
        with pytest.raises(Unreadable, match=f"{name}.wav.*{why}"):
            load_audio(path, RATE)
    with pytest.raises(Unreadable, match="silent"):
        list(evaluate.audio_windows(tmp_path / "silent.wav", RATE, 0.3))
    for name in ("missing.wav", "."):
        with pytest.raises(Unreadable):
            load_audio(tmp_path / name, RATE)


def test_windows_overlap_by_half_and_end_where_the_file_ends(tmp_path):
    path = tmp_path / "x.wav"
    for seconds, expected in ((0.7, [(0, 0.7)]), (1.003, [(0, 1.003)]), (1.1, [(0, 1), (0.1, 1.1)]),
                              (2.6, [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5), (1.6, 2.6)])):
        wave = chirp(seconds)
        soundfile.write(path, wave, RATE, "FLOAT")
        windows = list(evaluate.audio_windows(path, RATE, 1.0))
        np.testing.assert_allclose([window[:2] for window in windows], expected, atol=1e-3)
        for start, end, heard in windows:
            right = wave[round(start * RATE):round(end * RATE)]
            np.testing.assert_array_equal(heard.numpy(), right)


# ----------------------------------------------------------------------------------- datasets
IDS = ("AbCdEfGh001", "-bCdEfGh002", "_bCdEfGh003")
CLASSES = 'index,mid,display_name\n0,/m/1, "Speech "\n1,/m/2,"Dog, barking"\n'
HEADER = "audiocap_id,youtube_id,start_time,caption\n"
PUBLISHED = {  # dataset: table, its text, a sound's file, the clip that is read
    "audioset": ("eval_segments.csv", f'# a\n# b\n# c\n{IDS[1]}, 30.000, 39.500, "/m/1,/m/2"\n',
                 f"a/{IDS[1]}.wav", Clip(f"{IDS[1]}_30", labels=("Speech", "Dog, barking"))),
    "audiocaps": ("test.csv", HEADER + f'7,{IDS[0]},30,"a, b"\n8,{IDS[0]},30, c \n',
                  f"Y{IDS[0]}.flac", Clip(f"{IDS[0]}_30", captions=("a, b", "c"))),
    "vggsound": ("vggsound.csv", f'{IDS[0]},30,"dog, bark",test\n{IDS[1]},1,rain,train\n',
                 f"{IDS[0]}_000030.m4a", Clip(f"{IDS[0]}_30", labels=("dog, bark",))),
    "clotho": ("clotho_captions_evaluation.csv",  # the name is NFC in the table, NFD on disk
               "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
               " #1 Caf\u00e9 a.wav,a,b,c,d,e\n", "evaluation/#1 Cafe\u0301  a.WAV",
               Clip("#1 Caf\u00e9 a.wav", captions=tuple("abcde"))),
    "us8k": ("UrbanSound8K/metadata/UrbanSound8K.csv",
             "slice_file_name,fsID,fold,class\n7-3.wav,7,10,dog_bark\n",
             "UrbanSound8K/audio/fold10/7-3.wav", Clip("7-3.wav", labels=("dog bark",), fold=10))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_dataset_is_read_as_published(tmp_path, monkeypatch, name):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: .*Get it: "):
        read_split(name, tmp_path)
    table, text, sound, clip = PUBLISHED[name]
    for path, content in (("class_labels_indices.csv", CLASSES), (table, text), (sound, "")):
        write(tmp_path / path, content)
    read, = read_split(name, tmp_path)
    assert read == replace(clip, audio=str(tmp_path / sound), start=read.start, end=read.end,
                           split=read.split, audiocap_ids=read.audiocap_ids)
    if name == "audioset":
        assert evaluate.labels_of([clip], tmp_path) == ["Speech", "Dog, barking"]
        write(tmp_path / "train.csv", f"{HEADER}7,{IDS[1]},9,a\n8,{IDS[2]},9,b\n")
        monkeypatch.setattr(curate, "dataset_folder", lambda name: tmp_path)
        _, row = curate.gold_pairs("gl", tmp_path, seed=0)
        assert (row(0)["captions"], row(1)["captions"]) == (clip.labels, ())


@pytest.mark.parametrize("name", [
    "{id}", "Y{id}", "{id}_30", "{id}_30.000", "{id}_30_40", "{id}_30000_40000", "{id}_000030",
    "{id}_30-40", "{id}_30,000", "A dog barks [{id}]", "A dog-{id}", "103549", "{id}.f140",
    "{id} 30 40", "Y{id}_30.000_40.000", "{id}.30.40"])
def test_audiocaps_clips_are_found_under_downloaders_names(tmp_path, name):
    sound = tmp_path / "audio" / (name.format(id=IDS[1]) + (".MP4" if "_30_" in name else ".M4A"))
    write(sound)
    write(tmp_path / "audio" / f"{IDS[1]}_50_60.wav")  # of another clip
    rows = [f'103549,{IDS[1]},30,"a dog, {i}"\r\n' for i in range(5)]
    write(tmp_path / "test.csv", "\ufeff" + HEADER + "".join(rows))
    clip, = read_split("audiocaps", tmp_path)
    assert clip.audio == str(sound) and clip.captions == tuple(f"a dog, {i}" for i in range(5))


def test_an_index_of_ones_own_the_authors_and_mscocos_captions(tmp_path, monkeypatch):
    write(tmp_path / "audio/x.WAV")
    rows = [{"id": 0, "audio": "audio\\x.wav", "captions": "one", "labels": ["a"], "other": 1},
            {"id": "b", "dir": "0-9", "aclip": ["wav"], "frame": "jpg", "bos": 1, "eos": 2}]
    write(tmp_path / "test.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows)))
    ours, authors = read_split("mine", tmp_path)
    assert ours == Clip("0", str(tmp_path / "audio/x.WAV"), (), ("a",), ("one",))
    assert authors.audio == str(tmp_path / "0-9/aclip/b.wav")
    assert authors.frames == (str(tmp_path / "0-9/frame/b.jpg"),)
    assert authors.middle_frame == authors.frames[0]
    rows = {"annotations": [{"image_id": 1, "id": 2, "caption": "a \n dog "}]}
    write(tmp_path / "mscoco/annotations/captions_val2014.json", json.dumps(rows))
    monkeypatch.setattr(curate, "dataset_folder", tmp_path.joinpath)
    with pytest.raises(ValueError, match="mscoco: no readable captions_train2014.json"):
        curate.caption_pool("vc", tmp_path, tmp_path)
    write(tmp_path / "mscoco/captions_train2014.json", json.dumps(rows).replace("dog", "cat"))
    assert curate.caption_pool("vc", tmp_path, tmp_path) == ["a cat", "a dog"]


@pytest.mark.parametrize("name, text, why", [
    ("test.csv", HEADER + f"1,{IDS[0]},30,a dog, then\n", "test.csv:2: .*'a dog', .*'then'"),
    ("test.csv", HEADER + f'1,{IDS[0]},30," "\n', "test.csv:2: .*empty"),
    ("test.csv", HEADER + "1,#NAME?,30,a dog\n", "test.csv:2: .*'#NAME.'"),
    ("test.csv", HEADER + f"1,{IDS[0]},soon,a dog\n", "test.csv:2: .*soon"),
    ("test.csv", "id;text\n1;a dog\n", "test.csv:2: needs a column 'youtube_id'.*'id': '1'"),
    ("test.csv", HEADER.encode("utf-16"), "test.csv: no text in UTF-8"),
    ("test.jsonl", '{"id": 1, "audio": "x", "captions": ["a"]}\n[]\n', "jsonl:2: no fitting JSON"),
    ("test.jsonl", '{"id": 1, "caption": "a"}\n', "jsonl:1: .*lacks audio, captions; has caption,"),
    ("test.jsonl", '{"id": 1, "captions": [" "]}\n', "jsonl:1: .*captions must be a list"),
    ("test.jsonl", 2 * '{"id": 1, "audio": "x", "captions": "a"}\n', "jsonl:2: .*second clip"),
    ("test.jsonl", "[" * 9000, "test.jsonl:1: "),
    ("test.jsonl", "\n", "test.jsonl: no clips")])
def test_refusals_name_file_and_line(tmp_path, name, text, why):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=why):
        read_split("audiocaps", tmp_path, need=("captions",))


def test_what_audiocaps_tests_is_held_out(tmp_path):
    assert pretrain.held_out_by_audiocaps(tmp_path, tmp_path) == set()  # one's own
    write(tmp_path / "eval_segments.csv")
    with pytest.raises(FileNotFoundError, match="--leave-out none"):
        pretrain.held_out_by_audiocaps(tmp_path, tmp_path)
    write(tmp_path / "val.csv", HEADER + f"1,{IDS[0]},30,a dog\n")
    write(tmp_path / "test.csv", HEADER + f"1,{IDS[2]},30,a dog\n")
    assert pretrain.held_out_by_audiocaps(tmp_path, tmp_path) == {IDS[0], IDS[2]}


# ------------------------------------------------------------------------------------- videos
def make_video(path, seconds=8, gop=12, sound=(1,), late=0):
    """10 pictures a second, brighter by 25 in each, a corner white; tones of 200 + 100·s Hz, a
    track of such loudness for each number in `sound`."""
    t = np.arange(seconds * RATE) / RATE
    tone = 0.4 * np.sin(2 * np.pi * (200 + 100 * np.floor(t)) * t).astype(np.float32)
    with av.open(str(path), "w") as file:
        video, packets = file.add_stream("mpeg4", 10, {"g": str(gop)}, width=64, height=48), []
        for i in range(10 * seconds):
            picture = np.full((48, 64, 3), 20 + 25 * (i // 10 % 8), np.uint8)
            picture[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = i
            packets += video.encode(frame)
        packets += video.encode(None)
        for loud in sound:
            packets += packets_of(file, "aac", loud * tone, begins=late)
        file.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))


def tones(wave):
    """Hz heard in each second, 0 for silence."""
    middles = wave.numpy()[:len(wave) // RATE * RATE].reshape(-1, RATE)[:, RATE // 4:-RATE // 4]
    spectra = np.abs(np.fft.rfft(middles * np.hanning(RATE // 2)))               # (seconds, Hz / 2)
    loud = np.abs(middles).max(axis=1) > 0.01
    return (loud * 2 * spectra.argmax(axis=1)).tolist()


@pytest.mark.parametrize("ending, gop", [("mp4", 250), ("mkv", 12), ("ts", 5), ("ts", 250),
                                         ("avi", 12), ("mov", 1)])
def test_a_stretch_is_cut_where_it_lies(tmp_path, ending, gop):
    path = tmp_path / f"x.{ending}"
    make_video(path, gop=gop)
    assert tones(data.cut_audio(path, 2, 6, RATE)) == [400, 500, 600, 700]
    images = data.cut_frames(path, [2.5, 3.5, 4.5, 5.5])
    levels = [np.asarray(image)[30, 40].mean() for image in images]
    np.testing.assert_allclose(levels, [70, 95, 120, 145], atol=6)
    first, _ = next(data.frames_from(path, "video", 6))
    assert gop > 12 or 4 < first <= 6  # a seek leads to the key frame before
    for cut in (lambda: data.cut_audio(path, 5, 9, RATE), lambda: data.cut_frames(path, [5, 9])):
        with pytest.raises(Unreadable, match=f"x.{ending}"):
            cut()


def test_late_and_silent_sound_tracks(tmp_path):
    make_video(tmp_path / "late.mkv", late=3)
    assert tones(data.cut_audio(tmp_path / "late.mkv", 2, 6, RATE)) == [0, 200, 300, 400]
    make_video(tmp_path / "two.mkv", sound=(0, 1))
    assert tones(data.cut_audio(tmp_path / "two.mkv", 2, 4, RATE)) == [400, 500]
    make_video(tmp_path / "none.mkv", sound=(0,))
    with pytest.raises(Unreadable, match="silent"):
        data.cut_audio(tmp_path / "none.mkv", 2, 4, RATE)


def test_a_phones_picture_is_turned_upright(tmp_path):
    make_video(tmp_path / "x.mp4")
    raw = bytearray((tmp_path / "x.mp4").read_bytes())
    # the display matrix of the first track: a quarter to the right
    struct.pack_into(">9i", raw, raw.find(b"tkhd") + 44, 0, 65536, 0, -65536, 0, 0, 0, 0, 2 ** 30)
    (tmp_path / "y.mp4").write_bytes(raw)
    image, = data.cut_frames(tmp_path / "y.mp4", [0.5])
    assert image.size == (48, 64) and np.asarray(image)[5, 43].min() > 200


def test_a_folder_of_videos_becomes_a_dataset_even_if_killed_at_random_moments(tmp_path):
    videos, one, two = (tmp_path / name for name in ("videos", "one", "two"))
    videos.mkdir()
    for i in range(4):
        make_video(videos / f"{i}.mp4", seconds=16 if i else 14)
    make_video(videos / "silent.mp4", sound=())
    make_video(videos / "apart.f248.mp4", seconds=16, sound=())
    encode(videos / "apart.f251.webm", chirp(16, 48_000), "libopus", 48_000)
    (videos / "broken.mp4").write_bytes(b"no video" * 99)
    flags = ["extract", "--videos", videos, "--sample-rate", RATE, "--workers", 1, "--out"]
    said = run("data.py", *flags, one)
    assert "silent.mp4" in said.stderr and "broken.mp4" in said.stderr
    assert "9 done, 2 unreadable" in said.stdout.replace("\n", " ")
    train, val = (read_index(one / f"{split}.jsonl") for split in ("train", "val"))
    of_val, = {clip.video for clip in val}
    assert {clip.video for clip in train} == {"0", "1", "2", "3", "apart"} - {of_val}
    for clip in train + val:
        assert 5 <= len(load_audio(clip.audio, RATE)) / RATE <= 10 and len(clip.frames) == 4
    kill_at_random(3 * ["videos"], "data.py", *flags, two)
    files = [path.relative_to(one) for path in one.rglob("*.*")]
    assert len(files) > 30
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    (one / "train_report.csv").unlink()  # as if the index were of other clips
    assert "choose another --out" in run("data.py", *flags, one, check=False).stderr


# ------------------------------------------------------------------------------------- the rest
def test_statistics_are_those_of_the_encoders_input(world, capsys):
    clips = read_index(world / "test.jsonl")[:8]
    data.statistics([*clips, Clip("bad", "no.wav")], data.FrontEnd(RATE, 32, frames=120))
    said = capsys.readouterr().out.split()
    normal = data.Remember(RATE, 32, 120, float(said[-3]), float(said[-1]))
    x = torch.stack([normal.load(clip.audio)[0] for clip in clips])              # (8, 1, T, F)
    assert said[0] == "8" and abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_the_toy_world_is_the_same_for_the_same_seed(world, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        data.make_toy(tmp_path / name, seed, {"pairs": 4, "train": 20, "val": 4, "test": 4})
    for file in ("audio/train_5.wav", "frames/train_5_2.jpg", "audio/test_3.wav", "ac.txt"):
        ours = (tmp_path / "a" / file).read_bytes()
        assert ours == (world / file).read_bytes() and ours != (tmp_path / "b" / file).read_bytes()
    train = [(clip.id, clip.captions) for clip in read_index(tmp_path / "a/train.jsonl")]
    assert train == [(f"train_{i}", ()) for i in range(20)]  # in order, whoever made them
    for clip in read_index(world / "test.jsonl"):
        assert len(clip.captions) == 5 and soundfile.info(clip.audio).samplerate == 16_000


def test_damaged_files_end_in_a_clear_error(tmp_path, world):
    for ending in ("mp4", "ts", "mkv"):
        make_video(tmp_path / f"video.{ending}", seconds=3)
    sounds, videos = list(make_sounds(tmp_path)), sorted(tmp_path.glob("video.*"))
    write(tmp_path / "x.csv", HEADER + 99 * f"1,{IDS[0]},30,a dog\n")
    readers = [(sounds, lambda path: load_audio(path, RATE)),
               (sounds, lambda path: list(evaluate.audio_windows(path, RATE, 1.0))),
               (videos, lambda path: data.cut_frames(path, [1, 2])),
               (videos, lambda path: data.cut_audio(path, 1, 2, RATE)),
               (sorted((world / "frames").iterdir()), data.load_image),
               ([world / "test.jsonl"], read_index), ([tmp_path / "x.csv"], data.read_published)]
    rng, refused = random.Random(0), 0
    for i in range(300):
        paths, read = readers[i % len(readers)]
        raw = bytearray(rng.choice(paths).read_bytes())
        for _ in range(rng.choice((1, 10, 100))):
            raw[rng.randrange(rng.choice((60, len(raw))))] = rng.randrange(256)
        (tmp_path / "damaged").write_bytes(raw[:rng.choice((len(raw), rng.randrange(len(raw))))])
        try:
            read(tmp_path / "damaged")
        except ValueError as error:  # Unreadable is one
            refused += 1
            assert "damaged" in str(error)
    assert 0 < refused < 300
