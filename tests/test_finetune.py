"""The same loop with other targets: which pairs train, what a head learns, which rates it has."""
import json
from dataclasses import replace
from pathlib import Path

import curate
import finetune
import numpy as np
import pytest
import soundfile
import torch
from data import Clip, FrontEnd, read_index
from finetune import PRESETS, Settings
from model import VisionTransformer
import pretrain
from pretrain import AudioSamples, load_checkpoint, parse

CPU = torch.device("cpu")


def test_halved_rates_by_hand():
    """Warm-up over 4 steps; halved after epoch 2 and again after step 30, 10 steps an epoch."""
    settings = replace(parse(Settings(), PRESETS, ["--head", "audioset", "--halve-epochs", "2"]),
                       halve_steps=(30,), warmup_steps=4)
    factors = [settings.lr_factor(step, 10) for step in (0, 1, 3, 19, 20, 29, 30, 99)]
    assert factors == [0.25, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25] and settings.lr_weights == 5e-5
    assert Settings(epochs=4, warmup_epochs=1.0).lr_factor(5, 10) == 0.5  # as in pre-training


def test_fewer_pairs_are_among_more():
    clips = [Clip(str(i), captions=(f"{i} a", f"{i} b", f"{i} c")) for i in range(10)]
    few, more, most = ({(c.id, caption) for c in finetune.take_pairs(clips, count, seed=1)
                        for caption in c.captions} for count in (7, 20, 30))
    assert len(few) == 7 and len(more) == 20 and len(most) == 30 and few < more < most
    with pytest.raises(ValueError, match="--pairs 31: there are 30"):
        finetune.take_pairs(clips, 31, seed=1)


def test_pairs_and_clips_are_joined_by_id(world, tmp_path):
    path, settings = tmp_path / "ac.jsonl", Settings(source="ac", data=str(world))
    with pytest.raises(FileNotFoundError, match="python curate.py --source ac --data"):
        finetune.paired_clips(path, settings, world)
    path.write_text('{"id": "train_7", "captions": ["a hum"]}\n{"id": "gone", "captions": ["b"]}\n'
                    '{"id": "train_2", "captions": ["a buzz", "a hum"]}\n')
    one, other = finetune.paired_clips(path, settings, world)
    assert one.audio == str(world / "audio/train_7.wav") and one.captions == ("a hum",)
    assert other.audio == str(world / "audio/train_2.wav") and len(other.frames) == 4


def stops_after(steps, next_batch=pretrain.next_batch):
    """next_batch, but for a Ctrl-C after so many steps."""
    taken = []

    def next_or_stop(*arguments):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        return next_batch(*arguments)

    return next_or_stop


def test_few_pairs_are_learned_from_a_checkpoint_and_resume_to_the_same_bits(
        run, checkpoint, world, tmp_path, capsys, monkeypatch):
    curate.curate(curate.Settings(source="gc", data=str(world), out=str(tmp_path)), CPU)
    few = Settings(source="gc", data=str(world), out=str(tmp_path / "few"), init=str(checkpoint),
                   pairs=9, epochs=4, warmup_epochs=0, lr_weights=8.0, workers=0, precision="fp32",
                   log_every=1)
    cut, vat = (replace(few, out=few.out + name) for name in ("-cut", "-vat"))
    vat = replace(vat, objective="vat")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "next_batch", stops_after(2))
        finetune.finetune_on_captions(cut, CPU)
    for settings in (few, cut, replace(vat, steps=1)):
        finetune.finetune_on_captions(settings, CPU)
    assert "9 pairs of 9 clips, in batches of 9" in capsys.readouterr().out
    start, one, other = (load_checkpoint(path, ["pretrain", "finetune"]) for path in (
        checkpoint, few.out + "/checkpoint.pt", cut.out + "/checkpoint.pt"))
    assert all(torch.equal(one["learner"][name], other["learner"][name]) for name in one["learner"])
    assert all((one["learner"][name] != value).any() for name, value in start["learner"].items())
    assert (one["learner"]["log_scale"] - start["learner"]["log_scale"]).abs() < 0.5
    assert one["clip"]["merges"] == start["clip"]["merges"] and one["settings"]["pairs"] == 9
    first, two = (json.loads(Path(out, "log.jsonl").read_text().splitlines()[1])["loss"]
                  for out in (few.out, vat.out))
    assert two > 1.5 * first  # VAT adds a second loss
    torch.save(start | {"stage": "head"}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="stage 'head'; needed: pretrain or finetune"):
        finetune.finetune_on_captions(replace(few, init=str(tmp_path / "head.pt")), CPU)
    done = run("finetune.py", "--source", "gc", "--head", "esc50", check=False)
    assert done.returncode == 1 and "needed: --source" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("last_layers", "blocks"), [(0, 0), (1, 1), (2, 2), (-1, 3), (9, 3)])
