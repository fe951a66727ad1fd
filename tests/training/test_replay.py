"""Rollouts of a run paid anew, and its loss computed anew, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from looktwice.cli import main
from looktwice.config import GRPOConfig
from looktwice.errors import ConfigError
from looktwice.model import weights
from looktwice.training.replay import replay_config, replay_table, replayed, run_of

SETTINGS = {"max_steps": 2, "learning_rate": 1e-2, "beta": 0.1, "num_iterations": 2}


@pytest.fixture
def trained(run) -> tuple[Path, list[dict[str, float]]]:
    """A run of two steps, each of two updates that move the policy, and the lines of its log."""
    final, lines = run(**SETTINGS)
    return final.parent, lines


def replay(folder: Path, **given: object) -> list:
    return [*replayed(folder, replay_config(folder, GRPOConfig(**given)))]


def test_an_unchanged_run_has_equal_rewards_and_losses(trained) -> None:
    folder, lines = trained
    steps = replay(folder)
    assert [step.step for step in steps] == [1, 2]
    for step, line in zip(steps, lines):
        was, now = step.rewards["total"]
        assert was == now == pytest.approx(line["reward/total"], abs=1e-8)
        assert step.changed == 0 and step.num_untrained == 0
        assert step.loss == (line["loss"], pytest.approx(line["loss"], rel=1e-5))
        assert line["loss"] != 0 and line["clip/high"] + line["clip/low"] > 0
    assert "→" not in str(replay_table(steps))


def test_no_model_is_loaded(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["train", "--stage", "grpo", "--replay", str(trained[0])]) == 0


def test_other_clip_bounds_and_aggregation_give_the_loss_that_training_would_have(trained) -> None:
    folder, _ = trained
    before, after = replay(folder), replay(folder, epsilon=0.0, epsilon_high=0.0)
    for was, now in zip(before, after):
        assert was.loss[1] != now.loss[1] and was.rewards == now.rewards
    by_sequence = replay(folder, loss_aggregation="seq_mean_token_mean")
    assert [step.loss[1] for step in by_sequence] != [step.loss[1] for step in before]


def test_another_reward_is_paid_for_the_same_text(trained, tmp_path) -> None:
    folder, _ = trained
    (tmp_path / "other.py").write_text(
        "def f(trajectory, solution):\n    return {'accuracy': float(trajectory.completion_ids[0] % 2), 'bonus': 0.5}"
    )
    steps = replay(folder, reward=f"{tmp_path / 'other.py'}:f")
    for step in steps:
        assert step.rewards["bonus"] == (None, 0.5)
        assert step.changed > 0
    assert "→" in str(replay_table(steps))


def test_a_rollout_that_was_left_out_counts_with_the_ratio_one(run, capsys) -> None:
    final, _ = run(reward="nothing", max_steps=1)
    [step] = replay(final.parent, drop_constant_groups=False)
    assert (step.num_untrained, step.loss[1]) == (8, 0.0)
    assert "8 rollouts were not trained on" in replay_table([step]).note


def test_a_kl_term_needs_what_the_run_wrote_of_its_reference(run) -> None:
    final, _ = run(max_steps=1)
    with pytest.raises(ConfigError, match=r"beta is 0\.1, and the run had no reference policy"):
        replay(final.parent, beta=0.1)


def test_a_correction_needs_the_logprobs_before_the_first_of_several_updates(trained) -> None:
    with pytest.raises(ConfigError, match="importance_correction is truncate, and the run had none"):
        replay(trained[0], importance_correction="truncate")


def test_an_entropy_term_is_said_to_be_left_out(run) -> None:
    final, _ = run(max_steps=1, entropy_coef=0.1)
    assert replay_table(replay(final.parent)).note.endswith("leaves out the entropy, of which nothing is written")


def test_a_folder_without_rollouts_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no trajectories/step-N\.jsonl\.zst in it; name the run folder"):
        run_of(tmp_path)


def test_the_folder_of_the_trajectories_stands_for_its_run(trained) -> None:
    assert run_of(trained[0] / "trajectories") == run_of(trained[0]) == trained[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replay", "x"], "--replay pays rollouts of stage 2 anew; add --stage grpo"),
        (["--stage", "grpo", "--replay", "x", "--learning_rate", "1"], "--learning_rate does nothing with --replay"),
        (["--stage", "grpo", "--replay", "x", "--grpo_seed", "1"], "--grpo_seed does nothing"),
        (["--stage", "grpo", "--replay", "x", "--reward", "robus"], 'reward is "robus"'),
        (["--stage", "grpo", "--replay", "x"], "x: no trajectories/"),
    ],
)
def test_what_a_replay_cannot_do_is_refused(words, message, capsys) -> None:
    assert main(["train", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_run_that_keeps_none_writes_none_and_one_that_goes_on_writes_steps_anew(run, tmp_path) -> None:
    final, _ = run("none", max_steps=1, keep_trajectories=0)
    assert not (final.parent / "trajectories").exists()
    settings = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3}
    final, _ = run("whole", **settings)
    written = {path.name: path.read_bytes() for path in (final.parent / "trajectories").iterdir()}
    assert sorted(written) == ["step-1.jsonl.zst", "step-2.jsonl.zst", "step-3.jsonl.zst"]
    run("whole", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-1", overwrite=True, **settings)
    assert {path.name: path.read_bytes() for path in (final.parent / "trajectories").iterdir()} == written
