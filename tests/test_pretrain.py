"""Banks, the loop, checkpoints: resume equals uninterrupted, two ranks equal one, and nothing goes wrong quietly."""
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flat, linked, small_pretraining

import data
import pretrain
from clip_load import audio_encoder_from_clip, load_clip
from data import Unreadable, read_index
from model import info_nce
from pretrain import (
    AudioLearner,
    AudioSamples,
    Draws,
    Settings,
    backward_in_slices,
    batches,
    frame_bank,
    load_checkpoint,
    parse,
    second_frames,
    top1,
)

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------- settings

def test_defaults_are_the_papers_run():
    s = Settings()
    assert (s.batch, s.epochs, s.warmup_epochs, s.lr_weights, s.lr_biases, s.weight_decay) == (432, 25, 10, 0.2, 4.8e-3, 1e-6)
    assert (s.frames, s.mels, s.stride_time, s.stride_mel, s.clip, s.init) == (1000, 128, 16, 24, "ViT-B/32", "clip")


def test_flags_override_a_preset_and_unknown_ones_fail(capsys):
    s = parse(Settings(), pretrain.PRESETS, ["--data", "toy", "--lr-weights", "7"])
    assert s == replace(pretrain.TOY, lr_weights=7.0)
    with pytest.raises(SystemExit):
        parse(Settings(), pretrain.PRESETS, ["--learning-rate", "7"])
    assert "--learning-rate" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- banks

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
    monkeypatch.setattr(pretrain, "load_image", lambda path, size: read.append(path) or data.load_image(path, size))
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


def test_without_a_validation_clip_that_has_frames_nothing_is_validated(small_clip, tmp_path):
    bank = frame_bank(tmp_path, [], load_clip(small_clip), CPU, 0)
    assert bank.embeddings.shape == (0, 32) and pretrain.frame_retrieval([], bank, CPU, 0)(None) == {}


# --------------------------------------------------------------------------- samples and order

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
    draws = Draws(Counting(9), seed=3)
    assert draws[1, 4] == draws[1, 4] and draws[1, 4] != draws[2, 4] and draws[1, 4] != Draws(Counting(9), 4)[1, 4]


def test_an_unreadable_clip_is_skipped_and_counted():
    sample = Draws(Counting(9, bad={4, 5}), seed=0)[0, 4]
    assert sample["i"] == 6 and sample["skipped"] == "clip 4: bad" and Draws(Counting(9), seed=0)[0, 4]["skipped"] == ""
    with pytest.raises(ValueError, match="not one of 2 clips in a row can be read"):
        Draws(Counting(2, bad={0, 1}), seed=0)[0, 0]


def test_top1_by_hand():
    """Queries 0 and 1 share a label set; 0 finds 1 (relevant, one of two), 1 finds 1, 2 finds 0 (not relevant)."""
    gallery = torch.eye(3)
    queries = torch.stack([gallery[1], gallery[1], gallery[0]])
    result = top1(queries, gallery, [["dog", "rain"], ["rain", "dog"], ["dog"]])
    assert result == {"precision@1": pytest.approx(200 / 3), "recall@1": pytest.approx(100 / 3)}


# -------------------------------------------------------------------------------- whole runs

def learner_of(out):
    return load_checkpoint(out / "checkpoint.pt", ["pretrain"])["learner"]


