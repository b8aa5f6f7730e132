"""Checkpoints under kills, full disks and wrong owners."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from support import fork_python, fork_script, losses, quietly, read_metrics, tiny_flags

from train.checkpoint import Commit, checkpoint_names, committed_steps, find_checkpoint, is_verified, read_tensors
from train.job import JobError
from train.run_folder import RunFolderError


def test_latest_checkpoints_are_kept(run_here, tmp_path):
    run_here(checkpoint__keep=2)
    assert list(committed_steps(tmp_path / "run" / "checkpoints")) == [15, 20]


def test_folders_without_a_marker_do_not_count_and_are_removed(run_here, tmp_path):
    run_here(training__stop_after=10)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000010" / "commit.json").rename(folder / "lost.json")
    assert list(committed_steps(folder)) == [5]
    assert find_checkpoint(folder, "auto") == folder / "step-00000005"
    rows = run_here()
    assert [step for step, _ in losses(rows)][-1] == 20
    assert (folder / "step-00000010" / "commit.json").exists(), "step 10 was computed and saved again"


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run_here):
    run_here(training__stop_after=10)
    with pytest.raises(
        JobError, match=r"checkpoint.resume = 7: there is no such step; complete steps in .*: 5, 10"
    ) as no:
        run_here(checkpoint__resume=7)
    assert no.value.code == 2


def test_starting_anew_over_checkpoints_is_refused(run_here):
    run_here(training__stop_after=5)
    with pytest.raises(JobError, match="would overwrite this run"):
        run_here(checkpoint__resume="none")


def test_another_models_checkpoint_is_refused(run_here, tmp_path):
    run_here("one", training__stop_after=5)
    with pytest.raises(JobError, match=r"checkpoint of another model: num_layers 2 \(this run: 3\)"):
        run_here("two", model__shape__num_layers=3, checkpoint__resume=str(tmp_path / "one"))


def test_another_configuration_in_the_run_folder_is_refused(run_here):
    run_here(training__stop_after=5)
    with pytest.raises(JobError, match=r"optimizer.lr: 0.003 there, 0.5 now") as no:
        run_here(optimizer__lr=0.5)
    assert no.value.code == 2


def test_a_checkpoint_of_another_tokenizer_is_refused(run_here, tmp_path):
    run_here("one", training__stop_after=5, model__shape__vocab_size=300)
    with pytest.raises(JobError, match="was trained with another tokenizer"):
        run_here(
            "two",
            tokenizer__kind="bpe",
            tokenizer__vocab_size=300,
            model__shape__vocab_size=300,
            checkpoint__resume=str(tmp_path / "one"),
        )


@pytest.fixture
def full_disk(monkeypatch):
    """A disk without room for some steps' checkpoints; gives the list of the files that met it."""
    import errno

    fsync, met = os.fsync, []

    def fill(*steps: int) -> list[str]:
        def full(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(f"step-{step:08d}/__" in path for step in steps):
                met.append(path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        return met

    return fill


def test_a_save_that_fails_is_tried_again_and_the_run_goes_on(run_here, tmp_path, full_disk):
    straight = run_here("straight")
    met = full_disk(10)
    rows = run_here(checkpoint__mode="sync")
    assert len(met) == 1
    assert losses(rows) == losses(straight)
    (failed,) = [row for row in rows if row.get("event") == "save_failed"]
    assert failed["step"] == 10
    assert "could not save step 10" in failed["message"]
    assert "No space left on device" in failed["message"]
    assert "last complete one is step 5" in failed["message"]
    assert list(committed_steps(tmp_path / "run" / "checkpoints")) == [5, 11, 15, 20]


def test_the_run_stops_before_it_would_lose_more_than_it_may(run_here, tmp_path, full_disk):
    straight = run_here("straight")
    full_disk(*range(6, 21))
    with pytest.raises(
        JobError, match=r"(?s)6 steps are not saved, and checkpoint.max_unsaved_steps allows 6: could not save"
    ) as no:
        run_here(checkpoint__mode="sync", checkpoint__max_unsaved_steps=6)
    assert no.value.code == 4
    assert list(committed_steps(tmp_path / "run" / "checkpoints")) == [5]
    full_disk()
    assert [row for row in losses(run_here()) if row in losses(straight)] == losses(straight)


def test_a_disk_that_is_full_at_the_end_is_an_error(run_here, full_disk, monkeypatch):
    monkeypatch.setattr("train.trainer.PAUSES", (0.0, 0.01))
    met = full_disk(20)
    with pytest.raises(JobError, match=r"(?s)could not save step 20.*last complete one is step 15") as no:
        run_here()
    assert no.value.code == 4
    assert len(met) == 2


def test_what_is_written_meanwhile_is_the_state_of_its_step(run_here, tmp_path, monkeypatch):
    """Training goes on for several steps while a checkpoint is written; it holds none of them."""
    run_here("waited", checkpoint__mode="sync", checkpoint__keep=10)
    fsync, begun = os.fsync, []

    def slow(descriptor: int) -> None:
        if "step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(0.05)
        fsync(descriptor)

    from train.trainer import Trainer

    train_step = Trainer.train_step

    def noting(self, rows):
        begun.append(self.checkpoints.busy)
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", noting)
    monkeypatch.setattr(os, "fsync", slow)
    run_here("meanwhile", checkpoint__keep=10)
    assert sum(begun) > 3, "no step was made during a save"
    waited = committed_steps(tmp_path / "waited" / "checkpoints")
    meanwhile = committed_steps(tmp_path / "meanwhile" / "checkpoints")
    assert list(waited) == list(meanwhile) == [5, 10, 15, 20]
    for step, path in waited.items():
        names = checkpoint_names(path)
        expected, found = read_tensors(path, names), read_tensors(meanwhile[step], names)
        assert all(torch.equal(expected[name], found[name]) for name in names)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_first_save_reserves_no_memory(run_here, monkeypatch, optimizer):
    """Pinning a copy of all state takes seconds, in which training would stand still."""
    from train.saving import Checkpoints

    found, begin = [], Checkpoints.begin

    def noting_begin(self, *arguments):
        found.append((set(self._host), set(self.state())))
        begin(self, *arguments)

    monkeypatch.setattr(Checkpoints, "begin", noting_begin)
    run_here(optimizer__name=optimizer, training__steps=10)
    assert [reserved == kept for reserved, kept in found] == [True, True]
    assert any("exp_avg_sq" in name for name in found[0][0])


def test_permanent_checkpoints_stay_and_the_newest_are_verified(run_here, tmp_path):
    run_here(checkpoint__keep=1, checkpoint__permanent_interval=10)
    steps = committed_steps(tmp_path / "run" / "checkpoints")
    assert list(steps) == [10, 15, 20]
    run_here("two", checkpoint__keep=1, checkpoint__permanent_interval=10, training__stop_after=15)
    steps = committed_steps(tmp_path / "two" / "checkpoints")
    assert list(steps) == [10, 15]
    assert all(is_verified(path) for path in steps.values())
    assert [Commit.read(path).permanent for path in steps.values()] == [True, False]


def test_a_save_that_is_not_what_was_written_does_not_count(run_here, tmp_path, monkeypatch):
    from train import saving

    def rot(path: Path) -> None:
        if path.name == "step-00000010":
            (file,) = path.glob("*.distcp")
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)

    monkeypatch.setattr(saving, "_forget", rot)
    rows = run_here(checkpoint__mode="sync", checkpoint__keep=10)
    (failed,) = [row["message"] for row in rows if row.get("event") == "save_failed"]
    assert "could not verify" in failed
    assert list(committed_steps(tmp_path / "run" / "checkpoints")) == [5, 11, 15, 20]


@pytest.mark.slow
def test_checkpoints_behind_a_url(run_here):
    """Through fsspec, as on an object store: saved, thinned out, resumed, set aside, exported."""
    from upath import UPath

    straight = run_here("straight")
    run_here("remote", checkpoint__dir="memory://bucket/runs", training__stop_after=10)
    folder = UPath("memory://bucket/runs/remote")
    assert list(committed_steps(folder)) == [5, 10]
    assert all(is_verified(path) for path in committed_steps(folder).values())
    assert losses(run_here("remote", checkpoint__dir="memory://bucket/runs")) == losses(straight)
    assert list(committed_steps(folder)) == [5, 10, 15, 20]
    run_here("remote", checkpoint__dir="memory://bucket/runs", checkpoint__resume=10, checkpoint__keep=1)
    assert list(committed_steps(folder)) == [20]
    assert sorted(path.name for path in folder.iterdir() if "superseded" in path.name) == [
        "step-00000015.superseded",
        "step-00000020.superseded",
    ]


def test_checkpoints_in_another_folder(run_here, tmp_path):
    run_here("elsewhere", checkpoint__dir=str(tmp_path / "scratch"), training__stop_after=5)
    assert list(committed_steps(tmp_path / "scratch" / "elsewhere")) == [5]
    assert not (tmp_path / "elsewhere" / "checkpoints").exists()
    from train.export import open_trained

    assert open_trained(tmp_path / "elsewhere").commit.step == 5


@pytest.fixture(scope="module")
def stored(tmp_path_factory, text_corpus) -> Path:
    """A folder with a run `home/run` whose checkpoints are in `store/run`; tests work on copies."""
    from train.config_sources import load_config
    from train.job import run_job

    folder = tmp_path_factory.mktemp("stored")
    changes = {"run__dir": folder / "home", "checkpoint__dir": folder / "store", "training__stop_after": 5}
    config = load_config([], tiny_flags(folder, text_corpus, **changes), world_size=1)
    quietly(config)
    run_job(config)
    return folder


@pytest.fixture
def moved(stored, tmp_path) -> Path:
    """Run and checkpoints, copied; the run's configuration names the checkpoints where they were."""
    for name in ("home", "store"):
        shutil.copytree(stored / name, tmp_path / name)
    return tmp_path


def weights_of(path: Path) -> dict:
    from train.export import open_trained

    opened = open_trained(path)
    assert opened.tokenizer is not None
    assert opened.config.run.name == "run"
    return opened.state_dict()


def test_a_checkpoint_in_another_folder_is_opened_by_its_path(stored, moved):
    expected = weights_of(stored / "home" / "run")
    shutil.rmtree(moved / "home")  # nothing but the checkpoints
    for path in (stored / "store" / "run" / "step-00000005", moved / "store" / "run" / "step-00000005"):
        found = weights_of(path)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights_of(moved / "store" / "run").keys() == expected.keys()


def test_a_renamed_run_finds_its_checkpoints(stored, moved):
    (moved / "home" / "run").rename(moved / "home" / "other")
    (stored / "store" / "other").mkdir()  # of no concern to it
    try:
        assert weights_of(moved / "home" / "other").keys() == weights_of(stored / "home" / "run").keys()
    finally:
        (stored / "store" / "other").rmdir()


def test_a_checkpoint_of_an_earlier_version_is_opened_by_the_note_beside_it(stored, moved):
    steps = moved / "store" / "run"
    (steps / "config.toml").unlink()
    with pytest.raises(RunFolderError, match=r"is a checkpoint without its run: there is no .*config\.toml"):
        weights_of(steps / "step-00000005")  # the note names a run whose checkpoints are others
    config = moved / "home" / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(stored / "store"), str(moved / "store")))
    (steps / "run.json").write_text(json.dumps({"run": str(moved / "home" / "run")}))
    assert weights_of(steps / "step-00000005")


