"""Environment of every test: one thread, no network, the CPU unless there is a GPU. Imports no torch."""

import os
import shutil
import signal
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: processes that tests start would not see a Ctrl-C, as is right for users.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = Path("/dev/nvidiactl").exists() or shutil.which("rocm-smi") is not None

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# What tests index and fetch must not fill the user's own cache.
os.environ["TRICHORD_CACHE"] = tempfile.mkdtemp(prefix="trichord-test-cache-")
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed looks for ninja, and torchrun is started by name: both stand beside the interpreter.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` say that there is none instead of failing one by one."""
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["TRICHORD_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def moto():
    """(host, port) of a real S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3_client(moto, monkeypatch, tmp_path):
    """A client of that server, which is empty. Code under test finds it by the variables that boto reads; a test that
    puts something in between sets AWS_ENDPOINT_URL anew."""
    import boto3

    url = f"http://{moto[0]}:{moto[1]}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
    return boto3.client("s3", endpoint_url=url)
