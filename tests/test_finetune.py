"""Fine-tuning on captions and on labels: what is trained, on which pairs, how fast, and what it leaves behind."""
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import flat

import finetune
import ladder
from bank import caption_bank
from clip_load import Tokenizer, load_clip
from data import FrontEnd
from finetune import (
    PRESETS,
    HeadLearner,
    LabelledSamples,
    Remember,
    Settings,
    measure_head,
    rounds_of,
    starting_encoder,
    take_pairs,
    with_full_batch,
)
from model import VisionTransformer, info_nce
from readers import Clip, read_index
from train import AudioLearner, load_checkpoint, parse, save_checkpoint

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------- settings

def test_defaults_are_the_papers_table_5():
    at = Settings()
    assert (at.optimizer, at.batch, at.epochs, at.warmup_epochs) == ("lars", 64, 25, 10)
    assert (at.lr_weights, at.lr_biases, at.weight_decay) == (0.2, 4.8e-3, 1e-6)
    for name in ("esc50", "us8k"):
        head = parse(Settings(), PRESETS, ["--head", name])
        assert (head.batch, head.epochs, head.lr_weights, head.lr_biases) == (50, 50, 1.0, 2.4e-2)
    balanced, full = (parse(Settings(), PRESETS, ["--head", name]) for name in ("audioset-balanced", "audioset"))
    assert (balanced.optimizer, balanced.batch, balanced.epochs, balanced.last_layers) == ("adam", 12, 25, 4)
    assert (full.batch, full.epochs, full.last_layers, full.lr_weights, full.weight_decay) == (128, 5, -1, 5e-5, 1e-7)


