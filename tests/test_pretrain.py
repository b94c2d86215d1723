"""Whole runs: resume equals uninterrupted, two ranks equal one, and nothing goes wrong quietly."""
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flat, linked, small_pretraining

import pretrain
from bank import Bank, frame_bank
from clip_load import audio_encoder_from_clip, load_clip
from model import schedule
from pretrain import Settings, top1
from readers import Clip
from train import load_checkpoint, parse

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


def test_without_a_validation_clip_that_has_frames_nothing_is_validated(small_clip, tmp_path):
    bank = frame_bank(tmp_path, [], load_clip(small_clip), CPU, 0)
    assert bank.embeddings.shape == (0, 32) and pretrain.frame_retrieval([], bank, CPU, 0)(None) == {}


def test_top1_by_hand():
    """Queries 0 and 1 share a label set; 0 finds 1 (relevant, one of two), 1 finds 1, 2 finds 0 (not relevant)."""
    gallery = torch.eye(3)
    queries = torch.stack([gallery[1], gallery[1], gallery[0]])
    result = top1(queries, gallery, [["dog", "rain"], ["rain", "dog"], ["dog"]])
    assert result == {"precision@1": pytest.approx(200 / 3), "recall@1": pytest.approx(100 / 3)}
    with pytest.raises(AssertionError, match="set of letters"):
        top1(queries, gallery, ["dog", "god", "rain"])


def test_numbers_that_cannot_be_are_named(monkeypatch):
    Settings(batch=16, micro_batch=4).check()
    for wrong, said in (({"batch": 0}, "--batch 0: must be at least 1"), ({"save_every": 0}, "--save-every 0"),
                        ({"micro_batch": 5}, "can't be cut into such slices")):
        with pytest.raises(ValueError, match=said):
            Settings(**{"batch": 16} | wrong).check()
    monkeypatch.setattr("train.ranks", lambda: (0, 2))
    with pytest.raises(ValueError, match="--batch 15 can't be split over 2 ranks"):
        Settings(batch=15).check()


def test_validation_compares_a_sound_with_its_own_second_frame(tmp_path):
    """Clip 1 has no frame, clip 3's sound can't be read; the others' second frames are rows 1 and 3."""
    np.save(tmp_path / "bank.npy", np.eye(8, dtype=np.float16))
    bank = Bank(str(tmp_path / "bank.npy"), np.arange(5), np.array([0, 2, 2, 4, 5]))
    clips = [Clip(str(i), f"{i}.wav", labels=(str(i),)) for i in range(4)]

    class Ear:
        def embed(self, paths, device, workers):
            return torch.eye(8)[[1, 7, 3, 4]], torch.tensor([True, True, True, False])

    found = pretrain.frame_retrieval(clips, bank, CPU, 0)(Ear())
    assert found == {"image->audio precision@1": 100, "image->audio recall@1": 100}


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
    for line in (line for line in lines if "loss" in line):  # 4 steps an epoch; LARS's rates are for 256 clips a step
        factor = 16 / 256 * schedule(line["step"] - 1, 48, 4)
        assert (line["lr_weights"], line["lr_biases"]) == pytest.approx((5 * factor, 4.8e-3 * factor))
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


def handed_over(monkeypatch, **settings):
    """What pretrain.py hands to the loop: learner, samples."""
    given = []
    monkeypatch.setattr(pretrain, "train", lambda learner, samples, *_: given.append((learner, samples)))
    pretrain.pretrain(Settings(sample_rate=16_000, mels=32, frames=60, mean=-3.0, std=4.0, stride_time=8, stride_mel=8,
                               batch=16, workers=0, **settings), CPU)
    return given[0]


@pytest.mark.parametrize(("init", "alike"), [("clip", True), ("random", False)])
def test_vip_ant_starts_from_clip_and_va_rand_does_not(world, small_clip, monkeypatch, init, alike):
    learner, _ = handed_over(monkeypatch, data=str(world), clip=str(small_clip), vocab=str(world / "vocab.txt.gz"),
                             leave_out="none", init=init)
    start, eye = learner.audio_encoder.state_dict(), audio_encoder_from_clip(load_clip(small_clip), 60, 32, (8, 8)).state_dict()
    assert start.keys() == eye.keys()
    assert {torch.equal(start[key], eye[key]) for key in eye if eye[key].ndim > 1} == {alike}


def test_what_audiocaps_tests_with_is_not_trained_on(leaking, world, small_clip, monkeypatch):
    _, samples = handed_over(monkeypatch, data=str(leaking), clip=str(small_clip), vocab=str(world / "vocab.txt.gz"),
                             leave_out=str(leaking))
    assert [os.path.basename(os.fsdecode(path)) for path in samples.paths] == [f"train_{i}.wav" for i in (0, 2, 3, 5)]


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
    """The first step's weights are finite and saved; the second's loss is not."""
    flags = pretrain_flags | {"--lr-biases": 1e30, "--lr-weights": 1e30, "--warmup-epochs": 2, "--save-every": 1}
    done = run("pretrain.py", *flat(flags), check=False)
    assert done.returncode == 1 and "the weights diverge" in done.stderr and "Traceback" not in done.stderr
    assert all(value.isfinite().all() for value in learner_of(pretrain_flags["--out"]).values())


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
