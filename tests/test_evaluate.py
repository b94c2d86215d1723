"""Metrics by hand and against the authors' values; tasks on files as published; a user's own sounds; pictures."""
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import flat, linked
from PIL import Image
from sklearn.metrics import average_precision_score

import evaluate
import listen
from clip_load import audio_encoder_from_clip, fingerprint, load_clip
from data import FrontEnd, Unreadable
from evaluate import (
    PROMPTS,
    Model,
    average_precision,
    chance_map,
    interval,
    line_fit,
    mean_average_precision,
    names_of,
    paper_of,
    pivotability,
    ranking,
    retrieval_metrics,
    zero_shot,
)
from listen import hear, windows
from readers import read_split
from train import save_checkpoint


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


def test_zero_shot_by_hand():
    audio = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0]])
    assert zero_shot(audio, torch.eye(2), torch.tensor([0, 1, 1])).tolist() == [1, 0, 1]


def test_average_precision_by_hand():
    """Class 0: positives at ranks 1 and 3 of 4, so (1/1 + 2/3) / 2. Class 1: all scores alike, so its share. Class 2: none."""
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.5, 0.3], [0.6, 0.5, 0.4]])
    target = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    precision = average_precision(*ranking(scores, target))
    assert precision[:2].tolist() == pytest.approx([5 / 6, 1 / 4]) and precision[2].isnan()
    value, _ = mean_average_precision(scores, target)
    assert value == pytest.approx(100 * (5 / 6 + 1 / 4) / 2)  # over the two classes that have a clip; no interval


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 12)).round(1)  # rounded: many ties
    target = rng.uniform(size=(300, 12)) < np.linspace(0.01, 0.9, 12)
    weights = rng.integers(0, 4, 300)
    ranks = ranking(torch.tensor(scores), torch.tensor(target))
    ours, weighted = average_precision(*ranks), average_precision(*ranks, torch.tensor(weights))
    for k in range(12):
        assert ours[k].item() == pytest.approx(average_precision_score(target[:, k], scores[:, k]), abs=1e-5)
        theirs = average_precision_score(target[:, k], scores[:, k], sample_weight=weights)
        assert weighted[k].item() == pytest.approx(theirs, abs=1e-5)


def test_the_chance_level_of_a_map_is_what_blind_scores_give():
    """Few positives: blind ranking gives more than their share."""
    target = torch.zeros(30, 2, dtype=torch.bool)
    target[:2, 0], target[:9, 1] = True, True
    blind = np.mean([average_precision(*ranking(torch.rand(30, 2), target)).mean().item() for _ in range(3000)])
    assert chance_map(target) == pytest.approx(100 * blind, rel=0.04) and chance_map(target) > 100 * (2 + 9) / 60


def test_pivotability_by_hand():
    """Two clips, two images, ten captions on a line. Image 0 leads to captions 0, 1, 2, 5, 6, image 1 to 5 … 9."""
    images = torch.eye(2)
    captions = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.0, 0.1], [0.0, 0.1],
                             [0.6, 0.9], [0.5, 0.8], [0.0, 0.7], [0.0, 0.6], [0.0, 0.5]])
    audio = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # both nearest to image 0
    assert pivotability(audio, images, captions, 1).tolist() == pytest.approx([3 / 5, 2 / 5])
    assert pivotability(audio, images, captions, 2).tolist() == pytest.approx([3 / 5, 1])  # 5 and 6 found twice, counted once
    assert pivotability(images[:1], images[:1], captions[:2], 5, captions_per_clip=2).tolist() == [1]  # fewer than five


def test_interval_by_hand():
    """Resampled by hand from the same draws; and of 400 fair coins it is 50 ± 1.96·√(0.25/400)."""
    values = torch.tensor([1.0, 0.0, 0.0, 1.0])
    drawn = torch.randint(4, (1000, 4), generator=torch.Generator().manual_seed(0))
    by_hand = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    assert interval(values) == pytest.approx([50, *(100 * by_hand)])
    mean, low, high = interval(torch.arange(400) % 2)
    assert mean == 50 and low == pytest.approx(50 - 4.9, abs=0.7) and high == pytest.approx(50 + 4.9, abs=0.7)
    assert interval(torch.ones(7)) == pytest.approx([100, 100, 100])


