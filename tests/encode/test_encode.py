"""The laws of a pruner, held on made-up visual tokens: valid kept sets for every method, known answers for each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import methods
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import Unsupported, UserError, VisualTokens, tower_block
from vlmfast.encode import (
    DTD,
    EVS,
    CDPruner,
    FlashVID,
    HiRED,
    IVCPrune,
    MaxMin,
    MMTok,
    Random,
    Uniform,
    VCast,
    VidCom2,
    VisionZip,
)
from vlmfast.encode.base import largest_remainder, ranked
from vlmfast.encode.flashvid import attended_and_diverse
from vlmfast.encode.hired import parts
from vlmfast.encode.vcast import curvature
from vlmfast.kernels import greedy
from vlmfast.kernels import parts as cache_parts
from vlmfast.plan import Plan, preset

D = 12


def video(t: int = 4, h: int = 3, w: int = 4, seed: int = 0, **changes: Any) -> VisualTokens:
    """A made-up item with everything that any pruner may ask for."""
    gen = torch.Generator().manual_seed(seed)
    n = t * h * w
    tokens = VisualTokens(
        features=torch.randn(n, D, generator=gen),
        frame=torch.arange(t).repeat_interleave(h * w),
        grid=(t, h, w),
        video=True,
        positions=torch.arange(n)[None],
        question=torch.randn(5, D, generator=gen),
        attention=torch.rand(2, n, generator=gen),
        rope=torch.rand(2, n, generator=gen) * 2 - 1,
    )
    return dataclasses.replace(tokens, **changes)


def tiled(side: int = 4, h: int = 8, w: int = 6, seed: int = 0) -> VisualTokens:
    """A LLaVA-NeXT image: a base view of side x side, then h rows of w tokens that each end in a newline."""
    base, n = side * side, side * side + h * (w + 1)
    protected = torch.zeros(n, dtype=torch.bool)
    protected[base:] = torch.arange(h * (w + 1)) % (w + 1) == w
    frame = torch.ones(n, dtype=torch.long)
    frame[:base] = 0
    full = video(1, 1, n, seed)
    return dataclasses.replace(full, frame=frame, grid=(2, h, w), video=False, protected=protected)


def fit(method: Any, tokens: VisualTokens) -> VisualTokens:
    """The attention maps that this method asks for."""
    if len(getattr(method, "attention_layers", (-1,))) == 1 and tokens.attention is not None:
        return dataclasses.replace(tokens, attention=tokens.attention[0])
    return tokens


ITEMS = {
    "video": video(),
    "long": video(9, 2, 5, 1),
    "image": video(1, 6, 7, 2, video=False),
    "tiled": tiled(),
    "one token": video(1, 1, 1, video=False),
    "one token a frame": video(6, 1, 1),
    "one frame": video(1, 3, 4),
    "constant": video(features=torch.ones(48, D)),
    "zero": video(features=torch.zeros(48, D), attention=torch.zeros(2, 48)),
    "nan": video(features=torch.full((48, D), math.nan)),
    "one nan": video(features=torch.randn(48, D).index_fill_(0, torch.tensor([7]), math.nan)),
    "huge": video(features=torch.randn(48, D) * 1e18),
    "bf16": video(features=torch.randn(48, D).bfloat16(), question=torch.randn(5, D).bfloat16()),
    "newline": video(protected=torch.arange(48) == 47),
}


@pytest.mark.parametrize("method", {method.name: method for method in methods.OUTER}.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["video", "image", "one token", "still"])
def test_the_smallest_keep_leaves_a_token(method: Any, name: str) -> None:
    """Also where no frame has a floor, and where nothing in the video is new."""
    tokens = fit(method, ITEMS["constant" if name == "still" else name])
    assert len(dataclasses.replace(method, keep=1e-9, floor=0).select(tokens)) >= 1


@pytest.mark.parametrize("method", methods.OUTER, ids=repr)
@pytest.mark.parametrize("name", ["video", "long", "image", "bf16", "newline"])
@torch.no_grad()
def test_some_rows_at_a_time_keep_what_all_at_once_keep(
    method: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = fit(method, ITEMS[name])
    if name == "newline" and (method.video_only or isinstance(method, FlashVID)):
        pytest.skip("its frames are not whole")
    at_once, worked = method.select(tokens), []
    monkeypatch.setattr(cache_parts, "CACHED", 3 * D)
    whole = cache_parts.parts
    monkeypatch.setattr(cache_parts, "parts", lambda *size: worked.append(size) or whole(*size))
    assert method.select(tokens).equal(at_once)
    assert worked or not isinstance(method, (VidCom2, DTD, EVS, CDPruner, MMTok)) or not tokens.video


@pytest.mark.parametrize("method", methods.OUTER, ids=repr)
@pytest.mark.parametrize("name", ITEMS)
def test_a_kept_set_is_a_kept_set(method: Any, name: str) -> None:
    """Ascending, distinct, exactly the budget, every frame's floor, every separator; the same when asked again."""
    tokens = fit(method, ITEMS[name])
    if name == "newline" and (method.video_only or isinstance(method, FlashVID)):
        # LLaVA-OneVision's one newline stands after the frames: 47 tokens do not fill 4 frames
        tokens = dataclasses.replace(
            tokens, **{k: cat_newline(getattr(tokens, k)) for k in ("features", "attention", "positions", "rope")},
            frame=torch.cat([tokens.frame, tokens.frame[-1:]]), protected=torch.arange(49) == 48,
        )  # fmt: skip
    kept = method.select(tokens)
    assert kept.dtype == torch.int64
    assert (kept[1:] > kept[:-1]).all()
    assert int(kept[0]) >= 0 and int(kept[-1]) < tokens.n
    protected = torch.zeros(tokens.n, dtype=torch.bool) if tokens.protected is None else tokens.protected
    assert set(protected.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    if method.video_only and not tokens.video:
        assert len(kept) == tokens.n
    elif not isinstance(method, DTD):  # whose count is the video's own affair
        n = int((~protected).sum())
        least = method.floor * tokens.frames
        if isinstance(method, EVS):
            least = n // tokens.frames + method.floor * (tokens.frames - 1)
        assert len(kept) - int(protected.sum()) == min(n, max(1, round(method.keep * n), least))
    if not isinstance(method, (Uniform, HiRED, IVCPrune)):
        per_frame = torch.bincount(tokens.frame[kept], minlength=tokens.frames)
        assert (per_frame >= method.floor).all()
    assert torch.equal(kept, method.select(tokens))


def cat_newline(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return torch.cat([x, x[-1:]]) if x.shape[0] == 48 else torch.cat([x, x[..., -1:]], -1)


@pytest.mark.parametrize("method", methods.OUTER, ids=repr)
def test_keep_one_keeps_everything(method: Any) -> None:
    tokens = fit(method, ITEMS["video"])
    assert torch.equal(dataclasses.replace(method, keep=1.0).select(tokens), torch.arange(tokens.n))


@pytest.mark.parametrize("method", methods.OUTER, ids=repr)
def test_a_floor_above_the_budget_grows_it(method: Any) -> None:
    tokens = fit(method, ITEMS["video"])
    kept = dataclasses.replace(method, keep=0.05, floor=3).select(tokens)
    assert len(kept) >= 12
    if not isinstance(method, (Uniform, IVCPrune, HiRED)):
        assert (torch.bincount(tokens.frame[kept], minlength=4) >= 3).all()


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, True, "half"])
def test_a_keep_outside_its_range_is_refused_in_one_line(keep: Any) -> None:
    with pytest.raises(UserError, match=r"keep=.*(outside \(0, 1\]|a finite number)") as e:
        VidCom2(keep=keep)
    assert "\n" not in str(e.value)


