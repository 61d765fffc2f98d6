"""What the installed DeepSpeed, the ranks and the disk do not allow is said before anything is built."""

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime import config as deepspeed_config

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.engine.job import check_job, overlay_named
from trichord.engine.overlay import REFUSED, TAKEN

NVME = {"zero_stage": 3, "offload": "optimizer"}


class Asked(dict):
    """Notes the names that it is asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def keys(self):
        return self


def test_every_name_that_deepspeed_asks_for_is_taken_or_refused(monkeypatch):
    asked = Asked({"train_micro_batch_size_per_gpu": 1})
    monkeypatch.setattr(deepspeed_config.copy, "copy", lambda config: config)
    deepspeed_config.DeepSpeedConfig(asked)
    assert {"zero_optimization", "bf16", "timers", "vocabulary_size"} <= asked.names
    assert asked.names - {*TAKEN, *REFUSED} == set()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"zero_stage": 3, "hpz_ranks": 3}, "engine.hpz_ranks is 3, which does not divide the 8 ranks"),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_sise": 7}}},
            "zero_optimization.reduce_bucket_sise: DeepSpeed says: .*; nearest: reduce_bucket_size",
        ),
        ({"deepspeed": {"comms_logger": True}}, r"does not take engine.deepspeed \(comms_logger\): TypeError"),
        (
            {"deepspeed": {"comms_logger": {"enabeld": 1}}},
            r"does not take engine.deepspeed \(comms_logger\): .*enabeld",
        ),
        ({"deepspeed": {"timers": 3}}, r"does not take engine.deepspeed \(timers\)"),
    ],
)
def test_what_this_job_cannot_do_is_one_line(engine, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_job(EngineConfig(**engine), 2, world_size=8)
    assert "\n" not in str(caught.value)


def test_quantised_weights_need_a_gpu(monkeypatch):
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: Cpu)
    engine = EngineConfig(zero_stage=3, deepspeed={"zero_optimization": {"zero_quantized_weights": True}})
    with pytest.raises(ConfigError, match=r"zero_optimization\.zero_quantized_weights needs a GPU"):
        check_job(engine, 2, world_size=8)


class Cpu:
    @staticmethod
    def device_name():
        return "cpu"


def test_what_the_engine_refuses_of_an_overlay_is_one_line_and_no_bug_is_taken_for_that():
    engine = EngineConfig(deepspeed={"timers": {}, "aio": {}})
    said = r"engine\.deepspeed \(timers, aio\): AssertionError: no such thing; correct"
    with pytest.raises(ConfigError, match=said), overlay_named(engine):
        raise AssertionError("no such\n  thing")
    with pytest.raises(AssertionError, match="a bug"), overlay_named(EngineConfig()):
        raise AssertionError("a bug")
    with pytest.raises(RuntimeError, match="lost"), overlay_named(engine):
        raise RuntimeError("a peer is lost")


def test_nvme_needs_a_folder_and_libaio(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"engine\.nvme_path .*file: expected a folder .*, got File exists"):
        check_job(EngineConfig(**NVME, nvme_path=str(tmp_path / "file")), 2, world_size=8)
    engine = EngineConfig(**NVME, nvme_path=str(tmp_path / "disk"))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(ConfigError, match="install libaio-dev, or leave nvme_path out"):
        check_job(engine, 2, world_size=8)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    check_job(engine, 2, world_size=8)
    assert list((tmp_path / "disk").iterdir()) == []