def test_the_interval_of_a_map_covers_the_truth():
    """The mAP of 50,000 clips lies within nearly every interval that 2,000 of them give; resampled mAPs lie above it."""
    def world(clips, seed):
        rng = np.random.default_rng(seed)
        target = torch.tensor(rng.uniform(size=(clips, 20)) < 0.02)
        return torch.tensor(rng.normal(size=(clips, 20))) + 1.5 * target, target

    truth = 100 * average_precision(*ranking(*world(50_000, 99))).mean().item()
    intervals = [mean_average_precision(*world(2000, seed))[0] for seed in range(10)]
    assert all(low < value < high for value, low, high in intervals)
    assert sum(low <= truth <= high for _, low, high in intervals) >= 8  # a plain percentile interval: about 2


def test_a_line_through_points_and_where_it_meets_a_target():
    slope, intercept, at, (low, high) = line_fit([1, 2, 3, 4], [15, 20, 25, 30], target=81)
    assert (slope, intercept, at) == pytest.approx((5, 10, 14.2)) and low == pytest.approx(14.2) == high
    assert line_fit([1, 2, 3], [3, 2, 1], 81)[2] == float("inf")  # a falling line never gets there


def test_the_extrapolations_interval_holds_the_truth_as_often_as_it_says():
    rng, x = np.random.default_rng(0), np.arange(5, 12)
    held = []
    for _ in range(200):
        _, _, _, (low, high) = line_fit(x, 10 + 5 * x + rng.normal(size=7), target=81, draws=1000)
        held.append(low <= 14.2 <= high)
    assert 0.88 <= np.mean(held) <= 0.99


def test_what_the_paper_reports():
    assert paper_of("+AT GC", "audiocaps") == {"no prompt": {"t2a_r1": 27.7, "t2a_r10": 78.0, "a2t_r1": 34.3, "a2t_r10": 79.7}}
    assert paper_of("vip-AnT", "clotho 10 s")["no prompt"]["a2t_r10"] == 23.7
    assert paper_of("vip-AnT", "esc50") == {"prompt": {"accuracy": 57.1}, "no prompt": {"accuracy": 49.9}}
    assert paper_of("vip-AnT", "va") == {}


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
            "learner": {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()}
                       | {"log_scale": torch.tensor(3.0)},
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
    done = run("evaluate.py", "--task", "esc50", "--data", esc, "--checkpoint", path,
               "--list-missing", path.parent / "missing.txt")
    saved = json.loads(path.with_name("model_500.esc50.json").read_text())
    result, missing = saved["results"]["esc50"], path.parent / "missing.txt"
    assert result["protocol"]["N"] == 9 and result["protocol"]["missing"] == ["1-0-A-0.wav"]
    assert result["chance"] == {"accuracy": 50} and saved["model"]["weights"] and missing.read_text() == "1-0-A-0.wav\n"
    value, low, high = result["values"]["no prompt"]["accuracy"]
    assert low <= value <= high and f"{value:.1f} [{low:.1f}, {high:.1f}]" in done.stdout
    folds, classes = result["by fold"]["prompt"], result["by class"]["prompt"]
    assert len(folds) == 5 and f"{np.mean(folds):.1f} ± {np.std(folds, ddof=1):.1f}" in done.stdout
    assert 4 * classes["dog"] + 5 * classes["crackling fire"] == pytest.approx(9 * result["values"]["prompt"]["accuracy"][0])
    assert "paper" not in done.stdout  # two classes are not the paper's fifty
    with Image.open(path.with_name("model_500.esc50_classes.png")) as chart:
        assert chart.width > 300


def test_esc50_does_not_depend_on_rank_count(run, checkpoint, esc):
    path, results = checkpoint(frames=500), []
    for ranks in (1, 2):
        run("evaluate.py", "--task", "esc50", "--data", esc, "--checkpoint", path, ranks=ranks)
        results.append(json.loads(path.with_name("model_500.esc50.json").read_text())["results"])
    assert results[0] == results[1]


