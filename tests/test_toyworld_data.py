"""toyworld's tokenizer, training set and measures of runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdi_fast.constants import VIEW_NAMES
from sdi_fast.diffusion.prompt import view_index as prompt_view_index
from sdi_fast.toyworld import dataset
from sdi_fast.toyworld.dataset import NO_VIEW, Dataset, build_dataset, caption_variants, view_index
from sdi_fast.toyworld.evaluate import (
    EVAL_PROMPTS,
    N_VIEWS,
    candidates,
    evaluate_run,
    held_out_cameras,
    silhouette_iou,
)
from sdi_fast.toyworld.renderer import Appearance, render_scene
from sdi_fast.toyworld.scenes import COLOURS, KINDS, Scene, Shape, parse_caption, shape_of
from sdi_fast.toyworld.score import EMBED, Scorer
from sdi_fast.toyworld.tokenizer import CONTEXT_LENGTH, load_tokenizer, token_ids, write_tokenizer
from sdi_fast.types import Camera, SDIFastError

HOSTILE = (
    "🍄 ☃ ﷽",
    "quetzalcoatlus in a crème brûlée",
    "x" * 10_000,
    "a red mushroom " * 1000,
    "${oc.env:HOME}",
    "../../x",
    "a\0b\x07\n\t",
    "",
    " ",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


# ---- tokenizer ----------------------------------------------------------------------------


def test_every_word_is_one_token(tokenizer: Any) -> None:
    words = [*KINDS, *COLOURS, *VIEW_NAMES, "a", "an", "view", "next", "to"]
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, f"{word}: start, word, end"
    assert len({tokenizer(word).input_ids[1] for word in words}) == len(set(words))
    caption = Scene((("mushroom", "red"), ("house", "orange"))).caption
    # start, 8 words, comma, two words, end: every caption fits with its view
    assert len(tokenizer(f"{caption}, overhead view").input_ids) == 13 <= CONTEXT_LENGTH


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_any_text_is_tokenised(tokenizer: Any, text: str) -> None:
    ids = token_ids(tokenizer, [text, "a red mushroom"])
    assert ids.shape == (2, CONTEXT_LENGTH) and ids.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < len(tokenizer)
    end = tokenizer.eos_token_id
    assert end == len(tokenizer) - 1, "the scorer takes the last entry for the padding"
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, -1] == end
    if text.strip():
        assert (ids[0, 1:-1] != end).any(), "no text is lost as unknown"


def test_unknown_words_keep_their_bytes(tokenizer: Any) -> None:
    text = "zyx ${oc.env:home} é"
    back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.replace(" ", "")


def test_case_and_spaces_do_not_matter(tokenizer: Any) -> None:
    a, b = token_ids(tokenizer, ["a red  mushroom", " A Red Mushroom"])
    assert torch.equal(a, b)


# ---- training set -------------------------------------------------------------------------

VIEW_CASES = [  # azimuth, elevation, view (methods.md C4; both borders belong to the side)
    (0.0, 0.0, "front"),
    (44.9, 10.0, "front"),
    (-44.9, -10.0, "front"),
    (45.0, 10.0, "side"),
    (-45.0, 10.0, "side"),
    (90.0, 45.0, "side"),
    (-135.0, 0.0, "side"),
    (135.0, 0.0, "side"),
    (135.1, 0.0, "back"),
    (-180.0, 0.0, "back"),
    (180.0, 60.0, "back"),
    (0.0, 60.1, "overhead"),
    (90.0, 85.0, "overhead"),
]


def test_views_follow_the_rule_of_the_prompts() -> None:
    azimuth = torch.tensor([a for a, _, _ in VIEW_CASES])
    elevation = torch.tensor([e for _, e, _ in VIEW_CASES])
    names = [VIEW_NAMES[i] for i in view_index(azimuth, elevation).tolist()]
    assert names == [view for _, _, view in VIEW_CASES]
    gen = torch.Generator().manual_seed(5)
    azimuth = torch.rand(2000, generator=gen) * 360 - 180
    elevation = torch.rand(2000, generator=gen) * 180 - 90
    assert torch.equal(view_index(azimuth, elevation), prompt_view_index(azimuth, elevation))


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Dataset:
    """A training set whose pictures carry, as colours, what was to be drawn.

    Pixel (0, 0) is azimuth and elevation, (0, 1) and (0, 2) the objects' kinds by their place in
    KINDS, (1, 1) and (1, 2) their colours.
    """
    kinds_of = {id(shape_of((kind,))): (kind,) for kind in KINDS}

    def shape(kinds: tuple[str, ...]) -> Shape:
        kinds_of[id(shape_of(kinds))] = kinds
        return shape_of(kinds)

    def draw(shape: Shape, camera: Camera, appearance: Appearance) -> tuple[Tensor, None]:
        image = torch.zeros(camera.batch_size, camera.height, camera.width, 3)
        image[:, 0, 0, 0] = (camera.azimuth_deg + 180) / 360
        image[:, 0, 0, 1] = (camera.elevation_deg + 90) / 180
        for i, kind in enumerate(kinds_of[id(shape)]):
            image[:, 0, 1 + i] = (KINDS.index(kind) + 1) / 255
            image[:, 1, 1 + i] = appearance.main_colours[:, i]
        return image, None

    monkeypatch.setattr(dataset, "shape_of", shape)
    monkeypatch.setattr(dataset, "render_shape", draw)
    return build_dataset(600, tokenizer, "cpu", seed=3)


def test_captions_tell_what_the_pictures_show(labelled: Dataset, tokenizer: Any) -> None:
    assert len(labelled) == 600
    palette = {tuple(round(c * 255) for c in rgb): name for name, rgb in COLOURS.items()}
    seen: Counter[str] = Counter()
    sure = 0
    for image, row, view in zip(labelled.images, labelled.objects, labelled.views, strict=True):
        scene = labelled.scenes[int(row)]
        n = 1 + int(image[0, 2].any())
        drawn = tuple(
            (KINDS[int(image[0, 1 + i, 0]) - 1], palette[tuple(image[1, 1 + i].tolist())])
            for i in range(n)
        )
        assert scene.objects == drawn
        azimuth = torch.tensor([float(image[0, 0, 0]) / 255 * 360 - 180])
        elevation = torch.tensor([float(image[0, 0, 1]) / 255 * 180 - 90])
        step = 360 / 255  # the picture's bytes blur the angles: those at a border are left out
        border = min(abs(azimuth.abs() - 45), abs(azimuth.abs() - 135), abs(elevation - 60))
        if border > step:
            sure += 1
            assert int(view) == int(view_index(azimuth, elevation))
        seen[VIEW_NAMES[int(view)]] += 1
        seen["pair" if n == 2 else "single"] += 1
    assert sure > 500 and set(seen) == {*VIEW_NAMES, "pair", "single"}
    assert seen["pair"] == 120  # a fifth
    assert {o[0] for s in labelled.scenes for o in s.objects} == set(KINDS)
    for row, scene in enumerate(labelled.scenes[:20]):
        texts = caption_variants(scene)
        assert texts[NO_VIEW] == scene.caption
        assert texts[VIEW_NAMES.index("back")] == f"{scene.caption}, back view"
        assert torch.equal(labelled.tokens[row], token_ids(tokenizer, texts))


def test_the_tail_of_the_set_is_like_the_rest(labelled: Dataset) -> None:
    """The held-out images are the last ones; the set is rendered kind by kind and then mixed."""
    tail = Counter(labelled.scenes[int(i)].objects[0][0] for i in labelled.objects[-100:])
    assert len(tail) >= 12 and max(tail.values()) < 30


def test_rendered_sets_repeat_and_vary(tokenizer: Any) -> None:
    first, again, other = (build_dataset(20, tokenizer, "cpu", seed=s) for s in (0, 0, 1))
    assert torch.equal(first.images, again.images) and torch.equal(first.views, again.views)
    assert not torch.equal(first.images, other.images)
    batch = first.batch_images(torch.tensor([3, 5]))
    assert batch.shape == (2, 3, 64, 64) and 0 <= batch.min() and batch.max() <= 1
    assert first.images.float().std(dim=(1, 2)).amax(-1).min() > 2, "an empty picture"


# ---- measures -----------------------------------------------------------------------------


def test_evaluation_prompts() -> None:
    scenes = [parse_caption(prompt) for prompt in EVAL_PROMPTS]
    assert EVAL_PROMPTS[0] == "a red mushroom"
    assert [scene.caption for scene in scenes] == list(EVAL_PROMPTS)
    assert len({scene.objects[0][0] for scene in scenes}) == len(EVAL_PROMPTS) == 10
    assert {scene.objects[0][1] for scene in scenes} == set(COLOURS)


@pytest.mark.parametrize("prompt", EVAL_PROMPTS)
def test_candidates(prompt: str) -> None:
    names = candidates(prompt)
    kind, colour = parse_caption(prompt).objects[0]
    assert len(set(names)) == len(names) == 20 and names[0] == prompt
    assert names == candidates(prompt) == candidates(f"{prompt}, front view")
    wrong = [parse_caption(name).objects[0] for name in names[1:]]
    assert sum(k == kind for k, _ in wrong) >= 5, "several in other colours"
    assert sum(c == colour for _, c in wrong) >= 5, "several of other kinds"
    assert sum(k != kind and c != colour for k, c in wrong) >= 3


def test_candidates_need_one_object() -> None:
    with pytest.raises(SDIFastError, match="caption: expected one object"):
        candidates("a red mushroom next to a blue house")


def test_held_out_cameras() -> None:
    camera = held_out_cameras()
    assert (camera.batch_size, camera.height, camera.width) == (8, 128, 128)
    assert sorted(camera.azimuth_deg.tolist()) == [-157.5 + 45 * i for i in range(8)]
    assert camera.elevation_deg.tolist() == [15.0] * 8
    position = camera.c2w[:, :, 3]
    torch.testing.assert_close(position.norm(dim=-1), torch.full((8,), 1.75))
    torch.testing.assert_close(camera.fovy, torch.full((8,), 55.0).deg2rad())
    # unperturbed: every camera looks at the origin
    torch.testing.assert_close(camera.c2w[:, :, 2], position / 1.75)


def test_silhouette_iou_counts_pixels() -> None:
    scene = parse_caption("a red mushroom")
    camera = held_out_cameras(48, 48)
    _, mask = render_scene(scene, camera)
    assert torch.equal(silhouette_iou(mask, scene, camera), torch.ones(N_VIEWS))
    assert torch.equal(silhouette_iou(torch.zeros_like(mask), scene, camera), torch.zeros(N_VIEWS))
    full = silhouette_iou(torch.ones_like(mask), scene, camera)
    torch.testing.assert_close(full, (mask > 0.5).float().mean(dim=(1, 2)))
    half = mask.clone()
    half[:, :, :24] = 0.0
    truth = mask > 0.5
    expected = truth[:, :, 24:].sum(dim=(1, 2)) / truth.sum(dim=(1, 2))
    torch.testing.assert_close(silhouette_iou(half, scene, camera), expected)
    assert torch.equal(silhouette_iou(mask * 0.4, scene, camera), torch.zeros(N_VIEWS))
    assert silhouette_iou(mask * 0.4, scene, camera, threshold=0.2).min() > 0.9
    with pytest.raises(SDIFastError, match="opacity: expected .*48, 48.*, got .*8, 48"):
        silhouette_iou(mask[:, :8], scene, camera)


class ColourScorer(Scorer):
    """Knows nothing but the mean colour of the middle of a picture."""

    def __init__(self) -> None:
        super().__init__(vocab_size=4)

    def image_features(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 64, 64)
        return images[:, :, 24:40, 24:40].mean(dim=(2, 3)) - 0.5

    def text_features(self, texts: list[str]) -> Tensor:
        colours = torch.tensor([COLOURS[parse_caption(t).objects[0][1]] for t in texts]) - 0.5
        return torch.nn.functional.normalize(colours, dim=-1)


def painted(kind: str, colour: tuple[float, float, float]) -> Any:
    def render(camera: Camera) -> tuple[Tensor, Tensor]:
        _, mask = render_scene(Scene(((kind, "red"),)), camera)
        rgb = torch.tensor(colour).expand(*mask.shape, 3)
        return rgb, mask

    return render


def test_evaluate_run() -> None:
    caption = "a green car"
    right = evaluate_run(painted("car", COLOURS["green"]), caption, scorer=ColourScorer())
    assert right["iou"] == 1.0 and right["iou_views"] == [1.0] * 8
    # as many candidates are green as have been drawn on other kinds; a tie counts against the run
    green = sum(" green " in name for name in candidates(caption))
    assert right["rank"] == green == 8
    distance = (torch.tensor(COLOURS["green"]) - 0.5).norm()
    assert right["score"] == pytest.approx(100 * float(distance), rel=1e-4)
    assert all(type(right[key]) in (float, int, list) for key in right)

    wrong = evaluate_run(painted("snowman", COLOURS["red"]), caption, scorer=ColourScorer())
    assert wrong["iou"] < 0.6 and wrong["rank"] > green and wrong["score"] == 0.0
    assert wrong["iou"] == pytest.approx(sum(wrong["iou_views"]) / 8)


def test_evaluate_run_keeps_no_graph() -> None:
    graphs = []

    def render(camera: Camera) -> tuple[Tensor, Tensor]:
        graphs.append(torch.is_grad_enabled())
        return painted("car", COLOURS["green"])(camera)

    evaluate_run(render, "a green car", scorer=ColourScorer())
    assert graphs and not any(graphs)


def test_a_broken_run_gets_no_marks() -> None:
    def render(camera: Camera) -> tuple[Tensor, Tensor]:
        nothing = torch.full((8, camera.height, camera.width), float("nan"))
        return nothing[..., None].expand(-1, -1, -1, 3), nothing

    marks = evaluate_run(render, "a red mushroom", scorer=ColourScorer())
    assert marks["iou"] == 0.0 and marks["rank"] == 20 and not marks["score"] > 0


def test_scorer_refuses_what_is_no_image() -> None:
    with pytest.raises(SDIFastError, match=r"images: expected \[B, 3, H, W\]"):
        Scorer(vocab_size=8).image_features(torch.zeros(3, 64, 64))
    with pytest.raises(SDIFastError, match="candidates: expected the caption"):
        ColourScorer().rank(torch.zeros(1, 3, 64, 64), "a red car", ["a blue car"])


def test_scorer_vectors_have_unit_length_and_ignore_the_padding(tokenizer: Any) -> None:
    scorer = Scorer(len(tokenizer), tokenizer).eval()
    images = torch.rand(3, 3, 80, 72)
    torch.testing.assert_close(scorer.image_features(images).norm(dim=-1), torch.ones(3))
    texts = scorer.text_features(["a red car", "a blue car next to a green cactus"])
    assert texts.shape == (2, EMBED)
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    with torch.no_grad():
        scorer.words.weight[-1] += 1.0  # the padding's
    torch.testing.assert_close(scorer.text_features(["a red car"])[0], texts[0])
    with torch.no_grad():
        scorer.words.weight[tokenizer("red").input_ids[1]] += 1.0
    assert (scorer.text_features(["a red car"])[0] - texts[0]).norm() > 0.05


def test_a_scorer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SDIFastError, match="scorer: expected weights in .*missing scorer/config"):
        Scorer.load(tmp_path)