def test_the_last_blocks_learn_and_what_follows_them(last_layers, blocks):
    encoder = VisionTransformer((50, 32), 16, (16, 16), 1, 64, 3, 1, 32)
    learner = finetune.HeadLearner(encoder, FrontEnd(16_000, 32, 50), 4, None, last_layers)
    learn = {name for name, p in learner.named_parameters() if p.requires_grad}
    found = {name.split(".")[3] for name in learn if "resblocks" in name}
    assert found == {str(i) for i in range(3 - blocks, 3)} and "head.1.weight" in learn
    assert ("audio_encoder.conv1.weight" in learn) == (blocks == 3)
    assert ("audio_encoder.proj" in learn) == (blocks > 0)


def test_mixtures_by_hand(world):
    clips = read_index(world / "train.jsonl")[:5]
    classes = sorted({label for c in clips for label in c.labels})
    samples = finetune.MixedSamples(clips, [finetune.Labels(clips, classes)],
                                    FrontEnd(16_000, 32, 100), seed=0)
    rng = np.random.default_rng(3)
    one = samples.read(2, rng)
    other, share = AudioSamples.read(samples, rng.integers(5), rng), rng.beta(10, 10)
    samples.mixup = 1.0
    mixture = samples.read(2, np.random.default_rng(3))
    for name in ("wave", "target"):
        assert torch.allclose(mixture[name], share * one[name] + (1 - share) * other[name])
    assert one["target"].sum() == 1 and classes[one["target"].argmax()] == clips[2].labels[0]


def test_a_fold_is_tested_by_who_never_heard_it_and_two_tones_are_told_apart(
        tmp_path, monkeypatch, capsys):
    table, rng = ["filename,fold,target,category,esc10,src_file,take"], np.random.default_rng(0)
    for folder in ("esc/meta", "esc/audio"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(48):  # two folds of eight low and eight high tones, and noise outside ESC-10
        fold, kind = 1 + i % 2, i // 2 % 3
        wave = 0.2 * rng.normal(size=8000) + np.sin((0, 0.1, 1.0)[kind] * np.arange(8000))
        soundfile.write(tmp_path / f"esc/audio/{i}.wav", wave / 4, 16_000)
        table.append(f"{i}.wav,{fold},{kind},{('noise', 'low', 'high')[kind]},{kind > 0},1,A")
    (tmp_path / "esc/meta/esc50.csv").write_text("\n".join(table) + "\n")
    encoder = VisionTransformer((50, 32), 16, (8, 8), 1, 64, 1, 1, 32)
    start = encoder, FrontEnd(16_000, 32, 50, mean=0, std=3)
    monkeypatch.setattr(finetune, "start_of", lambda init: start)
    settings = replace(PRESETS["esc10"], data=str(tmp_path / "esc"), out=str(tmp_path / "out"),
                       batch=8, epochs=20, lr_weights=5e-3, workers=0)
    for clips, test in finetune.rounds_of(settings, tmp_path / "esc").values():
        assert len(clips) == len(test) == 16 and not {c.id for c in clips} & {c.id for c in test}
    finetune.finetune_on_labels(settings, CPU)
    results = json.loads((tmp_path / "out/head.json").read_text())["results"]
    assert results.keys() == {"fold1", "fold2"} and min(results.values()) >= 90
    assert f"accuracy {np.mean(list(results.values())):.1f} ± " in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "out/fold1/checkpoint.pt", ["head"])
    assert saved["labels"] == ["high", "low"] and saved["settings"]["head"] == "esc10"