def test_milestones_by_hand():
    """Warm-up over 4 steps; halved at epoch 2 and again at step 30, with 10 steps an epoch."""
    settings = Settings(milestones="2e, 30", warmup_steps=4)
    factors = [settings.lr_factor(step, 10) for step in (0, 1, 3, 19, 20, 29, 30, 99)]
    assert factors == [0.25, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert Settings(epochs=4, warmup_epochs=1.0).lr_factor(5, 10) == 0.5  # without milestones as in pre-training
    for wrong in ("2e;5", "5,", "e"):
        with pytest.raises(ValueError, match=f"--milestones {wrong}: needed are numbers"):
            Settings(milestones=wrong).check()


# ---------------------------------------------------------------------------------- captions

def test_fewer_pairs_are_among_more():
    clips = [Clip(str(i), "a.wav", captions=tuple(f"{i} {j}" for j in range(3))) for i in range(10)]
    few, more = (take_pairs(clips, n, seed=1) for n in (7, 20))
    def pairs(chosen):
        return {(c.id, caption) for c in chosen for caption in c.captions}

    assert len(pairs(few)) == 7 and len(pairs(more)) == 20 and pairs(few) <= pairs(more)
    assert pairs(take_pairs(clips, 7, seed=2)) != pairs(few) and pairs(take_pairs(clips, 30, seed=1)) == pairs(clips)
    for count in (31, -1):  # and not all but one
        with pytest.raises(ValueError, match=f"--pairs {count}: there are 30"):
            take_pairs(clips, count, seed=1)


def test_few_samples_make_a_batch_that_the_ranks_can_share(monkeypatch, capsys):
    settings = Settings(batch=64)
    assert with_full_batch(settings, 64) is settings and with_full_batch(settings, 63).batch == 32
    assert "63 clips do not fill a batch of 64: batches of 32" in capsys.readouterr().err
    monkeypatch.setattr(finetune, "ranks", lambda: (1, 3))
    with pytest.raises(ValueError, match="9 clips make batches of 8, which can't be split over 3 ranks"):
        with_full_batch(settings, 9)


def test_a_random_start_fits_the_clip_that_makes_its_targets(small_clip):
    small = Settings(init="random", frames=60, mels=32, patch=16, layers=1, width=64, stride_time=8, stride_mel=8)
    clip = load_clip(small_clip)
    encoder, front_end, log_scale = starting_encoder(small, clip)
    assert encoder.proj.shape == (64, clip.text_projection.shape[1]) and front_end.frames == 60 and log_scale is None
    assert starting_encoder(small, None)[0].proj.shape == (64, 512)  # for a head any number will do
    for width in (32, 200):
        with pytest.raises(ValueError, match=f"--width {width}: .* take a multiple of 64"):
            starting_encoder(replace(small, width=width), None)


def test_captions_that_clips_share_are_one_row(small_clip, world, tmp_path):
    clip = load_clip(small_clip)
    tokenizer = Tokenizer(world / "vocab.txt.gz", clip.context_length)
    clips = [Clip("0", captions=("a hum", "a buzz")), Clip("1", captions=("a buzz",)), Clip("2")]
    bank = caption_bank(tmp_path, clips, ["a buzz", "a rasp", "a hum"], clip, tokenizer, CPU)
    assert bank.embeddings.shape == (3, 32)
    assert [bank.of(i).tolist() for i in range(3)] == [[2, 0], [0], []]
    text = torch.nn.functional.normalize(clip.encode_text(tokenizer(["a hum"])))
    assert np.abs(bank.draw(0, np.random.default_rng(0)).numpy() - bank.embeddings[[2, 0]]).max(1).min() == 0
    assert np.abs(bank.embeddings[2] - text[0].numpy()).max() < 2e-3


def test_vat_adds_the_loss_with_frames_to_the_loss_with_captions():
    learner = AudioLearner(VisionTransformer((40, 32), 16, (8, 8), 1, 64, 1, 1, 32), FrontEnd(16_000, 32, 40))
    audio, frames, captions = torch.randn(3, 6, 32)
    loss = learner.loss(audio, torch.stack([captions, frames], 1))
    by_hand = info_nce(audio, captions, learner.log_scale) + info_nce(audio, frames, learner.log_scale)
    assert torch.allclose(loss, by_hand)


@pytest.fixture(scope="module")
def started(run, world, small_clip, tmp_path_factory):
    """A pre-training of one epoch on the small world, and flags that fine-tune it."""
    out = tmp_path_factory.mktemp("started")
    front = {"--sample-rate": 16000, "--mels": 32, "--frames": 100, "--mean": -3, "--std": 4}
    run("pretrain.py", *flat(front | {"--data": world, "--leave-out": "none", "--clip": small_clip, "--vocab":
        world / "vocab.txt.gz", "--out": out / "pretrain", "--stride-time": 8, "--stride-mel": 8, "--batch": 16,
        "--epochs": 1, "--warmup-epochs": 0, "--lr-weights": 5, "--precision": "fp32", "--workers": 0}))
    for source in ("gc", "ac"):
        run("curate.py", *flat({"--data": world, "--source": source, "--clip": small_clip, "--leave-out": "none",
                                "--vocab": world / "vocab.txt.gz", "--workers": 0}))
    return {"--data": world, "--init": out / "pretrain/checkpoint.pt", "--epochs": 6, "--batch": 16,
            "--warmup-epochs": 0, "--lr-weights": 8, "--lr-biases": 0.01, "--workers": 0, "--precision": "fp32",
            "--log-every": 4}


def losses(out):
    return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def test_gold_captions_are_learned_and_the_checkpoint_is_evaluated(run, started, world, tmp_path):
    done = run("finetune.py", *flat(started | {"--source": "gc", "--out": tmp_path}))
    assert "64 clips, 64 pairs" in done.stdout and "audio->text R@1" in done.stdout and "next: python evaluate" in done.stdout
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", ["finetune"])
    assert checkpoint["front_end"]["frames"] == 100 and checkpoint["settings"]["source"] == "gc"
    run("evaluate.py", "--task", "audiocaps", "--data", world, "--checkpoint", tmp_path / "checkpoint.pt")
    assert json.loads((tmp_path / "audiocaps.json").read_text())["model"]["row"] == "+AT GC"


def test_nine_pairs_make_batches_of_eight_and_vat_adds_a_second_loss(run, started, tmp_path):
    run("finetune.py", *flat(started | {"--source": "ac", "--epochs": 1, "--out": tmp_path / "ac"}))
    done = run("finetune.py", *flat(started | {"--source": "gc", "--pairs": 9, "--out": tmp_path / "few"}))
    assert "9 clips, 9 pairs" in done.stdout and "batches of 8" in done.stderr
    run("finetune.py", *flat(started | {"--source": "gc", "--objective": "vat", "--epochs": 1, "--out": tmp_path / "vat"}))
    assert losses(tmp_path / "vat")[0] > 1.5 * losses(tmp_path / "ac")[0]  # two losses instead of one


def test_fine_tuning_starts_from_the_checkpoints_encoder_and_temperature_and_all_of_it_learns(started, monkeypatch, tmp_path):
    saved, given = load_checkpoint(started["--init"], ["pretrain"]), []
    saved["learner"]["log_scale"] = torch.tensor(3.3)
    save_checkpoint(tmp_path / "start.pt", saved)
    monkeypatch.setattr("sys.argv", ["finetune.py"])
    monkeypatch.setattr(finetune, "train", lambda learner, *_: given.append(learner))
    finetune.finetune_on_captions(Settings(source="gc", data=str(started["--data"]), init=str(tmp_path / "start.pt"),
                                           batch=16, workers=0), CPU)
    learner, = given
    assert all(torch.equal(value, saved["learner"][name]) for name, value in learner.state_dict().items())
    assert all(p.requires_grad for p in learner.parameters())


def test_two_ranks_fine_tune_as_one(run, started, tmp_path):
    learners = []
    for ranks in (1, 2):
        run("finetune.py", *flat(started | {"--source": "gc", "--epochs": 2, "--out": tmp_path / str(ranks)}), ranks=ranks)
        learners.append(load_checkpoint(tmp_path / f"{ranks}/checkpoint.pt", ["finetune"])["learner"])
    assert all(torch.allclose(learners[0][name], learners[1][name], atol=1e-5) for name in learners[0])


def test_bad_input_is_named(run, started, small_clip, tmp_path):
    for flags, message in (
            ({"--source": "gc", "--pairs": 65}, "--pairs 65: there are 64"),
            ({"--source": "vc", "--data": tmp_path}, "vc.jsonl: no pairs yet. Run: python curate.py --source vc"),
            ({}, "either --source"), ({"--source": "gc", "--head": "esc50"}, "either --source"),
            ({"--source": "gc", "--init": tmp_path / "no.pt"}, "no.pt: no such checkpoint")):
        done = run("finetune.py", *flat(started | {"--out": tmp_path / "x"} | flags), check=False)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    other = torch.load(small_clip, weights_only=True)
    other["visual.proj"] += 1
    torch.save(other, tmp_path / "other.pt")
    done = run("finetune.py", *flat(started | {"--source": "gc", "--clip": tmp_path / "other.pt"}), check=False)
    assert done.returncode == 1 and "not the CLIP that" in done.stderr and "--clip" in done.stderr
    done = run("finetune.py", *flat(started | {"--source": "gc", "--vocab": tmp_path / "moved.txt.gz"}), check=False)
    assert done.returncode == 1 and "moved.txt.gz" in done.stderr  # a flag is not overruled by the checkpoint


def test_the_ladder_weighs_each_claim_over_seeds(capsys, tmp_path):
    """What is there is not done again: results laid out by hand give the table, its spread and the verdicts."""
    rows = ["VA-Rand", "vip-AnT", "+ATAC", "+ATFC", "+ATVC", "+ATRC", "+ATGL", "+ATGC", "+VATGC", "+ATGC1", "+ATGC5",
            "+ATGC20"]
    for seed in range(2):
        for i, row in enumerate(rows):
            value = 10.0 * i + seed * (20 if row == "+ATAC" else 0)  # AC: 20, then 40; RC: 50; FC: 30
            place = tmp_path / f"seed{seed}" / row
            place.mkdir(parents=True)
            metrics = {key: [value, value, value] for key in ("a2t_r1", "a2t_r10", "t2a_r1", "t2a_r10")}
            labels = {variant: {"accuracy": [value, value, value]} for variant in ("prompt", "no prompt")}
            (place / "toy.json").write_text(json.dumps({"results": {
                "audio-text": {"values": {"no prompt": metrics}}, "zero-shot labels": {"values": labels}}}))
    ladder.run_ladder(ladder.Ladder(seeds=2, out=str(tmp_path)))
    printed = capsys.readouterr().out.splitlines()
    lines = {line.split("   ")[0].strip(): line for line in printed}
    assert "30.0 ± 14.1" in lines["+AT AC"] and "10.0 ± 0.0" in lines["vip-AnT"]
    verdicts = {claim: next(line for line in printed if claim in line) for claim in (
        "CLIP's weights are the better start", "mined audio captions beat random ones", "(AC, FC)")}
    assert verdicts["CLIP's weights are the better start"].endswith(" holds")
    assert verdicts["mined audio captions beat random ones"].endswith("does not hold")
    assert verdicts["(AC, FC)"].endswith("unclear") and "0.0 ± 14.1" in verdicts["(AC, FC)"]


def test_each_rung_gets_its_seed_its_own_start_and_captions_once(tmp_path, monkeypatch):
    given = []

    def pretend(script, *flags):
        flags = dict(zip(flags[::2], flags[1::2]))
        given.append((script, flags))
        if "--out" in flags:
            flags["--out"].mkdir(parents=True)
            (flags["--out"] / "toy.json").write_text(json.dumps({"results": {
                "audio-text": {"values": {"no prompt": {"a2t_r1": [1, 1, 1]}}}, "zero-shot labels": {"values": {
                    variant: {"accuracy": [1, 1, 1]} for variant in ("prompt", "no prompt")}}}}))

    monkeypatch.setattr(ladder, "command", pretend)
    curated = set()
    for seed in (0, 1):
        ladder.climb(ladder.Ladder(out=str(tmp_path)), seed, curated)
    assert [flags["--seed"] for _, flags in given if "--seed" in flags] == [0] * 12 + [1] * 12
    assert all(flags["--init"] == tmp_path / f"seed{flags['--seed']}/vip-AnT/checkpoint.pt"
               for script, flags in given if script == "finetune.py")
    assert [flags["--source"] for script, flags in given if script == "curate.py"] == ["ac", "fc", "vc", "rc", "gl", "gc"]


# ------------------------------------------------------------------------------------ labels

def small_encoder():
    torch.manual_seed(0)
    return VisionTransformer((50, 32), 16, (16, 16), 1, 64, 3, 1, 32)


@pytest.mark.parametrize(("last_layers", "blocks"), [(0, 0), (1, 1), (2, 2), (-1, 3), (9, 3)])
def test_the_last_k_blocks_learn(last_layers, blocks):
    learner = HeadLearner(small_encoder(), FrontEnd(16_000, 32, 50), 4, False, last_layers)
    trained = {name for name, p in learner.named_parameters() if p.requires_grad}
    found = {name.split(".")[3] for name in trained if "resblocks" in name}
    assert found == {str(i) for i in range(3 - blocks, 3)} and any(name.startswith("head") for name in trained)
    assert ("audio_encoder.conv1.weight" in trained) == (blocks == 3)
    assert ("audio_encoder.proj" in trained) == ("audio_encoder.ln_post.weight" in trained) == (blocks > 0)


def test_head_losses_by_hand():
    one = HeadLearner(small_encoder(), FrontEnd(16_000, 32, 50), 3, False, 0)
    logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    p = logits.softmax(1)[0]
    assert one.loss(logits, target).item() == pytest.approx(-(0.5 * p[0].log() + 0.5 * p[1].log()).item())
    several = HeadLearner(small_encoder(), FrontEnd(16_000, 32, 50), 3, True, 0)
    q = logits.sigmoid()[0]
    by_hand = -(0.5 * q[0].log() + 0.5 * (1 - q[0]).log() + 0.5 * q[1].log() + 0.5 * (1 - q[1]).log() + (1 - q[2]).log()) / 3
    assert several.loss(logits, target).item() == pytest.approx(by_hand.item())


def test_mixtures_by_hand(world):
    clips = read_index(world / "train.jsonl")[:5]
    labels = sorted({label for c in clips for label in c.labels})
    load = Remember(FrontEnd(16_000, 32, 100).load)
    plain, mixed = (LabelledSamples(clips, labels, load, mixup) for mixup in (0.0, 1.0))
    sample = mixed.read(2, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.random()
    share, other = rng.beta(10, 10), int(rng.integers(5))
    one, two = plain.read(2, rng), plain.read(other, rng)
    assert torch.allclose(sample["wave"], share * one["wave"] + (1 - share) * two["wave"])
    assert torch.allclose(sample["target"], share * one["target"] + (1 - share) * two["target"])
    assert len(load.known) == len({2, other})  # each file was read once


def test_map_of_a_head_needs_logits_as_they_are(world):
    """Two clips whose logits differ in length: made unit vectors, their order within a class would change."""
    learner = HeadLearner(small_encoder(), FrontEnd(16_000, 32, 50), 2, True, 0)
    logits = torch.tensor([[2.0, 9.0], [1.0, 0.1]])  # as unit vectors (0.22, 0.98), (1.00, 0.10): class a would turn round
    learner.logits = lambda wave, length: logits
    clips = [Clip("0", "0", labels=("a",)), Clip("1", "1", labels=("b",))]
    value, heard = measure_head(learner, LabelledSamples(clips, ["a", "b"], lambda path: (torch.zeros(3), 3)), CPU, 0)
    assert heard == 2 and value == pytest.approx(100 * (1 + 0.5) / 2)


@pytest.fixture
def esc(tmp_path):
    """ESC-50 in miniature: two folds, a low and a high tone in ESC-10, noise outside it."""
    folder, rng = tmp_path / "esc", np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    text = "filename,fold,target,category,esc10,src_file,take\n"
    for fold in (1, 2):
        for kind, (name, hertz) in enumerate({"low_tone": 300, "high_tone": 3000, "noise": 0}.items()):
            for take in range(8):
                wave = 0.2 * rng.standard_normal(8000) + (0.5 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16_000))
                soundfile.write(folder / f"audio/{fold}-{take}-A-{kind}.wav", wave, 16_000)
                text += f"{fold}-{take}-A-{kind}.wav,{fold},{kind},{name},{kind < 2},1,A\n"
    (folder / "meta/esc50.csv").write_text(text)
    return folder


def test_esc10_is_the_easy_part_and_folds_are_never_trained_on(esc):
    _, labels, rounds = rounds_of(parse(Settings(), PRESETS, ["--head", "esc10", "--data", str(esc)]))
    assert labels == ["high tone", "low tone"] and list(rounds) == ["fold 1", "fold 2"]
    for training, test in rounds.values():
        assert len(training) == len(test) == 16 and not {c.id for c in training} & {c.id for c in test}
    _, labels, _ = rounds_of(parse(Settings(), PRESETS, ["--head", "esc50", "--data", str(esc)]))
    assert len(labels) == 3


def test_audiosets_splits_must_have_clips_whose_labels_are_known(world, tmp_path):
    def rounds(head="audioset-balanced"):
        return rounds_of(parse(Settings(), PRESETS, ["--head", head, "--data", str(tmp_path)]))

    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text((world / f"{name}.jsonl").read_text())
    _, labels, both = rounds()
    assert labels == sorted(labels) and [len(clips) for clips in both["eval"]] == [24, 24]
    assert len(rounds("audioset")[2]["eval"][0]) == 64
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/1,Speech\n")
    with pytest.raises(ValueError, match="a clip's label '.*' is not in class_labels_indices.csv"):
        rounds()
    (tmp_path / "test.jsonl").write_text('{"id": "x", "audio": "x.wav"}\n')
    with pytest.raises(ValueError, match="not one clip of its test split has sound and labels"):
        rounds()


def test_a_head_is_trained_on_each_fold_and_resumes(run, esc, tmp_path):
    flags = {"--head": "esc10", "--data": esc, "--out": tmp_path / "out", "--frames": 50, "--width": 64, "--layers": 1,
             "--batch": 8, "--epochs": 30, "--warmup-epochs": 1, "--lr-weights": 2e-3, "--mixup": 0, "--workers": 0,
             "--precision": "fp32"}
    done = run("finetune.py", *flat(flags))
    saved = json.loads((tmp_path / "out/head.json").read_text())
    assert list(saved["results"]) == ["fold 1", "fold 2"] and min(saved["results"].values()) >= 90  # two tones
    assert f"mean {saved['mean']:.1f} ± " in done.stdout
    again = run("finetune.py", *flat(flags))
    assert json.loads((tmp_path / "out/head.json").read_text())["results"] == saved["results"]
    assert "epoch 1.00" not in again.stdout  # nothing was trained twice


def test_a_linear_probe_leaves_the_encoder_alone(run, started, esc, tmp_path):
    flags = {"--head": "esc10", "--data": esc, "--out": tmp_path / "out", "--init": started["--init"], "--fold": 1,
             "--last-layers": 0, "--batch": 8, "--epochs": 2, "--workers": 0}
    run("finetune.py", *flat(flags))
    before = load_checkpoint(started["--init"], ["pretrain"])["learner"]
    after = load_checkpoint(tmp_path / "out/fold1/checkpoint.pt", ["head"])["learner"]
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name.startswith("audio_encoder"))
    assert after["head.1.weight"].shape == (2, 32)
