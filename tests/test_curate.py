"""Mining is a sort, a clip's captions a union; what was made before a kill is kept."""
import json

import curate
import numpy as np
import pretrain
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, kill_at_random, run
from data import read_split

CPU = torch.device("cpu")


def test_mining_is_a_sort_and_a_clips_captions_the_union_over_its_frames(tmp_path, monkeypatch):
    """45 frames, of which number 3 can't be read, pick of 64 captions; ten are a chunk file."""
    for module in (pretrain, curate):
        monkeypatch.setattr(module, "CHUNK", 10)
    arrays, paths = [], []
    for count in (45, 64):
        x = np.random.default_rng(count).normal(size=(count, 16)).astype(np.float16)
        if count == 45:
            x[3] = 0
        arrays.append(x.astype(np.float32))
        paths.append(pretrain.in_chunks(tmp_path / f"{count}", count,
                                        lambda start, end, x=x: [x[start:end]], ""))
    cosines, readable = arrays[0] @ arrays[1].T, np.arange(45) != 3              # (45, 64)
    frames = pretrain.Bank(paths[0], np.arange(45), 9 * [5])
    found = curate.mine(frames, paths[1], 7, CPU)                                # (45, 7)
    assert (found["caption"] == np.argsort(-cosines)[:, :7])[readable].all()
    assert np.allclose(found["cosine"][readable], -np.sort(-cosines)[readable, :7], atol=1e-5)
    assert curate.union(found[3], [], -1.0) == {"captions": [], "scores": []}
    found = np.zeros((2, 3), curate.FOUND)
    found["cosine"] = [[0.5, 0.375, 0.25], [0.4375, 0.3125, 0.125]]
    found["caption"] = [[9, 5, 2], [5, 1, 8]]
    row = curate.union(found, "abcdefghij", 0.2)  # f is found twice: its better cosine counts
    assert row == {"captions": ["j", "f", "b", "c"], "scores": [0.5, 0.4375, 0.3125, 0.25]}


@pytest.fixture(scope="module")
def mined(world, small_clip, tmp_path_factory):
    """A folder of captions that were mined undisturbed, the command's flags, and what it said."""
    out = tmp_path_factory.mktemp("mined")
    flags = ["--source", "ac", "--data", world, "--clip", small_clip, "--vocab",
             world / "vocab.txt.gz", "--leave-out", "none", "--preview", 3, "--out"]
    return out, flags, run("curate.py", *flags, out).stdout


def test_mined_captions_are_those_that_clip_likes_best(mined, world):
    out, _, said = mined
    rows = [json.loads(line) for line in (out / "ac.jsonl").read_text().splitlines()]
    pairs = sum(len(row["captions"]) for row in rows)
    assert f"64 of 64 clips with captions, {pairs} pairs (paper: 1080078)" in said
    assert (out / "ac.png").exists() and rows[0].keys() == {"id", "captions", "scores"}
    frames, texts = (np.load(*out.glob(f"banks/{kind}-*/*")).astype(np.float32)
                     for kind in ("frames", "texts"))
    cosines = (frames[:4] @ texts.T).max(axis=0)  # of the first clip's frames
    assert rows[0]["captions"][0] == curate.caption_pool("ac", world, world)[cosines.argmax()]
    assert rows[0]["scores"][0] == pytest.approx(cosines.max(), abs=1e-4)


def test_mining_killed_at_random_moments_or_by_two_ranks_ends_as_undisturbed(mined, tmp_path):
    out, flags, _ = mined
    script = tmp_path / "in_small_chunks.py"  # six chunk files of frames, more of captions
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport curate, pretrain\n"
                      "curate.CHUNK = pretrain.CHUNK = 50\ncurate.run(curate.main)")
    stages = " frames: ", " texts: ", "frames pick captions: "
    kill_at_random(stages, script, *flags, tmp_path / "killed")
    run(script, *flags, tmp_path / "ranks", ranks=2)
    for name in ("killed", "ranks"):
        assert (tmp_path / name / "ac.jsonl").read_bytes() == (out / "ac.jsonl").read_bytes()
    assert len(list((tmp_path / "killed/banks").iterdir())) == 3  # all went on with the same ones


def test_gold_clips_come_with_captions_labels_or_random_captions(world, tmp_path, monkeypatch):
    gold, found = read_split("audiocaps", world, "gold"), {}
    for source in ("gc", "gl", "rc"):
        clips, row = curate.gold_pairs(source, world, seed=0)
        found[source] = [tuple(row(i)["captions"]) for i in range(len(clips))]
    assert found["gc"] == [c.captions for c in gold] and found["gl"] == [c.labels for c in gold]
    assert set(found["rc"]) <= set(found["gc"])
    assert np.mean([one == other for one, other in zip(found["rc"], found["gc"])]) < 0.2
    with pytest.raises(FileNotFoundError, match="python curate.py generate"):
        curate.caption_pool("fc", tmp_path, tmp_path)
    monkeypatch.setattr(curate, "gold_pairs", lambda *_: (gold, lambda i: {"captions": []}))
    with pytest.raises(ValueError, match="lower --threshold"):
        curate.curate(curate.Settings("gc"), world, tmp_path, CPU)


def test_a_language_model_goes_on_with_the_same_captions(tmp_path, monkeypatch):
    words = {word: i for i, word in enumerate("<unk> <end> - \n a dog cat runs on two".split(" "))}
    words_of = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    words_of.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\n|[^ \n]+"), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_of, unk_token="<unk>",
                                                     eos_token="<end>")
    config = transformers.GPT2Config(vocab_size=10, n_positions=128, n_embd=16, n_layer=1,
                                     n_head=2, bos_token_id=1, eos_token_id=1)
    for part in (tokenizer, transformers.GPT2LMHeadModel(config)):  # random weights babble
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "vc.txt").write_text("a dog runs\ntwo cats sleep\n")
    monkeypatch.setattr(pretrain, "CHUNK", 4)
    settings, texts = curate.Settings(prompts=10, model=str(tmp_path / "model")), []
    for _ in range(2):
        curate.generate(settings, tmp_path, tmp_path, CPU)
        texts.append((tmp_path / "fc.txt").read_text())
        for path in sorted(tmp_path.glob("fc-*/*"))[1:]:  # as a killed run leaves them
            path.unlink()
    captions = texts[0].splitlines()
    assert texts[0] == texts[1] and len(set(captions)) == len(captions) > 5
    assert all(3 <= len(line.split()) <= 40 and line != "a dog runs" for line in captions)
