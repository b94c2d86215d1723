"""Tokenizer, where files come from, every layout of weights, the three changes, the authors'."""
import gzip
import hashlib
import json
import os
import random
import runpy
import sys

import clip_load
import model
import numpy as np
import pytest
import torch
import transformers
from clip_load import Tokenizer, load_clip, resize_positions

LETTERS = ["l o", "lo w</w>", "e r</w>"]


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A tiny CLIP, whose state dict is clip.pt in the working folder; v.gz is its vocabulary."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clip = model.CLIP(32, 8, 64, 2, 12, 517, 64, 1, 32)
    for p in clip.visual.parameters():  # fp16; norms and biases, too, are other than each other
        p.data = (p + 0.05 * torch.randn(p.shape)).half().float()
    torch.save(clip.state_dict(), "clip.pt")
    (tmp_path / "v.gz").write_bytes(gzip.compress("\n".join(["v", *LETTERS]).encode()))
    return load_clip("clip.pt")


def test_byte_pair_encoding_by_hand():
    """Ids: 256 bytes, 256 that end a word, 3 merges, start, end. "lower" is lo, w, er."""
    tokenizer = Tokenizer(LETTERS)
    assert tokenizer.encode("1 &lt; 2 < 3 &amp;amp; 4") == tokenizer.encode("1 < 2 < 3 & 4")
    assert tokenizer(["low lower"])[0, :7].tolist() == [515, 513, 512, ord("w") - 33, 514, 516, 0]
    assert Tokenizer(LETTERS, 6)(["low " * 9]).tolist() == [[515, 513, 513, 513, 513, 516]]


def test_ids_are_clips(shared, tmp_path):
    path = shared / "data/clip/bpe_simple_vocab_16e6.txt.gz"
    tokenizer = Tokenizer(path)
    for row in json.loads((shared / "golden/tokens.json").read_text()):
        assert tokenizer([row["text"]])[0].tolist() == (row["ids"] + [0] * 77)[:77], row["text"]
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48_895]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))  # the hub's
    assert Tokenizer(tmp_path / "merges.txt").ids == Tokenizer(merges).ids == tokenizer.ids


@pytest.mark.parametrize("what, why", [("wrong", "invalid hash"), ("cut", "invalid hash"),
                                       ("gone", "No such file"), ("refused", "refused")])
def test_order_of_places_and_what_was_tried(what, why, tmp_path, monkeypatch, capsys):
    whole = bytes(1_000_000)
    sha256 = hashlib.sha256(whole).hexdigest()
    for name, content in (("good", whole), ("cut", whole[:500_000]), ("wrong", b"another")):
        (tmp_path / name / sha256).mkdir(parents=True)
        (tmp_path / name / sha256 / "ViT-B-32.pt").write_bytes(content)
    bad = "http://127.0.0.1:9" if what == "refused" else (tmp_path / what).as_uri()
    path = tmp_path / "cache/ViT-B-32.pt"
    monkeypatch.setattr(clip_load, "CACHE", path.parent)
    monkeypatch.setitem(clip_load.MODELS, "ViT-B/32", sha256)
    monkeypatch.setattr(clip_load, "OPENAI", bad)
    monkeypatch.setattr(clip_load, "hf_hub_download", lambda *_, **__: open("no hub"))
    with pytest.raises(FileNotFoundError) as error:
        load_clip("ViT-B/32")
    _, cache, earlier, address, hub, mend = str(error.value).split("\n")
    assert "No such file" in cache and "no hub" in earlier and "no hub" in hub
    assert f"{bad}/{sha256}/ViT-B-32.pt: " in address and why in address
    assert f"Put it at {path}" in mend and "--clip" in mend and not os.listdir(path.parent)
    path.write_bytes(b"half of it")  # and the hub works, but has not been asked before
    monkeypatch.setattr(clip_load, "hf_hub_download", lambda repository, name, local_files_only:
                        open("not yet") if local_files_only else f"{repository}/{name}")
    good = (tmp_path / "good").as_uri()
    for openai, place, found in ((bad, "https", "openai/clip-vit-base-patch32/pytorch_model.bin"),
                                 (good, good, path), (good, path, path)):
        monkeypatch.setattr(clip_load, "OPENAI", openai)
        with pytest.raises(ValueError):  # for no file here holds a CLIP
            load_clip("ViT-B/32")
        assert f"{found}: from {place}" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_every_layout_gives_the_same_weights(shared, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "clip.pt"])
    runpy.run_path(str(shared / "cases/30_clip_formats.py"))
    expected = clip.state_dict()
    nested = {f"clip.{key}": value for key, value in expected.items()}
    beside = {"optimizer": {0: torch.ones(3)}, "args": Settings()}  # which would run code
    torch.save(beside | {"model": nested}, "nested.pt")
    clip.register_buffer("input_resolution", torch.tensor(32))  # as OpenAI's file has
    inputs = {"encode_image": torch.randn(2, 3, 32, 32), "encode_text": torch.ones(2, 12).long()}
    torch.jit.trace_module(clip, inputs, check_trace=False).save("script.pt")
    for path in sorted({*tmp_path.iterdir()} - {tmp_path / "v.gz"}):
        for key, value in load_clip(path).state_dict().items():
            assert torch.allclose(value, expected[key], atol=0.01), (path, key)
    assert not clip.training and not clip.visual.proj.requires_grad and not os.path.exists("ran")


