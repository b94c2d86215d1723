"""Metrics by hand and against the authors' values; tasks through the command line on files as published."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import flat

from clip_load import audio_encoder_from_clip, fingerprint, load_clip
from evaluate import retrieval_metrics, zero_shot
from pretrain import save_checkpoint


def test_recall_by_hand():
    """Three clips, one caption each. Clip 0 finds its own first, 1 second, 2 third."""
    audio = torch.eye(3)
    captions = torch.tensor([[0.9, 0.5, 0.3], [0.1, 0.4, 0.6], [0.2, 0.1, 0.1]])
    captions = torch.cat([captions, (1 - captions.square().sum(1, keepdim=True)).clamp(min=0).sqrt()], 1)  # unit length
    result = retrieval_metrics(torch.nn.functional.pad(audio, (0, 1)), captions, captions_per_clip=1)
    assert result["a2t_r1"] == pytest.approx(100 / 3) and result["a2t_r5"] == 100 and result["a2t_median"] == 2


def test_audio_to_text_takes_the_best_of_a_clips_captions():
    audio = torch.eye(2)
    captions = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])  # clip 0: its second caption is perfect
    result = retrieval_metrics(audio, captions, captions_per_clip=2)
    assert result["a2t_r1"] == 50.0    # clip 1 prefers clip 0's first caption
    assert result["t2a_r1"] == 50.0    # captions 1 and 2 find their clip, 0 and 3 the other one


def test_embeddings_that_are_all_alike_score_nothing():
    result = retrieval_metrics(torch.ones(20, 4), torch.ones(100, 4))
    assert result["a2t_r1"] == result["t2a_r1"] == 0


def test_recalls_are_the_authors(shared):
    golden = np.load(shared / "golden/retrieval.npz")
    result = retrieval_metrics(torch.tensor(golden["audio"]), torch.tensor(golden["captions"]))
    report = dict(zip(("a2t", "t2a"), str(golden["report"]).splitlines()))  # A->T: R@1 77.50 R5 95.00 R10 ... MED 1.00
    for way, line in report.items():
        words = line.split()
        for key, word in (("r1", "R@1"), ("r5", "R5"), ("r10", "R10"), ("median", "MED")):
            assert result[f"{way}_{key}"] == pytest.approx(float(words[words.index(word) + 1]), abs=1e-4)


def test_recall_refuses_a_wrong_number_of_captions():
    with pytest.raises(ValueError, match="9 captions for 2 clips"):
        retrieval_metrics(torch.ones(2, 4), torch.ones(9, 4))


def test_zero_shot_accuracy_by_hand():
    """Fold 1 is right once in two, fold 2 always: 2/3 over all clips, 75 ± 35.4 over folds."""
    audio = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0]])
    result = zero_shot(audio, torch.eye(2), torch.tensor([0, 1, 1]), torch.tensor([1, 1, 2]))
    assert result["accuracy"] == pytest.approx(200 / 3)
    assert result["fold_accuracy"] == [50, 100] and result["fold_mean"] == 75
    assert result["fold_std"] == pytest.approx(35.355, abs=1e-3)


@pytest.fixture
def checkpoint(small_clip, world, tmp_path):
    """Writes a checkpoint with a given front end, as pretrain.py leaves it; returns its path."""
    def write(sample_rate=16_000, mels=32, frames=100, clip=small_clip, vocab=world / "vocab.txt.gz", stage="pretrain"):
        weights = load_clip(clip)
        encoder = audio_encoder_from_clip(weights, frames, mels, (16, 8))
        path = tmp_path / f"model_{frames}.pt"
        save_checkpoint(path, {
            "stage": stage, "step": 1, "steps": 1, "settings": {"init": "clip"}, "encoder": encoder.config,
            "front_end": {"sample_rate": sample_rate, "mels": mels, "frames": frames, "mean": -4.0, "std": 4.0},
            "learner": {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()},
            "clip": {"weights": str(clip), "vocab": str(vocab), "fingerprint": fingerprint(weights)}})
        return path
    return write


@pytest.fixture
def esc(tmp_path):
    """A miniature of ESC-50 as published: 2 classes, 5 folds, one recording gone."""
    folder, rng = tmp_path / "esc", np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = [(f"{fold}-{n}-A-{n}.wav", fold, n, ["dog", "crackling_fire"][n]) for fold in range(1, 6) for n in range(2)]
    for name, *_ in rows[1:]:
        soundfile.write(folder / "audio" / name, rng.uniform(-1, 1, 5 * 8000), 8000)
    (folder / "meta/esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n"
                                           + "".join(f"{a},{b},{c},{d},True,1,A\n" for a, b, c, d in rows))
    return folder


def test_esc50_from_a_checkpoint(run, checkpoint, esc):
    path = checkpoint(frames=500)
    done = run("evaluate.py", "--task", "esc50", "--data", esc, "--checkpoint", path)
    result = json.loads(path.with_name("esc50.json").read_text())["results"]["zero-shot labels"]
    assert result["N"] == 9 and result["unreadable"] == 1 and result["chance"] == 50
    assert len(result["prompt"]["fold_accuracy"]) == 5 and "1-0-A-0.wav: can't be read" in done.stderr
    assert f"{result['no prompt']['accuracy']:.1f}" in done.stdout


def test_esc50_does_not_depend_on_rank_count(run, checkpoint, esc):
    path, results = checkpoint(frames=500), []
    for ranks in (1, 2):
        run("evaluate.py", "--task", "esc50", "--data", esc, "--checkpoint", path, ranks=ranks)
        results.append(json.loads(path.with_name("esc50.json").read_text())["results"])
    assert results[0] == results[1]


def test_the_400_real_recordings(run, checkpoint, shared):
    """Every recording is heard, in its fold, by an encoder with the paper's front end (and random weights)."""
    path = checkpoint(sample_rate=44_100, mels=128, frames=1000)
    run("evaluate.py", "--task", "esc50", "--data", shared / "data/esc10", "--checkpoint", path)
    result = json.loads(path.with_name("esc50.json").read_text())["results"]["zero-shot labels"]
    assert result["N"] == 400 and result["unreadable"] == 0 and result["classes"] == 10 and result["chance"] == 10
    assert len(result["prompt"]["fold_accuracy"]) == 5


