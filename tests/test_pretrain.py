"""Banks, samples, checkpoints and the loop: killed is undisturbed, two ranks are one."""
import json
import shutil

import data
import numpy as np
import pretrain
import pytest
import torch
from conftest import kill, kill_at_random, run, small_pretraining


def test_an_array_in_chunk_files_is_made_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK", 10)
    made = []

    def make(start, end):
        made.append(start)
        yield np.arange(start, end)

    for _ in range(2):  # the second time nothing is left to do
        paths = pretrain.in_chunks(tmp_path, 25, make, "rows")
    assert made == [0, 10, 20] and len(list(tmp_path.iterdir())) == 3
    assert np.concatenate([pretrain.open_chunk(path) for path in paths]).tolist() == [*range(25)]
    paths[1].unlink()  # as a killed run leaves it
    pretrain.in_chunks(tmp_path, 25, make, "rows")
    assert made == [0, 10, 20, 10]


def test_what_cannot_be_read_is_a_row_of_zeros_and_is_never_drawn(tmp_path, capfd):
    def read(item):
        if item < 0:
            raise data.Unreadable(f"item {item}")
        return torch.tensor([float(item), 1.0])

    rows = np.concatenate(list(pretrain.embed([1, -2, 3], read, pretrain.unit, 2)))
    assert (rows[1] == 0).all() and np.allclose(np.linalg.norm(rows[[0, 2]], axis=1), 1)
    assert "skipped: item -2" in capfd.readouterr().err
    np.save(tmp_path / "0.npy", rows.astype(np.float16))
    bank = pretrain.Bank([tmp_path / "0.npy"], np.array([0, 1, 2, 1]), [3, 1])
    rng = np.random.default_rng(0)
    assert {round(bank.draw(0, rng)[0].item(), 1) for _ in range(20)} == {0.7, 0.9}
    with pytest.raises(data.Unreadable):
        bank.draw(1, rng)


class Numbers(pretrain.AudioSamples):
    """Samples that are their own number and a random one; those below `bad` can't be read."""

    def __init__(self, count, bad=0):
        self.paths, self.bad, self.seed = range(count), bad, 3

    def read(self, i, rng):
        if i < self.bad:
            raise data.Unreadable(f"clip {i}")
        return {"x": torch.tensor([float(i), rng.random()])}


def test_chance_follows_from_seed_epoch_and_clip_alone_and_the_next_clip_steps_in_for_a_bad_one():
    one, other = (Numbers(9) for _ in range(2))
    other[0, 1], other[5, 5]
    assert torch.equal(one[2, 7]["x"], other[2, 7]["x"])
    assert not torch.equal(one[2, 7]["x"], one[3, 7]["x"])
    sample = Numbers(9, bad=3)[0, 1]
    assert sample["x"][0] == 3 and sample["skipped"]
    with pytest.raises(ValueError, match="9 clips in a row can't be read; skipped: clip 3"):
        Numbers(9, bad=9)[0, 4]


def test_an_epoch_is_a_permutation_that_ranks_share_and_a_resumed_run_goes_on_in(monkeypatch):
    whole = list(pretrain.batches(10, 4, seed=1, start=0, steps=6))
    assert [len(batch) for batch in whole] == [4] * 6
    assert len({i for batch in whole[:2] for _, i in batch}) == 8
    assert list(pretrain.batches(10, 4, seed=1, start=3, steps=6)) == whole[3:]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(pretrain, "rank_and_size", lambda rank=rank: (rank, 2))
        parts.append(list(pretrain.batches(10, 4, seed=1, start=0, steps=6)))
    assert [one + other for one, other in zip(*parts)] == whole


def test_top1_counts_a_hit_by_label_set():
    v = torch.eye(4)
    clips = [data.Clip("", labels=labels) for labels in (("a", "b"), ("b", "a"), ("c",), ("a",))]
    hit, recall = pretrain.top1_hits(v[[1, 2, 2, 0]], v, clips)
    assert hit.tolist() == [1, 0, 1, 0] and recall.tolist() == [0.5, 0, 1, 0]


