"""The same loop with other targets: which pairs train, what a head learns, which rates it has."""
import json
from dataclasses import replace

import finetune
import numpy as np
import pytest
import torch
from conftest import kill_at_random, run, write_esc50
from data import Clip, FrontEnd, read_index
from finetune import PRESETS, HeadLearner, Settings
from model import VisionTransformer
from pretrain import AudioLearner, AudioSamples, load_checkpoint, parse


def test_halved_rates_by_hand():
    """Warm-up over 4 steps; halved after epoch 2 and again after step 30, 10 steps an epoch."""
    assert parse(Settings(), PRESETS, ["--source", "ac", "--data", "audioset"]).head == ""
    settings = replace(parse(Settings(), PRESETS, ["--head", "audioset", "--halve-epochs", "2"]),
                       halve_steps=(30,), warmup_steps=4)
    factors = [settings.lr_factor(step, 100, 10) for step in (0, 1, 3, 19, 20, 29, 30, 99)]
    assert factors == [0.25, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25] and settings.lr_weights == 5e-5
    assert abs(Settings(warmup_epochs=1.0).lr_factor(25, 40, 10) - 0.5005) < 1e-9  # the cosine


def test_pairs_and_clips_are_joined_by_id_and_fewer_pairs_are_among_more(world, tmp_path):
    path, settings = tmp_path / "ac.jsonl", Settings(source="ac", data=str(world))
    with pytest.raises(FileNotFoundError, match="python curate.py --source ac --data"):
        finetune.paired_clips(path, settings, world)
    path.write_text('{"id": "train_7", "captions": ["a hum"]}\n{"id": "gone", "captions": ["b"]}\n'
                    '{"id": "train_2", "captions": ["a buzz", "a hum"]}\n')
    one, other = finetune.paired_clips(path, settings, world)
    assert one.audio == str(world / "audio/train_7.wav") and one.captions == ("a hum",)
    assert other.audio == str(world / "audio/train_2.wav") and len(other.frames) == 4
    clips = [Clip(str(i), captions=(f"{i} a", f"{i} b", f"{i} c")) for i in range(10)]
    few, more, most = ({(c.id, caption) for c in finetune.take_pairs(clips, count, seed=1)
                        for caption in c.captions} for count in (7, 20, 30))
    assert len(few) == 7 and len(more) == 20 and len(most) == 30 and few < more < most
    with pytest.raises(ValueError, match="--pairs 31: there are 30"):
        finetune.take_pairs(clips, 31, seed=1)


@pytest.fixture(scope="module")
def few(checkpoint, world, tmp_path_factory):
    """A run on nine gold pairs, and its command's flags, but for the folder's."""
    out = tmp_path_factory.mktemp("few")
    run("curate.py", "--source", "gc", "--data", world, "--out", out)
    flags = ["--source", "gc", "--data", world, "--init", checkpoint, "--pairs", 9, "--epochs", 20,
             "--warmup-epochs", 0, "--lr-weights", 8, "--precision", "fp32", "--workers", 0,
             "--log-every", 1, "--save-every", 3, "--out"]
    done = run("finetune.py", *flags, out / "few")
    assert "9 pairs of 9 clips, in batches of 9" in done.stdout
    return out / "few", flags


def test_few_pairs_are_learned_from_a_checkpoint_and_vat_adds_a_second_loss(few, checkpoint):
    out, flags = few
    start = load_checkpoint(checkpoint, ["pretrain"])
    end = load_checkpoint(out / "checkpoint.pt", ["finetune"])
    assert all((end["learner"][name] != value).any() for name, value in start["learner"].items())
    assert (end["learner"]["log_scale"] - start["learner"]["log_scale"]).abs() < 0.5
    assert end["clip"]["merges"] == start["clip"]["merges"] and end["settings"]["pairs"] == 9
    vat = out.with_name("vat")
    run("finetune.py", *flags, vat, "--objective", "vat", "--steps", 1)
    one, two = ((each / "log.jsonl").read_text().splitlines() for each in (out, vat))
    assert json.loads(two[1])["loss"] > 1.5 * json.loads(one[1])["loss"]
    assert json.loads(one[-1])["loss"] < 4.2  # who hears nothing has 2·log(9), 4.4, at best


