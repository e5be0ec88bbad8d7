"""Window plans cover every frame; augmentation keeps its promises; stitching gives every frame once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vnaw_pipeline.config import MaskingConfig, PredictConfig, SkipConfig, WindowConfig
from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS
from vnaw_pipeline.windows import plan as planning
from vnaw_pipeline.windows.augment import (
    MaskWords,
    channel_masks,
    draw_mask_words,
    erase_channels,
    mask_input,
    skip_frames,
)
from vnaw_pipeline.windows.batches import gather_windows
from vnaw_pipeline.windows.plan import (
    balanced_weights,
    draw_by_weight,
    labelled_share,
    plan_windows,
    window_labels,
    window_rows,
)

P = 20


def bank_of(lengths: list[int], width: int = 5) -> FeatureBank:
    """Embeddings that carry their own row number in channel 0; every seventh frame has no face."""
    total = sum(lengths)
    rows = torch.arange(total, dtype=torch.float16)
    embeddings = torch.cat([rows[:, None].expand(-1, width), torch.zeros(1, width, dtype=torch.float16)])
    valid = torch.cat([torch.arange(total) % 7 != 3, torch.tensor([False])])
    embeddings = embeddings * valid[:, None]
    first = torch.tensor([0, *lengths]).cumsum(0)
    return FeatureBank([f"v{i}" for i in range(len(lengths))], embeddings, valid, first)


@given(st.integers(1, 2_000), st.integers(1, 150), st.data())
def test_windows_cover_every_frame(num_frames: int, window_frames: int, data: st.DataObject) -> None:
    """A public code base loops over n - width starts and never makes the last window."""
    stride = data.draw(st.integers(1, window_frames))
    starts = plan_windows(torch.tensor([num_frames]), window_frames, stride).start.tolist()
    covered = {f for start in starts for f in range(start, start + window_frames)}
    assert set(range(num_frames)) <= covered
    assert starts == sorted(set(starts))
    assert starts[-1] == max(0, num_frames - window_frames)


def test_window_starts_example_and_gap() -> None:
    plan = plan_windows(torch.tensor([250, 73, 200]), 100, 100)
    assert plan.video.tolist() == [0, 0, 0, 1, 2, 2]
    assert plan.start.tolist() == [0, 100, 150, 0, 0, 100]
    blocks = plan.blocks(4)
    assert [len(block) for block in blocks] == [4, 2]
    assert torch.equal(torch.cat([block.start for block in blocks]), plan.start)
    with pytest.raises(ValueError, match="leaves gaps"):
        plan_windows(torch.tensor([250]), 100, 101)


def test_rows_stop_at_the_end_of_the_video() -> None:
    bank = bank_of([8, 30])
    plan = plan_windows(bank.num_frames, P, P)
    rows = window_rows(plan, bank.first, P, bank.zero_row)
    assert plan.video.tolist() == [0, 1, 1]
    assert rows[0].tolist() == [*range(8), *[38] * 12]
    assert rows[2].tolist() == list(range(18, 38))
    batch = gather_windows(bank, {}, rows, plan.video)
    assert batch.frame_index[0].tolist() == [*range(8), *[-1] * 12]
    assert not batch.valid[0, 8:].any()
    assert (batch.embeddings[0, 8:] == 0).all()


def test_window_labels_majority_ties_and_none() -> None:
    labels = torch.tensor(
        [
            [0, 0, 1, 2, -1],  # most
            [2, 1, 0, 1, 2],  # 1 and 2 tie; 1 lies nearer to the centre
            [0, -1, -1, -1, 0],
            [-1, -1, -1, -1, -1],
            [1, 0, -1, 0, 1],
        ]
    )
    assert window_labels(labels, 3).tolist() == [0, 1, 0, IGNORE_LABEL, 0]


def test_labelled_share_counts_frames_of_the_video_only() -> None:
    labels = torch.tensor([[1, -1, -1, -1], [1, 1, -1, -1]])
    inside = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert labelled_share(labels != IGNORE_LABEL, inside).tolist() == [0.5, 0.5]


def test_balanced_weights_draw_classes_alike() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [3] + [IGNORE_LABEL] * 5)
    weights = balanced_weights(labels, 4)
    by_class = [float(weights[labels == c].sum()) for c in (0, 1, 3)]
    assert by_class == pytest.approx([1.0, 1.0, 1.0])
    assert (weights[labels == IGNORE_LABEL] == 0).all()
    rooted = balanced_weights(labels, 4, power=0.5)
    assert [float(rooted[labels == c].sum()) for c in (0, 1, 3)] == pytest.approx([90**0.5, 3.0, 1.0])
    assert (rooted[labels == IGNORE_LABEL] == 0).all()


@pytest.mark.parametrize("mode", ["none", "drop", "mask", "resample"])
@given(seed=st.integers(0, 1_000))
def test_labels_travel_with_their_frames(mode: str, seed: int) -> None:
    """Whatever is skipped, a position holds a frame of its own video together with that frame's label, or nothing."""
    bank = bank_of([8, 30, 55])
    row_labels = torch.arange(94) % 8
    row_labels[-1] = IGNORE_LABEL
    plan = plan_windows(bank.num_frames, P, 10)
    skip = SkipConfig.model_validate({"mode": mode})
    rows = skip_frames(plan, bank.first, row_labels >= 0, P, skip, torch.Generator().manual_seed(seed))
    batch = gather_windows(bank, {"expr8": row_labels}, rows, plan.video)
    labels = batch.labels["expr8"]
    inside = batch.frame_index >= 0
    frame_rows = bank.first[batch.video][:, None] + batch.frame_index
    assert (labels[inside] == frame_rows[inside] % 8).all()
    assert (labels[~inside] == IGNORE_LABEL).all()
    assert (batch.frame_index < bank.num_frames[batch.video][:, None]).all()
    seen = inside & batch.valid
    assert (batch.embeddings[seen][:, 0] == frame_rows[seen].to(torch.float16)).all()
    assert (labels != IGNORE_LABEL).any(dim=1).all(), "a labelled frame survives in every window"
    ordered = batch.frame_index.cummax(dim=1).values
    assert (ordered == batch.frame_index)[inside].all(), "frames stay in order"