def test_a_front_end_that_does_not_fit_is_refused(run, checkpoint, esc):
    done = run("evaluate.py", "--task", "esc50", "--data", esc, "--checkpoint", checkpoint(frames=100), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "hears 1.0 s at 16000 Hz" in done.stderr and "does not fit" in done.stderr


def test_a_checkpoint_of_another_stage_or_with_another_clip_is_refused(run, checkpoint, small_clip, tmp_path, esc):
    task = ("--task", "esc50", "--data", esc)
    done = run("evaluate.py", *task, "--checkpoint", checkpoint(stage="toy-clip"), check=False)
    assert done.returncode == 1 and "stage 'toy-clip'; needed here: pretrain or finetune" in done.stderr
    other = torch.load(small_clip, weights_only=True)
    other["visual.proj"] += 1
    torch.save(other, tmp_path / "other.pt")
    done = run("evaluate.py", *task, "--checkpoint", checkpoint(frames=500), "--clip", tmp_path / "other.pt", check=False)
    assert done.returncode == 1 and "not the CLIP that" in done.stderr


@pytest.mark.parametrize("task", ["clotho", "esc50", "toy"])
def test_a_bare_machine_gets_one_clear_message(run, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    done = run("evaluate.py", "--task", task, check=False)
    assert done.returncode == 1 and f"data/{task}: no such folder" in done.stderr and "Traceback" not in done.stderr


def test_clotho_is_retrieved_both_ways(run, checkpoint, tmp_path):
    folder = tmp_path / "clotho"
    (folder / "evaluation").mkdir(parents=True)
    rng, text = np.random.default_rng(0), "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
    for i in range(6):
        soundfile.write(folder / f"evaluation/{i}.wav", rng.uniform(-1, 1, 16 * 8000), 8000)
        text += f"{i}.wav," + ",".join(f"a deep hum {i} {j}" for j in range(5)) + "\n"
    (folder / "clotho_captions_evaluation.csv").write_text(text)
    path = checkpoint(frames=1000)
    done = run("evaluate.py", "--task", "clotho", "--data", folder, "--checkpoint", path)
    result = json.loads(path.with_name("clotho.json").read_text())["results"]["audio-text"]
    assert result["N"] == 6 and result["captions_per_clip"] == 5 and result["t2a_r10"] == 100.0
    assert "median rank" in done.stdout


def test_the_whole_line_from_pretraining_to_the_toys_table(run, pretrain_flags, world, tmp_path, small_clip):
    """pretrain.py's checkpoint is read by evaluate.py, with the chance level in the table."""
    run("pretrain.py", *flat(pretrain_flags | {"--epochs": 1}))
    done = run("evaluate.py", "--task", "toy", "--data", world, "--checkpoint", pretrain_flags["--out"] / "checkpoint.pt")
    results = json.loads((pretrain_flags["--out"] / "toy.json").read_text())
    assert results["results"]["audio-text"]["N"] == 24 and results["model"]["init"] == "clip"
    assert done.stdout.count("chance") == 3
    shutil.rmtree(pretrain_flags["--out"])
