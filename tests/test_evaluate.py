"""Metrics by hand and against others' values; every task; one's own sounds; what is missing."""
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import data
import evaluate
import numpy as np
import pytest
import soundfile
import torch
from conftest import run, write, write_esc50
from sklearn.metrics import average_precision_score


@pytest.fixture
def evaluated(monkeypatch, capsys, tmp_path):
    """evaluate.py's main in this process -> what it prints, results; errors come as they are."""
    def call(task, *flags):
        argv = ["evaluate.py", "--task", task, "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(evaluate.Training, "workers", 0)
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capsys.readouterr()
        evaluate.main()
        path = tmp_path / "out" / f"{task}.json"
        results = json.loads(path.read_text())["results"] if path.exists() else None
        return capsys.readouterr(), results
    return call


def test_recall_by_hand():
    """Three clips, one caption each: clip 0 finds its own first, clip 1 second, clip 2 third."""
    captions = torch.tensor([[0.8, 0.5, 0.3], [0.1, 0.4, 0.6], [0.2, 0.9, 0.1]])
    found = evaluate.retrieval_metrics(torch.eye(3), captions, captions_per_clip=1)
    assert found["a2t_r1"] == pytest.approx(100 / 3) and found["a2t_median"] == 2
    captions = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    found = evaluate.retrieval_metrics(torch.eye(2), captions, captions_per_clip=2)
    assert found["a2t_r1"] == found["t2a_r1"] == 50  # the best of a clip's captions counts
    alike = evaluate.retrieval_metrics(torch.ones(20, 4), torch.ones(100, 4))
    assert alike["a2t_r1"] == alike["t2a_r1"] == 0  # a tie is lost


def test_recalls_are_the_authors(shared):
    golden = np.load(shared / "golden/retrieval.npz")
    found = evaluate.retrieval_metrics(*(torch.tensor(golden[k]) for k in ("audio", "captions")))
    for way, line in zip(("a2t", "t2a"), str(golden["report"]).splitlines()):
        for name, word in (("r1", "R@1"), ("r5", "R5"), ("r10", "R10"), ("median", "MED")):
            expected = float(line.split()[line.split().index(word) + 1])
            assert found[f"{way}_{name}"] == pytest.approx(expected, abs=1e-4)


def test_average_precision_is_scikit_learns_with_ties_and_nan_without_positives():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 12)).round(1)  # many ties
    target = rng.uniform(size=(300, 12)) < np.linspace(0, 0.9, 12)
    ours = evaluate.average_precision(torch.tensor(scores), torch.tensor(target))
    theirs = [average_precision_score(target[:, k], scores[:, k]) for k in range(1, 12)]
    assert ours[0].isnan() and ours[1:].tolist() == pytest.approx(theirs, abs=1e-6)


def test_pivotability_by_hand():
    """Image 0 leads to captions 0, 1, 2, 5, 6, image 1 to 5 … 9; both sounds are near image 0."""
    captions = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.0, 0.1], [0.0, 0.1],
                             [0.6, 0.9], [0.5, 0.8], [0.0, 0.7], [0.0, 0.6], [0.0, 0.5]])
    audio, images = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.eye(2)
    one, two = (evaluate.pivotability(audio, images, captions, k).tolist() for k in (1, 2))
    assert one == pytest.approx([3 / 5, 2 / 5]) and two == pytest.approx([3 / 5, 1])