def test_skipping_drops_the_share_and_leaves_no_gap() -> None:
    bank = bank_of([4_000])
    labelled = torch.ones(4_001, dtype=torch.bool)
    labelled[-1] = False
    plan = plan_windows(bank.num_frames, 100, 100)
    for mode in ("drop", "mask"):
        skip = SkipConfig.model_validate({"mode": mode, "share": [0.2, 0.4]})
        rows = skip_frames(plan, bank.first, labelled, 100, skip, torch.Generator().manual_seed(0))
        kept = rows != bank.zero_row
        share = 1 - kept.float().mean(dim=1)
        # 40 windows of 100 frames: the mean is .30 with a standard error below .012 (the draw and the share's range).
        assert float(share.mean()) == pytest.approx(0.30, abs=0.04)
        if mode == "drop":
            assert (kept[:, :-1] >= kept[:, 1:]).all()
        else:
            assert (rows[kept] == window_rows(plan, bank.first, 100, bank.zero_row)[kept]).all()


@pytest.mark.parametrize("mode", ["drop", "mask", "resample"])
@given(seed=st.integers(0, 500), place=st.integers(0, P - 1))
def test_the_only_labelled_frame_survives(mode: str, seed: int, place: int) -> None:
    bank = bank_of([P])
    labelled = torch.arange(P + 1) == place
    skip = SkipConfig.model_validate({"mode": mode, "share": [0.9, 0.95], "speed": [0.3, 2.0]})
    plan = plan_windows(bank.num_frames, P, P)
    rows = skip_frames(plan, bank.first, labelled, P, skip, torch.Generator().manual_seed(seed))
    assert place in rows[0].tolist()


