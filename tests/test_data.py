"""Files to tensors: filterbanks against Kaldi's, odd audio, odd images; packs, indices, the toy world."""
import json
import os
import pickle
import warnings

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchaudio.compliance import kaldi

from data import (
    FrontEnd,
    Unreadable,
    fbank,
    load_audio,
    load_image,
    mask,
    preprocess_image,
)
from prepare import pack, sound_loader
from processes import is_array, new_array
from readers import Clip, dataset_folder, read_index, read_split
from toy import THINGS, make_toy


def kaldi_fbank(wave, sample_rate):
    """The reference: (S,) -> (T, 128)."""
    return kaldi.fbank(wave[None], sample_frequency=sample_rate, htk_compat=True, use_energy=False, num_mel_bins=128,
                       window_type="hanning", dither=0.0, frame_shift=10)


@pytest.mark.parametrize("sample_rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_fbank_is_kaldis(sample_rate):
    waves = torch.randn(3, sample_rate, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.3], [1e-3], [0.0]])
    batch = fbank(waves, sample_rate)
    for wave, features in zip(waves, batch):
        assert (features - kaldi_fbank(wave, sample_rate)).abs().max() < 1e-3
        assert torch.equal(features, fbank(wave[None], sample_rate)[0])


def test_fbank_is_kaldis_on_real_recordings(shared):
    for clip in read_split("esc50", shared / "data/esc10")[::4]:
        for sample_rate in (44_100, 16_000):
            wave = load_audio(clip.audio, sample_rate)
            single, batch = fbank(wave[None], sample_rate), fbank(torch.stack([wave.flip(0), wave]), sample_rate)
            assert (single[0] - kaldi_fbank(wave, sample_rate)).abs().max() < 1e-3, clip.audio
            assert (batch[1] - kaldi_fbank(wave, sample_rate)).abs().max() < 1e-3, clip.audio


def test_a_tone_lights_its_own_mel_bin():
    """Bin i is centred at low + (i + 1)·width in mel; a tone there must be strongest there."""
    low, high = 1127 * np.log1p(np.array([20, 8000]) / 700)
    hertz = 700 * np.expm1((low + 41 * (high - low) / 65) / 1127)
    tone = torch.sin(2 * np.pi * hertz * torch.arange(16_000) / 16_000)
    assert fbank(tone[None], 16_000, mels=64)[0].mean(0).argmax() == 40


def test_front_end_pads_with_zeros_before_it_normalises():
    front_end = FrontEnd(sample_rate=16_000, mels=32, frames=50, mean=-4.0, std=2.0)
    waves = torch.randn(1, front_end.samples)
    out = front_end(waves, torch.tensor([400 + 9 * 160]))  # samples enough for ten frames
    assert out.shape == (1, 1, 50, 32)
    assert torch.all(out[0, 0, 10:] == (0 - -4.0) / 2.0) and not torch.any(out[0, 0, :10] == 2.0)
    assert torch.allclose(out[0, 0, :10] * 2.0 - 4.0, fbank(waves, 16_000, 32)[0, :10], atol=1e-4)


def test_mask_covers_one_band_of_each_kind():
    """Draws of (almost) 1 give the widest bands, 1/5 of the frames and 1/4 of the bins; draws of 0 give none."""
    x = torch.ones(2, 1, 100, 64)
    out = mask(x, torch.tensor([[0.0] * 4, [0.99, 0.5, 0.99, 0.0]]))
    assert torch.equal(out[0], x[0])
    assert (out[1, 0] == 0).all(1).nonzero().flatten().tolist() == list(range(40, 59))
    assert (out[1, 0] == 0).all(0).nonzero().flatten().tolist() == list(range(15))


def write(path, wave, rate=16_000, **options):
    soundfile.write(path, wave, rate, **options)
    return path


