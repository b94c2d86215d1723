"""Metrics by hand and against others' values; every task; one's own sounds; what is missing."""
import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import clip_load
import data
import evaluate
import numpy as np
import pretrain
import pytest
import soundfile
import torch
from sklearn.metrics import average_precision_score


@pytest.fixture
def checkpoint(small_clip, world, tmp_path):
    """Writes a checkpoint that hears `frames` of 10 ms, with random weights -> its path."""
    def write(name="run", frames=100):
        clip, path = clip_load.load_clip(small_clip), tmp_path / name / "checkpoint.pt"
        packed = clip_load.pack_clip(clip, clip_load.Tokenizer(world / "vocab.txt.gz", 16))
        encoder = clip_load.audio_encoder_from_clip(clip, frames, 32, (8, 8))
        front_end = data.FrontEnd(16_000, 32, frames, -3, 4)
        learner = pretrain.AudioLearner(encoder, front_end).state_dict()
        path.parent.mkdir(exist_ok=True)
        torch.save({"stage": "pretrain", "encoder": encoder.config, "front_end": asdict(front_end),
                    "learner": learner, "clip": packed, "settings": {"init": "clip"}}, path)
        return path
    return write


@pytest.fixture
def evaluated(monkeypatch, capsys):
    """evaluate.py's main in this process -> what it prints; errors come as they are."""
    def call(task, *flags):
        monkeypatch.setattr(evaluate, "WORKERS", 0)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--task", task, *map(str, flags)])
        capsys.readouterr()
        evaluate.main()
        return capsys.readouterr()
    return call


def results_of(path, task):
    return json.loads((path.parent / f"{task}.json").read_text())["results"]


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
        evaluated, checkpoint, world):
    one, two = checkpoint(), checkpoint("two")
    out = evaluated("all", "--data", world, "--checkpoint", one, two).out
    assert f"{one.parent} {two.parent} chance" in out  # and no column for the paper
    results = results_of(one, "all")
    assert set(results) == {*evaluate.TASKS, "clotho 1 s", "clotho 1.8 s"} - {"clotho"}
    for part, result in results.items():
        prompts = {""} if part in ("va", "pivot") else set(evaluate.PROMPTS)
        assert result["clips"] == 24 and set(result["values"]) == prompts
    chance = results["audiocaps"]["chance"]["a2t_r5"]  # 24 clips with 5 captions each
    assert chance == pytest.approx(100 * (1 - math.comb(115, 5) / math.comb(120, 5)))
    assert evaluate.paper_of("GC", "audiocaps")["no prompt"]["a2t_r10"] == 79.7
    assert evaluate.paper_of("AC", "audioset")["no prompt"] == {"map": 12.3}


def test_esc50_as_published_has_folds_classes_and_says_what_is_missing(
        evaluated, checkpoint, tmp_path):
    table = "filename,fold,target,category,esc10,src_file,take\n"
    for name in ("meta", "audio"):
        (tmp_path / name).mkdir()
    for fold, n in itertools.product(range(1, 6), range(2)):
        table += f"{fold}-{n}.wav,{fold},{n},{['dog', 'crackling_fire'][n]},True,1,A\n"
        noise = np.random.default_rng(fold).uniform(-1, 1, 40_000)
        soundfile.write(tmp_path / f"audio/{fold}-{n}.wav", noise, 8000)
    (tmp_path / "meta/esc50.csv").write_text(table)
    (tmp_path / "audio/1-0.wav").unlink()
    path, flags = checkpoint(frames=500), ("--data", tmp_path, "--list-missing", tmp_path / "gone")
    out = evaluated("esc50", *flags, "--checkpoint", path).out
    assert f"9 of 10 clips in {tmp_path} (looked for {tmp_path}/audio/1-0.wav" in out
    assert (tmp_path / "gone").read_text() == "1-0.wav\n"
    result = results_of(path, "esc50")["esc50"]
    values, (fire, dog) = result["values"]["prompt"], result["by class"]["prompt"].values()
    assert 5 * fire + 4 * dog == pytest.approx(9 * values["accuracy"][0])
    assert "std_of_folds" in values
    with pytest.raises(ValueError, match=r"hears 1.0 s, esc50 counts 5.0 s; .*--frames 500"):
        evaluated("esc50", *flags, "--checkpoint", checkpoint("short"))


def test_audiosets_map_is_over_the_classes_that_have_a_clip(evaluated, checkpoint, world, tmp_path):
    clips = data.read_split("audioset", world)
    names = sorted({clip.labels[0] for clip in clips})
    rows = [f"{i},/m/{i},{name}\n" for i, name in enumerate([*names, "nothing"])]
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "".join(rows))
    table = f'#\n#\n#\nclip_999999, 0.000, 1.000, "/m/{len(names)}"\n'  # is not on disk
    for i, clip in enumerate(clips):
        table += f'clip_{i:06d}, 0.000, 1.000, "/m/{names.index(clip.labels[0])}"\n'
        (tmp_path / f"clip_{i:06d}.wav").symlink_to(clip.audio)
    (tmp_path / "eval_segments.csv").write_text(table)
    evaluated("audioset", "--data", tmp_path, "--checkpoint", checkpoint())
    result = results_of(checkpoint(), "audioset")["audioset"]
    scores = result["by class"]["prompt"]
    assert result["missing"] == ["clip_999999_0"] and set(scores) == set(names)
    assert result["values"]["prompt"]["map"] == pytest.approx(np.mean(list(scores.values())))


