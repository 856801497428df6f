"""Settings for all tests: eight CPU devices, strict dtype and rank promotion, one compilation cache for the whole suite."""

import os
import pathlib
import shlex

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Most of the time is compilation, three quarters of that for speed that tiny sizes do not need.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference data: INFINICONTEXT_GOLDEN, or the one beside the tests."""
    return pathlib.Path(os.environ.get("INFINICONTEXT_GOLDEN", pathlib.Path(__file__).parent / "golden"))


@pytest.fixture
def float64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def command_line(capsys):
    """Two functions of a line as a user types it: one runs it, the other sees it refused in one sentence with some words in it."""
    from infinicontext import cli

    def run(line):
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            cli.main(shlex.split(line))

    def fails(line, *words):
        with pytest.raises(SystemExit) as end:
            run(line)
        assert end.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        for word in words:
            assert word in message, message

    return run, fails


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process may map so many pieces of memory, and every compiled program takes some; those of a whole suite were too many."""
    yield
    jax.clear_caches()