def test_commands_take_a_checkpoint_by_its_path(stored, tmp_path, capsys):
    from launch.cli import main

    step = str(stored / "store" / "run" / "step-00000005")
    main(["export", "--run", step, "--out", str(tmp_path / "hf")])
    main(["rows", "--run", step, "--step", "1"])
    main(["status", step])
    assert "step         5 of 20" in capsys.readouterr().out
    main(["generate", "--model", step, "--prompt", "a", "--max-new-tokens", "2"])


def test_a_run_begins_from_one_whose_checkpoints_are_elsewhere(stored, run_here):
    run_here("next", checkpoint__resume=str(stored / "home" / "run"), training__stop_after=6)


def test_a_warm_up_of_effects_that_is_over_where_a_run_begins_is_refused(run_here, tmp_path):
    run_here(training__stop_after=5)
    effects = '[{kind = "quantise", weight = {format = "int8"}}]'
    onwards = {"transforms": effects, "checkpoint__resume": str(tmp_path / "run"), "noise__warmup_steps": 5}
    with pytest.raises(
        JobError, match=r"noise.warmup_steps = 5 has no effect: .* is of step 5, .*model.init_from"
    ) as no:
        run_here("noisy", **onwards)
    assert no.value.code == 2
    onwards["noise__warmup_steps"] = 6
    run_here("noisy", **onwards, training__stop_after=8)
    assert run_here("noisy", **onwards, training__stop_after=10)[-1]["step"] == 10  # its own checkpoint is beyond it


