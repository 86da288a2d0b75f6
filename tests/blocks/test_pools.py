"""Blocks of pools: the job scripts they lead to, letter by letter, and how they are saved and found."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from distributed.security import Security
from pydantic import ValidationError

from blocks.pools import LocalPools, PoolsBlock, SlurmGpuNodes, SlurmNodes, SlurmPools, load_pools
from flows.pools import capacity_of, pools_of_this_machine
from infra.pools.slurm_job import SlurmJob
from infra.prefect_server import Api
from tasks.cores import assumed_flops
from tasks.errors import SettingsError, SuperResolutionError

ROOT: Final = Path(__file__).parents[2]
SCHEDULER: Final = "tls://10.0.0.1:8786"

#: Credentials as they lie in a shared folder while pools are open.
FILES: Final = Security(
    require_encryption=True,
    tls_ca_file="/fsx/.superres-tls-head-1-ab/ca_file.pem",
    tls_worker_cert="/fsx/.superres-tls-head-1-ab/cert.pem",
    tls_worker_key="/fsx/.superres-tls-head-1-ab/key.pem",
)

DEFAULT_CPU: Final = """\
#!/bin/bash

#SBATCH -J superres-cpu
#SBATCH -p cpu
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH -t 08:00:00
#SBATCH --output=<home>/logs/<user>/superres-cpu-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
export OMP_NUM_THREADS="1"
export MKL_NUM_THREADS="1"
export OPENBLAS_NUM_THREADS="1"
export NUMEXPR_NUM_THREADS="1"
export OMP_WAIT_POLICY="passive"
export SUPERRES_WORKER_LOG="<home>/logs/<user>/superres-cpu-${SLURM_JOB_ID}.log"
exec <python> -m infra.pools.node tls://10.0.0.1:8786 --name cpu-0 --nthreads 2 --memory-limit 0.93GiB\
 --death-timeout 60.0 --local-directory "${TMPDIR:-/tmp}" --pool cpu\
 --imports infra.pools.remote,tasks.extract,tasks.encode <security>
"""

DEFAULT_GPU: Final = """\
#!/bin/bash

#SBATCH -J superres-gpu
#SBATCH -p gpu
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH -t 08:00:00
#SBATCH --output=<home>/logs/<user>/superres-gpu-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --gres=gpu:1
export OMP_NUM_THREADS="4"
export MKL_NUM_THREADS="4"
export OPENBLAS_NUM_THREADS="4"
export NUMEXPR_NUM_THREADS="4"
export OMP_WAIT_POLICY="passive"
export MALLOC_ARENA_MAX="1"
export GOMP_SPINCOUNT="20000"
export SUPERRES_WORKER_LOG="<home>/logs/<user>/superres-gpu-${SLURM_JOB_ID}.log"
exec <python> -m infra.pools.node tls://10.0.0.1:8786 --name gpu-0 --nthreads 1 --memory-limit 0.93GiB\
 --death-timeout 60.0 --local-directory "${TMPDIR:-/tmp}" --pool gpu\
 --imports infra.pools.remote,tasks.upscale,tasks.models.engine <security>
"""

FULL_CPU: Final = """\
#!/bin/bash

#SBATCH -J superres-cpu
#SBATCH -p short
#SBATCH -A film
#SBATCH -n 1
#SBATCH --cpus-per-task=6
#SBATCH -t 00:30:00
#SBATCH --output=<home>/job-logs/superres-cpu-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --exclusive
#SBATCH --constraint=avx512
export OMP_NUM_THREADS="1"
export MKL_NUM_THREADS="1"
export OPENBLAS_NUM_THREADS="1"
export NUMEXPR_NUM_THREADS="1"
export OMP_WAIT_POLICY="passive"
export SPOOL="$TMPDIR/spool"
export SUPERRES_WORKER_LOG="<home>/job-logs/superres-cpu-${SLURM_JOB_ID}.log"
module load ffmpeg
export FROM_PROLOGUE="$SLURM_JOB_ID of $SPOOL"
exec '<home>/my python/bin/python' -m infra.pools.node tls://10.0.0.1:8786 --name cpu-0 --nthreads 3\
 --memory-limit 0.93GiB --death-timeout 12.5 --local-directory "/local/$SLURM_JOB_ID" --pool cpu\
 --imports infra.pools.remote,tasks.extract,tasks.encode --interface ib0 <security>