def test_pretraining_learns_and_says_what_it_made(run, pretrain_flags):
    done = run("pretrain.py", *flat(pretrain_flags | {"--epochs": 12}))
    lines = [json.loads(line) for line in (pretrain_flags["--out"] / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 2 * math.log(16) < losses[0]  # below what unrelated pairs give
    assert {"temperature", "lr_weights", "lr_biases", "clips_per_second", "waiting", "mfu", "eta"} <= lines[1].keys()
    assert lines[0]["command"] and lines[0]["settings"]["batch"] == 16
    assert "ETA" in done.stdout and "image->audio precision@1" in done.stdout
    checkpoint = load_checkpoint(pretrain_flags["--out"] / "checkpoint.pt", ["pretrain"])
    assert checkpoint["front_end"] == {"sample_rate": 16_000, "mels": 32, "frames": 60, "mean": -3.0, "std": 4.0}
    again = run("pretrain.py", *flat(pretrain_flags | {"--epochs": 12}))  # finished: nothing left to do
    assert again.returncode == 0 and "ETA" not in again.stdout


@pytest.fixture(scope="module")
def undisturbed(run, world, small_clip, tmp_path_factory):
    """(ranks) -> what the small pre-training leaves."""
    known = {}

    def learner(ranks):
        if ranks not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            run("pretrain.py", *flat(small_pretraining(world, small_clip, out)), ranks=ranks)
            known[ranks] = learner_of(out)
        return known[ranks]
    return learner


def test_two_ranks_are_one(undisturbed):
    """Same global batch: 20 steps on two gloo processes and on one."""
    one, two = undisturbed(1), undisturbed(2)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_slices_of_a_batch_give_the_whole_batchs_gradients(run, pretrain_flags, undisturbed, tmp_path, ranks):
    """20 steps with 16 clips at once, and with activations of 4 clips a rank at a time."""
    run("pretrain.py", *flat(pretrain_flags | {"--out": tmp_path / "sliced", "--micro-batch": 4}), ranks=ranks)
    whole, sliced = undisturbed(ranks), learner_of(tmp_path / "sliced")
    assert max((whole[key] - sliced[key]).abs().max().item() for key in whole) < 1e-5
    assert not torch.equal(whole["log_scale"], torch.tensor(math.log(1 / 0.07)))  # the temperature learns, too
    done = run("pretrain.py", *flat(pretrain_flags | {"--micro-batch": 5}), check=False)
    assert done.returncode == 1 and "can't be cut into such slices" in done.stderr


def test_slices_hold_activations_of_so_many_samples_only():
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


def test_the_papers_step_is_timed_without_a_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["pretrain.py", "--data", "random", "--frames", 100, "--mels", 32, "--sample-rate", 16_000, "--batch", 2,
               "--steps", 2, "--log-every", 1, "--workers", 1, "--stride-time", 32]
    done = run(*command)
    run(*command, "--out", "again")
    lines, again = ([json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
                    for out in ("out/random", "again"))
    assert [line["loss"] for line in lines[1:]] == [line["loss"] for line in again[1:]]  # --seed fixes all chance
    assert [line["step"] for line in lines[1:]] == [1, 2] and lines[2]["clips_per_second"] > 0 and "MFU" in done.stdout
    assert not (tmp_path / "out/random/checkpoint.pt").exists()


def test_a_run_stopped_after_some_steps_goes_on(run, pretrain_flags, undisturbed, tmp_path):
    stopped = pretrain_flags | {"--out": tmp_path / "stopped"}
    run("pretrain.py", *flat(stopped | {"--steps": 6}))
    assert load_checkpoint(tmp_path / "stopped/checkpoint.pt", ["pretrain"])["step"] == 6
    run("pretrain.py", *flat(stopped))
    whole, resumed = undisturbed(1), learner_of(tmp_path / "stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_vip_ant_starts_from_clip_and_va_rand_does_not(small_clip, run, pretrain_flags):
    clip = load_clip(small_clip)
    run("pretrain.py", *flat(pretrain_flags | {"--init": "random", "--epochs": 1, "--lr-weights": 0, "--lr-biases": 0}))
    random = learner_of(pretrain_flags["--out"])
    started = audio_encoder_from_clip(clip, 60, 32, (8, 8)).state_dict()
    assert not torch.allclose(random["audio_encoder.conv1.weight"], started["conv1.weight"])
    assert random["audio_encoder.conv1.weight"].shape == started["conv1.weight"].shape


def test_other_settings_or_another_clip_do_not_resume(run, pretrain_flags, small_clip, tmp_path):
    clip = tmp_path / "clip.pt"
    clip.write_bytes(small_clip.read_bytes())
    flags = pretrain_flags | {"--epochs": 1, "--clip": clip}
    run("pretrain.py", *flat(flags))
    done = run("pretrain.py", *flat(flags | {"--epochs": 2}), check=False)
    assert done.returncode == 1 and "'epochs': (1, 2)" in done.stderr and "--out" in done.stderr
    state = torch.load(clip, weights_only=True)
    torch.save(state | {"visual.proj": state["visual.proj"] + 1}, clip)
    done = run("pretrain.py", *flat(flags), check=False)
    assert done.returncode == 1 and "clip weights" in done.stderr


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run, pretrain_flags):
    done = run("pretrain.py", *flat(pretrain_flags | {"--lr-biases": 1e30, "--lr-weights": 1e30}), check=False)
    assert done.returncode == 1 and "the weights diverge" in done.stderr and "Traceback" not in done.stderr
    path = pretrain_flags["--out"] / "checkpoint.pt"
    assert not path.exists() or all(value.isfinite().all() for value in learner_of(path.parent).values())


@pytest.mark.parametrize("bad", [1, 3])
def test_unreadable_clips_are_reported_and_over_one_percent_stop(run, pretrain_flags, tmp_path, world, bad):
    """Of 256 clips one bad is 0.4 %, three are 1.2 %."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines() * 4]
    for i, row in enumerate(rows[:bad]):
        row["audio"] = f"gone_{i}.wav"
    folder = linked(world, tmp_path / "own")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text(json.dumps(rows[-1]))
    done = run("pretrain.py", *flat(pretrain_flags | {"--data": folder, "--epochs": 1}), check=False)
    assert "gone_0.wav: can't be read" in done.stderr and "Traceback" not in done.stderr
    if bad == 1:
        assert done.returncode == 0 and "skipped 1" in done.stdout
    else:
        assert done.returncode == 1 and "over 1 % of 256" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bare_machine_gets_one_clear_message(run, tmp_path, monkeypatch, ranks):
    monkeypatch.chdir(tmp_path)
    done = run("pretrain.py", ranks=ranks, check=False)
    assert done.returncode == 1 and "data/audioset: no such folder" in done.stderr and "--data toy" in done.stderr
    assert "SystemExit" not in done.stderr or ranks > 1


def test_checkpoints_refuse_what_they_are_not(tmp_path, small_clip):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt", ["pretrain"])
    with pytest.raises(ValueError, match="not a checkpoint of ours"):
        load_checkpoint(small_clip, ["pretrain"])
    pretrain.save_checkpoint(tmp_path / "other.pt", {"stage": "toy-clip"})
    with pytest.raises(ValueError, match="stage 'toy-clip'; needed here: pretrain or finetune"):
        load_checkpoint(tmp_path / "other.pt", ["pretrain", "finetune"])
    (tmp_path / "cut.pt").write_bytes(small_clip.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "cut.pt", ["pretrain"])


def test_a_learner_gives_features_and_their_targets(world, small_clip, clips, tmp_path):
    clip = load_clip(small_clip)
    front_end = data.FrontEnd(16_000, 32, 60, -3.0, 4.0)
    learner = AudioLearner(audio_encoder_from_clip(clip, 60, 32, (8, 8)), front_end)
    samples = AudioSamples(clips, [frame_bank(tmp_path, clips, clip, CPU, 0)], front_end.load)
    batch = torch.utils.data.default_collate([Draws(samples, 0)[0, i] for i in range(4)])
    audio, targets = learner(batch)  # one kind of target: frames
    assert audio.shape == (4, 32) and targets.shape == (4, 1, 32)
    assert torch.allclose(targets.norm(dim=2), torch.ones(4, 1), atol=1e-3)