@pytest.mark.filterwarnings("ignore:some audio has more than one channel")
@pytest.mark.parametrize(("name", "rate", "options"), [
    ("a.wav", 8000, {"subtype": "PCM_U8"}), ("a.wav", 11_025, {"subtype": "PCM_16"}), ("a.wav", 44_100, {"subtype": "PCM_24"}),
    ("a.wav", 96_000, {"subtype": "PCM_32"}), ("a.wav", 48_000, {"subtype": "FLOAT"}), ("a.wav", 192_000, {"subtype": "DOUBLE"}),
    ("a.wav", 22_050, {"subtype": "MS_ADPCM"}), ("a.wav", 48_000, {"subtype": "IMA_ADPCM"}), ("a.wav", 44_101, {}),
    ("a.flac", 96_000, {}), ("a.ogg", 44_100, {}), ("a.mp3", 44_100, {})])
def test_any_format_rate_and_width_gives_the_same_tone(tmp_path, name, rate, options):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    wave = load_audio(write(tmp_path / name, np.stack([tone, -tone], 1), rate, **options), 16_000)
    assert wave.dtype == torch.float32 and len(wave) == pytest.approx(16_000, abs=500)  # ADPCM and MP3 fill whole blocks
    spectrum = torch.fft.rfft(wave[2000:14_000]).abs().square()
    assert spectrum[320:341].sum() > 0.95 * spectrum.sum()  # nearly all of it is the tone: bin 330 is 440 Hz
    assert wave.abs().max() == pytest.approx(0.5, abs=0.06)


# ---------------------------------------------------------------------------------------- pack

@pytest.fixture
def sounds(tmp_path):
    """Six sounds of different lengths, two of them bad; 16 bits at 16 kHz, one of them as floats at 22.05 kHz."""
    rng, folder = np.random.default_rng(0), tmp_path / "sounds"
    folder.mkdir()
    for i in range(4):
        write(folder / f"{i}.wav", rng.uniform(-1, 1, 9000 + 999 * i))
    write(folder / "float.wav", rng.uniform(-0.3, 0.3, 9000), 22_050, subtype="FLOAT")
    (folder / "bad.wav").write_bytes(b"RIFF")
    return folder, [Clip(path.stem, str(path)) for path in folder.glob("*.wav")]


def test_a_pack_gives_what_decoding_gives_to_the_last_bit(sounds):
    folder, clips = sounds
    front_end = FrontEnd(16_000, 32, 55)
    assert sound_loader(folder, front_end) == front_end.load
    decoded = {name: front_end.load(folder / name) for name in ("0.wav", "1.wav", "2.wav", "3.wav", "float.wav")}
    _, count, skipped = pack(folder, clips, 16_000, workers=0)
    assert (count, skipped) == (5, 1)
    load = pickle.loads(pickle.dumps(sound_loader(folder, front_end)))  # as a worker process gets it
    with pytest.raises(Unreadable, match=r"bad\.wav"):
        load(folder / "bad.wav")
    for path in folder.glob("*.wav"):  # what is packed may go
        path.unlink()
    for name, (wave, length) in decoded.items():
        packed, packed_length = load(folder / name)
        assert packed.dtype == torch.int16 and packed_length == length
        error = (packed / 32768 - wave).abs().max()
        if name == "float.wav":
            assert 0 < error <= 0.5 / 32768 + 1e-7
        else:
            assert error == 0
            lengths = torch.tensor([length])
            assert torch.equal(front_end(packed[None], lengths), front_end(wave[None], lengths))


def test_a_pack_goes_on_where_it_was_killed(sounds):
    folder, clips = sounds
    front_end, out = FrontEnd(16_000, 32, 55), folder / "packed-16000"
    pack(folder, clips, 16_000, workers=0)
    whole = (out / "waves.i16").read_bytes()
    for kept, size in ((3, 99), (7, -5000)):  # killed in the middle of a file; or the disk lost the end of the waves
        starts = np.load(out / "starts.npy", mmap_mode="r+")
        (out / "waves.i16").write_bytes(whole[:2 * starts[kept - 1] + size])
        starts[kept:] = -1
        starts.flush()
        with pytest.raises(ValueError, match="is not whole"):
            sound_loader(folder, front_end)
        pack(folder, clips, 16_000, workers=0)
        assert (out / "waves.i16").read_bytes() == whole