"""

FULL_GPU: Final = """\
#!/bin/bash

#SBATCH -J superres-gpu
#SBATCH -p a100
#SBATCH -A film
#SBATCH -n 1
#SBATCH --cpus-per-task=12
#SBATCH --mem=64G
#SBATCH -t 2-00:00:00
#SBATCH --output=<home>/job-logs/superres-gpu-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --gres=gpu:a100:1
#SBATCH --qos=low
export OMP_NUM_THREADS="3"
export MKL_NUM_THREADS="12"
export OPENBLAS_NUM_THREADS="12"
export NUMEXPR_NUM_THREADS="12"
export OMP_WAIT_POLICY="passive"
export MALLOC_ARENA_MAX="1"
export GOMP_SPINCOUNT="20000"
export MOTTO="say \\"hi\\", not \\`whoami\\` or C:\\\\n"
export SUPERRES_WORKER_LOG="<home>/job-logs/superres-gpu-${SLURM_JOB_ID}.log"
module load ffmpeg
export FROM_PROLOGUE="$SLURM_JOB_ID of $SPOOL"
exec '<home>/my python/bin/python' -m infra.pools.node tls://10.0.0.1:8786 --name gpu-0 --nthreads 2\
 --memory-limit 0.93GiB --death-timeout 12.5 --local-directory "/local/$SLURM_JOB_ID" --pool gpu\
 --imports infra.pools.remote,tasks.upscale,tasks.models.engine --interface ib0 <security>
