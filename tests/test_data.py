"""Sound, filterbanks, images, readers, videos: what people have on disk becomes the right tensors."""
import io
import itertools
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import data
from data import Unreadable, audio_windows, fbank, load_audio, read_index, read_split

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchaudio.compliance import kaldi

RATE = 16_000


def chirp(seconds, rate=RATE):
    t = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 50 * t) * t)).astype(np.float32)


def encode(path, wave, codec, rate=RATE, container=None, **options):
    """Write a mono sound with FFmpeg's encoder; path may be a file object."""
    with av.open(path, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = "mono"
        size = stream.codec_context.frame_size or 1024
        to = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
        for i in range(0, len(wave), size):
            frame = av.AudioFrame.from_ndarray(wave[None, i:i + size], format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, i
            for part in to.resample(frame):
                file.mux(stream.encode(part))
        file.mux(stream.encode(None))


# -------------------------------------------------------------------------------- filterbanks
def kaldis(wave, rate):
    return kaldi.fbank(wave[None], sample_frequency=rate, htk_compat=True, use_energy=False,
                       window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_filterbanks_are_kaldis(rate):
    waves = 0.1 * torch.randn(3, rate, generator=torch.Generator().manual_seed(rate))
    for wave, banks in zip(waves, fbank(waves, rate)):
        torch.testing.assert_close(banks, kaldis(wave, rate), atol=1e-4, rtol=0)


def test_filterbanks_of_recordings_are_kaldis(shared):
    clips = read_split("esc50", shared / "data/esc10")[::25]
    assert len(clips) > 3
    for clip, rate in itertools.product(clips, (RATE, 44_100)):
        wave = load_audio(clip.audio, rate)
        torch.testing.assert_close(fbank(wave[None], rate)[0], kaldis(wave, rate), atol=1e-3, rtol=0)


@pytest.mark.parametrize("hertz", [300, 1000, 5000])
def test_a_tone_lights_its_mel_bin(hertz):
    t = torch.arange(RATE) / RATE
    lit = fbank(torch.sin(2 * torch.pi * hertz * t)[None], RATE)[0].mean(0).argmax()
    mel = [1127 * np.log(1 + f / 700) for f in (20, hertz, RATE / 2)]
    assert abs(lit - ((mel[1] - mel[0]) / (mel[2] - mel[0]) * 129 - 1)) < 1


def test_short_clips_are_padded_before_normalising():
    front_end = data.FrontEnd(RATE, 32, frames=100, mean=-4.0, std=2.0)
    wave, length = front_end.pad(torch.from_numpy(chirp(0.5)))
    x = front_end(wave[None], torch.tensor([length]))                            # (1, 1, T, F)
    assert x.shape == (1, 1, 100, 32)
    assert (x[0, 0, 48:] == 2).all() and (x[0, 0, :48] != 2).all()  # (0 - mean) / std


def test_masks_are_bands_of_zeros_where_the_draws_say():
    x = torch.ones(2, 1, 50, 16)
    draws = torch.tensor([[0.99, 0.0, 0.99, 0.999], [0.5, 0.5, 0.0, 0.5]])
    first, second = data.mask(x, draws)[:, 0]
    assert (first[:9] == 0).all() and (first[:, 13:] == 0).all()
    assert (first[9:, :13] == 1).all()
    assert (second == 0).any(1).nonzero().flatten().tolist() == list(range(22, 27))


def test_preprocessing_is_clips(shared):
    golden = np.load(shared / "golden/preprocess.npz")
    for i in range(4):
        ours = data.preprocess_image(Image.fromarray(golden[f"image_{i}"])).numpy()
        assert np.abs(ours - golden[f"output_{i}"]).max() * 0.26 <= 2 / 255
    grey = data.preprocess_image(Image.fromarray(golden["gray"])).numpy()
    assert np.abs(grey - golden["gray_output"]).max() * 0.26 <= 2 / 255


# -------------------------------------------------------------------------------------- sound
def make_sounds(folder):
    """The same 3 s of sound in every kind of file: yields (path, how much samples may differ)."""
    wave = chirp(3)
    for kind, loss in (("PCM_16", 1e-4), ("PCM_24", 1e-6), ("PCM_U8", 0.01), ("FLOAT", 0),
                       ("DOUBLE", 0), ("ULAW", 0.03), ("IMA_ADPCM", 0.3), ("GSM610", 0.3)):
        soundfile.write(folder / f"{kind}.wav", wave, RATE, kind)
        yield folder / f"{kind}.wav", loss
    soundfile.write(folder / "stereo.wav", np.stack([wave, -wave], 1), RATE)
    soundfile.write(folder / "big.aiff", wave, RATE)
    soundfile.write(folder / "x.flac", wave, RATE)
    raw = bytearray((folder / "x.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)  # as an encoder leaves it that writes into a pipe
    (folder / "piped.flac").write_bytes(raw)
    raw[22:26] = (RATE).to_bytes(4, "big")
    (folder / "lies.flac").write_bytes(raw)
    for name in ("stereo.wav", "big.aiff", "x.flac", "piped.flac", "lies.flac"):
        yield folder / name, 1e-4
    right = (folder / "PCM_16.wav").read_bytes()
    for name, riff, size in (("piped", 2 ** 32 - 1, 2 ** 32 - 1), ("never closed", 0, 0),
                             ("third", 32_036, 32_000), ("cut off", 192_036, 192_000),
                             ("only data lies", 96_036, 32_000)):
        lie = right[:4] + struct.pack("<I", riff) + right[8:40] + struct.pack("<I", size) + right[44:]
        (folder / f"{name}.wav").write_bytes(lie)
        yield folder / f"{name}.wav", 1e-4
    for name, codec in (("x.m4a", "aac"), ("x.aac", "aac"), ("x.mp3", "libmp3lame"),
                        ("mp3.wav", "libmp3lame"), ("x.mp2", "mp2")):
        encode(str(folder / name), wave, codec)
        yield folder / name, 0.1
    encode(str(folder / "x.webm"), chirp(3, 48_000), "libopus", 48_000)
    shutil.copy(folder / "x.webm", folder / "really webm.mp3")
    shutil.copy(folder / "x.m4a", folder / "no ending")
    cover = b"APIC" + struct.pack(">I", 9000) + bytes(2 + 9000)
    tag = b"ID3\3\0\0" + bytes([0, 0, len(cover) >> 7, len(cover) & 127]) + cover
    encode(str(folder / "bare.mp3"), wave, "libmp3lame", write_xing="0", id3v2_version="0")
    (folder / "cover.mp3").write_bytes(tag + (folder / "bare.mp3").read_bytes())
    encode(str(folder / "title.mka"), wave, "flac")
    for name in ("x.webm", "really webm.mp3", "no ending", "cover.mp3", "title.mka"):
        yield folder / name, 0.1


def test_every_kind_of_file_gives_the_same_sound(tmp_path):
    wave = chirp(3)
    for path, loss in make_sounds(tmp_path):
        heard = load_audio(path, RATE).numpy()
        assert abs(len(heard) - 3 * RATE) < 0.1 * RATE, path  # a codec may pad
        middle = heard[RATE:2 * RATE]
        away = []
        for shift in range(-2400, 2400) if loss == 0.1 else [0]:  # or begin a little late
            away.append(np.abs(middle[::50] - wave[RATE + shift:2 * RATE + shift:50]).max())
        assert min(away) <= loss, path


def test_two_files_in_one_are_heard_to_the_end(tmp_path):
    parts = []
    for seconds, rate in ((1, 44_100), (2, 22_050)):
        file = io.BytesIO()
        encode(file, chirp(seconds, rate), "libmp3lame", rate, "mp3", write_xing="0")
        parts.append(file.getvalue())
    (tmp_path / "two.mp3").write_bytes(b"".join(parts))
    assert abs(len(load_audio(tmp_path / "two.mp3", RATE)) - 3 * RATE) < 0.2 * RATE
    file = io.BytesIO()
    soundfile.write(file, chirp(1, 44_100), 44_100, format="OGG")
    (tmp_path / "chained.ogg").write_bytes(3 * file.getvalue())
    assert abs(len(load_audio(tmp_path / "chained.ogg", RATE)) - 3 * RATE) < 0.1 * RATE


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
    (tmp_path / "text.mp3").write_text("no sound at all")
    for name in ("text.mp3", "missing.wav", "."):
        with pytest.raises(Unreadable):
            load_audio(tmp_path / name, RATE)


def test_windows_overlap_by_half_and_end_where_the_file_ends(tmp_path):
    path = tmp_path / "x.wav"
    for seconds, expected in ((0.7, [(0, 0.7)]), (1.003, [(0, 1.003)]), (1.1, [(0, 1), (0.1, 1.1)]),
                              (2.6, [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5), (1.6, 2.6)])):
        wave = chirp(seconds)
        soundfile.write(path, wave, RATE, "FLOAT")
        windows = list(audio_windows(path, RATE, 1.0))
        times = [[round(start, 3), round(end, 3)] for start, end, _ in windows]
        np.testing.assert_allclose(times, expected, atol=1e-3)
        for start, end, heard in windows:
            begin = round(start * RATE)
            np.testing.assert_array_equal(heard.numpy(), wave[begin:begin + len(heard)])
            assert abs(len(heard) / RATE - (end - start)) < 1e-4
    soundfile.write(path, np.zeros(3 * RATE), RATE)
    with pytest.raises(Unreadable, match="silent"):
        list(audio_windows(path, RATE, 1.0))