def damage(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(run_here, tmp_path, capsys):
    straight = run_here("straight")
    run_here(training__stop_after=10)
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "step-00000010")
    assert losses(run_here()) == losses(straight)
    assert (folder / "step-00000010.damaged").is_dir()
    assert "trying the one before it" in capsys.readouterr().out


def test_a_damaged_checkpoint_that_was_asked_for_is_named(run_here, tmp_path):
    run_here(training__stop_after=10)
    damage(tmp_path / "run" / "checkpoints" / "step-00000010")
    with pytest.raises(JobError, match=r"could not load .*step-00000010.*other complete steps: 5") as no:
        run_here(checkpoint__resume=10)
    assert no.value.code == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run_here, tmp_path):
    run_here(training__stop_after=5)
    damage(tmp_path / "run" / "checkpoints" / "step-00000005")
    with pytest.raises(JobError, match=r"(?s)could not load .*No other checkpoint is complete") as no:
        run_here()
    assert no.value.code == 4
    before = read_metrics(tmp_path / "run")
    with pytest.raises(JobError, match=r"has saved before, but .* holds no complete checkpoint"):
        run_here()
    assert read_metrics(tmp_path / "run") == before


def test_checkpoints_that_are_not_where_they_were_are_missed(run_here, tmp_path):
    run_here(checkpoint__dir=str(tmp_path / "scratch"), training__stop_after=10)
    with pytest.raises(JobError, match=r"is checkpoint.dir right, and mounted") as no:
        run_here()
    assert no.value.code == 2
    (tmp_path / "run" / ".saved").unlink()
    assert losses(run_here(training__stop_after=1))[0][0] == 1