"""

WITHOUT_SECURITY: Final = "--protocol tcp"
WITH_FILES: Final = (
    "--protocol tls --tls-ca-file /fsx/.superres-tls-head-1-ab/ca_file.pem"
    " --tls-cert /fsx/.superres-tls-head-1-ab/cert.pem --tls-key /fsx/.superres-tls-head-1-ab/key.pem"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs and credentials go by default."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("SUPERRES_HOME", str(home))
    return home


def full_block(home: Path, **changes: Any) -> SlurmPools:
    """A block in which nothing is left at its default."""
    values: dict[str, Any] = {
        "cpu": SlurmNodes(
            partition="short",
            cores=6,
            memory="",
            walltime="00:30:00",
            minimum=1,
            maximum=9,
            slots=3,
            idle_minutes=0.5,
            coming="start",
            maximum_losses=7,
            directives=["--exclusive", "--constraint=avx512"],
            environment={"SPOOL": "$TMPDIR/spool"},
        ),
        "gpu": SlurmGpuNodes(
            partition="a100",
            cores=12,
            memory="64GiB",
            gres="gpu:a100:1",
            walltime="2-00:00:00",
            maximum=8,
            slots=2,
            coming="ignore",
            directives=["--qos=low"],
            environment={"OMP_NUM_THREADS": "3", "MOTTO": 'say "hi", not `whoami` or C:\\n'},
        ),
        "interface": "ib0",
        "host": "10.0.0.1",
        "shared_directory": str(home / "credentials"),
        "log_directory": str(home / "job-logs"),
        "local_directory": "/local/$SLURM_JOB_ID",
        "account": "film",
        "prologue": ["module load ffmpeg", 'export FROM_PROLOGUE="$SLURM_JOB_ID of $SPOOL"'],
        "python": f"{home}/my python/bin/python",
        "death_timeout": 12.5,
    }
    return SlurmPools(**values | changes)


def script(block: SlurmPools, name: str, security: Security | None = None) -> str:
    """The job script of the first worker of a pool."""
    pool = next(pool for pool in block.pools() if pool.name == name)
    options = pool.start.job_options(pool, security)  # type: ignore[attr-defined]
    return SlurmJob(SCHEDULER, name=pool.worker_name(0), **options).job_script()


def filled(text: str, home: Path, security: Security | None) -> str:
    """An expected script with what differs from machine to machine."""
    places = {
        "<home>": str(home),
        "<user>": str(os.getuid()),
        "<python>": shlex.quote(sys.executable),
        "<security>": WITH_FILES if security else WITHOUT_SECURITY,
    }
    for place, value in places.items():
        text = text.replace(place, value)
    return text


@pytest.mark.parametrize("security", [None, FILES], ids=["plain", "tls"])
class TestJobScript:
    @pytest.mark.parametrize(("pool", "expected"), [("cpu", DEFAULT_CPU), ("gpu", DEFAULT_GPU)])
    def test_of_the_defaults(self, home: Path, pool: str, expected: str, security: Security | None) -> None:
        assert script(SlurmPools(), pool, security) == filled(expected, home, security)

    @pytest.mark.parametrize(("pool", "expected"), [("cpu", FULL_CPU), ("gpu", FULL_GPU)])
    def test_of_a_block_with_everything(self, home: Path, pool: str, expected: str, security: Security | None) -> None:
        assert script(full_block(home), pool, security) == filled(expected, home, security)

    @pytest.mark.parametrize("pool", ["cpu", "gpu"])
    def test_can_be_parsed_by_bash(self, home: Path, pool: str, security: Security | None) -> None:
        for block in (SlurmPools(), full_block(home)):
            subprocess.run(["bash", "-n"], input=script(block, pool, security), text=True, check=True)


def run_script(text: str, python: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Run a job script with a stand-in for the interpreter; the arguments and variables that this got."""
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$$" "$@"\nprintf "\\0"\nexec env -0\n')
    python.chmod(0o755)
    path = python.parent / "job.sh"
    path.write_text(text)
    job = subprocess.Popen(
        ["bash", str(path)], env={"PATH": "/usr/bin:/bin", **environment}, stdout=subprocess.PIPE, text=True
    )
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    arguments, variables = output.split("\0\0", 1)
    process, *arguments = arguments.split("\0")
    assert int(process) == job.pid  # A signal to the batch script's process reaches the worker.
    return arguments, dict(entry.split("=", 1) for entry in variables.split("\0") if entry)


