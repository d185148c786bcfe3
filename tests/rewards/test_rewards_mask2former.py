"""Mask2Former and CLIP, small and with random weights, against `transformers`' own arithmetic."""

import types

import numpy as np
import pytest

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.rewards.geneval.classes import CLASSES
from unipic2_jax.rewards.geneval.detectors.base import Wanted, make_detector
from unipic2_jax.rewards.geneval.detectors.colors import TEMPLATES, load_colors
from unipic2_jax.rewards.geneval.detectors.mask2former import detection, instances
from unipic2_jax.rewards.geneval.detectors.torch_models import own_device
from unipic2_jax.rewards.geneval.rules import COLORS
from unipic2_jax.rewards.scoring import Scorer, make_entries

torch = pytest.importorskip("torch", reason="Mask2Former and CLIP run in PyTorch")
pytest.importorskip("transformers", minversion="5.23", reason="its image processors need torchvision before")

MODEL = {"kind": "mask2former", "device": "cpu"}
# Names of COCO's classes in some checkpoints.
VOC_NAMES = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Mask2Former and a tiny CLIP as their checkpoints' folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        PreTrainedTokenizerFast,
        SwinConfig,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    detector, clip = tmp_path_factory.mktemp("mask2former"), tmp_path_factory.mktemp("clip")
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    labels = {number: {**VOC_NAMES, **COCO_NAMES}.get(name, name) for number, name in enumerate(CLASSES)}
    network = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
            dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4, num_queries=12, id2label=labels,
        )
    )  # fmt: skip
    # Sharper than at random, so that a few queries are sure of a class.
    network.class_predictor.weight.data *= 30
    network.save_pretrained(detector)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32).save_pretrained(
        detector
    )

    words = sorted(
        {word for text in TEMPLATES for word in text.replace("-", " - ").split()}
        | {*COLORS, *" ".join(CLASSES).split()}
    )
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<start>", "<other>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(clip)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    # With 2 as the end, CLIP would look for the largest number instead.
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    text = {**width, **special, "vocab_size": len(vocabulary)}
    colors = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**width, "image_size": 32, "patch_size": 8}, projection_dim=16)
    )
    # Words and pixels weigh more than at random, so that both kinds of embeddings differ.
    colors.text_model.embeddings.token_embedding.weight.data *= 50
    colors.vision_model.embeddings.patch_embedding.weight.data *= 50
    for layer in (*colors.text_model.encoder.layers, *colors.vision_model.encoder.layers):
        layer.self_attn.v_proj.weight.data *= 20
    colors.save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    return str(detector), str(clip)