def test_every_task_has_both_prompts_and_two_checkpoints_stand_side_by_side(
        evaluated, checkpoint, world, tmp_path):
    folder, two = shutil.copytree(world, tmp_path / "own"), shutil.copy(checkpoint, tmp_path)
    names = sorted({clip.labels[0] for clip in data.read_split("audioset", world)})
    rows = [f"{i},/m/{i},{name}" for i, name in enumerate(["nothing", *names])]
    write(folder / "class_labels_indices.csv", "\n".join(["index,mid,display_name", *rows]))
    write(folder / "eval_segments.csv", '#\n#\n#\nnot_on_disk, 0.000, 1.000, "/m/0"\n')
    said, results = evaluated("all", "--data", folder, "--checkpoint", checkpoint, two)
    assert f"{checkpoint.parent} {tmp_path} chance" in said.out  # and no column for the paper
    assert set(results) == {*evaluate.TASKS, "clotho 1 s", "clotho 1.8 s"} - {"clotho"}
    for part, result in results.items():
        prompts = {""} if part in ("va", "pivot") else set(evaluate.PROMPTS)
        assert result["clips"] == 24 and set(result["values"]) == prompts
    assert results["audiocaps"]["chance"]["a2t_r1"] == 100 / 24
    of_class = results["audioset"]["by class"]["prompt"]  # of those that have a clip
    assert results["audioset"]["missing"] == ["not_on_disk_0"] and set(of_class) == set(names)
    mean = results["audioset"]["values"]["prompt"]["map"]
    assert mean == pytest.approx(np.mean(list(of_class.values())))
    assert evaluate.PAPER["GC"]["audiocaps"]["no prompt"]["a2t_r10"] == 79.7
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    rows[3]["captions"].pop()
    write(folder / "test.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"captions.*5: 'test_23', 4: 'test_3'"):
        evaluated("audiocaps", "--data", folder, "--checkpoint", checkpoint)


def test_esc50_has_folds_and_classes_and_what_is_missing_is_said(evaluated, checkpoint, tmp_path):
    clips, noise = [], np.random.default_rng(0).uniform(-1, 1, 40_000)
    for i in range(10):
        clips.append((1 + i // 2, ("dog", "crackling_fire")[i % 2], True, noise[i * 999:][:8000]))
    write_esc50(tmp_path, 8000, clips)
    (tmp_path / "audio/0.wav").unlink()
    flags = ("--data", tmp_path, "--list-missing", tmp_path / "gone", "--checkpoint", checkpoint)
    said, results = evaluated("esc50", *flags)
    assert f"9 of 10 clips in {tmp_path} (looked for {tmp_path}/audio/0.wav" in said.out
    assert (tmp_path / "gone").read_text() == "0.wav\n"
    values, of = results["esc50"]["values"]["prompt"], results["esc50"]["by class"]["prompt"]
    right = 5 * of["crackling fire"] + 4 * of["dog"]
    assert right == pytest.approx(9 * values["accuracy"][0]) and "std_of_folds" in values


def test_two_ranks_tell_the_same_story_as_one(checkpoint, world, tmp_path):
    flags = ("--task", "toy", "--data", world, "--checkpoint", checkpoint, "--out", tmp_path)
    one, two = (run("evaluate.py", *flags, ranks=ranks).stdout for ranks in (1, 2))
    results = json.loads((tmp_path / "toy.json").read_text())["results"]
    number = results["audio-text"]["values"]["no prompt"]["a2t_r1"]
    assert one.splitlines()[-5:] == two.splitlines()[-5:]
    assert f"\nvip-AnT, audio -> text R@1: {evaluate.cell(number)} %\n" in one


def test_scaling_by_hand_and_a_curve(monkeypatch, evaluated, checkpoint, tmp_path, capsys):
    accuracy = {16: 20.0, 32: 30.0, 64: 40.0}
    monkeypatch.setattr(evaluate, "zero_shot", lambda model, *_: {
        "values": {"prompt": {"accuracy": [accuracy[model.pairs], 0, 0]}}})
    models = [SimpleNamespace(row="GC", pairs=pairs) for pairs in accuracy]
    evaluate.scaling(models, None, 90, tmp_path)
    assert "-20.0 + 10.00 · log2(pairs), R² 1.00, 90 % at 2^11.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--source gc --pairs N"):
        evaluate.scaling(models[:2], None, 90, tmp_path)
    said, _ = evaluated("curve", "--checkpoint", checkpoint)
    assert len(said.out.split("image->audio precision@1: ")[1].split("\n")[0].split()) == 5
    assert (tmp_path / "scaling.png").exists() and (tmp_path / "out/curve.png").exists()


def test_a_checkpoint_alone_searches_and_tags(evaluated, checkpoint, monkeypatch, tmp_path, capsys):
    noise = np.random.default_rng(0).uniform(-1, 1, 32_000)
    for name, wave in (("long", noise[:26_400]), ("short", noise[:4000]), ("silent", 0 * noise),
                       ("pause", noise * (abs(np.arange(32_000) - 16_000) > 8000))):
        soundfile.write(tmp_path / f"{name}.wav", wave, 8000)
    monkeypatch.chdir(tmp_path)
    flags = ("--checkpoint", shutil.copy(checkpoint, "alone.pt"), "--audio", tmp_path)
    done, _ = evaluated("search", *flags, "--query", "a hum", "--top", "9")
    answers = [line.split() for line in done.out.splitlines()[2:]]
    cosines = [float(cosine) for cosine, *_ in answers]
    assert cosines == sorted(cosines, reverse=True) and "silent.wav" in done.err
    starts = [(file, float(span.split("-")[0][2:])) for _, file, span in answers]
    for (file, start), (other, begin) in itertools.combinations(starts, 2):
        assert file != other or abs(start - begin) > 0.98  # they do not overlap
    (tmp_path / "silent.wav").unlink()
    monkeypatch.setattr(evaluate, "embed_windows", None)  # nothing is heard twice
    (lines, _), _ = evaluated("tag", *flags, "--labels", "Male speech, man speaking", "rain")
    write(tmp_path / "labels", "Male speech, man speaking\nrain\n")
    assert evaluated("tag", *flags, "--labels", "labels")[0].out == lines
    spans = [line.split()[1] for line in lines.splitlines() if "long.wav" in line]
    assert spans[0] == "0:00.0-0:01.0" and spans[-1] == "0:02.3-0:03.3" and len(spans) == 6
    assert "pause.wav 0:01.5-0:02.5   silent" in lines and lines.count("silent") == 3
    model = SimpleNamespace(scale=2.0, embed_texts=lambda labels, prompt: torch.eye(2))
    evaluate.tag(model, [("a.wav", 65.0, 75.0, torch.tensor([0.0, 1.0]))], ["dog", "rain"])
    assert capsys.readouterr().out == "a.wav 1:05.0-1:15.0   rain 88 %, dog 12 %\n"  # e² : 1