@pytest.fixture
def flags(world, small_clip, tmp_path):
    return small_pretraining(world, small_clip, tmp_path / "run")


def furthest(one, other):
    """The largest difference of two runs' parameters."""
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (one, other))
    assert one["step"] == other["step"] == 20
    one, other = one["learner"], other["learner"]
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_training_killed_at_random_moments_ends_as_undisturbed(checkpoint, flags, tmp_path):
    kill_at_random(("CLIP embeds", "| loss ", "| loss "), "pretrain.py", *flags)
    assert furthest(checkpoint.parent, tmp_path / "run") == 0


def test_two_ranks_are_one_and_a_run_goes_on_with_another_number(checkpoint, flags, tmp_path):
    assert kill("step 8 ", "pretrain.py", *flags, ranks=2)
    assert kill("step 14 ", "pretrain.py", *flags)
    run("pretrain.py", *flags, ranks=2)
    assert furthest(checkpoint.parent, tmp_path / "run") < 1e-5


def test_no_process_outlives_its_parent(flags):
    """Neither ranks torchrun nor workers their rank; left alone they would go on for long."""
    assert kill("clips/s", "pretrain.py", *flags, "--epochs", 500, ranks=2) < 3
    assert kill("clips/s", "pretrain.py", *flags, "--epochs", 500, ranks=2, signal=2) < 15


def test_a_data_folder_is_only_read_and_a_checkpoint_is_all_there_is_to_know(checkpoint, world):
    assert {path.name for path in world.iterdir()} == {
        "audio", "frames", "vocab.txt.gz", "ac.txt", "vc.txt", "fc.txt",
        *(f"{split}.jsonl" for split in ("pairs", "train", "val", "test", "gold"))}
    saved = torch.load(checkpoint, weights_only=True)
    assert {"encoder", "front_end", "learner", "clip", "settings"} <= saved.keys()
    first, *rows = map(json.loads, checkpoint.with_name("log.jsonl").read_text().splitlines())
    assert first["command"] and [r["epoch"] for r in rows if r["validation"]] == [1, 2, 3, 4, 5]


def test_a_damaged_checkpoint_another_stages_or_runs_is_refused(checkpoint, flags, tmp_path):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    for path, why in ((tmp_path / "bad.pt", "bad.pt"),
                      (checkpoint, "no head checkpoint.*of stage 'pretrain'")):
        with pytest.raises(ValueError, match=why):
            pretrain.load_checkpoint(path, ["head"])
    done = run("pretrain.py", *flags, "--out", checkpoint.parent, "--lr-weights", 4, check=False)
    assert done.returncode == 1 and "lr_weights was 5.0 and is 4.0" in done.stderr


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(flags, tmp_path):
    done = run("pretrain.py", *flags, "--lr-biases", 1e30, check=False)
    assert done.returncode == 1 and "weights diverge" in done.stderr
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("bad", [1, 12])
def test_more_than_ten_bad_clips_and_more_than_one_percent_stop_a_run(bad, world, flags, tmp_path):
    folder = shutil.copytree(world, tmp_path / "own")
    for i in range(bad):
        (folder / f"audio/train_{i}.wav").write_bytes(b"nothing")
    done = run("pretrain.py", *flags, "--data", folder, "--epochs", 1, check=False)
    assert "train_0.wav" in done.stderr and done.returncode == (bad > 10)
    assert ("more than ten" in done.stderr) == (bad > 10)


def test_a_bare_machine_is_told_what_to_do_once_and_not_once_a_rank(tmp_path):
    done = run("pretrain.py", ranks=2, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("pretrain.py: data/audioset: no such folder") == 1
    assert "pretrain.py --data toy" in done.stderr