def test_the_400_real_recordings(run, checkpoint, shared):
    """Every recording is heard, in its fold, by an encoder with the paper's front end (and random weights)."""
    path = checkpoint(sample_rate=44_100, mels=128, frames=1000)
    run("evaluate.py", "--task", "esc50", "--data", shared / "data/esc10", "--checkpoint", path)
    result = json.loads(path.with_name("model_1000.esc50.json").read_text())["results"]["esc50"]
    assert result["protocol"]["N"] == 400 and result["protocol"]["unreadable"] == 0
    assert result["protocol"]["classes"] == 10 and result["chance"] == {"accuracy": 10}
    assert len(result["by fold"]["prompt"]) == 5


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


def test_a_bare_machine_gets_one_clear_message(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("evaluate.py", "--task", "toy", check=False)
    assert done.returncode == 1 and "data/toy: no such folder" in done.stderr and "Traceback" not in done.stderr


def test_clotho_is_measured_at_10_and_18_seconds_beside_the_papers_numbers(run, checkpoint, tmp_path):
    folder = tmp_path / "clotho"
    (folder / "evaluation").mkdir(parents=True)
    rng, text = np.random.default_rng(0), "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
    for i in range(6):
        soundfile.write(folder / f"evaluation/{i}.wav", rng.uniform(-1, 1, 16 * 8000), 8000)
        text += f"{i}.wav," + ",".join(f"a deep hum {i} {j}" for j in range(5)) + "\n"
    (folder / "clotho_captions_evaluation.csv").write_text(text)
    path = checkpoint(frames=1000)
    done = run("evaluate.py", "--task", "clotho", "--data", folder, "--checkpoint", path)
    results = json.loads(path.with_name("model_1000.clotho.json").read_text())["results"]
    assert list(results) == ["clotho 10 s", "clotho 18 s"]
    assert [result["protocol"]["seconds"] for result in results.values()] == [10, 18]
    for result in results.values():
        assert result["protocol"]["N"] == 6 and result["protocol"]["captions a clip"] == 5
        assert set(result["values"]) == {"prompt", "no prompt"}
    assert "median rank" in done.stdout and "23.7" in done.stdout and "25.6" in done.stdout  # the paper's at 10 and 18 s


def test_the_whole_line_from_pretraining_to_the_toys_table(run, pretrain_flags, world, tmp_path, small_clip):
    """pretrain.py's checkpoint is read by evaluate.py, with the chance level in the table."""
    run("pretrain.py", *flat(pretrain_flags | {"--epochs": 1, "--frames": 100}))
    done = run("evaluate.py", "--task", "toy", "--data", world, "--checkpoint", pretrain_flags["--out"] / "checkpoint.pt")
    results = json.loads((pretrain_flags["--out"] / "toy.json").read_text())
    assert results["results"]["audio-text"]["protocol"]["N"] == 24 and results["model"]["init"] == "clip"
    assert done.stdout.count("chance") == 3


def test_every_task_on_one_folder_and_two_checkpoints_side_by_side(run, checkpoint, world, tmp_path):
    """All tasks read an index too; what two models give stands in one table, and in a JSON each."""
    one, two = checkpoint(frames=100), checkpoint(frames=120)
    done = run("evaluate.py", "--task", "all", "--data", world, "--compare", one, two)
    results = json.loads(one.with_name("model_100.all.json").read_text())
    assert list(results["results"]) == ["audiocaps", "clotho 1 s", "clotho 1.8 s", "esc50", "us8k", "audioset", "va",
                                        "oracle", "pivot"] and not results["not measured"]
    table = done.stdout[done.stdout.rindex("  %"):]
    assert "model_100" in table and "model_120" in table and "paper" not in table  # the toy is in no paper
    assert "clotho 1.8 s, audio -> text R@1" in table and "clotho 1.2 s" in table
    oracle = [json.loads(path.with_name(f"{path.stem}.all.json").read_text())["results"]["oracle"] for path in (one, two)]
    assert oracle[0] == oracle[1]  # frames stand for sounds, so the encoder does not matter
    categories = results["results"]["pivot"]["categories"]
    pivotable = results["results"]["pivot"]["values"][""]["pivotable"][0]
    assert sum(categories.values()) == round(pivotable * 24 / 100)  # each toy clip has one label


def test_names_of_checkpoints_differ():
    paths = ["out/a/pretrain/checkpoint.pt", "out/b/pretrain/checkpoint.pt", "out/ac.pt", "out/toy/ac.pt"]
    assert names_of(map(Path, paths)) == ["pretrain", "out/b/pretrain/checkpoint.pt", "ac", "out/toy/ac.pt"]


def test_checkpoints_of_one_name_have_a_result_each_in_one_folder(run, checkpoint, world, tmp_path):
    one, two = checkpoint(), tmp_path / "other/model_100.pt"
    two.parent.mkdir()
    shutil.copy(one, two)
    run("evaluate.py", "--task", "va", "--data", world, "--compare", one, two, "--out", tmp_path / "results")
    saved = [json.loads(path.read_text())["model"]["checkpoint"] for path in (tmp_path / "results").glob("*.va.json")]
    assert sorted(saved) == sorted([str(one), str(two)])


def test_all_measures_what_is_on_disk_and_says_what_is_not(run, checkpoint, esc, tmp_path, monkeypatch):
    path = checkpoint(frames=1000)
    (tmp_path / "there/data").mkdir(parents=True)
    esc.rename(tmp_path / "there/data/esc50")
    (tmp_path / "there/data/audiocaps").mkdir()
    (tmp_path / "there/data/audiocaps/test.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n1,clip_000000,30,a dog\n")
    monkeypatch.chdir(tmp_path / "there")
    done = run("evaluate.py", "--task", "all", "--checkpoint", path, "--list-missing", "missing.txt")
    assert Path("missing.txt").read_text().split() == ["1-0-A-0.wav", "clip_000000_30"]
    saved = json.loads(path.with_name("model_1000.all.json").read_text())
    assert list(saved["results"]) == ["esc50"] and len(saved["not measured"]) == 7
    assert "clotho: not measured. data/clotho: no such folder. Clotho: download" in done.stdout
    assert "esc50, accuracy, prompt" in done.stdout


def test_clips_with_different_numbers_of_captions_are_refused(run, checkpoint, world, tmp_path):
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    rows[3]["captions"].pop()
    (linked(world, tmp_path / "own") / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("evaluate.py", "--task", "audiocaps", "--data", tmp_path / "own", "--checkpoint", checkpoint(), check=False)
    assert done.returncode == 1 and "clip test_3 has 4 captions, clip test_0 has 5" in done.stderr


def test_audioset_as_published_is_scored_over_its_classes(run, checkpoint, tmp_path):
    """Four classes, one of them without a clip; a clip counts for each of its labels; one clip is missing."""
    folder, rng, ids = tmp_path / "audioset", np.random.default_rng(0), [f"clip_{i:06d}" for i in range(5)]
    folder.mkdir()
    (folder / "class_labels_indices.csv").write_text(
        "index,mid,display_name\n" + "".join(f'{i},/m/{i},"thing {i}"\n' for i in range(4)))
    labels = ["/m/0", "/m/0,/m/1", "/m/1", "/m/2", "/m/3"]
    (folder / "eval_segments.csv").write_text("#\n#\n# YTID\n" + "".join(
        f'{name}, 0.000, 10.000, "{label}"\n' for name, label in zip(ids, labels)))
    for name in ids[:4]:
        soundfile.write(folder / f"{name}.wav", rng.uniform(-1, 1, 10 * 8000), 8000)
    path = checkpoint(frames=1000)
    run("evaluate.py", "--task", "audioset", "--data", folder, "--checkpoint", path)
    result = json.loads(path.with_name("model_1000.audioset.json").read_text())["results"]["audioset"]
    assert result["protocol"]["N"] == 4 and result["protocol"]["missing"] == ["clip_000004_0"]
    assert result["protocol"]["classes"] == 4 and result["protocol"]["classes without a clip"] == 1
    by_class = result["by class"]["no prompt"]
    assert set(by_class) == {"thing 0", "thing 1", "thing 2"}
    assert result["values"]["no prompt"]["map"] == pytest.approx(np.mean(list(by_class.values())))
    (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,thing\n")
    done = run("evaluate.py", "--task", "audioset", "--data", folder, "--checkpoint", path, check=False)
    assert done.returncode == 1 and "label '/m/1' is not in class_labels_indices.csv" in done.stderr


def test_an_extracted_dataset_says_what_the_table_lists_and_disk_lacks(run, checkpoint, world, tmp_path):
    """Of four clips in the table one was not found and one has no pictures: the first is missing, in `va` both are."""
    rows = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()[:3]]
    ids = [f"clip_{i:06d}" for i in range(4)]
    for row, name in zip(rows, ids):
        row |= {"id": f"{name}_0"}
    del rows[1]["frames"]
    folder = linked(world, tmp_path / "audioset")
    for split, table in (("test", "eval_segments"), ("val", "balanced_train_segments")):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{table}.csv").write_text("#\n#\n#\n" + "".join(f'{name}, 0.0, 10.0, "/m/0"\n' for name in ids))
    path = checkpoint()
    for task, missing in (("audioset", ["clip_000003_0"]), ("va", ["clip_000001_0", "clip_000003_0"])):
        done = run("evaluate.py", "--task", task, "--data", folder, "--checkpoint", path, "--list-missing",
                   tmp_path / "list.txt")
        assert f"{4 - len(missing)} of 4 clips" in done.stdout
        assert (tmp_path / "list.txt").read_text().split() == missing
    for row in rows:
        row["audio"] += ".gone"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("evaluate.py", "--task", "audioset", "--data", folder, "--checkpoint", path, "--list-missing",
               tmp_path / "list.txt", check=False)
    assert done.returncode == 1 and len((tmp_path / "list.txt").read_text().split()) == 4


def test_broken_weights_and_broken_checkpoints_are_refused(run, checkpoint, world, tmp_path):
    good, bad = checkpoint(frames=100), checkpoint(frames=120)
    content = torch.load(bad, weights_only=True)
    content["learner"]["audio_encoder.proj"][0, 0] = float("nan")
    torch.save(content, bad)
    done = run("evaluate.py", "--task", "va", "--data", world, "--checkpoint", bad, check=False)
    assert done.returncode == 1 and "an embedding is not finite" in done.stderr
    torch.save({"stage": "pretrain"}, bad)
    done = run("evaluate.py", "--task", "va", "--data", world, "--compare", good, bad, check=False)
    assert done.returncode == 1 and "model_120.pt: not a whole checkpoint" in done.stderr
    assert not good.with_name("model_100.va.json").exists()  # said before anything is measured


def test_all_in_the_wrong_place_overwrites_nothing(run, checkpoint, tmp_path, monkeypatch):
    path = checkpoint()
    path.with_name("model_100.all.json").write_text("earlier results")
    monkeypatch.chdir(tmp_path)
    done = run("evaluate.py", "--task", "all", "--checkpoint", path, check=False)
    assert done.returncode == 1 and "no task could run here" in done.stderr
    assert path.with_name("model_100.all.json").read_text() == "earlier results"


def test_the_tables_numbers_are_those_of_the_metric_and_chance_is_counted(checkpoint, world):
    model, clips = Model(checkpoint(), workers=0), read_split("audiocaps", world)
    result, texts = evaluate.retrieval(model, "audiocaps", world), [caption for clip in clips for caption in clip.captions]
    audio, _ = model.embed("audio", [clip.audio for clip in clips])
    for variant, prompt in PROMPTS.items():
        found = {name: value[0] if isinstance(value, list) else value for name, value in result["values"][variant].items()}
        assert found == pytest.approx(retrieval_metrics(audio, model.texts(texts, prompt)))
    assert result["chance"]["a2t_r5"] == pytest.approx(100 * (1 - math.comb(115, 5) / math.comb(120, 5)))  # 24 clips
    assert result["chance"]["t2a_r10"] == pytest.approx(100 * 10 / 24)


def test_images_find_sounds_and_sounds_find_images(world):
    """Every sound is nearest to image 0, yet each image's nearest sound is its own."""
    images, audio = torch.eye(24), 0.5 * torch.eye(24)
    audio[:, 0] += 1
    known = {"audio": torch.nn.functional.normalize(audio, dim=1), "frames": images}
    ear = SimpleNamespace(path="x.pt", missing=set(), front_end=FrontEnd(16_000, 32, 100),
                          embed=lambda kind, items: (known[kind], torch.ones(24, dtype=torch.bool)))
    values = evaluate.image_audio(ear, world)["values"][""]
    assert values["i2a_precision"][0] > 90 and values["a2i_precision"][0] < 50


def test_accuracy_by_pairs_averages_seeds_and_is_drawn_over_log2(monkeypatch, tmp_path, capsys):
    def model(pairs, accuracy=0, source="gc"):
        return SimpleNamespace(path="a.pt", source=source, pairs=pairs, accuracy=accuracy)

    monkeypatch.setattr(evaluate, "classification",
                        lambda model, *_: {"values": {"prompt": {"accuracy": [model.accuracy, 0, 0]}}})
    measured = evaluate.accuracy_by_pairs([model(64, 40), model(16, 10), model(16, 30), model(32, 30)], None)
    assert list(measured.items()) == [(16, 20), (32, 30), (64, 40)]
    found = evaluate.scaling(measured, 90, tmp_path / "scaling.png")
    assert (found["slope"], found["log2 pairs at target"]) == pytest.approx((10, 11))
    assert (tmp_path / "scaling.png").stat().st_size and "20.0" in capsys.readouterr().out
    for models, said in (([model(16), model(32)], "at least 3"), ([model(16, source="ac")], "was fine-tuned on ac")):
        with pytest.raises(ValueError, match=said):
            evaluate.accuracy_by_pairs(models, None)


def test_a_curve_is_drawn_from_the_log_beside_a_checkpoint(run, tmp_path):
    lines = [{"step": 4, "epoch": 1.0, "loss": 3}, {"step": 4, "epoch": 1, "image->audio precision@1": 12.5},
             {"step": 8, "epoch": 2, "image->audio precision@1": 25.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '5\n{"step": 9, "epo')
    done = run("evaluate.py", "--task", "curve", "--checkpoint", tmp_path / "checkpoint.pt")
    assert "image->audio precision@1 by epoch: 12.5 25.0" in done.stdout and (tmp_path / "curve.png").stat().st_size


# ---------------------------------------------------------------------------- a user's own sounds

@pytest.fixture
def recordings(tmp_path):
    """A folder of recordings: 3.3 s, one shorter than a window, one silent in between, and two that are none."""
    folder, rng = tmp_path / "recordings", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "long.wav", rng.uniform(-1, 1, 26_400), 8000)
    soundfile.write(folder / "deep/short.flac", rng.uniform(-1, 1, 4000), 8000)
    soundfile.write(folder / "pause.wav", rng.uniform(-1, 1, 24_000) * (np.arange(24_000) // 8000 != 1), 8000)
    (folder / "broken.wav").write_text("not a sound")
    (folder / "notes.txt").write_text("not a sound either")
    return folder


def test_windows_overlap_by_half_and_the_last_ends_with_the_recording(recordings):
    assert windows(recordings / "long.wav", 1.0) == pytest.approx([0, 0.5, 1, 1.5, 2, 2.3])
    assert windows(recordings / "deep/short.flac", 1.0) == [0.0]
    for path in (recordings / "broken.wav", os.fsdecode(b"name\xff.wav")):
        with pytest.raises(Unreadable, match="can't be read as audio"):
            windows(path, 1.0)


def test_search_answers_with_file_and_time_and_hears_each_file_once(run, checkpoint, recordings):
    command = ("evaluate.py", "--task", "search", "--audio", recordings, "--query", "a deep hum", "glass, breaking",
               "--checkpoint", checkpoint(), "--top", "9")
    first = run(*command)
    assert "skipped: " in first.stderr and "broken.wav" in first.stderr and "notes.txt" not in first.stderr
    for query in ("a deep hum", "glass, breaking"):
        answers = [line.split() for line in first.stdout.split(f"\n{query}\n")[1].split("\n\n")[0].splitlines()]
        cosines = [float(cosine) for cosine, *_ in answers]
        assert cosines == sorted(cosines, reverse=True) and all(path.startswith(str(recordings)) for *_, path in answers)
        assert len(answers) >= 5
        places = [(path, float(span.split("-")[0].removeprefix("0:"))) for _, span, path in answers]
        assert all(a[0] != b[0] or abs(a[1] - b[1]) > 0.99 for a, b in itertools.combinations(places, 2))  # none overlap
    kept = {path: path.stat().st_mtime_ns for path in (recordings.parent / "heard").iterdir()}
    assert len(kept) == 3
    assert run(*command).stdout == first.stdout
    assert kept == {path: path.stat().st_mtime_ns for path in (recordings.parent / "heard").iterdir()}
    soundfile.write(recordings / "deep/short.flac", np.random.default_rng(1).uniform(-1, 1, 4000), 8000)
    assert run(*command).stdout != first.stdout  # a file that changed is heard anew


def test_the_window_that_sounds_is_found_where_it_is(recordings, checkpoint):
    """An embedding of a stretch of the long file, as a query, leads to that stretch and file."""
    model = Model(checkpoint())
    heard = {os.path.basename(path): (starts, rows) for path, starts, rows in
             hear(model, [str(recordings / name) for name in ("long.wav", "deep/short.flac", "pause.wav")],
                  recordings.parent / "heard")}
    starts, rows = heard["long.wav"]
    wave, length = model.front_end.load(recordings / "long.wav", 1.5)
    alone = model.encoder(model.front_end(wave[None], torch.tensor([length])))
    assert starts[(rows @ alone[0]).argmax()] == 1.5 and rows.shape == (6, 32)
    assert len(heard["pause.wav"][0]) == 5  # its silent second included


def test_tag_gives_shares_of_the_labels(run, checkpoint, recordings):
    done = run("evaluate.py", "--task", "tag", "--audio", recordings / "long.wav", "--labels", "dog, rain ,car horn",
               "--checkpoint", checkpoint())
    lines = [line for line in done.stdout.splitlines() if "%" in line]
    assert len(lines) == 6 and lines[-1].startswith("  0:02.3-0:03.3")
    for line in lines:
        shares = re.findall(r"(dog|rain|car horn) (\d+) %", line)
        assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=1) and len(shares) == 3


def test_tag_by_hand(monkeypatch, capsys):
    """Cosines 1 and 0 at a temperature of 1/2 are e² to 1: 88 and 12 %."""
    ear = SimpleNamespace(front_end=SimpleNamespace(seconds=10.0), log_scale=math.log(2),
                          texts=lambda labels, prompt: torch.eye(2))
    monkeypatch.setattr(listen, "hear", lambda *_: [("a.wav", [0.0, 65.0], torch.eye(2))])
    listen.tag(ear, ["a.wav"], ["dog", "rain"], "the sound of", None)
    assert capsys.readouterr().out.splitlines()[2:] == ["  0:00.0-0:10.0   dog 88 %, rain 12 %",
                                                        "  1:05.0-1:15.0   rain 88 %, dog 12 %"]


def test_search_without_sounds_or_words_says_so(run, checkpoint, tmp_path):
    done = run("evaluate.py", "--task", "search", "--audio", tmp_path, check=False)
    assert done.returncode == 2 and "--task search needs --audio and --query" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run("evaluate.py", "--task", "search", "--audio", tmp_path / "empty", "--query", "x", "--checkpoint",
               checkpoint(), check=False)
    assert done.returncode == 1 and "no audio file in it" in done.stderr


def test_pictures_are_drawn_of_a_checkpoint_that_has_no_log(run, world, checkpoint, tmp_path):
    run("figures.py", "--data", world, "--checkpoint", checkpoint(), "--out", tmp_path / "drawn", "--clips", 24)
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "idea.png", "spectrogram.png", "grid.png", "similarity.png", "retrieval.png"}
