"""Mining is a sort, a clip's captions a union; what was made before a kill is kept."""
import json
from pathlib import Path

import curate
import numpy as np
import pretrain
import pytest
import tokenizers
import torch
import transformers

CPU = torch.device("cpu")


@pytest.fixture
def banks(tmp_path, monkeypatch):
    """A Bank of 45 frames, 64 captions' chunk files, and all their cosines (45, 64)."""
    rows = []
    for name, count in (("frames", 45), ("texts", 64)):
        x = np.random.default_rng(count).normal(size=(count, 16))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        if name == "frames":
            x[3] = 0  # can't be read
        (tmp_path / name).mkdir()
        for start in range(0, count, 10):
            np.save(tmp_path / name / f"{start:09d}.npy", x[start:start + 10])
        rows.append(x.astype(np.float32))
    for module in (pretrain, curate):
        monkeypatch.setattr(module, "CHUNK", 10)
    paths, texts = (sorted((tmp_path / name).iterdir()) for name in ("frames", "texts"))
    return pretrain.Bank(paths, np.arange(45), np.arange(0, 46, 5)), texts, rows[0] @ rows[1].T


def test_mining_is_a_sort_and_keeps_what_a_killed_run_has_made(banks, monkeypatch):
    frames, texts, cosines = banks
    found, readable = curate.mine(frames, texts, 7, CPU), np.arange(45) != 3
    assert (found["caption"] == np.argsort(-cosines)[:, :7])[readable].all()
    assert np.allclose(found["cosine"][readable], -np.sort(-cosines)[readable, :7], atol=1e-6)
    assert curate.union(found[3], -1.0) == {}  # who can't be read picks nothing
    chunks = sorted(frames.paths[0].parent.parent.glob("mined-*/*"))
    for path in chunks[2:]:
        path.unlink()
    assert curate.mine(frames, texts, 7, CPU).tobytes() == found.tobytes()
    monkeypatch.delattr(curate, "nearest")  # with all chunks there is nothing left to do
    assert len(chunks) == 5 and curate.mine(frames, texts, 7, CPU).tobytes() == found.tobytes()


def test_a_clips_captions_are_the_union_over_its_frames():
    found = np.zeros((2, 3), curate.FOUND)
    found["cosine"] = [[0.5, 0.375, 0.25], [0.4375, 0.3125, 0.125]]
    found["caption"] = [[9, 5, 2], [5, 1, 8]]
    best = {9: 0.5, 5: 0.4375, 1: 0.3125, 2: 0.25, 8: 0.125}  # 5 twice: its better cosine counts
    assert list(curate.union(found, -1.0).items()) == list(best.items())
    assert list(curate.union(found, 0.3)) == [9, 5, 1]


def test_mined_captions_are_those_that_clip_likes_best_and_two_ranks_are_one(
        run, world, small_clip, tmp_path, capsys):
    vocab = str(world / "vocab.txt.gz")
    curate.curate(curate.Settings("ac", str(world), str(tmp_path / "one"), str(small_clip), vocab,
                                  leave_out="none", preview=3), CPU)
    text, printed = (tmp_path / "one/ac.jsonl").read_text(), capsys.readouterr().out
    rows = [json.loads(line) for line in text.splitlines()]
    pairs = sum(len(row["captions"]) for row in rows)
    assert f"64 of 64 clips with captions, {pairs} pairs (paper: 1080078)" in printed
    assert (tmp_path / "one/ac.png").exists() and rows[0].keys() == {"id", "captions", "scores"}
    frames, texts = (np.load(next((tmp_path / "one/banks").glob(f"{kind}-*/*"))).astype(np.float32)
                     for kind in ("frames", "texts"))
    cosines = (frames[:4] @ texts.T).max(axis=0)  # of the first clip's frames
    assert rows[0]["captions"][0] == curate.caption_pool("ac", world, world)[cosines.argmax()]
    assert rows[0]["scores"][0] == pytest.approx(cosines.max(), abs=1e-4)
    driver = tmp_path / "driver.py"  # six chunks for two ranks
    driver.write_text(f"import sys; sys.path.insert(0, {str(Path(curate.__file__).parent)!r})\n"
                      "import curate, pretrain; curate.CHUNK = pretrain.CHUNK = 50; curate.main()")
    run(driver, "--source", "ac", "--data", world, "--clip", small_clip, "--vocab", vocab,
        "--leave-out", "none", "--out", tmp_path / "two", ranks=2)
    assert (tmp_path / "two/ac.jsonl").read_text() == text


def test_gold_clips_come_with_their_captions_with_labels_or_with_random_captions(world, tmp_path):
    gold, found = curate.gold_clips(world), {}
    for source in ("gc", "gl", "rc"):
        clips, row = curate.gold_pairs(source, world, seed=0)
        found[source] = [tuple(row(i)["captions"]) for i in range(len(clips))]
    assert found["gc"] == [c.captions for c in gold] and found["gl"] == [c.labels for c in gold]
    assert set(found["rc"]) <= set(found["gc"])
    assert np.mean([one == other for one, other in zip(found["rc"], found["gc"])]) < 0.2
    with pytest.raises(FileNotFoundError, match="python curate.py generate"):
        curate.caption_pool("fc", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="lower --threshold"):
        curate.write_pairs(tmp_path / "ac.jsonl", gold, lambda i: {"captions": []})


def test_a_language_model_goes_on_with_the_same_captions(tmp_path, monkeypatch):
    words = {word: i for i, word in enumerate("<unk> <end> - \n a dog cat runs on two".split(" "))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\n|[^ \n]+"), "removed", invert=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                         eos_token="<end>").save_pretrained(tmp_path / "model")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(  # random weights babble
        vocab_size=10, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=1)).save_pretrained(tmp_path / "model")
    (tmp_path / "vc.txt").write_text("a dog runs\ntwo cats sleep\n")
    monkeypatch.setattr(pretrain, "CHUNK", 4)
    settings, texts = curate.Settings(data=str(tmp_path), out=str(tmp_path), prompts=10,
                                      model=str(tmp_path / "model")), []
    for _ in range(2):
        curate.generate(settings, CPU)
        texts.append((tmp_path / "fc.txt").read_text())
        for path in sorted(tmp_path.glob("fc-*/*"))[1:]:  # as a killed run leaves them
            path.unlink()
    captions = texts[0].splitlines()
    assert texts[0] == texts[1] and len(set(captions)) == len(captions) > 5
    assert all(3 <= len(line.split()) <= 40 and line != "a dog runs" for line in captions)