def test_fine_tuning_killed_at_random_moments_ends_as_undisturbed(few):
    out, flags = few
    cut = out.with_name("cut")
    kill_at_random(3 * ["| loss "], "finetune.py", *flags, cut)
    one, other = (load_checkpoint(each / "checkpoint.pt", ["finetune"]) for each in (out, cut))
    assert one["step"] == other["step"] == 20
    assert all(torch.equal(one["learner"][name], other["learner"][name]) for name in one["learner"])


@pytest.mark.parametrize(("last_layers", "blocks"), [(0, 0), (1, 1), (2, 2), (-1, 3), (9, 3)])
def test_the_last_blocks_learn_and_what_follows_them(last_layers, blocks):
    encoder = VisionTransformer((50, 32), 16, (16, 16), 1, 64, 3, 1, 32)
    learner = HeadLearner(AudioLearner(encoder, FrontEnd(16_000, 32, 50)), 4, None, last_layers)
    learn = {name for name, p in learner.named_parameters() if p.requires_grad}
    found = {name.split(".")[3] for name in learn if "resblocks" in name}
    assert found == {str(i) for i in range(3 - blocks, 3)} and "head.1.weight" in learn
    assert ("audio_encoder.conv1.weight" in learn) == (blocks == 3)
    assert ("audio_encoder.proj" in learn) == (blocks > 0)


def test_masks_are_drawn_anew_in_each_epoch_and_mixtures_are_as_by_hand(world):
    clips = read_index(world / "train.jsonl")[:5]
    classes = sorted({label for c in clips for label in c.labels})
    samples = finetune.MixedSamples(clips, [finetune.Labels(clips, classes)],
                                    FrontEnd(16_000, 32, 100), 0)
    rng = np.random.default_rng(3)
    one = samples.read(2, rng)
    other, share = AudioSamples.read(samples, rng.integers(5), rng), rng.beta(10, 10)
    batch = torch.utils.data.default_collate([samples[epoch, 0] for epoch in range(20)])
    heard, _ = AudioLearner(torch.nn.Flatten(), samples.front_end)(batch)        # (20, T·F)
    assert (heard.std(0) > 0).float().mean() > 0.5 and one["wave"].ndim == 1  # sound, to be mixed
    samples.mixup = 1.0
    mixture = samples.read(2, np.random.default_rng(3))
    for name in ("wave", "target"):
        assert torch.allclose(mixture[name], share * one[name] + (1 - share) * other[name])
    samples.paths[2] = b"gone"  # with whom others are mixed
    assert all("wave" in samples[epoch, 0] for epoch in range(30))
    assert one["target"].sum() == 1 and classes[one["target"].argmax()] == clips[2].labels[0]


def test_a_fold_is_tested_by_who_never_heard_it_and_two_tones_are_told_apart(
        checkpoint, tmp_path, capsys):
    clips, rng = [], np.random.default_rng(0)
    for i in range(48):  # two folds of eight low and eight high tones, and noise outside ESC-10
        category, pitch = [("noise", 0), ("low", 0.1), ("high", 1.0)][i // 2 % 3]
        wave = 0.2 * rng.normal(size=8000) + np.sin(pitch * np.arange(8000))
        clips.append((1 + i % 2, category, category != "noise", wave / 4))
    write_esc50(tmp_path / "esc", 16_000, clips)
    settings = replace(PRESETS["esc10"], head="esc10", data=f"{tmp_path}/esc", batch=8, epochs=20,
                       out=f"{tmp_path}/out", init=str(checkpoint), lr_weights=5e-3, lr_biases=5e-3)
    for _, clips, test in finetune.rounds_of(settings, tmp_path / "esc"):
        assert len(clips) == len(test) == 16 and not {c.id for c in clips} & {c.id for c in test}
    finetune.finetune_on_labels(settings, torch.device("cpu"))
    results = json.loads((tmp_path / "out/head.json").read_text())["results"]
    assert results.keys() == {"fold1", "fold2"} and min(results.values()) >= 90
    assert f"accuracy {np.mean(list(results.values())):.1f} ± " in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "out/fold1/checkpoint.pt", ["head"])
    assert saved["labels"] == ["high", "low"] and saved["settings"]["head"] == "esc10"