def test_resampling_changes_speed_within_its_range() -> None:
    bank = bank_of([1_000])
    skip = SkipConfig(mode="resample", speed=(0.6, 1.4))
    plan = plan_windows(bank.num_frames, 100, 10)
    rows = skip_frames(
        plan, bank.first, torch.ones(1_001, dtype=torch.bool), 100, skip, torch.Generator().manual_seed(0)
    )
    span = rows[:, -1] - rows[:, 0] + 1
    assert int(span.min()) < 75
    assert int(span.max()) > 125
    assert int(span.min()) >= 59
    assert int(span.max()) <= 141


@given(st.integers(0, 100), st.integers(1, 64), st.floats(0, 0.9))
def test_exactly_the_share_of_channels_is_erased(seed: int, width: int, share: float) -> None:
    keep = channel_masks(7, width, share, torch.Generator().manual_seed(seed))
    assert ((~keep).sum(dim=1) == round(share * width)).all()


def test_every_channel_is_erased_as_often_and_with_every_other() -> None:
    """20,000 masks: shares of channels have a standard error of .003, those of pairs (3/12 of 2/11) of .0015."""
    erased = (~channel_masks(20_000, 12, 0.25, torch.Generator().manual_seed(0))).double()
    together = erased.T @ erased / len(erased)
    torch.testing.assert_close(together.diagonal(), torch.full((12,), 0.25).double(), atol=0.015, rtol=0)
    pairs = together[~torch.eye(12, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 3 / 12 * 2 / 11), atol=0.0075, rtol=0)


@given(st.integers(0, 100), st.integers(1, 64), st.floats(0, 0.9))
def test_the_same_channels_are_erased_in_all_frames_of_a_window(seed: int, width: int, share: float) -> None:
    """A set drawn anew for each frame would leave every channel to be read in some frame (a fault of public codes)."""
    keep = channel_masks(3, width, share, torch.Generator().manual_seed(seed))
    zeroed = erase_channels(torch.ones(3, 9, width, dtype=torch.float16), keep) == 0
    assert (zeroed == zeroed[:, :1]).all()
    assert (zeroed.sum(dim=2) == round(share * width)).all()


def test_masking_zeroes_frames_or_elements_with_its_chance_and_nothing_else() -> None:
    """20,000 frames at a chance of .3 have a standard error of .003; elements an even smaller one."""
    frames = torch.randn(200, 100, 8).half()
    words = draw_mask_words(200, 100, 8, torch.Generator().manual_seed(0))
    for mode in ("frames", "elements"):
        masking = MaskingConfig.model_validate({"mode": mode, "probability": 0.3})
        masked = mask_input(frames.clone(), words, masking)
        gone = (masked == 0) & (frames != 0)
        assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.02)
        assert torch.equal(masked[~gone], frames[~gone]), "what stays is not scaled"
        assert (gone.all(dim=2) == gone.any(dim=2)).all() == (mode == "frames")
        assert not torch.equal(gone[0], gone[1]), "each window has a mask of its own"
    assert torch.equal(mask_input(frames.clone(), words, MaskingConfig()), frames)


