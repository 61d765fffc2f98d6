"""TensorBoard's event files: what TensorBoard itself reads from them, after a resume too."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trichord.core.errors import ConfigError
from trichord.tracking import tensorboard as tensorboard_module
from trichord.tracking.config import TrackingConfig, WandbConfig
from trichord.tracking.metrics import read_metrics
from trichord.tracking.recorder import Recorder
from trichord.tracking.tensorboard import TensorBoardMirror


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """Chart -> (step, value), as TensorBoard would draw it."""
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_steps_done_again_stand_once(tmp_path):
    first = TensorBoardMirror(tmp_path)
    for step in (10, 20, 30, 40):
        first.log(step, {"train/loss": float(step), "speed/mfu_frac": 0.25})
    # killed here: nothing was closed. It goes on from the checkpoint of step 20.
    second = TensorBoardMirror(tmp_path, resume_step=20)
    for step in (30, 40, 50):
        second.log(step, {"train/loss": step + 0.5})
    second.close()
    charts = shown(tmp_path)
    assert charts["train/loss"] == [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5), (50, 50.5)]
    assert charts["speed/mfu_frac"] == [(10, 0.25), (20, 0.25)]


def test_a_start_over_hides_everything_before(tmp_path):
    TensorBoardMirror(tmp_path).log(10, {"train/loss": 1.0})
    again = TensorBoardMirror(tmp_path)  # a restart before the first checkpoint
    again.log(10, {"train/loss": 2.0})
    again.close()
    assert shown(tmp_path)["train/loss"] == [(10, 2.0)]


def test_non_finite_values_are_left_out(tmp_path):
    mirror = TensorBoardMirror(tmp_path)
    mirror.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    mirror.close()
    assert shown(tmp_path) == {"train/lr": [(1, 0.5)]}


def test_a_failure_warns_once_and_training_goes_on(tmp_path, log_lines):
    mirror = TensorBoardMirror(tmp_path)

    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    mirror._writer = Full()
    mirror.log(1, {"train/loss": 1.0})
    mirror.log(2, {"train/loss": 1.0})
    mirror.close()
    assert len(log_lines()) == 1
    assert "No space left" in log_lines()[0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path, log_lines):
    (tmp_path / "tensorboard").write_text("a file where the folder goes")
    TensorBoardMirror(tmp_path).log(1, {"train/loss": 1.0})
    assert "could not start" in log_lines()[0]


def test_without_a_package_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_module, "_WRITERS", ("no_such_package",))
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoardMirror(tmp_path)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_recorder_writes_it_when_asked(tmp_path, wanted):
    config = TrackingConfig(tensorboard=wanted, wandb=WandbConfig(mode="off"))
    facts = {"attempt": 1, "resume_step": None, "total_steps": 10, "run_name": "r", "run_facts": {}}
    recorder = Recorder(tmp_path, config, active=True, wandb_run_id=None, **facts)
    recorder.metrics(5, {"train/loss": 3.0})
    recorder.close(0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [5]
    assert (tmp_path / "tensorboard").exists() == wanted
    if wanted:
        assert shown(tmp_path) == {"train/loss": [(5, 3.0)]}
