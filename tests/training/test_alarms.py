"""When an alarm is on, what it says, and what is told of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from looktwice.config import AlarmName
from looktwice.errors import TrainingError
from looktwice.metrics import METRICS, read_log
from looktwice.training.alarms import ALARMS, Watch

NO_SIGNAL = {"group/number": 8.0, "group/all_right": 0.25, "group/all_wrong": 0.75}
SIGNAL = {"group/number": 8.0, "group/all_right": 0.25, "group/all_wrong": 0.5}
GOOD = {
    **SIGNAL,
    "tool/crop_share": 0.9,
    "tool/whole_share": 0.0,
    "reward/total": 2.0,
    "reward/accuracy": 0.7,
    "reward/total_right": 2.75,
    "reward/total_wrong": 0.0,
    "reward/failed": 0.0,
    "rollout/right": 0.7,
    "rollout/num_tokens": 50.0,
    "policy/entropy": 0.3,
    "gap/mean": 0.001,
    "kl/reference": 0.1,
}


def rising(start: float, end: float, name: str) -> list[dict[str, float]]:
    """Ten steps in which a metric goes from one value to another."""
    return [{**GOOD, name: start + (end - start) * step / 9} for step in range(10)]


def test_each_alarm_has_its_sentence_and_its_metric() -> None:
    assert set(ALARMS) == set(get_args(AlarmName)) == {name[6:] for name in METRICS if name.startswith("alarm/")}
    for alarm in ALARMS.values():
        assert "{value}" in alarm.meaning and alarm.mend


@pytest.mark.parametrize("name", ALARMS)
def test_no_alarm_is_on_before_there_is_anything_to_judge_nor_in_a_good_run(name) -> None:
    alarm = ALARMS[name]
    for history in ([], [{}], [{"loss": 1.0}] * 20, [GOOD], [GOOD] * 20):
        assert not alarm.is_on(history, alarm.threshold)


ILL = {
    "no_signal": [NO_SIGNAL] * 3,
    "no_crops": [{"tool/crop_share": 0.05}] * 3,
    "whole_picture": [{"tool/whole_share": 0.6}] * 3,
    "blind_reward": [{"reward/total_right": 1.0, "reward/total_wrong": 1.0}] * 5,
    "format_without_accuracy": [
        {**line, "rollout/right": 0.2, "reward/accuracy": 0.2} for line in rising(0.6, 1.2, "reward/total")
    ],
    "length_drift": rising(20, 180, "rollout/num_tokens"),
    "entropy_collapse": [{**line, "rollout/right": 0.2} for line in rising(0.5, -0.05, "policy/entropy")],
    "engine_gap": [{"gap/mean": 0.06}] * 3,
    "kl_runaway": [{"kl/reference": 1.5}] * 3,
    "failing_rewards": [{"reward/failed": 0.2}] * 3,
}


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_on_when_its_threshold_is_reached_and_says_the_number(name) -> None:
    alarm = ALARMS[name]
    assert alarm.is_on(ILL[name], alarm.threshold)
    assert not alarm.is_on(ILL[name], alarm.threshold * 1e3 if alarm.side == "from" else alarm.threshold * -1e3)
    assert "{" not in alarm.told(ILL[name], alarm.threshold)


@pytest.mark.parametrize("name", ALARMS)
def test_one_step_alone_begins_no_alarm(name) -> None:
    assert not ALARMS[name].is_on(ILL[name][-1:], ALARMS[name].threshold)


def test_a_step_with_signal_ends_the_row_of_those_without() -> None:
    alarm = ALARMS["no_signal"]
    assert alarm.measure([NO_SIGNAL] * 5) == 5
    assert alarm.measure([NO_SIGNAL] * 5 + [SIGNAL]) == 0
    assert alarm.measure([SIGNAL] + [NO_SIGNAL] * 2) == 2


def test_steps_of_one_prompt_say_nothing_of_the_signal_before_there_are_sixteen() -> None:
    one = {**NO_SIGNAL, "group/number": 1.0}
    assert not ALARMS["no_signal"].is_on([one] * 15, 3)
    assert ALARMS["no_signal"].is_on([one] * 16, 3)


def test_a_step_whose_groups_were_all_replaced_has_signal() -> None:
    replaced = {"group/number": 8.0, "group/all_right": 1.0, "group/all_wrong": 0.0, "group/dropped": 1.0}
    assert ALARMS["no_signal"].measure([{**replaced, "group/refilled": 8.0}] * 3) == 0
    assert ALARMS["no_signal"].measure([{**replaced, "group/refilled": 0.0}] * 3) == 3


def test_groups_dropped_for_another_reason_have_no_signal_either() -> None:
    dropped = {"group/number": 8.0, "group/all_right": 0.0, "group/all_wrong": 0.0, "group/dropped": 1.0}
    assert ALARMS["no_signal"].measure([dropped] * 3) == 3


def test_pay_for_format_that_rises_with_accuracy_is_no_alarm() -> None:
    better = rising(1.0, 2.0, "reward/total")
    better = [{**line, "rollout/right": 0.3 + 0.05 * step} for step, line in enumerate(better)]
    assert ALARMS["format_without_accuracy"].measure(better) == 0


def test_a_policy_that_is_sure_and_right_has_not_collapsed() -> None:
    assert ALARMS["entropy_collapse"].measure(rising(0.5, 0.0, "policy/entropy")) is None


def test_shorter_rollouts_are_a_drift_as_longer_ones_are() -> None:
    lengths = [ALARMS["length_drift"].measure(rising(*ends, "rollout/num_tokens")) for ends in ((40, 160), (160, 40))]
    assert lengths[0] == pytest.approx(lengths[1])


def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    watch = Watch({})
    told = []
    for step, metrics in enumerate([NO_SIGNAL] * 4 + [SIGNAL] * 6, 1):
        metrics, lines = watch.note(step, metrics)
        told += [(step, metrics["alarm/no_signal"], *(line.split(":")[0] for line in lines))]
    assert told == [
        (1, 0.0),
        (2, 0.0),
        (3, 1.0, "alarm no_signal at step 3"),
        (4, 1.0),
        *((step, 1.0) for step in (5, 6, 7, 8)),
        (9, 0.0, "alarm no_signal is over at step 9"),
        (10, 0.0),
    ]


def test_what_wavers_about_its_threshold_is_one_alarm() -> None:
    watch, told = Watch({}), []
    for step in range(1, 40):
        told += watch.note(step, {"reward/failed": 0.6 if step % 4 == 0 else 0.0})[1]
    assert len(told) == 1


def test_a_threshold_can_be_set_and_an_alarm_left_out() -> None:
    watch = Watch({"no_signal": 2, "no_crops": "off"})
    for step in (1, 2):
        metrics, _ = watch.note(step, {**NO_SIGNAL, "tool/crop_share": 0.0})
    assert metrics["alarm/no_signal"] == 1
    assert "alarm/no_crops" not in metrics and len(metrics) == len(ALARMS) - 1


@pytest.mark.parametrize(
    ("stops", "ends"), [((), False), (("no_crops",), False), (("no_signal",), True), (("all",), True)]
)
def test_only_the_alarms_that_are_named_end_a_run(stops, ends) -> None:
    watch = Watch({}, stops, [NO_SIGNAL] * 2)
    assert watch.reason_to_stop is None
    watch.note(3, NO_SIGNAL)
    assert (watch.reason_to_stop is not None) == ends


def test_a_run_that_goes_on_finds_its_alarms_as_they_were_and_does_not_tell_them_again(tmp_path) -> None:
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": step, **NO_SIGNAL} for step in range(1, 50)]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "somebody's note\n")
    watch = Watch({}, (), read_log(log, last=40))
    assert watch.on == ["no_signal"]
    assert watch.note(41, NO_SIGNAL)[1] == []
    told = [watch.note(step, SIGNAL)[1] for step in range(42, 47)]
    assert told == [[], [], [], [], ["alarm no_signal is over at step 46"]]


def test_what_is_kept_of_a_long_history_judges_as_all_of_it() -> None:
    watch, history = Watch({}), rising(40, 160, "rollout/num_tokens")[:5] + [{**GOOD, "rollout/num_tokens": 160}] * 200
    for step, line in enumerate(history, 1):
        watch.note(step, line)
    assert len(watch.history) < 60
    for name, alarm in ALARMS.items():
        assert alarm.measure(watch.history) == alarm.measure(history), name


def test_the_gap_of_engines_is_found_where_few_steps_measure_it() -> None:
    watch = Watch({})
    for step in range(1, 31):  # rollouts made ahead: every tenth step samples from the newest weights
        metrics, _ = watch.note(step, {**GOOD, "gap/mean": 0.06} if step % 10 == 0 else {"step": step})
    assert metrics["alarm/engine_gap"] == 1.0


def test_an_alarm_counts_as_far_as_its_threshold() -> None:
    watch = Watch({"no_signal": 100})
    on = [watch.note(step, NO_SIGNAL)[0]["alarm/no_signal"] for step in range(1, 121)]
    assert on.index(1.0) == 99 and all(on[99:])


# -- in a run


def test_a_run_without_signal_says_so_and_does_not_end_as_done(run, capsys) -> None:
    settings = {"train_batch_size": 4, "num_generations": 2, "max_new_tokens": 2}
    _, lines = run(max_steps=4, reward="nothing", **settings)
    assert [line["alarm/no_signal"] for line in lines] == [0, 0, 0, 1]
    out = capsys.readouterr().out
    assert out.count("alarm no_signal at step 4: for 4 steps no group had") == 1
    assert "stage 2 learnt nothing" in out and "done" not in out


def test_a_run_whose_updates_had_no_gradient_is_not_done_also_when_it_goes_on(run, capsys) -> None:
    settings = {"reward": "nothing", "drop_constant_groups": False, "num_generations": 2, "max_new_tokens": 2}
    final, lines = run(max_steps=1, save_steps=1, **settings)
    assert lines[0]["optim/updates"] == 1 and lines[0]["optim/grad_norm"] == 0
    run(max_steps=2, resume_from_checkpoint=final.parent / "checkpoint-1", **settings)
    out = capsys.readouterr().out
    assert out.count("stage 2 learnt nothing, no step had a gradient: ") == 2 and "done" not in out
    run(max_steps=2, resume_from_checkpoint="latest", **settings)  # it has ended before
    assert capsys.readouterr().out.startswith("stage 2 learnt nothing, no step had a gradient, all 2 steps: ")


def test_a_run_with_an_alarm_on_at_its_end_is_not_done(run, capsys) -> None:
    run(max_steps=3, num_generations=2, max_new_tokens=2)
    assert "stage 2 ended with alarms on (no_crops)" in capsys.readouterr().out


def test_an_alarm_ends_the_run_that_asks_for_it_with_the_step_saved(run, tmp_path) -> None:
    settings = {"num_generations": 2, "max_new_tokens": 2, "stop_on_alarm": "no_crops", "max_steps": 5}
    with pytest.raises(TrainingError, match=r"step 3: stopped by alarm no_crops: only 0 of .*checkpoint-3 is kept"):
        run(**settings)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["alarm/no_crops"] for line in lines] == [0, 0, 1]


def test_a_step_that_begins_an_alarm_is_logged_whenever_others_are(run) -> None:
    _, lines = run(max_steps=5, num_generations=2, max_new_tokens=2, logging_steps=5)
    assert [line["step"] for line in lines] == [1, 3, 5]


def test_the_table_of_the_docs_has_every_alarm_with_its_threshold() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    written = {name: float(threshold) for name, threshold in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.M)}
    assert written == {name: alarm.threshold for name, alarm in ALARMS.items()}


def test_a_resumed_run_has_the_alarms_of_an_uninterrupted_one(run, tmp_path) -> None:
    settings = {"max_steps": 6, "num_generations": 2, "max_new_tokens": 2, "save_steps": 2}
    _, whole = run("whole", **settings)
    _, resumed = run("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4", **settings)
    alarms = [{name: value for name, value in line.items() if name.startswith("alarm/")} for line in whole[4:]]
    assert [{name: value for name, value in line.items() if name.startswith("alarm/")} for line in resumed] == alarms
    assert any(alarms[0].values())
