"""Banks: CLIP runs once, its embeddings are reused, made anew where something changed, and carried on with."""
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import bank
import data
from bank import frame_bank
from clip_load import load_clip
from pretrain import second_frames
from readers import read_index

CPU = torch.device("cpu")


@pytest.fixture
def clips(world):
    return read_index(world / "train.jsonl")[:20]


def test_bank_holds_what_clip_says_of_each_frame(clips, small_clip, tmp_path):
    clip = load_clip(small_clip)
    bank = frame_bank(tmp_path, clips, clip, CPU, 0)
    assert bank.embeddings.dtype == np.float16 and bank.embeddings.shape == (80, 32)
    images = torch.stack([data.load_image(path, 64) for path in clips[7].frames])
    expected = torch.nn.functional.normalize(clip.encode_image(images), dim=1)
    assert (torch.tensor(bank.embeddings[bank.of(7)].astype(np.float32)) - expected).abs().max() < 1e-3
    assert torch.allclose(second_frames(clips, bank)[0][7], expected[1], atol=1e-3)


def test_bank_is_reused_rebuilt_and_carried_on(clips, small_clip, tmp_path, monkeypatch):
    read, clip = [], load_clip(small_clip)
    monkeypatch.setattr(bank, "load_image", lambda path, size: read.append(path) or data.load_image(path, size))
    frame_bank(tmp_path, clips, clip, CPU, 0)
    frame_bank(tmp_path, clips, clip, CPU, 0)
    assert len(read) == 80                                           # nothing changed: read once
    os.utime(clips[3].frames[0], ns=(1, time.time_ns()))
    frame_bank(tmp_path, clips, clip, CPU, 0)
    assert len(read) == 160                                          # a file changed
    with torch.no_grad():
        clip.visual.proj += 1
    whole = np.array(frame_bank(tmp_path, clips, clip, CPU, 0).embeddings)
    assert len(read) == 240                                          # the weights changed
    state = np.load(tmp_path / "state.npy", mmap_mode="r+")
    state[30:] = 0                                                   # as a kill leaves it
    state.flush()
    assert np.array_equal(frame_bank(tmp_path, clips, clip, CPU, 0).embeddings, whole)
    assert len(read) == 240 + 50


def test_unreadable_frames_are_left_out_and_too_many_stop(clips, small_clip, tmp_path):
    clip, gone = load_clip(small_clip), str(tmp_path / "gone.jpg")
    some = [replace(c, frames=(gone, *c.frames[1:])) for c in clips]
    assert [len(frame_bank(tmp_path / "a", some, clip, CPU, 0).of(i)) for i in range(20)] == [3] * 20
    none = [replace(clips[0], frames=(gone,) * 4), *clips[1:]]
    with pytest.raises(ValueError, match="1 of 20 clips have no readable frame"):
        frame_bank(tmp_path / "b", none, clip, CPU, 0)
