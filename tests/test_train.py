"""What the loop is made of: the order of the samples, their chance, slices of a batch, checkpoints."""
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from bank import Bank, frame_bank
from clip_load import audio_encoder_from_clip, load_clip
from data import FrontEnd, Unreadable, mask
from model import info_nce
from readers import Clip, read_index
from train import (
    AudioLearner,
    AudioSamples,
    Seeded,
    backward_in_slices,
    batches,
    load_checkpoint,
    save_checkpoint,
    stop_if_lost,
)


def test_every_clip_comes_once_an_epoch_in_a_new_order():
    steps = list(batches(10, 2, 2, seed=0))
    first, second = [i for batch in steps[:5] for _, i in batch], [i for batch in steps[5:] for _, i in batch]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert list(batches(10, 2, 2, seed=0, start=3)) == steps[3:]     # a resumed run goes on with the same order


class Counting:
    """Samples of which some can't be read."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def read(self, i, rng):
        if i in self.bad:
            raise Unreadable(f"clip {i}: bad")
        return {"i": i, "chance": rng.random()}


def test_all_chance_follows_from_seed_epoch_and_clip():
    draws = Seeded(Counting(9), seed=3)
    assert draws[1, 4] == draws[1, 4] and draws[1, 4] != draws[2, 4] and draws[1, 4] != Seeded(Counting(9), 4)[1, 4]


def test_an_unreadable_clip_is_skipped_and_counted():
    sample = Seeded(Counting(9, bad={4, 5}), seed=0)[0, 4]
    assert sample["i"] == 6 and sample["skipped"] == "clip 4: bad" and Seeded(Counting(9), seed=0)[0, 4]["skipped"] == ""
    with pytest.raises(ValueError, match="not one of 2 clips in a row can be read"):
        Seeded(Counting(2, bad={0, 1}), seed=0)[0, 0]


def test_slices_give_the_whole_batchs_gradients_with_activations_of_a_few_samples():
    class Recorder(torch.nn.Module):
        """A linear encoder that writes down how many samples it saw at once, and whether it kept their activations."""

        def __init__(self):
            super().__init__()
            self.encoder, self.log_scale, self.seen = torch.nn.Linear(5, 3), torch.nn.Parameter(torch.tensor(1.0)), []

        def forward(self, batch):
            self.seen.append((len(batch["x"]), torch.is_grad_enabled()))
            return self.encoder(batch["x"]), batch["y"]

        def loss(self, a, b):
            return info_nce(a, b, self.log_scale)

    learner, batch = Recorder(), {"x": torch.randn(12, 5), "y": torch.randn(12, 3)}
    loss = learner.loss(*learner(batch))
    loss.backward()
    whole = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    learner.seen.clear()
    assert torch.allclose(backward_in_slices(learner, learner, batch, 4, nullcontext()), loss)
    assert learner.seen == [(4, False)] * 3 + [(4, True)] * 3
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(learner.parameters(), whole))


def test_a_sample_has_its_own_clips_target_though_others_are_left_out(tmp_path):
    """Of five clips 0 is left out and 2 has no readable frame; clip 3 owns rows 2 and 3."""
    np.save(tmp_path / "bank.npy", np.eye(5, dtype=np.float16))
    bank = Bank(str(tmp_path / "bank.npy"), np.arange(5), np.array([0, 1, 2, 2, 4, 5]))
    clips = [Clip(str(i), f"{i}.wav") for i in range(5)]
    samples = AudioSamples(clips, [bank], lambda path: (path, 1), train_on=[False, True, True, True, True])
    found = [samples.read(i, np.random.default_rng(0)) for i in range(len(samples))]
    assert [sample["wave"] for sample in found] == ["1.wav", "3.wav", "4.wav"]
    assert all(sample["target"][0].argmax() in rows for sample, rows in zip(found, ([1], [2, 3], [4])))


def test_a_learner_hears_masked_sounds_in_training_and_whole_ones_in_embed(world, small_clip, tmp_path):
    clip, clips = load_clip(small_clip), read_index(world / "train.jsonl")[:20]
    front_end = FrontEnd(16_000, 32, 60, -3.0, 4.0)
    learner = AudioLearner(audio_encoder_from_clip(clip, 60, 32, (8, 8)), front_end)
    samples = AudioSamples(clips, [frame_bank(tmp_path, clips, clip, torch.device("cpu"), 0)], front_end.load)
    batch = torch.utils.data.default_collate([Seeded(samples, 0)[0, i] for i in range(4)])
    audio, targets = learner(batch)  # one kind of target: frames
    assert audio.shape == (4, 32) and targets.shape == (4, 1, 32)
    assert torch.allclose(targets.norm(dim=2), torch.ones(4, 1), atol=1e-3)
    x = front_end(batch["wave"], batch["length"])
    assert torch.allclose(audio, learner.audio_encoder(mask(x, batch["draws"])), atol=1e-6)
    assert not torch.allclose(audio, learner.audio_encoder(x), atol=1e-3)
    whole, heard = learner.embed([clip.audio for clip in clips[:4]], torch.device("cpu"))
    assert heard.all()
    assert torch.allclose(whole, torch.nn.functional.normalize(learner.audio_encoder(x), dim=1), atol=1e-5)
    learner.loss(audio, targets)
    assert learner.guessing(16) == pytest.approx(2 * math.log(16)) and learner.report()["temperature"] == pytest.approx(0.07)


def test_what_is_lost_is_never_saved():
    """A NaN among the weights counts before the loss shows it; one unreadable clip of a hundred is not over 1 %."""
    whole, broken = [torch.ones(3)], [torch.ones(3), torch.tensor([1.0, math.nan])]
    stop_if_lost(7, 1.0, whole, 1, 100, "c.pt")
    for loss, weights in ((math.nan, whole), (math.inf, whole), (1.0, broken)):
        with pytest.raises(FloatingPointError, match=r"at step 7.*c\.pt"):
            stop_if_lost(7, loss, weights, 0, 100, "c.pt")
    with pytest.raises(ValueError, match="2 clips .* over 1 % of 100"):
        stop_if_lost(7, 1.0, whole, 2, 100, "c.pt")


def test_checkpoints_refuse_what_they_are_not(tmp_path, small_clip):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt", ["pretrain"])
    with pytest.raises(ValueError, match="not a checkpoint of ours"):
        load_checkpoint(small_clip, ["pretrain"])
    save_checkpoint(tmp_path / "other.pt", {"stage": "toy-clip"})
    with pytest.raises(ValueError, match="stage 'toy-clip'; needed here: pretrain or finetune"):
        load_checkpoint(tmp_path / "other.pt", ["pretrain", "finetune"])
    (tmp_path / "cut.pt").write_bytes(small_clip.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "cut.pt", ["pretrain"])