def test_hugging_faces_clip_has_its_own_features_and_its_config_is_asked(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    vision = sizes | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 517, "eos_token_id": 516}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    images, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[3, 7, 516, 0, 9]])  # 516 ends it
    of_images = theirs.get_image_features(images).pooler_output
    of_text = theirs.get_text_features(tokens).pooler_output
    for path in (tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        clip = load_clip(path)
        assert (clip.encode_image(images) - of_images).abs().max() < 1e-5
        assert (clip.encode_text(tokens) - of_text).abs().max() < 1e-5
    for config, said in (({"vision_config": {"hidden_act": "gelu"}}, "gelu, heads of 64"),
                         ({"vision_config": {"hidden_size": 320, "num_attention_heads": 4}}, "80"),
                         ({"model_cfg": {"vision_cfg": {"head_width": 64}}}, "gelu")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*{said}"):
            load_clip(path)


def test_what_does_not_fit_is_refused_with_what_it_is_taken_for(clip):
    for keys, said in (("visual.attnpool.c token_embedding.w", "a ResNet and a text encoder"),
                       ("vision_model.embeddings.class_embedding", "a ViT"), ("x", "something")):
        torch.save(dict.fromkeys(keys.split(), torch.zeros(2)), "other.pt")
        with pytest.raises(ValueError, match=rf"other\.pt: .*taken for {said}"):
            load_clip("other.pt")
    with pytest.raises(ValueError, match="516 tokens; CLIP has 517; wrong --vocab"):
        clip_load.load_tokenizer(LETTERS[:2], clip)


def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(clip, tmp_path):
    rng, refused = random.Random(0), 0
    torch.save(Settings(), "old.pt", _use_new_zipfile_serialization=False)
    for name in 100 * ["clip.pt", "v.gz"] + 20 * ["old.pt"]:
        content = bytearray((tmp_path / name).read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        (tmp_path / "bad").write_bytes(content if rng.random() < 0.7 else content[:at])
        try:
            read = Tokenizer("bad").merges if name == "v.gz" else clip_load.digest(load_clip("bad"))
            assert read in (LETTERS, clip_load.digest(clip))
        except ValueError as error:
            assert str(error).startswith("bad: ")
            refused += 1
    assert refused > 180 and not os.path.exists("ran")


def test_resized_positions_by_hand_and_golden_features(shared):
    """Rows are time: two become four, align_corners=False; the class position stays."""
    pos = torch.tensor([[9.0], [0.0], [4.0]])
    assert resize_positions(pos, (2, 1), (4, 1)).flatten().tolist() == [9, 0, 1, 3, 4]
    assert torch.equal(resize_positions(pos, (2, 1), (2, 1)), pos)
    golden = {k: torch.tensor(v) for k, v in np.load(shared / "golden/clip_tiny.npz").items()}
    state = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    clip = clip_load.make_clip(state)
    audio = clip_load.audio_encoder_from_clip(clip, 50, 32, (4, 6))
    ours = {"image": clip.encode_image(golden["image"]), "text": clip.encode_text(golden["text"]),
            "audio": audio(golden["audio_fbank"]),
            "audio_long": clip_load.lengthen(audio, 90)(golden["audio_long_fbank"])}
    for name, value in ours.items():
        assert (value - golden[f"{name}_features"]).abs().max() < 1e-4, name


class Settings:  # as OmegaConf's in the authors' files, but to make one would leave a file
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("dicts, heads", [(4, True), (4, False), (2, True), (2, False)])
def test_the_authors_checkpoint_becomes_ours(dicts, heads, clip, tmp_path, monkeypatch):
    encoder = clip_load.audio_encoder_from_clip(clip)
    encoder.ln_post.bias.data += 1
    state = encoder.state_dict()
    if heads:  # three channels, the same mean
        state["conv1.weight"] = state["conv1.weight"] * torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    if heads == (dicts == 2):  # the image's
        state["positional_embedding"] = clip.visual.positional_embedding
    audio = {f"encoder.{key}": value for key, value in state.items()}
    names = ("transformer. encoder.", "ln_pre pre_encoder.ln", "conv pre_encoder.conv",
             "ln_post post_encoder.ln", "pro post_encoder.pro", "class misc.class", "pos misc.pos")
    for ours, theirs in (name.split() for name in names if heads):
        audio = {key.replace(f"encoder.{ours}", theirs): value for key, value in audio.items()}
    parts = clip.visual.state_dict(), audio, {}, {"x.logit_scale": torch.tensor(3.5)}
    released = tmp_path / clip_load.VIPANT["vipant-gc"]
    released.parent.mkdir()
    torch.save({"cfg": Settings(), "model": parts if dicts == 4 else parts[1::2]}, released)
    monkeypatch.setattr(sys, "argv", ["", "vipant-gc", "--clip", "clip.pt", "--vocab", "v.gz"])
    monkeypatch.setattr(clip_load, "RELEASED", tmp_path.as_uri())
    clip_load.main()
    saved = torch.load("out/vipant-gc/checkpoint.pt", weights_only=True)
    assert saved["stage"] == "finetune" and saved["settings"]["source"] == "gc"
    assert saved["learner"].pop("log_scale") == 3.5 and not os.path.exists("ran")
    ours, x = model.VisionTransformer(**saved["encoder"]), torch.randn(1, 1, 1000, 128)
    ours.load_state_dict({key[14:]: value for key, value in saved["learner"].items()})
    assert torch.allclose(ours(x), encoder(x), atol=1e-5)
    assert clip_load.digest(clip_load.make_clip(saved["clip"]["state"])) == clip_load.digest(clip)
    assert saved["clip"]["state"]["visual.proj"].dtype == torch.half  # where that is exact