def test_two_runs_of_one_name_do_not_share_checkpoints(run_here, tmp_path):
    scratch = str(tmp_path / "scratch")
    run_here(checkpoint__dir=scratch, training__stop_after=5)
    with pytest.raises(JobError, match=r"holds the checkpoints of .*choose another run.name or checkpoint.dir"):
        run_here(checkpoint__dir=scratch, run__dir=tmp_path / "others", data__dir=tmp_path / "data")
    assert list(committed_steps(tmp_path / "scratch" / "run")) == [5]


def test_a_full_disk_under_the_metrics_does_not_end_the_run(run_here, tmp_path, monkeypatch, capsys):
    """The rows wait in memory, and are written when there is room."""
    import errno

    from train import metrics

    straight, full = run_here("straight"), [True] * 7

    class Full(metrics.Recorder):
        def _write(self, row):
            file = self._file

            class NoRoom:
                name = file.name

                def write(self, data):
                    if full:
                        full.pop()
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return file.write(data[:50])  # a disk that is nearly full takes a part

                def close(self):
                    file.close()

            self._file = NoRoom()
            super()._write(row)
            self._file = file

    monkeypatch.setattr("train.job.Recorder", Full)
    assert losses(run_here()) == losses(straight)
    assert capsys.readouterr().err.count("rows are kept in memory") == 1


def test_a_storage_that_cannot_be_looked_at_is_tried_again(run_here, tmp_path, monkeypatch):
    """A network disk that is away for a moment: even listing it fails."""
    import errno

    from train import saving

    listed, begin, make_empty, away = saving.committed_steps, saving.Checkpoints.begin, saving._make_empty, []

    def fail_while_away() -> None:
        if away:
            away.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def committed(folder):
        fail_while_away()
        return listed(folder)

    def empty(path):
        fail_while_away()
        make_empty(path)

    def noting(self, commit, *rest):
        away[:] = [True] * 2 if commit.step == 10 else []
        begin(self, commit, *rest)

    monkeypatch.setattr(saving, "committed_steps", committed)
    monkeypatch.setattr(saving, "_make_empty", empty)
    monkeypatch.setattr(saving.Checkpoints, "begin", noting)
    rows = run_here(checkpoint__mode="sync", checkpoint__keep=10)
    (failed,) = [row["message"] for row in rows if row.get("event") == "save_failed"]
    assert "unknown, " in failed
    assert "cannot be read: [Errno 5]" in failed
    assert list(committed_steps(tmp_path / "run" / "checkpoints")) == [5, 11, 15, 20]