def test_masked_elements_know_nothing_of_one_another() -> None:
    """Two in a row, two in a column, and four at the corners of a rectangle, whose words are tied to one another: for
    independent ones at a chance of .5, the shares of equal pairs and of even numbers of four are .5. Over 200 windows
    of 3,200 elements the standard error is below .001, ten times that where elements are shared between pairs."""
    words = draw_mask_words(200, 100, 32, torch.Generator().manual_seed(1))
    gone = mask_input(torch.ones(200, 100, 32).half(), words, MaskingConfig(mode="elements")) == 0
    in_row, in_column = gone[:, :, 1:] ^ gone[:, :, :-1], gone[:, 1:] ^ gone[:, :-1]
    corners = in_row[:, 1:] ^ in_row[:, :-1]
    for differ in (in_row, in_column, corners):
        assert float(differ.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(gone.double().mean(dim=(0, 1)).sub(0.5).abs().max()) < 0.05, "no channel is favoured"


@given(st.integers(0, 1_000), st.integers(1, 6))
def test_masks_do_not_depend_on_how_a_step_is_split(seed: int, cut: int) -> None:
    masking = MaskingConfig(mode="elements")
    words = draw_mask_words(7, 5, 4, torch.Generator().manual_seed(seed))
    parts = [
        mask_input(torch.ones(len(frames), 5, 4).half(), MaskWords(frames, channels), masking)
        for frames, channels in zip(*(of.split([cut, 7 - cut]) for of in words), strict=True)
    ]
    assert torch.equal(torch.cat(parts), mask_input(torch.ones(7, 5, 4).half(), words, masking))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 9))
def test_stitching_gives_every_frame_its_own_answer(lengths: list[int], stride: int, processes: int) -> None:
    """A model that only reads its frame's embedding must come back frame by frame, whatever the windows are."""
    bank = bank_of(lengths, width=6)
    tasks = [TASKS["negative4"], TASKS["va"]]
    windows = WindowConfig(window_frames=P, predict_stride=stride)

    def forward(embeddings: torch.Tensor, valid: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        assert len(places), "no model takes a batch of nothing, as a process without a window would have it"
        assert places.unique().tolist() == [*range(len(embeddings))], (
            "a frame comes once, however many windows it is in"
        )
        assert not embeddings[~valid].any()
        assert valid[embeddings[:, 0] > 0].all()
        return answers(embeddings)[places]

    def answers(embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.float() * torch.tensor([0.01, 0.0, -0.01, 0.02, 0.01, -0.01])

    shares = []

    def run(index: int) -> torch.Tensor:
        def collect(total: torch.Tensor) -> torch.Tensor:
            shares.append(total)
            return total

        return stitch_predictions(
            forward,
            bank,
            tasks,
            windows,
            PredictConfig(batch_windows=4),
            process_index=index,
            num_processes=processes,
            reduce_sum=collect,
        )

    for index in range(processes):
        run(index)
    total = sum(shares[0::2])
    counts = sum(shares[1::2])
    found = (total / counts[:, None])[:-1]
    logits = answers(bank.embeddings)[:-1]
    wanted = torch.cat([logits[:, :4].softmax(dim=1), logits[:, 4:].tanh()], dim=1)
    torch.testing.assert_close(found, wanted)


def test_each_window_is_gathered_in_the_view_that_was_drawn_for_it() -> None:
    plain = torch.arange(7.0)[:, None].half()
    plain[-1] = 0
    bank = FeatureBank(
        ["a"], plain, torch.ones(7).bool(), torch.tensor([0, 6]), {"mirror": -plain, "erase0": 10 * plain}
    )
    rows = torch.tensor([[1, 2], [3, 6], [4, 5]])
    views, drawn = ["erase0", "plain", "mirror"], [2, 0, 1]
    found = gather_windows(bank, {}, rows, torch.zeros(3, dtype=torch.int64), views, drawn)
    assert found.embeddings[..., 0].tolist() == [[-1, -2], [30, 0], [4, 5]]


@pytest.mark.parametrize("most", [10, 3], ids=["torch's", "ours"])
def test_draws_are_as_often_as_they_weigh(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MOST_WEIGHTS", most)
    weights = torch.tensor([0, 1, 3, 0, 4, 0], dtype=torch.float64)
    counts = torch.bincount(draw_by_weight(weights, 20_000, torch.Generator().manual_seed(0)), minlength=6)
    torch.testing.assert_close(counts / 20_000, (weights / 8).float(), atol=0.015, rtol=0)  # four deviations
    assert not counts[weights == 0].any()