def pictures(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_instances_are_those_of_transformers():
    """Its own post-processing works on 384 x 384 pixels; for pictures of that size the two must agree."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    torch.manual_seed(1)
    square = (384, 384)
    classes = 6 * torch.randn(1, 100, 81)
    masks = torch.nn.functional.interpolate(20 * torch.randn(1, 100, 6, 6), (48, 48), mode="bicubic") - 2
    masks[:, 7] = -5  # a query that sees nothing
    output = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    (theirs,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, return_binary_maps=True
    )
    infos, maps = theirs["segments_info"], theirs["segmentation"].numpy()
    key = lambda found: -found[1]
    want = sorted(((info["label_id"], info["score"], maps[info["id"]] > 0) for info in infos), key=key)
    ours = sorted(instances(classes[0], masks[0], square, square, square, 0.3), key=key)
    assert len(ours) == len(want) > 20
    for (label, confidence, mask), (other_label, other_confidence, other_mask) in zip(ours, want):
        assert label == other_label and confidence == pytest.approx(other_confidence, abs=2e-6)
        assert (mask == other_mask).all()


def test_masks_lose_the_padding_and_get_the_pictures_size():
    """By hand: the network saw 64 x 96 pixels, of which 40 x 80 were the picture, which has 80 x 160."""
    logits = torch.full((2, 16, 24), -20.0)
    logits[0, 2:6, 5:10] = 20.0  # pixels 8..24 x 20..40 of what it saw, 16..48 x 40..80 of the picture
    logits[1, 12:, :] = 20.0  # in the padding only
    classes = torch.full((2, 4), -9.0)
    classes[0, 2], classes[1, 1] = 9.0, 9.0
    ((label, confidence, mask),) = instances(classes, logits, (64, 96), (40, 80), (80, 160), 0.5)
    assert (label, mask.shape) == (2, (80, 160)) and 0.9 < confidence <= 1
    found = detection("cup", confidence, mask)
    assert np.abs(np.array(found.box) - (40, 16, 80, 48)).max() <= 2
    x0, y0, x1, y1 = map(int, found.box)
    assert found.mask.shape == (y1 - y0, x1 - x0) and found.mask.sum() == mask.sum() and found.confidence == confidence
    assert instances(classes, logits, (64, 96), (40, 80), (80, 160), 0.9999999) == []


def test_a_query_may_be_two_classes_and_confidence_is_class_times_mask():
    classes = torch.tensor([[2.0, 2.0, -9.0, 0.0]])
    logits = torch.full((1, 8, 8), 1.0)
    found = instances(classes, logits, (8, 8), (8, 8), (8, 8), 0.1)
    want = torch.softmax(classes, -1)[0, 0] * torch.sigmoid(torch.tensor(1.0))
    assert sorted(label for label, _, _ in found) == [0, 1]
    assert [confidence for _, confidence, _ in found] == pytest.approx([float(want)] * 2, rel=1e-5)


def test_detections_of_the_network_do_not_depend_on_the_batch(folders):
    images = pictures((40, 80), (40, 80), (40, 80))
    wanted = [Wanted(frozenset({"motorcycle", "computer mouse", "couch"}), threshold=0.2)] * 3
    detect = lambda size: make_detector({**MODEL, "model": folders[0], "clip": folders[1], "batch_size": size}).detect(
        images, wanted
    )
    alone, together = detect(1), detect(3)
    assert sum(map(len, alone)) > 3 and all(found.color is None for found in alone[0])
    for some, others in zip(alone, together):
        assert [found.name for found in some] == [found.name for found in others] and {f.name for f in some} <= set(
            CLASSES
        )
        assert np.allclose([f.confidence for f in some], [f.confidence for f in others], atol=1e-4)
        assert all(0.2 < found.confidence <= 1 and found.mask.any() for found in some)
    x0, y0, x1, y1 = alone[0][0].box
    assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 40


def test_pictures_of_several_sizes_in_a_batch(folders):
    images = pictures((40, 80), (64, 64))
    detector = make_detector({**MODEL, "model": folders[0], "clip": folders[1], "batch_size": 2})
    wide, square = detector.detect(images, [Wanted(frozenset(), threshold=0.2)] * 2)
    assert max(found.box[2] for found in wide) > 64 >= max(found.box[3] for found in square)


def test_colours_are_those_of_clip_itself(folders):
    """Against the whole model of `transformers` on the same sentences and crops."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    names = ["cup", "dog", "cup", "fire hydrant", "dog", "cup"]
    sizes = [(20, 30), (9, 50), (32, 32), (5, 5), (40, 12), (8, 8)]
    crops = [
        np.full((*size, 3), color, np.uint8)
        for size, color in zip(sizes, np.random.default_rng(0).integers(0, 256, (6, 3)))
    ]
    classifier = load_colors(folders[1], "cpu")
    ours = classifier(crops, names, 4)
    clip, tokenizer = CLIPModel.from_pretrained(folders[1]).eval(), AutoTokenizer.from_pretrained(folders[1])
    pixels = CLIPImageProcessorPil.from_pretrained(folders[1])(crops, return_tensors="pt")
    for name in set(names):
        kinds = [
            (f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object") for c in COLORS
        ]
        texts = tokenizer([text for kind in kinds for text in kind], padding=True, return_tensors="pt")
        with torch.no_grad():
            output = clip(**texts, **pixels)
        means = torch.stack([output.text_embeds[3 * i : 3 * i + 3].mean(0) for i in range(len(COLORS))])
        weights = means / means.norm(dim=-1, keepdim=True)
        assert torch.allclose(classifier.weights(name), weights, atol=1e-5)
        for embedding, other, color in zip(output.image_embeds, names, ours):
            assert other != name or color == COLORS[int((weights @ embedding).argmax())]
    assert len(set(ours)) > 1


def test_the_whole_reward(folders):
    detector = {**MODEL, "model": folders[0], "clip": folders[1], "batch_size": 2}
    images = pictures((48, 48), (48, 48), (48, 48), seed=2)
    seen = make_detector(detector).detect(images, [Wanted(frozenset(), threshold=0.2)] * 3)
    name = max(seen[0], key=lambda found: found.confidence).name
    (colored,) = make_detector(detector).detect(images[:1], [Wanted(frozenset({name}), frozenset({name}), 0.2)])
    color = next(f.color for f in sorted(colored, key=lambda f: -f.confidence) if f.name == name)
    other = next(word for word in COLORS if word != color)
    missing = next(word for word in CLASSES if word not in {found.name for found in seen[2]})
    record = lambda name, color: PromptRecord(
        f"a photo of a {color} {name}",
        metadata={"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]},
    )
    records = [record(name, color), record(name, other), record(missing, color)]
    scores = make_reward("geneval", detector=detector, threshold=0.2).score([images[0], *images[::2]], records)
    assert scores.values.tolist() == [1, 0.5, 0] and scores.details["correct"].tolist() == [1, 0, 0]
    assert set(scores.details) == {"correct", "partial", "extras"}


def test_a_class_that_the_network_does_not_have(folders):
    detector = make_detector({**MODEL, "model": folders[0], "clip": folders[1]})
    with pytest.raises(ValueError, match="knows no 'lamp'"):
        detector.detect(pictures((32, 32)), [Wanted(frozenset({"lamp", "cat"}))])
    with pytest.raises(ValueError, match="knows no 'lamp'"):
        detector.check([Wanted(frozenset({"cat"})), Wanted(frozenset({"lamp"}))])
    detector.check([Wanted(frozenset(CLASSES), frozenset(CLASSES))])


def test_the_gpu_is_the_processes_own(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", local_hardware_id=5)
    monkeypatch.setattr("jax.local_devices", lambda: [gpu])
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:5", "cuda:1", "cpu"]
    monkeypatch.setattr("jax.local_devices", lambda: [types.SimpleNamespace(platform="tpu", local_hardware_id=5)])
    assert own_device("cuda") == "cuda"


def test_a_gpu_without_memory_is_a_failed_reward(folders, monkeypatch):
    """Of the pictures of that call alone; the others are scored, and the run goes on."""
    asked = []

    def network(images, thresholds):
        asked.append(len(images))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [[] for _ in images]

    monkeypatch.setattr("unipic2_jax.rewards.geneval.detectors.mask2former.load_mask2former", lambda *given: network)
    metadata = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    records = [PromptRecord("a photo of a cat", metadata=metadata)] * 6
    fields = {"detector": {**MODEL, "model": folders[0], "clip": folders[1], "batch_size": 2}, "batch_size": 2}
    scored = Scorer(make_entries({"geneval": fields})).score(pictures(*[(32, 32)] * 6), records)
    assert (
        asked == [2, 2, 2] and scored.values["geneval"].tolist()[:2] == [0, 0] == scored.values["geneval"].tolist()[4:]
    )
    assert np.isnan(scored.values["geneval"][2:4]).all() and set(scored.errors["geneval"]) == {2, 3}
    assert "does not fit the GPU's memory; lower its batch_size" in scored.errors["geneval"][2]


def test_what_is_missing_gets_one_sentence(folders, tmp_path, monkeypatch):
    make = lambda **options: make_detector({**MODEL, "model": folders[0], "clip": folders[1], **options})
    with pytest.raises(ValueError, match="'cpu' or 'cuda', not on 'tpu'"):
        make(device="tpu")
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(batch_size=0)
    with pytest.raises(FileNotFoundError, match="for CLIP does not exist"):
        make(clip=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"cannot be loaded from .*; give a folder") as error:
        make(model=str(tmp_path)).detect(pictures((32, 32)), [Wanted(frozenset())])
    assert "\n" not in str(error.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch sees no GPU"):
            make(device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package 'torch', .* requirements-geneval.txt"):
        make()