class TestRunningScript:
    def test_interpreter_gets_what_the_block_says(self, home: Path) -> None:
        text = script(full_block(home), "cpu", FILES)
        arguments, variables = run_script(
            text, home / "my python/bin/python", SLURM_JOB_ID="77", TMPDIR="/scratch/job 77"
        )
        assert arguments == [
            "-m", "infra.pools.node", "tls://10.0.0.1:8786",
            "--name", "cpu-0",
            "--nthreads", "3",
            "--memory-limit", "0.93GiB",
            "--death-timeout", "12.5",
            "--local-directory", "/local/77",
            "--pool", "cpu",
            "--imports", "infra.pools.remote,tasks.extract,tasks.encode",
            "--interface", "ib0",
            "--protocol", "tls",
            "--tls-ca-file", "/fsx/.superres-tls-head-1-ab/ca_file.pem",
            "--tls-cert", "/fsx/.superres-tls-head-1-ab/cert.pem",
            "--tls-key", "/fsx/.superres-tls-head-1-ab/key.pem",
        ]  # fmt: skip
        assert variables["SUPERRES_WORKER_LOG"] == f"{home}/job-logs/superres-cpu-77.log"
        assert variables["SPOOL"] == "/scratch/job 77/spool"
        assert variables["FROM_PROLOGUE"] == "77 of /scratch/job 77/spool"

    def test_environment_reaches_the_interpreter_unharmed(self, home: Path) -> None:
        _, variables = run_script(script(full_block(home), "gpu"), home / "my python/bin/python", SLURM_JOB_ID="77")
        assert variables["MOTTO"] == 'say "hi", not `whoami` or C:\\n'
        assert (variables["OMP_NUM_THREADS"], variables["MKL_NUM_THREADS"]) == ("3", "12")

    @pytest.mark.parametrize(
        ("environment", "folder"), [({}, "/tmp"), ({"TMPDIR": "/scratch"}, "/scratch"), ({"TMPDIR": "/a b"}, "/a b")]
    )
    def test_local_folder_is_the_nodes_own(self, home: Path, environment: dict[str, str], folder: str) -> None:
        python = home / "python"
        arguments, _ = run_script(script(SlurmPools(python=str(python)), "gpu"), python, **environment)
        assert arguments[arguments.index("--local-directory") :][:4] == ["--local-directory", folder, "--pool", "gpu"]

    def test_empty_local_folder_means_the_default(self, home: Path) -> None:
        python = home / "python"
        block = SlurmPools(python=str(python), local_directory="")
        arguments, _ = run_script(script(block, "gpu"), python, TMPDIR="/scratch")
        assert arguments[arguments.index("--local-directory") :][:2] == ["--local-directory", "/scratch"]

    def test_credentials_in_a_folder_with_a_space(self, home: Path) -> None:
        python = home / "python"
        files = Security(
            require_encryption=True,
            tls_ca_file="/shared folder/ca.pem",
            tls_worker_cert="/shared folder/cert.pem",
            tls_worker_key="/shared folder/key.pem",
        )
        arguments, _ = run_script(script(SlurmPools(python=str(python)), "gpu", files), python)
        assert arguments[arguments.index("--tls-ca-file") :] == [
            "--tls-ca-file", "/shared folder/ca.pem",
            "--tls-cert", "/shared folder/cert.pem",
            "--tls-key", "/shared folder/key.pem",
        ]  # fmt: skip

    def test_log_in_a_folder_with_a_space(self, home: Path) -> None:
        python = home / "python"
        text = script(SlurmPools(python=str(python), log_directory=f"{home}/my logs"), "gpu")
        # sbatch takes its options apart as a shell does.
        (option,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
        assert shlex.split(option, comments=False) == ["#SBATCH", f"--output={home}/my logs/superres-gpu-%j.log"]
        _, variables = run_script(text, python, SLURM_JOB_ID="77")
        assert variables["SUPERRES_WORKER_LOG"] == f"{home}/my logs/superres-gpu-77.log"


#: Every setting that dask-jobqueue reads for a job, those with old names too.
JOBQUEUE_YAML: Final = """\
jobqueue:
  slurm:
    name: theirs
    cores: 99
    memory: 99GB
    processes: 9
    python: /theirs/python
    interface: theirs0
    death-timeout: 999
    local-directory: /theirs
    shared-temp-directory: /theirs
    extra: ["--theirs"]
    worker-command: theirs.worker
    worker-extra-args: ["--theirs"]
    shebang: "#!/bin/theirs"
    queue: theirs
    account: theirs
    project: theirs
    walltime: "99:00:00"
    env-extra: ["export THEIRS=1"]
    job-script-prologue: ["export THEIRS=1"]
    header-skip: ["--cpus-per-task"]
    job-cpu: 99
    job-mem: 99GB
    job-extra: ["--theirs"]
    job-extra-directives: ["--theirs"]
    job-directives-skip: ["--cpus-per-task"]
    log-directory: <folder>/theirs
"""

PRINT_SCRIPTS: Final = f"""
import dask
from blocks.pools import SlurmPools
from infra.pools.slurm_job import SlurmJob
print(dask.config.get("jobqueue.slurm.name"))
for pool in SlurmPools().pools():
    print(SlurmJob({SCHEDULER!r}, name=pool.worker_name(0), **pool.start.job_options(pool, None)).job_script(), end="")
"""


def test_settings_of_dask_jobqueue_change_nothing(home: Path) -> None:
    (home / "dask").mkdir()
    (home / "dask/jobqueue.yaml").write_text(JOBQUEUE_YAML.replace("<folder>", str(home)))
    environment = {**os.environ, "HOME": str(home), "DASK_CONFIG": str(home / "dask")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRINT_SCRIPTS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    name, _, scripts = done.stdout.partition("\n")
    assert name == "theirs"  # The file was read.
    assert scripts == filled(DEFAULT_CPU + DEFAULT_GPU, home, None)
    assert not (home / "theirs").exists()


IMPORT: Final = """
import signal, sys, threading

def handler(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, handler)
function = signal.signal
errors = []

def load():
    try:
        import infra.pools.slurm_job
    except BaseException as error:
        errors.append(error)

if sys.argv[1] == "thread":
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
else:
    load()
assert not errors, errors
assert "dask_jobqueue" in sys.modules
assert signal.signal is function
assert signal.getsignal(signal.SIGINT) is handler
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("where", ["thread", "main"])
def test_importing_the_job_leaves_signals_alone(where: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, where],
        cwd=ROOT,
        env={**os.environ, "DASK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


class TestPools:
    def test_local_block_gives_the_pools_of_this_machine(self) -> None:
        assert LocalPools().pools() == pools_of_this_machine()

    def test_local_block_with_other_values(self) -> None:
        cpu, gpu = LocalPools(cpu_slots=5, idle_minutes=0.5).pools()
        assert (cpu.slots, cpu.idle_seconds, gpu.idle_seconds) == (5, 30.0, 30.0)
        assert LocalPools(cpu_slots=5).scheduler_host == "127.0.0.1"

    def test_bounds_of_slurm_pools(self, home: Path) -> None:
        cpu, gpu = full_block(home).pools()
        assert (cpu.name, cpu.slots, cpu.minimum, cpu.maximum, cpu.idle_seconds) == ("cpu", 3, 1, 9, 30.0)
        assert (cpu.coming, cpu.maximum_losses) == ("start", 7)
        assert (gpu.name, gpu.slots, gpu.minimum, gpu.maximum, gpu.idle_seconds) == ("gpu", 2, 0, 8, 300.0)
        assert (gpu.coming, gpu.maximum_losses) == ("ignore", 5)

    def test_gpu_nodes_are_held_but_not_started_early(self) -> None:
        block = SlurmPools.model_validate({"gpu": {"partition": "a100"}})
        cpu, gpu = block.pools()
        assert (cpu.coming, gpu.coming) == ("ignore", "keep")
        assert "#SBATCH --gres=gpu:1" in script(block, "gpu").splitlines()
        assert "--gres" not in script(block, "cpu")

    def test_chunks_are_sized_for_what_the_gpu_pool_asks_for(self) -> None:
        on_gpus = SlurmPools.model_validate({"gpu": {"partition": "a100", "maximum": 8}})
        on_cores = SlurmPools.model_validate({"gpu": {"partition": "cpu", "gres": "", "cores": 64}})
        by_option = {"partition": "a100", "gres": "", "directives": ["--gpus-per-node=1"]}
        found = [capacity_of(block.pools()) for block in (on_gpus, on_cores)]
        assert [(capacity.gpu_slots, capacity.cpu_slots) for capacity in found] == [(8, 8), (4, 8)]
        assert found[0].flops > 5 * found[1].flops > 50 * assumed_flops(1, on_gpu=False)
        assert capacity_of(SlurmPools.model_validate({"gpu": by_option}).pools()).flops == found[0].flops

    def test_address_and_folders_of_slurm_pools(self, home: Path) -> None:
        block = full_block(home)
        assert block.scheduler_host == "10.0.0.1"
        assert {pool.start.shared_directory for pool in block.pools()} == {home / "credentials"}
        assert {pool.start.shared_directory for pool in SlurmPools().pools()} == {home / "shared"}

    def test_address_is_that_of_the_interface(self) -> None:
        assert SlurmPools(interface="lo").scheduler_host == "127.0.0.1"

    def test_folders_may_begin_with_a_tilde(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(home))
        cpu, _ = SlurmPools(shared_directory="~/tls", log_directory="~/logs").pools()
        assert cpu.start.shared_directory == home / "tls"
        assert cpu.start.log_path(cpu) == f"{home}/logs/superres-cpu-%j.log"  # type: ignore[attr-defined]


class TestMemory:
    """Slurm takes a number without a unit for megabytes, and 0 for all memory of the node."""

    @pytest.mark.parametrize(
        ("memory", "directives"),
        [
            ("", [set()]),
            ("  ", [set()]),
            ("8GB", [{"#SBATCH --mem=8G"}]),
            ("512MiB", [{"#SBATCH --mem=512M"}]),
            ("0", [{"#SBATCH --mem=0"}]),
            ("4000", [{"#SBATCH --mem=4000"}, {"#SBATCH --mem=4000M"}]),
        ],
    )
    def test_is_what_slurm_would_understand(self, home: Path, memory: str, directives: list[set[str]]) -> None:
        text = script(SlurmPools(cpu=SlurmNodes(partition="cpu", memory=memory)), "cpu")
        assert {line for line in text.splitlines() if "--mem=" in line} in directives


class TestWrongValues:
    @pytest.mark.parametrize(
        ("values", "place"),
        [
            ({"cpu": {}}, ("cpu", "partition")),
            ({"cpu": {"partition": "cpu", "cores": 0}}, ("cpu", "cores")),
            ({"cpu": {"partition": "cpu", "slots": 0}}, ("cpu", "slots")),
            ({"cpu": {"partition": "cpu", "maximum": 0}}, ("cpu", "maximum")),
            ({"cpu": {"partition": "cpu", "minimum": -1}}, ("cpu", "minimum")),
            ({"cpu": {"partition": "cpu", "maximum_losses": 0}}, ("cpu", "maximum_losses")),
            ({"cpu": {"partition": "cpu", "idle_minutes": -1}}, ("cpu", "idle_minutes")),
            ({"cpu": {"partition": "cpu", "coming": "soon"}}, ("cpu", "coming")),
            ({"cpu": {"partition": "cpu", "qos": "low"}}, ("cpu", "qos")),
            ({"gpu": {"partition": "gpu", "directives": "--qos=low"}}, ("gpu", "directives")),
            ({"death_timeout": 0}, ("death_timeout",)),
            ({"prologue": "module load ffmpeg"}, ("prologue",)),
        ],
    )
    def test_of_slurm_pools_are_refused(self, values: dict[str, Any], place: tuple[str, ...]) -> None:
        with pytest.raises(ValidationError) as refusal:
            SlurmPools(**values)
        assert [error["loc"] for error in refusal.value.errors()] == [place]

    @pytest.mark.parametrize("values", [{"cpu_slots": 0}, {"cpu_slots": "many"}, {"idle_minutes": -1}])
    def test_of_local_pools_are_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(ValidationError) as refusal:
            LocalPools(**values)
        assert [error["loc"] for error in refusal.value.errors()] == [tuple(values)]

    @pytest.mark.parametrize(
        "values",
        [
            {"cpu": {"partition": "cpu", "minimum": 3, "maximum": 2}},
            {"cpu": {"partition": "cpu", "memory": "lots"}},
            {"log_directory": "/proc/nowhere/logs"},
        ],
        ids=["bounds", "memory", "logs"],
    )
    def test_are_refused_in_the_projects_words_at_the_latest_by_the_check(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
    ) -> None:
        # Slurm itself is not asked about these: they keep a job script from being written.
        (home / "sbatch").write_text("#!/bin/sh\n")
        (home / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
        with pytest.raises((ValidationError, SuperResolutionError)):
            SlurmPools(**values).check()


@pytest.fixture
def saved(prefect_api: Api, home: Path) -> Iterator[dict[str, PoolsBlock]]:
    """Blocks that are saved for one test, by type and name."""
    blocks: dict[str, PoolsBlock] = {
        "slurm-pools/fsx": full_block(home),
        "local-pools/workstation": LocalPools(cpu_slots=7, scratch_directory="/big"),
        "slurm-pools/twice": SlurmPools(account="slurm"),
        "local-pools/twice": LocalPools(cpu_slots=9),
    }
    for name, block in blocks.items():
        block.save(name.rpartition("/")[2])
    yield blocks
    for name, block in blocks.items():
        type(block).delete(name.rpartition("/")[2])


def facts(block: PoolsBlock) -> tuple[type[PoolsBlock], dict[str, Any]]:
    """What makes two blocks the same, wherever they were loaded from."""
    return type(block), block.model_dump(include=set(type(block).model_fields))


class TestSavedBlocks:
    def test_come_back_as_they_were(self, saved: dict[str, PoolsBlock]) -> None:
        for name, block in saved.items():
            loaded = load_pools(name)
            assert facts(loaded) == facts(block)
            assert loaded.pools() == block.pools()

    def test_are_found_by_name_alone(self, saved: dict[str, PoolsBlock]) -> None:
        assert facts(load_pools("fsx")) == facts(saved["slurm-pools/fsx"])
        assert facts(load_pools("workstation")) == facts(saved["local-pools/workstation"])
        assert facts(load_pools("twice")) == facts(saved["slurm-pools/twice"])

    def test_are_found_by_their_own_type_only(self, saved: dict[str, PoolsBlock]) -> None:
        for name in ("local-pools/fsx", "slurm-pools/workstation", "pools/fsx"):
            with pytest.raises(SettingsError, match=f"no pools called '{name}'"):
                load_pools(name)

    def test_give_the_same_job_script(self, saved: dict[str, PoolsBlock], home: Path) -> None:
        loaded = load_pools("fsx")
        assert isinstance(loaded, SlurmPools)
        assert script(loaded, "gpu", FILES) == filled(FULL_GPU, home, FILES)

    @pytest.mark.parametrize("name", ["nonesuch", "slurm-pools/nonesuch", "slurm-pools/slurm", "", "/", "a/b/c"])
    def test_that_do_not_exist_are_refused(self, prefect_api: Api, name: str) -> None:
        with pytest.raises(SettingsError, match="there are no pools called"):
            load_pools(name)


class TestDefaultBlocks:
    def test_slurm_without_a_block_of_that_name(self, prefect_api: Api) -> None:
        assert facts(load_pools("slurm")) == facts(SlurmPools())

    def test_slurm_with_a_block_of_that_name(self, prefect_api: Api) -> None:
        SlurmPools(account="ours").save("slurm")
        try:
            assert facts(load_pools("slurm")) == facts(SlurmPools(account="ours"))
        finally:
            SlurmPools.delete("slurm")

    def test_local_asks_no_server(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "from blocks.pools import load_pools; print(repr(load_pools('local')))"],
            cwd=ROOT,
            env={**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == repr(LocalPools())


def test_a_saved_block_that_is_wrong_is_refused_with_the_reason(prefect_api: Api) -> None:
    """Whoever edits a block elsewhere than here is not stopped by its rules."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import BlockDocumentUpdate

    document = SlurmPools().save("edited")
    try:
        with get_client(sync_client=True) as client:
            data = {"cpu": {"partition": "cpu", "slots": 0}}
            client.update_block_document(document, BlockDocumentUpdate(data=data, merge_existing_data=True))  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match=r"edited.*slots"):
            load_pools("edited")
    finally:
        SlurmPools.delete("edited")