def test_shares_of_a_tower() -> None:
    asked = {None: None, 0: 0, 7: 7, "auto": 8, 0.5: 16, 0.99: 32, 0.001: 1}
    assert {k: tower_block(k, 32) for k in asked} == asked


@pytest.mark.parametrize("block", [-1, 1.0, 0.0, -0.25, 1.5, "half", True])
def test_a_tower_block_that_cannot_be_is_refused(block: Any) -> None:
    with pytest.raises(UserError, match="after_block="):
        VidCom2(after_block=block)


@pytest.mark.parametrize("method", [VisionZip, HiRED, CDPruner, MMTok, FlashVID, IVCPrune])
def test_what_is_not_known_inside_the_tower_is_refused(method: Any) -> None:
    with pytest.raises(UserError, match="after_block=None"):
        method(after_block=1)


# -- the selection that all share --------------------------------------------------------------------------------------


def test_ranked_serves_quotas_then_floors_then_the_rest() -> None:
    score = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    frame = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert sorted(ranked(score, frame, 3, 0, None).tolist()) == [0, 1, 2]
    assert sorted(ranked(score, frame, 3, 1, None).tolist()) == [0, 1, 7]
    assert sorted(ranked(score, frame, 4, 1, torch.tensor([1, 3])).tolist()) == [0, 5, 6, 7]
    assert sorted(ranked(score, frame, 7, 0, torch.tensor([9, 1])).tolist()) == [0, 1, 2, 3, 5, 6, 7]