def test_a_pack_notices_other_files_and_is_never_overwritten(sounds):
    folder, clips = sounds
    front_end = FrontEnd(16_000, 32, 55)
    pack(folder, clips, 16_000, workers=0)
    before = (folder / "packed-16000/waves.i16").read_bytes()
    write(folder / "2.wav", np.sin(np.arange(9000)))
    with pytest.raises(ValueError, match=r"2\.wav has changed since"):
        sound_loader(folder, front_end)
    for others in (clips, clips[:3]):
        with pytest.raises(ValueError, match="made of other files, or some have changed; delete it"):
            pack(folder, others, 16_000, workers=0)
    assert (folder / "packed-16000/waves.i16").read_bytes() == before


# --------------------------------------------------------------------------------------- audio

def test_the_first_channel_is_used_and_that_is_said(tmp_path):
    wave = np.random.default_rng(0).uniform(-1, 1, (1600, 2)).astype(np.float32)
    with pytest.warns(UserWarning, match="first is used"):
        loaded = load_audio(write(tmp_path / "s.wav", wave, subtype="FLOAT"), 16_000)
    assert np.array_equal(loaded.numpy(), wave[:, 0])


def bad_audio(folder):
    """Name -> file, and what its message must say."""
    tone = np.sin(np.arange(16_000) / 9)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio")
    (folder / "header.wav").write_bytes(write(folder / "x.wav", tone).read_bytes()[:30])
    write(folder / "short.wav", tone[:300])
    write(folder / "none.wav", tone[:0])
    write(folder / "silent.wav", tone * 0)
    write(folder / "nan.wav", np.where(np.arange(16_000) == 500, np.nan, tone), subtype="FLOAT")
    return {"missing": "can't be read", "empty": "can't be read", "text": "can't be read", "header": "",
            "short": "25 ms", "none": "0 ms", "silent": "silent", "nan": "NaN"}


def test_bad_audio_is_named_with_the_reason(tmp_path):
    for name, reason in bad_audio(tmp_path).items():
        with pytest.raises(Unreadable, match=rf"{name}\.wav.*{reason}"):
            load_audio(tmp_path / f"{name}.wav", 16_000)


def test_a_name_that_is_not_utf8_is_a_skip_in_a_pack(sounds):
    folder, _ = sounds
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav")
    os.replace(folder / "0.wav", odd)
    with pytest.raises(Unreadable, match=r"wav: can't be read as audio"):
        load_audio(odd, 16_000)
    assert pack(folder, [Clip("odd", odd), Clip("1", str(folder / "1.wav"))], 16_000, 0)[1:] == (1, 1)


def test_an_array_whose_making_is_interrupted_is_not_there(tmp_path, monkeypatch):
    """An array that is there has its room: a run that ends between making it and taking the room leaves none."""
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        new_array(tmp_path / "bank.npy", np.float16, (4, 2))
    assert not is_array(tmp_path / "bank.npy", np.float16, (4, 2))


def test_images_are_preprocessed_as_clips(shared):
    golden = np.load(shared / "golden/preprocess.npz")
    scale = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255  # back to pixel units
    for name in ("image_0", "image_1", "image_2", "image_3", "gray"):
        out = golden["gray_output" if name == "gray" else name.replace("image", "output")]
        difference = (preprocess_image(Image.fromarray(golden[name])) - torch.tensor(out)).abs() * scale
        assert difference.max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_image_mode_becomes_rgb(mode):
    assert preprocess_image(Image.new(mode, (50, 80)), 32).shape == (3, 32, 32)


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = Image.fromarray(np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64))
    assert preprocess_image(ramp, 64)[0].std() > 0.9  # clipped to white it would be nearly 0


def test_the_longer_side_is_rounded_as_clips():
    """340×320 becomes 238×224, not 237: 7 columns go on either side, so column 7 of the picture comes first."""
    pixels = np.zeros((320, 340, 3), np.uint8)
    pixels[:, :10] = 255                                             # 10 of 340 columns are 7 of 238
    assert (preprocess_image(Image.fromarray(pixels))[0, :, 1] < -1.7).all()


