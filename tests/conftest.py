"""Every test runs offline, on one thread, and leaves nothing behind in the user's caches."""

import os
import tempfile

# Before the first import of a Hugging Face library: they read these once, on import.
_home = tempfile.TemporaryDirectory(prefix="bpgcn-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HOME=_home.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)  # they would win over HF_HOME
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