def test_largest_remainder_sums_exactly() -> None:
    gen = torch.Generator().manual_seed(0)
    for total in (0, 1, 7, 100):
        parts_ = largest_remainder(torch.rand(6, generator=gen), total)
        assert int(parts_.sum()) == total and (parts_ >= 0).all()
    assert largest_remainder(torch.tensor([1.0, 1.0, 2.0]), 4).tolist() == [1, 1, 2]


# -- baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 5, 8, 13])
def test_uniform_is_even_and_out_of_step_with_the_grid(width: int) -> None:
    kept = Uniform(keep=0.25).select(video(1, 8, width))
    assert len(kept) == 2 * width
    rows, columns = torch.bincount(kept // width, minlength=8), torch.bincount(kept % width, minlength=width)
    assert rows.view(4, 2).sum(1).min() >= 1
    assert rows.max() <= width // 4 + 2
    assert columns.min() >= 1
    assert columns.max() <= 4


def test_random_follows_its_seed_only() -> None:
    a, b = video(seed=1), video(seed=2)
    assert torch.equal(Random(keep=0.5).select(a), Random(keep=0.5).select(b))
    assert not torch.equal(Random(keep=0.5).select(a), Random(keep=0.5, seed=1).select(a))


# -- change over time --------------------------------------------------------------------------------------------------


def still_but(changed: list[int], t: int = 3) -> VisualTokens:
    """t frames of 12 tokens, all the same but for the tokens `changed` (indices into the whole video)."""
    tokens = video(t, 3, 4)
    tokens.features = tokens.features[:12].repeat(t, 1)
    tokens.features[changed] *= -1
    return tokens


def test_evs_keeps_the_first_frame_and_what_moved() -> None:
    kept = EVS(keep=15 / 36, floor=0).select(still_but([17, 30, 31]))
    assert kept.tolist() == [*range(12), 17, 30, 31] or kept.tolist() == [*range(12), 17, 29, 30]
    assert {17, 30} <= set(kept.tolist())


def test_evs_leaves_images_whole() -> None:
    assert len(EVS(keep=0.2).select(ITEMS["image"])) == 42


def test_dtd_keeps_just_what_changed_however_much_is_allowed() -> None:
    tokens = still_but([30, 31])
    for keep in (0.5, 0.99):
        assert DTD(keep=keep, floor=0).select(tokens).tolist() == [*range(12), 30, 31]
    assert len(DTD(keep=0.5, floor=1).select(tokens)) == 15  # the still frame keeps its floor
    assert len(DTD(keep=0.4, floor=0, threshold=1.0).select(tokens)) == 14  # threshold 1: the ceiling decides


def test_dtd_is_causal() -> None:
    whole, first = video(6, 3, 4, 3), video(6, 3, 4, 3)
    method = DTD(keep=0.99, threshold=0.0)
    half = dataclasses.replace(first, features=first.features[:36], frame=first.frame[:36], grid=(3, 3, 4))
    a, b = method.select(whole), method.select(half)
    assert torch.equal(a[a < 36], b)


# -- VidCom2 -----------------------------------------------------------------------------------------------------------


def test_vidcom2_keeps_the_outlier_of_each_frame() -> None:
    x = normalize(torch.ones(48, D) + 0.01 * torch.randn(48, D), dim=-1)
    odd = [5, 12 + 2, 24 + 9, 36 + 11]
    x[odd] = normalize(torch.randn(4, D), dim=-1)
    assert VidCom2(keep=4 / 48, channels=1.0).select(video(features=x)).tolist() == odd


def test_vidcom2_gives_the_unusual_frame_more() -> None:
    x = normalize(torch.ones(48, D) + 0.05 * torch.randn(48, D), dim=-1)
    x[24:36] = normalize(torch.randn(12, D), dim=-1)
    kept = VidCom2(keep=0.25, channels=1.0).select(video(features=x))
    counts = torch.bincount(kept // 12, minlength=4)
    assert counts[2] == counts.max() and counts[2] > counts[0]
    assert counts.sum() == 12 and (counts >= 1).all()


def test_vidcom2_reads_the_quiet_channels() -> None:
    """Channels of large variance are left out: noise there does not change the kept set."""
    tokens = video()
    tokens.features[:, 6:] *= 0.1
    noisy = dataclasses.replace(tokens, features=tokens.features.clone())
    noisy.features[:, :6] = torch.randn(48, 6) * 5
    assert torch.equal(VidCom2(keep=0.3).select(tokens), VidCom2(keep=0.3).select(noisy))


# -- diversity ---------------------------------------------------------------------------------------------------------


def brute_maxmin(x: Tensor, k: int) -> list[int]:
    """Farthest-point selection, one distance at a time."""
    n = len(x)
    d = [[1 - float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in range(n)] for i in range(n)]
    chosen = [max(range(n), key=lambda i: min(d[i][j] for j in range(n) if j != i))]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(d[i][j] for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(4))
def test_maxmin_equals_brute_force(seed: int) -> None:
    tokens = video(1, 4, 6, seed, video=False)
    for k in (1, 2, 5, 11):
        assert MaxMin(keep=k / 24).select(tokens).tolist() == brute_maxmin(tokens.features.double(), k)


def clusters(groups: int = 6, each: int = 8) -> Tensor:
    return normalize(torch.eye(D)[:groups].repeat_interleave(each, 0) + 0.01 * torch.randn(groups * each, D), dim=-1)


@pytest.mark.parametrize("method", [MaxMin, CDPruner, MMTok], ids=lambda m: m.name)
def test_diverse_sets_take_one_of_each_cluster(method: Any) -> None:
    x = clusters()
    even = x.mean(0, keepdim=True)  # a question that leans to no cluster
    options = {"theta": 0.0} if method is CDPruner else {}
    kept = method(keep=6 / 48, floor=0, **options).select(video(features=x, question=even))
    assert sorted((kept // 8).tolist()) == list(range(6))


def picks(left: Tensor) -> list[int]:
    """The picks in their order, of what a greedy rule returns."""
    return sorted((left < 0).nonzero()[:, 0].tolist(), key=lambda i: -float(left[i]))


def test_most_probable_equals_determinants() -> None:
    """Every step takes the token that makes the kernel's principal minor largest."""
    x = torch.randn(14, 9, dtype=torch.float64)
    kernel = x @ x.T
    chosen: list[int] = []
    for _ in range(7):
        minors = {
            i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in range(14) if i not in chosen
        }
        chosen.append(max(minors, key=minors.__getitem__))
    for left in (greedy.most_probable_rows(x, kernel.diagonal(), 7), greedy.most_probable_plain(kernel, 7)):
        assert picks(left) == chosen


def test_cdpruner_leans_to_the_question() -> None:
    x = clusters()
    asked = x[16:17]
    kept = CDPruner(keep=0.25, floor=0, theta=4.0).select(video(features=x, question=asked))
    blind = CDPruner(keep=0.25, floor=0, theta=0.0).select(video(features=x, question=asked))
    assert (kept // 8 == 2).sum() > (blind // 8 == 2).sum()


def brute_coverage(matches: Tensor, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        value = {i: float(matches[:, [*chosen, i]].amax(1).sum()) for i in range(matches.shape[1]) if i not in chosen}
        chosen.append(max(value, key=value.__getitem__))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(3))
def test_mmtok_equals_brute_force(seed: int) -> None:
    method, tokens = MMTok(keep=0.25, floor=0), video(seed=seed)
    tokens.features, tokens.question = tokens.features.double(), tokens.question.double()
    assert method.select(tokens).tolist() == brute_coverage(method.matches(tokens).double(), 12)


def test_mmtok_answers_the_question_first() -> None:
    x = clusters()
    kept = MMTok(keep=1 / 48, floor=0, alpha=0.0).select(video(features=x, question=x[20:21]))
    assert kept.tolist() == [20]


# -- tower attention ---------------------------------------------------------------------------------------------------


def test_visionzip_keeps_the_most_attended() -> None:
    attention = torch.zeros(48)
    attention[[3, 17, 30, 41, 42]] = 1
    assert VisionZip(keep=5 / 48).select(video(attention=attention)).tolist() == [3, 17, 30, 41, 42]


def test_visionzip_merges_by_likeness() -> None:
    x = torch.zeros(8, D)
    x[:, 0] = 1
    x[[2, 5], :2] = torch.tensor([0.0, 2.0])
    attention = torch.tensor([9.0, 8, 0, 0, 0, 0, 0, 0])
    tokens = video(1, 2, 4, features=x, attention=attention)
    method = VisionZip(keep=0.5, contextual=0.5)
    kept = method.select(tokens)
    assert kept.tolist() == [0, 1, 2, 5]  # two dominant, then evenly spaced in 2 ... 7
    merged = method.merged(tokens, kept)
    assert torch.equal(merged[:2], x[:2])
    # 3, 4, 6 and 7 point along axis 0: equally far from both contextual tokens, so all go to the first of them
    assert torch.equal(merged[2], x[2] + x[3]) and torch.equal(merged[3], x[5])


def test_visionzip_merging_is_refused_under_mrope() -> None:
    tokens = fit(VisionZip(), video(positions=torch.zeros(3, 48, dtype=torch.long)))
    with pytest.raises(Unsupported, match="contextual=0"):
        VisionZip(keep=0.5, contextual=0.2).select(tokens)


def test_hired_gives_tiles_by_how_many_of_the_most_attended_base_tokens_they_hold() -> None:
    tokens = tiled()  # base 4 x 4, mosaic 8 x 6: two rows of two tiles
    early = torch.zeros(tokens.n)
    early[:16] = torch.tensor([[1.0, 1, 0, 0]] * 2 + [[0, 0, 3, 3]] * 2).flatten()
    attention = torch.stack([early, torch.rand(tokens.n)])
    kept = HiRED(keep=0.5, alpha=0.5).select(dataclasses.replace(tokens, attention=attention))
    body = (~tokens.protected).nonzero()[:, 0]
    inside = torch.isin(body, kept)
    assert inside.sum() == 32 and inside[:16].sum() == 16
    counts = torch.bincount(parts(8, 6, 2, 2), weights=inside[16:].double(), minlength=4).tolist()
    # half of the base view is marked: four tokens in tile 0 and four in tile 3, however much more those are attended
    assert counts == [8, 0, 0, 8]
    assert torch.isin(tokens.protected.nonzero()[:, 0], kept).all()
    kept = HiRED(keep=0.5, alpha=1.0).select(dataclasses.replace(tokens, attention=attention))
    assert len(kept) == 32 + int(tokens.protected.sum())  # the base view is full: the rest goes to the tiles


def test_hired_without_tiles_is_the_last_layer_ranking() -> None:
    attention = torch.rand(2, 42)
    kept = HiRED(keep=0.5).select(video(1, 6, 7, video=False, attention=attention))
    assert torch.equal(kept, attention[1].topk(21).indices.sort().values)


# -- V-CAST, FlashVID, IVC-Prune ---------------------------------------------------------------------------------------


def test_curvature_is_one_minus_the_cosine_of_the_turn() -> None:
    right, up = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    path = torch.stack([0 * right, right, 2 * right, 2 * right + up, right + up, 2 * right + up])
    torch.testing.assert_close(curvature(path), torch.tensor([1.0, 0, 1, 1, 2, 1]))


def test_vcast_budgets_follow_the_curvature() -> None:
    frames = torch.eye(D)[:4][[0, 1, 2, 1]]  # into 2 and straight back: the sharpest turn
    x = frames.repeat_interleave(12, 0) + 0.01 * torch.randn(48, D)
    counts = torch.bincount(VCast(keep=0.5, temperature=0.2).select(video(features=x)) // 12, minlength=4)
    assert counts[2] == counts.max() and counts.sum() == 24


def test_vcast_keeps_the_unusual_and_the_strong() -> None:
    x = torch.ones(12, D) + 0.001 * torch.randn(12, D)
    x[4] = torch.tensor([1.0, -1] * 6)
    x[7] *= 3
    assert VCast(keep=2 / 12).select(video(1, 3, 4, features=x)).tolist() == [4, 7]


def test_flashvid_follows_what_moves() -> None:
    """A still scene in which one thing hops about: its tree has one root, so one token of it is enough."""
    scene = normalize(torch.randn(12, 40), dim=-1)
    x = scene.repeat(4, 1).view(4, 12, 40)
    for f, place in enumerate([2, 6, 9, 4]):
        x[f, place] = scene[2]
    tokens = video(features=x.view(48, 40), attention=torch.ones(48))
    kept = FlashVID(keep=0.25, floor=0, alpha=0.01, segments=1, cut=-1.0).select(tokens)
    # roots are the first frame and what comes back from behind the thing that hops: 6 in frame 2, 9 in frame 3
    assert set(kept.tolist()) <= {*range(12), 24 + 6, 36 + 9}


def test_flashvid_segments_cut_links() -> None:
    tokens = fit(FlashVID(), video(features=torch.randn(12, D).repeat(4, 1)))
    whole = FlashVID(keep=0.25, floor=0, alpha=0.01, segments=1).select(tokens)
    cut = FlashVID(keep=0.25, floor=0, alpha=0.01, segments=4).select(tokens)
    assert (whole < 12).all() and not (cut < 12).all()


def test_attended_and_diverse_is_maxmin_under_even_attention() -> None:
    x = normalize(torch.randn(2, 10, D), dim=-1)
    distance = 1 - x @ x.transpose(1, 2)
    taken = attended_and_diverse(distance, torch.ones(2, 10), 4)
    for f in range(2):
        chosen = [0]
        while len(chosen) < 4:
            gap = (1 - x[f] @ x[f, chosen].T).amin(1)
            gap[chosen] = -1
            chosen.append(int(gap.argmax()))
        assert taken[f].nonzero()[:, 0].tolist() == sorted(chosen)
    assert attended_and_diverse(distance, torch.eye(10)[:2] + 0.001, 1).nonzero()[:, 1].tolist() == [0, 1]


def test_ivcprune_keeps_the_axes_whatever_it_wraps() -> None:
    rope = torch.zeros(2, 48)
    rope[0, [1, 8, 20, 33, 40]] = 1
    rope[1, [2, 9, 21, 34, 41]] = 1
    for inner in (VidCom2(), MaxMin(), CDPruner(), VCast()):
        method = IVCPrune(keep=0.5, prune=inner)
        kept = method.select(fit(method, video(rope=rope)))
        assert {1, 8, 20, 33, 40, 2, 9, 21, 34, 41} <= set(kept.tolist())
        alone = dataclasses.replace(inner, keep=0.29).select(fit(inner, video(rope=rope)))
        assert set(alone.tolist()) <= set(kept.tolist()), "the wrapped pruner's best are there too"


def test_evs_leaves_images_to_the_pruner_of_stills() -> None:
    clip = video()
    still = dataclasses.replace(clip, video=False)
    both = EVS(keep=0.3, stills=VidCom2(keep=0.5))
    assert torch.equal(both.select(clip), EVS(keep=0.3).select(clip))
    assert torch.equal(both.select(still), VidCom2(keep=0.5).select(still))
    assert EVS(keep=0.3).select(still).shape[0] == still.n
    assert Plan.from_json(Plan(prune=both).json()) == Plan(prune=both)
    with pytest.raises(UserError, match="features"):
        EVS(stills=CDPruner())


def test_ivcprune_asks_for_what_it_wraps() -> None:
    assert set(IVCPrune(prune=CDPruner()).needs) == {"features", "question", "rope"}
    assert IVCPrune(prune=EVS()).video_only and not IVCPrune().video_only
    with pytest.raises(UserError, match="wraps another pruner"):
        IVCPrune(prune="vidcom2")  # type: ignore[arg-type]


def test_small_media_pass_whole() -> None:
    """`least` tokens stay: an item with no more of them is not pruned, a larger one keeps that many at least."""
    for method in (VidCom2, Uniform, MaxMin, EVS, DTD):
        pruner = method(keep=0.25, least=20)
        assert torch.equal(pruner.select(video(t=2, h=3, w=3)), torch.arange(18))
        assert len(pruner.select(video(t=4, h=3, w=4))) >= 20
        assert len(method(keep=0.25, least=3).select(video(t=4, h=3, w=4))) == len(
            method(keep=0.25).select(video(t=4, h=3, w=4))
        )
    with pytest.raises(UserError, match="least=-1"):
        VidCom2(least=-1)


@pytest.mark.parametrize(("name", "kept"), [("balanced", 410), ("fast", 384)])
def test_presets_prune_what_is_large(name: str, kept: int) -> None:
    pruner = preset(name).prune
    assert len(pruner.select(video(t=4, h=16, w=16))) == kept
    assert len(pruner.select(video(t=1, h=16, w=16))) == 256