def test_truncated_and_missing_images_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut", "text", "missing"):
        with pytest.raises(Unreadable, match=rf"{name}\.jpg: can't be read as an image"):
            load_image(tmp_path / f"{name}.jpg", 32)


@pytest.mark.parametrize(("line", "reason"), [
    ("{not json", "not JSON"), ('{"id": "b"}', "lacks audio"), ('{"audio": "b.wav"}', "lacks id"), ("[1]", "lacks id"),
    ('{"id": "b", "audio": "b.wav", "frames": "b.jpg"}', "frames must be a list of strings"),
    ('{"id": "b", "audio": 3}', "audio must be a string")])
def test_a_bad_index_line_is_named_by_file_and_number(tmp_path, line, reason):
    (tmp_path / "train.jsonl").write_text('{"id": "a", "audio": "a.wav"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: .*{reason}"):
        read_index(tmp_path / "train.jsonl")


def test_index_paths_start_at_the_index(tmp_path):
    (tmp_path / "i.jsonl").write_text(json.dumps({"id": 7, "audio": "audio/ü.wav", "frames": ["f/1.jpg"], "labels": ["x"]}))
    clip, = read_index(tmp_path / "i.jsonl", need=("audio", "frames", "labels"))
    assert clip.id == "7" and clip.audio == str(tmp_path / "audio/ü.wav") and clip.frames == (str(tmp_path / "f/1.jpg"),)
    assert [Clip("0", frames=frames).middle_frame for frames in (("a", "b", "c", "d"), ("a",))] == ["b", "a"]


def test_a_missing_folder_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, hint in (("audioset", "--data toy"), ("clotho", "zenodo"), ("esc50", "git clone"), ("elsewhere", "--data")):
        with pytest.raises(FileNotFoundError, match=rf"{place}: no such folder.*{hint}"):
            dataset_folder(place)


def test_esc50_as_published(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/esc50.csv").write_bytes(b"filename,fold,target,category,esc10,src_file,take\r\n"
                                              b"1-1-A-0.wav,1,0,dog,True,1,A\r\n5-2-A-12.ogg,5,12,crackling_fire,True,2,A\r\n")
    first, second = read_split("esc50", tmp_path)
    assert first.labels == ("dog",) and first.fold == 1
    assert second.labels == ("crackling fire",) and second.audio.endswith("audio/5-2-A-12.ogg") and second.fold == 5
    (tmp_path / "meta/esc50.csv").write_text("filename,fold,category\na.wav,²,b\nb.wav,999999999999999999999,b\n", "utf-8")
    assert [clip.fold for clip in read_split("esc50", tmp_path)] == [0, 0]  # no published fold
    (tmp_path / "meta/esc50.csv").write_text("filename,category\na,b\n")
    with pytest.raises(ValueError, match=r"esc50\.csv:2: no fold"):
        read_split("esc50", tmp_path)


def test_clotho_as_published(tmp_path):
    (tmp_path / "clotho_captions_evaluation.csv").write_text(
        'file_name,caption_1,caption_2,caption_3,caption_4,caption_5\nA b.wav,"Rain, then ""thunder""",2,3,4,5\n')
    clip, = read_split("clotho", tmp_path)
    assert clip.captions == ('Rain, then "thunder"', "2", "3", "4", "5") and clip.audio.endswith("evaluation/A b.wav")


def test_toy_world_is_the_same_for_the_same_seed_and_keeps_captions_from_training(world, tmp_path):
    make_toy(tmp_path / "again", splits={"train": 64}, workers=1)
    for name in ("audio/train_5.wav", "frames/train_5_2.jpg", "train.jsonl", "gold.jsonl", "ac.txt", "vocab.txt.gz"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
    assert len(set(THINGS)) == 144
    assert all(not clip.captions and len(clip.frames) == 4 for clip in read_index(world / "train.jsonl"))
    assert all(len(set(clip.captions)) == 5 for clip in read_index(world / "test.jsonl"))
    assert all(not clip.audio for clip in read_index(world / "pairs.jsonl", need=("frames", "captions")))


def test_toy_sounds_load_without_a_warning(world):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wave = load_audio(world / "audio/train_0.wav", 16_000)
    assert len(wave) == 16_000