def test_what_a_failed_save_leaves_takes_no_room(run_here, tmp_path, full_disk):
    full_disk(10)
    run_here(checkpoint__mode="sync", checkpoint__keep=10)
    assert not (tmp_path / "run" / "checkpoints" / "step-00000010").exists()


def test_names_are_plain_whatever_wraps_the_model(run_here, tmp_path):
    run_here(
        training__steps=1,
        schedule__warmup_steps=0,
        compile__enabled="true",
        compile__backend="aot_eager",
        activation_checkpointing__mode="selective",
    )
    names = set(checkpoint_names(tmp_path / "run" / "checkpoints" / "step-00000001"))
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257))
    assert names == set(hf.state_dict())


def killed_settings(kills: int) -> dict:
    return {"training__steps": 30 * kills, "metrics__log_interval": 5, "validation__interval": 30}


def kill_and_resume(tmp_path: Path, corpus: Path, kills: int, seed: int) -> None:
    """Kill a run `kills` times, every other time in the middle of a save; what is committed must always be whole."""
    generator = random.Random(seed)
    flags = tiny_flags(tmp_path, corpus, "killed", **killed_settings(kills), checkpoint__interval=2, checkpoint__keep=3)
    folder = tmp_path / "killed" / "checkpoints"
    latest = -1
    for kill in range(kills):
        process = fork_script(tmp_path / "killed-run", "train/main.py", *flags)
        begin = len(committed_steps(folder))
        target = latest + 2 * generator.randint(1, 3)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            steps = committed_steps(folder)
            torn = [path for path in folder.glob("step-*") if not (path / "commit.json").exists()]
            if steps and max(steps) >= target and (torn or kill % 2):
                break
            time.sleep(0.0005)
        time.sleep(generator.random() * 0.02)
        assert process.is_alive(), "the run ended before it could be killed"
        process.kill()
        process.join()
        steps = committed_steps(folder)
        assert len(steps) >= min(begin, 1), "a committed checkpoint was lost"
        assert max(steps, default=-1) >= latest, "the run went back behind a committed step"
        latest = max(steps, default=-1)
        for path in steps.values():
            read_tensors(path, checkpoint_names(path))
    done = fork_python(tmp_path, "train/main.py", *flags)
    assert f"resuming from {folder / f'step-{latest:08d}'}" in done.stdout


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_from_a_complete_step(run_here, tmp_path, text_corpus, kills):
    straight = run_here("straight", **killed_settings(kills), checkpoint__interval=0)
    kill_and_resume(tmp_path, text_corpus, kills, seed=kills)
    assert losses(read_metrics(tmp_path / "killed")) == losses(straight)


def test_a_start_from_another_run_is_made_once(run_here, tmp_path):
    """The same command started again, as a scheduler does, goes on with the run's own progress."""
    run_here("base", training__stop_after=5)
    path = str(tmp_path / "base" / "checkpoints" / "step-00000005")
    run_here("fork", training__stop_after=15, checkpoint__resume=path)
    rows = run_here("fork", checkpoint__resume=path)
    assert [step for step, _ in losses(rows)][-1] == 20
    assert not list((tmp_path / "fork" / "checkpoints").glob("*.superseded*"))
    steps = [step for step, loss in losses(rows)]
    assert steps[0] == 6
    assert steps.count(16) == 1


def test_a_run_folder_in_use_is_refused(run_here, tmp_path):
    from train.run_folder import RunFolder

    run_here(training__stop_after=5)
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with pytest.raises(JobError, match="in use by another job"):
        run_here()
    folder.unlock()
    run_here(training__stop_after=6)


def test_a_start_that_failed_may_be_corrected(run_here, tmp_path, real_inputs):
    with pytest.raises(JobError, match="longer than the model's context of 512"):
        run_here(
            model__init_from=f"hf:{real_inputs / 'stories260K'}",
            training__sequence_length=1024,
            **{f"model__shape__{key}": None for key in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")},
        )
    run_here(training__stop_after=1)