def test_what_is_missing_or_does_not_fit_is_said(run, evaluated, checkpoint, world, tmp_path):
    done = run("evaluate.py", "--task", "clotho", check=False, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "evaluate.py: data/clotho: no such folder" in done.stderr and "zenodo" in done.stderr
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    rows[3]["captions"].pop()
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "audio").symlink_to(world / "audio")
    with pytest.raises(ValueError, match=r"captions.*5: 'test_23', 4: 'test_3'"):
        evaluated("audiocaps", "--data", tmp_path, "--checkpoint", checkpoint())


def test_two_ranks_tell_the_same_story_as_one(run, checkpoint, world):
    flags = ("--task", "toy", "--data", world, "--checkpoint", checkpoint())
    one, two = (run("evaluate.py", *flags, ranks=ranks).stdout for ranks in (1, 2))
    number = results_of(flags[-1], "toy")["audio-text"]["values"]["no prompt"]["a2t_r1"]
    assert one.splitlines()[-5:] == two.splitlines()[-5:]
    assert f"\nvip-AnT, audio -> text R@1: {evaluate.cell(number)} %\n" in one


def test_a_line_over_log2_pairs_by_hand_and_a_curve(monkeypatch, evaluated, tmp_path, capsys):
    accuracy = {16: 20.0, 32: 30.0, 64: 40.0}
    monkeypatch.setattr(evaluate, "zero_shot", lambda model, *_: {
        "values": {"prompt": {"accuracy": [accuracy[model.pairs], 0, 0]}}})
    models = [SimpleNamespace(row="GC", pairs=pairs) for pairs in accuracy]
    evaluate.scaling(models, None, 90, tmp_path)
    assert "-20.0 + 10.00 · log2(pairs), R² 1.00, 90 % at 2^11.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--source gc --pairs N"):
        evaluate.scaling(models[:2], None, 90, tmp_path)
    line = {"step": 4, "after": 1, "image->audio precision@1": 12.5}
    (tmp_path / "log.jsonl").write_text('{"step": 4, "loss": 3}\n' + json.dumps(line) + "\n")
    out = evaluated("curve", "--checkpoint", tmp_path / "checkpoint.pt").out
    assert "image->audio precision@1: 12.5" in out and len(list(tmp_path.glob("*.png"))) == 2


def test_a_checkpoint_alone_searches_and_tags(evaluated, checkpoint, monkeypatch, tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 32_000)
    for name, wave in (("long", noise[:26_400]), ("short", noise[:4000]), ("silent", 0 * noise),
                       ("pause", noise * (abs(np.arange(32_000) - 16_000) > 8000))):
        soundfile.write(tmp_path / f"{name}.wav", wave, 8000)
    monkeypatch.chdir(checkpoint().parent)
    flags = ("--checkpoint", "checkpoint.pt", "--audio", tmp_path)
    done = evaluated("search", *flags, "--query", "a hum", "--top", "9")
    answers = [line.split() for line in done.out.splitlines()[2:]]
    cosines = [float(cosine) for cosine, *_ in answers]
    assert cosines == sorted(cosines, reverse=True) and "silent.wav" in done.err
    starts = [(file, float(span.split("-")[0][2:])) for _, file, span in answers]
    for (file, start), (other, begin) in itertools.combinations(starts, 2):
        assert file != other or abs(start - begin) > 0.98  # they do not overlap
    (tmp_path / "silent.wav").unlink()
    monkeypatch.setattr(evaluate, "embed_windows", None)  # nothing is heard twice
    lines = evaluated("tag", *flags, "--labels", "Male speech, man speaking", "rain").out
    Path("labels").write_text("Male speech, man speaking\nrain\n")
    assert evaluated("tag", *flags, "--labels", "labels").out == lines
    spans = [line.split()[1] for line in lines.splitlines() if "long.wav" in line]
    assert spans[0] == "0:00.0-0:01.0" and spans[-1] == "0:02.3-0:03.3" and len(spans) == 6
    assert "pause.wav 0:01.5-0:02.5   silent" in lines and lines.count("silent") == 3


def test_tags_are_a_softmax_at_the_learned_temperature(capsys):
    model = SimpleNamespace(scale=2.0, embed_texts=lambda labels, prompt: torch.eye(2))
    evaluate.tag(model, [("a.wav", 65.0, 75.0, torch.tensor([0.0, 1.0]))], ["dog", "rain"])
    assert capsys.readouterr().out == "a.wav 1:05.0-1:15.0   rain 88 %, dog 12 %\n"  # e² : 1
